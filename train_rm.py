"""Train the reward model: pairwise (Bradley-Terry) loss on preference pairs from verified code problems.

    torchrun train_rm.py                                          # the toy run: collect pairs, fine-tune tiny/reward
    torchrun train_rm.py --collect-only                           # only collect pairs
    torchrun train_rm.py --candidates mutants --problems mbpp:FILE.jsonl     # from mutants of the solutions, no policy
    torchrun train_rm.py --pairs codescalerpair:FILE.jsonl        # train on pairs that exist
    torchrun train_rm.py --init tiny/policy                       # from a policy: a reward head of zeros

One GPU, and one node of eight (written for them, not run on any; rates and batch sizes after published recipes):

    torchrun train_rm.py --init Skywork/Skywork-Reward-V2-Qwen3-1.7B --pairs codescalerpair:FILE.jsonl \\
        --epochs 1 --lr 4e-6 --batch 128 --token-budget 32768 --save-every 50
    torchrun --nproc-per-node 8 train_rm.py --init Skywork/Skywork-Reward-V2-Qwen3-8B \\
        --pairs codescalerpair:FILE.jsonl --epochs 1 --lr 2e-6 --batch 256 --token-budget 32768 --checkpointing \\
        --save-every 50

`python train_rm.py` does the same on one process. The toy run takes about 3 minutes on 2 CPU cores. It prints the
funnel from problems to pairs, one line a step, and a table: held-out accuracy before and after, beside "longer wins"
and "shorter wins", and how well the score follows execution. It leaves a run folder (--out): args.json, metrics.csv,
samples.jsonl, pairs.jsonl, funnel.json, result.json and checkpoint/ with calibration.json (score -> P(pass)). The same
command goes on after a kill, and only prints the table once it is finished.
"""

import dataclasses
import json
import math
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from codescaler import (
    Interrupt,
    RewardModel,
    Run,
    Tokenizer,
    adamw,
    agree,
    check_model,
    clip_gradients,
    compile_blocks,
    continue_prompts,
    format_eta,
    gather_lists,
    gathered,
    load_model,
    model_folder,
    phase,
    read_json,
    reward_input_ids,
    set_learning_rate,
    setup,
    total,
    weight_files,
    write_atomic,
)
from common import UserError, auc, bootstrap, check_choice, check_least, mean, parse_args, run_cli
from extract import MODES
from pairs import (
    MUTANT,
    NOT_GRADED,
    PairRules,
    Sample,
    adversarial,
    augment,
    collect_samples,
    decontaminate,
    load_pairs,
    make_pairs,
    other_programs,
    print_funnel,
    problem_of,
    rewrites,
    split_pairs,
    write_jsonl,
)
from problems import Problem, load_problems
from sandbox import Sandbox

COLUMNS = "step,loss,reward,pass_rate,valid_rate,accuracy,margin,grad_norm,lr,tokens,seconds".split(",")


