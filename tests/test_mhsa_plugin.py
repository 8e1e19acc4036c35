"""MHSAPlugin, plug and unplug: a loop over heads as the truth, properties, and every kind of network."""

import cmath
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import (
    assert_close,
    assert_within_budget,
    data_parallel,
    fresh_compiler,
    needs_torch,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from ranks import results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from pixdistill import MHSAPlugin, mhsa_plugin, plug, unplug

POSITIONS = ("sine", "relative", None)
SIZES = ((4, 6), (5, 7), (1, 1), (1, 13), (11, 3))

all_positions = pytest.mark.parametrize("position", POSITIONS)
strides = pytest.mark.parametrize("stride", [1, 2, 3])


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


def code_of(position, channels):
    """Sine and cosine of the row at falling frequencies, then those of the column."""
    frequencies = [10000.0 ** (-j / (channels // 4)) for j in range(channels // 4)]
    values = [f(p * w) for p in position for f in (math.sin, math.cos) for w in frequencies]
    return torch.tensor(values, dtype=torch.float64)


def turned(vector, position):
    """Pairs (j, j + d/2) as complex numbers, the first half of them turned by the row."""
    half, quarter = len(vector) // 2, len(vector) // 4
    angles = [position[j // quarter] * 100.0 ** (-(j % quarter) / quarter) for j in range(half)]
    turn = torch.tensor([cmath.rect(1, angle) for angle in angles], dtype=torch.complex128)
    pairs = torch.complex(vector[:half].double(), vector[half:].double()) * turn
    return torch.cat([pairs.real, pairs.imag]).to(vector.dtype)


def attended(plugin, pixels, positions):
    """What attention adds to the pixels `[n, C]` of an image, head by head, with all its logits."""
    w = dict(plugin.named_parameters())
    centred = pixels - pixels.mean(1, keepdim=True)
    pixels = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    pixels = pixels * w["norm.weight"] + w["norm.bias"]
    cells = {}
    for i, (row, column) in enumerate(positions):
        cells.setdefault((row // plugin.key_stride, column // plugin.key_stride), []).append(i)
    sources = torch.stack([pixels[members].mean(0) for members in cells.values()])
    key_positions = [
        tuple(sum(positions[i][axis] for i in members) / len(members) for axis in (0, 1))
        for members in cells.values()
    ]
    queries, keys = pixels, sources
    if plugin.position == "sine":
        queries, keys = (
            t + torch.stack([code_of(p, plugin.channels) for p in at]).to(t.dtype)
            for t, at in ((queries, positions), (keys, key_positions))
        )
    q, k, v = (
        t @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        for name, t in (("query", queries), ("key", keys), ("value", sources))
    )
    mixed = []
    for qh, kh, vh in zip(*(t.chunk(plugin.num_heads, dim=1) for t in (q, k, v)), strict=True):
        if plugin.position == "relative":
            qh = torch.stack([turned(x, p) for x, p in zip(qh, positions, strict=True)])
            kh = torch.stack([turned(x, p) for x, p in zip(kh, key_positions, strict=True)])
        mixed.append((qh @ kh.T / math.sqrt(qh.shape[1])).softmax(1) @ vh)
    return torch.cat(mixed, dim=1) @ w["out.weight"].T + w["out.bias"]


def dense(plugin, x):
    """The plug-in's formula, image by image; differentiable, in the dtype of x."""
    positions = [(row, column) for row in range(x.shape[2]) for column in range(x.shape[3])]
    images = [(pixels.T + attended(plugin, pixels.T, positions)).T for pixels in x.flatten(2)]
    return torch.stack(images).view_as(x).to(x.dtype)


def measure(function, plugin, x):
    """Values, and the gradients with respect to x and every parameter."""
    x = x.detach().requires_grad_()
    value = function(x)
    weights = feature_map(*value.shape, seed=9, dtype=value.dtype)
    grads = torch.autograd.grad((value * weights).sum(), [x, *plugin.parameters()])
    return value.detach(), *grads


def assert_same(ours, others, tolerance):
    """Relative to each norm; softmax is blind to the keys' bias, whose gradient is only rounding."""
    largest = max(b.norm() for b in others)
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 0.1 * largest)


@given(
    batch=st.integers(1, 3),
    size=st.one_of(st.sampled_from(SIZES), st.tuples(st.integers(1, 6), st.integers(1, 6))),
    heads=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
@all_positions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_equals_dense_truth(batch, size, heads, position, stride, seed, dtype, tolerance):
    """Values and all gradients, with prime sizes, single pixels, and strides beyond the map."""
    plugin = build(16, heads, seed, dtype, position=position, key_stride=stride)
    x = feature_map(batch, 16, *size, seed=seed, dtype=dtype)
    ours = measure(plugin, plugin, x)
    truth = measure(lambda x: dense(plugin, x), plugin.double(), x.double())
    assert all(t.dtype == dtype for t in ours)
    assert_same(ours, truth, tolerance)


@all_positions
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_within_twice_plain_pytorch(position, stride, dtype, autocast):
    plugin = build(position=position, key_stride=stride)
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


# --- Position -------------------------------------------------------------------------------------


@strides
def test_only_a_relative_code_is_blind_to_a_shift_of_all_positions(stride, monkeypatch):
    x = feature_map(1, 16, 5, 6, dtype=torch.float64)
    plugins = {p: build(position=p, dtype=torch.float64, key_stride=stride) for p in POSITIONS}
    before = {p: plugin(x) for p, plugin in plugins.items()}
    positions, shift = mhsa_plugin._positions, torch.tensor([7, -3])
    monkeypatch.setattr(
        mhsa_plugin, "_positions", lambda *size, like: positions(*size, like=like) + shift
    )
    assert_close(plugins["relative"](x), before["relative"], 1e-13)
    assert torch.equal(plugins[None](x), before[None])
    assert (plugins["sine"](x) - before["sine"]).norm() > 1e-2 * before["sine"].norm()


@all_positions
def test_only_without_position_permuting_or_transposing_pixels_does_so_to_the_result(position):
    plugin = build(position=position, dtype=torch.float64)
    x = feature_map(2, 16, 4, 5, dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))

    def permuted(x):
        return x.flatten(2)[:, :, order].view_as(x)

    for error in (plugin(permuted(x)) - permuted(plugin(x)), plugin(x.mT) - plugin(x).mT):
        assert error.norm() < 1e-12 if position is None else error.norm() > 0.1


@pytest.mark.parametrize("position", ["sine", "relative"])
def test_positions_keep_float32_in_half_precision(position):
    """bfloat16 has no numbers between 256 and 258: distant pixels would share a code."""
    plugin = build(position=position, key_stride=2, dtype=torch.bfloat16)
    x = feature_map(1, 16, 1, 600).bfloat16()
    half, exact = plugin(x), copy.deepcopy(plugin).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = plugin.float()(x.float())
    for ours in (half, cast):
        assert_close(ours.double() - x, exact - x, 0.02)


# --- Strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@strides
def test_what_is_not_finite_shows_in_its_image_alone(poison, stride):
    x = feature_map(2, 16, 4, 4)
    x[1, 3, 2, 2] = poison
    result = build(key_stride=stride)(x)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


@strides
@pytest.mark.parametrize("autocast", [True, False])
def test_the_memory_format_is_kept(stride, autocast):
    plugin = build(key_stride=stride)
    x = feature_map(2, 16, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert plugin(x).is_contiguous()
        last = x.to(memory_format=torch.channels_last)
        assert plugin(last).is_contiguous(memory_format=torch.channels_last)


def test_position_and_stride_may_change_after_training():
    """No state depends on them, nor does a call leave any."""
    plugin, x = build(), feature_map(1, 16, 5, 8)
    first = plugin(x)
    for settings in ({"key_stride": 2}, {"position": None}, {"position": "relative"}):
        other = MHSAPlugin(16, 2, **settings)
        assert other.load_state_dict(plugin.state_dict()) == ([], [])
        vars(plugin).update({"key_stride": 1, **settings})
        assert torch.equal(plugin(x), other(x))
        assert not torch.equal(plugin(x), first)
    vars(plugin).update(key_stride=1, position="sine")
    assert torch.equal(plugin(x), first)


MEASURE = """
import pathlib, sys, torch, pixdistill
def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
plugin = pixdistill.MHSAPlugin(32, 4, key_stride=int(sys.argv[1]))
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
    ("stride", "step", "mib"),
    [
        (4, (128, 256, True), 160),  # the logits of the cells take 1 GiB; 112 MiB were seen
        (1, (64, 128, False), 32),  # one matrix of logits is 256 MiB, and there are four heads
    ],
)
def test_peak_memory_holds_no_logits(stride, step, mib):
    assert int(run("-c", MEASURE, str(stride), str(step))) < mib * 2**20


# --- Initialisation -------------------------------------------------------------------------------

SETTINGS = ({}, {"position": "relative"}, {"position": None, "key_stride": 2})


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
def test_it_starts_with_the_gradient_of_one_and_learns_from_its_first_step(settings):
    torch.manual_seed(0)
    plugin = MHSAPlugin(16, 2, **settings)
    x = feature_map(2, 16, 6, 6).requires_grad_()
    weights = feature_map(2, 16, 6, 6, seed=2)
    assert torch.equal(torch.autograd.grad((plugin(x) * weights).sum(), x)[0], weights)
    target = 1 + x.detach().mean((2, 3), keepdim=True).expand_as(x)  # found in other pixels
    optimizer = torch.optim.Adam(plugin.parameters(), lr=1e-2)
    losses, reached = [], []
    for _ in range(30):
        loss = F.mse_loss(plugin(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        reached.append({n for n, p in plugin.named_parameters() if p.grad.norm() > 1e-6})
    assert reached[0] == {"out.weight", "out.bias"}
    assert {n for n, _ in plugin.named_parameters()} - {"key.bias"} <= reached[-1]
    assert losses[-1] < 0.85 * losses[0]


def test_identity_where_parameters_are_made_later():
    with torch.device("meta"):
        plugin = MHSAPlugin(16, 2)
    plugin.to_empty(device="cpu")
    for parameter in plugin.parameters():
        parameter.data.fill_(7)
    for module in plugin.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = feature_map(2, 16, 5, 7)
    assert torch.equal(plugin(x), x)
    assert not plugin.out.weight.any()
    assert all(layer.weight.std() > 0 for layer in (plugin.query, plugin.key, plugin.value))


# --- Compilation and export -----------------------------------------------------------------------


@needs_torch("2.13", "avg_pool2d(ceil_mode=True) compiles again for another remainder")
def test_compiles_once_for_all_map_sizes():
    """Under autocast, with a stride; without either in test_training_loops.py."""
    network = nn.Sequential(nn.Identity())
    plugin = build(key_stride=3)
    plug(network, "0", plugin)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(x)

    with fresh_compiler():
        counter, frames = CompileCounterWithBackend("aot_eager"), []
        compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=counter)
        for size in ((2, 9, 12), (3, 5, 7), (4, 8, 8)):
            x = feature_map(size[0], 16, *size[1:])
            ours = measure(compiled, plugin, x)
            assert_same(ours, measure(forward, plugin, x), 1e-2)
            frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@needs_torch("2.13", "avg_pool2d(ceil_mode=True) exports one remainder")
def test_a_plugged_network_exports_with_dynamic_sizes():
    network = student().eval()
    plug(network, "stem", build(position="relative", key_stride=3))
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    example = (feature_map(3, 3, 11, 13),)
    program = torch.export.export(network, example, dynamic_shapes=(dynamic,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own saving and loading
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        module = torch.export.load(file).module()
    for batch, height, width in ((2, 12, 12), (4, 25, 31), (2, 30, 9)):
        x = feature_map(batch, 3, height, width)
        assert_close(module(x), network(x), 1e-6)


class LeafTracer(torch.fx.Tracer):
    """What `create_feature_extractor(..., tracer_kwargs={"leaf_modules": [MHSAPlugin]})` builds."""

    def is_leaf_module(self, module, name):
        return isinstance(module, MHSAPlugin) or super().is_leaf_module(module, name)


def test_tracing_by_torch_fx():
    """With the plug-in as a leaf, which the error names; a traced network takes no plug-in."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), nn.Conv2d(16, 4, 1))
    traced = torch.fx.symbolic_trace(network)
    with pytest.raises(ValueError, match=r"GraphModule.*leaf_modules.*\[MHSAPlugin\]"):
        plug(traced, "0", build())
    plug(network, "0", build())
    with pytest.raises(TypeError, match=r"torch.fx.Proxy.*\[MHSAPlugin\]"):
        torch.fx.symbolic_trace(network)
    extractor = torch.fx.GraphModule(network, LeafTracer().trace(network))
    x = feature_map(2, 3, 5, 7)
    assert torch.equal(extractor(x), network(x))
    whole = nn.Sequential(traced, nn.Identity())  # a child that is traced as a whole
    plug(whole, "0", MHSAPlugin(4, 1))
    assert torch.equal(whole(x), traced(x))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments", "settings"),
    [
        ("num_heads must divide channels=16; got 3", (16, 3), {}),
        ("num_heads must divide channels=4; got 8", (4,), {}),
        ('multiple of 4 for "sine"; got 6', (6, 2), {}),
        ('multiple of 4 for "relative"; got 12 / 2', (12, 2), {"position": "relative"}),
        ("position must be one of .*got 'cosine'", (16,), {"position": "cosine"}),
        ("key_stride must be at least 1; got 0", (16,), {"key_stride": 0}),
    ],
)
def test_settings_that_do_not_fit(words, arguments, settings):
    with pytest.raises(ValueError, match=words):
        MHSAPlugin(*arguments, **settings)


@pytest.mark.parametrize(
    ("error", "words", "x"),
    [
        (ValueError, r"x must have shape \[B, 16, H, W\], .*; got \(16, 5, 7\)\.$", (16, 5, 7)),
        (ValueError, r"got \(2, 8, 5, 7\)\.$", (2, 8, 5, 7)),
        (ValueError, r"got \(2, 5, 7, 16\).*x\.permute\(0, 3, 1, 2\)", (2, 5, 7, 16)),
        (ValueError, r"got \(2, 35, 16\).*tokens_to_map\(x, grid=\(H, W\)\)", (2, 35, 16)),
        (ValueError, r"got \(2, 16, 3, 5, 7\)", (2, 16, 3, 5, 7)),
        (ValueError, r"got \(2, 16\)", (2, 16)),
        (ValueError, r"H and W at least 1; got \(2, 16, 0, 3\)", (2, 16, 0, 3)),
        (ValueError, r"H and W at least 1; got \(2, 16, 3, 0\)", (2, 16, 3, 0)),
        (TypeError, "x must be a tensor; got list", [[1.0]]),
    ],
)
def test_wrong_maps(error, words, x):
    with pytest.raises(error, match=words):
        MHSAPlugin(16)(torch.zeros(x) if isinstance(x, tuple) else x)


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

    @property
    def alias(self):
        return self.stem

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

    plugin = MHSAPlugin(16, 2)
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
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images, before = feature_map(4, 3, 8, 8), copy.deepcopy(network.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    after = copy.deepcopy(network.state_dict())
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    part = "backbone.layer2"
    assert {f"{part}.plugin.out.weight", f"{part}.plugin.query.weight", "stem.0.weight"} <= moved
    assert {f"{part}.module.0.weight", f"{part}.module.0.running_mean"} <= moved

    output = network.eval()(images)
    plugin = unplug(network, part)
    state = network.state_dict()
    assert list(state) == keys
    for key, value in state.items():
        assert torch.equal(value, after[key.replace(f"{part}.", f"{part}.module.")])
    assert not torch.allclose(network(images), output)  # what it had learned is gone
    plug(network, part, plugin)
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


def test_several_plugins_come_out_in_any_order():
    network = student().eval()
    images = feature_map(1, 3, 8, 8)
    before, keys = network(images), list(network.state_dict())
    plugins = {name: build() for name in ("blocks.0", "stem.2", "backbone.layer1")}
    for name, plugin in plugins.items():
        plug(network, name, plugin)
    assert not torch.allclose(network(images), before)
    for name in ("stem.2", "blocks.0", "backbone.layer1"):
        assert unplug(network, name) is plugins[name]
    assert list(network.state_dict()) == keys
    assert torch.equal(network(images), before)


def test_a_plugged_network_is_called_copied_and_saved():
    network = student().eval()
    plug(network, "named.shift", build())
    images = feature_map(2, 3, 12, 10)
    output = network(images)
    assert not torch.allclose(network(images, by=3.0), output)  # arguments reach the child
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), output)
        unplug(twin, "named.shift")
        assert list(twin.state_dict()) == list(student().state_dict())
    fresh = student().eval()
    plug(fresh, "named.shift", MHSAPlugin(16, 2))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(images), output)


# --- Hooks ----------------------------------------------------------------------------------------


def test_hooks_see_what_the_network_sees():
    """Hooks from before `plug`, in between and after `unplug`; each handle removes its own."""
    network = student().eval()
    child, seen, images = network.stem, {}, feature_map(2, 3, 8, 8)

    def record(name):
        return lambda module, args, *outputs: seen.update({name: (args, *outputs)[-1]})

    handles = [
        child.register_forward_hook(record("before")),
        child.register_forward_hook(
            lambda m, a, k, out: record("kwargs")(m, a, out), with_kwargs=True
        ),
        child.register_full_backward_hook(
            lambda m, inner, outer: record("backward")(m, inner, outer[0])
        ),
        child.register_forward_pre_hook(record("input")),
    ]
    plain = child(images)
    plugin = build()
    plug(network, "stem", plugin)
    handles += [network.stem.register_forward_hook(record("between"))]
    network.backbone.layer1.register_forward_pre_hook(lambda m, a: record("truth")(m, a, a[0]))
    seen.clear()
    network(images.requires_grad_()).sum().backward()
    assert not torch.allclose(seen["truth"], plain)
    assert all(torch.equal(seen[name], seen["truth"]) for name in ("before", "kwargs", "between"))
    assert torch.equal(seen["input"][0], images)
    (grad,) = torch.autograd.grad(network(images).sum(), seen["truth"])
    assert torch.equal(seen["backward"], grad)

    unplug(network, "stem")
    seen.clear()
    network(images).sum().backward()
    assert torch.equal(seen["truth"], plain)
    assert all(torch.equal(seen[name], plain) for name in ("before", "kwargs", "between"))
    assert network.stem is child
    plug(network, "stem", plugin)
    for handle in handles:
        handle.remove()
    unplug(network, "stem")
    seen.clear()
    network(images)
    assert set(seen) == {"truth"}


def test_hooks_that_only_the_child_has_stay_with_it():
    """As those by which transformers records hidden states, which are never removed."""
    network, seen, images = student().eval(), [], feature_map(1, 3, 8, 8)
    plug(network, "stem", build())
    handle = network.stem.module.register_forward_hook(lambda *call: seen.append(call[2]))
    network(images)
    recorder = network.stem.register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match=r"'stem' and 'stem\.module' must not both have"):
        unplug(network, "stem")
    recorder.remove()
    unplug(network, "stem")
    network(images)
    assert torch.equal(*seen)
    handle.remove()
    network(images)
    assert len(seen) == 2


# --- Networks in wrappers -------------------------------------------------------------------------


class Forwarding(nn.Module):
    """Forwards attributes, two levels deep, as wrappers for adapters of fine-tuning do."""

    def __init__(self, model, depth=1):
        super().__init__()
        self.base = Forwarding(model, depth - 1) if depth else model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def compiled(network):
    return torch.compile(network, backend="eager")


def compiled_in_place(network):
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (compiled, "stem"),
        (compiled, "blocks.1"),
        (compiled_in_place, "stem.0"),
        (Forwarding, "blocks.1"),
        (data_parallel, "stem.0"),
        (lambda n: compiled(Forwarding(n)), "stem"),
    ],
)
def test_a_plugin_acts_through_wrappers_also_in_compiled_code(wrap, name):
    network, images, plugin = student().eval(), feature_map(2, 3, 8, 8), build()
    before = network(images)
    expected = copy.deepcopy(network)
    plug(expected, name, plugin)
    with fresh_compiler():
        wrapped = wrap(network)
        assert_close(wrapped(images), before, 1e-6)  # compiled before it is plugged
        plug(wrapped, name, plugin)
        assert network.get_submodule(f"{name}.plugin") is plugin
        assert_close(wrapped(images), expected(images), 1e-6)
        assert (wrapped(images) - before).norm() > 1e-3
        assert unplug(wrapped, name) is plugin
        assert_close(wrapped(images), before, 1e-6)
    assert list(network.state_dict()) == list(student().state_dict())


@needs_torch("2.7", "FSDP2 does not run on a CPU")
def test_networks_that_would_not_synchronise_the_plugin_are_refused():
    results(1, _refused_networks)  # a process of its own: to destroy DDP's group can deadlock


def _refused_networks(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    images = feature_map(2, 3, 8, 8)
    mesh = {"mesh": dist.init_device_mesh("cpu", (1,))}
    wrappers = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "FSDPModule": lambda n: fully_shard(n, **mesh),
        "FullyShardedDataParallel": lambda n: FullyShardedDataParallel(
            n, device_id=torch.device("cpu")
        ),
    }
    for kind, wrap in wrappers.items():
        with pytest.raises(ValueError, match=f"not be in {kind} yet.*Plug first, then wrap"):
            plug(wrap(student()), "stem", build())
        part = student()
        part.stem = wrap(part.stem)
        with pytest.raises(ValueError, match=f"not be in {kind} yet"):
            plug(part, "stem", build())
        network = student().eval()
        before = network(images)
        plug(network, "stem", build())
        wrapped = wrap(network)
        if kind == "FullyShardedDataParallel":
            with pytest.raises(ValueError, match="flattened its parameters"):
                unplug(wrapped, "stem")
        else:
            unplug(wrapped, "stem")
            assert_close(wrapped(images), before, 1e-6)
    ddp = nn.parallel.DistributedDataParallel(student())
    with pytest.raises(ValueError, match="DistributedDataParallel yet"):
        plug(ddp, "module.stem", build())
    with pytest.raises(ValueError, match=r"Known are '_orig_mod\.module\.stem'"):
        plug(compiled(ddp), "stem", build())


def test_wrong_names_and_plugins():
    network = student()
    keys = list(network.state_dict())
    plugin = MHSAPlugin(16, 2)
    calls = [lambda name: plug(network, name, plugin), lambda name: unplug(network, name)]
    for name in (
        "layer9",
        "backbone.layer9",
        "stem.7",
        "blocks.-1",
        "stem.0.weight",
        "absent",
        "stem.",
    ):
        for call in calls:
            with pytest.raises(ValueError, match="name must be that of a child of the network"):
                call(name)
    for call in calls:
        with pytest.raises(ValueError, match=r"Known are 'backbone\.layer1'$"):
            call("layer1")
        with pytest.raises(ValueError, match=r"'alias' is another way to \['stem'\]"):
            call("alias")
        with pytest.raises(ValueError, match="got the network itself"):
            call("")
        for name in (0, None, network.stem):
            with pytest.raises(TypeError, match="name must be a string"):
                call(name)
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
