"""The settings of Af-DCD's loss, which function, module and operator share."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import _checks
from ..backend import BACKENDS, Backend
from ..patch_lse import DISTANCES, NEGATIVES, Distance, Negatives, PatchSettings

Contrast = Literal["omni", "spatial", "channel"]
Ragged = Literal["error", "pad"]
MimicReduction = Literal["sum", "mean"]


class Settings(NamedTuple):
    """As `af_dcd_loss` documents them. Those that `checked` returns have pairs for both sizes."""

    contrast: Contrast
    num_groups: int
    patch_size: Any
    pool_size: Any
    temperature: float
    distance: Distance
    negatives: Negatives
    ragged: Ragged
    mimic_reduction: MimicReduction
    mimic_weight: float
    contrast_weight: float
    backend: Backend

    def checked(self) -> "Settings":
        """Raise where an argument does not fit, or where a vector would have no negatives."""
        settings = Settings(
            _checks.choice("contrast", self.contrast, ("omni", "spatial", "channel")),
            _checks.integer("num_groups", self.num_groups),
            _checks.pair("patch_size", self.patch_size),
            _checks.pair("pool_size", 1 if self.pool_size is None else self.pool_size),
            _checks.positive("temperature", self.temperature),
            _checks.choice("distance", self.distance, DISTANCES),
            _checks.choice("negatives", self.negatives, NEGATIVES),
            _checks.choice("ragged", self.ragged, ("error", "pad")),
            _checks.choice("mimic_reduction", self.mimic_reduction, ("sum", "mean")),
            _checks.nonnegative("mimic_weight", self.mimic_weight),
            _checks.nonnegative("contrast_weight", self.contrast_weight),
            _checks.choice("backend", self.backend, BACKENDS),
        )
        groups, patch, _, _, negatives = settings.patch
        if (
            not settings.has_contrast
            or groups > 1
            or (patch != (1, 1) and negatives == "all_others")
        ):
            return settings
        if self.contrast == "spatial":
            raise ValueError(
                'patch_size must exceed one pixel in "spatial": there would be no negatives'
            )
        raise ValueError(
            f'num_groups must be at least 2 in "{self.contrast}" with negatives={negatives!r} and '
            f"patch_size={self.patch_size}: there would be no negatives; got 1"
        )

    def check_groups(self, name: str, channels: int) -> None:
        """Raise where the groups of the contrast do not divide the channels."""
        if self.has_contrast and channels % self.patch.num_groups:
            raise ValueError(
                f"num_groups must divide the {name}'s {channels} channels; got {self.num_groups}"
            )

    def padding(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and columns that a map `[B, C, H, W]` lacks; raises where none may be added."""
        (ph, pw), (p, q) = self.pool_size, self.patch.patch_size
        below, right = -shape[2] % (ph * p), -shape[3] % (pw * q)
        if (below or right) and self.ragged == "error":
            raise ValueError(
                f"student and teacher must have a height and width that {ph * p} and {pw * q}, "
                f"pool_size times patch_size, divide; got {tuple(shape)}. Use "
                'ragged="pad", or resize both.'
            )
        return below, right

    @property
    def patch(self) -> PatchSettings:
        """The settings of `patch_lse`, which has all designs."""
        groups, patch, negatives = self.num_groups, self.patch_size, self.negatives
        if self.contrast == "spatial":
            groups, negatives = 1, "all_others"
        elif self.contrast == "channel":
            patch = (1, 1)
        return PatchSettings(groups, tuple(patch), self.temperature, self.distance, negatives)

    @property
    def has_mimic(self) -> bool:
        """Whether the mimic term is computed."""
        return self.mimic_weight > 0

    @property
    def has_contrast(self) -> bool:
        """Whether the contrast is computed."""
        return self.contrast_weight > 0

    @property
    def is_pooled(self) -> bool:
        """Whether the contrast is computed on pooled maps."""
        return self.has_contrast and tuple(self.pool_size) != (1, 1)


class Upstream(NamedTuple):
    """The gradient of a term: a 0-dim tensor times a number."""

    tensor: Tensor
    weight: float
