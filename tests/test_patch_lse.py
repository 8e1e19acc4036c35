"""`patch_lse` on every backend: values, gradients, properties, edges and the operator."""

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
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pixdistill.ops.patch_lse import (
    DISTANCES,
    NEGATIVES,
    chunked,
    launch,
    patch_lse,
    patch_lse_op,
    reference,
    triton_kernels,
    why_not_triton,
)

FAST = ("torch", "triton")
EXACT = ("reference", "torch")  # these take float64
FLOAT32 = 4e-6


def maps(*shape, seed=0, dtype=torch.float32):
    """A student and a teacher map that resemble each other, with one pair of equal vectors."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    teacher = teacher + 0.5 * student
    teacher[0, :, 0, 0] = student[0, :, 0, 0]
    return student.to(dtype), teacher.to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def loops(student, teacher, *, groups, patch, temperature, distance, negatives, valid_mask=None):
    """The truth by loops over rows in float64: the candidates are picked, nothing is masked."""
    batch, channels, height, width = student.shape
    s = student.double().reshape(batch, groups, channels // groups, height, width)
    t = teacher.double().reshape(s.shape)
    rows = []
    for b, m, y, x in itertools.product(*map(range, (batch, groups, height, width))):
        own, candidates = s[b, m, :, y, x], []
        if valid_mask is None or valid_mask[b, y, x]:
            top, left = y - y % patch[0], x - x % patch[1]
            places = itertools.product(
                range(groups),
                range(top, min(top + patch[0], height)),
                range(left, min(left + patch[1], width)),
            )
            for k, v, u in places:
                alike = k == m if negatives == "other_groups" else (k, v, u) == (m, y, x)
                if not alike and (valid_mask is None or valid_mask[b, v, u]):
                    candidates.append(t[b, k, :, v, u])
        if not candidates:
            rows.append(own.sum() * 0 - torch.inf)
            continue
        order = {"l1": 1, "l2": 2}[distance]
        vectors = torch.stack([t[b, m, :, y, x], *candidates])
        logits = -torch.linalg.vector_norm(own - vectors, order, dim=1) / temperature
        rows.append(logits[1:].logsumexp(0) - logits[0])
    return torch.stack(rows).view(batch, groups, height, width) if rows else s.sum(dim=2)


def cross_entropy(margin):
    """The loss of all rows, under weights that differ from row to row."""
    weights = torch.linspace(1.0, 2.0, margin.numel(), dtype=margin.dtype, device=margin.device)
    return (F.softplus(margin, threshold=40).flatten() * weights).sum()


def differentiate(function, student, *arguments, **options):
    student = student.detach().clone().requires_grad_()
    margin = function(student, *arguments, **options)
    (grad,) = torch.autograd.grad(cross_entropy(margin), student)
    return margin.detach().cpu(), grad.cpu()


def call(backend, student, teacher, **options):
    """Margin and the student's gradient of one backend, on its own device."""
    device = device_of(backend)
    if options.get("valid_mask") is not None:
        options["valid_mask"] = options["valid_mask"].to(device)
    return differentiate(
        patch_lse, student.to(device), teacher.to(device), backend=backend, **options
    )


