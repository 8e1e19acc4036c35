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

from . import _remedies

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Choice = TypeVar("Choice")


# --- Settings -------------------------------------------------------------------------------------


def number(name: str, value: Any) -> float:
    """Any real number, of NumPy too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    plain = number(name, value)
    if not 0 < plain < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
    return plain


def nonnegative(name: str, value: Any) -> float:
    """A finite number of at least zero."""
    plain = number(name, value)
    if not 0 <= plain < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")
    return plain


def fraction(name: str, value: Any) -> float:
    """A number from zero to one."""
    plain = number(name, value)
    if not 0 <= plain <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")
    return plain


def index(name: str, value: Any, wanted: str = "an int") -> int:
    """Anything that `operator.index` takes, but True and False."""
    if type(value) is int:  # operator.index would specialise a size that torch.compile keeps open
        return value
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {wanted}; got {value!r}")


def integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Anything that `operator.index` takes, of at least `minimum`."""
    plain = index(name, value)
    if plain < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value!r}")
    return plain


def is_sequence(value: Any) -> bool:
    """Whether this is a list, or what a configuration library gives for one, and not a string."""
    return (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str)
    )


def pair(name: str, value: Any) -> tuple[int, int]:
    """A size in both directions, from one integer or any sequence of two, each at least 1."""
    sizes = list(value) if is_sequence(value) else [value, value]
    if len(sizes) != 2:
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    height, width = (index(name, size, "an int or a pair of ints") for size in sizes)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")
    return height, width


def sizes(name: str, value: Any, *, most: int) -> tuple[int, ...]:
    """A sequence of one to `most` integers, each at least 1."""
    if not is_sequence(value) or not 1 <= len(value) <= most:
        raise TypeError(f"{name} must be a sequence of 1 to {most} ints; got {value!r}")
    return tuple(integer(name, size) for size in value)


def flag(name: str, value: Any) -> bool:
    """True or False, of NumPy too, and not a string that says so."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """One of a few strings (or None)."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}; got {value!r}")
    return choices[choices.index(cast(Choice, value))]  # plain, also where a member of an enum came


# --- Tensors --------------------------------------------------------------------------------------


def tensor(name: str, value: Any, *, module: str = "") -> None:
    """A tensor. `module` is the class to name as a leaf where torch.fx traces the call."""
    if isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a tensor; got {type(value).__name__} with keys {list(value)}. "
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
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor; got a {kind} one. Pad it, or to_dense().")
    if _is_sharded(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor. Pass {name}.full_tensor(), or "
            f"{name}.to_local() where it is split by images."
        )


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
        + _remedies.for_maps(student, teacher)
    )


def map_2d(
    name: str, value: Tensor, channels: int | None = None, remedy: str = "", *, module: str = ""
) -> None:
    """A map `[B, C, H, W]` with at least one pixel, of `channels` channels if given."""
    floating(name, value, module=module)
    which = "C, H and W" if channels is None else "H and W"
    _map(name, value, channels, range(4, 5), f"H, W], {which} at least 1", remedy)


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
            + _remedies.for_maps(tensor, teacher, channels=False)
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


def shaped(name: str, value: Any, shape: Sequence[int | str], like: Tensor) -> None:
    """A floating-point tensor of this shape on the device of `like`. Words fit any size."""
    floating(name, value)
    pairs = zip(value.shape, shape, strict=False)
    if value.dim() != len(shape) or any(w != g for g, w in pairs if not isinstance(w, str)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}]; got {tuple(value.shape)}")
    device(name, value, like)


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
        raise TypeError(
            f"{name} must be a bool tensor, True where a pixel is {meaning}; got {got}. "
            + _remedies.for_mask_dtype(name, value)
        )
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have one element per pixel, shape {tuple(shape)}; "
            f"got {tuple(value.shape)}."
            + _remedies.for_mask_shape(name, tuple(value.shape), tuple(shape))
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


def whole(module: str, parameter: Tensor) -> None:
    """A parameter of a layer that is read, not called, so that nothing gathers the layer's shards."""
    if _is_sharded(parameter):
        raise TypeError(
            f"{module} must be sharded as a whole: its layers are read and not called. Apply "
            "fully_shard to the module that is called (the loss or the adaptor), not to its parts."
        )


def _is_sharded(value: Tensor) -> bool:
    return type(value).__name__ == "DTensor"  # importing the class takes long


def device(name: str, tensor: Tensor, like: Tensor, *, of: str = "student") -> None:
    """The device of the student, or of what `of` names."""
    if tensor.device != like.device:
        remedy = f"Move it: {name}.to({str(like.device)!r})."
        if tensor.is_meta:
            remedy = "The meta device holds no data: use to_empty(), then load it."
        raise ValueError(
            f"{name} must be on the {of}'s device, {like.device}; got {tensor.device}. {remedy}"
        )


def swapped(student: Tensor, teacher: Tensor) -> None:
    """Raise where only the teacher has a graph: nothing could be trained."""
    if not torch.is_grad_enabled() or student.requires_grad or not teacher.requires_grad:
        return
    # vmap hides whether a tensor requires a gradient.
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        raise ValueError(
            "student must require a gradient where teacher does; got only a teacher that does. "
            "The student is the first argument. To evaluate, use torch.no_grad()."
        )


def _map(
    name: str, value: Tensor, channels: int | None, dims: range, axes: str, remedy: str = ""
) -> None:
    shape = tuple(value.shape)
    fits = value.dim() in dims and (channels is None or channels == shape[1])
    if fits and min(shape[1:]) >= 1:
        return
    wanted = "C" if channels is None else channels
    remedy = _remedies.for_map(name, shape, channels, dims) or remedy
    text = f"{name} must have shape [B, {wanted}, {axes}; got {shape}. {remedy}"
    raise ValueError(text.rstrip())
