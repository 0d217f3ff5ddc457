"""What a release ships: a pure wheel with everything, made from a source distribution that can build the kernels."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import sensibert
from sensibert.deploy.graphs import LEAST
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]
READ_BY_A_BUILD = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]

# A program that finds the packages of a folder, in the processes that it starts too.
INSTALLED = """
import os, runpy, sys
folder, program = sys.argv[1:]
sys.path.insert(0, folder)
os.environ["PYTHONPATH"] = folder
runpy.run_path(program, run_name="__main__")
"""


def python(*command: str, cwd: Path, **environment: str) -> str:
    # Where torch has CUDA, an install builds the kernels; a release never does.
    environment = {**os.environ, **({} if torch.version.cuda is None else {"SENSIBERT_CUDA_ARCHS": ""}), **environment}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def files(folder: str, *patterns: str) -> set[str]:
    found = {p for pattern in patterns for p in (ROOT / folder).rglob(pattern) if "__pycache__" not in p.parts}
    return {p.relative_to(ROOT).as_posix() for p in found}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution of a copy of the checkout, as builds write beside it."""
    here = tmp_path_factory.mktemp("sdist")
    for name in READ_BY_A_BUILD:
        shutil.copy(ROOT / name, here)
    for name in ("sensibert", "csrc", "tests"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    python("-c", build, cwd=here, SENSIBERT_CUDA_ARCHS="")  # then it does not import torch
    (archive,) = (here / "dist").iterdir()
    assert archive.name == f"sensibert-{VERSION}.tar.gz"
    with tarfile.open(archive) as file:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.3 and before
        file.extractall(here / "unpacked", **safely)
    return here / "unpacked" / f"sensibert-{VERSION}"


@pytest.fixture(scope="module")
def wheel(sdist):
    """Built as pip does it without build isolation."""
    python("-c", "from setuptools import build_meta; build_meta.build_wheel('wheel')", cwd=sdist)
    (file,) = (sdist / "wheel").iterdir()
    return file


def test_the_source_distribution_can_build_the_kernels(sdist):
    found = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    sources = files("csrc", "*.cu", "*.cpp", "*.h")
    assert len(sources) > 10 and found >= {*READ_BY_A_BUILD, *sources, *files("sensibert", "*.py", "py.typed")}
    assert not [name for name in found if name.startswith("tests/") or name.endswith((".so", ".o"))]


def test_the_wheel_is_pure_and_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"sensibert-{VERSION}-py3-none-any.whl"
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == files("sensibert", "*.py") | {"sensibert/py.typed"}
    assert "sensibert/models/modeling_sensibert.py" in found  # read as a file, by whoever saves a trimmed model


def test_the_wheel_does_what_the_readme_says(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    said = fresh.run(INSTALLED, tmp_path, ROOT / "tests" / "wheel_check.py", cwd=tmp_path, isolated=True)
    assert said == f"sensibert {VERSION} from {tmp_path / 'sensibert'}: equal logits after a reload"


def test_extras_install_versions_that_can_be_used():
    written = (ROOT / "pyproject.toml").read_text()
    for package, least in LEAST.items():
        assert set(re.findall(rf'"{package}([<>=][^"]*)?"', written)) == {">=" + ".".join(map(str, least))}


def test_the_version_is_written_once():
    assert VERSION == sensibert.__version__
    written = files("sensibert", "*.py") | files("docs", "*.md", "*.py") | {"setup.py", "README.md", "mkdocs.yml"}
    again = [name for name in sorted(written) if f'"{VERSION}"' in (ROOT / name).read_text(encoding="utf-8")]
    assert not again
