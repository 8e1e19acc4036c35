"""AfDCDLoss and its terms: official outputs, explicit loops, the identities of the designs, edges."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, assert_close, assert_within_budget, device_of, fresh_compiler, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pixdistill
from pixdistill import AfDCDComponents, AfDCDLoss
from pixdistill.functional import af_dcd_terms

EXACT = ("reference", "torch")  # these take float64
CONTRASTS = ("omni", "spatial", "channel")
SMALL = {"num_groups": 2, "patch_size": (2, 3), "pool_size": None, "temperature": 0.5}


def maps(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.to(dtype), (teacher + 0.5 * student).to(dtype)


def some_mask(*shape, seed=3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def terms(backend, student, teacher, **options):
    """Both terms and their gradients on the CPU."""
    device = device_of(backend)
    if options.get("valid_mask") is not None:
        options["valid_mask"] = options["valid_mask"].to(device)
    student = student.detach().to(device, copy=True).requires_grad_()
    parts = af_dcd_terms(student, teacher.to(device), backend=backend, **options)
    grads = [torch.autograd.grad(part, student, retain_graph=True)[0].cpu() for part in parts]
    return [part.detach().cpu() for part in parts], grads


def assert_same(ours, others, tolerance):
    for a, b in zip((*ours[0], *ours[1]), (*others[0], *others[1]), strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * (b.double().norm() + 1e-3)


# --- The official outputs -------------------------------------------------------------------------


def official(name, dtype):
    """The file, and the loss with its state and its fixed mask."""
    file = golden(name)
    state = {k[6:]: v for k, v in file.items() if k.startswith("state.")}
    state = {
        k.replace("projetor", "projector").replace("adpator", "adaptor"): v
        for k, v in state.items()
    }
    file = {k: v.to(dtype) if v.is_floating_point() else v for k, v in file.items()}
    options = {
        "num_groups": int(file["num_groups"]),
        "patch_size": tuple(file["patch"].tolist()),
        "pool_size": int(file["pool"]) or None,
        "temperature": round(float(file["temperature"]), 6),
    }
    loss = AfDCDLoss(
        file["student"].shape[1],
        file["teacher"].shape[1],
        projector="enhanced" if file["enhanced"] else "plain",
        **options,
    )
    loss.load_state_dict(state, strict=True)
    batch, _, height, width = file["student"].shape
    drop_mask = torch.zeros(batch, height, width, dtype=torch.bool)
    drop_mask[:, height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = True
    return file, loss.to(dtype), drop_mask, options


GOLDEN = [
    *((backend, torch.float32, 1e-6) for backend in BACKENDS),
    *((backend, torch.float64, 5e-7) for backend in EXACT),
]


@pytest.mark.parametrize("name", ["afdcd_default", "afdcd_enhanced_nopool"])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), GOLDEN, ids=str)
def test_equals_official_outputs(name, backend, dtype, tolerance):
    file, loss, drop_mask, options = official(name, dtype)
    device = device_of(backend)
    loss, loss.backend = loss.to(device), backend
    student, teacher = (file[key].to(device, copy=True) for key in ("student", "teacher"))
    student.requires_grad_()
    parts = loss.components(student, teacher, drop_mask=drop_mask.to(device))
    for part, value in zip(parts, ("mimic", "contrast"), strict=True):
        (grad,) = torch.autograd.grad(part, student, retain_graph=True)
        right = file[f"grad_student_{value}"]
        assert part.dtype == dtype
        assert_close(part, file[value], tolerance)
        # Where the contrast's gradient cancels, the official one is nothing but rounding.
        assert (grad.cpu() - right).norm() <= tolerance * right.norm() + 2e-6
    total = loss(student, teacher, drop_mask=drop_mask.to(device))
    assert_close(total, 2e-6 * parts.mimic + 5e-3 * parts.contrast, 1e-6)

    projected = file["projected"]
    values, grads = terms(backend, projected, file["teacher"], **options)
    batch = len(projected)
    assert_close(batch * values[1], file["contrast_of_projected_sum"], tolerance)
    assert_close(batch * grads[1], file["grad_projected"], tolerance)


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
        others = [
            t[b, :, v, u]
            for v in range(top, min(top + patch[0], height))
            for u in range(left, min(left + patch[1], width))
            if (v, u) != (y, x)
        ]
        losses.append(cross_entropy_of(s[b, :, y, x], t[b, :, y, x], others, temperature, distance))
    return torch.stack(losses).mean()


def channel_loops(s, t, groups, temperature, distance):
    """Groups of a pixel against its other groups; summed over groups, mean over pixels."""
    losses = []
    width = s.shape[1] // groups
    for b, y, x in itertools.product(range(len(s)), range(s.shape[2]), range(s.shape[3])):
        own, other = (z[b, :, y, x].split(width) for z in (s, t))
        losses.append(
            sum(
                cross_entropy_of(
                    own[m], other[m], [*other[:m], *other[m + 1 :]], temperature, distance
                )
                for m in range(groups)
            )
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("pool", [None, (2, 1)])
def test_spatial_and_channel_equal_loops(distance, pool):
    student, teacher = maps(1, 6, 4, 6)
    exact = student.double().requires_grad_()
    s, t = exact, teacher.double()
    if pool:  # windows of two rows
        s, t = (torch.maximum(x[:, :, ::2], x[:, :, 1::2]) for x in (s, t))
    for contrast, truth in (
        ("spatial", spatial_loops(s, t, (2, 3), 0.5, distance)),
        ("channel", channel_loops(s, t, 3, 0.5, distance)),
    ):
        (right,) = torch.autograd.grad(truth, exact, retain_graph=True)
        for backend in BACKENDS:
            values, grads = terms(
                backend,
                student,
                teacher,
                contrast=contrast,
                num_groups=3,
                patch_size=(2, 3),
                pool_size=pool,
                temperature=0.5,
                distance=distance,
            )
            assert_close(values[1], truth, 2e-6)
            assert_close(grads[1], right, 4e-6)


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mimic_is_the_squared_distance(valid, reduction):
    student, teacher = maps(3, 4, 2, 3)
    mask = some_mask(3, 2, 3) if valid else None
    values, grads = terms(
        "torch", student, teacher, mimic_reduction=reduction, valid_mask=mask, **SMALL
    )
    difference = (student - teacher).double()
    if valid:
        difference = difference.movedim(1, -1)[mask]
    truth = difference.square().sum() / 3 if reduction == "sum" else difference.square().mean()
    assert_close(values[0], truth, 1e-6)
    factor = 2 / 3 if reduction == "sum" else 2 / difference.numel()
    right = factor * (student - teacher)
    if valid:
        right = right * mask.unsqueeze(1)
    assert_close(grads[0], right, 1e-6)
    if not valid:  # how the docs convert a weight
        mean = terms("torch", student, teacher, mimic_reduction="mean", **SMALL)[0][0]
        total = terms("torch", student, teacher, mimic_reduction="sum", **SMALL)[0][0]
        assert_close(total, mean * 4 * 2 * 3, 1e-6)


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
        "seed": st.integers(0, 2**16),
    }
)


def make(problem):
    shape = (2, problem["groups"] * problem["width"], *problem["size"])
    names = ("patch_size", "pool_size", "temperature", "distance")
    options = {name: problem[name] for name in names}
    return *maps(*shape, seed=problem["seed"], dtype=torch.float64), options | {"ragged": "pad"}


@given(problem=problems)
def test_omni_with_one_group_is_spatial_and_with_patch_one_is_channel(problem):
    student, teacher, options = make(problem)
    spatial = terms("torch", student, teacher, contrast="spatial", **options)
    one_group = {"num_groups": 1, "negatives": "all_others"}
    assert_same(terms("torch", student, teacher, **one_group, **options), spatial, 1e-12)
    groups = problem["groups"]
    channel = terms("torch", student, teacher, contrast="channel", num_groups=groups, **options)
    options["patch_size"] = 1
    for negatives in ("other_groups", "all_others"):
        omni = terms("torch", student, teacher, num_groups=groups, negatives=negatives, **options)
        assert_same(omni, channel, 1e-12)


@given(problem=problems, contrast=st.sampled_from(CONTRASTS), masked=st.booleans())
@settings(max_examples=15)
def test_backends_agree_and_terms_are_not_negative(problem, contrast, masked):
    student, teacher, options = make(problem)
    options |= {"contrast": contrast, "num_groups": problem["groups"]}
    options |= {"valid_mask": some_mask(2, *problem["size"]) if masked else None}
    exact = terms("reference", student, teacher, **options)
    assert all(value >= 0 for value in exact[0])
    assert_same(terms("torch", student, teacher, **options), exact, 1e-11)
    single = terms("torch", student.float(), teacher.float(), **options)
    assert_same(single, exact, 1e-4)
    if student[0].numel() <= 12:
        assert_same(terms("triton", student.float(), teacher.float(), **options), exact, 1e-4)


@pytest.mark.parametrize("negatives", ["other_groups", "all_others"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_negatives_are_counted(negatives, contrast):
    """Of equal vectors the positive has the probability 1 / (1 + number of negatives)."""
    equal = torch.ones(2, 6, 8, 12)
    options = {"num_groups": 3, "patch_size": (2, 3), "pool_size": 2}
    values, _ = terms("torch", equal, equal, contrast=contrast, negatives=negatives, **options)
    rows, count = {
        "spatial": (1, 5),
        "channel": (3, 2),
        "omni": (3, 2 * 6 if negatives == "other_groups" else 3 * 6 - 1),
    }[contrast]
    assert values[0] == 0
    assert_close(values[1], rows * torch.tensor(1.0 + count).log(), 1e-6)


# --- Sizes and masks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "pool"),
    [*itertools.product(EXACT, (None, 2, (3, 2))), ("triton", 2), ("triton", (3, 2))],
    ids=str,
)
def test_padding_is_a_mask_on_a_larger_map(backend, pool):
    """Filled up by pixels that the mask hides, whatever they hold."""
    student, teacher = maps(1, 4, 5, 7)
    options = {"num_groups": 2, "patch_size": (2, 2), "pool_size": pool, "temperature": 0.5}
    ours = terms(backend, student, teacher, ragged="pad", **options)
    edges = (0, 8 - 7 if pool is None else 1, 0, {None: 1, 2: 3, (3, 2): 1}[pool])
    large = [F.pad(x, edges, value=9.0) for x in (student, teacher)]
    mask = F.pad(torch.ones(1, 5, 7), edges).bool()
    whole = terms(backend, *large, valid_mask=mask, **options)
    whole[1][:] = [grad[:, :, :5, :7] for grad in whole[1]]
    assert_same(ours, whole, 2e-6)


def test_sizes_are_never_cropped():
    student, teacher = maps(1, 4, 12, 12)
    assert af_dcd_terms(student, teacher, num_groups=2, patch_size=3, pool_size=4)
    for shape in ((1, 4, 13, 12), (1, 4, 12, 8)):
        student, teacher = maps(*shape)
        with pytest.raises(ValueError, match=r"12 and 12, pool_size times patch_size.*ragged"):
            af_dcd_terms(student, teacher, num_groups=2, patch_size=3, pool_size=4)
        padded = af_dcd_terms(
            student, teacher, num_groups=2, patch_size=3, pool_size=4, ragged="pad"
        )
        assert all(part > 0 for part in padded)


def test_a_mask_averages_over_the_pixels_that_are_left():
    """Whole patches masked: the value is that of the rest alone."""
    student, teacher = maps(2, 4, 4, 6)
    options = {"num_groups": 2, "patch_size": 2, "pool_size": None, "temperature": 0.5}
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    ours = terms("torch", student, teacher, valid_mask=mask, **options)
    rest = terms("torch", student[..., :4], teacher[..., :4], **options)
    assert_close(ours[0][1], rest[0][1], 1e-6)
    assert_close(ours[0][0], rest[0][0], 1e-6)
    for grad, right in zip(ours[1], rest[1], strict=True):
        assert torch.equal(grad[..., 4:], torch.zeros(2, 4, 4, 2))
        assert_close(grad[..., :4], right, 1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels", [3, 4])
def test_invalid_pixels_may_hold_anything(poison, channels):
    torch.manual_seed(0)
    student, _ = maps(2, channels, 4, 6)
    _, teacher = maps(2, 4, 4, 6)
    mask = some_mask(2, 4, 6)
    mask[0, :2, :2] = False  # a window without any
    loss = AfDCDLoss(channels, 4, **SMALL | {"pool_size": 2, "patch_size": (1, 3)}).eval()
    results = []
    for value in (0.7, poison):
        dirty = [x.masked_fill(~mask.unsqueeze(1), value) for x in (student, teacher)]
        ours = dirty[0].requires_grad_()
        loss.zero_grad()
        total = loss(ours, dirty[1], valid_mask=mask)
        total.backward()
        results.append([total.detach(), ours.grad, *(p.grad for p in loss.parameters())])
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, other.nan_to_num(nan=12345.0))
    assert torch.equal(ours.grad.movedim(1, -1)[~mask], torch.zeros(int((~mask).sum()), channels))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_at_a_valid_pixel_shows(side):
    student, teacher = maps(1, 4, 4, 6)
    (student if side == "student" else teacher)[0, 1, 2, 3] = torch.nan
    for pool in (None, (2, 1)):
        parts = af_dcd_terms(student, teacher, **SMALL | {"pool_size": pool})
        assert all(part.isnan() for part in parts)


@pytest.mark.parametrize("channels", [3, 4])
def test_nan_at_a_dropped_pixel_shows(channels):
    """Or only the gradient of the alignment would have it."""
    drop_mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    drop_mask[0, 2, 3] = True
    student, teacher = torch.ones(1, channels, 4, 6), torch.zeros(1, 4, 4, 6)
    student[0, 0, 2, 3] = torch.nan
    assert AfDCDLoss(channels, 4, **SMALL)(student, teacher, drop_mask=drop_mask).isnan()


def test_teacher_and_masks_may_come_from_inference_mode():
    with torch.inference_mode():
        teacher, valid_mask, drop_mask = torch.randn(1, 4, 4, 6), *some_mask(2, 1, 4, 6).clone()
    student = torch.randn(1, 4, 4, 6, requires_grad=True)
    for pool in (None, (2, 1)):
        loss = AfDCDLoss(4, 4, **SMALL | {"pool_size": pool})
        loss(student, teacher, valid_mask=valid_mask, drop_mask=drop_mask).backward()
    assert teacher.is_inference()
    assert student.grad.norm() > 0


@pytest.mark.parametrize("margin", [25.0, 45.0])
def test_a_row_far_from_its_positive_is_exact(margin):
    """Two pixels, one group: the margin of a row is the difference of two distances."""
    student = torch.tensor([[[[0.0, margin / 2]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[margin, 0.0]]]], dtype=torch.float64)
    options = {"contrast": "spatial", "patch_size": (1, 2), "pool_size": None, "temperature": 1.0}
    contrast = af_dcd_terms(student, teacher, **options).contrast
    rows = torch.tensor([margin, 0.0], dtype=torch.float64)
    assert_close(contrast, torch.log1p(rows.exp()).mean(), 1e-15)


def test_the_mask_is_drawn_on_the_device_of_the_input():
    loss = AfDCDLoss(3, 4, **SMALL).to("meta")
    maps_there = (torch.ones(1, channels, 4, 6, device="meta") for channels in (3, 4))
    assert loss(*maps_there).device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("case", ["nothing valid", "empty batch", "empty batch and mask"])
@pytest.mark.parametrize("pool", [None, (2, 1)], ids=str)
def test_nothing_to_compare_is_zero_attached_to_the_graph(backend, reduction, case, pool):
    device = device_of(backend)
    batch = 2 if case == "nothing valid" else 0
    options = SMALL | {"pool_size": pool, "ragged": "pad", "mimic_reduction": reduction}
    loss = AfDCDLoss(3, 4, **options, backend=backend).to(device)
    student = torch.ones(batch, 3, 2, 3, device=device, requires_grad=True)
    teacher = torch.ones(batch, 4, 2, 3, device=device)
    mask = torch.zeros(batch, 2, 3, dtype=torch.bool, device=device)
    total = loss(student, teacher, valid_mask=None if case == "empty batch" else mask)
    total.backward()
    assert total == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in loss.parameters())


# --- The module -----------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A projector that keeps what it was given."""

    def forward(self, x):
        self.seen = x.detach()
        return x


