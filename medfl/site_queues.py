"""Queues of keys at a site: what a round starts with. They are features of single patients and never leave."""

import torch
from torch import Tensor

from medfl import seeding
from medfl.methods.base import Method
from medfl.models.queue import limit_for


def begin(method: Method, *, mode: str, age: int, batch: int, images: int, number: int) -> int:
    """Set the queues for round `number` of a site with so many images; returns how many keys they are to be given.

    refresh: emptied, then to be filled by the new key encoder, whose old keys no longer fit it. clear: emptied. keep:
    keys of up to `age` rounds before stay.
    """
    wanted = 0
    for queue in method.queues().values():
        queue.limit, queue.round = limit_for(queue.capacity, batch=batch, images=images), number
        if mode == "keep":
            queue.drop_older(number - age)
            continue
        queue.clear()
        wanted = max(wanted, queue.limit) if mode == "refresh" else 0
    return wanted


def rows(images: int, wanted: int, *, batch: int, key: int) -> list[Tensor]:
    """Batches of distinct images to make keys of, at most as many as there are."""
    draw = torch.Generator().manual_seed(key)
    return list(torch.split(torch.randperm(images, generator=draw)[:wanted], batch))


def patient_codes(patients: tuple[str, ...]) -> Tensor:
    """(N,) int64, equal for images of one patient; used inside the site alone."""
    return torch.tensor([seeding.key("patient", patient) for patient in patients], dtype=torch.int64)
