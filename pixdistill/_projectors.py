"""Projectors that rebuild a masked map, as Af-DCD trains them beside the student."""

from torch import Tensor, nn


class EnhancedProjector(nn.Module):
    """Two conv3x3 - ReLU blocks in sequence, a conv3x3 on the output of each, and their mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(_conv3x3(channels), nn.ReLU())
        self.block_2 = nn.Sequential(_conv3x3(channels), nn.ReLU())
        self.adaptor_1 = _conv3x3(channels)
        self.adaptor_2 = _conv3x3(channels)

    def forward(self, x: Tensor) -> Tensor:
        """A map of the shape of x."""
        first = self.block_1(x)
        return (self.adaptor_1(first) + self.adaptor_2(self.block_2(first))) / 2


def projector_of(kind: str | nn.Module, channels: int) -> nn.Module:
    """The projector that a loss asks for by name, or the module that it was given."""
    if isinstance(kind, nn.Module):
        return kind
    if kind == "plain":
        return nn.Sequential(_conv3x3(channels), nn.ReLU(), _conv3x3(channels))
    if kind == "enhanced":
        return EnhancedProjector(channels)
    raise ValueError(f'projector must be "plain", "enhanced" or an nn.Module; got {kind!r}')


def _conv3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1)
