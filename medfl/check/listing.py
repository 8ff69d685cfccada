"""The data list of a site: its rows, who they are of, and which files they name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medfl.data.datalist import Row, read_rows
from medfl.data.folder import Folder
from medfl.data.multimodal import Multimodal

ROLES = ("label", "mask", "brain", "convention", "patient", "site", "split")


@dataclass(frozen=True)
class Listed:
    """One file that the data list names."""

    row: int  # from 0
    column: str
    name: str  # as written, relative to the root


@dataclass(frozen=True)
class Listing:
    """A data list, and the source that reads it."""

    source: Folder | Multimodal
    root: Path
    rows: tuple[Row, ...]
    columns: Mapping[str, str]  # role -> column, of those that are set
    images: tuple[str, ...]  # columns with image files

    @property
    def files(self) -> list[Listed]:
        """All image files, row by row; empty cells are left out."""
        pairs = [(place, row, column) for place, row in enumerate(self.rows) for column in self.images]
        return [Listed(place, column, row[column]) for place, row, column in pairs if row[column]]

    def column(self, role: str) -> list[str]:
        """The cells of a role; "" in each row where it has no column."""
        return [row[self.columns[role]] if role in self.columns else "" for row in self.rows]

    @property
    def patients(self) -> list[str]:
        """As the source has them: without an id, every row is its own patient."""
        own = [next((row[column] for column in self.images if row[column]), "") for row in self.rows]
        return [given or other for given, other in zip(self.column("patient"), own, strict=True)]

    def path(self, name: str) -> Path:
        return self.root / name


def read(source: object) -> Listing | None:
    """The data list of a source; None for a source without one.

    Raises:
        DataError: no such folder, list or column, or no rows.
    """
    if not isinstance(source, Folder | Multimodal):
        return None
    columns = {role: str(getattr(source, role)) for role in ROLES if getattr(source, role, None) is not None}
    images = (source.image,) if isinstance(source, Folder) else tuple(source.modalities)
    findings = getattr(source, "labels", None) or ()
    named = {f"images[{place}]": column for place, column in enumerate(images)} | columns
    named |= {f"labels[{place}]": column for place, column in enumerate(findings)}
    root = Path(str(source.root)).expanduser()
    one = "image" if isinstance(source, Folder) else "subject"
    return Listing(source, root, tuple(read_rows(root, source.datalist, named, one=one)), columns, images)
