"""Negatives from all ranks: gloo processes against one process, written out, on the whole batch."""

import functools
import itertools
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, dense_contrast, relative_error
from ranks import Raised, on_ranks, results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pixdistill import PixelContrastLoss, PixelQueue, pixel_contrast
from pixdistill import _distributed as distributed

WORLDS = (1, 2, 4)
CHANNELS, WIDTH = 5, 6
TEMPERATURE = 0.3
EVEN = ((2, 3, 2),) * 4
UNEVEN = ((1, 5, 2), (2, 3, 4), (0, 3, 3), (2, 2, 2))
"""Images, rows and columns on each rank. The first is not the longest; the third has no pixel."""
MASKS = ("none", "some", "first", "dark", "night")
"""On no rank, on all, on the first only; nothing valid on the second rank; nothing valid anywhere."""


class Case(NamedTuple):
    """A problem for all ranks."""

    negatives: Any
    mode: str = "all"
    reduction: str = "mean"
    mask: str = "none"
    sizes: tuple[tuple[int, int, int], ...] = UNEVEN
    wrapper: str = "average"
    learnable: bool = True
    labelled: bool = False

    @property
    def has(self):
        return (self.negatives,) if isinstance(self.negatives, str) else self.negatives

    @property
    def own(self):
        return next((name for name in self.has if name != "queue"), None)


BATCH, BOTH = "batch", ("queue", "batch")
CASES = [
    *(
        Case(*settings)
        for settings in itertools.product(
            (BATCH, BOTH), ("all", "ring"), ("mean", "sum"), MASKS, (EVEN, UNEVEN)
        )
    ),
    *(
        Case(negatives, "all", reduction, mask)
        for negatives in ("image", "queue", ("image", "queue"))
        for reduction, mask in itertools.product(("mean", "sum"), MASKS)
    ),
    *(
        Case(BOTH, mode, reduction, mask, sizes, wrapper)
        for wrapper in ("ddp", "fsdp")
        for mode, reduction, mask, sizes in itertools.product(
            ("all", "ring"), ("mean", "sum"), ("none", "dark"), (EVEN, UNEVEN)
        )
    ),
    Case(BATCH, "all", learnable=False),
    Case(BATCH, "ring", learnable=False),
    *(
        Case(negatives, mode, mask=mask, sizes=sizes, wrapper=wrapper, labelled=True)
        for negatives, mode, mask, sizes, wrapper in (
            (BATCH, "all", "some", UNEVEN, "average"),
            (BATCH, "ring", "first", UNEVEN, "average"),
            (BOTH, "all", "none", EVEN, "ddp"),
            (BOTH, "ring", "none", EVEN, "fsdp"),
            (BOTH, "ring", "dark", UNEVEN, "ddp"),
            (("image", "queue"), "all", "some", UNEVEN, "average"),
        )
    ),
]


def batch_of(rank, case):
    """Student input, teacher map and mask of a rank, in float64."""
    generator = torch.Generator().manual_seed(rank)
    images, height, width = case.sizes[rank]
    shape = (height, width)
    student = torch.randn(images, CHANNELS, *shape, generator=generator, dtype=torch.float64)
    teacher = torch.randn(images, WIDTH, *shape, generator=generator, dtype=torch.float64)
    valid = torch.rand(images, *shape, generator=generator) > 0.3
    if case.mask == "none" or (case.mask == "first" and rank > 0):
        valid = None
    elif case.mask == "night" or (case.mask == "dark" and rank == 1):
        valid = torch.zeros(images, *shape, dtype=torch.bool)
    elif case.mask == "dark":
        valid = None
    return student, teacher, valid


def labels_of(rank, case):
    """Labels of a rank, some of them negative; None where the case has none."""
    images, height, width = case.sizes[rank]
    generator = torch.Generator().manual_seed(50 + rank)
    labels = torch.randint(-1, 3, (images, height, width), generator=generator)
    return labels if case.labelled else None


