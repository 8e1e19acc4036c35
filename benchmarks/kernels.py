"""Compile every entry of the launch table for real GPUs, without one, and report what came out.

`python -m benchmarks kernels` prints registers, spills, shared memory, programs per multiprocessor
and tensor-core instructions for each. Nothing runs: Triton compiles ahead of time, and the `cuobjdump`
that it ships reads the binary.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pixdistill.ops.row_lse import launch as launch_table
from pixdistill.ops.row_lse import triton_kernels as tk

from . import report

# Registers, shared memory (bytes) and warps of a multiprocessor, and shared memory of one program.
LIMITS = {
    "sm_80": (65536, 164 * 1024, 64, 163 * 1024),
    "sm_86": (65536, 100 * 1024, 48, 99 * 1024),
    "sm_90": (65536, 228 * 1024, 64, 227 * 1024),
}
FORWARD_FLAGS = ("SHIFTED", "HAS_MASK", "EXCLUDE", "WITH_KEY", "WITH_MAX")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel, as the launcher would ask for it."""

    kernel: str  # "row_lse" or "row_lse_grad_keys"
    arch: str
    dtype: str  # Triton's name: "bf16", "fp16", "fp32"
    width: int
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def launch(self) -> launch_table.Launch:
        if self.kernel == "row_lse_grad_keys":
            return launch_table.GRAD_KEYS_LAUNCH[max(64, launch_table.padded_width(self.width))]
        return launch_table.launch_of(
            self.arch, DTYPES[self.dtype], self.width, "WITH_MAX" in self.flags
        )


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a case."""

    registers: int
    spills: int
    shared: int
    programs: int
    tensor_core: int


def cases(archs: tuple[str, ...] = ("sm_80", "sm_90")) -> Iterator[Case]:
    """Every table entry, from the barest variant that the losses launch to the fullest."""
    train = frozenset({"WITH_KEY"})
    full = train | {"HAS_MASK", "EXCLUDE", "WITH_MAX"}
    for arch in archs:
        for width in (64, 128, 256):
            yield Case("row_lse", arch, "bf16", width)
            yield Case("row_lse", arch, "bf16", width, train)
            yield Case("row_lse", arch, "bf16", width, train | {"EXCLUDE", "WITH_MAX"})
            yield Case("row_lse", arch, "bf16", width, full)
            yield Case("row_lse", arch, "fp16", width, full | {"SHIFTED"})
            yield Case("row_lse_grad_keys", arch, "bf16", width, full)
            yield Case("row_lse_grad_keys", arch, "fp16", width, full)
            if width in launch_table.FLOAT32_LAUNCH:
                yield Case("row_lse", arch, "fp32", width, train)
                yield Case("row_lse", arch, "fp32", width, full | {"SHIFTED"})
                yield Case("row_lse_grad_keys", arch, "fp32", width, full)


def compile_case(case: Case) -> Compiled:
    """Compile a case for its architecture and read the binary."""
    kernel = getattr(tk, f"{case.kernel}_kernel")
    launch = case.launch
    types = _argument_types(case)
    constants = {
        "BN": launch.BN,
        "BM": launch.BM,
        "BD": launch_table.padded_width(case.width),
        "PRECISION": "tf32",
        "stride_qd": 1,
        "stride_kd": 1,
        "stride_mm": 1,
    }
    constants |= {flag: flag in case.flags for flag in FORWARD_FLAGS if flag in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    aligned = {"N", "M", "D", "stride_qg", "stride_qn", "stride_kg", "stride_km"}
    attributes = {
        (i,): DIVISIBLE
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in aligned
    }
    target = GPUTarget("cuda", int(case.arch[3:]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    built = triton.compile(source, target=target, options=options)
    return _read(built, case)


def _argument_types(case: Case) -> dict[str, str]:
    pointers = dict.fromkeys(("query", "keys", "expected_key", "grad_keys"), f"*{case.dtype}")
    pointers |= dict.fromkeys(("scale", "lse", "largest", "grad_rows"), "*fp32")
    pointers["key_mask"] = "*u8"
    integers = ("G", "N", "M", "D", "tiles_per_split", "exclude_offset")
    strides = [f"stride_{side}" for side in ("qg", "qn", "qd", "kg", "km", "kd", "mg", "mm")]
    return pointers | dict.fromkeys((*integers, *strides), "i32")


def _read(built: "triton.compiler.CompiledKernel", case: Case) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    total, shared_total, warps_total, shared_most = LIMITS[case.arch]
    shared, warps = built.metadata.shared, case.launch.warps
    programs = 0
    if shared <= shared_most:
        by_registers = total // (-(-registers // 8) * 8 * 32 * warps)
        programs = min(by_registers, shared_total // (shared + 1024), warps_total // warps)
    mma = "HGMMA" if case.arch == "sm_90" else "HMMA"
    return Compiled(
        registers, local + stack, shared, programs, len(re.findall(rf"\b{mma}\b", sass))
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks kernels`."""
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=["sm_80", "sm_90"])
    parser.add_argument(
        "--output", type=Path, default=report.RESULTS, help="folder of the JSON file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compile, print, save; the exit status counts entries that spill or miss the tensor cores."""
    from tqdm import tqdm

    records = []
    for case in tqdm(list(cases(tuple(arguments.arch))), unit="kernel", disable=None):
        built = compile_case(case)
        records.append(
            {"kernel": case.kernel, "arch": case.arch, "dtype": case.dtype, "D": case.width}
            | {"flags": sorted(case.flags), "launch": list(case.launch)}
            | asdict(built)
        )
    print(report.table([_row(record) for record in records]))
    bad = [r for r in records if r["spills"] or not r["tensor_core"] or not r["programs"]]
    path = report.save("kernels", records, "cpu", arguments.output)
    print(f"\n{len(records)} kernels, {len(bad)} with a spill, without tensor cores or too large")
    print(f"written: {path}")
    return len(bad)


def _row(record: dict[str, Any]) -> dict[str, str]:
    rows, columns, warps, stages = record["launch"]
    return {
        "kernel": record["kernel"],
        "arch": record["arch"],
        "dtype": record["dtype"],
        "D": str(record["D"]),
        "variant": " ".join(record["flags"]).lower() or "lse only",
        "tile": f"{rows}x{columns} w{warps} s{stages}",
        "registers": str(record["registers"]),
        "spills": str(record["spills"]),
        "shared KiB": str(record["shared"] // 1024),
        "programs/SM": str(record["programs"]),
        "tensor-core": str(record["tensor_core"]),
    }
