"""Augmentation-free dense contrastive distillation (Af-DCD, NeurIPS 2023, arXiv 2312.04168).

The student's map, with a random fraction of its pixels set to zero, is rebuilt by a small projector. The
rebuilt map f is compared with the teacher's map t in two ways. Mimicking is their squared distance.
Contrast cuts max-pooled maps into patches, and the channels of a pixel into groups, and asks each
vector f_i (one group of one pixel) to be closer to t_i than to other teacher vectors of its patch,

    mimic    = sum (f - t)^2 / B
    contrast = sum_i -log( exp(x_ii) / (exp(x_ii) + sum_n exp(x_in)) ) / number of pooled pixels,
               x_ij = -|f_i - t_j| / tau,
    loss     = mimic_weight * mimic + contrast_weight * contrast.

All of it is one autograd node, `ops.patch_contrast`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from ._projectors import projector_of
from .ops.backend import Backend, detached
from .ops.patch_contrast import Contrast, MimicReduction, Ragged, Settings, patch_contrast
from .ops.patch_lse import Distance, Negatives


class AfDCDComponents(NamedTuple):
    """The loss and its two terms; all carry a gradient."""

    loss: Tensor
    """The weighted sum of both terms."""
    mimic: Tensor
    """Squared distance of the rebuilt map from the teacher's, unweighted; 0 where its weight is 0."""
    contrast: Tensor
    """Cross-entropy per pooled pixel, summed over its vectors, unweighted; 0 where its weight is 0."""


def af_dcd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    contrast: Contrast = "omni",
    num_groups: int = 16,
    patch_size: int | Sequence[int] = 4,
    pool_size: int | Sequence[int] | None = 4,
    temperature: float = 0.07,
    distance: Distance = "l1",
    negatives: Negatives = "other_groups",
    ragged: Ragged = "error",
    mimic_reduction: MimicReduction = "sum",
    mimic_weight: float = 2e-6,
    contrast_weight: float = 5e-3,
    valid_mask: Tensor | None = None,
    backend: Backend = "auto",
    return_components: bool = False,
) -> Tensor | AfDCDComponents:
    """Mimicking and contrast of a student's rebuilt map and a frozen teacher's map.

    Args:
        student: `[B, C, H, W]`, the projector's output f.
        teacher: the same shape; detached.
        contrast: "omni", all groups of all pixels of a patch; "spatial", whole pixels against the other
            pixels of the patch; "channel", groups of a pixel against its other groups.
        num_groups: groups of consecutive channels; must divide C. Not used by "spatial".
        patch_size: height and width of a patch of the pooled map. Not used by "channel".
        pool_size: window and stride of the max-pooling of both maps before the contrast; None or 1
            for none.
        temperature: tau > 0.
        distance: "l1" as in the official code, or "l2".
        negatives: for "omni", "other_groups" takes the vectors of the patch in other groups, as the
            official code does; "all_others" takes all but the positive.
        ragged: what happens to a map that pool_size times patch_size does not divide. "error" raises;
            "pad" fills the last windows and patches with pixels that take no part.
        mimic_reduction: "sum" over all elements, divided by B, or "mean" over all elements. The sum
            is the mean times C and the number of (valid) pixels of an image.
        mimic_weight: of the mimic term. With the sum it is tied to the size of the map. With 0 the term
            is not computed.
        contrast_weight: of the contrast. With 0 it is not computed, and maps of any size fit.
        valid_mask: `[B, H, W]` bool. A pixel that is False takes part in neither term, nor in pooling.
        backend: "triton" is the fused form, "torch" the chunked one, "reference" the dense one, which
            also has second-order gradients. "auto" takes "triton" on a GPU where it runs.
        return_components: also return both terms.

    Returns:
        A scalar, float64 for float64 maps and float32 otherwise; zero, and still attached to the graph,
        where nothing is valid. With `return_components`, `AfDCDComponents`.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.
        RuntimeError: when differentiated twice, or in forward mode, unless `backend="reference"`.

    Source: `losses/ocmgd.py` of the official code; here the teacher gets no gradient, and no map is
    cropped.

    Example:
        >>> student, teacher = torch.randn(2, 32, 16, 32, requires_grad=True), torch.randn(2, 32, 16, 32)
        >>> af_dcd_loss(student, teacher).backward()
    """
    settings = Settings(
        contrast, num_groups, patch_size, pool_size, temperature, distance, negatives, ragged,
        mimic_reduction, mimic_weight, contrast_weight, backend,
    )  # fmt: skip
    _checks.flag("return_components", return_components)
    _checks.map_2d("student", student)
    _checks.maps(student, teacher)
    _checks.mask(valid_mask, student[:, 0].shape, student)
    return _loss(student, teacher, valid_mask, settings, return_components)


