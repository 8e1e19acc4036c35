"""Af-DCD's contrast and whole loss, forward plus backward.

"contrast" starts at the rebuilt map, before its pooling; "loss" adds alignment, mask, projector and
mimic term, with the gradients of their parameters, under autocast if `--dtype` is not float32. "plain"
is the formula as it is written: rearranged copies, all distances of a patch by `torch.cdist` in float32
(it has no half-precision form), and its negatives gathered by a boolean mask.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pixdistill import AfDCDLoss, functional

from .runner import Case, Provider, Subject, autocast

GROUPS, PATCH, TEMPERATURE = 16, 4, 0.07


@dataclass(frozen=True)
class Problem:
    """Maps without gradient: each run asks for its own."""

    case: Case
    dtype: torch.dtype
    student: Tensor
    teacher: Tensor
    module: AfDCDLoss
    drop_mask: Tensor


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """A rebuilt map that resembles the teacher's, or a narrower student's map before alignment."""
    part, batch, channels, height, width, pool = case
    if part not in ("contrast", "loss"):
        raise SystemExit(f'the part must be "contrast" or "loss"; got {part!r}')
    generator = torch.Generator().manual_seed(batch + channels + height)
    teacher = torch.randn(batch, channels, height, width, generator=generator)
    student = teacher + torch.randn(teacher.shape, generator=generator)
    if part == "loss":
        student = student[:, : channels // 4].contiguous()
    else:
        student, teacher = student.to(dtype), teacher.to(dtype)
    drop_mask = torch.rand(batch, height, width, generator=generator) < 0.75
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AfDCDLoss(channels // 4, channels, num_groups=GROUPS, pool_size=pool)
    student, teacher, drop_mask = (x.to(device) for x in (student, teacher, drop_mask))
    return Problem(case, dtype, student, teacher, module.to(device), drop_mask)


def plain_contrast(student: Tensor, teacher: Tensor, pool: int) -> Tensor:
    """The formula as it is written, in float32 or float64."""
    if pool > 1:
        student, teacher = F.max_pool2d(student, pool), F.max_pool2d(teacher, pool)
    cut = "b (m d) (h p) (w q) -> (b h w) (m p q) d"
    sizes = {"m": GROUPS, "p": PATCH, "q": PATCH}
    wide = torch.promote_types(student.dtype, torch.float32)
    s, t = (rearrange(x, cut, **sizes).to(wide) for x in (student, teacher))
    logits = -torch.cdist(s, t, p=1.0) / TEMPERATURE
    vectors = logits.shape[1]
    group = torch.arange(vectors, device=logits.device) // PATCH**2
    negative = logits[:, group.unsqueeze(1) != group].view(len(s), vectors, -1)
    positive = logits.diagonal(dim1=1, dim2=2).unsqueeze(2)
    rows = torch.cat([positive, negative], dim=2).flatten(0, 1)
    target = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return F.cross_entropy(rows, target, reduction="sum") / student[:, 0].numel()


def our_contrast(student: Tensor, teacher: Tensor, pool: int) -> Tensor:
    """The contrast of `AfDCDLoss`."""
    loss = functional.af_dcd_loss(
        student, teacher, pool_size=pool, mimic_weight=0.0, contrast_weight=1.0
    )
    assert isinstance(loss, Tensor)
    return loss


def rebuilt(module: AfDCDLoss, student: Tensor, drop_mask: Tensor) -> Tensor:
    """The student's map, aligned, masked and rebuilt."""
    assert module.align is not None
    return module.projector(module.align(student).masked_fill(drop_mask.unsqueeze(1), 0.0))


def plain_loss(student: Tensor, problem: Problem) -> Tensor:
    """The whole loss as it is written."""
    module, teacher = problem.module, problem.teacher
    guess = rebuilt(module, student, problem.drop_mask)
    mimic = F.mse_loss(guess.float(), teacher, reduction="sum") / len(student)
    contrast = plain_contrast(guess, teacher, problem.case[-1])
    return module.mimic_weight * mimic + module.contrast_weight * contrast


def our_loss(student: Tensor, problem: Problem) -> Tensor:
    """`AfDCDLoss`."""
    return problem.module(student, problem.teacher, drop_mask=problem.drop_mask)


def differentiated(
    contrast_of: Callable[[Tensor, Tensor, int], Tensor],
    loss_of: Callable[[Tensor, Problem], Tensor],
) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """Forward plus backward of the contrast or of the whole loss."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        student = problem.student.detach().requires_grad_()
        if problem.case[0] == "contrast":
            loss = contrast_of(student, problem.teacher, problem.case[-1])
            return loss.detach(), torch.autograd.grad(loss, student)[0]
        with autocast(problem.dtype, student.device.type):
            loss = loss_of(student, problem)
        return loss.detach(), torch.autograd.grad(loss, [student, *problem.module.parameters()])[0]

    return run


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """The plain formula in float64, a row of patches at a time: all distances would not fit."""
    part, *_, pool = problem.case
    module = copy.deepcopy(problem.module).double()
    student = problem.student.double().requires_grad_()
    teacher = problem.teacher.double()
    guess = student if part == "contrast" else rebuilt(module, student, problem.drop_mask)
    contrast, grads = teacher.new_zeros(()), []
    bands = (x.detach().split(pool * PATCH, dim=2) for x in (guess, teacher))
    for s, t in zip(*bands, strict=True):
        s = s.requires_grad_()
        loss = plain_contrast(s, t, pool) * (s.shape[2] / guess.shape[2])
        grads.append(torch.autograd.grad(loss, s)[0])
        contrast += loss.detach()
    grad = torch.cat(grads, dim=2)
    if part == "contrast":
        return contrast, grad
    mimic = F.mse_loss(guess, teacher, reduction="sum") / len(student)
    loss = module.mimic_weight * mimic.detach() + module.contrast_weight * contrast
    sources = [module.mimic_weight * mimic, guess]
    return loss, torch.autograd.grad(sources, student, [None, module.contrast_weight * grad])[0]


SUBJECT = Subject(
    name="af_dcd",
    summary="Af-DCD's contrast inside patches, and the whole loss",
    columns={
        "part": '"contrast" or "loss"',
        "B": "images",
        "C": "channels of the teacher",
        "H": "height",
        "W": "width",
        "pool": "side of the pooling windows",
    },
    cases={
        device: [
            ("contrast", 2, 512, 64, 128, 4),
            ("loss", 2, 512, 64, 128, 4),
            ("contrast", 2, 512, 64, 128, 1),
            ("contrast", 2, 512, 64, 128, 2),
        ]
        for device in ("cpu", "cuda")
    },
    small=("contrast", 1, 32, 8, 16, 2),
    problem=problem,
    providers={
        "ours": Provider(differentiated(our_contrast, our_loss), "`AfDCDLoss`"),
        "plain": Provider(differentiated(plain_contrast, plain_loss), "the formula as written"),
    },
    truth=truth,
)
