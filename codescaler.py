"""The model: Qwen3 with a language-model head or a reward head, its cache, generation, scoring and checkpoints.

    python codescaler.py score --rm out/rm --problem statement.md a.py b.py    # ranks programs by score
    python codescaler.py generate --model tiny/policy "Write solve(xs) ..." -n 4

Models are folders or hub ids in Hugging Face layout (Qwen/Qwen3-8B, Skywork/Skywork-Reward-V2-Qwen3-8B, ...). Parameter
names are Hugging Face's, so loading needs no map. From ids to a score: Qwen3.forward -> Block -> Attention, MLP ->
Qwen3.score.

Shape suffixes: B batch, T time, D model width, H query heads, G key/value heads, K head size, V vocabulary, S slots.
Batches are right-padded and lengths say what is real: with causal attention no real token ever sees the padding.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from problems import UserError, parse_args, run_cli

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

    def to_dict(self, head):
        """config.json as transformers reads it."""
        name = "Qwen3ForCausalLM" if head == "lm" else "Qwen3ForSequenceClassification"
        raw = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        raw.update(
            architectures=[name], model_type="qwen3", hidden_act="silu", attention_bias=False, torch_dtype="float32"
        )
        raw.update(attention_dropout=0.0, use_sliding_window=False, rope_scaling=None)
        if head == "score":  # num_labels = 1 is written as a label map with one entry
            raw.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
        return raw


# ----------------------------------------------------------------------------------------------------------------------
# the forward pass


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_table(config, positions):
    """Positions [...] -> cos and sin [..., K]: angle position * theta^(-2i/K) for dimension i and for i + K/2."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angle = positions[..., None].float() * config.rope_theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x_BTHK, cos_BTK, sin_BTK):
    """Rotates dimension i against dimension i + K/2 (halves, as in Qwen's checkpoints; not neighbours 2i, 2i+1).

    At position 0 nothing turns; a quarter turn takes (1, 0) to (0, 1):

    >>> apply_rope(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])).tolist()
    [[[[0.0, 1.0]]]]
    """
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BTHK * cos_BTK[:, :, None] + turned * sin_BTK[:, :, None]


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads. Queries and keys are normalised per head."""

    def __init__(self, config):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.q_norm = RMSNorm(K, config.rms_norm_eps)
        self.k_norm = RMSNorm(K, config.rms_norm_eps)

    def forward(self, x_BTD, rope, cache, layer):
        B, T, _ = x_BTD.shape
        cos, sin = (table.to(x_BTD.dtype) for table in rope)
        q_BTHK = apply_rope(self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)), cos, sin)
        k_BTGK = apply_rope(self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)), cos, sin)
        v_BTGK = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        if cache is not None:
            cache.write(layer, k_BTGK, v_BTGK)
        if cache is None or cache.is_empty:  # nothing came before: plain causal attention, no mask needed
            y_BHTK = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2), is_causal=True, enable_gqa=True
            )
            y_BTHK = y_BHTK.transpose(1, 2)
        else:
            y_BTHK = cache.attend(layer, q_BTHK)
        return self.o_proj(y_BTHK.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, rope, cache, layer):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, cache, layer)
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
        self.model = Trunk(config)
        if head == "score":
            self.score_head_bias = score_bias
            self.score = ScoreHead(config.hidden_size, bias=score_bias)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_BT, lengths_B=None, cache=None):
        """ids [B, T], right-padded to real lengths [B] -> hidden states [B, T, D] after the final norm.

        With a KVCache, row b continues at position cache.lengths_B[b] and the cache grows by lengths_B. Values at
        padded positions are arbitrary. Without a cache the lengths change nothing: causal attention never looks right.
        """
        T = ids_BT.shape[1]
        position_BT = torch.arange(T, device=ids_BT.device)[None]
        if cache is not None:
            position_BT = cache.begin(position_BT, ids_BT.shape[0])
        rope = rope_table(self.config, position_BT)
        x_BTD = self.model.embed_tokens(ids_BT)
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, rope, cache, layer)
        if cache is not None:
            cache.end(T if lengths_B is None else lengths_B)
        return self.model.norm(x_BTD)

    def logits(self, hidden):
        """Hidden states [..., D] -> fp32 logits [..., V]. Call it on the positions that are needed, not on all."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)).float()
        return self.lm_head(hidden).float()


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
            return F.linear(last_BD.float(), self.weight.float(), bias).squeeze(-1)


