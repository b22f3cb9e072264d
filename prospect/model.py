"""The PROSPECT model, whole: a Llama transformer that watches frame embeddings and decides, at every frame,
whether to speak and whether to update the task state.

    frame embeddings [F,D] --mm_projector--> [F,H] --.
                                                      joint_embed --> transformer --> hidden [B,T,H]
    token ids        [B,T] --embed_tokens--> [B,T,H] -'                                 |
                                                         at every <image>:  speaking_decision_head --> speak now?
                                                                            dst_update_head        --> update now?
                                                         when one fires:    lm_head --> the reply or `S5->complete`

The transformer is Llama's (Touvron et al. 2023, arXiv 2302.13971; grouped queries and RoPE scaling as in Llama 3,
arXiv 2407.21783) and keeps Hugging Face's tensor names and config fields, so that published weights load as they are.
The projector and the idea of a decision head beside the LM head come from ProAssist (arXiv 2506.05904), whose single
"stay silent" head becomes two direct ones: speak, and update the task state.

Dimension letters: B sequences in the batch, T tokens, F frames in the whole batch, D width of a frame embedding,
H hidden width, V vocabulary, N query heads, K key/value heads, G = N/K queries per key, E width of a head,
S tokens in the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a position where nothing is learned


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
    """Low-rank adapters beside frozen weights (see lora.py)."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]  # last parts of names: q_proj, gate_proj, ...


@dataclass
class ModelConfig:
    """The shape of a model. Fields up to `mlp_bias` are Hugging Face's LlamaConfig, under its names."""

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
    # ours
    vision_dim: int = 2048  # D: 2048 for SmolVLM2 embeddings, 1152 for SigLIP
    image_token_id: int = 0  # may lie beyond vocab_size: <image> is never looked up and never generated
    dst: bool = True  # False: no task state, one head (ProAssist's architecture)
    dst_state_head: bool = False  # a third head: the state of the most recently started step
    lora: LoraConfig | None = None
    backbone: str = ""  # directory that the transformer's weights came from
    backbone_mark: str = ""  # and their fingerprint


