"""Learn which pixels of a teacher's map matter, draw them, and distil through them (MasKD).

    python docs/examples/learn_masks.py

The teacher is that of distill_digits.py, a segmentation network that is trained on scenes of
handwritten digits and frozen. Then tokens learn masks of its logits: the sum of the masked logits must
still classify the digits, while the masks must differ. The tokens are saved and loaded in the official
format. A small student is trained twice: alone, and with the masked distance between its logits and
the teacher's. This is the segmentation variant of MasKD. A PNG shows the masks over scenes of held-out
digits, one column per token, and the losses over time.

It trains one student; `distill_digits.py --loss maskd` compares several. It takes a few minutes on a
CPU, and needs scikit-learn, matplotlib and tqdm besides pixdistill.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from digit_scenes import (
    BATCH,
    CLASSES,
    FCN,
    TEACHER_SEED,
    TEST_SEED,
    Bench,
    Labelled,
    Outputs,
    draw_scenes,
    load_splits,
    mean_iou,
    task_loss,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import MaskedDistillationLoss, MaskedReceptiveTokens

NUM_TOKENS = 6
MASK_STEPS = 100
MASK_RATE = 1e-2
MASKED_WEIGHT = 0.5  # as in the official code


class MaskLoss(NamedTuple):
    """The tokens' training losses at one step."""

    task: float
    diversity: float


def learn_tokens(
    bench: Bench, teacher: FCN, steps: int = MASK_STEPS, num_tokens: int = NUM_TOKENS
) -> tuple[MaskedReceptiveTokens, list[MaskLoss]]:
    """Learn tokens whose masked logits still classify the scenes."""
    torch.manual_seed(TEACHER_SEED)
    tokens = MaskedReceptiveTokens(CLASSES, num_tokens, weighted=False).to(bench.device)
    # Wider than the official start, from which one mask covers everything and the others nothing.
    nn.init.normal_(tokens.mask_token, std=0.5)
    optimizer = torch.optim.Adam(tokens.parameters(), lr=MASK_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(TEACHER_SEED)
    history = []
    for _ in tqdm(range(steps), desc="masks", unit="step", leave=False, disable=None):
        images, labels = (t.to(bench.device) for t in draw_scenes(bench.digits, BATCH, generator))
        with torch.no_grad():
            logits = teacher(images).logits
        masked, diversity = tokens(logits)
        task = task_loss(masked, labels)
        optimizer.zero_grad()
        (task + diversity).backward()
        optimizer.step()
        schedule.step()
        history.append(MaskLoss(task.item(), diversity.item()))
    return tokens.requires_grad_(False), history


class MaskedLogits(nn.Module):
    """The masked distance of the student's logits from the teacher's."""

    def __init__(self, tokens: MaskedReceptiveTokens | nn.ModuleList):
        super().__init__()
        self.distance = MaskedDistillationLoss(tokens)

    def forward(self, student: Outputs, teacher: Outputs, _: Tensor) -> Tensor:
        """The weighted distance."""
        return MASKED_WEIGHT * self.distance(student.logits, teacher.logits)


@torch.no_grad()
def draw_figure(
    test: Labelled,
    teacher: FCN,
    tokens: MaskedReceptiveTokens,
    history: list[MaskLoss],
    path: Path,
) -> None:
    """Draw each token's mask over the first test scenes, not selected, and the losses over time."""
    rows = min(4, len(test.images))
    images = test.images[:rows]
    masks = tokens.masks(teacher(images.to(tokens.mask_token.device)).logits).cpu()
    count = masks.shape[1]
    figure = Figure(figsize=(1.7 * (count + 1) + 0.8, 1.75 * rows + 2.6), layout="constrained")
    grid = figure.add_gridspec(rows + 1, count + 1, height_ratios=[*[1] * rows, 1.3])
    axes = [[figure.add_subplot(grid[r, c]) for c in range(count + 1)] for r in range(rows)]
    for row, line in enumerate(axes):
        for axis in line:
            axis.imshow(test.images[row, 0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        for axis, mask in zip(line[1:], masks[row], strict=True):
            shown = axis.imshow(mask, cmap="inferno", vmin=0, vmax=1, alpha=0.65)
    axes[0][0].set_title("scene; mean mask:", fontsize=9)
    for t, axis in enumerate(axes[0][1:]):
        axis.set_title(f"token {t}: {masks[:, t].mean():.2f}", fontsize=9)
    figure.colorbar(shown, ax=[line[-1] for line in axes], label="mask")
    below = figure.add_subplot(grid[rows, :])
    for name, values in zip(MaskLoss._fields, zip(*history, strict=True), strict=True):
        below.plot(values, label=name)
    below.set(xlabel="step of learning the masks", ylim=(0, None))
    below.legend(frameon=False)
    below.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Learn the masks, save and load them, distil through them, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--teacher-steps", type=int, default=1200, help="steps of the teacher (default: 1200)")
    add("--mask-steps", type=int, default=MASK_STEPS, help=f"of the tokens ({MASK_STEPS})")
    add("--steps", type=int, default=600, help="steps of a student (default: 600)")
    add("--num-tokens", type=int, default=NUM_TOKENS, help=f"masks to learn ({NUM_TOKENS})")
    add("--test-scenes", type=int, default=256, help="scenes to score on (default: 256)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: CUDA if available")
    add("--masks", type=Path, default=Path("masks.pth"), help="where the tokens go")
    add("--output", type=Path, default=Path("learn_masks.png"), help="where the PNG goes")
    options = parser.parse_args(argv)
    if min(options.mask_steps, options.num_tokens, options.test_scenes) < 1:
        parser.error("--mask-steps, --num-tokens and --test-scenes must be at least 1")
    splits, generator = load_splits(), torch.Generator().manual_seed(TEST_SEED)
    test = draw_scenes(splits["test"], options.test_scenes, generator)
    bench = Bench(splits["train"], test, torch.device(options.device), amp=False)
    start = time.perf_counter()

    def score(name: str, network: nn.Module) -> None:
        iou, seconds = mean_iou(bench.answer(network), test.labels), time.perf_counter() - start
        print(f"{name:<28} mIoU {iou:5.2f}%   at {seconds:4.0f} s", flush=True)

    teacher = bench.train("teacher", "teacher", TEACHER_SEED, options.teacher_steps)
    score("teacher", teacher)
    tokens, history = learn_tokens(bench, teacher, options.mask_steps, options.num_tokens)
    for when, loss in (("first", history[0]), ("last", history[-1])):
        print(f"masks at {when:<19} task loss {loss.task:.3f}, diversity {loss.diversity:.3f}")

    options.masks.parent.mkdir(parents=True, exist_ok=True)
    torch.save(MaskedReceptiveTokens.to_official(tokens), options.masks)
    loaded = MaskedReceptiveTokens.from_official(torch.load(options.masks, weights_only=True))
    score("student alone", bench.train("alone", "student", 0, options.steps))
    guide = (teacher, lambda _: MaskedLogits(loaded))
    score("student through the masks", bench.train("maskd", "student", 0, options.steps, guide))
    draw_figure(test, teacher, tokens, history, options.output)
    print(f"The tokens are in {options.masks}, the picture in {options.output}.")


if __name__ == "__main__":
    main()
