"""All that happens between the two products of the chunked form, in one Triton kernel each.

A program holds one row of a block of logits: it scales and hides them, subtracts the maximum, and writes
the exponentials in the dtype of the second product, with their sum and the largest logit so far.

Names: o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
    logits, key_mask, query_labels, key_labels, scale, learned_scale, diagonal, N, M, stride_mg,
    BM: tl.constexpr,
):  # fmt: skip
    """One row of logits [BM], -inf where they do not count."""
    i_row = tl.program_id(0)
    o_m = tl.arange(0, BM)
    m_m = o_m < M
    b_x = tl.load(logits + i_row.to(tl.int64) * M + o_m, mask=m_m, other=0.0)
    if learned_scale is not None:
        scale = tl.load(learned_scale).to(tl.float32)
    if key_mask is not None:
        p_mask = key_mask + (i_row // N).to(tl.int64) * stride_mg
        m_m = tl.load(p_mask + o_m, mask=m_m, other=0) != 0
    if diagonal is not None:
        m_m = m_m & (o_m != i_row % N + diagonal)
    if query_labels is not None:
        b_kl = tl.load(key_labels + (i_row // N).to(tl.int64) * M + o_m, mask=m_m, other=-1)
        m_m = m_m & (b_kl != tl.load(query_labels + i_row))
    return tl.where(m_m, b_x * scale, float("-inf"))


@triton.jit(do_not_specialize=["diagonal", "N", "M"])
def exponentials_kernel(
    logits, key_mask, scale, learned_scale, query_labels, key_labels, weights, total, top, shrink,
    diagonal, N, M, stride_mg, BM: tl.constexpr,
):  # fmt: skip
    """Exponentials of one row, added to `total`. `top` and `shrink` may be None, as in the launcher."""
    i_row = tl.program_id(0)
    b_x = _logits(
        logits, key_mask, query_labels, key_labels, scale, learned_scale, diagonal, N, M, stride_mg, BM
    )  # fmt: skip
    b_total = tl.load(total + i_row)
    if top is not None:
        b_before = tl.load(top + i_row)
        b_top = tl.maximum(b_before, tl.max(b_x, 0))
        tl.store(top + i_row, b_top)
        if shrink is not None:
            b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_shrink = tl.exp2((b_before - b_shift) * LOG2E)
            tl.store(shrink + i_row, b_shrink)
            b_total = b_total * b_shrink
            b_x = b_x - b_shift
    b_p = tl.exp2(b_x * LOG2E)
    tl.store(total + i_row, b_total + tl.sum(b_p, 0))
    o_m = tl.arange(0, BM)
    p_out = weights + i_row.to(tl.int64) * M + o_m
    tl.store(p_out, b_p.to(weights.dtype.element_ty), mask=o_m < M)


@triton.jit(do_not_specialize=["diagonal", "N", "M"])
def grad_weights_kernel(
    logits, key_mask, scale, learned_scale, weights, lse, grad_rows,
    diagonal, N, M, stride_mg, BM: tl.constexpr,
):  # fmt: skip
    """Probabilities of one row, times its gradient."""
    i_row = tl.program_id(0)
    b_x = _logits(logits, key_mask, None, None, scale, learned_scale, diagonal, N, M, stride_mg, BM)
    b_p = tl.exp2((b_x - tl.load(lse + i_row)) * LOG2E) * tl.load(grad_rows + i_row)
    o_m = tl.arange(0, BM)
    p_out = weights + i_row.to(tl.int64) * M + o_m
    tl.store(p_out, b_p.to(weights.dtype.element_ty), mask=o_m < M)


def exponentials(
    logits: Tensor,
    scale: float | Tensor,
    seen: Tensor | None,
    diagonal: int | None,
    labels: tuple[Tensor, Tensor] | None,
    total: Tensor,
    top: Tensor | None,
    subtract_max: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Exponentials of `scale * logits` `[G, N, M]` in `dtype`, and by how much earlier sums shrink.

    Updates `total` and `top` `[G, N]`. `seen` `[G, M]` are the keys that count; column
    `row + diagonal` is excluded, and so are keys of the query's label: `[G, N]` and `[G, M]`.
    """
    weights = _weights(logits, dtype)
    shrink = torch.empty_like(total) if subtract_max else None
    pair = (None, None) if labels is None else tuple(x.contiguous() for x in labels)
    outputs = weights, total, top, shrink
    _launch(exponentials_kernel, logits, scale, seen, diagonal, *pair, *outputs)
    return weights, shrink


def grad_weights(
    logits: Tensor,
    scale: float | Tensor,
    seen: Tensor | None,
    diagonal: int | None,
    lse: Tensor,
    grad_rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`exp(scale * logits - lse) * grad_rows` `[G, N, M]` in `dtype`, 0 where a key does not count."""
    weights = _weights(logits, dtype)
    rows = lse.contiguous(), grad_rows.contiguous()
    _launch(grad_weights_kernel, logits, scale, seen, diagonal, weights, *rows)
    return weights


def _weights(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where they go: in place of the logits, if these have the dtype."""
    return logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)


def _launch(
    kernel: triton.JITFunction,
    logits: Tensor,
    scale: float | Tensor,
    seen: Tensor | None,
    diagonal: int | None,
    *others: Tensor | None,
) -> None:
    batch, rows, columns = logits.shape
    if seen is not None and seen.stride(1) != 1:
        seen = seen.contiguous()
    learned = scale if isinstance(scale, Tensor) else None
    width = triton.next_power_of_2(columns)
    with torch.cuda.device_of(logits):
        kernel[(batch * rows,)](
            logits, seen, 0.0 if isinstance(scale, Tensor) else scale, learned, *others,
            diagonal, rows, columns, 0 if seen is None else seen.stride(0), BM=width,
            num_warps=8 if width >= 2048 else 4,
        )  # fmt: skip
