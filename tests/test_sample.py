"""The generated corpus obeys the rules it was made by: every clip is replayed here from its files alone.

The replay knows the rules as sentences (who may begin which step, what is said then, what is seen from which frame on)
and reads what is seen off the frames themselves, by their nearest look.
"""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from prospect import sample
from prospect.errors import ProspectError
from prospect.sample import write_sample
from prospect.score import named_step, says_the_same

ROOT = Path(__file__).resolve().parent.parent

# The nineteen looks of a task, as numbers: idle 0, then six under way, six done, six going wrong.
IDLE, UNDER_WAY, DONE, WRONG = 0, 1, 7, 13

TASK_OF_GOAL = {"Assembling a Toy Truck": 0, "Making a Pot of Coffee": 1, "Repotting a Plant": 2}


@dataclass
class Corpus:
    path: Path
    difficulty: str

    def __post_init__(self):
        self.clean = sample.clean_frames(sample.world_looks(), self.difficulty)  # [tasks, L, D]

    def clips(self, split: str) -> list[dict]:
        return json.loads((self.path / f"{split}.json").read_text(encoding="utf-8"))

    def frames(self, clip: dict) -> np.ndarray:
        return pickle.loads((self.path / "embeddings" / f"{clip['video_uid']}_0_embeddings.pkl").read_bytes())

    def seen(self, clip: dict) -> np.ndarray:
        """The nearest of its task's looks on each row, [F]."""
        clean = self.clean[TASK_OF_GOAL[clip["inferred_goal"]]]
        frames = self.frames(clip).astype(np.float32)
        return (frames @ clean.T - (clean**2).sum(1) / 2).argmax(1)


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpora") / "easy"
    write_sample(path, seed=0, difficulty="easy", clips=60, val_clips=12)
    return Corpus(path, "easy")


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpora") / "hard"
    write_sample(path, seed=0, difficulty="hard", clips=12, val_clips=1)
    return Corpus(path, "hard")


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpora") / "long"
    write_sample(path, seed=0, difficulty="long", clips=12, val_clips=1)
    return Corpus(path, "long")


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpora") / "other"
    write_sample(path, seed=1, difficulty="easy", clips=12, val_clips=2)
    return Corpus(path, "easy")


@dataclass
class Facts:
    """What a replay counted on its way."""

    suggestions: list[tuple[int, int]] = field(default_factory=list)  # (step just completed, step named), from 0
    obeyed: list[bool] = field(default_factory=list)  # for each step begun, where there was a choice
    kinds: list[str] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)


def states_of(turn: dict) -> list[str]:
    assert list(turn["dst_state"]) == ["S1", "S2", "S3", "S4", "S5", "S6"]
    return list(turn["dst_state"].values())


