"""Random problems for the kernels of `row_lse`, to find what a fixed list of sizes would not.

    python -m benchmarks stress --device cuda --minutes 2

Each problem draws sizes, dtype, a scale, and what is excluded, masked or asked for. Every kernel that
takes it runs twice. Both runs must agree to the bit, since a race seldom repeats itself, and must agree
with float64 within the rounding of the dtype. At the end it prints what was covered.
"""

import argparse
import collections
import random
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixdistill.ops.row_lse import launch

# Largest error: of lse, absolute; of the weighted keys, by their norm.
TOLERANCE = {torch.bfloat16: (2e-5, 1.6e-2), torch.float16: (2e-5, 2e-3)}
CHECKED_ROWS = 512  # against float64, drawn from all rows

Labels = tuple[Tensor, Tensor]
"""Of queries and of keys: integers, of which equal ones do not meet."""


class Problem(NamedTuple):
    """One draw."""

    groups: int
    shared_keys: bool
    rows: int
    columns: int
    width: int
    dtype: torch.dtype
    scale: float
    exclude_offset: int | None
    masked: bool
    labelled: bool
    subtract_max: bool
    with_max: bool
    splits: int | None


def draw(rng: random.Random, small: bool) -> Problem:
    """Odd sizes more often than round ones; half of all problems suit the Hopper kernel."""
    most = 300 if small else 20000
    rows, columns = (
        max(1, int(most ** rng.random()) + rng.choice((-1, 0, 0, 1))) for _ in range(2)
    )
    groups = rng.choice((1, 1, 1, 2, 5)) if rows * columns < 4e6 else 1
    width = rng.choice((64, 128, 256, 128, 256, rng.randrange(1, 33) * 8, rng.randrange(1, 257)))
    plain = rng.random() < 0.5
    dtype = rng.choice((torch.bfloat16, torch.float16))
    return Problem(
        groups=groups,
        shared_keys=groups > 1 and rng.random() < 0.3,
        rows=rows,
        columns=columns,
        width=width,
        dtype=dtype,
        scale=rng.choice((1.0, 5.0, 1 / 0.07 if dtype == torch.bfloat16 else 8.0)),
        exclude_offset=rng.choice((None, 0, rng.randrange(-rows - 2, columns + 2))),
        masked=not plain and rng.random() < 0.5,
        labelled=not plain and rng.random() < 0.3,
        subtract_max=not plain and rng.random() < 0.5,
        with_max=not plain and rng.random() < 0.5,
        splits=rng.choice((None, None, 1, 2, 3, 7)),
    )


