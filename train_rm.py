"""Train the reward model: pairwise (Bradley-Terry) loss on preference pairs from verified code problems.

    torchrun train_rm.py                                          # the toy run: collect pairs, fine-tune tiny/reward
    torchrun train_rm.py --collect-only                           # only collect pairs
    torchrun train_rm.py --pairs codescalerpair:FILE.jsonl        # train on pairs that exist
    torchrun train_rm.py --init tiny/policy                       # from a policy: a reward head of zeros

`python train_rm.py` does the same. The toy run takes about 2.5 minutes on 2 CPU cores. It prints the funnel from
problems to pairs, one line a step, and a table: held-out accuracy before and after, beside "longer wins" and "shorter
wins". It leaves a run folder (--out): args.json, metrics.csv, samples.jsonl, pairs.jsonl, checkpoint/. The same command
goes on after a kill, and only prints the table once it is finished.
"""

import dataclasses
import json
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from codescaler import (
    Run,
    Tokenizer,
    format_eta,
    load_model,
    pad_rows,
    reward_input_ids,
    setup,
    total,
    write_atomic,
)
from pairs import (
    MUTANT,
    Sample,
    collect_samples,
    load_pairs,
    make_pairs,
    print_funnel,
    problem_of,
    split_pairs,
    write_jsonl,
)
from problems import UserError, load_problems, parse_args, run_cli
from sandbox import Sandbox

COLUMNS = "step,loss,reward,pass_rate,valid_rate,accuracy,margin,grad_norm,lr,tokens,seconds".split(",")


@dataclass
class Args:
    # the model
    init: str = "tiny/reward"  # what to start from: a reward model, or a policy (then a head of zeros)
    out: str = "out/rm"  # run folder
    # pairs: a file, or collected from a policy
    pairs: str | None = None  # pair file to train on; without it pairs are collected
    problems: str = "toy:train"  # problems to collect on (SPEC[,SPEC...])
    policy: str = "tiny/policy"  # model whose programs are paired
    group: int = 8  # samples a problem
    temperature: float = 1.0  # sampling temperature
    max_new_tokens: int = 160  # longest sampled answer
    prompt_style: str = "plain"  # plain or lcb: the policy's prompt
    extract: str = "strict"  # extraction mode
    sandbox: str = "strict"  # isolation level: strict or basic
    min_tests: int = 3  # fewest tests that make a program verified
    max_pairs: int = 4  # most pairs a problem
    mutants: int = 2  # mutants tried of each passing program, and most mutant pairs a problem; 0: on-policy pairs only
    collect_only: bool = False  # stop when the pairs are written
    limit: int | None = None  # rows of any data that is loaded
    # training
    held_out: float = 0.15  # share of the problems kept for evaluation
    split: str = "problem"  # what is held out: whole problems, or pairs of problems that are trained on
    epochs: int = 1  # passes over the pairs
    steps: int | None = None  # optimizer steps, in place of --epochs
    batch: int = 32  # pairs a step
    lr: float = 5e-4  # peak learning rate; warmup over 5% of the steps, then a cosine to a tenth
    weight_decay: float = 0.01  # AdamW, matrices only
    center: float = 0.0  # weight of (chosen + rejected)^2, which keeps scores around 0
    max_length: int = 4096  # longest scored text in tokens; programs are cut, prompts never
    token_budget: int = 2048  # tokens of one training forward pass; a GPU wants 16384 or more
    save_every: int = 1  # steps between checkpoints
    seed: int = 0  # seed of sampling, split and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # continue the run in --out


# ----------------------------------------------------------------------------------------------------------------------
# loss and batches


def pairwise_loss(chosen_P, rejected_P, margin_P=0.0, center=0.0, count=None):
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), summed over P pairs and divided by `count` (default P).

    center * (chosen + rejected)^2 pulls the scores of a pair around 0, the only thing the first term leaves free.
    At equal scores the loss is ln 2:

    >>> round(pairwise_loss(torch.zeros(3), torch.zeros(3)).item(), 4)
    0.6931
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P) + center * (chosen_P + rejected_P) ** 2
    return losses_P.sum() / (count or len(losses_P))


def encode_pairs(tokenizer, pairs, max_length, log):
    """Pair -> (chosen ids, rejected ids), the reward model's inputs; tells `log` how many programs had to be cut."""
    rows, cut = [], 0
    for pair in pairs:
        (chosen, cut_c), (rejected, cut_r) = (
            reward_input_ids(tokenizer, pair.prompt, code, max_length) for code in (pair.chosen, pair.rejected)
        )
        rows.append((chosen, rejected))
        cut += cut_c + cut_r
    if cut:
        log(f"{cut} of {2 * len(pairs)} programs cut to fit --max-length {max_length}")
    return rows


