"""What a clip is: one stretch of a video with its conversation, its frames and the steps of its task.

The conversation is turns of the system, the user, the assistant and DST_UPDATE, each with the frames it belongs to.
Frame numbers are absolute and ranges are inclusive at both ends. Row r of a clip's embeddings is frame start_frame + r:

    start_frame = 193, end_frame = 451:   row 0 is frame 193, row 258 is frame 451, 259 rows

How clip files are read, checked and refused is in prospect/clip_files.py.
"""

from dataclasses import dataclass, field
from typing import Any

from prospect.dst import State, Step, Transition, apply_update

ROLES = ("system", "user", "assistant", "DST_UPDATE")


@dataclass(frozen=True)
class Turn:
    """One turn. Its text is placed at `end_frame`. Both frames are 0 for a system turn, which is prompt text."""

    role: str
    text: str  # empty for DST_UPDATE
    transitions: tuple[Transition, ...]  # empty for other roles
    start_frame: int
    end_frame: int
    index: int  # position in the file's conversation, for messages


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
    where: str  # "file, clip ID", for messages
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # fields of the file that are not ours

    @property
    def num_frames(self) -> int:
        return self.end_frame - self.start_frame + 1

    def seconds(self, frame: int) -> float:
        return frame / self.fps

    def updates(self) -> list[Turn]:
        """The DST_UPDATE turns in the order in which they act: by frame, and at one frame as in `turns`."""
        return sorted((turn for turn in self.turns if turn.role == "DST_UPDATE"), key=lambda turn: turn.end_frame)

    def state_before(self, frame: int) -> State:
        """The state when `frame` is about to be seen: all updates at earlier frames are applied."""
        state = self.initial_state
        for turn in self.updates():
            if turn.end_frame < frame:
                state = apply_update(state, turn.transitions)
        return state

    def states_after(self) -> list[State]:
        """The state after each frame, [F]: updates at the frame are applied."""
        states, state, updates = [], self.initial_state, self.updates()
        for frame in range(self.start_frame, self.end_frame + 1):
            while updates and updates[0].end_frame <= frame:
                state = apply_update(state, updates.pop(0).transitions)
            states.append(state)
        return states

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
