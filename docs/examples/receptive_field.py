"""Draw the effective receptive field of a small student without MHSAPlugin and with it.

    python docs/examples/receptive_field.py

The student is a small ResNet for 96 x 96 images, with 28,548 parameters and a 12 x 12 map. A new plug-in
is the identity, so both students are trained first. Each image shows a disc of one of eight colours
anywhere on smooth noise, and every pixel of the map has to predict that colour. The task needs distant
pixels, so that attention is useful. For every seed the student is trained twice, from the same weights
on the same images, without the plug-in and with it.

The effective receptive field is the norm of the gradient of the map's middle pixel (a random combination
of its channels, before the classifier) with respect to the input, averaged over images and seeds. The
script prints how it is distributed, and draws it. It takes about half a minute on one CPU core.

    python docs/examples/receptive_field.py --cost

measures the cost of full attention and of `key_stride` on a map of 128 x 256 pixels instead:
processor seconds and extra peak memory, forward and backward, each in a fresh process (Linux only).

It needs matplotlib and tqdm besides pixdistill.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import MHSAPlugin, plug

IMAGE, CHANNELS, CLASSES = 96, 32, 8
STRIDE, REACH = 8, 47  # of the student: pixels between outputs, and the width of what one sees
BATCH, PEAK_RATE = 8, 6e-3
TITLES = {
    "untrained": "before training, with it or without",
    "without": "trained without the plug-in",
    "with": "trained with the plug-in",
}
COLOURS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # [8, 3]


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the convolutions' output."""
        return (self.body(x) + self.shortcut(x)).relu()


