"""Fused Triton kernels of `row_lse`.

One program owns a tile of BN queries and streams its share of the keys. The tile of keys in shared
memory serves both products of a step, `x = q k^T` and `acc += exp(x) k`, and no tile of x leaves the
registers. When there are too few query tiles to fill the GPU the keys are split among programs, and
their results joined in a fixed order: no atomics, the same bits on every run.

Names: i_ program or tile number, o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import GRAD_KEYS_LAUNCH, Launch, architecture_of, launch_of, padded_width, split

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(b_a, b_b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums; "ieee" widens its operands first (the interpreter's way)."""
    if PRECISION == "ieee":
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def _key_tile(
    p_keys, p_mask, i_tile, o_kd, M, stride_m, stride_mm,
    BM: tl.constexpr, HAS_MASK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """A tile of keys [BM, BD] and which of its rows count [BM]; the others are loaded as zero.

    `o_kd` [BM, BD] are offsets inside a tile; only the tile's own offset needs 64 bits.
    """
    o_m = i_tile * BM + tl.arange(0, BM)
    p_tile = p_keys + (i_tile * BM).to(tl.int64) * stride_m + o_kd
    m_m = o_m < M
    if CAREFUL:
        if HAS_MASK:
            p_m = p_mask + (i_tile * BM).to(tl.int64) * stride_mm + tl.arange(0, BM) * stride_mm
            m_m = tl.load(p_m, mask=m_m, other=0) != 0
        b_k = tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        b_k = tl.load(p_tile)
    return b_k, o_m, m_m


@triton.jit
def _step(
    b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset,
    SUBTRACT_MAX: tl.constexpr, EXCLUDE: tl.constexpr, WITH_KEY: tl.constexpr, WITH_MAX: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the sums of a tile of queries. Logits are in units of log 2."""
    b_x = _dot(b_q, tl.trans(b_k), PRECISION) * c  # [BN, BM]
    if CAREFUL:
        m_x = m_m[None, :]
        if EXCLUDE:
            m_x = m_x & (o_m[None, :] != o_n[:, None] + exclude_offset)
        b_x = tl.where(m_x, b_x, float("-inf"))
    if SUBTRACT_MAX:
        b_new = tl.maximum(b_top, tl.max(b_x, 1))  # [BN]
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink = tl.exp2(b_top - b_shift)
        b_p = tl.exp2(b_x - b_shift[:, None])
        b_sum = b_sum * b_shrink
        if WITH_KEY:
            b_acc = b_acc * b_shrink[:, None]
        b_top = b_new
    else:
        b_p = tl.exp2(b_x)
        if WITH_MAX:
            b_top = tl.maximum(b_top, tl.max(b_x, 1))
    b_sum += tl.sum(b_p, 1)
    if WITH_KEY:
        b_acc += _dot(b_p.to(b_k.dtype), b_k, PRECISION)  # [BN, BD]
    return b_acc, b_sum, b_top


@triton.jit
def row_lse_kernel(
    query, keys, key_mask, scale, lse, weighted_keys, max_logit,
    G, N, M, D, tiles_per_split, exclude_offset,
    stride_qg, stride_qn, stride_qd, stride_kg, stride_km, stride_kd, stride_mg, stride_mm,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    SUBTRACT_MAX: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr,
    WITH_KEY: tl.constexpr, WITH_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, expected key and max_logit logit of BN queries over one split of the keys.

    Outputs are contiguous, [S, G, N] and [S, G, N, D]. Neighbouring programs stream the same keys.
    """
    n_tiles = tl.cdiv(N, BN)
    i_n = tl.program_id(0) % n_tiles
    i_sg = tl.program_id(0) // n_tiles
    i_g = (i_sg % G).to(tl.int64)
    i_s = i_sg // G
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    p_q = query + i_g * stride_qg + (i_n * BN).to(tl.int64) * stride_qn
    o_qd = tl.arange(0, BN)[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_q + o_qd, mask=m_n[:, None], other=0.0)  # [BN, BD]
    o_kd = tl.arange(0, BM)[:, None] * stride_km + o_d[None, :] * stride_kd
    p_keys = keys + i_g * stride_kg
    p_mask = key_mask + i_g * stride_mg
    c = tl.load(scale).to(tl.float32) * LOG2E

    b_sum = tl.zeros([BN], tl.float32)
    b_top = tl.full([BN], float("-inf"), tl.float32)
    b_acc = tl.zeros([BN, BD], tl.float32)

    # Tiles that need no per-element test come first: whole ones, off the excluded diagonal.
    first = i_s * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BM))
    whole = tl.maximum(tl.minimum(last, M // BM), first)
    skip_from = whole
    skipped = 0
    if EXCLUDE:
        begin = tl.maximum(i_n * BN + exclude_offset, 0) // BM
        end = tl.cdiv(tl.maximum((i_n + 1) * BN + exclude_offset, 0), BM)
        skip_from = tl.minimum(tl.maximum(begin, first), whole)
        skipped = tl.minimum(tl.maximum(end, skip_from), whole) - skip_from
    STAGES: tl.constexpr = None if HAS_MASK else 1  # the few careful tiles are not worth a pipeline
    if HAS_MASK:
        skip_from = first
        skipped = whole - first
    else:
        for i in range(first, whole - skipped):
            i_tile = tl.where(i < skip_from, i, i + skipped)
            b_k, o_m, m_m = _key_tile(
                p_keys, p_mask, i_tile, o_kd, M, stride_km, stride_mm, BM, HAS_MASK, False
            )
            b_acc, b_sum, b_top = _step(
                b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset,
                SUBTRACT_MAX, EXCLUDE, WITH_KEY, WITH_MAX, PRECISION, False,
            )  # fmt: skip
    for i in tl.range(skipped + last - whole, num_stages=STAGES):
        i_tile = tl.where(i < skipped, skip_from + i, whole + i - skipped)
        b_k, o_m, m_m = _key_tile(
            p_keys, p_mask, i_tile, o_kd, M, stride_km, stride_mm, BM, HAS_MASK, True
        )
        b_acc, b_sum, b_top = _step(
            b_q, b_acc, b_sum, b_top, b_k, o_n, o_m, m_m, c, exclude_offset,
            SUBTRACT_MAX, EXCLUDE, WITH_KEY, WITH_MAX, PRECISION, True,
        )  # fmt: skip

    m_none = b_sum == 0.0
    b_safe = tl.where(m_none, 1.0, b_sum)
    b_lse = tl.log2(b_safe)
    if SUBTRACT_MAX:
        b_lse += b_top
    o_out = i_sg.to(tl.int64) * N + o_n
    tl.store(lse + o_out, tl.where(m_none, float("-inf"), b_lse / LOG2E), mask=m_n)
    if WITH_MAX:
        tl.store(max_logit + o_out, b_top / LOG2E, mask=m_n)
    if WITH_KEY:
        b_out = (b_acc / b_safe[:, None]).to(weighted_keys.dtype.element_ty)
        m_out = m_n[:, None] & (o_d < D)[None, :]
        tl.store(weighted_keys + o_out[:, None] * D + o_d[None, :], b_out, mask=m_out)


@triton.jit
def row_lse_grad_keys_kernel(
    grad_rows, query, keys, key_mask, scale, lse, grad_keys,
    G, N, M, D, tiles_per_split, exclude_offset,
    stride_qg, stride_qn, stride_qd, stride_kg, stride_km, stride_kd, stride_mg, stride_mm,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BM keys over one split of the queries: the forward pass with its roles swapped."""
    m_tiles = tl.cdiv(M, BM)
    i_m = tl.program_id(0) % m_tiles
    i_sg = tl.program_id(0) // m_tiles
    i_g = (i_sg % G).to(tl.int64)
    i_s = i_sg // G
    o_d = tl.arange(0, BD)
    o_kd = tl.arange(0, BM)[:, None] * stride_km + o_d[None, :] * stride_kd
    o_qd = tl.arange(0, BN)[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_k, o_m, m_m = _key_tile(
        keys + i_g * stride_kg, key_mask + i_g * stride_mg, i_m, o_kd, M,
        stride_km, stride_mm, BM, HAS_MASK, True,
    )  # fmt: skip
    c = tl.load(scale).to(tl.float32) * LOG2E
    b_acc = tl.zeros([BM, BD], tl.float32)
    first = i_s * tiles_per_split
    p_q = query + i_g * stride_qg + (first * BN).to(tl.int64) * stride_qn + o_qd
    for i_n in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(N, BN))):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        b_q = tl.load(p_q, mask=m_n[:, None], other=0.0)  # [BN, BD]
        p_q += BN * stride_qn
        b_lse = tl.load(lse + i_g * N + o_n, mask=m_n, other=float("-inf"))
        b_grad = tl.load(grad_rows + i_g * N + o_n, mask=m_n, other=0.0)
        b_x = _dot(b_k, tl.trans(b_q), PRECISION) * c  # [BM, BN]
        m_x = m_m[:, None] & (b_lse != float("-inf"))[None, :]  # a row without keys has no p
        if EXCLUDE:
            m_x = m_x & (o_m[:, None] != o_n[None, :] + exclude_offset)
        b_p = tl.where(m_x, tl.exp2(b_x - (b_lse * LOG2E)[None, :]), 0.0) * b_grad[None, :]
        if b_q.dtype == tl.float16:  # p * grad is too small for float16: tf32 has its mantissa
            b_acc += tl.dot(b_p, b_q.to(tl.float32), input_precision="tf32")
        else:
            b_acc += _dot(b_p.to(b_q.dtype), b_q, PRECISION)
    o_out = (i_sg.to(tl.int64) * M + o_m)[:, None] * D + o_d[None, :]
    b_out = b_acc.to(grad_keys.dtype.element_ty)
    tl.store(grad_keys + o_out, b_out, mask=(o_m < M)[:, None] & (o_d < D)[None, :])


# --- Launchers ------------------------------------------------------------------------------------


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    *,
    subtract_max: bool,
    with_weighted_keys: bool,
    with_max: bool,
    splits: int | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Same contract as `chunked.row_lse`. `splits` and `launch` override the table, for tests."""
    (groups, rows, width), columns = query.shape, keys.shape[1]
    operands = _operands(query, keys)
    launch = launch or launch_of(architecture_of(query.device), operands[0].dtype, width, with_max)
    n_tiles = triton.cdiv(rows, launch.BN) * groups
    splits, per_split = split(n_tiles, triton.cdiv(columns, launch.BM), query.device, splits)

    lse = query.new_empty((splits, groups, rows), dtype=torch.float32)
    max_logit = torch.empty_like(lse) if with_max else None
    expected_dtype = query.dtype if splits == 1 else torch.float32
    weighted_keys = (
        query.new_empty((splits, groups, rows, width), dtype=expected_dtype)
        if with_weighted_keys
        else None
    )
    if lse.numel() == 0:
        return _join(lse, weighted_keys, max_logit, query.dtype)
    with torch.cuda.device_of(query):
        row_lse_kernel[(n_tiles * splits,)](
            *operands, _bytes(key_mask, query), _pointer(scale, query),
            lse, _or(weighted_keys, lse), _or(max_logit, lse),
            groups, rows, columns, width, per_split, exclude_offset or 0,
            *operands[0].stride(), *_strides(operands[1]), *_strides(key_mask),
            BN=launch.BN, BM=launch.BM, BD=padded_width(width),
            SUBTRACT_MAX=subtract_max, HAS_MASK=key_mask is not None, EXCLUDE=exclude_offset is not None,
            WITH_KEY=with_weighted_keys, WITH_MAX=with_max, PRECISION=_precision(query),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return _join(lse, weighted_keys, max_logit, query.dtype)


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
    (groups, rows, width), columns = query.shape, keys.shape[1]
    operands = _operands(query, keys)
    launch = launch or GRAD_KEYS_LAUNCH[max(64, padded_width(width))]
    m_tiles = triton.cdiv(columns, launch.BM) * groups
    splits, per_split = split(m_tiles, triton.cdiv(rows, launch.BN), query.device, splits)

    dtype = keys.dtype if splits == 1 else torch.float32
    shared = keys.shape[0] == 1 and groups > 1
    dtype = torch.float32 if shared else dtype
    grad_keys = keys.new_empty((splits, groups, columns, width), dtype=dtype)
    if grad_keys.numel() == 0:
        return grad_keys.new_zeros(keys.shape, dtype=keys.dtype)
    with torch.cuda.device_of(query):
        row_lse_grad_keys_kernel[(m_tiles * splits,)](
            grad_rows.contiguous(), *operands, _bytes(key_mask, query), _pointer(scale, query),
            lse, grad_keys,
            groups, rows, columns, width, per_split, exclude_offset or 0,
            *operands[0].stride(), *_strides(operands[1]), *_strides(key_mask),
            BN=launch.BN, BM=launch.BM, BD=padded_width(width),
            HAS_MASK=key_mask is not None, EXCLUDE=exclude_offset is not None,
            PRECISION=_precision(query),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    if shared:
        return grad_keys.sum(dim=(0, 1)).unsqueeze(0).to(keys.dtype)
    return grad_keys[0] if splits == 1 else grad_keys.sum(dim=0).to(keys.dtype)


def _precision(query: Tensor) -> str:
    """How float32 tiles are multiplied; the interpreter, on a CPU, has no matrix units to imitate."""
    return "tf32" if query.device.type == "cuda" else "ieee"


def _operands(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as the kernel reads them: in place where it can, else one copy.

    A copy is made for another dtype (the query's; bfloat16 for float32 at precision "medium"), for a
    width that is not a power of two, and for strides too long for 32-bit offsets inside a tile.
    """
    dtype = query.dtype
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        dtype = torch.bfloat16
    padding = padded_width(query.shape[-1]) - query.shape[-1]
    operands = []
    for operand in (query.to(dtype), keys.to(dtype)):
        if padding:
            operand = torch.nn.functional.pad(operand, (0, padding))
        elif 256 * (operand.stride(1) + operand.stride(2)) >= 2**31:
            operand = operand.contiguous()
        operands.append(operand)
    return operands[0], operands[1]


def _join(
    lse: Tensor, weighted_keys: Tensor | None, max_logit: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add up the splits, in their order: sums of exponentials, and their weighted means."""
    if lse.shape[0] == 1:
        weighted_keys = None if weighted_keys is None else weighted_keys[0]
        return lse[0], weighted_keys, None if max_logit is None else max_logit[0]
    total = lse.logsumexp(dim=0)
    if weighted_keys is not None:
        weights = (lse - total.clamp_min(torch.finfo(lse.dtype).min)).exp().unsqueeze(-1)
        weighted_keys = (weights * weighted_keys).sum(dim=0).to(dtype)
    return total, weighted_keys, None if max_logit is None else max_logit.amax(dim=0)


def _bytes(key_mask: Tensor | None, query: Tensor) -> Tensor:
    return query if key_mask is None else key_mask.view(torch.uint8)


def _pointer(scale: float | Tensor, query: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=query.device)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides, 0 along a batch of one that all groups share."""
    if tensor is None:
        return (0, 0)
    return (0 if tensor.shape[0] == 1 else tensor.stride(0), *tensor.stride()[1:])


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel takes a pointer also where it will not follow it."""
    return unused if tensor is None else tensor