def assert_same(ours, others, tolerance=FLOAT32):
    """Margins and gradients, absolute where everything vanishes."""
    for a, b in zip(ours, others, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        a, b = (x.double().masked_fill(x == -torch.inf, 0.0) for x in (a, b))
        assert (a - b).norm() <= tolerance * (b.norm() + 1)


# --- Values and gradients -------------------------------------------------------------------------

CASES = [  # shape, groups, patch: divided by the patch or not, wider or narrower than it
    ((2, 4, 2, 3), 2, (2, 3)),
    ((1, 4, 5, 3), 2, (2, 2)),
    ((1, 10, 4, 3), 2, (3, 2)),
    ((2, 5, 2, 3), 1, (4, 2)),
    ((1, 6, 3, 2), 6, (1, 1)),
    ((1, 3, 1, 1), 1, (1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_explicit_loops(case, distance, negatives, masked):
    shape, groups, patch = case
    student, teacher = maps(*shape)
    options = {"groups": groups, "patch": patch, "distance": distance, "negatives": negatives}
    options |= {
        "temperature": 0.3,
        "valid_mask": some_mask(shape[0], *shape[2:]) if masked else None,
    }
    truth = differentiate(loops, student.double(), teacher, **options)
    for backend in BACKENDS:
        margin, grad = call(backend, student, teacher, **options)
        assert margin.dtype == grad.dtype == torch.float32
        assert_same((margin, grad), truth)
    for backend in EXACT:
        margin, grad = call(backend, student.double(), teacher.double(), **options)
        truth = differentiate(loops, student.double(), teacher.double(), **options)
        assert margin.dtype == grad.dtype == torch.float64
        assert_same((margin, grad), truth, 1e-13)


@pytest.mark.parametrize("pairs", [1, 40, 100, 700, 2000])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_join_exactly(pairs, negatives, masked, monkeypatch):
    """Some rows of a patch, some patches of a row, some rows of patches, some images at a time."""
    student, teacher = maps(3, 4, 7, 8, dtype=torch.float64)
    options = {"groups": 2, "patch": (3, 2), "temperature": 0.3, "negatives": negatives}
    options |= {"valid_mask": some_mask(3, 7, 8) if masked else None}
    for distance in DISTANCES:
        whole = call("reference", student, teacher, distance=distance, **options)
        monkeypatch.setattr(chunked, "_CPU_BLOCK", pairs)
        assert_same(call("torch", student, teacher, distance=distance, **options), whole, 1e-13)
        monkeypatch.undo()


ALWAYS, NEVER = 0, 2**62  # how many pairs there must be to one near pair


@pytest.mark.parametrize("few", [ALWAYS, NEVER], ids=["near", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("masked", [False, True])
def test_near_pairs_and_all_pairs_give_the_same(few, case, distance, masked, monkeypatch):
    """In any block, with vectors that coincide with their positive or with a negative."""
    shape, groups, patch = case
    student, teacher = maps(*shape, dtype=torch.float64)
    teacher[-1, :, -1, -1] = student[-1, :, 0, 0]
    mask = some_mask(shape[0], *shape[2:]) if masked else None
    for negatives, temperature, pairs in itertools.product(NEGATIVES, (0.05, 2.0), (20, 10**6)):
        options = {"groups": groups, "patch": patch, "distance": distance, "valid_mask": mask}
        options |= {"negatives": negatives, "temperature": temperature}
        truth = differentiate(loops, student, teacher, **options)
        monkeypatch.setattr(chunked, "_FEW", few)
        monkeypatch.setattr(chunked, "_CPU_BLOCK", pairs)
        assert_same(call("torch", student, teacher, **options), truth, 1e-13)
        assert_same(call("torch", student.float(), teacher.float(), **options), truth)
        monkeypatch.undo()


@pytest.mark.parametrize(("temperature", "form"), [(1e-2, "_near_sums"), (10.0, "_all_sums")])
def test_the_form_follows_how_many_pairs_are_near(temperature, form, monkeypatch):
    student, teacher = maps(2, 64, 4, 4)
    options = {"groups": 8, "patch": (4, 4), "temperature": temperature}
    expected = call("torch", student.double(), teacher.double(), **options)
    original, called = getattr(chunked, form), []
    monkeypatch.setattr(chunked, form, lambda *a: called.append(1) or original(*a))
    assert_same(call("torch", student, teacher, **options), expected)
    assert called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beyond", [0.999, 1.001])
def test_what_is_not_near_is_lost_in_rounding(dtype, beyond, monkeypatch):
    """The worst case: one negative at distance 1, and all others where nearness ends."""
    monkeypatch.setattr(chunked, "_FEW", ALWAYS)
    groups, temperature = 512, 0.25
    reach = math.log(8 * groups / torch.finfo(dtype).eps)
    teacher = torch.full((1, groups, 1, 1), 1 + beyond * reach * temperature, dtype=dtype)
    teacher[0, :2] = torch.tensor([0.5, 1.0]).view(2, 1, 1)
    student = torch.zeros_like(teacher)
    options = {"groups": groups, "patch": (1, 1), "temperature": temperature}
    margin = patch_lse(student, teacher, backend="torch", **options)[0, 0]
    others = (groups - 2) * math.exp(-beyond * reach)
    expected = (0.5 - 1.0) / temperature + math.log1p(others)
    assert abs(margin.item() - expected) <= torch.finfo(dtype).eps * abs(expected)
    assert others < torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [(2, 2), (4, 3)], ids=str)
def test_both_rules_count_their_negatives(backend, patch):
    """Where all vectors are equal, the margin is the logarithm of the number of negatives."""
    equal = torch.ones(1, 3, 4, 3)
    valid = torch.ones(1, 4, 3, dtype=torch.bool)
    valid[0, 1, 1] = False
    for negatives, mask in itertools.product(NEGATIVES, (None, valid)):
        options = {"groups": 3, "patch": patch, "temperature": 0.1, "negatives": negatives}
        margin, grad = call(backend, equal, equal, valid_mask=mask, **options)
        for y, x in itertools.product(range(4), range(3)):
            top, left = y - y % patch[0], x - x % patch[1]
            seen = (valid if mask is not None else torch.ones_like(valid))[
                0, top : top + patch[0], left : left + patch[1]
            ]
            count = 2 * seen.sum() if negatives == "other_groups" else 3 * seen.sum() - 1
            if mask is not None and not valid[0, y, x]:
                count = torch.tensor(0)
            assert_close(margin[0, :, y, x], count.log().expand(3), 1e-6)
        assert torch.equal(grad, torch.zeros_like(grad))  # slopes at zero distance are zero


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_error_stays_within_twice_plain_pytorch(backend, dtype, distance):
    """Against the float64 truth of the same inputs; plain is the formula in that dtype."""
    student, teacher = maps(1, 16, 4, 4, dtype=dtype)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.5, "distance": distance}
    options |= {"negatives": "all_others"}
    truth = differentiate(loops, student.double(), teacher, **options)

    def plain(s, t, groups, patch, temperature, **_):
        cut = [x.view(2, 8, 2, 2, 2, 2).permute(2, 4, 0, 3, 5, 1).reshape(4, 8, 8) for x in (s, t)]
        difference = cut[0].unsqueeze(2) - cut[1].unsqueeze(1)
        logits = -difference.norm(1 if distance == "l1" else 2, dim=3) / temperature
        positive = logits.diagonal(dim1=1, dim2=2)
        margin = logits.masked_fill(torch.eye(8).bool(), -torch.inf).logsumexp(2) - positive
        return margin.view(2, 2, 2, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 2, 4, 4)

    others = differentiate(plain, student, teacher, **options)
    margin, grad = call(backend, student, teacher, **options)
    assert margin.dtype == torch.float32
    assert grad.dtype == dtype
    assert_within_budget(margin, others[0], truth[0], 1e-6)
    assert_within_budget(grad, others[1], truth[1], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_small_losses_keep_their_relative_accuracy(backend, distance):
    """Where student and teacher agree, the loss is e^-60 and not a difference of equal numbers."""
    student, _ = maps(1, 8, 2, 2)
    student = student * 4
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.12, "distance": distance}
    truth = differentiate(loops, student.double(), student, negatives="all_others", **options)
    margin, grad = call(backend, student, student, negatives="all_others", **options)
    assert truth[0].max() < -20
    assert ((margin - truth[0]).abs() < 1e-4).all()
    assert grad.isfinite().all()
    assert_close(F.softplus(margin), F.softplus(truth[0]), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_distances_have_finite_gradients(backend, distance):
    student, teacher = maps(1, 4, 2, 2)
    for other in (student, torch.zeros_like(student), teacher):
        _, grad = call(
            backend,
            other,
            other,
            groups=2,
            patch=(2, 2),
            temperature=0.01,
            distance=distance,
            negatives="all_others",
        )
        bound = 1.0 if distance == "l2" else 2**0.5  # of a slope; the vectors have two numbers
        lengths = grad.view(2, 2, 2, 2).norm(dim=1)
        assert (lengths <= 2 * 2 * bound / 0.01).all()  # two slopes, weights up to 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_vectors_neither_overflow_nor_vanish(backend):
    """Logits of -1e6, and a row whose negatives differ by far more than the exponential's range."""
    student, teacher = maps(1, 4, 2, 2)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.01, "negatives": "all_others"}
    far = student * 3000, teacher * 3000
    truth = differentiate(loops, far[0].double(), far[1], distance="l1", **options)
    ours = call(backend, *far, **options)
    assert_same(ours, truth, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_equal_contiguous_ones(backend):
    student, teacher = maps(2, 4, 3, 2)
    options = {"groups": 2, "patch": (3, 2), "temperature": 0.3}
    mask = some_mask(2, 3, 2)
    expected = call(backend, student, teacher, valid_mask=mask, **options)
    forms = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: torch.stack([x, x + 1], dim=4).flatten(3)[..., ::2],
        "padded": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    }
    wide_mask = torch.stack([mask, ~mask], dim=3).flatten(2)[..., ::2]
    for name, form in forms.items():
        strided = form(student).detach().requires_grad_()
        assert strided.stride() != student.stride(), name
        ours = patch_lse(
            strided.to(device_of(backend)),
            form(teacher).to(device_of(backend)),
            valid_mask=wide_mask.to(device_of(backend)),
            backend=backend,
            **options,
        )
        (grad,) = torch.autograd.grad(cross_entropy(ours), strided)
        assert_same((ours.detach().cpu(), grad), expected, 1e-6)
    shared = teacher[:1].expand(2, -1, -1, -1)
    ours = call(backend, student, shared, **options)
    assert_same(ours, call(backend, student, shared.contiguous(), **options), 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_32_bits(backend):
    """Views that reach beyond 2^31 elements along each axis; untouched pages cost no memory."""
    big = torch.empty(600 * 2**22, dtype=torch.bfloat16, device=device_of(backend))
    options = {"temperature": 0.5, "negatives": "all_others", "backend": backend}
    for strides, patch in (
        ((2**30, 16, 4, 1), (2, 2)),  # images
        ((1, 2**29 + 2**26, 4, 64), (2, 2)),  # channels
        ((1, 4, 2**30, 64), (2, 2)),  # rows, patch by patch
        ((1, 4, 64, 2**30), (2, 2)),  # columns
        ((1, 4, 2**30, 64), (3, 1)),  # rows inside a patch
        ((1, 4, 64, 2**30), (1, 3)),  # columns
    ):
        options["patch"] = patch
        options["groups"] = 1 if strides[1] > 2**29 else 2  # a vector, or a group, lies beyond
        channels = 5 if strides[1] > 2**29 else 4
        images = 1 if strides[0] == 1 else 3
        student, teacher = maps(images, channels, 3, 3, dtype=torch.bfloat16)
        near = [x.to(big.device) for x in (student, teacher)]
        far = big.as_strided(student.shape, strides)
        expected = patch_lse(*near, **options)
        far.copy_(near[0])
        assert torch.equal(patch_lse(far, near[1], **options), expected)
        far.copy_(near[1])
        assert torch.equal(patch_lse(near[0], far, **options), expected)


@pytest.mark.parametrize("backend", FAST)
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
    student, teacher = (x.to(device) for x in maps(1, 4, 3, 3))
    options = {"groups": 2, "patch": patch, "temperature": 0.5, "backend": backend}
    expected = patch_lse(student, teacher, valid_mask=near, **options)
    assert torch.equal(patch_lse(student, teacher, valid_mask=far, **options), expected)


def test_offsets_have_sixty_four_bits(tmp_path):
    """Also those of outputs, which no test could fill beyond 2^31."""
    narrow = run("tests/offsets.py", "patch_lse", env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert narrow == ""


# --- Edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_nothing_to_contrast_is_minus_infinity_without_gradient(backend, negatives):
    student, teacher = maps(2, 4, 2, 3)
    options = {"patch": (2, 2), "temperature": 0.3, "negatives": negatives}
    nothing = torch.zeros(2, 2, 3, dtype=torch.bool)
    margin, grad = call(backend, student, teacher, groups=2, valid_mask=nothing, **options)
    assert torch.equal(margin, torch.full((2, 2, 2, 3), -torch.inf))
    assert torch.equal(grad, torch.zeros_like(student))
    options = {"patch": (1, 1), "temperature": 0.3, "negatives": negatives}
    margin, grad = call(backend, student, teacher, groups=1, **options)
    assert torch.equal(margin, torch.full((2, 1, 2, 3), -torch.inf))
    assert torch.equal(grad, torch.zeros_like(student))
    for shape in ((0, 4, 2, 3), (2, 4, 0, 3), (2, 4, 2, 0)):
        empty = torch.empty(shape)
        margin, grad = call(backend, empty, empty, groups=2, **options)
        assert margin.shape == (shape[0], 2, *shape[2:])
        assert grad.shape == shape


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("alone", [False, True])
def test_rows_without_negatives_have_no_gradient_even_if_the_loss_asks(backend, alone):
    """By the mask, or because the positive is all there is."""
    device = device_of(backend)
    student, teacher = (x.to(device) for x in maps(1, 4, 2, 3))
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
    options = {"groups": 1, "patch": (1, 1)} if alone else {"groups": 2, "patch": (2, 2)}
    options |= {
        "temperature": 0.3,
        "backend": backend,
        "valid_mask": ~nothing if alone else nothing,
    }
    student.requires_grad_()
    margin = patch_lse(student, teacher, negatives="all_others", **options)
    (grad,) = torch.autograd.grad(margin, student, torch.ones_like(margin))
    assert torch.equal(grad, torch.zeros_like(student))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_hidden_pixels_may_hold_anything(backend, poison, negatives):
    student, teacher = maps(2, 4, 3, 3)
    mask = some_mask(2, 3, 3)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3, "negatives": negatives}
    options |= {"valid_mask": mask}
    clean = call(backend, student, teacher, **options)
    dirty = (x.masked_fill(~mask.unsqueeze(1), poison) for x in (student, teacher))
    ours = call(backend, *dirty, **options)
    assert torch.equal(ours[0], clean[0])
    assert torch.equal(ours[1], clean[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_shows_where_it_is_seen(backend, side):
    student, teacher = maps(1, 4, 2, 4)
    (student if side == "student" else teacher)[0, 1, 0, 1] = torch.nan
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    for valid in (None, mask):
        options = {"groups": 2, "patch": (2, 2), "temperature": 0.3, "valid_mask": valid}
        margin, _ = call(backend, student, teacher, **options)
        seen = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
        seen[0, 0, 0, 1] = True  # its own row, by the positive
        if side == "teacher":
            seen[0, 1, :, :2] = True  # and as a negative of the other group in its patch
        assert torch.equal(margin.isnan(), seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_gets_no_gradient(backend):
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in maps(1, 4, 2, 2))
    patch_lse(
        student, teacher, groups=2, patch=(2, 2), temperature=0.3, backend=backend
    ).sum().backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_twice(backend):
    student, teacher = maps(2, 6, 2, 3)
    options = {"groups": 3, "patch": (2, 2), "temperature": 0.3}
    one, two = (call(backend, student, teacher, **options) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(backend, distance):
    student, teacher = maps(1, 4, 3, 2, seed=5, dtype=torch.float64)
    student = (student + 0.1).requires_grad_()  # off the kinks
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    mask[0, 1, 0] = False

    def function(s):
        margin = patch_lse(
            s,
            teacher,
            groups=2,
            patch=(2, 2),
            temperature=0.7,
            distance=distance,
            valid_mask=mask,
            backend=backend,
        )
        return F.softplus(margin)

    assert torch.autograd.gradcheck(function, (student,))
    if backend == "reference" and distance == "l2":
        assert torch.autograd.gradgradcheck(function, (student,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", FAST)
def test_second_order_and_forward_mode_raise(backend):
    student, teacher = (x.to(device_of(backend)) for x in maps(1, 4, 2, 2))
    student.requires_grad_()
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3, "backend": backend}
    loss = cross_entropy(patch_lse(student, teacher, **options))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="patch_lse has a second-order gradient in"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="patch_lse has no forward-mode"):
        torch.func.jvp(lambda s: patch_lse(s, teacher, **options), (student.detach(),), (teacher,))


@pytest.mark.parametrize("backend", FAST)
def test_no_gradient_is_made_that_nobody_wants(backend, monkeypatch):
    module = chunked if backend == "torch" else triton_kernels
    asked = []
    original = module.patch_lse

    def spy(*arguments, **options):
        asked.append(options["with_grad"])
        result = original(*arguments, **options)
        assert (result[1] is None) == (not options["with_grad"])
        return result

    monkeypatch.setattr(module, "patch_lse", spy)
    student, teacher = (x.to(device_of(backend)) for x in maps(1, 4, 2, 2))
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3, "backend": backend}
    bare = patch_lse(student, teacher, **options)
    student.requires_grad_()
    full = patch_lse(student, teacher, **options)
    with torch.no_grad():
        patch_lse(student, teacher, **options)
    assert asked == [False, True, False]
    assert_close(bare, full, 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_every_output_is_written(backend, monkeypatch):
    """Fresh memory is filled with NaN."""
    original = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        fresh = original(self, *args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    student, teacher = maps(2, 10, 5, 3)
    module = chunked if backend == "torch" else triton_kernels
    student, teacher, mask = (
        x.to(device_of(backend)) for x in (student, teacher, some_mask(2, 5, 3))
    )
    for valid in (None, mask):
        for part in module.patch_lse(
            student, teacher, valid, 2, (2, 2), 0.3, "l1", "other_groups", with_grad=True
        ):
            assert not part.isnan().any()


def test_memory_is_a_block_whatever_the_patches():
    """8 patches of 1024 vectors: the plain form holds 8 million pairs, and 16 times the differences."""
    student, teacher = maps(2, 64, 32, 64)
    arguments = (student, teacher, None, 4, (16, 16), 0.3, "l1", "other_groups")
    with LargestTensor() as largest:
        chunked.patch_lse(*arguments, with_grad=True)
    assert largest.size <= max(chunked._CPU_BLOCK, student.numel())
    with LargestTensor() as largest:
        reference.patch_lse(student[:, :, :16, :16], teacher[:, :, :16, :16], *arguments[2:])
    assert largest.size >= 2 * 1024**2 * 16  # the measurement sees what it should


@pytest.mark.parametrize(("groups", "patch"), [(1, 4), (16, 4), (16, 1)])
def test_memory_is_a_block_whatever_the_map(groups, patch, monkeypatch):
    """Of a map eight times a block: one vector a pixel has few pairs, but as many numbers as others."""
    monkeypatch.setattr(chunked, "_CPU_BLOCK", 2**14)
    student, teacher = maps(2, 64, 32, 32)
    options = {"groups": groups, "patch": (patch, patch), "temperature": 0.3, "backend": "torch"}
    original, held = chunked._contrast, []
    monkeypatch.setattr(
        chunked, "_contrast", lambda s, *a: held.append(s.numel()) or original(s, *a)
    )
    patch_lse(student, teacher, **options)
    assert sum(held) == student.numel()
    assert max(held) <= chunked._CPU_BLOCK


# --- Properties -----------------------------------------------------------------------------------

problems = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "width": st.integers(1, 5),
        "size": st.tuples(st.integers(1, 4), st.integers(1, 3)),
        "patch": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "temperature": st.floats(0.05, 3.0),
        "distance": st.sampled_from(DISTANCES),
        "negatives": st.sampled_from(NEGATIVES),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "seed": st.integers(0, 2**16),
    }
)


def make(problem, dtype=None):
    shape = (problem["batch"], problem["groups"] * problem["width"], *problem["size"])
    names = ("groups", "patch", "temperature", "distance", "negatives")
    dtype = problem["dtype"] if dtype is None else dtype
    return *maps(*shape, seed=problem["seed"], dtype=dtype), {n: problem[n] for n in names}


@settings(max_examples=8)
@given(problem=problems, data=st.data())
def test_any_problem_equals_loops(problem, data):
    student, teacher, options = make(problem)
    pixels = (problem["batch"], *problem["size"])
    entries = st.lists(st.booleans(), min_size=pixels[0] * pixels[1] * pixels[2], max_size=32)
    mask = data.draw(st.none() | entries)
    if mask is not None:
        count = pixels[0] * pixels[1] * pixels[2]
        options["valid_mask"] = torch.tensor(mask[:count]).view(pixels)
    truth = differentiate(loops, student.double(), teacher, **options)
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[problem["dtype"]]
    for backend in BACKENDS:
        margin, grad = call(backend, student, teacher, **options)
        assert_same((margin,), truth[:1], 2e-5)  # sums are float32 whatever the inputs are
        assert_same((grad,), truth[1:], rounding)


@given(problem=problems, data=st.data())
def test_moving_or_scaling_both_maps_changes_nothing(problem, data):
    student, teacher, options = make(problem, torch.float64)
    expected = call("torch", student, teacher, **options)
    width = problem["width"]
    shift = torch.linspace(-2, 3, width, dtype=torch.float64).repeat(problem["groups"])
    shift = shift.view(1, -1, 1, 1)
    moved = call("torch", student + shift, teacher + shift, **options)
    assert_same(moved[:1], expected[:1], 1e-9)
    factor = data.draw(st.floats(0.25, 4.0))
    options["temperature"] *= factor
    scaled = call("torch", student * factor, teacher * factor, **options)
    assert_same((scaled[0], scaled[1] * factor), expected, 1e-9)


@given(problem=problems, data=st.data())
def test_order_of_images_pixels_of_a_patch_and_channels_of_a_group(problem, data):
    student, teacher, options = make(problem, torch.float64)
    options["patch"] = problem["size"]  # one patch
    margin, _ = call("torch", student, teacher, **options)
    images = torch.tensor(data.draw(st.permutations(range(problem["batch"]))))
    pixels = torch.tensor(data.draw(st.permutations(range(student[0, 0].numel()))))
    groups = torch.tensor(data.draw(st.permutations(range(problem["groups"]))))
    inside = torch.tensor(data.draw(st.permutations(range(problem["width"]))))

    def move(x, channels):
        return x[images][:, channels].flatten(2)[..., pixels].view(x.shape)

    channels = (groups.unsqueeze(1) * problem["width"] + inside).flatten()
    moved, _ = call("torch", move(student, channels), move(teacher, channels), **options)
    assert_same((moved,), (move(margin, groups),), 1e-12)


@given(problem=problems)
def test_one_group_contrasts_pixels_and_patch_one_contrasts_groups(problem):
    """The three designs are one primitive: its corners equal loops over pixels, and over groups."""
    student, teacher, options = make(problem, torch.float64)
    height, width = problem["size"]
    options |= {"groups": 1, "patch": (height, width), "negatives": "all_others"}
    margin, _ = call("torch", student, teacher, **options)
    order = 1 if problem["distance"] == "l1" else 2
    s, t = (x.flatten(2).mT for x in (student, teacher))  # [B, pixels, C]
    logits = -(s.unsqueeze(2) - t.unsqueeze(1)).norm(order, dim=3) / problem["temperature"]
    own = logits.diagonal(dim1=1, dim2=2)
    others = logits.masked_fill(torch.eye(height * width).bool(), -torch.inf)
    if height * width > 1:
        assert_close(margin.flatten(1), others.logsumexp(2) - own, 1e-9)
    options |= {"groups": problem["groups"], "patch": (1, 1)}
    one = call("torch", student, teacher, **options)
    options["negatives"] = "other_groups"
    assert_same(call("torch", student, teacher, **options), one, 0.0)


# --- The kernel with launches that the rule alone would not choose ---------------------------------


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_kernel_splits_the_rows_of_a_patch(rows, distance):
    # two images: what lies below the first one's lowest patch counts, there
    student, teacher = (x.to(TRITON_DEVICE) for x in maps(2, 9, 3, 2))
    mask = torch.tensor([[True, True], [False, True], [True, True]]).repeat(2, 1, 1)
    arguments = (mask, 3, (2, 2), 0.3, distance, "all_others")
    truth = chunked.patch_lse(student.cpu(), teacher.cpu(), *arguments, with_grad=True)
    arguments = (mask.to(TRITON_DEVICE), *arguments[1:])
    ours = triton_kernels.patch_lse(
        student, teacher, *arguments, with_grad=True, launch=launch.Launch(4, rows, 1, 255)
    )
    assert_same([x.cpu() for x in ours], truth)


@pytest.mark.parametrize("width", [1, 2, 5, 33])
def test_every_width_is_padded_to_a_tile(width):
    student, teacher = maps(1, 2 * width, 2, 2)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3, "negatives": "all_others"}
    assert_same(
        call("triton", student, teacher, **options), call("torch", student, teacher, **options)
    )


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


@pytest.mark.parametrize(
    ("aligned", "layout", "patch"),
    [
        (True, lambda: torch.zeros(2, 128, 16, 32), (4, 4)),
        (True, lambda: torch.zeros(2, 128, 32, 64)[:, :, :16, 16:48], (2, 8)),
        (True, lambda: torch.zeros(1, 128, 16, 32).expand(2, -1, -1, -1), (4, 4)),
        (False, lambda: torch.zeros(2, 128, 16, 32), (4, 3)),
        (False, lambda: torch.zeros(2, 128, 16, 12), (4, 4)),
        (False, lambda: torch.zeros(2, 128, 15, 32), (4, 4)),
        (False, lambda: torch.zeros(2, 128, 16, 40)[..., :32], (4, 4)),
        (False, lambda: torch.zeros(2, 128, 16, 64)[..., ::2], (4, 4)),
        (False, lambda: torch.zeros(2, 128, 16, 48)[..., 1:33], (4, 4)),
        (False, lambda: torch.zeros(2, 128, 16, 32).to(memory_format=torch.channels_last), (4, 4)),
    ],
)
def test_kernel_and_tile_follow_the_layout_of_both_maps(aligned, layout, patch, monkeypatch):
    """The kernel that takes rows for whole runs of 16 numbers gets none but such maps."""
    taken = []

    class Spy:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **options: taken.append((self.name, options["BN"]))

    for name in ("aligned_kernel", "strided_kernel"):
        monkeypatch.setattr(triton_kernels, name, Spy(name))
    plain, other = torch.zeros_like(layout(), memory_format=torch.contiguous_format), layout()
    plain, other = plain.to(TRITON_DEVICE), other.to(TRITON_DEVICE)
    for pair in ((plain, other), (other, plain)):
        arguments = (None, 4, patch, 0.3, "l1", "other_groups")
        triton_kernels.patch_lse(*pair, *arguments, with_grad=False)
    assert taken == 2 * [("aligned_kernel", 32) if aligned else ("strided_kernel", 16)]


# --- The operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(with_grad, masked):
    student, teacher = maps(2, 4, 3, 4)
    mask = some_mask(2, 3, 4) if masked else None
    tests = ["test_schema", "test_faketensor"]
    if with_grad:
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    settings = (2, 2, 2, 0.3, "l1", "other_groups", "torch", with_grad)
    torch.library.opcheck(
        patch_lse_op, (student.requires_grad_(), teacher, mask, *settings), test_utils=tuple(tests)
    )


def test_compiles_once_for_all_sizes():
    with fresh_compiler():
        counter = CompileCounterWithBackend("aot_eager")

        def function(student, teacher, mask):
            options = {"groups": 2, "patch": (2, 2), "temperature": 0.3}
            return F.softplus(patch_lse(student, teacher, valid_mask=mask, **options)).sum()

        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for size in (5, 6, 9):  # not the number of channels: equal sizes are specialised
            student, teacher = maps(2, 4, size, size + 2)
            student.requires_grad_()
            mask = some_mask(2, size, size + 2)
            results = []
            for f in (function, compiled):
                loss = f(student, teacher, mask)
                results.append((loss.detach(), *torch.autograd.grad(loss, student)))
            for eager, ours in zip(*results, strict=True):
                assert_close(ours, eager, 1e-6)
        assert counter.frame_count == 1


def test_autocast_changes_nothing():
    student, teacher = maps(1, 4, 2, 2)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3}
    expected = call("torch", student, teacher, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = call("torch", student, teacher, **options)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_auto_takes_the_blocked_form_on_a_cpu(monkeypatch):
    student, teacher = maps(1, 4, 2, 2)
    options = {"groups": 2, "patch": (2, 2), "temperature": 0.3}
    called = []
    original = chunked.patch_lse
    monkeypatch.setattr(chunked, "patch_lse", lambda *a, **o: called.append(1) or original(*a, **o))
    patch_lse(student, teacher, **options)
    assert called
    assert "float64" in why_not_triton(student.double(), 2)
    assert "2048" in why_not_triton(torch.empty(1, 2049, 1, 1), 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in why_not_triton(student, 2)
    with pytest.raises(ValueError, match="cannot run here"):
        patch_lse(student, teacher, backend="triton", **options)
    monkeypatch.setattr("pixdistill.ops.availability.has_triton", lambda: False)
    assert "not installed" in why_not_triton(student, 2)


MAP = torch.zeros(1, 4, 2, 2)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "student must be a tensor", {"student": 1.0}),
        (TypeError, "teacher must have a floating", {"teacher": MAP.int()}),
        (ValueError, "student must have shape", {"student": MAP[0], "teacher": MAP[0]}),
        (ValueError, "equal to teacher's.*Resize one map", {"teacher": MAP[:, :2]}),
        (ValueError, "teacher must be on", {"teacher": MAP.to("meta")}),
        (TypeError, "groups must", {"groups": 2.0}),
        (ValueError, "groups must be at least 1", {"groups": 0}),
        (ValueError, "groups must divide the 4 channels; got 3", {"groups": 3}),
        (TypeError, "patch must be a pair", {"patch": 2}),
        (TypeError, "patch must be made of int", {"patch": (2, True)}),
        (ValueError, "patch must be at least 1", {"patch": (2, 0)}),
        (TypeError, "temperature must be a number", {"temperature": "0.1"}),
        (ValueError, "temperature must be a finite", {"temperature": 0.0}),
        (ValueError, "distance must be one of", {"distance": "l3"}),
        (ValueError, "negatives must be one of", {"negatives": "some"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (TypeError, "valid_mask must be a bool", {"valid_mask": MAP[:, 0]}),
        (ValueError, "valid_mask must have shape", {"valid_mask": MAP[0, 0] == 0}),
    ],
)
def test_bad_arguments_are_named(error, words, changes):
    arguments = {"student": MAP, "teacher": MAP, "groups": 2, "patch": (2, 2), "temperature": 0.1}
    arguments |= changes
    with pytest.raises(error, match=words):
        patch_lse(arguments.pop("student"), arguments.pop("teacher"), **arguments)
