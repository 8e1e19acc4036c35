"""Triton kernel of the gradient of the keys: names and tiles as in `triton_kernels.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import GRAD_KEYS_LAUNCH, Launch, splits_of
from .triton_kernels import (
    LOG2E,
    batch_strides,
    dot,
    key_tile,
    number_and_pointer,
    operands_of,
    precision_of,
)


@triton.jit(do_not_specialize=["exclude_offset", "G", "N", "M", "tiles_per_split"])
def row_lse_grad_keys_kernel(
    query, keys, key_mask, scale, learned_scale, grad_rows, lse, grad_keys,
    exclude_offset, G, N, M, tiles_per_split,
    stride_qg, stride_kg, stride_mg,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BM keys over one split of the queries: the forward pass with its roles swapped."""
    m_tiles = tl.cdiv(M, BM)
    i_m = tl.program_id(0) % m_tiles
    i_sg = tl.program_id(0) // m_tiles
    i_g = (i_sg % G).to(tl.int64)
    i_s = i_sg // G
    o_d = tl.arange(0, BD)
    o_kd = tl.arange(0, BM)[:, None] * BD + o_d[None, :]
    o_qd = tl.arange(0, BN)[:, None] * BD + o_d[None, :]
    p_mask = None if key_mask is None else key_mask + i_g * stride_mg
    b_k, o_m, m_m = key_tile(keys + i_g * stride_kg, p_mask, i_m * BM, o_kd, M, BM, BD, True)
    c = scale * LOG2E
    if learned_scale is not None:
        c = tl.load(learned_scale).to(tl.float32) * LOG2E
    b_acc = tl.zeros([BM, BD], tl.float32)
    first = i_s * tiles_per_split
    p_q = query + i_g * stride_qg + (first * BN).to(tl.int64) * BD + o_qd
    for i_n in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(N, BN))):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        b_q = tl.load(p_q, mask=m_n[:, None], other=0.0)  # [BN, BD]
        p_q += BN * BD
        b_lse = tl.load(lse + i_g * N + o_n, mask=m_n, other=float("-inf"))
        b_grad = tl.load(grad_rows + i_g * N + o_n, mask=m_n, other=0.0)
        b_x = dot(b_k, tl.trans(b_q), PRECISION) * c  # [BM, BN]
        m_x = m_m[:, None] & (b_lse != float("-inf"))[None, :]  # a row without keys has no p
        if exclude_offset is not None:
            m_x = m_x & (o_m[:, None] != o_n[None, :] + exclude_offset)
        b_p = tl.where(m_x, tl.exp2(b_x - (b_lse * LOG2E)[None, :]), 0.0) * b_grad[None, :]
        if b_q.dtype == tl.float16:  # p * grad is too small for float16: tf32 has its mantissa
            b_acc += tl.dot(b_p, b_q.to(tl.float32), input_precision="tf32")
        else:
            b_acc += dot(b_p.to(b_q.dtype), b_q, PRECISION)
    p_out = grad_keys + (i_sg.to(tl.int64) * M + i_m * BM) * BD + o_kd
    tl.store(p_out, b_acc.to(grad_keys.dtype.element_ty), mask=(o_m < M)[:, None])


def row_lse_grad_keys(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
    *,
    splits: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Same contract as `chunked.row_lse_grad_keys`. `splits` and `launch` are for tests."""
    (groups, rows, width), (shared, columns, _) = query.shape, keys.shape
    operands = operands_of(query, keys, key_mask)
    padded = operands[0].shape[2]
    if keys.numel() == 0:
        return torch.zeros_like(keys)
    launch = launch or GRAD_KEYS_LAUNCH[max(64, padded)]
    programs = triton.cdiv(columns, launch.BM) * groups
    tiles = triton.cdiv(rows, launch.BN)
    splits, per_split = splits_of(programs, tiles, launch, query.device, splits)
    parts = splits * groups // shared  # to be added: also the batch entries of shared keys
    grad_keys = keys.new_empty(
        (parts, shared, columns, padded), dtype=keys.dtype if parts == 1 else torch.float32
    )
    with torch.cuda.device_of(query):
        row_lse_grad_keys_kernel[(programs * splits,)](
            *operands, *number_and_pointer(scale), grad_rows.contiguous(), lse, grad_keys,
            exclude_offset, groups, rows, columns, per_split, *batch_strides(operands),
            BN=launch.BN, BM=launch.BM, BD=padded, PRECISION=precision_of(query),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    total = grad_keys[0] if parts == 1 else grad_keys.sum(dim=0).to(keys.dtype)
    return total[..., :width]
