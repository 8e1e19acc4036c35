"""SpatialAdaptor, L2Norm, PixelHead and tokens_to_map: official outputs, loops, identities and edges."""

import copy
import itertools
import math
import pickle
import re
import shutil
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_within_budget, fresh_compiler, golden, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize

from pixdistill import L2Norm, PixelHead, SpatialAdaptor, tokens_to_map

SHAPES = ((1, 1), (7, 1), (4, 5), (13,), (1,), (2, 3, 2))
MAP_SIZES = ((2, 3, 4), (3, 5, 7), (4, 2, 11))  # batch, height and width
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
    """The weight of a linear layer, with g v / |v| a row where it is normed."""
    if hasattr(linear, "weight_g"):
        g, v = linear.weight_g, linear.weight_v
    elif parametrize.is_parametrized(linear):
        g, v = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
    else:
        return linear.weight.detach().double()
    rows = zip(g.detach().double(), v.detach().double(), strict=True)
    return torch.stack([gain * row / row.pow(2).sum().sqrt() for gain, row in rows])


def affine_at(layer, m, v, dtype=torch.float64):
    """What the layer makes of v where its statistic is that of m; products of numbers in `dtype`."""
    if isinstance(layer, nn.Linear):
        v = weight_of(layer).to(dtype).double() @ v.to(dtype).double()
        return v if layer.bias is None else v + layer.bias.detach().double()
    if isinstance(layer, (nn.Identity, nn.Dropout)):
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
    """How far adaptor(x).mean(space) is from head(x.mean(space)), in units of a pixel's size."""
    out, vector = adaptor(x).detach().double().flatten(2), head(pooled(x)).detach().double()
    assert out.shape == (*vector.shape, x.flatten(2).shape[2])
    assert out.isfinite().all()
    return float((out.mean(2) - vector).norm() / out.pow(2).mean(2).sum().sqrt().clamp_min(1e-30))


# --- Heads ----------------------------------------------------------------------------------------


def older_weight_norm(linear):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # it is deprecated, and in DINO's checkpoints
        return nn.utils.weight_norm(linear)


WEIGHT_NORMS = {"older": older_weight_norm, "parametrized": parametrizations.weight_norm}


def settled(head, seed=0, dtype=torch.float64):
    """In eval mode and `dtype`, with norm layers as they are after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in head.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm)):
            tensors = {name: getattr(layer, name, None) for name in ("weight", "running_var")}
            for tensor in filter(lambda t: t is not None, tensors.values()):
                tensor.data.uniform_(0.5, 2.0, generator=generator)
            tensors = {name: getattr(layer, name, None) for name in ("bias", "running_mean")}
            for tensor in filter(lambda t: t is not None, tensors.values()):
                tensor.data.normal_(generator=generator)
    return head.eval().to(dtype)


class Case(NamedTuple):
    """A head, its layers in the order in which its forward runs them, and what `order` needs."""

    head: nn.Module
    layers: list[nn.Module]
    order: dict | None = None

    def adaptor(self, **settings):
        return SpatialAdaptor(self.head, order=self.order, **settings)


def case(*layers):
    return Case(nn.Sequential(*layers), list(layers))


def mocov3(layers, in_dim=7, mlp_dim=10, dim=5, last_bn=True):
    """No biases, BatchNorm and ReLU after hidden layers, BatchNorm without affine after the last."""
    widths = [in_dim, *[mlp_dim] * (layers - 1), dim]
    mlp = []
    for inputs, outputs in itertools.pairwise(widths):
        mlp += [
            nn.Linear(inputs, outputs, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
        ]
    mlp[-2:] = [nn.BatchNorm1d(dim, affine=False)] if last_bn else []
    return case(*mlp)


def byol():
    """The last layer is without bias."""
    return case(nn.Linear(7, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5, bias=False))


def swav(prototypes=True):
    """Projection, l2 normalisation, prototypes."""
    projection = nn.Sequential(
        nn.Linear(7, 10), nn.BatchNorm1d(10), nn.ReLU(inplace=True), nn.Linear(10, 5)
    )
    parts = [projection, L2Norm(), *([nn.Linear(5, 12, bias=False)] if prototypes else [])]
    return Case(nn.Sequential(*parts), [*projection, *parts[1:]])


def barlow_twins():
    """Three layers without biases, and the BatchNorm without affine of its loss."""
    hidden = [
        [nn.Linear(inputs, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(inplace=True)]
        for inputs in (7, 10)
    ]
    projector = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(10, 10, bias=False))
    bn = nn.BatchNorm1d(10, affine=False)
    return Case(nn.Sequential(projector, bn), [*projector, bn])


def simclr():
    return case(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 5))


def simclr_v2():
    """Three layers without biases, BatchNorm after each; the last one's has no shift."""
    built = mocov3(3)
    built.layers[-1] = built.head[-1] = nn.BatchNorm1d(5)
    nn.init.zeros_(built.head[-1].bias).requires_grad_(False)
    return built


class DINOHead(nn.Module):
    """mlp of GELU, l2 normalisation, a weight-normed layer of which only the direction learns."""

    def __init__(
        self, weight_norm, norm=None, layers=3, out_dim=12, last_norm=None, mlp_class=None
    ):
        super().__init__()
        parts = [nn.Linear(7, 10)]
        between = [norm] if norm is not None else []
        gelu = nn.GELU()
        for _ in range(layers - 2):
            parts += [*between, gelu, nn.Linear(10, 10)]
        parts += [*between, gelu, nn.Linear(10, 6)]
        self.mlp = nn.Linear(7, 6) if layers == 1 else (mlp_class or nn.Sequential)(*parts)
        self.last_layer = weight_norm(nn.Linear(6, out_dim, bias=False))
        gain = next(p for p in self.last_layer.parameters() if p.shape == (out_dim, 1))
        gain.data.fill_(1)
        gain.requires_grad_(False)
        self.last_norm = last_norm

    def forward(self, x):
        x = self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))
        return x if self.last_norm is None else self.last_norm(x)

    def layers(self):
        mlp = [self.mlp] if isinstance(self.mlp, nn.Linear) else list(self.mlp)
        last = [] if self.last_norm is None else [self.last_norm]
        return [*mlp, L2Norm(), self.last_layer, *last]


DINO = {DINOHead: ("mlp", L2Norm(), "last_layer")}


def dino(weight_norm="older", **settings):
    head = DINOHead(WEIGHT_NORMS[weight_norm], **settings)
    return Case(head, head.layers(), DINO)


class CustomSequential(nn.Sequential):
    """iBOT's: BatchNorm sees the channels of `[B, N, C]` too."""

    def forward(self, x):
        for layer in self:
            axes = isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm)) and x.dim() > 2
            x = layer(x.transpose(1, 2)).transpose(1, 2) if axes else layer(x)
        return x


class iBOTHead(DINOHead):  # noqa: N801 (its name in iBOT)
    """A class token alone goes DINO's way; with patches, these go through a layer of their own."""

    def __init__(self, shared_head, **settings):
        super().__init__(older_weight_norm, mlp_class=CustomSequential, **settings)
        own = older_weight_norm(nn.Linear(6, 9, bias=False))
        own.weight_g.requires_grad_(False).fill_(1)
        self.last_layer2 = self.last_layer if shared_head else own

    def forward(self, x):
        if x.dim() == 2:
            return super().forward(x)
        x = F.normalize(self.mlp(x), dim=-1, p=2)
        return self.last_layer(x[:, 0]), self.last_layer2(x[:, 1:])


def ibot(norm=None, shared_head=False, last_norm=None):
    """The norm layer and the activation are one module each, used after every hidden layer."""
    norms = {
        "bn": nn.BatchNorm1d,
        "syncbn": nn.SyncBatchNorm,
        "ln": nn.LayerNorm,
        None: lambda _: None,
    }
    head = iBOTHead(shared_head, norm=norms[norm](10), last_norm=last_norm)
    steps = ("mlp", L2Norm(), "last_layer", *(["last_norm"] if last_norm else []))
    names = tuple(name for name, _ in head.mlp.named_children())
    names = tuple(str(i) for i in range(len(head.mlp))) if names else names
    return Case(head, head.layers(), {iBOTHead: steps, CustomSequential: names})


