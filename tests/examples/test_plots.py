"""The README's picture of accuracy against budget, from rows of bench/results."""

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
        score("mrpc 50%params ours", 80, std=0.5, encoder_share=0.498),
        score("mrpc 30%params ours", 78, std=None, encoder_share=0.2991),
        score("mrpc 30%params layers", 70, encoder_share=0.3333),
        score("mrpc 50%flops ours", 79, encoder_share=0.45),
        score("mrpc 100%params dense", 81),
        row("bench_accuracy", "mrpc 50%params ours", 12, "seconds"),
        score("qnli 50%params ours", 60, train_rows=100),
    ]
    assert plots.curves(rows) == {
        "mrpc": {
            "ours": [(pytest.approx(29.91), 78, 0.0), (pytest.approx(49.8), 80, 0.5)],
            "layers": [(pytest.approx(33.33), 70, 0.0)],
            "dense": [(100.0, 81, 0.0)],
        },
        "qnli (100 rows)": {"ours": [(50.0, 60, 0.0)]},
    }


def test_of_several_runs_of_a_task_those_at_one_budget_have_no_panel(plots):
    gpu = {"accelerator": "cuda", "steps": 9}
    rows = [
        score("mrpc 50%params ours", 80, **gpu),
        score("mrpc 50%params ours", 70, recovery="lifted", **gpu),
        score("mrpc 30%params ours", 60, recovery="lifted", **gpu),
        score("mrpc 100%params dense", 81, **gpu),
        score("mrpc 10%params ours", 55, steps=9),
        score("qnli 50%params ours", 82, **gpu),
    ]
    assert plots.curves(rows) == {
        "mrpc (recovery lifted)": {"ours": [(30.0, 60, 0.0), (50.0, 70, 0.0)], "dense": [(100.0, 81, 0.0)]},
        "qnli": {"ours": [(50.0, 82, 0.0)]},
    }


def test_above_half_embeddings_that_learn_are_the_default(plots):
    gpu, learn = {"accelerator": "cuda", "steps": 9}, {"freeze_embeddings": False}
    rows = [
        score("mrpc 100%params dense", 81, **gpu),
        score("mrpc 50%params ours", 80, **gpu),
        score("mrpc 10%params ours", 60, **gpu, **learn),
        score("qnli 100%params dense", 91, **gpu),
        score("qnli 50%params ours", 90, **gpu),
        score("qnli 10%params ours", 70, **gpu, **learn),
        score("qnli 10%params ours", 75, **gpu),
    ]
    dense, half = [(100.0, 91, 0.0)], (50.0, 90, 0.0)
    assert plots.curves(rows) == {
        "mrpc (embeddings learn)": {"ours": [(10.0, 60, 0.0), (50.0, 80, 0.0)], "dense": [(100.0, 81, 0.0)]},
        "qnli": {"ours": [(10.0, 75, 0.0), half], "dense": dense},
        "qnli (embeddings learn)": {"ours": [(10.0, 70, 0.0), half], "dense": dense},
    }


def test_a_panel_a_task_and_every_method_in_the_legend(plots, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    lines = {"dense": [(100.0, 90.0, 0.0)], "ours": [(30.0, 88.0, 0.3), (50.0, 89.0, 0.2)], "new": [(30.0, 80.0, 1.0)]}
    plots.draw(tmp_path / "a.png", {f"task{n}": lines for n in range(4)})
    (figure,) = drawn
    visible = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert visible == ["task0", "task1", "task2", "task3"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "ours", "new"]
