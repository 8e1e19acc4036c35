"""Time, extra peak memory and error of `row_lse`, forward plus backward, beside its rivals.

All providers compute the gradient of `logsumexp(scale * query @ keys.T, dim=1).mean()` with respect to
the query, on the same unit vectors. Times are interleaved in one process; on a CPU, memory is the
rise of the resident peak in a fresh process of its own, on CUDA the allocator's peak.
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill.ops.row_lse import row_lse, why_not_triton

from . import report

SIZES = {
    "cpu": [(1024, 1024, 128), (2048, 2048, 128), (4096, 4096, 128), (8192, 8192, 128),
            (8192, 8192, 256), (6272, 65536, 256)],
    "cuda": [(6272, 6272, 128), (6272, 65536, 256), (16384, 16384, 64), (16384, 16384, 128),
             (16384, 16384, 256), (65536, 65536, 64), (65536, 65536, 128), (65536, 65536, 256),
             (65536, 65536, 512)],
}  # fmt: skip
TEMPERATURE = 0.2


@dataclass(frozen=True)
class Problem:
    """Unit vectors, without gradient: each run asks for its own."""

    query: Tensor
    keys: Tensor
    scale: float = 1 / TEMPERATURE

    @classmethod
    def random(
        cls, rows: int, columns: int, width: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        """Random data, from a fixed seed: zeros would run faster than anything real."""
        generator = torch.Generator(device).manual_seed(rows + columns + width)
        query, keys = (
            F.normalize(torch.randn(n, width, device=device, generator=generator), dim=1).to(dtype)
            for n in (rows, columns)
        )
        return cls(query, keys)


Provider = Callable[[Problem], tuple[Tensor, Tensor]]
"""Loss and gradient of the query."""


def _differentiate(problem: Problem, lse_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    query = problem.query.detach().requires_grad_()
    loss = lse_of(query).mean()
    return loss.detach(), torch.autograd.grad(loss, query)[0]


def plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch: logits of N x M, their softmax, and its gradient."""
    return _differentiate(
        problem, lambda q: (problem.scale * (q @ problem.keys.T)).logsumexp(dim=1)
    )


def torch_chunked(problem: Problem) -> tuple[Tensor, Tensor]:
    """torch's chunked linear cross-entropy; the target's logit, a dot product, is added back."""
    options = torch.nn.LinearCrossEntropyOptions()
    target = torch.zeros(problem.query.shape[0], dtype=torch.int64, device=problem.query.device)

    def lse_of(query: Tensor) -> Tensor:
        scaled = query * problem.scale
        loss = F.linear_cross_entropy(scaled, problem.keys, target, options=options)
        return loss + (scaled @ problem.keys[0]).mean()

    return _differentiate(problem, lse_of)


def two_products(problem: Problem) -> tuple[Tensor, Tensor]:
    """The floor: the two matrix products alone, into buffers that already exist.

    Its values are not the task's, and its memory is that of the product N x M.
    """
    query, keys = problem.query, problem.keys
    logits, grad = _buffers(*query.shape, keys.shape[0], query.dtype, query.device)
    torch.mm(query, keys.T, out=logits)
    torch.mm(logits, keys, out=grad)
    return logits[0, 0], grad


