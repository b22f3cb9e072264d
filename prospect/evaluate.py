"""Evaluation: every clip streamed and scored; and the choice of when the heads fire, on streamed clips.

    python -m prospect.evaluate --checkpoint DIR --data FILE [--strategy NAME] [--out DIR] [section.key=value ...]
    python -m prospect.evaluate --checkpoint DIR --data FILE --sweep

The first streams every clip (with look-ahead, several at once), writes one records file a clip and then metrics.json
and metrics.md under --out, and prints the table. Interrupted and started again, it resumes with the clips that are
missing. The second chooses how much evidence the heads need, on some of these clips (prospect/tuning.py), prints what
was tried and stores the choice in the checkpoint.

What each number means stands in prospect/metrics.py. All of them are sums over clips in one fixed order, divided once
at the end, so they do not depend on look-ahead, on how many streams run at once or on where an evaluation was
interrupted.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prospect.check import usable_clips
from prospect.checkpoint import flatten, read_config, read_state
from prospect.clip_files import open_source
from prospect.config import Config, to_dict
from prospect.data import Corpus, ordered_batches
from prospect.decisions import SETTINGS
from prospect.errors import ProspectError, run_entry_point
from prospect.features import features_of, warnings
from prospect.files import read_json, read_lines, write_json, write_text
from prospect.load import load_for_inference, load_job, trained_on
from prospect.metrics import by_dataset
from prospect.model import Prospect
from prospect.score import ClipScore, cell_text, not_computed, score_clip, summarise, table
from prospect.stream import FrameRecord, Job, streamed_clips
from prospect.text_metrics import Similarity, load_similarity
from prospect.tokenizer import Tokenizer
from prospect.tuning import best_tried, some_of, target_value, teacher_forced_odds, try_evidence

STREAMS = 8  # clips streamed at once, by default
RECORD_FIELDS = {field.name for field in dataclasses.fields(FrameRecord)}


# ---- streamed clips ------------------------------------------------------------------------------


def stream_and_score(
    model: Prospect,
    tokenizer: Tokenizer,
    jobs: list[Job],
    config: Config,
    similarity: Similarity,
    *,
    streams: int,
    records_dir: Path | None = None,
) -> Iterator[ClipScore]:
    """Stream the clips and score each as it ends.

    With records_dir, each clip's records become a JSONL file there once it has ended, and a clip that has such a file
    is scored from it instead of being streamed. A file that is not whole does not count.
    """
    missing = []
    for job in jobs:
        records = None if records_dir is None else read_records(records_file(records_dir, job.clip.id), job)
        if records is None:
            missing.append(job)
        else:
            yield score_clip(job.clip, records, similarity, config.data.dst)
    for job, records in streamed_clips(model, tokenizer, missing, config, streams=min(streams, max(1, len(missing)))):
        if records_dir is not None:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(records_file(records_dir, job.clip.id), "".join(lines))
        yield score_clip(job.clip, records, similarity, config.data.dst)


def records_file(records_dir: Path, clip_id: str) -> Path:
    """Where a clip's records lie: named by its id, written so that any id is a file name, and no two ids the same."""
    name = urllib.parse.quote(clip_id, safe=" ")
    if len(name) > 200:  # file systems end at 255 bytes
        name = f"{name[:160]}-{hashlib.sha256(clip_id.encode()).hexdigest()[:32]}"
    return records_dir / f"{name}.jsonl"


def read_records(path: Path, job: Job) -> list[dict] | None:
    """The records of a finished clip; None where there is no file, or not one with a whole record for every frame."""
    try:
        records = [json.loads(line) for line in read_lines(path)]
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: broken off, or not UTF-8
        return None
    except OSError as error:
        raise ProspectError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not all(isinstance(record, dict) and record.keys() == RECORD_FIELDS for record in records):
        return None
    first = job.clip.start_frame
    whole = [record["frame_idx"] for record in records] == list(range(first, first + len(job.embeddings)))
    return records if whole else None


def load_jobs(paths: Iterable[str], config: Config, checkpoint: Path | None = None) -> list[Job]:
    """Every clip of the files, with its embeddings, all checked first as before a training (prospect/check.py).

    A bad clip, or an id that occurs twice, raises ProspectError, or with `data.on_bad: skip` is left out. What was left
    out, and warnings, are told on stderr; also where the embeddings are not like those that `checkpoint` knows.
    """
    sources = [open_source(path, config.data.embeddings, config.data.embeddings_outside) for path in paths]
    usable = usable_clips(sources, config.data, config.model.vision_dim)
    tell(usable.warnings, usable.skipped)
    if not usable.clips:
        raise ProspectError("no usable clip", where=", ".join(paths), remedy="python -m prospect.check FILE")
    if checkpoint is not None:
        features = features_of([(sources[number], index) for number, index in usable.clips])
        tell([f"warning: {line}" for line in warnings(features, trained_on(checkpoint), checkpoint)], [])
    return [load_job(sources[number], index, config.model.vision_dim)[0] for number, index in usable.clips]


