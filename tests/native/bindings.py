"""The real bindings of the kernels with CPU tensors: g++ builds csrc/torch/<op>.cpp with its kernel, and programs and
tests run in processes of their own in which `tests.native.through_binding` has loaded the result."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fresh import Started

from .runner import HERE, ROOT, compiler, precompiled

TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-DSENSIBERT_CUDA_ON_CPU"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}"]
# torch's headers first: names of the CPU machine are macros that they use otherwise
FIRST = "".join(f"#include <torch/csrc/stable/{name}.h>\n" for name in ("library", "tensor", "ops", "accelerator"))
# What only a GPU has, in the text of a binding, and what stands for it on the CPU machine.
OF_THE_GPU = [
    (r"\(sensibert, CUDA, m\)", "(sensibert, CPU, m)"),
    (r"\bis_cuda\(\)", "is_cpu()"),
    (r"const torch::stable::accelerator::DeviceGuard guard\(.*\);", ""),
]
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }'
RUNTIME = """#pragma once
#include "cuda_on_cpu.h"
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the CPU machine"; }
"""


def build(op: str, folder: Path, shared: Path, *defines: str) -> Path:
    """csrc/torch/<op>.cpp with its kernel as a library for torch.ops.load_library that serves CPU tensors."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.py", "*.md"))
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    source = folder / "csrc" / "torch" / f"{op}.cpp"
    text = source.read_text()
    for old, new in OF_THE_GPU:
        text, count = re.subn(old, new, text)
        assert count, f"{source.name} no longer says {old}"
    source.write_text(text + f'#include "../kernels/{op}.cu"\n{STREAM}\n')
    library = folder / f"{op}.so"
    command = [
        compiler(),
        *FLAGS,
        *precompiled(shared / "torch.h", FIRST, FLAGS),
        *defines,
        f"-I{folder}",
        f"-I{HERE}",
        f"-I{folder / 'csrc' / 'kernels'}",
    ]
    command += ["-shared", str(source)]
    command += ["-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return library


def _tested(code: str, pytest_arguments: tuple[str, ...]) -> None:
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    sys.exit(pytest.main(list(pytest_arguments)) if pytest_arguments else 0)


def run(binding: Path, code: str, *pytest_arguments: str) -> str:
    """What code says that must succeed, in a process in which CPU tensors may go through the binding."""
    started = Started(_tested, code, pytest_arguments, cwd=ROOT, SENSIBERT_TEST_BINDING=str(binding))
    status, out, err = started.ended()
    started.kill()
    assert status == 0, (out[-3000:], err[-3000:])
    return out


def passes(binding: Path, program: str) -> None:
    """A program that ends by printing `passed`."""
    assert run(binding, program).endswith("passed\n")


def ops_tests_pass(binding: Path, op: str, chosen: str) -> None:
    """The tests of an op (tests/ops/**/test_<op>.py), those of the CPU that `-k chosen` names, through the binding."""
    choice = [str(next((ROOT / "tests" / "ops").rglob(f"test_{op}.py"))), "-k", chosen, "-m", "not gpu"]
    output = run(binding, "", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.native.through_binding", *choice)
    assert " passed" in output, output
