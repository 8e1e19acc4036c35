"""Triton kernels of `patch_contrast`: one reads both maps, one adds up, one writes the gradient.

Between the first two, the kernel of `patch_lse` contrasts the pooled maps. There are no atomics: the
same bits on every run. All offsets have 64 bits.

Names: i_ program number, o_ offsets, m_ mask, b_ tile in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..patch_lse import patch_lse_forward
from .launch import BLOCK, WARPS, argmax_dtype, tile_of
from .settings import Settings, Upstream


@triton.jit
def read_kernel(
    student, teacher, valid, pooled_student, pooled_teacher, argmax, pooled_valid, sums,
    C, H, W, n_sums,
    stride_sb, stride_sc, stride_sh, stride_sw,
    stride_tb, stride_tc, stride_th, stride_tw,
    stride_vb, stride_vh, stride_vw,
    PH: tl.constexpr, PW: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    MIMIC: tl.constexpr, POOL: tl.constexpr, WITH_ARGMAX: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Window maxima, and sum of squared differences, of BC channels and BP windows of an image.

    `sums` [3, n_sums] gets the program's sum, and, if HAS_VALID, its valid pixels and windows, which
    only the programs of the first channels count.
    """
    across = W // PW
    windows = H // PH * across
    n_p = tl.cdiv(windows, BP)
    i_c = tl.program_id(0) // n_p % tl.cdiv(C, BC)
    i_b = (tl.program_id(0) // n_p // tl.cdiv(C, BC)).to(tl.int64)
    o_c = (i_c * BC + tl.arange(0, BC)).to(tl.int64)
    o_p = (tl.program_id(0) % n_p * BP + tl.arange(0, BP)).to(tl.int64)
    o_y = o_p // across * PH
    o_x = o_p % across * PW
    m_p = o_p < windows
    m_c = o_c < C
    p_s = student + i_b * stride_sb + o_c[:, None] * stride_sc
    p_t = teacher + i_b * stride_tb + o_c[:, None] * stride_tc
    b_sum = tl.zeros([BC, BP], tl.float32)
    b_s_max = tl.full([BC, BP], float("-inf"), tl.float32)
    b_t_max = tl.full([BC, BP], float("-inf"), tl.float32)
    b_argmax = tl.zeros([BC, BP], tl.int32)
    b_pixels = tl.zeros([BP], tl.float32)
    for i_y in range(PH):
        for i_x in tl.static_range(PW):
            m_v = m_p
            if HAS_VALID:
                o_v = i_b * stride_vb + (o_y + i_y) * stride_vh + (o_x + i_x) * stride_vw
                m_v = m_p & (tl.load(valid + o_v, mask=m_p, other=0) != 0)
                b_pixels += m_v.to(tl.float32)
            m = m_c[:, None] & m_v[None, :]
            if MIMIC or POOL:
                o_s = ((o_y + i_y) * stride_sh + (o_x + i_x) * stride_sw)[None, :]
                o_t = ((o_y + i_y) * stride_th + (o_x + i_x) * stride_tw)[None, :]
                b_s = tl.load(p_s + o_s, mask=m, other=0.0).to(tl.float32)
                b_t = tl.load(p_t + o_t, mask=m, other=0.0).to(tl.float32)
                if MIMIC:
                    b_sum += (b_s - b_t) * (b_s - b_t)
                if POOL:  # the first maximum, and any NaN
                    m_s = m & ((b_s > b_s_max) | (b_s != b_s))
                    b_s_max = tl.where(m_s, b_s, b_s_max)
                    b_argmax = tl.where(m_s, i_y * PW + i_x, b_argmax)
                    b_t_max = tl.where(m & ((b_t > b_t_max) | (b_t != b_t)), b_t, b_t_max)
    if POOL:
        m = m_c[:, None] & m_p[None, :]
        o_out = (i_b * C + o_c[:, None]) * windows + o_p[None, :]
        tl.store(pooled_student + o_out, b_s_max.to(pooled_student.dtype.element_ty), mask=m)
        tl.store(pooled_teacher + o_out, b_t_max.to(pooled_teacher.dtype.element_ty), mask=m)
        if WITH_ARGMAX:
            tl.store(argmax + o_out, b_argmax.to(argmax.dtype.element_ty), mask=m)
    if MIMIC:
        tl.store(sums + tl.program_id(0), tl.sum(b_sum))
    if HAS_VALID:
        b_windows = tl.where(b_pixels > 0, 1.0, 0.0)
        if POOL:
            o_out = i_b * windows + o_p
            tl.store(pooled_valid + o_out, (b_pixels > 0).to(tl.uint8), mask=m_p & (i_c == 0))
        first = tl.where(i_c == 0, 1.0, 0.0)
        tl.store(sums + n_sums + tl.program_id(0), tl.sum(b_pixels) * first)
        tl.store(sums + 2 * n_sums + tl.program_id(0), tl.sum(b_windows) * first)


@triton.jit
def _total(p_sums, n, BLOCK: tl.constexpr):
    """Sum of n float32 numbers."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_sum += tl.load(p_sums + o, mask=o < n, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def add_kernel(
    sums, losses, loss, mimic, contrast, divisors,
    n_sums, n_losses, mimic_divisor, contrast_divisor, mimic_weight, contrast_weight,
    MIMIC: tl.constexpr, CONTRAST: tl.constexpr, HAS_VALID: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Both terms and the loss, from partial sums; one program.

    Where valid pixels are counted, they multiply the mimic's divisor if MEAN, and valid windows are
    the contrast's.
    """
    b_mimic = 0.0
    b_contrast = 0.0
    if MIMIC:
        if HAS_VALID and MEAN:
            mimic_divisor *= tl.maximum(_total(sums + n_sums, n_sums, BLOCK), 1.0)
        b_mimic = _total(sums, n_sums, BLOCK) / mimic_divisor
    if CONTRAST:
        if HAS_VALID:
            contrast_divisor = tl.maximum(_total(sums + 2 * n_sums, n_sums, BLOCK), 1.0)
        b_contrast = _total(losses, n_losses, BLOCK) / contrast_divisor
    tl.store(mimic, b_mimic)
    tl.store(contrast, b_contrast)
    tl.store(loss, mimic_weight * b_mimic + contrast_weight * b_contrast)
    tl.store(divisors, mimic_divisor)
    tl.store(divisors + 1, contrast_divisor)


@triton.jit
def grad_kernel(
    student, teacher, valid, contrast_grad, argmax, divisors, grad_mimic, grad_contrast, grad,
    C, H, W, mimic_weight, contrast_weight,
    stride_sb, stride_sc, stride_sh, stride_sw,
    stride_tb, stride_tc, stride_th, stride_tw,
    stride_vb, stride_vh, stride_vw,
    stride_gb, stride_gc, stride_gh, stride_gw,
    PH: tl.constexpr, PW: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    MIMIC: tl.constexpr, CONTRAST: tl.constexpr, POOL: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Gradient of the student's map for BC channels and BP pixels of an image.

    The mimic term's, and, at the pixel that a window's maximum came from, the contrast's.
    """
    n_p = tl.cdiv(H * W, BP)
    i_c = tl.program_id(0) // n_p % tl.cdiv(C, BC)
    i_b = (tl.program_id(0) // n_p // tl.cdiv(C, BC)).to(tl.int64)
    o_c = (i_c * BC + tl.arange(0, BC)).to(tl.int64)[:, None]
    o_p = (tl.program_id(0) % n_p * BP + tl.arange(0, BP)).to(tl.int64)
    o_y = o_p // W
    o_x = o_p % W
    m_p = o_p < H * W
    m = (o_c < C) & m_p[None, :]
    m_v = m
    if HAS_VALID:
        o_v = i_b * stride_vb + o_y * stride_vh + o_x * stride_vw
        m_v = m & (tl.load(valid + o_v, mask=m_p, other=0) != 0)[None, :]
    b_grad = tl.zeros([BC, BP], tl.float32)
    if MIMIC:
        o_s = i_b * stride_sb + o_c * stride_sc + (o_y * stride_sh + o_x * stride_sw)[None, :]
        o_t = i_b * stride_tb + o_c * stride_tc + (o_y * stride_th + o_x * stride_tw)[None, :]
        b_s = tl.load(student + o_s, mask=m_v, other=0.0).to(tl.float32)
        b_t = tl.load(teacher + o_t, mask=m_v, other=0.0).to(tl.float32)
        b_grad += (b_s - b_t) * (2.0 * mimic_weight * tl.load(grad_mimic) / tl.load(divisors))
    if CONTRAST:
        across = W // PW
        windows = H // PH * across
        o_w = (i_b * C + o_c) * windows + (o_y // PH * across + o_x // PW)[None, :]
        b_d = tl.load(contrast_grad + o_w, mask=m_v, other=0.0).to(tl.float32)
        b_d *= contrast_weight * tl.load(grad_contrast) / tl.load(divisors + 1)
        if POOL:
            b_argmax = tl.load(argmax + o_w, mask=m_v, other=0).to(tl.int32)
            b_d = tl.where(b_argmax == (o_y % PH * PW + o_x % PW)[None, :], b_d, 0.0)
        b_grad += b_d
    if HAS_VALID:
        b_grad = tl.where(m_v, b_grad, 0.0)
    o_g = i_b * stride_gb + o_c * stride_gc + (o_y * stride_gh + o_x * stride_gw)[None, :]
    tl.store(grad + o_g, b_grad.to(grad.dtype.element_ty), mask=m)


# --- Launchers ------------------------------------------------------------------------------------


def forward(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: Settings,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """Same contract as `chunked.forward`."""
    device = student.device
    batch, channels, height, width = student.shape
    ph, pw = settings.pool_size if settings.has_contrast else (1, 1)
    pooled_shape = (batch, channels, height // ph, width // pw)
    windows = pooled_shape[2] * pooled_shape[3]
    pool, has_valid = settings.is_pooled, valid_mask is not None
    valid = student if valid_mask is None else valid_mask.view(torch.uint8)
    argmax = torch.empty(
        pooled_shape if pool and with_grad else 0,
        dtype=argmax_dtype(settings.pool_size),
        device=device,
    )
    loss, mimic, contrast = (torch.empty((), device=device, dtype=torch.float32) for _ in range(3))
    divisors = torch.empty(2, device=device, dtype=torch.float32)
    contrast_grad = torch.empty(0, device=device, dtype=student.dtype)
    sums = losses = divisors
    small_student, small_teacher, small_mask = student, teacher, valid_mask
    count = 0
    with torch.cuda.device_of(student):
        if settings.has_mimic or pool or has_valid:
            bc, bp = tile_of(channels, windows, student.stride(1) == 1)
            count = batch * triton.cdiv(channels, bc) * triton.cdiv(windows, bp)
            sums = torch.empty((3, count), device=device, dtype=torch.float32)
            if pool:
                small_student, small_teacher = (
                    torch.empty(pooled_shape, dtype=x.dtype, device=device)
                    for x in (student, teacher)
                )
                if has_valid:
                    small_mask = torch.empty(
                        (batch, *pooled_shape[2:]), dtype=torch.bool, device=device
                    )
            read_kernel[(count,)](
                student, teacher, valid, small_student, small_teacher, argmax,
                student if small_mask is None else small_mask.view(torch.uint8), sums,
                channels, height, width, count,
                *student.stride(), *teacher.stride(), *_strides(valid_mask),
                PH=ph, PW=pw, BC=bc, BP=bp,
                MIMIC=settings.has_mimic, POOL=pool, WITH_ARGMAX=with_grad, HAS_VALID=has_valid,
                num_warps=WARPS,
            )  # fmt: skip
        if settings.has_contrast:
            losses, grad = patch_lse_forward(
                small_student,
                small_teacher,
                small_mask,
                settings.patch,
                backend="triton",
                with_grad=with_grad,
                cross_entropy=True,
            )
            contrast_grad = contrast_grad if grad is None else grad
        mean = settings.mimic_reduction == "mean"
        pixels = channels if has_valid else student.numel()
        add_kernel[(1,)](
            sums, losses, loss, mimic, contrast, divisors,
            count, losses.numel(), float(pixels if mean else batch), float(batch * windows),
            settings.mimic_weight, settings.contrast_weight,
            MIMIC=settings.has_mimic, CONTRAST=settings.has_contrast, HAS_VALID=has_valid,
            MEAN=mean, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss, mimic, contrast, contrast_grad, argmax, divisors


def backward(
    student: Tensor,
    teacher: Tensor | None,
    valid_mask: Tensor | None,
    contrast_grad: Tensor,
    argmax: Tensor,
    divisors: Tensor,
    grad_mimic: Upstream | None,
    grad_contrast: Upstream | None,
    settings: Settings,
) -> Tensor:
    """Same contract as `chunked.backward`."""
    grad = torch.empty_like(student)
    batch, channels, height, width = student.shape
    ph, pw = settings.pool_size if settings.has_contrast else (1, 1)
    valid = student if valid_mask is None else valid_mask.view(torch.uint8)
    teacher = student if teacher is None else teacher
    mimic, contrast = (x or Upstream(divisors, 0.0) for x in (grad_mimic, grad_contrast))
    bc, bp = tile_of(channels, height * width, student.stride(1) == 1)
    programs = batch * triton.cdiv(channels, bc) * triton.cdiv(height * width, bp)
    with torch.cuda.device_of(student):
        grad_kernel[(programs,)](
            student, teacher, valid, contrast_grad, argmax, divisors,
            mimic.tensor, contrast.tensor, grad,
            channels, height, width, mimic.weight, contrast.weight,
            *student.stride(), *teacher.stride(), *_strides(valid_mask), *grad.stride(),
            PH=ph, PW=pw, BC=bc, BP=bp,
            MIMIC=grad_mimic is not None, CONTRAST=grad_contrast is not None,
            POOL=settings.is_pooled, HAS_VALID=valid_mask is not None,
            num_warps=WARPS,
        )  # fmt: skip
    return grad


def _strides(valid_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if valid_mask is None else valid_mask.stride()
