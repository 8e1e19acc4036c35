"""The contrast by every library that can compute it: time, extra peak memory and error, side by side.

All providers get the same tensors and compute the loss of `benchmarks/peer_providers.py` and its
gradient with respect to the query; keys are frozen. Times are interleaved in one process, 4 N M D
operations are counted for everyone, errors are relative, against float64. On a CPU, memory is the
rise of the resident peak in a fresh process of the provider's own, on CUDA the allocator's peak.
"""

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report
from .peer_providers import PROVIDERS, Problem, truth, what_failed, why_not

Size = tuple[int, int, int]
PCD: Size = (
    6272,
    65536,
    256,
)  # 128 maps of 7 x 7 pixels, an eighth of its batch, against its queue
SIZES: dict[str, list[Size]] = {
    "cpu": [*((n, n, 128) for n in (256, 512, 1024, 2048, 4096, 8192)), PCD],
    "cuda": [
        *((n, n, 128) for n in (512, 1024, 4096, 16384, 65536, 262144)),
        *((16384, 16384, width) for width in (64, 256, 512, 2048, 8192)),
        PCD,
        (6272, 65536, 128),
        (12544, 262144, 128),
    ],
}
PACKAGES = sorted({p.package for p in PROVIDERS.values() if p.package})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks peers`."""
    report.add_arguments(parser)
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("N", "M", "D"))
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="default: all")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GiB",
        help="leave out what would hold more; default: 10 on a CPU, 80 %% of the GPU's memory",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=6.0,
        help="seconds for the timed runs of a provider at a size; two runs are made in any case",
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=45.0,
        metavar="SECONDS",
        help="leave out what would take longer a run, by its pace at the sizes before; default: 45",
    )
    parser.add_argument("--measure-memory", nargs="+", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure every size with every provider, print, save and plot."""
    # A pool of compiler processes would live on beside the timed runs.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if arguments.measure_memory:
        name, dtype, *words = arguments.measure_memory
        sizes = [_size(words[i : i + 3]) for i in range(0, len(words), 3)]
        print(*(_resident_rise(name, dtype, size) for size in sizes))
        return 0
    from tqdm import tqdm

    device = arguments.device
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    sizes = [_size(size) for size in arguments.size or SIZES[device]]
    names = arguments.provider or list(PROVIDERS)
    limit = memory_limit(arguments.memory_limit, device)
    records: list[dict[str, Any]] = []
    with tqdm(total=(len(sizes) + 1) * len(names), unit="run", disable=None) as bar:
        paces: dict[str, float] = {}
        for size in sizes:
            records += _measure(size, names, dtype, limit, arguments, paces, bar)
        if device == "cpu":
            _measure_memory(records, names, dtype, bar)
    print(report.table([_row(record) for record in records]))
    print("\n".join(report.skips(records)))
    stem = f"peers_{device}_{dtype}"
    more = {
        "packages": {name: report.version(name) for name in PACKAGES},
        "memory_limit_gib": limit / 2**30,
    }
    path = report.save(stem, records, device, arguments.output, **more)
    plot(records, path.with_suffix(".png"))
    plot_bars(records, path.with_name(f"{stem}_pcd.png"))
    print(f"\n{json.dumps(report.machine(device))}\nwritten: {path} and its plots")
    return 0


def _size(numbers: Sequence[str | int]) -> Size:
    rows, columns, width = map(int, numbers)
    return rows, columns, width


def memory_limit(gib: float | None, device: str) -> float:
    """Bytes that a provider may hold."""
    if gib is not None:
        return gib * 2**30
    if device == "cpu":
        return 10 * 2**30
    return 0.8 * torch.cuda.get_device_properties(0).total_memory


def _measure(
    size: Size,
    names: list[str],
    dtype: str,
    limit: float,
    arguments: argparse.Namespace,
    paces: dict[str, float],
    bar: Any,
) -> list[dict[str, Any]]:
    """Records of one size; `paces` keeps the seconds of a run over N M D."""
    device = arguments.device
    base: dict[str, Any] = dict(zip("NMD", size, strict=True)) | {"dtype": dtype}
    torch.compiler.reset()  # each size is compiled for itself
    small = _small(size[2], report.DTYPES[dtype], device)
    problem = Problem.random(*size, report.DTYPES[dtype], device)
    records: list[dict[str, Any]] = []
    results = {}
    for name in names:
        bar.set_description(f"{size} {name}: warm up")
        reason = why_not(name, small, device, limit, size)
        reason = reason or _too_slow(name, size, paces, arguments.longest)
        if reason is None:
            try:
                results[name] = PROVIDERS[name](problem)
            except Exception as error:
                if name.startswith("ours"):
                    raise
                reason = what_failed(error)
        if reason is not None:
            records.append({**base, "provider": name, "skipped": reason})
        bar.update()
    runs = {name: functools.partial(PROVIDERS[name], problem) for name in results}
    bar.set_description(f"{size}: {arguments.rounds} rounds")
    times = report.interleaved(runs, arguments.rounds, device, arguments.patience)
    paces |= {name: statistics.median(taken) / math.prod(size) for name, taken in times.items()}
    truths = {beside: truth(problem, beside=beside) for beside in {_beside(n) for n in results}}
    for name, result in results.items():
        record = {**base, "provider": name, "runs": len(times[name]), **report.spread(times[name])}
        record["extra_bytes"] = (
            report.extra_memory(runs[name], device, []) if device == "cuda" else 0
        )
        records.append(record | report.errors(result, truths[_beside(name)]))
    return sorted(records, key=lambda record: names.index(record["provider"]))


def _too_slow(name: str, size: Size, paces: dict[str, float], longest: float) -> str | None:
    seconds = paces.get(name, 0.0) * math.prod(size)
    if seconds <= longest:
        return None
    return f"would take about {seconds:.0f} s a run, above the limit of {longest:.0f} s"


def _beside(name: str) -> bool:
    return PROVIDERS[name].beside


@functools.lru_cache(maxsize=8)
def _small(width: int, dtype: torch.dtype, device: str) -> Problem:
    return Problem.random(64, 96, width, dtype, device)


def _measure_memory(records: list[dict[str, Any]], names: list[str], dtype: str, bar: Any) -> None:
    """Fill in the extra memory, from one fresh process a provider."""
    for name in names:
        bar.set_description(f"{name}: memory")
        mine = [r for r in records if r["provider"] == name and "skipped" not in r]
        if mine:
            sizes = [str(record[axis]) for record in mine for axis in "NMD"]
            rises = report.fresh_process(["peers", "--measure-memory", name, dtype, *sizes])
            for record, rise in zip(mine, rises, strict=True):
                record["extra_bytes"] = rise
        bar.update()


def _resident_rise(name: str, dtype: str, size: Size) -> int:
    provider = PROVIDERS[name]
    provider(_small(size[2], report.DTYPES[dtype], "cpu"))  # load what is loaded once
    problem = Problem.random(*size, report.DTYPES[dtype], "cpu")
    if "compiled" in name:
        provider(problem)
    return report.resident_rise(lambda: provider(problem))


def _row(record: dict[str, Any]) -> dict[str, str]:
    row = {axis: str(record[axis]) for axis in "NMD"} | {"provider": record["provider"]}
    return row | {"TFLOP/s": report.tflops(record)} | report.cells(record)


def colour(name: str) -> Any:
    """The same for a provider in every plot; ours stand out."""
    import matplotlib

    if name.startswith("ours"):
        return "black" if name == "ours: torch" else "dimgrey"
    return matplotlib.colormaps["tab20"](list(PROVIDERS).index(name))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory against N, where M = N, at the width that has most sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [r for r in records if "skipped" not in r and r["N"] == r["M"]]
    widths = [r["D"] for r in done]
    width = max(widths, key=widths.count, default=0)
    ticks = sorted({r["N"] for r in done if r["D"] == width})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, name in enumerate(PROVIDERS):
        mine = sorted(
            (r for r in done if r["provider"] == name and r["D"] == width), key=lambda r: r["N"]
        )
        style: dict[str, Any] = {"marker": "os^Dv*"[number % 6], "color": colour(name)}
        style |= {"linewidth": 2.4 if name.startswith("ours") else 1.1, "markersize": 4}
        if mine:
            sizes = [r["N"] for r in mine]
            axes[0].plot(sizes, [r["seconds"] for r in mine], label=name, **style)
            memory = [max(r["extra_bytes"], 2**16) / 2**20 for r in mine]
            axes[1].plot(sizes, memory, label=name, **style)
    titles = ("time, forward + backward (s)", "extra peak memory (MiB)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=f"N = M, D = {width}", title=title)
        axis.set_xticks(ticks, labels=[str(size) for size in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    if done:
        axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_bars(records: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory of each provider with PCD's rows and keys, or else at the last size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [r for r in records if "skipped" not in r]
    sizes = [tuple(r[axis] for axis in "NMD") for r in done]
    size = PCD if PCD in sizes else max(sizes, default=PCD)
    mine = [r for r, its in zip(done, sizes, strict=True) if its == size]
    mine.sort(key=lambda r: r["seconds"], reverse=True)
    names = [r["provider"] for r in mine]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.35 * max(4, len(mine))), sharey=True)
    figure.set_layout_engine("constrained")
    values = ([r["seconds"] for r in mine], [max(r["extra_bytes"], 2**16) / 2**20 for r in mine])
    titles = ("time, forward + backward (s)", "extra peak memory (MiB, logarithmic)")
    for axis, numbers, title in zip(axes, values, titles, strict=True):
        bars = axis.barh(names, numbers, color=[colour(name) for name in names])
        labels = [f"{n:.3g}" if n < 1000 else f"{n:.0f}" for n in numbers]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set(title=title)
        axis.margins(x=0.15)
        axis.grid(axis="x", alpha=0.3)
    axes[1].set_xscale("log")
    figure.suptitle("N = {}, M = {}, D = {}".format(*size), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