@dataclass
class Args(PairRules):
    # the model
    init: str = "tiny/reward"  # what to start from: a reward model, or a policy (then a head of zeros)
    random_init: bool = False  # random weights, to measure a shape without a checkpoint (--init qwen3-8b-shape)
    out: str = "out/rm"  # run folder
    # pairs: a file, or collected; the rules above say which programs are paired
    pairs: str | None = None  # pair file to train on; without it pairs are collected
    allow_empty_prompt: bool = False  # accept --pairs rows whose statement is null
    problems: str = "toy:train"  # problems to collect on (SPEC[,SPEC...])
    candidates: str = "policy"  # programs to pair: of the policy, mutants (of the solutions), or a file of samples
    policy: list = field(default_factory=lambda: ["tiny/policy"])  # models to sample from, early and late ones of a run
    group: int = 8  # samples a problem
    temperature: float = 1.0  # sampling temperature
    max_new_tokens: int = 160  # longest sampled answer
    prompt_style: str = "plain"  # plain or lcb: the policy's prompt
    rm_prompt: str = "bare"  # what the reward model reads of a problem: bare statement, or full: the policy's prompt
    extract: str = "strict"  # extraction mode: strict, paper, last or recover
    sandbox: str = "strict"  # isolation level: strict or basic
    augment: bool = False  # add rewritten pairs and wrong programs that look right to the training pairs
    collect_only: bool = False  # stop when the pairs are written
    limit: int | None = None  # rows of any data that is loaded
    # training
    held_out: float = 0.15  # share of the problems kept for evaluation
    split: str = "problem"  # what is held out: whole problems (problem), or pairs of problems trained on (pair)
    epochs: float = 1.25  # passes over the pairs
    steps: int | None = None  # optimizer steps, in place of --epochs; raised on resume, the cosine of --lr is longer
    batch: int = 32  # pairs a step
    lr: float = 5e-4  # peak learning rate; warmup over 5% of the steps, then a cosine to a tenth
    weight_decay: float = 0.01  # AdamW, matrices only
    margin: float = 0.0  # weight of a pair's margin (the share of tests the rejected program fails) in the loss
    center: float = 0.01  # weight of (chosen + rejected - 2 * center_at)^2 in the loss
    center_at: float = 3.0  # mean score of a pair that --center pulls to: what is wrong should not go far below 0
    max_length: int = 4096  # longest scored text in tokens; programs are cut, prompts never
    token_budget: int = 2048  # tokens of one training forward pass; a GPU wants 16384 or more
    checkpointing: bool = False  # less memory, a third more time: recompute activations in the backward pass
    compile: bool = False  # torch.compile of the training passes: a minute to start, then a little faster
    optimizer_offload: bool = False  # keep AdamW's moments on the host except while they are updated
    save_every: int = 1  # steps between checkpoints
    phase_minutes: int = 360  # a step that takes longer ends the run: another rank hangs
    seed: int = 0  # seed of sampling, split and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # continue the run in --out


# ----------------------------------------------------------------------------------------------------------------------
# loss and batches


def pairwise_loss(chosen_P, rejected_P, margin_P=0.0, center=0.0, count=None, center_at=0.0):
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), summed over P pairs and divided by `count` (default P).

    center * (chosen + rejected - 2 center_at)^2 pulls the mean score of a pair to `center_at`, the only thing that the
    first term leaves free (TRL's center_rewards_coefficient has center_at 0). At equal scores the loss is ln 2:

    >>> round(pairwise_loss(torch.zeros(3), torch.zeros(3)).item(), 4)
    0.6931
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P) + center * (chosen_P + rejected_P - 2 * center_at) ** 2
    return losses_P.sum() / (count or len(losses_P))


class Row(NamedTuple):
    """A pair as the model reads it."""

    prompt: tuple  # ids that both sides begin with
    chosen: list  # the rest of the chosen side's ids
    rejected: list
    margin: float
    problem: str


def encode_pairs(tokenizer, pairs, max_length, log):
    """Pair -> Row, the reward model's inputs; tells `log` how many programs had to be cut."""
    rows, cut = [], 0
    for pair in pairs:
        (chosen, cut_c), (rejected, cut_r) = (
            reward_input_ids(tokenizer, pair.prompt, code, max_length) for code in (pair.chosen, pair.rejected)
        )
        opening = reward_input_ids(tokenizer, pair.prompt, "", max_length)[0]
        # Up to the program; a tokenizer may merge the last token of the opening with the program's first characters.
        shared = len(os.path.commonprefix([opening, chosen, rejected]))
        rows.append(
            Row(tuple(chosen[:shared]), chosen[shared:], rejected[shared:], pair.margin or 0.0, problem_of(pair))
        )
        cut += cut_c + cut_r
    if cut:
        log(f"{cut} of {2 * len(pairs)} programs cut to fit --max-length {max_length}")
    return rows


def micro_batches(rows, token_budget):
    """Cuts pairs into lists that fit one forward pass, sorted by prompt and length so that prompts are shared and
    little is padding."""
    batch, prompts, longest = [], set(), 0
    for row in sorted(rows, key=lambda row: (len(row.prompt), row.prompt, len(row.chosen))):
        prompts_then, longest_then = prompts | {row.prompt}, max(longest, len(row.chosen), len(row.rejected))
        if batch and len(row.prompt) * len(prompts_then) + 2 * (len(batch) + 1) * longest_then > token_budget:
            yield batch
            batch, prompts_then, longest_then = [], {row.prompt}, max(len(row.chosen), len(row.rejected))
        batch.append(row)
        prompts, longest = prompts_then, longest_then
    if batch:
        yield batch


