"""MaskedReceptiveTokens and its functions: official outputs, the real convolution, properties, edges."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LargestTensor,
    assert_close,
    assert_within_budget,
    fresh_compiler,
    golden,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import MaskedReceptiveTokens, functional, receptive_tokens
from pixdistill.ops.masked_distance.tokens import window_sums
from pixdistill.receptive_tokens import mask_diversity, pooled_convolution, token_masks

DETECTION = ("maskd_det_weighted", "maskd_det_custom", "maskd_det_plain")


def a_map(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def build(channels=4, num_tokens=3, *, weighted=True, seed=0, dtype=torch.float64):
    """Tokens with masks far from 1/2 and weights far from 1/T; biases are not zero."""
    tokens = MaskedReceptiveTokens(channels, num_tokens, weighted=weighted).double()
    for number, parameter in enumerate(tokens.parameters()):
        parameter.data.copy_(a_map(*parameter.shape, seed=seed + 10 + number))
    return tokens.to(dtype)


def state_of(official):
    return {key[6:]: value for key, value in official.items() if key.startswith("state.")}


def official_tokens(name):
    official = golden(name)
    state = {f"mask_modules.0.{key}": value for key, value in state_of(official).items()}
    return MaskedReceptiveTokens.from_official({"state_dict": state})[0], official


def dense_masks(x, token):
    """A scalar product for each token, one after the other."""
    return torch.stack([(x * e.view(1, -1, 1, 1)).sum(1).sigmoid() for e in token], dim=1)


def dense_forward(x, tokens):
    """Masked maps token by token, with the real convolution for their weights."""
    masks = dense_masks(x, tokens.mask_token)
    weights = torch.ones(masks.shape[:2], dtype=x.dtype)
    if tokens.weighted:
        weights = tokens.prob(x).flatten(1).softmax(1)
    maps = [masks[:, t, None] * weights[:, t, None, None, None] * x for t in range(masks.shape[1])]
    return sum(maps), dense_diversity(masks), masks, weights


def dense_diversity(masks):
    count = masks.shape[1]
    terms = []
    for image in masks:
        for t in range(count):
            for u in range(count):
                if t != u:
                    above = 2 * (image[t] * image[u]).sum()
                    terms.append(above / ((image[t] ** 2).sum() + (image[u] ** 2).sum() + 2e-12))
    return torch.stack(terms).mean() if terms else masks.sum() * 0


def dense_window_sums(x, valid=None):
    """Tap by tap, output pixel by output pixel."""
    batch, channels, height, width = x.shape
    sums = x.new_zeros(batch, channels, 3, 3)
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                for i in range(3):
                    for j in range(3):
                        row, column = h + i - 1, w + j - 1
                        inside = 0 <= row < height and 0 <= column < width
                        if inside and (valid is None or (valid[b, h, w] and valid[b, row, column])):
                            sums[b, :, i, j] += x[b, :, row, column]
    return sums


def measure(tokens, x, cotangent):
    """Outputs and all gradients of `(map * cotangent).sum() + 3 * diversity`."""
    x = x.detach().clone().requires_grad_()
    masked_map, diversity = tokens(x)
    value = (masked_map * cotangent).sum() + 3 * diversity
    grads = torch.autograd.grad(value, [x, *tokens.parameters()])
    return masked_map.detach(), diversity.detach(), *grads


# --- The official outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6)], ids=str
)
def test_equals_official_outputs(name, dtype, tolerance):
    tokens, official = official_tokens(name)
    tokens.to(dtype)
    assert tokens.weighted == bool(official["weight_mask"])
    teacher = official["teacher"].to(dtype)
    assert_close(tokens.masks(teacher), official["masks_teacher"], tolerance)
    if tokens.weighted:
        assert_close(tokens.weights(teacher), official["weights_teacher"], tolerance)
    x = official["learn_input"].to(dtype, copy=True).requires_grad_()
    masked_map, diversity = tokens(x)
    ((masked_map * official["learn_cotangent"]).sum() + diversity).backward()
    assert masked_map.dtype == diversity.dtype == dtype
    assert_close(masked_map, official["learn_output"], tolerance)
    assert_close(diversity, official["dice"], tolerance)
    assert_close(x.grad, official["grad_learn_input"], tolerance)
    for key, parameter in tokens.named_parameters():
        assert_close(parameter.grad, official[f"grad_{key}"], 4 * tolerance)


def test_golden_files_hold_every_gradient():
    for name in DETECTION:
        tokens, official = official_tokens(name)
        names = {key for key, _ in tokens.named_parameters()}
        assert names == set(state_of(official))
        assert {f"grad_{key}" for key in names} <= set(official)


# --- The reformulations against the real thing ----------------------------------------------------

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_window_sums_are_those_of_each_tap(shape, seed):
    x = a_map(*shape, seed=seed)
    assert_close(window_sums(x), dense_window_sums(x), 1e-12)


@given(shape=shapes, out=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_pooled_convolution_equals_the_real_one(shape, out, seed):
    x, weight = a_map(*shape, seed=seed), a_map(out, shape[1], 3, 3, seed=seed + 1)
    bias, cotangent = a_map(out, seed=seed + 2), a_map(shape[0], out, seed=seed + 3)
    results = []
    for function in (
        pooled_convolution,
        lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1).mean((2, 3)),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad((value * cotangent).sum(), leaves)))
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1e-12 * (1 + truth.norm())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 1), (2, 2), (1, 2)], ids=str)
def test_maps_narrower_than_the_window(size):
    x = a_map(2, 3, *size)
    sums = window_sums(x)
    assert_close(sums, dense_window_sums(x), 1e-13)
    if size[0] == 1:  # nothing lies above or below, not even a rounding error
        assert (sums[:, :, [0, 2]] == 0).all()
    if size[1] == 1:
        assert (sums[..., [0, 2]] == 0).all()


@given(shape=shapes, seed=st.integers(0, 2**16), data=st.data())
def test_window_sums_of_valid_pixels(shape, seed, data):
    x = a_map(*shape, seed=seed)
    places = shape[0] * shape[2] * shape[3]
    entries = data.draw(st.lists(st.booleans(), min_size=places, max_size=places))
    valid = torch.tensor(entries).view(shape[0], *shape[2:])
    truth = dense_window_sums(x, valid)
    ours = window_sums(x.masked_fill(~valid.unsqueeze(1), torch.nan), valid_mask=valid)
    assert (ours - truth).norm() <= 1e-12 * (1 + truth.norm())


@given(
    shape=shapes,
    channels=st.integers(1, 4),
    count=st.integers(1, 4),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_forward_equals_dense_truth(shape, channels, count, weighted, seed):
    shape = (shape[0], channels, *shape[2:])
    tokens, x = build(channels, count, weighted=weighted, seed=seed), a_map(*shape, seed=seed)
    cotangent = a_map(*shape, seed=seed + 1)
    ours = measure(tokens, x, cotangent)
    leaf = x.clone().requires_grad_()
    masked_map, diversity, masks, weights = dense_forward(leaf, tokens)
    value = (masked_map * cotangent).sum() + 3 * diversity
    grads = torch.autograd.grad(value, [leaf, *tokens.parameters()])
    for a, b in zip(ours, (masked_map, diversity, *grads), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())
    assert_close(tokens.masks(x), masks, 1e-12)
    if weighted:
        assert_close(tokens.weights(x), weights, 1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted):
    tokens, x = build(2, 3, weighted=weighted), a_map(2, 2, 3, 4).requires_grad_()
    names = [name for name, _ in tokens.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(tokens, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in tokens.parameters()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_of_tokens_times_channels_times_pixels_is_made(weighted):
    tokens, x = build(6, 5, weighted=weighted, dtype=torch.float32), a_map(2, 6, 20, 21).float()
    with LargestTensor() as largest:
        masked_map, diversity = tokens(x.requires_grad_())
        (masked_map.square().sum() + diversity).backward()
    assert largest.size == x.numel()
    with LargestTensor() as largest:
        dense_forward(x, tokens)
        (x.unsqueeze(1) * tokens.masks(x).unsqueeze(2)).sum(1)
    assert largest.size == 5 * x.numel()  # the gauge sees what it should


def test_the_convolution_is_never_run():
    tokens, x = build(dtype=torch.float32), a_map(2, 4, 5, 6).float()
    tokens.prob.forward = None
    tokens.weights(x)
    tokens(x)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_replaced_convolution_is_read_or_refused(layer):
    """It is not called, so it must be a convolution; a parametrized one is."""
    tokens, x = build(dtype=torch.float32), a_map(2, 4, 5, 6).float()
    torch.nn.utils.parametrizations.weight_norm(tokens.prob[layer])
    with torch.no_grad():
        tokens.prob[layer].parametrizations.weight.original0.mul_(3)
    assert_close(tokens.weights(x), tokens.prob(x).flatten(1).softmax(1), 1e-6)
    wrong = (nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3 - layer, bias=False))
    for other in (*wrong, nn.Sequential(tokens.prob[layer], nn.ReLU())):
        tokens.prob[layer] = other
        with pytest.raises(TypeError, match=rf"prob.{layer} must be .* nn.Conv2d with bias"):
            tokens.weights(x)


def test_tokens_without_data_are_named():
    """PyTorch's product of a map and tokens on the meta device is whatever the memory held."""
    tokens, x = build(dtype=torch.float32).to("meta"), a_map(2, 4, 5, 6).float()
    for call in (tokens.masks, tokens.weights, tokens):
        with pytest.raises(ValueError, match=r"MaskedReceptiveTokens must be .* cpu; got meta"):
            call(x)


