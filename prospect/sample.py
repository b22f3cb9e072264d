"""The generated sample corpus: clips in the format of real ones, from a small world made of numbers.

    python -m prospect.sample --out data/sample --seed 0 --difficulty easy
    python -m prospect.sample --out data/quiet --quiet 3

A newcomer has no frames of real recordings, which are large and may not be redistributed. This file generates clips
without any download: people work through one of three tasks of six steps; an assistant watches, tracks the task state
and speaks unasked, as in ProAssist (arXiv 2506.05904). It writes, under --out,

    train.json, val.json            JSON lists of clips
    embeddings/{id}_embeddings.pkl  one pickled numpy array [F, D] float16 per clip; row r is frame start_frame_idx + r

or with --quiet instead quiet.json: hours in which nothing happens, clip by clip of ten minutes. Hands are idle, a step
is under way or done, and stays so. Whatever an assistant says there is a false alarm (prospect/quiet.py).

**The world** is fixed: every seed, split and difficulty shares it. A *look* is a random direction of unit length: one
per task for idle hands, and two per step, for the step under way and done. A step going wrong looks half like the step
under way and half like trouble, which looks the same everywhere. As embeddings of real pictures fill only a small part
of their space, looks and noise lie in one subspace of R dimensions out of the D. One frame is

    (IDLE_SHARE * idle look of the task  +  look of what is now seen  +  noise) / a constant

**The people** do not follow the recipe to the letter. The assistant names the lowest step not yet completed; the person
does that one, or another. When S3 is done, the step to name may be S1, S2, S4, S5 or S6: no frame shows which. The
model must have tracked the state, and in a clip that starts mid-task it must have read it in the prompt.

**The difficulties.** `easy`: the nearest look is the right one on every frame; half of the clips start mid-task; a
person who does not do the step named does the next open one. `long`: every clip is a complete task, from the wish to
the last step, 2.7 times as long; a person who does not do the step named does any other open one. So what was completed
minutes ago, long out of a short context, decides what must be said now. `hard`: the stories of `long`, word for word,
but on one frame in eighteen another look of the task is nearer, so evidence must be accumulated.

    frame   50          60               91               130             138             170
            |           |                |                |               |               |
    seen    idle        idle             S2 under way     S2 going wrong  S2 under way    S2 done
    turns               I want to...     S2->start        Careful, ...                    S2->complete
                        Great! First, S1                                                  Well done. Next, S1

Every turn's range is the frame at which its cause is first seen, one before it and one after it.

Letters: F frames of a clip, D width of an embedding, R dimensions that differ from frame to frame, L looks of a task.
"""

import argparse
import json
import math
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prospect.errors import ProspectError, run_entry_point
from prospect.files import WRITING, to_disk, tree_to_disk

FPS = 2  # frames per second
D = 2048  # width of an embedding, that of SmolVLM2's vision features
R = 128  # dimensions of the subspace that holds every look and all noise
NUM_STEPS = 6
SPLITS = ("train", "val", "quiet")
QUIET_ROWS = 1200  # frames in a clip of quiet: ten minutes


@dataclass(frozen=True)
class Difficulty:
    noise: float  # in each of the R directions, for looks of length 1: what counts for telling two looks apart
    whole_tasks: bool  # from the wish to the last step; else of a drawn length, half of the clips starting mid-task
    obey: float  # probability that the person starts the step just named
    choices: int  # among how many open steps, in recipe order, the person chooses; all but the named one equally likely


DIFFICULTIES = {
    "easy": Difficulty(noise=0.05, whole_tasks=False, obey=0.75, choices=2),
    "long": Difficulty(noise=0.05, whole_tasks=True, obey=0.5, choices=NUM_STEPS),
    "hard": Difficulty(noise=0.25, whole_tasks=True, obey=0.5, choices=NUM_STEPS),
}
IDLE_SHARE = 0.3  # of the idle look, present in every frame of its task, like the room the person works in

WORLD_SEED = 2506_05904  # never changes: another world would be another benchmark
CLIP_SEED = 1

