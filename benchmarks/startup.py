"""Seconds from `python train.py config.yaml` to the end of the first optimizer step, and where they go.

    python benchmarks/startup.py [config.yaml] [--repeats 3] [section.key=value ...]

The corpus and the tokenizer are made beforehand, as in every run but the first. Each repeat is its own process; the
first step is detected by its line in metrics.jsonl, which is written at once.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.build import make_sample_corpus
from prospect.config import load_config
from prospect.errors import ProspectError, run_entry_point


def seconds_until(happened: Callable[[], bool], process: subprocess.Popen, started: float) -> float:
    while not happened():
        if process.poll() is not None and not happened():
            raise ProspectError(f"the run ended before its first step: {process.stderr.read()[-300:]}")
        time.sleep(0.01)
    return time.perf_counter() - started


def time_run(config: str, overrides: list[str], out: Path) -> float:
    """Seconds from the start of a run to its first step; the run is then stopped."""
    settings = [*overrides, f"run.out={out}", "run.name=startup", "train.log_every=1"]
    command = [sys.executable, "train.py", config, *settings]
    log = out / "startup" / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        return seconds_until(lambda: log.exists() and log.stat().st_size > 0, process, started)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="config.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    make_sample_corpus(load_config(arguments.config, arguments.overrides))
    imports = []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import train"], check=True)
        imports.append(time.perf_counter() - started)
    total = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as out:
            total.append(time_run(arguments.config, arguments.overrides, Path(out)))
    print("| to the end of the first step | seconds (median) |\n|---|---:|")
    print(f"| starting Python and importing | {statistics.median(imports):.1f} |")
    print(f"| everything | {statistics.median(total):.1f} |")


if __name__ == "__main__":
    run_entry_point(main)
