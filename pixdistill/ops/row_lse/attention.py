"""The pass on a CPU by PyTorch's attention operator, whose values are the keys: V = K.

The operator has no exclusion. Over all keys it gives lse_i and weighted_keys_i =: E_i, from which the
excluded key k_i, of probability p_i = exp(logit_i - lse_i), is taken out again:

    lse_i + log(1 - p_i),    (E_i - p_i k_i) / (1 - p_i).

That cancels where p_i is near 1, so rows with p_i > 1/2 are computed without that key: over the keys
before a block of rows, at it and after it, joined.
"""

import functools

import torch
from torch import Tensor

from ..backend import sum_dtype, without_data

_ROWS = 1024  # of a block whose excluded keys are taken out


def fits(query: Tensor, keys: Tensor) -> bool:
    """Whether the operator exists, for a CPU, and has work for each thread."""
    if query.device.type != "cpu" or without_data():  # which of two ways depends on the data
        return False
    if query.numel() == 0 or keys.numel() == 0:  # it divides by a size
        return False
    rows = query.shape[1]
    tile = 256 if rows >= 768 else 64 if rows >= 192 else 32  # the operator's own
    return query.shape[0] * -(-rows // tile) >= torch.get_num_threads() and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    )


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and weighted keys, as `chunked.row_lse`."""
    output_dtype, dtype = query.dtype, sum_dtype(query)
    query, keys = _operand(query, dtype), _operand(keys, dtype)
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    bias = None
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask.unsqueeze(-1), 0.0)  # a hidden key may hold NaN
        bias = torch.zeros_like(key_mask, dtype=dtype).masked_fill_(~key_mask, -torch.inf)
        bias = bias.unsqueeze(1)  # [G, 1, M]
    if exclude_offset is None:
        lse, weighted_keys = _attend(query, keys, scale, bias)
    else:
        lse, weighted_keys = _attend_others(query, keys, scale, bias, exclude_offset)
    return lse.contiguous(), weighted_keys.to(output_dtype).contiguous()


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """With contiguous rows, which the operator takes for granted."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _attend(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Over all keys; `bias` `[G or 1, N or 1, M]` is 0, or -inf where a key does not count."""
    batch, rows, columns = query.shape[0], query.shape[1], keys.shape[1]
    keys = keys.expand(batch, -1, -1).unsqueeze(0)
    mask = None if bias is None else bias.expand(batch, rows, columns).unsqueeze(0)
    weighted_keys, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(0), keys, keys, attn_mask=mask, scale=scale
    )
    lse, weighted_keys = lse[0], weighted_keys[0]
    if bias is not None:
        lse = lse.masked_fill((bias == -torch.inf).all(dim=-1), -torch.inf)
    return lse, weighted_keys


def _attend_others(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    """Over all keys but key `n + offset`, for query n."""
    parts = []
    exact = False  # once a block has needed the exact way, the next ones do as a rule
    for start in range(0, query.shape[1], _ROWS):
        rows = query[:, start : start + _ROWS]
        part = None if exact else _take_out(rows, keys, scale, bias, start + offset)
        exact = part is None
        if part is None:
            part = _around(rows, keys, scale, bias, start + offset)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    lse, weighted_keys = zip(*parts, strict=True)
    return torch.cat(lse, dim=1), torch.cat(weighted_keys, dim=1)


def _take_out(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None, first: int
) -> tuple[Tensor, Tensor] | None:
    """Over all keys, then without key `first + n`; None where that cancels."""
    lse, weighted_keys = _attend(query, keys, scale, bias)
    start, stop = max(0, -first), min(query.shape[1], keys.shape[1] - first)
    if start >= stop:
        return lse, weighted_keys
    excluded = keys[:, first + start : first + stop]
    logit = (query[:, start:stop] * excluded).sum(dim=-1) * scale
    if bias is not None:
        logit = logit + bias[:, 0, first + start : first + stop]
    floor = torch.finfo(lse.dtype).min  # -inf, where no key counts, stays -inf
    p = (logit - lse[:, start:stop].clamp_min(floor)).exp_()
    if (p > 0.5).any():
        return None
    lse[:, start:stop] += torch.log1p(-p)
    p = p.unsqueeze(-1)
    weighted_keys[:, start:stop].addcmul_(p, excluded, value=-1).div_(1 - p)
    return lse, weighted_keys


def _around(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    """Over the keys before, at and after those that are excluded, key `first + n` for query n."""
    rows, columns = query.shape[1], keys.shape[1]
    start, stop = (min(max(0, edge), columns) for edge in (first, first + rows))
    others = torch.zeros(rows, stop - start, dtype=query.dtype)
    others.diagonal(first - start).fill_(-torch.inf)
    parts = []
    for a, b, at in ((0, start, False), (start, stop, True), (stop, columns, False)):
        if a < b:
            here = None if bias is None else bias[..., a:b]
            if at:
                here = others.unsqueeze(0) if here is None else here + others
            parts.append(_attend(query, keys[:, a:b], scale, here))
    return functools.reduce(_join, parts)


def _join(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two sets of keys together."""
    lse = torch.logaddexp(one[0], two[0])
    floor = lse.clamp_min(torch.finfo(lse.dtype).min)
    a, b = ((part - floor).exp_().unsqueeze(-1) for part in (one[0], two[0]))
    return lse, one[1].mul_(a).addcmul_(b, two[1])
