"""What a run writes down of itself: metrics.jsonl, one JSON object a line, and the lines on the terminal."""

import contextlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prospect.checkpoint import TrainState
from prospect.errors import ProspectError, print_next
from prospect.files import read_lines, write_text, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

VALIDATION_SHOWN = {
    "speaking_event_f1": "speaking F1",
    "dst_event_f1": "update F1",
    "joint_goal_accuracy": "joint goal",
    "replies_right_f1": "replies right",
    "combined_score": "combined",
}


def validation_line(state: TrainState, patience: int | None) -> str:
    """What the terminal shows of a validation: its loss, the heads on streamed clips (else teacher-forced), and by what
    the best so far is the best. patience: `train.patience`."""
    numbers = state.evaluation
    shown = [f"step {state.step}: validation loss {numbers['loss']:.4f}"]
    for name, title in VALIDATION_SHOWN.items():
        value = numbers.get(f"streamed_{name}", numbers.get(name))
        shown += [] if value is None else [f"{title} {value:.3f}"]
    best = f"best so far: {state.best_by} {abs(state.best_value):.4f} at step {state.best_step}"
    shown.append(best + (f" (highest {state.highest:.4f})" if state.highest > state.best_value else ""))
    shown += [f"patience {state.since_best} of {patience}"] if patience else []
    return "  ".join(shown)


class MetricsLog:
    """metrics.jsonl: one JSON object a line. On resume, what was logged after the checkpoint is cut off.

    tensorboard: the same for TensorBoard, in a folder beside it that is written anew from the lines that are kept.
    """

    def __init__(self, path: Path, state: TrainState, tensorboard: bool = False):
        kept = []
        if path.exists():
            for line in read_lines(path):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line half-written
                    numbers = json.loads(line)
                    if numbers["step"] <= (state.evaluated_step if "evaluation" in numbers else state.step):
                        kept.append(line + "\n")
        write_text(path, "".join(kept))
        self.file = open(path, "a", encoding="utf-8")
        self.board = open_board(path.with_name("tensorboard"), kept) if tensorboard else None

    def write(self, numbers: dict) -> None:
        with writing(self.file.name):
            self.file.write(json.dumps(numbers) + "\n")
            self.file.flush()
            if self.board is not None:
                to_board(self.board, numbers)
                self.board.flush()


def open_board(folder: Path, lines: list[str]) -> "SummaryWriter":
    """Torch's own writer of TensorBoard's files, with the run's settings and the lines of metrics.jsonl so far."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        what, remedy = "run.tensorboard needs the package tensorboard", "pip install -r requirements-tensorboard.txt"
        raise ProspectError(what, where=str(error), remedy=remedy) from error
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        board = SummaryWriter(str(folder))
        board.add_text("settings", as_block(folder.with_name("config.yaml").read_text(encoding="utf-8")))
        for line in lines:
            to_board(board, json.loads(line))
        board.flush()
    return board


def to_board(board: "SummaryWriter", numbers: dict) -> None:
    """A line of metrics.jsonl: numbers as scalars, in groups; a skipped step and a streamed clip as text."""
    step, texts = numbers["step"], {name: numbers[name] for name in ("skipped", "example") if name in numbers}
    groups = {"counts": numbers.get("counts", {}), "validation": numbers.get("evaluation", {}), "train": numbers}
    for group, values in groups.items():
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                board.add_scalar(f"{group}/{name}", value, step)
    for name, text in texts.items():
        board.add_text(name, as_block(text), step)


def as_block(text: str) -> str:
    """Text as Markdown shows it letter by letter."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


def report_end(run: Path, state: TrainState, max_steps: int, finished: bool, clips: str) -> None:
    """How a run ended, on the terminal. finished: by itself. clips: a file to stream next."""
    if not finished:
        print(f"stopped by a signal after step {state.step}; start again to resume", file=sys.stderr)
    else:
        early = f" of {max_steps}, then out of patience (train.patience)" if state.step < max_steps else ""
        best = f"(step {state.best_step}, by {state.best_by})"
        print(f"done: {state.step} steps{early}; the best checkpoint is {run / 'best'} {best}")
        print_next(shlex.join(["python", "infer.py", "--clip", f"{clips}:0", "--checkpoint", str(run / "best")]))
