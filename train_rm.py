"""Train the reward model: pairwise (Bradley-Terry) loss on preference pairs from verified problems.

    torchrun train_rm.py                                # the toy run: collect pairs, then train
    torchrun train_rm.py --policy out/a out/b           # sample programs from several policies
    torchrun train_rm.py --candidates mutants --problems mbpp:FILE.jsonl     # no policy at all
    torchrun train_rm.py --pairs codescalerpair:FILE.jsonl                   # pairs that exist

`python train_rm.py` does the same on one process; the README has the commands for one GPU and for
eight. The toy run takes about 3 minutes on 2 CPU cores. It prints the funnel from problems to
pairs, a line a step, and a table: held-out accuracy before and after, beside "longer wins" and
"shorter wins", and whether the score follows execution. The run folder (--out) holds args.json,
metrics.csv, samples.jsonl, pairs.jsonl, result.json and checkpoint/. The same command goes on after
a kill. Shapes: P pairs, B programs of one prompt.
"""

import gc
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import codescaler as cs
import hub
import metrics
import runs
from common import UserError, check_choice, check_least, parse_args, run_cli, write_jsonl
from pairs import (
    NOT_GRADED,
    Rollout,
    collect,
    decontaminate,
    load_pairs,
    make_pairs,
    print_funnel,
    problem_of,
    split_pairs,
    verify_together,
)
from problems import input_files, load_problems
from sandbox import Sandbox

# Both trainers' files begin alike; this one leaves reward, pass_rate and valid_rate empty.
COLUMNS = """step loss reward pass_rate valid_rate accuracy margin grad_norm lr tokens
seconds""".split()
CENTER_AT = 3.0  # mean score that --center pulls to: far below 0 softplus is flat
TOGETHER = 4  # pairs of a problem that follow each other in the order: they share their prompt


@dataclass
class Args:
    # what is trained, on what
    init: str = "tiny/reward"  # start from a reward model, or from a policy (then a head of zeros)
    pairs: str | None = None  # pair file to train on; without it pairs are collected
    problems: str = "toy:train"  # problems to collect on (SPEC[,SPEC...])
    policy: list = field(default_factory=lambda: ["tiny/policy"])  # models to sample programs from
    out: str = "out/rm"  # run folder
    epochs: float = 3.0  # passes over the pairs
    steps: int | None = None  # optimizer steps, in place of --epochs; sets the cosine of --lr too
    batch: int = 32  # pairs a step
    lr: float = 5e-4  # peak learning rate; warmup over 5% of the steps, then a cosine to a tenth
    # pairs
    candidates: str = "policy"  # programs: of the policy, mutants (of solutions), or a file
    group: int = 8  # samples a problem
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 160  # longest sampled answer
    prompt_style: str = "plain"  # the policy's prompt: plain, or lcb (LiveCodeBench's)
    enable_thinking: bool = True  # False: answers begin behind an empty think block
    min_tests: int = 3  # fewest tests that make a program verified
    max_pairs: int = 8  # most pairs of two candidates a problem
    mutants: int = 2  # mutants of each passing program, and most mutant pairs a problem; 0: none
    decontaminate: list = field(default_factory=list)  # SPECs; problems that resemble them go
    verify: bool = False  # leave out problems whose own solution fails its tests
    collect_only: bool = False  # stop when the pairs are written
    sandbox: str | None = None  # isolation level: strict or basic; default: strict on Linux
    # training
    held_out: float = 0.15  # share of the problems whose pairs are kept for evaluation
    center: float = 0.01  # weight of (chosen + rejected - 6)^2, which fixes the mean score
    max_length: int = 4096  # longest scored text in tokens; programs are cut, prompts never
    token_budget: int = 2048  # tokens of a training pass; a GPU wants 16384 (an estimate)
    checkpointing: bool = False  # less memory, a third more time: recompute activations
    # housekeeping
    limit: int | None = None  # at most so many rows of each data set
    save_every: int = 1  # steps between checkpoints
    seed: int = 0  # of sampling, split and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the run in --out; --no-resume starts over


# --------------------------------------------------------------------------------------------------
# loss and batches


