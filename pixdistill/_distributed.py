"""Frozen rows of all ranks, gathered at once or passed around a ring (torch.distributed underneath).

Rows need no gradient, so a plain gather is exact. Ranks may hold different numbers of rows, including
zero: rows are padded to the longest rank, and a mask marks the padding. Where the process group is
not initialised, or has one process, nothing is communicated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Block(NamedTuple):
    """Keys of one rank or of several, as `row_lse` takes them."""

    keys: Tensor
    """`[M, D]`"""
    mask: Tensor | None
    """`[M]` bool, True = the key counts; None if all do."""
    exclude_offset: int | None
    """Key `n + exclude_offset` is the positive of this rank's row n; None if it is not in the block."""
    labels: Tensor | None
    """`[M]`, the labels of the keys, if they have some."""


def world_size() -> int:
    """Number of ranks; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def gathered_block(
    keys: Tensor, mask: Tensor | None, labels: Tensor | None = None
) -> Iterator[Block]:
    """One block with the keys of all ranks: W times the rows of the longest rank."""
    sizes, masked = gather_sizes(keys, mask, labels)
    keys, *others = _pad(keys, mask, labels, max(sizes), masked)
    mask, labels = (None if x is None else _all_gather(x) for x in others)
    yield Block(_all_gather(keys), mask, dist.get_rank() * max(sizes), labels)


@torch.no_grad()
def ring_blocks(keys: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Iterator[Block]:
    """This rank's own keys, then those of the ranks before it, one after the other.

    While a block is used, the next one is on its way: at most two are in memory. A block is
    overwritten after the next one. Every rank has to exhaust the iterator.
    """
    sizes, masked = gather_sizes(keys, mask, labels)
    send_buf = [x for x in _pad(keys, mask, labels, max(sizes), masked) if x is not None]
    rank, world = dist.get_rank(), len(sizes)
    # Each buffer is received into later on, and the caller's rows must stay as they are.
    if max(sizes) == keys.shape[0]:
        send_buf = [x.clone(memory_format=torch.contiguous_format) for x in send_buf]
    recv_buf = [torch.empty_like(sent) for sent in send_buf]
    for step in range(world):
        works: list[dist.Work] = []
        if step < world - 1:
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, sent, (rank + 1) % world) for sent in send_buf]
                + [dist.P2POp(dist.irecv, received, (rank - 1) % world) for received in recv_buf]
            )
        yield Block(
            send_buf[0],
            send_buf[1] if masked else None,
            0 if step == 0 else None,
            None if labels is None else send_buf[-1],
        )
        for work in works:
            work.wait()
        send_buf, recv_buf = recv_buf, send_buf


@torch.no_grad()
def gather_rows(rows: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows `[n, D]` and labels `[n]` of all ranks, in the order of the ranks: the same on every one."""
    sizes, _ = gather_sizes(rows, None, labels)
    if not max(sizes):
        return rows, labels
    padded, _, padded_labels = _pad(rows, None, labels, max(sizes), masked=False)
    labels = None if padded_labels is None else _without_padding(padded_labels, sizes)
    return _without_padding(padded, sizes), labels


def _without_padding(padded: Tensor, sizes: list[int]) -> Tensor:
    blocks = _all_gather(padded).split(max(sizes))
    return torch.cat([block[:n] for block, n in zip(blocks, sizes, strict=True)])


def broadcast(*tensors: Tensor) -> None:
    """Copy rank 0's values to all ranks, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, 0)


@torch.no_grad()
def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks; the argument stays as it is."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def gather_sizes(
    rows: Tensor, mask: Tensor | None, labels: Tensor | None = None
) -> tuple[list[int], bool]:
    """The number of rows of every rank, and whether any rank needs a mask.

    Sizes of tensors live on the host, so these integers travel between hosts: over gloo where the
    process group has it (as by default), otherwise over the device, which synchronises once.
    """
    backends = dist.get_backend_config() if hasattr(dist, "get_backend_config") else ""
    device = torch.device("cpu") if "cpu" in backends else rows.device
    own = [rows.shape[0], mask is not None, rows.shape[1], _DTYPES.index(rows.dtype)]
    own.append(labels is not None)
    table = _all_gather(torch.tensor([own], dtype=torch.int64, device=device)).tolist()
    sizes, masked, widths, dtypes, labelled = zip(*table, strict=True)
    if len(set(widths)) > 1 or len(set(dtypes)) > 1:
        raise ValueError(
            "the ranks' keys must have one width and dtype; "
            f"got {[(w, str(_DTYPES[d])) for w, d in zip(widths, dtypes, strict=True)]}"
        )
    if len(set(labelled)) > 1:
        ranks = [rank for rank, given in enumerate(labelled) if given]
        raise ValueError(f"labels must be given on all ranks or on none; got some on ranks {ranks}")
    return list(sizes), any(masked) or len(set(sizes)) > 1


def _pad(
    rows: Tensor, mask: Tensor | None, labels: Tensor | None, length: int, masked: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    missing = length - rows.shape[0]
    if masked and mask is None:
        mask = rows.new_ones(rows.shape[0], dtype=torch.bool)
    if missing:
        rows = F.pad(rows, (0, 0, 0, missing))
        mask = None if mask is None else F.pad(mask, (0, missing))
        labels = None if labels is None else F.pad(labels, (0, missing), value=-1)
    return rows, mask, labels


def _all_gather(rows: Tensor) -> Tensor:
    output = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    # torch 2.13 renamed it, and warns at each call by the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, rows.contiguous())
    return output
