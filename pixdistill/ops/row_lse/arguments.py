"""What `row_lse` accepts."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..backend import BACKENDS


def check(
    query: Any,
    keys: Any,
    scale: Any,
    key_mask: Any,
    exclude_offset: Any,
    logit_bound: Any,
    backend: Any,
) -> tuple[float | Tensor, int | None, float | None]:
    """Raise where an argument does not fit; returns the three numbers as plain ones."""
    for name, tensor in (("query", query), ("keys", keys)):
        _checks.floating(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have shape [..., rows, D]; got {tuple(tensor.shape)}")
        _checks.device(name, tensor, query, of="query")
    width = query.shape[-1]
    if keys.shape[-1] != width or width < 1:
        raise ValueError(
            "query and keys must share a feature width, their last axis, of at least 1; "
            f"got {tuple(query.shape)} and {tuple(keys.shape)}"
        )
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask must be a bool tensor, True where a key counts; got {got}")
        if key_mask.device != query.device or key_mask.dim() < 1:
            raise ValueError(
                f"key_mask must be [..., M] on query's device, {query.device}; "
                f"got {tuple(key_mask.shape)} on {key_mask.device}"
            )
        if key_mask.shape[-1] != keys.shape[-2]:
            raise ValueError(
                f"key_mask must have one entry per key, {keys.shape[-2]}; got {key_mask.shape[-1]}"
            )
    batches = [query.shape[:-2], keys.shape[:-2]]
    if key_mask is not None:
        batches.append(key_mask.shape[:-1])
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError:
        raise ValueError(
            f"the axes before the last two of query and keys, and before the last of key_mask, must "
            f"broadcast; got {', '.join(str(tuple(batch)) for batch in batches)}"
        ) from None
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point() or scale.device != query.device:
            raise ValueError(
                f"scale must be a number, or one floating-point element on {query.device}; "
                f"got {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
            )
    else:
        scale = _checks.number("scale", scale)
    if exclude_offset is not None and not isinstance(exclude_offset, torch.SymInt):
        exclude_offset = _checks.index("exclude_offset", exclude_offset, "an int or None")
    if logit_bound is not None:
        logit_bound = _checks.number("logit_bound", logit_bound)
        if not logit_bound >= 0:
            raise ValueError(f"logit_bound must be a number >= 0 or None; got {logit_bound!r}")
    _checks.choice("backend", backend, BACKENDS)
    return scale, exclude_offset, logit_bound
