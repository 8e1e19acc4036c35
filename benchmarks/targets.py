"""Which of its targets the library reaches: numbers of the results, and the limits they should keep."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import contrast
from .maskd import SUBJECT as MASKD
from .overhead import CPU_CASES
from .peers import SUBJECT as PEERS
from .runner import Case
from .sheet import RESULTS, Record, label, table

MOST, LEAST = "at most", "at least"
MAPS = ("batch", 16, 128, 32, 32, 0)
BOTH = ("both", 16, 128, 32, 32, 16384)
PATCHES = ("contrast", 2, 512, 64, 128, 4)
WHOLE = ("loss", 2, 512, 64, 128, 4)
PCD = ("pcd", 256, 224)

Target = tuple[str, str, float, float]
"""What, "at most" or "at least", the limit, and what was measured: NaN for nothing."""


class Results:
    """The files of one device, by subject."""

    def __init__(self, folder: Path, device: str) -> None:
        found = (json.loads(path.read_text()) for path in folder.glob(f"*_{device}_*.json"))
        self.files: dict[str, dict[str, Any]] = {content["subject"]: content for content in found}

    def records(self, subject: str, case: Case) -> dict[str, Record]:
        """What was measured of a case, by provider."""
        content = self.files.get(subject, {"columns": [], "records": []})
        wanted = dict(zip(content["columns"], case, strict=False))
        found = (r for r in content["records"] if wanted.items() <= r.items() and "seconds" in r)
        return {record["provider"]: record for record in found}

    def __call__(self, subject: str, case: Case, key: str, provider: str = "ours") -> float:
        """One number, NaN if it was not measured."""
        number = self.records(subject, case).get(provider, {}).get(key)
        return math.nan if number is None else number

    def ratio(self, subject: str, case: Case, key: str, over: str, ours: str = "ours") -> float:
        """Ours over another provider's."""
        other = self(subject, case, key, over)
        return self(subject, case, key, ours) / other if other else math.nan

    def product_seconds(self, subject: str, operations: float) -> float:
        """So many operations at the rate of a large matrix product."""
        machine = self.files.get(subject, {}).get("machine", {})
        return operations / machine.get("matmul_flops", math.nan)


def on_gpu(found: Results) -> Iterator[Target]:
    """Bfloat16; one pass of `row_lse` is held to what a Hopper GPU can do."""
    call = ("contrast", label(MAPS))
    launches = found("overhead", call, "launches")
    yield "PixelContrastLoss, batch negatives: launches", MOST, 8, launches
    launches = found("overhead", ("contrast", label(BOTH)), "launches")
    yield "PixelContrastLoss, queue and batch: launches", MOST, 10, launches
    for size in ("4 128 16 16", "16 128 32 32"):
        ratio = found.ratio("overhead", ("contrast", f"batch {size} 0"), "host_seconds", "plain")
        yield f"PixelContrastLoss, {size}: host time over plain's", MOST, 0.5, ratio
    products = found.product_seconds("overhead", contrast.work(MAPS))
    ratio = found("overhead", call, "gpu_seconds") / products
    yield "the same: GPU time over its products at the rate of a large one", MOST, 1.15, ratio
    mib = found("overhead", call, "extra_bytes") / 2**20
    yield "the same: extra MiB", MOST, 24, mib
    for case, limit in (
        ((16384, 16384, 64), 0.65),
        ((16384, 16384, 128), 0.95),
        ((16384, 16384, 256), 0.97),
        ((6272, 65536, 256), 0.95),
    ):
        seconds = found("row_lse", case, "gpu_seconds", "ours-pass")
        rate = found.product_seconds("row_lse", PEERS.work(case)) / seconds
        yield (
            f"`row_lse`, {label(case)}: rate of the pass over a large product's",
            LEAST,
            limit,
            rate,
        )
        ratio = found.ratio("row_lse", case, "gpu_seconds", "attention-cudnn", "ours-pass")
        yield "the same: GPU time over cuDNN attention's", MOST, 1, ratio
    for size in ("256 256 128", "1024 1024 128", "6272 6272 128", "16384 16384 128"):
        ratio = found.ratio("overhead", ("row_lse", size), "host_seconds", "plain")
        yield f"`row_lse`, {size}: host time over plain's", MOST, 0.8, ratio
    for case, limit in (((16384, 16384, 512), 0.5), ((16384, 65536, 2048), 0.8)):
        rate = found.ratio("wide", case, "seconds", "ours-pass", "two-products")
        yield f"`row_lse`, {label(case)}: rate over two bare products'", LEAST, limit, rate
    for level in MASKD.cases["cuda"]:
        ratio = found.ratio("maskd", level, "seconds", "plain")
        yield f"MaskedDistillationLoss, {label(level)}: time over plain's", MOST, 0.6, ratio
        reads = found.ratio("maskd", level, "gpu_seconds", "one-read")
        yield "the same: GPU time over one read of both maps", MOST, 3, reads
    launches = found("overhead", ("af_dcd", label(WHOLE)), "launches")
    yield "AfDCDLoss: launches", MOST, 30, launches
    ratio = found.ratio("af_dcd", PATCHES, "seconds", "plain")
    yield "Af-DCD's contrast, pool 4: time over plain's", MOST, 0.08, ratio
    ms = (found("step", PCD, "seconds") - found("step", PCD, "seconds", "squared-error")) * 1e3
    yield "a step of PCD: ms more than with a squared error", MOST, 3, ms
    gib = found("step", PCD, "peak_bytes") - found("step", PCD, "peak_bytes", "squared-error")
    yield "the same: GiB more", MOST, 0.1, gib / 2**30


def on_cpu(found: Results) -> Iterator[Target]:
    """A few cores, float32."""
    name, size = CPU_CASES[0]
    ratio = found.ratio("overhead", (name, label(size)), "seconds", "plain")
    yield "PixelContrastLoss, 16 x 16 pixels: time over plain's", MOST, 1.5, ratio
    for case in PEERS.cases["cpu"]:
        records = found.records("peers", case)
        others = [record["seconds"] for name, record in records.items() if name != "ours"]
        ratio = found("peers", case, "seconds") / min(others, default=math.nan)
        yield f"the contrast, {label(case)}: time over the fastest peer's", MOST, 1, ratio
    ratio = found.ratio("af_dcd", PATCHES, "seconds", "ours", "plain")
    yield "Af-DCD's contrast, pool 4: plain's time over ours", LEAST, 2.5, ratio
    ratio = found.ratio("af_dcd", PATCHES, "extra_bytes", "plain")
    yield "the same: extra memory over plain's", MOST, 0.25, ratio


def reached(folder: Path, device: str) -> str:
    """What was measured of a device's targets, as a Markdown table; empty where nothing was."""
    targets = (on_cpu if device == "cpu" else on_gpu)(Results(folder, device))
    rows = [
        {"what": what, "target": f"{sign} {limit:g}", "measured": f"{number:.3g}"}
        | {"": "reached" if (number >= limit) == (sign == LEAST) or number == limit else "missed"}
        for what, sign, limit, number in targets
        if not math.isnan(number)
    ]
    return table(rows) if rows else ""


def devices(folder: Path) -> list[str]:
    """The devices that have results, GPUs first."""
    names = {path.stem.rsplit("_", 2)[1] for path in folder.glob("*_*_*.json")}
    return sorted(names, key=lambda name: (name == "cpu", name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks targets`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")


def run(arguments: argparse.Namespace) -> int:
    """Print the table of each device."""
    for device in devices(arguments.results):
        print(f"\n{device}\n\n{reached(arguments.results, device)}")
    return 0
