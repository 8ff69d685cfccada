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

from medfl.data.volume import resampler
from medfl.errors import ConfigError
from medfl.seeding import generator

REFERENCE_SIZE = 28  # voxels per side for which the blur is given; larger grids blur in proportion
JITTER = 0.2
CHUNK = 2**21  # voxels at once

# rows: optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok and Johnston 2001)
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@dataclass(frozen=True)
class Profile:
    """What a scanner does, per unit of severity.

    zoom: relative change of the field of view. blur: Gaussian SD in voxels of a 28-grid. thickness: relative
        growth of
    the slices along one axis. ghost: weight of a displaced copy. bias: largest coefficient of the
    log-polynomial illumination field. gamma: relative change of the exponent. gain, offset: of the [0, 1]
    grey scale. noise: SD on the same scale, of the kind `law` ("poisson", "rician" or "speckle"). stain: SD
    of the colour components. jpeg: loss of quality from 90. one_axis: blur acts along one axis of the site,
    not along all.
    """

    title: str
    zoom: float = 0.0
    blur: float = 0.0
    thickness: float = 0.0
    ghost: float = 0.0
    bias: float = 0.0
    gamma: float = 0.0
    gain: float = 0.0
    offset: float = 0.0
    noise: float = 0.0
    law: str = "poisson"
    stain: float = 0.0
    jpeg: float = 0.0
    one_axis: bool = False


SHARED = {
    "A": Profile("reference"),
    "B": Profile("contrast", gamma=0.15, gain=0.06, offset=0.04),
    "E": Profile("illumination", bias=0.1),
    "G": Profile("geometry", zoom=0.05),
}
PLANAR = SHARED | {
    "C": Profile("low dose", noise=0.03, law="poisson"),
    "D": Profile("soft kernel", blur=0.25),
    "F": Profile("stain and compression", stain=0.03, jpeg=14.0),
    "U": Profile("unseen", blur=0.25, gamma=0.15, gain=0.06, offset=0.04, noise=0.04, law="speckle"),
}
VOLUMETRIC = SHARED | {
    "C": Profile("low field", noise=0.03, law="rician"),
    "D": Profile("thick slices", blur=0.25, thickness=0.5, one_axis=True),
    "U": Profile("unseen", ghost=0.08, blur=0.15, bias=0.1, one_axis=True),
}


@dataclass(frozen=True)
class Site:
    """The fixed choices of one site's machine, drawn from its key: directions, one axis, field
    coefficients.
    """

    signs: Tensor  # (8,) -1 | 1
    axis: int
    coefficients: Tensor  # (P,) in [-1, 1]


def title(name: str, spatial_dims: int) -> str:
    """What to call a profile: its letter and what it does; other names stay as they are."""
    known = PLANAR if spatial_dims == 2 else VOLUMETRIC
    return f"{name} ({known[name].title})" if name in known else name


def find(name: str, spatial_dims: int, channels: int) -> Profile:
    """The profile of that letter for 2D or 3D.

    Raises:
        ConfigError: unknown letter, or a colour profile for grey images.
    """
    known = PLANAR if spatial_dims == 2 else VOLUMETRIC
    if name not in known:
        raise ConfigError(
            f"sites.profiles: got {name!r}, need letters of {', '.join(sorted(known))} in {spatial_dims}D."
        )
    if known[name].stain and channels != 3:
        raise ConfigError(f"sites.profiles: {name!r} needs colour images (3 channels), got {channels}. Leave it out.")
    return known[name]


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


def _machine(site: int, dims: int) -> Site:
    rng = generator(site, "machine")
    signs = torch.randint(2, (8,), generator=rng) * 2.0 - 1
    axis = int(torch.randint(dims, (1,), generator=rng))
    return Site(signs, axis, torch.rand(len(_powers(dims)), generator=rng) * 2 - 1)


def _scan_chunk(
    images: Tensor, profile: Profile, severity: float, machine: Site, rngs: Sequence[torch.Generator]
) -> Tensor:
    s = profile_at(profile, severity)
    vary = 1 + JITTER * (torch.stack([torch.rand(8, generator=rng) for rng in rngs]) * 2 - 1)  # (n, 8)
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


def profile_at(profile: Profile, severity: float) -> Profile:
    """All strengths of a profile times the severity."""
    values = {name: value * severity for name, value in vars(profile).items() if type(value) is float}
    return Profile(**{**vars(profile), **values})


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
            sign = machine.signs[0] if dims == 2 else machine.signs[axis]  # 3D: other voxel proportions
            matrix = resampler(length, length, 1 / (1 + sign * s.zoom * vary[:, 0]))
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
            lines = grey.movedim(axis + 2, -1)
            moved = lines.flatten(1, -2) @ matrix.transpose(1, 2)  # (n, C * rest, length)
            grey = moved.view(lines.shape).movedim(-1, axis + 2)
    return grey


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