def test_the_mask_drops_a_share_of_pixels_in_train_mode_only():
    recorder = Recorder()
    loss = AfDCDLoss(4, 4, **SMALL, projector=recorder, mask_ratio=0.75)
    student, teacher = torch.ones(8, 4, 20, 30), torch.zeros(8, 4, 20, 30)
    loss(student, teacher, generator=torch.Generator().manual_seed(1))
    dropped = recorder.seen == 0
    assert torch.equal(dropped.all(dim=1), dropped.any(dim=1))  # whole pixels
    shares = dropped[:, 0].float().mean(dim=(1, 2))
    assert ((shares - 0.75).abs() < 0.1).all()
    assert len(shares.unique()) > 1  # each image has its own
    first = recorder.seen
    loss(student, teacher, generator=torch.Generator().manual_seed(1))
    assert torch.equal(recorder.seen, first)
    loss(student, teacher, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(recorder.seen, first)
    loss.eval()(student, teacher)
    assert torch.equal(recorder.seen, student)
    drop_mask = some_mask(8, 20, 30)
    for module in (loss.train(), loss.eval()):
        module(student, teacher, drop_mask=drop_mask)
        assert torch.equal(recorder.seen[:, 2] == 0, drop_mask)
    for ratio, left in ((0.0, 1.0), (1.0, 0.0)):
        loss.mask_ratio = ratio
        loss.train()(student, teacher)
        assert recorder.seen.mean() == left


def test_the_mask_zeroes_aligned_pixels_and_so_what_alignment_adds():
    recorder = Recorder()
    loss = AfDCDLoss(3, 4, **SMALL, projector=recorder)
    drop_mask = some_mask(2, 2, 3)
    loss(torch.ones(2, 3, 2, 3), torch.zeros(2, 4, 2, 3), drop_mask=drop_mask)
    assert torch.equal((recorder.seen == 0).all(dim=1), drop_mask)
    valid_mask = some_mask(2, 2, 3, seed=7)
    arguments = torch.ones(2, 3, 2, 3), torch.zeros(2, 4, 2, 3)
    loss(*arguments, drop_mask=drop_mask, valid_mask=valid_mask)
    assert torch.equal((recorder.seen == 0).all(dim=1), drop_mask | ~valid_mask)
    loss.eval()(*arguments, valid_mask=valid_mask)
    assert torch.equal((recorder.seen == 0).all(dim=1), ~valid_mask)


def test_alignment_exists_only_where_channels_differ():
    assert AfDCDLoss(16, 16).align is None
    align = AfDCDLoss(8, 16).align
    assert (align.weight.shape, align.bias.shape) == ((16, 8, 1, 1), (16,))
    parameters = dict(AfDCDLoss(8, 16).named_parameters())
    assert {name.partition(".")[0] for name in parameters} == {"align", "projector"}


@pytest.mark.parametrize("projector", ["plain", "enhanced"])
def test_gradients_reach_student_and_parameters_and_never_the_teacher(projector):
    loss = AfDCDLoss(3, 4, **SMALL, projector=projector)
    student, teacher = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 4, 4, 6)
    teacher.requires_grad_()
    total = loss(student, teacher)
    assert total.shape == ()
    total.backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0
    assert all(p.grad.norm() > 0 for p in loss.parameters())


