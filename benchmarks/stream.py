"""Silent frames per second: this engine against a transformers loop with a growing cache, on the same weights.

    PYTHONPATH=. python benchmarks/stream.py [--threads 1] [--rounds 9] [--frames 64]

Needs transformers (requirements-eval.txt). The loop is the usual one of streaming assistants: each frame's projected
embedding goes through LlamaForCausalLM with a DynamicCache, which grows by concatenation, and the LM head is read at
every frame. The engine reads its two heads instead, from a cache allocated once, frame by frame (K=1) or with
look-ahead.

All stream the same frames behind the same prompt, one after the other within each round, so that whatever else
the machine does falls on all of them. Printed are medians over the rounds of milliseconds a frame, and the medians of
each round's ratio. The shape "small": width 512, 6 layers, 8 heads, 4 key/value heads, 49,152 tokens, fp32.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from prospect.clips import parse_clip
from prospect.config import Config
from prospect.data import clip_prompt, prompt_pieces
from prospect.model import ModelConfig, Prospect, init_weights
from prospect.stream import Frame, StreamSession, advance
from prospect.tokenizer import Tokenizer, train_tokenizer

VISION_DIM = 2048
LOOKAHEAD = (1, 8, 32)
NEVER = 2.0  # a threshold that no probability reaches: every frame is silent


def transformers_model(model: Prospect):
    """LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                         num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
                         num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps)  # fmt: skip
    peer = LlamaForCausalLM(config).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("model.", "lm_head."))}
    peer.load_state_dict(weights)
    return peer


@torch.inference_mode()
def transformers_loop(peer, model: Prospect, prompt: list[int], frames: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds for frames [F,D] behind the prompt, and the last hidden state [H]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)
    peer.model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for row in frames:
        embeds = model.mm_projector(row[None, None])  # [1,1,H]
        hidden = peer.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        peer.lm_head(hidden[:, -1]).float().softmax(-1).max().item()
    return time.perf_counter() - started, hidden[0, -1]


def engine(session: StreamSession, frames: torch.Tensor, lookahead: int) -> tuple[float, float]:
    """Seconds for frames [F,D], and the last probability of speaking."""
    started, at = time.perf_counter(), 0
    while at < len(frames):
        records = advance([session], [[Frame(row) for row in frames[at : at + lookahead]]])[0]
        at += len(records)
    return time.perf_counter() - started, records[-1].speaking_prob


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frames", type=int, default=64, help="frames a round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["Watch the wheel and the block"], 300, Path(folder))
        tokenizer = Tokenizer(folder, "plain")
    shape = ModelConfig(vocab_size=49_152, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
                        num_attention_heads=8, num_key_value_heads=4, head_dim=64, vision_dim=VISION_DIM,
                        image_token_id=tokenizer.image_id)  # fmt: skip
    model = Prospect(shape).eval()
    init_weights(model, 0)
    peer = transformers_model(model)
    config = Config()
    config.infer.speaking_threshold = config.infer.dst_threshold = NEVER
    config.infer.reserved = 160
    raw = {
        "start_frame_idx": 0,
        "end_frame_idx": arguments.frames - 1,
        "conversation": [],
        "inferred_goal": "Go on " * 30,
    }
    clip, _ = parse_clip(raw, "bench", 0)
    prompt = tokenizer.encode(prompt_pieces(clip_prompt(clip, clip.initial_state, config.data), tokenizer))
    frames = torch.randn(arguments.frames, VISION_DIM, generator=torch.Generator().manual_seed(0))

    milliseconds: dict[str, list[float]] = {"transformers": [], **{f"engine, K={k}": [] for k in LOOKAHEAD}}
    for round_number in range(arguments.rounds + 1):  # the first warms up and checks that all see the same
        seconds, hidden = transformers_loop(peer, model, prompt, frames)
        times, speaking = [seconds], float(model.speaking_decision_head(hidden).sigmoid())
        for lookahead in LOOKAHEAD:
            seconds, found = engine(StreamSession(model, tokenizer, clip, config), frames, lookahead)
            assert abs(found - speaking) < 1e-4, (lookahead, found, speaking)
            times.append(seconds)
        if round_number:
            for values, seconds in zip(milliseconds.values(), times):
                values.append(seconds / len(frames) * 1e3)

    print(
        f"{len(frames)} silent frames behind {len(prompt)} tokens, {arguments.threads} threads, torch {torch.__version__}"
    )
    for name, values in milliseconds.items():
        ratios = [peer_ms / ms for peer_ms, ms in zip(milliseconds["transformers"], values)]
        median, ratio = statistics.median(values), statistics.median(ratios)
        speed = f"{median:7.2f} ms a frame   {1e3 / median:7.0f} frames/s"
        print(f"    {name:<14} {speed}   {ratio:5.1f}x ({min(ratios):.1f}..{max(ratios):.1f})")


if __name__ == "__main__":
    main()
