"""Measure the losses and operators of pixdistill: `python -m benchmarks COMMAND --help`."""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import kernels, page, stress, targets
from .runner import DTYPES, Case, Options, Runner, Subject, compile_kernels
from .sheet import RESULTS, label
from .subjects import SUBJECTS

# What `all` measures in turn, the most informative first: which cases of which subject.
PLAN = [
    ("overhead", slice(10)),
    ("step", slice(2)),
    ("row_lse", slice(4)),
    ("contrast", slice(4)),
    ("maskd", slice(None)),
    ("af_dcd", slice(None)),
    ("wide", slice(None)),
    ("step", slice(2, None)),
    ("peers", slice(3)),
    ("overhead", slice(10, None)),
    ("contrast", slice(4, None)),
    ("row_lse", slice(4, None)),
    ("peers", slice(3, None)),
    ("scaling", slice(None)),
]
OTHERS = {"kernels": kernels, "stress": stress, "targets": targets, "page": page}


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = commands.add_parser(
        "all", help="everything, the most informative first", description=measure_all.__doc__
    )
    add_common(every)
    for name, subject in SUBJECTS.items():
        words = sys.modules[subject.problem.__module__].__doc__
        add_arguments(commands.add_parser(name, help=subject.summary, description=words), subject)
    for name, module in OTHERS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        added = commands.add_parser(
            name, help=summary[0].lower() + summary[1:].rstrip("."), description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(added)
    arguments = parser.parse_args(argv)
    if arguments.command in OTHERS:
        return OTHERS[arguments.command].run(arguments)
    if arguments.command == "all":
        return measure_all(options_of(arguments))
    subject = SUBJECTS[arguments.command]
    runner = Runner(subject, options_of(arguments, subject))
    with interruptible():
        runner.measure()
    return finish([runner])


def measure_all(options: Options) -> int:
    """Measure every subject, the most informative cases first, then print everything."""
    runners: dict[str, Runner] = {}
    with interruptible():
        if options.device == "cuda":
            compile_kernels(list(jobs()), options.dtype)
        for name, part in PLAN:
            cases = SUBJECTS[name].cases[options.device][part]
            if cases and not options.late:
                runners.setdefault(name, Runner(SUBJECTS[name], options)).measure(cases)
    status = finish(runners.values())
    for device in targets.devices(options.output):
        print(f"\nTargets, {device}\n\n{targets.reached(options.output, device)}")
    return status


def jobs() -> Iterator[tuple[str, Case]]:
    """What launches all kernels of the plan."""
    for name in ("overhead", "row_lse", "contrast", "maskd", "af_dcd", "wide"):
        for case in SUBJECTS[name].cases["cuda"]:
            yield name, case


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the measuring, not the program."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: the rows so far are saved")


def finish(runners: Iterable[Runner]) -> int:
    """Print what was measured; the exit status says whether anything of ours failed."""
    failed = False
    for runner in runners:
        print(f"\n{runner.sheet}", flush=True)
        failed |= any("failed" in record for record in runner.sheet.records)
    return int(failed)


# --- Options --------------------------------------------------------------------------------------


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every command that measures."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--rounds", type=int, help="timed runs of each provider; default: 3 to 30")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no measurement after these minutes"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also measure what torch.compile makes of providers that it can compile",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GiB",
        help="leave out what would hold more; default: 10 on a CPU, 80 %% of the GPU's memory",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s"
    )


def add_arguments(parser: argparse.ArgumentParser, subject: Subject) -> None:
    """The options of one subject."""
    add_common(parser)
    parts = "; ".join(f"{name}: {what}" for name, what in subject.columns.items())
    parser.add_argument(
        "--case",
        nargs=len(subject.columns),
        action="append",
        metavar=tuple(subject.columns),
        help=f"measure this and not the usual cases; may be repeated. {parts}. "
        f"Usual on a GPU: {', '.join(map(label, subject.cases['cuda'][:3]))}, ...",
    )
    parser.add_argument(
        "--provider",
        choices=subject.providers,
        action="append",
        metavar="NAME",
        help=f"only this one; may be repeated: {', '.join(subject.providers)}",
    )


def options_of(arguments: argparse.Namespace, subject: Subject | None = None) -> Options:
    """The command line as options."""
    device = arguments.device
    if arguments.memory_limit is not None:
        limit = arguments.memory_limit * 2**30
    elif device == "cuda":
        limit = 0.8 * torch.cuda.get_device_properties(0).total_memory
    else:
        limit = 10 * 2**30
    cases = (
        () if subject is None else tuple(_case(words, subject) for words in arguments.case or ())
    )
    return Options(
        device=device,
        dtype=arguments.dtype or ("float32" if device == "cpu" else "bfloat16"),
        rounds=arguments.rounds,
        memory_limit=limit,
        deadline=time.monotonic() + 60 * arguments.minutes,
        output=arguments.output,
        cases=cases,
        providers=() if subject is None else tuple(arguments.provider or ()),
        compile=arguments.compile,
    )


def _case(words: list[str], subject: Subject) -> Case:
    """Words as numbers where the usual cases have numbers."""
    case = []
    for name, word, usual in zip(subject.columns, words, subject.small, strict=True):
        if isinstance(usual, int) and not word.isdigit():
            raise SystemExit(f"--case: {name} must be a whole number; got {word!r}")
        case.append(int(word) if isinstance(usual, int) else word)
    return tuple(case)


if __name__ == "__main__":
    raise SystemExit(main())
