"""Where Triton kernels run: a pure predicate, so that choosing a backend catches no exception."""

import functools
import importlib.util
import os

import torch


def why_no_kernel(device: torch.device) -> str | None:
    """The reason why no Triton kernel runs on this device, or None."""
    if not has_triton():
        return "the package triton is not installed"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it runs on CUDA (or under TRITON_INTERPRET=1), not on {device.type}"
    if torch.version.hip is not None:
        return "it has not been validated on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed; it is not loaded."""
    return importlib.util.find_spec("triton") is not None
