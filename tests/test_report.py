"""The report says what the run folder holds, no more: numbers, absences, alarms, and nothing from outside."""

import csv
import json
import re
import shutil
from base64 import b64decode
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl import run_folder
from medfl.errors import DataError
from medfl.report import page, panels, remarks, sentences, summary, wire
from medfl.report.figures import spread
from medfl.report.summary import Comparison, Estimate, compare_arms
from medfl.report.tables import FILES, read_run
from tests.run_folder import (
    ARMS,
    EVALUATION,
    PHASES,
    ROUNDS,
    SITES,
    TRANSFER,
    WIRE,
    add_rows,
    auc,
    dice,
    discrete_crossings,
    discrete_events,
    draw_nothing,
    section,
    tell,
    words,
    write_run,
    write_table,
    write_volumes,
)

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "</td><script src=//x.example/a.js>alert('$x^2$')</script>&\"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "study")


@pytest.fixture(scope="module")
def text(folder):
    return page.write(folder).read_text()


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("report.html")))


@pytest.fixture
def undrawn(monkeypatch):
    draw_nothing(monkeypatch)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def remark(arm, number, text):
    where = {"t": "", "stage": "pretrain", "arm": arm, "round": number, "site": ""}
    return where | {"name": "remark", "value": 1.0, "reason": text}


def test_every_auc_of_the_tables_is_on_the_page_to_three_digits(folder, text):
    arms, transfer = section(text, "arms"), section(text, "transfer")
    for row in rows_of(folder / "evaluation.csv"):
        if row["protocol"] == "linear" and row["metric"] == "auc" and row["value"]:
            value, low, high = (f"{float(row[name]):.3f}" for name in ("value", "low", "high"))
            assert f"{value} {low} to {high}" in arms
    for row in rows_of(folder / "transfer.csv"):
        if row["value"]:
            value, low, high = (f"{float(row[name]):.3f}" for name in ("value", "low", "high"))
            assert f"{value} {low} to {high}" in transfer


def test_the_sentence_has_the_means_over_the_same_sites(text):
    means = {}
    for arm in ARMS:
        cells = [auc(site if arm == "local" else arm, site) for site in SITES]
        means[arm] = f"{fmean(float(f'{cell:.6g}') for cell in cells if cell is not None):.3f}"
    lead = words(re.search(r'<p class="lead">(.*?)</p>', text, re.DOTALL)[1])
    assert lead.startswith(f"Federated pretraining reached a mean linear-probe AUC of {means['federated']} (95 % ")
    assert f"over 3 sites, against {means['local']} for sites training alone" in lead
    assert f"and {means['random']} for an untrained encoder; central training reached {means['central']}." in lead
    assert "site-4 is in no mean: no arm has a value there" in section(text, "study")


def test_the_page_fetches_nothing_and_stays_small(text):
    assert not re.search(r"https?:|@import|<script|<link|<iframe|\ssrc\s*=", text, re.IGNORECASE)
    assert all(found.startswith("#") for found in re.findall(r'href="([^"]*)"', text))
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text
    assert len(text.encode()) < 3e6


