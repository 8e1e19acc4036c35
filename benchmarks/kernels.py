"""Compile the kernels of real calls for real GPUs, without one, and report what came out.

The operators are called with tensors that have no data, on a GPU that does not exist; what they would
launch is compiled for it, exactly as there. `python -m benchmarks kernels` prints registers, spills,
shared memory, programs per multiprocessor and tensor-core instructions of each kernel. Nothing runs.
"""

import argparse
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import gauges
from .kernel_calls import OPERATORS, Call, calls
from .sheet import RESULTS, as_json, table

# Registers, shared memory (bytes) and warps of a multiprocessor, and shared memory of one program.
LIMITS = {
    "sm_80": (65536, 164 * 1024, 64, 163 * 1024),
    "sm_86": (65536, 100 * 1024, 48, 99 * 1024),
    "sm_90": (65536, 228 * 1024, 64, 227 * 1024),
}
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132}


class Launch(NamedTuple):
    """One launch of a kernel: arguments by name, tensors without data."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    compiled: Any


# --- A GPU that does not exist --------------------------------------------------------------------


@functools.cache
def pretend(arch: str) -> list[Launch]:
    """Let this process take itself for a machine with such a GPU; its launches go into the list.

    It cannot be undone.
    """
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from pixdistill.ops import backend

    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    major, minor = int(arch[3:-1]), int(arch[-1])
    facts = types.SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[arch], major=major, minor=minor, name=arch
    )
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: (major, minor)
    cuda.get_device_properties = lambda *_: facts
    cuda._exchange_device = cuda._maybe_exchange_device = lambda _: 0
    driver: Any = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", int(arch[3:]), 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver.set_active(driver)
    backend.without_data = lambda: False  # else operators launch nothing for such tensors
    launches: list[Launch] = []
    compile_and_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = self.signature.bind(
            *args, **{k: v for k, v in kwargs.items() if k in self.arg_names}
        )
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(Launch(self, bound.arguments, options, compiled))
        return compiled

    JITFunction.run = run
    FakeTensorMode().__enter__()
    _Indexing().__enter__()
    return launches


class _Indexing(TorchFunctionMode):
    """Indexing by operators: Python's own asks for the device, which does not exist."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        axis = 0
        for part in index if isinstance(index, tuple) else (index,):
            if part is Ellipsis:
                axis = tensor.dim() - sum(i is not None for i in index) + axis + 1
            elif part is None:
                tensor = torch.ops.aten.unsqueeze(tensor, axis)
                axis += 1
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop, part.step or 1)
                axis += 1
            else:
                tensor = torch.ops.aten.select(tensor, axis, part)
        return tensor


# --- Compiling ------------------------------------------------------------------------------------


def record(call: Call, arch: str) -> list[Launch]:
    """What the call launches. The process is spoilt for anything else, and for other architectures."""
    torch.set_float32_matmul_precision("high")  # the kernels take float32 then
    launches = pretend(arch)
    launches.clear()
    OPERATORS[call.operator][0](**call.options)
    return list(launches)


def compile_call(call: Call, arch: str) -> list[dict[str, Any]]:
    """What became of each kernel that the call launches."""
    return [
        {"operator": call.operator, "call": str(call), "arch": arch} | read(launch, arch)
        for launch in record(call, arch)
    ]


def read(launch: Launch, arch: str) -> dict[str, Any]:
    """What the assembler made of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    metadata = launch.compiled.metadata
    shared, warps = metadata.shared, metadata.num_warps
    total, shared_total, warps_total, shared_most = LIMITS[arch]
    programs = 0
    if shared <= shared_most:
        by_registers = total // (-(-registers // 8) * 8 * 32 * warps)
        programs = min(by_registers, shared_total // (shared + 1024), warps_total // warps)
    few_rows = launch.kernel.fn.__name__ == "read_kernel"  # 16 tokens: below a warpgroup's 64 rows
    mma = "HGMMA" if arch == "sm_90" and not few_rows else "HMMA"
    tile = {k: v for k, v in launch.arguments.items() if k[0] == "B" and isinstance(v, int)}
    return {
        "kernel": launch.kernel.fn.__name__,
        "hash": launch.compiled.hash,
        "tile": " ".join(f"{name}={size}" for name, size in tile.items()),
        "warps": warps,
        "registers": registers,
        "spills": stack + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "programs": programs,
        "tensor_core": len(re.findall(rf"\b{mma}\b", sass)),
        "uses_dot": "tt.dot" in launch.compiled.asm.get("ttir", ""),
    }


def cuobjdump(option: str, path: str) -> str:
    """Triton's own."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(archs: list[str], every: list[Call]) -> list[dict[str, Any]]:
    """The records of all calls, each kernel once; in processes, one architecture each."""
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    records: dict[tuple[str, str], dict[str, Any]] = {}
    processes = max(1, (os.cpu_count() or 2) // 2)
    for arch in archs:
        with ProcessPoolExecutor(processes, context) as pool:
            futures = [pool.submit(compile_call, call, arch) for call in every]
            for future in tqdm(futures, arch, unit="call", disable=None):
                for record in future.result():
                    records.setdefault((arch, record["hash"]), record)
    return list(records.values())


# --- Command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks kernels`."""
    named = ", ".join(OPERATORS)
    parser.add_argument(
        "--operator",
        nargs="+",
        choices=OPERATORS,
        metavar="NAME",
        default=list(OPERATORS),
        help=f"only the kernels of these: {named}",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=LIMITS,
        metavar="ARCH",
        default=["sm_80", "sm_90"],
        help=f"of {', '.join(LIMITS)}; default: sm_80 sm_90",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of kernels.json")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print, save; the exit status counts kernels that spill or miss the tensor cores."""
    os.environ.pop("TRITON_INTERPRET", None)
    records = compile_all(arguments.arch, [c for c in calls() if c.operator in arguments.operator])
    print(table([row(record) for record in records]))
    bad = [record for record in records if is_bad(record)]
    path = arguments.output / "kernels.json"
    facts = {"torch": gauges.version("torch"), "triton": gauges.version("triton")}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json({"machine": facts}, records))
    print(f"\n{len(records)} kernels, {len(bad)} with a spill, without tensor cores or too large")
    print(f"written: {path}")
    return len(bad)


def is_bad(record: dict[str, Any]) -> bool:
    """Whether a kernel spills, does not fit, or multiplies matrices without the tensor cores."""
    return bool(
        record["spills"]
        or not record["programs"]
        or (record["uses_dot"] and not record["tensor_core"])
    )


def row(record: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    cells = {key: str(record[key]) for key in ("kernel", "arch", "call", "tile", "warps")}
    cells |= {key: str(record[key]) for key in ("registers", "spills")}
    cells |= {"shared KiB": str(record["shared"] // 1024), "programs/SM": str(record["programs"])}
    return cells | {"tensor-core": str(record["tensor_core"])}