def test_forward_is_the_weighted_sum_of_the_components():
    student, teacher = maps(2, 4, 4, 6)
    loss = AfDCDLoss(4, 4, **SMALL, mimic_weight=0.3, contrast_weight=7.0).eval()
    parts = loss.components(student, teacher)
    assert isinstance(parts, AfDCDComponents)
    assert_close(loss(student, teacher), 0.3 * parts.mimic + 7.0 * parts.contrast, 1e-6)
    direct = af_dcd_terms(loss.projector(student), teacher, **SMALL)
    assert_close(parts.mimic, direct.mimic, 1e-6)
    assert_close(parts.contrast, direct.contrast, 1e-6)


def test_every_setting_reaches_the_terms():
    student, teacher = maps(2, 12, 8, 8)
    base = {
        "contrast": "omni",
        "num_groups": 4,
        "patch_size": 2,
        "pool_size": 2,
        "temperature": 0.5,
    }
    changes = [
        {"contrast": "spatial"},
        {"contrast": "channel"},
        {"num_groups": 3},
        {"patch_size": (4, 2)},
        {"pool_size": None},
        {"temperature": 0.3},
        {"distance": "l2"},
        {"negatives": "all_others"},
        {"mimic_reduction": "mean"},
        {"ragged": "pad", "patch_size": 3},
    ]
    seen = set()
    for change in ({}, *changes):
        loss = AfDCDLoss(12, 12, **base | change, projector=nn.Identity()).eval()
        parts = loss.components(student, teacher)
        direct = af_dcd_terms(student, teacher, **base | change)
        assert torch.equal(torch.stack(parts), torch.stack(direct))
        seen.add(tuple(float(part) for part in parts))
        (name, value), *_ = change.items() or [("contrast", "omni")]
        assert f"{name}={value!r}" in repr(loss)
    assert len(seen) == len(changes) + 1


