"""The model: Qwen3 with a language-model head or a reward head, its cache, generation, scoring and checkpoints.

    python codescaler.py score --rm out/rm --problem statement.md a.py b.py    # ranks programs by score
    python codescaler.py generate --model tiny/policy "Write solve(xs) ..." -n 4

Models are folders or hub ids in Hugging Face layout (Qwen/Qwen3-8B, Skywork/Skywork-Reward-V2-Qwen3-8B, ...). Parameter
names are Hugging Face's, so loading needs no map. From ids to a score: Qwen3.forward -> Block -> Attention, MLP ->
Qwen3.score. One GPU or several ranks: setup, load_model(sharded=True), adamw, clip_gradients, gathered, Run.

Shape suffixes: B batch, T time, D model width, H query heads, G key/value heads, K head size, V vocabulary, S slots.
Batches are right-padded and lengths say what is real: with causal attention no real token ever sees the padding.
"""

import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import UserError, check_least, parse_args, run_cli

# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    """The fields of a Qwen3 config.json that change the computation, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    pad_token_id: int | None = None
    eos_token_id: int | tuple | None = None

    @staticmethod
    def from_dict(raw, where="config.json"):
        """Reads both spellings in use (`rope_theta` or `rope_parameters`); refuses what this file does not compute."""
        if raw.get("model_type") != "qwen3":
            raise UserError(f"{where}: model_type {raw.get('model_type')!r}: only dense Qwen3 ('qwen3') is implemented")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: RoPE scaling {kind!r} is not implemented")
        if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
            raise UserError(f"{where}: sliding-window attention is not implemented")
        if raw.get("attention_bias") or raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: attention_bias and hidden_act other than silu are not implemented")
        values = {f.name: raw[f.name] for f in dataclasses.fields(Config) if raw.get(f.name) is not None}
        values["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", 1e6)))
        try:
            config = Config(**values)
        except TypeError as error:
            raise UserError(f"{where}: {str(error).replace('Config.__init__() ', '')}") from None
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{where}: {config.num_attention_heads} query heads over {config.num_key_value_heads} kv heads"
            )
        return config

    def to_dict(self, head, dtype="float32"):
        """config.json as transformers reads it; `dtype` is that of the weights beside it."""
        name = "Qwen3ForCausalLM" if head == "lm" else "Qwen3ForSequenceClassification"
        raw = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        raw.update(architectures=[name], model_type="qwen3", hidden_act="silu", attention_bias=False, torch_dtype=dtype)
        raw.update(attention_dropout=0.0, use_sliding_window=False, rope_scaling=None)
        if head == "score":  # num_labels = 1 is written as a label map with one entry
            raw.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
        return raw


def _shape(D, layers, heads, M, tied):
    """A published configuration: all of them have 8 key/value heads of size 128 and the same vocabulary."""
    return Config(151936, D, layers, heads, 8, 128, M, tie_word_embeddings=tied, eos_token_id=151645)


SHAPES = {  # sizes of the published models and of two small ones, for measurements with random weights (--random-init)
    "tiny-shape": Config(8192, 128, 4, 4, 2, 32, 384, tie_word_embeddings=True, eos_token_id=1),
    "small-shape": Config(32768, 512, 8, 8, 4, 64, 1536, tie_word_embeddings=True, eos_token_id=1),
    "qwen3-0.6b-shape": _shape(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b-shape": _shape(2048, 28, 16, 6144, tied=True),
    "qwen3-4b-shape": _shape(2560, 36, 32, 9728, tied=True),
    "qwen3-8b-shape": _shape(4096, 36, 32, 12288, tied=False),
    "qwen3-14b-shape": _shape(5120, 40, 40, 17408, tied=False),
}


# ----------------------------------------------------------------------------------------------------------------------
# the forward pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_table(config, positions):
    """Positions [...] -> cos and sin [..., 1, K]: angle position * theta^(-2i/K) for dimension i and for i + K/2, the
    sine negative in the first half, as apply_rope needs it."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angle = positions[..., None].float() * config.rope_theta**-exponent
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x_BTHK, cos_BT1K, sin_BT1K):
    """Rotates dimension i against dimension i + K/2 (halves, as in Qwen's checkpoints; not neighbours 2i, 2i+1).

    At position 0 nothing turns; a quarter turn takes (1, 0) to (0, 1):

    >>> apply_rope(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, 1.0]])).tolist()
    [[0.0, 1.0]]
    """
    return x_BTHK * cos_BT1K + x_BTHK.roll(x_BTHK.shape[-1] // 2, -1) * sin_BT1K


def pack(weight):
    """A weight [out, in] as oneDNN multiplies it fastest, for product(). Small ones stay as they are, since the call
    costs more than it saves, and so do those in bf16."""
    weight = weight.detach()  # a Parameter would become the module's own
    pays = weight.numel() >= 2**18 and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return torch.ops.mkldnn._reorder_linear_weight(weight) if pays else weight


def product(x, weight):
    """x [..., in] and a weight [out, in], packed or not -> [..., out]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without bias; `packed` takes the weight's place within fused_weights."""

    packed = None

    def forward(self, x):
        return product(x, self.weight if self.packed is None else self.packed)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads. Queries and keys are normalised per head."""

    def __init__(self, config):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.o_proj = Linear(H * K, D, bias=False)
        self.q_norm = RMSNorm(K, config.rms_norm_eps)
        self.k_norm = RMSNorm(K, config.rms_norm_eps)
        self.qkv = self.qk_scale = None  # see fused_weights

    def project(self, x_BTD, rope):
        """Queries [B, T, H, K] and keys [B, T, G, K], normalised and rotated, and values [B, T, G, K]."""
        if self.qkv is not None:
            heads_BTHK = product(x_BTD, self.qkv).unflatten(-1, (-1, self.head_dim))
            G = self.k_proj.out_features // self.head_dim
            qk_BTHK = F.rms_norm(heads_BTHK[:, :, :-G], (self.head_dim,), eps=self.q_norm.eps) * self.qk_scale
            qk_BTHK = apply_rope(qk_BTHK, *rope)
            return qk_BTHK[:, :, :-G], qk_BTHK[:, :, -G:], heads_BTHK[:, :, -G:]
        q_BTHK, k_BTGK, v_BTGK = (
            linear(x_BTD).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(self.q_norm(q_BTHK), *rope), apply_rope(self.k_norm(k_BTGK), *rope), v_BTGK

    def forward(self, x_BTD, rope, cache):
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, rope)
        if cache is not None:
            cache.write(k_BTGK, v_BTGK)
        if cache is None or cache.is_empty:  # nothing came before: plain causal attention, no mask needed
            y_BHTK = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2), is_causal=True, enable_gqa=True
            )
            y_BTHK = y_BHTK.transpose(1, 2)
        else:
            y_BTHK = cache.attend(q_BTHK)
        return self.o_proj(y_BTHK.flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = Linear(M, D, bias=False)
        self.gate_up = None  # see fused_weights

    def forward(self, x):
        if self.gate_up is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = product(x, self.gate_up).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on normalised input and added to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, rope, cache):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Trunk(nn.Module):
    """Everything below the head; the name `model` of Hugging Face's checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """head="lm": logits over the vocabulary (by the embedding, if tied). head="score": one fp32 number a text."""

    def __init__(self, config, head="lm", score_bias=False):
        super().__init__()
        if head not in ("lm", "score"):
            raise ValueError(f"head {head!r}: expected 'lm' or 'score'")
        self.config, self.head = config, head
        self.num_tokens = config.vocab_size  # ids from here on are padding of the matrix: never sampled
        self.head_source = "random"
        self.checkpointing = False  # keep only the blocks' inputs for the backward pass and compute the rest again
        self.compiled = False  # see compile_blocks
        self.packed_head = None  # see fused_weights
        self.model = Trunk(config)
        if head == "score":
            self.score_head_bias = score_bias
            self.score = ScoreHead(config.hidden_size, bias=score_bias)
        elif not config.tie_word_embeddings:
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_BT, lengths_B=None, cache=None):
        """ids [B, T], right-padded to real lengths [B] -> hidden states [B, T, D] after the final norm.

        With a KVCache, row b continues at position cache.lengths_B[b] and the cache grows by lengths_B. Values at
        padded positions are arbitrary. Without a cache the lengths change nothing: causal attention never looks right.
        """
        T = ids_BT.shape[1]
        position_BT = torch.arange(T, device=ids_BT.device)[None]
        if cache is not None:
            position_BT = cache.begin(position_BT, ids_BT.shape[0])
        x_BTD = self.model.embed_tokens(ids_BT)
        rope = [table.to(x_BTD.dtype) for table in rope_table(self.config, position_BT)]
        for layer, block in enumerate(self.model.layers):
            # A block gets the cache of its layer and no number: compiled code would be made anew for every number.
            mine = None if cache is None else cache.at(layer)
            if self.checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rope, mine, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rope, mine)
        if cache is not None:
            cache.end(T if lengths_B is None else lengths_B)
        return self.model.norm(x_BTD)

    def logits(self, hidden):
        """Hidden states [..., D] -> fp32 logits [..., V]. Call it on the positions that are needed, not on all."""
        if self.packed_head is not None and self.packed_head.is_mkldnn:
            return product(hidden, self.packed_head)
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)).float()
        return self.lm_head(hidden)

    def use_head(self, function, hidden):
        """function(logits, hidden) -> its result, where logits() is as above and may be called any number of times: of
        a model over several ranks, the head's weight is gathered once."""
        if self.config.tie_word_embeddings:
            return function(self.logits, hidden)
        return self.lm_head(hidden, function)


def compile_blocks(model):
    """torch.compile of each block, for training. The saving: what lies between two products becomes one pass over the
    activations, 1.07 times as fast at tiny and 1.06 at small (forward and backward of pairs on a CPU thread; not
    measured on a GPU). The first steps take a minute, while it compiles. Gradients stay the same:
    test_compiled_blocks_give_the_same_gradients. gathered() returns plain blocks, since decoding changes its shapes in
    every step."""
    for block in model.model.layers:
        block.compile(dynamic=True)
    model.compiled = True


