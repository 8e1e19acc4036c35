"""Argument checks that the losses share, which raise ValueError or TypeError and name the argument.

At the end, how the losses take what they do not train: without its graph.
"""

import math

import torch
from torch import Tensor


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Two maps `[B, C, *spatial]` of one shape, with one to three spatial axes."""
    _check_floating("student", student)
    _check_floating("teacher", teacher)
    if not 3 <= student.dim() <= 5:
        raise ValueError(
            "student must have shape [B, C, *spatial] with one to three spatial axes; "
            f"got {tuple(student.shape)}"
        )
    if student.shape == teacher.shape:
        _check_device("teacher", teacher, student)
        return
    remedy = "Resize one of them first, for example with F.interpolate."
    if student.dim() == teacher.dim() and student.shape[1] != teacher.shape[1]:
        remedy = "Project the student to the teacher's channels first, for example with a 1x1 conv."
    raise ValueError(
        f"student must have shape [B, C, *spatial] equal to teacher's {tuple(teacher.shape)}; "
        f"got {tuple(student.shape)}. {remedy}"
    )


def check_map(name: str, tensor: Tensor, channels: int | None = None, remedy: str = "") -> None:
    """A map `[B, C, H, W]` with at least one pixel, of `channels` channels if given."""
    _check_floating(name, tensor)
    shape = tuple(tensor.shape)
    flat = len(shape) != 4 or shape[2] < 1 or shape[3] < 1
    if flat or (channels is not None and shape[1] != channels):
        wanted = "C" if channels is None else channels
        raise ValueError(
            f"{name} must have shape [B, {wanted}, H, W], H and W at least 1; got {shape}{remedy}"
        )


def check_same_pixels(name: str, tensor: Tensor, teacher: Tensor) -> None:
    """A map `[B, any, H, W]` of the teacher's batch and size, on its device."""
    batch, _, height, width = teacher.shape
    if tensor.shape[:1] + tensor.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise ValueError(
            f"{name} must have shape [{batch}, any, {height}, {width}] to fit the teacher's "
            f"{tuple(teacher.shape)}; got {tuple(tensor.shape)}. Resize one of them first, for example "
            "with F.interpolate."
        )
    _check_device("teacher", teacher, tensor)


def check_rows(student: Tensor, teacher: Tensor) -> None:
    """Two sets of vectors `[..., N, D]` of one shape."""
    _check_floating("student", student)
    _check_floating("teacher", teacher)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student must have shape [..., N, D] equal to teacher's {tuple(teacher.shape)}; "
            f"got {tuple(student.shape)}"
        )
    _check_device("teacher", teacher, student)


def check_mask(
    mask: Tensor | None,
    shape: torch.Size | tuple[int, ...],
    like: Tensor,
    *,
    name: str = "valid_mask",
    meaning: str = "used",
) -> None:
    """A bool mask of exactly this shape, on the student's device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True where a pixel is {meaning}; got {got}")
    if mask.shape != shape:
        raise ValueError(
            f"{name} must have one entry a pixel, shape {tuple(shape)}; got {tuple(mask.shape)}"
        )
    _check_device(name, mask, like)


def check_weights(weights: Tensor | None, masks: Tensor) -> None:
    """One number a mask, `[B, T]` for masks `[B, T, H, W]`, on their device, or None."""
    if weights is None:
        return
    _check_floating("weights", weights)
    shape = tuple(masks.shape[:2])
    if weights.shape != shape:
        raise ValueError(f"weights must have shape [B, T], {shape}; got {tuple(weights.shape)}")
    _check_device("weights", weights, masks)


def check_positive(name: str, value: float) -> None:
    """A finite number above zero."""
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")


def check_nonnegative(name: str, value: float) -> None:
    """A finite number, zero or above."""
    _check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")


def check_share(name: str, value: float) -> None:
    """A number from zero to one."""
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")


def check_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """A size in both directions, from one integer or a pair, each at least one."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        height, width = value
    else:
        height = width = value
    for size in (height, width):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int or a pair of them; got {value!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
    return height, width


def check_count(name: str, value: int, *, minimum: int = 1) -> None:
    """An integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def check_flag(name: str, value: bool) -> None:
    """True or False, and not a string that says so."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def check_keys(name: str, keys: Tensor | None, like: Tensor) -> None:
    """Vectors `[K, D]` of the student's width, or None."""
    if keys is None:
        return
    _check_floating(name, keys)
    if keys.dim() != 2 or keys.shape[1] != like.shape[-1]:
        raise ValueError(
            f"{name} must have shape [K, {like.shape[-1]}], as wide as the student's vectors; "
            f"got {tuple(keys.shape)}"
        )
    _check_device(name, keys, like)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype; got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the student's device, {like.device}; got {tensor.device}. Move it."
        )


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")


def savable(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it was made in inference mode, which autograd cannot save."""
    # a compiler cannot ask a tensor for its mode: what it compiles raises PyTorch's own error
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def frozen(teacher: Tensor) -> Tensor:
    """The teacher without its graph; a copy where it was made in inference mode, see `savable`."""
    return savable(teacher).detach()
