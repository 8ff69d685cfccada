"""Looking at the masks: does each lie on its image's grid, and hold only labels that mean something."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from medfl.check.listing import Listing
from medfl.data import label_map, subject, volume
from medfl.data.folder import Folder
from medfl.data.multimodal import Multimodal
from medfl.data.subject import CONVENTIONS, Files
from medfl.errors import DataError


@dataclass(frozen=True)
class Drawn:
    """One row's mask. `text`: why it cannot be used, "" where it can; `labels`: those that occur, without 0."""

    row: int
    text: str = ""
    labels: frozenset[int] = frozenset()


def every(listing: Listing, rows: Sequence[int], *, threads: int, progress: Callable[[int, int], None]) -> list[Drawn]:
    """Masks of the given rows, whose images can be used; of several modalities also what the subject as a whole lacks.

    Rows without a mask are left out, but for those of several modalities, which are read as the product reads them.
    """
    wanted = [row for row in rows if isinstance(listing.source, Multimodal) or listing.column("mask")[row]]
    look = _subject if isinstance(listing.source, Multimodal) else _mask
    found = []
    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        for done, drawn in enumerate(pool.map(lambda row: look(listing, row), wanted), start=1):
            found.append(drawn)
            progress(done, len(wanted))
    return found


def _mask(listing: Listing, row: int) -> Drawn:
    source = listing.source
    assert isinstance(source, Folder)
    image = listing.path(listing.rows[row][source.image])
    path = listing.path(listing.column("mask")[row])
    values = sorted({value for values in (source.regions or {}).values() for value in values})
    try:
        labels = label_map.read(path, values, image=volume.read(image, source.spatial_dims), image_path=image)
    except DataError as error:
        return Drawn(row, _plain(error, listing))
    return Drawn(row, labels=frozenset(np.unique(labels.numpy()).tolist()) - {0})


def _subject(listing: Listing, row: int) -> Drawn:
    source = listing.source
    assert isinstance(source, Multimodal)
    cells = listing.rows[row]
    convention = listing.column("convention")[row] or source.labels
    if convention not in CONVENTIONS:
        return Drawn(row, f"the convention {convention!r} is not one of {', '.join(CONVENTIONS)}")
    mask, brain = (listing.column(role)[row] for role in ("mask", "brain"))
    files = Files(
        name=str(row + 1),
        images=tuple(listing.path(cells[column]) if cells[column] else None for column in listing.images),
        brain=listing.path(brain) if brain else None,
        mask=listing.path(mask) if mask else None,
        convention=convention,
    )
    spacing = (source.spacing, source.spacing, source.spacing if source.spatial_dims == 3 else None)
    try:
        found = subject.load(files, spacing=spacing, normalize=source.normalize)
    except DataError as error:
        return Drawn(row, _plain(error, listing))
    if found.mask is None:
        return Drawn(row)
    return Drawn(row, labels=frozenset(np.unique(found.mask.numpy()).tolist()) - {0})


def _plain(error: DataError, listing: Listing) -> str:
    return str(error).replace(f"{listing.root}/", "")