def init_weights(model, seed=0, std=0.02):
    """Fresh weights in place: normal with `std` for matrices, ones for norms, zeros for the score head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("score."):
                p.zero_()
            elif p.ndim == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, std, generator=generator)


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
    """Keys and values of B rows, room for S tokens each, allocated once: k, v [layers, B, G, S, K].

    A forward pass calls begin(), then write() and attend() in every layer, then end(). `live` is how many leading rows
    take part, so finished rows can leave a batch without a copy of the others.
    """

    def __init__(self, config, rows, slots, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest, self.is_empty = 0, True  # on the host: reading lengths_B would wait for the device

    def begin(self, offset_BT, live):
        """Row-relative positions [1, T] -> positions [live, T]. Prepares the mask all layers share."""
        self.live, self.new = live, offset_BT.shape[1]
        self.position_BT = self.lengths_B[:live, None] + offset_BT
        self.row_B1 = torch.arange(live, device=self.k.device)[:, None]
        self.end_slot = min(self.longest + self.new, self.k.shape[3])
        slot_S = torch.arange(self.end_slot, device=self.k.device)
        self.mask_BTS = slot_S <= self.position_BT[:, :, None]  # a token sees all slots up to its own
        return self.position_BT

    def write(self, layer, k_BTGK, v_BTGK):
        slot_BT = self.position_BT.clamp(max=self.k.shape[3] - 1)  # padding of a full row may lie behind the end
        self.k[layer].transpose(1, 2)[self.row_B1, slot_BT] = k_BTGK.to(self.k.dtype)
        self.v[layer].transpose(1, 2)[self.row_B1, slot_BT] = v_BTGK.to(self.v.dtype)

    def attend(self, layer, q_BTHK):
        """Attention of the new queries over the cache -> [B, T, H, K].

        The H/G query heads of a kv head stand in the time dimension of the product, so K/V are never repeated.
        """
        B, T, H, K = q_BTHK.shape
        k_BGSK, v_BGSK = self.k[layer, :B, :, : self.end_slot], self.v[layer, :B, :, : self.end_slot]
        G = k_BGSK.shape[1]
        q_BGRK = q_BTHK.view(B, T, G, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, G, T * (H // G), K)
        mask_B1RS = self.mask_BTS.repeat_interleave(H // G, dim=1)[:, None]
        y_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=mask_B1RS)
        return y_BGRK.view(B, G, T, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, T, H, K)

    def end(self, lengths):
        self.lengths_B[: self.live] += lengths
        self.longest, self.is_empty = self.end_slot, False

    def copy_rows(self, source, source_rows, target_rows):
        """Rows of another cache (or of this one) into rows of this one."""
        slots = min(source.longest, self.k.shape[3])
        self.k[:, target_rows, :, :slots] = source.k[:, source_rows, :, :slots]
        self.v[:, target_rows, :, :slots] = source.v[:, source_rows, :, :slots]
        self.lengths_B[target_rows] = source.lengths_B[source_rows]
        self.longest, self.is_empty = max(self.longest, source.longest), False


# ----------------------------------------------------------------------------------------------------------------------
# sampling and generation


class Completion(NamedTuple):
    """`ids` end with the stop token if `finished`; `logps` are log-probabilities under the sampling distribution;
    `support` lists the allowed ids of each step when top-p or top-k cut the vocabulary, else it is None."""

    ids: list
    logps: list
    finished: bool
    support: list | None


def sampling_logprobs(logits_BV, temperature=1.0, top_p=1.0, top_k=0):
    """Logits -> log-probabilities after temperature, then top-k, then top-p (Hugging Face's order and tie rules).

    top_k keeps every token as likely as the k-th; top_p drops the least likely tokens, up to 1 - top_p in all.
    """
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if top_p < 1.0:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        drop_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        drop_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(drop_BV.gather(-1, order_BV.argsort(-1)), -math.inf)
    return logits_BV.log_softmax(-1)


def uniforms(seed, prompt_key, sample, count):
    """`count` numbers in [0, 1): a function of seed, prompt, sample and position alone (splitmix64 of a counter), so a
    sample does not depend on the batch it is drawn in.

    >>> uniforms(0, 3, 1, 5)[:2].equal(uniforms(0, 3, 1, 2))
    True
    """

    def mix(x):  # splitmix64's finaliser, on Python integers
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    base = 0
    for part in (seed, prompt_key, sample):
        base = mix((base + part + 0x9E3779B97F4A7C15) % 2**64)
    return (
        torch.tensor([mix((base + (t + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11 for t in range(count)]).double() / 2**53
    )


def pick(logp_BV, u_B):
    """The token at which the cumulative probability passes u: inverse-CDF sampling, in fp64."""
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    token_B = torch.searchsorted(cdf_BV, (u_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
    last_B = cdf_BV.shape[-1] - 1 - logp_BV.isfinite().flip(-1).int().argmax(-1)  # rounding may pass the last one
    return torch.minimum(token_B, last_B)


@dataclass
class Row:
    """A sample that is being generated."""

    prompt: int
    sample: int
    ids: list = dataclasses.field(default_factory=list)
    logps: list = dataclasses.field(default_factory=list)
    support: list = dataclasses.field(default_factory=list)


@torch.no_grad()
def generate(
    model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(), seed=0, max_rows=256,
    prompt_keys=None,
):  # fmt: skip
    """`n` completions of each prompt (lists of ids) -> list of lists of Completion. temperature 0 is greedy.

    A prompt is computed once and its keys and values are copied to its n rows. Up to `max_rows` rows are decoded
    together; a finished row leaves at once and a waiting sample takes its place. A sample depends on (seed, prompt key,
    sample number) only; the key of a prompt is its place in the list unless `prompt_keys` says otherwise.
    """
    if not prompts:
        return []
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: there is nothing to continue")
    sampling = (temperature, top_p, top_k)
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    batch = DecodingBatch(model, prompts, n, max_new_tokens, sampling, set(stop_ids), seed, keys, max_rows)
    while batch.admit():
        finished = batch.sample()
        if len(finished) < len(batch.rows):  # somebody needs another token
            batch.forward()
        batch.retire(finished)
    return batch.done


class DecodingBatch:
    """The rows that are decoded together. Row r of the cache, of hidden_RD (its last hidden state) and of u_RT (its
    random numbers) belongs to rows[r]."""

    def __init__(self, model, prompts, n, max_new_tokens, sampling, stop_ids, seed, keys, max_rows):
        self.model, self.prompts, self.n, self.sampling = model, prompts, n, sampling
        self.stop_ids, self.seed, self.keys, self.max_new_tokens = stop_ids, seed, keys, max_new_tokens
        self.max_rows = min(max_rows, n * len(prompts))
        weight = model.model.norm.weight
        self.cache = KVCache(
            model.config, self.max_rows, max(map(len, prompts)) + max_new_tokens, weight.dtype, weight.device
        )
        self.hidden_RD = weight.new_zeros(self.max_rows, model.config.hidden_size)
        self.u_RT = torch.zeros(self.max_rows, max_new_tokens, dtype=torch.float64, device=weight.device)
        self.waiting = deque(
            sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        )  # similar lengths: little padding
        self.ready = deque()  # (prompt, sample, its row in `prefix`, prefix: KVCache, last hidden states of prefix)
        self.rows, self.done = [], [[None] * n for _ in prompts]

    def admit(self):
        """Fills the free rows with waiting samples, computing their prompts first. False when nothing is left."""
        while len(self.rows) < self.max_rows and (self.ready or self.waiting):
            free = self.max_rows - len(self.rows)
            if not self.ready:
                count = min(len(self.waiting), math.ceil(free / self.n))
                numbers = [self.waiting.popleft() for _ in range(count)]
                prefix, last_BD = prefill(self.model, [self.prompts[i] for i in numbers])
                self.ready.extend((i, j, b, prefix, last_BD) for b, i in enumerate(numbers) for j in range(self.n))
            prefix, last_BD = self.ready[0][3:]
            taken = []
            while self.ready and len(taken) < free and self.ready[0][3] is prefix:
                taken.append(self.ready.popleft())
            targets = slice(len(self.rows), len(self.rows) + len(taken))
            sources = [b for _, _, b, _, _ in taken]
            self.cache.copy_rows(prefix, sources, targets)
            self.hidden_RD[targets] = last_BD[sources]
            if self.sampling[0] > 0:
                u = [uniforms(self.seed, self.keys[i], j, self.max_new_tokens) for i, j, *_ in taken]
                self.u_RT[targets] = torch.stack(u).to(self.u_RT.device)
            self.rows += [Row(i, j) for i, j, *_ in taken]
        return bool(self.rows)

    def sample(self):
        """Draws the next token of every row -> numbers of the rows that are finished by it."""
        R, (temperature, top_p, top_k) = len(self.rows), self.sampling
        logits_RV = self.model.logits(self.hidden_RD[:R])[:, : self.model.num_tokens]
        logp_RV = sampling_logprobs(logits_RV, temperature or 1.0, top_p, top_k)
        step_R = torch.tensor([len(row.ids) for row in self.rows], device=logp_RV.device)
        u_R = self.u_RT[:R].gather(1, step_R[:, None])[:, 0]
        self.token_R = pick(logp_RV, u_R) if temperature > 0 else logits_RV.argmax(-1)
        chosen_R = logp_RV.gather(1, self.token_R[:, None])[:, 0]
        finished = []
        for r, (row, token, logp) in enumerate(zip(self.rows, self.token_R.tolist(), chosen_R.tolist())):
            row.ids.append(token)
            row.logps.append(logp)
            if top_p < 1.0 or top_k > 0:
                row.support.append(logp_RV[r].isfinite().nonzero()[:, 0].tolist())
            if token in self.stop_ids or len(row.ids) == self.max_new_tokens:
                finished.append(r)
        return finished

    def forward(self):
        """One forward pass over all rows: their new tokens into the cache, their hidden states for the next."""
        R = len(self.rows)
        self.hidden_RD[:R] = self.model(self.token_R[:, None], cache=self.cache)[:, 0]

    def retire(self, finished):
        """Takes finished rows out; the last rows move into their places, so the batch stays without holes."""
        for r in reversed(finished):
            row, last = self.rows[r], len(self.rows) - 1
            ended = row.ids[-1] in self.stop_ids
            self.done[row.prompt][row.sample] = Completion(row.ids, row.logps, ended, row.support or None)
            if r != last:
                self.rows[r] = self.rows[last]
                self.cache.copy_rows(self.cache, [last], [r])
                self.hidden_RD[r], self.u_RT[r] = self.hidden_RD[last], self.u_RT[last]
            self.rows.pop()
        if finished and self.rows:
            self.cache.longest = max(len(self.prompts[row.prompt]) + len(row.ids) for row in self.rows)


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
    hidden_BTD = model(ids_BT, lengths_B)
    target_BS = ids_BT[:, 1:]
    position_S = torch.arange(1, ids_BT.shape[1], device=ids_BT.device)
    mask_BS = (position_S >= prompt_lengths_B[:, None]) & (position_S < lengths_B[:, None])
    hidden_ND, target_N = hidden_BTD[:, :-1][mask_BS], target_BS[mask_BS]
    allowed = [ids for row in support for ids in row] if support else None

    def one_chunk(hidden_CD, target_C, start):
        logits_CV = model.logits(hidden_CD)[:, : model.num_tokens] / temperature
        if allowed:
            keep_CV = torch.zeros_like(logits_CV, dtype=torch.bool)
            for row, ids in zip(keep_CV, allowed[start : start + len(target_C)], strict=True):
                row[ids] = True
            logits_CV = logits_CV.masked_fill(~keep_CV, -math.inf)
        logp_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():
            entropy_C = -(logp_CV.exp() * logp_CV.nan_to_num(neginf=0.0)).sum(-1)
        return logp_CV.gather(1, target_C[:, None])[:, 0], entropy_C

    parts = []
    for start in range(0, len(target_N), chunk):
        part = hidden_ND[start : start + chunk], target_N[start : start + chunk], start
        parts.append(checkpoint(one_chunk, *part, use_reentrant=False) if torch.is_grad_enabled() else one_chunk(*part))
    zero_BS = torch.zeros(mask_BS.shape, device=ids_BT.device)
    if not parts:
        return zero_BS + 0.0 * hidden_BTD.sum(), zero_BS
    logp_N, entropy_N = (torch.cat(values) for values in zip(*parts, strict=True))
    return zero_BS.masked_scatter(mask_BS, logp_N), zero_BS.masked_scatter(mask_BS, entropy_N)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer and chat format


class Tokenizer:
    """tokenizer.json of a model folder or hub id, with Qwen3's chat format."""

    def __init__(self, path):
        self.path = model_folder(path)
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


def template_fingerprint(tokenizer, max_length):
    """Identifies what the reward model reads: a fixed conversation as rendered, the length limit, what is cut."""
    text = tokenizer.chat([{"role": "user", "content": "P"}, {"role": "assistant", "content": "C"}])
    return hashlib.sha256(f"{text}|bare statement|{max_length}|end of program".encode()).hexdigest()[:16]


def shape_reward(score, valid):
    """softplus(score) for a valid program, 0 otherwise: every valid answer beats every invalid one, and the order of
    the valid ones is kept (paper, validity-preserving reward). Floats or tensors.

    >>> [round(float(shape_reward(torch.tensor(s), v)), 3) for s, v in ((0.0, True), (-10.0, True), (5.0, False))]
    [0.693, 0.0, 0.0]
    """
    score, valid = torch.as_tensor(score, dtype=torch.float32), torch.as_tensor(valid)
    return torch.where(valid, F.softplus(score), torch.zeros_like(score))


class RewardModel:
    """A scalar reward model ready to score. `truncated` counts the programs that had to be cut so far."""

    def __init__(self, path, device=None, max_length=4096, token_budget=16384):
        self.model = load_model(path, head="score", device=device).eval().requires_grad_(False)
        if self.model.head_source.startswith("zero"):
            raise UserError(
                f"{path} has no score.weight, so it is not a reward model (--rm): train one with train_rm.py"
            )
        self.tokenizer = Tokenizer(path)
        self.device, self.max_length, self.token_budget = self.model.model.norm.weight.device, max_length, token_budget
        self.truncated = 0

    def score(self, prompt, codes):
        """Scores of several programs for one statement."""
        return self.score_many([(prompt, code) for code in codes])

    @torch.no_grad()
    def score_many(self, items):
        """[(prompt, code), ...] -> raw scores. The tokens that texts of one prompt have in common are computed once."""
        texts = {}
        for prompt, code in items:
            if (prompt, code) not in texts:
                texts[prompt, code], cut = reward_input_ids(self.tokenizer, prompt, code, self.max_length)
                self.truncated += cut
        groups = {}
        for (prompt, code), ids in texts.items():
            groups.setdefault(prompt, []).append(((prompt, code), ids))
        scores = {}
        # Groups of similar length share a batch; a batch is as many rows as the token budget allows.
        batch, widest = [], 0
        for group in sorted(groups.values(), key=lambda g: max(len(ids) for _, ids in g)):
            width = max(len(ids) for _, ids in group)
            if batch and (sum(map(len, batch)) + len(group)) * max(widest, width) > self.token_budget:
                scores.update(self._score_groups(batch))
                batch, widest = [], 0
            batch.append(group)
            widest = max(widest, width)
        if batch:
            scores.update(self._score_groups(batch))
        return [scores[item] for item in items]

    def _score_groups(self, groups):
        """Groups of [(key, ids)] with one prompt each -> {key: score}."""
        shared = [len(os.path.commonprefix([ids for _, ids in group])) for group in groups]
        # At least one token must be left to score.
        shared = [min(p, min(len(ids) for _, ids in group) - 1) for p, group in zip(shared, groups, strict=True)]
        prefix, _ = prefill(self.model, [group[0][1][:p] for p, group in zip(shared, groups, strict=True)])
        rows = [(g, key, ids[shared[g] :]) for g, group in enumerate(groups) for key, ids in group]
        ids_BT, lengths_B = pad_rows([ids for _, _, ids in rows], self.device)
        cache = KVCache(self.model.config, len(rows), prefix.longest + ids_BT.shape[1], prefix.k.dtype, self.device)
        cache.copy_rows(prefix, [g for g, _, _ in rows], slice(None))
        score_B = self.model.score(self.model(ids_BT, lengths_B, cache), lengths_B)
        return {key: score for (_, key, _), score in zip(rows, score_B.tolist(), strict=True)}


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
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"no folder at {path!r}, and as a hub id it cannot be had: {str(error).splitlines()[0]}"
        ) from None


