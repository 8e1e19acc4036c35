"""Write docs/benchmarks.md from the committed results, every figure and every comparison on it.

A result that is missing leaves a line with the command that makes it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import report
from .peer_providers import PROVIDERS
from .peers import PCD
from .scaling import FITTED_FROM, ring_rows

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Records = list[dict[str, Any]]

# Why a peer can be faster; true whatever the figures are. They stand only beside figures that show it.
REASONS = {
    "plain torch": "two large products and no loop over blocks: less to start where the logits are few",
    "plain torch, autocast": "no loop over blocks, and products in bfloat16; see its error",
    "plain torch, compiled": "two large products, the passes between them fused into few",
    "checkpointed chunks": "large products over chunks of rows, nothing else to start",
    "attention, CPU flash": "one compiled loop holds both products of a block and its exponentials, and "
    "splits the queries among the cores; `row_lse` is a loop in Python over the same products",
    "attention, flash": "a kernel written by hand for the instructions of each GPU generation",
    "attention, cuDNN": "a kernel written by hand for the instructions of each GPU generation",
    "torch linear_cross_entropy": "large products over chunks, with the gradient made in forward",
    "inf-cl": "products in TF32",
    "cut-cross-entropy": "it skips blocks of small probability in backward; see its error",
    "cut-cross-entropy, exact": "a forward pass without the second product, which it makes in backward",
    "cut-cross-entropy, compiled": "two large products, the passes between them fused into few",
    "liger-kernel": "large products over chunks of rows, with the gradient made in forward",
    "pytorch-metric-learning": "a handful of large operations where there are few pairs",
    "lightly": "two large products and no loop over blocks: less to start where the logits are few",
}

HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks page` from benchmarks/results; edit that, not this. -->

All figures on this page come from the files in `benchmarks/results`, made on the machines named below.
`pip install -e ".[bench,peers]"` in a checkout brings what the commands need. Times are medians, forward
plus backward, of runs that take turns in one process (for the growth with $N$, one provider after
another). Long runs are repeated less often: where the number differs, a column says it. Extra memory is
the peak minus what was there before: on a CPU the rise of the resident set in a process of its own, with
an allocator that keeps nothing of what is freed; on CUDA the allocator's peak. Errors are relative,
against float64.
"""

PEERS = """
All compute the same loss and its gradient with respect to the query, from the same random tensors.
The keys are frozen unit vectors, and key $i$ is the positive of query $i$:

```text
loss = F.cross_entropy(scale * F.normalize(query, dim=1) @ keys.T, torch.arange(N))
```

So normalising the queries is part of every figure; `row_lse` by itself stands
[below](#each-operator-by-itself). `TFLOP/s` counts $4NMD$ operations for everyone, whatever they do. The
command tries every provider, and gives what it said where it does not run. What is particular about
each:
"""

SCALING = """
The model adds $4NMD$ operations over the measured rate of a large square product, and the bytes moved
over the measured bandwidth of a copy. Nothing in it is fitted to the points. It leaves out exponentials
and launches, and takes every byte from memory, as if the small sizes were not in a cache. "Measured /
model" is the time over that.
"""

RING = """
### What a whole cluster's batch would cost: a model

These tables are **a model, not a measurement**, and one that has no exponentials, so that it bounds the
time from below: the loss of {rows} pixels on each rank against those of all ranks, with
`gather_mode="ring"` ([how](pixel_contrast.md#all-at-once-or-around-a-ring)), forward and backward. A
rank sends its block of keys $W - 1$ times, each while a block is used; backward sends nothing. The
bandwidth to the neighbours is an assumption: {link:.0f} GB/s each way (`--link`). For comparison: the
memory that the keys of all ranks take with `gather_mode="all"`, and one float32 matrix of a rank's
logits, of which plain code holds several.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks page`."""
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder of the results"
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="the page")


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    arguments.output.write_text(render(arguments.results))
    print(f"written: {arguments.output}")
    return 0


def render(results: Path) -> str:
    """The whole page."""
    parts = [HEAD, "\n## Peers side by side\n", PEERS, *_notes()]
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        parts += _section(results, f"peers_{device}_{dtype}", f"peers --device {device}", _peers)
    parts.append("\n## How the cost grows\n" + SCALING)
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        name = f"scaling_{device}_{dtype}"
        parts += _section(results, name, f"scaling --device {device}", _scaling)
    parts.append("\n## Each operator by itself\n")
    for name, command, body in (
        ("row_lse", "row_lse", _row_lse),
        ("maskd", "maskd", _maskd),
        ("af_dcd", "af_dcd", _af_dcd),
    ):
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
            file = f"{name}_{device}_{dtype}"
            parts += _section(results, file, f"{command} --device {device}", body)
    parts += _section(results, "kernels", "kernels", _kernels)
    return "".join(parts)


