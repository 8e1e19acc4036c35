"""Gauges of one call: time, launches, memory, error; and what the machine is."""

import contextlib
import ctypes
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pixdistill

Call = Callable[[], object]
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


# --- Time -----------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Seconds of one call that meets an idle device."""

    seconds: float  # until its result is there
    host: float  # until Python returns


def sample(call: Call, device: str, repeats: int = 1) -> Sample:
    """Time a call, or on a CPU the mean of some calls: one short call is too short for the clock."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        return Sample(seconds, seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3, host)


def gpu_seconds(call: Call, host: float, rounds: int = 5) -> float:
    """The GPU's own time: the call waits in a queue that is busy for longer than Python needs."""
    cycles = int(4e9 * (host + 1e-4))  # at 2 GHz, twice what Python needs
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        torch.cuda._sleep(cycles)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graph_seconds(call: Call, replays: int = 20) -> float:
    """The GPU's own time of a call that is captured as a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    return sample(replay, "cuda").seconds / replays


# --- Launches -------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Counts the operators that do work: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        self.count += not view and not name.startswith(("empty", "new_empty", "pixdistill::"))
        return func(*args, **(kwargs or {}))


def launches(call: Call, device: str) -> int:
    """Kernels and copies on a GPU; on a CPU the PyTorch operators, without views and allocations."""
    if device == "cpu":
        with _Operators() as operators:
            call()
        return operators.count
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:  # without it torch warns
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profiler.events())


# --- Memory ---------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of one call."""

    extra_bytes: int  # peak minus what was there before
    peak_bytes: int


def cuda_memory(call: Call) -> Memory:
    """By the allocator of CUDA."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Memory(peak - before, peak)


def return_freed_memory() -> None:
    """Let glibc return what is freed, at once: it keeps blocks of up to 32 MiB otherwise."""
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def resident_memory(call: Call) -> Memory:
    """By the resident set of this process (Linux), which should run nothing else."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what a warm-up freed must not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # start a new peak
    before = _status("VmRSS")
    call()
    peak = _status("VmHWM")
    return Memory(peak - before, peak)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


# --- Error ----------------------------------------------------------------------------------------


def errors(result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative errors of the loss, and of the gradient in the Frobenius norm."""
    (loss, grad), (true_loss, true_grad) = result, truth
    return {
        "loss_error": float((loss.double() - true_loss).abs() / true_loss.abs()),
        "grad_error": float((grad.double() - true_grad).norm() / true_grad.norm()),
    }


# --- Machine --------------------------------------------------------------------------------------


def machine(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Processor, GPU, versions and date, and how fast a large product and a large copy are."""
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
        facts |= {"cuda": torch.version.cuda}
    facts |= {"python": platform.python_version(), "system": platform.system()}
    facts |= {package: version(package) for package in ("torch", "triton")}
    facts |= {"pixdistill": pixdistill.__version__, "date": datetime.date.today().isoformat()}
    facts |= {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    return facts | rates(device, dtype)


def kind(device: str) -> str:
    """The device in a file's name: "cpu", "h100", "rtx4090"."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower()
    found = re.search(r"\b(?:rtx )?[a-z]*\d{2,4}[a-z]*\b", name)
    return re.sub(r"\W+", "", found.group() if found else name)


def rates(device: str, dtype: torch.dtype, rounds: int = 5) -> dict[str, float]:
    """Operations per second of a large square product, bytes per second of a copy: the best runs."""
    side, elements = (8192, 2**28) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(elements, device=device)
    target = torch.zeros_like(source)

    def best(call: Call) -> float:
        call()
        if device == "cuda":
            return min(gpu_seconds(call, 1e-4, rounds=1) for _ in range(rounds))
        return min(sample(call, device).seconds for _ in range(rounds))

    product = best(lambda: torch.mm(a, b))
    copy = best(lambda: target.copy_(source))
    moved = 2 * source.numel() * source.element_size()
    return {"matmul_flops": 2 * side**3 / product, "copy_bytes": moved / copy}


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The model name and vector extension: what decides how fast a matrix product is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model = text.partition("model name")[2].partition(":")[2].partition("\n")[0] or model
    return f"{model.strip()}, {torch.backends.cpu.get_cpu_capability()}"