class Distillation(nn.Module):
    """A student of one layer, with its loss inside: what DDP and FSDP wrap."""

    def __init__(self, case, dtype=torch.float64):
        super().__init__()
        queue = None
        if "queue" in case.has:
            options = {"labels": case.labelled, "gather_distributed": True, "dtype": dtype}
            queue = PixelQueue(7, WIDTH, **options)
        self.project = nn.Conv2d(CHANNELS, WIDTH, kernel_size=1, dtype=dtype)
        weights = torch.linspace(-3, 3, WIDTH * (CHANNELS + 1), dtype=torch.float64).sin()
        with torch.no_grad():
            self.project.weight.copy_(weights[:-WIDTH].view_as(self.project.weight))
            self.project.bias.copy_(weights[-WIDTH:])
        self.criterion = PixelContrastLoss(
            TEMPERATURE,
            negatives=case.own,
            queue=queue,
            reduction=case.reduction,
            learnable_temperature=case.learnable,
            gather_distributed=True,
            gather_mode=case.mode,
        ).to(dtype)

    def forward(self, student, teacher, valid_mask, labels=None):
        return self.criterion(self.project(student), teacher, valid_mask=valid_mask, labels=labels)


def step_on_rank(rank, cases):
    """For each case the average loss, gradients, parameters after a step, and the queue."""
    return [_step(rank, case) for case in cases]


def _step(rank, case):
    world = dist.get_world_size()
    torch.manual_seed(rank)  # queues start differently
    model = Distillation(case)
    queue = model.criterion.queue
    if queue is not None:
        queue.share()
    if queue is not None and case.labelled:
        queue.enqueue(torch.randn(rank + 1, WIDTH).double(), labels=torch.arange(rank + 1) - 1)
    wrapped = model
    if case.wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif case.wrapper == "fsdp":
        fully_shard(model)
    student, teacher, valid = batch_of(rank, case)
    before = teacher.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = wrapped(student, teacher, valid, labels_of(rank, case))
    loss.backward()
    assert torch.equal(teacher, before)
    if case.wrapper == "average":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    optimizer.step()
    grads = [full(parameter.grad) for parameter in model.parameters()]
    parameters = [full(parameter.detach()) for parameter in model.parameters()]
    loss = loss.detach()
    dist.all_reduce(loss)
    queue = None if queue is None else (queue.keys.clone(), queue.key_labels)
    return {"loss": loss / world, "grads": grads, "parameters": parameters, "queue": queue}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@functools.cache
def steps(world):
    """What all ranks got in all cases, from a single launch."""
    return results(world, step_on_rank, CASES)


def rows_of(case, world, dtype=torch.float64):
    """Rows of all ranks: student, teacher, which image each is from, and whether it is valid."""
    students, teachers, images, valids = [], [], [], []
    for rank in range(world):
        student, teacher, valid = batch_of(rank, case)
        count, area = student.shape[0], student.shape[2:].numel()
        students.append(student.movedim(1, -1).reshape(-1, CHANNELS))
        teachers.append(teacher.movedim(1, -1).reshape(-1, WIDTH))
        images.append(torch.arange(count).repeat_interleave(area) + 100 * rank)
        valids.append(
            torch.ones(count * area, dtype=torch.bool) if valid is None else valid.flatten()
        )
    return torch.cat(students), torch.cat(teachers), torch.cat(images), torch.cat(valids)


