"""What a GPU can prove, one measurement a call; tests/gpu.sh makes the calls and the table.

    export PYTHONPATH=.
    python tests/gpu.py parity                          # beside a CPU and transformers
    python tests/gpu.py train qwen3-1.7b-shape 16384    # a step of both trainers, random weights
    python tests/gpu.py decode qwen3-8b-shape 1024 512  # scoring, and decoding of 16 and 64 rows
    python tests/gpu.py table FILE

Each prints JSON lines: what, tokens/s, share of the card's bf16 products (790 TFLOP/s) or of its
bandwidth (3.35 TB/s), measured and computed peak in GiB. GPU_PY_DEVICE=cpu tries it on a CPU.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

import bench
import codescaler as cs
import grpo
import runs
import train_rm
from pairs import Rollout
from problems import Problem

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("GPU_PY_DEVICE", "cuda")
FLOPS, BANDWIDTH, GIB = 790e12, 3.35e12, 2**30


def say(what, **values):
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"what": what, "card": card, **rounded}), flush=True)


class Measured:
    """with Measured() as m: ... gives m.seconds and m.peak (GiB, 0 on a CPU)."""

    def __enter__(self):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.started = time.time()
        return self

    def __exit__(self, *error):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.time() - self.started
        self.peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


def random_model(shape, head, device, sharded):
    """A model with random weights: fp32 and sharded as in training, or for decoding."""
    dtype = torch.float32 if sharded else runs.compute_dtype(device)
    model = cs.meta_model(bench.SHAPES[shape], head, dtype)
    if sharded:
        runs.shard(model, model.model.layers, [model.score] if head == "score" else [], device)
    return cs.init_weights(model.to_empty(device=device))


# --------------------------------------------------------------------------------------------------
# measurements


@torch.no_grad()
def parity():
    """The toy models in bf16 beside the same in fp32 on a CPU, decoding beside the full forward
    pass, and beside transformers."""
    dtype, prompt = runs.compute_dtype(DEVICE), list(range(20, 60))
    here, cpu = (
        cs.load_model(ROOT / "tiny/policy", "lm", kind, where).eval()
        for kind, where in ((dtype, DEVICE), (torch.float32, "cpu"))
    )
    answers = cs.generate(here, [prompt], 8, 64, seed=1)[0]
    rows = [answer.ids for answer in answers]
    found = []
    for model in (here, cpu):
        device = model.model.norm.weight.device
        hidden_BTD, lengths_B = cs.continue_prompt(model, prompt, rows)
        ids_BT, _ = cs.rows_after(prompt, rows, device)
        mask_BT = torch.arange(1, ids_BT.shape[1], device=device) < lengths_B[:, None]
        logp_BT, _ = cs.token_logprobs(model, hidden_BTD[:, :-1], ids_BT[:, 1:], mask_BT)
        found.append(logp_BT[mask_BT].cpu())
    sampled_N = torch.tensor([logp for answer in answers for logp in answer.logps])
    greedy = [cs.generate(m, [prompt], 1, 64, temperature=0.0)[0][0].ids for m in (here, cpu)]
    equal = sum(a == b for a, b in zip(*greedy)) / 64
    codes = [f"def f(x):\n    return x + {i}\n" for i in range(8)]
    scores = [cs.RewardModel(ROOT / "tiny/reward", d).score("Add.", codes) for d in (DEVICE, "cpu")]
    say("log-probabilities: largest difference to the CPU's", value=gap(*found))
    say("log-probabilities: decoding to the full pass", value=gap(sampled_N, found[0]))
    say("greedy tokens equal to the CPU's", value=equal)
    say("scores: largest difference to the CPU's", value=gap(*map(torch.tensor, scores)))
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return say("logits beside transformers", error="transformers is not installed")
    theirs = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/policy", dtype=dtype).to(DEVICE)
    ids_BT = torch.tensor([prompt + rows[0]], device=DEVICE)
    ours_BTV, theirs_BTV = here.logits(here(ids_BT)[0]), theirs(ids_BT).logits
    say("logits: largest difference to transformers'", value=gap(ours_BTV, theirs_BTV))


def gap(a, b):
    return float((a.float() - b.float()).abs().max())


def train(shape, token_budget):
    """An update of train_rm.py and one of grpo.py: the second of two, when memory is settled."""
    rank, world, device = runs.setup(DEVICE)
    budget = int(token_budget)
    for script, head in (("train_rm", "score"), ("grpo", "lm")):
        model = random_model(shape, head, device, True)
        model.checkpointing = True
        optimizer = runs.adamw(model, device, 1e-6, 0.01)
        length, count = budget // 16, 12  # two passes of an update are full
        rows = [[2 + i % 100] * length for i in range(count)]
        prompt = [1] * (budget // 16)
        for _ in range(2):
            with Measured() as m:
                if script == "train_rm":
                    args = train_rm.Args(token_budget=budget)
                    sides = zip(rows[::2], rows[1::2])
                    batch = [train_rm.EncodedPair(tuple(prompt), *map(tuple, s), "") for s in sides]
                    train_rm.update(model, optimizer, batch, args)
                else:
                    args = grpo.Args(token_budget=budget, kl=0.0)
                    problem = Problem("p", "statement")
                    group = [
                        Rollout(problem, 0, prompt, ids, [-1.0] * length, advantage=(-1.0) ** i)
                        for i, ids in enumerate(rows)
                    ]
                    grpo.update(model, None, optimizer, [group], args, device)
        tokens = len(prompt) + count * length
        flops = 8 * bench.num_parameters(model.config, head)[0] * tokens  # forward twice, backward
        sizes = bench.MemoryArgs(gpus=1, prompt=len(prompt), response=length, token_budget=budget)
        items = bench.memory_items(bench.SHAPES[shape], None, sizes)
        computed = sum(size for phases, _, size in items if "train" in phases) / GIB
        say(f"{script} update, {shape}, budget {budget}", tokens_per_s=tokens / m.seconds,
            share=flops / m.seconds / FLOPS, peak=m.peak, computed=computed)  # fmt: skip
        del model, optimizer
        gc.collect()  # FSDP2's modules hold each other


@torch.no_grad()
def decode(shape, prompt, new):
    """Scoring of 32 programs for a prompt, then decoding of 16 and of 64 rows."""
    device, prompt, new = runs.setup(DEVICE)[2], int(prompt), int(new)
    model = random_model(shape, "score", device, False)
    rows = [[2 + i] * new for i in range(32)]
    for _ in range(2):
        with Measured() as m:
            past = cs.read_prompt(model, [1] * prompt)
            for batch in cs.cut_rows(rows, len, 16384):
                model.score(*cs.continue_prompt(model, [1] * prompt, batch, past)).tolist()
    tokens = prompt + 32 * new
    share = 2 * bench.num_parameters(model.config, "score")[0] * tokens / m.seconds / FLOPS
    say(f"scoring, {shape}", tokens_per_s=tokens / m.seconds, share=share, peak=m.peak)
    del model, past
    gc.collect()
    model = random_model(shape, "lm", device, False)
    c, token = model.config, bench.token_bytes(model.config)[0]
    for n in (16, 64):
        for length in (8, new):  # the first plans kernels
            with Measured() as m:
                cs.generate(model, [[1] * prompt], n, length)
        # A step reads all weights and the keys and values of its rows.
        read = new * (2 * bench.num_parameters(c)[0] + n * token * (prompt + new / 2))
        say(f"decoding of {n} rows, {shape}", tokens_per_s=n * new / m.seconds,
            share=read / m.seconds / BANDWIDTH, peak=m.peak)  # fmt: skip


def table(path):
    """The measurements of a file, a line each."""
    for text in Path(path).read_text().splitlines():
        row = json.loads(text)
        what = row.pop("what")
        row.pop("card", None)
        print(f"{what:<58}", "  ".join(f"{key} {value}" for key, value in row.items()))


def main():
    commands = {"parity": parity, "train": train, "decode": decode, "table": table}
    commands[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
