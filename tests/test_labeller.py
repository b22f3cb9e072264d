"""Labels and text places against an independent labeller: slow plain Python, written from the contract alone.

The contract, for a reply or an update whose turn is the frames a..b:

    * its text may stand behind a frame from the middle of a..b on (text_at: last or range: behind b alone), but not
      before a user's text in a..b, not before or with a text that is due earlier, and not outside the part of the
      window (repeated or learned) in which b is; turns that end together stand together
    * its head learns 1 from the first frame behind which the text may stand to the one behind which it does, and 0 on
      the other frames of a..b; text_at: range, kept for comparison, is 1 on all of a..b from a user's text on (of the
      frames common to what ends together)
    * a head learns 0 on frames of the other's turns; both learn 0, or nothing, on frames without a turn
    * the state counts from the text
    * a clip longer than max_seq_len becomes windows, each as long as can be; each but the first begins with the longest
      tail of the one before that has at most the share `overlap` of its tokens, less where the next frame with its
      texts would not fit
    * silence_lm: behind a frame at which both heads learn 0, the end token is learned; one more closes the sequence

What the product wrote is read back from the tokens of its samples: no function of prospect/sequence.py says here what
is expected of another. A token is a byte, but for the control tokens, so the length of every text is counted by hand.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import (
    BEGIN,
    END_HEADER,
    EOS,
    EOT,
    IM_END,
    IM_START,
    IMAGE,
    START_HEADER,
    SYSTEM,
    raw_clip,
    read,
    samples_of,
)

from prospect import sequence
from prospect.config import HybridConfig
from prospect.errors import ProspectError
from prospect.tokenizer import Tokenizer

NO = -100
HEADS = {"assistant": "speaking_gen_labels", "DST_UPDATE": "dst_gen_labels"}  # who has a head: the labels of its text
DECISIONS = ("speaking_labels", "dst_update_labels", "dst_state_labels")
TEXT_AT = ("drawn", "last", "range")

# ---- what a sample says --------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """How a sample is written: settings of DataConfig, and the <image> tokens of a frame."""

    template: str = "plain"
    dst_format: str = "arrow"
    per_frame: int = 1
    silence_lm: bool = False
    recipe: bool = False

    def header(self, role: str) -> list[int]:
        if self.template == "chatml":
            return [IM_START, *f"{role}\n".encode()]
        if self.template == "llama3":
            return [START_HEADER, *role.encode(), END_HEADER, *b"\n\n"]
        return [*("[DST_UPDATE] " if role == "DST_UPDATE" else f"{role.capitalize()}: ").encode()]

    @property
    def end(self) -> int:
        return {"plain": EOS, "chatml": IM_END, "llama3": EOT}[self.template]

    @property
    def after(self) -> list[int]:
        return [*b"\n"] if self.template == "chatml" else []

    @property
    def begin(self) -> list[int]:
        return [BEGIN] if self.template == "llama3" else []

    def length(self, role: str, text: str) -> int:
        """Tokens of a turn."""
        if role == "DST_UPDATE" and self.dst_format == "json":
            moves = [move.split("->") for move in text.split(", ")]
            text = json.dumps([{"id": step, "transition": move} for step, move in moves])
        return len(self.header(role)) + len(text.encode()) + 1 + len(self.after)

    def prompt_length(self, state: dict[str, str], dst: bool) -> int:
        """Tokens of the prompt, and of the end token that silence_lm puts behind everything."""
        return len(self.begin) + self.length("system", self.prompt(state, dst)) + int(self.silence_lm)

    def prompt(self, state: dict[str, str], dst: bool) -> str:
        steps = [f"{step} {name} [{state[step]}]" for step, name in zip(state, ("one", "two", "three", "four"))]
        return "\n".join([SYSTEM, *(steps if dst else []), *([RECIPE] if self.recipe else [])])


RECIPE = "Erst 積木 one, then two."
PLAIN = Script()


@dataclass
class Shown:
    """One frame of a sample, or one text: what it is and the labels on its tokens."""

    kind: str  # frame, user, assistant or DST_UPDATE
    frame: int = -1
    text: str = ""
    learned: bool = False  # a text, token by token
    speaking: int = NO
    dst: int = NO
    state: int = NO


def entries_of(sample, script: Script = PLAIN) -> tuple[str, list[Shown]]:
    """A sample read back from its tokens: its prompt, and its frames and texts in order."""
    ids, labels = sample.input_ids.tolist(), {key: value.tolist() for key, value in sample.labels.items()}
    rows = iter(sample.image_embeds.astype(int).tolist())
    assert ids[: len(script.begin)] == script.begin
    at = len(script.begin)
    closed = len(ids) - int(script.silence_lm)
    assert ids[closed:] == [script.end] * int(script.silence_lm)
    if script.silence_lm:
        take_silence(sample, labels, script.end)
    entries = []
    while at < closed:
        if ids[at] == IMAGE:
            begin, at = at, at + script.per_frame
            shown = [next(rows) for _ in range(script.per_frame)]
            assert ids[begin:at] == [IMAGE] * script.per_frame
            assert shown == [[shown[0][0], number] for number in range(script.per_frame)]
            entries.append(Shown("frame", shown[0][0], "", False, *[labels[key][at - 1] for key in DECISIONS]))
            nothing = [*range(begin, at - 1)]  # it is decided at its last <image>
        else:
            kinds = [kind for kind in ("system", "user", "assistant", "DST_UPDATE")
                     if ids[at : at + len(script.header(kind))] == script.header(kind)]  # fmt: skip
            [kind], begin, end = kinds, at, ids.index(script.end, at)
            text = bytes(ids[begin + len(script.header(kind)) : end]).decode()
            if kind == "DST_UPDATE" and script.dst_format == "json":
                text = ", ".join(f"{move['id']}->{move['transition']}" for move in json.loads(text))
            at = end + 1 + len(script.after)
            assert ids[end + 1 : at] == script.after
            learned = [key for key in HEADS.values() if labels[key][begin : end + 1] != [NO] * (end + 1 - begin)]
            assert learned in ([], [HEADS.get(kind)])
            assert all(labels[key][begin : end + 1] == ids[begin : end + 1] for key in learned)
            entries.append(Shown(kind, text=text, learned=bool(learned)))
            assert all(labels[key][t] == NO for key in DECISIONS for t in range(begin, end + 1))
            nothing = [*range(end + 1, at)]
        assert all(values[t] == NO for values in labels.values() for t in nothing)
    assert at == closed and next(rows, None) is None and entries[0].kind == "system"
    return entries[0].text, entries[1:]


def take_silence(sample, labels: dict[str, list[int]], end: int) -> None:
    """Check the end token behind every frame at which all heads learn 0, and take these labels away."""
    ids, generation = sample.input_ids.tolist(), labels["speaking_gen_labels"]
    two_heads = any(label != NO for label in labels["dst_update_labels"])
    for at, id in enumerate(ids):
        if id == IMAGE and labels["speaking_labels"][at] == 0 and labels["dst_update_labels"][at] in (0, NO):
            assert labels["dst_update_labels"][at] == 0 or not two_heads
            assert generation[at + 1] == end
            generation[at + 1] = NO
    assert generation[-1] == NO


def prompt_state(prompt: str) -> dict[str, str]:
    return dict(re.findall(r"^(S\d) \w+ \[(\w+)\]$", prompt, re.MULTILINE))


def behind(entries: list[Shown]) -> dict[int, list[Shown]]:
    """The replies and updates behind each frame of a stream."""
    found, frame = defaultdict(list), None
    for entry in entries:
        frame = entry.frame if entry.kind == "frame" else frame
        if entry.kind in HEADS:
            found[frame].append(entry)
    return found


def in_front(entries: list[Shown]) -> dict[int, list[str]]:
    """What the user says right before each frame of a stream."""
    found, heard = {}, []
    for entry in entries:
        if entry.kind == "user":
            heard.append(entry.text)
        else:
            assert entry.kind == "frame" or not heard  # nothing comes between
            found |= {entry.frame: heard} if heard else {}
            heard = []
    assert not heard
    return found


# ---- the labeller --------------------------------------------------------------------------------


def due(turns: list[tuple]) -> dict[int, list[tuple]]:
    """The replies and updates by last frame, in time order: each list is said together."""
    ends = sorted({last for role, _, _, last in turns if role in HEADS})
    return {end: [turn for turn in turns if turn[0] in HEADS and turn[3] == end] for end in ends}


def windows_by_hand(
    turns: list[tuple], begun: str | None, shown: list[int], script: Script, limit: int, overlap: float, dst: bool
) -> list[tuple[int, int, int]]:
    """The windows of these frames: (first shown, first learned, one past the last), each an index into `shown`.

    Lengths are those with every text at its turn's end: what is drawn changes no window.
    """
    tokens = [script.per_frame for _ in shown]
    for role, text, _, last in turns:
        if role == "user":
            tokens[shown.index(last)] += script.length(role, text)
    for last, said in due(turns).items():
        tokens[shown.index(last)] += sum(script.length(role, text) for role, text in texts_due(said))

    def prompt(first: int) -> int:
        updates = [text for role, text, _, last in by_end(turns) if role == "DST_UPDATE" and last < shown[first]]
        return script.prompt_length(states_after(begun, updates), dst)

    windows, first, learn = [], 0, 0
    while learn < len(shown):
        while first < learn and prompt(first) + sum(tokens[first : learn + 1]) > limit:
            first += 1
        end = learn + 1
        while end < len(shown) and prompt(first) + sum(tokens[first : end + 1]) <= limit:
            end += 1
        windows.append((first, learn, end))
        share, begin = overlap * sum(tokens[first:end]), end
        while begin > first and sum(tokens[begin - 1 : end]) <= share:
            begin -= 1
        first, learn = begin, end
    return windows


def texts_due(turns: list[tuple]) -> list[tuple[str, str]]:
    """What is said for turns that end together: one update, then one reply."""
    updates = [content for role, content, _, _ in turns if role == "DST_UPDATE"]
    replies = [content for role, content, _, _ in turns if role == "assistant"]
    return [("DST_UPDATE", ", ".join(updates))] * bool(updates) + [("assistant", " ".join(replies))] * bool(replies)


def answers(turns: list[tuple], first: int, last: int, frame: int) -> bool:
    """Whether the turn of first..last answers a user's text that at `frame` is still to come."""
    return any(role == "user" and first <= heard <= last and frame < heard for role, _, _, heard in turns)


