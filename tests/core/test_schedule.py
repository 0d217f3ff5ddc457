"""When a run cuts and how fast it learns, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensibert.core.errors import SensibertError
from sensibert.core.schedule import REWARM_PEAK, Schedule
from sensibert.data.tasks import TASKS


def test_oneshot_cuts_once_after_the_warm_share():
    assert Schedule().cuts(300) == {100: 1.0}
    assert Schedule(trim_start=0.5).cuts(10) == {5: 1.0}


def test_a_cubic_spreads_its_cuts_over_the_trim_share():
    cuts = Schedule("cubic", trim_start=0.3, trim_duration=0.2, milestones=3).cuts(100)
    assert cuts == {30: 1 / 3, 40: 2 / 3, 50: 1.0}
    assert Schedule("cubic", trim_start=0.3, milestones=1).cuts(100) == {30: 1.0}


def test_the_cubic_ratio_falls_fast_then_slowly():
    ratio = Schedule("cubic").ratio
    assert ratio(0, 0.3) == 1 and ratio(1, 0.3) == 0.3
    assert ratio(0.5, 0.2) == pytest.approx(0.2 + 0.8 / 8)


@given(
    shape=st.sampled_from(["oneshot", "cubic"]),
    total=st.integers(1, 500),
    warm=st.floats(0, 0.7),
    trim=st.floats(0, 0.25),
    milestones=st.integers(1, 9),
)
def test_every_schedule_reaches_the_budget_inside_the_run(shape, total, warm, trim, milestones):
    cuts = Schedule(shape, warm, trim, milestones).cuts(total)
    steps = sorted(cuts)
    assert 1 <= steps[0] and steps[-1] <= total
    assert [cuts[step] for step in steps] == sorted(cuts.values()) and cuts[steps[-1]] == 1.0


def test_the_rate_warms_up_falls_and_re_warms_after_the_last_cut():
    total = 100
    lr = Schedule(trim_start=0.4, warmup_ratio=0.1, rewarm_ratio=0.05, recover_peak=1.0).lr()
    factors = [lr(step, total) for step in range(total + 1)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:40] == pytest.approx([1 - step / 100 for step in range(10, 40)])  # one line to 0 without a cut
    assert factors[40] == pytest.approx(0.6 + 0.4 / 5) and factors[44] == pytest.approx(1)
    assert factors[45:] == pytest.approx([(100 - step) / 55 for step in range(45, 101)])
    assert factors[100] == 0


def test_a_plain_recovery_goes_on_where_the_rate_was_and_keeps_the_dropout():
    usual, plain = (
        Schedule(trim_start=0.4, rewarm_ratio=0.05),
        Schedule(trim_start=0.4, rewarm_ratio=0.05, recovery="continue"),
    )
    rates = [plain.lr()(step, 100) for step in range(40, 101)]
    assert rates == pytest.approx([0.6] * 5 + [0.6 * n / 55 for n in range(55, -1, -1)])
    assert max(usual.lr(left=0.1)(step, 100) for step in range(40, 101)) == REWARM_PEAK
    assert (usual.dropout(), plain.dropout()) == (0.0, None)
    own = Schedule(recovery="continue", recover_peak=1.2, recover_dropout=0.3)
    assert own.dropout() == 0.3 and max(own.lr()(step, 90) for step in range(30, 91)) == pytest.approx(1.2)


def test_embeddings_freeze_up_to_half_unless_one_says():
    assert [Schedule().freezes(left) for left in (1.0, 0.51, 0.5, 0.1)] == [False, False, True, True]
    assert Schedule(freeze_embeddings=True).freezes(1.0) and not Schedule(freeze_embeddings=False).freezes(0.1)


def test_a_plain_recovery_rises_the_more_is_cut_beyond_half():
    plain = Schedule(trim_start=0.4, rewarm_ratio=0.05, recovery="continue")
    peaks = [max(plain.lr(left=left)(step, 100) for step in range(40, 101)) for left in (1.0, 0.5, 0.25, 0.1, 0.0)]
    assert peaks == pytest.approx([0.6, 0.6, 1.1, 1.4, REWARM_PEAK])
    assert max(
        Schedule("oneshot", 0.4, recovery="continue", recover_peak=0.7).lr(left=0.1)(step, 100)
        for step in range(40, 101)
    ) == pytest.approx(0.7)


def test_the_task_says_how_to_recover_unless_the_user_does():
    assert Schedule().for_task("continue").recovery == "continue"
    assert Schedule(recovery="rewarm").for_task("continue").recovery == "rewarm"
    assert [task.recovery for task in TASKS.values()] == ["rewarm", "rewarm", "continue", "rewarm", "rewarm", "rewarm"]
    assert Schedule().for_task("rewarm").cuts(300) == {100: 1.0}
    assert Schedule().for_task("rewarm", 0.0).cuts(300) == {1: 1.0}
    assert Schedule(trim_start=0.5).for_task("rewarm", 0.0).cuts(300) == {150: 1.0}


def test_a_cut_at_the_start_comes_before_anything_is_learned():
    lr = Schedule(trim_start=0.0, rewarm_ratio=0.1).lr()
    rates = [lr(step, 100) for step in range(101)]
    assert rates[0] == 0 and rates[1:11] == pytest.approx([REWARM_PEAK * i / 10 for i in range(1, 11)])
    assert rates[11:] == sorted(rates[11:], reverse=True) and rates[100] == 0
    cubic = Schedule("cubic", trim_start=0.0, trim_duration=0.2, warmup_ratio=0.1).lr()
    assert [cubic(step, 100) for step in (0, 1, 9, 15)] == pytest.approx([0, 0.2, 1, 0.85])


def test_the_baseline_has_one_line():
    lr = Schedule(warmup_ratio=0.1).lr(baseline=True)
    assert [lr(step, 100) for step in (0, 9, 10, 50, 100)] == pytest.approx([0.1, 1, 0.9, 0.5, 0])


def test_a_run_too_short_for_a_warm_up_begins_at_the_peak():
    assert Schedule(warmup_ratio=0.1).lr(baseline=True)(0, 4) == 1.0


def test_the_recovery_may_have_a_peak_of_its_own():
    usual, higher = (Schedule(trim_start=0.4, rewarm_ratio=0.05, recover_peak=peak).lr() for peak in (1.0, 1.5))
    assert [higher(step, 100) for step in range(40)] == [usual(step, 100) for step in range(40)]
    assert [higher(step, 100) for step in (44, 72, 100)] == pytest.approx([1.5, 1.5 * 28 / 55, 0])


@given(shape=st.sampled_from(["oneshot", "cubic"]), total=st.integers(1, 200), warm=st.floats(0, 0.7))
def test_the_rate_is_never_negative_nor_above_its_peaks(shape, total, warm):
    schedule = Schedule(shape, trim_start=warm)
    last, lr = max(schedule.cuts(total)), schedule.lr()
    for step in range(total + 1):
        assert 0 <= lr(step, total) <= (1 if step < last else max(1, REWARM_PEAK)) + 1e-9


def test_what_does_not_fit_into_a_run_is_said():
    assert Schedule().shortcomings(3) == Schedule("cubic").shortcomings(300) == []
    last = "the last cut is after step 1, the last one: no steps are left to recover from it"
    assert Schedule().shortcomings(1) == [last]
    assert Schedule("cubic").shortcomings(1) == ["1 steps have room for 1 of 6 cuts (milestones)", last]
    assert Schedule("cubic").shortcomings(10) == ["10 steps have room for 3 of 6 cuts (milestones)"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"shape": "square"}, "schedule is 'square', want one of oneshot, cubic"),
        ({"trim_start": 1.0}, r"trim_start is 1.0, want a fraction in \[0, 1\)"),
        ({"rewarm_ratio": -0.1}, "rewarm_ratio is -0.1"),
        ({"warmup_ratio": float("nan")}, "warmup_ratio is nan"),
        ({"shape": "cubic", "trim_start": 0.8, "trim_duration": 0.3}, "leave no steps to recover"),
        ({"milestones": 0}, "milestones is 0, want 1 to 10000"),
        ({"recovery": "fast"}, "recovery is 'fast', want one of rewarm, continue"),
        ({"recover_peak": 0}, "recover_peak is 0, want more than 0"),
        ({"recover_dropout": 1.0}, "recover_dropout is 1.0, want a fraction"),
    ],
)
def test_impossible_schedules_are_refused_in_words(changed, message):
    with pytest.raises(SensibertError, match=message):
        Schedule(**changed)
