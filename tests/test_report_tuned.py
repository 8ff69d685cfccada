"""The report of a study that fine-tunes: its numbers are those of the rows, and nothing is guessed."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.evaluation.disclosure import WITHHELD
from medfl.report import compute, label_efficiency, page, predicted, sentences, summary, synthetic, wire
from medfl.report.summary import Estimate
from medfl.report.tables import read_run
from medfl.report.words import ARMS as KINDS
from medfl.report.words import HEADLINES, TUNED, Tuned, taken_apart
from tests.run_folder import ARMS, EVALUATION, SITES, auc, draw_nothing, section, tell, write_run, write_table
from tests.run_folder_tuned import (
    BATCH,
    CLASSES,
    ENCODERS,
    FEW,
    FRACTIONS,
    ROUNDS,
    STEPS,
    SYNTHETIC,
    liver,
    score,
    told,
    write_tuned,
)

SEEN = SITES[:3]  # sites with an AUC
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "</td><script src=//x.example/a.js>alert('$x^2$')</script>&\"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tuned(tmp_path_factory.mktemp("tuned") / "study")


@pytest.fixture(scope="module")
def text(folder):
    return page.write(folder).read_text()


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("report.html")))


@pytest.fixture
def undrawn(monkeypatch):
    draw_nothing(monkeypatch)


class Elements(HTMLParser):
    """The tags of a page, and their attributes, as a browser takes it apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def mean_score(protocol, arm, fraction=1.0):
    """From the made-up rows, as they were rounded when they were written."""
    return fmean(float(f"{score(protocol, arm, site, fraction):.6g}") for site in SEEN)


def test_means_by_arm_and_protocol_are_those_of_the_rows(text):
    shown = section(text, "finetuned").partition("AUC, mean over sites")[2].partition("Each site")[0]
    for protocol, kinds in ENCODERS.items():
        for arm in kinds:
            assert f"{mean_score(protocol, arm):.3f}" in shown
    row = re.search(r"Untrained \(fine-tuned: supervised from scratch\) (.*?) Alone", shown)[1]
    assert row.split()[0] == f"{fmean(auc('random', site) for site in SEEN):.3f}"  # the frozen encoder beside it
    assert f"{mean_score('finetune', 'random'):.3f}" in row
    assert "Sites 3 3 3 3 3" in shown
    assert re.search(r"Constant predictor( 0\.\d{3}){4}", shown)


@pytest.mark.usefixtures("undrawn")
def test_fewer_labels_change_no_table_of_all_labels(run, tmp_path):
    plain = section(page.write(write_run(tmp_path / "study")).read_text(), "arms")
    assert plain == section(page.render(run), "arms")


def test_label_efficiency_has_the_same_sites_behind_every_point(copy):
    kept = [row for row in rows_of(copy / "evaluation.csv")
            if (row["site"], row["protocol"], row["label_fraction"]) != ("site-2", "finetune", "0.01")]  # fmt: skip
    write_table(copy / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in kept])
    found = label_efficiency.measure(read_run(copy), "finetune")
    assert found.sites == ("site-1", "site-3")
    assert found.means.keys() == set(ARMS)
    for arm, line in found.means.items():
        expected = {f: fmean(score("finetune", arm, site, f) for site in found.sites) for f in FRACTIONS["finetune"]}
        assert {share: known.value for share, known in line.items()} == pytest.approx(expected, abs=1e-6)
    assert label_efficiency.measure(read_run(copy), "central_finetune") is None  # one share only


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("undrawn")
def test_a_task_with_masks_shows_dice_of_the_regions_that_the_data_names(tmp_path):
    run = read_run(write_tuned(tmp_path / "study", segments=True))
    shown = section(page.render(run), "finetuned")
    assert f"{fmean(liver('finetune', 'federated', site) for site in SITES) - 0.0524:.3f}" in shown
    assert f"liver site-1 {liver('finetune', 'random', 'site-1'):.3f}" in shown
    assert re.search(r"IoU liver 0\.\d{3}.*? spleen 0\.\d{3}", shown)
    assert "HD95, mm (lower is better) liver 12.50" in shown
    assert "tumour" not in shown
    assert not run.counts
    assert "counts.jsonl is not there" in section(page.render(run), "study")  # the linear probe has classes