def replay(clip: dict, seen: np.ndarray, facts: Facts, whole: bool = False) -> None:
    """Assert every rule on one clip, whose rows show the looks `seen` [F]."""
    choices = 6 if whole else 2  # of how many open steps, from the lowest on, the person chooses
    first, last, names = clip["start_frame_idx"], clip["end_frame_idx"], [step["name"] for step in clip["dst"]]
    assert (clip["fps"], clip["dataset"], clip["clip_idx"]) == (2, "sample", 0) and "initial_dst_state" not in clip
    assert 50 <= first <= 3000 and 100 <= last - first + 1 == len(seen)
    assert whole or last - first + 1 <= 400
    assert [step["id"] for step in clip["dst"]] == ["S1", "S2", "S3", "S4", "S5", "S6"]
    recipe = clip["inferred_knowledge"].split("\n")
    assert recipe[0] == clip["inferred_goal"] and len(recipe) == 7
    for number, (line, name) in enumerate(zip(recipe[1:], names), 1):
        assert line.lower() == f"{number}. {name}."

    system, *turns = clip["conversation"]
    assert (system["role"], system["start_frame"], system["end_frame"]) == ("system", 0, 1) and "time" not in system
    moments: dict[int, list[dict]] = {}
    for turn in turns:
        centre = turn["start_frame"] + 1
        assert turn["time"] * 2 == centre and turn["end_frame"] == centre + 1
        assert turn["start_frame"] >= first and turn["end_frame"] <= last and turn["labels"]
        moments.setdefault(centre, []).append(turn)
    centres = list(moments)
    assert centres == sorted(centres) and centres
    facts.gaps += [int(gap) for gap in np.diff(centres)]

    # Where the clip begins: the first turn's snapshot is the state before anything happens in it.
    state = states_of(turns[0])
    begins_at_start = state == ["not_started"] * 6
    assert begins_at_start or not whole
    for step, word in zip(clip["dst"], state):
        assert (step["start_ts"] < first / 2) == (word != "not_started")
        assert (step["end_ts"] < first / 2) == (word == "completed")
        assert 0 < step["start_ts"] < step["end_ts"]
    order = sorted((step["end_ts"], number) for number, step in enumerate(clip["dst"]) if state[number] == "completed")
    done = []
    for _, number in order:
        assert number in [n for n in range(6) if n not in done][:choices]
        done.append(number)
    if "in_progress" in state:
        under_way = state.index("in_progress")
        assert under_way in [n for n in range(6) if n not in done][:choices]
        look = UNDER_WAY + under_way
    else:
        look = DONE + done[-1] if done else IDLE
    assert (seen[: centres[0] - first] == look).all()

    for centre, following in zip(centres, centres[1:] + [last + 1]):
        group, row = moments[centre], centre - first
        roles = [turn["role"] for turn in group]
        reply = group[-1]["content"]
        open_steps = [n for n in range(6) if n not in done]
        wrong_rows = 0
        assert states_of(group[0]) == state
        if roles == ["user", "assistant"]:
            assert states_of(group[1]) == state
            if centre == centres[0] and begins_at_start:
                kind = "open"
                assert group[0]["content"].startswith("I want to ") and row < 15
                assert named_step(reply, names) == 0
            else:
                kind = "question"
                assert group[0]["content"].endswith("?")
                expected = state.index("in_progress") if "in_progress" in state else open_steps[0]
                assert named_step(reply, names) == expected
                assert reply.startswith("Keep going: ") == ("in_progress" in state)
        elif roles == ["assistant"]:
            kind, wrong = "mistake", state.index("in_progress")
            assert reply.startswith("Careful, ") and named_step(reply, names) == wrong
            shown = seen[row : following - first]
            wrong_rows = int((shown == WRONG + wrong).argmin()) or len(shown)
            assert 4 <= wrong_rows <= 8 or wrong_rows == len(shown) < 8
            assert (shown[:wrong_rows] == WRONG + wrong).all()
            look = UNDER_WAY + wrong
        else:
            [transition] = group[0]["content"]
            step = int(transition["id"][1]) - 1
            kind = transition["transition"]
            if kind == "start":
                assert roles == ["DST_UPDATE"] and state[step] == "not_started" and "in_progress" not in state
                assert step in open_steps[:choices] and clip["dst"][step]["start_ts"] == group[0]["time"]
                if len(open_steps) > 1:
                    facts.obeyed.append(step == open_steps[0])
                state[step], look = "in_progress", UNDER_WAY + step
            else:
                assert kind == "complete" and roles == ["DST_UPDATE", "assistant"] and state[step] == "in_progress"
                assert clip["dst"][step]["end_ts"] == group[0]["time"]
                state[step], look = "completed", DONE + step
                done.append(step)
                assert states_of(group[1]) == state
                if len(done) == 6:
                    assert named_step(reply, names) is None and reply.startswith("All done.")
                else:
                    assert named_step(reply, names) == min(set(range(6)) - set(done))
                    facts.suggestions.append((step, named_step(reply, names)))
        facts.kinds.append(kind)
        # The look is the old one up to the frame before, and the new one from the very frame on.
        assert (seen[row + wrong_rows : following - first] == look).all()
    assert state == ["completed"] * 6 or not whole
    for step, word in zip(clip["dst"], state):
        assert (step["start_ts"] > last / 2) == (word == "not_started")
        assert (step["end_ts"] > last / 2) == (word != "completed")


def test_every_clip_replays_by_the_rules(easy, other_seed):
    facts = Facts()
    for corpus in (easy, other_seed):  # one world: the looks of this package decode any seed, and both splits
        for split in ("train", "val"):
            for clip in corpus.clips(split):
                replay(clip, corpus.seen(clip), facts)
    assert 15 <= min(facts.gaps) and max(facts.gaps) <= 60 and 26 <= np.mean(facts.gaps) <= 33
    assert {"open", "question", "mistake", "start", "complete"} == set(facts.kinds)
    assert 0.35 <= facts.kinds.count("open") / 86 <= 0.65  # of 60 + 12 + 12 + 2 clips; the others begin mid-task
    assert 0.55 <= np.mean(facts.obeyed) <= 0.75
    # Naming the step after the one just completed, without keeping the state, is wrong again and again.
    assert np.mean([named != completed + 1 for completed, named in facts.suggestions]) >= 0.2


