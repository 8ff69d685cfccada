"""Every method config found on disk, built from the command line's own words."""

from collections.abc import Callable

import pytest
import torch

from medfl import config
from medfl.methods.base import Method

Build = Callable[..., Method]
MULTIMODAL = ("nslf",)


@pytest.fixture(params=sorted(path.stem for path in (config.CONFIGS / "method").glob("*.yaml")))
def build(request: pytest.FixtureRequest) -> Build:
    """`build(dims, *overrides, seed=0)`: the method on a thin encoder for sides of 16, in training mode."""

    def built(dims: int, *overrides: str, seed: int = 0) -> Method:
        data: tuple[str, ...] = ("data=phantom", f"data.spatial_dims={dims}", "data.size=16")
        if request.param in MULTIMODAL:
            data = ("data=brain", f"data.spatial_dims={dims}", "data.size=16", "method.base_width=2", "method.levels=2")
        encoder = ("encoder=tiny", "encoder.base_width=4")
        study = config.compose([f"method={request.param}", *data, *encoder, *overrides])
        torch.manual_seed(seed)
        method: Method = config.build(study.method)
        channels = int(study.data["channels"])
        others = torch.randn(8, channels, *[16] * dims, generator=torch.Generator().manual_seed(2))
        method.train().enqueue(others, torch.arange(100, 108))  # queues as a round starts them
        return method

    return built
