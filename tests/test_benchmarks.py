"""The benchmarks measure what they say: providers, gauges, runner and page against truths made here."""

import json
import os
import re
import time
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, assert_close, dense_contrast, dense_row_lse, fresh_compiler, run
from torch import nn

from benchmarks import (
    __main__,
    af_dcd,
    contrast,
    gauges,
    kernel_calls,
    maskd,
    overhead,
    page,
    peers,
    row_lse,
    runner,
    scaling,
    sheet,
    step,
    targets,
)
from benchmarks.runner import Options, Provider, Runner, Subject
from benchmarks.subjects import SUBJECTS

HALF = {"plain-autocast": 0.05}  # relative errors, of products in bfloat16


@pytest.fixture
def quick(monkeypatch):
    """Without what takes seconds: rates of the machine, and the process that measures memory."""
    monkeypatch.setattr(gauges, "rates", lambda *_: {"matmul_flops": 1e12, "copy_bytes": 1e11})
    memory = {"extra_bytes": 2**20, "peak_bytes": 2**21}
    monkeypatch.setattr(Runner, "resident_memory", lambda *_: memory)


def command(*words: str) -> int:
    """`python -m benchmarks <words>` in this process."""
    return __main__.main([str(word) for word in words])


def read(folder, subject: str, dtype: str = "float32") -> dict:
    return json.loads((folder / f"{subject}_cpu_{dtype}.json").read_text())


# --- Every subject --------------------------------------------------------------------------------


CASES = [(name, s.small) for name, s in SUBJECTS.items() if name not in ("step", "scaling")]
CASES += [
    ("contrast", ("batch", 2, 16, 5, 6, 0)),
    ("contrast", ("queue", 2, 16, 5, 6, 32)),
    ("af_dcd", ("loss", 1, 32, 8, 8, 1)),
    ("maskd", ("segmentation", 2, 19, 3, 12, 14)),
    ("overhead", ("contrast", "batch 1 8 4 4 0")),
]


@pytest.mark.filterwarnings("default")  # peers warn as they like
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_small_case_runs_and_every_provider_is_right(name, case, quick, tmp_path, capsys):
    """Against the subject's truth in float64; the truths are tested below."""
    options = ("--rounds", "2", "--output", tmp_path)
    with fresh_compiler():
        assert command(name, "--case", *case, *options) == 0
    assert f"written: {tmp_path / name}_cpu_float32.json" in capsys.readouterr().out
    content = read(tmp_path, name)
    assert content["columns"] == list(SUBJECTS[name].columns)
    assert {"processor", "torch", "pixdistill", "date", "matmul_flops"} <= content["machine"].keys()
    done = [record for record in content["records"] if "skipped" not in record]
    assert {"ours", "plain"} <= {record["provider"] for record in done}
    for record in done:
        assert [record[column] for column in content["columns"]] == list(case)
        assert record["runs"] == 2
        assert 0 < record["fastest"] <= record["seconds"] <= record["slowest"]
        assert record["launches"] > 0
        assert record["extra_bytes"] == 2**20
        if not SUBJECTS[name].providers[record["provider"]].floor:
            tolerance = HALF.get(record["provider"], 1e-5)
            assert max(record["loss_error"], record["grad_error"]) < tolerance, record["provider"]


@pytest.mark.parametrize("name", ["contrast", "af_dcd", "maskd"])
def test_half_precision_runs(name, quick, tmp_path):
    """The default on a GPU."""
    small = SUBJECTS[name].small
    options = ("--dtype", "bfloat16", "--rounds", "1", "--output", tmp_path)
    assert command(name, "--case", *small, *options) == 0
    for record in read(tmp_path, name, "bfloat16")["records"]:
        assert record.get("grad_error", 0) < 0.05, record["provider"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["row_lse", "contrast", "af_dcd", "maskd", "overhead"])
