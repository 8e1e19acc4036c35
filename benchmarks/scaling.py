"""How time and memory of the contrast grow with N = M, until the memory or the patience ends."""

import math
import statistics

from . import peers
from .runner import Subject
from .sheet import Record

FITTED_FROM = 4096

SUBJECT = Subject(
    name="scaling",
    summary="how time and memory of the contrast grow with N = M",
    columns=peers.SUBJECT.columns,
    cases={
        "cpu": [(2**e, 2**e, 128) for e in range(10, 18)],
        "cuda": [(2**e, 2**e, 128) for e in range(10, 21)],
    },
    small=peers.SUBJECT.small,
    problem=peers.problem,
    providers={name: peers.PROVIDERS[name] for name in ("ours", "plain")},
    work=peers.SUBJECT.work,
)


def exponent(records: list[Record], provider: str, key: str) -> float | None:
    """The slope of log(key) over log(N), by least squares over N >= 4096; None for lack of points."""
    points = [
        (math.log(record["N"]), math.log(record[key]))
        for record in records
        if record["provider"] == provider and record["N"] >= FITTED_FROM and record.get(key)
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope
