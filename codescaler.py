"""The model: Qwen3 with a language-model head or a score head; sampling, scoring, checkpoints.

    python codescaler.py score --rm out/rm --problem statement.md a.py b.py    # ranks programs
    python codescaler.py generate "Write solve(xs) ..." --model tiny/policy -n 4

Models are folders or hub ids in Hugging Face layout (Qwen/Qwen3-8B, ...). Parameters have Hugging
Face's names, so loading needs no map. Reading order: Qwen3.forward -> Block -> Attention, MLP; then
continue_prompt, which is how everything but decoding uses the model: a prompt is computed once, and
many rows of tokens continue it. KVCache and generate decode.

Shape suffixes: B rows, T time, D model width, H query heads, G key/value heads, K head size,
V vocabulary, P prompt length, S keys that are attended to, R rows that are decoded together,
N tokens or sampling candidates, C tokens of a chunk, M query heads of a key/value head.
Rows are right-padded and their lengths say what is real: attention is causal, so no real token ever
sees padding. What is said of GPUs here and in runs.py was checked on fake CUDA tensors
(tests/test_fake_cuda.py) or is torch's own word; nothing was measured on one.
"""

import json
import math
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import hub
import runs
from common import UserError, check_least, parse_args, run_cli, write_atomic
from extract import extract_code
from hub import Config, Tokenizer

# --------------------------------------------------------------------------------------------------
# the forward pass


def rope_table(config, position_BT):
    """Positions [B, T] -> cos and sin [B, T, 1, K]: angle position * theta^(-2i/K) for dimension i
    and for i + K/2; the sine is negative in the first half, as apply_rope needs it."""
    exponent = torch.arange(0, config.head_dim, 2, device=position_BT.device) / config.head_dim
    # theta^(-2i/K): dimension 0 turns fastest, the last one slowest
    angle = position_BT[..., None, None].float() * config.rope_theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x_BTHK, cos_BT1K, sin_BT1K):
    """Rotates dimension i against dimension i + K/2 (halves, as in Qwen's checkpoints; not the
    neighbours 2i and 2i+1). At position 0 nothing turns; a quarter turn takes (1, 0) to (0, 1):

    >>> quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    >>> apply_rope(torch.tensor([[1.0, 0.0]]), *quarter).tolist()
    [[0.0, 1.0]]
    """
    return x_BTHK * cos_BT1K + x_BTHK.roll(x_BTHK.shape[-1] // 2, -1) * sin_BT1K


def attention(q_BTHK, k_BSGK, v_BSGK, mask):
    """Grouped-query attention -> [B, T, H, K]; H / G query heads share a key/value head.

    `mask` has numbers that are added to the attention logits, -inf where a query must not look.
    None: the queries are the last T of the S tokens, and each may see itself and what came before.
    """
    B, T, H, K = q_BTHK.shape
    # scaled_dot_product_attention wants heads before time.
    q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    if T == 1 and mask is not None:
        # Decoding: the query heads of a kv head stand in the time dimension, since all of them may
        # see the same slots. So keys and values are read once and never repeated.
        q_BGMK = q_BHTK.reshape(B, k_BGSK.shape[1], -1, K)
        y_BGMK = F.scaled_dot_product_attention(q_BGMK, k_BGSK, v_BGSK, attn_mask=mask)
        return y_BGMK.reshape(B, 1, H, K)
    if mask is None and T < k_BGSK.shape[2]:
        # Flash attention does it without a dense mask. The object is made here, not in the model:
        # FSDP2 casts what a block is given to bf16, which leaves a CausalBias without its shape.
        mask = causal_lower_right(T, k_BGSK.shape[2])
    y_BHTK = F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return y_BHTK.transpose(1, 2)


class Attention(nn.Module):
    """Queries and keys are normalised per head, then rotated by their position."""

    def __init__(self, config):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = K
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.q_norm = nn.RMSNorm(K, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(K, config.rms_norm_eps)

    def forward(self, x_BTD, rope, past, mask):
        # [B, T, H * K] -> [B, T, H, K], and likewise with G heads for keys and values.
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        # A copy: FSDP2 takes no view as an output of a block.
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).clone()
        q_BTHK = apply_rope(self.q_norm(q_BTHK), *rope)
        k_BTGK = apply_rope(self.k_norm(k_BTGK), *rope)
        # What a query may see: what came before its row, and the row up to itself.
        if past is None:
            k_BSGK, v_BSGK = k_BTGK, v_BTGK
        elif callable(past):  # KVCache.write: each row has a past of its own
            k_BSGK, v_BSGK = past(k_BTGK, v_BTGK)
        else:  # of one prompt, [1, P, G, K], which all rows continue
            # expand copies nothing; cat does: [B, P + T, G, K], S = P + T keys.
            B = len(x_BTD)
            k_BSGK = torch.cat([past[0].expand(B, -1, -1, -1), k_BTGK], dim=1)
            v_BSGK = torch.cat([past[1].expand(B, -1, -1, -1), v_BTGK], dim=1)
        y_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask)
        # Only the keys and values of this pass: the caller has the earlier ones.
        return self.o_proj(y_BTHK.flatten(2)), (k_BTGK, v_BTGK)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on normalised input and added to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, rope, past, mask):
        """-> (x [B, T, D], (k, v)): the layer's own keys and values [B, T, G, K] are an output, so
        they carry gradients and may be the `past` of another pass."""
        # Pre-norm: x itself is never normalised between the layers. RMSNorm, along the last
        # dimension: x / sqrt(mean(x^2) + eps) * weight.
        y_BTD, kv = self.self_attn(self.input_layernorm(x_BTD), rope, past, mask)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), kv


class ScoreHead(nn.Linear):
    """hidden [B, T, D], lengths [B] -> scores [B] at each row's last real token, computed in fp32:
    in bf16 scores near 8 are multiples of 1/16, and different programs would tie."""

    def forward(self, hidden_BTD, lengths_B):
        row_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        # lengths - 1 is the last real token; the padding behind it is never read.
        last_BD = hidden_BTD[row_B, lengths_B - 1].float()
        bias = None if self.bias is None else self.bias.float()
        # The sum drops a dimension of size 1; FSDP2 refuses the view that indexing gives.
        return F.linear(last_BD, self.weight.float(), bias).sum(-1)


class Qwen3(nn.Module):
    """head="lm": logits over the vocabulary (by the embedding, if tied). head="score": a reward
    model, one fp32 number a text."""

    def __init__(self, config, head="lm", score_bias=False):
        super().__init__()
        if head not in ("lm", "score"):
            raise ValueError(f"head {head!r}: expected 'lm' or 'score'")
        self.config, self.head = config, head
        self.num_tokens = config.vocab_size  # of the tokenizer; ids beyond pad the matrix
        self.checkpointing = False  # keep blocks' inputs, recompute the rest in the backward pass
        V, D = config.vocab_size, config.hidden_size
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        norm = nn.RMSNorm(D, config.rms_norm_eps)
        # Everything below the head is called `model` in Hugging Face's checkpoints.
        self.model = nn.ModuleDict(dict(embed_tokens=nn.Embedding(V, D), layers=blocks, norm=norm))
        if head == "score":
            self.score = ScoreHead(D, 1, bias=score_bias)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, ids_BT, past=None):
        """ids [B, T] -> (hidden states [B, T, D] after the final norm, keys and values).

        The second lists (k, v), each [B, T, G, K], of every layer, for these T tokens only. `past`
        is such a list of ONE prompt [1, P, G, K] that all rows continue, or a KVCache.
        """
        if isinstance(past, KVCache):
            position_BT, mask, past = past.next_step()
        else:  # P tokens were computed before, 0 of a fresh text
            T, P = ids_BT.shape[1], 0 if past is None else past[0][0].shape[1]
            position_BT, mask = torch.arange(P, P + T, device=ids_BT.device)[None], None  # [1, T]
            if P > 0 and not ids_BT.is_cuda:  # else attention() says it without a dense mask
                # Query t of a row may see the P tokens of the prompt and its row up to itself.
                mask = torch.full((T, P + T), -math.inf, device=ids_BT.device).triu_(P + 1)
        x_BTD, kv = self.model.embed_tokens(ids_BT), []
        rope = [table.to(x_BTD.dtype) for table in rope_table(self.config, position_BT)]
        for block, before in zip(self.model.layers, past or [None] * len(self.model.layers)):
            inputs = (x_BTD, rope, before, mask)
            if self.checkpointing and torch.is_grad_enabled():
                x_BTD, new = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD, new = block(*inputs)
            kv.append(new)
        return self.model.norm(x_BTD), kv

    def logits(self, hidden):
        """Hidden states [..., D] -> fp32 logits [..., V], of a few positions: for all of a batch
        they would not fit into memory."""
        tied = self.config.tie_word_embeddings
        # FSDP2 keeps the root's weights gathered after a forward pass, so they may be used here.
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(hidden, weight.to(hidden.dtype)).float()


@torch.no_grad()
def init_weights(model, seed=0, std=0.02):
    """Fresh weights in place: normal for matrices, ones for norms, zeros for the score head."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.startswith("score."):
            runs.local(p).zero_()
        elif p.ndim == 1:
            runs.local(p).fill_(1.0)
        else:
            runs.local(p).normal_(0.0, std)
    return model


# --------------------------------------------------------------------------------------------------
# one prompt, many rows


def pad_rows(rows, device="cpu", pad=0):
    """Lists of ids -> (ids [B, T] right-padded, lengths [B])."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([list(row) + [pad] * (longest - len(row)) for row in rows])
    return ids_BT.to(device), torch.tensor([len(row) for row in rows], device=device)


def read_prompt(model, prompt):
    """Ids of a prompt, two at least -> keys and values of all but the last. That one is the first
    input of every row that continues it, since its state predicts the row's first token."""
    if len(prompt) < 2:
        raise ValueError(f"a prompt of {len(prompt)} tokens: two are needed")
    return model(torch.tensor([prompt[:-1]], device=model.model.norm.weight.device))[1]


def continue_prompt(model, prompt, rows, past=None):
    """Hidden states of B rows (lists of ids) that continue a prompt (ids), which is computed once.

    -> (hidden [B, T, D], lengths [B]). hidden[b, 0] is the state at the prompt's last token, which
    predicts rows[b][0]; hidden[b, t] is the state at rows[b][t - 1]; length b is 1 + len(rows[b]).
    Equal to B rows of prompt + row, gradients included. `past`: read_prompt(model, prompt), where
    several calls share it.
    """
    past = read_prompt(model, prompt) if past is None else past
    ids_BT, lengths_B = pad_rows([[prompt[-1], *row] for row in rows], past[0][0].device)
    return model(ids_BT, past)[0], lengths_B


def training_passes(model, groups, length_of, token_budget):
    """The passes of an update: `groups` are this rank's (prompt ids, rows), cut into micro-batches
    that fit the budget beside their prompt (cut_rows).

    Yields (prompt, past, micro-batch); the caller computes a loss of rows that continue `past` and
    calls backward() on it before it asks for the next one. `past` is detached: a micro-batch's
    backward pass stops there and adds to its .grad. After the last one, a single backward pass
    begins at the real keys and values (kv) with those sums. So a prompt is computed once, however
    its rows are cut, and the gradients are those of whole rows.

    With sharded weights every rank must make the same passes, or the others wait for ever. Ranks
    with less to do join in with a micro-batch None, whose loss the caller multiplies by 0.
    """
    groups = [(p, cut_rows(rows, length_of, token_budget - len(p))) for p, rows in groups]
    # Sorted, so that the ranks' i-th prompts have about as many micro-batches.
    groups.sort(key=lambda group: -len(group[1]))
    # plans[r][i]: the number of micro-batches of rank r in its group i.
    plans = runs.gather_lists([[len(batches) for _, batches in groups]])
    for i in range(max(map(len, plans))):
        prompt, batches = groups[i] if i < len(groups) else ([0, 0], [])  # a placeholder
        kv = read_prompt(model, prompt)
        # The graph is cut here: each backward pass below ends at these leaves and adds to .grad.
        past = [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in kv]
        for j in range(max(plan[i] for plan in plans if i < len(plan))):
            yield prompt, past, batches[j] if j < len(batches) else None
        # All micro-batches are done: one backward pass through the prompt with the sum.
        outputs = [tensor for pair in kv for tensor in pair]
        torch.autograd.backward(outputs, [leaf.grad for pair in past for leaf in pair])


def cut_rows(rows, length_of, room):
    """Cuts rows into lists, sorted by length, whose padded size, number * longest, is at most
    `room` tokens (one row at least).

    >>> cut_rows(["a", "ccc", "bb"], len, 4)
    [['a', 'bb'], ['ccc']]
    """
    batches = []
    for row in sorted(rows, key=length_of):
        # Rows come shortest first, so this one is what its list would be padded to.
        if not batches or (len(batches[-1]) + 1) * length_of(row) > room:
            batches.append([])
        batches[-1].append(row)
    return batches


def token_logprobs(
    model, hidden_BTD, target_BT, mask_BT, temperature=1.0, support=None, chunk=1024
):
    """Log-probability and entropy (nats) of each target where the mask is set, two fp32 [B, T].

    hidden[b, t] predicts target[b, t]; elsewhere the results are 0. Logits exist for `chunk` tokens
    at a time and are computed again in the backward pass: memory is chunk x V, never B x T x V.
    `support` has, for each row, the ids that could be sampled at each token (Completion.support):
    probabilities are then renormalised over them. The entropy carries no gradient.
    """
    # Padding goes: [B, T, D] -> [N, D], the tokens whose mask is set.
    hidden_ND, target_N = hidden_BTD[mask_BT], target_BT[mask_BT]
    allowed = [*chain(*support)] if support else None

    def one_chunk(hidden_CD, target_C, allowed_C):
        logits_CV = model.logits(hidden_CD)[:, : model.num_tokens] / temperature
        if allowed_C:
            # Coordinates of the entries that stay: tokens of the chunk, and ids.
            kept = [c for c, ids in enumerate(allowed_C) for _ in ids], [*chain(*allowed_C)]
            drop_CV = torch.ones_like(logits_CV, dtype=torch.bool)
            drop_CV[torch.tensor(kept, device=target_C.device).unbind()] = False
            logits_CV = logits_CV.masked_fill(drop_CV, -math.inf)
        logp_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():  # 0 * -inf counts as 0
            entropy_C = -(logp_CV.exp() * logp_CV.nan_to_num(neginf=0.0)).sum(-1)
        return logp_CV.gather(1, target_C[:, None])[:, 0], entropy_C

    run = partial(checkpoint, one_chunk, use_reentrant=False)
    run = run if torch.is_grad_enabled() else one_chunk
    # One chunk at least: a mask without a token must still give tensors with a graph.
    parts = [slice(start, start + chunk) for start in range(0, max(1, len(target_N)), chunk)]
    found = [run(hidden_ND[c], target_N[c], allowed[c] if allowed else None) for c in parts]
    zero_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    return [zero_BT.masked_scatter(mask_BT, torch.cat(values)) for values in zip(*found)]