def may_stand(turns: list[tuple], end: int, frame: int, text_at: str) -> bool:
    """Whether the text of what is due at `end` may stand behind `frame`, as far as the conversation says."""
    if frame == end:
        return True
    if frame > end or text_at != "drawn":
        return False
    for _, _, first, last in due(turns)[end]:
        if frame - first < last - frame:  # before the middle
            return False
        if answers(turns, first, last, frame):
            return False
    return not any(frame <= earlier < end for earlier in due(turns))


def places_allowed(turns: list[tuple], end: int, part: list[int], text_at: str) -> list[int]:
    """The frames behind which it may stand. part: the frames shown in its part of the window, which includes `end`."""
    assert end in part
    return [frame for frame in part if may_stand(turns, end, frame, text_at)]


def label_by_hand(turns: list[tuple], frame: int, role: str, allowed: dict, at: dict, text_at: str) -> int | None:
    """The decision of a role's head at a frame; None: a frame without any turn. allowed, at: by end, of this window."""
    if not any(kind in HEADS and first <= frame <= last for kind, _, first, last in turns):
        return None
    for kind, _, first, last in turns:
        if kind != role or not first <= frame <= last:
            continue
        if text_at == "range":
            if all(frame >= begin and not answers(turns, begin, last, frame) for _, _, begin, _ in due(turns)[last]):
                return 1
        elif frame in allowed.get(last, ()) and frame <= at[last]:
            return 1
    return 0