def test_the_same_folder_gives_the_same_bytes(text, copy):
    assert page.write(copy).read_text() == text
    assert not [path.name for path in copy.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("absent", sorted(FILES))
@pytest.mark.usefixtures("undrawn")
def test_any_file_may_be_absent_and_is_named(copy, absent):
    (copy / absent).unlink(missing_ok=True)
    assert f"{absent} is not there ({FILES[absent]})" in section(page.write(copy).read_text(), "study")


def test_a_study_that_has_just_begun_says_what_is_lacking(copy):
    for name in set(FILES) - {"config.yaml", "metrics.jsonl"}:
        (copy / name).unlink(missing_ok=True)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    first = [line for line in lines if json.loads(line)["arm"] == "federated" and json.loads(line)["round"] == 1]
    (copy / "metrics.jsonl").write_text("\n".join([*first, lines[-1][:40]]))
    text = page.write(copy).read_text()
    study = section(text, "study")
    assert "No result yet for federated pretraining." in study
    assert f"1 of {ROUNDS} done" in study
    assert "not finished: federated, local, central" in study
    assert "metrics.jsonl: 1 line could not be read." in study
    assert "the evaluate stage has not been run" in section(text, "arms")
    assert "the transfer stage has not been run" in section(text, "transfer")
    assert "no record of what left the sites" in section(text, "wire")
    assert "<svg" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds none of them; need a run folder"):
        page.write(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        page.write(tmp_path / "nowhere")


def test_hostile_names_stay_text(tmp_path):
    folder = write_run(tmp_path / "study", rename={"site-1": HOSTILE})
    text = page.write(folder).read_text()
    assert "<script" not in text
    assert text.count("<section") == text.count("</section>") == 10
    assert HOSTILE in section(text, "sites")


@pytest.mark.parametrize("role", ["queue", "local", "fixed"])
def test_what_must_stay_and_left_raises_the_alarm(copy, role):
    add_rows(
        copy / "wire.csv",
        (2, "site-3", "up", "queue.keys", role, "float32", "4096x64", 1048576, "federated", "pretrain"),
    )
    run = read_run(copy)
    assert wire.verdict(run).state == "alarm"
    assert f"queue.keys ({role}, site-3)" in wire.verdict(run).text


@pytest.mark.usefixtures("undrawn")
def test_the_alarm_is_at_the_top_and_replaces_the_promise(copy):
    assert "no patient id" in section(page.write(copy).read_text(), "wire")
    add_rows(
        copy / "wire.csv", (2, "site-3", "up", "queue.keys", "queue", "float32", "8x8", 256, "federated", "pretrain")
    )
    text = page.write(copy).read_text()
    study = section(text, "study")
    assert "Alarm: tensors that must stay at their site left it (1 row): queue.keys (queue, site-3)." in study
    assert "no patient id" not in text


@pytest.mark.parametrize(
    ("role", "shape", "said"),
    [("thumbnail", "28x28", "a role that this report does not know"), ("metric", "120", "more than one value")],
)
def test_no_promise_about_what_is_not_known(copy, role, shape, said):
    add_rows(copy / "wire.csv", (2, "site-3", "up", "x", role, "float32", shape, 8, "federated", "pretrain"))
    verdict = wire.verdict(read_run(copy))
    assert verdict.state == "open"
    assert said in verdict.text


def test_no_promise_on_a_damaged_record(copy):
    add_rows(copy / "wire.csv", (2, "site-3", "sideways", "x", "queue", "float32", "1", 8, "federated", "pretrain"))
    assert wire.verdict(read_run(copy)).state == "open"


def test_wire_sums_are_those_of_the_rows(folder):
    rows = [row for row in rows_of(folder / "wire.csv") if row["arm"] == "federated"]
    found = wire.flows(read_run(folder))
    assert sum(flow.bytes for flow in found) == sum(int(row["bytes"]) for row in rows)
    weights = next(f for f in found if (f.site, f.direction, f.role) == ("site-2", "up", "parameter"))
    assert weights.names == 4
    assert weights.per_round == pytest.approx(weights.bytes / ROUNDS)


def test_refusals_are_shown_with_their_reasons(text):
    shown = section(text, "refusals")
    assert "3 pretrain federated site-2 refused site 'site-2': 'encoder.stem.weight' has NaN or infinity." in shown
    assert "in a federated round: 3 to 4, over 5 rounds" in shown


@pytest.mark.usefixtures("undrawn")
def test_a_collapse_is_at_the_top(copy):
    line = {"t": "", "stage": "pretrain", "arm": "federated", "round": ROUNDS, "site": "site-3"}
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line | {"name": "monitor/embedding_std", "value": 0.0001}) + "\n")
    assert "fell below a tenth of its first value: federated site-3." in section(page.write(copy).read_text(), "study")


def test_without_their_events_there_is_no_section_on_codebooks_and_none_on_remarks(text):
    assert not re.search(r'(id="|href="#)(codebooks|remarks)"', text)


