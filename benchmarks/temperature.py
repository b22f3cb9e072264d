"""Would a temperature for each head help? Fitted on validation clips, measured on clips that nobody has seen.

    python benchmarks/temperature.py --checkpoint DIR --data VAL.json --held-out FILE

A head's logit is divided by its temperature (Guo et al. 2017). On the validation clips, with the reference conversation
in place, the temperature with the least log loss is taken, each with its own even odds, from which the decisions of a
stream start anyway. Log loss and calibration error are those of the held-out clips.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.calibration import calibration
from prospect.config import Config
from prospect.data import Corpus, ordered_batches
from prospect.decisions import centred
from prospect.errors import run_entry_point
from prospect.load import load_for_inference
from prospect.metrics import HeadTrace, even_odds
from prospect.model import Prospect
from prospect.thresholds import teacher_forced, traces
from prospect.tokenizer import Tokenizer

TEMPERATURES = np.geomspace(0.25, 4, 81)


def head_traces(model: Prospect, tokenizer: Tokenizer, path: str, config: Config) -> dict[str, list[HeadTrace]]:
    """Each head on every clip of a file, given the reference conversation."""
    corpus = Corpus([path], config.data, tokenizer, config.model.vision_dim, rate=1.0, seed=config.run.seed)
    batches = ordered_batches(corpus.lengths(), config.data.batch_tokens)
    parts = [part for batch in batches for part in teacher_forced(model, corpus, batch, config).sequences]
    return traces(corpus, parts)


def with_temperature(clips: list[HeadTrace], temperature: float) -> list[HeadTrace]:
    def cooled(p: np.ndarray) -> np.ndarray:
        p = np.clip(p.astype(np.float64), 1e-9, 1 - 1e-9)
        return 1 / (1 + ((1 - p) / p) ** (1 / temperature))

    return [HeadTrace(cooled(clip.probabilities), clip.labels, clip.fps) for clip in clips]


def losses(clips: list[HeadTrace], odds: float) -> tuple[float, float]:
    """(log loss, expected calibration error) over labelled frames, `odds` being moved to one half."""
    labels = np.concatenate([clip.labels for clip in clips])
    raw = np.concatenate([clip.probabilities for clip in clips]).astype(np.float64)[labels != -100]
    p, positive = np.array([centred(one, odds) for one in raw]).clip(1e-9, 1 - 1e-9), labels[labels != -100] == 1
    return float(-np.log(np.where(positive, p, 1 - p)).mean()), calibration(p, positive.astype(np.int64)).error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample/best"))
    parser.add_argument("--data", default="data/sample/val.json", help="clips to fit and choose on")
    parser.add_argument("--held-out", required=True, help="clips to measure on")
    arguments = parser.parse_args()
    config, tokenizer, model = load_for_inference(arguments.checkpoint)
    fitted, held_out = (head_traces(model, tokenizer, path, config) for path in (arguments.data, arguments.held_out))
    print("| head | temperature | log loss: raw | even odds | with temperature | calibration error: raw | even odds |"
          " with temperature |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for head, clips in fitted.items():
        tried = {t: with_temperature(clips, t) for t in TEMPERATURES}
        best = min(tried, key=lambda t, tried=tried: losses(tried[t], even_odds(tried[t]))[0])
        found = [losses(held_out[head], 0.5), losses(held_out[head], even_odds(clips))]
        found.append(losses(with_temperature(held_out[head], best), even_odds(tried[best])))
        cells = [f"{one[which]:.5f}" for which in (0, 1) for one in found]
        print(f"| {head} | {best:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
