"""How old a frame is when it is decided: streams fed by a clock, as cameras feed them, replies included.

    python benchmarks/live.py [--checkpoint runs/sample/best] [--data data/sample/val.json] [--seconds 60] [--threads 1]

A producer of its own thread plays clips into N streams at once, each with its own offset, at 2 frames per second or
faster; it never waits for the model. One loop takes whatever has arrived, for all streams in one forward
(prospect.stream.advance), as a server would. The *age* of a frame is the time from its arrival to its record, with
everything that was written for the streams that share the step.

    one process     N streams, at one rate: the age, and how many frames waited when a step began
    too slow        one stream, at a rate above what the machine can do: frames wait, or (--max-lag) are left out
    infer.py        one stream through `infer.py --stdin`: JSON lines in, records out, timed from outside

The last line is the number of streams, doubled until the 95th percentile of the age reaches 250 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from prospect.config import Config
from prospect.errors import run_entry_point
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.model import Prospect
from prospect.stream import Frame, Job, StreamSession, advance, make_cache
from prospect.tokenizer import Tokenizer

HEADLINE = 0.25  # seconds: the age that 95 of 100 frames must stay below
TITLES = "streams | frames/s each | frames | texts | age p50 | p95 | p99 | worst | waiting, mean | most | left out"


@dataclass
class Measured:
    """One run. Ages in seconds; waiting: frames of a stream that had arrived when a step began."""

    streams: int
    rate: float
    ages: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    texts: int = 0
    left_out: int = 0

    def row(self) -> str:
        p50, p95, p99, worst = (f"{1000 * age:.0f} ms" for age in np.percentile(self.ages, (50, 95, 99, 100)))
        shown = [self.streams, f"{self.rate:g}", len(self.ages), self.texts, p50, p95, p99, worst]
        return (
            "| "
            + " | ".join(map(str, [*shown, f"{np.mean(self.waiting):.1f}", max(self.waiting), self.left_out]))
            + " |"
        )


def produce(arrived: list[deque], rate: float, seconds: float, begin: float) -> None:
    """Put (moment, row) into each stream's queue when its time has come, for so many seconds."""
    offsets = np.random.default_rng(0).random(len(arrived)) / rate
    schedule = sorted(
        (offset + row / rate, s, row) for s, offset in enumerate(offsets) for row in range(int(seconds * rate))
    )
    for moment, stream, row in schedule:
        time.sleep(max(0.0, begin + moment - time.perf_counter()))
        arrived[stream].append((begin + moment, row))


def measure(
    model: Prospect, tokenizer: Tokenizer, jobs: list[Job], config: Config, *,
    streams: int, rate: float, seconds: float, max_lag: float = float("inf"),
) -> Measured:  # fmt: skip
    """Play a clip into each of `streams` for so many seconds, and take the frames as they come."""
    cache, found = make_cache(model, config, streams), Measured(streams, rate)
    held = [replace(job, source=job.embeddings) for job in jobs[:streams]]
    playing = [held[s % len(held)] for s in range(streams)]
    sessions = [
        StreamSession(model, tokenizer, job.clip, config, cache=cache, stream=s) for s, job in enumerate(playing)
    ]
    arrived: list[deque] = [deque() for _ in range(streams)]
    producer = threading.Thread(target=produce, args=(arrived, rate, seconds, time.perf_counter()), daemon=True)
    producer.start()
    while producer.is_alive() or any(arrived):
        now = time.perf_counter()
        for session, queue in zip(sessions, arrived):
            while queue and now - queue[0][0] > max_lag:
                queue.popleft()
                found.left_out, session.frame_idx = found.left_out + 1, session.frame_idx + 1
        ready = [s for s in range(streams) if arrived[s]]
        if not ready:
            time.sleep(0.001)
            continue
        found.waiting += [len(arrived[s]) for s in ready]
        upcoming = [frames_of(playing[s], [row for _, row in arrived[s]][: config.infer.lookahead]) for s in ready]
        for s, records in zip(ready, advance([sessions[s] for s in ready], upcoming)):
            done = time.perf_counter()
            found.ages += [done - arrived[s].popleft()[0] for _ in records]
            found.texts += sum((r.text is not None) + (r.dst_update is not None) for r in records)
    return found


