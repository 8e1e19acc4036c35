"""The distillation losses that study.py compares, beside labels and without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from digit_scenes import CLASSES, Outputs, task_loss
from study_scenes import HEAD, NEAR_STUDENT, STRIDE, STUDENT, Data, Machine, Network, vector_head
from torch import Tensor, nn

from pixdistill import (
    AfDCDLoss,
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    MHSAPlugin,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
    plug,
    unplug,
)

LOGIT_TEMPERATURE = 2.0


# --- Distillation beside labels --------------------------------------------------------------------


class LogitsKL(nn.Module):
    """Divergence of the class probabilities per pixel (Hinton et al., 2015)."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Multiplied by the square of the temperature."""
        ours, theirs = (
            (logits.float() / LOGIT_TEMPERATURE).log_softmax(dim=1)
            for logits in (student.logits, teacher.logits)
        )
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True) / labels.numel()
        return LOGIT_TEMPERATURE**2 * divergence


class OnFeatures(nn.Module):
    """A distance of the projected features from the teacher's."""

    def __init__(
        self, student: int, teacher: int, distance: Callable[..., Tensor], labelled: bool = False
    ):
        super().__init__()
        self.projector = nn.Conv2d(student, teacher, kernel_size=1)
        self.distance, self.labelled = distance, labelled

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """With labels, those at the middle of each cell."""
        middle = labels[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        options = {"labels": middle} if self.labelled else {}
        return self.distance(self.projector(student.features), teacher.features, **options)


class Patches(nn.Module):
    """Af-DCD on the features, with the settings that suited the digits, or one of its terms."""

    def __init__(self, student: int, teacher: int, mimic: float = 1.0, contrast: float = 1.0):
        super().__init__()
        self.loss = AfDCDLoss(
            student, teacher, num_groups=4, pool_size=1, temperature=1.0, mask_ratio=0.25,
            mimic_reduction="mean", mimic_weight=mimic, contrast_weight=contrast,
        )  # fmt: skip

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """The loss aligns the channels itself."""
        return self.loss(student.features, teacher.features)


class OnLogits(nn.Module):
    """A distance of the logits."""

    def __init__(self, distance: Callable[..., Tensor]):
        super().__init__()
        self.distance = distance

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Both have the classes as channels."""
        return self.distance(student.logits, teacher.logits)


def masked_distance(data: Data) -> MaskedDistillationLoss:
    """MasKD's distance through the tokens that were learned once."""
    tokens = MaskedReceptiveTokens(CLASSES, len(data.outputs["tokens"]), weighted=False)
    tokens.load_state_dict({"mask_token": data.outputs["tokens"]})
    return MaskedDistillationLoss(tokens.requires_grad_(False))


# From the channels of student and teacher and the data, a module of (student, teacher, labels).
TERMS: dict[str, Callable[[int, int, Data], nn.Module]] = {
    "kl": lambda s, t, _: LogitsKL(),
    "mse": lambda s, t, _: OnFeatures(s, t, F.mse_loss),
    "contrast": lambda s, t, _: OnFeatures(s, t, PixelContrastLoss(0.1)),
    "contrast_labels": lambda s, t, _: OnFeatures(s, t, PixelContrastLoss(0.1), labelled=True),
    "maskd": lambda s, t, data: OnLogits(masked_distance(data)),
    "logits_mse": lambda s, t, _: OnLogits(F.mse_loss),
    "af_dcd": lambda s, t, _: Patches(s, t),
    "af_dcd_mimic": lambda s, t, _: Patches(s, t, contrast=0.0),
    "af_dcd_contrast": lambda s, t, _: Patches(s, t, mimic=0.0),
}


def train_with_labels(
    machine: Machine, data: Data, settings: Mapping[str, float], steps: int, seed: int
) -> Network:
    """Train a student; initial weights and batches depend on the seed alone."""
    torch.manual_seed(seed)
    student = Network(*STUDENT).to(machine.device)
    weights = {name: weight for name, weight in settings.items() if name != "rate"}
    channels = student.channels, data.outputs["features"].shape[1]
    terms = nn.ModuleDict({name: TERMS[name](*channels, data) for name in weights})
    terms.to(machine.device)
    images, labels = data.scenes["train"]
    logits, features = data.outputs["logits"], data.outputs["features"]

    def loss_of(i: Tensor) -> Tensor:
        outputs, teacher = student(images[i]), Outputs(logits[i], features[i])
        loss = task_loss(outputs.logits, labels[i])
        for name, weight in weights.items():
            loss = loss + weight * terms[name](outputs, teacher, labels[i])
        return loss

    count, rate = len(logits), settings["rate"]
    extra = terms.parameters()
    machine.minimise(loss_of, student.parameters(), count, steps, rate, seed, dropped=extra)
    return student


# --- Distillation without labels -------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What a student without labels is compared with, and what becomes of its plug-in."""

    target: str
    plugin: Literal["none", "removed", "kept"]
    negatives: bool = True
    """Whether it is the contrast, or the squared error of unit vectors, which has no negatives."""


OBJECTIVES: dict[str, Objective | None] = {
    "scratch": None,
    "scratch_long": None,  # with the steps of the distillation besides
    "pooled": Objective("pooled", plugin="none"),
    "pcd": Objective("adaptor", plugin="removed"),
    "pcd_no_negatives": Objective("adaptor", plugin="removed", negatives=False),
    "pcd_no_adaptor": Objective("map", plugin="removed"),
    "pcd_plain_relu": Objective("plain", plugin="removed"),
    "pcd_no_plugin": Objective("adaptor", plugin="none"),
    "pcd_keep_plugin": Objective("adaptor", plugin="kept"),
}


def pretrain(
    machine: Machine, data: Data, name: str, settings: Mapping[str, float], steps: int, seed: int
) -> Network:
    """Distil the teacher without labels into a student that sees less; its classifier is untouched."""
    torch.manual_seed(seed)
    student, objective = Network(*NEAR_STUDENT), OBJECTIVES[name]
    if objective is None:
        return student.to(machine.device)
    if objective.plugin != "none":
        plug(student, "fuse", MHSAPlugin(student.channels, num_heads=4))
    maps = data.outputs["maps"]
    head = vector_head(maps.shape[1])
    head.load_state_dict(data.head)
    adaptor = SpatialAdaptor(head)
    width = maps.shape[1] if objective.target == "map" else HEAD[-1]
    predict = PixelHead(student.channels, HEAD[:-1], width)
    queue = PixelQueue(min(1024, 4 * len(maps)), width)
    contrast = PixelContrastLoss(0.2, negatives=None, queue=queue)
    modules = nn.ModuleList([student, adaptor, predict, contrast]).to(machine.device)
    # A dense head applied to each pixel, with its ReLU where it is.
    plain = adaptor.head
    targets: dict[str, Callable[[Tensor], Tensor]] = {
        "adaptor": adaptor,
        "pooled": lambda x: adaptor(x.mean(dim=(2, 3), keepdim=True)),
        "map": lambda x: x,
        "plain": lambda x: (
            plain(x.movedim(1, 3).flatten(0, 2)).unflatten(0, x[:, 0].shape).movedim(3, 1)
        ),
    }
    images = data.scenes["train"].images

    def loss_of(i: Tensor) -> Tensor:
        with torch.no_grad():
            target = targets[objective.target](maps[i])
        features = student.features(images[i])
        if objective.target == "pooled":
            features = features.mean(dim=(2, 3), keepdim=True)
        prediction = predict(features)
        if not objective.negatives:
            ours, theirs = F.normalize(prediction.float()), F.normalize(target.float())
            return (ours - theirs).square().sum(dim=1).mean()
        loss = contrast(prediction, target)
        queue.enqueue_pooled(target)  # after the loss: not among the negatives of its own batch
        return loss

    rate, learned = settings["pretrain_rate"], modules.parameters()
    machine.minimise(loss_of, learned, len(maps), steps, rate, seed)
    if objective.plugin == "removed":
        unplug(student, "fuse")
    return student


def fine_tune(
    machine: Machine, data: Data, network: Network, count: int, rate: float, steps: int, seed: int
) -> Network:
    """Train all of the network on a few labelled scenes, which the seed chooses."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.scenes["train"].labels), generator=generator)[:count]
    images, labels = (t[chosen.to(machine.device)] for t in data.scenes["train"])

    def loss_of(i: Tensor) -> Tensor:
        return task_loss(network(images[i]).logits, labels[i])

    machine.minimise(loss_of, network.train().parameters(), count, steps, rate, seed)
    return network