def by_end(turns: list[tuple]) -> list[tuple]:
    return sorted(turns, key=lambda turn: turn[3])


def states_after(begun: str | None, updates: list[str]) -> dict[str, str]:
    """The state of every step after these updates, each of which must be legal; begun: the step under way before."""
    state = dict.fromkeys(("S1", "S2", "S3", "S4"), "not_started") | ({begun: "in_progress"} if begun else {})
    for move in [move for update in updates for move in update.split(", ")]:
        step, what = move.split("->")
        assert state[step] == {"start": "not_started", "complete": "in_progress"}[what]
        state[step] = {"start": "in_progress", "complete": "completed"}[what]
    return state


def state_by_hand(turns: list[tuple], frame: int, at: dict[int, int], begun: str | None) -> int:
    """0, 1 or 2: the state of the most recently started step at a frame; begun: the step under way in the beginning."""
    step, state = begun, 1 if begun else 0
    for role, content, _, last in by_end(turns):
        if role == "DST_UPDATE" and at.get(last, last) <= frame:
            for move in content.split(", "):
                name, what = move.split("->")
                if what == "start":
                    step, state = name, 1
                elif name == step:
                    state = 2
    return state


# ---- clips ---------------------------------------------------------------------------------------


def random_turns(
    draw: np.random.Generator, start: int, frames: int, longest: int = 12
) -> tuple[list[tuple], str | None]:
    """Turns in any order, overlapping, nested, touching and sharing ranges; updates legal in the order they are due."""
    ranges = []
    for _ in range(int(draw.integers(1, 9))):
        first = start + int(draw.integers(0, frames))
        last = min(first + int(draw.integers(0, longest)), start + frames - 1)
        if ranges and draw.random() < 0.5:  # like real clips: one again, one that ends with it, or one that touches it
            a, b = ranges[int(draw.integers(len(ranges)))]
            first, last = [(a, b), (min(a + 1, b), b), (min(b + 1, start + frames - 1),) * 2][int(draw.integers(3))]
        ranges.append((first, last))
    roles = draw.choice(["user", "assistant", "DST_UPDATE"], size=len(ranges), p=[0.25, 0.4, 0.35]).tolist()
    turns = [[role, f"#{n}{('', ' 積木', ' 😀!')[n % 3]}", *ranges[n]] for n, role in enumerate(roles)]
    moves = [f"S{step}->{move}" for step in range(1, 5) for move in ("start", "complete")]
    begun = "S1" if draw.random() < 0.3 else None
    moves = moves[1:] if begun else moves
    for turn in by_end(turns):
        if turn[0] == "DST_UPDATE":
            turn[1] = moves.pop(0) if moves else None
    turns = [tuple(turn) for turn in turns if turn[1] is not None]
    completed = any(content == "S1->complete" for _, content, _, _ in turns)
    return turns, begun if completed else None


