"""The history of a run: what was logged, the cuts and the end, in one table that can be read again."""

import pytest

from sensibert.report.history import cut_steps, history, losses, read_history, scores, sizes, write_history
from tests.report.small import MOMENTS, RESULT

LOGGED = [
    {"step": 2, "loss": 0.9, "learning_rate": 1e-4, "sensibert/encoder_params": 1_000_000, "epoch": 0.5},
    {"step": 4, "loss": 0.7, "learning_rate": 1e-4, "sensibert/encoder_params": 500_000},
    {"step": 6, "loss": 0.5, "learning_rate": 0.0, "sensibert/encoder_params": 500_000},
    {"step": 6, "train_runtime": 3.0, "train_loss": 0.7},
    {"step": 6, "sensibert/accuracy": 0.9},
]


def test_a_history_has_logs_cuts_and_the_end_in_order():
    assert history(LOGGED, [3], RESULT | {"steps": 6}, "accuracy") == MOMENTS
    assert losses(MOMENTS) == [(2, 0.9), (4, 0.7), (6, 0.5)] and scores(MOMENTS) == [(3, 0.95), (6, 0.9)]
    assert cut_steps(MOMENTS) == [3]
    assert sizes(MOMENTS, 1_000_000)[:3] == [(0, 1_000_000), (2, 1_000_000), (3, 500_000)]


def test_evaluations_on_the_way_are_scores_too():
    logged = [*LOGGED[:2], {"step": 5, "eval_accuracy": 0.8}]
    assert scores(history(logged, [3], RESULT | {"steps": 6}, "accuracy")) == [(3, 0.95), (5, 0.8), (6, 0.9)]


def test_a_run_that_was_not_cut_or_scored_has_no_such_moments():
    bare = RESULT | {"steps": 2, "metrics": None, "metrics_at_cut": None}
    moments = history(LOGGED[:1], [3], bare, "accuracy")  # it ended before its cut
    assert [moment.event for moment in moments] == ["log", "end"] and scores(moments) == []


def test_only_the_first_of_several_cuts_has_a_score_and_only_the_last_the_final_size():
    moments = history(LOGGED, [3, 4, 5], RESULT | {"steps": 6}, "accuracy")
    cuts = [(m.step, m.score, m.encoder_params) for m in moments if m.event == "cut"]
    assert cuts == [(3, 0.95, None), (4, None, None), (5, None, 500_000)]


def test_what_is_written_is_read_again(tmp_path):
    write_history(tmp_path / "run.csv", MOMENTS)
    assert read_history(tmp_path / "run.csv") == MOMENTS


HEADER = "step,event,loss,learning_rate,encoder_params,score"


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", f"{HEADER}\nx,log,,,,\n", f"{HEADER}\n1,log\n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "run.csv").write_text(text)
    with pytest.raises(ValueError):
        read_history(tmp_path / "run.csv")
