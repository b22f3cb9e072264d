"""A clip becomes one sequence: what is seen, what is said, and what is learned. This file is the method.

    <prompt> <f193> <f194> User: I want to…⏎ <f195> [DST_UPDATE] S1->start⏎ Assistant: Great! …⏎ <f196> <f197> …
    speak       0      0                       1      -100 …                                          0 or -100
    dst         0      0                       1      -100 …                                          0 or -100

Every step is a plain function, in this order:

    text_places        clip -> behind which frame each reply and update stands, and behind which it might
    lay_out            clip -> which frames are shown, what is said between them, the decision labels of each frame
    plan_windows       layout -> stretches that fit max_seq_len, each with the task's state at its first frame
    format_conversation_with_ranges
                       a window -> text in pieces, and in the same pass the character ranges to be learned
    label_tokens       token ids + ranges -> label arrays aligned with input_ids (the loss shifts once, not here)
    make_sample        all of it: one window of a clip -> the arrays that prospect/data.py puts into a batch

The model decides at `<image>` tokens, because there inference decides. User text comes right before the last frame of
its turn, so that a decision can follow it. Where the text of a reply or an update stands, and where its head is taught
to fire, obey one rule, because live the text stands wherever the head fires: **a frame is labelled 1 only if the text
may stand right behind it.**
The method is ProAssist's interleaving (arXiv 2506.05904) extended by task state.

Letters: F frames shown, U units (frames that are never cut from their text), T tokens, I <image> tokens of one frame,
D width of an embedding.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from prospect.clips import Clip, Turn
from prospect.config import IGNORE, DataConfig
from prospect.dst import State, Step, write_update
from prospect.errors import ProspectError
from prospect.summaries import SUMMARY_REQUEST, can_be_summarized, reference_summary
from prospect.tokenizer import IMAGE, Piece, Tokenizer

DEFAULT_SYSTEM = "You are a helpful and proactive assistant."
LABEL_KEYS = ("speaking_gen_labels", "speaking_labels", "dst_gen_labels", "dst_update_labels", "dst_state_labels")


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that depends on nothing but its key: the same on every machine, rank, worker and resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


# ---- the prompt ----------------------------------------------------------------------------------


def prompt_text(
    system: str, goal: str, steps: Sequence[Step], state: State, *, dst: bool, knowledge: str = "", summary: str = ""
) -> str:
    """What stands before the first frame, in training and at inference: this is the one function that writes it.

    state: the task's state when the window's first frame is about to be seen. knowledge: the recipe, where wanted.
    """
    lines = [system or DEFAULT_SYSTEM]
    if goal:
        lines.append(f"Task: {goal}")
    if dst:
        lines += [f"{step.id} {step.name} [{state[step.id]}]" for step in steps]
    if knowledge:
        lines.append(knowledge)
    if summary:
        lines.append(f"So far: {summary}")
    return "\n".join(lines)


def clip_prompt(clip: Clip, state: State, config: DataConfig, summary: str = "") -> str:
    """`prompt_text` of a clip: its system turns, goal, steps and, where `data.recipe` asks for it, its recipe."""
    system = "\n".join(turn.text for turn in clip.turns if turn.role == "system")
    knowledge = clip.knowledge if config.recipe else ""
    return prompt_text(system, clip.goal, clip.steps, state, dst=config.dst, knowledge=knowledge, summary=summary)


def summary_prompt(clip: Clip, state: State, config: DataConfig, summary: str) -> str:
    """The prompt of a context that begins with a summary. It always brings the recipe along, as ProAssist's does."""
    return clip_prompt(clip, state, replace(config, recipe=True), summary)


def prompt_parts(clip: Clip, config: DataConfig) -> dict[str, bool]:
    """Which parts, named as messages name them, `clip_prompt` has for this clip."""
    return {
        "system text": any(turn.role == "system" for turn in clip.turns),
        "goal": bool(clip.goal),
        "list of steps": config.dst and bool(clip.steps),
        "recipe": config.recipe and bool(clip.knowledge),
    }


def prompt_pieces(prompt: str, tokenizer: Tokenizer) -> list[Piece]:
    template = tokenizer.template
    bos = [Piece(template.bos, control=True)] if template.bos else []
    return bos + template.turn("system", prompt) + template.suffix()


# ---- the layout ----------------------------------------------------------------------------------


