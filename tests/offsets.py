"""Prints the products of the kernels that may pass 2^31 and have only 32 bits.

    python tests/offsets.py row_lse | patch_lse | masked_distance

Such a product is one of a program's or a loop's number with a size or a stride. It is looked for in what
Triton's compiler makes of a kernel, so this runs in a process without the interpreter, and needs no GPU.
"""

import re
import sys

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from benchmarks.kernel_calls import Call
from benchmarks.kernels import Launch, record

WIDTH, TILE = 32, 16
"""Of the rows of `row_lse`. It is a constant of the kernels, alone or times the rows of a tile."""
FULL = {"D": WIDTH, "key_mask": True, "exclude": True}
CALLS: dict[str, list[dict]] = {
    "row_lse": [
        FULL | {"max_logit": True, "unbounded": True},
        FULL | {"max_logit": True, "unbounded": True, "key_mask": False},
        FULL | {"grad_keys": True},
    ],
    "patch_lse": [{"groups": 4, "width": 8, "patch": 2, "valid_mask": True, "far": True}],
    "masked_distance": [
        {"weighted": True, "customized": True, "valid_mask": True},
        {"weighted": True, "masks": True},
    ],
    "patch_contrast": [{"dtype": "float32", "pool": 2, "valid_mask": True, "mean": True}],
}


def narrow_products(launch: Launch) -> list[str]:
    """Names of the 32-bit products that may overflow."""
    kernel, arguments = launch.kernel, launch.arguments
    # every other number may be anything: not specialised, so that no product is computed by the compiler
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    in_rows = "BM" in constants
    constants |= {name: TILE for name in ("BN", "BM", "BC") if name in constants and in_rows}
    constants |= {name: None for name, value in arguments.items() if value is None}
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: _type(arguments[name]) for name in names}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    target = GPUTarget("cuda", 80, 32)
    options = {
        k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages", "maxnreg")
    }
    ttir = triton.compile(source, target=target, options=options).asm["ttir"]
    return _scan(ttir, names, (WIDTH, TILE * WIDTH) if in_rows else ())


def _type(value: object) -> str:
    if isinstance(value, (Tensor, float)):
        return mangle_type(value)
    return "i32"


def _scan(ttir: str, names: list[str], constant_sizes: tuple[int, ...]) -> list[str]:
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
        constant = re.match(r"arith\.constant (\d+) : i32", text)
        if constant and int(constant[1]) in constant_sizes:
            sizes.add(result)
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
    operator = sys.argv[1]
    JITFunction.run = lambda *_, **__: None  # what is recorded is compiled once, as above
    for options in CALLS[operator]:
        for launch in record(Call(operator, options), "sm_80"):
            for name in narrow_products(launch):
                print(launch.kernel.fn.__name__, name)
