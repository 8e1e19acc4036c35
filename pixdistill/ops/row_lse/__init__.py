"""`row_lse`: log-sum-exp of scaled similarities, with its gradient, in one pass over the keys.

    row_lse(query, keys, scale) == (scale * query @ keys.mT).logsumexp(-1)

The gradient of a row with respect to its query is `scale` times the softmax-weighted mean of the keys,

    expected_key_i = sum_j softmax_j(scale * <q_i, k_j>) * k_j,

so a pass that keeps this mean beside the sum has the whole gradient when it ends, and backward is
one multiplication. No N x M matrix exists at any time.

This file holds the contract, the operator registered with PyTorch, and the only choice of a backend.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..backend import (
    FirstOrderOnly,
    choose,
    operand_dtype,
    refuse_transforms,
    sum_dtype,
    why_no_kernel,
)
from . import chunked, reference
from .arguments import Groups, check

# Widest features of the fused kernel: wider tiles spill registers (`python -m benchmarks kernels`).
_FUSED_WIDTH = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}

# Below these bounds exp(logit) needs no shift: neither it nor a sum of 2^31 of them leaves the range
# in which the dtype of the second product holds it. float16 holds e^-9 as a normal number.
_UNSHIFTED_BOUND = {torch.float16: 9.0, torch.bfloat16: 60.0, torch.float32: 60.0}


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    *,
    key_mask: Tensor | None = None,
    exclude_offset: int | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-sum-exp over the keys of `scale * <query, key>`, differentiable, in one pass.

    The result equals `(scale * query @ keys.mT).logsumexp(-1)` in values and gradients. Natural
    logarithm; -inf, with a zero gradient, for a query that sees no key.

    Args:
        query: `[..., N, D]`, N >= 0, 1 <= D <= 8192. Its dtype is the one that products are made in,
            except under autocast, which casts it as it would for a matrix product.
        keys: `[..., M, D]`, M >= 0. Batch axes broadcast against those of `query`, and keys that are
            shared by the whole batch are never copied for it. Another dtype than the query's is
            converted: block by block in the streaming form, as one copy for the fused kernel.
        scale: a number, or a tensor of one element on the query's device. A tensor gets its gradient
            at no extra pass.
        key_mask: `[..., M]` bool, True = the key counts. A hidden key may hold NaN.
        exclude_offset: hides key `n + exclude_offset` from query `n`; 0 leaves out the diagonal.
        logit_bound: a bound on every `|scale * <query, key>|`, `|scale|` for unit vectors. A small
            one (up to 60; 9 for float16) saves the running maximum. One that does not hold can
            overflow to inf or NaN.
        backend: "triton" is the fused kernel, "torch" the streaming form, "reference" the dense
            oracle, which also has second-order and forward-mode gradients. "auto" takes "triton" on
            a GPU where `why_not_triton` has nothing to say, "torch" elsewhere.

    Returns:
        `[..., N]`, float64 for a float64 query and float32 for all others.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and for a backend that cannot run.
        TypeError: for arguments of the wrong type.
        RuntimeError: when the fused or streaming form is differentiated twice, or in forward mode.

    Example:
        >>> query, keys = torch.randn(2, 6, 8, requires_grad=True), torch.randn(100, 8)
        >>> row_lse(query, keys, 0.5).shape
        torch.Size([2, 6])
    """
    return row_lse_and_max(
        query,
        keys,
        scale,
        key_mask=key_mask,
        exclude_offset=exclude_offset,
        logit_bound=logit_bound,
        backend=backend,
        with_max=False,
    )[0]


