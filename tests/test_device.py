"""The real code with its tensors on a pretended card (tests/device_counts.py): on the right device, and never waiting.

What is not covered is said there.
"""

import collections

import numpy as np
import pytest
import test_naive
import torch
from conftest import raw_clip, read
from device_counts import Counts, PretendedCard, pretended_card
from test_model import make_model
from test_model import test_rows_at_different_positions_and_rollback as streams_at_different_positions
from test_stream import VISION, random_model, stream_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from prospect import graph
from prospect.model import KVCache
from prospect.stream import Frame, StreamSession, advance, make_cache

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")


@pytest.fixture
def card(monkeypatch):
    """A card whose graphs are not recorded: what would be replayed runs again, on the same buffers."""
    monkeypatch.setattr(graph, "recorded", lambda forward: forward)
    with pretended_card() as card:
        yield card


# ---- the card that is pretended ------------------------------------------------------------------

SEEN = {
    "a copy": (lambda card, x: torch.ones(2).to(card), Counts(1, 1)),
    "a copy called non_blocking, but not pinned": (
        lambda card, x: torch.ones(2).to(card, non_blocking=True), Counts(1, 1)),
    "a pinned copy that blocks": (lambda card, x: torch.ones(2).pin_memory().to(card), Counts(1, 1)),
    "a pinned copy": (lambda card, x: torch.ones(2).pin_memory().to(card, non_blocking=True), Counts(1, 0)),
    "copy_ to the card": (lambda card, x: x.copy_(torch.ones(3)), Counts(1, 1)),
    "copy_ to the host": (lambda card, x: torch.ones(3).copy_(x), Counts(1, 1)),
    "pinned copy_ to the card": (lambda card, x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True), Counts(1, 0)),
    "a list made a tensor": (lambda card, x: torch.tensor([1, 2], device=card), Counts(1, 1)),
    "cpu": (lambda card, x: x.cpu(), Counts(1, 1)),
    "to cpu": (lambda card, x: x.to("cpu", torch.float64), Counts(1, 1)),
    "like a tensor of the host": (lambda card, x: x.to(torch.ones(1)), Counts(1, 1)),
    "tolist": (lambda card, x: x.tolist(), Counts(1, 1)),
    "item": (lambda card, x: x[0].item(), Counts(0, 1)),
    "float": (lambda card, x: float(x.sum()), Counts(0, 1)),
    "if": (lambda card, x: bool((x > 0).any()), Counts(0, 1)),
    "nonzero": (lambda card, x: x.nonzero(), Counts(0, 1)),
    "a mask as an index": (lambda card, x: x[x > 0], Counts(0, 1)),
    "an index of the host": (lambda card, x: x[torch.tensor([0, 1])], Counts(1, 1)),
    "an index of the host, written": (lambda card, x: x.__setitem__(torch.tensor([0]), 1.0), Counts(1, 1)),
    "a tensor where it already is": (lambda card, x: x.to(card).to(x), Counts(0, 0)),
    "a tensor made there": (lambda card, x: torch.arange(3, device=card) + x.new_zeros(()), Counts(0, 0)),
    "a number of the host": (lambda card, x: x * torch.tensor(2.0), Counts(0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("what", SEEN)
def test_what_passes_between_host_and_card_is_counted(card, what):
    x = torch.arange(3.0, device=card.device)
    action, expected = SEEN[what]
    action(card.device, x)
    assert card.counts() == expected, card.report()
    assert x.device == card.device and (x + 1).device == card.device and x.cpu().device.type == "cpu"


def test_tensors_of_the_host_and_of_the_card_do_not_mix(card):
    x = torch.ones(3, device=card.device)
    for action in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: torch.ones(3)[x.long()]):
        with pytest.raises(AssertionError, match="of the host"):
            action()


def test_backward_on_the_card_has_the_cpus_gradient(card):
    def gradient(device: torch.device) -> torch.Tensor:
        weight = torch.linspace(-1, 1, 12).view(4, 3).to(device).requires_grad_()
        embeds = torch.zeros(5, 3, device=device).index_select(0, torch.arange(4, device=device))
        mask = torch.tensor([True, False, True, True]).to(device)
        (embeds.masked_scatter(mask[:, None], weight) ** 2).sum().backward()
        return weight.grad

    expected = gradient(torch.device("cpu"))
    card.events.clear()
    found = gradient(card.device)
    assert found.device == card.device and torch.equal(found.cpu(), expected)
    assert "masked_scatter_backward" in card.report()  # it selects by a mask


# ---- streaming -----------------------------------------------------------------------------------


LONGER = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 10, 15)]


