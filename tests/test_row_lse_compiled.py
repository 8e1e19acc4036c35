"""`row_lse` as an operator: opcheck, torch.compile, and the kernels' own launch options."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import TRITON_DEVICE, assert_close, run, unit
from helpers import high_precision as high_precision
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill.ops.row_lse import (
    chunked,
    launch,
    row_lse,
    row_lse_grad_keys_op,
    row_lse_op,
    triton_grad_keys,
    triton_kernels,
)

LAUNCH = launch.Launch(BN=32, BM=16, warps=4, stages=2, resident=1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("offset", [None, 1])
def test_opcheck(mask, offset):
    query, keys = unit(2, 6, 4, seed=1).requires_grad_(), unit(2, 7, 4, seed=2).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    key_mask = torch.arange(14).view(2, 7) % 3 > 0 if mask else None
    for weighted_keys in (True, False):
        torch.library.opcheck(
            row_lse_op,
            (query, keys, None, scale, key_mask, offset, 4.0, "torch", weighted_keys),
            test_utils=("test_schema", "test_faketensor")
            if not weighted_keys
            else (
                "test_schema",
                "test_faketensor",
                "test_autograd_registration",
                "test_aot_dispatch_dynamic",
            ),
        )
    plain = [x.detach() for x in (query, keys, scale)]
    lse = row_lse_op(*plain[:2], None, plain[2], key_mask, offset, None, "torch", False)[0]
    torch.library.opcheck(
        row_lse_grad_keys_op,
        (torch.ones(2, 6).double(), *plain[:2], None, plain[2], key_mask, offset, lse, "torch"),
    )


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("keys_grad", [False, True])
def test_compiles_whole_and_once_for_all_sizes(counter, keys_grad):
    def function(query, keys, scale, mask):
        return row_lse(query, keys, scale, key_mask=mask, exclude_offset=0).sum()

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 6, 9, 14):
        query = unit(2, rows, 4, seed=rows).requires_grad_()
        keys = unit(2, rows + 3, 4, seed=rows + 1).requires_grad_(keys_grad)
        scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        mask = torch.arange(rows + 3) % 4 > 0
        results = []
        for f in (function, compiled):
            inputs = [query, scale, keys] if keys_grad else [query, scale]
            loss = f(query, keys, scale, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
        for eager, ours in zip(*results, strict=True):
            assert_close(ours, eager, 1e-14)
    assert counter.frame_count == 1


def test_compiled_with_a_number_as_scale_and_under_autocast(counter):
    compiled = torch.compile(row_lse, backend=counter, fullgraph=True)
    query, keys = unit(9, 8, seed=1).float().requires_grad_(), unit(11, 8, seed=2).float()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected, ours = row_lse(query, keys, 5.0), compiled(query, keys, 5.0)
        assert torch.equal(ours, expected)
        grads = [torch.autograd.grad(x.sum(), query)[0] for x in (ours, expected)]
        assert torch.equal(*grads)


# --- The kernels with every split and flag, where the launcher alone would not choose them ---------


def problem(groups=2, rows=37, columns=83, width=24, dtype=torch.float32):
    query = unit(groups, rows, width, seed=1, dtype=dtype).to(TRITON_DEVICE)
    keys = unit(groups, columns, width, seed=2, dtype=dtype).to(TRITON_DEVICE)
    scale = torch.tensor(5.0, device=TRITON_DEVICE)
    mask = torch.rand(groups, columns, generator=torch.Generator().manual_seed(3)) > 0.4
    return query, keys, scale, mask.to(TRITON_DEVICE)


def exactly(query, keys, scale, mask, offset):
    arguments = (query.double().cpu(), keys.double().cpu(), scale.double().cpu())
    mask = None if mask is None else mask.cpu()
    return chunked.row_lse(
        *arguments, mask, offset, subtract_max=True, with_weighted_keys=True, with_max=True
    )


@pytest.mark.parametrize("splits", [1, 2, 3, 50])
@pytest.mark.parametrize("subtract_max", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 0, -30, 40, 1000])
def test_kernel_variants(splits, subtract_max, masked, offset):
    query, keys, scale, mask = problem()
    mask = mask if masked else None
    arguments = (query, keys, scale, mask, offset)
    variant = partial(
        triton_kernels.row_lse, subtract_max=subtract_max, splits=splits, launch=LAUNCH
    )
    results = variant(*arguments, with_weighted_keys=True, with_max=True)
    tolerance = 2e-6 if TRITON_DEVICE == "cpu" else 2e-3
    for ours, truth in zip(results, exactly(*arguments), strict=True):
        assert_close(ours, truth, tolerance)
    bare = variant(*arguments, with_weighted_keys=False, with_max=False)
    assert bare[1:] == (None, None)
    assert_close(bare[0], results[0], 1e-6)


def test_tiles_that_need_tests_are_read_in_parts():
    arguments = (*problem()[:3], None, 0)
    ours = triton_kernels.row_lse(
        *arguments, subtract_max=True, with_weighted_keys=True, with_max=True, splits=1,
        launch=LAUNCH._replace(BM=64),
    )  # fmt: skip
    for part, truth in zip(ours, exactly(*arguments), strict=True):
        assert_close(part, truth, 2e-6 if TRITON_DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keys_gradient_variants(splits, masked, offset, dtype):
    query, keys, scale, mask = problem(dtype=dtype)
    mask = mask if masked else None
    lse = exactly(query, keys, scale, mask, offset)[0]
    lse[0, 3] = -torch.inf  # as a row without keys: no probability, whatever its logits
    grad = torch.linspace(0.0, 1.0, 74).view(2, 37)
    ours = triton_grad_keys.row_lse_grad_keys(
        grad.to(TRITON_DEVICE),
        query,
        keys,
        scale,
        mask,
        offset,
        lse.float().to(TRITON_DEVICE),
        splits=splits,
        launch=LAUNCH,
    )
    cpu = [x.double().cpu() for x in (query, keys, scale)]
    truth = chunked.row_lse_grad_keys(
        grad.double(), *cpu, None if mask is None else mask.cpu(), offset, lse
    )
    assert ours.dtype == dtype
    float32 = 3e-3 if TRITON_DEVICE == "cuda" else 2e-6  # TF32
    tolerances = {torch.float32: float32, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    assert_close(ours, truth, tolerances[dtype])


def test_a_split_that_sees_no_key_of_a_row_joins_as_nothing():
    query, keys, scale, mask = problem()
    mask[:, 16:] = False  # with tiles of 16 keys, only the first split has any
    mask[1] = False
    results = triton_kernels.row_lse(
        query,
        keys,
        scale,
        mask,
        None,
        subtract_max=True,
        with_weighted_keys=True,
        with_max=True,
        splits=3,
        launch=LAUNCH,
    )
    for ours, truth in zip(results, exactly(query, keys, scale, mask, None), strict=True):
        assert_close(ours, truth, 2e-6 if TRITON_DEVICE == "cpu" else 2e-3)
    assert torch.equal(results[1][1].cpu(), torch.zeros(37, 24))


@pytest.mark.parametrize("width", [1, 3, 16, 17, 31, 64, 100, 128])
def test_every_width_is_padded_to_a_tile(width):
    query, keys, scale, _ = problem(groups=1, rows=5, columns=9, width=width)
    results = triton_kernels.row_lse(
        query, keys, scale, None, None, subtract_max=True, with_weighted_keys=True, with_max=True
    )
    assert results[1].shape == (1, 5, width)
    for ours, truth in zip(results, exactly(query, keys, scale, None, None), strict=True):
        assert_close(ours, truth, 2e-6 if TRITON_DEVICE == "cpu" else 2e-3)


def test_medium_precision_multiplies_in_bfloat16():
    query, keys, scale, _ = problem()
    torch.set_float32_matmul_precision("medium")  # the fixture restores it
    value = row_lse(query, keys, float(scale), backend="triton")
    rounded = row_lse(query.bfloat16(), keys.bfloat16(), float(scale), backend="triton")
    assert_close(value, rounded, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("subtract_max", [False, True])
def test_streaming_form_with_half_operands(dtype, subtract_max, monkeypatch):
    """What a GPU does with wide half-precision features, run here on the CPU."""
    monkeypatch.setattr(chunked, "_operand_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(chunked, "_CPU_BLOCK", (16, 32))
    query, keys, scale, mask = (x.cpu() for x in problem(width=40, dtype=dtype))
    query, scale = 64 * query, scale / 64  # so that small gradients of the keys stay normal numbers
    options = {"subtract_max": subtract_max, "with_weighted_keys": True, "with_max": True}
    ours = chunked.row_lse(query, keys, scale, mask, 2, **options)
    truth = exactly(query, keys, scale, mask, 2)
    tolerance = 3e-3 if dtype == torch.float16 else 2e-2
    for part, right in zip(ours, truth, strict=True):
        assert_close(part, right, tolerance)
    grad = torch.linspace(0.0, 2e-5, 74).view(2, 37)  # times a probability: nothing in float16
    arguments = (query, keys, scale, mask, 2)
    grad_keys = chunked.row_lse_grad_keys(grad, *arguments, truth[0].float())
    monkeypatch.undo()
    right = chunked.row_lse_grad_keys(
        grad.double(), *(x.double() for x in arguments[:3]), mask, 2, truth[0]
    )
    assert_close(grad_keys, right, 2 * tolerance)


def test_unwritten_outputs_would_show(monkeypatch):
    """Every output element is written: fresh memory is filled with NaN."""
    original = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        fresh = original(self, *args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **o: torch.full_like(x, torch.nan, **o))
    query, keys, scale, mask = problem()
    options = {"subtract_max": False, "with_weighted_keys": True, "with_max": True}
    fused = triton_kernels.row_lse(query, keys, scale, mask, 0, **options, splits=2, launch=LAUNCH)
    streamed = chunked.row_lse(query, keys, scale, mask, 0, **options)
    for part in (*fused, *streamed):
        assert not part.isnan().any()


def test_offsets_have_sixty_four_bits(tmp_path):
    """Also those of outputs, which no test could fill beyond 2^31."""
    narrow = run("tests/offsets.py", "row_lse", env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert narrow == ""


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90"),
     ((12, 0), "sm_80")],
)  # fmt: skip
def test_small_shared_memory_takes_the_small_table(capability, table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for width in (16, 64, 128, 256):
        chosen = launch.launch_of(torch.device("cuda"), torch.bfloat16, width)
        assert chosen == launch.LAUNCH[table][max(64, width)]
    assert launch.launch_of(torch.device("cpu"), torch.float16, 64) == launch.LAUNCH["sm_90"][64]


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [(1, 1024, 64), (4, 512, 64), (49, 512, 5), (98, 1024, 8), (256, 256, 1), (264, 1000, 1),
     (265, 1000, 10), (300, 1000, 7), (4, 7, 1), (4, 16, 2), (0, 10, 1), (3, 0, 1)],
)  # fmt: skip
def test_splits_fill_whole_waves(programs, tiles, splits, monkeypatch):
    """On a GPU of 132 multiprocessors with two programs each."""
    facts = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    each = launch.Launch(64, 64, 4, 2, resident=2)
    got, per_split = launch.splits_of(programs, tiles, each, torch.device("cuda"))
    assert per_split == -(-max(1, tiles) // splits)
    assert got == -(-max(1, tiles) // per_split)


def test_splits_share_all_tiles_and_none_is_empty():
    sizes = itertools.product((0, 1, 3), (0, 1, 6, 7, 8), (None, 1, 2, 3, 4, 50))
    for programs, tiles, asked in sizes:
        splits, each = launch.splits_of(programs, tiles, LAUNCH, torch.device("cpu"), asked)
        assert (splits - 1) * each < max(1, tiles) <= splits * each
        assert asked is None or splits <= asked


@pytest.mark.cuda
@pytest.mark.skipif(TRITON_DEVICE != "cuda", reason="needs a CUDA GPU")
def test_graph_capture():
    """Forward and backward in a CUDA graph: no synchronisation, no size that depends on data."""
    query = unit(300, 64, seed=1, dtype=torch.bfloat16).cuda().requires_grad_()
    keys = unit(900, 64, seed=2, dtype=torch.bfloat16).cuda()

    def step():
        return torch.autograd.grad(row_lse(query, keys, 5.0, logit_bound=5.0).mean(), query)[0]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


# --- The Hopper kernel ----------------------------------------------------------------------------


def test_the_ring_of_the_hopper_kernel_is_long_enough():
    """A consumer waits for the second tile behind one before it releases it: two slots deadlock."""
    assert all(tile.stages >= 3 for tile in launch.HOPPER_LAUNCH.values())


def hopper_case(**changed):
    """A call that the Hopper kernel takes, on a device that says it is a Hopper GPU."""
    query = torch.empty(1, 8, 64, dtype=torch.bfloat16)
    case = {"query": query, "keys": query, "key_mask": None, "scale": 5.0}
    return case | {"subtract_max": False, "with_weighted_keys": True, "with_max": False} | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "it needs a Hopper GPU"),
        ({"query": torch.empty(1, 8, 64)}, "float16"),
        ({"key_mask": torch.ones(1, 8, dtype=torch.bool)}, "mask"),
        ({"labels": (torch.zeros(1, 8),) * 2}, "no labels"),
        ({"scale": torch.tensor(5.0)}, "learned"),
        ({"subtract_max": True}, "maximum"),
        ({"with_max": True}, "maximum"),
        ({"keys": torch.empty(1, 0, 64, dtype=torch.bfloat16)}, "there must be a key"),
        ({"query": torch.empty(1, 8, 32, dtype=torch.bfloat16)}, "33 to 256"),
        ({"query": torch.empty(1, 8, 60, dtype=torch.bfloat16)}, "16 bytes"),
        ({"keys": torch.empty(1, 64, 8, dtype=torch.bfloat16).mT}, "16 bytes"),
    ],
)
def test_the_hopper_kernel_says_what_it_does_not_take(changed, reason, monkeypatch):
    case = hopper_case(**changed)
    if changed:  # as on a Hopper GPU
        monkeypatch.setattr(launch, "_is_hopper", lambda device: True)
    assert reason in launch.why_not_hopper(**case)


def test_a_triton_that_spills_keeps_to_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(launch, "_is_hopper", lambda device: True)
    wide = torch.empty(1, 8, 96, dtype=torch.bfloat16)
    for version, taken in (((3, 7), True), ((3, 8), False), ((4, 0), False)):
        monkeypatch.setattr(launch, "_triton_version", lambda version=version: version)
        assert launch.why_not_hopper(**hopper_case()) is None
        reason = launch.why_not_hopper(**hopper_case(query=wide, keys=wide))
        assert (reason is None) == taken


def test_an_environment_variable_keeps_to_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(launch, "_is_hopper", lambda device: True)
    assert launch.why_not_hopper(**hopper_case()) is None
    monkeypatch.setenv("PIXDISTILL_HOPPER", "0")
    assert launch.why_not_hopper(**hopper_case()) == "PIXDISTILL_HOPPER=0"


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [40, 64, 128, 136, 256])
@pytest.mark.parametrize("exclude_offset", [None, 0, -70, 100])
@pytest.mark.parametrize(
    ("groups", "rows", "columns", "splits"),
    [(1, 1, 1, 1), (1, 257, 1000, 3), (2, 130, 129, 1), (1, 500, 5003, None)],
)
def test_the_hopper_kernel_equals_the_portable_one(
    groups, rows, columns, splits, exclude_offset, width, dtype
):
    query, keys = (unit(groups, n, width, seed=n).to("cuda", dtype) for n in (rows, columns))
    options = {"subtract_max": False, "with_weighted_keys": True, "with_max": False}
    results = [
        triton_kernels.row_lse(
            query, keys, 5.0, None, exclude_offset, splits=splits, hopper=hopper, **options
        )
        for hopper in (True, True, False)
    ]
    for ours, again, portable in zip(*results, strict=True):
        if ours is not None:
            assert torch.equal(ours, again)
            torch.testing.assert_close(ours, portable, atol=2e-2, rtol=1e-4)
    assert (results[0][0] - results[2][0]).nan_to_num(0.0).abs().max() < 2e-5
