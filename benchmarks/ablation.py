"""Does tracking the task state help, against the memory that ProAssist has? Trains, streams, writes docs/ablation.md.

    python benchmarks/ablation.py [--trained state summaries nothing ...] [--pictures noisy clear] [--seeds 0 1 2 3 4]
                                  [--out runs/ablation] [--jobs 2]

People work through whole tasks (prospect/sample.py: `long` in clear pictures, `hard` in noisy ones), several times as
long as the context. Which step to name next depends on what was completed minutes ago, so the assistants differ in what
carries the past: the task state, a summary that the model has learned to write (ProAssist), nothing, or a context
that holds the whole task. All else is equal: each is trained by train.py for the same number of steps, with every seed
(of weights, data order, negatives and text places), has its decisions tuned in the same way on streamed validation
clips (prospect/tuning.py), and is streamed live on the same held-out clips of several corpora.

Columns; an event is in time within 1 s of its range, and every decision to write is one predicted event:

    speaking F1      events at which the assistant spoke
    update F1        events at which it updated the task state
    joint goal       share of frames at which the state of every step is right; while an update is due, with and without
    next step        of the replies that come in time after a completed step, the share that name the right next step
                     (or that all is done): what was completed before decides it, and timing plays no part
    replies right    F1 of all replies; a reply is right when it comes in time and names the right step

Each is a ratio of counts over all clips. A difference of two rows comes with an interval that holds 95 of 100 of the
differences found when seeds and clips are drawn again with replacement, the same ones for both (paired bootstrap, Efron
and Tibshirani 1993).

Interrupted and started again, it resumes: finished runs and their counts are kept under --out, and refused when they
were made with other settings. --jobs runs are trained side by side, on one thread each.
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

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from benchmarks import controls
from prospect.checkpoint import flatten, read_config
from prospect.clip_files import ClipFile
from prospect.clips import Clip
from prospect.config import Config, load_config, to_dict
from prospect.data import Corpus, ordered_batches
from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_json, write_json
from prospect.jobs import Jobs, load_jobs
from prospect.load import load_for_inference
from prospect.metrics import Counts
from prospect.model import Prospect
from prospect.sample import write_sample
from prospect.score import named_step, score_clip, timely_replies
from prospect.stream import Job, streamed_clips
from prospect.summaries import reference_summary
from prospect.text_metrics import Similarity, load_similarity
from prospect.tokenizer import Tokenizer
from prospect.tuning import best_tried, some_of, teacher_forced_odds, try_evidence, with_decisions

PAGE = ROOT / "docs" / "ablation.md"
BELOW = "<!-- everything below is written by benchmarks/ablation.py -->"

PICTURES = {"noisy": "hard", "clear": "long"}  # the sample corpus's difficulty
TRAIN_CLIPS, VAL_CLIPS = 480, 32
HELD_OUT_SEEDS, HELD_OUT_CLIPS = (1000, 1001, 1002), 20  # corpora that are streamed, and the clips of each
DRAWS = 10_000  # of seeds and clips, for an interval

STEPS = 1600
COMMON = (  # what every run shares beyond config.yaml
    "data.max_seq_len=320", "data.batch_tokens=1024", "train.learning_rate=2.0e-3",
    # Room for what is written at one frame: an update and a reply, or a summary and its request.
    "infer.reserved=80", "infer.max_reply_tokens=32", "infer.max_update_tokens=16", "infer.max_summary_tokens=48",
    "infer.evidence=0.5",  # it is tuned here, not at the end of training
    f"train.max_steps={STEPS}", f"train.eval_every={STEPS}", f"train.save_every={STEPS}", "train.log_every=10",
    "train.best_by=loss",  # of one validation
)  # fmt: skip


# ---- what is trained -----------------------------------------------------------------------------

NO_STATE = ("data.dst=false", "model.dst_state_head=false")
SUMMARIES, DROP = ("data.summaries=1",), "infer.strategy=summarize_and_drop"
WHOLE = ("data.max_seq_len=1536", "data.batch_tokens=1536")  # the longest clip of the corpora has 1,167 tokens
LONGER = tuple(f"train.{name}={3 * STEPS}" for name in ("max_steps", "eval_every", "save_every"))
BY_LM = ("model.speaking_head=false", "data.silence_lm=true", "infer.decision=lm", "infer.smoothing=1")

TRAINED: dict[str, tuple[str, ...]] = {  # the settings in which each differs from config.yaml and COMMON
    "state": (),
    "summaries": (*NO_STATE, *SUMMARIES, DROP),
    "nothing": NO_STATE,
    "whole-state": WHOLE,
    "whole": (*NO_STATE, *WHOLE),
    "both": (*SUMMARIES, "infer.strategy=summarize_with_dst"),
    "proassist": (*NO_STATE, *SUMMARIES, DROP, *BY_LM),
    "state-longer": LONGER,
    "summaries-longer": (*NO_STATE, *SUMMARIES, DROP, *LONGER),
}


@dataclass(frozen=True)
class Row:
    """A line of a table: a trained variant, streamed as it was trained or with one change (benchmarks/controls.py)."""

    title: str
    trained: str
    change: str | None = None

    @property
    def key(self) -> str:
        return self.trained if self.change is None else f"{self.trained}, {self.change}"


CHANGES: dict[str, controls.Change] = {
    "no state": controls.report_state(controls.no_state),
    "20 % wrong": controls.report_state(controls.corrupted_state(0.2)),
    "10 % wrong": controls.report_state(controls.corrupted_state(0.1)),
    "5 % wrong": controls.report_state(controls.corrupted_state(0.05)),
    "true state": controls.report_state(controls.true_state),
    "four frames": controls.forget,
}
MEMORY = (
    Row("task state", "state"),
    Row("learned summaries (ProAssist's memory)", "summaries"),
    Row("the same, and the LM decides when to speak (ProAssist)", "proassist"),
    Row("task state and learned summaries", "both"),
    Row("neither", "nothing"),
    Row("the whole task in the context, task state", "whole-state"),
    Row("the whole task in the context", "whole"),
    Row("task state, three times as many steps", "state-longer"),
    Row("learned summaries, three times as many steps", "summaries-longer"),
)
LADDER = (
    *(Row(title, "state", title) for title in ("no state", "20 % wrong", "10 % wrong", "5 % wrong")),
    Row("predicted state", "state"),
    Row("true state", "state", "true state"),
)
BLIND = {"always silent": controls.silent, "always speaking": controls.always, "a timer": controls.timer}
RECENT = Row("the last four frames", "nothing", "four frames")
ROWS = {row.key: row for row in (*MEMORY, *LADDER, RECENT)}

PAIRS = (  # keys of rows: what one adds to the other
    ("state", "summaries"), ("state", "proassist"), ("state", "nothing"), ("summaries", "nothing"),
    ("both", "state"), ("both", "summaries"), ("whole-state", "whole"), ("state", "whole"), ("state", "whole-state"),
    ("state-longer", "summaries-longer"),
)  # fmt: skip

COLUMNS = {
    "speaking_event_f1": "speaking F1",
    "dst_event_f1": "update F1",
    "joint_goal_accuracy": "joint goal",
    "next_step": "next step",
    "replies_right_f1": "replies right",
}
OF_SUMMARIES = {"summary_precision": "precision", "summary_recall": "recall"}


@dataclass(frozen=True)
class Run:
    """A training: a variant, the pictures it learns from, a seed."""

    trained: str
    pictures: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.trained}-{self.pictures}-seed{self.seed}"

    def settings(self, out: Path) -> list[str]:
        """The overrides of config.yaml that make it."""
        corpus = out / self.pictures
        files = (f"data.train=[{corpus / 'train.json'}]", f"data.val=[{corpus / 'val.json'}]", "data.sample=null")
        run = (f"run.name={self.name}", f"run.out={out}", f"run.seed={self.seed}", "train.device=cpu")
        return [*run, *files, *COMMON, *TRAINED[self.trained]]


def train(run: Run, out: Path) -> None:
    """Run train.py on one thread; its output goes to a log beside the run."""
    with open(out / f"{run.name}.log", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", "config.yaml", *run.settings(out)]
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status != 0:
        what = f"train.py ended with status {status}"
        raise ProspectError(what, where=run.name, remedy=f"see {log.name}")


def check_settings(run: Run, out: Path) -> None:
    """Raise ProspectError when the finished run was made with other settings than would be used now."""
    wanted, found = (
        flatten(to_dict(load_config("config.yaml", run.settings(out)))),
        flatten(to_dict(read_config(out / run.name / "best"))),
    )
    differ = [name for name in wanted if wanted[name] != found.get(name)]
    if differ:
        what = f"was trained with other settings ({', '.join(differ)})"
        raise ProspectError(what, where=str(out / run.name), remedy="remove this run")


# ---- what is measured ----------------------------------------------------------------------------

Ratios = dict[str, tuple[int, int]]  # by column: numerator and denominator, which add up over clips


def held_out(pictures: str, seed: int, out: Path) -> Path:
    return out / f"{pictures}-{seed}" / "val.json"


def decided(run: Run, out: Path) -> tuple[Config, Tokenizer, Prospect]:
    """The trained model, its decisions tuned: even odds of each head from a teacher-forced pass over the validation
    clips, then the evidence that does best on some of them, streamed. They are stored beside the checkpoint."""
    config, tokenizer, model = load_for_inference(out / run.name / "best", [])
    stored, clips = out / run.name / "decisions.json", str(out / run.pictures / "val.json")
    if not stored.exists():
        val = Corpus([clips], config.data, tokenizer, config.model.vision_dim, rate=1.0, seed=run.seed)
        batches = ordered_batches(val.lengths(), config.data.batch_tokens)
        thresholds, _ = teacher_forced_odds(model, val, config, batches)
        tried = list(try_evidence(model, tokenizer, some_of(load_jobs([clips], config, tokenizer)), config, thresholds))
        evidence = best_tried(tried, config.infer.tuned_for).evidence
        write_json(stored, {"thresholds": thresholds, "evidence": evidence})
    found = read_json(stored)
    return with_decisions(config, found["thresholds"], found["evidence"]), tokenizer, model


def measure(row: Row, run: Run, out: Path) -> dict[str, Ratios]:
    """The counts of every held-out clip, by corpus and id."""
    config, tokenizer, model = decided(run, out)
    similarity, found = load_similarity("lexical"), {}
    for seed in HELD_OUT_SEEDS:
        jobs = load_jobs([str(held_out(run.pictures, seed, out))], config, tokenizer)
        for job, records in streams(row, model, tokenizer, jobs, config):
            found[f"{seed}/{job.clip.id}"] = ratios(job.clip, records, similarity, config.data.dst)
    return found


def streams(
    row: Row, model: Prospect, tokenizer: Tokenizer, jobs: Jobs, config: Config
) -> Iterator[tuple[Job, list[dict]]]:
    if row.change is None:
        return streamed_clips(model, tokenizer, jobs, config)
    return controls.streamed(model, tokenizer, jobs, config, CHANGES[row.change])


def ratios(clip: Clip, records: list[dict], similarity: Similarity, dst: bool) -> Ratios:
    score = score_clip(clip, records, similarity, dst)
    found = {f"{head}_event_f1": f1_of(counts) for head, counts in score.events.items()}
    found |= {"replies_right_f1": f1_of(score.replies), "next_step": next_steps(clip, records)}
    if dst:
        found["joint_goal_accuracy"] = score.task_state.frames_right, score.task_state.frames
    if (named := steps_in_summaries(clip, records)) != Counts():
        found["summary_precision"] = named.matched, named.predicted
        found["summary_recall"] = named.matched, named.reference
    return found


def f1_of(counts: Counts) -> tuple[int, int]:
    return 2 * counts.matched, counts.predicted + counts.reference


def next_steps(clip: Clip, records: list[dict]) -> tuple[int, int]:
    """Of the replies in time after a completed step: how many name the right next step, and how many there are."""
    wanted = list(clip.replies())  # frames
    completed = {u.end_frame for u in clip.updates() if any(t.transition == "complete" for t in u.transitions)}
    right = [ok for _, r, ok in timely_replies(clip, records) if wanted[r] in completed]
    return sum(right), len(right)


def steps_in_summaries(clip: Clip, records: list[dict]) -> Counts:
    """Of the names of completed steps: those in the summaries that were written, those that belong there, and both."""
    total, names = Counts(), [step.name for step in clip.steps]
    for record in records:
        if record["context_event"] is not None and record["context_event"]["summary"] is not None:
            texts = record["context_event"]["summary"], reference_summary(clip, record["frame_idx"])
            written, due = ({name for name in names if name in text.partition("Under way")[0]} for text in texts)
            total += Counts(len(written & due), len(written), len(due))
    return total


def run_and_measure(run: Run, out: Path) -> None:
    """Train a variant, and measure every row that streams it; what is there already is left as it is."""
    if not (out / run.name / "best").exists():
        train(run, out)
    check_settings(run, out)
    for row in ROWS.values():
        if row.trained == run.trained:
            file = measured_file(row, run, out)
            if not file.exists():
                write_json(file, measure(row, run, out))


def measured_file(row: Row, run: Run, out: Path) -> Path:
    return out / run.name / f"{row.key}.json"


def measure_blind(pictures: str, name: str, out: Path) -> dict[str, Ratios]:
    """The counts of an assistant that never looks, by clip."""
    train, similarity, found = all_clips(out / pictures / "train.json"), load_similarity("lexical"), {}
    for seed in HELD_OUT_SEEDS:
        for clip in all_clips(held_out(pictures, seed, out)):
            records = controls.spoken(clip, BLIND[name](clip, train))
            found[f"{seed}/{clip.id}"] = ratios(clip, records, similarity, dst=False)
    return found


def all_clips(path: Path) -> list[Clip]:
    file = ClipFile(path)
    return [file.clip(number) for number in range(len(file))]


def next_step_floor(pictures: str, out: Path) -> float:
    """`next step` of a guess without any memory: what most often follows the completed step in the training clips."""
    follows: dict[tuple[str, str], Counter] = {}

    def completions(path: Path) -> Iterator[tuple[str, str, int | None]]:
        for clip in json.loads(path.read_text(encoding="utf-8")):
            names = [step["name"] for step in clip["dst"]]
            for update, reply in zip(clip["conversation"], clip["conversation"][1:]):
                if update["role"] == "DST_UPDATE" and update["content"][0]["transition"] == "complete":
                    yield clip["inferred_goal"], update["content"][0]["id"], named_step(reply["content"], names)

    for goal, step, following in completions(out / pictures / "train.json"):
        follows.setdefault((goal, step), Counter())[following] += 1
    return statistics.mean(
        follows[goal, step].most_common(1)[0][0] == following
        for seed in HELD_OUT_SEEDS
        for goal, step, following in completions(held_out(pictures, seed, out))
    )


# ---- the page ------------------------------------------------------------------------------------


@dataclass
class Results:
    """The counts of rows on the same clips, with pictures of one kind, over seeds."""

    clips: list[str]  # corpus and id
    by_row: dict[str, list[dict[str, Ratios]]]  # by the row's key: one for each seed

    def counts(self, key: str, column: str) -> np.ndarray | None:
        """[S, C, 2]: numerator and denominator by seed and clip; None where the row has no such column."""
        of = self.by_row[key]
        if not any(column in ratios for clips in of for ratios in clips.values()):
            return None
        return np.array([[clips[clip].get(column, (0, 0)) for clip in self.clips] for clips in of])

    def cell(self, key: str, column: str) -> str:
        """Mean and deviation over the seeds; a dash where there was nothing to count."""
        if (counts := self.counts(key, column)) is None:
            return ""
        by_seed = [numerator / denominator for numerator, denominator in counts.sum(1) if denominator]
        if not by_seed:
            return "–"
        spread = f" ± {statistics.stdev(by_seed):.3f}" if len(by_seed) > 1 else ""
        return f"{statistics.mean(by_seed):.3f}{spread}"

    def difference(self, one: str, other: str, column: str) -> str:
        """Of two rows, with its interval; in bold where that leaves zero out."""
        corpora = [clip.partition("/")[0] for clip in self.clips]
        difference, low, high = paired_bootstrap(self.counts(one, column), self.counts(other, column), corpora)
        text = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"**{text}**" if low > 0 or high < 0 else text


def paired_bootstrap(
    one: np.ndarray, other: np.ndarray, corpora: list[str], draws: int = DRAWS
) -> tuple[float, float, float]:
    """The difference of two ratios of sums, one minus other, and the interval that holds 95 % of it when seeds and the
    clips of each corpus are drawn again. one, other: [S, C, 2], numerator and denominator by seed and clip."""
    rng, S = np.random.default_rng(0), len(one)
    of_seeds = rng.multinomial(S, np.full(S, 1 / S), draws)  # [R, S] how often each is drawn
    sizes = Counter(corpora)
    of_clips = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), draws) for n in sizes.values()], axis=1)  # [R, C]

    def value(counts: np.ndarray, of_seeds: np.ndarray, of_clips: np.ndarray) -> np.ndarray:
        numerator, denominator = np.einsum("rs,scn,rc->nr", of_seeds, counts, of_clips, optimize=True)
        return numerator / denominator

    drawn = value(one, of_seeds, of_clips) - value(other, of_seeds, of_clips)
    once = np.ones((1, S)), np.ones((1, len(corpora)))
    [difference] = value(one, *once) - value(other, *once)
    return float(difference), *map(float, np.percentile(drawn, (2.5, 97.5)))


def results(pictures: str, trained: list[str], seeds: list[int], out: Path) -> Results:
    by_row = {
        row.key: [read_json(measured_file(row, Run(row.trained, pictures, seed), out)) for seed in seeds]
        for row in ROWS.values()
        if row.trained in trained
    }
    by_row |= {name: [measure_blind(pictures, name, out)] for name in BLIND}
    return Results(sorted(by_row[next(iter(BLIND))][0]), by_row)


def page(found: dict[str, Results], floors: dict[str, float], seeds: list[int], command: str) -> str:
    """The tables. found, floors: by pictures."""
    lines = [
        f"`{command}`; mean and standard deviation over seeds {', '.join(map(str, seeds))} of weights, data order and "
        f"negatives, on {len(HELD_OUT_SEEDS)} corpora of {HELD_OUT_CLIPS} held-out clips.",
        "",
    ]
    for pictures, of in found.items():
        blind = [(name, name) for name in BLIND]
        tables = (
            ("memory", [(row.title, row.key) for row in MEMORY]),
            ("the state that a refreshed context reports", [(row.title, row.key) for row in LADDER]),
            ("assistants that do not look, or not back", [*blind, (RECENT.title, RECENT.key)]),
        )
        for title, rows in tables:
            lines += [f"### In {pictures} pictures: {title}", ""]
            measured = [(name, [of.cell(key, column) for column in COLUMNS]) for name, key in rows if key in of.by_row]
            lines += table(COLUMNS, measured)
        lines += [f"### In {pictures} pictures: differences, with intervals of 95 %", ""]
        titles = {row.key: row.title for row in MEMORY}
        columns = {column: COLUMNS[column] for column in ("next_step", "replies_right_f1")}
        lines += table(columns, [
            (f"{titles[one]} − {titles[other]}", [of.difference(one, other, column) for column in columns])
            for one, other in PAIRS
            if one in of.by_row and other in of.by_row
        ])  # fmt: skip
        lines += [f"### In {pictures} pictures: completed steps named in summaries", ""]
        measured = [row for row in MEMORY if row.key in of.by_row]
        wrote = [row for row in measured if of.counts(row.key, "summary_recall") is not None]
        lines += table(OF_SUMMARIES, [(row.title, [of.cell(row.key, name) for name in OF_SUMMARIES]) for row in wrote])
        what = "The most frequent step after the one just completed, guessed without any memory, is the right next step"
        lines += [f"{what} in {floors[pictures]:.3f} of cases in {pictures} pictures.", ""]
    return "\n".join(lines)


def table(columns: dict[str, str], rows: list[tuple[str, list[str]]]) -> list[str]:
    """Lines of Markdown, and an empty one. columns: titles by name."""
    head = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    return [*head, *(f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "rows of the tables: all, or those of which these are trained"
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED), help=what)
    parser.add_argument("--pictures", nargs="+", default=list(PICTURES), choices=list(PICTURES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained side by side, on one thread each")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for pictures in arguments.pictures:
        corpora = [(out / pictures, 0, TRAIN_CLIPS, VAL_CLIPS)]
        corpora += [(held_out(pictures, seed, out).parent, seed, 1, HELD_OUT_CLIPS) for seed in HELD_OUT_SEEDS]
        for path, seed, clips, val_clips in corpora:
            if not path.exists():
                write_sample(path, seed=seed, difficulty=PICTURES[pictures], clips=clips, val_clips=val_clips)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        runs = [
            Run(trained, pictures, seed)
            for pictures in arguments.pictures for seed in arguments.seeds for trained in arguments.trained
        ]  # fmt: skip
        work = [pool.submit(run_and_measure, run, out) for run in runs]
        try:
            for number, done in enumerate(as_completed(work), 1):
                done.result()
                print(f"{number} of {len(work)} runs done", flush=True)
        except BaseException:  # a run that failed, or Ctrl-C: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    found = {pictures: results(pictures, arguments.trained, arguments.seeds, out) for pictures in arguments.pictures}
    floors = {pictures: next_step_floor(pictures, out) for pictures in arguments.pictures}
    command = " ".join(["python benchmarks/ablation.py", *sys.argv[1:]])
    write_tables(page(found, floors, arguments.seeds, command))
    print(f"written: {PAGE}")


def write_tables(tables: str) -> None:
    """The tables into the page, below its prose, which is written by hand."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"# Ablation\n\n{BELOW}\n"
    prose = text.split(BELOW)[0]
    PAGE.write_text(f"{prose}{BELOW}\n\n{tables}", encoding="utf-8")


if __name__ == "__main__":
    run_entry_point(main)
