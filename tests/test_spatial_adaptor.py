"""SpatialAdaptor and L2Norm: official outputs, every layer by loops, real heads, and its own errors."""

import copy
import itertools
import math
import re
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close,
    assert_within_budget,
    data_parallel,
    fresh_compiler,
    golden,
    needs_torch,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize

from pixdistill import L2Norm, PixelHead, SpatialAdaptor

SHAPES = ((1, 1), (7, 1), (4, 5), (13,), (1,), (2, 3, 2))
HALF = (torch.bfloat16, torch.float16)


def maps(*shape, seed=0, dtype=torch.float64):
    """A random map whose mean over space is not small."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x + torch.randn(*shape[:2], *(1 for _ in shape[2:]), generator=generator)).to(dtype)


def pooled(x):
    return x.flatten(2).mean(2)


# --- The truth: a head at every pixel, by loops ---------------------------------------------------


G = {
    nn.ReLU: lambda layer, z: 1.0 if z > 0 else 0.0,
    nn.LeakyReLU: lambda layer, z: 1.0 if z > 0 else layer.negative_slope,
    nn.SiLU: lambda layer, z: 1 / (1 + math.exp(-z)),
    nn.Hardswish: lambda layer, z: min(max(z + 3, 0), 6) / 6,
    nn.GELU: lambda layer, z: 0.5 * (
        1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        if layer.approximate == "tanh"
        else math.erfc(-z / math.sqrt(2))
    ),
}  # fmt: skip
"""g of the activations z g(z)."""


def weight_of(linear):
    """The weight of a linear layer, with g v / |v| per row where it is normed."""
    if hasattr(linear, "weight_g"):
        g, v = linear.weight_g, linear.weight_v
    elif parametrize.is_parametrized(linear):
        g, v = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
    else:
        return linear.weight.detach().double()
    rows = zip(g.detach().double(), v.detach().double(), strict=True)
    return torch.stack([gain * row / row.pow(2).sum().sqrt() for gain, row in rows])


def affine_at(layer, m, v, dtype=torch.float64):
    """The layer on v with the statistics of m; the factors of matrix products rounded to `dtype`."""
    if isinstance(layer, nn.Linear):
        v = weight_of(layer).to(dtype).double() @ v.to(dtype).double()
        return v if layer.bias is None else v + layer.bias.detach().double()
    if isinstance(layer, (nn.Identity, nn.Dropout, nn.Flatten)):
        return v
    if isinstance(layer, L2Norm):
        return v / max(math.sqrt(sum(float(z) ** 2 for z in m)), layer.eps)
    if isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm)):
        centre, variance = layer.running_mean.double(), layer.running_var.double()
    elif isinstance(layer, nn.LayerNorm):
        centre = m.sum() / len(m)
        variance = sum((z - centre) ** 2 for z in m) / len(m)
    else:
        return torch.stack(
            [z * G[type(layer)](layer, float(at)) for z, at in zip(v, m, strict=True)]
        )
    v = (v - centre) / torch.sqrt(variance + layer.eps)
    v = v if layer.weight is None else v * layer.weight.detach().double()
    return v if layer.bias is None else v + layer.bias.detach().double()


def pixelwise(layers, x, plain=torch.float64):
    """The layers at every pixel in float64, or rounded to `plain` after each of them."""
    images = []
    for image in x.detach().double().flatten(2):
        m, pixels = image.sum(1) / image.shape[1], list(image.T)
        for layer in layers:
            pixels = [affine_at(layer, m, v, plain).to(plain).double() for v in pixels]
            m = affine_at(layer, m, m)
        images.append(torch.stack(pixels, dim=1))
    return torch.stack(images).unflatten(2, x.shape[2:])


def identity_error(adaptor, head, x):
    """How far adaptor(x).mean(space) is from head(x.mean(space)), relative to a pixel's size."""
    out, vector = adaptor(x).detach().double().flatten(2), head(pooled(x)).detach().double()
    assert out.shape == (*vector.shape, x.flatten(2).shape[2])
    assert out.isfinite().all()
    return float((out.mean(2) - vector).norm() / out.pow(2).mean(2).sum().sqrt().clamp_min(1e-30))


# --- Heads ----------------------------------------------------------------------------------------