def score_pairs(model, rows):
    """P rows -> scores of the chosen and of the rejected sides, all in one forward pass; a prompt is computed once for
    all the programs in it (continue_prompts)."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    answers = [row.chosen for row in rows] + [row.rejected for row in rows]
    group = [number[row.prompt] for row in rows] * 2
    _, hidden_BTD, lengths_B = continue_prompts(model, [list(prompt) for prompt in number], answers, group)
    score_B = model.score(hidden_BTD, lengths_B)
    return score_B[: len(rows)], score_B[len(rows) :]


def learning_rate(step, total_steps, peak):
    """Linear warmup over the first 5% of the steps, then a cosine to a tenth of the peak. `step` counts from 0."""
    warmup = max(1, round(0.05 * total_steps))
    progress = min(1.0, max(0.0, (step + 1 - warmup) / max(1, total_steps - warmup)))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def batch_of(step, problems, batch, seed, together=4):
    """Numbers of the pairs of a step, a function of step and seed alone; problems[i] is the problem of pair i.

    Every pair comes once an epoch, in an order of the epoch's own, in which up to `together` pairs of a problem follow
    each other: they share their prompt. What does not fill a last batch waits for the next epoch.
    """
    steps_per_epoch = max(1, len(problems) // batch)
    epoch, at = divmod(step, steps_per_epoch)
    rng, by_problem = random.Random(f"order-{seed}-{epoch}"), {}
    for i, problem in enumerate(problems):
        by_problem.setdefault(problem, []).append(i)
    runs = []
    for numbers in by_problem.values():
        rng.shuffle(numbers)
        runs += [numbers[i : i + together] for i in range(0, len(numbers), together)]
    rng.shuffle(runs)
    return [i for run in runs for i in run][at * batch : (at + 1) * batch]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model, rows, token_budget, rank=0, world=1):
    """Scores of held-out pairs: list of (chosen, rejected) floats, in the order of `rows`. Each rank scores its share,
    with a gathered model."""
    mine, number, scores = rows[rank::world], {id(row): i for i, row in enumerate(rows)}, []
    for batch in micro_batches(mine, token_budget):
        chosen_P, rejected_P = score_pairs(model, batch)
        scores += zip((number[id(row)] for row in batch), chosen_P.tolist(), rejected_P.tolist(), strict=True)
    return [(chosen, rejected) for _, chosen, rejected in sorted(gather_lists(scores))]


def ece(probabilities, passed, bins=10):
    """Expected calibration error: |share that passes - mean probability| in bins of equal width, weighted by size."""
    binned = {}
    for p, right in zip(probabilities, passed, strict=True):
        binned.setdefault(min(int(p * bins), bins - 1), []).append((p, right))
    gaps = [len(b) * abs(mean([r for _, r in b]) - mean([p for p, _ in b])) for b in binned.values()]
    return sum(gaps) / len(probabilities)


def probability(score, calibration):
    """P(pass) of a raw score."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, calibration["slope"] * score + calibration["intercept"]))))


def fit_logistic(scores, passed):
    """score -> P(pass) by maximum likelihood (Platt 1999; with his smoothed targets separable data has a fit too)."""
    center = mean(scores)
    scale = statistics.pstdev(scores) or 1.0  # Newton's method finds its way from 0 only near scores of this size
    x = torch.tensor([[(s - center) / scale, 1.0] for s in scores], dtype=torch.float64)
    positives = sum(map(bool, passed))
    high, low = (positives + 1) / (positives + 2), 1 / (len(passed) - positives + 2)
    y = torch.tensor([high if p else low for p in passed], dtype=torch.float64)
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):  # Newton's method; the small ridge matters only when all scores are equal
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-9 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        w = w - step.clamp(-5, 5)
        if step.abs().max() < 1e-10:
            break
    slope = w[0].item() / scale
    return {"slope": slope, "intercept": w[1].item() - slope * center}


