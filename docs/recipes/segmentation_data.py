"""Pascal VOC 2012 and Cityscapes for `segmentation.py`: images and labels, mIoU, a picture.

To train on other data, give `Images` another list of pictures and label files.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from common import Run, existing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.utils import save_image

IGNORE = 255
CLASSES = {"voc": 21, "cityscapes": 19}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images `[3, H, W]` and labels `[H, W]`, augmented for training."""

    def __init__(self, args: argparse.Namespace, split: str) -> None:
        self.classes = CLASSES[args.dataset]
        self.scale = args.scale if split == "train" else None
        dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
        steps = [v2.ToDtype(dtypes, scale=True), v2.Normalize(MEAN, DEVIATION)]
        if split == "train":
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
            steps += [v2.RandomCrop(args.crop, pad_if_needed=True, fill=fill)]
            steps += [v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(steps)
        self.label_of = torch.arange(256, dtype=torch.uint8)
        if args.dataset == "voc":
            lists = [f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val")]
            folder = args.data / "VOCdevkit" / "VOC2012"
            existing(folder, ["JPEGImages", "SegmentationClass", *lists])
            self.data: Any = datasets.VOCSegmentation(args.data, image_set=split)
        else:
            parts = ("leftImg8bit", "gtFine")
            existing(args.data, [f"{part}/{name}" for part in parts for name in ("train", "val")])
            self.data = datasets.Cityscapes(args.data, split, target_type="semantic")
            kinds = self.data.classes[:-1]  # the last is the license plate, -1
            self.label_of[: len(kinds)] = torch.tensor([kind.train_id for kind in kinds])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, target = self.data[index]
        labels = self.label_of[v2.functional.pil_to_tensor(target).long()]
        if ((labels >= self.classes) & (labels != IGNORE)).any():
            raise ValueError(f"{self.data.targets[index]} has a label above {self.classes - 1}")
        image, labels = v2.functional.to_image(picture), tv_tensors.Mask(labels)
        if self.scale is not None:
            factor = float(torch.empty(()).uniform_(*self.scale))
            size = [round(side * factor) for side in image.shape[1:]]
            image, labels = v2.functional.resize(image, size), v2.functional.resize(labels, size)
        image, labels = self.transform(image, labels)
        return image.as_subclass(Tensor), labels[0].as_subclass(Tensor)


@torch.no_grad()
def mean_iou(run: Run, network: nn.Module, data: Images) -> dict[str, float]:
    """mIoU over the validation images, which the processes share."""
    limit = min(len(data), run.args.limit_data or len(data))
    part = Subset(data, range(run.rank, limit, run.world))
    loader = DataLoader(part, num_workers=run.args.workers, generator=torch.Generator())
    metric = MulticlassJaccardIndex(data.classes, ignore_index=IGNORE).to(run.device)
    training = network.training
    network.eval()
    for images, labels in loader:
        with run.autocast():
            logits = network(run.move(images))["out"]
        metric.update(logits.argmax(1), labels.to(run.device))
    network.train(training)
    return {"miou": float(metric.compute())}


@torch.no_grad()
def draw(run: Run, networks: list[nn.Module], tokens: Any, data: Images) -> None:
    """`predictions.png`, four images by row: image, labels, classes of each network, masks."""
    colours = torch.rand(256, 3, generator=torch.Generator().manual_seed(3))
    rows = []
    for index in range(min(4, len(data))):
        image, labels = data[index]
        logits = [network.eval()(run.move(image[None]))["out"] for network in networks]
        answers = [labels, *(each[0].argmax(0).cpu() for each in logits)]
        picture = image * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        row = [picture, *(colours[answer].movedim(2, 0) for answer in answers)]
        if tokens is not None:
            row += [mask.expand(3, -1, -1) for mask in tokens.masks(logits[0])[0].cpu()]
        rows.append(F.interpolate(torch.stack(row), (128, 128)))
    save_image(torch.cat(rows), run.args.output / "predictions.png", nrow=len(rows[0]))