# --------------------------------------------------------------------------------------------------
# sampling


class KVCache:
    """Keys and values of the rows that are decoded together: k, v [layers, R, G, slots, K],
    allocated once. Row r owns its slots; the first len(lengths) rows are in use."""

    def __init__(self, config, rows, slots, dtype=torch.float32, device="cpu"):
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, heads, slots, size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = []  # tokens in each row; on the host, where reading them waits for nothing

    def add(self, kv):
        """Appends a row that begins with a copy of a prompt's keys and values [1, P, G, K]."""
        row, P = len(self.lengths), kv[0][0].shape[1]
        for layer, (k_1PGK, v_1PGK) in enumerate(kv):
            self.k[layer, row, :, :P] = k_1PGK[0].transpose(0, 1)
            self.v[layer, row, :, :P] = v_1PGK[0].transpose(0, 1)
        self.lengths.append(P)

    def remove(self, row):
        """The last row moves into the place of `row`, so that rows in use have no holes."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            self.k[:, row, :, :length] = self.k[:, last, :, :length]
            self.v[:, row, :, :length] = self.v[:, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()

    def next_step(self):
        """Makes room for one more token a row -> (its position [R, 1], mask [R, 1, 1, S], and for
        each layer the function that takes in the new tokens)."""
        # Small copies to the GPU do not wait for it: the next pass is queued behind this one.
        self.slot_R = torch.tensor(self.lengths).to(self.k.device, non_blocking=True)
        self.lengths = [length + 1 for length in self.lengths]
        # Only up to the longest row, not all allocated slots.
        slot_S = torch.arange(max(self.lengths), device=self.k.device)
        masked_RS = slot_S > self.slot_R[:, None]
        mask_RS = torch.zeros_like(masked_RS, dtype=self.k.dtype).masked_fill_(masked_RS, -math.inf)
        past = [partial(self.write, layer) for layer in range(len(self.k))]
        return self.slot_R[:, None], mask_RS[:, None, None], past

    def write(self, layer, k_R1GK, v_R1GK):
        """Puts the new tokens into a layer's slots -> all its keys and values, [R, S, G, K]."""
        rows, slots = slice(len(self.lengths)), slice(max(self.lengths))  # those in use
        k_RGSK, v_RGSK = self.k[layer, rows, :, slots], self.v[layer, rows, :, slots]
        row_R = torch.arange(len(self.slot_R), device=self.slot_R.device)
        k_RGSK[row_R, :, self.slot_R] = k_R1GK[:, 0]
        v_RGSK[row_R, :, self.slot_R] = v_R1GK[:, 0]
        return k_RGSK.transpose(1, 2), v_RGSK.transpose(1, 2)


class Completion(NamedTuple):
    """`ids` end with the stop token if `finished`; `logps` are their log-probabilities under the
    sampling distribution; `support` has the ids that could be sampled at each step where top-p or
    top-k left some out, else it is None."""

    ids: list
    logps: list
    finished: bool
    support: list | None


def sampling_distribution(logits_RV, temperature=1.0, top_p=1.0, top_k=0):
    """fp32 logits [R, V] -> (ids, probabilities [R, N]) of the tokens that may be sampled: all V
    in order (ids [1, V]), or the likeliest first (ids [R, N]), those left out with probability 0.

    Temperature first, then top_k (the k likeliest), then top_p (the likeliest until their sum
    reaches top_p), as Hugging Face does; of equal logits at the k-th place some are left out.

    >>> ids, p = sampling_distribution(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2, top_p=0.7)
    >>> ids.tolist(), p.tolist()
    ([[1, 2]], [[1.0, 0.0]])
    """
    logits_RV = logits_RV / temperature
    if top_k > 0 or top_p < 1.0:
        logits_RN, ids_RN = logits_RV.topk(min(top_k or logits_RV.shape[1], logits_RV.shape[1]))
        p_RN = logits_RN.softmax(-1)
        before_RN = p_RN.cumsum(-1) - p_RN  # the mass of the likelier ones
        p_RN = p_RN.masked_fill((before_RN >= top_p) & (before_RN > 0), 0.0)
        return ids_RN, p_RN / p_RN.sum(-1, keepdim=True)
    return torch.arange(logits_RV.shape[1], device=logits_RV.device)[None], logits_RV.softmax(-1)


def draw(p_RN, u_R):
    """Places [R] by inverse-CDF sampling: the first at which the cumulative probability passes u in
    [0, 1). Summed in fp64, so the place does not depend on the other rows of a batch.

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]]), torch.tensor([0.3])).tolist()
    [2]
    """
    sum_RN = p_RN.cumsum(-1, dtype=torch.float64)
    # In units of the total, which is 1 but for rounding: u next to 1 stays inside.
    target_R1 = (u_R * sum_RN[:, -1])[:, None]
    return torch.searchsorted(sum_RN, target_R1, right=True)[:, 0]


@dataclass
class Row:
    """A sample that is being generated, and its random numbers, one a token."""

    prompt: int
    sample: int
    uniforms: np.ndarray
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    support: list = field(default_factory=list)


