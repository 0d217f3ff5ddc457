"""Is a trimmed folder correct? Checks budget, parameters, FLOPs, and equal logits for both ways of loading.

    python bench/check_folder.py FOLDER...

For every folder of `sensibert finetune`: parameters of result.json against numel, FLOPs against torch.utils.
flop_counter (eager attention), the budget against both, and the logits of a batch, bit for bit, loaded with `import
sensibert` and by a process that cannot import it, through trust_remote_code. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import sensibert  # noqa: F401 (registers the classes of trimmed folders)
from sensibert.core.budget import Budget
from sensibert.models import base_of, family_of
from sensibert.models.modules import attribute
from sensibert.run_options import RESULT

LOGITS = """
import sys
import torch, transformers
batch, out, auto, folder, *trust = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, **({"trust_remote_code": True} if trust else {})).eval()
assert (sys.modules["sensibert"] is None) == bool(trust)
with torch.no_grad():
    outputs = model(**torch.load(batch, weights_only=True))
torch.save([outputs[k] for k in outputs if k.endswith("logits")], out)
"""
WITHOUT = "import sys; sys.modules['sensibert'] = None"  # makes imports of sensibert fail


def reload(folder: Path, auto: str, batch: Path, out: Path, trust: bool) -> list[torch.Tensor]:
    program = (WITHOUT if trust else "import sensibert") + LOGITS
    arguments = [str(batch), str(out), auto, str(folder), *(["trust"] if trust else [])]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stderr=subprocess.DEVNULL)
    return torch.load(out, weights_only=True)


def check(folder: Path, scratch: Path) -> list[str]:
    result = json.loads((folder / RESULT).read_text())
    name = json.loads((folder / "config.json").read_text())["architectures"][0].removeprefix("Sensibert")
    head = next(h for h in ("SequenceClassification", "QuestionAnswering", "TokenClassification") if name.endswith(h))
    auto = getattr(transformers, f"AutoModelFor{head}")
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    encoder = attribute(base_of(model), family_of(model).encoder)
    length, wrong = result["flops_length"], []
    batch = {"input_ids": torch.randint(5, model.config.vocab_size, (1, length))}
    with FlopCounterMode(depth=None, display=False) as counter, torch.no_grad():
        model(**batch)
    counts = counter.get_flop_counts()
    part = next(k for k in counts if k.endswith(f".{family_of(model).encoder}"))
    measured = {
        "encoder_params_after": sum(p.numel() for p in encoder.parameters()),
        "total_params_after": sum(p.numel() for p in model.parameters()),
        "flops_after": sum(counts[part if result["scope"] == "encoder" else "Global"].values()),
    }
    for key, value in measured.items():
        if result[key] != value:
            wrong.append(f"{key} is {result[key]:,}, measured {value:,}")
    budget = Budget.parse(result["budget"], result["scope"], length)
    params = "encoder_params" if result["scope"] == "encoder" else "total_params"
    spent = params if budget.kind == "params" else "flops"
    allowed = budget.value * result[f"{spent}_before"] if budget.relative else budget.value
    share = result[f"{spent}_after"] / allowed
    if not 0.97 < share <= 1:
        wrong.append(f"{spent} is {share:.4f} of what {budget} allows")
    torch.save({"input_ids": torch.randint(5, model.config.vocab_size, (4, 24))}, scratch / "batch.pt")
    ways = [reload(folder, auto.__name__, scratch / "batch.pt", scratch / "out.pt", trust) for trust in (False, True)]
    if not all(torch.equal(a, b) for a, b in zip(*ways, strict=True)):
        wrong.append("the two ways of loading give different logits")
    print(f"{folder}: {spent} {share:.4f} of {budget}; {'; '.join(wrong) or 'all agree, logits bit-equal both ways'}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = [folder.resolve() for folder in parser.parse_args().folders]
    for folder in folders:
        if not (folder / RESULT).exists():
            parser.error(f"{folder}: there is no {RESULT}, want a folder of `sensibert finetune`")
    with tempfile.TemporaryDirectory() as scratch:
        wrong = [check(folder, Path(scratch)) for folder in folders]
    sys.exit(any(wrong))


if __name__ == "__main__":
    main()