GAP_MIN, GAP_MAX = 15, 60  # frames between events; skewed so that the mean is about 30
LENGTH_MIN, LENGTH_MAX = 100, 400  # frames in a clip; skewed, so that the mean is about 190
MID_TASK_PROBABILITY = 0.5  # that a clip starts with some steps already completed
IN_PROGRESS_PROBABILITY = 0.4  # that such a clip starts with another step under way
QUESTION_PROBABILITY = 0.12  # that the next event is a user's question
MISTAKE_PROBABILITY = 0.2  # that the next event of a step under way is a mistake, at most one per step


@dataclass(frozen=True)
class Task:
    """One thing to do. No step name occurs inside another, so that a sentence names at most the step it means."""

    goal: str  # `inferred_goal` of a clip
    wish: str  # how the user says it: "I want to ..."
    steps: tuple[str, ...]  # NUM_STEPS names in the imperative, in the recipe's order


TASKS = (
    Task(
        "Assembling a Toy Truck",
        "assemble a toy truck",
        (
            "screw the chassis together",
            "attach the wheels to the chassis",
            "mount the cabin at the front",
            "clip in the window",
            "hook on the trailer",
            "stick on the lights",
        ),
    ),
    Task(
        "Making a Pot of Coffee",
        "make a pot of coffee",
        (
            "boil the water",
            "grind the beans",
            "warm the pot",
            "fold the filter paper",
            "measure the milk",
            "set out the cups",
        ),
    ),
    Task(
        "Repotting a Plant",
        "repot a plant",
        (
            "trim the dead leaves",
            "loosen the roots",
            "put stones in the new pot",
            "mix the soil",
            "wipe the saucer",
            "cut a stick for the stem",
        ),
    ),
)

SYSTEM_PROMPT = "You are a helpful assistant. You watch the user work and help in time."
SAY_WISH = "I want to {wish}."
SAY_FIRST = "Great! First, {step}."
SAY_NEXT = ("Well done. Next, {step}.", "Good job. Now {step}.", "Great! The next step: {step}.")
SAY_ALL_DONE = ("All done. Well done!", "All done. Good job!")
SAY_CAREFUL = "Careful, that is not right: {step}."
ASK = ("What should I do next?", "What now?")
ANSWER_NEXT = ("Next, {step}.", "Now {step}.")
ANSWER_KEEP_GOING = "Keep going: {step}."


@dataclass(frozen=True)
class Event:
    """Something that happens at row `row` (frames from the clip's start), the first on which it can be seen.

    kind: open (user states the goal) | start | complete | mistake | recover | question. `step` counts from 0;
    it is None for open and question. A recovery can be seen but nobody mentions it; every other event has turns.
    """

    row: int
    kind: str
    step: int | None = None


@dataclass(frozen=True)
class Story:
    """Everything that happens in a clip, before it is put into words (`conversation`) or pictures (`draw`)."""

    task: int  # index into TASKS
    start_frame: int  # absolute number of the clip's first frame
    num_rows: int  # F
    done_before: tuple[int, ...]  # steps completed before the clip, in the order in which they were completed
    under_way_before: int | None  # the step under way when the clip starts
    events: tuple[Event, ...]


# ---- the world -----------------------------------------------------------------------------------


def world_subspace() -> np.ndarray:
    """The directions in which frames differ, [R, D] float32, each of unit length and at right angles to the others."""
    drawn = np.random.default_rng([WORLD_SEED, 1]).standard_normal((D, R))
    return np.linalg.qr(drawn)[0].T.astype(np.float32)


