"""The page's sections as plain values for the template: numbers formatted, absences as sentences."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from medfl.report import codebooks, finetuned, panels, remarks, scores, sentences, summary, wire
from medfl.report.cells import NONE, Section
from medfl.report.summary import Comparison, Estimate, bounds
from medfl.report.tables import COUNTS, FILES, Run, ordered_sites, study_node
from medfl.report.words import OF_FINDING, TITLES, TUNED
from medfl.run_folder import CLOSED

CALIBRATION = {
    "site_accuracy": "Site recognised from raw intensities (balanced accuracy)",
    "chance": "Chance level of that",
    "label_variation": "Distance of a site's label mix from the pooled one",
    "effective_sites": "Effective number of sites, by size",
}
DRAWN = ("medfl.data.phantom.", "medfl.data.brain.")  # data that a program makes up
LIMITS = {
    "seed": "One run with one seed. The intervals cover the drawing of test patients only; another seed, "
    "split or choice of sites can move the results by more.",
    "drawn": "The images were drawn by a program. The results show that the system works, not that it helps patients.",
    "simulated": "The sites are simulated from one data set. Real hospitals differ in more ways than these.",
    "independent": "Intervals of means and differences treat the cells as independent. Arms share their test "
    "patients, so the differences are known somewhat better than stated.",
    "segmentation": "Segmentation is scored where there are masks, by the network as it was trained.",
    "fusion": "There is no true fused image. Fusion scores say what of the sources it keeps, not whether it is better "
    "to read.",
    "frozen": "Scores of linear probe and kNN are of a frozen encoder with a small probe, trained on each site's own "
    "labels. They are not the performance of a fine-tuned model.",
    "tuned": "Fine-tuned networks saw each site's training labels, for as many steps as the study says and no more; "
    "longer or better tuned training may change the order of the arms.",
    "findings": "Where images have several findings, scores are means over the findings, each weighing the same. A "
    "finding that all of a site's test images have, or none, is left out of that site's mean.",
    "counts": "Curves of predictions are drawn from counts in bins, which are merged where few images fall; areas "
    "under them differ a little from the scores in the tables.",
    "central": "Central training is a reference, not a bound: federated training may pass it.",
    "record": "What left each site is the program's own record. Updates can carry traces of the training "
    "images; keeping them within allowed roles is no formal guarantee such as differential privacy.",
    "research": "Research software: not for diagnosis or treatment.",
}


def study(run: Run, main: Comparison) -> Section:
    """The card at the top: result, key figures, what was studied, how far it is, and alarms."""
    tiles = [
        {"title": TITLES[arm], "value": f"{known.value:.3f}", "interval": bounds(known), "arm": arm}
        for arm in main.arms
        if (known := main.mean(arm))
    ]
    said = wire.verdict(run)
    collapse = panels.collapse_words(run)
    return {
        "sentence": sentences.sentence(main),
        "remarks": [text for text in (*sentences.remarks(main, run.transfers), finetuned.remark(run, main)) if text],
        "tiles": tiles,
        "metric": f"Mean {summary.name_of(main)}",
        "facts": _facts(run) + _stages(run),
        "alarms": [text for text in (said.text,) if said.state == "alarm"]
        + [text for text in (collapse,) if text.startswith("Warning")]
        + [text for text in (remarks.collapse_alarm(run),) if text]
        + codebooks.index_alarms(run),
        "notes": [f"{name} is not there ({FILES[name]})." for name in run.missing if _expected(run, name)]
        + list(run.problems),
    }


def sites(run: Run) -> Section:
    """Images, classes and shift of each site."""
    names = sorted({name for site in run.sites for name in site.classes}, key=_natural)
    rows = [
        {
            "name": site.name,
            "splits": [f"{count:,}" for count in (site.train, site.val, site.test)],
            "profile": site.profile or NONE,
            "held_out": site.held_out,
            "shares": [(names.index(name), name, count) for name, count in _by_name(site.classes) if count],
        }
        for site in run.sites
    ]
    calibration = [(CALIBRATION.get(k, k.replace("_", " ")), _two_digits(v)) for k, v in run.calibration.items()]
    return {"rows": rows, "classes": names, "calibration": calibration, "others": ordered_sites(run)}


def crossed(run: Run) -> Section:
    """What left each site and what reached it."""
    said = wire.verdict(run)
    found = wire.flows(run)
    heights = Counter(flow.site for flow in found)
    rows = [
        {
            "site": flow.site,
            "height": 0 if index and found[index - 1].site == flow.site else heights[flow.site],
            "direction": "left" if flow.direction == "up" else "arrived",
            "up": flow.direction == "up",
            "role": flow.role.replace("_", " ") or NONE,
            "words": wire.WORDS.get(flow.role, ""),
            "alarm": flow.direction == "up" and flow.role in wire.STAYS,
            "names": flow.names,
            "per_round": NONE if flow.per_round is None else wire.size(flow.per_round),
            "total": wire.size(flow.bytes),
        }
        for index, flow in enumerate(found)
    ]
    return {
        "state": said.state,
        "text": said.text,
        "rows": rows,
        "simulated": bool(run.sites),
        "metrics": wire.metrics_up(run.crossings),
        "up": wire.size(sum(flow.bytes for flow in found if flow.direction == "up")),
        "down": wire.size(sum(flow.bytes for flow in found if flow.direction == "down")),
    }


def refusals(run: Run) -> Section:
    """Replies that did not count and other incidents, with reasons, and how many sites each round had."""
    rows = [e for e in run.events if e.name == "refused" or (e.reason and e.name not in (remarks.NAME, panels.PHASE))]
    counts = [
        f"{value:.0f}"
        for (name, arm, _), line in run.lines.items()
        if (name, arm) == (CLOSED, "federated")
        for _, value in line
    ]
    span = sorted(set(counts), key=int)
    return {
        "rows": [
            (e.round, e.stage, e.arm or NONE, e.site or NONE, e.name, e.reason or "no reason recorded") for e in rows
        ],
        "rounds": len(counts),
        "sites": " to ".join(span if len(span) < 2 else (span[0], span[-1])),
    }


def provenance(run: Run) -> Section:
    """Versions, command, seed, hashes, and the resolved study."""
    given = run.config.get("provenance")
    times = sorted(e.time for e in run.events if e.time)
    facts = [(str(k), _plain(v)) for k, v in given.items()] if isinstance(given, dict) else []
    facts += [("seed", _plain(run.config["seed"]))] if "seed" in run.config else []
    facts += [("first event", times[0]), ("last event", times[-1])] if times else []
    return {"facts": facts, "encoder": _encoder(run), "hashes": dict(run.hashes), "config": run.config_text}


def limits(run: Run, main: Comparison) -> list[str]:
    """What the numbers on this page do not say."""
    measured = {score.protocol for score in run.scores}
    few = [site for site in main.compared if _wide(main.cells.get(("federated", site)))]
    found = {
        LIMITS["seed"]: True,
        f"Few test images: the interval is wider than 0.2 at {', '.join(few)}.": bool(few),
        LIMITS["drawn"]: str(study_node(run, "data").get("_target_", "")).startswith(DRAWN),
        LIMITS["simulated"]: bool(run.sites),
        LIMITS["segmentation"]: "segmentation" in measured,
        LIMITS["fusion"]: "fusion" in measured,
        LIMITS["frozen"]: not measured or bool(measured - {*scores.VOLUMES, *TUNED}),
        LIMITS["tuned"]: bool(measured & {*TUNED}),
        LIMITS["findings"]: any(OF_FINDING.fullmatch(score.metric) for score in run.scores),
        LIMITS["counts"]: bool(run.counts),
        LIMITS["record"]: study_node(run, "privacy").get("mechanism") in (None, "none"),
    }
    always = [text for text in LIMITS.values() if text not in found]
    return [text for text, holds in found.items() if holds] + always


def _expected(run: Run, file: str) -> bool:
    """Whether a study lacks the file: counts are of classes alone, and a site may be asked for none."""
    if file != COUNTS:
        return True
    return study_node(run, "evaluation").get("counts", COUNTS) is not None and any(
        s.metric == "accuracy" for s in run.scores
    )


def _encoder(run: Run) -> list[tuple[str, str]]:
    listed = run.encoder.get("roles")
    roles = [node for node in listed if isinstance(node, dict)] if isinstance(listed, list) else []
    counted = Counter(str(node.get("role")).replace("_", " ") for node in roles)
    facts = [("SHA-256", str(run.encoder["sha256"]))] if "sha256" in run.encoder else []
    facts += [(name, _plain(run.encoder[name])) for name in ("architecture", "input") if name in run.encoder]
    counts = ", ".join(f"{count} {role}" for role, count in counted.items())
    return facts + [("tensors by role", counts)] * bool(roles)


def _facts(run: Run) -> list[tuple[str, str]]:
    rounds, training = study_node(run, "rounds"), study_node(run, "training")
    unseen = len(run.unseen)
    count = len(run.sites or ordered_sites(run)) - unseen
    done = panels.rounds_of(run).get("federated", 0)
    facts = {
        "Method": _named(study_node(run, "method"), ()),
        "Encoder": _named(_architecture(run), ("blocks", "base_width", "levels", "se_ratio")),
        "Data": _data(study_node(run, "data")),
        "Sites": f"{count}" + f", and {unseen} unseen" * bool(unseen) if count else "",
        "Split into sites": ", ".join(_values(study_node(run, "sites"), ("alpha", "quantity", "severity", "held_out"))),
        "Federated rounds": f"{done} of {rounds['count']} done" if "count" in rounds else f"{done} done",
        "Steps per site and round": _plain(training["steps"]) if "steps" in training else "",
        "Images per step": _plain(training["batch_size"]) if "batch_size" in training else "",
        "Seed": _plain(run.config["seed"]) if "seed" in run.config else "",
    }
    return [(name, text or "not recorded") for name, text in facts.items()]


def _architecture(run: Run) -> Mapping[str, Any]:
    """Of the trained encoder; before there is one, of the study's, where the method takes that."""
    known, asked = run.encoder.get("architecture"), study_node(run, "method").get("encoder")
    return known if isinstance(known, dict) else asked if isinstance(asked, dict) else {}


