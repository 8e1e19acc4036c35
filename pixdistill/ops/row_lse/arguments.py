"""What `row_lse` accepts, and how broadcast batch axes become the groups of its operator."""

import torch
from torch import Tensor

from ..backend import BACKENDS

MAX_WIDTH = 8192


class Groups:
    """Brings broadcast batch axes to `[G, N, D]` and `[G, M, D]` without copying keys.

    Axes along which keys and mask are shared become further query rows, unless a query's row number
    matters; the others become groups.
    """

    def __init__(self, query: Tensor, keys: Tensor, key_mask: Tensor | None, *, fold_rows: bool):
        mask_batch: tuple[int, ...] = () if key_mask is None else tuple(key_mask.shape[:-1])
        batch = torch.broadcast_shapes(query.shape[:-2], keys.shape[:-2], mask_batch)
        axes = range(len(batch))
        key_batch = (1,) * (len(batch) - keys.dim() + 2) + keys.shape[:-2]
        mask_batch = (1,) * (len(batch) - len(mask_batch)) + mask_batch
        shared = [a for a in axes if fold_rows and key_batch[a] == 1 and mask_batch[a] == 1]
        own = [a for a in axes if a not in shared]
        rows, width = query.shape[-2:]

        sizes = [batch[a] for a in own]
        self._order = (*own, *shared)
        self._shape = (*sizes, *(batch[a] for a in shared), rows)
        spread = query.expand(*batch, rows, width).permute(*self._order, len(batch), len(batch) + 1)
        groups = 1
        for size in sizes:
            groups *= size
        folded = rows
        for a in shared:
            folded *= batch[a]
        self.query = spread.reshape(groups, folded, width)
        self.keys = keys.reshape(*(key_batch[a] for a in own), *keys.shape[-2:]).expand(
            *sizes, *keys.shape[-2:]
        )
        self.keys = self.keys.reshape(groups, *keys.shape[-2:])
        self.key_mask = None
        if key_mask is not None:
            mask = key_mask.reshape(*(mask_batch[a] for a in own), key_mask.shape[-1])
            self.key_mask = mask.expand(*sizes, -1).reshape(groups, key_mask.shape[-1])

    def restore(self, rows: Tensor) -> Tensor:
        """`[G, N]` back to the broadcast batch axes and N."""
        batch_axes = len(self._order)
        inverse = [self._order.index(a) for a in range(batch_axes)]
        return rows.reshape(self._shape).permute(*inverse, batch_axes)


def check(query, keys, scale, key_mask, exclude_offset, logit_bound, backend) -> None:
    for name, tensor in (("query", query), ("keys", keys)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have shape [..., rows, D]; got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype; got {tensor.dtype}")
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
