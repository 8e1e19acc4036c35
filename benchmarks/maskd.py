"""The masked distillation loss, forward plus backward.

All compute the loss and its gradient with respect to the student for the same maps and tokens. "plain"
is the formula as it is written, with a tensor [B, T, C, H, W] and the 3x3 convolution; "channels-first"
sums as `pixdistill` does but leaves the gradient to autograd; "one-read" only sums both maps, the floor
that memory bandwidth sets. Detection weighs its tokens and multiplies by the student's masks,
segmentation does neither.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill import MaskedDistillationLoss, MaskedReceptiveTokens
from pixdistill.functional import pooled_convolution

from .runner import Case, Provider, Subject

EPS = {"detection": 0.0, "segmentation": 1e-5}


@dataclass(frozen=True)
class Problem:
    """Maps without gradient, and frozen tokens: each run asks for its own gradient."""

    student: Tensor
    teacher: Tensor
    tokens: MaskedReceptiveTokens
    loss: MaskedDistillationLoss
    customized: bool
    eps: float


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random data from a fixed seed, with masks that differ from pixel to pixel."""
    variant, batch, channels, num_tokens, height, width = case
    if variant not in EPS:
        raise SystemExit(f"the variant must be one of {tuple(EPS)}; got {variant!r}")
    generator = torch.Generator().manual_seed(batch + channels + height)
    maps = torch.randn(2, batch, channels, height, width, generator=generator)
    detection, eps = variant == "detection", EPS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = MaskedReceptiveTokens(channels, num_tokens, weighted=detection)
    torch.nn.init.normal_(tokens.mask_token, std=channels**-0.5, generator=generator)
    loss = MaskedDistillationLoss(tokens, eps=eps, customize_after=0 if detection else None)
    student, teacher = maps.to(device, dtype)
    return Problem(student, teacher, tokens, loss.to(device), detection, eps)


def token_masks(x: Tensor, tokens: MaskedReceptiveTokens) -> Tensor:
    token = tokens.mask_token.to(x.dtype).expand(x.shape[0], -1, -1)
    return (token @ x.flatten(2)).sigmoid().unflatten(2, x.shape[2:])


def frozen(
    student: Tensor, teacher: Tensor, problem: Problem, pooled: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Masks and token weights, without gradient."""
    tokens = problem.tokens
    with torch.no_grad():
        masks = token_masks(teacher, tokens)
        if problem.customized:
            masks = masks * token_masks(student, tokens)
        if tokens.prob is None:
            return masks, masks.new_full(masks.shape[:2], 1 / tokens.num_tokens)
        kernel, kernel_bias, mixing, bias = (p.to(teacher.dtype) for p in tokens.prob.parameters())
        logits = F.linear(pooled(teacher, kernel, kernel_bias), mixing.flatten(1), bias)
        return masks, logits.softmax(dim=1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).mean(dim=(2, 3))


def window_summed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pooled_convolution(x, weight, bias).to(x.dtype)


def plain(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """The formula as it is written."""
    masks, weights = frozen(student, teacher, problem, convolved)
    masks = masks.unsqueeze(2)
    squares = (student.unsqueeze(1) * masks - teacher.unsqueeze(1) * masks) ** 2
    values = squares.sum(dim=(3, 4)) / (masks.sum(dim=(3, 4)) + problem.eps)
    return (weights * values.mean(dim=2)).sum(dim=1).mean()


def channels_first(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """Channels summed before tokens, and window sums: the same algebra in plain autograd."""
    masks, weights = frozen(student, teacher, problem, window_summed)
    scale = weights / (masks.sum(dim=(2, 3)) + problem.eps)
    attention = (scale[:, :, None, None] * masks.square()).sum(dim=1)
    return (attention * (student - teacher).square().mean(dim=1)).sum(dim=(1, 2)).mean()


def ours(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """`MaskedDistillationLoss`."""
    return problem.loss(student, teacher)


def one_read(problem: Problem) -> tuple[Tensor, Tensor]:
    """Every element of both maps is read once."""
    return problem.student.sum(), problem.teacher.sum()


LossOf = Callable[[Tensor, Tensor, Problem], Tensor]


def differentiated(loss_of: LossOf) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """Forward plus backward of one form of the loss."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        student = problem.student.detach().requires_grad_()
        loss = loss_of(student, problem.teacher, problem)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    return run


def compiled(loss_of: LossOf) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """The same by `torch.compile`, asked for when it first runs: loading it takes seconds."""
    made = functools.cache(lambda: torch.compile(loss_of))
    return differentiated(lambda *arguments: made()(*arguments))


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a token at a time."""
    student, teacher = problem.student.double(), problem.teacher.double()
    masks, weights = frozen(student, teacher, problem, convolved)
    diff = student - teacher
    factor = torch.zeros_like(diff[:, 0])
    for mask, weight in zip(masks.unbind(dim=1), weights.unbind(dim=1), strict=True):
        area = mask.sum(dim=(1, 2)) + problem.eps
        factor += (weight / area)[:, None, None] * mask.square()
    gradient = 2 / (student.shape[0] * student.shape[1]) * factor.unsqueeze(1) * diff
    return (gradient * diff).sum() / 2, gradient


SUBJECT = Subject(
    name="maskd",
    summary="the masked distillation loss of one level",
    columns={
        "variant": '"detection" or "segmentation"',
        "B": "images",
        "C": "channels",
        "T": "tokens",
        "H": "height",
        "W": "width",
    },
    cases={
        device: [
            ("detection", 2, 256, 6, 100, 168),
            ("detection", 2, 256, 6, 25, 42),
            ("segmentation", 8, 19, 8, 128, 256),
            ("detection", 2, 256, 6, 50, 84),
        ]
        for device in ("cpu", "cuda")
    },
    small=("detection", 2, 16, 3, 12, 14),
    problem=problem,
    providers={
        "ours": Provider(differentiated(ours), "`MaskedDistillationLoss`"),
        "plain": Provider(differentiated(plain), "the formula as written, [B, T, C, H, W]"),
        "one-read": Provider(one_read, "the sums of both maps", floor=True),
        "channels-first": Provider(differentiated(channels_first), "channels summed before tokens"),
        "ours-compiled": Provider(compiled(ours), "`MaskedDistillationLoss`", compiled=True),
        "plain-compiled": Provider(compiled(plain), "the formula as written", compiled=True),
        "channels-first-compiled": Provider(
            compiled(channels_first), "channels summed before tokens", compiled=True
        ),
    },
    truth=truth,
)
