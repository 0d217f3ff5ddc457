"""The binding of select_threshold, run without a GPU: built for the CPU machine, registered for CPU tensors in its own
process, it must answer through the dispatcher as the reference does, and refuse what would write out of bounds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .runner import FLAGS, INCLUDES, ROOT

OF_THE_GPU = {
    "(sensibert, CUDA, m)": "(sensibert, CPU, m)",
    "is_cuda()": "is_cpu()",
    "const torch::stable::accelerator::DeviceGuard guard(device);": "",
}
RUNTIME = """
#pragma once
#include "cuda_on_cpu.h"
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the CPU machine"; }
"""
KERNEL = """
#define SENSIBERT_SELECT_THREADS 64
#include "../kernels/select_threshold.cu"
extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }
"""
PROGRAM = """
import sys, torch
from torch.utils._pytree import tree_leaves
from sensibert.ops import select_threshold
op = torch.ops.sensibert.select_threshold_

def step(scores):
    got = select_threshold([s * 2 for s in scores], 700)
    return got, [s * m for s, m in zip(scores, got.keep)]

torch.manual_seed(0)
cube = [torch.ones(2, 2, 2)]
scores = [torch.randn(30, 70), torch.randn(5).half(), torch.randn(9, 9).t()[:, ::2], torch.empty(0, 3), torch.ones(())]
want, nothing, corner = step(scores), select_threshold([], 0), select_threshold(cube, 3)
torch.ops.load_library(sys.argv[1])
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
for got in (step(scores), compiled(scores)):
    assert all(map(torch.equal, tree_leaves(got), tree_leaves(want)))
assert select_threshold([], 0) == nothing and torch.equal(select_threshold(cube, 3).keep[0], corner.keep[0])

def arguments(**changed):
    empty = lambda *shape, dtype=torch.uint8: torch.empty(shape, dtype=dtype)
    given = {"keep": [empty(3, 9, dtype=torch.bool)], "threshold": torch.empty(()), "num_nan": empty(dtype=torch.int64)}
    return given | {"scores": [torch.randn(3, 9)], "k": 7} | changed

torch.library.opcheck(op.default, tuple(arguments().values()))
for changed, message in [
    ({"scores": [torch.randn(4, 9)]}, "keep[0] is not 36 contiguous elements"),
    ({"scores": [torch.randn(3, 9).double()]}, "scores[0] is of a dtype"),
    ({"scores": []}, "keep has 1 tensors, want 0"),
    ({"keep": [torch.empty(9, 3, dtype=torch.bool).t()]}, "keep[0] is not 27 contiguous elements"),
    ({"threshold": torch.empty((), dtype=torch.float64)}, "threshold[0] is not 1 contiguous elements"),
    ({"k": 28}, "k is 28, want an int in [0, 27]"),
    ({"k": -1}, "k is -1, want an int in [0, 27]"),
]:
    try:
        op(*arguments(**changed).values())
    except RuntimeError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(f"not refused: {message}")
print("passed")
"""


def test_the_binding_answers_as_the_reference_and_refuses_what_does_not_fit(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = (ROOT / "csrc" / "torch" / "select_threshold.cpp").read_text()
    for old, new in OF_THE_GPU.items():
        assert old in source, f"the binding no longer says {old}"
        source = source.replace(old, new)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    binding, library = tmp_path / "csrc" / "torch" / "select_threshold.cpp", tmp_path / "binding.so"
    binding.write_text(source)
    kernel = binding.with_name("kernel.cpp")
    kernel.write_text(KERNEL)
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    home = Path(torch.__file__).parent
    flags = [*(f for f in FLAGS if f not in ("-Wextra", "-Werror")), "-O0", "-shared", "-fPIC", *INCLUDES]
    flags += ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [
        f"-I{tmp_path}",
        f"-I{home / 'include'}",
        "-include",
        "torch/csrc/stable/ops.h",
    ]  # before the CPU machine's words
    links = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", str(library)]
    built = subprocess.run([compiler, *flags, str(binding), str(kernel), *links], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    command = [sys.executable, "-c", PROGRAM, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "passed", done.stdout + done.stderr[-4000:]