def old_weight_norm(linear, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in DINO's checkpoints
        return nn.utils.weight_norm(linear, name)


WEIGHT_NORMS = {"old": old_weight_norm, "parametrized": parametrizations.weight_norm}


def settled(head, seed=0, dtype=torch.float64):
    """In eval mode and `dtype`, with norm layers as they are after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm)):
            for name, tensor in layer.state_dict().items():
                if name in ("weight", "running_var"):
                    tensor.uniform_(0.5, 2.0, generator=generator)
                elif name in ("bias", "running_mean"):
                    tensor.normal_(generator=generator)
    return head.eval().to(dtype)


class Case(NamedTuple):
    """A head, its layers in the order in which its forward runs them, and what the adaptor is given."""

    head: nn.Module
    layers: list[nn.Module]
    given: nn.Module

    def adaptor(self, **settings):
        return SpatialAdaptor(self.given, **settings)

    def map(self, batch, *spatial, seed=1, dtype=torch.float64):
        """A random map of the head's channels."""
        return maps(batch, self.adaptor().in_channels, *spatial, seed=seed, dtype=dtype)


PIECES = {
    "linear": nn.Linear,
    "linear without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "old weight norm": lambda i, o: old_weight_norm(nn.Linear(i, o)),
    "weight norm": lambda i, o: parametrizations.weight_norm(nn.Linear(i, o, bias=False)),
    "batch norm": lambda i, o: nn.BatchNorm1d(i),
    "batch norm without affine": lambda i, o: nn.BatchNorm1d(i, affine=False, eps=0.1),
    "synchronised batch norm": lambda i, o: nn.SyncBatchNorm(i),
    "layer norm": lambda i, o: nn.LayerNorm(i),
    "layer norm without bias": lambda i, o: nn.LayerNorm(i, bias=False, eps=0.1),
    "layer norm without affine": lambda i, o: nn.LayerNorm(i, elementwise_affine=False),
    "l2": lambda i, o: L2Norm(),
    "relu": lambda i, o: nn.ReLU(inplace=True),
    "leaky relu": lambda i, o: nn.LeakyReLU(0.2),
    "gelu": lambda i, o: nn.GELU(),
    "gelu tanh": lambda i, o: nn.GELU(approximate="tanh"),
    "silu": lambda i, o: nn.SiLU(),
    "hardswish": lambda i, o: nn.Hardswish(),
    "dropout": lambda i, o: nn.Dropout(0.5),
    "identity": lambda i, o: nn.Identity(),
    "flatten": lambda i, o: nn.Flatten(1),
}
LINEAR = tuple(PIECES)[:4]
NORMS = tuple(PIECES)[4:11]
ACTIVATIONS = tuple(PIECES)[11:17]


def assemble(pieces, channels, seed=0, nested=False, dtype=torch.float64):
    """A head of these (piece, width), with the widths of linear layers only; flat or nested."""
    torch.manual_seed(seed)
    layers, width = [], channels
    for name, wanted in pieces:
        outputs = wanted if name in LINEAR else width
        layers.append(PIECES[name](width, outputs))
        width = outputs
    half = len(layers) // 2
    inner = nn.Sequential(nn.Sequential(*layers[half:]), nn.Sequential())
    head = nn.Sequential(nn.Sequential(*layers[:half]), inner) if nested else nn.Sequential(*layers)
    return Case(settled(head, seed, dtype), layers, head)


class DINOHead(nn.Module):
    """mlp of GELU, l2 normalisation, a weight-normed layer of which only the direction learns."""

    def __init__(self, weight_norm, norm=None, layers=3, last_norm=None):
        super().__init__()
        between = [nn.GELU()] if norm is None else [norm, nn.GELU()]  # used after each layer
        hidden = [x for _ in range(layers - 2) for x in (*between, nn.Linear(10, 10))]
        mlp = nn.Sequential(nn.Linear(7, 10), *hidden, *between, nn.Linear(10, 6))
        self.mlp = nn.Linear(7, 6) if layers == 1 else mlp
        self.last_layer = WEIGHT_NORMS[weight_norm](nn.Linear(6, 12, bias=False))
        gain = next(p for p in self.last_layer.parameters() if p.shape == (12, 1))
        gain.requires_grad_(False).fill_(1)
        self.last_norm = last_norm or nn.Identity()  # iBOT's

    def forward(self, x):
        return self.last_norm(self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2)))


def dino(weight_norm="old", *settings, dtype, seed):
    head = settled(DINOHead(weight_norm, *settings), seed, dtype)
    mlp = [head.mlp] if isinstance(head.mlp, nn.Linear) else list(head.mlp)
    last = [] if isinstance(head.last_norm, nn.Identity) else [head.last_norm]
    given = nn.Sequential(head.mlp, L2Norm(), head.last_layer, *last)
    return Case(head, [*mlp, L2Norm(), head.last_layer, *last], given.eval())


HIDDEN = [("linear without bias", 10), ("batch norm", 0), ("relu", 0)]
BIASED = [("linear", 10), ("batch norm", 0), ("relu", 0)]
LAST = ("linear without bias", 5)
FIXED = ("batch norm without affine", 0)
HEADS = {
    "mocov3_resnet": [*HIDDEN, LAST, FIXED],
    "mocov3_vit": [("flatten", 0), *HIDDEN, *HIDDEN, LAST, FIXED],
    "byol": [*BIASED, LAST],
    "swav": [*BIASED, ("linear", 5), ("l2", 0), ("linear without bias", 12)],
    "swav_projection": [*BIASED, ("linear", 5), ("l2", 0)],
    "simclr": [("linear", 7), ("relu", 0), ("linear", 5)],
    "simclr_v2": [*HIDDEN, *HIDDEN, LAST, ("batch norm", 0)],
    "dino": lambda: (),
    "dino_parametrized": lambda: ("parametrized",),
    "dino_two_layers": lambda: ("old", None, 2),
    "dino_one_layer": lambda: ("old", None, 1),
    "ibot_bn": lambda: ("old", nn.BatchNorm1d(10)),
    "ibot_syncbn": lambda: ("old", nn.SyncBatchNorm(10)),
    "ibot_ln": lambda: ("old", nn.LayerNorm(10), 3, nn.BatchNorm1d(12, affine=False)),
}
"""Real heads, small: the pieces of one sequence, or settings of `DINOHead`."""
SOME = ("mocov3_vit", "swav", "dino", "dino_parametrized", "ibot_ln")

all_heads = pytest.mark.parametrize("name", HEADS)
some_heads = pytest.mark.parametrize("name", SOME)


