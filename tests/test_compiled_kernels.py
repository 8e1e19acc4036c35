"""Every kernel compiles for GPUs that are not here: tensor cores used, no register spilled."""

import json

import pytest
from helpers import run

COMPILE = """
import json, sys
from benchmarks import kernel_calls, kernels

def fullest(operator, arch, dtype="bfloat16", width=0, **flags):
    "Parts less need no more registers; some tables are the same for all architectures."
    if operator == "row_lse":
        variant = {"bfloat16": "max_logit", "float16": "unbounded", "float32": "unbounded"}[dtype]
        hopper = arch == "sm_90" and dtype != "float32" and not set(flags) - {"D", "exclude"}
        labelled = flags.get("labels") and flags.get(variant)
        return hopper or labelled or (flags.get("key_mask") and "grad_keys" in flags)
    if operator == "patch_lse":
        return arch == "sm_80" and flags.get("valid_mask") and width in (8, 24, 128, 512, 2048)
    if operator == "masked_distance" and flags["size"] not in ((100, 168), (25, 42)):
        return False
    if operator in ("masked_distance", "patch_contrast"):
        return flags.get("valid_mask") and dtype != "float16"
    return True

arch = sys.argv[1]
for call in kernel_calls.calls():
    if fullest(call.operator, arch, **call.options):
        for record in kernels.compile_call(call, arch):
            print(json.dumps(record | call.options))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_kernels_have_tensor_cores_and_no_spills(arch, tmp_path):
    """Without a GPU. `python -m benchmarks kernels` does the same for all calls."""
    out = run("-c", COMPILE, arch, env={"TRITON_CACHE_DIR": str(tmp_path)})
    records = [json.loads(line) for line in out.splitlines()]
    assert {record["D"] for record in records if record["operator"] == "row_lse"} == {64, 128, 256}
    kernels = {record["kernel"] for record in records}
    assert {"row_lse_kernel", "row_lse_grad_keys_kernel"} <= kernels
    assert "_patch_lse" in kernels
    assert ("hopper_kernel" in kernels) == (arch == "sm_90")
    for record in records:
        assert record["spills"] == 0, record
        assert record["tensor_core"] > 0 or not record["uses_dot"], record
        assert record["uses_dot"] or not record["kernel"].startswith("row_lse"), record
        assert record["programs"] >= 1, record
        if arch == "sm_80":  # the table that smaller GPUs share: 99 KiB a program
            assert record["shared"] <= 99 * 1024, record
