"""PixelContrastLoss and its function form: official outputs, a dense truth, properties and edges.

What every loss must do is in test_every_loss.py and test_training_loops.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    assert_close,
    assert_within_budget,
    dense_contrast,
    device_of,
    float32_tolerance,
    fresh_compiler,
    golden,
    launches,
    needs_torch,
    unit,
)
from helpers import high_precision as high_precision
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill import PixelContrastLoss, PixelQueue, pixel_contrast_loss
from pixdistill.ops import contrast
from pixdistill.ops.contrast import chunked

FAST = ("torch", "triton")
EXACT = ("reference", "torch")  # these take float64
FLOAT32 = {backend: max(2e-6, float32_tolerance(backend)) for backend in BACKENDS}
NEGATIVES = ("batch", "image", "queue", "batch+queue", "image+queue")
"""What the loss takes as negatives; "queue" alone is `negatives=None`."""
SHAPES = ((2, 6, 4, 5), (1, 4, 1, 1), (3, 5, 7), (2, 3, 2, 3, 3), (1, 7, 1, 13))

backends = pytest.mark.parametrize("backend", BACKENDS)
all_negatives = pytest.mark.parametrize("negatives", NEGATIVES)


def maps(*shape, seed=0, dtype=torch.float32):
    """A student and a teacher map whose pixels are not unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    return pair[0].to(dtype), (pair[1] + 0.5 * pair[0]).to(dtype)


def keys_of(count, width, seed=2, dtype=torch.float32):
    return unit(count, width, seed=seed, dtype=dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def spatial(image):
    """The shape of one element per pixel, `[B, *spatial]`."""
    return (image.shape[0], *image.shape[2:])


def rows_of(image):
    """`[B, C, *spatial]` as one vector per pixel, image after image."""
    return image.flatten(2).transpose(1, 2).reshape(-1, image.shape[1])


def build(backend, negatives="batch", keys=None, **settings):
    """The loss on its backend's device, with a queue of these keys where negatives name one."""
    queue = None
    if "queue" in negatives:
        queue = PixelQueue(*keys.shape, dtype=keys.dtype)
        queue.keys.copy_(keys)
    own = negatives.removesuffix("queue").removesuffix("+") or None
    loss = PixelContrastLoss(negatives=own, queue=queue, backend=backend, **settings)
    return loss.to(device_of(backend))


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
    """The truth per pixel, differentiable, in float64."""
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
        in_batch=negatives != "queue",
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
    ("backend", "dtype"),
    [
        *((backend, torch.float32) for backend in BACKENDS),
        *((backend, torch.float64) for backend in EXACT),
    ],
    ids=str,
)
def test_equals_official_outputs(name, backend, dtype):
    official = golden(f"pcd_pixel_contrast_{name}")
    device, tolerance = device_of(backend), FLOAT32[backend] if dtype == torch.float32 else 5e-7
    temperature = float(official["temperature"])
    loss = build(backend, "queue", official["queue"].T.to(dtype), temperature=temperature)
    student1, student2, teacher1, teacher2 = (
        official[key].to(device, dtype, copy=True)
        for key in ("student1", "student2", "teacher1", "teacher2")
    )
    loss12 = loss(student1.requires_grad_(), teacher2)
    loss21 = loss(student2.requires_grad_(), teacher1)
    mean = (loss12 + loss21) / 2
    mean.backward()
    assert loss12.dtype == dtype
    assert_close(loss12, official["loss12"], tolerance)
    assert_close(loss21, official["loss21"], tolerance)
    assert_close(mean, official["loss"], tolerance)
    assert_close(student1.grad, official["grad_student1"], tolerance)
    assert_close(student2.grad, official["grad_student2"], tolerance)


