"""What a clip is: one stretch of a video with its conversation, its frames and the steps of its task.

The conversation is turns of the system, the user, the assistant and DST_UPDATE, each with the frames it belongs to.
Frame numbers are absolute and ranges are inclusive at both ends. Row r of a clip's embeddings is frame start_frame + r:

    start_frame = 193, end_frame = 451:   row 0 is frame 193, row 258 is frame 451, 259 rows

prospect/clip_files.py reads clip files, checks them and refuses bad ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prospect.dst import STATES, State, Step, Transition, apply_update

ROLES = ("system", "user", "assistant", "DST_UPDATE")
MAX_TEXT = 100_000  # characters of one turn, the recipe or the goal


@dataclass(frozen=True)
class Turn:
    """One turn. Its text is placed at `end_frame`. Both frames are 0 for a system turn, which is prompt text."""

    role: str
    text: str  # empty for DST_UPDATE
    transitions: tuple[Transition, ...]  # empty for other roles
    start_frame: int
    end_frame: int
    index: int  # position in the file's conversation, for messages
    progress: str = ""  # what has been done so far, where a file says it (ProAssist's dialogues do)


@dataclass(frozen=True)
class Clip:
    id: str
    video_uid: str
    dataset: str
    fps: float
    start_frame: int  # absolute number of row 0
    end_frame: int  # absolute number of the last row, inclusive
    turns: tuple[Turn, ...]  # in the file's order
    steps: tuple[Step, ...]
    goal: str
    knowledge: str
    initial_state: State  # before the first frame
    embeddings: str | None  # path of its embedding file, where the clip file names one
    embeddings_start: int | None  # absolute number of that file's row 0, where the clip file says it
    where: str  # "file, clip ID", for messages
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # fields of the file that are not ours

    @property
    def num_frames(self) -> int:
        return self.end_frame - self.start_frame + 1

    def seconds(self, frame: int) -> float:
        return frame / self.fps

    def updates(self) -> list[Turn]:
        """The DST_UPDATE turns in the order in which they apply: by frame, within a frame as in `turns`."""
        return sorted((turn for turn in self.turns if turn.role == "DST_UPDATE"), key=lambda turn: turn.end_frame)

    def state_before(self, frame: int) -> State:
        """The state when `frame` is about to be seen: all updates at earlier frames are applied."""
        state = self.initial_state
        for turn in self.updates():
            if turn.end_frame < frame:
                state = apply_update(state, turn.transitions)
        return state

    def states_after(self, moment: Callable[[Turn], int] = lambda turn: turn.end_frame) -> list[State]:
        """The state after each frame [F]. moment: the frame from which an update counts, by default its turn's last."""
        states, state, updates = [], self.initial_state, self.updates()
        for frame in range(self.start_frame, self.end_frame + 1):
            while updates and moment(updates[0]) <= frame:
                state = apply_update(state, updates.pop(0).transitions)
            states.append(state)
        return states

    def latest_step_state(self, moment: Callable[[Turn], int] = lambda turn: turn.end_frame) -> np.ndarray:
        """At every frame the state of the most recently started step, [F], as an index into STATES.

        Before the clip's first start it is that of the step under way when the clip began, else of the last one
        completed, else not_started.
        """
        begun = [id for id, state in self.initial_state.items() if state != "not_started"]
        under_way = [id for id in begun if self.initial_state[id] == "in_progress"]
        latest = (under_way or begun or [None])[-1]
        now = STATES.index(self.initial_state[latest]) if latest else 0
        states = np.full(self.num_frames, now)
        for turn in self.updates():
            for t in turn.transitions:
                if t.transition == "start":
                    latest, now = t.id, STATES.index("in_progress")
                elif t.id == latest:
                    now = STATES.index("completed")
            states[max(moment(turn) - self.start_frame, 0) :] = now
        return states

    def events(self, role: str) -> list[tuple[int, int]]:
        """The frames (first, last) in which each text of `role` is due; turns that end together are one text."""
        ranges: dict[int, int] = {}  # by last frame
        for turn in self.turns:
            if turn.role == role:
                ranges[turn.end_frame] = min(turn.start_frame, ranges.get(turn.end_frame, turn.start_frame))
        return [(first, last) for last, first in sorted(ranges.items())]

    def replies(self) -> dict[int, str]:
        """What the assistant says, by frame, in order; several replies at one frame are one text, as in training."""
        found: dict[int, list[str]] = {}
        for turn in sorted(self.turns, key=lambda turn: turn.end_frame):
            if turn.role == "assistant":
                found.setdefault(turn.end_frame, []).append(turn.text)
        return {frame: " ".join(texts) for frame, texts in found.items()}


def unpaired_surrogate(text: str) -> str | None:
    """What is wrong with a text that no UTF-8 file can hold, worded for an error; None for any other text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair at {error.start}"
    return None
