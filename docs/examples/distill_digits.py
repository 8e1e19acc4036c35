"""Distil a segmentation network into one thirty times smaller, on scenes of real handwriting.

    python docs/examples/distill_digits.py

The 8x8 digits bundled with scikit-learn (nothing is downloaded) are scaled, rotated and overlaid on
cluttered 64x64 scenes. The task is to classify every pixel. A teacher of about 1M parameters is
trained once. Then, for every seed, a student of about 30k parameters is trained twice from the same
initial weights on the same batches: alone, and with a distillation loss (`--loss`) between its
outputs and the teacher's. The script prints the mean IoU on scenes of held-out digits, the paired
difference and a verdict, and draws some of those scenes to a PNG. It takes three to four minutes on
two idle CPU cores.

Training is short on purpose: the comparison is at equal steps. The losses were tuned with other seeds
on validation digits. With four times the steps (one seed, `--steps 2400`) the student reached 56%
there, with `pcd` and without.

It needs scikit-learn, matplotlib and tqdm besides pixdistill.
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
from typing import Any

import torch
import torch.nn.functional as F
from digit_scenes import (
    BACKGROUND,
    CLASSES,
    FCN,
    PALETTE,
    TEACHER_SEED,
    TEST_SEED,
    Bench,
    Builder,
    Labelled,
    Outputs,
    draw_scenes,
    load_splits,
    mean_iou,
)
from learn_masks import MASK_STEPS, MASKED_WEIGHT, MaskedLogits, learn_tokens
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import stats
from torch import Tensor, nn

from pixdistill import AfDCDLoss, PixelContrastLoss, PixelQueue

QUEUE_SIZE = 4096
LOGIT_TEMPERATURE = 4.0


class PixelContrast(nn.Module):
    """Pixel contrast of the student's projected features with the teacher's."""

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        queued: bool = False,
        labelled: bool = False,
    ):
        super().__init__()
        self.labelled = labelled
        self.projector = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.queue = PixelQueue(QUEUE_SIZE, teacher_channels) if queued else None
        self.contrast = PixelContrastLoss(
            temperature=0.1, negatives=None if queued else "batch", queue=self.queue
        )
        self.weight = 2.0

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Compute the loss before the batch joins the queue: no image is its own negative."""
        small = None
        if self.labelled:
            size = teacher.features.shape[2:]
            nearest = F.interpolate(labels[:, None].float(), size, mode="nearest")
            small = nearest[:, 0].long()
        loss = self.contrast(self.projector(student.features), teacher.features, labels=small)
        if self.queue is not None:
            self.queue.enqueue_pooled(teacher.features)
        return self.weight * loss


class LogitMatching(nn.Module):
    """The control for MasKD: the same distance of the logits, without masks."""

    def forward(self, student: Outputs, teacher: Outputs, _: Tensor) -> Tensor:
        """The mean squared difference, with the weight of the masked one."""
        return MASKED_WEIGHT * F.mse_loss(student.logits, teacher.logits)


class PatchContrast(nn.Module):
    """Af-DCD of the student's features and the teacher's."""

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        self.loss = AfDCDLoss(
            student_channels,
            teacher_channels,
            num_groups=8,
            pool_size=2,
            temperature=1.0,
            mask_ratio=0.25,
            mimic_reduction="mean",
            mimic_weight=0.05,
            contrast_weight=0.05,
        )

    def forward(self, student: Outputs, teacher: Outputs, _: Tensor) -> Tensor:
        """The loss aligns the channels itself."""
        return self.loss(student.features, teacher.features)


class WithLogits(nn.Module):
    """A distillation loss plus the divergence of the class probabilities (Hinton et al., 2015)."""

    def __init__(self, loss: nn.Module, weight: float):
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Add the mean divergence per pixel, multiplied by the square of its temperature."""
        ours, theirs = (
            (logits.float() / LOGIT_TEMPERATURE).log_softmax(dim=1)
            for logits in (student.logits, teacher.logits)
        )
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True) / ours[:, 0].numel()
        return self.loss(student, teacher, labels) + self.weight * LOGIT_TEMPERATURE**2 * divergence


def with_logits(build_loss: Builder, weight: float) -> Builder:
    """Return what builds the loss, with the logits' term where it has a weight."""
    if not weight:
        return build_loss
    return lambda channels: WithLogits(build_loss(channels), weight)


def pixel_contrast(_: Bench, teacher: FCN, __: int, **options: bool) -> Builder:
    """PCD needs only the number of the teacher's channels."""
    return partial(PixelContrast, teacher_channels=teacher.channels, **options)


def masked_logits(bench: Bench, teacher: FCN, steps: int) -> Builder:
    """MasKD learns masks of the teacher's logits first, once for all students."""
    tokens, _ = learn_tokens(bench, teacher, steps)
    return lambda _: MaskedLogits(tokens)


# To add a loss, add it here: a function of the bench, the frozen teacher and a number of steps (to
# learn something about the teacher first) that returns what builds the loss for a student.
LOSSES: dict[str, Callable[[Bench, FCN, int], Builder]] = {
    "pcd": pixel_contrast,
    "pcd-queue": partial(pixel_contrast, queued=True),
    "maskd": masked_logits,
    "mse": lambda *_: lambda _: LogitMatching(),
    "af_dcd": lambda _, teacher, __: partial(PatchContrast, teacher_channels=teacher.channels),
}


