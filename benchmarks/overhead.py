"""What a call costs beside its kernels: host time, launches, GPU time by graph replay, extra memory.

The rows are cases of the other subjects, each loss and operator against plain PyTorch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import af_dcd, contrast, maskd, row_lse
from .runner import Case, Provider, Subject
from .sheet import label

PARTS = {
    subject.name: subject
    for subject in (contrast.SUBJECT, row_lse.SUBJECT, maskd.SUBJECT, af_dcd.SUBJECT)
}
CASES: list[tuple[str, Case]] = [
    ("contrast", ("batch", 16, 128, 32, 32, 0)),
    ("contrast", ("batch", 4, 128, 16, 16, 0)),
    ("contrast", ("queue", 128, 256, 7, 7, 65536)),
    ("contrast", ("both", 16, 128, 32, 32, 16384)),
    ("maskd", ("detection", 2, 256, 6, 100, 168)),
    ("maskd", ("detection", 2, 256, 6, 25, 42)),
    ("af_dcd", ("loss", 2, 512, 64, 128, 4)),
    ("af_dcd", ("contrast", 2, 512, 64, 128, 4)),
    ("row_lse", (16384, 16384, 128)),
    ("row_lse", (1024, 1024, 128)),
    ("contrast", ("batch", 1, 128, 16, 16, 0)),
    ("contrast", ("batch", 16, 256, 32, 32, 0)),
    ("contrast", ("batch", 16, 128, 64, 64, 0)),
    ("maskd", ("segmentation", 8, 19, 8, 128, 256)),
    ("maskd", ("detection", 2, 256, 6, 50, 84)),
    ("af_dcd", ("contrast", 2, 512, 64, 128, 1)),
    ("row_lse", (256, 256, 128)),
    ("row_lse", (6272, 6272, 128)),
    ("row_lse", (6272, 65536, 256)),
]
CPU_CASES: list[tuple[str, Case]] = [  # small calls, where the cost of a call shows
    ("contrast", ("batch", 1, 128, 16, 16, 0)),
    ("contrast", ("batch", 4, 128, 16, 16, 0)),
    ("contrast", ("queue", 1, 128, 16, 16, 1024)),
    ("maskd", ("detection", 1, 64, 6, 16, 16)),
    ("af_dcd", ("contrast", 1, 64, 16, 16, 1)),
    ("row_lse", (256, 256, 128)),
]


class Problem(NamedTuple):
    """A problem of another subject."""

    part: Subject
    problem: Any


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """`case` is the subject and the words of its own case."""
    part = PARTS[case[0]]
    return Problem(part, part.problem(inner(case), dtype, device))


def inner(case: Case) -> Case:
    """The case of the other subject."""
    return tuple(int(word) if word.isdigit() else word for word in case[1].split())


def provider(name: str) -> Provider:
    """The provider of this name, whatever the subject."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        return problem.part.providers[name].run(problem.problem)

    return Provider(
        run,
        note=name,
        holds=lambda case: PARTS[case[0]].providers[name].holds(inner(case)),
    )


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """That of the other subject."""
    assert problem.part.truth is not None
    return problem.part.truth(problem.problem)


SUBJECT = Subject(
    name="overhead",
    summary="each loss and operator against plain PyTorch: host time, launches, GPU time, memory",
    columns={"what": ", ".join(PARTS), "size": "the case of that subject, in quotation marks"},
    cases={
        "cuda": [(name, label(case)) for name, case in CASES],
        "cpu": [(name, label(case)) for name, case in CPU_CASES],
    },
    small=("row_lse", "64 96 16"),
    problem=problem,
    providers={name: provider(name) for name in ("ours", "plain")},
    truth=truth,
    graph=True,
    rounds={"cpu": 30, "cuda": 30},
)
