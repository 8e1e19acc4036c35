"""The contrast by every library that can compute it.

All take queries `[N, D]` of any length and frozen unit keys `[M, D]`, of which key i is the positive of
query i, and compute the loss and its gradient with respect to the queries:

    loss = F.cross_entropy(scale * F.normalize(query, dim=1) @ keys.T, torch.arange(N))
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pixdistill.functional import pixel_contrast_loss

from .row_lse import half_and_narrow, matrices, no_linear_cross_entropy
from .runner import Case, Provider, Subject

CHUNK = 1024  # rows of a checkpointed chunk
PCD = (6272, 65536, 256)  # 128 maps of 7 x 7 pixels, an eighth of its batch, against its queue


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors without gradient: each run asks for its own."""

    query: Tensor
    keys: Tensor
    temperature: float = 0.2

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    @functools.cached_property
    def target(self) -> Tensor:
        """`[N]`, where each query's positive is among the keys."""
        return torch.arange(len(self.query), device=self.query.device)


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random queries, each of which resembles its positive."""
    rows, columns, width = case
    if rows > columns:
        raise SystemExit(f"every query has its positive among the keys; got {rows} > {columns}")
    generator = torch.Generator(device).manual_seed(rows + columns + width)
    random = functools.partial(torch.randn, generator=generator, device=device)
    keys = F.normalize(random(columns, width), dim=1)
    query = width**-0.5 * random(rows, width) + 0.5 * keys[:rows]
    return Problem(query.to(dtype), keys.to(dtype))


def truth(problem: Problem, *, beside: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a block of rows at a time."""
    keys, count, grads = problem.keys.double(), len(problem.query), []
    total = keys.new_zeros(())
    for rows, target in zip(problem.query.split(1024), problem.target.split(1024), strict=True):
        query = rows.double().requires_grad_()
        logits = problem.scale * (F.normalize(query, dim=1) @ keys.T)
        if beside:  # the positive is one more logit beside those of the keys
            logits = torch.cat([logits, logits.gather(1, target.unsqueeze(1))], dim=1)
        loss = F.cross_entropy(logits, target, reduction="sum") / count
        grads.append(torch.autograd.grad(loss, query)[0])
        total += loss.detach()
    return total, torch.cat(grads)


LossOf = Callable[[Tensor, Problem], Tensor]