def test_defaults_are_those_of_cityscapes():
    loss = AfDCDLoss(16, 32)
    student, teacher = maps(1, 32, 16, 16)
    assert (loss.mimic_weight, loss.contrast_weight, loss.mask_ratio) == (2e-6, 5e-3, 0.75)
    options = {"num_groups": 16, "patch_size": 4, "pool_size": 4, "temperature": 0.07}
    options |= {"distance": "l1", "negatives": "other_groups", "mimic_reduction": "sum"}
    expected = af_dcd_terms(student, teacher, contrast="omni", ragged="error", **options)
    same = AfDCDLoss(32, 32, projector=nn.Identity()).eval().components(student, teacher)
    assert torch.equal(torch.stack(same), torch.stack(expected))
    assert torch.equal(torch.stack(af_dcd_terms(student, teacher)), torch.stack(expected))
    assert pixdistill.functional.af_dcd_terms is af_dcd_terms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_stay_inside_the_error_budget(dtype):
    student, teacher = maps(1, 8, 2, 4, dtype=dtype)
    options = {"num_groups": 2, "patch_size": 2, "pool_size": None, "temperature": 0.5}
    truth = terms("reference", student.double(), teacher.double(), **options)
    plain = ((student - teacher).square().sum()).float()
    for backend in BACKENDS:
        values, grads = terms(backend, student, teacher, **options)
        assert all(value.dtype == torch.float32 for value in values)
        assert all(grad.dtype == dtype for grad in grads)
        assert_within_budget(values[0], plain, truth[0][0], 1e-6)
        assert_close(values[1], truth[0][1], 1e-5)
        assert_close(grads[1], truth[1][1], 5e-3 if dtype == torch.float16 else 3e-2)


