"""README tables from rows of bench/results."""

import importlib.util
import json
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "tables.py"
README = "before\n<!-- table: accuracy -->\nold\n<!-- end -->\n<!-- table: kernels -->\n<!-- end -->\nafter"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(bench, case, value, metric="us", **more):
    facts = {"unit": "us", "rival": None, "rival_value": None, "ratio": None, "device": "cpu"}
    return {"bench": bench, "case": case, "metric": metric, "value": value, **facts, **more}


def write(folder, *rows):
    (folder / "bench_x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_methods_become_columns_and_a_missing_one_a_dash(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "mrpc 50%params random", 70, "score", seeds=2),
            row("bench_accuracy", "mrpc 50%params ours", 79.944, "score", std=0.5, seeds=3, ratio=0.994),
            row("bench_accuracy", "mrpc 100%params dense", 80.4, "score"),
            row("bench_accuracy", "qnli 50%params ours", 82, "score"),
            row("bench_accuracy", "qnli 50%params ours", 12, "seconds"),
        )
    )
    assert tables.fill(README, rows).splitlines()[:7] == [
        "before",
        "<!-- table: accuracy -->",
        "| task | budget | untrimmed | ours | random | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| mrpc | 50%params | 80.40 | 79.94 ± 0.50 (99.4 %) | 70.00, 2 seeds | 3 |",
        "| qnli | 50%params | - | 82.00 | - | 1 |",
        "<!-- end -->",
    ]


def test_retention_is_the_mean_over_tasks_and_names_the_worst(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "mrpc 50%params random", 70, "score", ratio=0.9),
            row("bench_accuracy", "mrpc 50%params ours", 80, "score", ratio=1.2),
            row("bench_accuracy", "qnli 50%params ours", 82, "score", ratio=0.99),
            row("bench_accuracy", "qnli 100%params ours", 83, "score", ratio=1.01),
            row("bench_accuracy", "sst2 50%params ours", 82, "score"),
            row("bench_accuracy", "sst2 50%params layers", 78, "score", ratio=0.95),
            row("bench_accuracy", "qnli 100%params dense", 82, "score", ratio=1.0),
        )
    )
    assert tables.retention(rows).splitlines() == [
        "| budget | tasks, runs of ours | ours, lowest task | layers | random |",
        "| --- | --- | --- | --- | --- |",
        "| 50%params | 2, 2 | 99.5 %, qnli 99.0 % | 95.0 % (1 task) | 90.0 % (ours 100.0 %, 1 task) |",
    ]
    lost = row("bench_accuracy", "qnli 50%params random", 0, "score", ratio=0.0)  # a correlation, say
    assert tables.retention([*rows, lost]).endswith("| 45.0 % (ours 99.5 %) |")


def test_the_readme_compares_scores_at_half_and_the_share_kept_at_every_budget(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "mrpc 100%params dense", 80.4, "score", std=0.7),
            row("bench_accuracy", "mrpc 50%params ours", 80, "score", ratio=0.995),
            row("bench_accuracy", "mrpc 50%params layers", 60, "score", ratio=0.75),
            row("bench_accuracy", "mrpc 50%params uniform", 79, "score", ratio=0.98),
            row("bench_accuracy", "mrpc 30%params ours", 78, "score", ratio=0.97),
            row("bench_accuracy", "qnli 100%params dense", 82, "score"),
            row("bench_accuracy", "qnli 50%params ours", 90, "score", ratio=1.1),
            row("bench_accuracy", "qnli 50%flops ours", 70, "score", ratio=0.8),
        )
    )
    assert tables.summary(rows).splitlines() == [
        "|  | untrimmed | sensibert | Torch-Pruning | magnitude | dropping layers |",
        "| --- | --- | --- | --- | --- | --- |",
        "| mrpc | 80.40 ± 0.70 | 80.00 | - | - | 60.00 |",
        "| qnli | 82.00 | 90.00 | - | - | - |",
        "| score kept at 50 % | 100 % | 99.8 % | - | - | 75.0 % (1 task) |",
        "| score kept at 30 % | 100 % | 97.0 % | - | - | - |",
    ]