# --- A dense truth --------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("shape", "negatives"),
    [*((SHAPES[0], n) for n in NEGATIVES), *((s, "image+queue") for s in SHAPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_dense_truth(backend, negatives, shape, masked):
    student, teacher = maps(*shape, seed=1)
    keys, mask = keys_of(11, shape[1]), some_mask(*spatial(student)) if masked else None
    ours = measure(build(backend, negatives, keys, reduction="none"), student, teacher, mask)
    truth = dense_with_grad(student, teacher, negatives=negatives, mask=mask, keys=keys)
    assert ours[0].shape == spatial(student)
    assert_close(ours[0], truth[0], FLOAT32[backend])
    assert_close(ours[1], truth[1], 2 * FLOAT32[backend])


@pytest.mark.parametrize("backend", EXACT)
@all_negatives
@pytest.mark.parametrize("autocast", [False, True])
def test_float64_equals_dense_truth_to_its_own_rounding(backend, negatives, autocast):
    """Also under autocast, which leaves it alone."""
    student, teacher = maps(2, 6, 3, 4, seed=1, dtype=torch.float64)
    keys, mask = keys_of(11, 6, dtype=torch.float64), some_mask(2, 3, 4)
    loss = build(backend, negatives, keys, reduction="none", temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
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
    keys = keys_of(problem["keys"], channels, seed=seed + 1)

    def loss(backend, keys=keys):
        settings = {"temperature": problem["temperature"], "reduction": "none"}
        return build(backend, problem["negatives"], keys, **settings)

    return *maps(*shape, seed=seed), keys, loss


def any_problem(test):
    return backends(given(problem=problems, data=st.data())(test))


def draw_mask(data, student):
    pixels = math.prod(spatial(student))
    entries = data.draw(st.lists(st.booleans(), min_size=pixels, max_size=pixels))
    return torch.tensor(entries).view(spatial(student))


def assert_same(ours, others, tolerance=2e-5):
    """Values and gradients; absolute where everything vanishes."""
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + 0.1)


@any_problem
def test_any_problem_equals_dense_truth(backend, problem, data):
    student, teacher, keys, loss = make(problem)
    mask = draw_mask(data, student)
    settings = problem["temperature"], problem["negatives"], mask, keys
    truth = dense_with_grad(student, teacher, *settings)
    assert_same(measure(loss(backend), student, teacher, mask), truth, 10 * FLOAT32[backend])


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("channels", [300, 65_536])
def test_any_number_of_channels(backend, channels):
    """As many as a head has prototypes; kernels hold 256."""
    student, teacher = maps(1, channels, 2, 3)
    truth = dense_with_grad(student, teacher)
    ours = measure(build(backend, reduction="none"), student, teacher)
    assert_close(ours[0], truth[0], 1e-5)
    assert_close(ours[1], truth[1], 1e-5)


# --- The function form ----------------------------------------------------------------------------


def call_with_grad(student, teacher, backend, mask=None, keys=None, **settings):
    """Values and gradient of the function form, on the CPU."""
    device = device_of(backend)
    student = student.to(device, copy=True).requires_grad_()
    mask, keys = (None if x is None else x.to(device) for x in (mask, keys))
    value = pixel_contrast_loss(
        student, teacher.to(device), valid_mask=mask, queue_keys=keys, backend=backend, **settings
    )
    weighted(value).backward()
    return value.detach().cpu(), student.grad.cpu()


@backends
@pytest.mark.parametrize("negatives", ["batch", None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_function_form_keeps_batch_entries_apart(backend, negatives, masked, batch):
    student, teacher = (x.mT for x in maps(*batch, 6, 9, seed=1))
    keys, mask = keys_of(7, 6), some_mask(*batch, 9) if masked else None
    settings = {"negatives": negatives, "reduction": "none"}
    ours = call_with_grad(student, teacher, backend, mask, keys, **settings)

    double = student.double().requires_grad_()
    entries, positives = double.reshape(-1, 9, 6), teacher.reshape(-1, 9, 6)
    valid = torch.ones(len(entries), 9).bool() if mask is None else mask.reshape(-1, 9)
    truth = [
        dense_contrast(s, t, 0.2, torch.zeros(9), v, keys, negatives == "batch")
        for s, t, v in zip(entries, positives, valid, strict=True)
    ]
    truth = torch.stack(truth).view(*batch, 9)
    weighted(truth).backward()
    assert_close(ours[0], truth, FLOAT32[backend])
    assert_close(ours[1], double.grad, 2 * FLOAT32[backend])


@backends
@pytest.mark.parametrize("normalize", [True, False])
def test_function_form_equals_cross_entropy(backend, normalize):
    """Keys of any length: with `normalize` they are divided by it, otherwise logits reach hundreds."""
    student, teacher, keys = (
        unit(n, 8, seed=n).float() * size for n, size in ((19, 20), (19, 7), (6, 30))
    )
    teacher[1] = unit(1, 8, seed=7).float() * 7
    settings = {"temperature": 0.5, "normalize": normalize}
    ours = call_with_grad(student, teacher, backend, keys=keys, **settings)
    plain = student.double().requires_grad_()
    sides = [plain, torch.cat([teacher, keys]).double()]
    if normalize:
        sides = [F.normalize(x) for x in sides]
    truth = F.cross_entropy(sides[0] @ sides[1].T / 0.5, torch.arange(19))
    truth.backward()
    assert_close(ours[0], truth, 10 * FLOAT32[backend])
    assert_close(ours[1], plain.grad, 50 * FLOAT32[backend])

    as_maps = (x.T.reshape(1, 8, 19).to(device_of(backend)) for x in (student, teacher))
    module = build(backend, "batch+queue", F.normalize(keys) if normalize else keys, **settings)
    assert_close(module(*as_maps), truth, 10 * FLOAT32[backend])


def test_defaults_are_those_of_the_paper():
    student, teacher = maps(2, 6, 3, 4)
    truth = dense(student, teacher, 0.2).mean()
    assert_close(PixelContrastLoss()(student, teacher), truth, 1e-6)
    assert_close(pixel_contrast_loss(rows_of(student), rows_of(teacher)), truth, 1e-6)


# --- Reductions and masks -------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_agree_with_each_other(backend, masked):
    student, teacher = maps(2, 6, 3, 4)
    mask, keys = some_mask(2, 3, 4) if masked else None, keys_of(5, 6)
    none, total, mean = (
        measure(build(backend, "image+queue", keys, reduction=reduction), student, teacher, mask)[0]
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


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mask_deletes_pixels(backend, reduction):
    student, teacher = maps(2, 6, 3, 4)
    mask = some_mask(2, 3, 4)
    value, grad = measure(build(backend, reduction=reduction), student, teacher, mask)
    kept, seen = rows_of(student)[mask.flatten()].requires_grad_(), mask.flatten()
    few = pixel_contrast_loss(kept, rows_of(teacher)[seen], reduction=reduction)
    if reduction == "none":  # the weights of `measure` count the invalid pixels too
        (few * torch.linspace(1.0, 2.0, 24)[seen]).sum().backward()
        value = value[mask]
    else:
        weighted(few).backward()
    assert_close(value, few, FLOAT32[backend])
    assert_close(rows_of(grad)[seen], kept.grad, 2 * FLOAT32[backend])
    assert (rows_of(grad)[~seen] == 0).all()


@backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("together", "alone"), [("image", "batch"), ("image+queue", "batch+queue")]
)
def test_image_negatives_treat_a_batch_as_images_one_by_one(backend, masked, together, alone):
    student, teacher = maps(3, 6, 3, 4)
    mask, keys = some_mask(3, 3, 4) if masked else None, keys_of(5, 6)
    value, _ = measure(build(backend, together, keys, reduction="none"), student, teacher, mask)
    single = build(backend, alone, keys, reduction="none")
    for i in range(3):
        part = None if mask is None else mask[i : i + 1]
        one, _ = measure(single, student[i : i + 1], teacher[i : i + 1], part)
        assert_close(value[i : i + 1], one, FLOAT32[backend])


@backends
@pytest.mark.parametrize(("negatives", "normalize"), [("image+queue", True), ("batch", False)])
def test_invalid_pixels_may_hold_anything(backend, negatives, normalize):
    """To the bit: the loss per pixel, its gradient, and the components."""
    student, teacher = (x / 9 for x in maps(2, 6, 2, 5))
    keys, mask = keys_of(5, 6), some_mask(2, 2, 5)
    loss = build(backend, negatives, keys, reduction="none", normalize=normalize)
    device, clean = device_of(backend), measure(loss, student, teacher, mask)
    for poison in (torch.nan, torch.inf):
        dirty = [x.masked_fill(~mask.unsqueeze(1), poison) for x in (student, teacher)]
        ours = measure(loss, *dirty, mask)
        assert ours[0].isfinite().all()
        assert torch.equal(ours[0], clean[0])
        assert torch.equal(ours[1], clean[1])
        assert (ours[1][~mask.unsqueeze(1).expand_as(ours[1])] == 0).all()
        dirty = [x.to(device) for x in dirty]
        parts = loss(*dirty, valid_mask=mask.to(device), return_components=True)
        assert all(part.isfinite().all() for part in parts)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@backends
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("negatives", ["batch", "image", "queue"])
def test_a_valid_pixel_that_is_not_finite_shows_where_it_is_seen(backend, poison, side, negatives):
    student, teacher = maps(2, 6, 2, 3)
    (student if side == "student" else teacher)[1, 2, 0, 1] = poison
    seen_by = torch.zeros(2, 2, 3, dtype=torch.bool)
    seen_by[1, 0, 1] = True
    if side == "teacher" and negatives != "queue":
        seen_by[slice(None) if negatives == "batch" else 1] = True
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 1] = False
    for valid in (None, mask):
        settings = (backend, negatives, keys_of(5, 6))
        pixels, grad = measure(build(*settings, reduction="none"), student, teacher, valid)
        assert torch.equal(pixels.isnan(), seen_by if valid is None else seen_by & mask)
        assert valid is None or (grad[0, :, 1, 1] == 0).all()
        assert measure(build(*settings), student, teacher, valid)[0].isnan()


# --- Nothing to compare, and no direction ---------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("shape", "negatives", "valid", "reduction"),
    [
        ((2, 4, 3, 2), "batch", "no pixel", "sum"),
        ((2, 4, 3, 2), "image+queue", "no pixel", "none"),
        ((0, 4, 3, 2), "image", "all", "none"),
        ((0, 4, 3, 2), "queue", "all", "sum"),
        ((2, 4, 0, 2), "batch", "all", "mean"),
        ((1, 4, 1, 1), "batch", "all", "mean"),
        ((3, 4, 1, 1), "image", "all", "none"),
        ((2, 4, 3, 2), "image", "one per image", "mean"),
    ],
    ids=str,
)
def test_nothing_to_compare_is_zero_attached_to_the_graph(
    backend, reduction, shape, negatives, valid
):
    device = device_of(backend)
    loss = build(backend, negatives, keys_of(5, 4), reduction=reduction)
    student, teacher = (x.to(device) for x in maps(*shape))
    mask = torch.ones(spatial(student), dtype=torch.bool, device=device)
    if valid != "all":
        mask = torch.zeros_like(mask)
        mask[:, 1, 1] = valid == "one per image"
    for given_mask in (mask, None) if valid == "all" else (mask,):
        value = loss(student.requires_grad_(), teacher, valid_mask=given_mask)
        parts = loss(student, teacher, valid_mask=given_mask, return_components=True)
        assert value.requires_grad
        expected = torch.zeros(spatial(student) if reduction == "none" else (), device=device)
        assert torch.equal(value, expected)
        assert torch.equal(parts.loss, expected)
        assert parts.accuracy.isfinite()
        assert parts.positive_similarity.isfinite()
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert torch.equal(grad, torch.zeros_like(student))


@backends
def test_an_empty_set_of_queue_keys_adds_nothing(backend):
    student, teacher = (unit(7, 4, seed=i).float() for i in (1, 2))
    none = torch.empty(0, 4)
    alone, with_none = (call_with_grad(student, teacher, backend, keys=k) for k in (None, none))
    assert_close(with_none[0], alone[0], 1e-6)
    assert_close(with_none[1], alone[1], 2e-6)
    zero = call_with_grad(student, teacher, backend, keys=none, negatives=None)
    assert zero[0] == 0
    assert torch.equal(zero[1], torch.zeros_like(student))


@backends
@pytest.mark.parametrize(("negatives", "count"), [("batch", 11), ("image", 5), ("batch+queue", 16)])
def test_pixels_without_direction_count_as_zero_vectors_with_zero_gradient(
    backend, negatives, count
):
    student, teacher = maps(2, 6, 2, 3)
    student[0, :, 1, 1] = 0
    student[1, :, 0, 2] = 3e-13  # its norm is below 1e-12
    teacher[0, :, 0, 0] = 0
    keys = keys_of(5, 6)
    value, grad = measure(build(backend, negatives, keys, reduction="none"), student, teacher)
    exact = student.clone()
    exact[1, :, 0, 2] = 0
    assert_close(value, dense(exact, teacher, negatives=negatives, keys=keys), FLOAT32[backend])
    assert value[0, 1, 1] == pytest.approx(math.log(1 + count), rel=1e-3)
    assert grad.isfinite().all()
    assert (grad[0, :, 1, 1] == 0).all()
    assert (grad[1, :, 0, 2] == 0).all()
    assert (grad[0, :, 0, 0] != 0).any()
    zeros = torch.zeros_like(student)
    all_zero = measure(build(backend, negatives, keys), zeros, zeros)
    assert all_zero[0] == pytest.approx(math.log(1 + count), rel=1e-3)
    assert torch.equal(all_zero[1], zeros)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@backends
@pytest.mark.parametrize("side", [0, 1])
def test_a_pixel_whose_squares_overflow_shows(backend, side):
    pair = list(maps(1, 8, 2, 2))
    pair[side][0, :, 0, 0] = 3e19
    assert measure(build(backend, reduction="none"), *pair)[0][0, 0, 0].isnan()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_and_large_pixels_have_a_direction(backend, dtype):
    """The norm of a float16 pixel may exceed float16, and its square may fall below it."""
    student, teacher = unit(2, 2, 20, 32, seed=1).transpose(2, 3).float()
    sizes = torch.tensor([3e-4, 1e-3, 1e3, 9e4]).repeat(5)
    truth = dense(student, teacher)
    scaled = (student * sizes).to(dtype), (teacher * sizes).to(dtype)
    assert all(x.isfinite().all() for x in scaled)
    value, grad = measure(build(backend, reduction="none"), *scaled)
    assert_close(value, truth, 5e-3 if dtype == torch.float16 else 10 * FLOAT32[backend])
    assert grad.isfinite().all()


@backends
@pytest.mark.parametrize("negatives", ["batch", "image", "image+queue"])
def test_a_tiny_loss_keeps_its_relative_accuracy(backend, negatives):
    """Next to a positive logit of 100, a negative would vanish in float32; without it, it does not."""
    _, teacher = maps(2, 16, 3, 4)
    keys, settings = keys_of(5, 16), {"temperature": 0.01, "reduction": "none"}
    exact = build("reference", negatives, keys.double(), **settings)
    truth, right = measure(exact, teacher.double(), teacher.double())
    value, grad = measure(build(backend, negatives, keys, **settings), teacher, teacher)
    assert (truth > 0).all()
    assert truth.max() < 1e-7
    assert (value >= 0).all()
    limit = 1e-3 if device_of(backend) == "cpu" else 0.1  # "high" means TF32 on a GPU
    assert ((value - truth).abs() <= limit * truth + 1e-37).all()
    assert ((grad - right).norm(dim=1) <= limit * right.norm(dim=1) + 1e-33).all()


@backends
def test_the_softplus_keeps_its_accuracy_at_any_size(backend):
    """Neither cut to the identity where the dtype still sees the difference, nor rounded to zero."""
    dtype, limit = (torch.float32, 3e-5) if backend == "triton" else (torch.float64, 4e-15)
    student = torch.tensor([[1.0, 0.0]], dtype=dtype)
    for margin in (-30.0, -20.0, -9.0, -1.0, 0.5, 15.0, 21.0, 25.0, 30.0, 39.0, 45.0, 800.0):
        key = math.copysign(1.0, margin) * student
        settings = {"temperature": 2 / abs(margin), "negatives": None, "keys": key}
        value, grad = call_with_grad(student, -key, backend, **settings)
        expected = max(margin, 0.0) + math.log1p(math.exp(-abs(margin)))
        assert value.item() == pytest.approx(expected, rel=limit, abs=0)
        assert grad.isfinite().all()


# --- Properties -----------------------------------------------------------------------------------


@any_problem
def test_loss_is_never_negative(backend, problem, data):
    student, teacher, _, loss = make(problem)
    mask = draw_mask(data, student)
    if data.draw(st.booleans()):
        student = teacher * 2
    value, grad = measure(loss(backend), student, teacher, mask)
    assert (value >= 0).all()
    assert grad.isfinite().all()


@any_problem
def test_loss_is_log_of_the_count_when_all_similarities_are_equal(backend, problem, data):
    """Among 1 + K equal candidates the positive has the probability 1 / (1 + K)."""
    student, teacher, keys, loss = make(problem)
    vector = F.normalize(keys[:1])
    teacher = vector.view(1, -1, 1, 1).expand_as(teacher) * 4.0
    mask = draw_mask(data, student)
    value, _ = measure(loss(backend, vector.expand_as(keys)), student, teacher, mask)
    count = torch.zeros(mask.shape)
    if "batch" in problem["negatives"]:
        count += mask.sum() - 1
    if "image" in problem["negatives"]:
        count += mask.flatten(1).sum(dim=1).view(-1, 1, 1) - 1
    if "queue" in problem["negatives"]:
        count += len(keys)
    error = (value - torch.log1p(count).masked_fill(~mask, 0.0)).abs().max()
    largest = max(1.0, 1 / problem["temperature"])  # of the logits, which products round
    assert error <= float32_tolerance(backend) * largest


@backends
@given(
    low=st.floats(-1.0, 0.998),
    gain=st.floats(0.002, 1.0),
    temperature=st.floats(0.1, 2.0),
    seed=st.integers(0, 999),
)
def test_loss_falls_when_the_positive_comes_closer(backend, low, gain, temperature, seed):
    cosines = torch.tensor([low, min(low + gain, 1.0)], dtype=torch.float64)
    student = torch.eye(2, 5).select(0, 0).repeat(2, 1)
    teacher = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    settings = {"keys": keys_of(6, 5, seed=seed), "negatives": None, "temperature": temperature}
    teacher = F.pad(teacher, (0, 3)).float()
    (far, near), _ = call_with_grad(student, teacher, backend, reduction="none", **settings)
    assert near < far


@any_problem
def test_loss_rises_with_more_negatives(backend, problem, data):
    student, teacher, keys, loss = make({**problem, "negatives": "queue"})
    more = torch.cat([keys, keys_of(1, keys.shape[1], seed=problem["seed"] + 9)])
    fewer = measure(loss(backend), student, teacher)[0]
    assert (measure(loss(backend, more), student, teacher)[0] >= fewer - 1e-6 * fewer).all()


@any_problem
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


@any_problem
def test_rotating_everything_changes_nothing(backend, problem, data):
    student, teacher, keys, loss = make(problem)
    generator = torch.Generator().manual_seed(problem["seed"])
    rotation = torch.linalg.qr(torch.randn(2 * (keys.shape[1],), generator=generator))[0]

    def rotate(image):
        return torch.einsum("oc,bchw->bohw", rotation, image)

    value, grad = measure(loss(backend), student, teacher)
    turned = measure(loss(backend, keys @ rotation.T), rotate(student), rotate(teacher))
    assert_same(turned, (value, rotate(grad)), 10 * max(FLOAT32[backend], 5e-6))


@any_problem
def test_length_of_a_pixel_does_not_matter(backend, problem, data):
    """With one channel, nothing but rounding would be left of the gradient."""
    student, teacher, _, loss = make({**problem, "channels": problem["channels"] + 1})
    factors = data.draw(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=2))
    value, grad = measure(loss(backend), student, teacher)
    scaled = measure(loss(backend), student * factors[0], teacher * factors[1])
    ours = scaled[0], scaled[1] * factors[0]
    assert_same(ours, (value, grad), 10 * max(FLOAT32[backend], 5e-6))


# --- What gets a gradient, and what backward keeps ------------------------------------------------


@backends
@pytest.mark.parametrize("normalize", [False, True])
def test_neither_teacher_nor_keys_get_a_gradient(backend, normalize):
    device = device_of(backend)
    student, teacher, keys = (
        unit(5, 6, seed=i).float().to(device).requires_grad_() for i in (1, 2, 3)
    )
    settings = {"queue_keys": keys * 1, "normalize": normalize, "backend": backend}
    pixel_contrast_loss(student, teacher * 1, **settings).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None
    assert keys.grad is None


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_teacher_may_have_another_dtype(backend, dtype):
    """Its unit vectors are not rounded to a dtype that is coarser than the student's."""
    student, teacher = maps(2, 16, 3, 4, dtype=torch.float64)
    student, teacher = student.float(), teacher.to(dtype)
    keys = keys_of(5, 16, dtype=dtype)
    loss = build(backend, "batch+queue", keys, reduction="none")
    value, grad = measure(loss, student, teacher)
    truth = dense_with_grad(student, teacher, negatives="batch+queue", keys=keys)
    assert value.dtype == grad.dtype == torch.float32
    assert_close(value, truth[0], max(5e-6, FLOAT32[backend]))
    assert_close(grad, truth[1], max(5e-6, FLOAT32[backend]))


@backends
@pytest.mark.parametrize("negatives", ["queue", "image+queue"])
def test_enqueueing_between_forward_and_backward_changes_no_gradient(backend, negatives):
    device = device_of(backend)
    student, teacher = maps(2, 6, 2, 3)
    keys = keys_of(9, 6)
    loss = build(backend, negatives, keys)
    _, expected = measure(loss, student, teacher)
    ours = student.to(device, copy=True).requires_grad_()
    value = loss(ours, teacher.to(device))
    loss.queue.enqueue(keys_of(7, 6, seed=8).to(device))
    value.backward()
    assert not torch.equal(loss.queue.keys.cpu(), keys)
    assert torch.equal(ours.grad.cpu(), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("negatives", ["queue", "batch+queue"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_graph_keeps_rows_and_weighted_keys_and_nothing_else(
    backend, negatives, learnable, dtype
):
    """Neither the queue `[64, 6]` nor logits `[12, 64]`; in the dtype of the maps."""
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 6, 2, 3, dtype=dtype))
    loss = build(backend, negatives, keys_of(64, 6), learnable_temperature=learnable)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss(student.requires_grad_(), teacher)
    large = {tuple(x.shape): x.dtype for x in saved if x.numel() > 2}
    assert large.pop((4, 12)) == torch.float32  # what is known of each pixel
    assert large == {(2, 6, 2, 3): dtype, (2, 12, 6): dtype, (12, 6): dtype}


def test_gradients_have_the_strides_of_the_map():
    """So that the layers before see the memory format that they wrote."""
    student, teacher = maps(2, 6, 4, 5)
    for form in ("contiguous_format", "channels_last"):
        for backend in FAST:
            leaf = student.to(device_of(backend)).contiguous(memory_format=getattr(torch, form))
            loss = build(backend)(leaf.requires_grad_(), teacher.to(leaf.device))
            (grad,) = torch.autograd.grad(loss, leaf)
            assert grad.stride() == leaf.stride()


@backends
@pytest.mark.parametrize("negatives", ["batch", "image+queue"])
def test_views_of_larger_maps_equal_contiguous_ones(backend, negatives):
    """Other layouts are in test_every_loss.py. Here no one stride leads from pixel to pixel."""

    def cropped(x):
        axes = x.dim() - 2
        return F.pad(x, (1, 2) * axes)[(..., *[slice(1, -2)] * axes)]

    def batch_last(x):
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    for shape in ((2, 6, 3, 4), (2, 6, 5), (2, 6, 2, 3, 2)):
        student, teacher = maps(*shape)
        mask, keys = some_mask(*spatial(student)), keys_of(5, 6)
        loss = build(backend, negatives, keys, reduction="none")
        expected = measure(loss, student, teacher, mask)
        wide = torch.stack([mask, ~mask], dim=-1).flatten(-2)[..., ::2]
        for form in (cropped, batch_last):
            ours = measure(loss, form(student), form(teacher), wide)
            assert_close(ours[0], expected[0], 1e-6)
            assert_close(ours[1], expected[1], 2e-6)
            mixed = measure(loss, form(student), teacher, wide)
            assert_close(mixed[1], expected[1], 2e-6)
    student, teacher = (x[..., :1] for x in maps(2, 6, 3, 4))  # a column: pixels are rows apart
    loss = build(backend, negatives, keys_of(5, 6), reduction="none")
    expected = measure(loss, student.contiguous(), teacher.contiguous())
    assert_close(measure(loss, student, teacher)[1], expected[1], 2e-6)


# --- Dtypes ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_stays_within_twice_plain_pytorch_at_a_low_temperature(backend, dtype):
    student, teacher = maps(2, 24, 3, 5, seed=4, dtype=dtype)
    keys = keys_of(30, 24, seed=5, dtype=dtype)
    loss = build(backend, "batch+queue", keys, temperature=0.07, reduction="none")
    value, grad = measure(loss, student, teacher)
    truth = dense_with_grad(student, teacher, 0.07, "batch+queue", None, keys)
    student.requires_grad_()
    rows = [F.normalize(rows_of(x)) for x in (student, teacher)]
    logits = rows[0] @ torch.cat([rows[1], keys]).T / 0.07
    plain = F.cross_entropy(logits, torch.arange(30), reduction="none").view(2, 3, 5)
    (plain_grad,) = torch.autograd.grad(weighted(plain), student)
    tiny = FLOAT32[backend] if dtype == torch.float32 else 1e-4
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_budget(value, plain, truth[0], tiny)
    assert_within_budget(grad, plain_grad, truth[1], tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_products_run_in_the_dtype_of_the_map_or_of_autocast(dtype, autocast, monkeypatch):
    """Half maps are not widened: that would double what backward keeps."""
    seen = []
    original = contrast.row_lse_forward

    def spy(query, keys, *arguments, **options):
        seen.extend([query.dtype, keys.dtype])
        return original(query, keys, *arguments, **options)

    monkeypatch.setattr(contrast, "row_lse_forward", spy)
    student, teacher = maps(2, 6, 2, 3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        build("torch")(student, teacher)
    expected = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
    assert seen == [expected, expected]


@backends
def test_the_similarity_of_positives_is_not_rounded(backend):
    """From bfloat16 rows, the loss would be off by 6e-3."""
    student, teacher = maps(2, 16, 3, 4)
    device = device_of(backend)
    exact = F.cosine_similarity(student.double(), teacher.double()).mean()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = build(backend)
        parts = loss(student.to(device), teacher.to(device), return_components=True)
    assert_close(parts.positive_similarity, exact, 1e-6)


def test_more_valid_float16_pixels_than_float16_can_count():
    student = torch.ones(1, 2, 70_000, dtype=torch.float16, requires_grad=True)
    mask = torch.ones(1, 70_000, dtype=torch.bool)
    loss = build("torch", "queue", torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    one = loss(student[..., :1], student[..., :1])
    for reduction, factor in (("mean", 1), ("sum", 70_000)):
        loss.reduction = reduction
        assert_close(loss(student, student, valid_mask=mask), one * factor, 1e-4)


def test_more_pixels_than_a_block_of_the_kernel_that_adds(monkeypatch):
    from pixdistill.ops.contrast import triton_kernels

    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 16)
    student, teacher = maps(2, 6, 3, 7)
    mask, results = some_mask(2, 3, 7), []
    for backend in ("triton", "torch"):
        inputs = (x.to(device_of(backend)) for x in (student, teacher, mask))
        *pair, valid = inputs
        parts = build(backend)(*pair, valid_mask=valid, return_components=True)
        results.append(torch.stack(parts))
    assert_close(*results, FLOAT32["triton"])


# --- Temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@all_negatives
def test_learnable_temperature_has_the_dense_gradient(backend, negatives):
    student, teacher = maps(2, 6, 2, 3, dtype=torch.float64)
    keys, mask = keys_of(5, 6, dtype=torch.float64), some_mask(2, 2, 3)
    loss = build(backend, negatives, keys, temperature=0.3, learnable_temperature=True).double()
    value = loss(student, teacher, valid_mask=mask)
    value.backward()
    logarithm = loss.log_temperature.detach().clone().requires_grad_()
    truth = dense(student, teacher, logarithm.exp(), negatives, mask, keys).sum() / mask.sum()
    truth.backward()
    assert_close(value, truth, 1e-13)
    assert_close(loss.log_temperature.grad, logarithm.grad, 1e-11)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_learnable_temperature_learns_on_every_backend(backend, dtype, frozen):
    """Also where nothing else is trained."""
    device = device_of(backend)
    student, teacher = maps(2, 6, 2, 3, dtype=dtype)
    loss = build(backend, temperature=0.3, learnable_temperature=True)
    loss(student.to(device).requires_grad_(not frozen), teacher.to(device)).backward()
    logarithm = torch.tensor([math.log(0.3)], dtype=torch.float64, requires_grad=True)
    dense(student, teacher, logarithm.exp()).mean().backward()
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5 if device == "cpu" else 3e-2
    assert loss.log_temperature.grad.dtype == torch.float32
    assert_close(loss.log_temperature.grad, logarithm.grad, tolerance)


@backends
@pytest.mark.parametrize("negatives", ["image", "queue", "image+queue"])
def test_learnable_temperature_has_a_finite_gradient_where_nothing_is_compared(backend, negatives):
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 4, 1, 2))
    for mask in ([[[False, False]], [[False, False]]], [[[True, False]], [[False, False]]]):
        loss = build(backend, negatives, keys_of(5, 4), learnable_temperature=True)
        mask = torch.tensor(mask)
        loss(student, teacher, valid_mask=mask.to(student.device)).backward()
        assert loss.log_temperature.grad.isfinite().all()
        assert (loss.log_temperature.grad == 0) == (negatives == "image" or not mask.any())


def test_learnable_temperature_is_a_parameter_that_learns():
    with torch.device("meta"):
        loss = PixelContrastLoss(0.07, learnable_temperature=True)
    loss.to_empty(device="cpu").reset_parameters()
    assert [(name, p.shape) for name, p in loss.named_parameters()] == [("log_temperature", (1,))]
    assert loss.temperature.requires_grad
    assert loss.temperature.item() == pytest.approx(0.07)
    pair = maps(2, 6, 2, 3)
    before = loss(*pair)
    before.backward()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert loss(*pair) < before


@pytest.mark.parametrize("learnable", [False, True])
def test_a_temperature_can_be_set(learnable):
    """A schedule; a learned one goes on from there."""
    student, teacher = maps(2, 6, 2, 3)
    loss = PixelContrastLoss(0.5, learnable_temperature=learnable)
    parameter = loss.log_temperature
    loss.temperature = 0.07
    assert loss.log_temperature is parameter
    assert float(torch.as_tensor(loss.temperature).detach()) == pytest.approx(0.07)
    assert_close(loss(student, teacher), PixelContrastLoss(0.07)(student, teacher), 1e-6)
    loss.reset_parameters()
    for wrong in (0.0, -1, "0.1", torch.nan):
        with pytest.raises((TypeError, ValueError), match="temperature must be a"):
            loss.temperature = wrong
    assert float(torch.as_tensor(loss.temperature).detach()) == pytest.approx(0.07)


def test_fixed_temperature_has_no_parameter():
    loss = PixelContrastLoss(1)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert isinstance(loss.temperature, float)
    loss.reset_parameters()


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
    image_of = torch.arange(student.shape[0]).repeat_interleave(math.prod(student.shape[2:]))
    s, t = (F.normalize(rows_of(x).double(), dim=1) for x in (student, teacher))
    valid = torch.ones(len(s), dtype=torch.bool) if mask is None else mask.flatten()
    correct, similarities = [], []
    for i in valid.nonzero().flatten().tolist():
        rivals = []
        for j in range(len(t)):
            related = "batch" in negatives or ("image" in negatives and image_of[i] == image_of[j])
            if j != i and valid[j] and related:
                rivals.append(s[i] @ t[j])
        if "queue" in negatives:
            rivals += [s[i] @ key.double() for key in keys]
        correct.append(all(rival <= s[i] @ t[i] for rival in rivals))
        similarities.append(s[i] @ t[i])
    return sum(correct) / len(correct), torch.stack(similarities).mean()


@backends
@all_negatives
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_components_equal_dense_truth_and_the_loss_alone(backend, negatives, masked, reduction):
    device = device_of(backend)
    student, teacher = maps(2, 4, 3, 4, seed=6)
    keys, mask = keys_of(3, 4, seed=7), some_mask(2, 3, 4) if masked else None
    accuracy, similarity = dense_components(student, teacher, negatives, mask, keys)
    assert 0.05 < accuracy < 0.95
    loss = build(backend, negatives, keys, reduction=reduction)
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)
    mask = None if mask is None else mask.to(device)
    parts = loss(student, teacher, valid_mask=mask, return_components=True)
    value = loss(student, teacher, valid_mask=mask)
    assert torch.equal(parts.loss, value)
    assert parts.accuracy.shape == parts.positive_similarity.shape == ()
    assert parts.accuracy.dtype == parts.positive_similarity.dtype == value.dtype
    assert parts.accuracy.item() == pytest.approx(accuracy, rel=1e-6)
    assert_close(parts.positive_similarity, similarity, 1e-6)
    assert not parts.accuracy.requires_grad
    assert not parts.positive_similarity.requires_grad
    grads = [torch.autograd.grad(weighted(x), student)[0] for x in (parts.loss, value)]
    assert torch.equal(*grads)


def accuracy_of(loss, student, teacher):
    device = device_of(loss.backend)
    return loss(student.to(device), teacher.to(device), return_components=True).accuracy


@backends
@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_ties_count_for_the_positive(backend, temperature, autocast):
    """Positive and negatives come from different sums, so equal vectors differ by rounding.

    Under autocast both are judged by the rounded operands that the pass multiplies; the loss is not.
    (The queue's vectors have been normalised elsewhere: they may round to other operands.)
    """
    student, _ = maps(2, 32, 4, 4)
    teacher = maps(1, 32, 1, 1, seed=2)[1].expand_as(student)
    student = torch.where(torch.arange(4) % 2 == 0, student, teacher)
    assert (rows_of(student) * rows_of(teacher)).sum(dim=1).min() < 0  # also below zero
    keys, device = F.normalize(rows_of(teacher)[:3]), device_of(backend)
    negatives = "batch+queue" if autocast is None else "batch"
    loss = build(backend, negatives, keys, temperature=temperature)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        accuracy = accuracy_of(loss, student, teacher)
    assert accuracy == 1 or (device == "cuda" and autocast is None)  # TF32 is coarser than the tie


@backends
def test_accuracy_sees_a_rival_that_is_slightly_better(backend):
    student = torch.tensor([[1.0, 0.0, 0.0]] * 2).T.reshape(1, 3, 2)
    near, far = 0.9, 0.9 * (1 - 1e-3)
    teacher = torch.tensor([[c, math.sqrt(1 - c * c), 0.0] for c in (near, far)]).T.reshape(1, 3, 2)
    loss = build(backend, temperature=0.05)
    assert accuracy_of(loss, student, teacher) == 0.5
    assert accuracy_of(loss, student, -teacher) == 0.5


@backends
@pytest.mark.parametrize(
    ("in_batch", "in_queue", "accuracy"), [(0.5, 0.4, 1), (0.5, 0.95, 0), (0.95, 0.5, 0)]
)
def test_a_rival_in_either_source_beats_the_positive(backend, in_batch, in_queue, accuracy):
    positive, rival, key = ([c, math.sqrt(1 - c**2)] for c in (0.9, in_batch, in_queue))
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 2)
    teacher = torch.tensor([positive, rival]).T.reshape(1, 2, 2)
    second = float(in_batch >= max(0.9, in_queue))  # the rival is the second pixel's positive
    loss = build(backend, "batch+queue", torch.tensor([key]))
    assert accuracy_of(loss, student, teacher) == (accuracy + second) / 2


