"""Step times from a recipe and a dialogue: which turn of the assistant begins which step?

The recipe is numbered lines, the clip's `inferred_knowledge` or one file for all clips. A turn is as similar to a step
as the most similar of its sentences, 1 where it holds the step's very words; below `least` it does not name the step.
Turns are dealt out to the steps in the order of both, so that the similarities add up to the most:

    recipe       1. Remove the wheels     2. Detach the bumper     3. Remove the roof
    assistant    7.9 Unscrew the first wheel.    20.9 Now remove the third.    44.0 Detach the bumper.    60.0 Done!
    dst          S1  7.9 .. 44.0          S2  44.0 .. 60.0         (3. is not named: left out, and reported)

A step starts when the first of its turns is spoken, and is complete when the next step starts; the last, at the
assistant's last turn, if there is a later one. So the times are those of what was *said*. They are late where the user
is ahead of the assistant, steps that are done side by side come out one after the other, and a dialogue in another
order than its recipe loses steps. Read the report, and some of the clips, before you learn from them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prospect.clip_files import ClipFile, parsed_clip
from prospect.clips import Clip
from prospect.errors import ProspectError
from prospect.text_metrics import Similarity, words


@dataclass
class Report:
    """How many steps found their turn, and a line for each clip with one that did not."""

    clips: int = 0
    kept: int = 0  # clips that have steps already
    steps: int = 0
    aligned: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = f"; {self.kept} clips have steps already and keep them" if self.kept else ""
        total = f"{self.clips} clips: {self.aligned} of {self.steps} steps are named by a turn{kept}"
        return "\n".join([*self.notes, total])


def clips_with_steps(
    clips: Path, recipe: Path | None, similarity: Similarity, least: float, report: Report
) -> Iterator[dict]:
    """The clips of a file with `dst` made from their recipe, or the one in the file `recipe`.

    A clip that has steps is left as it is. Raises ProspectError at the first clip that cannot be read.
    """
    given = None if recipe is None else read_recipe(recipe)
    for index, raw in enumerate(ClipFile(clips)):
        clip = parsed_clip(raw, str(clips), index)
        report.clips += 1
        if clip.steps:
            report.kept += 1
            yield raw
            continue
        names = given or recipe_steps(clip.knowledge)
        steps = timed_steps(clip, names, similarity, least)
        report.steps, report.aligned = report.steps + len(names), report.aligned + len(steps)
        found = {step["id"] for step in steps}
        if missing := [f"{number}. {name}" for number, name in enumerate(names, 1) if f"S{number}" not in found]:
            report.notes.append(f"{clip.where}: no turn names {'; '.join(missing)}")
        if not names:
            report.notes.append(f"{clip.where}: no recipe (inferred_knowledge has no numbered lines)")
        yield raw | {"dst": steps}


def read_recipe(path: Path) -> list[str]:
    try:
        names = recipe_steps(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="a text file in UTF-8") from None
    if not names:
        raise ProspectError(
            "has no numbered line", where=str(path), remedy='a line for each step: "1. Remove the wheels"'
        )
    return names


def recipe_steps(text: str) -> list[str]:
    """The numbered lines of a recipe: "1. Remove the wheels", "2) Detach the bumper"."""
    return [match[1] for line in text.splitlines() if (match := re.fullmatch(r"\s*\d+[.):]\s+(.*\S)\s*", line))]


def timed_steps(clip: Clip, names: list[str], similarity: Similarity, least: float) -> list[dict]:
    """The raw steps that a turn of the assistant names, with their times; step n of the recipe is Sn."""
    turns = sorted((turn for turn in clip.turns if turn.role == "assistant"), key=lambda turn: turn.end_frame)
    if not turns or not names:
        return []
    begins = first_turns(turn_similarity([turn.text for turn in turns], names, similarity), least)
    spoken = [clip.seconds(turn.end_frame) for turn in turns]
    named = [(number, spoken[turn]) for number, turn in enumerate(begins) if turn is not None]
    ends = [start for _, start in named[1:]] + [spoken[-1]]
    return [
        {
            "type": "step",
            "id": f"S{number + 1}",
            "name": names[number],
            "start_ts": start,
            "end_ts": end if end > start else None,  # nothing is said after the last step began
        }
        for (number, start), end in zip(named, ends)
    ]


def turn_similarity(turns: list[str], names: list[str], similarity: Similarity) -> np.ndarray:
    """[T, S] how much each turn names each step, at most 1."""
    sentences = [re.split(r"(?<=[.!?])\s+", turn.strip()) for turn in turns]
    between = similarity.between([sentence for turn in sentences for sentence in turn], names)  # [sentences, S]
    ends = np.cumsum([len(turn) for turn in sentences])
    found = np.stack([between[end - len(turn) : end].max(axis=0) for end, turn in zip(ends, sentences)])
    for t, turn in enumerate(turns):
        for s, name in enumerate(names):
            if f" {' '.join(words(name))} " in f" {' '.join(words(turn))} ":
                found[t, s] = 1.0
    return found


def first_turns(similarity: np.ndarray, least: float) -> list[int | None]:
    """For each step the first turn that names it, or None; similarity [T, S].

    Every turn is given a step, never an earlier one than the turn before it, so that the sum of what the similarities
    have above `least` is largest (dynamic programming).
    """
    T, S = similarity.shape
    gain = np.maximum(similarity - least, 0)  # [T, S]
    best = np.zeros(S)  # of the turns so far, where the latest has step s
    came_from = np.zeros((T, S), int)
    for t in range(T):
        for s in range(S):
            came_from[t, s] = best[: s + 1].argmax()
        best = best[came_from[t]] + gain[t]
    step, begins = int(best.argmax()), [None] * S
    for t in reversed(range(T)):
        if gain[t, step] > 0:
            begins[step] = t
        step = came_from[t, step]
    return begins