def test_gauges_of_a_gpu(name, tmp_path):
    case = SUBJECTS[name].cases["cuda"][1]
    options = ("--device", "cuda", "--rounds", "3", "--output", tmp_path)
    assert command(name, "--case", *case, *options) == 0
    (path,) = tmp_path.iterdir()
    for record in json.loads(path.read_text())["records"]:
        if "skipped" not in record:
            assert record["gpu_seconds"] > 0
            assert record["host_seconds"] > 0
            assert record["launches"] > 0
            assert record["peak_bytes"] >= record["extra_bytes"] >= 0


def test_what_torch_compile_makes_runs_only_if_asked_for():
    for name in ("peers", "contrast", "maskd"):
        usual = set(Options().names(SUBJECTS[name]))
        asked = set(Options(compile=True).names(SUBJECTS[name])) - usual
        assert asked
        assert all("compiled" in provider for provider in asked)
    assert Options(providers=("plain-compiled",)).names(contrast.SUBJECT) == ["plain-compiled"]


def test_cases_fit_their_columns():
    for subject in SUBJECTS.values():
        for case in [subject.small, *subject.cases["cpu"], *subject.cases["cuda"]]:
            assert len(case) == len(subject.columns)
            assert list(map(type, case)) == list(map(type, subject.small))
    for case in overhead.SUBJECT.cases["cpu"] + overhead.SUBJECT.cases["cuda"]:
        part = overhead.PARTS[case[0]]
        assert list(map(type, overhead.inner(case))) == list(map(type, part.small))
    assert {name for name, _ in __main__.PLAN} == set(SUBJECTS)


def test_names_need_no_quotation_marks():
    for subject in SUBJECTS.values():
        assert all(re.fullmatch(r"[\w-]+", name) for name in [subject.name, *subject.providers])
        assert all(provider.note for provider in subject.providers.values())


@pytest.mark.parametrize("name", ["row_lse", "contrast", "overhead"])
def test_help_explains_a_case(name, capsys):
    with pytest.raises(SystemExit):
        command(name, "--help")
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for column, what in SUBJECTS[name].columns.items():
        assert f"{column}: {what}" in out
    assert "plain" in out


@pytest.mark.parametrize("word", ["1.5", "x"])
def test_a_wrong_case_is_named(word, capsys):
    with pytest.raises(SystemExit, match=f"M must be a whole number; got '{word}'"):
        command("row_lse", "--case", "8", word, "8")


@pytest.mark.parametrize(
    ("subject", "case"),
    [
        (contrast, ("all", 1, 4, 2, 2, 0)),
        (af_dcd, ("whole", 1, 32, 8, 8, 1)),
        (maskd, ("seg", 1, 4, 2, 2, 2)),
        (peers, (10, 9, 4)),
        (step, ("posing", 1, 1)),
    ],
)
def test_an_impossible_case_is_named(subject, case):
    with pytest.raises(SystemExit, match=str(case[0])):
        subject.problem(case, torch.float32, "cpu")


# --- Truths ---------------------------------------------------------------------------------------


def differentiate(loss_of, source):
    source = source.double().requires_grad_()
    loss = loss_of(source)
    return loss.detach(), torch.autograd.grad(loss, source)[0]


def assert_both_close(result, truth):
    for ours, expected in zip(result, truth, strict=True):
        assert_close(ours, expected, 1e-6)


def test_the_truth_of_row_lse():
    problem = row_lse.problem((1100, 40, 8), torch.float32, "cpu")  # more than one block
    expected = differentiate(
        lambda q: dense_row_lse(q, problem.keys.double(), 5.0).mean(), problem.query
    )
    assert_both_close(row_lse.truth(problem), expected)


