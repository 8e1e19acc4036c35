"""Draw producer, ring and consumers of the Hopper kernel over time.

`python docs/examples/draw_kernel.py` writes docs/inside_the_kernel.svg. It follows the waits of
`pixdistill/ops/row_lse/hopper.py`, with durations that are assumed, not measured: one product of a tile
takes one unit, and so do its exponentials.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

STAGES, TILES, CONSUMERS = 4, 7, 2
LATENCY, COPY = 1.5, 0.5  # of a copy into shared memory, and between two that follow each other

INK, RULE = "#1f2933", "#9aa5b1"
COPYING, FULL = "#cbd2d9", "#8fb4dd"
PRODUCT, SUM, EXP = "#2b6cb0", "#b7791f", "#2e7d32"
UNIT, LEFT, TOP = 24, 44, 66  # pixels: of one unit of time, and of the corner of the chart
SLOTS = LEFT + 62  # left edges of the ring, and of each consumer
LANES = [SLOTS + 164 + 134 * w for w in range(CONSUMERS)]
WIDTH = LANES[-1] + 126

Span = tuple[float, float]


class Schedule:
    """When everything happens: `copy[i]`, `product[w, i]`, `exp[w, i]`, `sum[w, i]`, `free[w, i]`."""

    def __init__(self) -> None:
        self.copy: list[Span] = []
        self.product: dict[tuple[int, int], Span] = {}
        self.exp: dict[tuple[int, int], Span] = {}
        self.sum: dict[tuple[int, int], Span] = {}
        self.free: dict[tuple[int, int], float] = {}
        self.tensor_cores = 0.0  # both consumers share them
        clock = [0.0] * CONSUMERS
        tile = [0] * CONSUMERS
        while min(tile) <= TILES:
            ready = [w for w in range(CONSUMERS) if tile[w] <= TILES and self._can_run(tile[w])]
            consumer = min(ready, key=lambda w: (clock[w], w))  # ValueError: a deadlock
            clock[consumer] = self._step(consumer, tile[consumer], clock[consumer])
            tile[consumer] += 1

    def _can_run(self, tile: int) -> bool:
        """Whether the copies that this step waits for have started."""
        while len(self.copy) < min(tile + 2, TILES):
            i = len(self.copy)
            freed = [self.free.get((w, i - STAGES)) for w in range(CONSUMERS)]
            if i >= STAGES and None in freed:
                return False
            start = max([0.0] if i < STAGES else [time for time in freed if time is not None])
            before = self.copy[-1][1] if self.copy else 0.0
            self.copy.append((start, max(start + LATENCY, before + COPY)))
        return True

    def _multiply(self, earliest: float) -> Span:
        start = max(earliest, self.tensor_cores)
        self.tensor_cores = start + 1
        return start, start + 1

    def _step(self, w: int, i: int, now: float) -> float:
        """Start the product of tile i and the sum of tile i - 1; returns when both are done."""
        if i < TILES:
            self.product[w, i] = self._multiply(max(now, self.copy[i][1]))
        if i > 0:
            self.sum[w, i - 1] = self._multiply(now)
        if i < TILES:
            done = self.product[w, i][1]
            self.exp[w, i] = (done, done + 1)
            now = done + 1
        if i + 1 < TILES:
            now = max(now, self.copy[i + 1][1])  # the wait for the tile after this one
        if i > 0:
            now = max(now, self.sum[w, i - 1][1])
            self.free[w, i - 1] = now
        return now


# --- The picture ----------------------------------------------------------------------------------


def text(x: float, y: float, words: str, colour: str = INK) -> str:
    """Words around a point."""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}">{words}</text>'


def box(x: float, width: float, span: Span, colour: str, words: str, ink: str = "white") -> str:
    """A box over a span of time."""
    top, bottom = (TOP + UNIT * time for time in span)
    shape = f'x="{x:g}" y="{top:g}" width="{width:g}" height="{bottom - top:g}"'
    label = text(x + width / 2, (top + bottom) / 2 + 4, words, ink)
    return f'<rect {shape} fill="{colour}" stroke="white"/>{label}'


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From one moment to another, each as a column and a time."""
    (x, y), (to_x, to_y) = ((column, TOP + UNIT * time) for column, time in (start, end))
    line = f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" stroke="{INK}" fill="none"'
    return f'{line} stroke-dasharray="4 3" marker-end="url(#head)"/>'


def parts(schedule: Schedule) -> Iterator[str]:
    """All elements, from back to front."""
    end = max(schedule.sum[w, TILES - 1][1] for w in range(CONSUMERS))
    bottom = TOP + UNIT * end
    yield text(LEFT + 22, 20, "producer") + text(LEFT + 22, 52, "starts")
    yield text(SLOTS + 74, 20, "ring of shared memory") + text(SLOTS + 74, 38, "slot")
    for slot in range(STAGES):
        yield text(SLOTS + 17 + 37 * slot, 54, str(slot))
    for w, x in enumerate(LANES):
        yield text(x + 57, 20, f"consumer {w}")
        yield text(x + 28, 40, "tensor") + text(x + 28, 54, "cores") + text(x + 87, 54, "exp")
    for x in (SLOTS - 8, *(lane - 10 for lane in LANES)):
        yield f'<path d="M{x:g} 8 V{bottom:g}" stroke="{RULE}"/>'
    yield text(18, TOP + 4, "time")
    yield f'<path d="M18 {TOP + 12} V{bottom:g}" stroke="{INK}" marker-end="url(#head)"/>'
    for i, (start, landed) in enumerate(schedule.copy):
        first = UNIT / 2 * i if i < STAGES else 0.0  # these start together
        yield text(LEFT + 22, TOP + UNIT * start + 4 + first, f"k{i}")
        x = SLOTS + 37 * (i % STAGES)
        freed = max(schedule.free.get((w, i), end) for w in range(CONSUMERS))
        yield box(x, 35, (start, landed), COPYING, "")
        yield box(x, 35, (landed, freed), FULL, f"k{i}", INK)
    for w, x in enumerate(LANES):
        for i in range(TILES):
            yield box(x, 56, schedule.product[w, i], PRODUCT, f"q k{i}")
            yield box(x + 58, 56, schedule.exp[w, i], EXP, f"e{i}")
            yield box(x, 56, schedule.sum[w, i], SUM, f"+ e{i} k{i}")
    yield arrow((SLOTS + 37 * 2, schedule.copy[1][1]), (LANES[0] - 1, schedule.product[0, 1][0]))
    for w, x in enumerate(LANES):
        yield arrow((x, schedule.free[w, 0]), (LEFT + 34, schedule.copy[STAGES][0]))


def picture(schedule: Schedule) -> str:
    """The whole file."""
    height = TOP + UNIT * max(span[1] for span in schedule.sum.values()) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" font-family="sans-serif" font-size="12" '
        'text-anchor="middle">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>',
    ]
    return "\n".join([*lines, *parts(schedule), "</svg>", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).parents[1] / "inside_the_kernel.svg"
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    arguments = parser.parse_args(argv)
    arguments.output.write_text(picture(Schedule()))
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