def _section(results: Path, name: str, command: str, body: Any) -> Iterator[str]:
    """A heading, the machine and the command, and what `body` makes of the file, if it is there."""
    path = results / f"{name}.json"
    if not path.exists():
        yield f"\nNo result yet in `benchmarks/results/{name}.json`;\n"
        yield f"`python -m benchmarks {command}` makes it.\n"
        return
    content = json.loads(path.read_text())
    yield f"\n### `python -m benchmarks {command}`\n\n{_machine(content['machine'])}\n"
    yield from body(content, results, name)


def _machine(facts: dict[str, Any]) -> str:
    device = f"{facts['gpu']}, {facts['gpu_memory_gib']} GiB" if "gpu" in facts else ""
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != 1 else "")
    host = f"{facts['processor']}, {threads}"
    packages = ("pixdistill", "torch", "triton", "python")
    versions = ", ".join(f"{key} {facts[key]}" for key in packages)
    return f"On {device + ' in ' if device else ''}{host}; {versions}."


def _notes() -> Iterator[str]:
    yield "\n| provider | |\n| --- | --- |\n"
    for name, provider in PROVIDERS.items():
        yield f"| {name} | {provider.note} |\n"


def _table(rows: list[dict[str, str]]) -> str:
    return "\n" + report.table(rows) + "\n" if rows else ""


def _picture(results: Path, name: str, words: str) -> str:
    if not (results / f"{name}.png").exists():
        return ""
    return f"\n![{words}](../benchmarks/results/{name}.png)\n"


def _done(records: Records) -> Records:
    return [record for record in records if "skipped" not in record]


def _size(record: dict[str, Any]) -> tuple[int, int, int]:
    return record["N"], record["M"], record["D"]


def _named(size: tuple[int, ...]) -> str:
    return "{} x {}, D {}".format(*size)


