"""The masked feature loss (MasKD, ICLR 2023, arXiv 2205.14589).

With masks m_k and token weights w_k that frozen tokens k read off the teacher's map t, the loss of an
image with channels c and pixels p is

    sum_k w_k * mean_c sum_p (m_kp (s_cp - t_cp))^2 / (sum_p m_kp + eps) = sum_p a_p d_p,

    a_p = sum_k w_k m_kp^2 / (sum_p m_kp + eps),    d_p = mean_c (s_cp - t_cp)^2.

Summing the channels first leaves nothing with both axes, tokens and channels, and the gradient with
respect to the student is one more pass over the maps, 2 a_p (s_cp - t_cp) / C.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks
from .ops.backend import detached, sum_dtype
from .receptive_tokens import MaskedReceptiveTokens

REDUCTIONS = ("mean", "sum", "none")

# Numbers of a block of rows, which a pass keeps in cache: 2 MiB on a CPU, 16 MiB on a GPU.
_CPU_BLOCK, _CUDA_BLOCK = 2**19, 2**22


class MaskedDistillationComponents(NamedTuple):
    """What `MaskedDistillationLoss.components` returns; both carry the gradient."""

    loss: Tensor
    """The loss that `forward` returns."""
    levels: Tensor
    """The loss of each level `[L]` (`[L, B]` for `reduction="none"`); `loss` is their sum."""


def masked_distance(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    *,
    eps: float = 1e-5,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """The masked squared distance of each image `[B]`, differentiable (twice) in the student.

    It equals this, without the tensor of five axes:

        masked = masks.unsqueeze(2) * (student - teacher).unsqueeze(1)  # [B, T, C, H, W]
        (weights * masked.square().sum((3, 4)).mean(2) / (masks.sum((2, 3)) + eps)).sum(1)

    Args:
        student, teacher: `[B, C, H, W]`; the teacher is detached.
        masks: `[B, T, H, W]`, not negative; detached.
        weights: `[B, T]`, detached; None for 1/T.
        eps: added to the sum of a mask. A mask that is zero everywhere adds nothing, also for 0.
        valid_mask: `[B, H, W]` bool. A pixel that is False is neither compared nor counted in the sum
            of a mask, and may hold NaN.

    Returns:
        `[B]`, float64 for a float64 student and float32 otherwise.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
    """
    _checks.map_2d("teacher", teacher)
    _checks.map_2d("student", student, teacher.shape[1])
    _checks.same_pixels("student", student, teacher)
    _checks.mask(valid_mask, student.shape[:1] + student.shape[2:], student)
    _checks.map_2d("masks", masks)
    _checks.same_pixels("masks", masks, teacher)
    _checks.token_weights(weights, masks)
    _checks.nonnegative("eps", eps)
    dtype = sum_dtype(student)
    with torch.no_grad():
        shares = 1 / masks.shape[1] if weights is None else weights.to(dtype)
        attention = _attention(masks.to(dtype), shares, eps, valid_mask)
    teacher = detached(teacher)
    valid_mask = None if valid_mask is None else detached(valid_mask)
    if not torch.compiler.is_compiling():
        return _MaskedDistance.apply(student, teacher, attention, valid_mask)
    # A compiler fuses the plain formula and its gradient by itself.
    square = _gap(student, teacher, dtype, valid_mask).square()
    return (attention * square.sum(dim=1)).sum(dim=(1, 2)) / student.shape[1]


class MaskedDistillationLoss(nn.Module):
    """The distance of student and teacher where the tokens' masks are: `loss(student, teacher)`.

    MasKD for detection: FPN levels, 6 weighted tokens each, an alignment, `eps=0`, `customize_after`
    from 5000 to 8500, and the loss times 1 (two-stage), 7 (RetinaNet) or 10 (FCOS, RepPoints). For
    segmentation: logits, 8 tokens with `weighted=False`, the defaults here, and the loss times 0.5.

    Args:
        tokens: a `MaskedReceptiveTokens`, or a sequence of them, one a level. They become submodules
            and are frozen: `requires_grad` is set to False, and no gradient is computed for them.
        student_channels: width of the student's maps, an int or one a level. When given, `align` holds
            a 1x1 convolution to the teacher's width a level. It trains with the student, so the
            optimizer needs `loss.align.parameters()`.
        customize_after: n >= 0: once `step` has been called n times, masks are multiplied by the
            student's own, through which no gradient goes. None: never.
        eps: added to the sum of a mask, >= 0. A mask that is zero everywhere adds nothing, also for 0,
            where the official code has NaN.
        reduction: "mean" over images that have a valid pixel, "sum", or "none" for a loss an image.

    Shapes: student and teacher `[B, C, H, W]`, or sequences of such maps, one a level, whose losses
    are added. `valid_mask` `[B, H, W]` bool, True = used; for a sequence of maps a sequence of masks
    or None. A pixel that is False counts as deleted: in the masks, their sums, and the token weights.

    `forward` has no side effects, so it may run several times an optimizer step. Call `step` once
    after each `optimizer.step()` when `customize_after` is given; the count is the buffer `steps`.
    Whether it has passed n is decided on the device: nothing synchronises or recompiles then, but the
    student's masks are computed from the start (one pass over the student's map).

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        RuntimeError: PyTorch's own, under `torch.func.grad`, `vmap` and `jvp`.

    Example:
        >>> tokens = MaskedReceptiveTokens(16, num_tokens=4)
        >>> loss = MaskedDistillationLoss(tokens, student_channels=8)
        >>> student = torch.randn(2, 8, 8, 8, requires_grad=True)
        >>> loss(student, torch.randn(2, 16, 8, 8)).backward()

    Source: the official `mmrazor/.../losses/maskd.py` and `segmentation/losses/maskd.py`.
    """

    steps: Tensor

    def __init__(
        self,
        tokens: MaskedReceptiveTokens | Sequence[MaskedReceptiveTokens] | nn.ModuleList,
        *,
        student_channels: int | Sequence[int] | None = None,
        customize_after: int | None = None,
        eps: float = 1e-5,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _checks.nonnegative("eps", eps)
        _checks.choice("reduction", reduction, REDUCTIONS)
        if customize_after is not None:
            _checks.integer("customize_after", customize_after, minimum=0)
        levels = _token_levels(tokens)
        self.tokens = nn.ModuleList(levels).requires_grad_(False)
        self.student_channels = _widths(student_channels, len(levels))
        self.align = None
        if self.student_channels is not None:
            pairs = zip(self.student_channels, levels, strict=True)
            self.align = nn.ModuleList(nn.Conv2d(w, level.channels, 1) for w, level in pairs)
        self.customize_after = customize_after
        self.eps = eps
        self.reduction = reduction
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the count of steps to 0; tokens and `align` have a `reset_parameters` of their own."""
        self.steps.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step; `customize_after` compares with this count."""
        self.steps += 1

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        *,
        valid_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss, added up over levels; a scalar unless `reduction="none"`, `[B]` then."""
        return self.components(student, teacher, valid_mask=valid_mask).loss

    def components(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        *,
        valid_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> MaskedDistillationComponents:
        """The loss, and its value at each level."""
        count = len(self.tokens)
        students = _levels("student", student, count)
        teachers = _levels("teacher", teacher, count)
        valid = (None,) * count if valid_mask is None else _levels("valid_mask", valid_mask, count)
        levels = torch.stack(
            [self._level(i, students[i], teachers[i], valid[i]) for i in range(count)]
        )
        return MaskedDistillationComponents(levels.sum(dim=0), levels)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        return (
            f"student_channels={self.student_channels}, customize_after={self.customize_after}, "
            f"eps={self.eps:g}, reduction={self.reduction!r}"
        )

    def _level(
        self, level: int, student: Tensor, teacher: Tensor, valid_mask: Tensor | None
    ) -> Tensor:
        tokens = self.tokens[level]
        assert isinstance(tokens, MaskedReceptiveTokens)
        _checks.map_2d("teacher", teacher, tokens.channels)
        if self.student_channels is None:
            _checks.map_2d(
                "student", student, tokens.channels, ". Give student_channels to align it."
            )
        else:
            _checks.map_2d("student", student, self.student_channels[level])
        _checks.same_pixels("student", student, teacher)
        _checks.mask(valid_mask, student.shape[:1] + student.shape[2:], student)
        teacher = detached(teacher)
        if self.align is not None:
            if valid_mask is not None:
                # A NaN at an invalid pixel must not reach the weight's gradient.
                student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)
            student = _convolve(self.align[level], student)
        with torch.no_grad():
            masks = tokens.masks(teacher)
            weights = tokens.weights(teacher, valid_mask=valid_mask)
            if self.customize_after is not None:
                own = tokens.masks(student)
                masks = masks * own.masked_fill(self.steps < self.customize_after, 1.0)
        distance = masked_distance(
            student, teacher, masks, weights, eps=self.eps, valid_mask=valid_mask
        )
        if self.reduction == "mean":
            if valid_mask is None:
                return distance.sum() / max(distance.numel(), 1)
            return distance.sum() / valid_mask.flatten(1).any(dim=1).sum().clamp_min(1)
        return distance.sum() if self.reduction == "sum" else distance


