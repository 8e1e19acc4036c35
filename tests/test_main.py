"""`python -m pixdistill`: what it prints, and its exit status where a backend is wrong."""

import itertools
import runpy

import einops
import pytest
import torch
from helpers import BACKENDS, TRITON_DEVICE, run

import pixdistill
from pixdistill.ops.row_lse import chunked

OPERATORS = ("row_lse", "patch_lse")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def report(capsys):
    """Exit status and output."""
    with pytest.raises(SystemExit) as end:
        runpy.run_module("pixdistill", run_name="__main__")
    return end.value.code, capsys.readouterr().out


def rows(output, section):
    """The words of each row under a heading."""
    lines = output.partition(section)[2].partition("\n\n")[0].splitlines()[1:]
    assert lines
    return [line.split(maxsplit=4) for line in lines]


def test_a_fresh_process_says_what_is_there_and_that_all_is_right():
    out = run("-W", "error", "-m", "pixdistill")
    for line in (
        f"pixdistill {pixdistill.__version__}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        f"einops {einops.__version__}",
        "float32 matmul precision 'highest'",
        "TRITON_INTERPRET not set",
    ):
        assert line in out.splitlines()
    assert "gloo" in out
    assert "\ncpu: " in out
    taken = {tuple(row[:3]): row[3:] for row in rows(out, 'backend="auto" takes')}
    for name in OPERATORS:
        for dtype in DTYPES:
            backend, reason = taken[name, "cpu", dtype]
            assert backend == "torch"
            assert reason.startswith("(not triton: it ")
        assert "(not triton: it has no torch.float64 form)" in taken[name, "cpu", "float64"]
    assert out.endswith("\nall right\n")


def test_every_backend_is_checked_that_can_run(capsys):
    """Here the interpreter runs the kernels, where there is no GPU."""
    precision = torch.get_float32_matmul_precision()
    status, out = report(capsys)
    assert status == 0, out
    assert torch.get_float32_matmul_precision() == precision
    checked = {tuple(row[:4]): row[4] for row in rows(out, "largest relative error")}
    devices = ("cpu", "cuda:0") if TRITON_DEVICE == "cuda" else ("cpu",)
    for name, device, dtype, backend in itertools.product(OPERATORS, devices, DTYPES, BACKENDS):
        verdict = checked[name, device, dtype, backend]
        fits = device.startswith(TRITON_DEVICE) and dtype != "float64"
        if backend == "triton" and not fits:
            assert verdict.startswith("not run: ")
        else:
            error, word = verdict.split()
            assert word == "ok"
            assert float(error) < {"float64": 1e-12}.get(dtype, 4e-2)


def larger_values(lse, mean, largest):
    return lse * 1.01, mean, largest


def other_gradient(lse, mean, largest):
    return lse, None if mean is None else mean.roll(1, dims=-1), largest


def undefined(lse, mean, largest):
    return lse * torch.nan, mean, largest


def undefined_gradient(lse, mean, largest):
    return lse, None if mean is None else mean * torch.nan, largest


@pytest.fixture
def without_triton(monkeypatch):
    """The interpreter is slow, and shows nothing where another backend is wrong."""
    monkeypatch.setattr("pixdistill.ops.availability.has_triton", lambda: False)


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        (larger_values, "e-0"),
        (other_gradient, "e+00"),
        (undefined, "nan"),
        (undefined_gradient, "nan"),
    ],
    ids=lambda f: getattr(f, "__name__", f),
)
@pytest.mark.usefixtures("without_triton")
def test_a_backend_that_computes_something_else_is_wrong(capsys, monkeypatch, fault, shown):
    right = chunked.row_lse
    monkeypatch.setattr(chunked, "row_lse", lambda *a, **k: fault(*right(*a, **k)))
    status, out = report(capsys)
    assert status == 1
    for name, _, dtype, backend, verdict in rows(out, "largest relative error"):
        # one part in a hundred is within the rounding of bfloat16
        seen = fault is not larger_values or dtype != "bfloat16"
        wrong = name == "row_lse" and backend == "torch" and seen
        assert (" WRONG: at most " in verdict) == wrong, verdict
        if wrong:
            assert shown in verdict.split()[0]
    assert "wrong: please report it" in out.splitlines()[-1]


@pytest.mark.usefixtures("without_triton")
def test_a_backend_that_raises_is_wrong_and_says_why(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(chunked, "row_lse", fail)
    status, out = report(capsys)
    assert status == 1
    count = len(DTYPES) * (1 + torch.cuda.device_count())
    assert out.count("FAILED: RuntimeError: no kernel image is available") == count
    assert out.endswith(f"\n{count} wrong: please report it\n")


def test_without_triton_it_says_so():
    block = "import sys, runpy; sys.modules['triton'] = None; "
    out = run("-c", f"{block}runpy.run_module('pixdistill', run_name='__main__')")
    assert "(not triton: the package triton is not installed)" in out
    assert out.endswith("\nall right\n")
