"""Speed beside transformers and TRL: the same random weights and tokens through both, in one run.

    python tests/speed.py --config tiny --peer          # 5 minutes on one core
    python tests/speed.py --config small --peer --json  # a JSON object a line
    python tests/speed.py --rows score rm_step          # only these rows, only this code

Rows: scoring programs, sampling, a step of the reward model, a step of GRPO (rollout and update).
All on a CPU with one thread, in fp32; tests/gpu.sh measures on a GPU. ratio is the peer's time
divided by ours, the median over rounds in turn. max_abs_diff is the largest difference of the
results: scores, log-probabilities of the sampled tokens, or loss and gradient norm.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import codescaler  # noqa: E402
import grpo  # noqa: E402
import train_rm  # noqa: E402
from bench import SHAPES, print_rows  # noqa: E402
from common import check_choice, check_least, parse_args, run_cli  # noqa: E402
from pairs import Rollout  # noqa: E402
from problems import Problem  # noqa: E402
from runs import adamw  # noqa: E402

ROWS = ("score", "generate", "rm_step", "grpo_step")
WORK = {  # pairs that are scored, (prompts, samples, new tokens) of rollouts, pairs of an RM step
    "tiny": (64, [(2, 8, 128), (8, 8, 128)], 16, (8, 8, 128)),
    "small": (16, [(2, 8, 128)], 4, (1, 8, 64)),
    "qwen3-0.6b": (4, [(1, 4, 16)], 1, (1, 2, 16)),
}
STOP = 1  # ends a sampled row; 0 is padding; all other ids are drawn


@dataclass
class Args:
    config: str = "tiny"  # shape of the random weights: tiny, small or qwen3-0.6b
    rows: list = field(default_factory=lambda: list(ROWS))  # what is measured
    peer: bool = False  # also measure transformers (score, generate) and TRL (the steps)
    rounds: int = 3  # measurements of each, in turn, after one that warms up
    seconds: int = 100  # a row is not repeated after so many seconds
    json: bool = False  # one JSON object a line


# --------------------------------------------------------------------------------------------------
# the work


def draw(rng, vocab, low, high):
    return [rng.randrange(2, vocab) for _ in range(rng.randint(low, high))]


def programs_to_score(pairs, group, vocab, seed=0):
    """[(prompt, [program, ...])]: `group` programs of 80-400 tokens to each prompt of 300-700."""
    rng = random.Random(seed)
    work = []
    for _ in range(pairs // group):
        prompt = draw(rng, vocab, 300, 700)
        work.append((prompt, [draw(rng, vocab, 80, 400) for _ in range(group)]))
    return work


def prompts_to_answer(prompts, samples, new, vocab, low=300, high=700, seed=0):
    """Prompts, and the tokens after which each of their samples stops: a quarter runs to the
    limit."""
    rng = random.Random(seed)
    drawn = [draw(rng, vocab, low, high) for _ in range(prompts)]
    return drawn, [
        new if rng.random() < 0.25 else rng.randint(new // 8, new) for _ in range(prompts * samples)
    ]


def random_model(args, head, training=False):
    """Random weights; the score head too, which init_weights leaves at zero."""
    model = codescaler.Qwen3(SHAPES[f"{args.config}-shape"], head)
    codescaler.init_weights(model)
    if head == "score":
        torch.nn.init.normal_(model.score.weight, std=0.02)
    return model if training else model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# the measurement


def seconds_of(run):
    """-> (seconds of a call, what it returns): CPU seconds, which other jobs disturb less."""
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def measure(args, row, work, tokens, ours, peer=None, truth=None):
    """-> a row of the table. One round warms up, unless --seconds are over after it. `ours` and
    `peer` return lists of numbers that should agree; `truth` makes them where there is no peer, or
    one that returns None, from what ours returned."""
    rounds, begin = [], time.perf_counter()
    while len(rounds) <= args.rounds and (not rounds or time.perf_counter() - begin < args.seconds):
        ours_s, found = seconds_of(ours)
        peer_s, wanted = seconds_of(peer) if peer else (math.nan, None)
        rounds.append((ours_s, peer_s))
    rounds = rounds[1:] or rounds
    ours_s, peer_s = (statistics.median(column) for column in zip(*rounds))
    wanted = truth(found) if truth and wanted is None else wanted
    gaps = [abs(a - b) for a, b in zip(found, wanted, strict=True)] if wanted else [math.nan]
    return {
        "row": row, "config": args.config, "device": "cpu", "work": work, "ours_s": ours_s,
        "peer_s": peer_s, "ratio": statistics.median(theirs / mine for mine, theirs in rounds),
        "tokens_s": tokens / ours_s, "max_abs_diff": max(gaps), "rounds": len(rounds),
    }  # fmt: skip


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
    ids_BT, lengths_B = codescaler.pad_rows(rows, "cpu")
    return ids_BT, (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()


# --------------------------------------------------------------------------------------------------
# scoring


def score(args, pairs):
    """RewardModel.score_many, 8 programs a prompt; transformers in batches of 8."""
    model = random_model(args, "score")
    work = programs_to_score(pairs, 8, model.config.vocab_size)
    items = [(tuple(prompt), tuple(code)) for prompt, codes in work for code in codes]
    rows, twin = [prompt + code for prompt, code in items], args.peer and transformers_twin(model)
    reward_model = codescaler.RewardModel.__new__(codescaler.RewardModel)  # without a folder
    about = {"max_length": 4096, "token_budget": 512, "truncated": 0}
    vars(reward_model).update(model=model, tokenizer=None, **about)

    def ours():
        already_ids = lambda tokenizer, prompt, code, most: (prompt, code, False)  # noqa: E731
        with mock.patch("codescaler.reward_input_ids", already_ids):
            return reward_model.score_many(items)

    @torch.inference_mode()
    def peer():
        found = []
        for at in range(0, len(rows), 8):
            ids_BT, mask_BT = padded(rows[at : at + 8])
            found += twin(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].tolist()
        return found

    @torch.inference_mode()
    def truth(found):
        """Each row on its own, without padding or a shared prompt."""
        parts = [codescaler.pad_rows([row], "cpu") for row in rows]
        return [model.score(model(ids_1T)[0], length_1).item() for ids_1T, length_1 in parts]

    tokens = sum(map(len, rows))
    return measure(args, "score", f"{pairs} programs", tokens, ours, twin and peer, truth)


# --------------------------------------------------------------------------------------------------
# sampling


class ForcedStops:
    """In place of the stop ids: sample j of prompt i ends after stops[i * n + j] tokens, whatever
    is drawn. generate() asks once for each row, the last one first."""

    def __init__(self, stops, n):
        self.stops, self.n, self.next_tokens = stops, n, codescaler.next_tokens

    def after(self, model, hidden_RD, rows, *sampling):
        """next_tokens, which then notes the rows that end."""
        self.next_tokens(model, hidden_RD, rows, *sampling)
        self.ends = [len(r.ids) == self.stops[r.prompt * self.n + r.sample] for r in rows]

    def __contains__(self, token):
        return self.ends.pop()


def generate_ours(model, prompts, samples, new, stops):
    """Samples that end after `stops` tokens, by this code."""
    forced = ForcedStops(stops, samples)
    with mock.patch("codescaler.next_tokens", forced.after):
        return codescaler.generate(model, prompts, samples, new + 1, stop_ids=forced)


@torch.inference_mode()
def generate_peer(twin, prompts, samples, new, stops):
    """transformers.generate from prompts padded on the left; STOP is certain at the end of a row
    and barred before."""
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
    """The difference is that of our tokens' log-probabilities from a plain pass over each row."""
    model, (prompts, samples, new), rows = random_model(args, "lm"), size, []
    work, stops = prompts_to_answer(*size, model.config.vocab_size)
    twin = args.peer and transformers_twin(model)

    def ours():
        groups = generate_ours(model, work, samples, new, stops)
        rows[:] = [(p, c.ids) for p, group in zip(work, groups) for c in group]
        return [logp for group in groups for c in group for logp in c.logps]

    peer = partial(generate_peer, twin, work, samples, new, stops)
    about = f"{prompts}x{samples}x{new}"
    return measure(args, "generate", about, sum(stops), ours, twin and peer,
                   lambda _: plain_logps(twin or model, rows))  # fmt: skip


