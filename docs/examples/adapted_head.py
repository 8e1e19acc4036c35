"""Draw how SpatialAdaptor changes an activation, and its error over a whole head.

    python docs/examples/adapted_head.py

Three panels show one channel of one feature map before an activation: ReLU or GELU at each pixel, and
the linear map that the adaptor applies instead. The fourth applies two heads to maps whose pixels
differ more and more from their mean. It shows how far the mean of the result is from the head's output
for the mean, `|mean(f(x)) - head(mean(x))| / |head(mean(x))|`, where f is the head applied to every
pixel, or the adaptor. The heads have the layers of MoCo v3's (ResNet) and DINO's, but are small, with
random weights and the BatchNorm statistics of random vectors. It takes seconds on one CPU core.

It needs matplotlib and tqdm besides pixdistill.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from pixdistill import L2Norm, SpatialAdaptor

CHANNELS, GRID = 256, 14
SPREADS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # deviation of pixels over that of their means
PLAIN, ADAPTED, TRUTH = "#d1495b", "#00798c", "#20242c"


def mocov3_head() -> nn.Sequential:
    """MoCo v3's projector for ResNets: BatchNorm and ReLU after the hidden layer."""
    return nn.Sequential(
        nn.Linear(CHANNELS, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 64, bias=False),
        nn.BatchNorm1d(64, affine=False),
    )


def dino_head() -> nn.Sequential:
    """DINO's head: GELU between the layers, L2 normalisation, a weight-normalised last layer."""
    return nn.Sequential(
        nn.Linear(CHANNELS, 512),
        nn.GELU(),
        nn.Linear(512, 512),
        nn.GELU(),
        nn.Linear(512, 64),
        L2Norm(),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 256, bias=False)),
    )


HEADS = {"MoCo v3": mocov3_head, "DINO": dino_head}


def settle(head: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics of random vectors, and freeze the head."""
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None  # the mean over all batches so far
    with torch.no_grad():
        for _ in range(8):
            head.train()(torch.randn(256, CHANNELS))
    return head.eval().requires_grad_(False)


def at_every_pixel(head: nn.Module, x: Tensor) -> Tensor:
    """The head applied to each pixel of `[B, C, H, W]`."""
    batch, _, height, width = x.shape
    answers = head(x.movedim(1, -1).flatten(0, 2))
    return answers.unflatten(0, (batch, height, width)).movedim(-1, 1)


def errors(head: nn.Module, count: int) -> dict[str, list[float]]:
    """Relative error of the identity at each spread, over `count` maps."""
    adaptor = SpatialAdaptor(head)
    means = torch.randn(count, CHANNELS, 1, 1)
    pixels = torch.randn(count, CHANNELS, GRID, GRID)
    found: dict[str, list[float]] = {"plain": [], "adaptor": []}
    for spread in tqdm(SPREADS, desc="spreads", leave=False, disable=None):
        x = means + spread * pixels
        truth = head(x.mean((2, 3)))
        for name, result in (("plain", at_every_pixel(head, x)), ("adaptor", adaptor(x))):
            found[name].append(float((result.mean((2, 3)) - truth).norm() / truth.norm()))
    return found


def draw_activation(axis: Axes, activation: nn.Module, pixels: Tensor) -> None:
    """One channel's pixels through the activation and through the adaptor, with both means."""
    name = type(activation).__name__
    m, curve = pixels.mean(), torch.linspace(-6, 6, 200)
    plain, truth = activation(pixels), activation(m)
    adapted = SpatialAdaptor(activation)(pixels.view(1, 1, -1)).flatten()  # of this layer alone
    axis.plot(curve, activation(curve), color=PLAIN, lw=1, alpha=0.4)
    axis.axvline(float(m), color=TRUTH, lw=0.8, ls=":")
    axis.scatter(pixels, plain, s=34, color="none", edgecolor=PLAIN, label=f"{name} at each pixel")
    axis.scatter(pixels, adapted, s=9, color=ADAPTED, label="adaptor at each pixel")
    diamond: dict[str, Any] = {"s": 110, "marker": "D", "edgecolor": "white", "zorder": 3}
    axis.scatter(m, plain.mean(), color=PLAIN, label="mean of the former", **diamond)
    axis.scatter(m, adapted.mean(), color=ADAPTED, label="mean of the latter", **diamond)
    axis.scatter(m, truth, s=90, marker="x", color=TRUTH, zorder=4, label=f"{name}(m)")
    axis.set(xlim=(-6, 6), ylim=(-3.6, 6.2))
    axis.set(title=f"{name} where the pooled value is m = {m:g}")
    axis.set(xlabel="pixel before", ylabel="pixel after")
    axis.legend(loc="upper left", edgecolor="none", framealpha=1, handletextpad=0.3)


def draw_errors(axis: Axes, found: dict[str, dict[str, list[float]]]) -> None:
    """Error of the identity against the spread of the pixels."""
    for (head, lines), style in zip(found.items(), ("-o", "--s"), strict=True):
        for name, colour in (("plain", PLAIN), ("adaptor", ADAPTED)):
            label = f"{head} head {'at each pixel' if name == 'plain' else 'adapted'}"
            axis.plot(SPREADS, lines[name], style, ms=4, color=colour, label=label)
    axis.set(
        xscale="log", yscale="log", ylim=(1e-8, 1e4), title="How far mean(f(x)) is from head(m)"
    )
    axis.set(xlabel="spread of pixels / spread of means", ylabel="relative error, float32")
    axis.legend(loc="upper left", frameon=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the errors of the identity and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--maps", type=int, default=32, help="maps to average over (default: 32)")
    add("--output", type=Path, default=Path("spatial_adaptor.png"), help="where the PNG goes")
    options = parser.parse_args(argv)
    if options.maps < 1:
        parser.error("--maps must be at least 1")
    torch.manual_seed(0)
    found = {name: errors(settle(head()), options.maps) for name, head in HEADS.items()}
    print(f"{'spread':<24}" + "".join(f"{spread:>9g}" for spread in SPREADS))
    for name, lines in found.items():
        for how, values in lines.items():
            print(f"{name + ', ' + how:<24}" + "".join(f"{value:9.1e}" for value in values))

    figure = Figure(figsize=(10, 7.6), layout="constrained")
    (above, below), (gelu, error) = figure.subplots(2, 2)
    pixels = 2.5 * torch.linspace(-0.96, 0.96, 24).erfinv()  # a normal distribution of mean 0
    draw_activation(above, nn.ReLU(), pixels + 0.6)
    draw_activation(below, nn.ReLU(), pixels - 0.6)
    draw_activation(gelu, nn.GELU(), pixels + 0.6)
    draw_errors(error, found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=90)
    print(f"Drawn in {options.output}.")


if __name__ == "__main__":
    main()
