"""`contrast`: from the maps of student and teacher to the contrastive loss of their pixels, in one node.

Row i of the student is q_i, its positive is row i of the teacher, k_i, and its negatives are n:

    lse_i    = logsumexp_n(scale * <q_i, n>)
    margin_i = lse_i - scale * <q_i, k_i>
    loss_i   = softplus(margin_i) = -log( e^(scale <q_i,k_i>) / (e^(scale <q_i,k_i>) + e^lse_i) ).

Forward: `prepare` writes the rows of both maps, their inverse norms and <q_i, k_i>. The pass of
`row_lse` streams each set of negatives once; it gives lse_i and the negatives' mean, weighted by their
softmax: weighted_keys_i. `join` adds two sets. `finish` computes margin, loss and their reduction.

Backward: the teacher is frozen, so d lse_i / d q_i = scale * weighted_keys_i is the whole gradient of
the pass, and

    d loss_i / d q_i = sigmoid(margin_i) * scale * (weighted_keys_i - k_i);

`backward` leads it on through the normalisation to the student's map. Of all keys, only the positives
are saved: a queue may be overwritten between forward and backward.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backend import (
    Backend,
    FirstOrderOnly,
    choose,
    no_autocast,
    operand_dtype,
    refuse_transforms,
    sum_dtype,
    without_subclass,
)
from ..row_lse import row_lse_forward, why_not_triton
from . import chunked, reference

Negatives = Literal["batch", "image"] | None
Reduction = Literal["mean", "sum", "none"]
Keys = tuple[Tensor, Tensor | None, int | None, Tensor | None]
"""keys `[..., M, D]`, key_mask `[..., M]`, exclude_offset and labels `[..., M]` of the keys"""
Exchange = Callable[[Tensor, Tensor | None, Tensor | None], Iterable[Keys]]
"""From this rank's keys `[N, D]`, mask `[N]` and labels `[N]` to all ranks', block by block."""


def contrast(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    *,
    negatives: Negatives,
    queue_keys: Tensor | None,
    queue_labels: Tensor | None,
    valid_mask: Tensor | None,
    labels: Tensor | None,
    normalize: bool,
    reduction: Reduction,
    backend: Backend,
    with_metrics: bool = False,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and `[2]` accuracy and mean similarity of the positives where asked for.

    Args:
        student, teacher: `[B, D, *spatial]`, any strides, any floating-point dtypes.
        temperature: a number, or one element that may require a gradient.
        negatives: the other pixels of the batch, of the image, or none of them.
        queue_keys: `[K, D]`, negatives of all pixels; unit vectors if `normalize`.
        queue_labels: `[K]`, the labels of queue_keys.
        valid_mask: `[B, *spatial]` bool. Where False, a pixel is neither anchor nor negative.
        labels: `[B, *spatial]`, integers. A key of the anchor's label >= 0 is not its negative.
        normalize: divide rows by their norm; zero, with zero gradient, at a norm of at most 1e-12.
        reduction: mean over valid pixels, sum, or none: `[pixels]`, 0 at invalid pixels.
        exchange: gives the keys of all ranks in place of the batch's own.

    Nothing is checked here. Products run in the dtype of `operand_dtype(student)`; loss and metrics
    have the dtype of sums.
    """
    operand, dtype = operand_dtype(student), sum_dtype(student)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(dtype)
    scale = 1.0 / temperature
    student, teacher = _as_2d(student), _as_2d(teacher.detach())
    if valid_mask is not None:
        valid_mask = valid_mask.reshape(student[:, 0].shape)
    queue_keys = None if queue_keys is None else queue_keys.detach()
    if labels is not None:
        labels = labels.to(torch.int32)
        if queue_labels is not None:
            queue_labels = queue_labels.to(torch.int32).contiguous()
    if backend == "reference":
        with no_autocast(student.device):
            return reference.contrast(
                student, teacher, scale, queue_keys, queue_labels, valid_mask, labels, negatives,
                normalize, reduction, operand, with_metrics, exchange,
            )  # fmt: skip
    refuse_transforms("contrast", student, teacher)
    bound = scale if normalize and not isinstance(scale, Tensor) else None
    compiling = torch.compiler.is_compiling() and exchange is None
    if compiling and not isinstance(scale, Tensor):
        # A number, and before torch 2.13 its inverse, would compile again for a new temperature.
        if bound is not None:  # the bounds that `row_lse` distinguishes
            bound = 9.0 if bound <= 9.0 else 60.0 if bound <= 60.0 else None
        scale = torch.ones((), dtype=dtype, device=student.device) / temperature
    with_grad = torch.is_grad_enabled() and (
        student.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)
    )
    arguments: Any = (
        student, teacher, scale, bound, queue_keys, queue_labels, valid_mask, labels, negatives,
        normalize, reduction, backend, operand, with_grad, with_metrics,
    )  # fmt: skip
    if compiling:
        loss, metrics, *_ = contrast_op(*arguments)
        return loss, metrics if with_metrics else None
    if not with_grad:
        loss, metrics, _ = _forward(*arguments, exchange)  # type: ignore[call-arg]
        return loss, metrics
    return _Contrast.apply(*arguments, exchange)


