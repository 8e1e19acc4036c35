"""What `patch_lse` takes beside its maps."""

from typing import Literal, NamedTuple

Distance = Literal["l1", "l2"]
Negatives = Literal["other_groups", "all_others"]
DISTANCES: tuple[Distance, ...] = ("l1", "l2")
NEGATIVES: tuple[Negatives, ...] = ("other_groups", "all_others")


class PatchSettings(NamedTuple):
    """Which vectors meet, and how their distance counts."""

    num_groups: int
    patch_size: tuple[int, int]
    temperature: float
    distance: Distance
    negatives: Negatives
