"""The one runner of all benchmarks.

A subject says which problems there are and who solves them. The runner warms up, times all providers
of a problem in turns, reads the gauges, and saves after every row: what is killed loses one call.
"""

import contextlib
import functools
import importlib.util
import math
import multiprocessing
import os
import signal
import statistics
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gauges
from .sheet import RESULTS, Record, Sheet, label

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG = {"cpu": 1.0, "cuda": 0.02}  # seconds of a call whose launches cost nothing beside its work

Case = tuple[Any, ...]


@dataclass(frozen=True)
class Provider:
    """One way to solve a problem: its loss, and the gradient with respect to the student or query."""

    run: Callable[[Any], Any]
    note: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None  # the module that it imports
    install: str = "pip install pixdistill[peers]"
    compiled: bool = False  # by torch.compile: left out unless asked for
    floor: bool = False  # a part of the work, whose values are not the task's
    holds: Callable[[Case], float] = lambda case: (
        0.0
    )  # bytes at the peak, roughly, if that is a lot
    why_not: Callable[[Case, torch.dtype], str | None] = lambda case, dtype: None
    finish: Callable[[Any, Any], tuple[Tensor, Tensor]] = lambda problem, result: result


@dataclass(frozen=True)
class Subject:
    """What one command measures."""

    name: str
    summary: str
    columns: dict[str, str]  # the parts of a case, and what they are
    cases: dict[str, list[Case]]  # by device, the most informative first
    small: Case  # runs in no time: for warming up, and for tests
    problem: Callable[[Case, torch.dtype, str], Any]
    providers: dict[str, Provider]
    truth: Callable[[Any], tuple[Tensor, Tensor]] | None = None  # in float64
    work: Callable[[Case], float] = lambda case: 0.0  # operations, the same for every provider
    graph: bool = (
        False  # whether GPU time is that of a CUDA graph; otherwise that of a filled queue
    )
    rounds: dict[str, int] = field(default_factory=lambda: {"cpu": 5, "cuda": 20})


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    device: str = "cpu"
    dtype: str = "float32"
    rounds: int | None = None
    cases: tuple[Case, ...] = ()
    providers: tuple[str, ...] = ()
    compile: bool = False
    memory_limit: float = 10 * 2**30
    longest: float = 45.0  # seconds of a call that is still made
    patience: float = 6.0  # seconds for the timed calls of a row; two are made in any case
    deadline: float = math.inf  # of time.monotonic()
    output: Path = RESULTS

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def names(self, subject: Subject) -> list[str]:
        """The providers to run: those for the device, and what is compiled only if asked for."""
        every = (
            name
            for name, provider in subject.providers.items()
            if self.device in provider.devices and (self.compile or not provider.compiled)
        )
        return list(self.providers or every)