def differentiated(loss_of: LossOf, normalize: bool = True) -> Callable[[Problem], Any]:
    """Forward plus backward, the queries normalised for all that do not do it themselves."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        query = problem.query.detach().requires_grad_()
        loss = loss_of(F.normalize(query, dim=1) if normalize else query, problem)
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    return run


# --- PyTorch --------------------------------------------------------------------------------------


def dense(query: Tensor, keys: Tensor, target: Tensor, scale: float) -> Tensor:
    """As people write it: all logits, and their cross-entropy in float32."""
    return F.cross_entropy((scale * (query @ keys.T)).float(), target)


def plain(query: Tensor, problem: Problem) -> Tensor:
    return dense(query, problem.keys, problem.target, problem.scale)


def plain_autocast(query: Tensor, problem: Problem) -> Tensor:
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        return plain(query, problem)


def plain_compiled(query: Tensor, problem: Problem) -> Tensor:
    return _compiled()(query, problem.keys, problem.target, problem.scale)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(dense, dynamic=False)


def checkpointed(query: Tensor, problem: Problem) -> Tensor:
    """Chunks of rows whose logits are computed again in backward."""
    total = query.new_zeros((), dtype=torch.float32)
    for rows, target in zip(query.split(CHUNK), problem.target.split(CHUNK), strict=True):
        mean = checkpoint(dense, rows, problem.keys, target, problem.scale, use_reentrant=False)
        total = total + mean * len(rows)
    return total / len(query)


class _Attention(torch.autograd.Function):
    """Log-sum-exp by an attention whose values are the keys: its output is the gradient, unscaled."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, scale: float, name: str, *flags: Any
    ) -> Tensor:
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        query, keys = query[None, None], keys[None, None]
        output, lse, *_ = operator(query, keys, keys, *flags, scale=scale)
        ctx.save_for_backward(output[0, 0])
        ctx.scale = scale
        return lse.flatten()[: query.shape[2]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return (ctx.scale * grad.unsqueeze(1) * output).to(output.dtype), *[None] * 5


def attention(name: str, *flags: Any) -> LossOf:
    """One of PyTorch's fused attention operators with V = K."""

    def loss_of(query: Tensor, problem: Problem) -> Tensor:
        lse = _Attention.apply(query, problem.keys, problem.scale, name, *flags)
        positive = (query.float() * problem.keys[: len(query)].float()).sum(dim=1)
        return (lse - problem.scale * positive).mean()

    return loss_of


def torch_linear(query: Tensor, problem: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    scaled = problem.scale * query
    return F.linear_cross_entropy(scaled, problem.keys, problem.target, options=options)


# --- Other libraries, and ours --------------------------------------------------------------------


def inf_cl(query: Tensor, problem: Problem) -> Tensor:
    from inf_cl import cal_flash_loss

    width = min(query.shape[1], 256)  # wider vectors are taken in parts of its widest
    losses = cal_flash_loss(query, problem.keys, problem.target, problem.scale, head_dim=width)
    return losses.mean()


def cut_cross_entropy(**options: Any) -> LossOf:
    """Apple's, with the keys as the classifier's weights."""

    def loss_of(query: Tensor, problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(problem.scale * query, problem.keys, problem.target, **options)

    return loss_of


def liger(query: Tensor, problem: Problem) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    apply = LigerFusedLinearCrossEntropyFunction.apply
    return apply(problem.scale * query, problem.keys, problem.target)[0]


def metric_learning(query: Tensor, problem: Problem) -> Tensor:
    """Each query is the only one of its label; keys without a query are negatives to all."""
    from pytorch_metric_learning.losses import NTXentLoss

    labels = torch.arange(len(problem.keys), device=query.device)
    criterion = NTXentLoss(temperature=problem.temperature)
    return criterion(query, problem.target, ref_emb=problem.keys, ref_labels=labels)


def lightly(query: Tensor, problem: Problem) -> Tensor:
    """MoCo's loss: the keys are the memory bank, and each positive stands beside them once more."""
    criterion = _memory_bank(problem)
    criterion.memory_bank.bank_ptr.zero_()  # the positives return to the slots that they came from
    return criterion(query, problem.keys[: len(query)])


@functools.lru_cache(maxsize=1)
def _memory_bank(problem: Problem) -> Any:
    try:
        from lightly.loss import NTXentLoss
    except RuntimeError:  # torchvision lacks its operators beside a torch made for another device;
        for name in ("nms", "qnms"):  # its import needs their names, and this loss none of them
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        from lightly.loss import NTXentLoss

    criterion = NTXentLoss(problem.temperature, memory_bank_size=tuple(problem.keys.shape))
    criterion.memory_bank.bank = problem.keys.clone()
    return criterion.to(problem.keys.device)


def without_the_double(problem: Problem, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same distance from the truth as lightly's result has from a truth that counts twice."""
    pairs = zip(result, truth(problem), truth(problem, beside=True), strict=True)
    loss, grad = (found.double() + right - beside for found, right, beside in pairs)
    return loss, grad


def ours(query: Tensor, problem: Problem) -> Tensor:
    """The positives' keys are the batch, all others the queue."""
    teacher, others = problem.keys[: len(query)], problem.keys[len(query) :]
    return pixel_contrast_loss(
        query,
        teacher,
        temperature=problem.temperature,
        queue_keys=others if len(others) else None,
    )


def not_float32(case: Case, dtype: torch.dtype) -> str | None:
    """Where autocast changes nothing."""
    return None if dtype == torch.float32 else "the same as plain in half precision"


def quadratic_in_queries(case: Case) -> float:
    """Bytes of every pair of a positive and a negative."""
    rows, columns, _ = case
    return 20.0 * rows * rows * columns


ATTENTION = "PyTorch's fused attention with V = K"
PROVIDERS = {
    "ours": Provider(differentiated(ours, normalize=False), "`pixel_contrast_loss`"),
    "plain": Provider(
        differentiated(plain), "`F.cross_entropy` of all logits in float32", holds=matrices(4)
    ),
    "plain-autocast": Provider(
        differentiated(plain_autocast),
        "the same, the product in bfloat16",
        holds=matrices(4),
        why_not=not_float32,
    ),
    "attention-cpu": Provider(
        differentiated(attention("flash_attention_for_cpu")), ATTENTION, devices=("cpu",)
    ),
    "attention-flash": Provider(
        differentiated(attention("flash_attention")),
        ATTENTION,
        devices=("cuda",),
        why_not=half_and_narrow,
    ),
    "attention-cudnn": Provider(
        differentiated(attention("cudnn_attention", None, True)),
        f"{ATTENTION}, by cuDNN",
        devices=("cuda",),
        why_not=half_and_narrow,
    ),
    "checkpointed": Provider(
        differentiated(checkpointed),
        f"{CHUNK} rows at a time, whose logits are computed again in backward",
    ),
    "torch-chunked": Provider(
        differentiated(torch_linear),
        "`F.linear_cross_entropy(options=...)`",
        why_not=no_linear_cross_entropy,
    ),
    "liger-kernel": Provider(
        differentiated(liger),
        "chunks of rows as small as N D / M, gradient made in forward",
        package="liger_kernel",
    ),
    "cut-cross-entropy": Provider(
        differentiated(cut_cross_entropy()),
        "its default, which leaves small probabilities out of the gradient",
        package="cut_cross_entropy",
    ),
    "cut-cross-entropy-exact": Provider(
        differentiated(cut_cross_entropy(filter_eps=None)),
        "`filter_eps=None`",
        package="cut_cross_entropy",
    ),
    "inf-cl": Provider(
        differentiated(inf_cl),
        "always computes the gradient of the keys too, products in TF32",
        package="inf_cl",
    ),
    "pytorch-metric-learning": Provider(
        differentiated(metric_learning),
        "`NTXentLoss` compares every positive pair with every negative pair: N x N M elements",
        package="pytorch_metric_learning",
        holds=quadratic_in_queries,
    ),
    "lightly": Provider(
        differentiated(lightly),
        "`NTXentLoss` with a memory bank: the positive counts twice, and its error is against that",
        package="lightly",
        holds=matrices(6),
        finish=without_the_double,
    ),
    "plain-compiled": Provider(
        differentiated(plain_compiled), "plain by `torch.compile`", compiled=True, holds=matrices(3)
    ),
    "cut-cross-entropy-compiled": Provider(
        differentiated(cut_cross_entropy(impl="torch_compile")),
        '`impl="torch_compile"`, its form without a kernel: all logits are held',
        devices=("cpu",),
        package="cut_cross_entropy",
        compiled=True,
        holds=matrices(3),
    ),
}

SUBJECT = Subject(
    name="peers",
    summary="the contrast by every library that can compute it",
    columns={"N": "queries", "M": "keys, at least N", "D": "features"},
    cases={
        "cpu": [*((n, n, 128) for n in (4096, 256, 512, 1024, 2048, 8192)), PCD],
        "cuda": [
            (16384, 16384, 128),
            PCD,
            (1024, 1024, 128),
            (16384, 16384, 256),
            (16384, 16384, 2048),
            (65536, 65536, 128),
            (16384, 16384, 64),
            (16384, 16384, 512),
            (4096, 4096, 128),
            (262144, 262144, 128),
        ],
    },
    small=(48, 80, 16),
    problem=problem,
    providers=PROVIDERS,
    truth=truth,
    work=lambda case: 4.0 * case[0] * case[1] * case[2],
)
