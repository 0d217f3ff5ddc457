"""Compiles every kernel for every architecture we ship and fails on a warning or a register spill. Needs nvcc, no GPU.

python csrc/check_kernels.py [name ...]     (or `make kernels`); without nvcc it says so and succeeds
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "kernels"
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ["-std=c++20", "-O3", "--Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"]
USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) reg", re.S
)


def check(source: Path, architecture: str, folder: str) -> list[str]:
    """Complaints about one source for one architecture."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc(), *FLAGS, "-gencode", target, "-c", source, "-o", f"{folder}/{source.stem}.{architecture}.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        return [f"{source.name} sm_{architecture}: does not compile\n{log}"]
    kernels = [(name, int(stack), int(spill), int(registers)) for name, stack, spill, registers in USAGE.findall(log)]
    for name, stack, _, registers in kernels:
        print(f"{source.name:28} sm_{architecture:4} {registers:4} registers {stack:4} bytes of stack  {name}")
    return [f"{source.name} sm_{architecture}: {name} spills {spill} bytes" for name, _, spill, _ in kernels if spill]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def main(names: list[str]) -> int:
    if nvcc() is None:
        print("kernels: nvcc is not here, nothing was compiled")
        return 0
    sources = [s for s in sorted(KERNELS.glob("*.cu")) if not names or s.stem in names]
    # The wgmma sources exist for Hopper only; their first line says so.
    jobs = [(s, a) for s in sources for a in ARCHITECTURES if a == "90a" or "sm_90a only" not in s.open().readline()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [c for found in pool.map(lambda job: check(*job, folder), jobs) for c in found]
    print("\n".join(complaints) or f"kernels: {len(jobs)} compiled, no warning, no spill")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
