"""The commands inspect and report: what a model folder holds. They read no data, and import no Trainer."""

from __future__ import annotations

from pathlib import Path

from .core import cost
from .core.artifacts import Sensitivity
from .core.config import TrimConfig, grid_name
from .core.errors import SensibertError, first_line
from .core.files import write_atomically, writing
from .core.folder_facts import read_family, read_result
from .inputs import load_folder
from .models import layout_of
from .models.masks import cost_of, masks_of
from .models.structure import is_trimmed
from .report.family_page import family_page
from .report.history import FILE, Moment, read_history
from .report.page import page
from .run_options import RESULT
from .saving.folder import zero_filled

# Facts that only result.json has; null for a folder that was trimmed without a run.
_NOTED = (
    *("task", "method", "budget", "scope", "seed", "steps", "metrics", "metrics_at_cut", "seconds", "samples"),
    *("warnings", "throughput", "metrics_baseline", "cut_step", "measured"),
    *("evaluations", "best_step", "latency", "mb_before", "mb_after", "weights", "metrics_in_full", "size"),
)


def report_folder(folder: str, output: str | None) -> dict:
    """Write the HTML page of a trimmed model folder, or of a family; by default into its folder `report`."""
    path = Path(folder)
    target = Path(output) if output else path / "report" / "report.html"
    if (family := read_family(path / RESULT)) is not None:
        members = [read_result(path / row["folder"] / RESULT) for row in family["rows"]]
        text = family_page(folder, family, members)
    else:
        text = _page_of(folder)
    with writing(target):
        if output is None:
            target.parent.mkdir(exist_ok=True)
        write_atomically(target, lambda part: Path(part).write_text(text, encoding="utf-8"))
    return {"model": folder, "output": str(target)}


def _page_of(folder: str) -> str:
    facts, path = inspect_folder(folder), Path(folder)
    scores = path / "sensitivity.safetensors"
    sensitivity = Sensitivity.load(scores) if scores.exists() else None
    sizes = [file.stat().st_size for file in path.glob("*.safetensors") if file.name.startswith("model")]
    return page(facts, sensitivity, sum(sizes) / 1e6 if sizes else None, _moments(path / "report" / FILE))


def inspect_family(folder: str) -> dict | None:
    """The result of the run that made several models, with the path of the folder; None for any other folder."""
    family = read_family(Path(folder) / RESULT)
    return None if family is None else family | {"output": folder}


def _moments(file: Path) -> list[Moment]:
    """Of the run that wrote the folder, if it noted them."""
    try:
        return read_history(file) if file.exists() else []
    except (OSError, ValueError) as error:
        raise SensibertError(f"{file}: cannot be read ({first_line(error)})") from None


def inspect_folder(folder: str) -> dict:
    """Sizes, origin and layers of a trimmed model folder, under the names of result.json."""
    model, _ = load_folder(folder, "folder")
    layout = layout_of(model)
    masks = masks_of(model)
    grid = masks.grid if masks is not None else None
    before = layout_of(zero_filled(model)) if is_trimmed(model) else layout
    entry, result_file = getattr(model.config, "sensibert", None) or {}, Path(folder) / RESULT
    known = read_result(result_file) if result_file.exists() else {}
    rows: dict[int, dict] = {}
    for now, then in zip(layout.sites, before.sites, strict=True):
        row = rows.setdefault(now.layer, {"layer": now.layer})
        name = "heads" if now.kind == "head" else "ffn"
        row |= {name: now.units, f"{name}_of": then.units}
    if "metrics_dense" in known:  # its name up to version 0.1
        known["metrics_at_cut"] = known.pop("metrics_dense")
    noted = {name: known.get(name, entry.get(name)) for name in _NOTED}
    scope, length = noted["scope"] or "encoder", known.get("flops_length", TrimConfig.flops_length)
    sizes = {
        "encoder_params_before": before.encoder_params,
        "encoder_params_after": cost_of(model, "encoder")[0],
        "total_params_before": before.total_params,
        "total_params_after": cost_of(model, "model")[0],
        "flops_before": cost.flops(before, cost.counts_of(before), scope, 1, length),
        "flops_after": cost_of(model, scope, length)[1],
        "flops_length": length,
    }
    facts = {
        "model": folder,
        "family": layout.family,
        **noted,
        "grid": grid_name(grid),
        **sizes,
    }
    weights = cost.kept_by_weight(layout, masks.keep, masks.grid) if masks is not None else []
    tensors = [{"tensor": name, "kept": kept, "of": of} for name, kept, of in weights]
    return {**facts, "layers": list(rows.values()), "tensors": tensors}
