"""The compiled half, if there is one: loads `sensibert._C` once, or remembers in a sentence why not.

Importing `_C` registers the CUDA kernels under the op names; nothing else in the package asks whether it is there.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch  # before `_C`: brings the libraries that a CUDA build links to

module: ModuleType | None = None
_why_not = ""

if os.environ.get("SENSIBERT_NO_NATIVE", "") not in ("", "0"):
    _why_not = "hidden by SENSIBERT_NO_NATIVE"
else:
    try:
        module = importlib.import_module("sensibert._C")
    except ModuleNotFoundError:
        _why_not = "not built (pip install found no compiler, or the package runs from its sources)"
    except ImportError as error:  # built, but for another torch, Python or C++ library
        _why_not = f"built, but cannot be loaded: {str(error).splitlines()[0]}"

available: bool = module is not None


def status() -> str:
    """One sentence: what was loaded and for which cards, or why the Python reference serves every call."""
    if module is None:
        return f"native kernels: none, {_why_not}; the PyTorch reference serves every op"
    info = module.build_info()
    if not info["architectures"]:
        return f"native kernels: host solver only ({info['compiler']}); the PyTorch reference serves every op"
    return f"native kernels: CUDA {info['cuda']} for {', '.join(info['architectures'])} ({info['compiler']})"


if torch.version.cuda and torch.cuda.device_count() and not (module and module.build_info()["architectures"]):
    logging.getLogger("sensibert").warning(status())  # once a process, and only where a card waits for kernels
