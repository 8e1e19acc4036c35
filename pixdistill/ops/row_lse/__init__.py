"""`row_lse`: log-sum-exp of scaled similarities, with its gradient, in one pass over the keys.

    row_lse(query, keys, scale) == (scale * query @ keys.mT).logsumexp(-1)

The gradient of a row with respect to its query is `scale` times the softmax-weighted mean of the keys,

    weighted_keys_i = sum_j softmax_j(scale * <q_i, k_j>) * k_j,

so a pass that sums both has the whole gradient when it ends, and backward is one multiplication. No
N x M matrix exists at any time.

`row_lse` is the public function. `passes.py` computes without checks and without autograd, for it and
for other operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, FirstOrderOnly, operand_dtype, refuse_transforms, sum_dtype
from . import reference
from .arguments import check
from .passes import Scale, row_lse_forward, row_lse_grad_keys
from .passes import why_not_triton as why_not_triton


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: Scale,
    *,
    key_mask: Tensor | None = None,
    exclude_offset: int | None = None,
    logit_bound: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Log-sum-exp over the keys of `scale * <query, key>`, differentiable, in one pass.

    The result equals `(scale * query @ keys.mT).logsumexp(-1)` in values and gradients. Natural
    logarithm; -inf, with a zero gradient, for a query that sees no key.

    Args:
        query: `[..., N, D]`, N >= 0, D >= 1. Matrix products run in the query's dtype, or in
            the autocast dtype under autocast.
        keys: `[..., M, D]`, M >= 0. Batch axes broadcast against those of `query`. Keys that the
            whole batch shares are not copied for it. Keys of another dtype than the query's are
            converted: block by block in the chunked form, as one copy for the fused kernel.
        scale: a number, or a tensor of one element on the query's device. A tensor gets its gradient
            without another pass.
        key_mask: `[..., M]` bool, True = the key counts. A hidden key may hold NaN.
        exclude_offset: hides key `n + exclude_offset` from query `n`; 0 leaves out the diagonal.
        logit_bound: an upper bound on every `|scale * <query, key>|`, such as `|scale|` for unit
            vectors. A small one (up to 60; 9 for float16) saves the running maximum. A bound that
            does not hold can overflow to inf or NaN.
        backend: "triton" is the fused kernel, "torch" the chunked form, "reference" the dense form,
            which also has second-order and forward-mode gradients. "auto" takes "triton" on a GPU
            where `why_not_triton` returns None, and "torch" elsewhere.

    Returns:
        `[..., N]`, float64 for a float64 query and float32 for all others.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and for a backend that cannot run.
        TypeError: for arguments of the wrong type.
        RuntimeError: when the fused or chunked form is differentiated twice, or in forward mode.

    Example:
        >>> query, keys = torch.randn(2, 6, 8, requires_grad=True), torch.randn(100, 8)
        >>> row_lse(query, keys, 0.5).shape
        torch.Size([2, 6])
    """
    scale, exclude_offset, logit_bound = check(
        query, keys, scale, key_mask, exclude_offset, logit_bound, backend
    )
    query = query.to(operand_dtype(query))
    if backend == "reference":
        return reference.row_lse(query, keys, scale, key_mask, exclude_offset)[0]

    refuse_transforms("row_lse", query, keys)
    query, keys, key_mask = _same_batch(query, keys, key_mask)
    learned = scale.reshape(()).to(sum_dtype(query)) if isinstance(scale, Tensor) else None
    number = None if isinstance(scale, Tensor) else scale
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or (learned is not None and learned.requires_grad)
    )
    arguments = (query, keys, number, learned, key_mask, exclude_offset, logit_bound, backend)
    operator = row_lse_op if torch.compiler.is_compiling() else _RowLSE.apply
    return operator(*arguments, needs_grad)[0]


# --- Autograd: any batch axes -----------------------------------------------------------------------


