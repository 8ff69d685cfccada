"""Procedural heads with a tumour in several MR contrasts, in 2D and 3D: masks are exact, and nothing has to be
downloaded.

A skull-stripped brain has folded cortex, deep grey nuclei, ventricles and one tumour: a necrotic core inside an
enhancing rim inside oedema. All contrasts of a subject share anatomy and part of the texture; what each shows is in
`LOOKS`, with the relations of real scans.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfl.data.sample import UNLABELLED, Records, number, require, whole
from medfl.data.subject import REGIONS
from medfl.seeding import generator

FIELD_OF_VIEW = 192.0  # mm, across the plane
WAVES = 6
CHUNK = 2**17  # voxels drawn at once: small enough for the cache
DIMMEST = 0.02  # of any voxel in the brain: the background alone is 0

# Layers from the bottom up, each over those before it, and the grey value of each in every contrast.
LAYERS = ("white", "grey", "oedema", "fluid", "rim", "core")
LOOKS = {
    "flair": (0.42, 0.54, 0.86, 0.12, 0.68, 0.48),
    "t1ce": (0.62, 0.46, 0.38, 0.14, 0.95, 0.24),
    "t1": (0.74, 0.50, 0.42, 0.14, 0.40, 0.28),
    "t2": (0.42, 0.56, 0.80, 0.94, 0.66, 0.74),
}
CORE, OEDEMA, RIM = 1, 2, 3  # labels in the mask; 0 is everything else


@dataclass(frozen=True, kw_only=True)
class Brain:
    """Synthetic brain tumour scans, one per subject; a pure function of its arguments.

    Args:
        name: the anatomy; there is one, "brain".
        spatial_dims: 2 (an axial slice) | 3.
        channels: how many modalities.
        modalities: their order, from flair, t1ce, t1, t2.
        size: side in the axial plane, voxels; the field of view is 192 mm.
        depth: voxels along the last axis, of the same spacing: a slab in the middle of the head. Null: as `size`.
            In 2D null.
        count: subjects.
        noise: standard deviation, as a share of the grey scale.
        shift: mm; each modality but the first is moved by a random vector of up to this length.
        unlabelled: share of the subjects whose mask is not known.
        seed: of the anatomy; independent of the study's seed only if set so.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    name: str
    spatial_dims: int
    channels: int
    modalities: Sequence[str]
    size: int
    depth: int | None
    count: int
    noise: float
    shift: float
    unlabelled: float
    seed: int

    def __post_init__(self) -> None:
        names, depth_ok = list(self.modalities), self.depth is None or whole(self.depth, 4)
        usable = 1 <= len(set(names)) == len(names) and set(names) <= set(LOOKS)
        require(
            "data",
            {
                "name": (self.name, self.name == "brain", "'brain', the only head"),
                "spatial_dims": (self.spatial_dims, self.spatial_dims in (2, 3), "2 or 3"),
                "modalities": (names, usable, f"different ones of {', '.join(LOOKS)}"),
                "channels": (self.channels, self.channels == len(names), f"{len(names)}, one per modality"),
                "size": (self.size, whole(self.size, 16), "an integer of at least 16"),
                "depth": (
                    self.depth,
                    depth_ok and (self.depth is None or self.spatial_dims == 3),
                    "an integer of at least 4, or null; null in 2D",
                ),
                "count": (self.count, whole(self.count, 10), "an integer of at least 10"),
                "noise": (self.noise, number(self.noise), "a number of at least 0"),
                "shift": (self.shift, number(self.shift), "mm, a number of at least 0"),
                "unlabelled": (self.unlabelled, number(self.unlabelled) and self.unlabelled <= 1, "from 0 to 1"),
            },
        )

    def load(self) -> Records:
        """All subjects, (count, channels, size, size[, depth]) in [0, 1], with tumour masks."""
        images, masks = self._render()
        unknown = round(self.unlabelled * self.count)
        masks[torch.randperm(self.count, generator=generator(self.seed, "brain", "unlabelled"))[:unknown]] = UNLABELLED
        return Records(
            images=images.view(self.count, self.channels, *self._grid),
            labels=torch.full((self.count,), -1),
            patients=tuple(f"brain-{subject:05d}" for subject in range(self.count)),
            splits=("",) * self.count,
            sites=None,
            classes=(),
            spacing=(FIELD_OF_VIEW / self.size,) * self.spatial_dims,
            masks=masks.view(self.count, *self._grid),
            modalities=tuple(self.modalities),
            regions=REGIONS,
        )

    @property
    def _grid(self) -> tuple[int, ...]:
        return (self.size, self.size, self.depth or self.size)[: self.spatial_dims]

    def _render(self) -> tuple[Tensor, Tensor]:
        body = _anatomy(self.count, self.spatial_dims, self._grid[-1] / self.size, self.seed)
        scan = _acquisition(self.count, self.spatial_dims, self.channels, self.seed)
        axes = [(torch.arange(side) + 0.5 - side / 2) / (self.size / 2) for side in self._grid]
        points = torch.stack([c.flatten() for c in torch.meshgrid(*axes, indexing="ij")])  # (d, P)
        rng = generator(self.seed, "brain", "noise")
        images, masks = [], []
        for rows in torch.split(torch.arange(self.count), max(1, CHUNK // points.shape[1])):
            drawn = {name: value[rows] for name, value in scan.items()}
            shapes = self._shapes(points, {name: value[rows] for name, value in body.items()}, drawn["shift"])
            looks = torch.tensor([LOOKS[name] for name in self.modalities]) * drawn["looks"]  # (n, M, layers)
            grey = torch.stack([_paint(one, looks[:, m]) for m, one in enumerate(shapes)], dim=1)  # (n, M, P)
            grey = grey * _appearance(points, drawn) + self.noise * torch.randn(grey.shape, generator=rng)
            inside = torch.stack([one[:, 0] for one in shapes], dim=1) > 0.5
            images.append(torch.where(inside, grey.clamp(DIMMEST, 1), 0.0))
            masks.append(_mask(shapes[0]))
        return torch.cat(images), torch.cat(masks)

    def _shapes(self, points: Tensor, body: dict[str, Tensor], shift: Tensor) -> list[Tensor]:
        """For every modality the layers (n, layers, P) where its scan shows them."""
        if not self.shift:
            return [_layers(points.expand(len(shift), -1, -1), body, self.size)] * self.channels
        moved = shift * self.shift / (FIELD_OF_VIEW / 2)  # (n, M, d)
        return [_layers(points - offset[..., None], body, self.size) for offset in moved.unbind(1)]


def _anatomy(count: int, dims: int, height: float, seed: int) -> dict[str, Tensor]:
    """What belongs to a subject: pose, shapes and tumour, in half fields of view; tables with a row per subject.

    `height`: of the grid's last axis in 3D, as a share of the first: the tumour is put inside it.
    """
    rng = generator(seed, "brain", "anatomy")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=rng) * (high - low) + low

    def directions(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, *shape, dims, generator=rng), dim=-1)

    def around(*nominal: float) -> Tensor:
        return torch.tensor(nominal)[:dims] * uniform(0.85, 1.15, dims)

    turn = torch.randn(count, dims, dims, generator=rng) * 0.08
    brain = around(0.72, 0.86, 0.70) * uniform(0.97, 1.03, 1)
    tumour_at = directions() * uniform(0.25, 0.5, 1) * brain
    if dims == 3:
        tumour_at[:, 2] = tumour_at[:, 2].clamp(-0.5 * height, 0.5 * height)
    return {
        "rotation": torch.linalg.matrix_exp(turn - turn.transpose(1, 2)),
        "position": uniform(-0.06, 0.06, dims),
        "brain": brain.clamp_max(0.93),
        "ventricle_at": around(0.11, 0.02, 0.06),
        "ventricle": around(0.07, 0.28, 0.15),
        "nucleus_at": around(0.27, 0.06, -0.04),
        "nucleus": around(0.11, 0.20, 0.13),
        "fold": directions(WAVES) * uniform(16.0, 26.0, WAVES, 1),
        "fold_phase": uniform(0.0, 2 * math.pi, WAVES),
        "tumour_at": tumour_at,
        "tumour": uniform(0.27, 0.40),
        "within": uniform(0.52, 0.66),
        "necrotic": uniform(0.50, 0.68),
        "lobes": directions(2, 4),
        "lobe_rate": uniform(2.0, 4.5, 2, 4),
        "lobe_phase": uniform(0.0, 2 * math.pi, 2, 4),
    }