@pytest.mark.parametrize("seed", [18, *LONGER])
def test_streams_on_the_card_are_those_of_a_naive_engine_on_the_cpu(tokenizer_dir, seed, monkeypatch):
    """Live and as whole clips, side by side, looking ahead, with texts generated, constrained and fed again."""
    monkeypatch.setattr(graph, "recorded", lambda forward: forward)
    case = test_naive.random_case(seed, tokenizer_dir).stream_naively()
    with pretended_card() as card:
        case.model.to(card.device)
        test_naive.compare_ways(case)


def stream_on(card: PretendedCard, tokenizer, streams: int) -> list[StreamSession]:
    """Sessions on the card, one frame already seen by each, that stay silent."""
    config = stream_config()
    model = random_model(tokenizer, 0, dst_state_head=True).to(card.device)
    clip = read(raw_clip([], 0, 40, inferred_goal="Build it"))
    cache = make_cache(model, config, streams)
    sessions = [StreamSession(model, tokenizer, clip, config, cache=cache, stream=s) for s in range(streams)]
    advance(sessions, [frames(1) for _ in sessions])
    card.events.clear()
    return sessions


def frames(count: int) -> list[Frame]:
    return [Frame(torch.from_numpy(row)) for row in np.ones((count, VISION), np.float32)]


SILENT = {"one": (1, 1), "looking ahead": (1, 8), "several streams": (3, 1)}


@pytest.mark.parametrize("way", SILENT)
def test_a_silent_frame_copies_embeddings_and_places_in_and_waits_for_its_probabilities(card, plain, way):
    streams, ahead = SILENT[way]
    sessions = stream_on(card, plain, streams)
    records = advance(sessions, [frames(ahead) for _ in sessions])
    assert [len(taken) for taken in records] == [ahead] * streams
    assert not any(record.speaking_decision or record.dst_update_decision for taken in records for record in taken)
    assert card.counts() == Counts(3, 1), card.report()


def test_a_frame_behind_a_users_text_also_copies_tokens_and_where_heads_are_read(card, plain):
    [session] = stream_on(card, plain, 1)
    session.say("What now?")
    session.feed(frames(1)[0].embedding)
    assert card.counts() == Counts(5, 1), card.report()


@pytest.mark.parametrize("constrained", [False, True])
def test_a_written_token_copies_itself_and_its_place_in_and_waits_once(card, plain, constrained):
    """Constrained, what is allowed as well."""
    sessions = stream_on(card, plain, 2)
    first = sessions[0]
    allowed = [lambda ids: [65 + len(ids)]] * 2 if constrained else None

    def counts(tokens: int) -> Counts:
        card.events.clear()
        turns = first.model.fast_greedy_generate(
            first.headers["assistant"],
            first.cache,
            [0, 1],
            end_ids=first.end_ids,
            max_new_tokens=tokens,
            forbidden=first.forbidden,
            allowed=allowed,
        )
        assert [len(turn.ids) for turn in turns] == [tokens] * 2
        return card.counts()

    three, eight = counts(3), counts(8)
    assert eight.copies - three.copies == 5 * (4 if constrained else 3), card.report()
    assert eight.waits - three.waits == 5, card.report()


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_the_card_has_shapes_for_a_fused_kernel(card, monkeypatch, dtype):
    """Flash attention groups queries, in 16 bits and without a mask; the memory-efficient kernel takes fp32 and a mask
    of the queries' type, and no groups. Whatever is neither falls to the kernel that holds all T x S scores."""
    calls = collections.Counter()

    def watched(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        flash = attn_mask is None and q.dtype == torch.bfloat16
        efficient = q.shape[1] == k.shape[1] and (attn_mask is None or attn_mask.dtype == q.dtype)
        assert flash or efficient, (q.shape, k.shape, attn_mask is None)
        calls["masked" if attn_mask is not None else "causal", q.shape[2] > 2] += 1
        return attention(q, k, v, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = make_model().to(card.device, dtype)
    ids = torch.arange(4, 16).to(card.device)[None]
    with torch.inference_mode():
        full = model(ids)
        for streams in ([0], [0, 1], [0, 2]):
            cache = KVCache(model.config, 3, 64, card.device, dtype)
            parts = [ids[:, begin:end].repeat(len(streams), 1) for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12))]
            hidden = torch.cat([model(part, cache=cache, streams=streams) for part in parts], dim=1)
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(hidden.cpu(), full.cpu().expand_as(hidden), atol=tolerance, rtol=0)
    assert set(calls) == {("masked", True), ("masked", False), ("causal", True)}


def test_attention_on_a_cpu_is_fused_too():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        streams_at_different_positions()
