"""Proof by trial that an evaluation sees neither the future nor the reference: what must not matter is changed.

    python -m prospect.audit --checkpoint DIR --data FILE [--perturbations 100000] [section.key=value ...]

A clip is streamed again up to a random frame f, with other values for everything that the model must not know there:

    future frames      the embeddings behind frame f
    future turns       what the user says behind frame f
    references         every reply, update and step time of the clip, also those before f
    other clips        the frames and user texts of the clips that share the batch

    the clip as it is    f193 f194 "What now?" f195 ... f240 | f241 f242 "Thanks" f243 ...    records up to f240
    changed behind f240  f193 f194 "What now?" f195 ... f240 | ~~~~ ~~~~ ~~~~~~~~ ~~~~ ...    the same, or a leak

Every record up to f must be the same. Each re-run is alone or beside other clips, frame by frame or with look-ahead,
since a leak may lie in any of these ways. Weights are widened to float64, in which a batch of another shape rounds
differently only far below TOLERANCE; decisions, texts and states must be equal outright. The audit goes through
stream_jobs, as every evaluation does, so that it also holds for a model or an engine that you have changed.

Prints how many values were changed and how many records were compared. At the first record that differs it prints what
gave it away, and exits with 1.
"""

import argparse
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prospect.clips import Turn
from prospect.config import Config
from prospect.dst import TRANSITIONS, Step, Transition
from prospect.errors import ProspectError, run_entry_point
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.model import Prospect
from prospect.stream import FrameRecord, Job, stream_jobs
from prospect.tokenizer import Tokenizer

TOLERANCE = 1e-6  # of a probability; the heads' answers are read in float32
KINDS = ("future frames", "future turns", "references", "other clips")
STREAMS = 4  # clips side by side, in the trials that are not alone
OTHER_TEXTS = ("I am done with that.", "What comes next?", "Stop, this is wrong.", "Thank you!")


@dataclass(frozen=True)
class Leak:
    """The first record that changed: which field of it, and which kinds of change, made alone, change it."""

    clip_id: str
    frame: int
    field: str
    before: Any
    after: Any
    kinds: list[str]  # none: it takes several together

    def __str__(self) -> str:
        source = " or ".join(self.kinds) or "several changes together"
        where = f"clip {self.clip_id}, frame {self.frame}: {self.field}"
        return f"LEAK: {where} was {self.before!r:.80} and became {self.after!r:.80} by {source}"


@dataclass(frozen=True)
class Trial:
    """One re-run: which clip, up to which of its frames, beside which others, and how far ahead the engine looks."""

    clip: int
    frame: int
    others: tuple[int, ...]
    lookahead: int
    seed: int  # of the values that take the place of the true ones


@dataclass
class Audit:
    """What was done so far."""

    trials: int = 0
    changed: Counter[str] = dataclasses.field(default_factory=Counter)  # values, by kind
    compared: int = 0  # records
    leak: Leak | None = None

    def __str__(self) -> str:
        what = ", ".join(f"{self.changed[kind]:,} {kind}" for kind in KINDS)
        found = str(self.leak) if self.leak else "0 changed"
        return f"""{self.trials:,} re-runs, {self.changed.total():,} values changed: {what}
{self.compared:,} records compared: {found}"""


# ---- other values --------------------------------------------------------------------------------


def perturbed(job: Job, frame: int, kinds: Iterable[str], draw: np.random.Generator) -> tuple[Job, Counter[str]]:
    """The clip with other values for what must not matter at records up to `frame`, and how many of each kind.

    Frames become noise of the same scale. Every turn keeps its role: a reply changes its words and its frames, an
    update its transitions and its frames, a future user's text its words.
    """
    clip, embeddings, changed = job.clip, job.embeddings, Counter()
    if "future frames" in kinds:
        row = frame + 1 - clip.start_frame
        seen, future = embeddings[:row], embeddings[row:]
        scale = float(np.std(np.asarray(embeddings, np.float32))) or 1.0
        embeddings = np.concatenate([seen, draw.normal(scale=scale, size=future.shape).astype(embeddings.dtype)])
        changed["future frames"] = len(future)
    turns, steps = list(clip.turns), clip.steps
    for index, turn in enumerate(turns):
        if turn.role == "user" and turn.end_frame > frame and "future turns" in kinds:
            turns[index] = dataclasses.replace(turn, text=other_text(turn.text, draw))
            changed["future turns"] += 1
        elif turn.role in ("assistant", "DST_UPDATE") and "references" in kinds:
            turns[index] = other_reference(turn, clip.start_frame, clip.end_frame, clip.steps, draw)
            changed["references"] += 1
    if "references" in kinds:
        steps = tuple(dataclasses.replace(step, start_ts=draw.random(), end_ts=1 + draw.random()) for step in steps)
        changed["references"] += len(steps)
    return Job(dataclasses.replace(clip, turns=tuple(turns), steps=steps), embeddings), changed


def other_text(text: str, draw: np.random.Generator) -> str:
    return str(draw.choice([other for other in OTHER_TEXTS if other != text]))


