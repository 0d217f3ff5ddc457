"""Model folders side by side: scores on one file with a paired test, sizes, and the time of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .commands import model_and_data
from .core.errors import SensibertError
from .core.text import number_of, table
from .data.row_sums import RESAMPLES, RowSums, bootstrap, paired_difference, row_sums
from .deploy import measure
from .models.masks import cost_of
from .run_options import Options
from .training.predict import predict

TEST = f"paired bootstrap, {RESAMPLES:,} resamples of the rows"
LEAST = 0.001  # p that is shown as a number
FORWARD = ("batch_1_ms", "batch_32_ms")


def compare_folders(
    folders: Sequence[str], options: Options, length: int = 128, threads: int | None = None, rounds: int = 20
) -> dict[str, Any]:
    """Score every folder on the validation file, compare it with the first one, and time it.

    options: the validation file and how to read it. length, threads, rounds: of `measure`. SensibertError for fewer
    than two folders, one that is named twice, and folders whose tasks have different metrics."""
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise SensibertError(f"folders: {', '.join(folders)}, want two or more different ones")
    rows: list[dict[str, Any]] = []
    scored: list[RowSums] = []
    for folder in folders:
        row, sums = _scored(folder, options)
        if rows and row["metric"] != rows[0]["metric"]:
            raise SensibertError(
                f"folders: {folders[0]} is scored by {rows[0]['metric']} and {folder} by {row['metric']}, want one task"
            )
        rows.append(row)
        scored.append(sums)
    for row, sums, resampled in zip(rows, scored, bootstrap(scored, options.seed), strict=True):
        row["standard_error"] = float(resampled.std(ddof=1))
        row["difference"] = None
        if sums is not scored[0]:
            row["difference"] = paired_difference(sums, scored[0], options.seed)._asdict()
    machine, timed = measure(folders, length, threads, rounds)
    speed = {each["folder"]: each for each in timed if each["runtime"] == "torch"}
    for row in rows:
        row |= {name: speed[row["folder"]][name] for name in ("mb", *FORWARD)}
    return {"validation_rows": len(scored[0].values), "test": TEST, "machine": machine, "rows": rows}


def _scored(folder: str, options: Options) -> tuple[dict[str, Any], RowSums]:
    model, data = model_and_data(replace(options, model=folder), "validation")
    assert data.validation is not None  # of this role
    logits = predict(model, data.validation, data.collator, autocast=options.autocast())
    metrics = data.compute_metrics(logits)  # refuses NaN
    sums = row_sums(data, logits)
    row = {"folder": folder, "metric": data.main_metric, "score": float(sums.score()), "metrics": metrics}
    sizes = {f"{name}_params": cost_of(model, scope)[0] for name, scope in (("encoder", "encoder"), ("total", "model"))}
    return row | sizes, sums


def comparison(result: Mapping[str, Any]) -> str:
    """The result of `compare_folders` as a table."""
    metric = result["rows"][0]["metric"]
    header = (
        "",
        metric,
        "± s.e.",
        "to the first",
        "95 % interval",
        "p",
        "encoder",
        "all params",
        "MB",
        "1 row",
        "32 rows",
    )
    lines = []
    for row in result["rows"]:
        gap = row["difference"]
        tested = ("", "", "")
        if gap is not None:
            p_value = f"{gap['p_value']:.3f}" if gap["p_value"] >= LEAST else f"< {LEAST}"
            tested = (f"{gap['value']:+.4f}", f"{gap['low']:+.4f} to {gap['high']:+.4f}", p_value)
        forward = (f"{row[name]['median']:.1f} ms" for name in FORWARD)
        sizes = (row["encoder_params"], row["total_params"], f"{row['mb']:.1f}")
        scores = (f"{row['score']:.4f}", f"{row['standard_error']:.4f}")
        lines.append((row["folder"], *scores, *tested, *sizes, *forward))
    machine = result["machine"]
    notes = (
        f"{result['validation_rows']:,} rows. Differences, intervals and p (two-sided): {result['test']}.",
        f"Forward passes of rows of {machine['length']} tokens: {machine['processor']}, "
        f"{number_of(machine['threads'], 'thread')}.",
    )
    return "\n\n".join([table(header, lines), "\n".join(notes)])
