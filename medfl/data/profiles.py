"""What scanners do to an image: a letter for each profile, in 2D and 3D."""

from dataclasses import dataclass

import torch

from medfl.errors import ConfigError

# rows: optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok and Johnston 2001)
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@dataclass(frozen=True)
class Profile:
    """What a scanner does, per unit of severity.

    zoom: relative change of the field of view. blur: Gaussian SD in voxels of a 28-grid. thickness: relative growth
    of the slices along one axis. ghost: weight of a displaced copy. bias: largest coefficient of the log-polynomial
    illumination field. gamma: relative change of the exponent. gain, offset: of the [0, 1] grey scale. noise: SD on
    the same scale, of the kind `law` ("poisson", "rician" or "speckle"). stain: SD of the colour components. jpeg:
    loss of quality from 90. one_axis: blur acts along one axis of the site, not along all.
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


def profile_at(profile: Profile, severity: float) -> Profile:
    """All strengths of a profile times the severity."""
    values = {name: value * severity for name, value in vars(profile).items() if type(value) is float}
    return Profile(**{**vars(profile), **values})