LATE = 0.75  # share of the texts that stand behind the last frame of their turn, with data.text_at=drawn


@dataclass(frozen=True)
class Place:
    """Where the text of a turn stands, in absolute frames: right behind `at`, one of those first..last where it may."""

    first: int
    last: int
    at: int


def text_places(
    clip: Clip, config: DataConfig, shown: np.ndarray, draw: np.random.Generator | None, edges: np.ndarray
) -> dict[int, Place]:
    """The place of every reply and update, by the last frame of its turn: turns that end together stand together.

    `data.text_at`: `drawn` from the middle of the turn's range, the annotated moment, to its end, the end with
    probability LATE; `last`, the end alone; `range`, behind the end but labelled 1 from the start of the range, where
    training never puts the text (kept for comparison). A text never stands before a user's text in its range, which it
    answers, nor before the text of an earlier turn, nor on the other side of an edge of its window. shown [F], edges:
    the frames of the sequence and those at which its window begins or ends, absolute. draw None: at the end, as windows
    are planned.

        range       a  .  m  .  b                 first = m, last = b; drawn: at = the second dot
        speaking    0  0  1  1  0     with the text behind the second dot; behind it all has been said
    """
    users = [turn.end_frame for turn in clip.turns if turn.role == "user"]
    earliest: dict[int, int] = {}  # by last frame
    for turn in clip.turns:
        if turn.role == "assistant" or (turn.role == "DST_UPDATE" and config.dst):
            begin, end = turn.start_frame, turn.end_frame
            first = {"drawn": (begin + end + 1) // 2, "last": end, "range": begin}[config.text_at]
            first = max([first, *(user for user in users if begin <= user <= end)])
            earliest[end] = max(first, earliest.get(end, first))
    places, previous = {}, -1
    for end, first in sorted(earliest.items()):
        at = end
        if config.text_at != "range":
            first = max([first, previous + 1, *edges[(edges > first) & (edges <= end)].tolist()])
        if draw is not None and config.text_at == "drawn":
            late, early = draw.random(2)  # drawn for every turn, so that one draw does not depend on another turn
            options = shown[(shown >= first) & (shown < end)]
            if late >= LATE and len(options):
                at = int(options[int(early * len(options))])
        places[end], previous = Place(first, end, at), end
    return places


@dataclass(frozen=True)
class Said:
    """A turn's text and its place: right before frame `at` (an index into Layout.frames) or right after it."""

    role: str
    text: str
    at: int
    before: bool


@dataclass
class Layout:
    """A clip as it will be read: frames in order, and what is said between them.

    frames   [F]  absolute frame number of each frame shown (the turns layout may show a frame more than once)
    speaking [F]  decision label of the speaking head at each: 1, 0 or -100
    dst      [F]  the same for the DST update head
    state    [F]  index into STATES of the most recently started step, for the state head
    said          texts in reading order
    units    [U+1] boundaries: frames[units[u]:units[u+1]] and what is said there are never cut apart
    """

    frames: np.ndarray
    speaking: np.ndarray
    dst: np.ndarray
    state: np.ndarray
    said: list[Said]
    units: np.ndarray

    def first_frame(self, unit: int) -> int:
        return int(self.frames[self.units[unit]])


def lay_out(
    clip: Clip, config: DataConfig, rate: float, seed: int, epoch: int, window: "Window | None" = None
) -> Layout:
    """The layout of a whole clip, for one of its windows.

    rate: share of the clip's silent frames that become negatives, drawn anew for every (seed, epoch, clip id), as the
    places of the texts are. window None: nothing of the places is drawn, as windows are planned. A drawn text stays on
    its side of every edge of the window it was planned in, so no window's length or state changes from epoch to epoch.
    """
    shown = kept_frames(clip, config, seed)  # [F] absolute, increasing
    draw, edges = None, shown[:0]
    if window is not None and config.layout == "stream":  # where every unit is one frame
        draw, edges = generator(seed, epoch, clip.id, "text"), shown[window.edges(len(shown))]
    places = text_places(clip, config, shown, draw, edges)
    speaking, dst = frame_labels(clip, config, places, rate, seed, epoch)
    state = clip.latest_step_state(lambda turn: places[turn.end_frame].at) if config.dst else np.full(len(dst), IGNORE)
    labels = {"speaking": speaking, "dst": dst, "state": state}  # [F] each, all frames of the clip
    turns = [turn for turn in clip.turns if turn.role != "system" and (config.dst or turn.role != "DST_UPDATE")]
    if config.layout == "turns":
        return _turns_layout(clip, config, turns, labels)

    # What is said at each frame, by role.
    by_frame: dict[int, dict[str, list]] = {}
    for turn in turns:
        at = turn.end_frame if turn.role == "user" else places[turn.end_frame].at
        at_frame = by_frame.setdefault(at, {"user": [], "DST_UPDATE": [], "assistant": []})
        at_frame[turn.role].extend(turn.transitions if turn.role == "DST_UPDATE" else [turn.text])

    # In reading order; several updates at one frame are one text, and so are several replies.
    index = {int(frame): at for at, frame in enumerate(shown)}
    said = []
    for frame in sorted(by_frame):
        at, texts = index[frame], by_frame[frame]
        said += [Said("user", text, at, before=True) for text in texts["user"]]
        if texts["DST_UPDATE"]:
            said.append(Said("DST_UPDATE", write_update(texts["DST_UPDATE"], config.dst_format), at, before=False))
        if texts["assistant"]:
            said.append(Said("assistant", " ".join(texts["assistant"]), at, before=False))
    rows = shown - clip.start_frame
    of_shown = {name: values[rows] for name, values in labels.items()}
    return Layout(shown, **of_shown, said=said, units=np.arange(len(shown) + 1))


def frame_labels(
    clip: Clip, config: DataConfig, places: dict[int, Place], rate: float, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decision labels (speaking, dst) of every frame of the clip, [F] each: 1, 0 or -100.

    1 from the first frame behind which the turn's text may stand to the one behind which it does; 0 on every other
    frame of a reply or an update; of the frames covered by neither, `rate` are 0 and the others -100. They are drawn
    from the whole clip, whichever of its frames `data.frames` shows.

        frame              193   194  User…  195         neither may stand before the user's text
        assistant turn      '---------------'      speaking     0     0    1
        DST_UPDATE turn     '---------------'      dst          0     0    1
    """
    F, first = clip.num_frames, clip.start_frame
    covered = np.zeros(F, bool)
    positive = {"assistant": np.zeros(F, bool), "DST_UPDATE": np.zeros(F, bool)}
    for turn in clip.turns:
        if turn.role in positive and (turn.role == "assistant" or config.dst):
            place = places[turn.end_frame]
            covered[turn.start_frame - first : turn.end_frame - first + 1] = True
            positive[turn.role][place.first - first : place.at - first + 1] = True

    silent = np.flatnonzero(~covered)
    count = int(rate * len(silent) + 0.5)
    sampled = generator(seed, epoch, clip.id).choice(silent, size=count, replace=False) if count else silent[:0]
    labels = np.full((2, F), IGNORE)
    labels[:, covered] = 0
    labels[:, sampled] = 0
    labels[0, positive["assistant"]] = 1
    labels[1, positive["DST_UPDATE"]] = 1
    if not config.dst:
        labels[1] = IGNORE
    return labels[0], labels[1]


# ---- the windows ---------------------------------------------------------------------------------


SUMMARIZED_FROM = 0.6  # of max_seq_len: the shortest window that ends with a summary


@dataclass(frozen=True)
class Window:
    """A stretch of a clip that is one training sequence: the prompt and some units, learned from unit `learn` on.

    first..end-1 are the units shown, unless `units` names them one by one, because truncation has left gaps.
    """

    first: int
    learn: int
    end: int
    num_tokens: int  # of the whole sequence, prompt included
    units: tuple[int, ...] | None = None
    summarized: bool = False  # it begins with a summary of the window before it, and ends with one for the next

    def shows(self, U: int) -> np.ndarray:
        """Which of the clip's U units it shows, [U] bool."""
        shown = np.zeros(U, bool)
        shown[slice(self.first, self.end) if self.units is None else list(self.units)] = True
        return shown

    def edges(self, U: int) -> np.ndarray:
        """The units at which it begins, is first learned, ends, or has a gap: no text may cross one."""
        begins = np.flatnonzero(np.diff(self.shows(U))) + 1
        return np.union1d(begins, [self.learn])


def is_summarized(clip: Clip, config: DataConfig, seed: int) -> bool:
    """Whether the clip's windows hand a summary on: so do a share `data.summaries` of the clips that can be summarized.

    Drawn for (seed, clip), the same in every epoch, so that the windows stay.
    """
    if config.summaries == 0 or config.long_clips == "truncate" or not can_be_summarized(clip):
        return False
    return generator(seed, "summaries", clip.id).random() < config.summaries


def window_prompt(clip: Clip, frame: int, config: DataConfig, summarized: bool) -> str:
    """The prompt of a window whose first frame is `frame`. summarized: it follows a window that ends with a summary."""
    state = clip.state_before(frame)
    if summarized:
        return summary_prompt(clip, state, config, reference_summary(clip, frame))
    return clip_prompt(clip, state, config)


def plan_windows(
    clip: Clip, layout: Layout, tokenizer: Tokenizer, config: DataConfig, per_frame: int, seed: int = 0
) -> list[Window]:
    """Cut a clip into sequences of at most max_seq_len tokens.

    A window begins with the prompt and the last `overlap` share of the previous window's frames and text, which is not
    learned again:

        window 0   <prompt: state at a>  a b c d e f g h
        window 1   <prompt: state at g>              g h i j k l m n          learned from i on
        window 2   <prompt: state at m>                          m n o p ...  learned from o on

    Windows of a summarized clip, drawn from `seed`, hand a summary on in place of the overlap (prospect/summaries.py).
    Their lengths are drawn, too: when a summary is asked for, a stream's context is max_seq_len - infer.reserved long,
    and a model that had only met the request at the end of max_seq_len wrote worse ones there.
    No window for a clip without frames to show (the turns layout of a clip in which nobody speaks).
    Raises ProspectError where a prompt and a single unit are more than max_seq_len.
    """
    tokens = unit_tokens(layout, tokenizer, per_frame)  # [U]
    until = np.concatenate(([0], np.cumsum(tokens)))  # [U+1] tokens before each unit
    U, summarized = len(tokens), is_summarized(clip, config, seed)
    known: dict[str, int] = {}  # tokens of the prompts and summaries met before

    def prompt_length(unit: int) -> int:
        prompt = window_prompt(clip, layout.first_frame(unit), config, summarized and unit > 0)
        if prompt not in known:
            [known[prompt]] = tokenizer.count_tokens([prompt_pieces(prompt, tokenizer)])
            known[prompt] += int(config.silence_lm)  # the closing end token, see format_conversation_with_ranges
        return known[prompt]

    def ending_length(end: int) -> int:
        """Tokens of the request for a summary, and of the summary, with which a window ends before unit `end`."""
        if not summarized or end == U:
            return 0
        summary = reference_summary(clip, layout.first_frame(end))
        if summary not in known:
            known[summary] = sum(tokenizer.count_tokens(summary_turns(summary, tokenizer)))
        return known[summary]

    def length(first: int, end: int) -> int:
        return prompt_length(first) + int(until[end] - until[first]) + ending_length(end)

    def fit(first: int, limit: int = config.max_seq_len) -> int:
        """The units first..end-1 fit into one sequence of so many tokens; returns end."""
        room = limit - prompt_length(first)
        end = int(np.searchsorted(until, until[first] + room, side="right")) - 1
        while end > first and length(first, end) > limit:  # the summary needs room
            end -= 1
        return end

    if U == 0:
        return []
    if fit(0) == U:
        return [Window(0, 0, U, length(0, U))]
    if config.long_clips == "truncate":
        return [_truncate(clip, layout, tokens, prompt_length, config)]

    windows, first, learn, draw = [], 0, 0, generator(seed, "ends", clip.id)
    while learn < U:
        while fit(first) <= learn and first < learn:  # a long text follows: it needs the overlap's room
            first += 1
        end = fit(first)
        if end <= learn:
            frame, needed = layout.first_frame(learn), length(learn, learn + 1)
            what = f"the prompt and what is said at frame {frame} need {needed} tokens"
            remedy = f"data.max_seq_len is {config.max_seq_len}: raise it, or shorten the text"
            raise ProspectError(what, where=clip.where, remedy=remedy)
        if summarized:
            drawn = fit(first, int(draw.uniform(SUMMARIZED_FROM, 1.0) * config.max_seq_len))
            end = min(end, max(drawn, learn + 1))
        windows.append(Window(first, learn, end, length(first, end), summarized=summarized))
        first, learn = overlap_start(until, first, end, 0.0 if summarized else config.overlap), end
    return windows


def overlap_start(until: np.ndarray, first: int, end: int, overlap: float) -> int:
    """The first unit of the longest tail of units[first:end] that has at most `overlap` of its tokens.

    until [U+1]: tokens before each unit. The streaming engine keeps the same tail when it refreshes its context.
    """
    share = overlap * (until[end] - until[first])
    return int(np.searchsorted(until[: end + 1], until[end] - share, side="left"))


def turn_pieces(said: Said, tokenizer: Tokenizer) -> list[Piece]:
    return tokenizer.template.turn(said.role, said.text) + tokenizer.template.suffix()


def summary_turns(summary: str, tokenizer: Tokenizer) -> tuple[list[Piece], list[Piece]]:
    """The request for a summary and the summary, as turns with what follows them."""
    template = tokenizer.template
    request = template.turn("user", SUMMARY_REQUEST) + template.suffix()
    return request, template.turn("assistant", summary) + template.suffix()


def unit_tokens(layout: Layout, tokenizer: Tokenizer, per_frame: int) -> np.ndarray:
    """Tokens of each unit, [U]: per_frame (I) <image> tokens a frame, and the texts."""
    tokens = np.diff(layout.units) * per_frame
    texts = [turn_pieces(said, tokenizer) for said in layout.said]
    np.add.at(tokens, units_of_texts(layout), tokenizer.count_tokens(texts))
    return tokens


def units_of_texts(layout: Layout) -> np.ndarray:
    """The unit in which each of layout.said stands, [number of texts]."""
    at = np.array([said.at for said in layout.said], np.int64)
    return np.searchsorted(layout.units, at, side="right") - 1


# ---- the text and its labels ---------------------------------------------------------------------


@dataclass
class Formatted:
    """A window as text, with the character ranges that become labels.

    pieces           the text in order, cut where control tokens and turns begin and end
    text             all pieces joined
    frames     [F]   absolute frame number of each frame shown
    frame_ends [F]   the character behind each frame's last <image>, where the frame is decided
    speaking_ranges, dst_ranges [n,2]   characters [begin, end) of the assistant / DST_UPDATE turns to be learned,
                     header and end token included; a turn in the window's repeated part is not among them
    speaking, dst, state [F]   decision labels of the frames, -100 in the repeated part
    """

    pieces: list[Piece]
    text: str
    frames: np.ndarray
    frame_ends: np.ndarray
    speaking_ranges: np.ndarray
    dst_ranges: np.ndarray
    speaking: np.ndarray
    dst: np.ndarray
    state: np.ndarray


def format_conversation_with_ranges(
    prompt: str,
    layout: Layout,
    window: Window,
    tokenizer: Tokenizer,
    per_frame: int = 1,
    silence_lm: bool = False,
    summary: str | None = None,
) -> Formatted:
    """Write a window's text and note, in the same pass, where each range of characters begins and ends.

        characters   0         1         2         3         4
                     0123456789012345678901234567890123456789012345
        text         <image>Assistant: Hi.<eos><image><image>           frame_ends       7, 33, 40
                            '-----------------'                         speaking_ranges  [7, 26)

    (The prompt, which stands in front, is left out of the drawing.) per_frame: I, the <image> tokens of one frame.
    summary: what the window ends with, after the request for it; learned like a reply.
    With silence_lm one more end token closes the sequence: a silent frame is taught that token as the one behind it
    (see label_tokens), and behind a window's last frame there would be none to carry the label.
    """
    in_window = np.repeat(window.shows(len(layout.units) - 1), np.diff(layout.units))  # [F] bool
    shown = np.flatnonzero(in_window)  # [F] indices into layout.frames
    learned = shown >= layout.units[window.learn]  # [F] the others are only repeated
    place = {at: f for f, at in enumerate(shown.tolist())}

    pieces = prompt_pieces(prompt, tokenizer)
    length = sum(len(piece.text) for piece in pieces)  # characters written so far
    written = 0  # frames written so far
    frame_ends = np.zeros(len(shown), np.int64)
    ranges: dict[str, list[tuple[int, int]]] = {"user": [], "DST_UPDATE": [], "assistant": []}

    def show(until: int) -> None:
        """Write the frames written..until-1, one run of <image> tokens."""
        nonlocal length, written
        if until > written:
            frame_ends[written:until] = length + np.arange(1, until - written + 1) * per_frame * len(IMAGE)
            pieces.append(Piece(IMAGE, control=True, repeat=(until - written) * per_frame))
            length, written = int(frame_ends[until - 1]), until

    for said in layout.said:
        if said.at not in place:
            continue
        f = place[said.at]
        show(f if said.before else f + 1)
        turn = tokenizer.template.turn(said.role, said.text)
        end = length + sum(len(piece.text) for piece in turn)
        if learned[f]:
            ranges[said.role].append((length, end))
        pieces += turn + tokenizer.template.suffix()
        length = end + len(tokenizer.template.after)
    show(len(shown))
    if summary is not None:
        request, answer = summary_turns(summary, tokenizer)
        begin = length + sum(len(piece.text) for piece in request)
        end = begin + sum(len(piece.text) for piece in answer) - len(tokenizer.template.after)
        ranges["assistant"].append((begin, end))
        pieces += request + answer
    if silence_lm:
        pieces.append(Piece(tokenizer.template.end, control=True))

    return Formatted(
        pieces=pieces,
        text="".join(piece.text * piece.repeat for piece in pieces),
        frames=layout.frames[shown],
        frame_ends=frame_ends,
        speaking_ranges=np.array(ranges["assistant"], np.int64).reshape(-1, 2),
        dst_ranges=np.array(ranges["DST_UPDATE"], np.int64).reshape(-1, 2),
        speaking=np.where(learned, layout.speaking[shown], IGNORE),
        dst=np.where(learned, layout.dst[shown], IGNORE),
        state=np.where(learned, layout.state[shown], IGNORE),
    )


@dataclass
class Sample:
    """One training sequence. input_ids [T], image_embeds [F*I, D], labels (LABEL_KEYS) [T] each, frames [F]."""

    clip_id: str
    video_id: str
    input_ids: np.ndarray
    image_embeds: np.ndarray
    labels: dict[str, np.ndarray]
    frames: np.ndarray  # absolute numbers, one a frame shown
    times: np.ndarray  # [F] of these frames, seconds of the video
    decision_positions: np.ndarray  # [F] where in input_ids each frame is decided
    formatted: Formatted = field(repr=False)


def make_sample(
    clip: Clip, layout: Layout, window: Window, embeddings: np.ndarray, tokenizer: Tokenizer, config: DataConfig
) -> Sample:
    """One window of a clip as arrays. embeddings: [rows, I, D], row r is frame clip.start_frame + r."""
    per_frame = embeddings.shape[1]
    prompt = window_prompt(clip, layout.first_frame(window.first), config, window.summarized and window.first > 0)
    summary = None
    if window.summarized and window.end < len(layout.units) - 1:
        summary = reference_summary(clip, layout.first_frame(window.end))
    formatted = format_conversation_with_ranges(
        prompt, layout, window, tokenizer, per_frame, config.silence_lm, summary
    )
    ids, starts = tokenizer.encode_pieces(formatted.pieces)
    labels, decided = label_tokens(formatted, ids, starts, config, tokenizer.end_id)
    rows = embeddings[formatted.frames - clip.start_frame]  # [F, I, D], in the order of the <image> tokens
    rows = rows.reshape(-1, rows.shape[-1])
    if int((ids == tokenizer.image_id).sum()) != len(rows):
        what = f"{int((ids == tokenizer.image_id).sum())} <image> tokens for {len(rows)} embedding rows"
        raise ProspectError(what, where=clip.where, remedy="one <image> a row")
    frames = formatted.frames
    return Sample(clip.id, clip.video_uid, ids, rows, labels, frames, clip.seconds(frames), decided, formatted)


def label_tokens(
    formatted: Formatted, ids: np.ndarray, starts: np.ndarray, config: DataConfig, end_id: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels aligned with the token ids [T], and where each frame is decided, [F].

    starts [T]: the character at which each token starts. A token belongs to the range in which it starts; a frame is
    decided at the last token that starts before its end, the last of its <image> tokens.

    `binary_at: text` labels the tokens of a turn's text: 1 on each of them, 0 at frames where neither head fires.
    `silence_lm` (ProAssist): such a frame is followed by "the turn is over". The label at t+1 is what the hidden state
    at t learns, so the end token is the label *behind* the frame, whatever token stands there.

        tokens                <f7>  <f8>  <f9>  <eos>          f7 a sampled negative, f8 not sampled, f9 sampled
        speaking_gen_labels   -100   eos  -100    eos
    """
    labels = {key: np.full(len(ids), IGNORE, np.int64) for key in LABEL_KEYS}
    decided = np.searchsorted(starts, formatted.frame_ends, side="left") - 1  # [F]
    speech = tokens_in_ranges(starts, formatted.speaking_ranges)  # [T] bool
    updates = tokens_in_ranges(starts, formatted.dst_ranges)
    negative = (formatted.speaking == 0) & ((formatted.dst == 0) | (not config.dst))  # [F] bool

    labels["speaking_gen_labels"][speech] = ids[speech]
    labels["dst_gen_labels"][updates] = ids[updates]
    if config.silence_lm:
        labels["speaking_gen_labels"][decided[negative] + 1] = end_id
    if config.binary_at == "frames":
        labels["speaking_labels"][decided] = formatted.speaking
        labels["dst_update_labels"][decided] = formatted.dst
    else:
        labels["speaking_labels"][speech] = 1
        labels["dst_update_labels"][updates] = 1
        labels["speaking_labels"][decided[negative]] = 0
        if config.dst:
            labels["dst_update_labels"][decided[negative]] = 0
    labels["dst_state_labels"][decided] = formatted.state
    return labels, decided


def tokens_in_ranges(starts: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Which tokens start inside one of the ranges [n,2] of characters (disjoint, increasing), [T] bool."""
    edges = np.searchsorted(starts, ranges.ravel(), side="left")
    change = np.zeros(len(starts) + 1, np.int64)
    np.add.at(change, edges[0::2], 1)
    np.add.at(change, edges[1::2], -1)
    return np.cumsum(change[:-1]) > 0


# ---- alternatives, off by default ----------------------------------------------------------------


def _turns_layout(clip: Clip, config: DataConfig, turns: list[Turn], labels: dict[str, np.ndarray]) -> Layout:
    """Each turn as its frames followed by its text; other frames are absent.

    Turns come in the order in which they end. One frame may be shown by several turns: each head decides it in the
    block of its own turn, where the text stands behind the last frame, and in another turn's block it is -100 for that
    head rather than 1. The user's text stands in front of the assistant's whole block.

        turns     user 193..194, assistant 193..195
        text      <f193> <f194> User: Hi. <f193> <f194> <f195> Assistant: Hello.
        speaking     0      0                0      0      1          (range: 1 1 1)

    Turns that share frames are one unit: a window that began between them would have to state the task in the prompt
    in the middle of a frame.
    """
    rows, speaking, dst, said, units = [], [], [], [], [0]
    unit_ends: list[int] = []  # the last frame that each unit covers
    for turn in sorted(turns, key=lambda turn: turn.end_frame):
        block = np.arange(turn.start_frame, turn.end_frame + 1) - clip.start_frame
        own = np.full(len(block), 1 if config.text_at == "range" else 0)
        own[-1] = 1
        others = {head: np.where(labels[head][block] == 1, IGNORE, labels[head][block]) for head in ("speaking", "dst")}
        speaking.append(own if turn.role == "assistant" else others["speaking"])
        dst.append(own if turn.role == "DST_UPDATE" else others["dst"])
        while unit_ends and turn.start_frame <= unit_ends[-1]:  # a long turn may reach over several earlier units
            unit_ends.pop()
            units.pop()
        rows.append(block)
        units.append(sum(map(len, rows)))
        unit_ends.append(turn.end_frame)
        text = write_update(turn.transitions, config.dst_format) if turn.role == "DST_UPDATE" else turn.text
        said.append(Said(turn.role, text, units[-1] - 1, before=False))
    if not rows:
        empty = np.zeros(0, np.int64)
        return Layout(empty, empty, empty, empty, [], np.zeros(1, np.int64))
    shown = np.concatenate(rows)
    return Layout(
        frames=shown + clip.start_frame,
        speaking=np.concatenate(speaking),
        dst=np.concatenate(dst),
        state=labels["state"][shown],
        said=said,
        units=np.array(units),
    )


def kept_frames(clip: Clip, config: DataConfig, seed: int) -> np.ndarray:
    """Absolute numbers of the frames that the stream layout shows, increasing.

    all; turns: only the frames of turns; hybrid: hybrid frame sampling (key frames, which are those of updates and the
    first and last of each step that has times; a window around speech; every n-th frame of a step, and of the clip; a
    random share of the rest; up to a cap per clip). A frame at which a text stands is kept in every mode. The random
    share is drawn for (seed, clip), the same in every epoch, so that lengths stay.

    turns and hybrid save time in training and have no counterpart live, for what is kept depends on what is said later.
    Events are more frequent among the frames kept, so probabilities learned there are too high for a stream. Validation
    and the search for thresholds therefore see every frame, as streaming does (data.as_streamed).
    """
    first, F = clip.start_frame, clip.num_frames
    if config.frames == "all":
        return np.arange(first, clip.end_frame + 1)
    rank = np.full(F, 6)  # lower is kept first when there are more than the cap

    def mark(begin: int, end: int, value: int, every: int = 1) -> None:
        begin += max(0, -((begin - first) // every)) * every  # not before the clip's first frame
        part = rank[begin - first : max(end - first + 1, 0) : every]
        np.minimum(part, value, out=part)

    turns = [turn for turn in clip.turns if turn.role != "system"]
    window = int(config.hybrid.speaking_window * clip.fps)
    for turn in turns:
        mark(turn.end_frame, turn.end_frame, 0)
        if config.frames == "turns" or turn.role == "DST_UPDATE":
            mark(turn.start_frame, turn.end_frame, 1)
        elif turn.role == "assistant":
            mark(turn.start_frame - window, turn.end_frame + window, 2)
    if config.frames == "turns":
        return first + np.flatnonzero(rank <= 1)
    for step in clip.steps:
        if step.start_ts is not None and step.end_ts is not None:
            begin, end = int(step.start_ts * clip.fps), int(step.end_ts * clip.fps)
            mark(begin, begin, 1)
            mark(end, end, 1)
            mark(begin, end, 3, every=config.hybrid.key_frame_interval)
    mark(first, clip.end_frame, 4, every=config.hybrid.regular_interval)
    rest = np.flatnonzero(rank == 6)
    draw = generator(seed, "hybrid", clip.id)
    rank[draw.choice(rest, size=int(config.hybrid.random_share * len(rest) + 0.5), replace=False)] = 5
    candidates = np.flatnonzero(rank < 6)
    texts = int((rank == 0).sum())
    cap = max(config.hybrid.max_frames_per_clip, texts)
    order = np.lexsort((draw.random(len(candidates)), rank[candidates]))  # by rank, at random within one
    return first + np.sort(candidates[order[:cap]])


RECENT_TURNS = 200  # the newest turns, which truncation keeps first


def _truncate(
    clip: Clip, layout: Layout, tokens: np.ndarray, prompt_length: Callable[[int], int], config: DataConfig
) -> Window:
    """One sequence by priority truncation: the newest turns, then task-state changes, instructions, the rest.

    Everything from the RECENT_TURNS-th newest text on comes first, so a clip of fewer texts keeps its newest stretch
    without a gap. Within a priority the newest units are kept. An update is never lost behind the first unit kept
    (nothing of a lower priority is taken before all updates are in), so the prompt's state and the updates agree.
    """
    U = len(tokens)
    priority = np.full(U, 3)
    for unit, said in zip(units_of_texts(layout), layout.said):
        priority[unit] = min(priority[unit], {"DST_UPDATE": 1, "assistant": 2, "user": 3}[said.role])
    recent = units_of_texts(layout)[-RECENT_TURNS:]
    priority[recent[0] if len(recent) == RECENT_TURNS else 0 :] = 0
    order = np.lexsort((-np.arange(U), priority))  # [U] by priority, the newest first
    for count in range(int(np.searchsorted(np.cumsum(tokens[order]), config.max_seq_len, side="right")), 0, -1):
        kept = np.sort(order[:count])
        total = prompt_length(int(kept[0])) + int(tokens[kept].sum())
        if total <= config.max_seq_len:
            return Window(int(kept[0]), int(kept[0]), U, total, tuple(kept.tolist()))
    what = "the prompt and the newest frame do not fit"
    raise ProspectError(what, where=clip.where, remedy=f"data.max_seq_len is {config.max_seq_len}: raise it")
