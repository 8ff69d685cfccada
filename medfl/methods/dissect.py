"""DiSSECT: BYOL with a second target, read from codebooks at three scales (arXiv:2509.18765).

L = mean over the targets t in {z, s} of l(p, t), crosswise between the views (eq. 7)  +  λ β Σ commitment (eq. 5)

z is the target network's embedding; s is what z reads from that network's quantised maps, fused over scales (SERF).
"""

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Role
from medfl.methods.byol import BYOL, batch_statistics, other_view, regression, spread
from medfl.methods.simclr import stacked
from medfl.models.encoders import ResNet
from medfl.models.quantizer import Quantized, Quantizer, perplexity
from medfl.models.serf import MODES, Scale, Serf, fused

LAYERS = {"fine": 1, "medium": 2, "coarse": 3}  # among the maps of layer1..layer4
MOST_CODES = 2048
TOKENS_PER_CODE = 30  # least in an epoch of the whole federation, where codes=auto


class DiSSECT(BYOL):
    """Codebooks follow the tokens of the target network; SERF makes of codes and z the discrete target s.

    By default s has no gradient and its head is random and fixed: a trained head drives its half of the loss to a
    trivial solution. Codebooks start without mass: who trains sets them first, from the tokens that `observe` shows.

    Codebooks and SERF are built last and without moving torch's generator, and only where s is a target: with
    target=continuous or serf=none the method is BYOL bit for bit.

    Args:
        encoder, hidden, width, norm, momentum: as in BYOL; `hidden` also of SERF's head, `width` of z, codes and s.
        target: both | continuous (only z) | discrete (only s).
        scales: some of fine, medium, coarse: layer2, layer3, layer4. Their codes are fused on the grid of medium.
        fusion: fixed (equal weights) | entropy (softmax of the entropies, in nats, of the codebooks' usage).
        vq_proj: trained | frozen_orthogonal: the 1x1 convolutions before the codebooks.
        codes: number of codes of every codebook, a list with one number per scale, or "auto" (`codes_for`).
        images: training images of the whole federation; only "auto" reads it.
        decay, smoothing: of the codebooks.
        beta, commitment: β and λ. Only trained convolutions learn from this term.
        serf: none (s is no target), or a mode of `retrieve`.
        serf_head: fixed | trained | identity.
        serf_residual: add the normalised z to what it read.

    Raises:
        ConfigError: switches outside of the above or against each other.
    """

    def __init__(
        self,
        *,
        encoder: ResNet,
        hidden: int,
        width: int,
        norm: str,
        momentum: float,
        target: str,
        scales: list[str],
        fusion: str,
        vq_proj: str,
        codes: int | list[int] | str,
        images: int,
        decay: float,
        smoothing: float,
        beta: float,
        commitment: float,
        serf: str,
        serf_head: str,
        serf_residual: bool,
    ) -> None:
        super().__init__(encoder=encoder, hidden=hidden, width=width, norm=norm, momentum=momentum)
        _refuse_targets(target, serf, serf_head, residual=serf_residual)
        _refuse_codes(scales, fusion, vq_proj, weights=(beta, commitment))
        self.continuous, self.fusion, self.beta, self.commitment = target != "discrete", fusion, beta, commitment
        self.scales = nn.ModuleDict()
        self._seen: list[tuple[Quantizer, Tensor, Tensor]] = []  # tokens and indices of a step's training forwards
        if target == "continuous" or serf == "none":
            return
        with torch.random.fork_rng(devices=[]):
            for name, (tokens, size) in zip(scales, _sizes(encoder, scales, codes, images), strict=True):
                book = Quantizer(codes=size, width=width, decay=decay, smoothing=smoothing, tokens_per_image=tokens)
                self._add_scale(name, book, trained=vq_proj == "trained")
            head = None if serf_head == "identity" else hidden
            self.serf = batch_statistics(Serf(mode=serf, width=width, hidden=head, norm=norm, residual=serf_residual))
        self.claims = {**self.claims, "serf": Claim(Role.PARAMETER)}
        if serf_head != "trained":
            self.freeze("serf")

    def _add_scale(self, name: str, book: Quantizer, *, trained: bool) -> None:
        channels, dims = self.encoder.stage_widths[LAYERS[name]], self.encoder.describe()["spatial_dims"]
        self.scales[name] = Scale(channels, book, orthogonal=not trained, dims=dims)
        roles = {"projection": Role.PARAMETER, "quantizer": Role.CODEBOOK}
        self.claims = {**self.claims, **{f"scales.{name}.{part}": Claim(role) for part, role in roles.items()}}
        if not trained:
            self.freeze(f"scales.{name}.projection")

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Terms "continuous" and "discrete" in [0, 4] and "commitment" (β Σ, without λ), and monitors of the batch.

        Monitors: "std" as in BYOL, and for each scale the perplexity of the codes that the batch used.
        """
        del progress, labels  # the momentum is scheduled in after_step; nothing is supervised
        images = stacked(views)
        p, (z, maps) = self.of_views(views, self.predictions), self.target_branch(images)
        found = self._quantized(maps)
        targets = {"continuous": z} if self.continuous else {}
        if found:
            targets["discrete"] = self.serf(z, self._codes(found, maps))
        terms = {name: regression(p, other_view(target)) for name, target in targets.items()}
        total = torch.stack(list(terms.values())).mean()
        if found:
            terms["commitment"] = self.beta * torch.stack([one.commitment for one in found.values()]).sum()
            total = total + self.commitment * terms["commitment"]
        monitors = {f"perplexity_{name}": self._batch_perplexity(name, one) for name, one in found.items()}
        told = {**terms, **monitors, "std": spread(p)}
        return {"total": total, **{name: value.detach() for name, value in told.items()}}

    def after_step(self, progress: float) -> None:
        """Move the target network, then each codebook by the tokens of both views in the step's training forwards."""
        super().after_step(progress)
        for scale in self._each().values():
            seen = [(tokens, indices) for book, tokens, indices in self._seen if book is scale.quantizer]
            if seen:
                tokens, indices = (torch.cat(parts) for parts in zip(*seen, strict=True))
                scale.quantizer.update(tokens, indices)
        self._seen = []

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) as in BYOL; each quantizer sees the tokens of `images` through the target network."""
        features = super().observe(images, progress)
        if self.scales:
            self._quantized(self.target_encoder.maps(images))
        return features

    def _each(self) -> dict[str, Scale]:
        return {name: scale for name, scale in self.scales.items() if isinstance(scale, Scale)}

    def _quantized(self, maps: list[Tensor]) -> dict[str, Quantized]:
        """Codes by scale; in training, what `after_step` needs is kept."""
        found: dict[str, Quantized] = {}
        for name, scale in self._each().items():
            tokens, found[name] = scale(maps[LAYERS[name]])
            if self.training and torch.is_grad_enabled() and not self.alone:
                self._seen.append((scale.quantizer, tokens.detach(), found[name].indices))
        return found

    def _codes(self, found: dict[str, Quantized], maps: list[Tensor]) -> Tensor:
        """What SERF reads (B, N, D): the mean code of each scale, or all codes fused on the medium grid."""
        if self.serf.mode == "scales":
            return torch.stack([one.codes.mean(1) for one in found.values()], dim=1)
        spatial = []
        for name, one in found.items():
            channels = one.codes.mT  # (B, D, N)
            spatial.append(channels.reshape(*channels.shape[:2], *maps[LAYERS[name]].shape[2:]))
        return fused(spatial, self._fusion_weights(), maps[LAYERS["medium"]].shape[2:])

    def _fusion_weights(self) -> Tensor:
        """(scales,), of sum 1; a softmax of entropies in nats is each perplexity's share in their sum."""
        usage = torch.stack([perplexity(scale.quantizer.counts) for scale in self._each().values()])
        shares = usage.clamp_min(1) if self.fusion == "entropy" else torch.ones_like(usage)
        return shares / shares.sum()

    def _batch_perplexity(self, name: str, found: Quantized) -> Tensor:
        indices = found.indices.flatten()
        counts = torch.zeros_like(self._each()[name].quantizer.counts)
        return perplexity(counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype)))