def test_grids_are_compared_with_ours_at_their_budgets_only(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "mrpc 50%params element", 79, "score", ratio=0.985),
            row("bench_accuracy", "mrpc 50%params ours", 80, "score", ratio=0.99),
            row("bench_accuracy", "mrpc 50%params random", 60, "score", ratio=0.8),
            row("bench_accuracy", "mrpc 30%params ours", 70, "score", ratio=0.9),
        )
    )
    lines = tables.grids(rows).splitlines()
    assert lines[0] == "| budget | tasks, runs of ours | ours, lowest task | element |"
    assert lines[2:] == ["| 50%params | 1, 1 | 99.0 %, mrpc 99.0 % | 98.5 % (ours 99.0 %) |"]
    assert "element" not in tables.retention(rows)


def test_a_part_of_a_set_and_a_missed_budget_are_said(tables, tmp_path):
    part = {"train_rows": 20000, "max_steps": 500}
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "sst2 30%params layers", 88, "score", encoder_share=0.3333, **part),
            row("bench_accuracy", "sst2 30%params ours", 90, "score", encoder_share=0.2961, **part),
            row("bench_accuracy", "sst2 30%params ours", 92, "score"),
        )
    )
    lines = tables.accuracy(rows).splitlines()
    assert lines[0] == "| task | budget | untrimmed | ours | layers | seeds |"
    assert lines[2:] == [
        "| sst2 (20,000 rows, 500 steps) | 30%params | - | 90.00 | 88.00 at 33 % | 1 |",
        "| sst2 | 30%params | - | 92.00 | - | 1 |",
    ]


def test_the_longest_runs_of_a_task_are_shown(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "squad 50%params ours", 34, "score", steps=128, epochs=3.0, train_rows=2000),
            row("bench_accuracy", "squad 50%params ours", 61, "score", steps=488, epochs=2.0),
            row("bench_accuracy", "qnli 50%params ours", 82, "score", steps=420, epochs=3.0),
        )
    )
    lines = tables.accuracy(rows).splitlines()
    assert lines[2:] == ["| qnli | 50%params | - | 82.00 | 1 |", "| squad | 50%params | - | 61.00 | 1 |"]


def test_the_cost_of_ours_is_told_in_dense_steps(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "mrpc 30%params ours", 80, "score", steps=300, dense_steps=150),
            row("bench_accuracy", "mrpc 50%params ours", 80, "score", steps=300, dense_steps=200.4),
            row("bench_accuracy", "qnli 50%params ours", 80, "score", steps=100, dense_steps=70),
            row("bench_accuracy", "mrpc 50%params random", 80, "score", steps=300, dense_steps=190),
        )
    )
    expected = ["| 50%params | 0.67 - 0.70 | 2 |", "| 30%params | 0.50 - 0.50 | 1 |"]
    assert tables.cost(rows).splitlines()[2:] == expected


def test_runs_on_a_gpu_stand_in_for_longer_ones_on_a_cpu_and_budgets_come_largest_first(tables, tmp_path):
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "qnli 30%params ours", 80, "score", steps=100, accelerator="cuda"),
            row("bench_accuracy", "qnli 50%params ours", 82, "score", steps=100, accelerator="cuda"),
            row("bench_accuracy", "qnli 50%params ours", 83, "score", steps=200),
        )
    )
    assert tables.accuracy(rows).splitlines()[2:] == [
        "| qnli | 50%params | - | 82.00 | 1 |",
        "| qnli | 30%params | - | 80.00 | 1 |",
    ]