def truth_of(case, world, queue):
    """Loss, gradients and parameters after a step of one process, by an explicit loop over rows."""
    student, teacher, images, valid = rows_of(case, world)
    model = Distillation(case)
    weight, bias = model.project.weight, model.project.bias
    temperature = model.criterion.temperature
    projected = student @ weight.flatten(1).T + bias
    if "image" not in case.has:
        images = torch.zeros_like(images)
    keys, key_labels = queue or (None, None)
    labels = None
    if case.labelled:
        labels = torch.cat([labels_of(rank, case).flatten() for rank in range(world)])
    losses = dense_contrast(
        projected, teacher, temperature, images, valid, keys, case.has != ("queue",), labels,
        key_labels,
    )  # fmt: skip
    loss = losses.sum() if case.reduction == "sum" else losses.sum() / valid.sum().clamp_min(1)
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    after = [p.detach() - 0.5 * g for p, g in zip(model.parameters(), grads, strict=True)]
    return {"loss": loss.detach(), "grads": grads, "parameters": after}


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_equals_one_process_on_the_whole_batch(world):
    """160 cases a launch: modes, negatives, reductions, masks, sizes, and how gradients are averaged."""
    everyone = steps(world)
    for number, case in enumerate(CASES):
        ours = [rank[number] for rank in everyone]
        for other in ours[1:]:  # the same on every rank, to the bit
            assert torch.equal(other["loss"], ours[0]["loss"]), case
            if other["queue"] is not None:
                pairs = zip(other["queue"], ours[0]["queue"], strict=True)
                assert all(a is b is None or torch.equal(a, b) for a, b in pairs), case
        truth = truth_of(case, world, ours[0]["queue"])
        for rank in ours:
            assert_close(rank["loss"], truth["loss"], 1e-12)
            for name in ("grads", "parameters"):
                got = torch.cat([x.flatten() for x in rank[name]])
                right = torch.cat([x.flatten() for x in truth[name]])
                if right.norm() == 0:  # nothing valid anywhere
                    assert torch.equal(got, right), (case, name)
                else:
                    error = relative_error(got, right)
                    assert error < 1e-11, (case, name, error)
        if case.mask == "night":
            assert truth["loss"] == 0


def test_the_cases_have_what_they_should():
    assert {case.wrapper for case in CASES} == {"average", "ddp", "fsdp"}
    assert {case.mode for case in CASES} == {"all", "ring"}
    for mask in MASKS:
        valid = rows_of(Case(BATCH, mask=mask), 4)[3]
        assert (valid.sum() == 0) == (mask == "night")
    truth = truth_of(Case(BATCH), 4, None)["grads"]
    alone = truth_of(Case(BATCH), 2, None)["grads"]
    assert relative_error(alone[0], truth[0]) > 0.1  # a rank more or less shows


# --- Parts for logging, and a loss per pixel ------------------------------------------------------


def log_on_rank(rank, cases):
    parts = []
    for case in cases:
        torch.manual_seed(rank)
        model = Distillation(case)
        if "queue" in case.has:
            model.criterion.queue.share()
        student, teacher, valid = batch_of(rank, case)
        with torch.no_grad():
            student = model.project(student)
        came = model.criterion(student, teacher, valid_mask=valid, return_components=True)
        assert torch.equal(came.loss, model.criterion(student, teacher, valid_mask=valid))
        model.criterion.reduction = "none"
        single = model.criterion(student, teacher, valid_mask=valid)
        assert single.shape == (student.shape[0], *student.shape[2:])
        queue = model.criterion.queue.keys if "queue" in case.has else None
        logged = (came.accuracy.detach(), came.positive_similarity.detach())
        parts.append((*logged, single.detach().flatten(), queue))
    return parts


@pytest.mark.parametrize("world", [2, 4])
def test_components_and_the_loss_per_pixel_equal_those_of_one_process(world):
    cases = [
        Case(negatives, mode, mask=mask)
        for negatives in (BATCH, BOTH, "image")
        for mode in ("all", "ring")
        for mask in MASKS
    ]
    everyone = results(world, log_on_rank, cases)
    for number, case in enumerate(cases):
        ours = [rank[number] for rank in everyone]
        student, teacher, images, valid = rows_of(case, world)
        model = Distillation(case)
        with torch.no_grad():
            student = student @ model.project.weight.flatten(1).T + model.project.bias
        if "image" not in case.has:
            images = torch.zeros_like(images)
        arguments = (student, teacher, TEMPERATURE, images, valid, ours[0][3])
        losses = dense_contrast(*arguments)
        assert_close(torch.cat([part[2] for part in ours]), losses, 1e-6)  # log_temperature
        cosine = nn.functional.cosine_similarity(student[:, None], teacher[None], dim=2)
        wins = []
        for i in valid.nonzero().flatten().tolist():
            rivals = (images == images[i]) & valid
            rivals[i] = False
            best = [cosine[i, rivals]]
            if ours[0][3] is not None:
                best.append(nn.functional.normalize(student[i], dim=0) @ ours[0][3].T)
            wins.append(bool((torch.cat(best) <= cosine[i, i]).all()))
        share = sum(wins) / max(1, len(wins))
        similarity = cosine.diagonal()[valid].sum() / valid.sum().clamp_min(1)
        for part in ours:
            assert abs(float(part[0]) - share) < 1e-12, case
            assert abs(float(part[1] - similarity)) < 1e-12, case


