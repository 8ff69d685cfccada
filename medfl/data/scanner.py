"""Scanner profiles: what one site's machine makes of a scan, in the order of physics, in 2D and 3D.

geometry, resolution -> illumination -> contrast -> noise -> compression -> grey scale. The parameters are
fixed for a site; each scan varies by up to 20 % about them. All is a pure function of (images, profile,
severity, site, samples).
"""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medfl.data.profiles import SHARED, STAINS, Profile, find, profile_at
from medfl.data.sample import labelled
from medfl.data.volume import majority, resampler
from medfl.seeding import generator

REFERENCE_SIZE = 28  # voxels per side for which the blur is given; larger grids blur in proportion
JITTER = 0.2
CHUNK = 2**21  # voxels at once


@dataclass(frozen=True)
class Site:
    """The fixed choices of one site's machine, drawn from its key: directions, one axis, field
    coefficients.
    """

    signs: Tensor  # (8,) -1 | 1
    axis: int
    coefficients: Tensor  # (P,) in [-1, 1]


def scan(images: Tensor, profile: str, severity: float, *, site: int, samples: Sequence[int]) -> Tensor:
    """The images as this site's scanner shows them.

    Args:
        images: (N, C, *S) in [-1, 1].
        severity: 0 changes nothing; 1 mild to 5 extreme.
        site: key of the site; fixes its parameters.
        samples: N keys; each fixes the variation and noise of its image, whatever the others are.

    Returns:
        (N, C, *S) in [-1, 1]; for profile A or severity 0 the images themselves.

    Raises:
        ConfigError: unknown profile, or one that these images cannot have.
    """
    if len(samples) != len(images):
        raise ValueError(f"scan: got {len(images)} images and {len(samples)} sample keys.")
    found = find(profile, images.ndim - 2, images.shape[1])
    if severity == 0 or found == SHARED["A"] or not len(images):
        return images
    machine = _machine(site, images.ndim - 2)
    step = max(1, CHUNK // images[0].numel())
    parts = [
        _scan_chunk(chunk, found, severity, machine, rngs=[generator(site, sample) for sample in keys])
        for chunk, keys in zip(
            torch.split(images, step),
            [samples[start : start + step] for start in range(0, len(samples), step)],
            strict=True,
        )
    ]
    return torch.cat(parts)


def follow(masks: Tensor, profile: str, severity: float, *, site: int, samples: Sequence[int]) -> Tensor:
    """Labels (N, *S) uint8 where `scan` leaves the anatomy of their images: only the field of view moves it."""
    s = profile_at(find(profile, masks.ndim - 1, channels=len(STAINS)), severity)  # `scan` looks at the channels
    if not s.zoom:
        return masks
    machine, moved = _machine(site, masks.ndim - 1), masks.clone()
    for row in torch.nonzero(labelled(masks))[:, 0].tolist():
        mask, vary = masks[row], _variation([generator(site, samples[row])])
        every = range(int(mask.max()) + 1)
        moved[row] = majority(_zoomed((mask == label).float()[None, None], s, machine, vary)[0, 0] for label in every)
    return moved


def _machine(site: int, dims: int) -> Site:
    rng = generator(site, "machine")
    signs = torch.randint(2, (8,), generator=rng) * 2.0 - 1
    axis = int(torch.randint(dims, (1,), generator=rng))
    return Site(signs, axis, torch.rand(len(_powers(dims)), generator=rng) * 2 - 1)


def _scan_chunk(
    images: Tensor, profile: Profile, severity: float, machine: Site, rngs: Sequence[torch.Generator]
) -> Tensor:
    s = profile_at(profile, severity)
    vary = _variation(rngs)
    grey = (images + 1) / 2
    grey = _resolve(grey, s, machine, vary)
    if s.bias:
        grey = grey * _field(grey, machine.coefficients * s.bias, vary[:, 2])
    grey = _contrast(grey, s, machine, vary)
    if s.stain:
        grey = _restain(grey, s.stain * machine.signs[:3] * vary[:, :3])
    if s.noise:
        grey = _noisy(grey, s, vary[:, 6], rngs)
    if s.jpeg:
        grey = _compress(grey, quality=max(10, round(90 - s.jpeg)))
    return grey.clamp(0, 1) * 2 - 1


def _variation(rngs: Sequence[torch.Generator]) -> Tensor:
    """Factors (n, 8) about 1: the first draw of every image's stream."""
    return 1 + JITTER * (torch.stack([torch.rand(8, generator=rng) for rng in rngs]) * 2 - 1)


def _resolve(grey: Tensor, s: Profile, machine: Site, vary: Tensor) -> Tensor:
    """Field of view, point spread, slice thickness and ghosts: each is linear along an axis, so one matrix
    an axis.
    """
    dims, size = grey.ndim - 2, grey.shape[-1]
    for axis in range(dims):
        along = axis == machine.axis
        length = grey.shape[axis + 2]
        matrix = torch.eye(length)[None]
        if s.zoom:
            matrix = _zoom(axis, grey, s, machine, vary)
        if s.blur and (along or not s.one_axis):
            matrix = _gaussian(length, s.blur * size / REFERENCE_SIZE * vary[:, 1]) @ matrix
        if s.thickness and along:
            thick = torch.tensor(1 + s.thickness)
            slices = math.ceil(length / float(thick))
            matrix = resampler(slices, length, 1 / thick) @ resampler(length, slices, thick) @ matrix
        if s.ghost and along:
            weight = (s.ghost * vary[:, 5]).clamp_max(0.45)[:, None, None]
            matrix = ((1 - weight) * torch.eye(length) + weight * torch.eye(length).roll(length // 3, 0)) @ matrix
        if not torch.equal(matrix, torch.eye(length)[None]):
            grey = _along(axis, grey, matrix)
    return grey


def _zoom(axis: int, grey: Tensor, s: Profile, machine: Site, vary: Tensor) -> Tensor:
    """The change of the field of view along an axis, (n, length, length)."""
    sign = machine.signs[0] if grey.ndim == 4 else machine.signs[axis]  # 3D: other voxel proportions
    length = grey.shape[axis + 2]
    return resampler(length, length, 1 / (1 + sign * s.zoom * vary[:, 0]))


def _zoomed(grey: Tensor, s: Profile, machine: Site, vary: Tensor) -> Tensor:
    for axis in range(grey.ndim - 2):
        grey = _along(axis, grey, _zoom(axis, grey, s, machine, vary))
    return grey


def _along(axis: int, grey: Tensor, matrix: Tensor) -> Tensor:
    """Images (n, C, *S) times matrices (n or 1, length, length) along one axis."""
    lines = grey.movedim(axis + 2, -1)
    moved = lines.flatten(1, -2) @ matrix.transpose(1, 2)  # (n, C * rest, length)
    return moved.view(lines.shape).movedim(-1, axis + 2)


def _gaussian(length: int, sd: Tensor) -> Tensor:
    """Blurring matrices (n, length, length) of the given SD (n,), rows summing to 1.

    Each weight is the integral over a voxel: an SD far below one voxel still blurs.
    """
    gap = (torch.arange(length)[:, None] - torch.arange(length)).to(torch.float32)
    scale = sd[:, None, None] * math.sqrt(2)
    weights = torch.erf((gap + 0.5) / scale) - torch.erf((gap - 0.5) / scale)
    return weights / weights.sum(-1, keepdim=True)


def _powers(dims: int) -> list[tuple[int, ...]]:
    """Exponents of the monomials of total degree 1 to 3."""
    return [powers for powers in itertools.product(range(4), repeat=dims) if 1 <= sum(powers) <= 3]


def _field(grey: Tensor, coefficients: Tensor, vary: Tensor) -> Tensor:
    """Multiplicative illumination exp(polynomial of degree 3), (n, 1, *S)."""
    axes = [torch.linspace(-1, 1, length) for length in grey.shape[2:]]
    grids = torch.meshgrid(*axes, indexing="ij")
    basis = torch.stack(
        [
            math.prod((g**p for g, p in zip(grids, powers, strict=True)), start=torch.ones(()))
            for powers in _powers(len(axes))
        ]
    )
    field = torch.einsum("p,p...->...", coefficients, basis)
    return torch.exp(field[None] * vary.view(-1, *[1] * len(axes)))[:, None]


def _contrast(grey: Tensor, s: Profile, machine: Site, vary: Tensor) -> Tensor:
    column = (-1, *[1] * (grey.ndim - 1))
    if s.gamma:
        exponent = torch.exp(machine.signs[1] * math.log1p(s.gamma) * vary[:, 3])
        grey = grey.clamp_min(0) ** exponent.view(column)
    if s.gain or s.offset:
        gain = 1 + machine.signs[2] * s.gain * vary[:, 4]
        grey = grey * gain.view(column) + (machine.signs[3] * s.offset * vary[:, 5]).view(column)
    return grey


def _restain(grey: Tensor, change: Tensor) -> Tensor:
    """Colour images (n, 3, H, W) with the amount of each stain scaled and shifted by `change` (n, 3)."""
    density = -torch.log(grey.clamp(1e-3, 1))
    stains = torch.nn.functional.normalize(STAINS, dim=1)
    amount = torch.einsum("nc...,cs->ns...", density, torch.linalg.inv(stains))
    change = change[:, :, None, None]
    amount = amount * (1 + 3 * change) + change
    return torch.exp(-torch.einsum("ns...,sc->nc...", amount, stains))


def _noisy(grey: Tensor, s: Profile, vary: Tensor, rngs: Sequence[torch.Generator]) -> Tensor:
    shape = (2 if s.law == "rician" else 1, *grey.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])  # (n, 1 or 2, C, *S)
    noise = noise * (s.noise * vary).view(-1, *[1] * (noise.ndim - 1))
    if s.law == "rician":  # magnitude of a complex signal
        return torch.sqrt((grey + noise[:, 0]) ** 2 + noise[:, 1] ** 2)
    if s.law == "speckle":
        return grey * (1 + 2 * noise[:, 0])
    return grey + noise[:, 0] * torch.sqrt(0.25 + 1.5 * grey.clamp_min(0))  # part electronic, part counting


def _compress(grey: Tensor, quality: int) -> Tensor:
    """JPEG and back, (n, 3, H, W)."""
    from PIL import Image

    pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    out = np.empty_like(pixels)
    for row, image in enumerate(pixels):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, format="JPEG", quality=quality)
            out[row] = np.asarray(Image.open(file))
    return torch.from_numpy(out).movedim(-1, 1).to(torch.float32) / 255