# ---- KV cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of B independent streams, allocated once: memory does not grow while a stream runs.

    Each stream has its own length, so its next token goes to position `lengths[row]`. Rolling back is free:
    set a smaller length, and what lies beyond it is overwritten later and never attended to.

        row 0:  k k k k k k . . . .     lengths = [6, 3]: a forward of 2 tokens writes row 0 at positions 6, 7
        row 1:  k k k . . . . . . .     and row 1 at 3, 4; the mask lets each query see positions up to its own

    A forward of several streams is as long as the longest of them; the caller sets the others' lengths back behind
    their last real token.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, B, K, S, E]
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch  # tokens held for each stream; kept on the host, where the engine decides
        self.capacity = capacity
        # What `reserve` prepares once for the `update` of every layer:
        self.begin, self.end = 0, 0  # the new tokens' places when there is one stream; where all that is held ends
        self.rows: slice | Tensor = slice(0, batch)  # the streams of this forward: a view where they are neighbours
        self.index: tuple[Tensor, Tensor] | None = None  # (row [B,1], place [B,T]) of each new token of several streams
        self.mask: Tensor | None = None  # [B,1,T,S], True where a query may look; None: the plain causal square

    def reserve(self, rows: list[int], num_tokens: int) -> Tensor:
        """Make ready for a forward of `num_tokens` new tokens for each of `rows`; returns their positions [B,T]."""
        device, lengths = self.keys.device, [self.lengths[row] for row in rows]
        self.begin, self.end = lengths[0], max(lengths) + num_tokens
        self.rows = slice(rows[0], rows[-1] + 1)
        self.index = self.mask = None
        positions = torch.arange(self.begin, self.end, device=device)[None]
        if len(rows) > 1:
            # Padding may reach beyond the capacity: it gathers in the last place, which a padded forward must not need.
            self.end = min(self.end, self.capacity)
            positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(num_tokens, device=device)  # [B,T]
            row_index = torch.tensor(rows, device=device)
            self.index = (row_index[:, None], positions.clamp(max=self.capacity - 1))
            if rows != list(range(rows[0], rows[-1] + 1)):
                self.rows = row_index
        assert self.end <= self.capacity, f"{self.end} tokens in a cache of {self.capacity}"
        if len(rows) > 1 or (num_tokens > 1 and self.begin > 0):
            self.mask = (torch.arange(self.end, device=device) <= positions[..., None])[:, None]
        for row in rows:
            self.lengths[row] += num_tokens
        return positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B,K,T,E] where `reserve` said and return all that those rows hold, [B,K,S,E]."""
        keys, values = self.keys[layer], self.values[layer]
        if self.index is None:
            keys[self.rows, :, self.begin : self.end] = k
            values[self.rows, :, self.begin : self.end] = v
        else:
            row, place = self.index
            keys[row, :, place] = k.transpose(1, 2).to(keys.dtype)  # [B,T,K,E]
            values[row, :, place] = v.transpose(1, 2).to(values.dtype)
        return keys[self.rows, :, : self.end], values[self.rows, :, : self.end]


# ---- the transformer -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [B,T,H] -> [B,T,H]
        normed = x.float()  # the mean of squares of a bf16 row would lose half its digits
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of x [B,heads,T,E] by its position's angle; cos, sin [B,1,T,E]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        N, K, E = self.num_heads, self.num_kv_heads, self.head_dim
        q = rotate(self.q_proj(x).view(B, T, N, E).transpose(1, 2), *rope)  # [B,N,T,E]
        k = rotate(self.k_proj(x).view(B, T, K, E).transpose(1, 2), *rope)  # [B,K,T,E]
        v = self.v_proj(x).view(B, T, K, E).transpose(1, 2)  # [B,K,T,E]
        if cache is None:
            # Right padding needs no mask: a real token looks only at what stands before it, which is real too.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=N != K)
        else:
            k, v = cache.update(self.layer, k, v)  # [B,K,S,E]
            if T == 1 and cache.mask is None:
                # One query sees the whole cache, so the G queries that share a key are G rows of one small matmul.
                out = F.scaled_dot_product_attention(q.reshape(B, K, N // K, E), k, v).reshape(B, N, 1, E)
            else:
                causal = cache.mask is None  # an empty cache: the ordinary causal square
                out = F.scaled_dot_product_attention(q, k, v, cache.mask, is_causal=causal, enable_gqa=N != K)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, N * E))


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


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

    def _apply(self, fn, recurse=True):
        """What .to, .half and .cuda call: the frequencies may move but stay in fp32 (in bf16 a position would blur)."""
        frequencies = self.rope_frequencies
        super()._apply(fn, recurse)
        self.rope_frequencies = frequencies.to(self.rope_frequencies.device)
        return self

    def forward(self, x: Tensor, cache: KVCache | None, rows: list[int] | None) -> Tensor:
        B, T, _ = x.shape
        if cache is None:
            positions = torch.arange(T, device=x.device)[None]  # [1,T]
        else:
            positions = cache.reserve(list(range(B)) if rows is None else rows, T)  # [B,T]
        angles = positions[:, None, :, None] * self.rope_frequencies  # [B,1,T,E/2], always in fp32
        angles = torch.cat((angles, angles), dim=-1)  # [B,1,T,E]
        rope = (angles.cos(), angles.sin())
        for block in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, cache, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        return self.norm(x)


# ---- the model -----------------------------------------------------------------------------------


class Prospect(nn.Module):
    """Projector, transformer, LM head and the two decision heads.

    `model(input_ids, image_embeds)` gives hidden states [B,T,H]; `model.lm_head`, `model.speaking_decision_head` and
    `model.dst_update_head` read them. With `labels` it gives the seven loss sums instead (see `loss_sums`): training
    goes through forward as a whole, so that DDP and FSDP see every parameter's use.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(config.vision_dim, H), nn.GELU(), nn.Linear(H, H))
        self.model = Llama(config)
        self.lm_head = nn.Linear(H, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.speaking_decision_head = nn.Linear(H, 1)
        self.dst_update_head = nn.Linear(H, 1) if config.dst else None
        self.dst_state_head = nn.Linear(H, 3) if config.dst_state_head else None

    @staticmethod
    def from_pretrained(directory, vision_dim: int | None = None, **overrides) -> "Prospect":
        """A model from a Hugging Face backbone directory (new projector and heads) or from one of our checkpoints."""
        from prospect.weights import load_model  # the one arrow upwards: the name that readers look for is here

        return load_model(directory, vision_dim=vision_dim, **overrides)

    def joint_embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings [B,T,H] in which the k-th <image> token, in reading order, is the k-th projected frame row.

        image_embeds: [F,D] (or None when there is no <image>); as many rows as <image> tokens, which `collate`
        has checked by clip. Nothing here waits for the device: the mask is filled in order, without counting.
        """
        is_image = input_ids == self.config.image_token_id  # [B,T]
        embeds = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))  # [B,T,H]
        if image_embeds is None:
            return embeds
        frames = self.mm_projector(image_embeds.to(self.mm_projector[0].weight.dtype))  # [F,H]
        return embeds.masked_scatter(is_image[..., None], frames.to(embeds.dtype))

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None = None,
        *,
        labels: dict[str, Tensor] | None = None,
        bce: str = "mean",
        cache: KVCache | None = None,
        rows: list[int] | None = None,
    ) -> Tensor:
        """input_ids [B,T], image_embeds [F,D] -> hidden [B,T,H]; or, with labels (each [B,T]), loss sums [7].

        cache: keys and values of what came before; the new tokens follow them, for all of its streams or `rows`.
        """
        embeds = self.joint_embed(input_ids, image_embeds)
        hidden = self.model(embeds, cache, rows)
        if labels is None:
            return hidden
        return loss_sums(self, hidden, labels, bce)

    @torch.inference_mode()
    def fast_greedy_generate(
        self,
        header_ids: list[int],
        cache: KVCache,
        rows: list[int],
        *,
        end_ids: list[int],
        max_new_tokens: int,
        forbidden: Tensor,
        allowed: list[Callable[[list[int]], list[int]]] | None = None,
    ) -> list["Generated"]:
        """Write one turn into each of the streams `rows`, greedily (the name and the habit are ProAssist's).

        header_ids (the turn's header, the very tokens training has there) are fed, then the likeliest token again and
        again until the end token, end_ids[0]; it and what the template puts behind it, end_ids[1:], are fed as well.
        forbidden: ids [n] that never stand inside a turn (<image>, role marks). allowed: for each row, given the ids so
        far, the only ones that may follow. A turn that reaches `max_new_tokens` or repeats itself is cut, and its end
        token fed all the same, so that the context stays well formed.
        """
        device = self.lm_head.weight.device
        turns = [Generated([], None) for _ in rows]
        writing = list(range(len(rows)))  # turns not yet ended
        feed = [header_ids for _ in rows]
        while writing:
            streams = [rows[i] for i in writing]
            hidden = self(torch.tensor(feed, device=device), cache=cache, rows=streams)[:, -1]  # [n,H]
            logits = self.lm_head(hidden).float().index_fill(1, forbidden, -torch.inf)  # [n,V]
            if allowed is not None:
                closed = torch.full_like(logits, -torch.inf)
                for n, i in enumerate(writing):
                    closed[n, allowed[i](turns[i].ids)] = 0
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
        self(torch.tensor([end_ids] * len(rows), device=device), cache=cache, rows=rows)
        return turns


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


def init_weights(model: Prospect, seed: int, names: set[str] | None = None) -> None:
    """Weights for training from scratch: normal(0, 1/sqrt(width of the input)), so that signals keep their size.

    What adds to the residual stream is scaled down by sqrt(2 layers) more (GPT-2). A fixed 0.02, right for models some
    thousands wide, starves one of width 128: its attention stays flat and names are learned many times slower.
    names: only these parameters, the new parts of a model whose transformer is pretrained.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = ("o_proj.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        if parameter.ndim < 2:
            parameter.data.fill_(1.0 if "norm" in name else 0.0)
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(residual):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)  # on the CPU: alike everywhere
        parameter.data.copy_(drawn)


# ---- the four losses -----------------------------------------------------------------------------

# Labels are counted, and losses summed, in seven classes; the four losses are quotients of these. Keeping sums and
# counts apart until the whole optimizer step is known is what makes a step the same however it is cut into
# micro-batches and ranks.
LOSS_CLASSES = ("speaking_gen", "speaking_pos", "speaking_neg", "dst_gen", "dst_pos", "dst_neg", "dst_state")
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv 1708.02002
LM_CHUNK = 4096  # labelled positions per LM head call: logits of more than [4096, V] are never held at once


def labelled(labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Where a hidden state is learned from, and what: flat indices into B*T and their labels, both [n].

    Labels are aligned with input_ids. A decision is read where it is labelled; a token is predicted from the
    position before it, and this is the one place where that shift happens:

        input_ids   <f194>  Assist  ant  :   Great  !   </s>
        gen labels   -100   Assist  ant  :   Great  !   </s>
        read at        ^----'  ^---'  ^-'  ^---'  ...           index 0 learns the label at 1, ...
    """
    B, T = labels.shape
    wanted = labels[:, 1:] if shift else labels  # the label at t+1 belongs to the hidden state at t
    rows, columns = (wanted != IGNORE).nonzero(as_tuple=True)
    return rows * T + columns, wanted[rows, columns]


def loss_sums(model: Prospect, hidden: Tensor, labels: dict[str, Tensor], bce: str) -> Tensor:
    """Summed losses of one micro-batch by LOSS_CLASSES, [7], fp32.

    hidden [B,T,H]; labels: `speaking_gen_labels`, `speaking_labels`, `dst_gen_labels`, `dst_update_labels` and, for a
    model with the state head, `dst_state_labels`, each [B,T]. Leave the labels on the CPU: then finding the labelled
    positions waits for no device. A class without a label sums to exactly 0 but stays connected to the graph, so that
    on every rank every parameter has a gradient.
    """
    flat = hidden.flatten(0, 1)  # [B*T, H]

    def read(key: str, shift: bool) -> tuple[Tensor, Tensor]:
        index, label = labelled(labels[key], shift=shift)
        return flat.index_select(0, index.to(flat.device)), label.to(flat.device)  # [n,H], [n]

    def generation(keys: list[str]) -> list[Tensor]:
        """All keys' labels go through the LM head together: its weight is read once, and its gradient made once."""
        states, targets = zip(*[read(key, shift=True) for key in keys])
        counts = [len(part) for part in targets]
        states, targets = torch.cat(states), torch.cat(targets)  # [n,H], [n]
        losses = []  # one part, even of no label
        for part, target in zip(states.split(LM_CHUNK), targets.split(LM_CHUNK)):
            if len(states) > LM_CHUNK and torch.is_grad_enabled():
                losses.append(checkpoint(token_losses, model.lm_head, part, target, use_reentrant=False))
            else:
                losses.append(token_losses(model.lm_head, part, target))
        return [part.sum() for part in torch.cat(losses).split(counts)]

    def decision(head: nn.Linear, key: str) -> tuple[Tensor, Tensor]:
        states, label = read(key, shift=False)
        logits, label = head(states).float().squeeze(-1), label.float()
        loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
        if bce == "focal":
            p_true = torch.exp(-loss)  # the probability given to the right answer
            weight = label * FOCAL_ALPHA + (1 - label) * (1 - FOCAL_ALPHA)
            loss = weight * (1 - p_true) ** FOCAL_GAMMA * loss
        return (loss * label).sum(), (loss * (1 - label)).sum()

    speaking_pos, speaking_neg = decision(model.speaking_decision_head, "speaking_labels")
    dst_gen = dst_pos = dst_neg = dst_state = hidden.new_zeros((), dtype=torch.float32)
    if model.dst_update_head is None:
        [speaking_gen] = generation(["speaking_gen_labels"])
    else:
        speaking_gen, dst_gen = generation(["speaking_gen_labels", "dst_gen_labels"])
        dst_pos, dst_neg = decision(model.dst_update_head, "dst_update_labels")
    if model.dst_state_head is not None:
        states, state = read("dst_state_labels", shift=False)
        dst_state = F.cross_entropy(model.dst_state_head(states).float(), state, reduction="sum")
    return torch.stack((speaking_gen, speaking_pos, speaking_neg, dst_gen, dst_pos, dst_neg, dst_state))


def token_losses(lm_head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each of states [n,H] against its token id, [n], from fp32 logits."""
    return F.cross_entropy(lm_head(states).float(), targets, reduction="none")


def count_labels(labels: dict[str, Tensor]) -> Tensor:
    """How many labels of each of LOSS_CLASSES a micro-batch has, [7], as float64 to add up over ranks."""
    speaking, dst = labels["speaking_labels"], labels["dst_update_labels"]
    counts = [
        (labels["speaking_gen_labels"][:, 1:] != IGNORE).sum(),
        (speaking == 1).sum(),
        (speaking == 0).sum(),
        (labels["dst_gen_labels"][:, 1:] != IGNORE).sum(),
        (dst == 1).sum(),
        (dst == 0).sum(),
        (labels["dst_state_labels"] != IGNORE).sum(),
    ]
    return torch.stack(counts).double()


def loss_terms(sums: Tensor, counts: Tensor, bce: str) -> dict[str, Tensor]:
    """The losses, each a sum over its own count: of a whole optimizer step when `counts` are.

    sums, counts: [7] by LOSS_CLASSES. A term without a label is exactly 0. `bce`: mean and focal divide by all labels;
    balanced is the mean of the positives' mean and the negatives' mean.
    """
    counts = counts.to(sums.device, torch.float32)
    s, n = dict(zip(LOSS_CLASSES, sums)), dict(zip(LOSS_CLASSES, counts))

    def binary(head: str) -> Tensor:
        pos, neg = f"{head}_pos", f"{head}_neg"
        if bce == "balanced":
            return 0.5 * (s[pos] / n[pos].clamp(min=1) + s[neg] / n[neg].clamp(min=1))
        return (s[pos] + s[neg]) / (n[pos] + n[neg]).clamp(min=1)

    return {
        "speaking_gen": s["speaking_gen"] / n["speaking_gen"].clamp(min=1),
        "speaking_binary": binary("speaking"),
        "dst_gen": s["dst_gen"] / n["dst_gen"].clamp(min=1),
        "dst_binary": binary("dst"),
        "dst_state": s["dst_state"] / n["dst_state"].clamp(min=1),
    }