# --- Half precision -------------------------------------------------------------------------------


def half_on_rank(rank, mode, dtype, autocast):
    """Loss, gradient of the map, and the dtypes in which keys travelled."""
    seen = []
    for name, original in list(pixel_contrast.EXCHANGES.items()):

        def spy(keys, *others, original=original):
            seen.append(keys.dtype)
            return original(keys, *others)

        pixel_contrast.EXCHANGES[name] = spy
    student, teacher, valid = half_batch(rank)
    given = torch.float32 if autocast else dtype
    student = student.to(given).requires_grad_()
    criterion = PixelContrastLoss(0.2, gather_distributed=True, gather_mode=mode)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = criterion(student, teacher.to(given), valid_mask=valid)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == given
    gradient = student.grad.double() / dist.get_world_size()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss / dist.get_world_size(), gradient, seen


def half_batch(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    images = (2, 1, 0, 3)[rank]
    student, teacher = torch.randn(2, images, 16, 4, 5, generator=generator)
    valid = torch.rand(images, 4, 5, generator=generator) > 0.2
    return student + teacher, teacher, valid


@pytest.mark.parametrize("mode", ["all", "ring"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
    ids=str,
)
def test_half_precision_is_no_worse_than_on_one_process(mode, dtype, autocast):
    everyone = results(4, half_on_rank, mode, dtype, autocast)
    batches = [half_batch(rank) for rank in range(4)]
    student, teacher, valid = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def single(given, autocast):
        leaf = student.detach().to(given).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = PixelContrastLoss(0.2)(leaf, teacher.to(given), valid_mask=valid)
        loss.backward()
        return loss.detach(), leaf.grad.double()

    plain = single(torch.float32 if autocast else dtype, autocast)
    truth = single(torch.float64, False)
    ours = (everyone[0][0], torch.cat([gradient for _, gradient, _ in everyone]))
    for one, other, right in zip(ours, plain, truth, strict=True):
        assert relative_error(one, right) <= 2 * relative_error(other, right) + 1e-6
    assert all(seen == [dtype] for _, _, seen in everyone)  # keys travel as what they are used as


# --- The queue ------------------------------------------------------------------------------------

COUNTS = ((2, 3, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0, 9, 4, 0), (30, 1, 2, 3), (0, 0, 0, 5))
"""Vectors that each rank enqueues in each step; the queue holds 11."""


def vectors_of(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * step + rank)
    vectors = torch.randn(COUNTS[step][rank], 5, generator=generator)
    if len(vectors) and (step + rank) % 2:
        vectors[-1, 2] = torch.nan
    return vectors.to(dtype)


def enqueue_on_rank(rank, dtype, pooled):
    torch.manual_seed(rank)
    queue = PixelQueue(11, 5, gather_distributed=True)
    states = []
    start = queue.keys.clone()
    for step in range(len(COUNTS)):
        vectors = vectors_of(rank, step, dtype)
        if pooled:
            queue.enqueue_pooled(vectors.view(-1, 5, 1, 1).expand(-1, -1, 2, 3))
        else:
            queue.enqueue(vectors)
        states.append((queue.keys.clone(), queue.ptr.clone()))
    return start, states


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("dtype", "pooled"), [(torch.float32, False), (torch.float16, False), (torch.float32, True)]
)
def test_queues_are_equal_to_the_bit_after_every_enqueue(world, dtype, pooled):
    everyone = results(world, enqueue_on_rank, dtype, pooled)
    starts = [start for start, _ in everyone]
    assert all(not torch.equal(start, starts[0]) for start in starts[1:])
    single = PixelQueue(11, 5)
    single.keys.copy_(starts[0])
    for step in range(len(COUNTS)):
        vectors = torch.cat([vectors_of(rank, step, dtype) for rank in range(world)])
        single.enqueue(vectors)
        for _, states in everyone:
            keys, ptr = states[step]
            assert ptr == single.ptr
            if pooled:  # the mean of equal numbers rounds
                assert_close(keys, single.keys, 1e-6)
                assert torch.equal(keys, everyone[0][1][step][0])
            else:
                assert torch.equal(keys, single.keys)


def share_on_rank(rank):
    """Queues before and after `share`, a change, a second `share`, and after a reset."""
    torch.manual_seed(rank)
    queue = PixelQueue(3, 4, gather_distributed=True, labels=True)
    own = PixelQueue(3, 4)
    own_before = own.keys.clone()
    queue.ptr.fill_(rank + 1)
    queue.key_labels.fill_(rank + 5)
    queue.share()
    assert (queue.key_labels == 5).all()
    shared, ptr = queue.keys.clone(), int(queue.ptr)
    own.share()
    assert torch.equal(own.keys, own_before)
    queue.keys.mul_(rank + 1)
    queue.share()  # only the first takes rank 0's
    second = queue.keys.clone()
    queue.reset_parameters()
    queue.share()
    return shared, ptr, second, queue.keys.clone()


def test_queues_take_those_of_the_first_rank_once():
    everyone = results(2, share_on_rank)
    torch.manual_seed(0)
    start = PixelQueue(3, 4).keys
    for rank, (shared, ptr, second, reset) in enumerate(everyone):
        assert torch.equal(shared, start)
        assert ptr == 1
        assert torch.equal(second, start * (rank + 1))
        assert torch.equal(reset, everyone[0][3])
        assert not torch.equal(reset, start)


def total_on_rank(rank):
    count = torch.tensor(rank + 1)
    return int(distributed.all_reduce_sum(count)), int(count)


def test_a_total_leaves_each_ranks_own_number():
    assert results(2, total_on_rank) == [(3, 1), (3, 2)]


def separate_on_rank(rank):
    """What does not gather stays alone, also while a process group is there."""
    torch.manual_seed(rank)
    forbid_communication()
    queue = PixelQueue(4, WIDTH)
    keys = queue.keys.clone()
    queue.enqueue(torch.eye(WIDTH)[rank : rank + 1])
    assert torch.equal(queue.keys[1:], keys[1:])
    student, teacher = torch.randn(2, 2, WIDTH, 3, 3)
    loss = PixelContrastLoss(queue=queue)(student, teacher)
    rows = [x.movedim(1, -1).reshape(-1, WIDTH) for x in (student, teacher)]
    everywhere = torch.ones(18, dtype=torch.bool)
    truth = dense_contrast(*rows, 0.2, torch.zeros(18), everywhere, queue.keys).mean()
    return float(loss), float(truth)


def test_nothing_is_gathered_unless_asked_for():
    for loss, truth in results(2, separate_on_rank):
        assert abs(loss - truth) < 1e-6 * truth


# --- One process, or none -------------------------------------------------------------------------


def forbid_communication(patch=setattr):
    """Let every function that talks to other ranks fail."""

    def fail(*_, **__):
        raise AssertionError("something was communicated")

    for name in (
        *("all_gather_single", "all_gather_into_tensor", "batch_isend_irecv", "isend", "irecv"),
        *("all_reduce", "broadcast", "barrier"),
    ):
        if hasattr(dist, name):
            patch(dist, name, fail)


def work_alone(rank=0):
    """Loss, gradient and queue of each mode, and the same of modules that do not gather."""
    came = []
    for gathers, mode in ((False, "all"), (True, "all"), (True, "ring")):
        torch.manual_seed(0)
        queue = PixelQueue(5, WIDTH, gather_distributed=gathers)
        criterion = PixelContrastLoss(queue=queue, gather_distributed=gathers, gather_mode=mode)
        queue.share()
        student = torch.randn(2, WIDTH, 3, 4, requires_grad=True)
        parts = criterion(student, torch.randn(2, WIDTH, 3, 4), return_components=True)
        parts.loss.backward()
        queue.enqueue_pooled(torch.randn(2, WIDTH, 3, 4))
        came.append([*(part.detach() for part in parts), student.grad, queue.keys, queue.ptr])
    return came


def work_alone_in_a_group(rank):
    forbid_communication()
    return work_alone()


def assert_alike(came):
    for other in came[1:]:
        for ours, plain in zip(other, came[0], strict=True):
            assert torch.equal(ours, plain)


def test_without_a_process_group_nothing_is_communicated(monkeypatch):
    assert not dist.is_initialized()
    forbid_communication(monkeypatch.setattr)
    assert_alike(work_alone())
    monkeypatch.setattr(dist, "is_available", lambda: False)  # as on builds without distributed
    monkeypatch.delattr(dist, "is_initialized")
    assert_alike(work_alone())


def test_a_group_of_one_process_communicates_nothing():
    assert_alike(results(1, work_alone_in_a_group)[0])


def test_compiles_whole_without_a_process_group():
    torch._dynamo.reset()
    try:
        counter = CompileCounterWithBackend("aot_eager")
        criterion = PixelContrastLoss(gather_distributed=True, gather_mode="ring")
        compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for size in (3, 4, 6):
            student, teacher = torch.randn(2, 2, WIDTH, size, size + 1)
            assert_close(compiled(student, teacher), criterion(student, teacher), 1e-6)
            frames.append(counter.frame_count)
        assert frames == frames[:1] * 3
    finally:
        torch._dynamo.reset()


def compiled_on_rank(rank):
    student, teacher, valid = batch_of(rank, Case(BATCH))
    came = []
    for mode in ("all", "ring"):
        criterion = PixelContrastLoss(gather_distributed=True, gather_mode=mode)
        for function in (criterion, torch.compile(criterion, backend="eager")):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher[:, :CHANNELS], valid_mask=valid)
            loss.backward()
            came.append((loss.detach(), leaf.grad))
    return came


