"""`row_lse` on every backend: values, gradients, properties and edges."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    assert_close,
    assert_within_budget,
    dense_row_lse,
    device_of,
    float32_tolerance,
    launches,
    matmul_precision,
    unit,
)
from helpers import high_precision as high_precision
from hypothesis import given
from hypothesis import strategies as st

from pixdistill.ops.backend import sum_dtype, why_no_kernel
from pixdistill.ops.row_lse import (
    attention,
    chunked,
    reference,
    row_lse,
    row_lse_forward,
    triton_kernels,
)
from pixdistill.ops.row_lse.launch import Launch

FAST = ("torch", "triton")
FLOAT32 = {
    "reference": 1e-6,
    "torch": 2e-6,
    "triton": 2e-6 if device_of("triton") == "cpu" else 2e-3,
}


def max_logit(backend, query, keys, scale, key_mask=None, exclude_offset=None, logit_bound=None):
    """The largest logit of each query, from the pass without autograd."""
    if backend == "reference":
        return reference.row_lse(query, keys, scale, key_mask, exclude_offset)[1]
    of_mask = () if key_mask is None else key_mask.shape[:-1]
    batch = torch.broadcast_shapes(query.shape[:-2], keys.shape[:-2], of_mask)
    flat = [
        x.expand(*batch, *x.shape[-2:]).flatten(0, -3) if batch else x[None] for x in (query, keys)
    ]
    if key_mask is not None:
        key_mask = key_mask.expand(*batch, -1).flatten(0, -2) if batch else key_mask[None]
    scale = scale.to(sum_dtype(query))
    options = {"logit_bound": logit_bound, "with_max": True, "backend": backend}
    found = row_lse_forward(*flat, scale, key_mask, exclude_offset, **options)[2]
    return found.view(*batch, query.shape[-2])


def call(backend, query, keys, scale, *, grad_keys=False, cotangent=None, **options):
    """Value, largest logit and gradients (query, scale, keys) of one backend, on its own device."""
    device = device_of(backend)
    query = query.detach().to(device).requires_grad_()
    keys = keys.detach().to(device).requires_grad_(grad_keys)
    scale = torch.tensor(scale, dtype=torch.float64, device=device, requires_grad=True)
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"].to(device)
    value = row_lse(query, keys, scale, backend=backend, **options)
    largest = max_logit(backend, query.detach(), keys.detach(), scale.detach(), **options)
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=device)
    if cotangent is not None:
        weights = cotangent.to(device, value.dtype).flatten()
    live = value.flatten().masked_fill(value.flatten() == -torch.inf, 0.0)
    inputs = [query, scale, keys] if grad_keys else [query, scale]
    grads = torch.autograd.grad((live * weights).sum(), inputs)
    return value.detach().cpu(), largest.cpu(), [g.cpu() for g in grads]


def truth(query, keys, scale, key_mask=None, exclude_offset=None):
    """The same by the row-by-row float64 form, for inputs without batch axes."""
    query = query.detach().double().requires_grad_()
    keys = keys.detach().double().requires_grad_()
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    value = dense_row_lse(query, keys, scale, key_mask, exclude_offset)
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=torch.float64)
    live = value.masked_fill(value == -torch.inf, 0.0)
    grads = torch.autograd.grad((live * weights).sum(), [query, scale, keys], allow_unused=True)
    filled = [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(grads, (query, scale, keys), strict=True)
    ]
    return value.detach(), filled


SIZES = [(1, 1, 1), (7, 123, 5), (123, 7, 24), (65, 131, 16), (37, 252, 64)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 0, -3, 20])
@pytest.mark.parametrize("bound", [None, 5.0])
def test_equals_dense_truth(backend, size, masked, offset, bound):
    rows, columns, width = size
    if backend == "triton" and size == SIZES[-1] and (masked or offset == -3):
        columns = 64  # the interpreter is slow
    query, keys = unit(rows, width, seed=1), unit(columns, width, seed=2)
    mask = torch.rand(columns, generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    expected, expected_grads = truth(query, keys, 5.0, mask, offset)
    value, _, grads = call(
        backend,
        query.float(),
        keys.float(),
        5.0,
        key_mask=mask,
        exclude_offset=offset,
        logit_bound=bound,
        grad_keys=True,
    )
    assert value.dtype == torch.float32
    assert_close(value, expected, FLOAT32[backend])
    for ours, right in zip(grads, expected_grads, strict=True):
        assert (ours - right).norm() <= 5 * FLOAT32[backend] * right.norm() + 1e-6


@pytest.mark.parametrize("block", [(5, 7), (64, 16)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 0, -20, 13])
@pytest.mark.parametrize("bound", [None, 5.0])
def test_blocks_join_exactly(block, masked, offset, bound, monkeypatch):
    """The streaming form over many blocks of groups, queries and keys, none of which divides evenly."""
    query, keys = unit(3, 33, 6, seed=1), unit(3, 50, 6, seed=2)
    keys[..., 40:, :] *= 1 if bound else 3  # the maximum moves late, past the first blocks
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    if masked:
        mask[1] = False
    options = {"key_mask": mask, "exclude_offset": offset, "logit_bound": bound, "grad_keys": True}
    expected = call("reference", query, keys, 5.0, **options)
    monkeypatch.setattr(chunked, "_CPU_BLOCK", block)
    monkeypatch.setattr(attention, "fits", lambda *_: False)
    if masked:
        keys = keys.masked_fill(~mask.unsqueeze(-1), torch.nan)
    ours = call("torch", query, keys, 5.0, **options)
    for part, right in zip((*ours[:2], *ours[2]), (*expected[:2], *expected[2]), strict=True):
        assert_close(part, right, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_stays_float64(backend):
    query, keys = unit(33, 9, seed=1), unit(70, 9, seed=2)
    expected, expected_grads = truth(query, keys, 5.0, exclude_offset=0)
    value, _, grads = call(backend, query, keys, 5.0, exclude_offset=0, grad_keys=True)
    assert value.dtype == torch.float64
    assert_close(value, expected, 1e-14)
    for ours, right in zip(grads, expected_grads, strict=True):
        assert_close(ours, right, 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.07])
def test_error_stays_within_twice_plain_pytorch(backend, dtype, temperature):
    """Forward, query gradient and key gradient against the float64 truth of the same inputs."""
    query, keys = unit(61, 32, seed=1, dtype=dtype), unit(200, 32, seed=2, dtype=dtype)
    scale = 1 / temperature
    expected, expected_grads = truth(query, keys, scale)
    plain_query, plain_keys = query.clone().requires_grad_(), keys.clone().requires_grad_()
    plain = (scale * (plain_query @ plain_keys.T)).logsumexp(dim=1)
    weights = torch.linspace(1.0, 2.0, 61, dtype=dtype)
    plain_grads = torch.autograd.grad((plain * weights).sum(), [plain_query, plain_keys])
    value, _, grads = call(backend, query, keys, scale, logit_bound=scale, grad_keys=True)
    tiny = 1e-6 if dtype == torch.float32 else 1e-4
    if backend == "triton" and dtype == torch.float32 and device_of(backend) == "cuda":
        tiny = float32_tolerance(backend)
    assert grads[0].dtype == dtype
    assert grads[2].dtype == dtype
    assert_within_budget(value, plain, expected, tiny)
    assert_within_budget(grads[0], plain_grads[0], expected_grads[0], tiny)
    assert_within_budget(grads[2], plain_grads[1], expected_grads[2], tiny)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_survive_tiny_cotangents(backend, dtype):
    """Mean over many pixels: probability times gradient lies far below float16's smallest number."""
    query, keys = unit(40, 32, seed=1, dtype=dtype), unit(150, 32, seed=2, dtype=dtype)
    tiny = torch.full((40,), 1e-4)
    _, _, grads = call(backend, query, keys, 5.0, grad_keys=True, cotangent=tiny)
    exact = [
        g.double()
        for g in call("torch", query.double(), keys.double(), 5.0, grad_keys=True, cotangent=tiny)[
            2
        ]
    ]
    # compared where float16 can hold the result at all
    holds = exact[2].abs() > (6e-5 if dtype == torch.float16 else 0)
    assert ((grads[2].double() - exact[2]).abs()[holds] <= 0.02 * exact[2].abs().max()).all()
    assert (grads[2].double() - exact[2]).norm() <= 0.02 * exact[2].norm() + 1e-6


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_probability_times_gradient_is_not_made_in_float16(backend, dtype):
    """Keys in float32 have a gradient that can show it: in float16 these products are all zero."""
    query = unit(40, 32, seed=1, dtype=dtype)
    keys = unit(150, 32, seed=2, dtype=dtype).float()
    tiny = torch.full((40,), 1e-7)
    _, _, grads = call(backend, query, keys, 5.0, grad_keys=True, cotangent=tiny)
    exact = call("torch", query.double(), keys.double(), 5.0, grad_keys=True, cotangent=tiny)[2]
    assert_close(grads[2], exact[2], 2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [None, "given"])
