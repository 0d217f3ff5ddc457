"""Runs that branch from one warm-up. They resume from its last checkpoint, one step before the first cut, and have the
same bits as separate runs.

In the folder of the run: the checkpoints of the warm-up, and a folder in `branches` for every run that goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

from .callback import TrimCallback
from .core.config import BASELINE
from .core.errors import SensibertError
from .core.files import make_folder, write_atomically, writing
from .core.json_text import parse_json
from .report.history import Moment
from .run_options import SNAPSHOT, Options
from .training.checkpoints import BRANCHES, checkpoints, delete, latest_checkpoint, want_same
from .training.run_memory import RunMemory

OUTCOME = "outcome.json"  # of a branch that is finished
SETTINGS = "settings.json"  # of all branches
# Settings that may differ when an unfinished run is resumed: no branch depends on them.
MAY_CHANGE = ("output", "budgets", "baseline", "keep_checkpoints", "save_steps", "save_before_cut")


class Trained(NamedTuple):
    """A training that is finished. result: the content of result.json. logits: of the validation rows. moments: what
    the training logged. score: (model or graph) -> metrics on the validation rows. tokenizer: of the model. All but the
    first two are missing of a warm-up."""

    model: PreTrainedModel
    callback: TrimCallback
    result: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    logits: Any = None
    moments: Sequence[Moment] = ()
    score: Callable[[nn.Module], dict[str, float]] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


Make = Callable[..., TrimCallback]  # TrimCallback, or what takes the same arguments
# (options, folder for checkpoints, checkpoint to resume from, time.perf_counter() at its start, callback) -> Trained
Train = Callable[[Options, Path, Path | None, float, Make | None], Trained]


class WarmUp(TrimCallback):
    """Ends the training one step before the first cut, with a checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        first = min(self.cuts)
        if state.global_step >= first:
            raise SensibertError(
                f"resume: {args.output_dir} was trained to step {state.global_step}, beyond the cut at step {first}, "
                "so nothing can branch from its warm-up; want --resume without baseline, or --overwrite"
            )
        control.should_training_stop = state.global_step == first - 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == min(self.cuts) - 1:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without the warning of an unfinished trim."""


@dataclass
class Branches:
    """Trains the warm-up of a run on first use, and the runs that go on from it.

    folder: of the run. checkpoint: of an unfinished run in that folder. started: time.perf_counter() at its start."""

    options: Options
    folder: Path
    checkpoint: Path | None
    started: float
    train: Train
    _trunk: Path | None = None
    _memory: RunMemory | None = None  # of the warm-up, once there is one

    def warm_up(self) -> Path | None:
        """The checkpoint that all runs branch from; None if the first step is followed by a cut."""
        if self._memory is None:
            trained = self.train(self.options, self.folder, self.checkpoint, self.started, WarmUp)
            self._memory = trained.callback.memory
            self._trunk = latest_checkpoint(self.folder)
            self._want_same_settings(self._memory.inputs)
        return self._trunk

    def _want_same_settings(self, inputs: Mapping[str, object]) -> None:
        """SensibertError if the finished branches of an unfinished run have other settings or inputs; else note them.

        inputs: digests, which take the place of paths."""
        file = self.folder / BRANCHES / SETTINGS
        now = self.options.settings() | {name: value for name, value in inputs.items() if name != "config"}
        now = {name: value for name, value in now.items() if name not in MAY_CHANGE}
        if file.exists():
            want_same(file.parent, _read(file), now)
        with writing(file):
            make_folder(file.parent)
            _write(file, now)

    def warm_seconds(self) -> float:
        """That the warm-up took, with what was before it: loading and encoding."""
        self.warm_up()
        assert self._memory is not None  # trained above
        return sum(self._memory.seconds.values())

    def run(self, name: str, options: Options, callback: Make | None = None) -> Trained:
        """Go on from the warm-up, or from the last checkpoint of this branch."""
        trunk, folder = self.warm_up(), self.folder / BRANCHES / name
        with writing(folder):
            make_folder(folder)
        return self.train(options, folder, latest_checkpoint(folder) or trunk, time.perf_counter(), callback)

    def finished(self, name: str) -> dict[str, Any] | None:
        """What `finish` noted about a branch; None if it is not finished."""
        self.warm_up()  # which refuses branches that were made with other settings
        file = self.folder / BRANCHES / name / OUTCOME
        return _read(file) if file.exists() else None

    def finish(self, name: str, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Note the outcome of a branch, so that a resumed run skips it, and delete its checkpoints."""
        folder = self.folder / BRANCHES / name
        with writing(folder):
            _write(folder / OUTCOME, outcome)
        delete(checkpoints(folder))
        return _read(folder / OUTCOME)

    def baseline(self, more: Callable[[Trained], dict[str, Any]] = lambda trained: {}) -> dict[str, Any]:
        """Metrics and steps of the model that is trained to the end without trimming, the seconds from the cut on, and
        what `more` finds."""
        if (known := self.finished(BASELINE)) is not None:
            return known
        begun = time.perf_counter()
        trained = self.run(BASELINE, as_baseline(self.options))
        seconds = round(time.perf_counter() - begun, 3)
        facts = {name: trained.result[name] for name in ("metrics", "steps")}
        return self.finish(BASELINE, {**facts, "seconds": seconds, **more(trained)})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON file with the digest of its content, which no manifest has."""
    text = json.dumps({"sha256": _digest(content), "content": content})
    write_atomically(file, lambda path: Path(path).write_text(text))


def _read(file: Path) -> dict[str, Any]:
    """The content of a file of `_write`; SensibertError if it is not what was written."""
    try:
        whole = parse_json(file.read_text())
        if whole["sha256"] == _digest(whole["content"]):
            return whole["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SensibertError(f"resume: {file} is damaged: delete it, or start again without resume")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def as_baseline(options: Options) -> Options:
    """The same run without trimming. The run's own snapshot at the cut cannot teach it."""
    teacher = None if options.teacher == SNAPSHOT else options.teacher
    trim = replace(options.trim, method=BASELINE, weights=None)
    return replace(options, baseline=False, budgets=None, keep=None, teacher=teacher, trim=trim)


def add_baseline(result: dict[str, Any], baseline: Mapping[str, Any]) -> None:
    """Note what `Branches.baseline` found in the content of result.json."""
    result["metrics_baseline"] = baseline["metrics"]
    add_seconds(result, BASELINE, baseline["seconds"])


def add_seconds(result: dict[str, Any], phase: str, spent: float) -> None:
    """Add a phase, and its seconds to the total."""
    total = result["seconds"].pop("total") + spent
    result["seconds"] |= {phase: round(spent, 3), "total": round(total, 3)}