def test_compiles_with_a_break_where_ranks_talk():
    for came in results(2, compiled_on_rank):
        for eager, compiled in (came[:2], came[2:]):
            for ours, plain in zip(compiled, eager, strict=True):
                assert_close(ours, plain, 1e-12)


# --- Faults ---------------------------------------------------------------------------------------


def mismatch_on_rank(rank, what, mode):
    width = WIDTH + (rank == 1 and what == "width")
    dtype = torch.float64 if rank == 1 and what == "dtype" else torch.float32
    if mode == "queue":
        queue = PixelQueue(4, WIDTH, gather_distributed=True)
        queue.enqueue(torch.randn(3, WIDTH, dtype=dtype))
    else:
        student, teacher = torch.randn(2, 1, width, 3, 3, dtype=dtype)
        labels = torch.zeros(1, 3, 3).long() if rank == 1 and what == "labels" else None
        loss = PixelContrastLoss(gather_distributed=True, gather_mode=mode)
        loss(student, teacher, labels=labels)


@pytest.mark.parametrize(
    ("what", "mode"),
    [("width", "all"), ("width", "ring"), ("dtype", "all"), ("dtype", "ring"), ("dtype", "queue")],
)
def test_ranks_that_disagree_raise_everywhere(what, mode):
    for error in on_ranks(2, mismatch_on_rank, what, mode):
        assert isinstance(error, Raised)
        assert error.kind == "ValueError"
        assert "the ranks' keys must have one width and dtype; got" in error.message
        assert (
            "(7, 'torch.float32')" if what == "width" else "(6, 'torch.float64')"
        ) in error.message