HEADS = {
    "mocov3_resnet": lambda: mocov3(2),
    "mocov3_resnet_predictor": lambda: mocov3(2, in_dim=5, last_bn=False),
    "mocov3_vit": lambda: mocov3(3),
    "byol": byol,
    "swav": swav,
    "swav_projection": lambda: swav(prototypes=False),
    "barlow_twins": barlow_twins,
    "simclr": simclr,
    "simclr_v2": simclr_v2,
    "dino": dino,
    "dino_parametrized": lambda: dino("parametrized"),
    "dino_bn": lambda: dino(norm=nn.BatchNorm1d(10)),
    "dino_two_layers": lambda: dino(layers=2),
    "dino_one_layer": lambda: dino(layers=1),
    "ibot": ibot,
    "ibot_bn": lambda: ibot("bn"),
    "ibot_syncbn": lambda: ibot("syncbn", shared_head=True),
    "ibot_ln": lambda: ibot("ln", last_norm=nn.BatchNorm1d(12, affine=False)),
}
SOME = ("mocov3_vit", "swav", "dino", "dino_parametrized", "ibot_ln")


def build(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    built = HEADS[name]()
    settled(built.head, seed, dtype)
    return built


def map_for(built, *shape, seed=1, dtype=torch.float64):
    """A random map `[shape[0], C, *shape[1:]]` of the head's channels."""
    channels = next(layer.in_features for layer in built.layers if isinstance(layer, nn.Linear))
    return maps(shape[0], channels, *shape[1:], seed=seed, dtype=dtype)


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


# --- The identity ---------------------------------------------------------------------------------


PIECES = {
    "linear": nn.Linear,
    "linear without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "older weight norm": lambda i, o: older_weight_norm(nn.Linear(i, o)),
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
}
LINEAR = tuple(PIECES)[:4]
ACTIVATIONS = ("relu", "leaky relu", "gelu", "gelu tanh", "silu", "hardswish")
NORMS = tuple(PIECES)[4:11]


def assemble(pieces, channels, seed, nested, dtype=torch.float64):
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
    return Case(settled(head, seed, dtype), layers)


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
    built = assemble(
        problem["pieces"], problem["channels"], problem["seed"], problem["nested"], dtype
    )
    shape = (problem["batch"], problem["channels"], *problem["spatial"])
    return built, maps(*shape, seed=problem["seed"], dtype=dtype)


@given(problem=problems, trainable=st.booleans())
def test_identity(problem, trainable):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        built, x = of(problem, dtype)
        trainable = trainable and any(True for _ in built.head.parameters())
        adaptor = SpatialAdaptor(built.head, trainable=trainable)
        assert adaptor(x).dtype == dtype
        assert identity_error(adaptor, built.head, x) <= tolerance


@given(problem=problems)
def test_every_pixel_equals_the_loop(problem):
    built, x = of(problem)
    ours, truth = built.adaptor()(x), pixelwise(built.layers, x)
    assert_close(ours, truth, 1e-10 if truth.norm() > 1e-6 else 1e-6)


@given(problem=problems, seed=st.integers(0, 99))
def test_permutation_equivariance(problem, seed):
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
    x = map_for(built, 2, 4, 5)

    def plain(x):
        return (
            built.head(x.flatten(2).transpose(1, 2).flatten(0, 1)).view(2, 20, -1).transpose(1, 2)
        )

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


def test_relu_is_closed_at_zero():
    x = torch.tensor([[[1.0, -1.0], [1.0, -0.5], [1.0, -2.0]]])
    expected = torch.tensor([[[0.0, 0.0], [1.0, -0.5], [0.0, 0.0]]])
    assert torch.equal(SpatialAdaptor(nn.Sequential(nn.ReLU()))(x), expected)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("spatial", SHAPES, ids=str)
def test_norms_equal_the_loop(name, spatial):
    for channels, dtype in itertools.product((2, 7), (torch.float64, torch.float32)):
        layer = settled(PIECES[name](channels, channels), seed=2, dtype=dtype)
        x = maps(2, channels, *spatial, seed=3, dtype=dtype)
        x += torch.arange(channels).view(-1, *(1 for _ in spatial)) * 3  # LayerNorm divides by this
        tolerance = 20 * torch.finfo(dtype).eps
        assert_close(SpatialAdaptor(layer)(x), pixelwise([layer], x), tolerance)
        assert identity_error(SpatialAdaptor(layer), layer, x) < tolerance


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_one_channel(name):
    layer = settled(PIECES[name](1, 1), seed=2)
    x = maps(3, 1, 4, 2, seed=3)
    assert_close(SpatialAdaptor(layer)(x), pixelwise([layer], x), 1e-12)
    assert identity_error(SpatialAdaptor(layer), layer, x) < 1e-13


@pytest.mark.parametrize("eps", [1e-12, 0.5, 10.0])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])
def test_l2_norm_keeps_its_epsilon(eps, size):
    x = maps(2, 4, 3, seed=1) * size
    layer = L2Norm(eps)
    assert torch.equal(layer(pooled(x)), F.normalize(pooled(x), dim=-1, eps=eps))
    assert_close(SpatialAdaptor(nn.Sequential(layer))(x), pixelwise([layer], x), 1e-12)
    assert identity_error(SpatialAdaptor(nn.Sequential(layer)), layer, x) < 1e-15


def test_l2_norm_module():
    x = maps(3, 4, 5, seed=1)
    rows = torch.stack([v / v.pow(2).sum().sqrt() for v in x.flatten(0, 1)]).view(3, 4, 5)
    assert_close(L2Norm()(x), rows, 1e-14)
    assert torch.equal(L2Norm()(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert L2Norm().state_dict() == {}
    assert L2Norm().eps == 1e-12
    assert repr(L2Norm()) == "L2Norm(eps=1e-12)"
    assert repr(L2Norm(0.5)) == "L2Norm(eps=0.5)"


def test_a_module_used_twice_is_run_twice():
    torch.manual_seed(0)
    linear, norm, relu = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
    built = case(linear, norm, relu, linear, norm, relu, linear)
    settled(built.head)
    x = maps(2, 4, 3, 5)
    adaptor = built.adaptor()
    assert len(adaptor.widths) == 3
    assert_close(adaptor(x), pixelwise(built.layers, x), 1e-13)
    assert identity_error(adaptor, built.head, x) < 1e-14


def test_layers_that_do_nothing_return_the_map():
    x = maps(2, 4, 3, 5)
    head = nn.Sequential(nn.Identity(), nn.Dropout(0.9), nn.Sequential()).train()
    assert torch.equal(SpatialAdaptor(head).train()(x), x)
    assert torch.equal(SpatialAdaptor(nn.Sequential())(x), x)


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)])
def test_a_head_of_one_layer_that_is_no_sequential(make):
    layer = settled(make())
    x = maps(2, 4, 3, 5)
    assert_close(SpatialAdaptor(layer)(x), pixelwise([layer], x), 1e-12)


def test_a_subclass_without_a_forward_of_its_own_is_what_it_inherits():
    class Projector(nn.Sequential):
        pass

    class Named(nn.Linear):
        pass

    head = Projector(Named(4, 3), nn.ReLU()).double()
    assert identity_error(SpatialAdaptor(head), head, maps(2, 4, 3)) < 1e-14


# --- Real heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("trainable", [False, True])
def test_real_heads_equal_the_loop_and_keep_the_identity(name, trainable):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        built = build(name, dtype)
        adaptor = built.adaptor(trainable=trainable)
        for shape in ((2, 4, 3), (1, 1, 1), (2, 7), (1, 2, 2, 3)):
            x = map_for(built, *shape, dtype=dtype)
            assert identity_error(adaptor, built.head, x) <= tolerance
            assert_close(adaptor(x), pixelwise(built.layers, x), 10 * tolerance)
            assert adaptor(x).requires_grad == trainable


