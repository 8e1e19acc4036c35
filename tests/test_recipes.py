"""The recipes of docs/recipes, from end to end, on small made data in the format of the real data sets.

Nothing is downloaded: all weights are random. Two processes meet through a file, as in test_distributed.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import results
from torch import nn

try:
    import torchmetrics  # noqa: F401
    import torchvision  # noqa: F401
    from PIL import Image
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is built for another torch
    pytest.skip(f"needs the extra recipes: {error}", allow_module_level=True)

RECIPES = str(Path(__file__).parent.parent / "docs" / "recipes")
sys.path.insert(0, RECIPES)

import common  # noqa: E402
import detection  # noqa: E402
import segmentation  # noqa: E402
import segmentation_data  # noqa: E402

from pixdistill import (  # noqa: E402
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    PixelContrastLoss,
)

TRIAL = [
    "--workers",
    "0",
    "--log-every",
    "1",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--seed",
    "3",
]


def voc(root, images=6, size=64):
    """Pascal VOC's folders: noise, labels in squares of 16 pixels, the upper 8 rows to be ignored."""
    folder, generator = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    names = [f"2007_{number:06}" for number in range(images)]
    for name in names:
        noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "JPEGImages" / f"{name}.jpg")
        labels = generator.integers(0, 21, (size // 16, size // 16), dtype=np.uint8)
        labels = labels.repeat(16, 0).repeat(16, 1)
        labels[:8] = 255
        picture = Image.fromarray(labels, mode="L").convert("P")
        picture.putdata(labels.flatten().tolist())
        picture.save(folder / "SegmentationClass" / f"{name}.png")
    for split, part in (("train", names[:-2]), ("val", names[-2:])):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(part))
    return root


def coco(root, images=4, size=64):
    """COCO's folders: noise with two boxes, a crowd and, in the first image, none."""
    generator, number = np.random.default_rng(0), 0
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", images + 1), ("val2017", 3)):
        (root / split).mkdir()
        pictures, boxes = [], []
        for _ in range(count):
            number += 1
            name = f"{number:012}.jpg"
            noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / name)
            pictures.append({"id": number, "file_name": name, "width": size, "height": size})
            for category, crowd in ((1, 0), (4, 0), (4, 1)) if number > 1 else ((4, 1),):
                box = [*generator.integers(0, size // 2, 2), *generator.integers(8, size // 2, 2)]
                box = {"bbox": [int(side) for side in box], "category_id": category}
                box |= {"id": len(boxes) + 1, "image_id": number, "iscrowd": crowd, "area": 1}
                boxes.append(box)
        categories = [{"id": 1, "name": "square"}, {"id": 4, "name": "bar"}]
        content = {"images": pictures, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


WEIGHTS = ["--teacher-weights", "none", "--student-weights", "none"]
BOXES = [*TRIAL, *WEIGHTS, "--size", "64", "64", "--boxes", "16"]
SMALL = [*TRIAL, *WEIGHTS, "--teacher", "resnet50"]
SMALL += [
    "--crop",
    "64",
    "64",
    "--projector-width",
    "16",
    "--losses",
    "kl",
    "af_dcd",
    "maskd",
    "pcd",
]


def rows(path):
    """The lines of a log, without what measures time and memory."""
    measured = {"images_per_s", "seconds_per_step", "memory_mib"}
    with path.open() as file:
        return [
            {key: float(value) for key, value in row.items() if key not in measured}
            for row in csv.DictReader(file)
        ]


def test_segmentation_resumes_to_the_same_numbers(tmp_path):
    """Cut while the tokens learn, and again in the middle of the distillation."""
    flags = [*SMALL, "--data", str(voc(tmp_path / "data")), "--accumulate", "2"]
    flags += ["--steps", "4", "--token-steps", "3", "--eval-every", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    segmentation.main([*flags, "--output", str(whole)])
    segmentation.main([*flags, "--output", str(cut), "--stop-after", "2"])
    assert not (cut / "tokens.pth").exists()
    segmentation.main([*flags, "--output", str(cut), "--stop-after", "3", "--resume"])
    assert len(rows(cut / "student.csv")) == 3
    segmentation.main([*flags, "--output", str(cut), "--resume"])
    for name in ("tokens.csv", "student.csv", "student_metrics.csv"):
        assert rows(cut / name) == rows(whole / name)
    first, last = rows(whole / "student.csv")[0], rows(whole / "student.csv")[-1]
    parts = ["task", "kl", "af_dcd", "maskd", "pcd"]
    assert list(first) == ["step", "lr", "loss", *parts]
    assert first["loss"] == pytest.approx(sum(first[part] for part in parts), rel=1e-5)
    assert first["lr"] == 0.02 > last["lr"] > 0
    assert last["kl"] < first["kl"]
    for name in ("tokens.pth", "student_weights.pth"):
        ours, theirs = (torch.load(folder / name) for folder in (cut, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("predictions.png", "student.png", "tokens.png"):
        assert (cut / name).stat().st_size > 5_000


def test_detection_resumes_to_the_same_numbers(tmp_path):
    """The count of steps, after which the student's masks join, goes on as well."""
    flags = ["--data", str(coco(tmp_path / "data")), *BOXES, "--amp", "bf16", "--eval-every", "2"]
    flags += ["--steps", "4", "--token-steps", "2", "--customize-after", "3", "--lr", "0.001"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    detection.main([*flags, "--output", str(whole)])
    detection.main([*flags, "--output", str(cut), "--stop-after", "2"])
    detection.main([*flags, "--output", str(cut), "--resume"])
    for name in ("tokens.csv", "student.csv", "student_metrics.csv"):
        assert rows(cut / name) == rows(whole / name)
    heads = ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"]
    assert list(rows(whole / "student.csv")[0]) == ["step", "lr", "loss", *heads, "maskd"]
    assert list(rows(whole / "student_metrics.csv")[0]) == ["step", "map", "map_50", "map_75"]
    assert torch.load(cut / "student.pt")["model"]["criterion.steps"] == 4
    assert (cut / "predictions.png").stat().st_size > 5_000


def fixed_norm(norm, x):
    mean, variance = norm.running_mean, norm.running_var
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)


def train_quietly(rank, runs):
    """Without what differs by process on a CPU: dropout, BatchNorm's statistics, drawn anchors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", lambda self, x: x)
        patch.setattr(nn.BatchNorm2d, "forward", fixed_norm)
        patch.setattr(torch, "randperm", lambda n, device=None, generator=None: torch.arange(n))
        for recipe, flags in runs:
            sys.modules[recipe].main(flags)


def test_two_processes_train_the_students_of_one(tmp_path):
    steps = ["--amp", "none", "--steps", "2", "--token-steps", "2"]
    flags = {
        "segmentation": [*SMALL, "--data", str(voc(tmp_path / "voc")), "--pcd-negatives", "batch"],
        "detection": [
            *BOXES,
            "--data",
            str(coco(tmp_path / "coco")),
            "--lr",
            "0.001",
            "--accumulate",
            "2",
        ],
    }
    flags["segmentation"] += ["--mask-ratio", "0", "--scale", "1", "1"]
    train = {
        n: [
            (name, [*each, *steps, "--output", f"{tmp_path}/{name}{n}"])
            for name, each in flags.items()
        ]
        for n in (1, 2)
    }
    train_quietly(0, train[1])
    results(2, train_quietly, train[2])
    for recipe in flags:
        for name in ("tokens.csv", "student.csv", "student_metrics.csv"):
            ours, theirs = (rows(tmp_path / f"{recipe}{n}" / name) for n in (2, 1))
            for row, expected in zip(ours, theirs, strict=True):
                for extreme in ("smallest_area", "largest_area"):  # of a process, then averaged
                    row.pop(extreme, None)
                    expected.pop(extreme, None)
                assert row == pytest.approx(expected, rel=1e-3, abs=1e-5), (recipe, name)


def test_the_parts_of_the_segmentation_loss(tmp_path):
    """Each part from the networks' own outputs, with the ignored rows left out by hand."""
    flags = ["--data", ".", "--output", str(tmp_path), *SMALL, "--student", "resnet18"]
    args = segmentation.arguments(flags)
    torch.manual_seed(0)
    teacher = segmentation.teacher_network(args).eval()
    student = segmentation.student_network(args)
    tokens = MaskedReceptiveTokens(21, 8, weighted=False)
    model = segmentation.Distiller(args, teacher, student, tokens).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 21, (2, 64, 64))
    labels = labels[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2) % 5
    labels[:, :16] = 255  # two rows of a map of stride 8
    parts = model(images, labels)

    maps, target = student.backbone(images), teacher.backbone(images)["out"]
    assert maps["out"].shape[2:] == target.shape[2:] == (8, 8)
    answers, theirs = student(images), teacher(images)
    torch.testing.assert_close(
        parts["task"], F.cross_entropy(answers["out"], labels, ignore_index=255)
    )
    auxiliary = F.cross_entropy(answers["aux"], labels, ignore_index=255)
    torch.testing.assert_close(parts["auxiliary"], 0.4 * auxiliary)
    ours, theirs = (
        network.classifier(x)[:, :, 2:]
        for network, x in ((student, maps["out"]), (teacher, target))
    )
    p, q = theirs.softmax(1), ours.softmax(1)
    torch.testing.assert_close(parts["kl"], (p * (p / q).log()).sum(1).mean())
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[:, :2] = False
    distance = MaskedDistillationLoss(tokens)(ours, theirs)
    torch.testing.assert_close(parts["maskd"], 0.5 * distance)
    contrast = PixelContrastLoss(negatives="image")
    projected = model.project(maps["out"])[:, :, 2:]
    torch.testing.assert_close(parts["pcd"], contrast(projected, target[:, :, 2:]))
    args.pcd_labels = True  # a pixel's class, from the middle of its 8 x 8 labels
    classes = labels[:, 4::8, 4::8][:, 2:]
    expected = contrast(projected, target[:, :, 2:], labels=classes)
    assert not torch.isclose(expected, parts["pcd"], rtol=1e-3)
    torch.testing.assert_close(model(images, labels)["pcd"], expected)
    expected = model.criteria["af_dcd"](maps["out"], target, valid_mask=valid)
    torch.testing.assert_close(parts["af_dcd"], expected)
    torch.testing.assert_close(parts["loss"], sum(v for k, v in parts.items() if k != "loss"))


def cityscapes(root):
    for part in ("leftImg8bit", "gtFine"):
        for split in ("train", "val"):
            (root / part / split / "bonn").mkdir(parents=True)
            name = root / part / split / "bonn" / "bonn_000000_000019"
            if part == "leftImg8bit":
                Image.new("RGB", (64, 32)).save(f"{name}_leftImg8bit.png")
            else:
                numbers = np.arange(34, dtype=np.uint8).repeat(64)[: 64 * 32].reshape(32, 64)
                Image.fromarray(numbers).save(f"{name}_gtFine_labelIds.png")
    return root


def test_cityscapes_labels_are_those_of_training(tmp_path):
    flags = [
        "--dataset",
        "cityscapes",
        "--data",
        str(cityscapes(tmp_path / "data")),
        "--output",
        "x",
    ]
    image, labels = segmentation_data.Images(segmentation.arguments(flags), "val")[0]
    assert image.shape == (3, 32, 64)
    by_hand = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
    by_hand |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16}  # the rows of numbers 0 to 31
    assert labels[:, 0].tolist() == [by_hand.get(number, 255) for number in range(32)]


def test_augmentation_keeps_image_and_labels_together(tmp_path):
    """A picture of its own labels still is one after scale, crop and flip; what is filled is ignored."""
    folder = voc(tmp_path / "data") / "VOCdevkit" / "VOC2012"
    for path in folder.glob("SegmentationClass/*.png"):
        labels = np.array(Image.open(path)) % 255
        Image.fromarray((labels * 12).astype(np.uint8)).convert("RGB").save(
            folder / "JPEGImages" / f"{path.stem}.jpg", quality=100
        )
    flags = [
        "--data",
        str(tmp_path / "data"),
        "--output",
        "x",
        "--crop",
        "96",
        "96",
        "--scale",
        "1",
        "1.2",
    ]
    data = common.Seeded(segmentation_data.Images(segmentation.arguments(flags), "train"))
    image, labels = data[0, 7]
    deviation, mean = (
        torch.tensor(x)[:, None, None]
        for x in (segmentation_data.DEVIATION, segmentation_data.MEAN)
    )
    seen = ((image * deviation + mean) * 255 / 12).mean(0).round()
    valid = labels != 255
    assert 0.3 < valid.float().mean() < 0.8
    assert (seen[valid] - labels[valid]).abs().gt(1).float().mean() < 0.1
    assert all(torch.equal(a, b) for a, b in zip(data[0, 7], (image, labels), strict=True))
    assert not torch.equal(data[0, 8][0], image)


MISTAKES = {
    "no such folder": (
        ["--data", "/nowhere"],
        r"/nowhere/VOCdevkit/VOC2012 does not exist",
    ),
    "a list is missing": ([], r"train.txt does not exist"),
    "batch and processes": (["--accumulate", "3"], r"--batch-size 4 must be a multiple of 3"),
    "no weights of Cityscapes": (["--dataset", "cityscapes"], r"leftImg8bit/train does not exist"),
    "no checkpoint": (
        ["--teacher-weights", "/nowhere.pth"],
        r"--teacher-weights /nowhere.pth is not",
    ),
    "no tokens": (["--tokens", "/nowhere.pth"], r"--tokens /nowhere.pth is not a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_a_sentence(tmp_path, mistake):
    flags, sentence = MISTAKES[mistake]
    data = voc(tmp_path / "data")
    if mistake == "a list is missing":
        (data / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    with pytest.raises(SystemExit, match=sentence):
        segmentation.main(["--data", str(data), "--output", str(tmp_path / "out"), *SMALL, *flags])


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(tmp_path):
    flags = common.parser("", steps=4, batch_size=2).parse_args
    given = ["--data", ".", "--output", str(tmp_path), "--device", "cpu"]
    run = common.Run(flags(given))
    run.save("student.pt", 2, {"scaler": run.scaler})
    with pytest.raises(SystemExit, match="holds a run: pass --resume"):
        common.Run(flags(given))
    other = common.Run(flags([*given, "--resume", "--seed", "1"]))
    with pytest.raises(SystemExit, match=r"'seed': 0.*'seed': 1.*pass the same flags"):
        other.load("student.pt", {})
    assert common.Run(flags([*given, "--resume"])).load("student.pt", {"scaler": run.scaler}) == 2


class Line(nn.Linear):
    """A network of two weights, one clipped, that also drops inputs at random."""

    def forward(self, x, y):
        loss = (super().forward(F.dropout(x, self.dropout)) - y).square().mean()
        return common.summed({"half": loss / 2, "rest": loss / 2})


def fit_a_line(folder, *flags, dropout=0.0):
    """Parameters, and the scale of the loss, after 6 steps of 4 of 10 points."""
    parse = common.parser("", steps=6, batch_size=4, lr=0.1).parse_args
    given = ["--data", ".", "--output", str(folder), "--device", "cpu", "--workers", "0"]
    run = common.Run(parse([*given, "--amp", "none", "--log-every", "1", *flags]))
    generator = torch.Generator().manual_seed(0)
    points = torch.utils.data.TensorDataset(*torch.randn(2, 10, 1, generator=generator))
    model = run.trained(Line(1, 1))
    model.dropout = dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=run.args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, 6, power=0.9)
    common.fit(run, "line", model, optimizer, schedule, points, 6, clip=([model.weight], 0.05))
    return [*(p.detach() for p in model.parameters()), run.scaler.get_scale()]


def test_fp16_resumes_with_its_scale(tmp_path):
    whole = fit_a_line(tmp_path / "a", "--amp", "fp16", dropout=0.5)
    fit_a_line(tmp_path / "b", "--amp", "fp16", "--stop-after", "4", dropout=0.5)
    assert fit_a_line(tmp_path / "b", "--amp", "fp16", "--resume", dropout=0.5) == whole
    saved = torch.load(tmp_path / "b" / "line.pt")
    assert saved["scaler"]["scale"] == whole[-1] == 2**15  # the first step overflows at 2**16
    assert saved["scaler"]["_growth_tracker"] == 5


def test_accumulated_and_clipped_steps_are_those_of_torch(tmp_path):
    """The whole loop again by hand: order, gradient of the mean, one weight clipped, rate."""
    weight, bias, _ = fit_a_line(tmp_path / "a", "--accumulate", "2")
    torch.manual_seed(0)
    line = nn.Linear(1, 1)
    x, y = torch.randn(2, 10, 1, generator=torch.Generator().manual_seed(0))
    order = [
        torch.randperm(10, generator=torch.Generator().manual_seed(epoch)) for epoch in range(3)
    ]
    momentum = [torch.zeros_like(p) for p in line.parameters()]
    for step in range(6):
        batch = torch.cat(order)[4 * step : 4 * step + 4]
        loss = (line(x[batch]) - y[batch]).square().mean()
        gradients = list(torch.autograd.grad(loss, line.parameters()))
        gradients[0] = gradients[0].clamp(-0.05, 0.05)
        for p, m, g in zip(line.parameters(), momentum, gradients, strict=True):
            m.mul_(0.9).add_(g)
            p.data -= 0.1 * (1 - step / 6) ** 0.9 * m
    torch.testing.assert_close([weight, bias], [line.weight.data, line.bias.data])
    log = rows(tmp_path / "a" / "line.csv")
    assert [row["lr"] for row in log] == pytest.approx([0.1 * (1 - i / 6) ** 0.9 for i in range(6)])
    assert log[0]["loss"] == pytest.approx(2 * log[0]["half"])


def test_labels_out_of_range_name_their_file(tmp_path):
    args = segmentation.arguments(["--data", str(voc(tmp_path / "d")), "--output", "x"])
    data = segmentation_data.Images(args, "val")
    data.classes = 3
    with pytest.raises(ValueError, match=r"2007_000004.png has a label above 2"):
        data[0]


def test_processes_and_resumed_runs_share_one_order():
    """Two ranks hold the halves of each batch of one process; an epoch is each image once."""

    class Fake:
        def __init__(self, rank, world, accumulate=1):
            self.rank, self.world = rank, world
            self.args = common.parser("", batch_size=4, accumulate=accumulate, seed=5).parse_args(
                ["--data", ".", "--output", "."]
            )

    def order(*place, first=0, last=6):
        return list(common.Batches(8, Fake(*place), first, last))

    one, ranks = order(0, 1), [order(rank, 2) for rank in (0, 1)]
    assert one == [a + b for a, b in zip(*ranks, strict=True)]
    halves = order(0, 1, 2)
    assert one == [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert order(0, 1, first=4) == one[4:]
    images = [index for batch in one for index, _ in batch]
    assert sorted(images[:8]) == sorted(images[8:16]) == list(range(8)) != images[:8]
    assert images[:8] != images[8:16]
    assert len({seed for batch in one for _, seed in batch}) == 24


def test_levels_of_the_small_detector_are_those_of_the_teacher():
    for student in ("resnet18", "mobilenet"):
        args = detection.arguments(["--data", ".", "--output", ".", *BOXES, "--student", student])
        maps = detection.student_network(args, 5).eval().backbone(torch.zeros(1, 3, 64, 96))
        sizes = {"0": (16, 24), "1": (8, 12), "2": (4, 6), "3": (2, 3), "pool": (1, 2)}
        assert {name: tuple(level.shape[2:]) for name, level in maps.items()} == sizes


def test_detection_data(tmp_path):
    """Images without a box of one object are left out of training; boxes flip with their image."""
    args = detection.arguments(["--data", str(coco(tmp_path / "d")), "--output", "x"])
    train, test = (
        detection.Images(args, "train2017", True),
        detection.Images(args, "val2017", False),
    )
    assert (len(train), len(test), train.classes) == (4, 3, 5)
    raw = test.data.coco.loadAnns(test.data.coco.getAnnIds(test.data.ids[0]))
    image, target = test[0]
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1
    assert target["boxes"].tolist() == [
        [x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in raw)
    ]
    assert target["labels"].tolist() == [1, 4, 4]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    draws = [common.Seeded(train)[0, seed] for seed in range(8)]
    flipped = next(each for each in draws if not torch.equal(each[0], draws[0][0]))
    torch.testing.assert_close(flipped[0].flip(2), draws[0][0])
    x1, _, x2, _ = draws[0][1]["boxes"].unbind(1)
    torch.testing.assert_close(flipped[1]["boxes"][:, 0], 64 - x2)
    torch.testing.assert_close(flipped[1]["boxes"][:, 2], 64 - x1)
    assert len(draws[0][1]["labels"]) == 2
