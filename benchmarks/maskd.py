"""Time, extra peak memory and error of the masked distillation loss, forward plus backward.

All providers compute the loss and its gradient with respect to the student for the same maps and
tokens. "materialising" is the formula as it is written, with a tensor [B, T, C, H, W] and the 3x3
convolution; "channels first" sums as `pixdistill` does but leaves the gradient to autograd; "one read"
only sums both maps, the floor that memory bandwidth sets. Detection weighs its tokens and multiplies
by the student's masks, segmentation does neither.
"""

import argparse
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill import MaskedDistillationLoss, MaskedReceptiveTokens
from pixdistill.functional import pooled_convolution

from . import report

Case = tuple[str, int, int, int, int, int]
CASES: list[Case] = [  # B, C, T, H, W
    ("detection", 2, 256, 6, 100, 168),
    ("detection", 2, 256, 6, 50, 84),
    ("detection", 2, 256, 6, 25, 42),
    ("segmentation", 8, 19, 8, 128, 256),
]
COLUMNS = ("variant", "B", "C", "T", "H", "W")
EPS = {"detection": 0.0, "segmentation": 1e-5}


@dataclass(frozen=True)
class Problem:
    """Maps without gradient, and frozen tokens: each run asks for its own gradient."""

    student: Tensor
    teacher: Tensor
    tokens: MaskedReceptiveTokens
    loss: MaskedDistillationLoss

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: str) -> "Problem":
        """Random data from a fixed seed, with masks that differ from pixel to pixel."""
        variant, batch, channels, num_tokens, height, width = case
        generator = torch.Generator().manual_seed(batch + channels + height)
        maps = torch.randn(2, batch, channels, height, width, generator=generator)
        detection = variant == "detection"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tokens = MaskedReceptiveTokens(channels, num_tokens, weighted=detection)
        torch.nn.init.normal_(tokens.mask_token, std=channels**-0.5, generator=generator)
        after = 0 if detection else None
        loss = MaskedDistillationLoss(tokens, eps=EPS[variant], customize_after=after).to(device)
        student, teacher = maps.to(device, dtype)
        return cls(student, teacher, tokens, loss)


def _masks(x: Tensor, tokens: MaskedReceptiveTokens) -> Tensor:
    token = tokens.mask_token.to(x.dtype).expand(x.shape[0], -1, -1)
    return (token @ x.flatten(2)).sigmoid().unflatten(2, x.shape[2:])


