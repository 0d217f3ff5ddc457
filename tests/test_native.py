"""The compiled kernels: what a build says of itself, that they can be hidden, and that nothing needs them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sensibert import _native
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]


def python(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what an install reads, as builds write beside it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("sensibert", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_build_reports_its_version_and_architectures(tmp_path, monkeypatch):
    """csrc/torch/module.cpp alone: all of `_C` but the kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    built = {"CUDA": "13.0", "ARCHITECTURES": "sm_80 sm_90a", "COMMIT": "0123abc"}
    defines = [f'-DSENSIBERT_{name}="{value}"' for name, value in built.items()]
    file = tmp_path / "_C.so"
    flags = ["-std=c++20", "-O0", "-fvisibility=hidden", "-Wall", "-Werror", "-shared", "-fPIC", *includes, *defines]
    done = subprocess.run(
        [compiler, *flags, ROOT / "csrc/torch/module.cpp", "-o", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("built._C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info = module.build_info()
    assert info["architectures"] == ["sm_80", "sm_90a"] and info["cuda"] == "13.0" and info["commit"] == "0123abc"
    monkeypatch.setattr(_native, "module", module)
    assert _native.status().startswith("native kernels: CUDA 13.0 for sm_80, sm_90a (C++ ")


def test_without_cuda_the_wheel_is_pure_python(checkout):
    done = python("setup.py", "bdist_wheel", "--dist-dir", "dist", folder=checkout, SENSIBERT_CUDA_ARCHS="")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "SENSIBERT_CUDA_ARCHS is empty, so no CUDA kernels" in done.stderr


def test_a_broken_compiler_does_not_stop_the_install(checkout):
    """With an nvcc that only knows its version, and a torch that claims to be built with the same CUDA."""
    pytest.importorskip("pybind11")
    nvcc = checkout / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.88" || exit 1\n')
    nvcc.chmod(0o755)
    header = checkout / "cuda" / "include" / "cuda_runtime.h"
    header.parent.mkdir()
    header.touch()
    program = (
        "import runpy, sys, torch; torch.version.cuda = '13.0'; torch.cuda._is_compiled = lambda: True;"
        "torch.cuda.is_available = lambda: False; sys.argv = ['setup.py', 'build_ext', '--inplace'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = python("-c", program, folder=checkout, CUDA_HOME=str(checkout / "cuda"), CXX="g++")
    assert done.returncode == 0, done.stderr
    assert "the CUDA kernels were not built" in done.stderr and not list(checkout.glob("sensibert/*.so"))


# First lines of a program that runs in a forked process, with torch imported and nothing of sensibert.
FIRST = """
import os, sys, torch
assert not any(name.split(".")[0] == "sensibert" for name in sys.modules)
folder = sys.argv[1]
"""
SWITCHED_OFF = """
from sensibert import _native, ops
from sensibert.core.grid import Grid
assert not _native.available
print(_native.status())
w = torch.ones(2, 3)
print(ops.block_sensitivity([w], [w], Grid.tensor())[0].item())
"""
HIDDEN = {"SENSIBERT_NO_NATIVE": "1"}
WITH_GPUS = "torch.version.cuda, torch.cuda.device_count = '13.0', lambda: {}; import sensibert.ops"
BROKEN = """
del os.environ["SENSIBERT_NO_NATIVE"]
sys.path.insert(0, folder)
from sensibert import _native
assert _native.__file__.startswith(folder)
print(_native.status())
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """What each program writes to standard output and to standard error."""
    folder = tmp_path_factory.mktemp("said")
    package = folder / "sensibert"
    shutil.copytree(ROOT / "sensibert", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.py").write_text("raise ImportError('libtorch_cuda.so: cannot open shared object file')")
    programs = {"off": SWITCHED_OFF, "gpus 1": WITH_GPUS.format(1), "gpus 0": WITH_GPUS.format(0), "broken": BROKEN}
    ended = {name: fresh.forked(FIRST + code, folder, cwd=ROOT, **HIDDEN) for name, code in programs.items()}
    assert [status for status, _, _ in ended.values()] == [0] * len(programs), ended
    return {name: (out, err) for name, (_, out, err) in ended.items()}


def test_the_switch_hides_it_and_the_ops_still_work(said):
    assert said["off"][0].splitlines() == [
        "native kernels: none, hidden by SENSIBERT_NO_NATIVE; the PyTorch reference serves every op",
        "6.0",
    ]


def test_the_status_has_the_reason_why_a_module_could_not_be_loaded(said):
    assert "none, built, but cannot be loaded: libtorch_cuda.so: cannot open" in said["broken"][0]


@pytest.mark.parametrize("gpus", [1, 0])
def test_a_gpu_without_kernels_is_warned_of_once(said, gpus):
    assert said[f"gpus {gpus}"][1].count("native kernels: none") == gpus


def test_without_nvcc_the_kernel_check_reports_it(tmp_path):
    done = python("csrc/check_kernels.py", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert done.returncode == 0 and "nvcc is not here" in done.stdout