def test_another_recovery_has_separate_lines_with_the_same_dense_run(tables, tmp_path):
    lifted = {"recovery": "lifted", "ratio": 0.9, "accelerator": "cuda"}
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "squad 100%params dense", 60, "score", accelerator="cuda"),
            row("bench_accuracy", "squad 50%params ours", 59.4, "score", ratio=0.99, accelerator="cuda"),
            row("bench_accuracy", "squad 50%params ours", 54, "score", **lifted),
            row("bench_accuracy", "squad 30%params ours", 54, "score", **lifted),
            row("bench_accuracy", "squad 50%params random", 48, "score", **{**lifted, "ratio": 0.8}),
        )
    )
    label = "squad (recovery lifted)"
    assert tables.accuracy(rows).splitlines()[2:] == ["| squad | 50%params | 60.00 | 59.40 (99.0 %) | 1 |"]
    assert tables.elsewhere(rows).splitlines()[2:] == [
        f"| {label} | 50%params | 60.00 | 54.00 (90.0 %) | 48.00 (80.0 %) | 1 |",
        f"| {label} | 30%params | 60.00 | 54.00 (90.0 %) | - | 1 |",
    ]
    assert tables.retention(rows).splitlines()[2:] == [
        "| 50%params | 1, 1 | 99.0 %, squad 99.0 % |",
    ]


def test_cpu_runs_are_listed_with_gpu_runs_and_the_share_kept_is_the_mean_of_all(tables, tmp_path):
    gpu, cpu = {"steps": 100, "accelerator": "cuda"}, {"steps": 100}
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "squad 50%params ours", 60, "score", ratio=0.98, seeds=3, **gpu),
            row("bench_accuracy", "squad 50%params random", 30, "score", ratio=0.5, seeds=3, **gpu),
            row("bench_accuracy", "squad 30%params ours", 54, "score", ratio=0.9, recovery="lifted", **gpu),
            row("bench_accuracy", "squad 50%params ours", 61, "score", ratio=1.02, **cpu),
            row("bench_accuracy", "squad 50%params random", 31, "score", ratio=0.6, seeds=3, **cpu),
            row("bench_accuracy", "squad 30%params ours", 57, "score", ratio=0.95, **cpu),
            row("bench_accuracy", "squad 100%params dense", 58, "score", **cpu),
            row("bench_accuracy", "squad 20%params ours", 40, "score", ratio=0.8, steps=50),
        )
    )
    assert tables.accuracy(rows).splitlines()[2:] == [
        "| squad | 50%params | - | 60.00 (98.0 %) | 30.00 (50.0 %) | 3 |",
    ]
    assert tables.elsewhere(rows).splitlines()[2:] == [
        "| squad (recovery lifted) | 30%params | - | 54.00 (90.0 %) | - | 1 |",
        "| squad (CPU) | 50%params | 58.00 | 61.00 (102.0 %), 1 seed | 31.00 (60.0 %) | 3 |",
        "| squad (CPU) | 30%params | 58.00 | 57.00 (95.0 %) | - | 1 |",
    ]
    assert tables.retention(rows).splitlines()[2:] == [
        "| 50%params | 1, 4 | 99.0 %, squad 99.0 % | 55.0 % (ours 100.0 %) |",  # ours as if of 3 seeds each
        "| 30%params | 1, 1 | 95.0 %, squad 95.0 % | - |",
    ]


def test_of_several_learning_rates_the_best_of_the_untrimmed_model_counts(tables, tmp_path):
    rates = ((3, 1e-4), (3, 4e-4), (3, 8e-4), (1, 1e-3))
    slow, quick, alone, long = ({"epochs": epochs, "learning_rate": rate} for epochs, rate in rates)
    rows = tables.load(
        write(
            tmp_path,
            row("bench_accuracy", "cola 50%params ours", 27, "score", ratio=0.9, seeds=2, **quick),
            row("bench_accuracy", "cola 50%params ours", 29, "score", ratio=1.2, seeds=1, **slow),
            row("bench_accuracy", "cola 100%params dense", 30, "score", seeds=2, **quick),
            row("bench_accuracy", "cola 100%params dense", 24, "score", seeds=1, **slow),
            row("bench_accuracy", "cola 100%params dense", 31, "score", seeds=1, **alone),  # nothing was trimmed there
            row("bench_accuracy", "qnli 100%params dense", 80, "score", seeds=1, **slow),
            row("bench_accuracy", "qnli 100%params dense", 90, "score", seeds=1, **long),
        )
    )
    assert tables.accuracy(rows).splitlines()[2:] == ["| cola | 50%params | 30.00 | 27.00 (90.0 %) | 2 |"]
    assert tables.learning_rates(rows).splitlines()[2:] == [
        "| cola | 0.0008 | 31.00, 1 seed | - | - |",
        "| cola | 0.0004 | 30.00, 2 seeds | 27.00, 2 seeds | - |",
        "| cola | 0.0001 | 24.00, 1 seed | 29.00, 1 seed | - |",
    ]


