"""The programs of docs/examples run, with few steps, and draw their pictures."""

import torch
from helpers import run


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
    """Every stride, in one process: the script itself starts one for each, which takes long."""
    code = """
import sys
sys.path.insert(0, "docs/examples")
from receptive_field import STRIDES, measure
for stride in STRIDES:
    print(*measure((stride, (16, 24), 2)))
"""
    rows = [[float(number) for number in row.split()] for row in run("-c", code).splitlines()]
    assert len(rows) == 4
    assert all(seconds > 0 and extra < 256 for seconds, extra in rows)


def test_the_drawing_of_the_pairs_runs(tmp_path):
    picture = tmp_path / "pairs.png"
    run("docs/examples/draw_af_dcd_pairs.py", "--output", str(picture))
    assert picture.stat().st_size > 10_000


def test_distill_digits_smoke(tmp_path):
    picture = tmp_path / "digits.png"
    options = ("--seeds", "1", "--steps", "3", "--teacher-steps", "3", "--test-scenes", "8")
    options += ("--mask-steps", "3", "--output", str(picture))
    for loss, logits in (("pcd", "0"), ("all", "0.5")):
        choice = ("--loss", loss, "--logits", logits, *(("--labels",) if loss == "pcd" else ()))
        out = run("docs/examples/distill_digits.py", *options, *choice)
        assert out.count("Verdict") == (1 if loss == "pcd" else 5)
    assert picture.stat().st_size > 20_000


def test_distill_pcd_smoke(tmp_path):
    """Two seeds with pairs by overlap, with intervals; one seed with pairs by index."""
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