def read_json(path):
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


def load_model(path, head="lm", dtype=None, device=None):
    """Folder or hub id -> Qwen3 on `device` (default cuda if there is one) in `dtype` (default float32).

    The model is built without memory and filled tensor by tensor from the mapped files. Every tensor must be there
    with its shape and none may be left over, with two exceptions: a causal LM loaded with head="score" gets a head of
    zeros (its lm_head is not used), and a reward model may have a score.bias. Raises UserError.
    """
    folder = model_folder(path)
    config = Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    files = weight_files(folder)
    with torch.device("meta"):
        model = Qwen3(config, head, score_bias=head == "score" and "score.bias" in files)
    expected = dict(model.named_parameters())
    is_fresh = head == "score" and "score.weight" not in files
    unused = {"lm_head.weight"} if is_fresh or config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(files) - ({"score.weight"} if is_fresh else set()))
    extra = sorted(set(files) - set(expected) - unused)
    if missing or extra:
        hint = " (a reward model? its head is score.weight)" if head == "lm" and "score.weight" in extra else ""
        raise UserError(f"{folder}: missing tensors {missing[:4]}, unexpected tensors {extra[:4]}{hint}")
    for file in sorted(set(files.values())):
        with open_weights(file) as weights:
            for name in sorted(n for n, f in files.items() if f == file and n in expected):
                tensor = weights.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    raise UserError(
                        f"{file}: {name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
                    )
                set_parameter(model, name, tensor.to(device=device, dtype=dtype or torch.float32))
    if is_fresh:
        set_parameter(model, "score.weight", torch.zeros(1, config.hidden_size, device=device, dtype=dtype))
    model.head_source = f"zeros, since {path} is a causal LM" if is_fresh else f"{head} head of {path}"
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(folder)
        model.num_tokens = min(config.vocab_size, len(tokenizer))
        check_template(folder, tokenizer)
    return model