@pytest.mark.parametrize("scale", [5.0, 8.9, 14.3, 59.0, 300.0])
def test_range_of_both_maxima(backend, dtype, bound, scale):
    """Logits at both ends of the bound at once: nothing overflows, nothing is lost."""
    axis = torch.zeros(1, 16, dtype=dtype)
    axis[0, 0] = 1.0
    query = torch.cat([axis, -axis, axis * 0])
    keys = torch.cat([axis, -axis, -axis]) if bound is None else torch.cat([-axis, -axis, axis])
    limit = scale if bound == "given" else None
    expected, expected_grads = truth(query, keys, scale)
    value, _, grads = call(backend, query, keys, scale, logit_bound=limit)
    assert_close(
        value, expected, 1e-6 if backend != "triton" or device_of(backend) == "cpu" else 1e-3
    )
    assert_close(grads[0], expected_grads[0], 2e-2 if dtype != torch.float32 else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 5, 8), (7, 8), None),
        ((2, 5, 8), (2, 7, 8), (2, 7)),
        ((5, 8), (3, 7, 8), (7,)),
        ((4, 1, 5, 8), (3, 7, 8), None),
        ((4, 2, 5, 8), (4, 1, 7, 8), (7,)),
        ((2, 5, 8), (7, 8), (2, 7)),
        ((2, 1, 5, 8), (2, 1, 7, 8), (1, 3, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [None, 1])
def test_batch_axes_broadcast(backend, shapes, offset):
    query, keys = unit(*shapes[0], seed=1), unit(*shapes[1], seed=2)
    generator = torch.Generator().manual_seed(3)
    mask = None if shapes[2] is None else torch.rand(*shapes[2], generator=generator) > 0.3
    value, largest, grads = call(
        backend,
        query.float(),
        keys.float(),
        3.0,
        key_mask=mask,
        exclude_offset=offset,
        grad_keys=True,
    )

    batch = torch.broadcast_shapes(
        shapes[0][:-2], shapes[1][:-2], () if mask is None else mask.shape[:-1]
    )
    q, k = query.clone().requires_grad_(), keys.clone().requires_grad_()
    all_q, all_k = q.expand(*batch, *q.shape[-2:]), k.expand(*batch, *k.shape[-2:])
    all_m = None if mask is None else mask.expand(*batch, mask.shape[-1])
    expected = torch.empty(*batch, q.shape[-2], dtype=torch.float64)
    for index in itertools.product(*map(range, batch)):
        part = None if all_m is None else all_m[index]
        expected[index] = dense_row_lse(all_q[index], all_k[index], 3.0, part, offset)
    weights = torch.linspace(1.0, 2.0, expected.numel(), dtype=torch.float64).view(expected.shape)
    live = expected.masked_fill(expected == -torch.inf, 0.0)
    right = torch.autograd.grad((live * weights).sum(), [q, k])
    assert value.shape == expected.shape == largest.shape
    assert_close(value, expected, FLOAT32[backend])
    assert_close(grads[0], right[0], 10 * FLOAT32[backend])
    assert_close(grads[2], right[1], 10 * FLOAT32[backend])


def test_shared_keys_are_never_copied(monkeypatch):
    """One bank for a batch, and one bank with a mask per batch entry, reach the kernel in place."""
    seen = []
    original = chunked.row_lse

    def spy(query, keys, *args, **options):
        seen.append(keys)
        return original(query, keys, *args, **options)

    monkeypatch.setattr(chunked, "row_lse", spy)
    bank = unit(50, 8, dtype=torch.float32)
    row_lse(unit(6, 3, 4, 8, dtype=torch.float32), bank, 1.0)
    row_lse(unit(6, 4, 8, dtype=torch.float32), bank, 1.0, key_mask=torch.ones(6, 50).bool())
    row_lse(unit(6, 4, 8, dtype=torch.float32), bank, 1.0, exclude_offset=0)
    row_lse(unit(6, 4, 8, dtype=torch.float32), bank.unsqueeze(0), 1.0, exclude_offset=0)
    assert [(len(keys), keys.data_ptr()) for keys in seen] == [(1, bank.data_ptr())] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_strided_inputs_equal_contiguous_ones(backend, masked):
    query, keys = unit(2, 8, 16, seed=1).float(), unit(2, 30, 16, seed=2).float()
    mask = torch.arange(60).view(2, 30) % 3 > 0 if masked else None
    expected = call(backend, query, keys, 4.0, key_mask=mask, grad_keys=True)
    forms = {
        "channels first": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2],
        "padded rows": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
        "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    wide_mask = torch.stack([mask, ~mask], dim=2).flatten(1)[:, ::2] if masked else None
    for name, form in forms.items():
        assert not form(query).is_contiguous(), name
        ours = call(backend, form(query), form(keys), 4.0, key_mask=wide_mask, grad_keys=True)
        assert_close(ours[0], expected[0], 1e-6)
        for a, b in zip(ours[2], expected[2], strict=True):
            assert_close(a, b, 2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_32_bits(backend):
    """Views that reach beyond 2^31 elements along each axis; untouched pages cost no memory."""
    big = torch.empty(600 * 2**22, dtype=torch.bfloat16, device=device_of(backend))
    query = unit(3, 9, 16, seed=1, dtype=torch.bfloat16).to(big.device)

    def equal_to_contiguous(view):
        near = unit(*view.shape, seed=2, dtype=torch.bfloat16).to(big.device)
        view.copy_(near)
        rows = query if view.dim() == 3 else query[0]
        for pair in ((rows, near, rows, view), (near, rows, view, rows)):
            ours, far = (row_lse(*both, 5.0, backend=backend) for both in (pair[:2], pair[2:]))
            assert_close(far, ours, 1e-6)

    equal_to_contiguous(big.as_strided((3, 20, 16), (2**30, 16, 1)))  # groups
    equal_to_contiguous(big.as_strided((600, 16), (2**22, 1)))  # rows, tile by tile
    equal_to_contiguous(big.as_strided((3, 16), (2**30, 1)))  # rows inside a tile
    equal_to_contiguous(big.as_strided((5, 16), (1, 2**27)))  # features


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_at_all(backend):
    device = device_of(backend)
    query = unit(3, 8, dtype=torch.float32).to(device).requires_grad_()
    empty = row_lse(query, query.new_empty(0, 8), 2.0, backend=backend)
    assert torch.equal(empty.cpu(), torch.full((3,), -torch.inf))
    hidden = torch.zeros(5, dtype=torch.bool, device=device)
    keys = torch.randn(5, 8, device=device, requires_grad=True)
    none = row_lse(query, keys, 2.0, key_mask=hidden, backend=backend)
    largest = max_logit(backend, query.detach(), keys.detach(), query.new_tensor(2.0), hidden)
    assert torch.equal(none.cpu(), torch.full((3,), -torch.inf))
    assert torch.equal(largest.cpu(), torch.full((3,), -torch.inf))
    loss = torch.nn.functional.softplus(none).sum() + torch.nn.functional.softplus(empty).sum()
    loss.backward()
    assert torch.equal(query.grad.cpu(), torch.zeros(3, 8))
    assert torch.equal(keys.grad.cpu(), torch.zeros(5, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_at_all(backend):
    device = device_of(backend)
    query = torch.empty(2, 0, 8, device=device, requires_grad=True)
    keys = torch.randn(2, 5, 8, device=device, requires_grad=True)
    value = row_lse(query, keys, 2.0, backend=backend)
    largest = max_logit(backend, query.detach(), keys.detach(), torch.tensor(2.0))
    assert value.shape == largest.shape == (2, 0)
    value.sum().backward()
    assert query.grad.shape == (2, 0, 8)
    assert torch.equal(keys.grad.cpu(), torch.zeros(2, 5, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_logit_sees_neither_mask_nor_diagonal(backend):
    keys = unit(20, 8, seed=5).float()
    query = keys[:12].clone()  # the excluded key would win
    mask = torch.arange(20) % 4 != 3
    _, largest, _ = call(backend, query, keys, 5.0, key_mask=mask, exclude_offset=0)
    logits = 5.0 * query.double() @ keys.double().T
    logits[:, ~mask] = -torch.inf
    logits.fill_diagonal_(-torch.inf)
    assert_close(largest, logits.amax(dim=1), FLOAT32[backend])
    _, bounded, _ = call(
        backend, query, keys, 5.0, key_mask=mask, exclude_offset=0, logit_bound=5.0
    )
    assert_close(bounded, logits.amax(dim=1), FLOAT32[backend])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [None, 5.0])
def test_nan_shows_unless_hidden(backend, bound):
    keys = unit(9, 8, seed=1).float()
    keys[4] = torch.nan
    query = unit(5, 8, seed=2).float()
    device = device_of(backend)
    shown = row_lse(query.to(device), keys.to(device), 5.0, logit_bound=bound, backend=backend)
    assert shown.isnan().all()
    mask = torch.arange(9) != 4
    hidden, _, grads = call(
        backend,
        query,
        keys,
        5.0,
        key_mask=mask,
        logit_bound=bound,
        grad_keys=backend != "reference",
    )
    expected, expected_grads = truth(query, keys[mask], 5.0)
    if backend != "reference":  # dense autograd multiplies the hidden NaN by zero
        assert_close(hidden, expected, FLOAT32[backend])
        assert_close(grads[0], expected_grads[0], 10 * FLOAT32[backend])
        assert_close(grads[2][mask], expected_grads[2], 10 * FLOAT32[backend])
        assert torch.equal(grads[2][4], torch.zeros(8))


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_twice(backend):
    query, keys = unit(70, 16, seed=1).float(), unit(90, 16, seed=2).float()
    one, two = (call(backend, query, keys, 5.0, grad_keys=True) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[2], two[2], strict=True))


def test_gradcheck():
    query = unit(2, 6, 3, seed=1).requires_grad_()
    keys = unit(7, 3, seed=2).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True, False])
    for backend, offset, bound in itertools.product(
        ("reference", "torch"), (None, 0, 2), (None, 9.0)
    ):
        assert torch.autograd.gradcheck(
            lambda q, k, s, o=offset, m=bound, b=backend: row_lse(
                q, k, s, key_mask=mask, exclude_offset=o, logit_bound=m, backend=b
            ),
            (query, keys, scale),
        )


@pytest.mark.parametrize("backend", FAST)
def test_second_order_raises_and_reference_is_right(backend):
    device = device_of(backend)
    keys = unit(7, 4, seed=2).float().to(device)
    query = unit(5, 4, seed=1).float().to(device).requires_grad_()
    (grad,) = torch.autograd.grad(
        row_lse(query, keys, 2.0, backend=backend).sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.square().sum().backward()
    double = query.detach().cpu().double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda q: row_lse(q, keys.cpu().double(), 2.0, backend="reference"), (double,)
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_raises_and_reference_is_right():
    query, keys = unit(5, 4, seed=1), unit(7, 4, seed=2)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.jvp(lambda q: row_lse(q, keys, 2.0), (query,), (query,))
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.jvp(lambda k: row_lse(query, k, 2.0), (keys,), (keys,))
    _, tangent = torch.func.jvp(
        lambda q: row_lse(q, keys, 2.0, backend="reference"), (query,), (query,)
    )
    step = 1e-6
    ends = [row_lse(query * (1 + s), keys, 2.0) for s in (step, -step)]
    assert_close(tangent, (ends[0] - ends[1]) / (2 * step), 1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_nothing_is_computed_for_a_gradient_that_nobody_wants(backend, monkeypatch):
    if backend == "torch":
        module = chunked
    else:
        from pixdistill.ops.row_lse import triton_kernels as module
    asked = []
    original = module.row_lse

    def spy(*args, **options):
        asked.append(options["with_weighted_keys"])
        return original(*args, **options)

    monkeypatch.setattr(module, "row_lse", spy)
    device = device_of(backend)
    frozen, live = (
        torch.randn(4, 8, device=device),
        torch.randn(4, 8, device=device, requires_grad=True),
    )
    row_lse(frozen, frozen, 1.0, backend=backend)
    with torch.no_grad():
        row_lse(live, frozen, 1.0, backend=backend)
    row_lse(frozen, live, 1.0, backend=backend)  # the keys' gradient is a pass of its own
    row_lse(live, frozen, 1.0, backend=backend)
    row_lse(frozen, frozen, torch.ones((), device=device, requires_grad=True), backend=backend)
    assert asked == [False, False, False, True, True]


@pytest.mark.parametrize("backend", FAST)
def test_frozen_keys_are_not_kept(backend):
    """So that a queue may be overwritten between forward and backward."""
    query, keys = (unit(n, 16, seed=n).float().to(device_of(backend)) for n in (5, 64))
    value = row_lse(query.requires_grad_(), keys, 3.0, backend=backend).sum()
    (expected,) = torch.autograd.grad(value, query, retain_graph=True)
    keys.zero_()
    assert torch.equal(torch.autograd.grad(value, query)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_a_matrix_product(dtype):
    query, keys = unit(20, 16, seed=1).float().requires_grad_(), unit(40, 16, seed=2).float()
    with torch.autocast("cpu", dtype=dtype):
        value = row_lse(query, keys, 14.0)
    explicit = row_lse(query.detach().to(dtype).requires_grad_(), keys, 14.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, explicit)
    value.sum().backward()
    assert query.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert row_lse(query.double(), keys, 14.0).dtype == torch.float64


def test_backward_inside_autocast_is_as_exact_as_outside():
    query, keys = unit(20, 16, seed=1).float(), unit(40, 16, seed=2).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = row_lse(query, keys, 14.0).sum()
        (inside,) = torch.autograd.grad(loss, keys, retain_graph=True)
    (outside,) = torch.autograd.grad(loss, keys)
    assert torch.equal(inside, outside)


# --- The faster forms beside the blocks ------------------------------------------------------------


def problem_3d(shared=False, dtype=torch.float64, keys_like_queries=0.0):
    query, keys = unit(3, 45, 6, seed=1), unit(1 if shared else 3, 60, 6, seed=2)
    keys[:, 7:52] += keys_like_queries * query[: len(keys)]  # key n + 7 is near query n
    mask = torch.rand(len(keys), 60, generator=torch.Generator().manual_seed(3)) > 0.4
    return query.to(dtype), keys.to(dtype), mask


def in_blocks(query, keys, scale, mask, offset, labels=None):
    return chunked._in_blocks(query, keys, scale, mask, offset, labels, True, True, True)


def labels_3d(shared):
    """Of 45 queries and 60 keys, some of them negative."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((3, 45), (shared, 60))
    return tuple(torch.randint(-2, 3, s, generator=generator, dtype=torch.int32) for s in shapes)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("subtract_max", [False, True])
def test_labels_in_blocks_and_splits(shared, subtract_max, monkeypatch):
    """Of PyTorch's form in float64 and of the kernel, against one matrix."""
    query, keys, mask = problem_3d(shared)
    labels = labels_3d(len(keys))
    same = (labels[0].unsqueeze(2) == labels[1].unsqueeze(1)) & (labels[0] >= 0).unsqueeze(2)
    mask = mask if shared else None  # labels alone are compared in every tile too
    hidden = same if mask is None else same | ~mask.unsqueeze(1)
    hidden.diagonal(7, dim1=1, dim2=2).fill_(True)
    logits = (5.0 * query @ keys.mT).masked_fill(hidden, -torch.inf)
    expected = logits.logsumexp(2), logits.softmax(2) @ keys, logits.amax(2)
    monkeypatch.setattr(chunked, "_CPU_BLOCK", (16, 32))
    device = device_of("triton")
    tensors = [x.to(device) for x in (query.float(), keys.float(), *labels)]
    on_device = None if mask is None else mask.to(device)
    kernel = triton_kernels.row_lse(
        *tensors[:2], 5.0, on_device, 7, tuple(tensors[2:]), subtract_max=subtract_max,
        with_weighted_keys=True, with_max=True, splits=2,
        launch=Launch(16, 32, 4, 1, resident=1, masked=32, labelled=16),
    )  # fmt: skip
    for ours, limit in (
        (in_blocks(query, keys, 5.0, mask, 7, labels), 1e-13),
        (kernel, float32_tolerance("triton")),
    ):
        for part, right in zip(ours, expected, strict=True):
            assert_close(part, right, limit)


@pytest.mark.parametrize("near", [0.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 7, 0, -44, -45, 59, 60, 30])
@pytest.mark.parametrize("rows", [1024, 16, 7])
def test_attention_operator_of_the_cpu(near, masked, offset, rows, monkeypatch):
    """`near`: excluded keys hold most of the probability, so that taking them out would cancel."""
    query, keys, mask = problem_3d(keys_like_queries=near)
    mask = mask if masked else None
    monkeypatch.setattr(attention, "_ROWS", rows)
    expected = in_blocks(query, keys, 9.0, mask, offset)
    for arguments in ((query, keys), (query.mT.contiguous().mT, keys.mT.contiguous().mT)):
        ours = attention.row_lse(*arguments, 9.0, mask, offset)
        for part, right in zip(ours, expected[:2], strict=True):
            assert part.is_contiguous()
            assert_close(part, right, 1e-13)
    if offset is not None:  # over the keys around the excluded ones
        monkeypatch.setattr(attention, "_take_out", lambda *_: None)
        ours = attention.row_lse(query, keys, 9.0, mask, offset)
        for part, right in zip(ours, expected[:2], strict=True):
            assert_close(part, right, 1e-13)


def test_keys_that_hold_all_the_probability_are_left_out_exactly():
    """In float32, where 1 - p would lose every digit."""
    query = unit(1, 40, 16, seed=1)
    keys = torch.cat([query, unit(1, 30, 16, seed=2)], dim=1)
    expected = in_blocks(query, keys, 80.0, None, 0)
    ours = attention.row_lse(query.float(), keys.float(), 80.0, None, 0)
    for part, right in zip(ours, expected[:2], strict=True):
        assert_close(part, right, 2e-6)


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_attention_operator_is_left_alone_where_it_lacks_something(threads, monkeypatch):
    """Work for each thread, and no size of zero, by which it divides."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query = torch.randn(2, 64, 8)  # two tiles of 32 queries each
    assert attention.fits(query, query) == (threads <= 4)
    assert not attention.fits(query[:, :0], query)
    assert not attention.fits(query, query[:, :0])
    assert not attention.fits(query.to("meta"), query.to("meta"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [None, 7])
@pytest.mark.parametrize("subtract_max", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_one_kernel_between_the_products(dtype, masked, offset, subtract_max, learned, monkeypatch):
    """What a GPU does with wide features, in blocks that divide nothing."""
    from pixdistill.ops.row_lse import exponentials

    device = device_of("triton")
    query, keys, mask = problem_3d(shared=learned, dtype=dtype)
    mask = mask if masked else None
    labels = None if offset is None else labels_3d(len(keys))
    wide = query.double(), keys.double(), 5.0, mask, offset
    expected, lse = in_blocks(*wide, labels), in_blocks(*wide)[0]
    rows = torch.linspace(0.0, 1.0, 135, dtype=torch.float64).view(3, 45)
    grad = chunked.row_lse_grad_keys(rows, *wide, lse)
    monkeypatch.setattr(chunked, "_fused", lambda query: exponentials)
    monkeypatch.setattr(chunked, "_operand_dtype", lambda tensor: tensor.dtype)
    block = (128, 32) if subtract_max else (16, 32)  # two batch entries, or part of one
    monkeypatch.setattr(chunked, "_CPU_BLOCK", block)
    monkeypatch.setattr(chunked, "_CUDA_BLOCK", block)
    scale = torch.tensor(5.0, device=device) if learned else 5.0
    mask = None if mask is None else mask.to(device)
    query, keys = query.to(device), keys.to(device)
    labels = None if labels is None else tuple(x.to(device) for x in labels)
    ours = chunked._in_blocks(query, keys, scale, mask, offset, labels, subtract_max, True, True)
    ours_grad = chunked.row_lse_grad_keys(
        rows.float().to(device), query, keys, scale, mask, offset, lse.float().to(device)
    )
    float32 = float32_tolerance("triton")
    tolerance = {torch.float32: float32, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert ours_grad.dtype == dtype
    for part, right in zip((*ours, ours_grad), (*expected, grad), strict=True):
        assert_close(part, right, tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches(backend, dtype):
    """One kernel forward and two operators backward; on a CPU, the operator and conversions."""
    device = device_of(backend)
    query = unit(64, 16, seed=1, dtype=dtype).to(device).requires_grad_()
    keys = unit(128, 16, seed=2, dtype=dtype).to(device)
    row_lse(query, keys, 5.0, logit_bound=5.0, backend=backend)
    value = []

    def forward():
        value.append(row_lse(query, keys, 5.0, logit_bound=5.0, backend=backend))

    def backward():
        torch.autograd.grad(value[0], query, torch.ones_like(value[0]))

    found = launches(forward)
    if backend == "triton":
        assert found == ["row_lse_kernel"], found
    else:
        assert len(found) <= (1 if dtype == torch.float32 else 4), found
    found = launches(backward)
    assert len(found) <= 2 + 1, found  # and the ones


def test_splits_are_joined_by_one_kernel():
    device = device_of("triton")
    query, keys = (unit(1, n, 16, seed=n, dtype=torch.float32).to(device) for n in (40, 200))
    found = launches(
        lambda: triton_kernels.row_lse(
            query, keys, 5.0, None, None,
            subtract_max=False, with_weighted_keys=True, with_max=True, splits=3,
        )
    )  # fmt: skip
    assert found == ["row_lse_kernel", "join_kernel"]


# --- Properties -----------------------------------------------------------------------------------

problems = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 40),
        "columns": st.integers(1, 70),
        "width": st.integers(1, 20),
        "scale": st.floats(0.5, 20.0),
        "bounded": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def make(problem):
    query = unit(problem["rows"], problem["width"], seed=problem["seed"]).float()
    keys = unit(problem["columns"], problem["width"], seed=problem["seed"] + 1).float()
    return (
        query,
        keys,
        problem["scale"],
        {"logit_bound": problem["scale"] if problem["bounded"] else None},
    )


PROPERTY = float32_tolerance("triton")


def assert_same(ours, others, tolerance=PROPERTY):
    for a, b in zip((ours[0], *ours[2]), (others[0], *others[2]), strict=True):
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        a, b = a.masked_fill(a == -torch.inf, 0.0), b.masked_fill(b == -torch.inf, 0.0)
        assert (a - b).norm() <= tolerance * (b.norm() + 1)


def all_backends(test):
    return pytest.mark.parametrize("backend", BACKENDS)(
        given(problem=problems, data=st.data())(test)
    )


@all_backends
def test_backends_agree(backend, problem, data):
    query, keys, scale, options = make(problem)
    offset = data.draw(st.none() | st.integers(-problem["columns"], problem["rows"]))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))))
    options |= {"exclude_offset": offset, "key_mask": mask, "grad_keys": True}
    assert_same(
        call(backend, query, keys, scale, **options),
        call("reference", query, keys, scale, **options),
    )


@all_backends
def test_order_of_keys_does_not_matter_and_order_of_queries_permutes(backend, problem, data):
    query, keys, scale, options = make(problem)
    ours = call(backend, query, keys, scale, cotangent=torch.ones(len(query)), **options)
    flipped = call(
        backend, query.flip(0), keys.flip(0), scale, cotangent=torch.ones(len(query)), **options
    )
    assert_same((flipped[0].flip(0), None, [flipped[2][0].flip(0), flipped[2][1]]), ours)


@all_backends
def test_splitting_the_keys_and_joining_changes_nothing(backend, problem, data):
    query, keys, scale, options = make(problem)
    cut = data.draw(st.integers(0, len(keys)))
    whole = call(backend, query, keys, scale, **options)
    parts = [call(backend, query, part, scale, **options)[0] for part in (keys[:cut], keys[cut:])]
    assert_close(torch.logaddexp(*parts), whole[0], PROPERTY)


@all_backends
def test_duplicating_the_keys_adds_log_2(backend, problem, data):
    query, keys, scale, options = make(problem)
    one, two = (call(backend, query, k, scale, **options) for k in (keys, torch.cat([keys, keys])))
    assert_same((two[0] - torch.log(torch.tensor(2.0)), None, two[2]), one)


@all_backends
def test_a_masked_key_changes_nothing(backend, problem, data):
    query, keys, scale, options = make(problem)
    place = data.draw(st.integers(0, len(keys)))
    more = torch.cat([keys[:place], torch.full((1, keys.shape[1]), 7.0), keys[place:]])
    mask = torch.arange(len(more)) != place
    assert_same(
        call(backend, query, more, scale, key_mask=mask, **options),
        call(backend, query, keys, scale, **options),
    )


@all_backends
def test_scale_moves_between_query_and_factor(backend, problem, data):
    query, keys, scale, options = make(problem)
    factor = data.draw(st.floats(0.25, 4.0))
    assert_close(
        call(backend, query * factor, keys, scale / factor, **options)[0],
        call(backend, query, keys, scale, **options)[0],
        PROPERTY,
    )


@all_backends
def test_rotating_both_sides_changes_nothing(backend, problem, data):
    query, keys, scale, options = make(problem)
    generator = torch.Generator().manual_seed(problem["seed"])
    rotation = torch.linalg.qr(torch.randn(query.shape[1], query.shape[1], generator=generator))[0]
    ours = call(backend, query @ rotation, keys @ rotation, scale, **options)
    assert_same(
        (ours[0], None, [ours[2][0] @ rotation.T, ours[2][1]]),
        call(backend, query, keys, scale, **options),
    )


# --- Arguments ------------------------------------------------------------------------------------

Q, K = torch.randn(3, 4), torch.randn(5, 4)
META_MASK = torch.ones(5, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("error", "words", "arguments", "options"),
    [
        (TypeError, "query must be a tensor", ([1.0], K, 1.0), {}),
        (TypeError, "keys must be float16, bfloat16, float32 or float64", (Q, K.long(), 1.0), {}),
        (ValueError, r"query must have shape \[..., rows, D\]", (Q[0], K, 1.0), {}),
        (ValueError, "share a feature width", (Q, K[:, :3], 1.0), {}),
        (
            ValueError,
            r"must broadcast; got \(2,\), \(3,\)",
            (Q.expand(2, *Q.shape), K.expand(3, *K.shape), 1.0),
            {},
        ),
        (
            ValueError,
            r"must broadcast; got \(\), \(3,\), \(2,\)",
            (Q, K.expand(3, *K.shape), 1.0),
            {"key_mask": torch.ones(2, 5).bool()},
        ),
        (ValueError, "width, their last axis, of at least 1", (Q[:, :0], K[:, :0], 1.0), {}),
        (ValueError, "keys must be on the query's device", (Q, K.to("meta"), 1.0), {}),
        (TypeError, "scale must be a number", (Q, K, "5"), {}),
        (TypeError, "scale must be a number", (Q, K, True), {}),
        (ValueError, "scale must be a number, or one", (Q, K, torch.ones(2)), {}),
        (ValueError, "scale must be a number, or one", (Q, K, torch.ones((), device="meta")), {}),
        (TypeError, "key_mask must be a bool tensor", (Q, K, 1.0), {"key_mask": torch.ones(5)}),
        (TypeError, "key_mask must be a bool tensor", (Q, K, 1.0), {"key_mask": [True] * 5}),
        (ValueError, "one entry per key, 5; got 4", (Q, K, 1.0), {"key_mask": torch.ones(4).bool()}),
        (ValueError, "key_mask must be .* on query's device", (Q, K, 1.0), {"key_mask": META_MASK}),
        (TypeError, "exclude_offset must be an int", (Q, K, 1.0), {"exclude_offset": 1.5}),
        (TypeError, "exclude_offset must be an int", (Q, K, 1.0), {"exclude_offset": True}),
        (TypeError, "logit_bound must be a number", (Q, K, 1.0), {"logit_bound": "1"}),
        (ValueError, "logit_bound must be", (Q, K, 1.0), {"logit_bound": -1.0}),
        (ValueError, "logit_bound must be", (Q, K, 1.0), {"logit_bound": float("nan")}),
        (ValueError, "backend must be one of", (Q, K, 1.0), {"backend": "cuda"}),
    ],
)  # fmt: skip
def test_wrong_arguments(error, words, arguments, options):
    with pytest.raises(error, match=words):
        row_lse(*arguments, **options)


def test_numbers_may_be_of_numpy():
    plainly = row_lse(Q, K, 0.5, exclude_offset=1, logit_bound=50.0)
    options = {"exclude_offset": np.int64(1), "logit_bound": np.float32(50)}
    assert torch.equal(row_lse(Q, K, np.float32(0.5), **options), plainly)


def test_features_of_any_width():
    """Such as the 65,536 prototypes of a DINO head."""
    generator = torch.Generator().manual_seed(0)
    query, keys = (F.normalize(torch.randn(n, 65536, generator=generator)) for n in (3, 5))
    ours = row_lse(query.requires_grad_(), keys, 5.0)
    assert_close(ours, (5 * query.double() @ keys.double().mT).logsumexp(1), 1e-5)


@pytest.mark.parametrize(
    ("words", "query"),
    [
        ("width 256", torch.randn(3, 300, dtype=torch.bfloat16)),
        ("width 128", torch.randn(3, 129)),
        ("no torch.float64 form", torch.randn(3, 8, dtype=torch.float64)),
        ('"highest" asks for exact products', torch.randn(3, 8)),
    ],
)
def test_triton_says_why_it_cannot_run(words, query):
    query = query.to(device_of("triton"))
    with matmul_precision("highest"), pytest.raises(ValueError, match=words):
        row_lse(query, query, 1.0, backend="triton")
    row_lse(query, query, 1.0, backend="auto")


def test_triton_is_not_taken_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="runs on CUDA"):
        row_lse(Q, K, 1.0, backend="triton")
    assert torch.equal(row_lse(Q, K, 1.0), row_lse(Q, K, 1.0, backend="torch"))


def test_triton_is_not_taken_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("pixdistill.ops.backend.has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        row_lse(Q, K, 1.0, backend="triton")
    row_lse(Q, K, 1.0)


@pytest.mark.parametrize(
    ("capability", "hip", "words"),
    [
        ((8, 0), None, None),
        ((9, 0), None, None),
        ((7, 5), None, "compute capability 8.0 or later"),
        ((9, 0), "6.2", "not been validated on ROCm"),
    ],
)
def test_triton_is_taken_on_nvidia_gpus_from_ampere_on(capability, hip, words, monkeypatch):
    """Without such a GPU: what PyTorch says of it is replaced."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = why_no_kernel(torch.device("cuda"))
    assert reason is None if words is None else words in reason
