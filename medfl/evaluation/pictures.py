"""Pictures of a site's own test images, drawn and kept at the site for the people there. They never travel."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medfl.data.sample import SiteData, Split, labelled, present
from medfl.evaluation import attention, code_maps, embedding, volume_slices
from medfl.evaluation.slices import write_png
from medfl.evaluation.volumes import windowed
from medfl.methods.base import Method
from medfl.study import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "pictures"  # in a site's state folder
FUSION, SEGMENTATION, FIELD = "fusion.png", "segmentation.png", "field.png"
EMBEDDING, ATTENTION, CODEBOOK = "embedding.png", "attention.png", "codebook.png"
SUBJECTS = 3  # images of a figure
LOOKED_AT = 6  # images of `ATTENTION`
CODED = 32  # most images that find their codes together: target networks normalise by the batch
RGB = 3  # channels


def folder_of(state_dir: Path, site: str, arm: str) -> Path:
    """Where a site keeps its pictures of an arm."""
    return state_dir / FOLDER / site / arm.replace(":", "-")


def wanted(which: str, arm: str, arms: Sequence[str]) -> bool:
    """Whether a site draws pictures of an arm, by `evaluation.pictures`.

    Args:
        which: federated | all | none. Federated: of the federated encoder, and of what is trained further from it with
            all labels; of every arm in a study without a federated one.
        arm: "federated", "local:site-1", or of a task "finetune:federated:site-1:1".
        arms: of the study's encoders.
    """
    if which != "federated" or "federated" not in arms:
        return which != "none"
    parts = arm.split(":")
    return arm == "federated" or (parts[1:2] == ["federated"] and parts[-1] == "1")


def draw(
    method: Method, data: SiteData, state_dir: Path, device: torch.device, *, arm: str, plan: Evaluation
) -> list[Path]:
    """Draw what can be drawn of test images; returns the files, readable for this user alone.

    Of a network that fuses modalities: `FUSION`, `SEGMENTATION` and `FIELD`. Of any other encoder: `EMBEDDING`; with a
    classifier `ATTENTION`; with a segmenter `SEGMENTATION`; with codebooks that hold something, `CODEBOOK`. Every arm
    is shown on the same images; no patient's id is in a picture. The method is left as it is.

    Args:
        method: in evaluation mode.
        state_dir: of this site.
        plan: as for the scores.

    Raises:
        ResourceError: the disk is full.
    """
    if not len(data.test):
        return []
    drawn = _fused if hasattr(method.encoder, "fuse") else _encoded
    figures = drawn(method, data, device, plan)
    folder = _private(folder_of(state_dir, data.name, arm))
    return [write_png(figure, folder / name) for name, figure in figures.items()]


@torch.no_grad()
def _fused(method: Method, data: SiteData, device: torch.device, plan: Evaluation) -> "dict[str, Figure]":
    """Of up to three test images; `FUSION` and `FIELD` need two modalities, `SEGMENTATION` takes labelled ones first.

    Args:
        method: its encoder has `fuse`: (B, M, *S) -> (B, 1, *S), and `segment` -> logits (B, 4, *S).
            With `matching` it has `match`: (B, M, *S) -> a result with `field` u (B, d, *S), in voxels.
        plan: images are fused and segmented by the windows of the scores, and matched in the middle one.
    """
    paired, segmented = _paired(data.test), _labelled_first(data.test)
    images = {row: data.test.images[row : row + 1] for row in dict.fromkeys([*paired, *segmented])}  # (1, M, *S) each
    network: Any = method.encoder
    fused = {row: windowed(network.fuse, image.to(device), plan)[0].cpu() for row, image in images.items()}  # (1, *S)
    figures: dict[str, Figure] = {}
    if paired:
        sources = {row: images[row][0] for row in paired}
        whole = {row: fused[row][0] for row in paired}
        figures[FUSION] = volume_slices.fusion(sources, whole, data.modalities, data.spacing).figure
    if segmented:
        figures[SEGMENTATION] = _segmented(network, {row: fused[row] for row in segmented}, data, device, plan, "fused")
    if paired and hasattr(method, "matching"):
        match: Any = method.match
        parts = {row: _middle(images[row], plan.window).to(device) for row in paired}
        moved = {row: match(part).field[0].float().cpu() for row, part in parts.items()}
        middles = {row: _middle(fused[row][0], plan.window) for row in paired}
        figures[FIELD] = volume_slices.field(middles, moved, data.spacing).figure
    return figures


def _encoded(method: Method, data: SiteData, device: torch.device, plan: Evaluation) -> "dict[str, Figure]":
    """Of an encoder (B, C, *S) -> (B, F), and of a classifier or segmenter on it."""
    found = {
        EMBEDDING: _embedding(method, data.test, data.classes, device, plan.batch_size),
        ATTENTION: _attention(method, data, device),
        CODEBOOK: _codes(method, data, device, plan.batch_size),
    }
    if hasattr(method, "segment") and (rows := _labelled_first(data.test)):
        found[SEGMENTATION] = _segmented(method, _looks(data, rows), data, device, plan, "image")
    return {name: figure for name, figure in found.items() if figure is not None}


@torch.no_grad()
def _segmented(
    network: Any, looks: Mapping[int, Tensor], data: SiteData, device: torch.device, plan: Evaluation, base: str
) -> "Figure":
    """Images segmented by the windows of the scores. `network`: with `segment` -> logits (B, K, *S)."""
    images = {row: data.test.images[row : row + 1].to(device) for row in looks}
    predicted = {row: windowed(network.segment, one, plan)[0].argmax(0).cpu() for row, one in images.items()}
    names = volume_slices.label_names(data.regions)
    sheet = volume_slices.segmentation(
        looks, _truth(data.test), predicted, names=names, base=base, spacing=data.spacing
    )
    return sheet.figure


@torch.no_grad()
def _embedding(
    method: Method, test: Split, classes: Sequence[str], device: torch.device, batch: int
) -> "Figure | None":
    rows = embedding.chosen(len(test))
    parts = torch.split(test.images[rows], batch)
    features = torch.cat([method.encoder(part.to(device)).float().cpu() for part in parts])
    return embedding.embedding(features, test.labels[rows], classes)


def _attention(method: Method, data: SiteData, device: torch.device) -> "Figure | None":
    """For a network that learned one class for each image, where there are labelled images."""
    rows = [row for row in _of_each_class(data.test.labels, LOOKED_AT) if data.test.labels[row] >= 0]
    one = method.labelled and not method.findings
    if not (rows and data.classes and one and hasattr(method, "classify")):
        return None
    rows.sort(key=lambda row: int(data.test.labels[row]))
    seen = attention.attention(method, data.test.images[rows].to(device))
    truth = {row: data.classes[int(data.test.labels[row])] for row in rows}
    return attention.figure(_looks(data, rows), truth, seen, data.classes, data.spacing).figure


def _codes(method: Method, data: SiteData, device: torch.device, batch: int) -> "Figure | None":
    """For a method with codebooks that hold something, where there are two images."""
    books = method.codebooks()
    if len(data.test) < 2 or not any(book.ready for book in books.values()):
        return None
    rows = _of_each_class(data.test.labels, max(2, min(CODED, batch)))
    shown = rows[:SUBJECTS]
    maps = code_maps.code_maps(method, data.test.images[rows].to(device))
    vectors = {name: book.code_vectors().cpu() for name, book in books.items()}
    maps = {name: codes[: len(shown)] for name, codes in maps.items()}
    return code_maps.figure(_looks(data, shown), maps, vectors, data.spacing).figure if maps else None


def _of_each_class(labels: Tensor, most: int) -> list[int]:
    """The first images of each class in turns, then those without a label: every arm is shown on the same."""
    seen: Counter[int] = Counter()
    turns = []
    for row, label in enumerate(labels.tolist()):
        turns.append((label < 0, seen[label], label, row))
        seen[label] += 1
    return [row for *_, row in sorted(turns)[:most]]


def _looks(data: SiteData, rows: Sequence[int]) -> dict[int, Tensor]:
    """Test images to show, from each one's darkest to its brightest value as [0, 1].

    Three channels are colours (3, *S), unless they are modalities; of other channels the first that is there (1, *S).
    """
    found = {}
    for row in rows:
        image = data.test.images[row]
        if len(image) != RGB or data.modalities:
            first = int(present(image[None])[0].int().argmax())
            image = image[first : first + 1]
        low, high = image.min(), image.max()
        found[row] = (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)
    return found


def _paired(split: Split) -> list[int]:
    """The first images of two modalities."""
    return present(split.images).sum(1).ge(2).nonzero()[:SUBJECTS, 0].tolist() if len(split) else []


def _labelled_first(split: Split) -> list[int]:
    """The first labelled images; then others, of any modality."""
    known = _truth(split)
    usable = present(split.images).any(1).nonzero()[:, 0].tolist() if len(split) else []
    return sorted(usable, key=lambda row: row not in known)[:SUBJECTS]


def _truth(split: Split) -> dict[int, Tensor]:
    """The masks that are known, by the number of the image."""
    if split.masks is None:
        return {}
    return {row: split.masks[row] for row in torch.nonzero(labelled(split.masks))[:, 0].tolist()}


def _middle(images: Tensor, window: Sequence[int] | None) -> Tensor:
    """The window in the middle of the last axes; all without a window."""
    sides = tuple(window or ())
    for axis, side in enumerate(sides, start=images.ndim - len(sides)):
        length = min(side, images.shape[axis])
        images = images.narrow(axis, (images.shape[axis] - length) // 2, length)
    return images


def _private(folder: Path) -> Path:
    """Make the last three levels of a folder for this user alone."""
    folder.parents[2].mkdir(parents=True, exist_ok=True)
    for level in (folder.parents[1], folder.parents[0], folder):
        level.mkdir(mode=0o700, exist_ok=True)
    return folder