@contextlib.contextmanager
def fused_weights(model):
    """Within it, one product makes q, k and v, another gate and up, and one normalisation and rotation serves q and k;
    large weights are packed for oneDNN.

    The saving: five products of a block become two, which counts where a pass has few tokens and calls cost more than
    they compute; packing took generation at the small shape of `bench.py speed` from 3.0 to 4.5 times the speed of
    transformers. For passes without gradients, while the weights stay as they are. The copies are only made on a CPU,
    whose models are small, and once where one such block is inside another. Equal to the plain path:
    test_fused_weights_change_nothing.
    """
    if model.model.layers[0].self_attn.qkv is not None:
        yield
        return
    weight = model.model.norm.weight
    plain = weight.is_cuda or isinstance(weight, DTensor)
    blocks = [] if plain else model.model.layers
    with torch.no_grad():
        for block in blocks:
            a, m = block.self_attn, block.mlp
            a.qkv = pack(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]))
            heads_q, heads_k = (linear.out_features // a.head_dim for linear in (a.q_proj, a.k_proj))
            a.qk_scale = torch.cat([a.q_norm.weight.expand(heads_q, -1), a.k_norm.weight.expand(heads_k, -1)])
            m.gate_up = pack(torch.cat([m.gate_proj.weight, m.up_proj.weight]))
            a.o_proj.packed, m.down_proj.packed = pack(a.o_proj.weight), pack(m.down_proj.weight)
        if model.head == "lm" and not plain:
            head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
            model.packed_head = pack(head.weight)
    try:
        yield
    finally:
        model.packed_head = None
        for block in blocks:
            block.self_attn.qkv = block.self_attn.qk_scale = block.mlp.gate_up = None
            block.self_attn.o_proj.packed = block.mlp.down_proj.packed = None


class LMHead(nn.Linear):
    """hidden [..., D] -> fp32 logits [..., V]; or function(logits, hidden), as Qwen3.use_head says."""

    def forward(self, hidden, function=None):
        def logits(hidden):
            return F.linear(hidden, self.weight).float()

        return logits(hidden) if function is None else function(logits, hidden)


class ScoreHead(nn.Linear):
    """hidden [B, T, D] and lengths [B] -> scores [B] at the last real token, computed in fp32.

    In bf16 scores near 8 would be rounded to multiples of 1/16, and different programs would tie.
    """

    def __init__(self, size, bias):
        super().__init__(size, 1, bias=bias)

    def forward(self, hidden_BTD, lengths_B):
        last_BD = hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), lengths_B - 1]
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(last_BD.float(), self.weight.float(), bias).sum(-1)  # of one: a tensor of its own, no view


@torch.no_grad()
def init_weights(model, seed=0, std=0.02):
    """Fresh weights in place: normal with `std` for matrices, ones for norms, zeros for the score head."""
    device = local(model.model.norm.weight).device
    generator = torch.Generator(device).manual_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))
    for name, p in model.named_parameters():
        if name.startswith("score."):
            local(p).zero_()
        elif p.ndim == 1:
            local(p).fill_(1.0)
        else:
            local(p).normal_(0.0, std, generator=generator)


def pad_rows(rows, device="cpu", pad=0):
    """Lists of ids -> (ids [B, T] right-padded, lengths [B])."""
    lengths = [len(row) for row in rows]
    ids_BT = torch.full((len(rows), max(lengths)), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, : lengths[i]] = torch.tensor(row)
    return ids_BT.to(device), torch.tensor(lengths, device=device)


# ----------------------------------------------------------------------------------------------------------------------
# the cache