def next_tokens(model, hidden_RD, rows, temperature, top_p, top_k):
    """Draws the next token of every row and records it there, with one transfer to the host."""
    logits_RV = model.logits(hidden_RD)[:, : model.num_tokens]
    ids_RN, p_RN = sampling_distribution(logits_RV, temperature or 1.0, top_p, top_k)
    if temperature > 0:
        u_R = torch.tensor([row.uniforms[len(row.ids)] for row in rows], dtype=torch.float64)
        place_R = draw(p_RN, u_R.to(p_RN.device, non_blocking=True))
    else:
        place_R = p_RN.argmax(-1)
    # What is recorded is the log-probability under the distribution that was sampled from.
    token_R1 = ids_RN.expand(len(rows), -1).gather(1, place_R[:, None])
    logp_R1 = p_RN.gather(1, place_R[:, None]).log()
    found = [token_R1, logp_R1]
    if top_k > 0 or top_p < 1.0:
        support_RN = ids_RN.where(p_RN > 0, -1)  # -1 where a token was left out
        # top_p alone has the whole vocabulary: the host gets what any row needs.
        found += [support_RN if top_k else support_RN[:, : int((p_RN > 0).sum(-1).max())]]
    # Ids are whole numbers below 2^53: fp64 holds them as they are.
    found = torch.cat([part.double() for part in found], dim=1).tolist()
    for row, (token, logp, *support) in zip(rows, found, strict=True):
        row.ids.append(int(token))
        row.logps.append(logp)
        row.support.append([int(i) for i in support if i >= 0])