def codes_for(tokens: int, images: int) -> int:
    """K = min(2048, 2^⌊log2(tokens · images / 30)⌋): no more codes than an epoch can fill.

    Args:
        tokens: per image.
        images: of the whole federation.

    Raises:
        ConfigError: too few for two codes.
    """
    filled = tokens * images // TOKENS_PER_CODE
    if filled < 2:
        raise ConfigError(
            f"method.codes=auto: got method.images={images} with {tokens} tokens each, too few for two codes. "
            "Set method.images to the number of training images of the whole federation, or give method.codes."
        )
    return int(min(MOST_CODES, 2 ** (filled.bit_length() - 1)))


def _sizes(encoder: ResNet, scales: list[str], codes: int | list[int] | str, images: int) -> list[tuple[int, int]]:
    """Tokens per image and number of codes, for each scale."""
    dims = encoder.describe()["spatial_dims"]
    tokens = [encoder.map_sides[LAYERS[name]] ** dims for name in scales]
    if codes == "auto":
        return [(one, codes_for(one, images)) for one in tokens]
    sizes = [codes] * len(scales) if isinstance(codes, int) else codes
    if isinstance(sizes, str) or len(sizes) != len(scales):
        raise ConfigError(f"method.codes: got {codes!r}, need a number, a list with one for each of {scales}, or auto.")
    return list(zip(tokens, sizes, strict=True))


def _refuse_targets(target: str, serf: str, head: str, *, residual: bool) -> None:
    """ConfigError for targets that do not exist or do not fit."""
    one_of("method.target", target, ("both", "continuous", "discrete"))
    one_of("method.serf", serf, (*MODES, "none"))
    one_of("method.serf_head", head, ("fixed", "trained", "identity"))
    if target == "discrete" and serf == "none":
        raise ConfigError("method.target=discrete with method.serf=none: no target is left. Choose another serf.")
    if serf == "concat" and (residual or head == "identity"):
        raise ConfigError(
            "method.serf=concat gives (q, z), twice as wide as z: it needs a head and takes no residual. "
            "Set method.serf_head=fixed and method.serf_residual=false."
        )


def _refuse_codes(scales: list[str], fusion: str, vq_proj: str, *, weights: tuple[float, float]) -> None:
    """ConfigError for scales, fusions and weights outside of what there is."""
    one_of("method.fusion", fusion, ("fixed", "entropy"))
    one_of("method.vq_proj", vq_proj, ("trained", "frozen_orthogonal"))
    if not scales or len(set(scales)) != len(scales) or not set(scales) <= LAYERS.keys():
        raise ConfigError(f"method.scales: got {scales}, need one or more of {', '.join(LAYERS)}, each once.")
    if not min(weights) >= 0:
        raise ConfigError("method.beta={}, method.commitment={}: need both 0 or more.".format(*weights))
