"""Every loss and module in a small training loop, in the ways in which users run one.

What they do at a single call is in test_every_loss.py.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from cases import ALL, LOSSES, WIDTH, build, inputs
from helpers import assert_close, fresh_compiler, relative_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pixdistill import MaskedDistillationLoss, PixelQueue


class Distillation(nn.Module):
    """A student, a frozen teacher, and a loss between their maps of the images' size.

    A module that is not a loss stands in front of one: the adaptor on the teacher's map, the others on
    the student's.
    """

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(2)
        self.student = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=3, padding=1),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, ALL[name].width, kernel_size=1),
        )
        self.teacher = nn.Conv2d(3, WIDTH, kernel_size=3, padding=1)
        self.on_student, self.on_teacher = nn.Identity(), nn.Identity()
        if name in LOSSES:
            self.criterion = build(name)
        else:
            self.criterion = build("contrast, image")
            side = "on_teacher" if name == "SpatialAdaptor" else "on_student"
            setattr(self, side, build(name))
        self.teacher.requires_grad_(False)
        self.on_teacher.requires_grad_(False)

    def forward(self, images, valid_mask=None):
        return self.criterion(self.mapped(images), self.target(images), valid_mask=valid_mask)

    def mapped(self, images):
        return self.on_student(self.student(images))

    def target(self, images):
        with torch.no_grad():
            return self.on_teacher(self.teacher(images))

    def after_step(self, images):
        """What follows `optimizer.step()`: the only part that changes a loss."""
        for part in self.criterion.modules():
            if isinstance(part, PixelQueue):
                part.enqueue_pooled(self.target(images))
            if isinstance(part, MaskedDistillationLoss):
                part.step()


NAMES = [
    name for name in ALL if name != "MaskedReceptiveTokens"
]  # they are learned without a student

BATCH_WIDE = {"contrast, batch": "its negatives are the batch", "PixelHead": "it has BatchNorm"}
"""Where one large batch is more than its images one by one."""

SIZES = (
    *((2, 8, 12), (3, 12, 8), (2, 16, 8), (4, 8, 8), (2, 12, 20)),
    *((5, 8, 16), (2, 20, 12), (3, 16, 16), (6, 8, 12), (2, 24, 8)),
)
"""Images, rows and columns of ten steps."""


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def images_of(batch=2, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def trained(model):
    return {key: value for key, value in model.named_parameters() if value.requires_grad}


def gradients(model, loss):
    """One vector. Everything that is trained gets a gradient, and nothing else does."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert all(p.grad is not None for p in trained(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return torch.cat([p.grad.flatten() for p in trained(model).values()]).float()


# --- torch.compile and torch.func -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_compiles_once_with_student_and_optimizer_for_ten_steps(name):
    """Equal parameters after ten steps of changing sizes; after the first step nothing compiles."""
    model = Distillation(name)
    twin = copy.deepcopy(model)
    with fresh_compiler():
        forward, update = (CompileCounterWithBackend("aot_eager") for _ in range(2))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=forward)
        optimizers = [torch.optim.SGD(trained(each).values(), lr=0.1) for each in (model, twin)]
        step = optimizers[0].step
        if name == "contrast, batch":  # once is enough: it is PyTorch's, and slow to compile
            step = torch.compile(step, backend=update)
        counts = []
        for seed, size in enumerate(SIZES):
            images = images_of(*size, seed=seed)
            ours, eager = compiled(images), twin(images)
            assert_close(ours, eager, 1e-5)
            assert_close(gradients(model, ours), gradients(twin, eager), 1e-4)
            step()
            optimizers[1].step()
            model.after_step(images)
            twin.after_step(images)
            counts.append((forward.frame_count, update.frame_count))
    assert counts == [counts[0]] * len(SIZES)
    for (key, ours), eager in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            assert_close(ours, eager, 1e-4)
        else:
            assert torch.equal(ours, eager), key