@pytest.mark.parametrize("negatives", contrast.NEGATIVES)
def test_the_truth_of_the_contrast(negatives, monkeypatch):
    monkeypatch.setattr(contrast, "BLOCK", 16)
    problem = contrast.problem((negatives, 2, 8, 4, 5, 12), torch.float32, "cpu")

    def loss(student):
        rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in (student, problem.teacher.double())]
        image_of, valid = torch.zeros(40), torch.ones(40, dtype=torch.bool)
        queue = problem.queue_keys
        return dense_contrast(*rows, 0.2, image_of, valid, queue, negatives != "queue").mean()

    assert_both_close(contrast.truth(problem), differentiate(loss, problem.student))


@pytest.mark.parametrize("beside", [False, True])
def test_the_truth_of_the_peers(beside):
    """A query at a time, from the definition and its derivative."""
    problem = peers.problem((48, 80, 16), torch.float32, "cpu")
    keys, losses, grads = problem.keys.double(), [], []
    for i, query in enumerate(problem.query.double()):
        unit = query / query.square().sum().sqrt()
        weights = torch.stack([(unit @ key / problem.temperature).exp() for key in keys])
        total = weights.sum() + (weights[i] if beside else 0)
        losses.append((total / weights[i]).log())
        weights = weights / total
        if beside:
            weights[i] *= 2
        inner = ((weights.unsqueeze(1) * keys).sum(dim=0) - keys[i]) / problem.temperature
        grads.append((inner - unit * (unit @ inner)) / query.norm())
    expected = torch.stack(losses).mean(), torch.stack(grads) / len(losses)
    assert_both_close(peers.truth(problem, beside=beside), expected)


def test_a_loss_that_counts_the_positive_twice_is_held_to_that():
    problem = peers.problem((48, 80, 16), torch.float32, "cpu")
    found = peers.without_the_double(problem, peers.truth(problem, beside=True))
    assert_both_close(found, peers.truth(problem))


@pytest.mark.parametrize("variant", maskd.EPS)
def test_the_truth_of_masked_distillation(variant):
    """Image by image and token by token."""
    problem = maskd.problem((variant, 2, 6, 3, 5, 4), torch.float32, "cpu")
    tokens, teacher = problem.tokens, problem.teacher.double()

    def loss(student):
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            weights = torch.full((3,), 1 / 3, dtype=torch.float64)
            if variant == "detection":
                convolution, mixing = (layer.double() for layer in (tokens.prob[0], tokens.prob[2]))
                pooled = convolution(t[None]).mean(dim=(2, 3), keepdim=True)
                weights = mixing(pooled).flatten().softmax(dim=0).detach()
            for token, weight in zip(tokens.mask_token.double(), weights, strict=True):
                mask = torch.einsum("c,chw->hw", token, t).sigmoid()
                if variant == "detection":
                    mask = mask * torch.einsum("c,chw->hw", token, s).sigmoid()
                mask = mask.detach()
                squares = (mask * (s - t)).square().sum(dim=(1, 2)).mean()
                total = total + weight * squares / (mask.sum() + maskd.EPS[variant]) / 2
        return total

    expected = differentiate(loss, problem.student)
    assert_both_close(maskd.truth(problem), expected)


@pytest.mark.parametrize("part", ["contrast", "loss"])
def test_the_truth_of_af_dcd(part):
    """Patch by patch and vector by vector."""
    problem = af_dcd.problem((part, 1, 32, 8, 8, 1), torch.float32, "cpu")
    teacher, module = problem.teacher.double(), problem.module.double()

    def vectors(x, top, left):
        patch = x[0, :, top : top + 4, left : left + 4].reshape(16, 2, 16)  # groups of two channels
        return patch.permute(0, 2, 1).flatten(0, 1)

    def loss(student):
        guess = student
        if part == "loss":
            aligned = module.align(student)
            guess = module.projector(aligned * ~problem.drop_mask.unsqueeze(1))
        total = 0.0
        for top, left in ((0, 0), (0, 4), (4, 0), (4, 4)):
            s, t = vectors(guess, top, left), vectors(teacher, top, left)
            for i in range(256):
                logits = -(s[i] - t).abs().sum(dim=1) / af_dcd.TEMPERATURE
                seen = torch.arange(256) // 16 != i // 16
                seen[i] = True
                total = total + logits[seen].logsumexp(dim=0) - logits[i]
        total = total / 64
        if part == "loss":
            mimic = (guess - teacher).square().sum()
            total = module.mimic_weight * mimic + module.contrast_weight * total
        return total

    assert_both_close(af_dcd.truth(problem), differentiate(loss, problem.student))


