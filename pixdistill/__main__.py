"""Print versions, devices, and for each operator its backend, its error, and why no fused kernel runs.

The error is the largest of value and gradient on a small problem, against the dense reference in
float64, relative to the largest element. The exit status is 1 where one is too large or an operator
fails. A bug report should begin with this output.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from . import __version__
from .af_dcd import AfDCDLoss
from .masked_distillation import masked_distillation_loss
from .ops.backend import Backend
from .ops.patch_lse import patch_lse
from .ops.row_lse import row_lse
from .pixel_contrast import PixelContrastLoss

Call = Callable[[Tensor, Tensor, Backend], Tensor]
OPERATORS: dict[str, Call] = {
    "contrast": lambda s, t, backend: PixelContrastLoss(backend=backend)(s, t),
    "masked_distance": lambda s, t, backend: masked_distillation_loss(
        s, t, t[:, :3].sigmoid(), backend=backend
    ),
    "patch_contrast": lambda s, t, backend: AfDCDLoss(
        8,
        8,
        num_groups=2,
        patch_size=2,
        pool_size=2,
        ragged="pad",
        temperature=1.0,
        mask_ratio=0.0,
        projector=torch.nn.Identity(),
        backend=backend,
    )(s, t),
    "row_lse": lambda s, t, backend: row_lse(
        s.flatten(2).mT, t.flatten(2).mT, 0.5, exclude_offset=3, backend=backend
    ),
    "patch_lse": lambda s, t, backend: patch_lse(
        s, t, num_groups=2, patch_size=(5, 7), temperature=1.0, backend=backend
    ),
}
"""From maps `[B, C, H, W]` to a result that is differentiable with respect to the first."""

TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-5}


def main() -> int:
    """Print the report. Returns 1 where an operator is wrong, 0 otherwise."""
    argparse.ArgumentParser("python -m pixdistill", description=__doc__).parse_args()
    for line in versions():
        print(line)
    for device, about in devices().items():
        print(f"{device}: {about}")
    print(f"\n{'operator':<17}{'device':<8}{'dtype':<10}{'backend':<9}{'error':<9}why not triton")
    wrong = 0
    for name, call in OPERATORS.items():
        for device in devices():
            for dtype, tolerance in TOLERANCE.items():
                row, right = check(call, device, dtype, tolerance)
                wrong += not right
                print(f"{name:<17}{device:<8}{str(dtype)[len('torch.') :]:<10}{row}".rstrip())
    print(f"\n{wrong} wrong: please report it" if wrong else "\nall right")
    return 1 if wrong else 0


def versions() -> Iterator[str]:
    """Versions and settings of everything that takes part, one per line."""
    yield f"pixdistill {__version__}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    for package in ("triton", "einops"):
        found = list(importlib.metadata.distributions(name=package))
        yield f"{package} {found[0].version}" if found else f"{package} is not installed"
    yield f"TRITON_INTERPRET {os.environ.get('TRITON_INTERPRET', 'not set')}"
    present = [b for b in ("gloo", "nccl") if dist.is_available() and dist.is_backend_available(b)]
    yield f"torch.distributed {', '.join(present) or 'not available'}"


def devices() -> dict[str, str]:
    """The CPU and every CUDA device, described."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{capability}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {memory}"
    return found


def check(call: Call, device: str, dtype: torch.dtype, tolerance: float) -> tuple[str, bool]:
    """The end of a row: what "auto" takes, its error, why not Triton; and whether it is right."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 8, 5, 7, generator=generator).to(dtype) for _ in range(2))
    try:
        reason = why_not_triton(call, student.to(device), teacher.to(device))
        ours = solve(call, student.to(device), teacher.to(device), "auto")
        truth = solve(call, student.double(), teacher.double(), "reference")
    except Exception as fault:  # whatever it is, the report has to show it
        return f"FAILED: {type(fault).__name__}: {fault}", False
    errors = [(x.cpu() - y).abs().max() / y.abs().max() for x, y in zip(ours, truth, strict=True)]
    error = float(torch.stack(errors).max())
    right = error <= tolerance
    verdict = "" if right else f"WRONG: above {tolerance:.0e}  "
    return f"{'torch' if reason else 'triton':<9}{error:<9.1e}{verdict}{reason}", right


def why_not_triton(call: Call, student: Tensor, teacher: Tensor) -> str:
    """The reason why "auto" does not take the fused kernel; empty where it does."""
    try:
        call(student, teacher, "triton")
    except ValueError as refusal:
        reason = str(refusal).partition(" cannot run here: ")[2]
        if not reason:
            raise
        return reason.removesuffix('. Use backend="auto".')
    return "interpreted kernels run only when asked for" if student.device.type == "cpu" else ""


def solve(call: Call, student: Tensor, teacher: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    student.requires_grad_()
    value = call(student, teacher, backend)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `python -m pixdistill | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 1
    sys.exit(status)
