"""Evaluation: every clip streamed and scored; and the choice of when the heads fire, on streamed clips.

    python -m prospect.evaluate --checkpoint DIR --data FILE [--strategy NAME] [--out DIR] [section.key=value ...]
    python -m prospect.evaluate --checkpoint DIR --data FILE --moments reference
    python -m prospect.evaluate --records OUT [--data FILE]
    python -m prospect.evaluate --checkpoint DIR --data FILE --sweep
    python -m prospect.evaluate --checkpoint DIR --data FILE --quiet FILE [--max-false-alarms N]

The first streams every clip (with look-ahead, several at once), writes one records file a clip and then metrics.json
and metrics.md under --out, and prints the table. Interrupted and started again, it resumes with the clips that are
missing. The second adds the table of a model that is told when: at the last frame of each turn of the reference it
speaks or updates, and nowhere else, and the texts are its own. The third prints the tables again from what was written
under --out, without model or embeddings. The fourth chooses how much evidence the heads need, on some of these clips
(prospect/tuning.py), prints what was tried and stores the choice in the checkpoint; so does the fifth, but among what
is certified to be quiet where nothing happens (prospect/quiet.py).

docs/metrics.md says what each number means. All of them are sums over clips in one fixed order, divided once
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prospect.check import usable_clips
from prospect.checkpoint import flatten, read_config, read_state
from prospect.clip_files import ClipFile, fit_rows, open_source
from prospect.config import Config, to_dict
from prospect.context import check_reserved, check_streamable
from prospect.data import Corpus, as_streamed, ordered_batches
from prospect.decisions import SETTINGS, reference_moments
from prospect.errors import ProspectError, run_entry_point
from prospect.features import features_of
from prospect.files import read_json, write_json, write_text
from prospect.load import load_for_inference, load_job, unlike_training
from prospect.metrics import by_dataset
from prospect.model import Prospect
from prospect.quiet import MAX_FALSE_ALARMS, choose_quiet
from prospect.records import (
    RECORDS,
    RECORDS_TOLD,
    REFERENCES,
    read_records,
    records_file,
    same_settings,
    write_references,
)
from prospect.score import TIMING_TABLE, ClipScore, cell_text, not_computed, score_clip, summarise, table
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import Similarity, load_similarity
from prospect.tokenizer import Tokenizer
from prospect.tuning import best_tried, some_of, target_value, teacher_forced_odds, try_evidence

STREAMS = 8  # clips streamed at once, by default


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
        records = None if records_dir is None else read_records(records_file(records_dir, job.clip.id), job.clip)
        if records is None or len(records) != job.num_frames:
            missing.append(job)
        else:
            yield score_clip(job.clip, records, similarity, config.data.dst)
    for job, records in streamed_clips(model, tokenizer, missing, config, streams=min(streams, max(1, len(missing)))):
        if records_dir is not None:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(records_file(records_dir, job.clip.id), "".join(lines))
        yield score_clip(job.clip, records, similarity, config.data.dst)


def score_records(folder: Path, paths: list[str], similarity: Similarity) -> list[ClipScore]:
    """Score the clips of the files `paths` by the records that an evaluation has left in a folder.

    Raises ProspectError at a clip without complete records.
    """
    scores = []
    for path in paths:
        file = ClipFile(path)
        for clip in map(file.clip, range(len(file))):
            stored = records_file(folder, clip.id)
            records = read_records(stored, clip)
            if not records:
                what = f"no complete records of clip {clip.id}"
                remedy = "let the evaluation run to its end, or name the clips with --data"
                raise ProspectError(what, where=str(stored), remedy=remedy)
            clip, _ = fit_rows(clip, len(records))
            scores.append(score_clip(clip, records, similarity, records[0]["dst_update_prob"] is not None))
    return scores


def load_jobs(paths: Iterable[str], config: Config, tokenizer: Tokenizer, checkpoint: Path | None = None) -> list[Job]:
    """Every clip of the files, ready to be streamed, all checked first as before a training (prospect/check.py).

    A bad clip, an id that occurs twice, or a clip that does not fit into the context (prospect/context.py) raises
    ProspectError, or with `data.on_bad: skip` is left out. What was left out, and warnings, go to stderr, also
    where the clips are not like those `checkpoint` was trained on.
    """
    check_reserved(tokenizer, config)
    sources = [open_source(path, config.data.embeddings, config.data.embeddings_outside) for path in paths]
    usable = usable_clips(sources, config.data, config.model.vision_dim)
    jobs, chosen = [], []
    for number, index in usable.clips:
        job, _ = load_job(sources[number], index, config.model.vision_dim)
        try:
            check_streamable(job.clip, job.embeddings.shape[1], tokenizer, config)
        except ProspectError as error:
            if config.data.on_bad == "stop":
                raise
            usable.skipped.append(str(error))
            continue
        jobs.append(job)
        chosen.append((sources[number], index))
    tell(usable.warnings, usable.skipped)
    if not jobs:
        raise ProspectError("no usable clip", where=", ".join(paths), remedy="python -m prospect.check FILE")
    if checkpoint is not None:
        features = features_of(chosen)
        lines = unlike_training(checkpoint, [job.clip for job in jobs], config, features)
        tell([f"warning: {line}" for line in lines], [])
    return jobs


# ---- reporting -----------------------------------------------------------------------------------


def footing(made: dict[str, Any], similarity: Similarity, command: str, results: dict[str, dict[str, float]]) -> str:
    """What stands below every table: command, checkpoint step, thresholds, the similarity's name, what is not in it.

    made: by what settings the records were made, by name, as `settings` has them.
    """
    thresholds = f"speaking {made['infer.speaking_threshold']:.4f}"
    thresholds += f", updates {made['infer.dst_threshold']:.4f}" if made["data.dst"] else ""
    thresholds += f"; evidence {made['infer.evidence']:.4f}"
    used = f"thresholds: {thresholds}; strategy: {made['infer.strategy']}; decision: {made['infer.decision']}"
    source = f"checkpoint: {made['checkpoint']}, step {made['step']}"
    lines = [f"command: `{command}`", f"{source}; {used}; similarity: {similarity.name}"]
    if absent := not_computed(results):
        lines.append(f"not computed: {absent}")
    return "  \n".join(lines)


def report(
    scores: list[ClipScore],
    told: list[ClipScore],
    made: dict[str, Any],
    similarity: Similarity,
    command: str,
    out: Path | None,
) -> None:
    """Print the tables, and write them and all numbers into `out`. told: scores of the model told when, or none."""
    results = by_dataset([(score.dataset, score) for score in scores], summarise)
    found, text = {"command": command, "similarity": similarity.name, "results": results}, table(results)
    if told:
        numbers = by_dataset([(score.dataset, score) for score in told], summarise)
        # Whether it was in time is no merit of one who was told the time.
        of_time = {"combined_score", *(name for name, _ in TIMING_TABLE)}
        found["told_when"] = {
            dataset: {name: value for name, value in of.items() if "_event_" not in name and name not in of_time}
            for dataset, of in numbers.items()
        }
        text += f"\n\nTold when to speak and update, by the reference:\n\n{table(found['told_when'])}"
    text += "\n\n" + footing(made, similarity, command, results)
    print(text)
    if out is not None:
        write_json(out / "metrics.json", found)
        write_text(out / "metrics.md", text + "\n")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="clip files")
    what = "score again what an evaluation has left in OUT; the clips are those that lie there, or of --data"
    parser.add_argument("--records", type=Path, metavar="OUT", help=what)
    parser.add_argument("--strategy", metavar="NAME", help="when the context is full; short for infer.strategy=NAME")
    parser.add_argument("--out", type=Path, metavar="DIR", help="records, metrics.json and metrics.md go here")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"clips streamed at once; default: {STREAMS}")
    what = "DIR: a local sentence-transformers model"
    parser.add_argument("--similarity", default="lexical", metavar="lexical|DIR", help=what)
    what = "reference: score beside it a second pass in which the reference decides when to speak and update"
    parser.add_argument("--moments", choices=("own", "reference"), default="own", help=what)
    what = "choose on these clips how much evidence the heads need, and store it in the checkpoint's state.json"
    parser.add_argument("--sweep", action="store_true", help=what)
    what = "choose evidence with which at most N false alarms come in an hour of these clips, in which nothing happens"
    parser.add_argument("--quiet", metavar="FILE", help=what)
    parser.add_argument("--max-false-alarms", type=float, metavar="N", help=f"per hour; default: {MAX_FALSE_ALARMS:g}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    # argparse takes every word up to the next option for a file, overrides too.
    words, arguments.data = arguments.data, []
    for word in words:
        (arguments.overrides if "=" in word and not Path(word).exists() else arguments.data).append(word)
    check_arguments(arguments)
    if arguments.records is not None:
        print_again(arguments)
        return 0
    strategy = [] if arguments.strategy is None else [f"infer.strategy={arguments.strategy}"]
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides + strategy)
    if arguments.sweep:
        vision_dim, seed = config.model.vision_dim, config.run.seed
        corpus = Corpus(arguments.data, as_streamed(config.data), tokenizer, vision_dim, rate=1.0, seed=seed)
        jobs = load_jobs(arguments.data, config, tokenizer, arguments.checkpoint)
        sweep(arguments.checkpoint, corpus, jobs, model, tokenizer, config)
    elif arguments.quiet:
        most = MAX_FALSE_ALARMS if arguments.max_false_alarms is None else arguments.max_false_alarms
        quiet = load_jobs([arguments.quiet], config, tokenizer)
        jobs = load_jobs(arguments.data, config, tokenizer, arguments.checkpoint)
        evidence = choose_quiet(model, tokenizer, quiet, jobs, config, most)
        print(f"chosen: infer.evidence={evidence}")
        store(arguments.checkpoint, config, {"evidence": evidence})
    else:
        evaluate(arguments, config, tokenizer, model)
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ProspectError where the command line asks for what does not go together."""
    where, chosen = "command line", "--quiet" if arguments.quiet else "--sweep" if arguments.sweep else None
    if arguments.records is None and not arguments.data:
        raise ProspectError("--data names no clip file", where=where, remedy="--data FILE [FILE ...]")
    if (arguments.records is None) == (arguments.checkpoint is None):
        what = "what is to be measured: --checkpoint, or the --records that one has left?"
        raise ProspectError(what, where=where, remedy="give one of the two")
    if arguments.streams < 1:
        raise ProspectError("--streams must be at least 1", where=where)
    if chosen and arguments.out:
        remedy = "leave --out away: the choice goes into the checkpoint"
        raise ProspectError(f"{chosen} writes no records", where=where, remedy=remedy)
    if arguments.records is not None and (chosen or arguments.out or arguments.overrides):
        remedy = "--records OUT [--data FILE] [--similarity DIR]"
        raise ProspectError("--records only scores again what has been streamed", where=where, remedy=remedy)
    if arguments.quiet and arguments.sweep:
        remedy = "first --sweep, then --quiet"
        raise ProspectError("--quiet and --sweep choose the same number", where=where, remedy=remedy)
    if chosen and arguments.moments != "own":
        raise ProspectError(f"{chosen} chooses the model's own moments", where=where, remedy="leave --moments away")
    if arguments.max_false_alarms is not None and not arguments.quiet:
        raise ProspectError("--max-false-alarms needs hours of quiet", where=where, remedy="--quiet FILE")