# --- Training steps, with networks of a few channels ----------------------------------------------


class Segmenter(nn.Module):
    """What the benchmark uses of torchvision's segmentation models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(channels, 19, 1)

    def backbone(self, x):
        return {"out": self.features(x)}


class Pyramid(nn.Module):
    """Two levels of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 8, 3, stride=n, padding=1) for n in (4, 8))

    def forward(self, x):
        return {str(n): level(x) for n, level in enumerate(self.levels)}


@pytest.fixture
def tiny_networks(monkeypatch):
    """The backbones that were built, teacher first."""
    built = []

    def width(name: str) -> int:
        return 16 if name in ("resnet50", "resnet101", "deeplabv3_resnet101") else 8

    def backbone(name):
        convolution = nn.Conv2d(3, width(name), 3, stride=8)
        built.append(nn.Sequential(convolution, nn.BatchNorm2d(width(name)), nn.ReLU()))
        return built[-1], width(name)

    monkeypatch.setattr(step, "backbone", backbone)
    monkeypatch.setattr(step, "segmenter", lambda name: (Segmenter(width(name)), width(name)))
    monkeypatch.setattr(step, "pyramid", lambda name: (Pyramid(), 8))
    monkeypatch.setattr(step, "QUEUE", 64)
    monkeypatch.setattr(runner, "installed", lambda package: True)
    return built


@pytest.mark.parametrize("task", step.TASKS)
def test_a_training_step_runs_with_each_loss(task, tiny_networks, quick, tmp_path):
    assert command("step", "--case", task, "2", "32", "--rounds", "2", "--output", tmp_path) == 0
    records = read(tmp_path, "step")["records"]
    assert [r["provider"] for r in records] == ["ours", "plain", "squared-error"]
    assert all(record["seconds"] > 0 for record in records)


@pytest.mark.parametrize("task", ["pcd", "detection-maskd", "segmentation-maskd"])
def test_ours_and_plain_are_the_same_loss(task, tiny_networks):
    """Not so Af-DCD's, which draw their masks."""
    training = step.problem((task, 2, 32), torch.float32, "cpu")
    with torch.no_grad():
        student, teacher = training.student()[0], training.teacher()
        ours, plain = (training.losses[name](student, teacher) for name in ("ours", "plain"))
    assert_close(ours, plain, 1e-5)


def test_a_training_step_moves_the_student_alone(tiny_networks):
    training = step.problem(("pcd", 2, 32), torch.float32, "cpu")
    with torch.no_grad():
        before = training.student()[0][0], training.teacher()[0]
        with torch.enable_grad():
            training.step("ours")
        after = training.student()[0][0], training.teacher()[0]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert [network.training for network in tiny_networks] == [False, True]


def test_without_torchvision_a_step_says_what_is_missing(monkeypatch, quick, tmp_path, capsys):
    monkeypatch.setattr(runner, "installed", lambda package: False)
    assert command("step", "--output", tmp_path) == 0
    assert "skipped ours: not installed: pip install torchvision" in capsys.readouterr().out


# --- The runner -----------------------------------------------------------------------------------


def subject(**providers) -> Subject:
    """Two cases, and providers that are plain functions of the case."""
    made = {
        name: run if isinstance(run, Provider) else Provider(run) for name, run in providers.items()
    }
    return Subject(
        name="made_up",
        summary="",
        columns={"n": "number"},
        cases={"cpu": [(1,), (2,)], "cuda": []},
        small=(1,),
        problem=lambda case, dtype, device: case[0],
        providers=made,
        work=lambda case: float(case[0]),
    )