@backends
def test_perfect_student_has_accuracy_and_similarity_one(backend):
    _, teacher = maps(2, 16, 3, 4)
    teacher = teacher.to(device_of(backend))
    parts = build(backend)(teacher, teacher, return_components=True)
    assert parts.accuracy == 1
    assert_close(parts.positive_similarity, torch.tensor(1.0), 1e-6)
    assert accuracy_of(build(backend), -teacher, teacher) < 0.2


# --- How much is done -----------------------------------------------------------------------------

# The most that forward and backward launch with the mean, counted where nothing is split: prepare, a
# pass per set of keys, join, finish, the gradient of the sum, backward. A change that adds one fails.
LAUNCHES = {"batch": 5, "image": 5, "queue": 5, "batch+queue": 7, "image+queue": 7}

# Operators of the PyTorch form: plainly, with components, with a mask, with both.
OPERATORS = {
    "batch": (48, 75, 68, 100),
    "image": (49, 76, 68, 100),
    "queue": (32, 58, 43, 70),
    "batch+queue": (63, 105, 83, 130),
    "image+queue": (64, 106, 83, 130),
}


@needs_torch("2.7", "its operators are others")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the number of splits depends on the GPU")
@all_negatives
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_launches_of_forward_and_backward(backend, negatives, masked, components):
    student, teacher = maps(2, 16, 9, 16, dtype=torch.bfloat16)
    mask = some_mask(2, 9, 16) if masked else None
    loss = build(backend, negatives, keys_of(40, 16, dtype=torch.bfloat16))

    def call():
        result = loss(student, teacher, valid_mask=mask, return_components=components)
        (result.loss if components else result).backward()

    student.requires_grad_()
    call()
    names = launches(call)
    names.remove("add_")  # of the gradient to the one before
    if backend == "torch":
        assert len(names) <= OPERATORS[negatives][2 * masked + components], names
        return
    assert len(names) <= LAUNCHES[negatives], names
    assert names.count("prepare_kernel") == names.count("backward_kernel") == 1
    assert names.count("row_lse_kernel") == 1 + ("+" in negatives)


