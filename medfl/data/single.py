"""A real site: everything in its own data list, under its own name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medfl.data.sample import Records, SiteData
from medfl.data.sites import Sites


@dataclass(frozen=True, kw_only=True)
class Single:
    """All records as one site; splits that are not given are assigned as those of a natural site are.

    Args:
        name: of the site.
        held_out: it is evaluated, but never trains.
        min_images: least training images.
    """

    name: str
    held_out: bool
    min_images: int

    def partition(self, records: Records, seed: int) -> Sequence[SiteData]:
        """One site.

        Raises:
            DataError: too few images, or patients in several splits.
        """
        sites = Sites(
            natural=True, count=None, alpha=None, quantity=None, spread=0.0, severity=0.0, profiles=["A"],
            held_out=self.name if self.held_out else None, min_images=self.min_images, min_class=0, modalities=None,
        )  # fmt: skip
        return sites.partition(replace(records, sites=(self.name,) * len(records.patients)), seed)
