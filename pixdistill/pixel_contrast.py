"""Pixel-to-pixel contrastive distillation (PCD, ICCV 2023, arXiv 2211.00218).

Each pixel of the student's map should be closer to the teacher's pixel at the same position than to
other teacher vectors, the negatives. With unit vectors s_i (student) and t_i (teacher), the
negatives n of pixel i, and the temperature tau,

    loss_i = -log( exp(<s_i,t_i>/tau) / (exp(<s_i,t_i>/tau) + sum_n exp(<s_i,n>/tau)) )
           = softplus( logsumexp_n(<s_i,n>/tau) - <s_i,t_i>/tau ).

`ops.contrast` computes it, and its gradient, from the maps.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks
from ._distributed import all_reduce_sum, gathered_block, ring_blocks, world_size
from ._labels import check_both
from .ops.backend import BACKENDS, Backend
from .ops.contrast import Negatives, Reduction, contrast
from .pixel_queue import PixelQueue, unit_vectors

NEGATIVES: tuple[Negatives, ...] = ("batch", "image", None)
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
EXCHANGES = {"all": gathered_block, "ring": ring_blocks}


class PixelContrastComponents(NamedTuple):
    """The loss to differentiate, and two values to log. Where ranks gather, these are of all ranks."""

    loss: Tensor
    """The loss that `forward` returns."""
    accuracy: Tensor
    """Fraction of valid pixels whose positive no negative exceeds (ties to 1e-5 count as correct)."""
    positive_similarity: Tensor
    """Mean of <s_i, t_i> over the valid pixels, a cosine in [-1, 1] when vectors are normalised."""


def pixel_contrast_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    negatives: Literal["batch"] | None = "batch",
    queue_keys: Tensor | None = None,
    queue_labels: Tensor | None = None,
    valid_mask: Tensor | None = None,
    labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE of student vectors against frozen teacher vectors, without an N x N matrix.

    For two matrices and the default settings it equals
    `F.cross_entropy(F.normalize(student) @ F.normalize(teacher).T / temperature, torch.arange(N))`.

    Args:
        student: `[..., N, D]`. Vectors of different batch entries never meet.
        teacher: the positives, of the student's shape; detached.
        temperature: tau > 0; a tensor of one element may require a gradient.
        negatives: "batch", the other teacher vectors of the same batch entry; None for
            `queue_keys` alone.
        queue_keys: `[K, D]`, further negatives for every vector; detached, and normalised with
            `normalize`.
        queue_labels: `[K]`, the labels of `queue_keys`.
        valid_mask: `[..., N]` bool. Where False, the vector is neither an anchor nor a negative.
        labels: `[..., N]`, integers below 2^31. Vectors of the anchor's label are not its negatives;
            row n of the teacher stays its positive. A negative label matches nothing.
        normalize: divide by the L2 norm first. A vector of norm <= 1e-12 counts as zero, with zero
            gradient; one whose squares overflow float32, of norm above 1.84e19, gives NaN.
        reduction: "mean" over valid vectors, "sum", or "none" for `[..., N]` with 0 where invalid.
        backend: "auto", "triton", "torch" or "reference", see the page "Installation".

    Returns:
        A scalar, or `[..., N]`: float64 for float64 input and float32 otherwise. Zero, and still
        attached to the graph, when nothing is valid or there are no negatives.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Source: equation of the loss in PCD and its official `pcd/pcd.py`, except that a zero vector has
    zero gradient here.

    Example:
        >>> student = torch.randn(100, 16, requires_grad=True)
        >>> pixel_contrast_loss(student, torch.randn(100, 16), temperature=0.1).backward()
    """
    _checks.rows(student, teacher)
    _checks.mask(valid_mask, student.shape[:-1], student)
    _checks.choice("negatives", negatives, ("batch", None))
    if queue_keys is not None:
        _checks.shaped("queue_keys", queue_keys, ("K", student.shape[-1]), student)
    check_both(labels, student.shape[:-1], student, queue_keys, queue_labels)
    if negatives is None and queue_keys is None:
        raise ValueError("queue_keys must be given with negatives=None: there are no negatives")
    _checks.flag("normalize", normalize)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.choice("backend", backend, BACKENDS)
    if queue_keys is not None and normalize:
        queue_keys = unit_vectors(queue_keys.detach())
    batch = student.shape[:-2].numel()  # -1 would not do for an empty tensor
    loss, _ = contrast(
        student.reshape(batch, *student.shape[-2:]).mT,
        teacher.reshape(batch, *student.shape[-2:]).mT,
        _checks.temperature(temperature, student),
        negatives=None if negatives is None else "image",  # a batch entry is one image
        queue_keys=queue_keys,
        queue_labels=queue_labels,
        valid_mask=valid_mask,
        labels=labels,
        normalize=normalize,
        reduction=reduction,
        backend=backend,
    )
    return loss.reshape(student.shape[:-1]) if reduction == "none" else loss