def build(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    if callable(HEADS[name]):
        return dino(*HEADS[name](), dtype=dtype, seed=seed)
    return assemble(HEADS[name], 7, seed, nested=True, dtype=dtype)


# --- The official outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 5e-7)], ids=str
)
@pytest.mark.parametrize("trainable", [False, True])
def test_equals_official_outputs(name, dtype, tolerance, trainable):
    official = golden(f"pcd_spatial_adaptor_{name}")
    widths, layers = official["widths"].tolist(), []
    for count, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(inputs, outputs, bias=count % 2 == 0 and count < len(widths) - 2)]
        layers += [nn.BatchNorm1d(outputs), nn.ReLU()]
    head = nn.Sequential(*layers[:-2])
    state = {key.removeprefix("head."): v for key, v in official.items() if key.startswith("head.")}
    head.load_state_dict(state)
    adaptor = SpatialAdaptor(head.to(dtype), trainable=trainable)
    features = official["features"].to(dtype)
    assert_close(adaptor(features), official["spatial_output"], tolerance)
    assert_close(pooled(adaptor(features)), official["vector_output"], 2 * tolerance)
    assert_close(head.eval()(pooled(features)), official["vector_output"], tolerance)
    assert adaptor.widths == tuple(widths[1:])
    assert adaptor.in_channels == widths[0]


# --- Any head -------------------------------------------------------------------------------------


anything = st.lists(st.tuples(st.sampled_from(sorted(PIECES)), st.integers(2, 8)), max_size=9)
mlps = st.integers(0, 4).flatmap(
    lambda depth: st.tuples(
        *[
            st.tuples(st.tuples(st.sampled_from(kinds), st.integers(2, 9)))
            for kinds in [*[LINEAR, NORMS, ACTIVATIONS] * depth, LINEAR]
        ]
    ).map(lambda groups: [piece for group in groups for piece in group])
)
problems = st.fixed_dictionaries(
    {
        "pieces": st.one_of(mlps, anything),
        "channels": st.integers(2, 8),
        "batch": st.integers(1, 3),
        "spatial": st.sampled_from(SHAPES),
        "seed": st.integers(0, 2**16),
        "nested": st.booleans(),
    }
)


def of(problem, dtype=torch.float64):
    """The head of a problem, and a map for it."""
    settings = (problem[key] for key in ("pieces", "channels", "seed", "nested"))
    shape = (problem["batch"], problem["channels"], *problem["spatial"])
    return assemble(*settings, dtype), maps(*shape, seed=problem["seed"], dtype=dtype)


