"""Tables and plots of study.py's results, with 95 % intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy import stats

# The arms that all others of a part are compared with; plots show the first comparison.
REFERENCES = {
    "budget": ("alone", "mse", "kl"),
    "why": ("alone",),
    "few-labels": ("scratch", "scratch_long", "pooled", "pcd"),
    "labels": ("alone", "contrast"),
}
AXIS = {"few-labels": "scenes with labels"}
NAMES = {
    "alone": "student alone", "kl": "logits' KL", "mse": "squared error of features",
    "contrast": "PixelContrastLoss", "maskd": "MasKD", "af_dcd": "AfDCDLoss",
    "contrast+kl": "PixelContrastLoss + KL", "maskd+kl": "MasKD + KL", "af_dcd+kl": "AfDCDLoss + KL",
    "contrast_labels": "PixelContrastLoss, labels", "logits_mse": "MasKD's distance, no masks",
    "af_dcd_mimic": "AfDCDLoss, mimic only", "af_dcd_contrast": "AfDCDLoss, contrast only",
    "scratch": "from scratch", "scratch_long": "from scratch, as many steps",
    "pooled": "pooled vectors", "pcd": "PCD", "pcd_no_negatives": "PCD's targets, squared error",
    "pcd_no_adaptor": "PCD on the map before the head", "pcd_no_plugin": "PCD without MHSAPlugin",
    "pcd_keep_plugin": "PCD, MHSAPlugin kept", "pcd_plain_relu": "PCD, head with plain ReLU",
}  # fmt: skip
Scores = dict[str, dict[int, list[float]]]  # by arm and size, in the order of the seeds


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval by Student's t."""

    mean: float
    margin: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """With one value the interval is infinite."""
        count = len(values)
        if count < 2:
            return cls(fmean(values), math.inf)
        error = stdev(values) / math.sqrt(count)
        return cls(fmean(values), float(stats.t.ppf(0.975, count - 1)) * error)

    def __str__(self) -> str:
        low, high = self.mean - self.margin, self.mean + self.margin
        sign = "*" if low > 0 or high < 0 else ""
        return f"{self.mean:+.2f} ({low:+.2f} to {high:+.2f}){sign}"


def test_scores(arms: Sequence[str], results: Mapping[str, Any]) -> Scores:
    """The records of test digits, for the seeds for which all arms have all sizes."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for record in results["records"]:
        if record["split"] == "test" and record["arm"] in arms:
            for size, score in record["scores"].items():
                found.setdefault((record["arm"], int(size)), {})[record["seed"]] = score
    arms = [arm for arm in arms if any(arm == name for name, _ in found)]  # others: not yet run
    sizes = [size for arm, size in found if arm == arms[-1]]
    scores: Scores = {arm: {} for arm in arms}
    for size in sorted(sizes):
        by_seed = [found[arm, size] for arm in arms]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        for arm, row in zip(arms, by_seed, strict=True):
            scores[arm][size] = [row[seed] for seed in seeds]
    return scores


def differences(scores: Scores, arm: str, reference: str) -> dict[int, Interval]:
    """Paired by seed."""
    return {
        size: Interval.of([a - b for a, b in zip(row, scores[reference][size], strict=True)])
        for size, row in scores[arm].items()
    }


def table(part: str, scores: Scores) -> str:
    """Mean IoU of every arm, and its differences from others, as Markdown tables."""
    rows = {arm: [f"{fmean(v):.2f}" for v in row.values()] for arm, row in scores.items()}
    sizes = [f"{size} {AXIS.get(part, 'steps')}" for size in next(iter(scores.values()))]
    text = [markdown(["mean IoU, %", *sizes], rows)]
    for reference in (name for name in REFERENCES[part] if name in scores):
        others = [arm for arm in scores if arm != reference]
        rows = {a: [str(i) for i in differences(scores, a, reference).values()] for a in others}
        text.append(markdown([f"minus {NAMES[reference]}", *sizes], rows))
    return "\n\n".join(text)


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with the names of arms in the first column."""
    lines = [head, ["---"] * len(head), *([NAMES[arm], *cells] for arm, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def trials(arms: Sequence[str], results: Mapping[str, Any]) -> str:
    """Every setting that was tried, with its mean IoU on validation digits."""
    lines = []
    for arm in arms:
        tried = [r for r in results["records"] if r["split"] == "validation" and r["arm"] == arm]
        tried.sort(key=lambda r: list(r["settings"].values()))
        best = max((fmean(r["scores"].values()) for r in tried), default=0.0)
        cells = []
        for record in tried:
            score = fmean(record["scores"].values())
            settings = ", ".join(f"{name} {value:g}" for name, value in record["settings"].items())
            mark = "**" if score == best else ""
            cells.append(f"{settings}: {mark}{score:.2f}{mark}")
        lines.append(f"- {NAMES[arm]}: {'; '.join(cells)}")
    return "\n".join(lines)


def plot(part: str, scores: Scores, path: Path) -> None:
    """Mean IoU, and the difference from the first arm with its interval, against the size."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    first, *others = scores
    sizes = list(scores[first])
    for i, (arm, row) in enumerate(scores.items()):
        left.plot(sizes, [fmean(values) for values in row.values()], f"C{i}.-", label=NAMES[arm])
    for i, arm in enumerate(others):
        shift = 1.0 + 0.05 * (i - (len(others) - 1) / 2)  # side by side on a logarithmic axis
        rows = differences(scores, arm, first)
        means = [interval.mean for interval in rows.values()]
        margins = [
            interval.margin if math.isfinite(interval.margin) else 0 for interval in rows.values()
        ]
        right.errorbar([s * shift for s in sizes], means, margins, fmt=f"C{i + 1}.", capsize=2)
    right.axhline(0, color="0.6", linewidth=1)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.set_xlabel(AXIS.get(part, "steps"))
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("mean IoU on test digits, %")
    right.set_ylabel(f"minus {NAMES[first]}, points, with 95 % intervals")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def report(part: str, arms: Sequence[str], results: Mapping[str, Any], folder: Path) -> str:
    """Write the plot and the tables of a part, and return the tables."""
    scores = test_scores(arms, results)
    plot(part, scores, folder / f"{part}.png")
    (folder / f"{part}.md").write_text(text := tables(part, arms, results))
    seeds = len(next(iter(next(iter(scores.values())).values())))
    return f"## {part}\n\n{seeds} seeds; 95 % intervals, * excludes zero\n\n{text}"


def tables(part: str, arms: Sequence[str], results: Mapping[str, Any]) -> str:
    """The scores and, below a fold, the trials of a part, for docs/study.md."""
    scores = test_scores(arms, results)
    tried = f"<details>\n<summary>Trials</summary>\n\n{trials(list(scores), results)}\n\n</details>"
    return f"{table(part, scores)}\n\n{tried}\n"
