"""Latent diffusion: schedule, networks, training, sampling. Exact identities where there are any."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from medfl.config import CONFIGS, build, compose
from medfl.data.phantom import Phantom
from medfl.errors import ConfigError, DataError, DivergedError
from medfl.models.diffusion import Schedule, autoencoder, cropped, denoiser, padded
from medfl.models.similarity import ssim
from medfl.optimizers import adamw
from medfl.study import Synthesis
from medfl.synthesis.latent import Diffusion
from medfl.synthesis.losses import reconstruction
from medfl.synthesis.progress import Progress, average_momentum, batch
from medfl.synthesis.sampling import sample
from medfl.synthesis.training import Phase, Run, train
from medfl.training import Device

CPU = Device.choose("cpu", "fp32", "never")


def config(name: str) -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load((CONFIGS / "synthesis" / f"{name}.yaml").read_text())
    return node


def plan_of(name: str, **changes: Any) -> Synthesis:
    return replace(compose([f"synthesis={name}"]).synthesis, **changes)


def silent(*_: object) -> None:
    pass


@functools.cache
def phantoms(*, count: int = 16, size: int = 28, dims: int = 2) -> Tensor:
    kinds = ("none", "smooth")
    settings: dict[str, Any] = {"classes": kinds, "contrast": 0.3, "noise": 0.02, "seed": 3, "images_per_patient": 2}
    phantom = Phantom(name="anatomy", spatial_dims=dims, channels=1, size=size, count=count, **settings)
    return phantom.load().images


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return train(
        phantoms(), plan_of("tiny"), CPU, folder=tmp_path_factory.mktemp("s"), held_out=(), seed=1, report=silent
    )


def drawn(model: Diffusion, *, count: int = 5, seed: int = 0, batch_size: int = 5) -> Tensor:
    return sample(model, count=count, steps=5, seed=seed, batch_size=batch_size, where=CPU, report=silent)


def test_what_is_kept_is_the_product_over_the_schedule() -> None:
    kept = 1.0
    for t in range(1000):
        root = math.sqrt(0.0015) + t / 999 * (math.sqrt(0.0195) - math.sqrt(0.0015))
        kept *= 1 - root**2
        assert float(Schedule().kept[t]) == pytest.approx(kept, rel=1e-10)


def test_the_noisiest_latents_are_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 40_000, 3, generator=generator)
    noisy = Schedule().add_noise(z.sign() * 1.5, noise, torch.full((40_000,), 999))
    assert abs(float(noisy.mean())) < 0.01
    assert float(noisy.std()) == pytest.approx(1, abs=0.01)
    assert float((noisy**4).mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(("t", "t_next"), [(999, 500), (500, 499), (3, 0), (0, -1), (700, -1)])
def test_a_step_along_the_true_noise_gives_the_next_noisy_latents(t: int, t_next: int) -> None:
    schedule = Schedule()
    clean, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    found = schedule.ddim_step(schedule.add_noise(clean, noise, torch.full((4,), t)), noise, t, t_next)
    wanted = clean if t_next < 0 else schedule.add_noise(clean, noise, torch.full((4,), t_next))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("steps", "spread", "tolerance"), [(50, 0.5, 0.03), (50, 1, 0.03), (100, 0.5, 0.03), (1000, 0.5, 0.01)]
)
def test_the_sampler_keeps_the_spread_of_gaussian_data(steps: int, spread: float, tolerance: float) -> None:
    schedule = Schedule()
    z = torch.ones(1, dtype=torch.float64)  # everything is linear: one standard deviation away from the mean
    for t, t_next in schedule.steps(steps):
        kept = float(schedule.kept[t])
        epsilon = math.sqrt(1 - kept) * z / (kept * spread**2 + 1 - kept)  # E[noise | z] for data N(0, spread²)
        z = schedule.ddim_step(z, epsilon, t, t_next)
    assert float(z) == pytest.approx(spread, rel=tolerance)


@pytest.mark.parametrize("count", [1, 2, 50, 99, 100, 700, 999, 1000])
def test_the_sampler_visits_distinct_levels_from_the_noisiest_to_the_clean(count: int) -> None:
    pairs = Schedule().steps(count)
    levels = [t for t, _ in pairs]
    assert len(pairs) == count
    assert levels[0] == 999
    assert levels == sorted(set(levels), reverse=True)
    assert [t for _, t in pairs] == [*levels[1:], -1]


@pytest.mark.parametrize("count", [0, 1001])
def test_steps_that_the_schedule_does_not_have_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="need 1 to 1000"):
        Schedule().steps(count)


@pytest.mark.parametrize("sides", [(28, 28), (32, 16), (9, 13), (7, 20, 12)])
def test_cropping_undoes_padding(sides: Sequence[int]) -> None:
    images = torch.randn(2, 3, *sides)
    wide = padded(images, 16)
    assert all(side % 16 == 0 and side - 16 < own for side, own in zip(wide.shape[2:], sides, strict=True))
    assert torch.equal(cropped(wide, sides), images)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 33), (1, 17, 8, 12), (2, 28, 28, 28)])
def test_images_of_any_sides_pass_through_both_networks(shape: tuple[int, ...]) -> None:
    plan = plan_of("tiny")
    model = Diffusion(autoencoder=plan.autoencoder, denoiser=plan.denoiser, shape=shape)
    with torch.no_grad():
        mean, deviation = model.encode(torch.randn(2, *shape))
        assert mean.shape == deviation.shape == (2, *model.latent_shape)
        assert model.denoiser(mean, timesteps=torch.tensor([0, 999])).shape == mean.shape
        assert model.decode(mean).shape == (2, *shape)


def test_three_levels_of_the_denoiser_take_images_of_28() -> None:
    node = config("small")
    model = Diffusion(autoencoder=node["autoencoder"], denoiser=node["denoiser"], shape=(1, 28, 28))
    assert model.latent_shape == (3, 8, 8)
    assert drawn(model, count=1).shape == (1, 1, 28, 28)


def test_the_networks_of_the_paper_have_its_latents_and_the_size_of_the_specification() -> None:
    node = config("paper")
    with torch.device("meta"):
        encoder, unet = (
            build(node["autoencoder"], spatial_dims=2, in_channels=1),
            build(node["denoiser"], spatial_dims=2, latent_channels=3),
        )
    million = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (encoder, unet)]
    assert million == [pytest.approx(49.1, abs=0.05), pytest.approx(171, abs=0.5)]
    assert not [*encoder.buffers(), *unet.buffers()]


def test_networks_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ConfigError, match="autoencoder: got channels"):
        autoencoder(channels=[], res_blocks=1, attention=False, latent_channels=3, spatial_dims=2, in_channels=1)
    for heads in ([0, 0], [16], [0, 12]):
        with pytest.raises(ConfigError, match="head_channels: got"):
            denoiser(channels=[16, 16], res_blocks=1, head_channels=heads, latent_channels=3, spatial_dims=2)


@pytest.mark.parametrize("shape", [(3, 2, 24, 31), (2, 1, 12, 14, 13)])
def test_ssim_is_monais_and_one_for_equal_images(shape: tuple[int, ...]) -> None:
    from monai.losses.ssim_loss import SSIMLoss

    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    y = (x + 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    reference = 1 - SSIMLoss(len(shape) - 2, data_range=1.0)(y, x)
    torch.testing.assert_close(ssim(y, x, span=1.0).mean(), reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(x, x, span=1.0), torch.ones(len(x)))


def test_the_reconstruction_loss_is_the_sum_of_its_terms() -> None:
    images = phantoms()[:4]

    class Shifted(nn.Module):  # mean 2 and deviation 0.5 in each of 6 latents; returns the images plus 0.1
        def encode(self, wide: Tensor) -> tuple[Tensor, Tensor]:
            self.wide = wide
            return torch.full((len(wide), 6), 2.0), torch.full((len(wide), 6), 0.5)

        def decode(self, latents: Tensor) -> Tensor:
            return self.wide + 0.1

    loss = reconstruction(Shifted(), images, torch.Generator(), multiple=16, kl=0.01, ssim_weight=0.1)
    divergence = 6 * 0.5 * (4 + 0.25 - 1 - math.log(0.25))
    unlike = 1 - float(ssim((images + 1.1) / 2, (images + 1) / 2, span=1.0).mean())
    assert float(loss) == pytest.approx(0.1 + 0.01 * divergence + 0.1 * unlike, rel=1e-4)


def test_the_autoencoder_learns_and_its_scaled_latents_have_unit_variance(tmp_path: Path) -> None:
    losses: list[float] = []
    plan = plan_of("tiny", autoencoder_steps=40, denoiser_steps=1, lr=4e-3)
    images = phantoms()
    model = train(
        images, plan, CPU, folder=tmp_path, held_out=(), seed=1, report=lambda _p, _s, _n, loss: losses.append(loss)
    )
    assert losses[3] < 0.7 * losses[0]
    with torch.no_grad():
        mean, deviation = model.encode(images)
    z = mean + deviation * torch.randn(8, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert float((model.scale * z).std()) == pytest.approx(1, abs=0.02)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    images = phantoms(size=16)
    plan = plan_of("tiny", autoencoder_steps=6, denoiser_steps=6, check_every=2)

    def run(folder: Path, stop: tuple[str, int] | None) -> Diffusion:
        def report(phase: str, step: int, steps: int, loss: float) -> None:
            if (phase, step) == stop:
                raise KeyboardInterrupt

        return train(images, plan, CPU, folder=tmp_path / folder, held_out=[1, 5], seed=2, report=report)

    wanted = run(Path("whole"), None)
    for stop in (("autoencoder", 4), ("denoiser", 4)):
        with pytest.raises(KeyboardInterrupt):
            run(Path("parts"), stop)
    found = run(Path("parts"), None)
    assert found.scale == wanted.scale
    assert all(torch.equal(found.state_dict()[name], value) for name, value in wanted.state_dict().items())


def test_latents_that_are_means_have_the_spread_of_the_means(tmp_path: Path) -> None:
    images = phantoms(size=16)
    plan = plan_of("tiny", autoencoder_steps=1, denoiser_steps=1, latents="mean")
    model = train(images, plan, CPU, folder=tmp_path, held_out=[0, 1], seed=2, report=silent)
    with torch.no_grad():
        assert model.scale == pytest.approx(1 / float(model.encode(images[2:])[0].std(correction=0)), rel=1e-4)


def test_states_of_other_trainings_are_neither_used_nor_kept(tmp_path: Path) -> None:
    images = phantoms(size=16)
    plan = plan_of("tiny", autoencoder_steps=2, denoiser_steps=2)
    names = []
    for changed in (images, images.flip(0)):
        train(changed, plan, CPU, folder=tmp_path, held_out=(), seed=2, report=silent)
        names.append({path.name for path in tmp_path.iterdir()})
    assert len(names[1]) == 2
    assert not names[0] & names[1]


class Weight(nn.Module):
    """One number, drawn to the rows' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, 1))