@functools.lru_cache(maxsize=1)
def _buffers(
    rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    logits = torch.empty(rows, columns, dtype=dtype, device=device)
    return logits, torch.empty(rows, width, dtype=dtype, device=device)


def fused_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Flash attention with V = K, whose output is the expected key: the honest bar on a GPU."""
    query, keys = (x[None, None] for x in (problem.query, problem.keys))
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, keys, scale=problem.scale
    )
    return lse.mean(), output[0, 0] * (problem.scale / problem.query.shape[0])


def ours(backend: str) -> Provider:
    """`row_lse` on one backend, told that the vectors are of unit length."""

    def provider(problem: Problem) -> tuple[Tensor, Tensor]:
        return _differentiate(
            problem,
            lambda q: row_lse(
                q, problem.keys, problem.scale, logit_bound=problem.scale, backend=backend
            ),
        )

    return provider


PROVIDERS: dict[str, Provider] = {
    "plain torch": plain,
    "torch chunked": torch_chunked,
    "two products": two_products,
    "flash attention": fused_attention,
    "ours: reference": ours("reference"),
    "ours: torch": ours("torch"),
    "ours: triton": ours("triton"),
}


def why_not(name: str, device: str, dtype: torch.dtype, width: int) -> str | None:
    """Why a provider sits this problem out, or None."""
    if name == "torch chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "this torch has no F.linear_cross_entropy(options=...)"
    if name == "flash attention" and (device != "cuda" or dtype == torch.float32 or width > 256):
        return "half precision on CUDA, width up to 256 only"
    if name == "ours: triton":
        return why_not_triton(torch.empty(1, width, dtype=dtype, device=device))
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks row_lse`."""
    report.add_arguments(parser)
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("N", "M", "D"))
    parser.add_argument("--measure-memory", nargs=5, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure every size with every provider, print, save and plot."""
    if arguments.measure_memory:
        print(json.dumps(_resident_rise(*arguments.measure_memory)))
        return 0
    from tqdm import tqdm

    device = arguments.device
    name = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    sizes = [tuple(size) for size in arguments.size or SIZES[device]]
    records: list[dict[str, Any]] = []
    with tqdm(total=len(sizes) * len(PROVIDERS), unit="run", disable=None) as bar:
        for size in sizes:
            records += _measure(size, name, device, arguments.rounds, bar)
    print(report.table([_row(record) for record in records]))
    print("\n".join(report.skips(records)))
    stem = f"row_lse_{device}_{name}"
    path = report.save(stem, records, device, arguments.output)
    plot(records, path.with_suffix(".png"))
    print(
        f"\n{json.dumps(report.machine(device))}\nwritten: {path} and {path.with_suffix('.png').name}"
    )
    return 0


def _measure(
    size: tuple[int, ...], dtype: str, device: str, rounds: int, bar: Any
) -> list[dict[str, Any]]:
    rows, columns, width = size
    base = {"N": rows, "M": columns, "D": width, "dtype": dtype}
    problem = Problem.random(rows, columns, width, report.DTYPES[dtype], device)
    records, running = [], {}
    for name, provider in PROVIDERS.items():
        bar.set_description(f"{rows} x {columns} x {width} {name}")
        reason = why_not(name, device, report.DTYPES[dtype], width) or _too_large(
            name, size, device
        )
        if reason:
            records.append({**base, "provider": name, "skipped": reason})
            bar.update()
            continue
        running[name] = provider
        provider(problem)  # warm up
    runs = {name: functools.partial(provider, problem) for name, provider in running.items()}
    times = report.interleaved(runs, rounds, device)
    truth = _truth(problem)
    for name, one_run in runs.items():
        bar.set_description(f"{rows} x {columns} x {width} {name}: memory and error")
        command = ["row_lse", "--measure-memory", name, *map(str, size), dtype]
        record = {**base, "provider": name, **report.spread(times[name])}
        record["extra_bytes"] = report.extra_memory(one_run, device, command)
        records.append(record | report.errors(one_run(), None if name == "two products" else truth))
        bar.update()
    return records


def _too_large(name: str, size: tuple[int, ...], device: str) -> str | None:
    """Keep the dense forms off sizes whose three N x M matrices would not fit."""
    dense = {"plain torch": 3, "ours: reference": 5, "two products": 1}.get(name, 0)
    limit = 8 * 2**30 if device == "cpu" else torch.cuda.get_device_properties(0).total_memory * 0.8
    need = dense * size[0] * size[1] * 4
    return f"would hold {need / 2**30:.0f} GiB of logits" if need > limit else None


def _truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, a block of rows at a time."""
    keys, grads = problem.keys.double(), []
    total = keys.new_zeros(())
    for rows in problem.query.double().split(1024):
        logits = problem.scale * (rows @ keys.T)
        total = total + logits.logsumexp(dim=1).sum()
        grads.append(problem.scale * (logits.softmax(dim=1) @ keys))
    count = problem.query.shape[0]
    return total / count, torch.cat(grads) / count


def _resident_rise(name: str, rows: str, columns: str, width: str, dtype: str) -> int:
    provider = PROVIDERS[name]
    random = functools.partial(Problem.random, width=int(width), dtype=report.DTYPES[dtype])
    provider(random(64, 64, device="cpu"))  # load what is loaded once
    problem = random(int(rows), int(columns), device="cpu")
    return report.resident_rise(lambda: provider(problem))


def _row(record: dict[str, Any]) -> dict[str, str]:
    row = {"N": f"{record['N']}", "M": f"{record['M']}", "D": f"{record['D']}"}
    row |= {"provider": record["provider"], "TFLOP/s": report.tflops(record)}
    return row | report.cells(record)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory against N * M, a line a provider, widths as markers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [record for record in records if "skipped" not in record]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    widths = sorted({record["D"] for record in done})
    for column, name in enumerate(PROVIDERS):
        for width, marker in zip(widths, "os^Dv*", strict=False):
            mine = [r for r in done if r["provider"] == name and r["D"] == width]
            mine.sort(key=lambda r: r["N"] * r["M"])
            if not mine:
                continue
            style: dict[str, Any] = {"marker": marker, "color": f"C{column}", "linewidth": 1.3}
            style["label"] = f"{name}, D {width}"
            pairs = [r["N"] * r["M"] for r in mine]
            axes[0].plot(pairs, [r["seconds"] for r in mine], **style)
            axes[1].plot(pairs, [max(r["extra_bytes"], 2**16) / 2**20 for r in mine], **style)
    titles = ("time, forward + backward (s)", "extra peak memory (MiB)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="pairs N x M", title=title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