class PixelContrastLoss(nn.Module):
    """Contrast of student pixels against frozen teacher pixels: `loss(student, teacher)`.

    Args:
        temperature: tau > 0. PCD uses 0.2. The attribute can be set later, also where it is learned.
        negatives: "batch", all other teacher pixels of the batch; "image", those of the same image;
            None, only the vectors of `queue` (PCD).
        queue: a `PixelQueue` whose vectors are negatives as well. It becomes a submodule, saved with
            this one, and moves only when `queue.enqueue` or `queue.enqueue_pooled` is called.
        normalize: use cosine similarities, as PCD does; False keeps the maps' vectors as they are. A
            `PixelQueue` holds unit vectors in any case, so that it suits False only for maps of such.
        learnable_temperature: learn tau; the parameter is its logarithm, `log_temperature`.
        reduction: "mean" over valid pixels, "sum", or "none" for a loss per pixel `[B, *spatial]`.
        backend: "auto", "triton", "torch" or "reference", see the page "Installation".
        gather_distributed: compute what one process would on the batches of all ranks together: the
            teacher pixels of all ranks are "batch" negatives, and mean and sum are scaled by the
            number of ranks, so that DDP's and FSDP's average over ranks is the loss, and the
            gradient, of one process. All ranks must call, with maps of any size. To validate on one
            rank alone, set the attribute to False there.
        gather_mode: "all" gathers the keys of W ranks at once, W N D elements; "ring" passes them
            from rank to rank while the previous ones are used, 2 N D elements.

    Shapes: student and teacher `[B, C, *spatial]` with one, two or three spatial axes; project the
    student to the teacher's channels and size first. `valid_mask` `[B, *spatial]`, True = used. The
    tokens `[B, N, C]` of a ViT would count as N channels: pass them through `tokens_to_map`.
    `labels` `[B, *spatial]`, integers below 2^31: teacher pixels of the anchor's label are not its
    negatives, while the one at its own position stays the positive. A negative label matches nothing.
    The queue needs labels too: `PixelQueue(..., labels=True)`.

    Example:
        >>> loss = PixelContrastLoss(temperature=0.2)
        >>> student = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> loss(student, torch.randn(2, 16, 8, 8)).backward()
    """

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        negatives: Negatives = "batch",
        queue: PixelQueue | None = None,
        normalize: bool = True,
        learnable_temperature: bool = False,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
        gather_distributed: bool = False,
        gather_mode: Literal["all", "ring"] = "all",
    ) -> None:
        super().__init__()
        self.negatives = _checks.choice("negatives", negatives, NEGATIVES)
        if queue is not None and not isinstance(queue, PixelQueue):
            raise TypeError(f"queue must be a PixelQueue; got {type(queue).__name__}")
        if queue is None and negatives is None:
            raise ValueError("queue must be given with negatives=None: there would be no negatives")
        self.queue = queue
        self.normalize = _checks.flag("normalize", normalize)
        self.reduction = _checks.choice("reduction", reduction, REDUCTIONS)
        self.backend = _checks.choice("backend", backend, BACKENDS)
        self.gather_distributed = _checks.flag("gather_distributed", gather_distributed)
        self.gather_mode = _checks.choice("gather_mode", gather_mode, tuple(EXCHANGES))
        self._temperature = _checks.positive("temperature", temperature)
        learnable = _checks.flag("learnable_temperature", learnable_temperature)
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperature to the one last given, where it is learned."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self._temperature))

    @property
    def temperature(self) -> float | Tensor:
        """tau: a number, or one element with gradient where it is learned (of all shards)."""
        if self.log_temperature is None:
            return self._temperature
        full_tensor = getattr(self.log_temperature, "full_tensor", None)  # of a DTensor
        return (self.log_temperature if full_tensor is None else full_tensor()).exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = _checks.positive("temperature", value)
        self.reset_parameters()

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        valid_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_components: bool = False,
    ) -> Tensor | PixelContrastComponents:
        """The loss, a scalar unless `reduction="none"`; with `return_components`, with its parts."""
        _checks.maps(student, teacher)
        pixels = student.shape[:1] + student.shape[2:]
        _checks.mask(valid_mask, pixels, student)
        queue = self.queue
        keys, key_labels = (None, None) if queue is None else (queue.keys, queue.key_labels)
        if keys is not None:
            _checks.shaped("queue.keys", keys, ("K", student.shape[1]), student)
        check_both(labels, pixels, student, keys, key_labels)
        gathers = self.gather_distributed and world_size() > 1
        loss, metrics = contrast(
            student,
            teacher,
            self.temperature,
            negatives=self.negatives,
            queue_keys=keys,
            queue_labels=key_labels,
            valid_mask=valid_mask,
            labels=labels,
            normalize=self.normalize,
            reduction="sum" if gathers and self.reduction == "mean" else self.reduction,
            backend=self.backend,
            with_metrics=return_components,
            exchange=EXCHANGES[self.gather_mode] if gathers and self.negatives == "batch" else None,
        )
        if self.reduction == "none":
            loss = loss.reshape(pixels)
        if gathers:
            loss, metrics = self._over_ranks(loss, metrics, student, valid_mask)
        if metrics is None:
            return loss
        return PixelContrastComponents(loss, *metrics.unbind())

    def _over_ranks(
        self, loss: Tensor, metrics: Tensor | None, student: Tensor, valid_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale this rank's sum so that the average over ranks is the loss of one process."""
        own = loss.new_full((), student.shape[:1].numel() * student.shape[2:].numel())
        if valid_mask is not None:
            own = valid_mask.sum().to(loss.dtype)
        count = all_reduce_sum(own).clamp_min(1)
        if metrics is not None:
            metrics = all_reduce_sum(metrics * own) / count
        if self.reduction == "mean":
            loss = loss * (world_size() / count)
        elif self.reduction == "sum":
            loss = loss * world_size()
        return loss, metrics

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        temperature = "learnable" if self.log_temperature is not None else f"{self._temperature:g}"
        return (
            f"temperature={temperature}, negatives={self.negatives!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
            + (f", gather_mode={self.gather_mode!r}" if self.gather_distributed else "")
        )