# ---- reporting -----------------------------------------------------------------------------------


def footing(
    checkpoint: Path, config: Config, similarity: Similarity, command: str, results: dict[str, dict[str, float]]
) -> str:
    """What stands below every table: command, checkpoint step, thresholds, the similarity's name, what is not in it."""
    infer, step = config.infer, read_state(checkpoint).step
    thresholds = f"speaking {infer.speaking_threshold:.4f}"
    thresholds += f", updates {infer.dst_threshold:.4f}" if config.data.dst else ""
    thresholds += f"; evidence {infer.evidence:.4f}"
    used = f"thresholds: {thresholds}; strategy: {infer.strategy}; decision: {infer.decision}"
    lines = [f"command: `{command}`", f"checkpoint: {checkpoint}, step {step}; {used}; similarity: {similarity.name}"]
    if absent := not_computed(results):
        lines.append(f"not computed: {absent}")
    return "  \n".join(lines)


def sweep(
    checkpoint: Path, corpus: Corpus, jobs: list[Job], model: Prospect, tokenizer: Tokenizer, config: Config
) -> None:
    """Choose the decisions: thresholds from a teacher-forced pass, evidence on streamed clips. Print and store them.

    A checkpoint's decisions belong to its own infer.decision. Those found for the other are only printed.
    """
    batches = list(ordered_batches(corpus.lengths(), config.data.batch_tokens))
    bar = tqdm(batches, desc="teacher-forced", dynamic_ncols=True)
    odds, report = teacher_forced_odds(model, corpus, config, bar)
    for head in odds:
        titles = {"event_f1": "event F1", "threshold": "at", "average_precision": "average precision", "auroc": "AUROC"}
        shown = ", ".join(f"{title} {report[f'{head}_{name}']:.4f}" for name, title in titles.items())
        print(f"{head}, teacher-forced: {shown}")

    target, jobs, tried = config.infer.tuned_for, some_of(jobs), []
    print(f"\n{len(jobs)} clips streamed; the choice is for {target}, infer.tuned_for")
    print("| evidence | chosen for | speaking F1 | update F1 | joint goal | replies right |")
    print("|---:|---:|---:|---:|---:|---:|")
    for one in try_evidence(model, tokenizer, jobs, config, odds):
        tried.append(one)
        shown = ("speaking_event_f1", "dst_event_f1", "joint_goal_accuracy", "replies_right_f1")
        cells = [target_value(one.numbers, target), *(one.numbers.get(name) for name in shown)]
        print(f"| {one.evidence} | {' | '.join(map(cell_text, cells))} |", flush=True)
    found = odds | {"evidence": best_tried(tried, target).evidence}
    print("chosen:", " ".join(f"infer.{SETTINGS[name]}={value:.6f}" for name, value in found.items()))
    decision, own = config.infer.decision, read_config(checkpoint).infer.decision
    if decision != own:
        print(f"not stored, for the checkpoint's infer.decision is {own}: use infer.decision={decision} with the above")
        return
    state = read_state(checkpoint)
    state.thresholds |= found
    write_json(checkpoint / "state.json", dataclasses.asdict(state))
    print(f"stored in {checkpoint / 'state.json'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="clip files")
    parser.add_argument("--strategy", metavar="NAME", help="when the context is full; short for infer.strategy=NAME")
    parser.add_argument("--out", type=Path, metavar="DIR", help="records, metrics.json and metrics.md go here")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"clips streamed at once; default: {STREAMS}")
    what = "DIR: a local sentence-transformers model"
    parser.add_argument("--similarity", default="lexical", metavar="lexical|DIR", help=what)
    what = "choose on these clips how much evidence the heads need, and store it"
    parser.add_argument("--sweep", action="store_true", help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    # argparse takes every word up to the next option for a file, overrides too.
    words, arguments.data = arguments.data, []
    for word in words:
        (arguments.overrides if "=" in word and not Path(word).exists() else arguments.data).append(word)
    if not arguments.data:
        raise ProspectError("--data names no clip file", where="command line", remedy="--data FILE [FILE ...]")
    if arguments.streams < 1:
        raise ProspectError("--streams must be at least 1", where="command line")
    if arguments.sweep and arguments.out:
        remedy = "leave --out away: the choice goes into the checkpoint"
        raise ProspectError("--sweep writes no records", where="command line", remedy=remedy)
    strategy = [] if arguments.strategy is None else [f"infer.strategy={arguments.strategy}"]
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides + strategy)
    if arguments.sweep:
        vision_dim, seed = config.model.vision_dim, config.run.seed
        as_streamed = dataclasses.replace(config.data, layout="stream", frames="all", long_clips="split")  # every frame
        corpus = Corpus(arguments.data, as_streamed, tokenizer, vision_dim, rate=1.0, seed=seed)
        jobs = load_jobs(arguments.data, config, arguments.checkpoint)
        sweep(arguments.checkpoint, corpus, jobs, model, tokenizer, config)
    else:
        evaluate(arguments, config, tokenizer, model)
    return 0