@given(problem=problems, trainable=st.booleans())
def test_identity(problem, trainable):
    """The mean over space is the head of the mean; x is left as it was, also by in-place layers."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        built, x = of(problem, dtype)
        adaptor = built.adaptor(trainable=trainable and any(True for _ in built.head.parameters()))
        before = x.clone()
        assert adaptor(x).dtype == dtype
        assert torch.equal(x, before)
        assert identity_error(adaptor, built.head, x) <= tolerance


@given(problem=problems)
def test_every_pixel_equals_the_loop(problem):
    built, x = of(problem)
    ours, truth = built.adaptor()(x), pixelwise(built.layers, x)
    assert_close(ours, truth, 1e-10 if truth.norm() > 1e-6 else 1e-6)


@given(problem=problems, seed=st.integers(0, 99))
def test_permuting_pixels_and_images_permutes_the_result(problem, seed):
    built, x = of(problem)
    adaptor = built.adaptor()
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randperm(x.flatten(2).shape[2], generator=generator)
    images = torch.randperm(x.shape[0], generator=generator)
    moved = x[images].flatten(2)[..., pixels].view(x.shape)
    expected = adaptor(x)[images].flatten(2)[..., pixels]
    assert_close(adaptor(moved).flatten(2), expected, 1e-10)


def test_the_comparison_fails_where_the_identity_does():
    built = build("mocov3_vit")
    x = built.map(2, 4, 5)

    def plain(x):
        rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
        return built.head(rows).view(2, 20, -1).transpose(1, 2)

    assert identity_error(built.adaptor(), built.head, x) < 1e-14
    assert identity_error(plain, built.head, x) > 0.01
    assert identity_error(lambda x: built.adaptor()(x) * (1 + 1e-9), built.head, x) > 1e-11


# --- The layers one by one ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_equal_the_loop(name, dtype):
    levels = torch.tensor([-40.0, -7.0, -2.99, -0.7, -1e-3, 1e-3, 0.5, 2.99, 3.01, 6.0, 40.0])
    x = (levels.to(dtype).view(1, 11, 1) + torch.tensor([-1.5, 0.25, 1.25])).flip(0)
    layer = PIECES[name](11, 11)
    ours, rounding = SpatialAdaptor(nn.Sequential(layer))(x), torch.finfo(dtype).eps
    for channel, pixels in enumerate(x[0].double()):
        g = G[type(layer)](layer, float(pixels.sum() / 3))
        error = (ours[0, channel] - g * pixels).abs().max()
        assert error <= 4 * rounding * pixels.abs().max()
    assert identity_error(SpatialAdaptor(layer), layer, x) < 4 * rounding


@pytest.mark.parametrize(
    ("name", "level"), [("relu", 0), ("leaky relu", 0), ("hardswish", -3), ("hardswish", 3)]
)
def test_activations_at_their_kinks(name, level):
    x = (level + torch.tensor([-1.5, 0.25, 1.5, -0.25])).expand(2, 3, 4)  # the mean is exact
    layer = PIECES[name](3, 3)
    out = SpatialAdaptor(layer)(x)
    assert_close(out, x.double() * G[type(layer)](layer, level), 1e-6)
    assert (out.mean(2) - layer(x.mean(2))).abs().max() < 1e-7


@pytest.mark.parametrize("slope", [0.0, 1e-4, 0.01, 1.0, 3.0, -0.5])
def test_leaky_relu_takes_any_slope_to_rounding(slope):
    x = -maps(2, 3, 5, seed=1, dtype=torch.float32).abs()
    adaptor = SpatialAdaptor(nn.Sequential(nn.LeakyReLU(slope)))
    assert torch.equal(adaptor(x), x * slope)
    assert torch.equal(adaptor(-x), -x)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("spatial", SHAPES, ids=str)
def test_norms_equal_the_loop(name, spatial):
    counts = (1, 2, 7) if spatial == (4, 5) else (2, 7)
    for channels, dtype in itertools.product(counts, (torch.float64, torch.float32)):
        layer = settled(PIECES[name](channels, channels), seed=2, dtype=dtype)
        x = maps(2, channels, *spatial, seed=3, dtype=dtype)
        x += torch.arange(channels).view(-1, *(1 for _ in spatial)) * 3  # LayerNorm divides by this
        tolerance = (20 if channels > 1 else 2000) * torch.finfo(dtype).eps
        assert_close(SpatialAdaptor(layer)(x), pixelwise([layer], x), tolerance)
        assert identity_error(SpatialAdaptor(layer), layer, x) < tolerance


@pytest.mark.parametrize("eps", [1e-12, 0.5, 10.0])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])
def test_l2_norm_keeps_its_epsilon(eps, size):
    x = maps(2, 4, 3, seed=1) * size
    layer = L2Norm(eps)
    assert torch.equal(layer(pooled(x)), F.normalize(pooled(x), dim=-1, eps=eps))
    for wrong in ("small", -eps):
        with pytest.raises((TypeError, ValueError), match="eps must be a"):
            L2Norm(wrong)
    assert_close(SpatialAdaptor(nn.Sequential(layer))(x), pixelwise([layer], x), 1e-12)
    assert identity_error(SpatialAdaptor(nn.Sequential(layer)), layer, x) < 1e-15


def test_l2_norm_module():
    x = maps(3, 4, 5, seed=1)
    rows = torch.stack([v / v.pow(2).sum().sqrt() for v in x.flatten(0, 1)]).view(3, 4, 5)
    assert_close(L2Norm()(x), rows, 1e-14)
    assert torch.equal(L2Norm()(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert L2Norm().state_dict() == {}
    assert (repr(L2Norm()), repr(L2Norm(0.5))) == ("L2Norm(eps=1e-12)", "L2Norm(eps=0.5)")


def test_layers_that_do_nothing_return_the_map():
    x = maps(2, 4, 3, 5)
    for flatten in (nn.Flatten(1), nn.Flatten(), nn.Flatten(-1), nn.Flatten(1, 1)):
        head = nn.Sequential(flatten, nn.Identity(), nn.Dropout(0.9), nn.Sequential()).train()
        assert torch.equal(SpatialAdaptor(head).train()(x), x)
    assert torch.equal(SpatialAdaptor(nn.Sequential())(x), x)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *NORMS])
def test_a_single_layer_keeps_channels_last_and_dtype(name):
    built = assemble([(name, 0)], 4, 0)
    x = maps(2, 4, 3, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert built.adaptor()(last).is_contiguous(memory_format=torch.channels_last)
    for dtype in HALF:
        x = maps(2, 4, 3, 5, dtype=dtype)
        built = assemble([(name, 0)], 4, 0, dtype=dtype)
        truth = pixelwise(built.layers, x)
        assert built.adaptor()(x).dtype == dtype
        assert_close(built.adaptor()(x), truth, torch.finfo(dtype).eps / 2)
        built.head.float()
        with torch.autocast("cpu", dtype=dtype):
            out = built.adaptor()(x.float())
        assert out.dtype == torch.float32
        assert_close(out, truth, 1e-5)


def test_subclasses_and_widths():
    """A subclass without a forward of its own is what it inherits; the first fixed width counts."""

    class Projector(nn.Sequential):
        pass

    class Named(nn.Linear):
        pass

    head = Projector(Named(4, 3), nn.ReLU()).double()
    assert identity_error(SpatialAdaptor(head), head, maps(2, 4, 3)) < 1e-14
    for layer in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4), Named(4, 9)):
        adaptor = SpatialAdaptor(nn.Sequential(nn.ReLU(), layer, L2Norm()))
        assert (adaptor.in_channels, adaptor.widths) == (4, (9,) if type(layer) is Named else ())
    assert SpatialAdaptor(nn.Sequential(nn.ReLU(), L2Norm())).in_channels is None


# --- Real heads -----------------------------------------------------------------------------------


@all_heads
@pytest.mark.parametrize("trainable", [False, True])
def test_real_heads_equal_the_loop_and_keep_the_identity(name, trainable):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        built = build(name, dtype)
        adaptor = built.adaptor(trainable=trainable)
        for shape in ((2, 4, 3), (1, 1, 1), (2, 7), (1, 2, 2, 3)):
            x = built.map(*shape, dtype=dtype)
            assert identity_error(adaptor, built.head, x) <= tolerance
            assert_close(adaptor(x), pixelwise(built.layers, x), 10 * tolerance)
            assert adaptor(x.requires_grad_()).requires_grad == trainable
    linear = [layer for layer in built.layers if isinstance(layer, nn.Linear)]
    assert adaptor.widths == tuple(layer.out_features for layer in linear)
    assert adaptor.in_channels == linear[0].in_features


@all_heads
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_image_alone(name, value):
    built = build(name)
    x = built.map(3, 3, 4)
    expected = built.adaptor()(x)
    x[1, 2, 0, 3] = value
    out = built.adaptor()(x)
    assert_close(out[[0, 2]], expected[[0, 2]], 1e-15)
    if math.isnan(value):
        assert out[1, ..., 0, 3].isnan().all()  # and so the mean is, as the head of the mean is
    assert not pooled(out)[1].isfinite().any()


# --- What cannot be adapted -----------------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnNorm(nn.BatchNorm1d):
    """As iBOT's csyncbn, which replaces its statistics."""

    def forward(self, x):
        self.running_var = torch.ones_like(self.running_var)
        return super().forward(x)


