"""Maps and modules of several levels, given as one, as a sequence or as a mapping."""

from collections.abc import Mapping, ValuesView
from typing import Any

from torch import Tensor, nn

from . import _checks


def by_key(levels: Any) -> dict[Any, Any]:
    """Entries by their keys, or by their indices where there are no keys."""
    if not are_several(levels):
        return {0: levels}
    named = isinstance(levels, (nn.ModuleDict, Mapping))
    return dict(levels.items() if named else enumerate(levels))


def are_several(levels: Any) -> bool:
    """Whether these are levels of a sequence or mapping, and not a single one."""
    if isinstance(levels, (nn.ModuleList, nn.ModuleDict, Mapping, ValuesView)):
        return True
    return _checks.is_sequence(levels) and not hasattr(levels, "dtype")  # not an array


def in_order(name: str, levels: Any, keys: list[Any]) -> list[Any]:
    """The entries for these keys. There must be one for each, and no other."""
    entries = by_key(levels)
    if set(entries) == set(keys):
        return [entries[key] for key in keys]
    remedy = ""
    if isinstance(levels, Mapping):
        one = f"{name}[{next(iter(levels), 'out')!r}]"
        remedy = f" Pass one map, such as {one}, or give tokens as a mapping with the same keys."
    raise ValueError(
        f"{name} must have one entry per level, with the keys {keys}; got {list(entries)}.{remedy}"
    )


def check_level(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    width: int,
    where: str = "",
    remedy: str = "",
) -> None:
    """A student of this width, and a mask, that fit the teacher. `where` follows names in errors."""
    _checks.map_2d(f"student{where}", student, width, remedy)
    _checks.same_pixels(f"student{where}", student, teacher)
    _checks.swapped(student, teacher)
    pixels = student.shape[:1] + student.shape[2:]
    _checks.mask(valid_mask, pixels, student, name=f"valid_mask{where}")


def container(modules: Mapping[Any, nn.Module]) -> nn.ModuleList | nn.ModuleDict:
    """A module that holds these: a list where the keys are indices."""
    return nn.ModuleList(modules.values()) if 0 in modules else nn.ModuleDict(modules)
