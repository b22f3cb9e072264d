"""The best that can be done on the sample corpus: an observer who knows its world, its noise and its people's rules.

    python benchmarks/ideal.py [--difficulties long hard] [--clips 40] [--seed 1000]

A model learns from examples what the observer is told: the looks, how noisy they are, how people choose and how long
they take (prospect/sample.py). So its scores are a ceiling for every model's, and how far below it a model stays is
what training, not the corpus, leaves undone. Like a model it sees frame after frame, hears the user before a frame,
and speaks at a frame.

**What it knows** is the exact probability of every situation: which steps are done, which one is under way or was the
last, whether it goes wrong, and how many frames ago something last happened. One frame further, every situation either
stays as it is or changes by the rules; then the picture weighs them (Bayes):

    p(situation, age | frames to r)  ~  p(picture r | look of situation) * sum over before of p(change) * p(before)

**What it does** follows from one number: it updates the task state as soon as another state than the one it has told is
true with at least `certainty`, and warns as soon as a step goes wrong with as much. The number is chosen, like a
model's, for the mean of events, replies and state, on the validation clips of another corpus seed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from benchmarks.ablation import COLUMNS, next_steps
from prospect.clip_files import parse_clip
from prospect.clips import Clip
from prospect.dst import STATES, Transition, write_update
from prospect.errors import run_entry_point
from prospect.metrics import ratio
from prospect.sample import (
    ANSWER_KEEP_GOING,
    ANSWER_NEXT,
    DIFFICULTIES,
    GAP_MAX,
    GAP_MIN,
    MISTAKE_PROBABILITY,
    NUM_STEPS,
    QUESTION_PROBABILITY,
    SAY_ALL_DONE,
    SAY_CAREFUL,
    SAY_FIRST,
    SAY_NEXT,
    TASKS,
    Difficulty,
    Task,
    clean_frames,
    look_index,
    make_clips,
    noise_scale,
    world_looks,
    world_subspace,
)
from prospect.score import combined_score, decision_numbers, score_clip
from prospect.stream import FrameRecord
from prospect.text_metrics import load_similarity

CERTAINTIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
ALL_DONE = (1 << NUM_STEPS) - 1
RECOVERY = range(4, 9)  # frames after which a mistake is recovered from, each equally likely


# ---- the rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """What may be true at a frame. phase: idle (nothing has happened), under_way, wrong, recovered, or done.

    completed: bit s is step s. step: the one under way, or the last one done.
    """

    completed: int
    step: int | None
    phase: str

    @property
    def look(self) -> int:
        if self.step is None:
            return look_index("idle")
        return look_index({"recovered": "under_way"}.get(self.phase, self.phase), self.step)

    @property
    def state(self) -> tuple[str, ...]:
        """The task state, a word for each step."""
        now = [STATES[2] if self.completed >> step & 1 else STATES[0] for step in range(NUM_STEPS)]
        if self.phase in ("under_way", "wrong", "recovered"):
            now[self.step] = STATES[1]
        return tuple(now)


SITUATIONS = [Situation(0, None, "idle")] + [
    Situation(completed, step, phase)
    for completed in range(ALL_DONE + 1)
    for step in range(NUM_STEPS)
    for phase in (("done",) if completed >> step & 1 else ("under_way", "wrong", "recovered"))
]  # C of them
NUMBER = {situation: c for c, situation in enumerate(SITUATIONS)}


def step_choices(completed: int, rules: Difficulty) -> dict[int, float]:
    """With which probability a person starts each step next."""
    open_steps = [step for step in range(NUM_STEPS) if not completed >> step & 1][: rules.choices]
    if len(open_steps) == 1:
        return {open_steps[0]: 1.0}
    return {
        step: rules.obey if step == open_steps[0] else (1 - rules.obey) / (len(open_steps) - 1) for step in open_steps
    }


def changes(rules: Difficulty) -> np.ndarray:
    """Probabilities of what an event other than a question makes of a situation, [C, C]; nothing follows the last."""
    matrix = np.zeros((len(SITUATIONS), len(SITUATIONS)))
    for c, now in enumerate(SITUATIONS):
        if now.phase in ("idle", "done") and now.completed != ALL_DONE:
            for step, probability in step_choices(now.completed, rules).items():
                matrix[c, NUMBER[Situation(now.completed, step, "under_way")]] = probability
        elif now.phase != "done":
            mistake = MISTAKE_PROBABILITY if now.phase == "under_way" else 0.0  # once is enough
            done = Situation(now.completed | 1 << now.step, now.step, "done")
            matrix[c, NUMBER[done]] = 1 - mistake
            matrix[c, NUMBER[Situation(now.completed, now.step, "wrong")]] += mistake
    return matrix


def hazards() -> np.ndarray:
    """The probability that the next event comes `a` frames after the last, if none came before, [GAP_MAX + 1]."""
    x = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = x**0.2 * (1 - x) ** 1.4  # Beta(1.2, 2.4), but for a constant
    gaps = GAP_MIN + np.round((GAP_MAX - GAP_MIN) * x).astype(int)
    probability = np.bincount(gaps, density, minlength=GAP_MAX + 1) / density.sum()
    return probability / np.maximum(probability[::-1].cumsum()[::-1], 1e-300)


def last_done(completed: int, rules: Difficulty) -> dict[int, float]:
    """Which of the completed steps was the last, with which probability, when the order is unknown."""
    ways = {0: {None: 1.0}}  # by set of completed steps, by the last one: the probability to come through it
    for done in range(completed):
        for step, probability in step_choices(done, rules).items() if done in ways else ():
            if completed >> step & 1:
                through = ways.setdefault(done | 1 << step, {})
                through[step] = through.get(step, 0.0) + probability * sum(ways[done].values())
    total = sum(ways[completed].values())
    return {step: probability / total for step, probability in ways[completed].items()}


# ---- the observer --------------------------------------------------------------------------------


class Observer:
    """The filter. noise: what it believes the noise to be, by default what it is; infinite: it sees nothing."""

    def __init__(self, difficulty: str, noise: float | None = None):
        self.rules, self.hazard = DIFFICULTIES[difficulty], hazards()
        self.change = changes(self.rules)
        self.subspace = world_subspace()  # [R, D]
        self.clean = clean_frames(world_looks(), difficulty) @ self.subspace.T  # [tasks, L, R]
        self.noise = noise_scale(difficulty) if noise is None else noise
        self.look = np.array([situation.look for situation in SITUATIONS])  # [C]
        self.goes_on = np.array([situation.completed != ALL_DONE for situation in SITUATIONS])  # [C]
        wrong = [c for c, situation in enumerate(SITUATIONS) if situation.phase == "wrong"]
        self.wrong = np.array(wrong)
        self.recovered = np.array(
            [NUMBER[Situation(s.completed, s.step, "recovered")] for s in (SITUATIONS[c] for c in wrong)]
        )

    def beliefs(self, clip: Clip, embeddings: np.ndarray) -> Iterator[np.ndarray]:
        """The probability of every situation at each frame of the clip, [C]. embeddings: [F, 1, D]."""
        heard = {turn.end_frame - clip.start_frame for turn in clip.turns if turn.role == "user"}
        seen = embeddings[:, 0].astype(np.float32) @ self.subspace.T  # [F, R]
        [task] = [number for number, task in enumerate(TASKS) if task.goal == clip.goal]
        distances = ((seen[:, None] - self.clean[task]) ** 2).sum(-1) / (2 * self.noise**2)  # [F, L]
        likely = np.exp(distances.min(1, keepdims=True) - distances)[:, self.look]  # [F, C]
        p, begun = self.before(clip)  # [C, A]
        asked = np.zeros(len(SITUATIONS))  # the part of what may be true in which the user has just asked something
        for row in range(clip.num_frames):
            if row in heard:  # what happened a frame ago was the user's wish, or a question
                p = np.zeros_like(p)
                p[:, 0] = asked if begun else self.before(clip)[0][:, 0]
                begun = True
            if row and begun:
                p, asked = self.one_frame_later(p)
            p, asked = p * likely[row][:, None], asked * likely[row]
            total = p.sum() + asked.sum()
            p, asked = p / total, asked / total
            yield p.sum(1) + asked

    def before(self, clip: Clip) -> tuple[np.ndarray, bool]:
        """What may be true at first, [C, A] by frames since something happened; and whether work has begun."""
        p = np.zeros((len(SITUATIONS), GAP_MAX + 1))
        states = list(clip.initial_state.values())
        completed = sum(1 << step for step, state in enumerate(states) if state == "completed")
        if "in_progress" in states:
            p[NUMBER[Situation(completed, states.index("in_progress"), "under_way")], 0] = 1
        elif completed:
            for step, probability in last_done(completed, self.rules).items():
                p[NUMBER[Situation(completed, step, "done")], 0] = probability
        else:
            p[0, 0] = 1
        return p, bool(completed or "in_progress" in states)

    def one_frame_later(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[C, A] -> the same a frame later, and apart from it, [C], that the user has asked something at this frame."""
        hazard = np.where(self.goes_on[:, None], self.hazard[1:], 0.0)  # [C, A-1]
        event = (p[:, :-1] * hazard).sum(1)  # [C]
        later = np.zeros_like(p)
        later[:, 1:] = p[:, :-1] * (1 - hazard)
        later[:, -1] += p[:, -1]  # all is done: the age does not matter any more
        for age in RECOVERY:
            leaves = later[self.wrong, age] / (RECOVERY.stop - age)
            later[self.wrong, age] -= leaves
            later[self.recovered, age] += leaves
        later[:, 0] = (1 - QUESTION_PROBABILITY) * event @ self.change
        return later, QUESTION_PROBABILITY * event


