"""Evaluation: every clip streamed and scored; and the choice of when the heads fire, on streamed clips.

    python -m prospect.evaluate --checkpoint DIR --data FILE [--strategy NAME] [--out DIR] [section.key=value ...]
    python -m prospect.evaluate --checkpoint DIR --data FILE --moments reference
    python -m prospect.evaluate --records OUT [--data FILE]
    python -m prospect.evaluate --checkpoint DIR --data FILE --sweep
    python -m prospect.evaluate --checkpoint DIR --data FILE --quiet FILE [--max-false-alarms N]
    torchrun --nproc_per_node=4 -m prospect.evaluate ...

The first streams every clip (with look-ahead, several at once), writes one records file a clip and then metrics.json
and metrics.md under --out, and prints the table. Interrupted and started again, it resumes with the clips that are
missing. The second adds the table of a model that is told when: at the last frame of each turn of the reference it
speaks or updates, and nowhere else, and the texts are its own. The third prints the tables again from what was written
under --out, without model or embeddings. The fourth chooses how much evidence the heads need, on some of these clips
(prospect/tuning.py), prints what was tried and stores the choice in the checkpoint; so does the fifth, but among what
is certified to be quiet where nothing happens (prospect/quiet.py).

docs/metrics.md says what each number means. All of them are sums over clips in one fixed order, divided once
at the end, so they do not depend on look-ahead, on how many streams run at once or on where an evaluation was
interrupted. Nor do they depend on the number of ranks: under torchrun the clips are dealt out by length
(prospect/jobs.py), each rank writes the records of its own, and rank 0 prints. It may resume with another number.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prospect.checkpoint import flatten, read_state
from prospect.clip_files import ClipFile, fit_rows
from prospect.config import Config, to_dict
from prospect.distributed import (
    Ranks,
    failed_elsewhere,
    from_main,
    main_alone_prints,
    start_ranks,
    stop_ranks,
    to_main,
    together,
)
from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_json, write_json, write_text
from prospect.jobs import Jobs, load_jobs, tell
from prospect.load import load_for_inference
from prospect.metrics import by_dataset
from prospect.mistakes import Review, clip_lines, mistakes_table, review_clip, sum_counts, worst_clips
from prospect.model import Prospect
from prospect.names import clip_file_names
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
from prospect.score import TIMING_TABLE, not_computed, summarise, table
from prospect.stream import Job, make_cache, streamed_clips
from prospect.text_metrics import Similarity, load_similarity
from prospect.tokenizer import Tokenizer
from prospect.tuning import store, sweep

STREAMS = 8  # clips streamed at once on a rank, by default
PATIENCE = datetime.timedelta(days=30)  # for the rank that is still streaming; one that dies is noticed at once


# ---- streamed clips ------------------------------------------------------------------------------


def stream_and_review(
    model: Prospect,
    tokenizer: Tokenizer,
    jobs: Jobs,
    config: Config,
    similarity: Similarity,
    skipped: list[str],
    *,
    streams: int,
    records_dir: Path | None = None,
) -> Iterator[Review]:
    """Stream the clips and review each as it ends.

    With records_dir, each clip's records become a JSONL file there once it has ended, and a clip that has such a file
    is scored from it instead of being streamed. A file that is not whole does not count. With `data.on_bad: skip`, a
    clip whose stream fails half-way is left out and named in `skipped`; with `stop` it raises ProspectError.
    """

    missing = []
    for number, place in enumerate(jobs.places):
        path = None if records_dir is None else records_file(records_dir, place.id)
        records = read_records(path, clip := jobs.clip(number)) if path is not None and path.exists() else None
        if records is None or len(records) != place.frames:
            missing.append(number)
        else:
            yield review_clip(clip, records, similarity, config.data.dst)
    for job, records in streamed_or_skipped(model, tokenizer, jobs.only(missing), config, skipped, streams=streams):
        if records_dir is not None:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(records_file(records_dir, job.clip.id), "".join(lines))
        yield review_clip(job.clip, records, similarity, config.data.dst)


def streamed_or_skipped(
    model: Prospect, tokenizer: Tokenizer, jobs: Jobs, config: Config, skipped: list[str], *, streams: int
) -> Iterator[tuple[Job, list[dict]]]:
    """`streamed_clips`, where with `data.on_bad: skip` a clip whose stream fails is named in `skipped` instead.

    Then those that were streamed beside it are streamed again, each alone, and so is the one that is to blame.
    """
    waiting = list(range(len(jobs)))
    while waiting:
        side_by_side = min(streams, len(waiting))
        make_cache(model, config, side_by_side)  # too large for this machine: no fault of a clip's
        done = set()
        try:
            for job, records in streamed_clips(model, tokenizer, jobs.only(waiting), config, streams=side_by_side):
                done.add(job.clip.id)
                yield job, records
            return
        except ProspectError:
            if config.data.on_bad == "stop":
                raise
        waiting = [number for number in waiting if jobs.places[number].id not in done]
        for number in waiting[:side_by_side]:
            try:
                yield from streamed_clips(model, tokenizer, jobs.only([number]), config, streams=1)
            except ProspectError as error:
                skipped.append(str(error))
        waiting = waiting[side_by_side:]


def review_records(folder: Path, paths: list[str], similarity: Similarity) -> list[Review]:
    """Review the clips of the files `paths` by the records that an evaluation has left in a folder.

    Raises ProspectError at a clip without complete records.
    """
    reviews = []
    for path in clip_file_names(paths):
        file = ClipFile(path)
        for clip in map(file.clip, range(len(file))):
            stored = records_file(folder, clip.id)
            records = read_records(stored, clip)
            if not records:
                what = f"no complete records of clip {clip.id}"
                remedy = "let the evaluation run to its end, or name the clips with --data"
                raise ProspectError(what, where=str(stored), remedy=remedy)
            clip, _ = fit_rows(clip, len(records))
            reviews.append(review_clip(clip, records, similarity, records[0]["dst_update_prob"] is not None))
    return reviews


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


def numbers_of(reviews: list[Review]) -> dict[str, Any]:
    return summarise([one.score for one in reviews]) | sum_counts(reviews)


def report(
    own: list[Review], told: list[Review], made: dict[str, Any], similarity: Similarity, command: str, out: Path | None
) -> None:
    """Print the tables, and write them and all numbers into `out`. told: reviews of the model told when, or none."""
    results = by_dataset([(one.score.dataset, one) for one in own], numbers_of)
    found = {"command": command, "similarity": similarity.name, "results": results}
    text = "\n\n".join(filter(None, (table(results), mistakes_table(own), worst_clips(own))))
    if told:
        numbers = by_dataset([(one.score.dataset, one) for one in told], numbers_of)
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
        write_text(out / "clips.jsonl", clip_lines(own))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="clip files, folders, patterns")
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
    ranks = start_ranks("cpu", PATIENCE)  # they exchange numbers of the host's alone, wherever the models are
    try:
        with main_alone_prints(ranks):
            run(arguments, ranks)
    finally:
        stop_ranks(ranks)
    return 0


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    checkpoint, jobs, quiet = arguments.checkpoint, None, None
    strategy = [] if arguments.strategy is None else [f"infer.strategy={arguments.strategy}"]
    with together(ranks):
        check_arguments(arguments)
        if arguments.records is not None:
            if ranks.main:
                print_again(arguments)
            return
        config, tokenizer, model = load_for_inference(checkpoint, arguments.overrides + strategy)
        if ranks.main:
            quiet = load_jobs([arguments.quiet], config, tokenizer) if arguments.quiet else None
            jobs = load_jobs(arguments.data, config, tokenizer, checkpoint)
    jobs, quiet = from_main((jobs, quiet), ranks)
    if arguments.sweep:
        with together(ranks):
            sweep(checkpoint, jobs, model, tokenizer, config, ranks)
    elif arguments.quiet:
        most = MAX_FALSE_ALARMS if arguments.max_false_alarms is None else arguments.max_false_alarms
        with together(ranks):
            evidence = choose_quiet(model, tokenizer, quiet, jobs, config, most, ranks)
            print(f"chosen: infer.evidence={evidence}")
            if ranks.main:
                store(checkpoint, config, {"evidence": evidence})
    else:
        evaluate(arguments, config, tokenizer, model, jobs, ranks)


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


def evaluate(
    arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect, jobs: Jobs, ranks: Ranks
) -> None:
    """Stream and score the clips, each rank its share; print the table, and with --out write everything down."""
    checkpoint, out, skipped = arguments.checkpoint, arguments.out, []
    with together(ranks):
        similarity = load_similarity(arguments.similarity)
        digests = jobs.share(ranks).digests() if out is not None else {}
    if out is not None:
        digests = {id: digest for part in to_main(digests, ranks) for id, digest in part.items()}
        with together(ranks):
            if ranks.main:
                same_settings(out, settings(checkpoint, config, clip_file_names(arguments.data), digests))
                write_references(out, jobs.raw(digests))

    def streamed(jobs: Jobs, folder: str) -> dict[str, Review]:
        """The reviews by clip, on rank 0. Records go into a folder of `out`, and are taken over from there."""
        records_dir, taken_over, reviews = None if out is None else out / folder, 0, []
        with together(ranks):
            if records_dir is not None and ranks.main:
                records_dir.mkdir(exist_ok=True)
                taken_over = sum(records_file(records_dir, place.id).exists() for place in jobs.places)
                if taken_over:
                    print(f"{taken_over} of {len(jobs)} clips are streamed already, in {records_dir}", flush=True)
        started, mine = time.perf_counter(), jobs.share(ranks)
        with together(ranks):
            reviewing = stream_and_review(
                model, tokenizer, mine, config, similarity, skipped, streams=arguments.streams, records_dir=records_dir
            )
            title = "clips" if ranks.world == 1 else f"clips of rank 0 of {ranks.world}"
            for review in tqdm(reviewing, total=len(mine), desc=title, dynamic_ncols=True):
                reviews.append(review)
                if failed_elsewhere(ranks):
                    break
        reviews = {review.score.clip_id: review for part in to_main(reviews, ranks) for review in part}
        if not taken_over:
            frames = sum(review.score.frames for review in reviews.values())
            print(f"{frames} frames in {time.perf_counter() - started:.1f} s")
        return reviews

    own, told = streamed(jobs, RECORDS), {}
    if arguments.moments == "reference":
        told = streamed(dataclasses.replace(jobs, told=True), RECORDS_TOLD)
    skipped = [line for part in to_main(skipped, ranks) for line in part]
    with together(ranks):
        if ranks.main:
            if skipped:  # in either pass, so that both tables are of the same clips
                tell([], skipped)
                both = own.keys() & told.keys() if told else own.keys()
                own, told = ({id: reviews[id] for id in reviews if id in both} for reviews in (own, told))
                if out is not None:
                    write_references(out, jobs.raw(both))
            if not own:
                raise ProspectError("no clip could be streamed", where=", ".join(arguments.data))
            made = flatten(to_dict(config)) | {"checkpoint": str(checkpoint), "step": read_state(checkpoint).step}
            report([*own.values()], [*told.values()], made, similarity, as_typed(arguments), out)


def print_again(arguments: argparse.Namespace) -> None:
    """The tables of an evaluation, from the records that it has left under its --out."""
    out, similarity = arguments.records, load_similarity(arguments.similarity)
    paths = arguments.data or [str(out / REFERENCES)]
    own = review_records(out / RECORDS, paths, similarity)
    told = review_records(out / RECORDS_TOLD, paths, similarity) if (out / RECORDS_TOLD).exists() else []
    made = out / "settings.json"
    try:
        report(own, told, read_json(made), similarity, as_typed(arguments), None)
    except KeyError as error:
        what = f"does not tell {error.args[0]}, with which the records were made"
        raise ProspectError(what, where=str(made), remedy="evaluate again") from error


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


def settings(checkpoint: Path, config: Config, files: list[str], embeddings: dict[str, str]) -> dict[str, Any]:
    """All that decides what the records of these clips are, by name: checkpoint, configuration, clips, embeddings.

    embeddings: the digests of the clips', by id.
    """
    state, data = read_state(checkpoint), hashlib.sha256()
    for path in files:
        data.update(Path(path).read_bytes())
    data.update(json.dumps(embeddings, sort_keys=True).encode())
    found = flatten(to_dict(config)) | {f"trained on {name}": digest for name, digest in state.data.items()}
    for file in sorted(checkpoint.glob("*.safetensors")):  # a run trained again writes new files under the old names
        found[f"time of {file.name}"] = file.stat().st_mtime_ns
    del found["infer.lookahead"]  # changes no record
    return found | {"checkpoint": str(checkpoint.resolve()), "step": state.step, "the clips' digest": data.hexdigest()}


if __name__ == "__main__":
    run_entry_point(main)
