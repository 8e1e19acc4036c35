"""Single faults of the package, each of which some test has to notice; `tests/mutation.py` runs them.

A fault replaces a text that occurs exactly once in its file. Faults of one file that the same tests
should notice stand together; `tests` is what follows `pytest`, chosen so that it takes seconds.
To add a fault, add a line, and run `python tests/mutation.py --only "words of the line"`.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement, and the tests that should notice it."""

    file: str
    tests: str
    kind: str
    """One of KINDS."""
    what: str
    """What is wrong with it."""
    text: str
    faulty: str


KINDS = (
    "sign",
    "edge",  # off by one, most of them at the edge of a tile
    "mask",  # missing or wrong
    "axis",  # wrong axis, order or stride
    "detach",  # missing: a gradient that should not be, or a tensor that should not be kept
    "offset",  # 32 bits where 64 are needed
    "swap",  # of student and teacher, rows and columns, or two settings
    "state",  # a stale pointer or buffer, a mode that is not kept
    "eps",  # a missing guard against 0/0, inf - inf or overflow
    "factor",  # a missing or wrong factor, term or step
    "dtype",
    "check",  # a bad argument that is let through
)


def faults(file: str, tests: str, *lines: tuple[str, str, str, str]) -> list[Fault]:
    """The faults of one file that the same tests should notice: kind, what, text, faulty text."""
    return [Fault(f"pixdistill/{file}", tests, *line) for line in lines]