def _as_2d(image: Tensor) -> Tensor:
    """`[B, D, H, W]` from one, two or three spatial axes."""
    return image.unsqueeze(2) if image.dim() == 3 else image.flatten(3)


# --- Forward and backward, without autograd -------------------------------------------------------


class Saved(NamedTuple):
    """What backward needs."""

    rows: Tensor
    """`[2, N, D]` in the dtype of products: the student's rows q and the teacher's k."""
    stats: Tensor
    """`[4, N]` in the dtype of sums: inverse norms of student and teacher (0 at invalid pixels, and
    without normalisation 1 at all others), similarity <q, k> before rounding, and margin."""
    weighted_keys: Tensor | None
    """`[N, D]` in the dtype of products."""
    num_valid: Tensor | None
    """Number of valid pixels, at least 1; None without a mask."""


def _forward(
    student: Tensor, teacher: Tensor, scale: float | Tensor, logit_bound: float | None,
    queue_keys: Tensor | None, queue_labels: Tensor | None, valid_mask: Tensor | None,
    labels: Tensor | None, negatives: Any, normalize: bool, reduction: str, backend: Any,
    operand: torch.dtype, with_grad: bool, with_metrics: bool, exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
    """Loss and metrics as `contrast` returns them, and what backward needs."""
    batch, channels, height, width = student.shape
    pixels, groups = batch * height * width, batch if negatives == "image" else 1
    shape = (groups, pixels // max(groups, 1))
    device, dtype = student.device, sum_dtype(student)
    rows = torch.empty(2, pixels, channels, dtype=operand, device=device)
    stats = torch.empty(4, pixels, dtype=dtype, device=device)
    form = _form(rows, backend)
    with no_autocast(device):
        tie = form.prepare(
            rows, stats, student, teacher, valid_mask, normalize=normalize, with_tie=with_metrics
        )
        query, own_keys = rows.view(2, *shape, channels).unbind()
        mask = None if valid_mask is None else valid_mask.reshape(shape)
        if labels is not None:
            labels = without_subclass(labels).reshape(shape).contiguous()
        total: Any = None
        own, queue = (own_keys, mask, labels), (queue_keys, queue_labels)
        for keys, key_mask, offset, key_labels in _sources(own, negatives, queue, exchange):
            pair = None if labels is None or key_labels is None else (labels, key_labels)
            part = row_lse_forward(
                query, keys, scale, key_mask, offset, pair, logit_bound=logit_bound,
                backend=backend, with_weighted_keys=with_grad, with_max=with_metrics,
            )  # fmt: skip
            # Weighted keys of many blocks are rounded once, at the end.
            wide = operand if exchange is None else dtype
            total = part if total is None else form.join(total, part, wide)
            del part  # not held while the next one is computed
        lse, weighted_keys, max_logit = total
        loss, metrics, num_valid = form.finish(
            lse, max_logit, tie, stats, scale, valid_mask, reduction
        )
    if weighted_keys is not None:
        weighted_keys = weighted_keys.to(operand).reshape(pixels, channels)
    return loss, metrics, Saved(rows, stats, weighted_keys, num_valid)


def _sources(
    own: Any, negatives: Negatives, queue: tuple[Tensor | None, Tensor | None],
    exchange: Exchange | None,
) -> Iterator[Keys]:  # fmt: skip
    """Each set of negatives, with where the positives are in it. `own` is keys, mask and labels."""
    if exchange is not None:
        of_rank: Any = (None if x is None else x[0] for x in own)
        for keys, mask, offset, labels in exchange(*of_rank):
            yield keys.unsqueeze(0), _row(mask), offset, _row(labels)
    elif negatives is not None:
        keys, mask, labels = own
        yield keys, mask, 0, labels  # row i of the teacher is the positive of row i
    if queue[0] is not None:
        yield queue[0].unsqueeze(0), None, None, _row(queue[1])


def _row(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.unsqueeze(0)


def _gradients(
    grad: Tensor, student: Tensor, rows: Tensor, stats: Tensor, weighted_keys: Tensor,
    num_valid: Tensor | None, scale: float | Tensor, normalize: bool, mean: bool, backend: Any,
    needs_scale: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of the student's map, and of a learned scale if asked for."""
    if num_valid is not None and num_valid.dim() > 0:  # None, from the registered operator
        num_valid = None
    return _form(rows, backend).backward(
        grad, student, rows, stats, weighted_keys, num_valid, scale,
        normalize=normalize, mean=mean, needs_scale=needs_scale,
    )  # fmt: skip


def _form(rows: Tensor, backend: Backend) -> ModuleType:
    """The module that computes: the same choice as for the pass over the keys."""
    chosen = choose(backend, rows.device, why_not_triton(rows))
    if chosen != "triton":
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


# --- Autograd -------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], saved: Iterable[Tensor | None]) -> None:
    student, _, scale, _, _, _, _, _, _, ctx.normalize, reduction, ctx.backend, *_ = inputs
    ctx.mean = reduction == "mean"
    ctx.scale, learned_scale = (None, scale) if isinstance(scale, Tensor) else (scale, None)
    ctx.set_materialize_grads(False)
    # The student's map has the gradient's dtype and strides, and lets double backward raise here.
    ctx.save_for_backward(student, learned_scale, *saved)


def _backward(
    ctx: Any, grad: Tensor | None, gradients: Callable[..., tuple[Tensor, Tensor | None]]
) -> tuple[Tensor | None, ...]:
    """Gradients of student, teacher and scale."""
    if grad is None:
        return None, None, None
    student, learned_scale, *saved = ctx.saved_tensors
    needs_student, _, needs_scale, *_ = ctx.needs_input_grad
    scale = ctx.scale if learned_scale is None else learned_scale
    grad_student, grad_scale = gradients(
        grad, student, *saved, scale, ctx.normalize, ctx.mean, ctx.backend, needs_scale
    )
    if torch.is_grad_enabled():  # create_graph=True
        sources = (grad, student, learned_scale)
        grad_student = FirstOrderOnly.apply("contrast", grad_student, *sources)
        grad_scale = FirstOrderOnly.apply("contrast", grad_scale, *sources) if needs_scale else None
    return grad_student if needs_student else None, None, grad_scale if needs_scale else None


class _Contrast(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        loss, metrics, saved = _forward(*inputs)
        if metrics is not None:
            ctx.mark_non_differentiable(metrics)
        _save(ctx, inputs, saved)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        return *_backward(ctx, grad, _gradients), *(None,) * 13


@torch.library.custom_op("pixdistill::contrast", mutates_args=())
def contrast_op(
    student: Tensor, teacher: Tensor, scale: Tensor, logit_bound: float | None,
    queue_keys: Tensor | None, queue_labels: Tensor | None, valid_mask: Tensor | None,
    labels: Tensor | None, negatives: str | None, normalize: bool, reduction: str, backend: str,
    operand: torch.dtype, with_grad: bool, with_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward` registered with PyTorch, for torch.compile: what is None there is empty here."""
    loss, metrics, saved = _forward(
        student, teacher, scale, logit_bound, queue_keys, queue_labels, valid_mask, labels,
        negatives, normalize, reduction, backend, operand, with_grad, with_metrics,
    )  # fmt: skip
    rows, stats, weighted_keys, num_valid = saved
    return (
        loss,
        stats.new_empty(0) if metrics is None else metrics,
        rows,
        stats,
        rows.new_empty(0) if weighted_keys is None else weighted_keys,
        stats.new_empty(0) if num_valid is None else num_valid,
    )


@contrast_op.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, ...]:
    valid_mask, reduction = others[5], others[9]
    operand, with_grad, with_metrics = others[11:]
    batch, channels, height, width = student.shape
    pixels = batch * height * width
    stats = student.new_empty((4, pixels), dtype=sum_dtype(student))
    rows = student.new_empty((2, pixels, channels), dtype=operand)
    return (
        stats.new_empty(pixels if reduction == "none" else ()),
        stats.new_empty(2 if with_metrics else 0),
        rows,
        stats,
        rows.new_empty((pixels, channels) if with_grad else 0),
        stats.new_empty(0 if valid_mask is None else ()),
    )


@torch.library.custom_op("pixdistill::contrast_gradients", mutates_args=())
def contrast_gradients_op(
    grad: Tensor, student: Tensor, rows: Tensor, stats: Tensor, weighted_keys: Tensor,
    num_valid: Tensor, scale: Tensor, normalize: bool, mean: bool, backend: str, needs_scale: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_gradients` registered with PyTorch."""
    grad_student, grad_scale = _gradients(
        grad, student, rows, stats, weighted_keys, num_valid, scale, normalize, mean, backend,
        needs_scale,
    )  # fmt: skip
    return grad_student, stats.new_empty(0) if grad_scale is None else grad_scale


@contrast_gradients_op.register_fake
def _(grad: Tensor, student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    stats, needs_scale = others[1], others[-1]
    return torch.empty_like(student), stats.new_empty(() if needs_scale else 0)


def _save_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output[2:])


def _registered_backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
    return *_backward(ctx, grad, contrast_gradients_op), *(None,) * 12


contrast_op.register_autograd(_registered_backward, setup_context=_save_registered)
