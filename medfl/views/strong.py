"""The eight strong augmentations of DCL-CsTP, for planes and volumes: a resized crop, then some of seven others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.views import compose, spatial
from medfl.views.crop import ResizedCrop
from medfl.views.tone import Operation, Tone


@dataclass(frozen=True)
class Draw:
    """All random numbers of a batch; row v * B + i is view v of image i."""

    chosen: Tensor  # (VB, K) int64: operations in order, -1 behind the last
    maps: Tensor  # (VB, d, d + 1)
    table: Tensor  # (VB, P), of `Tone.draw`
    salts: Tensor  # (VB, 2) int32


class EightViews:
    """Strongly augmented views of a batch; the contract is that of `Views`.

    Each view is a resized crop, then k ~ U{fewest..most} of the seven `Operation`s without replacement in random order,
    the photon noise last where it is chosen. Operations see u = clip((x + 1) / 2, 0, 1); views are in [-1, 1].
    A chosen rotation is folded into the crop's resampling: it commutes with operations that are pointwise, and saves a
    second interpolation. Nothing is mirrored: the heart lies on one side.

    Args:
        chosen: fewest and most operations of a view.
        spatial, tone: what is drawn.
        backend: as of `Views`.

    Raises:
        ConfigError: a backend or a number of operations that cannot be used.
    """

    def __init__(self, *, chosen: tuple[int, int], spatial: ResizedCrop, tone: Tone, backend: str) -> None:
        compose.refuse_backend(backend)
        if len(chosen) != 2 or not 0 <= chosen[0] <= chosen[1] <= len(Operation):
            raise ConfigError(f"views.chosen: got {chosen!r}, need 0 <= fewest <= most <= {len(Operation)}.")
        self.fewest, self.most = chosen
        self.spatial, self.tone, self.backend = spatial, tone, backend

    @torch.no_grad()
    def __call__(self, images: Tensor, *, key: int, count: int = compose.COUNT) -> list[Tensor]:
        """`count` views, each (B, C, *S), of images (B, C, H, W) or (B, C, D, H, W), float32 on any device.

        Raises:
            ValueError: images of another type or shape, or no view asked for.
            ConfigError: the backend "kernel" and images that are not on the CPU.
        """
        compose.refuse_images(images)
        draw = self.draw(len(images), images.shape[2:], key=key, count=count)
        u = self._placed(((images.detach() + 1) / 2).clamp_(0, 1), draw, count)
        if compose.compiles(self.backend, u.device):
            from medfl.views import strong_kernel  # numba takes half a second to import

            strong_kernel.change(u, draw.chosen, draw.table, draw.salts, self.tone)
        else:
            self._change(u, draw)
        return list(u.view(count, *images.shape).unbind(0))

    def draw(self, images: int, size: torch.Size, *, key: int, count: int = compose.COUNT) -> Draw:
        """The random numbers of so many images on a grid of `size`, on the CPU: the same for every device.

        Raises:
            ValueError: a count below 1.
        """
        needed = 1 + len(Operation) + self.spatial.columns(len(size)) + self.tone.columns()
        columns, salts = compose.uniforms(images, needed, key=key, count=count)
        number = self.fewest + (next(columns) * (self.most - self.fewest + 1)).long()
        order = torch.stack([next(columns) for _ in Operation], dim=1).argsort(dim=1, stable=True)[:, : self.most]
        chosen = order.masked_fill(torch.arange(self.most) >= number[:, None], -1)
        turned = (chosen == Operation.ROTATE).any(1)
        return Draw(chosen, self.spatial.draw(columns, size, turned), self.tone.draw(columns), salts)

    def _placed(self, u: Tensor, draw: Draw, count: int) -> Tensor:
        """The spatial part of all views (VB, C, *S) of u (B, C, *S)."""
        rows, padding = len(draw.maps), self.spatial.padding
        if not compose.compiles(self.backend, u.device):
            repeated = u.repeat(count, *[1] * (u.ndim - 1))
            return spatial.resample(repeated, draw.maps.to(u.device, non_blocking=True), padding=padding)
        from medfl.views import kernel

        idle = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(rows, 1)  # neither gamma, scale, shift nor noise
        return kernel.render(u, draw.maps, tone=idle, taps=torch.ones(rows, 1), salts=draw.salts, padding=padding)

    def _change(self, u: Tensor, draw: Draw) -> None:
        """The intensity part of all views in place, and from [0, 1] to [-1, 1]."""
        table, salts = (x.to(u.device, non_blocking=True) for x in (draw.table, draw.salts))
        for operation, rows in parts(draw.chosen, u.device):
            u.index_copy_(0, rows, self.tone.changed(u[rows], operation, table[rows], salts[rows]))
        u.clamp_(0, 1).mul_(2).sub_(1)


def parts(chosen: Tensor, device: torch.device) -> list[tuple[Operation, Tensor]]:
    """What is done in which order to which rows, of (R, K) operations per row.

    Rows are index tensors on `device`. The host knows all lengths, so it never waits for the device; one transfer
    carries all indices.
    """
    tones = set(Operation) - {Operation.ROTATE, Operation.PHOTONS}
    steps = [(operation, chosen[:, k] == operation) for k in range(chosen.shape[1]) for operation in sorted(tones)]
    steps.append((Operation.PHOTONS, (chosen == Operation.PHOTONS).any(1)))
    found = [(operation, mask.nonzero().flatten()) for operation, mask in steps if bool(mask.any())]
    if not found:
        return []
    indices = torch.cat([rows for _, rows in found]).to(device, non_blocking=True)
    pieces = indices.split_with_sizes([len(rows) for _, rows in found])
    return [(operation, piece) for (operation, _), piece in zip(found, pieces, strict=True)]