def run_weight(folder: Path, *, held_out: float | None, seen: list[float], **changes: Any) -> tuple[Weight, list[int]]:
    steps: list[int] = []

    def loss(network: Weight, rows: Tensor, generator: torch.Generator) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(float(network.value.detach()))
        return ((network.value - rows) ** 2).mean()

    plan = plan_of("tiny", lr=0.05, weight_decay=0.0, **changes)
    unseen = torch.tensor([] if held_out is None else [8], dtype=torch.int64)
    run = Run(plan, CPU, folder, 0, lambda _p, step, _n, _l: steps.append(step), "toy", torch.arange(8), unseen)
    network = Weight()
    rows = torch.tensor([1.0] * 8 + [held_out or 0.0])
    run.finish(Phase("toy", network, loss, 60, plan.ema), (rows.reshape(9, 1, 1, 1),))
    return network, steps


def test_the_average_is_the_formulas(tmp_path: Path) -> None:
    weights: list[float] = []
    network, _ = run_weight(tmp_path, held_out=None, seen=weights, ema=0.7)
    weights.append(float(load_file(tmp_path / "toy-toy.safetensors")["network/value"]))
    average = weights[0]
    for step, weight in enumerate(weights[1:]):
        momentum = min(0.7, (1 + step) / (10 + step))
        average = momentum * average + (1 - momentum) * weight
    assert len(weights) == 61
    assert float(network.value) == pytest.approx(average, rel=1e-5)


