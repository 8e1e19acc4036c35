"""What a loss adds to a real training step: networks of torchvision, random weights and data.

Each step runs the frozen teacher, the student, the loss, backward and SGD, on CUDA under autocast.
Three losses take turns in it: the squared error of the maps, ours, and the plain formula.
`torch.backends.cudnn.benchmark` stays off: its search takes longer than the measurement.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixdistill import (
    AfDCDLoss,
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
)

from . import af_dcd, contrast, maskd
from .runner import Case, Provider, Subject, autocast

CLASSES = 19
QUEUE = 65536
Maps = list[Tensor]
LossOf = Callable[[Maps, Maps], Tensor]


@dataclass(frozen=True)
class Training:
    """One way to train, and the losses that it can have, by provider."""

    teacher: Callable[[], Maps]
    student: Callable[[], tuple[Maps, Tensor | float]]  # its maps, and the loss of the task
    losses: dict[str, LossOf]
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    device: str

    def step(self, name: str) -> None:
        """One step with one of the losses."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.dtype, self.device):
            with torch.no_grad():
                teacher = self.teacher()
            student, task = self.student()
            loss = task + self.losses[name](student, teacher)
        loss.backward()
        self.optimizer.step()


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    """Trains these modules, slowly: random labels teach nothing."""
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=1e-4)


def sum_over(loss: Callable[..., Tensor], *lists: Any) -> Tensor:
    """The sum of a loss over levels or views."""
    return torch.stack([loss(*items) for items in zip(*lists, strict=True)]).sum()


