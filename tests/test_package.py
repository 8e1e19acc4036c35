"""What holds for the package as a whole: imports, memory, examples and documentation."""

import ast
import json
import re

import pytest
import torch
from helpers import ROOT, python_blocks, run

PACKAGE = ROOT / "pixdistill"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "functional": 3,
    "af_dcd": 2,
    "masked_distillation": 2,
    "pixel_contrast": 2,
    "spatial_adaptor": 2,
    "mhsa_plugin": 2,
    "receptive_tokens": 1,
    "pixel_queue": 1,
    "_head_layers": 1,
    "_projectors": 1,
    "distributed": 0,
    "_checks": 0,
    "ops": 0,
}
"""Who may import whom: only lower numbers. The package's __init__ and __main__ are above them all."""


def imports_of(path) -> list[str]:
    """Absolute names of everything that a file imports, at any depth of its code."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split(".")))
            names += [f"{module}.{alias.name}".replace("..", ".") for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imports_of(path):
        if name.startswith("triton"):
            assert parts[-1] == "triton_kernels", f"{path} imports {name}"
        if not name.startswith("pixdistill.") or parts in (("__init__",), ("__main__",)):
            continue
        target = name.split(".")[1:]
        if parts[0] != "ops":
            assert LAYERS[target[0]] < LAYERS[parts[0]], f"{path} imports {name}"
        else:
            assert target[0] == "ops", f"{path} imports {name}"
            if parts[-1] == "reference":
                pytest.fail(f"the oracle shares no code, but imports {name}")
            if parts[-1] in ("chunked", "launch", "arguments"):
                pytest.fail(f"{path} imports {name}")
            if parts[-1] == "triton_kernels":
                assert target[2] == "launch", f"{path} imports {name}"


def test_import_loads_neither_triton_nor_anything_for_demos():
    before = "import sys, torch; before = set(sys.modules); import pixdistill"
    loaded = run("-c", f"{before}; print(sorted(set(sys.modules) - before))")
    names = {name.split(".")[0] for name in ast.literal_eval(loaded)}
    assert not names & {"triton", "sklearn", "matplotlib", "tqdm", "numpy"}


def test_works_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch, pixdistill
student = torch.randn(2, 8, 4, 4, requires_grad=True)
pixdistill.PixelContrastLoss()(student, torch.randn(2, 8, 4, 4)).backward()
print(bool(student.grad.isfinite().all()))
"""
    assert run("-c", code).strip() == "True"


def test_peak_memory_never_holds_n_by_m():
    """N = M = 4096 in a fresh process: a matrix of logits is 64 MiB, and dense code holds several."""

    def rise(name):
        return int(
            run(
                "-m",
                "benchmarks",
                "row_lse",
                "--measure-memory",
                name,
                "4096",
                "4096",
                "32",
                "float32",
            )
        )

    dense, streamed = rise("plain torch"), rise("ours: torch")
    assert dense > 2 * 4096 * 4096 * 4  # the measurement sees what it should
    assert streamed < 16 * 2**20


def test_peak_memory_of_masked_distillation_is_a_few_maps():
    """B 2, C 64, T 6, 64 x 64: a map is 2 MiB, a tensor [B, T, C, H, W] 12 MiB."""

    def rise(name):
        case = ("detection", "2", "64", "6", "64", "64")
        return int(run("-m", "benchmarks", "maskd", "--measure-memory", name, "float32", *case))

    assert rise("materialising") > 3 * 12 * 2**20  # the measurement sees what it should
    assert rise("ours") < 12 * 2**20


def test_peak_memory_of_the_loss_with_components_and_mask():
    code = """
import pathlib, torch, pixdistill
def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
loss = pixdistill.PixelContrastLoss(negatives=("queue", "batch"), queue=pixdistill.PixelQueue(4096, 16))
def step(size):
    student = torch.randn(1, 16, size, size, requires_grad=True)
    valid = torch.rand(1, size, size) > 0.2
    loss.components(student, torch.randn(1, 16, size, size), valid_mask=valid).loss.backward()
step(8)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(64)
print(status("VmHWM") - before)
"""
    assert int(run("-c", code)) < 24 * 2**20  # 4096 pixels: one matrix of logits is 64 MiB


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


def test_adapted_head_smoke(tmp_path):
    picture = tmp_path / "adaptor.png"
    out = run("docs/examples/adapted_head.py", "--maps", "2", "--output", str(picture))
    largest = {line.split(",")[0]: float(line.split()[-1]) for line in out.splitlines()[1:5:2]}
    assert largest.keys() == {"MoCo v3", "DINO"}
    assert min(largest.values()) > 0.1
    adapted = [max(map(float, line.split()[-7:])) for line in out.splitlines()[2:5:2]]
    assert max(adapted) < 1e-5
    assert picture.stat().st_size > 20_000


