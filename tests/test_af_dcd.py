"""AfDCDLoss and `af_dcd_loss`: official outputs, loops, the identities of the designs, kernels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    TRITON_DEVICE,
    LargestTensor,
    assert_close,
    device_of,
    golden,
    launches,
    run,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from pixdistill import AfDCDComponents, AfDCDLoss
from pixdistill.functional import af_dcd_loss
from pixdistill.ops import patch_contrast as op
from pixdistill.ops.patch_contrast import chunked, launch, triton_kernels

EXACT = ("reference", "torch")  # these take float64
FAST = ("torch", "triton")
CONTRASTS = ("omni", "spatial", "channel")
SMALL = {"num_groups": 2, "patch_size": (2, 3), "pool_size": None, "temperature": 0.5}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_distance = pytest.mark.parametrize("distance", ["l1", "l2"])


def maps(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.to(dtype), (teacher + 0.5 * student).to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def terms(backend, student, teacher, *, mixed=False, **how):
    """Loss, mimic and contrast, and their gradients, if `mixed` those of two mixtures, on the CPU."""
    device = device_of(backend)
    if how.get("valid_mask") is not None:
        how["valid_mask"] = how["valid_mask"].to(device)
    how = {"mimic_weight": 0.3, "contrast_weight": 0.7} | how
    student = student.to(device).detach().requires_grad_()
    parts = af_dcd_loss(student, teacher.to(device), backend=backend, return_components=True, **how)
    wanted = [*parts]
    if mixed:
        wanted += [2 * parts.loss + 3 * parts.mimic - 0.1 * parts.contrast]
        wanted += [parts.loss - parts.contrast]
    grads = [torch.autograd.grad(part, student, retain_graph=True)[0].cpu() for part in wanted]
    return (
        AfDCDComponents(*(part.detach().cpu() for part in parts)),
        AfDCDComponents(*grads[:3]),
        grads,
    )


def assert_same(ours, others, tolerance):
    for a, b in zip((*ours[0], *ours[2]), (*others[0], *others[2]), strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * (b.double().norm() + 1e-3)


# --- The official outputs -------------------------------------------------------------------------


def official(name, dtype):
    """The file, and the loss with its state and its fixed mask."""
    file = golden(name)
    renamed = {"state.": "", "projetor": "projector", "adpator": "adaptor"}
    state = {}
    for key in [key for key in file if key.startswith("state.")]:
        new = key
        for old, right in renamed.items():
            new = new.replace(old, right)
        state[new] = file[key]
    file = {k: v.to(dtype) if v.is_floating_point() else v for k, v in file.items()}
    how = {
        "num_groups": int(file["num_groups"]),
        "patch_size": tuple(file["patch"].tolist()),
        "pool_size": int(file["pool"]) or None,
        "temperature": round(float(file["temperature"]), 6),
    }
    projector = "enhanced" if file["enhanced"] else "plain"
    channels = file["student"].shape[1], file["teacher"].shape[1]
    loss = AfDCDLoss(*channels, projector=projector, **how)
    loss.load_state_dict(state, strict=True)
    batch, _, height, width = file["student"].shape
    drop_mask = torch.zeros(batch, height, width, dtype=torch.bool)
    drop_mask[:, height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = True
    return file, loss.to(dtype), drop_mask, how


GOLDEN = [
    *((backend, torch.float32, 1e-6) for backend in BACKENDS),
    *((backend, torch.float64, 5e-7) for backend in EXACT),
]


@pytest.mark.parametrize("name", ["afdcd_default", "afdcd_enhanced_nopool"])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), GOLDEN, ids=str)
def test_equals_official_outputs(name, backend, dtype, tolerance):
    file, loss, drop_mask, how = official(name, dtype)
    device = device_of(backend)
    if device == "cuda":
        tolerance = 2e-3  # convolutions in TF32
    loss, loss.backend = loss.to(device), backend
    student, teacher = (file[key].to(device, copy=True) for key in ("student", "teacher"))
    student.requires_grad_()
    parts = loss(student, teacher, drop_mask=drop_mask.to(device), return_components=True)
    for part, value in ((parts.mimic, "mimic"), (parts.contrast, "contrast")):
        (grad,) = torch.autograd.grad(part, student, retain_graph=True)
        right = file[f"grad_student_{value}"]
        assert part.dtype == dtype
        assert_close(part, file[value], tolerance)
        # Where the contrast's gradient cancels, the official one is nothing but rounding.
        assert (grad.cpu() - right).norm() <= tolerance * right.norm() + 2e-6
    assert_close(parts.loss, 2e-6 * parts.mimic + 5e-3 * parts.contrast, 1e-6)

    projected = file["projected"].to(device, copy=True).requires_grad_()
    settings = {"mimic_weight": 0.0, "contrast_weight": 1.0, "backend": backend}
    contrast = len(projected) * af_dcd_loss(projected, teacher, **settings, **how)
    tolerance = min(tolerance, 1e-6)
    assert_close(contrast, file["contrast_of_projected_sum"], tolerance)
    (grad,) = torch.autograd.grad(contrast, projected)
    assert_close(grad, file["grad_projected"], tolerance)


# --- Explicit loops -------------------------------------------------------------------------------


def cross_entropy_of(own, positive, others, temperature, distance):
    order = {"l1": 1, "l2": 2}[distance]
    candidates = torch.stack([positive, *others])
    logits = -torch.linalg.vector_norm(own - candidates, order, dim=1) / temperature
    return F.cross_entropy(logits.unsqueeze(0), torch.tensor([0]))


def spatial_loops(s, t, patch, temperature, distance):
    """Whole pixels against the other pixels of their patch; mean over pixels."""
    losses = []
    height, width = s.shape[2:]
    for b, y, x in itertools.product(range(len(s)), range(height), range(width)):
        top, left = y - y % patch[0], x - x % patch[1]
        area = itertools.product(range(top, top + patch[0]), range(left, left + patch[1]))
        others = [t[b, :, v, u] for v, u in area if (v, u) != (y, x)]
        losses.append(cross_entropy_of(s[b, :, y, x], t[b, :, y, x], others, temperature, distance))
    return torch.stack(losses).mean()


def channel_loops(s, t, groups, temperature, distance):
    """Groups of a pixel against its other groups; summed over groups, mean over pixels."""
    losses = []
    for b, y, x in itertools.product(range(len(s)), range(s.shape[2]), range(s.shape[3])):
        own, other = (z[b, :, y, x].chunk(groups) for z in (s, t))
        for m in range(groups):
            others = [*other[:m], *other[m + 1 :]]
            losses.append(cross_entropy_of(own[m], other[m], others, temperature, distance))
    return torch.stack(losses).mean() * groups


@each_distance
@pytest.mark.parametrize("pool", [None, (2, 1)])
def test_spatial_and_channel_equal_loops(distance, pool):
    student, teacher = maps(1, 6, 4, 6)
    exact = student.double().requires_grad_()
    s, t = exact, teacher.double()
    if pool:  # windows of two rows
        s, t = (torch.maximum(x[:, :, ::2], x[:, :, 1::2]) for x in (s, t))
    how = {"num_groups": 3, "patch_size": (2, 3), "pool_size": pool, "temperature": 0.5}
    for contrast, truth in (
        ("spatial", spatial_loops(s, t, (2, 3), 0.5, distance)),
        ("channel", channel_loops(s, t, 3, 0.5, distance)),
    ):
        (right,) = torch.autograd.grad(truth, exact, retain_graph=True)
        for backend in BACKENDS:
            ours = terms(backend, student, teacher, contrast=contrast, distance=distance, **how)
            assert_close(ours[0].contrast, truth, 2e-6)
            assert_close(ours[1].contrast, right, 4e-6)


@each_backend
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mimic_is_the_squared_distance(backend, valid, reduction):
    student, teacher = maps(3, 4, 2, 3)
    mask = some_mask(3, 2, 3) if valid else None
    how = SMALL | {"mimic_reduction": reduction}
    values, grads, _ = terms(backend, student, teacher, valid_mask=mask, **how)
    diff = (student - teacher).double() * (1 if mask is None else mask.unsqueeze(1))
    count = 3 if reduction == "sum" else 4 * (18 if mask is None else mask.sum())
    assert_close(values.mimic, diff.square().sum() / count, 1e-6)
    assert_close(grads.mimic, 2 * diff / count, 1e-6)


# --- Identities of the designs --------------------------------------------------------------------

problems = st.fixed_dictionaries(
    {
        "groups": st.integers(2, 4),
        "width": st.integers(1, 4),
        "size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "patch_size": st.tuples(st.integers(1, 4), st.integers(2, 4)),
        "pool_size": st.sampled_from([None, 1, 2, (1, 3)]),
        "temperature": st.floats(0.1, 3.0),
        "distance": st.sampled_from(["l1", "l2"]),
        "mimic_reduction": st.sampled_from(["sum", "mean"]),
        "seed": st.integers(0, 2**16),
        "masked": st.booleans(),
    }
)


def make(problem):
    shape = (2, problem["groups"] * problem["width"], *problem["size"])
    names = ("patch_size", "pool_size", "temperature", "distance", "mimic_reduction")
    how = {name: problem[name] for name in names} | {"ragged": "pad"}
    how["valid_mask"] = some_mask(2, *problem["size"]) if problem["masked"] else None
    return *maps(*shape, seed=problem["seed"], dtype=torch.float64), how


@given(problem=problems)
def test_omni_with_one_group_is_spatial_and_with_patch_one_is_channel(problem):
    student, teacher, how = make(problem)
    spatial = terms("torch", student, teacher, contrast="spatial", **how)
    one_group = {"num_groups": 1, "negatives": "all_others"}
    assert_same(terms("torch", student, teacher, **one_group, **how), spatial, 1e-12)
    groups = problem["groups"]
    channel = terms("torch", student, teacher, contrast="channel", num_groups=groups, **how)
    how["patch_size"] = 1
    for negatives in ("other_groups", "all_others"):
        omni = terms("torch", student, teacher, num_groups=groups, negatives=negatives, **how)
        assert_same(omni, channel, 1e-12)


WINDOWS = {
    "groups": 2, "width": 1, "size": (4, 4), "patch_size": (2, 2), "pool_size": (1, 2), "seed": 0,
    "temperature": 0.5, "distance": "l1", "mimic_reduction": "sum", "masked": True,
}  # fmt: skip
"""Small enough for the kernels, with windows of equal elements and of invalid ones."""


@given(problem=problems, contrast=st.sampled_from(CONTRASTS), tied=st.booleans())
@example(problem=WINDOWS, contrast="omni", tied=True)
@settings(max_examples=20)
def test_backends_agree_and_terms_are_not_negative(problem, contrast, tied):
    """Also where several elements of a window are the largest: the first has the gradient."""
    student, teacher, how = make(problem)
    if tied:
        student, teacher = student.round(), teacher.round() + 0.25
    how |= {"contrast": contrast, "num_groups": problem["groups"], "mixed": True}
    exact = terms("reference", student, teacher, **how)
    assert all(value >= 0 for value in exact[0])
    assert_same(terms("torch", student, teacher, **how), exact, 1e-11)
    for backend in FAST:
        if backend == "torch" or student[0].numel() <= 40:
            assert_same(terms(backend, student.float(), teacher.float(), **how), exact, 1e-4)


@each_backend
def test_the_first_of_equal_maxima_has_the_gradient(backend):
    student, teacher = (x.repeat_interleave(2, dim=3) for x in maps(1, 4, 2, 2))
    how = {"num_groups": 2, "patch_size": (2, 2), "pool_size": (1, 2), "distance": "l2"}
    grad = terms(backend, student, teacher, **how)[1].contrast
    assert (grad[..., ::2] != 0).all()
    assert (grad[..., 1::2] == 0).all()


@pytest.mark.parametrize("negatives", ["other_groups", "all_others"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_negatives_are_counted(negatives, contrast):
    """Of equal vectors the positive has the probability 1 / (1 + number of negatives)."""
    equal = torch.ones(2, 6, 8, 12)
    how = {"num_groups": 3, "patch_size": (2, 3), "pool_size": 2, "negatives": negatives}
    values = terms("torch", equal, equal, contrast=contrast, **how)[0]
    rows, count = {
        "spatial": (1, 5),
        "channel": (3, 2),
        "omni": (3, 2 * 6 if negatives == "other_groups" else 3 * 6 - 1),
    }[contrast]
    assert values.mimic == 0
    assert_close(values.contrast, rows * torch.tensor(1.0 + count).log(), 1e-6)


# --- Sizes, masks, extremes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "pool"),
    [*itertools.product(EXACT, (None, 2, (3, 2))), ("triton", 2), ("triton", (3, 2))],
    ids=str,
)
def test_padding_is_a_mask_on_a_larger_map(backend, pool):
    """Filled up by pixels that the mask hides, whatever they hold; nothing is ever cropped."""
    student, teacher = maps(1, 4, 5, 7)
    how = {"num_groups": 2, "patch_size": (2, 2), "pool_size": pool, "temperature": 0.5}
    with pytest.raises(ValueError, match=r"pool_size times patch_size.*\(1, 4, 5, 7\).*ragged"):
        terms(backend, student, teacher, **how)
    ours = terms(backend, student, teacher, ragged="pad", **how)
    edges = (0, 8 - 7 if pool is None else 1, 0, {None: 1, 2: 3, (3, 2): 1}[pool])
    large = [F.pad(x, edges, value=9.0) for x in (student, teacher)]
    mask = F.pad(torch.ones(1, 5, 7), edges).bool()
    whole = terms(backend, *large, valid_mask=mask, **how)
    assert_same(ours, (whole[0], None, [grad[:, :, :5, :7] for grad in whole[2]]), 2e-6)


@pytest.mark.parametrize("shape", [(1, 4, 13, 12), (1, 4, 12, 8)])
def test_sizes_that_one_side_alone_divides_raise(shape):
    with pytest.raises(ValueError, match="12 and 12, pool_size times patch_size"):
        af_dcd_loss(*maps(*shape), num_groups=2, patch_size=3, pool_size=4)


@each_backend
def test_a_mask_averages_over_the_pixels_that_are_left(backend):
    """Whole patches masked: the value is that of the rest alone."""
    student, teacher = maps(2, 4, 4, 6)
    how = {"num_groups": 2, "patch_size": 2, "pool_size": None, "temperature": 0.5}
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    ours = terms(backend, student, teacher, valid_mask=mask, **how)
    rest = terms(backend, student[..., :4], teacher[..., :4], **how)
    padded = [F.pad(grad, (0, 2)) for grad in rest[2]]
    assert_same(ours, (rest[0], None, padded), 1e-6)
    assert all((grad[..., 4:] == 0).all() for grad in ours[2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@each_backend
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("pool", [None, (2, 1)])
def test_nan_at_a_valid_pixel_shows_in_both_terms(backend, side, pool):
    pair = maps(1, 4, 4, 6)
    pair[side][0, 1, 2, 3] = torch.nan
    for mask in (None, torch.ones(1, 4, 6, dtype=torch.bool)):
        values = terms(backend, *pair, valid_mask=mask, **SMALL | {"pool_size": pool})[0]
        assert all(part.isnan() for part in values)


@each_backend
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("pool", [None, (2, 1)], ids=str)
def test_nothing_valid_is_zero(backend, reduction, pool):
    how = SMALL | {"pool_size": pool, "ragged": "pad", "mimic_reduction": reduction}
    nothing = torch.zeros(2, 2, 3, dtype=torch.bool)
    for pair, mask in ((maps(2, 4, 2, 3), nothing), (maps(0, 4, 2, 3), nothing[:0])):
        values, _, grads = terms(backend, *pair, valid_mask=mask, **how)
        assert all(value == 0 for value in values)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("margin", [25.0, 45.0])
def test_a_row_far_from_its_positive_is_exact(backend, margin):
    """Two pixels, one group: the margin of a row is the difference of two distances."""
    student = torch.tensor([[[[0.0, margin / 2]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[margin, 0.0]]]], dtype=torch.float64)
    how = {"contrast": "spatial", "patch_size": (1, 2), "pool_size": None, "temperature": 1.0}
    rows = torch.tensor([margin, 0.0], dtype=torch.float64)
    ours = terms(backend, student, teacher, **how)[0].contrast
    assert_close(ours, torch.log1p(rows.exp()).mean(), 1e-15)


@pytest.mark.parametrize("backend", FAST)
def test_a_sum_beyond_float16_is_finite(backend):
    student, teacher = torch.zeros(1, 4, 64, 64).half(), torch.full((1, 4, 64, 64), 4.0).half()
    if device_of(backend) == "cpu" and backend == "triton":
        student, teacher = student[..., :16], 4 * teacher[..., :16]  # interpreted: smaller
    values, grads, _ = terms(backend, student, teacher, num_groups=2)
    assert values.mimic == teacher.double().square().sum() > 65504
    assert values.contrast.isfinite()
    assert grads.mimic.dtype == torch.float16
    assert torch.equal(grads.mimic, -2 * teacher)


@each_backend
@each_distance
def test_student_equal_to_teacher_has_finite_gradients(backend, distance):
    _, teacher = maps(2, 4, 4, 6)
    values, _, grads = terms(backend, teacher, teacher, **SMALL, distance=distance)
    assert values.mimic == 0
    assert values.contrast.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


# --- The module -----------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A projector that keeps what it was given."""

    def forward(self, x):
        self.seen = x.detach()
        return x


