"""A streaming engine as simple as can be: no cache, no look-ahead, one clip at a time. What the real one must equal.

At every frame the whole sequence so far (prompt, frames, texts) goes through the model from its first token, and again
for every token that is written. Decisions, turns, updates and the refresh of a full context are written here from their
descriptions, not from the engine's code. Only the prompt's wording, the turn templates and the tokenizer are shared.

    Naive(model, tokenizer, config).stream(clip, embeddings) -> one dict a frame, and why it ended early, if it did
"""

import functools
import itertools
import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from prospect.clips import Clip
from prospect.config import Config
from prospect.model import Prospect
from prospect.sequence import clip_prompt, prompt_pieces
from prospect.tokenizer import Piece, Tokenizer

MOVES = {"start": ("not_started", "in_progress"), "complete": ("in_progress", "completed")}
STATES = ("not_started", "in_progress", "completed")

REQUEST = "Summarize what has been done so far."

Token = tuple[int, torch.Tensor | None]  # an id, and the embedding row [D] of an <image>


@dataclass
class Seen:
    """A frame in the context: the state before it, its tokens with what was said at it, and whether it was spoken."""

    state: dict[str, str]
    tokens: list[Token]
    replied: bool = False


def size(past: list[Seen]) -> int:
    return sum(len(seen.tokens) for seen in past)


class Refused(Exception):
    """The next frame finds no place: "full" with the strategy none, else "do not fit"."""


def logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


def against(p: float, threshold: float) -> float:
    """p with its odds divided by the threshold's."""
    if threshold in (0, 1):
        return 1.0 - threshold
    odds = p / (1 - p) / (threshold / (1 - threshold))
    return odds / (1 + odds)