def random_case(case: int):
    draw = np.random.default_rng([15, case])
    start, frames = int(draw.integers(0, 300)), int(draw.integers(6, 60))
    turns, begun = random_turns(draw, start, frames)
    clip = read(raw_clip(turns, start, start + frames - 1, id=f"clip{case}", steps=4, inferred_knowledge=RECIPE))
    return draw, turns, begun, clip


def tight_windows(clip, plain, options: dict) -> dict:
    """The options with the smallest max_seq_len, in steps, in which every text fits: as many windows as can be."""
    for limit in range(150, 2000, 17):
        try:
            samples_of(clip, plain, max_seq_len=limit, **options)
            return options | {"max_seq_len": limit}
        except ProspectError:
            continue
    raise AssertionError("nothing fits")


# ---- the comparison ------------------------------------------------------------------------------


def compare_stream(
    turns: list[tuple],
    begun: str | None,
    samples: list,
    text_at: str,
    rate: float,
    dst: bool = True,
    gaps: bool = False,
    script: Script = PLAIN,
    limit: int = 100_000,
    overlap: float | None = None,
) -> list[dict]:
    """Hold every sample of a clip against the labeller; for each sample where each text stands and where it may.

    overlap None: what of the clip is in which window is not asked.
    """
    turns = turns if dst else [turn for turn in turns if turn[0] != "DST_UPDATE"]
    report, learned_until = [], -1
    read_back = [entries_of(sample, script) for sample in samples]
    assert all(len(sample.input_ids) <= limit for sample in samples)
    if overlap is not None:
        frames = [[entry.frame for entry in entries if entry.kind == "frame"] for _, entries in read_back]
        all_shown = sorted({frame for shown in frames for frame in shown})
        planned = windows_by_hand(turns, begun, all_shown, script, limit, overlap, dst)
        assert frames == [all_shown[first:end] for first, _, end in planned]
    for prompt, entries in read_back:
        shown = [entry.frame for entry in entries if entry.kind == "frame"]
        repeated = [frame for frame in shown if frame <= learned_until]
        learned = [frame for frame in shown if frame > learned_until]
        texts = behind(entries)

        # The state in the prompt is that before the first frame.
        before = [content for role, content, _, last in by_end(turns) if role == "DST_UPDATE" and last < shown[0]]
        assert prompt == script.prompt(states_after(begun, before), dst)

        # Where the texts stand: each of what is due in this window once, in its part, in order; nothing else.
        at, allowed = {}, {}
        for end, said in due(turns).items():
            if end not in shown:
                assert gaps or not shown[0] <= end <= shown[-1]
                continue
            part = repeated if end in repeated else learned
            if gaps:  # of truncation: the unbroken stretch of frames in which its last one is
                part = [frame for frame in part if all(f in part for f in range(frame, end))]
            allowed[end] = places_allowed(turns, end, part, text_at)
            expected = texts_due(said)
            found = [frame for frame in texts if [(t.kind, t.text) for t in texts[frame]] == expected]
            assert len(found) == 1 and found[0] in allowed[end], (end, allowed[end], found)
            at[end] = found[0]
            assert all(text.learned == (end in learned) for text in texts[found[0]])
        assert sorted(at.values()) == sorted(texts) == list(at.values())

        asked = {frame: [turn[1] for turn in turns if turn[0] == "user" and turn[3] == frame] for frame in shown}
        assert in_front(entries) == {frame: said for frame, said in asked.items() if said}

        # What the frames are labelled.
        for entry in entries:
            if entry.kind != "frame":
                continue
            expected = [label_by_hand(turns, entry.frame, role, allowed, at, text_at) for role in HEADS]
            state = state_by_hand(turns, entry.frame, at, begun)
            if entry.frame in repeated:
                expected, state = [NO, NO], NO
            elif expected == [None, None]:
                assert rate == 0.5 or entry.speaking == (0 if rate == 1 else NO)
                expected = [entry.speaking] * 2
                assert entry.speaking in (0, NO)
            if not dst:
                expected[1] = state = NO
            assert [entry.speaking, entry.dst, entry.state] == [*expected, state], (entry.frame, at, allowed)
        learned_until = shown[-1]
        report.append({"at": at, "allowed": {end: allowed[end] for end in at}, "entries": entries})
    return report