def _acquisition(count: int, dims: int, channels: int, seed: int) -> dict[str, Tensor]:
    """What belongs to a scan: grey values, texture (row 0 of `waves` is common to all modalities), light, position."""
    rng = generator(seed, "brain", "acquisition")
    waves = torch.randn(count, 1 + channels, WAVES, dims, generator=rng)
    waves = torch.nn.functional.normalize(waves, dim=-1)
    shift = torch.nn.functional.normalize(torch.randn(count, channels, dims, generator=rng), dim=-1)
    shift = shift * torch.rand(count, channels, 1, generator=rng)
    shift[:, 0] = 0  # the mask is drawn on the first modality
    return {
        "waves": waves * (torch.rand(count, 1 + channels, WAVES, 1, generator=rng) * 18 + 6),
        "phases": torch.rand(count, 1 + channels, WAVES, generator=rng) * 2 * math.pi,
        "texture": torch.rand(count, generator=rng) * 0.015 + 0.01,
        "tilt": torch.randn(count, channels, dims, generator=rng) * 0.05,
        "looks": 1 + 0.05 * torch.randn(count, channels, len(LAYERS), generator=rng),
        "shift": shift,
    }


def _layers(points: Tensor, body: dict[str, Tensor], size: int) -> Tensor:
    """Membership in [0, 1] of every layer, (n, layers, P), at points (n, d, P); the edges are about a voxel wide."""

    def edge(distance: Tensor) -> Tensor:
        return torch.sigmoid(distance * size)  # two per voxel

    at = torch.bmm(body["rotation"], points - body["position"][..., None])
    brain = _depth(at, torch.zeros_like(body["brain"]), body["brain"])
    folds = torch.cos(torch.bmm(body["fold"], at) + body["fold_phase"][..., None]).sum(1) / math.sqrt(WAVES)
    mirrored = torch.cat([at[:, :1].abs(), at[:, 1:]], dim=1)  # left and right are alike
    cortex = edge(0.10 + 0.05 * folds - brain)
    sulci = edge(0.06 * folds - 0.01 - brain)
    nucleus = edge(_depth(mirrored, body["nucleus_at"], body["nucleus"]))
    ventricle = edge(_depth(mirrored, body["ventricle_at"], body["ventricle"]))
    outer, inner, core = _tumour(at, body)
    fluid, grey = torch.maximum(sulci, ventricle), torch.maximum(cortex, nucleus)
    return torch.stack([edge(brain), grey, edge(outer), fluid, edge(inner), edge(core)], dim=1)


