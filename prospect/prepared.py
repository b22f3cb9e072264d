"""A trained model made ready to stream: the same weights and the same mathematics, in fewer and wider products.

A silent frame multiplies every weight by a single row, so it takes as long as reading the weights, and every operation
beside that is waste. Here query, key and value are one product, gate and up another, the residual is added within a
product, both rotations are one, and so are the operations of a norm. Training is better off with model.py's plain
layers: there operations are large.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from prospect.model import Block, KVCache, Prospect, RMSNorm, Slots, attend, rotate


@torch.no_grad()
def prepare(model: Prospect) -> None:
    """Make a model ready to stream, when it has its device and type, and no adapters any more.

    Names and values stay. The layers' weights become parts of the merged ones, so nothing is stored twice. Where the
    model is moved afterwards (`.to`), it streams with its plain layers again.
    """
    assert model.config.lora is None, "adapters are merged first"
    model.model.prepared = [PreparedBlock(block) for block in model.model.layers]
    if model.lm_head.weight is not model.model.embed_tokens.weight:  # a tied one's rows are looked up
        model.lm_head.weight.data = stored(model.lm_head.weight)


def stored(weight: Tensor) -> Tensor:
    """A weight [out,in] as a product with few rows reads it fastest: on a CPU in fp32, column by column if out > in.

    The same numbers with other strides. Few long columns are read faster than many short rows, 1.7 times at 1408 x 512.
    """
    wide = weight.shape[0] > weight.shape[1]
    if wide and weight.device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


class Product:
    """Linear layers that share their input as one: x [n,in] -> [n,out]."""

    def __init__(self, *layers: nn.Linear):
        weight = stored(torch.cat([layer.weight for layer in layers]))  # [out,in]
        self.weight = weight.t()
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])  # [out]
        for layer, part in zip(layers, weight.split([layer.out_features for layer in layers])):
            layer.weight.data = part

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out + self.bias


class PreparedBlock:
    """model.Block, with a cache. Called like it."""

    def __init__(self, block: Block):
        attention, mlp = block.self_attn, block.mlp
        self.layer = attention.layer
        self.heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        self.before_attention = (block.input_layernorm.weight, block.input_layernorm.eps)
        self.before_mlp = (block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.qk_norm = None
        if isinstance(attention.q_norm, RMSNorm):  # Qwen3's: one weight for all queries, another for all keys
            norms = [attention.q_norm] * attention.num_heads + [attention.k_norm] * attention.num_kv_heads
            self.qk_norm = torch.stack([norm.weight for norm in norms]), attention.q_norm.eps  # [N+K,E]
        self.o = Product(attention.o_proj)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)
        self.down = Product(mlp.down_proj)

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, slots: Slots) -> Tensor:
        (B, T, H), (N, K, E) = x.shape, self.heads
        x = x.view(B * T, H)
        qkv = self.qkv(F.rms_norm(x, (H,), *self.before_attention)).view(B, T, N + 2 * K, E)
        qk = qkv[:, :, : N + K]
        if self.qk_norm is not None:
            weight, eps = self.qk_norm
            qk = F.rms_norm(qk, (E,), eps=eps) * weight
        qk = rotate(qk, *rope)
        k, v = cache.update(self.layer, qk[:, :, N:], qkv[:, :, N + K :], slots)  # [B,K,S,E]
        x = self.o.added_to(x, attend(qk[:, :, :N], k, v, slots.mask).view(B * T, N * E))
        gate, up = self.gate_up(F.rms_norm(x, (H,), *self.before_mlp)).chunk(2, dim=-1)
        return self.down.added_to(x, F.silu(gate) * up).view(B, T, H)
