"""Does the certificate of prospect/quiet.py hold? Chosen on some quiet hours, counted on others, again and again.

    python benchmarks/quiet.py [--checkpoint runs/sample/best] [--difficulty easy] [--max-false-alarms 3 6 10]

A pool of quiet clips is streamed once with each evidence, from strict to lax. One repetition draws some of its hours,
certifies evidence on these, and counts alarmed minutes in all the others, which it has not seen. It holds if not one
certified evidence exceeds the limit there. The pool is streamed no further when no repetition has passed so far, for
the tests end at the first that fails. The repetitions share the pool, so they are not independent of one another.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.clip_files import parse_clip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample/best"))
    parser.add_argument("--difficulty", default="easy", choices=tuple(DIFFICULTIES))
    parser.add_argument("--hours", type=float, default=24, help="of the pool; default: 24")
    parser.add_argument("--chosen-on", type=float, default=3, help="hours that a repetition draws; default: 3")
    what = "per hour; one or several limits"
    parser.add_argument("--max-false-alarms", type=float, nargs="+", default=[MAX_FALSE_ALARMS], help=what)
    parser.add_argument("--repetitions", type=int, default=100)
    arguments = parser.parse_args()
    config, tokenizer, model = load_for_inference(arguments.checkpoint)
    thresholds = {"speaking": config.infer.speaking_threshold, "dst": config.infer.dst_threshold}
    drawn, limits = round(arguments.chosen_on * 3600 * FPS / QUIET_ROWS), arguments.max_false_alarms
    draw, orders = np.random.default_rng(0), []
    passing = {limit: set(range(arguments.repetitions)) for limit in limits}  # repetitions whose tests have not ended
    broken: dict[float, set[int]] = {limit: set() for limit in limits}
    titles = [f"at most {limit:g}: certified, exceeded" for limit in limits]
    print(f"| evidence | alarmed minutes an hour | {' | '.join(titles)} |\n|---:|---:|{'---:|' * len(limits)}")
    for evidence in EVIDENCE:
        pool = quiet_jobs(arguments.hours, arguments.difficulty)
        clips = streamed_clips(model, tokenizer, pool, with_decisions(config, thresholds, evidence))
        by_clip = {job.clip.id: alarmed(records, FPS) for job, records in clips}
        alarms = np.array([by_clip[id] for id in sorted(by_clip)])  # [clips, minutes]
        orders = orders or [draw.permutation(len(alarms)) for _ in range(arguments.repetitions)]
        cells = []
        for limit in limits:
            mine = {k: alarms[orders[k][:drawn]] for k in passing[limit]}
            passing[limit] = {k for k, minutes in mine.items() if passes(int(minutes.sum()), minutes.size, limit)}
            exceeded = {k for k in passing[limit] if 60 * alarms[orders[k][drawn:]].mean() > limit}
            broken[limit] |= exceeded
            cells.append(f"{len(passing[limit])}, {len(exceeded)}")
        print(f"| {evidence} | {60 * alarms.mean():.2f} | {' | '.join(cells)} |", flush=True)
        if not any(passing.values()):
            break
    print(f"\nchosen on {arguments.chosen_on:g} hours, counted on the other {arguments.hours - arguments.chosen_on:g}:")
    for limit in limits:
        held = arguments.repetitions - len(broken[limit])
        print(f"at most {limit:g} an hour: the certificate holds in {held} of {arguments.repetitions} repetitions")


if __name__ == "__main__":
    run_entry_point(main)
