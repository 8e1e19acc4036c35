"""The list of faults fits the code, so that `tests/mutation.py` can run it at any time."""

import ast
import re
import shlex

import pytest
from faults import FAULTS, KINDS
from helpers import ROOT

FILES = {fault.file for fault in FAULTS}


@pytest.mark.parametrize("file", sorted(FILES))
def test_every_fault_applies_once_and_changes_the_program(file):
    text = (ROOT / file).read_text()
    tree = ast.dump(ast.parse(text))
    for fault in FAULTS:
        if fault.file == file:
            assert text.count(fault.text) == 1, fault
            faulty = text.replace(fault.text, fault.faulty)
            compile(faulty, file, "exec")
            assert ast.dump(ast.parse(faulty)) != tree, f"only a comment changes: {fault}"


def test_faults_are_told_apart_and_of_known_kinds():
    assert len({fault[:1] + fault[3:4] + fault[4:] for fault in FAULTS}) == len(FAULTS) >= 80
    assert {fault.kind for fault in FAULTS} == set(KINDS)


def test_every_file_with_a_computation_has_faults():
    without = {"__init__.py", "functional.py", "ops/__init__.py", "ops/first_order.py"}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "pixdistill").rglob("*.py")}
    assert files - FILES == {f"pixdistill/{name}" for name in without}


@pytest.mark.parametrize("tests", sorted({fault.tests for fault in FAULTS}))
def test_every_choice_of_tests_names_tests(tests):
    """Each word of `-k` is in a test's name or its parameters, as far as a text can tell."""
    words = shlex.split(tests)
    files = [word for word in words if word.endswith(".py")]
    assert files
    text = "\n".join((ROOT / file).read_text() for file in files)
    if "-k" in words:
        expression = words[words.index("-k") + 1]
        for word in re.findall(r"[\w\[]+", expression):
            assert word in {"and", "or", "not"} or word.strip("[") in text, word