def world_looks() -> np.ndarray:
    """The looks of all tasks, [tasks, L, D] float32 of unit length, L = 1 + 3 * NUM_STEPS; see `look_index`."""
    rng = np.random.default_rng([WORLD_SEED, 0])
    trouble = _unit(rng.standard_normal(R, dtype=np.float32))  # [R]
    looks = (rng.standard_normal((len(TASKS), n, R), dtype=np.float32) for n in (1, NUM_STEPS, NUM_STEPS))
    idle, under_way, done = map(_unit, looks)  # [tasks, n, R] each
    wrong = _unit(under_way + trouble)
    return np.concatenate([idle, under_way, done, wrong], axis=1) @ world_subspace()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def look_index(kind: str, step: int = 0) -> int:
    """The index of a look in `world_looks`: 0 idle, then the steps under way, then done, then going wrong."""
    return 0 if kind == "idle" else 1 + ("under_way", "done", "wrong").index(kind) * NUM_STEPS + step


def clean_frames(looks: np.ndarray, difficulty: str) -> np.ndarray:
    """Frames without their noise, one per look: looks [tasks, L, D] -> [tasks, L, D] float32, in a file's units.

    The constant that brings the entries of a noisy frame to a standard deviation of 1 depends on the difficulty;
    `noise_scale` divides by the same one.
    """
    return (IDLE_SHARE * looks[:, :1] + looks) / _entry_std(difficulty)


def noise_scale(difficulty: str) -> float:
    """Standard deviation of the noise in each direction of the subspace, in a file's units."""
    return DIFFICULTIES[difficulty].noise / _entry_std(difficulty)


def _entry_std(difficulty: str) -> float:
    # The squared lengths of look, shortened idle look and noise, spread over D entries.
    return math.sqrt((1 + IDLE_SHARE**2 + R * DIFFICULTIES[difficulty].noise ** 2) / D)


# ---- what happens in a clip ----------------------------------------------------------------------


def act_out(rng: np.random.Generator, rules: Difficulty) -> Story:
    """Draw one clip's story by the rules of the module's docstring."""
    task = int(rng.integers(len(TASKS)))
    start_frame = int(rng.integers(50, 3001))
    longest = LENGTH_MIN + round((LENGTH_MAX - LENGTH_MIN) * rng.beta(1.0, 2.0))  # Beta(1, 2) has mean 1/3
    num_rows = math.inf if rules.whole_tasks else longest
    done: list[int] = []
    under_way: int | None = None
    events: list[Event] = []
    if rng.random() < MID_TASK_PROBABILITY and not rules.whole_tasks:  # steps before the clip follow the same rules
        for _ in range(rng.integers(1, NUM_STEPS - 1)):
            done.append(_choose_step(done, rng, rules))
        if rng.random() < IN_PROGRESS_PROBABILITY:
            under_way = _choose_step(done, rng, rules)
        row = 0
    else:
        row = int(rng.integers(2, 11))
        events.append(Event(row, "open"))
    done_before, under_way_before = tuple(done), under_way

    mistaken = False  # whether the step under way has already gone wrong: once is enough
    while len(done) < NUM_STEPS:
        row += _draw_gap(rng)
        if row + 1 >= num_rows:  # the range of its turns, row - 1 .. row + 1, would leave the clip: it ends mid-task
            break
        if rng.random() < QUESTION_PROBABILITY:
            events.append(Event(row, "question"))
        elif under_way is None:
            under_way, mistaken = _choose_step(done, rng, rules), False
            events.append(Event(row, "start", under_way))
        elif not mistaken and rng.random() < MISTAKE_PROBABILITY:
            mistaken = True
            events.append(Event(row, "mistake", under_way))
            recovery = row + int(rng.integers(4, 9))
            if recovery < num_rows:  # otherwise the clip ends while it is going wrong
                events.append(Event(recovery, "recover", under_way))
        else:
            events.append(Event(row, "complete", under_way))
            done.append(under_way)
            under_way = None
    else:  # all is done: a while of silence, and the clip ends
        num_rows = min(num_rows, max(LENGTH_MIN, row + int(rng.integers(15, 91))))
    return Story(task, start_frame, num_rows, done_before, under_way_before, tuple(events))


