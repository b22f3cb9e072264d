"""The streaming engine: the trained model run live, frame by frame, with a KV cache and a bounded context.

    session = StreamSession(model, tokenizer, clip, config)     clip: the header (goal, steps, state at its start)
    session.say("What now?")                                    user text, placed before the next frame
    record = session.feed(embedding)                            one frame in, one record out

At every frame one forward pass puts the frame into the cache and the heads are read at it. prospect/decisions.py says
when they fire. If the update head fires, the turn's header is fed and the update generated, parsed, checked and
applied; then, if the speaking head fires, the reply is generated. The LM head is not touched on a silent frame. The
sequence that builds up in the cache is the one that training shows (prospect/sequence.py), token by token. It stays so
when the context is refreshed, by every strategy that was trained (`slide`, or with data.summaries the two that
summarize).

Two things make it fast without changing a record. *Look-ahead*: when frames are on disk already, K of them run in one
causal forward; everything behind the first frame that fires is rolled back, so a silent stretch costs one prefill.
*Several streams* share one cache, each at its own position.

Speaking by a head beside the LM head, and the strategies drop_all, drop_middle and summarize_and_drop, are ProAssist's
(arXiv 2506.05904).
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from prospect.clips import MAX_TEXT, Clip, unpaired_surrogate
from prospect.config import Config
from prospect.context import stream_room, summary_tokens, user_ids
from prospect.decisions import Evidence, Moments, decide
from prospect.dst import STATES, State, UpdateError, apply_update, legal_continuations, legal_updates, parse_update
from prospect.errors import ProspectError
from prospect.graph import ForwardGraph
from prospect.memory import check_fits
from prospect.model import Generated, KVCache, Prospect, sent
from prospect.sequence import clip_prompt, overlap_start, prompt_pieces, summary_prompt
from prospect.summaries import SUMMARY_REQUEST
from prospect.tokenizer import Piece, Tokenizer

DROP_MIDDLE_TAIL = 512  # tokens of the recent past that drop_middle keeps (ProAssist)


@dataclass
class ContextEvent:
    """A refresh of the context, noted in the record of the frame before which it happened."""

    strategy: str
    tokens_before: int
    tokens_after: int
    summary: str | None
    seconds: float


@dataclass
class FrameRecord:
    """What happened at one frame. Probabilities in 0..1, time in seconds of the video; None where nothing was said."""

    clip_id: str
    frame_idx: int
    time: float
    speaking_prob: float
    dst_update_prob: float | None  # None: a model without task state
    speaking_score: float  # what was compared with infer.evidence, see prospect/decisions.py
    dst_update_score: float | None
    speaking_decision: bool
    dst_update_decision: bool
    text: str | None  # what the assistant said
    dst_update: str | None  # the update as generated, applied unless invalid_update says why not
    dst_state: State  # after the frame
    step_state: str | None = None  # what the state head reads: the state of the most recently started step
    told: bool = False  # the reference decided here, not the heads
    user: list[str] = field(default_factory=list)  # what the user said right before the frame
    text_cut: str | None = None  # why a text was cut off: "limit" or "repetition"
    dst_update_cut: str | None = None
    invalid_update: str | None = None
    context_event: ContextEvent | None = None
    context_tokens: int = 0  # tokens in the cache after the frame

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Frame:
    """A frame that is about to be seen: its embedding [D] or [I, D], and what the user says right before it."""

    embedding: Tensor
    user: list[str] = field(default_factory=list)


@dataclass
class Unit:
    """A frame in the context and what is said at it, as it was fed and can be fed again: tokens and embedding rows."""

    before_ids: list[int]  # user turns
    rows: Tensor  # [I, D], on the CPU
    after_ids: list[int] = field(default_factory=list)  # update and reply, headers and end tokens included
    state_before: State = field(default_factory=dict)
    spoke: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.before_ids) + len(self.rows) + len(self.after_ids)

    def ids(self, image_id: int) -> list[int]:
        return [*self.before_ids, *[image_id] * len(self.rows), *self.after_ids]


class StreamSession:
    """One stream: its part of a cache, the frames in its context, its task state.

    cache, stream: a cache that several sessions share (make_cache), and this one's number in it; `advance` then runs
    them together. moments: the frames at which to write, where the heads are not to decide. Raises ProspectError when
    the settings leave no room for a frame and what may be said at it.
    """

    def __init__(
        self,
        model: Prospect,
        tokenizer: Tokenizer,
        clip: Clip,
        config: Config,
        *,
        cache: KVCache | None = None,
        stream: int = 0,
        moments: Moments | None = None,
    ):
        self.model, self.tokenizer, self.clip, self.config = model, tokenizer, clip, config
        self.cache = cache if cache is not None else make_cache(model, config, 1)
        self.stream, self.moments = stream, moments
        self.cache.clear(stream)
        self.state: State = dict(clip.initial_state) if config.data.dst else {}
        self.frame_idx = clip.start_frame  # of the next frame
        self.units: list[Unit] = []  # the frames in the context, oldest first
        self.pending: list[str] = []  # said by the user since the last frame
        self.evidence = Evidence()  # for the next decision
        self.limit = config.data.max_seq_len - config.infer.reserved  # a frame that would go beyond it brings a refresh
        self.headers = {role: tokenizer.encode(tokenizer.template.header(role)) for role in ("assistant", "DST_UPDATE")}
        self.end_ids = [tokenizer.end_id, *tokenizer.encode(tokenizer.template.suffix())]
        self.per_frame = 1  # tokens of a frame, as the last one had them
        unwritten = [id for id in tokenizer.control_ids() if id != tokenizer.end_id and id < model.config.vocab_size]
        unwritten += range(tokenizer.vocab_size, model.config.vocab_size)  # a padded vocabulary's rows, never trained
        self.forbidden = torch.tensor(unwritten, dtype=torch.long, device=self.cache.keys.device)  # inside a turn
        self._check_settings()
        self.room = stream_room(clip, tokenizer, config)  # of a frame and what the user says before it, at any time
        self._restart(clip_prompt(clip, clip.initial_state, config.data), [], 1)

    # ---- live use --------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """User text, placed before the next frame, as in training. Raises ProspectError where it cannot stand there."""
        text, where = text.strip(), f"frame {self.frame_idx}"
        if not text:
            raise ProspectError("the user said nothing", where=where, remedy="say some text")
        if what := unpaired_surrogate(text):
            raise ProspectError(f"the user's text {what}", where=where, remedy="send real Unicode")
        if len(text) > MAX_TEXT:  # before it is tokenized, which takes seconds for megabytes
            what = f"the user's text has {len(text)} characters, the context has room for {MAX_TEXT} at most"
            raise ProspectError(what, where=where, remedy="say less at once")
        self.check_room(len(user_ids(self.tokenizer, [*self.pending, text])) + self.per_frame)
        self.pending.append(text)

    def check_room(self, needed: int) -> None:
        """Raise ProspectError when a frame and the user's texts before it, so many tokens, would find no place."""
        room = self.limit - self.num_tokens if self.config.infer.strategy == "none" else self.room
        if needed > room:
            what = f"the user's text has {needed} tokens with its frame, the context has room for {room}"
            remedy = "say less at once, or raise data.max_seq_len"
            raise ProspectError(what, where=f"frame {self.frame_idx}", remedy=remedy)

    def feed(self, embedding: Tensor | np.ndarray) -> FrameRecord:
        """Show one frame, embedding [D] or [I, D]; returns what the assistant decided and said.

        Raises ProspectError at an embedding that cannot be used: of a wrong shape, or with values that are not finite
        or make the model's answer so. It is not counted, and the stream can go on. So it can when the frame has more
        vectors than those before it and leaves no room for what the user has said; that is forgotten. With
        infer.strategy=none it raises ProspectError from the frame on that finds the context full.
        """
        rows = torch.as_tensor(embedding).detach().to("cpu", copy=True)  # the caller may use its buffer again
        if not rows.isfinite().all():
            raise ProspectError("the embedding holds values that are not finite", where=f"frame {self.frame_idx}")
        frame = Frame(rows, self.pending)
        if frame.user:
            needed = self.unit(frame).num_tokens
            said, self.pending = self.pending, []  # forgotten if there is no room for it
            self.check_room(needed)
            self.pending = said  # an embedding that is refused below leaves it for the next
        [[record]] = advance([self], [[frame]])
        self.pending = []
        return record

    # ---- settings --------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        data, infer = self.config.data, self.config.infer
        if None in (infer.speaking_threshold, infer.dst_threshold, infer.evidence):
            what = "infer.speaking_threshold, infer.dst_threshold and infer.evidence are not all set"
            remedy = "set them, or load a checkpoint with prospect.load.load_for_inference"
            raise ProspectError(what, where="config", remedy=remedy)
        if data.dst != self.model.config.dst:
            what = f"data.dst is {data.dst}, but the model was made with {self.model.config.dst}"
            raise ProspectError(what, where="config", remedy="leave data.dst as the checkpoint has it")
        if infer.decision == "heads" and self.model.speaking_decision_head is None:
            what = "infer.decision is heads, but the model has no speaking head"
            raise ProspectError(what, where="config", remedy="infer.decision=lm")

    # ---- the context -----------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return self.cache.lengths[self.stream]

    @property
    def next_row(self) -> int:
        """Of the clip's embeddings: the next frame's row."""
        return self.frame_idx - self.clip.start_frame

    def unit(self, frame: Frame) -> Unit:
        rows = frame.embedding if frame.embedding.ndim == 2 else frame.embedding[None]  # [I, D]
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[-1] != self.model.config.vision_dim:
            wanted = f"[{self.model.config.vision_dim}] or [I, {self.model.config.vision_dim}]"
            what = f"an embedding of shape {list(frame.embedding.shape)}, a frame is {wanted}"
            raise ProspectError(what, where=f"{self.clip.where}, from frame {self.frame_idx} on")
        return Unit(user_ids(self.tokenizer, frame.user), rows)

    def refresh(self, needed: int) -> ContextEvent:
        """Make room for `needed` tokens, by the configured strategy. What is kept is fed again, from position 0 on.

        slide (ours) keeps the last `overlap` share under a prompt with the state at the first kept frame: exactly the
        windows of training. summarize_and_drop and summarize_with_dst begin like the windows of training with
        data.summaries. drop_all and drop_middle are there to compare. All but slide and summarize_with_dst know no task
        state: their prompt tells the one with which the stream began.
        """
        started, before = time.perf_counter(), self.num_tokens
        clip, data, strategy = self.clip, self.config.data, self.config.infer.strategy
        kept: list[Unit] = []
        summary = None
        if strategy == "none":
            what = f"the context is full at frame {self.frame_idx} ({before} of {data.max_seq_len} tokens)"
            raise ProspectError(what, where=clip.where, remedy="infer.strategy=slide, or raise data.max_seq_len")
        if strategy == "slide":
            prompt, kept = self._slide(needed)
        elif strategy == "drop_all":
            prompt = clip_prompt(clip, clip.initial_state, data)
        elif strategy == "drop_middle":
            prompt = clip_prompt(clip, clip.initial_state, data)
            kept = self._first_exchange_and_tail()
            while kept and self.prompt_tokens + sum(unit.num_tokens for unit in kept) + needed > self.limit:
                kept = kept[1:]  # a long text follows: it needs their room
        else:
            summary = self._summarize()
            state = self.state if strategy == "summarize_with_dst" else clip.initial_state
            prompt = summary_prompt(clip, state, data, summary)
            while summary and self._prompt_tokens(prompt) + needed > self.limit:
                summary = summary[: len(summary) // 2].rstrip()  # likewise
                prompt = summary_prompt(clip, state, data, summary)
        self._restart(prompt, kept, needed)
        return ContextEvent(strategy, before, self.num_tokens, summary, time.perf_counter() - started)

    def _prompt_tokens(self, prompt: str) -> int:
        [tokens] = self.tokenizer.count_tokens([prompt_pieces(prompt, self.tokenizer)])
        return tokens

    def _restart(self, prompt: str, kept: list[Unit], needed: int) -> None:
        """Empty the cache and feed the prompt and the kept frames and texts, in one forward."""
        tokens = self._prompt_tokens(prompt) + sum(unit.num_tokens for unit in kept)
        if tokens + needed > self.limit:
            what = f"{tokens} tokens of prompt and past and {needed} of the next frame do not fit into {self.limit}"
            remedy = "raise data.max_seq_len, lower infer.reserved, or shorten the text"
            raise ProspectError(what, where=f"{self.clip.where}, frame {self.frame_idx}", remedy=remedy)
        self.rebuild(prompt, kept)

    def rebuild(self, prompt: str, units: list[Unit]) -> None:
        """Make the context, and the cache, what a prompt and these frames and texts give."""
        ids = self.tokenizer.encode(prompt_pieces(prompt, self.tokenizer))
        self.prompt, self.prompt_tokens, self.units = prompt, len(ids), units
        for unit in units:
            ids += unit.ids(self.tokenizer.image_id)
            self.per_frame = len(unit.rows)
        self.cache.lengths[self.stream] = 0
        self._run(ids, rows_of(units) if units else None)

    @torch.inference_mode()
    def _run(self, ids: list[int], rows: Tensor | None) -> None:
        """Put tokens, and the embedding rows [F,D] of the <image>s among them, into the cache."""
        device = self.cache.keys.device
        rows = None if rows is None else sent(rows, device)
        self.model(sent([ids], device), rows, cache=self.cache, streams=[self.stream])

    def _slide(self, needed: int) -> tuple[str, list[Unit]]:
        """The prompt and the units of the next window, as prospect.data.plan_windows begins it."""
        until = np.cumsum([0] + [unit.num_tokens for unit in self.units])  # [U+1] tokens before each unit
        first = overlap_start(until, 0, len(self.units), self.config.data.overlap)
        while True:
            kept = self.units[first:]
            prompt = clip_prompt(self.clip, kept[0].state_before if kept else self.state, self.config.data)
            if not kept or self._prompt_tokens(prompt) + int(until[-1] - until[first]) + needed <= self.limit:
                return prompt, kept
            first += 1  # a long text follows: it needs the overlap's room

    def _first_exchange_and_tail(self) -> list[Unit]:
        """drop_middle: the frames at which something was said up to the first reply, and the last 512 tokens.

        In a small context the first exchange may take a quarter of the room, or is left out, and the tail a half.
        """
        room = self.limit - self.prompt_tokens
        reply = next((i for i, unit in enumerate(self.units) if unit.spoke), -1)
        exchange = [unit for unit in self.units[: reply + 1] if unit.before_ids or unit.after_ids]
        if sum(unit.num_tokens for unit in exchange) > room // 4:
            exchange = []
        first, tokens = len(self.units), 0
        while first > reply + 1 and tokens + self.units[first - 1].num_tokens <= min(DROP_MIDDLE_TAIL, room // 2):
            first -= 1
            tokens += self.units[first].num_tokens
        return exchange + self.units[first:]

    def _summarize(self) -> str:
        """Ask the model for a summary of the context, in the space that is kept free for what is said at a frame.

        Where the texts of the last frame already stand in that space, the summary is asked for in front of them.
        """
        before = self.num_tokens
        if before + summary_tokens(self.tokenizer, self.config) > self.config.data.max_seq_len:
            self.cache.lengths[self.stream] -= len(self.units[-1].after_ids)
        self._run(user_ids(self.tokenizer, [SUMMARY_REQUEST]), None)
        [turn] = generate([self], "assistant", self.config.infer.max_summary_tokens)
        self.cache.lengths[self.stream] = before
        return self.tokenizer.decode(turn.ids).strip()

    # ---- one frame -------------------------------------------------------------------------------

    def see(self, unit: Unit, frame: Frame, heads: "Heads", context_tokens: int) -> FrameRecord:
        """Take a frame into the context and decide at it; the texts, if any, are written afterwards.

        heads: what they read at the frame. context_tokens: tokens in the cache up to and with the frame.
        """
        infer = self.config.infer
        if not math.isfinite(heads.speaking + (heads.dst or 0.0)):
            self.cache.clear(self.stream, context_tokens - unit.num_tokens)  # as if the frame had not come
            what, remedy = "the model's answer is not finite", "check the embeddings' scale; or infer.precision=fp32"
            raise ProspectError(what, where=f"{self.clip.where}, frame {self.frame_idx}", remedy=remedy)
        may_update = heads.dst is not None and not (infer.constrain_dst and not legal_updates(self.state))
        asked = bool(frame.user)
        told = None if self.moments is None else self.moments.at(self.frame_idx)
        decision = decide(infer, self.evidence, heads.speaking, heads.dst if may_update else None, asked, told)
        unit.state_before, self.per_frame = self.state, len(unit.rows)
        self.units.append(unit)
        record = FrameRecord(
            clip_id=self.clip.id,
            frame_idx=self.frame_idx,
            time=self.clip.seconds(self.frame_idx),
            speaking_prob=heads.speaking,
            dst_update_prob=heads.dst,
            speaking_score=decision.speaking_score,
            dst_update_score=decision.dst_score,
            speaking_decision=decision.speak,
            dst_update_decision=decision.update,
            text=None,
            dst_update=None,
            dst_state=self.state,
            step_state=heads.step_state,
            told=told is not None,
            user=frame.user,
            context_tokens=context_tokens,
        )
        self.frame_idx += 1
        self.cache.lengths[self.stream] = context_tokens  # what was run beyond this frame is rolled back
        return record

    def wrote(self, role: str, turn: Generated, record: FrameRecord) -> None:
        """Note a generated turn in the context and in its frame's record; an update is applied if it is legal."""
        self.units[-1].after_ids += [*self.headers[role], *turn.ids, *self.end_ids]
        text = self.tokenizer.decode(turn.ids).strip()
        record.context_tokens = self.num_tokens
        if role == "assistant":
            record.text, record.text_cut, self.units[-1].spoke = text, turn.cut, True
            return
        record.dst_update, record.dst_update_cut = text, turn.cut
        try:
            self.state = apply_update(self.state, parse_update(text, self.config.data.dst_format))
        except UpdateError as error:
            record.invalid_update = str(error)
        record.dst_state = self.state


def make_cache(model: Prospect, config: Config, streams: int) -> KVCache:
    """A cache for so many streams. Raises ProspectError when this machine cannot hold it."""
    weight, capacity, c = model.lm_head.weight, config.data.max_seq_len, model.config
    if weight.device.type == "cpu":
        needed = (
            2 * c.num_hidden_layers * streams * c.num_key_value_heads * (capacity + 1) * c.head_dim * weight.itemsize
        )
        check_fits(needed, f"{streams} stream(s) of {capacity} tokens", "lower data.max_seq_len, or --streams")
    cache = KVCache(c, streams, capacity, weight.device, weight.dtype)
    if weight.is_cuda and not torch.is_autocast_enabled("cuda"):  # whose casts of the weights would be recorded, too
        cache.graph = ForwardGraph(model.model, cache)
    return cache


# ---- one step ------------------------------------------------------------------------------------


@torch.inference_mode()
def advance(sessions: list[StreamSession], upcoming: list[list[Frame]]) -> list[list[FrameRecord]]:
    """One step of several streams that share a cache: one forward over the frames that each may run ahead.

    upcoming: for each stream, the frames to come, at least one. Returns for each stream the records of the frames it
    has taken, at least one: silent ones, and possibly a last one at which it updated the state or spoke. What was run
    beyond that frame is rolled back.

        frames in the forward    f1 f2 f3 f4 f5 f6       f4 fires
        taken                    f1 f2 f3 f4             the cache is cut behind f4, the text is written there
    """
    session = sessions[0]
    chunks, events = zip(*[fitting(session, frames) for session, frames in zip(sessions, upcoming)])

    # One forward; decisions are read at each frame's last <image>.
    starts = [session.num_tokens for session in sessions]
    ends = [np.cumsum([unit.num_tokens for unit in chunk]) for chunk in chunks]  # tokens up to and with each frame
    heads = look(sessions, chunks, ends)  # [B][K]

    # Frames are taken one after another, up to the first at which something is to be written.
    records: list[list[FrameRecord]] = []
    for b, (session, chunk) in enumerate(zip(sessions, chunks)):
        taken: list[FrameRecord] = []
        for unit, frame, at_frame, end in zip(chunk, upcoming[b], heads[b], ends[b]):
            taken.append(session.see(unit, frame, at_frame, starts[b] + int(end)))
            if taken[-1].speaking_decision or taken[-1].dst_update_decision:
                break
        taken[0].context_event = events[b]
        records.append(taken)

    # First the update, then the reply that may rest on it, as training has them.
    last = [(session, taken[-1]) for session, taken in zip(sessions, records)]
    infer = session.config.infer
    write([pair for pair in last if pair[1].dst_update_decision], "DST_UPDATE", infer.max_update_tokens)
    write([pair for pair in last if pair[1].speaking_decision], "assistant", infer.max_reply_tokens)
    return records


def look(sessions: list[StreamSession], chunks: Sequence[list[Unit]], ends: list[np.ndarray]) -> list[list["Heads"]]:
    """Run the frames of each session's chunk, and read the heads at them, as lists [B][K]. ends: of each frame."""
    session, device = sessions[0], sessions[0].cache.keys.device
    streams = [session.stream for session in sessions]
    rows = rows_of([unit for chunk in chunks for unit in chunk])  # [F,D] of all streams
    each, K = len(chunks[0][0].rows), len(chunks[0])
    if all(len(chunk) == K and all(unit.num_tokens == len(unit.rows) == each for unit in chunk) for chunk in chunks):
        # Frames alone, alike in every stream: neither ids nor padding.
        image_embeds = sent(rows.unflatten(0, (len(sessions), -1)), device)  # [B,T,D]
        hidden = session.model(None, image_embeds, cache=session.cache, streams=streams)  # [B,T,H]
        hidden = hidden[:, each - 1 :: each]  # [B,K,H]
    else:
        # Right-padded to the longest.
        T, K = max(int(end[-1]) for end in ends), max(map(len, chunks))
        input_ids = torch.full((len(sessions), T), session.tokenizer.pad_id)
        read_at = torch.zeros((len(sessions), K), dtype=torch.long)
        for b, (chunk, end) in enumerate(zip(chunks, ends)):
            ids = [id for unit in chunk for id in unit.ids(session.tokenizer.image_id)]
            input_ids[b, : len(ids)] = torch.tensor(ids)
            read_at[b, : len(end)] = torch.from_numpy(end - 1)
        image_embeds = sent(rows, device)
        hidden = session.model(sent(input_ids, device), image_embeds, cache=session.cache, streams=streams)  # [B,T,H]
        hidden = hidden.gather(1, sent(read_at, device)[..., None].expand(-1, -1, hidden.shape[-1]))  # [B,K,H]
    return read_heads(session.model, hidden, session.config.infer.decision, session.tokenizer.end_id)


def rows_of(units: Sequence[Unit]) -> Tensor:  # [F,D]
    """The embedding rows of the units' frames, in one tensor."""
    with torch.autocast("cpu", enabled=False):  # which would refuse to concatenate float16
        return torch.cat([unit.rows for unit in units])


@dataclass
class Heads:
    """What the heads read at one frame: two probabilities, and the state of the most recently started step."""

    speaking: float
    dst: float | None  # None: a model without task state
    step_state: str | None  # None: a model without the state head


def read_heads(model: Prospect, hidden: Tensor, decision: str, end_id: int) -> list[list[Heads]]:
    """All heads at hidden [B,K,H], as lists [B][K], fetched from the device in one transfer."""
    found = model.decision_probabilities(hidden, decision, end_id)  # by head, [B,K]
    if model.dst_state_head is not None:
        found["state"] = model.dst_state_head(hidden).argmax(-1).to(found["speaking"].dtype)
    fetched = torch.stack(list(found.values()), -1).tolist()  # [B][K][heads]
    named = [[dict(zip(found, numbers)) for numbers in frames] for frames in fetched]
    return [
        [Heads(n["speaking"], n.get("dst"), STATES[int(n["state"])] if "state" in n else None) for n in frames]
        for frames in named
    ]


def write(deciding: list[tuple[StreamSession, FrameRecord]], role: str, limit: int) -> None:
    """Generate a turn of `role`, at most `limit` tokens, in each of the streams that decided on one, side by side."""
    if deciding:
        turns = generate([session for session, _ in deciding], role, limit)
        for (session, record), turn in zip(deciding, turns):
            session.wrote(role, turn, record)


def fitting(session: StreamSession, frames: list[Frame]) -> tuple[list[Unit], ContextEvent | None]:
    """As many of the frames as fit into the context; when not even one does, the context is refreshed."""
    units = [session.unit(frame) for frame in frames]
    until = np.cumsum([unit.num_tokens for unit in units])
    event = None
    if session.num_tokens + until[0] > session.limit:
        event = session.refresh(int(until[0]))
    return units[: int(np.searchsorted(until, session.limit - session.num_tokens, side="right"))], event


def generate(sessions: list[StreamSession], role: str, limit: int) -> list[Generated]:
    """One turn of `role`, of `limit` tokens at most, in each of the sessions, side by side."""
    first = sessions[0]
    constrained = role == "DST_UPDATE" and first.config.infer.constrain_dst
    return first.model.fast_greedy_generate(
        first.headers[role],
        first.cache,
        [session.stream for session in sessions],
        end_ids=first.end_ids,
        max_new_tokens=limit,
        forbidden=first.forbidden,
        allowed=[constraint(session) for session in sessions] if constrained else None,
    )


# ---- constrained updates -------------------------------------------------------------------------


def constraint(session: StreamSession) -> Callable[[list[int]], list[int]]:
    """Given the ids written so far, the ids that keep the update legal in the session's state and short enough."""
    tokenizer, data, state = session.tokenizer, session.config.data, session.state
    gap, vocabulary = tokenizer.template.gap, tokenizer.ascii_vocabulary

    @functools.cache
    def length(text: str) -> int:
        return len(tokenizer.encode([Piece(text)]))

    def allowed(ids: list[int]) -> list[int]:
        written = tokenizer.decode(ids)
        begun = "" if len(written) < len(gap) else written[len(gap) :]
        ahead = gap if len(written) < len(gap) else ""
        left = session.config.infer.max_update_tokens - len(ids) - 1  # tokens that may follow the next one
        choices = set()
        for rest in legal_continuations(begun, state, data.dst_format):
            if not ahead + rest:
                choices.add(tokenizer.end_id)
            for n in range(1, len(ahead + rest) + 1):
                token, behind = vocabulary.get((ahead + rest)[:n]), (ahead + rest)[n:]
                if token is not None and length(behind) <= left:
                    choices.add(token)
        return sorted(choices)

    return allowed


# ---- whole clips ---------------------------------------------------------------------------------


@dataclass
class Job:
    """A clip to be streamed: its header and user turns, its embeddings, and who decides when to write.

    source: the embeddings [rows, I, D], or what reads them. They are read when the clip's turn comes, so that of many
    clips few files are open and few arrays in memory.
    """

    clip: Clip
    source: np.ndarray | Callable[[], np.ndarray]
    moments: Moments | None = None  # None: the heads

    def __post_init__(self):
        self.num_frames = self.clip.num_frames if callable(self.source) else len(self.source)
        self.said: dict[int, list[str]] = {}  # by row: what the user says right before it
        for turn in self.clip.turns:
            if turn.role == "user":
                self.said.setdefault(turn.end_frame - self.clip.start_frame, []).append(turn.text)

    @property
    def embeddings(self) -> np.ndarray:
        """All of them, [rows, I, D], read again each time: keep them as long as they are needed."""
        return self.source() if callable(self.source) else self.source

    def frames(self, begin: int, count: int) -> list[Frame]:
        """Up to `count` frames from row `begin` on.

        They are views, read from the disk when they are fed. Copies, freed at the end of each clip among small things
        that stay, left the heap so full of holes that 2,000 clips could take 200 MB more than 200.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch reports that the rows are read-only, and nobody writes to them
            rows = torch.from_numpy(self.embeddings[begin : begin + count])  # [K, I, D]
        return [Frame(row, self.said.get(begin + k, [])) for k, row in enumerate(rows)]


def stream_jobs(
    model: Prospect, tokenizer: Tokenizer, jobs: Iterable[Job], config: Config, *, streams: int = 1
) -> Iterator[tuple[Job, list[FrameRecord]]]:
    """Stream clips whole, `streams` of them at once, looking ahead `infer.lookahead` frames.

    Yields (job, new records) as they come; a clip's last records are those of its last frame. When a clip ends, the
    next takes its place in the cache.
    """
    jobs = iter(jobs)
    cache = make_cache(model, config, streams)
    running: dict[int, tuple[Job, Job, StreamSession]] = {}  # by stream: the clip as given, and with its embeddings
    free = list(range(streams))
    while True:
        while free and (job := next(jobs, None)) is not None:
            stream = free.pop(0)
            session = StreamSession(model, tokenizer, job.clip, config, cache=cache, stream=stream, moments=job.moments)
            running[stream] = (job, replace(job, source=job.embeddings), session)
        if not running:
            return
        order = sorted(running)
        upcoming = [
            held.frames(session.next_row, config.infer.lookahead) for _, held, session in map(running.get, order)
        ]
        for stream, records in zip(order, advance([running[stream][2] for stream in order], upcoming)):
            job, _, session = running[stream]
            yield job, records
            if session.next_row == job.num_frames:
                del running[stream]
                free.append(stream)


def streamed_clips(
    model: Prospect, tokenizer: Tokenizer, jobs: Iterable[Job], config: Config, *, streams: int = 8
) -> Iterator[tuple[Job, list[dict]]]:
    """Each clip with the records of all its frames, as dicts, when it has ended."""
    collected: dict[int, list[dict]] = {}
    for job, records in stream_jobs(model, tokenizer, jobs, config, streams=streams):
        done = collected.setdefault(id(job), [])
        done += [record.to_dict() for record in records]
        if len(done) == job.num_frames:
            yield job, collected.pop(id(job))
