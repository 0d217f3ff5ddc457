"""The compiled half: it builds, it says what it is, it can be hidden, and its absence never stops anything."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sensibert import _native
from sensibert.allocation.solver import solve_levels

ROOT = Path(__file__).resolve().parents[1]


def python(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py without CUDA, which csrc/check_kernels.py looks after."""
    return python("setup.py", "build_ext", "-b", folder, "-t", folder, SENSIBERT_CUDA_ARCHS="", **environment)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """_C as setup.py builds it now, whatever may be installed."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("build")
    done = build(folder)
    (file,) = list((folder / "sensibert").glob("_C*.so")) or pytest.fail(done.stdout + done.stderr)
    spec = importlib.util.spec_from_file_location("sensibert._C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_build_says_what_it_is(compiled, monkeypatch):
    info = compiled.build_info()
    assert info["architectures"] == [] and info["cuda"] == ""
    assert info["compiler"].startswith("C++ ") and info["commit"]
    monkeypatch.setattr(_native, "module", compiled)
    assert _native.status().startswith("native kernels: host solver only")


@pytest.mark.parametrize("seed", range(20))
def test_cpp_and_numpy_choose_the_same_levels(compiled, seed):
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 20, rng.integers(1, 9)).tolist() for _ in range(7)]
    values = [rng.standard_normal(len(group)) for group in costs]
    values = [(v if seed % 2 else v.round()).tolist() for v in values]  # rounded ones tie
    for capacity in (0, 7, 60, 1000):
        assert compiled.solve_levels(costs, values, capacity) == solve_levels(costs, values, capacity)


def test_a_broken_compiler_does_not_stop_the_install(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build(tmp_path / "build", CC=str(broken), CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("build/**/*.so"))
    assert "failed" in done.stdout + done.stderr


def test_the_switch_hides_it_and_the_ops_still_work():
    program = """
import torch
from sensibert import _native, ops
from sensibert.core.grid import Grid
assert not _native.available
print(_native.status())
w = torch.ones(2, 3)
print(ops.block_sensitivity([w], [w], Grid.tensor())[0].item())
"""
    done = python("-c", program, SENSIBERT_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "native kernels: none, hidden by SENSIBERT_NO_NATIVE; the PyTorch reference serves every op",
        "6.0",
    ]


def test_a_module_that_cannot_be_loaded_is_remembered_in_a_sentence(tmp_path):
    package = tmp_path / "sensibert"
    shutil.copytree(ROOT / "sensibert", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.py").write_text("raise ImportError('libtorch_cuda.so: cannot open shared object file')")
    done = python("-c", "from sensibert import _native; print(_native.status())", folder=tmp_path)
    assert "none, built, but cannot be loaded: libtorch_cuda.so: cannot open" in done.stdout, done.stderr


@pytest.mark.parametrize("cards", [1, 0])
def test_a_card_without_kernels_is_told_once(cards):
    program = (
        f"import torch; torch.version.cuda, torch.cuda.device_count = '13.0', lambda: {cards}; import sensibert.ops"
    )
    done = python("-c", program, SENSIBERT_NO_NATIVE="1")
    assert done.returncode == 0 and done.stderr.count("native kernels: none") == cards, done.stderr


def test_without_nvcc_the_kernel_check_says_so(tmp_path):
    done = python("csrc/check_kernels.py", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert done.returncode == 0 and "nvcc is not here" in done.stdout