class KVCache:
    """Keys and values of B rows, room for S tokens each, allocated once: k, v [layers, B, G, S + 1, K].

    The last slot is never read: padding that would lie behind the end of a row is written there.

    A forward pass calls begin(), then in every layer at(), write() and attend(), then end(), as with all caches below.
    The first `live` rows take part.
    """

    def __init__(self, config, rows, slots, dtype=torch.float32, device="cpu"):
        self.slots = slots
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots + 1, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest, self.is_empty = 0, True  # on the host: reading lengths_B would wait for the device

    def begin(self, offset_BT, live):
        """Row-relative positions [1, T] -> positions [live, T]. Prepares the mask all layers share."""
        self.live, self.new = live, offset_BT.shape[1]
        self.position_BT = self.lengths_B[:live, None] + offset_BT
        self.row_B1 = torch.arange(live, device=self.k.device)[:, None]
        self.end_slot = min(self.longest + self.new, self.slots)
        if not self.is_empty:  # else attention is plainly causal
            slot_S = torch.arange(self.end_slot, device=self.k.device)
            hidden_BTS = slot_S > self.position_BT[:, :, None]  # a token sees all slots up to its own
            # Added to the products of all layers: a mask of bools would be turned into this one in each of them.
            self.mask_BTS = torch.zeros_like(hidden_BTS, dtype=self.k.dtype).masked_fill_(hidden_BTS, -math.inf)
        return self.position_BT

    def at(self, layer):
        self.layer = layer
        return self

    def write(self, k_BTGK, v_BTGK):
        slot_BT = self.position_BT.clamp(max=self.slots)
        self.k[self.layer].transpose(1, 2)[self.row_B1, slot_BT] = k_BTGK.to(self.k.dtype)
        self.v[self.layer].transpose(1, 2)[self.row_B1, slot_BT] = v_BTGK.to(self.v.dtype)

    def attend(self, q_BTHK):
        """Attention of the new queries over the cache -> [B, T, H, K].

        The H/G query heads of a kv head stand in the time dimension of the product, so K/V are never repeated.
        """
        B, T, H, K = q_BTHK.shape
        k_BGSK, v_BGSK = self.k[self.layer, :B, :, : self.end_slot], self.v[self.layer, :B, :, : self.end_slot]
        G = k_BGSK.shape[1]
        q_BGRK = q_BTHK.view(B, T, G, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, G, T * (H // G), K)
        if T > 1 and self.mask_BTS.shape[1] == T:  # once a pass; one token a row needs no more than one line of it
            self.mask_BTS = self.mask_BTS.repeat_interleave(H // G, dim=1)
        y_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=self.mask_BTS[:, None])
        return y_BGRK.view(B, G, T, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, T, H, K)

    def end(self, lengths):
        self.lengths_B[: self.live] += lengths
        self.longest, self.is_empty = self.end_slot, False

    def copy_rows(self, source, rows):
        """Fills this cache with rows of another one, each as often as it is named."""
        slots = source.longest
        self.k[:, :, :, :slots], self.v[:, :, :, :slots] = source.k[:, rows, :, :slots], source.v[:, rows, :, :slots]
        self.lengths_B, self.longest, self.is_empty = source.lengths_B[rows], slots, False


def masked_logits(mask_B1S, q_BQK, k_BSK):
    """Attention logits [B, Q, S] plus the mask, always fp32: rounded to bf16 those around 8 would be off by 1/32.
    The CUDA line is untested."""
    kT_BKS, scale = k_BSK.transpose(1, 2), k_BSK.shape[-1] ** -0.5
    if q_BQK.is_cuda and q_BQK.dtype != torch.float32:
        return torch.add(mask_B1S, torch.bmm(q_BQK, kT_BKS, out_dtype=torch.float32), alpha=scale)
    return torch.baddbmm(mask_B1S, q_BQK.float(), kT_BKS.float(), alpha=scale)


def few_sizes(count, limit, multiple=None):
    """A count rounded up to a power of two, or to a multiple, but not past the limit.

    >>> few_sizes(5, 100), few_sizes(300, 1000, 256), few_sizes(300, 400, 256)
    (8, 512, 400)
    """
    return min(limit, -(-count // multiple) * multiple if multiple else 1 << (count - 1).bit_length())


def attend_part(mask_B1S, q_BQK, k_BSK, v_BSK):
    """Attention over a part of the keys -> fp32 result [B, Q, K] and logarithm of the sum of its weights [B, Q, 1]."""
    logits_BQS = masked_logits(mask_B1S, q_BQK, k_BSK)
    top_BQ1 = logits_BQS.amax(-1, keepdim=True)
    weight_BQS = (logits_BQS - top_BQ1).exp_()
    sum_BQ1 = weight_BQS.sum(-1, keepdim=True)
    return torch.bmm(weight_BQS.to(v_BSK.dtype), v_BSK) / sum_BQ1, top_BQ1 + sum_BQ1.log()


class GroupCache:
    """Keys and values of the rows that are decoded, one token a row and pass, with each prompt once for all its rows.

    The saving: a group's queries are multiplied with one copy of their prompt, which is read once for all of them.
    Equal to KVCache, row by row: test_rows_that_share_their_prompt_equal_rows_of_their_own.

    Prompts are in slots without holes: prompt_k, prompt_v [layers, slots, G, S, K]. Rows are without holes too: own_k,
    own_v [layers, rows, G, N, K], N being the longest answer. All rows write to the same place of N, the next one in
    turn, so a row's own tokens begin anywhere, and own_mask_RN says where they are. A row attends to its prompt and to
    its own tokens apart, and the two results are averaged by the sums of their weights.

    prepare() comes before a pass and does what needs the host; the pass itself is the device's alone. `few_shapes`
    rounds all sizes up, so that a graph captured for one pass serves many: rows and prompts past the live ones are
    computed like others, and nobody reads them.
    """

    is_empty = False

    def __init__(self, config, rows, prompts, longest_prompt, new, dtype, device, few_shapes=False):
        L, G, K = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        kind = {"dtype": dtype, "device": device}
        self.prompt_k, self.prompt_v = (torch.zeros(L, prompts, G, longest_prompt, K, **kind) for _ in range(2))
        self.own_k, self.own_v = (torch.zeros(L, rows, G, new, K, **kind) for _ in range(2))
        self.own_mask_RN = torch.zeros(rows, new, device=device)
        self.position_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.prompts, self.slot_of, self.began = [], [], []  # (name, length) in each slot; slot and first step of rows
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)  # of N, for the tokens of the next pass
        self.step, self.arranged = 0, False  # passes so far
        self.few_shapes, self.tables = few_shapes, {}

    def add_row(self, prefix, b, prompt, length):
        """A new last row behind the prompt that is row b of a KVCache."""
        if (prompt, length) not in self.prompts:
            for mine, source in ((self.prompt_k, prefix.k), (self.prompt_v, prefix.v)):
                mine[:, len(self.prompts), :, :length] = source[:, b, :, :length]
            self.prompts.append((prompt, length))
        r = len(self.slot_of)
        self.own_mask_RN[r], self.position_R1[r] = -math.inf, length
        self.slot_of.append(self.prompts.index((prompt, length)))
        self.began.append(self.step)
        self.arranged = False

    def remove_row(self, r):
        """The last row takes the place of row r, and the last prompt that of a prompt whose last row has gone."""
        slot, last = self.slot_of[r], len(self.slot_of) - 1
        if r != last:
            for tensor in (self.own_k.transpose(0, 1), self.own_v.transpose(0, 1)):
                tensor[r] = tensor[last]
            self.own_mask_RN[r], self.position_R1[r] = self.own_mask_RN[last], self.position_R1[last]
            self.slot_of[r], self.began[r] = self.slot_of[last], self.began[last]
        self.slot_of.pop()
        self.began.pop()
        if slot not in self.slot_of:
            last = len(self.prompts) - 1
            self.prompt_k[:, slot], self.prompt_v[:, slot] = self.prompt_k[:, last], self.prompt_v[:, last]
            self.prompts[slot] = self.prompts[last]
            self.prompts.pop()
            self.slot_of = [slot if s == last else s for s in self.slot_of]
        self.arranged = False

    def arrange(self):
        """Rows came or went: a table with a line for each prompt and a cell for each of its rows. to_prompts has, for
        prompt, kv head and cell in turn, the number of the row's kv head (of an empty cell any: nobody reads it);
        to_rows is the way back. The views of K and V that all steps use are made here, too."""
        self.close_up()
        device, R, P, G = self.own_k.device, len(self.slot_of), len(self.prompts), self.own_k.shape[2]
        lines = [[r for r, s in enumerate(self.slot_of) if s == slot] for slot in range(P)]
        lengths, C = [length for _, length in self.prompts], max(map(len, lines))
        S = max(lengths)
        if self.few_shapes:
            R, C = few_sizes(R, self.own_k.shape[1]), few_sizes(C, self.own_k.shape[1])
            P, S = few_sizes(P, self.prompt_k.shape[1]), few_sizes(S, self.prompt_k.shape[3], 256)
        row_PC = torch.tensor([line + [0] * (C - len(line)) for line in lines + [[]] * (P - len(lines))])
        cells = [slot * G * C + lines[slot].index(r) for r, slot in enumerate(self.slot_of)]
        cell_R = torch.tensor(cells + [0] * (R - len(cells)))
        head_G = torch.arange(G)
        lengths_P = torch.tensor(lengths + [1] * (P - len(lengths)), device=device).repeat_interleave(G)
        hidden_PS = torch.arange(S, device=device) >= lengths_P[:, None]
        tables = (
            (row_PC[:, None] * G + head_G[:, None]).flatten().to(device),
            (cell_R[:, None] + head_G * C).flatten().to(device),
            torch.zeros(hidden_PS.shape, device=device).masked_fill_(hidden_PS, -math.inf)[:, None],
        )
        self.shape = (R, P, C, S)
        if self.few_shapes:  # a captured graph reads the tables where they were when it was captured
            kept = self.tables.setdefault(self.shape, tables)
            tables = [mine.copy_(new) for mine, new in zip(kept, tables)]
        self.to_prompts, self.to_rows, self.prompt_mask_P1S = tables
        prompts, rows = (slice(None), slice(P), slice(None), slice(S)), (slice(None), slice(R))
        self.prompt_ks, self.prompt_vs = (x[prompts].flatten(1, 2).unbind() for x in (self.prompt_k, self.prompt_v))
        self.own_ks, self.own_vs = (x[rows].flatten(1, 2).unbind() for x in (self.own_k, self.own_v))
        self.arranged = True

    def close_up(self):
        """Where most of the places that are read hold tokens of rows that have gone, the others go to the front."""
        N, age = self.own_k.shape[3], self.step - min(self.began)
        if 2 * age >= min(self.step, N):
            return
        place_A = torch.arange(self.step - age, self.step, device=self.own_k.device) % N
        for x in (self.own_k, self.own_v):
            for layer in x:  # one at a time, so that the copy is small
                layer[:, :, :age] = layer[:, :, place_A]
        self.own_mask_RN[:, :age], self.own_mask_RN[:, age:] = self.own_mask_RN[:, place_A], -math.inf
        self.began, self.step = [step - (self.step - age) for step in self.began], age

    def prepare(self):
        """Before each pass -> the sizes on which its shapes depend, the rows that it computes first."""
        if not self.arranged:
            self.arrange()
        N = self.own_k.shape[3]
        self.width = min(self.step + 1, N)
        if self.few_shapes:
            self.width = few_sizes(self.width, N, 256)
        self.place_1.fill_(self.step % N)
        self.step += 1
        return *self.shape, self.width

    def begin(self, offset_11, live):
        self.live, G = live, self.own_k.shape[2]
        self.own_mask_RN[:live].index_fill_(1, self.place_1, 0)
        self.mask_R1N = self.own_mask_RN[:live, : self.width].repeat_interleave(G, 0)[:, None]  # a line a kv head
        return self.position_R1[:live]

    def at(self, layer):
        self.layer = layer
        return self

    def write(self, k_R1GK, v_R1GK):
        for mine, new_R1GK in ((self.own_ks[self.layer], k_R1GK), (self.own_vs[self.layer], v_R1GK)):
            mine.index_copy_(1, self.place_1, new_R1GK.reshape(len(mine), 1, -1))

    def attend(self, q_R1HK):
        """Below R counts kv heads of rows, P those of prompts, C the queries of a prompt's kv head, M of a row's."""
        k_RNK, v_RNK = self.own_ks[self.layer][:, : self.width], self.own_vs[self.layer][:, : self.width]
        k_PSK, v_PSK = self.prompt_ks[self.layer], self.prompt_vs[self.layer]
        (P, _, K), q_RMK = k_PSK.shape, q_R1HK.reshape(len(k_RNK), -1, q_R1HK.shape[-1])
        own_RMK, own_sum_RM1 = attend_part(self.mask_R1N, q_RMK, k_RNK, v_RNK)
        q_PCK = q_RMK.index_select(0, self.to_prompts).view(P, -1, K)
        prompt = attend_part(self.prompt_mask_P1S, q_PCK, k_PSK, v_PSK)
        prompt_RMK, prompt_sum_RM1 = (
            x.view(-1, q_RMK.shape[1], x.shape[-1]).index_select(0, self.to_rows) for x in prompt
        )
        share_RM1 = (prompt_sum_RM1 - own_sum_RM1).sigmoid()
        return torch.lerp(own_RMK, prompt_RMK, share_RM1).to(q_R1HK.dtype).view(q_R1HK.shape)

    def end(self, lengths):
        self.position_R1[: self.live] += 1


class LayerKeys:
    """Keeps the keys and values of G prompts in one layer."""

    is_empty = True  # prompts attend to themselves only

    def write(self, k_GPGK, v_GPGK):
        self.k, self.v = k_GPGK, v_GPGK


class PromptKeys:
    """Keeps the keys and values of G prompts, with their gradients, for SharedPrompts."""

    def __init__(self):
        self.layers = []

    def begin(self, offset_1P, live):
        return offset_1P

    def at(self, layer):
        self.layers.append(LayerKeys())
        return self.layers[layer]

    def end(self, lengths):
        pass


class LayerOnPrompts:
    """One layer of SharedPrompts."""

    is_empty = False

    def __init__(self, prompts, group_B, mask_B1TS):
        self.prompts, self.group_B, self.mask_B1TS = prompts, group_B, mask_B1TS

    def write(self, k_BTGK, v_BTGK):
        self.k, self.v = k_BTGK, v_BTGK

    def attend(self, q_BTHK):
        k_BGSK, v_BGSK = (
            torch.cat([prompts[self.group_B], answers], dim=1).transpose(1, 2)
            for prompts, answers in ((self.prompts.k, self.k), (self.prompts.v, self.v))
        )
        if q_BTHK.is_cuda:  # of the fused kernels only cuDNN's takes a mask and fewer kv heads (untested)
            repeats = q_BTHK.shape[2] // k_BGSK.shape[1]
            k_BGSK, v_BGSK = k_BGSK.repeat_interleave(repeats, 1), v_BGSK.repeat_interleave(repeats, 1)
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BGSK, v_BGSK, attn_mask=self.mask_B1TS, enable_gqa=not q_BTHK.is_cuda
        )
        return y_BHTK.transpose(1, 2)


class SharedPrompts:
    """B answers on top of G prompts, with exact gradients (KVCache has none): answer b attends to the prompt
    `group_B[b]` and to itself. The saving: a prompt is computed once, forward and backward, instead of once an answer.
    """

    def __init__(self, prompt_keys, group_B, prompt_lengths_G):
        self.layers, self.group_B, self.start_B1 = prompt_keys.layers, group_B, prompt_lengths_G[group_B][:, None]

    def begin(self, offset_1T, live):
        slot_P = torch.arange(self.layers[0].k.shape[1], device=offset_1T.device)
        prompt_BTP = (slot_P < self.start_B1)[:, None].expand(-1, offset_1T.shape[1], -1)
        own_BTT = (offset_1T <= offset_1T.T).expand(live, -1, -1)
        self.mask_B1TS = torch.cat([prompt_BTP, own_BTT], dim=2)[:, None]
        return self.start_B1 + offset_1T

    def at(self, layer):
        return LayerOnPrompts(self.layers[layer], self.group_B, self.mask_B1TS)

    def end(self, lengths):
        pass


def continue_prompts(model, prompts, answers, group):
    """G prompts and B answers (lists of ids), answer b continuing prompts[group[b]] -> hidden states of the prompts'
    last tokens [G, D], of the answers [B, T, D] and the answers' lengths [B]. Equal to running prompt + answer as B
    rows (tests/test_model.py), gradients included."""
    device = model.model.norm.weight.device
    (ids_GP, prompt_lengths_G), (ids_BT, lengths_B) = pad_rows(prompts, device), pad_rows(answers, device)
    prompt_keys = PromptKeys()
    prompt_GPD = model(ids_GP, prompt_lengths_G, prompt_keys)
    shared = SharedPrompts(prompt_keys, torch.tensor(group, device=device), prompt_lengths_G)
    answer_BTD = model(ids_BT, lengths_B, shared)
    last_GD = prompt_GPD[torch.arange(len(prompts), device=device), prompt_lengths_G - 1]
    # A sharded block gathers its weights for the backward pass when its output gets a gradient: the prompts' must, too.
    return last_GD, answer_BTD + 0.0 * last_GD.sum(), lengths_B


# ----------------------------------------------------------------------------------------------------------------------
# sampling and generation


class Completion(NamedTuple):
    """`ids` end with the stop token if `finished`; `logps` are log-probabilities under the sampling distribution;
    `support` lists the allowed ids of each step when top-p or top-k cut the vocabulary, else it is None."""

    ids: list
    logps: list
    finished: bool
    support: list | None


def allowed_logits(logits_BV, temperature=1.0, top_p=1.0, top_k=0):
    """Logits after temperature, then top-k, then top-p (Hugging Face's order and tie rules), -inf where not allowed.

    top_k keeps every token as likely as the k-th; top_p drops the least likely tokens, up to 1 - top_p in all.
    """
    logits_BV = logits_BV if temperature == 1.0 else logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if top_p < 1.0:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        drop_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        drop_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), -math.inf)
    return logits_BV