class Twofold(nn.Module):
    """A head of its own class without DINO's names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)


class AddsTo(nn.Module):
    """A layer with a low-rank update beside it, by the name that it has in PEFT."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(4, 4)


def with_hook(layer, kind="forward_hook"):
    getattr(layer, f"register_{kind}")(lambda *arguments: None)
    return layer


def compiled(module):
    return torch.compile(module, backend="eager")


def with_own_forward(layer):
    layer.forward = lambda x: x
    return layer


KNOWN = (
    "known are Linear, Identity, Dropout, Flatten, BatchNorm1d, SyncBatchNorm, LayerNorm, L2Norm, "
    "ReLU, LeakyReLU, GELU, SiLU, Hardswish and nn.Sequential"
)
ORDER = "the order in which its forward runs its layers is not known. Pass them in that order, "
NORMALISE = ", with L2Norm() where forward calls F.normalize"
OWN = "has a forward set on the instance, which the adaptor would not run"
HOOK = "has a hook, which the adaptor would not run; remove it first"

LEAVES = (
    *(nn.Tanh, nn.Sigmoid, nn.ELU, nn.ReLU6, nn.RReLU, nn.AlphaDropout),
    *(lambda: nn.Softmax(dim=1), lambda: nn.Conv2d(4, 4, 1), lambda: nn.GroupNorm(2, 4)),
    *(lambda: nn.Bilinear(4, 4, 4), lambda: OwnLinear(4, 4), lambda: OwnNorm(4)),
)
UNKNOWN = [
    *((make, KNOWN) for make in LEAVES),
    (lambda: nn.ModuleList([nn.Linear(4, 4)]), f"{ORDER}nn.Sequential(*HEAD){NORMALISE}"),
    (lambda: OwnForward(nn.Linear(4, 4)), f"{ORDER}nn.Sequential(*HEAD){NORMALISE}"),
    (lambda: Twofold(), f"{ORDER}nn.Sequential(HEAD.first, HEAD.second){NORMALISE}"),
    (
        lambda: DINOHead("old"),
        f"{ORDER}nn.Sequential(HEAD.mlp, L2Norm(), HEAD.last_layer, HEAD.last_norm){NORMALISE}",
    ),
    (lambda: compiled(nn.Linear(4, 4)), "it wraps another module; pass HEAD._orig_mod"),
    (lambda: data_parallel(nn.Linear(4, 4)), "it wraps another module; pass HEAD.module"),
    (
        lambda: AddsTo(nn.Linear(4, 4)),
        "it changes what HEAD.base_layer computes; merge it into that first",
    ),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), "it has no running statistics"),
    (lambda: nn.SyncBatchNorm(4, track_running_stats=False), "it has no running statistics"),
    (lambda: nn.LayerNorm((4, 2)), "it normalises over more than the channels"),
    (lambda: nn.Flatten(0), "only nn.Flatten(1) leaves a vector as it is"),
    (lambda: nn.Flatten(1, 2), "only nn.Flatten(1) leaves a vector as it is"),
]
REFUSED = [
    (lambda: with_hook(nn.Linear(4, 4)), HOOK),
    (lambda: with_hook(nn.ReLU(), "forward_pre_hook"), HOOK),
    (lambda: with_hook(nn.Sequential(nn.ReLU())), HOOK),
    (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), HOOK),
    (lambda: old_weight_norm(nn.LayerNorm(4)), HOOK),
    (lambda: old_weight_norm(nn.Linear(4, 4), "bias"), HOOK),
    (lambda: with_own_forward(nn.Linear(4, 4)), OWN),
]


@pytest.mark.parametrize(
    ("make", "words"),
    [*((make, f"cannot be adapted exactly: {words}") for make, words in UNKNOWN), *REFUSED],
)
def test_what_cannot_be_adapted_is_named_with_its_path_and_a_remedy(make, words):
    nested = nn.Sequential()
    nested.add_module("mlp", nn.Sequential(nn.Linear(4, 4), make()))
    for head, path, code in ((nested, "head.mlp.1", "head.mlp[1]"), (make(), "head", "head")):
        layer = head.mlp[1] if head is nested else head
        message = f"{path} ({type(layer).__name__}) {words.replace('HEAD', code)}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            SpatialAdaptor(head)


@pytest.mark.parametrize("weight_norm", WEIGHT_NORMS)
def test_the_remedy_of_the_error_is_right(weight_norm):
    """It is written with the head's own names, also where the head is part of another one."""
    built = build("dino" if weight_norm == "old" else "dino_parametrized")
    x = built.map(2, 3, 4)
    for head in (built.head, nn.Sequential(nn.Sequential(built.head))):
        with pytest.raises(TypeError) as caught:
            SpatialAdaptor(head)
        written = re.search(r"nn\.Sequential\(.*L2Norm\(\), [^)]*\)", str(caught.value)).group()
        adaptor = SpatialAdaptor(eval(written, {"nn": nn, "L2Norm": L2Norm, "head": head}))
        assert torch.equal(adaptor(x), built.adaptor()(x))
        assert identity_error(adaptor, built.head, x) < 1e-13


@pytest.mark.parametrize("wrap", [compiled, data_parallel])
def test_the_remedy_for_a_wrapped_head_is_right(wrap):
    built = build("byol")
    with pytest.raises(TypeError, match=r"pass head\.\w+$") as caught:
        SpatialAdaptor(wrap(built.head))
    bare = eval(str(caught.value).rpartition("pass ")[2], {"head": wrap(built.head)})
    assert bare is built.head
    built.head.compile(backend="eager")  # in place: there is no wrapper
    assert identity_error(SpatialAdaptor(built.head), built.head, built.map(2, 3)) < 1e-13