def measured(made: Subject, tmp_path, **options) -> list[dict]:
    Runner(made, Options(output=tmp_path, **options)).measure()
    return read(tmp_path, "made_up")["records"]


def test_providers_take_turns_and_lose_patience(quick, tmp_path, monkeypatch):
    seconds = {"slow": 3.0, "fast": 1.0}
    order = []

    def sample(call, device, repeats=1):
        order.append(call())
        return gauges.Sample(seconds[order[-1]], 0.0)

    monkeypatch.setattr(gauges, "sample", sample)
    made = subject(slow=lambda problem: "slow", fast=lambda problem: "fast")
    records = measured(made, tmp_path, cases=((1,),), rounds=4, patience=2.5)
    assert [(r["provider"], r["runs"]) for r in records] == [("slow", 2), ("fast", 3)]
    assert order == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast", "fast"]


def test_a_kill_loses_nothing(quick, tmp_path):
    def killed(problem):
        if problem == 2:
            raise KeyboardInterrupt
        return torch.zeros(()), torch.zeros(1)

    made = Runner(subject(plain=killed), Options(output=tmp_path, rounds=1))
    with __main__.interruptible():
        made.measure()
    (record,) = read(tmp_path, "made_up")["records"]
    assert record["n"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_what_fails_is_said_and_the_rest_goes_on(quick, tmp_path, capsys):
    def fails(problem):
        raise RuntimeError("first line\nsecond line")

    def asserts(problem):
        raise AssertionError

    good = lambda problem: None  # noqa: E731
    made = Runner(subject(peer=asserts, ours=fails, plain=good), Options(output=tmp_path, rounds=1))
    made.measure(((1,),))
    assert __main__.finish([made]) == 1
    out = capsys.readouterr().out
    assert "skipped peer: AssertionError: raise AssertionError" in out
    assert "failed ours: RuntimeError: first line\n" in out
    assert [r["provider"] for r in made.sheet.records if "seconds" in r] == ["plain"]


def test_every_reason_to_sit_out(quick, tmp_path):
    run = lambda problem: None  # noqa: E731
    made = Runner(
        subject(
            gpu=Provider(run, devices=("cuda",)),
            absent=Provider(run, package="no_such_package"),
            large=Provider(run, holds=lambda case: 2**40),
            picky=Provider(run, why_not=lambda case, dtype: "no ones" if case == (1,) else None),
            slow=run,
        ),
        Options(output=tmp_path),
    )
    made.paces["slow"] = 50.0
    assert {name: made.why_not(name, (1,)) for name in made.subject.providers} == {
        "gpu": "made for CUDA",
        "absent": "not installed: pip install pixdistill[peers]",
        "large": "would hold about 1024 GiB, above the limit of 10",
        "picky": "no ones",
        "slow": "would take about 50 s, above the limit of 45 s",
    }
    assert made.why_not("picky", (2,)) is None
    assert "gpu" not in made.options.names(made.subject)


def test_nothing_starts_after_the_deadline(quick, tmp_path):
    made = Runner(
        subject(plain=lambda p: None), Options(output=tmp_path, deadline=time.monotonic())
    )
    made.measure()
    assert made.sheet.records == []


def test_all_follows_its_plan(quick, tmp_path, monkeypatch, capsys):
    """With one case of each subject, and what a step needs not installed."""
    for name, made in SUBJECTS.items():
        cases = {"cpu": [made.small], "cuda": []}
        monkeypatch.setitem(SUBJECTS, name, replace(made, cases=cases))
    monkeypatch.setattr(__main__, "PLAN", [(name, slice(None)) for name in ("row_lse", "maskd")])
    assert command("all", "--rounds", "1", "--output", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "row_lse_cpu_float32.json",
        "maskd_cpu_float32.json",
    }
    assert command("all", "--minutes", "0", "--output", tmp_path / "late") == 0
    assert "Targets" in capsys.readouterr().out


# --- Gauges ---------------------------------------------------------------------------------------


def test_errors_are_relative():
    grad = torch.tensor([3.0, 4.0])
    result = torch.tensor(2.5), grad + torch.tensor([0.5, 0.0])
    found = gauges.errors(result, (torch.tensor(2.0), grad))
    assert found == {"loss_error": 0.25, "grad_error": pytest.approx(0.1)}


def test_launches_are_operators_without_views():
    x = torch.ones(4, 4)
    assert gauges.launches(lambda: (x.T @ x[:2].T.contiguous()).sum(), "cpu") == 3


def test_short_calls_are_repeated(quick, tmp_path):
    calls = []
    measured(subject(plain=calls.append), tmp_path, cases=((1,),), rounds=2)
    assert len(calls) > 100


def test_memory_is_seen_by_a_process_of_its_own(tmp_path, monkeypatch):
    """N = M = 2048: a matrix of logits is 16 MiB."""
    monkeypatch.setattr(gauges, "rates", lambda *_: {})
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    made = Runner(row_lse.SUBJECT, Options(output=tmp_path))
    plain, ours = (
        made.resident_memory(name, (2048, 2048, 8))["extra_bytes"] for name in ("plain", "ours")
    )
    assert plain > 2 * 2**24
    assert ours < 2**24
    os.kill(next(iter(made.worker._processes)), 9)
    case = (64, 64, 8)
    assert made.resident_memory("ours", case) == {"extra_bytes": None, "peak_bytes": None}
    assert made.resident_memory("ours", case)["peak_bytes"] > 2**24  # by a new process


def test_rates_are_those_of_the_best_run(monkeypatch):
    times = iter([0.5, 0.25, 1.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr(gauges, "sample", lambda *_: gauges.Sample(next(times), 0.0))
    monkeypatch.setattr(torch, "mm", lambda a, b: None)
    found = gauges.rates("cpu", torch.float32, rounds=3)
    assert found == {"matmul_flops": 2 * 2048**3 / 0.25, "copy_bytes": 2 * 2**28 / 2.0}


@pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "teslat4"),
    ],
)
def test_files_are_named_after_the_gpu(gpu, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    assert gauges.kind("cuda") == kind
    assert gauges.kind("cpu") == "cpu"


# --- Tables, targets and the page -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0, "0"),
        (1.234e-5, "12.3 us"),
        (9.999e-3, "10.0 ms"),
        (0.25, "250 ms"),
        (1, "1.00 s"),
        (1234, "1230 s"),
    ],
)
def test_durations(seconds, words):
    assert sheet.duration(seconds) == words