def uniforms(seed, prompt_key, sample, count):
    """`count` numbers in [0, 1): a function of seed, prompt, sample and position alone (splitmix64 of a counter), so a
    sample does not depend on the batch it is drawn in.

    >>> uniforms(0, 3, 1, 5)[:2].equal(uniforms(0, 3, 1, 2))
    True
    """

    def mix(x):  # splitmix64's finaliser; uint64 arrays wrap around at 2^64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden, base = np.uint64(0x9E3779B97F4A7C15), np.zeros(1, dtype=np.uint64)
    for part in (seed, prompt_key, sample):
        base = mix(base + np.uint64(part % 2**64) + golden)
    steps_T = np.arange(1, count + 1, dtype=np.uint64)
    return torch.from_numpy((mix(base + steps_T * golden) >> np.uint64(11)) / 2.0**53)


def pick(weight_BV, target_B):
    """The entry at which the cumulative weight, summed in fp64, passes the target, and by how much the target exceeds
    the weight before it."""
    sum_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    # Rounding must not lift the target to the total itself: behind the last allowed token nothing passes it.
    target_B1 = torch.minimum(target_B, sum_BV[:, -1].nextafter(sum_BV.new_zeros(())))[:, None]
    entry_B1 = torch.searchsorted(sum_BV, target_B1, right=True)
    rest_B1 = (target_B1 - (sum_BV.gather(1, entry_B1) - weight_BV.gather(1, entry_B1))).clamp(min=0)
    return entry_B1[:, 0], rest_B1[:, 0]


def draw(logits_BV, u_B=None, block=128):
    """Tokens [B] by inverse-CDF sampling with u in [0, 1), or without u the likeliest; and their log-probabilities [B].

    The saving: one softmax and sums over blocks of ids, then over the ids of one block, in place of a log_softmax, its
    exponential and a cumulative sum over the vocabulary. test_sampling_follows_the_distribution.
    """
    p_BV = logits_BV.softmax(-1)
    if u_B is None:
        token_B = logits_BV.argmax(-1)
    else:
        p_BNb = F.pad(p_BV, (0, -p_BV.shape[-1] % block)).unflatten(1, (-1, block))
        sum_BN = p_BNb.sum(-1)
        n_B, rest_B = pick(sum_BN, u_B * sum_BN.sum(-1, dtype=torch.float64))
        token_B = n_B * block + pick(p_BNb[torch.arange(len(n_B), device=n_B.device), n_B], rest_B)[0]
    return token_B, p_BV.gather(1, token_B[:, None])[:, 0].log()


@dataclass
class Row:
    """A sample that is being generated."""

    prompt: int
    sample: int
    ids: list = dataclasses.field(default_factory=list)
    logps: list = dataclasses.field(default_factory=list)
    support: list = dataclasses.field(default_factory=list)


@torch.inference_mode()
def generate(
    model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(), seed=0, max_rows=256,
    prompt_keys=None, prefill_tokens=None, progress=False, cuda_graphs=False,
):  # fmt: skip
    """`n` completions of each prompt (lists of ids) -> list of lists of Completion. temperature 0 is greedy.

    A prompt is computed once and its keys and values are kept once for its n rows. Up to `max_rows` rows are decoded
    together, fewer where a GPU has no room for them; a finished row leaves at once and a waiting sample takes its
    place. A sample depends on (seed, prompt key, sample number) only; the key of a prompt is its place in the list
    unless `prompt_keys` says otherwise. Prompts are computed at most `prefill_tokens` tokens at a time (one prompt at
    least; default: default_token_budget). `progress` shows a bar. `cuda_graphs` captures passes, see
    DecodingBatch.forward.

    Batches of other sizes round differently: a token changes where its random number is that close to a boundary. Of
    86,663 tokens of tiny/policy, drawn 256 and 40 rows at a time, none did; with log-probabilities that differ by 3e-8
    on average it is to be expected about once in ten million tokens.
    """
    if not prompts:
        return []
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: there is nothing to continue")
    sampling = (temperature, top_p, top_k)
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    batch = DecodingBatch(
        model, prompts, n, max_new_tokens, sampling, set(stop_ids), seed, keys, max_rows, prefill_tokens, cuda_graphs
    )
    return batch.run(progress)


def rows_that_fit(config, prompts, longest_prompt, new, weight, wanted):
    """How many of the wanted rows of a GroupCache fit beside the weights (of which `weight` is one): on a GPU those
    that fill 70% of the memory that is free, with their logits; on a CPU all."""
    if not weight.is_cuda:
        return wanted
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()

    def size(rows):  # 24: logits, probabilities and their sums
        return token * (min(rows, prompts) * longest_prompt + rows * new) + 24 * config.vocab_size * rows

    unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    free = torch.cuda.mem_get_info(weight.device)[0] + unused
    return max((rows for rows in range(1, wanted + 1) if size(rows) <= 0.7 * free), default=1)


class DecodingBatch:
    """The rows that are decoded together. Row r of the cache, of hidden_RD (its last hidden state) and of u_RT (its
    random numbers) belongs to rows[r]."""

    def __init__(
        self, model, prompts, n, max_new_tokens, sampling, stop_ids, seed, keys, max_rows, prefill_tokens, cuda_graphs
    ):  # fmt: skip
        self.model, self.prompts, self.n, self.sampling = model, prompts, n, sampling
        self.prefill_tokens = prefill_tokens or default_token_budget(model)
        self.stop_ids, self.seed, self.keys, self.max_new_tokens = stop_ids, seed, keys, max_new_tokens
        weight, sizes = model.model.norm.weight, (max(map(len, prompts)), max_new_tokens)
        self.max_rows = rows_that_fit(model.config, len(prompts), *sizes, weight, min(max_rows, n * len(prompts)))
        held = min(self.max_rows, len(prompts))
        self.cache = GroupCache(model.config, self.max_rows, held, *sizes, weight.dtype, weight.device, cuda_graphs)
        self.cuda_graphs, self.graphs = cuda_graphs, {}  # a graph for the shapes of a pass
        self.token_R1 = torch.zeros(self.max_rows, 1, dtype=torch.long, device=weight.device)
        self.hidden_RD = weight.new_zeros(self.max_rows, model.config.hidden_size)
        self.u_RT = torch.zeros(self.max_rows, max_new_tokens, dtype=torch.float64, device=weight.device)
        self.waiting = deque(
            sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        )  # similar lengths: little padding
        self.ready = deque()  # (prompt, sample, its row in `prefix`, prefix: KVCache, last hidden states of prefix)
        self.rows, self.done = [], [[None] * n for _ in prompts]

    def run(self, progress=False):
        """Decodes until every sample is done -> list of lists of Completion."""
        bar = tqdm(total=self.n * len(self.prompts), desc="sampling", leave=False, disable=None if progress else True)
        with bar, fused_weights(self.model):
            while self.admit():
                finished = self.sample()
                if len(finished) < len(self.rows):  # somebody needs another token
                    self.forward()
                self.retire(finished)
                bar.update(len(finished))
        return self.done

    def admit(self):
        """Fills the free rows with waiting samples, computing their prompts first. False when nothing is left."""
        while len(self.rows) < self.max_rows and (self.ready or self.waiting):
            free = self.max_rows - len(self.rows)
            if not self.ready:
                numbers = [self.waiting.popleft()]
                while self.waiting and len(numbers) * self.n < free:
                    if (len(numbers) + 1) * len(self.prompts[self.waiting[0]]) > self.prefill_tokens:
                        break
                    numbers.append(self.waiting.popleft())
                prefix, last_BD = prefill(self.model, [self.prompts[i] for i in numbers])
                self.ready.extend((i, j, b, prefix, last_BD) for b, i in enumerate(numbers) for j in range(self.n))
            prefix, last_BD = self.ready[0][3:]
            taken = []
            while self.ready and len(taken) < free and self.ready[0][3] is prefix:
                taken.append(self.ready.popleft())
            targets = slice(len(self.rows), len(self.rows) + len(taken))
            for i, _, b, *_ in taken:
                self.cache.add_row(prefix, b, i, len(self.prompts[i]))
            self.hidden_RD[targets] = last_BD[[b for _, _, b, *_ in taken]]
            if self.sampling[0] > 0:
                u = [uniforms(self.seed, self.keys[i], j, self.max_new_tokens) for i, j, *_ in taken]
                self.u_RT[targets] = torch.stack(u).to(self.u_RT.device)
            self.rows += [Row(i, j) for i, j, *_ in taken]
        return bool(self.rows)

    def sample(self):
        """Draws the next token of every row -> numbers of the rows that are finished by it."""
        R, (temperature, top_p, top_k) = len(self.rows), self.sampling
        logits_RV = self.model.logits(self.hidden_RD[:R])[:, : self.model.num_tokens]
        logits_RV = allowed_logits(logits_RV, temperature or 1.0, top_p, top_k)
        step_R = torch.tensor([len(row.ids) for row in self.rows]).to(logits_RV.device, non_blocking=True)
        u_R = self.u_RT[:R].gather(1, step_R[:, None])[:, 0] if temperature > 0 else None
        token_R, chosen_R = draw(logits_RV, u_R)
        self.token_R1[:R, 0] = token_R
        if top_p < 1.0 or top_k > 0:
            allowed_RV = logits_RV.isfinite()
            allowed = allowed_RV.nonzero()[:, 1].cpu().split(allowed_RV.sum(-1).tolist())
            for row, ids in zip(self.rows, allowed, strict=True):
                row.support.append(ids.tolist())
        finished = []
        for r, (row, token, logp) in enumerate(zip(self.rows, token_R.tolist(), chosen_R.tolist())):
            row.ids.append(token)
            row.logps.append(logp)
            if token in self.stop_ids or len(row.ids) == self.max_new_tokens:
                finished.append(r)
        return finished

    def forward(self):
        """One forward pass over all rows: their new tokens into the cache, their hidden states for the next.

        With CUDA graphs a pass whose shapes are new runs as usual and is captured then; later ones are replayed. The
        saving: one launch in place of 54 kernels a layer (counted), which the host starts more slowly than a GPU runs
        them. test_captured_passes_draw_the_same_tokens, on a CPU; not measured on a GPU."""
        shapes = self.cache.prepare()
        if shapes in self.graphs:
            self.graphs[shapes].replay()
        else:
            self.decode()
            if self.cuda_graphs:
                other = next(iter(self.graphs.values()), None)
                self.graphs[shapes] = capture(self.decode, self.hidden_RD.device, other)

    def decode(self):
        """The device's part of a pass: no number of this step may come from the host but through a tensor."""
        R = self.cache.shape[0]
        self.hidden_RD[:R] = self.model(self.token_R1[:R], cache=self.cache)[:, 0]

    def retire(self, finished):
        """Takes finished rows out; the last rows move into their places, so the batch stays without holes."""
        for r in reversed(finished):
            row, last = self.rows[r], len(self.rows) - 1
            ended = row.ids[-1] in self.stop_ids
            self.done[row.prompt][row.sample] = Completion(row.ids, row.logps, ended, row.support or None)
            self.cache.remove_row(r)
            if r != last:
                self.rows[r] = self.rows[last]
                self.hidden_RD[r], self.u_RT[r] = self.hidden_RD[last], self.u_RT[last]
            self.rows.pop()


