"""Train the policy with GRPO, rewarded by the reward model or by executing tests.

    torchrun grpo.py --reward rm                        # the toy run, after `torchrun train_rm.py`
    torchrun grpo.py --reward exec                      # 1 if all tests pass, else 0
    torchrun grpo.py --reward exec --reward-tests 2     # the reward sees two tests of each problem
    torchrun --nproc-per-node 8 grpo.py --preset paper-8b --problems deepcoder:train.parquet

`python grpo.py` does the same on one process. The toy run takes about 2 minutes on 2 CPU cores. It
prints a line a step and a table of held-out results before and after. One step, in the order of
main(): problems -> rollout (N answers to each) -> reward -> advantage -> clipped policy gradient.

Every --audit-every steps the pass rate is measured by executing all tests: a reward that rises
while it falls is a reward model that is being exploited. Refresh it on the new policy's programs:
`train_rm.py --init out/rm --policy out/grpo-rm --out out/rm-2`. The run folder (--out) holds
args.json, metrics.csv, samples.jsonl, result.json and checkpoint/; the same command goes on after a
kill. Shapes: B answers to one prompt, T time.
"""

import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import codescaler as cs
import hub
import metrics
import runs
from common import UserError, check_choice, check_least, parse_args, run_cli
from extract import MODES
from pairs import NOT_GRADED, Rollout, execute, rollout, verify_together
from problems import Problem, input_files, load_problems, policy_prompt
from sandbox import Sandbox

COLUMNS = """step loss reward pass_rate valid_rate kl clip_low clip_high entropy grad_norm mismatch
length truncated reasons no_signal groups skipped code_length audit_reward audit_auc fail_top eval
lr tokens seconds""".split()
WARMUP = 5  # steps of linear warmup; then the learning rate is constant
MAX_PROMPT = 4096  # tokens; problems with a longer prompt are left out
DUMMY = Problem("", "")  # of the row that a rank without work computes; its loss has weight 0
EVAL_PROBLEMS = 48  # at most, in an evaluation during training; before and after it is all


@dataclass
class Args:
    # what is trained, on what
    reward: str = "rm"  # rm: reward model; exec: 1 if all tests pass; partial: share of tests
    policy: str = "tiny/policy"  # model to train: folder, run folder or hub id
    rm: str = "out/rm"  # reward model: run folder of train_rm.py, checkpoint folder or hub id
    problems: str = "toy:train"  # to train on: SPEC[,SPEC...] (python problems.py --help)
    eval_problems: str = "toy:test"  # problems to evaluate on
    out: str | None = None  # run folder; default out/grpo-{reward}
    steps: int = 50  # GRPO steps
    preset: str = "none"  # paper-8b: the hyperparameters of the paper's released script
    # rollout
    prompts: int = 16  # prompts a step, over all ranks
    group: int = 8  # answers to a prompt
    temperature: float = 1.2  # of sampling and training; evaluation: the same, but at most 1
    top_p: float = 1.0  # nucleus sampling: the likeliest tokens that have this probability together
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    max_new_tokens: int = 160  # longest answer
    refill: int = 0  # extra rounds until --prompts groups have unequal rewards (DAPO)
    prompt_style: str = "plain"  # plain, or lcb: LiveCodeBench's prompt
    enable_thinking: bool = True  # False: answers begin behind an empty think block
    extract: str = "strict"  # extraction mode: strict, paper, last or recover
    # reward
    shaping: str = "softplus"  # of the reward model's score: softplus, or raw (an ablation)
    reward_tests: int = 0  # exec, partial: tests of a problem that the reward sees; 0: all
    verify: bool = False  # leave out problems whose own solution fails its tests
    sandbox: str | None = None  # isolation level: strict or basic; default: strict on Linux
    # update
    updates: int = 1  # optimizer steps per rollout, each on its own part of the groups
    lr: float = 3e-4  # learning rate, after five steps of warmup
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    dual_clip: float = 0.0  # loss of a negative advantage at most this times |advantage|; 0: off
    norm: str = "token"  # loss: mean over tokens, answers (seq), or sum over a constant (const)
    kl: float = 0.2  # weight of the KL to the initial policy on trained answers; 0 (paper): none
    std_norm: bool = True  # divide advantages by the group's standard deviation (off: Dr. GRPO)
    token_budget: int = 2048  # tokens of a training pass; a GPU wants 16384 (an estimate)
    checkpointing: bool = False  # less memory, a third more time: recompute activations
    # evaluation and housekeeping
    eval_every: int = 10  # steps between evaluations on a part of --eval-problems
    eval_group: int = 8  # answers to a problem in evaluation (avg@n)
    audit_every: int = 1  # steps between executions of rollouts that the reward does not need
    limit: int | None = None  # at most so many rows of each data set
    save_every: int = 1  # steps between checkpoints
    seed: int = 0  # of sampling and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the run in --out; --no-resume starts over