def test_vmap_keeps_the_gradient_of_the_map():
    tokens, x = build(), a_map(3, 2, 4, 5, 6).requires_grad_()
    for function in (tokens.masks, tokens.weights, lambda one: tokens(one)[0]):
        cotangent = torch.linspace(-1, 1, function(x[0]).numel(), dtype=x.dtype)
        (looped,) = torch.autograd.grad(
            sum(function(one).flatten() @ cotangent for one in x), x, retain_graph=True
        )
        mapped = torch.func.vmap(function)(x).flatten(1) @ cotangent
        assert_close(torch.autograd.grad(mapped.sum(), x)[0], looped, 1e-12)


# --- Properties -----------------------------------------------------------------------------------


@given(shape=shapes, count=st.integers(1, 5), scale=st.floats(0.1, 20), seed=st.integers(0, 2**16))
def test_masks_lie_between_zero_and_one_and_weights_sum_to_one(shape, count, scale, seed):
    tokens, x = build(shape[1], count, seed=seed), scale * a_map(*shape, seed=seed)
    masks, weights = tokens.masks(x), tokens.weights(x)
    assert masks.shape == (shape[0], count, *shape[2:])
    assert weights.shape == (shape[0], count)
    assert ((masks >= 0) & (masks <= 1)).all()
    assert (weights >= 0).all()
    assert_close(weights.sum(1), torch.ones(shape[0]), 1e-12)


