"""`patch_lse`: contrast of student vectors with the teacher's inside patches, with its gradient.

The channels of a pixel are cut into groups, and the map into patches. A vector is one group of one
pixel, and meets the vectors of its own patch only. Logits are minus distance over temperature,
`x_ij = -|s_i - t_j| / tau`. For each student vector, the result is the log-sum-exp over its negatives
relative to its positive, the teacher's vector of the same pixel and group,

    margin_i = log sum_j exp(x_ij) - x_ii,    so that    cross-entropy_i = softplus(margin_i).

The teacher is frozen, so the pass that computes a margin has its whole gradient when it ends,

    d margin_i / d s_i = (grad|s_i - t_i| - sum_j softmax_j(x_ij) * grad|s_i - t_j|) / tau,

where the gradient of the L1 distance is the sign and that of L2 the unit vector, both 0 at 0. Backward
is one multiplication. Nothing is stored but the margin and this gradient.

`patch_lse` is the public function. Its forms compute without checks and without autograd, for it and
for `ops.patch_contrast`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..backend import (
    BACKENDS,
    Backend,
    FirstOrderOnly,
    choose,
    detached,
    must_be_registered,
    no_autocast,
    refuse_transforms,
    sum_dtype,
    why_no_kernel,
    without_subclass,
)
from . import chunked, reference
from .launch import MAX_WIDTH
from .settings import DISTANCES as DISTANCES
from .settings import NEGATIVES as NEGATIVES
from .settings import Distance as Distance
from .settings import Negatives as Negatives
from .settings import PatchSettings as PatchSettings


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    *,
    num_groups: int,
    patch_size: int | Sequence[int],
    temperature: float,
    distance: Distance = "l1",
    negatives: Negatives = "other_groups",
    valid_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Log-sum-exp over the negatives of a patch, relative to the positive, for each student vector.

    `softplus(patch_lse(...))` is the cross-entropy of the positive among itself and its negatives,
    without the cancellation that `log(exp(positive) + ...) - positive` suffers for small losses.

    Args:
        student: `[B, C, H, W]`, any strides.
        teacher: the same shape, any floating-point dtype; detached.
        num_groups: number of groups of consecutive channels; it divides C.
        patch_size: height and width of a patch; they divide H and W. For other maps, pad both and
            pass a `valid_mask` that is False there.
        temperature: tau > 0.
        distance: "l1", the sum of absolute differences, or "l2", the Euclidean distance.
        negatives: "other_groups", all vectors of the patch in other channel groups, or
            "all_others", all vectors of the patch but the positive.
        valid_mask: `[B, H, W]` bool. A pixel that is False has no rows and is nobody's negative. It
            may hold NaN.
        backend: "triton" is the fused kernel, "torch" the chunked form, "reference" the dense
            form, which also has second-order and forward-mode gradients, and alone takes part in
            `torch.func.grad` and its like. "auto" takes "triton" on a GPU where `why_not_triton`
            returns None, and "torch" elsewhere.

    Returns:
        `[B, num_groups, H, W]`, float64 for a float64 student and float32 for all others, also under
        autocast. -inf, with a zero gradient, where a vector is invalid or has no negative.

    Raises:
        ValueError: for shapes, sizes or devices that do not fit, and for a backend that cannot run.
        TypeError: for arguments of the wrong type.
        RuntimeError: when the fused or chunked form is differentiated twice, or in forward mode.

    Example:
        >>> student, teacher = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 8, 6, 6)
        >>> patch_lse(student, teacher, num_groups=4, patch_size=3, temperature=0.1).shape
        torch.Size([2, 4, 6, 6])
    """
    _checks.map_2d("student", student)
    _checks.maps(student, teacher)
    _checks.mask(valid_mask, student[:, 0].shape, student)
    settings = PatchSettings(
        _checks.integer("num_groups", num_groups),
        _checks.pair("patch_size", patch_size),
        _checks.positive("temperature", temperature),
        _checks.choice("distance", distance, DISTANCES),
        _checks.choice("negatives", negatives, NEGATIVES),
    )
    _checks.choice("backend", backend, BACKENDS)
    check_sizes(student, settings.num_groups, settings.patch_size)
    student, teacher = without_subclass(student), without_subclass(detached(teacher))
    if valid_mask is not None:
        valid_mask = without_subclass(valid_mask)
    if backend == "reference":
        return reference.patch_lse(student, teacher, valid_mask, settings)
    refuse_transforms("patch_lse", student)
    with_grad = torch.is_grad_enabled() and student.requires_grad
    operator = patch_lse_op if must_be_registered(student) else _PatchLSE.apply
    return operator(student, teacher, valid_mask, *settings, backend, with_grad)[0]


