"""Does tracking the task state help? And what do the other choices bring? Trains, streams, and writes docs/ablation.md.

    python benchmarks/ablation.py [--seeds 0 1 2] [--out runs/ablation] [--jobs 2]

Most tables are of the hard sample corpus (prospect/sample.py): whole tasks, several times as long as the context, in
which the step to name next depends on what was completed minutes ago. Those on memory are of the long corpus, the same
stories in clear pictures. Each variant is the default in all but the settings its row names, is trained by train.py
with every seed (of weights, data order, negatives and text places) for the same number of steps and tokens, and is
streamed on clips of another corpus seed. The decisions of every row are tuned in the same way, on streamed validation
clips (prospect/tuning.py), unless the row says otherwise.

Columns, over all held-out clips streamed live; an event is in time within 1 s of its range, and every decision to write
is one predicted event:

    speaking F1      events at which the assistant spoke
    update F1        events at which it updated the task state
    joint goal       share of frames at which the state of every step is right; while an update is due, with and without
    next step        of the replies that come in time after a completed step, the share that name the right next step
                     (or that all is done): what was completed before decides it, and timing plays no part
    replies right    F1 of all replies; a reply is right when it comes in time and names the right step

Interrupted and started again, it resumes: finished runs and their measurements are kept under --out, and refused when
they were made with other settings. --jobs runs are trained side by side, on one thread each.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from prospect.checkpoint import flatten, read_config
from prospect.clips import Clip
from prospect.config import load_config, to_dict
from prospect.data import Corpus, ordered_batches
from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_json, write_json
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.metrics import ratio
from prospect.sample import write_sample
from prospect.score import decision_numbers, named_step, score_clip, timely_replies
from prospect.stream import streamed_clips
from prospect.text_metrics import load_similarity
from prospect.tuning import best_tried, some_of, teacher_forced_odds, try_evidence, with_decisions

PAGE = ROOT / "docs" / "ablation.md"
BELOW = "<!-- everything below is written by benchmarks/ablation.py -->"

TRAIN_CLIPS, VAL_CLIPS, HELD_OUT_CLIPS, HELD_OUT_SEED = 480, 32, 40, 1000
COMMON = (  # what every run of this page shares beyond config.yaml: a context of 320 tokens, and a shorter run
    "data.max_seq_len=320",
    "infer.reserved=64", "infer.max_reply_tokens=32", "infer.max_update_tokens=16",  # 64 just holds both
    "train.max_steps=400", "train.eval_every=400", "train.save_every=400", "train.log_every=10",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is trained: the default with these settings changed, on the sample corpus of this difficulty."""

    changes: tuple[str, ...] = ()
    difficulty: str = "hard"


NO_DST = "data.dst=false"
NO_HEAD = "model.dst_state_head=false"
OLD_LABELS = "data.text_at=range"
TRAINED = {
    "default": Variant(),
    "old-labels": Variant((OLD_LABELS, NO_HEAD)),
    "no-head": Variant((NO_HEAD,)),
    "no-dst": Variant((NO_DST,)),
    "default-clear": Variant(difficulty="long"),
}


@dataclass(frozen=True)
class Row:
    """A line of a table: a trained variant, streamed with these settings."""

    title: str
    trained: str
    streamed: tuple[str, ...] = ()
    tuned: bool = True  # False: thresholds from a teacher-forced pass alone, evidence one half

    @property
    def key(self) -> str:
        return " ".join((self.trained, *self.streamed, *(() if self.tuned else ("teacher-forced",))))


NO_MEAN, ALONE = "infer.smoothing=1", "infer.coupling=0"
STRATEGIES = ("drop_all", "drop_middle", "summarize_and_drop")  # those that need no task state
SECTIONS = {
    "What is trained is what is streamed, one change after another": (
        Row("labels over the whole range, text behind it; decisions as teacher-forced",
            "old-labels", (NO_MEAN, ALONE), False),
        Row("the same, evidence tuned on streamed clips", "old-labels", (NO_MEAN, ALONE)),
        Row("+ the heads coupled", "old-labels", (NO_MEAN,)),
        Row("+ a running mean of the probabilities", "old-labels"),
        Row("+ labels where the text may stand (`text_at: drawn`)", "no-head"),
        Row("+ the state head (default)", "default"),
    ),
    "The default with one thing changed": (
        Row("default", "default"),
        Row("`dst_state_head: false`", "no-head"),
        Row("`smoothing: 1`", "default", (NO_MEAN,)),
        Row("`coupling: 0`", "default", (ALONE,)),
        Row("decisions as teacher-forced", "default", (), False),
        Row("`constrain_dst: true`", "default", ("infer.constrain_dst=true",)),
    ),
    "Task state": (
        Row("with task state (default)", "default"),
        Row("`dst: false`", "no-dst"),
    ),
    "Context strategies with task state, clear pictures": (
        Row("`slide` (default)", "default-clear"),
        Row("`summarize_with_dst`", "default-clear", ("infer.strategy=summarize_with_dst",)),
        *(Row(f"`{name}`", "default-clear", (f"infer.strategy={name}",)) for name in STRATEGIES),
    ),
}  # fmt: skip

