"""PixelContrastLoss and its function form: official outputs, a dense truth, properties and edges."""

import copy
import math
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    LargestTensor,
    assert_close,
    assert_within_budget,
    dense_contrast,
    device_of,
    fresh_compiler,
    golden,
    unit,
)
from helpers import high_precision as high_precision
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import PixelContrastLoss, PixelQueue, functional, pixel_contrast_loss
from pixdistill.ops.row_lse import chunked

FAST = ("torch", "triton")
EXACT = ("reference", "torch")  # these take float64
FLOAT32 = {
    "reference": 2e-6,
    "torch": 2e-6,
    "triton": 2e-6 if device_of("triton") == "cpu" else 2e-3,
}
NEGATIVES = (
    "batch",
    "image",
    "queue",
    ("batch", "queue"),
    ("queue", "batch"),
    ("image", "queue"),
    ("queue", "image"),
)
SHAPES = ((2, 6, 4, 5), (1, 4, 1, 1), (3, 5, 7), (2, 3, 2, 3, 3), (1, 7, 1, 13))


def maps(*shape, seed=0, dtype=torch.float64):
    """A student and a teacher map whose pixels are not unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    return pair[0].to(dtype), (pair[1] + 0.5 * pair[0]).to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def spatial(image):
    """The shape of one number a pixel, `[B, *spatial]`."""
    return (image.shape[0], *image.shape[2:])


def rows_of(image):
    """`[B, C, *spatial]` as one vector a pixel, image after image."""
    return image.flatten(2).transpose(1, 2).reshape(-1, image.shape[1])


def queue_of(keys, device="cpu"):
    queue = PixelQueue(*keys.shape, dtype=keys.dtype, device=device)
    queue.keys.copy_(keys)
    return queue


def build(backend, negatives="batch", keys=None, **settings):
    """The loss on its backend's device, with a queue of these keys where negatives read one."""
    queue = queue_of(keys, device_of(backend)) if "queue" in negatives else None
    own = own_of(negatives)
    return PixelContrastLoss(negatives=own, queue=queue, backend=backend, **settings).to(
        device_of(backend)
    )


def own_of(negatives):
    names = (negatives,) if isinstance(negatives, str) else negatives
    return next((name for name in names if name != "queue"), None)


def measure(loss, student, teacher, mask=None):
    """Values and the student's gradient on the CPU, under weights that differ from pixel to pixel."""
    device = device_of(loss.backend)
    student = student.detach().to(device).requires_grad_()
    mask = None if mask is None else mask.to(device)
    value = loss(student, teacher.to(device), valid_mask=mask)
    (grad,) = torch.autograd.grad(weighted(value), student)
    return value.detach().cpu(), grad.cpu()


def weighted(value):
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device)
    return (value.flatten() * weights).sum()


def dense(student, teacher, temperature=0.2, negatives="batch", mask=None, keys=None):
    """The truth a pixel, differentiable, in float64."""
    batch, pixels = student.shape[0], math.prod(student.shape[2:])
    image_of = torch.arange(batch).repeat_interleave(pixels)
    if "image" not in negatives:
        image_of = torch.zeros_like(image_of)
    valid = torch.ones(batch * pixels, dtype=torch.bool) if mask is None else mask.flatten()
    losses = dense_contrast(
        rows_of(student),
        rows_of(teacher).detach(),
        temperature,
        image_of,
        valid,
        keys if "queue" in negatives else None,
        in_batch="batch" in negatives or "image" in negatives,
    )
    return losses.view(spatial(student))


def dense_with_grad(student, *arguments, **settings):
    student = student.detach().double().requires_grad_()
    value = dense(student, *arguments, **settings)
    (grad,) = torch.autograd.grad(weighted(value), student)
    return value.detach(), grad


# --- The official outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        *((backend, torch.float32, max(1e-6, FLOAT32[backend])) for backend in BACKENDS),
        *((backend, torch.float64, 5e-7) for backend in EXACT),
    ],
    ids=str,
)
def test_equals_official_outputs(name, backend, dtype, tolerance):
    official = golden(f"pcd_pixel_contrast_{name}")
    device = device_of(backend)
    loss = build(
        backend, "queue", official["queue"].T.to(dtype), temperature=float(official["temperature"])
    )
    student1, student2, teacher1, teacher2 = (
        official[key].to(device, dtype, copy=True)
        for key in ("student1", "student2", "teacher1", "teacher2")
    )
    student1.requires_grad_()
    student2.requires_grad_()
    loss12, loss21 = loss(student1, teacher2), loss(student2, teacher1)
    mean = (loss12 + loss21) / 2
    mean.backward()
    assert loss12.dtype == dtype
    assert_close(loss12, official["loss12"], tolerance)
    assert_close(loss21, official["loss21"], tolerance)
    assert_close(mean, official["loss"], tolerance)
    assert_close(student1.grad, official["grad_student1"], tolerance)
    assert_close(student2.grad, official["grad_student2"], tolerance)


# --- A dense truth --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_dense_truth(backend, negatives, shape, masked):
    student, teacher = maps(*shape, seed=1, dtype=torch.float32)
    keys = unit(11, shape[1], seed=2, dtype=torch.float32)
    mask = some_mask(*spatial(student)) if masked else None
    ours = measure(build(backend, negatives, keys, reduction="none"), student, teacher, mask)
    truth = dense_with_grad(student, teacher, negatives=negatives, mask=mask, keys=keys)
    assert ours[0].shape == spatial(student)
    assert_close(ours[0], truth[0], FLOAT32[backend])
    assert_close(ours[1], truth[1], 2 * FLOAT32[backend])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_float64_equals_dense_truth_to_its_own_rounding(backend, negatives):
    student, teacher = maps(2, 6, 3, 4, seed=1)
    keys, mask = unit(11, 6, seed=2), some_mask(2, 3, 4)
    loss = build(backend, negatives, keys, reduction="none", temperature=0.07)
    ours = measure(loss, student, teacher, mask)
    truth = dense_with_grad(student, teacher, 0.07, negatives, mask, keys)
    assert ours[0].dtype == ours[1].dtype == torch.float64
    assert_close(ours[0], truth[0], 1e-13)
    assert_close(ours[1], truth[1], 1e-12)


problems = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "channels": st.integers(1, 9),
        "height": st.integers(1, 3),
        "width": st.integers(1, 3),
        "keys": st.integers(1, 20),
        "temperature": st.floats(0.05, 3.0),
        "negatives": st.sampled_from(NEGATIVES),
        "seed": st.integers(0, 2**16),
    }
)


def make(problem):
    """Maps of the problem's size and a function that builds its loss per pixel."""
    channels, seed = problem["channels"], problem["seed"]
    shape = (problem["batch"], channels, problem["height"], problem["width"])
    keys = unit(problem["keys"], channels, seed=seed + 1, dtype=torch.float32)

    def loss(backend, keys=keys):
        return build(
            backend,
            problem["negatives"],
            keys,
            temperature=problem["temperature"],
            reduction="none",
        )

    return *maps(*shape, seed=seed, dtype=torch.float32), keys, loss


def all_backends(test):
    return pytest.mark.parametrize("backend", BACKENDS)(
        given(problem=problems, data=st.data())(test)
    )


def draw_mask(data, student):
    pixels = math.prod(spatial(student))
    entries = data.draw(st.lists(st.booleans(), min_size=pixels, max_size=pixels))
    return torch.tensor(entries).view(spatial(student))


def assert_same(ours, others, tolerance=2e-5):
    """Values and gradients; absolute where everything vanishes."""
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 0.1)


