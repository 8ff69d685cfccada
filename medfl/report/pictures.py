"""Pictures that sites of a simulation keep below the run folder: what of them the report shows."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from medfl.evaluation.pictures import ATTENTION, CODEBOOK, EMBEDDING, FIELD, FOLDER, FUSION, SEGMENTATION
from medfl.report.words import TUNED

PLACE = Path("sites") / FOLDER  # in the run folder
CAPTIONS = {
    FUSION: "Sources, fused image and the mean of the sources",
    SEGMENTATION: "Truth and prediction",
    FIELD: "Where matching takes the fused image from, and how far",
    EMBEDDING: "Test images by the encoder's features",
    ATTENTION: "What speaks for the class that is found (Grad-CAM)",
    CODEBOOK: "Codes of the places of an image; equal colours are equal codes",
}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
FEDERATED = "federated"


@dataclass(frozen=True)
class Picture:
    """One PNG of a site. `file`: its path in the run folder."""

    site: str
    arm: str  # as in the name of its folder, such as "local-site-1"
    name: str
    file: str
    content: bytes


def read_pictures(run_dir: Path) -> tuple[Picture, ...]:
    """Of each site one of each name: of the federated arm, else of what was trained from it, else of the first by name.

    What is no PNG is left out.
    """
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in (run_dir / PLACE).glob("*/*/*.png"):
        found[path.parents[1].name][path.name].append(path)
    shown = [
        _picture(run_dir, min(named[name], key=_rank))
        for _, named in sorted(found.items())
        for name in CAPTIONS
        if name in named
    ]
    return tuple(picture for picture in shown if picture.content.startswith(SIGNATURE))


def arm_words(arm: str) -> str:
    """Of the name of an arm's folder: "federated", "federated, fine-tuned at each site", "local-site-2"."""
    protocol = next((known for known in TUNED if arm.startswith(f"{known}-{FEDERATED}")), "")
    return f"{FEDERATED}, {TUNED[protocol][0].lower()}{TUNED[protocol][1:]}" if protocol else arm


def _rank(path: Path) -> tuple[int, str]:
    arm = path.parent.name
    tuned = [place for place, protocol in enumerate(TUNED, start=1) if arm.startswith(f"{protocol}-{FEDERATED}")]
    return (0 if arm == FEDERATED else min(tuned, default=len(TUNED) + 1)), arm


def _picture(run_dir: Path, path: Path) -> Picture:
    file = path.relative_to(run_dir).as_posix()
    return Picture(path.parents[1].name, path.parent.name, path.name, file, path.read_bytes())