@torch.inference_mode()
def generate(
    model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(),
    seed=0, prompt_keys=None, max_rows=256, progress=False,
):  # fmt: skip
    """`n` completions of each prompt (lists of ids) -> list of lists of Completion.

    Temperature 0 is greedy. Up to `max_rows` rows are decoded together, fewer where a GPU has no
    room for them; a finished row leaves at once and a waiting sample takes its place. A sample
    depends on (seed, key of its prompt, sample number) alone, but for the rounding of batches of
    other sizes; a prompt's key is its place in the list unless `prompt_keys` says otherwise.
    Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: there is nothing to continue")
    weight = model.model.norm.weight
    keys = range(len(prompts)) if prompt_keys is None else prompt_keys
    longest, total = max(map(len, prompts), default=0), n * len(prompts)
    slots = longest + max_new_tokens  # of a row: its prompt and its longest answer
    max_rows = rows_that_fit(model.config, longest, slots, weight, min(max_rows, total))
    cache = KVCache(model.config, max_rows, slots, weight.dtype, weight.device)
    # Prompts of like length are decoded together; the samples of a prompt follow each other.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    waiting = deque((i, j) for i in order for j in range(n))
    done, rows, prefilled = [[None] * n for _ in prompts], [], None
    hidden_RD = weight.new_zeros(0, model.config.hidden_size)
    hide = not progress or None  # None: shown on a terminal only
    bar = tqdm(total=total, desc="sampling", leave=False, disable=hide)
    while waiting or rows:
        # 1. Free rows take waiting samples; a prompt is computed once for its n samples.
        while waiting and len(rows) < max_rows:
            i, j = waiting.popleft()
            if prefilled != i:
                prompt_1PD, kv = model(torch.tensor([prompts[i]], device=weight.device))
                prefilled = i
            cache.add(kv)
            # A random stream of its own: it depends on no other row, batch or rank.
            uniforms = np.random.default_rng([seed, keys[i], j]).random(max_new_tokens)
            rows.append(Row(i, j, uniforms))
            hidden_RD = torch.cat([hidden_RD, prompt_1PD[:, -1]])
        # 2. The states at the last tokens give the next tokens.
        next_tokens(model, hidden_RD, rows, temperature, top_p, top_k)
        # 3. Finished rows leave; the last row takes the place, here and in the cache.
        # From the last row to the first, so that the row moved into place r was looked at.
        for r in reversed(range(len(rows))):
            row, ended = rows[r], rows[r].ids[-1] in stop_ids
            if ended or len(row.ids) == max_new_tokens:
                support = row.support if top_k > 0 or top_p < 1.0 else None
                done[row.prompt][row.sample] = Completion(row.ids, row.logps, ended, support)
                rows[r] = rows[-1]
                rows.pop()
                cache.remove(r)
                bar.update()
        # 4. One pass over the new tokens of all rows.
        if rows:
            token_R1 = torch.tensor([[row.ids[-1]] for row in rows])
            token_R1 = token_R1.to(weight.device, non_blocking=True)
            hidden_RD = model(token_R1, cache)[0][:, 0]
        else:
            hidden_RD = hidden_RD[:0]
    bar.close()
    if weight.is_cuda:  # NCCL cannot use what torch keeps for itself
        del cache
        torch.cuda.empty_cache()
    return done


def rows_that_fit(config, prompt, slots, weight, wanted):
    """How many of the wanted cache rows fit: on a GPU those whose slots and logits fill 90% (an
    estimate) of what is free after the prefill of a prompt of `prompt` tokens; on a CPU all.
    `weight`: any one."""
    if not weight.is_cuda:
        return wanted
    size, token = weight.element_size(), 2 * config.num_hidden_layers * config.num_key_value_heads
    token *= config.head_dim * size
    # A row's logits: fp32 logits and probabilities, their fp64 sum, and a copy of one of them.
    row = slots * token + 24 * config.vocab_size
    # The prompt's own keys and values, and what a block holds: four tensors as wide as its MLP.
    prefill = prompt * (token + 4 * config.intermediate_size * size)
    reserved = torch.cuda.memory_reserved(weight.device)
    unused = reserved - torch.cuda.memory_allocated(weight.device)
    free = torch.cuda.mem_get_info(weight.device)[0] + unused
    return max(1, min(wanted, int(0.9 * (free - prefill)) // row))


# --------------------------------------------------------------------------------------------------
# checkpoints


def meta_model(config, head, dtype, score_bias=False):
    """Qwen3 without memory: its tensors have shapes and a dtype. A score head is fp32 in any."""
    with torch.device("meta"):
        model = Qwen3(config, head, score_bias).to(dtype)
    if head == "score":
        model.score.float()
    return model


def check_model(path, head, dtype=torch.float32):
    """-> (Qwen3 without memory, {parameter name: stored slice, None for a score head of zeros}).

    Every parameter must be stored with its shape as floating-point numbers, and nothing may be left
    over, but for a causal LM that gets a score head. Raises UserError, also for the tokenizer of
    another model. It reads no weights but a tied head that is stored twice: trainers ask before
    hours of work that end with loading.
    """
    folder = hub.model_folder(path)
    config = Config.from_dict(hub.read_json(folder / "config.json"), folder / "config.json")
    stored = hub.stored_tensors(folder)
    model = meta_model(config, head, dtype, score_bias=head == "score" and "score.bias" in stored)
    wanted = dict(model.named_parameters())
    # Names are compared both ways; a folder of another kind must not load as a model.
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    if missing == {"score.weight"}:  # a causal LM gets a score head; only its own may be left over
        missing, extra = set(), extra - {"lm_head.weight"}
    if head == "lm" and config.tie_word_embeddings and "lm_head.weight" in extra:
        # Some checkpoints store the tied head twice; a merged adapter may have untied it.
        extra = extra - {"lm_head.weight"}
        hub.check(
            torch.equal(stored["lm_head.weight"][:], stored["model.embed_tokens.weight"][:]),
            f"{folder}: lm_head.weight differs from the embedding, but config.json says "
            "tie_word_embeddings: true; set it to false",
        )
    hint = " (a reward model?)" if "score.weight" in extra else ""
    found = f"missing tensors {sorted(missing)[:4]}, unexpected {sorted(extra)[:4]}{hint}"
    hub.check(not (missing or extra), f"{folder}: {found}")
    for name in sorted(wanted.keys() & stored.keys()):
        kind, shape = stored[name].get_dtype(), stored[name].get_shape()
        is_float, expected = kind in ("F64", "F32", "F16", "BF16"), list(wanted[name].shape)
        hub.check(is_float, f"{folder}: {name} is {kind}: quantized weights are not read")
        hub.check(shape == expected, f"{folder}: {name} has shape {shape}, expected {expected}")
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(folder)
        hub.check_tokenizer(tokenizer, config)
        model.num_tokens = tokenizer.num_tokens  # a matrix may be padded beyond
    return model, {name: stored.get(name) for name in wanted}


@torch.no_grad()
def load_model(path, head="lm", dtype=None, device=None, sharded=False):
    """Folder, run folder or hub id -> Qwen3 on `device` (cuda if there is one) in `dtype` (fp32).

    The weights are read tensor by tensor from mapped files; with `sharded`, each rank reads its
    part only. A causal LM that is loaded with head="score" gets a head of zeros. Raises UserError.
    """
    model, slices = check_model(path, head, dtype or torch.float32)
    if head == "score" and slices["score.weight"] is None:
        print(f"{path} is a causal LM: its score head begins with zeros", file=sys.stderr)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if sharded:
        runs.shard(model, model.model.layers, [model.score] if head == "score" else [], device)
    # After sharding: a rank allocates and reads its own rows only.
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        if slices[name] is None:
            runs.local(p).zero_()
        else:
            runs.local(p).copy_(slices[name][runs.rows_of(p)])
        finite = bool(runs.local(p).isfinite().all())
        hub.check(finite, f"{path}: {name} holds values that are not finite: it is spoilt")
    return model


def save_model(model, tokenizer, folder, max_length=4096):
    """Writes a folder that transformers and load_model read: config.json, the weights in files of
    at most 5 GB, the tokenizer's files. All ranks call it, since the weights are gathered; rank 0
    writes. `max_length`: of a reward model's texts, for codescaler.json."""
    folder, weights = Path(folder), {}
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, tensor in runs.full_parameters(model):
        if writes:  # the other ranks only help to gather
            weights[name] = torch.empty_like(tensor, device="cpu").copy_(tensor)
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors lets nobody but their owner read them
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.stop_ids}
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config = model.config.to_dict(model.head, dtype) | ids
    write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
    for name in hub.TOKENIZER_FILES.split():
        if (tokenizer.path / name).is_file():
            write_atomic(folder / name, (tokenizer.path / name).read_bytes())
    if model.head == "score":
        write_atomic(folder / "codescaler.json", json.dumps({"max_length": max_length}) + "\n")


