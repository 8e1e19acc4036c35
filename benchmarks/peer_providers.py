"""Who computes the contrast in `python -m benchmarks peers`, and on what.

All take a query `[N, D]` of any length and frozen unit keys `[M, D]`, of which key i is the positive of
query i, and give the loss and its gradient with respect to the query:

    loss = F.cross_entropy(scale * F.normalize(query, dim=1) @ keys.T, torch.arange(N))

The query is normalised inside, because two of the peers do so in any case.
"""

import functools
import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pixdistill.ops.row_lse import row_lse, why_not_triton

CHUNK = 1024  # rows of a checkpointed chunk


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors without gradient: each run asks for its own."""

    query: Tensor
    keys: Tensor
    temperature: float = 0.2

    @classmethod
    def random(
        cls, rows: int, columns: int, width: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        """Random data, from a fixed seed: zeros would run faster than anything real."""
        if rows > columns:
            raise ValueError(f"every query has its positive among the keys; got {rows} > {columns}")
        generator = torch.Generator(device).manual_seed(rows + columns + width)
        random = functools.partial(torch.randn, generator=generator, device=device)
        keys = F.normalize(random(columns, width), dim=1)
        query = width**-0.5 * random(rows, width) + 0.5 * keys[:rows]  # resembles its positive
        return cls(query.to(dtype), keys.to(dtype))

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    @functools.cached_property
    def target(self) -> Tensor:
        """`[N]`, where each query's positive is among the keys."""
        return torch.arange(self.query.shape[0], device=self.query.device)


LossOf = Callable[[Tensor, Problem], Tensor]
"""The loss of unit queries."""


def dense(query: Tensor, keys: Tensor, target: Tensor, scale: float) -> Tensor:
    """The formula as it is written: all logits, and their cross-entropy in float32."""
    return F.cross_entropy((scale * (query @ keys.T)).float(), target)


def plain(query: Tensor, problem: Problem) -> Tensor:
    return dense(query.float(), problem.keys.float(), problem.target, problem.scale)