@torch.inference_mode()
def plain_logps(model, rows):
    """Log-probabilities of the ids behind each prompt, a pass a row; a model of either kind."""
    wanted = []
    for prompt, ids in rows:
        ids_1T = torch.tensor([prompt + ids])
        ours = isinstance(model, codescaler.Qwen3)
        logits_1TV = model.logits(model(ids_1T)[0]) if ours else model(ids_1T).logits
        logp_TV = logits_1TV[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        wanted += logp_TV.gather(1, ids_1T[0, len(prompt) :, None])[:, 0].tolist()
    return wanted


# --------------------------------------------------------------------------------------------------
# training steps: the peer is the loss of a TRL trainer with its defaults, its backward pass and
# AdamW, without its data loading and logging. Learning rate 0: every round computes the same.


def trl_trainer(kind, model, **settings):
    """A TRL trainer around a model, made ready as trainer.train() would."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "policy")
    data = {"prompt": ["a"]}
    if kind == "GRPO":
        settings["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    else:
        data = {"chosen_ids": [[2, 3]], "rejected_ids": [[2, 4]]}
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{kind}Config")(
            output_dir=folder, report_to="none", use_cpu=True, bf16=False
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, args=config, train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer, **settings,
        )  # fmt: skip
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    model.train()
    trainer.optimizer = adamw(model, "cpu", 0.0, 0.01)
    return trainer


def trl_step(trainer, model, batches):
    """Loss and gradient norm of an optimizer step over these batches."""
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(model, dict(batch))
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def rm_step(args, pairs):
    """train_rm.update on pairs that share their prompt."""
    model, peer = random_model(args, "score", training=True), None
    work = programs_to_score(2 * pairs, 2, model.config.vocab_size)
    encoded = [train_rm.EncodedPair(tuple(p), *map(tuple, codes), "") for p, codes in work]
    settings = train_rm.Args(center=0.0, token_budget=2048)
    optimizer = adamw(model, "cpu", 0.0, 0.01)
    if args.peer:
        twin = transformers_twin(model)
        rows = [prompt + codes[side] for side in (0, 1) for prompt, codes in work]
        batch = dict(zip(("input_ids", "attention_mask"), padded(rows)))
        peer = partial(trl_step, trl_trainer("Reward", twin), twin, [batch])

    def ours():
        loss, _, _, norm, _ = train_rm.update(model, optimizer, encoded, settings)
        return loss, norm

    tokens = sum(len(prompt + code) for prompt, codes in work for code in codes)
    return measure(args, "rm_step", f"{pairs} pairs", tokens, ours, peer)


def grpo_step(args, size):
    """Rollout of 500-token prompts and one on-policy update without KL, advantages 1 and -1 in
    turn. The peer samples with transformers and is trained on our tokens in batches of 8."""
    (prompts, samples, new), peer = size, None
    model = random_model(args, "lm", training=True)
    work, stops = prompts_to_answer(*size, model.config.vocab_size, 500, 500)
    settings = grpo.Args(temperature=1.0, kl=0.0, max_new_tokens=new, token_budget=2048)
    optimizer, problem, groups = adamw(model, "cpu", 0.0, 0.01), Problem("", ""), []

    def ours():
        done = generate_ours(codescaler.gathered(model), work, samples, new, stops)
        groups.clear()
        for i, (prompt, group) in enumerate(zip(work, done)):
            facts = [(problem, i, prompt, c.ids, c.logps) for c in group]
            groups.append([Rollout(*f, advantage=(-1.0) ** j) for j, f in enumerate(facts)])
        m = grpo.update(model, None, optimizer, groups, settings, "cpu")
        return m["loss"], m["grad_norm"]

    if args.peer:
        twin = transformers_twin(model)
        trainer = trl_trainer("GRPO", twin)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1

        def peer():
            generate_peer(twin.eval(), work, samples, new, stops)
            rows = sum(groups, [])
            batches = [rows[at : at + 8] for at in range(0, len(rows), 8)]
            batches = [trl_batch(batch, sum(stops)) for batch in batches]
            return trl_step(trainer, twin.train(), batches)

    about = f"{prompts}x{samples}x{new}"
    return measure(args, "grpo_step", about, sum(stops), ours, peer)


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
    check_choice(args, config=WORK)
    check_least(args, 1, "rounds")
    torch.set_num_threads(1)
    pairs, rollouts, rm_pairs, step = WORK[args.config]
    every = [(score, pairs), *((generate, size) for size in rollouts)]
    for measurement, size in [*every, (rm_step, rm_pairs), (grpo_step, step)]:
        if measurement.__name__ in args.rows:
            print_rows([measurement(args, size)], args.json)


if __name__ == "__main__":
    run_cli(main)
