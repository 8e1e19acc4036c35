"""Pixel-to-pixel contrastive distillation (PCD, ICCV 2023, arXiv 2211.00218).

Every pixel of the student's map should be closer to the teacher's pixel at the same place than to
other teacher pixels, the negatives. With unit vectors s_i (student) and t_j (teacher), the negatives
n of pixel i, and the temperature tau,

    loss_i = -log( exp(<s_i,t_i>/tau) / (exp(<s_i,t_i>/tau) + sum_n exp(<s_i,n>/tau)) )
           = softplus( logsumexp_n(<s_i,n>/tau) - <s_i,t_i>/tau ).

Only the log-sum-exp is expensive, and `ops.row_lse` makes it in one pass, with its gradient and
without an N x N matrix. What stands here is plain PyTorch on vectors of N numbers.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import _checks
from ._distributed import all_blocks, ring_blocks, total, world_size
from .ops.backend import BACKENDS, detached, operand_dtype
from .ops.joined_row_lse import joined_row_lse
from .ops.row_lse import row_lse_and_max
from .pixel_queue import PixelQueue, unit_vectors

REDUCTIONS = ("mean", "sum", "none")
NEGATIVES = ("batch", "image", "queue")
GATHER_MODES = ("all", "ring")


class PixelContrastComponents(NamedTuple):
    """A loss to differentiate, and two numbers to log, which are of all ranks where these gather."""

    loss: Tensor
    """The loss that `forward` returns."""
    accuracy: Tensor
    """Share of valid pixels whose positive no negative exceeds (ties to 1e-5 count for it)."""
    positive_similarity: Tensor
    """Mean of <s_i, t_i> over the valid pixels, a cosine in [-1, 1] when vectors are normalised."""


def pixel_contrast_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    in_batch: bool = True,
    queue_keys: Tensor | None = None,
    valid_mask: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE of student vectors against frozen teacher vectors, without an N x N matrix.

    For two matrices, in-batch negatives and the mean, it equals
    `F.cross_entropy(F.normalize(student) @ F.normalize(teacher).T / temperature, torch.arange(N))`.

    Args:
        student: `[..., N, D]`. Vectors of different batch entries never meet.
        teacher: the positives, of the student's shape; detached.
        temperature: tau > 0; a tensor of one element may carry a gradient.
        in_batch: the other teacher rows of the same batch entry are negatives.
        queue_keys: `[K, D]`, further negatives for every row; detached. With `normalize` they must
            be unit vectors already, as `PixelQueue.keys` are: they are not copied.
        valid_mask: `[..., N]` bool. A row that is False is neither an anchor nor a negative.
        normalize: divide by the L2 norm first. A vector of norm <= 1e-12 counts as zero, with zero
            gradient.
        reduction: "mean" over valid rows, "sum", or "none" for `[..., N]` with 0 at invalid rows.
        backend: as in `ops.row_lse`.

    Returns:
        A scalar, or `[..., N]`: float64 for float64 input and float32 otherwise. Zero, and still
        attached to the graph, when nothing is valid or there is no negative.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Source: equation of the loss in PCD and its official `pcd/pcd.py`, from which it departs only in
    that a zero vector has zero gradient here and that negatives are a free choice.
    """
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.flag("in_batch", in_batch)
    _checks.flag("normalize", normalize)
    terms = _contrast(
        student, teacher, temperature, in_batch, queue_keys, valid_mask, normalize, backend, False
    )
    return _reduce(terms.loss, valid_mask, reduction)


