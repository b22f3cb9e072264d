"""How much evidence a decision needs, chosen by streaming validation clips at a few settings.

A teacher-forced pass (prospect/thresholds.py) tells what a head's probabilities are worth, while context and order are
always right. It cannot tell what firing early costs: live, a wrong text stays in the context, so waiting pays. How long
is one number for both heads, `infer.evidence`, and it is searched here. The search begins high, where little is written
and streaming is fast, and ends when less evidence has been worse twice in a row. (Two certain frames reach 0.75 with
the default smoothing, so more evidence than that would never be found in a short event.)

What is best is named by `infer.tuned_for`: one of score.task_scores, or `mean`, the combined score.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from prospect.checkpoint import read_config, read_state
from prospect.clips import Clip
from prospect.config import Config
from prospect.data import Corpus, as_streamed, ordered_batches
from prospect.decisions import SETTINGS
from prospect.distributed import Ranks, gather_objects
from prospect.dst import write_update
from prospect.errors import ProspectError
from prospect.files import write_json
from prospect.jobs import Jobs
from prospect.model import Prospect
from prospect.score import ClipScore, cell_text, combined_score, decision_numbers, score_clip, task_scores
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import load_similarity
from prospect.thresholds import SequenceTrace, decision_report, teacher_forced, traces
from prospect.tokenizer import Tokenizer

T = TypeVar("T")

EVIDENCE = (0.73, 0.68, 0.62, 0.56, 0.5, 0.44, 0.38, 0.32, 0.27, 0.2)  # logits from 1 down to -1.4
CLIPS = 8  # validation clips that are streamed with each, spread evenly over all


@dataclass
class Tried:
    """One setting, what the streamed clips scored with it (see score.decision_numbers), and one of them to read."""

    evidence: float
    numbers: dict[str, float]
    example: str = ""


def some_of(clips: Sequence[T]) -> list[T]:
    """At most CLIPS of the clips, evenly spread."""
    return [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(CLIPS, len(clips))).astype(int))]


def with_decisions(config: Config, thresholds: dict[str, float], evidence: float) -> Config:
    """The configuration with these decisions. thresholds: by head."""
    speaking, dst = thresholds["speaking"], thresholds.get("dst", 0.5)
    infer = replace(config.infer, speaking_threshold=speaking, dst_threshold=dst, evidence=evidence)
    return replace(config, infer=infer)


def try_evidence(
    model: Prospect,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    config: Config,
    thresholds: dict[str, float],
    gather: Callable[[list[ClipScore] | ProspectError], list[list[ClipScore] | ProspectError]] = lambda mine: [mine],
    grid: Sequence[float] = EVIDENCE,
) -> Iterator[Tried]:
    """Stream the clips with less and less evidence, until two in a row are worse than the best.

    gather: with several ranks, each of which streams clips of its own, the outcomes of all. Raises ProspectError on
    every rank where a clip of any cannot be streamed.
    """
    similarity = load_similarity("lexical")  # decides nothing here; dialogue is scored with the rest
    best, worse = -1.0, 0
    for evidence in grid:
        trial, mine, example = with_decisions(config, thresholds, evidence), [], ""
        try:
            with torch.compiler.set_stance("force_eager"):  # blocks compiled for training know no cache
                for job, records in streamed_clips(model, tokenizer, jobs, trial):
                    mine.append(score_clip(job.clip, records, similarity, config.data.dst))
                    example = example or transcript(job.clip, records)
        except ProspectError as error:
            mine = error
        outcomes = gather(mine)
        for outcome in outcomes:
            if isinstance(outcome, ProspectError):
                raise outcome
        numbers = decision_numbers([score for scores in outcomes for score in scores])
        yield Tried(evidence, numbers, example)
        value = target_value(numbers, config.infer.tuned_for)
        best, worse = max(best, value), worse + 1 if value < best else 0
        if worse == 2:
            return


def transcript(clip: Clip, records: list[dict]) -> str:
    """A streamed clip to read: what was due and what was written, a line each, in order of time."""
    lines = [(frame, "due", text) for frame, text in clip.replies().items()]
    lines += [(turn.end_frame, "due", write_update(turn.transitions, "arrow")) for turn in clip.updates()]
    for record in records:
        written = [text for text in (record["dst_update"], record["text"]) if text is not None]
        lines += [(record["frame_idx"], "written", text) for text in written]
    lines.sort(key=lambda line: line[0])
    return "\n".join([clip.id, *(f"{clip.seconds(frame):8.1f} s  {who:7}  {text}" for frame, who, text in lines)])


def teacher_forced_odds(
    model: Prospect,
    corpus: Corpus,
    config: Config,
    batches: Iterable[list[int]],
    gather: Callable[[list[SequenceTrace]], list[list[SequenceTrace]]] = lambda mine: [mine],
) -> tuple[dict[str, float], dict[str, float]]:
    """Each head's even odds from one teacher-forced pass, and all numbers of that pass. gather: as in `try_evidence`,
    where each rank has batches of its own."""
    mine = [part for batch in batches for part in teacher_forced(model, corpus, batch, config).sequences]
    heads = traces(corpus, [part for parts in gather(mine) for part in parts])
    report = decision_report(heads)
    return {head: report[f"{head}_even_odds"] for head in heads}, report


def target_value(numbers: dict[str, float], target: str) -> float:
    """What a target says of streamed clips; `state` of a model that tracks none is `events`."""
    scores = task_scores(numbers)
    return combined_score(numbers) if target == "mean" else scores.get(target, scores["events"])


def best_tried(tried: list[Tried], target: str) -> Tried:
    """The one with the best target; of several alike, the middle one, which a small change harms least."""
    values = [target_value(one.numbers, target) for one in tried]
    at_best = [one for one, value in zip(tried, values) if value == max(values)]
    return at_best[len(at_best) // 2]


# ---- on any clips --------------------------------------------------------------------------------


def sweep(checkpoint: Path, jobs: Jobs, model: Prospect, tokenizer: Tokenizer, config: Config, ranks: Ranks) -> None:
    """Choose the decisions: thresholds from a teacher-forced pass, evidence on streamed clips. Print and store them.

    Every rank takes its share of the clips. A checkpoint's decisions belong to its own infer.decision. Those found for
    the other are only printed.
    """
    gather, data = functools.partial(gather_objects, ranks=ranks), as_streamed(config.data)
    files = [str(source.file.path) for source in jobs.sources]
    corpus = Corpus(files, data, tokenizer, jobs.vision_dim, rate=1.0, seed=config.run.seed)
    batches = list(ordered_batches(corpus.lengths(), config.data.batch_tokens))[ranks.rank :: ranks.world]
    bar = tqdm(batches, desc="teacher-forced", dynamic_ncols=True)
    odds, report = teacher_forced_odds(model, corpus, config, bar, gather)
    for head in odds:
        titles = {"event_f1": "event F1", "threshold": "at", "average_precision": "average precision", "auroc": "AUROC"}
        shown = ", ".join(f"{title} {report[f'{head}_{name}']:.4f}" for name, title in titles.items())
        print(f"{head}, teacher-forced: {shown}")

    target, numbers, tried = config.infer.tuned_for, some_of(range(len(jobs))), []
    print(f"\n{len(numbers)} clips streamed; the choice is for {target}, infer.tuned_for")
    print("| evidence | chosen for | speaking F1 | update F1 | joint goal | replies right |")
    print("|---:|---:|---:|---:|---:|---:|")
    for one in try_evidence(model, tokenizer, jobs.only(numbers).share(ranks), config, odds, gather):
        tried.append(one)
        shown = ("speaking_event_f1", "dst_event_f1", "joint_goal_accuracy", "replies_right_f1")
        cells = [target_value(one.numbers, target), *(one.numbers.get(name) for name in shown)]
        print(f"| {one.evidence} | {' | '.join(map(cell_text, cells))} |", flush=True)
    found = odds | {"evidence": best_tried(tried, target).evidence}
    print("chosen:", " ".join(f"infer.{SETTINGS[name]}={value:.6f}" for name, value in found.items()))
    if ranks.main:
        store(checkpoint, config, found)


def store(checkpoint: Path, config: Config, found: dict[str, float]) -> None:
    """Make what was found the checkpoint's own. Its decisions belong to its own infer.decision."""
    decision, own = config.infer.decision, read_config(checkpoint).infer.decision
    if decision != own:
        print(f"not stored, for the checkpoint's infer.decision is {own}: use infer.decision={decision} with the above")
        return
    state = read_state(checkpoint)
    state.thresholds |= found
    write_json(checkpoint / "state.json", dataclasses.asdict(state))
    print(f"stored in {checkpoint / 'state.json'}")
