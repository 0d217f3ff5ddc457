"""A model as a graph in a file, for ONNX Runtime, OpenVINO, ExecuTorch or torch alone, and that file as a module.

Batch and length of a graph are free; only ExecuTorch has a longest text, and computes rows one by one. Its inputs are
int64 [B, S] (`input_names`), its outputs those of the model that OUTPUTS names, in fp32.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import SensibertError, described
from ..models.modules import attending, configs_of, positions
from . import executorch_file
from .attention import ONNX_ATTENTION, OPSET

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
INT8_FILE = "onnx/model_quantized.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Shape of the example that a graph is traced with: neither size is 1, which torch.export would fix.
EXAMPLE = (2, 16)


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """Those of INPUTS that the model reads and its tokenizer makes."""
    accepted = inspect.signature(model.forward).parameters
    made = INPUTS if tokenizer is None else tokenizer.model_input_names
    return tuple(name for name in INPUTS if name in accepted and name in (*made, *INPUTS[:2]))


def random_inputs(names: tuple[str, ...], vocabulary: int, rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of random tokens; the last of several rows is half as long as the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(1, tokens // 2) :] = 0 if rows > 1 else 1
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in names}


class Outputs(dict[str, Tensor]):
    """Tensors by name, or by number like those of transformers."""

    def __getitem__(self, key: str | int) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class _Traced(nn.Module):
    """The model with inputs in a fixed order and a tuple of outputs."""

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(found[name].float() for name in self.outputs)


class Trace(NamedTuple):
    """What a runtime's file is written from."""

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    half_tables: bool = False  # whether embedding tables are stored in fp16
    longest: int | None = None  # tokens of a text, if there is a limit


