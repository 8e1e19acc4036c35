"""Hopper kernel of `row_lse`: warp-specialised Gluon, for the case that training spends its time in.

A program owns 128 queries and streams its split of the keys. Its twelve warps have three roles:

    time   producer (TMA)           consumers 0 and 1 (tensor cores), 64 queries each
     |     load q                   wait for q
     |     load k[0] into slot 0    wait for slot 0:  s = q k[0]^T,  e = exp(s)
     |     load k[1] into slot 1    wait for slot 1:  start s' = q k[1]^T
     |     load k[2] into slot 2                      start acc += e k[0]
     |     ...                                        wait for s', e' = exp(s') while acc runs
     v     wait for slot 0 free                       wait for acc: slot 0 is free

so that exponentials of one tile are computed while the tensor cores multiply another, and the two
consumers fill each other's gaps. The slots form a ring of STAGES tiles of keys in shared memory.

Three barriers order the roles. `q_ready` completes once, when the bytes of q have landed.
`k_ready[slot]` completes when the bytes of a tile have landed, `k_empty[slot]` when both consumers have
arrived, that is, have finished with a tile. Tile i uses slot i % STAGES in its round i // STAGES. The
producer waits for round r - 1 of k_empty before it writes round r, and a consumer waits for round r
of k_ready before it reads. Both sides walk over the same tiles in the same order. The copy of tile i
waits for the release of tile i - STAGES, and a consumer releases a tile after it has waited for the
second one behind it: with three STAGES or more, every wait leads to an earlier tile, and nobody waits
for ever. docs/inside_the_kernel.md shows it in a picture.

Tiles that need a mask per element (the excluded diagonal, and the ragged last tile) come first, one at
a time; the pipeline then runs without masks. Masked keys, labels, a running maximum, and dtypes other
than float16 and bfloat16 stay with the portable kernel: see `why_not_hopper` in `launch.py`.

Names as in `triton_kernels.py`: i_ program or tile number, o_ offsets, m_ mask, p_ pointers.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import HOPPER_LAUNCH

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _keep(x):
    """No instruction: x stays in its registers up to here, while an asynchronous product reads them."""
    PACK: gl.constexpr = 32 // x.dtype.primitive_bitwidth
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@gluon.jit
def _thread_sum(e):
    """[R, C] -> [R, 8]: the part of a row sum that needs no other thread."""
    return gl.sum(e.reshape([e.shape[0], e.shape[1] // 8, 8]), 1)


@gluon.jit
def _tile_of(i, first, last, skip_from, skipped, careful):
    """The i-th tile to visit: the skipped diagonal, the last tile, then all others in order."""
    behind = i - careful + first
    behind = gl.where(behind < skip_from, behind, behind + skipped)
    return gl.where(i < skipped, skip_from + i, gl.where(i < careful, last - 1, behind))


@gluon.jit
def _producer(
    q_desc, k_desc, q_smem, k_smem, q_ready, k_ready, k_empty,
    q_row, k_row, first, last, skip_from, skipped, careful,
    BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)
    for w in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [q_row + 64 * w, 0], q_ready, q_smem.index(w))
    for i in range(last - first):
        i_tile = _tile_of(i, first, last, skip_from, skipped, careful)
        slot = i % STAGES
        mbarrier.wait(k_empty.index(slot), ((i // STAGES) & 1) ^ 1)  # round 0 passes at once
        mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [k_row + i_tile * BM, 0], k_ready.index(slot), k_smem.index(slot)
        )


@gluon.jit
def _careful_exp(
    q, k_smem, k_ready, i, i_tile, o_n, M, c, exclude_offset,
    BM: gl.constexpr, STAGES: gl.constexpr, EXCLUDE: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Exponentials of the i-th tile [64, BM], zero for keys that do not exist or are excluded."""
    slot = i % STAGES
    mbarrier.wait(k_ready.index(slot), (i // STAGES) & 1)
    zero = gl.zeros([64, BM], gl.float32, S_L)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    o_m = i_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, S_L))
    e = gl.where((o_m < M)[None, :], gl.exp2(s * c), 0.0)
    if EXCLUDE:
        e = gl.where(o_m[None, :] == (o_n + exclude_offset)[:, None], 0.0, e)
    return e