def _stages(run: Run) -> list[tuple[str, str]]:
    """How far the run is, from the files alone."""
    done = panels.rounds_of(run)
    behind = _behind(run, done)
    state = f"not finished: {', '.join(behind)}" if behind else "done"
    frozen = {score.arm.partition(":")[0] for score in run.scores if score.protocol not in TUNED}
    tuned = [title.lower() for name, title in TUNED.items() if any(s.protocol == name for s in run.scores)]
    return [
        ("Pretraining", state if done else "no round yet"),
        *([("Fine-tuning", ", ".join(tuned) or "nothing evaluated yet")] if finetuned.asked(run) else []),
        ("Evaluated", ", ".join(title.lower() for arm, title in TITLES.items() if arm in frozen) or "nothing yet"),
        ("Transfer matrix", "done" if run.transfers else "not yet"),
    ]


def _behind(run: Run, done: Mapping[str, int]) -> list[str]:
    """Arms that have rounds to go, and kinds of arms that the study names and that have not begun."""
    wanted, listed = study_node(run, "rounds").get("count"), run.config.get("arms")
    begun = {arm.partition(":")[0] for arm in done}
    ahead = [str(arm) for arm in listed if arm not in (*begun, "random")] if isinstance(listed, list) else []
    return [arm for arm, count in done.items() if isinstance(wanted, int) and count < wanted] + ahead