def _tumour(at: Tensor, body: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Depth below the surface of the whole tumour, of its rim and of its core, (n, P) each; one lies in the other."""
    offset = at - body["tumour_at"][..., None]
    distance = _length(offset)
    heading = offset / distance.clamp_min(1e-6)[:, None]

    def radius(surface: int, swing: float) -> Tensor:
        cosine = torch.bmm(body["lobes"][:, surface], heading)  # (n, 4, P)
        wave = torch.cos(body["lobe_rate"][:, surface, :, None] * cosine + body["lobe_phase"][:, surface, :, None])
        return body["tumour"][:, None] * (1 + swing * wave.mean(1))

    rim = radius(1, 0.15) * body["within"][:, None]  # at most 0.76 of the tumour's mean radius, which keeps 0.8
    return radius(0, 0.2) - distance, rim - distance, rim * body["necrotic"][:, None] - distance


def _depth(at: Tensor, centre: Tensor, radii: Tensor) -> Tensor:
    """About how far points (n, d, P) lie below the surface of an ellipsoid, (n, P); negative outside."""
    return (1 - _length((at - centre[..., None]) / radii[..., None])) * radii.mean(1, keepdim=True)


def _length(vectors: Tensor) -> Tensor:
    """Lengths (n, P) of vectors (n, d, P); 20 times faster here than `vector_norm` along a middle axis."""
    return torch.sqrt((vectors * vectors).sum(1))


def _paint(layers: Tensor, looks: Tensor) -> Tensor:
    """Grey values (n, P) of layers (n, layers, P) with the values (n, layers), each over those before it."""
    grey = looks[:, :1]
    for layer in range(1, len(LAYERS)):
        grey = torch.lerp(grey, looks[:, layer, None], layers[:, layer])
    return grey


def _appearance(points: Tensor, scan: dict[str, Tensor]) -> Tensor:
    """What multiplies the grey values, (n, M, P), about 1: a texture half of which is common, and uneven light."""
    ripples = torch.cos(scan["waves"] @ points + scan["phases"][..., None]).sum(2)  # (n, 1 + M, P)
    texture = scan["texture"][:, None, None] * (ripples[:, :1] + ripples[:, 1:])
    return (1 + texture) * (1 + scan["tilt"] @ points)


def _mask(layers: Tensor) -> Tensor:
    """Labels (n, P) uint8 of layers (n, layers, P)."""
    brain, _, oedema, fluid, rim, core = (layers > 0.5).unbind(1)
    mask = (oedema & ~fluid) * OEDEMA
    mask = torch.where(rim, RIM, mask)
    return (torch.where(core, CORE, mask) * brain).to(torch.uint8)
