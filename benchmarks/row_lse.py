"""`row_lse` alone, forward plus backward, beside what else can compute it.

All compute the gradient of `logsumexp(scale * query @ keys.T, dim=1).mean()` with respect to the query,
on the same unit vectors. "two-products" are the two matrix products alone, the floor of this work.
"ours-pass" and the attention operators are forward passes that hold the gradient, without autograd.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill.ops.backend import Backend
from pixdistill.ops.row_lse import row_lse, row_lse_forward

from .runner import Case, Provider, Subject

TEMPERATURE = 0.2


@dataclass(frozen=True)
class Problem:
    """Unit vectors, without gradient: each run asks for its own."""

    query: Tensor
    keys: Tensor
    scale: float = 1 / TEMPERATURE


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random vectors from a fixed seed: zeros would run faster than anything real."""
    rows, columns, width = case
    generator = torch.Generator(device).manual_seed(rows + columns + width)
    query, keys = (
        F.normalize(torch.randn(n, width, device=device, generator=generator), dim=1).to(dtype)
        for n in (rows, columns)
    )
    return Problem(query, keys)


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a block of rows at a time."""
    keys, grads = problem.keys.double(), []
    total = keys.new_zeros(())
    for rows in problem.query.double().split(1024):
        logits = problem.scale * (rows @ keys.T)
        total = total + logits.logsumexp(dim=1).sum()
        grads.append(problem.scale * (logits.softmax(dim=1) @ keys))
    count = len(problem.query)
    return total / count, torch.cat(grads) / count


def differentiated(
    lse_of: Callable[[Tensor, Problem], Tensor],
) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """Forward plus backward of one way to the log-sum-exp."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        query = problem.query.detach().requires_grad_()
        loss = lse_of(query, problem).mean()
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    return run


def plain(query: Tensor, problem: Problem) -> Tensor:
    """Logits of N x M, their softmax, and its gradient."""
    return (problem.scale * (query @ problem.keys.T)).logsumexp(dim=1)


def torch_chunked(query: Tensor, problem: Problem) -> Tensor:
    """PyTorch's chunked linear cross-entropy; the target's logit, a dot product, is added back."""
    options = torch.nn.LinearCrossEntropyOptions()
    target = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    scaled = query * problem.scale
    loss = F.linear_cross_entropy(scaled, problem.keys, target, options=options)
    return loss + (scaled @ problem.keys[0]).mean()


def ours(query: Tensor, problem: Problem, backend: Backend = "auto") -> Tensor:
    """Told that the vectors are of unit length."""
    scale = problem.scale
    return row_lse(query, problem.keys, scale, logit_bound=scale, backend=backend)


def two_products(problem: Problem) -> tuple[Tensor, Tensor]:
    """Into buffers that already exist, so that their memory does not show."""
    query, keys = problem.query, problem.keys
    logits, grad = _buffers(*query.shape, len(keys), query.dtype, query.device)
    torch.mm(query, keys.T, out=logits)
    torch.mm(logits, keys, out=grad)
    return logits[0, 0], grad


@functools.lru_cache(maxsize=1)
def _buffers(
    rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    logits = torch.empty(rows, columns, dtype=dtype, device=device)
    return logits, torch.empty(rows, width, dtype=dtype, device=device)


def the_pass(problem: Problem) -> tuple[Tensor, Tensor]:
    """What `row_lse` computes in forward: log-sum-exp and weighted keys, without autograd."""
    query, keys, scale = problem.query[None], problem.keys[None], problem.scale
    lse, weighted_keys, _ = row_lse_forward(query, keys, scale, logit_bound=scale)
    assert weighted_keys is not None
    return lse, weighted_keys[0]


def attention(name: str, *flags: object) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """The same by one of PyTorch's fused attention operators with V = K."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        query, keys = (x[None, None] for x in (problem.query, problem.keys))
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        output, lse, *_ = operator(query, keys, keys, *flags, scale=problem.scale)
        return lse, output[0, 0]

    return run


def finish(problem: Problem, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient from a pass."""
    lse, weighted_keys = result
    count = len(problem.query)
    return lse.flatten()[:count].mean(), weighted_keys * (problem.scale / count)


def half_and_narrow(case: Case, dtype: torch.dtype) -> str | None:
    """What the attention kernels of a GPU take."""
    if dtype == torch.float32 or case[-1] > 256:
        return "half precision and D up to 256 only"
    return None


def no_linear_cross_entropy(case: Case, dtype: torch.dtype) -> str | None:
    """It came with torch 2.13."""
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return "this torch has no F.linear_cross_entropy(options=...)"


def matrices(number: int) -> Callable[[Case], float]:
    """So many float32 matrices of N x M."""
    return lambda case: 4.0 * number * case[0] * case[1]


PROVIDERS = {
    "ours": Provider(differentiated(ours), "`row_lse`"),
    "plain": Provider(differentiated(plain), "the formula in PyTorch", holds=matrices(3)),
    "two-products": Provider(
        two_products, "the two matrix products alone", floor=True, holds=matrices(1)
    ),
    "ours-pass": Provider(the_pass, "forward alone, which has the gradient", finish=finish),
    "attention-cpu": Provider(
        attention("flash_attention_for_cpu"),
        "the same by PyTorch's fused attention, V = K",
        devices=("cpu",),
        finish=finish,
    ),
    "attention-cudnn": Provider(
        attention("cudnn_attention", None, True),
        "the same by cuDNN's fused attention, V = K",
        devices=("cuda",),
        why_not=half_and_narrow,
        finish=finish,
    ),
    "attention-flash": Provider(
        attention("flash_attention"),
        "the same by PyTorch's fused attention, V = K",
        devices=("cuda",),
        why_not=half_and_narrow,
        finish=finish,
    ),
    "ours-torch": Provider(
        differentiated(functools.partial(ours, backend="torch")),
        '`row_lse(backend="torch")`',
        devices=("cuda",),
    ),
    "torch-chunked": Provider(
        differentiated(torch_chunked),
        "`F.linear_cross_entropy(options=...)`",
        why_not=no_linear_cross_entropy,
    ),
}

SUBJECT = Subject(
    name="row_lse",
    summary="the operator `row_lse` alone, beside matrix products and fused attention",
    columns={"N": "queries", "M": "keys", "D": "features"},
    cases={
        "cpu": [(4096, 4096, 128), (512, 512, 128), (1024, 1024, 128), (2048, 2048, 128),
                (8192, 8192, 128), (8192, 8192, 256), (6272, 65536, 256)],
        "cuda": [(16384, 16384, 128), (16384, 16384, 256), (16384, 16384, 64), (6272, 65536, 256),
                 (6272, 6272, 128), (65536, 65536, 128), (65536, 65536, 256), (65536, 65536, 64)],
    },
    small=(64, 96, 16),
    problem=problem,
    providers=PROVIDERS,
    truth=truth,
    work=lambda case: 4.0 * case[0] * case[1] * case[2],
)  # fmt: skip

WIDE = Subject(
    name="wide",
    summary="the same, with more features than the fused kernel takes",
    columns=SUBJECT.columns,
    cases={
        "cpu": [(2048, 2048, 512), (2048, 8192, 2048)],
        "cuda": [(16384, 16384, 512), (16384, 65536, 2048), (8192, 16384, 8192), (16384, 16384, 384)],
    },
    small=(64, 96, 300),
    problem=problem,
    providers={
        name: PROVIDERS[name]
        for name in ("ours", "ours-pass", "plain", "two-products", "torch-chunked")
    },
    truth=truth,
    work=SUBJECT.work,
)  # fmt: skip