def tensors(
    problem: Problem, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor | None, Labels | None]:
    """Unit vectors in clusters, so that softmaxes are neither flat nor of one key; mask and labels.

    Labels are the clusters; one in eight is negative and matches nothing.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    centres = randn(16, problem.width)
    groups = 1 if problem.shared_keys else problem.groups
    sides, labels = [], []
    for count, rows in ((problem.groups, problem.rows), (groups, problem.columns)):
        cluster = torch.randint(16, (count, rows), device=device, generator=generator)
        sides.append(F.normalize(centres[cluster] + randn(count, rows, problem.width), dim=-1))
        labels.append((cluster - 2).int())
    query, keys = (side.to(problem.dtype) for side in sides)
    mask = None
    if problem.masked:
        mask = torch.rand(groups, problem.columns, device=device, generator=generator) < 0.7
    return query, keys, mask, (labels[0], labels[1]) if problem.labelled else None


def truth(
    problem: Problem,
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    labels: Labels | None,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, weighted keys and largest logit of some rows, dense, in float64."""
    logits = problem.scale * (query[:, rows].double() @ keys.double().mT)
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), -torch.inf)
    if labels is not None:
        own, other = labels[0][:, rows].unsqueeze(2), labels[1].unsqueeze(1)
        logits = logits.masked_fill((own == other) & (own >= 0), -torch.inf)
    if problem.exclude_offset is not None:
        column = torch.arange(problem.columns, device=query.device)
        hidden = column == (rows + problem.exclude_offset).unsqueeze(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return lse, weights @ keys.double(), logits.amax(dim=-1)


def solve(
    problem: Problem,
    hopper: bool,
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    labels: Labels | None,
):
    """lse, weighted keys and largest logit by one of the kernels."""
    from pixdistill.ops.row_lse import triton_kernels  # loads triton

    return triton_kernels.row_lse(
        query,
        keys,
        problem.scale,
        mask,
        problem.exclude_offset,
        labels,
        subtract_max=problem.subtract_max,
        with_weighted_keys=True,
        with_max=problem.with_max,
        splits=problem.splits,
        hopper=hopper,
    )


def errors(problem: Problem, results, exact, rows: Tensor) -> tuple[float, float]:
    """Of lse and largest logit, and of the weighted keys, inf where a row without keys is not -inf."""
    lse, weighted_keys, max_logit = results
    true_lse, true_keys, true_max = exact
    dead = true_lse == -torch.inf
    pairs = [(lse[:, rows], true_lse)] + (
        [(max_logit[:, rows], true_max)] if max_logit is not None else []
    )
    worst = 0.0
    for ours, right in pairs:
        if not torch.equal(ours == -torch.inf, dead):
            return float("inf"), float("inf")
        worst = max(worst, float((ours.double() - right).masked_fill(dead, 0.0).abs().max()))
    difference = (weighted_keys[:, rows].double() - true_keys).norm(dim=-1)
    relative = difference / true_keys.norm(dim=-1).clamp_min(1e-3)
    return worst, float(relative.max())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: cuda where there is a GPU")
    parser.add_argument("--minutes", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other problems")


def run(options: argparse.Namespace) -> int:
    """Solve problems until the time is over; the number of those that came out wrong."""
    rng = random.Random(options.seed)
    covered: collections.Counter[str] = collections.Counter()
    worst: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    wrong = 0
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        problem = draw(rng, small=options.device == "cpu")
        query, keys, mask, labels = tensors(problem, options.device, rng.randrange(2**31))
        rows = torch.randperm(problem.rows, device=query.device)[:CHECKED_ROWS]
        exact = truth(problem, query, keys, mask, labels, rows)
        kernels = [False]
        reason = launch.why_not_hopper(
            query,
            keys,
            mask,
            problem.scale,
            labels=labels,
            subtract_max=problem.subtract_max,
            with_weighted_keys=True,
            with_max=problem.with_max,
        )
        if reason is None:
            kernels.append(True)
        for hopper in kernels:
            name = "hopper" if hopper else "portable"
            first = solve(problem, hopper, query, keys, mask, labels)
            again = solve(problem, hopper, query, keys, mask, labels)
            same = all(a is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))
            found = errors(problem, first, exact, rows)
            limits = TOLERANCE[problem.dtype]
            right = same and all(e <= limit for e, limit in zip(found, limits, strict=True))
            if not right:
                wrong += 1
                print(f"WRONG {name}, same bits {same}, errors {found}: {problem}", flush=True)
            worst[name] = [max(pair) for pair in zip(worst[name], found, strict=True)]
            flags = [
                f
                for f in ("masked", "labelled", "subtract_max", "with_max", "shared_keys")
                if getattr(problem, f)
            ]
            flags += ["excluded"] if problem.exclude_offset is not None else []
            flags += ["padded"] if problem.width not in (64, 128, 256) else []
            flags += ["split"] if (problem.splits or 1) > 1 else []
            flags += ["batch"] if problem.groups > 1 else []
            dtype = str(problem.dtype).removeprefix("torch.")
            for label in (
                dtype,
                f"width {launch.padded_width(problem.width)}",
                *(flags or ["plain"]),
            ):
                covered[f"{name:<9}{label}"] += 1
            covered[f"{name:<9}all"] += 1
    print("problems covered")
    for label in sorted(covered):
        print(f"  {label:<24}{covered[label]:>7}")
    for name, (lse, weighted_keys) in worst.items():
        print(f"{name}: largest error of lse {lse:.1e}, of the weighted keys {weighted_keys:.1e}")
    print(f"{wrong} wrong" if wrong else "all right, the same bits twice")
    return wrong