def test_frames_are_of_order_one_half_precision_and_as_many_as_the_clip_says(easy):
    for clip in easy.clips("val"):
        frames = easy.frames(clip)
        assert frames.dtype == np.float16
        assert frames.shape == (clip["end_frame_idx"] - clip["start_frame_idx"] + 1, 2048)
        assert 0.85 < frames.astype(np.float32).std() < 1.15


def test_every_long_clip_is_a_whole_task_done_in_any_order(long):
    facts, lengths = Facts(), []
    for clip in long.clips("train"):
        replay(clip, long.seen(clip), facts, whole=True)
        lengths.append(clip["end_frame_idx"] - clip["start_frame_idx"] + 1)
    assert facts.kinds.count("open") == 12 and facts.kinds.count("complete") == 12 * 6
    assert 450 <= np.mean(lengths) <= 560
    # Of 60 choices half are as told; and more often than not the next step is not the one after the one just completed.
    assert 0.35 <= np.mean(facts.obeyed) <= 0.65
    assert np.mean([named != completed + 1 for completed, named in facts.suggestions]) >= 0.4


def test_some_frames_of_the_hard_world_mislead(long, hard):
    right, rows = 0, 0
    for clip, twin in zip(hard.clips("train"), long.clips("train")):  # the same stories under other noise
        assert clip["conversation"] == twin["conversation"] and clip["dst"] == twin["dst"]
        truth = long.seen(twin)  # proved right on every frame by the replay
        right, rows = right + (hard.seen(clip) == truth).sum(), rows + len(truth)
    assert 0.92 <= right / rows <= 0.96


def test_replies_are_short_and_of_few_words(easy):
    replies = [
        turn["content"] for clip in easy.clips("train") for turn in clip["conversation"] if turn["role"] == "assistant"
    ]
    assert np.mean([len(reply.split()) for reply in replies]) < 12
    assert len({word for reply in replies for word in reply.split()}) < 150


def test_no_step_name_stands_inside_another():
    for task in sample.TASKS:
        assert len(task.steps) == 6
        for a, name in enumerate(task.steps):
            assert named_step(f"Next, {name}.", list(task.steps)) == a
        firsts = [name.split()[0] for name in task.steps]
        assert len(set(firsts)) == 6  # no two begin with the same verb


def test_named_step():
    names = ["boil the water", "grind the beans"]
    assert named_step("Next, grind the beans.", names) == 1
    assert named_step("Boil The Water now!", names) == 0
    assert named_step("All done.", names) is None
    assert named_step("grind the beans, then boil the water", names) is None


def test_replies_that_say_the_same():
    names = ["boil the water", "grind the beans"]
    assert says_the_same("Now grind the beans.", "Well done. Next, grind the beans.", names)
    assert not says_the_same("Next, boil the water.", "Next, grind the beans.", names)
    assert not says_the_same("Grind the beans, then boil the water.", "Next, grind the beans.", names)
    assert says_the_same("All done. Good job!", "All done. Well done!", names)
    for empty in ("", "All good.", "boil the water, grind the beans"):  # none of them says that all is done
        assert not says_the_same(empty, "All done. Well done!", names)


def events_matched(predicted: list[int], reference: list[int], within: int) -> int:
    """The most pairs, one to one, no further apart than `within`: both lists sorted, so greedily."""
    matched, i, j = 0, 0, 0
    while i < len(predicted) and j < len(reference):
        if abs(predicted[i] - reference[j]) <= within:
            matched, i, j = matched + 1, i + 1, j + 1
        elif predicted[i] < reference[j]:
            i += 1
        else:
            j += 1
    return matched


