"""Prints the products of the kernels that may pass 2^31 and have only 32 bits.

    python tests/offsets.py row_lse | patch_lse

Such a product is one of a program's or a loop's number with a size or a stride. It is looked for in what
Triton's compiler makes of a kernel, so this runs in a process without the interpreter, and needs no GPU.
"""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels import Case, PatchCase, RowCase

ALL = frozenset({"WITH_KEY", "HAS_MASK", "EXCLUDE", "SUBTRACT_MAX", "WITH_MAX"})
CASES: dict[str, list[Case]] = {
    "row_lse": [
        RowCase("row_lse", "sm_80", "bf16", 16, ALL),
        RowCase("row_lse", "sm_80", "bf16", 16, ALL - {"HAS_MASK"}),
        RowCase("row_lse_grad_keys", "sm_80", "bf16", 16, ALL),
    ],
    "patch_lse": [
        PatchCase("sm_80", "fp32", 4, 8, 2, frozenset({"WITH_GRAD", "HAS_VALID", "WIDE"}))
    ],
}


def narrow_products(case: Case) -> list[str]:
    """Names of the 32-bit products that may overflow."""
    build = case.build()
    # a stride that is known to be 1 makes no product
    constants = {n: value for n, value in build.constants.items() if not n.startswith("stride_")}
    constants |= {name: 16 for name in ("BN", "BM") if "BM" in constants}
    names = [name for name in build.kernel.arg_names if name not in constants]
    types = {name: build.types.get(name, "i32") for name in names}
    source = ASTSource(build.kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=build.options)
    return _scan(built.asm["ttir"], names)


def _scan(ttir: str, names: list[str]) -> list[str]:
    """Follow numbers of programs, and sizes and strides, through the operations of a kernel."""
    head = next(line for line in ttir.splitlines() if "tt.func public" in line)
    arguments = dict(zip(names, re.findall(r"(%\w+): (?:!tt|i32|f32)", head), strict=True))
    sizes = set(arguments.values())
    numbers: set[str] = set()
    found = []
    for line in ttir.splitlines():
        operation = re.match(r"\s*(%\w+)(?::\d+)? = (.*?)(?: loc\(.*)?$", line)
        if operation is None:
            continue
        result, text = operation.groups()
        results = {result}
        if "scf.for" in text:
            index, bounds, carried = re.match(
                r"scf\.for (%\w+) = (.*?)(?: iter_args\((.*?)\))? ?(?:->.*|:.*)?$", text
            ).groups()
            numbers.add(index)
            for name, start in re.findall(r"(%\w+) = (%\w+)", carried or ""):
                numbers |= {name} if start in numbers else set()
                sizes |= {name} if start in sizes else set()
            text = bounds
        if "tt.load" in text:  # what is read is no offset
            continue
        operands = re.findall(r"%\w+", text)
        if "arith.muli" in text and re.search(r"(: |x)i32>?$", text.strip()):
            varying = all(operand in numbers | sizes for operand in operands)
            # There are fewer tiles than rows, so the number of a tile needs 32 bits.
            tile = arguments.get("tiles_per_split") in operands
            if varying and not tile and numbers.intersection(operands):
                found.append(result.strip("%"))
        if "tt.get_program_id" in text or numbers.intersection(operands):
            numbers |= results
        if sizes.intersection(operands):
            sizes |= results
    return found


if __name__ == "__main__":
    for case in CASES[sys.argv[1]]:
        for name in narrow_products(case):
            print(case.kernel, name)
