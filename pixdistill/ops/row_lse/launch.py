"""With which tiles the kernels of `row_lse` are launched: plain tables, no Triton needed."""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Tile of queries BN, tile of keys BM, warps, pipeline stages."""

    BN: int
    BM: int
    warps: int
    stages: int


# By architecture and padded width. `python -m benchmarks kernels` compiles every entry: no spills, and
# the sm_80 table fits the smaller shared memory of sm_86, sm_89 and sm_120.
LAUNCH_TABLE = {
    "sm_90": {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 3), 256: Launch(128, 64, 8, 2)},
    "sm_80": {64: Launch(128, 64, 8, 3), 128: Launch(128, 32, 8, 3), 256: Launch(64, 64, 8, 2)},
}
WITH_MAX_LAUNCH = {("sm_90", 256): Launch(128, 32, 8, 3)}  # where one more statistic would spill
FLOAT32_LAUNCH = {64: Launch(64, 64, 4, 2), 128: Launch(64, 32, 8, 2)}
GRAD_KEYS_LAUNCH = {64: Launch(32, 64, 4, 2), 128: Launch(32, 64, 8, 2), 256: Launch(32, 64, 8, 2)}


def padded_width(width: int) -> int:
    """The feature width of the tiles: the next power of two that a matrix unit takes."""
    return max(16, 1 << (width - 1).bit_length())


def launch_of(architecture: str, dtype: torch.dtype, width: int, with_max: bool) -> Launch:
    """The entry of the launch table: sm_90 for Hopper and data-centre Blackwell, sm_80 for others."""
    bucket = max(64, padded_width(width))
    if dtype == torch.float32:
        return FLOAT32_LAUNCH[bucket]
    table = "sm_90" if architecture in ("sm_90", "sm_100", "sm_103") else "sm_80"
    usual = LAUNCH_TABLE[table][bucket]
    return WITH_MAX_LAUNCH.get((table, bucket), usual) if with_max else usual


def architecture_of(device: torch.device) -> str:
    """The name of a device's architecture; for the interpreter, which takes any, Hopper's."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def split(programs: int, tiles: int, device: torch.device, splits: int | None) -> tuple[int, int]:
    """Shares of the streamed axis, and tiles a share, that give each multiprocessor two programs."""
    if splits is None:
        multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else 1
        )
        splits = _cdiv(2 * multiprocessors, max(1, programs))
    per_split = _cdiv(max(1, tiles), max(1, splits))
    return _cdiv(max(1, tiles), per_split), per_split


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
