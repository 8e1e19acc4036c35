"""Distil Faster R-CNN with a ResNet-50 into Faster R-CNN with a ResNet-18 or a MobileNetV3, by MasKD.

    python docs/recipes/detection.py --data DATA --output runs/coco

DATA holds COCO 2017, or other data in its format. Tokens learn on the teacher's feature pyramid first;
then the student is trained with its own losses and the masked distance of all levels. Settings are
those of the official code of MasKD. docs/recipes/detection.md describes the flags.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Run, existing, fit, load, parser, stop, summed
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.detection import MeanAveragePrecision
from torchvision import datasets, tv_tensors
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image

from pixdistill import MaskedDistillationLoss, MaskedReceptiveTokens

WARM_UP = 500  # steps from a thousandth of the rate
Target = dict[str, Tensor]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; the schedule is twice the usual one, 24 epochs of COCO."""
    flags = parser(__doc__, steps=180_000, batch_size=16, lr=0.02, eval_every=15_000)
    add = flags.add_argument
    add("--train", default="train2017", help="folder of images and name of the annotations")
    add("--val", default="val2017", help="folder of images and name of the annotations")
    add("--teacher-weights", default="coco", help="coco (torchvision's), a file, or none")
    add("--student", choices=("resnet18", "mobilenet"), default="resnet18")
    add("--student-weights", default="imagenet", help="of the backbone: imagenet, a file, or none")
    add("--tokens", type=Path, help="learned tokens (an official file too), instead of learning")
    add("--token-steps", type=int, default=2000)
    add("--customize-after", type=int, default=7330, help="steps until the student's masks join")
    add("--weight", type=float, default=1.0, help="of the masked distance")
    add("--weight-decay", type=float, default=1e-4)
    add("--size", type=int, nargs=2, default=(800, 1333), help="shorter side, at most the longer")
    add("--boxes", type=int, default=512, help="boxes of an image that train the head")
    return flags.parse_args(argv)


class Images(Dataset[tuple[Tensor, Target]]):
    """Images `[3, H, W]` in [0, 1] and their boxes (x1, y1, x2, y2) and labels."""

    def __init__(self, args: argparse.Namespace, split: str, train: bool) -> None:
        annotations = f"annotations/instances_{split}.json"
        existing(args.data, [split, annotations])
        self.data = datasets.CocoDetection(args.data / split, str(args.data / annotations))
        coco = self.data.coco
        self.classes = max(coco.cats) + 1  # 0 is the background; COCO's numbers have gaps
        self.names = {number: category["name"] for number, category in coco.cats.items()}
        if train:  # an image without boxes teaches the heads nothing
            boxed = {box["image_id"] for box in coco.anns.values() if usable(box)}
            self.data.ids = [number for number in self.data.ids if number in boxed]
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if train else [])])
        self.train = train

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture, annotations = self.data[index]
        kept = [box for box in annotations if usable(box) or not self.train]
        corners = torch.tensor([box["bbox"] for box in kept], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        size = (picture.height, picture.width)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
        image, boxes = self.transform(picture, boxes)
        target = {"boxes": boxes.as_subclass(Tensor)}
        for key, name in (("labels", "category_id"), ("iscrowd", "iscrowd")):
            target[key] = torch.tensor([box[name] for box in kept], dtype=torch.int64)
        return image.as_subclass(Tensor), target


def usable(box: dict[str, Any]) -> bool:
    """Whether a box is that of one object and has an area."""
    return not box.get("iscrowd") and min(box["bbox"][2:]) > 0


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images differ in size: a batch is a list of them and a list of targets."""
    return [image for image, _ in batch], [target for _, target in batch]


def teacher_network(args: argparse.Namespace, classes: int) -> FasterRCNN:
    """Faster R-CNN with torchvision's COCO weights, those of a file, or random ones."""
    official = args.teacher_weights == "coco"
    if official and classes != 91:
        stop(f"torchvision's weights know COCO's 91 numbers of classes, and {args.data} has {classes}: "
             "pass --teacher-weights FILE, a state_dict of "
             f"fasterrcnn_resnet50_fpn(num_classes={classes})")  # fmt: skip
    network = fasterrcnn_resnet50_fpn(
        weights="COCO_V1" if official else None, weights_backbone=None, num_classes=classes,
        min_size=args.size[0], max_size=args.size[1], box_batch_size_per_image=args.boxes,
    )  # fmt: skip
    if not official and args.teacher_weights != "none":
        network.load_state_dict(load(args.teacher_weights, "--teacher-weights"))
    return network


def student_network(args: argparse.Namespace, classes: int) -> FasterRCNN:
    """The same detector with a small backbone, and levels of the teacher's strides 4 to 64."""
    weights = "IMAGENET1K_V1" if args.student_weights == "imagenet" else None
    frozen = 0 if weights is None else 2  # stem and first stage, as the official code does
    if args.student == "resnet18":
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=weights, trainable_layers=5 - frozen
        )
    else:
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=weights, fpn=True,
            returned_layers=[1, 2, 3, 4], trainable_layers=6 - frozen,
        )  # fmt: skip
    if args.student_weights not in ("imagenet", "none"):
        state = load(args.student_weights, "--student-weights")
        state = {key: state[key] for key in state if not key.startswith("fc.")}
        backbone.body.load_state_dict(state)
    return FasterRCNN(
        backbone, classes, min_size=args.size[0], max_size=args.size[1],
        box_batch_size_per_image=args.boxes,
    )  # fmt: skip


