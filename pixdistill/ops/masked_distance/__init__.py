"""`masked_distance`: the distance of two maps under masks of the teacher's, in one node (MasKD).

With masks m_t and token weights w_t, the loss of an image with channels c and pixels p is

    sum_t w_t * mean_c sum_p (m_tp (s_cp - t_cp))^2 / (sum_p m_tp + eps) = sum_p a_p d_p,

    a_p = sum_t w_t m_tp^2 / (sum_p m_tp + eps),    d_p = mean_c (s_cp - t_cp)^2.

Channels are summed first, so nothing has both axes, tokens and channels. The gradient with respect to
the student is 2 a_p (s_cp - t_cp) / C. So the forward pass keeps the attention a_p, one element per
pixel, and backward reads both maps once more.

Masks and weights are given (`Masks`), or computed from frozen tokens (`Tokens`) in the same pass.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple, Sequence  # noqa: UP035  torch 2.6 registers no other Sequence

import torch
from torch import Tensor

from ..backend import Backend, choose, detached, refuse_transforms, why_no_kernel
from . import chunked, reference
from .launch import MAX_TOKENS
from .tokens import Masks as Masks
from .tokens import Tokens as Tokens
from .tokens import compute_masks
from .tokens import pooled_convolution as pooled_convolution
from .tokens import token_masks as token_masks
from .tokens import token_weights as token_weights


class Distance(NamedTuple):
    """What `masked_distance` returns."""

    loss: Tensor
    """A scalar, or `[B]` for `reduction="none"`; float64 for a float64 student, float32 otherwise."""
    areas: Tensor
    """The sum of each mask over the valid pixels `[B, T]`."""
    pixels: Tensor
    """The number of valid pixels `[B]`, in the dtype of the areas."""


def masked_distance(
    student: Tensor,
    teacher: Tensor,
    source: Masks | Tokens,
    *,
    valid_mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: Backend = "auto",
) -> Distance:
    """The masked distance, differentiable in the student alone. Arguments are not checked here.

    Args:
        student, teacher: `[B, C, H, W]`, any strides and dtypes.
        source: where masks and weights come from.
        valid_mask: `[B, H, W]` bool. A pixel that is False counts as deleted and may hold NaN.
        eps: added to the area of a mask. A mask that is zero everywhere adds nothing, also for 0.
        reduction: "mean" over images that have a valid pixel, "sum", or "none".
        backend: "triton" has the fused kernels, "torch" the chunked form, "reference" plain autograd.
            All three have second-order gradients. Only "reference" has forward mode and `torch.func`.

    Raises:
        ValueError: for a backend that cannot run.
        RuntimeError: under transforms of `torch.func`, unless the backend is "reference".
    """
    teacher = detached(teacher)
    valid_mask = None if valid_mask is None else detached(valid_mask)
    settings = (valid_mask, eps, reduction)
    if backend != "reference":
        backend = choose(backend, student.device, why_not_triton(student, source.num_tokens))
    if backend == "reference" or (backend == "torch" and torch.compiler.is_compiling()):
        # A compiler fuses the plain formula and its gradient by itself.
        if isinstance(source, Tokens):
            with torch.no_grad():
                source = compute_masks(source, student.detach(), teacher, valid_mask)
        loss, sums = reference.masked_distance(
            student, teacher, source.masks, source.weights, valid_mask, eps, reduction
        )
    elif torch.compiler.is_compiling():
        loss, _, sums = masked_distance_op(student, teacher, *_flat(source), *settings)
    else:
        refuse_transforms("masked_distance", student)
        loss, sums = _MaskedDistance.apply(student, teacher, source, *settings, backend)
    return Distance(loss, sums[:, : source.num_tokens], sums[:, source.num_tokens])


def why_not_triton(student: Tensor, num_tokens: int) -> str | None:
    """The reason why the fused kernels do not take this map, or None: what `backend="auto"` asks."""
    if student.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {student.dtype} form"
    if num_tokens > MAX_TOKENS:
        return f"it holds up to {MAX_TOKENS} tokens, not {num_tokens}"
    return why_no_kernel(student.device)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


class _MaskedDistance(torch.autograd.Function):
    """The node in eager mode. It keeps its inputs and the attention."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        source: Masks | Tokens,
        valid_mask: Tensor | None,
        eps: float,
        reduction: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        implementation = _implementation(backend)
        loss, attention, sums = implementation.forward(
            student, teacher, source, valid_mask, eps, reduction
        )
        ctx.save_for_backward(student, teacher, attention)
        ctx.implementation, ctx.masked = implementation, valid_mask is not None
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        compute = ctx.implementation.backward
        if torch.is_grad_enabled():  # create_graph=True
            compute = _differentiable_gradient
        return (compute(*ctx.saved_tensors, grad_loss, ctx.masked), *(None,) * 6)


