"""Draw which teacher vectors one student vector meets in each design of Af-DCD.

`python docs/examples/draw_af_dcd_pairs.py` writes docs/af_dcd_pairs.png. The roles are not drawn by
hand: they are found by moving each teacher vector and looking at the gradient of the loss.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pixdistill.functional import af_dcd_loss

GROUPS, WIDTH, SIZE = 4, 2, 4
ANCHOR = (1, 1, 2)  # group, row and column of the student vector that is looked at
DESIGNS = {
    "spatial": {"contrast": "spatial"},
    "channel": {"contrast": "channel"},
    'omni,\nnegatives=\n"other_groups"': {"contrast": "omni"},
    'omni,\nnegatives=\n"all_others"': {"contrast": "omni", "negatives": "all_others"},
}
COLOURS = ("#eeeeee", "#d1495b", "#2e7d32")
NAMES = ("takes no part", "negative", "positive")


def roles(design: dict[str, Any]) -> Tensor:
    """0, 1 or 2 for each teacher vector `[GROUPS, SIZE, SIZE]`: no part, negative, positive.

    The gradient of the loss at one student vector depends on exactly the teacher vectors that it meets.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (GROUPS, WIDTH, SIZE, SIZE)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    group, row, column = ANCHOR

    def gradient(teacher: Tensor) -> Tensor:
        moved = student.clone().requires_grad_()
        loss: Any = af_dcd_loss(
            moved.flatten(0, 1).unsqueeze(0),
            teacher.flatten(0, 1).unsqueeze(0),
            **design,
            num_groups=GROUPS,
            patch_size=SIZE,
            pool_size=None,
            temperature=1.0,
            distance="l2",  # a gradient that moves with its vectors; the sign of L1 may not
            mimic_weight=0.0,
        )
        return torch.autograd.grad(loss, moved)[0][group, :, row, column]

    before = gradient(teacher)
    found = torch.zeros(GROUPS, SIZE, SIZE, dtype=torch.int64)
    for m, y, x in itertools.product(range(GROUPS), range(SIZE), range(SIZE)):
        other = teacher.clone()
        other[m, :, y, x] += 0.5
        found[m, y, x] = int((gradient(other) - before).abs().max() > 1e-9)
    own = slice(None) if design["contrast"] == "spatial" else group
    found[own, row, column] = 2
    return found


def draw(path: Path) -> None:
    """A row of patches a design, a square a channel group of the patch."""
    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    grid = figure.subplots(len(DESIGNS), GROUPS, squeeze=False)
    for axes, (title, design) in zip(grid, DESIGNS.items(), strict=True):
        found = roles(design)
        for group, axis in enumerate(axes):
            axis.imshow(found[group], cmap=ListedColormap(COLOURS), vmin=0, vmax=2)
            axis.set_xticks([x - 0.5 for x in range(1, SIZE)], [])
            axis.set_yticks([y - 0.5 for y in range(1, SIZE)], [])
            axis.grid(color="white", linewidth=2)
            axis.tick_params(length=0)
            axis.set_title(f"group {group + 1}", fontsize=10)
            if design["contrast"] == "spatial" or group == ANCHOR[0]:
                axis.plot(ANCHOR[2], ANCHOR[1], marker="o", color="white", markersize=9)
        axes[0].set_ylabel(title, fontsize=10)
    handles = [Patch(color=c, label=n) for c, n in zip(COLOURS, NAMES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the path and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parents[1] / "af_dcd_pairs.png"
    parser.add_argument("--output", type=Path, default=default, help="where the PNG goes")
    draw(parser.parse_args(argv).output)


if __name__ == "__main__":
    main()