COLUMNS = {
    "speaking_event_f1": "speaking F1",
    "dst_event_f1": "update F1",
    "joint_goal_accuracy": "joint goal",
    "next_step": "next step",
    "replies_right_f1": "replies right",
}


def run_name(trained: str, seed: int) -> str:
    return f"{trained}-seed{seed}"


def corpora(trained: str, out: Path) -> tuple[Path, Path]:
    """Folders of the corpus that a variant learns from and of the one it is streamed on."""
    difficulty = TRAINED[trained].difficulty
    return out / difficulty, out / f"{difficulty}-held-out"


def settings(trained: str, seed: int, out: Path) -> list[str]:
    """The overrides of config.yaml that make this run."""
    corpus, _ = corpora(trained, out)
    files = (f"data.train=[{corpus / 'train.json'}]", f"data.val=[{corpus / 'val.json'}]", "data.sample=null")
    run = (f"run.name={run_name(trained, seed)}", f"run.out={out}", f"run.seed={seed}", "train.device=cpu")
    return [*run, *files, *COMMON, *TRAINED[trained].changes]


def train(trained: str, seed: int, out: Path) -> None:
    """One run of train.py, on one thread; its output goes to a log beside the run."""
    name = run_name(trained, seed)
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", "config.yaml", *settings(trained, seed, out)]
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status != 0:
        what = f"train.py ended with status {status}"
        raise ProspectError(what, where=name, remedy=f"see {log.name}")


def check_settings(trained: str, seed: int, out: Path) -> None:
    """Raise ProspectError when the finished run was made with other settings than would be used now."""
    run = out / run_name(trained, seed)
    wanted, found = (
        flatten(to_dict(load_config("config.yaml", settings(trained, seed, out)))),
        flatten(to_dict(read_config(run / "best"))),
    )
    differ = [name for name in wanted if wanted[name] != found.get(name)]
    if differ:
        what = f"was trained with other settings ({', '.join(differ)})"
        raise ProspectError(what, where=str(run), remedy="remove this run")


def measure(row: Row, seed: int, out: Path) -> dict[str, float]:
    """Thresholds from the validation clips, then the held-out clips streamed and scored."""
    corpus, held_out = corpora(row.trained, out)
    config, tokenizer, model = load_for_inference(out / run_name(row.trained, seed) / "best", list(row.streamed))
    val = Corpus([str(corpus / "val.json")], config.data, tokenizer, config.model.vision_dim, rate=1.0, seed=seed)
    batches = ordered_batches(val.lengths(), config.data.batch_tokens)
    thresholds, report = teacher_forced_odds(model, val, config, batches)
    evidence = 0.5
    if not row.tuned:
        thresholds = {head: report[f"{head}_threshold"] for head in thresholds}
    else:
        some = some_of(load_jobs([str(corpus / "val.json")], config, tokenizer))
        tried = list(try_evidence(model, tokenizer, some, config, thresholds))
        evidence = best_tried(tried, config.infer.tuned_for).evidence
    config = with_decisions(config, thresholds, evidence)

    similarity, scores, counts = load_similarity("lexical"), [], []
    jobs = load_jobs([str(held_out / "val.json")], config, tokenizer)
    for job, records in streamed_clips(model, tokenizer, jobs, config):
        scores.append(score_clip(job.clip, records, similarity, config.data.dst))
        counts.append(next_steps(job.clip, records))
    right, said = (sum(column) for column in zip(*counts))
    found = {f"{head}_threshold": threshold for head, threshold in thresholds.items()} | {"evidence": evidence}
    return decision_numbers(scores) | {"next_step": ratio(right, said)} | found