@all_negatives
def test_components_take_no_further_pass(negatives, monkeypatch):
    passes = []
    original = contrast.row_lse_forward

    def spy(*arguments, **options):
        passes.append(options["with_max"])
        return original(*arguments, **options)

    monkeypatch.setattr(contrast, "row_lse_forward", spy)
    student, teacher = maps(2, 6, 2, 3)
    loss = build("torch", negatives, keys_of(5, 6))
    sources = 1 + ("+" in negatives)
    loss(student.requires_grad_(), teacher).backward()
    loss(student, teacher, return_components=True).loss.backward()
    assert passes == [False] * sources + [True] * sources


# --- The queue as a part of the loss --------------------------------------------------------------


def test_the_queue_is_shared_with_the_caller_and_moves_only_by_enqueue():
    queue = PixelQueue(5, 6)
    loss = PixelContrastLoss(negatives=None, queue=queue, learnable_temperature=True)
    assert set(loss.state_dict()) == {"log_temperature", "queue.keys", "queue.ptr"}
    before = queue.keys.clone()
    student, teacher = maps(2, 6, 2, 3)
    first = loss(student, teacher)
    assert torch.equal(queue.keys, before)
    assert queue.ptr == 0
    queue.enqueue_pooled(teacher)
    assert loss.queue is queue
    assert not torch.equal(loss(student, teacher), first)


