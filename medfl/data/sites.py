"""Who holds what: one data set divided among sites by patient, each with its scanner, its labels and its size."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medfl.data import profiles, scanner
from medfl.data.allocation import Minima, allocate, shares, sizes
from medfl.data.calibration import Calibration
from medfl.data.sample import (
    SPLITS,
    Records,
    SiteData,
    Split,
    choose,
    class_counts,
    join,
    labelled,
    named,
    number,
    present,
    require,
    whole,
)
from medfl.data.splits import check_patients, complete, label_of_patient
from medfl.errors import ConfigError, DataError
from medfl.names import ARMS
from medfl.seeding import key

NATURAL = "natural"


@dataclass(frozen=True, kw_only=True)
class Sites:
    """A federation of hospitals, simulated with independent knobs, or found in a column of the data.

    Args:
        natural: take the sites that the data name; `count`, `alpha` and `quantity` must be null then.
        count: simulated sites that train.
        alpha: Dirichlet concentration of each class over sites; null: equal labels everywhere.
        quantity: sizes of the sites: null (equal) | lognormal | power.
        spread: SD of the log size, or the exponent of the power law.
        severity: of the scanner profiles; 0: none.
        profiles: letters of scanner profiles, given to the sites in turn.
        held_out: simulated: profile of one more site that never trains; natural: the name of such a site;
            null: none.
        min_images: least training images of a site.
        min_class: least patients of each class per site and split, where the data have enough.
        modalities: simulated: lists of names, given to the sites in turn: all that a site has of each scan; null:
            everything.

    Raises:
        ConfigError: a setting that cannot be used, or two that exclude each other.
    """

    natural: bool
    count: int | None
    alpha: float | None
    quantity: str | None
    spread: float
    severity: float
    profiles: Sequence[str]
    held_out: str | None
    min_images: int
    min_class: int
    modalities: Sequence[Sequence[str]] | None

    def __post_init__(self) -> None:
        count_ok = self.count is None if self.natural else whole(self.count)
        law_ok = self.quantity in (None, "lognormal", "power") and not (self.natural and self.quantity)
        alpha_ok = self.alpha is None or (number(self.alpha, 1e-6) and not self.natural)
        lists = self.modalities
        lists_ok = lists is None or (not self.natural and bool(lists) and all(one and named(one) for one in lists))
        simulated = "null, as the data name their sites" if self.natural else ""
        require(
            "sites",
            {
                "count": (self.count, count_ok, simulated or "an integer of at least 1"),
                "alpha": (self.alpha, alpha_ok, simulated or "a number above 0, or null"),
                "quantity": (self.quantity, law_ok, simulated or "lognormal, power or null"),
                "spread": (self.spread, number(self.spread), "a number of at least 0"),
                "severity": (self.severity, number(self.severity), "a number of at least 0"),
                "profiles": (self.profiles, len(self.profiles) > 0, "a list of letters such as [A, B]"),
                "min_images": (self.min_images, whole(self.min_images), "an integer of at least 1"),
                "min_class": (self.min_class, whole(self.min_class, 0), "an integer of at least 0"),
                "modalities": (lists, lists_ok, simulated or "lists of names such as [[flair, t2], [t1]], or null"),
            },
        )

    def partition(self, records: Records, seed: int) -> tuple[SiteData, ...]:
        """The sites, each with train, val and test; a pure function of (records, seed).

        Given splits are kept; others are assigned by patient, stratified by label (and natural site).

        Raises:
            DataError: too few images or patients, no natural sites, or patients in several splits.
            ConfigError: a scanner profile, a modality or a held-out site that these data do not have.
        """
        self._check_modalities(records.modalities)
        check_patients(records.patients, records.splits)
        if self.natural:
            self._check_natural(records)
        labels = label_of_patient(records.patients, records.labels.tolist())
        splits = complete(records, labels, seed, by_site=self.natural)
        places = (records.sites if self.natural else None) or self._simulated(records, labels, splits, seed)
        samples = sample_keys(records.patients)
        rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: {split: [] for split in SPLITS})
        for row, (place, split) in enumerate(zip(places, splits, strict=True)):
            rows[place][split].append(row)
        names = sorted(rows) if self.natural else [f"site-{n + 1}" for n in range(self._all_sites)]
        self._check_sizes({name: {split: len(found) for split, found in rows[name].items()} for name in names})
        return tuple(self._site(records, name, rows[name], samples, seed) for name in names)

    @property
    def _all_sites(self) -> int:
        return int(self.count or 0) + (self.held_out is not None)

    def _check_modalities(self, known: Sequence[str]) -> None:
        if known and self.severity:
            raise ConfigError(
                f"sites.severity: got {self.severity}, need 0: scanner profiles are for images of one contrast, "
                f"and these data have {', '.join(known)}. Choose sites=iid or sites=modalities."
            )
        if strange := [name for one in self.modalities or () for name in one if name not in known]:
            need = f"need names from {', '.join(known)}" if known else "and the data name no modalities"
            raise ConfigError(f"sites.modalities: got {strange[0]!r}, {need}. Change it, or set it to null.")

    def _check_natural(self, records: Records) -> None:
        if records.sites is None:
            raise DataError("sites=natural: the data name no sites. Set data.site to the column, or choose sites=iid.")
        known = sorted(set(records.sites))
        if taken := [name for name in ARMS if name in known]:
            raise DataError(
                f"sites=natural: got a site {taken[0]!r}, need other names than {', '.join(ARMS)}: arms are called so. "
                "Rename it in the column of data.site."
            )
        if self.held_out is not None and self.held_out not in known:
            raise ConfigError(f"sites.held_out: got {self.held_out!r}, need one of {', '.join(known)}, or null.")

    def _simulated(self, records: Records, labels: dict[str, int], splits: Sequence[str], seed: int) -> Sequence[str]:
        count, images = self._all_sites, Counter(records.patients)
        train = sum(split == "train" for split in splits)
        if train < count * self.min_images or len(images) < 3 * count:
            raise DataError(
                f"got {train} training images of {len(images)} patients for {count} sites, "
                f"need {self.min_images} images for each ({count * self.min_images}). "
                "Lower sites.count or sites.min_images."
            )
        cells: dict[tuple[str, int], list[str]] = defaultdict(list)
        for patient, split in dict(zip(records.patients, splits, strict=True)).items():
            cells[split, labels[patient]].append(patient)
        spread = sizes(count, self.quantity, self.spread, seed)
        members = Counter(labels.values())
        totals = [members[label] for label in (*range(len(records.classes)), -1)]
        table = shares(totals, spread, self.alpha, seed)
        found = allocate(cells, images, table, Minima(self.min_images, self.min_class), seed)
        return [f"site-{found[patient] + 1}" for patient in records.patients]

    def _check_sizes(self, counts: dict[str, dict[str, int]]) -> None:
        for name, count in counts.items():
            if count["train"] < self.min_images or not count["val"] or not count["test"]:
                got = ", ".join(f"{count[split]} {split}" for split in SPLITS)
                cure = "leave the site out of the data list"
                if not self.natural:
                    cure = "lower sites.count, raise sites.alpha or set sites.quantity=null"
                raise DataError(
                    f"site {name!r}: got {got} images, need at least {self.min_images} train, 1 val and "
                    f"1 test. Lower sites.min_images, or {cure}."
                )

    def _profile(self, name: str) -> tuple[str, bool]:
        """(profile letter or "natural", whether the site is held out)."""
        if self.natural:
            letters = sorted(self.profiles)
            chosen = letters[key(name) % len(letters)] if self.severity else NATURAL
            return chosen, name == self.held_out
        number = int(name.removeprefix("site-")) - 1
        if number == self.count:
            return str(self.held_out), True
        return (self.profiles[number % len(self.profiles)] if self.severity else "A"), False

    def _site(
        self, records: Records, name: str, rows: dict[str, list[int]], samples: Sequence[int], seed: int
    ) -> SiteData:
        profile, held_out = self._profile(name)

        def split(which: str) -> Split:
            part = choose(records, rows[which])
            if self.modalities is not None:
                return _keep(part, self._modalities(name), records.modalities, name)
            if profile == NATURAL:
                return part
            keys, machine = [samples[row] for row in rows[which]], key(seed, "scanner", name)
            images, masks = scanner.scan(part.images, profile, self.severity, site=machine, samples=keys), part.masks
            if masks is not None:
                masks = scanner.follow(masks, profile, self.severity, site=machine, samples=keys)
            return replace(part, images=images, masks=masks)

        return SiteData(
            name=name,
            train=split("train"),
            val=split("val"),
            test=split("test"),
            classes=records.classes,
            spacing=records.spacing,
            profile=profile,
            held_out=held_out,
            modalities=records.modalities,
            regions=records.regions,
        )

    def _modalities(self, name: str) -> Sequence[str]:
        lists = self.modalities or ()
        return lists[(int(name.removeprefix("site-")) - 1) % len(lists)]


def _keep(part: Split, kept: Sequence[str], known: Sequence[str], site: str) -> Split:
    """The split with the other modalities zeroed.

    Raises:
        DataError: an image of which nothing is left.
    """
    images = part.images.clone()
    images[:, [name not in kept for name in known]] = 0
    if empty := int((~present(images).any(1)).sum()):
        raise DataError(
            f"site {site!r}: {empty} of {len(images)} images have none of {', '.join(kept)}, the modalities that "
            "sites.modalities leaves this site. Add a name to its list, or leave such subjects out of the data."
        )
    return replace(part, images=images)


def sample_keys(patients: Sequence[str]) -> list[int]:
    """A key for every image that does not depend on the other patients: its patient and its number among theirs."""
    seen: Counter[str] = Counter()
    keys = []
    for patient in patients:
        keys.append(key(patient, seen[patient]))
        seen[patient] += 1
    return keys


def pool(sites: Sequence[SiteData]) -> SiteData:
    """All sites that train as one, named "central", with the same splits."""
    members = [site for site in sites if not site.held_out]
    if not members:
        raise ValueError("pool: got no site that trains.")
    return SiteData(
        name="central",
        train=join([site.train for site in members]),
        val=join([site.val for site in members]),
        test=join([site.test for site in members]),
        classes=members[0].classes,
        spacing=members[0].spacing,
        profile="+".join(sorted({site.profile for site in members})),
        held_out=False,
        modalities=members[0].modalities,
        regions=members[0].regions,
    )


def describe(sites: Sequence[SiteData], calibration: Calibration | None) -> dict[str, Any]:
    """What sites.json holds: counts only, never an id."""
    rows = [
        {
            "name": site.name,
            **{split: len(getattr(site, split)) for split in SPLITS},
            "classes": class_counts(site),
            "profile": profiles.title(site.profile, len(site.spacing)),
            "held_out": site.held_out,
            **_holdings(site),
        }
        for site in sites
    ]
    return {"sites": rows, "calibration": asdict(calibration) if calibration else {}}


def _holdings(site: SiteData) -> dict[str, Any]:
    """How many training images have each modality, a known mask, and something of each region; {} without both."""
    found: dict[str, Any] = {}
    if site.modalities:
        counts = present(site.train.images).sum(0).tolist()
        found["modalities"] = dict(zip(site.modalities, counts, strict=True))
    if site.modalities or site.regions:
        masks = site.train.masks
        drawn = torch.empty(0, 1) if masks is None else masks[labelled(masks)].flatten(1)
        found["labelled"] = len(drawn)
        found["regions"] = {name: int(_holding(drawn, labels).sum()) for name, labels in site.regions.items()}
    return found


def _holding(masks: Tensor, labels: Sequence[int]) -> Tensor:
    """Which masks (n, P) have a voxel of these labels, (n,)."""
    return torch.stack([(masks == label).any(1) for label in labels]).any(0)