@pytest.mark.parametrize("name", HEADS)
def test_real_heads_have_their_widths(name):
    built = build(name)
    linear = [layer for layer in built.layers if isinstance(layer, nn.Linear)]
    adaptor = built.adaptor()
    assert adaptor.widths == tuple(layer.out_features for layer in linear)
    assert adaptor.in_channels == linear[0].in_features


def test_in_channels_are_those_of_the_first_layer_that_has_any():
    first = (nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4), nn.Linear(4, 9))
    for layer in first:
        adaptor = SpatialAdaptor(nn.Sequential(nn.ReLU(), layer, L2Norm()))
        assert adaptor.in_channels == 4
        assert adaptor.widths == ((9,) if isinstance(layer, nn.Linear) else ())
    free = SpatialAdaptor(nn.Sequential(nn.ReLU(), L2Norm()))
    assert free.in_channels is None
    assert free.widths == ()


def test_ibot_uses_the_layer_of_the_class_token():
    built = build("ibot_bn")
    built.head.last_layer2.weight_v.data.fill_(torch.nan)
    x = map_for(built, 2, 3, 3)
    assert built.adaptor()(x).shape == (2, 12, 3, 3)
    tokens = torch.stack([pooled(x), pooled(x)], dim=1)
    assert_close(pooled(built.adaptor()(x)), built.head(tokens)[0], 1e-13)


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


def with_hook(layer, kind="forward_hook"):
    getattr(layer, f"register_{kind}")(lambda *arguments: None)
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: x
    return layer


UNKNOWN = (
    "cannot be adapted exactly: known are Linear, Identity, Dropout, BatchNorm1d, SyncBatchNorm, "
    "LayerNorm, L2Norm, ReLU, LeakyReLU, GELU, SiLU, Hardswish and nn.Sequential; for a class of "
    "your own, pass `order`"
)
HOOK = "has a hook, which the adaptor would not run; remove it first"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Softmax(dim=1), f"(Softmax) {UNKNOWN}"),
        (nn.Tanh, f"(Tanh) {UNKNOWN}"),
        (nn.Sigmoid, f"(Sigmoid) {UNKNOWN}"),
        (nn.ELU, f"(ELU) {UNKNOWN}"),
        (nn.ReLU6, f"(ReLU6) {UNKNOWN}"),
        (nn.RReLU, f"(RReLU) {UNKNOWN}"),
        (nn.AlphaDropout, f"(AlphaDropout) {UNKNOWN}"),
        (lambda: nn.Conv2d(4, 4, 1), f"(Conv2d) {UNKNOWN}"),
        (lambda: nn.GroupNorm(2, 4), f"(GroupNorm) {UNKNOWN}"),
        (lambda: nn.Bilinear(4, 4, 4), f"(Bilinear) {UNKNOWN}"),
        (lambda: nn.ModuleList([nn.Linear(4, 4)]), f"(ModuleList) {UNKNOWN}"),
        (lambda: OwnForward(nn.Linear(4, 4)), f"(OwnForward) {UNKNOWN}"),
        (lambda: OwnLinear(4, 4), f"(OwnLinear) {UNKNOWN}"),
        (lambda: OwnNorm(4), f"(OwnNorm) {UNKNOWN}"),
        (lambda: DINOHead(older_weight_norm), f"(DINOHead) {UNKNOWN}"),
        (
            lambda: nn.BatchNorm1d(4, track_running_stats=False),
            "(BatchNorm1d) cannot be adapted exactly: it has no running statistics",
        ),
        (
            lambda: nn.SyncBatchNorm(4, track_running_stats=False),
            "(SyncBatchNorm) cannot be adapted exactly: it has no running statistics",
        ),
        (
            lambda: nn.LayerNorm((4, 2)),
            "(LayerNorm) cannot be adapted exactly: it normalises over more than the channels",
        ),
        (lambda: with_hook(nn.Linear(4, 4)), f"(Linear) {HOOK}"),
        (lambda: with_hook(nn.ReLU(), "forward_pre_hook"), f"(ReLU) {HOOK}"),
        (lambda: with_hook(nn.Sequential(nn.ReLU())), f"(Sequential) {HOOK}"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), f"(Linear) {HOOK}"),
        (lambda: older_weight_norm(nn.LayerNorm(4)), f"(LayerNorm) {HOOK}"),
        (
            lambda: with_own_forward(nn.Linear(4, 4)),
            "(Linear) has a forward of its own, which the adaptor would not run",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_named_with_its_path(make, words):
    head = nn.Sequential()
    head.add_module("mlp", nn.Sequential(nn.Linear(4, 4), make()))
    with pytest.raises(TypeError, match=f"^{re.escape(f'head.mlp.1 {words}')}$"):
        SpatialAdaptor(head)
    with pytest.raises(TypeError, match=f"^{re.escape(f'head {words}')}$"):
        SpatialAdaptor(make())


def test_the_older_weight_norm_of_a_bias_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(4, 4), name="bias")
    with pytest.raises(TypeError, match=re.escape("head.0 (Linear) has a hook")):
        SpatialAdaptor(nn.Sequential(layer))


def test_a_hook_on_a_head_of_its_own_class_is_refused():
    built = build("dino")
    with_hook(built.head)
    with pytest.raises(TypeError, match=re.escape(f"head (DINOHead) {HOOK}")):
        built.adaptor()


def test_backward_hooks_change_nothing_and_are_taken():
    head = with_hook(nn.Sequential(nn.Linear(4, 3)), "full_backward_hook").double()
    assert identity_error(SpatialAdaptor(head), head, maps(2, 4, 3)) < 1e-14


@pytest.mark.parametrize("head", [None, "head", F.relu, nn.Linear])
def test_a_head_must_be_a_module(head):
    with pytest.raises(
        TypeError, match=r"^head must be a module; got (NoneType|str|function|type)$"
    ):
        SpatialAdaptor(head)


@pytest.mark.parametrize("trainable", [None, "yes", 1])
def test_trainable_must_be_a_flag(trainable):
    with pytest.raises(TypeError, match=r"^trainable must be True or False; got"):
        SpatialAdaptor(nn.Linear(4, 4), trainable=trainable)


@pytest.mark.parametrize("head", [nn.Linear(4, 4).requires_grad_(False), nn.Sequential(nn.ReLU())])
def test_trainable_needs_something_to_train(head):
    words = "trainable=True, but no parameter of head requires a gradient; call head.requires_grad_"
    with pytest.raises(ValueError, match=re.escape(words)):
        SpatialAdaptor(head, trainable=True)
    SpatialAdaptor(head)


# --- The order of a head of a class of its own ----------------------------------------------------


@pytest.mark.parametrize("weight_norm", WEIGHT_NORMS)
@pytest.mark.parametrize(
    "steps",
    [
        ("mlp", "last_layer"),  # without l2
        ("mlp", L2Norm(eps=100.0), "last_layer"),
        (L2Norm(), "mlp", "last_layer"),
        ("mlp", L2Norm()),
        ("mlp", L2Norm(), "last_layer", "last_layer"),  # cannot be run
        ("mlp", "mlp", L2Norm(), "last_layer"),
        ("last_layer", L2Norm(), "mlp"),
        (L2Norm(),),
        (),
    ],
    ids=str,
)
def test_a_wrong_order_is_refused(weight_norm, steps):
    built = build(f"dino{'_parametrized' if weight_norm == 'parametrized' else ''}")
    with pytest.raises(ValueError, match=r"^order must name what head\.forward runs; "):
        SpatialAdaptor(built.head, order={DINOHead: steps})


@pytest.mark.parametrize("steps", [("mlp", "prototypes"), ("",), "mlp", ("mlp.12",), ("forward",)])
def test_an_unknown_child_is_named(steps):
    words = r"order of head\.0 \(DINOHead\) names '.*', which is no child of it$"
    with pytest.raises(ValueError, match=words):
        SpatialAdaptor(nn.Sequential(dino().head), order={DINOHead: steps})


