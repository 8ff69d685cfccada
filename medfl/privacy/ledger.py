"""What a site has spent of its patients' privacy: every release, written down before it is made.

One file for all data sets and studies of a site, as a patient may be in several. Lines are bound to each other as in
the audit log. A crash after the line was written counts a release that was never made, and never the reverse.
"""

import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medfl import __version__
from medfl.errors import PrivacyError
from medfl.onsite.audit import Audit, Entry, Head
from medfl.privacy.accounting import Release, Spent, spent

WHAT = "release"


class Ledger:
    """The ledger of one site; any number of processes may book at once."""

    def __init__(self, path: Path) -> None:
        self.path, self._record = path, Audit(path)

    @classmethod
    def of(cls, state: Path, site: str) -> "Ledger":
        """Args: the folder of what stays at the sites, and the site's name."""
        return cls(state / "privacy" / f"{site}.jsonl")

    def head(self) -> Head:
        """Number and hash of the newest line, for others to note."""
        return self._record.head()

    def releases(self, known: Head | None = None) -> list[Release]:
        """All of them, oldest first.

        Args:
            known: a line as the audit log noted it.

        Raises:
            PrivacyError: the ledger was changed or cut, so that nothing can be said of what was spent.
        """
        if findings := [text for text in Audit.verify(self.path, known) if "cut off after" not in text]:
            raise PrivacyError(
                f"the ledger {self.path} cannot be trusted: {findings[0]} Restore it from a backup; without it, no "
                "more may be released of these patients."
            )
        return [_release(entry) for entry in self.lines() if entry.get("what") == WHAT]

    def lines(self) -> Iterator[Entry]:
        return self._record.entries()

    def book(
        self, new: Sequence[Release], delta: float, most: float | None, *, tight: bool = False, **facts: Any
    ) -> Spent:
        """Write releases down that are about to be made; what is spent with them.

        Args:
            most: ε that a patient may lose here; None: no limit.
            tight: compute the tighter of both bounds even where the other one is within the limit.
            facts: of the request, such as its study and round.

        Raises:
            PrivacyError: they would pass the limit, or the ledger was changed. Nothing was written.
            ResourceError: the disk is full. Nothing was written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = after(self.releases(), new, delta, most, tight=tight)
            for release in new:
                self._record.write(WHAT, **asdict(release), delta=delta, medfl=__version__, **facts)
            return total
        finally:
            os.close(lock)


def after(before: Sequence[Release], new: Sequence[Release], delta: float, most: float | None, *, tight: bool) -> Spent:
    """What is spent with these releases.

    Raises:
        PrivacyError: more than the limit.
    """
    total = spent([*before, *new], delta, tight=tight)
    if most is not None and total.epsilon > most and not tight:
        total = spent([*before, *new], delta)
    if most is not None and total.epsilon > most:
        left = spent(before, delta, tight=False).rdp
        raise PrivacyError(
            f"the privacy budget is spent: this release would make ε={shown(total.epsilon)} per patient at "
            f"δ={delta:.1e}, of {most:g}; ε is at most {shown(left)} now. This site takes no further part."
        )
    return total


def shown(epsilon: float) -> str:
    return f"{epsilon:.3g}" if math.isfinite(epsilon) else "unbounded"


def _release(entry: dict[str, Any]) -> Release:
    try:
        return Release(str(entry["unit"]), float(entry["noise"]), float(entry["rate"]), int(entry["steps"]))
    except (KeyError, TypeError, ValueError):
        text = f"a line of the ledger is no release: {str(entry)[:80]}. Restore it from a backup."
        raise PrivacyError(text) from None