def row_lse_and_max(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    *,
    key_mask: Tensor | None = None,
    exclude_offset: int | None = None,
    logit_bound: float | None = None,
    backend: str = "auto",
    with_max: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`row_lse`, and in the same pass the max_logit logit `[..., N]` of each query, without gradient.

    The second result is None unless `with_max`. A query that sees no key has -inf.
    """
    check(query, keys, scale, key_mask, exclude_offset, logit_bound, backend)
    query = query.to(operand_dtype(query))
    if backend == "reference":
        lse, max_logit = reference.row_lse(query, keys, scale, key_mask, exclude_offset)
        return lse, max_logit if with_max else None

    refuse_transforms("row_lse", query, keys)
    dtype = sum_dtype(query)
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(dtype)
    else:
        scale = torch.full((), scale, dtype=dtype, device=query.device)
    groups = Groups(query, keys, key_mask, fold_rows=exclude_offset is None)
    with_weighted_keys = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
    lse, _, max_logit = row_lse_op(
        groups.query,
        groups.keys,
        scale,
        groups.key_mask,
        exclude_offset,
        logit_bound,
        backend,
        with_weighted_keys,
        with_max,
    )
    return groups.restore(lse), groups.restore(max_logit) if with_max else None


def why_not_triton(query: Tensor) -> str | None:
    """The reason why the fused kernel does not take this query, or None: what `backend="auto"` asks.

    A pure predicate of device, dtype, width (the last axis) and the global float32 precision. Under
    autocast, ask with a tensor of the autocast dtype.
    """
    if query.dtype not in _FUSED_WIDTH:
        return f"it has no {query.dtype} form"
    if query.shape[-1] > _FUSED_WIDTH[query.dtype]:
        return (
            f"it holds {query.dtype} features up to width {_FUSED_WIDTH[query.dtype]}, "
            f"and these have {query.shape[-1]}"
        )
    reason = why_no_kernel(query.device)
    if reason is not None:
        return reason
    if query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (
            'float32 at matmul precision "highest" asks for exact products; '
            'torch.set_float32_matmul_precision("high") or autocast admits it'
        )
    return None


def _implementation(query: Tensor, backend: str) -> ModuleType:
    """The module that computes: the only place that picks a backend."""
    if choose(backend, query.device, why_not_triton(query)) != "triton":
        return chunked
    from . import triton_kernels  # loads triton

    return triton_kernels


# --- The operator: grouped shapes, one dtype of statistics, no choice left to the caller ----------


@torch.library.custom_op("pixdistill::row_lse", mutates_args=())
def row_lse_op(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    logit_bound: float | None,
    backend: str,
    with_weighted_keys: bool,
    with_max: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse `[G, N]`, expected key `[G, N, D]` and max_logit logit `[G, N]`; empty where not asked for."""
    subtract_max = logit_bound is None or logit_bound > _UNSHIFTED_BOUND.get(query.dtype, 60.0)
    with torch.autocast(query.device.type, enabled=False):
        result = _implementation(query, backend).row_lse(
            query,
            keys,
            scale,
            key_mask,
            exclude_offset,
            subtract_max=subtract_max,
            with_weighted_keys=with_weighted_keys,
            with_max=with_max,
        )
    lse, weighted_keys, max_logit = result
    return (
        lse,
        query.new_empty(0) if weighted_keys is None else weighted_keys,
        lse.new_empty(0) if max_logit is None else max_logit,
    )


@row_lse_op.register_fake
def _(
    query, keys, scale, key_mask, exclude_offset, logit_bound, backend, with_weighted_keys, with_max
):
    lse = query.new_empty(query.shape[:2], dtype=sum_dtype(query))
    weighted_keys = query.new_empty(query.shape if with_weighted_keys else 0)
    return lse, weighted_keys, lse.new_empty(lse.shape if with_max else 0)


@torch.library.custom_op("pixdistill::row_lse_grad_keys", mutates_args=())
def row_lse_grad_keys_op(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
    backend: str,
) -> Tensor:
    """`(softmax(logits) * grad_rows[..., None]).mT @ query` `[G, M, D]`, in the dtype of the keys."""
    with torch.autocast(query.device.type, enabled=False):
        return _implementation(query, backend).row_lse_grad_keys(
            grad_rows, query, keys, scale, key_mask, exclude_offset, lse
        )


@row_lse_grad_keys_op.register_fake
def _(grad_rows, query, keys, scale, key_mask, exclude_offset, lse, backend):
    return keys.new_empty(keys.shape)


def _setup_context(ctx, inputs, output):
    query, keys, scale, key_mask, ctx.exclude_offset, _, ctx.backend, *_ = inputs
    lse, weighted_keys, max_logit = output
    ctx.mark_non_differentiable(weighted_keys, max_logit)
    ctx.set_materialize_grads(False)
    needs_query, needs_keys, needs_scale = ctx.needs_input_grad[:3]
    # Frozen keys are not kept, so a queue may be overwritten between forward and backward. The query
    # is kept because a second differentiation has to find its way back here, to be refused.
    ctx.save_for_backward(
        query,
        keys if needs_keys else None,
        scale,
        key_mask if needs_keys else None,
        lse if needs_keys else None,
        weighted_keys if needs_query or needs_scale else None,
    )


def _backward(ctx, grad_lse, grad_expected_key, grad_largest):
    if grad_lse is None:
        return (None,) * 9
    query, keys, scale, key_mask, lse, weighted_keys = ctx.saved_tensors
    needs_query, needs_keys, needs_scale = ctx.needs_input_grad[:3]
    grad_query = grad_keys = grad_scale = None
    grad_rows = grad_lse * scale
    if needs_query:
        grad_query = (grad_rows.unsqueeze(-1) * weighted_keys).to(weighted_keys.dtype)
    if needs_scale:
        along = (query.to(grad_lse.dtype) * weighted_keys).sum(dim=-1)  # d lse / d scale
        grad_scale = (grad_lse * along).sum()
    if needs_keys:
        grad_keys = row_lse_grad_keys_op(
            grad_rows, query, keys, scale, key_mask, ctx.exclude_offset, lse, ctx.backend
        )
    if torch.is_grad_enabled():  # create_graph=True
        grads = (grad_query, grad_keys, grad_scale)
        grad_query, grad_keys, grad_scale = (
            None if g is None else FirstOrderOnly.apply("row_lse", g, grad_lse, *ctx.saved_tensors)
            for g in grads
        )
    return grad_query, grad_keys, grad_scale, None, None, None, None, None, None


row_lse_op.register_autograd(_backward, setup_context=_setup_context)
