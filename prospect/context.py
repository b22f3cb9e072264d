"""What fits into the context of a stream, found before anything is trained or streamed.

    0                                                                        limit                  max_seq_len
    |  prompt  |  frames, and what was said at them  ..........................  |  infer.reserved  |
                                                                                   what is written at one frame

A frame that would go beyond the limit brings a refresh of the context (prospect/stream.py). What is kept then gives way
to a long text: frames, and a summary. The prompt does not. So a frame and what the user says before it always find
their place if they fit between the longest prompt that can come and the limit: the *room* of a clip's stream.
"""

from dataclasses import replace

from prospect.clips import Clip
from prospect.config import Config
from prospect.dst import STATES, TRANSITIONS, Transition, write_update
from prospect.errors import ProspectError
from prospect.sequence import clip_prompt, prompt_pieces
from prospect.summaries import SUMMARY_REQUEST
from prospect.tokenizer import Piece, Tokenizer

# ---- tokens of turns -----------------------------------------------------------------------------


def user_ids(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """User turns, one after another, as training has them."""
    template = tokenizer.template
    return [id for text in texts for id in tokenizer.encode(template.turn("user", text) + template.suffix())]


def update_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of an update's text behind its header, as training has them."""
    return tokenizer.encode([Piece(tokenizer.template.gap + text)])


def turn_tokens(tokenizer: Tokenizer, role: str, content: int) -> int:
    """Tokens of a turn that is written: its header, `content` tokens, its end token and what the template adds."""
    template = tokenizer.template
    return len(tokenizer.encode(template.header(role))) + content + 1 + len(tokenizer.encode(template.suffix()))


def summary_tokens(tokenizer: Tokenizer, config: Config) -> int:
    """Tokens of the request for a summary and of the longest answer."""
    summary = turn_tokens(tokenizer, "assistant", config.infer.max_summary_tokens)
    return len(user_ids(tokenizer, [SUMMARY_REQUEST])) + summary


# ---- what is refused -----------------------------------------------------------------------------


def check_reserved(tokenizer: Tokenizer, config: Config) -> None:
    """Raise ProspectError when infer.reserved cannot hold what may be written at one frame."""
    infer = config.infer
    needed = turn_tokens(tokenizer, "assistant", infer.max_reply_tokens)
    if config.data.dst:
        needed += turn_tokens(tokenizer, "DST_UPDATE", infer.max_update_tokens)
    if infer.strategy.startswith("summarize"):
        needed = max(needed, summary_tokens(tokenizer, config))
    if needed > infer.reserved:
        what = f"infer.reserved {infer.reserved} cannot hold what may be said at a frame, {needed} tokens"
        longest = "max_summary_tokens" if infer.strategy.startswith("summarize") else "max_reply_tokens"
        remedy = f"set infer.reserved={needed}, or lower infer.{longest}"
        raise ProspectError(what, where="config", remedy=remedy)


def longest_prompt(clip: Clip, tokenizer: Tokenizer, config: Config) -> int:
    """Tokens of the longest prompt that a stream of this clip can come to, without its summary.

    The prompt tells each step's state in a word, so it is longest when all steps are in the state of the longest word.
    """
    data, strategy = config.data, config.infer.strategy
    prompts = [clip_prompt(clip, clip.initial_state, data)]  # with which it begins
    if strategy.startswith("summarize"):
        data = replace(data, recipe=True)
        prompts.append(clip_prompt(clip, clip.initial_state, data))
    if strategy not in ("none", "drop_all", "drop_middle", "summarize_and_drop"):  # which tell the first state alone
        prompts += [clip_prompt(clip, dict.fromkeys(clip.initial_state, state), data) for state in STATES]
    return max(tokenizer.count_tokens([prompt_pieces(prompt, tokenizer) for prompt in prompts]))


def stream_room(clip: Clip, tokenizer: Tokenizer, config: Config, per_frame: int = 1) -> int:
    """Tokens that a frame and what the user says before it may have at any time, per_frame of them for the frame.

    Raises ProspectError when no frame would find its place, or, with infer.constrain_dst, no update.
    """
    data, infer = config.data, config.infer
    check_reserved(tokenizer, config)
    prompt, limit = longest_prompt(clip, tokenizer, config), data.max_seq_len - infer.reserved
    if prompt + per_frame > limit:
        what = f"{prompt} tokens of the prompt and {per_frame} of a frame do not fit into {limit}"
        remedy = "raise data.max_seq_len, lower infer.reserved, or shorten the clip's steps or recipe"
        raise ProspectError(what, where=clip.where, remedy=remedy)
    if data.dst and infer.constrain_dst:
        single = [
            write_update([Transition(id, name)], data.dst_format) for id in clip.initial_state for name in TRANSITIONS
        ]
        if not "".join(single).isascii():
            remedy = "rename the steps, or set infer.constrain_dst=false"
            raise ProspectError("infer.constrain_dst needs step ids in ASCII", where=clip.where, remedy=remedy)
        needed = max((len(update_ids(tokenizer, text)) for text in single), default=0)
        if needed > infer.max_update_tokens:
            what = f"infer.max_update_tokens {infer.max_update_tokens} cannot hold one update, {needed} tokens"
            raise ProspectError(what, where=clip.where, remedy=f"set infer.max_update_tokens={needed}")
    return limit - prompt


def check_streamable(clip: Clip, per_frame: int, tokenizer: Tokenizer, config: Config) -> None:
    """Raise ProspectError when a clip's stream would be refused, at its start or at a frame at which the user speaks.

    per_frame: <image> tokens of a frame. With infer.strategy=none all frames have to fit; what the model will write
    between them is not known.
    """
    room = stream_room(clip, tokenizer, config, per_frame)
    said: dict[int, list[str]] = {}
    for turn in clip.turns:
        if turn.role == "user":
            said.setdefault(turn.end_frame, []).append(turn.text)
    needed = {frame: len(user_ids(tokenizer, texts)) + per_frame for frame, texts in said.items()}
    remedy = "raise data.max_seq_len, lower infer.reserved, or shorten the text"
    for frame, tokens in needed.items():
        if tokens > room:
            what = f"what the user says at frame {frame} has {tokens} tokens with the frame, and room for {room}"
            raise ProspectError(what, where=clip.where, remedy=remedy)
    whole = sum(needed.values()) + per_frame * (clip.num_frames - len(needed))
    if config.infer.strategy == "none" and whole > room:
        what = f"the clip has {whole} tokens, and room for {room}: with infer.strategy=none the context would be full"
        raise ProspectError(what, where=clip.where, remedy="infer.strategy=slide, or raise data.max_seq_len")
