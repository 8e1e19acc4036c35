"""Frozen rows of all ranks, gathered at once or passed around a ring (torch.distributed underneath).

Rows need no gradient, so a plain gather is exact. Ranks may hold different numbers of rows, none too:
rows are padded to the longest rank, and a mask tells the padding apart. Where the process group is
not initialised, or has one process, nothing is communicated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Keys of one rank or of several, as `row_lse` takes them."""

    keys: Tensor
    """`[M, D]`"""
    mask: Tensor | None
    """`[M]` bool, True = the key counts; None if all do."""
    exclude_offset: int | None
    """Key `n + exclude_offset` is the positive of this rank's row n; None if it is not here."""


def world_size() -> int:
    """Number of ranks; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_blocks(keys: Tensor, mask: Tensor | None) -> Block:
    """The keys of all ranks in one block, of W times the longest rank's size."""
    lengths, masked = _agree(keys, mask)
    keys, mask = _pad(keys, mask, max(lengths), masked)
    offset = dist.get_rank() * max(lengths)
    return Block(_all_gather(keys), None if mask is None else _all_gather(mask), offset)


@torch.no_grad()
def ring_blocks(keys: Tensor, mask: Tensor | None) -> Iterator[Block]:
    """This rank's own keys, then those of the ranks before it, one after the other.

    While a block is used, the next is already on its way: never more than two are in memory. Every
    rank has to exhaust the iterator.
    """
    lengths, masked = _agree(keys, mask)
    keys, mask = _pad(keys, mask, max(lengths), masked)
    rank, world = dist.get_rank(), len(lengths)
    here, there = (
        [keys.contiguous()],
        [torch.empty_like(keys, memory_format=torch.contiguous_format)],
    )
    if mask is not None:
        here.append(mask.contiguous())
        there.append(torch.empty_like(mask))
    for step in range(world):
        works: list[dist.Work] = []
        if step < world - 1:
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, sent, (rank + 1) % world) for sent in here]
                + [dist.P2POp(dist.irecv, came, (rank - 1) % world) for came in there]
            )
        yield Block(here[0], here[1] if masked else None, 0 if step == 0 else None)
        for work in works:
            work.wait()
        here, there = there, here


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """The rows `[n, D]` of all ranks in the order of the ranks, the same on every rank."""
    lengths, _ = _agree(rows, None)
    padded, _ = _pad(rows, None, max(lengths), masked=False)
    if not max(lengths):
        return rows
    blocks = _all_gather(padded).split(max(lengths))
    return torch.cat([block[:n] for block, n in zip(blocks, lengths, strict=True)])


def broadcast(*tensors: Tensor) -> None:
    """Give all ranks rank 0's numbers, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, 0)


@torch.no_grad()
def total(count: Tensor) -> Tensor:
    """The sum of a number over all ranks."""
    count = count.clone()
    dist.all_reduce(count)
    return count


def _agree(rows: Tensor, mask: Tensor | None) -> tuple[list[int], bool]:
    """Every rank's number of rows, and whether any rank has something to mask.

    Sizes of tensors live on the host, so the numbers travel there: over gloo where the process group
    has it (as by default), otherwise over the device, which waits for it once.
    """
    backends = dist.get_backend_config() if hasattr(dist, "get_backend_config") else ""
    device = torch.device("cpu") if "cpu" in backends else rows.device
    own = [rows.shape[0], int(mask is not None), rows.shape[1], _DTYPES.index(rows.dtype)]
    table = _all_gather(torch.tensor([own], dtype=torch.int64, device=device)).tolist()
    lengths, masked, widths, dtypes = zip(*table, strict=True)
    if len(set(widths)) > 1 or len(set(dtypes)) > 1:
        raise ValueError(
            "the ranks' keys must have one width and dtype; "
            f"got {[(w, str(_DTYPES[d])) for w, d in zip(widths, dtypes, strict=True)]}"
        )
    return list(lengths), any(masked) or len(set(lengths)) > 1


_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _pad(
    rows: Tensor, mask: Tensor | None, length: int, masked: bool
) -> tuple[Tensor, Tensor | None]:
    missing = length - rows.shape[0]
    if masked:
        mask = rows.new_ones(rows.shape[0], dtype=torch.bool) if mask is None else mask
        mask = F.pad(mask, (0, missing))
    return F.pad(rows, (0, 0, 0, missing)), mask


def _all_gather(rows: Tensor) -> Tensor:
    everyone = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    # torch 2.13 renamed it, and warns at each call by the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, rows.contiguous())
    return everyone
