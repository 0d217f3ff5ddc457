"""Training in several processes: the first one decides, and the others follow or say why they cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..core.artifacts import Plan
from ..core.errors import OfAnother, SensibertError, first_line
from ..core.launch import launched
from ..models.modules import weights_digest

Result = TypeVar("Result")
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # values of accelerate's DistributedType

# In several processes on CPUs transformers 5.14 loads the state of the optimizer to "cpu:0", which torch does not know.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def sharding(args: TrainingArguments) -> str | None:
    """The way in which training divides tensors among processes; None if it does not."""
    kind = "fsdp" if args.fsdp else "deepspeed" if args.deepspeed else None
    if kind is None and is_initialized():  # accelerate reads the environment too
        used = str(AcceleratorState().distributed_type.value)
        kind = used if used in SHARDED else None
    return kind


def check_processes(args: TrainingArguments) -> None:
    """SensibertError for parallel training in which a model cannot be trimmed: anything but DistributedDataParallel."""
    if (kind := sharding(args)) is not None:
        raise SensibertError(
            f"TrimCallback: training uses {kind}, which divides every tensor among the processes; want "
            "DistributedDataParallel (torchrun, without it), or trim first (sensibert trim) and train the smaller model"
        )
    if args.n_gpu > 1:
        raise SensibertError(
            f"TrimCallback: n_gpu is {args.n_gpu}: DataParallel in one process is not supported; want a process for "
            "each GPU (torchrun --nproc-per-node), or one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if (started := launched().count) > args.world_size:
        raise SensibertError(
            f"TrimCallback: {started} processes were started, and each would train alone and write the same files; "
            "on a CPU want TrainingArguments(use_cpu=True, ddp_backend='gloo')"
        )
    if args.world_size == 1:
        return
    if args.parallel_mode != ParallelMode.DISTRIBUTED or not dist.is_initialized():
        raise SensibertError(
            f"TrimCallback: world_size is {args.world_size} without torch.distributed, want DistributedDataParallel"
        )
    for name in ("torch_compile", "parallelism_config", "save_on_each_node"):
        if getattr(args, name):
            raise SensibertError(
                f"TrimCallback: {name} is set and world_size is {args.world_size}, want it unset, or one process"
            )


@dataclass(frozen=True)
class Processes:
    """The processes of a training. With one, every method is a plain call, or nothing at all.

    Every process has to call the same methods in the same order."""

    count: int = 1
    number: int = 0  # of this process
    timeout: int = 1800  # seconds

    @classmethod
    def of(cls, args: TrainingArguments) -> Processes:
        count = args.world_size if dist.is_available() and dist.is_initialized() else 1
        return cls(count, args.process_index if count > 1 else 0, args.ddp_timeout)

    @property
    def first(self) -> bool:
        return self.number == 0

    def by_first(self, work: Callable[[], Result]) -> Result:
        """What the first process gets from `work`, in all of them. If it raises there, OfAnother in the others."""
        if self.count == 1:
            return work()
        failure: Exception | None = None
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[0] = work()
            except Exception as error:
                failure, message = error, [None, f"process 0: {first_line(error)}"]
        with self._all_alive():
            dist.broadcast_object_list(message, 0)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise OfAnother(message[1])
        return message[0]

    def in_first(self, work: Callable[[], Result], elsewhere: Any) -> Result:
        """What `work` returns in the first process, and `elsewhere` in the others, once it is done."""
        kept = [elsewhere]

        def run() -> None:
            kept[0] = work()

        self.by_first(run)
        return kept[0]

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        if self.count > 1:
            with self._all_alive():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    @torch.no_grad()
    def add_up(self, tensor: Tensor) -> None:
        """Give all processes the sum of their tensors, in place. `training` tells an error of torch.distributed."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def want_same(self, model: nn.Module, when: str, plan: Plan | None = None) -> None:
        """SensibertError naming the processes whose plan or weights differ from those of the first one."""
        if self.count == 1:
            return
        digests: list[Any] = [None] * self.count
        with self._all_alive():
            dist.all_gather_object(digests, (None if plan is None else _plan_digest(plan), weights_digest(model)))
        for place, what in enumerate(("kept units", "weights")):
            others = [str(number) for number, digest in enumerate(digests) if digest[place] != digests[0][place]]
            if others:
                raise SensibertError(
                    f"TrimCallback: {when}, the {what} of process {', '.join(others)} are not those of process 0; want "
                    "the same model and seed in all of them"
                )

    def wait(self) -> None:
        """Return when all processes have called it."""
        if self.count > 1:
            with self._all_alive():
                dist.barrier()

    @contextmanager
    def _all_alive(self) -> Iterator[None]:
        try:
            if dist.get_backend() == "gloo":  # whose broadcast would wait for ever for a process that has stopped
                dist.monitored_barrier(timeout=timedelta(seconds=self.timeout))
            yield
        except RuntimeError as error:  # torch's DistBackendError is one
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> OfAnother:
        """What to raise for an error of torch.distributed."""
        return OfAnother(
            f"TrimCallback: process {self.number} lost another one, which ended or did not answer within ddp_timeout "
            f"({self.timeout} s): {first_line(error)}"
        )

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context in which an error of torch.distributed, while gradients are reduced, is OfAnother."""
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise self.lost(error) from error
            raise


def _plan_digest(plan: Plan) -> str:
    digest = hashlib.sha256()
    for name, keep in sorted(plan.keep.items()):
        digest.update(f"{name} {tuple(keep.shape)}".encode() + keep.cpu().numpy().tobytes())
    return digest.hexdigest()