def test_backward_hooks_change_nothing_and_are_taken():
    head = with_hook(nn.Sequential(nn.Linear(4, 3)), "full_backward_hook").double()
    assert identity_error(SpatialAdaptor(head), head, maps(2, 4, 3)) < 1e-14


@pytest.mark.parametrize("head", [None, "head", F.relu, nn.Linear])
def test_a_head_must_be_a_module(head):
    with pytest.raises(
        TypeError, match=r"^head must be a module; got (NoneType|str|function|type)$"
    ):
        SpatialAdaptor(head)


@pytest.mark.parametrize("head", [nn.Linear(4, 4).requires_grad_(False), nn.Sequential(nn.ReLU())])
def test_trainable_needs_something_to_train(head):
    words = "trainable=True, but no parameter of head requires a gradient; call head.requires_grad_"
    with pytest.raises(ValueError, match=re.escape(words)):
        SpatialAdaptor(head, trainable=True)
    SpatialAdaptor(head)


def test_layers_put_into_the_head_afterwards_are_run_or_named():
    """convert_sync_batchnorm replaces each BatchNorm of a model; the old ones are then not loaded."""
    built, other = build("mocov3_vit"), build("mocov3_vit", seed=1)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleList([built.adaptor()]))
    adaptor = model.float().double()[0]
    assert not any(isinstance(module, nn.BatchNorm1d) for module in adaptor.modules())
    adaptor.load_state_dict(other.adaptor().state_dict())
    x = built.map(2, 3, 4)
    assert_close(adaptor(x), other.adaptor()(x), 1e-15)

    adaptor = SpatialAdaptor(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3))))
    adaptor.head.append(nn.ReLU())
    assert (adaptor(torch.randn(2, 4, 3, 3)).mean((2, 3)) >= -1e-6).all()
    adaptor.head[1][0] = OwnLinear(4, 3)
    with pytest.raises(TypeError, match=r"head\.1\.0 \(OwnLinear\) cannot be adapted exactly"):
        adaptor(torch.randn(2, 4, 3, 3))
    adaptor.head = nn.Tanh()
    with pytest.raises(TypeError, match=r"head \(Tanh\) cannot be adapted exactly"):
        adaptor(torch.randn(2, 4, 3, 3))


CALL = "x must have shape [B, 4, *spatial] with one to three axes of at least 1; got "


@pytest.mark.parametrize(
    ("words", "x"),
    [
        (f"{CALL}(2, 4).", torch.ones(2, 4)),
        (f"{CALL}(2, 4, 1, 1, 1, 1).", torch.ones(2, 4, 1, 1, 1, 1)),
        (f"{CALL}(2, 5, 3, 3).", torch.ones(2, 5, 3, 3)),
        (f"{CALL}(2, 4, 3, 0).", torch.ones(2, 4, 3, 0)),
        (f"{CALL}(2, 9, 4). For the tokens of a ViT, use tokens_to_map(x, grid=(H, W)).",
         torch.ones(2, 9, 4)),
        ("write x.permute(0, 4, 1, 2, 3).", torch.ones(2, 3, 3, 3, 4)),
    ],
)  # fmt: skip
def test_wrong_maps(words, x):
    head = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
    for adaptor in (SpatialAdaptor(head), SpatialAdaptor(head, trainable=True)):
        with pytest.raises(ValueError, match=re.escape(words) + "$"):
            adaptor(x)
    with pytest.raises(ValueError, match=re.escape("x must have shape [B, C, *spatial] with one")):
        SpatialAdaptor(nn.Sequential(nn.ReLU()))(torch.ones(2, 4))


def test_tracing_by_torch_fx_names_the_class_to_keep_as_a_leaf():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), SpatialAdaptor(nn.Linear(4, 2)))
    with pytest.raises(TypeError, match=r'tracer_kwargs=\{"leaf_modules": \[SpatialAdaptor\]\}'):
        torch.fx.symbolic_trace(network)


# --- Frozen by default ----------------------------------------------------------------------------


@all_heads
def test_frozen_teacher_stays_bit_identical_while_a_surrounding_model_trains(name):
    class Distiller(nn.Module):
        def __init__(self):
            super().__init__()
            self.adaptor = built.adaptor()
            self.backbone = nn.Conv2d(3, self.adaptor.in_channels, 3, padding=1)
            self.student = PixelHead.like(self.adaptor, 3)

        def forward(self, images):
            return (self.student(images) - self.adaptor(self.backbone(images))).pow(2).mean()

    built = build(name, torch.float32)
    built.head.train()
    model = Distiller().train()
    before = copy.deepcopy(model.state_dict())
    images = maps(2, 3, 5, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
    assert model.adaptor.training
    assert not any(module.training for module in model.adaptor.head.modules())
    assert model.adaptor.eval() is model.adaptor
    assert not model.adaptor.training
    assert not any(parameter.requires_grad for parameter in model.adaptor.parameters())
    assert model.backbone.weight.grad is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("student.")), key
    x = built.map(2, 3, 4, dtype=torch.float32).requires_grad_()
    assert torch.equal(model.adaptor(x), built.adaptor().eval()(x))
    model.requires_grad_()  # as a surrounding model's would
    assert model.adaptor(x).grad_fn is None
    assert torch.is_grad_enabled()


