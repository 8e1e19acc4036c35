"""Scenes, networks, training and score that the examples with digits share.

The 8x8 digits bundled with scikit-learn (nothing is downloaded) are scaled, rotated and overlaid on
cluttered 64x64 scenes. The task is to classify every pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

SCENE = 64  # pixels per side
GLYPH = 32  # pixels per side, after enlarging the 8x8 originals once
FRAGMENTS, DIGITS = 2, 5  # layers of a scene, bottom to top
BACKGROUND, CLASSES = 10, 11
BATCH = 8
PEAK_RATES = {"teacher": 4e-3, "student": 1e-2}
TEACHER_SEED, TEST_SEED = 10_000, 20_000  # apart from the students' 0, 1, 2, ...
PALETTE = [*("#e0e0e0" if i == 7 else f"C{i}" for i in range(10)), "#20242c"]


class Labelled(NamedTuple):
    """Digits [N, 32, 32] with one class each, or scenes [N, 1, 64, 64] with one class per pixel."""

    images: Tensor
    labels: Tensor


def load_splits() -> dict[str, Labelled]:
    """Split by digit image, so that no digit of a test scene was seen in training."""
    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=GLYPH, mode="bicubic").clamp(0, 1).squeeze(1)
    labels = torch.as_tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:900], "validation": order[900:1200], "test": order[1200:]}
    return {name: Labelled(images[part], labels[part]) for name, part in parts.items()}


def place_layers(count: int, layers: int, generator: torch.Generator) -> Tensor:
    """Draw affine maps [count, layers, 2, 3] from the scene to each layer's glyph."""
    # On a jittered 3x3 grid digits overlap but seldom hide each other.
    cells = torch.rand(count, 9, generator=generator).argsort(1)[:, :layers]
    centres = torch.stack([cells % 3, cells // 3], dim=2) * 0.6 - 0.6
    centres = centres + torch.rand(centres.shape, generator=generator) * 0.3 - 0.15
    angle = torch.rand(count, layers, generator=generator) * 0.7 - 0.35
    zoom = SCENE / (torch.rand(count, layers, generator=generator) * 12 + 24)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rotation = torch.stack([cos, -sin, sin, cos], dim=2).view(count, layers, 2, 2)
    return torch.cat([rotation, -rotation @ centres.unsqueeze(3)], dim=3)


def draw_scenes(
    digits: Labelled, count: int, generator: torch.Generator, pick: Tensor | None = None
) -> Labelled:
    """Draw digits over fragments of digits over noise; later layers hide earlier ones.

    `pick` [count, layers] chooses the digits, those of two fragments first; the default is random,
    with five digits.
    """
    if pick is None:
        size = count, FRAGMENTS + DIGITS
        pick = torch.randint(len(digits.labels), size, generator=generator)
    layers = pick.shape[1]
    glyphs, classes = digits.images[pick], digits.labels[pick]
    # Swapping the quarters of a digit leaves strokes that are not a digit.
    glyphs[:, :FRAGMENTS] = glyphs[:, :FRAGMENTS].roll((GLYPH // 2, GLYPH // 2), dims=(2, 3))
    classes[:, :FRAGMENTS] = BACKGROUND

    theta = place_layers(count, layers, generator).flatten(0, 1)
    grid = F.affine_grid(theta, [count * layers, 1, SCENE, SCENE], align_corners=False)
    ink = F.grid_sample(glyphs.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    cover = ((ink - 0.3) * 5).clamp(0, 1).view(count, layers, SCENE, SCENE)

    shade = torch.rand(count, layers, 1, 1, generator=generator) * 0.4 + 0.6
    images = torch.rand(count, 1, 1, generator=generator) * 0.3 + 0.15
    images = images.expand(count, SCENE, SCENE)
    for cells in (4, 8, 16, 32):  # the texture: octaves of smooth noise
        noise = torch.randn(count, 1, cells, cells, generator=generator)
        images = images + 0.08 * F.interpolate(noise, size=SCENE, mode="bilinear").squeeze(1)
    labels = torch.full((count, SCENE, SCENE), BACKGROUND)
    for layer in range(layers):
        images = torch.lerp(images, shade[:, layer].expand_as(images), cover[:, layer])
        labels = torch.where(cover[:, layer] > 0.5, classes[:, layer, None, None], labels)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return Labelled(images.unsqueeze(1), labels)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU: both networks consist of them."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A convolution with a shortcut: deep networks train faster with it."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolution's output to its input."""
        return x + self.body(x)


class Outputs(NamedTuple):
    """A network's output: logits [B, 11, 64, 64] and features [B, C, 16, 16]."""

    logits: Tensor
    features: Tensor


class FCN(nn.Module):
    """Fully convolutional network; its features are 16x16 at any width."""

    def __init__(self, stem: int, middle: int, deep: int, blocks: int, features: int):
        super().__init__()
        self.channels = features
        self.middle = nn.Sequential(conv(1, stem, 2), conv(stem, middle, 2), Residual(middle))
        self.deep = nn.Sequential(conv(middle, deep, 2), *(Residual(deep) for _ in range(blocks)))
        self.fuse = conv(middle + deep, features)
        # Each cell predicts four blocks of pixels, because strokes are thinner than a cell.
        self.classify = nn.Sequential(nn.Conv2d(features, 4 * CLASSES, 1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Outputs:
        """Compute the features, and from them the logits at the size of the images."""
        middle = self.middle(images)
        deep = F.interpolate(self.deep(middle), scale_factor=2, mode="bilinear")
        features = self.fuse(torch.cat([middle, deep], dim=1))
        logits = F.interpolate(self.classify(features), scale_factor=2, mode="bilinear")
        return Outputs(logits, features)


def build(role: str, seed: int) -> FCN:
    """Build the teacher or a student; the initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return FCN(24, 64, 128, 5, 64) if role == "teacher" else FCN(8, 16, 24, 3, 24)


# From the student's channels, build a module that maps (student's outputs, teacher's outputs, labels)
# to a weighted scalar. Its parameters (such as a projector) train with the student and are dropped
# after.
Builder = Callable[[int], nn.Module]
# A frozen teacher, and what builds the distillation loss.
Guide = tuple[FCN, Builder] | None


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with a lower weight for the background, which early training predicts everywhere."""
    weights = torch.tensor([1.0] * BACKGROUND + [0.4], device=logits.device)
    return F.cross_entropy(logits, labels, weights)


@dataclass(frozen=True)
class Bench:
    """What all runs share, so that two runs differ only where they should."""

    digits: Labelled
    test: Labelled
    device: torch.device
    amp: bool

    def autocast(self) -> torch.autocast:
        """Mixed precision for forward passes, if asked for."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.amp)

    def train(self, name: str, role: str, seed: int, steps: int, guide: Guide = None) -> FCN:
        """Train with or without a teacher; weights and scenes depend on the seed alone."""
        network = build(role, seed).to(self.device)
        modules = nn.ModuleList([network])
        if guide is not None:
            teacher, build_loss = guide
            distill = build_loss(network.channels).to(self.device)
            modules.append(distill)
        optimizer = torch.optim.AdamW(modules.parameters(), weight_decay=1e-3)
        # At least ten, because OneCycleLR divides by the length of its phases.
        length = max(steps, 10)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATES[role], length)
        scaled = self.amp and self.device.type == "cuda"
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=scaled)
        generator = torch.Generator().manual_seed(seed)
        # disable=None shows the bar on a terminal only.
        for _ in tqdm(range(steps), desc=name, unit="step", leave=False, disable=None):
            images, labels = (t.to(self.device) for t in draw_scenes(self.digits, BATCH, generator))
            with self.autocast():
                outputs = network(images)
                objective = task_loss(outputs.logits, labels)
                if guide is not None:
                    with torch.no_grad():
                        target = teacher(images)
                    objective = objective + distill(outputs, target, labels)
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        return network.eval().requires_grad_(False)

    def answer(self, network: nn.Module) -> Tensor:
        """Predict the class of every pixel of the test scenes."""
        with torch.no_grad(), self.autocast():
            batches = [images.to(self.device) for images in self.test.images.split(32)]
            return torch.cat([network(images).logits.argmax(1).cpu() for images in batches])


def mean_iou(answer: Tensor, truth: Tensor) -> float:
    """Mean over the classes that occur of intersection over union, in percent."""
    pairs = torch.bincount((truth * CLASSES + answer).flatten(), minlength=CLASSES**2)
    table = pairs.view(CLASSES, CLASSES).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return 100 * (table.diagonal()[union > 0] / union[union > 0]).mean().item()