@all_backends
def test_any_problem_equals_dense_truth(backend, problem, data):
    student, teacher, keys, loss = make(problem)
    mask = draw_mask(data, student)
    truth = dense_with_grad(
        student, teacher, problem["temperature"], problem["negatives"], mask, keys
    )
    assert_same(measure(loss(backend), student, teacher, mask), truth, 10 * FLOAT32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_function_form_keeps_batch_entries_apart(backend, in_batch, masked, batch):
    student, teacher = (x.mT.float() for x in maps(*batch, 6, 9, seed=1))
    keys = unit(7, 6, seed=2, dtype=torch.float32)
    mask = some_mask(*batch, 9) if masked else None
    device = device_of(backend)
    ours = student.to(device, copy=True).requires_grad_()
    value = pixel_contrast_loss(
        ours,
        teacher.to(device),
        negatives="batch" if in_batch else None,
        queue_keys=keys.to(device),
        valid_mask=None if mask is None else mask.to(device),
        reduction="none",
        backend=backend,
    )
    weighted(value).backward()

    double = student.double().requires_grad_()
    entries, positives = double.reshape(-1, 9, 6), teacher.reshape(-1, 9, 6)
    valid = torch.ones(len(entries), 9).bool() if mask is None else mask.reshape(-1, 9)
    together = torch.zeros(9)
    truth = torch.stack(
        [
            dense_contrast(entries[i], positives[i], 0.2, together, valid[i], keys, in_batch)
            for i in range(len(entries))
        ]
    ).view(*batch, 9)
    weighted(truth).backward()
    assert_close(value, truth, FLOAT32[backend])
    assert_close(ours.grad, double.grad, 2 * FLOAT32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_form_equals_cross_entropy(backend):
    student, teacher = unit(23, 8, seed=1).float() * 2, unit(23, 8, seed=2).float() * 5
    device = device_of(backend)
    ours = student.to(device, copy=True).requires_grad_()
    loss = pixel_contrast_loss(ours, teacher.to(device), temperature=0.13, backend=backend)
    loss.backward()
    plain = student.double().requires_grad_()
    logits = F.normalize(plain) @ F.normalize(teacher.double()).T / 0.13
    truth = F.cross_entropy(logits, torch.arange(23))
    truth.backward()
    assert loss.dim() == 0
    assert_close(loss, truth, FLOAT32[backend])
    assert_close(ours.grad, plain.grad, 2 * FLOAT32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_stay_as_they_are_without_normalize(backend):
    """Logits in the hundreds: nothing may be taken for a unit vector's."""
    student, teacher = unit(19, 8, seed=1).float() * 20, unit(19, 8, seed=2).float() * 7
    keys = unit(6, 8, seed=3).float() * 9
    device = device_of(backend)
    ours = student.to(device, copy=True).requires_grad_()
    value = pixel_contrast_loss(
        ours,
        teacher.to(device),
        temperature=0.5,
        queue_keys=keys.to(device),
        normalize=False,
        reduction="none",
        backend=backend,
    )
    value.sum().backward()
    plain = student.double().requires_grad_()
    logits = plain @ torch.cat([teacher, keys]).double().T / 0.5
    truth = F.cross_entropy(logits, torch.arange(19), reduction="none")
    truth.sum().backward()
    assert_close(value, truth, 10 * FLOAT32[backend])
    assert_close(ours.grad, plain.grad, 50 * FLOAT32[backend])

    module = build(backend, ("batch", "queue"), keys, temperature=0.5, normalize=False)
    as_maps = (x.T.reshape(1, 8, 19).to(device) for x in (student, teacher))
    assert_close(module(*as_maps), truth.mean(), 10 * FLOAT32[backend])


def test_function_form_is_exported_twice():
    assert functional.pixel_contrast_loss is pixel_contrast_loss


def test_defaults_are_those_of_the_paper():
    student, teacher = maps(2, 6, 3, 4, dtype=torch.float32)
    assert_close(PixelContrastLoss()(student, teacher), dense(student, teacher).mean(), 1e-6)
    rows = rows_of(student), rows_of(teacher)
    assert_close(pixel_contrast_loss(*rows), dense(student, teacher).mean(), 1e-6)


# --- Reductions and masks -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["batch", "image", ("image", "queue")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_agree_with_each_other(backend, negatives, masked):
    student, teacher = maps(2, 6, 3, 4, dtype=torch.float32)
    mask = some_mask(2, 3, 4) if masked else None
    keys = unit(5, 6, dtype=torch.float32)
    none, total, mean = (
        measure(build(backend, negatives, keys, reduction=reduction), student, teacher, mask)[0]
        for reduction in ("none", "sum", "mean")
    )
    count = 24 if mask is None else int(mask.sum())
    assert none.shape == (2, 3, 4)
    assert total.shape == mean.shape == ()
    assert_close(total, none.sum(), 1e-6)
    assert_close(mean, none.sum() / count, 1e-6)
    if mask is not None:
        assert torch.equal(none[~mask], torch.zeros(int((~mask).sum())))
        assert (none[mask] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mask_deletes_pixels(backend, reduction):
    student, teacher = maps(2, 6, 3, 4, dtype=torch.float32)
    mask = some_mask(2, 3, 4)
    value, grad = measure(build(backend, reduction=reduction), student, teacher, mask)
    kept = rows_of(student)[mask.flatten()].requires_grad_()
    few = pixel_contrast_loss(kept, rows_of(teacher)[mask.flatten()], reduction=reduction)
    if reduction == "none":  # the weights of `measure` count the invalid pixels too
        weights = torch.linspace(1.0, 2.0, 24)[mask.flatten()]
        (few * weights).sum().backward()
        value = value[mask]
    else:
        weighted(few).backward()
    assert_close(value, few, FLOAT32[backend])
    assert_close(rows_of(grad)[mask.flatten()], kept.grad, 2 * FLOAT32[backend])
    assert torch.equal(
        rows_of(grad)[~mask.flatten()], torch.zeros_like(rows_of(grad)[~mask.flatten()])
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_image_negatives_treat_a_batch_as_images_one_by_one(backend, masked):
    student, teacher = maps(3, 6, 3, 4, dtype=torch.float32)
    mask = some_mask(3, 3, 4) if masked else None
    keys = unit(5, 6, dtype=torch.float32)
    for negatives, alone in (("image", "batch"), (("queue", "image"), ("queue", "batch"))):
        whole = build(backend, negatives, keys, reduction="none")
        single = build(backend, alone, keys, reduction="none")
        value, _ = measure(whole, student, teacher, mask)
        for i in range(3):
            part = None if mask is None else mask[i : i + 1]
            one, _ = measure(single, student[i : i + 1], teacher[i : i + 1], part)
            assert_close(value[i : i + 1], one, FLOAT32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_invalid_pixels_may_hold_anything(backend, negatives, poison):
    student, teacher = maps(2, 6, 2, 5, dtype=torch.float32)
    keys, mask = unit(5, 6, dtype=torch.float32), some_mask(2, 2, 5)
    hidden = ~mask.unsqueeze(1)
    dirty = student.masked_fill(hidden, poison), teacher.masked_fill(hidden, poison)
    for reduction in ("none", "mean"):
        loss = build(backend, negatives, keys, reduction=reduction)
        clean = measure(loss, student, teacher, mask)
        ours = measure(loss, *dirty, mask)
        assert ours[0].isfinite().all()
        assert torch.equal(ours[0], clean[0])
        assert torch.equal(ours[1], clean[1])
    components = loss(
        *(x.to(device_of(backend)) for x in dirty),
        valid_mask=mask.to(device_of(backend)),
        return_components=True,
    )
    assert all(part.isfinite() for part in components)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_valid_pixel_that_is_not_finite_shows(backend, poison, side):
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    (student if side == "student" else teacher)[1, 2, 0, 1] = poison
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    keys = unit(5, 6, dtype=torch.float32)
    for negatives in ("batch", "image", "queue"):
        one = torch.zeros(2, 2, 3, dtype=torch.bool)
        one[1, 0, 1] = True
        seen_by = {
            ("student", "batch"): one,
            ("student", "image"): one,
            ("student", "queue"): one,
            ("teacher", "batch"): torch.ones(2, 2, 3, dtype=torch.bool),
            ("teacher", "image"): torch.tensor([False, True]).view(2, 1, 1).expand(2, 2, 3),
            ("teacher", "queue"): one,
        }[side, negatives]
        for valid in (None, mask):
            pixels, _ = measure(
                build(backend, negatives, keys, reduction="none"), student, teacher, valid
            )
            assert torch.equal(pixels.isnan(), seen_by)
            mean, _ = measure(build(backend, negatives, keys), student, teacher, valid)
            assert mean.isnan()


# --- Nothing to compare, and no direction ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("case", "shape", "negatives"),
    [
        ("nothing valid", (2, 4, 3, 2), "batch"),
        ("nothing valid", (2, 4, 3, 2), ("queue", "image")),
        ("nothing valid", (2, 4, 3, 2), "queue"),
        ("empty batch", (0, 4, 3, 2), "batch"),
        ("empty batch", (0, 4, 3, 2), "image"),
        ("empty batch", (0, 4, 3, 2), "queue"),
        ("empty map", (2, 4, 0, 2), "batch"),
        ("one pixel", (1, 4, 1, 1), "batch"),
        ("one pixel an image", (3, 4, 1, 1), "image"),
        ("one valid pixel an image", (2, 4, 3, 2), "image"),
    ],
    ids=str,
)
def test_nothing_to_compare_is_zero_attached_to_the_graph(
    backend, reduction, case, shape, negatives
):
    device = device_of(backend)
    keys = unit(5, 4, dtype=torch.float32)
    loss = build(backend, negatives, keys, reduction=reduction)
    student, teacher = (x.to(device) for x in maps(*shape, dtype=torch.float32))
    student.requires_grad_()
    mask = None
    if "valid" in case:
        mask = torch.zeros(spatial(student), dtype=torch.bool, device=device)
        mask[:, 1, 1] = case == "one valid pixel an image"
    for valid in (mask, torch.ones_like(student[:, 0]).bool() if mask is None else mask):
        value = loss(student, teacher, valid_mask=valid)
        components = loss(student, teacher, valid_mask=valid, return_components=True)
        assert value.requires_grad
        expected = torch.zeros(spatial(student) if reduction == "none" else (), device=device)
        assert torch.equal(value, expected)
        assert torch.equal(components.loss, expected)
        assert components.accuracy.isfinite()
        assert components.positive_similarity.isfinite()
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert torch.equal(grad, torch.zeros_like(student))
    if "queue" in negatives:
        assert torch.equal(loss.queue.keys.cpu(), keys)
        assert loss.queue.ptr == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_set_of_queue_keys_adds_nothing(backend):
    device = device_of(backend)
    student, teacher = (unit(7, 4, seed=i).float().to(device) for i in (1, 2))
    student.requires_grad_()
    none = student.new_empty(0, 4)
    alone = pixel_contrast_loss(student, teacher, backend=backend)
    assert torch.equal(
        alone, pixel_contrast_loss(student, teacher, queue_keys=none, backend=backend)
    )
    zero = pixel_contrast_loss(student, teacher, negatives=None, queue_keys=none, backend=backend)
    zero.backward()
    assert zero == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["batch", "image", ("batch", "queue")], ids=str)
def test_pixels_without_direction_count_as_zero_vectors_with_zero_gradient(backend, negatives):
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    student[0, :, 1, 1] = 0
    student[1, :, 0, 2] = 3e-13  # its norm is below 1e-12
    teacher[0, :, 0, 0] = 0
    keys = unit(5, 6, dtype=torch.float32)
    value, grad = measure(build(backend, negatives, keys, reduction="none"), student, teacher)
    exact = student.clone()
    exact[1, :, 0, 2] = 0
    truth = dense(exact, teacher, negatives=negatives, keys=keys)
    assert_close(value, truth, FLOAT32[backend])
    count = {"batch": 11, "image": 5}.get(negatives, 16)
    assert value[0, 1, 1] == pytest.approx(math.log(1 + count), rel=1e-3)
    assert grad.isfinite().all()
    assert torch.equal(grad[0, :, 1, 1], torch.zeros(6))
    assert torch.equal(grad[1, :, 0, 2], torch.zeros(6))
    assert (grad[0, :, 0, 0] != 0).any()
    all_zero = measure(
        build(backend, negatives, keys), torch.zeros_like(student), torch.zeros_like(teacher)
    )
    assert all_zero[0] == pytest.approx(math.log(1 + count), rel=1e-3)
    assert torch.equal(all_zero[1], torch.zeros_like(student))


@pytest.mark.parametrize("side", [0, 1])
def test_a_pixel_whose_squares_overflow_shows(side):
    pair = list(maps(1, 8, 2, 2, dtype=torch.float32))
    pair[side][0, :, 0, 0] = 3e19
    assert pixel_contrast_loss(*(rows_of(x) for x in pair), reduction="none")[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_and_large_pixels_have_a_direction(backend, dtype):
    """The norm of a float16 pixel may exceed float16, and its square may fall below it."""
    student, teacher = unit(2, 2, 20, 32, seed=1).transpose(2, 3).float()
    sizes = torch.tensor([3e-4, 1e-3, 1e3, 9e4]).repeat(5)
    truth = dense(student, teacher)
    scaled = (student * sizes).to(dtype), (teacher * sizes).to(dtype)
    assert all(x.isfinite().all() for x in scaled)
    loss = build(backend, reduction="none")
    value, grad = measure(loss, *scaled)
    assert_close(value, truth, 5e-3 if dtype == torch.float16 else 10 * FLOAT32[backend])
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_student_equal_to_teacher_has_finite_gradients(backend, negatives):
    _, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    keys = unit(5, 6, dtype=torch.float32)
    value, grad = measure(build(backend, negatives, keys, reduction="none"), teacher, teacher)
    truth = dense_with_grad(teacher, teacher, negatives=negatives, keys=keys)
    assert (value >= 0).all()
    assert grad.isfinite().all()
    assert_close(value, truth[0], 10 * FLOAT32[backend])
    assert_close(grad, truth[1], 10 * FLOAT32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["batch", "image", ("queue", "image")], ids=str)
def test_a_tiny_loss_keeps_its_relative_accuracy(backend, negatives):
    """Next to a positive logit of 100, a negative would vanish in float32; without it, it does not."""
    _, teacher = maps(2, 16, 3, 4, dtype=torch.float32)
    keys = unit(5, 16, dtype=torch.float32)
    settings = {"temperature": 0.01, "reduction": "none"}
    exact_queue = queue_of(keys.double()) if "queue" in negatives else None
    exact = PixelContrastLoss(
        **settings, negatives=own_of(negatives), queue=exact_queue, backend="reference"
    )
    truth, right = measure(exact, teacher.double(), teacher.double())
    value, grad = measure(build(backend, negatives, keys, **settings), teacher, teacher)
    assert (truth > 0).all()
    assert truth.max() < 1e-7
    assert (value >= 0).all()
    limit = 1e-3 if device_of(backend) == "cpu" else 0.1  # "high" means tf32 on a GPU
    assert ((value - truth).abs() <= limit * truth + 1e-37).all()
    sizes = right.norm(dim=1)
    assert ((grad - right).norm(dim=1) <= limit * sizes + 1e-33).all()


def test_a_large_float64_loss_keeps_its_accuracy():
    """The softplus is not cut to the identity where float64 still sees the difference."""
    for gap in (15.0, 21.0, 25.0, 30.0, 39.0, 45.0, 800.0):
        student = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        loss = pixel_contrast_loss(
            student,
            -student.detach(),
            temperature=2 / gap,
            negatives=None,
            queue_keys=student.detach(),
        )
        assert loss.item() == pytest.approx(gap + math.log1p(math.exp(-gap)), rel=4e-15, abs=0)
        loss.backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["image", "queue", ("image", "queue")], ids=str)
def test_learnable_temperature_has_a_finite_gradient_where_nothing_is_compared(backend, negatives):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in maps(2, 4, 1, 2, dtype=torch.float32))
    keys = unit(5, 4, dtype=torch.float32)
    for mask in ([[[False, False]], [[False, False]]], [[[True, False]], [[False, False]]]):
        loss = build(backend, negatives, keys, learnable_temperature=True)
        loss(student, teacher, valid_mask=torch.tensor(mask, device=device)).backward()
        nothing = negatives == "image" or not torch.tensor(mask).any()
        assert loss.log_temperature.grad.isfinite().all()
        assert (loss.log_temperature.grad == 0).all() == nothing


# --- Properties -----------------------------------------------------------------------------------


@all_backends
def test_loss_is_never_negative(backend, problem, data):
    student, teacher, _, loss = make(problem)
    mask = draw_mask(data, student)
    if data.draw(st.booleans()):
        student = teacher * 2
    assert (measure(loss(backend), student, teacher, mask)[0] >= 0).all()


@all_backends
def test_loss_is_log_of_the_count_when_all_similarities_are_equal(backend, problem, data):
    """Among 1 + K equal candidates the positive has the probability 1 / (1 + K)."""
    student, teacher, keys, loss = make(problem)
    vector = F.normalize(keys[:1])
    teacher = vector.view(1, -1, 1, 1).expand_as(teacher) * 4.0
    mask = draw_mask(data, student)
    value, _ = measure(loss(backend, vector.expand_as(keys)), student, teacher, mask)
    same_image = mask.flatten(1).sum(dim=1).view(-1, 1, 1) - 1
    count = torch.zeros(mask.shape)
    if "batch" in problem["negatives"]:
        count += mask.sum() - 1
    if "image" in problem["negatives"]:
        count += same_image
    if "queue" in problem["negatives"]:
        count += len(keys)
    expected = torch.log1p(count).masked_fill(~mask, 0.0)
    assert (value - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    low=st.floats(-1.0, 0.998),
    gain=st.floats(0.002, 1.0),
    temperature=st.floats(0.1, 2.0),
    seed=st.integers(0, 999),
)
def test_loss_falls_when_the_positive_comes_closer(backend, low, gain, temperature, seed):
    device = device_of(backend)
    cosines = torch.tensor([low, min(low + gain, 1.0)], dtype=torch.float64)
    student = torch.eye(2, 5).select(0, 0).repeat(2, 1)
    teacher = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    teacher = F.pad(teacher, (0, 3)).float()
    keys = unit(6, 5, seed=seed, dtype=torch.float32)
    far, near = pixel_contrast_loss(
        student.to(device),
        teacher.to(device),
        temperature=temperature,
        negatives=None,
        queue_keys=keys.to(device),
        reduction="none",
        backend=backend,
    )
    assert near < far


@all_backends
def test_loss_rises_with_more_negatives(backend, problem, data):
    student, teacher, keys, loss = make({**problem, "negatives": "queue"})
    more = torch.cat([keys, unit(1, keys.shape[1], seed=problem["seed"] + 9).float()])
    fewer = measure(loss(backend), student, teacher)[0]
    assert (measure(loss(backend, more), student, teacher)[0] >= fewer - 1e-6 * fewer).all()


@all_backends
def test_permuting_pixels_and_images_permutes_the_loss(backend, problem, data):
    student, teacher, _, loss = make(problem)
    student, teacher = student.flatten(2), teacher.flatten(2)
    mask = draw_mask(data, student)
    images = torch.tensor(data.draw(st.permutations(range(student.shape[0]))))
    pixels = torch.tensor(data.draw(st.permutations(range(student.shape[2]))))

    def move(values):
        return values[images][..., pixels]

    value, _ = measure(loss(backend), student, teacher, mask)
    moved, _ = measure(loss(backend), move(student), move(teacher), move(mask))
    assert_same([moved], [move(value)], 5 * FLOAT32[backend])


@all_backends
def test_rotating_everything_changes_nothing(backend, problem, data):
    student, teacher, keys, loss = make(problem)
    generator = torch.Generator().manual_seed(problem["seed"])
    rotation = torch.linalg.qr(torch.randn(2 * (keys.shape[1],), generator=generator))[0]

    def rotate(image):
        return torch.einsum("oc,bchw->bohw", rotation, image)

    value, grad = measure(loss(backend), student, teacher)
    turned = measure(loss(backend, keys @ rotation.T), rotate(student), rotate(teacher))
    assert_same(turned, (value, rotate(grad)), 10 * max(FLOAT32[backend], 5e-6))


@all_backends
def test_length_of_a_pixel_does_not_matter(backend, problem, data):
    student, teacher, _, loss = make(problem)
    factors = data.draw(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=2))
    value, grad = measure(loss(backend), student, teacher)
    scaled = measure(loss(backend), student * factors[0], teacher * factors[1])
    assert_same(
        (scaled[0], scaled[1] * factors[0]), (value, grad), 10 * max(FLOAT32[backend], 5e-6)
    )


# --- Gradients go to the student only -------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_neither_teacher_nor_queue_gets_a_gradient(backend, normalize):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in maps(2, 6, 2, 3, dtype=torch.float32))
    student.requires_grad_()
    teacher.requires_grad_()
    loss = build(backend, ("batch", "queue"), unit(5, 6, dtype=torch.float32), normalize=normalize)
    loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert loss.queue.keys.grad is None
    keys = unit(5, 6).float().to(device).requires_grad_()
    rows = rows_of(student), rows_of(teacher)
    value = pixel_contrast_loss(*rows, queue_keys=keys, normalize=normalize, backend=backend)
    value.backward()
    assert teacher.grad is None
    assert keys.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_student_gives_a_loss_without_gradient(backend):
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 6, 2, 3, dtype=torch.float32))
    loss = build(backend)
    assert not loss(student, teacher).requires_grad
    with torch.no_grad():
        assert not loss(student.requires_grad_(), teacher).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 5e-6), (torch.float16, 5e-6), (torch.bfloat16, 5e-6)],
    ids=str,
)
def test_teacher_may_have_another_dtype(backend, dtype, tolerance):
    """Its unit vectors are not rounded to a dtype that is coarser than the student's."""
    student, teacher = maps(2, 16, 3, 4)
    student, teacher = student.float(), teacher.to(dtype)
    keys = unit(5, 16, seed=2, dtype=dtype)
    settings = {"negatives": ("batch", "queue"), "keys": keys, "reduction": "none"}
    value, grad = measure(build(backend, **settings), student, teacher)
    truth = dense_with_grad(student, teacher, negatives=("batch", "queue"), keys=keys)
    assert value.dtype == grad.dtype == torch.float32
    assert_close(value, truth[0], max(tolerance, FLOAT32[backend]))
    assert_close(grad, truth[1], max(tolerance, FLOAT32[backend]))