def cross_fitted(scores, passed):
    """P(pass) of each program, by the fit of the half of the programs in which it is not."""
    if len(scores) < 4 or len(set(map(bool, passed))) < 2:
        raise UserError(f"calibration needs passing and failing programs, at least 4 in all; there are {len(scores)}")
    order = random.Random(0).sample(range(len(scores)), len(scores))  # a pair file alternates right and wrong programs
    predicted = [0.0] * len(scores)
    for half, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        fit = fit_logistic([scores[i] for i in other], [passed[i] for i in other])
        for i in half:
            predicted[i] = probability(scores[i], fit)
    return predicted


def fit_calibration(scores, passed):
    """Scores of programs and whether they pass -> {"slope", "intercept", "n", "ece", "auc"}, ece by cross_fitted."""
    error = ece(cross_fitted(scores, passed), passed)
    return {**fit_logistic(scores, passed), "n": len(scores), "ece": error, "auc": auc(scores, passed)}


def load_calibration(path):
    """calibration.json beside a reward model's weights."""
    file = model_folder(path) / "calibration.json"
    if not file.is_file():
        raise UserError(
            f"no calibration.json in {file.parent}: `python bench.py rm --rm {path} --pairs SPEC --calibrate` makes it"
        )
    return json.loads(file.read_text())


def accuracies(pairs, before, after):
    """{name: (values, groups)} of the rows of the final table: 1 where the chosen program wins, a tie counts as wrong.
    Pairs with a mutant are a row of their own, where there are others: both sides of them have the same length and the
    same author."""
    mutant = [p.source.endswith(MUTANT) for p in pairs]
    mutant = [False] * len(pairs) if all(mutant) else mutant
    columns = {
        "initialisation": [float(c > r) for c, r in before],
        "fine-tuned": [float(c > r) for c, r in after],
        "longer program wins": [float(len(p.chosen) > len(p.rejected)) for p in pairs],
        "shorter program wins": [float(len(p.chosen) < len(p.rejected)) for p in pairs],
    }
    columns["gain of fine-tuning"] = [b - a for a, b in zip(columns["initialisation"], columns["fine-tuned"])]
    longer, shorter = (
        mean([v for v, m in zip(columns[f"{k} program wins"], mutant) if not m]) for k in ("longer", "shorter")
    )
    misled = columns["longer program wins" if longer > shorter else "shorter program wins"]
    rows = {name: (values, [not m for m in mutant]) for name, values in columns.items()}
    rows["fine-tuned, length misleads"] = (columns["fine-tuned"], [not m and not v for m, v in zip(mutant, misled)])
    rows["fine-tuned, right over mutant"] = (columns["fine-tuned"], mutant)
    chosen = {}
    for name, (values, keep) in rows.items():
        picked = [(v, problem_of(p)) for v, p, k in zip(values, pairs, keep, strict=True) if k]
        if picked:
            chosen[name] = tuple(zip(*picked))
    return chosen


def pair_report(pairs, before, after, init, split):
    """Held-out pair accuracies -> (lines of text, what result.json keeps)."""
    rows = accuracies(pairs, before, after)
    ties = [sum(c == r for c, r in scores) for scores in (before, after)]
    values, groups = rows["fine-tuned"]
    lines = [
        f"held-out pairs: {len(values)} of {len(set(groups))} problems (--split {split}); ties {ties[0]} -> {ties[1]}",
        f"{'':<40}{'accuracy':>9}   95% interval over problems",
    ]
    result = {"pairs": len(values), "problems": len(set(groups)), "split": split, "ties": ties, "rows": {}}
    for name, (values, groups) in rows.items():
        share, low, high = bootstrap(values, groups)
        shown = f"{name} ({init})" if name == "initialisation" else name
        lines.append(f"{shown:<40}{share:>9.3f}   [{low:.3f}, {high:.3f}]   {len(values)} pairs")
        result["rows"][name] = {"mean": share, "low": low, "high": high, "pairs": len(values)}
    return lines, result


