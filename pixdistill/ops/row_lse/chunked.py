"""PyTorch form of `row_lse` in blocks: two matrix products per block of keys, nothing of size N x M.

It serves the CPU, float64, strict float32 on CUDA, and features wider than the fused kernel takes. Two
faster forms stand beside it: `attention.py` on a CPU, and `exponentials.py`, which on CUDA makes one
kernel of all that happens between the two products.
"""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..backend import sum_dtype, why_no_kernel, without_data
from . import attention

# Logits held at once: 4 MiB of float32 stay in a CPU's cache; a GPU needs enough work per launch.
_CPU_BLOCK = (1024, 1024)
_CUDA_BLOCK = (8192, 4096)


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    labels: tuple[Tensor, Tensor] | None = None,
    *,
    subtract_max: bool,
    with_weighted_keys: bool,
    with_max: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp `[G, N]`, softmax-weighted mean of the keys `[G, N, D]` and largest logit `[G, N]`.

    query `[G, N, D]`; keys `[G, M, D]` and key_mask `[G, M]`, or `[1, ...]` where all share them. A
    key does not count for a query of the same label >= 0: labels `[G, N]` int32 of the queries, and
    `[G, M]`, or `[1, M]`, of the keys.
    `subtract_max` subtracts a running maximum; without it `exp(logit)` and its sum must stay in range.
    """
    arguments = (query, keys, scale, key_mask, exclude_offset, labels, subtract_max)
    # The operator takes labels only as an N x M mask.
    if not with_weighted_keys or labels is not None or not attention.fits(query, keys):
        return _in_blocks(*arguments, with_weighted_keys, with_max)
    # It has no maximum: another pass, so that asking for it changes no bit of the others.
    lse, weighted_keys = attention.row_lse(*arguments[:5])
    return lse, weighted_keys, _in_blocks(*arguments, False, True)[2] if with_max else None


def _in_blocks(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    labels: tuple[Tensor, Tensor] | None,
    subtract_max: bool,
    with_weighted_keys: bool,
    with_max: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`row_lse`, block by block."""
    dtype = sum_dtype(query)
    operand = _operand_dtype(query)
    keys, key_mask = _expand(query, keys, key_mask)
    lse = query.new_empty(query.shape[:2], dtype=dtype)
    weighted_keys = query.new_zeros(query.shape) if with_weighted_keys else None
    max_logit = torch.full_like(lse, -torch.inf) if with_max else None
    step_g, step_n, step_m = _block_sizes(query, keys)
    buffer = query.new_empty((step_g * step_n * step_m,), dtype=dtype)
    fused = _fused(query)
    if labels is not None:  # a negative one of a query equals none of the keys'
        key_labels = labels[1].clamp_min(-1).expand(query.shape[0], -1)
        labels = labels[0].masked_fill(labels[0] < 0, -2), key_labels

    for g in _slices(query.shape[0], step_g):
        for n in _slices(query.shape[1], step_n):
            rows = query[g, n].to(operand)
            total = rows.new_zeros(rows.shape[:2], dtype=dtype)
            top = torch.full_like(total, -torch.inf) if subtract_max or with_max else None
            weighted: Tensor | None = None
            for m in _slices(keys.shape[1], step_m):
                block, seen = _key_block(keys, key_mask, g, m, operand)
                diagonal = _diagonal(exclude_offset, n, m)
                pair = None if labels is None else (labels[0][g, n], labels[1][g, m])
                if fused is not None:
                    logits = _product(rows, block.mT, 1.0, buffer)
                    weights, shrink = fused.exponentials(
                        logits, scale, seen, diagonal, pair, total, top, subtract_max, operand
                    )
                else:
                    weights = _product(rows, block.mT, scale, buffer)
                    _hide(weights, seen, diagonal, pair)
                    shrink = _exponentials(weights, total, top, subtract_max)
                if with_weighted_keys:
                    weighted = _add_product(weighted, shrink, weights, block)
            torch.log(total, out=lse[g, n])
            if top is not None and subtract_max:
                lse[g, n] += top
            if top is not None and max_logit is not None:
                max_logit[g, n] = top
            if weighted is not None and weighted_keys is not None:
                safe = total.masked_fill_(total == 0, 1.0).unsqueeze(-1)
                torch.div(weighted, safe, out=weighted_keys[g, n])
    return lse, weighted_keys, max_logit


def row_lse_grad_keys(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
) -> Tensor:
    """`(softmax(logits) * grad_rows[..., None]).mT @ query`, in the keys' shape: added over `[G, ...]`
    where these share the keys. Probabilities are computed again, from lse.
    """
    dtype = sum_dtype(query)
    operand = _operand_dtype(query)
    # probability times gradient is too small for float16
    weight_dtype = dtype if operand == torch.float16 else operand
    shared = keys.shape[0] < query.shape[0]
    keys, key_mask = _expand(query, keys, key_mask)
    grad_keys = keys.new_zeros(keys.shape, dtype=dtype if shared else keys.dtype)
    step_g, step_n, step_m = _block_sizes(query, keys)
    buffer = query.new_empty((step_g * step_n * step_m,), dtype=dtype)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without keys has no probabilities
    fused = _fused(query)

    for g in _slices(query.shape[0], step_g):
        for m in _slices(keys.shape[1], step_m):
            block, seen = _key_block(keys, key_mask, g, m, operand)
            total: Tensor | None = None
            for n in _slices(query.shape[1], step_n):
                rows = query[g, n].to(operand)
                diagonal = _diagonal(exclude_offset, n, m)
                if fused is not None:
                    logits = _product(rows, block.mT, 1.0, buffer)
                    weights = fused.grad_weights(
                        logits, scale, seen, diagonal, lse[g, n], grad_rows[g, n], weight_dtype
                    )
                else:
                    weights = _product(rows, block.mT, scale, buffer)
                    _hide(weights, seen, diagonal)
                    weights.sub_(lse[g, n].unsqueeze(-1)).exp_().mul_(grad_rows[g, n].unsqueeze(-1))
                total = _add_product(total, None, weights.mT, rows.to(weight_dtype))
            if total is not None:
                grad_keys[g, m] = total
    return grad_keys.sum(dim=0, keepdim=True).to(keys.dtype) if shared else grad_keys


