"""Distil a self-supervised network into a small one, pixel by pixel, without labels (PCD).

    python docs/examples/distill_pcd.py

All training images are photographs that are part of scikit-image and scikit-learn (nothing is
downloaded). A teacher is trained first, on two views of each crop, with a head on its pooled vector.
Then, for every seed, students of about 36k parameters start from the same weights and see the same
views. Four objectives distil the frozen teacher into them: its pooled vectors only, PCD with the head
applied to each pixel instead of the SpatialAdaptor, PCD without the MHSAPlugin, and PCD. Their
features are measured on another task: a linear probe classifies every pixel of the scenes of
distill_digits.py. The script prints the mean IoU on held-out digits, states what the differences
between the objectives support, and draws a PNG.

It needs scikit-image, scikit-learn, matplotlib and tqdm besides pixdistill.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import skimage.data
import skimage.io
import torch
import torch.nn.functional as F
from digit_scenes import (
    BACKGROUND,
    CLASSES,
    Labelled,
    Residual,
    conv,
    draw_scenes,
    load_splits,
    mean_iou,
)
from einops import rearrange
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import (
    MHSAPlugin,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
    plug,
    unplug,
)

# Read from scikit-image's wheel, because `skimage.data.retina()` and others may download.
# fmt: off
PHOTOGRAPHS = [
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
]
# fmt: on
TILE = 160  # pixels per side of the squares that the photographs are cut into
VIEW = 64  # pixels per side of a view
ZOOM = (0.3, 0.8)  # range of the side of a view's box relative to that of its tile
TEACHER_BATCH, BATCH = 48, 16
WIDTHS = (64, 32)  # of the teacher's head, hidden and out
QUEUE_SIZE = 1024
TEMPERATURE = 0.2
TEACHER_RATE, RATE = 4e-3, 4e-3
TEACHER_SEED, SCENE_SEED = 10_000, 20_000  # apart from the students' 0, 1, 2, ...
PROBE_GRID = 32  # positions per side that the linear probe predicts


class View(NamedTuple):
    """Views [B, 1, 64, 64] of tiles, whose corners are at -1 and 1."""

    images: Tensor
    centre: Tensor
    """(x, y) in the tile, [B, 2]."""
    half: Tensor
    """From the centre to the right and the lower edge, [B, 2]; to the left if x is negative."""


def load_tiles() -> Tensor:
    """Convert the photographs to grey, scale them and cut them into squares [N, 1, 160, 160]."""
    files = [Path(skimage.data.data_dir) / name for name in PHOTOGRAPHS]
    pictures = [*map(skimage.io.imread, files), *load_sample_images().images]
    tiles = []
    for picture in pictures:
        grey = torch.as_tensor(picture / 255, dtype=torch.float32)
        grey = grey.mean(2) if grey.dim() == 3 else grey
        zoom = 2 * TILE / min(grey.shape)
        grey = F.interpolate(grey[None, None], scale_factor=zoom, mode="bilinear", antialias=True)
        squares = grey[0, 0].unfold(0, TILE, TILE).unfold(1, TILE, TILE)
        tiles.append(squares.reshape(-1, 1, TILE, TILE))
    return torch.cat(tiles)


def positions(centre: Tensor, half: Tensor, size: Sequence[int]) -> Tensor:
    """Centres [B, H, W, 2] of the cells of an H x W grid over each box."""
    theta = torch.cat([torch.diag_embed(half), centre.unsqueeze(2)], dim=2)
    return F.affine_grid(theta, [len(half), 1, *size], align_corners=False)


def positions_in(other: View, view: View, size: Sequence[int]) -> Tensor:
    """Positions of a view's cells in another view; outside [-1, 1] it does not show them."""
    return positions((view.centre - other.centre) / other.half, view.half / other.half, size)