def frames_of(job: Job, rows: list[int]) -> list[Frame]:
    """The clip's frames at these rows; a clip that has ended begins again."""
    return [job.frames(row % len(job.embeddings), 1)[0] for row in rows]


def measure_infer(checkpoint: Path, data: Path, job: Job, rate: float, seconds: float) -> Measured:
    """The same for `infer.py --stdin` in a process of its own, timed from outside."""
    command = [sys.executable, ROOT / "infer.py", "--stdin", "--clip", f"{data}:{job.clip.id}"]
    process = subprocess.Popen(
        [*command, "--checkpoint", checkpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    found, sent = Measured(1, rate), deque()
    rows = [row.reshape(-1).tolist() for row in np.asarray(job.embeddings, np.float32)]

    def write(row: int) -> None:
        for text in job.said.get(row, []):
            process.stdin.write(json.dumps({"user": text}) + "\n")
        process.stdin.write(json.dumps({"embedding": rows[row]}) + "\n")
        process.stdin.flush()

    def play() -> None:
        begin = time.perf_counter()
        for number in range(1, min(int(seconds * rate), len(rows))):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            sent.append(begin + number / rate)
            write(number)
        process.stdin.close()

    write(0)
    process.stdout.readline()  # the first record: imports and loading are behind it
    threading.Thread(target=play, daemon=True).start()
    for line in process.stdout:
        found.ages.append(time.perf_counter() - sent.popleft())
        found.waiting.append(len(sent) + 1)
        record = json.loads(line)
        found.texts += (record["text"] is not None) + (record["dst_update"] is not None)
    process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample/best"))
    parser.add_argument("--data", type=Path, default=Path("data/sample/val.json"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 8.0], help="frames per second of each stream")
    parser.add_argument(
        "--too-slow", type=float, default=2000.0, help="frames per second, above what the machine can do"
    )
    parser.add_argument("--most", type=int, default=512, help="streams at which the search ends")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides)
    jobs, seconds = list(load_jobs([str(arguments.data)], config, tokenizer)), arguments.seconds

    def play(streams: int, rate: float, seconds: float, **options: float) -> Measured:
        found = measure(model, tokenizer, jobs, config, streams=streams, rate=rate, seconds=seconds, **options)
        print(found.row(), flush=True)
        return found

    measure(model, tokenizer, jobs, config, streams=1, rate=100.0, seconds=0.5)  # warms up
    print(f"{arguments.threads} threads, {seconds:g} s each\n\n| {TITLES} |\n|" + "---:|" * 11)
    for rate in arguments.rates:
        for streams in arguments.streams:
            play(streams, rate, seconds)
    print("\ntoo slow: every frame waits for its turn; then frames older than 0.5 s are left out\n")
    for max_lag in (float("inf"), 0.5):
        play(1, arguments.too_slow, seconds / 10, max_lag=max_lag)
    print("\ninfer.py --stdin, timed from outside\n")
    for rate in arguments.rates:
        print(measure_infer(arguments.checkpoint, arguments.data, jobs[0], rate, seconds).row(), flush=True)
    print("\nstreams at 2 frames per second\n")
    streams, kept_up = max(arguments.streams), 0
    while streams <= arguments.most:
        if np.percentile(play(streams, 2.0, seconds).ages, 95) >= HEADLINE:
            break
        kept_up, streams = streams, 2 * streams
    print(f"\n{kept_up} streams at 2 frames per second: 95 of 100 frames decided within {1000 * HEADLINE:.0f} ms")


if __name__ == "__main__":
    run_entry_point(main)