def test_the_mask_drops_a_fraction_of_pixels_in_train_mode_only():
    recorder = Recorder()
    loss = AfDCDLoss(4, 4, **SMALL, projector=recorder, mask_ratio=0.75)
    student, teacher = torch.ones(8, 4, 20, 30), torch.zeros(8, 4, 20, 30)

    def seen(*, seed=1, **more):
        loss(student, teacher, generator=torch.Generator().manual_seed(seed), **more)
        return recorder.seen

    first = seen()
    dropped = first == 0
    assert torch.equal(dropped.all(dim=1), dropped.any(dim=1))  # whole pixels
    fractions = dropped[:, 0].float().mean(dim=(1, 2))
    assert ((fractions - 0.75).abs() < 0.1).all()
    assert len(fractions.unique()) > 1  # each image has its own
    assert torch.equal(seen(), first)
    assert not torch.equal(seen(seed=2), first)
    drop_mask = some_mask(8, 20, 30)
    assert torch.equal(seen(drop_mask=drop_mask)[:, 2] == 0, drop_mask)
    assert torch.equal(loss.eval() and seen(), student)
    assert torch.equal(seen(drop_mask=drop_mask)[:, 2] == 0, drop_mask)
    for fraction in (0, 0.0, 1, 1.0):
        loss = AfDCDLoss(4, 4, **SMALL, projector=recorder, mask_ratio=fraction)
        assert seen().mean() == 1 - fraction


