"""The architecture: who imports whom, what an import loads, how long a file may be; README's commands.

Nothing here lists modules: a new file finds its place by where it stands.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from helpers import ROOT, python_blocks, run

PACKAGE = ROOT / "pixdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(
    folder for folder in (PACKAGE / "ops").iterdir() if (folder / "__init__.py").exists()
)
TOP = {"__init__", "__main__"}
"""Above everything: nothing imports them."""
BOTTOM = {"_checks", "_remedies"}
"""Below everything: they import nothing of the package but each other."""


def name_of(path: Path) -> str:
    """Dotted, below the package: "ops.row_lse" for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def files_imported_by(path: Path) -> set[str]:
    """Names of the package's files among them."""
    found = set()
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "pixdistill":
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((each for each in inner if each in NAMES), "__init__"))
    return found


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@each_file
def test_imports_run_one_way(path):
    """Modules, then `ops/<name>`, then `ops/backend`; `_checks` below everything."""
    name, imported = name_of(path), files_imported_by(path)
    if name in TOP:
        return
    assert not imported & (TOP | {"functional"})
    if name in BOTTOM:
        assert imported <= BOTTOM
    elif path.parent == PACKAGE / "ops":  # what all operators share
        assert imported <= BOTTOM | {"ops.backend"}
    elif path.is_relative_to(PACKAGE / "ops"):
        folder = ".".join(name.split(".")[:2])
        inside = {each for each in imported if each == folder or each.startswith(f"{folder}.")}
        operators = {name_of(each / "__init__.py") for each in FOLDERS}
        assert imported <= BOTTOM | inside | operators | {"ops.backend"}
    else:  # a module: operators by their public face only
        assert not any(each.startswith("ops.") and each.count(".") > 1 for each in imported)


def test_no_file_imports_itself_by_a_detour():
    edges = {name: files_imported_by(path) - TOP for name, path in NAMES.items()}
    # a folder's __init__ names its files, which may take what all of them share from it
    graph = {
        name: {each for each in others if not name.startswith(f"{each}.")}
        for name, others in edges.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


@each_file
def test_only_kernels_import_triton(path):
    """A kernel's file stands in the folder of its operator, and is loaded when it first runs."""
    names = {name.split(".")[0] for name in imports_of(path)}
    plain = {"__init__", "reference", "chunked", "launch"}
    if path.parent not in FOLDERS or path.stem in plain:
        assert "triton" not in names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_operators_have_the_same_files(folder):
    wanted = {"__init__", "reference", "chunked", "triton_kernels", "launch"}
    assert wanted <= {path.stem for path in folder.glob("*.py")}
    assert not files_imported_by(folder / "reference.py"), "the oracle shares no code"


@each_file
def test_files_are_short(path):
    """A loss of more than 270 lines holds something that belongs elsewhere."""
    text = path.read_text()
    loss = path.parent == PACKAGE and "Loss(nn.Module)" in text
    assert len(text.splitlines()) <= (270 if loss else 350)


def test_import_loads_nothing_beside_torch_and_einops():
    """Nor parts of torch that take long and that most programs never need."""
    before = "import sys, torch, einops; before = set(sys.modules); import pixdistill"
    loaded = ast.literal_eval(run("-c", f"{before}; print(sorted(set(sys.modules) - before))"))
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"torch"}
    assert packages == {"pixdistill"}
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.", "torch.onnx")
    assert not [name for name in loaded if name.startswith(heavy)]
    kernels = [name for name in loaded if name.endswith((".triton_kernels", ".hopper"))]
    assert not kernels


def test_works_where_triton_is_missing():
    """Every loss, with `import triton` failing."""
    code = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "tests")
from cases import LOSSES, build, inputs, outcome
print(all(outcome(build(name), *inputs(name)).grads[0].isfinite().all() for name in LOSSES))
"""
    assert run("-c", code).strip() == "True"


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
WITH_ITS_OWN_TESTS = "in_your_trainer.md"  # needs the extra "trainers"; see test_trainers.py


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_the_pages_runs(page):
    blocks = python_blocks(page.read_text())
    if blocks and page.name != WITH_ITS_OWN_TESTS:
        run("-W", "error", "-c", "\n".join(blocks))
    assert page.read_text().startswith("#") or "{" in page.read_text()


def test_readme_commands_are_those_of_ci():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest'
    assert command in readme
    assert command in ci
    assert (
        'python -m pip install -c constraints.txt ".[demo]" && python docs/examples/distill_digits.py'
        in readme
    )
