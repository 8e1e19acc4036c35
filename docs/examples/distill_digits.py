"""Distil a segmentation network into one thirty times smaller, on scenes of real handwriting.

    python docs/examples/distill_digits.py

Scikit-learn's bundled 8x8 digits (nothing is downloaded) are scaled, rotated and laid over each
other on cluttered 64x64 scenes; the task is to name the digit under every pixel. A teacher of
about 1M parameters is trained once. Then, for every seed, a student of about 30k parameters is
trained twice from the same initial weights on the same batches: alone, and with a distillation
loss that ties its feature map to the teacher's, pixel by pixel. The script prints the mean IoU of
each on scenes made only of held-out digit images, with the paired difference and a verdict, and
draws a few of those scenes to a PNG. It takes three to four minutes on two idle CPU cores.

The students' training is short on purpose: what is compared is how far the same steps lead. The
loss was tuned on other seeds and on the validation digits, where four times the steps (one seed,
`--steps 2400`) brought the student to 56% with the loss and without it.

Besides pixdistill it needs scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import PixelContrastLoss, PixelQueue

SCENE = 64  # pixels a side
GLYPH = 32  # pixels a side, after enlarging the 8x8 originals once
FRAGMENTS, DIGITS = 2, 5  # layers of a scene, bottom to top
BACKGROUND, CLASSES = 10, 11
BATCH = 8
QUEUE_SIZE = 4096
PEAK_RATES = {"teacher": 4e-3, "student": 1e-2}
TEACHER_SEED, TEST_SEED = 10_000, 20_000  # apart from the students' 0, 1, 2, ...
PALETTE = [*("#e0e0e0" if i == 7 else f"C{i}" for i in range(10)), "#20242c"]


class PixelContrast(nn.Module):
    """Pixel contrast between the student's features, projected to width, and the teacher's."""

    def __init__(self, student_channels: int, teacher_channels: int, *, queued: bool = False):
        super().__init__()
        self.projector = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.queue = PixelQueue(QUEUE_SIZE, teacher_channels) if queued else None
        negatives = "queue" if queued else "batch"
        self.contrast = PixelContrastLoss(temperature=0.1, negatives=negatives, queue=self.queue)
        self.weight = 2.0

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """Score the batch before it joins the queue, so that no image is its own negative."""
        loss = self.contrast(self.projector(student_features), teacher_features)
        if self.queue is not None:
            self.queue.enqueue_pooled(teacher_features)
        return self.weight * loss


# A loss joins the comparison by one entry here: from the student's and the teacher's channels,
# build a module that maps (student_features, teacher_features) to a weighted scalar. What
# parameters it holds (a projector, say) train with the student and are dropped at test time.
LOSSES: dict[str, Callable[[int, int], nn.Module]] = {
    "pcd": PixelContrast,
    "pcd-queue": partial(PixelContrast, queued=True),
}


class Labelled(NamedTuple):
    """Digits [N, 32, 32] with a class each, or scenes [N, 1, 64, 64] with one for every pixel."""

    images: Tensor
    labels: Tensor


def load_splits() -> dict[str, Labelled]:
    """Split by digit image, so that no test scene shows handwriting seen in training."""
    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=GLYPH, mode="bicubic").clamp(0, 1).squeeze(1)
    labels = torch.as_tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:900], "validation": order[900:1200], "test": order[1200:]}
    return {name: Labelled(images[part], labels[part]) for name, part in parts.items()}


def place_layers(count: int, generator: torch.Generator) -> Tensor:
    """Draw affine maps [count, layers, 2, 3] from the scene to each layer's glyph."""
    layers = FRAGMENTS + DIGITS
    # A jittered 3x3 grid lets digits overlap but seldom hide each other.
    cells = torch.rand(count, 9, generator=generator).argsort(1)[:, :layers]
    centres = torch.stack([cells % 3, cells // 3], dim=2) * 0.6 - 0.6
    centres = centres + torch.rand(centres.shape, generator=generator) * 0.3 - 0.15
    angle = torch.rand(count, layers, generator=generator) * 0.7 - 0.35
    zoom = SCENE / (torch.rand(count, layers, generator=generator) * 12 + 24)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rotation = torch.stack([cos, -sin, sin, cos], dim=2).view(count, layers, 2, 2)
    return torch.cat([rotation, -rotation @ centres.unsqueeze(3)], dim=3)


def draw_scenes(digits: Labelled, count: int, generator: torch.Generator) -> Labelled:
    """Paint digits over fragments of digits over noise, later layers hiding earlier ones."""
    layers = FRAGMENTS + DIGITS
    pick = torch.randint(len(digits.labels), (count, layers), generator=generator)
    glyphs, classes = digits.images[pick], digits.labels[pick]
    # Swapping the quarters of a digit leaves strokes of handwriting that spell nothing.
    glyphs[:, :FRAGMENTS] = glyphs[:, :FRAGMENTS].roll((GLYPH // 2, GLYPH // 2), dims=(2, 3))
    classes[:, :FRAGMENTS] = BACKGROUND

    theta = place_layers(count, generator).flatten(0, 1)
    grid = F.affine_grid(theta, [count * layers, 1, SCENE, SCENE], align_corners=False)
    ink = F.grid_sample(glyphs.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    cover = ((ink - 0.3) * 5).clamp(0, 1).view(count, layers, SCENE, SCENE)

    shade = torch.rand(count, layers, 1, 1, generator=generator) * 0.4 + 0.6
    images = torch.rand(count, 1, 1, generator=generator) * 0.3 + 0.15
    images = images.expand(count, SCENE, SCENE)
    for cells in (4, 8, 16, 32):  # octaves of smooth noise make the texture
        noise = torch.randn(count, 1, cells, cells, generator=generator)
        images = images + 0.08 * F.interpolate(noise, size=SCENE, mode="bilinear").squeeze(1)
    labels = torch.full((count, SCENE, SCENE), BACKGROUND)
    for layer in range(layers):
        images = torch.lerp(images, shade[:, layer].expand_as(images), cover[:, layer])
        labels = torch.where(cover[:, layer] > 0.5, classes[:, layer, None, None], labels)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return Labelled(images.unsqueeze(1), labels)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolve, normalise and rectify: the unit that both networks are made of."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A convolution beside a shortcut, so that depth does not slow so short a training."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolution found to what came in."""
        return x + self.body(x)


class FCN(nn.Module):
    """Fully convolutional network; at any width its features lie on a 16x16 grid."""

    def __init__(self, stem: int, middle: int, deep: int, blocks: int, features: int):
        super().__init__()
        self.channels = features
        self.middle = nn.Sequential(conv(1, stem, 2), conv(stem, middle, 2), Residual(middle))
        self.deep = nn.Sequential(conv(middle, deep, 2), *(Residual(deep) for _ in range(blocks)))
        self.fuse = conv(middle + deep, features)
        # Each cell answers for four blocks of pixels, as strokes are thinner than a cell.
        self.classify = nn.Sequential(nn.Conv2d(features, 4 * CLASSES, 1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits at the size of the images, and the features they are read from."""
        middle = self.middle(images)
        deep = F.interpolate(self.deep(middle), scale_factor=2, mode="bilinear")
        features = self.fuse(torch.cat([middle, deep], dim=1))
        logits = F.interpolate(self.classify(features), scale_factor=2, mode="bilinear")
        return logits, features


def build(role: str, seed: int) -> FCN:
    """Build the teacher or a student; the seed alone decides the initial weights."""
    torch.manual_seed(seed)
    return FCN(24, 64, 128, 5, 64) if role == "teacher" else FCN(8, 16, 24, 3, 24)


# A frozen teacher and the entry of LOSSES through which a student follows it.
Guide = tuple[FCN, str] | None


@dataclass(frozen=True)
class Bench:
    """What every run shares, so that two runs differ only where they are meant to."""

    digits: Labelled
    test: Labelled
    device: torch.device
    amp: bool

    def autocast(self) -> torch.autocast:
        """Lower the precision of the forward passes if asked to."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.amp)

    def train(self, name: str, role: str, seed: int, steps: int, guide: Guide = None) -> FCN:
        """Train weights, on scenes, that the seed alone decides, with or without a teacher."""
        network = build(role, seed).to(self.device)
        modules = nn.ModuleList([network])
        if guide is not None:
            teacher, loss = guide
            distill = LOSSES[loss](network.channels, teacher.channels).to(self.device)
            modules.append(distill)
        optimizer = torch.optim.AdamW(modules.parameters(), weight_decay=1e-3)
        # No fewer than ten, because OneCycleLR divides by the length of its phases.
        length = max(steps, 10)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATES[role], length)
        scaled = self.amp and self.device.type == "cuda"
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=scaled)
        # Digits outweigh the background, or the first steps learn to answer nothing else.
        weights = torch.tensor([1.0] * BACKGROUND + [0.4], device=self.device)
        generator = torch.Generator().manual_seed(seed)
        # disable=None shows the bar on a terminal only, which keeps logs readable.
        for _ in tqdm(range(steps), desc=name, unit="step", leave=False, disable=None):
            images, labels = (t.to(self.device) for t in draw_scenes(self.digits, BATCH, generator))
            with self.autocast():
                logits, features = network(images)
                objective = F.cross_entropy(logits, labels, weights)
                if guide is not None:
                    with torch.no_grad():
                        _, teacher_features = teacher(images)
                    objective = objective + distill(features, teacher_features)
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        return network.eval().requires_grad_(False)

    def answer(self, network: FCN) -> Tensor:
        """Name the class of every pixel of the test scenes."""
        with torch.no_grad(), self.autocast():
            batches = [images.to(self.device) for images in self.test.images.split(32)]
            return torch.cat([network(images)[0].argmax(1).cpu() for images in batches])


def mean_iou(answer: Tensor, truth: Tensor) -> float:
    """Average over the classes present the intersection over the union, in percent."""
    pairs = torch.bincount((truth * CLASSES + answer).flatten(), minlength=CLASSES**2)
    table = pairs.view(CLASSES, CLASSES).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return 100 * (table.diagonal()[union > 0] / union[union > 0]).mean().item()


@dataclass(frozen=True)
class Result:
    """Mean IoU in percent: the teacher's, and one per seed for the student alone and distilled."""

    loss: str
    teacher: float
    alone: list[float]
    distilled: list[float]

    @property
    def differences(self) -> list[float]:
        """Pair the runs of each seed: they share weights and scenes, so much noise cancels."""
        return [d - a for d, a in zip(self.distilled, self.alone, strict=True)]

    def verdict(self) -> str:
        """Say what the paired differences support, whichever way they fall, and no more."""
        count, mean = len(self.differences), fmean(self.differences)
        if count < 2:
            return f"Verdict: {mean:+.2f} points on one seed, which cannot be told from noise."
        error = stdev(self.differences) / math.sqrt(count)
        margin = error * stats.t.ppf(0.975, count - 1)
        means = f"{mean:+.2f} +- {error:.2f} points (mean +- standard error, {count} seeds)"
        interval = f"95% interval {mean - margin:+.2f} to {mean + margin:+.2f}"
        effect = f"{self.loss} {'raises' if mean > 0 else 'lowers'} the student's mean IoU"
        if abs(mean) <= margin:
            effect = f"what {self.loss} changes is within noise"
        return f"Paired difference: {means}.\nVerdict: {effect} ({interval})."

    def table(self) -> str:
        """Lay out the scores by seed, then their mean and standard deviation."""
        columns = (self.alone, self.distilled, self.differences)
        rows: dict[str, tuple[float, ...]]
        rows = {f"seed {i}": row for i, row in enumerate(zip(*columns, strict=True))}
        rows["mean"] = tuple(map(fmean, columns))
        if len(self.alone) > 1:
            rows["std. deviation"] = tuple(map(stdev, columns))
        lines = [f"{'mean IoU, %':<16}{'alone':>8}{'distilled':>12}{'difference':>13}"]
        lines += [f"{name:<16}{a:8.2f}{d:12.2f}{x:13.2f}" for name, (a, d, x) in rows.items()]
        return "\n".join(lines)


def draw_figure(test: Labelled, answers: dict[str, Tensor], path: Path) -> None:
    """Set the first test scenes, unselected, beside the truth and each network's answer."""
    rows, columns = min(4, len(test.labels)), ["image", "truth", *answers]
    figure = Figure(figsize=(2.1 * len(columns), 2.3 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row, axes in enumerate(grid):
        axes[0].imshow(test.images[row, 0], cmap="gray", vmin=0, vmax=1)
        truth = test.labels[row]
        maps = [truth, *(answer[row] for answer in answers.values())]
        for axis, classes in zip(axes[1:], maps, strict=True):
            colours = ListedColormap(PALETTE)
            axis.imshow(classes, cmap=colours, vmin=0, vmax=BACKGROUND, interpolation="nearest")
            if classes is not truth:
                axis.set_xlabel(f"IoU {mean_iou(classes, truth):.0f}%")
    for axis, title in zip(grid[0], columns, strict=True):
        axis.set_title(title)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    names = [*map(str, range(BACKGROUND)), "background"]
    handles = [Patch(color=c, label=n) for c, n in zip(PALETTE, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=CLASSES, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def compare(options: argparse.Namespace) -> Result:
    """Train the teacher once and every student twice, telling each score as it comes."""
    splits = load_splits()
    generator = torch.Generator().manual_seed(TEST_SEED)
    test = draw_scenes(splits[options.split], options.test_scenes, generator)
    bench = Bench(splits["train"], test, torch.device(options.device), options.amp)
    answers: dict[str, Tensor] = {}

    def score(title: str, name: str, *how: Any) -> tuple[FCN, float]:
        """Train and score one network, keeping for the figure its first answers of the kind."""
        start = time.perf_counter()
        network = bench.train(name, *how)
        answer = bench.answer(network)
        iou, seconds = mean_iou(answer, test.labels), time.perf_counter() - start
        size = sum(p.numel() for p in network.parameters())
        print(f"{name:<20}{size:>9,} parameters {seconds:6.1f} s   mIoU {iou:5.2f}%", flush=True)
        answers.setdefault(title, answer)
        return network, iou

    teacher, iou = score("teacher", "teacher", "teacher", TEACHER_SEED, options.teacher_steps)
    result = Result(options.loss, iou, [], [])
    for seed in range(options.seeds):
        how = ("student", seed, options.steps)
        result.alone.append(score("student alone", f"seed {seed} alone", *how)[1])
        name, guide = f"seed {seed} {options.loss}", (teacher, options.loss)
        result.distilled.append(score("distilled student", name, *how, guide)[1])
    draw_figure(test, answers, options.output)
    return result


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the comparison, print what it found and return the figures behind it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--loss", choices=LOSSES, default="pcd", help="distillation loss (default: pcd)")
    add("--seeds", type=int, default=3, help="pairs of students to train (default: 3)")
    add("--steps", type=int, default=600, help="steps of a student (default: 600)")
    add("--teacher-steps", type=int, default=1200, help="steps of the teacher (default: 1200)")
    add("--test-scenes", type=int, default=256, help="scenes to score on (default: 256)")
    add("--split", choices=("test", "validation"), default="test", help="digits to score on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="mixed precision: float16 on CUDA, else bfloat16")
    add("--output", type=Path, default=Path("distill_digits.png"), help="where the PNG goes")
    options = parser.parse_args(argv)
    if min(options.seeds, options.test_scenes) < 1:
        parser.error("--seeds and --test-scenes must be at least 1")
    start = time.perf_counter()
    result = compare(options)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\n{result.table()}\n\n{result.verdict()}")
    print(f"Took {minutes} min {seconds} s; some scenes are drawn in {options.output}.")
    return result


if __name__ == "__main__":
    main()