def test_the_mask_zeroes_aligned_pixels_and_so_what_alignment_adds():
    recorder = Recorder()
    loss = AfDCDLoss(3, 4, **SMALL, projector=recorder)
    drop_mask, valid_mask = some_mask(2, 2, 3), some_mask(2, 2, 3, seed=7)
    pair = torch.ones(2, 3, 2, 3), torch.zeros(2, 4, 2, 3)
    for masks, hidden in (
        ({"drop_mask": drop_mask}, drop_mask),
        ({"drop_mask": drop_mask, "valid_mask": valid_mask}, drop_mask | ~valid_mask),
        ({"valid_mask": valid_mask}, ~valid_mask),
    ):
        loss.train("drop_mask" in masks)(*pair, **masks)
        assert torch.equal((recorder.seen == 0).all(dim=1), hidden)


@pytest.mark.parametrize("channels", [3, 4])
def test_nan_at_a_dropped_pixel_shows(channels):
    """Or only the gradient of the alignment would have it."""
    drop_mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    drop_mask[0, 2, 3] = True
    student, teacher = torch.ones(1, channels, 4, 6), torch.zeros(1, 4, 4, 6)
    student[0, 0, 2, 3] = torch.nan
    assert AfDCDLoss(channels, 4, **SMALL)(student, teacher, drop_mask=drop_mask).isnan()