# ---- what it does --------------------------------------------------------------------------------


def act(clip: Clip, beliefs: Iterator[np.ndarray], certainty: float) -> list[dict]:
    """The records of a clip by an observer who acts on what is true with at least this certainty."""
    task = next(task for task in TASKS if task.goal == clip.goal)
    states = sorted({situation.state for situation in SITUATIONS})
    of = np.array([states.index(situation.state) for situation in SITUATIONS])  # [C]
    wrong = np.array([situation.phase in ("wrong", "recovered") for situation in SITUATIONS])
    ids, told = list(clip.initial_state), tuple(clip.initial_state.values())
    asked = {turn.end_frame: turn.text for turn in clip.turns if turn.role == "user"}
    warned, records = None, []
    for frame, belief in enumerate(beliefs, clip.start_frame):
        by_state = np.bincount(of, belief, len(states))
        best = states[int(by_state.argmax())]
        moves, said = moves_between(told, best, ids), []
        update = moves if by_state.max() >= certainty else []
        if update:
            told = best
            if any(move.transition == "complete" for move in update):
                said.append(
                    SAY_NEXT[0].format(step=next_step(told, task)) if "not_started" in told else SAY_ALL_DONE[0]
                )
        if "in_progress" in told and (step := told.index("in_progress")) != warned:
            if belief[wrong & (of == states.index(told))].sum() >= certainty:
                warned = step
                said.append(SAY_CAREFUL.format(step=task.steps[step]))
        if frame in asked:
            if asked[frame].startswith("I want"):
                said.append(SAY_FIRST.format(step=task.steps[0]))
            elif "in_progress" in best:
                said.append(ANSWER_KEEP_GOING.format(step=task.steps[best.index("in_progress")]))
            else:
                said.append(ANSWER_NEXT[0].format(step=next_step(best, task)))
        record = FrameRecord(
            clip.id, frame, clip.seconds(frame), 0.5, 0.5, 0.5, 0.5, bool(said), bool(update), " ".join(said) or None,
            write_update(update, "arrow") if update else None, dict(zip(ids, told)),
        )  # fmt: skip
        records.append(record.to_dict())
    return records