def draw_view(tiles: Tensor, generator: torch.Generator) -> View:
    """Crop and flip each tile, and change gamma, brightness, contrast, blur and noise."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(len(tiles), *size, generator=generator) * (high - low) + low

    half = uniform(*ZOOM, 1).expand(-1, 2)
    centre = uniform(-1, 1, 2) * (1 - half)
    half = half * torch.cat([uniform(-1, 1, 1).sign(), torch.ones(len(tiles), 1)], dim=1)
    grid = positions(centre, half, (VIEW, VIEW))
    images = F.grid_sample(tiles, grid, padding_mode="border", align_corners=False)

    images = images.pow(uniform(-0.5, 0.5, 1, 1, 1).exp())
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = mean + uniform(-0.2, 0.2, 1, 1, 1) + (images - mean) * uniform(0.5, 1.5, 1, 1, 1)
    images = images.lerp(F.avg_pool2d(images, 3, 1, 1), uniform(-1, 1, 1, 1, 1).clamp_min(0))
    noise = torch.randn(images.shape, generator=generator)
    return View(images + noise * uniform(0, 0.08, 1, 1, 1), centre, half)


def draw_pairs(tiles: Tensor, batch: int, steps: int, seed: int) -> Iterator[tuple[View, View]]:
    """Draw two views of each of some tiles at every step; they depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        # Without replacement: two copies of a tile would be each other's negatives.
        picked = tiles[torch.randperm(len(tiles), generator=generator)[:batch]]
        yield draw_view(picked, generator), draw_view(picked, generator)


class Teacher(nn.Module):
    """Convolutions to a map [B, 64, 16, 16], and SimCLR's head on its mean."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(conv(1, 24, 2), conv(24, 48, 2), Residual(48))
        self.body = nn.Sequential(stem, conv(48, 64), Residual(64), Residual(64))
        hidden, out = WIDTHS
        self.head = nn.Sequential(
            nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the map; the head is not applied."""
        return self.body(images)


class Student(nn.Module):
    """A narrower and shallower network to a map [B, 64, 16, 16]."""

    channels = 64

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(conv(1, 8, 2), conv(8, 16, 2), Residual(16))
        self.body = nn.Sequential(stem, conv(16, 32), Residual(32))
        self.out = conv(32, self.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map."""
        return self.out(self.body(images))


def minimise(
    losses: Iterable[Tensor], parameters: Iterable[nn.Parameter], rate: float, steps: int, name: str
) -> None:
    """One step per loss; warm-up in a tenth of the steps, then cosine decay."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
    # At least 20, because OneCycleLR divides by the length of its phases.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, max(steps, 20), pct_start=0.1, cycle_momentum=False
    )
    # disable=None shows the bar on a terminal only.
    for loss in tqdm(losses, name, steps, unit="step", leave=False, disable=None):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def contrast_views(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's loss: each vector should find the other view of its tile among all [2B, D]."""
    vectors = F.normalize(torch.cat([first, second]), dim=1)
    logits = (vectors @ vectors.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(vectors)).roll(len(first)))


def train_teacher(tiles: Tensor, steps: int) -> Teacher:
    """Train the teacher on its own two views, and freeze it."""
    torch.manual_seed(TEACHER_SEED)
    teacher = Teacher()

    def losses() -> Iterator[Tensor]:
        for one, two in draw_pairs(tiles, TEACHER_BATCH, steps, TEACHER_SEED):
            pooled = teacher(torch.cat([one.images, two.images])).mean(dim=(2, 3))
            yield contrast_views(*teacher.head(pooled).chunk(2))

    minimise(losses(), teacher.parameters(), TEACHER_RATE, steps, "teacher")
    return teacher.eval().requires_grad_(False)


class Objective(NamedTuple):
    """Which parts of PCD are used."""

    dense: bool = True
    adaptor: bool = True
    mhsa: bool = True


OBJECTIVES = {
    "pooled vectors only": Objective(dense=False, mhsa=False),
    "PCD, no adaptor": Objective(adaptor=False),
    "PCD, no MHSA": Objective(mhsa=False),
    "PCD": Objective(),
}


