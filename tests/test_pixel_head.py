"""PixelHead and tokens_to_map: their layers and tokens one by one, and their own errors."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers import assert_close, fresh_compiler
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import L2Norm, PixelHead, SpatialAdaptor, tokens_to_map


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- PixelHead ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "widths"),
    [(9, (9,)), ((9,), (9,)), ([9, 8], (9, 8)), ((), ()), (np.array([9, 8]), (9, 8))],
    ids=str,
)
@pytest.mark.parametrize("predictor", [True, False])
def test_it_is_projector_and_predictor(hidden, widths, predictor):
    head = PixelHead(5, hidden, 4, predictor=predictor)
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * len(widths) + [nn.Conv2d]
    assert [name for name, _ in head.named_children()] == ["projector", "predictor"]
    assert predictor or type(head.predictor) is nn.Identity
    for part, inputs in ((head.projector, 5), (head.predictor, 4))[: 1 + predictor]:
        assert [type(layer) for layer in part] == layers
        chain = itertools.pairwise((inputs, *widths, 4))
        for layer, (before, after) in zip(part[::3], chain, strict=True):
            assert layer.weight.shape == (after, before, 1, 1)
            assert (layer.bias is not None) == (layer is part[-1])
        assert [layer.num_features for layer in part[1::3]] == list(widths)
    x = random(2, 5, 3, 4, dtype=torch.float32)
    assert torch.equal(head(x), head.predictor(head.projector(x)))
    assert torch.equal(torch.fx.symbolic_trace(head)(x), head(x))  # PyTorch's layers, no checks


def test_it_equals_the_loop():
    torch.manual_seed(0)
    head = PixelHead(3, (5, 4), 2).eval()
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    x = random(2, 3, 3, 2, dtype=torch.float32)
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


def teacher_head(*widths):
    layers = [nn.Linear(*pair) for pair in itertools.pairwise((7, *widths))]
    inner = [x for layer in layers for x in (layer, nn.ReLU())][:-1]
    return SpatialAdaptor(nn.Sequential(nn.Sequential(*inner), L2Norm()))


@pytest.mark.parametrize("widths", [(6,), (9, 6), (9, 8, 6)])
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("in_channels", [4, 7, 6], ids=["fewer", "more", "as many as come out"])
def test_like_takes_the_widths_of_the_adapted_head(widths, predictor, in_channels):
    adaptor = teacher_head(*widths)
    head = PixelHead.like(adaptor, in_channels, predictor=predictor)
    expected = PixelHead(in_channels, widths[:-1], widths[-1], predictor=predictor)
    assert repr(head) == repr(expected)
    assert (
        PixelHead.like(adaptor, 3).state_dict().keys()
        == PixelHead(3, widths[:-1], 6).state_dict().keys()
    )
    teacher = adaptor(random(2, 7, 3, 4, dtype=torch.float32))
    assert head(random(2, in_channels, 3, 4, dtype=torch.float32)).shape == teacher.shape


def test_like_makes_the_class_it_is_called_on():
    class Subclass(PixelHead):
        pass

    assert type(Subclass.like(SpatialAdaptor(nn.Linear(4, 3)), 2)) is Subclass


@pytest.mark.parametrize(
    ("error", "words", "adaptor"),
    [
        (TypeError, "adaptor must be a SpatialAdaptor; got Linear", nn.Linear(4, 4)),
        (TypeError, "adaptor must be a SpatialAdaptor; got NoneType", None),
        (ValueError, "adaptor must have a linear layer", SpatialAdaptor(nn.BatchNorm1d(4))),
    ],
)
def test_like_wrong_adaptors(error, words, adaptor):
    with pytest.raises(error, match=words):
        PixelHead.like(adaptor, 3)


@pytest.mark.parametrize("hidden", [0, (8, 0), "8", 8.0, [8.0], None, True])
def test_wrong_hidden_widths(hidden):
    with pytest.raises((ValueError, TypeError), match=r"^hidden must be (an int|at least 1); got"):
        PixelHead(4, hidden, 3)


@pytest.mark.parametrize("predictor", [True, False])
def test_a_learning_step_changes_every_parameter_and_statistic(predictor):
    torch.manual_seed(0)
    head = PixelHead(5, (9, 8), 4, predictor=predictor)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    x = random(3, 5, 4, 3, dtype=torch.float32).requires_grad_()
    first = (head(x) - 1).pow(2).mean()
    first.backward()
    optimizer.step()
    assert x.grad.norm() > 0
    same = {key for key, value in head.state_dict().items() if torch.equal(value, before[key])}
    # the predictor's first BatchNorm takes out what this one adds
    assert same <= ({"projector.6.bias"} if predictor else set())
    assert (head(x) - 1).pow(2).mean() < first


def test_channels_last_and_autocast():
    torch.manual_seed(0)
    head, x = PixelHead(5, 8, 4).eval(), random(2, 5, 3, 4, dtype=torch.float32)
    last = head(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head(x)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, head(x), 2e-2)


# --- tokens_to_map --------------------------------------------------------------------------------


GRIDS = [(3, 5), (1, 1), (7, 1), [4, 4], (6,), (2, 3, 2), torch.Size((4, 4)), np.array([2, 8])]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5, np.int64(1)])
def test_tokens_to_map_equals_the_loop(grid, prefix):
    tokens = random(2, prefix + math.prod(grid), 4)
    x = tokens_to_map(tokens, grid, prefix_tokens=prefix)
    assert x.shape == (2, 4, *grid)
    positions = itertools.product(*map(range, grid))  # the last axis runs fastest
    for number, position in enumerate(positions):
        for image, channel in itertools.product(range(2), range(4)):
            assert x[(image, channel, *position)] == tokens[image, prefix + number, channel]
    if prefix == 1:
        assert torch.equal(tokens_to_map(tokens, grid), x)  # the default


@pytest.mark.parametrize("grid", [None, 4, 16, {4, 2}, (), (1, 2, 4, 2), "44"])
def test_a_grid_is_never_guessed(grid):
    with pytest.raises(TypeError, match="grid"):
        tokens_to_map(torch.ones(1, 17, 3))
    with pytest.raises(TypeError, match=re.escape("of 1 to 3 ints; got ") + ".*"):
        tokens_to_map(torch.ones(1, 17, 3), grid)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_tokens_to_map_copies_nothing(layout):
    tokens = random(2, 13, 4)
    if layout == "sliced":
        tokens = torch.cat([tokens, tokens], dim=2)[:, :, 2:6]
    if layout == "transposed":
        tokens = tokens.mT.contiguous().mT
    x = tokens_to_map(tokens, (3, 4))
    assert x.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert torch.equal(x, tokens[:, 1:].mT.reshape(2, 4, 3, 4))
    tokens[0, 1, 2] = 17.0
    assert x[0, 2, 0, 0] == 17.0


def test_gradients_reach_the_patches_only():
    tokens = random(2, 8, 3).requires_grad_()
    cotangent = random(2, 3, 2, 3, seed=1)
    (grad,) = torch.autograd.grad(
        (tokens_to_map(tokens, (2, 3), prefix_tokens=2) * cotangent).sum(), tokens
    )
    assert torch.equal(grad[:, :2], torch.zeros(2, 2, 3, dtype=torch.float64))
    assert torch.equal(grad[:, 2:], cotangent.flatten(2).mT)


def test_a_vit_teacher_goes_through_the_adaptor():
    head = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)).double()
    tokens = random(2, 11, 5)
    out = SpatialAdaptor(head)(tokens_to_map(tokens, (2, 5)))
    assert_close(out.mean((2, 3)), head(tokens[:, 1:].mean(1)), 1e-13)


def test_torch_fx_traces_tokens_to_map():
    """In a ViT's forward, of which a feature extractor is made."""

    class Backbone(nn.Module):
        def forward(self, tokens):
            return tokens_to_map(tokens, (2, 3))

    tokens = random(2, 7, 4)
    traced = torch.fx.symbolic_trace(Backbone())
    assert torch.equal(traced(tokens), tokens_to_map(tokens, (2, 3)))


