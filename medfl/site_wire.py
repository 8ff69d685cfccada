"""A site's end of compressed weights: what it trains from, what it sends of its change, what it keeps to send later.

What int8 or topk does not send is added to the next round's change (error feedback: Seide et al. 2014; Karimireddy et
al. 2019), so that over the rounds all of it arrives. The halves need none: they round each value by itself.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from medfl.errors import ConfigError, DivergedError
from medfl.forms import FEEDBACK, PLAIN, Form
from medfl.layout import Flat, Tensors, finite
from medfl.messages import Broadcast

UNSENT = "wire/unsent/"  # beginning of its names in a site's state, role local


def opened(broadcast: Broadcast, form: Form, site: str) -> Broadcast:
    """The broadcast with its weights decoded.

    Raises:
        ConfigError: it is of another model, or in another form.
    """
    check(broadcast, form.digest, site)
    return Broadcast(replace(broadcast.order, layout=form.plain.digest), form.decode(broadcast.flat))


def check(broadcast: Broadcast, digest: str, site: str) -> None:
    """
    Raises:
        ConfigError: the broadcast is of another layout.
    """
    if broadcast.order.layout != digest:
        raise ConfigError(
            f"site '{site}': the server's model has layout {broadcast.order.layout[:12]}, "
            f"this site's has {digest[:12]}. Install the same medfl release and study on both."
        )


def load(state: Tensors, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into a method's `state_dict()`: what load_state_dict does, in a fifth of the time.

    Raises:
        ConfigError: a tensor of another shape.
    """
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ConfigError(f"'{name}': got shape {tuple(tensor.shape)}, need {tuple(state[name].shape)}.")
        state[name].copy_(tensor)


def closed(form: Form, local: Flat, before: Flat, kept: Mapping[str, Tensor]) -> tuple[Flat, Tensors]:
    """What a site answers after training, and what it keeps of it for the next round.

    Under differential privacy both follow from weights that are private already, so they cost nothing more.

    Args:
        local: weights and sums after training; the weights are overwritten.
        before: the broadcast as this site decoded it.
        kept: what it kept; of another form or model it is not used.

    Raises:
        DivergedError: a weight is not finite, or beyond what the form can hold. Nothing is kept then.
    """
    if form.kind == PLAIN:
        return local, {}
    for group in form.groups:
        change = np.subtract(local[group], before[group], out=local[group])
        if (earlier := kept.get(_name(form, group))) is not None:
            np.add(change, earlier.numpy(), out=change)
        _check(form, group, change)
    coded = form.encode(local)
    if form.kind not in FEEDBACK:
        return coded, {}
    sent = form.decode(coded)
    return coded, {
        _name(form, group): torch.from_numpy(np.subtract(local[group], sent[group], out=sent[group]))
        for group in form.groups
    }


def _name(form: Form, group: str) -> str:
    return f"{UNSENT}{form.digest[:16]}/{group}"


def _check(form: Form, group: str, change: np.ndarray) -> None:
    if finite(change):
        return
    name = form.plain.unsound(group, change) or group
    raise DivergedError(f"'{name}' has NaN or infinity. Lower training.optimizer.lr. Nothing was sent.")
