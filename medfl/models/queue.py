"""The queue of keys: embeddings of earlier batches, which serve as negatives (He et al., arXiv:1911.05722)."""

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError

EMPTY, UNKNOWN = -1, -1  # version of a row that holds no key; patient of an image without one
IMAGES_PER_KEY = 4  # a longer queue is made of the same few patients, of whom each image hides its own


class Queue(nn.Module):
    """First in, first out: each key replaces the oldest one. It holds features of single patients and never travels.

    Shapes are fixed and nothing is read back from the device: rows without a key are `hidden`, not cut off.

    Args:
        capacity: most keys.
        width: D, of a key.

    Attributes:
        keys: (capacity, D) unit rows.
        versions: (capacity,) round of the network that made the key; -1: no key.
        patients: (capacity,); -1: unknown.
        position: () where the next key goes.
        limit: rows in use, of this site; at most the capacity.
        round: what `push` writes as the version.

    Raises:
        ConfigError: a capacity below 1.
    """

    keys: Tensor
    versions: Tensor
    patients: Tensor
    position: Tensor

    def __init__(self, capacity: int, width: int) -> None:
        super().__init__()
        if capacity < 1:
            raise ConfigError(f"method.capacity: got {capacity}, need at least 1 key, e.g. 4096.")
        self.capacity, self.limit, self.round = capacity, capacity, 0
        self.register_buffer("keys", torch.zeros(capacity, width))
        self.register_buffer("versions", torch.full((capacity,), EMPTY))
        self.register_buffer("patients", torch.full((capacity,), UNKNOWN))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, patients: Tensor | None) -> None:
        """Add keys (B, D), unit rows, of patients (B,); of more than `limit` keys the last ones."""
        keys = keys[-self.limit :]
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % self.limit
        self.keys.index_copy_(0, rows, keys.to(self.keys.dtype))
        self.versions.index_fill_(0, rows, self.round)
        if patients is None:
            self.patients.index_fill_(0, rows, UNKNOWN)
        else:
            self.patients.index_copy_(0, rows, patients[-self.limit :])
        self.position.add_(len(keys)).remainder_(self.limit)

    def snapshot(self) -> Tensor:
        """The rows in use (limit, D), without gradient; later pushes do not change it."""
        return self.keys[: self.limit].detach().clone()

    def hidden(self, patients: Tensor | None) -> Tensor:
        """Which rows are no negatives of images of these patients (B,): empty ones and those of the same patient.

        (B, limit); (1, limit) where the patients are None.
        """
        empty = (self.versions[: self.limit] == EMPTY)[None]
        if patients is None:
            return empty
        same = patients[:, None] == self.patients[None, : self.limit]
        return empty | (same & (patients != UNKNOWN)[:, None])

    def drop_older(self, round: int) -> None:  # noqa: A002
        """Empty the rows whose version is below `round`."""
        self.versions.masked_fill_(self.versions < round, EMPTY)

    def clear(self) -> None:
        """Empty all rows, and forget what they held."""
        self.keys.zero_()
        self.versions.fill_(EMPTY)
        self.patients.fill_(UNKNOWN)
        self.position.zero_()

    def monitors(self) -> dict[str, Tensor]:
        """Shares: of rows in use that hold a key, and of those keys that are of an earlier round."""
        versions = self.versions[: self.limit]
        filled, stale = versions != EMPTY, (versions != EMPTY) & (versions < self.round)
        return {"queue_filled": filled.float().mean(), "queue_stale": stale.sum() / filled.sum().clamp_min(1)}


def limit_for(capacity: int, *, batch: int, images: int) -> int:
    """Rows that a site with so many images uses: whole batches, up to a quarter of its images, at least one batch."""
    return min(capacity, batch * max(1, images // (IMAGES_PER_KEY * batch)))
