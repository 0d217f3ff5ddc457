"""Runs the real kernel sources on the CPU: g++ builds tests/native/<op>.cpp with cuda_on_cpu.h, plain or sanitized."""

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DSENSIBERT_CUDA_ON_CPU"]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc' / 'kernels'}"]


class KernelFailed(AssertionError):
    """The program ended with an error: a sanitizer's report, a barrier not all threads reached, a refused launch."""


def build(source: Path, kind: str, folder: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / f"{source.stem}-{kind}"
    command = [compiler, *FLAGS, *BUILDS[kind], *INCLUDES, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and kind != "plain" and ("cannot find" in done.stderr or "unsupported" in done.stderr):
        pytest.skip(f"{compiler} has no {kind}")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arrays: Tensor, **environment: str) -> list[Tensor]:
    """The arrays after the program's run(), as new tensors of the same shapes. KernelFailed says what went wrong."""
    raw = [a.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if a.numel() else b"" for a in arrays]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays"
        path.write_bytes(struct.pack("<q", len(raw)) + b"".join(struct.pack("<q", len(r)) + r for r in raw))
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", **environment}
        done = subprocess.run(
            [program, path], capture_output=True, text=True, env={**os.environ, **options}, timeout=120
        )
        if done.returncode:
            raise KernelFailed(f"{program.name} ended with {done.returncode}\n{done.stderr[-6000:]}")
        data, results, at = path.read_bytes(), [], 0
        for array, r in zip(arrays, raw):
            flat = torch.frombuffer(bytearray(data[at : at + len(r)]), dtype=torch.uint8) if r else torch.empty(0)
            results.append(flat.view(array.dtype).view(array.shape) if r else array.clone())
            at += len(r)
        return results


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


def build_binding(op: str, folder: Path) -> Path:
    """csrc/torch/<op>.cpp with its kernel as a library for torch.ops.load_library that serves CPU tensors."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    include = Path(torch.__file__).parent / "include"
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.py", "*.md"))
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    source = folder / "csrc" / "torch" / f"{op}.cpp"
    text = source.read_text()
    for old, new in OF_THE_GPU:
        text, count = re.subn(old, new, text)
        assert count, f"{source.name} no longer says {old}"
    # torch's headers first: names of the CPU machine are macros that they use otherwise
    first = "".join(f"#include <torch/csrc/stable/{name}.h>\n" for name in ("library", "tensor", "ops", "accelerator"))
    source.write_text(first + text + f'#include "../kernels/{op}.cu"\n{STREAM}\n')
    stable = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    library = folder / f"{op}.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-DSENSIBERT_CUDA_ON_CPU", *stable, f"-I{folder}"]
    command += [f"-I{HERE}", f"-I{folder / 'csrc' / 'kernels'}", f"-I{include}", str(source), "-o", str(library)]
    command += [f"-L{include.parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return library


def python(binding: Path, *command: str) -> str:
    """What a process says that must succeed, in which CPU tensors may go through the binding (`through_binding.py`)."""
    env = {**os.environ, "SENSIBERT_TEST_BINDING": str(binding), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def ops_tests_pass(binding: Path, op: str, chosen: str) -> None:
    """The tests of an op (tests/ops/**/test_<op>.py), those of the CPU that `-k chosen` names, through the binding."""
    choice = [str(next((ROOT / "tests" / "ops").rglob(f"test_{op}.py"))), "-k", chosen, "-m", "not gpu"]
    output = python(binding, "-m", "pytest", "-q", "-x", "-p", "tests.native.through_binding", *choice)
    assert " passed" in output, output
