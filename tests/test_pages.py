"""What the pages state: examples run, commands exist, figures were measured.

`test_code_on_the_pages_runs` runs all programs but those of "In your trainer" (`test_trainers.py`).
"""

import doctest
import importlib
import itertools
import json
import re
import shlex
import shutil
from importlib.util import find_spec

import pytest
import torch
from helpers import ROOT, run

import pixdistill
import pixdistill.functional
from benchmarks import targets
from benchmarks.__main__ import OTHERS
from benchmarks.subjects import SUBJECTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "recipes").glob("*.md"))
TOOLS = {"pip", "pytest", "sphinx", "build", "twine", "coverage", "venv"}
"""Modules of other projects that pages call by `python -m`."""
BENCHMARKS = {"--help", "all", *SUBJECTS, *OTHERS}
THEIRS = {"train.py"}
"""Files that the reader writes."""
if not (ROOT / "tests" / "mutation").exists():  # as in the sdist
    THEIRS |= {"tests/mutation/run.py", "tests/mutation/faults.txt"}


def documented_modules() -> list[str]:
    """All modules that can be imported without Triton and are not a program."""
    files = (ROOT / "pixdistill").rglob("*.py")
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return sorted(n for n in names if not n.endswith((".triton_kernels", ".__main__", ".__init__")))


def test_examples_in_docstrings_run():
    tried = 0
    for name in (*documented_modules(), "pixdistill.ops.row_lse", "pixdistill.ops.patch_lse"):
        module = importlib.import_module(name)
        names = {"torch": torch, "nn": torch.nn} | vars(pixdistill) | vars(module)
        for case in doctest.DocTestFinder().find(module, name, globs=names):
            result = doctest.DocTestRunner().run(case)
            assert result.failed == 0, case.name
            tried += result.attempted > 0
    assert tried >= 8


def commands(text: str) -> list[list[str]]:
    """The words of every command on a page, in `text` blocks and in code."""
    blocks = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for part in (part.strip() for line in lines for part in line.split("&&")):
        if re.match(r"\w+\.py --", part):  # an example by its name alone
            part = f"python {'' if part.split()[0] in THEIRS else 'docs/examples/'}{part}"
        if re.match(r"([A-Z_]+=\S+ )*(python|torchrun|bash|ruff) ", part):
            words = shlex.split(part, comments=True)
            found.append([word for word in words if not re.match(r"[A-Z_]+=", word)])
    return found


