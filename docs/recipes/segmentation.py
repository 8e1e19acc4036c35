"""Distil DeepLabV3 with a ResNet-101 into DeepLabV3 with a MobileNetV3 or a ResNet-18.

    python docs/recipes/segmentation.py --data DATA --output runs/voc

DATA holds Pascal VOC 2012 or Cityscapes as torchvision's data sets expect them. Settings are those of
the official code of Af-DCD and MasKD. docs/recipes/segmentation.md describes flags and losses.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Run, fit, load, parser, stop, summed
from segmentation_data import CLASSES, IGNORE, Images, draw, mean_iou
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from pixdistill import (
    AfDCDLoss,
    MaskedDistillationLoss,
    MaskedReceptiveTokens,
    PixelContrastLoss,
)

CROP = {"voc": (512, 512), "cityscapes": (512, 1024)}
AF_DCD_WEIGHTS = {"voc": (1e-6, 5e-3), "cityscapes": (2e-6, 5e-3)}  # of mimic and contrast


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; defaults of the official code, by data set where it differs."""
    flags = parser(__doc__, steps=40_000, batch_size=16, lr=0.02)
    add = flags.add_argument
    add("--dataset", choices=CLASSES, default="voc")
    add("--teacher", choices=("resnet101", "resnet50"), default="resnet101")
    add("--teacher-weights", default="voc", help="voc (torchvision's), a file, or none")
    add("--student", choices=("mobilenet", "resnet18"), default="mobilenet")
    add("--student-weights", default="imagenet", help="of the backbone: imagenet, a file, or none")
    add("--losses", nargs="*", choices=("kl", "af_dcd", "maskd", "pcd"), default=["kl", "af_dcd"])
    add("--kl-weight", type=float, default=1.0)
    add("--af-dcd-weights", type=float, nargs=2, help="of mimic and contrast")
    add("--mask-ratio", type=float, default=0.75, help="pixels that Af-DCD hides")
    add("--projector-width", type=int, help="a narrow projector for Af-DCD instead of the official")
    add("--maskd-weight", type=float, default=0.5)
    add("--tokens", type=Path, help="learned tokens (an official file too), instead of learning")
    add("--token-steps", type=int, default=10_000)
    add("--token-std", type=float, default=0.01, help="of the initial tokens; larger may help")
    add("--pcd-weight", type=float, default=1.0)
    add("--pcd-negatives", choices=("batch", "image"), default="image")
    add("--pcd-labels", action="store_true", help="pixels of one class are not negatives")
    add("--weight-decay", type=float, default=1e-4)
    add("--crop", type=int, nargs=2, help="height and width of training images")
    add("--scale", type=float, nargs=2, default=(0.5, 2.0), help="range of the random scale")
    args = flags.parse_args(argv)
    args.crop = args.crop or CROP[args.dataset]
    args.af_dcd_weights = args.af_dcd_weights or AF_DCD_WEIGHTS[args.dataset]
    return args


def teacher_network(args: argparse.Namespace) -> DeepLabV3:
    """DeepLabV3 with torchvision's VOC weights, those of a file, or random ones."""
    official = args.teacher_weights == "voc"
    if official and args.dataset != "voc":
        stop("torchvision has no Cityscapes weights: pass --teacher-weights FILE, a state_dict of "
             f"deeplabv3_{args.teacher}(num_classes=19)")  # fmt: skip
    build = getattr(models.segmentation, f"deeplabv3_{args.teacher}")
    weights = "COCO_WITH_VOC_LABELS_V1" if official else None
    network = build(
        weights=weights, weights_backbone=None, num_classes=CLASSES[args.dataset], aux_loss=official
    )
    if not official and args.teacher_weights != "none":
        network.load_state_dict(load(args.teacher_weights, "--teacher-weights"))
    return network


def student_network(args: argparse.Namespace) -> DeepLabV3:
    """MobileNetV3 of stride 16, or ResNet-18 of stride 8 with an auxiliary head."""
    classes, official = CLASSES[args.dataset], args.student_weights == "imagenet"
    weights = "IMAGENET1K_V1" if official else None
    if args.student == "mobilenet":
        network = models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=weights, num_classes=classes, aux_loss=False
        )
    else:
        resnet = models.resnet18(weights=weights)
        for stage, dilation in ((resnet.layer3, 2), (resnet.layer4, 4)):  # strides to dilations
            stage[0].conv1.stride = stage[0].downsample[0].stride = (1, 1)
            for layer in stage.modules():
                if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                    layer.dilation = layer.padding = (dilation, dilation)
        layers = {"layer4": "out", "layer3": "aux"}
        backbone = models._utils.IntermediateLayerGetter(resnet, layers)
        network = DeepLabV3(backbone, DeepLabHead(512, classes), FCNHead(256, classes))
    if not official and args.student_weights != "none":
        state = load(args.student_weights, "--student-weights")
        state = {key: state[key] for key in state if not key.startswith("fc.")}
        network.backbone.load_state_dict(state)
    return network