class Student(nn.Module):
    """`[B, 3, 96, 96] -> [B, 32, 12, 12]`, and a classifier of the map's pixels."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(12), nn.ReLU())
        self.layer1 = Block(12, 12, 1)
        self.layer2 = Block(12, 24, 2)
        self.layer3 = Block(24, CHANNELS, 2)
        self.classify = nn.Conv2d(CHANNELS, CLASSES, 1)

    def features(self, images: Tensor) -> Tensor:
        """The map, which is the plug-in's output where `layer3` has one."""
        return self.layer3(self.layer2(self.layer1(self.stem(images))))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 8, 12, 12]`"""
        return self.classify(self.features(images))


def draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smooth noise with a disc, and the index of the disc's colour."""
    noise = torch.randn(count, 3, IMAGE // 8, IMAGE // 8, generator=generator)
    images = 0.6 * F.interpolate(noise, size=IMAGE, mode="bilinear")
    colours = torch.randint(CLASSES, (count,), generator=generator)
    centres = 12 + (IMAGE - 24) * torch.rand(2, count, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(IMAGE), torch.arange(IMAGE), indexing="ij")
    disc = (rows - centres[0]).square() + (columns - centres[1]).square() < 10**2
    painted = 1.5 * COLOURS[colours, :, None, None].expand_as(images)
    return torch.where(disc.unsqueeze(1), painted, images), colours


def train(seed: int, steps: int, plugged: bool) -> Student:
    """Train a student; weights and images depend on the seed alone."""
    torch.manual_seed(seed)
    student = Student()
    if plugged:
        plug(student, "layer3", MHSAPlugin(CHANNELS, num_heads=4))
    optimizer = torch.optim.AdamW(student.parameters(), PEAK_RATE)
    # At least ten, because OneCycleLR divides by the length of its phases.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, max(steps, 10))
    generator = torch.Generator().manual_seed(seed)
    title = f"seed {seed}, {'with' if plugged else 'without'}"
    # disable=None shows the bar on a terminal only.
    for _ in tqdm(range(steps), desc=title, unit="step", leave=False, disable=None):
        images, colours = draw_images(BATCH, generator)
        logits = student(images)
        loss = F.cross_entropy(logits, colours.view(-1, 1, 1).expand(-1, *logits.shape[2:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval().requires_grad_(False)


def receptive_field(student: Student, images: Tensor) -> Tensor:
    """Mean norm `[96, 96]` of the gradient of the map's middle pixel, normalised to sum to one."""
    generator = torch.Generator().manual_seed(0)
    images = images.clone().requires_grad_()
    features = student.features(images)
    middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    weights = torch.randn(middle.shape, generator=generator)
    (gradient,) = torch.autograd.grad((middle * weights).sum(), images)
    size = gradient.norm(dim=1).mean(0)
    return size / size.sum()


def accuracy(student: Student, images: Tensor, colours: Tensor) -> float:
    """Fraction of the map's pixels that predict the colour, in percent."""
    with torch.no_grad():
        right = student(images).argmax(1) == colours.view(-1, 1, 1)
    return 100 * right.float().mean().item()


def distances() -> Tensor:
    """Distance `[96, 96]` of each input pixel from that at the middle of the map."""
    middle = IMAGE // STRIDE // 2 * STRIDE
    offsets = torch.arange(IMAGE) - middle
    return (offsets.square()[:, None] + offsets.square()).float().sqrt()


def compare(seeds: int, steps: int, count: int) -> dict[str, Tensor]:
    """Train the students; print how each receptive field is distributed, and return them."""
    images, colours = draw_images(count, torch.Generator().manual_seed(10_000))
    fields: dict[str, Tensor] = {}
    scores: dict[str, float] = {}
    for name, length, plugged in (
        ("untrained", 0, True),
        ("without", steps, False),
        ("with", steps, True),
    ):
        students = [train(seed, length, plugged) for seed in range(seeds)]
        fields[name] = torch.stack([receptive_field(s, images) for s in students]).mean(0)
        scores[name] = sum(accuracy(s, images, colours) for s in students) / seeds
    print(f"{'the plug-in':<18}{'half within':>13}{'90 % within':>13}{'outside':>10}{'right':>9}")
    near = distances().flatten().argsort()
    square = inside_reach()
    for name, field in fields.items():
        within = field.flatten()[near].cumsum(0)
        radii = [distances().flatten()[near][(within < part).sum()] for part in (0.5, 0.9)]
        outside = 100 * field[~square].sum()
        print(
            f"{name:<18}{radii[0]:10.1f} px{radii[1]:10.1f} px{outside:8.1f} %{scores[name]:7.1f} %"
        )
    return fields


def inside_reach() -> Tensor:
    """The input pixels `[96, 96]` that the student's convolutions reach from the middle."""
    offsets = torch.arange(IMAGE) - IMAGE // STRIDE // 2 * STRIDE
    inside = offsets.abs() <= REACH // 2
    return inside[:, None] & inside


def draw(fields: dict[str, Tensor], path: Path) -> None:
    """The fields on one scale, and the fraction of each within a radius."""
    figure = Figure(figsize=(9.4, 7.6), layout="constrained")
    *maps, curves = figure.subplots(2, 2).flat
    peak = float(max(field.max() for field in fields.values()))
    middle = IMAGE // STRIDE // 2 * STRIDE
    near = distances().flatten().argsort()
    for axis, (name, field) in zip(maps, fields.items(), strict=True):
        shown = field.clamp_min(peak / 1e4)  # zero has no logarithm
        scale = LogNorm(peak / 1e4, peak)
        picture = axis.imshow(shown, cmap="magma", norm=scale, interpolation="nearest")
        corner = (middle - REACH / 2, middle - REACH / 2)
        axis.add_patch(Rectangle(corner, REACH, REACH, fill=False, ls="--", lw=1, ec="white"))
        axis.set(title=TITLES[name], xticks=[], yticks=[])
        curves.plot(
            distances().flatten()[near], 100 * field.flatten()[near].cumsum(0), label=TITLES[name]
        )
        bar = figure.colorbar(picture, ax=axis)
        bar.set_label("fraction of the gradient at a pixel")
    curves.set(xlim=(0, 68), ylim=(0, 101))
    curves.set(xlabel="radius, input pixels", ylabel="fraction of the gradient within it, %")
    curves.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


STRIDES = (1, 2, 4, 8)


def measure(job: tuple[int, tuple[int, int], int]) -> tuple[float, float]:
    """CPU seconds of forward and backward, the fastest run, and MiB above the start at the peak."""
    stride, size, rounds = job
    plugin = MHSAPlugin(64, num_heads=8, key_stride=stride)

    def step(x: Tensor) -> float:
        start = time.process_time()
        plugin(x).sum().backward()
        return time.process_time() - start

    step(torch.randn(1, 64, 32, 32, requires_grad=True))  # load what is loaded once
    x = torch.randn(1, 64, *size, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # start a new peak
    before = status("VmRSS")
    times = [step(x)]
    extra = status("VmHWM") - before
    while len(times) < rounds and sum(times) < 60:
        times.append(step(x))
    return min(times), extra / 1024


def status(key: str) -> int:
    """A line of this process's memory, in KiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0])


def print_costs(size: tuple[int, int], rounds: int) -> None:
    """A row for each stride, with a fresh process for each."""
    print(f"{size[0]} x {size[1]} pixels, 64 channels, 8 heads, float32, forward and backward")
    print(f"{'key_stride':<12}{'CPU s':>9}{'relative':>10}{'extra MiB':>11}", flush=True)
    first = None
    jobs = [(stride, size, rounds) for stride in STRIDES]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = pool.imap(measure, jobs, chunksize=1)
        bar = tqdm(results, total=len(jobs), unit="stride", leave=False, disable=None)
        for stride, (seconds, extra) in zip(STRIDES, bar, strict=True):
            first = first or seconds
            tqdm.write(f"{stride:<12}{seconds:9.3g}{seconds / first:10.3f}{extra:11.0f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the receptive fields, or measure the costs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=2, help="students to average over (default: 2)")
    add("--steps", type=int, default=120, help="steps of a student (default: 120)")
    add("--images", type=int, default=64, help="images to average over (default: 64)")
    add("--output", type=Path, default=Path("receptive_field.png"), help="where the PNG goes")
    add("--cost", action="store_true", help="measure time and memory on a large map instead")
    add("--size", type=int, nargs=2, default=(128, 256), help="of the map for --cost")
    add("--rounds", type=int, default=5, help="runs of a stride for --cost, within a minute")
    options = parser.parse_args(argv)
    if min(options.seeds, options.images, options.rounds) < 1:
        parser.error("--seeds, --images and --rounds must be at least 1")
    if options.cost:
        print_costs(tuple(options.size), options.rounds)
        return
    draw(compare(options.seeds, options.steps, options.images), options.output)
    print(f"Drawn in {options.output}.")


if __name__ == "__main__":
    main()