def micro_batches(rows, token_budget):
    """Cuts pairs into index lists that fit one forward pass, sorted by length so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: max(map(len, rows[i])))
    while order:
        # The longest row decides the width of a batch; sorted from short to long, it is the last one.
        size = 1
        while size < len(order) and 2 * (size + 1) * max(map(len, rows[order[size]])) <= token_budget:
            size += 1
        yield order[:size]
        order = order[size:]


def score_pairs(model, rows, device):
    """(chosen, rejected) ids of P pairs -> their scores, both sides in one forward pass."""
    ids_BT, lengths_B = pad_rows([c for c, _ in rows] + [r for _, r in rows], device)
    score_B = model.score(model(ids_BT, lengths_B), lengths_B)
    return score_B[: len(rows)], score_B[len(rows) :]


def learning_rate(step, total_steps, peak):
    """Linear warmup over the first 5% of the steps, then a cosine to a tenth of the peak. `step` counts from 0."""
    warmup = max(1, round(0.05 * total_steps))
    progress = min(1.0, max(0.0, (step + 1 - warmup) / max(1, total_steps - warmup)))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def batch_of(step, num_pairs, batch, seed):
    """The pairs of a step, a function of step and seed alone: every pair once an epoch, in an order of its own."""
    steps_per_epoch = max(1, num_pairs // batch)
    epoch, at = divmod(step, steps_per_epoch)
    order = list(range(num_pairs))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order[at * batch : (at + 1) * batch]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model, rows, token_budget, device):
    """Scores of held-out pairs: list of (chosen, rejected) floats, in the order of `rows`."""
    scores = [None] * len(rows)
    for batch in micro_batches(rows, token_budget):
        chosen_P, rejected_P = score_pairs(model, [rows[i] for i in batch], device)
        for i, c, r in zip(batch, chosen_P.tolist(), rejected_P.tolist(), strict=True):
            scores[i] = (c, r)
    return scores


def bootstrap(values, groups, rounds=1000, seed=0):
    """Mean of `values` and its 95% interval, resampling whole groups (problems) with replacement."""
    sums = {}
    for value, group in zip(values, groups, strict=True):
        total_, n = sums.get(group, (0.0, 0))
        sums[group] = (total_ + value, n + 1)
    sums, rng, means = list(sums.values()), random.Random(seed), []
    for _ in range(rounds):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    return sum(values) / len(values), means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]


def final_table(pairs, before, after, init, split):
    """The run's result as lines of text; a tie counts as wrong."""
    mutant_scores = [s for s, p in zip(after, pairs, strict=True) if p.source.endswith(MUTANT)]
    kept = [i for i, p in enumerate(pairs) if not p.source.endswith(MUTANT)]
    pairs, before, after = ([values[i] for i in kept] for values in (pairs, before, after))
    groups = [problem_of(p) for p in pairs]
    right = {
        f"initialisation ({init})": [c > r for c, r in before],
        "fine-tuned": [c > r for c, r in after],
        "longer program wins": [len(p.chosen) > len(p.rejected) for p in pairs],
        "shorter program wins": [len(p.chosen) < len(p.rejected) for p in pairs],
    }
    first, second = list(right.values())[:2]
    right["gain of fine-tuning"] = [b - a for a, b in zip(first, second, strict=True)]
    ties = [sum(c == r for c, r in scores) for scores in (before, after)]
    lines = [
        f"held-out pairs: {len(pairs)} of {len(set(groups))} problems (--split {split}); ties {ties[0]} -> {ties[1]}"
    ]
    lines.append(f"{'':<40}{'accuracy':>9}   95% interval over problems")
    for name, values in right.items():
        mean, low, high = bootstrap([float(v) for v in values], groups)
        lines.append(f"{name:<40}{mean:>9.3f}   [{low:.3f}, {high:.3f}]")
    if mutant_scores:
        accuracy = sum(c > r for c, r in mutant_scores) / len(mutant_scores)
        lines.append(
            f"{'fine-tuned, right program over mutant':<40}{accuracy:>9.3f}   ({len(mutant_scores)} held-out pairs)"
        )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# pairs