FAULTS = [
    # --- row_lse ----------------------------------------------------------------------------------
    *faults(
        "ops/row_lse/triton_kernels.py",
        "tests/test_row_lse_compiled.py -k 'kernel_variants or split_that or unwritten'",
        (
            "sign",
            "the excluded diagonal lies on the other side",
            "o_m[None, :] != o_n[:, None] + exclude_offset",
            "o_m[None, :] != o_n[:, None] - exclude_offset",
        ),
        (
            "edge",
            "one key beyond the last counts",
            "m_m = o_m < M",
            "m_m = o_m <= M",
        ),
        (
            "edge",
            "the last, partial tile of keys is taken for a whole one",
            "whole = tl.maximum(tl.minimum(last, M // BM), first)",
            "whole = tl.maximum(tl.minimum(last, tl.cdiv(M, BM)), first)",
        ),
        (
            "edge",
            "the tile in which the diagonal ends is taken for a free one",
            "end = tl.cdiv(tl.maximum((i_n + 1) * BN + exclude_offset, 0), BM)",
            "end = tl.maximum((i_n + 1) * BN + exclude_offset, 0) // BM",
        ),
        (
            "edge",
            "the tile in which the diagonal begins is taken for a free one",
            "begin = tl.maximum(i_n * BN + exclude_offset, 0) // BM",
            "begin = tl.cdiv(tl.maximum(i_n * BN + exclude_offset, 0), BM)",
        ),
        (
            "edge",
            "the first tile of the diagonal is read in place of the first after it",
            "tl.where(i < skip_from, i, i + skipped)",
            "tl.where(i <= skip_from, i, i + skipped)",
        ),
        (
            "edge",
            "the last tiles of a split are read too far on",
            "whole + i - skipped)",
            "whole + i)",
        ),
        (
            "factor",
            "the mean is not scaled down when the maximum rises",
            "b_acc = b_acc * b_shrink[:, None]",
            "b_acc = b_acc",
        ),
        (
            "factor",
            "the sum is not scaled down when the maximum rises",
            "b_sum = b_sum * b_shrink",
            "b_sum = b_sum",
        ),
        ("sign", "the maximum is taken away at the end", "b_lse += b_top", "b_lse -= b_top"),
        (
            "factor",
            "the largest logit is that of the last tile",
            "b_top = tl.maximum(b_top, tl.max(b_x, 1))",
            "b_top = tl.max(b_x, 1)",
        ),
        (
            "eps",
            "a row that has seen no key yet gives inf - inf",
            'b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)',
            "b_shift = b_new",
        ),
        ("eps", "a row without keys divides 0 by 0", "b_sum == 0.0", "b_sum < 0.0"),
        (
            "axis",
            "probabilities are summed over the queries",
            "b_sum += tl.sum(b_p, 1)",
            "b_sum += tl.sum(b_p, 0)",
        ),
        (
            "mask",
            "the mask of the keys is read as one beyond the last key",
            "tl.load(p_m, mask=m_m, other=0)",
            "tl.load(p_m, mask=m_m, other=1)",
        ),
        (
            "eps",
            "a split without keys joins as inf - inf",
            "(lse - total.clamp_min(torch.finfo(lse.dtype).min))",
            "(lse - total)",
        ),
        (
            "factor",
            "the largest logit is that of the first split",
            "largest.amax(dim=0)",
            "largest[0]",
        ),
        (
            "axis",
            "the mask of every group is that of the first",
            "p_mask = key_mask + i_g * stride_mg",
            "p_mask = key_mask",
        ),
    ),
    *faults(
        "ops/row_lse/triton_kernels.py",
        "tests/test_row_lse_compiled.py -k keys_gradient",
        (
            "sign",
            "the gradient's excluded diagonal lies on the other side",
            "o_m[:, None] != o_n[None, :] + exclude_offset",
            "o_m[:, None] != o_n[None, :] - exclude_offset",
        ),
        (
            "mask",
            "a row without keys has probabilities",
            'm_m[:, None] & (b_lse != float("-inf"))[None, :]',
            "m_m[:, None] & (b_lse == b_lse)[None, :]",
        ),
        (
            "factor",
            "probabilities are not weighted by the incoming gradient",
            ", 0.0) * b_grad[None, :]",
            ", 0.0)",
        ),
        (
            "edge",
            "the last, partial tile of queries is left out",
            "first + tiles_per_split, tl.cdiv(N, BN)",
            "first + tiles_per_split, N // BN",
        ),
    ),
    *faults(
        "ops/row_lse/triton_kernels.py",
        "tests/test_row_lse.py -k '(not_made_in_float16 or unless_hidden) and triton'",
        (
            "dtype",
            "probability times gradient is rounded to float16",
            "if b_q.dtype == tl.float16:",
            "if b_q.dtype == tl.float64:",
        ),
        (
            "mask",
            "a hidden key is read, and may be NaN",
            "b_k = tl.load(p_tile, mask=m_m[:, None], other=0.0)",
            "b_k = tl.load(p_tile, mask=(o_m < M)[:, None], other=0.0)",
        ),
    ),
    *faults(
        "ops/row_lse/triton_kernels.py",
        "tests/test_row_lse_compiled.py tests/test_row_lse.py -k 'sixty_four or (32_bits and triton)'",
        (
            "offset",
            "the place of a tile of keys",
            "p_keys + (i_tile * BM).to(tl.int64) * stride_m",
            "p_keys + (i_tile * BM) * stride_m",
        ),
        (
            "offset",
            "the place of a tile of the keys' mask",
            "p_mask + (i_tile * BM).to(tl.int64) * stride_mm",
            "p_mask + (i_tile * BM) * stride_mm",
        ),
        (
            "offset",
            "the place of a tile of queries",
            "(i_n * BN).to(tl.int64) * stride_qn",
            "(i_n * BN) * stride_qn",
        ),
        (
            "offset",
            "the place of a split's first tile of queries, for the gradient of the keys",
            "(first * BN).to(tl.int64) * stride_qn",
            "(first * BN) * stride_qn",
        ),
        (
            "offset",
            "the place of a group",
            "i_sg = tl.program_id(0) // n_tiles\n    i_g = (i_sg % G).to(tl.int64)",
            "i_sg = tl.program_id(0) // n_tiles\n    i_g = i_sg % G",
        ),
        (
            "offset",
            "the place of a group, for the gradient of the keys",
            "i_sg = tl.program_id(0) // m_tiles\n    i_g = (i_sg % G).to(tl.int64)",
            "i_sg = tl.program_id(0) // m_tiles\n    i_g = i_sg % G",
        ),
        (
            "offset",
            "the place of a row of the outputs",
            "o_out = i_sg.to(tl.int64) * N + o_n",
            "o_out = i_sg * N + o_n",
        ),
        (
            "offset",
            "the place of a row of the gradient",
            "(i_sg.to(tl.int64) * M + o_m)",
            "(i_sg * M + o_m)",
        ),
        (
            "offset",
            "strides too long for the offsets inside a tile are taken",
            "256 * (operand.stride(1) + operand.stride(2)) >= 2**31",
            "operand.stride(2) < 0",
        ),
    ),
    *faults(
        "ops/row_lse/tiled.py",
        "tests/test_row_lse.py -k 'blocks_join or no_key_at_all or unless_hidden or gradcheck'",
        (
            "sign",
            "the excluded diagonal runs with the blocks of keys",
            "offset = row + exclude_offset - column",
            "offset = row + exclude_offset + column",
        ),
        (
            "edge",
            "a diagonal that touches the last key of a block is missed",
            "offset < logits.shape[2]:",
            "offset < logits.shape[2] - 1:",
        ),
        (
            "edge",
            "a diagonal that touches the last query of a block is missed",
            "if -logits.shape[1] < offset",
            "if 1 - logits.shape[1] < offset",
        ),
        (
            "sign",
            "sums grow where they should shrink",
            "shrink = (top - shift).exp_()",
            "shrink = (shift - top).exp_()",
        ),
        (
            "factor",
            "the mean is not scaled down when the maximum rises",
            "weighted.mul_(shrink.unsqueeze(-1))",
            "pass",
        ),
        (
            "factor",
            "the maximum is that of the last block",
            "torch.maximum(top, logits.amax(dim=-1))",
            "logits.amax(dim=-1)",
        ),
        ("sign", "the maximum is taken away at the end", "total.log() + top", "total.log() - top"),
        (
            "eps",
            "a row that has seen no key yet gives inf - inf",
            "shift = new_top.clamp_min(torch.finfo(dtype).min)",
            "shift = new_top.clone()",
        ),
        (
            "eps",
            "a row without keys divides 0 by 0",
            "total.masked_fill(total == 0, 1.0)",
            "total",
        ),
        (
            "mask",
            "a hidden key is multiplied, and may be NaN",
            "block.masked_fill(~seen.unsqueeze(-1), 0.0), seen",
            "block, seen",
        ),
        (
            "mask",
            "a row without keys has probabilities in the gradient",
            "lse.masked_fill(lse == -torch.inf, torch.inf)",
            "lse.clone()",
        ),
        (
            "factor",
            "probabilities are not weighted by the incoming gradient",
            ".exp_().mul_(grad_rows[g, n].unsqueeze(-1))",
            ".exp_()",
        ),
    ),
    *faults(
        "ops/row_lse/__init__.py",
        "tests/test_row_lse.py -k 'gradcheck or second_order or range_of_both or inside_autocast'",
        (
            "factor",
            "the gradient is not multiplied by the scale",
            "grad_rows = grad_lse * scale",
            "grad_rows = grad_lse.clone()",
        ),
        (
            "factor",
            "the gradient of the scale holds the scale",
            "grad_scale = (grad_lse * along).sum()",
            "grad_scale = (grad_rows * along).sum()",
        ),
        (
            "eps",
            "float16 goes without the maximum beyond its range",
            "torch.float16: 9.0",
            "torch.float16: 60.0",
        ),
        (
            "detach",
            "a second differentiation is silently zero",
            "if torch.is_grad_enabled():  # create_graph=True",
            "if False:",
        ),
        (
            "dtype",
            "autocast reaches the backward products",
            "with torch.autocast(query.device.type, enabled=False):\n        return",
            "with torch.enable_grad():\n        return",
        ),
    ),
    *faults(
        "ops/row_lse/__init__.py",
        "tests/test_pixel_contrast.py -k 'enqueueing or keeps_neither'",
        (
            "detach",
            "frozen keys are kept for backward",
            "keys if needs_keys else None",
            "keys",
        ),
    ),
    *faults(
        "ops/row_lse/arguments.py",
        "tests/test_row_lse.py -k 'batch_axes or never_copied or wrong_arguments'",
        (
            "axis",
            "batch axes come back in the order of the groups",
            "inverse = [self._order.index(a) for a in range(batch_axes)]",
            "inverse = list(range(batch_axes))",
        ),
        (
            "axis",
            "rows are folded although their numbers matter",
            "fold_rows and key_batch[a] == 1",
            "key_batch[a] == 1",
        ),
        (
            "mask",
            "rows of different masks are folded",
            " and mask_batch[a] == 1]",
            "]",
        ),
        (
            "check",
            "a width above the largest is let through",
            "not 1 <= width <= MAX_WIDTH",
            "not 1 <= width",
        ),
        (
            "check",
            "a mask of another length is let through",
            "if key_mask.shape[-1] != keys.shape[-2]:",
            "if key_mask.shape[-1] > keys.shape[-2]:",
        ),
    ),
    *faults(
        "ops/row_lse/reference.py",
        "tests/test_row_lse.py -k '(dense_truth or no_key_at_all) and reference'",
        (
            "sign",
            "the excluded diagonal lies on the other side",
            "column == row + exclude_offset",
            "column == row - exclude_offset",
        ),
        (
            "mask",
            "a row without keys has the value of the column that never wins",
            "return lse.masked_fill(dead, -torch.inf), ",
            "return lse, ",
        ),
    ),
    *faults(
        "ops/row_lse/launch.py",
        "tests/test_row_lse_compiled.py -k 'small_table or every_width or share_all'",
        (
            "edge",
            "a width that is a power of two takes the next",
            "1 << (width - 1).bit_length()",
            "1 << width.bit_length()",
        ),
        (
            "swap",
            "the larger table is given to GPUs with small shared memory",
            '"sm_90" if architecture in',
            '"sm_90" if architecture not in',
        ),
        (
            "edge",
            "the last tiles belong to no split",
            "return _cdiv(max(1, tiles), per_split), per_split",
            "return max(1, tiles) // per_split, per_split",
        ),
    ),
    *faults(
        "ops/availability.py",
        "tests/test_row_lse.py -k 'triton_is_not_taken or says_why'",
        (
            "check",
            "the interpreter is taken for granted",
            'os.environ.get("TRITON_INTERPRET") == "1"',
            'os.environ.get("TRITON_INTERPRET") != "0"',
        ),
    ),
    *faults(
        "ops/availability.py",
        "tests/test_row_lse.py -k nvidia_gpus",
        ("edge", "GPUs of compute capability 8.0 are refused", "< (8, 0)", "<= (8, 0)"),
        (
            "check",
            "ROCm is let through",
            "torch.version.hip is not None",
            "torch.version.cuda is None",
        ),
    ),
    *faults(
        "ops/row_lse/launch.py",
        "tests/test_row_lse_compiled.py -k 'multiprocessor or architecture'",
        ("factor", "half of a GPU is filled", "2 * multiprocessors", "multiprocessors"),
        ("swap", "major and minor version change places", "sm_{major}{minor}", "sm_{minor}{major}"),
    ),
    # --- row_lse over blocks of keys, and over ranks ------------------------------------------------
    *faults(
        "ops/joined_row_lse.py",
        "tests/test_distributed.py -k 'whole_batch and 2'",
        (
            "factor",
            "the mean so far is not scaled down",
            "mean.mul_((lse.unsqueeze(-1) - finite).exp_())",
            "pass",
        ),
        (
            "factor",
            "a block's mean has weight one",
            "weight = (part[0].unsqueeze(-1) - finite).exp_()",
            "weight = torch.ones_like(finite)",
        ),
        (
            "eps",
            "a row without keys gives inf - inf",
            "joined.masked_fill(joined == -torch.inf, 0.0)",
            "joined",
        ),
        ("factor", "the gradient misses the scale", "(grad_lse * scale)", "(grad_lse)"),
        (
            "sign",
            "the gradient of the scale has the other sign",
            "grad_scale = (grad_lse * along).sum()",
            "grad_scale = -(grad_lse * along).sum()",
        ),
    ),
    *faults(
        "ops/joined_row_lse.py",
        "tests/test_distributed.py -k 'components and 2'",
        (
            "factor",
            "the largest logit is that of the last block",
            "torch.maximum(largest, top[0])",
            "top[0]",
        ),
    ),
    *faults(
        "distributed.py",
        "tests/test_distributed.py -k 'whole_batch and 2'",
        (
            "edge",
            "every rank takes the first rank's rows for its positives",
            "offset = dist.get_rank() * max(lengths)",
            "offset = 0",
        ),
        (
            "edge",
            "ranks are counted by their own lengths, not by the padded one",
            "offset = dist.get_rank() * max(lengths)",
            "offset = sum(lengths[: dist.get_rank()])",
        ),
        ("edge", "the ring ends one step early", "range(world):", "range(max(1, world - 1)):"),
        (
            "mask",
            "the positives are left out nowhere on the ring",
            "0 if step == 0 else None)",
            "None)",
        ),
        (
            "mask",
            "the diagonal is left out of every block of the ring",
            "0 if step == 0 else None)",
            "0)",
        ),
        ("state", "the same block is used at each step", "here, there = there, here", "pass"),
        (
            "mask",
            "the padding counts",
            "F.pad(mask, (0, missing))",
            "F.pad(mask, (0, missing), value=True)",
        ),
        (
            "mask",
            "the padding is told apart only where there is a mask",
            "any(masked) or len(set(lengths)) > 1",
            "any(masked)",
        ),
    ),
    *faults(
        "distributed.py",
        "tests/test_distributed.py -k 'whole_batch and 4'",
        (
            "swap",
            "each rank waits for the rank that it sends to",
            "dist.P2POp(dist.irecv, came, (rank - 1) % world)",
            "dist.P2POp(dist.irecv, came, (rank + 1) % world)",
        ),
    ),
    *faults(
        "distributed.py",
        "tests/test_distributed.py -k '(queues or total or disagree or ring_holds) and not [4'",
        ("edge", "gathered rows keep their padding", "block[:n] for", "block for"),
        (
            "axis",
            "gathered rows come in the order of nobody",
            "strict=True)])",
            "strict=True)][::-1])",
        ),
        (
            "swap",
            "the last rank's queue is the one to share",
            "dist.broadcast(tensor, 0)",
            "dist.broadcast(tensor, world_size() - 1)",
        ),
        ("state", "a total changes the rank's own number", "count = count.clone()", "pass"),
        (
            "check",
            "ranks with different dtypes are let through",
            "len(set(widths)) > 1 or len(set(dtypes)) > 1",
            "len(set(widths)) > 1",
        ),
    ),
    # --- patch_lse --------------------------------------------------------------------------------
    *faults(
        "ops/patch_lse/triton_kernels.py",
        "tests/test_patch_lse.py -k kernel_splits",
        ("sign", "logits are plus the distance", "-c * b_length", "c * b_length"),
        (
            "swap",
            "the difference is the teacher's less the student's",
            "b_diff = b_s - b_t[:, None]",
            "b_diff = b_t[:, None] - b_s",
        ),
        (
            "edge",
            "the patch at the lower edge of the map is as high as the others",
            "tl.minimum(P, H - i_h)",
            "P",
        ),
        (
            "mask",
            "a column of the patch is left out with the positive",
            "m_x = m_x | (o_y != i_y) | (o_x != i_x)",
            "m_x = m_x | (o_y != i_y)",
        ),
        ("mask", "invalid pixels are negatives", "m_x = m_x & m_seen", "pass"),
        (
            "factor",
            "the gradient so far is not scaled down when the maximum rises",
            "b_acc * b_shrink[None, :] + _pull",
            "b_acc + _pull",
        ),
        ("factor", "the L1 slope stays halved", "scale if L2 else 2 * scale", "scale"),
        (
            "axis",
            "patches are counted down the map first",
            "i_h = i_patch // across % down * P",
            "i_h = i_patch // across % across * P",
        ),
        (
            "axis",
            "a group of the teacher's is one channel wide",
            "channels // groups * stride_tc, stride_tc, *strides_t",
            "stride_tc, stride_tc, *strides_t",
        ),
    ),
    *faults(
        "ops/patch_lse/triton_kernels.py",
        "tests/test_patch_lse.py -k '(count or even_if or hidden_pixels or zero_distances) and triton'",
        (
            "edge",
            "pixels beyond the right edge of the map are rows",
            "(i_w + o_x < W)",
            "(i_w + o_x <= W)",
        ),
        ("mask", "invalid pixels are read", "m_k = m_k & m_seen", "pass"),
        (
            "mask",
            "a row without negatives has a gradient",
            "m_alive = m_row & (b_count > 0)",
            "m_alive = m_row",
        ),
        (
            "eps",
            "a difference of length 0 has a slope of 0/0",
            "tl.where(b_length > 0, b_length, 1.0)",
            "b_length",
        ),
        ("axis", "rows and columns of a patch are one", "o_y = o_n // Q % P", "o_y = o_n // P % Q"),
    ),
    *faults(
        "ops/patch_lse/triton_kernels.py",
        "tests/test_patch_lse.py -k 'sixty_four or (32_bits and triton)'",
        (
            "offset",
            "the place of an image",
            "i_b = (i_patch // (across * down)).to(tl.int64)",
            "i_b = i_patch // (across * down)",
        ),
        (
            "offset",
            "the place of a patch's first row in the teacher's map",
            "p_t = teacher + i_b * stride_tb + i_h.to(tl.int64) * stride_th",
            "p_t = teacher + i_b * stride_tb + i_h * stride_th",
        ),
        (
            "offset",
            "the place of a channel in a patch",
            "o_d = o_d.to(tl.int64)",
            "o_d = o_d.to(tl.int32)",
        ),
        (
            "offset",
            "the place of a patch in the outputs",
            "i_pixel = i_h.to(tl.int64) * W + i_w",
            "i_pixel = i_h * W + i_w",
        ),
        (
            "offset",
            "long strides are taken for short ones",
            "_reach(map_, p, q) >= 2**31 for",
            "_reach(map_, p, q) >= 2**63 for",
        ),
        (
            "offset",
            "long strides of the mask are taken for short ones",
            "maps += [] if valid_mask is None else [valid_mask.unsqueeze(1)]",
            "pass",
        ),
        (
            "swap",
            "the reach of a patch is that of its transpose",
            "(p - 1) * row + (q - 1) * column",
            "(q - 1) * row + (p - 1) * column",
        ),
    ),
    *faults(
        "ops/patch_lse/triton_kernels.py",
        "tests/test_patch_lse.py -k layout_of_both",
        (
            "axis",
            "any distance of two columns is taken for 1",
            "return column == 1 and all(",
            "return all(",
        ),
        (
            "swap",
            "the layout is the student's alone",
            "_aligned(student) and _aligned(teacher)",
            "_aligned(student)",
        ),
        (
            "edge",
            "rows may begin at multiples of 8",
            "number % 16 == 0 for",
            "number % 8 == 0 for",
        ),
    ),
    *faults(
        "ops/patch_lse/launch.py",
        "tests/test_patch_lse.py -k 'launch_rule or tile'",
        (
            "factor",
            "maps of any strides get a whole tile",
            "_TILE if aligned else _TILE // 2",
            "_TILE",
        ),
        (
            "swap",
            "wide kernels get the fewer registers",
            "255 if wide else 168",
            "168 if wide else 255",
        ),
        (
            "edge",
            "a width that is a power of two takes the next",
            "1 << (number - 1).bit_length()",
            "1 << number.bit_length()",
        ),
    ),
    *faults(
        "ops/patch_lse/__init__.py",
        "tests/test_patch_lse.py -k 'teacher_gets or nobody_wants or second_order or gradcheck'",
        ("detach", "the teacher gets a gradient", "teacher = teacher.detach()", "pass"),
        (
            "detach",
            "a gradient is made under no_grad",
            "torch.is_grad_enabled() and student.requires_grad",
            "student.requires_grad",
        ),
        (
            "detach",
            "a second differentiation is silently wrong",
            "if torch.is_grad_enabled():  # create_graph=True",
            "if False:",
        ),
        (
            "factor",
            "the incoming gradient is left out",
            "grad = grad_margin.unsqueeze(2) * slope",
            "grad = torch.ones_like(grad_margin).unsqueeze(2) * slope",
        ),
    ),
    *faults(
        "ops/patch_lse/tiled.py",
        "tests/test_patch_lse.py -k 'blocks_join or (near_pairs and True) or"
        " (zero_distances and torch)'",
        (
            "state",
            "the positive's distance is overwritten with those of its kind",
            "length.diagonal(start, dim1=1, dim2=2).clone()",
            "length.diagonal(start, dim1=1, dim2=2)",
        ),
        (
            "edge",
            "the kinds of a later block of rows are those of the first",
            "kinds.diagonal(start // alike, dim1=1, dim2=3)",
            "kinds.diagonal(0, dim1=1, dim2=3)",
        ),
        (
            "mask",
            "invalid vectors are negatives",
            "length.masked_fill_(~valid.unsqueeze(1), torch.inf)",
            "pass",
        ),
        ("mask", "an invalid vector has a margin", "dead = ~valid | (of", "dead = (of"),
        (
            "sign",
            "the sum of the negatives is taken away",
            "/ temperature + total.log()",
            "/ temperature - total.log()",
        ),
        (
            "sign",
            "near negatives weigh the more the farther they are",
            "weights = (nearest.flatten()[row] - length)",
            "weights = (length - nearest.flatten()[row])",
        ),
        (
            "edge",
            "too few negatives are near",
            "near = length <= nearest + reach",
            "near = length <= nearest + 0.5 * reach",
        ),
        (
            "axis",
            "near negatives are those of the first patch",
            "column = row // rows * vectors + pair % vectors",
            "column = pair % vectors",
        ),
        ("eps", "a distance of 0 has a slope of 0/0", ".masked_fill_(length == 0, 0.0)", ""),
        (
            "factor",
            "the mean of the slopes is their sum",
            "weights.div_(total), s, t",
            "weights, s, t",
        ),
    ),
    *faults(
        "ops/patch_lse/tiled.py",
        "tests/test_patch_lse.py -k 'gradcheck or (count and torch)'",
        (
            "swap",
            "the two rules of negatives change places",
            'if negatives == "other_groups" else 1',
            'if negatives != "other_groups" else 1',
        ),
        (
            "dtype",
            "statistics of a float64 map are float32",
            "return torch.float64 if tensor.dtype == torch.float64 else torch.float32",
            "return torch.float32",
        ),
    ),
    *faults(
        "ops/patch_lse/tiled.py",
        "tests/test_patch_lse.py -k 'blocks_join or near_pairs or the_form or lost_in_rounding or"
        " memory'",
        (
            "edge",
            "a block of rows begins inside a kind",
            "whole = max(alike, most // alike * alike)",
            "whole = max(alike, most)",
        ),
        (
            "edge",
            "the nearest is not near",
            "near = length <= nearest + reach",
            "near = length < nearest",
        ),
        (
            "factor",
            "what is near is measured without the temperature",
            "torch.finfo(s.dtype).eps) * temperature",
            "torch.finfo(s.dtype).eps)",
        ),
        (
            "eps",
            "nearness ends before what is left out is lost in rounding",
            "math.log(8 * vectors / torch.finfo(s.dtype).eps)",
            "math.log(8 * vectors / 1e-3)",
        ),
        ("swap", "few near pairs are taken for many", "* _FEW <= near", "* _FEW >= near"),
        (
            "axis",
            "a pair's distance is that of its row's number",
            "length = length.flatten()[pair]",
            "length = length.flatten()[row]",
        ),
        (
            "factor",
            "a block is bounded in pairs only",
            "min(pairs // (groups * p * q) ** 2, numbers // (channels * p * q))",
            "pairs // (groups * p * q) ** 2",
        ),
        (
            "factor",
            "the weights of near pairs are not normalised",
            "weights / total[row]",
            "weights",
        ),
        ("sign", "negatives pull", "slope.sub_(mean)", "slope.add_(mean)"),
    ),
    *faults(
        "ops/patch_lse/reference.py",
        "tests/test_patch_lse.py -k 'equals_explicit_loops and l1'",
        (
            "swap",
            "the map is padded as its transpose",
            "edges = (0, -width % patch[1], 0, -height % patch[0])",
            "edges = (0, -height % patch[0], 0, -width % patch[1])",
        ),
        ("mask", "invalid pixels are negatives", " & valid.unsqueeze(-2)", ""),
        ("sign", "the positive is added", "(lse - positive)", "(lse + positive)"),
    ),
    *faults(
        "ops/patch_lse/arguments.py",
        "tests/test_patch_lse.py -k bad_arguments",
        (
            "check",
            "a temperature of 0 is let through",
            "if not 0 < temperature",
            "if not 0 <= temperature",
        ),
        ("check", "groups that do not divide are let through", " or channels % groups:", ":"),
        (
            "check",
            "a mask of another shape is let through",
            "valid_mask.shape != pixels or ",
            "",
        ),
    ),
    # --- contrast of pixels -----------------------------------------------------------------------
    *faults(
        "pixel_contrast.py",
        "tests/test_pixel_contrast.py -k 'not triton and (dense_truth or gets_a_gradient or"
        " invalid_pixels or nothing_to_compare or components_equal or settings or cross_entropy)'",
        (
            "swap",
            "the student's vectors are the negatives of the student",
            "sources.append((as_operand(teacher), valid_mask, 0))",
            "sources.append((student.detach(), valid_mask, 0))",
        ),
        (
            "swap",
            "student and teacher change places",
            'rearrange(student, f"b c ... -> {pixels} c"),\n'
            '            rearrange(teacher.detach(), f"b c ... -> {pixels} c"),',
            'rearrange(teacher.detach(), f"b c ... -> {pixels} c"),\n'
            '            rearrange(student, f"b c ... -> {pixels} c"),',
        ),
        ("detach", "the teacher gets a gradient", "\n    teacher = frozen(teacher)\n", "\n"),
        (
            "sign",
            "the positive is pushed away",
            "F.softplus(lse - positive",
            "F.softplus(lse + positive",
        ),
        ("factor", "the positive misses the temperature", "scale * similarity", "1.0 * similarity"),
        (
            "factor",
            "the temperature is multiplied",
            "scale = 1.0 / temperature",
            "scale = 1.0 * temperature",
        ),
        (
            "mask",
            "the positive counts among the negatives",
            "sources.append((as_operand(teacher), valid_mask, 0))",
            "sources.append((teacher, valid_mask, None))",
        ),
        (
            "mask",
            "invalid teacher pixels are negatives",
            "sources.append((as_operand(teacher), valid_mask, 0))",
            "sources.append((teacher, None, 0))",
        ),
        (
            "mask",
            "invalid pixels reach the student's gradient",
            "student = student.masked_fill(~valid_mask.unsqueeze(-1), 0.0)",
            "pass",
        ),
        (
            "mask",
            "invalid rows count in the reduction",
            "values = values.masked_fill(~valid_mask, 0.0)",
            "pass",
        ),
        (
            "eps",
            "the mean over no valid pixel is 0/0",
            "return values.sum() / valid_mask.sum().clamp_min(1)",
            "return values.sum() / valid_mask.sum()",
        ),
        (
            "eps",
            "the mean over no pixel is 0/0",
            "max(values.numel(), 1)",
            "values.numel()",
        ),
        (
            "factor",
            "the vectors are never normalised",
            "    if normalize:\n",
            "    if False:\n",
        ),
        (
            "axis",
            "images are one matrix where they should be apart",
            '"b (...)" if "image" in self.negatives else "(b ...)"',
            '"b (...)" if "batch" in self.negatives else "(b ...)"',
        ),
        (
            "factor",
            "the queue's negatives are added to the sum as a maximum",
            "functools.reduce(torch.logaddexp,",
            "functools.reduce(torch.maximum,",
        ),
    ),
    *faults(
        "pixel_contrast.py",
        "tests/test_pixel_contrast.py -k 'not triton and (ties or rival or wrong_ or large_float64 or"
        " tiny_loss or temperature)'",
        ("eps", "a tie is lost to rounding", " + 1e-5 * (scale * tie).abs()", " - 0.0"),
        (
            "factor",
            "one source that is beaten is enough",
            "functools.reduce(torch.logical_and, beaten)",
            "functools.reduce(torch.logical_or, beaten)",
        ),
        ("eps", "softplus turns linear too early", "threshold=40", "threshold=20"),
        ("check", "any negatives are let through", " and all(n in NEGATIVES for n in names)", ""),
        (
            "state",
            "the learnable temperature is that of the start",
            "return self.log_temperature.exp()",
            "return self._temperature",
        ),
    ),
    *faults(
        "pixel_contrast.py",
        "tests/test_distributed.py -k '(whole_batch or components) and 2'",
        (
            "factor",
            "the mean over all ranks is averaged once more",
            "return values.sum() * ranks / count.clamp_min(1)",
            "return values.sum() / count.clamp_min(1)",
        ),
        (
            "eps",
            "the mean over no valid pixel of all ranks is 0/0",
            "return values.sum() * ranks / count.clamp_min(1)",
            "return values.sum() * ranks / count",
        ),
        (
            "factor",
            "the sum over all ranks is averaged",
            "return values.sum() * ranks\n",
            "return values.sum()\n",
        ),
        (
            "axis",
            "negatives of an image are those of all ranks",
            'if self._gathers and "batch" in self.negatives else None',
            "if self._gathers else None",
        ),
        (
            "factor",
            "logged numbers are sums over the ranks",
            "total(mean) / world_size() for",
            "total(mean) for",
        ),
    ),
    *faults(
        "pixel_contrast.py",
        "tests/test_pixel_contrast.py -k 'not triton and (another_dtype or ties_under or second_order"
        " or reset_parameters or inference_mode)'",
        (
            "dtype",
            "unit vectors are rounded to the teacher's dtype",
            "teacher.to(torch.promote_types(student.dtype, teacher.dtype))",
            "teacher",
        ),
        (
            "dtype",
            "a tie is judged before rounding",
            "as_operand(student).to(dtype)",
            "student.to(dtype)",
        ),
        (
            "dtype",
            "keys of the batch are not rounded as the tie is",
            "sources.append((as_operand(teacher),",
            "sources.append((teacher,",
        ),
        (
            "check",
            "the second derivative at zero is NaN",
            'differentiable_twice=backend == "reference"',
            "differentiable_twice=False",
        ),
        (
            "state",
            "a reset leaves the temperature as it is",
            "nn.init.constant_(self.log_temperature, math.log(self._temperature))",
            "pass",
        ),
    ),
    *faults(
        "pixel_queue.py",
        "tests/test_pixel_contrast.py -k squares_overflow",
        ("check", "an overflow counts as a zero vector", ".masked_fill(long, torch.nan)", ""),
    ),
    *faults(
        "af_dcd.py",
        "tests/test_af_dcd.py -k 'dropped_pixel or drawn_on or far_from or (nothing_to and reference)'",
        (
            "mask",
            "a NaN that is dropped does not show",
            "student * ~drop_mask.unsqueeze(1)",
            "student.masked_fill(drop_mask.unsqueeze(1), 0.0)",
        ),
        (
            "check",
            "the mask is drawn on the CPU",
            "torch.empty(pixels, device=student.device)",
            "torch.empty(pixels)",
        ),
        (
            "eps",
            "softplus turns linear too early",
            "F.softplus(margin, threshold=40)",
            "F.softplus(margin)",
        ),
        (
            "axis",
            "images are pooled as channels",
            "_pool(valid_mask.unsqueeze(1).float(), pool, None, whole)[:, 0]",
            "_pool(valid_mask.float(), pool, None, whole)",
        ),
    ),
    *faults(
        "pixel_contrast.py",
        "tests/test_distributed.py -k half_precision",
        (
            "dtype",
            "keys travel in float32 under autocast",
            "all_blocks(as_operand(teacher), valid_mask)",
            "all_blocks(teacher.float(), valid_mask)",
        ),
    ),
    # --- the queue --------------------------------------------------------------------------------
    *faults(
        "pixel_queue.py",
        "tests/test_pixel_queue.py",
        (
            "state",
            "the pointer moves by what was written, not by what came",
            "(self.ptr + count) % self.size",
            "(self.ptr + newest.shape[0]) % self.size",
        ),
        (
            "state",
            "the pointer never moves",
            "self.ptr.copy_((self.ptr + count) % self.size)",
            "pass",
        ),
        (
            "edge",
            "the pointer does not wrap",
            "self.ptr.copy_((self.ptr + count) % self.size)",
            "self.ptr += count",
        ),
        (
            "edge",
            "writing does not wrap",
            "device=self.ptr.device)) % self.size",
            "device=self.ptr.device)).clamp_max(self.size - 1)",
        ),
        (
            "edge",
            "of a large batch the oldest are kept",
            "vectors[max(0, count - self.size) :]",
            "vectors[: self.size]",
        ),
        (
            "edge",
            "a large batch begins at the pointer",
            "start = self.ptr + (count - newest.shape[0])",
            "start = self.ptr",
        ),
        (
            "state",
            "the pointer is a buffer anew, and shares nothing",
            "self.ptr.copy_((self.ptr + count) % self.size)",
            "self.ptr = (self.ptr + count) % self.size",
        ),
        ("state", "a reset leaves the pointer", "self.ptr.zero_()", "pass"),
        ("mask", "vectors that are not finite enter", "unit.isfinite() & (", "("),
        ("mask", "vectors without direction enter", " & (unit != 0).any(dim=1, keepdim=True)", ""),
        ("eps", "a vector of norm 0 is divided", "norm <= MIN_NORM", "norm < 0"),
        (
            "dtype",
            "the norm is taken in half precision",
            "keepdim=True, dtype=dtype)",
            "keepdim=True)",
        ),
        (
            "dtype",
            "the average is taken in half precision",
            "mean(dim=2, dtype=dtype)",
            "mean(dim=2)",
        ),
        (
            "axis",
            "the map is averaged over its last axis only",
            "teacher_map.detach().flatten(2).mean(dim=2, dtype=dtype)",
            "teacher_map.detach().mean(dim=-1, dtype=dtype).flatten(2)[:, :, 0]",
        ),
    ),
    *faults(
        "pixel_queue.py",
        "tests/test_distributed.py -k '(queues or nothing_is_gathered) and not [4'",
        ("state", "the first rank's queue is taken again and again", "self._shared = True", "pass"),
        (
            "state",
            "a reset queue is not shared again",
            "self._shared = False\n\n    @",
            "pass\n\n    @",
        ),
        (
            "check",
            "a queue gathers unasked",
            "if self.gather_distributed and world_size() > 1:",
            "if world_size() > 1:",
        ),
    ),
    # --- heads on maps ----------------------------------------------------------------------------
    *faults(
        "_head_layers.py",
        "tests/test_spatial_adaptor.py -k 'the_loop or kinks or closed_at_zero or"
        " cannot_be_adapted or keeps_its_epsilon or order_holds'",
        (
            "sign",
            "a step scales by the opposite",
            "torch.addcmul(shift, x, scale)",
            "torch.addcmul(shift, x, -scale)",
        ),
        (
            "factor",
            "of two steps only the first scales",
            "return scale * next_scale, next_shift",
            "return scale, next_shift",
        ),
        (
            "factor",
            "the first step's shift is not scaled by the second",
            "shift = shift * next_scale",
            "shift = shift.clone()",
        ),
        (
            "swap",
            "shifts of two steps: the last only",
            "else shift + next_shift",
            "else next_shift",
        ),
        (
            "eps",
            "BatchNorm without its epsilon",
            "(layer.running_var.to(m.dtype) + layer.eps)",
            "layer.running_var.to(m.dtype)",
        ),
        (
            "eps",
            "LayerNorm without its epsilon",
            ".mean(dim=1, keepdim=True) + layer.eps)",
            ".mean(dim=1, keepdim=True))",
        ),
        (
            "eps",
            "L2 normalisation without its epsilon",
            ".clamp_min(layer.eps).reciprocal()",
            ".reciprocal()",
        ),
        ("edge", "ReLU is open at zero", "(m > 0).to(m.dtype)", "(m >= 0).to(m.dtype)"),
        ("factor", "the tanh form of GELU is slightly off", "0.044715", "0.04471"),
        (
            "check",
            "a forward hook is let through",
            "if pre_hooks or module._forward_hooks:",
            "if pre_hooks:",
        ),
        (
            "check",
            "modules with parameters may stand in an order",
            "isinstance(step, nn.Module) and not step.state_dict()",
            "isinstance(step, nn.Module)",
        ),
        (
            "axis",
            "LayerNorm takes its statistics over the batch",
            "mean = m.mean(dim=1, keepdim=True)",
            "mean = m.mean(dim=0, keepdim=True)",
        ),
    ),
    *faults(
        "spatial_adaptor.py",
        "tests/test_spatial_adaptor.py -k 'every_pixel or means_of_float16 or modes or no_gradient or"
        " it_copies or tokens_to_map'",
        ("state", "the pooled vector stays where it was", "m = apply(m, step)", "pass"),
        (
            "swap",
            "steps are joined in the wrong order",
            "apply_after(pending, step)",
            "apply_after(step, pending)",
        ),
        (
            "dtype",
            "the pooled vector is made in half precision",
            "dtype = torch.promote_types(x.dtype, torch.float32)",
            "dtype = x.dtype",
        ),
        (
            "state",
            "train mode reaches the teacher's head",
            "self.head.eval()\n        return self",
            "return self",
        ),
        ("detach", "the teacher's head stays trainable", "self.head.requires_grad_(False)", "pass"),
        ("state", "the caller's head is taken, not a copy", "copied(head).eval()", "head.eval()"),
        (
            "detach",
            "the graph goes through a frozen teacher",
            "self.trainable and torch.is_grad_enabled()",
            "torch.is_grad_enabled()",
        ),
        (
            "axis",
            "tokens fill the map column by column",
            '"b n c -> b c n").unflatten(2, tuple(grid))',
            '"b n c -> b c n").unflatten(2, tuple(grid)[::-1]).transpose(2, -1)',
        ),
        (
            "edge",
            "one token too many is dropped",
            "tokens[:, prefix_tokens:]",
            "tokens[:, prefix_tokens + 1 :]",
        ),
    ),
    # --- masks, and the distance under them ---------------------------------------------------------
    *faults(
        "masked_receptive_tokens.py",
        "tests/test_masked_receptive_tokens.py -k 'official_outputs or window_sums or cropped_image or"
        " pooled_convolution or dense_truth or diversity or zero_everywhere or float16'",
        (
            "swap",
            "the left and the right window change places",
            "[row - x[..., -1], row, row - x[..., 0]]",
            "[row - x[..., 0], row, row - x[..., -1]]",
        ),
        (
            "swap",
            "the upper and the lower window change places",
            "[total - row[:, :, -1], total, total - row[:, :, 0]]",
            "[total - row[:, :, 0], total, total - row[:, :, -1]]",
        ),
        ("axis", "taps of valid pixels are not mirrored", "padding=1).flip(1)", "padding=1)"),
        (
            "mask",
            "invalid pixels are summed",
            "x.to(dtype).masked_fill(~valid_mask.unsqueeze(1), 0.0).flatten(2)",
            "x.to(dtype).flatten(2)",
        ),
        (
            "mask",
            "the mean is over all pixels",
            "count = valid_mask.sum(dim=(1, 2)).clamp_min(1).unsqueeze(1)",
            "pass",
        ),
        (
            "eps",
            "two masks that are zero give 0/0",
            "norms = products.diagonal(dim1=1, dim2=2) + 1e-12",
            "norms = products.diagonal(dim1=1, dim2=2)",
        ),
        (
            "mask",
            "a mask is compared with itself",
            "dice.masked_fill(itself, 0.0).sum()",
            "dice.sum()",
        ),
        ("factor", "pairs are counted once", "(num_tokens - 1)\n", "(num_tokens - 1) // 2\n"),
        ("factor", "the mean misses the bias", " / count + bias.to(dtype)", " / count"),
        (
            "factor",
            "the tokens' shares are left out",
            "(self.weights(x)[:, :, None, None] * masks)",
            "masks",
        ),
        (
            "axis",
            "the shares sum to one over the batch",
            "logits.softmax(dim=1)",
            "logits.softmax(dim=0)",
        ),
        (
            "dtype",
            "pixels are summed in half precision",
            "row = x.sum(dim=3, dtype=dtype)",
            "row = x.sum(dim=3)",
        ),
    ),
    *faults(
        "masked_distillation.py",
        "tests/test_masked_distillation.py -k 'dense_truth or any_valid or formula or blocks_of_any or"
        " saturate or before_an_alignment or reductions_agree or join_after or"
        " gets_a_gradient or get_a_gradient'",
        (
            "sign",
            "the gradient has the other sign",
            "(2 / student.shape[1] * grad)",
            "(-2 / student.shape[1] * grad)",
        ),
        (
            "detach",
            "the gradient flows to the teacher where the formula is compiled",
            "\n    teacher = frozen(teacher)\n",
            "\n",
        ),
        (
            "eps",
            "a mask that is zero gives 0/0",
            ".clamp_min(torch.finfo(masks.dtype).tiny)",
            "",
        ),
        (
            "eps",
            "the sum of a mask misses its epsilon",
            "(masks.sum(dim=(2, 3)) + eps)",
            "masks.sum(dim=(2, 3))",
        ),
        (
            "mask",
            "invalid pixels count in the sum of a mask",
            "masks = masks.masked_fill(~valid_mask.unsqueeze(1), 0.0)",
            "pass",
        ),
        (
            "mask",
            "invalid pixels are compared",
            "gap if valid_mask is None else gap.masked_fill(~valid_mask.unsqueeze(1), 0.0)",
            "gap",
        ),
        (
            "mask",
            "a NaN at an invalid pixel reaches the alignment",
            "student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)",
            "pass",
        ),
        (
            "edge",
            "the student's masks join one step late",
            "self.steps < self.customize_after",
            "self.steps <= self.customize_after",
        ),
        ("state", "steps are never counted", "self.steps += 1", "pass"),
        (
            "edge",
            "the last row of a block is left out",
            "slice(start, start + step)",
            "slice(start, start + step - (step > 1))",
        ),
        (
            "factor",
            "the mean is over all images, also those without a valid pixel",
            "valid_mask.flatten(1).any(dim=1).sum().clamp_min(1)",
            "valid_mask.shape[0]",
        ),
        (
            "factor",
            "masks are not squared",
            "[:, :, None, None] * masks).sum",
            "[:, :, None, None]).expand_as(masks).sum",
        ),
        (
            "swap",
            "token weights come from the student",
            "tokens.weights(teacher, valid_mask",
            "tokens.weights(student, valid_mask",
        ),
        (
            "detach",
            "the tokens are trained with the student",
            "nn.ModuleList(levels).requires_grad_(False)",
            "nn.ModuleList(levels)",
        ),
    ),
    # --- contrast inside patches --------------------------------------------------------------------
    *faults(
        "af_dcd.py",
        "tests/test_af_dcd.py -k 'not triton and (loops or mimic or padding or cropped or share or"
        " averages or zeroes_aligned or hold_anything or weighted_sum or float16 or nothing_to or"
        " reach_student)'",
        (
            "detach",
            "the teacher gets a gradient from the mimic term",
            "\n    teacher = frozen(teacher)\n",
            "\n",
        ),
        (
            "mask",
            "pooling sees invalid pixels",
            "x = x.masked_fill(~valid_mask.unsqueeze(1), -torch.inf)",
            "pass",
        ),
        (
            "edge",
            "the last, partial windows are cropped",
            "F.max_pool2d(x, pool, ceil_mode=True)",
            "F.max_pool2d(x, pool)",
        ),
        (
            "sign",
            "the complement of the share is dropped",
            "noise < self.mask_ratio",
            "noise > self.mask_ratio",
        ),
        (
            "state",
            "pixels are dropped in eval mode too",
            "drop_mask is None and self.training and",
            "drop_mask is None and",
        ),
        (
            "swap",
            "spatial contrast takes the rule of omni",
            'return 1, patch, "all_others"',
            "return 1, patch, negatives",
        ),
        (
            "swap",
            "channel contrast takes the patch of omni",
            '(1, 1) if contrast == "channel" else patch',
            "patch",
        ),
        (
            "factor",
            "the sum is not divided by the images",
            "return total / max(batch, 1)",
            "return total",
        ),
        (
            "dtype",
            "the mimic sum is made in half precision",
            "dtype = torch.promote_types(student.dtype, torch.float32)",
            "dtype = student.dtype",
        ),
        (
            "mask",
            "invalid pixels reach the projector",
            "drop_mask = ~valid_mask if drop_mask is None else drop_mask | ~valid_mask",
            "pass",
        ),
        (
            "mask",
            "a NaN at an invalid pixel reaches the alignment",
            "student = student.masked_fill(~valid_mask.unsqueeze(1), 0.0)\n",
            "pass\n",
        ),
        (
            "eps",
            "the mean over no valid pixel is 0/0",
            "valid_mask.sum().clamp_min(1)\n    return",
            "valid_mask.sum()\n    return",
        ),
        ("check", "a width that is not divided is cropped", " or student.shape[3] % tile[1]", ""),
        (
            "swap",
            "the two weights change places",
            "self.mimic_weight * mimic + self.contrast_weight * contrast",
            "self.contrast_weight * mimic + self.mimic_weight * contrast",
        ),
    ),
    *faults(
        "_projectors.py",
        "tests/test_af_dcd.py -k official",
        ("swap", "the second block reads the map", "self.block_2(first)", "self.block_2(x)"),
        ("factor", "two outputs are added, not averaged", ")) / 2", "))"),
    ),
    # --- attention --------------------------------------------------------------------------------
    *faults(
        "mhsa_plugin.py",
        "tests/test_mhsa_plugin.py -k 'equals_dense_truth or rotation or identity_at or window or"
        " cells or the_mode or changes_no_bit or transposing'",
        (
            "state",
            "the plug-in does not start as the identity",
            "self.out = _ZeroLinear(channels, channels)",
            "self.out = nn.Linear(channels, channels)",
        ),
        (
            "swap",
            "windows are padded as those of the transpose",
            "right % self.window, 0, below % self.window",
            "below % self.window, 0, right % self.window",
        ),
        ("mask", "the padding of windows is seen", "(q, k, v, attn_mask=key_mask)", "(q, k, v)"),
        ("swap", "values carry the position", "self.value(sources)", "self.value(keys)"),
        ("sign", "pairs are mirrored, not rotated", "x * cos - y * sin", "x * cos + y * sin"),
        ("axis", "rows and columns of the places change", 'indexing="ij"', 'indexing="xy"'),
        (
            "factor",
            "the norm is left out",
            "self._attend(self.norm(pixels))",
            "self._attend(pixels)",
        ),
        (
            "factor",
            "the keys of cells are doubled",
            "cells = F.avg_pool2d(",
            "cells = 2 * F.avg_pool2d(",
        ),
        ("edge", "cells at the edge are left out", "ceil_mode=True", "ceil_mode=False"),
        ("state", "the plug-in keeps its own mode", "plugin.train(module.training)", "plugin"),
        (
            "swap",
            "unplugging puts back the plug-in",
            "parent._modules[key] = child.module",
            "parent._modules[key] = child.plugin",
        ),
    ),
    # --- checks of arguments, and the report --------------------------------------------------------
    *faults(
        "_checks.py",
        "tests/test_pixel_contrast.py tests/test_pixel_queue.py tests/test_masked_distillation.py"
        " tests/test_af_dcd.py -k 'wrong or bad'",
        (
            "check",
            "a number of 0 is above 0",
            "if not 0 < value < math.inf",
            "if not 0 <= value < math.inf",
        ),
        (
            "check",
            "a negative number is let through",
            "if not 0 <= value < math.inf",
            "if not value < math.inf",
        ),
        ("check", "a share above 1 is let through", "if not 0 <= value <= 1", "if not 0 <= value"),
        ("check", "a size of 0 is let through", "if size < 1:", "if size < 0:"),
        (
            "check",
            "True is a count",
            "if isinstance(value, bool) or not isinstance(value, int):",
            "if not isinstance(value, int):",
        ),
        ("check", "a mask of numbers is let through", " or mask.dtype != torch.bool", ""),
        (
            "check",
            "a mask of another shape is let through",
            "if mask.shape != shape:",
            "if mask.dim() != len(shape):",
        ),
        (
            "check",
            "integer maps are let through",
            "if not tensor.is_floating_point():",
            "if tensor.is_complex():",
        ),
        (
            "check",
            "another batch is let through",
            "tensor.shape[:1] + tensor.shape[2:] != teacher.shape[:1] + teacher.shape[2:]",
            "tensor.shape[2:] != teacher.shape[2:]",
        ),
        (
            "check",
            "keys of another width are let through",
            " or keys.shape[1] != like.shape[-1]",
            "",
        ),
    ),
    *faults(
        "__main__.py",
        "tests/test_main.py -k a_backend",
        ("check", "the exit status is always 0", "return 1 if wrong else 0", "return 0"),
        (
            "eps",
            "an error of NaN is no error",
            'if all(e == e for e in errors) else float("nan")',
            "",
        ),
    ),
]