def capture(work, device, other=None):
    """What `work` starts on the GPU, as a graph that can be replayed. Nothing runs while it is captured. Graphs that
    never run together and keep no result of their own can share the memory of an `other` one. Untested on CUDA."""
    if device.type != "cuda":
        raise UserError(f"--cuda-graphs: the model is on {device}")
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog may query its events meanwhile.
    with torch.cuda.graph(graph, pool=other and other.pool(), capture_error_mode="thread_local"):
        work()
    return graph


def prefill(model, prompts):
    """Prompts -> (KVCache with one row a prompt, hidden states [B, D] at their last tokens)."""
    ids_BT, lengths_B = pad_rows(prompts, model.model.norm.weight.device)
    cache = KVCache(model.config, *ids_BT.shape, model.model.norm.weight.dtype, ids_BT.device)
    hidden_BTD = model(ids_BT, lengths_B, cache)
    return cache, hidden_BTD[torch.arange(len(prompts), device=ids_BT.device), lengths_B - 1]


# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities of given completions


def token_logprobs(model, ids_BT, prompt_lengths_B, lengths_B, temperature=1.0, chunk=1024, support=None):
    """Log-probability and entropy of each completion token -> two tensors [B, T-1]; entry t is about token t + 1.

    Entries outside the completion (prompt_length <= t + 1 < length) are 0. Logits exist for `chunk` completion tokens
    at a time and are recomputed in the backward pass, so memory is chunk x V and never B x T x V. `support`: for each
    row, the allowed ids of each completion token (Completion.support), over which the probabilities are renormalised.
    The entropy carries no gradient.
    """
    hidden_BTD = model(ids_BT, lengths_B)[:, :-1]
    position_S = torch.arange(1, ids_BT.shape[1], device=ids_BT.device)
    mask_BS = (position_S >= prompt_lengths_B[:, None]) & (position_S < lengths_B[:, None])
    return chunked_logprobs(model, hidden_BTD, ids_BT[:, 1:], mask_BS, temperature, chunk, support)


def group_logprobs(model, prompt, answers, temperature=1.0, chunk=1024, support=None):
    """token_logprobs of B answers (lists of ids) to one prompt, which is computed once -> two tensors [B, T], entry t
    about token t of the answer, and the mask [B, T] of the answers."""
    last_1D, answer_BTD, lengths_B = continue_prompts(model, [prompt], answers, [0] * len(answers))
    # Token t is predicted at token t - 1, the first one at the end of the prompt.
    hidden_BTD = torch.cat([last_1D.expand(len(answers), 1, -1), answer_BTD[:, :-1]], dim=1)
    target_BT, _ = pad_rows(answers, hidden_BTD.device)
    mask_BT = torch.arange(target_BT.shape[1], device=hidden_BTD.device) < lengths_B[:, None]
    return *chunked_logprobs(model, hidden_BTD, target_BT, mask_BT, temperature, chunk, support), mask_BT


def chunked_logprobs(model, hidden_BTD, target_BT, mask_BT, temperature, chunk, support):
    """Log-probability of each target and entropy where the mask is set, 0 elsewhere; see token_logprobs."""
    hidden_ND, target_N = hidden_BTD[mask_BT], target_BT[mask_BT]
    if support:
        allowed = [ids for row in support for ids in row]
        ends = [0, *itertools.accumulate(map(len, allowed))]  # in the two lists that follow, all tokens in a row
        id_M = torch.tensor([i for ids in allowed for i in ids], device=target_N.device)
        token_M = torch.tensor([n for n, ids in enumerate(allowed) for _ in ids], device=target_N.device)
        assert len(allowed) == len(target_N), (len(allowed), len(target_N))

    def one_chunk(logits, hidden_CD, target_C, start):
        logits_CV = logits(hidden_CD)[:, : model.num_tokens] / temperature
        if support:
            part = slice(ends[start], ends[start + len(target_C)])
            keep_CV = torch.zeros_like(logits_CV, dtype=torch.bool)
            keep_CV[token_M[part] - start, id_M[part]] = True
            logits_CV = logits_CV.masked_fill(~keep_CV, -math.inf)
        logp_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():
            entropy_C = -(logp_CV.exp() * logp_CV.nan_to_num(neginf=0.0)).sum(-1)
        return logp_CV.gather(1, target_C[:, None])[:, 0], entropy_C

    def all_chunks(logits, hidden_ND):
        parts = []
        for start in range(0, max(1, len(target_N)), chunk):  # a chunk even of nothing: all ranks use the head
            part = logits, hidden_ND[start : start + chunk], target_N[start : start + chunk], start
            recompute = torch.is_grad_enabled()
            parts.append(checkpoint(one_chunk, *part, use_reentrant=False) if recompute else one_chunk(*part))
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    logp_N, entropy_N = model.use_head(all_chunks, hidden_ND)
    zero_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    return zero_BT.masked_scatter(mask_BT, logp_N), zero_BT.masked_scatter(mask_BT, entropy_N)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer and chat format


class Tokenizer:
    """tokenizer.json of a model folder or hub id, with Qwen3's chat format. The names of SHAPES, for measurements with
    random weights, have that of tiny/policy: the ids that it does not know decode to nothing."""

    def __init__(self, path):
        self.path = Path(__file__).resolve().parent / "tiny" / "policy" if path in SHAPES else model_folder(path)
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"no tokenizer.json in {self.path}")
        try:
            self.fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise UserError(f"{file} is damaged: {error}") from None
        self.fast.no_truncation()
        self.fast.no_padding()
        ids = {self.fast.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).is_file():
                eos = json.loads((self.path / name).read_text()).get("eos_token_id")
                ids |= set(eos) if isinstance(eos, list) else {eos}
        self.stop_ids = sorted(ids - {None})
        self.pad_id = self.fast.token_to_id("<|endoftext|>") or 0

    def __len__(self):
        return self.fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        """Text -> ids. Special tokens written in the text are parsed, as Hugging Face does."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=False, enable_thinking=None):
        """[{"role", "content"}, ...] -> text, as Qwen3's own template renders it (tools left out).

        The assistant turn after the last user turn always carries a think block, empty when it has no reasoning.
        """
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
        text = ""
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role == "assistant":
                before, marker, after = content.rpartition("</think>")
                reasoning = ""
                if marker:
                    content = after.lstrip("\n")
                    reasoning = before.partition("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
                if i > last_user and (i == len(messages) - 1 or reasoning):
                    content = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
            text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        if add_generation_prompt:
            text += "<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if enable_thinking is False else "")
        return text


# ----------------------------------------------------------------------------------------------------------------------
# the reward model


def reward_input_ids(tokenizer, prompt, code, max_length=4096):
    """What the reward model reads: user turn = statement, assistant turn = bare program -> (ids, was the program cut).

    The scored token is the last one, the newline behind <|im_end|>. A text over `max_length` loses the end of its
    program, never its prompt and never the closing tokens: the score is always read at the same kind of place.
    """
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": code}]
    ids = tokenizer.encode(tokenizer.chat(turns))
    if len(ids) <= max_length:
        return ids, False
    closing = tokenizer.encode("<|im_end|>\n")
    opening = tokenizer.encode(tokenizer.chat([*turns[:1], {"role": "assistant", "content": ""}]))[: -len(closing)]
    if len(opening) + len(closing) >= max_length:
        raise UserError(
            f"a prompt of {len(opening)} tokens leaves no room for a program: raise --max-length {max_length}"
        )
    return ids[: max_length - len(closing)] + closing, True


def reading(tokenizer, max_length, prompt="bare"):
    """codescaler.json: what a reward model was trained to read. `template` is a fingerprint of all of it: a fixed
    conversation as the renderer of this file writes it, what the user turn holds (problems.rm_prompt), the length
    limit, what is cut."""
    text = tokenizer.chat([{"role": "user", "content": "P"}, {"role": "assistant", "content": "C"}])
    cut = "end of program"
    fingerprint = hashlib.sha256(f"{text}|{prompt}|{max_length}|{cut}".encode()).hexdigest()[:16]
    return {"template": fingerprint, "max_length": max_length, "cut": cut, "prompt": prompt}


def shape_reward(score, valid):
    """softplus(score) for a valid program, 0 otherwise: every valid answer beats every invalid one, and the order of
    the valid ones is kept (paper, validity-preserving reward). Floats or tensors.

    >>> [round(float(shape_reward(torch.tensor(s), v)), 3) for s, v in ((0.0, True), (-10.0, True), (5.0, False))]
    [0.693, 0.0, 0.0]
    """
    score, valid = torch.as_tensor(score, dtype=torch.float32), torch.as_tensor(valid)
    return torch.where(valid, F.softplus(score), torch.zeros_like(score))


class RewardModel:
    """A scalar reward model ready to score. `truncated` counts the programs that had to be cut so far.

    `max_length` (tokens) and `prompt` (bare or full, see problems.rm_prompt) are those it was trained with, 4096 and
    bare for models of others unless given; another value is refused (UserError). `token_budget`: see score_groups.
    `dtype` is bfloat16 on CUDA and float32 on a CPU unless given; scores are fp32 in both. With `sharded` and several
    ranks, each keeps a part of the weights, which are gathered while all of them call score_many, each with items of
    its own.
    """

    def __init__(
        self, path, device=None, max_length=None, token_budget=None, prompt=None, dtype=None, random_init=False,
        sharded=False,
    ):  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        sharded = sharded and num_ranks() > 1
        model = load_model(path, "score", dtype or compute_dtype(device), device, random_init, sharded)
        self.model = model.eval().requires_grad_(False)
        if self.model.head_source.startswith("zero"):
            raise UserError(
                f"{path} has no score.weight, so it is not a reward model (--rm): train one with train_rm.py"
            )
        if Path(path, "args.json").is_file() and not Path(path, "result.json").is_file():
            print(f"{path}: its training is not finished; train_rm.py goes on with it", file=sys.stderr)
        self.tokenizer = Tokenizer(path)
        self.max_length, self.prompt = check_reading(self.tokenizer, max_length, prompt)
        self.device, self.truncated = self.model.model.norm.weight.device, 0
        self.token_budget = token_budget or default_token_budget(self.model)
        self.fused = fused_weights(self.model)  # once, for all that it will score
        self.fused.__enter__()

    def score(self, prompt, codes):
        """Scores of several programs for one statement."""
        return self.score_many([(prompt, code) for code in codes])

    def score_many(self, items):
        """[(prompt, code), ...] -> raw scores. The tokens that texts of one prompt have in common are computed once."""
        texts = {}
        for prompt, code in items:
            if (prompt, code) not in texts:
                texts[prompt, code], cut = reward_input_ids(self.tokenizer, prompt, code, self.max_length)
                self.truncated += cut
        groups = {}  # the items of each prompt
        for prompt, code in texts:
            groups.setdefault(prompt, []).append((prompt, code))
        ids = [[texts[item] for item in group] for group in groups.values()]
        scores = score_groups(gathered(self.model, self.model.model.norm.weight.dtype), ids, self.token_budget)
        flat = dict(zip(sum(groups.values(), []), sum(scores, []), strict=True))
        return [flat[item] for item in items]


def default_token_budget(model):
    """Tokens of one pass over prompts or scored texts. On a CPU a small pass stays in its cache: 1.5 times as fast as
    with the GPU's value (8 layers of width 512)."""
    return 16384 if model.model.norm.weight.is_cuda else 2048