def test_the_codebooks_are_shown_as_they_were_in_the_last_round(copy):
    tell(copy, discrete_events())
    add_rows(copy / "wire.csv", *discrete_crossings())
    text = page.write(copy).read_text()
    shown = section(text, "codebooks")
    assert "fine (64 codes), coarse (16 codes)" in shown
    assert "perplexity / number of codes" in shown
    assert f"Each site in round {ROUNDS}" in shown
    assert "fine site-1 0.050 20.0 % 0.300 0.0 % site-2 0.150 20.0 % 0.300 0.0 %" in shown
    assert "site-4 – – – –" in shown  # it did not answer
    assert not re.search(r'class="(bad|box alarm)"', text.split('id="codebooks"')[1].split("</section>")[0])
    assert 'href="#codebooks"' in text


def test_without_the_number_of_codes_perplexity_is_shown_as_it_is(copy):
    tell(copy, discrete_events())
    shown = section(page.write(copy).read_text(), "codebooks")
    assert "perplexity / number of codes" not in shown
    assert "fine, coarse" in shown


@pytest.mark.usefixtures("undrawn")
def test_an_index_alarm_is_at_the_top_with_its_rounds_even_when_it_is_over(copy):
    tell(copy, discrete_events(alarm=0.123))
    text = page.write(copy).read_text()
    for part in ("study", "codebooks"):
        assert "Index alarm: site-2 counted tokens under codes that do not fit them" in section(text, part)
        assert "fine (rounds 2-3, up to 12.3 % of its tokens)" in section(text, part)


@pytest.mark.usefixtures("undrawn")
def test_an_index_alarm_of_the_last_round_is_marked_in_the_table(copy):
    events = discrete_events()
    named = ("site-3", "codebook/scales.coarse.quantizer/index_alarm")
    for event in events:
        if (event["site"], event["name"]) == named and event["round"] == ROUNDS:
            event["value"] = 0.004
    tell(copy, events)
    assert re.findall(r'<td class="bad">([^<]*)', page.write(copy).read_text().split('id="codebooks"')[1]) == [
        "0.4 % !"
    ]


def test_separability_is_no_matter_of_arms_with_one_site(copy):
    alone = [event | {"arm": "local:site-1"} for event in discrete_events() if event["site"] in ("", "site-1")]
    tell(copy, [*discrete_events(), *alone])
    found = {part.heading: [drawn.caption for drawn in part.figures] for part in panels.monitors(read_run(copy))}
    assert found["Coding rate"] == ["Federated", "Each site alone"]
    assert found["Site separability"] == ["Federated"]


@pytest.mark.usefixtures("undrawn")
def test_a_remark_is_shown_once_per_arm_with_its_rounds_and_collapses_first(copy):
    said = [remark("federated", at, f"the spread is low: std 0.{at}, at least 0.2 is expected.") for at in (1, 3, 4, 5)]
    said += [remark("local:site-1", 2, "the spread is low: std 0.12, at least 0.2 is expected.")]
    said += [remark("federated", at, f"site '{site}' answers late.") for at, site in ((1, "site-1"), (2, "site-2"))]
    said += [remark("central", at, "collapsed: the predictions are one point.") for at in (5, 4)]
    tell(copy, said)
    text = page.write(copy).read_text()
    shown = section(text, "remarks").partition("Remark central ")[2]
    assert shown.startswith("4-5 Collapsed: the predictions are one point.")
    assert "federated 1, 3-5 The spread is low: std 0.5, at least 0.2 is expected." in shown
    assert "local:site-1 2 The spread is low: std 0.12" in shown
    assert "federated 1 Site 'site-1' answers late." in shown
    assert "federated 2 Site 'site-2' answers late." in shown
    assert shown.count("The spread is low") == 2
    assert "Warning: training collapsed in arm central (rounds 4-5)." in section(text, "study")
    assert "remark" not in section(text, "refusals")