def test_tokens_to_map_compiles_once():
    with fresh_compiler():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(tokens_to_map, fullgraph=True, dynamic=True, backend=counter)
        for batch, height, width in ((2, 3, 4), (3, 5, 7), (4, 2, 11)):
            tokens = random(batch, 1 + height * width, 3, dtype=torch.bfloat16)
            x = compiled(tokens, (height, width))
            assert x.dtype == torch.bfloat16
            assert torch.equal(x, tokens_to_map(tokens, (height, width)))
        assert counter.frame_count == 1


HOLD = "tokens must hold"


@pytest.mark.parametrize(
    ("error", "words", "tokens", "grid", "prefix"),
    [
        (ValueError, f"{HOLD} 1 + 4 x 4 = 17 tokens; got 16. prefix_tokens=0 would fit",
         torch.ones(1, 16, 3), (4, 4), 1),
        (ValueError, f"{HOLD} 1 + 4 x 4 = 17 tokens; got 21. prefix_tokens=5 would fit",
         torch.ones(1, 21, 3), (4, 4), 1),
        (ValueError, f"{HOLD} 5 + 3 = 8 tokens; got 2", torch.ones(1, 2, 3), (3,), 5),
        (ValueError, f"{HOLD} 0 + 2 x 3 x 2 = 12 tokens; got 13. prefix_tokens=1 would fit",
         torch.ones(1, 13, 3), (2, 3, 2), 0),
        (ValueError, "tokens must have shape [B, N, C]; got (16, 3)", torch.ones(16, 3), (4, 4), 0),
        (ValueError, "tokens must have shape [B, N, C]; got (1, 3, 4, 4)",
         torch.ones(1, 3, 4, 4), (4, 4), 0),
        (TypeError, "tokens must be a tensor; got list", [[[1.0]]], (1, 1), 0),
        (ValueError, "grid must be at least 1; got 0", torch.ones(1, 17, 3), (0, 4), 1),
        (ValueError, "grid must be at least 1; got -4", torch.ones(1, 17, 3), (-4, -4), 1),
        (TypeError, "grid must be an int; got 4.0", torch.ones(1, 17, 3), (4.0, 4), 1),
        (ValueError, "prefix_tokens must be at least 0; got -1", torch.ones(1, 15, 3), (4, 4), -1),
        (TypeError, "prefix_tokens must be an int; got True", torch.ones(1, 17, 3), (4, 4), True),
        (TypeError, "prefix_tokens must be an int; got 1.0", torch.ones(1, 17, 3), (4, 4), 1.0),
        (TypeError, "prefix_tokens must be an int; got None", torch.ones(1, 17, 3), (4, 4), None),
    ],
)  # fmt: skip
def test_tokens_to_map_wrong_arguments(error, words, tokens, grid, prefix):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        tokens_to_map(tokens, grid, prefix_tokens=prefix)
