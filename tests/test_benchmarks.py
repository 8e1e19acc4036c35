"""The benchmarks compute what they say: providers, fits and models against truths of these tests."""

import argparse
import json
import math
import re

import pytest
import torch
from helpers import ROOT, assert_close, fresh_compiler, run

from benchmarks import af_dcd, maskd, page, peers, report, row_lse, scaling
from benchmarks.peer_providers import PROVIDERS, Problem, Provider, truth, what_failed, why_not

SMALL = (48, 80, 16)
NOT_EXACT = {"plain torch, autocast": 0.05}  # relative errors, of the products in bfloat16


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(*SMALL, torch.float32, "cpu")


def written_out(problem: Problem, beside: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64, a query at a time, from the definition and its derivative."""
    keys, losses, grads = problem.keys.double(), [], []
    for i, query in enumerate(problem.query.double()):
        unit = query / query.square().sum().sqrt()
        logits = torch.tensor([float(unit @ key) / problem.temperature for key in keys])
        logits = logits.double()
        weights = logits.exp()
        total = weights.sum() + (weights[i] if beside else 0)
        losses.append(total.log() - logits[i])
        weights = weights / total
        if beside:
            weights[i] *= 2
        inner = ((weights.unsqueeze(1) * keys).sum(dim=0) - keys[i]) / problem.temperature
        grads.append((inner - unit * (unit @ inner)) / query.norm())
    count = len(losses)
    return torch.stack(losses).mean(), torch.stack(grads) / count


@pytest.mark.parametrize("beside", [False, True])
def test_the_truth_is_the_definition(problem, beside):
    exact = Problem(problem.query.double(), problem.keys.double())
    for ours, expected in zip(truth(exact, beside=beside), written_out(exact, beside), strict=True):
        assert_close(ours, expected, 1e-6)  # the loop's logits are Python's float, then float32


# importing the compiler warns in torch 2.13; peers warn as they like
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_are_right_or_say_why_not(problem, name):
    reason = why_not(name, problem, "cpu", math.inf, SMALL)
    if reason is not None:
        assert isinstance(reason, str)
        assert reason.strip()
        pytest.skip(reason)
    with fresh_compiler():
        result = PROVIDERS[name](problem)
    tolerance = NOT_EXACT.get(name, 5e-6)
    for ours, expected in zip(result, written_out(problem, PROVIDERS[name].beside), strict=True):
        assert_close(ours, expected, tolerance)


def test_what_runs_everywhere_is_not_skipped(problem):
    for name in ("plain torch", "plain torch, autocast", "checkpointed chunks", "ours: torch"):
        assert why_not(name, problem, "cpu", math.inf, SMALL) is None


def test_every_reason_to_skip(problem, monkeypatch):
    assert why_not("attention, flash", problem, "cpu", math.inf, SMALL) == "made for CUDA"
    assert why_not("attention, CPU flash", problem, "cuda", math.inf, SMALL) == "made for CPU"
    limit = why_not("plain torch", problem, "cpu", 2**30, (2**15, 2**15, 16))
    assert limit == "would hold about 16 GiB, above the limit of 1"

    def broken(query, problem):
        raise RuntimeError("first line\nsecond line")

    def asserts(query, problem):
        raise AssertionError

    monkeypatch.setitem(PROVIDERS, "broken", Provider(broken))
    monkeypatch.setitem(PROVIDERS, "asserts", Provider(asserts))
    monkeypatch.setitem(PROVIDERS, "absent", Provider(broken, "no-such-package"))
    reasons = {
        "broken": "RuntimeError: first line",
        "asserts": "AssertionError: raise AssertionError",
        "absent": "not installed: pip install no-such-package",
    }
    for name, reason in reasons.items():
        assert why_not(name, problem, "cpu", math.inf, SMALL) == reason


def test_an_error_without_words_is_named_by_its_code():
    def fails():
        raise ValueError

    with pytest.raises(ValueError) as raised:  # noqa: PT011 - it has no message, which is the point
        fails()
    assert what_failed(raised.value) == "ValueError: raise ValueError"


def test_every_peer_has_a_reason_and_a_note():
    assert set(page.REASONS) == {name for name in PROVIDERS if not name.startswith("ours")}
    assert all(provider.note for provider in PROVIDERS.values())


def test_every_peer_is_in_the_extra_and_pinned():
    extras = (ROOT / "pyproject.toml").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    for package in peers.PACKAGES:
        assert f'"{package}>=' in extras
        assert f"\n{package}==" in pins


def test_memory_held_counts_matrices_and_pairs():
    assert PROVIDERS["plain torch"].holds(100, 200) == 4 * 4 * 100 * 200
    assert PROVIDERS["pytorch-metric-learning"].holds(100, 200) == 20 * 100 * 100 * 200
    assert PROVIDERS["ours: torch"].holds(10**6, 10**6) == 0


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="10 > 9"):
        Problem.random(10, 9, 4, torch.float32, "cpu")


# -- what the benchmarks share


def test_interleaved_runs_take_turns_and_lose_patience(monkeypatch):
    order = []
    monkeypatch.setattr(report, "seconds", lambda one_run, device: one_run())

    def slow():
        order.append("slow")
        return 3.0

    def quick():
        order.append("quick")
        return 1.0

    times = report.interleaved({"slow": slow, "quick": quick}, 4, "cpu", patience=5.0)
    assert times == {"slow": [3.0, 3.0], "quick": [1.0] * 4}
    assert order == ["slow", "quick", "slow", "quick", "quick", "quick"]
    assert report.spread([3.0, 1.0, 2.0]) == {"seconds": 2.0, "fastest": 1.0, "slowest": 3.0}


def test_errors_are_relative():
    grad = torch.tensor([3.0, 4.0])
    found = report.errors(
        (torch.tensor(2.5), grad + torch.tensor([0.5, 0.0])), (torch.tensor(2.0), grad)
    )
    assert found == {"loss_error": 0.25, "grad_error": pytest.approx(0.1)}


# -- scaling


def test_the_fit_recovers_an_exponent():
    records = [
        {"provider": "ours", "N": n, "seconds": 3e-9 * n**1.75, "extra_bytes": 12 * n}
        for n in (4096, 8192, 32768)
    ]
    records.append(
        {"provider": "ours", "N": 1024, "seconds": 5.0, "extra_bytes": 2**30}
    )  # too small
    records.append({"provider": "other", "N": 4096, "seconds": 5.0, "extra_bytes": 2**30})
    assert scaling.fitted(records, "ours", "seconds") == pytest.approx(1.75)
    assert scaling.fitted(records, "ours", "extra_bytes") == pytest.approx(1.0)
    assert scaling.fitted(records, "other", "seconds") is None


def test_the_model_adds_operations_and_bytes():
    machine = scaling.Machine(operations=1e9, bytes=1e6, link=1.0)
    shape = {"N": 100, "M": 300, "D": 8, "dtype": "float32"}
    # keys twice for 100 queries in blocks of 64; query, expected key twice, gradient
    moved = 2 * 300 * 8 * 4 + 4 * 100 * 8 * 4
    ours = scaling.model_seconds(shape | {"provider": "ours: torch"}, machine, 64)
    assert ours == pytest.approx(4 * 100 * 300 * 8 / 1e9 + moved / 1e6)
    plain = scaling.model_seconds(shape | {"provider": "plain torch"}, machine, 64)
    passes = scaling.DENSE_PASSES * 100 * 300 * 4
    assert plain == pytest.approx(4 * 100 * 300 * 8 / 1e9 + passes / 1e6)


@pytest.mark.parametrize("link", [1e3, 1e12])
def test_the_ring_by_hand(link):
    """100 rows of width 8 in float32 a rank, all of them in one block."""
    machine = scaling.Machine(operations=1e9, bytes=1e9, link=link)
    keys = 100 * 8 * 4
    block = (4 * 100 * 100 * 8 + keys + 2 * keys + 5 * keys) / 1e9
    exchange = keys / link
    for row in scaling.ring_table(machine, 100, 8, 4, 128):
        ranks = row["ranks"]
        step = exchange if link == 1e3 else block  # the slower of the two, W - 1 times
        assert row["pixels"] == 100 * ranks
        assert row["seconds"] == pytest.approx((ranks - 1) * step + block + 2 * keys / 1e9)
        assert row["waiting"] == pytest.approx((ranks - 1) * max(0.0, exchange - block))
        assert row["sent_bytes"] == (ranks - 1) * keys
        assert row["ring_bytes"] == 2 * keys
        assert row["all_bytes"] == ranks * keys
        assert row["dense_bytes"] == 4 * 100 * 100 * ranks


def test_the_measured_rates_are_positive(monkeypatch):
    monkeypatch.setattr(report, "seconds", lambda one_run, device: 0.5)
    machine = scaling.measured_machine("cpu", torch.float32, 7.0)
    assert machine.operations == 2 * 2048**3 / 0.5
    assert machine.bytes == 2 * 2**26 * 4 / 0.5
    assert machine.link == 7.0


# -- the page


def test_the_page_is_what_the_command_writes():
    assert page.PAGE.read_text() == page.render(report.RESULTS), "run `python -m benchmarks page`"


def test_pictures_on_the_page_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page.PAGE.read_text())
    assert all((page.PAGE.parent / picture).is_file() for picture in pictures)


def test_a_missing_result_names_the_command_that_makes_it(tmp_path):
    text = page.render(tmp_path)
    for command in ("peers", "scaling", "row_lse", "maskd", "af_dcd"):
        assert f"`python -m benchmarks {command} --device cpu` makes it" in text
        assert f"`python -m benchmarks {command} --device cuda` makes it" in text
    assert "`python -m benchmarks kernels` makes it" in text
    assert "![" not in text


def timed(provider: str, fastest: float, extra: int, size: int = 512) -> dict:
    record = {"N": size, "M": size, "D": 8, "provider": provider, "extra_bytes": extra}
    record |= {"seconds": fastest + 1, "fastest": fastest, "slowest": fastest + 2}
    return record | {"loss_error": 1e-7, "grad_error": 1e-7}


def test_the_page_says_who_is_faster(tmp_path):
    records = [
        timed("ours: torch", 10.0, 2**20),
        timed("plain torch", 2.0, 2**22),  # 2 to 4 seconds against 10 to 12
        timed("checkpointed chunks", 9.0, 2**19),  # 9 to 11: overlaps
        timed("inf-cl", 10.0, 2**20),  # no faster
        timed("ours: torch", 10.0, 2**20, size=1024),
        timed("plain torch", 20.0, 2**22, size=1024),
        {"N": 1024, "M": 1024, "D": 8, "provider": "lightly", "skipped": "no wings"},
    ]
    report.save(
        "peers_cpu_float32", records, "cpu", tmp_path, packages={"lightly": "1"}, memory_limit_gib=4
    )
    text = page.render(tmp_path)
    assert (
        f"- plain torch: 0.27 at 512 x 512, D 8. Reason: {page.REASONS['plain torch']}.\n" in text
    )
    assert "- checkpointed chunks: ~0.91 at 512 x 512, D 8. Reason: " in text
    assert "- inf-cl:" not in text
    assert "less extra memory**, in shares of ours:\n\n- checkpointed chunks: 0.50 at 512 x" in text
    assert "- lightly at 1024 x 1024, D 8: `no wings`\n" in text


def test_the_page_says_when_nobody_is_faster(tmp_path):
    records = [timed("ours: torch", 1.0, 2**20), timed("plain torch", 20.0, 2**22)]
    report.save("peers_cpu_float32", records, "cpu", tmp_path, packages={}, memory_limit_gib=4)
    text = page.render(tmp_path)
    assert "At no size measured here" in text
    assert "None needs less extra memory than ours" in text


# -- the commands, at tiny sizes


def command(module, *options: str) -> None:
    """`python -m benchmarks <module> <options>` in this process."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args(options)) == 0


@pytest.fixture
def no_child(monkeypatch):
    """A process for every measurement of memory would take long."""
    monkeypatch.setattr(report, "fresh_process", lambda command: [2**20])


def test_row_lse_runs(tmp_path, capsys, no_child):
    options = ("--size", "64", "96", "8", "--rounds", "1", "--output", str(tmp_path))
    command(row_lse, *options)
    assert "ours: torch" in capsys.readouterr().out
    records = json.loads((tmp_path / "row_lse_cpu_float32.json").read_text())["records"]
    exact = {r["provider"]: r for r in records if r.get("grad_error") is not None}
    assert {"plain torch", "ours: torch", "ours: reference"} <= set(exact)
    assert all(r["grad_error"] < 1e-5 and r["loss_error"] < 1e-5 for r in exact.values())
    assert (tmp_path / "row_lse_cpu_float32.png").stat().st_size > 10_000


def test_maskd_runs(tmp_path, no_child):
    providers = ("materialising", "channels first", "ours", "one read")
    options = ["--rounds", "1", "--output", str(tmp_path)]
    options += ["--case", "detection", "2", "16", "3", "12", "14"]
    for provider in providers:
        options += ["--provider", provider]
    command(maskd, *options)
    records = json.loads((tmp_path / "maskd_cpu_float32.json").read_text())["records"]
    assert [r["provider"] for r in records] == list(providers)
    exact = [r for r in records if r["provider"] != "one read"]
    assert all(r["grad_error"] < 1e-5 and r["loss_error"] < 1e-5 for r in exact)
    assert all(r["seconds"] > 0 for r in records)
    assert (tmp_path / "maskd_cpu_float32.png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bfloat16 is the default on a GPU
def test_af_dcd_runs(dtype, tmp_path, no_child, monkeypatch):
    monkeypatch.setattr(af_dcd, "why_not_triton", lambda *_: "its interpreter takes a minute")
    options = ["--rounds", "1", "--output", str(tmp_path), "--dtype", dtype]
    for case in (("contrast", "2", "32", "8", "16", "2"), ("loss", "1", "32", "8", "8", "1")):
        options += ["--case", *case]
    command(af_dcd, *options)
    records = json.loads((tmp_path / f"af_dcd_cpu_{dtype}.json").read_text())["records"]
    done = [record for record in records if "skipped" not in record]
    assert [r["provider"] for r in done] == 2 * ["plain", "ours: torch"]
    rounding = 1.0 if dtype == "float32" else 1e3
    assert all(r["grad_error"] < 1e-4 * rounding for r in done)
    assert all(r["loss_error"] < 1e-5 * rounding for r in done)
    assert all(r["seconds"] > 0 and r["extra_bytes"] == 2**20 for r in done)
    assert (tmp_path / f"af_dcd_cpu_{dtype}.png").stat().st_size > 10_000


def test_peers_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "fresh_process", lambda command: 3 * [2**20])  # a number a size
    names = ("plain torch", "attention, CPU flash", "inf-cl", "attention, flash", "ours: torch")
    options = ["--rounds", "2", "--output", str(tmp_path)]
    for size in (("32", "32", "8"), ("64", "64", "8"), ("32", "96", "8")):
        options += ["--size", *size]
    for name in names:
        options += ["--provider", name]
    command(peers, *options)
    assert "skipped attention, flash: made for CUDA" in capsys.readouterr().out
    content = json.loads((tmp_path / "peers_cpu_float32.json").read_text())
    assert set(content["packages"]) == set(peers.PACKAGES)
    records = content["records"]
    assert [record["provider"] for record in records] == 3 * list(names)
    done = [record for record in records if "skipped" not in record]
    assert {"plain torch", "ours: torch"} <= {record["provider"] for record in done}
    assert all(record["runs"] == 2 and record["seconds"] > 0 for record in done)
    assert all(record["loss_error"] < 1e-5 and record["grad_error"] < 1e-5 for record in done)
    assert all(record["extra_bytes"] == 2**20 for record in done)
    for name in ("peers_cpu_float32", "peers_cpu_float32_pcd"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "32 x 96" in page.render(tmp_path) or "64 x 64" in page.render(tmp_path)


def test_what_would_take_too_long_sits_out():
    """By its pace at the sizes before; whoever has none yet is tried."""
    paces = {"plain torch": 1e-6}
    assert peers._too_slow("plain torch", (100, 200, 10), paces, 0.3) is None
    assert peers._too_slow("plain torch", (100, 4000, 10), paces, 3.0) == (
        "would take about 4 s a run, above the limit of 3 s"
    )
    assert peers._too_slow("liger-kernel", (100, 4000, 10), paces, 3.0) is None


def test_memory_of_the_peers_is_seen():
    """N = M = 2048 in a fresh process: a matrix of logits is 16 MiB."""

    def rise(name):
        command = (
            "peers",
            "--measure-memory",
            name,
            "float32",
            "64",
            "64",
            "8",
            "2048",
            "2048",
            "8",
        )
        return [int(word) for word in run("-m", "benchmarks", *command).split()]

    assert rise("plain torch")[1] > 2 * 2**24
    assert rise("ours: torch")[1] < 2**24


def test_scaling_runs(tmp_path, capsys, no_child):
    options = ["--smallest", "12", "--largest", "13", "--width", "4", "--rounds", "1"]
    options += ["--memory-limit", "0.5", "--rows-per-rank", "64", "--output", str(tmp_path)]
    command(scaling, *options)
    assert "A MODEL of the ring" in capsys.readouterr().out
    content = json.loads((tmp_path / "scaling_cpu_float32.json").read_text())
    done = [(record["provider"], record["N"]) for record in content["records"]]
    # plain code holds a quarter of a GiB at 4096, a whole one at 8192
    assert done == [("ours: torch", 4096), ("plain torch", 4096), ("ours: torch", 8192)]
    assert set(content["exponents"]) == {"ours: torch: time", "ours: torch: extra memory"}
    assert all(record["model_seconds"] > 0 for record in content["records"])
    assert content["rings"]["measured"][0]["pixels"] == 2 * 64
    assert (tmp_path / "scaling_cpu_float32.png").stat().st_size > 10_000
    text = page.render(tmp_path)
    assert "a model, not a measurement" in text
    assert "the loss of 64 pixels on each rank" in text


def test_scaling_measures_memory_in_a_process_of_its_own():
    command = ("scaling", "--measure-memory", "plain torch", "2048", "8", "float32")
    assert int(run("-m", "benchmarks", *command)) > 2 * 2**24  # a matrix of logits is 16 MiB


def test_scaling_stops_when_the_minutes_are_over(tmp_path, no_child):
    options = ["--smallest", "5", "--largest", "8", "--minutes", "0", "--width", "4"]
    command(scaling, *options, "--output", str(tmp_path))
    records = json.loads((tmp_path / "scaling_cpu_float32.json").read_text())["records"]
    assert [record["N"] for record in records] == [32, 32]


def test_the_page_command_writes(tmp_path):
    target = tmp_path / "page.md"
    command(page, "--output", str(target))
    assert target.read_text() == page.PAGE.read_text()


def test_the_page_is_in_the_site():
    index = (ROOT / "docs" / "index.md").read_text()
    assert "[Benchmarks](benchmarks.md)" in index
    assert "\nbenchmarks\n" in index
