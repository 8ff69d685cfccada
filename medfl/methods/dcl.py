"""DCL: MoCo with a consistency term on its negatives, and a local stream as in SimSiam (DCL-CsTP).

L = L_NCE + α L_KL + β L_CS

The global stream is a query v1 against the key of v2 and the queue; the local stream compares v2 and v3 crosswise.
"""

import torch
from torch import Tensor

from medfl.errors import ConfigError, one_of
from medfl.methods.contrast import crosswise, info_nce, standardized, symmetric_kl, unit
from medfl.methods.moco import MoCo, refuse_views, spread_of
from medfl.models.encoders import ResNet
from medfl.models.layers import pooled
from medfl.models.queue import Queue

TARGETS = ("encoder_bn", "encoder", "projection")


class DCL(MoCo):
    """Global and local stream of one query network; all its views pass through it together, as one batch.

    With use_local=False and use_kl=False the method is MoCo bit for bit. With use_global=False key network and queue
    are there but unused.

    Args:
        encoder, head, tokens, heads, width, capacity, temperature, momentum, split: as in MoCo.
        alpha, beta: α and β, at least 0.
        use_global: the query against its key and the queue, L_NCE.
        use_kl: equal similarities of query and key to the negatives, L_KL; only together with use_global.
        use_local: the two last views predict each other, L_CS.
        local_target: encoder_bn (pooled features standardised per channel over both views) | encoder (pooled
            features, whose common mean draws all predictions one way) | projection (of the head).

    Raises:
        ConfigError: switches outside of the above or against each other.
    """

    def __init__(
        self,
        *,
        encoder: ResNet,
        head: str,
        tokens: int | None,
        heads: int,
        width: int | None,
        capacity: int,
        temperature: float,
        momentum: float,
        split: int,
        alpha: float,
        beta: float,
        use_global: bool,
        use_kl: bool,
        use_local: bool,
        local_target: str,
    ) -> None:
        super().__init__(
            encoder=encoder, head=head, tokens=tokens, heads=heads, width=width, capacity=capacity,
            temperature=temperature, momentum=momentum, split=split,
        )  # fmt: skip
        one_of("method.local_target", local_target, TARGETS)
        if not (use_global or use_local):
            raise ConfigError("method.use_global=false with method.use_local=false: no loss is left. Switch one on.")
        if not min(alpha, beta) >= 0:
            raise ConfigError(f"method.alpha={alpha}, method.beta={beta}: need both 0 or more.")
        if use_local and local_target != "projection" and width not in (None, encoder.width):
            raise ConfigError(
                f"method.local_target={local_target} is as wide as the encoder, {encoder.width}: got method.width="
                f"{width}. Set method.width=null, or method.local_target=projection."
            )
        self.weights = {"nce": 1.0, "kl": alpha, "local": beta}
        self.use_global, self.use_kl, self.use_local = use_global, use_kl, use_local
        self.local_target, self.views = local_target, 3 if use_global and use_local else 2

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None, patients: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms "nce", "kl" and "local", before α and β, and the monitors of MoCo; only those of the used streams.

        Views: query and key of the global stream, and of the local stream the last two.
        """
        del progress, labels  # the momentum is constant; nothing is supervised
        refuse_views(views, self.views)
        images, batch = torch.cat(self._queried(views)), len(views[0])
        maps = self.encoder.maps(images)[3]
        rows = self.head(maps)
        monitors = spread_of(rows[:batch])
        terms: dict[str, Tensor] = {}
        if self.use_global:
            monitors |= self.queue.monitors()
            terms |= self._global_terms(unit(rows[:batch]), self.contrasted(views[1], patients))
        if self.use_local:
            found = self._local_targets(maps[-2 * batch :], rows[-2 * batch :])
            terms["local"] = crosswise(*rows[-2 * batch :].chunk(2), *found.chunk(2))
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"total": total, **{name: value.detach() for name, value in (terms | monitors).items()}}

    def queues(self) -> dict[str, Queue]:
        """The queue; none where the local stream is alone, which would fill it for nothing."""
        return super().queues() if self.use_global else {}

    def _queried(self, views: list[Tensor]) -> list[Tensor]:
        return (views[:1] if self.use_global else []) + (views[-2:] if self.use_local else [])

    def _global_terms(self, q: Tensor, contrasted: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        losses = {"nce": info_nce, "kl": symmetric_kl} if self.use_kl else {"nce": info_nce}
        return {name: loss(q, *contrasted, temperature=self.temperature) for name, loss in losses.items()}

    def _local_targets(self, maps: Tensor, rows: Tensor) -> Tensor:
        """What the local stream predicts (2B, D), of the maps and the projections of its two views."""
        if self.local_target == "projection":
            return rows
        return standardized(pooled(maps)) if self.local_target == "encoder_bn" else pooled(maps)