@dataclass
class Paper8B(Args):
    """The hyperparameters of the paper's released training script, on 8 GPUs. Its code differs from
    ours in the loss (a mean of means of micro-batches, groups without a signal included), advantage
    (no floor under the standard deviation), old_logp (computed again before the update), ratio
    (over the whole vocabulary, not what top-p and top-k leave), warmup (10 steps) and evaluation
    (one greedy sample)."""

    policy: str = "Qwen/Qwen3-8B-Base"
    rm: str = "LARK-Lab/CodeScaler-8B"
    prompt_style: str = "lcb"
    extract: str = "paper"
    prompts: int = 128
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 16384
    steps: int = 250
    updates: int = 2
    lr: float = 1e-6
    dual_clip: float = 3.0
    kl: float = 0.0
    token_budget: int = 20480
    checkpointing: bool = True
    audit_every: int = 10
    save_every: int = 5  # a step takes many minutes


PRESETS = {"none": Args, "paper-8b": Paper8B}


# --------------------------------------------------------------------------------------------------
# rewards: a function each, and an entry of a table


class Judges(NamedTuple):
    """What a reward may ask."""

    reward_model: cs.RewardModel | None
    sandbox: Sandbox
    args: Args


def reward_rm(rollouts, judges):
    """softplus(score) of a valid program, 0 without one: every valid answer beats every invalid one
    (the paper's validity-preserving reward). --shaping raw leaves the score as it is: a program
    with a negative score then ranks below an answer without one."""
    valid = [r for r in rollouts if r.code is not None]
    scores = judges.reward_model.score_many([(r.problem.prompt, r.code) for r in valid])
    for r in rollouts:
        r.reward = 0.0
    for r, score in zip(valid, scores, strict=True):
        r.score = r.reward = score
        if judges.args.shaping == "softplus":
            r.reward = float(cs.shape_reward(score, True))


def reward_exec(rollouts, judges):
    """1 if all tests that the reward sees pass, else 0."""
    for r, seen in run_seen_tests(rollouts, judges):
        r.reward = float(seen.verdict == "pass")


def reward_partial(rollouts, judges):
    """The share of the tests that pass. (The released code stops at the first failure and divides
    by the tests run so far: a program that fails test 10 of 100 gets 9/10.)"""
    for r, seen in run_seen_tests(rollouts, judges):
        r.reward = seen.pass_rate


def run_seen_tests(rollouts, judges):
    """Executes the tests that the reward sees: all of a problem's, or --reward-tests of them, a
    choice that depends on seed and problem alone. -> [(rollout, rollout with the verdict on these
    tests)] where the sandbox could tell; other samples have no reward and are left out."""
    args, copies = judges.args, rollouts
    if args.reward_tests:
        copies = []
        for r in rollouts:
            tests, rng = r.problem.tests, random.Random(f"tests-{args.seed}-{r.problem.id}")
            cases = rng.sample(tests.cases, min(args.reward_tests, len(tests.cases)))
            problem = replace(r.problem, tests=replace(tests, cases=cases))
            copies.append(replace(r, problem=problem))
    execute(judges.sandbox, copies, stop_early=args.reward != "partial")
    return [(r, seen) for r, seen in zip(rollouts, copies) if seen.verdict not in NOT_GRADED]


REWARDS = {"rm": reward_rm, "exec": reward_exec, "partial": reward_partial}
# What a reward needs. "model": --rm is loaded, as judges.reward_model. "tests": problems without
# tests are left out. No entry: neither. With several GPUs every rank must call score_many the same
# number of times, if need be with an empty list: the weights are gathered in it.
NEEDS = {"rm": "model", "exec": "tests", "partial": "tests"}


# --------------------------------------------------------------------------------------------------
# advantage and loss


