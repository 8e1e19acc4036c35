"""`patch_lse`: contrast of student vectors with the teacher's inside patches, with its gradient.

The channels of a pixel are cut into groups, and the map into patches. A vector is one group of one
pixel, and meets the vectors of its own patch only. Logits are minus distance over temperature,
`x_ij = -|s_i - t_j| / tau`, and what is returned for each student vector is the log-sum-exp over its
negatives relative to its positive, the teacher's vector of the same pixel and group,

    margin_i = log sum_j exp(x_ij) - x_ii,    so that    cross-entropy_i = softplus(margin_i).

The teacher is frozen, so the pass that makes a margin has its whole gradient when it ends,

    d margin_i / d s_i = (slope(s_i - t_i) - sum_j softmax_j(x_ij) * slope(s_i - t_j)) / tau,

where the slope of the L1 distance is the sign and that of L2 the unit vector, both 0 at 0; backward is
one multiplication. Both maps are read in place, and nothing is stored but the margin and the gradient.

This file holds the contract, the operator registered with PyTorch, and the only choice of a backend.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..backend import (
    FirstOrderOnly,
    choose,
    refuse_transforms,
    sum_dtype,
    why_no_kernel,
)
from . import chunked, reference
from .arguments import DISTANCES as DISTANCES
from .arguments import NEGATIVES as NEGATIVES
from .arguments import check
from .launch import MAX_WIDTH


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    *,
    groups: int,
    patch: tuple[int, int],
    temperature: float,
    distance: str = "l1",
    negatives: str = "other_groups",
    valid_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-sum-exp over the negatives of a patch, relative to the positive, for each student vector.

    `softplus(patch_lse(...))` is the cross-entropy of the positive among itself and its negatives,
    free of the cancellation that `log(exp(positive) + ...) - positive` suffers for small losses.

    Args:
        student: `[B, C, H, W]`, any strides.
        teacher: the same shape, any floating-point dtype; detached.
        groups: number of groups of consecutive channels; it divides C.
        patch: height and width of a patch. Where it does not divide the map, the last patches of a
            row or column are smaller.
        temperature: tau > 0.
        distance: "l1", the sum of absolute differences, or "l2", the Euclidean distance.
        negatives: "other_groups", all vectors of the patch in other channel groups, or
            "all_others", all vectors of the patch but the positive.
        valid_mask: `[B, H, W]` bool. A pixel that is False has no rows and is nobody's negative; it
            may hold NaN.
        backend: "triton" is the fused kernel, "torch" the blocked form, "reference" the dense
            oracle, which also has second-order and forward-mode gradients, and alone takes part in
            `torch.func.grad` and its like. "auto" takes "triton" on
            a GPU where `why_not_triton` has nothing to say, "torch" elsewhere.

    Returns:
        `[B, groups, H, W]`, float64 for a float64 student and float32 for all others, also under
        autocast. -inf, with a zero gradient, where a vector is invalid or has no negative.

    Raises:
        ValueError: for shapes, sizes or devices that do not fit, and for a backend that cannot run.
        TypeError: for arguments of the wrong type.
        RuntimeError: when the fused or blocked form is differentiated twice, or in forward mode.

    Example:
        >>> student, teacher = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 8, 6, 6)
        >>> patch_lse(student, teacher, groups=4, patch=(3, 3), temperature=0.1).shape
        torch.Size([2, 4, 6, 6])
    """
    check(student, teacher, groups, patch, temperature, distance, negatives, valid_mask, backend)
    teacher = teacher.detach()
    settings = (float(temperature), distance, negatives)
    if backend == "reference":
        return reference.patch_lse(student, teacher, valid_mask, groups, patch, *settings)
    refuse_transforms("patch_lse", student)
    with_grad = torch.is_grad_enabled() and student.requires_grad
    return patch_lse_op(
        student, teacher, valid_mask, groups, *patch, *settings, backend, with_grad
    )[0]


def why_not_triton(student: Tensor, groups: int) -> str | None:
    """The reason why the fused kernel does not take this map, or None: what `backend="auto"` asks.

    A pure predicate of device, dtype and the width of a vector, C / groups.
    """
    if student.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {student.dtype} form"
    if student.shape[1] // groups > MAX_WIDTH:
        return f"it holds vectors up to width {MAX_WIDTH}, not {student.shape[1] // groups}"
    return why_no_kernel(student.device)


def _implementation(student: Tensor, groups: int, backend: str) -> ModuleType:
    """The module that computes: the only place that picks a backend."""
    if choose(backend, student.device, why_not_triton(student, groups)) != "triton":
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


# --- The operator ---------------------------------------------------------------------------------


@torch.library.custom_op("pixdistill::patch_lse", mutates_args=())
def patch_lse_op(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    groups: int,
    patch_height: int,
    patch_width: int,
    temperature: float,
    distance: str,
    negatives: str,
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Margin `[B, groups, H, W]` and its gradient `[B, C, H, W]`, empty where not asked for."""
    with torch.autocast(student.device.type, enabled=False):
        margin, grad = _implementation(student, groups, backend).patch_lse(
            student,
            teacher,
            valid_mask,
            groups,
            (patch_height, patch_width),
            temperature,
            distance,
            negatives,
            with_grad=with_grad,
        )
    return margin, student.new_empty(0) if grad is None else grad


@patch_lse_op.register_fake
def _(
    student,
    teacher,
    valid_mask,
    groups,
    patch_height,
    patch_width,
    temperature,
    distance,
    negatives,
    backend,
    with_grad,
):
    batch, _, height, width = student.shape
    dtype = sum_dtype(student)
    margin = student.new_empty((batch, groups, height, width), dtype=dtype)
    return margin, student.new_empty(student.shape if with_grad else 0)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # The student is kept because a second differentiation has to find its way back here, to be
    # refused. The teacher is not.
    ctx.save_for_backward(inputs[0], output[1])


def _backward(ctx, grad_margin, _):
    grads = (None,) * 10
    if grad_margin is None:
        return (None, *grads)
    student, slope = ctx.saved_tensors
    groups = grad_margin.shape[1]
    grad = grad_margin.unsqueeze(2) * slope.unflatten(1, (groups, slope.shape[1] // groups))
    grad = grad.flatten(1, 2).to(slope.dtype)
    if torch.is_grad_enabled():  # create_graph=True
        grad = FirstOrderOnly.apply("patch_lse", grad, grad_margin, student)
    return (grad, *grads)


patch_lse_op.register_autograd(_backward, setup_context=_setup_context)
