"""Sites: every patient in one place, minima kept, scanners pure; the presets do what their names say."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl import config
from medfl.data import findings, scanner
from medfl.data.brain import Brain
from medfl.data.calibration import calibration, statistics
from medfl.data.phantom import Phantom
from medfl.data.sample import UNLABELLED, Records, SiteData, choose, present
from medfl.data.sites import Sites, describe, pool
from medfl.errors import ConfigError, DataError
from medfl.names import ARMS
from tests.shared_data import shared

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRESETS = sorted({path.stem for path in (CONFIGS / "sites").glob("*.yaml")} - {"modalities"})  # that has its own tests


def node(group: str, name: str, /, **changes: Any) -> dict[str, Any]:
    arguments = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    return {key: value for key, value in arguments.items() if key != "_target_"} | changes


def preset(name: str, /, **changes: Any) -> Sites:
    chosen = {key: value for key, value in config.compose([f"sites={name}"]).sites.items() if key != "_target_"}
    return Sites(**(chosen | changes))


@pytest.fixture(scope="module")
def records() -> Records:
    loaded = Phantom(**node("data", "phantom", seed=0, count=800, size=16)).load()
    towns = tuple(["north", "south", "east"][int(patient[-3:]) % 3] for patient in loaded.patients)
    return replace(loaded, sites=towns)


def bare(patients: list[str], labels: list[int], splits: list[str] | None = None) -> Records:
    """Records without content: image i is filled with the value i."""
    count = len(patients)
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 1, 8, 8).clone()
    given_splits = tuple(splits or [""] * count)
    target = torch.tensor(labels, dtype=torch.int64)
    return Records(images, target, tuple(patients), given_splits, None, ("no", "yes"), (1.0, 1.0), None)


def ids(site: SiteData) -> dict[str, list[int]]:
    """The image numbers that `bare` wrote into the pixels, per split."""
    return {
        split: sorted(int(value) for value in getattr(site, split).images[:, 0, 0, 0])
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_function_of_the_seed_and_leaks_no_patient(name: str, records: Records) -> None:
    sites = preset(name).partition(records, seed=3)
    again = preset(name).partition(records, seed=3)
    place = defaultdict(set)
    for site, copy in zip(sites, again, strict=True):
        for split in ("train", "val", "test"):
            part = getattr(site, split)
            torch.testing.assert_close(part.images, getattr(copy, split).images, rtol=0, atol=0)
            assert len(part) == len(part.patients) == len(part.labels) > 0
            assert part.images.abs().max() <= 1
            assert set(part.labels.tolist()) == {0, 1}
            for patient in part.patients:
                place[patient].add((site.name, split))
        assert len(site.train) >= 8
    assert sum(len(getattr(s, k)) for s in sites for k in ("train", "val", "test")) == len(records)
    assert all(len(found) == 1 for found in place.values())
    assert [site.held_out for site in sites] == [False] * (len(sites) - 1) + [name == "unseen"]


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.tuples(st.integers(0, 60), st.integers(-1, 1)), min_size=80, max_size=250),
    alpha=st.sampled_from([None, 0.1, 1.0]),
    quantity=st.sampled_from([None, "lognormal", "power"]),
    seed=st.integers(0, 9),
)
def test_no_patient_is_in_two_splits_or_sites(
    owners: list[tuple[int, int]], alpha: float | None, quantity: str | None, seed: int
) -> None:
    data = bare([f"p{owner}" for owner, _ in owners], [label for _, label in owners])
    scheme = preset("iid", count=3, alpha=alpha, quantity=quantity, min_images=1)
    try:
        sites = scheme.partition(data, seed)
    except DataError as error:  # few patients with many images each: refused, never repaired silently
        assert "need" in str(error) or "have no" in str(error)  # noqa: PT017
        return
    cells = {(site.name, split): rows for site in sites for split, rows in ids(site).items()}
    assert sorted(row for rows in cells.values() for row in rows) == list(range(len(owners)))
    people = [{owners[row][0] for row in rows} for rows in cells.values()]
    assert sum(map(len, people)) == len(set.union(*people))


@settings(max_examples=40, deadline=None)
@given(alpha=st.sampled_from([0.05, 0.1, 0.5, 100.0]), seed=st.integers(0, 10_000), sites=st.integers(2, 6))
def test_dirichlet_keeps_minima_and_sizes(alpha: float, seed: int, sites: int) -> None:
    labels = [int(index % 4 == 0) for index in range(600)]
    parts = preset("label", count=sites, alpha=alpha).partition(bare([f"p{i}" for i in range(600)], labels), seed)
    for site in parts:
        assert len(site.train) >= 32
        assert min(site.train.labels.bincount(minlength=2)) >= 3
        assert min(site.test.labels.bincount(minlength=2)) >= 3
    sizes = torch.tensor([float(len(site.train)) for site in parts])
    assert sizes.max() <= 1.35 * sizes.min()  # label skew is not quantity skew


def test_alpha_and_quantity_have_their_effect() -> None:
    data = bare([f"p{i}" for i in range(2000)], [i % 2 for i in range(2000)])
    variation = [
        np.mean(
            [calibration(preset("label", alpha=alpha).partition(data, seed), 0).label_variation for seed in range(3)]
        )
        for alpha in (100.0, 1.0, 0.1)
    ]
    assert variation[0] < 0.1 < variation[1] < variation[2]
    power = preset("quantity", quantity="power").partition(data, 0)
    sizes = sorted((len(site.train) for site in power), reverse=True)
    assert sizes == pytest.approx([1400 / 25 * 12 / rank for rank in (1, 2, 3, 4)], rel=0.02)


def test_given_splits_are_kept_and_order_does_not_matter() -> None:
    patients = [f"p{i // 2}" for i in range(300)]
    splits = ["train" if i < 200 else "val" if i < 240 else "test" for i in range(300)]
    labels = [i % 4 // 2 for i in range(300)]
    sites = preset("hospital", severity=0, count=3).partition(bare(patients, labels, splits), 0)
    kept = [ids(site) for site in sites]
    assert all(splits[row] == split for site in kept for split, rows in site.items() for row in rows)
    flipped = bare(patients[::-1], labels[::-1], splits[::-1])
    other = preset("hospital", severity=0, count=3).partition(flipped, 0)
    assert [{k: sorted(299 - row for row in rows) for k, rows in ids(site).items()} for site in other] == kept


def test_natural_sites_spread_rare_labels_over_the_splits() -> None:
    rows = [("a", 1, f"a{i}") for i in range(2)] + [("a", 0, f"a{i}") for i in range(2, 20)]
    rows += [("b", i % 2, f"b{i}") for i in range(20)]
    data = replace(bare([row[2] for row in rows], [row[1] for row in rows]), sites=tuple(row[0] for row in rows))
    for seed in range(5):
        sites = preset("natural").partition(data, seed)
        assert [site.name for site in sites] == ["a", "b"]
        assert all(set(part.labels.tolist()) == {0, 1} for site in sites for part in (site.train, site.test))
    held = preset("natural", held_out="b").partition(data, 0)
    assert [site.held_out for site in held] == [False, True]
    assert [site.profile for site in held] == ["natural", "natural"]


def test_real_hospitals_all_have_both_sexes_in_train_and_test() -> None:
    from medfl.data.folder import Folder

    root = shared("covid_cxr/metadata.csv").parent
    columns = {"image": "file", "label": "sex", "patient": "patientid", "site": "site", "datalist": "metadata.csv"}
    data = Folder(**node("data", "folder", root=str(root), size=16, **columns)).load()
    sites = preset("natural").partition(data, 0)
    assert [site.name for site in sites] == ["australia", "hannover_de", "italy", "other", "uk"]
    for site in sites:
        assert all({0, 1} <= set(part.labels.tolist()) for part in (site.train, site.test))
    found = calibration(sites, 0)
    assert found.site_accuracy > 1.5 * found.chance


# scanner

LETTERS = [(2, letter) for letter in "BCDEGU"] + [(3, letter) for letter in "BCDEGU"]


def scans(dims: int, count: int = 12, **changes: Any) -> torch.Tensor:
    source = Phantom(**node("data", "phantom", seed=1, spatial_dims=dims, size=16, count=count, **changes))
    return source.load().images


@pytest.mark.parametrize(("dims", "letter"), LETTERS)
def test_a_profile_is_pure_in_range_and_visible(dims: int, letter: str) -> None:
    images = scans(dims)
    before, samples = images.clone(), list(range(12))
    seen = scanner.scan(images, letter, 3, site=5, samples=samples)
    assert torch.equal(images, before)
    assert seen.shape == images.shape
    assert seen.abs().max() <= 1
    assert bool(torch.isfinite(seen).all())
    part = scanner.scan(images[[7, 2]], letter, 3, site=5, samples=[7, 2])  # whatever else is in the batch
    torch.testing.assert_close(part, seen[[7, 2]], rtol=0, atol=1e-5)
    assert not torch.equal(scanner.scan(images, letter, 3, site=6, samples=samples), seen)
    assert torch.equal(scanner.scan(images, letter, 0, site=5, samples=samples), images)
    changes = [
        (scanner.scan(images, letter, severity, site=5, samples=samples) - images).abs().mean()
        for severity in (1, 3, 5)
    ]
    assert 1e-4 < changes[0] < changes[1] < changes[2]
    spread = statistics(images).std(0) + 1e-6
    assert ((statistics(seen) - statistics(images)).mean(0).abs() / spread).max() > 0.3


def test_profiles_do_what_their_names_say() -> None:
    images = scans(2, 40)

    def sharpness(pixels: torch.Tensor) -> float:
        return float(pixels.diff(dim=-1).abs().mean())

    blurred = scanner.scan(images, "D", 4, site=1, samples=range(40))
    noisy = scanner.scan(images, "C", 4, site=1, samples=range(40))
    assert sharpness(blurred) < 0.8 * sharpness(images) < 0.8 * sharpness(noisy)
    torch.testing.assert_close(blurred.mean(), images.mean(), atol=0.02, rtol=0)
    shaded = scanner.scan(torch.zeros(4, 1, 16, 16), "E", 4, site=1, samples=range(4))[0, 0]
    assert shaded.std() > 0.02
    assert shaded.diff().diff().abs().max() < 0.1  # smooth
    solid = torch.rand(12, 1, 16, 16, 16) * 2 - 1
    thick = scanner.scan(solid, "D", 4, site=1, samples=range(12))
    loss = sorted(float(thick.diff(dim=axis).abs().mean() / solid.diff(dim=axis).abs().mean()) for axis in (2, 3, 4))
    assert loss[0] < 0.7 * loss[1]  # along one axis
    colour = scans(2, channels=3)
    stained = scanner.scan(colour, "F", 3, site=1, samples=range(12))
    assert (stained - colour).abs().mean() > 0.02


def test_profiles_that_do_not_exist_are_refused(records: Records) -> None:
    with pytest.raises(ConfigError, match=r"got 'Z', need letters of A, B, C, D, E, F, G, U in 2D"):
        preset("scanner", profiles=["Z"]).partition(records, 0)
    with pytest.raises(ConfigError, match="'F' needs colour images"):
        preset("scanner", profiles=["A", "F"]).partition(records, 0)
    with pytest.raises(ValueError, match="2 images and 1 sample keys"):
        scanner.scan(torch.zeros(2, 1, 8, 8), "B", 1, site=0, samples=[1])


def test_a_sites_scanner_depends_on_no_other_site(records: Records) -> None:
    whole = preset("natural", severity=3, profiles=["B", "C", "E"]).partition(records, 0)
    rows = [row for row, town in enumerate(records.sites or ()) if town != "south"]
    fewer = replace(
        records,
        images=records.images[rows],
        labels=records.labels[rows],
        patients=tuple(records.patients[row] for row in rows),
        splits=("",) * len(rows),
        sites=tuple((records.sites or ())[row] for row in rows),
        masks=None,
        regions={},
    )
    others = [site for site in whole if site.name != "south"]
    for site, same in zip(
        others, preset("natural", severity=3, profiles=["B", "C", "E"]).partition(fewer, 0), strict=True
    ):
        assert (site.name, site.profile) == (same.name, same.profile)
        torch.testing.assert_close(site.train.images, same.train.images, rtol=0, atol=1e-5)


def bumps(dims: int, size: int = 24) -> Records:
    """80 patients with a smooth bump each, whose label map is `drawn` of the image; the first mask is not known."""
    draw = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size)] * dims, indexing="ij")
    centres = torch.rand(80, dims, generator=draw) - 0.5
    squares = sum((axis - centres[:, k].view(-1, *[1] * dims)) ** 2 for k, axis in enumerate(axes))
    images = 2 * torch.exp(-torch.as_tensor(squares) / 0.15)[:, None] - 1
    masks = drawn(images)
    masks[0] = UNLABELLED
    return Records(
        images, torch.full((80,), -1), tuple(f"p{i}" for i in range(80)), ("",) * 80, None, (), (1.0,) * dims, masks,
        regions={"rim": (1,), "core": (2,)},
    )  # fmt: skip


def drawn(images: torch.Tensor) -> torch.Tensor:
    return ((images[:, 0] > -0.4).byte() + (images[:, 0] > 0.4)).byte()


@pytest.mark.parametrize("dims", [2, 3])
def test_masks_stay_with_their_images_and_follow_the_field_of_view(dims: int) -> None:
    records = bumps(dims)
    sites = preset("scanner", count=2, profiles=["A", "G"], severity=5, min_images=8).partition(records, 0)
    unknown = 0
    for site in (*sites, pool(sites)):
        assert site.regions == records.regions
        for split in (site.train, site.val, site.test):
            assert split.masks is not None
            known = (split.masks != UNLABELLED).flatten(1).all(1)
            unknown += int((~known).sum())
            assert bool((split.masks[~known] == UNLABELLED).all())
            expected = drawn(split.images[known])
            same = (split.masks[known] == expected).float().mean()
            assert same == 1 if site.profile == "A" else same > 0.985
    assert unknown == 2  # at its site, and among all
    moved = sites[1].train
    still = choose(records, [records.patients.index(patient) for patient in moved.patients])
    assert still.masks is not None
    assert moved.masks is not None
    known = (moved.masks != UNLABELLED).flatten(1).all(1)
    wrong = [(masks[known] != drawn(moved.images[known])).float().mean().item() for masks in (still.masks, moved.masks)]
    assert wrong[0] > 4 * wrong[1]
    rows = describe(sites, None)["sites"]
    assert [row["labelled"] for row in rows] == [
        sum(not bool((mask == UNLABELLED).all()) for mask in site.train.masks) for site in sites
    ]
    assert rows[0]["regions"] == {"rim": rows[0]["labelled"], "core": rows[0]["labelled"]}


# modalities


@pytest.fixture(scope="module")
def heads() -> Records:
    return Brain(**node("data", "brain", seed=0, size=16, count=240, unlabelled=0.5)).load()


def test_every_site_keeps_its_own_modalities_and_says_so(heads: Records) -> None:
    scheme, lists = preset("modalities", held_out="U"), preset("modalities").modalities
    assert lists is not None
    sites = scheme.partition(heads, seed=0)
    assert len(sites) == 5
    whole = dict(zip(heads.patients, heads.images, strict=True))
    for number, site in enumerate(sites):
        kept = [name in lists[number % 4] for name in heads.modalities]
        assert site.modalities == heads.modalities
        for split in (site.train, site.val, site.test):
            assert torch.equal(present(split.images), torch.tensor(kept).expand(len(split), 4))
            for patient, image in zip(split.patients, split.images, strict=True):
                assert torch.equal(image[kept], whole[patient][kept])
    assert bool(present(heads.images).all())  # the records are as they were
    central = pool(sites)
    assert central.modalities == heads.modalities
    rows = describe(sites, calibration(sites, 0))["sites"]
    assert rows[1]["modalities"] == {"flair": rows[1]["train"], "t1ce": 0, "t1": 0, "t2": rows[1]["train"]}
    masks = sites[1].train.masks
    assert masks is not None
    assert rows[1]["labelled"] == sum(not bool((mask == UNLABELLED).all()) for mask in masks)
    assert 0 < rows[1]["labelled"] < rows[1]["train"]


def test_images_of_one_contrast_have_no_row_of_modalities_and_none_of_masks_without_them(records: Records) -> None:
    sites = preset("iid").partition(records, 0)
    assert sites[0].modalities == ()
    row = describe(sites, None)["sites"][0]
    assert "modalities" not in row
    assert (row["labelled"], row["regions"]) == (row["train"], {"lesion": row["train"]})
    plain = preset("iid").partition(replace(records, masks=None, regions={}), 0)
    assert not {"modalities", "labelled", "regions"} & describe(plain, None)["sites"][0].keys()


def test_modalities_that_cannot_be_kept_are_refused(heads: Records, records: Records) -> None:
    with pytest.raises(ConfigError, match=r"sites\.modalities: got 'pd', need names from flair, t1ce, t1, t2"):
        preset("iid", modalities=[["flair"], ["pd"]]).partition(heads, 0)
    with pytest.raises(ConfigError, match=r"sites\.modalities: got 'flair', and the data name no modalities"):
        preset("modalities").partition(records, 0)
    with pytest.raises(ConfigError, match=r"sites\.severity: got 3, need 0: scanner profiles are for images of one"):
        preset("hospital").partition(heads, 0)
    for lists in ([], [[]], [["t1", "t1"]]):
        with pytest.raises(ConfigError, match=r"sites\.modalities: got .* need lists of names"):
            preset("iid", modalities=lists)
    with pytest.raises(ConfigError, match=r"sites\.modalities: got .* need null, as the data name their sites"):
        preset("natural", modalities=[["t1"]])
    lacking = heads.images.clone()
    lacking[:, 2] = 0
    with pytest.raises(DataError, match=r"site 'site-2': \d+ of \d+ images have none of t1, the modalities that"):
        preset("iid", modalities=[["flair"], ["t1"]]).partition(replace(heads, images=lacking), 0)


def test_records_refuse_masks_without_regions_and_the_reverse(records: Records) -> None:
    with pytest.raises(ValueError, match=r"got masks and the regions \{\}, need both or neither"):
        replace(records, regions={})
    with pytest.raises(ValueError, match=r"got no masks and the regions .'lesion'"):
        replace(records, masks=None)


@pytest.mark.parametrize("names", [("flair", "t1"), ("flair", "t1ce", "t1", "t1"), ("Flair", "t1ce", "t1", "t2")])
def test_records_refuse_names_that_do_not_fit_their_channels(heads: Records, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"got modalities .* for 4 channels, need one name"):
        replace(heads, modalities=names)


# pooled data, calibration, description


def test_calibration_tells_presets_apart(records: Records) -> None:
    found = {name: calibration(preset(name).partition(records, 0), 0) for name in ("iid", "scanner", "quantity")}
    assert found["iid"].site_accuracy == pytest.approx(0.25, abs=0.12)
    assert found["iid"].effective_sites == pytest.approx(4, abs=0.05)
    assert found["iid"].label_variation < 0.02
    assert found["scanner"].site_accuracy > 0.9
    assert found["quantity"].effective_sites < 3.5
    mild = calibration(preset("scanner", severity=0.5).partition(records, 0), 0)
    assert found["iid"].site_accuracy < mild.site_accuracy < found["scanner"].site_accuracy


def test_findings_stay_with_their_images_and_are_counted_each() -> None:
    draw, names = torch.Generator().manual_seed(0), ("Mass", "Edema", "Hernia")
    present = torch.rand(240, 3, generator=draw) < torch.tensor([0.3, 0.4, 0.1])
    rows = [dict(zip(names, map(str, row), strict=True)) for row in present.int().tolist()]
    rows[0] = dict.fromkeys(names, "")
    found, labels, classes = findings.read(rows, names)
    plain = bare([f"p{i // 2}" for i in range(240)], labels.tolist())
    sites = preset("iid", count=2, min_images=8).partition(replace(plain, findings=found, classes=classes), 0)
    for site in (*sites, pool(sites)):
        assert site.findings == names
        for split in ("train", "val", "test"):
            part = getattr(site, split)
            assert torch.equal(part.findings, found[part.images[:, 0, 0, 0].long()])
    counted = [row["classes"] for row in describe(sites, None)["sites"]]
    assert [[row[name] for name in names] for row in counted] == [
        (s.train.findings == 1).sum(0).tolist() for s in sites
    ]
    assert [row["none"] for row in counted] == [int((s.train.findings == 0).all(1).sum()) for s in sites]
    with pytest.raises(ValueError, match=r"got findings \(240, 3\), need \(240, 1\)"):
        replace(plain, findings=found)


def test_pool_and_description_leave_the_unseen_site_out_and_name_nobody(records: Records) -> None:
    sites = preset("unseen").partition(records, 0)
    central = pool(sites)
    assert central.name == "central"
    assert len(central.train) == sum(len(site.train) for site in sites[:-1])
    assert central.train.masks is not None
    assert set(central.test.patients).isdisjoint(sites[-1].test.patients)
    described = describe(sites, calibration(sites, 0))
    assert [row["profile"][0] for row in described["sites"]] == ["A", "B", "C", "D", "U"]
    first = described["sites"][0]
    assert sum(first["classes"].values()) == first["train"] == len(sites[0].train)
    assert set(described["calibration"]) == {"site_accuracy", "chance", "label_variation", "effective_sites"}
    assert not any(patient in str(described) for patient in records.patients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, r"sites\.count: got 0, need an integer of at least 1"),
        ({"alpha": "low"}, r"sites\.alpha: got 'low', need a number"),
        ({"alpha": 0}, r"sites\.alpha: got 0, need a number above 0, or null"),
        ({"quantity": "zipf"}, r"sites\.quantity: got 'zipf', need lognormal, power or null"),
        ({"severity": -1}, r"sites\.severity: got -1"),
        ({"natural": True}, r"sites\.count: got 4, need null, as the data name their sites"),
    ],
)
def test_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("iid", **changes)


def test_data_that_cannot_be_divided_are_refused(records: Records) -> None:
    people = [f"p{i}" for i in range(60)]
    small = bare(people, [i % 2 for i in range(60)])
    with pytest.raises(DataError, match=r"got 42 training images of 60 patients for 4 sites, need 32 images for each"):
        preset("iid").partition(small, 0)
    with pytest.raises(DataError, match="the data name no sites"):
        preset("natural").partition(small, 0)
    for arm in ARMS:
        with pytest.raises(DataError, match=f"got a site '{arm}', need other names than random, local, federated"):
            preset("natural").partition(replace(small, sites=("east",) * 30 + (arm,) * 30), 0)
    lopsided = replace(small, sites=("big",) * 55 + ("tiny",) * 5)
    with pytest.raises(DataError, match=r"site 'tiny': got \d train, \d val, \d test images, need at least 8 train"):
        preset("natural").partition(lopsided, 0)
    with pytest.raises(ConfigError, match=r"sites\.held_out: got 'west', need one of east, north, south"):
        preset("natural", held_out="west").partition(records, 0)
    with pytest.raises(DataError, match="the data have no 'val' images"):
        preset("iid", count=2).partition(
            bare(people * 2, [0, 1] * 60, ["train"] * 30 + ["test"] * 30 + ["train"] * 30 + ["test"] * 30), 0
        )
    leaking = bare(["p0"] * 60, [0] * 60, ["train"] * 30 + ["test"] * 30)
    with pytest.raises(DataError, match="1 of 1 patients are in more than one split"):
        preset("iid").partition(leaking, 0)
