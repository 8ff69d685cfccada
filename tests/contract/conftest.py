"""Every config of a method or a task found on disk, built from the command line's own words."""

from collections.abc import Callable

import pytest
import torch

from medfl import config
from medfl.methods.base import Method

Build = Callable[..., Method]
MULTIMODAL = ("nslf",)


CONFIGS = [
    (group, path.stem) for group in ("method", "task") for path in sorted((config.CONFIGS / group).glob("*.yaml"))
]
SITES_KNOW = {"classes": 2, "labels": 4, "outputs": 3}  # what a task learns from the sites


@pytest.fixture(params=CONFIGS, ids="-".join)
def build(request: pytest.FixtureRequest) -> Build:
    """`build(dims, *overrides, seed=0)`: the method on a thin encoder for sides of 16, in training mode."""

    def built(dims: int, *overrides: str, seed: int = 0) -> Method:
        data: tuple[str, ...] = ("data=phantom", f"data.spatial_dims={dims}", "data.size=16")
        group, name = request.param
        if name in MULTIMODAL:
            data = ("data=brain", f"data.spatial_dims={dims}", "data.size=16", "method.base_width=2", "method.levels=2")
        encoder = ("encoder=tiny", "encoder.base_width=4")
        study = config.compose([f"{group}={name}", *data, *encoder, *overrides])
        node = study.method if group == "method" else {n: SITES_KNOW.get(n, v) for n, v in study.task.items()}
        torch.manual_seed(seed)
        method: Method = config.build(node)
        channels = int(study.data["channels"])
        others = torch.randn(8, channels, *[16] * dims, generator=torch.Generator().manual_seed(2))
        method.train().enqueue(others, torch.arange(100, 108))  # queues as a round starts them
        return method

    return built
