"""Fused Triton kernels of `masked_distance`: one read of both maps forward, another one backward.

1. `read_kernel`: a program runs down the channels of BP pixels. It keeps the logits of all tokens and
   the squared distance of each pixel in registers, and writes masks, distances, and what its pixels
   add to the mask areas and the window sums: a row of partial sums, added by one PyTorch reduction.
2. `attention_kernel`: the attention of each pixel from masks, areas and weights, and partial losses.
3. `grad_kernel`: attention times difference, from the second read.

Between 1 and 2, the pooled 3x3 convolution is one matrix product of PyTorch's with the window sums.
Sums are added in a fixed order, without atomics: the same bits on every run. Maps are read where they
lie, through the strides of channels and pixels. Offsets into maps have 64 bits.

Names: i_ program or loop number, o_ offsets, m_ mask, p_ pointers, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import no_autocast
from .launch import (
    ATTENTION_PIXELS,
    MASKED_REGISTERS,
    MAX_TOKENS,
    Launch,
    grad_launch,
    read_launch,
)
from .tokens import Masks, Tokens

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _add_product(b_sum, b_a, b_b, PRECISION: tl.constexpr):
    """`b_sum + b_a @ b_b`; "ieee" widens the operands first (the interpreter's way)."""
    if PRECISION == "ieee":
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit(do_not_specialize=["customize_after", "C", "T", "W"])
def read_kernel(
    student, teacher, token, valid, steps, maps, sums,
    customize_after, C, T, P, W,
    stride_sb, stride_sc, stride_sp, stride_tb, stride_tc, stride_tp,
    BC: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
    GIVEN: tl.constexpr, CUSTOM: tl.constexpr, WINDOWS: tl.constexpr, VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Masks and distance of BP pixels, [B, T + 1, P], and a row of partial sums [B, tiles, width].

    The row holds the mask areas, the number of valid pixels, and where WINDOWS the means over the map
    that the nine taps of a 3x3 convolution take of each channel. `token` is [T, C], or where GIVEN
    the masks themselves, [B, T, P].
    """
    tiles = tl.cdiv(P, BP)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, 16)
    m_t = o_t < T
    m_k = o_k < 9
    m_p = o_p < P
    m_v = m_p
    if VALID:
        m_v = m_p & (tl.load(valid + i_b * P + o_p, mask=m_p, other=0) != 0)
    p_s = student + i_b * stride_sb + (o_p.to(tl.int64) * stride_sp)[None, :]
    p_t = teacher + i_b * stride_tb + (o_p.to(tl.int64) * stride_tp)[None, :]
    width = T + 1
    if WINDOWS:
        width += 9 * C
        # A pixel counts for tap (i, j) where the pixel that reads it through this tap lies in the map,
        # and is valid.
        o_down, o_right = (1 - o_k // 3)[:, None], (1 - o_k % 3)[:, None]
        o_row = (o_p // W)[None, :] + o_down
        o_col = (o_p % W)[None, :] + o_right
        m_r = m_v[None, :] & m_k[:, None]
        m_r = m_r & (o_row >= 0) & (o_row < P // W) & (o_col >= 0) & (o_col < W)
        if VALID:
            o_reader = o_p[None, :] + o_down * W + o_right
            m_r = tl.load(valid + i_b * P + o_reader, mask=m_r, other=0) != 0
        b_read = m_r.to(tl.float32).to(teacher.dtype.element_ty)  # [16, BP]
    p_sums = sums + tl.program_id(0).to(tl.int64) * width

    b_distance = tl.zeros([BP], tl.float32)
    b_logit = tl.zeros([BT, BP], tl.float32)
    b_own = tl.zeros([BT, BP], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        m_tile = m_c[:, None] & m_p[None, :]
        b_s = tl.load(p_s + o_c.to(tl.int64)[:, None] * stride_sc, mask=m_tile, other=0.0)
        b_t = tl.load(p_t + o_c.to(tl.int64)[:, None] * stride_tc, mask=m_tile, other=0.0)
        if VALID:  # an invalid pixel may hold NaN
            b_s = tl.where(m_v[None, :], b_s, 0.0)
            b_t = tl.where(m_v[None, :], b_t, 0.0)
        b_diff = b_s.to(tl.float32) - b_t.to(tl.float32)
        b_distance += tl.sum(b_diff * b_diff, 0)
        if not GIVEN:
            m_e = m_t[:, None] & m_c[None, :]
            b_e = tl.load(token + o_t[:, None] * C + o_c[None, :], mask=m_e, other=0.0)
            b_logit = _add_product(b_logit, b_e.to(b_t.dtype), b_t, PRECISION)
            if CUSTOM:
                b_own = _add_product(b_own, b_e.to(b_s.dtype), b_s, PRECISION)
        if WINDOWS:
            b_window = tl.zeros([16, BC], tl.float32)
            b_window = _add_product(b_window, b_read, tl.trans(b_t), PRECISION)
            o_sum = T + 1 + o_c[None, :] * 9 + o_k[:, None]
            tl.store(p_sums + o_sum, b_window / P, mask=m_c[None, :] & m_k[:, None])

    m_m = m_t[:, None] & m_p[None, :]
    if GIVEN:
        o_m = (i_b * T + o_t)[:, None] * P + o_p[None, :]
        b_mask = tl.load(token + o_m, mask=m_m, other=0.0).to(tl.float32)
    else:
        b_mask = tl.sigmoid(b_logit)
    if CUSTOM:
        b_mask = tl.where(tl.load(steps) < customize_after, b_mask, b_mask * tl.sigmoid(b_own))
    b_mask = tl.where(m_t[:, None] & m_v[None, :], b_mask, 0.0)
    p_maps = maps + i_b * (T + 1) * P + o_p
    tl.store(p_maps[None, :] + o_t.to(tl.int64)[:, None] * P, b_mask, mask=m_m)
    tl.store(p_maps + T.to(tl.int64) * P, b_distance, mask=m_p)
    tl.store(p_sums + o_t, tl.sum(b_mask, 1), mask=m_t)
    tl.store(p_sums + T, tl.sum(m_v.to(tl.float32), 0))


@triton.jit(do_not_specialize=["B", "C", "T", "width"])
def attention_kernel(
    maps, sums, weights, mixing, bias, attention, loss, eps, factor, B, C, T, P, width,
    BT: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
    GIVEN: tl.constexpr, POOLED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Attention [B, P], which holds every factor of the gradient, and partial losses [B, tiles].

    `weights` is [B, T] where GIVEN, and where POOLED the pooled convolution [B, C], which `mixing`
    [T, C] and `bias` [T] turn into logits. Otherwise all tokens have the same weight.
    """
    tiles = tl.cdiv(P, BP)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    o_t = tl.arange(0, BT)
    m_p = o_p < P
    m_t = o_t < T
    # A mask that is zero everywhere must not become 0/0.
    b_area = tl.load(sums + i_b * width + o_t, mask=m_t, other=1.0) + eps
    b_scale = factor / tl.maximum(b_area, _TINY)
    if GIVEN:
        b_scale *= tl.load(weights + i_b * T + o_t, mask=m_t, other=0.0).to(tl.float32)
    elif POOLED:
        b_logit = tl.load(bias + o_t, mask=m_t, other=float("-inf")).to(tl.float32)
        for i_c in range(0, C, BC):
            o_c = i_c + tl.arange(0, BC)
            m_c = o_c < C
            b_pooled = tl.load(weights + i_b * C + o_c, mask=m_c, other=0.0)
            m_mix = m_t[:, None] & m_c[None, :]
            b_mix = tl.load(mixing + o_t[:, None] * C + o_c[None, :], mask=m_mix, other=0.0)
            b_logit += tl.sum(b_mix.to(tl.float32) * b_pooled[None, :], 1)
        b_exp = tl.exp(b_logit - tl.max(b_logit, 0))
        b_scale *= b_exp / tl.sum(b_exp, 0)
    else:
        b_scale /= T
    if MEAN:  # over the images that have a valid pixel
        o_b = tl.arange(0, BB)
        b_count = tl.load(sums + o_b.to(tl.int64) * width + T, mask=o_b < B, other=0.0)
        b_scale /= tl.maximum(tl.sum((b_count > 0).to(tl.float32), 0), 1.0)
    p_maps = maps + i_b * (T + 1) * P + o_p
    m_m = m_t[:, None] & m_p[None, :]
    b_m = tl.load(p_maps[None, :] + o_t.to(tl.int64)[:, None] * P, mask=m_m, other=0.0)
    # Dividing by the area before squaring keeps tiny masks from vanishing.
    b_attention = tl.sum(b_m * b_scale[:, None] * b_m, 0)
    b_distance = tl.load(p_maps + T.to(tl.int64) * P, mask=m_p, other=0.0)
    tl.store(attention + i_b * P + o_p, b_attention, mask=m_p)
    tl.store(loss + tl.program_id(0), tl.sum(b_attention * b_distance, 0) / 2)


@triton.jit(do_not_specialize=["stride_l"])
def grad_kernel(
    student, teacher, attention, grad_loss, grad, C, P,
    stride_sb, stride_sc, stride_sp, stride_tb, stride_tc, stride_tp,
    stride_gb, stride_gc, stride_gp, stride_l,
    BC: tl.constexpr, BP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`attention * grad_loss * (student - teacher)` [B, C, P]."""
    tiles_c = tl.cdiv(C, BC)
    tiles_p = tl.cdiv(P, BP)
    i_b = (tl.program_id(0) // (tiles_c * tiles_p)).to(tl.int64)
    o_c = tl.program_id(0) % tiles_c * BC + tl.arange(0, BC)
    o_p = tl.program_id(0) // tiles_c % tiles_p * BP + tl.arange(0, BP)
    m_p = o_p < P
    m_tile = (o_c < C)[:, None] & m_p[None, :]
    b_attention = tl.load(attention + i_b * P + o_p, mask=m_p, other=0.0)
    b_attention *= tl.load(grad_loss + i_b * stride_l)
    o_c = o_c.to(tl.int64)[:, None]
    o_p = o_p.to(tl.int64)[None, :]
    p_s = student + i_b * stride_sb + o_c * stride_sc + o_p * stride_sp
    p_t = teacher + i_b * stride_tb + o_c * stride_tc + o_p * stride_tp
    b_s = tl.load(p_s, mask=m_tile, other=0.0).to(tl.float32)
    b_t = tl.load(p_t, mask=m_tile, other=0.0).to(tl.float32)
    if MASKED:  # an invalid pixel, whose attention is 0, may hold NaN
        m_v = (b_attention != 0)[None, :]
        b_s, b_t = tl.where(m_v, b_s, 0.0), tl.where(m_v, b_t, 0.0)
    b_grad = b_attention[None, :] * (b_s - b_t)
    p_grad = grad + i_b * stride_gb + o_c * stride_gc + o_p * stride_gp
    tl.store(p_grad, b_grad.to(grad.dtype.element_ty), mask=m_tile)


# --- Launchers ------------------------------------------------------------------------------------


def forward(
    student: Tensor,
    teacher: Tensor,
    source: Masks | Tokens,
    valid_mask: Tensor | None,
    eps: float,
    reduction: str,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `chunked.forward`, but that rows of the sums may be longer.

    `launch` overrides the tile of `read_kernel`.
    """
    images, channels, height, columns = student.shape
    pixels, num_tokens = height * columns, source.num_tokens
    given = isinstance(source, Masks)
    weighting: tuple[Tensor, ...] = ()
    steps, after, weights = None, 0, None
    if isinstance(source, Masks):
        token, weights = _pixels(source.masks), source.weights
    else:
        token, weighting, steps, after = source
    windows = len(weighting) > 0
    masked = valid_mask is not None
    width = num_tokens + 1 + 9 * channels * windows
    s, t = _pixels(student), _pixels(teacher)
    itemsize = max(s.element_size(), t.element_size())
    launch = launch or read_launch(channels, pixels, images, itemsize)
    tiles = triton.cdiv(pixels, launch.BP)
    maps = s.new_empty((images, num_tokens + 1, pixels), dtype=torch.float32)
    partial = maps.new_empty((images, tiles, width))
    none = maps  # stands for a pointer that is not used
    valid = none if valid_mask is None else valid_mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(student), no_autocast(student.device):
        read_kernel[(images * tiles,)](
            s, t, token.contiguous(), valid, none if steps is None else steps, maps, partial,
            after, channels, num_tokens, pixels, columns, *s.stride(), *t.stride(),
            BC=launch.BC, BP=launch.BP, BT=MAX_TOKENS,
            GIVEN=given, CUSTOM=steps is not None, WINDOWS=windows, VALID=masked,
            PRECISION="tf32x3" if student.is_cuda else "ieee",
            num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=MASKED_REGISTERS if masked else None,
        )  # fmt: skip
        sums = partial.sum(dim=1)
        mixing = bias = none
        if windows:
            kernel, kernel_bias, mixing, bias = (x.contiguous() for x in weighting)
            means = sums[:, num_tokens + 1 :]
            if masked:
                means = means * (pixels / sums[:, num_tokens, None].clamp_min(1))
            kernel = kernel.flatten(1).to(torch.float32)
            weights = torch.addmm(kernel_bias.to(torch.float32), means, kernel.t())
        tiles = triton.cdiv(pixels, ATTENTION_PIXELS)
        attention = maps.new_empty((images, height, columns))
        loss = maps.new_empty((images, tiles))
        mean = reduction == "mean"
        factor = 2 / (channels * (max(images, 1) if mean and not masked else 1))
        attention_kernel[(images * tiles,)](
            maps, sums, none if weights is None else weights.contiguous(), mixing, bias,
            attention, loss, eps, factor, images, channels, num_tokens, pixels, width,
            BT=MAX_TOKENS, BP=ATTENTION_PIXELS, BB=triton.next_power_of_2(max(images, 1)), BC=64,
            GIVEN=given and weights is not None, POOLED=windows, MEAN=mean and masked, num_warps=4,
        )  # fmt: skip
    loss = loss.sum(dim=1) if reduction == "none" else loss.sum()
    return loss, attention, sums


def backward(
    student: Tensor, teacher: Tensor, attention: Tensor, grad_loss: Tensor, masked: bool
) -> Tensor:
    """Same contract as `chunked.backward`."""
    images, channels, height, columns = student.shape
    pixels = height * columns
    last = student.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    grad = torch.empty_like(student, memory_format=layout)
    s, t, g = _pixels(student), _pixels(teacher), _pixels(grad)
    launch = grad_launch(channels, pixels, s.stride(1) == 1)
    programs = images * triton.cdiv(channels, launch.BC) * triton.cdiv(pixels, launch.BP)
    with torch.cuda.device_of(student):
        grad_kernel[(programs,)](
            s, t, attention, grad_loss.as_subclass(Tensor), g, channels, pixels,
            *s.stride(), *t.stride(), *g.stride(), grad_loss.stride(0) if grad_loss.dim() else 0,
            BC=launch.BC, BP=launch.BP, MASKED=masked, num_warps=launch.warps,
        )  # fmt: skip
    return grad


def _pixels(map_: Tensor) -> Tensor:
    """The map as `[B, C, H W]`: a view where its strides allow it, a plain tensor, not float64."""
    flat = map_.as_subclass(Tensor).flatten(2)
    return flat.float() if flat.dtype == torch.float64 else flat
