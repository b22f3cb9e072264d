"""The PROSPECT model, whole: a Llama transformer that watches frame embeddings and decides, at every frame,
whether to speak and whether to update the task state.

    frame embeddings [F,D] --mm_projector--> [F,H] --.
                                                      joint_embed --> transformer --> hidden [B,T,H]
    token ids        [B,T] --embed_tokens--> [B,T,H] -'                                 |
                                                         at every <image>:  speaking_decision_head --> speak now?
                                                                            dst_update_head        --> update now?
                                                         when one fires:    lm_head --> the reply or `S5->complete`

The transformer is Llama's (Touvron et al. 2023, arXiv 2302.13971; grouped queries and RoPE scaling as in Llama 3,
arXiv 2407.21783), or Qwen2's or Qwen3's, which differ from it in Attention alone (arXiv 2407.10671, 2505.09388). It
keeps Hugging Face's tensor names and config fields, so that published weights load as they are.
The projector and the idea of a decision head beside the LM head come from ProAssist (arXiv 2506.05904), whose single
"stay silent" head becomes two direct ones: speak, and update the task state.

Dimension letters: B sequences in the batch, T tokens, F frames in the whole batch, D width of a frame embedding,
H hidden width, V vocabulary, N query heads, K key/value heads, G = N/K queries per key, E width of a head,
S tokens in the cache.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prospect.config import IGNORE, LossConfig
from prospect.errors import ProspectError

GRAPH_TOKENS = 16  # a forward of at most so many tokens goes through the cache's graph, if it has one


# ---- config --------------------------------------------------------------------------------------


@dataclass
class RopeScaling:
    """Llama 3.1's stretching of the slow rotations to contexts longer than pretraining's (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (see tune.py)."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]  # last parts of names: q_proj, gate_proj, ...


@dataclass
class ModelConfig:
    """The shape of a model. Fields up to `model_type` are Hugging Face's LlamaConfig, under its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"  # or qwen2 (Qwen2.5 too), qwen3
    # ours
    vision_dim: int = 2048  # D: 2048 for SmolVLM2 embeddings, 1152 for SigLIP
    image_token_id: int = 0  # may lie beyond vocab_size: <image> is never looked up and never generated
    speaking_head: bool = True  # False: the LM decides when to speak (ProAssist's default)
    dst: bool = True  # False: no task state and no head for it (ProAssist's architecture)
    dst_state_head: bool = False  # a third head: the state of the most recently started step
    lora: LoraConfig | None = None
    backbone: str = ""  # directory that the transformer's weights came from
    backbone_mark: str = ""  # and their fingerprint


# ---- KV cache ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """Where the new tokens of one forward go in the cache, and what their queries may see. Handed down to every layer.

    streams  the cache rows of this forward: a slice (a view of the cache) where they are neighbours, else their ids
    rows     where new keys and values are written, [B*T*K]: in one layer's [streams, K, S, E], its rows of width E
    end      how far queries look: one past the last position that any of these streams holds, or more
    mask     [B,1,T,end], added to scores: 0 where a query may look, else -inf; None: the plain causal square
    rope     cos and sin for the new tokens, [B,T,1,E]
    """

    streams: slice | Tensor
    rows: Tensor
    end: int
    mask: Tensor | None
    rope: tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of B independent streams, allocated once: memory does not grow while a stream runs.

    Each stream has its own length, so its next token goes to position `lengths[stream]`. Rolling back is free:
    set a smaller length, and what lies beyond it is overwritten later and never attended to.

        stream 0:  k k k k k k . . . .     lengths = [6, 3]: a forward of 2 tokens writes stream 0 at positions 6, 7
        stream 1:  k k k . . . . . . .     and stream 1 at 3, 4; the mask lets each query see positions up to its own

    A forward of several streams is as long as the longest of them; the caller sets the others' lengths back behind
    their last real token. Padding beyond the capacity gathers in one place more, which no real token sees.

    graph: runs short forwards of all streams in fixed shapes (prospect/graph.py); None: every forward is launched
    operation by operation.
    """

    def __init__(self, config: ModelConfig, streams: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, streams, config.num_key_value_heads, capacity + 1, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, streams, K, S, E]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        by_layer = [(self.keys[layer], self.values[layer]) for layer in range(config.num_hidden_layers)]
        self.layers = [(k, v, k.view(-1, config.head_dim), v.view(-1, config.head_dim)) for k, v in by_layer]
        self.lengths = [0] * streams  # tokens held for each stream; kept on the host, where the engine decides
        self.capacity = capacity
        self.places = torch.arange(capacity + 1, device=device)
        self.rope = [table.to(device) for table in rope_tables(rope_frequencies(config), capacity + 1)]  # [S,E] each
        self.graph: Callable[[Tensor, list[int]], Tensor] | None = None

    def reserve(self, streams: list[int], num_tokens: int) -> Slots:
        """Room for `num_tokens` new tokens in each of `streams`: what every layer needs to write and read them."""
        lengths = [self.lengths[stream] for stream in streams]
        end = max(lengths) + num_tokens
        if len(streams) > 1:
            end = min(end, self.capacity)  # padding may reach beyond it
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        for stream in streams:
            self.lengths[stream] += num_tokens
        ids, begins = sent([streams, lengths], self.keys.device)  # [B], [B]
        neighbours = streams == list(range(streams[0], streams[0] + len(streams)))
        rows = slice(streams[0], streams[0] + len(streams)) if neighbours else ids
        return self.slots(rows, ids, begins, num_tokens, end, empty=end == num_tokens and len(streams) == 1)

    def slots(
        self, streams: slice | Tensor, ids: Tensor, begins: Tensor, num_tokens: int, end: int, empty: bool = False
    ) -> Slots:
        """The slots of T new tokens from positions `begins` [B] on, in the streams `ids` [B]. Waits for no device."""
        K, S = self.keys.shape[2:4]
        positions = (begins[:, None] + self.places[:num_tokens]).clamp(max=self.capacity)  # [B,T]
        rows = ((ids[:, None] * K + self.places[:K]) * S)[:, None] + positions[..., None]  # [B,T,K]
        mask = None
        if not empty:
            unseen = self.places[:end] > positions[..., None]  # [B,T,S]
            mask = torch.zeros_like(unseen, dtype=self.keys.dtype).masked_fill_(unseen, -torch.inf)[:, None]
        cos, sin = [table[positions][:, :, None] for table in self.rope]
        return Slots(streams, rows.flatten(), end, mask, (cos, sin))

    def clear(self, stream: int, kept: int = 0) -> None:
        """Empty a stream behind `kept` tokens. Zeros: what is masked is still multiplied, so NaN comes through."""
        self.lengths[stream] = kept
        self.keys[:, stream, :, kept:].zero_()
        self.values[:, stream, :, kept:].zero_()

    def update(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write k, v [B,T,K,E] into their slots and return what those streams hold up to slots.end, [B,K,S,E] each."""
        keys, values, key_rows, value_rows = self.layers[layer]
        key_rows.index_copy_(0, slots.rows, k.reshape(-1, k.shape[-1]).to(keys.dtype))
        value_rows.index_copy_(0, slots.rows, v.reshape(-1, v.shape[-1]).to(values.dtype))
        return keys[slots.streams, :, : slots.end], values[slots.streams, :, : slots.end]


def sent(values: list | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on the device, without waiting for what the device still has to do."""
    host = torch.as_tensor(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


# ---- the transformer -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [...,H] -> [...,H]
        normed = x.float()  # the mean of squares of a bf16 row would lose half its digits
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)  # under autocast a weight may be wider than x


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a token by which each pair of a head's dimensions turns, [E/2] (RoPE, arXiv 2104.09864).

    With llama3 scaling, rotations slower than `low_freq_factor` turns in the pretraining context are slowed by
    `factor`, those faster than `high_freq_factor` turns stay, and between the two the change is gradual.
    """
    exponent = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / s.factor


def rope_tables(frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """What `rotate` needs at positions 0, 1, ...: cosines, and sines with the first half's sign turned, [T,E], fp32."""
    angles = torch.arange(num_positions, device=frequencies.device)[:, None] * frequencies  # [T,E/2]
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of x [B,T,heads,E] by its position's angle; cos, sin [B,T,1,E] of rope_tables."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B,T,N,E] over k and v [B,K,S,E] -> [B,T,N*E]. mask [B,1,T,S] is added to the scores; None: causal, S = T.

    In shapes for which every device has a fused kernel. CUDA's take groups of queries without a mask and in 16 bits
    only, and fp16 may be on a card too old for that one: elsewhere keys and values are repeated, or, for one token, the
    G queries of a key are G rows of one product.
    """
    B, T, N, E = q.shape
    K = k.shape[1]
    if T == 1:
        return F.scaled_dot_product_attention(q.view(B, K, N // K, E), k, v, mask).reshape(B, 1, N * E)
    if q.is_cuda and (mask is not None or q.dtype != torch.bfloat16):
        k, v = k.repeat_interleave(N // K, 1), v.repeat_interleave(N // K, 1)  # [B,N,S,E]
    grouped = True if k.shape[1] != N else False  # a branch: of `!=` alone torch.compile may make a symbol
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(B, T, N * E)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias or config.model_type == "qwen2"  # Qwen2's q, k and v have one, its o has none
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        normed = config.model_type == "qwen3"  # each head of q and k, so that no score grows without bound
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, slots: Slots | None) -> Tensor:
        B, T, _ = x.shape
        N, K, E = self.num_heads, self.num_kv_heads, self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, N, E)), *rope)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, K, E)), *rope)
        v = self.v_proj(x).view(B, T, K, E)
        if cache is None:
            # Right padding needs no mask: a real token looks only at what stands before it, which is real too.
            return self.o_proj(attend(q, k.transpose(1, 2), v.transpose(1, 2), None))
        return self.o_proj(attend(q, *cache.update(self.layer, k, v, slots), slots.mask))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # SwiGLU (arXiv 2002.05202)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, slots: Slots | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class GELU(nn.Module):
    """GELU(x), computed with its axes in another order, so that torch does not hand it to oneDNN on a CPU.

    oneDNN compiles a kernel for each new number of rows and keeps the last 1,024 of them, up to 280 kB each: a stream
    or a training whose numbers of frames vary would grow by hundreds of megabytes.
    """

    def forward(self, x: Tensor) -> Tensor:  # [...,H] -> [...,H]
        return F.gelu(x.movedim(-1, 0)).movedim(0, -1)


class Llama(nn.Module):
    """The transformer between the embeddings and the heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Always a real tensor, also when the weights are built on the meta device, and never part of a checkpoint.
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.activation_checkpointing = False
        self.prepared: list[Callable] | None = None  # the layers as streaming runs them (prospect/prepared.py)

    def _apply(self, fn, recurse=True):
        """What .to, .half and .cuda call: the frequencies may move but stay in fp32 (in bf16 a position would blur)."""
        frequencies = self.rope_frequencies
        super()._apply(fn, recurse)
        self.rope_frequencies = frequencies.to(self.rope_frequencies.device)
        self.prepared = None  # it was made of the weights as they were
        return self

    def forward(self, x: Tensor, cache: KVCache | None = None, streams: list[int] | None = None) -> Tensor:
        """x [B,T,H] -> [B,T,H]; with a cache, behind what it holds."""
        if cache is None:
            cos, sin = rope_tables(self.rope_frequencies, x.shape[1])  # [T,E] each
            return self.blocks(x, (cos[:, None], sin[:, None]), None, None)
        streams = list(range(len(x))) if streams is None else streams
        if cache.graph is not None and x.shape[1] <= GRAPH_TOKENS:
            return cache.graph(x, streams)
        slots = cache.reserve(streams, x.shape[1])
        return self.blocks(x, slots.rope, cache, slots)

    def blocks(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, slots: Slots | None) -> Tensor:
        for block in self.layers if cache is None or self.prepared is None else self.prepared:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, cache, slots, use_reentrant=False)
            else:
                x = block(x, rope, cache, slots)
        return self.norm(x)


# ---- the model -----------------------------------------------------------------------------------


class Prospect(nn.Module):
    """Projector, transformer, LM head and the two decision heads.

    `model(input_ids, image_embeds)` gives hidden states [B,T,H]; `model.lm_head`, `model.speaking_decision_head` and
    `model.dst_update_head` read them. With `targets` it gives loss sums by name instead (see `loss_sums`): training
    goes through forward as a whole, so that DDP and FSDP see every parameter's use.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(config.vision_dim, H), GELU(), nn.Linear(H, H))
        self.model = Llama(config)
        self.lm_head = nn.Linear(H, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.speaking_decision_head = nn.Linear(H, 1) if config.speaking_head else None
        self.dst_update_head = nn.Linear(H, 1) if config.dst else None
        self.dst_state_head = nn.Linear(H, 3) if config.dst_state_head else None

    @staticmethod
    def from_pretrained(directory, vision_dim: int | None = None, **overrides) -> "Prospect":
        """A model from a Hugging Face backbone directory (new projector and heads) or from one of our checkpoints."""
        from prospect.weights import load_model  # imported here because weights.py imports this file

        return load_model(directory, vision_dim=vision_dim, **overrides)

    def joint_embed(self, input_ids: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings [B,T,H] in which the k-th <image> token, in reading order, is the k-th projected frame row.

        image_embeds: [F,D] (or None when there is no <image>); as many rows as <image> tokens, which `make_sample` has
        checked by clip. Raises ProspectError for any other number. Nothing here, nor its backward, waits for a GPU: how
        many places there are is known, and the GPU counts by itself (a RuntimeError there, whenever it is noticed).

        input_ids None: frames alone, image_embeds [B,T,D] -> [B,T,H].
        """
        if input_ids is None:
            return self.mm_projector(image_embeds.to(self.mm_projector[0].weight.dtype))
        is_image = input_ids == self.config.image_token_id  # [B,T]
        rows, images = 0 if image_embeds is None else len(image_embeds), is_image.sum()
        if not is_image.is_cpu:
            torch._assert_async(images == rows, "as many rows of image_embeds as <image> tokens are needed")
        elif images != rows:
            what = f"{int(images)} <image> tokens for {rows} rows of image_embeds"
            raise ProspectError(what, where="joint_embed", remedy="one row for each <image>")
        embeds = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))  # [B,T,H]
        if image_embeds is None:
            return embeds
        frames = self.mm_projector(image_embeds.to(self.mm_projector[0].weight.dtype))  # [F,H]
        places = is_image.flatten().nonzero_static(size=rows)[:, 0]  # [F], indices into B*T
        return embeds.flatten(0, 1).index_copy(0, places, frames.to(embeds.dtype)).view_as(embeds)

    def forward(
        self,
        input_ids: Tensor | None,
        image_embeds: Tensor | None = None,
        *,
        targets: dict[str, Tensor] | None = None,
        loss: LossConfig | None = None,
        cache: KVCache | None = None,
        streams: list[int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """input_ids [B,T], image_embeds [F,D] -> hidden [B,T,H]; or, with targets, sums by LOSS_CLASSES.

        targets: what is learned, by label key (see `find_targets`).
        loss: how they are weighed, None for the defaults.
        cache: keys and values of what came before; the new tokens follow them, in all of its streams or in `streams`.
        Every tensor is on the model's device. Raises ProspectError where rows and <image> tokens differ in number.
        """
        embeds = self.joint_embed(input_ids, image_embeds)
        hidden = self.model(embeds, cache, streams)
        if targets is None:
            return hidden
        return loss_sums(self, hidden, targets, loss or LossConfig())

    def decision_probabilities(self, hidden: Tensor, decision: str, end_id: int) -> dict[str, Tensor]:
        """How strongly each head wants to act at hidden [..., H]: "speaking" and, with task state, "dst", each [...].

        decision `lm` is ProAssist's way to speak without a head: 1 - P(end token), the chance that the LM goes on. It
        is the only one for a model without the speaking head.
        """
        if decision == "lm":
            speaking = 1 - self.lm_head(hidden.to(self.lm_head.weight.dtype)).float().softmax(-1)[..., end_id]
        else:
            speaking = head_logits(self.speaking_decision_head, hidden)[..., 0].sigmoid()
        if self.dst_update_head is None:
            return {"speaking": speaking}
        return {"speaking": speaking, "dst": head_logits(self.dst_update_head, hidden)[..., 0].sigmoid()}

    @torch.inference_mode()
    def fast_greedy_generate(
        self,
        header_ids: list[int],
        cache: KVCache,
        streams: list[int],
        *,
        end_ids: list[int],
        max_new_tokens: int,
        forbidden: Tensor,
        allowed: list[Callable[[list[int]], list[int]]] | None = None,
    ) -> list["Generated"]:
        """Write one turn into each of `streams`, greedily (the name and the habit are ProAssist's).

        header_ids (the turn's header, the very tokens training has there) are fed, then the likeliest token again and
        again until the end token, end_ids[0]; it and what the template puts behind it, end_ids[1:], are fed as well.
        forbidden: ids [n] that never stand inside a turn (<image>, role marks). allowed: by stream, given its ids,
        the only ones that may follow. A turn that reaches `max_new_tokens` or repeats itself is cut, and its end token
        fed all the same, so that the context stays well formed.
        """
        device = self.lm_head.weight.device
        turns = [Generated([], None) for _ in streams]
        writing = list(range(len(streams)))  # turns not yet ended
        feed = [header_ids for _ in streams]
        while writing:
            open_streams = [streams[i] for i in writing]
            hidden = self(sent(feed, device), cache=cache, streams=open_streams)[:, -1]  # [n,H]
            logits = self.lm_head(hidden).float().index_fill_(1, forbidden, -torch.inf)  # [n,V]
            if allowed is not None:
                V = logits.shape[1]
                may = [n * V + id for n, i in enumerate(writing) for id in allowed[i](turns[i].ids)]
                closed = torch.full_like(logits, -torch.inf)
                closed.view(-1).index_fill_(0, sent(may, device), 0)
                logits = logits + closed
            tokens = logits.argmax(-1).tolist()  # the one wait for the device that greedy decoding needs
            feed, still = [], []
            for i, token in zip(writing, tokens):
                turn = turns[i]
                if token == end_ids[0]:
                    continue
                if len(turn.ids) == max_new_tokens:
                    turn.cut = "limit"
                elif allowed is None and repeats(turn.ids):
                    turn.cut = "repetition"
                else:
                    turn.ids.append(token)
                    feed.append([token])
                    still.append(i)
            writing = still
        self(sent([end_ids] * len(streams), device), cache=cache, streams=streams)
        return turns


def head_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """A decision head's logits in fp32, computed in the precision in which the head is stored."""
    return head(hidden.to(head.weight.dtype)).float()


@dataclass
class Generated:
    """One generated turn: its ids without the end token, and why it was cut, if it was: "limit" or "repetition"."""

    ids: list[int]
    cut: str | None


def repeats(ids: list[int]) -> bool:
    """Whether ids end in a loop that greedy decoding would never leave.

    A loop is the same stretch of up to 16 tokens at least four times over, and 16 tokens in all, so that the zeros of
    "10000" or a row of dashes are none.
    """
    for n in range(1, min(16, len(ids) // 4) + 1):
        times = max(4, math.ceil(16 / n))
        if ids[-n * times :] == times * ids[-n:]:
            return True
    return False


def drawn_weights(model: Prospect, seed: int, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of weights for training from scratch: normal(0, 1/sqrt(width of the input)), so that signals keep
    their size.

    What adds to the residual stream is scaled down by sqrt(2 layers) more (GPT-2). A fixed 0.02, right for models some
    thousands wide, starves one of width 128: its attention stays flat and names are learned many times slower.
    names: only these parameters, all or the new parts of a model whose transformer is pretrained. Drawn whole, on the
    CPU and in fp32, whatever of it is kept where: the values depend on shapes and seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = ("o_proj.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if parameter.ndim < 2:
            yield name, torch.full(parameter.shape, 1.0 if "norm" in name else 0.0)
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(residual):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        yield name, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)


def init_weights(model: Prospect, seed: int) -> None:
    """Fill a model that has memory with `drawn_weights`."""
    parameters = dict(model.named_parameters())
    for name, value in drawn_weights(model, seed, parameters):
        parameters[name].data.copy_(value)


# ---- the losses ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What is learned: from which labels, by which of Prospect's heads, and how.

    token: cross-entropy of a token, at the position before it. decision: binary cross-entropy where it is labelled.
    category: cross-entropy there.
    """

    label: str
    head: str
    kind: Literal["token", "decision", "category"]


LEARNED = {  # by loss term
    "speaking_gen": Learned("speaking_gen_labels", "lm_head", "token"),  # what to say
    "speaking_binary": Learned("speaking_labels", "speaking_decision_head", "decision"),  # speak now?
    "dst_gen": Learned("dst_gen_labels", "lm_head", "token"),  # which step changes
    "dst_binary": Learned("dst_update_labels", "dst_update_head", "decision"),  # update now?
    "dst_state": Learned("dst_state_labels", "dst_state_head", "category"),  # state of the step
}


def classes(term: str) -> tuple[str, ...]:
    """The classes of a loss term: a decision's positives and negatives, else the term itself.

    Labels are counted, and losses summed, by class; the losses are quotients of these. Keeping sums and counts apart
    until the whole optimizer step is known is what makes a step the same however it is cut into micro-batches and
    ranks.
    """
    stem = term.removesuffix("_binary")
    return (f"{stem}_pos", f"{stem}_neg") if LEARNED[term].kind == "decision" else (term,)


LOSS_CLASSES = tuple(name for term in LEARNED for name in classes(term))
LM_CHUNK = 4096  # labelled positions per LM head call: logits of more than [4096, V] are never held at once


def labelled(labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Where a hidden state is learned from, and what: flat indices into B*T and their labels, both [n].

    Labels are aligned with input_ids. A decision is read where it is labelled; a token is predicted from the
    position before it, and here alone that shift happens:

        input_ids   <f194>  Assist  ant  :   Great  !   </s>
        gen labels   -100   Assist  ant  :   Great  !   </s>
        read at        ^----'  ^---'  ^-'  ^---'  ...           index 0 learns the label at 1, ...
    """
    B, T = labels.shape
    wanted = labels[:, 1:] if shift else labels  # the label at t+1 belongs to the hidden state at t
    rows, columns = (wanted != IGNORE).nonzero(as_tuple=True)
    return rows * T + columns, wanted[rows, columns]


def find_targets(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is learned, by label key: [2,n], flat indices into B*T (see `labelled`) above the labels that stand there.

    labels: LEARNED's, each [B,T], and perhaps `attention_mask`. On the CPU, when a batch is made: to find positions on
    a GPU, the host would have to wait for their number. Raises ProspectError for padding that is not on the right.
    """
    mask = labels.get("attention_mask")  # [B,T]
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        what = "a sequence has padding before a token, which would be seen"
        raise ProspectError(what, where="attention_mask", remedy="pad on the right, as prospect.data.collate does")
    shifted = {learned.label: learned.kind == "token" for learned in LEARNED.values()}
    return {key: torch.stack(labelled(labels[key], shift=shift)) for key, shift in shifted.items()}


def loss_sums(model: Prospect, hidden: Tensor, targets: dict[str, Tensor], loss: LossConfig) -> dict[str, Tensor]:
    """Summed losses of one micro-batch by LOSS_CLASSES, fp32 scalars.

    hidden [B,T,H]; targets: of `find_targets`, on hidden's device. Waits for no device. A class without a label sums to
    exactly 0 but stays connected to the graph, so that on every rank every parameter has a gradient.
    """
    flat = hidden.flatten(0, 1)  # [B*T, H]

    def read(key: str) -> tuple[Tensor, Tensor]:
        index, label = targets[key]
        return flat.index_select(0, index), label  # [n,H], [n]

    def generation(keys: list[str]) -> list[Tensor]:
        """All keys' labels go through the LM head together: its weight is read once, and its gradient made once."""
        states, targets = zip(*[read(key) for key in keys])
        counts = [len(part) for part in targets]
        states, targets = torch.cat(states), torch.cat(targets)  # [n,H], [n]
        losses = []  # one part, even of no label
        for part, target in zip(states.split(LM_CHUNK), targets.split(LM_CHUNK)):
            if len(states) > LM_CHUNK and torch.is_grad_enabled():
                losses.append(checkpoint(token_losses, model.lm_head, part, target, use_reentrant=False))
            else:
                losses.append(token_losses(model.lm_head, part, target))
        return [part.sum() for part in torch.cat(losses).split(counts)]

    def decision(head: nn.Linear, states: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits, label = head(states).float().squeeze(-1), label.float()
        losses = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
        if loss.bce == "focal":
            weight = label * loss.focal_alpha + (1 - label) * (1 - loss.focal_alpha)
            losses = weight * focal(losses, loss.focal_gamma)
        return (losses * label).sum(), (losses * (1 - label)).sum()

    tokens = {term: learned.label for term, learned in LEARNED.items() if learned.kind == "token"}
    sums = dict.fromkeys(LOSS_CLASSES, hidden.new_zeros((), dtype=torch.float32))
    sums |= zip(tokens, generation(list(tokens.values())))
    for term, learned in LEARNED.items():
        head = getattr(model, learned.head)
        if learned.kind == "token" or head is None:
            continue
        states, label = read(learned.label)
        if learned.kind == "decision":
            sums |= zip(classes(term), decision(head, states, label))
        else:
            losses = token_losses(head, states, label)
            sums[term] = (focal(losses, loss.focal_gamma) if loss.dst_state_focal else losses).sum()
    return sums


def token_losses(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each of states [n,H] against its token id (or its step's state), [n], from fp32 logits."""
    return F.cross_entropy(head(states).float(), targets, reduction="none")


def focal(losses: Tensor, gamma: float) -> Tensor:
    """Focal loss (arXiv 1708.02002), (1 - p)^gamma (-log p), from -log p [n]; p: what the right answer was given.

    At p = 1 the power's own gradient is infinite for gamma < 1; a floor far below every other loss keeps it finite.
    """
    return (-torch.expm1(-losses)).clamp(min=1e-12) ** gamma * losses


def count_labels(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """How many labels of each of LOSS_CLASSES a micro-batch has, float64 scalars on the host, to add up over ranks.

    targets: of `find_targets`, on the host.
    """

    counts = {}
    for term, learned in LEARNED.items():
        _, label = targets[learned.label]
        values = (label == 1, label == 0) if learned.kind == "decision" else (label != IGNORE,)
        counts |= zip(classes(term), [which.sum().double() for which in values])
    return counts


def added(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums or counts of several micro-batches, name by name."""
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def loss_terms(sums: dict[str, Tensor], counts: dict[str, Tensor], loss: LossConfig) -> dict[str, Tensor]:
    """The losses, each a sum over its own count: of a whole optimizer step when `counts` are.

    sums, counts: scalars by LOSS_CLASSES. A term without a label is exactly 0. `loss.bce`: mean and focal divide by
    all labels; balanced is the mean of the positives' mean and the negatives' mean. Counts stay on the host: there a
    scalar is a number, which an operation takes to the GPU with it.
    """
    s, n = sums, {name: counts[name].float() for name in LOSS_CLASSES}

    def quotient(term: str) -> Tensor:
        names = classes(term)
        if len(names) == 2 and loss.bce == "balanced":
            return 0.5 * sum(s[name] / n[name].clamp(min=1) for name in names)
        return sum(s[name] for name in names) / sum(n[name] for name in names).clamp(min=1)

    return {term: quotient(term) for term in LEARNED}


def total_loss(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of the losses. weights: by the names of the terms (`config.loss.weights()`)."""
    return sum(weights[name] * term for name, term in terms.items())