def sources_of(words: list[str]) -> str:
    """The source that reads a command's options; empty for tools of other projects."""
    if words[1:3] == ["-m", "benchmarks"]:
        assert len(words) < 4 or words[3].isupper() or words[3] in BENCHMARKS, words
        return "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    if words[1] == "-m":
        assert words[2] in TOOLS or find_spec(words[2]), words
        return ""
    if not words[1].endswith(".py") or words[1] in THEIRS:
        return ""
    assert (ROOT / words[1]).is_file(), words
    shared = ROOT / words[1].rpartition("/")[0] / "common.py"  # the flags of all recipes
    return (ROOT / words[1]).read_text() + (shared.read_text() if shared.is_file() else "")


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return set(re.findall(r"^(\w+) = \[", text.partition("\n[")[0], flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_exist(page):
    text = page.read_text()
    for words in commands(text):
        source = sources_of(words)
        for word in words[2:]:
            option = word.partition("=")[0]
            if source and option.startswith("--") and option != "--help":
                assert f'"{option}"' in source, words
            if re.fullmatch(r"\.\[[\w,]+\]", word):
                assert set(word[2:-1].split(",")) <= extras(), words
            if word.startswith(("tests/", "docs/")) and "_build" not in word:
                assert (ROOT / word).exists(), words
        if "-c" in words[2:] and "pip" in words:
            assert (ROOT / words[words.index("-c") + 1]).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_the_prose_names_exist(page):
    programs = [*(ROOT / "docs").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    known = "".join(program.read_text() for program in programs)
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"No result yet in `[^`]+`", "", prose)
    for code in re.findall(r"`([^`\n]+)`", prose):
        for path in re.findall(r"\b(?:docs|tests|benchmarks|pixdistill)/[\w./]+\w", code):
            written = "example_loss" in path or "_build" in path or path in THEIRS
            assert written or (ROOT / path).exists(), path
        if code.startswith("--") and code != "--help":
            assert f'"{code.split()[0]}"' in known, code
    for target in re.findall(r"\]\(([^)#:]+)\)|\]: (?!https)(\S+)|src=\"([^\"]+)\"", prose):
        assert (page.parent / next(filter(None, target))).exists(), target


def test_readme_keeps_its_relative_links_in_one_place():
    """They break on a package index, and become absolute there once the project has an address."""
    text, found, places = (ROOT / "README.md").read_text().partition("<!-- HOME: ")
    assert found
    assert not re.findall(r"\]\((?!https://)|src=|\]: (?!https://)", text)
    assert len(re.findall(r"^\[[\w-]+\]: (?!https)", places, flags=re.MULTILINE)) > 10


def test_the_habits_name_what_the_project_supports():
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", project)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow.partition("include")[0]) == versions
    assert "bash .ci/run" in workflow
    for package in ("torch", "triton"):
        (oldest,) = re.findall(rf"{package}>=([\d.]+)", project)
        assert f"{package}=={oldest}" in workflow
    assert "python -m pixdistill" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    papers = re.findall(r"arxiv\.org/abs/([\d.]+)", (ROOT / "README.md").read_text())
    assert re.findall(r"arXiv:([\d.]+)", (ROOT / "CITATION.cff").read_text()) == papers


def listed() -> dict[str, object]:
    """What the API page lists, by its full name."""
    found: dict[str, object] = {}
    module = ""
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        if re.fullmatch(r"   \w+", line):
            name = f"{module}.{line.strip()}"
            found[name] = getattr(importlib.import_module(module), line.strip())
    return found


def test_every_name_is_on_the_api_page():
    for module in (pixdistill, pixdistill.functional):
        public = {name: v for name, v in vars(module).items() if callable(v) and name[0] != "_"}
        assert public
        for name, value in public.items():
            assert any(value is each for each in listed().values()), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_the_api_lead_somewhere(page):
    for target in re.findall(r"\{py:\w+\}`~?(pixdistill[\w.]*)`", page.read_text()):
        first = ".".join(target.split(".")[:-1])
        assert target in listed() or (
            first in listed() and hasattr(listed()[first], target.split(".")[-1])
        ), target


STEPS = {
    "PCD,": ("step_h200_bfloat16", {"task": "pcd"}),
    "MasKD,": ("step_h200_bfloat16", {"task": "detection-maskd"}),
    "Af-DCD,": ("step_h200_bfloat16", {"task": "segmentation-af_dcd"}),
}
CALLS = {
    "contrast on 16 maps": ("contrast_h200_bfloat16", {"B": 16, "C": 128, "H": 32, "K": 0}),
    "contrast on 128 maps": ("contrast_h200_bfloat16", {"B": 128}),
    "contrast, 8192 x 8192": ("peers_cpu_float32", {"N": 8192, "D": 128}),
    "contrast, 6272 x 65536": ("peers_cpu_float32", {"N": 6272, "D": 256}),
    "masked distance": ("maskd_cpu_float32", {"H": 100, "B": 2}),
    "contrast inside patches": ("af_dcd_cpu_float32", {"part": "contrast", "pool": 2}),
    "whole `AfDCDLoss`": ("af_dcd_cpu_float32", {"part": "loss", "pool": 4}),
}
"""Rows of README's tables: their beginning, and which records of which file they show."""


def readme_cells(row: str) -> list[str]:
    """The cells of the row that begins so."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    return line.strip("| ").split(" | ")


def records_of(file: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())["records"]


@pytest.mark.parametrize("row", STEPS | CALLS)
def test_readme_shows_what_was_measured(row):
    file, sizes = (STEPS | CALLS)[row]
    what, *cells = readme_cells(row)
    providers = ["plain", "ours", "squared-error"]
    if row in CALLS:
        device, *cells = cells
        assert device.lower().split(", ") == file.split("_")[-2:]
        providers.remove("squared-error")
    for cell, provider in zip(cells, providers, strict=True):
        wanted = sizes | {"provider": provider}
        (record,) = [r for r in records_of(file) if wanted.items() <= r.items()]
        milliseconds = float(f"{record['seconds'] * 1e3:.3g}")
        if row in CALLS:
            size = f"{record['extra_bytes'] / 2**20:.0f} MiB"
        else:
            size = f"{record['peak_bytes'] / 2**30:.1f} GiB"
            assert f"{record['B']} images" in what
        assert cell == f"{milliseconds:g} ms, {size}", provider


def test_the_landing_page_repeats_figures_of_readme():
    section = (ROOT / "docs" / "index.md").read_text().partition("## Three figures")[2]
    figures = re.findall(r"[\d.]+ (?:ms|%|MiB|GiB)", section.partition("\n## ")[0])
    assert len(figures) == 12
    readme = (ROOT / "README.md").read_text()
    assert not [figure for figure in figures if not re.search(rf"\b{figure}", readme)]


def test_readme_says_how_many_targets_are_missed():
    text = targets.reached(ROOT / "benchmarks" / "results", "h200")
    missed, every = text.count("| missed"), len(text.splitlines()) - 2
    assert f"{missed} of the {every} targets that were set for the H200" in (
        ROOT / "README.md"
    ).read_text().replace("\n  ", " ")


def test_the_comparison_of_losses_shows_what_was_measured():
    """Beside the squared error's step; and the parameters that the pages speak of."""
    text = (ROOT / "docs" / "which_loss.md").read_text()
    trouble = (ROOT / "docs" / "troubleshooting.md").read_text()
    records = json.loads((ROOT / "benchmarks/results/step_h200_bfloat16.json").read_text())
    step = {(r["task"], r["provider"]): r for r in records["records"]}
    for task in ("pcd", "detection-maskd", "segmentation-af_dcd"):
        base, ours = (step[task, name] for name in ("squared-error", "ours"))
        extra = 1000 * (ours["seconds"] - base["seconds"])
        assert f"{extra:.1f} ms of {1000 * ours['seconds']:.1f} ms" in text, task
        assert ours["peak_bytes"] - base["peak_bytes"] < 2**20, task
    base, ours = (step["segmentation-maskd", name] for name in ("squared-error", "ours"))
    assert base["fastest"] < ours["seconds"] < base["slowest"]  # no difference to tell

    def millions(module):
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} million"

    with torch.device("meta"):
        wide = pixdistill.AfDCDLoss(960, 2048)
        assert millions(pixdistill.PixelHead(512, 4096, 256)) in text
        assert millions(wide) in text
        assert millions(pixdistill.AfDCDLoss(256, 512)) in text
        assert millions(wide.projector) in trouble
        assert (
            f"{sum(p.numel() for p in wide.projector.parameters()) * 12 / 2**20:.0f} MiB" in trouble
        )


def test_the_overview_is_drawn(tmp_path):
    picture = tmp_path / "overview.png"
    run("docs/examples/draw_overview.py", "--output", str(picture))
    assert picture.stat().st_size > 50_000


def test_the_picture_of_the_kernel_follows_its_waits(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    draw_kernel = importlib.import_module("draw_kernel")
    draw_kernel.main(["--output", str(tmp_path / "kernel.svg")])
    committed = ROOT / "docs" / "inside_the_kernel.svg"
    assert (tmp_path / "kernel.svg").read_text() == committed.read_text()
    made = draw_kernel.Schedule()
    for i, (start, landed) in enumerate(made.copy):
        for consumer in range(2):
            assert landed <= made.product[consumer, i][0]
            assert i < 4 or start >= made.free[consumer, i - 4] >= made.sum[consumer, i - 4][1]
    busy = sorted([*made.product.values(), *made.sum.values()])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(busy))
    monkeypatch.setattr(draw_kernel, "STAGES", 2)
    with pytest.raises(ValueError, match="empty"):  # nobody can run
        draw_kernel.Schedule()


GOOD = '<html><body><a href="other.html#there">x</a><img src="p.png" width="9"></body></html>'
FAULTY = {
    "wide": ('<div style="width:3000px">x</div>', "wider than the window"),
    "picture": ('<img src="gone.png">', "no picture"),
    "console": ("<script>console.error('oh')</script>", "console: oh"),
    "raises": ("<script>throw Error('oh')</script>", "error: "),
    "file": ('<a href="gone.html">x</a>', "no file for gone.html"),
    "anchor": ('<a href="other.html#gone">x</a>', "no anchor for other.html#gone"),
    "formula": ('<span class="math">\\(x\\)</span>', "formulas not set"),
}


@pytest.mark.skipif(
    find_spec("playwright") is None or not any(map(shutil.which, ("chromium", "google-chrome"))),
    reason='needs Chromium, and pip install ".[site]"',
)
def test_the_look_at_the_pages_finds_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    screenshots = importlib.import_module("screenshots")
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(ROOT / "docs" / "overview.png", site / "p.png")
    (site / "index.html").write_text(GOOD)
    (site / "other.html").write_text('<html><body><p id="there">x</p></body></html>')
    assert screenshots.main([str(site), str(tmp_path / "good")]) == 0
    for view in screenshots.VIEWS:
        assert (tmp_path / "good" / view / "index.png").stat().st_size > 0
    for name, (body, _) in FAULTY.items():
        (site / f"{name}.html").write_text(f"<html><body>{body}</body></html>")
    browser = next(filter(None, map(shutil.which, screenshots.BROWSERS)))
    problems = screenshots.survey(site, tmp_path / "faulty", browser)
    for name, (_, message) in FAULTY.items():
        assert any(p.startswith(f"{name}.html") and message in p for p in problems), (
            name,
            problems,
        )
    assert not any(p.startswith(("index.html", "other.html")) for p in problems), problems
