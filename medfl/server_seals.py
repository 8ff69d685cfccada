"""The study lead's side of the seals: orders go out signed, answers count only with the signature of their site."""

import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from medfl import envelope
from medfl.errors import ConfigError, CredentialError
from medfl.provision.documents import JoinRequest, check_site, standing
from medfl.provision.keys import load_signing_key

HEAD = re.compile(r"[0-9]{1,12}:[0-9a-f]{64}")
KEY = Path("keys") / "study"  # in the coordinator's folder


@dataclass(frozen=True)
class Seals:
    """The study's key, and where the keys of its sites are."""

    key: Ed25519PrivateKey
    folder: Path  # the coordinator's

    @classmethod
    def of(cls, folder: Path) -> "Seals":
        """
        Raises:
            CredentialError: the study's key is missing, damaged or readable by others.
        """
        return cls(load_signing_key(folder / KEY), folder)

    def order(self, record: RecordDict, within: float, kind: str) -> str:
        """Seal an order that is to be answered within so many seconds, as a request of this kind alone; its digest."""
        now = envelope.now()
        return envelope.closed(record, self.key, envelope.Seal(envelope.order_of(kind), now, now + within, "", ""))

    def answer(self, record: RecordDict, site: str, order: str) -> str:
        """Check the seal of an answer and take it off; the head of the site's audit log, "<lines>:<hash>".

        Raises:
            CredentialError: the site is not approved, or its seal is of another key, content, order or time.
        """
        seal, _ = envelope.opened(record, self._partner(site).signing_key, "answer")
        del record[envelope.SEAL]
        if seal.answers != order:
            raise CredentialError("the answer is to another order (stale or replayed).")
        if not HEAD.fullmatch(seal.head):
            raise CredentialError("the answer says no head of its audit log. Install the same medfl release there.")
        return seal.head

    def _partner(self, site: str) -> JoinRequest:
        """What is approved of a site at this moment; the files of others do not matter."""
        try:
            check_site(site)
            partner = standing(self.folder / "sites" / site)
        except ConfigError as error:
            raise CredentialError(f"'{site[:40]}' cannot be known: {error}") from None
        if partner is None:
            raise CredentialError(f"'{site}' is not among the approved sites. Approve its request first.")
        return partner