def check_template(folder, tokenizer):
    """A reward checkpoint of ours remembers what its inputs looked like; scores under another template mean nothing."""
    if (folder / "codescaler.json").is_file():
        saved = read_json(folder / "codescaler.json")
        now = template_fingerprint(tokenizer, saved["max_length"])
        if saved["template"] != now:
            raise UserError(f"{folder}: trained with chat template {saved['template']}, this code renders {now}")


def set_parameter(model, name, tensor):
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


def save_model(model, tokenizer, folder, max_length=4096):
    """Writes a folder that transformers and load_model read: config.json, model.safetensors, the tokenizer's files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    config = dataclasses.replace(model.config, pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.stop_ids)
    write_atomic(folder / "config.json", json.dumps(config.to_dict(model.head), indent=1) + "\n")
    if folder.resolve() != tokenizer.path.resolve():
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt"):
            if (tokenizer.path / file).is_file():
                shutil.copyfile(tokenizer.path / file, folder / file)
    if model.head == "score":
        reads = {
            "template": template_fingerprint(tokenizer, max_length),
            "max_length": max_length,
            "cut": "end of program",
        }
        write_atomic(folder / "codescaler.json", json.dumps(reads, indent=1) + "\n")


def write_atomic(path, text):
    """The whole text is at `path`, or what was there before."""
    new = Path(f"{path}.tmp")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ----------------------------------------------------------------------------------------------------------------------
# ranks


def setup(device=None):
    """-> (rank, world size, device). Plain python is rank 0 of 1. Raises UserError."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device}: expected cpu{' or cuda' if torch.cuda.is_available() else ''} on this machine"
        )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise UserError(f"{world} ranks: training on several ranks is not built yet, use --nproc-per-node 1")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return rank, world, device


