"""`python -m pixdistill`: versions, devices, the backend of each operator, and a check of each backend.

For each operator, device and dtype it says which backend "auto" takes, and why not the fused kernel.
Then every backend that can run here computes a small problem, values and gradient, which is compared
with the dense reference in float64. The exit status is 1 if one is wrong. A report of a fault should
begin with this output.
"""

import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .ops import patch_lse, row_lse

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest error by the largest number. float32 on the tensor cores (TF32) has float16's mantissa.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Problem(NamedTuple):
    """A small problem of an operator: uneven blocks, something masked, something left out."""

    source: Tensor
    """What its result is differentiated by."""
    solve: Callable[[str], Tensor]
    """The result of a backend."""
    why_not_triton: str | None
    """Why "auto" does not take the fused kernel."""


def row_lse_problem(device: torch.device, dtype: torch.dtype, rounded: torch.dtype) -> Problem:
    """Unit vectors that `rounded` holds exactly, computed with in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    query, keys = (
        F.normalize(torch.randn(n, 32, generator=generator), dim=1).to(rounded).to(device, dtype)
        for n in (70, 150)
    )
    query.requires_grad_()
    key_mask = torch.arange(150, device=device) % 7 > 0
    solve = functools.partial(_row_lse, query, keys, key_mask)
    return Problem(query, solve, row_lse.why_not_triton(query))


def _row_lse(query: Tensor, keys: Tensor, key_mask: Tensor, backend: str) -> Tensor:
    return row_lse.row_lse(
        query, keys, 5.0, key_mask=key_mask, exclude_offset=3, logit_bound=5.0, backend=backend
    )


def patch_lse_problem(device: torch.device, dtype: torch.dtype, rounded: torch.dtype) -> Problem:
    """Maps that `rounded` holds exactly, computed with in `dtype`; the last patches are smaller."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 12, 5, 7, generator=generator).to(rounded).to(device, dtype)
        for _ in range(2)
    )
    student.requires_grad_()
    valid_mask = (torch.arange(70, device=device) % 9 > 0).view(2, 5, 7)
    solve = functools.partial(_patch_lse, student, teacher, valid_mask)
    return Problem(student, solve, patch_lse.why_not_triton(student, groups=3))


def _patch_lse(student: Tensor, teacher: Tensor, valid_mask: Tensor, backend: str) -> Tensor:
    margin = patch_lse.patch_lse(
        student,
        teacher,
        groups=3,
        patch=(2, 3),
        temperature=0.5,
        distance="l2",
        valid_mask=valid_mask,
        backend=backend,
    )
    return margin.masked_fill(~valid_mask.unsqueeze(1), 0.0)  # -inf


PROBLEMS = {"row_lse": row_lse_problem, "patch_lse": patch_lse_problem}
"""An operator each."""


def error(problem: Problem, backend: str, truth: Problem) -> float:
    """Largest error of value and gradient, relative to the largest number of the truth."""
    errors = []
    for ours, exact in zip(_solution(problem, backend), _solution(truth, "reference"), strict=True):
        difference = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
        errors.append(float(difference))
    return max(errors) if all(e == e for e in errors) else float("nan")


def _solution(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    value = problem.solve(backend)
    return value.detach(), torch.autograd.grad(value.sum(), problem.source)[0]


def versions() -> Iterator[str]:
    """Of everything that takes part."""
    yield f"pixdistill {__version__}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    for package in ("triton", "einops"):
        found = list(importlib.metadata.distributions(name=package))
        yield f"{package} {found[0].version}" if found else f"{package} is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "not set")
    yield f"float32 matmul precision {torch.get_float32_matmul_precision()!r}"
    yield f"TRITON_INTERPRET {interpreted}"
    backends = ("gloo", "nccl", "mpi", "ucc")
    available = dist.is_available()
    present = [name for name in backends if available and dist.is_backend_available(name)]
    yield f"torch.distributed: {', '.join(present) or 'none'}"


def devices() -> dict[torch.device, str]:
    """The CPU and every CUDA device, described."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {torch.device("cpu"): f"{capability}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        about = f"{facts.name}, sm_{facts.major}{facts.minor}, {memory:.0f} GiB"
        found[torch.device("cuda", index)] = about
    return found


def main() -> int:
    """Print the report; 1 if a backend is wrong, 0 otherwise."""
    for line in versions():
        print(line)
    for device, about in devices().items():
        print(f"{device}: {about}")

    print('\nbackend="auto" takes')
    for name, make in PROBLEMS.items():
        for device in devices():
            for dtype in DTYPES:
                reason = make(device, dtype, dtype).why_not_triton
                if reason is None and device.type == "cpu":
                    reason = "under the interpreter it is slow, and runs only when asked for"
                taken = "triton" if reason is None else f"torch   (not triton: {reason})"
                print(f"  {_label(name, device, dtype)}{taken}")

    print("\nlargest relative error of value and gradient, against the dense reference in float64")
    wrong = 0
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # or the fused kernel takes no float32
    for name, make in PROBLEMS.items():
        for device in devices():
            for dtype in DTYPES:
                for backend in ("reference", "torch", "triton"):
                    verdict, right = _verdict(make, device, dtype, backend)
                    wrong += not right
                    print(f"  {_label(name, device, dtype)}{backend:<11}{verdict}")
    torch.set_float32_matmul_precision(precision)
    print(f"\n{wrong} wrong: please report it" if wrong else "\nall right")
    return 1 if wrong else 0


def _verdict(
    make: Callable[..., Problem], device: torch.device, dtype: torch.dtype, backend: str
) -> tuple[str, bool]:
    """The error of a backend, or why there is none; False if it is wrong."""
    tf32 = dtype == torch.float32 and (backend == "triton" or device.type == "cuda")
    tolerance = TOLERANCE[torch.float16 if tf32 else dtype]
    truth = make(torch.device("cpu"), torch.float64, dtype)
    try:
        problem = make(device, dtype, dtype)
        if backend == "triton" and problem.why_not_triton is not None:
            return f"not run: {problem.why_not_triton}", True
        found = error(problem, backend, truth)
    except Exception as reason:  # whatever it is, the report has to hold it
        return f"FAILED: {type(reason).__name__}: {reason}", False
    right = found <= tolerance
    return f"{found:.1e}  {'ok' if right else f'WRONG: at most {tolerance:.0e} is right'}", right


def _label(name: str, device: torch.device, dtype: torch.dtype) -> str:
    return f"{name:<11}{device!s:<8}{str(dtype).removeprefix('torch.'):<10}"


if __name__ == "__main__":
    sys.exit(main())
