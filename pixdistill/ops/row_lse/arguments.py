"""What `row_lse` accepts."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..backend import BACKENDS

MAX_WIDTH = 8192


def check(
    query: Any,
    keys: Any,
    scale: Any,
    key_mask: Any,
    exclude_offset: Any,
    logit_bound: Any,
    backend: Any,
) -> None:
    for name, tensor in (("query", query), ("keys", keys)):
        _checks.floating(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have shape [..., rows, D]; got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(
                f"keys must be on query's device, {query.device}; got {tensor.device}. Move it."
            )
    width = query.shape[-1]
    if keys.shape[-1] != width or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"query and keys must share a feature width of 1 to {MAX_WIDTH}; "
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
                f"key_mask must have one entry a key, {keys.shape[-2]}; got {key_mask.shape[-1]}"
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
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or a tensor; got {type(scale).__name__}")
    if exclude_offset is not None and (
        isinstance(exclude_offset, bool) or not isinstance(exclude_offset, (int, torch.SymInt))
    ):
        raise TypeError(f"exclude_offset must be an int or None; got {exclude_offset!r}")
    if logit_bound is not None and not logit_bound >= 0:
        raise ValueError(f"logit_bound must be a number >= 0 or None; got {logit_bound!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {backend!r}")