def total(tensor):
    """Sum over ranks; the tensor itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


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


class Run:
    """A run folder: args.json, metrics.csv (a row a step), samples.jsonl and checkpoint/ (weights and state.pt).

    Opening it locks it (one run a folder) and compares `args` with those it was started with: a difference in anything
    but `may_differ` is refused by name. Only rank 0 writes.
    """

    may_differ = ("steps", "resume", "device", "out", "collect_only")

    def __init__(self, args, columns, rank=0):
        self.dir, self.rank, self.columns = Path(args.out), rank, columns
        self.checkpoint = self.dir / "checkpoint"
        if rank:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.dir / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.dir} is in use by another run: wait for it or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to --out {self.dir}: {error.strerror}") from None
        if not args.resume:
            for path in self.dir.iterdir():
                if path.name != ".lock":
                    remove(path)
        if not self.checkpoint.exists() and (self.dir / "checkpoint.old").exists():  # killed between two renames
            os.rename(self.dir / "checkpoint.old", self.checkpoint)
        self._write_args(dataclasses.asdict(args))

    def _write_args(self, new):
        path = self.dir / "args.json"
        old = read_json(path)["args"] if path.exists() else new
        for name in new:
            if name not in self.may_differ and old.get(name) != new[name]:
                raise UserError(
                    f"{self.dir} was started with --{name.replace('_', '-')} {old.get(name)}, now it is {new[name]}: "
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
            rows = [
                r for r in read_lines(self.dir / "metrics.csv")[1:] if r.endswith("\n") and int(r.split(",")[0]) <= step
            ]
            write_atomic(self.dir / "metrics.csv", ",".join(self.columns) + "\n" + "".join(rows))
        return state

    def samples(self):
        """Rows of samples.jsonl; a line cut short by a kill is dropped from the file."""
        path = self.dir / "samples.jsonl"
        lines = read_lines(path)
        if lines and not lines[-1].endswith("\n"):
            write_atomic(path, "".join(lines[:-1]))
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_samples_after(self, step):
        kept = [json.dumps(row) + "\n" for row in self.samples() if row["step"] <= step]
        write_atomic(self.dir / "samples.jsonl", "".join(kept))

    def log(self, **row):
        """Appends a row to metrics.csv; columns that are not given stay empty."""
        if self.rank == 0:
            unknown = set(row) - set(self.columns)
            assert not unknown, unknown
            cells = (row.get(column, "") for column in self.columns)
            with open(self.dir / "metrics.csv", "a", encoding="utf-8") as file:
                file.write(",".join(f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells) + "\n")

    def append(self, rows):
        """Appends dicts to samples.jsonl."""
        if self.rank == 0:
            with open(self.dir / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self, model, tokenizer, **state):
        """Writes checkpoint/ whole or not at all: a kill at any moment leaves the old one or the new one."""
        if self.rank:
            return
        with signals_wait():
            self._replace_checkpoint(model, tokenizer, state)

    def _replace_checkpoint(self, model, tokenizer, state):
        new, old = self.dir / "checkpoint.new", self.dir / "checkpoint.old"
        remove(new)
        save_model(model, tokenizer, new)
        with open(new / "state.pt", "wb") as file:
            torch.save({**state, "rng": torch.get_rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
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
    problem: str = ""  # file with the bare statement
    programs: list[str] = dataclasses.field(default_factory=list)  # Python files (positional arguments)
    max_length: int = 4096  # longest scored text in tokens
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
    from extract import extract_code

    args = parse_args(ScoreArgs, argv, positional="programs")
    if not args.problem or not args.programs:
        raise UserError("score needs --problem FILE and at least one program file")
    statement = read_text(args.problem, "--problem")
    reward_model = RewardModel(args.rm, args.device, args.max_length)
    found = [(path, extract_code(f"```python\n{read_text(path, 'program')}\n```")) for path in args.programs]
    scores = reward_model.score(statement, [e.code or "" for _, e in found])
    rows = [
        {"program": path, "score": score, "reward": float(shape_reward(score, e.code is not None)), "reason": e.reason}
        for (path, e), score in zip(found, scores, strict=True)
    ]
    rows.sort(key=lambda row: -row["reward"])
    if args.json:
        print("\n".join(map(json.dumps, rows)))
        return
    print(f"{'rank':<6}{'score':>10}{'reward':>10}  {'reason':<14}program")
    for rank, row in enumerate(rows, 1):
        print(f"{rank:<6}{row['score']:>10.4f}{row['reward']:>10.4f}  {row['reason']:<14}{row['program']}")
    if reward_model.truncated:
        print(f"{reward_model.truncated} programs were cut to fit --max-length {args.max_length}", file=sys.stderr)


def generate_command(argv):
    args = parse_args(GenerateArgs, argv, positional="prompt")
    if not args.prompt:
        raise UserError('generate needs a prompt: python codescaler.py generate --model tiny/policy "Write ..."')
    model, tokenizer = load_model(args.model, device=args.device), Tokenizer(args.model)
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
