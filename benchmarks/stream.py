"""Silent frames per second: this engine against a transformers loop with a growing cache, on the same weights.

    python benchmarks/stream.py [--shape small] [--device cpu] [--threads 1] [--rounds 9] [--frames 64]
    python benchmarks/stream.py --shape llama-3.2-3b --device cuda --precision bf16 --frames 512

Needs transformers (requirements-dev.txt). The loop is the usual one of streaming assistants: each frame's projected
embedding goes through LlamaForCausalLM with a DynamicCache, which grows by concatenation, and the LM head is read at
every frame; a variant reads two heads instead. The engine reads its two heads, with a cache allocated once: frame by
frame (K=1), with look-ahead, and frame by frame for several streams at once; on CUDA as a graph and without. Then both
write a reply, transformers with generate and its static cache: the same tokens.

All of them stream the same frames after the same prompt, one after the other within each round, so that other load
slows them alike. The table shows, over the rounds, the median of milliseconds per frame, the 95th percentile of single
steps, and the median of each round's ratio. To process one frame, every weight but the token embeddings must be read
from memory, and the cache too: the last column is those bytes per second as a share of what this machine can read.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from benchmarks.limits import read_bandwidth, synchronise
from benchmarks.train_step import PRECISIONS, SHAPES, model_config
from prospect.clip_files import parse_clip
from prospect.clips import Clip
from prospect.config import Config, torch_dtype
from prospect.decisions import Moments
from prospect.errors import ProspectError, run_entry_point
from prospect.model import KVCache, Prospect
from prospect.prepared import prepare
from prospect.sequence import clip_prompt, prompt_pieces
from prospect.stream import Frame, StreamSession, advance, make_cache
from prospect.tokenizer import Tokenizer, train_tokenizer
from prospect.tune import is_adapter, meta_model
from prospect.weights import fill_model

LOOKAHEAD = (1, 8, 32)
STREAMS = 8
TOKENS = 14  # of a reply; from 16 on one that repeats itself, as a random model does, would be cut
NEVER = Moments(frozenset(), frozenset())  # every frame is silent


def transformers_model(model: Prospect):
    """LlamaForCausalLM with the same weights, which are not trained with the others."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ProspectError("transformers is not installed", remedy="pip install -r requirements-dev.txt") from error
    c, weight = model.config, model.lm_head.weight
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                         num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
                         head_dim=c.head_dim, num_key_value_heads=c.num_key_value_heads,
                         rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_word_embeddings)  # fmt: skip
    with torch.device(weight.device):
        peer = LlamaForCausalLM(config).eval()
    shared = ("model.", "lm_head.")  # by name; the projector and the heads are ours alone
    state = model.state_dict().items()
    state = {name: tensor for name, tensor in state if name.startswith(shared) and not is_adapter(name)}
    peer.load_state_dict(state, assign=True)  # the same memory
    peer.tie_weights()
    return peer