def timed(provider: str, seconds: float, extra: float = 2**20, **columns) -> dict:
    record = (columns or {"N": 512, "M": 512, "D": 8}) | {"provider": provider}
    record |= {"seconds": seconds, "fastest": seconds / 2, "slowest": 2 * seconds}
    return record | {"extra_bytes": extra, "loss_error": 1e-7, "grad_error": 1e-7}


def write(folder, name: str, device: str, records: list[dict], **machine) -> None:
    facts = {"processor": "P", "threads": 1, "pixdistill": "1", "torch": "1", "triton": "1"}
    head = {"subject": name, "columns": list(SUBJECTS[name].columns), "dtype": "float32"}
    text = sheet.as_json(head | {"machine": facts | machine}, records)
    (folder / f"{name}_{device}_float32.json").write_text(text)


def test_a_busy_machine_is_noticed():
    calm = timed("b", 1.0) | {"slowest": 1.4}
    (line,) = sheet.warnings([timed("a", 1.0), calm, calm])
    assert line.startswith("WARNING: in 1 of 3 rows the slowest run took more than 3 times")


def test_columns_without_entries_are_left_out():
    rows = [{"a": "1", "b": "-"}, {"a": "22", "b": "-"}]
    assert sheet.table(rows) == "| a  |\n|----|\n| 1  |\n| 22 |"