def _differentiable_gradient(
    student: Tensor, teacher: Tensor, attention: Tensor, grad_loss: Tensor, masked: bool
) -> Tensor:
    """The gradient in PyTorch, which autograd records for second order."""
    factor = (attention * grad_loss.reshape(-1, 1, 1)).unsqueeze(1)
    diff = student.to(attention.dtype) - teacher.to(attention.dtype)
    if masked:  # an invalid pixel, whose attention is 0, may hold NaN
        diff = diff.masked_fill(attention.unsqueeze(1) == 0, 0.0)
    return (factor * diff).to(student.dtype)


# --- The operator that torch.compile sees on a GPU ------------------------------------------------


def _flat(source: Masks | Tokens) -> tuple[Any, ...]:
    """What a registered operator can take: tensors and lists of them."""
    if isinstance(source, Masks):
        return source.masks, source.weights, None, [], None, 0
    return None, None, source.mask_token, list(source.weighting), *source[2:]


@torch.library.custom_op("pixdistill::masked_distance", mutates_args=())
def masked_distance_op(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor | None,
    weights: Tensor | None,
    mask_token: Tensor | None,
    weighting: Sequence[Tensor],
    steps: Tensor | None,
    customize_after: int,
    valid_mask: Tensor | None,
    eps: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the attention `[B, H, W]`, and sums that begin with mask areas and valid pixels."""
    source: Masks | Tokens
    if mask_token is None:
        assert masks is not None
        source = Masks(masks, weights)
    else:
        source = Tokens(mask_token, tuple(weighting), steps, customize_after)
    return _implementation("triton").forward(student, teacher, source, valid_mask, eps, reduction)


@masked_distance_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor | None,
    weights: Tensor | None,
    mask_token: Tensor | None,
    weighting: Sequence[Tensor],
    steps: Tensor | None,
    customize_after: int,
    valid_mask: Tensor | None,
    eps: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, height, width = student.shape
    tokens = masks.shape[1] if masks is not None else mask_token.shape[0]  # type: ignore[union-attr]
    windows = 9 * channels if weighting else 0
    new = functools.partial(student.new_empty, dtype=torch.float32)
    loss = new((images,) if reduction == "none" else ())
    return loss, new((images, height, width)), new((images, tokens + 1 + windows))


@torch.library.custom_op("pixdistill::masked_distance_grad", mutates_args=())
def masked_distance_grad_op(
    student: Tensor, teacher: Tensor, attention: Tensor, grad_loss: Tensor, masked: bool
) -> Tensor:
    """The gradient of the student."""
    return _implementation("triton").backward(student, teacher, attention, grad_loss, masked)


@masked_distance_grad_op.register_fake
def _(
    student: Tensor, teacher: Tensor, attention: Tensor, grad_loss: Tensor, masked: bool
) -> Tensor:
    return torch.empty_like(student)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.masked, ctx.lists = inputs[8] is not None, [None] * len(inputs[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grad = None
    if grad_loss is not None:
        grad = masked_distance_grad_op(*ctx.saved_tensors, grad_loss, ctx.masked)
    return (grad, *(None,) * 4, ctx.lists, *(None,) * 5)


masked_distance_op.register_autograd(_backward, setup_context=_setup_context)