def plain_autocast(query: Tensor, problem: Problem) -> Tensor:
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        return dense(query, problem.keys, problem.target, problem.scale)


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
    def forward(ctx: Any, query: Tensor, keys: Tensor, scale: float, operator: Any) -> Tensor:
        output, lse, *_ = operator(query[None, None], keys[None, None], scale)
        ctx.save_for_backward(output[0, 0])
        ctx.scale = scale
        return lse.flatten()[: len(query)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return (ctx.scale * grad.unsqueeze(1) * output).to(output.dtype), None, None, None


def attention(operator: Callable[[Tensor, Tensor, float], tuple[Tensor, ...]]) -> LossOf:
    """One of PyTorch's fused attention operators with V = K."""

    def loss_of(query: Tensor, problem: Problem) -> Tensor:
        lse = _Attention.apply(query, problem.keys, problem.scale, operator)
        return (lse - _positives(query, problem)).mean()

    return loss_of


def _flash_cpu(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, ...]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(query, keys, keys, scale=scale)


def _flash_cuda(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, ...]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    return operator(query, keys, keys, scale=scale)


def _cudnn(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, ...]:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operator(query, keys, keys, None, True, scale=scale)


def _positives(query: Tensor, problem: Problem) -> Tensor:
    """The positives' logits `[N]`."""
    return problem.scale * (query.float() * problem.keys[: len(query)].float()).sum(dim=1)


def torch_linear(query: Tensor, problem: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    scaled = problem.scale * query
    return F.linear_cross_entropy(scaled, problem.keys, problem.target, options=options)


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


def ours(backend: str) -> LossOf:
    """`row_lse` on one backend, told that the vectors are of unit length."""

    def loss_of(query: Tensor, problem: Problem) -> Tensor:
        scale = problem.scale
        lse = row_lse(query, problem.keys, scale, logit_bound=scale, backend=backend)
        return (lse - _positives(query, problem)).mean()

    return loss_of


@dataclass(frozen=True)
class Provider:
    """How one of them is called, what it needs, and what is particular about it."""

    loss_of: LossOf
    package: str | None = None  # its name in the package index
    devices: tuple[str, ...] = ("cpu", "cuda")
    matrices: int = 0  # of N x M float32 that it holds at the peak, roughly
    pairs: int = 0  # bytes for each pair of a positive and a negative, N x N M of them
    beside: bool = False  # the positive is one more logit beside those of the keys
    note: str = ""

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the query."""
        query = problem.query.detach().requires_grad_()
        loss = self.loss_of(F.normalize(query, dim=1), problem)
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    def holds(self, rows: int, columns: int) -> int:
        """Bytes that grow with N x M, at the peak."""
        return (4 * self.matrices + self.pairs * rows) * rows * columns


PROVIDERS: dict[str, Provider] = {
    "plain torch": Provider(plain, matrices=4, note="all logits in float32"),
    "plain torch, autocast": Provider(
        plain_autocast, matrices=4, note="the product in bfloat16, the softmax in float32"
    ),
    "plain torch, compiled": Provider(
        plain_compiled,
        matrices=3,
        note="`torch.compile` of the same, in the tensors' dtype",
    ),
    "checkpointed chunks": Provider(
        checkpointed, note=f"{CHUNK} rows at a time, whose logits are computed again in backward"
    ),
    "attention, CPU flash": Provider(
        attention(_flash_cpu), devices=("cpu",), note="PyTorch's fused attention with V = K"
    ),
    "attention, flash": Provider(
        attention(_flash_cuda), devices=("cuda",), note="PyTorch's fused attention with V = K"
    ),
    "attention, cuDNN": Provider(
        attention(_cudnn), devices=("cuda",), note="PyTorch's fused attention with V = K"
    ),
    "torch linear_cross_entropy": Provider(
        torch_linear, note="PyTorch's own chunks, `F.linear_cross_entropy(options=...)`"
    ),
    "inf-cl": Provider(
        inf_cl, "inf-cl", note="always computes the gradient of the keys too, products in TF32"
    ),
    "cut-cross-entropy": Provider(
        cut_cross_entropy(),
        "cut-cross-entropy",
        note="its default, which leaves small probabilities out of the gradient",
    ),
    "cut-cross-entropy, exact": Provider(
        cut_cross_entropy(filter_eps=None), "cut-cross-entropy", note="`filter_eps=None`"
    ),
    "cut-cross-entropy, compiled": Provider(
        cut_cross_entropy(impl="torch_compile"),
        "cut-cross-entropy",
        devices=("cpu",),
        matrices=3,
        note='`impl="torch_compile"`, its form without a kernel: all logits are held',
    ),
    "liger-kernel": Provider(
        liger, "liger-kernel", note="chunks of rows as small as N D / M, gradient made in forward"
    ),
    "pytorch-metric-learning": Provider(
        metric_learning,
        "pytorch-metric-learning",
        pairs=20,
        note="`NTXentLoss` compares every positive pair with every negative pair: N x N M numbers",
    ),
    "lightly": Provider(
        lightly,
        "lightly",
        matrices=6,
        beside=True,
        note="`NTXentLoss` with a memory bank: M + 1 logits a row, the positive counted twice; "
        "its error is against that",
    ),
    "ours: torch": Provider(ours("torch"), note="`row_lse` streaming in PyTorch"),
    "ours: triton": Provider(ours("triton"), note="`row_lse` in one kernel"),
}


def why_not(
    name: str, problem: Problem, device: str, memory_limit: float, size: tuple[int, ...]
) -> str | None:
    """Why a provider sits out a problem of this size, or None. `problem` is a small one, to try."""
    provider = PROVIDERS[name]
    if device not in provider.devices:
        return f"made for {provider.devices[0].upper()}"
    if provider.package and not importlib.util.find_spec(provider.package.replace("-", "_")):
        return f"not installed: pip install {provider.package}"
    if name == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "this torch has no F.linear_cross_entropy(options=...)"
    if name == "ours: triton" and (reason := why_not_triton(problem.query)):
        return reason
    need = provider.holds(size[0], size[1])
    if need > memory_limit:
        return f"would hold about {need / 2**30:.0f} GiB, above the limit of {memory_limit / 2**30:.0f}"
    return None if name.startswith("ours") else _failure(name, problem)


@functools.lru_cache(maxsize=64)
def _failure(name: str, problem: Problem) -> str | None:
    """What a peer says when it is tried on a small problem, or None if it runs."""
    try:
        PROVIDERS[name](problem)
    except Exception as error:
        return what_failed(error)
    return None


def what_failed(error: Exception) -> str:
    """An error in one line; a bare assertion is named by its code."""
    said = (
        str(error).strip().partition("\n")[0] or traceback.extract_tb(error.__traceback__)[-1].line
    )
    return f"{type(error).__name__}: {said}"


def truth(problem: Problem, *, beside: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a block of rows at a time."""
    keys, count, grads = problem.keys.double(), len(problem.query), []
    total = keys.new_zeros(())
    for rows, target in zip(problem.query.split(1024), problem.target.split(1024), strict=True):
        query = rows.double().requires_grad_()
        logits = problem.scale * (F.normalize(query, dim=1) @ keys.T)
        if beside:
            logits = torch.cat([logits, logits.gather(1, target.unsqueeze(1))], dim=1)
        loss = F.cross_entropy(logits, target, reduction="sum") / count
        grads.append(torch.autograd.grad(loss, query)[0])
        total += loss.detach()
    return total, torch.cat(grads)