def evaluate(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Stream and score the clips, print the table, and with --out write everything down."""
    checkpoint, out = arguments.checkpoint, arguments.out
    similarity = load_similarity(arguments.similarity)
    jobs = load_jobs(arguments.data, config, tokenizer, checkpoint)
    if out is not None:
        same_settings(out, settings(checkpoint, config, arguments.data, jobs))
        write_references(out, arguments.data, {job.clip.id for job in jobs})

    def streamed(jobs: list[Job], folder: str) -> list[ClipScore]:
        """The scores of all clips; their records go into a folder of `out`, and are taken over from there."""
        records_dir, taken_over = None, 0
        if out is not None:
            records_dir = out / folder
            records_dir.mkdir(exist_ok=True)
            taken_over = sum(records_file(records_dir, job.clip.id).exists() for job in jobs)
            if taken_over:
                print(f"{taken_over} of {len(jobs)} clips are streamed already, in {records_dir}", flush=True)
        started = time.perf_counter()
        scoring = stream_and_score(
            model, tokenizer, jobs, config, similarity, streams=arguments.streams, records_dir=records_dir
        )
        scores = list(tqdm(scoring, total=len(jobs), desc="clips", dynamic_ncols=True))
        if not taken_over:
            print(f"{sum(score.frames for score in scores)} frames in {time.perf_counter() - started:.1f} s")
        return scores

    scores, told = streamed(jobs, RECORDS), []
    if arguments.moments == "reference":
        told = streamed([dataclasses.replace(job, moments=reference_moments(job.clip)) for job in jobs], RECORDS_TOLD)
    made = flatten(to_dict(config)) | {"checkpoint": str(checkpoint), "step": read_state(checkpoint).step}
    report(scores, told, made, similarity, as_typed(arguments), out)


def print_again(arguments: argparse.Namespace) -> None:
    """The tables of an evaluation, from the records that it has left under its --out."""
    out, similarity = arguments.records, load_similarity(arguments.similarity)
    paths = arguments.data or [str(out / REFERENCES)]
    scores = score_records(out / RECORDS, paths, similarity)
    told = score_records(out / RECORDS_TOLD, paths, similarity) if (out / RECORDS_TOLD).exists() else []
    made = out / "settings.json"
    try:
        report(scores, told, read_json(made), similarity, as_typed(arguments), None)
    except KeyError as error:
        what = f"does not tell {error.args[0]}, with which the records were made"
        raise ProspectError(what, where=str(made), remedy="evaluate again") from error


def tell(warnings: list[str], skipped: list[str]) -> None:
    for line in warnings + [f"skipped: {line}" for line in skipped]:
        print(line, file=sys.stderr)


def as_typed(arguments: argparse.Namespace) -> str:
    """The command that gives these results again. (--out is left away: it changes none of them.)"""
    words = ["python", "-m", "prospect.evaluate"]
    words += ["--checkpoint", str(arguments.checkpoint)] if arguments.checkpoint else []
    words += ["--records", str(arguments.records)] if arguments.records else []
    words += ["--data", *arguments.data] if arguments.data else []
    words += [] if arguments.strategy is None else ["--strategy", arguments.strategy]
    words += [] if arguments.moments == "own" else ["--moments", arguments.moments]
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


if __name__ == "__main__":
    run_entry_point(main)
