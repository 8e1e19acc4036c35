"""What every public loss and module does at a call, whatever it computes; tests/cases.py lists them.

Training loops around them are in test_training_loops.py.
"""

import copy
import inspect
import io
import itertools
import math
import pickle
import re
import typing

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from cases import (
    ALL,
    LOSSES,
    MODULES,
    NARROW,
    WIDTH,
    ListLike,
    build,
    inputs,
    outcome,
    some_valid,
    tokens,
)
from helpers import (
    BACKENDS,
    ROOT,
    assert_close,
    assert_within_budget,
    device_of,
    float32_tolerance,
    fresh_compiler,
    high_precision,  # noqa: F401
    needs_torch,
    relative_error,
)
from ranks import results
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import pixdistill
from pixdistill import (
    AfDCDLoss,
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    MHSAPlugin,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
    functional,
)

loss_names = pytest.mark.parametrize("name", LOSSES)
all_names = pytest.mark.parametrize("name", ALL)
backends = pytest.mark.parametrize("backend", BACKENDS)

SAME_KERNELS = ("masked, levels", "af_dcd, aligned")
"""What they add to another case is PyTorch's: the interpreter need not run it."""


def on_backends(names):
    """Losses on every backend, modules once."""
    pairs = [
        (backend, name)
        for backend in BACKENDS
        for name in names
        if backend == "torch"
        or (name in LOSSES and (backend == "reference" or name not in SAME_KERNELS))
    ]
    return pytest.mark.parametrize(("backend", "name"), pairs)


each_loss, everything = on_backends(LOSSES), on_backends(ALL)
HALF = (torch.float16, torch.bfloat16)


