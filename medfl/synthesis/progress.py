"""How far the training of a network has come, and its file."""

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medfl import seeding
from medfl.checkpoint import load_optimizer, optimizer_tensors
from medfl.errors import DataError
from medfl.files import write_tensors

PARTS = ("network", "average", "best")


class Progress:
    """A network in training, its moving average, the best average so far, and the optimizer.

    Args:
        network: steps in place.
        optimizer: of its parameters.
        path: of its file.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
        self.network, self.optimizer, self.path = network, optimizer, path
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.best = copy.deepcopy(self.average)
        self.step, self.misses, self.least = 0, 0, math.inf

    def judge(self, loss: float) -> None:
        """Keep the average if its held-out loss is the least so far."""
        if loss < self.least:
            self.least, self.misses = loss, 0
            self.best.load_state_dict(self.average.state_dict())
        else:
            self.misses += 1

    def save(self, step: int) -> None:
        """Write the state after `step` steps.

        Raises:
            ResourceError: the disk is full; the file is as it was.
        """
        self.step = step
        counts = {"step": step, "misses": self.misses, "least": self.least}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in counts.items()}
        for part in PARTS:
            tensors |= {f"{part}/{name}": value for name, value in getattr(self, part).state_dict().items()}
        write_tensors(self.path, tensors | optimizer_tensors(self.optimizer))

    def restore(self) -> None:
        """Go back to what `save` wrote, if it did.

        Raises:
            DataError: the file is damaged.
        """
        if not self.path.exists():
            return
        try:
            tensors = load_file(self.path)
            for part in PARTS:
                named = {n.removeprefix(f"{part}/"): value for n, value in tensors.items() if n.startswith(f"{part}/")}
                getattr(self, part).load_state_dict(named)
            load_optimizer(self.optimizer, tensors)
            self.step, self.misses = int(tensors["step"]), int(tensors["misses"])
            self.least = float(tensors["least"])
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{self.path} is damaged ({error}). Remove it to start this training anew.") from None


def batch(count: int, size: int, step: int, key: int) -> Tensor:
    """Places of the images of a step: passes without replacement, each in its own order."""
    size = min(size, count)
    number, place = divmod(step, count // size)
    return torch.randperm(count, generator=seeding.generator(key, number))[place * size : (place + 1) * size]


def average_momentum(step: int, *, largest: float) -> float:
    """m of a moving average, after `step` earlier updates: while it is young, it forgets the first weights sooner."""
    return min(largest, (1 + step) / (10 + step))