def test_the_mask_is_drawn_on_the_device_of_the_input():
    loss = AfDCDLoss(3, 4, **SMALL).to("meta")
    pair = (torch.ones(1, channels, 4, 6, device="meta") for channels in (3, 4))
    assert loss(*pair).device.type == "meta"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_mask_or_says_that_it_cannot(reentrant):
    loss = AfDCDLoss(4, 4, **SMALL)
    student, teacher = (x.requires_grad_(i == 0) for i, x in enumerate(maps(2, 4, 20, 30)))
    drop_mask = some_mask(2, 20, 30)

    def gradient(wrap, seed=0, **how):
        torch.manual_seed(seed)
        value = wrap(lambda s: loss(s, teacher, **how), student)
        return torch.autograd.grad(value, student)[0] if not reentrant else backward(value)

    def backward(value):
        student.grad = None
        value.backward()
        return student.grad

    def plainly(function, s):
        return function(s)

    def checkpointed(function, s):
        return checkpoint(function, s, use_reentrant=reentrant)

    for how in ({}, {"drop_mask": drop_mask}):
        assert torch.equal(gradient(checkpointed, **how), gradient(plainly, **how))
    assert not torch.equal(gradient(plainly, 1), gradient(plainly, 2))
    with pytest.raises(RuntimeError, match=r"generator cannot draw .*checkpointing.*drop_mask="):
        gradient(checkpointed, generator=torch.Generator())