def plain(name, loss, student, teacher, valid=None):
    """Value and gradients of the loss as people write it."""
    student = student.detach().requires_grad_()
    valid = valid if valid is not None else torch.ones_like(teacher[:, 0], dtype=torch.bool)
    value = LOSSES[name].plain(loss, student, teacher, valid)
    leaves = [student, *(p for p in loss.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach().reshape(1), grads


def assert_same(ours, truth, tolerance):
    """Equal values, and equal gradients of everything."""
    assert_close(ours[0], truth[0], tolerance)
    largest = max((grad.norm() for grad in truth[1]), default=0.0)  # some are zero to rounding
    for one, other in zip(ours[1], truth[1], strict=True):
        error = (one.double() - other.double()).norm()
        assert error <= 10 * tolerance * max(other.norm(), 1e-2 * largest), float(error)


# --- Values and dtypes ----------------------------------------------------------------------------

SIZES = ((6, 5), (1, 1), (1, 7), (5, 3), (8, 8), (11, 2))


@loss_names
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_loss_as_people_write_it(name, masked, size):
    """In float64, on maps of one pixel, of prime sizes, and with a mask."""
    loss, maps = build(name, dtype=torch.float64), inputs(name, 3, *size, dtype=torch.float64)
    valid = some_valid(3, *size) if masked else None
    assert_same(outcome(loss, *maps, valid=valid), plain(name, loss, *maps, valid), 1e-11)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_error_stays_within_twice_plain_pytorch(name, backend, dtype, masked):
    """A module and maps of one dtype, measured against float64 from the same rounded numbers."""
    maps, valid = inputs(name, dtype=dtype), some_valid() if masked else None
    ours = outcome(build(name, backend, dtype), *maps, valid=valid)
    plainly = plain(name, build(name, dtype=dtype).cpu(), *maps, valid)
    exact = copy.deepcopy(build(name, dtype=dtype)).cpu().double()
    truth = plain(name, exact, *(x.double() for x in maps), valid)
    tiny = float32_tolerance(backend) if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_within_budget(ours.value, plainly[0], truth[0], tiny)
    for mine, other, right in zip(ours.grads, plainly[1], truth[1], strict=True):
        assert mine.dtype == dtype
        if right.norm() > 1e-9:
            assert_within_budget(mine, other, right, 4 * tiny)


@each_loss
def test_autocast_stays_within_twice_plain_pytorch(name, backend):
    """float32 maps and parameters under autocast to bfloat16."""
    device = device_of(backend)
    maps, valid = inputs(name), some_valid()
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = outcome(build(name, backend), *maps, valid=valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plainly = plain(name, build(name).cpu(), *maps, valid)
    truth = plain(name, build(name, dtype=torch.float64).cpu(), *(x.double() for x in maps), valid)
    assert ours.value.dtype == torch.float32
    assert_within_budget(ours.value, plainly[0], truth[0], 1e-2)
    for mine, other, right in zip(ours.grads, plainly[1], truth[1], strict=True):
        assert mine.dtype == torch.float32
        if right.norm() > 1e-9:
            assert_within_budget(mine, other, right, 2e-2)


@all_names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_dtypes_of_results(name, dtype):
    """A loss is float32 at least, a map keeps its dtype, and gradients have that of their tensors."""
    module, maps = build(name, dtype=dtype), inputs(name, dtype=dtype)
    result = module(*(x.requires_grad_(i == 0) for i, x in enumerate(maps)))
    if name in LOSSES:
        assert result.dtype == torch.promote_types(dtype, torch.float32)
    else:
        result = result if isinstance(result, Tensor) else result[0]
        assert result.dtype == dtype
    result.sum().backward()
    for leaf in (maps[0], *module.parameters()):
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype


@loss_names
def test_autocast_leaves_float64_alone(name):
    loss, maps = build(name, dtype=torch.float64), inputs(name, dtype=torch.float64)
    if any(isinstance(layer, nn.Conv2d) for layer in loss.modules()) and "align" not in name:
        pytest.skip("autocast casts convolutions of every dtype")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(*maps)
    assert ours.dtype == torch.float64
    assert_close(ours, loss(*maps), 1e-12)


# --- Layouts --------------------------------------------------------------------------------------


def expanded(x):
    return x[:1, :, :, :1].expand_as(x)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "every other": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": expanded,
}


@everything
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(name, layout, backend):
    """Strides of student, teacher and mask change neither value nor gradients."""
    strided = [LAYOUTS[layout](x) for x in inputs(name)]
    maps = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    valid = some_valid() if name in LOSSES else None
    odd = valid if valid is None else valid.mT.contiguous().mT
    ours = outcome(build(name, backend), *strided, valid=odd)
    assert_same(ours, outcome(build(name, backend), *maps, valid=valid), float32_tolerance(backend))


@all_names
def test_inputs_are_left_as_they_were(name):
    maps = inputs(name)
    before = [x.clone() for x in maps]
    outcome(build(name), *maps)
    for one, other in zip(maps, before, strict=True):
        assert torch.equal(one, other)


# --- Nothing to compare, masks, NaN ---------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("what", ["no image", "no valid pixel", "no image and a mask"])
def test_nothing_to_compare_is_zero_attached_to_the_graph(name, backend, what):
    batch = 2 if what == "no valid pixel" else 0
    loss, device = build(name, backend), device_of(backend)
    student, teacher = (x.to(device) for x in inputs(name, batch))
    student.requires_grad_()
    valid = (
        None if what == "no image" else torch.zeros(batch, 6, 5, dtype=torch.bool, device=device)
    )
    value = loss(student, teacher, valid_mask=valid)
    assert value.shape == ()
    assert float(value.detach()) == 0
    value.backward()
    for leaf in (student, *(p for p in loss.parameters() if p.requires_grad)):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@each_loss
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_an_axis_of_size_zero_is_named_or_gives_zero(name, backend, axis):
    student, teacher = (x.narrow(axis, 0, 0).to(device_of(backend)) for x in inputs(name))
    try:
        value = build(name, backend)(student.requires_grad_(), teacher)
    except ValueError as error:
        if "student" not in str(error) and "teacher" not in str(error):
            raise
    else:
        value.backward()
        assert float(value.detach()) == 0


@pytest.mark.parametrize("name", MODULES)
def test_an_empty_batch_of_maps(name):
    if name == "PixelHead":
        pytest.skip("BatchNorm wants an image in train mode")
    came = outcome(build(name), *inputs(name, 0))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in came.grads)


@each_loss
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_invalid_pixels_may_hold_anything(name, backend, poison):
    """`valid_mask` deletes pixels: what they hold reaches neither value nor any gradient."""
    valid = some_valid()
    maps = inputs(name)
    clean = outcome(build(name, backend), *maps, valid=valid)
    bad = [x.masked_fill(~valid.unsqueeze(1), poison) for x in maps]
    ours = outcome(build(name, backend), *bad, valid=valid)
    assert_same(ours, clean, float32_tolerance(backend))
    hidden = ~valid.unsqueeze(1).expand_as(ours.grads[0])
    assert (ours.grads[0][hidden] == 0).all()
    assert clean.value.item() != outcome(build(name, backend), *maps).value.item()


@each_loss
@pytest.mark.filterwarnings(
    "ignore:All-NaN slice:RuntimeWarning"
)  # Triton's interpreter, of a maximum
@pytest.mark.parametrize("side", [0, 1])
def test_nan_at_a_valid_pixel_shows(name, backend, side):
    maps = inputs(name)
    maps[side][0, 3, 0, 0] = torch.nan  # of both levels
    assert outcome(build(name, backend), *maps).value.isnan().all()


# --- Gradients ------------------------------------------------------------------------------------


@each_loss
def test_the_teacher_never_gets_a_gradient(name, backend):
    """Also where it requires one; and no buffer of a loss changes by a call."""
    loss, device = build(name, backend), device_of(backend)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    student, teacher = (x.to(device).requires_grad_() for x in inputs(name))
    frozen = [p for p in loss.parameters() if not p.requires_grad]
    loss(student, teacher, valid_mask=some_valid().to(device)).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None
    assert all(parameter.grad is None for parameter in frozen)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@loss_names
def test_a_teacher_that_is_the_student_is_detached(name):
    """Self-distillation: the same tensor on both sides."""
    if ALL[name].width != WIDTH:
        pytest.skip("has maps of two widths")
    (student, _), grads = inputs(name), []
    for teacher in (student.requires_grad_(), student.detach().clone()):
        (grad,) = torch.autograd.grad(build(name)(student, teacher), student)
        grads.append(grad)
    assert torch.equal(*grads)


@each_loss
def test_backward_twice_and_scaled(name, backend):
    """Nothing that backward needs is changed by it, and gradients are linear in the cotangent."""
    loss = build(name, backend)
    student, teacher = (x.to(device_of(backend)) for x in inputs(name))
    value = loss(student.requires_grad_(), teacher, valid_mask=some_valid().to(student.device))
    leaves = [student, *(p for p in loss.parameters() if p.requires_grad)]
    once, twice = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    tripled = torch.autograd.grad(3 * value, leaves)
    for first, second, third in zip(once, twice, tripled, strict=True):
        assert torch.equal(first, second)
        assert_close(third, 3 * first, 1e-6)


@loss_names
def test_parameters_of_a_loss_train_with_a_frozen_student(name):
    loss, (student, teacher) = build(name), inputs(name)
    value = loss(student, teacher)
    expected = outcome(build(name), student, teacher).grads[1:]
    assert value.requires_grad == bool(expected)
    if expected:
        value.backward()
    trained = [p for p in loss.parameters() if p.requires_grad]
    for parameter, grad in zip(trained, expected, strict=True):
        assert_close(parameter.grad, grad, 1e-6)


@each_loss
def test_teacher_and_mask_may_come_from_inference_mode(name, backend):
    plainly = outcome(build(name, backend), *inputs(name), valid=some_valid())
    loss, device = build(name, backend), device_of(backend)
    with torch.inference_mode():
        teacher, valid = inputs(name)[1].to(device, copy=True), some_valid().to(device, copy=True)
    student = inputs(name)[0].to(device).requires_grad_()
    value = loss(student, teacher, valid_mask=valid)
    value.backward()
    assert_close(value, plainly.value.squeeze(), 1e-6)
    assert_close(student.grad, plainly.grads[0], 1e-6)


@each_loss
@pytest.mark.parametrize("side", [0, 1])
def test_a_map_that_is_overwritten_before_backward_is_refused_or_kept(name, backend, side):
    """Never a wrong gradient."""
    plainly = outcome(build(name, backend), *inputs(name))
    leaf, teacher = (x.to(device_of(backend)) for x in inputs(name))
    maps = [leaf.requires_grad_() * 1, teacher.clone()]
    value = build(name, backend)(*maps)
    with torch.no_grad():
        maps[side].mul_(2)
    try:
        value.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_close(leaf.grad, plainly.grads[0], float32_tolerance(backend))


@each_loss
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_teacher_may_have_another_dtype(name, backend, student_dtype, teacher_dtype):
    loss = build(name, backend, student_dtype)
    student, teacher = inputs(name)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    ours = outcome(loss, student, teacher)
    exact = build(name, dtype=student_dtype).cpu().double()
    truth = plain(name, exact, student.double(), teacher.double())
    coarse = max(torch.finfo(d).eps for d in (student_dtype, teacher_dtype))
    tolerance = max(float32_tolerance(backend), 8 * coarse)
    assert ours.grads[0].dtype == student_dtype
    assert_close(ours.value, truth[0], tolerance)
    assert_close(ours.grads[0], truth[1][0], 20 * tolerance)


@loss_names
def test_a_frozen_student_gives_a_value_without_gradient(name):
    loss, maps = build(name), inputs(name)
    with torch.no_grad():
        value = loss(*maps)
    assert not value.requires_grad
    assert_close(value, loss(maps[0].requires_grad_(), maps[1]), 1e-6)


@loss_names
def test_student_and_teacher_swapped_is_named(name):
    student, teacher = inputs(name)
    with pytest.raises(ValueError, match=r"student must require a gradient.*first argument"):
        build(name)(student, teacher.requires_grad_())
    with torch.no_grad():
        build(name)(student, teacher)


@each_loss
def test_double_backward_raises_or_is_right(name, backend):
    loss = build(name, backend, torch.float64 if backend != "triton" else torch.float32)
    maps = [x.to(loss_dtype(loss), copy=True) for x in inputs(name)]

    def second(loss):
        student = maps[0].to(device_of(backend)).requires_grad_()
        value = loss(student, maps[1].to(student))
        (grad,) = torch.autograd.grad(value, student, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), student)
        return again.cpu()

    truth = second(build(name, "reference", loss_dtype(loss)).to(device_of(backend)))
    try:
        ours = second(loss)
    except RuntimeError as error:
        if backend == "reference" or 'backend="reference"' not in str(error):
            raise
    else:
        assert_close(ours, truth, 10 * float32_tolerance(backend))