def test_dice_leads_where_nothing_else_was_measured(tmp_path):
    write_tuned(tmp_path / "study", segments=True)
    kept = [row for row in rows_of(tmp_path / "study" / "evaluation.csv") if row["protocol"] not in ("linear", "knn")]
    write_table(tmp_path / "study" / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in kept])
    main = summary.headline(read_run(tmp_path / "study"))
    assert (main.protocol, main.metric) == ("finetune", "dice")
    assert HEADLINES[main.protocol, main.metric] == "Dice, fine-tuned at each site"


def test_curves_from_summed_counts_are_those_of_the_predictions(run):
    pooled = predicted.by_arm(run, "linear", predicted.shared_sites(run, "linear"))
    assert pooled.keys() == set(predicted.SHOWN)
    for arm, found in pooled.items():
        probabilities, labels = (np.concatenate(part) for part in zip(*(told(s, arm) for s in SITES), strict=True))
        x, y = predicted.roc(found)
        lesion, normal = probabilities[labels == 1, 1], probabilities[labels == 0, 1]
        exact = (lesion[:, None] > normal).mean()
        assert np.trapezoid(y, x) == pytest.approx(exact, abs=0.015)
        sizes = np.array([[len(lesion), len(normal)], [len(normal), len(lesion)]])
        np.testing.assert_allclose(found.histogram.sum(axis=2), sizes)


def test_confusion_matrices_add_up_the_sites_that_told_all(run, text):
    shown = section(text, "predictions")
    assert f"Without {FEW}, where some were withheld." in shown
    tables = shown.partition("Confusion matrices")[2].partition("Each site")[0]
    for arm, title in (("random", "Untrained"), ("federated", "Federated")):
        exact = np.zeros((2, 2), dtype=int)
        for site in SITES:
            probabilities, labels = told(site, arm)
            np.add.at(exact, (labels, probabilities.argmax(axis=1)), site != FEW)
        share = np.round(100 * exact / exact.sum(axis=1, keepdims=True)).astype(int)
        rows = " ".join(f"{CLASSES[k]} " + " ".join(f"{exact[k, j]} {share[k, j]} %" for j in (0, 1)) for k in (0, 1))
        assert f"{title} True normal lesion {rows}" in tables
    alone = shown.partition("Each site site-1")[2].partition(f" {FEW} ")[2].partition(" site-4 ")[0]
    assert "Too few images of a class for curves (fewer than 20)." in alone
    assert alone.count("withheld") == 3 * 4  # three arms
    assert not re.search(r"≥ \d", tables)