@pytest.mark.parametrize(
    "step",
    [nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), None, 0, F.normalize, L2Norm],
    ids=["parameters", "buffers", "None", "number", "function", "class"],
)
def test_order_holds_names_and_modules_without_parameters(step):
    words = (
        "order of head (DINOHead) must hold names of children, and modules without parameters; got"
    )
    with pytest.raises(TypeError, match=re.escape(words)):
        SpatialAdaptor(dino().head, order={DINOHead: ("mlp", step, "last_layer")})


@pytest.mark.parametrize("step", [nn.Tanh(), nn.Sequential(L2Norm(), nn.Tanh())], ids=str)
def test_what_cannot_be_adapted_in_an_order_is_named(step):
    path = "head, order.1" if isinstance(step, nn.Sequential) else "head, order"
    with pytest.raises(TypeError, match=re.escape(f"{path} (Tanh) {UNKNOWN}")):
        SpatialAdaptor(dino().head, order={DINOHead: ("mlp", step, "last_layer")})


def test_a_child_that_cannot_be_adapted_is_named_with_its_path():
    with pytest.raises(TypeError, match=re.escape(f"head.mlp (CustomSequential) {UNKNOWN}")):
        SpatialAdaptor(ibot().head, order={iBOTHead: DINO[DINOHead]})


def test_order_takes_dotted_names_and_sequences_of_functions():
    built = build("dino")
    steps = ("mlp.0", nn.GELU(), "mlp.2", nn.Sequential(nn.GELU(), nn.Dropout()), "mlp.4")
    adaptor = SpatialAdaptor(built.head, order={DINOHead: (*steps, L2Norm(), "last_layer")})
    x = map_for(built, 2, 3, 4)
    assert_close(adaptor(x), built.adaptor()(x), 1e-14)


def test_order_of_a_class_without_parameters():
    class Normalised(nn.Module):
        def forward(self, x):
            return F.normalize(x, dim=-1)

    x = maps(2, 4, 3)
    order = {Normalised: [L2Norm()]}
    for head in (Normalised(), nn.Sequential(Normalised()), nn.Sequential(nn.ReLU(), Normalised())):
        adaptor = SpatialAdaptor(head, order=order)
        assert identity_error(adaptor, head, x) < 1e-14
    with pytest.raises(ValueError, match="the results differ"):
        SpatialAdaptor(Normalised(), order={Normalised: [nn.ReLU()]})


def test_order_does_not_hold_for_subclasses():
    class Subclass(DINOHead):
        pass

    with pytest.raises(TypeError, match=re.escape("head (Subclass) cannot be adapted exactly")):
        SpatialAdaptor(Subclass(older_weight_norm), order=DINO)


class Twofold(nn.Module):
    """Its forward returns what is given, after its layer."""

    def __init__(self, result):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.result = result

    def forward(self, x):
        return self.result(self.layer(x))


@pytest.mark.parametrize(
    "result",
    [
        lambda y: (y, y),  # as SwAV's forward_head
        lambda y: None,
        lambda y: y[:, :2],
        lambda y: y * 1.05,
        lambda y: y * torch.nan,
        lambda y: y.sum(),
        lambda y: y @ y,
    ],
)
def test_a_head_that_gives_something_else_is_refused(result):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"^order must name what head\.forward runs; "):
        SpatialAdaptor(Twofold(result), order={Twofold: ["layer"]})


def test_a_head_of_which_no_results_are_numbers_is_refused():
    head = Twofold(nn.Identity())
    head.layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the results differ"):
        SpatialAdaptor(head, order={Twofold: ["layer"]})


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["dino", "dino_parametrized", "ibot_bn", "ibot_ln"])
def test_a_right_order_is_taken_in_every_dtype_and_mode(name, dtype):
    for seed in range(3):
        built = build(name, dtype, seed)
        built.head.train()
        x = map_for(built, 2, 3, dtype=dtype)
        assert built.adaptor()(x).dtype == dtype
        assert built.head.training


# --- Frozen by default ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_no_gradient_reaches_the_teacher(name):
    built = build(name, torch.float32)
    adaptor = built.adaptor()
    x = map_for(built, 2, 3, 4, dtype=torch.float32).requires_grad_()
    out = adaptor(x)
    assert not out.requires_grad
    assert out.grad_fn is None
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in adaptor.parameters())
    adaptor.requires_grad_()  # as a surrounding model's would
    assert not adaptor(x).requires_grad


@pytest.mark.parametrize("name", HEADS)
def test_frozen_teacher_stays_bit_identical_while_a_surrounding_model_trains(name):
    class Distiller(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(
                3, 7 if name != "mocov3_resnet_predictor" else 5, 3, padding=1
            )
            self.adaptor = built.adaptor()
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
    assert model.training
    assert model.adaptor.training
    assert not any(module.training for module in model.adaptor.head.modules())
    assert all(parameter.grad is None for parameter in model.adaptor.parameters())
    assert model.backbone.weight.grad is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("student.")), key
    x = map_for(built, 2, 3, 4, dtype=torch.float32)
    assert torch.equal(model.adaptor(x), built.adaptor().eval()(x))


def test_modes():
    adaptor = build("mocov3_vit").adaptor()
    for mode in (True, False, True):
        assert adaptor.train(mode) is adaptor
        assert adaptor.training is mode
        assert not any(module.training for module in adaptor.head.modules())
    assert adaptor.eval() is adaptor
    assert not adaptor.training


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
KINKED = ("linear", "synchronised batch norm", "relu", "linear", "leaky relu", "older weight norm",
          "hardswish", "layer norm without bias", "linear without bias")  # fmt: skip


@pytest.mark.parametrize("names", [SMOOTH, KINKED], ids=["smooth", "kinked"])
@pytest.mark.parametrize("spatial", [(2, 3), (3,), (1, 2, 1)], ids=str)
def test_gradients_of_input_and_parameters(names, spatial):
    built = assemble([(name, 4) for name in names], 3, seed=1, nested=True)
    adaptor = SpatialAdaptor(built.head, trainable=True)
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


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_the_head_on_the_pooled_map(name):
    built = build(name)
    adaptor = built.adaptor(trainable=True).train()
    x = map_for(built, 2, 3, 4).requires_grad_()
    m = pooled(x.detach()).requires_grad_()
    vector = built.head(m)
    cotangent = maps(*vector.shape, seed=5)
    (pooled(adaptor(x)) * cotangent).sum().backward()
    (vector * cotangent).sum().backward()
    assert_close(x.grad, m.grad.view(*m.shape, 1, 1).expand_as(x) / 12, 1e-11)
    truths = dict(built.head.named_parameters())
    for key, parameter in adaptor.head.named_parameters():
        assert parameter.requires_grad == truths[key].requires_grad
        assert (parameter.grad is None) == (truths[key].grad is None), key
        if parameter.grad is not None and truths[key].grad.norm() > 1e-12:
            assert_close(parameter.grad, truths[key].grad, 1e-9)