def test_a_sum_beyond_float16_is_finite():
    student, teacher = torch.zeros(1, 4, 64, 64).half(), torch.full((1, 4, 64, 64), 4.0).half()
    mimic, contrast = af_dcd_terms(student, teacher, num_groups=2)
    assert mimic == 16 * 4 * 64 * 64
    assert contrast.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    loss = AfDCDLoss(4, 8, **SMALL).eval()
    student, teacher = torch.randn(2, 4, 4, 6, requires_grad=True), torch.randn(2, 8, 4, 6)
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=dtype):
        ours = loss(student, teacher)
    assert ours.dtype == torch.float32
    assert_close(ours, expected, 1e-2)
    ours.backward()
    assert student.grad.dtype == torch.float32
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_student_equal_to_teacher_has_finite_gradients(distance):
    _, teacher = maps(2, 4, 4, 6)
    for backend in BACKENDS:
        values, grads = terms(backend, teacher, teacher, **SMALL, distance=distance)
        assert values[0] == 0
        assert values[1].isfinite()
        assert grads[1].isfinite().all()


def test_state_dict_deepcopy_and_pickle_continue_exactly():
    student, teacher = maps(2, 3, 4, 6)[0], maps(2, 4, 4, 6)[1]
    loss = AfDCDLoss(3, 4, **SMALL, projector="enhanced").eval()
    other = AfDCDLoss(3, 4, **SMALL, projector="enhanced").eval()
    assert loss(student, teacher) != other(student, teacher)
    other.load_state_dict(loss.state_dict())
    for same in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(same(student, teacher), loss(student, teacher))
        assert repr(same) == repr(loss)
    state = loss.state_dict()
    state.pop("projector.adaptor_2.bias")
    with pytest.raises(RuntimeError, match="adaptor_2"):
        other.load_state_dict(state)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_once_for_all_sizes(training):
    loss = AfDCDLoss(3, 4, **SMALL | {"pool_size": 2}, ragged="pad").train(training)
    with fresh_compiler():
        counter, counts = CompileCounterWithBackend("aot_eager"), set()
        compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
        for size in (7, 9, 10):
            student = torch.randn(2, 3, size, size + 4, requires_grad=True)
            teacher = torch.randn(2, 4, size, size + 4)
            mask = some_mask(2, size, size + 4)
            ours = compiled(student, teacher, valid_mask=mask)
            (grad,) = torch.autograd.grad(ours, student)
            counts.add(counter.frame_count)
            if training:
                assert ours.isfinite()
                continue
            expected = loss(student, teacher, valid_mask=mask)
            assert_close(ours, expected, 1e-5)
            assert_close(grad, torch.autograd.grad(expected, student)[0], 1e-5)
        assert len(counts) == 1


