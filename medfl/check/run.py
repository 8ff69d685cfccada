"""All checks in their order; what one cannot go on with, the next ones do without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medfl import config
from medfl.check import budget, fit, host, images, keys, listing, look, network, people, privacy, targets
from medfl.check.finding import Finding
from medfl.check.fit import Fit
from medfl.check.listing import Listed, Listing
from medfl.check.look import Rules, Seen
from medfl.check.scope import Scope
from medfl.data.folder import Folder
from medfl.errors import MedflError
from medfl.study import Node

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Verdict:
    """What became of one row's file."""

    name: str
    split: str
    text: str  # "" where it can be used
    seen: Seen


@dataclass(frozen=True)
class Result:
    """Everything that is shown."""

    scope: Scope
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    fit: Fit | None


def run(scope: Scope, progress: Progress) -> Result:
    """Never raises for what it finds."""
    progress("this machine and the network", 0, 1)
    around, speed = network.findings(scope.invitation, offline=scope.offline)
    found = [*scope.findings, *around, *keys.findings(scope)]
    listed, problem = _listing(scope.study.data)
    found += host.findings(scope, _bytes(scope.study.data, listed))
    if problem:
        return Result(scope, (*found, *problem), (), None)
    if listed is None:
        found.append(Finding("data", "list", "pass", "These data are not files of this site."))
        measured, fits = _fit(scope, None, [], [], speed, progress)
        return Result(scope, (*found, *fits), (), measured)
    data, verdicts, rows, splits = _data(scope, listed, progress)
    people_ = {listed.patients[row] for row in rows if splits[row] == "train"}
    cost = budget.findings(scope, len(people_))
    measured, fits = _fit(scope, listed, rows, splits, speed, progress)
    return Result(scope, (*found, *data, *cost, *fits), verdicts, measured)


def _listing(node: Node) -> tuple[Listing | None, list[Finding]]:
    why, fix = "Without it no image is found.", "Correct the data entry of site.yaml."
    try:
        listed = listing.read(config.build(node))
    except MedflError as error:
        return None, [Finding("data", "list", "fail", "The data list cannot be used.", why, fix, {}, [str(error)])]
    except (UnicodeDecodeError, OSError) as error:
        fix = "Save it as CSV in UTF-8, readable for this user."
        items = [type(error).__name__]
        return None, [Finding("data", "list", "fail", "The data list cannot be read.", why, fix, {}, items)]
    return listed, []


def _bytes(node: Node, listed: Listing | None) -> float:
    """Of all images on their grid."""
    count = int(node.get("count") or 0) if listed is None else len(listed.rows) * int(node.get("slabs") or 1)
    dims, size = int(node.get("spatial_dims") or 2), int(node.get("size") or 64)
    depth = int(node.get("depth") or size)
    return 4.0 * count * int(node.get("channels") or 1) * size * size * (depth if dims == 3 else 1)


def _data(
    scope: Scope, listed: Listing, progress: Progress
) -> tuple[list[Finding], tuple[Verdict, ...], list[int], list[str]]:
    """Findings on the images, the verdict on each file, the rows that can be used, and the split of every row."""
    threads, seed = scope.study.training.threads, scope.study.seed
    files = listed.files
    paths = [listed.path(file.name) for file in files]
    seen = look.every(paths, _rules(listed), threads=threads, progress=_named(progress, "reading images"))
    looked = list(zip(files, seen, strict=True))
    refused = {file.row: one.text for file, one in looked if one.check}
    rows = [row for row in range(len(listed.rows)) if row not in refused and _has_image(listed, row)]
    drawn = []
    if "mask" in listed.columns or len(listed.images) > 1:
        drawn = targets.every(listed, rows, threads=threads, progress=_named(progress, "reading masks"))
        refused |= {one.row: one.text for one in drawn if one.text}
        rows = [row for row in rows if row not in refused]
    splits, _ = people.splits_of(listed, seed)
    marks = []
    for done, (file, path) in enumerate(zip(files, paths, strict=True), start=1):
        marks.append((file.name, privacy.marks(path)))
        progress("looking for names and dates", done, len(files))
    found = [
        _list(listed),
        *images.findings(listed, looked),
        images.duplicates(listed, looked, splits),
        *people.findings(listed, rows, least=scope.site.policy.least_images, seed=seed),
        *images.masks(listed, drawn),
        *privacy.findings(listed, marks),
    ]
    return found, _verdicts(looked, refused, splits), rows, splits


def _list(listed: Listing) -> Finding:
    empty = [f"row {row + 2}" for row in range(len(listed.rows)) if not _has_image(listed, row)]
    counts = {"rows": len(listed.rows), "empty": len(empty)}
    if empty and isinstance(listed.source, Folder):
        what, why = f"{len(empty)} of {len(listed.rows)} rows name no image", "Training stops at the first one."
        return Finding("data", "list", "fail", what, why, "Fill or remove the rows.", counts, empty)
    return Finding("data", "list", "pass", f"the data list has {len(listed.rows)} rows", counts=counts)


def _has_image(listed: Listing, row: int) -> bool:
    return any(listed.rows[row][column] for column in listed.images)


def _rules(listed: Listing) -> Rules:
    source = listed.source
    if not isinstance(source, Folder):  # the subject as a whole is normalised later
        return Rules(3, 1, "range", None)
    window = (float(source.window[0]), float(source.window[1])) if source.window else None
    return Rules(source.spatial_dims, source.channels, source.normalize, window)


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, count: progress(what, done, count)


def _verdicts(
    looked: Sequence[tuple[Listed, Seen]], refused: dict[int, str], splits: Sequence[str]
) -> tuple[Verdict, ...]:
    found = [
        Verdict(file.name, splits[file.row], one.text if one.check else refused.get(file.row, ""), one)
        for file, one in looked
    ]
    return tuple(sorted(found, key=lambda verdict: (not verdict.text, verdict.name)))


def _fit(
    scope: Scope, listed: Listing | None, rows: Sequence[int], splits: Sequence[str], speed: float | None,
    progress: Progress,
) -> tuple[Fit | None, list[Finding]]:  # fmt: skip
    if listed is not None and not rows:
        what = "Not tried: no image can be used."
        return None, [Finding("fit", "step", "warn", what, "", "Repair the images first.", {"seconds": 0})]
    progress("a training step on these data", 0, 1)
    try:
        if listed is None:
            measured = fit.run(scope, None, [], [], train=None)
        else:
            chosen = fit.sample(rows, splits, people.labels_of(listed)[0], fit.number(scope.study))
            train = sum(splits[row] == "train" for row in rows) * int(scope.study.data.get("slabs") or 1)
            measured = fit.run(scope, listed, chosen, splits, train=train)
    except Exception as error:  # whatever stops this step would stop a round; the check still has to be told
        return None, [fit.failed(error)]
    return measured, fit.findings(scope, measured, speed)