@pytest.mark.parametrize("backend", FAST)
def test_enqueueing_between_forward_and_backward_changes_no_gradient(backend):
    device = device_of(backend)
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    keys = unit(9, 6, dtype=torch.float32)
    loss = build(backend, ("image", "queue"), keys)
    _, expected = measure(loss, student, teacher)
    ours = student.to(device, copy=True).requires_grad_()
    value = loss(ours, teacher.to(device))
    loss.queue.enqueue(unit(7, 6, seed=8, dtype=torch.float32).to(device))
    value.backward()
    assert not torch.equal(loss.queue.keys.cpu(), keys)
    assert torch.equal(ours.grad.cpu(), expected)


def test_the_reference_backend_refuses_an_overwritten_queue():
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    loss = build("reference", "queue", unit(9, 6, dtype=torch.float32))
    value = loss(student.requires_grad_(), teacher)
    loss.queue.enqueue(unit(2, 6, seed=8, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def saved_sizes(loss, student, teacher):
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(student.requires_grad_(), teacher)
    return sizes


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("negatives", ["queue", ("queue", "batch")], ids=str)
@pytest.mark.parametrize("settings", [{}, {"learnable_temperature": True}], ids=str)
def test_the_graph_keeps_neither_queue_nor_logits(backend, negatives, settings):
    """The queue `[64, 6]` and the logits `[12, 64]` exceed all else; the reference keeps both."""
    pair = [x.to(device_of(backend)) for x in maps(2, 6, 2, 3, dtype=torch.float32)]
    keys = unit(64, 6, dtype=torch.float32)
    sizes = saved_sizes(build(backend, negatives, keys, **settings), *pair)
    assert sizes
    assert max(sizes) <= 12 * 6
    reference = build("reference", negatives, keys, **settings)
    assert {keys.numel(), 12 * 65} <= set(saved_sizes(reference, *(x.cpu() for x in pair)))


def test_nothing_of_size_n_by_n_or_n_by_k_is_made():
    student, teacher = maps(2, 4, 10, 10, dtype=torch.float32)
    keys, mask = unit(300, 4, dtype=torch.float32), some_mask(2, 10, 10)
    for negatives in NEGATIVES:
        for backend, limit in (("torch", False), ("reference", True)):
            loss = build(backend, negatives, keys)
            with LargestTensor() as largest:
                loss(student.requires_grad_(), teacher, valid_mask=mask).backward()
            assert (largest.size > 300 * 4) == limit, (negatives, backend)


# --- Dtypes and autocast --------------------------------------------------------------------------


def plain_contrast(student, teacher, temperature, keys):
    """What one would write in plain PyTorch, in the dtype of the inputs."""
    student, teacher = F.normalize(rows_of(student)), F.normalize(rows_of(teacher))
    logits = student @ torch.cat([teacher, keys]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(student)), reduction="none")


def budget_case(dtype):
    student, teacher = maps(2, 24, 3, 5, seed=4, dtype=dtype)
    return student, teacher, unit(30, 24, seed=5, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.07])
