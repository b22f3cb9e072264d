"""Streams that nobody would use, to find out why others work (benchmarks/ablation.py).

**The ladder.** One model and one stream, but for the task state that a refreshed context's prompt reports: nothing, the
true state with so many of its steps wrong, or the true state. What the model predicted stays in the updates that are in
the context as text; the prompt alone carries what is older.

**The sceptic's assistants.** One that is always silent, one that always speaks, one that speaks by the clock and never
looks, and a model that sees the last four frames. What the first three say and when comes from the training clips.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prospect.clips import Clip
from prospect.config import Config
from prospect.dst import STATES, State
from prospect.model import Prospect
from prospect.sequence import generator
from prospect.stream import FrameRecord, Job, StreamSession, advance, make_cache
from prospect.tokenizer import Tokenizer

STREAMS = 8
RECENT = 4  # frames that a model without any past sees

# ---- the ladder ----------------------------------------------------------------------------------

Change = Callable[[StreamSession, int], None]  # a session, and how many frames it has just seen


def streamed(
    model: Prospect, tokenizer: Tokenizer, jobs: Sequence[Job], config: Config, change: Change
) -> Iterator[tuple[Job, list[dict]]]:
    """Each clip with its records; after every step of a stream, `change` has its way with the session."""
    lookahead = 1 if change is forget else config.infer.lookahead  # no frame may see what is to be forgotten
    cache = make_cache(model, config, STREAMS)
    for begin in range(0, len(jobs), STREAMS):
        held = [jobs[number] for number in range(begin, min(begin + STREAMS, len(jobs)))]
        sessions = [
            StreamSession(model, tokenizer, job.clip, config, cache=cache, stream=stream)
            for stream, job in enumerate(held)
        ]
        records: list[list[FrameRecord]] = [[] for _ in held]
        while running := [n for n, job in enumerate(held) if len(records[n]) < job.num_frames]:
            upcoming = [held[n].frames(sessions[n].next_row, lookahead) for n in running]
            for n, new in zip(running, advance([sessions[n] for n in running], upcoming)):
                records[n] += new
                change(sessions[n], len(new))
        yield from ((job, [record.to_dict() for record in of]) for job, of in zip(held, records))


def report_state(state_at: Callable[[Clip, int], State]) -> Change:
    """What the next prompt reports is not what was predicted, but state_at(clip, frame) before its first frame."""

    def change(session: StreamSession, new: int) -> None:
        for unit, frame in zip(session.units[-new:], range(session.frame_idx - new, session.frame_idx)):
            unit.state_before = state_at(session.clip, frame)

    return change


def true_state(clip: Clip, frame: int) -> State:
    return clip.state_before(frame)


def no_state(clip: Clip, frame: int) -> State:
    return dict.fromkeys(clip.initial_state, "not_started")


def corrupted_state(share: float) -> Callable[[Clip, int], State]:
    """The true state, each step of which is, with this probability, in one of its two other states."""

    def state_at(clip: Clip, frame: int) -> State:
        draw, state = generator("corrupted", share, clip.id, frame), dict(clip.state_before(frame))
        for step, true in state.items():
            if draw.random() < share:
                state[step] = draw.choice([other for other in STATES if other != true]).item()
        return state

    return state_at


def forget(session: StreamSession, new: int) -> None:
    """The context begins again with the prompt and the last frames, and what was said at them."""
    if len(session.units) > RECENT:
        session.rebuild(session.prompt, session.units[-RECENT:])


# ---- assistants that do not look -----------------------------------------------------------------


def silent(clip: Clip, train: Sequence[Clip]) -> dict[int, str]:
    """What is said, by frame."""
    return {}


def always(clip: Clip, train: Sequence[Clip]) -> dict[int, str]:
    """At every frame, what is said most often in this task."""
    [(text, _)] = Counter(text for other in alike(clip, train) for text in other.replies().values()).most_common(1)
    return dict.fromkeys(range(clip.start_frame, clip.end_frame + 1), text)


def timer(clip: Clip, train: Sequence[Clip]) -> dict[int, str]:
    """The n-th reply comes when it usually does, and says what it usually says, until fewer than half come so far."""
    timed = [
        [(frame - other.start_frame, text) for frame, text in other.replies().items()] for other in alike(clip, train)
    ]
    said = {}
    for n in range(max(map(len, timed))):
        nth = [replies[n] for replies in timed if len(replies) > n]
        if 2 * len(nth) < len(timed):
            break
        [(text, _)] = Counter(text for _, text in nth).most_common(1)
        said[clip.start_frame + int(statistics.median(frame for frame, _ in nth))] = text
    return {frame: text for frame, text in said.items() if frame <= clip.end_frame}


def alike(clip: Clip, train: Sequence[Clip]) -> list[Clip]:
    return [other for other in train if other.goal == clip.goal]


def spoken(clip: Clip, said: dict[int, str]) -> list[dict]:
    """The records of an assistant that says this and tracks no state."""
    return [
        FrameRecord(
            clip.id, frame, clip.seconds(frame), float(frame in said), None, float(frame in said), None, frame in said,
            False, said.get(frame), None, {},
        ).to_dict()
        for frame in range(clip.start_frame, clip.end_frame + 1)
    ]  # fmt: skip
