"""`patch_lse` on every backend: values, gradients, properties, edges, the kernel and the operator."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    TRITON_DEVICE,
    LargestTensor,
    assert_close,
    assert_within_budget,
    device_of,
    fresh_compiler,
    launches,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill.ops.patch_lse import (
    DISTANCES,
    NEGATIVES,
    PatchSettings,
    chunked,
    launch,
    patch_lse,
    patch_lse_forward,
    patch_lse_op,
    reference,
    triton_kernels,
    why_not_triton,
)

FAST = ("torch", "triton")
EXACT = ("reference", "torch")  # these take float64
FLOAT32 = 4e-6
each_distance = pytest.mark.parametrize("distance", DISTANCES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast = pytest.mark.parametrize("backend", FAST)


def maps(*shape, seed=0, dtype=torch.float32):
    """A student and a teacher map that resemble each other, with one pair of equal vectors."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    teacher = teacher + 0.5 * student
    teacher[0, :, 0, 0] = student[0, :, 0, 0]
    return student.to(dtype), teacher.to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def options(groups, patch, temperature=0.3, **more):
    return {"num_groups": groups, "patch_size": patch, "temperature": temperature, **more}


def loops(student, teacher, *, num_groups, patch_size, temperature, **how):
    """The truth by loops over rows in float64: the candidates are picked, nothing is masked."""
    batch, channels, height, width = student.shape
    s = student.double().reshape(batch, num_groups, channels // num_groups, height, width)
    t, valid = teacher.double().reshape(s.shape), how.get("valid_mask")
    order = {"l1": 1, "l2": 2}[how.get("distance", "l1")]
    rows = []
    for b, m, y, x in itertools.product(*map(range, (batch, num_groups, height, width))):
        own, candidates = s[b, m, :, y, x], []
        top, left = y - y % patch_size[0], x - x % patch_size[1]
        patch = range(top, top + patch_size[0]), range(left, left + patch_size[1])
        for k, v, u in itertools.product(range(num_groups), *patch):
            same = k == m if how.get("negatives") != "all_others" else (k, v, u) == (m, y, x)
            if not same and (valid is None or (valid[b, y, x] and valid[b, v, u])):
                candidates.append(t[b, k, :, v, u])
        if not candidates:
            rows.append(own.sum() * 0 - torch.inf)
            continue
        vectors = torch.stack([t[b, m, :, y, x], *candidates])
        logits = -torch.linalg.vector_norm(own - vectors, order, dim=1) / temperature
        rows.append(logits[1:].logsumexp(0) - logits[0])
    return torch.stack(rows).view(batch, num_groups, height, width)


def cross_entropy(margin):
    """The loss of all rows, under weights that differ from row to row."""
    weights = torch.linspace(1.0, 2.0, margin.numel(), dtype=margin.dtype, device=margin.device)
    return (F.softplus(margin, threshold=40).flatten() * weights).sum()


def differentiate(function, student, *arguments, **how):
    student = student.detach().requires_grad_()
    margin = function(student, *arguments, **how)
    (grad,) = torch.autograd.grad(cross_entropy(margin), student)
    return margin.detach().cpu(), grad.cpu()


def call(backend, student, teacher, **how):
    """Margin and the student's gradient of one backend, on its own device."""
    device = device_of(backend)
    if how.get("valid_mask") is not None:
        how["valid_mask"] = how["valid_mask"].to(device)
    return differentiate(patch_lse, student.to(device), teacher.to(device), backend=backend, **how)


def assert_same(ours, others, tolerance=FLOAT32):
    """Margins and gradients, absolute where everything vanishes."""
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        a, b = (x.double().masked_fill(x == -torch.inf, 0.0) for x in (a, b))
        assert (a - b).norm() <= tolerance * (b.norm() + 1)


# --- Values and gradients -------------------------------------------------------------------------

CASES = [  # shape, groups, patch
    ((2, 4, 4, 3), 2, (2, 3)),
    ((1, 10, 3, 4), 2, (3, 2)),
    ((2, 5, 4, 2), 1, (4, 2)),
    ((1, 6, 3, 2), 6, (1, 1)),
    ((1, 3, 1, 1), 1, (1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@each_distance
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_explicit_loops(case, distance, negatives, masked):
    shape, groups, patch = case
    student, teacher = maps(*shape)
    mask = some_mask(shape[0], *shape[2:]) if masked else None
    how = options(groups, patch, distance=distance, negatives=negatives, valid_mask=mask)
    truth = differentiate(loops, student.double(), teacher, **how)
    for backend in BACKENDS:
        margin, grad = call(backend, student, teacher, **how)
        assert margin.dtype == grad.dtype == torch.float32
        assert_same((margin, grad), truth)
    for backend in EXACT:
        margin, grad = call(backend, student.double(), teacher.double(), **how)
        assert margin.dtype == grad.dtype == torch.float64
        assert_same((margin, grad), truth, 1e-13)


@each_fast
@each_distance
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_sums_softplus_of_the_margin(backend, distance, masked):
    """What Af-DCD asks for, with losses from e^-60 to 60, and its gradient."""
    student, _ = maps(2, 8, 4, 4)
    teacher = (student * 4).roll(1, dims=0)
    teacher[1] = student[1] = student[1] * 4
    student, teacher = (x.to(device_of(backend)) for x in (student, teacher))
    mask = some_mask(2, 4, 4).to(student.device) if masked else None
    how = PatchSettings(2, (2, 4), 0.3, distance, "all_others")
    settings = {"backend": backend, "cross_entropy": True}
    sums, grad = patch_lse_forward(student, teacher, mask, how, with_grad=True, **settings)
    exact = student.double().requires_grad_()
    losses = F.softplus(reference.patch_lse(exact, teacher, mask, how), threshold=40)
    assert_close(sums.sum(), losses.sum(), 1e-6)
    assert_close(grad, torch.autograd.grad(losses.sum(), exact)[0], 1e-5)
    bare, nothing = patch_lse_forward(student, teacher, mask, how, with_grad=False, **settings)
    assert torch.equal(bare, sums)
    assert nothing is None
    small = (x[1:] for x in (student, teacher))
    mask = None if mask is None else mask[1:]
    sums, _ = patch_lse_forward(*small, mask, how, with_grad=False, **settings)
    assert 0 < losses[1].sum() < 1e-3
    assert_close(sums.sum(), losses[1].sum(), 1e-4)


ALWAYS, NEVER = 0, 2**62  # how many pairs there must be to one near pair


@pytest.mark.parametrize("few", [ALWAYS, chunked._FEW, NEVER])
@pytest.mark.parametrize("pairs", [3, 100, 10**6])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_and_near_pairs_join_exactly(few, pairs, masked, monkeypatch):
    """Some rows of a patch, some patches of a row, some rows of patches, some images at a time.

    With vectors that coincide with their positive or with a negative.
    """
    for shape, groups, patch in (((3, 4, 9, 8), 2, (3, 2)), *CASES[1:]):
        student, teacher = maps(*shape, dtype=torch.float64)
        teacher[-1, :, -1, -1] = student[-1, :, 0, 0]
        mask = some_mask(shape[0], *shape[2:]) if masked else None
        for i, (distance, negatives) in enumerate(itertools.product(DISTANCES, NEGATIVES)):
            tau = (0.05, 2.0, 2.0, 0.05)[i]
            how = options(groups, patch, tau, distance=distance, negatives=negatives)
            how["valid_mask"] = mask
            truth = call("reference", student, teacher, **how)
            monkeypatch.setattr(chunked, "_FEW", few)
            monkeypatch.setattr(chunked, "_CPU_BLOCK", pairs)
            assert_same(call("torch", student, teacher, **how), truth, 1e-13)
            assert_same(call("torch", student.float(), teacher.float(), **how), truth)
            monkeypatch.undo()


@pytest.mark.parametrize(("temperature", "form"), [(1e-2, "_near_sums"), (10.0, "_all_sums")])
def test_the_form_follows_how_many_pairs_are_near(temperature, form, monkeypatch):
    student, teacher = maps(2, 64, 4, 4)
    how = options(8, (4, 4), temperature)
    expected = call("torch", student.double(), teacher.double(), **how)
    original, called = getattr(chunked, form), []
    monkeypatch.setattr(chunked, form, lambda *a: called.append(1) or original(*a))
    assert_same(call("torch", student, teacher, **how), expected)
    assert called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beyond", [0.5, 0.999, 1.001])
def test_what_is_not_near_is_lost_in_rounding(dtype, beyond, monkeypatch):
    """The worst case: one negative at distance 1, and all others where nearness ends."""
    monkeypatch.setattr(chunked, "_FEW", ALWAYS)
    groups, temperature = 512, 0.25
    reach = math.log(8 * groups / torch.finfo(dtype).eps)
    teacher = torch.full((1, groups, 1, 1), 1 + beyond * reach * temperature, dtype=dtype)
    teacher[0, :2] = torch.tensor([0.5, 1.0]).view(2, 1, 1)
    how = options(groups, (1, 1), temperature, backend="torch")
    margin = patch_lse(torch.zeros_like(teacher), teacher, **how)[0, 0]
    others = (groups - 2) * math.exp((1 - float(teacher[0, -1])) / temperature)
    expected = (0.5 - 1.0) / temperature + math.log1p(others)
    eps = torch.finfo(dtype).eps
    if beyond == 0.5:  # what counts is added one after the other
        eps *= groups
    else:
        assert others < eps / 4
    assert abs(margin.item() - expected) <= eps * abs(expected)


@each_backend
@pytest.mark.parametrize("patch", [(2, 2), (4, 4)], ids=str)
def test_both_rules_count_their_negatives(backend, patch):
    """Where all vectors are equal, the margin is the logarithm of the number of negatives."""
    equal = torch.ones(1, 3, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 1] = False
    for negatives, mask in itertools.product(NEGATIVES, (None, valid)):
        how = options(3, patch, 0.1, negatives=negatives, valid_mask=mask)
        margin, grad = call(backend, equal, equal, **how)
        for y, x in itertools.product(range(4), range(4)):
            top, left = y - y % patch[0], x - x % patch[1]
            seen = torch.ones_like(valid) if mask is None else valid
            pixels = seen[0, top : top + patch[0], left : left + patch[1]].sum()
            count = 2 * pixels if negatives == "other_groups" else 3 * pixels - 1
            count = count if seen[0, y, x] else torch.tensor(0)
            assert_close(margin[0, :, y, x], count.log().expand(3), 1e-6)
        assert (grad.abs() <= 1e-5).all()  # gradients at zero distance are zero


@each_fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_distance
def test_error_stays_within_twice_plain_pytorch(backend, dtype, distance):
    """Against the float64 truth of the same inputs; plain is the formula in that dtype."""
    student, teacher = maps(1, 16, 4, 4, dtype=dtype)
    how = options(2, (2, 2), 0.5, distance=distance, negatives="all_others")
    truth = differentiate(loops, student.double(), teacher, **how)

    def plain(s, t, temperature, **_):
        cut = [x.view(2, 8, 2, 2, 2, 2).permute(2, 4, 0, 3, 5, 1).reshape(4, 8, 8) for x in (s, t)]
        diff = cut[0].unsqueeze(2) - cut[1].unsqueeze(1)
        logits = -diff.norm(1 if distance == "l1" else 2, dim=3) / temperature
        positive = logits.diagonal(dim1=1, dim2=2)
        margin = logits.masked_fill(torch.eye(8).bool(), -torch.inf).logsumexp(2) - positive
        return margin.view(2, 2, 2, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 2, 4, 4)

    others = differentiate(plain, student, teacher, **how)
    margin, grad = call(backend, student, teacher, **how)
    assert margin.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_budget(margin, others[0], truth[0], 1e-6)
    assert_within_budget(grad, others[1], truth[1], 1e-6)


@each_backend
@each_distance
def test_extreme_distances(backend, distance):
    """Losses of e^-60, vectors that coincide, and logits of -1e6."""
    student, teacher = maps(1, 8, 2, 2)
    how = options(2, (2, 2), 0.12, distance=distance, negatives="all_others")
    near, far = (student * 4, student * 4), (student * 3000, teacher * 3000)
    truth = differentiate(loops, near[0].double(), near[1], **how)
    margin, grad = call(backend, *near, **how)
    assert truth[0].max() < -20
    assert ((margin - truth[0]).abs() < 1e-4).all()  # no difference of equal numbers
    assert_close(F.softplus(margin), F.softplus(truth[0]), 1e-4)
    truth = differentiate(loops, far[0].double(), far[1], **how)
    assert_same(call(backend, *far, **how), truth, 1e-5)
    how["temperature"] = 0.01
    for same in (student, torch.zeros_like(student), teacher):
        _, grad = call(backend, same, same, **how)
        bound = 1.0 if distance == "l2" else 2.0  # of a distance's gradient, of four elements
        lengths = grad.view(2, 4, 2, 2).norm(dim=1)
        assert (lengths <= 2 * 2 * bound / 0.01).all()  # two of them, weights up to 2


@each_backend
def test_strided_inputs_equal_contiguous_ones(backend):
    student, teacher = maps(2, 4, 3, 2)
    mask, device = some_mask(2, 3, 2), device_of(backend)
    expected = call(backend, student, teacher, valid_mask=mask, **options(2, (3, 2)))
    forms = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: torch.stack([x, x + 1], dim=4).flatten(3)[..., ::2],
        "padded": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    }
    wide_mask = forms["sliced"](mask.unsqueeze(1).float().to(device)).squeeze(1).bool()
    for name, form in forms.items():
        strided = [form(x.to(device)) for x in (student, teacher)]
        assert strided[0].stride() != student.stride(), name
        ours = call(backend, *strided, valid_mask=wide_mask, **options(2, (3, 2)))
        assert_same(ours, expected, 1e-6)
    shared = teacher[:1].expand(2, -1, -1, -1)
    ours = call(backend, student, shared, **options(2, (3, 2)))
    assert_same(ours, call(backend, student, shared.contiguous(), **options(2, (3, 2))), 1e-6)


@each_fast
def test_offsets_beyond_32_bits(backend):
    """Views that reach beyond 2^31 elements along each axis; untouched pages cost no memory."""
    big = torch.empty(600 * 2**22, dtype=torch.bfloat16, device=device_of(backend))
    for strides, shape, patch in (
        ((2**30, 16, 4, 1), (3, 4, 2, 2), (2, 2)),  # images
        ((1, 2**29 + 2**26, 4, 64), (1, 5, 2, 2), (2, 2)),  # channels: a vector lies beyond
        ((1, 4, 2**30, 64), (1, 4, 3, 2), (1, 2)),  # rows, patch by patch
        ((1, 4, 64, 2**30), (1, 4, 2, 3), (2, 1)),  # columns
        ((1, 4, 2**30, 64), (1, 4, 3, 2), (3, 1)),  # rows inside a patch
        ((1, 4, 64, 2**30), (1, 4, 2, 3), (1, 3)),  # columns
    ):
        how = options(1 if shape[1] == 5 else 2, patch, 0.5, negatives="all_others")
        near = [x.to(big.device) for x in maps(*shape, dtype=torch.bfloat16)]
        far = big.as_strided(shape, strides)
        expected = patch_lse(*near, backend=backend, **how)
        far.copy_(near[0])
        assert torch.equal(patch_lse(far, near[1], backend=backend, **how), expected)
        far.copy_(near[1])
        assert torch.equal(patch_lse(near[0], far, backend=backend, **how), expected)


@each_fast
@pytest.mark.parametrize("patch", [(3, 1), (1, 3)], ids=str)
def test_mask_offsets_beyond_32_bits(backend, patch):
    """The mask lies in the middle, so that an offset of 32 bits reads False and not wild memory."""
    device = device_of(backend)
    big = torch.empty(2**32 + 2**10, dtype=torch.bool, device=device)
    big[: 2**10] = False
    strides = (1, 2**30, 64) if patch[0] > 1 else (1, 64, 2**30)
    far = big[2**31 :].as_strided((1, 3, 3), strides)
    near = torch.ones(1, 3, 3, dtype=torch.bool, device=device)
    near[0, 1, 1] = False
    far.copy_(near)
    pair, how = (x.to(device) for x in maps(1, 4, 3, 3)), options(2, patch, backend=backend)
    student, teacher = pair
    expected = patch_lse(student, teacher, valid_mask=near, **how)
    assert torch.equal(patch_lse(student, teacher, valid_mask=far, **how), expected)


def test_offsets_have_sixty_four_bits(tmp_path):
    """Also those of outputs, which no test could fill beyond 2^31."""
    narrow = run("tests/offsets.py", "patch_lse", env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert narrow == ""


# --- Edges ----------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_nothing_to_contrast_is_minus_infinity_without_gradient(backend, negatives):
    """By the mask, or because the positive is all there is; even if the loss asks for a gradient."""
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 4, 2, 4))
    nothing = torch.zeros(2, 2, 4, dtype=torch.bool, device=student.device)
    for sizes in (options(2, (2, 2), valid_mask=nothing), options(1, (1, 1))):
        student = student.detach().requires_grad_()
        margin = patch_lse(student, teacher, negatives=negatives, backend=backend, **sizes)
        assert torch.equal(margin, torch.full_like(margin, -torch.inf))
        (grad,) = torch.autograd.grad(margin, student, torch.ones_like(margin))
        assert torch.equal(grad, torch.zeros_like(grad))
    margin, grad = call(backend, student[:0], teacher[:0], **options(2, (2, 2)))
    assert (margin.shape, grad.shape) == ((0, 2, 2, 4), (0, 4, 2, 4))


@each_fast
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_hidden_pixels_may_hold_anything(backend, poison, negatives):
    student, teacher = maps(2, 4, 4, 2)
    mask = some_mask(2, 4, 2)
    how = options(2, (2, 2), negatives=negatives, valid_mask=mask)
    clean = call(backend, student, teacher, **how)
    dirty = (x.masked_fill(~mask.unsqueeze(1), poison) for x in (student, teacher))
    ours = call(backend, *dirty, **how)
    assert torch.equal(ours[0], clean[0])
    assert torch.equal(ours[1], clean[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@each_backend
@pytest.mark.parametrize("side", [0, 1])
def test_nan_shows_where_it_is_seen(backend, side):
    pair = maps(1, 4, 2, 4)
    pair[side][0, 1, 0, 1] = torch.nan
    for valid in (None, torch.ones(1, 2, 4, dtype=torch.bool)):
        margin, _ = call(backend, *pair, valid_mask=valid, **options(2, (2, 2)))
        seen = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
        seen[0, 0, 0, 1] = True  # its own row, by the positive
        if side == 1:  # the teacher's: and as a negative of the other group in its patch
            seen[0, 1, :, :2] = True
        assert torch.equal(margin.isnan(), seen)


@each_fast
def test_every_output_is_written(backend, monkeypatch):
    """Fresh memory is filled with NaN."""
    original = torch.empty

    def poisoned(*args, **how):
        fresh = original(*args, **how)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
    pair = [x.to(device_of(backend)) for x in maps(2, 10, 4, 6)]
    settings = PatchSettings(2, (2, 3), 0.3, "l1", "other_groups")
    masks = (None, some_mask(2, 4, 6).to(pair[0].device))
    for valid, summed in itertools.product(masks, (False, True)):
        parts = patch_lse_forward(
            *pair, valid, settings, backend=backend, with_grad=True, cross_entropy=summed
        )
        assert not any(part.isnan().any() for part in parts)


def test_memory_is_a_block_whatever_the_patches():
    """8 patches of 1024 vectors: the plain form holds 8 million pairs, and 16 times the differences."""
    pair, settings = maps(2, 64, 32, 64), PatchSettings(4, (16, 16), 0.3, "l1", "other_groups")
    with LargestTensor() as largest:
        chunked.patch_lse(*pair, None, settings, with_grad=True, cross_entropy=False)
    assert largest.size <= max(chunked._CPU_BLOCK, pair[0].numel())
    with LargestTensor() as largest:
        reference.patch_lse(*(x[:, :, :16, :16] for x in pair), None, settings)
    assert largest.size >= 2 * 1024**2 * 16  # the measurement sees what it should


@pytest.mark.parametrize(("groups", "patch"), [(1, 4), (16, 4), (16, 1)])
def test_memory_is_a_block_whatever_the_map(groups, patch, monkeypatch):
    """Of a map eight times a block: a vector per pixel has few pairs, but as many elements as others."""
    original, held, pair = chunked._contrast, [], maps(2, 64, 32, 32)
    spy = lambda s, *a: held.append(s.numel()) or original(s, *a)  # noqa: E731
    monkeypatch.setattr(chunked, "_CPU_BLOCK", 2**14)
    monkeypatch.setattr(chunked, "_contrast", spy)
    patch_lse(*pair, backend="torch", **options(groups, patch))
    assert sum(held) == pair[0].numel()
    assert max(held) <= chunked._CPU_BLOCK


# --- Properties -----------------------------------------------------------------------------------

problems = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "width": st.integers(1, 5),
        "patches": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "patch_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "temperature": st.floats(0.05, 3.0),
        "distance": st.sampled_from(DISTANCES),
        "negatives": st.sampled_from(NEGATIVES),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "seed": st.integers(0, 2**16),
    }
)


def make(problem, dtype=None, patches=None):
    size = [
        n * p for n, p in zip(patches or problem["patches"], problem["patch_size"], strict=True)
    ]
    shape = (problem["batch"], problem["groups"] * problem["width"], *size)
    names = ("patch_size", "temperature", "distance", "negatives")
    dtype = problem["dtype"] if dtype is None else dtype
    how = {"num_groups": problem["groups"], **{name: problem[name] for name in names}}
    return *maps(*shape, seed=problem["seed"], dtype=dtype), how


@given(problem=problems, factor=st.floats(0.25, 4.0))
def test_moving_or_scaling_both_maps_changes_nothing(problem, factor):
    student, teacher, how = make(problem, torch.float64)
    expected = call("torch", student, teacher, **how)
    shift = torch.linspace(-2, 3, problem["width"], dtype=torch.float64).repeat(problem["groups"])
    shift = shift.view(1, -1, 1, 1)
    moved = call("torch", student + shift, teacher + shift, **how)
    assert_same(moved[:1], expected[:1], 1e-9)
    how["temperature"] *= factor
    scaled = call("torch", student * factor, teacher * factor, **how)
    assert_same((scaled[0], scaled[1] * factor), expected, 1e-9)


@given(problem=problems, data=st.data())
def test_order_of_images_pixels_of_a_patch_and_channels_of_a_group(problem, data):
    student, teacher, how = make(problem, torch.float64, patches=(1, 1))
    margin, _ = call("torch", student, teacher, **how)

    def permutation(length):
        return torch.tensor(data.draw(st.permutations(range(length))))

    images, pixels = permutation(problem["batch"]), permutation(student[0, 0].numel())
    groups, inside = permutation(problem["groups"]), permutation(problem["width"])

    def move(x, channels):
        return x[images][:, channels].flatten(2)[..., pixels].view(x.shape)

    channels = (groups.unsqueeze(1) * problem["width"] + inside).flatten()
    moved, _ = call("torch", move(student, channels), move(teacher, channels), **how)
    assert_same((moved,), (move(margin, groups),), 1e-12)


# --- The kernel with launches that the rule alone would not choose ---------------------------------


@pytest.mark.parametrize("rows", [4, 16])
@each_distance
def test_kernel_splits_the_rows_of_a_patch(rows, distance):
    student, teacher = maps(2, 9, 4, 2)
    mask = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
    mask = mask.repeat(2, 1, 1)
    for summed in (False, True):
        arguments = (mask, PatchSettings(3, (2, 2), 0.3, distance, "all_others"))
        how = {"with_grad": True, "cross_entropy": summed}
        truth = chunked.patch_lse(student, teacher, *arguments, **how)
        ours = triton_kernels.patch_lse(
            *(x.to(TRITON_DEVICE) for x in (student, teacher, mask)),
            arguments[1],
            **how,
            launch=launch.Launch(4, rows, 1, 255),
        )
        out = ours[0].sum() if summed else ours[0]
        assert_same((out.cpu(), ours[1].cpu()), truth)


@pytest.mark.parametrize("width", [1, 2, 5, 33])
def test_every_width_is_padded_to_a_tile(width):
    pair, how = maps(1, 2 * width, 2, 2), options(2, (2, 2), negatives="all_others")
    assert_same(call("triton", *pair, **how), call("torch", *pair, **how))


def test_launch_rule():
    for width in (1, 3, 32, 64, 65, 512, 513, 2048):
        for vectors, aligned in itertools.product((1, 7, 256, 4096), (False, True)):
            chosen = launch.launch_of(width, vectors, aligned, False)
            tile = 1024 if aligned else 512
            assert width <= chosen.BD < 2 * width or chosen.BD == 1
            assert 1 <= chosen.BN <= 32
            assert tile * chosen.warps >= chosen.BD * chosen.BN
        assert chosen.registers < launch.launch_of(width, vectors, False, True).registers
    assert launch.launch_of(32, 256, True, False).BN == 32


def zeros(*shape):
    return torch.zeros(shape, device=TRITON_DEVICE)


@pytest.mark.parametrize(
    ("aligned", "layout", "patch"),
    [
        (True, lambda: zeros(2, 128, 16, 32), (4, 4)),
        (True, lambda: zeros(2, 128, 32, 64)[:, :, :16, 16:48], (2, 8)),
        (True, lambda: zeros(1, 128, 16, 32).expand(2, -1, -1, -1), (4, 4)),
        (False, lambda: zeros(2, 128, 16, 48), (4, 3)),
        (False, lambda: zeros(2, 128, 16, 12), (4, 4)),
        (False, lambda: zeros(2, 128, 12, 32), (4, 4)),
        (False, lambda: zeros(2, 128, 16, 40)[..., :32], (4, 4)),
        (False, lambda: zeros(2, 128, 16, 64)[..., ::2], (4, 4)),
        (False, lambda: zeros(2, 128, 16, 48)[..., 1:33], (4, 4)),
        (False, lambda: zeros(2, 128, 16, 32).to(memory_format=torch.channels_last), (4, 4)),
    ],
)
def test_kernel_and_tile_follow_the_layout_of_both_maps(aligned, layout, patch, monkeypatch):
    """The kernel that takes rows for whole runs of 16 elements gets none but such maps."""
    taken = []

    class Spy:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **how: taken.append((self.name, how["BN"]))

    for name in ("aligned_kernel", "strided_kernel"):
        monkeypatch.setattr(triton_kernels, name, Spy(name))
    plain = torch.zeros_like(layout(), memory_format=torch.contiguous_format)
    settings = PatchSettings(4, patch, 0.3, "l1", "other_groups")
    for pair in ((plain, layout()), (layout(), plain)):
        triton_kernels.patch_lse(*pair, None, settings, with_grad=False, cross_entropy=False)
    assert taken == 2 * [("aligned_kernel", 32) if aligned else ("strided_kernel", 16)]


# --- The operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@each_distance
def test_gradcheck(backend, distance):
    student, teacher = maps(1, 4, 4, 2, seed=5, dtype=torch.float64)
    student = (student + 0.1).requires_grad_()  # off the kinks
    mask = torch.ones(1, 4, 2, dtype=torch.bool)
    mask[0, 1, 0] = False
    how = options(2, (2, 2), 0.7, distance=distance, valid_mask=mask, backend=backend)

    def function(s):
        return F.softplus(patch_lse(s, teacher, **how))

    assert torch.autograd.gradcheck(function, (student,))
    if backend == "reference" and distance == "l2":
        assert torch.autograd.gradgradcheck(function, (student,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@each_fast
def test_what_autograd_may_ask(backend, monkeypatch):
    """The same bits twice, none for the teacher, none that nobody wants, one derivative."""
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in maps(2, 6, 2, 4))
    module, asked = chunked if backend == "torch" else triton_kernels, []
    original, how = module.patch_lse, options(3, (2, 2), backend=backend)

    def spy(*arguments, **more):
        result = original(*arguments, **more)
        asked.append((more["with_grad"], result[1] is not None))
        return result

    monkeypatch.setattr(module, "patch_lse", spy)
    one, two = (patch_lse(student, teacher, **how) for _ in range(2))
    bits = [torch.autograd.grad(m.sum(), student, retain_graph=True)[0] for m in (one, two)]
    assert torch.equal(one, two)
    assert torch.equal(*bits)
    one.sum().backward()
    assert teacher.grad is None
    with torch.no_grad():
        patch_lse(student, teacher, **how)
    assert_close(patch_lse(student.detach(), teacher.detach(), **how), one, 1e-6)
    assert asked == [(True, True)] * 2 + [(False, False)] * 2
    patch_lse(student, teacher, **how | {"backend": "reference"}).sum().backward()
    assert teacher.grad is None
    for loss in (cross_entropy(two), two.sum()):  # the second has a constant gradient
        (grad,) = torch.autograd.grad(loss, student, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="patch_lse has a second-order gradient in"):
            grad.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"patch_lse .* torch\.func"):
        torch.func.jvp(
            lambda s: patch_lse(s, teacher.detach(), **how),
            (student.detach(),),
            (teacher.detach(),),
        )


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    student, teacher = maps(2, 4, 4, 4)
    mask = some_mask(2, 4, 4) if masked else None
    settings = (2, [2, 2], 0.3, "l1", "other_groups", "torch")
    torch.library.opcheck(patch_lse_op, (student.requires_grad_(), teacher, mask, *settings, True))
    torch.library.opcheck(patch_lse_op, (student.detach(), teacher, mask, *settings, False))


def test_compiles_once_for_all_sizes():
    def function(s, t, mask):
        how = {"num_groups": 2, "patch_size": 2, "temperature": 0.3}
        return F.softplus(patch_lse(s, t, valid_mask=mask, **how)).sum()

    def result(f, student, *rest):
        loss = f(student, *rest)
        return loss.detach(), *torch.autograd.grad(loss, student)

    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for size in (6, 8, 10):  # not the number of channels: equal sizes are specialised
            student, teacher = maps(2, 4, size, size + 4)
            inputs = (student.requires_grad_(), teacher, some_mask(2, size, size + 4))
            for one, other in zip(
                result(compiled, *inputs), result(function, *inputs), strict=True
            ):
                assert_close(one, other, 1e-6)
        assert counter.frame_count == 1


def test_autocast_changes_nothing():
    pair = maps(1, 4, 2, 2)
    expected = call("torch", *pair, **options(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = call("torch", *pair, **options(2, 2))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_launches_one_kernel_forward_and_two_operators_back():
    student, teacher = (x.to(TRITON_DEVICE) for x in maps(1, 4, 2, 2, dtype=torch.bfloat16))
    student.requires_grad_()
    weights = torch.ones(1, 2, 2, 2, device=TRITON_DEVICE)

    def both():
        margin = patch_lse(student, teacher, backend="triton", **options(2, 2))
        torch.autograd.grad(margin, student, weights)

    assert launches(both) == ["_patch_lse", "mul", "_to_copy"]


def test_auto_takes_the_chunked_form_on_a_cpu(monkeypatch):
    student, teacher = maps(1, 4, 2, 2)
    called, original = [], chunked.patch_lse
    monkeypatch.setattr(chunked, "patch_lse", lambda *a, **o: called.append(1) or original(*a, **o))
    patch_lse(student, teacher, **options(2, 2))
    assert called
    assert "float64" in why_not_triton(student.double(), 2)
    assert "2048" in why_not_triton(torch.empty(1, 2049, 1, 1), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in why_not_triton(student, 2)
    with pytest.raises(ValueError, match="cannot run here"):
        patch_lse(student, teacher, backend="triton", **options(2, 2))
    monkeypatch.setattr("pixdistill.ops.backend.has_triton", lambda: False)
    assert "not installed" in why_not_triton(student, 2)


MAP = torch.zeros(1, 4, 2, 2)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "student must be a tensor", {"student": 1.0}),
        (TypeError, "teacher must be float16.*got torch.int32", {"teacher": MAP.int()}),
        (ValueError, r"student must have shape \[B, C, H, W\]", {"student": MAP[0]}),
        (ValueError, "of one shape.*Project the student", {"teacher": MAP[:, :2]}),
        (ValueError, "teacher must be on", {"teacher": MAP.to("meta")}),
        (TypeError, "num_groups must be an int", {"num_groups": 2.0}),
        (ValueError, "num_groups must be at least 1", {"num_groups": 0}),
        (ValueError, "num_groups must divide the student's 4 channels; got 3", {"num_groups": 3}),
        (TypeError, "patch_size must be an int or a pair", {"patch_size": (2, 2, 2)}),
        (TypeError, "patch_size must be an int or a pair", {"patch_size": (2, True)}),
        (ValueError, "patch_size must be at least 1", {"patch_size": (2, 0)}),
        (ValueError, r"patch_size must divide.*\(2, 3\)", {"patch_size": (2, 3)}),
        (ValueError, r"patch_size must divide.*\(3, 2\)", {"patch_size": (3, 2)}),
        (TypeError, "temperature must be a number", {"temperature": "0.1"}),
        (ValueError, "temperature must be a finite", {"temperature": 0.0}),
        (ValueError, "distance must be one of", {"distance": "l3"}),
        (ValueError, "negatives must be one of", {"negatives": "some"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (TypeError, "valid_mask must be a bool", {"valid_mask": MAP[:, 0]}),
        (ValueError, "valid_mask must have one element per pixel", {"valid_mask": MAP[0, 0] == 0}),
    ],
)
def test_bad_arguments_are_named(error, words, changes):
    arguments = {"student": MAP, "teacher": MAP, **options(2, (2, 2)), **changes}
    with pytest.raises(error, match=words):
        patch_lse(arguments.pop("student"), arguments.pop("teacher"), **arguments)
