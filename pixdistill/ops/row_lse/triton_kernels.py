"""Fused Triton kernels of the pass; `triton_grad_keys.py` has the gradient of the keys.

One program owns a tile of BN queries and streams one split of the keys. The tile of keys in shared
memory serves both products of a step, `x = q k^T` and `acc += exp(x) k`, and no tile of x leaves the
registers. Where the query tiles do not fill the GPU, the keys are split among programs and a second
kernel joins the splits in a fixed order: no atomics, the same bits on every run.

Names: i_ program or tile number, o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    JOIN_ELEMENTS,
    Launch,
    launch_of,
    padded_width,
    splits_of,
    why_not_hopper,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums; "ieee" widens its operands first (the interpreter's way)."""
    if PRECISION == "ieee":
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def key_tile(
    p_keys, p_mask, first, o_kd, M, BM: tl.constexpr, BD: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The keys from `first` on [BM, BD] and which of them count [BM]; the others are loaded as zero.

    `o_kd` [BM, BD] are offsets inside a tile; only the tile's own offset needs 64 bits.
    """
    o_tile = first.to(tl.int64)
    o_m = first + tl.arange(0, BM)
    p_tile = p_keys + o_tile * BD + o_kd
    m_m = o_m < M
    if CAREFUL:
        if p_mask is not None:
            m_m = tl.load(p_mask + o_tile + tl.arange(0, BM), mask=m_m, other=0) != 0
        b_k = tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        b_k = tl.load(p_tile)
    return b_k, o_m, m_m


@triton.jit
def _step(
    b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset, b_ql, p_labels,
    SUBTRACT_MAX: tl.constexpr, WITH_KEYS: tl.constexpr, WITH_MAX: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the sums of a tile of queries. Logits are in units of log 2."""
    b_x = dot(b_q, tl.trans(b_k), PRECISION) * c  # [BN, BM]
    if CAREFUL:
        m_x = m_m[None, :]
        if exclude_offset is not None:
            m_x = m_x & (o_m[None, :] != o_n[:, None] + exclude_offset)
        if p_labels is not None:
            b_kl = tl.maximum(tl.load(p_labels + o_m, mask=m_m, other=-1), -1)
            m_x = m_x & (b_kl[None, :] != b_ql[:, None])
        b_x = tl.where(m_x, b_x, float("-inf"))
    if SUBTRACT_MAX:
        b_new = tl.maximum(b_top, tl.max(b_x, 1))  # [BN]
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink = tl.exp2(b_top - b_shift)
        b_p = tl.exp2(b_x - b_shift[:, None])
        b_sum = b_sum * b_shrink
        if WITH_KEYS:
            b_acc = b_acc * b_shrink[:, None]
        b_top = b_new
    else:
        b_p = tl.exp2(b_x)
        if WITH_MAX:
            b_top = tl.maximum(b_top, tl.max(b_p, 1))
    b_sum += tl.sum(b_p, 1)
    if WITH_KEYS:
        b_acc += dot(b_p.to(b_k.dtype), b_k, PRECISION)  # [BN, BD]
    return b_acc, b_sum, b_top


@triton.jit(do_not_specialize=["exclude_offset", "G", "N", "M", "tiles_per_split"])
def row_lse_kernel(
    query, keys, key_mask, query_labels, key_labels, scale, learned_scale,
    lse, weighted_keys, max_logit,
    exclude_offset, G, N, M, tiles_per_split,
    stride_qg, stride_kg, stride_mg, stride_lg,
    BN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, weighted keys and largest logit of BN queries over one split of the keys.

    Rows of query, keys, mask and labels are contiguous; so are the outputs, [S, G, N] and
    [S, G, N, D]. `key_mask`, both labels, `learned_scale`, `weighted_keys`, `max_logit` and
    `exclude_offset` may be None. Neighbouring programs stream the same keys.
    """
    PER_KEY: tl.constexpr = key_mask is not None or key_labels is not None
    WITH_KEYS: tl.constexpr = weighted_keys is not None
    WITH_MAX: tl.constexpr = max_logit is not None
    n_tiles = tl.cdiv(N, BN)
    i_n = tl.program_id(0) % n_tiles
    i_sg = tl.program_id(0) // n_tiles
    i_g = (i_sg % G).to(tl.int64)
    i_s = i_sg // G
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    p_q = query + i_g * stride_qg + (i_n * BN).to(tl.int64) * BD
    o_nd = tl.arange(0, BN)[:, None] * BD + o_d[None, :]
    b_q = tl.load(p_q + o_nd, mask=m_n[:, None], other=0.0)  # [BN, BD]
    o_kd = tl.arange(0, BM)[:, None] * BD + o_d[None, :]
    p_keys = keys + i_g * stride_kg
    p_mask = None if key_mask is None else key_mask + i_g * stride_mg
    p_labels = None if key_labels is None else key_labels + i_g * stride_lg
    b_ql = None
    if query_labels is not None:  # a negative one equals none of the keys', which are at least -1
        b_ql = tl.load(query_labels + i_g * N + o_n, mask=m_n, other=-1)
        b_ql = tl.where(b_ql < 0, -2, b_ql)
    c = scale * LOG2E  # logits in units of log 2
    if learned_scale is not None:
        c = tl.load(learned_scale).to(tl.float32) * LOG2E

    b_sum = tl.zeros([BN], tl.float32)
    b_top = tl.full([BN], float("-inf") if SUBTRACT_MAX else 0.0, tl.float32)
    b_acc = tl.zeros([BN, BD], tl.float32)

    # Tiles that need no test per element come first: whole ones, off the excluded diagonal.
    first = i_s * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BM))
    whole = tl.maximum(tl.minimum(last, M // BM), first)
    skip_from = whole
    skipped = 0
    if exclude_offset is not None:
        begin = tl.maximum(i_n * BN + exclude_offset, 0) // BM
        end = tl.cdiv(tl.maximum((i_n + 1) * BN + exclude_offset, 0), BM)
        skip_from = tl.minimum(tl.maximum(begin, first), whole)
        skipped = tl.minimum(tl.maximum(end, skip_from), whole) - skip_from
    STAGES: tl.constexpr = None if PER_KEY else 1  # a few careful tiles need no pipeline
    if PER_KEY:
        skip_from = first
        skipped = whole - first
    else:
        for i in range(first, whole - skipped):
            first_key = tl.where(i < skip_from, i, i + skipped) * BM
            b_k, o_m, m_m = key_tile(p_keys, p_mask, first_key, o_kd, M, BM, BD, False)
            b_acc, b_sum, b_top = _step(
                b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset, b_ql, p_labels,
                SUBTRACT_MAX, WITH_KEYS, WITH_MAX, PRECISION, False,
            )  # fmt: skip
    # Then the careful ones, BC keys at a time: the tiles at the diagonal first, then the ragged one.
    o_cd = tl.arange(0, BC)[:, None] * BD + o_d[None, :]
    for i in tl.range((skipped + last - whole) * (BM // BC), num_stages=STAGES):
        i_tile = i // (BM // BC)
        i_tile = tl.where(i_tile < skipped, skip_from + i_tile, whole + i_tile - skipped)
        first_key = i_tile * BM + i % (BM // BC) * BC
        b_k, o_m, m_m = key_tile(p_keys, p_mask, first_key, o_cd, M, BC, BD, True)
        b_acc, b_sum, b_top = _step(
            b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset, b_ql, p_labels,
            SUBTRACT_MAX, WITH_KEYS, WITH_MAX, PRECISION, True,
        )  # fmt: skip

    m_none = b_sum == 0.0
    b_safe = tl.where(m_none, 1.0, b_sum)
    b_lse = tl.log2(b_safe)
    if SUBTRACT_MAX:
        b_lse += b_top
    o_out = i_sg.to(tl.int64) * N + i_n * BN
    b_lse = tl.where(m_none, float("-inf"), b_lse / LOG2E)
    tl.store(lse + o_out + tl.arange(0, BN), b_lse, mask=m_n)
    if WITH_MAX:
        if not SUBTRACT_MAX:  # b_top is the largest exp2(logit)
            b_top = tl.log2(tl.where(m_none, 1.0, b_top))
        b_top = tl.where(m_none, float("-inf"), b_top / LOG2E)
        tl.store(max_logit + o_out + tl.arange(0, BN), b_top, mask=m_n)
    if WITH_KEYS:
        b_out = (b_acc / b_safe[:, None]).to(weighted_keys.dtype.element_ty)
        tl.store(weighted_keys + o_out * BD + o_nd, b_out, mask=m_n[:, None])


@triton.jit(do_not_specialize=["S", "R"])
def join_kernel(
    split_lse, split_keys, split_max, lse, weighted_keys, max_logit, S, R,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Join S splits of R rows, in their order: logsumexp(lse_s) and sum_s softmax(lse)_s keys_s."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < R
    p_lse = split_lse + o_r
    b_top = tl.full([BR], float("-inf"), tl.float32)
    for _ in range(S):
        b_top = tl.maximum(b_top, tl.load(p_lse, mask=m_r, other=0.0))
        p_lse += R
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)

    o_rd = o_r.to(tl.int64)[:, None] * BD + tl.arange(0, BD)[None, :]
    p_lse = split_lse + o_r
    b_sum = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BD], tl.float32)
    if weighted_keys is not None:
        p_keys = split_keys + o_rd
    for _ in range(S):
        b_weight = tl.exp2((tl.load(p_lse, mask=m_r, other=0.0) - b_shift) * LOG2E)
        p_lse += R
        b_sum += b_weight
        if weighted_keys is not None:
            b_acc += b_weight[:, None] * tl.load(p_keys, mask=m_r[:, None], other=0.0)
            p_keys += R.to(tl.int64) * BD
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(lse + o_r, b_top + tl.log2(b_safe) / LOG2E, mask=m_r)
    if weighted_keys is not None:
        b_out = (b_acc / b_safe[:, None]).to(weighted_keys.dtype.element_ty)
        tl.store(weighted_keys + o_rd, b_out, mask=m_r[:, None])
    if max_logit is not None:
        p_max = split_max + o_r
        b_max = tl.full([BR], float("-inf"), tl.float32)
        for _ in range(S):
            b_max = tl.maximum(b_max, tl.load(p_max, mask=m_r, other=0.0))
            p_max += R
        tl.store(max_logit + o_r, b_max, mask=m_r)


# --- Launchers ------------------------------------------------------------------------------------


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
    splits: int | None = None,
    launch: Launch | None = None,
    hopper: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Same contract as `chunked.row_lse`. `splits`, `launch` and `hopper` are for tests."""
    (groups, rows, width), columns = query.shape, keys.shape[1]
    if hopper is None:
        hopper = launch is None and not why_not_hopper(
            query, keys, key_mask, scale, labels=labels,
            subtract_max=subtract_max, with_weighted_keys=with_weighted_keys, with_max=with_max,
        )  # fmt: skip
    operands = (query, keys, None) if hopper else operands_of(query, keys, key_mask)
    padded = padded_width(width) if hopper else operands[0].shape[2]
    lse = query.new_empty((groups, rows), dtype=torch.float32)
    weighted_keys = query.new_empty((groups, rows, padded)) if with_weighted_keys else None
    max_logit = torch.empty_like(lse) if with_max else None
    outputs: Any = (lse, weighted_keys, max_logit)
    parts = outputs
    if lse.numel() > 0:
        launch = launch or launch_of(query.device, operands[0].dtype, padded, hopper)
        careful = 32 if key_mask is None else launch.masked
        careful = min(launch.BM, careful if labels is None else launch.labelled)
        query_labels, key_labels = labels or (None, None)
        programs = triton.cdiv(rows, launch.BN) * groups
        tiles = triton.cdiv(columns, launch.BM)
        splits, per_split = splits_of(programs, tiles, launch, query.device, splits)
        if splits > 1:
            parts = tuple(_parts(splits, output) for output in outputs)
        with torch.cuda.device_of(query):
            if hopper:
                from .hopper import launch as launch_hopper  # needs a recent Triton

                launch_hopper(
                    query, keys, float(scale), parts[0], parts[1], exclude_offset, splits, per_split
                )
            else:
                row_lse_kernel[(programs * splits,)](
                    *operands, query_labels, key_labels, *number_and_pointer(scale), *parts,
                    exclude_offset, groups, rows, columns, per_split,
                    *batch_strides((*operands, key_labels)),
                    BN=launch.BN, BM=launch.BM, BC=careful, BD=padded,
                    SUBTRACT_MAX=subtract_max, PRECISION=precision_of(query),
                    num_warps=launch.warps, num_stages=launch.stages,
                )  # fmt: skip
            if splits > 1:
                block = max(1, JOIN_ELEMENTS // padded)
                join_kernel[(triton.cdiv(groups * rows, block),)](
                    *parts, *outputs, splits, groups * rows, BR=block, BD=padded
                )
    if padded != width and weighted_keys is not None:
        weighted_keys = weighted_keys[..., :width].contiguous()
    return lse, weighted_keys, max_logit


def precision_of(query: Tensor) -> str:
    """How float32 tiles are multiplied; the interpreter, on a CPU, has no matrix units to imitate."""
    return "tf32" if query.device.type == "cuda" else "ieee"


def operands_of(
    query: Tensor, keys: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, keys and mask as the kernels read them: in place where it can be, else one copy.

    A copy is made for another dtype (the query's; bfloat16 for float32 at precision "medium"), for a
    width that is not a power of two, and where rows do not lie one after the other.
    """
    dtype = query.dtype
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        dtype = torch.bfloat16
    padding = padded_width(query.shape[2]) - query.shape[2]
    operands = []
    for operand in (query, keys):
        if operand.dtype != dtype:
            operand = operand.to(dtype)
        if padding:
            operand = F.pad(operand, (0, padding))
        elif operand.stride()[1:] != (operand.shape[2], 1):
            operand = operand.contiguous()
        operands.append(operand)
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    return operands[0], operands[1], key_mask


def batch_strides(operands: tuple[Tensor | None, ...]) -> list[int]:
    """Their strides along the batch: 0 where all entries share one."""
    return [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in operands]


def number_and_pointer(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """A scale that is a number is an argument of the kernel; a learned one is read from memory."""
    return (0.0, scale) if isinstance(scale, Tensor) else (scale, None)


def _parts(splits: int, output: Tensor | None) -> Tensor | None:
    """An output of each split, in float32."""
    if output is None:
        return None
    return output.new_empty((splits, *output.shape), dtype=torch.float32)
