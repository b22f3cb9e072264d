"""Dialogue state tracking: the steps of a task, their states, and the updates that move them.

A task is a list of steps. Each is `not_started`, `in_progress` or `completed`, and two transitions move it:

    not_started --start--> in_progress --complete--> completed

An update is one or several transitions, written by the model as text, in one of two formats:

    arrow   S1->complete, S2->start
    json    [{"id": "S1", "transition": "complete"}, {"id": "S2", "transition": "start"}]

What the model writes is parsed, checked against the current state and only then applied: an update is applied whole or
not at all.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

STATES = ("not_started", "in_progress", "completed")
TRANSITIONS = {"start": ("not_started", "in_progress"), "complete": ("in_progress", "completed")}  # name: (from, to)

State = dict[str, str]  # step id -> one of STATES, in the order of the task's steps


@dataclass(frozen=True)
class Step:
    """One step of a task. start_ts, end_ts: seconds of the video, where the file knows them."""

    id: str
    name: str
    start_ts: float | None = None
    end_ts: float | None = None


@dataclass(frozen=True)
class Transition:
    """One step's move: `Transition("S5", "complete")`."""

    id: str
    transition: str


class UpdateError(ValueError):
    """An update that cannot be read or is not legal now. Recorded by the streaming engine, never fatal."""


def write_update(transitions: Iterable[Transition], dst_format: str) -> str:
    """The text of an update, as the model is trained to write it."""
    if dst_format == "json":
        return json.dumps([{"id": t.id, "transition": t.transition} for t in transitions], ensure_ascii=False)
    return ", ".join(f"{t.id}->{t.transition}" for t in transitions)


def parse_update(text: str, dst_format: str) -> list[Transition]:
    """The transitions that `text` names. Raises UpdateError where it is not exactly the format of `write_update`."""
    if dst_format == "json":
        try:
            items = json.loads(text)
            transitions = [Transition(item["id"], item["transition"]) for item in items]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UpdateError(f"not a JSON list of id and transition: {text!r}") from error
        if any(set(item) != {"id", "transition"} for item in items):
            raise UpdateError(f"fields other than id and transition: {text!r}")
        if not all(isinstance(t.id, str) and isinstance(t.transition, str) for t in transitions):
            raise UpdateError(f"id and transition must be text: {text!r}")
    else:
        pairs = [[side.strip() for side in part.split("->")] for part in text.split(",")]
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise UpdateError(f"not of the form S1->start, S2->complete: {text!r}")
        transitions = [Transition(id, transition) for id, transition in pairs]
    if not transitions:
        raise UpdateError("an update without a transition")
    return transitions


def apply_update(state: State, transitions: Iterable[Transition]) -> State:
    """The state after the transitions, in their order; `state` is left as it is.

    Raises UpdateError at an unknown step, an unknown transition, or one that is not legal where the step stands.
    """
    after = dict(state)
    for t in transitions:
        if t.id not in after:
            raise UpdateError(f"unknown step {t.id!r}")
        if t.transition not in TRANSITIONS:
            raise UpdateError(f"unknown transition {t.transition!r}")
        origin, target = TRANSITIONS[t.transition]
        if after[t.id] != origin:
            raise UpdateError(f"cannot {t.transition} {t.id}, which is {after[t.id]}")
        after[t.id] = target
    return after


def legal_updates(state: State) -> list[Transition]:
    """Every single transition that is legal now, in the order of the steps."""
    return [
        Transition(id, name) for id, now in state.items() for name, (origin, _) in TRANSITIONS.items() if now == origin
    ]


def legal_continuations(text: str, state: State, dst_format: str) -> list[str]:
    """What may follow `text`, the beginning of an update, to make it a whole legal one; "" where it may end here.

        state S1 in_progress, S2 not_started
        ""                ["S1->complete", "S1->complete, S2->start", "S2->start", "S2->start, S1->complete"]
        "S1->com"         ["plete", "plete, S2->start"]
        "S1->complete"    ["", ", S2->start", ", S2->start, S2->complete"]

    Each transition that may come next is there with the end behind it and with one more transition behind it, because
    one token may hold the end of a transition and what comes after it.
    """
    opening, closing = ("[", "]") if dst_format == "json" else ("", "")

    def item(t: Transition) -> str:
        return write_update([t], dst_format).removeprefix(opening).removesuffix(closing)

    written, between = opening, ""  # the whole transitions that text begins with; `state` is the one after them
    while True:
        options = [(written + between + item(t), apply_update(state, [t])) for t in legal_updates(state)]
        whole = next((option for option in options if text.startswith(option[0])), None)
        if whole is None:
            break
        (written, state), between = whole, ", "
    endings = [written + closing] if between else []
    for option, after in options:
        endings.append(option + closing)
        endings += [f"{option}, {item(t)}{closing}" for t in legal_updates(after)[:1]]
    return [ending[len(text) :] for ending in endings if ending.startswith(text)]