class PixelContrastLoss(nn.Module):
    """Contrast of student pixels against frozen teacher pixels: `loss(student, teacher)`.

    Args:
        temperature: tau > 0. PCD uses 0.2.
        negatives: "batch", all other teacher pixels of the batch; "image", those of the same image;
            "queue", the vectors of `queue` (PCD); or a tuple of "queue" with one of the others.
        queue: the `PixelQueue` that "queue" reads. It becomes a submodule, saved with this one, and
            moves only when `queue.enqueue` or `queue.enqueue_pooled` is called.
        normalize: use cosine similarities, as PCD does; False keeps the maps' vectors as they are. A
            `PixelQueue` holds unit vectors in any case, so that it suits False only for maps of such.
        learnable_temperature: makes tau a parameter (its logarithm, `log_temperature`).
        reduction: "mean" over valid pixels, "sum", or "none" for a loss per pixel `[B, *spatial]`.
        backend: "auto", "triton", "torch" or "reference", see `ops.row_lse`.
        gather_distributed: compute what one process would on the batches of all ranks together: the
            teacher pixels of all ranks are "batch" negatives, and mean and sum are scaled by the number
            of ranks, so that the average over ranks of losses, and of gradients as DDP and FSDP make
            it, is that of the one process. All ranks must call, with maps of any size.
        gather_mode: "all" gathers the keys of W ranks at once, W N D numbers; "ring" passes them from
            rank to rank while the previous ones are used, 2 N D numbers.

    Shapes: student and teacher `[B, C, *spatial]` with one, two or three spatial axes; project the
    student to the teacher's channels and size first. `valid_mask` `[B, *spatial]`, True = used.

    Example:
        >>> loss = PixelContrastLoss(temperature=0.2)
        >>> student = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> loss(student, torch.randn(2, 16, 8, 8)).backward()
    """

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        negatives: str | tuple[str, ...] = "batch",
        queue: PixelQueue | None = None,
        normalize: bool = True,
        learnable_temperature: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        gather_distributed: bool = False,
        gather_mode: str = "all",
    ) -> None:
        super().__init__()
        _checks.positive("temperature", temperature)
        _checks.flag("normalize", normalize)
        _checks.flag("learnable_temperature", learnable_temperature)
        _checks.choice("reduction", reduction, REDUCTIONS)
        _checks.choice("backend", backend, BACKENDS)
        _checks.flag("gather_distributed", gather_distributed)
        _checks.choice("gather_mode", gather_mode, GATHER_MODES)
        self.negatives = _check_negatives(negatives)
        if queue is not None and not isinstance(queue, PixelQueue):
            raise TypeError(f"queue must be a PixelQueue; got {type(queue).__name__}")
        if ("queue" in self.negatives) != (queue is not None):
            raise ValueError(
                'queue must be given if and only if negatives include "queue"; '
                f"got negatives={negatives!r} and queue={queue!r}"
            )
        self.queue = queue
        self.normalize, self.reduction, self.backend = normalize, reduction, backend
        self.gather_distributed, self.gather_mode = gather_distributed, gather_mode
        self._temperature = float(temperature)
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable_temperature else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learnable temperature to the one given."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self._temperature))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature tau, a number; a tensor of one element with gradient when learnable."""
        if self.log_temperature is None:
            return self._temperature
        return self.log_temperature.exp()

    def forward(
        self, student: Tensor, teacher: Tensor, *, valid_mask: Tensor | None = None
    ) -> Tensor:
        """The loss; a scalar unless `reduction="none"`."""
        loss = self._terms(student, teacher, valid_mask, with_max=False).loss
        return self._finish(loss, student, valid_mask, self.reduction)

    def components(
        self, student: Tensor, teacher: Tensor, *, valid_mask: Tensor | None = None
    ) -> PixelContrastComponents:
        """The loss with the contrast accuracy and the mean positive similarity, in the same pass."""
        terms = self._terms(student, teacher, valid_mask, with_max=True)
        loss = self._finish(terms.loss, student, valid_mask, self.reduction)
        logged = [self._finish(values, student, valid_mask, "mean") for values in terms[1:]]
        if self._gathers:
            logged = [total(mean) / world_size() for mean in logged]
        return PixelContrastComponents(loss, *logged)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        temperature = "learnable" if self.log_temperature is not None else f"{self._temperature:g}"
        return (
            f"temperature={temperature}, negatives={self.negatives}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
            + (f", gather_mode={self.gather_mode!r}" if self.gather_distributed else "")
        )

    def _terms(
        self, student: Tensor, teacher: Tensor, valid_mask: Tensor | None, *, with_max: bool
    ) -> "_Terms":
        _checks.maps(student, teacher)
        _checks.mask(valid_mask, student.shape[:1] + student.shape[2:], student)
        # An image is a batch entry of its own; otherwise all pixels are rows of one matrix.
        pixels = "b (...)" if "image" in self.negatives else "(b ...)"
        return _contrast(
            rearrange(student, f"b c ... -> {pixels} c"),
            rearrange(teacher.detach(), f"b c ... -> {pixels} c"),
            self.temperature,
            "image" in self.negatives or "batch" in self.negatives,
            None if self.queue is None else self.queue.keys,
            None if valid_mask is None else rearrange(valid_mask, f"b ... -> {pixels}"),
            self.normalize,
            self.backend,
            with_max,
            self.gather_mode if self._gathers and "batch" in self.negatives else None,
        )

    @property
    def _gathers(self) -> bool:
        return self.gather_distributed and world_size() > 1

    def _finish(
        self, values: Tensor, student: Tensor, valid_mask: Tensor | None, reduction: str
    ) -> Tensor:
        values = values.reshape(student.shape[:1] + student.shape[2:])
        return _reduce(values, valid_mask, reduction, all_ranks=self._gathers)


class _Terms(NamedTuple):
    """Per row: the loss, whether no negative exceeds the positive, and the positive's similarity."""

    loss: Tensor
    wins: Tensor
    similarity: Tensor


