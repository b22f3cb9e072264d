"""When replies come, as the field measures it, and what it costs to have an assistant that talks too much.

Everything here is computed from one clip's replies and its reference. Each number follows the code that produced the
published ones; only the judge is another. Where that code asks a language model whether a reply says the right thing,
this one compares the two texts by the evaluation's similarity.

    Timeliness-F1@5             SPOT-Bench (arXiv 2604.24317)
    PAUC                        ProactiveVideoQA (arXiv 2507.09313)
    macro F1, G-Mean            of {interrupt, silent} in chunks of 8 s: EgoProactive (arXiv 2606.04970)
    time F1, content accuracy, joint F1     within 3 s
    duplicate share, replies per minute, false alarms per quiet hour    ours

docs/metrics.md has every formula with an example worked by hand. Counts of clips add up and are divided once.

Letters: F frames, P replies said, R replies wanted. Rows are frames from the clip's first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prospect.metrics import EVENT_TOLERANCE, Counts, Event, match_events, ratio

TIMELY = 1.5  # seconds: so far from its time a reply is fully timely
EARLY, LATE = 2.22, 1.11  # seconds: deviation of the Gaussian tails beyond, before and after
LEAST_TIMELINESS = 0.05  # a reply less timely than this is none
PER_SLOT = 5  # replies that one slot takes in

OMEGA = 0.5  # PAUC: 0 counts the time fully, 1 not at all
UNANSWERED = 0.25  # PAUC: the score of silence, between a wrong answer (0) and a right one (1)

CHUNK = 8.0  # seconds
CLOSE = 3.0  # seconds, for time F1
SAME = 0.5  # two texts of a higher similarity say the same, as in match_dialogue


@dataclass(frozen=True, eq=False)  # an array has no single answer to ==
class TimingCounts:
    """One or many clips. Counts add up."""

    slots: int = 0  # replies wanted
    slots_taken: int = 0  # by a timely reply that says the same
    timeliness: float = 0.0  # summed over the taken
    untimely: int = 0  # replies that no slot took in
    earliness: float = 0.0  # PAUC summed over the slots
    chunks: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.int64))  # [reference, said], 1: interrupt
    close: Counts = Counts()  # paired by time alone,
    close_same: int = 0  # and of these, saying the same
    duplicates: int = 0
    seconds: float = 0.0
    quiet_seconds: float = 0.0
    false_alarms: int = 0  # decisions to write in these

    def __add__(self, other: "TimingCounts") -> "TimingCounts":
        return TimingCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def summary(self) -> dict[str, float]:
        """The numbers by the names under which they are reported."""
        right = np.diag(self.chunks)
        silent, interrupt = (
            ratio(2 * right[kind], self.chunks[kind].sum() + self.chunks[:, kind].sum()) for kind in (0, 1)
        )
        return {
            "timeliness_f1": ratio(2 * self.timeliness, self.slots_taken + self.untimely + self.slots),
            "pauc": ratio(self.earliness, self.slots),
            "chunk_macro_f1": (silent + interrupt) / 2,
            "chunk_g_mean": float(np.sqrt(silent * interrupt)),
            "time_f1": self.close.f1,
            "content_accuracy": ratio(self.close_same, self.close.matched),
            "joint_f1": ratio(2 * self.close_same, self.close.predicted + self.close.reference),
            "duplicate_share": ratio(self.duplicates, self.close.predicted),
            "replies_per_minute": ratio(60 * self.close.predicted, self.seconds),
            "false_alarms_per_quiet_hour": ratio(3600 * self.false_alarms, self.quiet_seconds),
        }


def timing_counts(
    said: dict[int, str],
    wanted: Sequence[tuple[Event, str]],
    alike: np.ndarray,
    between: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    decided: Sequence[int],
    turns: Sequence[Event],
    *,
    num_frames: int,
    fps: float,
) -> TimingCounts:
    """All counts of one clip.

    said     what was said, by row, in order: P replies
    wanted   the rows in which each reply is due, in order of their last, at which its text stands: R replies
    alike    [P, R] |similarity| of their texts
    between  that similarity
    decided  rows with a decision to write, by either head
    turns    the rows of everything that happens: replies, updates, what the user says
    """
    rows, due = np.array(list(said), np.int64), [event for event, _ in wanted]
    last = np.array([end for _, end in due], np.int64)
    same = alike > SAME  # [P,R]
    timeliness, taken, untimely = take_slots(timely((rows[:, None] - last) / fps), same)
    pairs = match_events(rows, [(end, end) for end in last], int(CLOSE * fps))
    replies, behind = list(said.items()), int(np.ceil(EVENT_TOLERANCE * fps)) + 1
    spans = [slice(*np.searchsorted(rows, (begin, end + behind))) for begin, end in due]  # replies that may count
    busy = busy_rows(turns, int(EVENT_TOLERANCE * fps), num_frames)
    return TimingCounts(
        slots=len(due),
        slots_taken=taken,
        timeliness=timeliness,
        untimely=untimely,
        earliness=sum(earliness(dict(replies[span]), *one, between, fps) for span, one in zip(spans, wanted)),
        chunks=chunk_confusion(rows, last, num_frames, fps),
        close=Counts(len(pairs), len(rows), len(due)),
        close_same=sum(bool(same[pair]) for pair in pairs),
        duplicates=duplicates(said, due, int(EVENT_TOLERANCE * fps)),
        seconds=num_frames / fps,
        quiet_seconds=float((~busy).sum() / fps),
        false_alarms=sum(not busy[row] for row in decided),
    )


# ---- Timeliness-F1@K (SPOT-Bench) ----------------------------------------------------------------


def timely(offset: np.ndarray) -> np.ndarray:
    """How timely a reply is that comes `offset` seconds after its time: 1 within TIMELY, then a Gaussian tail."""
    beyond = np.maximum(np.abs(offset) - TIMELY, 0)
    return np.exp(-(beyond**2) / (2 * np.where(offset < 0, EARLY, LATE) ** 2))


def take_slots(timeliness: np.ndarray, same: np.ndarray, per_slot: int = PER_SLOT) -> tuple[float, int, int]:
    """Which replies the slots take in: (summed timeliness, slots taken, replies that no slot took).

    timeliness, same [P, R]: of each reply, in order of time, for each slot. A slot takes the first `per_slot` replies
    that are timely and say the same, and keeps the best. One reply may be taken by several slots, as in the published
    code, so a slot's choice depends on no other.
    """
    if not timeliness.size:
        return 0.0, 0, len(timeliness)
    may = same & (timeliness >= LEAST_TIMELINESS)
    takes = may & (np.cumsum(may, axis=0) <= per_slot)  # [P,R]
    best = np.where(takes, timeliness, 0).max(0)  # [R]
    return float(best.sum()), int(takes.any(0).sum()), int((~takes.any(1)).sum())


# ---- PAUC (ProactiveVideoQA) ---------------------------------------------------------------------


def earliness(
    said: dict[int, str],
    due: Event,
    text: str,
    between: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    fps: float,
) -> float:
    """How early within its span the right thing is said, 0..1: the mean over the span of how right it is so far.

    The span begins with the first due frame and ends EVENT_TOLERANCE seconds after the last. What is said so far counts
    as one text; before it, silence counts UNANSWERED. Times shrink by 1 - OMEGA towards the span's beginning.
    """
    length = (due[1] - due[0]) / fps + EVENT_TOLERANCE
    so_far: list[str] = []
    score, since, area = UNANSWERED, 0.0, 0.0
    for row, reply in said.items():
        at = (row - due[0]) / fps
        if not 0 <= at <= length or reply in so_far:
            continue
        so_far.append(reply)
        area += score * ((1 - OMEGA) * at - since)
        since, score = (1 - OMEGA) * at, abs(float(between([" ".join(so_far)], [text])[0, 0]))
    return (area + score * (length - since)) / length


# ---- chunks, duplicates, quiet -------------------------------------------------------------------


def chunk_confusion(said: np.ndarray, wanted: np.ndarray, num_frames: int, fps: float) -> np.ndarray:
    """[reference, said] of the clip's chunks of CHUNK seconds: 1 where a reply is wanted, or said, in it; else 0."""
    size = CHUNK * fps
    chunks = np.zeros((2, int(np.ceil(num_frames / size))), np.int64)
    for which, rows in enumerate((wanted, said)):
        chunks[which, (rows // size).astype(np.int64)] = 1
    counts = np.zeros((2, 2), np.int64)
    np.add.at(counts, tuple(chunks), 1)
    return counts


def duplicates(said: dict[int, str], due: Sequence[Event], tolerance: int) -> int:
    """Replies whose words were said before, with no other reply having become due since then."""
    begun = np.searchsorted(sorted(first - tolerance for first, _ in due), list(said), side="right")
    return len(said) - len(set(zip(begun.tolist(), said.values())))


def busy_rows(turns: Sequence[Event], tolerance: int, num_frames: int) -> np.ndarray:
    """The rows that lie in a turn's range or at most `tolerance` frames from it, [F] bool. The others are quiet."""
    busy = np.zeros(num_frames, bool)
    for first, last in turns:
        busy[max(first - tolerance, 0) : last + tolerance + 1] = True
    return busy