def group_advantages(rewards_B, std_norm=True, std_floor=0.05, eps=1e-6):
    """Rewards of a group -> (reward - mean) / (max(std, std_floor) + eps); std divides by B - 1.
    All 0 where the group has no signal: rewards that are equal, or nearly (std up to 1e-4).

    The floor keeps a small difference from becoming a large advantage: without it, one valid
    program with a very low score (reward 5e-4) among 15 invalid ones has advantage 3.72.
    std_norm=False only subtracts the mean (Dr. GRPO).

    >>> [round(a, 3) for a in group_advantages(torch.tensor([1.0, 0, 0, 0])).tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if len(rewards_B) < 2 or rewards_B.std() <= 1e-4:
        return torch.zeros_like(rewards_B)
    centered_B = rewards_B - rewards_B.mean()
    return centered_B / (rewards_B.std().clamp(min=std_floor) + eps) if std_norm else centered_B


def set_advantages(groups, args):
    """Fills in `advantage`. A sample without a reward, which the sandbox could not judge, is not in
    the mean of its group and keeps 0: update() leaves it out."""
    for group in groups:
        known = [r for r in group if r.reward is not None]
        reward_B = torch.tensor([r.reward for r in known], dtype=torch.float32)
        advantage_B = group_advantages(reward_B, args.std_norm)
        for r, advantage in zip(known, advantage_B.tolist(), strict=True):
            r.advantage = advantage


def token_weights(mask_BT, norm, samples, tokens, max_new_tokens):
    """What each token counts in the loss, 0 outside the answers. `samples` and `tokens` are those
    of the trained answers of ALL micro-batches and ranks, so the loss does not depend on how the
    batch is cut.

    token: every token alike (DAPO); seq: every sample alike (the original GRPO); const: divided
    by samples * max_new_tokens, so no answer's length changes another's weight (Dr. GRPO).
    """
    if norm == "seq":
        return mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1) / samples
    return mask_BT / (tokens if norm == "token" else samples * max_new_tokens)


def grpo_loss(
    logp_BT, old_logp_BT, advantage_B, weight_BT, clip_low=0.2, clip_high=0.28, dual_clip=0.0,
    kl=0.0, ref_logp_BT=None,
):  # fmt: skip
    """The clipped policy gradient, summed over tokens with their weights (token_weights):

        ratio = exp(logp - old_logp)
        -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) + kl * KL

    dual_clip bounds the loss of a bad token whose ratio has exploded at dual_clip * |advantage|. In
    the first update after a rollout the ratio is 1, and the loss says little; its
    gradient is not 0. -> (loss, metrics of each token, [B, T]).
    """
    ratio_BT = (logp_BT - old_logp_BT).clamp(-20, 20).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantage_B1 = advantage_B[:, None]
    loss_BT = -torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
    if dual_clip:
        bounded_BT = torch.minimum(loss_BT, -dual_clip * advantage_B1)
        loss_BT = torch.where(advantage_B1 < 0, bounded_BT, loss_BT)
    found = {
        "clip_low": ((ratio_BT < 1 - clip_low) & (advantage_B1 < 0)).float(),
        "clip_high": ((ratio_BT > 1 + clip_high) & (advantage_B1 > 0)).float(),
    }
    if kl:
        # The k3 estimate of the KL to the reference: never negative, unbiased (Schulman 2020).
        gap_BT = (ref_logp_BT - logp_BT).clamp(-20, 20)
        kl_BT = gap_BT.exp() - gap_BT - 1
        loss_BT = loss_BT + kl * kl_BT
        found["kl"] = kl_BT.detach()
    return (loss_BT * weight_BT).sum(), found


def update(model, reference, optimizer, groups, args, device, world=1):
    """--updates optimizer steps on the groups that carry a signal -> the step's metrics: the loss
    and means over tokens, averaged over the updates, and the last gradient norm. All ranks call it,
    each with its groups.

    `mismatch` is the largest difference between a token's log-probability in the rollout and in the
    first update: float noise, or the sampler and the trainer disagree. Answers with advantage 0
    are left out. An update whose gradient norm is not finite is skipped on all ranks and counted.
    """
    groups = [[r for r in group if r.advantage != 0.0] for group in groups]
    groups = [group for group in groups if group]
    numbers = sorted(runs.gather_lists([group[0].number for group in groups]))  # of all ranks
    if not numbers:
        return {"loss": 0.0, "grad_norm": 0.0}
    updates = min(args.updates, len(numbers))
    sums, mismatch, skipped = {}, torch.zeros((), device=device), 0
    for part in range(updates):
        chosen = numbers[part * len(numbers) // updates : (part + 1) * len(numbers) // updates]
        mine = [group for group in groups if group[0].number in chosen]
        # Each rank divides by the counts of ALL ranks: the sum over ranks is one mean.
        counts = [sum(map(len, mine)), sum(r.tokens for group in mine for r in group)]
        counts = torch.tensor(counts, device=device)
        samples, tokens = runs.total(counts).tolist()
        work = [(group[0].prompt_ids, group) for group in mine]
        passes = cs.training_passes(model, work, lambda r: r.tokens, args.token_budget)
        for prompt, past, batch in passes:
            loss, batch_metrics, batch_mismatch = batch_loss(
                model, reference, prompt, past, batch, samples, tokens, args
            )
            # Sharded gradients are means over ranks, the loss is a sum over them.
            (loss * world).backward()
            sums = {name: sums.get(name, 0.0) + value for name, value in batch_metrics.items()}
            mismatch = torch.maximum(mismatch, batch_mismatch) if part == 0 else mismatch
        grad_norm = runs.clip_gradients(model, 1.0)  # of all ranks, so they agree on what follows
        if math.isfinite(grad_norm):
            optimizer.step()
        skipped += not math.isfinite(grad_norm)
        optimizer.zero_grad(set_to_none=True)
    means = runs.total(torch.stack(list(sums.values()))) / updates
    largest = max(runs.gather_lists([float(mismatch)]))
    found = {"grad_norm": grad_norm, "skipped": skipped, "mismatch": largest}
    return dict(zip(sums, means.tolist(), strict=True)) | found


def batch_loss(model, reference, prompt, past, batch, samples, tokens, args):
    """Forward pass of a micro-batch: B answers to one prompt, whose keys and values are `past`.

    -> (its part of the loss, its part of the metrics, largest mismatch). `batch` None: this rank
    has no work left but must make the same passes as the others: a dummy of weight 0.
    """
    device, weight = past[0][0].device, float(batch is not None)
    rows = batch or [Rollout(DUMMY, ids=[0], old_logp=[0.0])]
    answers = [r.ids for r in rows]
    ids_BT, lengths_B = cs.pad_rows(answers, device)
    # True where a token is real: rows are right-padded.
    mask_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]
    # The ids that could be sampled at each token of a row; None: the whole vocabulary.
    support = [r.support for r in rows] if rows[0].support else None

    def logprobs(lm, past):
        # [B, 1 + T, D], from the prompt's last token on. A state predicts the next token; the last
        # one predicts nothing.
        hidden_BTD, _ = cs.continue_prompt(lm, prompt, answers, past)
        hidden_BTD = hidden_BTD[:, :-1]
        return cs.token_logprobs(lm, hidden_BTD, ids_BT, mask_BT, args.temperature, support)

    logp_BT, entropy_BT = logprobs(model, past)
    ref_logp_BT = None
    if reference:
        with torch.no_grad():  # its prompt is computed again for each micro-batch
            ref_logp_BT, _ = logprobs(reference, None)
    old_logps = [torch.tensor(r.old_logp) for r in rows]
    old_logp_BT = pad_sequence(old_logps, batch_first=True).to(device)
    advantage_B = torch.tensor([r.advantage for r in rows], device=device)
    weight_BT = weight * token_weights(mask_BT, args.norm, samples, tokens, args.max_new_tokens)
    loss, found = grpo_loss(
        logp_BT, old_logp_BT, advantage_B, weight_BT, args.clip_low, args.clip_high,
        args.dual_clip, args.kl, ref_logp_BT,
    )  # fmt: skip
    share_BT = weight * mask_BT / tokens
    found["entropy"] = entropy_BT
    means = {name: (value * share_BT).sum() for name, value in found.items()}
    difference = ((logp_BT.detach() - old_logp_BT).abs() * mask_BT).max() * weight
    return loss, {"loss": loss.detach(), **means}, difference


# --------------------------------------------------------------------------------------------------
# arguments and data


def arguments():
    args = parse_args(Args)
    check_choice(args, preset=tuple(PRESETS))
    args = parse_args(PRESETS[args.preset])
    check_choice(args, reward=tuple(REWARDS), shaping=("softplus", "raw"), extract=MODES)
    check_choice(args, norm=("token", "seq", "const"), prompt_style=("plain", "lcb"))
    check_least(args, 2, "group")
    check_least(args, 1, "prompts updates max_new_tokens eval_group eval_every audit_every")
    check_least(args, 1, "save_every token_budget limit")
    check_least(args, 0, "steps lr kl clip_low clip_high dual_clip refill top_k reward_tests seed")
    check_least(args, 0.01, "temperature")
    check_least(args, 0.01, "top_p", most=1)
    if args.reward_tests and NEEDS.get(args.reward) != "tests":
        raise UserError(f"--reward-tests {args.reward_tests}: --reward {args.reward} runs no tests")
    args.out = args.out or f"out/grpo-{args.reward}"
    return args


def input_list(args):
    """[(flag, file)]: what the run reads; the same command on other contents is refused."""
    files = input_files("--problems", args.problems)
    files += input_files("--eval-problems", args.eval_problems)
    files += hub.input_files("--policy", args.policy)
    if NEEDS.get(args.reward) == "model":
        files += hub.input_files("--rm", args.rm)
    return files


def load_data(args, tokenizer, judges, rank, world, log):
    """-> (problems to train on, problems to evaluate on): those that can be used; the number of
    the others is logged. Raises UserError where none is left."""
    model = judges.reward_model

    def fits(problem):
        ids = cs.prompt_ids(tokenizer, policy_prompt(problem, args.prompt_style))
        return len(ids) <= MAX_PROMPT and (model is None or model.fits(problem.prompt))

    def usable(flag, spec, needs_tests):
        problems = load_problems(spec, args.limit, log=log, flag=flag)
        if args.verify:
            problems = verify_together(problems, judges.sandbox, rank, world, log)
        tested = [problem for problem in problems if problem.tests or not needs_tests]
        kept = [problem for problem in tested if fits(problem)]
        if len(kept) < len(problems):
            long = len(tested) - len(kept)
            log(f"{flag}: left out {len(problems) - len(tested)} without tests, {long} too long")
        if not kept:
            raise UserError(f"{flag} {spec}: no problem can be used")
        return kept

    problems = usable("--problems", args.problems, NEEDS.get(args.reward) == "tests")
    evaluated = usable("--eval-problems", args.eval_problems, True)
    both = len({p.prompt for p in problems} & {p.prompt for p in evaluated})
    if both:
        log(f"{both} of {len(evaluated)} evaluation problems are trained on, too: not held out")
    return problems, evaluated


# --------------------------------------------------------------------------------------------------
# the parts of a step


def problem_at(number, problems, seed):
    """The problem of prompt `number` of the run: each once per epoch, shuffled anew."""
    epoch, at = divmod(number, len(problems))
    order = list(problems)
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order[at]


def sample(policy, tokenizer, problems, numbers, args):
    """--group answers to each problem -> a list of Rollout each. An answer is a function of the
    seed, the number of its prompt and its place in the group, on any number of ranks."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return rollout(
        policy, tokenizer, problems, args.group, numbers, args.extract, args.prompt_style,
        args.enable_thinking, args.seed, max_new_tokens=args.max_new_tokens, **sampling,
    )  # fmt: skip