def test_the_masked_matmul_is_told_by_median_and_range(tables, tmp_path):
    def one(layer, value, part="fwd", device="NVIDIA H200"):
        case = f"default row:0.5 bert-base.{layer} 4096 {part}"
        return row("bench_masked_linear", case, value, "vs_dense", device=device)

    rows = [one("up", 1.0), one("down", 2.0), one("attention", 1.25), one("up", 3.0, device="a CPU x 1")]
    assert tables.masked(tables.load(write(tmp_path, *rows))).splitlines() == [
        "| grid | path | pass | 50% kept | cases | device |",
        "| --- | --- | --- | --- | --- | --- |",
        "| row | default | fwd | 1.25 (1.00 - 2.00) | 3 | NVIDIA H200 |",
    ]


def test_an_ablation_is_compared_with_the_default_and_dense_runs_of_its_seeds(tables, tmp_path):
    half, changed = {"epochs": 3.0, "precision": "bf16"}, "mrpc 50%params ours, step 8"
    rows = [
        row("bench_accuracy", "mrpc 50%params ours", 80, "score", epochs=3.0),
        row("bench_accuracy", "mrpc 50%params ours", 81, "score", seeds=3, **half),
        row("bench_accuracy_ablation", changed, 70, "score", seed=0, **half),
        row("bench_accuracy_ablation", changed, 74, "score", seed=1, **half),
        row("bench_accuracy_ablation", "mrpc 50%params ours, step 4", 70, "score", seed=2, **half),
    ]
    for seed, ours, dense in ((0, 0.79, 0.8), (1, 0.81, 0.8), (2, 0.83, None)):
        one = {"task": "mrpc", "seed": seed, **half}
        rows.append(one | {"budget": "50%params", "method": "ours", "score": ours})
        rows += [one | {"budget": "100%params", "method": "dense", "score": dense}] if dense else []
    assert tables.ablation(tables.load(write(tmp_path, *rows))).splitlines()[2:] == [
        "| mrpc 50%params | 3, bf16 | **the default recipe** | 81.00 | - | - | 3 |",
        "| mrpc 50%params | 3, bf16 | step 4 | 70.00 | - | 83.00 | 1 |",
        "| mrpc 50%params | 3, bf16 | step 8 | 72.00 ± 2.83 | 90.0 % | 80.00 | 2 |",
    ]


