"""`python -m pixdistill`: what it prints, and its exit status where an operator is wrong."""

import subprocess
import sys

import einops
import pytest
import torch
from helpers import ROOT, TRITON_DEVICE, run

import pixdistill
from pixdistill import __main__ as report

DTYPES = ("bfloat16", "float32")
START = "import runpy, sys; sys.argv = ['pixdistill']; "
END = "runpy.run_module('pixdistill', run_name='__main__')"


def rows(output):
    """The words of each row of the table, by operator, device and dtype."""
    lines = output.partition("why not triton\n")[2].partition("\n\n")[0].splitlines()
    words = [line.split(maxsplit=5) for line in lines]
    return {tuple(row[:3]): row[3:] for row in words}


def result(monkeypatch, capsys, **operators):
    """Exit status and output with these operators in place of the package's."""
    if operators:
        monkeypatch.setattr(report, "OPERATORS", operators)
    monkeypatch.setattr(sys, "argv", ["pixdistill"])
    return report.main(), capsys.readouterr().out


def test_a_fresh_process_says_what_is_there_and_that_all_is_right():
    out = run("-W", "error", "-m", "pixdistill")
    for line in (
        f"pixdistill {pixdistill.__version__}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        f"einops {einops.__version__}",
        "TRITON_INTERPRET not set",
    ):
        assert line in out.splitlines()
    assert "gloo" in out
    assert "\ncpu: " in out
    assert out.endswith("\nall right\n")


def test_every_operator_is_listed_with_its_backend_error_and_reason(monkeypatch, capsys):
    status, out = result(monkeypatch, capsys)
    assert status == 0, out
    found = rows(out)
    devices = ("cpu", "cuda:0") if TRITON_DEVICE == "cuda" else ("cpu",)
    assert found.keys() == {(n, d, t) for n in report.OPERATORS for d in devices for t in DTYPES}
    folders = {path.parent.name for path in (ROOT / "pixdistill/ops").glob("*/__init__.py")}
    assert set(report.OPERATORS) >= folders
    for (_, device, dtype), (backend, error, *reason) in found.items():
        assert 0 < float(error) < (4e-2 if dtype == "bfloat16" else 1e-5)
        assert (backend == "torch") == bool(reason)
        assert backend == "torch" or device != "cpu"


def product(student, teacher, backend):
    """An operator that is right in every backend."""
    if backend == "triton":
        raise ValueError('backend="triton" cannot run here: it is a test. Use backend="auto".')
    return (student * teacher).sum((1, 2, 3))


def test_the_reason_is_the_one_that_the_operator_gives(monkeypatch, capsys):
    status, out = result(monkeypatch, capsys, product=product)
    assert status == 0
    assert {row[2] for row in rows(out).values()} == {"it is a test"}


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * OtherGradient.factor


@pytest.mark.parametrize("factor", [1.1, torch.nan])
@pytest.mark.parametrize("part", ["value", "gradient"])
def test_an_operator_that_computes_something_else_is_wrong(monkeypatch, capsys, part, factor):
    monkeypatch.setattr(OtherGradient, "factor", factor, raising=False)

    def faulty(student, teacher, backend):
        value = product(student, teacher, backend)
        if backend == "reference":
            return value
        return OtherGradient.apply(value) if part == "gradient" else value * factor

    status, out = result(monkeypatch, capsys, product=product, faulty=faulty)
    assert status == 1
    wrong = {
        (name, dtype) for (name, _, dtype), row in rows(out).items() if "WRONG: above" in row[2]
    }
    assert wrong == {("faulty", dtype) for dtype in DTYPES}
    count = 2 * (1 + torch.cuda.device_count())
    assert out.endswith(f"\n{count} wrong: please report it\n")


def test_an_operator_that_raises_is_wrong_and_says_why(monkeypatch, capsys):
    def failing(student, teacher, backend):
        raise ValueError("no kernel image is available")

    status, out = result(monkeypatch, capsys, failing=failing, product=product)
    assert status == 1
    count = 2 * (1 + torch.cuda.device_count())
    assert out.count("FAILED: ValueError: no kernel image is available") == count
    assert out.endswith(f"\n{count} wrong: please report it\n")


def test_help_checks_nothing(monkeypatch, capsys):
    monkeypatch.setattr(report, "OPERATORS", None)
    monkeypatch.setattr(sys, "argv", ["pixdistill", "--help"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 0
    assert "usage: python -m pixdistill" in capsys.readouterr().out


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
    command = [sys.executable, "-m", "pixdistill"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_without_triton_it_says_so():
    out = run("-c", f"{START}sys.modules['triton'] = None; {END}")
    assert {row[2] for row in rows(out).values()} == {"the package triton is not installed"}
    assert out.endswith("\nall right\n")


def test_without_numpy_nothing_warns():
    """torch warns where NumPy is absent, as it is imported; nothing here needs NumPy."""
    out = run("-W", "error", "-c", f"{START}sys.modules['numpy'] = None; {END}")
    assert out.endswith("\nall right\n")
