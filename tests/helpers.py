"""Truths derived without the library, and comparisons that must fail when they should."""

import contextlib
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "torch", "triton")


def needs_torch(version: str, what: str) -> pytest.MarkDecorator:
    """Skip with an older torch, which lacks something that a test needs; 2.6 is the oldest supported."""
    old = torch.__version__ < version
    return pytest.mark.skipif(old, reason=f"torch before {version}: {what}")


def python_blocks(markdown: str) -> list[str]:
    """The programs of a page."""
    return re.findall(r"^```python\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)


def run(*command: str, env: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """Output of a fresh interpreter in a folder, on the CPU, without Triton's interpreter."""
    gone = {"TRITON_INTERPRET", "WORLD_SIZE", "RANK", "LOCAL_RANK"}
    clean = {name: value for name, value in os.environ.items() if name not in gone}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    clean |= env or {}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def device_of(backend: str) -> str:
    """Kernels run on a GPU where there is one; the other backends are tested on the CPU."""
    return TRITON_DEVICE if backend == "triton" else "cpu"


def data_parallel(module: nn.Module) -> nn.DataParallel:
    """The wrapper as on a machine without a GPU: it runs the module on the CPU."""
    wrapper = nn.DataParallel(module)  # which moves the module to the only GPU
    wrapper.device_ids = []
    return wrapper.cpu()


def float32_tolerance(backend: str) -> float:
    """Of float32 at precision "high", which a GPU multiplies in TF32."""
    return 2e-3 if device_of(backend) == "cuda" else 1e-5


@contextmanager
def matmul_precision(precision: str):
    """The fused kernel takes float32 at "high", where the interpreter still multiplies exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def high_precision():
    """Import it into a test module to let its float32 tests reach every backend."""
    with matmul_precision("high"):
        yield


class Result(NamedTuple):
    """Values and gradients of one call, on the CPU."""

    value: Tensor
    grads: tuple[Tensor, ...]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit vectors, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def dense_row_lse(query, keys, scale, key_mask=None, exclude_offset=None) -> Tensor:
    """The truth in float64: boolean selection row by row, no masking arithmetic, no broadcasting."""
    query, keys = query.double(), keys.double()
    rows = []
    for n in range(query.shape[0]):
        seen = torch.ones(keys.shape[0], dtype=torch.bool) if key_mask is None else key_mask.clone()
        if exclude_offset is not None and 0 <= n + exclude_offset < keys.shape[0]:
            seen[n + exclude_offset] = False
        logits = (keys[seen] * query[n]).sum(dim=1) * scale
        rows.append(logits.logsumexp(0) if seen.any() else query[n].sum() * 0 - torch.inf)
    return torch.stack(rows) if rows else query.sum(dim=1)


def dense_contrast(
    student, teacher, temperature, image_of, valid, queue=None, in_batch=True,
    labels=None, queue_labels=None,
) -> Tensor:  # fmt: skip
    """The loss of each vector `[N]` in float64, by an explicit loop over anchors.

    `image_of` `[N]` limits in-batch negatives to vectors with the same number; of the anchor's label,
    unless that is negative, there are none.
    """
    student, teacher = F.normalize(student.double(), dim=1), F.normalize(teacher.double(), dim=1)
    losses = []
    for i in range(student.shape[0]):
        if not valid[i]:
            losses.append(student[i].sum() * 0)
            continue
        others = (image_of == image_of[i]) & valid
        others[i] = False
        rivals = queue
        if labels is not None and labels[i] >= 0:
            others &= labels != labels[i]
            rivals = None if queue is None else queue[queue_labels != labels[i]]
        pool = [teacher[i : i + 1]]
        if in_batch:
            pool.append(teacher[others])
        if rivals is not None:
            pool.append(rivals.double())
        logits = torch.cat(pool) @ student[i] / temperature
        losses.append(F.cross_entropy(logits.unsqueeze(0), torch.tensor([0])))
    return torch.stack(losses)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """|ours - truth| / |truth| in the Frobenius norm; infinite where they are not finite alike."""
    ours, truth = ours.detach().cpu().double(), truth.detach().cpu().double()
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    finite = truth.isfinite()
    if not torch.equal(
        ours[~finite].nan_to_num(nan=12345.0), truth[~finite].nan_to_num(nan=12345.0)
    ):
        return float("inf")
    error = (ours[finite] - truth[finite]).norm()
    if not error.isfinite():
        return float("inf")
    return float(error / truth[finite].norm().clamp_min(1e-30))


def assert_close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    """Relative Frobenius error at most `tolerance`."""
    error = relative_error(ours, truth)
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:.3g}"


def assert_within_budget(ours: Tensor, plain: Tensor, truth: Tensor, tiny: float) -> None:
    """At most twice the error that plain PyTorch makes in the same dtype."""
    budget = 2 * relative_error(plain, truth) + tiny
    error = relative_error(ours, truth)
    assert error <= budget, f"relative error {error:.3g} exceeds the budget {budget:.3g}"


def golden(name: str) -> dict[str, Tensor]:
    """A file of official outputs."""
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@contextmanager
def fresh_compiler():
    """Compiled code from before and after stays apart."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result of any operator."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
        return results


class _Operators(TorchDispatchMode):
    """Names of the operators that would launch a kernel: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        aliases = [result.alias_info for result in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and not name.startswith(
            ("empty", "new_empty", "promote_types", "pixdistill::")
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(call) -> list[str]:
    """Names of all that `call()` would launch on a GPU: PyTorch's operators and Triton's kernels.

    Kernels are counted under Triton's interpreter as on a GPU. `len` of it is what tests hold.
    """
    with _Operators() as counted, contextlib.ExitStack() as patches:
        if "triton" in sys.modules:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kind in (InterpretedFunction, JITFunction):

                def run(self, *args, original=kind.run, **kwargs):
                    counted.names.append(self.fn.__name__)
                    with _disable_current_modes():  # the interpreter copies tensors to the host
                        return original(self, *args, **kwargs)

                patches.enter_context(mock.patch.object(kind, "run", run))
        call()
    return counted.names
