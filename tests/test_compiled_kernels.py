"""Every kernel compiles for GPUs that are not here: tensor cores used, no register spilled."""

import json

from helpers import run

COMPILE = """
import json
from dataclasses import asdict
from benchmarks import kernels
def parts(case):  # what tells cases apart but for the flags; a layout is no more than another
    names = {name: value for name, value in vars(case).items() if name != "flags"}
    return names | {"aligned": "ALIGNED" in case.flags}
cases = list(kernels.cases())
for case in cases:
    fuller = any(parts(o) == parts(case) and o.flags > case.flags for o in cases)
    if case.kernel == "patch_lse":
        half = case.dtype != "fp32" and case.patch in (1, 4)
        fuller = fuller or half or case.width in (4, 16, 64, 256) or case.arch != "sm_80"
    if not fuller:
        built = asdict(kernels.compile_case(case))
        print(json.dumps(built | vars(case) | {"flags": sorted(case.flags)}))
"""


def test_compiled_kernels_have_tensor_cores_and_no_spills(tmp_path):
    """For sm_80 and sm_90, without a GPU. `python -m benchmarks kernels` does the same for all cases.

    Here only the fullest variants are compiled, since parts less need no more registers, and patch_lse
    for one architecture, since its launches are the same on all, and for few widths and dtypes.
    """
    out = run("-c", COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path)})
    records = [json.loads(line) for line in out.splitlines()]
    assert {(r["arch"], r["width"]) for r in records if r["kernel"] == "row_lse"} == {
        (a, d) for a in ("sm_80", "sm_90") for d in (64, 128, 256)
    }
    patches = [r for r in records if r["kernel"] == "patch_lse"]
    for flag in ("ALIGNED", "L2", "WIDE", "HAS_VALID"):
        assert {flag in r["flags"] for r in patches} == {False, True}
    for record in records:
        assert record["spills"] == 0, record
        assert record["tensor_core"] > 0 or record["kernel"] == "patch_lse", record
        assert record["programs"] >= 1, record
        if record["arch"] == "sm_80":  # the table that smaller GPUs share: 99 KiB a program
            assert record["shared"] <= 99 * 1024, record
