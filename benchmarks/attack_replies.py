"""A site that answers with something else in every round, and signs it: what its app process runs before it sends.

Loaded at the site through `PATCH`; the site has its own key, so the seal of what it sends is right.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATCH = """
import sys
if "medfl.deployment.warm" in " ".join(sys.orig_argv):
    import attack_replies
    from flwr.supernode.runtime import run_clientapp
    plain, every = run_clientapp.push_message, attack_replies.kinds()
    def push(client, message, context):
        if not message.has_error() and message.metadata.message_type == "train.pretrain":
            attack_replies.spoil(message, every)
        plain(client, message, context)
    run_clientapp.push_message = push
"""
OF_A_LAYOUT = (  # changes for the layout of the tests alone, and answers that take Flower an hour to carry
    "code", "feature", "impossible moments", "reshaped", "ten thousand", "100,000 arrays",
)  # fmt: skip


def kinds() -> dict[str, Callable[[Any], object]]:
    """Every malformed answer and allocation bomb of the tests that any layout has, and two more."""
    from tests.test_gate import MALFORMED, header
    from tests.test_security import BOMBS

    found: dict[str, Callable[[Any], object]] = {name: change for name, (change, _) in MALFORMED.items()}
    found |= BOMBS
    found["70 MB of zeros"] = header(data=bytes(70_000_000))
    found["70 MB of zeros, and says so"] = header(data=bytes(70_000_000), shape=(17_500_000,))
    return {name: change for name, change in found.items() if not any(part in name for part in OF_A_LAYOUT)}


def spoil(message: Any, every: dict[str, Callable[[Any], object]]) -> None:
    """Change an answer as its round says, and seal it again where that can be done."""
    envelope, keys = sys.modules["medfl.envelope"], sys.modules["medfl.provision.keys"]
    number = int(message.metadata.group_id)
    record = message.content
    seal = dict(record.config_records["seal"])
    seal.pop("signature")
    del record["seal"]
    list(every.values())[(number - 1) % len(every)](record)
    key = keys.load_signing_key(Path(os.environ["MEDFL_SITE_FILE"]).parent / "keys" / "signing")
    try:
        envelope.closed(record, key, envelope.Seal(**seal))
    except (TypeError, ValueError):
        record["seal"] = type(next(iter(record.config_records.values())))({**seal, "signature": "none"})