@torch.no_grad()
def gathered(model, dtype=None):
    """An unsharded copy of a model in `dtype` (default: compute_dtype; a score head in fp32), for
    decoding and scoring: they take a different number of steps on every rank, so they must need no
    communication. All ranks call it. The model itself where there is nothing to gather or cast."""
    weight = model.model.norm.weight
    dtype = dtype or runs.compute_dtype(weight.device)
    if dtype == weight.dtype and not isinstance(model, runs.FSDPModule):
        return model
    runs.gather_lists([])  # ranks wait for the longest rollout here, not inside of NCCL
    has_bias = model.head == "score" and model.score.bias is not None
    copy = meta_model(model.config, model.head, dtype, has_bias).requires_grad_(False)
    copy.to_empty(device=weight.device)
    for name, tensor in runs.full_parameters(model):
        copy.get_parameter(name).copy_(tensor)
    copy.num_tokens = model.num_tokens
    return copy.train(model.training)


# --------------------------------------------------------------------------------------------------
# chat format


def prompt_ids(tokenizer, text, enable_thinking=None):
    """A user turn and the beginning of the answer -> ids, as Qwen3's chat template writes them.
    With enable_thinking=False the answer begins behind an empty think block."""
    opening = tokenizer.encode("<|im_start|>")
    turn = [*opening, *tokenizer.encode_plain(f"user\n{text}")]
    turn += tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    return turn + (tokenizer.encode("<think>\n\n</think>\n\n") if enable_thinking is False else [])


def reward_input_ids(tokenizer, prompt, code, max_length=4096):
    """What a reward model reads -> (ids of the prompt, ids of the program, was the program cut).

    User turn = statement, assistant turn = an empty think block and the bare program, as Qwen3's
    template writes it (it drops a program's leading newlines). The score is read at the last token,
    the newline behind <|im_end|>. A text over `max_length` tokens loses the end of its program,
    never its prompt and never the closing tokens. Raises UserError if no room is left.
    """
    opening = prompt_ids(tokenizer, prompt) + tokenizer.encode("<think>\n\n</think>")
    program = tokenizer.encode_plain("\n\n" + code.lstrip("\n"))
    closing = tokenizer.encode("<|im_end|>\n")
    room = max_length - len(opening) - len(closing)
    found = f"a prompt of {len(opening)} tokens leaves no room for a program"
    hub.check(room > 0, f"{found}: the reward model reads {max_length} (max_length)")
    return opening, program[:room] + closing, len(program) > room


# --------------------------------------------------------------------------------------------------
# the reward model


def shape_reward(score, valid):
    """softplus(score) for a valid program, 0 otherwise: every valid answer beats every invalid one,
    and the order of the valid ones is kept (the paper's validity-preserving reward). Floats or
    tensors.

    >>> shaped = shape_reward(torch.tensor([0.0, -10.0, 5.0]), torch.tensor([True, True, False]))
    >>> [round(reward, 5) for reward in shaped.tolist()]
    [0.69315, 5e-05, 0.0]
    """
    score = torch.as_tensor(score, dtype=torch.float32)
    return torch.where(torch.as_tensor(valid), F.softplus(score), torch.zeros_like(score))


class RewardModel:
    """A scalar reward model ready to score; `truncated` counts the programs it had to cut.

    It is bf16 on CUDA and fp32 on a CPU; scores are fp32 in both. `max_length` (tokens) is that of
    its training, and another value is refused (UserError); models of others do not say, and take
    any, or 4096. A scoring pass has up to `token_budget` tokens, which changes no score. With
    `sharded` and several ranks each keeps a part of the weights, which are gathered while all of
    them call score_many.
    """

    def __init__(self, path, device=None, max_length=None, token_budget=None, sharded=False):
        folder = hub.model_folder(path)
        is_rm = "score.weight" in hub.stored_tensors(folder)
        hub.check(is_rm, f"{path} has no score.weight: no reward model; train one: train_rm.py")
        if Path(path, "args.json").is_file() and not Path(path, "result.json").is_file():
            print(f"{path}: its training is not finished", file=sys.stderr)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        sharded = sharded and runs.num_ranks() > 1
        model = load_model(folder, "score", runs.compute_dtype(device), device, sharded)
        self.model, self.tokenizer = model.eval().requires_grad_(False), Tokenizer(folder)
        # Scores of longer or shorter texts than those of its training mean little.
        file, self.truncated = folder / "codescaler.json", 0
        about = hub.read_json(file) if file.is_file() else {"max_length": max_length or 4096}
        self.max_length = about.get("max_length")
        mistake = f"--max-length {max_length}: {folder} was trained with {self.max_length}"
        hub.check(max_length in (None, self.max_length), mistake)
        # On a CPU small passes cost little, and rows of like length need little padding.
        self.token_budget = token_budget or (16384 if model.model.norm.weight.is_cuda else 512)

    def fits(self, prompt):
        """Whether a statement leaves room for a program."""
        try:
            reward_input_ids(self.tokenizer, prompt, "", self.max_length)
        except UserError:
            return False
        return True

    def score(self, prompt, codes):
        """Raw scores of several programs for one statement."""
        return self.score_many([(prompt, code) for code in codes])

    @torch.no_grad()
    def score_many(self, items):
        """[(prompt, code), ...] -> raw scores. A statement is read once for all its programs."""
        groups, scores = {}, {}
        for prompt, code in dict.fromkeys(items):  # equal programs are scored once
            ids, program, cut = reward_input_ids(self.tokenizer, prompt, code, self.max_length)
            groups.setdefault((prompt, tuple(ids)), []).append((code, program))
            self.truncated += cut
        # All ranks come here, also those with nothing to score.
        model = gathered(self.model, self.model.model.norm.weight.dtype)
        for (prompt, ids), programs in groups.items():
            past = read_prompt(model, ids)  # once for all batches of its programs
            for batch in cut_rows(programs, lambda item: len(item[1]), self.token_budget):
                rows = [program for _, program in batch]
                score_B = model.score(*continue_prompt(model, ids, rows, past))
                scores |= {(prompt, code): s for (code, _), s in zip(batch, score_B.tolist())}
        return [scores[item] for item in items]