@pytest.mark.parametrize("roles", [{"assistant"}, {"DST_UPDATE"}, {"assistant", "DST_UPDATE"}])
def test_firing_at_random_at_the_true_rate_scores_low(easy, roles):
    rng = np.random.default_rng(7)
    matched = predictions = references = 0
    for clip in easy.clips("train"):
        reference = sorted({turn["start_frame"] + 1 for turn in clip["conversation"] if turn["role"] in roles})
        rows = np.arange(clip["start_frame_idx"], clip["end_frame_idx"] + 1)
        predicted = sorted(int(r) for r in rng.choice(rows, size=len(reference), replace=False))
        matched += events_matched(predicted, reference, within=2)
        predictions, references = predictions + len(predicted), references + len(reference)
    assert 2 * matched / (predictions + references) < 0.25


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_same_seed_same_bytes_other_seed_other_clips(easy, other_seed, tmp_path):
    for name in ("one", "two"):
        write_sample(tmp_path / name, seed=3, difficulty="easy", clips=3, val_clips=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 2 + 4
    stories = [
        json.dumps(clip["conversation"])
        for corpus in (easy, other_seed)
        for split in ("train", "val")
        for clip in corpus.clips(split)
    ]
    assert len(set(stories)) == len(stories) == 86  # neither seeds nor splits share a clip


def test_a_clip_does_not_depend_on_how_many_there_are(easy, tmp_path):
    write_sample(tmp_path / "few", seed=0, difficulty="easy", clips=4, val_clips=2)
    few = Corpus(tmp_path / "few", "easy")
    for split, count in (("train", 4), ("val", 2)):
        assert few.clips(split) == easy.clips(split)[:count]
        assert np.array_equal(few.frames(few.clips(split)[-1]), easy.frames(easy.clips(split)[count - 1]))
    assert few.clips("train")[3]["video_uid"] == "sample-easy-seed0-train-00003"


def test_in_quiet_hours_nothing_happens(tmp_path):
    sample.write_quiet(tmp_path / "quiet", seed=1, difficulty="hard", hours=0.4)
    made = json.loads((tmp_path / "quiet" / "quiet.json").read_text())
    assert len(made) == 3 and len(contents(tmp_path / "quiet")) == 1 + 3  # 24 minutes are three clips of ten
    looks, noise = sample.clean_frames(sample.world_looks(), "hard"), sample.noise_scale("hard")
    goals = [task.goal for task in sample.TASKS]
    for clip in made:
        assert [turn["role"] for turn in clip["conversation"]] == ["system"]
        frames = Corpus(tmp_path / "quiet", "hard").frames(clip)
        assert len(frames) == 1200 == clip["end_frame_idx"] - clip["start_frame_idx"] + 1
        mean = frames.astype(np.float32).mean(0)  # one look, and noise that cancels out
        away = np.linalg.norm(looks[goals.index(clip["inferred_goal"])] - mean, axis=1)
        assert np.sort(away)[0] < 2 * noise * np.sqrt(sample.R / 1200) < np.sort(away)[1] / 3
    begun = {step["id"] for clip in made for step in clip["dst"] if step["start_ts"] < clip["start_frame_idx"] / 2}
    assert begun  # somewhere in a task
    with pytest.raises(ProspectError, match="0 hours of quiet"):
        sample.write_quiet(tmp_path / "none", seed=1, difficulty="hard", hours=0)


def test_a_corpus_is_whole_or_absent(tmp_path, monkeypatch):
    draw, drawn = sample.draw, []

    def stop_at_the_third(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(sample, "draw", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "corpus", seed=0, difficulty="easy", clips=5, val_clips=1)
    assert list(tmp_path.iterdir()) == []  # neither the corpus nor what was written aside


def test_what_a_user_can_get_wrong(tmp_path):
    with pytest.raises(ProspectError, match="unknown difficulty 'medium'"):
        write_sample(tmp_path / "a", seed=0, difficulty="medium")
    with pytest.raises(ProspectError, match="seed -1 is negative"):
        write_sample(tmp_path / "a", seed=-1, difficulty="easy")
    with pytest.raises(ProspectError, match="0 training"):
        write_sample(tmp_path / "a", seed=0, difficulty="easy", clips=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ProspectError, match="not overwritten"):
        write_sample(tmp_path / "mine", seed=0, difficulty="easy", clips=1, val_clips=1)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(ProspectError, match="cannot be written"):
        write_sample(tmp_path / "mine" / "notes.txt" / "corpus", seed=0, difficulty="easy", clips=1, val_clips=1)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "prospect.sample",
        "--out",
        str(tmp_path / "c"),
        "--seed",
        "2",
        "--difficulty",
        "hard",
        "--clips",
        "2",
        "--val-clips",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["sample-hard-seed2-train-00000", "sample-hard-seed2-train-00001", "sample-hard-seed2-val-00000"]
    assert sorted(contents(tmp_path / "c")) == [
        *(f"embeddings/{n}_0_embeddings.pkl" for n in names),
        "train.json",
        "val.json",
    ]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()) == 1 and "not overwritten" in again.stderr