def test_masks_may_come_from_inference_mode():
    with torch.inference_mode():
        masks = dict(zip(("valid_mask", "drop_mask"), some_mask(2, 1, 4, 6).clone(), strict=True))
    student, teacher = (x.requires_grad_(i == 0) for i, x in enumerate(maps(1, 4, 4, 6)))
    loss = AfDCDLoss(4, 4, **SMALL | {"pool_size": (2, 1)})
    for names in (("valid_mask",), ("drop_mask",), ("valid_mask", "drop_mask")):
        student.grad = None
        loss.eval()(student, teacher, **{name: masks[name] for name in names}).backward()
        assert student.grad.norm() > 0


def test_alignment_exists_only_where_channels_differ():
    assert AfDCDLoss(16, 16).align is None
    align = AfDCDLoss(8, 16).align
    assert (align.weight.shape, align.bias.shape) == ((16, 8, 1, 1), (16,))
    parameters = dict(AfDCDLoss(8, 16).named_parameters())
    assert {name.partition(".")[0] for name in parameters} == {"align", "projector"}


@pytest.mark.parametrize(("projector", "factor"), [("plain", 18), ("enhanced", 36)])
def test_projectors_have_the_parameters_that_the_docs_say(projector, factor):
    weights = [p for p in AfDCDLoss(16, 16, projector=projector).parameters() if p.dim() > 1]
    assert sum(p.numel() for p in weights) == factor * 16**2


def test_forward_is_the_weighted_sum_and_attributes_may_be_set():
    student, teacher = maps(2, 4, 4, 6)
    loss = AfDCDLoss(4, 4, **SMALL, mimic_weight=0.3, contrast_weight=7.0).eval()
    parts = loss(student, teacher, return_components=True)
    assert isinstance(parts, AfDCDComponents)
    assert torch.equal(loss(student, teacher), parts.loss)
    assert_close(parts.loss, 0.3 * parts.mimic + 7.0 * parts.contrast, 1e-6)
    weights = {"mimic_weight": 0.3, "contrast_weight": 7.0}
    assert torch.equal(
        af_dcd_loss(loss.projector(student), teacher, **weights, **SMALL), parts.loss
    )
    loss.mimic_weight, loss.contrast_weight, loss.patch_size = 2, 0.5, 2
    assert_close(
        loss(student, teacher),
        2 * parts.mimic + 0.5 * loss(student, teacher, return_components=True).contrast,
        1e-6,
    )
    loss.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be"):
        loss(student, teacher)