@pytest.mark.parametrize("mode", ["all", "ring"])
def test_labels_on_one_rank_alone_raise_everywhere(mode):
    for error in on_ranks(2, mismatch_on_rank, "labels", mode):
        assert error.kind == "ValueError"
        assert (
            "labels must be given on all ranks or on none; got some on ranks [1]" in error.message
        )


def leave_on_rank(rank, what, folder):
    """The last rank never makes the call, or stops in the middle of the ring; the others time out."""
    world = dist.get_world_size()
    dist.destroy_process_group()  # gloo's sends and receives keep the timeout of their group's start
    store = f"file://{folder}/store"
    patience = timedelta(seconds=4)
    dist.init_process_group("gloo", store, patience, rank=rank, world_size=world)
    away = rank == world - 1
    rows = torch.randn(1, WIDTH, 3, 3)
    try:
        if away and what == "stop":
            blocks = distributed.ring_blocks(rows.flatten(2)[0].T, None)
            next(blocks)
        if away:
            while not (Path(folder) / "over").exists():
                time.sleep(0.05)
        elif what == "queue":
            PixelQueue(4, WIDTH, gather_distributed=True).enqueue(torch.randn(3, WIDTH))
        else:
            mode = "ring" if what == "stop" else what
            PixelContrastLoss(gather_distributed=True, gather_mode=mode)(rows, rows)
    finally:
        if not away and (rank == 0 or what == "stop"):
            (Path(folder) / "over").touch()