class _MaskedDistance(torch.autograd.Function):
    """`(attention * (student - teacher).square().mean(1)).sum((1, 2))`, keeping only its inputs.

    It runs over blocks of rows, so that what lies between two operations stays in cache.
    """

    @staticmethod
    def forward(ctx, student, teacher, attention, valid_mask):
        ctx.save_for_backward(student, teacher, attention, valid_mask)
        distance = torch.empty_like(attention)
        for rows, gap in _gaps(student, teacher, attention.dtype, valid_mask):
            distance[:, rows] = gap.square_().sum(dim=1)
        return (attention * distance).sum(dim=(1, 2)) / student.shape[1]

    @staticmethod
    def backward(ctx, grad):
        student, teacher, attention, valid_mask = ctx.saved_tensors
        factor = (attention * (2 / student.shape[1] * grad)[:, None, None]).unsqueeze(1)
        # With create_graph=True autograd records this in its turn.
        gradient = torch.empty_like(student)
        for rows, gap in _gaps(student, teacher, attention.dtype, valid_mask):
            gradient[:, :, rows] = gap.mul_(factor[:, :, rows])
        return gradient, None, None, None


def _gap(student: Tensor, teacher: Tensor, dtype: torch.dtype, valid_mask: Tensor | None) -> Tensor:
    """`student - teacher`, and 0 at invalid pixels, whatever they hold."""
    gap = (student.to(dtype) - teacher).to(dtype)  # a float64 teacher promotes
    return gap if valid_mask is None else gap.masked_fill(~valid_mask.unsqueeze(1), 0.0)