def test_functional_call_takes_other_parameters(name):
    model, other, images = Distillation(name), Distillation(name), images_of()
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.mul_(1.2)
    before = model(images)
    given = dict(other.named_parameters())
    loss = torch.func.functional_call(model, given, (images,))
    wanted = list(trained(other).values())
    grads = torch.autograd.grad(loss, wanted)
    other.load_state_dict(model.state_dict() | dict(other.named_parameters()))
    expected = other(images)
    assert_close(loss, expected, 1e-6)
    assert_close(torch.cat([g.flatten() for g in grads]), gradients(other, expected), 1e-6)
    assert abs(float((before - loss).detach())) > 1e-4
    assert_close(model(images), before, 1e-6)


# --- Checkpointing, accumulation, scaling ---------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_student_has_the_same_gradients(name, reentrant):
    """The student is recomputed in backward, the loss is not; the queue has moved by then."""
    model, images = Distillation(name), images_of().requires_grad_()
    plain = gradients(model, model(images))
    mapped = checkpoint(model.mapped, images, use_reentrant=reentrant)
    loss = model.criterion(mapped, model.target(images.detach()))
    model.after_step(images.detach())
    assert_close(gradients(model, loss), plain, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_loss_has_the_same_gradients(name, reentrant):
    """Student and loss are recomputed in backward."""
    model, images = Distillation(name), images_of().requires_grad_()
    plain = gradients(model, model(images))
    loss = checkpoint(model, images, use_reentrant=reentrant)
    assert_close(gradients(model, loss), plain, 1e-6)


def test_accumulated_gradients(name):
    """The mean of the micro-batches' losses is the loss of the batch where images are independent.

    With `negatives="batch"` it is another loss, as a micro-batch holds fewer negatives; and BatchNorm
    has other statistics there.
    """
    model, images = Distillation(name), images_of(6)
    whole = gradients(model, model(images))
    model.zero_grad()
    for part in images.split(2):
        (model(part) / 3).backward()
    parts = torch.cat([parameter.grad.flatten() for parameter in trained(model).values()])
    error = relative_error(parts, whole)
    assert error > 1e-3 if name in BATCH_WIDE else error < 1e-5


def test_accumulated_sums_of_uneven_masked_batches():
    """Where valid pixels differ in number, `reduction="sum"` accumulates, divided by all of them."""
    images = images_of(5)
    valid = torch.rand(5, 8, 12, generator=torch.Generator().manual_seed(1)) > 0.4
    mean, total = (Distillation("contrast, image") for _ in range(2))
    total.criterion.reduction = "sum"

    whole = gradients(mean, mean(images, valid))
    parts = sum(
        gradients(total, total(images[part], valid[part]) / valid.sum())
        for part in (slice(0, 2), slice(2, 5))
    )
    assert_close(parts, whole, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_scaler(name, dtype):
    """Under autocast: unscaled gradients near those in float32, five steps taken, none skipped.

    The student and its BatchNorm round too; what the losses may lose is in their own tests.
    """
    model, images = Distillation(name), images_of()
    plain = gradients(model, model(images))
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for step in range(5):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(images)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            ours = torch.cat([value.grad.flatten() for value in trained(model).values()])
            assert_close(ours, plain, 0.1)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert scaler.get_scale() == 2.0**10
    assert losses[-1] < losses[0]


def test_grad_scaler_skips_a_step_that_overflows(name):
    """An overflow reaches the gradients; nothing on the way turns it into a number."""
    model, images = Distillation(name), images_of()
    before = {key: value.clone() for key, value in trained(model).items()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**50)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(images)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**49
    assert all(torch.equal(value, before[key]) for key, value in trained(model).items())


# --- Modes ----------------------------------------------------------------------------------------


def test_inference_mode_and_training_after_it(name):
    """A value without graph; nothing made in inference mode stays behind to break training."""
    model, images = Distillation(name), images_of(4, 12, 8)
    twin = copy.deepcopy(model)
    plain = twin(images)
    twin.after_step(images)
    with torch.inference_mode():
        loss = model(images)
        model.after_step(images)
        assert loss.is_inference()
        assert not loss.requires_grad
    assert_close(loss, plain.detach(), 1e-6)
    again, expected = model(images), twin(images)
    assert_close(again, expected, 1e-6)
    assert_close(gradients(model, again), gradients(twin, expected), 1e-6)


def test_deterministic_mode(name):
    """Nothing raises, also with new memory filled with NaN, and a second run gives the same bits."""

    def two_steps():
        model, kept = Distillation(name), []
        for seed in range(2):
            images = images_of(seed=seed)
            loss = model(images)
            kept += [loss.detach(), gradients(model, loss)]
            model.after_step(images)
        return kept

    before = torch.are_deterministic_algorithms_enabled()
    loose = two_steps()
    torch.use_deterministic_algorithms(True)
    try:
        one, two = two_steps(), two_steps()
    finally:
        torch.use_deterministic_algorithms(before)
    for first, second, other in zip(one, two, loose, strict=True):
        assert torch.equal(first, second)
        assert_close(first, other, 1e-5)


# --- CUDA graphs ----------------------------------------------------------------------------------


class FromHost(TorchDispatchMode):
    """Refuses a constant made of Python numbers: on a GPU that is a copy that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.lift_fresh.default:
            raise AssertionError("a tensor is made of numbers of the host")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_numbers(model=None):
    """Every new tensor has a shape but no numbers, on the device that comes back; so has the model.

    Whatever asks for a number, or for a size by one, raises. It is a stand-in for the capture of a CUDA
    graph, which needs a GPU. It sees every operator of forward and backward, but neither a kernel's
    launch nor PyTorch's choices for a CUDA device (a PyTorch without CUDA has no fake CUDA device).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device):
        for module in () if model is None else model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        tensors[key] = type(tensor)(empty).requires_grad_(tensor.requires_grad)
        with FromHost():
            yield device


@pytest.mark.parametrize("autocast", [False, True])
def test_no_operator_needs_a_number_on_the_host(name, autocast):
    """On maps that take several blocks of every pass, forward and backward."""
    model = Distillation(name)
    with without_numbers(model) as device:
        images = torch.empty(2, 3, 40, 60)
        for valid in (None, torch.empty(2, 40, 60, dtype=torch.bool)):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                loss = model(images, valid)
            loss.backward()
            model.after_step(images)
        assert all(parameter.grad is not None for parameter in trained(model).values())


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_of_a_loss_that_would_launch_kernels(name):
    """With FakeTensorMode, which tools that plan memory use, no kernel can be launched."""
    with without_numbers(loss := build(name, "triton")) as device:
        student, teacher = (torch.empty(x.shape) for x in inputs(name))
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss(student.requires_grad_(), teacher)
        value.backward()
        assert student.grad.shape == student.shape


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.unique(),
    ],
)
def test_the_stand_in_refuses_what_a_capture_would(wait):
    refusals = (DataDependentOutputException, DynamicOutputShapeException, AssertionError)
    with without_numbers():
        x = torch.empty(3)
        with pytest.raises(refusals):
            wait(x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_graph_capture(name, autocast):
    """Forward and backward captured on one batch and mask, and replayed on others."""
    model, images = Distillation(name).cuda(), images_of().cuda()
    valid = torch.ones(2, 8, 12, dtype=torch.bool, device="cuda")

    def step():
        # its cache of converted weights would outlive the capture
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = model(images, valid)
        loss.backward()
        return loss.detach()

    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(warmup)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    images.copy_(images_of(seed=1))
    valid[:, 2:5] = False
    graph.replay()
    torch.cuda.synchronize()
    loss, grads = captured.clone(), [p.grad.clone() for p in trained(model).values()]
    model.zero_grad(set_to_none=True)
    assert_close(loss, step(), 1e-5)
    for ours, parameter in zip(grads, trained(model).values(), strict=True):
        assert_close(ours, parameter.grad, 1e-2 if autocast else 1e-4)


def test_cases_are_what_they_say():
    """The images matter to each case, and every case trains its student."""
    assert set(BATCH_WIDE) <= set(NAMES)
    with torch.no_grad():
        losses = [float(Distillation(name)(images_of())) for name in NAMES]
    for one, other in itertools.combinations(losses, 2):
        assert abs(one - other) > 1e-5