def test_every_setting_reaches_the_terms():
    student, teacher = maps(2, 12, 8, 8)
    base = {"num_groups": 4, "patch_size": 2, "pool_size": 2, "temperature": 0.5}
    changes = [
        {},
        {"contrast": "spatial"},
        {"contrast": "channel"},
        {"num_groups": 3},
        {"patch_size": (4, 2)},
        {"pool_size": None},
        {"temperature": 0.3},
        {"distance": "l2"},
        {"negatives": "all_others"},
        {"mimic_reduction": "mean"},
        {"mimic_weight": 0.0},
        {"contrast_weight": 0.0},
        {"ragged": "pad", "patch_size": 3},
    ]
    seen = set()
    for change in changes:
        loss = AfDCDLoss(12, 12, **base | change, projector=nn.Identity()).eval()
        parts = loss(student, teacher, return_components=True)
        direct = af_dcd_loss(student, teacher, return_components=True, **base | change)
        assert torch.equal(torch.stack(parts), torch.stack(direct))
        seen.add(tuple(float(part) for part in parts))
    assert len(seen) == len(changes)


def test_defaults_are_those_of_cityscapes():
    student, teacher = maps(1, 32, 16, 16)
    how = {"contrast": "omni", "num_groups": 16, "patch_size": 4, "pool_size": 4}
    how |= {"temperature": 0.07, "distance": "l1", "negatives": "other_groups", "ragged": "error"}
    how |= {"mimic_reduction": "sum", "mimic_weight": 2e-6, "contrast_weight": 5e-3}
    expected = af_dcd_loss(student, teacher, **how)
    loss = AfDCDLoss(32, 32, projector=nn.Identity())
    assert loss.mask_ratio == 0.75
    assert torch.equal(loss.eval()(student, teacher), expected)
    assert torch.equal(af_dcd_loss(student, teacher), expected)


@each_backend
def test_a_term_without_weight_is_neither_computed_nor_checked(backend, monkeypatch):
    student, teacher = maps(1, 5, 3, 7)
    how = {"contrast_weight": 0, "num_groups": 1, "backend": backend}
    loss = AfDCDLoss(5, 5, projector=nn.Identity(), **how).eval()
    parts = loss.to(device_of(backend))(
        *(x.to(device_of(backend)) for x in (student, teacher)), return_components=True
    )
    assert parts.contrast == 0
    assert_close(parts.mimic, (student - teacher).square().sum(), 1e-6)
    assert_close(parts.loss, 2e-6 * parts.mimic, 1e-6)
    values, _, grads = terms(backend, student, teacher, contrast_weight=0, mimic_weight=0)
    assert values == (0, 0, 0)
    assert all((grad == 0).all() for grad in grads)
    pair = maps(2, 4, 4, 6)
    values, grads, every = terms(backend, *pair, mimic_weight=0, mixed=True, **SMALL)
    right = terms(backend, *pair, **SMALL)
    assert values.mimic == 0
    assert (grads.mimic == 0).all()
    assert_close(values.contrast, right[0].contrast, 1e-6)
    assert_close(every[3], 1.3 * right[1].contrast, 1e-6)  # 2 * 0.7 - 0.1