def autocast(dtype: torch.dtype, device: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision as people train: float32 maps under autocast."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype)


# --- Measuring ------------------------------------------------------------------------------------


class Row:
    """A record that is being measured."""

    def __init__(self, record: Record, call: Callable[[], object], device: str) -> None:
        self.record, self.call, self.device = record, call, device
        self.samples: list[gauges.Sample] = []
        self.repeats = 1

    def time(self) -> None:
        """One more sample."""
        self.samples.append(gauges.sample(self.call, self.device, self.repeats))
        seconds = [sample.seconds for sample in self.samples]
        self.record |= {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "runs": len(seconds),
        }
        if self.device == "cuda":
            host = statistics.median(sample.host for sample in self.samples)
            self.record["host_seconds"] = host

    @property
    def spent(self) -> float:
        return sum(sample.seconds for sample in self.samples) * self.repeats

    def gauge(self, graph: bool) -> None:
        """Time once, and read what can be read in this process."""
        first = gauges.sample(self.call, self.device)
        if self.device == "cpu":  # one short call is too short for the clock
            self.repeats = max(1, min(100, int(5e-3 / first.seconds)))
        if first.seconds < LONG[self.device]:
            self.record["launches"] = gauges.launches(self.call, self.device)
        self.time()
        if self.device == "cuda":
            if first.seconds < LONG["cuda"]:
                self.record |= gpu_time(self.call, first.host, graph)
            self.record |= gauges.cuda_memory(self.call)._asdict()


def gpu_time(call: Callable[[], object], host: float, graph: bool) -> Record:
    """By a graph where that is asked for and can be captured, else by a filled queue."""
    if graph:
        try:
            return {"gpu_seconds": gauges.graph_seconds(call), "gpu_time_by": "graph"}
        except Exception:
            torch.cuda.synchronize()
    return {"gpu_seconds": gauges.gpu_seconds(call, host), "gpu_time_by": "queue"}


class Runner:
    """Measures the cases of one subject into one file."""

    def __init__(self, subject: Subject, options: Options) -> None:
        self.subject, self.options = subject, options
        device, dtype = options.device, options.dtype
        path = options.output / f"{subject.name}_{gauges.kind(device)}_{dtype}.json"
        head: Record = {"subject": subject.name, "columns": list(subject.columns), "dtype": dtype}
        head["machine"] = gauges.machine(device, DTYPES[dtype])
        self.sheet = Sheet(path, head)
        self.worker: ProcessPoolExecutor | None = None
        self.paces: dict[str, float] = {}  # seconds of a provider's call over its operations

    def measure(self, cases: Iterable[Case] = ()) -> None:
        """Measure these cases, or the usual ones, with every provider."""
        from tqdm import tqdm

        cases = list(cases or self.options.cases or self.subject.cases[self.options.device])
        total = len(cases) * len(self.options.names(self.subject))
        try:
            with tqdm(total=total, unit="row", desc=self.subject.name, disable=None) as bar:
                for case in cases:
                    self._case(case, bar)
        finally:
            if self.worker is not None:
                self.worker.shutdown(wait=False, cancel_futures=True)
                self.worker = None

    def _case(self, case: Case, bar: Any) -> None:
        if self.options.compile:
            torch.compiler.reset()  # each case is compiled for itself
        solve = functools.cache(functools.partial(self._problem, case))
        rows: dict[str, Row] = {}
        for name in self.options.names(self.subject):
            if self.options.late:
                break
            bar.set_postfix_str(f"{label(case)} {name}")
            record = dict(zip(self.subject.columns, case, strict=True)) | {"provider": name}
            reason = self.why_not(name, case)
            if reason is None:
                try:
                    rows[name] = self._first(name, case, record, *solve())
                except Exception as error:
                    record["failed" if name.startswith("ours") else "skipped"] = what_failed(error)
            else:
                record["skipped"] = reason
            self.sheet.records.append(record)
            self.sheet.save()
            bar.update()
        for number in range(1, self.options.rounds or self.subject.rounds[self.options.device]):
            for row in rows.values():
                if (row.spent < self.options.patience or number < 2) and not self.options.late:
                    row.time()
            self.sheet.save()
        if work := self.subject.work(case):
            self.paces |= {name: row.record["seconds"] / work for name, row in rows.items()}

    def _problem(self, case: Case) -> tuple[Any, Any]:
        problem = self.subject.problem(case, DTYPES[self.options.dtype], self.options.device)
        return problem, self.subject.truth(problem) if self.subject.truth else None

    def _first(self, name: str, case: Case, record: Record, problem: Any, truth: Any) -> Row:
        """Warm up, compare with the truth, and read all gauges once."""
        provider = self.subject.providers[name]
        call = functools.partial(provider.run, problem)
        result = call()
        if truth is not None and not provider.floor:
            record |= gauges.errors(provider.finish(problem, result), truth)
        del result
        row = Row(record, call, self.options.device)
        row.gauge(self.subject.graph)
        if self.options.device == "cpu":
            record |= self.resident_memory(name, case)
        return row

    def why_not(self, name: str, case: Case) -> str | None:
        """Why a provider sits a case out, or None."""
        provider, options = self.subject.providers[name], self.options
        if options.device not in provider.devices:
            return f"made for {provider.devices[0].upper()}"
        if provider.package and not installed(provider.package):
            return f"not installed: {provider.install}"
        need, limit = provider.holds(case) / 2**30, options.memory_limit / 2**30
        if need > limit:
            return f"would hold about {need:.0f} GiB, above the limit of {limit:.0f}"
        seconds = self.paces.get(name, 0.0) * self.subject.work(case)
        if seconds > options.longest:
            return f"would take about {seconds:.0f} s, above the limit of {options.longest:.0f} s"
        return provider.why_not(case, DTYPES[options.dtype])

    def resident_memory(self, name: str, case: Case) -> Record:
        """Bytes by a process of its own, which serves all rows; None where it was killed."""
        if self.worker is None:
            self.worker = processes(1)
        job = self.worker.submit(resident_memory, self.subject.name, name, case, self.options.dtype)
        try:
            return job.result()._asdict()
        except BrokenProcessPool:
            self.worker = None
            return dict.fromkeys(gauges.Memory._fields)


def installed(package: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(package) is not None


def what_failed(error: Exception) -> str:
    """An error in one line; one without words is named by its code."""
    said = str(error).strip().partition("\n")[0]
    if not said:
        said = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return textwrap.shorten(f"{type(error).__name__}: {said}", 200)


# --- Other processes ------------------------------------------------------------------------------


def processes(number: int) -> ProcessPoolExecutor:
    """Fresh processes that leave Ctrl-C to this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, context, initializer=_start)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gauges.return_freed_memory()


def resident_memory(subject: str, provider: str, case: Case, dtype: str) -> gauges.Memory:
    """What one call takes on a CPU, in a process that does nothing else."""
    made = find(subject)
    run = made.providers[provider].run
    run(made.problem(made.small, DTYPES[dtype], "cpu"))  # loads what is loaded once
    call = functools.partial(run, made.problem(case, DTYPES[dtype], "cpu"))
    start = time.monotonic()
    memory = gauges.resident_memory(call)
    quick = time.monotonic() - start < 1
    return gauges.resident_memory(call) if quick else memory


def compile_kernels(jobs: list[tuple[str, Case]], dtype: str) -> None:
    """Call ours once for each case, in parallel: Triton's cache on disk keeps the kernels."""
    from tqdm import tqdm

    with processes(min(12, (os.cpu_count() or 2) - 1)) as pool:
        futures = [pool.submit(_call_once, *job, dtype) for job in jobs]
        for _ in tqdm(as_completed(futures), "compile kernels", len(futures), disable=None):
            pass  # what fails will say so when it is measured


def _call_once(subject: str, case: Case, dtype: str) -> None:
    made = find(subject)
    made.providers["ours"].run(made.problem(case, DTYPES[dtype], "cuda"))


def find(name: str) -> Subject:
    """A subject by its name."""
    from .subjects import SUBJECTS

    return SUBJECTS[name]
