"""New images from a latent diffusion model, by DDIM (Song et al. 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor

from medfl import seeding
from medfl.synthesis.latent import Diffusion
from medfl.training import Device


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    *,
    count: int,
    steps: int,
    seed: int,
    batch_size: int,
    where: Device,
    report: Callable[[int, int], None],
) -> Tensor:
    """`count` images (count, C, *S) in [-1, 1], float32, on the CPU; moves the model to the device.

    Image i depends on the model, `steps`, `seed` and i alone; over batch sizes and devices, up to rounding.

    Args:
        steps: of the sampler; at most the levels of the model's schedule.
        report: takes images done and `count`, after each batch.

    Raises:
        ConfigError: steps that the schedule does not have.
    """
    pairs = diffusion.schedule.steps(steps)
    diffusion.to(where.device)
    layout = where.memory_format(len(diffusion.shape) - 1)
    made = torch.empty(count, *diffusion.shape)
    for places in torch.split(torch.arange(count), batch_size) if count else ():
        z = torch.stack([_noise(diffusion, seed, place) for place in places.tolist()])
        z = z.to(where.device).contiguous(memory_format=layout)
        for t, t_next in pairs:
            with where.autocast():
                epsilon = diffusion.denoiser(z, timesteps=torch.full((len(z),), t, device=where.device))
            z = diffusion.schedule.ddim_step(z, epsilon.float(), t, t_next)
        with where.autocast():
            images = diffusion.decode(z / diffusion.scale)
        made[places] = images.float().clamp(-1, 1).cpu()  # only here: clipped latents lose a third of their spread
        report(int(places[-1]) + 1, count)
    return made


def _noise(diffusion: Diffusion, seed: int, place: int) -> Tensor:
    return torch.randn(diffusion.latent_shape, generator=seeding.generator(seed, "noise", place))