def test_without_weights_they_are_uniform_and_the_map_is_a_plain_sum():
    tokens, x = build(4, 5, weighted=False), a_map(2, 4, 3, 3)
    assert torch.equal(tokens.weights(x), torch.full((2, 5), 0.2, dtype=torch.float64))
    assert [name for name, _ in tokens.named_parameters()] == ["mask_token"]
    assert_close(tokens(x)[0], x * tokens.masks(x).sum(1, keepdim=True), 1e-13)


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_permuting_pixels_permutes_the_masks(shape, seed):
    tokens, x = build(shape[1], 3, seed=seed), a_map(*shape, seed=seed)
    order = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(seed))
    shuffled = x.flatten(2)[..., order].unflatten(2, shape[2:])
    masks = tokens.masks(x).flatten(2)[..., order].unflatten(2, shape[2:])
    assert_close(tokens.masks(shuffled), masks, 1e-13)


def test_a_batch_is_its_images_one_by_one():
    tokens, x = build(), a_map(3, 4, 5, 4)
    masked_map, diversity = tokens(x)
    alone = [tokens(image) for image in x.split(1)]
    assert_close(masked_map, torch.cat([part for part, _ in alone]), 1e-13)
    assert_close(diversity, torch.stack([part for _, part in alone]).mean(), 1e-13)