@pytest.mark.parametrize("what", ["all", "ring", "queue", "stop"])
def test_a_rank_that_does_not_come_lets_the_others_time_out(what, tmp_path):
    """The error is that of the process group; a hang beyond it would fail the launch."""
    world = 3 if what == "stop" else 2
    came = on_ranks(world, leave_on_rank, what, str(tmp_path))
    error = came[0]
    assert isinstance(error, Raised)
    assert issubclass(getattr(dist, error.kind, RuntimeError), RuntimeError)
    assert "timed out" in error.message.lower(), error.message


# --- Memory ---------------------------------------------------------------------------------------


class LiveStorages(TorchDispatchMode):
    """The most bytes that were alive at once, of what was made inside."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        came = function(*arguments, **(options or {}))
        for tensor in came if isinstance(came, (tuple, list)) else (came,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live:
                    reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                    self._live[storage._cdata] = (reference, storage.nbytes())
        self._live = {k: (ref, size) for k, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return came


def peak_on_rank(rank, pixels):
    peaks = {}
    student = torch.randn(1, 16, pixels, requires_grad=True)
    teacher = torch.randn(1, 16, pixels)
    for mode in ("all", "ring"):
        criterion = PixelContrastLoss(gather_distributed=True, gather_mode=mode)
        peaks[mode] = math.inf
        for _ in range(3):  # a thread of gloo may hold what it sent for a moment longer
            with LiveStorages() as live:
                criterion(student, teacher)
            peaks[mode] = min(peaks[mode], live.peak)
    keys, blocks = torch.randn(pixels, 16), set()
    with LiveStorages() as live:
        count = 0
        for block in distributed.ring_blocks(keys, None):
            blocks.add(block.keys.data_ptr())
            count += 1
    return peaks, live.peak, len(blocks), count


def test_the_ring_holds_two_blocks_whatever_the_number_of_ranks():
    pixels = 4096
    size = pixels * 16 * 4
    peaks = {}
    for world in (2, 4):
        ranks = results(world, peak_on_rank, pixels)
        for _, ring, blocks, count in ranks:
            assert blocks == 2
            assert count == world
            assert 2 * size <= ring < 2.1 * size
        peaks[world] = {mode: min(came[mode] for came, *_ in ranks) for mode in ("all", "ring")}
    assert abs(peaks[4]["ring"] - peaks[2]["ring"]) < 0.01 * size
    assert abs(peaks[4]["all"] - peaks[2]["all"] - 2 * size) < 0.01 * size


# --- Settings -------------------------------------------------------------------------------------


def test_wrong_settings():
    with pytest.raises(TypeError, match="gather_distributed must be True or False; got 'yes'"):
        PixelContrastLoss(gather_distributed="yes")
    with pytest.raises(TypeError, match="gather_distributed must be True or False; got 1"):
        PixelQueue(3, 4, gather_distributed=1)
    with pytest.raises(
        ValueError, match=r"gather_mode must be one of \('all', 'ring'\); got 'star'"
    ):
        PixelContrastLoss(gather_distributed=True, gather_mode="star")


def test_repr_shows_the_mode_where_something_is_gathered():
    assert "gather" not in repr(PixelContrastLoss())
    assert "gather_mode='ring'" in repr(
        PixelContrastLoss(gather_distributed=True, gather_mode="ring")
    )
