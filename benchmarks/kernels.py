"""Compile every entry of the launch tables for real GPUs, without one, and report what came out.

`python -m benchmarks kernels` prints registers, spills, shared memory, programs per multiprocessor
and tensor-core instructions for each. Nothing runs: Triton compiles ahead of time, and the `cuobjdump`
that it ships reads the binary.
"""

import argparse
import itertools
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

from pixdistill.ops.patch_lse import launch as patch_launch
from pixdistill.ops.patch_lse import triton_kernels as patch_kernels
from pixdistill.ops.row_lse import launch as row_launch
from pixdistill.ops.row_lse import triton_kernels as row_kernels

from . import report

# Registers, shared memory (bytes) and warps of a multiprocessor, and shared memory of one program.
LIMITS = {
    "sm_80": (65536, 164 * 1024, 64, 163 * 1024),
    "sm_86": (65536, 100 * 1024, 48, 99 * 1024),
    "sm_90": (65536, 228 * 1024, 64, 227 * 1024),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Build:
    """What Triton needs to know of a specialisation."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: set[str]  # integers that are multiples of 16
    options: dict[str, int]


@dataclass(frozen=True)
class RowCase:
    """One specialisation of a kernel of `row_lse`, as the launcher would ask for it."""

    kernel: str  # "row_lse" or "row_lse_grad_keys"
    arch: str
    dtype: str  # Triton's name: "bf16", "fp16", "fp32"
    width: int
    flags: frozenset[str] = field(default_factory=frozenset)

    @property
    def launch(self) -> row_launch.Launch:
        if self.kernel == "row_lse_grad_keys":
            return row_launch.GRAD_KEYS_LAUNCH[max(64, row_launch.padded_width(self.width))]
        return row_launch.launch_of(
            self.arch, DTYPES[self.dtype], self.width, "WITH_MAX" in self.flags
        )

    @property
    def tile(self) -> str:
        return f"{self.launch.BN}x{self.launch.BM} w{self.launch.warps} s{self.launch.stages}"

    def build(self) -> Build:
        kernel = getattr(row_kernels, f"{self.kernel}_kernel")
        launch = self.launch
        types = dict.fromkeys(("query", "keys", "weighted_keys", "grad_keys"), f"*{self.dtype}")
        types |= dict.fromkeys(("scale", "lse", "max_logit", "grad_rows"), "*fp32")
        constants = {"BN": launch.BN, "BM": launch.BM, "PRECISION": "tf32"}
        constants |= {"BD": row_launch.padded_width(self.width)}
        constants |= dict.fromkeys(("stride_qd", "stride_kd", "stride_mm"), 1)
        flags = ("SUBTRACT_MAX", "HAS_MASK", "EXCLUDE", "WITH_KEY", "WITH_MAX")
        constants |= {flag: flag in self.flags for flag in flags if flag in kernel.arg_names}
        aligned = {"N", "M", "D", "stride_qg", "stride_qn", "stride_kg", "stride_km"}
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        return Build(kernel, types | {"key_mask": "*u8"}, constants, aligned, options)


@dataclass(frozen=True)
class PatchCase:
    """One specialisation of the kernel of `patch_lse`: patch x patch pixels of this many groups.

    The flag ALIGNED stands for maps of whole runs of 16 numbers; without it, any strides are meant.
    """

    arch: str
    dtype: str
    groups: int
    width: int
    patch: int
    flags: frozenset[str]
    kernel: str = "patch_lse"

    @property
    def launch(self) -> patch_launch.Launch:
        vectors = self.groups * self.patch**2
        aligned, wide = "ALIGNED" in self.flags, "WIDE" in self.flags
        return patch_launch.launch_of(self.width, vectors, aligned, wide)

    @property
    def tile(self) -> str:
        return f"{self.launch.BD}x{self.launch.BN} w{self.launch.warps} r{self.launch.registers}"

    def build(self) -> Build:
        launch = self.launch
        types = dict.fromkeys(("student", "teacher", "grad"), f"*{self.dtype}")
        types |= {"valid": "*u8", "margin": "*fp32", "scale": "fp32"}
        constants = {"P": self.patch, "Q": self.patch, "BD": launch.BD, "BN": launch.BN}
        flags = ("L2", "OTHER_GROUPS", "HAS_VALID", "WITH_GRAD", "WIDE")
        constants |= {flag: flag in self.flags for flag in flags}
        constants |= {"PADDED": self.width != launch.BD}
        kernel = patch_kernels.strided_kernel
        if "ALIGNED" in self.flags:
            kernel = patch_kernels.aligned_kernel
            constants |= dict.fromkeys(("stride_sw", "stride_tw"), 1)
        # of sizes and strides, the compiler learns what the launcher lets it specialise on
        aligned = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}
        aligned -= constants.keys() | types.keys()
        options = {"num_warps": launch.warps, "num_stages": 1, "maxnreg": launch.registers}
        return Build(kernel, types, constants, aligned, options)


Case = RowCase | PatchCase


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
    for arch in archs:
        yield from _row_cases(arch)
        yield from _patch_cases(arch)


def _row_cases(arch: str) -> Iterator[RowCase]:
    train = frozenset({"WITH_KEY"})
    full = train | {"HAS_MASK", "EXCLUDE", "WITH_MAX"}
    for width in (64, 128, 256):
        yield RowCase("row_lse", arch, "bf16", width)
        yield RowCase("row_lse", arch, "bf16", width, train)
        yield RowCase("row_lse", arch, "bf16", width, train | {"EXCLUDE", "WITH_MAX"})
        yield RowCase("row_lse", arch, "bf16", width, full)
        yield RowCase("row_lse", arch, "fp16", width, full | {"SUBTRACT_MAX"})
        yield RowCase("row_lse_grad_keys", arch, "bf16", width, full)
        yield RowCase("row_lse_grad_keys", arch, "fp16", width, full)
        if width in row_launch.FLOAT32_LAUNCH:
            yield RowCase("row_lse", arch, "fp32", width, train)
            yield RowCase("row_lse", arch, "fp32", width, full | {"SUBTRACT_MAX"})
            yield RowCase("row_lse_grad_keys", arch, "fp32", width, full)


def _patch_cases(arch: str) -> Iterator[PatchCase]:
    train, aligned = frozenset({"WITH_GRAD"}), {"ALIGNED"}
    rule, mask = {"OTHER_GROUPS"}, {"HAS_VALID"}
    designs = (
        (16, 32, 4),
        (1, 512, 4),
        (16, 32, 1),
    )  # omni, spatial, channel; C 512, 4 x 4 patches
    for (groups, width, patch), layout in itertools.product(designs, (set(), aligned)):
        if layout and patch == 1:  # no four pixels of a patch are neighbours
            continue
        usual = layout | (rule if groups > 1 else set())
        full, wide = train | mask | layout, train | mask | {"WIDE"}  # long strides: not aligned
        yield PatchCase(arch, "fp32", groups, width, patch, frozenset(usual))
        yield PatchCase(arch, "fp32", groups, width, patch, train | usual)
        yield PatchCase(arch, "bf16", groups, width, patch, train | usual)
        yield PatchCase(arch, "fp32", groups, width, patch, train | usual | {"L2"})
        yield PatchCase(arch, "fp16", groups, width, patch, full)
        yield PatchCase(arch, "bf16", groups, width, patch, full | {"L2"})
        yield PatchCase(arch, "fp32", groups, width, patch, full | {"L2"} if layout else wide)
    for width, layout in itertools.product((4, 8, 16, 24, 64, 128, 256, 2048), (set(), aligned)):
        yield PatchCase(arch, "fp32", 16, width, 4, train | rule | mask | layout)
        full = train | mask | {"L2"}
        yield PatchCase(arch, "fp32", 16, width, 4, full | (layout or {"WIDE"}))
    for width, patch in ((8, 8), (32, 8), (32, 3)):
        layout = aligned if patch % 4 == 0 else set()
        yield PatchCase(arch, "bf16", 16, width, patch, train | rule | mask | layout)


def compile_case(case: Case) -> Compiled:
    """Compile a case for its architecture and read the binary."""
    build = case.build()
    names = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "i32")
        for name in names
    }
    attributes = {
        (i,): DIVISIBLE
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in build.aligned
    }
    target = GPUTarget("cuda", int(case.arch[3:]), 32)
    source = ASTSource(build.kernel, signature, build.constants, attributes)
    return _read(triton.compile(source, target=target, options=build.options), case)


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
            | {"flags": sorted(case.flags), "launch": list(case.launch), "tile": case.tile}
            | asdict(built)
        )
    print(report.table([_row(record) for record in records]))
    bad = [r for r in records if r["spills"] or not r["programs"] or _misses_tensor_cores(r)]
    path = report.save("kernels", records, "cpu", arguments.output)
    print(f"\n{len(records)} kernels, {len(bad)} with a spill, without tensor cores or too large")
    print(f"written: {path}")
    return len(bad)


def _misses_tensor_cores(record: dict[str, Any]) -> bool:
    """Whether a kernel made of matrix products has none; `patch_lse` sums absolute differences."""
    return record["kernel"] != "patch_lse" and not record["tensor_core"]


def _row(record: dict[str, Any]) -> dict[str, str]:
    return {
        "kernel": record["kernel"],
        "arch": record["arch"],
        "dtype": record["dtype"],
        "D": str(record["D"]),
        "variant": " ".join(record["flags"]).lower() or "values only",
        "tile": record["tile"],
        "registers": str(record["registers"]),
        "spills": str(record["spills"]),
        "shared KiB": str(record["shared"] // 1024),
        "programs/SM": str(record["programs"]),
        "tensor-core": str(record["tensor_core"]),
    }
