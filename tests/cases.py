"""Every public loss and module, one line each: what all of them must do is tested over these tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import Result, device_of
from torch import Tensor, nn

from pixdistill import (
    AfDCDLoss,
    L2Norm,
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    MHSAPlugin,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
)

WIDTH, NARROW = 16, 12
"""Channels of the teacher's map, and of a student's that a loss aligns."""


class Case(NamedTuple):
    """A loss or module with small settings."""

    build: Callable[..., nn.Module]
    """`build(backend)` for losses, `build()` for modules."""
    plain: Callable[..., Tensor] | None = None
    """`plain(loss, student, teacher, valid)`: the loss as people write it, materialising everything."""
    width: int = WIDTH
    """Channels of the student's map, or of the module's input."""


# --- The losses as people write them --------------------------------------------------------------


def plain_contrast(loss: Any, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of the matrix of all similarities."""
    queue = teacher[:0, :, 0, 0] if loss.queue is None else loss.queue.keys
    in_batch = loss.negatives is not None
    rows = [F.normalize(rearrange(x, "b c h w -> b (h w) c"), dim=-1) for x in (student, teacher)]
    sets = [(s[v], t[v]) for s, t, v in zip(*rows, valid.flatten(1), strict=True)]
    if loss.negatives != "image":
        sets = [(torch.cat([s for s, _ in sets]), torch.cat([t for _, t in sets]))] if sets else []
    total = student.sum() * 0
    for s, t in sets:
        positive = (s * t).sum(dim=1, keepdim=True)
        own = s @ t.T
        logits = torch.cat([positive, *([own] if in_batch else []), s @ queue.T], dim=1)
        itself = F.pad(torch.eye(len(s), dtype=torch.bool), (1, len(queue))) & in_batch
        logits = (logits / loss.temperature).masked_fill(itself[:, : logits.shape[1]], -torch.inf)
        first = torch.zeros(len(s), dtype=torch.int64)
        total = total + F.cross_entropy(logits, first, reduction="sum")
    return total / valid.sum().clamp_min(1)


def plain_masked(loss: Any, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """The distance of each token, channel and pixel `[B, T, C, H, W]`."""
    tokens = loss.tokens[0]
    seen = valid.unsqueeze(1)
    student, teacher = student.masked_fill(~seen, 0), teacher.masked_fill(~seen, 0)
    if loss.align is not None:
        student = loss.align[0](student)

    def masks_of(x: Tensor) -> Tensor:
        return torch.einsum("tc,bchw->bthw", tokens.mask_token, x).sigmoid()

    masks = masks_of(teacher) * seen
    if loss.customize_after == 0:
        masks = masks * masks_of(student)
    masks = masks.detach()
    convolved, count = tokens.prob[0](teacher) * seen, valid.sum(dim=(1, 2)).clamp_min(1)
    pooled = convolved.sum(dim=(2, 3)) / count.unsqueeze(1)
    weights = tokens.prob[2](pooled[:, :, None, None]).flatten(1).softmax(dim=1).detach()
    each = masks.unsqueeze(2) * (student - teacher).masked_fill(~seen, 0).unsqueeze(1)
    distance = each.square().sum(dim=(3, 4)).mean(dim=2) / (masks.sum(dim=(2, 3)) + loss.eps)
    return (weights * distance).sum() / valid.flatten(1).any(dim=1).sum().clamp_min(1)


def plain_af_dcd(loss: Any, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """All distances within patches of 2 x 2 pixels, pooled by 2, of 4 groups of channels."""
    seen = valid.unsqueeze(1)
    aligned = student.masked_fill(~seen, 0)
    if loss.align is not None:
        aligned = loss.align(aligned).masked_fill(~seen, 0)
    rebuilt = loss.projector(aligned)
    gap = (rebuilt - teacher).masked_fill(~seen, 0)
    mimic = gap.square().sum() / max(len(student), 1)

    def vectors(x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4), value=-torch.inf)
        x = F.max_pool2d(x, 2)
        x = x.masked_fill(x == -torch.inf, 0)
        return rearrange(x, "b (g c) (i p) (j q) -> (b i j) (p q g) c", p=2, q=2, g=4)

    used = (
        vectors(seen.to(student.dtype).expand(-1, 4, -1, -1)).squeeze(2) > 0
    )  # [patches, vectors]
    one, other = (vectors(x.masked_fill(~seen, -torch.inf)) for x in (rebuilt, teacher))
    logits = (one.unsqueeze(2) - other.unsqueeze(1)).abs().sum(dim=3) / -0.07
    group = torch.arange(16) % 4
    negative = (group.unsqueeze(1) != group) & used.unsqueeze(1)
    itself = torch.eye(16, dtype=torch.bool)
    lse = logits.masked_fill(~(negative | itself), -torch.inf).logsumexp(dim=2)
    contrast = (lse - logits.diagonal(dim1=1, dim2=2))[used].sum() / (used.sum() / 4).clamp_min(1)
    return loss.mimic_weight * mimic + loss.contrast_weight * contrast


class OnLevels(nn.Module):
    """A loss of two levels as a loss of one map: the second level is every other pixel."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Tensor, teacher: Tensor, *, valid_mask: Tensor | None = None, **options: Any
    ) -> Any:
        valid = None if valid_mask is None else [valid_mask, valid_mask[:, ::2, ::2]]
        maps = ([x, x[:, :, ::2, ::2]] for x in (student, teacher))
        return self.loss(*maps, valid_mask=valid, **options)


def plain_levels(loss: Any, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Both levels of `OnLevels`, which have the same tokens."""
    coarse = student[:, :, ::2, ::2], teacher[:, :, ::2, ::2], valid[:, ::2, ::2]
    return plain_masked(loss.loss, student, teacher, valid) + plain_masked(loss.loss, *coarse)


# --- Builders -------------------------------------------------------------------------------------


def tokens() -> MaskedReceptiveTokens:
    """Tokens that tell pixels apart, as learned ones do."""
    made = MaskedReceptiveTokens(WIDTH, 3)
    nn.init.normal_(made.mask_token, std=0.3)
    return made


def masked(backend: str = "auto", *, levels: int = 1, **settings: Any) -> MaskedDistillationLoss:
    """A loss with one set of tokens for all levels."""
    return MaskedDistillationLoss([tokens()] * levels, backend=backend, **settings)


def af_dcd(backend: str = "auto", student_channels: int = WIDTH, **settings: Any) -> AfDCDLoss:
    """Small patches, maps of any size, and no random mask."""
    sizes = {"num_groups": 4, "patch_size": 2, "pool_size": 2, "ragged": "pad", "mask_ratio": 0.0}
    weights = {"mimic_weight": 1e-2, "contrast_weight": 0.1}
    given = {**sizes, **weights, "backend": backend, **settings}
    return AfDCDLoss(student_channels, WIDTH, **given)


def head() -> nn.Sequential:
    """A teacher's head, trained on vectors."""
    hidden = nn.Linear(WIDTH, 12)
    return nn.Sequential(hidden, nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, WIDTH), L2Norm())