@given(st.sets(st.integers(1, 30), min_size=1))
def test_spans_name_every_round_or_count_them(rounds):
    text = remarks.spans(rounds)
    if " from " in text:
        assert text == f"{len(rounds)} from {min(rounds)} to {max(rounds)}"
        return
    ends = [[int(end) for end in part.split("-")] for part in text.split(", ")]
    assert {at for part in ends for at in range(part[0], part[-1] + 1)} == rounds


@pytest.mark.usefixtures("undrawn")
def test_the_roles_of_dissect_may_travel_and_are_described(copy):
    add_rows(copy / "wire.csv", *discrete_crossings())
    assert wire.verdict(read_run(copy)).state == "clear"
    shown = section(page.write(copy).read_text(), "wire")
    for role in ("codebook", "target", "statistics"):
        assert f"left {role} {wire.WORDS[role]}" in shown


def table_of(tmp_path, values, *, half=0.01):
    """A run of three sites where each arm has the same AUC everywhere."""
    rows = [
        (
            f"local:{site}" if arm == "local" else arm,
            site,
            "classification",
            "linear",
            "1.0",
            "auc",
            v,
            v - half,
            v + half,
        )
        for arm, v in values.items()
        for site in SITES[:3]
    ]
    write_table(tmp_path / "evaluation.csv", EVALUATION, rows)
    return compare_arms(read_run(tmp_path), "linear", "auc")


@pytest.mark.parametrize(
    ("values", "half", "said"),
    [
        ({"local": 0.7, "federated": 0.76, "central": 0.8}, 0.01, r"Recovered gap: 60 % \(95 % 53 to 67 %\) of"),
        ({"local": 0.7, "federated": 0.85, "central": 0.8}, 0.01, "150 % .* passed central training"),
        ({"local": 0.7, "federated": 0.71, "central": 0.715}, 0.001, "not resolvable: .* 0.015 above"),
        ({"local": 0.7, "federated": 0.76, "central": 0.8}, 0.2, "not resolvable: .* more than 0.16"),
        ({"local": 0.8, "federated": 0.76, "central": 0.7}, 0.01, "0.100 below .* a reference, not a bound"),
    ],
)
def test_recovered_gap_is_printed_only_when_it_can_be_resolved(tmp_path, values, half, said):
    assert re.search(said, sentences.recovered(table_of(tmp_path, values, half=half)))


def test_a_worse_federation_is_called_worse(tmp_path):
    table = table_of(tmp_path, {"random": 0.75, "local": 0.8, "federated": 0.7, "central": 0.74})
    said = " ".join(sentences.remarks(table))
    assert "Worse than sites training alone: difference −0.100" in said
    assert "Worse off than alone: site-1, site-2, site-3." in said
    assert "Caution: central training did not beat the untrained encoder" in said


def test_a_site_without_one_arm_is_in_no_mean(copy):
    kept = [
        row for row in rows_of(copy / "evaluation.csv") if not (row["arm"] == "central" and row["site"] == "site-1")
    ]
    write_table(copy / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in kept])
    table = compare_arms(read_run(copy), "linear", "auc")
    assert table.compared == ("site-2", "site-3")
    assert table.left_out["site-1"] == "no value for central training"


def test_a_lone_encoder_counts_at_its_own_site_only(copy):
    add_rows(
        copy / "evaluation.csv", ("local:site-1", "site-2", "classification", "linear", "1.0", "auc", 0.1, 0.0, 0.2)
    )
    before, after = auc("site-2", "site-2"), compare_arms(read_run(copy), "linear", "auc").cells["local", "site-2"]
    assert after.value == pytest.approx(before, abs=1e-6)


def test_unseen_sites_are_reported_apart(copy):
    tree = json.loads((copy / "sites.json").read_text())
    tree["sites"][2]["held_out"] = True
    (copy / "sites.json").write_text(json.dumps(tree))
    table = compare_arms(read_run(copy), "linear", "auc")
    assert table.unseen == ("site-3",)
    assert table.compared == ("site-1", "site-2")
    assert any(text.startswith("At site-3, which took no part in training") for text in sentences.remarks(table))


estimates = st.tuples(st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.3)).map(
    lambda t: Estimate(t[0], t[0] - t[1], t[0] + t[2])
)


