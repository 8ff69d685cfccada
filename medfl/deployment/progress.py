"""How far a run is, from the events that it wrote: for people who wait for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from medfl.run_folder import CLOSED, TRAININGS

LOSS = "loss/total"  # of a round whose sites may tell it
TOLD = ("refused", "remark", "checkpoint/damaged", "joined")
SHOWN = 5  # of what was told last
AROUND = ("keys", "shares", "unmask")  # exchanges around a masked sum, in the middle of a stage
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """The stage that goes on; rounds and time left are those of its training, over all arms."""

    stage: str = ""
    arm: str = ""
    round: int = 0
    rounds: int = 0  # of one arm
    done: int = 0
    planned: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    last_event: str = ""
    told: tuple[str, ...] = ()


def progress(events: Sequence[Event], rounds: Mapping[str, int]) -> Progress:
    """
    Args:
        events: of the run folder, in order.
        rounds: of one arm, by stage.
    """
    if not events:
        return Progress()
    last = events[-1]
    told = tuple(map(_told, [event for event in events if event["name"] in TOLD][-SHOWN:]))
    stage = str(next((event["stage"] for event in reversed(events) if event["stage"] not in AROUND), ""))
    here = [event for event in events if event["stage"] == stage]
    starts = [place for place, event in enumerate(here) if event["name"] == "planned"]
    if stage not in TRAININGS or not starts:
        return Progress(stage=stage, last_event=str(last["t"]), told=told)
    begin, recent = here[starts[-1]], [event for event in here[starts[-1] :] if _closes(event)]
    arms = {event["arm"] for event in recent}
    done = len({(event["arm"], event["round"]) for event in here if _closes(event) and event["arm"] in arms})
    planned = int(begin["value"])
    newest = recent[-1] if recent else None
    return Progress(
        stage=stage,
        arm=str(newest["arm"]) if newest else "",
        round=int(newest["round"]) if newest else 0,
        rounds=rounds.get(stage, 0),
        done=min(done, planned),
        planned=planned,
        loss=_loss(here, newest) if newest else None,
        seconds_left=_left(begin, recent, planned - done),
        last_event=str(last["t"]),
        told=told,
    )


def _closes(event: Event) -> bool:
    """Written once for every round."""
    return bool(event["name"] == CLOSED)


def _loss(events: Sequence[Event], newest: Event) -> float | None:
    """The mean loss over the sites in the same round; under differential privacy nobody tells it."""
    place = [(event.get("arm"), event["round"]) == (newest["arm"], newest["round"]) for event in events]
    found = [e["value"] for e, here in zip(events, place, strict=True) if here and e["name"] == LOSS and not e["site"]]
    return float(found[-1]) if found else None


def _left(begin: Event, recent: Sequence[Event], rounds: int) -> float | None:
    """Seconds that the rest takes, if it goes on as since the start of this attempt."""
    if not recent:
        return None
    took = datetime.fromisoformat(recent[-1]["t"]) - datetime.fromisoformat(begin["t"])
    return max(0.0, took.total_seconds() / len(recent) * max(0, rounds))


def _told(event: Event) -> str:
    place = " ".join(str(event[key]) for key in ("stage", "arm", "site") if event.get(key))
    return f"{place}, round {event['round']}: {event['name']} {event.get('reason', '')}".strip()