def detect(network: FasterRCNN, images: Any, maps: dict[str, Tensor], targets: list[Target]) -> Any:
    """The four losses of the heads on these maps, in float32: half precision moves boxes."""
    with torch.autocast(images.tensors.device.type, enabled=False):
        maps = {name: each.float() for name, each in maps.items()}
        proposals, losses = network.rpn(images, maps, targets)
        _, others = network.roi_heads(maps, proposals, images.image_sizes, targets)
    return {**losses, **others}


class TokenLearner(nn.Module):
    """MasKD's first stage: tokens that mask every level of the frozen teacher's pyramid."""

    def __init__(self, teacher: FasterRCNN) -> None:
        super().__init__()
        self.frozen = (teacher,)  # a tuple: neither saved nor set to train mode
        width = teacher.backbone.out_channels
        self.tokens = nn.ModuleList(MaskedReceptiveTokens(width, 6) for _ in range(5))

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The teacher's losses through the masks, and their overlap."""
        (teacher,) = self.frozen
        batch, targets = teacher.transform(images, targets)
        with torch.no_grad():
            maps = teacher.backbone(batch.tensors)
        masked, overlaps, areas = {}, [], []
        tokens: Any
        for tokens, (name, level) in zip(self.tokens, maps.items(), strict=True):
            masked[name], overlap = tokens(level)
            overlaps.append(overlap)
            areas.append(tokens.masks(level).detach().mean((0, 2, 3)))
        parts = {
            **detect(teacher, batch, masked, targets),
            "diversity": torch.stack(overlaps).sum(),
        }
        area = torch.stack(areas)
        return {**summed(parts), "smallest_area": area.min(), "largest_area": area.max()}


class Distiller(nn.Module):
    """Student and loss: everything that is trained, in one module for DDP."""

    def __init__(self, args: Any, teacher: FasterRCNN, student: FasterRCNN, tokens: Any) -> None:
        super().__init__()
        self.frozen, self.student, self.weight = (teacher,), student, args.weight
        self.criterion = MaskedDistillationLoss(
            tokens, student_channels=student.backbone.out_channels, eps=0.0,
            customize_after=args.customize_after,
        )  # fmt: skip

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The detector's losses and the masked distance, and their sum."""
        (teacher,) = self.frozen
        batch, targets = self.student.transform(images, targets)
        with torch.no_grad():
            target = teacher.backbone(batch.tensors)
        maps = self.student.backbone(batch.tensors)
        parts = detect(self.student, batch, maps, targets)
        return summed({**parts, "maskd": self.weight * self.criterion(maps, target)})