def evaluate(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Stream and score the clips, print the table, and with --out write everything down."""
    checkpoint, out = arguments.checkpoint, arguments.out
    similarity = load_similarity(arguments.similarity)
    jobs = load_jobs(arguments.data, config, checkpoint)
    records_dir, taken_over = None, 0
    if out is not None:
        records_dir = out / "records"
        same_settings(out, settings(checkpoint, config, arguments.data, jobs))
        taken_over = sum(records_file(records_dir, job.clip.id).exists() for job in jobs)
        if taken_over:
            print(f"{taken_over} of {len(jobs)} clips are streamed already, in {records_dir}", flush=True)
    started = time.perf_counter()
    scoring = stream_and_score(
        model, tokenizer, jobs, config, similarity, streams=arguments.streams, records_dir=records_dir
    )
    scores = list(tqdm(scoring, total=len(jobs), desc="clips", dynamic_ncols=True))
    seconds = time.perf_counter() - started
    results = by_dataset([(score.dataset, score) for score in scores], summarise)
    command = as_typed(arguments)
    report = table(results) + "\n\n" + footing(checkpoint, config, similarity, command, results)
    print(report)
    if not taken_over:
        print(f"{sum(score.frames for score in scores)} frames in {seconds:.1f} s")
    if out is not None:
        write_json(out / "metrics.json", {"command": command, "similarity": similarity.name, "results": results})
        write_text(out / "metrics.md", report + "\n")


def tell(warnings: list[str], skipped: list[str]) -> None:
    for line in warnings + [f"skipped: {line}" for line in skipped]:
        print(line, file=sys.stderr)


def as_typed(arguments: argparse.Namespace) -> str:
    """The command that gives these results again. (--out is left away: it changes none of them.)"""
    words = ["python", "-m", "prospect.evaluate", "--checkpoint", str(arguments.checkpoint), "--data", *arguments.data]
    words += [] if arguments.strategy is None else ["--strategy", arguments.strategy]
    words += [] if arguments.streams == STREAMS else ["--streams", str(arguments.streams)]
    words += [] if arguments.similarity == "lexical" else ["--similarity", arguments.similarity]
    return shlex.join(words + arguments.overrides)


def settings(checkpoint: Path, config: Config, files: list[str], jobs: list[Job]) -> dict[str, Any]:
    """All that decides what the records of these clips are, by name: checkpoint, configuration, clips, embeddings."""
    state, data = read_state(checkpoint), hashlib.sha256()
    for path in files:
        data.update(Path(path).read_bytes())
    for job in jobs:
        data.update(np.ascontiguousarray(job.embeddings))
    found = flatten(to_dict(config)) | {f"trained on {name}": digest for name, digest in state.data.items()}
    for file in sorted(checkpoint.glob("*.safetensors")):  # a run trained again writes new files under the old names
        found[f"time of {file.name}"] = file.stat().st_mtime_ns
    del found["infer.lookahead"]  # changes no record
    return found | {"checkpoint": str(checkpoint.resolve()), "step": state.step, "the clips' digest": data.hexdigest()}


def same_settings(out: Path, wanted: dict[str, Any]) -> None:
    """Begin the folder `out`, or make sure that the records it holds were made with these very settings.

    Raises ProspectError naming what differs, and where nothing can be written there.
    """
    path, remedy = out / "settings.json", "name another --out, or remove this one"
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProspectError(f"cannot be used: {error.strerror}", where=str(out), remedy="name another --out") from error
    try:
        then = read_json(path) if any((out / "records").glob("*.jsonl")) else wanted
    except ProspectError as error:
        what = "does not tell by which settings its records were made"
        raise ProspectError(what, where=str(path), remedy=remedy) from error
    names = [name for name in sorted({*then, *wanted}) if then.get(name) != wanted.get(name)]
    if names:
        differ = "; ".join(f"{name} was {then.get(name)}, is {wanted.get(name)}" for name in names)
        raise ProspectError(f"holds records made with other settings: {differ}", where=str(out), remedy=remedy)
    write_json(path, wanted)


if __name__ == "__main__":
    run_entry_point(main)