# --- Autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("negatives", ["batch", None])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, negatives, normalize, reduction):
    student, teacher = unit(2, 5, 3, seed=1) * 1.5, unit(2, 5, 3, seed=2) * 2
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    settings = {"negatives": negatives, "normalize": normalize, "reduction": reduction}
    settings |= {"queue_keys": unit(4, 3, seed=3), "valid_mask": some_mask(2, 5)}
    assert torch.autograd.gradcheck(
        lambda s, tau: pixel_contrast_loss(
            s, teacher, temperature=tau, backend=backend, **settings
        ),
        (student.requires_grad_(), temperature),
    )


def test_second_order_gradients_raise_or_are_right():
    student, teacher = (unit(5, 3, seed=i) for i in (1, 2))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    student.requires_grad_()
    loss = pixel_contrast_loss(student, teacher, temperature=temperature)
    for grad in torch.autograd.grad(loss, (student, temperature), create_graph=True):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            grad.square().sum().backward()

    def reference(s):
        return pixel_contrast_loss(s, teacher, backend="reference")

    assert torch.autograd.gradgradcheck(reference, (student,))
    with_zero = student.detach().clone()
    with_zero[2] = 0
    (grad,) = torch.autograd.grad(
        reference(with_zero.requires_grad_()), with_zero, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.square().sum(), with_zero)
    assert second.isfinite().all()
    assert (second[2] == 0).all()


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("normalize", [True, False])
def test_keys_may_come_from_inference_mode(backend, normalize):
    with torch.inference_mode():
        teacher, keys, labels = torch.randn(9, 8), torch.randn(5, 8), torch.arange(9)
    student = torch.randn(9, 8, requires_grad=True)
    options = {"labels": labels, "queue_keys": keys, "queue_labels": labels[:5]}
    options |= {"normalize": normalize, "backend": backend}
    pixel_contrast_loss(student, teacher, **options).backward()
    assert student.grad.norm() > 0


