"""Looks into the machine code of the Hopper kernels: all multiply with HGMMA, and none waits after each product.

    python csrc/check_sass.py     needs nvcc and cuobjdump (CUDA's, or the one inside the pip package triton); without
                                  them it says so and succeeds. No GPU.
ptxas serializes the wgmmas of a kernel it cannot follow, with no more than an information line (C7510 to C7520): here
that fails.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "kernels"
HOPPER_ONLY = "sm_90a only"
EMPTY = "WARPGROUP.DEPBAR.LE gsb0, 0x0"  # waits until no product is left


def tool(name: str) -> str | None:
    """nvcc or cuobjdump: from the PATH, CUDA_HOME, or (cuobjdump) inside triton, which need not be importable."""
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    places += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(name, path=os.pathsep.join(places))


def complaints(source: Path, nvcc: str, cuobjdump: str, folder: str) -> list[str]:
    target, flags = f"{folder}/{source.stem}.o", ["-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a"]
    built = subprocess.run([nvcc, *flags, "-Xptxas", "-v", "-c", source, "-o", target], capture_output=True, text=True)
    if built.returncode:
        return [f"{source.name}: does not compile\n{built.stderr}"]
    log = built.stdout + built.stderr
    found = [f"{source.name}: {line[:160]}" for line in log.splitlines() if re.search(r"\(C75[12]\d\)", line)]
    wanted = ["HGMMA", "UTMALDG"] + ["UTMASTG"] * ("store_box(" in source.read_text())  # not all store by TMA
    sass = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, check=True).stdout
    for kernel in sass.split("Function : ")[1:]:
        name = kernel.split(None, 1)[0]
        counts = {word: len(re.findall(rf"\b{word}", kernel)) for word in ("HGMMA", "UTMALDG", "UTMASTG", EMPTY)}
        print(f"{source.name}  " + "  ".join(f"{word} {count}" for word, count in counts.items()) + f"  {name[-70:]}")
        found += [f"{name}: no {word}" for word in wanted if not counts[word]]
        if counts[EMPTY] >= counts["HGMMA"]:
            found.append(f"{name}: waits after each of its {counts['HGMMA']} products")
    return found


def main() -> int:
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        print(f"sass: {'nvcc' if nvcc is None else 'cuobjdump'} is not here, nothing was checked")
        return 0
    sources = [s for s in sorted(KERNELS.glob("*.cu")) if HOPPER_ONLY in s.open().readline()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [c for cs in pool.map(lambda s: complaints(s, nvcc, cuobjdump, folder), sources) for c in cs]
    print("\n".join(found) or f"sass: {len(sources)} sources, HGMMA and TMA in every kernel, none serialized")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