@pytest.mark.parametrize("weight_norm", ["dino", "dino_parametrized"])
def test_dino_learns_all_but_its_gain(weight_norm):
    built = build(weight_norm, torch.float32)
    adaptor = built.adaptor(trainable=True)
    before = copy.deepcopy(adaptor.state_dict())
    optimizer = torch.optim.SGD(adaptor.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adaptor(map_for(built, 2, 3, 4, dtype=torch.float32)).pow(2).sum().backward()
        optimizer.step()
    same = [key for key, value in adaptor.state_dict().items() if torch.equal(value, before[key])]
    assert same in (["head.last_layer.weight_g"],
                    ["head.last_layer.parametrizations.weight.original0"])  # fmt: skip
    assert identity_error(adaptor, adaptor.head, map_for(built, 2, 3, dtype=torch.float32)) < 5e-6


def test_some_frozen_parameters_stay_so():
    head = build("byol").head
    head[0].requires_grad_(False)
    adaptor = SpatialAdaptor(head, trainable=True)
    flags = {name: parameter.requires_grad for name, parameter in adaptor.head.named_parameters()}
    assert flags == {name: not name.startswith("0.") for name in flags}


def test_no_grad_holds_for_a_trainable_one():
    adaptor = build("byol").adaptor(trainable=True)
    with torch.no_grad():
        assert not adaptor(maps(2, 7, 3)).requires_grad
    assert adaptor(maps(2, 7, 3)).requires_grad
    with torch.inference_mode():
        assert adaptor(maps(2, 7, 3)).is_inference()


# --- It copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("trainable", [False, True])
def test_it_copies_and_leaves_the_head_as_it_was(name, trainable):
    built = build(name)
    x = map_for(built, 2, 3, 4)
    built.head.train()
    first = next(layer for layer in built.layers if isinstance(layer, nn.Linear)).eval()
    flags = {key: value.requires_grad for key, value in built.head.named_parameters()}
    modes = {key: module.training for key, module in built.head.named_modules()}
    state = copy.deepcopy(built.head.state_dict())
    adaptor = built.adaptor(trainable=trainable)
    before = adaptor(x).detach()
    assert {key: value.requires_grad for key, value in built.head.named_parameters()} == flags
    assert {key: module.training for key, module in built.head.named_modules()} == modes
    assert not first.training
    for key, value in built.head.state_dict().items():
        assert torch.equal(value, state[key])
        assert value.data_ptr() != adaptor.state_dict()[f"head.{key}"].data_ptr()
    with torch.no_grad():
        for value in adaptor.state_dict().values():
            value.zero_()
        assert all(torch.equal(v, state[key]) for key, v in built.head.state_dict().items())
        adaptor.load_state_dict({f"head.{key}": value for key, value in state.items()})
        for value in built.head.state_dict().values():
            value.zero_()
    assert torch.equal(adaptor(x), before)


def test_a_head_that_was_just_run_with_gradients_is_copied():
    """The older weight norm then holds a weight with a graph, which deepcopy refuses."""
    for name in ("dino", "ibot_ln"):
        built = build(name)
        x = map_for(built, 2, 3)
        built.head(pooled(x)).sum().backward()
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(built.head)
        assert identity_error(built.adaptor(), built.head, x) < 1e-13


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_state_dict_has_the_keys_of_the_head(name):
    built, other = build(name), build(name, seed=1)
    state = built.adaptor().state_dict()
    assert list(state) == [f"head.{key}" for key in built.head.state_dict()]
    adaptor = other.adaptor()
    x = map_for(built, 2, 3, 4)
    assert not torch.equal(adaptor(x), built.adaptor()(x))
    adaptor.load_state_dict({f"head.{key}": v for key, v in built.head.state_dict().items()})
    assert torch.equal(adaptor(x), built.adaptor()(x))


@pytest.mark.parametrize("name", SOME)
def test_loading_names_every_missing_key(name):
    adaptor = build(name).adaptor()
    for key in adaptor.state_dict():
        state = adaptor.state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{re.escape(key)}"'):
            adaptor.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"head\.extra"'):
        adaptor.load_state_dict(adaptor.state_dict() | {"head.extra": torch.ones(1)})


def reloaded(adaptor, name):
    other = build(name, torch.float32, seed=1).adaptor(trainable=adaptor.trainable)
    other.load_state_dict(adaptor.state_dict())
    return other


RESUME = {
    "deepcopy": lambda adaptor, name: copy.deepcopy(adaptor),
    "pickle": lambda adaptor, name: pickle.loads(pickle.dumps(adaptor)),
    "state_dict": reloaded,
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("resume", RESUME)
@pytest.mark.parametrize("trainable", [False, True])
def test_resuming_continues_exactly(name, resume, trainable):
    if resume == "pickle" and name == "dino_parametrized":
        pytest.skip("PyTorch does not pickle parametrized modules")
    built = build(name, torch.float32)
    x = map_for(built, 2, 3, 4, dtype=torch.float32)
    adaptor = built.adaptor(trainable=trainable)

    def step(module):
        if not trainable:
            return module(x)
        module.zero_grad()
        out = module(x)
        (out - 1).pow(2).mean().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(0 if parameter.grad is None else 0.1 * parameter.grad)
        return out.detach()

    start = step(adaptor)
    other = RESUME[resume](adaptor, name)
    assert other.trainable == trainable
    assert not {t.data_ptr() for t in other.state_dict().values()} & {
        t.data_ptr() for t in adaptor.state_dict().values()
    }
    for _ in range(2):
        expected = step(adaptor)
        assert trainable != torch.equal(expected, start)
        assert torch.equal(step(other), expected)
    assert all(torch.equal(v, adaptor.state_dict()[k]) for k, v in other.state_dict().items())
    assert other.train().head.training is False


@pytest.mark.parametrize("name", HEADS)
def test_a_copy_is_independent(name):
    built = build(name)
    adaptor = built.adaptor()
    other, x = copy.deepcopy(adaptor), map_for(built, 2, 3, 4)
    before = adaptor(x)
    for value in other.state_dict().values():
        value.zero_()
    assert torch.equal(adaptor(x), before)
    assert not torch.equal(other(x), before)


def test_conversions_reach_all_that_it_runs():
    for name in SOME:
        built = build(name, torch.float32)
        adaptor = built.adaptor().double()
        built.head.double()
        x = map_for(built, 2, 3, 4)
        assert adaptor(x).dtype == torch.float64
        assert identity_error(adaptor, built.head, x) < 1e-13


def test_modules_put_into_the_head_afterwards_are_run():
    """convert_sync_batchnorm replaces each BatchNorm of a model; the old ones are then not loaded."""
    built, other = build("mocov3_vit"), build("mocov3_vit", seed=1)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleList([built.adaptor()]))
    adaptor = model.float().double()[0]
    assert not any(isinstance(module, nn.BatchNorm1d) for module in adaptor.modules())
    adaptor.load_state_dict(other.adaptor().state_dict())
    x = map_for(built, 2, 3, 4)
    assert_close(adaptor(x), other.adaptor()(x), 1e-15)


def test_what_is_put_into_the_head_afterwards_and_cannot_be_adapted_is_named():
    adaptor = SpatialAdaptor(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3))))
    adaptor.head[1][0] = OwnLinear(4, 3)
    with pytest.raises(TypeError, match=r"head\.1\.0 \(OwnLinear\) cannot be adapted exactly"):
        adaptor(torch.randn(2, 4, 3, 3))
    single = SpatialAdaptor(nn.Linear(4, 4))
    single.head = nn.Tanh()
    with pytest.raises(TypeError, match=r"head \(Tanh\) cannot be adapted exactly"):
        single(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_map_may_have_another_dtype_than_the_head(dtype):
    head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = SpatialAdaptor(head)(x)
    assert ours.dtype == dtype
    assert_close(ours, SpatialAdaptor(head)(x.float()), 2e-2 if dtype != torch.float64 else 1e-5)


def test_repr():
    text = repr(SpatialAdaptor(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), trainable=True))
    assert text.startswith("SpatialAdaptor(\n  trainable=True\n  (head): Sequential(")
    assert "trainable=False" in repr(SpatialAdaptor(nn.Linear(4, 3)))


