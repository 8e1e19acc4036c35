"""With which tiles the kernels of `row_lse` are launched: plain tables, no Triton needed.

On sm_90 the tiles were measured (an H200, bfloat16); on sm_80 and others they are unmeasured, chosen by
what the compiler reports. None spills in a loop (`python -m benchmarks kernels`).
"""

import functools
import importlib.metadata
import os
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """Rows of a tile of queries and of keys, warps, pipeline stages, programs per multiprocessor."""

    BN: int
    BM: int
    warps: int
    stages: int
    resident: int
    masked: int = 32
    """Rows of a tile of keys where a mask is read with it, which needs more registers."""
    labelled: int = 32
    """The same where labels are compared."""


# By architecture and padded width. The sm_80 tables fit the smaller shared memory of sm_86, sm_89 and
# sm_120; sm_90 serves Hopper and data-centre Blackwell.
LAUNCH = {
    "sm_90": {
        64: Launch(64, 64, 4, 3, resident=4, masked=64, labelled=64),
        128: Launch(64, 128, 4, 3, resident=2, masked=128, labelled=64),
        256: Launch(64, 64, 4, 2, resident=2),
    },
    "sm_80": {
        64: Launch(128, 64, 4, 3, resident=2),
        128: Launch(128, 64, 8, 3, resident=1, masked=64),
        256: Launch(64, 64, 8, 2, resident=1),
    },
}
FLOAT32_LAUNCH = {
    "sm_90": {
        64: Launch(64, 64, 4, 2, resident=3, masked=64, labelled=64),
        128: Launch(64, 32, 4, 2, resident=2),
    },
    "sm_80": {
        64: Launch(64, 64, 4, 2, resident=2, masked=64),
        128: Launch(32, 64, 4, 2, resident=2, masked=64),
    },
}
GRAD_KEYS_LAUNCH = {
    64: Launch(32, 64, 4, 2, resident=2),
    128: Launch(32, 64, 8, 2, resident=1),
    256: Launch(32, 64, 8, 2, resident=1),
}
# Of hopper.py, measured: the stages are the slots of its ring.
HOPPER_LAUNCH = {
    64: Launch(128, 128, 12, 4, resident=1),
    128: Launch(128, 128, 12, 4, resident=1),
    256: Launch(128, 64, 12, 4, resident=1),
}
JOIN_ELEMENTS = 4096  # of a tile of weighted keys, when splits are joined
MOST_SPLITS = 64
HOPPER_TRITON = (3, 6)  # the oldest Triton whose Gluon compiles hopper.py
SPILLING_TRITON = (3, 8)  # from here on hopper.py spills at widths 65 to 128
TILES_PER_SPLIT = 8  # at least: a shorter split costs more to join than it saves


def launch_of(device: torch.device, dtype: torch.dtype, width: int, hopper: bool = False) -> Launch:
    """The tile of the forward kernel, for a padded width."""
    if hopper:
        return HOPPER_LAUNCH[width]
    table = FLOAT32_LAUNCH if dtype == torch.float32 else LAUNCH
    architecture = "sm_90" if _capability(device)[0] in (9, 10) else "sm_80"
    return table[architecture][max(64, width)]


def why_not_hopper(
    query: Tensor,
    keys: Tensor,
    key_mask: Tensor | None,
    scale: float | Tensor,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    subtract_max: bool,
    with_weighted_keys: bool,
    with_max: bool,
) -> str | None:
    """The reason why the kernel for Hopper does not take this call, or None: then it is faster.

    `PIXDISTILL_HOPPER=0` in the environment keeps to the portable kernel.
    """
    if os.environ.get("PIXDISTILL_HOPPER") == "0":
        return "PIXDISTILL_HOPPER=0"
    if not _is_hopper(query.device):
        return "it needs a Hopper GPU"
    if _triton_version() < HOPPER_TRITON:
        return f"it needs triton {HOPPER_TRITON[0]}.{HOPPER_TRITON[1]} or later"
    if _triton_version() >= SPILLING_TRITON and padded_width(query.shape[2]) == 128:
        return "this version of triton spills its registers at this width"
    if query.dtype not in (torch.float16, torch.bfloat16) or keys.dtype != query.dtype:
        return "query and keys must both be float16 or both bfloat16"
    if key_mask is not None or labels is not None or isinstance(scale, Tensor):
        return "it takes no mask of keys, no labels and no learned scale"
    if subtract_max or with_max or not with_weighted_keys:
        return "it subtracts no maximum, returns none, and always computes the gradient"
    if not 32 < query.shape[2] <= 256 or keys.shape[1] == 0:
        return "features must be 33 to 256 wide, and there must be a key"
    for x in (query, keys):  # what the TMA unit reads: rows at multiples of 16 bytes
        together = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        if x.stride(2) != 1 or x.stride(1) % 8 or x.data_ptr() % 16 or not together:
            return "rows must begin at multiples of 16 bytes"
    return None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    return tuple(int(number) for number in importlib.metadata.version("triton").split(".")[:2])


def padded_width(width: int) -> int:
    """The feature width of the tiles: the next power of two that a matrix unit takes."""
    return max(16, 1 << (width - 1).bit_length())


def splits_of(
    programs: int, tiles: int, launch: Launch, device: torch.device, splits: int | None = None
) -> tuple[int, int]:
    """Splits of the streamed axis and tiles per split, so that programs fill whole waves of the GPU."""
    if splits is None:
        splits = _best_splits(programs, tiles, _multiprocessors(device) * launch.resident)
    per_split = _cdiv(max(1, tiles), splits)
    return _cdiv(max(1, tiles), per_split), per_split


@functools.lru_cache(maxsize=4096)
def _best_splits(programs: int, tiles: int, slots: int) -> int:
    """Each further split has to gain the one percent that it costs to join."""
    best, best_filled = 1, 0.0
    for splits in range(1, min(MOST_SPLITS, max(1, tiles // TILES_PER_SPLIT)) + 1):
        steps = _cdiv(programs * splits, slots) * _cdiv(tiles, splits)
        filled = programs * tiles / max(1, steps * slots)
        if filled > best_filled * (1 + 0.01 * (splits - best)):
            best, best_filled = splits, filled
    return best


def _multiprocessors(device: torch.device) -> int:
    """Their number; 1 under the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; Hopper's for the interpreter, which takes any tile."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and _capability(device) == (9, 0)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
