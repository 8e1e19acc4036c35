"""`patch_contrast`: Af-DCD's two terms, from a student's rebuilt map and a teacher's, in one node.

    mimic    = sum (f - t)^2 / B
    contrast = sum softplus(patch_lse(max_pool(f), max_pool(t))) / number of pooled pixels
    loss     = mimic_weight * mimic + contrast_weight * contrast

The forward pass reads both maps once, for the mimic term and the pooling, and contrasts the pooled maps
by `ops.patch_lse`, whose pass has the gradient of the pooled map when it ends. Backward writes the whole
gradient of f in one pass. What is stored between them is the pooled gradient and the position of each
maximum. A term whose weight is 0 is not computed, and is zero.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import (
    FirstOrderOnly,
    choose,
    must_be_registered,
    no_autocast,
    refuse_transforms,
    sum_dtype,
    without_subclass,
)
from ..patch_lse import why_not_triton
from . import chunked, reference
from .launch import argmax_dtype
from .settings import Contrast as Contrast
from .settings import MimicReduction as MimicReduction
from .settings import Ragged as Ragged
from .settings import Settings as Settings
from .settings import Upstream as Upstream


def patch_contrast(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mimic and contrast, scalars in the dtype of sums; nothing is checked.

    Maps `[B, C, H, W]`, any strides, the teacher's detached; valid_mask `[B, H, W]` or None. Unless
    `contrast_weight` is 0, groups divide C, and pool_size times patch_size divides H and W.
    """
    if settings.backend == "reference":
        return reference.patch_contrast(student, teacher, valid_mask, settings)
    refuse_transforms("af_dcd_loss", student)
    student, teacher = without_subclass(student), without_subclass(teacher)
    if valid_mask is not None:
        valid_mask = without_subclass(valid_mask)
    with_grad = torch.is_grad_enabled() and student.requires_grad
    operator = patch_contrast_op if must_be_registered(student) else _PatchContrast.apply
    return operator(student, teacher, valid_mask, *settings, with_grad)[:3]


def _implementation(student: Tensor, settings: Settings) -> ModuleType:
    reason = why_not_triton(student, settings.patch.num_groups)
    choice = choose(settings.backend, student.device, reason)
    if choice != "triton" or student.numel() == 0:  # a grid without programs cannot be launched
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


# --- Autograd -------------------------------------------------------------------------------------


def _forward(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Loss, mimic, contrast, and what is saved for backward."""
    *fields, with_grad = rest
    settings = Settings(*fields)
    with no_autocast(student.device):
        return _implementation(student, settings).forward(
            student, teacher, valid_mask, settings, with_grad=with_grad
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, valid_mask, *fields, _ = inputs
    ctx.settings = Settings(*fields)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    teacher = teacher if ctx.settings.has_mimic else None
    # Save the student so that double backward reaches this node and raises.
    ctx.save_for_backward(student, teacher, valid_mask, *output[3:])


def _grad(
    student: Tensor,
    teacher: Tensor | None,
    valid_mask: Tensor | None,
    contrast_grad: Tensor,
    argmax: Tensor,
    divisors: Tensor,
    grad_loss: Tensor | None,
    grad_mimic: Tensor | None,
    grad_contrast: Tensor | None,
    *rest: Any,
) -> Tensor:
    """The student's gradient."""
    settings = Settings(*rest)
    mimic = contrast = None
    if settings.has_mimic:
        mimic = _upstream(grad_loss, grad_mimic, settings.mimic_weight)
    if settings.has_contrast:
        contrast = _upstream(grad_loss, grad_contrast, settings.contrast_weight)
    with torch.no_grad():
        return _implementation(student, settings).backward(
            student,
            teacher,
            valid_mask,
            contrast_grad,
            argmax,
            divisors,
            mimic,
            contrast,
            settings,
        )


def _upstream(grad_loss: Tensor | None, grad_term: Tensor | None, weight: float) -> Upstream | None:
    """The gradient of a term, by itself and through the loss; the usual case makes no tensor."""
    if grad_loss is None:
        return None if grad_term is None else Upstream(grad_term, 1.0)
    if grad_term is None:
        return Upstream(grad_loss, weight)
    return Upstream(grad_loss * weight + grad_term, 1.0)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    others = (None,) * (3 + len(ctx.settings))
    if all(grad is None for grad in grads[:3]):
        return (None, *others)
    student, *saved = ctx.saved_tensors  # which checkpointing lets be read once
    operator = grad_op if must_be_registered(student) else _grad
    grad = operator(student, *saved, *grads[:3], *ctx.settings)
    if torch.is_grad_enabled():  # create_graph=True
        given = [g for g in grads[:3] if g is not None]
        grad = FirstOrderOnly.apply("af_dcd_loss", grad, student, *given)
    return (grad, *others)


class _PatchContrast(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


# --- Autograd under torch.compile -----------------------------------------------------------------

_SETTINGS = (
    "str contrast, int num_groups, int[] patch_size, int[] pool_size, float temperature, "
    "str distance, str negatives, str ragged, str mimic_reduction, float mimic_weight, "
    "float contrast_weight, str backend"
)


@torch.library.custom_op(
    "pixdistill::patch_contrast",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, Tensor? valid_mask, {_SETTINGS}, bool with_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def patch_contrast_op(*inputs: Any) -> tuple[Tensor, ...]:
    """The forward pass, registered with PyTorch."""
    return _forward(*inputs)


@patch_contrast_op.register_fake
def _(student: Tensor, _teacher: Tensor, _mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *fields, with_grad = rest
    settings = Settings(*fields)
    batch, channels, height, width = student.shape
    (ph, pw), dtype = settings.pool_size, sum_dtype(student)
    pooled = (batch, channels, height // ph, width // pw)
    terms = (student.new_empty((), dtype=dtype) for _ in range(3))
    contrast_grad = student.new_empty(pooled if with_grad and settings.has_contrast else (0,))
    argmax_shape = pooled if with_grad and settings.is_pooled else (0,)
    argmax = student.new_empty(argmax_shape, dtype=argmax_dtype(settings.pool_size))
    return (*terms, contrast_grad, argmax, student.new_empty(2, dtype=dtype))


@torch.library.custom_op(
    "pixdistill::patch_contrast_grad",
    mutates_args=(),
    schema="(Tensor student, Tensor? teacher, Tensor? valid_mask, Tensor contrast_grad, Tensor argmax, "
    "Tensor divisors, Tensor? grad_loss, Tensor? grad_mimic, Tensor? grad_contrast, "
    f"{_SETTINGS}) -> Tensor",
)
def grad_op(*inputs: Any) -> Tensor:
    """The backward pass, registered with PyTorch."""
    return _grad(*inputs)


@grad_op.register_fake
def _(student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


patch_contrast_op.register_autograd(_backward, setup_context=_save)