def _fused(query: Tensor) -> ModuleType | None:
    """The kernel for what happens between the products, where it runs."""
    if query.device.type != "cuda" or query.dtype == torch.float64 or without_data():
        return None
    if why_no_kernel(query.device):
        return None
    from . import exponentials  # loads triton

    return exponentials


def _operand_dtype(tensor: Tensor) -> torch.dtype:
    """Half operands pay on a GPU's tensor cores; a CPU multiplies them no faster than float32."""
    return tensor.dtype if tensor.device.type == "cuda" else sum_dtype(tensor)


def _expand(query: Tensor, keys: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys and mask with the query's batch: views where all share them."""
    batch = query.shape[0]
    if key_mask is not None:
        key_mask = key_mask.expand(batch, -1)
    return keys.expand(batch, -1, -1), key_mask


def _block_sizes(query: Tensor, keys: Tensor) -> tuple[int, int, int]:
    """Batch entries, queries and keys of a block: a fixed number of logits, whatever the shape."""
    step_n, step_m = _CUDA_BLOCK if query.device.type == "cuda" else _CPU_BLOCK
    rows, columns = min(step_n, query.shape[1]), min(step_m, keys.shape[1])
    step_g = min(query.shape[0], max(1, step_n * step_m // max(1, rows * columns)))
    return step_g, rows, columns


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(1, step)))


def _key_block(
    keys: Tensor, key_mask: Tensor | None, g: slice, m: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A block of keys with the hidden ones set to zero, so that a NaN in them reaches no product."""
    block = keys[g, m].to(dtype)
    if key_mask is None:
        return block, None
    seen = key_mask[g, m]
    return block.masked_fill(~seen.unsqueeze(-1), 0.0), seen


def _diagonal(exclude_offset: int | None, n: slice, m: slice) -> int | None:
    """Inside a block, column `row + diagonal` is excluded; None where the block has no such column."""
    if exclude_offset is None:
        return None
    diagonal = n.start + exclude_offset - m.start
    return diagonal if n.start - n.stop < diagonal < m.stop - m.start else None


def _hide(
    logits: Tensor,
    seen: Tensor | None,
    diagonal: int | None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Set the logits that do not count to -inf, in place."""
    if labels is not None:
        logits.masked_fill_(labels[0].unsqueeze(-1) == labels[1].unsqueeze(-2), -torch.inf)
    if seen is not None:
        logits.masked_fill_(~seen.unsqueeze(-2), -torch.inf)
    if diagonal is not None:
        logits.diagonal(diagonal, dim1=1, dim2=2).fill_(-torch.inf)


def _exponentials(
    logits: Tensor, total: Tensor, top: Tensor | None, subtract_max: bool
) -> Tensor | None:
    """Exponentials in place, added to `total`; `top` is the largest logit so far.

    Returns by how much the sums of earlier blocks shrank, where a maximum is subtracted.
    """
    shrink = None
    if top is not None:
        before = top.clone()
        torch.maximum(top, logits.amax(dim=-1), out=top)
        if subtract_max:
            shift = top.clamp_min(torch.finfo(top.dtype).min)  # no key yet: -inf stays -inf
            logits.sub_(shift.unsqueeze(-1))
            shrink = before.sub_(shift).exp_()
            total.mul_(shrink)
    total.add_(logits.exp_().sum(dim=-1))
    return shrink


def _product(a: Tensor, b: Tensor, scale: float | Tensor, buffer: Tensor) -> Tensor:
    """Batched `scale * a @ b` in the dtype of the buffer, which holds it unless operands are half."""
    if isinstance(scale, Tensor):
        a, scale = (a * scale).to(a.dtype), 1.0
    shape = (a.shape[0], a.shape[1], b.shape[2])
    if a.dtype == buffer.dtype:
        return buffer[: math.prod(shape)].view(shape).baddbmm_(a, b, beta=0, alpha=scale)
    product = _half_product(a, b)
    return product if scale == 1.0 else product.mul_(scale)


def _half_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched `a @ b` of half operands, in float32."""
    if a.device.type == "cuda" and hasattr(torch.ops.aten.bmm, "dtype"):  # since torch 2.8
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


def _add_product(
    total: Tensor | None, shrink: Tensor | None, weights: Tensor, block: Tensor
) -> Tensor:
    """`shrink * total + weights @ block`, in place; the weights are rounded to the block's dtype."""
    if total is not None and shrink is not None:
        total.mul_(shrink.unsqueeze(-1))
    half = block.dtype in (torch.float16, torch.bfloat16)
    weights = weights.to(block.dtype)
    if total is None:
        return _half_product(weights, block) if half else torch.bmm(weights, block)
    if not half:
        return total.baddbmm_(weights, block)
    fused = block.device.type == "cuda" and hasattr(torch.ops.aten.baddbmm, "dtype_out")
    if fused and not without_data():  # it has no form for tensors with shapes only
        return torch.ops.aten.baddbmm.dtype_out(total, weights, block, total.dtype, out=total)
    return total.add_(_half_product(weights, block))
