"""What the benchmarks share: stop-watch, memory gauge, table, and the JSON file of results.

Results name the machine and the versions. Extra memory is the peak minus what is there before: on CUDA
the allocator's, on a CPU the rise of the resident set in a fresh process of its own.
"""

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pixdistill

RESULTS = Path(__file__).parent / "results"
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that takes times."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each provider")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and plot")


def seconds(run: Callable[[], object], device: str) -> float:
    """How long one run takes, by the clock or by device events."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def extra_memory(run: Callable[[], object], device: str, command: list[str]) -> int:
    """Bytes that one run needs; `command` makes a fresh process print `resident_rise` of the same."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return fresh_process(command)[0]


def fresh_process(command: list[str]) -> list[int]:
    """The numbers that `python -m benchmarks <command>` prints last, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def resident_rise(run: Callable[[], object]) -> int:
    """How far one run lifts this process's resident peak above where it starts (Linux)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(
            _MMAP_THRESHOLD, 2**16
        )  # else glibc keeps blocks of up to 32 MiB that were freed
        libc.malloc_trim(0)  # what a warm-up freed must not hide what the run takes
    Path("/proc/self/clear_refs").write_text("5")  # start a new peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str, patience: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a slow moment of the machine hits all alike.

    A run that has used up `patience` seconds sits out the rounds that are left, after two at least.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, one_run in runs.items():
            if number < 2 or sum(times[name]) < patience:
                times[name].append(seconds(one_run, device))
    return times


def spread(times: list[float]) -> dict[str, Any]:
    """What a record keeps of the times."""
    fastest, slowest = min(times), max(times)
    return {"seconds": statistics.median(times), "fastest": fastest, "slowest": slowest}


def errors(result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Relative errors of the loss, and of the gradient in the Frobenius norm; None without a truth."""
    if truth is None:
        return {"loss_error": None, "grad_error": None}
    (loss, grad), (true_loss, true_grad) = result, truth
    return {
        "loss_error": float((loss.double() - true_loss).abs() / true_loss.abs()),
        "grad_error": float((grad.double() - true_grad).norm() / true_grad.norm()),
    }


def cells(record: dict[str, Any]) -> dict[str, str]:
    """The columns of a table that all measurements share; dashes for what was skipped."""
    names = ("seconds", "spread", "extra MiB", "loss", "gradient")
    if "skipped" in record:
        return dict.fromkeys(names, "-")
    values = [
        f"{record['seconds']:.4g}",
        f"{record['fastest']:.4g} to {record['slowest']:.4g}",
        f"{record['extra_bytes'] / 2**20:.1f}",
        *(
            "-" if record[key] is None else f"{record[key]:.1e}"
            for key in ("loss_error", "grad_error")
        ),
    ]
    return dict(zip(names, values, strict=True))


def tflops(record: dict[str, Any]) -> str:
    """4 N M D operations over the time."""
    if "skipped" in record:
        return "-"
    return f"{4 * record['N'] * record['M'] * record['D'] / record['seconds'] / 1e12:.3g}"


def skips(records: list[dict[str, Any]]) -> list[str]:
    """One line for each provider and reason."""
    lines = (f"skipped {r['provider']}: {r['skipped']}" for r in records if "skipped" in r)
    return list(dict.fromkeys(lines))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table with aligned columns."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save(name: str, records: list[dict[str, Any]], device: str, folder: Path, **more: Any) -> Path:
    """Write `<folder>/<name>.json` with the machine, the versions and the records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"machine": machine(device), **more, "records": records}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def machine(device: str) -> dict[str, Any]:
    """The processor, what is visible of its cores, and the versions that matter."""
    facts: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
        facts |= {"cuda": torch.version.cuda}
    facts |= {"python": platform.python_version(), "system": platform.system()}
    facts |= {package: version(package) for package in ("torch", "triton")}
    return facts | {"pixdistill": pixdistill.__version__}


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The model name and vector extension: what decides how fast a matrix product is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
