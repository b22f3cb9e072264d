"""How long checking a data set takes, and how much memory: synthetic clips with embeddings of real size.

    python benchmarks/check.py [--clips 1000] [--frames 259] [--width 2048] [--workers 1 2]

A thousand clips take about a gigabyte of float16. They are written to a temporary folder and then read from memory (the
operating system caches what was just written), so a slow disk adds its own time. Peak memory is that of the largest
process; pages of the mapped embedding files count towards it while they are touched.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from prospect.errors import ProspectError, run_entry_point


def write_clips(folder: Path, clips: int, frames: int, width: int) -> Path:
    """A JSONL file of clips with a turn every 20 frames, and an .npy file for each."""
    (folder / "embeddings").mkdir()
    rows = np.random.default_rng(0).standard_normal((frames, width)).astype(np.float16)
    turns = [
        {"role": "assistant", "content": "Now the wheels.", "start_frame": f, "end_frame": f + 2}
        for f in range(0, frames - 3, 20)
    ]
    path = folder / "clips.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for c in range(clips):
            clip = {
                "id": f"clip{c}",
                "start_frame_idx": 0,
                "end_frame_idx": frames - 1,
                "conversation": turns,
                "dst": [],
            }
            file.write(json.dumps(clip) + "\n")
            np.save(folder / "embeddings" / f"clip{c}_embeddings.npy", rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=259, help="of each clip")
    parser.add_argument("--width", type=int, default=2048, help="of a frame embedding")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        needed, free = args.clips * args.frames * args.width * 2, shutil.disk_usage(folder).free
        if needed * 1.2 > free:
            what = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            raise ProspectError(what, where=folder, remedy="use fewer --clips")
        path = write_clips(Path(folder), args.clips, args.frames, args.width)
        print(
            f"{args.clips} clips of {args.frames} x {args.width} float16, {needed / 1e9:.2f} GB, {os.cpu_count()} cores"
        )
        for workers in args.workers:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            command = [sys.executable, "-m", "prospect.check", str(path), "--vision-dim", str(args.width)]
            done = subprocess.run([*command, "--workers", str(workers)], cwd=ROOT, capture_output=True, text=True)
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode != 0:
                raise ProspectError(f"prospect.check failed: {done.stderr[-300:] or done.stdout[-300:]}")
            processor = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            peak = after.ru_maxrss / 1024  # MiB; of the largest process of all runs so far
            print(f"{workers} worker(s): {seconds:.1f} s, {processor:.1f} s of processor time, peak {peak:.0f} MiB")
        print(done.stdout.strip())


if __name__ == "__main__":
    run_entry_point(main)
