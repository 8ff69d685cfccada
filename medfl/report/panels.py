"""Curves over the rounds, from the events of metrics.jsonl: losses, collapse monitors, pace."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from medfl.report.figures import ARM_INKS, Panel, Series, curves, limits_of
from medfl.report.tables import Run, ordered_sites
from medfl.report.words import TITLES, TUNED, Tuned, taken_apart
from medfl.run_folder import CLOSED

GROUPS = {"federated": "Federated", "local": "Each site alone", "central": "Central"}
PHASE = "phase"  # of the events; the reason is the phase's name
POINTS = 1600  # of one panel; longer runs are drawn with every k-th round
COLOURS = 8  # lines that can be told apart; with more sites they are all grey
MONITORS = {  # event -> (heading, unit, how to read it)
    "monitor/rankme": (
        "RankMe",
        "effective rank",
        "Directions that the embeddings use. A fall towards 1 is a collapse.",
    ),
    "monitor/embedding_std": (
        "Embedding spread",
        "standard deviation",
        "Over the images, mean of all coordinates. 0 means that every image looks the same.",
    ),
    "monitor/alignment": (
        "Alignment",
        "squared distance",
        "Between two views of one image. Lower is closer; 0 together with no spread is a collapse.",
    ),
    "monitor/uniformity": (
        "Uniformity",
        "log potential",
        "Of pairs of images. Lower is more evenly spread; 0 is a collapse.",
    ),
    "features/coding_rate": (
        "Coding rate",
        "nats",
        "How much room the features fill, over all sites and at each. A fall towards 0 is a collapse.",
    ),
    "features/site_separability": (
        "Site separability",
        "nats",
        "Coding rate of all sites together minus the mean of the sites' own. At 0 sites cannot be told apart by "
        "spread; it falls as the encoder forgets the scanner. Read its change, beside that of the coding rate: its "
        "level also rises with the rate and where sites have few images.",
    ),
}
BETWEEN_SITES = ("features/site_separability",)  # 0 by definition in an arm of one site


@dataclass(frozen=True)
class Drawn:
    """A figure, its caption, and how to read it where its gallery does not say."""

    caption: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Figures of one quantity on one scale."""

    heading: str
    note: str
    figures: tuple[Drawn, ...]


def losses(run: Run) -> list[Gallery]:
    """One gallery per loss term, `total` first; one figure per kind of arm."""
    names = {name.removeprefix("loss/") for name, _, _ in run.lines if name.startswith("loss/")}
    order = sorted(names, key=lambda name: (name != "total", name))
    note = _phase_words(run)
    found = [
        _gallery(run, f"loss/{name}", "Loss" if name == "total" else name.replace("_", " "), "", note * (not index))
        for index, name in enumerate(order)
    ]
    return [gallery for gallery in found if gallery.figures]


def tuned_losses(run: Run) -> list[Gallery]:
    """The loss of fine-tuning with the most labels that were used, one figure per protocol."""
    points: dict[Tuned, dict[int, list[float]]] = {}
    for event in run.events:
        tuned = taken_apart(event.arm)
        if tuned and (event.name, event.site) == ("loss/total", "") and math.isfinite(event.value):
            points.setdefault(tuned, {}).setdefault(event.round, []).append(event.value)
    panels = [Panel(title, "", _tuned_lines(points, protocol)) for protocol, title in TUNED.items()]
    drawn = tuple(draw(panel) for panel in panels if panel.series)
    return [Gallery("Loss of fine-tuning", "One line for each encoder, the mean of its trainings.", drawn)] * bool(
        drawn
    )


def _tuned_lines(points: Mapping[Tuned, Mapping[int, Sequence[float]]], protocol: str) -> tuple[Series, ...]:
    most = max((float(key.fraction) for key in points if key.protocol == protocol), default=1.0)
    shown = [key for key in points if key.protocol == protocol and float(key.fraction) == most]
    means = {key.encoder: {at: fmean(values) for at, values in sorted(points[key].items())} for key in shown}
    return tuple(
        Series(TITLES[arm], tuple(means[arm]), tuple(means[arm].values()), ARM_INKS[arm], strong=arm == "federated")
        for arm in TITLES
        if arm in means
    )


def phases(run: Run, kind: str) -> tuple[tuple[int, str], ...]:
    """First round and name of each phase in arms of this kind; nothing where all training is one phase."""
    told = {(e.round, e.reason) for e in run.events if e.name == PHASE and e.arm.partition(":")[0] == kind}
    return tuple(sorted(told))


def monitors(run: Run) -> list[Gallery]:
    """One gallery per collapse monitor that was recorded."""
    found = [_gallery(run, name, *words) for name, words in MONITORS.items()]
    return [gallery for gallery in found if gallery.figures]