def audit(groups, sandbox):
    """Runs the programs that the reward has not executed, up to their first failing test."""
    execute(sandbox, [r for group in groups for r in group if r.verdict is None])


def evaluate(model, tokenizer, problems, judges, rank, world, every=1):
    """--eval-group answers to every `every`-th problem, judged -> rows of metrics.evaluate. They
    have a random stream of their own, the same every time."""
    policy, args = cs.gathered(model), judges.args
    settings = replace(args, group=args.eval_group, seed=10**9 + args.seed)  # not those of training
    settings.temperature = min(1.0, args.temperature)

    def answer(problems, numbers):
        groups = sample(policy, tokenizer, problems, numbers, settings)
        REWARDS[args.reward]([r for group in groups for r in group], judges)
        audit(groups, judges.sandbox)
        return groups

    return metrics.evaluate(answer, problems, every, rank, world)


def report(run, args, state, log):
    """Prints the held-out results and leaves them in result.json."""
    before, after = state["before"], state["after"]
    parts = {"before": metrics.by_part(before), "after": metrics.by_part(after)}
    run.write_result({"n": args.eval_group, **parts})
    rows = metrics.final_rows(before, after, args.eval_group)
    log(f"\n{args.eval_problems}, {args.eval_group} samples a problem, graded by execution")
    log("\n".join(metrics.table(rows)))
    if state["cut_steps"]:
        log(f"in {state['cut_steps']} steps most answers were cut: raise --max-new-tokens")
    log(f"policy: {run.checkpoint}")