def test_the_fit_recovers_an_exponent():
    records = [timed("ours", 3e-9 * n**1.75, 12 * n, N=n) for n in (4096, 8192, 32768)]
    records += [timed("ours", 5.0, 2**30, N=1024), timed("other", 5.0, N=4096)]  # one is too small
    assert scaling.exponent(records, "ours", "seconds") == pytest.approx(1.75)
    assert scaling.exponent(records, "ours", "extra_bytes") == pytest.approx(1.0)
    assert scaling.exponent(records, "other", "seconds") is None


def test_targets_are_reached_or_missed(tmp_path):
    case = dict(zip(af_dcd.SUBJECT.columns, targets.PATCHES, strict=True))
    write(
        tmp_path,
        "af_dcd",
        "cpu",
        [timed("ours", 1.0, 30, **case), timed("plain", 2.6, 100, **case)],
    )
    case = dict(zip(row_lse.SUBJECT.columns, (16384, 16384, 128), strict=True))
    passes = {"ours-pass": 2e-4, "attention-cudnn": 1e-4}
    records = [timed(name, s, **case) | {"gpu_seconds": s} for name, s in passes.items()]
    write(
        tmp_path, "row_lse", "h100", records, gpu="H100", matmul_flops=4 * 16384**2 * 128 / 1.96e-4
    )
    assert targets.devices(tmp_path) == ["h100", "cpu"]
    lines = {
        device: targets.reached(tmp_path, device).splitlines()[2:] for device in ("h100", "cpu")
    }
    cells = [
        [c.strip() for c in line.split("|")[2:5]] for found in lines.values() for line in found
    ]
    assert cells == [
        ["at least 0.95", "0.98", "reached"],
        ["at most 1", "2", "missed"],
        ["at least 2.5", "2.6", "reached"],
        ["at most 0.25", "0.3", "missed"],
    ]


def test_the_page_says_who_is_better(tmp_path):
    records = [
        timed("ours", 10.0),
        timed("plain", 2.0, 2**22),
        timed("checkpointed", 11.0, 2**19),
        timed("ours-pass", 1.0),
        {"N": 512, "M": 512, "D": 8, "provider": "lightly", "skipped": "no wings"},
    ]
    write(tmp_path, "peers", "cpu", records)
    text = page.render(tmp_path)
    assert "Who is faster, as a fraction of ours:\n\n- plain: 0.20 at 512 512 8\n" in text
    assert "Who is leaner, as a fraction of ours:\n\n- checkpointed: 0.50 at 512 512 8\n" in text
    assert "- ours" not in text.partition("What they are")[0]
    assert "- lightly: `no wings (at 512 512 8)`\n" in text
    write(tmp_path, "peers", "cpu", [timed("ours", 1.0), timed("plain", 20.0)])
    assert "Who is faster, as a fraction of ours: nobody." in page.render(tmp_path)


def test_the_page_shows_gpus_first(tmp_path):
    case = dict(zip(contrast.SUBJECT.columns, ("batch", 1, 8, 4, 4, 0), strict=True))
    for device, machine in (("cpu", {}), ("h100", {"gpu": "NVIDIA H100"})):
        records = [timed("ours", 1e-3, **case), timed("plain", 2e-3, 2**21, **case)]
        write(tmp_path, "contrast", device, records, **machine)
    write(tmp_path, "scaling", "cpu", [timed("ours", 1.0), timed("plain", 2.0)])
    assert command("page", "--results", tmp_path, "--output", tmp_path / "page.md") == 0
    text = (tmp_path / "page.md").read_text()
    headings = re.findall(r"^##+ (.*)", text, flags=re.MULTILINE)
    question = page.TITLES["contrast"][0]
    assert headings[:4] == ["Summary", "NVIDIA H100", question, "P"]
    assert text.count(f"### {question}") == 2
    for name in ("contrast_cpu", "contrast_h100", "scaling_cpu"):
        assert (tmp_path / f"{name}_float32.png").stat().st_size > 8000
        assert f"results/{name}_float32.png)" in text