def compare_one(case: int, tokenizers: dict[str, Tokenizer]) -> None:
    draw, turns, begun, clip = random_case(case)
    options = {
        "rate": float(draw.choice([0.0, 0.5, 1.0])),
        "text_at": TEXT_AT[case % 3] if draw.random() < 0.5 else "drawn",
        "frames": str(draw.choice(["all", "all", "turns", "hybrid"])),
        "hybrid": HybridConfig(max_frames_per_clip=int(draw.integers(3, 40))),
        "overlap": float(draw.choice([0.0, 0.25, 0.6])),
        "dst": bool(draw.random() < 0.9),
    }
    if not turns and options["frames"] == "turns":
        return
    script = Script(
        template=str(draw.choice(list(tokenizers))), dst_format=str(draw.choice(["arrow", "json"])),
        per_frame=int(draw.choice([1, 1, 2, 5])), silence_lm=bool(draw.random() < 0.3),
        recipe=bool(draw.random() < 0.3),
    )  # fmt: skip
    tokenizer, options = tokenizers[script.template], options | vars(script)
    if draw.random() < 0.6:
        options = tight_windows(clip, tokenizer, options)
    text_at, rate, dst, limit = options["text_at"], options["rate"], options["dst"], options.get("max_seq_len", 10**5)
    for epoch in range(3):
        samples = samples_of(clip, tokenizer, epoch=epoch, **options)
        overlap = options["overlap"] if epoch == 1 else None  # windows are the same in every epoch
        compare_stream(turns, begun, samples, text_at, rate, dst, False, script, limit, overlap)
        if not script.silence_lm:
            in_text = samples_of(clip, tokenizer, epoch=epoch, binary_at="text", **options)
            for one, other in zip(samples, in_text, strict=True):
                compare_decisions_in_text(one, other, dst)


def compare_decisions_in_text(at_frames, in_text, dst: bool) -> None:
    """`binary_at: text`: a head learns 1 on each token of its learned texts, and both 0 where both learn 0 at a frame.

    at_frames: the same sample with decisions at frames, which has been found right.
    """
    expected = {key: value.copy() for key, value in at_frames.labels.items()}
    speaking, update = expected["speaking_labels"], expected["dst_update_labels"]
    silent = (speaking == 0) & ((update == 0) | (not dst))
    for labels, texts in ((speaking, "speaking_gen_labels"), (update, "dst_gen_labels")):
        labels[:] = np.where(expected[texts] != NO, 1, NO)
    speaking[silent] = 0
    update[silent] = 0 if dst else NO
    assert in_text.input_ids.tolist() == at_frames.input_ids.tolist()
    for key, labels in expected.items():
        assert in_text.labels[key].tolist() == labels.tolist(), key


