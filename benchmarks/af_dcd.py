"""Time, extra peak memory and error of Af-DCD's contrast and whole loss, forward plus backward.

All providers compute the loss and its gradient with respect to the student's map. "contrast" starts at
the rebuilt map, before its pooling; "loss" adds alignment, mask, projector and mimic term, with the
gradients of their parameters. "plain" is the formula as it is written: rearranged copies, all distances
of a patch by `torch.cdist`, and its negatives gathered by a boolean mask. The distances are float32, as
`torch.cdist` has no half-precision form on a CPU or a GPU.
"""

import argparse
import copy
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pixdistill import AfDCDLoss
from pixdistill.af_dcd import _pool
from pixdistill.ops.patch_lse import patch_lse, why_not_triton

from . import report

Case = tuple[str, int, int, int, int, int]
CASES: list[Case] = [  # B, C, H, W, pool
    ("contrast", 2, 512, 64, 128, 4),
    ("contrast", 2, 512, 64, 128, 2),
    ("contrast", 2, 512, 64, 128, 1),
    ("loss", 2, 512, 64, 128, 4),
]
COLUMNS = ("part", "B", "C", "H", "W", "pool")
GROUPS, PATCH, TEMPERATURE = 16, 4, 0.07


@dataclass(frozen=True)
class Problem:
    """Maps without gradient: each run asks for its own."""

    case: Case
    student: Tensor
    teacher: Tensor
    loss: AfDCDLoss
    drop_mask: Tensor

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: str) -> "Problem":
        """Random data from a fixed seed: a rebuilt map that resembles the teacher's."""
        part, batch, channels, height, width, pool = case
        generator = torch.Generator().manual_seed(batch + channels + height)
        teacher = torch.randn(batch, channels, height, width, generator=generator)
        student = teacher + torch.randn(teacher.shape, generator=generator)
        if part == "loss":
            student = student[:, : channels // 4].contiguous()
        drop_mask = torch.rand(batch, height, width, generator=generator) < 0.75
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = AfDCDLoss(channels // 4, channels, num_groups=GROUPS, pool_size=pool)
        student, teacher = student.to(device, dtype), teacher.to(device, dtype)
        return cls(case, student, teacher, loss.to(device, dtype), drop_mask.to(device))


def plain_contrast(student: Tensor, teacher: Tensor, pool: int) -> Tensor:
    """The formula as it is written."""
    if pool > 1:
        student, teacher = F.max_pool2d(student, pool), F.max_pool2d(teacher, pool)
    cut = "b (m d) (h p) (w q) -> (b h w) (m p q) d"
    sizes = {"m": GROUPS, "p": PATCH, "q": PATCH}
    s, t = (rearrange(x, cut, **sizes).float() for x in (student, teacher))
    logits = -torch.cdist(s, t, p=1.0) / TEMPERATURE
    vectors = logits.shape[1]
    group = torch.arange(vectors, device=logits.device) // PATCH**2
    negative = logits[:, group.unsqueeze(1) != group].view(len(s), vectors, -1)
    positive = logits.diagonal(dim1=1, dim2=2).unsqueeze(2)
    rows = torch.cat([positive, negative], dim=2).flatten(0, 1)
    target = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    pixels = student[:, 0].numel()
    return F.cross_entropy(rows, target, reduction="sum") / pixels


def our_contrast(student: Tensor, teacher: Tensor, pool: int, backend: str) -> Tensor:
    """What `af_dcd_terms` does for the contrast."""
    if pool > 1:
        student, teacher = (_pool(x, (pool, pool), None, whole=True) for x in (student, teacher))
    margin = patch_lse(
        student,
        teacher,
        groups=GROUPS,
        patch=(PATCH, PATCH),
        temperature=TEMPERATURE,
        backend=backend,
    )
    return F.softplus(margin, threshold=40).sum() / student[:, 0].numel()


Provider = Callable[[Problem], tuple[Tensor, Tensor]]
"""Loss and gradient of the student."""


def differentiated(contrast_of: Callable[[Tensor, Tensor, int], Tensor]) -> Provider:
    """Forward plus backward with one form of the contrast."""

    def provider(problem: Problem) -> tuple[Tensor, Tensor]:
        student = problem.student.detach().requires_grad_()
        part, pool = problem.case[0], problem.case[-1]
        if part == "contrast":
            loss = contrast_of(student, problem.teacher, pool)
            return loss.detach(), torch.autograd.grad(loss, student)[0]
        module = problem.loss
        assert module.align is not None
        aligned = module.align(student).masked_fill(problem.drop_mask.unsqueeze(1), 0.0)
        rebuilt = module.projector(aligned)
        mimic = F.mse_loss(rebuilt, problem.teacher, reduction="sum") / len(student)
        contrast = contrast_of(rebuilt, problem.teacher, pool)
        loss = module.mimic_weight * mimic + module.contrast_weight * contrast
        return loss.detach(), torch.autograd.grad(loss, [student, *module.parameters()])[0]

    return provider


def ours(backend: str) -> Provider:
    """The contrast by `patch_lse`, and the whole loss by `AfDCDLoss`."""
    contrast = differentiated(functools.partial(our_contrast, backend=backend))

    def provider(problem: Problem) -> tuple[Tensor, Tensor]:
        if problem.case[0] == "contrast":
            return contrast(problem)
        student = problem.student.detach().requires_grad_()
        problem.loss.backend = backend
        loss = problem.loss(student, problem.teacher, drop_mask=problem.drop_mask)
        return loss.detach(), torch.autograd.grad(loss, [student, *problem.loss.parameters()])[0]

    return provider


PROVIDERS: dict[str, Provider] = {
    "plain": differentiated(plain_contrast),
    "ours: torch": ours("torch"),
    "ours: triton": ours("triton"),
}


def why_not(name: str, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """Why a provider sits this problem out, or None."""
    if name == "ours: triton":
        return why_not_triton(torch.empty(1, case[2], 1, 1, dtype=dtype, device=device), GROUPS)
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks af_dcd`."""
    report.add_arguments(parser)
    parser.add_argument("--case", nargs=6, action="append", metavar=COLUMNS)
    parser.add_argument("--measure-memory", nargs=8, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case with every provider, print and save."""
    if arguments.measure_memory:
        name, dtype, *case = arguments.measure_memory
        print(_resident_rise(name, dtype, _case(case)))
        return 0
    from tqdm import tqdm

    device = arguments.device
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    cases = [_case(case) for case in arguments.case] if arguments.case else CASES
    records: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * len(PROVIDERS), unit="run", disable=None) as bar:
        for case in cases:
            records += _measure(case, dtype, device, arguments.rounds, bar)
    print(report.table([_row(record) for record in records]))
    print("\n".join(report.skips(records)))
    path = report.save(f"af_dcd_{device}_{dtype}", records, device, arguments.output)
    plot(records, path.with_suffix(".png"))
    print(
        f"\n{json.dumps(report.machine(device))}\nwritten: {path} and {path.with_suffix('.png').name}"
    )
    return 0


def _case(words: list[str]) -> Case:
    part, *sizes = words
    if part not in ("contrast", "loss"):
        raise SystemExit(f'the part must be "contrast" or "loss"; got {part!r}')
    batch, channels, height, width, pool = map(int, sizes)
    return part, batch, channels, height, width, pool


def _measure(case: Case, dtype: str, device: str, rounds: int, bar: Any) -> list[dict[str, Any]]:
    problem = Problem.random(case, report.DTYPES[dtype], device)
    base = dict(zip(COLUMNS, case, strict=True)) | {"dtype": dtype}
    records: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    for name, provider in PROVIDERS.items():
        bar.set_description(f"{case} {name}")
        reason = why_not(name, case, report.DTYPES[dtype], device)
        if reason:
            records.append({**base, "provider": name, "skipped": reason})
            bar.update()
            continue
        runs[name] = functools.partial(provider, problem)
        runs[name]()  # warm up
    times = report.interleaved(runs, rounds, device)
    truth = _truth(problem)
    for name, one_run in runs.items():
        bar.set_description(f"{case} {name}: memory and error")
        command = ["af_dcd", "--measure-memory", name, dtype, *map(str, case)]
        ratios = [p / t for p, t in zip(times.get("plain", []), times[name], strict=False)]
        record = {**base, "provider": name, **report.spread(times[name])}
        record["speedup"] = statistics.median(ratios) if ratios else None
        record["extra_bytes"] = report.extra_memory(one_run, device, command)
        records.append(record | report.errors(one_run(), truth))
        bar.update()
    return records


def _truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by the blocked form: the plain one would not fit."""
    exact = Problem(
        problem.case,
        problem.student.double(),
        problem.teacher.double(),
        copy.deepcopy(problem.loss).double(),
        problem.drop_mask,
    )
    return PROVIDERS["ours: torch"](exact)


def _resident_rise(name: str, dtype: str, case: Case) -> int:
    part, _, channels, _, _, pool = case
    small = Problem.random((part, 1, channels, 16, 16, min(pool, 4)), report.DTYPES[dtype], "cpu")
    PROVIDERS[name](small)  # load what loads once
    problem = Problem.random(case, report.DTYPES[dtype], "cpu")
    return report.resident_rise(lambda: PROVIDERS[name](problem))


def _row(record: dict[str, Any]) -> dict[str, str]:
    row = {column: f"{record[column]}" for column in (*COLUMNS, "provider")}
    speedup = record.get("speedup")
    row["plain / this"] = "-" if speedup is None else f"{speedup:.2f}"
    return row | report.cells(record)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory of each provider, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [record for record in records if "skipped" not in record]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    groups = [list(group) for _, group in itertools.groupby(done, _label)]
    names = list(dict.fromkeys(record["provider"] for record in done))
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        mine = [
            (place + width * (column - (len(names) - 1) / 2), record)
            for place, group in enumerate(groups)
            for record in group
            if record["provider"] == name
        ]
        places = [place for place, _ in mine]
        axes[0].bar(places, [r["seconds"] for _, r in mine], width, label=name)
        memory = [max(r["extra_bytes"], 2**16) / 2**20 for _, r in mine]
        axes[1].bar(places, memory, width, label=name)
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
        f"{record['part']}, pool {record['pool']}\nB {record['B']}, C {record['C']}\n"
        f"{record['H']} x {record['W']}"
    )
