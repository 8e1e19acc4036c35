"""Does some test notice each fault of `faults.py`? Each is made in a copy of the tree and tested there.

    python tests/mutation.py                       # all of them, two at a time
    python tests/mutation.py --only "queue wrap"   # those whose line has both words

The tests of every fault run first without it: what fails anyway would prove nothing. A fault is caught
when a test fails or its process crashes; also when the tests do not end within the limit, which is
reported apart. The exit status counts the faults that no test noticed.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
from faults import FAULTS, Fault
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TREE = ("pixdistill", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")

# Loaded once, before the processes that run tests are forked. Nothing of this repository.
COMMON = ("torch._dynamo.testing", "torch.distributed.fsdp", "hypothesis", "numpy", "einops")


class Job(NamedTuple):
    """Tests to run, with a fault or without one."""

    tests: str
    fault: Fault | None


class Record(NamedTuple):
    """How the tests of a job ended."""

    job: Job
    outcome: str  # "passed", "failed", "crashed", "timed out" or "not run"
    by: str  # the first test that failed
    log: str
    """The end of pytest's output."""


class Copy:
    """A copy of the tree, in which one job at a time runs, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        folder.mkdir()
        for name in TREE:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_build")
                shutil.copytree(source, folder / name, ignore=ignored)
            else:
                shutil.copy(source, folder / name)
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        """Write the fault, and run the tests."""
        self.job, self.began = job, time.monotonic()
        if job.fault is not None:
            text = (ROOT / job.fault.file).read_text()
            if text.count(job.fault.text) != 1:
                raise ValueError(f"its text must occur exactly once: {job.fault}")
            faulty = text.replace(job.fault.text, job.fault.faulty)
            (self.folder / job.fault.file).write_text(faulty)
        self.pid = os.fork()
        if self.pid == 0:
            _run_tests(self.folder, self.log, job.tests)

    def poll(self, limit: float) -> Record | None:
        """What came out, with the fault undone; None while the tests run."""
        assert self.job is not None
        seconds = time.monotonic() - self.began
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = pid == 0 and seconds > limit
        if pid == 0 and not late:
            return None
        self.kill()  # ranks of a distributed test may be left
        if late:
            os.waitpid(self.pid, 0)
        job, self.job = self.job, None
        if job.fault is not None:
            shutil.copy(ROOT / job.fault.file, self.folder / job.fault.file)
        lines = self.log.read_text(errors="replace").splitlines()
        by = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR tests"))]
        outcome = "timed out" if late else _outcome(os.waitstatus_to_exitcode(status))
        return Record(job, outcome, by[0] if by else "", "\n".join(lines[-20:]))

    def kill(self) -> None:
        """End the tests, with all processes that they have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _run_tests(folder: Path, log: Path, tests: str) -> NoReturn:
    """pytest in a forked process that has the common modules, and imports the rest from the copy."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    away = (str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in away)]
    os.environ["PYTHONPATH"] = str(folder)
    options = ["-n", "0", "-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is loaded already
    code: int = 3
    try:
        code = pytest.main([*options, *shlex.split(tests)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _outcome(code: int) -> str:
    """Of pytest's exit status; a negative one is a signal."""
    known = {0: "passed", pytest.ExitCode.TESTS_FAILED: "failed"}
    known |= {pytest.ExitCode.INTERRUPTED: "failed"}  # the faulty file cannot be imported
    return "crashed" if code < 0 else known.get(code, "not run")


def run(jobs: Sequence[Job], copies: Sequence[Copy], limit: float) -> Iterator[Record]:
    """All jobs, as many at a time as there are copies; in the order in which they end."""
    waiting = list(reversed(jobs))
    try:
        while waiting or any(copy.job for copy in copies):
            for copy in copies:
                if copy.job is not None and (record := copy.poll(limit)) is not None:
                    yield record
                if copy.job is None and waiting:
                    copy.start(waiting.pop())
            time.sleep(0.02)
    finally:  # interrupted
        for copy in copies:
            if copy.job is not None:
                copy.kill()


def main() -> int:
    """Run, print and save; the number of faults that no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--only", default="", help="words that the line of a fault must have")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of a fault")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write, such as tests/mutation.json"
    )
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a stale .pyc would hide a fault of the same size
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    for name in COMMON:
        importlib.import_module(name)
    words = arguments.only.split()
    chosen = [fault for fault in FAULTS if all(word in " ".join(fault) for word in words)]
    if not chosen:
        parser.error(f"no fault has the words {arguments.only!r}")
    with tempfile.TemporaryDirectory() as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(arguments.jobs)]
        clean = [Job(tests, None) for tests in dict.fromkeys(fault.tests for fault in chosen)]
        for record in tqdm(run(clean, copies, 2 * arguments.limit), "without", len(clean)):
            if record.outcome != "passed":
                print(f"{record.outcome} without a fault: {record.job.tests}\n{record.log}")
                return len(chosen)
        records = []
        jobs = [Job(fault.tests, fault) for fault in chosen]
        for record in (bar := tqdm(run(jobs, copies, arguments.limit), "with", len(jobs))):
            records.append(record)
            if record.outcome in ("passed", "not run"):
                bar.write(f"{record.outcome}: {record.job.fault}")
    return report(records, arguments.output)


def report(records: Sequence[Record], output: Path | None) -> int:
    """Print the score and the survivors, and write them; the number of survivors."""
    came = {record.job.fault: record for record in records}
    rows = [
        {"file": fault.file, "kind": fault.kind, "what": fault.what}
        | {"outcome": came[fault].outcome, "by": came[fault].by}
        for fault in FAULTS
        if fault in came
    ]
    survivors = [row for row in rows if row["outcome"] in ("passed", "not run")]
    late = [row for row in rows if row["outcome"] == "timed out"]
    caught = len(rows) - len(survivors)
    print(f"{caught} of {len(rows)} faults caught, {len(late)} of them by the time limit")
    for row in survivors:
        print(f"survived: {row['file']}: {row['what']} ({row['kind']}, {row['outcome']})")
    if output is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        counts = {"faults": len(rows), "caught": caught, "timed_out": len(late)}
        output.write_text(json.dumps({**versions, **counts, "records": rows}, indent=1) + "\n")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
