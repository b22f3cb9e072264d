"""The curves of training runs, from their metrics.jsonl (drawn by curves.js)."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from prospect.checkpoint import flatten
from prospect.errors import ProspectError
from prospect.report.page import LOSS_NAMES, differing, number, write_figures, write_page
from prospect.report.svg import Line, plot, scale_of

MAX_POINTS = 2000  # of a run's curves; longer runs are averaged over equal stretches of their lines

# Which label counts a loss is divided by.
COUNTS_OF = {
    "speaking_gen": ("speaking_gen",), "speaking_binary": ("speaking_pos", "speaking_neg"), "dst_gen": ("dst_gen",),
    "dst_binary": ("dst_pos", "dst_neg"), "dst_state": ("dst_state",),
}  # fmt: skip
TRAINING_TITLES = {
    "loss": "loss", **LOSS_NAMES, "lr": "learning rate", "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second", "padding": "padding share",
}  # fmt: skip

SHOWN_FIRST = (  # of a validation: what the streamed clips scored
    "streamed_speaking_event_f1", "streamed_dst_event_f1", "streamed_joint_goal_accuracy", "streamed_replies_right_f1",
)  # fmt: skip


@dataclass
class Run:
    """A run's metrics.jsonl. curves and counts have one entry for each of `steps`, evaluation for each `evaluated`."""

    name: str
    steps: list[float]
    curves: dict[str, list[float | None]]
    counts: dict[str, list[float | None]]  # by loss
    skipped: list[int]  # steps that were not taken, because loss or gradient were not finite
    evaluated: list[int]
    evaluation: dict[str, list[float | None]]
    best_step: int | None  # of the best checkpoint
    settings: dict[str, Any]  # by name, as its config.yaml has them; {} without one


def read_run(directory: str | Path) -> Run:
    """A run's curves; an unfinished last line is left out. Raises ProspectError where there are none."""
    path = Path(directory) / "metrics.jsonl"
    try:
        written = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="give a run's directory") from error
    trained, evaluations, skipped, best_step = [], [], [], None
    for at, line in enumerate(written[:-1], start=1):  # what follows the last line break is still being written
        try:
            numbers = json.loads(line)
            step = int(numbers["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            where = f"{path}, line {at}"
            raise ProspectError("is not a line of metrics", where=where, remedy="remove the line") from error
        if "evaluation" in numbers:
            evaluations.append((step, numbers["evaluation"]))
            best_step = numbers.get("best_step")
        elif "skipped" in numbers:
            skipped.append(step)
        else:
            trained.append(numbers)
    if not trained and not evaluations:
        raise ProspectError("holds no step", where=str(path), remedy="wait for the first step")
    stretches = list(equal_stretches(trained, MAX_POINTS))
    names = [name for name in TRAINING_TITLES if any(number(line.get(name)) not in (None, 0) for line in trained)]
    learned = [name for name in names if name in COUNTS_OF]
    measured = evaluation_names(evaluations)
    losses = [(numbers["loss"], step) for step, numbers in evaluations if number(numbers.get("loss")) is not None]
    if best_step is None and losses:  # a log that does not name it: the lowest loss
        _, best_step = min(losses)
    return Run(
        name=str(directory),
        steps=[mean(line["step"] for line in stretch) for stretch in stretches],
        curves={name: [mean(line.get(name) for line in stretch) for stretch in stretches] for name in names},
        counts={name: [mean(label_count(line, name) for line in stretch) for stretch in stretches] for name in learned},
        skipped=skipped,
        evaluated=[step for step, _ in evaluations],
        evaluation={name: [number(numbers.get(name)) for _, numbers in evaluations] for name in measured},
        best_step=best_step,
        settings=read_settings(path.with_name("config.yaml")),
    )


def read_settings(path: Path) -> dict[str, Any]:
    """A run's settings by name, as they were written down; {} where there are none to be read."""
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):  # AttributeError: YAML, but no settings
        return {}


def label_count(line: dict, loss: str) -> int:
    return sum(line.get("counts", {}).get(name, 0) for name in COUNTS_OF[loss])


def equal_stretches(lines: list[dict], most: int) -> Iterator[list[dict]]:
    """The lines in at most `most` groups of equal size, but for the last."""
    size = max(1, math.ceil(len(lines) / most))
    return (lines[begin : begin + size] for begin in range(0, len(lines), size))


def mean(values: Iterable[Any]) -> float | int | None:
    """Of those that are there and finite."""
    found = [value for value in map(number, values) if value is not None]
    return number(sum(found) / len(found)) if len(found) > 1 else found[0] if found else None


def evaluation_names(evaluations: list[tuple[int, dict]]) -> list[str]:
    """Every number that some evaluation has: SHOWN_FIRST, the losses, the others as they are logged."""
    names = list(dict.fromkeys(name for _, numbers in evaluations for name in numbers))
    used = [name for name in names if any(numbers.get(name) for _, numbers in evaluations)]  # no row of zeros
    first = [name for name in SHOWN_FIRST if name in names]
    rest = [name for name in used if name not in first]
    return first + sorted(rest, key=lambda name: (name != "loss", not name.startswith("loss")))


def evaluation_title(name: str) -> str:
    """loss_speaking_gen -> validation: reply text (LM); streamed_dst_event_f1 -> streamed: update event F1"""
    if name == "loss":
        return "validation loss"
    if name.startswith("loss_"):
        loss = name.removeprefix("loss_")
        return "validation: " + LOSS_NAMES.get(loss, loss)
    if name.startswith("streamed_"):
        return "streamed: " + evaluation_title(name.removeprefix("streamed_"))
    words = "update " + name.removeprefix("dst_") if name.startswith("dst_") else name
    return words.replace("_", " ").replace("f1", "F1", 1).replace("auroc", "AUROC", 1)


def figures(runs: list[Run], titles: dict[str, str]) -> dict[str, str]:
    """Every curve of the runs as SVG, by its name; those of validations begin with `validation-`."""
    last, found = max(1.0, *(step for run in runs for step in (*run.steps, *run.evaluated))), {}
    for kind, steps_of in (("curves", "steps"), ("evaluation", "evaluated")):
        names = dict.fromkeys(name for run in runs for name in getattr(run, kind))
        for name in names:
            lines = []
            for run in runs:
                values = getattr(run, kind).get(name, [])
                points = [None if y is None else (x, y) for x, y in zip(getattr(run, steps_of), values)]
                lines.append(Line(run.name, points, dots=kind == "evaluation"))
            prefix, title = ("", TRAINING_TITLES) if kind == "curves" else ("validation-", titles)
            falls = name in COUNTS_OF or name == "grad_norm" or name.startswith("loss")
            found[prefix + name] = plot(title[name], lines, "step", last, scale_of(lines, last, falls))
    return found


def write_runs(path: str | Path, runs: list[Run], svg: Path | None = None) -> None:
    """One page; several runs are laid over each other. svg: a folder for its figures."""
    titles = {name: evaluation_title(name) for run in runs for name in run.evaluation}
    data = {"runs": [asdict(run) for run in runs], "curveTitles": TRAINING_TITLES, "evaluationTitles": titles}
    data["differing"] = differing([one.pop("settings") for one in data["runs"]])
    data["figures"] = figures(runs, titles)
    write_page(path, "curves", "Training: " + ", ".join(run.name for run in runs), data)
    if svg is not None:
        write_figures(svg, data["figures"])