# --------------------------------------------------------------------------------------------------


def main():
    args = arguments()
    rank, world, device = runs.setup(args.device)
    log = print if rank == 0 else lambda *_: None
    tokenizer = cs.Tokenizer(args.policy)
    run = runs.Run(args, COLUMNS, input_list(args), rank)
    with Sandbox(level=args.sandbox) as sandbox:
        asks_model = NEEDS.get(args.reward) == "model"
        reward_model = cs.RewardModel(args.rm, device, sharded=True) if asks_model else None
        judges = Judges(reward_model, sandbox, args)
        problems, eval_problems = load_data(args, tokenizer, judges, rank, world, log)

        state = run.load() or {"step": 0, "cursor": 0, "cut_steps": 0}
        path = run.checkpoint if run.checkpoint.exists() else args.policy
        model = cs.load_model(path, "lm", None, device, sharded=True)
        model.checkpointing, reference = args.checkpointing, None
        if args.kl:  # frozen, so it needs no fp32 weights
            dtype = runs.compute_dtype(device)
            reference = cs.load_model(args.policy, "lm", dtype, device, True).requires_grad_(False)
        optimizer = runs.adamw(model, device, args.lr, weight_decay=0.01)
        held_out = partial(evaluate, model, tokenizer, eval_problems, judges, rank, world)
        run.load_optimizer(model, optimizer)
        save = partial(run.save, partial(cs.save_model, model, tokenizer), model, optimizer, state)
        if "before" not in state:
            state["before"] = held_out()
            save()
        log(f"before: {metrics.summary_line(state['before'])}")

        for step in runs.steps(state, args.steps, args.save_every, save):
            started, lr = time.time(), args.lr * min(1.0, step / WARMUP)
            runs.set_learning_rate(optimizer, lr)
            groups, wanted = [], args.prompts
            for _ in range(1 + args.refill):
                # 1. Problems: prompts are numbered through the run, each rank takes its share.
                numbers = range(state["cursor"], state["cursor"] + wanted)
                state["cursor"] += wanted
                mine = numbers[rank::world]
                asked = [problem_at(number, problems, args.seed) for number in mine]
                # 2. A group of answers to each -> rewards -> advantages.
                new = sample(cs.gathered(model), tokenizer, asked, mine, args)
                REWARDS[args.reward]([r for group in new for r in group], judges)
                set_advantages(new, args)
                groups += new
                # --refill: groups of equal rewards teach nothing; as many new prompts are drawn.
                with_signal = sum(any(r.advantage for r in group) for group in new)
                wanted -= int(runs.total(torch.tensor(with_signal)))
                if wanted <= 0:
                    break
            if (step - 1) % args.audit_every == 0:
                audit(groups, sandbox)
            # 3. The clipped policy gradient.
            row = update(model, reference, optimizer, groups, args, device, world)
            # 4. Log, evaluate every so often; the loop saves.
            samples = [r.row() | {"step": step} for group in groups for r in group]
            samples = sorted(runs.gather_lists(samples), key=lambda sample: sample["number"])
            row |= metrics.step_metrics(samples) | {"lr": lr, "seconds": time.time() - started}
            log(metrics.step_line(step, args.steps, row))
            if step % args.eval_every == 0:
                found = held_out(every=math.ceil(len(eval_problems) / EVAL_PROBLEMS))
                row |= metrics.summary(found)
                log(f"  held out ({len(found)} problems): {metrics.summary_line(found)}")
            run.append(samples)
            run.log(step=step, **row)
            state["cut_steps"] += row["truncated"] > 0.5
            state["after"] = None  # outdated by this step; computed after the last one
        if not state.get("after"):
            state["after"] = held_out()
            save()
    report(run, args, state, log)
    runs.leave()


if __name__ == "__main__":
    run_cli(main)