@gluon.jit
def _consumer(
    q_smem, k_smem, q_ready, k_ready, k_empty, lse, weighted_keys,
    N, M, c, exclude_offset, i_n, i_sg, first, last, skip_from, skipped, careful,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, EXCLUDE: gl.constexpr,
    WG: gl.constexpr,
):  # fmt: skip
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    dtype: gl.constexpr = k_smem.dtype
    row = i_n * 128 + WG * 64
    o_n = row + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    acc = gl.zeros([64, D], gl.float32, O_L)
    mbarrier.wait(q_ready, 0)
    q = q_smem.index(WG)

    # Careful tiles, one at a time. The product of the last of them is left to the pipeline.
    i_tile = _tile_of(0, first, last, skip_from, skipped, careful)
    e = _careful_exp(
        q, k_smem, k_ready, 0, i_tile, o_n, M, c, exclude_offset, BM, STAGES, EXCLUDE, S_L
    )
    total = _thread_sum(e)
    for i in range(1, careful):
        slot = (i - 1) % STAGES
        p = gl.convert_layout(e.to(dtype), P_L, assert_trivial=True)
        acc = warpgroup_mma(p, k_smem.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        p = _keep(p)
        mbarrier.arrive(k_empty.index(slot), count=1)
        i_tile = _tile_of(i, first, last, skip_from, skipped, careful)
        e = _careful_exp(
            q, k_smem, k_ready, i, i_tile, o_n, M, c, exclude_offset, BM, STAGES, EXCLUDE, S_L
        )
        total = total + _thread_sum(e)

    # The pipeline: the product of one tile runs while the exponentials of the next are computed.
    tiles = last - first
    acc = warpgroup_mma_init(acc)
    slot = (careful - 1) % STAGES
    ahead = careful % STAGES
    phase = (careful // STAGES) & 1
    mbarrier.wait(k_ready.index(ahead), phase, pred=careful < tiles)
    for i in range(careful, tiles):
        p = gl.convert_layout(e.to(dtype), P_L, assert_trivial=True)
        k_ahead = k_smem.index(ahead).permute((1, 0))
        s = warpgroup_mma(q, k_ahead, e, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, k_smem.index(slot), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        e = gl.exp2(s * c)
        total = _keep(total + _thread_sum(e))
        done = slot
        slot = ahead
        ahead += 1
        if ahead == STAGES:
            ahead = 0
            phase ^= 1
        # This wait also ends a basic block: without it ptxas moves the next product up, before the
        # exponentials.
        mbarrier.wait(k_ready.index(ahead), phase, pred=i + 1 < tiles)
        acc = warpgroup_mma_wait(0, deps=[acc])
        p = _keep(p)
        mbarrier.arrive(k_empty.index(done), count=1)
        acc = warpgroup_mma_init(acc)
    p = gl.convert_layout(e.to(dtype), P_L, assert_trivial=True)
    acc = warpgroup_mma(p, k_smem.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    p = _keep(p)

    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, O_L))
    o_n = row + gl.arange(0, 64, layout=gl.SliceLayout(1, O_L))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_L))
    o_out = i_sg.to(gl.int64) * N + o_n
    m_n = o_n < N
    m_none = total == 0.0  # a query that sees no key
    safe = gl.where(m_none, 1.0, total)
    gl.store(lse + o_out, gl.where(m_none, float("-inf"), gl.log2(safe) * LN2), mask=m_n)
    acc = acc * (1.0 / safe)[:, None]
    p_out = weighted_keys + o_out[:, None] * D + o_d[None, :]
    gl.store(p_out, acc.to(weighted_keys.dtype.element_ty), mask=m_n[:, None])


@gluon.jit(do_not_specialize=["G", "N", "M", "keys_per_group", "tiles_per_split", "exclude_offset"])
def hopper_kernel(
    q_desc, k_desc, lse, weighted_keys,
    G, N, M, keys_per_group, tiles_per_split, exclude_offset, c,
    D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, EXCLUDE: gl.constexpr,
):  # fmt: skip
    """lse [S, G, N] and weighted keys [S, G, N, D] of 128 queries over one split of the keys."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BM, D], k_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both consumers
    fence_async_shared()

    n_tiles = gl.cdiv(N, 128)
    i_n = gl.program_id(0) % n_tiles
    i_sg = gl.program_id(0) // n_tiles
    i_g = i_sg % G
    first = i_sg // G * tiles_per_split
    last = gl.minimum(first + tiles_per_split, gl.cdiv(M, BM))
    skip_from = last
    skipped = 0
    if EXCLUDE:
        begin = gl.maximum(i_n * 128 + exclude_offset, 0) // BM
        end = gl.cdiv(gl.maximum((i_n + 1) * 128 + exclude_offset, 0), BM)
        skip_from = gl.minimum(gl.maximum(begin, first), last)
        skipped = gl.minimum(gl.maximum(end, skip_from), last) - skip_from
    # The last tile may be ragged. It is careful too, unless the diagonal ends with it.
    careful = skipped + gl.where((skipped > 0) & (skip_from + skipped == last), 0, 1)

    q_row = i_g * N + i_n * 128
    k_row = i_g * keys_per_group
    gl.warp_specialize(
        [
            (_producer, (
                q_desc, k_desc, q_smem, k_smem, q_ready, k_ready, k_empty,
                q_row, k_row, first, last, skip_from, skipped, careful, BM, STAGES,
            )),
            (_consumer, (
                q_smem, k_smem, q_ready, k_ready, k_empty, lse, weighted_keys,
                N, M, c, exclude_offset, i_n, i_sg, first, last, skip_from, skipped, careful,
                D, BM, STAGES, EXCLUDE, 0,
            )),
            (_consumer, (
                q_smem, k_smem, q_ready, k_ready, k_empty, lse, weighted_keys,
                N, M, c, exclude_offset, i_n, i_sg, first, last, skip_from, skipped, careful,
                D, BM, STAGES, EXCLUDE, 1,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------


def launch(
    query: Tensor,
    keys: Tensor,
    scale: float,
    lse: Tensor,
    weighted_keys: Tensor,
    exclude_offset: int | None,
    splits: int,
    tiles_per_split: int,
) -> None:
    """Fill lse `[G, N]` and weighted keys `[G, N, D]`, both with an axis of splits before, if any.

    D is the width of the tiles. The TMA unit fills columns beyond the features with zeros.
    """
    (groups, rows, _), columns, D = query.shape, keys.shape[1], weighted_keys.shape[-1]
    tile = HOPPER_LAUNCH[D]
    dtype = gl.float16 if query.dtype == torch.float16 else gl.bfloat16
    descriptors = [
        TensorDescriptor.from_tensor(
            x.flatten(0, 1), [block, D], gl.NVMMASharedLayout.get_default_for([block, D], dtype)
        )
        for x, block in ((query, 64), (keys, tile.BM))
    ]
    hopper_kernel[(triton.cdiv(rows, tile.BN) * groups * splits,)](
        *descriptors, lse, weighted_keys,
        groups, rows, columns, columns if keys.shape[0] > 1 else 0, tiles_per_split,
        exclude_offset or 0, scale / LN2.value,
        D=D, BM=tile.BM, STAGES=tile.stages, EXCLUDE=exclude_offset is not None,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
