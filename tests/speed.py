"""Speed beside transformers and TRL, or on a GPU: random weights, the same tokens through both.

    python tests/speed.py --config tiny --peer          # 5 minutes on one core
    python tests/speed.py --config small --peer --json  # a JSON object a line
    python tests/speed.py --rows score rm_step          # only these rows, only this code
    python tests/speed.py --device cuda --config qwen3-8b --rows score generate

Rows: scoring programs, sampling, a step of the reward model, a step of GRPO (rollout and update).
On a CPU with one thread, in fp32. ratio is the peer's time divided by ours, the median over rounds
in turn. max_abs_diff is the largest difference of the results: scores, log-probabilities of the
sampled tokens, or loss and gradient norm. On a GPU share is the time that 790 TFLOP/s and 3.35 TB/s
(an H100) would need, divided by ours.
"""

import gc
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import codescaler as cs  # noqa: E402
import grpo  # noqa: E402
import runs  # noqa: E402
import train_rm  # noqa: E402
from common import UserError, check_choice, parse_args, run_cli  # noqa: E402
from pairs import Rollout  # noqa: E402
from problems import Problem  # noqa: E402

ROWS = ("score", "generate", "rm_step", "grpo_step")
# Programs that are scored, (prompts, samples, new tokens) of rollouts, pairs of an RM step.
WORK = {
    "tiny": (64, [(2, 8, 128), (8, 8, 128)], 16, (8, 8, 128)),
    "small": (16, [(2, 8, 128)], 4, (1, 8, 64)),
}
WORK |= dict.fromkeys(
    ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"),
    (64, [(1, 16, 512), (1, 64, 512)], 64, (2, 32, 512)),
)
STOP = 1  # ends a sampled row; 0 is padding; all other ids are drawn
FLOPS, BANDWIDTH = 790e12, 3.35e12


@dataclass
class Args:
    config: str = "tiny"  # shape of the random weights: tiny, small or qwen3-0.6b to qwen3-8b
    rows: list = field(default_factory=lambda: list(ROWS))  # what is measured
    peer: bool = False  # also measure transformers (score, generate) and TRL (the steps)
    rounds: int = 3  # measurements of each, in turn, after one that warms up; 0: only that one
    device: str = "cpu"  # cpu or cuda
    json: bool = False  # one JSON object a line


# --------------------------------------------------------------------------------------------------
# the work


def draw(rng, vocab, low, high):
    return [rng.randrange(2, vocab) for _ in range(rng.randint(low, high))]


