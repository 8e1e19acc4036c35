"""Draw what the five modules do with a student's and a teacher's map.

`python docs/examples/draw_overview.py` writes docs/overview.png, the picture in README. Maps and masks
are invented: the picture shows what is compared with what, and measures nothing.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, GREY, RULE = "#1f2933", "#52606d", "#cbd2d9"
STUDENT, TEACHER = "#2b6cb0", "#b7791f"
POSITIVE, NEGATIVE = "#2e7d32", "#d1495b"
WIDTH, HEIGHT = 460, 508  # points, as are all lengths below; a phone shows two thirds of the width
CELLS = 8
PIXEL = (3, 5)  # row and column of the student's pixel that is drawn

Place = tuple[float, float, float]
"""Left, bottom and side of a square."""


def field(seed: int) -> np.ndarray:
    """A smooth map `[CELLS, CELLS]` in [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(CELLS + 4, CELLS + 4))
    rows = [noise[i : i + CELLS, j : j + CELLS] for i in range(5) for j in range(5)]
    values = np.mean(rows, axis=0)
    return (values - values.min()) / np.ptp(values)


def draw_map(axis: Axes, values: np.ndarray, colour: str, place: Place, sheets: int = 1) -> None:
    """A map, in front of some sheets; cells that are NaN stay white."""
    left, bottom, side = place
    for sheet in range(sheets - 1, 0, -1):
        corner = (left + 5 * sheet, bottom + 5 * sheet)
        axis.add_patch(Rectangle(corner, side, side, facecolor="white", edgecolor=colour))
    colours = LinearSegmentedColormap.from_list(colour, ["#ffffff", colour])
    extent = (left, left + side, bottom, bottom + side)
    axis.imshow(0.12 + 0.7 * values, cmap=colours, extent=extent, vmin=0, vmax=1, zorder=2)
    frame(axis, place, colour, 1.2)


def frame(axis: Axes, place: Place, colour: str, width: float = 2.2) -> None:
    """An empty square."""
    left, bottom, side = place
    axis.add_patch(
        Rectangle((left, bottom), side, side, fill=False, edgecolor=colour, lw=width, zorder=3)
    )


def cell(place: Place, row: int, column: int, cells: int = 1) -> Place:
    """The square of `cells` x `cells` cells of a map; row and column count from the top left."""
    left, bottom, side = place
    size = side / CELLS
    return left + column * size, bottom + side - (row + cells) * size, cells * size


def centre(place: Place) -> tuple[float, float]:
    """The middle of a square."""
    left, bottom, side = place
    return left + side / 2, bottom + side / 2


