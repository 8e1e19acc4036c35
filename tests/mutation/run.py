"""Break the package on purpose, one fault of faults.txt at a time: does its test notice?

A fault is a piece of code within a function, compared token by token: layout and comments do not
matter, and `$name` stands for any identifier (the same one wherever it occurs). A fault whose piece is
not found exactly once, or whose test is gone, is reported as stale, and hinders no other.

Tools such as mutmut or cosmic-ray make thousands of faults blindly, most of which change nothing that
matters, and run the whole suite for each. These are mistakes that an expert makes, and each names a
test that takes seconds.
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch
from hypothesis import Phase, settings
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TREE = ("pixdistill", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")
# Loaded once, before the processes that run tests are forked. Nothing of this repository.
COMMON = ("torch._dynamo.testing", "torch.distributed.fsdp", "numpy", "einops")
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT}
SLOW = 30  # seconds for one fault, beyond which it is reported
ANY = "ANY__"  # stands for `$`, which is not Python


class StaleError(Exception):
    """The code of a fault is not found, or not once, or its test is not."""


class Fault(NamedTuple):
    """One replacement within one function."""

    file: str
    where: str
    """Qualified name of a function or class, or "file"."""
    what: str
    """What is wrong."""
    text: str
    faulty: str
    test: str
    """The test that notices, as pytest names it, and " -k words" to choose of its parameters."""


def read_faults(path: Path) -> list[Fault]:
    """The list of faults, in the form that its head describes."""
    faults, file = [], ""
    lines = iter([x for x in path.read_text().splitlines() if x and not x.startswith("#")])
    for line in lines:
        if line.startswith("["):
            file = f"pixdistill/{line[1:-1]}"
            continue
        head = re.fullmatch(r"([\w.]+): (.+) \((\w+)::(.+)\)", line)
        text, arrow, faulty = next(lines).partition(" =>")
        if head is None or not arrow:
            raise SystemExit(f"{path}: cannot read {line!r}")
        where, what, module, test = head.groups()
        text, faulty = (x.strip(" ").replace("\\n", "\n") for x in (text, faulty))
        faults.append(
            Fault(file, where, what, text, faulty, f"tests/test_{module}.py::test_{test}")
        )
    return faults


class Token(NamedTuple):
    """A token, and where it stands in its text."""

    text: str
    start: int
    end: int


def tokens_of(text: str) -> list[Token]:
    """All but layout."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    with contextlib.suppress(tokenize.TokenError):  # a piece of code may end inside brackets
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
            if token.type not in LAYOUT and start < end:
                found.append(Token(token.string, start, end))
    return found


def span_of(source: str, where: str) -> tuple[int, int]:
    """The part of a file that a function or class takes, by its qualified name."""
    if where == "file":
        return 0, len(source)
    scope, lines = [ast.parse(source)], source.splitlines(keepends=True)
    for name in where.split("."):
        scope = [
            inner
            for outer in scope
            for inner in ast.walk(outer)
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and inner.name == name
        ]
    if len(scope) != 1:
        raise StaleError(f"{len(scope)} places are called {where}")
    first = min([scope[0].lineno, *(each.lineno for each in scope[0].decorator_list)])
    return len("".join(lines[: first - 1])), len("".join(lines[: scope[0].end_lineno]))


def matched(wanted: Sequence[Token], found: Sequence[Token]) -> dict[str, str] | None:
    """What each `$name` stands for, or None where the tokens differ."""
    names: dict[str, str] = {}
    for ours, theirs in zip(wanted, found, strict=True):
        if ours.text.startswith(ANY) and theirs.text.isidentifier():
            if names.setdefault(ours.text, theirs.text) != theirs.text:
                return None
        elif ours.text != theirs.text:
            return None
    return names


def broken(source: str, fault: Fault) -> str:
    """The file with the fault in it."""
    begin, end = span_of(source, fault.where)
    if source.count(fault.text, begin, end) == 1:  # literally, inside a string too
        place = source.index(fault.text, begin, end)
        return source[:place] + fault.faulty + source[place + len(fault.text) :]
    tokens = [token for token in tokens_of(source) if begin <= token.start < end]
    wanted = tokens_of(fault.text.strip().replace("$", ANY))
    windows = (tokens[i : i + len(wanted)] for i in range(len(tokens) - len(wanted) + 1))
    places = [(w, names) for w in windows if (names := matched(wanted, w)) is not None]
    if len(places) != 1:
        raise StaleError(f"its code is found {len(places)} times")
    place, names = places[0]
    faulty = re.sub(r"\$\w+", lambda name: names[name[0].replace("$", ANY)], fault.faulty)
    return source[: place[0].start] + faulty + source[place[-1].end :]