def transformers_loop(
    peer, model: Prospect, prompt: list[int], frames: torch.Tensor, device: str, read_lm_head: bool
) -> tuple[list[float], float]:
    """Seconds of each of frames [F,D] after the prompt, and the last probability of speaking."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)
    peer.model(input_ids=torch.tensor([prompt], device=device), past_key_values=cache, use_cache=True)
    times = []
    for row in frames:
        synchronise(device)
        started = time.perf_counter()
        embeds = model.mm_projector(row[None, None].to(device, peer.dtype))  # [1,1,H]
        hidden = peer.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        if read_lm_head:
            peer.lm_head(hidden[:, -1]).float().softmax(-1).max().item()
        else:
            torch.cat((model.speaking_decision_head(hidden), model.dst_update_head(hidden))).float().sigmoid().tolist()
        times.append(time.perf_counter() - started)
    return times, float(model.speaking_decision_head(hidden[0, -1]).float().sigmoid())


def engine(sessions: list[StreamSession], frames: torch.Tensor, lookahead: int) -> tuple[list[float], float]:
    """Seconds of each step over frames [F,D], shown to every session, and the last probability of speaking."""
    times, at = [], 0
    while at < len(frames):
        upcoming = [Frame(row) for row in frames[at : at + lookahead]]
        started = time.perf_counter()
        records = advance(sessions, [upcoming for _ in sessions])[0]  # ends with the probabilities on the host
        times.append(time.perf_counter() - started)
        at += len(records)
    return times, records[-1].speaking_prob


def transformers_reply(peer, prompt: list[int], tokens: int, device: str) -> tuple[float, list[int]]:
    """Seconds of `tokens` more tokens behind the prompt, by generate with its static cache, and all ids."""
    feed = torch.tensor([prompt], device=device)
    times = []
    for count in (1, 1 + tokens):  # the difference leaves out the prompt
        options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        synchronise(device)
        started = time.perf_counter()
        ids = peer.generate(feed, attention_mask=torch.ones_like(feed), cache_implementation="static", **options)
        synchronise(device)
        times.append(time.perf_counter() - started)
    return times[1] - times[0], ids[0, len(prompt) :].tolist()


def engine_reply(session: StreamSession, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """The same behind a session's prompt."""
    times = []
    for count in (1, 1 + tokens):
        session.cache.lengths[session.stream] = len(prompt) - 1
        started = time.perf_counter()
        [turn] = session.model.fast_greedy_generate(
            prompt[-1:], session.cache, [session.stream], end_ids=session.end_ids[:1], max_new_tokens=count,
            forbidden=torch.tensor([], dtype=torch.long, device=session.cache.keys.device),
        )  # fmt: skip
        synchronise(session.cache.keys.device.type)
        times.append(time.perf_counter() - started)
    assert turn.cut == "limit", turn.cut
    return times[1] - times[0], turn.ids


def frame_bytes(model: Prospect, context: int) -> int:
    """Bytes that one frame must read: all weights but the token embeddings, and the keys and values of the context."""
    c, size = model.config, model.lm_head.weight.element_size()
    unread = {id(model.lm_head.weight), id(model.model.embed_tokens.weight)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in unread)
    return size * (weights + 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * context)


@dataclass(frozen=True)
class Workload:
    """Silent frames [F,D] that follow a prompt, and a model of random weights that looks at them.

    The model is as it was trained, so that `transformers_model` can take its weights; `make_ready` comes after that.
    """

    model: Prospect
    tokenizer: Tokenizer
    config: Config
    clip: Clip
    prompt: list[int]
    frames: torch.Tensor

    def make_ready(self) -> None:
        """What load_for_inference does last."""
        prepare(self.model)

    def cache(self, count: int, graphs: bool = True) -> KVCache:
        """A cache for so many streams. graphs: let CUDA graphs run what they can."""
        cache = make_cache(self.model, self.config, count)
        if not graphs:
            cache.graph = None
        return cache

    def sessions(self, cache: KVCache) -> list[StreamSession]:
        """A session in every stream of a cache, their prompts read. What a graph has recorded of the cache stays."""
        return [
            StreamSession(self.model, self.tokenizer, self.clip, self.config, cache=cache, stream=n, moments=NEVER)
            for n in range(len(cache.lengths))
        ]