@dataclass(frozen=True)
class Result:
    """Mean IoU in percent: of the teacher, and per seed of the student alone and distilled."""

    loss: str
    teacher: float
    alone: list[float]
    distilled: list[float]

    @property
    def differences(self) -> list[float]:
        """Paired by seed: both runs share weights and scenes, so that much noise cancels."""
        return [d - a for d, a in zip(self.distilled, self.alone, strict=True)]

    def verdict(self) -> str:
        """State what the paired differences support, whatever their sign."""
        count, mean = len(self.differences), fmean(self.differences)
        if count < 2:
            return f"Verdict: {mean:+.2f} points on one seed, which cannot be told from noise."
        error = stdev(self.differences) / math.sqrt(count)
        margin = error * stats.t.ppf(0.975, count - 1)
        means = f"{mean:+.2f} +- {error:.2f} points (mean +- standard error, {count} seeds)"
        interval = f"95% interval {mean - margin:+.2f} to {mean + margin:+.2f}"
        effect = f"{self.loss} {'raises' if mean > 0 else 'lowers'} the student's mean IoU"
        if abs(mean) <= margin:
            effect = f"the effect of {self.loss} is within noise"
        return f"Paired difference: {means}.\nVerdict: {effect} ({interval})."

    def table(self) -> str:
        """Format the scores by seed, their mean and standard deviation."""
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
    """Draw the first test scenes, not selected, the truth and each network's prediction."""
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


def compare(options: argparse.Namespace) -> list[Result]:
    """Train the teacher once, and every student alone and with each loss; print the scores."""
    splits = load_splits()
    generator = torch.Generator().manual_seed(TEST_SEED)
    test = draw_scenes(splits[options.split], options.test_scenes, generator)
    bench = Bench(splits["train"], test, torch.device(options.device), options.amp)
    answers: dict[str, Tensor] = {}

    def score(title: str, name: str, *how: Any) -> tuple[FCN, float]:
        """Train and score one network; keep the first prediction under each title for the figure."""
        start = time.perf_counter()
        network = bench.train(name, *how)
        answer = bench.answer(network)
        iou, seconds = mean_iou(answer, test.labels), time.perf_counter() - start
        size = sum(p.numel() for p in network.parameters())
        print(f"{name:<20}{size:>9,} parameters {seconds:6.1f} s   mIoU {iou:5.2f}%", flush=True)
        answers.setdefault(title, answer)
        return network, iou

    teacher, iou = score("teacher", "teacher", "teacher", TEACHER_SEED, options.teacher_steps)
    names = list(LOSSES) if options.loss == "all" else [options.loss]
    losses = LOSSES | {"pcd": partial(pixel_contrast, labelled=options.labels)}
    builders = {
        name: with_logits(losses[name](bench, teacher, options.mask_steps), options.logits)
        for name in names
    }
    alone: list[float] = []
    results = [Result(name, iou, alone, []) for name in names]
    for seed in range(options.seeds):
        how = ("student", seed, options.steps)
        alone.append(score("student alone", f"seed {seed} alone", *how)[1])
        for name, result in zip(names, results, strict=True):
            title = "distilled student" if len(names) == 1 else name
            guide = (teacher, builders[name])
            result.distilled.append(score(title, f"seed {seed} {name}", *how, guide)[1])
    draw_figure(test, answers, options.output)
    return results


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison, print the results and return them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--loss", choices=(*LOSSES, "all"), default="pcd", help="distillation loss (default: pcd)")
    add("--labels", action="store_true", help="in pcd, pixels of a class are not its negatives")
    add("--logits", type=float, default=0.0, help="weight of an added term of the logits (0)")
    add("--seeds", type=int, default=3, help="pairs of students to train (default: 3)")
    add("--steps", type=int, default=600, help="steps of a student (default: 600)")
    add("--teacher-steps", type=int, default=1200, help="steps of the teacher (default: 1200)")
    add("--mask-steps", type=int, default=MASK_STEPS, help=f"of maskd's tokens ({MASK_STEPS})")
    add("--test-scenes", type=int, default=256, help="scenes to score on (default: 256)")
    add("--split", choices=("test", "validation"), default="test", help="digits to score on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="mixed precision: float16 on CUDA, else bfloat16")
    add("--output", type=Path, default=Path("distill_digits.png"), help="where the PNG goes")
    options = parser.parse_args(argv)
    if min(options.seeds, options.test_scenes) < 1:
        parser.error("--seeds and --test-scenes must be at least 1")
    if options.labels and options.loss not in ("pcd", "all"):
        parser.error("--labels is for --loss pcd")
    start = time.perf_counter()
    results = compare(options)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    for result in results:
        title = f"{result.loss}\n" if len(results) > 1 else ""
        print(f"\n{title}{result.table()}\n\n{result.verdict()}")
    print(f"Took {minutes} min {seconds} s; some scenes are drawn in {options.output}.")
    return results


if __name__ == "__main__":
    main()