@pytest.mark.parametrize("backend", FAST)
def test_a_loss_may_be_scaled_in_place(backend):
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 6, 2, 3))
    loss = build(backend)
    for reduction in ("mean", "none"):
        loss.reduction = reduction
        value = loss(student.requires_grad_(), teacher)
        expected = torch.autograd.grad(2 * weighted(value), student, retain_graph=True)[0]
        value *= 2.0
        assert torch.equal(torch.autograd.grad(weighted(value), student)[0], expected)


# --- Compilation ----------------------------------------------------------------------------------

MAP_SIZES = ((2, 3, 4), (3, 5, 4), (2, 7, 6), (4, 3, 9))


@needs_torch("2.7", "compiles more often")
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("mask", {"negatives": "image", "reduction": "none"}),
        ("components and mask", {"negatives": "batch+queue"}),
        ("autocast and mask", {"negatives": "queue"}),
        ("", {"learnable_temperature": True, "reduction": "sum"}),
        ("schedule", {"negatives": "image+queue"}),
        ("schedule", {"normalize": False}),
        ("triton", {"negatives": "batch+queue"}),
        ("labels, mask and components", {"negatives": "batch+queue"}),
        ("triton, labels", {"negatives": "image+queue"}),
    ],
    ids=str,
)
def test_compiles_once_for_all_map_sizes(case, settings):
    """A temperature that changes at each step compiles no more; ten steps are in other files."""
    backend = "triton" if "triton" in case else "torch"
    device = device_of(backend)
    loss = build(backend, keys=keys_of(9, 6), **settings)
    if "labels" in case:
        queue = PixelQueue(9, 6, labels=True).to(device)
        queue.enqueue(keys_of(9, 6).to(device), labels=torch.arange(9, device=device) % 4)
        loss.queue = queue

    def step(student, teacher, mask, labels):
        with torch.autocast(device, dtype=torch.bfloat16, enabled="autocast" in case):
            parts = "components" in case
            options = {"valid_mask": mask, "labels": labels, "return_components": parts}
            result = loss(student, teacher, **options)
            return result if parts else (result,)

    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for batch, height, width in MAP_SIZES:
            if case == "schedule":
                loss.temperature = 0.2 - 0.01 * len(frames)
            student, teacher = maps(batch, 6, height, width)
            mask = some_mask(batch, height, width).to(device) if "mask" in case else None
            labels = torch.randint(-1, 4, (batch, height, width), device=device)
            labels = labels if "labels" in case else None
            results = []
            for function in (compiled, step):
                leaf = student.to(device, copy=True).requires_grad_()
                parts = function(leaf, teacher.to(device), mask, labels)
                weighted(parts[0]).backward()
                results.append((*parts, leaf.grad))
            for ours, eager in zip(*results, strict=True):
                assert_close(ours, eager, 3e-6)
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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_registered_operators_keep_pytorchs_rules(backend, masked, reduction):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in maps(2, 6, 3, 4))
    keys = keys_of(5, 6).to(device)
    mask = some_mask(2, 3, 4).to(device) if masked else None
    labels, key_labels = (
        torch.arange(n, dtype=torch.int32, device=device) % 3 if masked else None for n in (24, 5)
    )
    scale = torch.tensor(5.0, device=device, requires_grad=True)
    options = (keys, key_labels, mask, None if labels is None else labels.view(2, 3, 4))
    settings = ("image", True, reduction, backend, torch.float32, True, masked)
    arguments = (student.requires_grad_(), teacher, scale, None, *options, *settings)
    torch.library.opcheck(contrast.contrast_op, arguments)
    loss, _, *saved = (x.detach() for x in contrast.contrast_op(*arguments))
    settings = (True, reduction == "mean", backend, True)
    arguments = (loss, student.detach(), *saved, scale.detach(), *settings)
    torch.library.opcheck(contrast.contrast_gradients_op, arguments)


