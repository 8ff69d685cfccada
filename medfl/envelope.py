"""The seal on a message between deployed processes: who made it, what it answers, until when it counts.

The signature covers every byte of content: tensors, numbers, names, round and nonce. In a simulation nothing is sealed.
"""

import hashlib
import json
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from medfl.errors import CredentialError
from medfl.provision.keys import sign, verify

SEAL = "seal"  # name of its record
SKEW = 300.0  # s that two clocks may differ


@dataclass(frozen=True)
class Seal:
    """What is signed beside the content."""

    kind: str  # order | answer
    issued: float  # s since 1970
    expires: float
    answers: str  # digest of the order that this answers; "" of an order
    head: str  # "<lines>:<hash>" of the site's audit log; "" of an order

    def signed(self, content: str) -> bytes:
        return json.dumps({**vars(self), "content": content}, sort_keys=True).encode()


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def digest(record: RecordDict) -> str:
    """SHA-256 over all records but the seal, whatever their order."""
    whole = hashlib.sha256()
    for role, arrays in sorted(record.array_records.items()):
        for name, array in sorted(arrays.items()):
            header = [role, name, array.stype, array.dtype, list(array.shape), len(array.data)]
            whole.update(json.dumps(header).encode())
            whole.update(array.data)
    for named in (record.config_records, record.metric_records):
        rest = {name: dict(values) for name, values in named.items() if name != SEAL}
        whole.update(json.dumps(rest, sort_keys=True).encode())
    return whole.hexdigest()


def closed(record: RecordDict, key: Ed25519PrivateKey, seal: Seal) -> str:
    """Put the sealed signature into the record; returns the content's digest."""
    content = digest(record)
    record[SEAL] = ConfigRecord({**vars(seal), "signature": sign(key, seal.signed(content))})
    return content


def order_of(kind: str) -> str:
    """The kind of an order's seal: what carries the message cannot make another request of it."""
    return f"order {kind}"


def opened(record: RecordDict, public: str, kind: str) -> tuple[Seal, str]:
    """Check the seal; it and the content's digest.

    Args:
        public: the maker's key, base64.

    Raises:
        CredentialError: no seal, of another kind or maker, of other content or content that none can cover, expired or
            from the future.
    """
    given = dict(record.config_records.get(SEAL) or {})
    try:
        signature = str(given.pop("signature"))
        seal = Seal(**{name: type_(given.pop(name)) for name, type_ in Seal.__annotations__.items()})
    except (KeyError, ValueError, TypeError):
        raise CredentialError(f"the {kind} has no seal. It was not made by the partner that it names.") from None
    try:
        content = digest(record)
    except (TypeError, ValueError):  # such as bytes in place of text: JSON has none, so no seal covers them
        raise CredentialError(
            f"the {kind} holds values that no seal covers. Install one medfl release on both."
        ) from None
    if given or seal.kind != kind or not verify(public, seal.signed(content), signature):
        raise CredentialError(f"the seal of the {kind} is of another key or content. Compare the keys' fingerprints.")
    at = now()
    if not seal.issued - SKEW <= at <= seal.expires + SKEW:
        raise CredentialError(
            f"the {kind} is of another time: made {at - seal.issued:.0f} s ago by this clock, to be used within "
            f"{seal.expires - seal.issued:.0f} s. Set the clocks of both machines, or it was sent again."
        )
    return seal, content
