"""The pass over the keys and the gradient of the keys, without checks and without autograd."""

from types import ModuleType

import torch
from torch import Tensor

from ..backend import Backend, choose, no_autocast, why_no_kernel
from . import chunked

Scale = float | Tensor
"""A number, or a 0-dim tensor where it is learned."""

# Widest features of the fused kernel: wider tiles spill registers (`python -m benchmarks kernels`).
_FUSED_WIDTH = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}

# Up to these bounds exp(logit) needs no maximum subtracted: neither it nor a sum of 2^31 of them
# leaves the range of the dtype of the second product. float16 holds e^-9 as a normal number.
_UNSHIFTED_BOUND = {torch.float16: 9.0, torch.bfloat16: 60.0, torch.float32: 60.0}


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


def row_lse_forward(
    query: Tensor,
    keys: Tensor,
    scale: Scale,
    key_mask: Tensor | None = None,
    exclude_offset: int | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    *,
    logit_bound: float | None,
    backend: Backend = "auto",
    with_weighted_keys: bool = True,
    with_max: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """lse `[G, N]`, weighted_keys `[G, N, D]` and max_logit `[G, N]`; the last two where asked for.

    query `[G, N, D]`; keys `[G, M, D]`, or `[1, M, D]` that all share; key_mask `[G, M]` or `[1, M]`;
    scale a number, or a 0-dim tensor in the dtype of sums; labels, int32 and contiguous, `[G, N]` of the
    queries and `[G, M]` or `[1, M]` of the keys. A key of the query's label, if that is at least 0, does
    not count. weighted_keys has the query's dtype, the others the dtype of sums. Nothing
    is checked, and autocast changes nothing.
    """
    batch, rows, width = query.shape
    folds = batch > 1 and _folds(keys, key_mask, exclude_offset)
    if folds:  # shared keys: one long matrix of queries fills tiles better
        query = query.reshape(1, batch * rows, width)
        labels = None if labels is None else (labels[0].reshape(1, batch * rows), labels[1])
    subtract_max = logit_bound is None or logit_bound > _UNSHIFTED_BOUND.get(query.dtype, 60.0)
    form: ModuleType = chunked
    if _runs_triton(query, backend):
        from . import triton_kernels as form  # loads triton
    with no_autocast(query.device):
        lse, weighted_keys, max_logit = form.row_lse(
            query,
            keys,
            scale,
            key_mask,
            exclude_offset,
            labels,
            subtract_max=subtract_max,
            with_weighted_keys=with_weighted_keys,
            with_max=with_max,
        )
    if folds:
        lse = lse.view(batch, rows)
        weighted_keys = None if weighted_keys is None else weighted_keys.view(batch, rows, width)
        max_logit = None if max_logit is None else max_logit.view(batch, rows)
    return lse, weighted_keys, max_logit


def row_lse_grad_keys(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: Scale,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`(softmax(logits) * grad_rows[..., None]).mT @ query`, in the keys' shape and dtype.

    `grad_rows` `[G, N]` is `scale` times the gradient of `lse` `[G, N]`; others as in
    `row_lse_forward`. Probabilities are computed again, from lse.
    """
    batch, rows, width = query.shape
    if batch > 1 and _folds(keys, key_mask, exclude_offset):
        query = query.reshape(1, batch * rows, width)
        grad_rows, lse = grad_rows.reshape(1, batch * rows), lse.reshape(1, batch * rows)
    form: ModuleType = chunked
    if _runs_triton(query, backend):
        from . import triton_grad_keys as form  # loads triton
    with no_autocast(query.device):
        return form.row_lse_grad_keys(grad_rows, query, keys, scale, key_mask, exclude_offset, lse)


def _folds(keys: Tensor, key_mask: Tensor | None, exclude_offset: int | None) -> bool:
    """Whether queries of different batch entries see the same keys."""
    shared_mask = key_mask is None or key_mask.shape[0] == 1
    return keys.shape[0] == 1 and shared_mask and exclude_offset is None


def _runs_triton(query: Tensor, backend: Backend) -> bool:
    return choose(backend, query.device, why_not_triton(query)) == "triton"