# --- The forms of the operator --------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
def test_weighted_keys_of_many_blocks_are_rounded_once(backend):
    """As those of many ranks: the gradient is as exact as that of one block."""
    device = device_of(backend)
    student, teacher = (x.to(device, torch.bfloat16) for x in maps(1, 6, 8, 8))

    def blocks(keys, mask, labels):
        return ((keys[i : i + 1], mask, -i, labels) for i in range(len(keys)))

    def gradient(student, backend, exchange=None):
        student = student.detach().requires_grad_()
        loss, _ = contrast.contrast(
            student, teacher, 1.0, negatives="batch", queue_keys=None, queue_labels=None,
            valid_mask=None, labels=None, normalize=True, reduction="sum", backend=backend,
            exchange=exchange,
        )  # fmt: skip
        return torch.autograd.grad(loss, student)[0].double().cpu()

    exact = gradient(student.double(), "reference")
    one, many = ((gradient(student, backend, x) - exact).norm() for x in (None, blocks))
    assert many < 1.2 * one


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("with_max", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joined_sets_of_keys_are_one(with_keys, with_max, dtype):
    """In both forms; a row may see no key in one set, or in both."""
    triton_kernels = pytest.importorskip("pixdistill.ops.contrast.triton_kernels")
    logits = torch.randn(37, 9, generator=torch.Generator().manual_seed(0)) * 3
    keys = unit(9, 5, seed=1).float()
    logits[3, :4] = logits[5, 4:] = logits[7] = -torch.inf

    def part_of(logits, keys, device):
        weights = logits.softmax(dim=1).nan_to_num() @ keys
        part = (
            logits.logsumexp(dim=1),
            weights.to(dtype) if with_keys else None,
            logits.amax(dim=1) if with_max else None,
        )
        return tuple(None if x is None else x.to(device).unsqueeze(0) for x in part)

    truth = part_of(logits, keys, "cpu")
    for form, device in ((chunked, "cpu"), (triton_kernels, device_of("triton"))):
        halves = [part_of(logits[:, i], keys[i], device) for i in (slice(0, 4), slice(4, None))]
        ours = form.join(*halves, dtype)
        for one, right in zip(ours, truth, strict=True):
            assert (one is None) == (right is None)
            if one is not None:
                assert one.dtype == right.dtype
                assert_close(one, right, 1e-6 if one.dtype == torch.float32 else 1e-2)


# --- Arguments ------------------------------------------------------------------------------------
# Maps, masks, dtypes and devices that do not fit are in test_every_loss.py.

QUEUE = PixelQueue(4, 6)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "temperature must be a finite number above 0; got 0", {"temperature": 0}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": math.inf}),
        (TypeError, "temperature must be a number; got '0.2'", {"temperature": "0.2"}),
        (ValueError, "negatives must be one of .*got 'queue'", {"negatives": "queue"}),
        (ValueError, "negatives must be one of", {"negatives": ("batch", "queue"), "queue": QUEUE}),
        (ValueError, "queue must be given with negatives=None", {"negatives": None}),
        (TypeError, "queue must be a PixelQueue; got Tensor", {"queue": QUEUE.ptr}),
        (TypeError, "queue must be a PixelQueue; got int", {"negatives": None, "queue": 4}),
        (ValueError, r"gather_mode must be one of \('all', 'ring'\)", {"gather_mode": "star"}),
    ],
)  # fmt: skip
def test_wrong_settings(error, words, settings):
    with pytest.raises(error, match=words):
        PixelContrastLoss(**settings)


def test_wrong_width_of_the_queue():
    loss = PixelContrastLoss(negatives=None, queue=PixelQueue(4, 5))
    with pytest.raises(ValueError, match=r"queue.keys must have shape \[K, 6\].*got \(4, 5\)"):
        loss(*maps(2, 6, 3, 4))


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
        (ValueError, "D at least 1", {"student": ROWS[:, :0], "teacher": ROWS[:, :0]}),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_function_form(error, words, arguments):
    with pytest.raises(error, match=words):
        pixel_contrast_loss(**{"student": ROWS, "teacher": ROWS, **arguments})
