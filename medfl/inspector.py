"""The inspector: what each site's encoder makes of the same drawn images, and which site's sticks out.

The idea is EmInspector's (Qian et al., arXiv:2405.13080): poisoned encoders embed a few images otherwise than the
others do. Here the images are phantoms, drawn on the server for the study's shape, so that no site gives any away.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl import config
from medfl.data.phantom import KINDS, drawn_like
from medfl.layout import Flat, Layout
from medfl.methods.base import Method, Role
from medfl.workshop import new_method

IMAGES = {2: 32, 3: 16}  # by spatial dimensions
THRESHOLD = 5.0  # of `strangeness`; good sites with scanners of their own came to 4.03 (benchmarks/RESULTS.md)
FLOOR = 0.15  # so a site at twice the usual distance or less is never flagged
ROUNDING = 1e-9  # of 1 - cosine; encoders that are equal do not stick out
LEAST = 4  # sites; of three, two that agree are no measure of the third


@functools.lru_cache(maxsize=1)
def _eye(source: str) -> tuple[Method, Tensor]:
    """The study's method in training mode, and the inspection images (N, C, *S)."""
    study = config.parse(source)
    count = IMAGES[int(study.data["spatial_dims"])]
    return new_method(study).train(), drawn_like(study.data, count=count, classes=KINDS, seed=study.seed)


@torch.no_grad()
def embeddings(source: str, sends: Layout, broadcast: Flat, flats: Sequence[Flat]) -> Tensor:
    """Of the inspection images by each site's encoder, (sites, N, F); norms use the batch's own statistics.

    What a site does not send is the broadcast's; features that overflow are 0.
    """
    method, images = _eye(source)
    layout, found = sends.of_role(Role.PARAMETER), []
    for flat in flats:
        held = {group: flat.get(group, broadcast[group]) for group in layout.groups}
        method.load_state_dict(layout.unpack(held), strict=False)
        found.append(method.encoder(images).float().nan_to_num(0.0, 0.0, 0.0))
    return torch.stack(found)


def strangeness(embedded: Tensor) -> list[float]:
    """How far each site's embeddings stick out, in robust standard deviations of the sites; above THRESHOLD: too far.

    Of each site: log of the median, over the others, of 1 - cosine of the same images' embeddings, centred over the
    images. Then (value - median) / max(1.4826 MAD, FLOOR): with few sites the MAD alone may be next to nothing.

    Args:
        embedded: (sites, N, F), of LEAST sites at least.
    """
    unit = F.normalize(embedded.double() - embedded.double().mean(1, keepdim=True), dim=2)
    apart = 1 - torch.einsum("inf,jnf->ij", unit, unit) / unit.shape[1]  # (sites, sites)
    others = apart[~torch.eye(len(apart), dtype=torch.bool)].view(len(apart), -1)
    return robust(others.quantile(0.5, dim=1).clamp_min(ROUNDING).log(), floor=FLOOR).tolist()


def robust(values: Tensor, *, floor: float) -> Tensor:
    """(value - median) / max(1.4826 MAD, floor), of (sites,) values."""
    gaps = values - values.quantile(0.5)
    return gaps / (1.4826 * gaps.abs().quantile(0.5)).clamp_min(floor)