# --- Low precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@given(depth=st.integers(0, 3), data=st.data(), seed=st.integers(0, 2**16))
def test_low_precision_stays_inside_the_error_budget(dtype, autocast, depth, data, seed):
    kinds = [*[LINEAR, NORMS, ACTIVATIONS] * depth, LINEAR]
    pieces = [(data.draw(st.sampled_from(kind)), 8) for kind in kinds]
    built = assemble(pieces, 8, seed, False, torch.float32 if autocast else dtype)
    x = maps(3, 8, 4, 3, seed=seed, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = built.adaptor()(x)
    assert out.dtype == dtype
    truth = pixelwise(built.layers, x)
    assert_within_budget(out, pixelwise(built.layers, x, dtype), truth, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_low_precision_of_heads_without_linear_layers(dtype):
    x = maps(2, 4, 3, 5, dtype=dtype)
    for name in (*ACTIVATIONS, *NORMS):
        built = assemble([(name, 0)], 4, 0, False, dtype)
        truth = pixelwise(built.layers, x)
        assert built.adaptor()(x).dtype == dtype
        assert_close(built.adaptor()(x), truth, torch.finfo(dtype).eps / 2)
        built.head.float()
        with torch.autocast("cpu", dtype=dtype):
            out = built.adaptor()(x.float())
        assert out.dtype == torch.float32
        assert_close(out, truth, 1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_real_heads_in_low_precision(name, dtype, autocast):
    built = build(name, torch.float32 if autocast else dtype)
    x = map_for(built, 2, 3, 5, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = built.adaptor(trainable=True)(x)
    assert out.dtype == dtype
    truth = pixelwise(built.layers, x)
    assert_within_budget(out, pixelwise(built.layers, x, dtype), truth, torch.finfo(dtype).eps / 8)
    exact = settled(HEADS[name]().head, dtype=torch.float64)
    exact.load_state_dict(built.head.state_dict())
    vector = exact(pooled(x.double()))
    scale = out.double().flatten(2).pow(2).mean(2).sum().sqrt()
    assert (pooled(out.double()) - vector).norm() <= 2 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_gradients_under_autocast_have_the_dtypes_of_their_leaves(name, dtype):
    built = build(name, torch.float32)
    adaptor = built.adaptor(trainable=True)
    x = map_for(built, 2, 3, 4, dtype=torch.float32).requires_grad_()
    grads = []
    for enabled in (False, True):
        leaves = [x, *(p for p in adaptor.parameters() if p.requires_grad)]
        leaves = [leaf for leaf in leaves if leaf.shape != (9, 6)]  # iBOT's patches
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


def test_float64_stays_float64_under_autocast():
    for name in SOME:
        built = build(name)
        x = map_for(built, 2, 3, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = built.adaptor()(x)
        assert out.dtype == torch.float64
        assert torch.equal(out, built.adaptor()(x))


# --- torch.compile and torch.export ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend", "trainable", "autocast"),
    [
        *((name, "eager", False, False) for name in SOME),
        ("mocov3_resnet", "aot_eager", True, True),
        ("swav", "eager", False, True),
    ],
)
def test_compiles_once_for_all_map_sizes(name, backend, trainable, autocast):
    built = build(name, torch.float32)
    adaptor = built.adaptor(trainable=trainable)
    leaves = [p for p in adaptor.parameters() if p.requires_grad]
    with fresh_compiler():
        counter, frames = CompileCounterWithBackend(backend), []
        compiled = torch.compile(adaptor, fullgraph=True, dynamic=True, backend=counter)
        for size in MAP_SIZES:
            x = map_for(built, *size, dtype=torch.float32)
            results = []
            for module in (compiled, adaptor):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    out = module(x)
                assert out.requires_grad == trainable
                grads = torch.autograd.grad(out.float().pow(2).sum(), leaves) if leaves else ()
                results.append((out, *grads))
            for ours, eager in zip(*results, strict=True):
                assert ours.dtype == eager.dtype
                assert_close(ours, eager, 5e-6 if not autocast else 1e-2)
            frames.append(counter.frame_count)
    assert frames == frames[:1] * len(MAP_SIZES)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_compiles_with_the_default_compiler():
    built = assemble([("linear", 6), ("layer norm", 0), ("gelu", 0)], 7, 3, False, torch.float32)
    adaptor = SpatialAdaptor(built.head)
    with fresh_compiler():
        compiled = torch.compile(adaptor, fullgraph=True, dynamic=True)
        for size in MAP_SIZES[:2]:
            x = map_for(built, *size, dtype=torch.float32)
            assert_close(compiled(x), adaptor(x), 2e-6)


@pytest.mark.parametrize("name", ["mocov3_vit", "dino"])
def test_exports_with_dynamic_sizes(name):
    built = build(name, torch.float32)
    adaptor = built.adaptor()
    sizes = [{0: torch.export.Dim("b", min=1, max=64), 2: torch.export.Dim("h", min=2, max=512)}]
    program = torch.export.export(
        adaptor, (map_for(built, 2, 3, 4, dtype=torch.float32),), dynamic_shapes=sizes
    )
    assert set(program.state_dict) <= set(adaptor.state_dict())
    x = map_for(built, 5, 6, 4, seed=3, dtype=torch.float32)
    assert_close(program.module()(x), adaptor(x), 1e-6)


# --- Layouts --------------------------------------------------------------------------------------


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, -x], dim=-1).flatten(3)[..., ::2],
    "part of a larger map": lambda x: F.pad(x, (1, 2, 2, 1), value=torch.nan)[..., 2:-1, 1:-2],
    "part of more channels": lambda x: torch.cat([-x, x, -x], dim=1)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "tokens": lambda x: tokens_to_map(x.flatten(2).mT.contiguous(), x.shape[2:], prefix_tokens=0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*SOME, "barlow_twins"])
def test_strided_maps_equal_contiguous_ones(layout, name):
    built = build(name)
    adaptor = built.adaptor(trainable=True)
    x = map_for(built, 2, 3, 5)
    strided = LAYOUTS[layout](x)
    assert torch.equal(strided, x)
    assert not strided.is_contiguous()
    results = []
    for form in (x, strided.detach()):
        form.requires_grad_()
        out = adaptor(form)
        weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        used = [p for p in adaptor.parameters() if p.requires_grad]
        used = [p for p in used if p.shape != (9, 6)]  # iBOT's patches
        results.append((out, *torch.autograd.grad((out * weights).sum(), [form, *used])))
        assert_close(built.adaptor()(form), out, 1e-14)
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain, 1e-12)


def test_expanded_maps_equal_contiguous_ones():
    built = build("mocov3_vit")
    x = map_for(built, 1, 3, 1).expand(4, -1, 3, 5)
    assert_close(built.adaptor()(x), built.adaptor()(x.contiguous()), 1e-14)
    narrow = map_for(built, 2, 1, 1)
    expected = built.head(pooled(narrow)).view(2, 5, 1, 1).expand(2, 5, 3, 4)
    assert_close(built.adaptor()(narrow.expand(-1, -1, 3, 4)), expected, 1e-13)


@pytest.mark.parametrize(
    "name", [*SOME, "barlow_twins", "byol"]
)  # the last layer is a norm, a norm of m, a linear one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_is_kept(name, dtype):
    built = build(name, torch.float32)
    x = map_for(built, 2, 3, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = built.adaptor()(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert built.adaptor()(x).is_contiguous()


@pytest.mark.parametrize("name", [*ACTIVATIONS, *NORMS])
def test_channels_last_is_kept_by_heads_without_linear_layers(name):
    adaptor = SpatialAdaptor(assemble([(name, 0)], 4, 0, False, torch.float32).head)
    x = maps(2, 4, 3, 5, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert adaptor(x).is_contiguous(memory_format=torch.channels_last)


def test_the_map_is_left_as_it_was():
    for names in (["relu"], ["linear", "relu"], ["batch norm", "relu", "l2"], ["identity"]):
        built = assemble([(name, 5) for name in names], 4, 0, False)
        x = maps(2, 4, 3)
        before = x.clone()
        built.adaptor()(x)
        assert torch.equal(x, before)


# --- Edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_image_alone(name, value):
    built = build(name)
    x = map_for(built, 3, 3, 4)
    expected = built.adaptor()(x)
    x[1, 2, 0, 3] = value
    out = built.adaptor()(x)
    assert_close(out[[0, 2]], expected[[0, 2]], 1e-15)
    if math.isnan(value):
        assert out[1, ..., 0, 3].isnan().all()  # and so the mean is, as the head of the mean is
    assert not pooled(out)[1].isfinite().any()


@pytest.mark.parametrize("name", [*ACTIVATIONS, *NORMS])
def test_nan_shows_after_every_layer(name):
    x = maps(2, 4, 3)
    x[1, 2, 0] = torch.nan
    out = assemble([(name, 0)], 4, 0, False).adaptor()(x)
    assert out[1, 2, 0].isnan()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4)])
