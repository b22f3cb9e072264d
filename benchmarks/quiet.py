"""Does the certificate of prospect/quiet.py hold? Chosen on some quiet hours, counted on others, again and again.

    python benchmarks/quiet.py [--checkpoint runs/sample/best] [--difficulty easy] [--max-false-alarms 3 6 10]

A pool of quiet clips is streamed once, with so much evidence asked for that nothing is written. From the heads'
probabilities, prospect/decisions.py then says for each evidence where alarms would come: streaming the pool with each
would take ten times as long. (It would differ behind an alarm, whose text then stands in the context.) One repetition
draws some hours of the pool's first half, certifies evidence on these from strict to lax, and counts alarmed minutes in
the second half, from which nothing is drawn. It holds if not one certified evidence exceeds the limit there. The
repetitions share the pool, so they are not independent of one another.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.clip_files import parse_clip
from prospect.config import InferConfig
from prospect.decisions import Evidence, decide
from prospect.errors import run_entry_point
from prospect.load import load_for_inference
from prospect.quiet import MAX_FALSE_ALARMS, alarmed, passes
from prospect.sample import DIFFICULTIES, FPS, QUIET_ROWS, clean_frames, make_clips, world_looks
from prospect.stream import Job, streamed_clips
from prospect.tuning import EVIDENCE, with_decisions

CORPUS_SEED = 1000  # the default run trains on seed 0


def quiet_jobs(hours: float, difficulty: str) -> Iterator[Job]:
    """Clips of quiet, each made as it is needed."""
    count = round(hours * 3600 * FPS / QUIET_ROWS)
    for raw, frames in make_clips("quiet", count, CORPUS_SEED, difficulty, clean_frames(world_looks(), difficulty)):
        clip, _ = parse_clip(raw, "quiet", 0)
        yield Job(clip, frames[:, None])


def replayed(records: list[dict], infer: InferConfig) -> list[dict]:
    """What would have been decided at the frames of a silent stream."""
    evidence, decided = Evidence(), []
    for record in records:
        decision = decide(infer, evidence, record["speaking_prob"], record["dst_update_prob"], asked=False)
        decided.append({"speaking_decision": decision.speak, "dst_update_decision": decision.update})
    return decided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample/best"))
    parser.add_argument("--difficulty", default="easy", choices=tuple(DIFFICULTIES))
    parser.add_argument("--hours", type=float, default=40, help="of the pool; default: 40")
    parser.add_argument("--chosen-on", type=float, default=3, help="hours that a repetition draws; default: 3")
    what = "per hour; one or several limits"
    parser.add_argument("--max-false-alarms", type=float, nargs="+", default=[MAX_FALSE_ALARMS], help=what)
    parser.add_argument("--repetitions", type=int, default=100)
    arguments = parser.parse_args()
    config, tokenizer, model = load_for_inference(arguments.checkpoint)
    thresholds = {"speaking": config.infer.speaking_threshold, "dst": config.infer.dst_threshold}
    pool = quiet_jobs(arguments.hours, arguments.difficulty)
    silent = streamed_clips(model, tokenizer, pool, with_decisions(config, thresholds, 1.0))
    kept = ("speaking_prob", "dst_update_prob")
    traces = {job.clip.id: [{name: one[name] for name in kept} for one in records] for job, records in silent}

    draw, repetitions = np.random.default_rng(0), range(arguments.repetitions)
    half, drawn = len(traces) // 2, round(arguments.chosen_on * 3600 * FPS / QUIET_ROWS)
    choices, limits = [draw.permutation(half)[:drawn] for _ in repetitions], arguments.max_false_alarms
    passing = {limit: set(repetitions) for limit in limits}  # repetitions whose tests have not ended
    broken: dict[float, set[int]] = {limit: set() for limit in limits}
    titles = [f"at most {limit:g}: certified, exceeded" for limit in limits]
    print(f"| evidence | alarmed minutes an hour | {' | '.join(titles)} |\n|---:|---:|{'---:|' * len(limits)}")
    for evidence in EVIDENCE:
        infer = with_decisions(config, thresholds, evidence).infer
        alarms = np.array([alarmed(replayed(traces[id], infer), FPS) for id in sorted(traces)])  # [clips, minutes]
        cells = []
        for limit in limits:
            mine = {k: alarms[choices[k]] for k in passing[limit]}
            passing[limit] = {k for k, minutes in mine.items() if passes(int(minutes.sum()), minutes.size, limit)}
            exceeded = passing[limit] if 60 * alarms[half:].mean() > limit else set()
            broken[limit] |= exceeded
            cells.append(f"{len(passing[limit])}, {len(exceeded)}")
        print(f"| {evidence} | {60 * alarms[half:].mean():.2f} | {' | '.join(cells)} |", flush=True)
    hours = arguments.hours / 2
    print(f"\nchosen on {arguments.chosen_on:g} of the first {hours:g} hours, counted on the other {hours:g}:")
    for limit in limits:
        held = arguments.repetitions - len(broken[limit])
        print(f"at most {limit:g} an hour: the certificate holds in {held} of {arguments.repetitions} repetitions")


if __name__ == "__main__":
    run_entry_point(main)