def _same_batch(
    query: Tensor, keys: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Broadcast batch axes, except those of keys and mask that the whole batch shares."""
    mask_batch = () if key_mask is None else key_mask.shape[:-1]
    batch = torch.broadcast_shapes(query.shape[:-2], keys.shape[:-2], mask_batch)
    if query.shape[:-2] != batch:
        query = query.expand(*batch, *query.shape[-2:])
    if keys.dim() > 2 and keys.shape[:-2] != batch:
        shared = keys.shape[:-2].numel() == 1
        keys = keys.reshape(keys.shape[-2:]) if shared else keys.expand(*batch, *keys.shape[-2:])
    if key_mask is not None and key_mask.dim() > 1:
        key_mask = key_mask.expand(*batch, key_mask.shape[-1])
    return query, keys, key_mask


def _forward(
    query: Tensor,
    keys: Tensor,
    scale: float | None,
    learned_scale: Tensor | None,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    logit_bound: float | None,
    backend: Any,
    with_weighted_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    """`row_lse_forward` for any batch axes, flattened to one."""
    lse, weighted_keys, _ = row_lse_forward(
        _flat(query),
        _flat(keys),
        scale if learned_scale is None else learned_scale,  # type: ignore[arg-type]
        None if key_mask is None else _flat(key_mask.unsqueeze(-2)).squeeze(1),
        exclude_offset,
        logit_bound=logit_bound,
        backend=backend,
        with_weighted_keys=with_weighted_keys,
    )
    if weighted_keys is not None:
        weighted_keys = weighted_keys.view(query.shape)
    return lse.view(query.shape[:-1]), weighted_keys


def _grad_keys(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: float | None,
    learned_scale: Tensor | None,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
    backend: Any,
) -> Tensor:
    """`row_lse_grad_keys` for any batch axes, flattened to one."""
    query = _flat(query)
    grad_keys = row_lse_grad_keys(
        grad_rows.reshape(query.shape[:2]),
        query,
        _flat(keys),
        scale if learned_scale is None else learned_scale,  # type: ignore[arg-type]
        None if key_mask is None else _flat(key_mask.unsqueeze(-2)).squeeze(1),
        exclude_offset,
        lse.reshape(query.shape[:2]),
        backend=backend,
    )
    return grad_keys.view(keys.shape)


def _flat(tensor: Tensor) -> Tensor:
    batch = tensor.shape[:-2].numel()  # -1 would not do for an empty tensor
    return tensor.reshape(batch, *tensor.shape[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    query, keys, ctx.scale, learned, key_mask, ctx.exclude_offset, _, ctx.backend, *_ = inputs
    lse, weighted_keys = output
    if weighted_keys is not None:
        ctx.mark_non_differentiable(weighted_keys)
    ctx.set_materialize_grads(False)
    needs_query, needs_keys, _, needs_scale = ctx.needs_input_grad[:4]
    # Frozen keys are not saved, so that a queue may be overwritten between forward and backward. The
    # query is saved so that double backward reaches this node and raises.
    ctx.save_for_backward(
        query,
        keys if needs_keys else None,
        learned,
        key_mask if needs_keys else None,
        lse if needs_keys else None,
        weighted_keys if needs_query or needs_scale else None,
    )


def _backward(
    ctx: Any, grad_lse: Tensor | None, grad_keys_of: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    if grad_lse is None:
        return (None,) * 9
    query, keys, learned, key_mask, lse, weighted_keys = ctx.saved_tensors
    needs_query, needs_keys, _, needs_scale = ctx.needs_input_grad[:4]
    grad_query = grad_keys = grad_scale = None
    grad_rows = grad_lse * (ctx.scale if learned is None else learned)
    if needs_query:
        grad_query = torch.empty_like(weighted_keys)
        with torch.no_grad():  # into `out`: half results are rounded once, in one operator
            torch.mul(grad_rows.unsqueeze(-1), weighted_keys, out=grad_query)
    if needs_scale:
        inner = (query.to(grad_lse.dtype) * weighted_keys).sum(dim=-1)  # d lse / d scale
        grad_scale = (grad_lse * inner).sum()
    if needs_keys:
        grad_keys = grad_keys_of(
            grad_rows,
            query,
            keys,
            ctx.scale,
            learned,
            key_mask,
            ctx.exclude_offset,
            lse,
            ctx.backend,
        )
    if torch.is_grad_enabled():  # create_graph=True
        grads = (grad_query, grad_keys, grad_scale)
        grad_query, grad_keys, grad_scale = (
            None if g is None else FirstOrderOnly.apply("row_lse", g, grad_lse, *ctx.saved_tensors)
            for g in grads
        )
    return grad_query, grad_keys, None, grad_scale, None, None, None, None, None


class _RowLSE(torch.autograd.Function):
    """The operator in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_lse, _grad_keys)


# --- Autograd under torch.compile -------------------------------------------------------------------


@torch.library.custom_op("pixdistill::row_lse", mutates_args=())
def row_lse_op(
    query: Tensor,
    keys: Tensor,
    scale: float | None,
    learned_scale: Tensor | None,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    logit_bound: float | None,
    backend: str,
    with_weighted_keys: bool,
) -> tuple[Tensor, Tensor]:
    """The same operator, registered with PyTorch; what was not asked for is empty."""
    lse, weighted_keys = _forward(
        query, keys, scale, learned_scale, key_mask, exclude_offset, logit_bound, backend,
        with_weighted_keys,
    )  # fmt: skip
    return lse, query.new_empty(0) if weighted_keys is None else weighted_keys


@row_lse_op.register_fake
def _(
    query: Tensor, keys: Tensor, scale: Any, learned_scale: Any, key_mask: Any, exclude_offset: Any,
    logit_bound: Any, backend: str, with_weighted_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = query.new_empty(query.shape[:-1], dtype=sum_dtype(query))
    return lse, query.new_empty(query.shape if with_weighted_keys else 0)


@torch.library.custom_op("pixdistill::row_lse_grad_keys", mutates_args=())
def row_lse_grad_keys_op(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: float | None,
    learned_scale: Tensor | None,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
    backend: str,
) -> Tensor:
    """The gradient of the keys, registered with PyTorch."""
    return _grad_keys(
        grad_rows, query, keys, scale, learned_scale, key_mask, exclude_offset, lse, backend
    )


@row_lse_grad_keys_op.register_fake
def _(
    grad_rows: Tensor, query: Tensor, keys: Tensor, scale: Any, learned_scale: Any, key_mask: Any,
    exclude_offset: Any, lse: Tensor, backend: str,
) -> Tensor:  # fmt: skip
    return keys.new_empty(keys.shape)


def _registered_backward(ctx: Any, grad_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad_lse, row_lse_grad_keys_op)


row_lse_op.register_autograd(_registered_backward, setup_context=_save)