def test_official_training_loop_with_clipping_moves_the_projector():
    torch.manual_seed(0)
    loss = AfDCDLoss(3, 4, **SMALL, mimic_weight=0.1, contrast_weight=0.1)
    network = nn.Conv2d(2, 3, 1)
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.05)
    images, teacher = torch.randn(2, 2, 4, 6), torch.randn(2, 4, 4, 6)
    values = []
    for _ in range(30):
        value = loss(network(images), teacher, drop_mask=torch.zeros(2, 4, 6, dtype=torch.bool))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 15.0)
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "student_channels must be an int", {"student_channels": "8"}),
        (ValueError, "teacher_channels must be at least 1", {"teacher_channels": 0}),
        (ValueError, "contrast must be one of", {"contrast": "omnidirectional"}),
        (ValueError, "num_groups must be at least 1", {"num_groups": 0}),
        (ValueError, "num_groups must divide the teacher's 16 channels; got 5", {"num_groups": 5}),
        (ValueError, "num_groups must be at least 2", {"num_groups": 1}),
        (ValueError, "num_groups must be at least 2", {"num_groups": 1, "contrast": "channel"}),
        (
            ValueError,
            "num_groups must be at least 2",
            {"num_groups": 1, "patch_size": 1, "negatives": "all_others"},
        ),
        (ValueError, "patch_size must exceed", {"patch_size": 1, "contrast": "spatial"}),
        (ValueError, "patch_size must be at least 1", {"patch_size": (4, 0)}),
        (TypeError, "patch_size must be an int or a pair", {"patch_size": 2.0}),
        (TypeError, "patch_size must be an int or a pair", {"patch_size": (1, 2, 3)}),
        (TypeError, "pool_size must be an int or a pair", {"pool_size": True}),
        (ValueError, "pool_size must be at least 1", {"pool_size": 0}),
        (ValueError, "temperature must be", {"temperature": 0.0}),
        (TypeError, "temperature must be", {"temperature": "0.07"}),
        (ValueError, "distance must be one of", {"distance": 1}),
        (ValueError, "negatives must be one of", {"negatives": "all"}),
        (ValueError, "ragged must be one of", {"ragged": "crop"}),
        (ValueError, "mask_ratio must be a number from 0 to 1", {"mask_ratio": 1.5}),
        (TypeError, "mask_ratio must be", {"mask_ratio": True}),
        (ValueError, "projector must be", {"projector": "deep"}),
        (ValueError, "mimic_weight must be", {"mimic_weight": -1.0}),
        (TypeError, "contrast_weight must be", {"contrast_weight": None}),
        (ValueError, "mimic_reduction must be one of", {"mimic_reduction": "none"}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
    ],
)
def test_bad_settings_raise_at_construction(error, words, changes):
    settings = {"student_channels": 8, "teacher_channels": 16} | changes
    with pytest.raises(error, match=words):
        AfDCDLoss(settings.pop("student_channels"), settings.pop("teacher_channels"), **settings)


