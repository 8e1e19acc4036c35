"""MHSAPlugin, plug and unplug: a loop over pixels and heads as the truth, properties and edges."""

import cmath
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_within_budget, fresh_compiler, run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from pixdistill import MHSAPlugin, mhsa_plugin, plug, unplug
from pixdistill.mhsa_plugin import rotate, sine_code

POSITIONS = ("sine", "relative", None)
KEYS = ({}, {"key_stride": 2}, {"key_stride": 3}, {"window": 2}, {"window": 4})
SIZES = ((4, 6), (5, 7), (1, 1), (1, 13), (11, 3))


def build(channels=16, num_heads=2, seed=0, dtype=torch.float32, **settings):
    """A plug-in that has learned something: random weights everywhere, none at its initial value."""
    plugin = MHSAPlugin(channels, num_heads, **settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in plugin.named_parameters():
        scale = 0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.data = (noise + (name == "norm.weight")).to(dtype)
    return plugin


def feature_map(*shape, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 0.3).to(dtype)


# --- The truth ------------------------------------------------------------------------------------


def code_of(place, channels):
    """Sine and cosine of the row at falling frequencies, then those of the column."""
    frequencies = [10000.0 ** (-j / (channels // 4)) for j in range(channels // 4)]
    numbers = [f(p * w) for p in place for f in (math.sin, math.cos) for w in frequencies]
    return torch.tensor(numbers, dtype=torch.float64)


def turned(vector, place):
    """Pairs (j, j + d/2) as complex numbers, the first half of them turned by the row."""
    half, quarter = len(vector) // 2, len(vector) // 4
    angles = [place[j // quarter] * 100.0 ** (-(j % quarter) / quarter) for j in range(half)]
    turn = torch.tensor([cmath.rect(1, angle) for angle in angles], dtype=torch.complex128)
    pairs = torch.complex(vector[:half].double(), vector[half:].double()) * turn
    return torch.cat([pairs.real, pairs.imag]).to(vector.dtype)


def normalised(pixels, weight, bias):
    mean = pixels.mean(1, keepdim=True)
    variance = (pixels - mean).square().mean(1, keepdim=True)
    return (pixels - mean) / (variance + 1e-5).sqrt() * weight + bias


def attended(plugin, pixels, places):
    """What attention adds to the pixels `[n, C]` of one window, head by head, with all its logits."""
    w = dict(plugin.named_parameters())
    pixels = normalised(pixels, w["norm.weight"], w["norm.bias"])
    cells = {}
    for i, (row, column) in enumerate(places):
        cells.setdefault((row // plugin.key_stride, column // plugin.key_stride), []).append(i)
    sources = torch.stack([pixels[members].mean(0) for members in cells.values()])
    key_places = [
        tuple(sum(places[i][axis] for i in members) / len(members) for axis in (0, 1))
        for members in cells.values()
    ]
    queries, keys = pixels, sources
    if plugin.position == "sine":
        queries, keys = (
            t + torch.stack([code_of(p, plugin.channels) for p in at]).to(t.dtype)
            for t, at in ((queries, places), (keys, key_places))
        )
    q, k, v = (
        t @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        for name, t in (("query", queries), ("key", keys), ("value", sources))
    )
    mixed = []
    for qh, kh, vh in zip(*(t.chunk(plugin.num_heads, dim=1) for t in (q, k, v)), strict=True):
        if plugin.position == "relative":
            qh = torch.stack([turned(x, p) for x, p in zip(qh, places, strict=True)])
            kh = torch.stack([turned(x, p) for x, p in zip(kh, key_places, strict=True)])
        mixed.append((qh @ kh.T / math.sqrt(qh.shape[1])).softmax(1) @ vh)
    return torch.cat(mixed, dim=1) @ w["out.weight"].T + w["out.bias"]


def dense(plugin, x):
    """The plug-in's formula by loops over images and windows; differentiable, in the dtype of x."""
    height, width = x.shape[2:]
    window = plugin.window or max(height, width)
    result = x.permute(0, 2, 3, 1).clone()
    for image in range(len(x)):
        for top in range(0, height, window):
            for left in range(0, width, window):
                places = [
                    (row, column)
                    for row in range(top, min(top + window, height))
                    for column in range(left, min(left + window, width))
                ]
                at = (image, [p[0] for p in places], [p[1] for p in places])
                inside = [(row - top, column - left) for row, column in places]
                pixels = x.permute(0, 2, 3, 1)[at]
                result[at] = (pixels + attended(plugin, pixels, inside)).to(x.dtype)
    if plugin.ffn is not None:
        w = dict(plugin.ffn.named_parameters())
        flat = result.flatten(0, 2)
        hidden = normalised(flat, w["0.weight"], w["0.bias"]) @ w["1.weight"].T + w["1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        result = (flat + hidden @ w["3.weight"].T + w["3.bias"]).view_as(result)
    return result.permute(0, 3, 1, 2)


def measure(function, plugin, x):
    """Values, and the gradients with respect to x and every parameter."""
    x = x.detach().requires_grad_()
    value = function(x)
    weights = feature_map(*value.shape, seed=9, dtype=value.dtype)
    leaves = [x, *plugin.parameters()]
    grads = torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True)
    return value.detach(), *grads


def assert_same(ours, others, tolerance):
    """Relative to each norm; softmax is blind to the keys' bias, whose gradient is only rounding."""
    largest = max(b.norm() for b in others)
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 0.1 * largest)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_equals_dense_truth(position, keys, size, dtype, tolerance):
    plugin = build(position=position, dtype=dtype, **keys)
    x = feature_map(2, 16, *size, dtype=dtype)
    ours = measure(plugin, plugin, x)
    truth = measure(lambda x: dense(plugin, x), plugin.double(), x.double())
    assert all(t.dtype == dtype for t in ours)
    assert_same(ours, truth, tolerance)


@pytest.mark.parametrize("ffn_ratio", [0.01, 0.5, 1, 2.7])
def test_feed_forward_equals_dense_truth(ffn_ratio):
    plugin = build(8, 1, ffn_ratio=ffn_ratio, dtype=torch.float64)
    assert plugin.ffn[1].out_features == {0.01: 1, 0.5: 4, 1: 8, 2.7: 22}[ffn_ratio]
    x = feature_map(2, 8, 3, 4, dtype=torch.float64)
    ours = measure(plugin, plugin, x)
    assert_same(ours, measure(lambda x: dense(plugin, x), plugin, x), 1e-13)


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    position=st.sampled_from(POSITIONS),
    key_stride=st.integers(1, 8),
    window=st.one_of(st.none(), st.integers(1, 8)),
    seed=st.integers(0, 2**16),
)
def test_any_problem_equals_dense_truth(
    batch, height, width, heads, position, key_stride, window, seed
):
    keys = {"key_stride": key_stride} if window is None else {"window": window}
    plugin = build(16, heads, seed, torch.float64, position=position, **keys)
    x = feature_map(batch, 16, height, width, seed=seed, dtype=torch.float64)
    assert_close(plugin(x), dense(plugin, x), 1e-13)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("keys", [{}, {"key_stride": 2}, {"window": 2}], ids=str)
def test_gradcheck(position, keys):
    plugin = build(4, 1, position=position, ffn_ratio=0.5, dtype=torch.float64, **keys)
    x = feature_map(2, 4, 3, 3, dtype=torch.float64).requires_grad_()
    names, leaves = zip(*plugin.named_parameters(), strict=True)

    def call(x, *leaves):
        return torch.func.functional_call(plugin, dict(zip(names, leaves, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *leaves))


def test_defaults():
    plugin = MHSAPlugin(64)
    assert (plugin.num_heads, plugin.position, plugin.key_stride) == (8, "sine", 1)
    assert plugin.window is None
    assert plugin.ffn is None


# --- Position -------------------------------------------------------------------------------------


@given(
    a=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    b=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    shift=st.tuples(st.integers(-200, 200), st.integers(-200, 200)),
    seed=st.integers(0, 99),
)
def test_product_of_rotated_vectors_depends_on_the_displacement_only(a, b, shift, seed):
    q, k = feature_map(2, 1, 1, 1, 12, seed=seed, dtype=torch.float64)
    a, b, shift = (torch.tensor(place).double().view(1, 1, 2) for place in (a, b, shift))
    here = (rotate(q, a) * rotate(k, b)).sum()
    there = (rotate(q, a + shift) * rotate(k, b + shift)).sum()
    assert abs(here - there) < 1e-11
    assert_close(rotate(q, a).norm(), q.norm(), 1e-13)


def test_rotation_sees_rows_and_columns_apart_and_in_their_direction():
    q, k = feature_map(2, 1, 1, 1, 8, dtype=torch.float64)
    products = {
        place: (rotate(q, torch.tensor([[place]]).double()) * k).sum()
        for place in [(0, 0), (0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (0, 2), (2, 0)]
    }
    values = torch.stack(list(products.values()))
    assert (values - values[:, None]).abs().add(torch.eye(len(values))).min() > 1e-3
    assert torch.equal(rotate(q, torch.zeros(1, 1, 2).double()), q)


@pytest.mark.parametrize("keys", [{}, {"key_stride": 2}, {"window": 3}], ids=str)
def test_only_a_relative_code_is_blind_to_a_shift_of_all_places(keys, monkeypatch):
    x = feature_map(1, 16, 5, 6, dtype=torch.float64)
    plugins = {p: build(position=p, dtype=torch.float64, **keys) for p in POSITIONS}
    before = {p: plugin(x) for p, plugin in plugins.items()}
    places = mhsa_plugin._places
    monkeypatch.setattr(
        mhsa_plugin, "_places", lambda *size, like: places(*size, like=like) + torch.tensor([7, -3])
    )
    assert_close(plugins["relative"](x), before["relative"], 1e-13)
    assert torch.equal(plugins[None](x), before[None])
    assert (plugins["sine"](x) - before["sine"]).norm() > 1e-2 * before["sine"].norm()


def grid_of(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], dim=-1).double()


def test_sine_code_tells_all_places_apart():
    codes = sine_code(grid_of(40, 60), 32).flatten(0, 1)
    distances = torch.cdist(codes, codes) + 100 * torch.eye(len(codes))
    assert distances.min() > 0.5  # one pixel aside; a code is sqrt(32 / 2) = 4 long
    assert_close(codes.norm(dim=1), torch.full((len(codes),), 4.0), 1e-13)


def test_sine_code_treats_rows_as_columns():
    codes = sine_code(grid_of(9, 9), 24)
    row, column = codes.chunk(2, dim=-1)
    assert torch.equal(row, column.transpose(0, 1))
    assert torch.equal(row[:, :1].expand_as(row), row)
    sine, cosine = row.chunk(2, dim=-1)
    assert_close(sine.square() + cosine.square(), torch.ones_like(sine), 1e-14)
    assert_close(row[:, 0, 0], torch.arange(9).double().sin(), 1e-14)  # the shortest wave: 2 pi


def permuted(x, order):
    return x.flatten(2)[:, :, order].view_as(x)


@pytest.mark.parametrize("position", POSITIONS)
def test_permuting_pixels_permutes_the_result_only_without_position(position):
    plugin = build(position=position, ffn_ratio=1, dtype=torch.float64)
    x = feature_map(2, 16, 4, 5, dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    error = (plugin(permuted(x, order)) - permuted(plugin(x), order)).norm()
    if position is None:
        assert error < 1e-12
    else:
        assert error > 0.1


@pytest.mark.parametrize("position", POSITIONS)
def test_transposing_the_map_is_no_symmetry_of_a_code(position):
    """Rows and columns have channels of their own, so that a plug-in can tell them apart."""
    plugin = build(position=position, dtype=torch.float64)
    x = feature_map(1, 16, 4, 5, dtype=torch.float64)
    error = (plugin(x.mT) - plugin(x).mT).norm()
    assert (error < 1e-12) == (position is None)


# --- Sizes, windows and strides -------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"key_stride": 3}, {"window": 3}], ids=str)
def test_calls_leave_no_trace(keys):
    """Another map size, gradients or autocast in between change nothing, nor does the mode."""
    plugin = build(**keys)
    x = feature_map(1, 16, 5, 8)
    first = plugin(x)
    state = copy.deepcopy(plugin.state_dict())
    measure(plugin, plugin, feature_map(3, 16, 9, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plugin.eval()(feature_map(1, 16, 1, 2))
    assert torch.equal(plugin(x), first)
    assert state.keys() == plugin.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in plugin.state_dict().items())


def test_images_of_a_batch_do_not_see_one_another():
    for keys in KEYS:
        plugin = build(dtype=torch.float64, **keys)
        x = feature_map(3, 16, 5, 7, dtype=torch.float64)
        assert_close(plugin(x), torch.cat([plugin(image[None]) for image in x]), 1e-14)


@pytest.mark.parametrize("keys", [{}, {"key_stride": 2}], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_pixel_sees_all_others(keys, position):
    plugin = build(position=position, dtype=torch.float64, **keys)
    x = feature_map(1, 16, 5, 7, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(plugin(x)[0, :, 4, 0].sum(), x)
    assert (grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("window", [3, 4])
def test_a_window_is_a_map_of_its_own(position, window):
    """Those at the edges too, which are smaller: padding has no influence, values and gradients."""
    plugin = build(position=position, window=window, dtype=torch.float64)
    alone = build(position=position, dtype=torch.float64)
    alone.load_state_dict(plugin.state_dict())

    def cut_and_join(x):
        rows = [
            torch.cat([alone(cell) for cell in row.split(window, 3)], 3)
            for row in x.split(window, 2)
        ]
        return torch.cat(rows, 2)

    x = feature_map(2, 16, 7, 10, dtype=torch.float64)
    assert_same(measure(plugin, plugin, x), measure(cut_and_join, alone, x), 1e-13)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_passes_between_windows(poison):
    plugin = build(window=3)
    x = feature_map(2, 16, 7, 8)
    clean = plugin(x)
    x[0, 2, 3, 5] = poison
    result = plugin(x)
    window = torch.zeros(2, 16, 7, 8, dtype=torch.bool)
    window[0, :, 3:6, 3:6] = True
    assert torch.equal(result[~window], clean[~window])
    assert result[window].isnan().all()


def test_padding_is_not_seen_even_where_its_values_are_huge():
    """A padded pixel's key and value are the biases alone: pixels that see them would show it."""
    plugin = build(position=None, window=4, dtype=torch.float64)
    with torch.no_grad():
        plugin.value.bias.fill_(1e6)
        plugin.value.weight.zero_()
        plugin.norm.bias.fill_(3.0)
        plugin.norm.weight.zero_()
        plugin.value.weight.diagonal().fill_(1e6)
    x = feature_map(1, 16, 5, 5, dtype=torch.float64)
    update = plugin(x) - x  # every pixel has one and the same value, 4e6 in each channel
    truth = plugin.out(torch.full((16,), 4e6).double())
    assert_close(update, truth.view(1, 16, 1, 1).expand_as(x), 1e-9)


@pytest.mark.parametrize("stride", [7, 8, 20])
def test_a_stride_beyond_the_map_leaves_one_key(stride):
    plugin = build(key_stride=stride, dtype=torch.float64)
    x = feature_map(2, 16, 5, 7, dtype=torch.float64)
    mean = F.layer_norm(x.movedim(1, -1), (16,), plugin.norm.weight, plugin.norm.bias).mean((1, 2))
    update = plugin.out(plugin.value(mean))[..., None, None]
    assert_close(plugin(x), x + update, 1e-13)


def test_cells_at_the_edge_are_averaged_over_their_own_pixels():
    """5 x 7 in cells of 3: a map that is constant in each cell has these constants as its means."""
    cells = feature_map(1, 2, 3, 4)
    x = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :5, :7]  # [B, H, W, C]
    assert_close(mhsa_plugin._average(x, 3), cells, 1e-6)
    places = mhsa_plugin._average(grid_of(5, 7)[None], 3)[0]
    assert places[:, 0, 0].tolist() == [1.0, 3.5]
    assert places[0, :, 1].tolist() == [1.0, 4.0, 6.0]


def test_window_and_stride_of_one_are_the_limits():
    x = feature_map(2, 16, 5, 6, dtype=torch.float64)
    plain = build(dtype=torch.float64)
    assert torch.equal(build(key_stride=1, dtype=torch.float64)(x), plain(x))
    assert_close(build(window=6, dtype=torch.float64)(x), plain(x), 1e-14)
    assert_close(build(window=50, dtype=torch.float64)(x), plain(x), 1e-14)
    alone = build(window=1, dtype=torch.float64)  # a pixel that sees itself only: W_o W_v n
    pixels = alone.norm(x.movedim(1, -1))
    assert_close(alone(x), x + alone.out(alone.value(pixels)).movedim(-1, 1), 1e-13)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_an_empty_batch(keys):
    plugin = build(**keys)
    x = torch.zeros(0, 16, 5, 6, requires_grad=True)
    plugin(x).sum().backward()
    assert x.grad.shape == (0, 16, 5, 6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [{}, {"key_stride": 3}], ids=str)
def test_what_is_not_finite_shows(poison, keys):
    x = feature_map(2, 16, 4, 4)
    x[1, 3, 2, 2] = poison
    result = build(**keys)(x)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


# --- Initialisation -------------------------------------------------------------------------------


SETTINGS = (
    {},
    {"ffn_ratio": 2},
    {"position": "relative", "window": 3, "ffn_ratio": 0.5},
    {"position": None, "key_stride": 2},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identity_at_initialisation_bit_for_bit(settings, dtype):
    plugin = MHSAPlugin(16, 2, **settings)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = feature_map(2, 16, 5, 7, dtype=dtype).to(memory_format=layout) * 50
        assert torch.equal(copy.deepcopy(plugin).to(dtype)(x), x)
        if dtype != torch.float64:
            for precision in (torch.float16, torch.bfloat16):
                with torch.autocast("cpu", dtype=precision):
                    result = plugin(x)
                assert result.dtype == x.dtype if dtype == torch.float32 else True
                assert torch.equal(result, x.to(result.dtype))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_identity_has_the_gradient_of_one(settings):
    plugin = MHSAPlugin(16, 2, **settings)
    x = feature_map(2, 16, 5, 7).requires_grad_()
    weights = feature_map(2, 16, 5, 7, seed=2)
    (grad,) = torch.autograd.grad((plugin(x) * weights).sum(), x)
    assert torch.equal(grad, weights)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_learns_from_its_first_step(settings):
    torch.manual_seed(0)
    plugin = MHSAPlugin(16, 2, **settings)
    x = feature_map(2, 16, 6, 6)
    target = 1 + x.mean((2, 3), keepdim=True).expand_as(x)  # found by looking at other pixels
    optimizer = torch.optim.Adam(plugin.parameters(), lr=1e-2)
    losses, reached = [], []
    for _ in range(30):
        loss = F.mse_loss(plugin(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        reached.append({n for n, p in plugin.named_parameters() if p.grad.norm() > 1e-6})
    last = {"ffn.3.weight", "ffn.3.bias"} if "ffn_ratio" in settings else set()
    assert reached[0] == {"out.weight", "out.bias"} | last
    everything = {n for n, _ in plugin.named_parameters()} - {"key.bias"}
    assert everything <= reached[-1]
    assert losses[-1] < 0.85 * losses[0]


def test_zero_projections_start_at_zero_and_the_others_do_not():
    plugin = MHSAPlugin(16, 2, ffn_ratio=1)
    zero = {n for n, p in plugin.named_parameters() if not p.any()}
    assert zero >= {"out.weight", "out.bias", "ffn.3.weight", "ffn.3.bias"}
    assert not zero & {"query.weight", "key.weight", "value.weight", "ffn.1.weight", "norm.weight"}


@pytest.mark.parametrize("settings", [{}, {"ffn_ratio": 2.0}], ids=str)
def test_identity_where_parameters_are_made_later(settings):
    with torch.device("meta"):
        plugin = MHSAPlugin(16, 2, **settings)
    plugin.to_empty(device="cpu")
    for parameter in plugin.parameters():
        parameter.data.fill_(7)
    for module in plugin.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = feature_map(2, 16, 5, 7)
    assert torch.equal(plugin(x), x)
    assert plugin.query.weight.std() > 0


# --- Dtypes, autocast and memory formats ----------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("keys", [{}, {"key_stride": 2}, {"window": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_within_twice_plain_pytorch(position, keys, dtype, autocast):
    plugin = build(position=position, ffn_ratio=1, **keys)
    x = feature_map(2, 16, 5, 7, dtype=dtype).float()
    if not autocast:
        plugin, x = plugin.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        results = [measure(f, plugin, x) for f in (plugin, lambda x: dense(plugin, x))]
    assert all(t.dtype == x.dtype for t in results[0])
    truth = measure(lambda x: dense(plugin, x), plugin.double(), x.double())
    names = ["value", "x", *dict(plugin.named_parameters())]
    for name, ours, plain, exact in zip(names, *results, truth, strict=True):
        if name != "key.bias":  # zero but for rounding
            assert_within_budget(ours, plain, exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("position", ["sine", "relative"])
def test_places_keep_float32_under_autocast(position):
    """bfloat16 has no numbers between 256 and 258: distant pixels would share a code."""
    plugin = build(position=position, key_stride=2, dtype=torch.float32)
    x = feature_map(1, 16, 1, 600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = plugin(x)
    truth = plugin.double()(x.double())
    assert_close(ours - x, truth - x, 0.03)


def layouts_of(x):
    """The same map in other memory: (name, map, what the map is a view of)."""
    batch, channels, height, width = x.shape
    last = x.clone(memory_format=torch.channels_last)
    wide = torch.full((batch, channels + 3, 2 * height, width + 2), math.nan, dtype=x.dtype)
    wide[:, 2:-1, ::2, 1:-1] = x
    yield "channels last", last, last
    yield "sliced", wide[:, 2:-1, ::2, 1:-1], wide
    turned = x.mT.contiguous()
    yield "transposed", turned.mT, turned
    batched = x.transpose(0, 1).contiguous()
    yield "batch inside", batched.transpose(0, 1), batched


@pytest.mark.parametrize("keys", [{}, {"key_stride": 3}, {"window": 3}], ids=str)
def test_any_memory_format_gives_the_same(keys):
    plugin = build(ffn_ratio=1, **keys)
    x = feature_map(2, 16, 5, 7)
    truth = measure(plugin, plugin, x)
    for name, view, base in layouts_of(x):
        kept = base.clone()
        ours = measure(plugin, plugin, view)
        assert_same(ours, truth, 1e-6)
        assert torch.equal(base.nan_to_num(), kept.nan_to_num()), name
    expanded = x[:1, :, :1].expand(2, -1, 5, -1)
    assert_same(
        measure(plugin, plugin, expanded), measure(plugin, plugin, expanded.contiguous()), 1e-6
    )


@pytest.mark.parametrize("keys", [{}, {"key_stride": 3}, {"window": 3}], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_memory_format_is_kept(keys, autocast):
    plugin = build(ffn_ratio=1, **keys)
    x = feature_map(2, 16, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert plugin(x).is_contiguous()
        last = x.to(memory_format=torch.channels_last)
        assert plugin(last).is_contiguous(memory_format=torch.channels_last)


# --- Memory and determinism -----------------------------------------------------------------------


MEASURE = """
import pathlib, sys, torch, pixdistill
def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
plugin = pixdistill.MHSAPlugin(32, 4, **eval(sys.argv[1]))
def step(height, width, backward):
    x = torch.randn(1, 32, height, width, requires_grad=backward)
    with torch.set_grad_enabled(backward):
        y = plugin(x)
    if backward:
        y.sum().backward()
step(40, 40, True)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(*eval(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "settings", [{"key_stride": 4}, {"window": 16, "position": "relative"}], ids=str
)
def test_peak_memory_of_a_large_map(settings):
    """128 x 256 pixels: the logits of the cells take 1 GiB, those of the windows 128 MiB more."""
    peak = int(run("-c", MEASURE, str(settings), "(128, 256, True)"))
    assert peak < 160 * 2**20  # 40 arrays of the map's size; 112 MiB at most were seen


def test_peak_memory_of_full_attention():
    """N = 8192 pixels: one matrix of logits is 256 MiB, and there are four heads."""
    assert int(run("-c", MEASURE, "{}", "(64, 128, False)")) < 32 * 2**20


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_seed_same_bits(settings):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        plugin = MHSAPlugin(16, 2, **settings)
        nn.init.normal_(plugin.out.weight)
        results.append(measure(plugin, plugin, feature_map(2, 16, 9, 9)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Compilation and export -----------------------------------------------------------------------

TEN_SIZES = (
    *((2, 9, 12), (3, 5, 7), (2, 13, 6), (4, 8, 8), (2, 7, 11)),
    *((5, 12, 9), (2, 6, 5), (3, 16, 17), (6, 10, 10), (2, 23, 5)),
)


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [
        ({}, False),
        ({"key_stride": 3, "position": "relative", "ffn_ratio": 1}, True),
        ({"window": 4}, False),
    ],
    ids=str,
)
def test_compiles_once_for_all_map_sizes(settings, autocast):
    network = nn.Sequential(nn.Identity())
    plugin = build(**settings)
    plug(network, "0", plugin)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return network(x)

    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for batch, height, width in TEN_SIZES:
            x = feature_map(batch, 16, height, width)
            ours = measure(compiled, plugin, x)
            assert_same(ours, measure(forward, plugin, x), 1e-2 if autocast else 1e-5)
            frames.append(counter.frame_count)
    assert frames == [frames[0]] * len(TEN_SIZES)


@pytest.mark.parametrize(
    "settings", [{"key_stride": 3, "position": "relative"}, {"window": 4}], ids=str
)
def test_exports_with_dynamic_sizes(settings):
    plugin = build(**settings).eval()
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    example = (feature_map(3, 16, 11, 13),)
    program = torch.export.export(plugin, example, dynamic_shapes=(dynamic,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own saving and loading
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        module = torch.export.load(file).module()
    for batch, height, width in ((2, 12, 12), (4, 25, 31), (2, 30, 9)):
        x = feature_map(batch, 16, height, width)
        assert_close(module(x), plugin(x), 1e-6)


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_copies_are_equal_and_independent(clone, settings):
    plugin = build(**settings)
    x = feature_map(2, 16, 5, 7)
    before = plugin(x)
    twin = clone(plugin)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(plugin(x), before)
    assert str(twin) == str(plugin)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_state_dict_carries_everything(settings):
    plugin, fresh = build(**settings), MHSAPlugin(16, 2, **settings)
    x = feature_map(2, 16, 5, 7)
    assert fresh.load_state_dict(plugin.state_dict()) == ([], [])
    assert torch.equal(fresh(x), plugin(x))
    state = plugin.state_dict()
    del state["out.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*out\.bias"):
        fresh.load_state_dict(state)


def test_no_state_depends_on_position_stride_or_window():
    """So that a plug-in can be trained with one and tried with another."""
    keys = build().state_dict().keys()
    for settings in (*KEYS, {"position": None}, {"position": "relative"}):
        assert build(**settings).state_dict().keys() == keys


def test_repr_shows_the_settings():
    text = repr(MHSAPlugin(16, 2, position="relative", window=4, ffn_ratio=2))
    assert "MHSAPlugin(\n  16, num_heads=2, position='relative', key_stride=1, window=4" in text
    assert "in_features=16, out_features=32" in text
    assert "position=None, key_stride=3, window=None" in repr(
        MHSAPlugin(6, 2, position=None, key_stride=3)
    )


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "arguments", "settings"),
    [
        (TypeError, "channels must be an int; got 16.0", (16.0,), {}),
        (TypeError, "channels must be an int; got True", (True,), {}),
        (ValueError, "channels must be at least 1; got 0", (0,), {}),
        (TypeError, "num_heads must be an int; got '2'", (16, "2"), {}),
        (ValueError, "num_heads must be at least 1; got -2", (16, -2), {}),
        (ValueError, "num_heads must divide channels=16; got 3", (16, 3), {}),
        (ValueError, "num_heads must divide channels=4; got 8", (4,), {}),
        (ValueError, "position must be one of .*got 'cosine'", (16,), {"position": "cosine"}),
        (ValueError, "position must be one of .*got False", (16,), {"position": False}),
        (ValueError, 'multiple of 4 for "sine"; got 6', (6, 2), {}),
        (ValueError, 'multiple of 4 for "relative"; got 12 / 2', (12, 2), {"position": "relative"}),
        (TypeError, "key_stride must be an int; got 1.5", (16,), {"key_stride": 1.5}),
        (ValueError, "key_stride must be at least 1; got 0", (16,), {"key_stride": 0}),
        (TypeError, "key_stride must be an int; got None", (16,), {"key_stride": None}),
        (TypeError, "window must be an int; got True", (16,), {"window": True}),
        (TypeError, "window must be an int; got 7.0", (16,), {"window": 7.0}),
        (ValueError, "window must be at least 1; got 0", (16,), {"window": 0}),
        (ValueError, "key_stride must be 1 with a window; got 2", (16,), dict(KEYS[1], window=4)),
        (ValueError, "ffn_ratio must be a finite number above 0; got 0", (16,), {"ffn_ratio": 0}),
        (ValueError, "ffn_ratio must be .* got nan", (16,), {"ffn_ratio": math.nan}),
        (TypeError, "ffn_ratio must be a number; got True", (16,), {"ffn_ratio": True}),
        (TypeError, "ffn_ratio must be a number; got '4'", (16,), {"ffn_ratio": "4"}),
    ],
)
def test_wrong_settings(error, words, arguments, settings):
    with pytest.raises(error, match=words):
        MHSAPlugin(*arguments, **settings)


@pytest.mark.parametrize(
    ("words", "x"),
    [
        (r"x must have shape \[B, 16, H, W\], .*; got \(16, 5, 7\)", torch.zeros(16, 5, 7)),
        (r"got \(2, 8, 5, 7\)", torch.zeros(2, 8, 5, 7)),
        (r"got \(2, 5, 7, 16\)", torch.zeros(2, 5, 7, 16)),
        (r"got \(2, 16, 3, 5, 7\)", torch.zeros(2, 16, 3, 5, 7)),
        (r"got \(2, 16\)", torch.zeros(2, 16)),
        (r"H and W at least 1; got \(2, 16, 0, 3\)", torch.zeros(2, 16, 0, 3)),
        (r"H and W at least 1; got \(2, 16, 3, 0\)", torch.zeros(2, 16, 3, 0)),
        ("got list", [[1.0]]),
        ("got tuple", (torch.zeros(2, 16, 5, 7),)),
    ],
)
def test_wrong_maps(words, x):
    with pytest.raises(ValueError, match=words):
        MHSAPlugin(16)(x)


# --- plug and unplug ------------------------------------------------------------------------------


class Shift(nn.Module):
    """A child that takes a further argument."""

    def forward(self, x, *, by=0.0):
        return x + by


class Student(nn.Module):
    """Children in a Sequential, a ModuleList, a ModuleDict and attributes, with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.backbone = nn.Module()
        self.backbone.layer1 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.backbone.layer2 = nn.Sequential(nn.BatchNorm2d(16), nn.Dropout(0.5))
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))
        self.named = nn.ModuleDict({"shift": Shift()})
        self.head = nn.Conv2d(16, 4, 1)
        self.absent = None

    def forward(self, images, by=0.25):
        x = self.backbone.layer2(self.backbone.layer1(self.stem(images)))
        for block in self.blocks:
            x = block(x).relu()
        return self.head(self.named["shift"](x, by=by))


def student():
    torch.manual_seed(0)
    return Student()


NAMES = ("stem.0", "stem", "backbone.layer1", "backbone.layer2", "blocks.1", "named.shift")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_plugging_changes_no_bit_and_unplugging_restores_everything(name, training):
    network = student().train(training)
    twin = copy.deepcopy(network)
    modules = list(network.named_modules())
    state = network.state_dict()
    kept = copy.deepcopy(state)
    images = feature_map(2, 3, 9, 8)
    child = network.get_submodule(name)

    plugin = MHSAPlugin(16, 2, ffn_ratio=1)
    plug(network, name, plugin)
    results = []
    for model in (network, twin):
        torch.manual_seed(1)  # of the dropout
        results.append(model(images))
    assert torch.equal(*results)
    assert network.get_submodule(f"{name}.plugin") is plugin
    assert network.get_submodule(f"{name}.module") is child
    moved = {key for key in network.state_dict() if key.startswith(f"{name}.module.")}
    assert moved == {k.replace(name, f"{name}.module", 1) for k in kept if k.startswith(f"{name}.")}

    assert unplug(network, name) is plugin
    assert [n for n, _ in network.named_modules()] == [n for n, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(network.named_modules(), modules, strict=True))
    restored, trained = network.state_dict(), twin.state_dict()  # both saw the same batch
    assert list(restored) == list(kept)
    assert restored._metadata == state._metadata
    assert all(torch.equal(value, trained[key]) for key, value in restored.items())
    if not training:
        assert all(torch.equal(value, kept[key]) for key, value in restored.items())


def test_training_with_the_plugin_in_place_leaves_the_trained_weights():
    network = student().train()
    keys = list(network.state_dict())
    plug(network, "backbone.layer2", MHSAPlugin(16, 2))
    layer = network.backbone.layer2
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images, before = feature_map(4, 3, 8, 8), copy.deepcopy(network.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    after = copy.deepcopy(network.state_dict())
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    plugged = {key for key in moved if ".plugin." in key}
    assert {"backbone.layer2.plugin.out.weight", "backbone.layer2.plugin.query.weight"} <= plugged
    assert {"stem.0.weight", "backbone.layer2.module.0.weight"} <= moved
    assert "backbone.layer2.module.0.running_mean" in moved

    output = network.eval()(images)
    plugin = unplug(network, "backbone.layer2")
    assert network.backbone.layer2 is layer.module
    state = network.state_dict()
    assert list(state) == keys
    for key, value in state.items():
        before_unplug = key.replace("backbone.layer2.", "backbone.layer2.module.")
        assert torch.equal(value, after[before_unplug])
    assert not torch.allclose(network(images), output)  # what it had learned is gone
    plug(network, "backbone.layer2", plugin)
    assert torch.equal(network(images), output)


@pytest.mark.parametrize("training", [True, False])
def test_the_plugin_takes_the_mode_of_the_child_and_leaves_that_of_its_parts(training):
    network = student().train(not training)
    network.backbone.layer2.train(training)
    network.backbone.layer2[0].train(not training)  # a BatchNorm frozen on its own, say
    plugin = nn.Sequential(MHSAPlugin(16, 2), nn.Dropout(0.5)).train(not training)
    plug(network, "backbone.layer2", plugin)
    assert network.backbone.layer2.training == training
    assert network.backbone.layer2.module.training == training
    assert network.backbone.layer2.module[0].training != training
    assert all(m.training == training for m in plugin.modules())
    network.train()
    assert plugin[1].training
    network.eval()
    assert not plugin[1].training


def test_two_plugins_in_one_network_come_out_in_any_order():
    network = student().eval()
    images = feature_map(1, 3, 8, 8)
    before, keys = network(images), list(network.state_dict())
    names = ("blocks.0", "stem.2", "backbone.layer1")
    plugins = {name: MHSAPlugin(16, 2) for name in names}
    for name in names:
        plug(network, name, plugins[name])
    assert torch.equal(network(images), before)
    for name in ("stem.2", "blocks.0", "backbone.layer1"):
        assert unplug(network, name) is plugins[name]
    assert list(network.state_dict()) == keys
    assert torch.equal(network(images), before)


def test_arguments_and_hooks_reach_the_child():
    network = student().eval()
    plug(network, "named.shift", MHSAPlugin(16, 2))
    images = feature_map(1, 3, 8, 8)
    assert not torch.allclose(network(images, by=0.0), network(images, by=3.0))
    seen = []
    child = network.get_submodule("blocks.2")
    handle = child.register_forward_hook(lambda *call: seen.append(call[2].shape))
    plug(network, "blocks.2", MHSAPlugin(16, 2))
    network(images)
    unplug(network, "blocks.2")
    network(images)
    assert len(seen) == 2
    handle.remove()


def test_a_plugged_network_is_copied_and_saved():
    network = student().eval()
    plug(network, "backbone.layer1", build())
    images = feature_map(2, 3, 12, 10)
    output = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), output)
        unplug(twin, "backbone.layer1")
        assert list(twin.state_dict()) == list(student().state_dict())
    fresh = student().eval()
    plug(fresh, "backbone.layer1", MHSAPlugin(16, 2))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(images), output)


def test_wrong_names_and_plugins():
    network = student()
    keys = list(network.state_dict())
    plugin = MHSAPlugin(16, 2)
    for name in ("layer9", "backbone.layer9", "stem.7", "blocks.-1", "stem.0.weight", "absent"):
        for call in (lambda n: plug(network, n, plugin), lambda n: unplug(network, n)):
            with pytest.raises(ValueError, match="name must be that of a child of the network"):
                call(name)
    for name in ("", "stem."):
        with pytest.raises(
            ValueError, match=r"got the network itself|name must be that of a child"
        ):
            plug(network, name, plugin)
    for name in (0, None, network.stem):
        with pytest.raises(TypeError, match="name must be a string"):
            plug(network, name, plugin)
        with pytest.raises(TypeError, match="name must be a string"):
            unplug(network, name)
    for wrong in (None, MHSAPlugin, lambda x: x):
        with pytest.raises(TypeError, match="plugin must be a module; got"):
            plug(network, "stem", wrong)
    with pytest.raises(ValueError, match=r"child with a plug-in; 'backbone\.layer1' has none"):
        unplug(network, "backbone.layer1")
    plug(network, "backbone.layer1", plugin)
    with pytest.raises(ValueError, match=r"child without a plug-in; 'backbone\.layer1' has one"):
        plug(network, "backbone.layer1", MHSAPlugin(16, 2))
    assert unplug(network, "backbone.layer1") is plugin
    with pytest.raises(ValueError, match="has none"):
        unplug(network, "backbone.layer1")
    assert list(network.state_dict()) == keys