def line(axis: Axes, start: Place, end: Place, colour: str, width: float, style: str = "-") -> None:
    """An arrow between the middles of two squares."""
    axis.add_patch(
        FancyArrowPatch(
            centre(start), centre(end), color=colour, lw=width, zorder=4, arrowstyle=style,
            mutation_scale=9, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def title(axis: Axes, left: float, top: float, name: str, *lines: str, number: int = 0) -> None:
    """A module's number and name, and what it does."""
    if number:
        axis.text(left, top, f"{number}  {name}", color=INK, weight="bold", fontsize=13, va="top")
    for i, words in enumerate(lines):
        axis.text(left, top - 19 - 15 * i, words, color=GREY, fontsize=11.5, va="top")


def draw_top(axis: Axes) -> None:
    """Both networks' maps, with the modules that work on one of them."""
    student, teacher = (10.0, 380.0, 92.0), (240.0, 380.0, 92.0)
    for place, words, colour, seed in (
        (student, "student's map", STUDENT, 3),
        (teacher, "teacher's map, frozen", TEACHER, 8),
    ):
        draw_map(axis, field(seed), colour, place, sheets=3)
        axis.text(place[0], 487, words, color=colour, weight="bold", fontsize=13, va="bottom")
    anchor = cell(student, *PIXEL)
    for row, column in ((0, 1), (1, 6), (2, 2), (5, 1), (6, 4), (7, 7), (0, 4), (4, 0)):
        line(axis, anchor, cell(student, row, column), INK, 0.9)
    frame(axis, anchor, INK)
    head = (teacher[0] + 134, teacher[1], teacher[2] / CELLS)
    for i in range(CELLS):
        entry = (head[0], head[1] + i * head[2])
        axis.add_patch(Rectangle(entry, head[2], head[2], facecolor=TEACHER, alpha=0.5, ec="white"))
    for row, column in ((1, 2), (3, 5), (6, 4)):
        anchor = cell(teacher, row, column)
        line(axis, anchor, (head[0] - 3, head[1] + 46, 0), INK, 0.9, "-|>")
        frame(axis, anchor, INK, 1.4)
    axis.text(head[0] + 17, head[1] + 46, "head", color=INK, fontsize=11.5, va="center")
    title(axis, 10, 370, "MHSAPlugin", "each pixel attends to", "all others", number=1)
    lines = ("applies the teacher's vector", "head to every pixel")
    title(axis, 240, 370, "SpatialAdaptor", *lines, number=2)


def draw_losses(axis: Axes) -> None:
    """The three losses, one per row: the student's map, what is compared, the teacher's map."""
    axis.plot([10, WIDTH - 10], [310, 310], color=RULE, lw=1)
    rows = [((10.0, y, 72.0), (114.0, y, 72.0)) for y in (226.0, 132.0, 38.0)]
    generator = np.random.default_rng(1)

    student, teacher = rows[0]
    draw_map(axis, field(3), STUDENT, student)
    draw_map(axis, field(8), TEACHER, teacher)
    anchor, positive = cell(student, *PIXEL), cell(teacher, *PIXEL)
    for row, column in ((0, 1), (1, 4), (6, 2), (7, 6), (5, 0)):
        line(axis, anchor, cell(teacher, row, column), NEGATIVE, 0.9)
        frame(axis, cell(teacher, row, column), NEGATIVE, 1.4)
    line(axis, anchor, positive, POSITIVE, 2)
    frame(axis, anchor, POSITIVE)
    frame(axis, positive, POSITIVE)
    words = ("each pixel closer to the teacher's at", "its position than to all others, of")
    title(axis, 204, 298, "PixelContrastLoss", *words, "the batch or of a queue", number=3)

    student, teacher = rows[1]
    rings = np.hypot(*(np.indices((CELLS, CELLS)) - np.array([3.2, 4.4])[:, None, None]))
    mask = rings < 2.9
    draw_map(axis, np.where(mask, field(3), np.nan), STUDENT, student)
    draw_map(axis, np.where(mask, field(8), np.nan), TEACHER, teacher)
    axis.text(98, student[1] + 36, "\u2212", color=INK, fontsize=18, ha="center", va="center")
    words = ("squared error, weighted by learned", "masks of the teacher's map")
    title(axis, 204, 204, "MaskedDistillationLoss", *words, "(MaskedReceptiveTokens)", number=4)

    student, teacher = rows[2]
    kept = generator.random((CELLS, CELLS)) > 0.6
    kept[PIXEL] = True
    draw_map(axis, np.where(kept, field(3), np.nan), STUDENT, student)
    draw_map(axis, field(8), TEACHER, teacher)
    for place in rows[2]:
        for row, column in itertools.product((0, 4), (0, 4)):
            frame(axis, cell(place, row, column, cells=4), INK, 0.9)
    anchor, positive = cell(student, *PIXEL), cell(teacher, *PIXEL)
    for row, column in ((0, 4), (0, 6), (1, 7), (2, 4), (2, 6), (3, 7)):
        line(axis, anchor, cell(teacher, row, column), NEGATIVE, 0.9)
        frame(axis, cell(teacher, row, column), NEGATIVE, 1.4)
    line(axis, anchor, positive, POSITIVE, 2)
    frame(axis, anchor, POSITIVE)
    frame(axis, positive, POSITIVE)
    words = ("reconstructs a masked student, and", "contrasts it inside patches of pixels")
    title(axis, 204, 110, "AfDCDLoss", *words, "and groups of channels", number=5)

    for left, colour, meaning in (
        (10, POSITIVE, "pulled together"),
        (130, NEGATIVE, "pushed apart"),
    ):
        frame(axis, (left, 12, 10), colour, 2)
        axis.text(left + 16, 17, meaning, color=GREY, fontsize=11.5, va="center")


def draw(path: Path) -> None:
    """The whole picture."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    draw_top(axis)
    draw_losses(axis)
    axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the path and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parents[1] / "overview.png"
    parser.add_argument("--output", type=Path, default=default, help="where the PNG goes")
    draw(parser.parse_args(argv).output)


if __name__ == "__main__":
    main()
