"""Scenes, networks, the training loop and the two teachers of study.py.

The scenes are those of digit_scenes.py at half their size, 32 x 32 pixels. They are drawn once, and
each teacher's map of each scene is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digit_scenes import (
    CLASSES,
    FRAGMENTS,
    Labelled,
    Outputs,
    Residual,
    conv,
    draw_scenes,
    load_splits,
    mean_iou,
    task_loss,
)
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import MaskedReceptiveTokens

STRIDE = 4  # of the networks' features
BATCH = 8
PROJECTOR_RATE = 1e-2  # of what is dropped after training; AfDCDLoss's projector fails with more
TEACHER = (16, 48, 96, 4, 32)  # 450 thousand parameters; sees the whole scene
STUDENT = (8, 16, 24, 1, 16)  # 21 thousand parameters
NEAR_STUDENT = (8, 16, 0, 0, 24)  # 12 thousand parameters; a pixel of its map sees 23 x 23
HEAD = (64, 64, 32)  # widths of the head on the pooled vector of the teacher of whole images
SEED = 10_000  # of what is prepared; apart from the students' 0, 1, 2, ...


def half_scenes(digits: Labelled, count: int, seed: int, pick: Tensor | None = None) -> Labelled:
    """Scenes [N, 1, 32, 32] and their labels [N, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for part in torch.arange(count).split(256):  # to bound the memory
        chosen = None if pick is None else pick[part]
        drawn.append(draw_scenes(digits, len(part), generator, chosen))
    images = torch.cat([F.avg_pool2d(scenes.images, 2) for scenes in drawn])
    return Labelled(images, torch.cat([scenes.labels[:, ::2, ::2] for scenes in drawn]))


class Network(nn.Module):
    """Features [B, C, 8, 8] of scenes of 32 x 32 pixels, and logits."""

    def __init__(self, stem: int, middle: int, deep: int, blocks: int, features: int) -> None:
        super().__init__()
        self.channels = features
        self.middle = nn.Sequential(conv(1, stem, 2), conv(stem, middle, 2), Residual(middle))
        wide = (Residual(deep) for _ in range(blocks))
        self.deep = nn.Sequential(conv(middle, deep, 2), *wide) if deep else None
        self.fuse = conv(middle + deep, features)
        outputs = nn.Conv2d(features, STRIDE**2 * CLASSES, 1)
        self.classify = nn.Sequential(outputs, nn.PixelShuffle(STRIDE))

    def features(self, images: Tensor) -> Tensor:
        """The map that is distilled."""
        x = self.middle(images)
        if self.deep is not None:
            wide = F.interpolate(self.deep(x), scale_factor=2.0, mode="bilinear")
            x = torch.cat([x, wide], dim=1)
        return self.fuse(x)

    def forward(self, images: Tensor) -> Outputs:
        """Logits [B, 11, 32, 32] and features."""
        features = self.features(images)
        return Outputs(self.classify(features), features)


@dataclass(frozen=True)
class Machine:
    """Where and in which precision the networks are trained."""

    device: str
    amp: bool

    def autocast(self) -> torch.autocast:
        """Mixed precision, if asked for."""
        dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        return torch.autocast(self.device, dtype=dtype, enabled=self.amp)

    def minimise(
        self,
        loss_of: Callable[[Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        count: int,
        steps: int,
        rate: float,
        seed: int,
        batch: int = BATCH,
        name: str = "",
        dropped: Iterable[nn.Parameter] = (),
    ) -> None:
        """Minimise `loss_of(indices)` over batches of `count` samples; the name is for a bar.

        `dropped` are parameters that are not deployed, with a learning rate of their own.
        """
        peaks = [rate, PROJECTOR_RATE]
        learned = [[p for p in group if p.requires_grad] for group in (parameters, dropped)]
        groups = [{"params": group} for group in learned]
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-3, fused=True)
        # At least ten, because OneCycleLR divides by the length of its phases.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, max(steps, 10))
        scaled = self.amp and self.device == "cuda"
        scaler = torch.amp.GradScaler(self.device, init_scale=1024.0, enabled=scaled)
        generator = torch.Generator().manual_seed(seed)
        for _ in tqdm(range(steps), name, unit="step", disable=not name):
            indices = torch.randint(count, (batch,), generator=generator).to(self.device)
            with self.autocast():
                loss = loss_of(indices)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

    @torch.no_grad()
    def predict(self, network: Callable[[Tensor], Any], images: Tensor) -> list[Any]:
        """Outputs for the images, in parts."""
        with self.autocast():
            return [network(part) for part in images.split(64)]

    def score(self, network: Network, scenes: Labelled) -> float:
        """Mean IoU in percent."""
        outputs = self.predict(network.eval(), scenes.images)
        return mean_iou(torch.cat([o.logits.argmax(1) for o in outputs]).cpu(), scenes.labels.cpu())


# --- What all runs share ---------------------------------------------------------------------------


@dataclass
class Data:
    """Scenes, and what a frozen teacher computed for the first of the training scenes."""

    scenes: dict[str, Labelled]
    outputs: dict[str, Tensor]
    teacher: float
    """Mean IoU on test digits, or accuracy on validation digits of the teacher of whole images."""
    head: dict[str, Tensor]
    """On the pooled vectors of the teacher of whole images."""

    def save(self, path: Path) -> None:
        """Write all to one file, which is there when it is complete."""
        part = path.with_suffix(".part")
        torch.save(vars(self), part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, device: str) -> Data:
        """Read what `save` wrote."""
        with torch.serialization.safe_globals([Labelled]):
            return cls(**torch.load(path, map_location=device, weights_only=True))


def draw_splits(machine: Machine, sizes: Any) -> dict[str, Labelled]:
    """Scenes of training, validation and test digits."""
    counts = {"train": sizes.teacher_scenes, "validation": sizes.test_scenes // 2}
    counts["test"] = sizes.test_scenes
    splits = load_splits()
    drawn = {k: half_scenes(splits[k], n, SEED + i) for i, (k, n) in enumerate(counts.items())}
    return {k: Labelled(*(t.to(machine.device) for t in v)) for k, v in drawn.items()}


def prepare_with_labels(machine: Machine, sizes: Any) -> Data:
    """Train a teacher on all training scenes, and MasKD's tokens on its logits."""
    scenes = draw_splits(machine, sizes)
    images, labels = scenes["train"]
    torch.manual_seed(SEED)
    teacher = Network(*TEACHER).to(machine.device)
    machine.minimise(
        lambda i: task_loss(teacher(images[i]).logits, labels[i]),
        teacher.parameters(), len(images), sizes.teacher_steps, 4e-3, SEED, 16, "teacher",
    )  # fmt: skip
    score = machine.score(teacher, scenes["test"])
    parts = machine.predict(teacher, images[: sizes.scenes])
    logits, features = (torch.cat(maps).float() for maps in zip(*parts, strict=True))

    tokens = MaskedReceptiveTokens(CLASSES, 6, weighted=False).to(machine.device)
    # Wider than the official start, from which one mask covers everything and the others nothing.
    nn.init.normal_(tokens.mask_token, std=0.5)

    def masked(i: Tensor) -> Tensor:
        one, diversity = tokens(logits[i])
        return task_loss(one, labels[i]) + diversity

    count, steps = len(logits), sizes.mask_steps
    machine.minimise(masked, tokens.parameters(), count, steps, 1e-2, SEED, name="tokens")
    outputs = {"logits": logits, "features": features, "tokens": tokens.mask_token.detach()}
    return Data(scenes, outputs, score, {})


def vector_head(channels: int) -> nn.Sequential:
    """Three linear layers for pooled vectors, with BatchNorm and ReLU between them."""
    layers: list[nn.Module] = []
    for width in HEAD:
        layers += [nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers[:-2])


def whole_images(digits: Labelled, count: int, seed: int) -> Labelled:
    """Scenes [N, 1, 32, 32] that show one digit among two fragments, and its class [N]."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(digits.labels), (count, FRAGMENTS + 1), generator=generator)
    return Labelled(half_scenes(digits, count, seed + 1, pick).images, digits.labels[pick[:, -1]])


def prepare_without_labels(machine: Machine, sizes: Any) -> Data:
    """Train a teacher and a head on its pooled map to classify images of one digit.

    As with most networks from ImageNet, one vector of all of the image is learned. The last layer, from
    that vector to the classes, is dropped.
    """
    splits = load_splits()
    train, new = (
        Labelled(*(t.to(machine.device) for t in whole_images(splits[split], count, SEED + 10)))
        for split, count in (("train", sizes.whole_images), ("validation", sizes.test_scenes))
    )
    torch.manual_seed(SEED)
    network = Network(*TEACHER).to(machine.device)
    head = vector_head(network.channels).to(machine.device)
    last = nn.Linear(HEAD[-1], CLASSES - 1).to(machine.device)

    def classify(images: Tensor) -> Tensor:
        return last(head(network.features(images).mean(dim=(2, 3)))).float()

    both = nn.ModuleList([network, head, last])
    machine.minimise(
        lambda i: F.cross_entropy(classify(train.images[i]), train.labels[i]),
        both.parameters(), sizes.whole_images, sizes.whole_steps, 4e-3, SEED, 32, "teacher",
    )  # fmt: skip
    both.eval()
    right = torch.cat(machine.predict(classify, new.images)).argmax(dim=1) == new.labels
    scenes = draw_splits(machine, sizes)
    images = scenes["train"].images[: sizes.unlabelled]
    maps = torch.cat(machine.predict(network.features, images)).float()
    return Data(scenes, {"maps": maps}, 100 * right.float().mean().item(), head.state_dict())