def _contrast(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    in_batch: bool,
    queue_keys: Tensor | None,
    valid_mask: Tensor | None,
    normalize: bool,
    backend: str,
    with_max: bool,
    gather_mode: str | None = None,
) -> _Terms:
    """The loss of each row `[..., N]`. `wins` means something only `with_max`."""
    _checks.rows(student, teacher)
    _checks.mask(valid_mask, student.shape[:-1], student)
    _checks.keys("queue_keys", queue_keys, student, student.shape[-1])
    if not isinstance(temperature, Tensor):
        _checks.positive("temperature", temperature)
    elif temperature.numel() != 1 or temperature.device != student.device:
        raise ValueError(
            f"temperature must be a number, or one element on {student.device}; "
            f"got shape {tuple(temperature.shape)} on {temperature.device}"
        )
    else:
        temperature = temperature.reshape(()).to(torch.promote_types(student.dtype, torch.float32))
    if not in_batch and queue_keys is None:
        raise ValueError("queue_keys must be given when in_batch is False: there is no negative")
    teacher = detached(teacher)
    if valid_mask is not None:  # also keeps a NaN at an invalid pixel out of every gradient
        student = student.masked_fill(~valid_mask.unsqueeze(-1), 0.0)
        teacher = teacher.masked_fill(~valid_mask.unsqueeze(-1), 0.0)
    if normalize:
        # the teacher's unit vectors are not rounded to a dtype that is coarser than the student's
        teacher = unit_vectors(teacher.to(torch.promote_types(student.dtype, teacher.dtype)))
        student = unit_vectors(student, differentiable_twice=backend == "reference")

    scale = 1.0 / temperature
    bound = scale if normalize and not isinstance(scale, Tensor) else None
    dtype = torch.promote_types(student.dtype, torch.float32)
    similarity = (student.to(dtype) * teacher.to(dtype)).sum(dim=-1)
    positive = scale * similarity

    options: dict[str, Any] = {"logit_bound": bound, "backend": backend, "with_max": with_max}
    # row i of the teacher is the positive of row i, so the diagonal is left out of the negatives
    sources: list[tuple[Tensor, Tensor | None, int | None]] = []
    parts: list[tuple[Tensor, Tensor | None]] = []
    if gather_mode == "ring":
        blocks = ring_blocks(teacher.to(operand_dtype(teacher)), valid_mask)
        parts.append(joined_row_lse(student, blocks, scale, **options))
    elif gather_mode == "all":
        sources.append(all_blocks(teacher.to(operand_dtype(teacher)), valid_mask))
    elif in_batch:
        sources.append((teacher.to(operand_dtype(teacher)), valid_mask, 0))
    if queue_keys is not None and (queue_keys.shape[0] > 0 or not in_batch):
        sources.append((detached(queue_keys), None, None))
    parts += [
        row_lse_and_max(
            student, keys, scale, key_mask=key_mask, exclude_offset=exclude_offset, **options
        )
        for keys, key_mask, exclude_offset in sources
    ]
    lse = functools.reduce(torch.logaddexp, [part for part, _ in parts])
    loss = F.softplus(lse - positive, threshold=40)  # exact to rounding in float64 too
    wins = loss.detach()
    if with_max:
        tie = (
            (
                student.to(operand_dtype(student)).to(dtype)
                * teacher.to(operand_dtype(teacher)).to(dtype)
            )
            .sum(dim=-1)
            .detach()
        )
        reach = scale * tie + 1e-5 * (scale * tie).abs()  # a tie to rounding of what is multiplied
        beaten = [top <= reach for _, top in parts if top is not None]
        wins = functools.reduce(torch.logical_and, beaten).to(dtype)
    return _Terms(loss, wins, similarity.detach())


def _reduce(
    values: Tensor, valid_mask: Tensor | None, reduction: str, *, all_ranks: bool = False
) -> Tensor:
    """Mean over valid entries, sum, or the entries themselves; zero where nothing is valid.

    With `all_ranks`, the average over the ranks is the mean over the entries of all, or their sum.
    """
    if valid_mask is not None:
        values = values.masked_fill(~valid_mask, 0.0)
    if reduction == "none":
        return values
    ranks = world_size() if all_ranks else 1
    if reduction == "sum":
        return values.sum() * ranks
    if all_ranks:
        count = torch.full((), values.numel(), device=values.device)
        count = total(count if valid_mask is None else valid_mask.sum())
        return values.sum() * ranks / count.clamp_min(1)
    if valid_mask is not None:
        return values.sum() / valid_mask.sum().clamp_min(1)
    return values.sum() / max(values.numel(), 1)


def _check_negatives(negatives: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (negatives,) if isinstance(negatives, str) else negatives
    known = isinstance(names, tuple) and len(names) > 0 and all(n in NEGATIVES for n in names)
    if not known or (len(names) > 1 and (len(set(names)) != 2 or "queue" not in names)):
        raise ValueError(
            f'negatives must be one of {NEGATIVES}, or a tuple of "queue" with one of the others; '
            f"got {negatives!r}"
        )
    return names