def held_out_programs(run, train, held_out):
    """[(problem, prompt, code, passed)] of the held-out problems: all their sampled programs where this run sampled
    them, else those of the pairs; with --split pair, those that no training pair has. They show whether the score
    follows execution, not only within chosen pairs."""
    seen = {(problem_of(p), code) for p in train for code in (p.chosen, p.rejected)}
    problems = {problem_of(p) for p in held_out}
    samples = [Sample(**row) for row in run.samples() if row["problem"] in problems]
    found = {
        (s.problem, s.prompt, s.code): s.verdict == "pass"
        for s in samples
        if not s.parent and s.verdict not in NOT_GRADED
    }
    if not found:
        for p in held_out:
            found |= {(problem_of(p), p.prompt, p.chosen): True, (problem_of(p), p.prompt, p.rejected): False}
    return [(problem, *key, passed) for (problem, *key), passed in found.items() if (problem, key[1]) not in seen]


def execution_report(programs, path, init, device):
    """Scores of programs against their verdicts -> (lines, result, calibration): AUC within a problem before and after,
    and the fitted score -> P(pass). `init` may be a policy without a head, or None."""
    passed = [p for *_, p in programs]
    if len(set(passed)) < 2 or len(passed) < 4:
        return ["too few held-out programs that pass and that fail: no AUC, no calibration"], {}, None
    lines, result = [f"held-out programs: {len(programs)}, of which {sum(passed)} pass"], {"programs": len(programs)}
    for name, model in (("initialisation", init), ("fine-tuned", path)):
        if model is None or "score.weight" not in weight_files(model_folder(model)):
            continue
        scores = RewardModel(model, device=device).score_many([(prompt, code) for _, prompt, code, _ in programs])
        groups = {}
        for (problem, *_), score, right in zip(programs, scores, passed, strict=True):
            groups.setdefault(problem, []).append((score, right))
        aucs = {problem: auc(*zip(*group)) for problem, group in groups.items()}
        aucs = {problem: value for problem, value in aucs.items() if not math.isnan(value)}
        if not aucs:
            continue
        share, low, high = bootstrap(list(aucs.values()), list(aucs))
        lines.append(
            f"{name + ', AUC within a problem':<40}{share:>9.3f}   [{low:.3f}, {high:.3f}]   {len(aucs)} problems"
        )
        result[f"auc, {name}"] = {"mean": share, "low": low, "high": high, "problems": len(aucs)}
    calibration = fit_calibration(scores, passed)
    lines.append(
        f"P(pass) = sigmoid({calibration['slope']:.3f} * score {calibration['intercept']:+.3f}); "
        f"calibration error {calibration['ece']:.3f}, AUC over all programs {calibration['auc']:.3f}"
    )
    return lines, result | {"auc": calibration["auc"], "ece": calibration["ece"]}, calibration


def flip_report(held_out, path, device, seed):
    """How easily the reward model is misled -> (lines, result), on a pair a held-out problem that it ranks right: how
    often another way to write a side turns the order, and how often a wrong program made to look right wins."""
    pairs = list({problem_of(p): p for p in reversed(held_out) if not p.source.endswith(MUTANT)}.values())
    attacks = []  # (pair, kind, chosen, rejected)
    for i, (pair, other) in enumerate(zip(pairs, other_programs(pairs, seed), strict=True)):
        attacks += [(i, "rewrite: " + kind, code, pair.rejected) for kind, code in rewrites(pair.chosen, seed).items()]
        attacks += [(i, "rewrite: " + kind, pair.chosen, code) for kind, code in rewrites(pair.rejected, seed).items()]
        attacks += [(i, "adversarial: " + kind, *both) for kind, both in adversarial(pair, other, seed).items()]
    model = RewardModel(path, device=device)
    codes = [(p.prompt, c) for p in pairs for c in (p.chosen, p.rejected)]
    codes += [(pairs[i].prompt, c) for i, _, *both in attacks for c in both]
    scores = iter(model.score_many(codes))
    right = [next(scores) > next(scores) for _ in pairs]
    flipped = {}
    for i, kind, *_ in attacks:
        turned = next(scores) <= next(scores)
        if right[i]:
            for name in (kind, kind.partition(":")[0]):
                flipped.setdefault(name, []).append((float(turned), problem_of(pairs[i])))
    lines, result = [], {}
    for name in sorted(flipped):
        share, low, high = bootstrap(*zip(*flipped[name], strict=True))
        lines.append(f"{'flip rate, ' + name:<40}{share:>9.3f}   [{low:.3f}, {high:.3f}]   {len(flipped[name])} tried")
        result[f"flip, {name}"] = {"mean": share, "low": low, "high": high, "tried": len(flipped[name])}
    return lines, result