# --- The node -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "most"), [(False, 16), (True, 30)])
def test_launches_of_a_training_step(amp, most):
    """Three convolutions, their casts under autocast, the mask drawn; 0.1.0 had 35 and 52."""
    loss = AfDCDLoss(4, 8, num_groups=2, patch_size=2, pool_size=2, backend="triton")
    loss = loss.to(TRITON_DEVICE)
    pair = (torch.randn(1, c, 8, 8, device=TRITON_DEVICE) for c in (4, 8))
    student, teacher = (x.requires_grad_(i == 0) for i, x in enumerate(pair))

    def step():
        with torch.autocast(TRITON_DEVICE, dtype=torch.bfloat16, enabled=amp):
            value = loss(student, teacher)
        value.backward()

    step()
    loss.zero_grad()
    student.grad = None
    names = launches(step)
    assert len(names) <= most, names
    assert names.count("mul") == 2  # the mask, and its gradient


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        ({}, ["read_kernel", "_patch_lse", "add_kernel", "grad_kernel"]),
        ({"mimic_weight": 0}, ["read_kernel", "_patch_lse", "add_kernel", "grad_kernel"]),
        ({"mimic_weight": 0, "pool_size": 1}, ["_patch_lse", "add_kernel", "grad_kernel"]),
        ({"contrast_weight": 0}, ["read_kernel", "add_kernel", "grad_kernel"]),
    ],
)
def test_launches_of_the_node(change, kernels):
    student, teacher = (x.to(TRITON_DEVICE) for x in maps(1, 4, 8, 8, dtype=torch.bfloat16))
    how = {"num_groups": 2, "patch_size": 2, "pool_size": 2, "backend": "triton"} | change
    student.requires_grad_()
    names = launches(lambda: torch.autograd.grad(af_dcd_loss(student, teacher, **how), student))
    assert names == [*kernels[:-1], "ones_like", kernels[-1]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", [(1, 1), (2, 2)], ids=str)
def test_kernels_that_split_channels_and_pixels(masked, pool, monkeypatch):
    """Tiles that neither channels nor windows fill, and sums of several blocks."""
    monkeypatch.setattr(triton_kernels, "tile_of", lambda *_: (2, 8))
    monkeypatch.setattr(triton_kernels, "BLOCK", 4)
    size = (4 * pool[0], 3 * pool[1])
    pair = maps(2, 3, *size)
    how = {"contrast": "spatial", "patch_size": (2, 3), "pool_size": pool, "temperature": 0.5}
    how |= {"mimic_reduction": "mean" if masked else "sum"}
    how |= {"valid_mask": some_mask(2, *size) if masked else None}
    exact = terms("reference", *(x.double() for x in pair), **how)
    for backend in FAST:
        assert_same(terms(backend, *pair, **how), exact, 1e-5)


@pytest.mark.parametrize("pool", [(15, 17), (16, 16)], ids=str)
def test_large_windows(pool):
    """As many positions as a byte holds, and one more."""
    pair = maps(1, 2, 2 * pool[0], pool[1])
    how = {"contrast": "spatial", "patch_size": (2, 1), "pool_size": pool, "temperature": 0.5}
    exact = terms("reference", *(x.double() for x in pair), **how)
    for backend in FAST:
        assert_same(terms(backend, *pair, **how), exact, 1e-5)


def test_tiles_and_positions():
    for channels, pixels in itertools.product((1, 3, 32, 500, 2048), (1, 7, 32, 1000)):
        for last in (False, True):
            c, p = launch.tile_of(channels, pixels, last)
            assert c * p <= 512
            assert (c if last else p) <= 32
            assert c < 2 * channels
            assert p < 2 * pixels
    assert launch.tile_of(512, 8192, False) == (16, 32)
    assert launch.tile_of(512, 8192, True) == (32, 16)
    assert [launch.argmax_dtype(p) for p in ((15, 17), (16, 16))] == [torch.uint8, torch.int32]


@pytest.mark.parametrize("backend", FAST)
def test_every_output_is_written(backend, monkeypatch):
    """Fresh memory is filled with NaN."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name):
        def fresh(*args, **how):
            made = originals[name](*args, **how)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(77)

        return fresh

    student, teacher = maps(1, 4, 4, 6, dtype=torch.float32)
    for pool, mask in ((1, None), (2, some_mask(1, 4, 6))):
        how = {"num_groups": 2, "patch_size": (2, 3), "pool_size": pool, "valid_mask": mask}
        expected = terms(backend, student, teacher, **how)
        with monkeypatch.context() as patched:
            for name in originals:
                patched.setattr(torch, name, poisoned(name))
            ours = terms(backend, student, teacher, **how)
        assert_same(ours, expected, 1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_have_the_layout_of_the_map(backend):
    """So that the projector's backward takes them without a copy."""
    student, teacher = (x.to(device_of(backend)) for x in maps(2, 4, 4, 6))
    expected = terms(backend, student, teacher, **SMALL | {"pool_size": (2, 1), "patch_size": 2})
    student = student.contiguous(memory_format=torch.channels_last).requires_grad_()
    how = SMALL | {"pool_size": (2, 1), "patch_size": 2, "backend": backend}
    value = af_dcd_loss(student, teacher, mimic_weight=0.3, contrast_weight=0.7, **how)
    (grad,) = torch.autograd.grad(value, student)
    assert grad.stride() == student.stride()
    assert_close(grad, expected[1].loss, 1e-6)


@pytest.mark.parametrize("block", [1, 60, 10**4])
def test_chunks_join_exactly_and_bound_memory(block, monkeypatch):
    """One channel, some channels of an image, some images."""
    student, teacher = maps(3, 4, 4, 6, dtype=torch.float64)
    mask = some_mask(3, 4, 6)
    how = {"num_groups": 2, "patch_size": (2, 3), "pool_size": (1, 2), "valid_mask": mask}
    exact = terms("reference", student, teacher, **how)
    monkeypatch.setattr(chunked, "_CPU_BLOCK", block)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        assert_same(terms("torch", student.to(dtype), teacher.to(dtype), **how), exact, tolerance)
    large = maps(8, 2, 32, 32, dtype=torch.float16)
    with LargestTensor() as largest:
        chunked._squared_distance(*large, None, torch.float32)
        chunked._pooled(large[0], None, (4, 4), True)
    assert largest.size <= max(block, 2 * 32 * 32)  # the view of an image counts


@pytest.mark.parametrize(
    ("masked", "change"),
    [
        (True, {}),
        (False, {"pool_size": 1}),
        (True, {"mimic_weight": 0}),
        (False, {"contrast_weight": 0}),
    ],
    ids=str,
)
def test_opcheck(masked, change):
    student, teacher = maps(2, 4, 4, 4)
    mask = some_mask(2, 4, 4) if masked else None
    names = op.Settings._fields
    given = dict(
        zip(names, ("omni", 2, 2, 2, 0.3, "l1", "other_groups", "error", "mean"), strict=False)
    )
    given |= {"mimic_weight": 0.3, "contrast_weight": 0.7, "backend": "torch"} | change
    how = op.Settings(**given).checked()
    for with_grad in (True, False):
        inputs = (student.requires_grad_(with_grad), teacher, mask, *how, with_grad)
        torch.library.opcheck(op.patch_contrast_op, inputs)
    saved = op.patch_contrast_op(student, teacher, mask, *how, True)[3:]
    one = torch.ones(())
    for grads in ((one, None, None), (None, one, one)):
        torch.library.opcheck(op.grad_op, (student, teacher, mask, *saved, *grads, *how))


@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_32_bits(backend):
    """Maps that reach beyond 2^31 elements along each axis; untouched pages cost no memory."""
    big = torch.empty(600 * 2**22, dtype=torch.bfloat16, device=device_of(backend))
    how = {"num_groups": 2, "patch_size": 1, "pool_size": (1, 2), "mimic_weight": 0.3}
    for strides, shape in (
        ((2**30, 8, 4, 1), (3, 2, 2, 2)),
        ((1, 2**31, 4, 64), (1, 2, 2, 2)),
        ((1, 4, 2**30, 64), (1, 2, 3, 2)),
        ((1, 4, 64, 3 * 2**29), (1, 2, 2, 2)),
    ):
        near = [x.to(big.device) for x in maps(*shape, dtype=torch.bfloat16)]
        expected = terms(backend, *near, **how)
        for side in (0, 1):
            far = big.as_strided(shape, strides)
            far.copy_(near[side])
            pair = [far if i == side else near[i].float() for i in range(2)]
            if side == 0:  # its gradient would be as large: values alone
                value = af_dcd_loss(*pair, backend=backend, contrast_weight=0.7, **how)
                assert_close(value, expected[0].loss, 1e-5)
            else:
                assert_same(terms(backend, *pair, **how), expected, 2e-2)


def test_offsets_have_sixty_four_bits(tmp_path):
    """Of the three kernels here: those of `patch_lse` inside a patch have 32 where they fit."""
    narrow = run("tests/offsets.py", "patch_contrast", env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert {line.split()[0] for line in narrow.splitlines()} == {"_patch_lse"}


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("num_groups must divide the teacher's 16 channels; got 5", {"num_groups": 5}),
        ("num_groups must be at least 2", {"num_groups": 1}),
        ("num_groups must be at least 2", {"num_groups": 1, "contrast": "channel"}),
        (
            "num_groups must be at least 2",
            {"num_groups": 1, "patch_size": 1, "negatives": "all_others"},
        ),
        ("patch_size must exceed", {"patch_size": 1, "contrast": "spatial"}),
        ("patch_size must be at least 1", {"patch_size": (4, 0)}),
        ("pool_size must be at least 1", {"pool_size": 0}),
        ("mask_ratio must be a number from 0 to 1", {"mask_ratio": 1.5}),
        ("projector must be", {"projector": "deep"}),
        ("mimic_weight must be", {"mimic_weight": -1.0}),
    ],
)
def test_bad_settings_raise_at_construction(words, changes):
    with pytest.raises(ValueError, match=words):
        AfDCDLoss(8, 16, **changes)