def test_no_grad_and_meta_maps():
    adaptor = build("byol").adaptor(trainable=True)
    with torch.no_grad():
        assert not adaptor(maps(2, 7, 3)).requires_grad
    assert adaptor(maps(2, 7, 3)).requires_grad
    with torch.device("meta"):
        assert SpatialAdaptor(DINOHead("old").last_layer)(torch.empty(2, 6, 3, 5)).is_meta


def test_dropout_and_statistics_are_those_of_eval_mode_when_trainable_too():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x = maps(3, 4, 5, dtype=torch.float32)
    adaptor = SpatialAdaptor(head, trainable=True).train()
    assert_close(adaptor(x), adaptor(x), 0)
    adaptor(x).sum().backward()
    assert torch.equal(adaptor.head[1].running_mean, torch.zeros(6))
    assert adaptor.head[1].num_batches_tracked == 0
    assert identity_error(adaptor, head.eval(), x) < 1e-6


# --- Trainable ------------------------------------------------------------------------------------


SMOOTH = ("weight norm", "batch norm", "gelu", "linear", "layer norm", "silu", "gelu tanh", "l2")
KINKED = ("linear", "synchronised batch norm", "relu", "linear", "leaky relu", "old weight norm",
          "hardswish", "layer norm without bias", "linear without bias")  # fmt: skip


@pytest.mark.parametrize("names", [SMOOTH, KINKED], ids=["smooth", "kinked"])
@pytest.mark.parametrize("spatial", [(2, 3), (1, 2, 1)], ids=str)
def test_gradients_of_input_and_parameters(names, spatial):
    built = assemble([(name, 4) for name in names], 3, seed=1, nested=True)
    adaptor = built.adaptor(trainable=True)
    names, parameters = zip(*adaptor.named_parameters(), strict=True)
    x = maps(2, 3, *spatial, seed=2).requires_grad_()
    m, near = pooled(x.detach()), []
    for layer in built.layers:  # finite differences must not step over a kink
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Hardswish)):
            near += [(m - kink).abs().min() for kink in (0, 3, -3)]
        m = layer(m)
    assert not near or min(near) > 1e-3

    def run(x, *values):
        return torch.func.functional_call(adaptor, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert len(parameters) == len(list(built.head.parameters()))


@all_heads
def test_gradients_are_those_of_the_head_on_the_pooled_map(name):
    built = build(name)
    adaptor = built.adaptor(trainable=True).train()
    x = built.map(2, 3, 4).requires_grad_()
    m = pooled(x.detach()).requires_grad_()
    vector = built.head(m)
    cotangent = maps(*vector.shape, seed=5)
    (pooled(adaptor(x)) * cotangent).sum().backward()
    (vector * cotangent).sum().backward()
    assert_close(x.grad, m.grad.view(*m.shape, 1, 1).expand_as(x) / 12, 1e-11)
    truths = dict(built.given.named_parameters())
    for key, parameter in adaptor.head.named_parameters():
        assert parameter.requires_grad == truths[key].requires_grad  # some are frozen
        assert (parameter.grad is None) == (truths[key].grad is None), key
        if parameter.grad is not None and truths[key].grad.norm() > 1e-12:
            assert_close(parameter.grad, truths[key].grad, 1e-9)


# --- It copies ------------------------------------------------------------------------------------


@all_heads
@pytest.mark.parametrize("trainable", [False, True])
def test_it_copies_and_leaves_the_head_as_it_was(name, trainable):
    built = build(name)
    x = built.map(2, 3, 4)
    built.given.train()
    next(layer for layer in built.layers if isinstance(layer, nn.Linear)).eval()
    flags = {key: value.requires_grad for key, value in built.given.named_parameters()}
    modes = {key: module.training for key, module in built.given.named_modules()}
    state = copy.deepcopy(built.given.state_dict())
    adaptor = built.adaptor(trainable=trainable)
    before = adaptor(x).detach()
    assert {key: value.requires_grad for key, value in built.given.named_parameters()} == flags
    assert {key: module.training for key, module in built.given.named_modules()} == modes
    assert list(adaptor.state_dict()) == [f"head.{key}" for key in state]
    for key, value in built.given.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.data_ptr() != adaptor.state_dict()[f"head.{key}"].data_ptr()
    with torch.no_grad():
        for value in adaptor.state_dict().values():
            value.zero_()
        assert all(torch.equal(v, state[key]) for key, v in built.given.state_dict().items())
        adaptor.load_state_dict({f"head.{key}": value for key, value in state.items()})
        for value in built.given.state_dict().values():
            value.zero_()
    assert torch.equal(adaptor(x), before)


def test_a_head_that_was_just_run_with_gradients_is_copied():
    """The old weight norm then holds a weight with a graph, which deepcopy refuses."""
    for name in ("dino", "ibot_ln"):
        built = build(name)
        x = built.map(2, 3)
        built.head(pooled(x)).sum().backward()
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(built.head)
        assert identity_error(built.adaptor(), built.head, x) < 1e-13


@all_heads
def test_weights_that_change_later_are_used(name):
    """Loaded, copied, trained and converted, weight-normed ones too."""
    built, other = build(name, torch.float32), build(name, torch.float32, seed=1)
    x = built.map(2, 3, 4, dtype=torch.float32)
    adaptor = other.adaptor(trainable=True)
    before = adaptor(x).detach()
    adaptor.load_state_dict(built.adaptor().state_dict())
    assert torch.equal(adaptor(x), built.adaptor()(x))
    twin = copy.deepcopy(adaptor)
    adaptor(x).square().sum().backward()
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.sub_(0 if parameter.grad is None else 0.1 * parameter.grad)
    assert not torch.equal(adaptor(x), before)
    assert identity_error(adaptor, adaptor.head, x) < 5e-6
    assert torch.equal(twin(x), built.adaptor()(x))
    assert identity_error(twin.double(), built.head.double(), x.double()) < 1e-13


# --- Precision and layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@given(depth=st.integers(0, 3), data=st.data(), seed=st.integers(0, 2**16))
def test_low_precision_stays_inside_the_error_budget(dtype, autocast, depth, data, seed):
    kinds = [*[LINEAR, NORMS, ACTIVATIONS] * depth, LINEAR]
    pieces = [(data.draw(st.sampled_from(kind)), 8) for kind in kinds]
    given_dtype = torch.float32 if autocast else dtype
    built = assemble(pieces, 8, seed, dtype=given_dtype)
    x = maps(3, 8, 4, 3, seed=seed, dtype=given_dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = built.adaptor()(x)
    assert out.dtype == dtype
    truth = pixelwise(built.layers, x)
    assert_within_budget(out, pixelwise(built.layers, x, dtype), truth, torch.finfo(dtype).eps)
    assert (
        identity_error(lambda x: out, built.head.double(), x.double()) < 4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@some_heads
def test_gradients_under_autocast_are_near_those_in_float32(name, dtype):
    built = build(name, torch.float32)
    adaptor = built.adaptor(trainable=True)
    x = built.map(2, 3, 4, dtype=torch.float32).requires_grad_()
    grads = []
    for enabled in (False, True):
        leaves = [x, *(p for p in adaptor.parameters() if p.requires_grad)]
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = adaptor(x)
        weights = torch.linspace(1, 2, out.numel()).view_as(out)
        grads.append(torch.autograd.grad((out.float() * weights).sum(), leaves))
        assert all(grad.dtype == torch.float32 for grad in grads[-1])
    for exact, half in zip(*grads, strict=True):
        assert relative_error(half, exact) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2.0**-10), (torch.float16, 2.0**-13)], ids=str
)
def test_gates_are_decided_in_float32_under_autocast(dtype, step):
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data[:] = torch.tensor([[1 + step, -1.0]])  # in half precision: [1, -1]
    adaptor = SpatialAdaptor(nn.Sequential(linear, nn.ReLU()))
    x = torch.tensor([[[3.0, -1.0], [1.0, 1.0]]])
    with torch.autocast("cpu", dtype=dtype):
        assert_close(adaptor(x), torch.tensor([[[2.0, -2.0]]]), 1e-2)