def test_the_held_out_images_choose_the_weights_and_end_the_training(tmp_path: Path) -> None:
    weights: list[float] = []
    network, steps = run_weight(tmp_path, held_out=0.6, seen=weights, ema=0.0, check_every=1, patience=3)
    best = min(weights, key=lambda value: abs(value - 0.6))
    assert float(network.value) == best
    assert steps[-1] == weights.index(best) + 3 < 60


def test_a_pass_takes_every_image_once() -> None:
    places = torch.cat([batch(12, 4, step, 7) for step in range(6)])
    assert sorted(places[:12].tolist()) == sorted(places[12:].tolist()) == list(range(12))
    assert places[:12].tolist() != places[12:].tolist()


def test_a_momentum_of_zero_is_no_average() -> None:
    assert average_momentum(100, largest=0.0) == 0


def test_training_without_images_or_with_broken_ones_is_refused(tmp_path: Path) -> None:
    images, plan = phantoms(size=16).clone(), plan_of("tiny")
    with pytest.raises(DataError, match="need one to train on"):
        train(images[:1], plan, CPU, folder=tmp_path, held_out=[0], seed=0, report=silent)
    images[:, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match="autoencoder's loss is nan at step 10"):
        train(images, plan, CPU, folder=tmp_path, held_out=(), seed=0, report=silent)