def test_error_stays_within_twice_plain_pytorch(backend, dtype, temperature):
    student, teacher, keys = budget_case(dtype)
    negatives = ("batch", "queue")
    loss = build(backend, negatives, keys, temperature=temperature, reduction="none")
    value, grad = measure(loss, student, teacher)
    truth = dense_with_grad(student, teacher, temperature, negatives, None, keys)
    student.requires_grad_()
    plain = plain_contrast(student, teacher, temperature, keys)
    (plain_grad,) = torch.autograd.grad(weighted(plain), student)
    tiny = 1e-6 if dtype == torch.float32 else 1e-4
    if device_of(backend) == "cuda" and dtype == torch.float32:
        tiny = 2e-3  # "high" means tf32
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_budget(value, plain.view(2, 3, 5), truth[0], tiny)
    assert_within_budget(grad, plain_grad, truth[1], tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learnable", [False, True])
def test_results_are_float32_and_gradients_have_the_input_dtype(dtype, reduction, learnable):
    student, teacher = maps(2, 6, 2, 3, dtype=dtype)
    mask = some_mask(2, 2, 3)
    loss = build("torch", reduction=reduction, learnable_temperature=learnable)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for valid in (None, mask):
        value, grad = measure(loss, student, teacher, valid)
        assert value.dtype == wide
        assert grad.dtype == dtype
        parts = loss(student, teacher, valid_mask=valid, return_components=True)
        assert {part.dtype for part in parts} == {wide}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_vectors_reach_the_kernel_in_their_own_dtype(dtype, monkeypatch):
    """Half maps are not widened: that would double what backward keeps."""
    seen = []
    original = chunked.row_lse

    def spy(query, keys, *args, **options):
        seen.extend([query.dtype, keys.dtype])
        return original(query, keys, *args, **options)

    monkeypatch.setattr(chunked, "row_lse", spy)
    student, teacher = maps(2, 6, 2, 3, dtype=dtype)
    build("torch")(student, teacher)
    assert seen == [dtype, dtype]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_stays_within_twice_plain_pytorch(backend, dtype):
    student, teacher, keys = budget_case(dtype)
    negatives = ("batch", "queue")
    loss = build(backend, negatives, keys, reduction="none")
    truth = dense_with_grad(student, teacher, 0.2, negatives, None, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = student.clone().requires_grad_()
        value = loss(ours, teacher)
        components = loss(ours, teacher, return_components=True)
        plain_student = student.clone().requires_grad_()
        plain = plain_contrast(plain_student, teacher, 0.2, keys)
    weighted(value).backward()
    weighted(plain).backward()
    assert value.dtype == components.positive_similarity.dtype == torch.float32
    assert ours.grad.dtype == dtype
    assert torch.equal(components.loss, value)
    assert_within_budget(value, plain.view(2, 3, 5), truth[0], 1e-4)
    assert_within_budget(ours.grad, plain_student.grad, truth[1], 1e-4)


def test_autocast_leaves_float64_alone():
    student, teacher = maps(2, 6, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = PixelContrastLoss()(student, teacher)
    assert value.dtype == torch.float64
    assert_close(value, dense(student, teacher).mean(), 1e-13)


def test_more_valid_float16_pixels_than_float16_can_count():
    student = torch.ones(1, 2, 70_000, dtype=torch.float16, requires_grad=True)
    mask = torch.ones(1, 70_000, dtype=torch.bool)
    keys = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    loss = build("torch", "queue", keys)
    one = loss(student[..., :1], student[..., :1])
    for reduction, factor in (("mean", 1), ("sum", 70_000)):
        loss.reduction = reduction
        assert_close(loss(student, student, valid_mask=mask), one * factor, 1e-4)


# --- Layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["batch", ("image", "queue")], ids=str)
def test_strided_maps_equal_contiguous_ones(backend, negatives):
    student, teacher = maps(2, 6, 3, 4, dtype=torch.float32)
    keys, mask = unit(5, 6, dtype=torch.float32), some_mask(2, 3, 4)
    loss = build(backend, negatives, keys, reduction="none")
    expected = measure(loss, student, teacher, mask)
    forms = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.stack([x, x + 1], dim=-1).flatten(3)[..., ::2],
        "cropped": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
        "transposed": lambda x: x.mT.contiguous().mT,
        "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    wide_mask = torch.stack([mask, ~mask], dim=-1).flatten(2)[..., ::2]
    for name, form in forms.items():
        assert not form(student).is_contiguous(), name
        assert torch.equal(form(student), student), name
        ours = measure(loss, form(student), form(teacher), wide_mask)
        assert_close(ours[0], expected[0], 1e-6)
        assert_close(ours[1], expected[1], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["batch", "image", "queue"])
def test_expanded_maps_equal_contiguous_ones(backend, negatives):
    student, teacher = maps(1, 6, 3, 1, dtype=torch.float32)
    device = device_of(backend)
    loss = build(backend, negatives, unit(5, 6, dtype=torch.float32), reduction="none")
    results = []
    for form in (lambda x: x, torch.Tensor.contiguous):
        leaf = student.to(device, copy=True).requires_grad_()
        wide = form(leaf.expand(2, 6, 3, 4))
        mask = form(torch.tensor([True, False, True], device=device).view(1, 3, 1).expand(2, 3, 4))
        value = loss(wide, form(teacher.to(device).expand(2, 6, 3, 4)), valid_mask=mask)
        weighted(value).backward()
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    assert_close(results[0][0], results[1][0], 1e-6)
    assert_close(results[0][1], results[1][1], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in maps(2, 6, 2, 3, dtype=torch.float32))
    mask = some_mask(2, 2, 3).to(device)
    inputs = (student, teacher, mask)
    before = [x.clone() for x in inputs]
    loss = build(backend, ("batch", "queue"), unit(5, 6, dtype=torch.float32))
    loss(student.requires_grad_(), teacher, valid_mask=mask).backward()
    loss(student, teacher, valid_mask=mask, return_components=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert torch.equal(loss.queue.keys.cpu(), unit(5, 6, dtype=torch.float32))


# --- Temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_learnable_temperature_has_the_dense_gradient(backend, negatives):
    student, teacher = maps(2, 6, 2, 3)
    keys, mask = unit(5, 6), some_mask(2, 2, 3)
    loss = build(backend, negatives, keys, temperature=0.3, learnable_temperature=True).double()
    value = loss(student, teacher, valid_mask=mask)
    value.backward()
    logarithm = loss.log_temperature.detach().clone().requires_grad_()
    truth = dense(student, teacher, logarithm.exp(), negatives, mask, keys).sum() / mask.sum()
    truth.backward()
    assert_close(value, truth, 1e-13)
    assert_close(loss.log_temperature.grad, logarithm.grad, 1e-11)

    start, step = loss.log_temperature.detach().clone(), 1e-6
    ends = []
    for sign in (1, -1):
        loss.log_temperature.data.copy_(start + sign * step)
        ends.append(loss(student, teacher, valid_mask=mask).detach())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert_close(loss.log_temperature.grad, slope.reshape(1), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_learnable_temperature_learns_on_every_backend(backend, dtype):
    device = device_of(backend)
    student, teacher = maps(2, 6, 2, 3, dtype=dtype)
    loss = build(backend, temperature=0.3, learnable_temperature=True)
    value = loss(student.to(device).requires_grad_(), teacher.to(device))
    value.backward()
    logarithm = torch.tensor([math.log(0.3)], dtype=torch.float64, requires_grad=True)
    dense(student, teacher, logarithm.exp()).mean().backward()
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5 if device == "cpu" else 1e-2
    assert loss.log_temperature.grad.dtype == torch.float32
    assert_close(loss.log_temperature.grad, logarithm.grad, tolerance)


def test_learnable_temperature_is_a_parameter_that_state_dict_resets():
    loss = PixelContrastLoss(0.07, learnable_temperature=True)
    assert [(name, p.shape) for name, p in loss.named_parameters()] == [("log_temperature", (1,))]
    assert loss.temperature.requires_grad
    assert loss.temperature.item() == pytest.approx(0.07)
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    before = loss(student, teacher)
    before.backward()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    after = loss(student, teacher)
    assert loss.temperature.item() != pytest.approx(0.07)
    assert after < before
    loss.load_state_dict(state)
    assert loss.temperature.item() == pytest.approx(0.07)
    assert torch.equal(loss(student, teacher), before)


def test_fixed_temperature_has_no_parameter():
    loss = PixelContrastLoss(0.07)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert loss.temperature == 0.07
    assert isinstance(PixelContrastLoss(1).temperature, float)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_function_form_takes_a_temperature_tensor_of_one_element(shape, dtype):
    student, teacher = unit(9, 4, seed=1).float(), unit(9, 4, seed=2).float()
    temperature = torch.full(shape, 0.3, dtype=dtype, requires_grad=True)
    value = pixel_contrast_loss(student, teacher, temperature=temperature)
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert temperature.grad.shape == shape
    assert_close(value, pixel_contrast_loss(student, teacher, temperature=0.3), 1e-6)


# --- Components -----------------------------------------------------------------------------------


def dense_components(student, teacher, negatives, mask, keys):
    """Accuracy and mean positive similarity, anchor by anchor."""
    batch, pixels = student.shape[0], math.prod(student.shape[2:])
    image_of = torch.arange(batch).repeat_interleave(pixels)
    s, t = (F.normalize(rows_of(x).double(), dim=1) for x in (student, teacher))
    valid = torch.ones(len(s), dtype=torch.bool) if mask is None else mask.flatten()
    wins, similarities = [], []
    for i in range(len(s)):
        if not valid[i]:
            continue
        positive = s[i] @ t[i]
        rivals = []
        for j in range(len(t)):
            related = "batch" in negatives or ("image" in negatives and image_of[i] == image_of[j])
            if j != i and valid[j] and related:
                rivals.append(s[i] @ t[j])
        if "queue" in negatives:
            rivals += [s[i] @ key.double() for key in keys]
        wins.append(all(rival <= positive for rival in rivals))
        similarities.append(positive)
    return sum(wins) / len(wins), torch.stack(similarities).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_components_equal_dense_truth_and_the_loss_of_forward(
    backend, negatives, masked, reduction
):
    device = device_of(backend)
    student, teacher = maps(2, 4, 3, 4, seed=6, dtype=torch.float32)
    keys = unit(3, 4, seed=7, dtype=torch.float32)
    mask = some_mask(2, 3, 4) if masked else None
    accuracy, similarity = dense_components(student, teacher, negatives, mask, keys)
    assert 0.05 < accuracy < 0.95
    loss = build(backend, negatives, keys, reduction=reduction)
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)
    mask = None if mask is None else mask.to(device)
    parts = loss(student, teacher, valid_mask=mask, return_components=True)
    value = loss(student, teacher, valid_mask=mask)
    assert torch.equal(parts.loss, value)
    assert parts.accuracy.shape == parts.positive_similarity.shape == ()
    assert parts.accuracy.item() == pytest.approx(accuracy, rel=1e-6)
    assert_close(parts.positive_similarity, similarity, 1e-6)
    assert not parts.accuracy.requires_grad
    assert not parts.positive_similarity.requires_grad
    grads = [torch.autograd.grad(weighted(x), student)[0] for x in (parts.loss, value)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_ties_count_for_the_positive(backend, temperature):
    """Positive and negatives come from different sums, so equal vectors differ by rounding."""
    device = device_of(backend)
    student, _ = maps(2, 32, 4, 4, dtype=torch.float32)
    teacher = maps(1, 32, 1, 1, seed=2, dtype=torch.float32)[1].expand_as(student)
    student = torch.where(torch.arange(4) % 2 == 0, student, teacher)
    keys = F.normalize(rows_of(teacher)[:3])
    loss = build(backend, ("batch", "queue"), keys, temperature=temperature)
    accuracy = loss(student.to(device), teacher.to(device), return_components=True).accuracy
    if device == "cpu":
        assert accuracy == 1
    assert (rows_of(student) * rows_of(teacher)).sum(dim=1).min() < 0  # also below zero


def test_ties_under_autocast_count_for_the_positive():
    """Both are judged by the rounded operands that the pass multiplies; the loss is not."""
    student, _ = maps(2, 32, 4, 4, dtype=torch.float32)
    teacher = maps(1, 32, 1, 1, seed=2, dtype=torch.float32)[1].expand_as(student)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert PixelContrastLoss()(student, teacher, return_components=True).accuracy == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_sees_a_rival_that_is_slightly_better(backend):
    device = device_of(backend)
    student = torch.tensor([[1.0, 0.0, 0.0]] * 2).to(device)
    near, far = 0.9, 0.9 * (1 - 1e-3)
    teacher = torch.tensor([[c, math.sqrt(1 - c * c), 0.0] for c in (near, far)]).to(device)
    loss = build(backend, temperature=0.05)
    to_map = [x.T.reshape(1, 3, 2) for x in (student, teacher)]
    assert loss(*to_map, return_components=True).accuracy == 0.5
    to_map[1] = -to_map[1]
    assert loss(*to_map, return_components=True).accuracy == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", [("batch", "queue"), ("queue", "batch")], ids=str)
@pytest.mark.parametrize(
    ("in_batch", "in_queue", "accuracy"), [(0.5, 0.4, 1), (0.5, 0.95, 0), (0.95, 0.5, 0)]
)
def test_a_rival_in_either_source_beats_the_positive(
    backend, negatives, in_batch, in_queue, accuracy
):
    positive, rival, key = (
        [cosine, math.sqrt(1 - cosine**2)] for cosine in (0.9, in_batch, in_queue)
    )
    device = device_of(backend)
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device).T.reshape(1, 2, 2)
    teacher = torch.tensor([positive, rival], device=device).T.reshape(1, 2, 2)
    parts = build(backend, negatives, torch.tensor([key]))(student, teacher, return_components=True)
    second = float(in_batch >= max(0.9, in_queue))  # the rival is the second pixel's positive
    assert parts.accuracy == (accuracy + second) / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_student_has_accuracy_and_similarity_one(backend):
    _, teacher = maps(2, 16, 3, 4, dtype=torch.float32)
    teacher = teacher.to(device_of(backend))
    parts = build(backend)(teacher, teacher, return_components=True)
    assert parts.accuracy == 1
    assert_close(parts.positive_similarity, torch.tensor(1.0), 1e-6)
    assert build(backend)(-teacher, teacher, return_components=True).accuracy < 0.2


@pytest.mark.parametrize("negatives", NEGATIVES, ids=str)
def test_components_take_no_further_pass(negatives, monkeypatch):
    passes = []
    original = chunked.row_lse

    def spy(*args, **options):
        passes.append(options["with_max"])
        return original(*args, **options)

    monkeypatch.setattr(chunked, "row_lse", spy)
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    loss = build("torch", negatives, unit(5, 6, dtype=torch.float32))
    sources = 1 if isinstance(negatives, str) else len(negatives)
    loss(student.requires_grad_(), teacher).backward()
    assert passes == [False] * sources
    passes.clear()
    loss(student, teacher, return_components=True).loss.backward()
    assert passes == [True] * sources


# --- State ----------------------------------------------------------------------------------------


def stateful():
    loss = build(
        "torch",
        ("batch", "queue"),
        unit(5, 6, dtype=torch.float32),
        temperature=0.13,
        learnable_temperature=True,
        reduction="sum",
    )
    loss.queue.enqueue(unit(2, 6, seed=4, dtype=torch.float32))
    return loss


def test_state_dict_carries_everything_to_a_fresh_loss():
    loss, pair = stateful(), maps(2, 6, 2, 3, dtype=torch.float32)
    assert set(loss.state_dict()) == {"log_temperature", "queue.keys", "queue.ptr"}
    fresh = PixelContrastLoss(
        queue=PixelQueue(5, 6),
        learnable_temperature=True,
        reduction="sum",
    )
    assert not torch.equal(fresh(*pair), loss(*pair))
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh(*pair), loss(*pair))
    assert fresh.queue.ptr == 2


@pytest.mark.parametrize("key", ["log_temperature", "queue.keys", "queue.ptr"])
def test_loading_names_a_missing_key(key):
    loss = stateful()
    state = loss.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        loss.load_state_dict(state)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(clone):
    loss, pair = stateful(), maps(2, 6, 2, 3, dtype=torch.float32)
    other = clone(loss)
    assert torch.equal(other(*pair), loss(*pair))
    assert repr(other) == repr(loss)
    expected = loss(*pair)
    other.queue.enqueue(unit(3, 6, seed=9, dtype=torch.float32))
    other.log_temperature.data.zero_()
    assert torch.equal(loss(*pair), expected)
    assert not torch.equal(other(*pair), expected)


def test_the_queue_is_shared_with_the_caller_and_moves_only_by_enqueue():
    queue = PixelQueue(5, 6)
    loss = PixelContrastLoss(negatives=None, queue=queue)
    before = queue.keys.clone()
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float32)
    first = loss(student, teacher)
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 0
    queue.enqueue_pooled(teacher)
    assert loss.queue is queue
    assert not torch.equal(loss(student, teacher), first)


def test_repr_shows_the_settings():
    loss = PixelContrastLoss(
        0.07, negatives="image", queue=PixelQueue(8, 4), reduction="sum", backend="torch"
    )
    for words in (
        "temperature=0.07",
        "negatives='image'",
        "normalize=True",
        "reduction='sum'",
        "backend='torch'",
        "size=8, dim=4",
    ):
        assert words in repr(loss)
    assert "temperature=learnable" in repr(PixelContrastLoss(learnable_temperature=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("strict", [False, True])
def test_same_bits_twice(backend, strict):
    student, teacher = maps(2, 6, 3, 4, dtype=torch.float32)
    mask, keys = some_mask(2, 3, 4), unit(9, 6, dtype=torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        loss = build(backend, ("batch", "queue"), keys, learnable_temperature=True)
        one, two = (measure(loss, student, teacher, mask) for _ in range(2))
        loss.queue.enqueue(keys[:3].flip(1).to(device_of(backend)))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(backend, in_batch, normalize):
    student, teacher = unit(2, 5, 3, seed=1) * 1.5, unit(2, 5, 3, seed=2) * 2
    keys, mask = unit(4, 3, seed=3), some_mask(2, 5)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, tau: pixel_contrast_loss(
            s,
            teacher,
            temperature=tau,
            negatives="batch" if in_batch else None,
            queue_keys=keys,
            valid_mask=mask,
            normalize=normalize,
            reduction="none",
            backend=backend,
        ),
        (student.requires_grad_(), temperature),
    )


def test_second_order_gradients_raise_or_are_right():
    student, teacher = (unit(5, 3, seed=i) for i in (1, 2))
    student.requires_grad_()
    (grad,) = torch.autograd.grad(pixel_contrast_loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.square().sum().backward()

    def reference(s):
        return pixel_contrast_loss(s, teacher, backend="reference")

    assert torch.autograd.gradgradcheck(reference, (student,))
    with_zero = student.detach().clone()
    with_zero[2] = 0
    with_zero.requires_grad_()
    (grad,) = torch.autograd.grad(reference(with_zero), with_zero, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), with_zero)
    assert second.isfinite().all()
    assert torch.equal(second[2], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("negatives", ["batch", "image"])
def test_teacher_mask_and_keys_may_come_from_inference_mode(backend, normalize, negatives):
    with torch.inference_mode():
        teacher, keys = torch.randn(2, 8, 4, 4), torch.randn(5, 8)
        valid_mask = torch.rand(2, 4, 4) > 0.3
    student = torch.randn(2, 8, 4, 4, requires_grad=True)
    loss = PixelContrastLoss(negatives=negatives, normalize=normalize, backend=backend)
    loss(student, teacher, valid_mask=valid_mask).backward()
    rows = [rows_of(x) for x in (student, teacher)]
    pixel_contrast_loss(*rows, queue_keys=keys, normalize=normalize, backend=backend).backward()
    assert student.grad.norm() > 0


def test_reset_parameters_starts_a_learnable_temperature_again():
    with torch.device("meta"):
        loss = PixelContrastLoss(0.05, learnable_temperature=True)
    loss.to_empty(device="cpu").reset_parameters()
    assert loss.temperature.item() == pytest.approx(0.05)
    PixelContrastLoss().reset_parameters()


# --- Compilation ----------------------------------------------------------------------------------

MAP_SIZES = ((2, 3, 4), (3, 5, 4), (2, 7, 6), (4, 3, 9))


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("forward", {}),
        ("mask", {"negatives": "image", "reduction": "none"}),
        ("mask", {"negatives": ("image", "queue")}),
        ("components and mask", {"negatives": ("queue", "batch")}),
        ("autocast and mask", {"negatives": "queue"}),
        ("forward", {"learnable_temperature": True, "reduction": "sum"}),
        ("triton", {"negatives": ("batch", "queue")}),
    ],
    ids=str,
)
def test_compiles_once_for_all_map_sizes(case, settings):
    backend = "triton" if case == "triton" else "torch"
    device = device_of(backend)
    loss = build(backend, keys=unit(9, 6, dtype=torch.float32), **settings)

    def step(student, teacher, mask):
        with torch.autocast(device, dtype=torch.bfloat16, enabled="autocast" in case):
            if "components" in case:
                return loss(student, teacher, valid_mask=mask, return_components=True)
            return (loss(student, teacher, valid_mask=mask),)

    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for batch, height, width in MAP_SIZES:
            student, teacher = maps(batch, 6, height, width, dtype=torch.float32)
            mask = some_mask(batch, height, width).to(device) if "mask" in case else None
            results = []
            for function in (compiled, step):
                leaf = student.to(device, copy=True).requires_grad_()
                parts = function(leaf, teacher.to(device), mask)
                weighted(parts[0]).backward()
                results.append((*parts, leaf.grad))
            for ours, eager in zip(*results, strict=True):
                assert_close(ours, eager, 1e-6)
            frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * (len(MAP_SIZES) - 1)


def test_function_form_compiles():
    with fresh_compiler():
        compiled = torch.compile(
            pixel_contrast_loss, fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for rows in (5, 8, 13):
            student, teacher = (unit(rows, 4, seed=i, dtype=torch.float32) for i in (1, 2))
            assert_close(compiled(student, teacher), pixel_contrast_loss(student, teacher), 1e-6)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("gcc") is None, reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_compiles_with_the_default_compiler():
    loss = build("torch", ("batch", "queue"), unit(9, 6, dtype=torch.float32))
    with fresh_compiler():
        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        for batch, height, width in MAP_SIZES[:2]:
            student, teacher = maps(batch, 6, height, width, dtype=torch.float32)
            mask = some_mask(batch, height, width)
            ours = student.clone().requires_grad_()
            value = compiled(ours, teacher, valid_mask=mask)
            value.backward()
            eager, grad = measure(loss, student, teacher, mask)
            assert_close(value, eager, 2e-6)
            assert_close(ours.grad, grad, 5e-6)


# --- Arguments ------------------------------------------------------------------------------------
# Maps, masks, dtypes and devices that do not fit are in test_every_loss.py.

QUEUE = PixelQueue(4, 6)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "temperature must be a finite number above 0; got 0", {"temperature": 0}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": -0.2}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": math.inf}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": math.nan}),
        (TypeError, "temperature must be a number; got '0.2'", {"temperature": "0.2"}),
        (TypeError, "temperature must be a number; got True", {"temperature": True}),
        (TypeError, "temperature must be a number; got None", {"temperature": None}),
        (ValueError, "negatives must be one of .*got 'queue'", {"negatives": "queue"}),
        (ValueError, "negatives must be one of", {"negatives": ("batch", "queue"), "queue": QUEUE}),
        (ValueError, "negatives must be one of", {"negatives": ["batch"]}),
        (ValueError, "queue must be given with negatives=None", {"negatives": None}),
        (TypeError, "queue must be a PixelQueue; got Tensor", {"queue": QUEUE.ptr}),
        (TypeError, "queue must be a PixelQueue; got int", {"negatives": None, "queue": 4}),
        (TypeError, "normalize must be True or False; got 'no'", {"normalize": "no"}),
        (TypeError, "learnable_temperature must be True or", {"learnable_temperature": "yes"}),
        (ValueError, "reduction must be one of .*got 'avg'", {"reduction": "avg"}),
        (ValueError, "backend must be one of .*got 'cuda'", {"backend": "cuda"}),
        (TypeError, "gather_distributed must be True or", {"gather_distributed": "yes"}),
        (ValueError, r"gather_mode must be one of \('all', 'ring'\)", {"gather_mode": "star"}),
    ],
)  # fmt: skip
def test_wrong_settings(error, words, settings):
    with pytest.raises(error, match=words):
        PixelContrastLoss(**settings)


def test_wrong_width_of_the_queue():
    student, teacher = maps(2, 6, 3, 4)
    loss = PixelContrastLoss(negatives=None, queue=PixelQueue(4, 5))
    with pytest.raises(ValueError, match=r"queue's keys must have shape \[K, 6\].*got \(4, 5\)"):
        loss(student, teacher)


ROWS = torch.randn(5, 4)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "queue_keys must be given with negatives=None", {"negatives": None}),
        (ValueError, "negatives must be one of", {"negatives": "image"}),
        (ValueError, r"one floating-point element on cpu; .*\(2,\)", {"temperature": torch.ones(2)}),
        (ValueError, "one floating.* on meta", {"temperature": torch.ones((), device="meta")}),
        (ValueError, "one floating.*got torch.int64", {"temperature": torch.tensor(1)}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": 0.0}),
        (TypeError, "temperature must be a number", {"temperature": "0.2"}),
        (ValueError, "reduction must be one of", {"reduction": "avg"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (TypeError, "normalize must be True or False; got 'no'", {"normalize": "no"}),
        (ValueError, r"queue_keys .*\[K, 4\].*got \(7, 3\)", {"queue_keys": torch.randn(7, 3)}),
        (ValueError, r"\[K, 4\].*got \(2, 7, 4\)", {"queue_keys": torch.randn(2, 7, 4)}),
        (TypeError, "queue_keys must be a tensor; got list", {"queue_keys": [[1.0] * 4]}),
        (TypeError, "queue_keys .*got torch.int64", {"queue_keys": torch.ones(7, 4).long()}),
        (TypeError, "valid_mask must be a bool tensor", {"valid_mask": torch.ones(5)}),
        (ValueError, r"shape \(5,\); got \(4,\)", {"valid_mask": torch.ones(4).bool()}),
        (ValueError, r"\(5, 4\) and teacher \(5, 3\)", {"teacher": ROWS[:, :3]}),
        (TypeError, "teacher must be float16", {"teacher": ROWS.long()}),
        (ValueError, r"vectors \[..., N, D\]", {"student": ROWS[0], "teacher": ROWS[0]}),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_function_form(error, words, arguments):
    with pytest.raises(error, match=words):
        pixel_contrast_loss(**{"student": ROWS, "teacher": ROWS, **arguments})