@pytest.mark.usefixtures("undrawn")
def test_withheld_numbers_of_some_sites_are_a_lower_bound(copy):
    lines = [json.loads(line) for line in (copy / "counts.jsonl").read_text().splitlines()]
    exact = {line["site"]: line["confusion"][0][0] for line in lines if line["arm"] == "federated"}
    for line in lines:  # every site withholds something, so that no sum is whole
        line["confusion"][1] = [WITHHELD, WITHHELD]
    (copy / "counts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shown = section(page.write(copy).read_text(), "predictions").partition("Each site")[0]
    assert "where some were withheld" not in shown
    assert "lesion withheld withheld" in shown
    least = sum(number for number in exact.values() if number > 0)
    assert f"Federated True normal lesion normal {'≥ ' if -1 in exact.values() else ''}{least}" in shown


def test_counts_that_are_damaged_or_of_other_classes_are_not_added(copy):
    lines = (copy / "counts.jsonl").read_text().splitlines()
    other = json.loads(lines[0]) | {"arm": "federated", "site": "site-1", "classes": ["a", "b"]}
    (copy / "counts.jsonl").write_text("\n".join([*lines, json.dumps(other), '{"arm": "random", "site"']))
    run = read_run(copy)
    assert "counts.jsonl: 1 line could not be read." in run.problems
    assert predicted.shared_sites(run, "linear") == ["site-2", "site-3", "site-4"]


def reference(cells):
    """The summaries of a transfer matrix over the sites with a value, in plain loops."""
    sites = list(SEEN)
    off = {site: fmean(cells[a, site] for a in SITES if a != site) for site in sites}
    return {
        "own": fmean(cells[s, s] for s in sites),
        "others": fmean(off.values()),
        "asymmetry": fmean(abs(cells[a, b] - cells[b, a]) for a, b in permutations(sites, 2)),
        "best": {s: cells["federated", s] - max(cells[a, s] for a in SITES) for s in sites},
        "cross": (fmean(cells["federated", s] for s in sites) - fmean(off.values()))
        / (fmean(cells["central", s] for s in sites) - fmean(off.values())),
    }


@pytest.mark.parametrize(("kind", "shift"), [("Representation", 0.0), ("End to end", -0.05)])
def test_summaries_of_transfer_are_those_of_plain_loops(text, kind, shift):
    cells = {(a, s): auc(a, s) + shift for a in (*SITES, "federated", "central") for s in SEEN}
    found, shown = reference(cells), section(text, "transfer").partition(kind)[2]
    assert f"Own site (diagonal mean) {found['own']:.3f}" in shown
    assert f"Other sites (off-diagonal mean) {found['others']:.3f}" in shown
    assert f"Gap, own minus other sites {found['own'] - found['others']:+.3f}" in shown
    assert f"Asymmetry, mean of |there − back| {found['asymmetry']:.3f}" in shown
    listed = ", ".join(f"{site} {gain:+.3f}" for site, gain in found["best"].items())
    assert f"Federated minus the best single site {listed}" in shown
    assert f"Recovered gap outside the own hospital: {100 * found['cross']:.0f} %" in shown


def test_matrices_of_one_metric_share_their_colours_and_the_gap_is_at_the_top_too(text):
    assert "The matrices of AUC share their colour scale." in section(text, "transfer")
    stated = re.search(r"Recovered gap outside the own hospital: [^.]*\.", section(text, "transfer"))[0]
    assert stated in section(text, "study")
    part = text.partition('id="transfer"')[2].partition("</section>")[0]
    heat = {float(value): int(share) for share, value in re.findall(r'--heat: (\d+)%">([\d.]+)<', part)}
    order = [heat[value] for value in sorted(heat)]
    assert order == sorted(order)


@given(st.floats(0.5, 0.7), st.floats(0.6, 0.9), st.floats(0.05, 0.3), st.floats(0.001, 0.01))
def test_bounds_of_the_recovered_gap_are_those_of_draws(alone, federated, gap, error):
    parts = (alone, federated, alone + gap)
    known = [Estimate(value, value - 1.96 * error, value + 1.96 * error) for value in parts]
    stated = sentences._share(*known, form=sentences.OWN)
    draw = np.random.default_rng(1).normal(parts, error, size=(20_000, 3))
    if gap < 5 * error * math.sqrt(2):
        return  # the ratio has no variance to speak of
    ratio = (draw[:, 1] - draw[:, 0]) / (draw[:, 2] - draw[:, 0])
    low, high = (int(number.replace("−", "-")) for number in re.search(r"95 % (−?\d+) to (−?\d+) %", stated).groups())
    inside = np.mean((ratio > (low - 0.5) / 100) & (ratio < (high + 0.5) / 100))
    assert inside > 0.94


def test_cost_is_the_sum_of_the_events_and_rows(run, text):
    found = compute.costs(run, "pretrain")
    steps = {e.arm: 0.0 for e in run.events if e.name == "site/steps" and e.stage == "pretrain"}
    for event in run.events:
        if event.stage == "pretrain" and event.name == "site/steps":
            steps[event.arm] += event.value
    assert {arm: cost.steps for arm, cost in found.items()} == steps
    sent = [c.bytes for c in run.crossings if (c.arm, c.stage, c.direction) == ("federated", "pretrain", "up")]
    assert found["federated"].up == sum(sent)
    shown = section(text, "compute")
    assert "51,200 by site-1 alone, site-2 alone, site-3 alone, site-4 alone, central; 48,640 by federated." in shown
    images = STEPS * len(SITES) * ROUNDS * BATCH
    assert f"Fine-tuned over all sites Untrained 100 % 1 2 80 {images:,} 4.1 kB 4.1 kB" in shown
    assert f"Fine-tuned at each site Untrained 100 % 4 8 320 {4 * images:,}" in shown
    assert "Fine-tuned at each site, 100 % of the labels: the arms did not see" not in shown


@pytest.mark.usefixtures("undrawn")
def test_fine_tunings_of_unequal_length_are_named(copy):
    event = {"t": "", "stage": "finetune", "arm": "finetune:federated:site-1:1", "round": 1, "site": "site-1"}
    tell(copy, [event | {"name": "site/steps", "value": 15.0}])  # of the 40 that it repeats
    shown = section(page.write(copy).read_text(), "compute")
    assert "Fine-tuned at each site, 100 % of the labels: the arms did not see equal numbers of images, " in shown
    assert "from 1,760 to 2,560 each." in shown


def test_in_a_simulation_only_what_would_cross_a_border_is_counted(run, copy):
    def up(run):
        return sum(flow.bytes for flow in wire.flows(run) if flow.direction == "up")

    tuned = [c for c in run.crossings if c.stage == "finetune" and c.direction == "up"]
    further = [c for c in tuned if ":federated:" in c.arm]
    assert 0 < len(further) < len(tuned)
    pretrained = sum(c.bytes for c in run.crossings if c.arm == "federated" and c.direction == "up")
    assert up(run) == pretrained + sum(c.bytes for c in further)
    (copy / "sites.json").unlink()  # written for simulations only
    assert up(read_run(copy)) == sum(c.bytes for c in run.crossings if c.direction == "up")


def test_synthetic_images_are_told_in_counts(run, text):
    cells = [cell["value"] for cell in dict(synthetic.section(run)["rows"])["site-1"]]
    copies = sum(SYNTHETIC[f"copy_{kind}"] for kind in ("features", "ratio", "pixels"))
    made = sum(SYNTHETIC[name] for name in ("kept", "sanity", "realism", "duplicate", "budget")) + copies
    assert cells[:2] == [f"{made}", "200"]
    assert cells[4] == f"{copies}"
    assert cells[-2:] == ["1.75", "yes"]
    assert "1.75 1.00 to 2.80 yes" in section(text, "synthetic")
    assert "Pretraining used 0.5 of them for each real image." in section(text, "synthetic")


@pytest.mark.usefixtures("undrawn")
def test_pictures_prefer_the_federated_encoder_and_end_where_the_page_is_full(copy, monkeypatch):
    for site in SITES:
        for file in ("federated/embedding.png", "federated_finetune-federated-1/attention.png",
                     "federated_finetune-federated-1/embedding.png", "finetune-random-1/attention.png"):  # fmt: skip
            path = copy / "sites" / "pictures" / site / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PNG + site.encode() + bytes(30_000))
    run = read_run(copy)
    shown = [(picture.site, f"{picture.arm}/{picture.name}") for picture in run.pictures]
    both = ("federated/embedding.png", "federated_finetune-federated-1/attention.png")
    assert shown == [(site, file) for site in SITES for file in both]
    whole = page.render(run)
    assert whole.count("<img") == 8
    assert "What speaks for the class that is found (Grad-CAM). Arm federated, fine-tuned over all sites" in section(
        whole, "pictures"
    )
    most = len(whole.encode()) - 60_000
    monkeypatch.setattr(page, "MOST", most)
    less = page.render(run)
    assert len(less.encode()) <= most
    assert "some are not on it: site-4 (2)." in section(less, "pictures")
    monkeypatch.setattr(page, "MOST", 1)
    assert "<img" not in page.render(run)


