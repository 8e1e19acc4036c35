"""docs/examples/study.py runs, goes on where it was killed, and its intervals are Student's."""

import itertools
import json
import math
import re
import sys

import pytest
import torch
from helpers import ROOT, run

from pixdistill import MHSAPlugin

sys.path.insert(0, str(ROOT / "docs/examples"))

# Few arms: one of each kind.
CODE = """
import json
import sys
from pathlib import Path

sys.path.insert(0, "docs/examples")
import study

study.QUICK = study.Sizes(
    seeds=2, budgets=(1, 2), trial_steps=1, scenes=16, labels=(4, 8), unlabelled=16,
    pretrain_steps=1, tune_steps=1, test_scenes=16, teacher_scenes=32, teacher_steps=1,
    mask_steps=1, whole_images=32, whole_steps=1,
)
study.PARTS["budget"] = ["alone", "kl", "mse", "maskd", "maskd+kl"]
study.PARTS["few-labels"] = ["scratch", "pooled", "pcd"]
options = ["budget", "few-labels", "--quick", "--workers", "1", "--output", sys.argv[1]]
first = study.main(options)

# A killed study: the last records are lost.
file = Path(sys.argv[1]) / "results.json"
file.write_text(json.dumps({**first, "records": first["records"][:-3]}))
again = study.main(options)
for one in (first, again):
    one["records"].sort(key=lambda record: record["key"])
print("the same" if json.loads(json.dumps(first)) == json.loads(json.dumps(again)) else "other")
"""


def test_study_smoke(tmp_path):
    """Four trials per arm with one seed on validation digits, then every seed on test digits."""
    out = run("-c", CODE, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    tried = [record for record in results["records"] if record["split"] == "validation"]
    assert len(tried) == 4 * 8
    assert {record["seed"] for record in tried} == {1000}
    kept = [record for record in results["records"] if record["split"] == "test"]
    assert len(kept) == 2 * (5 * 2 + 3)
    assert out.count("minus student alone") == out.count("minus from scratch") == 2
    for part in ("budget", "few-labels"):
        assert (tmp_path / f"{part}.png").stat().st_size > 20_000
    for record in kept:  # what is chosen is the best trial of its arm
        arm = [r for r in tried if r["arm"] == record["arm"]]
        best = max(arm, key=lambda r: sum(r["scores"].values()))
        assert record["settings"] == best["settings"]

    assert out.splitlines()[-1] == "the same"  # after a kill


def test_arms_without_labels(monkeypatch):
    """What each arm trains, what its student keeps of the plug-in, and the steps of its fine-tuning."""
    import study
    from digit_scenes import Labelled
    from study_losses import OBJECTIVES
    from study_scenes import Data, Machine, vector_head

    torch.manual_seed(0)
    scenes = {"test": Labelled(torch.randn(4, 1, 32, 32), torch.randint(11, (4, 32, 32)))}
    scenes["train"] = scenes["test"]
    maps = {"maps": torch.randn(4, 32, 8, 8)}
    data = Data(scenes, maps, 0.0, vector_head(32).state_dict())
    students, steps = {}, {}

    def fine_tune(machine, data, network, count, rate, steps_of_arm, seed):
        students[arm], steps[arm] = network, steps_of_arm

    monkeypatch.setattr(study, "load", lambda *_: data)
    monkeypatch.setattr(study, "fine_tune", fine_tune)
    sizes = study.Sizes(pretrain_steps=2, tune_steps=3)
    settings = (("pretrain_rate", 1e-2), ("rate", 1e-2))
    for arm in OBJECTIVES:
        job = study.Job(arm, settings, (4,), 0, "test")
        study.train(job, sizes, Machine("cpu", amp=False), None)
    assert steps == {arm: 5 if arm == "scratch_long" else 3 for arm in OBJECTIVES}
    plugged = [
        arm for arm, s in students.items() if any(isinstance(m, MHSAPlugin) for m in s.modules())
    ]
    assert plugged == ["pcd_keep_plugin"]
    weights = {arm: student.middle[0][0].weight for arm, student in students.items()}
    assert torch.equal(weights.pop("scratch_long"), weights["scratch"])
    assert torch.equal(weights.pop("pcd_keep_plugin"), weights["pcd"])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights.values(), 2))


def test_intervals_of_paired_differences():
    """Against the quantile 4.3027 of Student's t with two degrees of freedom, from a table."""
    from study_report import Interval, differences

    scores = {"a": {10: [1.0, 2.0, 6.0]}, "b": {10: [0.0, 0.0, 0.0]}}
    interval = differences(scores, "a", "b")[10]
    deviation = math.sqrt((4 + 1 + 9) / 2)
    assert interval.mean == pytest.approx(3.0)
    assert interval.margin == pytest.approx(4.3027 * deviation / math.sqrt(3), rel=1e-4)
    assert "*" not in str(interval)
    assert str(Interval(3.0, 2.0)) == "+3.00 (+1.00 to +5.00)*"
    assert str(Interval(-3.0, 2.0)).endswith("*")
    assert Interval.of([1.0]).margin == math.inf


@pytest.mark.parametrize(
    ("run", "parts"), [("cpu", None), ("gpu", None), ("cpu-bfloat16", ["few-labels"])]
)
def test_the_page_shows_what_was_measured(run, parts):
    from study import PARTS
    from study_report import tables

    results = json.loads((ROOT / f"docs/study/{run}/results.json").read_text())
    page = (ROOT / "docs/study.md").read_text()
    parts = parts or list(PARTS)
    assert re.findall(f"<!-- {run} ([\\w-]+) -->", page) == parts
    shown = [tables(part, PARTS[part], results) for part in parts]
    assert all(text.rstrip() in page for text in shown)

    summary = page[: page.index("## Budget")]
    column = ["cpu", "gpu", "cpu-bfloat16"].index(run)
    rows = [line.strip("| ").split(" | ")[1:] for line in summary.splitlines() if " to " in line]
    cells = [row[column] for row in rows if len(row) > column]
    assert len(cells) >= 10
    assert all(cell == "not run" or any(f"| {cell} |" in text for text in shown) for cell in cells)