def next_steps(clip: Clip, records: list[dict]) -> tuple[int, int]:
    """Of the replies in time after a completed step: how many name the right next step, and how many there are."""
    wanted = list(clip.replies())  # frames
    completed = {u.end_frame for u in clip.updates() if any(t.transition == "complete" for t in u.transitions)}
    right = [ok for _, r, ok in timely_replies(clip, records) if wanted[r] in completed]
    return sum(right), len(right)


def run_variant(trained: str, seed: int, out: Path) -> None:
    """Train a variant, and measure every row that streams it; what is there already is left as it is."""
    run = out / run_name(trained, seed)
    if not (run / "best").exists():
        train(trained, seed, out)
    check_settings(trained, seed, out)
    file = run / "measured.json"
    measured = read_json(file) if file.exists() else {}
    for row in {row.key: row for rows in SECTIONS.values() for row in rows if row.trained == trained}.values():
        if row.key not in measured:
            measured[row.key] = measure(row, seed, out)
            write_json(file, measured)


def next_step_floor(trained: str, out: Path) -> float:
    """`next step` of a guess without any memory: what most often follows the completed step in the training clips."""
    corpus, held_out = corpora(trained, out)
    follows: dict[tuple[str, str], Counter] = {}

    def completions(path: Path) -> Iterator[tuple[str, str, int | None]]:
        for clip in json.loads(path.read_text(encoding="utf-8")):
            names = [step["name"] for step in clip["dst"]]
            for update, reply in zip(clip["conversation"], clip["conversation"][1:]):
                if update["role"] == "DST_UPDATE" and update["content"][0]["transition"] == "complete":
                    yield clip["inferred_goal"], update["content"][0]["id"], named_step(reply["content"], names)

    for goal, step, following in completions(corpus / "train.json"):
        follows.setdefault((goal, step), Counter())[following] += 1
    right = [
        follows[goal, step].most_common(1)[0][0] == following
        for goal, step, following in completions(held_out / "val.json")
    ]
    return statistics.mean(right)


def page(seeds: list[int], out: Path, command: str, floor: float) -> str:
    """The tables: mean and standard deviation over the seeds."""
    measured = {
        (key, seed): numbers
        for trained in TRAINED
        for seed in seeds
        for key, numbers in read_json(out / run_name(trained, seed) / "measured.json").items()
    }
    lines = [
        f"`{command}`; mean and standard deviation over seeds {', '.join(map(str, seeds))} of weights, data order and "
        "negatives.",
        "The most frequent step after the one just completed, guessed without any memory, is the right next step in "
        f"{floor:.3f} of cases.",
        "",
    ]
    for title, rows in SECTIONS.items():
        lines += [f"### {title}", "", "| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
        for row in rows:
            cells = [cell([measured[row.key, seed].get(column) for seed in seeds]) for column in COLUMNS]
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def cell(values: list[float | None]) -> str:
    if None in values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained side by side, on one thread each")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for difficulty in sorted({variant.difficulty for variant in TRAINED.values()}):
        for path, seed, clips, val_clips in (
            (out / difficulty, 0, TRAIN_CLIPS, VAL_CLIPS),
            (out / f"{difficulty}-held-out", HELD_OUT_SEED, 1, HELD_OUT_CLIPS),
        ):  # fmt: skip
            if not path.exists():
                write_sample(path, seed=seed, difficulty=difficulty, clips=clips, val_clips=val_clips)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        work = [pool.submit(run_variant, trained, seed, out) for trained in TRAINED for seed in arguments.seeds]
        try:
            for number, done in enumerate(as_completed(work), 1):
                done.result()
                print(f"{number} of {len(work)} runs done", flush=True)
        except BaseException:  # a run that failed, or Ctrl-C: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    command = " ".join(["python benchmarks/ablation.py", *sys.argv[1:]])
    write_tables(page(arguments.seeds, out, command, next_step_floor("default", out)))
    print(f"written: {PAGE}")


def write_tables(tables: str) -> None:
    """The tables into the page, below its prose, which is written by hand."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"# Ablation\n\n{BELOW}\n"
    prose = text.split(BELOW)[0]
    PAGE.write_text(f"{prose}{BELOW}\n\n{tables}", encoding="utf-8")


if __name__ == "__main__":
    run_entry_point(main)