S, T = torch.zeros(1, 3, 2, 6), torch.zeros(1, 4, 2, 6)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, r"student must have shape \[B, 3, H, W\].*built for 3", {"student": T}),
        (ValueError, r"teacher must have shape \[B, 4, H, W\].*built for 4", {"teacher": S}),
        (TypeError, "drop_mask must be a bool.*set to zero", {"drop_mask": T}),
        (ValueError, "drop_mask must have one element per pixel", {"drop_mask": T == 0}),
        (TypeError, "return_components must be True or False", {"return_components": 1}),
    ],
)
def test_bad_inputs_are_named(error, words, changes):
    arguments = {"student": S, "teacher": T} | changes
    with pytest.raises(error, match=words):
        AfDCDLoss(3, 4, **SMALL)(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_projector_that_changes_the_shape_is_named():
    for projector, got in ((nn.Conv2d(4, 4, 2), r".*\[1, 4, 1, 5\]"), (nn.LSTM(3, 3), "")):
        loss = AfDCDLoss(3, 4, **SMALL, projector=projector)
        if not got:
            loss.projector.forward, got = lambda x: (x, x), "<class 'tuple'>"
        with pytest.raises(ValueError, match=rf"projector must keep the shape .* returned {got}"):
            loss(S, T)
    for words, change in (
        ("num_groups must divide the student's 4 channels; got 3", {"num_groups": 3}),
        ("valid_mask must have one element", {"num_groups": 2, "valid_mask": T[0] == 0}),
        ("of one shape", {"num_groups": 2, "teacher": S}),
    ):
        with pytest.raises(ValueError, match=words):
            af_dcd_loss(T, change.pop("teacher", T), **change)
