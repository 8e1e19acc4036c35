"""What surrounds the pass over the keys, in Triton: one kernel each for prepare, join, finish, backward.

Maps are read and written where they lie, through their strides. A program of prepare and backward owns
BP pixels of one image with all their channels. Sums over pixels are taken by one program in a fixed
order: the same bits on every run.

Names: i_ program, o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import without_subclass as _plain
from .chunked import Part
from .launch import FINISH_BLOCK, FINISH_WARPS, launch_of

MIN_NORM = tl.constexpr(1e-12)  # at or below this norm a vector has no direction


@triton.jit
def _pixels(H, W, BP: tl.constexpr):
    """This program's image, its pixels there [BP], which of them exist, and their rows [BP]."""
    tiles = tl.cdiv(H * W, BP)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    return i_b, o_p, o_p < H * W, i_b * H * W + o_p


@triton.jit
def _at(p_map, i_b, o_p, W, stride_b, stride_h, stride_w, FLAT: tl.constexpr):
    """Pointers [BP] to pixels of a map; FLAT if one stride leads from each pixel to the next."""
    if FLAT:
        o_map = o_p.to(tl.int64) * stride_w
    else:
        o_map = (o_p // W).to(tl.int64) * stride_h + (o_p % W).to(tl.int64) * stride_w
    return p_map + i_b * stride_b + o_map


@triton.jit
def _rows_tile(p_rows, o_n, o_d, D, m):
    """Rows as a tile [BD, BP], in float32."""
    return tl.load(p_rows + o_n[None, :] * D + o_d[:, None], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _inverse(b_squares):
    """1 / norm; 0 where a vector has no direction, NaN where its squares overflow."""
    b_norm = tl.sqrt(b_squares)
    m_short = b_norm <= MIN_NORM
    b_norm = tl.where(m_short, 1.0, tl.where(b_norm == float("inf"), float("nan"), b_norm))
    return tl.where(m_short, 0.0, 1.0 / b_norm)


@triton.jit
def prepare_kernel(
    student, teacher, valid, rows, stats, tie,
    N, D, H, W,
    stride_sb, stride_sd, stride_sh, stride_sw, stride_tb, stride_td, stride_th, stride_tw,
    BD: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, WITH_TIE: tl.constexpr,
):  # fmt: skip
    """Rows of both maps, inverse norms, and the similarity of positives, from unrounded elements."""
    i_b, o_p, m_p, o_n = _pixels(H, W, BP)
    m_v = m_p
    if HAS_MASK:  # an invalid pixel is never read: it may hold NaN
        m_v = tl.load(valid + o_n, mask=m_p, other=0) != 0
    p_s = _at(student, i_b, o_p, W, stride_sb, stride_sh, stride_sw, FLAT)
    p_t = _at(teacher, i_b, o_p, W, stride_tb, stride_th, stride_tw, FLAT)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_dp = (o_d < D)[:, None] & m_v[None, :]
    p_s = p_s[None, :] + o_d[:, None] * stride_sd
    p_t = p_t[None, :] + o_d[:, None] * stride_td
    b_s = tl.load(p_s, mask=m_dp, other=0.0).to(tl.float32)  # [BD, BP]
    b_t = tl.load(p_t, mask=m_dp, other=0.0).to(tl.float32)
    b_ss = tl.sum(b_s * b_s, 0)
    b_tt = tl.sum(b_t * b_t, 0)
    b_st = tl.sum(b_s * b_t, 0)
    if NORMALIZE:
        b_is = _inverse(b_ss)
        b_it = _inverse(b_tt)
    else:
        b_is = tl.where(m_v, 1.0, 0.0)
        b_it = b_is
    tl.store(stats + o_n, b_is, mask=m_p)
    tl.store(stats + (o_n + N), b_it, mask=m_p)
    tl.store(stats + (o_n + N + N), b_st * b_is * b_it, mask=m_p)

    b_q = (b_s * b_is[None, :]).to(rows.dtype.element_ty)
    b_k = (b_t * b_it[None, :]).to(rows.dtype.element_ty)
    m_dp = (o_d < D)[:, None] & m_p[None, :]
    tl.store(rows + o_n[None, :] * D + o_d[:, None], b_q, mask=m_dp)
    tl.store(rows + (o_n + N)[None, :] * D + o_d[:, None], b_k, mask=m_dp)
    if WITH_TIE:
        tl.store(tie + o_n, tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 0), mask=m_p)


@triton.jit
def join_kernel(
    lse_a, weighted_keys_a, max_logit_a, lse_b, weighted_keys_b, max_logit_b, N, D,
    BN: tl.constexpr, BD: tl.constexpr, WITH_KEYS: tl.constexpr, WITH_MAX: tl.constexpr,
):  # fmt: skip
    """Two sets of keys as one, in place of the first."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_a = tl.load(lse_a + o_n, mask=m_n, other=0.0)
    b_b = tl.load(lse_b + o_n, mask=m_n, other=0.0)
    b_max = tl.maximum(b_a, b_b)
    m_none = b_max == float("-inf")  # a row without keys: not inf - inf
    b_max = tl.where(m_none, 0.0, b_max)
    b_wa = tl.exp(b_a - b_max)
    b_wb = tl.exp(b_b - b_max)
    b_sum = tl.where(m_none, 1.0, b_wa + b_wb)
    tl.store(lse_a + o_n, tl.where(m_none, float("-inf"), b_max + tl.log(b_sum)), mask=m_n)
    if WITH_MAX:
        b_ma = tl.load(max_logit_a + o_n, mask=m_n, other=0.0)
        b_mb = tl.load(max_logit_b + o_n, mask=m_n, other=0.0)
        tl.store(max_logit_a + o_n, tl.maximum(b_ma, b_mb), mask=m_n)
    if WITH_KEYS:
        b_wa = (b_wa / b_sum)[:, None]
        b_wb = (b_wb / b_sum)[:, None]
        o_d = tl.arange(0, BD)
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        o_nd = o_n[:, None] * D + o_d[None, :]
        b_ka = tl.load(weighted_keys_a + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        b_kb = tl.load(weighted_keys_b + o_nd, mask=m_nd, other=0.0).to(tl.float32)
        b_k = b_wa * b_ka + b_wb * b_kb
        tl.store(weighted_keys_a + o_nd, b_k.to(weighted_keys_a.dtype.element_ty), mask=m_nd)


@triton.jit
def _softplus(b_x):
    """log(1 + e^x); what 1 + e^-|x| rounds away is added again, so that a tiny result is exact."""
    b_e = tl.exp(-tl.abs(b_x))
    b_u = 1.0 + b_e
    return tl.maximum(b_x, 0.0) + (tl.log(b_u) + (b_e - (b_u - 1.0)) / b_u)


@triton.jit
def finish_kernel(
    lse, max_logit, tie, valid, stats, scale, loss, metrics, num_valid,
    N,
    BLOCK: tl.constexpr, LEARNED: tl.constexpr, HAS_MASK: tl.constexpr, WITH_METRICS: tl.constexpr,
    REDUCTION: tl.constexpr,
):  # fmt: skip
    """Margin and loss of every pixel, and their sums, by one program."""
    b_scale = tl.load(scale) if LEARNED else scale
    b_loss = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.float32)
    b_correct = tl.zeros([BLOCK], tl.float32)
    b_similarity = tl.zeros([BLOCK], tl.float32)
    for i in range(0, N, BLOCK):
        o_n = i + tl.arange(0, BLOCK).to(tl.int64)
        m_n = o_n < N
        m_v = m_n
        if HAS_MASK:
            m_v = tl.load(valid + o_n, mask=m_n, other=0) != 0
        b_pos = tl.load(stats + (o_n + N + N), mask=m_n, other=0.0)
        b_margin = tl.load(lse + o_n, mask=m_n, other=0.0) - b_scale * b_pos
        tl.store(stats + (o_n + N + N + N), b_margin, mask=m_n)
        b_l = tl.where(m_v, _softplus(b_margin), 0.0)
        if REDUCTION == "none":
            tl.store(loss + o_n, b_l, mask=m_n)
        b_loss += b_l
        b_count += m_v.to(tl.float32)
        if WITH_METRICS:
            b_reach = b_scale * tl.load(tie + o_n, mask=m_n, other=0.0)
            b_reach += 1e-5 * tl.abs(b_reach)  # a tie to rounding of what is multiplied
            m_top1 = tl.load(max_logit + o_n, mask=m_n, other=0.0) <= b_reach
            b_correct += (m_top1 & m_v).to(tl.float32)
            b_similarity += tl.where(m_v, b_pos, 0.0)
    total = tl.maximum(tl.sum(b_count, 0), 1.0)
    if HAS_MASK:
        tl.store(num_valid, total)
    if REDUCTION == "mean":
        tl.store(loss, tl.sum(b_loss, 0) / total)
    if REDUCTION == "sum":
        tl.store(loss, tl.sum(b_loss, 0))
    if WITH_METRICS:
        tl.store(metrics, tl.sum(b_correct, 0) / total)
        tl.store(metrics + 1, tl.sum(b_similarity, 0) / total)


@triton.jit
def backward_kernel(
    grad, rows, weighted_keys, stats, num_valid, scale, grad_student, grad_scale,
    divisor, N, D, H, W, stride_b, stride_d, stride_h, stride_w,
    BD: tl.constexpr, BP: tl.constexpr, FLAT: tl.constexpr,
    NORMALIZE: tl.constexpr, LEARNED: tl.constexpr, HAS_COUNT: tl.constexpr,
    PER_PIXEL: tl.constexpr, NEEDS_SCALE: tl.constexpr,
):  # fmt: skip
    """From weighted keys through the normalisation to the student's map, in its dtype and strides."""
    i_b, o_p, m_p, o_n = _pixels(H, W, BP)
    b_inv = tl.load(stats + o_n, mask=m_p, other=0.0)
    b_margin = tl.load(stats + (o_n + N + N + N), mask=m_p, other=0.0)
    b_grad = tl.load(grad + o_n, mask=m_p, other=0.0) if PER_PIXEL else tl.load(grad)
    b_grad = b_grad / (tl.load(num_valid) if HAS_COUNT else divisor)
    b_e = tl.exp(-tl.abs(b_margin))
    b_w = b_grad * tl.where(b_margin > 0.0, 1.0, b_e) / (1.0 + b_e)  # sigmoid, without overflow
    b_scale = tl.load(scale) if LEARNED else scale

    o_d = tl.arange(0, BD).to(tl.int64)
    m_dp = (o_d < D)[:, None] & m_p[None, :]
    b_q = _rows_tile(rows, o_n, o_d, D, m_dp)  # [BD, BP]
    b_wk = _rows_tile(weighted_keys, o_n, o_d, D, m_dp)
    b_d = b_wk - _rows_tile(rows, o_n + N, o_d, D, m_dp)
    if NEEDS_SCALE:
        b_pos = tl.load(stats + (o_n + N + N), mask=m_p, other=0.0)
        b_gs = tl.where(b_inv == 0.0, 0.0, b_w * (tl.sum(b_q * b_wk, 0) - b_pos))
        tl.store(grad_scale + o_n, b_gs, mask=m_p)
    if NORMALIZE:
        b_d -= b_q * tl.sum(b_q * b_d, 0)[None, :]
    b_w *= b_scale * b_inv
    # Zero at an invalid pixel, and at one without direction, also beside a NaN.
    b_out = tl.where((b_inv == 0.0)[None, :], 0.0, b_d * b_w[None, :])
    p_out = _at(grad_student, i_b, o_p, W, stride_b, stride_h, stride_w, FLAT)
    p_out = p_out[None, :] + o_d[:, None] * stride_d
    tl.store(p_out, b_out.to(grad_student.dtype.element_ty), mask=m_dp)


# --- Launchers ------------------------------------------------------------------------------------


def prepare(
    rows: Tensor,
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    *,
    normalize: bool,
    with_tie: bool,
) -> Tensor | None:
    """Same contract as `chunked.prepare`."""
    tie = torch.empty_like(stats[0]) if with_tie else None
    student, teacher = _plain(student), _plain(teacher)
    batch, channels, height, width = student.shape
    if stats.numel() == 0:
        return tie
    launch = launch_of(channels)
    flat = _is_flat(student) and _is_flat(teacher)
    with torch.cuda.device_of(rows):
        prepare_kernel[(batch * triton.cdiv(height * width, launch.BP),)](
            student, teacher, _bytes(valid_mask, stats), rows, stats, _or(tie, stats),
            stats.shape[1], channels, height, width,
            *_strides(student, flat), *_strides(teacher, flat),
            BD=launch.BD, BP=launch.BP, FLAT=flat,
            NORMALIZE=normalize, HAS_MASK=valid_mask is not None, WITH_TIE=with_tie,
            num_warps=launch.warps,
        )  # fmt: skip
    return tie


def join(a: Part, b: Part, dtype: torch.dtype) -> Part:
    """Same contract as `chunked.join`."""
    lse, weighted_keys, max_logit = a
    width, launch = 1, launch_of(1)
    if weighted_keys is not None:
        weighted_keys, width = weighted_keys.to(dtype), weighted_keys.shape[-1]
        launch = launch_of(width)
    if lse.numel() == 0:
        return lse, weighted_keys, max_logit
    with torch.cuda.device_of(lse):
        join_kernel[(triton.cdiv(lse.numel(), launch.BP),)](
            lse, _or(weighted_keys, lse), _or(max_logit, lse), b[0], _or(b[1], lse), _or(b[2], lse),
            lse.numel(), width,
            BN=launch.BP, BD=launch.BD, WITH_KEYS=weighted_keys is not None,
            WITH_MAX=max_logit is not None, num_warps=launch.warps,
        )  # fmt: skip
    return lse, weighted_keys, max_logit


def finish(
    lse: Tensor,
    max_logit: Tensor | None,
    tie: Tensor | None,
    stats: Tensor,
    scale: float | Tensor,
    valid_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Same contract as `chunked.finish`."""
    pixels = stats.shape[1]
    loss = stats.new_empty(pixels if reduction == "none" else ())
    metrics = None if tie is None else stats.new_empty(2)
    num_valid = None if valid_mask is None else stats.new_empty(())
    with torch.cuda.device_of(stats):
        finish_kernel[(1,)](
            lse, _or(max_logit, lse), _or(tie, lse), _bytes(valid_mask, stats), stats, scale,
            loss, _or(metrics, lse), _or(num_valid, lse),
            pixels,
            BLOCK=FINISH_BLOCK, LEARNED=isinstance(scale, Tensor), HAS_MASK=num_valid is not None,
            WITH_METRICS=metrics is not None, REDUCTION=reduction, num_warps=FINISH_WARPS,
        )  # fmt: skip
    return loss, metrics, num_valid


def backward(
    grad: Tensor,
    student: Tensor,
    rows: Tensor,
    stats: Tensor,
    weighted_keys: Tensor,
    num_valid: Tensor | None,
    scale: float | Tensor,
    *,
    normalize: bool,
    mean: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `chunked.backward`."""
    grad_student = torch.empty_like(_plain(student))
    batch, channels, height, width = student.shape
    grad_scale = torch.empty_like(stats[0]) if needs_scale else None
    launch, flat = launch_of(channels), _is_flat(grad_student)
    if stats.numel() > 0:
        with torch.cuda.device_of(rows):
            backward_kernel[(batch * triton.cdiv(height * width, launch.BP),)](
                grad.contiguous(), rows, weighted_keys, stats, _or(num_valid, stats), scale,
                grad_student, _or(grad_scale, stats),
                float(stats.shape[1] if mean else 1), stats.shape[1], channels, height, width,
                *_strides(grad_student, flat),
                BD=launch.BD, BP=launch.BP, FLAT=flat,
                NORMALIZE=normalize, LEARNED=isinstance(scale, Tensor),
                HAS_COUNT=mean and num_valid is not None, PER_PIXEL=grad.dim() > 0,
                NEEDS_SCALE=needs_scale, num_warps=launch.warps,
            )  # fmt: skip
    return grad_student, None if grad_scale is None else grad_scale.sum()


def _is_flat(image: Tensor) -> bool:
    """Whether one stride leads from each pixel of a map to the next."""
    _, _, height, width = image.shape
    return height == 1 or width == 1 or image.stride(2) == width * image.stride(3)


def _strides(image: Tensor, flat: bool) -> tuple[int, ...]:
    """Of batch, channels, rows and columns; where flat, the last is that from pixel to pixel."""
    strides = image.stride()
    return (*strides[:3], strides[2]) if flat and image.shape[3] == 1 else strides


def _bytes(valid_mask: Tensor | None, unused: Tensor) -> Tensor:
    return unused if valid_mask is None else _plain(valid_mask).contiguous().view(torch.uint8)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel takes a pointer also where it will not follow it."""
    return unused if tensor is None else tensor