def loss_dtype(loss):
    tensors = itertools.chain(loss.parameters(), loss.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


@loss_names
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transforms_of_torch_func_raise_and_reference_works(name, transform, backend):
    student, teacher = (x.to(device_of(backend)) for x in inputs(name))
    direction = student.flip(0)  # along the student itself, a cosine does not change

    def transformed(loss):
        if transform == "grad":
            return torch.func.grad(lambda s: loss(s, teacher))(student)
        if transform == "jvp":
            return torch.func.jvp(lambda s: loss(s, teacher), (student,), (direction,))[1]
        each = torch.func.vmap(torch.func.grad(lambda s: loss(s, teacher)))
        return each(torch.stack([student, student.flip(0)]))

    if hasattr(build(name, backend), "backend"):  # a loss of plain PyTorch has none
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            transformed(build(name, backend))
    loss = build(name, "reference").to(device_of(backend))
    right = outcome(loss, student, teacher).grads[0].to(student)
    if transform == "jvp":
        assert_close(transformed(loss), (right * direction).sum(), 10 * float32_tolerance(backend))
        return
    ours = transformed(loss)
    assert_close(ours if transform == "grad" else ours[0], right, float32_tolerance(backend))


@pytest.mark.parametrize("name", ["contrast, batch", "masked", "af_dcd"])
def test_vmap_takes_a_teacher_that_requires_a_gradient(name):
    """It hides whether the student requires one."""
    student, teacher = inputs(name)
    loss, many = build(name, "reference"), torch.stack([student, student]).requires_grad_()
    teacher.requires_grad_()
    torch.func.vmap(lambda one: loss(one, teacher))(many).sum().backward()
    assert_close(many.grad[0], outcome(loss, *inputs(name)).grads[0], 1e-5)


# --- torch.compile --------------------------------------------------------------------------------


@loss_names
def test_compiled_whole_equals_eager(name):
    """With a mask and components, and all gradients; losses alone, and modules, in ten sizes are in
    test_training_loops.py.
    """
    (student, teacher), options = inputs(name), {"valid": some_valid(), "return_components": True}
    eager = outcome(build(name), student, teacher, **options)
    with fresh_compiler():
        compiled = torch.compile(build(name), fullgraph=True, backend="aot_eager")
        assert_same(outcome(compiled, student, teacher, **options), eager, 1e-5)
        maps = student.requires_grad_(), teacher
        parts = compiled(*maps, valid_mask=some_valid(), return_components=True)
    assert type(parts) is type(build(name)(*maps, return_components=True))


@loss_names
def test_components_start_with_the_loss(name):
    """A NamedTuple whose first field is the loss."""
    maps, valid = inputs(name), some_valid()
    value = build(name)(*maps, valid_mask=valid)
    parts = build(name)(*maps, valid_mask=valid, return_components=True)
    assert parts._fields[0] == "loss"
    assert torch.equal(parts.loss, value)
    assert build(name)(*maps, valid_mask=valid, return_components=False).shape == ()


class Trained(nn.Module):
    """A student's last layer with its loss, as DDP and FSDP wrap them together."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(ALL[name].width, ALL[name].width, kernel_size=1)
        self.loss = build(name)

    def forward(self, features, teacher, **options):
        return self.loss(self.layer(features), teacher, **options)


@loss_names
@pytest.mark.parametrize(
    "wrapper",
    ["DDP", pytest.param("FSDP2", marks=needs_torch("2.7", "FSDP2 does not run on a CPU"))],
)
def test_components_come_through_wrappers(name, wrapper):
    """Through their `forward`, so that gradients of the loss's own parameters are averaged."""
    expected = _components_and_gradients(Trained(name), name)
    # In a process of its own: destroying DDP's process group in this one can deadlock.
    (wrapped,) = results(1, _wrapped_components, name, wrapper)
    assert len(wrapped) == len(expected)
    for one, other in zip(wrapped, expected, strict=True):
        assert_close(one, other, 1e-6)


def _components_and_gradients(model, name):
    parts = model(*inputs(name), return_components=True)
    assert isinstance(parts, tuple)
    assert parts._fields[0] == "loss"
    parts.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    grads = [
        g.full_tensor() if isinstance(g, torch.distributed.tensor.DTensor) else g for g in grads
    ]
    return [x.detach() for x in (*parts, *grads)]


def _wrapped_components(rank, name, wrapper):
    if wrapper == "DDP":
        model = nn.parallel.DistributedDataParallel(Trained(name))
    else:
        model = fully_shard(Trained(name), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return _components_and_gradients(model, name)


# --- State ----------------------------------------------------------------------------------------


def use(module, name):
    """Everything that changes a module's state, and a backward."""
    for seed in (11, 12):
        outcome(module, *inputs(name, seed=seed))
    for part in module.modules():
        if isinstance(part, PixelQueue):
            part.enqueue_pooled(inputs(name)[-1])
        if isinstance(part, MaskedDistillationLoss):
            part.step()
    return module


def loaded(module, name):
    fresh = ALL[name].build()  # other random numbers
    fresh.load_state_dict(module.state_dict())
    return fresh


def reloaded(module, name):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = ALL[name].build()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


CLONES = {
    "state_dict": loaded,
    "file": reloaded,
    "deepcopy": lambda module, name: copy.deepcopy(module),
    "pickle": lambda module, name: pickle.loads(pickle.dumps(module)),
}


@all_names
@pytest.mark.parametrize("clone", CLONES)
def test_copies_continue_exactly_and_are_independent(name, clone):
    module = use(build(name), name)
    twin = CLONES[clone](module, name)
    assert twin.training == module.training
    ours, other = outcome(twin, *inputs(name)), outcome(module, *inputs(name))
    assert torch.equal(ours.value, other.value)
    for one, two in zip(ours.grads, other.grads, strict=True):
        assert torch.equal(one, two)
    use(twin, name)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert torch.equal(outcome(module, *inputs(name)).value, other.value)


@all_names
def test_loading_names_a_missing_key(name):
    state = build(name).state_dict()
    for key in state:
        if key.endswith("num_batches_tracked"):  # which PyTorch lets be missing
            continue
        partial = {other: value for other, value in state.items() if other != key}
        with pytest.raises(RuntimeError, match=re.escape(key)):
            build(name).load_state_dict(partial)


@all_names
def test_built_without_memory_and_loaded(name):
    """meta device -> to_empty -> load_state_dict: large models are built so."""
    module = build(name)
    with torch.device("meta"):
        other = ALL[name].build()
    assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
    other = other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(outcome(other, *inputs(name)).value, outcome(module, *inputs(name)).value)


@all_names
def test_a_module_on_the_meta_device_computes_shapes(name):
    """Tools that count memory and operations run a network so."""
    with torch.device("meta"):
        module = ALL[name].build()
        maps = [torch.empty(x.shape) for x in inputs(name)]
    result = module(*maps)
    for one in (result,) if isinstance(result, Tensor) else result:
        assert one.is_meta
    if any(True for _ in itertools.chain(module.parameters(), module.buffers())):
        with pytest.raises((ValueError, RuntimeError), match="meta"):  # never numbers from nothing
            module(*inputs(name))


@all_names
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_modules_keep_their_integers(name, dtype):
    """`.half()` and `.to(bfloat16)` leave counts and pointers exact, and the module usable."""
    module = use(build(name), name)
    integers = {k: v.clone() for k, v in module.state_dict().items() if not v.is_floating_point()}
    half = copy.deepcopy(module).to(dtype)
    for key, value in half.state_dict().items():
        assert key in integers or value.dtype == dtype
        assert key not in integers or torch.equal(value, integers[key])
    ours = outcome(half, *inputs(name, dtype=dtype))
    assert relative_error(ours.value, outcome(module, *inputs(name)).value) < 0.1


# --- Surroundings ---------------------------------------------------------------------------------


@everything
def test_the_default_dtype_does_not_matter(name, backend):
    module, twin = build(name, backend), build(name, backend)
    options = {"valid": some_valid()} if name in LOSSES else {}
    plainly = outcome(module, *inputs(name), **options)
    maps = inputs(name)
    torch.set_default_dtype(torch.float64)
    try:
        ours = outcome(twin, *maps, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.value.dtype == torch.float32
    assert_same(ours, plainly, 1e-6)


@all_names
def test_exports(name):
    module, maps = build(name), inputs(name)
    with fresh_compiler():
        program = torch.export.export(module, maps, strict=False)
    expected, ours = build(name)(*maps), program.module()(*maps)
    for one, other in zip(
        *((r,) if isinstance(r, Tensor) else r for r in (ours, expected)), strict=True
    ):
        assert_close(one, other, 1e-5)


@all_names
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits_twice(name, backend):
    if backend == "triton" and name in (*MODULES, *SAME_KERNELS):
        pytest.skip("has no kernels of its own")
    valid = some_valid() if name in LOSSES else None
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (outcome(build(name, backend), *inputs(name), valid=valid) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(one.value, two.value)
    for first, second in zip(one.grads, two.grads, strict=True):
        assert torch.equal(first, second)


# --- Tensor subclasses ----------------------------------------------------------------------------


class Tagged(Tensor):
    """Carries metadata through every operator, as the tensors of medical imaging do."""

    @staticmethod
    def __new__(cls, data, tag="scan"):
        made = data.as_subclass(cls)
        made.tag = tag
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls) and not hasattr(result, "tag"):
            result.tag = "scan"
        return result

    def new_empty(self, size, **options):
        return type(self)(self.as_subclass(Tensor).new_empty(tuple(size), **options))


@everything
def test_tensors_that_carry_metadata(name, backend):
    plainly = outcome(build(name, backend), *inputs(name))
    device = device_of(backend)
    maps = [Tagged(x.to(device)) for x in inputs(name)]
    ours = outcome(build(name, backend), *maps)
    for one, other in zip((ours.value, *ours.grads), (plainly.value, *plainly.grads), strict=True):
        assert_close(one.as_subclass(Tensor), other, float32_tolerance(backend))


class DTensor(Tensor):
    """Has the name of a sharded tensor, which needs ranks."""


@all_names
def test_sharded_maps_are_named(name):
    if name == "PixelHead":
        pytest.skip("has no checks, see ONE_INPUT")
    maps = [x.as_subclass(DTensor) for x in inputs(name)]
    with pytest.raises(TypeError, match=r"must be a plain tensor; got a DTensor.*full_tensor\(\)"):
        build(name)(*maps)


@pytest.mark.parametrize("name", ["SpatialAdaptor", "MaskedReceptiveTokens", "masked"])
def test_layers_that_are_sharded_by_themselves_are_named(name):
    """They are read and not called, so that FSDP would not gather them."""
    module = build(name)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(DTensor))
    with pytest.raises(TypeError, match="must be sharded as a whole"):
        module(*inputs(name))


# --- Settings -------------------------------------------------------------------------------------

BUILD = {
    AfDCDLoss: lambda **given: AfDCDLoss(
        **{"student_channels": 16, "teacher_channels": 16, **given}
    ),
    MaskedDistillationLoss: lambda **given: MaskedDistillationLoss(
        tokens(), **{"student_channels": 16, "customize_after": 2, **given}
    ),
    MaskedReceptiveTokens: lambda **given: MaskedReceptiveTokens(**{"channels": 16, **given}),
    MHSAPlugin: lambda **given: MHSAPlugin(**{"channels": 16, "num_heads": 4, **given}),
    PixelContrastLoss: PixelContrastLoss,
    PixelHead: lambda **given: PixelHead(
        **{"in_channels": 16, "hidden": 8, "out_channels": 16, **given}
    ),
    PixelQueue: lambda **given: PixelQueue(**{"size": 8, "dim": 16, **given}),
    SpatialAdaptor: lambda **given: SpatialAdaptor(nn.Linear(16, 16), **given),
}
"""How to build each public module with some settings changed."""

NUMBERS = {
    "temperature": 0.5,
    "mimic_weight": 0.5,
    "contrast_weight": 0.5,
    "mask_ratio": 0.5,
    "eps": 0.5,
}
INTEGERS = {
    "student_channels": 8,
    "teacher_channels": 32,
    "num_groups": 4,
    "patch_size": 2,
    "pool_size": 2,
    "customize_after": 3,
    "channels": 32,
    "num_tokens": 4,
    "num_heads": 2,
    "key_stride": 2,
    "in_channels": 8,
    "hidden": 4,
    "out_channels": 8,
    "size": 4,
    "dim": 8,
}
"""A value of each that is not the one of BUILD, nor the default."""
PAIRS = ("patch_size", "pool_size")


def settings_of(kinds):
    """(module, setting, value) of each public module that has the setting."""
    for kind in BUILD:
        for argument in inspect.signature(kind).parameters:
            if argument in kinds:
                yield pytest.param(
                    kind, argument, kinds[argument], id=f"{kind.__name__} {argument}"
                )


def flags_and_choices(wanted):
    """(module, setting, a value that is not its default)."""
    for kind in BUILD:
        hints = typing.get_type_hints(kind.__init__)
        for argument, parameter in inspect.signature(kind).parameters.items():
            words = [value for value in choices(hints[argument]) if isinstance(value, str)]
            if isinstance(parameter.default, bool):
                found, other = "flag", not parameter.default
            elif isinstance(parameter.default, str) or words:
                found, other = "choice", next((w for w in words if w != parameter.default), None)
            else:
                continue
            if found == wanted:
                yield pytest.param(kind, argument, other, id=f"{kind.__name__} {argument}")


def choices(hint):
    """The values of a Literal, inside a union too."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for part in typing.get_args(hint) for value in choices(part)]


REQUIRES = {"gather_mode": {"gather_distributed": True}}
"""Settings that mean something only with another one."""


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        *settings_of(NUMBERS),
        *settings_of(INTEGERS),
        *flags_and_choices("flag"),
        *flags_and_choices("choice"),
    ],
)
def test_repr_shows_every_setting(kind, argument, value):
    assert value is not None, f"{argument} must be annotated as a Literal"
    others = REQUIRES.get(argument, {})
    assert repr(BUILD[kind](**others, **{argument: value})) != repr(BUILD[kind](**others))


def test_every_public_module_is_listed():
    public = {
        each
        for each in vars(pixdistill).values()
        if isinstance(each, type) and issubclass(each, nn.Module)
    }
    assert public == {*BUILD, pixdistill.L2Norm}
    listed = {type(build(name)) for name in ALL} | {PixelQueue}
    assert {each for each in public if each.__name__.endswith("Loss")} <= listed


@pytest.mark.parametrize(("kind", "argument", "value"), list(settings_of(NUMBERS)))
def test_numbers_may_be_of_numpy_and_not_words(kind, argument, value):
    plainly = BUILD[kind](**{argument: value})
    for given in (np.float32(value), np.float64(value), *([int(value)] if value == 2 else [])):
        assert repr(BUILD[kind](**{argument: given})) == repr(plainly)
    for wrong in (str(value), True, torch.nan, [value]):
        with pytest.raises((TypeError, ValueError), match=argument):
            BUILD[kind](**{argument: wrong})


@pytest.mark.parametrize(("kind", "argument", "value"), list(settings_of(INTEGERS)))
def test_integers_may_be_of_numpy_and_not_words(kind, argument, value):
    plainly = BUILD[kind](**{argument: value})
    ours = BUILD[kind](**{argument: np.int64(value)})
    assert repr(ours) == repr(plainly)
    for wrong in (str(value), True, float(value), -1):
        with pytest.raises((TypeError, ValueError), match=argument):
            BUILD[kind](**{argument: wrong})


@pytest.mark.parametrize(("kind", "argument", "value"), list(settings_of(dict.fromkeys(PAIRS, 2))))
def test_pairs_may_be_any_sequence_of_two(kind, argument, value):
    plainly = BUILD[kind](**{argument: (2, 4)})
    for given in ([2, 4], ListLike(2, 4), np.array([2, 4]), torch.Size([2, 4])):
        assert repr(BUILD[kind](**{argument: given})) == repr(plainly)
    for wrong in ((2, 4, 2), (2,), "24", (2.0, 4), (2, "4")):
        with pytest.raises((TypeError, ValueError), match=argument):
            BUILD[kind](**{argument: wrong})


@pytest.mark.parametrize(("kind", "argument", "value"), list(flags_and_choices("flag")))
def test_flags_are_true_or_false(kind, argument, value):
    plainly = BUILD[kind](**{argument: value})
    assert repr(BUILD[kind](**{argument: np.bool_(value)})) == repr(plainly)
    for wrong in ("True", "no", 1, None):
        with pytest.raises((TypeError, ValueError), match=argument):
            BUILD[kind](**{argument: wrong})


@pytest.mark.parametrize(("kind", "argument", "value"), list(flags_and_choices("choice")))
def test_choices_name_what_they_are(kind, argument, value):
    plainly = BUILD[kind](**{argument: value})
    assert repr(BUILD[kind](**{argument: np.str_(value)})) == repr(plainly)
    for wrong in ("something else", 3, True):
        with pytest.raises((TypeError, ValueError), match=argument):
            BUILD[kind](**{argument: wrong})


# --- Errors ---------------------------------------------------------------------------------------
# What a message says must be done stands in it word for word, and makes the call work.


def given(name, **changes):
    """Student, teacher and mask of a 6 x 8 map, some of them replaced by a function of themselves."""
    student, teacher = inputs(name, 2, 6, 8)
    valid = some_valid(2, 6, 8)
    made = {"student": student, "teacher": teacher, "valid_mask": valid}
    return made | {key: change(made[key]) for key, change in changes.items()}


def larger(x):
    """At the images' resolution."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


def labels(valid):
    """A label map with 255 for what is not labelled."""
    return torch.where(valid, 3, 255)


TYPES = {
    "int": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}


def call(name, arguments):
    arguments = dict(arguments)
    return build(name)(arguments.pop("student"), arguments.pop("teacher"), **arguments)


direct = pytest.mark.parametrize("name", [name for name in LOSSES if "levels" not in name])
sides = pytest.mark.parametrize("side", ["student", "teacher"])


def message_of(name, arguments, kind=(TypeError, ValueError)):
    with pytest.raises(kind) as caught:
        call(name, arguments)
    return str(caught.value)


def remedied(message, remedy, arguments, side):
    """The arguments after the remedy, which the message must give word for word."""
    assert remedy in message, message
    names = {"F": nn.functional, "nn": nn, "H": 6, "W": 8}
    names |= {"tokens_to_map": lambda x, grid: pixdistill.tokens_to_map(x, grid, prefix_tokens=0)}
    return arguments | {side: eval(remedy, names | arguments)}


@direct
@sides
@pytest.mark.parametrize("what", TYPES)
def test_other_dtypes_are_named(name, side, what):
    arguments = given(name, **{side: TYPES[what]})
    message = message_of(name, arguments, TypeError)
    assert message.startswith(side)
    assert str(arguments[side].dtype) in message
    assert "float16, bfloat16, float32" in message
    if what != "complex":
        call(name, remedied(message, f"{side}.float()", arguments, side))


@direct
@sides
def test_a_mapping_for_a_map_is_named(name, side):
    """torchvision's backbones return one. A loss of levels may take it for them, on both sides."""
    arguments = given(name, **{side: lambda x: {"out": x}})
    message = message_of(name, arguments)
    assert side in message
    call(name, remedied(message, f"{side}['out']", arguments, side))


@direct
@sides
@pytest.mark.parametrize("what", ["ndarray", "list", "torch.sparse_coo", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_tensor_is_named(name, side, what):
    change = {
        "ndarray": lambda x: x.numpy(),
        "list": lambda x: [*x, *x],
        "torch.sparse_coo": lambda x: x.to_sparse(),
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
    }
    message = message_of(name, given(name, **{side: change[what]}))
    assert message.startswith(side)
    assert what in message or "entry per level" in message


@direct
@sides
def test_channels_last_maps_suggest_permute(name, side):
    arguments = given(name, **{side: lambda x: x.permute(0, 2, 3, 1)})
    message = message_of(name, arguments, ValueError)
    call(name, remedied(message, f"{side}.permute(0, 3, 1, 2)", arguments, side))


@direct
@sides
def test_tokens_suggest_tokens_to_map(name, side):
    arguments = given(name, **{side: lambda x: x.flatten(2).mT})
    message = message_of(name, arguments, ValueError)
    call(name, remedied(message, f"tokens_to_map({side}, grid=(H, W))", arguments, side))


@direct
@sides
def test_flattened_maps_suggest_unflatten(name, side):
    arguments = given(name, **{side: lambda x: x.flatten(2)})
    message = message_of(name, arguments, ValueError)
    size = "(6, 8)" if "(6, 8)" in message else "(H, W)"
    call(name, remedied(message, f"{side}.unflatten(2, {size})", arguments, side))


@direct
@sides
@pytest.mark.parametrize("axis", [0, 2, 3])
def test_shapes_that_differ_are_named_with_a_remedy_that_fits(name, side, axis):
    """A batch is never to be resized; a size is."""
    arguments = given(name, **{side: lambda x: x.repeat_interleave(2, axis)})
    del arguments["valid_mask"]
    message = message_of(name, arguments, ValueError)
    for one in ("student", "teacher"):
        assert str(tuple(arguments[one].shape)) in message, message
    if axis == 0:
        assert "interpolate" not in message
        assert "batch" in message
        if side == "student":
            remedy = "teacher.repeat_interleave(2, dim=0)"
            call(name, remedied(message, remedy, arguments, "teacher"))
    else:
        size = tuple(arguments["teacher"].shape[2:])
        remedy = f"F.interpolate(student, {size}, mode='bilinear')"
        call(name, remedied(message, remedy, arguments, "student"))


@pytest.mark.parametrize("name", ["contrast, batch", "masked", "af_dcd"])
def test_channels_that_differ_are_named(name):
    arguments = given(name, student=lambda x: x[:, :NARROW])
    message = message_of(name, arguments, ValueError)
    assert str(tuple(arguments["student"].shape)) in message
    assert str(WIDTH) in message


@direct
def test_another_device_is_named(name):
    for argument in ("teacher", "valid_mask"):
        arguments = given(name, **{argument: lambda x: x.to("meta")})
        message = message_of(name, arguments, ValueError)
        assert message.startswith(f"{argument} must be on the student's device, cpu; got meta")
        assert "to_empty()" in message  # `.to` cannot move what has no data
    arguments = given(name, student=lambda x: x.to("meta"))
    message = message_of(name, arguments, ValueError)
    assert "must be on the student's device, meta; got cpu" in message
    assert ".to('meta')" in message


MASKS = {
    "labels": (labels, "labels != 255"),
    "labels of an image file": (lambda v: labels(v).to(torch.uint8), "labels != 255"),
    "float": (lambda v: v.float(), "mask > 0"),
    "uint8": (lambda v: v.to(torch.uint8), "mask > 0"),
    "array": (lambda v: v.numpy(), "torch.as_tensor(mask)"),
    "one channel": (lambda v: v.unsqueeze(1), "valid_mask.squeeze(1)"),
    "transposed": (lambda v: v.mT, "valid_mask.transpose(1, -1)"),
    "images' size, one channel": (
        lambda v: larger(v).unsqueeze(1),
        'F.interpolate(valid_mask.float(), (6, 8), mode="nearest")[:, 0] > 0',
    ),
    "images' size": (
        larger,
        'F.interpolate(valid_mask[:, None].float(), (6, 8), mode="nearest")[:, 0] > 0',
    ),
}


@direct
@pytest.mark.parametrize("what", MASKS)
def test_a_mask_that_is_none_says_what_to_write(name, what):
    change, remedy = MASKS[what]
    right = given(name)
    arguments = given(name, valid_mask=change)
    message = message_of(name, arguments)
    assert message.startswith("valid_mask")
    assert remedy in message, message
    names = dict.fromkeys(("labels", "mask", "valid_mask"), arguments["valid_mask"])
    names |= {"F": nn.functional, "torch": torch}
    fixed = arguments | {"valid_mask": eval(remedy, names)}
    assert torch.equal(call(name, fixed), call(name, right))


def test_one_mask_for_all_images_is_to_be_expanded():
    arguments = given("contrast, batch", valid_mask=lambda v: v[0])
    message = message_of("contrast, batch", arguments, ValueError)
    assert "valid_mask.expand(2, 6, 8)" in message
    call("contrast, batch", arguments | {"valid_mask": arguments["valid_mask"].expand(2, 6, 8)})


@direct
@pytest.mark.parametrize("shape", [(2, 8, 6), (1, 6, 8), (6, 8), (2, 6)])
def test_masks_of_other_shapes_are_named(name, shape):
    arguments = given(name, valid_mask=lambda v: torch.ones(shape, dtype=torch.bool))
    message = message_of(name, arguments, ValueError)
    assert message.startswith("valid_mask")
    assert str(shape) in message
    assert "(2, 6, 8)" in message


@direct
def test_every_argument_but_the_maps_is_by_keyword(name):
    with pytest.raises(TypeError):
        build(name)(*inputs(name), some_valid())


# --- Errors of modules and functions --------------------------------------------------------------

ONE_INPUT = {
    **{name: lambda x, name=name: build(name)(x) for name in MODULES if name != "PixelHead"},
    "PixelQueue.enqueue": lambda x: PixelQueue(8, WIDTH).enqueue(x),
    "PixelQueue.enqueue_pooled": lambda x: PixelQueue(8, WIDTH).enqueue_pooled(x),
}
"""Everything that takes one tensor but PixelHead, which torch.fx can trace: it has PyTorch's layers."""


def input_of(name):
    return inputs("masked")[1][:, :, 0, 0] if name == "PixelQueue.enqueue" else inputs("masked")[1]


def argument_of(function):
    return next(each for each in inspect.signature(function).parameters if each != "self")


ARGUMENTS = {
    **{name: argument_of(type(build(name)).forward) for name in MODULES},
    "PixelQueue.enqueue": argument_of(PixelQueue.enqueue),
    "PixelQueue.enqueue_pooled": argument_of(PixelQueue.enqueue_pooled),
}
one_input = pytest.mark.parametrize("name", ONE_INPUT)


@one_input
@pytest.mark.parametrize("what", [*TYPES, "mapping", "array"])
def test_modules_name_what_is_no_floating_point_tensor(name, what):
    change = TYPES | {"mapping": lambda x: {"out": x}, "array": lambda x: x.numpy()}
    wrong = change[what](input_of(name))
    with pytest.raises(TypeError) as caught:
        ONE_INPUT[name](wrong)
    message = str(caught.value)
    assert message.startswith(ARGUMENTS[name])
    assert (str(wrong.dtype) if what in TYPES else type(wrong).__name__) in message


@one_input
@pytest.mark.parametrize("what", ["other channels", "no batch", "channels last", "tokens"])
def test_modules_name_the_shape_they_want(name, what):
    if name == "PixelQueue.enqueue" and what in ("channels last", "tokens"):
        pytest.skip("takes vectors")
    x, argument = input_of(name), ARGUMENTS[name]
    changes = {
        "other channels": lambda: x[:, :NARROW],
        "no batch": lambda: x[0],
        "channels last": lambda: x.movedim(1, -1),
        "tokens": lambda: x.flatten(2).mT,
    }
    wrong = changes[what]()
    with pytest.raises(ValueError, match=argument) as caught:
        ONE_INPUT[name](wrong)
    message = str(caught.value)
    assert str(tuple(wrong.shape)) in message
    assert str(WIDTH) in message
    remedies = {
        "channels last": f"{argument}.permute(0, 3, 1, 2)",
        "tokens": f"tokens_to_map({argument}, grid=(H, W))",
    }
    assert remedies.get(what, "") in message


GROUPS = {"num_groups": 4, "patch_size": 1}


def beside(x, *shape):
    """Another argument of the function, which fits x."""
    return torch.linspace(0.1, 1, math.prod(shape or x.shape), device=x.device).view(
        shape or x.shape
    )


FUNCTIONS = {
    "pixel_contrast_loss": lambda x: (
        x,
        {"teacher": beside(x), "queue_keys": beside(x, 7, x.shape[-1])},
    ),
    "masked_distillation_loss": lambda x: (
        x,
        {
            "teacher": beside(x),
            "masks": beside(x[:, :3]),
            "weights": beside(x, len(x), min(3, x.shape[1])),
        },
    ),
    "af_dcd_loss": lambda x: (x, {"teacher": beside(x)}, {**GROUPS, "pool_size": None}),
    "row_lse": lambda x: (x, {"keys": beside(x)}, {"scale": 1.0}),
    "patch_lse": lambda x: (x, {"teacher": beside(x)}, {**GROUPS, "temperature": 0.5}),
    "token_masks": lambda x: (x, {"mask_token": beside(x, 3, x.shape[1])}),
    "mask_diversity": lambda x: (x, {}),
    "pooled_convolution": lambda x: (
        x,
        {"weight": beside(x, 4, x.shape[1], 3, 3), "bias": beside(x, 4)},
    ),
}
"""The first argument, which x becomes, the other tensors, and settings."""


def call_function(name, x, changes=None, **options):
    x, tensors, *settings = FUNCTIONS[name](x)
    for key, change in (changes or {}).items():
        tensors[key] = change(tensors[key])
    return getattr(functional, name)(x, **tensors, **(settings[0] if settings else {}), **options)


def test_every_public_function_is_listed():
    assert set(FUNCTIONS) == {name for name in vars(functional) if not name.startswith("_")}
    assert all(hasattr(getattr(functional, name), "__doc__") for name in FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what", TYPES)
def test_functions_name_other_dtypes(name, what):
    function, x = getattr(functional, name), input_of(name)
    call_function(name, x)
    wrong = TYPES[what](x)
    with pytest.raises(TypeError) as caught:
        call_function(name, wrong)
    assert str(caught.value).startswith(argument_of(function))
    assert str(wrong.dtype) in str(caught.value)
    for other in FUNCTIONS[name](x)[1]:
        with pytest.raises(TypeError, match=f"^{other} must be .*{wrong.dtype}"):
            call_function(name, x, {other: TYPES[what]})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_other_shapes_and_devices(name):
    x = input_of(name)
    for other in FUNCTIONS[name](x)[1]:
        for change in (lambda value: value[..., :-1], lambda value: value.to("meta")):
            with pytest.raises(ValueError, match=rf"\b{other}\b"):
                call_function(name, x, {other: change})


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", range(4))
def test_functions_name_an_axis_of_size_zero_or_are_finite(name, axis):
    x = input_of(name).narrow(axis, 0, 0)
    try:
        value = call_function(name, x)
    except ValueError as error:
        if axis == 0 or "must" not in str(error):
            raise
    else:
        assert not value.isnan().any()


@pytest.mark.parametrize("name", FUNCTIONS)
@backends
def test_functions_on_the_meta_device_compute_shapes(name, backend):
    function, x = getattr(functional, name), input_of(name)
    options = {"backend": backend}
    if "backend" not in inspect.signature(function).parameters:
        options = {}
    expected = call_function(name, x)
    ours = call_function(name, x.to("meta").requires_grad_(), **options)
    assert ours.is_meta
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    ours.sum().backward()


# --- Nothing waits for the GPU --------------------------------------------------------------------

WAITS = {
    # Sizes of tensors on other ranks live on the host.
    "_distributed.py": [".tolist("],
    # A report that is printed.
    "__main__.py": [".cpu("],
    # Maps on a CPU only.
    "ops/patch_lse/chunked.py": ["nonzero(", "nonzero("],
}
"""All calls in the package that may wait for a GPU, and why they may."""


def test_no_host_synchronisation_in_the_package():
    """test_training_loops.py looks at what runs, and captures a graph where there is a GPU."""
    package = ROOT / "pixdistill"
    waits = re.compile(r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|nonzero\(|synchronize\(")
    for path in sorted(package.rglob("*.py")):
        found = waits.findall(path.read_text())
        assert found == WAITS.get(str(path.relative_to(package)), []), path
