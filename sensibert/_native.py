"""Loads the compiled kernels, `sensibert._C`, once, or records why they are not available.

Importing `_C` registers the CUDA kernels under the op names. No other module checks whether it is available.
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
        _why_not = "not built (at install time there was no CUDA toolkit or no CUDA build of torch)"
    except ImportError as error:  # built, but for another torch, Python or C++ library
        _why_not = f"built, but cannot be loaded: {str(error).splitlines()[0]}"

available: bool = module is not None


def status() -> str:
    """One sentence: which kernels were loaded, for which GPUs, or why the PyTorch reference is used instead."""
    if module is None:
        return f"native kernels: none, {_why_not}; the PyTorch reference serves every op"
    info = module.build_info()
    return f"native kernels: CUDA {info['cuda']} for {', '.join(info['architectures'])} ({info['compiler']})"


if torch.version.cuda and torch.cuda.device_count() and module is None:
    logging.getLogger("sensibert").warning(status())  # once per process, and only where there is a GPU
