"""One site's part of one sum, on its own disk: each message may find another process here.

A session takes one step at a time, each of them once: keys, shares, masked answer, unmasking. It is written before a
step's answer leaves and removed before the last one does, so that no crash can make a site say two things.
"""

import base64
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medfl.errors import DataError, PolicyError
from medfl.files import sync_folder, write_bytes
from medfl.layout import Layout
from medfl.protection import Secagg
from medfl.provision.keys import write_private
from medfl.secagg import masks, shamir
from medfl.secagg.hiding import Hiding, mask_seed
from medfl.secagg.roster import Roster, Ticket


@dataclass
class Session:
    """Secrets of one sum. Bytes are kept in hexadecimal."""

    file: Path
    site: str
    ticket: Ticket
    sealing: str  # private key: what peers send is sealed for it
    masking: str  # private key: masks with peers come from it
    own: str  # seed of the mask of its own
    roster: str = ""  # what it was told, once it has sent shares
    held: dict[str, tuple[str, str]] = field(default_factory=dict)  # peer -> shares of its key and of its seed
    broadcast: str = ""  # digest of what the masked answer was made from

    @classmethod
    def begin(cls, folder: Path, site: str, ticket: Ticket) -> "Session":
        """Fresh secrets; what was left of an earlier sum goes."""
        for draft in folder.glob(".*sum.*"):  # of a crash
            draft.unlink()
        sealing, masking, own = masks.new_secret(), masks.new_secret(), secrets.token_bytes(masks.SEED)
        session = cls(folder / "sum.json", site, ticket, sealing.hex(), masking.hex(), own.hex())
        session._save()
        return session

    @classmethod
    def load(cls, folder: Path, site: str, session: str) -> "Session":
        """
        Raises:
            PolicyError: the session is not the last one, or over.
            DataError: its file is damaged.
        """
        file = folder / "sum.json"
        tree = _read(file)
        if not tree or tree["ticket"]["session"] != session:
            raise PolicyError("the request is of a sum that is over or was never begun here. Nothing was sent.")
        held = {name: (key, own) for name, (key, own) in tree.pop("held").items()}
        return cls(file, site, Ticket(**tree.pop("ticket")), held=held, **tree)

    @property
    def public(self) -> bytes:
        """Both public keys."""
        return b"".join(masks.public_of(bytes.fromhex(secret)) for secret in (self.sealing, self.masking))

    def share(self, roster: Roster, settings: Secagg, owners: Collection[str], max_share: float) -> dict[str, bytes]:
        """Shares of both secrets, sealed for each peer.

        Raises:
            PolicyError: a second list of sites, or one that does not hide this site.
            CredentialError: a peer's key is none.
        """
        me = roster.sites.get(self.site)
        if self.roster or roster.ticket != self.ticket:
            raise PolicyError("a second list of the sites of a sum, or one of another sum. Nothing was sent.")
        if me is None or base64.b64decode(me.keys) != self.public or set(me.owners) != set(owners):
            raise PolicyError(
                "the list of the sites of a sum has this site with other keys or parts. Nothing was sent."
            )
        roster.check(settings, max_share)
        count = len(roster.sites)
        parts = [
            shamir.split(bytes.fromhex(secret), count, settings.needed(count)) for secret in (self.masking, self.own)
        ]
        pairs = {name: (parts[0][at], parts[1][at]) for at, name in enumerate(sorted(roster.sites))}
        key, own = pairs.pop(self.site)
        self.roster, self.held = roster.text, {self.site: (key.hex(), own.hex())}
        self._save()
        return {
            name: masks.seal(self._sealing_key(roster, name, self.site, name), b"".join(pair), roster.context)
            for name, pair in pairs.items()
        }

    def receive(
        self, sealed: Mapping[str, Mapping[str, bytes]], answers: Layout, settings: Secagg, *, broadcast: str
    ) -> Hiding:
        """Open the shares that each peer sealed for this site; once, before the masked answer is made.

        Args:
            sealed: maker -> recipient -> sealed shares: of the sites that go on.
            answers: what the masked answers of all sites hold.
            broadcast: digest of what the answers are made from. Masks cancel between sites that got the same alone.

        Raises:
            PolicyError: no shares were sent, an answer was masked before, or too few sites go on.
            CredentialError: shares that were changed, or are of another sum.
        """
        roster = self._told()
        if len(self.held) != 1:
            raise PolicyError("a second request to mask an answer: the masks would cancel. Nothing was sent.")
        self._check_left(roster, sealed, answers, settings)
        for maker in sealed.keys() - {self.site}:
            key = self._sealing_key(roster, maker, maker, self.site)
            pair = masks.unseal(key, sealed[maker].get(self.site, b""), roster.context, maker)
            self.held[maker] = (pair[: shamir.BYTES].hex(), pair[shamir.BYTES :].hex())
        self.broadcast = broadcast
        self._save()
        seeds = {
            name: mask_seed(bytes.fromhex(self.masking), roster, name, broadcast)
            for name in sealed.keys() - {self.site}
        }
        return Hiding(self.site, roster, bytes.fromhex(self.own), seeds)

    def reveal(
        self, alive: Collection[str], gone: Collection[str], answers: Layout, settings: Secagg
    ) -> dict[str, bytes]:
        """One share of every site that went on: of its own mask where its answer came, else of its key. Then all goes.

        Raises:
            PolicyError: no masked answer was sent, too few came, or the sum of this round was given to other sites.
        """
        roster = self._told()
        if {*alive, *gone} != self.held.keys() or set(alive) & set(gone) or len(self.held) < 2:
            raise PolicyError("unmasking of other sites than those that shared their secrets. Nothing was sent.")
        self._check_left(roster, alive, answers, settings)
        self._only_once(roster, sorted(alive))
        self.file.unlink()
        sync_folder(self.file.parent)
        return {
            **{f"mask of {name}": bytes.fromhex(own) for name, (_, own) in self.held.items() if name in alive},
            **{f"key of {name}": bytes.fromhex(key) for name, (key, _) in self.held.items() if name not in alive},
        }

    def _check_left(self, roster: Roster, going: Collection[str], answers: Layout, settings: Secagg) -> None:
        roster.check_left(going, answers, settings)
        if self.site not in going:
            raise PolicyError("a sum that this site is asked to finish goes on without it. Nothing was sent.")

    def _told(self) -> Roster:
        if not self.roster:
            raise PolicyError("this site has sent no shares in this sum. Nothing was sent.")
        return Roster.read(self.roster)

    def _only_once(self, roster: Roster, alive: list[str]) -> None:
        """A round repeated with other sites or weights would show the difference: updates of single sites."""
        file, name = self.file.with_name("sums.json"), f"{self.ticket.kind} {self.ticket.round}"
        if self.ticket.kind == "refresh":  # a round has several, under other codes: they are of the broadcast alone
            name += f" {self.broadcast[:16]}"
        before, asked = _read(file), {site: dict(roster.sites[site].weights) for site in alive}
        if before.setdefault(name, asked) != asked:
            raise PolicyError(
                f"{name}: the sum over {', '.join(before[name])} was given before, and is asked for over "
                f"{', '.join(alive)}, or with other weights: the difference is of single sites. Let the same sites "
                "answer again."
            )
        write_bytes(file, json.dumps(before).encode())

    def _sealing_key(self, roster: Roster, peer: str, maker: str, recipient: str) -> bytes:
        purpose = f"share of {roster.place(maker)} for {roster.place(recipient)}"
        return masks.agreed(bytes.fromhex(self.sealing), roster.sites[peer].sealing, roster.context, purpose)

    def _save(self) -> None:
        """0600, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = self.file.with_name(f".sum.{secrets.token_hex(4)}")
        tree = {name: value for name, value in asdict(self).items() if name not in ("file", "site")}
        write_private(draft, json.dumps(tree).encode())
        draft.replace(self.file)
        sync_folder(self.file.parent)


def _read(file: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: the file is damaged.
    """
    try:
        tree = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise DataError(f"{file} is damaged. Restore it from a backup, or remove it to go on without what it says.")
    return tree