def _frozen(
    student: Tensor, teacher: Tensor, problem: Problem, pooled: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Masks and token weights, without gradient."""
    tokens = problem.tokens
    with torch.no_grad():
        masks = _masks(teacher, tokens)
        if problem.loss.customize_after is not None:
            masks = masks * _masks(student, tokens)
        if tokens.prob is None:
            return masks, masks.new_full(masks.shape[:2], 1 / tokens.num_tokens)
        kernel, kernel_bias, mixing, bias = (p.to(teacher.dtype) for p in tokens.prob.parameters())
        logits = F.linear(pooled(teacher, kernel, kernel_bias), mixing.flatten(1), bias)
        return masks, logits.softmax(dim=1)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).mean(dim=(2, 3))


def _window_summed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pooled_convolution(x, weight, bias).to(x.dtype)


def materialising(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """The formula as it is written."""
    masks, weights = _frozen(student, teacher, problem, _convolved)
    masks = masks.unsqueeze(2)
    squares = (student.unsqueeze(1) * masks - teacher.unsqueeze(1) * masks) ** 2
    values = squares.sum(dim=(3, 4)) / (masks.sum(dim=(3, 4)) + problem.loss.eps)
    return (weights * values.mean(dim=2)).sum(dim=1).mean()


def channels_first(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """Channels summed before tokens, and window sums: the same algebra in plain autograd."""
    masks, weights = _frozen(student, teacher, problem, _window_summed)
    scale = weights / (masks.sum(dim=(2, 3)) + problem.loss.eps)
    attention = (scale[:, :, None, None] * masks.square()).sum(dim=1)
    return (attention * (student - teacher).square().mean(dim=1)).sum(dim=(1, 2)).mean()


def ours(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """`MaskedDistillationLoss`."""
    return problem.loss(student, teacher)


def one_read(problem: Problem) -> tuple[Tensor, Tensor]:
    """The floor: every number of both maps is read once. Its values are not the task's."""
    return problem.student.sum(), problem.teacher.sum()


Provider = Callable[[Problem], tuple[Tensor, Tensor]]
"""Loss and gradient of the student."""


LossOf = Callable[[Tensor, Tensor, Problem], Tensor]


def differentiated(loss_of: LossOf) -> Provider:
    """Forward plus backward of one form of the loss."""

    def provider(problem: Problem) -> tuple[Tensor, Tensor]:
        student = problem.student.detach().requires_grad_()
        loss = loss_of(student, problem.teacher, problem)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    return provider


def compiled(loss_of: LossOf) -> LossOf:
    """`torch.compile(loss_of)`, asked for when it first runs: loading the compiler takes seconds."""
    made = functools.cache(lambda: torch.compile(loss_of))
    return lambda *arguments: made()(*arguments)


PROVIDERS: dict[str, Provider] = {
    "materialising": differentiated(materialising),
    "materialising, compiled": differentiated(compiled(materialising)),
    "channels first": differentiated(channels_first),
    "channels first, compiled": differentiated(compiled(channels_first)),
    "ours": differentiated(ours),
    "ours, compiled": differentiated(compiled(ours)),
    "one read": one_read,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks maskd`."""
    report.add_arguments(parser)
    parser.add_argument("--case", nargs=6, action="append", metavar=COLUMNS)
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="default: all")
    parser.add_argument("--measure-memory", nargs=8, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case with every provider, print, save and plot."""
    if arguments.measure_memory:
        name, dtype, *case = arguments.measure_memory
        print(_resident_rise(name, dtype, _case(case)))
        return 0
    from tqdm import tqdm

    device = arguments.device
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    cases = [_case(case) for case in arguments.case] if arguments.case else CASES
    names = arguments.provider or list(PROVIDERS)
    if device == "cpu" and shutil.which("g++") is None:
        print("skipped what is compiled: there is no C++ compiler")
        names = [name for name in names if "compiled" not in name]
    records: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * len(names), unit="run", disable=None) as bar:
        for case in cases:
            records += _measure(case, names, dtype, device, arguments.rounds, bar)
    print(report.table([_row(record) for record in records]))
    path = report.save(f"maskd_{device}_{dtype}", records, device, arguments.output)
    plot(records, path.with_suffix(".png"))
    print(
        f"\n{json.dumps(report.machine(device))}\nwritten: {path} and {path.with_suffix('.png').name}"
    )
    return 0


def _case(words: list[str]) -> Case:
    variant, *sizes = words
    if variant not in EPS:
        raise SystemExit(f"the variant must be one of {tuple(EPS)}; got {variant!r}")
    batch, channels, num_tokens, height, width = map(int, sizes)
    return variant, batch, channels, num_tokens, height, width


def _measure(
    case: Case, names: list[str], dtype: str, device: str, rounds: int, bar: Any
) -> list[dict[str, Any]]:
    problem = Problem.random(case, report.DTYPES[dtype], device)
    runs = {name: functools.partial(PROVIDERS[name], problem) for name in names}
    for name, one_run in runs.items():
        bar.set_description(f"{case} {name}: warm up")
        one_run()
        one_run()
    times = report.interleaved(runs, rounds, device)
    truth = _truth(problem)
    records = []
    for name, one_run in runs.items():
        bar.set_description(f"{case} {name}: memory and error")
        command = ["maskd", "--measure-memory", name, dtype, *map(str, case)]
        record = dict(zip(COLUMNS, case, strict=True)) | {"dtype": dtype, "provider": name}
        record |= report.spread(times[name])
        record["extra_bytes"] = report.extra_memory(one_run, device, command)
        records.append(record | report.errors(one_run(), None if name == "one read" else truth))
        bar.update()
    return records


def _truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a token at a time."""
    student, teacher = problem.student.double(), problem.teacher.double()
    masks, weights = _frozen(student, teacher, problem, _convolved)
    difference = student - teacher
    factor = torch.zeros_like(difference[:, 0])
    for mask, weight in zip(masks.unbind(dim=1), weights.unbind(dim=1), strict=True):
        area = mask.sum(dim=(1, 2)) + problem.loss.eps
        factor += (weight / area)[:, None, None] * mask.square()
    count = student.shape[0] * student.shape[1]
    gradient = 2 / count * factor.unsqueeze(1) * difference
    return (gradient * difference).sum() / 2, gradient


def _resident_rise(name: str, dtype: str, case: Case) -> int:
    problem = Problem.random(case, report.DTYPES[dtype], "cpu")
    PROVIDERS[name](problem)  # compile and load what happens once
    return report.resident_rise(lambda: PROVIDERS[name](problem))


def _row(record: dict[str, Any]) -> dict[str, str]:
    row = {column: f"{record[column]}" for column in (*COLUMNS, "provider")}
    return row | report.cells(record)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory of each provider, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    groups = [list(group) for _, group in itertools.groupby(records, _label)]
    names = [record["provider"] for record in groups[0]]
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        places = [place + width * (column - (len(names) - 1) / 2) for place in range(len(groups))]
        mine = [group[column] for group in groups]
        axes[0].bar(places, [r["seconds"] for r in mine], width, label=name)
        axes[1].bar(places, [max(r["extra_bytes"], 2**16) / 2**20 for r in mine], width, label=name)
    titles = ("time, forward + backward (s)", "extra peak memory (MiB)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(yscale="log", title=title)
        axis.set_xticks(range(len(groups)), [_label(group[0]) for group in groups], fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(record: dict[str, Any]) -> str:
    return (
        f"{record['variant']}\nB {record['B']}, C {record['C']}, T {record['T']}\n"
        f"{record['H']} x {record['W']}"
    )
