"""`row_lse` over keys that come block by block, as from a ring of ranks, with one gradient to keep.

Joining the blocks' results with `torch.logaddexp` would be right, but every block would keep a mean
of its keys as large as the query for backward. Here the means are joined as the blocks pass:

    lse = logaddexp(lse_a, lse_b),   mean = exp(lse_a - lse) mean_a + exp(lse_b - lse) mean_b.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .backend import FirstOrderOnly, operand_dtype, sum_dtype
from .row_lse import row_lse_and_max, row_lse_forward

Keys = tuple[Tensor, Tensor | None, int | None]
"""keys `[M, D]`, their mask `[M]`, and the exclude_offset, as `row_lse` takes them"""


def joined_row_lse(
    query: Tensor,
    blocks: Iterable[Keys],
    scale: float | Tensor,
    *,
    logit_bound: float | None = None,
    backend: str = "auto",
    with_max: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp `[N]` of the query `[N, D]` over all blocks, and the max_logit logit `with_max`.

    Each block may be overwritten as soon as the next is asked for. Arguments as in `row_lse`; keys
    get no gradient. `backend="reference"` keeps the blocks, and asks for them all at first.
    """
    query = query.to(operand_dtype(query))
    if backend == "reference":
        parts = [
            row_lse_and_max(
                query,
                keys.clone(),
                scale,
                key_mask=None if mask is None else mask.clone(),
                exclude_offset=offset,
                backend=backend,
            )
            for keys, mask, offset in blocks
        ]
        lse = functools.reduce(torch.logaddexp, [part for part, _ in parts])
        max_logit = functools.reduce(torch.maximum, [top for _, top in parts if top is not None])
        return lse, max_logit if with_max else None
    dtype = sum_dtype(query)
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(dtype)
    else:
        scale = torch.full((), scale, dtype=dtype, device=query.device)
    lse, max_logit = _JoinedRowLSE.apply(query, scale, blocks, logit_bound, backend, with_max)
    return lse, max_logit if with_max else None


class _JoinedRowLSE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        scale: Tensor,
        blocks: Iterable[Keys],
        logit_bound: float | None,
        backend: str,
        with_max: bool,
    ) -> tuple[Tensor, Tensor]:
        with_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dtype = sum_dtype(query)
        lse = query.new_full(query.shape[:1], -torch.inf, dtype=dtype)
        max_logit = lse.clone()
        mean = query.new_zeros(query.shape if with_mean else 0, dtype=dtype)
        for keys, mask, offset in blocks:
            part, part_mean, top = row_lse_forward(
                query.unsqueeze(0),
                keys.unsqueeze(0),
                scale,
                None if mask is None else mask.unsqueeze(0),
                offset,
                logit_bound=logit_bound,
                backend=backend,
                with_weighted_keys=with_mean,
                with_max=with_max,
            )
            joined = torch.logaddexp(lse, part[0])
            if with_mean:
                finite = joined.masked_fill(joined == -torch.inf, 0.0).unsqueeze(-1)
                mean.mul_((lse.unsqueeze(-1) - finite).exp_())
                weight = (part[0].unsqueeze(-1) - finite).exp_()
                mean.addcmul_(weight, part_mean[0].to(dtype))
            if with_max:
                max_logit = torch.maximum(max_logit, top[0])
            lse = joined
        ctx.mark_non_differentiable(max_logit)
        # The query also serves a second differentiation to find its way here, to be refused.
        ctx.save_for_backward(query, scale, mean.to(query.dtype))
        return lse, max_logit

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, scale, mean = ctx.saved_tensors
        grad_query = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_query = ((grad_lse * scale).unsqueeze(-1) * mean).to(mean.dtype)
        if ctx.needs_input_grad[1]:
            along = (query.to(grad_lse.dtype) * mean).sum(dim=-1)
            grad_scale = (grad_lse * along).sum()
        if torch.is_grad_enabled():  # create_graph=True
            grad_query, grad_scale = (
                None
                if grad is None
                else FirstOrderOnly.apply("row_lse", grad, grad_lse, query, scale)
                for grad in (grad_query, grad_scale)
            )
        return grad_query, grad_scale, None, None, None, None
