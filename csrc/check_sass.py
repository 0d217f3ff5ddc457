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
BITS, MOST_MASK_WORK = "masked_linear_bits", 1.5  # its weights pass through registers, with no more instructions each
EMPTY = "WARPGROUP.DEPBAR.LE gsb0, 0x0"  # waits until no product is left


def tool(name: str) -> str | None:
    """nvcc or cuobjdump: from the PATH, CUDA_HOME, or (cuobjdump) inside triton, which need not be importable."""
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    places += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(name, path=os.pathsep.join(places))


def mask_instructions(kernel: str) -> float | None:
    """How many instructions a weight goes through between shared memory and the product that reads it from registers,
    those on its bits included, in the loop around the products. None where products read shared memory only."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", kernel)]
    products = {at: int(m[1]) for at, text in lines if (m := re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", text))}
    if not products:
        return None
    jumps = (re.search(r"BRA 0x([0-9a-f]+)", text) for at, text in lines if at > max(products))
    start = int(next(filter(None, jumps))[1], 16)
    wanted, count = set(), 0  # registers that the products ahead depend on; backwards from the last
    for at, text in reversed([line for line in lines if start <= line[0] <= max(products)]):
        if at in products:
            wanted |= set(range(products[at], products[at] + 4))
            continue
        target = re.match(r"(?:@!?U?P\d+ )?(\S+) R(\d+)", text)
        if target is None or int(target[2]) not in wanted:
            continue
        if target[1].startswith("LDS"):
            wanted -= set(range(int(target[2]), int(target[2]) + (4 if target[1].startswith("LDSM") else 2)))
        else:
            wanted = wanted - {int(target[2])} | {int(r) for r in re.findall(r"\bR(\d+)", text[target.end() :])}
            count += 1
    return count / (8 * len(products))


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
        mask = mask_instructions(kernel)
        counts |= {} if mask is None else {"instructions a weight": mask}
        print(f"{source.name}  " + "  ".join(f"{word} {count}" for word, count in counts.items()) + f"  {name[-70:]}")
        found += [f"{name}: no {word}" for word in wanted if not counts[word]]
        if counts[EMPTY] >= counts["HGMMA"]:
            found.append(f"{name}: waits after each of its {counts['HGMMA']} products")
        if BITS in source.name and not (mask and mask <= MOST_MASK_WORK):
            found.append(f"{name}: {mask} instructions a weight on the way to a product from registers")
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