def test_means_of_float16_maps_are_float32():
    tiny = torch.tensor([[[6e-8, 0.0, 0.0, 0.0]]], dtype=torch.float16)  # the mean leaves float16
    assert torch.equal(SpatialAdaptor(nn.Sequential(nn.ReLU()))(tiny), tiny)
    large = torch.full((1, 2, 3), 6e4, dtype=torch.float16)
    large[:, 1] = -6e4
    out = SpatialAdaptor(nn.Sequential(L2Norm(), nn.LayerNorm(2)))(large)
    assert_close(out, torch.tensor([1.0, -1.0]).view(1, 2, 1).expand(1, 2, 3), 1e-3)
    large += 2e3  # shifts of the fused step leave float16 too
    out = SpatialAdaptor(nn.Sequential(nn.LayerNorm(2)))(large)
    assert_close(out, torch.tensor([1.0, -1.0]).view(1, 2, 1).expand(1, 2, 3), 1e-3)


@some_heads
def test_float64_stays_float64_under_autocast(name):
    built = build(name)
    x = built.map(2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = built.adaptor()(x)
    assert out.dtype == torch.float64
    assert torch.equal(out, built.adaptor()(x))


@pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=str)
def test_the_map_may_have_another_dtype_than_the_head(dtype):
    head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = SpatialAdaptor(head)(x)
    assert ours.dtype == dtype
    assert_close(ours, SpatialAdaptor(head)(x.float()), 2e-2 if dtype != torch.float64 else 1e-5)


@pytest.mark.parametrize("name", [*SOME, "byol"])
@pytest.mark.parametrize("autocast", [False, True])
def test_channels_last_is_kept(name, autocast):
    """The last layer is a norm, a norm of m, or a linear one."""
    built = build(name, torch.float32)
    x = built.map(2, 3, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = built.adaptor()(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert built.adaptor()(x).is_contiguous()


# --- torch.compile and torch.export ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "autocast"),
    [("mocov3_vit", False), ("ibot_ln", True), ("dino", False), ("dino_parametrized", True)],
)
def test_compiles_once_for_all_map_sizes(name, autocast):
    built = build(name, torch.float32)
    adaptor = built.adaptor()
    with fresh_compiler(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        counter, frames = CompileCounterWithBackend("eager"), []
        compiled = torch.compile(adaptor, fullgraph=True, dynamic=True, backend=counter)
        for size in ((2, 3, 4), (3, 5, 7), (4, 2, 11)):
            x = built.map(*size, dtype=torch.float32)
            assert_close(compiled(x), adaptor(x), 1e-2 if autocast else 5e-6)
            frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@needs_torch("2.7", "export fixes a size")
def test_exports_with_dynamic_sizes():
    built = build("dino", torch.float32)
    adaptor = built.adaptor()
    sizes = [{0: torch.export.Dim("b", min=1, max=64), 2: torch.export.Dim("h", min=2, max=512)}]
    program = torch.export.export(
        adaptor, (built.map(2, 3, 4, dtype=torch.float32),), dynamic_shapes=sizes
    )
    assert set(program.state_dict) <= set(adaptor.state_dict())
    x = built.map(5, 6, 4, seed=3, dtype=torch.float32)
    assert_close(program.module()(x), adaptor(x), 1e-6)
