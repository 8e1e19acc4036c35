"""Argument checks: each is called once, by the public function or module that takes the argument.

Every check raises a ValueError or TypeError that names the argument, what was expected, what came,
and a remedy. Checks of settings return the setting as a plain `float`, `int` or `str`.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.fx
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Choice = TypeVar("Choice")


# --- Settings -------------------------------------------------------------------------------------


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    number = _real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
    return number


def nonnegative(name: str, value: Any) -> float:
    """A finite number of at least zero."""
    number = _real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")
    return number


def fraction(name: str, value: Any) -> float:
    """A number from zero to one."""
    number = _real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")
    return number


def integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Anything that `operator.index` takes, of at least `minimum`."""
    number = _index(name, value, "an int")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value!r}")
    return number


def pair(name: str, value: Any) -> tuple[int, int]:
    """A size in both directions, from one integer or any sequence of two, each at least 1."""
    sizes = list(value) if _is_sequence(value) else [value, value]
    if len(sizes) != 2:
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    height, width = (_index(name, size, "an int or a pair of ints") for size in sizes)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")
    return height, width


def sizes(name: str, value: Any, *, most: int) -> tuple[int, ...]:
    """A sequence of one to `most` integers, each at least 1."""
    if not _is_sequence(value) or not 1 <= len(value) <= most:
        raise TypeError(f"{name} must be a sequence of 1 to {most} ints; got {value!r}")
    return tuple(integer(name, size) for size in value)


def flag(name: str, value: Any) -> bool:
    """True or False, and not a string that says so."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def choice(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """One of a few strings (or None)."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}; got {value!r}")
    return cast(Choice, value)


# --- Tensors --------------------------------------------------------------------------------------


def tensor(name: str, value: Any, *, module: str = "") -> None:
    """A tensor. `module` is the class to name as a leaf where torch.fx traces the call."""
    if isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a tensor; got a {type(value).__name__} with keys {list(value)}. "
            f"Pass one of its maps, such as {name}[{next(iter(value), 'out')!r}]."
        )
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            f"{name} must be a tensor; got a torch.fx.Proxy. Trace with {module or 'the module'} as "
            'a leaf: create_feature_extractor(..., tracer_kwargs={"leaf_modules": '
            f"[{module or '...'}]}})."
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def floating(name: str, value: Any, *, module: str = "") -> None:
    """A tensor of one of the four floating-point dtypes that the losses compute with."""
    tensor(name, value, module=module)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}. "
            f"Convert it, for example {name}.float()."
        )


def maps(student: Tensor, teacher: Tensor) -> None:
    """Two maps `[B, C, *spatial]` of one shape and device, with one to three spatial axes."""
    floating("student", student)
    floating("teacher", teacher)
    swapped(student, teacher)
    if 3 <= student.dim() <= 5 and student.shape == teacher.shape and student.shape[1] > 0:
        device("teacher", teacher, student)
        return
    raise ValueError(
        "student and teacher must be maps [B, C, *spatial] of one shape, C at least 1, one to three "
        f"spatial axes; got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}. "
        + _remedy(student, teacher)
    )


def map_2d(
    name: str, value: Tensor, channels: int | None = None, remedy: str = "", *, module: str = ""
) -> None:
    """A map `[B, C, H, W]` with at least one pixel, of `channels` channels if given."""
    floating(name, value, module=module)
    _map(name, value, channels, range(4, 5), "H, W], H and W at least 1", remedy)


def map_nd(name: str, value: Tensor, channels: int | None = None, *, module: str = "") -> None:
    """The same for maps `[B, C, *spatial]` with one to three spatial axes."""
    floating(name, value, module=module)
    _map(name, value, channels, range(3, 6), "*spatial] with one to three axes of at least 1")


def same_pixels(name: str, tensor: Tensor, teacher: Tensor) -> None:
    """A map `[B, any, *spatial]` with the teacher's batch and spatial size, on its device."""
    shape, wanted = tuple(tensor.shape), tuple(teacher.shape)
    if shape[:1] + shape[2:] != wanted[:1] + wanted[2:]:
        expected = ", ".join(map(str, (wanted[0], "any", *wanted[2:])))
        raise ValueError(
            f"{name} must have shape [{expected}] to fit the teacher's {wanted}; got {shape}. "
            + _remedy(tensor, teacher, channels=False)
        )
    device("teacher", teacher, tensor)


def rows(student: Tensor, teacher: Tensor) -> None:
    """Two sets of vectors `[..., N, D]` of one shape and device."""
    floating("student", student)
    floating("teacher", teacher)
    swapped(student, teacher)
    if student.dim() < 2 or student.shape != teacher.shape or student.shape[-1] == 0:
        raise ValueError(
            f"student and teacher must be vectors [..., N, D] of one shape, D at least 1; got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}. Row n of the teacher is the "
            "positive of row n of the student."
        )
    device("teacher", teacher, student)


def keys(name: str, tensor: Tensor | None, like: Tensor, width: int) -> None:
    """Vectors `[K, D]` of the given width on the device of `like`, or None."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise ValueError(
            f"{name} must have shape [K, {width}], the width of the student's vectors; "
            f"got {tuple(tensor.shape)}"
        )
    device(name, tensor, like)


def mask(
    value: Tensor | None,
    shape: Sequence[int],
    like: Tensor,
    *,
    name: str = "valid_mask",
    meaning: str = "used",
) -> None:
    """A bool mask of exactly this shape, on the student's device, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        remedy = ""
        if isinstance(value, Tensor):
            remedy = (
                f" For a label map, write {name}=labels != 255."
                if value.dtype in (torch.int16, torch.int32, torch.int64)
                else f" Write {name}=mask > 0."
            )
        raise TypeError(
            f"{name} must be a bool tensor, True where a pixel is {meaning}; got {got}.{remedy}"
        )
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have one element per pixel, shape {tuple(shape)}; "
            f"got {tuple(value.shape)}. {_mask_remedy(name, value, tuple(shape))}".rstrip()
        )
    device(name, value, like)