def other_reference(turn: Turn, first: int, last: int, steps: tuple[Step, ...], draw: np.random.Generator) -> Turn:
    """A reply or an update somewhere else in the clip, with another content."""
    start, end = sorted(int(frame) for frame in draw.integers(first, last + 1, 2))
    moved = dataclasses.replace(turn, start_frame=start, end_frame=end)
    if turn.role == "assistant":
        return dataclasses.replace(moved, text=other_text(turn.text, draw))
    moves = [Transition(step.id, name) for step in steps for name in TRANSITIONS]
    others = [move for move in moves if (move,) != turn.transitions]
    return dataclasses.replace(moved, transitions=(others[draw.integers(len(others))],))


# ---- streams compared ----------------------------------------------------------------------------


def records_until(
    model: Prospect, tokenizer: Tokenizer, jobs: list[Job], config: Config, last: int
) -> list[FrameRecord]:
    """The records of the first of these clips, streamed side by side, up to frame `last`."""
    found: list[FrameRecord] = []
    for job, records in stream_jobs(model, tokenizer, jobs, config, streams=len(jobs)):
        if job is jobs[0]:
            found += records
            if found[-1].frame_idx >= last:
                break
    return [record for record in found if record.frame_idx <= last]


def difference(before: list[FrameRecord], after: list[FrameRecord]) -> tuple[int, str, Any, Any] | None:
    """The first field that differs: (frame, field, before, after). Numbers may differ by TOLERANCE, times at will."""
    for one, other in itertools.zip_longest(before, after):
        if one is None or other is None:
            return (one or other).frame_idx, "record", one, other
        theirs = other.to_dict()
        for field, value in one.to_dict().items():
            found = theirs[field]
            if field == "context_event":
                value, found = ({**event, "seconds": 0} if event else None for event in (value, found))
            close = isinstance(value, float) and isinstance(found, float) and abs(value - found) <= TOLERANCE
            if value != found and not close:
                return one.frame_idx, field, value, found
    return None


def draw_trials(jobs: list[Job], config: Config, seed: int) -> Iterator[Trial]:
    """Re-runs without end: random clips and frames; in turn alone and beside others, with and without look-ahead."""
    draw = np.random.default_rng(seed)
    ways = itertools.cycle(itertools.product((0, min(STREAMS, len(jobs)) - 1), (1, config.infer.lookahead)))
    for number, (beside, lookahead) in enumerate(ways):
        clip, *others = draw.permutation(len(jobs)).tolist()[: beside + 1]
        frame = int(draw.integers(jobs[clip].clip.start_frame, jobs[clip].clip.end_frame + 1))
        yield Trial(clip, frame, tuple(others), lookahead, seed=number)


def audit(
    model: Prospect, tokenizer: Tokenizer, jobs: list[Job], config: Config, *, perturbations: int, seed: int = 0
) -> Iterator[Audit]:
    """Re-run clips until so many values have been changed, or a record has; yields the count after each re-run."""
    model = model.double()
    done = Audit()
    for trial in draw_trials(jobs, config, seed):
        done.trials += 1
        as_it_is, _ = rerun(model, tokenizer, jobs, config, trial, ())
        changed, counts = rerun(model, tokenizer, jobs, config, trial, KINDS)
        done.changed += counts
        done.compared += len(as_it_is)
        if found := difference(as_it_is, changed):
            alone = [rerun(model, tokenizer, jobs, config, trial, (kind,))[0] for kind in KINDS]
            kinds = [kind for kind, records in zip(KINDS, alone) if difference(as_it_is, records)]
            done.leak = Leak(jobs[trial.clip].clip.id, *found, kinds)
        yield done
        if done.leak or done.changed.total() >= perturbations:
            return


def rerun(
    model: Prospect, tokenizer: Tokenizer, jobs: list[Job], config: Config, trial: Trial, kinds: tuple[str, ...]
) -> tuple[list[FrameRecord], Counter[str]]:
    """The clip's records up to the trial's frame, with these kinds of values changed, and how many were."""
    draw = np.random.default_rng(trial.seed)
    job, changed = perturbed(jobs[trial.clip], trial.frame, kinds, draw)
    others = [jobs[index] for index in trial.others]
    if "other clips" in kinds:
        everything = ("future frames", "future turns", "references")
        others = [perturbed(other, other.clip.start_frame - 1, everything, draw)[0] for other in others]
        changed["other clips"] = sum(len(other.embeddings) for other in others)
    config = dataclasses.replace(config, infer=dataclasses.replace(config.infer, lookahead=trial.lookahead))
    return records_until(model, tokenizer, [job, *others], config, trial.frame), changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    what = "clip file, folder or pattern; repeatable"
    parser.add_argument("--data", required=True, action="append", metavar="FILE", help=what)
    parser.add_argument("--perturbations", type=int, default=100_000, metavar="N", help="values changed, at least")
    parser.add_argument("--seed", type=int, default=0, help="of frames, clips and the values put in")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.perturbations < 1:
        raise ProspectError("--perturbations must be at least 1", where="command line")
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides)
    jobs = load_jobs(arguments.data, config, tokenizer)
    done = Audit()
    with tqdm(total=arguments.perturbations, desc="values changed", dynamic_ncols=True) as bar:
        for done in audit(model, tokenizer, jobs, config, perturbations=arguments.perturbations, seed=arguments.seed):
            bar.update(min(done.changed.total(), arguments.perturbations) - bar.n)
    print(done)
    return 1 if done.leak else 0


if __name__ == "__main__":
    run_entry_point(main)