def _data(node: Mapping[str, Any]) -> str:
    """ "MedMNIST adrenalmnist3d, 3D, 1 channel, 28 pixels wide"."""
    named = f"{_named(node, ())} {node.get('name') or ''}".strip()
    parts = [named] if named else []
    parts += [f"{node['spatial_dims']}D"] if "spatial_dims" in node else []
    parts += [f"{node['channels']} channel{'s' * (node['channels'] != 1)}"] if "channels" in node else []
    return ", ".join(parts + ([f"{node['size']} pixels wide"] if "size" in node else []))


def _wide(cell: Estimate | None) -> bool:
    return cell is not None and cell.low is not None and cell.high is not None and cell.high - cell.low > 0.2


def _named(node: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """The class that a node names, and those of its arguments that are shown."""
    return (
        ", ".join([str(node["_target_"]).rpartition(".")[2], *_values(node, arguments)]) if "_target_" in node else ""
    )


def _values(node: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_plain(node[name])}" for name in names if node.get(name) is not None]


def _two_digits(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{str(k).replace('_', ' ')} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _by_name(classes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(classes.items(), key=lambda item: _natural(item[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers inside names in the order of their size."""
    return [(int(part or 0), text) for part, text in re.findall(r"(\d*)(\D*)", name)]