def pcd(batch: int, side: int, **on: Any) -> Training:
    """Two views; the teacher's projector adapted to maps, its vectors and a queue as keys."""
    device = on["device"]
    (trunk, wide), (network, narrow) = (backbone(name) for name in ("resnet50", "resnet18"))
    hidden, out = 2 * wide, 256
    head = nn.Sequential(
        nn.Linear(wide, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )
    adaptor = SpatialAdaptor(head.eval())
    teacher = channels_last(nn.Sequential(trunk.eval(), adaptor), device)
    student = channels_last(nn.Sequential(network, PixelHead.like(adaptor, narrow)), device)
    queue = PixelQueue(QUEUE, out).to(device)
    loss = PixelContrastLoss(0.2, negatives=None, queue=queue).to(device)
    views = [images(batch, side, side, device) for _ in range(2)]

    def plain(s: Tensor, t: Tensor) -> Tensor:
        return contrast.plain(s, contrast.Problem("queue", on["dtype"], s, t, queue.keys, loss))

    return Training(
        teacher=lambda: [teacher(view) for view in reversed(views)],
        student=lambda: ([student(view) for view in views], 0.0),
        losses={
            "squared-error": functools.partial(sum_over, F.mse_loss),
            "ours": functools.partial(sum_over, loss),
            "plain": functools.partial(sum_over, plain),
        },
        optimizer=sgd(student),
        **on,
    )


def segmentation(batch: int, side: int, method: str, **on: Any) -> Training:
    """Images twice as wide as high; Af-DCD on the features, or MasKD on the logits."""
    device = on["device"]
    names = ("deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large")
    (teacher, wide), (student, narrow) = (segmenter(name) for name in names)
    teacher = channels_last(teacher.eval().requires_grad_(False), device)
    student = channels_last(student, device)
    x = images(batch, side, 2 * side, device)
    labels = torch.randint(CLASSES, (batch, side, 2 * side), device=device)

    def maps_of(network: Any) -> Maps:
        features = network.backbone(x)["out"]
        return [features, network.classifier(features)]

    def student_maps() -> tuple[Maps, Tensor]:
        maps = maps_of(student)
        logits = F.interpolate(maps[1], size=labels.shape[1:], mode="bilinear")
        return maps, F.cross_entropy(logits, labels)

    def on_map(loss: Callable[[Tensor, Tensor], Tensor], which: int) -> LossOf:
        return lambda s, t: loss(resized(s[which], t[which]), t[which])

    on |= {"teacher": lambda: maps_of(teacher), "student": student_maps}
    if method == "maskd":
        tokens = MaskedReceptiveTokens(CLASSES, 8, weighted=False)
        masked = MaskedDistillationLoss(tokens).to(device)
        losses = {
            "squared-error": on_map(F.mse_loss, 1),
            "ours": on_map(masked, 1),
            "plain": on_map(lambda s, t: plain_maskd(s, t, tokens, masked, False), 1),
        }
        return Training(losses=losses, optimizer=sgd(student), **on)
    module: Any = AfDCDLoss(narrow, wide).to(device)

    def plain(s: Tensor, t: Tensor) -> Tensor:
        mask = torch.rand(t[:, 0].shape, device=device) < 0.75
        problem = af_dcd.Problem(("loss", 4), on["dtype"], s, t.float(), module, mask)
        return af_dcd.plain_loss(s, problem)

    losses = {
        "squared-error": on_map(lambda s, t: F.mse_loss(module.align(s), t), 0),
        "ours": on_map(module, 0),
        "plain": on_map(plain, 0),
    }
    return Training(losses=losses, optimizer=sgd(student, module), **on)


def detection(batch: int, side: int, **on: Any) -> Training:
    """The levels of two feature pyramids; MasKD with six tokens and customised masks at each."""
    device = on["device"]
    (teacher, width), (student, _) = (pyramid(name) for name in ("resnet101", "resnet18"))
    teacher = channels_last(teacher.eval().requires_grad_(False), device)
    student = channels_last(student, device)
    x = images(batch, side, side * 5 // 3 // 32 * 32, device)
    tokens = [MaskedReceptiveTokens(width, 6) for _ in teacher(x)]
    masked = MaskedDistillationLoss(tokens, eps=0.0, customize_after=0).to(device)

    def student_maps() -> tuple[Maps, Tensor]:
        maps = list(student(x).values())
        return maps, torch.stack([level.float().square().mean() for level in maps]).sum()

    def plain(s: Tensor, t: Tensor, token: MaskedReceptiveTokens) -> Tensor:
        return plain_maskd(s, t, token, masked, customized=True)

    return Training(
        teacher=lambda: list(teacher(x).values()),
        student=student_maps,
        losses={
            "squared-error": functools.partial(sum_over, F.mse_loss),
            "ours": masked,
            "plain": lambda s, t: sum_over(plain, s, t, tokens),
        },
        optimizer=sgd(student),
        **on,
    )


def plain_maskd(
    student: Tensor,
    teacher: Tensor,
    tokens: MaskedReceptiveTokens,
    loss: MaskedDistillationLoss,
    customized: bool,
) -> Tensor:
    """MasKD as it is written."""
    problem = maskd.Problem(student, teacher, tokens, loss, customized, 0.0 if customized else 1e-5)
    return maskd.plain(student, teacher.to(student.dtype), problem)


# --- Networks and data ----------------------------------------------------------------------------


def backbone(name: str) -> tuple[nn.Module, int]:
    """From images to the last map, and its channels."""
    from torchvision import models

    whole = getattr(models, name)()
    return nn.Sequential(*list(whole.children())[:-2]), whole.fc.in_features


def segmenter(name: str) -> tuple[Any, int]:
    """A segmentation model, and the channels of its features."""
    from torchvision.models import segmentation

    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
    return network, 960 if "mobilenet" in name else 2048


def pyramid(name: str) -> tuple[Any, int]:
    """A backbone with a feature pyramid, and the channels of its levels."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5), 256


def images(batch: int, height: int, width: int, device: str) -> Tensor:
    """Random images."""
    x = torch.randn(batch, 3, height, width, device=device)
    return x.to(memory_format=torch.channels_last)


def channels_last(network: Any, device: str) -> Any:
    """The layout in which convolutions use the tensor cores best."""
    return network.to(device, memory_format=torch.channels_last)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear")


# --- The subject ----------------------------------------------------------------------------------

TASKS: dict[str, Callable[..., Training]] = {
    "pcd": pcd,
    "detection-maskd": detection,
    "segmentation-af_dcd": functools.partial(segmentation, method="af_dcd"),
    "segmentation-maskd": functools.partial(segmentation, method="maskd"),
}


def problem(case: Case, dtype: torch.dtype, device: str) -> Training:
    """A training with random weights from a fixed seed."""
    task, batch, side = case
    if task not in TASKS:
        raise SystemExit(f"the task must be one of {tuple(TASKS)}; got {task!r}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TASKS[task](batch, side, device=device, dtype=dtype)


def provider(name: str, note: str) -> Provider:
    """A training step with this loss."""
    install = "pip install torchvision, in the version for this torch"
    return Provider(lambda t: t.step(name), note, package="torchvision", install=install)


SUBJECT = Subject(
    name="step",
    summary="what a loss adds to a real training step: PCD, segmentation, detection",
    columns={"task": ", ".join(TASKS), "B": "images", "side": "height of the images"},
    cases={
        "cpu": [("pcd", 8, 96), ("segmentation-af_dcd", 1, 128), ("detection-maskd", 1, 128)],
        "cuda": [
            ("pcd", 256, 224),
            ("detection-maskd", 2, 800),
            ("segmentation-af_dcd", 4, 512),
            ("segmentation-maskd", 4, 512),
        ],
    },
    small=("pcd", 2, 32),
    problem=problem,
    providers={
        "ours": provider("ours", "the loss of pixdistill"),
        "plain": provider("plain", "the formula as written"),
        "squared-error": provider("squared-error", "the squared error in the loss's place"),
    },
    rounds={"cpu": 3, "cuda": 8},
)