def pairwise_loss(chosen_P, rejected_P, margin_P=0.0, center=0.0, count=None, center_at=0.0):
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), the sum over P pairs divided by
    `count` (default P).

    center * (chosen + rejected - 2 center_at)^2 pulls the mean score of a pair to `center_at`, the
    only thing that the first term leaves free (TRL's center_rewards_coefficient has center_at 0).
    At equal scores the loss without margin and center is ln 2:

    >>> round(pairwise_loss(torch.zeros(3), torch.zeros(3)).item(), 4)
    0.6931
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    losses_P = losses_P + center * (chosen_P + rejected_P - 2 * center_at) ** 2
    return losses_P.sum() / (count or len(losses_P))


class EncodedPair(NamedTuple):
    """A pair as the model reads it: ids of the prompt, and of each program behind it."""

    prompt: tuple
    chosen: tuple
    rejected: tuple
    problem: str


def encode_pairs(tokenizer, pairs, max_length, log):
    """[Pair] -> {Pair: EncodedPair}. What cannot be learned is left out, and the number is
    logged: prompts without room for a program, sides that read the same once cut."""
    encoded, notes = {}, Counter()
    for pair in pairs:
        read = partial(cs.reward_input_ids, tokenizer, pair.prompt, max_length=max_length)
        try:
            prompt, chosen, cut_chosen = read(pair.chosen)
            _, rejected, cut_rejected = read(pair.rejected)
        except UserError:
            notes[f"pairs left out: prompt over --max-length {max_length}"] += 1
            continue
        if chosen == rejected:
            notes["pairs left out: both sides read the same"] += 1
            continue
        if cut_chosen or cut_rejected:
            notes[f"programs cut to fit --max-length {max_length}"] += cut_chosen + cut_rejected
        ids = map(tuple, (prompt, chosen, rejected))
        encoded[pair] = EncodedPair(*ids, problem_of(pair))
    for what, count in notes.items():
        log(f"{count} {what}")
    return encoded


def score_pairs(model, prompt, pairs, past):
    """P pairs of one prompt -> scores [P] of the chosen and of the rejected programs. The prompt is
    computed once, and so is a program that stands in several pairs."""
    programs = list(dict.fromkeys(side for p in pairs for side in (p.chosen, p.rejected)))
    place = {program: i for i, program in enumerate(programs)}
    score_B = model.score(*cs.continue_prompt(model, prompt, programs, past))
    return score_B[[place[p.chosen] for p in pairs]], score_B[[place[p.rejected] for p in pairs]]


def update(model, optimizer, pairs, args, rank=0, world=1):
    """One optimizer step on these pairs, of which a rank takes its share -> loss without centring
    (ln 2 where scores are equal), accuracy, margin, gradient norm, and whether the step was skipped
    because a gradient is not finite; the norm is that of all ranks, so they agree."""
    sums, by_prompt = 0.0, {}
    for pair in pairs[rank * len(pairs) // world : (rank + 1) * len(pairs) // world]:
        by_prompt.setdefault(pair.prompt, []).append(pair)

    def size(pair):  # padded tokens of a pair in a pass, at most: others may share its programs
        return 2 * max(len(pair.chosen), len(pair.rejected))

    passes = cs.training_passes(model, by_prompt.items(), size, args.token_budget)
    for prompt, past, batch in passes:
        # A rank without a batch of its own takes part with weight 0.
        rows = batch or [EncodedPair((), (0,), (0,), "")]
        chosen_P, rejected_P = score_pairs(model, prompt, rows, past)
        loss = pairwise_loss(
            chosen_P, rejected_P, center=args.center, count=len(pairs), center_at=CENTER_AT
        )
        loss = loss * bool(batch)
        (loss * world).backward()  # sharded gradients are means over ranks, the loss is a sum
        gap_P = (chosen_P - rejected_P).detach()
        values = [-F.logsigmoid(gap_P).sum(), (gap_P > 0).sum(), gap_P.sum()]
        sums = sums + torch.stack(values) * bool(batch) / len(pairs)
    grad_norm = runs.clip_gradients(model, 1.0)
    skipped = not math.isfinite(grad_norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [*runs.total(sums).tolist(), grad_norm, skipped]


def count_tokens(pairs):
    """Tokens of a step: a prompt, or a program of it, counts once however many pairs share it."""
    programs = {(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)}
    return sum(map(len, {pair.prompt for pair in pairs})) + sum(len(side) for _, side in programs)


def learning_rate(step, total_steps, peak):
    """Linear warmup over the first 5% of the steps, then a cosine to a tenth of the peak. `step`
    counts from 0."""
    warmup = max(1, round(0.05 * total_steps))
    progress = min(1.0, max(0.0, (step + 1 - warmup) / max(1, total_steps - warmup)))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def batch_of(step, problems, batch, seed):
    """Numbers of the pairs of a step, a function of step and seed alone; problems[i] is the problem
    of pair i.

    A pair comes at most once an epoch, in an order of the epoch's own, in which a few pairs of a
    problem follow each other; what does not fill a last batch is left out of it.
    """
    epoch, at = divmod(step, max(1, len(problems) // batch))
    rng, by_problem, pieces = random.Random(f"order-{seed}-{epoch}"), {}, []
    for i, problem in enumerate(problems):
        by_problem.setdefault(problem, []).append(i)
    for numbers in by_problem.values():
        rng.shuffle(numbers)
        pieces += [numbers[i : i + TOGETHER] for i in range(0, len(numbers), TOGETHER)]
    rng.shuffle(pieces)
    return [i for piece in pieces for i in piece][at * batch : (at + 1) * batch]


# --------------------------------------------------------------------------------------------------
# pairs: of a file, or collected


def get_pairs(args, run, device, log, rank, world):
    """The pairs of --pairs, of an earlier start of this run, or collected now."""
    if args.pairs:
        return load_pairs(args.pairs, args.limit, log)
    if any(runs.gather_lists([(run.dir / "pairs.jsonl").exists()])):  # all ranks agree
        return load_pairs(f"own:{run.dir / 'pairs.jsonl'}")
    return collect_pairs(args, run, device, log, rank, world)


def collect_pairs(args, run, device, log, rank, world):
    """Programs for --problems, executed -> pairs. samples.jsonl keeps what was done, so that a
    killed collection goes on."""
    rows = runs.gather_lists(run.samples() if rank == 0 else [])
    samples = [Rollout.from_row(row) for row in rows]
    if samples:  # the last problem may lack rows: it is done again
        torn = samples[-1].policy, samples[-1].problem.id
        samples = [r for r in samples if (r.policy, r.problem.id) != torn]
        if rank == 0:
            write_jsonl(run.dir / "samples.jsonl", [r.row() for r in samples])
    done = {(r.policy, r.problem.id) for r in samples}
    problems = load_problems(args.problems, args.limit, log=log)
    tested = [p for p in problems if p.tests and len(p.tests.cases) >= args.min_tests]
    funnel = []
    if args.decontaminate:
        specs = ",".join(args.decontaminate)
        evaluation = load_problems(specs, log=log, flag="--decontaminate")
        tested, funnel = decontaminate(tested, evaluation)
    with Sandbox(level=args.sandbox) as sandbox:
        if args.verify:
            tested = verify_together(tested, sandbox, rank, world, log)
        if not tested:
            rule = f"that verify a program (--min-tests {args.min_tests})"
            raise UserError(f"--problems {args.problems}: none has tests {rule}")
        size = len(tested) * (len(args.policy) if args.candidates == "policy" else 1)
        bar = tqdm(total=size, initial=len(done), desc="collecting", unit="problem", disable=None)
        for chunk in collect(tested, args, sandbox, done, device, rank, world):
            run.append([r.row() for r in chunk])
            samples += chunk
            bar.update(len({r.problem.id for r in chunk}))
        bar.close()
    pairs, rows = make_pairs(samples, args, args.seed)
    if rank == 0:
        print_funnel(funnel + rows)
        write_jsonl(run.dir / "pairs.jsonl", pairs)
    return pairs


# --------------------------------------------------------------------------------------------------
# evaluation: does the score rank held-out programs right?


def held_out_programs(run, held_out):
    """[(problem, prompt, code, passed)] of the held-out problems: all their sampled programs where
    this run sampled them, else those of the pairs."""
    problems = {problem_of(pair) for pair in held_out}
    found = {}
    for row in run.samples():
        graded = row["verdict"] not in NOT_GRADED and row["code"] is not None
        if row["problem"] in problems and graded and not row["parent"]:
            found[row["problem"], row["prompt"], row["code"]] = row["verdict"] == "pass"
    for pair in held_out if not found else []:
        found[problem_of(pair), pair.prompt, pair.chosen] = True
        found[problem_of(pair), pair.prompt, pair.rejected] = False
    return [(*program, passed) for program, passed in found.items()]


def raw_scores(path, items, args, device, rank, world):
    """{(prompt, code): score} by the model in a folder, of which each rank scores its share."""
    items = list(dict.fromkeys(items))
    if "score.weight" not in hub.stored_tensors(hub.model_folder(path)):
        return dict.fromkeys(items, 0.0)  # a policy: training began with a head of zeros
    model = cs.RewardModel(path, device)
    model.max_length = args.max_length  # both models read what was trained on
    mine = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    return dict(runs.gather_lists([*zip(mine, model.score_many(mine))]))


def report(args, run, held_out, skipped, device, rank, world, log):
    """Scores the held-out pairs and programs with the model as it was and as it was saved, prints
    the table and leaves it in result.json."""
    programs = runs.gather_lists(held_out_programs(run, held_out) if rank == 0 else [])
    items = [(p.prompt, code) for p in held_out for code in (p.chosen, p.rejected)]
    items += [(prompt, code) for _, prompt, code, _ in programs]
    sides, aucs = [], {}
    for name, path in (("initialisation", args.init), ("fine-tuned", run.checkpoint)):
        score = raw_scores(path, items, args, device, rank, world)
        sides.append([(score[p.prompt, p.chosen], score[p.prompt, p.rejected]) for p in held_out])
        groups = {}
        for problem, prompt, code, passed in programs:
            groups.setdefault(problem, []).append((score[prompt, code], passed))
        values = metrics.known_aucs(zip(*group) for group in groups.values())
        if values and any(score.values()):  # a head of zeros has an AUC of a half
            row = metrics.estimate(values, name="mean") | {"count": len(values)}
            aucs[f"AUC within a problem, {name}"] = row
    result = metrics.accuracies(held_out, *sides) | aucs
    problems = len({problem_of(pair) for pair in held_out})
    log(f"\n{len(held_out)} held-out pairs of {problems} problems; {args.init} is where it began")
    rows = [
        {"pair accuracy, 95% interval over problems": name} | row for name, row in result.items()
    ]
    log("\n".join(metrics.table(rows)))
    result |= {"pairs": len(held_out), "programs": len(programs), "skipped": skipped}
    run.write_result(result)
    log(f"reward model: {run.checkpoint}")


# --------------------------------------------------------------------------------------------------


def arguments():
    args = parse_args(Args)
    check_least(args, 1, "group batch save_every token_budget max_length max_new_tokens min_tests")
    check_least(args, 1, "max_pairs steps limit")
    check_least(args, 0, "lr center mutants temperature seed")
    check_least(args, 0.001, "epochs")
    check_least(args, 0.001, "held_out", most=0.99)
    check_choice(args, prompt_style=("plain", "lcb"))
    for name in ("collect_only", "decontaminate", "verify") if args.pairs else ():
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: --pairs {args.pairs} is collected already")
    return args


def main():
    args = arguments()
    rank, world, device = runs.setup(args.device)
    log = print if rank == 0 else lambda *_: None
    tokenizer = cs.Tokenizer(args.init)
    cs.check_model(args.init, "score")
    data = ("--pairs", args.pairs) if args.pairs else ("--problems", args.problems)
    inputs = hub.input_files("--init", args.init) + input_files(*data)
    if not args.pairs:
        inputs += input_files("--candidates", args.candidates)
        for policy in args.policy if args.candidates == "policy" else []:
            inputs += hub.input_files("--policy", policy)
        for spec in args.decontaminate:
            inputs += input_files("--decontaminate", spec)
    run = runs.Run(args, COLUMNS, inputs, rank)
    # 1. Pairs, as texts and as the model reads them; some problems' are held out.
    pairs = get_pairs(args, run, device, log, rank, world)
    if args.collect_only:
        log(f"{len(pairs)} pairs: {run.dir / 'pairs.jsonl'}")
        return
    encoded = encode_pairs(tokenizer, pairs, args.max_length, log)
    pairs = [pair for pair in pairs if pair in encoded]
    train, held_out = split_pairs(pairs, args.held_out, args.seed)
    log(f"{len(pairs)} pairs: {len(train)} to train on, {len(held_out)} of held-out problems")
    if len(train) < args.batch or not held_out:
        raise UserError(
            f"{len(train)} training and {len(held_out)} held-out pairs are too few for --batch "
            f"{args.batch}: give more --pairs, --problems or --group, in another --out"
        )
    train = [encoded[pair] for pair in train]
    problems = [pair.problem for pair in train]
    steps = args.steps or max(1, int(args.epochs * (len(train) // args.batch)))

    state = run.load() or {"step": 0, "skipped": 0}
    path = run.checkpoint if run.checkpoint.exists() else args.init
    model = cs.load_model(path, "score", None, device, sharded=True)
    model.checkpointing = args.checkpointing
    optimizer = runs.adamw(model, device, args.lr, weight_decay=0.01, betas=(0.9, 0.95))
    run.load_optimizer(model, optimizer)
    write_model = partial(cs.save_model, model, tokenizer, max_length=args.max_length)
    save = partial(run.save, write_model, model, optimizer, state)
    for step in runs.steps(state, steps, args.save_every, save):
        started, lr = time.time(), learning_rate(step - 1, steps, args.lr)
        runs.set_learning_rate(optimizer, lr)
        # 2. A batch of pairs -> the pairwise loss -> a step.
        batch = [train[i] for i in batch_of(step - 1, problems, args.batch, args.seed)]
        found = update(model, optimizer, batch, args, rank, world)
        # 3. Log; the loop saves.
        row = dict(zip(("loss", "accuracy", "margin", "grad_norm"), found))
        row |= {"lr": lr, "tokens": count_tokens(batch), "seconds": time.time() - started}
        log(metrics.step_line(step, steps, row))
        run.log(step=step, **row)
        state["skipped"] += found[-1]
    # 4. Does it rank right? What was saved is read back.
    del model, optimizer, write_model, save
    gc.collect()  # FSDP2's modules hold each other; report() needs the room
    report(args, run, held_out, state["skipped"], device, rank, world, log)
    runs.leave()


if __name__ == "__main__":
    run_cli(main)
