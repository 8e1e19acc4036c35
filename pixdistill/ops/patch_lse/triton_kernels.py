"""Fused Triton kernel of `patch_lse`.

One program owns BN rows of one patch, which it keeps in registers, and reads the vectors of the
teacher's patch one by one with an online softmax. The elements of a vector lie along a tile's first axis
and the rows along the second, so that a thread holds much of a vector and asks few neighbours for their
part of a distance. Both maps are read where they lie, through their strides, and each element of the
teacher's patch comes from the cache after the first row. There are no atomics: the same bits on every
run.

Names: i_ program or loop number, o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launch_of
from .settings import PatchSettings

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _distance(b_diff, L2: tl.constexpr):
    """Distance [BN] of the differences [BD, BN]."""
    if L2:
        return tl.sqrt(tl.sum(b_diff * b_diff, 0))
    return tl.sum(tl.abs(b_diff), 0)


@triton.jit
def _weighted_grad(b_diff, b_dist, b_weight, L2: tl.constexpr):
    """Weight [BN] times the distance's gradient [BD, BN]; for L1 as (gradient + 1) / 2, in [0, 1].

    The constant cancels between the positive and the mean of the negatives. This form of the sign
    takes one instruction; the sign of a difference below 1e-30 may be reduced, that of zero is zero.
    """
    if L2:
        return b_diff * (b_weight / tl.where(b_dist > 0, b_dist, 1.0))[None, :]
    return tl.clamp(b_diff * 1e30 + 0.5, 0.0, 1.0) * b_weight[None, :]


def _patch_lse(
    student, teacher, valid, out, grad, scale,
    M, D, H, W,
    stride_sb, stride_sc, stride_sh, stride_sw,
    stride_tb, stride_tg, stride_tc, stride_th, stride_tw,
    stride_vb, stride_vh, stride_vw,
    P: tl.constexpr, Q: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    L2: tl.constexpr, OTHER_GROUPS: tl.constexpr, HAS_VALID: tl.constexpr, WITH_GRAD: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Margin [B, M, H, W] and its gradient [B, M * D, H, W], contiguous, for BN rows of a patch.

    With CROSS_ENTROPY, `out` gets the program's sum of softplus(margin), and `grad` its gradient.
    Rows are numbered by group, then by position in the patch. Offsets inside a patch have 32 bits, and
    64 if WIDE; those of the patch always have 64.
    """
    n_blocks = tl.cdiv(M * P * Q, BN)
    i_patch = tl.program_id(0) // n_blocks
    down = H // P
    across = W // Q
    i_b = (i_patch // (across * down)).to(tl.int64)
    i_h = (i_patch // across % down * P).to(tl.int64)  # the patch's corner
    i_w = (i_patch % across * Q).to(tl.int64)
    p_s = student + i_b * stride_sb + i_h * stride_sh + i_w * stride_sw
    p_t = teacher + i_b * stride_tb + i_h * stride_th + i_w * stride_tw
    p_v = valid + i_b * stride_vb + i_h * stride_vh + i_w * stride_vw

    o_d = tl.arange(0, BD)
    o_n = tl.program_id(0) % n_blocks * BN + tl.arange(0, BN)
    m_d = o_d < D
    if WIDE:
        o_d = o_d.to(tl.int64)
        o_n = o_n.to(tl.int64)
    o_g = o_n // (P * Q)
    o_y = o_n // Q % P
    o_x = o_n % Q
    m_n = o_g < M
    m_row = m_n
    if HAS_VALID:
        m_row = m_n & (tl.load(p_v + o_y * stride_vh + o_x * stride_vw, mask=m_n, other=0) != 0)
    o_c = (o_g * D)[None, :] + o_d[:, None]  # channel [BD, BN]
    m_tile = m_d[:, None] & m_row[None, :]
    o_s = o_c * stride_sc + (o_y * stride_sh + o_x * stride_sw)[None, :]
    b_s = tl.load(p_s + o_s, mask=m_tile, other=0.0).to(tl.float32)

    c = scale * LOG2E  # logits are in units of log 2
    b_max = tl.full([BN], float("-inf"), tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_count = tl.zeros([BN], tl.int32)
    b_acc = tl.zeros([BD, BN], tl.float32)
    p_g = p_t
    for i_g in range(M):
        p_y, p_vy = p_g, p_v
        for i_y in range(P):
            p_x, p_vx = p_y, p_vy
            for i_x in range(Q):
                m_x = o_g != i_g
                if not OTHER_GROUPS:
                    m_x = m_x | (o_y != i_y) | (o_x != i_x)
                m_k = m_d
                if HAS_VALID:
                    m_seen = tl.load(p_vx) != 0
                    m_k = m_k & m_seen
                    m_x = m_x & m_seen
                if PADDED or HAS_VALID:
                    b_t = tl.load(p_x + o_d * stride_tc, mask=m_k, other=0.0).to(tl.float32)
                else:
                    b_t = tl.load(p_x + o_d * stride_tc).to(tl.float32)
                b_diff = b_s - b_t[:, None]
                b_dist = _distance(b_diff, L2)
                b_logit = tl.where(m_x, -c * b_dist, float("-inf"))
                b_new_max = tl.maximum(b_max, b_logit)
                b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
                b_rescale = tl.exp2(b_max - b_shift)
                b_p = tl.exp2(b_logit - b_shift)
                b_max = b_new_max
                b_sum = b_sum * b_rescale + b_p
                b_count += m_x.to(tl.int32)
                if WITH_GRAD:
                    b_acc = b_acc * b_rescale[None, :] + _weighted_grad(b_diff, b_dist, b_p, L2)
                p_x += stride_tw
                p_vx += stride_vw
            p_y += stride_th
            p_vy += stride_vh
        p_g += stride_tg

    o_t = o_c * stride_tc + (o_y * stride_th + o_x * stride_tw)[None, :]
    b_diff = b_s - tl.load(p_t + o_t, mask=m_tile, other=0.0).to(tl.float32)
    b_dist = _distance(b_diff, L2)
    m_alive = m_row & (b_count > 0)
    b_safe = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_margin = (b_max + tl.log2(b_safe) + c * b_dist) / LOG2E
    b_weight = tl.full([BN], 1.0, tl.float32)
    i_pixel = i_h * W + i_w
    if CROSS_ENTROPY:
        b_z = tl.exp(-tl.abs(b_margin))
        b_u = 1.0 + b_z
        b_rounded = tl.where(b_u == 1.0, 1.0, b_u - 1.0)  # log1p(z), accurate for small z
        b_log1p = tl.where(b_u == 1.0, b_z, tl.log(b_u) * (b_z / b_rounded))
        b_loss = tl.where(m_alive, tl.maximum(b_margin, 0.0) + b_log1p, 0.0)
        tl.store(out + tl.program_id(0), tl.sum(b_loss, 0))
        b_weight = tl.where(b_margin >= 0.0, 1.0, b_z) / b_u  # the sigmoid
    else:
        p_m = out + i_b * M * H * W + i_pixel
        b_margin = tl.where(m_alive, b_margin, float("-inf"))
        tl.store(p_m + (o_g * H + o_y) * W + o_x, b_margin, mask=m_n)
    if WITH_GRAD:
        b_one = tl.full([BN], 1.0, tl.float32)
        b_grad = _weighted_grad(b_diff, b_dist, b_one, L2) - b_acc / b_safe[None, :]
        b_grad *= (b_weight * (scale if L2 else 2 * scale))[None, :]
        b_grad = tl.where(m_alive[None, :], b_grad, 0.0).to(grad.dtype.element_ty)
        p_out = grad + i_b * M * D * H * W + i_pixel
        o_out = o_c * H * W + (o_y * W + o_x)[None, :]
        tl.store(p_out + o_out, b_grad, mask=m_d[:, None] & m_n[None, :])


# Triton compiles a kernel anew for each set of integers that are 1 or multiples of 16, and spreads a
# tile over the threads accordingly, so each set needs registers of its own. Here are two, whose tiles
# fit: for any strides, and for maps as in `_aligned`, where a thread loads four pixels at once.
_ANY = ["M", "D", "stride_vb", "stride_vh", "stride_vw"]
_STRIDES = [f"stride_{name}" for name in ("sb", "sc", "sh", "sw", "tb", "tg", "tc", "th", "tw")]
aligned_kernel = triton.jit(_patch_lse, do_not_specialize=_ANY)
strided_kernel = triton.jit(_patch_lse, do_not_specialize=[*_ANY, "H", "W", *_STRIDES])


# --- Launcher -------------------------------------------------------------------------------------


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: PatchSettings,
    *,
    with_grad: bool,
    cross_entropy: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `chunked.patch_lse`. `launch` overrides the rule, for tests.

    With `cross_entropy`, partial sums of softplus(margin), one per program, and their gradient.
    """
    groups, (p, q), temperature, distance, negatives = settings
    batch, channels, height, width = student.shape
    width_d = channels // groups
    wide = any(_reach(map_, p, q) >= 2**31 for map_ in (student, teacher))
    wide = wide or channels * height * width >= 2**31  # the outputs
    valid, valid_strides = student, [0, 0, 0]
    if valid_mask is not None:
        valid, valid_strides = valid_mask.view(torch.uint8), list(valid_mask.stride())
        wide = wide or _reach(valid_mask.unsqueeze(1), p, q) >= 2**31
    aligned = not wide and q % 4 == 0 and _aligned(student) and _aligned(teacher)
    launch = launch or launch_of(width_d, groups * p * q, aligned, wide)
    programs = batch * (height // p) * (width // q) * triton.cdiv(groups * p * q, launch.BN)
    device = student.device
    shape = (programs,) if cross_entropy else (batch, groups, height, width)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=device) if with_grad else None
    stride_tb, stride_tc, *strides_t = teacher.stride()
    kernel = aligned_kernel if aligned else strided_kernel
    with torch.cuda.device_of(student):
        kernel[(programs,)](
            student, teacher, valid, out, out if grad is None else grad, 1.0 / temperature,
            groups, width_d, height, width,
            *student.stride(), stride_tb, width_d * stride_tc, stride_tc, *strides_t,
            *valid_strides,
            P=p, Q=q, BD=launch.BD, BN=launch.BN,
            L2=distance == "l2", OTHER_GROUPS=negatives == "other_groups",
            HAS_VALID=valid_mask is not None, WITH_GRAD=with_grad, CROSS_ENTROPY=cross_entropy,
            PADDED=width_d != launch.BD, WIDE=wide,
            num_warps=launch.warps, num_stages=1, maxnreg=launch.registers,
        )  # fmt: skip
    return out, grad


def _aligned(map_: Tensor) -> bool:
    """Whether rows, channels and images begin at multiples of 16 elements, and pixels are neighbours."""
    *strides, column = map_.stride()
    multiples = (*map_.shape[2:], *strides, map_.data_ptr())
    return column == 1 and all(number % 16 == 0 for number in multiples)


def _reach(map_: Tensor, p: int, q: int) -> int:
    """The largest offset between two elements of a patch."""
    _, channel, row, column = map_.stride()
    return (map_.shape[1] - 1) * channel + (p - 1) * row + (q - 1) * column
