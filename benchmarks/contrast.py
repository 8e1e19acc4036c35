"""`PixelContrastLoss` on maps, forward plus backward, beside `F.normalize` and `F.cross_entropy`.

Maps are float32 and run under autocast if `--dtype` is not float32, as people train. "batch": the
negatives are all other pixels of the batch; "queue": a queue's vectors, which is PCD; "both": these and
those.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill import PixelContrastLoss, PixelQueue

from .runner import Case, Provider, Subject, autocast

TEMPERATURE = 0.2
NEGATIVES = ("batch", "queue", "both")
BLOCK = 1024  # pixels whose logits fit in float64


@dataclass(frozen=True)
class Problem:
    """Maps without gradient: each run asks for its own."""

    negatives: str
    dtype: torch.dtype
    student: Tensor
    teacher: Tensor
    queue_keys: Tensor | None
    loss: PixelContrastLoss


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random maps from a fixed seed; the student's resembles the teacher's."""
    negatives, batch, channels, height, width, size = case
    if negatives not in NEGATIVES:
        raise SystemExit(f"the negatives must be one of {NEGATIVES}; got {negatives!r}")
    generator = torch.Generator(device).manual_seed(batch + channels + height)
    shape = (2, batch, channels, height, width)
    student, teacher = torch.randn(shape, generator=generator, device=device)
    queue = None if negatives == "batch" else PixelQueue(size, channels).to(device)
    loss = PixelContrastLoss(
        TEMPERATURE, negatives=None if negatives == "queue" else "batch", queue=queue
    )
    keys = None if queue is None else queue.keys
    return Problem(negatives, dtype, student + teacher, teacher, keys, loss.to(device))


def rows(x: Tensor) -> Tensor:
    """The unit vectors of a map, `[N, C]`."""
    return F.normalize(x.permute(0, 2, 3, 1).flatten(0, 2), dim=1)


def cross_entropy(
    student: Tensor, teacher: Tensor, problem: Problem, first: int = 0, reduction: str = "mean"
) -> Tensor:
    """As people write it, for the unit vectors of the student from number `first` on."""
    own = torch.arange(first, first + len(student), device=student.device)
    if problem.negatives == "queue":
        assert problem.queue_keys is not None
        positive = (student * teacher[own]).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, student @ problem.queue_keys.to(student).T], dim=1)
        own = torch.zeros_like(own)
    else:
        logits = student @ teacher.T
        if problem.queue_keys is not None:
            logits = torch.cat([logits, student @ problem.queue_keys.to(student).T], dim=1)
    return F.cross_entropy(logits / TEMPERATURE, own, reduction=reduction)


def plain(student: Tensor, problem: Problem) -> Tensor:
    """All logits at once."""
    return cross_entropy(rows(student), rows(problem.teacher), problem)


def ours(student: Tensor, problem: Problem) -> Tensor:
    """`PixelContrastLoss`."""
    return problem.loss(student, problem.teacher)


LossOf = Callable[[Tensor, Problem], Tensor]


def differentiated(loss_of: LossOf) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """Forward plus backward of one form of the loss."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        student = problem.student.detach().requires_grad_()
        with autocast(problem.dtype, student.device.type):
            loss = loss_of(student, problem)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    return run


def compiled(loss_of: LossOf) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """The same by `torch.compile`, asked for when it first runs: loading it takes seconds."""
    made = functools.cache(lambda: torch.compile(loss_of))
    return differentiated(lambda *arguments: made()(*arguments))


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a block of pixels at a time."""
    student = problem.student.double().requires_grad_()
    teacher, unit = rows(problem.teacher.double()), rows(student)
    grads, total = [], teacher.new_zeros(())
    for first in range(0, len(unit), BLOCK):
        block = unit[first : first + BLOCK].detach().requires_grad_()
        loss = cross_entropy(block, teacher, problem, first, "sum") / len(unit)
        grads.append(torch.autograd.grad(loss, block)[0])
        total += loss.detach()
    return total, torch.autograd.grad(unit, student, torch.cat(grads))[0]


def pairs(case: Case) -> tuple[int, int]:
    """Queries, and keys that they meet."""
    negatives, batch, _, height, width, size = case
    pixels = batch * height * width
    return pixels, {"batch": pixels, "queue": size, "both": pixels + size}[negatives]


def work(case: Case) -> float:
    """Operations of the two products."""
    queries, keys = pairs(case)
    return 4.0 * queries * keys * case[2]


def holds(case: Case) -> float:
    """Four float32 matrices of logits, roughly."""
    queries, keys = pairs(case)
    return 16.0 * queries * keys


SUBJECT = Subject(
    name="contrast",
    summary="PixelContrastLoss on maps, beside F.normalize and F.cross_entropy",
    columns={
        "negatives": ", ".join(NEGATIVES),
        "B": "images",
        "C": "channels",
        "H": "height",
        "W": "width",
        "K": "vectors in the queue",
    },
    cases={
        "cpu": [
            ("batch", 4, 128, 32, 32, 0),
            ("batch", 1, 128, 16, 16, 0),
            ("batch", 8, 128, 32, 32, 0),
            ("batch", 4, 128, 16, 16, 0),
            ("queue", 128, 256, 7, 7, 65536),
        ],
        "cuda": [
            ("batch", 16, 128, 32, 32, 0),
            ("queue", 128, 256, 7, 7, 65536),
            ("batch", 4, 128, 16, 16, 0),
            ("both", 16, 128, 32, 32, 16384),
            ("batch", 16, 256, 32, 32, 0),
            ("batch", 16, 64, 32, 32, 0),
            ("batch", 16, 128, 64, 64, 0),
            ("queue", 256, 256, 7, 7, 65536),
        ],
    },
    small=("both", 2, 16, 5, 6, 32),
    problem=problem,
    providers={
        "ours": Provider(differentiated(ours), "`PixelContrastLoss`"),
        "plain": Provider(
            differentiated(plain), "`F.normalize`, a product, `F.cross_entropy`", holds=holds
        ),
        "plain-compiled": Provider(
            compiled(plain), "the same by `torch.compile`", compiled=True, holds=holds
        ),
    },
    truth=truth,
    work=work,
)