def check_sizes(student: Tensor, num_groups: int, patch_size: tuple[int, int]) -> None:
    """Raise where groups do not divide the channels, or patches the map."""
    if student.shape[1] < 1 or student.shape[1] % num_groups:
        raise ValueError(
            f"num_groups must divide the student's {student.shape[1]} channels; got {num_groups}"
        )
    if student.shape[2] % patch_size[0] or student.shape[3] % patch_size[1]:
        raise ValueError(
            f"patch_size must divide the map's height and width; got {patch_size} for a student of "
            f"shape {tuple(student.shape)}. Pad both maps, and hide the padding by valid_mask."
        )


def why_not_triton(student: Tensor, num_groups: int) -> str | None:
    """The reason why the fused kernel does not take this map, or None: what `backend="auto"` asks.

    A pure predicate of device, dtype and the width of a vector, C / num_groups.
    """
    if student.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {student.dtype} form"
    if student.shape[1] // num_groups > MAX_WIDTH:
        return f"it holds vectors up to width {MAX_WIDTH}, not {student.shape[1] // num_groups}"
    return why_no_kernel(student.device)


# --- The pass, without checks and without autograd ------------------------------------------------


def patch_lse_forward(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: PatchSettings,
    *,
    backend: Backend,
    with_grad: bool,
    cross_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Margin `[B, M, H, W]` in the dtype of sums, and its gradient `[B, C, H, W]` in the student's.

    With `cross_entropy`, partial sums of softplus(margin), of any shape, and the gradient of their
    sum. The gradient is None where not asked for. Nothing is checked, and autocast changes nothing.
    """
    with no_autocast(student.device):
        return _implementation(student, settings.num_groups, backend).patch_lse(
            student,
            teacher,
            valid_mask,
            settings,
            with_grad=with_grad,
            cross_entropy=cross_entropy,
        )


def _implementation(student: Tensor, num_groups: int, backend: Backend) -> ModuleType:
    choice = choose(backend, student.device, why_not_triton(student, num_groups))
    if choice != "triton" or student.numel() == 0:  # a grid without programs cannot be launched
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


# --- Autograd -------------------------------------------------------------------------------------


def _forward(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """`patch_lse_forward`, with an empty gradient where none was asked for."""
    *settings, backend, with_grad = rest
    margin, grad = patch_lse_forward(
        student,
        teacher,
        valid_mask,
        PatchSettings(*settings),
        backend=backend,
        with_grad=with_grad,
    )
    return margin, torch.empty(0, device=student.device) if grad is None else grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # Save the student so that double backward reaches this node and raises.
    ctx.save_for_backward(inputs[0], output[1])
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad_margin: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    others = (None,) * (ctx.inputs - 1)
    if grad_margin is None:
        return (None, *others)
    student, margin_grad = ctx.saved_tensors
    groups = grad_margin.shape[1]
    by_group = margin_grad.unflatten(1, (groups, margin_grad.shape[1] // groups))
    grad = (grad_margin.unsqueeze(2) * by_group).flatten(1, 2).to(margin_grad.dtype)
    if torch.is_grad_enabled():  # create_graph=True
        grad = FirstOrderOnly.apply("patch_lse", grad, grad_margin, student)
    return (grad, *others)


class _PatchLSE(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


@torch.library.custom_op(
    "pixdistill::patch_lse",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor? valid_mask, int num_groups, int[] patch_size, "
    "float temperature, str distance, str negatives, str backend, bool with_grad) -> (Tensor, Tensor)",
)
def patch_lse_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The operator under torch.compile."""
    return _forward(*inputs)


@patch_lse_op.register_fake
def _(
    student: Tensor, _teacher: Tensor, _mask: Tensor | None, num_groups: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = student.shape
    margin = student.new_empty((batch, num_groups, height, width), dtype=sum_dtype(student))
    if rest[-1]:  # with_grad
        return margin, student.new_empty(student.shape)
    return margin, student.new_empty(0, dtype=torch.float32)


patch_lse_op.register_autograd(_backward, setup_context=_save)