def _peers(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    records = content["records"]
    packages = ", ".join(f"{key} {version}" for key, version in content["packages"].items())
    yield f"\nPeers: {packages}. Nobody may hold more than {content['memory_limit_gib']:.0f} GiB.\n"
    done = _done(records)
    sizes = sorted({_size(record) for record in done}, key=lambda s: (s[0] * s[1] * s[2], s))
    at_pcd = [size for size in sizes if size == PCD]
    squares = [size for size in sizes if size[0] == size[1]]
    for size in (squares[-1:] if squares else []) + at_pcd:
        own = (
            ", PCD's setting: the 7 x 7 pixels of 128 images, an eighth of its batch, against its queue"
            if size == PCD
            else ""
        )
        yield f"\n{_named(size)}{own}:\n"
        mine = sorted((r for r in done if _size(r) == size), key=lambda r: r["seconds"])
        yield _table([_peer_row(record) for record in mine])
    yield _picture(results, f"{name}_pcd", "Time and extra memory in PCD's setting")
    yield _picture(results, name, "Time and extra memory against N")
    yield f"\nAll sizes are in `benchmarks/results/{name}.json`.\n"
    yield "\n**Where a peer is faster, and why.** "
    yield from _faster(done, sizes)
    yield from _left_out(records)


def _peer_row(record: dict[str, Any]) -> dict[str, str]:
    row = {"provider": record["provider"], "TFLOP/s": report.tflops(record)}
    return row | report.cells(record) | _runs(record)


def _runs(record: dict[str, Any]) -> dict[str, str]:
    return {"runs": str(record["runs"])} if "runs" in record else {}


def _ours(records: Records, size: tuple[int, ...]) -> dict[str, Any] | None:
    """The fastest of ours at a size."""
    mine = [r for r in records if _size(r) == size and r["provider"].startswith("ours")]
    return min(mine, key=lambda record: record["seconds"], default=None)


class Win(NamedTuple):
    """A size at which a peer is faster."""

    size: tuple[int, int, int]
    share: float  # of our median time
    overlap: bool  # of its runs and ours


def faster_peers(done: Records, sizes: list[tuple[int, int, int]]) -> dict[str, list[Win]]:
    """By peer, the sizes at which its median is below ours."""
    found: dict[str, list[Win]] = {}
    for size in sizes:
        ours = _ours(done, size)
        for record in done:
            if ours is None or _size(record) != size or record["provider"].startswith("ours"):
                continue
            share = record["seconds"] / ours["seconds"]
            if share < 1:
                overlap = record["slowest"] >= ours["fastest"]
                found.setdefault(record["provider"], []).append(Win(size, share, overlap))
    return found


def _faster(done: Records, sizes: list[tuple[int, int, int]]) -> Iterator[str]:
    found = faster_peers(done, sizes)
    if not found:
        yield "At no size measured here: no peer's median is below ours.\n"
    else:
        yield "By the medians, in shares of ours; ~ where slowest and fastest runs overlap:\n\n"
    for name, wins in found.items():
        places = "; ".join(
            f"{'~' * win.overlap}{win.share:.2f} at {_named(win.size)}" for win in wins
        )
        yield f"- {name}: {places}. Reason: {REASONS[name]}.\n"
    leaner: dict[str, list[str]] = {}
    for size in sizes:
        ours = _ours(done, size)
        for record in done:
            if ours and _size(record) == size and record["extra_bytes"] < ours["extra_bytes"]:
                share = record["extra_bytes"] / ours["extra_bytes"]
                leaner.setdefault(record["provider"], []).append(f"{share:.2f} at {_named(size)}")
    if leaner:
        yield "\n**Where a peer needs less extra memory**, in shares of ours:\n\n"
    else:
        yield "\nNone needs less extra memory than ours at any size.\n"
    for name, places_of in leaner.items():
        yield f"- {name}: {'; '.join(places_of)}.\n"


def _left_out(records: Records) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "skipped" in record:
            key = record["provider"], record["skipped"]
            reasons.setdefault(key, []).append(_named(_size(record)))
    if reasons:
        yield "\nLeft out:\n\n"
    sizes = len({_size(record) for record in records})
    for (name, reason), where in reasons.items():
        places = "" if len(where) == sizes else f" at {'; '.join(where)}"
        yield f"- {name}{places}: `{reason}`\n"


def _scaling(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    rates = content["rates"]
    here = rates["measured"]
    yield (
        f"\nMeasured in the same run: {here['operations'] / 1e9:.0f} GFLOP/s of a product, "
        f"{here['bytes'] / 1e9:.1f} GB/s of a copy.\n"
    )
    yield _table([_scaling_row(record) for record in content["records"]])
    yield _picture(results, name, "Measured time, the model, and extra memory, against N")
    if content["exponents"]:
        yield f"\nFitted over N of {FITTED_FROM} and more (least squares of the logarithms):\n\n"
    for what, exponent in content["exponents"].items():
        yield f"- {what} grows as $N^{{{exponent:.2f}}}$\n"
    rings = content["rings"]
    first = rings["measured"][0]
    yield RING.format(rows=first["pixels"] // first["ranks"], link=here["link"] / 1e9)
    ratios = [
        record["seconds"] / record["model_seconds"]
        for record in content["records"]
        if record["provider"].startswith("ours") and record["N"] >= FITTED_FROM
    ]
    yield "\nRanks as fast as the machine measured here"
    if ratios:
        yield f" (where it ran, it took {min(ratios):.2f} to {max(ratios):.2f} times the model's time)"
    yield ":\n"
    yield _table(ring_rows(rings["measured"]))
    assumed = rates["assumed"]
    yield (
        f"\nGPUs assumed to make {assumed['operations'] / 1e12:.0f} TFLOP/s of products in bfloat16, "
        f"to move {assumed['bytes'] / 1e12:.2f} TB/s,\nand to send "
        f"{assumed['link'] / 1e9:.0f} GB/s to a neighbour. "
        "Published figures of an H100, which no kernel reaches all the time; nothing of it was measured "
        "here:\n"
    )
    yield _table(ring_rows(rings["assumed"]))


def _scaling_row(record: dict[str, Any]) -> dict[str, str]:
    return {
        "N = M": str(record["N"]),
        "provider": record["provider"],
        "seconds": f"{record['seconds']:.3g}",
        "spread": f"{record['fastest']:.3g} to {record['slowest']:.3g}",
        **_runs(record),
        "model": f"{record['model_seconds']:.3g}",
        "measured / model": f"{record['seconds'] / record['model_seconds']:.2f}",
        "extra MiB": f"{record['extra_bytes'] / 2**20:.1f}",
    }


def _row_lse(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    yield "\n`row_lse` alone ([words](pixel_contrast.md#memory-and-time)). The two bare products"
    yield " write and read the N x M matrix, which blocks in a cache need not:\n"
    done = _done(content["records"])
    yield _table([{"N x M, D": _named(_size(record))} | _peer_row(record) for record in done])


def _maskd(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    yield "\nMasked distillation ([words](masked_distillation.md)):\n"
    done = _done(content["records"])
    yield _table(
        [
            {"case": "{variant}, B {B}, C {C}, T {T}, {H} x {W}".format(**record)}
            | {"provider": record["provider"]}
            | report.cells(record)
            for record in done
        ]
    )


def _af_dcd(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    yield "\nAf-DCD ([words](af_dcd.md)):\n"
    yield _table(
        [
            {"case": "{part}, B {B}, C {C}, {H} x {W}, pool {pool}".format(**record)}
            | {"provider": record["provider"]}
            | report.cells(record)
            for record in _done(content["records"])
        ]
    )


def _kernels(content: dict[str, Any], results: Path, name: str) -> Iterator[str]:
    yield "\nEvery kernel of the launch tables, compiled without a GPU:\n"
    groups: dict[tuple[str, str], Records] = {}
    for record in content["records"]:
        groups.setdefault((record["kernel"], record["arch"]), []).append(record)
    rows = [
        {
            "kernel": f"`{kernel}`",
            "architecture": arch,
            "variants": str(len(group)),
            "most registers": str(max(r["registers"] for r in group)),
            "with spills": str(sum(r["spills"] > 0 for r in group)),
            "with tensor cores": str(sum(r["tensor_core"] > 0 for r in group)),
        }
        for (kernel, arch), group in groups.items()
    ]
    yield _table(rows)
    yield "\n`patch_lse` sums absolute differences, for which tensor cores have no instruction.\n"