def workload(shape: str, device: str, precision: str, num_frames: int) -> Workload:
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["Watch the wheel and the block"], 300, Path(folder))
        tokenizer = Tokenizer(folder, "plain")
    model = meta_model(replace(model_config(shape), image_token_id=tokenizer.image_id)).to(torch_dtype(precision))
    fill_model(model, {}, device, 0)
    config = Config()
    config.data.max_seq_len = num_frames + 512
    config.infer.speaking_threshold = config.infer.dst_threshold = config.infer.evidence = 0.5
    raw = dict(start_frame_idx=0, end_frame_idx=num_frames - 1, conversation=[], inferred_goal="Go on " * 30)
    clip, _ = parse_clip(raw, "bench", 0)
    prompt = tokenizer.encode(prompt_pieces(clip_prompt(clip, clip.initial_state, config.data), tokenizer))
    frames = torch.randn(num_frames, model.config.vision_dim, generator=torch.Generator().manual_seed(0))
    return Workload(model.eval(), tokenizer, config, clip, prompt, frames)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and arithmetic, in both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frames", type=int, default=64, help="frames per round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, torch_dtype(arguments.precision)

    work = workload(arguments.shape, device, arguments.precision, arguments.frames)
    model, prompt, frames = work.model, work.prompt, work.frames
    peer = transformers_model(model)
    work.make_ready()
    bandwidth = read_bandwidth(device, dtype)

    ways = {f"engine, K={k}": (1, k) for k in LOOKAHEAD} | {f"engine, K=1, {STREAMS} streams": (STREAMS, 1)}
    caches = {name: work.cache(count) for name, (count, _) in ways.items()}
    if device == "cuda":  # the same, launched kernel by kernel
        for name in ("engine, K=1", f"engine, K=1, {STREAMS} streams"):
            ways[f"{name}, no graph"] = ways[name]
            caches[f"{name}, no graph"] = work.cache(ways[name][0], graphs=False)
    modes = ["transformers, growing cache", "the same, two heads in place of the LM head", *ways]
    per_frame: dict[str, list[float]] = {name: [] for name in modes}  # milliseconds per frame, of each round
    replies: list[tuple[float, float]] = []  # seconds for TOKENS tokens, of each round: theirs, ours
    steps: dict[str, list[float]] = {name: [] for name in modes}  # milliseconds of single steps, of all rounds
    for round_number in range(arguments.rounds + 1):  # the first warms up and checks that all see the same
        measured = []
        for read_lm_head in (True, False):
            times, speaking = transformers_loop(peer, model, prompt, frames, device, read_lm_head)
            measured.append(times)
        for name, (_, lookahead) in ways.items():
            times, found = engine(work.sessions(caches[name]), frames, lookahead)
            assert abs(found - speaking) < (1e-4 if dtype == torch.float32 else 0.05), (name, found, speaking)
            measured.append(times)
        if round_number:
            for name, times in zip(modes, measured):
                shown = len(frames) * (STREAMS if "streams" in name else 1)
                per_frame[name].append(sum(times) / shown * 1e3)
                steps[name] += [1e3 * t for t in times]

        theirs, expected = transformers_reply(peer, prompt, TOKENS, device)
        ours, ids = engine_reply(work.sessions(caches["engine, K=1"])[0], prompt, TOKENS)
        assert ids == expected or dtype != torch.float32, (ids, expected)
        if round_number:
            replies.append((theirs, ours))

    need = frame_bytes(model, len(prompt) + len(frames) // 2)
    print(
        f"{arguments.shape} on {device}, {arguments.precision}: "
        f"{len(frames)} silent frames after {len(prompt)} tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"a frame reads {need / 1e6:.0f} MB, memory bandwidth {bandwidth / 1e9:.1f} GB/s"
    )
    print("| | ms per frame | p95 of a step, ms | frames/s | speed-up (lowest..highest round) | share of bandwidth |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, values in per_frame.items():
        ratios = [theirs / ours for theirs, ours in zip(per_frame["transformers, growing cache"], values)]
        median, p95 = statistics.median(values), float(np.percentile(steps[name], 95))
        speed_up = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}..{max(ratios):.1f})"
        share = ""
        if ways.get(name) == (1, 1):  # the others read a weight once for many frames
            share = f"{need / (median / 1e3) / bandwidth:.0%}"
        print(f"| {name} | {median:.2f} | {p95:.2f} | {1e3 / median:.0f} | {speed_up} | {share} |")
    theirs, ours = [TOKENS / statistics.median(times) for times in zip(*replies)]
    ratios = [their_time / our_time for their_time, our_time in replies]
    print(f"a reply: transformers' generate with its static cache {theirs:.0f} tokens/s, engine {ours:.0f}, "
          f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}..{max(ratios):.1f})")  # fmt: skip


if __name__ == "__main__":
    run_entry_point(main)