def moves_between(told: tuple[str, ...], true: tuple[str, ...], ids: list[str]) -> list[Transition]:
    """The transitions that lead from one state to another; none where it has to be taken back what was told."""
    moves = []
    for id, before, after in zip(ids, told, true):
        path = STATES[STATES.index(before) : STATES.index(after) + 1]
        if not path:
            return []
        moves += [Transition(id, {"in_progress": "start", "completed": "complete"}[state]) for state in path[1:]]
    return sorted(moves, key=lambda move: move.transition)  # a step is completed before another is started


def next_step(state: tuple[str, ...], task: Task) -> str:
    return task.steps[state.index("not_started")]


# ---- the table -----------------------------------------------------------------------------------


def measured(watched: list[tuple[Clip, list[np.ndarray]]], certainty: float) -> dict[str, float]:
    """All numbers of benchmarks/ablation.py for an observer who acts with this certainty."""
    similarity, scores, counts = load_similarity("lexical"), [], []
    for clip, beliefs in watched:
        records = act(clip, beliefs, certainty)
        scores.append(score_clip(clip, records, similarity, True))
        counts.append(next_steps(clip, records))
    right, said = (sum(column) for column in zip(*counts))
    return decision_numbers(scores) | {"next_step": ratio(right, said)}


def watch(difficulty: str, seed: int, clips: int, observer: Observer) -> list[tuple[Clip, list[np.ndarray]]]:
    clean, watched = clean_frames(world_looks(), difficulty), []
    for index, (raw, embeddings) in enumerate(make_clips("val", clips, seed, difficulty, clean)):
        clip, _ = parse_clip(raw, "val.json", index)
        watched.append((clip, list(observer.beliefs(clip, embeddings[:, None]))))
    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--difficulties", nargs="+", default=["long", "hard"], choices=list(DIFFICULTIES))
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1000, help="of the corpus that is scored")
    arguments = parser.parse_args()
    print("| ideal observer | certainty | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|---:|" + "---:|" * len(COLUMNS))
    for difficulty in arguments.difficulties:
        observer = Observer(difficulty)
        tuned_on = watch(difficulty, 0, arguments.clips, observer)
        certainty = max(CERTAINTIES, key=lambda certainty: combined_score(measured(tuned_on, certainty)))
        numbers = measured(watch(difficulty, arguments.seed, arguments.clips, observer), certainty)
        cells = [f"{numbers[column]:.3f}" for column in COLUMNS]
        print(f"| {difficulty} | {certainty:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