def test_a_plan_with_impossible_numbers_is_refused() -> None:
    for change in ({"patience": 0}, {"ema": 1.0}, {"latents": "both"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=f"synthesis.{next(iter(change))}: got"):
            plan_of("tiny", **change)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    network = Weight()
    progress = Progress(network, adamw(list(network.parameters()), lr=0.1, weight_decay=0.0), tmp_path / "s")
    (tmp_path / "s").write_bytes(b"half of a file")
    with pytest.raises(DataError, match="is damaged"):
        progress.restore()


def test_an_image_depends_on_seed_and_place_alone(trained: Diffusion) -> None:
    first = drawn(trained)
    assert torch.equal(drawn(trained), first)
    for batch_size in (1, 2):  # kernels may sum in another order in another batch
        torch.testing.assert_close(drawn(trained, batch_size=batch_size), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn(trained, count=3), first[:3], atol=1e-5, rtol=0)
    assert (drawn(trained, seed=1) - first).abs().amax(dim=(1, 2, 3)).min() > 0.05
    assert (first[0] - first[1]).abs().max() > 0.05


def test_images_are_clipped_and_latents_are_not(trained: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(latents)
        return latents[:, :1].repeat_interleave(2, -1).repeat_interleave(2, -2)

    monkeypatch.setattr(trained.autoencoder, "decode", decode)
    monkeypatch.setattr(trained.denoiser, "forward", lambda z, timesteps: torch.zeros_like(z))
    images = drawn(trained, count=2)
    spread = float((seen[0] * trained.scale).std()) * math.sqrt(float(trained.schedule.kept[999]))
    assert spread == pytest.approx(1, abs=0.1)  # without noise to take away, the first draw grows by 1 / √ᾱ: 84 fold
    assert images.shape == (2, 1, 28, 28)
    assert float(images.abs().max()) == 1


def test_no_image_is_no_work(trained: Diffusion) -> None:
    assert drawn(trained, count=0).shape == (0, 1, 28, 28)


def test_a_model_comes_back_from_its_folder(trained: Diffusion, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    again = Diffusion.load(tmp_path / "model")
    assert torch.equal(drawn(again), drawn(trained))
    assert (tmp_path / "model").stat().st_mode & 0o077 == 0


def test_a_model_that_is_not_whole_is_refused(trained: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no diffusion model can be read"):
        Diffusion.load(tmp_path)
    trained.save(tmp_path)
    weights = tmp_path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        Diffusion.load(tmp_path)
