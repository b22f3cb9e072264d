"""The heads' thresholds, chosen by streaming: validation clips are streamed at a few settings, and the best is kept.

A teacher-forced pass (prospect/thresholds.py) finds where each head separates best while context and order are always
right. Live, a text written too early stays in the context, so waiting pays and the best thresholds lie higher. How much
higher differs between models, and is the same for both heads to within noise. So one number is searched: a common shift
of both thresholds, in logits, each head starting from its own teacher-forced threshold. The search begins high, where little is written and streaming is fast, and ends when lower
thresholds have not helped twice.

What is best is named by `infer.tuned_for`: `events`, the mean of the heads' event F1; `replies`, the F1 of replies right;
`state`, joint goal accuracy; or `mean`, the mean of all that apply to the model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from prospect.config import Config
from prospect.data import Corpus
from prospect.errors import ProspectError
from prospect.metrics import logit
from prospect.model import Prospect
from prospect.score import ClipScore, decision_numbers, score_clip
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import load_similarity
from prospect.thresholds import decision_report, teacher_forced, traces
from prospect.tokenizer import Tokenizer

T = TypeVar("T")

SHIFTS = (2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0)  # logits, added to both thresholds
CLIPS = 8  # validation clips that are streamed at each shift, spread evenly over all


@dataclass
class Tried:
    """One setting: the thresholds by head, and what the streamed clips scored with them."""

    thresholds: dict[str, float]
    numbers: dict[str, float]  # see score.decision_numbers


def some_of(clips: list[T]) -> list[T]:
    """At most CLIPS of the clips, evenly spread."""
    return [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(CLIPS, len(clips))).astype(int))]


def shifted(thresholds: dict[str, float], shift: float) -> dict[str, float]:
    """Each threshold moved by so many logits."""
    return {head: float(1 / (1 + np.exp(-(logit(threshold) + shift)))) for head, threshold in thresholds.items()}


def with_thresholds(config: Config, thresholds: dict[str, float]) -> Config:
    """The configuration with these thresholds; a head that is not named keeps its own, or 0.5."""
    infer = config.infer
    speaking = thresholds.get("speaking", infer.speaking_threshold or 0.5)
    dst = thresholds.get("dst", infer.dst_threshold or 0.5)
    return replace(config, infer=replace(infer, speaking_threshold=speaking, dst_threshold=dst))


def try_thresholds(
    model: Prospect,
    tokenizer: Tokenizer,
    jobs: list[Job],
    config: Config,
    start: dict[str, float],
    gather: Callable[[list[ClipScore] | ProspectError], list[list[ClipScore] | ProspectError]] = lambda mine: [mine],
) -> Iterator[Tried]:
    """Stream the clips at one shift of the thresholds `start` after another, until two in a row are not the best.

    gather: with several ranks, each of which streams clips of its own, the outcomes of all. Raises ProspectError on
    every rank where a clip of any cannot be streamed.
    """
    similarity = load_similarity("lexical")  # decides nothing here; dialogue is scored with the rest
    best, worse = -1.0, 0
    for shift in SHIFTS:
        thresholds = shifted(start, shift)
        trial = with_thresholds(config, thresholds)
        try:
            with torch.compiler.set_stance("force_eager"):  # blocks compiled for training know no cache
                clips = streamed_clips(model, tokenizer, jobs, trial)
                mine = [score_clip(job.clip, records, similarity, config.data.dst) for job, records in clips]
        except ProspectError as error:
            mine = error
        outcomes = gather(mine)
        for outcome in outcomes:
            if isinstance(outcome, ProspectError):
                raise outcome
        numbers = decision_numbers([score for scores in outcomes for score in scores])
        yield Tried(thresholds, numbers)
        value = target_value(numbers, config.infer.tuned_for)
        best, worse = max(best, value), 0 if value > best else worse + 1
        if worse == 2:
            return


def teacher_forced_thresholds(
    model: Prospect, corpus: Corpus, config: Config, batches: Iterable[list[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Where the search begins: each head's threshold from one teacher-forced pass, and all numbers of that pass."""
    parts = [part for batch in batches for part in teacher_forced(model, corpus, batch, config).sequences]
    heads = traces(corpus, parts)
    report = decision_report(heads)
    return {head: report[f"{head}_threshold"] for head in heads}, report


def target_value(numbers: dict[str, float], target: str) -> float:
    """What a target says of streamed clips; task state counts where the model tracks it."""
    f1 = [numbers[name] for name in ("speaking_event_f1", "dst_event_f1") if name in numbers]
    values = {"events": sum(f1) / len(f1), "replies": numbers["replies_right_f1"]}
    if "joint_goal_accuracy" in numbers:
        values["state"] = numbers["joint_goal_accuracy"]
    if target == "mean":
        return sum(values.values()) / len(values)
    return values.get(target, values["events"])


def best_tried(tried: list[Tried], target: str) -> Tried:
    """The one with the best target; of several alike, the middle one, which a small change harms least."""
    values = [target_value(one.numbers, target) for one in tried]
    at_best = [one for one, value in zip(tried, values) if value == max(values)]
    return at_best[len(at_best) // 2]