# ----------------------------------------------------------------------------------------------------------------------
# pairs


def collect(args, run, device, log, rank, world):
    """Pairs from candidates on --problems. samples.jsonl keeps what was done: a killed collection goes on."""
    done = {}
    for row in gather_lists(run.samples() if rank == 0 else []):  # rank 0 changes the file: it alone reads it
        done.setdefault((row["policy"], row["problem"]), []).append(Sample(**row))
    if done:  # the last problem may lack rows: it is done again
        done.popitem()
        if rank == 0:
            write_jsonl(run.dir / "samples.jsonl", [s for group in done.values() for s in group])
    problems = load_problems(args.problems, args.limit, args.min_tests, log=log)
    tested, funnel = [p for p in problems if p.tests], []
    if args.decontaminate:
        evaluation = load_problems(",".join(args.decontaminate), log=log, flag="--decontaminate")
        tested, funnel = decontaminate(tested, evaluation)
    if not tested:
        raise UserError(f"--problems {args.problems}: none has tests, so no program can be verified")
    with Sandbox(level=args.sandbox) as sandbox:
        total_ = len(tested) * (len(args.policy) if args.candidates == "policy" else 1)
        bar = tqdm(total=total_, initial=len(done), desc="collecting", unit="problem", disable=None)
        for chunk in collect_samples(tested, args, sandbox, set(done), device, rank, world):
            run.append(map(dataclasses.asdict, chunk))
            for sample in chunk:
                done.setdefault((sample.policy, sample.problem), []).append(sample)
            bar.update(len({s.problem for s in chunk}))
        bar.close()
    pairs, rows = make_pairs([s for group in done.values() for s in group], args, args.seed)
    if rank == 0:
        print_funnel(funnel + rows)
        write_jsonl(run.dir / "pairs.jsonl", pairs)
        table = [dict(zip(("what", "count", "rule"), row, strict=True)) for row in funnel + rows]
        write_atomic(run.dir / "funnel.json", json.dumps(table, indent=1))
    return pairs


def given_pairs(args, log):
    """The pairs of --pairs that can be learned and resemble no problem of --decontaminate."""
    rules = {f.name for f in dataclasses.fields(PairRules)} - {"decontaminate"}
    rules |= {"problems", "candidates", "policy", "group", "temperature", "max_new_tokens"}
    idle = [f"--{name.replace('_', '-')}" for name in sorted(rules) if getattr(args, name) != getattr(Args(), name)]
    if idle:
        log(f"{', '.join(idle)}: for collecting pairs, without effect on those of --pairs")
    found = load_pairs(args.pairs, args.limit, args.allow_empty_prompt)
    beside = Path(args.pairs).with_name("args.json")  # of the run that collected them
    read = read_json(beside)["args"].get("rm_prompt", args.rm_prompt) if beside.is_file() else args.rm_prompt
    if read != args.rm_prompt:
        raise UserError(f"--pairs {args.pairs} was collected with --rm-prompt {read}, now it is {args.rm_prompt}")
    if args.margin and not any(p.margin for p in found):
        raise UserError(f"--margin {args.margin}: no pair of --pairs {args.pairs} has a margin")
    pairs = [p for p in found if p.chosen != p.rejected]
    if len(pairs) < len(found):
        log(f"{len(found) - len(pairs)} of {len(found)} pairs left out: chosen and rejected are the same")
    if args.decontaminate:
        asked = [Problem(name, prompt) for name, prompt in {problem_of(p): p.prompt for p in pairs}.items()]
        evaluation = load_problems(",".join(args.decontaminate), log=log, flag="--decontaminate")
        kept, funnel = decontaminate(asked, evaluation)
        print_funnel(funnel, log)
        pairs = [p for p in pairs if problem_of(p) in {problem.id for problem in kept}]
    return pairs