def score_groups(model, groups, token_budget=None):
    """Groups of rows of ids -> their scores, nested alike. What the rows of a group begin with is computed once.

    A pass over B rows of up to T tokens keeps B * T within `token_budget`, which changes no score.
    """
    token_budget = token_budget or default_token_budget(model)
    widths, scores = [max(map(len, group)) for group in groups], [None] * len(groups)
    batches = []  # numbers of groups of similar length
    for g in sorted(range(len(groups)), key=lambda g: widths[g]):
        if not batches or sum(len(groups[i]) for i in [*batches[-1], g]) * widths[g] > token_budget:
            batches.append([])
        batches[-1].append(g)
    with fused_weights(model):
        for batch in batches:
            score_batch(model, groups, batch, token_budget, scores)
    return scores


@torch.no_grad()
def score_batch(model, groups, batch, token_budget, scores):
    """Scores the groups of a batch into `scores`: one pass over their prompts, then as many over their rows, sorted by
    length, as the token budget asks for."""
    shared = [len(os.path.commonprefix(groups[g])) for g in batch]
    shared = [min(p, min(map(len, groups[g])) - 1) for p, g in zip(shared, batch)]  # a token is left to score
    prefix, _ = prefill(model, [groups[g][0][:p] for p, g in zip(shared, batch)])
    rows = [(i, r, ids[shared[i] :]) for i, g in enumerate(batch) for r, ids in enumerate(groups[g])]
    rows.sort(key=lambda row: len(row[2]))
    size = max(1, token_budget // (prefix.longest + len(rows[-1][2])))
    for g in batch:
        scores[g] = [None] * len(groups[g])
    for part in (rows[at : at + size] for at in range(0, len(rows), size)):
        ids_BT, lengths_B = pad_rows([ids for _, _, ids in part], prefix.k.device)
        cache = KVCache(model.config, len(part), prefix.longest + ids_BT.shape[1], prefix.k.dtype, prefix.k.device)
        cache.copy_rows(prefix, [i for i, _, _ in part])
        score_B = model.score(model(ids_BT, lengths_B, cache), lengths_B)
        for (i, r, _), score in zip(part, score_B.tolist(), strict=True):
            scores[batch[i]][r] = score


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def model_folder(path):
    """A folder (a run folder means its checkpoint/) or a hub id -> folder with the model's files. Raises UserError."""
    folder = Path(path)
    if (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "out/", "tiny/")):
        raise UserError(f"no model folder at {path!r}: give a folder with config.json, a run folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = str(path).partition("@")
    try:
        files = ["*.json", "*.jinja", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"no folder at {path!r}, and as a hub id it cannot be had: {str(error).splitlines()[0]}"
        ) from None


def read_json(path):
    """A JSON file of a model folder; UserError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}: not a model folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def weight_files(folder):
    """{tensor name: file} of a checkpoint in one file or in shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"no model.safetensors in {folder}")
    with open_weights(file) as weights:
        return dict.fromkeys(weights.keys(), file)


def open_weights(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or missing: {error}") from None


def load_model(path, head="lm", dtype=None, device=None, random_init=False, sharded=False):
    """Folder, hub id or name of SHAPES -> Qwen3 on `device` (default: cuda if there is one) in `dtype` (float32).

    The model is built without memory and filled tensor by tensor from the mapped files; with `sharded`, each rank reads
    its part only. Every tensor must be there with its shape and none may be left over, with two exceptions: a causal LM
    loaded with head="score" gets a head of zeros (its lm_head is not used), and a reward model may have a score.bias.
    A score head is fp32 in any `dtype`. `random_init` takes the configuration only. Raises UserError.
    """
    if path in SHAPES and not random_init:
        check_model(path)
    folder = None if path in SHAPES else model_folder(path)
    config = SHAPES.get(path) or Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
    files = {} if random_init else weight_files(folder)
    with torch.device("meta"):
        model = Qwen3(config, head, score_bias=head == "score" and "score.bias" in files).to(dtype or torch.float32)
        if head == "score":
            model.score.float()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if sharded:
        shard(model, device)
    model.to_empty(device=device)
    if random_init:
        init_weights(model)
    else:
        model.head_source = f"zeros, since {path} is a causal LM"
        if read_weights(model, folder, files):
            model.head_source = f"{head} head of {path}"
    if folder and (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(folder)
        if len(tokenizer) > config.vocab_size:
            found = f"has {len(tokenizer)} tokens, expected at most the {config.vocab_size} of config.json (vocab_size)"
            raise UserError(f"{folder / 'tokenizer.json'} {found}: it belongs to another model")
        model.num_tokens = len(tokenizer)  # a matrix may be padded beyond
        check_reading(tokenizer)
    return model


def check_model(path):
    """UserError where load_model would find no Qwen3: asked before hours of work that end with loading it."""
    if path in SHAPES:
        raise UserError(f"{path!r} names a shape without weights: add --random-init, or give a folder or a hub id")
    folder = model_folder(path)
    Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
    for file in set(weight_files(folder).values()):
        open_weights(file)


@torch.no_grad()
def read_weights(model, folder, files):
    """Fills the model from {tensor name: file}, one tensor at a time -> whether the files have its head."""
    parameters = dict(model.named_parameters())
    has_head = model.head == "lm" or "score.weight" in files
    fresh = set() if has_head else {"score.weight"}
    unused = {"lm_head.weight"} if fresh or model.config.tie_word_embeddings else set()
    missing, extra = sorted(set(parameters) - set(files) - fresh), sorted(set(files) - set(parameters) - unused)
    if missing or extra:
        hint = " (a reward model? its head is score.weight)" if model.head == "lm" and "score.weight" in extra else ""
        raise UserError(f"{folder}: missing tensors {missing[:4]}, unexpected tensors {extra[:4]}{hint}")
    for file in sorted(set(files.values())):
        with open_weights(file) as weights:
            for name in sorted(name for name, f in files.items() if f == file and name in parameters):
                p, stored = parameters[name], weights.get_slice(name)
                if stored.get_shape() != list(p.shape):
                    raise UserError(f"{file}: {name} has shape {stored.get_shape()}, expected {list(p.shape)}")
                local(p).copy_(stored[rows_of(p)])
                if not local(p).isfinite().all():
                    raise UserError(f"{file}: {name} holds values that are not finite: the checkpoint is spoilt")
    for name in fresh:
        local(parameters[name]).zero_()
    return has_head


def check_reading(tokenizer, max_length=None, prompt=None):
    """Scores of texts unlike those a reward model was trained on mean nothing: compares codescaler.json, beside the
    tokenizer, with what this file's renderer writes and with the values in use -> (length limit in tokens, what the
    user turn holds).

    An edited codescaler.json is refused, since the fingerprint in it is compared with one that is computed here.
    Checkpoints of others have no such file and are accepted as they are. Raises UserError.
    """
    file = tokenizer.path / "codescaler.json"
    if not file.is_file():
        return max_length or 4096, prompt or "bare"
    saved = read_json(file)
    now = reading(tokenizer, saved.get("max_length"), saved.get("prompt"))
    if saved != now:
        raise UserError(
            f"{file}: trained with chat template {saved.get('template')} on {saved}, this code renders {now}"
        )
    for flag, value, trained in (("--max-length", max_length, "max_length"), ("--rm-prompt", prompt, "prompt")):
        if value not in (None, saved[trained]):
            raise UserError(f"{flag} {value}: {file} says that the model was trained with {saved[trained]}: use that")
    return saved["max_length"], saved["prompt"]


def save_model(model, tokenizer, folder, max_length=4096, prompt="bare", max_shard_bytes=5 * 10**9):
    """Writes a folder that transformers and load_model read: config.json, the weights, the tokenizer's files.

    Weights over `max_shard_bytes` go to several files and an index. Every file appears whole or not at all. Of a model
    that is sharded over ranks, all ranks call this; one tensor after the other goes to rank 0, which writes.
    """
    folder, writes = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    parts, room = [], 0  # lists of parameters, a file each
    for name, p in parameters_at_rest(model):
        if p.numel() * p.element_size() > room:
            parts.append([])
            room = max_shard_bytes
        parts[-1].append((name, p))
        room -= p.numel() * p.element_size()
    written = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weights = {name: tensor for name, p in part if (tensor := whole(p, keep=writes)) is not None}
        if writes:
            save_file(weights, folder / f"{file}.tmp", metadata={"format": "pt"})
            commit(folder / f"{file}.tmp", folder / file)
        written.update((name, file) for name, _ in part)
    if not writes:
        return
    index = folder / "model.safetensors.index.json"
    if len(parts) > 1:
        size = sum(p.numel() * p.element_size() for part in parts for _, p in part)
        write_atomic(index, json.dumps({"metadata": {"total_size": size}, "weight_map": written}, indent=1) + "\n")
    current = {*written.values(), index.name if len(parts) > 1 else None}
    for old in (index, *folder.glob("model*.safetensors")):
        if old.name not in current:
            old.unlink(missing_ok=True)  # of an earlier save in this folder
    config = dataclasses.replace(model.config, pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.stop_ids)
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_atomic(folder / "config.json", json.dumps(config.to_dict(model.head, dtype), indent=1) + "\n")
    if folder.resolve() != tokenizer.path.resolve():
        names = "tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json vocab.json merges.txt"
        for file in names.split():
            if (tokenizer.path / file).is_file():
                write_atomic(folder / file, (tokenizer.path / file).read_bytes())
    if model.head == "score":
        write_atomic(folder / "codescaler.json", json.dumps(reading(tokenizer, max_length, prompt), indent=1) + "\n")


def write_atomic(path, data):
    """All of `data` (text or bytes) is at `path`, or what was there before."""
    new = Path(f"{path}.tmp")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    commit(new, path)


def commit(new, path):
    """Gives a finished file its name once its bytes are on the disk."""
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)  # the only way to ask for it is to set it
    os.umask(mask)
    os.chmod(new, 0o666 & ~mask)  # safetensors makes files that only their owner can read
    os.replace(new, path)


# ----------------------------------------------------------------------------------------------------------------------
# ranks: one process a GPU, the model's parameters, gradients and optimizer state cut into a shard for each (FSDP2)


def setup(device=None, timeout_minutes=30):
    """-> (rank, world size, device). Plain python is rank 0 of 1; under torchrun the ranks find each other here. A GPU
    always gets a process group, of one rank if need be: one GPU trains in the way of several. A collective that waits
    longer than the timeout ends the process. Raises UserError."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device}: expected cpu{' or cuda' if torch.cuda.is_available() else ''} on this machine"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} on {torch.cuda.device_count()} GPUs: a rank needs its own (--nproc-per-node)"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (world > 1 or device.startswith("cuda")):
        # Counts and lists of objects stay on the host, and so goes what the ranks say about them.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        with phase("meeting the other ranks"):
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes), **alone)
        if alone:  # nccl warns of a group that is left at exit; of several ranks, one may wait in vain for the others
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return rank, world, device


def compute_dtype(device):
    """What matrices are multiplied in: bf16 on CUDA; fp32 on CPUs, most of which are far slower in bf16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def num_ranks():
    """How many processes take part; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def phase(name, minutes=None):
    """What a rank is doing, for the message when it waits in vain: errors of the ranks' communication end in one line
    with rank and phase, and so does a phase that takes more than `minutes`, whatever it hangs in. Nothing on one rank.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    where = f"rank {os.environ.get('RANK')} in phase {name!r}"

    def give_up():
        print(f"error: {where}: over {minutes} minutes, another rank hangs or is gone", file=sys.stderr, flush=True)
        os._exit(1)  # a thread that waits inside a collective cannot be interrupted

    watchdog = threading.Timer(60 * (minutes or 0), give_up)
    watchdog.daemon = True
    if minutes:
        watchdog.start()
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Timed out"))
        if not lost:
            raise
        if dist.is_initialized():
            dist.destroy_process_group()  # left to the interpreter's exit, a broken group may abort it
        raise UserError(f"{where}: lost the other ranks: {str(error).splitlines()[0][:200]}") from error
    finally:
        watchdog.cancel()


def shard(model, device=None):
    """Cuts a model over all ranks, in place: each block is a unit whose weights are gathered while it computes and
    dropped again; an untied embedding and head are units of their own, the rest goes with the root. The shards have the
    model's dtype (fp32 in training) and compute in compute_dtype(), the score head in fp32 always. Without a process
    group (one CPU) nothing happens.

    After backward() gradients are means over the ranks: a loss that is a sum over them is multiplied by their number.
    Every rank must run the same number of forward and backward passes.
    """
    if not dist.is_initialized():
        return model
    kind = torch.device(device or model.model.norm.weight.device).type
    kind = "cuda" if kind == "cuda" else "cpu"
    mesh = init_device_mesh(kind, (num_ranks(),))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(kind), reduce_dtype=torch.float32)
    units = list(model.model.layers)
    if model.head == "score":
        fully_shard(model.score, mesh=mesh)
    if model.head == "score" or not model.config.tie_word_embeddings:
        units.append(model.model.embed_tokens)
    if model.head == "lm" and not model.config.tie_word_embeddings:
        units.append(model.lm_head)
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    return model


