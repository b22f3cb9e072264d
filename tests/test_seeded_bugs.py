"""Bugs put into the product on purpose, one at a time: the naive engine, the labeller or the card must see each.

A bug is a few words of one function's source, replaced; they must stand there exactly once, so that no bug silently
stops being one. Only the function's code is exchanged, in place, so whoever has imported it runs the changed one.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import CodeType

import numpy as np
import pytest
import test_device
import test_labeller
import test_naive
from test_naive import Case

import train
from prospect import data, decisions, sequence, stream
from prospect.errors import ProspectError
from prospect.model import KVCache, Prospect, labelled, loss_sums, loss_terms, rope_tables
from prospect.stream import StreamSession, Unit

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in the source of `where`."""

    name: str
    where: Callable
    old: str
    new: str


def changed_code(bug: Bug) -> CodeType:
    """The function's code with the bug in it."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(bug.where)))
    assert source.count(bug.old) == 1, f"{bug.name}: {source.count(bug.old)} places for {bug.old!r}"
    compiled = compile(source.replace(bug.old, bug.new), inspect.getsourcefile(bug.where), "exec")
    [code] = [part for part in compiled.co_consts if isinstance(part, CodeType)]
    assert code.co_name == bug.where.__name__
    return code


def plant(bug: Bug, monkeypatch) -> None:
    monkeypatch.setattr(inspect.unwrap(bug.where), "__code__", changed_code(bug))


def ids(bugs: list[Bug]) -> dict:
    return {"argvalues": bugs, "ids": [bug.name for bug in bugs]}


# ---- seen by the naive engine --------------------------------------------------------------------

STREAMING = [
    Bug("what look-ahead has run is not rolled back", StreamSession.see,
        "self.cache.lengths[self.stream] = context_tokens", "pass"),
    Bug("the end token never enters the cache", Prospect.fast_greedy_generate,
        "self(sent([end_ids] * len(streams), device), cache=cache, streams=streams)", "pass"),
    Bug("the end token is missing where a text is fed again", StreamSession.wrote,
        "*turn.ids, *self.end_ids]", "*turn.ids]"),
    Bug("a turn without its header where it is fed again", StreamSession.wrote, "*self.headers[role], ", ""),
    Bug("a query does not see its own token", KVCache.slots, "> positions[..., None]", ">= positions[..., None]"),
    Bug("a query sees the token behind it", KVCache.slots, "> positions[..., None]", "> positions[..., None] + 1"),
    Bug("positions jump by one behind the prompt", KVCache.slots,
        "begins[:, None] +", "(begins + (begins > 0))[:, None] +"),
    Bug("streams side by side share one position", KVCache.slots, "begins[:, None] +", "begins[:1, None] +"),
    Bug("a refreshed context begins one position late", StreamSession.rebuild,
        "self.cache.lengths[self.stream] = 0", "self.cache.lengths[self.stream] = min(self.num_tokens, 1)"),
    Bug("a cache row is not cleared for the next clip", StreamSession.__init__,
        "self.cache.clear(stream)", "self.cache.lengths[stream] = 0"),
    Bug("the prompt's state is the clip's first at a slide", StreamSession._slide,
        "kept[0].state_before if kept else self.state", "self.clip.initial_state"),
    Bug("the prompt's state is the newest at a slide", StreamSession._slide,
        "kept[0].state_before if kept else self.state", "self.state"),
    Bug("a summary under a stale state", StreamSession.refresh,
        'self.state if strategy == "summarize_with_dst" else clip.initial_state', "clip.initial_state"),
    Bug("a summary without the recipe", sequence.summary_prompt, "replace(config, recipe=True)", "config"),
    Bug("the slide keeps one frame less", sequence.overlap_start,
        'side="left")', 'side="left").clip(max=end - 1) + 1'),
    Bug("drop_middle keeps too long a tail", StreamSession._first_exchange_and_tail, "room // 2", "room"),
    Bug("drop_middle keeps silent frames of the exchange", StreamSession._first_exchange_and_tail,
        " if unit.before_ids or unit.after_ids]", "]"),
    Bug("a context is refreshed one token early", stream.fitting,
        "session.num_tokens + until[0] > session.limit", "session.num_tokens + until[0] >= session.limit"),
    Bug("a user's text stands behind the frame", Unit.ids,
        "[*self.before_ids, *[image_id] * len(self.rows), *self.after_ids]",
        "[*[image_id] * len(self.rows), *self.before_ids, *self.after_ids]"),
    Bug("a user's text is heard twice", StreamSession.feed, "self.pending = []", "pass"),
    Bug("a user's text does not call for an answer", StreamSession.see, "bool(frame.user)", "False"),
    Bug("heads are read one token early, of frames alone", stream.look,
        "[:, each - 1 :: each]", "[:, each - 2 :: each]"),
    Bug("heads are read one token early", stream.look,
        "torch.from_numpy(end - 1)", "torch.from_numpy(end - 2).clamp(min=0)"),
    Bug("the reply comes before the update", stream.advance,
        'write([pair for pair in last if pair[1].dst_update_decision], "DST_UPDATE", infer.max_update_tokens)\n'
        '    write([pair for pair in last if pair[1].speaking_decision], "assistant", infer.max_reply_tokens)',
        'write([pair for pair in last if pair[1].speaking_decision], "assistant", infer.max_reply_tokens)\n'
        '    write([pair for pair in last if pair[1].dst_update_decision], "DST_UPDATE", infer.max_update_tokens)'),
    Bug("evidence is not reset when a text is written", decisions.decide,
        "evidence.speaking = evidence.dst = 0.0", "pass"),
    Bug("a threshold is not even odds", decisions.centred, "(1 - probability) * threshold", "1 - probability"),
    Bug("one head's firing does not reach the other", decisions.decide,
        "update = update or nearly(evidence.dst, infer)", "pass"),
    Bug("control tokens inside a text", Prospect.fast_greedy_generate,
        "index_fill_(1, forbidden,", "index_fill_(1, forbidden[:0],"),
    Bug("a text one token longer than allowed", Prospect.fast_greedy_generate,
        "len(turn.ids) == max_new_tokens", "len(turn.ids) > max_new_tokens"),
    Bug("updates that were legal at the clip's start", stream.constraint,
        "session.state", "session.clip.initial_state"),
    Bug("an update is parsed but not applied", StreamSession.wrote, "self.state = apply_update(", "apply_update("),
]  # fmt: skip


@pytest.fixture(scope="module")
def cases(tokenizer_dir) -> list[Case]:
    """A few small streams with what the bugs need: legal updates, full contexts of three strategies, several clips."""
    updating = dict(constrain_dst=True, max_update_tokens=60, decision="heads", max_reply_tokens=4)
    drawn = [(3, dict(strategy="summarize_with_dst", **updating))]
    drawn += [(14, dict(strategy="slide", more_room=more, **updating)) for more in (0, 60)]
    drawn += [(1, {}), (2, dict(strategy="drop_middle"))]
    found = [test_naive.random_case(seed, tokenizer_dir, **fixed).stream_naively() for seed, fixed in drawn]
    bare = test_naive.random_case(3, tokenizer_dir, strategy="summarize_with_dst", **updating)
    bare.config.data.recipe = False  # only a summary's prompt has it then
    found.append(bare.stream_naively())
    assert all(case.decided for case in found)
    return found


def compare_streams(cases: list[Case]) -> None:
    for case in cases:
        case = replace(case, draw=np.random.default_rng(0))
        test_naive.compare(case, test_naive.live(case), "live")
        test_naive.compare(case, test_naive.as_jobs(case, 7, 2), "look-ahead 7, 2 streams")


def test_without_a_bug_every_stream_is_right(cases):
    compare_streams(cases)


@pytest.mark.parametrize("bug", **ids(STREAMING))
def test_a_bug_in_streaming_is_seen(bug, cases, monkeypatch):
    plant(bug, monkeypatch)
    with pytest.raises((AssertionError, ProspectError)):  # other records, or none where there should be some
        compare_streams(cases)


# ---- seen by the labeller ------------------------------------------------------------------------

LABELS = [
    Bug("labels are shifted by one", sequence.label_tokens,
        '["speaking_gen_labels"][speech] = ids[speech]', '["speaking_gen_labels"][speech] = np.roll(ids, -1)[speech]'),
    Bug("the end token is not learned", sequence.format_conversation_with_ranges,
        "ranges[said.role].append((length, end))", "ranges[said.role].append((length, end - len(turn[-1].text)))"),
    Bug("a text is learned from its second token on", sequence.tokens_in_ranges, 'side="left"', 'side="right"'),
    Bug("the overlap is learned again", sequence.format_conversation_with_ranges,
        "layout.units[window.learn]", "layout.units[window.first]"),
    Bug("a window begins one frame late", sequence.overlap_start,
        'side="left")', 'side="left").clip(max=end - 1) + 1'),
    Bug("a window begins one frame early", sequence.overlap_start, 'side="left"))', 'side="left")) - (end > 1)'),
    Bug("a window ends one token early", sequence.plan_windows,
        "limit - prompt_length(first)", "limit - prompt_length(first) - 1"),
    Bug("the prompt's state is that behind the first frame", sequence.window_prompt,
        "clip.state_before(frame)", "clip.state_before(frame + 1)"),
    Bug("the prompt's state is the clip's first", sequence.window_prompt,
        "clip.state_before(frame)", "clip.initial_state"),
    Bug("decisions are labelled on the next frame", sequence.label_tokens,
        '[decided] = formatted.speaking', '[decided] = np.roll(formatted.speaking, 1)'),
    Bug("decisions are labelled one token early", sequence.label_tokens,
        '["dst_update_labels"][decided] = formatted.dst', '["dst_update_labels"][decided - 1] = formatted.dst'),
    Bug("the heads' labels are exchanged", sequence.frame_labels,
        'return labels[0], labels[1]', 'return labels[1], labels[0]'),
    Bug("1 behind the text as well", sequence.frame_labels, "place.at - first + 1", "place.last - first + 1"),
    Bug("1 up to the frame before the text", sequence.frame_labels, "place.at - first + 1", "place.at - first"),
    Bug("a frame of a turn that is not 0", sequence.frame_labels,
        "turn.end_frame - first + 1] = True", "turn.end_frame - first] = True"),
    Bug("more negatives than asked for", sequence.frame_labels, "int(rate * len(silent) + 0.5)", "len(silent)"),
    Bug("a user's text stands behind the frame", sequence.lay_out, "at, before=True)", "at, before=False)"),
    Bug("an answer before the user's text", sequence.text_places,
        "max([first, *(user for user in users if begin <= user <= end)])", "first"),
    Bug("a text before one that is due earlier", sequence.text_places, "[first, previous + 1, ", "[first, "),
    Bug("a text outside its window", sequence.text_places,
        "*edges[(edges > first) & (edges <= end)].tolist()", ""),
    Bug("a text before the middle of its turn", sequence.text_places,
        '"drawn": (begin + end + 1) // 2', '"drawn": begin'),
    Bug("updates that count from the end of their turn", sequence.lay_out,
        "clip.latest_step_state(lambda turn: places[turn.end_frame].at)", "clip.latest_step_state()"),
    Bug("silence is learned on the frame itself", sequence.label_tokens, "decided[negative] + 1", "decided[negative]"),
    Bug("silence where one head fires", sequence.label_tokens,
        "(formatted.speaking == 0) & ((formatted.dst == 0) | (not config.dst))", "formatted.speaking == 0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(plain, chatml, llama3) -> dict:
    return {"plain": plain, "chatml": chatml, "llama3": llama3}


def compare_labels(tokenizers: dict) -> None:
    for case in range(60):
        test_labeller.compare_one(case, tokenizers)


@pytest.mark.parametrize("bug", **ids(LABELS))
def test_a_bug_in_labels_is_seen(bug, tokenizers, monkeypatch):
    plant(bug, monkeypatch)
    with pytest.raises(AssertionError):
        compare_labels(tokenizers)


# ---- seen by the losses by hand ------------------------------------------------------------------

LOSSES = [
    Bug("the loss does not shift", labelled, "labels[:, 1:] if shift", "labels if shift"),
    Bug("the loss shifts twice", labelled, "labels[:, 1:] if shift", "labels[:, 2:] if shift"),
    Bug("decisions are shifted as well", labelled, "labels[:, 1:] if shift else labels", "labels[:, 1:]"),
]


@pytest.mark.parametrize("bug", **ids(LOSSES))
def test_a_bug_in_the_losses_is_seen(bug, plain, monkeypatch):
    plant(bug, monkeypatch)
    with pytest.raises(AssertionError):
        test_naive.compare_losses(0, plain)


# ---- seen by the pretended card ------------------------------------------------------------------

WAITS = [
    Bug("a loss is read in every micro-batch", train.train_step,
        "sums.append(", "of_batch['dst_gen'].item(), sums.append("),
    Bug("a step's numbers are read one by one", train.train_step, "torch.stack([loss, norm, *terms.values()]).tolist()",
        "[float(number) for number in (loss, norm, *terms.values())]"),
    Bug("an index of the host", loss_sums, "index_select(0, index)", "__getitem__(index.cpu())"),
    Bug("counts are copied", loss_terms, "counts[name].float()", "counts[name].to(sums[name].device).float()"),
    Bug("frames are placed by a mask", Prospect.joint_embed,
        "return embeds.flatten(0, 1).index_copy(0, places, frames.to(embeds.dtype)).view_as(embeds)",
        "return embeds.masked_scatter(is_image[..., None], frames.to(embeds.dtype))"),
    Bug("positions are made on the host", rope_tables, "torch.arange(num_positions, device=frequencies.device)",
        "torch.arange(num_positions).to(frequencies.device)"),
    Bug("copies that block", data.to_device, "non_blocking=True", "non_blocking=False"),
    Bug("batches that are not pinned", train.load_batches, 'ranks.device.type == "cuda"', "False"),
    Bug("more is copied than a forward reads", data.to_device, '("input_ids", "image_embeds")',
        '("input_ids", "image_embeds", "attention_mask")'),
]  # fmt: skip


@pytest.mark.parametrize("bug", **ids(WAITS))
def test_a_copy_or_a_wait_in_the_training_loop_is_seen(bug, tmp_path, monkeypatch):
    plant(bug, monkeypatch)
    with pytest.raises(AssertionError):
        test_device.compare_runs("fp32", tmp_path)