def get_pairs(args, run, device, log, rank, world):
    """(train, held-out) pairs: of --pairs, of an earlier start of this run, or collected now."""
    if args.pairs:
        pairs = given_pairs(args, log)
    elif agree((run.dir / "pairs.jsonl").exists()):  # a rank that is late would find the pairs of this very start
        pairs = load_pairs(str(run.dir / "pairs.jsonl"))
    else:
        pairs = collect(args, run, device, log, rank, world)
    train, held_out = split_pairs(pairs, args.held_out, args.seed, args.split)
    if args.collect_only:
        log(f"{len(pairs)} pairs: {run.dir / 'pairs.jsonl'}")
        return train, held_out
    if len(train) < args.batch or not held_out:
        raise UserError(
            f"{len(train)} training and {len(held_out)} held-out pairs are too few for --batch {args.batch}: "
            "give more pairs (--pairs), problems (--problems, --limit) or samples (--group), or a smaller --batch, in "
            f"another --out; pairs that were collected can be used again: --pairs {args.out}/pairs.jsonl"
        )
    log(f"{len(pairs)} pairs: {len(train)} to train on, {len(held_out)} held out by {args.split}")
    if args.augment:
        train = train + augment(train, args.seed)
        log(f"--augment: {len(train)} pairs to train on")
    return train, held_out


# ----------------------------------------------------------------------------------------------------------------------


def update(model, optimizer, rows, args, world, rank):
    """One optimizer step on these pairs, of which a rank takes its share -> Bradley-Terry loss (ln 2 where scores are
    equal; without the centring), accuracy, margin, gradient norm, whether the step was skipped. With sharded weights
    every rank makes the same number of passes, the last ones with weight 0. A gradient that is not finite is skipped;
    its norm is that of all ranks, so they agree."""
    batches, sums = list(micro_batches(rows[rank::world], args.token_budget)), 0.0
    for i in range(max(gather_lists([len(batches)]))):
        batch, weight = (batches[i], 1.0) if i < len(batches) else ([Row((0,), [0], [0], 0.0, "")], 0.0)
        chosen_P, rejected_P = score_pairs(model, batch)
        margin_P = args.margin * torch.tensor([row.margin for row in batch], device=chosen_P.device)
        loss = weight * pairwise_loss(chosen_P, rejected_P, margin_P, args.center, len(rows), args.center_at)
        (loss * world).backward()  # sharded gradients are averaged over ranks, the loss is a sum over them
        gap_P = (chosen_P - rejected_P).detach()
        preference = pairwise_loss(gap_P, 0.0, margin_P, count=len(rows))
        shares = torch.stack([preference, (gap_P > 0).sum() / len(rows), gap_P.sum() / len(rows)])
        sums = sums + weight * shares
    grad_norm = clip_gradients(model, 1.0)
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [*total(sums).tolist(), grad_norm, int(not math.isfinite(grad_norm))]


def report(args, run, train, held_out, state, after, device):
    """Prints what was learned and leaves result.json in the run folder and calibration.json beside the weights."""
    init = None if args.random_init else args.init
    lines, result = pair_report(held_out, state["before"], after, init or "random", args.split)
    programs = held_out_programs(run, train, held_out)
    more, against, calibration = execution_report(programs, run.checkpoint, init, device)
    flips, flipped = flip_report(held_out, run.checkpoint, device, args.seed)
    print("\n" + "\n".join(lines) + "\n\n" + "\n".join(more + flips))
    result |= against | flipped | {"skipped": state["skipped"]}
    write_atomic(run.dir / "result.json", json.dumps(result, indent=1))
    if calibration:
        write_atomic(run.checkpoint / "calibration.json", json.dumps(calibration))
    print(f"\nreward model: {run.checkpoint}")