def compare_truncated(case: int, plain) -> None:
    draw, turns, begun, clip = random_case(case)
    [whole] = samples_of(clip, plain)
    limit = int(len(whole.input_ids) * draw.uniform(0.5, 1))
    for epoch in range(3):
        try:
            samples = samples_of(clip, plain, epoch=epoch, long_clips="truncate", max_seq_len=limit)
        except ProspectError:
            return
        compare_stream(turns, begun, samples, "drawn", 0.0, gaps=True, limit=limit)


@pytest.fixture(scope="module")
def tokenizers(plain, chatml, llama3) -> dict[str, Tokenizer]:
    return {"plain": plain, "chatml": chatml, "llama3": llama3}


@pytest.mark.parametrize("block", range(2))
def test_a_stream_is_what_the_labeller_says(block, tokenizers):
    for case in range(block * 30, block * 30 + 30):
        compare_one(case, tokenizers)


def test_a_truncated_stream_is_what_the_labeller_says(plain, monkeypatch):
    monkeypatch.setattr(sequence, "RECENT_TURNS", 2)
    for case in range(300, 400):
        compare_truncated(case, plain)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_thousands_of_streams_are_what_the_labeller_says(block, tokenizers, monkeypatch):
    monkeypatch.setattr(sequence, "RECENT_TURNS", 2)
    for case in range(1000 + block * 100, 1000 + block * 100 + 100):
        compare_one(case, tokenizers)
        compare_truncated(case, tokenizers["plain"])


# ---- the principle -------------------------------------------------------------------------------


def check_principle(case: int, plain, epochs: int = 120) -> int:
    """A frame is labelled 1 only if in some epoch its head's text stands right behind it; all places allowed are taken.

    Returns how many texts had a choice.
    """
    draw, turns, begun, clip = random_case(case)
    options = {"rate": 0.0, "overlap": float(draw.choice([0.0, 0.4]))}
    if draw.random() < 0.6:
        options = tight_windows(clip, plain, options)
    ones, stood, taken, allowed = defaultdict(set), defaultdict(set), defaultdict(set), {}
    for epoch in range(epochs):
        samples = samples_of(clip, plain, epoch=epoch, **options)
        for number, window in enumerate(compare_stream(turns, begun, samples, "drawn", 0.0)):
            for frame, texts in behind(window["entries"]).items():
                for text in texts:
                    stood[number, text.kind].add(frame)
            for entry in window["entries"]:
                ones[number, "assistant"] |= {entry.frame} if entry.speaking == 1 else set()
                ones[number, "DST_UPDATE"] |= {entry.frame} if entry.dst == 1 else set()
            for end, at in window["at"].items():
                taken[number, end].add(at)
                allowed[number, end] = set(window["allowed"][end])
    assert all(ones[key] <= stood[key] for key in ones)
    assert taken == allowed
    return sum(len(places) > 1 for places in allowed.values())


