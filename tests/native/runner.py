"""Runs the real kernel sources on the CPU: g++ builds tests/native/<op>.cpp with cuda_on_cpu.h, plain or sanitized."""

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DSENSIBERT_CUDA_ON_CPU"]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc' / 'kernels'}"]
# The headers of the C++ library that every program includes first: half of what a compilation takes.
FIRST = "".join(f"#include <{name}>\n" for name in ("algorithm", "cmath", "functional", "string", "vector"))


class KernelFailed(AssertionError):
    """The program ended with an error: a sanitizer's report, a barrier not all threads reached, a refused launch."""


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def precompiled(header: Path, text: str, flags: list[str]) -> list[str]:
    """Flags that include a header of this text first. It is parsed once a session: the workers of pytest-xdist share
    its folder."""
    with open(header.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not header.exists():
            header.write_text(text)
            command = [compiler(), *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
            subprocess.run(command, capture_output=True)  # if it fails, the compilations that include it say why
    return ["-include", str(header)]


def build(source: Path, kind: str, folder: Path, shared: Path) -> Path:
    program, flags = folder / f"{source.stem}-{kind}", [*FLAGS, *BUILDS[kind]]
    first = precompiled(shared / f"{kind}.h", FIRST, flags)
    command = [compiler(), *flags, *first, *INCLUDES, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and kind != "plain" and ("cannot find" in done.stderr or "unsupported" in done.stderr):
        pytest.skip(f"{command[0]} has no {kind}")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arrays: Tensor, **environment: str) -> list[Tensor]:
    """The arrays after the program's run(), as new tensors of the same shapes. KernelFailed says what went wrong."""
    raw = [a.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if a.numel() else b"" for a in arrays]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays"
        path.write_bytes(struct.pack("<q", len(raw)) + b"".join(struct.pack("<q", len(r)) + r for r in raw))
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0", **environment}
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
