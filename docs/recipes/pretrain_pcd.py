"""Pre-train a ResNet-18 on images without labels, from a self-supervised teacher (PCD).

    python docs/recipes/pretrain_pcd.py --data images --output run \
        --teacher mocov3 --teacher-weights r-50-1000ep.pth.tar

The defaults are those of the paper (ICCV 2023, arXiv 2211.00218) and its official code. Two views of an
image are compared at the pixels that both show.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from PIL import Image
from teachers import FORMATS, Teacher, load_teacher
from timm.optim import Lars
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from pixdistill import (
    MHSAPlugin,
    PixelContrastLoss,
    PixelHead,
    PixelQueue,
    SpatialAdaptor,
    plug,
    unplug,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDE = 32  # of the student's last map
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, `[2, 3, size, size]`, and their places in it, `[2, 4]`.

    A place is left, top, right, bottom, in pixels of the image; left > right in a mirrored view. Colours
    change as in BYOL: the first view is always blurred, the second rarely, but it may be solarised.
    """

    def __init__(self, folder: Path, size: int, smallest: float) -> None:
        common.existing(folder, ())
        files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.files = sorted(files)
        if not self.files:
            common.stop(
                f"{folder} holds no images; expected are {', '.join(sorted(SUFFIXES))} files"
            )
        self.crop = v2.RandomResizedCrop(size, (smallest, 1.0))
        blur = v2.GaussianBlur(kernel_size=size // 20 * 2 + 1, sigma=(0.1, 2.0))
        rare = (v2.RandomApply([blur], p=0.1), v2.RandomSolarize(threshold=0.5, p=0.2))
        self.colours = [self.changes(blur), self.changes(*rare)]

    @staticmethod
    def changes(*own: v2.Transform) -> v2.Compose:
        """The changes of colour of one view."""
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return v2.Compose([jitter, v2.RandomGrayscale(p=0.2), *own, v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        views, places = zip(*(self.view(image, colours) for colours in self.colours), strict=True)
        return torch.stack(views), torch.tensor(places, dtype=torch.float32)

    def view(self, image: Image.Image, colours: v2.Compose) -> tuple[Tensor, list[int]]:
        """One view and its place."""
        box = self.crop.make_params([image])
        view = v2.functional.resized_crop(image, **box, size=self.crop.size)
        left, right = box["left"], box["left"] + box["width"]
        if torch.rand(()) < 0.5:
            view, left, right = v2.functional.horizontal_flip(view), right, left
        view = v2.functional.to_dtype(v2.functional.to_image(view), torch.float32, scale=True)
        return colours(view), [left, box["top"], right, box["top"] + box["height"]]


def corresponding(maps: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """For the cells of each view the other view's vectors there, and whether it shows them.

    Maps `[2, B, D, h, w]`, places `[B, 2, 4]` -> `[2, B, D, h, w]` and bool `[2, B, h, w]`.
    """
    corners = places.transpose(0, 1)
    centre = (corners[..., :2] + corners[..., 2:]) / 2
    half = (corners[..., 2:] - corners[..., :2]) / 2
    # A cell at u in [-1, 1] of its view lies at centre + half * u in the image.
    shift = (centre - centre.flip(0)) / half.flip(0)
    theta = torch.cat([torch.diag_embed(half / half.flip(0)), shift.unsqueeze(-1)], dim=-1)
    size = [2 * len(places), 1, *maps.shape[3:]]
    grid = F.affine_grid(theta.flatten(0, 1), size, align_corners=False)
    other = maps.flip(0).flatten(0, 1).to(places.dtype)
    paired = F.grid_sample(other, grid, padding_mode="border", align_corners=False)
    in_both = (grid.abs() <= 1).all(dim=-1)
    return paired.unflatten(0, (2, -1)), in_both.unflatten(0, (2, -1))


class Student(nn.Module):
    """ResNet-18 up to its last map, `[N, 3, H, W] -> [N, D, h, w]`, with PCD's attention and head."""

    def __init__(self, adaptor: SpatialAdaptor) -> None:
        super().__init__()
        *layers, _, (_, classifier) = resnet18().named_children()
        self.trunk = nn.Sequential(OrderedDict(layers))
        plug(self.trunk, "layer4", MHSAPlugin(512, num_heads=8))
        self.head = PixelHead.like(adaptor, in_channels=512)
        self.classifier = (classifier,)  # not trained, so not a submodule

    def forward(self, images: Tensor) -> Tensor:
        """What the student predicts of the teacher's map."""
        return self.head(self.trunk(images))

    def backbone(self) -> dict[str, Tensor]:
        """The state dict of torchvision's `resnet18`: without the attention, and `fc` untrained."""
        trunk = copy.deepcopy(self.trunk).cpu()
        unplug(trunk, "layer4")
        classifier = self.classifier[0].state_dict().items()
        whole = {**trunk.state_dict(), **{f"fc.{key}": value for key, value in classifier}}
        return {key: value.contiguous() for key, value in whole.items()}


class Distillation(nn.Module):
    """The loss of a student on batches of views, and the vectors that go to the queue after a step."""

    def __init__(self, teacher: Teacher, loss: PixelContrastLoss, queue: PixelQueue) -> None:
        super().__init__()
        self.student = Student(teacher.adaptor)
        # In a tuple they are not submodules: DDP would send the queue from rank 0 at every forward.
        self.fixed = (teacher, loss, queue)
        self.pooled: list[Tensor] = []

    def targets(self, images: Tensor) -> Tensor:
        """The teacher's map at the student's size, of images `[2B, 3, H, W]`: `[2, B, D, h, w]`."""
        height, width = (-(-side // STRIDE) for side in images.shape[2:])
        maps = self.fixed[0](images)
        return F.adaptive_avg_pool2d(maps, (height, width)).unflatten(0, (2, -1))

    def forward(self, views: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Views `[B, 2, 3, H, W]` and their places `[B, 2, 4]`: the loss and its parts."""
        images = views.transpose(0, 1).flatten(0, 1)
        maps = self.targets(images)
        self.pooled.append(maps[0].mean(dim=(2, 3)))  # of the first views, as in the official code
        paired, in_both = (part.flatten(0, 1) for part in corresponding(maps, places))
        student = self.student(images)
        parts = self.fixed[1](student, paired, valid_mask=in_both, return_components=True)
        values = {"loss": parts.loss, "accuracy": parts.accuracy}
        return {**values, "similarity": parts.positive_similarity}

    def enqueue(self) -> None:
        """After the step: no image is its own negative."""
        self.fixed[2].enqueue(torch.cat(self.pooled))
        self.pooled.clear()


def optimizer_of(student: nn.Module, rate: float) -> Lars:
    """LARS, which scales the step of each weight by its norm; biases and norms have a plain step."""
    weights = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": 1e-5},
        {"params": others, "weight_decay": 0.0},  # timm's LARS adapts what decays
    ]
    return Lars(groups, lr=rate, momentum=0.9)


def schedule_of(optimizer: Lars, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up over a fraction of the steps, then half a cosine down to zero."""

    def factor(step: int) -> float:
        done = step / max(1, steps)
        if done < warmup:
            return done / warmup
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1e-9, 1 - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def draw(run: common.Run, model: Distillation, data: Views, path: Path) -> dict[str, float]:
    """For a pixel of the first view: the teacher's cosines with the student's vector, in both views.

    Returns the mean cosine at the corresponding pixels.
    """
    from matplotlib.figure import Figure

    samples = [common.Seeded(data)[number, number] for number in range(min(4, len(data)))]
    views, places = run.move([torch.stack(part) for part in zip(*samples, strict=True)])
    model.eval()
    with run.autocast():
        maps = F.normalize(model.targets(views.transpose(0, 1).flatten(0, 1)).float(), dim=2)
        student = F.normalize(model.student(views[:, 0]).float(), dim=1)
    model.train()
    paired, in_both = (part[0] for part in corresponding(maps, places))
    middle = 1 - torch.linspace(-0.9, 0.9, maps.shape[-1], device=maps.device).abs()
    nearness = in_both * middle[: maps.shape[-2], None] * middle
    cells = nearness.flatten(1).argmax(dim=1)  # the one nearest to the middle that both views show
    vectors = student.flatten(2)[range(len(cells)), :, cells]
    cosines = torch.einsum("vbdhw,bd->bvhw", maps, vectors).cpu()
    shown = views.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    figure = Figure(figsize=(8, 2 * len(cells)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(cells), 4, squeeze=False)):
        for axis, picture in zip(axes[::2], shown[row], strict=True):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
        for axis, cosine in zip(axes[1::2], cosines[row], strict=True):
            axis.imshow(cosine.numpy(), vmin=-0.5, vmax=1)
        y, x = divmod(int(cells[row]), maps.shape[-1])
        axes[0].plot((x + 0.5) * STRIDE, (y + 0.5) * STRIDE, "r+", markersize=14)
        for axis, title in zip(axes, ("view 1", "cosine", "view 2", "cosine"), strict=True):
            axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
    figure.savefig(path, dpi=100)
    agreement = F.cosine_similarity(student, paired, dim=1)[in_both]
    return {"similarity": float(agreement.mean())}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and save the backbone."""
    flags = common.parser(__doc__, batch_size=1024)
    add = flags.add_argument
    add("--teacher", choices=FORMATS, required=True, help="format of the teacher's checkpoint")
    add("--teacher-weights", type=Path, required=True, help="that file, with backbone and head")
    add("--epochs", type=int, default=100, help="passes over the data, without --steps")
    add("--warmup", type=float, default=0.1, help="fraction of the steps with a rising rate")
    add("--queue-size", type=int, default=65536, help="number of negatives")
    add("--temperature", type=float, default=0.2, help="of the loss")
    add("--crop", type=int, default=224, help="side of a view, a multiple of a ViT's patches")
    add("--smallest", type=float, default=0.08, help="smallest view, as a fraction of the image")
    args = flags.parse_args(argv)
    data = Views(args.data, args.crop, args.smallest)
    count = min(len(data), args.limit_data or len(data))
    args.steps = args.steps or max(1, args.epochs * count // args.batch_size)
    run = common.Run(args)
    try:
        teacher = load_teacher(args.teacher, args.teacher_weights)
    except ValueError as error:
        common.stop(str(error))
    run.frozen(teacher)
    if args.compile:
        teacher.compile()
    queue = PixelQueue(args.queue_size, teacher.adaptor.widths[-1], gather_distributed=True)
    loss = PixelContrastLoss(
        args.temperature, negatives=None, queue=queue.to(run.device), gather_distributed=True
    )
    distillation = Distillation(teacher, loss, queue)
    model = run.trained(distillation, compiled=distillation.student)
    optimizer = optimizer_of(distillation, args.lr or args.batch_size / 256)
    schedule = schedule_of(optimizer, args.steps, args.warmup)

    def evaluate() -> dict[str, float]:
        return draw(run, distillation, data, args.output / "views.png") if run.rank == 0 else {}

    done = common.fit(
        *(run, "student", model, optimizer, schedule, data, args.steps),
        after=distillation.enqueue,
        extra={"queue": queue},
        evaluate=evaluate,
    )
    if done and run.rank == 0:
        torch.save(distillation.student.backbone(), args.output / "backbone.pth")


if __name__ == "__main__":
    main()