def test_the_summary_compares_the_same_case(tmp_path):
    subject, case, _ = page.SUMMARY[0]
    columns = dict(zip(SUBJECTS[subject].columns, ("pcd", 256, 224), strict=True))
    assert case == "pcd 256 224"
    records = [
        timed(name, seconds, **columns) | {"peak_bytes": peak * 2**30}
        for name, seconds, peak in (("ours", 0.2, 1), ("plain", 0.5, 3))
    ]
    write(tmp_path, subject, "h100", [*records, timed("ours", 9.0, **(columns | {"B": 1}))])
    assert "500 ms, 3.0 GiB | 200 ms, 1.0 GiB |" in page.render(tmp_path)


def test_the_page_names_what_is_missed(tmp_path):
    case = dict(zip(af_dcd.SUBJECT.columns, targets.PATCHES, strict=True))
    records = [timed("ours", 1.0, 30, **case), timed("plain", 2.6, 100, **case)]
    write(tmp_path, "af_dcd", "cpu", records)
    text = page.render(tmp_path)
    assert "1 of 2 targets, measured with pixdistill 1:" in text
    assert "- Af-DCD's contrast, pool 4: extra memory over plain's: 0.3, the target is at" in text


def test_the_page_is_what_the_command_writes():
    assert page.PAGE.read_text() == page.render(sheet.RESULTS), "run `python -m benchmarks page`"


def test_pictures_on_the_page_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page.PAGE.read_text())
    assert pictures
    assert all((page.PAGE.parent / picture).is_file() for picture in pictures)


# --- Packages and kernels -------------------------------------------------------------------------


def test_every_peer_is_in_the_extra_and_pinned():
    extras = (ROOT / "pyproject.toml").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    for package in {p.package for p in peers.PROVIDERS.values() if p.package}:
        name = package.replace("_", "-")
        assert f'"{name}>=' in extras
        assert f"\n{name}==" in pins


def test_memory_held_counts_matrices_and_pairs():
    assert peers.PROVIDERS["plain"].holds((100, 200, 8)) == 4 * 4 * 100 * 200
    assert peers.PROVIDERS["pytorch-metric-learning"].holds((100, 200, 8)) == 20 * 100 * 100 * 200
    assert peers.PROVIDERS["ours"].holds((10**6, 10**6, 8)) == 0
    assert contrast.holds(("both", 1, 8, 2, 5, 20)) == 16 * 10 * 30
    assert contrast.work(("queue", 1, 8, 2, 5, 20)) == 4 * 10 * 20 * 8


def test_kernels_of_a_call_are_compiled(tmp_path):
    """By the command, as far as one call goes; tests/test_compiled_kernels.py compiles more."""
    code = """
from benchmarks import kernels
kernels.calls = lambda: [kernels.Call("row_lse", {"D": 64, "values_only": True})]
from benchmarks.__main__ import main
import sys
if __name__ == "__main__":
    sys.exit(main(["kernels", "--arch", "sm_90", "--output", sys.argv[1]]))
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    out = run(str(program), str(tmp_path), env={"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert "row_lse_kernel" in out
    records = json.loads((tmp_path / "kernels.json").read_text())["records"]
    (record,) = [
        r for r in records if r["kernel"] == "row_lse_kernel"
    ]  # splits are joined by another
    assert record["call"] == "D=64 values_only"
    assert record["tensor_core"] > 0
    assert {call.operator for call in kernel_calls.calls()} == set(kernel_calls.OPERATORS)


def test_the_page_is_in_the_site():
    assert "[Benchmarks](benchmarks.md)" in (ROOT / "docs" / "index.md").read_text()