class Copy:
    """A copy of the tree, in which one fault at a time is tested, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.fault: Fault | None = None
        folder.mkdir()
        for name in TREE:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_build")
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)

    def start(self, fault: Fault) -> None:
        """Write the fault, and run its tests."""
        source = (ROOT / fault.file).read_text()
        (self.folder / fault.file).write_text(broken(source, fault))
        self.fault, self.began = fault, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _run_tests(self.folder, self.log, fault)

    def poll(self, limit: float) -> str | None:
        """How the tests ended, with the fault undone; None while they run."""
        assert self.fault is not None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        late = pid == 0 and time.monotonic() - self.began > limit
        if pid == 0 and not late:
            return None
        self.kill()  # ranks of a distributed test may be left
        if late:
            os.waitpid(self.pid, 0)
        shutil.copy(ROOT / self.fault.file, self.folder / self.fault.file)
        self.fault = None
        if late:
            return "caught by the time limit"
        code = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - self.began
        caught = "caught" if took < SLOW else f"caught after {took:.0f} s"
        known = {0: "SURVIVED", 1: caught, 2: "caught at import"}
        return "caught by a crash" if code < 0 else known.get(code, "NOT RUN")

    def kill(self) -> None:
        """End the tests, with all processes that they have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _run_tests(folder: Path, log: Path, fault: Fault) -> NoReturn:
    """The test of the fault, in this process, which was forked for it."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    quiet = "-Wignore::pytest.PytestAssertRewriteWarning"  # hypothesis is loaded already
    code: int = 3
    try:
        code = int(
            pytest.main(["-n0", "-xq", "-pno:cacheprovider", quiet, *fault.test.split(" ", 2)])
        )
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(
    faults: Sequence[Fault], copies: Sequence[Copy], limit: float
) -> Iterator[tuple[Fault, str]]:
    """Every fault and how its tests ended, as many at a time as there are copies."""
    waiting, running = list(reversed(faults)), {}
    try:
        while waiting or running:
            for copy in copies:
                if copy in running and (outcome := copy.poll(limit)) is not None:
                    yield running.pop(copy), outcome
                if copy not in running and waiting:
                    running[copy] = waiting.pop()
                    copy.start(running[copy])
            time.sleep(0.02)
    finally:  # interrupted
        for copy in running:
            copy.kill()


def main() -> int:
    """Print what survives, is slow or stale; the number of survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--only", default="", help="words that the line of a fault must have")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of a fault")
    parser.add_argument("--check", action="store_true", help="only look for the places")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
    chosen, stale = [], 0
    for fault in read_faults(Path(__file__).with_name("faults.txt")):
        if all(word in " ".join(fault) for word in arguments.only.split()):
            try:
                ast.parse(broken((ROOT / fault.file).read_text(), fault))
                test_file, name = fault.test.split("::")
                if f"def {name.split()[0]}(" not in (ROOT / test_file).read_text():
                    raise StaleError(f"no test {fault.test}")
                chosen.append(fault)
            except (StaleError, SyntaxError, FileNotFoundError) as error:
                stale += 1
                print(f"stale: {fault.file}, {fault.where}: {fault.what}: {error}")
    print(f"{len(chosen)} faults have a place, {stale} are stale")
    if arguments.check or not chosen:
        return 0
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a stale .pyc would hide a fault of the same size
    sys.dont_write_bytecode = True
    phases = [Phase.explicit, Phase.generate]  # the first example that fails is enough
    settings.register_profile(
        "faults", max_examples=25, deadline=None, derandomize=True, phases=phases
    )
    os.environ["HYPOTHESIS_PROFILE"] = "faults"
    torch.set_num_threads(1)
    for name in COMMON:
        importlib.import_module(name)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(arguments.jobs)]
        results = run(chosen, copies, arguments.limit)
        for fault, outcome in (bar := tqdm(results, total=len(chosen))):
            survived += not outcome.startswith("caught")
            if outcome != "caught":
                bar.write(f"{outcome}: {fault.file}, {fault.where}: {fault.what}")
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught; {stale} stale")
    return survived


if __name__ == "__main__":
    sys.exit(main())