def arguments():
    args = parse_args(Args)
    check_least(args, 1, "group batch save_every token_budget max_length max_new_tokens min_tests max_pairs max_uses "
                "repeat steps limit phase_minutes")  # fmt: skip
    check_least(args, 0, "lr weight_decay margin center mutants held_out temperature near_miss")
    check_least(args, 0.001, "epochs")
    check_least(args, 0.5, "length_balance")
    check_least(args, -1000, "center_at")
    check_choice(args, extract=MODES, rm_prompt=("bare", "full"), split=("problem", "pair"))
    if args.held_out >= 1:
        raise UserError(f"--held-out {args.held_out}: expected a share below 1")
    if args.pairs and args.collect_only:
        raise UserError(f"--collect-only: --pairs {args.pairs} is collected already")
    return args


def main():
    args = arguments()
    rank, world, device = setup(args.device, args.phase_minutes)
    log = print if rank == 0 else lambda *_: None
    tokenizer = Tokenizer(args.init)
    if not args.random_init:
        check_model(args.init)
    run = Run(args, COLUMNS, rank)
    train, held_out = get_pairs(args, run, device, log, rank, world)
    if args.collect_only:
        return
    state = run.load()
    path, random_init = (run.checkpoint, False) if state else (args.init, args.random_init)
    model = load_model(path, "score", None, device, random_init, sharded=True)
    model.checkpointing = args.checkpointing
    if args.compile:
        compile_blocks(model)
    log(f"{args.init}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, head: {model.head_source}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = adamw(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        device, args.optimizer_offload, lr=args.lr, betas=(0.9, 0.95),
    )  # fmt: skip
    rows, test_rows = (encode_pairs(tokenizer, p, args.max_length, log) for p in (train, held_out))
    problems = [row.problem for row in rows]
    steps = args.steps or max(1, int(args.epochs * (len(rows) // args.batch)))
    if state:
        run.load_optimizer(optimizer, state)
        log(f"continuing {run.dir} at step {state['step']}")
    else:
        state = {
            "step": 0,
            "skipped": 0,
            "before": evaluate(gathered(model), test_rows, args.token_budget, rank, world),
        }

    started, first, interrupt = time.time(), state["step"], Interrupt()
    while state["step"] < steps:
        step, tick = state["step"] + 1, time.time()
        batch = [rows[i] for i in batch_of(step - 1, problems, args.batch, args.seed)]
        lr = learning_rate(step - 1, steps, args.lr)
        set_learning_rate(optimizer, lr)
        with phase("update", args.phase_minutes):
            loss, accuracy, margin, grad_norm, skipped = update(model, optimizer, batch, args, world, rank)
        tokens, seconds = sum(2 * len(r.prompt) + len(r.chosen) + len(r.rejected) for r in batch), time.time() - tick
        eta = (time.time() - started) / (step - first) * (steps - step)
        log(
            f"step {step}/{steps} | loss {loss:.3f} | acc {accuracy:.2f} | margin {margin:.2f} | "
            f"gnorm {grad_norm:.2f} | {tokens / seconds / 1000:.1f}k tok/s | eta {format_eta(eta)}"
            + (" | skipped: gradient not finite" if skipped else "")
        )
        run.log(step=step, loss=loss, accuracy=accuracy, margin=margin, grad_norm=grad_norm, lr=lr, tokens=tokens,
                seconds=seconds)  # fmt: skip
        state |= {"step": step, "skipped": state["skipped"] + skipped}
        interrupted = agree(interrupt.asked)
        if step % args.save_every == 0 or step == steps or interrupted:
            run.save(model, tokenizer, args.max_length, args.rm_prompt, **state | {"optimizer": optimizer.state_dict()})
        if interrupted:
            raise KeyboardInterrupt
    interrupt.end()

    after = evaluate(gathered(model), test_rows, args.token_budget, rank, world)
    del model, optimizer, matrices, others  # room for the reward models that are read back
    if rank == 0:
        report(args, run, train, held_out, state, after, device)


if __name__ == "__main__":
    run_cli(main)
