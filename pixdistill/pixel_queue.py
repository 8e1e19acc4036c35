"""A ring of teacher vectors that serve as negatives beyond the batch (PCD's memory queue)."""

import torch
from torch import Tensor, nn

from . import _checks
from ._distributed import broadcast, gather_rows, world_size
from ._labels import check_labels

# At or below this norm a vector has no direction: PCD's (and F.normalize's) epsilon.
MIN_NORM = 1e-12


def unit_vectors(vectors: Tensor) -> Tensor:
    """`vectors / |vectors|` over the last axis, in their dtype; zero where the norm is at most 1e-12.

    The norm is taken in float32 (float64 for float64). NaN and inf give NaN, and so does a vector
    whose squares overflow.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype)
    inverse = norm.masked_fill(norm <= MIN_NORM, torch.inf).reciprocal()
    return (vectors * inverse.masked_fill(norm == torch.inf, torch.nan)).to(vectors.dtype)


class PixelQueue(nn.Module):
    """The newest `size` unit vectors `[size, dim]`, as buffers `keys` and `ptr`.

    It starts as random unit vectors, as in PCD, so that the number of negatives is constant. The
    buffers are saved with `state_dict`. Enqueueing between forward and backward is safe: the loss
    keeps what its backward needs, and never a copy of the queue (only `backend="reference"` needs the
    keys again, and PyTorch then raises). Nothing synchronises with the host.

    Args:
        size: number of vectors, PCD: 65536.
        dim: their width.
        labels: keep a label per vector too, in the buffer `key_labels` `[size]` int32, -1 at the start.
            A negative label matches nothing.
        gather_distributed: enqueue the vectors of all ranks, in the order of the ranks, so that all
            ranks hold the same queue. The first enqueue takes rank 0's. All ranks must call.
        device, dtype: of `keys`. Under autocast on a GPU, the autocast dtype saves a conversion of
            the whole queue at each use.

    Raises:
        ValueError, TypeError: for a size or dim that is not an int of at least 1.

    Source: `_dequeue_and_enqueue` of the official `pcd/pcd.py`, without its limits: the size need
    not be a multiple of the batch, and the queue is not cloned at each use.
    """

    keys: Tensor
    ptr: Tensor
    key_labels: Tensor | None

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        labels: bool = False,
        gather_distributed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = _checks.integer("size", size)
        self.dim = _checks.integer("dim", dim)
        self.gather_distributed = _checks.flag("gather_distributed", gather_distributed)
        self._shared = False  # not saved: a resumed run takes rank 0's queue again
        if dtype is not None and dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}")
        self.register_buffer("keys", torch.empty(self.size, self.dim, device=device, dtype=dtype))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64, device=device))
        key_labels = None
        if _checks.flag("labels", labels):
            key_labels = torch.empty(self.size, dtype=torch.int32, device=device)
        self.register_buffer("key_labels", key_labels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill with random unit vectors from the global generator, without labels; the pointer is 0."""
        self.keys.copy_(unit_vectors(torch.randn_like(self.keys, dtype=torch.float32)))
        self.ptr.zero_()
        if self.key_labels is not None:
            self.key_labels.fill_(-1)
        self._shared = False

    @torch.no_grad()
    def share(self) -> None:
        """Take rank 0's queue, once, if this queue gathers; before that they start differently."""
        if self.gather_distributed and not self._shared and world_size() > 1:
            broadcast(*self.buffers())
            self._shared = True

    @torch.no_grad()
    def enqueue(self, vectors: Tensor, *, labels: Tensor | None = None) -> None:
        """Write the L2-normalised vectors `[n, dim]` at the pointer, over the oldest ones.

        A queue with labels takes those of the vectors, integers `[n]`, -1 for one without. Wraps at the
        end and keeps the newest `size` when n is larger. A row that is not finite, or has no direction,
        leaves its slot as it was; the pointer moves by n all the same.
        """
        _checks.floating("vectors", vectors)
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise ValueError(
                f"vectors must have shape [n, {self.dim}]; got {tuple(vectors.shape)}"
                + (". For a map, use enqueue_pooled." if vectors.dim() > 2 else "")
            )
        if vectors.device != self.keys.device:
            raise ValueError(
                f"vectors must be on the queue's device, {self.keys.device}; got {vectors.device}"
            )
        if (labels is None) != (self.key_labels is None):
            raise ValueError(
                "labels must be given to a queue that keeps them; got None. For vectors without, pass "
                "torch.full((n,), -1)."
                if labels is None
                else "labels must be None for a queue without; got some. Build it with labels=True."
            )
        if labels is not None:
            check_labels(labels, vectors.shape[:1], vectors)
            labels = labels.to(torch.int32)
        if self.gather_distributed and world_size() > 1:
            self.share()
            vectors, labels = gather_rows(vectors, labels)
        count = vectors.shape[0]
        skipped = max(0, count - self.size)
        newest = vectors[skipped:]
        start = self.ptr + skipped
        slots = (start + torch.arange(newest.shape[0], device=self.ptr.device)) % self.size
        unit = unit_vectors(newest).to(self.keys.dtype)
        usable = (unit.isfinite() & (unit != 0).any(dim=1, keepdim=True)).all(dim=1, keepdim=True)
        self.keys.index_copy_(0, slots, torch.where(usable, unit, self.keys[slots]))
        if labels is not None and self.key_labels is not None:
            kept = torch.where(usable[:, 0], labels[skipped:], self.key_labels[slots])
            self.key_labels.index_copy_(0, slots, kept)
        self.ptr.copy_((self.ptr + count) % self.size)

    def enqueue_pooled(self, teacher_map: Tensor, *, labels: Tensor | None = None) -> None:
        """PCD's update: average the map `[B, dim, *spatial]` over space and enqueue the B vectors.

        A queue with labels takes one per image, `[B]`.
        """
        _checks.map_nd("teacher_map", teacher_map, self.dim)
        dtype = torch.promote_types(teacher_map.dtype, torch.float32)
        self.enqueue(teacher_map.detach().flatten(2).mean(dim=2, dtype=dtype), labels=labels)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        gathers = ", gather_distributed=True" if self.gather_distributed else ""
        labels = "" if self.key_labels is None else ", labels=True"
        return f"size={self.size}, dim={self.dim}{labels}{gathers}"
