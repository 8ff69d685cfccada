"""Flower ClientApp: one message in, one message out. Logic lives in medfl."""

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medfl import admission
from medfl.messages import Answer, Broadcast
from medfl.mods import always_reply
from medfl.secagg import at_site
from medfl.site import Site, open_site

app = ClientApp(mods=[always_reply])


def _answer(message: Message, context: Context, act: Callable[[Site, Broadcast], Answer]) -> Message:
    admitted = admission.admit(message, context)
    site = open_site(admitted.source, admitted.partition)
    answer, layout = at_site.answered(site, admitted.kind, admitted.broadcast, act)
    return Message(admission.release(admitted, answer, layout), reply_to=message)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Name and numbers of volumes."""
    return _answer(message, context, lambda site, broadcast: site.describe(broadcast.order))


@app.train("pretrain")
def pretrain(message: Message, context: Context) -> Message:
    """One round of local training."""
    return _answer(message, context, Site.train)


@app.train("finetune")
def finetune(message: Message, context: Context) -> Message:
    """One round of training with labels or masks."""
    return _answer(message, context, Site.train)


@app.query("refresh")
def refresh(message: Message, context: Context) -> Message:
    """Sums of norm statistics, codes and features under the weights sent along."""
    return _answer(message, context, Site.refresh)


@app.query("codebook")
def seed_codebooks(message: Message, context: Context) -> Message:
    """Centres of this site's tokens, for the first codebook."""
    return _answer(message, context, Site.seed_codebooks)


@app.query("keys")
def offer_keys(message: Message, context: Context) -> Message:
    """Public keys for one sum over the sites, where updates are added under masks."""
    return _answer(message, context, at_site.offer)


@app.query("shares")
def share_secrets(message: Message, context: Context) -> Message:
    """Shares of this site's secrets, sealed for each other site."""
    return _answer(message, context, at_site.share)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Shares that lift the masks of a sum."""
    return _answer(message, context, at_site.unmask)


@app.evaluate("probe")
def evaluate(message: Message, context: Context) -> Message:
    """Scores of the frozen encoder on this site's own data."""
    return _answer(message, context, Site.evaluate)


@app.train("synthesize")
def synthesize(message: Message, context: Context) -> Message:
    """Synthetic images, made and kept at the site; only counts are answered."""
    return _answer(message, context, lambda site, broadcast: site.synthesize(broadcast.order))