def test_receptive_field_smoke(tmp_path):
    picture = tmp_path / "field.png"
    options = ("--seeds", "1", "--steps", "3", "--images", "2")
    out = run("docs/examples/receptive_field.py", *options, "--output", str(picture))
    outside = {line.split()[0]: float(line.split()[-4]) for line in out.splitlines()[1:4]}
    assert outside["untrained"] == outside["without"] == 0 < outside["with"]
    assert picture.stat().st_size > 20_000


def test_receptive_field_measures_cost():
    """Every setting, in one process: the script itself starts one for each, which takes long."""
    code = """
import sys
sys.path.insert(0, "docs/examples")
from receptive_field import COSTS, measure
for settings in COSTS:
    print(*measure((settings, (16, 24), 2)))
"""
    rows = [[float(number) for number in row.split()] for row in run("-c", code).splitlines()]
    assert len(rows) == 7
    assert all(seconds > 0 and extra < 256 for seconds, extra in rows)


def test_peak_memory_of_af_dcd_holds_no_distances():
    """256 patches of 256 vectors: their distances are 64 MiB, and plain code holds several of that."""

    def rise(name):
        case = ("contrast", "2", "64", "32", "64", "1")
        return int(run("-m", "benchmarks", "af_dcd", "--measure-memory", name, "float32", *case))

    assert rise("plain") > 3 * 256**2 * 256 * 4  # the measurement sees what it should
    assert rise("ours: torch") < 256**2 * 256 * 4 / 2  # blocks of 4 MiB; the allocator adds its own


def test_the_drawing_of_the_pairs_runs(tmp_path):
    picture = tmp_path / "pairs.png"
    run("docs/examples/draw_af_dcd_pairs.py", "--output", str(picture))
    assert picture.stat().st_size > 10_000


def test_distill_digits_smoke(tmp_path):
    picture = tmp_path / "digits.png"
    options = ("--seeds", "1", "--steps", "3", "--teacher-steps", "3", "--test-scenes", "8")
    options += ("--mask-steps", "3", "--output", str(picture))
    for loss, logits in (("pcd", "0"), ("all", "0.5")):
        choice = ("--loss", loss, "--logits", logits)
        out = run("docs/examples/distill_digits.py", *options, *choice)
        assert out.count("Verdict") == (1 if loss == "pcd" else 5)
    assert picture.stat().st_size > 20_000


def test_distill_pcd_smoke(tmp_path):
    """Two seeds by places that overlap, with intervals; one by the index of the cell."""
    picture = tmp_path / "pcd.png"
    sizes = ("--steps", "2", "--teacher-steps", "2", "--probe-steps", "2", "--scenes", "16")
    for seeds, pairing in (("2", "overlap"), ("1", "grid")):
        out = run(
            *("docs/examples/distill_pcd.py", *sizes, "--seeds", seeds, "--pairing", pairing),
            *("--output", str(picture)),
        )
        # its scores, the table, the statement
        assert out.count("PCD, no adaptor") == int(seeds) + 2
        assert "PCD minus each other row" in out
    assert picture.stat().st_size > 20_000


def test_learn_masks_smoke(tmp_path):
    picture, file = tmp_path / "masks.png", tmp_path / "masks.pth"
    options = ("--steps", "3", "--teacher-steps", "3", "--mask-steps", "3", "--test-scenes", "8")
    options += ("--output", str(picture), "--masks", str(file), "--num-tokens", "3")
    out = run("docs/examples/learn_masks.py", *options)
    assert "student through the masks" in out
    assert torch.load(file)["mask_token"].shape == (3, 11)
    assert picture.stat().st_size > 20_000


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
WITH_ITS_OWN_TESTS = "in_your_trainer.md"  # needs the extra "trainers"; see test_trainers.py


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_on_the_pages_runs(page):
    blocks = python_blocks(page.read_text())
    if blocks and page.name != WITH_ITS_OWN_TESTS:
        run("-W", "error", "-c", "\n".join(blocks))
    assert page.read_text().startswith("#") or "{" in page.read_text()


WAITS = {
    # The numbers of rows on other ranks are sizes of tensors here, and sizes live on the host.
    "distributed.py": [".tolist("],
    # A report that is printed; no training step passes there.
    "__main__.py": [".cpu("],
    # Of maps on a CPU only, where nothing has to wait.
    "ops/patch_lse/chunked.py": ["nonzero(", "nonzero("],
}
"""All calls in the package that may wait for a GPU."""


def test_no_host_synchronisation_in_the_package():
    """`tests/test_training_loops.py` looks at what runs, and captures a graph where there is a GPU."""
    waits = re.compile(r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|nonzero\(|synchronize\(")
    for path in MODULES:
        found = waits.findall(path.read_text())
        assert found == WAITS.get(str(path.relative_to(PACKAGE)), []), path


def test_readme_commands_are_those_of_ci():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest'
    assert command in readme
    assert command in ci
    assert (
        'python -m pip install -c constraints.txt ".[demo]" && python docs/examples/distill_digits.py'
        in readme
    )
