"""What a site keeps between rounds, on its own disk: keyed by lineage, site and round, written atomically.

A message for round r starts from the newest state below r and saves r. So a repeated round gives the same result, a
reply that the server dropped does no harm, and a server that went back is followed.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from medfl.files import write_tensors

Tensors = dict[str, Tensor]


class SiteState:
    """The folder `root/<lineage>/<site>`; `round-0007.safetensors` is the state after round 7."""

    def __init__(self, root: Path, lineage: str, site: str) -> None:
        self.folder = root / lineage / site

    def before(self, round: int | None) -> Tensors:  # noqa: A002
        """The newest state below `round` (None: of all), or nothing."""
        older = [path for number, path in self._saved() if round is None or number < round]
        return load_file(older[-1]) if older else {}

    def save(self, round: int, tensors: Mapping[str, Tensor]) -> None:  # noqa: A002
        """Write the state after `round`; states of later rounds are of a history that the server left, and go."""
        if tensors:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_tensors(self.folder / f"round-{round:04d}.safetensors", tensors)
        for number, path in self._saved():
            if number > round or number < round - 1:
                path.unlink()

    def _saved(self) -> list[tuple[int, Path]]:
        found = self.folder.glob("round-*.safetensors") if self.folder.exists() else []
        return sorted((int(path.stem.removeprefix("round-")), path) for path in found)