def temperature(value: Any, like: Tensor) -> float | Tensor:
    """A finite number above zero, or a tensor of one element on the student's device."""
    if not isinstance(value, Tensor):
        return positive("temperature", value)
    if value.numel() != 1 or not value.is_floating_point() or value.device != like.device:
        raise ValueError(
            f"temperature must be a number, or one floating-point element on {like.device}; "
            f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
        )
    return value.reshape(())


def token_weights(weights: Tensor | None, masks: Tensor) -> None:
    """One weight per mask, `[B, T]` for masks `[B, T, H, W]`, on their device, or None."""
    if weights is None:
        return
    floating("weights", weights)
    shape = tuple(masks.shape[:2])
    if tuple(weights.shape) != shape:
        raise ValueError(f"weights must have shape [B, T], {shape}; got {tuple(weights.shape)}")
    device("weights", weights, masks)


def device(name: str, tensor: Tensor, like: Tensor) -> None:
    """The student's device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the student's device, {like.device}; got {tensor.device}. "
            f"Move it: {name}.to({str(like.device)!r})."
        )


def swapped(student: Tensor, teacher: Tensor) -> None:
    """Raise where only the teacher has a graph: nothing could be trained."""
    if torch.is_grad_enabled() and teacher.requires_grad and not student.requires_grad:
        raise ValueError(
            "student must require a gradient where teacher does; got only a teacher that does. "
            "The student is the first argument. To evaluate, use torch.no_grad()."
        )


# --- Remedies -------------------------------------------------------------------------------------


def _map(
    name: str, value: Tensor, channels: int | None, dims: range, axes: str, remedy: str = ""
) -> None:
    shape, last = tuple(value.shape), value.dim() - 1
    fits = value.dim() in dims and (channels is None or channels == shape[1])
    if fits and min(shape[2:]) >= 1:
        return
    if last == 2 and (channels is None or channels == shape[2]):
        remedy = f"For the tokens of a ViT, use tokens_to_map({name}, grid=(H, W))."
    elif last == 2 and channels == shape[1]:
        remedy = f"For a flattened map, write {name}.unflatten(2, (H, W))."
    elif last + 1 in dims and channels == shape[-1]:
        remedy = f"For a channels-last map, write {name}.permute{(0, last, *range(1, last))}."
    wanted = "C" if channels is None else channels
    text = f"{name} must have shape [B, {wanted}, {axes}; got {shape}. {remedy}"
    raise ValueError(text.rstrip())


def _remedy(student: Tensor, teacher: Tensor, *, channels: bool = True) -> str:
    """What would really bring two maps together: it depends on the axis that differs."""
    s, t = tuple(student.shape), tuple(teacher.shape)
    if len(s) != len(t):
        if {len(s), len(t)} == {3, 4}:
            name, flat, whole = ("student", s, t) if len(s) == 3 else ("teacher", t, s)
            if flat[1] == whole[1] and flat[2] == whole[2] * whole[3]:
                return f"For a flattened map, write {name}.unflatten(2, {whole[2:]})."
            return f"For the tokens of a ViT, use tokens_to_map({name}, grid=(H, W))."
        return "Both need the same number of spatial axes."
    if not 3 <= len(s) <= 5:
        return "For vectors [N, D], use pixdistill.functional.pixel_contrast_loss."
    last_to_second = (0, len(s) - 1, *range(1, len(s) - 1))
    for name, shape, other in (("teacher", t, s), ("student", s, t)):
        permuted = tuple(shape[axis] for axis in last_to_second)
        if shape[2:] != other[2:] and permuted[2:] == other[2:] and permuted[0] == other[0]:
            return f"For a channels-last map, write {name}.permute{last_to_second}."
    if s[0] != t[0]:
        times, rest = divmod(s[0], t[0]) if t[0] > 0 else (0, 1)
        remedy = "index_select(0, index)" if rest else f"repeat_interleave({times}, dim=0)"
        return (
            f"The batch differs, {s[0]} against {t[0]}: pass one teacher map per student map, for "
            f"example teacher.{remedy}."
        )
    remedies = []
    if channels and s[1] != t[1]:
        remedies.append(
            f"Project the student to the teacher's {t[1]} channels, for example with "
            f"nn.Conv{len(s) - 2}d({s[1]}, {t[1]}, 1)."
        )
    if s[2:] != t[2:]:
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(s)]
        remedies.append(
            f"Resize the student, for example F.interpolate(student, {t[2:]}, mode={mode!r})."
        )
    return " ".join(remedies)


def _mask_remedy(name: str, value: Tensor, shape: tuple[int, ...]) -> str:
    got = tuple(value.shape)
    if got == (shape[0], 1, *shape[1:]):
        return f"Write {name}={name}.squeeze(1)."
    if len(got) == len(shape) == 3 and got[0] == shape[0]:
        return (
            f"Bring it to the map's size: F.interpolate({name}[:, None].float(), {shape[1:]}, "
            'mode="nearest")[:, 0] > 0.'
        )
    return ""


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    return float(value)


def _index(name: str, value: Any, wanted: str) -> int:
    if type(value) is int:  # operator.index would specialise a size that torch.compile keeps open
        return value
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {wanted}; got {value!r}")


def _is_sequence(value: Any) -> bool:
    return (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str)
    )