def local(p):
    """What this rank holds of a parameter: its shard, or all of it."""
    return p.to_local() if isinstance(p, DTensor) else p


def rows_of(p):
    """The slice of a tensor's first dimension that this rank holds: rows are dealt out in equal runs, the last ranks
    may hold fewer or none."""
    if not isinstance(p, DTensor):
        return slice(None)
    run = math.ceil(p.shape[0] / p.device_mesh.size())
    start = min(p.device_mesh.get_local_rank() * run, p.shape[0])
    return slice(start, start + p.to_local().shape[0])


def parameters_at_rest(model):
    """[(name, parameter)], of a sharded model the shards: after a forward pass some are still gathered, in bf16."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return list(model.named_parameters())


def whole(p, keep=True):
    """A parameter's full value on the CPU; None where it is not kept. All ranks call it, for it gathers the shards."""
    full = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
    return full.cpu().contiguous() if keep else None


@torch.no_grad()
def gathered(model, dtype=None):
    """A plain copy of a model with its present weights, in `dtype` (default: compute_dtype; the score head in fp32), so
    that decoding, which takes another number of steps on every rank, needs no communication. All ranks call it. The
    model itself where there is nothing to gather or to cast and nothing is compiled."""
    parameters, weight = parameters_at_rest(model), model.model.norm.weight
    dtype = dtype or compute_dtype(weight.device)
    if dtype == weight.dtype and not isinstance(weight, DTensor) and not model.compiled:
        return model
    with torch.device("meta"):
        copy = Qwen3(model.config, model.head, model.head == "score" and model.score_head_bias)
        copy.to(dtype).requires_grad_(False)
        if model.head == "score":
            copy.score.float()
    copy.to_empty(device=weight.device)
    for (_, p), q in zip(parameters, copy.parameters(), strict=True):
        q.copy_(p.full_tensor() if isinstance(p, DTensor) else p)
    copy.num_tokens, copy.head_source = model.num_tokens, model.head_source
    return copy.train(model.training)