@given(st.lists(estimates, min_size=1, max_size=6))
def test_the_mean_lies_in_its_interval_and_is_surer_than_its_parts(parts):
    found = summary.mean(parts)
    widths = [part.high - part.low for part in parts]
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert found.high - found.low <= max(widths) + 1e-9


@given(estimates, estimates)
def test_a_difference_is_antisymmetric(first, second):
    there, back = summary.difference(first, second), summary.difference(second, first)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


@given(st.lists(st.floats(-1, 2), max_size=12))
def test_labels_keep_their_order_and_distance(wanted):
    placed = spread(wanted, 0.1)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [placed[b] - placed[a] for a, b in pairwise(order)]
    assert all(gap >= 0.1 - 1e-9 for gap in gaps)


def test_an_empty_comparison_has_no_number():
    empty = Comparison("linear", "auc", 1.0, {}, (), (), (), {})
    assert sentences.sentence(empty) == "No result yet for federated pretraining."
    assert sentences.remarks(empty) == []


def test_the_made_up_folder_has_the_columns_that_are_written():
    assert (EVALUATION, TRANSFER, WIRE) == (run_folder.EVALUATION, run_folder.TRANSFER, run_folder.WIRE)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A run of a method that fuses and segments, with pictures of two sites and one file that is none."""
    found = {
        "site-1/federated/fusion.png": PNG + b"one",
        "site-1/federated/field.png": PNG + b"two",
        "site-1/central/fusion.png": PNG + b"three",
        "site-2/local-site-2/segmentation.png": PNG + b"four",
        "site-3/federated/fusion.png": b"no picture",
        "site-1/federated/other.png": PNG + b"five",
    }
    return write_volumes(tmp_path_factory.mktemp("volumes") / "study", pictures=found)


@pytest.fixture(scope="module")
def volumes_text(volumes):
    return page.write(volumes).read_text()


def test_without_modalities_there_is_no_section_on_fusion(text):
    assert not re.search(r'(id="|href="#)volumes"', text)
    assert "<img" not in text


@pytest.mark.parametrize(
    ("kept", "metric"),
    [
        (("linear", "segmentation", "fusion"), "linear-probe AUC"),
        (("segmentation", "fusion"), "segmentation Dice (whole tumour)"),
        (("fusion",), "fusion SSIM"),
        ((), "linear-probe AUC"),
    ],
)
def test_the_headline_is_the_first_metric_that_was_measured(folder, volumes, tmp_path, kept, metric):
    rows = [row for path in (folder, volumes) for row in rows_of(path / "evaluation.csv") if row["protocol"] in kept]
    write_table(tmp_path / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in rows])
    assert summary.name_of(summary.headline(read_run(tmp_path))) == metric


def test_dice_leads_the_page_where_there_is_no_auc(volumes_text):
    mean = fmean(dice("federated", site, "dice_wt") for site in SITES if site != "site-3")
    study = section(volumes_text, "study")
    assert f"reached a mean segmentation Dice (whole tumour) of {mean:.3f} (95 %" in study
    assert "site-3 is in no mean: no arm has a value there (for instance, no mask in its test split)." in study
    assert "Segmentation Dice (whole tumour) on each site's own test images" in section(volumes_text, "arms")
    assert "dice et" not in section(volumes_text, "arms")  # it is in the section on volumes


def test_every_dice_is_on_the_page_with_its_interval(volumes, volumes_text):
    shown = section(volumes_text, "volumes")
    written = [row for row in rows_of(volumes / "evaluation.csv") if re.fullmatch(r"dice_\w\w", row["metric"])]
    assert len(written) == 3 * 3 * len(ARMS)
    for row in written:
        value, low, high = (f"{float(row[name]):.3f}".replace("-", "−") for name in ("value", "low", "high"))
        assert f"{value} {low} to {high}" in shown


def test_measures_are_named_by_region_and_the_fused_image_is_beside_the_plain_mean(volumes_text):
    shown = section(volumes_text, "volumes")
    assert "Whole tumour site-1 0.070" in shown
    assert re.search(r"HD95, mm \(lower is better\) Whole tumour 18.80 14.46 to 24.23 7.60", shown)
    assert "Site Mean of the sources Untrained Alone Federated Central site-1 0.800 0.780 to 0.810 0.790" in shown
    assert "PSNR 20.60 20.02 to 21.18" in shown
    assert "PSNR : closeness to each source" in shown
    assert "NMI" not in shown  # nobody measured it


def test_who_holds_what_is_told(volumes_text):
    shown = section(volumes_text, "volumes")
    assert "Site flair t1ce t1 t2 With a mask site-1 24 24 24 24 9 site-2 20 – – 20 9 site-3 – 16 16 – –" in shown
    assert "Classes in training" not in section(volumes_text, "sites")


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_not_evaluated_shows_who_holds_what(volumes, tmp_path):
    for name in ("sites.json", "metrics.jsonl"):
        shutil.copy(volumes / name, tmp_path / name)
    text = page.write(tmp_path).read_text()
    shown = section(text, "volumes")
    assert "site-2 20 – – 20 9" in shown
    assert "No segmentation score yet" in shown
    assert "No fusion score yet" in shown
    assert 'id="pictures"' not in text


def test_pictures_are_on_the_page_only_from_the_run_folder_and_are_said_to_be_the_sites_own(volumes_text):
    sources = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', volumes_text)
    shown = {(alt.rpartition(", ")[2], b64decode(content)[len(PNG) :]) for alt, content in sources}
    assert shown == {("site-1", b"one"), ("site-1", b"two"), ("site-2", b"four")}
    assert volumes_text.count("<img") == len(sources) == 3
    assert "img-src data:" in volumes_text
    part = section(volumes_text, "pictures")
    assert "no picture was sent. They are on this page only because this machine holds all sites" in part
    assert "site-2 Truth and prediction. Arm local-site-2" in part
    assert "sites/pictures/site-1/federated/field.png" in section(volumes_text, "provenance")


def test_the_page_with_pictures_fetches_nothing(volumes_text):
    assert not re.search(r"https?:|@import|<script|<link|<iframe", volumes_text, re.IGNORECASE)
    assert all(
        found.startswith("data:image/png;base64,") for found in re.findall(r'\ssrc\s*=\s*"([^"]*)"', volumes_text)
    )


@pytest.mark.usefixtures("undrawn")
def test_hostile_names_of_folders_and_modalities_stay_text(tmp_path):
    hostile = HOSTILE.replace("/", "")
    folder = write_volumes(tmp_path / "study", pictures={f"{hostile}/federated/fusion.png": PNG})
    tree = json.loads((folder / "sites.json").read_text())
    tree["sites"][0]["modalities"] = {HOSTILE: 3}
    (folder / "sites.json").write_text(json.dumps(tree))
    text = page.write(folder).read_text()
    assert "<script" not in text
    assert hostile in section(text, "pictures")
    assert HOSTILE in section(text, "volumes")


def test_new_phases_are_marked_in_the_losses_and_are_no_incidents(volumes, volumes_text):
    run = read_run(volumes)
    assert panels.phases(run, "federated") == tuple((at, name) for name, at in PHASES.items())
    total = panels.losses(run)[0]
    assert "features from round 1, fusion from round 3, segmentation from round 5" in total.note
    assert [drawn.svg.count("stroke-dasharray") for drawn in total.figures] == [2, 2, 2]
    assert ">fusion<" in total.figures[0].svg
    assert ">segmentation<" not in total.figures[0].svg  # there is no room over its one round
    assert "phase" not in section(volumes_text, "refusals")
    assert not any("Dashed" in part.note for part in panels.losses(run)[1:])


def test_limits_fit_what_was_measured(text, volumes_text):
    assert "There is no true fused image" in section(volumes_text, "limits")
    assert "small probe" not in section(volumes_text, "limits")
    assert "small probe" in section(text, "limits")
    assert "true fused image" not in section(text, "limits")
