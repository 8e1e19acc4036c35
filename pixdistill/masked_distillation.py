"""The masked feature loss (MasKD, ICLR 2023, arXiv 2205.14589).

With masks m_t and token weights w_t that frozen tokens t compute from the teacher's map, the loss of an
image with channels c and pixels p is

    sum_t w_t * mean_c sum_p (m_tp (s_cp - t_cp))^2 / (sum_p m_tp + eps).

`ops/masked_distance` computes it; this file finds the levels, checks and aligns their maps, and adds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import _checks
from ._levels import are_several, by_key, check_level, container, in_order
from .ops.backend import BACKENDS, Backend
from .ops.masked_distance import Distance, Masks, Tokens, masked_distance
from .receptive_tokens import MaskedReceptiveTokens

Reduction = Literal["mean", "sum", "none"]
Maps = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""One map, or one per level."""


class MaskedDistillationComponents(NamedTuple):
    """What `MaskedDistillationLoss` returns with `return_components=True`."""

    loss: Tensor
    """The loss that `forward` returns otherwise."""
    levels: Tensor
    """The loss of each level `[L]`, with its gradient; `[L, B]` for `reduction="none"`."""
    areas: Tensor
    """The fraction of valid pixels that each mask covers `[L, T]`: the mean of the masks in use over the
    batch. NaN where a level has fewer tokens than another."""


def masked_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    *,
    eps: float = 1e-5,
    valid_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """The distance of student and teacher under given masks, differentiable in the student.

    For each image it equals this, without the tensor of five axes:

        masked = masks.unsqueeze(2) * (student - teacher).unsqueeze(1)  # [B, T, C, H, W]
        (weights * masked.square().sum((3, 4)).mean(2) / (masks.sum((2, 3)) + eps)).sum(1)

    Args:
        student, teacher: `[B, C, H, W]`; the teacher is detached.
        masks: `[B, T, H, W]`, not negative; detached.
        weights: `[B, T]`, detached; None for 1/T.
        eps, reduction, backend: as in `MaskedDistillationLoss`.
        valid_mask: `[B, H, W]` bool. A pixel that is False is neither compared nor counted in the area
            of a mask, and may hold NaN.

    Returns:
        A scalar, or `[B]` for `reduction="none"`; float64 for a float64 student and float32 otherwise.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Example:
        >>> student, teacher = torch.randn(2, 2, 16, 8, 8)
        >>> masked_distillation_loss(student, teacher, torch.rand(2, 4, 8, 8)).shape
        torch.Size([])
    """
    _checks.map_2d("teacher", teacher)
    check_level(student, teacher, valid_mask, teacher.shape[1])
    _checks.map_2d("masks", masks)
    _checks.shaped("masks", masks, (len(teacher), "T", *teacher.shape[2:]), teacher)
    if weights is not None:
        _checks.shaped("weights", weights, masks.shape[:2], masks)
    return masked_distance(
        student,
        teacher,
        Masks(masks, weights),
        valid_mask=valid_mask,
        eps=_checks.nonnegative("eps", eps),
        reduction=_checks.choice("reduction", reduction, get_args(Reduction)),
        backend=_checks.choice("backend", backend, BACKENDS),
    ).loss


