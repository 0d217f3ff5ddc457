"""Builds sensibert._C, the CUDA kernels, where nvcc and a CUDA build of torch of the same major version are present.

Elsewhere nothing is compiled and the wheel is pure Python; a build that fails never stops an install.
`sensibert._native.status()` says which. SENSIBERT_CUDA_ARCHS="80;90a" builds for fewer GPUs, "" for none."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = re.findall(r"\w+", os.environ.get("SENSIBERT_CUDA_ARCHS", "80;90a;100"))
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
    """The version of nvcc if `_C` can be built with CUDA here; otherwise None, and the reason is printed."""
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
    release = re.search(r"release (\d+\.\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
    if not release or release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return say(f"nvcc is {release and release[1]}, torch is for CUDA {torch.version.cuda}, so no CUDA kernels")
    os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it when it is imported
    return release[1]


def cuda_extension(version: str) -> Extension:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "kernels").glob("*.cu"))
    bindings = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "torch").glob("*.cpp"))
    stable = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unknown-pragmas"]
    built = [
        f'-DSENSIBERT_COMMIT="{commit()}"',
        f'-DSENSIBERT_CUDA="{version}"',
        f'-DSENSIBERT_ARCHITECTURES="{" ".join("sm_" + a for a in ARCHITECTURES)}"',
    ]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    oldest = min(filter(str.isdigit, ARCHITECTURES), key=int, default=None)
    if oldest:  # for GPUs that are not named, or not yet made
        codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    return Extension(
        "sensibert._C",
        [*bindings, *kernels],
        include_dirs=[pybind11.get_include(), *include_paths("cuda")],
        library_dirs=library_paths("cuda"),
        # The runtime is linked in, so that the same file serves a torch that brings another one. No libc10: its ABI
        # moves.
        libraries=["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *stable, *built],
            "nvcc": ["-std=c++20", "-O3", "-cudart=static", *codes],
        },
        language="c++",
        optional=True,  # an editable install then does without the file if it was not built
    )


def hopper_only(source: str) -> bool:
    return source.endswith(".cu") and "sm_90a only" in (ROOT / source).open().readline()


def build_command():
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension

    class BuildCuda(BuildExtension):
        """The CUDA extension by ninja; where that fails, no extension."""

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
            except Exception as error:  # whatever stopped the compiler, the package works without
                say(f"the CUDA kernels were not built ({type(error).__name__}: {error}); everything works without them")
                self.distribution.ext_modules[:] = self.extensions = []

    return BuildCuda


def main() -> None:
    version = cuda_version()
    if version is None:
        return setup()
    try:
        extension = cuda_extension(version)
    except ImportError as missing:  # no pybind11
        say(f"{missing}, so no CUDA kernels")
        return setup()
    setup(ext_modules=[extension], cmdclass={"build_ext": build_command()})


main()