def total(tensor):
    """Sum over ranks; the tensor itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def as_shard(full, p):
    """A full tensor -> this rank's part of it, cut like the parameter `p`."""
    if not isinstance(p, DTensor):
        return full
    part = full[rows_of(p)].to(p.device)
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def split_optimizer(saved):
    """state_dict() of a sharded optimizer -> ({"NUMBER.NAME": sharded tensor}, the rest and where they were)."""
    values = {f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    shards = {name: value for name, value in values.items() if isinstance(value, DTensor)}
    rest = {i: {k: v for k, v in state.items() if f"{i}.{k}" not in shards} for i, state in saved["state"].items()}
    where = [(int(name.partition(".")[0]), name) for name in shards]
    return shards, {"state": rest, "param_groups": saved["param_groups"], "shards": where}


def gather_lists(items):
    """The lists of all ranks, one after the other in the order of the ranks; the same on each."""
    if num_ranks() == 1:
        return items
    lists = [None] * num_ranks()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def agree(flag):
    """Whether any rank says so: what stops one must stop all, since none can go on alone."""
    return any(gather_lists([bool(flag)]))


def adamw(parameters, device, offload=False, **settings):
    """AdamW over parameters or groups of them, on CUDA as one kernel without temporary copies. `offload`: its moments
    (8 bytes a parameter) wait on the host except while step() runs, for one way over the bus and back a step."""
    optimizer = torch.optim.AdamW(parameters, fused=device.startswith("cuda") or None, **settings)
    if offload:
        optimizer.register_step_pre_hook(lambda optimizer, *_: move_moments(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: move_moments(optimizer, "cpu"))
        optimizer.register_load_state_dict_post_hook(lambda optimizer: move_moments(optimizer, "cpu"))
    return optimizer


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def move_moments(optimizer, device=None):
    """Brings AdamW's moments to `device`, or to their parameters. The step count stays: it is a number."""
    for p, state in optimizer.state.items():
        state.update({name: value.to(device or p.device) for name, value in state.items() if value.ndim})


def clip_gradients(model, max_norm):
    """Scales the gradients so that their global norm is at most `max_norm` -> the norm before, the same on any number
    of ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# ----------------------------------------------------------------------------------------------------------------------
# run folders: what the trainers leave behind, and how the same command goes on after a kill


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def git_commit():
    """The commit of the code that runs, or "unknown" outside a git checkout."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def format_eta(seconds):
    """Seconds -> 1m05s."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


@contextlib.contextmanager
def signals_wait():
    """Ctrl-C and SIGTERM take effect at the end of the block: inside torch.save they would surface as another error."""
    pending = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught = [number for number, handler in handlers.items() if callable(handler)]  # ignored ones stay ignored
    for number in caught:
        signal.signal(number, lambda received, frame: pending.append(received))
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, handlers[number])
    if pending:
        raise KeyboardInterrupt


@contextlib.contextmanager
def said_plainly(path):
    """What a full disk makes of a write (torch: RuntimeError; safetensors, sharded files: errors of their own), as a
    UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as error:
        raise UserError(
            f"cannot write {path} ({error}): the checkpoint that was saved before is whole; make room and give the "
            "same command again"
        ) from None


@contextlib.contextmanager
def garbled(path):
    """A line of a run's own file that no kill leaves behind, as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): mend it or start over with --no-resume") from None


class Interrupt:
    """From here to end(), Ctrl-C and SIGTERM set `asked`, so that a trainer can finish and save the step in flight; a
    second one takes effect at once."""

    def __init__(self):
        self.asked, self.handlers = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):  # ignored ones stay ignored
                self.handlers[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more to stop now", file=sys.stderr)

    def end(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Run:
    """A run folder: args.json, metrics.csv (a row a step), samples.jsonl and checkpoint/ (weights and state.pt).

    Opening it locks it (one run a folder) and compares `args` with those it was started with: a difference in anything
    but `may_differ`, which changes no result, is refused by name. Only rank 0 writes.
    """

    files = (  # args.json is removed last: until then the folder says what it holds
        "metrics.csv", "samples.jsonl", "pairs.jsonl", "funnel.json", "result.json", "checkpoint", "checkpoint.old",
        "checkpoint.new", "args.json",
    )  # fmt: skip
    may_differ = (
        "steps", "resume", "device", "out", "collect_only", "rm_offload", "optimizer_offload", "phase_minutes",
        "cuda_graphs",
    )  # fmt: skip

    def __init__(self, args, columns, rank=0):
        self.dir, self.rank, self.columns = Path(args.out), rank, columns
        self.checkpoint = self.dir / "checkpoint"
        if rank == 0:
            self._open(args)
        agree(False)  # nobody reads the folder before rank 0 has made it ready

    def _open(self, args):
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.dir / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.dir} is in use by another run: wait for it or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to --out {self.dir}: {error.strerror}") from None
        if not args.resume:
            self._start_over(dataclasses.asdict(args))
        if not self.checkpoint.exists() and (self.dir / "checkpoint.old").exists():  # killed between two renames
            os.rename(self.dir / "checkpoint.old", self.checkpoint)
        self._write_args(dataclasses.asdict(args))

    def _start_over(self, args):
        """Removes what runs write and nothing else that the folder may hold; an input among it is refused."""
        doomed = [self.dir / name for name in self.files]
        lists = {name: value if isinstance(value, list) else [value] for name, value in args.items() if name != "out"}
        for name, text in ((name, text) for name, values in lists.items() for text in values):
            if isinstance(text, str) and Path(text).resolve() in [path.resolve() for path in (self.dir, *doomed)]:
                flag = f"--{name.replace('_', '-')} {text}"
                raise UserError(f"--no-resume would delete {flag} with the run in {self.dir}: choose another --out")
        for path in doomed:
            remove(path)

    def _write_args(self, new):
        path = self.dir / "args.json"
        begun = any((self.dir / name).exists() for name in ("checkpoint", "samples.jsonl", "pairs.jsonl"))
        old = read_json(path)["args"] if path.exists() and begun else new  # a start that failed binds nobody
        for name in new:
            if name in old and name not in self.may_differ and old[name] != new[name]:
                raise UserError(
                    f"{self.dir} was started with --{name.replace('_', '-')} {old[name]}, now it is {new[name]}: "
                    "give the old value or another --out, or start over with --no-resume"
                )
        versions = {"python": platform.python_version(), "torch": torch.__version__, "commit": git_commit()}
        write_atomic(path, json.dumps({"args": new, **versions, "command": sys.argv}, indent=1) + "\n")

    def load(self):
        """state.pt of the last complete step, or None. What was logged after that step is dropped."""
        file = self.checkpoint / "state.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(f"{file} cannot be read ({error}): start over with --no-resume") from None
        if self.rank == 0:
            step = state["step"] if state else 0
            path = self.dir / "metrics.csv"
            with garbled(path):
                rows = [r for r in read_lines(path)[1:] if r.endswith("\n") and int(r.split(",")[0]) <= step]
            write_atomic(path, ",".join(self.columns) + "\n" + "".join(rows))
        return state

    def load_optimizer(self, optimizer, state):
        """Gives an optimizer its state back, saved by any number of ranks to any other; a rank reads its own shards."""
        saved = state["optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if (self.checkpoint / "optimizer").is_dir():
            shards = {key: torch.zeros_like(parameters[i]) for i, key in saved["shards"]}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one rank reads what several wrote
                dcp.load(shards, checkpoint_id=self.checkpoint / "optimizer")
            for i, key in saved["shards"]:
                saved["state"][i][key.partition(".")[2]] = shards[key]
        else:
            for i, values in saved["state"].items():
                for key, value in values.items():
                    values[key] = value if value.ndim == 0 else as_shard(value, parameters[i])
        optimizer.load_state_dict({"state": saved["state"], "param_groups": saved["param_groups"]})

    def samples(self):
        """Rows of samples.jsonl; a line cut short by a kill is dropped from the file."""
        path = self.dir / "samples.jsonl"
        lines = read_lines(path)
        if self.rank == 0 and lines and not lines[-1].endswith("\n"):
            write_atomic(path, "".join(lines[:-1]))
        with garbled(path):
            return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_samples_after(self, step):
        if self.rank == 0:
            kept = [json.dumps(row) + "\n" for row in self.samples() if row["step"] <= step]
            write_atomic(self.dir / "samples.jsonl", "".join(kept))

    def log(self, **row):
        """Appends a row to metrics.csv; columns that are not given stay empty."""
        if self.rank == 0:
            unknown = set(row) - set(self.columns)
            assert not unknown, unknown
            cells = (row.get(column, "") for column in self.columns)
            self._append("metrics.csv", ",".join(f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells) + "\n")

    def append(self, rows):
        """Appends dicts to samples.jsonl."""
        if self.rank == 0:
            self._append("samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _append(self, name, text):
        with said_plainly(self.dir / name), open(self.dir / name, "a", encoding="utf-8") as file:
            file.write(text)

    def save(self, model, tokenizer, max_length=4096, prompt="bare", **state):
        """Writes checkpoint/ whole or not at all: a kill at any moment leaves the old one or the new one.

        All ranks call it. state["optimizer"], the optimizer's state_dict(), is in state.pt; of a sharded one each rank
        writes its shards, to optimizer/, and state.pt says what belongs to no shard.
        """
        with signals_wait():
            new = self.dir / "checkpoint.new"
            if self.rank == 0:
                remove(new)
            with said_plainly(new):
                save_model(model, tokenizer, new, max_length, prompt)
            shards, rest = split_optimizer(state["optimizer"])
            if shards:
                state["optimizer"] = rest
                agree(False)  # the folder is there
                with said_plainly(new):
                    dcp.save(shards, checkpoint_id=new / "optimizer")
            if self.rank == 0:
                self._replace_checkpoint(new, {**state, "rng": torch.get_rng_state()})
            agree(False)

    def _replace_checkpoint(self, new, state):
        old = self.dir / "checkpoint.old"
        with said_plainly(new):
            torch.save(state, new / "state.pt.tmp")
            commit(new / "state.pt.tmp", new / "state.pt")
        remove(old)
        if self.checkpoint.exists():
            os.rename(self.checkpoint, old)
        os.rename(new, self.checkpoint)
        remove(old)


# ----------------------------------------------------------------------------------------------------------------------
# command line


@dataclass
class ScoreArgs:
    rm: str = "out/rm"  # reward model: run folder, checkpoint folder or hub id
    problem: str = ""  # file with the statement, as the reward model was trained to read it
    programs: list[str] = dataclasses.field(default_factory=list)  # Python files (positional arguments)
    max_length: int | None = None  # longest scored text in tokens; default: as trained, 4096 for models of others
    device: str | None = None  # cpu or cuda
    json: bool = False  # one JSON object a program on stdout


@dataclass
class GenerateArgs:
    model: str = "tiny/policy"  # policy: run folder, checkpoint folder or hub id
    prompt: str = ""  # the user turn (positional argument)
    n: int = 1  # samples
    max_new_tokens: int = 512  # longest answer
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus
    top_k: int = 0  # 0: off
    seed: int = 0  # seed of sampling
    device: str | None = None  # cpu or cuda


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{flag} {path!r}: {error.strerror}") from None


def score_command(argv):
    """Ranks programs for a statement by score: raw score, reward, whether each is valid."""
    from extract import extract_code

    args = parse_args(ScoreArgs, argv, positional="programs", about=score_command.__doc__)
    if not args.problem or not args.programs:
        raise UserError("score needs --problem FILE and at least one program file")
    statement = read_text(args.problem, "--problem")
    reward_model = RewardModel(args.rm, setup(args.device)[2], args.max_length)
    found = [(path, extract_code(f"```python\n{read_text(path, 'program')}\n```")) for path in args.programs]
    scores = reward_model.score(statement, [e.code or "" for _, e in found])
    rows = []
    for (path, e), score in zip(found, scores, strict=True):
        valid = e.code is not None
        reward = float(shape_reward(score, valid))
        rows.append({"program": path, "score": score, "reward": reward, "valid": valid, "reason": e.reason})
    rows.sort(key=lambda row: -row["reward"])
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        print(f"{'rank':<6}{'score':>10}{'reward':>12}  {'valid':<7}{'reason':<14}program")
        for rank, row in enumerate(rows, 1):
            valid = "yes" if row["valid"] else "no"
            print(
                f"{rank:<6}{row['score']:>10.4f}{row['reward']:>12.5g}  {valid:<7}{row['reason']:<14}{row['program']}"
            )
    if reward_model.truncated:
        print(f"{reward_model.truncated} programs cut to fit --max-length {reward_model.max_length}", file=sys.stderr)


def generate_command(argv):
    """Samples answers of a policy to a prompt (one user turn) and prints them with their log-probabilities."""
    args = parse_args(GenerateArgs, argv, positional="prompt", about=generate_command.__doc__)
    check_least(args, 1, "n max_new_tokens")
    check_least(args, 0, "temperature top_k")
    check_least(args, 0.01, "top_p")
    if not args.prompt:
        raise UserError('generate needs a prompt: python codescaler.py generate --model tiny/policy "Write ..."')
    device = setup(args.device)[2]
    model, tokenizer = load_model(args.model, "lm", compute_dtype(device), device), Tokenizer(args.model)
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": args.prompt}], add_generation_prompt=True))
    completions = generate(
        model,
        [ids],
        args.n,
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        tokenizer.stop_ids,
        args.seed,
    )[0]
    for number, c in enumerate(completions, 1):
        end = "finished" if c.finished else "cut off by --max-new-tokens"
        print(f"--- {number}/{args.n}: {len(c.ids)} tokens, {end}, log-probability {sum(c.logps):.2f}")
        print(tokenizer.decode(c.ids))


def main():
    commands = {"score": score_command, "generate": generate_command}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
