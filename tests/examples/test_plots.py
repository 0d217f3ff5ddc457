"""The pictures of the score kept against the share left, from rows of bench/results."""

import math
import sys
from pathlib import Path

import pytest

from tests.examples.test_tables import row

DOCS = str(Path(__file__).resolve().parents[2] / "docs")


@pytest.fixture(scope="module")
def plots():
    sys.path.append(DOCS)
    import plots

    yield plots
    sys.path.remove(DOCS)


def score(case, value, **more):
    return row("bench_accuracy", case, value, "score", **more)


def test_points_stand_at_the_true_share_and_only_scores_of_parameter_budgets_count(plots):
    rows = [
        score("mrpc 50%params ours", 80, std=0.5, ratio=0.96, seeds=2, encoder_share=0.498),
        score("mrpc 30%params ours", 78, std=None, ratio=0.9, encoder_share=0.2991),
        score("mrpc 30%params layers", 70, ratio=0.8, encoder_share=0.3333),
        score("mrpc 20%params random", 0.0, std=0.0, ratio=0.0, seeds=2),
        score("mrpc 50%flops ours", 79, ratio=0.94, encoder_share=0.45),
        score("mrpc 100%params dense", 81, ratio=1.0),
        row("bench_accuracy", "mrpc 50%params ours", 12, "seconds"),
        score("qnli 50%params ours", 60, ratio=0.7, train_rows=100),
        score("sst2 50%params ours", 60, ratio=None),
    ]
    actual = plots.curves(rows)
    assert actual["mrpc"] == {
        "ours": [pytest.approx((29.91, 90, 0.0)), pytest.approx((49.8, 96, 0.6))],
        "layers": [pytest.approx((33.33, 80, 0.0))],
        "random": [pytest.approx((20.0, 0, 0.0))],
    }
    assert actual["qnli (100 rows)"] == {"ours": [pytest.approx((50.0, 70, 0.0))]} and len(actual) == 2


def test_runs_of_all_places_are_one_point_and_another_recovery_or_a_masked_grid_is_none(plots):
    gpu, cpu = {"accelerator": "cuda", "steps": 9}, {"steps": 9}
    learn = {"freeze_embeddings": False, **gpu}
    rows = [
        score("mrpc 50%params ours", 80, ratio=0.9, std=0.8, seeds=3, **gpu),
        score("mrpc 50%params ours", 80, ratio=0.98, std=1.6, seeds=2, **cpu),
        score("mrpc 20%params ours", 60, ratio=0.7, std=0.3, seeds=3, **learn),
        score("mrpc 20%params ours", 75, ratio=0.8, **cpu),
        score("mrpc 20%params random", 40, ratio=0.5, **gpu),
        score("mrpc 20%params random", 30, ratio=0.3, **learn),
        score("mrpc 50%params ours", 78, ratio=0.86, recovery="plain", **gpu),
        score("mrpc 50%params element", 78, ratio=0.86, **gpu),
    ]
    spread = math.sqrt((2 * 0.9**2 + 1.96**2) / 3)
    assert plots.curves(rows) == {
        "mrpc": {
            "ours": [pytest.approx((20.0, 80, 0.0)), pytest.approx((50.0, (3 * 90 + 2 * 98) / 5, spread))],
            "random": [pytest.approx((20.0, 50, 0.0))],
        }
    }


def test_a_row_a_task_and_a_panel_a_rival_with_ours_in_each(plots, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    ours = [(30.0, 88.0, 0.3), (50.0, 89.0, 0.2)]
    lines = {"new": [(30.0, 80.0, 1.0)], "random": [(30.0, 70.0, 1.0)], "ours": ours}
    plots.draw(tmp_path / "a.png", {"one": lines, "two": {"ours": ours, "new": lines["new"]}})
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes[:2]] == ["random", "new"]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["one", "two"]
    for axis in figure.axes:
        drawn_lines = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"]
        assert len(drawn_lines) <= 2 and drawn_lines[-1] == [30.0, 50.0]
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["not run"]


def test_the_mean_of_three_methods_is_over_tasks_of_which_none_makes_up_for_another(plots):
    rows = [
        score("mrpc 50%params ours", 80, ratio=1.2, encoder_share=0.5),
        score("qnli 50%params ours", 80, ratio=0.9, encoder_share=0.48),
        score("qnli 30%params ours", 80, ratio=0.8, encoder_share=0.3),
        score("qnli 50%params torch-pruning", 80, ratio=0.7, encoder_share=0.5),
        score("qnli 50%params random", 80, ratio=0.7, encoder_share=0.5),
        score("qnli 50%flops ours", 80, ratio=0.7, encoder_share=0.5),
    ]
    actual = plots.means(rows)
    assert actual.keys() == {"ours", "torch-pruning"} and actual["torch-pruning"] == [pytest.approx((50, 70, 1))]
    assert actual["ours"] == [pytest.approx((30, 80, 1)), pytest.approx((49, 95, 2))]


def test_the_picture_of_means_has_a_line_per_method_and_marks_missing_tasks(plots, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    plots.draw_means(tmp_path / "a.png", {"ours": [(30, 90, 6), (50, 99, 6)], "magnitude": [(30, 80, 4), (50, 90, 6)]})
    (axis,) = drawn[0].axes
    texts = {text.get_text() for text in axis.texts}
    assert texts - {""} == {"untrimmed model", "90.0", "99.0", "4 of 6 tasks"}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["sensibert (ours)", "magnitude"]
    assert [len(line.get_xdata()) for line in axis.lines] == [2, 2, 2] and "6 tasks" in axis.get_title()
