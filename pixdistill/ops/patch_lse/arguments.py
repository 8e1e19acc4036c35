"""What `patch_lse` accepts."""

import math

import torch
from torch import Tensor

from ..backend import BACKENDS

DISTANCES = ("l1", "l2")
NEGATIVES = ("other_groups", "all_others")


def check(
    student, teacher, groups, patch, temperature, distance, negatives, valid_mask, backend
) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype; got {tensor.dtype}")
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            "student must have shape [B, C, H, W] equal to teacher's; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}. Resize one map to the other's "
            "height and width, and give the student the teacher's channels by a 1 x 1 convolution."
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher must be on student's device, {student.device}; got {teacher.device}. Move it."
        )
    for name, number in (("groups", groups), *(("patch", side) for side in _pair(patch))):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be made of int; got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    channels = student.shape[1]
    if channels < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0; got {temperature!r}")
    for name, word, choices in (
        ("distance", distance, DISTANCES),
        ("negatives", negatives, NEGATIVES),
        ("backend", backend, BACKENDS),
    ):
        if word not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {word!r}")
    if valid_mask is None:
        return
    if not isinstance(valid_mask, Tensor) or valid_mask.dtype != torch.bool:
        got = valid_mask.dtype if isinstance(valid_mask, Tensor) else type(valid_mask).__name__
        raise TypeError(f"valid_mask must be a bool tensor, True where a pixel counts; got {got}")
    pixels = (student.shape[0], *student.shape[2:])
    if valid_mask.shape != pixels or valid_mask.device != student.device:
        raise ValueError(
            f"valid_mask must have shape {pixels} on student's device, {student.device}; "
            f"got {tuple(valid_mask.shape)} on {valid_mask.device}"
        )


def _pair(patch) -> tuple:
    if not isinstance(patch, (tuple, list)) or len(patch) != 2:
        raise TypeError(f"patch must be a pair of int, height and width; got {patch!r}")
    return tuple(patch)
