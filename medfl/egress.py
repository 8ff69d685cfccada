"""The egress gate: what a site's answer may hold. The last code that runs before an answer leaves, at every site."""

from collections.abc import Mapping
from typing import Final

from medfl import allowed
from medfl.errors import DivergedError, PolicyError
from medfl.forms import sound
from medfl.layout import Layout, carrier
from medfl.messages import Answer
from medfl.methods.base import Role

PLAIN: Final = (Role.PARAMETER, Role.NORM_MOMENTS, Role.CODEBOOK, Role.TARGET, Role.STATISTICS)
LEAVES: Final = (*PLAIN, Role.MASKED, Role.KEY, Role.SHARE)  # role table
FACTS: Final = ("held_out", "owners", "classes", "findings")  # of `describe`
MOST_FACT, MOST_NAMES = 4000, 1000  # letters, items


def check(answer: Answer, layout: Layout) -> None:
    """Pass an answer that holds exactly the layout's tensors, finite, and numbers and names that are on the list.

    Raises:
        PolicyError: something that must not leave the site.
        DivergedError: a tensor that is not finite.
    """
    if private := [slot.name for slot in layout.slots if slot.role not in LEAVES]:
        raise PolicyError(f"'{private[0]}' must not leave a site: its role is private. Remove it from the layout.")
    if odd := sorted(answer.flat.keys() ^ layout.sizes.keys()):
        raise PolicyError(f"the answer's tensors and its layout differ in {odd[0]!r}. Nothing was sent.")
    for group, size in layout.sizes.items():
        array, dtype = answer.flat[group], group.rpartition("/")[2]
        if array.shape != (size,) or array.dtype != carrier(dtype):
            raise PolicyError(f"the answer's {group!r} is {array.dtype} {array.shape}, need {size}. Nothing was sent.")
        if not sound(array, dtype):
            raise DivergedError(f"{group!r} has NaN or infinity. Lower training.optimizer.lr. Nothing was sent.")
    try:
        allowed.checked_metrics(answer.metrics.items())
    except ValueError as error:
        raise PolicyError(f"{error} Nothing was sent.") from None
    _check_facts(answer.facts)


def _check_facts(facts: Mapping[str, str | list[str]]) -> None:
    for name, value in facts.items():
        words = value if isinstance(value, list) else [value]
        if name not in FACTS or len(words) > MOST_NAMES or sum(len(word) for word in words) > MOST_FACT:
            raise PolicyError(f"the fact {name!r} is not on the list of what may be sent, or too long.")


def fact_bytes(facts: Mapping[str, str | list[str]]) -> int:
    """Bytes of the facts' texts, in UTF-8."""
    return sum(
        len(word.encode()) for value in facts.values() for word in ([value] if isinstance(value, str) else value)
    )


def contents(layout: Layout, sizes: Mapping[str, int]) -> list[str]:
    """One line for each tensor, as the audit log has it: role, name, dtype, shape, bytes.

    Args:
        sizes: bytes of each group as it travels.
    """
    return [
        f"{slot.role} {slot.name} {slot.dtype} {'x'.join(map(str, slot.shape)) or '1'} {size}"
        for slot, size in layout.crossing(sizes)
    ]
