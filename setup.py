"""Builds sensibert._C as far as this machine goes, and never fails an install over it:
with CUDA where nvcc and a CUDA build of torch of the same major version are present, else the host solver alone, else
nothing. `sensibert._native.status()` says which. SENSIBERT_CUDA_ARCHS="80;90a" builds for fewer cards, "" for none."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = re.findall(r"\w+", os.environ.get("SENSIBERT_CUDA_ARCHS", "80;90a;100"))
HOST_SOURCES = ["csrc/torch/module.cpp", "csrc/host/solver.cpp"]
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]


def say(sentence: str) -> None:
    print(f"sensibert: {sentence}", file=sys.stderr)


def commit() -> str:
    try:
        command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cuda_home() -> Path | None:
    """The toolkit: with its compiler and its headers, which a bare nvcc on the path may lack."""
    on_path = Path(shutil.which("nvcc") or "").resolve().parents
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [*(Path(home) for home in named if home), *on_path[1:2], Path("/usr/local/cuda")]
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), None)


def cuda_version() -> str | None:
    """The version of nvcc if `_C` can be built with CUDA here; otherwise None, and the reason has been said."""
    if not ARCHITECTURES:
        return say("SENSIBERT_CUDA_ARCHS is empty, so no CUDA kernels")
    try:
        import torch
    except ImportError:
        return say(
            "no torch while building, so no CUDA kernels (pip install --no-build-isolation finds an installed one)"
        )
    if torch.version.cuda is None:
        return say("this torch is a CPU build, so no CUDA kernels")
    home = cuda_home()
    if home is None:
        return say("no CUDA toolkit, so no CUDA kernels")
    command = [home / "bin/nvcc", "--version"]
    found = re.search(r"release (\d+\.\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
    if not found or found[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return say(f"nvcc is {found and found[1]}, torch is for CUDA {torch.version.cuda}, so no CUDA kernels")
    os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it when it is imported
    return found[1]


def host_extension() -> Extension:
    import pybind11

    flags = [*CXX_FLAGS, f'-DSENSIBERT_COMMIT="{commit()}"']
    return Extension(
        "sensibert._C", HOST_SOURCES, include_dirs=[pybind11.get_include()], extra_compile_args=flags, language="c++"
    )


def cuda_extension(version: str) -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "kernels").glob("*.cu"))
    bindings = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "torch").glob("*.cpp"))
    extension = host_extension()
    extension.sources = [*HOST_SOURCES, *(b for b in bindings if b not in HOST_SOURCES), *kernels]
    extension.include_dirs += include_paths("cuda")
    extension.library_dirs = library_paths("cuda")
    # The runtime is linked in, so that the same file serves a torch that brings another one. No libc10: its ABI moves.
    extension.libraries = ["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    stable = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unknown-pragmas"]
    built = [
        f'-DSENSIBERT_CUDA="{version}"',
        f'-DSENSIBERT_ARCHITECTURES="{" ".join("sm_" + a for a in ARCHITECTURES)}"',
    ]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    for oldest in sorted(filter(str.isdigit, ARCHITECTURES), key=int)[
        :1
    ]:  # for cards that are not named, or not yet made
        codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    extension.extra_compile_args = {
        "cxx": [*extension.extra_compile_args, *stable, *built],
        "nvcc": ["-std=c++20", "-O3", "-cudart=static", *codes],
    }
    return extension


def hopper_only(source: str) -> bool:
    return source.endswith(".cu") and "sm_90a only" in (ROOT / source).open().readline()


class BuildHost(build_ext):
    """The host solver; a failure costs speed, not the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # whatever stopped the compiler, the package works without
            say(f"the host solver was not built ({type(error).__name__}: {error}); everything works without it, slower")
            self.extensions = []


def build_command(version: str | None):
    if version is None:
        return BuildHost
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension

    class BuildCuda(BuildExtension):
        """The CUDA extension by ninja; the host one where that fails."""

        def build_extension(self, extension):
            # BuildExtension has one list of architectures for all sources, the wgmma sources know only Hopper.
            folder = Path(self.build_temp).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            for source in [s for s in extension.sources if hopper_only(s)]:
                extension.sources.remove(source)
                if "90a" in ARCHITECTURES:
                    target = folder / f"{Path(source).stem}.o"
                    code = "-gencode=arch=compute_90a,code=sm_90a"
                    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", code, "-c", source, "-o", str(target)]
                    say(shlex.join(command := [f"{CUDA_HOME}/bin/nvcc", *flags]))
                    subprocess.run(command, check=True)
                    extension.extra_objects.append(str(target))
            super().build_extension(extension)

        def run(self):
            try:
                super().run()
            except Exception as error:
                say(f"the CUDA kernels were not built ({type(error).__name__}: {error})")
                self.distribution.ext_modules[:] = self.extensions = [host_extension()]
                BuildHost.run(self)

    return BuildCuda


def main() -> None:
    try:
        version = cuda_version()
        extension = cuda_extension(version) if version else host_extension()
    except ImportError as missing:  # no pybind11
        say(f"{missing}, so nothing is compiled; everything works without, slower")
        return setup()
    extension.optional = True  # an editable install then does without the file if it was not built
    setup(ext_modules=[extension], cmdclass={"build_ext": build_command(version)})


main()
