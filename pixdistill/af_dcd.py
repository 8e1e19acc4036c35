"""Augmentation-free dense contrastive distillation (Af-DCD, NeurIPS 2023, arXiv 2312.04168).

The student's map, with a random share of its pixels set to zero, is rebuilt by a small projector; the
rebuilt map f is compared with the teacher's map t in two ways. Mimicking is their squared distance.
Contrast cuts max-pooled maps into patches, and the channels of a pixel into groups, and asks each
vector f_i (one group of one pixel) to be closer to t_i than to other teacher vectors of its patch,

    mimic    = sum (f - t)^2 / B
    contrast = sum_i -log( exp(x_ii) / (exp(x_ii) + sum_n exp(x_in)) ) / number of pooled pixels,
               x_ij = -|f_i - t_j| / tau.

The sum over the negatives is made by `ops.patch_lse` in one pass, with its gradient and without the
rearranged copies, distance matrices and masks of the plain form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from ._projectors import projector_of
from .ops.backend import BACKENDS, detached
from .ops.patch_lse import DISTANCES, NEGATIVES, patch_lse

CONTRASTS = ("omni", "spatial", "channel")
MIMIC_REDUCTIONS = ("sum", "mean")
RAGGED = ("error", "pad")


class AfDCDComponents(NamedTuple):
    """The two terms, unweighted; both carry a gradient."""

    mimic: Tensor
    """Squared distance of the rebuilt map from the teacher's."""
    contrast: Tensor
    """Cross-entropy of the vectors of a pooled pixel, summed over its groups, averaged over pixels."""


def af_dcd_terms(
    student: Tensor,
    teacher: Tensor,
    *,
    contrast: str = "omni",
    num_groups: int = 16,
    patch_size: int | tuple[int, int] = 4,
    pool_size: int | tuple[int, int] | None = 4,
    temperature: float = 0.07,
    distance: str = "l1",
    negatives: str = "other_groups",
    ragged: str = "error",
    mimic_reduction: str = "sum",
    valid_mask: Tensor | None = None,
    backend: str = "auto",
) -> AfDCDComponents:
    """Mimic and contrast terms of a student's rebuilt map against a frozen teacher's.

    Args:
        student: `[B, C, H, W]`, the projector's output f.
        teacher: the same shape; detached.
        contrast: "omni", all groups of all pixels of a patch; "spatial", whole pixels against the other
            pixels of the patch; "channel", groups of a pixel against its other groups.
        num_groups: groups of consecutive channels; must divide C. "spatial" has none.
        patch_size: height and width of a patch of the pooled map. "channel" has none.
        pool_size: window and stride of the max-pooling of both maps before the contrast; None or 1
            for none.
        temperature: tau > 0.
        distance: "l1" as in the official code, or "l2".
        negatives: for "omni", "other_groups" takes the vectors of the patch in other groups, as the
            official code does; "all_others" takes all but the positive.
        ragged: what happens to a map that pool_size and patch_size do not divide. "error" raises;
            "pad" fills the last windows and patches up with pixels that take no part.
        mimic_reduction: "sum" over all numbers, divided by B, or "mean" over all numbers. The sum is
            the mean times C and the (valid) pixels of an image.
        valid_mask: `[B, H, W]` bool. A pixel that is False takes part in neither term, nor in pooling.
        backend: as in `ops.patch_lse`.

    Returns:
        Two scalars, float64 for a float64 map and float32 otherwise; zero, and still attached to the
        graph, where nothing is valid.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Source: `losses/ocmgd.py` of the official code, from which it departs in that the teacher gets no
    gradient and that no map is cropped.
    """
    groups, patch, rule = _design(contrast, num_groups, patch_size, negatives)
    pool = (1, 1) if pool_size is None else _checks.pair("pool_size", pool_size)
    _checks.choice("ragged", ragged, RAGGED)
    _checks.choice("mimic_reduction", mimic_reduction, MIMIC_REDUCTIONS)
    _checks.map_2d("student", student)
    _checks.maps(student, teacher)
    _checks.mask(valid_mask, student.shape[:1] + student.shape[2:], student)
    _check_groups("student", student.shape[1], groups)
    tile = (pool[0] * patch[0], pool[1] * patch[1])
    if ragged == "error" and (student.shape[2] % tile[0] or student.shape[3] % tile[1]):
        raise ValueError(
            f"student and teacher must have a height and width that {tile[0]} and {tile[1]}, pool_size "
            f"times patch_size, divide; got {tuple(student.shape)}. Resize them, choose other sizes, or "
            'take ragged="pad".'
        )
    teacher = detached(teacher)
    mimic = _mimic(student, teacher, mimic_reduction, valid_mask)
    if pool != (1, 1):
        whole = ragged == "error"
        student, teacher = (_pool(x, pool, valid_mask, whole) for x in (student, teacher))
        if valid_mask is not None:
            valid_mask = _pool(valid_mask.unsqueeze(1).float(), pool, None, whole)[:, 0] > 0
    margin = patch_lse(
        student,
        teacher,
        groups=groups,
        patch=patch,
        temperature=temperature,
        distance=distance,
        negatives=rule,
        valid_mask=valid_mask,
        backend=backend,
    )
    total = F.softplus(margin, threshold=40).sum()  # exact to rounding in float64 too
    pixels = max(margin[:, 0].numel(), 1) if valid_mask is None else valid_mask.sum().clamp_min(1)
    return AfDCDComponents(mimic, total / pixels)