def test_a_valid_rectangle_is_a_cropped_image():
    tokens, x = build(), a_map(2, 4, 6, 7)
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[:, 1:5, 2:6] = True
    assert_close(tokens.weights(x, valid_mask=valid), tokens.weights(x[:, :, 1:5, 2:6]), 1e-12)
    full = torch.ones_like(valid)
    assert_close(tokens.weights(x, valid_mask=full), tokens.weights(x), 1e-12)
    assert relative_error(tokens.weights(x, valid_mask=valid), tokens.weights(x)) > 1e-3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_weights_do_not_see_invalid_pixels_and_are_finite_without_any(poison):
    tokens, x = build(), a_map(3, 4, 3, 4)
    valid = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[1] = False
    expected = tokens.weights(x, valid_mask=valid)
    x.masked_fill_(~valid.unsqueeze(1), poison)
    assert torch.equal(tokens.weights(x, valid_mask=valid), expected)
    assert expected.isfinite().all()
    bias = F.linear(tokens.prob[0].bias, tokens.prob[2].weight.flatten(1), tokens.prob[2].bias)
    assert_close(expected[1], bias.softmax(0), 1e-13)


@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 4),
    pixels=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_diversity_is_the_mean_dice_of_ordered_pairs(batch, count, pixels, seed):
    masks = a_map(batch, count, 1, pixels, seed=seed).sigmoid()
    value = mask_diversity(masks)
    assert 0 <= value <= 1
    assert (value - dense_diversity(masks)).abs() <= 1e-12


def test_diversity_is_one_for_equal_and_zero_for_disjoint_masks():
    one = a_map(2, 1, 3, 4).sigmoid()
    assert_close(mask_diversity(one.expand(-1, 3, -1, -1)), torch.tensor(1.0), 1e-11)
    assert mask_diversity(torch.eye(4).reshape(1, 4, 2, 2)) == 0


def test_one_token_has_diversity_zero_and_a_zero_gradient():
    masks = a_map(2, 1, 3, 4).sigmoid().requires_grad_()
    value = mask_diversity(masks)
    value.backward()
    assert value == 0
    assert torch.equal(masks.grad, torch.zeros_like(masks))


def test_masks_that_are_zero_everywhere_have_finite_gradients():
    masks = torch.zeros(1, 3, 2, 2, requires_grad=True)
    mask_diversity(masks).backward()
    assert torch.equal(masks.grad, torch.zeros_like(masks))
    tokens, x = build(dtype=torch.float32), torch.ones(2, 4, 3, 3, requires_grad=True)
    tokens.mask_token.data.fill_(-1e3)
    masked_map, diversity = tokens(x)
    (masked_map.sum() + diversity).backward()
    assert diversity == 0
    assert (masked_map == 0).all()
    for leaf in (x, *tokens.parameters()):
        assert leaf.grad.isfinite().all()