def _gaps(
    student: Tensor, teacher: Tensor, dtype: torch.dtype, valid_mask: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """`_gap` by blocks of rows, which suit contiguous and channels-last maps alike."""
    block = _CUDA_BLOCK if student.device.type == "cuda" else _CPU_BLOCK
    step = max(1, block // max(1, student[:, :, :1].numel()))
    for start in range(0, student.shape[2], step):
        rows = slice(start, start + step)
        seen = None if valid_mask is None else valid_mask[:, rows]
        yield rows, _gap(student[:, :, rows], teacher[:, :, rows], dtype, seen)


def _attention(
    masks: Tensor, weights: Tensor | float, eps: float, valid_mask: Tensor | None
) -> Tensor:
    """`sum_t w_t m_t^2 / (sum(m_t) + eps)` `[B, H, W]`; 0 at invalid pixels."""
    if valid_mask is not None:
        masks = masks.masked_fill(~valid_mask.unsqueeze(1), 0.0)
    # A mask that is zero everywhere must not become 0/0. Multiplying by the inverse before squaring
    # keeps tiny masks from vanishing.
    area = (masks.sum(dim=(2, 3)) + eps).clamp_min(torch.finfo(masks.dtype).tiny)
    return (masks * (weights / area)[:, :, None, None] * masks).sum(dim=1)


def _token_levels(
    tokens: MaskedReceptiveTokens | Sequence[MaskedReceptiveTokens] | nn.ModuleList,
) -> list[MaskedReceptiveTokens]:
    if isinstance(tokens, (Sequence, nn.ModuleList)):
        levels = [level for level in tokens if isinstance(level, MaskedReceptiveTokens)]
        if len(levels) == len(tokens) > 0:
            return levels
    elif isinstance(tokens, MaskedReceptiveTokens):
        return [tokens]
    raise TypeError(
        f"tokens must be a MaskedReceptiveTokens or a sequence of them, one a level; got {tokens!r}"
    )


def _widths(student_channels: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """The student's width at each level."""
    if student_channels is None:
        return None
    if isinstance(student_channels, Sequence):
        widths = tuple(student_channels)
    else:
        widths = (student_channels,) * count
    if len(widths) != count:
        raise ValueError(
            f"student_channels must be an int, or {count} of them, one a level; "
            f"got {student_channels!r}"
        )
    for width in widths:
        _checks.integer("student_channels", width)
    return widths


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution; as a matrix product where a compiler would specialise on its map size."""
    if not torch.compiler.is_compiling():
        return layer(x)
    weight, bias = layer.parameters()
    product = torch.bmm(weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2))
    return (product + bias.to(product.dtype).unsqueeze(1)).unflatten(2, x.shape[2:])


def _levels(name: str, values: Any, count: int) -> Sequence[Any]:
    """One entry a level: a tensor is the only one."""
    levels = [values] if isinstance(values, Tensor) else values
    if not isinstance(levels, Sequence):
        got = type(values).__name__
        raise TypeError(f"{name} must be a tensor or a sequence of them; got {got}")
    if len(levels) != count:
        raise ValueError(f"{name} must have one entry a level, {count}; got {len(levels)}")
    return levels