def pace(run: Run) -> list[Gallery]:
    """Seconds per round, each site's weight in the average and the size of its update."""
    arms = sorted({arm for name, arm, _ in run.lines if name == "round/seconds"}, key=_arm_order)
    inks = {"federated": "accent", "central": "ink"}
    rounds = tuple(
        Series(arm.removeprefix("local:"), *line, inks.get(arm, "muted"), strong=arm == "federated")
        for arm in arms
        if (line := line_of(run, "round/seconds", arm, ""))
    )
    panels = [
        Panel("Whole round, by arm", "seconds", rounds),
        Panel("Federated, time at each site", "seconds", _series(run, "site/seconds", "federated")),
        Panel("Federated, weight in the average", "share", _series(run, "round/weight", "federated")),
        Panel("Federated, size of the update", "L2 norm", _series(run, "round/update_norm", "federated")),
    ]
    drawn = tuple(draw(panel) for panel in panels if panel.series)
    return [Gallery("Time, weight and size of the updates", "", drawn)] if drawn else []


def collapse_words(run: Run) -> str:
    """Whether the spread of the embeddings fell below a tenth of where it began, in any arm or site."""
    lines = {
        f"{arm} {site}".strip(): line
        for name, arm, site in sorted(run.lines)
        if name == "monitor/embedding_std" and (line := line_of(run, name, arm, site))
    }
    if not lines:
        return "The spread of the embeddings was not recorded, so a collapse cannot be ruled out here."
    fallen = [name for name, (_, values) in lines.items() if not values[-1] >= 0.1 * values[0]]
    if fallen:
        names = ", ".join(fallen)
        return f"Warning: the spread of the embeddings fell below a tenth of its first value: {names}."
    return "In no arm and at no site did the spread of the embeddings fall below a tenth of its first value."


def rounds_of(run: Run) -> dict[str, int]:
    """Finished rounds of each arm in the pretrain stage; refusals and remarks of one may come before it fails."""
    found: dict[str, int] = {}
    for event in run.events:
        if (event.stage, event.name) == ("pretrain", CLOSED):
            found[event.arm] = max(found.get(event.arm, 0), event.round)
    return {arm: found[arm] for arm in sorted(found, key=_arm_order)}


def line_of(run: Run, name: str, arm: str, site: str) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Rounds and values of the pretrain stage; None when there is no finite value."""
    points = run.lines.get((name, arm, site), ())
    if not any(math.isfinite(value) for _, value in points):
        return None
    return tuple(at for at, _ in points), tuple(value for _, value in points)


def draw(panel: Panel, note: str = "") -> Drawn:
    """The panel under its own title."""
    return Drawn(panel.title, curves(panel), note)


def thinned(lines: Sequence[Series]) -> tuple[Series, ...]:
    """Every k-th point, counted from the last one."""
    step = _step(lines)
    return tuple(
        Series(
            line.label,
            line.rounds[::-1][::step][::-1],
            line.values[::-1][::step][::-1],
            line.ink,
            line.strong,
        )
        for line in lines
    )


def _gallery(run: Run, name: str, heading: str, unit: str, note: str) -> Gallery:
    kinds = ("federated",) if name in BETWEEN_SITES else tuple(GROUPS)
    groups = {GROUPS[kind]: lines for kind in kinds if (lines := _series(run, name, kind))}
    limits = limits_of(tuple(groups.values()))
    if limits and name in BETWEEN_SITES:
        limits = min(0.0, limits[0]), limits[1]
    skipped = max((_step(lines) for lines in groups.values()), default=1)
    thin = f" At least every {skipped}th round is drawn." if skipped > 1 else ""
    marks = {GROUPS[kind]: phases(run, kind) if name.startswith("loss/") else () for kind in kinds}
    drawn = tuple(draw(Panel(title, unit, thinned(lines), limits, marks[title])) for title, lines in groups.items())
    return Gallery(heading, f"{note}{thin}", drawn)


def _phase_words(run: Run) -> str:
    begun = max((phases(run, kind) for kind in GROUPS), key=len)
    listed = ", ".join(f"{name} from round {at}" for at, name in begun)
    text = f"Dashed: a new phase ({listed}). Each phase has its own loss; levels compare within one phase only."
    return text if begun else ""


def _series(run: Run, name: str, kind: str) -> tuple[Series, ...]:
    """The lines of one kind of arm: the aggregate first, then its sites in their order.

    An arm of one site has one line: the site's, or its aggregate where only that was written.
    """
    keys = {(arm, site) for known, arm, site in run.lines if known == name and arm.partition(":")[0] == kind}
    order = ordered_sites(run)
    few = len(order) <= COLOURS
    inks = {site: f"s{index + 1}" if few else "muted" for index, site in enumerate(order)}
    found = []
    for arm, site in sorted(keys, key=lambda key: (key[0], order.index(key[1]) if key[1] in order else -1)):
        owner = arm.partition(":")[2]
        label = owner or site or ("all sites" if kind == "federated" else arm)
        strong = label not in inks
        line = line_of(run, name, arm, site)
        twice = kind != "federated" and not site and any(other == arm and known for other, known in keys)
        if line and not twice:
            found.append(Series(label, *line, "ink" if strong else inks[label], strong))
    return tuple(found)


def _step(lines: Sequence[Series]) -> int:
    return math.ceil(sum(len(line.rounds) for line in lines) / POINTS)


def _arm_order(arm: str) -> tuple[int, str]:
    kind = arm.partition(":")[0]
    return (list(GROUPS).index(kind) if kind in GROUPS else len(GROUPS), arm)
