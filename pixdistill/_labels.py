"""Checks of labels: integers per pixel or vector. A negative label is that of nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_labels(value: Any, shape: Sequence[int], like: Tensor, *, name: str = "labels") -> None:
    """Integers of exactly this shape, on the device of `like`."""
    _checks.tensor(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be integers; got {value.dtype}. Convert class indices by {name}.long(), and "
            f"one-hot or predicted scores [B, C, ...] by {name}.argmax(dim=1)."
        )
    got, wanted = tuple(value.shape), tuple(shape)
    if got != wanted:
        remedy = ""
        if got == (*wanted[:1], 1, *wanted[1:]):
            remedy = f" Write {name}.squeeze(1)."
        elif len(got) == len(wanted) > 1 and got[0] == wanted[0]:
            remedy = (
                f" Bring them to the map's size: F.interpolate({name}[:, None].float(), {wanted[1:]}, "
                'mode="nearest")[:, 0].long().'
            )
        raise ValueError(
            f"{name} must have one element per pixel or vector, shape {wanted}; got {got}.{remedy}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}; got {value.device}. "
            f"Move them: {name}.to({str(like.device)!r})."
        )


def check_both(
    labels: Tensor | None,
    shape: Sequence[int],
    like: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
) -> None:
    """Labels of this shape for the anchors and one for each of the queue's vectors, or neither."""
    if labels is not None and keys is not None and key_labels is None:
        raise ValueError(
            "labels must be given for the queue's vectors too; got none. Build the queue as "
            "PixelQueue(..., labels=True), or pass queue_labels, -1 for a vector without."
        )
    if labels is None and key_labels is not None:
        raise ValueError(
            "labels must be given where the queue's vectors have labels; got None. To contrast "
            "without labels, use a queue without them."
        )
    if labels is not None:
        check_labels(labels, shape, like)
    if key_labels is not None:
        count = 0 if keys is None else keys.shape[0]
        check_labels(key_labels, (count,), like, name="queue_labels")