class Distillation(nn.Module):
    """A student with the parts of PCD that are needed in training only."""

    def __init__(self, objective: Objective, teacher: Teacher, pairing: str, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.student = Student()  # first, so that each objective starts from the same student
        self.objective, self.pairing = objective, pairing
        self.adaptor = SpatialAdaptor(teacher.head)
        self.head = PixelHead.like(self.adaptor, self.student.channels)
        self.queue = PixelQueue(QUEUE_SIZE, WIDTHS[-1])
        self.contrast = PixelContrastLoss(TEMPERATURE, negatives=None, queue=self.queue)
        if objective.mhsa:
            plug(self.student, "out", MHSAPlugin(self.student.channels, num_heads=4))

    def forward(self, images: Tensor) -> Tensor:
        """Predict the teacher's targets, [B, 32, 16, 16], or [B, 32, 1, 1] from pooled features."""
        features = self.student(images)
        return self.head(features if self.objective.dense else features.mean((2, 3), keepdim=True))

    @torch.no_grad()
    def targets(self, teacher_map: Tensor) -> Tensor:
        """Apply the head to the teacher's map [B, 64, 16, 16]: [B, 32, 16, 16]."""
        if self.objective.adaptor:
            return self.adaptor(teacher_map)
        # To each pixel: the mean of the result is not the head's output for the mean.
        pixels = rearrange(teacher_map, "b c h w -> (b h w) c")
        height, width = teacher_map.shape[2:]
        return rearrange(self.adaptor.head(pixels), "(b h w) d -> b d h w", h=height, w=width)

    def loss(self, views: Sequence[View], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Compare the prediction from each view with the teacher's targets in the other."""
        targets = [self.targets(teacher_map) for teacher_map in teacher_maps]
        predictions = self(torch.cat([view.images for view in views])).chunk(2)
        losses = []
        for mine, other in ((0, 1), (1, 0)):
            target, in_both = self.pair(targets[other], views[other], views[mine])
            losses.append(self.contrast(predictions[mine], target, valid_mask=in_both))
        # After the comparison, so that no image is its own negative.
        self.queue.enqueue_pooled(targets[0])
        return (losses[0] + losses[1]) / 2

    def pair(self, target: Tensor, other: View, mine: View) -> tuple[Tensor, Tensor | None]:
        """Resample the other view's targets at the cells of mine; the mask says which cells have one."""
        if not self.objective.dense:
            return target.mean(dim=(2, 3), keepdim=True), None
        if self.pairing == "grid":  # as in the official code: by index, whatever the crops show
            return target, None
        grid = positions_in(other, mine, target.shape[2:])
        paired = F.grid_sample(target, grid, padding_mode="border", align_corners=False)
        return paired, (grid.abs() <= 1).all(dim=-1)

    def finish(self) -> Student:
        """Remove the plug-in and drop the head: the rest is deployed."""
        if self.objective.mhsa:
            unplug(self.student, "out")
        return self.student.eval().requires_grad_(False)


def distil(
    teacher: Teacher, tiles: Tensor, steps: int, pairing: str, seed: int
) -> dict[str, Distillation]:
    """Train one student per objective, on the same views."""
    runs = {name: Distillation(o, teacher, pairing, seed) for name, o in OBJECTIVES.items()}

    def losses() -> Iterator[Tensor]:
        for views in draw_pairs(tiles, BATCH, steps, seed):
            with torch.no_grad():
                maps = [teacher(view.images) for view in views]
            yield torch.stack([run.loss(views, maps) for run in runs.values()]).sum()

    # AdamW updates each parameter independently, so one optimizer can serve all runs.
    learned = [p for run in runs.values() for p in run.parameters() if p.requires_grad]
    minimise(losses(), learned, RATE, steps, f"seed {seed}")
    return {name: run.eval() for name, run in runs.items()}


class Probe:
    """A linear classifier on frozen features; all rows share its scenes."""

    def __init__(self, split: str, scenes: int, steps: int) -> None:
        splits, generator = load_splits(), torch.Generator().manual_seed(SCENE_SEED)
        self.train = draw_scenes(splits["train"], scenes, generator)
        self.test = draw_scenes(splits[split], scenes // 2, generator)
        self.steps = steps

    def __call__(self, network: nn.Module) -> float:
        """Train the classifier and return its mean IoU in percent on the test scenes."""
        torch.manual_seed(SCENE_SEED)
        features = self.features(network, self.train)
        step = VIEW // PROBE_GRID
        labels = self.train.labels[:, ::step, ::step]
        # With equal weights a weak probe predicts background everywhere.
        weights = torch.tensor([1.0] * BACKGROUND + [0.4])
        channels, cell = features.shape[1], PROBE_GRID // features.shape[2]
        # Still linear: each cell predicts the pixels in it.
        classify = nn.Sequential(
            nn.BatchNorm2d(channels, affine=False),
            nn.Conv2d(channels, cell**2 * CLASSES, kernel_size=1),
            nn.PixelShuffle(cell),
        )

        def losses() -> Iterator[Tensor]:
            for _ in range(self.steps):
                picked = torch.randint(len(features), (32,))
                yield F.cross_entropy(classify(features[picked]), labels[picked], weights)

        minimise(losses(), classify.parameters(), 2e-2, self.steps, "probe")
        classify.eval()
        with torch.no_grad():
            logits = classify(self.features(network, self.test))
            logits = F.interpolate(logits, size=(VIEW, VIEW), mode="bilinear")
        return mean_iou(logits.argmax(1), self.test.labels)

    @staticmethod
    @torch.no_grad()
    def features(network: nn.Module, scenes: Labelled) -> Tensor:
        """The network's map of each scene."""
        return torch.cat([network(images) for images in scenes.images.split(64)])


@dataclass(frozen=True)
class Result:
    """Mean IoU in percent of linear probes: of the teacher, and per row and seed."""

    teacher: float
    scores: dict[str, list[float]]

    def table(self) -> str:
        """Format each row's scores by seed, their mean and standard deviation."""
        seeds = range(len(self.scores["PCD"]))
        lines = [f"{'mean IoU, %':<22}" + "".join(f"{f'seed {i}':>8}" for i in seeds)]
        lines[0] += f"{'mean':>9}{'std. dev.':>11}"
        for name, scores in self.scores.items():
            spread = f"{stdev(scores):11.2f}" if len(scores) > 1 else f"{'-':>11}"
            cells = "".join(f"{score:8.2f}" for score in scores)
            lines.append(f"{name:<22}{cells}{fmean(scores):9.2f}{spread}")
        lines.append(f"{'teacher':<22}{'':{8 * len(seeds)}}{self.teacher:9.2f}")
        return "\n".join(lines)

    def statement(self) -> str:
        """State what the paired differences support, whatever their sign."""
        lines = ["PCD minus each other row, paired by seed (95% interval of the mean):"]
        for name, others in self.scores.items():
            if name == "PCD":
                continue
            pairs = zip(self.scores["PCD"], others, strict=True)
            differences = [score - other for score, other in pairs]
            count, mean = len(differences), fmean(differences)
            if count < 2:
                lines.append(f"  {name:<22}{mean:+6.2f}  one seed, cannot be told from noise")
                continue
            margin = stdev(differences) / math.sqrt(count) * stats.t.ppf(0.975, count - 1)
            effect = "PCD is better" if mean > 0 else "PCD is worse"
            verdict = effect if abs(mean) > margin else "within noise"
            interval = f"({mean - margin:+.2f} to {mean + margin:+.2f})"
            lines.append(f"  {name:<22}{mean:+6.2f}  {interval:<18}{verdict}")
        return "\n".join([*lines, LIMITS])


LIMITS = """This says nothing about other teachers, longer training or larger networks. The intervals
cover the students' seeds only: there is one teacher. Each line is a test of its own."""


def draw_figure(
    result: Result, run: Distillation, teacher: Teacher, tiles: Tensor, path: Path
) -> None:
    """Draw one pixel of the student in views that are not selected, and the table as bars."""
    one, two = next(draw_pairs(tiles, 3, 1, SCENE_SEED))
    with torch.no_grad():
        student = F.normalize(run(one.images), dim=1)
        maps = [F.normalize(run.targets(teacher(view.images)), dim=1) for view in (one, two)]
    points = [positions_in(view, one, student.shape[2:]).flatten(1, 2) for view in (one, two)]
    # The cell nearest to the middle of the first view among those in both views.
    cells = (points[0].norm(dim=2) + 10 * (points[1].abs().amax(dim=2) > 1)).argmin(dim=1)

    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(len(cells), 5, width_ratios=(1, 1, 1, 1, 2.4))
    frame: dict[str, Any] = {"extent": (-1, 1, 1, -1)}
    for row, cell in enumerate(cells):
        pixel = student[row].flatten(1)[:, cell]
        for i, view in enumerate((one, two)):
            left, right = (figure.add_subplot(grid[row, 2 * i + k]) for k in (0, 1))
            left.imshow(view.images[row, 0].numpy(), cmap="gray", **frame)
            cosines = torch.einsum("dhw,d->hw", maps[i][row], pixel).numpy()
            shown = right.imshow(cosines, vmin=-0.5, vmax=1, **frame)
            for axis, title in ((left, f"view {i + 1}"), (right, "cosine with teacher")):
                axis.plot(*points[i][row, cell].numpy(), "r+", markersize=11, markeredgewidth=2)
                axis.set(xticks=[], yticks=[])
                axis.set_title(title if row == 0 else "", fontsize=9)
        figure.colorbar(shown, ax=right)

    axis = figure.add_subplot(grid[:, 4])
    rows = {**result.scores, "teacher": [result.teacher]}
    axis.barh(
        list(rows), list(map(fmean, rows.values())), color=["0.6", *["C0"] * 3, *["C1"] * 2, "0.4"]
    )
    for i, scores in enumerate(rows.values()):
        axis.plot(scores, [i] * len(scores), "k.", markersize=5)
    axis.invert_yaxis()
    axis.set_xlabel("mean IoU of a linear probe, % (a dot: one seed)")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def compare(options: argparse.Namespace) -> Result:
    """Train the teacher once and the students for each seed; print each score."""
    tiles = load_tiles()
    probe = Probe(options.split, options.scenes, options.probe_steps)
    start = time.perf_counter()

    def score(name: str, network: nn.Module) -> float:
        """Probe a network and print the result."""
        iou, size = probe(network), sum(p.numel() for p in network.parameters())
        seconds = time.perf_counter() - start
        print(
            f"{name:<30}{size:>9,} parameters   mIoU {iou:5.2f}%   at {seconds:4.0f} s", flush=True
        )
        return iou

    teacher = train_teacher(tiles, options.teacher_steps)
    result = Result(score("teacher", teacher.body), {})
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        networks: dict[str, nn.Module] = {"random student": Student().eval()}
        runs = distil(teacher, tiles, options.steps, options.pairing, seed)
        whole = copy.deepcopy(runs["PCD"])  # with its plug-in and its head
        networks |= {name: run.finish() for name, run in runs.items()}
        networks["PCD, plug-in kept"] = whole.student
        for name, network in networks.items():
            iou = score(f"seed {seed} {name}", network)
            result.scores.setdefault(name, []).append(iou)
    draw_figure(result, whole, teacher, tiles, options.output)
    return result


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the comparison, print the results and return them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="students for each objective (default: 3)")
    add("--steps", type=int, default=250, help="steps of a student (default: 250)")
    add("--teacher-steps", type=int, default=200, help="steps of the teacher (default: 200)")
    add("--probe-steps", type=int, default=200, help="steps of a linear probe (default: 200)")
    add("--scenes", type=int, default=512, help="to train a probe; half as many to test it (512)")
    add("--split", choices=("test", "validation"), default="test", help="digits to score on")
    add("--pairing", choices=("overlap", "grid"), default="overlap", help="which pixels to compare")
    add("--quick", action="store_true", help="one seed and few steps, too short for a result")
    add("--output", type=Path, default=Path("distill_pcd.png"), help="where the PNG goes")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.steps, options.teacher_steps = 1, 30, 30
        options.scenes, options.probe_steps = 128, 60
    if options.seeds < 1 or options.scenes < 2:
        parser.error("--seeds must be at least 1 and --scenes at least 2")
    start = time.perf_counter()
    result = compare(options)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\n{result.table()}\n\n{result.statement()}")
    print(f"Took {minutes} min {seconds} s; the picture is {options.output}.")
    return result


if __name__ == "__main__":
    main()