@torch.no_grad()
def mean_ap(run: Run, network: nn.Module, data: Images) -> dict[str, float]:
    """COCO's mAP over the validation images, which the processes share."""
    limit = min(len(data), run.args.limit_data or len(data))
    part = Subset(data, range(run.rank, limit, run.world))
    loader = DataLoader(part, num_workers=run.args.workers, collate_fn=collate,
                        generator=torch.Generator())  # fmt: skip
    modes = {module: module.training for module in network.modules()}
    network.eval()
    pairs: list[Any] = []
    for images, targets in loader:
        found = network(run.move(images))
        pairs += [({k: v.cpu() for k, v in found[0].items()}, targets[0])]
    for module, mode in modes.items():
        module.training = mode
    everywhere = [pairs] * run.world
    if run.world > 1:
        dist.all_gather_object(everywhere, pairs)
    metric = MeanAveragePrecision(sync_on_compute=False)
    for found, target in (pair for each in everywhere for pair in each):
        metric.update([found], [target])
    scores = metric.compute()
    return {name: float(scores[name]) for name in ("map", "map_50", "map_75")}


@torch.no_grad()
def draw(run: Run, networks: list[Any], tokens: Any, data: Images) -> None:
    """`predictions.png`, four images by row: true boxes, boxes of each network, masks."""
    rows = []
    for index in range(min(4, len(data))):
        image, target = data[index]
        found = [target, *(network.eval()(run.move([image]))[0] for network in networks)]
        row = []
        for each in found:
            kept = each["scores"] > 0.5 if "scores" in each else slice(None)
            names = [data.names.get(int(label), "?") for label in each["labels"][kept]]
            boxes = each["boxes"][kept].cpu()
            row.append(draw_bounding_boxes(image, boxes, names, width=2) if len(boxes) else image)
        level = networks[0].backbone(networks[0].transform(run.move([image]))[0].tensors)["0"]
        row += [mask.expand(3, -1, -1) for mask in tokens[0].masks(level)[0].cpu()]
        rows += [F.interpolate(each[None], (192, 192)) for each in row]
    save_image(torch.cat(rows), run.args.output / "predictions.png", nrow=len(row))


def learned_tokens(run: Run, teacher: FasterRCNN, data: Images) -> nn.ModuleList | None:
    """Tokens from `--tokens`, or learned here; None where `--stop-after` ended the stage."""
    args = run.args
    if args.tokens is not None:
        return MaskedReceptiveTokens.from_official(load(args.tokens, "--tokens", "MasKD's tokens"))
    teacher.rpn.train()  # only in train mode do the heads return losses
    teacher.roi_heads.train()
    learner = TokenLearner(teacher)
    model = run.trained(learner, compiled=learner.tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = CosineAnnealingLR(optimizer, args.token_steps)
    if not fit(run, "tokens", model, optimizer, schedule, data, args.token_steps, collate=collate):
        return None
    if run.rank == 0:
        levels: Any = learner.tokens
        official = MaskedReceptiveTokens.to_official(levels)
        torch.save(official, args.output / "tokens.pth")
    return learner.tokens


def main(argv: list[str] | None = None) -> None:
    """Learn the tokens, then distil."""
    run = Run(args := arguments(argv))
    train, test = Images(args, args.train, True), Images(args, args.val, False)
    teacher = run.frozen(teacher_network(args, train.classes))
    if not args.resume:
        run.print(f"teacher: {mean_ap(run, teacher, test)}")
    if (tokens := learned_tokens(run, teacher, train)) is None:
        return
    torch.manual_seed(args.seed)
    student = student_network(args, train.classes)
    distiller = Distiller(args, teacher, student, tokens)
    model = run.trained(distiller, compiled=student.backbone)

    def rate(step: int) -> float:
        """Warm-up, then a tenth after two thirds of the steps, and again after eleven twelfths."""
        drops = (step >= args.steps * 2 // 3) + (step >= args.steps * 11 // 12)
        return min(1.0, 0.001 + step / min(WARM_UP, args.steps)) * 0.1**drops

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    done = fit(
        run, "student", model, optimizer, LambdaLR(optimizer, rate), train, args.steps,
        collate=collate, after=distiller.criterion.step,
        evaluate=lambda: mean_ap(run, student, test),
    )  # fmt: skip
    if done and run.rank == 0:
        torch.save(student.state_dict(), args.output / "student_weights.pth")
        draw(run, [teacher, student], tokens, test)


if __name__ == "__main__":
    main()
