"""Progress as it is told, and the phases of a training."""

import pytest

from sensibert.core.progress import counted, phase_of


def test_items_are_told_when_the_next_one_is_read():
    told = []
    read = counted("ab", lambda *now: told.append(now), "analyze", 2)
    assert (next(read), told) == ("a", [("analyze", 0, 2)])
    assert list(read) == ["b"] and told[1:] == [("analyze", 1, 2), ("analyze", 2, 2)]


@pytest.mark.parametrize(
    "cuts, phases",
    [
        ((), [("train", 6)] * 6),
        ((2,), [("warm", 2)] * 2 + [("recover", 6)] * 4),
        ((2, 4), [("warm", 2)] * 2 + [("trim", 4)] * 2 + [("recover", 6)] * 2),
    ],
)
def test_every_step_has_a_phase_that_ends_at_a_cut_or_at_the_end(cuts, phases):
    assert [phase_of(step, cuts, 6) for step in range(1, 7)] == phases