class MaskedDistillationLoss(nn.Module):
    """The distance of student and teacher where the tokens' masks are: `loss(student, teacher)`.

    The defaults are those of MasKD for segmentation, which takes the loss times 0.5. The page "Masked
    distillation" has the settings for detection.

    Args:
        tokens: a `MaskedReceptiveTokens`, or one per level, as a sequence or as a mapping with the keys
            of the maps. They become submodules and are frozen: `requires_grad` is set to False, and no
            gradient is computed for them.
        student_channels: width of the student's maps, one for all or one per level. When given,
            `align` holds a 1x1 convolution to the teacher's width for each level. It trains with the
            student, so the optimizer needs `loss.align.parameters()`. Its modules may be replaced.
        customize_after: n >= 0: once `step` has been called n times, masks are multiplied by the
            student's own, through which no gradient goes. None: never.
        eps: added to the area of a mask, >= 0. A mask that is zero everywhere adds nothing, also for 0,
            where the official code has NaN.
        reduction: "mean" over images that have a valid pixel, "sum", or "none" for a loss per image.
        backend: "triton" has the fused kernels, "torch" the chunked form, "reference" plain autograd.
            "auto" takes the kernels on a GPU and the chunked form elsewhere.

    Shapes: student and teacher `[B, C, H, W]`, or one such map per level, as a sequence or mapping;
    the losses of the levels are added. `valid_mask` `[B, H, W]` bool, True = used, or a mask or None
    per level. A pixel that is False counts as deleted: in masks, areas and token weights.

    `forward` has no side effects, so it may run several times per optimizer step. Call `step` once
    after each `optimizer.step()` when `customize_after` is given; the count is the buffer `steps`.
    Whether it has passed n is decided on the device, so nothing synchronises or recompiles then.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names argument and level.
        RuntimeError: under `torch.func.grad`, `vmap` and `jvp`, unless the backend is "reference".

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
        tokens: MaskedReceptiveTokens
        | Sequence[MaskedReceptiveTokens]
        | Mapping[str, MaskedReceptiveTokens]
        | nn.ModuleList
        | nn.ModuleDict,
        *,
        student_channels: int | Sequence[int] | Mapping[str, int] | None = None,
        customize_after: int | None = None,
        eps: float = 1e-5,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        levels = by_key(tokens)
        if not levels or not all(isinstance(x, MaskedReceptiveTokens) for x in levels.values()):
            got = ", ".join(type(x).__name__ for x in levels.values()) or "none"
            raise TypeError(
                "tokens must be a MaskedReceptiveTokens, or a sequence or mapping of them, one per "
                f"level; got {got}"
            )
        self.tokens = container(levels).requires_grad_(False)
        self.student_channels: tuple[int, ...] | None = None
        self.align: nn.ModuleList | nn.ModuleDict | None = None
        if student_channels is not None:
            by_level: Any = student_channels
            if not are_several(student_channels):
                by_level = dict.fromkeys(levels, student_channels)
            widths = in_order("student_channels", by_level, list(levels))
            self.student_channels = tuple(_checks.integer("student_channels", w) for w in widths)
            pairs = zip(self.student_channels, levels.values(), strict=True)
            layers = [_Align(width, level.channels, kernel_size=1) for width, level in pairs]
            self.align = container(dict(zip(levels, layers, strict=True)))
        if customize_after is not None:
            customize_after = _checks.integer("customize_after", customize_after, minimum=0)
        self.customize_after = customize_after
        self.eps = _checks.nonnegative("eps", eps)
        self.reduction = _checks.choice("reduction", reduction, get_args(Reduction))
        self.backend = _checks.choice("backend", backend, BACKENDS)
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
        student: Maps,
        teacher: Maps,
        *,
        valid_mask: Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None] | None = None,
        return_components: bool = False,
    ) -> Tensor | MaskedDistillationComponents:
        """The loss, added up over levels: a scalar, or `[B]` for `reduction="none"`."""
        keys = list(by_key(self.tokens))
        if 0 in keys and isinstance(student, Mapping) and isinstance(teacher, Mapping):
            keys = list(teacher) if len(teacher) == len(keys) else keys  # the tokens have no names
        students, teachers = in_order("student", student, keys), in_order("teacher", teacher, keys)
        masks = [None] * len(keys)
        if valid_mask is not None:
            masks = in_order("valid_mask", valid_mask, keys)
        bare = not (are_several(student) or are_several(teacher))
        results = [
            self._distance(i, "" if bare else f"[{key!r}]", students[i], teachers[i], masks[i])
            for i, key in enumerate(keys)
        ]
        if len(results) == 1 and not return_components:
            return results[0].loss
        losses = torch.stack([result.loss for result in results])
        loss = losses.sum(dim=0)
        if not return_components:
            return loss
        areas = [r.areas.sum(dim=0) / r.pixels.sum().clamp_min(1) for r in results]
        padded = pad_sequence(areas, batch_first=True, padding_value=torch.nan)
        return MaskedDistillationComponents(loss, losses, padded)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        return (
            f"student_channels={self.student_channels}, customize_after={self.customize_after}, "
            f"eps={self.eps:g}, reduction={self.reduction!r}, backend={self.backend!r}"
        )

    def _distance(
        self, level: int, where: str, student: Tensor, teacher: Tensor, valid_mask: Tensor | None
    ) -> Distance:
        """The distance at one level; `where` follows the names of arguments in errors."""
        tokens = list(by_key(self.tokens).values())[level]
        width, remedy = tokens.channels, "Give student_channels to align it."
        if self.student_channels is not None:
            width, remedy = self.student_channels[level], ""
        _checks.map_2d(f"teacher{where}", teacher, tokens.channels)
        check_level(student, teacher, valid_mask, width, where, remedy)
        _checks.device("tokens", tokens.mask_token, student)
        if self.align is not None:
            if valid_mask is not None:
                # A NaN at an invalid pixel must not reach the weight's gradient.
                student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)
            student = list(by_key(self.align).values())[level](student)
            if student.shape != teacher.shape:
                raise ValueError(
                    f"align{where} must return the teacher's shape, {tuple(teacher.shape)}; "
                    f"got {tuple(student.shape)}"
                )
        steps = None if self.customize_after is None else self.steps
        return masked_distance(
            student,
            teacher,
            Tokens(tokens.mask_token, tokens.weighting, steps, self.customize_after or 0),
            valid_mask=valid_mask,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class _Align(nn.Conv2d):
    """A 1x1 convolution, which a compiler sees as a matrix product: of any size, not of one each."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        product = torch.bmm(self.weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2))
        assert self.bias is not None
        return (product + self.bias.to(product.dtype).unsqueeze(1)).unflatten(2, x.shape[2:])