def test_empty_batch():
    tokens, x = build(), torch.empty(0, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    masked_map, diversity = tokens(x)
    (masked_map.sum() + diversity).backward()
    assert masked_map.shape == x.shape
    assert diversity == 0
    assert tokens.weights(x).shape == (0, 3)
    assert all((p.grad == 0).all() for p in tokens.parameters())


def test_nan_shows():
    tokens, x = build(), a_map(2, 4, 3, 3)
    x[0, 1, 2, 0] = torch.nan
    masked_map, diversity = tokens(x)
    assert masked_map[0].isnan().all()
    assert diversity.isnan()
    assert masked_map[1].isfinite().all()


# --- Dtypes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_error_stays_within_twice_plain_pytorch(dtype, autocast):
    tokens = build(16, 5, dtype=torch.float32)
    tokens.mask_token.data /= 4
    x, cotangent = a_map(2, 16, 9, 7, dtype=dtype), a_map(2, 16, 9, 7, seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = measure(tokens, x, cotangent)
    leaf = x.clone().requires_grad_()
    plain_tokens = tokens if autocast else copy.deepcopy(tokens).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        masked_map, diversity, _, _ = dense_forward(leaf, plain_tokens)
        if autocast:  # sums are no matrix products: the masks as one would write them
            masks = torch.matmul(tokens.mask_token, leaf.flatten(2)).sigmoid()
            weights = tokens.prob(leaf).flatten(1).softmax(1)
            seen = (weights.unsqueeze(2) * masks).sum(1).view(2, 1, 9, 7)
            masked_map, diversity = leaf * seen, dense_diversity(masks)
    value = (masked_map * cotangent).sum() + 3 * diversity
    plain = (masked_map, diversity, *torch.autograd.grad(value, [leaf, *plain_tokens.parameters()]))
    truth = measure(copy.deepcopy(tokens).double(), x.double(), cotangent.double())
    assert ours[0].dtype == ours[2].dtype == dtype
    assert ours[1].dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in ours[3:])
    tiny = 5e-6 if dtype == torch.float32 else 2e-3
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert_within_budget(a, b, c, tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_masks_weights_and_diversity_are_float32_at_least(dtype):
    tokens, x = build(dtype=torch.float32), a_map(2, 4, 3, 3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    valid = torch.ones(2, 3, 3, dtype=torch.bool)
    for half in (tokens, copy.deepcopy(tokens).half()):
        assert half.masks(x).dtype == half.weights(x).dtype == wide
        assert half.weights(x, valid_mask=valid).dtype == wide
        masked_map, diversity = half(x)
        assert masked_map.dtype == dtype
        assert diversity.dtype == wide
    assert build(weighted=False).weights(x).dtype == wide


def test_autocast_leaves_float32_products_alone():
    tokens, x = build(dtype=torch.float32), a_map(2, 4, 3, 3, dtype=torch.float32)
    expected = tokens.masks(x), tokens.weights(x), *tokens(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = tokens.masks(x), tokens.weights(x), *tokens(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_float16_sums_above_its_range():
    x = torch.full((1, 2, 300, 300), 2.0, dtype=torch.float16)
    valid = torch.ones(1, 300, 300, dtype=torch.bool)
    for mask in (None, valid):
        assert_close(window_sums(x, valid_mask=mask)[0, 0, 1, 1], torch.tensor(180_000.0), 1e-6)
    row = torch.full((1, 1, 1, 40_000), 2.0, dtype=torch.float16)  # one row alone exceeds it
    assert_close(window_sums(row)[0, 0, 1, 1], torch.tensor(80_000.0), 1e-6)
    tokens = MaskedReceptiveTokens(2, 2)
    tokens.mask_token.data.copy_(torch.tensor([[8.0, 8.0], [8.0, 0.0]]))
    assert_close(tokens(x)[1], torch.tensor(1.0), 1e-3)
    assert_close(mask_diversity(x), torch.tensor(1.0), 1e-6)


def test_masks_below_the_range_of_float16():
    tokens, x = MaskedReceptiveTokens(1, 1), torch.full((1, 1, 1, 1), -20.0, dtype=torch.float16)
    tokens.mask_token.data.fill_(1.0)
    assert_close(tokens.masks(x), torch.tensor(-20.0).sigmoid().view(1, 1, 1, 1), 1e-6)


# --- Checkpoints and state ------------------------------------------------------------------------


def checkpoint(levels=3, channels=4, num_tokens=3, *, weighted=True):
    tokens = [build(channels, num_tokens, weighted=weighted, seed=i).float() for i in range(levels)]
    state = {
        f"mask_modules.{i}.{key}": value
        for i, module in enumerate(tokens)
        for key, value in module.state_dict().items()
    }
    return tokens, state


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_official_detection_layout_round_trip(weighted, inside):
    tokens, state = checkpoint(weighted=weighted)
    file = {"meta": {"epoch": 1}, "state_dict": state} if inside else state
    loaded = MaskedReceptiveTokens.from_official(file)
    assert [type(module) for module in loaded] == [MaskedReceptiveTokens] * 3
    x = a_map(2, 4, 3, 3, dtype=torch.float32)
    for module, original in zip(loaded, tokens, strict=True):
        assert (module.channels, module.num_tokens, module.weighted) == (4, 3, weighted)
        assert all(torch.equal(a, b) for a, b in zip(module(x), original(x), strict=True))
        assert all(p.requires_grad for p in module.parameters())
    saved = MaskedReceptiveTokens.to_official(loaded)
    assert saved["state_dict"].keys() == state.keys()
    assert all(torch.equal(saved["state_dict"][key], state[key]) for key in state)


def test_official_names_and_shapes():
    shapes = {key: tuple(value.shape) for key, value in build(4, 3).state_dict().items()}
    assert shapes == {
        "mask_token": (3, 4),
        "prob.0.weight": (4, 4, 3, 3),
        "prob.0.bias": (4,),
        "prob.2.weight": (3, 4, 1, 1),
        "prob.2.bias": (3,),
    }


def test_a_detector_in_the_same_file_is_ignored():
    tokens, state = checkpoint(levels=11)  # "10" comes before "2" in the alphabet
    extra = {"backbone.conv1.weight": torch.ones(1), "mask_token": torch.ones(2, 2)}
    extra["neck.mask_modules.0.mask_token"] = torch.ones(2, 2)
    loaded = MaskedReceptiveTokens.from_official(extra | state)
    for module, original in zip(loaded, tokens, strict=True):
        assert torch.equal(module.mask_token, original.mask_token)


def test_official_segmentation_layout_round_trip():
    official = golden("maskd_seg")
    (module,) = MaskedReceptiveTokens.from_official({"mask_token": official["mask_token"]})
    assert not module.weighted
    assert torch.equal(module.mask_token, official["mask_token"])
    saved = MaskedReceptiveTokens.to_official(module)
    assert saved.keys() == {"mask_token"}
    assert torch.equal(saved["mask_token"], official["mask_token"])


def test_a_file_survives_saving(tmp_path):
    tokens, _ = checkpoint()
    torch.save(MaskedReceptiveTokens.to_official(tokens), tmp_path / "masks.pth")
    loaded = MaskedReceptiveTokens.from_official(torch.load(tmp_path / "masks.pth"))
    for module, original in zip(loaded, tokens, strict=True):
        assert torch.equal(module.prob[0].weight, original.prob[0].weight)


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        ("mask_modules.1.prob.2.bias", None, r"missing keys: \['mask_modules.1.prob.2.bias'\]"),
        ("mask_modules.0.mask_token", None, r"missing keys: \['mask_modules.0.mask_token'\]"),
        (None, "mask_modules.1.prob.1.bias", r"unexpected keys: \['mask_modules.1.prob.1.bias'\]"),
        (
            None,
            "mask_modules.7.mask_token",
            "missing keys: .*mask_modules.3.mask_token.*unexpected",
        ),
        (None, "mask_modules.x.mask_token", r"unexpected keys: \['mask_modules.x.mask_token'\]"),
    ],
)
def test_strict_in_the_detection_layout(drop, add, words):
    _, state = checkpoint()
    if drop:
        del state[drop]
    if add:
        state[add] = torch.ones(3, 4)
    with pytest.raises(ValueError, match=words):
        MaskedReceptiveTokens.from_official({"state_dict": state})


def test_strict_in_the_segmentation_layout():
    for state, words in (
        ({}, r"missing keys: \['mask_token'\], unexpected keys: \[\]"),
        ({"mask_token": torch.ones(2, 3), "prob.0.bias": torch.ones(3)}, "unexpected.*prob.0.bias"),
        ({"module.mask_token": torch.ones(2, 3)}, r"unexpected keys: \['module.mask_token'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskedReceptiveTokens.from_official(state)


def test_shapes_that_do_not_fit_are_named():
    _, state = checkpoint()
    state["mask_modules.2.prob.0.bias"] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"size mismatch for prob\.0\.bias"):
        MaskedReceptiveTokens.from_official(state)
    with pytest.raises(ValueError, match=r"mask_token must have shape \[T, C\]; got \(4,\)"):
        MaskedReceptiveTokens.from_official({"mask_token": torch.ones(4)})
    with pytest.raises(TypeError, match="state_dict must be a mapping; got list"):
        MaskedReceptiveTokens.from_official([])


def test_to_official_refuses_what_the_official_code_cannot_load():
    with pytest.raises(ValueError, match=r"must not be weighted.*pass \[tokens\]"):
        MaskedReceptiveTokens.to_official(build())
    with pytest.raises(ValueError, match="all weighted or none"):
        MaskedReceptiveTokens.to_official([build(), build(weighted=False)])


@pytest.mark.parametrize("weighted", [False, True])
def test_learns_from_maps_made_in_inference_mode(weighted):
    def gradients(x, valid):
        parts = [*tokens(x), token_masks(x, tokens.mask_token).square()]
        parts.append(tokens.weights(x, valid_mask=valid).square())
        loss = sum(part.sum() for part in parts)
        return torch.autograd.grad(loss, list(tokens.parameters()))

    tokens, x, valid = build(weighted=weighted), a_map(2, 4, 3, 3), torch.rand(2, 3, 3) > 0.3
    expected = gradients(x, valid)
    with torch.inference_mode():
        x, valid = x.clone(), valid.clone()
    for ours, truth in zip(gradients(x, valid), expected, strict=True):
        assert torch.equal(ours, truth)


def test_defaults():
    tokens = MaskedReceptiveTokens(8)
    assert (tokens.num_tokens, tokens.weighted) == (6, True)


@pytest.mark.parametrize("later", [False, True])
def test_starts_as_in_the_official_code(later):
    """Also where parameters are made after the module, and every submodule is then reset."""
    torch.manual_seed(0)
    with torch.device("meta" if later else "cpu"):
        tokens = MaskedReceptiveTokens(128, 64)
    if later:
        tokens.to_empty(device="cpu")
    for parameter in tokens.parameters():
        parameter.data.fill_(1)
    for module in tokens.modules() if later else [tokens]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for parameter, deviation in (
        (tokens.mask_token, 0.01),
        (tokens.prob[0].weight, (2 / (9 * 128)) ** 0.5),
        (tokens.prob[2].weight, (2 / 64) ** 0.5),
    ):
        assert abs(parameter.std() / deviation - 1) < 0.05
        assert abs(parameter.mean()) < 0.05 * deviation + 1e-3
    assert (tokens.prob[0].bias == 0).all()
    assert (tokens.prob[2].bias == 0).all()


def test_a_seed_gives_the_numbers_of_plain_convolutions():
    torch.manual_seed(3)
    tokens = MaskedReceptiveTokens(4, 3)
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 3, 1)
    assert torch.equal(tokens.mask_token, torch.empty(3, 4).normal_(0, 0.01))
    for layer, fan_out in zip(plain, (36, 3), strict=True):
        layer.weight.data.normal_(0, (2 / fan_out) ** 0.5)
    assert torch.equal(tokens.prob[0].weight, plain[0].weight)
    assert torch.equal(tokens.prob[2].weight, plain[1].weight)


def test_functions_are_exported():
    for name in ("token_masks", "mask_diversity", "pooled_convolution"):
        assert getattr(functional, name) is getattr(receptive_tokens, name)
    tokens, x = build(), a_map(2, 4, 3, 3)
    assert torch.equal(token_masks(x, tokens.mask_token), tokens.masks(x))


# --- Compilation ----------------------------------------------------------------------------------

MAP_SIZES = ((2, 5, 7), (3, 6, 5), (2, 9, 8))


def measure_all(function, tokens, x):
    leaf = x.clone().requires_grad_()
    masked_map, diversity = function(leaf)
    value = (masked_map * x).sum() + 3 * diversity
    return masked_map, diversity, *torch.autograd.grad(value, [leaf, *tokens.parameters()])


@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_once_for_all_map_sizes(weighted):
    tokens = build(12, 3, weighted=weighted, dtype=torch.float32)
    tokens.mask_token.data /= 3
    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(tokens, fullgraph=True, dynamic=True, backend=counter)
        for batch, height, width in MAP_SIZES:
            x = a_map(batch, 12, height, width, dtype=torch.float32)
            ours, eager = (measure_all(function, tokens, x) for function in (compiled, tokens))
            for a, b in zip(ours, eager, strict=True):
                assert_close(a, b, 2e-6)
        assert counter.frame_count == 1


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "arguments", "settings"),
    [
        (ValueError, "channels must be at least 1; got 0", (0,), {}),
        (ValueError, "num_tokens must be at least 1; got 0", (4, 0), {}),
    ],
)
def test_wrong_settings(error, words, arguments, settings):
    with pytest.raises(error, match=words):
        MaskedReceptiveTokens(*arguments, **settings)


MAP = torch.randn(2, 4, 3, 5)
ALL = torch.ones(2, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize("method", ["masks", "weights", "forward"])
@pytest.mark.parametrize(
    ("error", "words", "x"),
    [
        (ValueError, r"x must have shape \[B, 4, H, W\].*got \(2, 3, 3, 5\)", MAP[:, :3]),
        (ValueError, r"H and W at least 1; got \(2, 4, 0, 5\)", MAP[:, :, :0]),
        (ValueError, r"H and W at least 1; got \(2, 4, 3, 0\)", MAP[..., :0]),
    ],
)
def test_wrong_maps(method, error, words, x):
    with pytest.raises(error, match=words):
        getattr(MaskedReceptiveTokens(4), method)(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_wrong_masks(weighted):
    tokens = MaskedReceptiveTokens(4, weighted=weighted)
    with pytest.raises(TypeError, match="valid_mask must be a bool tensor"):
        tokens.weights(MAP, valid_mask=ALL.float())
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\); got \(2, 5, 3\)"):
        tokens.weights(MAP, valid_mask=ALL.mT)