def collect(args, run, device, log):
    """Pairs from rollouts of --policy on --problems. samples.jsonl keeps what was done: a killed collection goes on."""
    done = {}
    for row in run.samples():
        done.setdefault(row["problem"], []).append(Sample(**row))
    if done:  # the last problem may lack rows: it is done again
        done.popitem()
        write_jsonl(run.dir / "samples.jsonl", [s for group in done.values() for s in group])
    problems = load_problems(args.problems, args.limit, args.min_tests, log=log)
    tested = [p for p in problems if p.tests]
    if not tested:
        raise UserError(f"--problems {args.problems}: none has tests, so no program can be verified")
    model, tokenizer = load_model(args.policy, head="lm", device=device), Tokenizer(args.policy)
    with Sandbox(level=args.sandbox) as sandbox:
        bar = tqdm(total=len(tested), initial=len(done), desc="collecting", unit="problem", disable=None)
        for chunk in collect_samples(tested, model, tokenizer, sandbox, args, done):
            run.append(map(dataclasses.asdict, chunk))
            for sample in chunk:
                done.setdefault(sample.problem, []).append(sample)
            bar.update(len({s.problem for s in chunk}))
        bar.close()
    pairs, funnel = make_pairs(
        [s for group in done.values() for s in group], args.max_pairs, args.min_tests, args.seed, args.mutants
    )
    print_funnel(funnel)
    write_jsonl(run.dir / "pairs.jsonl", pairs)
    write_atomic(
        run.dir / "funnel.json", json.dumps([dict(zip(("what", "count", "rule"), row, strict=True)) for row in funnel])
    )
    return pairs


def get_pairs(args, run, device, log):
    """(train, held-out) pairs: of --pairs, of an earlier start of this run, or collected now."""
    if args.pairs:
        pairs = load_pairs(args.pairs, args.limit)
    elif (run.dir / "pairs.jsonl").exists():
        pairs = load_pairs(str(run.dir / "pairs.jsonl"))
    else:
        pairs = collect(args, run, device, log)
    train, held_out = split_pairs(pairs, args.held_out, args.seed, args.split)
    if len(train) < args.batch or not held_out:
        raise UserError(
            f"{len(train)} training and {len(held_out)} held-out pairs are too few for --batch {args.batch}: "
            "give more problems (--problems, --limit), more samples (--group) or a smaller --batch"
        )
    log(f"{len(pairs)} pairs: {len(train)} to train on, {len(held_out)} held out by {args.split}")
    return train, held_out


# ----------------------------------------------------------------------------------------------------------------------


def update(model, optimizer, rows, args, world, rank, device):
    """One optimizer step on these pairs, of which a rank takes its share -> loss, accuracy, margin, gradient norm."""
    mine, sums = rows[rank::world], torch.zeros(3, device=device)
    for batch in micro_batches(mine, args.token_budget):
        chosen_P, rejected_P = score_pairs(model, [mine[i] for i in batch], device)
        loss = pairwise_loss(chosen_P, rejected_P, center=args.center, count=len(rows))
        (loss * world).backward()  # gradients are averaged over ranks, the loss is a sum over them
        margin_P = (chosen_P - rejected_P).detach()
        sums += torch.stack([loss.detach(), (margin_P > 0).sum() / len(rows), margin_P.sum() / len(rows)])
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [*total(sums).tolist(), float(grad_norm)]


def main():
    args = parse_args(Args)
    rank, world, device = setup(args.device)
    log = print if rank == 0 else lambda *_: None
    run = Run(args, COLUMNS, rank)
    state = run.load()
    model = load_model(run.checkpoint if state else args.init, head="score", device=device)
    tokenizer = Tokenizer(args.init)
    log(f"{args.init}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, head: {model.head_source}")
    train, held_out = get_pairs(args, run, device, log)
    if args.collect_only:
        return
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95),
    )  # fmt: skip
    rows, test_rows = (encode_pairs(tokenizer, p, args.max_length, log) for p in (train, held_out))
    steps = args.steps or args.epochs * (len(rows) // args.batch)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["before"]
        log(f"continuing {run.dir} at step {step}")
    else:
        step, before = 0, evaluate(model, test_rows, args.token_budget, device)

    started, first = time.time(), step
    while step < steps:
        batch = [rows[i] for i in batch_of(step, len(rows), args.batch, args.seed)]
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, steps, args.lr)
        tick = time.time()
        loss, accuracy, margin, grad_norm = update(model, optimizer, batch, args, world, rank, device)
        step, tokens, seconds = step + 1, sum(len(c) + len(r) for c, r in batch), time.time() - tick
        eta = (time.time() - started) / (step - first) * (steps - step)
        log(
            f"step {step}/{steps} | loss {loss:.3f} | acc {accuracy:.2f} | margin {margin:.2f} | "
            f"gnorm {grad_norm:.2f} | {tokens / seconds / 1000:.1f}k tok/s | eta {format_eta(eta)}"
        )
        run.log(step=step, loss=loss, accuracy=accuracy, margin=margin, grad_norm=grad_norm, lr=lr, tokens=tokens,
                seconds=seconds)  # fmt: skip
        if step % args.save_every == 0 or step == steps:
            run.save(model, tokenizer, optimizer=optimizer.state_dict(), step=step, before=before)

    after = evaluate(model, test_rows, args.token_budget, device)
    log("\n" + "\n".join(final_table(held_out, before, after, args.init, args.split)))
    log(f"\nreward model: {run.checkpoint}")


if __name__ == "__main__":
    run_cli(main)
