"""What a site keeps between rounds, on its own disk: keyed by lineage, site and round, written atomically.

A message for round r starts from the newest state below r and saves r. So a repeated round gives the same result, a
reply that the server dropped does no harm, and a server that went back is followed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from medfl.errors import DataError
from medfl.files import packed, unpacked, write_bytes

Tensors = dict[str, Tensor]


class SiteState:
    """The folder `root/<lineage>/<site>`; `round-0007-<part of its hash>.safetensors` is the state after round 7."""

    def __init__(self, root: Path, lineage: str, site: str) -> None:
        self.folder = root / lineage / site

    def before(self, round: int | None) -> Tensors:  # noqa: A002
        """The newest state below `round` (None: of all), or nothing.

        Raises:
            DataError: it is damaged.
        """
        older = [path for number, path in self._saved() if round is None or number < round]
        if not older:
            return {}
        content = older[-1].read_bytes()
        if not older[-1].stem.endswith(f"-{_digest(content)}"):
            raise DataError(f"{older[-1]} is damaged: its hash differs. Remove it to go on without what was kept.")
        return unpacked(older[-1], content)

    def save(self, round: int, tensors: Mapping[str, Tensor]) -> None:  # noqa: A002
        """Write the state after `round`; states of later rounds are of a history that the server left, and go."""
        name = ""
        if tensors:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            content = packed(tensors)
            name = f"round-{round:04d}-{_digest(content)}.safetensors"
            write_bytes(self.folder / name, content)
        for number, path in self._saved():
            if number > round or number < round - 1 or (number == round and path.name != name):
                path.unlink()

    def _saved(self) -> list[tuple[int, Path]]:
        found = self.folder.glob("round-*.safetensors") if self.folder.exists() else []
        return sorted((int(path.stem.split("-")[1]), path) for path in found)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
