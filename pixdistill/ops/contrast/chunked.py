"""What surrounds the pass over the keys, in PyTorch: CPU, float64, and what the kernels do not take.

No autograd inside, and few operators: on small maps their number is what a call costs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[Tensor, Tensor | None, Tensor | None]
"""lse, weighted_keys and max_logit of one set of keys, as `row_lse_forward` returns them"""

MIN_NORM = 1e-12
"""At or below this norm a vector has no direction: PCD's (and F.normalize's) epsilon."""


def prepare(
    rows: Tensor,
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    *,
    normalize: bool,
    with_tie: bool,
) -> Tensor | None:
    """Fill `rows` and the first three of `stats` from the maps; the tie `[N]` if asked for.

    Contract in the package's `_forward`. Everything is computed in the dtype of `stats`, and only the
    rows are rounded to their own.
    """
    wide = rows if rows.dtype == stats.dtype else torch.empty_like(rows, dtype=stats.dtype)
    batch, channels, height, width = student.shape
    pixels = wide.view(2, batch, height, width, channels)
    pixels[0].copy_(student.permute(0, 2, 3, 1))
    pixels[1].copy_(teacher.permute(0, 2, 3, 1))
    if valid_mask is not None:  # a NaN at an invalid pixel must reach no product
        pixels.masked_fill_(~valid_mask.unsqueeze(-1), 0.0)
    inverse_norms = stats[:2]
    if normalize:
        norms = torch.linalg.vector_norm(wide, dim=2, out=inverse_norms)
        norms.masked_fill_(norms == torch.inf, torch.nan)
        norms.masked_fill_(norms <= MIN_NORM, torch.inf)
        wide.mul_(norms.reciprocal_().unsqueeze(-1))
    elif valid_mask is None:
        inverse_norms.fill_(1.0)
    else:
        inverse_norms.copy_(valid_mask.reshape(-1))
    torch.sum(wide[0] * wide[1], dim=1, out=stats[2])
    if rows is wide:
        return stats[2] if with_tie else None
    rows.copy_(wide)
    return (rows[0].to(stats.dtype) * rows[1]).sum(dim=1) if with_tie else None


def join(a: Part, b: Part, dtype: torch.dtype) -> Part:
    """Results over two sets of keys as one over both; the tensors of `a` are reused.

    lse = logaddexp(lse_a, lse_b)
    weighted_keys = exp(lse_a - lse) weighted_keys_a + exp(lse_b - lse) weighted_keys_b  (in `dtype`)
    """
    lse = torch.logaddexp(a[0], b[0])
    weighted_keys = max_logit = None
    if a[1] is not None and b[1] is not None:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without keys: not inf - inf
        weighted_keys = a[1].to(lse.dtype).mul_((a[0] - finite).exp_().unsqueeze(-1))
        weighted_keys = weighted_keys.addcmul_((b[0] - finite).exp_().unsqueeze(-1), b[1]).to(dtype)
    if a[2] is not None and b[2] is not None:
        max_logit = torch.maximum(a[2], b[2])
    return lse, weighted_keys, max_logit


def finish(
    lse: Tensor,
    max_logit: Tensor | None,
    tie: Tensor | None,
    stats: Tensor,
    scale: float | Tensor,
    valid_mask: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the metrics `[2]` if there is a tie, and the number of valid pixels if some are not.

    Writes the margin, `lse - scale * similarity`, to the last of `stats`.
    """
    lse, similarity, margin = lse.reshape(-1), stats[2], stats[3]
    if isinstance(scale, Tensor):
        torch.addcmul(lse, similarity, scale, value=-1.0, out=margin)
    else:
        torch.sub(lse, similarity, alpha=scale, out=margin)
    loss = F.softplus(margin, threshold=40)  # exact to rounding in float64 too
    num_valid = invalid = None
    if valid_mask is not None:
        invalid = ~valid_mask.reshape(-1)
        loss.masked_fill_(invalid, 0.0)
        num_valid = valid_mask.sum().clamp_min_(1).to(stats.dtype)
    metrics = None
    if max_logit is not None and tie is not None:
        reach = tie * scale
        reach += 1e-5 * reach.abs()  # a tie to rounding of what is multiplied
        logged = torch.stack([(max_logit.reshape(-1) <= reach).to(stats.dtype), similarity])
        if invalid is not None:
            logged.masked_fill_(invalid, 0.0)
        metrics = logged.sum(dim=1) / (max(loss.shape[0], 1) if num_valid is None else num_valid)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / (max(margin.shape[0], 1) if num_valid is None else num_valid)
    return loss, metrics, num_valid


def backward(
    grad: Tensor,
    student: Tensor,
    rows: Tensor,
    stats: Tensor,
    weighted_keys: Tensor,
    num_valid: Tensor | None,
    scale: float | Tensor,
    *,
    normalize: bool,
    mean: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the student's map, in its dtype and strides, and of a learned scale.

        d loss_i / d margin_i = sigmoid(margin_i)
        d margin_i / d q_i    = scale * (weighted_keys_i - k_i)
        d margin_i / d scale  = <q_i, weighted_keys_i> - similarity_i

    and through the normalisation q = s / |s|: ds = (dq - q <q, dq>) / |s|.
    """
    inverse_norm, _, similarity, margin = stats.unbind()
    divisor: Any = num_valid
    if not mean:
        divisor = 1
    elif num_valid is None:
        divisor = max(margin.shape[0], 1)
    weight = torch.sigmoid(margin)
    weight.mul_(grad.reshape(-1) * (scale / divisor))  # one element, or one per pixel
    query = rows[0]
    grad_scale = None
    if needs_scale:
        inner = (query * weighted_keys.to(stats.dtype)).sum(dim=1).sub_(similarity)
        grad_scale = inner.mul_(weight).sum() / scale
    difference = weighted_keys.to(stats.dtype) - rows[1]
    if normalize:
        inner = (query * difference).sum(dim=1, keepdim=True)
        difference.addcmul_(query, inner, value=-1.0)
        weight.mul_(inverse_norm)
    difference.mul_(weight.unsqueeze(-1))
    if num_valid is not None:  # zero at invalid pixels, also beside a NaN at a valid one
        difference.masked_fill_((inverse_norm == 0.0).unsqueeze(-1), 0.0)
    grad_student = torch.empty_like(student)
    batch, channels, height, width = student.shape
    grad_student.permute(0, 2, 3, 1).copy_(difference.view(batch, height, width, channels))
    return grad_student, grad_scale