class AfDCDLoss(nn.Module):
    """Masked mimicking and dense contrast inside patches: `loss(student, teacher)`.

    The loss of `af_dcd_loss` for the map that the projector rebuilds from the student's. The defaults
    are the official ones for Cityscapes.

    Args:
        student_channels: channels of the student's map. Where they differ from the teacher's, a 1x1
            convolution, `align`, brings them to it.
        teacher_channels: channels of the teacher's map.
        mask_ratio: probability of a pixel to be set to zero before the projector, in train mode.
        projector: "plain", conv3x3 - ReLU - conv3x3, 18 C^2 parameters; "enhanced", two conv3x3 - ReLU
            in a row, a conv3x3 on the output of each, and their mean, 36 C^2; or a module that keeps
            the shape `[B, teacher_channels, H, W]`.

    All other arguments are those of `af_dcd_loss`. Each is an attribute of the same name, which may be
    set during training. The parameters of `align` and `projector` are trained with the student's, and
    saved with this module. The teacher never receives a gradient.

    Example:
        >>> loss = AfDCDLoss(8, 32)
        >>> student = torch.randn(2, 8, 16, 32, requires_grad=True)
        >>> loss(student, torch.randn(2, 32, 16, 32)).backward()
    """

    mimic_weight: float
    contrast_weight: float

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        contrast: Contrast = "omni",
        num_groups: int = 16,
        patch_size: int | Sequence[int] = 4,
        pool_size: int | Sequence[int] | None = 4,
        temperature: float = 0.07,
        distance: Distance = "l1",
        negatives: Negatives = "other_groups",
        ragged: Ragged = "error",
        mask_ratio: float = 0.75,
        projector: Literal["plain", "enhanced"] | nn.Module = "plain",
        mimic_weight: float = 2e-6,
        contrast_weight: float = 5e-3,
        mimic_reduction: MimicReduction = "sum",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.student_channels = _checks.integer("student_channels", student_channels)
        self.teacher_channels = _checks.integer("teacher_channels", teacher_channels)
        self.mask_ratio = _checks.fraction("mask_ratio", mask_ratio)
        settings = Settings(
            contrast, num_groups, patch_size, pool_size, temperature, distance, negatives, ragged,
            mimic_reduction, mimic_weight, contrast_weight, backend,
        ).checked()  # fmt: skip
        settings.check_groups("teacher", self.teacher_channels)
        for name, value in settings._asdict().items():
            setattr(self, name, value)
        same = self.student_channels == self.teacher_channels
        self.align = None if same else nn.Conv2d(self.student_channels, self.teacher_channels, 1)
        self.projector = projector_of(projector, self.teacher_channels)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        valid_mask: Tensor | None = None,
        drop_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_components: bool = False,
    ) -> Tensor | AfDCDComponents:
        """The loss, a scalar, or `AfDCDComponents`.

        Args:
            student, teacher: `[B, student_channels, H, W]` and `[B, teacher_channels, H, W]`.
            valid_mask: `[B, H, W]` bool, True = used. Other pixels are zero for the projector, and may
                hold NaN.
            drop_mask: `[B, H, W]` bool, True = set to zero before the projector. Without it, train mode
                draws one and eval mode has none.
            generator: what draws the mask, on the student's device; by default PyTorch's own. Inside
                activation checkpointing pass a `drop_mask` instead.
            return_components: return `AfDCDComponents` instead of the loss alone.
        """
        both = (
            ("teacher", teacher, self.teacher_channels),
            ("student", student, self.student_channels),
        )
        for name, map_, channels in both:
            built = f"This module was built for {channels} {name} channels."
            _checks.map_2d(name, map_, channels, built)
        _checks.same_pixels("student", student, teacher)
        _checks.swapped(student, teacher)
        _checks.device("AfDCDLoss", next(self.parameters(), student), student)
        pixels = (student.shape[0], *student.shape[2:])
        _checks.mask(valid_mask, pixels, student)
        _checks.mask(drop_mask, pixels, student, name="drop_mask", meaning="set to zero")
        _checks.flag("return_components", return_components)
        keep = None if drop_mask is None else ~drop_mask
        if keep is None and self.training and self.mask_ratio > 0:
            keep = _draw(1 - self.mask_ratio, student, generator)
        if valid_mask is not None:  # a NaN must not reach the gradient of the alignment
            valid_mask = detached(valid_mask)
            student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)
            keep = valid_mask if keep is None else keep & valid_mask
        if self.align is not None:
            student = self.align(student)
        if keep is not None:  # a product, so that a NaN shows in the loss
            student = student * keep.unsqueeze(1)
        rebuilt = self.projector(student)
        if getattr(rebuilt, "shape", None) != teacher.shape:
            wanted, got = tuple(teacher.shape), getattr(rebuilt, "shape", type(rebuilt))
            raise ValueError(f"projector must keep the shape {wanted}; it returned {got}")
        settings = Settings(*(getattr(self, name) for name in Settings._fields))
        return _loss(rebuilt, teacher, valid_mask, settings, return_components)

    def extra_repr(self) -> str:
        """The settings, by the constructor's names."""
        settings = [f"{name}={getattr(self, name)!r}" for name in ("mask_ratio", *Settings._fields)]
        return ", ".join([f"{self.student_channels}, {self.teacher_channels}", *settings])


def _loss(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: Settings,
    return_components: bool,
) -> Tensor | AfDCDComponents:
    """The loss of two maps of one shape, which are padded where patches do not divide them."""
    settings = settings.checked()
    if settings.has_contrast:
        settings.check_groups("student", student.shape[1])
        below, right = settings.padding(student.shape)
        if below or right:
            if valid_mask is None:
                valid_mask = torch.ones_like(student[:, 0], dtype=torch.bool)
            edges = (0, right, 0, below)
            student, teacher, valid_mask = (F.pad(x, edges) for x in (student, teacher, valid_mask))
    if valid_mask is not None:
        valid_mask = detached(valid_mask)
    terms = patch_contrast(student, detached(teacher), valid_mask, settings)
    return AfDCDComponents(*terms) if return_components else terms[0]


def _draw(probability: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """True with this probability, for each pixel of a map."""
    # Activation checkpointing computes the loss again in the backward pass, and restores PyTorch's own
    # generators only.
    if generator is not None and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "generator cannot draw the mask inside activation checkpointing: it would draw another one "
            "when the loss is computed again. Leave it out, or pass the mask, "
            "drop_mask=torch.rand(B, H, W, generator=generator) < mask_ratio."
        )
    mask = torch.empty((len(like), *like.shape[2:]), dtype=torch.bool, device=like.device)
    return mask.bernoulli_(probability, generator=generator)