def upsample(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, where the size differs."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


def resized(labels: Tensor, size: torch.Size) -> Tensor:
    """Labels `[B, H, W]` at the resolution of a feature map."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The task loss at the labels' resolution, mean over valid pixels."""
    logits = upsample(logits, labels.shape[1:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def divergence(student: Tensor, teacher: Tensor, valid_mask: Tensor) -> Tensor:
    """KL divergence of the class probabilities at temperature 1, mean over valid pixels."""
    ours, theirs = (x.float().log_softmax(1) for x in (student, teacher))
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return kl[valid_mask].sum() / valid_mask.sum().clamp_min(1)


class TokenLearner(nn.Module):
    """MasKD's first stage: tokens that mask the frozen teacher's logits."""

    def __init__(self, args: argparse.Namespace, teacher: DeepLabV3) -> None:
        super().__init__()
        self.frozen = (teacher,)  # a tuple: neither saved nor set to train mode
        self.tokens = MaskedReceptiveTokens(CLASSES[args.dataset], 8, weighted=False)
        nn.init.normal_(self.tokens.mask_token, std=args.token_std)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The teacher's task loss through the masks, and their overlap."""
        (teacher,) = self.frozen
        with torch.no_grad():
            logits = teacher.classifier(teacher.backbone(images)["out"])
        masked, diversity = self.tokens(logits)
        areas = self.tokens.masks(logits).detach().mean((0, 2, 3))
        parts = summed({"task": cross_entropy(masked, labels), "diversity": diversity})
        return {**parts, "smallest_area": areas.min(), "largest_area": areas.max()}


class Distiller(nn.Module):
    """Student, projectors and losses: everything that is trained, in one module for DDP."""

    def __init__(self, args: Any, teacher: DeepLabV3, student: DeepLabV3, tokens: Any) -> None:
        super().__init__()
        self.frozen, self.student, self.args = (teacher,), student, args
        self.criteria = nn.ModuleDict()
        theirs = teacher.classifier[0].convs[0][0].in_channels
        ours = student.classifier[0].convs[0][0].in_channels
        if "af_dcd" in args.losses:
            (mimic, contrast), width = args.af_dcd_weights, args.projector_width
            projector: Any = "plain" if width is None else nn.Sequential(
                nn.Conv2d(theirs, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(), nn.Conv2d(width, theirs, 1),
            )  # fmt: skip
            self.criteria["af_dcd"] = AfDCDLoss(
                ours, theirs, projector=projector, ragged="pad", mask_ratio=args.mask_ratio,
                mimic_weight=mimic, contrast_weight=contrast,
            )  # fmt: skip
        if "pcd" in args.losses:
            self.project = nn.Conv2d(ours, theirs, kernel_size=1)
            self.criteria["pcd"] = PixelContrastLoss(
                negatives=args.pcd_negatives, gather_distributed=True
            )
        if tokens is not None:
            self.criteria["maskd"] = MaskedDistillationLoss(tokens)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The parts of the loss, as they enter it, and their sum."""
        (teacher,), args = self.frozen, self.args
        with torch.no_grad():
            target = teacher.backbone(images)["out"]
            target_logits = teacher.classifier(target)
        maps = self.student.backbone(images)
        logits = self.student.classifier(maps["out"])
        parts = {"task": cross_entropy(logits, labels)}
        if self.student.aux_classifier is not None:
            auxiliary = self.student.aux_classifier(maps["aux"])
            parts["auxiliary"] = 0.4 * cross_entropy(auxiliary, labels)
        size = target.shape[2:]
        labels = resized(labels, size)
        valid = labels != IGNORE
        features, logits = upsample(maps["out"], size), upsample(logits, size)
        if "kl" in args.losses:
            parts["kl"] = args.kl_weight * divergence(logits, target_logits, valid)
        if "af_dcd" in args.losses:
            parts["af_dcd"] = self.criteria["af_dcd"](features, target, valid_mask=valid)
        if "maskd" in args.losses:
            distance = self.criteria["maskd"](logits, target_logits, valid_mask=valid)
            parts["maskd"] = args.maskd_weight * distance
        if "pcd" in args.losses:
            classes = labels if args.pcd_labels else None
            projected = self.project(features)
            contrast = self.criteria["pcd"](projected, target, valid_mask=valid, labels=classes)
            parts["pcd"] = args.pcd_weight * contrast
        return summed(parts)


def learned_tokens(run: Run, teacher: DeepLabV3, data: Images) -> nn.Module | None:
    """Tokens from `--tokens`, or learned here; None where `--stop-after` ended the stage."""
    args = run.args
    if args.tokens is not None:
        saved = load(args.tokens, "--tokens", "`mask_token` [tokens, classes]")
        return MaskedReceptiveTokens.from_official(saved)[0]
    learner = TokenLearner(args, teacher)
    model = run.trained(learner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.token_steps, power=0.9)
    if not fit(run, "tokens", model, optimizer, schedule, data, args.token_steps):
        return None
    if run.rank == 0:
        official = MaskedReceptiveTokens.to_official(learner.tokens)
        torch.save(official, args.output / "tokens.pth")
    return learner.tokens


def main(argv: list[str] | None = None) -> None:
    """Learn tokens where MasKD needs them, then distil."""
    run = Run(args := arguments(argv))
    train, test = Images(args, "train"), Images(args, "val")
    teacher = run.frozen(teacher_network(args))
    tokens = None
    if "maskd" in args.losses and (tokens := learned_tokens(run, teacher, train)) is None:
        return
    torch.manual_seed(args.seed)
    student = student_network(args)
    distiller = Distiller(args, teacher, student, tokens)
    model = run.trained(distiller)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.steps, power=0.9)
    clip = None
    if "af_dcd" in args.losses:
        clip = (list(distiller.criteria["af_dcd"].parameters()), 15.0)
    if not args.resume:
        run.print(f"teacher: {mean_iou(run, teacher, test)}")
    done = fit(
        run, "student", model, optimizer, schedule, train, args.steps, clip=clip,
        evaluate=lambda: mean_iou(run, student, test),
    )  # fmt: skip
    if done and run.rank == 0:
        torch.save(student.state_dict(), args.output / "student_weights.pth")
        draw(run, [teacher, student], tokens, test)


if __name__ == "__main__":
    main()
