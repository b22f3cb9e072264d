"""Would a temperature for each head help? Fitted on validation clips, measured on clips that nobody has seen.

    python benchmarks/temperature.py --checkpoint DIR --data VAL.json --held-out FILE

A head's logit is divided by its temperature (Guo et al. 2017). On the validation clips, with the reference conversation
in place, the temperature with the least log loss is taken, each with its own even odds, which streaming's decisions
start from anyway. Dividing the head's weights by it gives the model that has it, so nothing else has to know. Both
models choose their evidence on validation clips, and both are streamed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.calibration import calibration
from prospect.config import Config
from prospect.data import Corpus, ordered_batches
from prospect.decisions import centred
from prospect.errors import run_entry_point
from prospect.evaluate import load_jobs
from prospect.load import load_for_inference
from prospect.metrics import HeadTrace, even_odds
from prospect.model import Prospect
from prospect.score import decision_numbers, score_clip
from prospect.stream import streamed_clips
from prospect.text_metrics import load_similarity
from prospect.thresholds import teacher_forced, traces
from prospect.tokenizer import Tokenizer
from prospect.tuning import best_tried, some_of, target_value, try_evidence, with_decisions

TEMPERATURES = np.geomspace(0.25, 4, 81)
HEADS = {"speaking": "speaking_decision_head", "dst": "dst_update_head"}


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
    temperatures = {}
    print("| head | temperature | log loss: raw | even odds | with temperature | calibration error: raw | even odds |"
          " with temperature |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for head, clips in fitted.items():
        tried = {t: with_temperature(clips, t) for t in TEMPERATURES}
        best = min(tried, key=lambda t, tried=tried: losses(tried[t], even_odds(tried[t]))[0])
        temperatures[head] = best
        found = [losses(held_out[head], 0.5), losses(held_out[head], even_odds(clips))]
        found.append(losses(with_temperature(held_out[head], best), even_odds(tried[best])))
        cells = [f"{one[which]:.5f}" for which in (0, 1) for one in found]
        print(f"| {head} | {best:.2f} | {' | '.join(cells)} |", flush=True)

    names = ("speaking_event_f1", "dst_event_f1", "joint_goal_accuracy", "replies_right_f1")
    titles = ["streamed", "evidence", *names, config.infer.tuned_for]
    print(f"\n| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}")
    val_jobs, jobs = some_of(load_jobs([arguments.data], config)), load_jobs([arguments.held_out], config)
    similarity = load_similarity("lexical")
    for name in ("as it is", "with temperature"):
        if name == "with temperature":
            with torch.no_grad():
                for head, temperature in temperatures.items():
                    for parameter in getattr(model, HEADS[head]).parameters():
                        parameter /= temperature
            odds = {head: even_odds(with_temperature(clips, temperatures[head])) for head, clips in fitted.items()}
        else:
            odds = {head: even_odds(clips) for head, clips in fitted.items()}
        tried = list(try_evidence(model, tokenizer, val_jobs, config, odds))
        evidence = best_tried(tried, config.infer.tuned_for).evidence
        clips = streamed_clips(model, tokenizer, jobs, with_decisions(config, odds, evidence))
        numbers = decision_numbers([score_clip(job.clip, r, similarity, config.data.dst) for job, r in clips])
        cells = [f"{numbers[key]:.3f}" if key in numbers else "" for key in names]
        target = target_value(numbers, config.infer.tuned_for)
        print(f"| {name} | {evidence} | {' | '.join(cells)} | {target:.3f} |", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