class AfDCDLoss(nn.Module):
    """Masked mimicking and dense contrast inside patches: `loss(student, teacher)`.

    `mimic_weight * mimic + contrast_weight * contrast`, with the terms of `af_dcd_terms` for the map
    that the projector rebuilds from the student's. The defaults are the official ones for Cityscapes.

    Args:
        student_channels: channels of the student's map. Where they differ from the teacher's, `align`,
            a 1x1 convolution, brings them to it; otherwise `align` is None.
        teacher_channels: channels of the teacher's map.
        mask_ratio: probability of a pixel to be set to zero before the projector, in train mode.
        projector: "plain", conv3x3 - ReLU - conv3x3; "enhanced", two conv3x3 - ReLU in a row, a conv3x3
            on the output of each, and their mean; or a module that keeps the shape
            `[B, teacher_channels, H, W]`.
        mimic_weight: of the mimic term. With the sum it is tied to the size of the map.
        contrast_weight: of the contrast term.

    All other arguments are those of `af_dcd_terms`.

    The parameters of `align` and `projector` are trained with the student's, and saved with this
    module. The teacher never receives a gradient.

    Shapes: student `[B, student_channels, H, W]`, teacher `[B, teacher_channels, H, W]`.

    Example:
        >>> loss = AfDCDLoss(8, 32)
        >>> student = torch.randn(2, 8, 16, 32, requires_grad=True)
        >>> loss(student, torch.randn(2, 32, 16, 32)).backward()
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        contrast: str = "omni",
        num_groups: int = 16,
        patch_size: int | tuple[int, int] = 4,
        pool_size: int | tuple[int, int] | None = 4,
        temperature: float = 0.07,
        distance: str = "l1",
        negatives: str = "other_groups",
        ragged: str = "error",
        mask_ratio: float = 0.75,
        projector: str | nn.Module = "plain",
        mimic_weight: float = 2e-6,
        contrast_weight: float = 5e-3,
        mimic_reduction: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.integer("student_channels", student_channels)
        _checks.integer("teacher_channels", teacher_channels)
        groups, _, _ = _design(contrast, num_groups, patch_size, negatives)
        _check_groups("teacher", teacher_channels, groups)
        if pool_size is not None:
            _checks.pair("pool_size", pool_size)
        _checks.positive("temperature", temperature)
        _checks.choice("distance", distance, DISTANCES)
        _checks.choice("ragged", ragged, RAGGED)
        _checks.fraction("mask_ratio", mask_ratio)
        _checks.nonnegative("mimic_weight", mimic_weight)
        _checks.nonnegative("contrast_weight", contrast_weight)
        _checks.choice("mimic_reduction", mimic_reduction, MIMIC_REDUCTIONS)
        _checks.choice("backend", backend, BACKENDS)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.mask_ratio, self.mimic_weight = mask_ratio, mimic_weight
        self.contrast_weight, self.contrast, self.num_groups = contrast_weight, contrast, num_groups
        self.patch_size, self.pool_size = patch_size, pool_size
        self.temperature, self.distance, self.negatives = temperature, distance, negatives
        self.ragged, self.mimic_reduction, self.backend = ragged, mimic_reduction, backend
        same = student_channels == teacher_channels
        self.align = None if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.projector = projector_of(projector, teacher_channels)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        valid_mask: Tensor | None = None,
        drop_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The weighted sum of the two terms, a scalar; arguments as in `components`."""
        mimic, contrast = self.components(
            student, teacher, valid_mask=valid_mask, drop_mask=drop_mask, generator=generator
        )
        return self.mimic_weight * mimic + self.contrast_weight * contrast

    def components(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        valid_mask: Tensor | None = None,
        drop_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AfDCDComponents:
        """The two terms, unweighted.

        Args:
            student: `[B, student_channels, H, W]`.
            teacher: `[B, teacher_channels, H, W]`.
            valid_mask: `[B, H, W]` bool, True = used. Other pixels are zero for the projector, and may
                hold NaN.
            drop_mask: `[B, H, W]` bool, True = set to zero before the projector. Without it, train mode
                draws one and eval mode has none.
            generator: what draws the mask, on the student's device; by default PyTorch's own.
        """
        remedy = f". This module was made for {self.teacher_channels} teacher channels."
        _checks.map_2d("teacher", teacher, self.teacher_channels, remedy)
        remedy = f". This module was made for {self.student_channels} student channels."
        _checks.map_2d("student", student, self.student_channels, remedy)
        _checks.same_pixels("student", student, teacher)
        pixels = (student.shape[0], *student.shape[2:])
        _checks.mask(valid_mask, pixels, student)
        _checks.mask(drop_mask, pixels, student, name="drop_mask", meaning="set to zero")
        if drop_mask is None and self.training and self.mask_ratio > 0:
            noise = torch.empty(pixels, device=student.device).uniform_(generator=generator)
            drop_mask = noise < self.mask_ratio
        if valid_mask is not None:  # a NaN must not reach the gradient of the alignment
            student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)
            drop_mask = ~valid_mask if drop_mask is None else drop_mask | ~valid_mask
        if self.align is not None:
            student = self.align(student)
        if drop_mask is not None:  # a product, so that a NaN shows in the loss
            student = student * ~drop_mask.unsqueeze(1)
        rebuilt = self.projector(student)
        made = getattr(rebuilt, "shape", type(rebuilt))
        if made != teacher.shape:
            raise ValueError(
                f"projector must keep the shape {tuple(teacher.shape)}; it made {made}"
            )
        return af_dcd_terms(
            rebuilt,
            teacher,
            contrast=self.contrast,
            num_groups=self.num_groups,
            patch_size=self.patch_size,
            pool_size=self.pool_size,
            temperature=self.temperature,
            distance=self.distance,
            negatives=self.negatives,
            ragged=self.ragged,
            mimic_reduction=self.mimic_reduction,
            valid_mask=valid_mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        return (
            f"{self.student_channels}, {self.teacher_channels}, contrast={self.contrast!r}, "
            f"num_groups={self.num_groups}, patch_size={self.patch_size}, pool_size={self.pool_size}, "
            f"temperature={self.temperature:g}, distance={self.distance!r}, "
            f"negatives={self.negatives!r}, ragged={self.ragged!r}, mask_ratio={self.mask_ratio:g}, "
            f"mimic_weight={self.mimic_weight:g}, contrast_weight={self.contrast_weight:g}, "
            f"mimic_reduction={self.mimic_reduction!r}, backend={self.backend!r}"
        )


def _design(
    contrast: str, num_groups: int, patch_size: int | tuple[int, int], negatives: str
) -> tuple[int, tuple[int, int], str]:
    """Groups, patch and rule of negatives by which the one primitive makes a design."""
    _checks.choice("contrast", contrast, CONTRASTS)
    _checks.choice("negatives", negatives, NEGATIVES)
    _checks.integer("num_groups", num_groups)
    patch = _checks.pair("patch_size", patch_size)
    if contrast == "spatial":
        if patch == (1, 1):
            raise ValueError(
                'patch_size must exceed one pixel in "spatial": it has no other negative'
            )
        return 1, patch, "all_others"
    if num_groups == 1 and (
        contrast == "channel" or negatives == "other_groups" or patch == (1, 1)
    ):
        raise ValueError(
            f'num_groups must be at least 2 in "{contrast}" with negatives={negatives!r} and '
            f"patch_size={patch_size}: it has no other negative; got 1"
        )
    return num_groups, (1, 1) if contrast == "channel" else patch, negatives


def _check_groups(name: str, channels: int, groups: int) -> None:
    if channels % groups:
        raise ValueError(f"num_groups must divide the {name}'s {channels} channels; got {groups}")


def _mimic(student: Tensor, teacher: Tensor, reduction: str, valid_mask: Tensor | None) -> Tensor:
    """Squared distance of the valid pixels: its sum divided by B, or its mean."""
    batch, channels = student.shape[:2]
    if valid_mask is not None:
        hidden = ~valid_mask.unsqueeze(1)
        student, teacher = student.masked_fill(hidden, 0.0), teacher.masked_fill(hidden, 0.0)
    dtype = torch.promote_types(student.dtype, torch.float32)  # a sum may exceed float16
    total = F.mse_loss(student.to(dtype), teacher.to(dtype), reduction="sum")
    if reduction == "sum":
        return total / max(batch, 1)
    if valid_mask is not None:
        return total / (channels * valid_mask.sum().clamp_min(1))
    return total / max(student.numel(), 1)


def _pool(x: Tensor, pool: tuple[int, int], valid_mask: Tensor | None, whole: bool) -> Tensor:
    """Maximum of each window over its valid pixels; the last windows may be partial unless `whole`."""
    if valid_mask is not None:
        x = x.masked_fill(~valid_mask.unsqueeze(1), -torch.inf)
    if whole and not x.requires_grad:  # max_pool2d also seeks the places, which takes a CPU longer
        return x.unflatten(-2, (-1, pool[0])).amax(-2).unflatten(-1, (-1, pool[1])).amax(-1)
    return F.max_pool2d(x, pool, ceil_mode=True)