# --------------------------------------------------------------------------------------------------
# command line


@dataclass
class ScoreArgs:
    rm: str = "out/rm"  # reward model: run folder, checkpoint folder or hub id
    problem: str = ""  # file with the statement
    programs: list[str] = field(default_factory=list)  # Python files (without a flag)
    device: str | None = None  # cpu or cuda
    json: bool = False  # one JSON object a program


@dataclass
class GenerateArgs:
    prompt: str = ""  # the user turn (without a flag)
    model: str = "tiny/policy"  # policy: run folder, checkpoint folder or hub id
    n: int = 1  # samples
    max_new_tokens: int = 512  # longest answer
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling: the likeliest tokens that have this probability together
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    enable_thinking: bool = True  # False: the answer begins behind an empty think block
    seed: int = 0  # of sampling
    device: str | None = None  # cpu or cuda


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{flag} {path!r}: {error.strerror}") from None


def score_command(argv):
    """Ranks programs for a statement by reward."""
    args = parse_args(ScoreArgs, argv, positional="programs", about=score_command.__doc__)
    if not args.problem or not args.programs:
        raise UserError("score needs --problem FILE and at least one program file")
    statement = read_text(args.problem, "--problem")
    texts = [read_text(path, "program") for path in args.programs]
    found = [extract_code(f"```python\n{text}\n```") for text in texts]
    # What is no program is not scored; its reward is 0.
    codes = [code for code, _ in found if code is not None]
    _, _, device = runs.setup(args.device)
    reward_model = RewardModel(args.rm, device)
    scores = dict(zip(codes, reward_model.score(statement, codes)))
    rows = []
    for path, (code, reason) in zip(args.programs, found, strict=True):
        score = scores.get(code)
        reward = float(shape_reward(score or 0.0, score is not None))
        rows.append({"score": score, "reward": reward, "reason": reason, "program": path})
    rows.sort(key=lambda row: -row["reward"])
    if not args.json:
        print(f"{'score':>10}{'reward':>12}  {'reason':<16}program")
    for row in rows:
        score = "-" if row["score"] is None else f"{row['score']:.4f}"
        line = f"{score:>10}{row['reward']:>12.5g}  {row['reason']:<16}{row['program']}"
        print(json.dumps(row) if args.json else line)
    if reward_model.truncated:
        print(f"{reward_model.truncated} programs cut to fit", file=sys.stderr)


def generate_command(argv):
    """Samples answers of a policy to a prompt and prints them with their log-probabilities."""
    args = parse_args(GenerateArgs, argv, positional="prompt", about=generate_command.__doc__)
    check_least(args, 1, "n max_new_tokens")
    check_least(args, 0, "temperature top_k seed")
    check_least(args, 0.01, "top_p", most=1)
    if not args.prompt:
        raise UserError('generate needs a prompt: python codescaler.py generate "Write ..."')
    _, _, device = runs.setup(args.device)
    model = load_model(args.model, "lm", runs.compute_dtype(device), device)
    tokenizer = Tokenizer(args.model)
    prompts = [prompt_ids(tokenizer, args.prompt, args.enable_thinking)]
    sampling = (args.temperature, args.top_p, args.top_k, tokenizer.stop_ids, args.seed)
    completions = generate(model, prompts, args.n, args.max_new_tokens, *sampling)[0]
    for number, c in enumerate(completions, 1):
        end = "finished" if c.finished else "cut off by --max-new-tokens"
        print(f"--- {number}: {len(c.ids)} tokens, {end}, log-probability {sum(c.logps):.2f}")
        print(tokenizer.decode(c.ids))


def main():
    commands = {"score": score_command, "generate": generate_command}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
