"""The spatial part of a strong view: a random resized crop and, where it was chosen, a rotation, in one resampling."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.views.span import Span
from medfl.views.spatial import PADDINGS, angles, rotations


class ResizedCrop:
    """A crop at a random place, resized to the full grid, then turned about its centre; no mirroring.

    Args:
        area: of a plane's crop, as a fraction of the image's.
        ratio: width / height of a plane's crop, each as a fraction of the image's; log-uniform.
        side: of a volume's crop as a fraction of the image's, for each axis by itself.
        rotation_2d: degrees.
        rotation_3d: degrees, about each axis.
        padding: what a turned view shows from outside the image, "border" (the nearest voxel) or "zeros" (black).

    Raises:
        ConfigError: bounds or a padding that cannot be used.
    """

    def __init__(
        self,
        *,
        area: Sequence[float],
        ratio: Sequence[float],
        side: Sequence[float],
        rotation_2d: Sequence[float],
        rotation_3d: Sequence[float],
        padding: str,
    ) -> None:
        if padding not in PADDINGS:
            raise ConfigError(f"views.spatial.padding: got {padding!r}, need one of {', '.join(PADDINGS)}.")
        self.area = Span.read("area", area, lowest=1e-4, highest=1)
        self.ratio = Span.read("ratio", ratio, lowest=0.01, highest=100)
        self.side = Span.read("side", side, lowest=0.01, highest=1)
        if not self.ratio.low <= 1 <= self.ratio.high:
            raise ConfigError(f"views: ratio got {list(ratio)}, need bounds around 1: the whole image has ratio 1.")
        turns = (("rotation_2d", rotation_2d), ("rotation_3d", rotation_3d))
        self.rotation_2d, self.rotation_3d = (Span.read(*turn, lowest=-180, highest=180) for turn in turns)
        self.padding = padding

    def columns(self, dims: int) -> int:
        """How many uniform columns `draw` takes."""
        return 2 * dims + angles(dims)

    def draw(self, columns: Iterator[Tensor], size: Sequence[int], turned: Tensor) -> Tensor:
        """Maps (R, d, d + 1) as of `Spatial.draw`; rows where `turned` (R,) is false are cropped only."""
        dims, sides = len(size), torch.tensor(size, dtype=torch.float32)
        extent, place, angle = (
            torch.stack([next(columns) for _ in range(width)], dim=1) for width in (dims, dims, angles(dims))
        )
        share = self._plane(extent) if dims == 2 else self.side.at(extent)  # (R, d)
        degrees = (self.rotation_2d if dims == 2 else self.rotation_3d).at(angle)
        turn = rotations(torch.deg2rad(degrees * turned[:, None]))
        shift = (2 * place - 1) * (1 - share) * sides / 2
        return torch.cat([share[:, :, None] * turn, shift[:, :, None]], dim=2)

    def _plane(self, uniform: Tensor) -> Tensor:
        """Height and width (R, 2) as fractions: any area keeps its law, the ratio is cut so that the crop fits."""
        area = self.area.at(uniform[:, 0])
        low = area.clamp_min(self.ratio.low).log()
        high = (1 / area).clamp_max(self.ratio.high).log()
        ratio = torch.exp(low + (high - low) * uniform[:, 1])
        return torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=1).clamp_max(1)