def programs_to_score(count, group, vocab):
    """[(prompt, program), ...]: `group` programs of 80-400 tokens to each prompt of 300-700."""
    rng, items = random.Random(0), []
    for _ in range(count // group):
        prompt = tuple(draw(rng, vocab, 300, 700))
        items += [(prompt, tuple(draw(rng, vocab, 80, 400))) for _ in range(group)]
    return items


def prompts_to_answer(prompts, samples, new, vocab, low=300, high=700):
    """Prompts, and the tokens after which each of their samples stops: a quarter runs to the
    limit."""
    rng = random.Random(0)
    drawn = [draw(rng, vocab, low, high) for _ in range(prompts)]
    return drawn, [
        new if rng.random() < 0.25 else rng.randint(new // 8, new) for _ in range(prompts * samples)
    ]


def random_model(args, head, training=False):
    """Random weights; the score head too, which init_weights leaves at zero. For training they are
    fp32, and sharded in a process group."""
    device = runs.setup(args.device)[2]
    dtype = torch.float32 if training else runs.compute_dtype(device)
    model = cs.meta_model(bench.SHAPES[f"{args.config}-shape"], head, dtype)
    heads = [model.score] if head == "score" else []
    if training:
        runs.shard(model, model.model.layers, heads, device)
    cs.init_weights(model.to_empty(device=device))
    for score_head in heads:
        torch.nn.init.normal_(runs.local(score_head.weight), std=0.02)
    model.checkpointing = training and args.device == "cuda"
    return model if training else model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# the measurement


def seconds_of(run, clock):
    """-> (seconds of a call, the numbers that it returns)."""
    begin = clock()
    found = run()
    return clock() - begin, found


def measure(args, row, work, tokens, least_s, ours, peer, wanted=None):
    """-> a row of the table. `ours` returns numbers; the same must come from `wanted`, or from the
    peer where that is None."""
    # CPU seconds, since other jobs disturb them less.
    on_gpu, clock, rounds = args.device == "cuda", time.process_time, []
    if on_gpu:
        clock = time.perf_counter
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + args.rounds):
        ours_s, found = seconds_of(ours, clock)
        peer_s, theirs = seconds_of(peer, clock) if peer else (math.nan, [math.nan] * len(found))
        rounds.append((ours_s, peer_s))
    rounds = rounds[1:] or rounds  # the first warms up
    ours_s, peer_s = (statistics.median(column) for column in zip(*rounds))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan
    gaps = [abs(a - b) for a, b in zip(found, wanted() if wanted else theirs, strict=True)]
    return {
        "row": row, "config": args.config, "device": args.device, "work": work, "ours_s": ours_s,
        "peer_s": peer_s, "ratio": statistics.median(theirs / mine for mine, theirs in rounds),
        "tokens_s": tokens / ours_s, "max_abs_diff": max(gaps), "rounds": len(rounds),
        "share": least_s / ours_s if on_gpu else math.nan, "peak_gib": peak,
    }  # fmt: skip


def products_s(model, tokens, passes):
    """Least seconds of so many passes; a training step has four: forward, again for checkpointing,
    and backward, which counts twice."""
    return passes * 2 * bench.num_parameters(model.config, model.head)[0] * tokens / FLOPS


def decoding_s(model, prompts, stops):
    """Least seconds: a step reads all weights, and the keys and values of its rows."""
    lengths = [len(prompt) for prompt in prompts for _ in range(len(stops) // len(prompts))]
    tokens = sum(stop * (length + stop / 2) for length, stop in zip(lengths, stops))
    weights = 2 * bench.num_parameters(model.config)[0] * max(stops)
    return (weights + tokens * bench.token_bytes(model.config)[0]) / BANDWIDTH


def transformers_twin(model):
    """The transformers model with the weights of ours."""
    import transformers

    config = transformers.Qwen3Config(**{**model.config.to_dict(model.head), "pad_token_id": 0})
    kinds = {"lm": "Qwen3ForCausalLM", "score": "Qwen3ForSequenceClassification"}
    twin = getattr(transformers, kinds[model.head])(config)
    twin.load_state_dict(dict(model.named_parameters()), strict=False)
    return twin.eval()


def padded(rows):
    """Rows of ids -> (ids [B, T] padded on the right, mask [B, T] as transformers wants it)."""
    ids_BT, lengths_B = cs.pad_rows(rows)
    return ids_BT, (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()


@torch.inference_mode()
def row_alone(model, ids):
    """The plain pass of one row by a model of either kind -> logits [T, V], or the score [1]."""
    if not isinstance(model, cs.Qwen3):
        return model(torch.tensor([ids])).logits[0]
    ids_1T, length_1 = cs.pad_rows([ids], model.model.norm.weight.device)
    hidden_1TD = model(ids_1T)[0]
    return model.logits(hidden_1TD)[0] if model.head == "lm" else model.score(hidden_1TD, length_1)


# --------------------------------------------------------------------------------------------------
# scoring


def score(args, count):
    """RewardModel.score_many, 8 programs a prompt; transformers in batches of 8."""
    model = random_model(args, "score")
    items = programs_to_score(count, 8, model.config.vocab_size)
    rows, twin = [prompt + code for prompt, code in items], args.peer and transformers_twin(model)
    reward_model = SimpleNamespace(model=model, tokenizer=None, max_length=4096, truncated=0)
    reward_model.token_budget = 16384 if args.device == "cuda" else 512

    def ours():
        already_ids = lambda tokenizer, prompt, code, most: (prompt, code, False)  # noqa: E731
        with mock.patch("codescaler.reward_input_ids", already_ids):
            return cs.RewardModel.score_many(reward_model, items)  # which has no folder

    @torch.inference_mode()
    def peer():
        for at in range(0, len(rows), 8):
            ids_BT, mask_BT = padded(rows[at : at + 8])
            twin(input_ids=ids_BT, attention_mask=mask_BT)

    def wanted():
        return [row_alone(twin or model, row).item() for row in rows]

    least_s = products_s(model, sum(map(len, {p for p, _ in items} | {c for _, c in items})), 1)
    about = f"{count} programs", sum(map(len, rows))
    return measure(args, "score", *about, least_s, ours, twin and peer, wanted)


# --------------------------------------------------------------------------------------------------
# sampling


def generate_ours(model, prompts, samples, new, stops):
    """By this code: sample j of prompt i ends after stops[i * samples + j] tokens, whatever they
    are. The last one is marked by a negative id until all is done."""
    real = cs.next_tokens

    def next_tokens(model, hidden_RD, rows, *sampling):
        real(model, hidden_RD, rows, *sampling)
        for row in rows:
            if len(row.ids) == stops[row.prompt * samples + row.sample]:
                row.ids[-1] = ~row.ids[-1]

    with mock.patch("codescaler.next_tokens", next_tokens):
        marked = range(-model.config.vocab_size, 0)
        groups = cs.generate(model, prompts, samples, new, stop_ids=marked)
    for completion in sum(groups, []):
        completion.ids[-1] = ~completion.ids[-1]
    return groups


@torch.inference_mode()
def generate_peer(twin, prompts, samples, new, stops):
    """By transformers, from prompts padded on the left: STOP is certain at the end of a row and
    barred before."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    is_last_BT = torch.arange(1, new + 1) >= torch.tensor(stops)[:, None]

    def force(ids, scores):
        scores[:, STOP] = torch.where(is_last_BT[:, ids.shape[1] - width], 1e9, -1e9)
        return scores

    twin.generate(
        ids_BT, attention_mask=(ids_BT > 0).long(), num_return_sequences=samples,
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=STOP, pad_token_id=0, logits_processor=[force],
    )  # fmt: skip


def generate(args, size):
    """Our tokens' log-probabilities are compared with those of a plain pass over each row."""
    model, (prompts, samples, new), rows = random_model(args, "lm"), size, []
    work, stops = prompts_to_answer(*size, model.config.vocab_size)
    twin = args.peer and transformers_twin(model)

    def ours():
        groups = generate_ours(model, work, samples, new, stops)
        rows[:] = [(p, c.ids) for p, group in zip(work, groups) for c in group]
        return [logp for group in groups for c in group for logp in c.logps]

    def wanted():
        found = []
        for prompt, ids in rows:
            logp_TV = row_alone(twin or model, prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
            found += logp_TV.gather(1, torch.tensor(ids).to(logp_TV.device)[:, None])[:, 0].tolist()
        return found

    peer = args.peer and partial(generate_peer, twin, work, samples, new, stops)
    about = f"{prompts}x{samples}x{new}", sum(stops), decoding_s(model, work, stops)
    return measure(args, "generate", *about, ours, peer, wanted)


# --------------------------------------------------------------------------------------------------
# training steps: the peer is the loss of a TRL trainer with its defaults, its backward pass and
# AdamW, without its data loading and logging. Learning rate 0: every round computes the same.


def trl_trainer(kind, model, data, **settings):
    """A TRL trainer around a model, made ready as trainer.train() would."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "policy")
    make_config, make_trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(output_dir=folder, report_to="none", use_cpu=True, bf16=False)
        trainer = make_trainer(
            model=model, args=config, train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer, **settings,
        )  # fmt: skip
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    trainer.optimizer = runs.adamw(model, "cpu", 0.0, 0.01)
    return trainer


def trl_step(trainer, model, batches):
    """Loss and gradient norm of an optimizer step over these batches."""
    model.train()
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(model, dict(batch))
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def rm_step(args, count):
    """train_rm.update on pairs that share their prompt with no other; on a GPU with many, so that
    its passes are full."""
    model, peer = random_model(args, "score", training=True), None
    group, budget = (64, 16384) if args.device == "cuda" else (2, 2048)
    items = programs_to_score(2 * count, group, model.config.vocab_size)
    pairs = [train_rm.EncodedPair(*c, r, "") for c, (_, r) in zip(items[::2], items[1::2])]
    settings = train_rm.Args(center=0.0, token_budget=budget)
    optimizer = runs.adamw(model, args.device, 0.0, 0.01)
    if args.peer:
        twin, rows = transformers_twin(model), [prompt + code for prompt, code in items]
        batch = dict(zip(("input_ids", "attention_mask"), padded(rows[::2] + rows[1::2])))
        trainer = trl_trainer("Reward", twin, {"chosen_ids": [[2, 3]], "rejected_ids": [[2, 4]]})
        peer = partial(trl_step, trainer, twin, [batch])

    def ours():
        loss, _, _, norm, _ = train_rm.update(model, optimizer, pairs, settings)
        return loss, norm

    least_s = products_s(model, train_rm.count_tokens(pairs), 4)
    about = f"{count} pairs", sum(len(prompt + code) for prompt, code in items)
    return measure(args, "rm_step", *about, least_s, ours, peer)


def grpo_step(args, size):
    """Rollout of 500-token prompts and one on-policy update without KL, advantages 1 and -1 in
    turn. The peer samples with transformers and is trained on our tokens in batches of 8."""
    (prompts, samples, new), groups, peer = size, [], None
    model = random_model(args, "lm", training=True)
    work, stops = prompts_to_answer(*size, model.config.vocab_size, 500, 500)
    settings = grpo.Args(temperature=1.0, kl=0.0, max_new_tokens=new)
    settings.token_budget = 16384 if args.device == "cuda" else 2048
    optimizer, problem = runs.adamw(model, args.device, 0.0, 0.01), Problem("", "")

    def ours():
        done = generate_ours(cs.gathered(model), work, samples, new, stops)
        groups.clear()
        for i, (prompt, group) in enumerate(zip(work, done)):
            facts = [(problem, i, prompt, c.ids, c.logps) for c in group]
            groups.append([Rollout(*f, advantage=(-1.0) ** j) for j, f in enumerate(facts)])
        m = grpo.update(model, None, optimizer, groups, settings, args.device)
        return m["loss"], m["grad_norm"]

    if args.peer:
        twin = transformers_twin(model)
        trainer = trl_trainer("GRPO", twin, {"prompt": ["a"]}, reward_funcs=len)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1

        def peer():
            generate_peer(twin.eval(), work, samples, new, stops)
            rows = sum(groups, [])
            batches = [rows[at : at + 8] for at in range(0, len(rows), 8)]
            return trl_step(trainer, twin, [trl_batch(batch, sum(stops)) for batch in batches])

    least_s = decoding_s(model, work, stops) + products_s(model, sum(stops) + 500 * prompts, 4)
    about = f"{prompts}x{samples}x{new}", sum(stops)
    return measure(args, "grpo_step", *about, least_s, ours, peer)


def trl_batch(rollouts, tokens):
    """Rollouts as TRL's GRPO loss takes them; `tokens`: how many the whole step has sampled."""
    prompt_ids, prompt_mask = padded([r.prompt_ids for r in rollouts])
    completion_ids, completion_mask = padded([r.ids for r in rollouts])
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask,
        "completion_ids": completion_ids, "completion_mask": completion_mask,
        "advantages": torch.tensor([r.advantage for r in rollouts]),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------


def main():
    args = parse_args(Args)
    check_choice(args, config=WORK, device=("cpu", "cuda"))
    if args.peer and args.device == "cuda":
        raise UserError("--peer: the peers are measured on --device cpu only")
    torch.set_num_threads(1)
    programs, rollouts, pairs, step = WORK[args.config]
    every = [(score, programs), *((generate, size) for size in rollouts)]
    for measurement, size in [*every, (rm_step, pairs), (grpo_step, step)]:
        if measurement.__name__ in args.rows:
            bench.print_rows([measurement(args, size)], args.json)
            gc.collect()  # FSDP2's modules hold each other


if __name__ == "__main__":
    run_cli(main)