def plugin() -> MHSAPlugin:
    """A plug-in that has learned: at the start it does nothing."""
    made = MHSAPlugin(WIDTH, 2, position="relative")
    nn.init.normal_(made.out.weight, std=0.1)
    return made


LOSSES = {
    "contrast, batch": Case(
        lambda backend="auto": PixelContrastLoss(backend=backend), plain_contrast
    ),
    "contrast, image": Case(
        lambda backend="auto": PixelContrastLoss(negatives="image", backend=backend), plain_contrast
    ),
    "contrast, queue": Case(
        lambda backend="auto": PixelContrastLoss(
            negatives=None, queue=PixelQueue(24, WIDTH), backend=backend
        ),
        plain_contrast,
    ),
    "contrast, learnable": Case(
        lambda backend="auto": PixelContrastLoss(
            negatives="image",
            queue=PixelQueue(24, WIDTH),
            learnable_temperature=True,
            backend=backend,
        ),
        plain_contrast,
    ),
    "masked": Case(masked, plain_masked),
    "masked, aligned": Case(
        lambda backend="auto": masked(backend, student_channels=NARROW, customize_after=0),
        plain_masked,
        NARROW,
    ),
    "masked, levels": Case(
        lambda backend="auto": OnLevels(masked(backend, levels=2)), plain_levels
    ),
    "af_dcd": Case(af_dcd, plain_af_dcd),
    "af_dcd, aligned": Case(
        lambda backend="auto": af_dcd(backend, NARROW, projector="enhanced"), plain_af_dcd, NARROW
    ),
}
"""A new loss adds a line, and the loss as people write it."""

MODULES = {
    "SpatialAdaptor": Case(lambda: SpatialAdaptor(head(), trainable=True)),
    "PixelHead": Case(lambda: PixelHead(WIDTH, 8, WIDTH)),
    "MHSAPlugin": Case(plugin),
    "MaskedReceptiveTokens": Case(tokens),
}
"""Modules that are called with one map."""

ALL = LOSSES | MODULES


class ListLike:
    """What configuration libraries give for a list: neither a list nor a registered Sequence."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


# --- Calls ----------------------------------------------------------------------------------------


def build(name: str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same module at every call."""
    torch.manual_seed(0)
    case = ALL[name]
    module = case.build(backend) if name in LOSSES else case.build()
    return module.to(device_of(backend), dtype)


def inputs(
    name: str,
    batch: int = 2,
    height: int = 6,
    width: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Tensor, ...]:
    """The maps of student and teacher, or the one map of a module; equal in all dtypes to rounding."""
    generator = torch.Generator().manual_seed(seed)
    widths = (ALL[name].width, WIDTH) if name in LOSSES else (ALL[name].width,)
    shapes = [(batch, channels, height, width) for channels in widths]
    made = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)
    return tuple(x.to(dtype) for x in made)


def some_valid(batch: int = 2, height: int = 6, width: int = 5) -> Tensor:
    """A mask of about two thirds of the pixels."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, height, width, generator=generator) < 0.66


def cotangent(result: Tensor, generator: torch.Generator) -> Tensor:
    """Fixed numbers, whatever the default dtype is."""
    return torch.randn(result.shape, generator=generator, dtype=torch.float32).to(result)


def outcome(
    module: nn.Module, *maps: Tensor, valid: Tensor | None = None, **options: Any
) -> Result:
    """Value of a call, and gradients of the first map and of all parameters, on the CPU.

    The gradients are those of a fixed combination of all results, and zero where there is none.
    """
    placed = device_of(getattr(module, "backend", "auto"))  # of a module without parameters
    device = next((t.device for t in (*module.parameters(), *module.buffers())), placed)
    first = maps[0].to(device)
    if not first.requires_grad:
        first = first.detach().requires_grad_()  # not cloned: its strides stay
    if valid is not None:
        options["valid_mask"] = valid.to(device)
    results = module(first, *(x.to(device) for x in maps[1:]), **options)
    results = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(4)
    combined = sum((r * cotangent(r, generator)).sum() if r.dim() else r for r in results)
    leaves = [first, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(combined, leaves, allow_unused=True, materialize_grads=True)
    values = torch.cat([result.detach().flatten().cpu() for result in results])
    return Result(values, tuple(grad.cpu() for grad in grads))