S, T = torch.zeros(1, 3, 2, 3), torch.zeros(1, 4, 2, 3)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "student must be a tensor", {"student": None}),
        (ValueError, r"student must have shape \[B, 3, H, W\].*made for 3", {"student": T}),
        (ValueError, r"teacher must have shape \[B, 4, H, W\].*made for 4", {"teacher": S}),
        (ValueError, "Resize one of them", {"student": torch.zeros(1, 3, 4, 6)}),
        (ValueError, "teacher must be on", {"teacher": T.to("meta")}),
        (TypeError, "teacher must have a floating-point dtype", {"teacher": T.int()}),
        (
            TypeError,
            "drop_mask must be a bool.*set to zero",
            {"drop_mask": T},
        ),
        (ValueError, "drop_mask must have one entry a pixel", {"drop_mask": T == 0}),
        (ValueError, "valid_mask must have one entry a pixel", {"valid_mask": T == 0}),
    ],
)
def test_bad_inputs_are_named(error, words, changes):
    arguments = {"student": S, "teacher": T} | changes
    with pytest.raises(error, match=words):
        AfDCDLoss(3, 4, **SMALL)(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_projector_that_changes_the_shape_is_named():
    loss = AfDCDLoss(3, 4, **SMALL, projector=nn.Conv2d(4, 4, 2))
    with pytest.raises(ValueError, match="projector must keep the shape"):
        loss(S, T)
    loss.projector = nn.Module()
    loss.projector.forward = lambda x: (x, x)
    with pytest.raises(
        ValueError, match=r"projector must keep the shape .* it made <class 'tuple'>"
    ):
        loss(S, T)
    for words in ({"ragged": "crop"}, {"mimic_reduction": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(words))} must be one of"):
            af_dcd_terms(T, T, num_groups=2, **words)
    with pytest.raises(TypeError, match="valid_mask must be"):
        af_dcd_terms(T, T, num_groups=2, valid_mask=T)
    with pytest.raises(ValueError, match="num_groups must divide the student's 4 channels; got 3"):
        af_dcd_terms(T, T, num_groups=3)
    with pytest.raises(ValueError, match="equal to teacher's"):
        af_dcd_terms(S, T, num_groups=3)


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0])
def test_both_ends_of_mask_ratio_are_allowed(share):
    loss = AfDCDLoss(4, 4, num_groups=2, patch_size=2, pool_size=None, mask_ratio=share)
    recorder = loss.projector = Recorder()
    loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert bool((recorder.seen == 0).all()) == bool(share)