def test_a_frame_is_labelled_1_only_if_the_text_may_stand_right_behind_it(plain):
    assert sum(check_principle(case, plain) for case in range(500, 513)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_the_principle_on_many_clips(block, plain):
    for case in range(6000 + block * 10, 6000 + block * 10 + 10):
        check_principle(case, plain, epochs=300)


# ---- the turns layout ----------------------------------------------------------------------------


@dataclass
class Block:
    """A turn of the turns layout: its frames, then its text."""

    frames: list[Shown]
    said: Shown


def blocks_of(sample) -> tuple[dict[str, str], list[Block]]:
    """The state in a sample's prompt, and its blocks."""
    prompt, entries = entries_of(sample)
    blocks, frames = [], []
    for entry in entries:
        if entry.kind == "frame":
            frames.append(entry)
        else:
            blocks.append(Block(frames, entry))
            frames = []
    assert not frames
    return prompt_state(prompt), blocks


def compare_turns(turns: list[tuple], begun: str | None, samples: list, text_at: str, rate: float) -> None:
    """Hold every window of the turns layout against the labeller."""
    in_order = by_end(turns)
    number_of = {(role, content): number for number, (role, content, _, _) in enumerate(in_order)}
    learned_until = 0  # blocks of earlier windows
    for sample in samples:
        state, blocks = blocks_of(sample)
        first = number_of[blocks[0].said.kind, blocks[0].said.text]
        window = in_order[first : first + len(blocks)]

        # The state in the prompt is that after all earlier blocks, and before every frame shown.
        earlier = [content for role, content, _, _ in in_order[:first] if role == "DST_UPDATE"]
        assert state == states_after(begun, earlier)
        shown = [frame.frame for block in blocks for frame in block.frames]
        assert min(shown) > max([last for *_, last in in_order[:first]], default=-1)

        # Each turn's frames, then its text; its head fires at the last, the other head not at all.
        for number, (block, (role, content, a, b)) in enumerate(zip(blocks, window, strict=True), start=first):
            assert (block.said.kind, block.said.text) == (role, content)
            assert [frame.frame for frame in block.frames] == list(range(a, b + 1))
            assert block.said.learned == (role in HEADS and number >= learned_until)
            for frame in block.frames:
                found = {"assistant": frame.speaking, "DST_UPDATE": frame.dst}
                if number < learned_until:
                    assert [*found.values(), frame.state] == [NO] * 3
                    continue
                assert frame.state == state_by_hand(turns, frame.frame, {}, begun)
                due_here = {kind for kind, _, first, last in turns if first <= frame.frame <= last}
                for head, label in found.items():
                    if role == head:
                        assert label == int(frame.frame == b or text_at == "range")
                    elif head in due_here:  # decided in the block of its own turn
                        assert label in (0, NO)
                    elif due_here & set(HEADS):
                        assert label == 0
                    else:
                        assert label in (0, NO) and found["assistant"] == found["DST_UPDATE"]
                        assert rate == 0.5 or label == (0 if rate == 1 else NO)
        assert learned_until < first + len(blocks) and first <= learned_until
        learned_until = first + len(blocks)
    assert learned_until == len(turns)


def compare_one_in_turns(case: int, plain) -> int:
    """One random clip; how many windows it made."""
    draw, turns, begun, clip = random_case(case)
    if not turns:
        return 0
    options = {
        "layout": "turns",
        "rate": float(draw.choice([0.0, 0.5, 1.0])),
        "text_at": TEXT_AT[case % 3],
        "overlap": float(draw.choice([0.0, 0.25, 0.6])),
    }
    if draw.random() < 0.8:
        options = tight_windows(clip, plain, options)
    samples = samples_of(clip, plain, epoch=case, **options)
    compare_turns(turns, begun, samples, options["text_at"], options["rate"])
    return len(samples)


def test_the_turns_layout_is_what_the_labeller_says(plain):
    assert sum(compare_one_in_turns(case, plain) > 1 for case in range(10_000, 10_200)) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_thousands_of_clips_in_turns_are_what_the_labeller_says(block, plain):
    for case in range(11_000 + block * 300, 11_000 + block * 300 + 300):
        compare_one_in_turns(case, plain)


def test_a_long_turn_makes_one_unit_of_all_that_it_spans(plain):
    """Were it joined with the last of the two updates only, a window could begin with S1 under way at frames 100..110,
    although the frames 100 and 101, in which it starts, are among them."""
    turns = [
        ("DST_UPDATE", "S1->start", 100, 101),
        ("DST_UPDATE", "S1->complete", 103, 104),
        ("assistant", "Well done.", 100, 110),
        ("DST_UPDATE", "S2->start", 112, 112),
    ]
    clip = read(raw_clip(turns, 100, 115))
    [whole] = samples_of(clip, plain, layout="turns")
    spanned = [100, 101, 103, 104, *range(100, 111)]
    assert whole.frames.tolist() == [*spanned, 112]
    needed = len(whole.input_ids) - len("<[DST_UPDATE] S2->start") - 1  # an <image>, the text and its end token less
    first, second = samples_of(clip, plain, layout="turns", max_seq_len=needed + 5, overlap=0.9)
    assert (first.frames.tolist(), second.frames.tolist()) == (spanned, [112])
    assert blocks_of(first)[0] == {"S1": "not_started", "S2": "not_started"}
    assert blocks_of(second)[0] == {"S1": "completed", "S2": "not_started"}
    with pytest.raises(ProspectError, match="what is said at frame 100 need"):
        samples_of(clip, plain, layout="turns", max_seq_len=needed - 1)