def trace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: Runtime) -> Trace:
    """The graph of a model in eval mode, for a runtime. SensibertError if torch.export cannot make one."""
    names = input_names(model, tokenizer)
    rows, tokens = EXAMPLE
    known = positions(model)
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    longest = runtime.longest
    if longest is not None:
        longest = min(longest, known or longest)
        rows, free = 1, {1: torch.export.Dim("length", max=longest)}
    inputs = random_inputs(names, model.config.vocab_size, rows, min(tokens, known or tokens))
    with torch.no_grad():
        found = model(**inputs, return_dict=True)
    outputs = tuple(name for name in OUTPUTS if name in found)
    configs = configs_of(model) if runtime.attention and model._supports_attention_backend else []
    try:
        with _quiet(), torch.no_grad(), attending(configs, runtime.attention or ""):
            program = torch.export.export(
                _Traced(model, names, outputs), tuple(inputs.values()), dynamic_shapes=((free,) * len(names),)
            )
    except Exception as error:  # of torch.export, which has many
        kind = type(model).__name__
        raise SensibertError(f"export: torch.export has no graph of this {kind} ({described(error)})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return Trace(program, names, outputs, longest=longest)


class Graph(nn.Module):
    """A graph in its runtime, with the inputs and outputs of the model. On a CPU.

    run: (the inputs by name, int64 [B, S]) -> outputs in the order of `outputs`. longest: the most tokens of a text;
    None: any number."""

    def __init__(
        self,
        run: Callable[[dict[str, Tensor]], list[Tensor]],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.run, self.inputs, self.outputs, self.longest = run, inputs, outputs, longest
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # callers ask for the device of a parameter

    def forward(self, **inputs: Tensor) -> Outputs:
        ids = inputs["input_ids"]
        usual = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        values = {name: (usual | inputs)[name].contiguous() for name in self.inputs}
        return Outputs(zip(self.outputs, self.run(values), strict=True))


LEAST = {"onnxruntime": (1, 21)}  # package -> its oldest version that can be used: older ones do not open OPSET


class Runtime(NamedTuple):
    """file: where the graph lies in an exported folder, as other libraries expect it. tolerance: of its outputs, as a
    fraction of the largest. extra: of this package, which installs `packages`. attention: transformers' name of the
    implementation that is traced; None: the model's own. longest: tokens of a text (or the positions of the model, if
    they are fewer), and it then takes one row; None: no limits."""

    file: str
    tolerance: float
    packages: tuple[str, ...]
    extra: str | None
    write: Callable[[Trace, Path], None]
    open: Callable[[Path, int | None], Graph]
    attention: str | None = None
    longest: int | None = None

    def want_packages(self, name: str) -> None:
        for package in self.packages:
            install = f"pip install 'sensibert[{self.extra}]'"
            try:
                with _quiet():
                    module = import_module(package)
            except ImportError:
                shown = package.partition(".")[0]
                raise SensibertError(f"{name} needs the package {shown}: {install}") from None
            least = LEAST.get(package)
            if least and tuple(map(int, module.__version__.split(".")[:2])) < least:
                wanted = ".".join(map(str, least))
                raise SensibertError(f"{name} needs {package} {wanted} or later, found {module.__version__}: {install}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log messages of exporters, which are for their developers."""
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(traced: Trace, file: Path) -> None:
    import onnx

    with _quiet():
        made = torch.onnx.export(
            traced.program, (), input_names=traced.inputs, output_names=traced.outputs, dynamo=True, verbose=False,
            opset_version=OPSET,
        )  # fmt: skip
        assert made is not None  # with dynamo
        model = made.model_proto
    for shape in (value.type.tensor_type.shape for value in (*model.graph.input, *model.graph.output)):
        for size, name in zip(shape.dim[:2], ("batch", "sequence"), strict=False):
            if size.HasField("dim_param"):
                size.dim_param = name
    # Shapes of inner values: quantization takes them for those of the model it has changed, and fails.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]  # the modules that it is from: 1 KB a node
    if traced.half_tables:
        _halve_tables(model)
    onnx.save(model, file)


def _halve_tables(model: Any) -> None:
    """Store the embedding tables of an ONNX model in fp16; the rows that are read become fp32 again."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    reads = {name: [node for node in graph.node if name in node.input] for name in weights}
    for name, tensor in weights.items():
        gathers = [node for node in reads[name] if node.op_type == "Gather" and node.input[0] == name]
        if len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT or len(gathers) != len(reads[name]):
            continue
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), name))
        for node in gathers:
            wide, node.output[0] = node.output[0], f"{node.output[0]}_half"
            cast = helper.make_node("Cast", [node.output[0]], [wide], to=TensorProto.FLOAT)
            graph.node.insert(list(graph.node).index(node) + 1, cast)


def _open_onnx(file: Path, threads: int | None) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads hinder what runs next
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    inputs, outputs = (tuple(each.name for each in ends) for ends in (session.get_inputs(), session.get_outputs()))
    return Graph(run, inputs, outputs)


def _write_openvino(traced: Trace, file: Path) -> None:
    import openvino

    between = file.with_suffix(".onnx")
    _write_onnx(traced, between)
    openvino.save_model(openvino.convert_model(between), file, compress_to_fp16=False)
    between.unlink()


def _open_openvino(file: Path, threads: int | None) -> Graph:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = openvino.Core().compile_model(file, "CPU", settings)

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found = compiled({name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(found[name].copy()) for name in outputs]

    inputs, outputs = (tuple(each.get_any_name() for each in ends) for ends in (compiled.inputs, compiled.outputs))
    return Graph(run, inputs, outputs)


def _write_torch(traced: Trace, file: Path) -> None:
    names = {"inputs": " ".join(traced.inputs), "outputs": " ".join(traced.outputs)}
    torch.export.save(traced.program, file, extra_files=names)


def _open_torch(file: Path, threads: int | None) -> Graph:
    names: dict[str, Any] = {"inputs": "", "outputs": ""}
    module = torch.export.load(file, extra_files=names).module()
    inputs, outputs = (tuple(str(text).split()) for text in names.values())
    if not inputs or not outputs:
        raise SensibertError(f"{file} does not name its inputs, want a file of sensibert export")
    return Graph(lambda inputs: list(module(*inputs.values())), inputs, outputs)


def _write_executorch(traced: Trace, file: Path) -> None:
    assert traced.longest is not None  # of this runtime
    try:
        with _quiet():
            executorch_file.write(traced.program, traced.inputs, traced.outputs, traced.longest, file)
    except Exception as error:  # of its compiler
        raise SensibertError(f"export: executorch has no program of this model ({described(error)})") from error


def _open_executorch(file: Path, threads: int | None) -> Graph:
    with _quiet():
        program = executorch_file.opened(file, threads)

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        rows, tokens = inputs["input_ids"].shape
        if tokens > program.longest:
            raise SensibertError(f"executorch: a text has {tokens} tokens, want at most {program.longest}")
        parts = []
        for row in range(rows):
            found = program.run({name: value[row : row + 1] for name, value in inputs.items()})
            parts.append([value.clone() for value in found])
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    return Graph(run, program.inputs, program.outputs, program.longest)


ONNX = ("onnx", "onnxscript", "onnxruntime")
RUNTIMES = {
    "onnx": Runtime("onnx/model.onnx", 1e-4, ONNX, "export", _write_onnx, _open_onnx, ONNX_ATTENTION),
    # Of other attention softmax is traced with a guard for rows without tokens, which OpenVINO does not fuse.
    "openvino": Runtime(
        *("openvino/openvino_model.xml", 1e-3, (*ONNX, "openvino"), "openvino", _write_openvino, _open_openvino),
        attention="eager",
    ),
    "torch": Runtime("torch/model.pt2", 1e-4, (), None, _write_torch, _open_torch),
    "executorch": Runtime(
        *("model.pte", 1e-4, ("executorch.exir",), "executorch", _write_executorch, _open_executorch),
        longest=executorch_file.LONGEST,
    ),
}


QUANTIZED = ["MatMul", "Gather", "Transpose"]


def quantize(file: Path, target: Path) -> None:
    """Write an ONNX graph with int8 weights, those of the embeddings too, and activations quantized as they come.

    Weights use 7 bits: with 8, processors without VNNI instructions lose the largest sums, without a word. Those of
    convolutions (deberta-v2 may have one) stay: ONNX Runtime 1.23 has none with int8 weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            file,
            target,
            op_types_to_quantize=QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what follows ONNX Runtime's own operators
        )