@pytest.mark.usefixtures("undrawn")
def test_a_fine_tuning_that_is_not_evaluated_says_so(copy):
    kept = [row for row in rows_of(copy / "evaluation.csv") if row["protocol"] not in TUNED]
    write_table(copy / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in kept])
    text = page.write(copy).read_text()
    assert "no fine-tuned network has been evaluated so far" in section(text, "finetuned")
    assert "nothing evaluated yet" in section(text, "study")


def test_hostile_names_stay_text_and_bytes_repeat(tmp_path):
    folder = write_tuned(tmp_path / "study", rename={"site-1": HOSTILE})
    text = page.write(folder).read_text()
    assert "<script" not in text
    assert text.count("<section") == text.count("</section>") == 13
    assert all(found.startswith("#") for found in re.findall(r'href="([^"]*)"', text))
    seen = Elements(text)
    assert seen.tags & {"script", "link", "iframe", "img", "object", "form"} == set()
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    for part in ("finetuned", "predictions", "transfer", "synthetic", "compute"):
        assert HOSTILE in section(text, part)


def test_the_same_folder_gives_the_same_bytes(run, text):
    assert page.render(run) == text


@given(
    st.sampled_from(sorted(TUNED)),
    st.sampled_from(sorted(KINDS)),
    st.text("abc-1", min_size=1),
    st.sampled_from(["0.01", "0.1", "1"]),
)
def test_names_of_fine_tunings_are_taken_apart(protocol, kind, site, fraction):
    encoder = f"{kind}:{site}" if kind == "local" else kind
    for name in (f"{protocol}:{encoder}:{fraction}", f"{protocol}:{encoder}:{site}:{fraction}"):
        assert taken_apart(name) == Tuned(protocol, kind, fraction)
    assert taken_apart(encoder) is None


def test_zero_has_no_sign_of_its_own():
    assert summary.number(-0.0001) == "0.000"
    assert summary.number(-0.0001, summary.SIGNED) == "+0.000"
    assert summary.number(-0.0006) == "−0.001"
