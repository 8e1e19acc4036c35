"""The calls whose kernels `python -m benchmarks kernels` compiles: tensors have no data.

Each operator has a function that calls it, and the arguments worth compiling, from the barest variant to
the fullest.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runner import DTYPES


class Call(NamedTuple):
    """One call of an operator: a function of this file and its arguments."""

    operator: str
    options: dict[str, Any]

    def __str__(self) -> str:
        words = (k if v is True else f"{k}={v}" for k, v in self.options.items() if v is not False)
        return " ".join(map(str, words))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the GPU that does not exist."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def row_lse(
    dtype: str = "bfloat16",
    D: int = 128,
    values_only: bool = False,
    key_mask: bool = False,
    exclude: bool = False,
    labels: bool = False,
    max_logit: bool = False,
    unbounded: bool = False,
    grad_keys: bool = False,
) -> None:
    """One pass, and with `grad_keys` the gradient of the keys."""
    from pixdistill.ops.row_lse import row_lse_forward, row_lse_grad_keys

    query, keys = (empty(1, n, D, dtype=DTYPES[dtype]) for n in (6272, 65536))
    mask = empty(1, 65536, dtype=torch.bool) if key_mask else None
    offset = 0 if exclude else None
    if grad_keys:
        rows = empty(1, 6272)
        row_lse_grad_keys(rows, query, keys, 5.0, mask, offset, rows)
        return
    of_query, of_keys = (empty(1, n, dtype=torch.int32) for n in (6272, 65536))
    row_lse_forward(
        query,
        keys,
        5.0,
        mask,
        offset,
        (of_query, of_keys) if labels else None,
        logit_bound=None if unbounded else 5.0,
        with_weighted_keys=not values_only,
        with_max=max_logit,
    )


def _row_lse_calls() -> Iterator[dict[str, Any]]:
    masks = {"key_mask": True, "exclude": True}
    for dtype, D in itertools.product(("bfloat16", "float16", "float32"), (64, 128, 256)):
        if (dtype, D) == ("float32", 256):  # wider than the kernel takes
            continue
        for more in (
            {},
            {"exclude": True},
            {"values_only": True},
            masks | {"max_logit": True},
            masks | {"unbounded": True},
            masks | {"labels": True, "max_logit": True},
            masks | {"labels": True, "unbounded": True},
            {"grad_keys": True},
            masks | {"grad_keys": True},
        ):
            yield {"dtype": dtype, "D": D} | more


def patch_lse(
    dtype: str = "float32",
    groups: int = 16,
    width: int = 32,
    patch: int = 4,
    l2: bool = False,
    all_others: bool = False,
    valid_mask: bool = False,
    strided: bool = False,
    far: bool = False,
    values_only: bool = False,
    cross_entropy: bool = False,
) -> None:
    """Margins of a map; `strided` stands for any strides, `far` for offsets beyond 2^31."""
    from pixdistill.ops.patch_lse import PatchSettings, triton_kernels

    channels, size = groups * width, (24, 40) if strided else (16, 32)
    student = empty(2, channels, *size, dtype=DTYPES[dtype])
    if far:
        student = student.as_strided(student.shape, (2**38, 2**28, 32, 1))
    triton_kernels.patch_lse(
        student,
        student,
        empty(2, *size, dtype=torch.bool) if valid_mask else None,
        PatchSettings(
            groups,
            (patch, patch),
            0.07,
            "l2" if l2 else "l1",
            "all_others" if all_others else "other_groups",
        ),
        with_grad=not values_only,
        cross_entropy=cross_entropy,
    )


def _patch_lse_calls() -> Iterator[dict[str, Any]]:
    mask = {"valid_mask": True}
    for strided in (False, True):
        layout = {"strided": True} if strided else {}
        for groups, width, patch in (
            (16, 32, 4),
            (1, 512, 4),
            (16, 32, 1),
        ):  # omni, spatial, channel
            if patch == 1 and not strided:
                continue  # no four pixels of a patch are neighbours
            size = {"groups": groups, "width": width, "patch": patch} | layout
            size |= {"all_others": True} if groups == 1 else {}
            yield size
            yield size | {"values_only": True, "cross_entropy": True}
            yield size | {"dtype": "bfloat16", "l2": True, "cross_entropy": True}
            yield size | {"dtype": "float16", "all_others": True} | mask
            if not strided:
                yield size | {"l2": True, "all_others": True, "far": True} | mask
        for width in (4, 8, 24, 64, 128, 256, 2048):
            yield {"width": width, "cross_entropy": True} | mask | layout
            yield {"width": width, "l2": True, "all_others": True} | mask | layout
        yield {"width": 8, "patch": 8, "dtype": "bfloat16"} | mask | layout


def contrast(
    dtype: str = "float32",
    D: int = 128,
    valid_mask: bool = False,
    strided: bool = False,
    components: bool = False,
    learned: bool = False,
) -> None:
    """What surrounds the pass over the keys, with rows of bfloat16; `dtype` is that of the maps."""
    from pixdistill.ops.contrast import triton_kernels

    student, teacher = (empty(2, D, 16, 32, dtype=DTYPES[dtype]) for _ in range(2))
    if strided:
        student, teacher = (x[..., 1:, 1:] for x in (student, teacher))
    pixels = student[:, 0].numel()
    rows, stats = empty(2, pixels, D, dtype=torch.bfloat16), empty(4, pixels)
    valid = empty(*student[:, 0].shape, dtype=torch.bool) if valid_mask else None
    scale = empty() if learned else 5.0
    tie = triton_kernels.prepare(
        rows, stats, student, teacher, valid, normalize=True, with_tie=components
    )
    part = (stats[0], rows[0], stats[0] if components else None)
    triton_kernels.join(part, part, rows.dtype)
    loss, _, count = triton_kernels.finish(
        stats[0], part[2], tie, stats, scale, valid, "none" if strided else "mean"
    )
    triton_kernels.backward(
        loss, student, rows, stats, rows[0], count, scale,
        normalize=True, mean=not strided, needs_scale=learned,
    )  # fmt: skip


def _contrast_calls() -> Iterator[dict[str, Any]]:
    full = {"valid_mask": True, "strided": True, "components": True, "learned": True}
    for dtype, D in itertools.product(("bfloat16", "float32"), (24, 64, 128, 256)):
        yield {"dtype": dtype, "D": D}
        yield {"dtype": dtype, "D": D} | full


def masked_distance(
    dtype: str = "bfloat16",
    C: int = 256,
    size: tuple[int, int] = (100, 168),
    channels_last: bool = False,
    weighted: bool = False,
    customized: bool = False,
    valid_mask: bool = False,
    masks: bool = False,
) -> None:
    """Forward and backward, from 6 tokens or from given masks."""
    from pixdistill.ops.masked_distance import Masks, Tokens, triton_kernels

    student = empty(2, C, *size, dtype=DTYPES[dtype])
    if channels_last:
        student = empty(2, *size, C, dtype=DTYPES[dtype]).permute(0, 3, 1, 2)
    source: Masks | Tokens
    if masks:
        source = Masks(empty(2, 6, *size), empty(2, 6) if weighted else None)
    else:
        weighting = (empty(C, C, 3, 3), empty(C), empty(6, C, 1, 1), empty(6)) if weighted else ()
        steps = empty(dtype=torch.int64) if customized else None
        source = Tokens(empty(6, C), weighting, steps, 5000)
    valid = empty(2, *size, dtype=torch.bool) if valid_mask else None
    loss, attention, _ = triton_kernels.forward(student, student, source, valid, 1e-5, "mean")
    triton_kernels.backward(student, student, attention, loss, valid_mask)


def _masked_distance_calls() -> Iterator[dict[str, Any]]:
    detection, valid = {"weighted": True, "customized": True}, {"valid_mask": True}
    sizes = ((256, (100, 168)), (256, (50, 84)), (256, (25, 42)), (19, (128, 256)))
    for dtype, (C, size), last in itertools.product(
        ("bfloat16", "float16", "float32"), sizes, (False, True)
    ):
        layout = {"dtype": dtype, "C": C, "size": size} | ({"channels_last": True} if last else {})
        yield layout
        yield layout | detection
        yield layout | detection | valid
        yield layout | {"masks": True, "weighted": True} | valid


def patch_contrast(
    dtype: str = "bfloat16",
    pool: int = 4,
    valid_mask: bool = False,
    mean: bool = False,
    channels_last: bool = False,
    no_mimic: bool = False,
    no_contrast: bool = False,
) -> None:
    """Both terms of Af-DCD and the gradient of the student's map."""
    from pixdistill.ops.patch_contrast import Settings, Upstream, triton_kernels

    student, teacher = (empty(2, 512, 64, 128, dtype=DTYPES[dtype]) for _ in range(2))
    if channels_last:
        student = student.to(memory_format=torch.channels_last)
    valid = empty(2, 64, 128, dtype=torch.bool) if valid_mask else None
    fields: Any = ["omni", 16, (4, 4), (pool, pool), 0.07, "l1", "other_groups", "error"]
    weights = (0.0 if no_mimic else 2e-6, 0.0 if no_contrast else 5e-3)
    fields += ["mean" if mean else "sum", *weights, "triton"]
    settings = Settings(*fields)
    output = triton_kernels.forward(student, teacher, valid, settings, with_grad=True)
    terms = [Upstream(output[0], weight) if weight else None for weight in weights]
    rest: Any = (*output[3:], *terms, settings)
    triton_kernels.backward(student, teacher, valid, *rest)


def _patch_contrast_calls() -> Iterator[dict[str, Any]]:
    for dtype, pool in itertools.product(("bfloat16", "float16", "float32"), (1, 2, 4)):
        yield {"dtype": dtype, "pool": pool}
        yield {"dtype": dtype, "pool": pool, "valid_mask": True, "mean": True}
    yield {"channels_last": True}
    yield {"no_mimic": True}
    yield {"no_contrast": True, "valid_mask": True}


OPERATORS: dict[str, tuple[Callable[..., None], Callable[[], Iterator[dict[str, Any]]]]] = {
    "row_lse": (row_lse, _row_lse_calls),
    "contrast": (contrast, _contrast_calls),
    "patch_lse": (patch_lse, _patch_lse_calls),
    "masked_distance": (masked_distance, _masked_distance_calls),
    "patch_contrast": (patch_contrast, _patch_contrast_calls),
}
"""Each operator: a function that calls it, and the arguments worth compiling."""


def calls() -> list[Call]:
    """Every entry of the launch tables, from the barest variant to the fullest."""
    return [
        Call(name, options) for name, (_, variants) in OPERATORS.items() for options in variants()
    ]