@pytest.mark.parametrize("name", SOME)
def test_images_one_by_one_are_the_batch(name, shape):
    built = build(name)
    x = map_for(built, *shape)
    out = built.adaptor()(x)
    assert out.shape == (shape[0], built.adaptor().widths[-1], *shape[1:])
    for image, result in zip(x, out, strict=True):
        assert_close(built.adaptor()(image.unsqueeze(0)).squeeze(0), result, 1e-13)


def test_flattened_maps_are_maps_of_one_axis():
    for name in SOME:
        built = build(name)
        x = map_for(built, 2, 3, 2, 4)
        out = built.adaptor()(x)
        assert_close(built.adaptor()(x.flatten(2)), out.flatten(2), 1e-13)
        assert_close(built.adaptor()(x.flatten(3)), out.flatten(3), 1e-13)


@pytest.mark.parametrize(
    ("error", "words", "x"),
    [
        (TypeError, "x must be a floating-point tensor; got list", [[[1.0]]]),
        (TypeError, "x must be a floating-point tensor; got NoneType", None),
        (TypeError, "x must be a floating-point tensor; got torch.int64", torch.ones(2, 4, 3).long()),
        (TypeError, "x must be a floating-point tensor; got torch.bool", torch.ones(2, 4, 3) > 0),
        (ValueError, "x must have shape [B, 4, *spatial] with one to three spatial axes; got (2, 4)",
         torch.ones(2, 4)),
        (ValueError, "got (2, 4, 1, 1, 1, 1)", torch.ones(2, 4, 1, 1, 1, 1)),
        (ValueError, "[B, 4, *spatial] with one to three spatial axes; got (2, 5, 3, 3)",
         torch.ones(2, 5, 3, 3)),
        (ValueError, "got (2, 3, 3, 4)", torch.ones(2, 3, 3, 4)),  # channels last by its shape
    ],
)  # fmt: skip
@pytest.mark.parametrize("trainable", [False, True])
def test_wrong_maps(error, words, x, trainable):
    adaptor = SpatialAdaptor(nn.Sequential(nn.Dropout(), nn.Linear(4, 2)), trainable=trainable)
    with pytest.raises(error, match=re.escape(words)):
        adaptor(x)


def test_wrong_maps_of_a_head_of_any_width():
    adaptor = SpatialAdaptor(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=re.escape("x must have shape [B, C, *spatial] with one")):
        adaptor(torch.ones(2, 4))


# --- PixelHead ------------------------------------------------------------------------------------


def names_of(module):
    return [(name, type(child).__name__) for name, child in module.named_children()]


@pytest.mark.parametrize(
    ("hidden", "widths"), [(9, (9,)), ((9,), (9,)), ([9, 8], (9, 8)), ((), ()), ([], ())], ids=str
)
@pytest.mark.parametrize("predictor", [True, False])
def test_pixel_head_is_projector_and_predictor(hidden, widths, predictor):
    head = PixelHead(5, hidden, 4, predictor=predictor)
    layers = ["Conv2d", "BatchNorm2d", "ReLU"] * len(widths) + ["Conv2d"]
    expected = [(str(number), name) for number, name in enumerate(layers)]
    assert names_of(head)[0] == ("projector", "Sequential")
    assert names_of(head)[1] == ("predictor", "Sequential" if predictor else "Identity")
    for part, inputs in ((head.projector, 5), (head.predictor, 4))[: 1 + predictor]:
        assert names_of(part) == expected
        convolutions = [layer for layer in part if isinstance(layer, nn.Conv2d)]
        chain = (inputs, *widths, 4)
        for layer, (before, after) in zip(convolutions, itertools.pairwise(chain), strict=True):
            assert layer.weight.shape == (after, before, 1, 1)
            assert (layer.bias is not None) == (layer is part[-1])
        norms = [layer.num_features for layer in part if isinstance(layer, nn.BatchNorm2d)]
        assert norms == list(widths)
    x = maps(2, 5, 3, 4, dtype=torch.float32)
    assert head(x).shape == (2, 4, 3, 4)
    assert torch.equal(head(x), head.predictor(head.projector(x)))


def test_pixel_head_equals_the_loop():
    torch.manual_seed(0)
    head = PixelHead(3, (5, 4), 2).eval()
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    x = maps(2, 3, 3, 2, dtype=torch.float32)
    for b, h, w in itertools.product(range(2), range(3), range(2)):
        v = x[b, :, h, w].double()
        for layer in [*head.projector, *head.predictor]:
            if isinstance(layer, nn.Conv2d):
                v = layer.weight[:, :, 0, 0].double() @ v
                v = v if layer.bias is None else v + layer.bias.double()
            elif isinstance(layer, nn.BatchNorm2d):
                v = (v - layer.running_mean) / torch.sqrt(layer.running_var.double() + layer.eps)
            else:
                v = v.clamp_min(0)
        assert_close(head(x)[b, :, h, w], v, 2e-6)


@pytest.mark.parametrize(
    ("widths", "predictor"), [((6,), True), ((9, 6), True), ((9, 8, 6), True), ((9, 6), False)]
)
@pytest.mark.parametrize("in_channels", [4, 7, 6], ids=["fewer", "more", "as many as come out"])
def test_like_takes_the_widths_of_the_adapted_head(widths, predictor, in_channels):
    pieces = [("linear", width) for width in widths]
    pieces = [piece for linear in pieces for piece in (linear, ("relu", 0))][:-1]
    adaptor = SpatialAdaptor(assemble(pieces, 7, 0, nested=True, dtype=torch.float32).head)
    head = PixelHead.like(adaptor, in_channels, predictor=predictor)
    expected = PixelHead(in_channels, widths[:-1], widths[-1], predictor=predictor)
    assert {key: value.shape for key, value in head.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert repr(head) == repr(expected)
    teacher = adaptor(maps(2, 7, 3, 4, dtype=torch.float32))
    assert head(maps(2, in_channels, 3, 4, dtype=torch.float32)).shape == teacher.shape


def test_like_has_a_predictor_and_the_class_it_is_called_on():
    class Subclass(PixelHead):
        pass

    head = Subclass.like(SpatialAdaptor(nn.Linear(4, 3)), 2)
    assert type(head) is Subclass
    assert isinstance(head.predictor, nn.Sequential)


@pytest.mark.parametrize(
    ("error", "words", "adaptor"),
    [
        (TypeError, "adaptor must be a SpatialAdaptor; got Linear", nn.Linear(4, 4)),
        (TypeError, "adaptor must be a SpatialAdaptor; got NoneType", None),
        (ValueError, "adaptor must have a linear layer to take the widths from",
         SpatialAdaptor(nn.BatchNorm1d(4))),
    ],
)  # fmt: skip
def test_like_wrong_adaptors(error, words, adaptor):
    with pytest.raises(error, match=words):
        PixelHead.like(adaptor, 3)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "in_channels must be at least 1; got 0", {"in_channels": 0}),
        (TypeError, "in_channels must be an int; got 4.0", {"in_channels": 4.0}),
        (TypeError, "in_channels must be an int; got True", {"in_channels": True}),
        (ValueError, "out_channels must be at least 1; got -1", {"out_channels": -1}),
        (TypeError, "out_channels must be an int; got None", {"out_channels": None}),
        (ValueError, "hidden must be at least 1; got 0", {"hidden": 0}),
        (ValueError, "hidden must be at least 1; got 0", {"hidden": (8, 0)}),
        (TypeError, "hidden must be an int; got '8'", {"hidden": "8"}),
        (TypeError, "hidden must be an int; got 8.0", {"hidden": [8.0]}),
        (TypeError, "hidden must be an int; got None", {"hidden": None}),
        (TypeError, "predictor must be True or False; got 'no'", {"predictor": "no"}),
        (TypeError, "predictor must be True or False; got None", {"predictor": None}),
    ],
)
def test_pixel_head_wrong_settings(error, words, settings):
    with pytest.raises(error, match=f"^{words}$"):
        PixelHead(**{"in_channels": 4, "hidden": 8, "out_channels": 3, **settings})