def test_rows_of_embeddings_that_learn_stand_apart_from_the_default(tables, tmp_path):
    half, learn, change = {"epochs": 3.0}, {"freeze_embeddings": False}, "mrpc 20%params ours, step 8"
    rows = [
        row("bench_accuracy", "mrpc 100%params dense", 82, "score", **half),
        row("bench_accuracy", "mrpc 20%params ours", 80, "score", ratio=0.98, **half),
        row("bench_accuracy", "mrpc 20%params ours", 79, "score", ratio=0.96, **half, **learn),
        row("bench_accuracy", "mrpc 20%params random", 41, "score", ratio=0.5, **half, **learn),
        row("bench_accuracy_ablation", change, 70, "score", seed=0, **half, **learn),
    ]
    for more, score in ((learn, 0.79), ({}, 0.8)):
        rows.append(
            {"task": "mrpc", "seed": 0, "budget": "20%params", "method": "ours", "score": score, **half, **more}
        )
    rows.append({"task": "mrpc", "seed": 0, "budget": "100%params", "method": "dense", "score": 0.875, **half})
    rows = tables.load(write(tmp_path, *rows))
    assert tables.accuracy(rows).splitlines()[2:] == [
        "| mrpc | 20%params | 82.00 | 80.00 (98.0 %) | 1 |",
    ]
    assert tables.elsewhere(rows).splitlines()[2:] == [
        "| mrpc (embeddings learn) | 20%params | 82.00 | 79.00 (96.0 %) | 41.00 (50.0 %) | 1 |",
    ]
    assert tables.retention(rows).splitlines()[2:] == ["| 20%params | 1, 1 | 98.0 %, mrpc 98.0 % |"]
    assert tables.ablation(rows).splitlines()[2:] == [
        "| mrpc 20%params | 3, embeddings learn | **the default recipe** | 79.00 | 96.0 % | - | 1 |",
        "| mrpc 20%params | 3, embeddings learn | step 8 | 70.00 | 80.0 % | 79.00 | 1 |",
    ]


def test_a_row_where_we_lose_is_printed_and_the_newest_counts(tables, tmp_path):
    slow = row("bench_masked_adamw", "bert-base", 2000.0, rival="fused AdamW", rival_value=1000.0, ratio=0.5)
    rows = tables.load(write(tmp_path, slow | {"ratio": 9.0}, slow, slow | {"rival": "loop", "ratio": 3}))
    text = tables.fill(README, rows)
    assert "| masked_adamw | bert-base | 2,000 us | fused AdamW 0.5 · loop 3 | cpu |" in text


def test_budgets_stand_beside_what_was_measured(tables, tmp_path):
    kept = row("bench_budgets", "tiny 8ms", 8.2, "ms", unit="ms", rival="budget", rival_value=8.0, ratio=0.976)
    scores = [row("bench_budgets", "tiny 8ms", 0.9, name, unit="") for name in ("f1", "f1, model")]
    tried = row("bench_budgets", "tiny smallest 98% tried 9MB", 0.8, "f1", unit="")
    text = tables.fill("<!-- table: budgets -->\n<!-- end -->", tables.load(write(tmp_path, kept, *scores, tried)))
    assert "| tiny 8ms | 8.2 ms | budget: 8 | cpu |" in text and "| tiny 8ms | 0.9 (f1) | - | cpu |" in text
    assert "model" not in text and "tried" not in text


def test_a_table_without_rows_has_a_note(tables, tmp_path):
    text = tables.fill(README, tables.load(tmp_path))
    assert text.count(tables.NOTHING) == 2 and "old" not in text and text.endswith("after")


def test_embedding_models_have_means_over_seeds_with_standard_errors(tables, tmp_path):
    def scores(case, *values):
        pairs = zip(("stsb", "recall"), values, (90, 100), strict=True)
        return [row("bench_embedding", f"M {case}", v, name, rival="original", rival_value=o) for name, v, o in pairs]

    rows = scores("50%params 800 steps random seed 0", 80, 60) + scores("50%params 800 steps ours seed 0", 84, 70)
    rows += scores("50%params 800 steps ours seed 1", 86, 74) + scores("25%params 1 steps spread layers seed 0", 70, 40)
    assert tables.TABLES["embedding"](tables.load(write(tmp_path, *rows))).splitlines()[2:] == [
        "| all | - | - | 90.00 | 100.00 | 95.00 | 1 |",
        "| 50 % | ours | 800 | 85.00 ± 1.00 | 72.00 ± 2.00 | 78.50 ± 1.50 | 2 |",
        "| 50 % | random | 800 | 80.00 | 60.00 | 70.00 | 1 |",
        "| 25 % | spread layers | 1 | 70.00 | 40.00 | 55.00 | 1 |",
    ]
    assert tables.TABLES["embedding"]([]) == "No rows yet."