def nothing_happens(rng: np.random.Generator, rules: Difficulty) -> Story:
    """Draw a clip without any event, somewhere in a task: idle hands, a step under way, or the last one done."""
    task, start_frame = int(rng.integers(len(TASKS))), int(rng.integers(50, 3001))
    done: list[int] = []
    for _ in range(rng.integers(NUM_STEPS)):
        done.append(_choose_step(done, rng, rules))
    under_way = _choose_step(done, rng, rules) if rng.random() < IN_PROGRESS_PROBABILITY else None
    return Story(task, start_frame, QUIET_ROWS, tuple(done), under_way, ())


def _choose_step(done: list[int], rng: np.random.Generator, rules: Difficulty) -> int:
    """The step the person starts: the lowest open one, which the assistant has named, or one of those after it."""
    open_steps = [step for step in range(NUM_STEPS) if step not in done][: rules.choices]
    if len(open_steps) == 1 or rng.random() < rules.obey:
        return open_steps[0]
    return open_steps[1] if len(open_steps) == 2 else int(rng.choice(open_steps[1:]))


def _draw_gap(rng: np.random.Generator) -> int:
    return GAP_MIN + round((GAP_MAX - GAP_MIN) * rng.beta(1.2, 2.4))  # Beta(1.2, 2.4) has mean 1/3


# ---- the story in words --------------------------------------------------------------------------


def write_clip(story: Story, uid: str, rng: np.random.Generator) -> dict:
    """The clip as it is in the JSON file; `rng` chooses among wordings."""
    task = TASKS[story.task]
    recipe = [f"{number}. {step[0].upper()}{step[1:]}." for number, step in enumerate(task.steps, 1)]
    return {
        "video_uid": uid,
        "clip_idx": 0,
        "inferred_goal": task.goal,
        "inferred_knowledge": "\n".join([task.goal, *recipe]),
        "conversation": conversation(story, rng),
        "dst": step_times(story),
        "start_frame_idx": story.start_frame,
        "end_frame_idx": story.start_frame + story.num_rows - 1,
        "dataset": "sample",
        "fps": FPS,
    }


def conversation(story: Story, rng: np.random.Generator) -> list[dict]:
    """The turns, in order. A DST_UPDATE carries the state before it, any other turn the state it is spoken in."""
    task = TASKS[story.task]
    state = ["not_started"] * NUM_STEPS
    for step in story.done_before:
        state[step] = "completed"
    if story.under_way_before is not None:
        state[story.under_way_before] = "in_progress"

    # Prompt text; as in real files, its frames mean nothing and are outside the clip.
    turns = [{"role": "system", "content": SYSTEM_PROMPT, "start_frame": 0, "end_frame": 1, "labels": "system|generic"}]

    def add(row: int, role: str, content: str | list[dict], labels: str) -> None:
        time = (story.start_frame + row) / FPS
        snapshot = {f"S{number}": value for number, value in enumerate(state, 1)}
        turn = {"role": role, "content": content, "time": time}
        turn |= {"start_frame": int((time - 0.5) * FPS), "end_frame": int((time + 0.5) * FPS)}
        turns.append(turn | {"dst_state": snapshot, "labels": labels})

    for event in story.events:
        if event.kind in ("start", "complete"):
            transition = [{"id": f"S{event.step + 1}", "transition": event.kind}]
            add(event.row, "DST_UPDATE", transition, f"initiative|dst_update,dst_{event.kind},steps_1")
            state[event.step] = "in_progress" if event.kind == "start" else "completed"
        for role, text, labels in said_at(event, task, state, rng):
            add(event.row, role, text, labels)
    return turns


