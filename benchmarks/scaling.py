"""How time and extra memory of the contrast grow with N = M, against a model of both.

The model of the time adds the operations over the measured rate of a large matrix product and the
bytes over the measured bandwidth of a copy. It has nothing fitted to the points, and leaves out the
exponentials, all launches and all caches. From it, a second table says what the loss of a whole
cluster's batch would cost with `gather_mode="ring"`: a model, not a measurement.
"""

import argparse
import functools
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pixdistill.ops.row_lse import chunked, launch, why_not_triton

from . import report
from .peer_providers import PROVIDERS, Problem
from .peers import memory_limit

LARGEST = {"cpu": 17, "cuda": 20}  # N = 2^this
FITTED_FROM = 4096
# Passes of the dense form over a matrix of N x M float32: product, scaling (2), log-softmax (2), its
# backward (3), scaling (2), and the reading by the second product.
DENSE_PASSES = 11
RANKS = (2, 8, 64, 512)


@dataclass(frozen=True)
class Machine:
    """What a device does in a second, and the link that leads out of it."""

    operations: float  # of a large matrix product
    bytes: float  # read and written
    link: float  # bytes sent, while as many are received


# Not measured here: H100 SXM by its data sheet and what an 8192^3 product reaches in practice.
ASSUMED_GPU = Machine(operations=790e12, bytes=3.35e12, link=50e9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks scaling`."""
    report.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="start nothing beyond these")
    parser.add_argument("--width", type=int, default=128, metavar="D")
    parser.add_argument("--smallest", type=int, default=10, metavar="e", help="from N = 2^e")
    parser.add_argument("--largest", type=int, metavar="e", help="default: 17 on a CPU, 20 on CUDA")
    parser.add_argument("--memory-limit", type=float, metavar="GiB", help="as in `peers`")
    parser.add_argument(
        "--link",
        type=float,
        default=ASSUMED_GPU.link / 1e9,
        metavar="GB/s",
        help="assumed bandwidth between neighbours of the ring, each way; default: 50",
    )
    parser.add_argument(
        "--rows-per-rank", type=int, default=32768, help="pixels of a rank: 8 maps of 64 x 64"
    )
    parser.add_argument("--measure-memory", nargs=4, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, fit, model, print, save and plot."""
    if arguments.measure_memory:
        print(_resident_rise(*arguments.measure_memory))
        return 0
    device = arguments.device
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    here = measured_machine(device, report.DTYPES[dtype], arguments.link * 1e9)
    records = _measure(arguments, dtype)
    for record in records:
        held = rows_at_once(record["provider"], device)
        record["model_seconds"] = model_seconds(record, here, held)
    print(report.table([_row(record) for record in records]))
    fits = {
        f"{name}: {what}": exponent
        for name in dict.fromkeys(record["provider"] for record in records)
        for what, key in (("time", "seconds"), ("extra memory", "extra_bytes"))
        if (exponent := fitted(records, name, key)) is not None
    }
    for name, exponent in fits.items():
        print(f"{name} grows as N^{exponent:.2f}")
    item = report.DTYPES[dtype].itemsize
    shape = (arguments.rows_per_rank, arguments.width)
    rings = {
        "measured": ring_table(here, *shape, item, rows_at_once(ours_on(device), device)),
        "assumed": ring_table(ASSUMED_GPU, *shape, 2, 2**15),
    }
    for kind, rows in rings.items():
        print(f"\nA MODEL of the ring, from {kind} rates:\n{report.table(ring_rows(rows))}")
    path = report.save(
        f"scaling_{device}_{dtype}",
        records,
        device,
        arguments.output,
        rates={"measured": asdict(here), "assumed": asdict(ASSUMED_GPU)},
        exponents=fits,
        rings=rings,
    )
    plot(records, path.with_suffix(".png"))
    print(f"\n{json.dumps(report.machine(device))}\nwritten: {path} and its plot")
    return 0


def ours_on(device: str) -> str:
    """Our provider that a loss would take there."""
    if device == "cuda" and not why_not_triton(
        torch.empty(1, 64, dtype=torch.bfloat16, device=device)
    ):
        return "ours: triton"
    return "ours: torch"


def _measure(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """Ascending sizes, as far as the minutes and the memory go."""
    from tqdm import tqdm

    device, width = arguments.device, arguments.width
    end = time.perf_counter() + 60 * arguments.minutes
    limit = memory_limit(arguments.memory_limit, device)
    largest = LARGEST[device] if arguments.largest is None else arguments.largest
    exponents = range(arguments.smallest, largest + 1)
    names = [ours_on(device), "plain torch"]
    records: list[dict[str, Any]] = []
    spent = dict.fromkeys(names, 0.0)
    with tqdm(total=len(exponents) * len(names), unit="run", disable=None) as bar:
        for name, exponent in ((name, e) for e in exponents for name in names):
            size = 2**exponent
            bar.set_description(f"N = M = {size} {name}")
            bar.update()
            fits = PROVIDERS[name].holds(size, size) <= limit
            left = end - time.perf_counter()
            # four times the pairs, in a warm-up, a timed run and one for the memory
            if not fits or 3 * 4 * spent[name] > max(0.0, left):
                spent[name] = math.inf
                continue
            problem = Problem.random(size, size, width, report.DTYPES[dtype], device)
            one_run = functools.partial(PROVIDERS[name], problem)
            warm_up = report.seconds(one_run, device)
            rounds = max(1, min(arguments.rounds, int(left / 10 / max(warm_up, 1e-4))))
            times = report.interleaved({name: one_run}, rounds, device)[name]
            spent[name] = statistics.median(times)
            command = ["scaling", "--measure-memory", name, str(size), str(width), dtype]
            records.append(
                {"N": size, "M": size, "D": width, "dtype": dtype, "provider": name}
                | {"runs": rounds, **report.spread(times)}
                | {"extra_bytes": report.extra_memory(one_run, device, command)}
            )
    return records


def measured_machine(device: str, dtype: torch.dtype, link: float) -> Machine:
    """The rate of a large square product in this dtype and of a large copy; the best of some runs."""
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.zeros_like(source)
    runs = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    times = report.interleaved(runs, 8, device)
    moved = 2 * source.numel() * source.element_size()
    return Machine(2 * side**3 / min(times["product"]), moved / min(times["copy"]), link)


def rows_at_once(name: str, device: str) -> int:
    """Queries that share one reading of the keys: a block of the chunked form, a wave of programs."""
    if name == "ours: triton":
        tile = launch.LAUNCH_TABLE["sm_90"][128].BN
        return tile * torch.cuda.get_device_properties(0).multi_processor_count
    return (chunked._CUDA_BLOCK if device == "cuda" else chunked._CPU_BLOCK)[0]


def model_seconds(record: dict[str, Any], machine: Machine, held: int) -> float:
    """Operations over the rate of a product, plus bytes over the bandwidth."""
    rows, columns, width = record["N"], record["M"], record["D"]
    item = report.DTYPES[record["dtype"]].itemsize
    if record["provider"].startswith("ours"):
        moved = streamed_bytes(rows, columns, width, item, held) + 2 * item * rows * width
    else:
        moved = DENSE_PASSES * 4 * rows * columns
    return 4 * rows * columns * width / machine.operations + moved / machine.bytes


def streamed_bytes(rows: int, columns: int, width: int, item: int, held: int) -> int:
    """Of the pass: keys once for every `held` queries, query in, expected key out.

    Backward reads the expected key and writes the gradient.
    """
    return item * width * (-(-rows // held) * columns + 2 * rows)


def fitted(records: list[dict[str, Any]], name: str, key: str) -> float | None:
    """The slope of log(key) over log(N), by least squares over N >= 4096, or None for lack of points."""
    points = [
        (math.log(record["N"]), math.log(record[key]))
        for record in records
        if record["provider"] == name and record["N"] >= FITTED_FROM and record[key] > 0
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def ring_table(
    machine: Machine, rows: int, width: int, item: int, held: int
) -> list[dict[str, float]]:
    """The loss of W ranks with `rows` pixels each, forward and backward, as `ring_blocks` does it.

    A rank meets W blocks of keys. W - 1 of them come from its neighbour, each while the block before is
    used, so an exchange costs time only where it takes longer than the block. Each block's mean of keys
    is joined to the running one: three readings and two writings of N x D float32. Backward sends
    nothing. The few integers about sizes that ranks exchange are left out.
    """
    block_bytes = item * width * rows
    moved = streamed_bytes(rows, rows, width, item, held) + 5 * 4 * rows * width
    block = 4 * rows * rows * width / machine.operations + moved / machine.bytes
    backward = 2 * block_bytes / machine.bytes
    exchange = block_bytes / machine.link
    return [
        {
            "ranks": ranks,
            "pixels": ranks * rows,
            "seconds": (ranks - 1) * max(block, exchange) + block + backward,
            "waiting": (ranks - 1) * max(0.0, exchange - block),
            "sent_bytes": (ranks - 1) * block_bytes,
            "ring_bytes": 2 * block_bytes,
            "all_bytes": ranks * block_bytes,
            "dense_bytes": 4 * rows * ranks * rows,
        }
        for ranks in RANKS
    ]


def ring_rows(rows: list[dict[str, float]]) -> list[dict[str, str]]:
    """The table of the ring in words."""
    return [
        {
            "ranks": f"{row['ranks']}",
            "pixels in all": f"{row['pixels']}",
            "seconds a step, at least": _short(row["seconds"]),
            "of it waiting for the link": _short(row["waiting"]),
            "sent by a rank, MiB": f"{row['sent_bytes'] / 2**20:.0f}",
            "keys held, ring, MiB": f"{row['ring_bytes'] / 2**20:.0f}",
            "keys held, all at once, MiB": f"{row['all_bytes'] / 2**20:.0f}",
            "one matrix of logits, GiB": _short(row["dense_bytes"] / 2**30),
        }
        for row in rows
    ]


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _resident_rise(name: str, size: str, width: str, dtype: str) -> int:
    provider = PROVIDERS[name]
    random = functools.partial(
        Problem.random, width=int(width), dtype=report.DTYPES[dtype], device="cpu"
    )
    provider(random(64, 64))  # load what is loaded once
    problem = random(int(size), int(size))
    return report.resident_rise(lambda: provider(problem))


def _row(record: dict[str, Any]) -> dict[str, str]:
    values = report.cells(record | {"loss_error": None, "grad_error": None})
    return {
        "N = M": str(record["N"]),
        "D": str(record["D"]),
        "provider": record["provider"],
        "seconds": values["seconds"],
        "spread": values["spread"],
        "model": f"{record['model_seconds']:.3g}",
        "measured / model": f"{record['seconds'] / record['model_seconds']:.2f}",
        "extra MiB": values["extra MiB"],
    }


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Measured points and the model's line; extra memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, name in enumerate(dict.fromkeys(record["provider"] for record in records)):
        mine = [record for record in records if record["provider"] == name]
        sizes, style = [record["N"] for record in mine], {"color": f"C{number}"}
        axes[0].plot(sizes, [r["seconds"] for r in mine], "o", label=name, **style)
        model = [r["model_seconds"] for r in mine]
        axes[0].plot(sizes, model, "--", linewidth=1.2, label=f"{name}, model", **style)
        memory = [max(r["extra_bytes"], 2**16) / 2**20 for r in mine]
        axes[1].plot(sizes, memory, "o-", label=name, **style)
    titles = ("time, forward + backward (s)", "extra peak memory (MiB)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", title=title)
        axis.set_xlabel(f"N = M, D = {records[0]['D']}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
