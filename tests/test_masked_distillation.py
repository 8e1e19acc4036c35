"""MaskedDistillationLoss: official outputs, the formula with explicit loops, properties and edges."""

import copy
import itertools
import math
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import ListLike
from helpers import (
    BACKENDS,
    LargestTensor,
    assert_close,
    device_of,
    fresh_compiler,
    golden,
    launches,
    needs_torch,
    relative_error,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import MaskedDistillationLoss, MaskedReceptiveTokens
from pixdistill.functional import masked_distillation_loss
from pixdistill.ops.masked_distance import chunked


def masked_distance(*arguments, **settings):
    return masked_distillation_loss(*arguments, reduction="none", **settings)


DETECTION = ("maskd_det_weighted", "maskd_det_custom", "maskd_det_plain")
SHAPE = (2, 4, 5, 6)


def maps(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return pair[0].to(dtype), pair[1].to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def build_tokens(channels=4, num_tokens=3, *, weighted=True, seed=0, dtype=torch.float64):
    """Tokens with masks far from 1/2 and weights far from 1/T; biases are not zero."""
    tokens = MaskedReceptiveTokens(channels, num_tokens, weighted=weighted).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in tokens.parameters():
        parameter.data.normal_(generator=generator)
    return tokens.to(dtype)


def build(tokens=None, dtype=torch.float64, **settings):
    tokens = build_tokens(dtype=dtype) if tokens is None else tokens
    return MaskedDistillationLoss(tokens, **settings).to(dtype)


def measure(loss, student, teacher, mask=None, factor=1.0):
    """Value and the student's gradient; a loss an image is weighed image by image."""
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(student, teacher, valid_mask=mask)
    (grad,) = torch.autograd.grad(weighted_sum(value) * factor, student)
    return value.detach(), grad


def weighted_sum(value):
    weights = torch.linspace(1.0, 2.0, max(value.numel(), 1), dtype=value.dtype)
    return (value.flatten() * weights[: value.numel()]).sum()


def dense_distance(student, teacher, masks, weights=None, eps=0.0, valid=None):
    """The formula `[B]` image by image, token by token, channel by channel."""
    images = []
    for b in range(student.shape[0]):
        seen = torch.ones_like(masks[b, 0], dtype=torch.bool) if valid is None else valid[b]
        value = student[b].sum() * 0 if seen.all() else student[b][:, seen].sum() * 0
        for t in range(masks.shape[1]):
            mask = masks[b, t][seen].detach()
            share = 1 / masks.shape[1] if weights is None else weights[b, t].detach()
            area = mask.sum() + eps
            if area > 0:
                for c in range(student.shape[1]):
                    gap = student[b, c][seen] - teacher[b, c][seen].detach()
                    value = value + share * ((mask * gap) ** 2).sum() / area / student.shape[1]
        images.append(value)
    return torch.stack(images)


def dense_weights(tokens, teacher):
    if tokens.prob is None:
        return None
    return tokens.prob(teacher).flatten(1).softmax(1).detach()


def dense_loss(tokens, student, teacher, *, custom=False, eps=1e-5, valid=None, weights=None):
    """A loss an image, with the real convolution; `weights` where a mask leaves the image no edge."""
    token = tokens.mask_token.detach()
    masks = torch.einsum("tc,bchw->bthw", token, teacher).sigmoid()
    if custom:
        masks = masks * torch.einsum("tc,bchw->bthw", token, student.detach()).sigmoid()
    weights = dense_weights(tokens, teacher) if weights is None else weights
    return dense_distance(student, teacher, masks, weights, eps, valid)


def dense_with_grad(student, *arguments, reduce=torch.Tensor.mean, **settings):
    student = student.detach().clone().requires_grad_()
    value = reduce(dense_loss(arguments[0], student, *arguments[1:], **settings))
    (grad,) = torch.autograd.grad(weighted_sum(value), student)
    return value.detach(), grad


def assert_same(ours, truth, tolerance):
    """Values and gradients; absolute where everything vanishes."""
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-3)


# --- The official outputs -------------------------------------------------------------------------


def official_problem(name, dtype):
    official = golden(name)
    if name == "maskd_seg":
        tokens = MaskedReceptiveTokens.from_official({"mask_token": official["mask_token"]})
        settings, factor = {"eps": 1e-5}, 0.5
    else:
        state = {k[6:]: v for k, v in official.items() if k.startswith("state.")}
        state = {f"mask_modules.0.{key}": value for key, value in state.items()}
        tokens = MaskedReceptiveTokens.from_official({"state_dict": state})
        settings = {"eps": 0.0, "customize_after": 0 if official["custom_mask"] else None}
        factor = 1.0
    loss = MaskedDistillationLoss(tokens, **settings).to(dtype)
    return loss, official["student"].to(dtype), official["teacher"].to(dtype), factor, official


@pytest.mark.parametrize("name", [*DETECTION, "maskd_seg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_official_outputs(name, dtype):
    loss, student, teacher, factor, official = official_problem(name, dtype)
    value, grad = measure(loss, student, teacher, factor=factor)
    assert value.dtype == dtype
    assert_close(factor * value, official["loss"], 1e-6)
    assert_close(grad, official["grad_student"], 1e-6)


def test_official_outputs_tell_the_variants_apart():
    for name, change in itertools.product(
        [*DETECTION, "maskd_seg"], [{"customize_after": 0}, {"eps": 1.0}]
    ):
        loss, student, teacher, factor, official = official_problem(name, torch.float64)
        if loss.customize_after == change.get("customize_after", -1):
            continue
        other = MaskedDistillationLoss(loss.tokens, **{"eps": loss.eps, **change})
        assert relative_error(factor * other(student, teacher), official["loss"]) > 1e-3


# --- The formula ----------------------------------------------------------------------------------

problems = st.fixed_dictionaries(
    {
        "shape": st.tuples(*(st.integers(1, n) for n in (3, 4, 5, 5))),
        "num_tokens": st.integers(1, 4),
        "weighted": st.booleans(),
        "custom": st.booleans(),
        "eps": st.sampled_from([0.0, 1e-5, 0.3]),
        "seed": st.integers(0, 2**16),
    }
)


def make(problem):
    tokens = build_tokens(
        problem["shape"][1],
        problem["num_tokens"],
        weighted=problem["weighted"],
        seed=problem["seed"],
    )
    settings = {"customize_after": 0 if problem["custom"] else None, "eps": problem["eps"]}
    return tokens, settings, *maps(*problem["shape"], seed=problem["seed"])


@given(problem=problems, reduction=st.sampled_from(["mean", "sum", "none"]))
def test_any_problem_equals_dense_truth(problem, reduction):
    tokens, settings, student, teacher = make(problem)
    loss = build(tokens, reduction=reduction, **settings)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": torch.clone}[reduction]
    truth = dense_with_grad(
        student, tokens, teacher, custom=problem["custom"], eps=problem["eps"], reduce=reduce
    )
    assert_same(measure(loss, student, teacher), truth, 1e-11)


@given(problem=problems, data=st.data())
def test_any_valid_mask_deletes_pixels(problem, data):
    tokens, settings, student, teacher = make(problem)
    batch, _, height, width = student.shape
    entries = st.lists(
        st.booleans(), min_size=student[:, 0].numel(), max_size=batch * height * width
    )
    valid = torch.tensor(data.draw(entries)).view(batch, height, width)
    loss = build(tokens, reduction="none", **settings)
    ours = measure(loss, student, teacher, valid)
    truth = dense_with_grad(
        student,
        tokens,
        teacher,
        custom=problem["custom"],
        eps=problem["eps"],
        valid=valid,
        weights=tokens.weights(teacher, valid_mask=valid),
        reduce=torch.clone,
    )
    assert_same(ours, truth, 1e-11)
    hidden = ~valid.unsqueeze(1)
    poisoned = measure(
        loss, student.masked_fill(hidden, torch.nan), teacher.masked_fill(hidden, torch.inf), valid
    )
    assert all(torch.equal(a, b) for a, b in zip(poisoned, ours, strict=True))


def distance_problem(seed=0, dtype=torch.float64):
    student, teacher = maps(*SHAPE, seed=seed)
    masks = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]).double()
    return [x.to(dtype) for x in (student, teacher, masks, weights)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_masked_distance_equals_the_formula(weighted, eps):
    student, teacher, masks, weights = distance_problem()
    weights = weights if weighted else None
    ours = masked_distance(student, teacher, masks, weights, eps=eps)
    assert_close(ours, dense_distance(student, teacher, masks, weights, eps), 1e-13)
    if weighted:  # the lines of its docstring
        masked = masks.unsqueeze(2) * (student - teacher).unsqueeze(1)
        areas = masks.sum((2, 3)) + eps
        assert_close(ours, (weights * masked.square().sum((3, 4)).mean(2) / areas).sum(1), 1e-13)
    valid = some_mask(2, 5, 6)
    ours = masked_distance(student, teacher, masks, weights, eps=eps, valid_mask=valid)
    assert_close(ours, dense_distance(student, teacher, masks, weights, eps, valid), 1e-13)


@pytest.mark.parametrize("block", [1, 30, 48, 100, 10_000])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_any_size_give_the_same(block, masked, monkeypatch):
    student, teacher = maps(*SHAPE)
    valid = some_mask(2, 5, 6) if masked else None
    loss = build(reduction="none")
    expected = measure(loss, student, teacher, valid)
    monkeypatch.setattr(chunked, "_CPU_BLOCK", block)
    assert_same(measure(loss, student, teacher, valid), expected, 1e-14)
    rows = [range(5)[part] for part in chunked._blocks(student)]
    assert [row for part in rows for row in part] == list(range(5))
    assert max(map(len, rows)) == min(5, max(1, block // (2 * 4 * 6)))


@pytest.mark.parametrize(
    ("weighted", "masked", "aligned"), [(True, False, True), (False, True, False)]
)
def test_gradcheck(weighted, masked, aligned):
    """First and second order: the loss is a quadratic form of the student, its own masks aside."""
    tokens = build_tokens(weighted=weighted)
    width = 3 if aligned else 4
    loss = build(tokens, eps=0.0, reduction="none", student_channels=width if aligned else None)
    student, teacher = maps(2, width, 2, 3)[0].requires_grad_(), maps(2, 4, 2, 3, seed=1)[0]
    valid = some_mask(2, 2, 3) if masked else None
    names = [name for name, p in loss.named_parameters() if p.requires_grad]

    def function(student, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(loss, state, (student, teacher), {"valid_mask": valid})

    inputs = (student, *(loss.get_parameter(n).detach().requires_grad_() for n in names))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_order_gradients_are_right():
    """Also beside NaN at an invalid pixel."""
    loss, (student, teacher), valid = build(), maps(*SHAPE), some_mask(2, 5, 6)
    hidden, weights = ~valid.unsqueeze(1), loss.tokens[0].weights(teacher, valid_mask=valid)
    results = []
    for function, fill in (
        (lambda s, t: loss(s, t, valid_mask=valid), torch.nan),
        (lambda s, t: dense_loss(loss.tokens[0], s, t, valid=valid, weights=weights).mean(), 0.0),
    ):
        leaf = student.masked_fill(hidden, fill).requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf, teacher), leaf, create_graph=True)
        results.append((grad.detach(), torch.autograd.grad(grad.pow(3).sum(), leaf)[0]))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, 1e-12)


# --- Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", [None, 0])
def test_zero_with_a_zero_gradient_for_student_equal_to_teacher(custom):
    _, teacher = maps(*SHAPE)
    value, grad = measure(build(customize_after=custom), teacher, teacher)
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@given(problem=problems, factor=st.floats(-3, 3))
def test_quadratic_in_the_difference(problem, factor):
    tokens, settings, student, teacher = make({**problem, "custom": False})
    loss = build(tokens, **settings)
    value = loss(student, teacher)
    assert value >= 0
    scaled = loss(teacher + factor * (student - teacher), teacher)
    assert (scaled - factor**2 * value).abs() <= 1e-12 * (1 + value)


@given(problem=problems)
def test_order_of_pixels_and_tokens_does_not_matter(problem):
    tokens, settings, student, teacher = make({**problem, "weighted": False})
    expected = build(tokens, **settings)(student, teacher)
    generator = torch.Generator().manual_seed(problem["seed"])
    order = torch.randperm(student[0, 0].numel(), generator=generator)
    shuffled = (x.flatten(2)[..., order].view_as(x) for x in (student, teacher))
    assert_same([build(tokens, **settings)(*shuffled)], [expected], 1e-12)
    tokens.mask_token.data = tokens.mask_token.data.flip(0)
    assert_same([build(tokens, **settings)(student, teacher)], [expected], 1e-12)


def test_a_batch_is_its_images_one_by_one():
    loss = build(customize_after=0, reduction="none")
    student, teacher = maps(3, 4, 5, 6)
    alone = [loss(*pair) for pair in zip(student.split(1), teacher.split(1), strict=True)]
    assert_close(loss(student, teacher), torch.cat(alone), 1e-13)


@pytest.mark.parametrize("custom", [None, 0])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_valid_rectangle_is_a_cropped_image(custom, aligned):
    loss = build(customize_after=custom, student_channels=4 if aligned else None)
    student, teacher = maps(2, 4, 7, 8)
    valid = torch.zeros(2, 7, 8, dtype=torch.bool)
    valid[:, 2:6, 1:6] = True
    ours = measure(loss, student, teacher, valid)
    crop = measure(loss, student[:, :, 2:6, 1:6], teacher[:, :, 2:6, 1:6])
    assert_close(ours[0], crop[0], 1e-12)
    assert_close(ours[1], F.pad(crop[1], (1, 2, 2, 1)), 1e-12)
    full = torch.ones_like(valid)
    assert_same(measure(loss, student, teacher, full), measure(loss, student, teacher), 1e-12)


def test_an_image_without_a_valid_pixel_counts_for_nothing():
    student, teacher = maps(3, 4, 5, 6)
    valid = some_mask(3, 5, 6)
    valid[1] = False
    images = build(reduction="none")(student, teacher, valid_mask=valid)
    assert images[1] == 0
    assert_close(build(reduction="sum")(student, teacher, valid_mask=valid), images.sum(), 1e-13)
    assert_close(build()(student, teacher, valid_mask=valid), images.sum() / 2, 1e-13)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_valid_is_zero_attached_to_the_graph(reduction):
    student, teacher = maps(*SHAPE)
    for batch in (0, 2):
        leaf = student[:batch].clone().requires_grad_()
        valid = torch.zeros(batch, 5, 6, dtype=torch.bool)
        value = build(reduction=reduction)(leaf, teacher[:batch], valid_mask=valid)
        assert torch.equal(value, torch.zeros_like(value))
        value.sum().backward()
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_valid_pixel_that_is_not_finite_shows_in_its_image_alone():
    for side, poison in itertools.product((0, 1), (torch.nan, torch.inf)):
        pair = maps(*SHAPE)
        pair[side][0, 1, 2, 3] = poison
        assert build(reduction="none")(*pair).isfinite().tolist() == [False, True]


# --- Masks at their limits ------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("custom", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("token", [-1e3, -30.0, -24.0, -22.5, 1e3])
def test_masks_that_saturate_stay_finite(eps, custom, dtype, token):
    """Logits of four times `token`: masks of exactly 0, below the normal range, and exactly 1."""
    tokens = build_tokens(dtype=torch.float32)
    tokens.mask_token.data.fill_(token)
    loss = MaskedDistillationLoss(tokens, eps=eps, customize_after=custom)
    student, teacher = maps(*SHAPE)[0].to(dtype), torch.ones(SHAPE, dtype=dtype)
    value, grad = measure(loss, student, teacher)
    assert value.isfinite()
    assert grad.isfinite().all()
    if token == -1e3:
        assert value == 0
        assert torch.equal(grad, torch.zeros_like(grad))
    if token == 1e3 and custom is None:
        gap = student.double() - 1
        assert_close(value, gap.square().mean(), 1e-4)


def test_one_saturated_token_leaves_the_others_alone():
    student, teacher, masks, weights = distance_problem()
    masks[0, 1] = 0
    ours = masked_distance(student, teacher, masks, weights, eps=0.0)
    assert_close(ours, dense_distance(student, teacher, masks, weights), 1e-13)


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-37])
def test_tiny_masks_keep_their_share(scale):
    """In float32 the square of such a mask is zero; divided by its sum first, it is not."""
    student, teacher, masks, weights = distance_problem(dtype=torch.float32)
    ours = masked_distance(student, teacher, masks * scale, weights, eps=0.0)
    truth = dense_distance(*(x.double() for x in (student, teacher, masks, weights)))
    assert_close(ours / scale, truth, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_float16_mask_sums_above_its_range(masked):
    size = (1, 2, 280, 300)  # a sum of 84000
    student, teacher = maps(*size, dtype=torch.float16)
    tokens = build_tokens(2, 2, weighted=False, dtype=torch.float32)
    tokens.mask_token.data.zero_()
    tokens.mask_token.data[:, 0] = 20.0
    teacher[:, 0] = 1.0
    valid = torch.ones(1, 280, 300, dtype=torch.bool) if masked else None
    for module in (tokens, copy.deepcopy(tokens).half()):
        loss = MaskedDistillationLoss(module, reduction="sum")
        value, grad = measure(loss, student, teacher, valid, factor=2.0**16)
        gap = student.double() - teacher.double()
        assert_close(value, gap.square().mean(), 1e-5)
        assert grad.dtype == torch.float16
        assert_close(grad, 2.0**17 * gap / gap.numel(), 1e-3)


def test_differences_beyond_the_range_of_float16():
    student, teacher = (torch.full((1, 2, 3, 3), x, dtype=torch.float16) for x in (4e4, -4e4))
    ours = masked_distance(student, teacher, torch.ones(1, 1, 3, 3))
    assert_close(ours, torch.tensor([8e4**2]), 1e-3)


# --- Gradients go to the student alone ------------------------------------------------------------


@pytest.mark.parametrize("custom", [None, 0])
def test_neither_teacher_nor_tokens_get_a_gradient(custom):
    tokens = build_tokens()
    assert all(p.requires_grad for p in tokens.parameters())
    loss = build(tokens, customize_after=custom, student_channels=3)
    assert not any(p.requires_grad for p in tokens.parameters())
    assert loss.tokens[0] is tokens
    assert {n for n, p in loss.named_parameters() if p.requires_grad} == {
        "align.0.weight",
        "align.0.bias",
    }
    for frozen in (True, False):  # also when someone sets them free again
        tokens.requires_grad_(not frozen)
        student, teacher = maps(2, 3, 5, 6)[0].requires_grad_(), maps(*SHAPE)[1].requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert all(p.grad is None for p in tokens.parameters())
        assert student.grad.norm() > 0
        assert loss.align[0].weight.grad.norm() > 0
    before = copy.deepcopy(tokens.state_dict())
    loss.train()(student, teacher).backward()
    assert all(torch.equal(before[key], value) for key, value in tokens.state_dict().items())


@pytest.mark.parametrize("compiling", [False, True])
def test_only_the_student_gets_a_gradient_from_the_function(compiling, monkeypatch):
    """In both orders, and in the plain formula that a compiler sees."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    student, *others = (x.requires_grad_() for x in distance_problem())
    value = masked_distance(student, *others).sum()
    (grad,) = torch.autograd.grad(value, student, create_graph=True)
    for result in (value, grad.square().sum()):
        grads = torch.autograd.grad(
            result, [student, *others], retain_graph=True, allow_unused=True
        )
        assert grads[0].norm() > 0
        assert grads[1:] == (None, None, None)


def test_given_masks_and_weights_are_left_as_they_were():
    student, teacher, masks, weights = inputs = distance_problem()
    before = [x.clone() for x in inputs]
    masked_distance(student, teacher, masks, weights, valid_mask=some_mask(2, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# --- Levels and alignment -------------------------------------------------------------------------

LEVELS = ((6, 9), (3, 5), (1, 2))


def level_problem(channels=(4, 4, 4), batch=2):
    tokens = [build_tokens(c, 3, seed=i) for i, c in enumerate(channels)]
    pairs = [maps(batch, 4, *size, seed=i) for i, size in enumerate(LEVELS)]
    return tokens, [s for s, _ in pairs], [t for _, t in pairs]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("container", [list, tuple, torch.nn.ModuleList])
def test_levels_are_added(reduction, container):
    tokens, students, teachers = level_problem()
    settings = {"reduction": reduction, "customize_after": 0}
    loss = build(container(tokens), **settings)
    valid = [some_mask(2, *LEVELS[0]), None, torch.zeros(2, *LEVELS[2], dtype=torch.bool)]
    for masks in (None, valid, tuple(valid)):
        parts = loss(students, tuple(teachers), valid_mask=masks, return_components=True)
        alone = [
            build(module, **settings)(s, t, valid_mask=v)
            for module, s, t, v in zip(tokens, students, teachers, masks or [None] * 3, strict=True)
        ]
        assert parts.levels.shape == (3, *((2,) if reduction == "none" else ()))
        assert_close(parts.levels, torch.stack(alone), 1e-13)
        assert_close(parts.loss, sum(alone), 1e-13)
        assert torch.equal(loss(students, teachers, valid_mask=masks), parts.loss)
    assert parts.levels[2].sum() == 0


def test_components_carry_the_gradient():
    tokens, students, teachers = level_problem()
    loss = build(tokens)
    for student in students:
        student.requires_grad_()
    parts = loss(students, teachers, return_components=True)
    (parts.levels * torch.tensor([1.0, 0.0, 2.0])).sum().backward()
    grads = [student.grad for student in students]
    assert (grads[1] == 0).all()
    again = torch.autograd.grad(loss(students, teachers), students)
    assert_close(grads[0], again[0], 1e-13)
    assert_close(grads[2], 2 * again[2], 1e-13)


def test_one_level_may_be_given_bare_or_in_a_sequence():
    student, teacher = maps(*SHAPE)
    valid = some_mask(2, 5, 6)
    loss = build()
    expected = loss(student, teacher, valid_mask=valid)
    assert loss([student], (teacher,), valid_mask=[valid]) == expected
    assert build([build_tokens()])(student, teacher, valid_mask=valid) == expected
    assert loss(student, teacher, valid_mask=valid, return_components=True).levels.shape == (1,)


@pytest.mark.parametrize("channels", [3, (3, 5, 2), [3, 3, 3]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_alignment_is_a_convolution_in_front(channels, masked):
    tokens, _, teachers = level_problem()
    loss = build(tokens, student_channels=channels, customize_after=0)
    widths = [channels] * 3 if isinstance(channels, int) else channels
    students = [maps(2, c, *size)[0] for c, size in zip(widths, LEVELS, strict=True)]
    valid = [some_mask(2, *size) for size in LEVELS] if masked else None
    assert [layer.kernel_size for layer in loss.align] == [(1, 1)] * 3
    results = []
    for aligned in (True, False):
        leaves = [student.clone().requires_grad_() for student in students]
        inputs = leaves
        function = loss
        if not aligned:
            function = build(tokens, customize_after=0)
            inputs = [layer(leaf) for layer, leaf in zip(loss.align, leaves, strict=True)]
        value = function(inputs, teachers, valid_mask=valid)
        wanted = [*leaves, *loss.align.parameters()]
        results.append((value.detach(), *torch.autograd.grad(value, wanted)))
    assert_same(*results, 1e-12)


# --- Customising after a number of steps ----------------------------------------------------------


def test_the_students_masks_join_after_n_steps():
    student, teacher = maps(*SHAPE)
    before, after = build()(student, teacher), build(customize_after=0)(student, teacher)
    assert relative_error(before, after) > 1e-3
    loss = build(customize_after=2)
    for expected in (before, before, after, after):
        for _ in range(3):  # gradient accumulation: forward does not count
            assert torch.equal(loss(student, teacher), expected)
        loss.step()
    assert loss.steps == 4
    plain = build()
    plain.step()
    assert torch.equal(plain(student, teacher), before)


def test_resumes_in_the_middle_of_the_warm_up():
    student, teacher = maps(*SHAPE)
    loss = build(customize_after=3)
    loss.step()
    loss.step()
    fresh = build(build_tokens(seed=7), customize_after=3)
    state = pickle.loads(pickle.dumps(loss.state_dict()))
    weighting = {f"tokens.0.prob.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(state) == weighting | {"tokens.0.mask_token", "steps"}
    fresh.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(fresh(student, teacher), loss(student, teacher))
        loss.step()
        fresh.step()
    assert fresh.steps == 5
    assert torch.equal(fresh(student, teacher), build(customize_after=0)(student, teacher))


def test_counts_from_zero_where_buffers_are_made_later():
    with torch.device("meta"):
        tokens = MaskedReceptiveTokens(4, 2)
        loss = MaskedDistillationLoss(tokens, student_channels=3, customize_after=2)
    loss.to_empty(device="cpu")
    loss.steps.fill_(9)
    for module in loss.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert loss.steps == 0
    assert not any(p.requires_grad for p in loss.tokens.parameters())


def test_the_students_masks_change_the_gradient_only_as_constants():
    tokens, (student, teacher) = build_tokens(), maps(*SHAPE)
    ours = measure(build(tokens, customize_after=0, eps=0.0), student, teacher)
    masks = tokens.masks(teacher) * tokens.masks(student)
    leaf = student.clone().requires_grad_()
    truth = dense_distance(leaf, teacher, masks, dense_weights(tokens, teacher)).mean()
    (grad,) = torch.autograd.grad(truth, leaf)
    assert_same(ours, (truth.detach(), grad), 1e-12)


# --- Dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiling", [False, True])
def test_teacher_may_have_another_dtype(dtype, other, compiling, monkeypatch):
    """Float64 too, and in the plain formula that a compiler sees."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    student, teacher = maps(*SHAPE)
    student, teacher, valid = student.to(dtype), teacher.to(other), some_mask(2, 5, 6)
    tokens = build_tokens(dtype=torch.float32)
    tokens.mask_token.data /= 4
    loss = MaskedDistillationLoss(tokens, reduction="none")
    value, grad = measure(loss, student, teacher, valid)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    exact = MaskedDistillationLoss(copy.deepcopy(tokens).double(), reduction="none")
    truth = measure(exact, student.double(), teacher.double(), valid)
    half = dtype == torch.float16
    assert_close(value, truth[0], 5e-3 if half else 1e-6)
    assert_close(grad, truth[1], 1e-2 if half else 1e-6)


def test_autocast_aligns_in_half_precision_and_sums_in_float32():
    loss = build(dtype=torch.float32, student_channels=3)
    student, teacher = (
        maps(2, 3, 5, 6, dtype=torch.float32)[0],
        maps(*SHAPE, dtype=torch.float32)[1],
    )
    seen = []
    loss.align[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = measure(loss, student, teacher)
    assert seen == [torch.bfloat16]
    assert value.dtype == grad.dtype == torch.float32
    assert_close(value, measure(loss, student, teacher)[0], 1e-2)


def test_the_gradient_of_a_channels_last_map_is_channels_last():
    student, teacher = (
        x.contiguous(memory_format=torch.channels_last) for x in maps(*SHAPE, dtype=torch.float32)
    )
    _, grad = measure(build(dtype=torch.float32), student, teacher)
    assert grad.is_contiguous(memory_format=torch.channels_last)


# --- Memory ---------------------------------------------------------------------------------------


def test_nothing_of_tokens_times_channels_times_pixels_is_made():
    student, teacher = maps(2, 8, 12, 13, dtype=torch.float32)
    for aligned, masked in itertools.product((False, True), repeat=2):
        loss = build(
            build_tokens(8, 6, dtype=torch.float32),
            torch.float32,
            customize_after=0,
            student_channels=8 if aligned else None,
        )
        valid = some_mask(2, 12, 13) if masked else None
        with LargestTensor() as largest:
            loss(student.requires_grad_(), teacher, valid_mask=valid).backward()
        # With a mask, the nine windows of a pixel [B, 9, HW] exceed eight channels.
        assert largest.size == student.numel() * (9 / 8 if masked else 1)


def test_forward_makes_nothing_of_the_size_of_a_map(monkeypatch):
    monkeypatch.setattr(chunked, "_CPU_BLOCK", 2 * 64 * 13)
    student, teacher = maps(2, 64, 12, 13, dtype=torch.float32)
    loss = build(build_tokens(64, 3, dtype=torch.float32), torch.float32, customize_after=0)
    loss.tokens[0].weights(teacher)

    class Made(LargestTensor):
        """The largest result that is not a view of its inputs."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None and not func.is_view:
                self.size = max(self.size, result.numel())
            return result

    parameters = max(p.numel() for p in loss.parameters())
    with Made() as made:
        value = loss(student.requires_grad_(), teacher)
    assert made.size <= max(parameters, student.numel() // 12)
    with Made() as made:
        value.backward()
    assert made.size == student.numel()


def test_the_graph_keeps_the_maps_and_one_number_a_pixel():
    student, teacher = maps(*SHAPE, dtype=torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    loss = build(dtype=torch.float32, customize_after=0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(student.requires_grad_(), teacher)
    large = [tensor for tensor in kept if tensor.numel() > 2 * 5 * 6]
    assert {tensor.data_ptr() for tensor in large} == {student.data_ptr(), teacher.data_ptr()}
    assert sum(tensor.shape == (2, 5, 6) for tensor in kept) == 1
    value.backward()


def test_defaults():
    loss = MaskedDistillationLoss(build_tokens())
    assert (loss.customize_after, loss.eps, loss.reduction) == (None, 1e-5, "mean")
    assert loss.align is None


# --- Compilation ----------------------------------------------------------------------------------


def assert_compiles(backend, tolerance, settings, masked=False, autocast=False):
    """One compilation for two sizes, also across the threshold of customising."""
    settings, channels = dict(settings), 10
    width = settings.get("student_channels", channels)
    tokens = build_tokens(channels, 3, weighted=settings.pop("weighted", True))
    tokens.mask_token.data /= 3
    loss = build(tokens, torch.float32, **settings)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, *size in ((2, 13, 17), (3, 14, 19)):
        student = maps(batch, width, *size, dtype=torch.float32)[0]
        teacher = maps(batch, channels, *size, seed=1, dtype=torch.float32)[0]
        valid = some_mask(batch, *size) if masked else None
        results = []
        for function in (compiled, loss):
            leaf = student.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = function(leaf, teacher, valid_mask=valid)
            wanted = [leaf, *(p for p in loss.parameters() if p.requires_grad)]
            results.append((value.detach(), *torch.autograd.grad(weighted_sum(value), wanted)))
        for ours, eager in zip(*results, strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours, eager, tolerance)
        loss.step()
    assert counter.frame_count == 1


def test_compiles_once_for_all_map_sizes_and_steps():
    """More sizes, levels and an alignment are in test_training_loops.py."""
    aligned = {"student_channels": 7, "weighted": False, "reduction": "none"}
    with fresh_compiler():
        assert_compiles("aot_eager", 5e-6, {"customize_after": 1, "eps": 0.0})
    with fresh_compiler():
        assert_compiles("aot_eager", 2e-2, aligned, masked=True, autocast=True)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_compiles_once_with_the_default_compiler():
    """With an alignment, which as a convolution would be compiled for each map size."""
    with fresh_compiler():
        assert_compiles("inductor", 1e-5, {"student_channels": 7, "weighted": False})


# --- Arguments ------------------------------------------------------------------------------------

TOKENS = MaskedReceptiveTokens(4, 2)


@pytest.mark.parametrize(
    ("error", "words", "tokens", "settings"),
    [
        (TypeError, "tokens must be a MaskedReceptiveTokens, or a sequence or mapping", None, {}),
        (TypeError, "tokens must be .* got Conv2d", torch.nn.Conv2d(4, 4, 1), {}),
        (TypeError, "tokens must be a MaskedReceptiveTokens, or a sequence or mapping", [], {}),
        (TypeError, "tokens must be a MaskedReceptiveTokens, or", [TOKENS, None], {}),
        (ValueError, "student_channels must be at least 1; got 0", TOKENS, {"student_channels": 0}),
        (ValueError, "one entry per level", [TOKENS] * 2, {"student_channels": (3,)}),
        (TypeError, "student_channels must be an int; got None", TOKENS, {"student_channels": [None]}),
        (ValueError, "customize_after must be at least 0; got -1", TOKENS, {"customize_after": -1}),
        (ValueError, "eps must be a finite number of at least 0; got -1e-05", TOKENS, {"eps": -1e-5}),
        (ValueError, "eps must be a finite number", TOKENS, {"eps": math.inf}),
        (TypeError, "eps must be a number; got None", TOKENS, {"eps": None}),
    ],
)  # fmt: skip
def test_wrong_settings(error, words, tokens, settings):
    with pytest.raises(error, match=words):
        MaskedDistillationLoss(tokens, **settings)


MAP = torch.randn(2, 4, 3, 5)
ALL = torch.ones(2, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "words", "student", "teacher", "mask"),
    [
        (ValueError, r"student must have shape \[2, any, 3, 4\] .*\(2, 4, 3, 4\); got \(2, 4, 3, 5\)"
         ".*F.interpolate", MAP, MAP[..., 1:], None),
        (ValueError, r"student .* \[1, any, 3, 5\].*got \(2, 4, 3, 5\)", MAP, MAP[:1], None),
        (ValueError, r"student .* \[B, 4, H, W\].*\(2, 3, 3, 5\).*student_channels",
         MAP[:, 1:], MAP, None),
        (ValueError, r"teacher must have shape \[B, 4, H, W\]", MAP, MAP[:, 1:], None),
        (ValueError, r"teacher must have shape .*got \(2, 4, 0, 5\)", MAP, MAP[:, :, :0], None),
        (TypeError, "teacher must be a tensor; got NoneType", MAP, None, None),
        (TypeError, r"student\[0\] must be a tensor; got float", [1.0], MAP, None),
        (ValueError, "student must have one entry per level", [MAP, MAP], MAP, None),
        (ValueError, "teacher must have one entry per level", MAP, (), None),
        (ValueError, "valid_mask must have one entry per level", MAP, MAP, [ALL, ALL]),
    ],
)  # fmt: skip
def test_wrong_maps(error, words, student, teacher, mask):
    with pytest.raises(error, match=words):
        MaskedDistillationLoss(TOKENS)(student, teacher, valid_mask=mask)


def test_wrong_width_before_an_alignment():
    loss = MaskedDistillationLoss(TOKENS, student_channels=3)
    with pytest.raises(
        ValueError, match=r"student must have shape \[B, 3, H, W\].*got \(2, 4, 3, 5\)"
    ):
        loss(MAP, MAP)
    with pytest.raises(ValueError, match=r"got \(2, 3, 3, 4\).*F.interpolate"):
        loss(MAP[:, 1:, :, 1:], MAP)
    with pytest.raises(TypeError, match="valid_mask must be a bool tensor"):
        loss(MAP[:, 1:], MAP, valid_mask=ALL.float())


def test_levels_need_sequences():
    loss = MaskedDistillationLoss([MaskedReceptiveTokens(4, 2), MaskedReceptiveTokens(4, 2)])
    with pytest.raises(
        ValueError, match=r"student must have one entry per level, .*\[0, 1\]; got \[0\]"
    ):
        loss(MAP, [MAP, MAP])
    with pytest.raises(ValueError, match=r"valid_mask must have one entry per level, .*\[0, 1\]"):
        loss([MAP, MAP], [MAP, MAP], valid_mask=ALL)


MASKS = torch.rand(2, 3, 3, 5)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, r"student must have shape \[B, 3, H, W\]", {"teacher": MAP[:, 1:]}),
        (ValueError, r"student must have shape \[2, any, 3, 4\]", {"teacher": MAP[..., 1:]}),
        (ValueError, r"masks must have shape \[2, T, 3, 5\]", {"masks": MASKS[..., 1:]}),
        (ValueError, r"masks must have shape \[B, C, H, W\]", {"masks": MASKS[0]}),
        (TypeError, "masks must be float16", {"masks": MASKS > 0}),
        (ValueError, r"weights must have shape \[2, 3\]; got", {"weights": torch.ones(3)}),
        (TypeError, "weights must be a tensor; got float", {"weights": 1.0}),
        (TypeError, "weights must be float16", {"weights": torch.ones(2, 3).int()}),
        (ValueError, "weights must be on .* cpu; got meta", {"weights": torch.ones(2, 3).to("meta")}),
        (ValueError, "eps must be a finite number", {"eps": -1.0}),
        (TypeError, "valid_mask must be a bool tensor", {"valid_mask": ALL.float()}),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_function_form(error, words, settings):
    with pytest.raises(error, match=words):
        masked_distance(**{"student": MAP, "teacher": MAP, "masks": MASKS, **settings})


# --- Backends, levels by name, and areas ----------------------------------------------------------

NAMED = {"p3": (6, 9), "p4": (3, 5)}


def named_problem():
    tokens = {name: build_tokens(seed=i) for i, name in enumerate(NAMED)}
    pairs = {name: maps(2, 4, *size, seed=i) for i, (name, size) in enumerate(NAMED.items())}
    return tokens, {k: s for k, (s, _) in pairs.items()}, {k: t for k, (_, t) in pairs.items()}


@pytest.mark.parametrize(
    "container",
    [
        dict,
        torch.nn.ModuleDict,
        lambda d: list(d.values()),
        lambda d: ListLike(*d.values()),
    ],
)
def test_levels_may_be_mappings(container):
    """In any order; tokens without names follow the teacher's order."""
    tokens, students, teachers = named_problem()
    expected = build(list(tokens.values()))(list(students.values()), teachers.values())
    loss, turned = build(container(tokens)), dict(reversed(students.items()))
    assert loss(turned, teachers) == expected
    valid = {name: some_mask(2, *size) for name, size in NAMED.items()}
    parts = loss(turned, teachers, valid_mask=valid, return_components=True)
    by_index = build(list(tokens.values()))(
        ListLike(*students.values()), list(teachers.values()), valid_mask=ListLike(*valid.values())
    )
    assert_close(parts.loss, by_index, 1e-13)


def test_settings_and_errors_of_named_levels():
    tokens, students, teachers = named_problem()
    assert build(list(tokens.values()), student_channels=ListLike(4, 5)).student_channels == (4, 5)
    loss = build(tokens, student_channels={"p4": 5, "p3": 4})
    assert loss.student_channels == (4, 5)
    assert {name: layer.in_channels for name, layer in loss.align.items()} == {"p3": 4, "p4": 5}
    with pytest.raises(ValueError, match=r"student\['p4'\] must have shape \[B, 5, H, W\]"):
        loss(students, teachers)
    with pytest.raises(ValueError, match=r"keys \['p3', 'p4'\]; got \['p3', 'p5'\]"):
        loss(students, {"p3": teachers["p3"], "p5": teachers["p4"]})
    with pytest.raises(ValueError, match=r"keys \['p3', 'p4'\]; got \[0, 1\]"):
        loss(list(students.values()), teachers)
    with pytest.raises(ValueError, match=r"student\[1\] must have shape"):
        build(list(tokens.values()))([students["p3"]] * 2, list(teachers.values()))
    with pytest.raises(TypeError, match=r"got Conv2d$"):
        MaskedDistillationLoss({"p3": torch.nn.Conv2d(4, 4, 1)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("custom", [None, 0])
def test_areas_are_the_fractions_that_masks_cover(backend, custom):
    device = device_of(backend)
    levels = [build_tokens(dtype=torch.float32), build_tokens(num_tokens=2, dtype=torch.float32)]
    loss = MaskedDistillationLoss(levels, customize_after=custom, backend=backend).to(device)
    pairs = [[x.float().to(device) for x in maps(*SHAPE, seed=i)] for i in range(2)]
    students, teachers = zip(*pairs, strict=True)
    valid = [some_mask(2, 5, 6).to(device), None]
    areas = loss(students, teachers, valid_mask=valid, return_components=True).areas
    for row, tokens, s, t, v in zip(areas, levels, students, teachers, valid, strict=True):
        masks = tokens.masks(t) * (tokens.masks(s) if custom == 0 else 1)
        seen = torch.ones_like(masks[:, 0], dtype=torch.bool) if v is None else v
        truth = torch.stack([mask[seen].mean() for mask in masks.unbind(dim=1)])
        assert_close(row[: len(truth)], truth, 1e-5)
        assert row[len(truth) :].isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", None])
def test_a_replaced_alignment_is_called(backend):
    loss, (student, teacher) = build(student_channels=4), maps(*SHAPE)
    loss.align[0] = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU()).double()
    expected = build(loss.tokens)(loss.align[0](student), teacher)
    with fresh_compiler():
        call = loss if backend is None else torch.compile(loss, fullgraph=True, backend=backend)
        assert_close(call(student, teacher), expected, 1e-12)
    loss.align[0] = torch.nn.Conv2d(4, 3, 1).double()
    with pytest.raises(ValueError, match=r"align must return the teacher's shape.*\(2, 3, 5, 6\)"):
        loss(student, teacher)


@given(problem=problems, masked=st.booleans(), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_the_kernels_equal_dense_truth(problem, masked, reduction):
    tokens, settings, student, teacher = make(problem)
    tokens.mask_token.data /= 2
    valid = some_mask(student.shape[0], *student.shape[2:]) if masked else None
    truth = measure(build(tokens, reduction=reduction, **settings), student, teacher, valid)
    device = device_of("triton")
    loss = MaskedDistillationLoss(
        copy.deepcopy(tokens).float(), reduction=reduction, backend="triton", **settings
    ).to(device)
    on_device = [x.float().to(device) for x in (student, teacher)]
    leaf = on_device[0].requires_grad_()
    value = loss(leaf, on_device[1], valid_mask=None if valid is None else valid.to(device))
    (grad,) = torch.autograd.grad(weighted_sum(value.cpu()), leaf)
    assert value.dtype == torch.float32
    assert_same([value.detach().cpu().double(), grad.cpu().double()], truth, 5e-6)


@pytest.mark.parametrize(
    "launch", [(16, 32, 4, 1), (32, 64, 4, 3), (64, 32, 4, 3), (32, 128, 8, 2)], ids=str
)
def test_every_tile_gives_the_same(launch):
    """37 channels and 150 pixels, which no tile divides."""
    from pixdistill.ops.masked_distance import Tokens, triton_kernels
    from pixdistill.ops.masked_distance.launch import Launch

    device = device_of("triton")
    tokens = build_tokens(37, 5, dtype=torch.float32)
    tokens.mask_token.data /= 6
    student, teacher = (x.to(device) for x in maps(2, 37, 10, 15, dtype=torch.float32))
    weighting = tuple(p.detach() for p in tokens.to(device).weighting)
    source = Tokens(tokens.mask_token.detach(), weighting, torch.tensor(0, device=device), 0)
    arguments = (student, teacher, source, some_mask(2, 10, 15).to(device), 1e-5, "none")
    ours = triton_kernels.forward(*arguments, launch=Launch(*launch))
    truth = chunked.forward(*arguments)
    for one, other in zip(ours[:2], truth[:2], strict=True):
        assert_close(one, other, 2e-6)
    assert_close(ours[2][:, :6], truth[2], 2e-6)


@pytest.mark.parametrize(
    ("weighted", "masked", "most"), [(True, False, 8), (False, False, 5), (True, True, 10)]
)
def test_number_of_launches(weighted, masked, most):
    """Forward and backward of one level, with the ones that `backward` starts from."""
    device = device_of("triton")
    tokens = build_tokens(weighted=weighted, dtype=torch.float32)
    loss = MaskedDistillationLoss(tokens, customize_after=1, backend="triton").to(device)
    student, teacher = (x.to(device).requires_grad_(i == 0) for i, x in enumerate(
        maps(*SHAPE, dtype=torch.float32)
    ))  # fmt: skip
    valid = some_mask(2, 5, 6).to(device) if masked else None
    names = launches(lambda: loss(student, teacher, valid_mask=valid).backward())
    names = [name for name in names if name not in ("ones_like", "detach")]
    assert names.count("read_kernel") == names.count("grad_kernel") == 1
    assert len(names) <= most, names


def test_which_form_runs():
    from pixdistill.ops.masked_distance import why_not_triton

    assert why_not_triton(MAP.double(), 6) == "it has no torch.float64 form"
    assert why_not_triton(MAP, 17) == "it holds up to 16 tokens, not 17"
    many = MaskedDistillationLoss(MaskedReceptiveTokens(4, 17), backend="triton")
    with pytest.raises(ValueError, match=r'backend="triton" cannot run here: .*17'):
        many(MAP, MAP)


@needs_torch("2.7", "Triton's ahead-of-time interface")
def test_the_kernels_compute_offsets_in_64_bits(tmp_path):
    assert run("tests/offsets.py", "masked_distance", env={"TRITON_CACHE_DIR": str(tmp_path)}) == ""


@pytest.mark.parametrize("given_masks", [False, True])
def test_the_registered_operators_are_right(given_masks):
    from pixdistill.ops.masked_distance import masked_distance_grad_op, masked_distance_op

    device = device_of("triton")
    student, teacher = (x.to(device) for x in maps(*SHAPE, dtype=torch.float32))
    tokens, valid = build_tokens(dtype=torch.float32).to(device), some_mask(2, 5, 6).to(device)
    weighting = [p.detach() for p in tokens.weighting]
    steps = torch.tensor(1, device=device)
    source = (None, None, tokens.mask_token.detach(), weighting, steps, 1)
    if given_masks:
        source = (tokens.masks(teacher).detach(), None, None, [], None, 0)
    arguments = (student.requires_grad_(), teacher, *source, valid, 1e-5, "mean")
    torch.library.opcheck(masked_distance_op, arguments)
    attention, grad = torch.rand(2, 5, 6, device=device), torch.tensor(1.0, device=device)
    torch.library.opcheck(
        masked_distance_grad_op, (student.detach(), teacher, attention, grad, True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_pixels_and_a_mask_that_is_zero_add_nothing(backend):
    """In no form does the first count in the mean, or the second give 0/0."""
    device = device_of(backend)
    student, teacher, masks, weights = (x.to(device) for x in distance_problem(dtype=torch.float32))
    masks[0, 1] = 0
    valid = torch.ones(2, 5, 6, dtype=torch.bool, device=device)
    valid[1] = False
    ours = masked_distillation_loss(
        student, teacher, masks, weights, eps=0.0, valid_mask=valid, backend=backend
    )
    first = (x[:1].cpu() for x in (student, teacher, masks, weights))
    assert_close(ours, dense_distance(*first)[0], 1e-5)