def said_at(event: Event, task: Task, state: list[str], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """What is said at an event, as (role, text, labels); state: of each step, once the event has happened."""

    def one_of(wordings: tuple[str, ...]) -> str:
        return str(rng.choice(wordings))

    open_step = task.steps[state.index("not_started")] if "not_started" in state else None  # the lowest
    if event.kind == "open":
        wish = ("user", SAY_WISH.format(wish=task.wish), "user|generic")
        return [wish, ("assistant", SAY_FIRST.format(step=task.steps[0]), "responsive|instruction")]
    if event.kind == "mistake":
        return [("assistant", SAY_CAREFUL.format(step=task.steps[event.step]), "initiative|correction")]
    if event.kind == "complete":
        if open_step is None:
            return [("assistant", one_of(SAY_ALL_DONE), "initiative|feedback")]
        return [("assistant", one_of(SAY_NEXT).format(step=open_step), "initiative|instruction,feedback")]
    if event.kind == "question":
        question = ("user", one_of(ASK), "user|generic")
        if "in_progress" in state:
            answer = ANSWER_KEEP_GOING.format(step=task.steps[state.index("in_progress")])
        else:
            answer = one_of(ANSWER_NEXT).format(step=open_step)
        return [question, ("assistant", answer, "responsive|instruction")]
    return []


def step_times(story: Story) -> list[dict]:
    """The clip's `dst`: every step's start and end, in seconds. What happens outside it gets a time outside it."""
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    before = [(table, step) for step in story.done_before for table in (starts, ends)]
    if story.under_way_before is not None:
        before.append((starts, story.under_way_before))
    for number, (table, step) in enumerate(before, 1):  # evenly over the time before the clip
        table[step] = round(story.start_frame / FPS * number / (len(before) + 1), 1)
    for event in story.events:
        if event.kind in ("start", "complete"):
            (starts if event.kind == "start" else ends)[event.step] = (story.start_frame + event.row) / FPS
    # After the clip, ten seconds apart: first the end of a step left under way, then those not started, in order.
    after = [(ends, step) for step in starts if step not in ends]
    after += [(table, step) for step in range(NUM_STEPS) if step not in starts for table in (starts, ends)]
    for number, (table, step) in enumerate(after, 1):
        table[step] = (story.start_frame + story.num_rows - 1) / FPS + 10.0 * number
    return [
        {"type": "step", "id": f"S{step + 1}", "start_ts": starts[step], "end_ts": ends[step], "name": name}
        for step, name in enumerate(TASKS[story.task].steps)
    ]


# ---- the story in pictures -----------------------------------------------------------------------


def seen_looks(story: Story) -> np.ndarray:
    """Which look is seen on each row of the clip: [F] indices into the L looks of its task."""
    if story.under_way_before is not None:
        look = look_index("under_way", story.under_way_before)
    elif story.done_before:
        look = look_index("done", story.done_before[-1])
    else:
        look = look_index("idle")
    shows = {"start": "under_way", "recover": "under_way", "mistake": "wrong", "complete": "done"}
    seen = np.full(story.num_rows, look)  # [F]
    for event in story.events:
        if event.kind in shows:  # words (open, question) change nothing in the picture
            seen[event.row :] = look_index(shows[event.kind], event.step)
    return seen


def draw(story: Story, clean: np.ndarray, subspace: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The clip's embeddings, [F, D] float16: on each row its clean frame, out of [tasks, L, D], plus fresh noise.

    The noise is in `subspace` [R, D].
    """
    noisy = rng.standard_normal((story.num_rows, R), dtype=np.float32) * np.float32(noise)  # [F, R]
    return (clean[story.task][seen_looks(story)] + noisy @ subspace).astype(np.float16)  # [F, D]


# ---- the corpus ----------------------------------------------------------------------------------


def write_sample(out: Path, *, seed: int, difficulty: str, clips: int = 800, val_clips: int = 40) -> None:
    """Write a corpus of `clips` training and `val_clips` validation clips into the new directory `out`.

    Raises ProspectError for an unknown difficulty, a negative seed, fewer than one clip in a split, a directory that
    holds something already, and whatever keeps the files from being written.
    """
    if clips < 1 or val_clips < 1:
        what = f"{clips} training and {val_clips} validation clips asked for"
        raise ProspectError(what, where=str(out), remedy="ask for at least one of each")
    write_splits(Path(out), {"train": clips, "val": val_clips}, seed, difficulty)


def write_quiet(out: Path, *, seed: int, difficulty: str, hours: float) -> None:
    """Write quiet.json, at least `hours` in which nothing happens, into the new directory `out`. Raises ProspectError
    as `write_sample` does."""
    if not 0 < hours < math.inf:
        raise ProspectError(f"{hours:g} hours of quiet asked for", where=str(out), remedy="ask for some")
    write_splits(Path(out), {"quiet": math.ceil(hours * 3600 * FPS / QUIET_ROWS)}, seed, difficulty)


def write_splits(out: Path, splits: dict[str, int], seed: int, difficulty: str) -> None:
    """Write so many clips of each split into the new directory `out`.

    Clip number k of a split depends on (seed, split, k) alone, however many are asked for. Everything is written into
    a directory beside `out` which is then renamed: a half-written corpus never has the name of a complete one.
    """
    if difficulty not in DIFFICULTIES:
        raise ProspectError(f"unknown difficulty {difficulty!r}", where=str(out), remedy="easy, long or hard")
    if seed < 0:
        raise ProspectError(f"the corpus seed {seed} is negative", where=str(out), remedy="0 or any whole number above")
    clean = clean_frames(world_looks(), difficulty)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "there is something here already, and it is not overwritten"
            raise ProspectError(what, where=str(out), remedy="remove it or name another directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=WRITING, prefix=f".{out.name}.", dir=out.parent) as beside:
            aside = Path(beside) / out.name
            (aside / "embeddings").mkdir(parents=True)
            for split, count in splits.items():
                listed = []
                for clip, frames in make_clips(split, count, seed, difficulty, clean):
                    listed.append(clip)
                    path = aside / "embeddings" / f"{clip['video_uid']}_{clip['clip_idx']}_embeddings.pkl"
                    path.write_bytes(pickle.dumps(frames, protocol=4))  # named, so that every Python writes the same
                (aside / f"{split}.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
            tree_to_disk(aside)
            aside.rename(out)
            to_disk(out.parent)
    except OSError as error:
        remedy = "a full corpus takes 0.7 GB, a long or hard one 1.8 GB, in a directory that may be written to"
        raise ProspectError(f"the corpus cannot be written: {error.strerror}", where=str(out), remedy=remedy) from error


def make_clips(
    split: str, count: int, seed: int, difficulty: str, clean: np.ndarray
) -> Iterator[tuple[dict, np.ndarray]]:
    """Clips 0 .. count-1 of a split, one by one: (clip as in the JSON file, embeddings [F, D] float16)."""
    subspace, noise = world_subspace(), noise_scale(difficulty)
    for number in range(count):
        # The noise is drawn last and in the same number at every difficulty: no story depends on it.
        rng = np.random.default_rng([CLIP_SEED, seed, SPLITS.index(split), number])
        story = (nothing_happens if split == "quiet" else act_out)(rng, DIFFICULTIES[difficulty])
        clip = write_clip(story, f"sample-{difficulty}-seed{seed}-{split}-{number:05d}", rng)
        yield clip, draw(story, clean, subspace, noise, rng)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prospect.sample", description="Write the generated sample corpus.")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the corpus")
    parser.add_argument("--seed", type=int, default=0, help="changes the clips, never the world (default 0)")
    parser.add_argument("--difficulty", default="easy", help="easy, long or hard (default easy)")
    parser.add_argument("--clips", type=int, default=800, help="training clips (default 800)")
    parser.add_argument("--val-clips", type=int, default=40, help="validation clips (default 40)")
    parser.add_argument("--quiet", type=float, metavar="HOURS", help="hours of nothing happening, and no other clips")
    arguments = parser.parse_args()
    clips, val_clips, seed, difficulty = arguments.clips, arguments.val_clips, arguments.seed, arguments.difficulty
    if arguments.quiet is not None:
        write_quiet(arguments.out, seed=seed, difficulty=difficulty, hours=arguments.quiet)
        print(f"{arguments.out}: {arguments.quiet:g} hours of quiet, {difficulty}, seed {seed}")
        return
    write_sample(arguments.out, seed=seed, difficulty=difficulty, clips=clips, val_clips=val_clips)
    print(f"{arguments.out}: {clips} training and {val_clips} validation clips, {difficulty}, seed {seed}")


if __name__ == "__main__":
    run_entry_point(main)
