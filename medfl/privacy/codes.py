"""Codebooks under differential privacy: noised counts and residual sums, and a first codebook of public images.

A patient's tokens are averaged, so that all of them together count once per codebook. Sent are the counts, the sums of
the tokens' clipped residuals z - e_k, which cost far less than the sums of the tokens themselves, and their energies;
in the units of any other refresh pass, so that the merge is the same.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from medfl import seeding
from medfl.methods.base import Method
from medfl.methods.tokens import AtQuantizers, TokenSample
from medfl.models.quantizer import Quantizer, kmeans
from medfl.privacy.secret import Secret
from medfl.protection import Privacy

PARTS = 3  # counts, residuals and energies of a patient, each at most 1 long
SIGMAS = 3.0  # deviations below which a count is taken for noise
PUBLIC_IMAGES = 128
PUBLIC_TOKENS = 64  # of an image, for the first codebook


class PatientSums(AtQuantizers):
    """While active, sums what each patient says of every codebook; `owners` and `shares` are of the images to come.

    Attributes:
        owners: (B,) place of each image's patient, below `patients`.
        shares: (B,) of the image among its patient's; they add up to 1 for each patient.
        rows: by codebook (patients, K (D + 2)), the vector of each patient, at most sqrt(3) long.
    """

    def __init__(self, method: Method, patients: int, clip: float) -> None:
        super().__init__(method)
        self._patients, self._clip = patients, clip
        self.owners = self.shares = torch.empty(0)
        self.rows: dict[str, Tensor] = {}

    def _see(self, name: str, book: Quantizer, tokens: Tensor) -> None:
        codes, width = book.sums.shape
        vectors, found = book.code_vectors().double(), book.assign(tokens)
        rest = tokens.double() - vectors[found]  # (B, N, D)
        lengths = torch.linalg.vector_norm(rest, dim=2, keepdim=True)
        rest = rest * (self._clip / lengths).clamp_max(1.0) / self._clip
        energies = (lengths / self._clip).clamp_max(1.0).square()
        share = (self.shares.double() / tokens.shape[1])[:, None, None].expand(-1, tokens.shape[1], 1)
        each = torch.cat([torch.ones_like(energies), energies, rest], dim=2) * share  # (B, N, 2 + D)
        place = (self.owners[:, None] * codes + found).flatten()
        sums = each.new_zeros(self._patients * codes, 2 + width).index_add_(0, place, each.flatten(0, 1))
        new = sums.view(self._patients, codes * (2 + width))
        self.rows[name] = self.rows[name] + new if name in self.rows else new

    def fill(self, device: torch.device) -> None:
        """Zeros where no patient was sampled: the noise leaves all the same."""
        for name, book in self._books.items():
            codes, width = book.sums.shape
            empty = torch.zeros(self._patients, codes * (2 + width), dtype=torch.float64, device=device)
            self.rows.setdefault(name, empty)


def released(rows: Mapping[str, Tensor], method: Method, privacy: Privacy, secret: Secret) -> dict[str, Tensor]:
    """The sums over patients with noise, as counts, sums and residuals of each codebook; one release of all together.

    Sensitivity: a patient's vectors are at most sqrt(3) long in each book, so sqrt(3 books) together.

    Args:
        rows: of `PatientSums`.
    """
    books = method.codebooks()
    found: dict[str, Tensor] = {}
    noise = count_noise(privacy, len(books))
    for name, book in books.items():
        codes, width = book.sums.shape
        lengths = torch.linalg.vector_norm(rows[name], dim=1, keepdim=True).clamp_min(1e-12)
        total = (rows[name] * (math.sqrt(PARTS) / lengths).clamp_max(1)).sum(0)
        total = total + secret.normal(len(total), total.device).double() * noise
        counts, energies, rest = torch.split(total.view(codes, 2 + width), [1, 1, width], dim=1)
        found |= _as_sums(name, book, counts[:, 0], energies[:, 0], rest, privacy.codes_clip, noise)
    return found


def _as_sums(
    name: str, book: Quantizer, counts: Tensor, energies: Tensor, rest: Tensor, clip: float, noise: float
) -> dict[str, Tensor]:
    """What a refresh pass sends, from noised numbers alone; a code whose count may be noise is left out."""
    shown = counts > SIGMAS * noise
    counts = counts.where(shown, 0)
    sums = counts[:, None] * book.code_vectors().double() + rest * clip
    lengths = torch.linalg.vector_norm(sums, dim=1)
    sums = (sums * (counts / lengths.clamp_min(1e-12)).clamp_max(1)[:, None]).where(shown[:, None], 0)
    energies = (energies * clip**2).clamp_min(0).minimum(4 * counts).where(shown, 0)
    named = {"counts": counts, "sums": sums, "residuals": energies}
    return {f"{name}.{kind}": (tensor * book.tokens_per_image).cpu() for kind, tensor in named.items()}


def count_noise(privacy: Privacy, books: int) -> float:
    """Deviation of the noise on each number of a release, in patients."""
    return privacy.codes_noise * math.sqrt(PARTS * books)


@torch.no_grad()
def public_seeds(method: Method, images: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first codebooks, as counts (K,) and sums (K, D): the clusters of the tokens of public images (B, C, *S)."""
    draw = seeding.generator(seed, "codebook", "public")
    method.train()
    with TokenSample(method, most=PUBLIC_TOKENS, generator=draw) as sample:
        for part in torch.split(images, 32):
            method.observe(part, 0.0)
    tokens = {name: found.flatten(0, 1) for name, found in sample.tokens().items()}
    return {name: kmeans(found, len(method.codebooks()[name].counts), generator=draw) for name, found in tokens.items()}