@pytest.mark.parametrize("predictor", [True, False])
def test_a_learning_step_changes_every_parameter_and_statistic_of_the_student(predictor):
    torch.manual_seed(0)
    head = PixelHead(5, (9, 8), 4, predictor=predictor)
    before = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    x = maps(3, 5, 4, 3, dtype=torch.float32).requires_grad_()
    first = (head(x) - 1).pow(2).mean()
    first.backward()
    optimizer.step()
    assert x.grad.norm() > 0
    same = {key for key, value in head.state_dict().items() if torch.equal(value, before[key])}
    # the predictor's first BatchNorm takes out what this one adds
    assert same <= ({"projector.6.bias"} if predictor else set())
    assert (head(x) - 1).pow(2).mean() < first


def test_pixel_head_state_and_copies():
    torch.manual_seed(0)
    head = PixelHead(5, 8, 4)
    x = maps(2, 5, 3, 4, dtype=torch.float32)
    head(x)  # moves the statistics
    fresh = PixelHead(5, 8, 4)
    fresh.load_state_dict(head.state_dict())
    for other in (fresh, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.eval()(x), head.eval()(x))
        assert other.projector[0].weight.data_ptr() != head.projector[0].weight.data_ptr()
    state = head.state_dict()
    del state["predictor.0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"predictor\.0\.weight"'):
        fresh.load_state_dict(state)


def test_pixel_head_compiles_once_and_takes_half_precision_and_channels_last():
    torch.manual_seed(0)
    head = PixelHead(5, 8, 4).eval()
    with fresh_compiler():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(head, fullgraph=True, dynamic=True, backend=counter)
        for batch, height, width in MAP_SIZES:
            x = maps(batch, 5, height, width, dtype=torch.float32)
            assert_close(compiled(x), head(x), 1e-6)
        assert counter.frame_count == 1
    last = head(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, head(x), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
        assert_close(head(x), head.to(torch.float32)(x.float()), 2e-2)


# --- tokens_to_map --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (7, 1), [4, 4], (6,), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_to_map_equals_the_loop(grid, prefix):
    tokens = maps(2, prefix + math.prod(grid), 4)
    x = tokens_to_map(tokens, grid, prefix_tokens=prefix)
    assert x.shape == (2, 4, *grid)
    places = itertools.product(*map(range, grid))  # the last axis runs fastest
    for number, place in enumerate(places):
        for image, channel in itertools.product(range(2), range(4)):
            assert x[(image, channel, *place)] == tokens[image, prefix + number, channel]


def test_tokens_to_map_drops_one_token_by_default():
    tokens = maps(2, 7, 4)
    expected = tokens_to_map(tokens, (2, 3), prefix_tokens=1)
    assert torch.equal(tokens_to_map(tokens, (2, 3)), expected)


@pytest.mark.parametrize("grid", [(4, 4), (8, 2), (2, 8), (16,), (2, 4, 2), torch.Size((4, 4))])
def test_tokens_to_map_takes_the_grid_that_is_given(grid):
    assert tokens_to_map(torch.ones(1, 17, 3), grid).shape == (1, 3, *grid)


def test_tokens_to_map_never_guesses():
    with pytest.raises(TypeError, match="grid"):
        tokens_to_map(torch.ones(1, 17, 3))
    for grid in (None, 4, 16, {4, 2}, (), (1, 2, 4, 2)):
        words = re.escape(f"one to three sizes, such as (H, W); got {grid!r}")
        with pytest.raises(TypeError, match=f"^grid must be a sequence of {words}$"):
            tokens_to_map(torch.ones(1, 17, 3), grid)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_tokens_to_map_copies_nothing(layout):
    tokens = maps(2, 13, 4)
    if layout == "sliced":
        tokens = torch.cat([tokens, tokens], dim=2)[:, :, 2:6]
    if layout == "transposed":
        tokens = tokens.mT.contiguous().mT
    x = tokens_to_map(tokens, (3, 4))
    assert x.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert torch.equal(x, tokens[:, 1:].mT.reshape(2, 4, 3, 4))
    tokens[0, 1, 2] = 17.0
    assert x[0, 2, 0, 0] == 17.0


def test_tokens_to_map_lets_gradients_through():
    tokens = maps(2, 8, 3).requires_grad_()
    cotangent = maps(2, 3, 2, 3, seed=1)
    (grad,) = torch.autograd.grad(
        (tokens_to_map(tokens, (2, 3), prefix_tokens=2) * cotangent).sum(), tokens
    )
    assert torch.equal(grad[:, :2], torch.zeros(2, 2, 3, dtype=torch.float64))
    assert torch.equal(grad[:, 2:], cotangent.flatten(2).mT)
    assert torch.autograd.gradcheck(lambda t: tokens_to_map(t, (7,)), tokens)


def test_a_vit_teacher_goes_through_both():
    built = build("dino")
    tokens = map_for(built, 2, 11).mT.contiguous()
    out = built.adaptor()(tokens_to_map(tokens, (2, 5)))
    assert_close(pooled(out), built.head(tokens[:, 1:].mean(1)), 1e-13)


def test_tokens_to_map_compiles_once():
    with fresh_compiler():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(tokens_to_map, fullgraph=True, dynamic=True, backend=counter)
        for batch, height, width in MAP_SIZES:
            tokens = maps(batch, 1 + height * width, 3, dtype=torch.bfloat16)
            x = compiled(tokens, (height, width))
            assert x.dtype == torch.bfloat16
            assert torch.equal(x, tokens_to_map(tokens, (height, width)))
        assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("error", "words", "tokens", "grid", "prefix"),
    [
        (ValueError, "tokens must hold 1 + 4 x 4 = 17 tokens; got 16", torch.ones(1, 16, 3), (4, 4), 1),
        (ValueError, "tokens must hold 1 + 4 x 4 = 17 tokens; got 18", torch.ones(1, 18, 3), (4, 4), 1),
        (ValueError, "tokens must hold 5 + 3 = 8 tokens; got 4", torch.ones(1, 4, 3), (3,), 5),
        (ValueError, "tokens must hold 0 + 2 x 3 x 2 = 12 tokens; got 13",
         torch.ones(1, 13, 3), (2, 3, 2), 0),
        (ValueError, "tokens must have shape [B, N, C]; got (16, 3)", torch.ones(16, 3), (4, 4), 0),
        (ValueError, "tokens must have shape [B, N, C]; got (1, 3, 4, 4)",
         torch.ones(1, 3, 4, 4), (4, 4), 0),
        (ValueError, "tokens must have shape [B, N, C]; got list", [[[1.0]]], (1, 1), 0),
        (ValueError, "grid must be at least 1; got 0", torch.ones(1, 17, 3), (0, 4), 1),
        (ValueError, "grid must be at least 1; got -4", torch.ones(1, 17, 3), (-4, -4), 1),
        (TypeError, "grid must be an int; got 4.0", torch.ones(1, 17, 3), (4.0, 4), 1),
        (TypeError, "grid must be an int; got '4'", torch.ones(1, 17, 3), "44", 1),
        (ValueError, "prefix_tokens must be an int of at least 0; got -1",
         torch.ones(1, 15, 3), (4, 4), -1),
        (ValueError, "prefix_tokens must be an int of at least 0; got True",
         torch.ones(1, 17, 3), (4, 4), True),
        (ValueError, "prefix_tokens must be an int of at least 0; got 1.0",
         torch.ones(1, 17, 3), (4, 4), 1.0),
        (ValueError, "prefix_tokens must be an int of at least 0; got None",
         torch.ones(1, 17, 3), (4, 4), None),
    ],
)  # fmt: skip
def test_tokens_to_map_wrong_arguments(error, words, tokens, grid, prefix):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        tokens_to_map(tokens, grid, prefix_tokens=prefix)