class Naive:
    """margin: how near any choice came to falling the other way; below 1e-5, rounding may decide it."""

    def __init__(self, model: Prospect, tokenizer: Tokenizer, config: Config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.margin = math.inf
        texts = {id: tokenizer.decode([id]) for id in range(tokenizer.vocab_size) if id not in tokenizer.control_ids()}
        self.ascii = {text: id for id, text in texts.items() if text.isascii() and text.isprintable()}
        self.longest = max(map(len, self.ascii))
        self.needed = functools.cache(lambda text: len(tokenizer.encode([Piece(text)])))  # tokens of a text

    # ---- the model ---------------------------------------------------------------------------------

    @torch.no_grad()
    def hidden(self, tokens: list[Token]) -> torch.Tensor:
        """The last hidden state [H] of one forward over everything."""
        rows = [row for _, row in tokens if row is not None]
        return self.model(torch.tensor([[id for id, _ in tokens]]), torch.stack(rows) if rows else None)[0, -1]

    def near(self, values: torch.Tensor) -> None:
        """Note the distance of the best two of the values."""
        first, second = values.topk(2).values.tolist()
        self.margin = min(self.margin, first - second)

    @torch.no_grad()
    def read(self, tokens: list[Token]) -> tuple[float, float | None, str | None]:
        """Probabilities of speaking and updating, and the state head's state, behind the last token."""
        hidden, model = self.hidden(tokens), self.model
        if self.config.infer.decision == "lm":
            speaking = 1 - model.lm_head(hidden).softmax(-1)[self.tokenizer.end_id].item()
        else:
            speaking = torch.sigmoid(model.speaking_decision_head(hidden)).item()
        dst = torch.sigmoid(model.dst_update_head(hidden)).item() if self.config.data.dst else None
        if model.dst_state_head is None:
            return speaking, dst, None
        scores = model.dst_state_head(hidden)
        self.near(scores)
        return speaking, dst, STATES[int(scores.argmax())]

    # ---- turns -------------------------------------------------------------------------------------

    def turn(self, role: str, text: str) -> list[Token]:
        template = self.tokenizer.template
        return self.tokens(template.turn(role, text) + template.suffix())

    def tokens(self, pieces) -> list[Token]:
        return [(id, None) for id in self.tokenizer.encode(pieces)]

    @torch.no_grad()
    def write(
        self, context: list[Token], role: str, state: dict[str, str], limit: int
    ) -> tuple[list[Token], str, str | None]:
        """A turn written greedily behind the context: its tokens, its text, and why it was cut."""
        infer, template, end = self.config.infer, self.tokenizer.template, self.tokenizer.end_id
        legal = None
        if role == "DST_UPDATE" and infer.constrain_dst:
            legal = [template.gap + update for update in self.legal_texts(state)]
        header, written, cut = self.tokens(template.header(role)), [], None
        while True:
            logits = self.model.lm_head(self.hidden(context + header + [(id, None) for id in written])).clone()
            forbidden = [id for id in self.tokenizer.control_ids() if id != end and id < len(logits)]
            logits[forbidden + list(range(self.tokenizer.vocab_size, len(logits)))] = -torch.inf
            if legal is not None:
                so_far, left = self.tokenizer.decode(written), limit - len(written) - 1
                rests = [whole.removeprefix(so_far) for whole in legal if whole.startswith(so_far)]
                allowed = [end] if "" in rests else []
                for text in {rest[:n] for rest in rests for n in range(1, self.longest + 1)} & self.ascii.keys():
                    behind = [rest.removeprefix(text) for rest in rests if rest.startswith(text)]
                    if min(map(self.needed, behind)) <= left:  # some update ends in time
                        allowed.append(self.ascii[text])
                logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
            if logits.isfinite().sum() > 1:
                self.near(logits)
            token = int(logits.argmax())
            if token == end:
                break
            if len(written) == limit:
                cut = "limit"
                break
            if legal is None and self.loops(written):
                cut = "repetition"
                break
            written.append(token)
        ids = [(id, None) for id in [*written, end]] + self.tokens(template.suffix())
        return header + ids, self.tokenizer.decode(written).strip(), cut

    @staticmethod
    def loops(ids: list[int]) -> bool:
        """The same stretch of at most 16 tokens four times or more at the end, and 16 tokens of it or more."""
        for size in range(1, 17):
            times = 0
            while times * size < len(ids) and ids[len(ids) - (times + 1) * size :][:size] == ids[-size:]:
                times += 1
            if times >= 4 and times * size >= 16:
                return True
        return False

    # ---- updates -----------------------------------------------------------------------------------

    def legal_texts(self, state: dict[str, str]) -> list[str]:
        """Every update that is legal now, of any number of transitions, as text."""
        found, grow = [], [([], state)]
        while grow:
            moves, now = grow.pop()
            for id, name in itertools.product(now, MOVES):
                if now[id] == MOVES[name][0]:
                    grow.append((moves + [(id, name)], now | {id: MOVES[name][1]}))
            if moves:
                found.append(moves)
        if self.config.data.dst_format == "json":
            return [json.dumps([{"id": id, "transition": name} for id, name in moves]) for moves in found]
        return [", ".join(f"{id}->{name}" for id, name in moves) for moves in found]

    def apply(self, text: str, state: dict[str, str]) -> dict[str, str] | None:
        """The state after an update, None for one that cannot be read or is not legal."""
        if self.config.data.dst_format == "json":
            try:
                moves = [(move["id"], move["transition"]) for move in json.loads(text)]
            except (ValueError, TypeError, KeyError):
                return None
        else:
            parts = [re.fullmatch(r"\s*([^,>]*[^,>\s-])\s*->\s*([a-z]+)\s*", part) for part in text.split(",")]
            if not all(parts):
                return None
            moves = [part.groups() for part in parts]
        for id, name in moves:
            if name not in MOVES or state.get(id) != MOVES[name][0]:
                return None
            state = state | {id: MOVES[name][1]}
        return state if moves else None

    # ---- a clip ------------------------------------------------------------------------------------

    def stream(self, clip: Clip, embeddings: np.ndarray, told: bool = False) -> tuple[list[dict], str | None]:
        """Records of the frames, embeddings [F, I, D], up to one that finds no place; and why it finds none.

        told: something is written at the last frame of each of the clip's replies and updates, whatever the heads read.
        """
        records: list[dict] = []
        try:
            self.stream_into(records, clip, embeddings, told)
        except Refused as refused:
            return records, str(refused)
        return records, None

    def stream_into(self, records: list[dict], clip: Clip, embeddings: np.ndarray, told: bool) -> None:
        data, infer = self.config.data, self.config.infer
        state = dict(clip.initial_state) if data.dst else {}
        prompt, past = self.prompt(clip, clip.initial_state), list[Seen]()
        if len(prompt) + 1 > data.max_seq_len - infer.reserved:
            raise Refused("do not fit")
        speaking_score = dst_score = 0.0
        for number, rows in enumerate(torch.from_numpy(embeddings)):
            frame = clip.start_frame + number
            user = [turn.text for turn in clip.turns if turn.role == "user" and turn.end_frame == frame]
            new = [token for text in user for token in self.turn("user", text)]
            new += [(self.tokenizer.image_id, row) for row in rows]

            # A full context starts anew.
            before, event = len(prompt) + size(past), None
            if before + len(new) > data.max_seq_len - infer.reserved:
                prompt, past, summary = self.refresh(clip, state, prompt, past, len(new))
                after = len(prompt) + size(past)
                if after + len(new) > data.max_seq_len - infer.reserved:
                    raise Refused("do not fit")
                event = dict(strategy=infer.strategy, tokens_before=before, tokens_after=after, summary=summary)
            past.append(Seen(state, new))

            # The heads, read at the frame's last <image>. Scores are running means; behind a user, of this frame alone.
            context = prompt + [token for seen in past for token in seen.tokens]
            speaking, dst, step_state = self.read(context)
            # A head's own threshold counts as even odds: the odds are divided by its odds first.
            weight = 1.0 if user else infer.smoothing
            speaking_score = weight * against(speaking, infer.speaking_threshold) + (1 - weight) * speaking_score
            heads = {"speaking": speaking_score}
            if dst is not None and (not infer.constrain_dst or any(now != "completed" for now in state.values())):
                dst_score = weight * against(dst, infer.dst_threshold) + (1 - weight) * dst_score
                heads["dst"] = dst_score
            fired = {head for head, score in heads.items() if score >= infer.evidence}
            if fired and infer.coupling:
                distances = {head: logit(infer.evidence) - logit(score) for head, score in heads.items()}
                self.margin = min([self.margin, *(abs(distance - infer.coupling) for distance in distances.values())])
                fired |= {head for head, distance in distances.items() if distance <= infer.coupling}
            self.margin = min([self.margin, *(abs(score - infer.evidence) for score in heads.values())])
            if told:
                due = {turn.role for turn in clip.turns if turn.role != "system" and turn.end_frame == frame}
                fired = {head for head in heads if {"speaking": "assistant", "dst": "DST_UPDATE"}[head] in due}
            record = dict(
                frame_idx=frame, time=frame / clip.fps, speaking_prob=speaking, dst_update_prob=dst,
                speaking_score=speaking_score, dst_update_score=dst_score if "dst" in heads else None,
                speaking_decision="speaking" in fired, dst_update_decision="dst" in fired, text=None, text_cut=None,
                dst_update=None, dst_update_cut=None, invalid=None, step_state=step_state, told=told, user=user,
                event=event,
            )  # fmt: skip
            if fired:
                speaking_score = dst_score = 0.0

            # First the update, then the reply that may rest on it.
            if "dst" in fired:
                limit = infer.max_update_tokens
                tokens, record["dst_update"], record["dst_update_cut"] = self.write(context, "DST_UPDATE", state, limit)
                new, context = new + tokens, context + tokens
                after = self.apply(record["dst_update"], state)
                record["invalid"], state = after is None, state if after is None else after
            if "speaking" in fired:
                limit = infer.max_reply_tokens
                tokens, record["text"], record["text_cut"] = self.write(context, "assistant", state, limit)
                new, context = new + tokens, context + tokens
            past[-1].tokens, past[-1].replied = new, "speaking" in fired
            records.append(record | {"dst_state": state, "context_tokens": len(context)})

    # ---- a full context ------------------------------------------------------------------------------

    def prompt(self, clip: Clip, state: dict, recipe: bool = False, summary: str = "") -> list[Token]:
        data = replace(self.config.data, recipe=recipe or self.config.data.recipe)
        return self.tokens(prompt_pieces(clip_prompt(clip, state, data, summary), self.tokenizer))

    def refresh(
        self, clip: Clip, state: dict, prompt: list[Token], past: list[Seen], needed: int
    ) -> tuple[list[Token], list[Seen], str | None]:
        """The new prompt, what is kept of the past, and the summary. needed: tokens of the frame that has no place."""
        strategy, room = self.config.infer.strategy, self.config.data.max_seq_len - self.config.infer.reserved
        if strategy == "none":
            raise Refused("full")
        if strategy == "slide":
            return *self.slide(clip, state, past, needed), None
        first_prompt = self.prompt(clip, clip.initial_state)
        if strategy == "drop_all":
            return first_prompt, [], None
        if strategy == "drop_middle":
            past = self.without_middle(past, room - len(prompt))
            while past and len(first_prompt) + size(past) + needed > room:
                past = past[1:]
            return first_prompt, past, None
        summary = self.summary(prompt, past)
        now = state if strategy == "summarize_with_dst" else clip.initial_state
        while summary and len(self.prompt(clip, now, recipe=True, summary=summary)) + needed > room:
            summary = summary[: len(summary) // 2].rstrip()  # half of it, and again
        return self.prompt(clip, now, recipe=True, summary=summary), [], summary

    def slide(self, clip: Clip, state: dict, past: list[Seen], needed: int) -> tuple[list[Token], list[Seen]]:
        """The last `overlap` share of the past, less where the next frame would not fit, and its prompt."""
        data = self.config.data
        share = data.overlap * size(past)
        while past and size(past) > share:
            past = past[1:]
        while True:
            prompt = self.prompt(clip, past[0].state if past else state)
            if not past or len(prompt) + size(past) + needed <= data.max_seq_len - self.config.infer.reserved:
                return prompt, past
            past = past[1:]

    def without_middle(self, past: list[Seen], room: int) -> list[Seen]:
        """What was said up to the first reply, with its frames, if that takes a quarter of the room at most; and the
        newest frames after it, in 512 tokens and in half of the room."""
        replies = [number for number, seen in enumerate(past) if seen.replied]
        exchange, tail = list[Seen](), past
        if replies:
            exchange, tail = past[: replies[0] + 1], past[replies[0] + 1 :]
            exchange = [seen for seen in exchange if any(row is None for _, row in seen.tokens)]
            if size(exchange) > room // 4:
                exchange = []
        while size(tail) > min(512, room // 2):
            tail = tail[1:]
        return exchange + tail

    def summary(self, prompt: list[Token], past: list[Seen]) -> str:
        """What the model answers when asked for a summary; in front of the last frame's texts where there is no room
        behind them."""
        context = prompt + [token for seen in past for token in seen.tokens]
        request = self.turn("user", REQUEST)
        around = len(self.tokens(self.tokenizer.template.header("assistant"))) + 1
        around += len(self.tokens(self.tokenizer.template.suffix()))
        limit = self.config.infer.max_summary_tokens
        if len(context) + len(request) + around + limit > self.config.data.max_seq_len:
            while context[-1][1] is None:
                context = context[:-1]
        return self.write(context + request, "assistant", {}, limit)[1]
