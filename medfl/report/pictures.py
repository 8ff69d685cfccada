"""Pictures that sites of a simulation keep below the run folder: what of them the report shows."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from medfl.evaluation.pictures import FIELD, FOLDER, FUSION, SEGMENTATION

PLACE = Path("sites") / FOLDER  # in the run folder
CAPTIONS = {
    FUSION: "Sources, fused image and the mean of the sources",
    SEGMENTATION: "Truth and prediction over the fused image",
    FIELD: "Where matching takes the fused image from, and how far",
}
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """One PNG of a site. `file`: its path in the run folder."""

    site: str
    arm: str  # as in the name of its folder, such as "local-site-1"
    name: str
    file: str
    content: bytes


def read_pictures(run_dir: Path) -> tuple[Picture, ...]:
    """Of each site those of the federated arm, or else of the first arm by name; what is no PNG is left out."""
    arms: dict[str, set[str]] = defaultdict(set)
    for path in (run_dir / PLACE).glob("*/*/*.png"):
        arms[path.parents[1].name].add(path.parent.name)
    shown = {site: "federated" if "federated" in found else min(found) for site, found in sorted(arms.items())}
    paths = [run_dir / PLACE / site / arm / name for site, arm in shown.items() for name in CAPTIONS]
    found = [_picture(run_dir, path) for path in paths if path.is_file()]
    return tuple(picture for picture in found if picture.content.startswith(SIGNATURE))


def _picture(run_dir: Path, path: Path) -> Picture:
    file = path.relative_to(run_dir).as_posix()
    return Picture(path.parents[1].name, path.parent.name, path.name, file, path.read_bytes())
