"""Train the policy with GRPO, rewarded by the reward model, by executing tests, or by both.

    torchrun grpo.py --reward rm                                 # the toy run, after `torchrun train_rm.py`
    torchrun grpo.py --reward exec                               # 1 if all tests pass; `partial`: the share of tests
    torchrun grpo.py --reward hybrid --problems toy:train,toy:untested   # tests where there are some, else the model
    torchrun --nproc-per-node 8 grpo.py --preset paper-8b --problems deepcoder:train.parquet    # the paper's settings

`python grpo.py` does the same. The toy run takes about 2.7 minutes on 2 CPU cores. It prints a line a step and a table
of held-out results before and after. The pass rate is always measured by execution, as an audit: a reward that rises
while the pass rate falls is a reward model being exploited. Refresh it on the new policy's programs with
`train_rm.py --init out/rm --policy out/grpo-rm --out out/rm-new` and go on with
`grpo.py --policy out/grpo-rm --rm out/rm-new --out out/grpo-rm-new`.

The run folder (--out) holds args.json, metrics.csv, samples.jsonl, result.json and checkpoint/. The same command goes
on after a kill. One step, in the order of main(): prompts -> rollout (N programs a prompt) -> extract -> reward ->
advantage -> clipped policy-gradient update. Where this differs from the paper's released code is said at the function.

Shapes: B samples of one prompt, T time.
"""

import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from codescaler import (
    Interrupt,
    RewardModel,
    Run,
    Tokenizer,
    adamw,
    agree,
    clip_gradients,
    compile_blocks,
    format_eta,
    gather_lists,
    gathered,
    generate,
    group_logprobs,
    load_model,
    phase,
    reward_input_ids,
    set_learning_rate,
    setup,
    shape_reward,
    total,
    write_atomic,
)
from common import UserError, auc, bootstrap, check_choice, check_least, mean, parse_args, run_cli
from extract import MODES, extract_code
from pairs import NOT_GRADED, execute, normalised, prompt_ids, verdict_of
from problems import load_problems, rm_prompt
from sandbox import Sandbox
from train_rm import load_calibration, probability

COLUMNS = (
    "step,loss,reward,pass_rate,valid_rate,kl,clip_low,clip_high,entropy,grad_norm,mismatch,length,truncated,reasons,"
    "no_signal,groups,skipped,code_length,comment_share,duplicate_share,audit_reward,audit_auc,fail_top,gap,lr,tokens,"
    "seconds,eval,rm_cut"
).split(",")


@dataclass
class Args:
    # models and data
    reward: str = "rm"  # rm: reward model; exec: 1 if all tests pass; partial: share of tests; hybrid: exec or rm
    shaping: str = "softplus"  # of the reward model's score: softplus, or raw (the paper's ablation)
    policy: str = "tiny/policy"  # model to train
    rm: str = "out/rm"  # reward model (run folder of train_rm.py, checkpoint folder or hub id)
    random_init: bool = False  # random weights in both, to measure a shape without a checkpoint (qwen3-8b-shape)
    rm_offload: bool = False  # reward model on the host while it does not score; else it is cut over the ranks
    optimizer_offload: bool = False  # keep AdamW's moments on the host except while they are updated
    out: str | None = None  # run folder; default out/grpo-{reward}
    problems: str = "toy:train"  # problems to train on (SPEC[,SPEC...])
    eval_problems: str = "toy:test"  # problems to evaluate on
    limit: int | None = None  # rows of any data that is loaded
    max_prompt_tokens: int = 4096  # problems with a longer prompt are left out
    prompt_style: str = "plain"  # plain or lcb: the policy's prompt
    rm_prompt: str | None = None  # what the reward model reads: bare statement or full prompt; default: as trained
    extract: str = "strict"  # extraction mode, in training and evaluation: strict, paper, last or recover
    sandbox: str = "strict"  # isolation level: strict or basic
    preset: str = "none"  # paper-8b: the hyperparameters of the paper's released script
    # rollout
    prompts: int = 16  # prompts a step, over all ranks
    group: int = 8  # samples a prompt
    temperature: float = 1.2  # of sampling, and of the log-probabilities that are trained; over 1: slips come up
    top_p: float = 1.0  # nucleus sampling; log-probabilities are then renormalised over the same tokens
    top_k: int = 0  # most likely tokens that are sampled from; 0: all
    max_new_tokens: int = 160  # longest answer
    refill: int = 0  # rounds of more prompts until --prompts groups carry a signal (dynamic sampling)
    min_spread: float = 1e-4  # a group whose rewards have a smaller standard deviation carries no signal
    # update
    steps: int = 50  # GRPO steps
    updates: int = 1  # optimizer steps a rollout: its groups are dealt to so many batches
    epochs: int = 1  # passes over a rollout
    lr: float = 3e-4  # learning rate after the warmup
    warmup: int = 5  # steps of linear warmup; then constant
    weight_decay: float = 0.0  # AdamW
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    dual_clip: float = 0.0  # bound of the loss of a bad token, in units of its advantage; 0: none
    norm: str = "token"  # mean over tokens (token), over samples (seq), or by samples * --max-new-tokens (const)
    kl: float = 0.2  # weight of the KL to the initial policy, on answers with an advantage; 0 (the paper): no reference
    std_norm: bool = True  # divide advantages by the group's standard deviation (off: Dr. GRPO)
    std_floor: float = 0.05  # smallest standard deviation a group's advantage is divided by
    mask_truncated: bool = False  # answers cut at --max-new-tokens count in their group's mean but are not trained on
    token_budget: int = 2048  # tokens of one training forward pass; a GPU wants 16384 or more
    checkpointing: bool = False  # less memory, a third more time: recompute activations in the backward pass
    compile: bool = False  # torch.compile of the training passes: a minute to start, then a little faster
    cuda_graphs: bool = False  # capture decoding passes and replay them (never run on CUDA so far)
    # evaluation
    audit_every: int = 1  # execute the training rollouts every so many steps, where the reward does not need it
    eval_every: int = 10  # steps between audits on a fixed part of the evaluation problems
    eval_group: int = 8  # samples a problem in evaluation (avg@n)
    eval_temperature: float = 1.0  # sampling temperature in evaluation
    eval_top_p: float = 1.0  # nucleus sampling in evaluation
    eval_limit: int = 48  # problems in an audit during training; before and after: all
    stop_on_gap: int = 0  # stop after so many audits in a row with more reward and no higher pass rate; 0: never
    save_every: int = 1  # steps between checkpoints
    phase_minutes: int = 360  # a rollout or an update that takes longer ends the run: another rank hangs
    seed: int = 0  # seed of sampling and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # continue the run in --out


@dataclass
class Paper8B(Args):
    """What the paper's released training script sets (8 GPUs)."""

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
    warmup: int = 10
    weight_decay: float = 0.01
    dual_clip: float = 3.0
    kl: float = 0.0
    std_floor: float = 0.0
    token_budget: int = 20480
    checkpointing: bool = True
    audit_every: int = 10
    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    save_every: int = 50


PRESETS = {"none": Args, "paper-8b": Paper8B}
PAPER_DIFFERENCES = """--preset paper-8b: the released script's hyperparameters. Where we differ from its code:
  loss          one mean over the tokens of answers with an advantage; theirs is a mean of means of micro-batches,
                and counts groups without a signal too
  old_logp      of the sampler; theirs is computed again before the update
  ratio         log-probabilities renormalised over the top-p/top-k tokens; theirs over the whole vocabulary
  reward        only valid programs are scored; theirs scores an empty text too, then puts 0
  filter_groups theirs is set but read by nobody; ours is --refill N, off here as theirs is in effect
  evaluation    avg@8 at temperature 0.6, top-p 0.95; theirs is greedy, one sample"""


# ----------------------------------------------------------------------------------------------------------------------
# rollout


@dataclass
class Rollout:
    """One sampled answer and everything that is learned about it."""

    problem: object
    number: int  # of the prompt, counted over the run: the key of its group and of its random numbers
    prompt_ids: list
    ids: list  # the answer, with its stop token if it has one
    old_logp: list  # log-probability of each token when it was sampled
    finished: bool = True  # ended by itself, not by max_new_tokens
    support: list | None = None  # ids that could be sampled at each token, where top-p or top-k left some out
    text: str = ""
    code: str | None = None
    reason: str = ""  # of extract.py
    score: float | None = None  # the reward model's raw score
    verdict: str | None = None  # by execution, or "invalid"; None: not executed
    pass_rate: float = 0.0  # share of the tests passed
    reward: float | None = 0.0  # None: nothing is known, the sample is left out
    advantage: float = 0.0


def rollout(policy, tokenizer, problems, numbers, args, group, seed, temperature, top_p, top_k=0):
    """`group` answers to each problem, extracted -> list of groups, each a list of Rollout."""
    prompts = [prompt_ids(tokenizer, problem, args.prompt_style) for problem in problems]
    completions = generate(
        policy, prompts, n=group, max_new_tokens=args.max_new_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, stop_ids=tokenizer.stop_ids, seed=seed, prompt_keys=list(numbers), cuda_graphs=args.cuda_graphs,
    )  # fmt: skip
    groups = []
    for problem, number, prompt, answers in zip(problems, numbers, prompts, completions, strict=True):
        groups.append([Rollout(problem, number, prompt, c.ids, c.logps, c.finished, c.support) for c in answers])
        for r in groups[-1]:
            # The stop token is part of what is trained, not of what is read.
            r.text = tokenizer.decode(r.ids[:-1] if r.finished else r.ids)
            r.code, r.reason = extract_code(r.text, args.extract)
    return groups


def problem_of(number, problems, seed):
    """The problem that prompt `number` of the run asks: every problem once an epoch, in an order of its own."""
    epoch, at = divmod(number, len(problems))
    order = list(range(len(problems)))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return problems[order[at]]


def sample_groups(policy, tokenizer, problems, cursor, judge, args, run_tests, rank=0, world=1):
    """The groups of a step with rewards and advantages, of which this rank has its share -> (groups, new cursor).

    With --refill, more prompts are drawn until --prompts groups carry a signal or the rounds are used up. The prompts
    are numbers from `cursor` on, so the same are drawn on any number of ranks. Groups without a signal (all invalid,
    all alike) are returned too: they are counted and logged, and have advantage 0.
    """
    groups, missing = [], args.prompts
    for _ in range(1 + args.refill):
        numbers = range(cursor, cursor + missing)[rank::world]
        cursor += missing
        asked = [problem_of(number, problems, args.seed) for number in numbers]
        new = rollout(
            policy, tokenizer, asked, numbers, args, args.group, args.seed, args.temperature, args.top_p, args.top_k
        )
        judge([r for group in new for r in group], run_tests)
        set_advantages(new, args)
        groups += new
        missing = args.prompts - int(total(torch.tensor(sum(map(has_signal, groups)))))
        if missing == 0:
            break
    return groups, cursor


# ----------------------------------------------------------------------------------------------------------------------
# rewards: one function a kind


def reward_rm(rollouts, shaping="softplus"):
    """softplus(score) of a valid program, 0 without one: every valid answer beats every invalid one (paper, section on
    the validity-preserving reward). `raw` leaves the score as it is: a valid program below 0 then loses to none."""
    for r in rollouts:
        valid = r.code is not None
        r.reward = float(shape_reward(r.score, True) if valid and shaping == "softplus" else r.score if valid else 0.0)


def reward_exec(rollouts):
    """1 if all tests pass, else 0; what could not be graded (the sandbox failed, not the program) has no reward."""
    for r in rollouts:
        r.reward = None if r.verdict in NOT_GRADED else float(r.verdict == "pass")


def reward_partial(rollouts):
    """Share of all tests passed. (The released code stops at the first failure and divides by the tests run so far: a
    program that fails test 10 of 100 gets 9/10.)"""
    for r in rollouts:
        r.reward = None if r.verdict in NOT_GRADED else r.pass_rate


def reward_hybrid(rollouts, calibration):
    """reward_exec where the problem has tests, else the reward model's probability that they would pass: both are in
    [0, 1], and an invalid answer has 0 in both."""
    reward_exec([r for r in rollouts if r.problem.tests])
    for r in rollouts:
        if not r.problem.tests:
            r.reward = probability(r.score, calibration) if r.code is not None else 0.0


class Judge:
    """Scores and executes rollouts, and gives the reward that --reward names."""

    def __init__(self, args, device, sandbox):
        self.args, self.device, self.sandbox = args, device, sandbox
        self.reward_model = self.calibration = None
        if args.reward in ("rm", "hybrid"):
            self.reward_model = RewardModel(
                args.rm, device, prompt=args.rm_prompt, random_init=args.random_init, sharded=not args.rm_offload
            )
            if args.rm_offload:
                self.reward_model.model.to("cpu")
        if args.reward == "hybrid":
            self.calibration = load_calibration(args.rm)

    def __call__(self, rollouts, run_tests=True):
        if run_tests or self.args.reward != "rm":
            self.execute(rollouts)
        if self.reward_model:
            self.score([r for r in rollouts if r.code is not None])
        if self.args.reward == "rm":
            reward_rm(rollouts, self.args.shaping)
        elif self.args.reward == "hybrid":
            reward_hybrid(rollouts, self.calibration)
        else:
            (reward_exec if self.args.reward == "exec" else reward_partial)(rollouts)

    def reads(self, problem):
        """What the reward model reads of a problem."""
        return rm_prompt(problem, self.reward_model.prompt, self.args.prompt_style)

    def readable(self, problems, log):
        """Those problems whose statement leaves the reward model room for a program."""
        if not self.reward_model:
            return problems
        tokenizer, room = self.reward_model.tokenizer, self.reward_model.max_length
        kept = [p for p in problems if len(reward_input_ids(tokenizer, self.reads(p), "", math.inf)[0]) < room]
        if len(kept) < len(problems):
            log(f"{len(problems) - len(kept)} problems left out: over the {room} tokens that --rm reads")
        if not kept:
            raise UserError(f"--rm {self.args.rm} reads {room} tokens: every problem is longer")
        return kept

    def cut(self):
        """How many programs the reward model has read without their end since the last call, over all ranks."""
        if not self.reward_model:
            return 0
        count, self.reward_model.truncated = self.reward_model.truncated, 0
        return int(total(torch.tensor(count)))

    def score(self, valid):
        """All programs of a group in one call: the reward model reads their statement once."""
        if self.args.rm_offload:
            self.reward_model.model.to(self.device)
        scores = self.reward_model.score_many([(self.reads(r.problem), r.code) for r in valid])
        for r, score in zip(valid, scores, strict=True):
            r.score = score
        if self.args.rm_offload:
            self.reward_model.model.to("cpu")

    def execute(self, rollouts):
        """Runs the programs of problems that have tests; no program is the verdict "invalid"."""
        jobs = [(r.problem, r.code) for r in rollouts]
        results = execute(self.sandbox, jobs, stop_early=self.args.reward != "partial")
        for r, result in zip(rollouts, results, strict=True):
            r.verdict = verdict_of(result) if result else ("invalid" if r.problem.tests else None)
            r.pass_rate = result.pass_rate if result else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# advantage and loss


def group_advantages(rewards_B, std_norm=True, std_floor=0.05, min_spread=0.0, eps=1e-6):
    """Rewards of one group -> (reward - mean) / (std + eps), with the sample standard deviation (B - 1).

    A group whose rewards spread no more than `min_spread` gets exactly 0, and so does a group of one. The floor keeps a
    tiny difference from becoming a large advantage: without it, one valid program that the model hates (reward 5e-5)
    among 15 invalid ones has advantage 3.45. std_norm=False only subtracts the mean (Dr. GRPO).

    >>> [round(a, 3) for a in group_advantages(torch.tensor([1.0, 0, 0, 0])).tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if len(rewards_B) < 2 or bool((rewards_B == rewards_B[0]).all()) or rewards_B.std() <= min_spread:
        return torch.zeros_like(rewards_B)
    centered_B = rewards_B - rewards_B.mean()
    return centered_B / (rewards_B.std().clamp(min=std_floor) + eps) if std_norm else centered_B


def set_advantages(groups, args):
    """Fills in `advantage`. A sample without a reward gets 0 and is left out of its group's mean; an answer that was
    cut off counts in the mean, and --mask-truncated then takes it out of the loss."""
    for group in groups:
        known = [r for r in group if r.reward is not None]
        rewards_B = torch.tensor([r.reward for r in known])
        advantages = group_advantages(rewards_B, args.std_norm, args.std_floor, args.min_spread).tolist()
        for r, advantage in zip(known, advantages, strict=True):
            r.advantage = advantage if r.finished or not args.mask_truncated else 0.0


def has_signal(group):
    """Whether any sample of a group has an advantage."""
    return any(r.advantage != 0.0 for r in group)


def token_weights(mask_BT, norm, samples, tokens, max_new_tokens):
    """What a token counts in the loss, 0 outside the answers. `samples` and `tokens` are those of ALL micro-batches and
    ranks, so the loss does not depend on how the batch is cut; only answers with an advantage are counted, so groups
    without a signal do not shrink the step. token: every token alike (DAPO); seq: every sample alike (the original
    GRPO); const: every token alike, but a long answer is not discounted by the others (Dr. GRPO)."""
    if norm == "seq":
        return mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1) / samples
    return mask_BT / (tokens if norm == "token" else samples * max_new_tokens)


def grpo_loss(
    logp_BT, old_logp_BT, advantage_B, weight_BT, clip_low=0.2, clip_high=0.28, dual_clip=0.0, kl=0.0, ref_logp_BT=None
):
    """Clipped policy gradient, summed over tokens with their weights (token_weights).

    dual_clip bounds the loss of a bad token whose ratio has exploded at dual_clip * |advantage|. In the first update
    after a rollout the ratio is 1 and the loss is about 0, since advantages sum to 0 in a group; its gradient is not.
    Returns (loss, metrics of each token [B, T]).
    """
    ratio_BT = (logp_BT - old_logp_BT).clamp(-20, 20).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantage_B1 = advantage_B[:, None]
    loss_BT = -torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
    if dual_clip:
        loss_BT = torch.where(advantage_B1 < 0, torch.minimum(loss_BT, -dual_clip * advantage_B1), loss_BT)
    metrics = {
        "clip_low": ((ratio_BT < 1 - clip_low) & (advantage_B1 < 0)).float(),
        "clip_high": ((ratio_BT > 1 + clip_high) & (advantage_B1 > 0)).float(),
    }
    if kl:
        gap_BT = (ref_logp_BT - logp_BT).clamp(-20, 20)
        kl_BT = gap_BT.exp() - gap_BT - 1  # k3: never negative, unbiased for the KL to the reference
        loss_BT = loss_BT + kl * kl_BT
        metrics["kl"] = kl_BT.detach()
    return (loss_BT * weight_BT).sum(), metrics


def micro_batches(group, token_budget):
    """The samples of a group that are trained on, cut into lists that fit one forward pass. A micro-batch never mixes
    prompts: its prompt is computed once, and it is the same one on any number of ranks."""
    trained = sorted((r for r in group if r.advantage != 0.0), key=lambda r: len(r.ids))
    batch = []
    for r in trained:
        if batch and len(r.prompt_ids) + len(r.ids) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(r)
    if batch:
        yield batch


def backward(model, reference, batch, samples, tokens, args, device, world):
    """Forward and backward pass of one micro-batch -> its part of the step's metrics. An empty batch takes part with
    weight 0: with sharded weights every rank must make the same number of passes."""
    rows = batch or [Rollout(None, 0, [0], [0], [0.0])]
    what = {
        "prompt": rows[0].prompt_ids, "answers": [r.ids for r in rows], "temperature": args.temperature,
        "support": [r.support for r in rows] if rows[0].support else None,
    }  # fmt: skip
    logp_BT, entropy_BT, mask_BT = group_logprobs(model, **what)
    with torch.no_grad():
        ref_logp_BT = group_logprobs(reference, **what)[0] if reference else None
    old_logp_N = torch.tensor([logp for r in rows for logp in r.old_logp], device=device)
    old_logp_BT = torch.zeros_like(logp_BT).masked_scatter(mask_BT, old_logp_N)
    weight_BT = token_weights(mask_BT, args.norm, samples, tokens, args.max_new_tokens) * bool(batch)
    advantage_B = torch.tensor([r.advantage for r in rows], device=device)
    clips = (args.clip_low, args.clip_high, args.dual_clip)
    loss, metrics = grpo_loss(logp_BT, old_logp_BT, advantage_B, weight_BT, *clips, args.kl, ref_logp_BT)
    (loss * world).backward()  # sharded gradients are averaged over ranks, the loss is a sum over them
    mismatch = ((logp_BT.detach() - old_logp_BT).abs() * (weight_BT > 0)).max()
    share_BT = mask_BT * bool(batch) / tokens  # metrics are means over tokens, whatever --norm the loss has
    means = {name: (value * share_BT).sum() for name, value in {"entropy": entropy_BT, **metrics}.items()}
    return {"loss": loss.detach(), **means}, mismatch


def update(model, reference, optimizer, groups, args, device, world=1):
    """--epochs times --updates optimizer steps on the groups that carry a signal -> the step's metrics.

    `mismatch` is the largest difference between a token's log-probability in the rollout and in the first forward pass
    of training, before any clipping: float noise, or the sampler and the trainer disagree. A gradient that is not
    finite is skipped and counted; its norm is that of all ranks, so they agree.
    """
    groups = [group for group in groups if has_signal(group)]
    numbers = sorted(gather_lists([group[0].number for group in groups]))
    if not numbers:
        return {"loss": 0.0, "grad_norm": 0.0}
    sums, norms, skipped, differences = Counter(), [], 0, [0.0]
    updates = min(args.updates, len(numbers))
    for part in list(range(updates)) * args.epochs:
        mine = set(numbers[part * len(numbers) // updates : (part + 1) * len(numbers) // updates])
        batches = [b for group in groups if group[0].number in mine for b in micro_batches(group, args.token_budget)]
        counts = torch.tensor([sum(map(len, batches)), sum(len(r.ids) for b in batches for r in b)], device=device)
        samples, tokens = total(counts).tolist()
        for i in range(max(gather_lists([len(batches)]))):
            batch = batches[i] if i < len(batches) else []
            metrics, difference = backward(model, reference, batch, samples, tokens, args, device, world)
            sums.update(metrics)
            differences += [] if norms else [difference]
        norms.append(clip_gradients(model, 1.0))
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
    values = total(torch.stack([torch.as_tensor(v, device=device) for v in sums.values()])) / len(norms)
    return {
        **dict(zip(sums, values.tolist(), strict=True)),
        "grad_norm": norms[-1],
        "skipped": skipped,
        "mismatch": max(gather_lists([max(map(float, differences))])),  # read here: nothing waits for it before
    }


# ----------------------------------------------------------------------------------------------------------------------
# evaluation and audit


def evaluate(policy, tokenizer, problems, every, judge, args, rank=0, world=1):
    """Answers to every `every`-th problem, judged -> a dict a problem: its part of the data (`problem.source`), avg
    (share of passing samples), any (whether one passes), valid, reward, and lists `rewards`, `passed` of its valid
    samples. Samples are drawn from a random stream of their own, the same one at every evaluation."""
    numbers, rows, size = range(0, len(problems), every), [], 64 * world
    for at in tqdm(range(0, len(numbers), size), desc="evaluating", leave=False, disable=True if rank else None):
        chunk = numbers[at : at + size][rank::world]  # of the last one a rank may have none: it judges nothing, too
        groups = rollout(
            policy, tokenizer, [problems[i] for i in chunk], chunk, args, args.eval_group, 10**9 + args.seed,
            args.eval_temperature, args.eval_top_p,
        )  # fmt: skip
        judge([r for group in groups for r in group])
        for group in groups:
            valid = [r for r in group if r.code is not None and r.reward is not None]
            graded = [r for r in group if r.verdict not in NOT_GRADED] or group
            passed = [r.verdict == "pass" for r in graded]
            rows.append({
                "number": group[0].number, "part": group[0].problem.source or "all", "avg": mean(passed),
                "any": float(any(passed)), "valid": mean([r.code is not None for r in group]),
                "reward": mean([r.reward or 0.0 for r in group]),
                "rewards": [r.reward for r in valid], "passed": [r.verdict == "pass" for r in valid],
            })  # fmt: skip
    return sorted(gather_lists(rows), key=lambda row: row["number"])


def audit(rows):
    """Does the reward follow execution? -> mean reward, mean AUC of reward against passing within a problem, and the
    share of failing programs among the tenth with the highest rewards."""
    aucs = [a for a in (auc(row["rewards"], row["passed"]) for row in rows) if not math.isnan(a)]
    ranked = sorted(((reward, passed) for row in rows for reward, passed in zip(row["rewards"], row["passed"])),
                    reverse=True)  # fmt: skip
    top = ranked[: max(1, len(ranked) // 10)]
    return {
        "audit_reward": mean([row["reward"] for row in rows]),
        "audit_auc": mean(aucs) if aucs else "",
        "fail_top": mean([not passed for _, passed in top]) if top else "",
        "eval": mean([row["avg"] for row in rows]),
    }


def gap(audits):
    """How many audits in a row, up to the last one, have a higher reward and no higher pass rate than the one before.

    >>> gap([(1.0, 0.3), (1.5, 0.4), (1.8, 0.4), (2.0, 0.3)])
    2
    """
    count = 0
    for (reward, passed), (next_reward, next_passed) in zip(audits, audits[1:]):
        count = count + 1 if next_reward > reward and next_passed <= passed else 0
    return count


def audit_line(rows):
    """Evaluation rows -> the line that is printed of them."""
    shown = {"avg@n": "avg", "pass@n": "any", "valid": "valid", "reward": "reward"}
    parts = [f"{name} {mean([row[key] for row in rows]):.3f}" for name, key in shown.items()]
    found = audit(rows)
    parts += [f"{name} {found[key]:.2f}" for name, key in (("auc", "audit_auc"), ("fail_top", "fail_top"))
              if found[key] != ""]  # fmt: skip
    return " | ".join(parts)


def by_part(rows):
    """Evaluation rows -> {part: {name: [a value a problem]}}, as result.json has them."""
    parts = {}
    for row in rows:
        for name in ("avg", "any", "valid", "reward"):
            parts.setdefault(row["part"], {}).setdefault(name, []).append(row[name])
    return parts


def final_table(before, after, args, trained_on=0):
    """Results as lines of text, one a part of the data. `trained_on`: so many of the problems are not held out."""
    n, what = args.eval_group, f"problems, {trained_on} of them trained on" if trained_on else "held-out problems"
    lines = [
        f"{what} ({args.eval_problems}), {n} samples each at temperature {args.eval_temperature}, "
        f"extraction {args.extract}, graded by execution"
    ]
    lines.append(
        f"{'part':<16}{'problems':>9}{f'avg@{n}':>17}{'gain [95% interval]':>28}{f'pass@{n}':>17}{'valid':>17}"
    )
    parts = list(by_part(before))
    for part in [*parts, "all"] if len(parts) > 1 else parts:
        one, two = ([row for row in rows if part in (row["part"], "all")] for rows in (before, after))
        gain, low, high = bootstrap([b["avg"] - a["avg"] for a, b in zip(one, two, strict=True)], range(len(one)))
        cells = [f"{mean([r[m] for r in one]):.3f} -> {mean([r[m] for r in two]):.3f}" for m in ("avg", "any", "valid")]
        interval = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{part:<16}{len(one):>9}{cells[0]:>17}{interval:>28}{cells[1]:>17}{cells[2]:>17}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# what is logged


def sample_row(step, r):
    """A rollout as a line of samples.jsonl."""
    return {
        "step": step, "problem": r.problem.id, "prompt": r.problem.prompt, "completion": r.text, "code": r.code,
        "reason": r.reason, "score": r.score, "reward": r.reward, "advantage": r.advantage, "verdict": r.verdict,
        "tokens": len(r.ids), "finished": r.finished, "number": r.number,
    }  # fmt: skip


def step_metrics(rows):
    """What a step's samples (rows of samples.jsonl, of all ranks) say about it."""
    tested = [row for row in rows if row["verdict"] not in NOT_GRADED]
    codes = [row["code"] for row in rows if row["code"] is not None]
    lines = [line for code in codes for line in code.splitlines()]
    unique = {(row["number"], normalised(row["code"])) for row in rows if row["code"] is not None}
    reasons = Counter(row["reason"] for row in rows if row["code"] is None)
    groups = {row["number"] for row in rows}
    return {
        "reward": mean([row["reward"] for row in rows if row["reward"] is not None]),
        "pass_rate": mean([row["verdict"] == "pass" for row in tested]) if tested else "",
        "valid_rate": len(codes) / len(rows),
        "length": mean([row["tokens"] for row in rows]),
        "truncated": mean([not row["finished"] for row in rows]),
        "reasons": " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        "groups": len(groups),
        "no_signal": 1 - len({row["number"] for row in rows if row["advantage"]}) / len(groups),
        "code_length": mean([len(code) for code in codes]) if codes else "",
        "comment_share": mean(["#" in line for line in lines]) if lines else "",
        "duplicate_share": 1 - len(unique) / len(codes) if codes else "",
        "tokens": sum(row["tokens"] for row in rows),
    }


def step_line(step, args, m, eta):
    """What is printed of a step."""
    parts = [
        f"step {step}/{args.steps}",
        f"reward {m['reward']:.3f}",
        f"pass {m['pass_rate']:.2f}" if m["pass_rate"] != "" else "pass -",
        f"valid {m['valid_rate']:.2f}",
        f"kl {m.get('kl', 0.0):.4f}",
        f"clip {m.get('clip_low', 0.0) + m.get('clip_high', 0.0):.3f}",
        f"ent {m.get('entropy', 0.0):.2f}",
        f"gnorm {m['grad_norm']:.2f}",
        f"len {m['length']:.0f}",
        f"{m['tokens'] / m['seconds'] / 1000:.1f}k tok/s",
        f"eta {format_eta(eta)}",
        f"skipped {m['skipped']}" if m.get("skipped") else "",
        m["reasons"],
    ]
    return " | ".join(part for part in parts if part)


# ----------------------------------------------------------------------------------------------------------------------


def arguments():
    args = parse_args(Args)
    if args.preset not in PRESETS:
        raise UserError(f"--preset {args.preset}: expected {' or '.join(PRESETS)}")
    args = parse_args(PRESETS[args.preset])
    check_choice(args, reward=("rm", "exec", "partial", "hybrid"), shaping=("softplus", "raw"),
                 norm=("token", "seq", "const"), extract=MODES, rm_prompt=(None, "bare", "full"))  # fmt: skip
    check_least(args, 2, "group")
    check_least(args, 1, "prompts updates epochs max_new_tokens eval_group eval_every audit_every eval_limit "
                "save_every token_budget max_prompt_tokens limit phase_minutes")  # fmt: skip
    check_least(args, 0, "steps lr kl warmup weight_decay clip_low clip_high dual_clip std_floor min_spread refill "
                "top_k stop_on_gap eval_temperature")  # fmt: skip
    check_least(args, 0.01, "temperature")
    check_least(args, 0.01, "top_p eval_top_p", most=1)
    args.out = args.out or f"out/grpo-{args.reward}"
    return args


def training_problems(args, tokenizer, log):
    """The problems of --problems with prompts that fit, and with tests where the reward needs them."""
    problems = load_problems(args.problems, args.limit, log=log)
    if args.reward in ("exec", "partial"):
        problems = [p for p in problems if p.tests]
        if not problems:
            raise UserError(f"--problems {args.problems}: none has tests, which --reward {args.reward} needs")
    kept = [p for p in problems if len(prompt_ids(tokenizer, p, args.prompt_style)) <= args.max_prompt_tokens]
    if len(kept) < len(problems):
        log(f"{len(problems) - len(kept)} problems left out: prompt over --max-prompt-tokens {args.max_prompt_tokens}")
    if not kept:
        raise UserError(
            f"--problems {args.problems}: every prompt is over --max-prompt-tokens {args.max_prompt_tokens}"
        )
    return kept


def evaluation_problems(args, log):
    """The problems of --eval-problems that can be graded, those with tests."""
    problems = load_problems(args.eval_problems, args.limit, log=log, flag="--eval-problems")
    kept = [p for p in problems if p.tests]
    if len(kept) < len(problems):
        log(f"{len(problems) - len(kept)} of --eval-problems left out: no tests")
    if not kept:
        raise UserError(f"--eval-problems {args.eval_problems}: none has tests, so nothing can be graded")
    return kept


def main():
    args = arguments()
    rank, world, device = setup(args.device, args.phase_minutes)
    if args.cuda_graphs and device == "cpu":
        raise UserError("--cuda-graphs: this run is on cpu")
    log = print if rank == 0 else lambda *_: None
    if args.preset == "paper-8b":
        log(PAPER_DIFFERENCES)
    tokenizer = Tokenizer(args.policy)
    problems, eval_problems = training_problems(args, tokenizer, log), evaluation_problems(args, log)
    run = Run(args, COLUMNS, rank)
    with Sandbox(level=args.sandbox) as sandbox:
        judge = Judge(args, device, sandbox)
        problems, eval_problems = judge.readable(problems, log), judge.readable(eval_problems, log)
        trained_on = len({p.prompt for p in problems} & {p.prompt for p in eval_problems})
        if trained_on:
            log(f"{trained_on} of {len(eval_problems)} evaluation problems are trained on, too: not held out")
        stride = math.ceil(len(eval_problems) / args.eval_limit)
        state = run.load()
        path, random_init = (run.checkpoint, False) if state else (args.policy, args.random_init)
        model = load_model(path, "lm", None, device, random_init, sharded=True)
        model.checkpointing = args.checkpointing
        if args.compile:
            compile_blocks(model)
        reference = load_model(args.policy, "lm", None, device, args.random_init, sharded=True) if args.kl else None
        optimizer = adamw(
            model.parameters(), device, args.optimizer_offload, lr=args.lr, weight_decay=args.weight_decay
        )
        if state:
            run.load_optimizer(optimizer, state)
            log(f"continuing {run.dir} at step {state['step']}")
        else:
            before = evaluate(gathered(model), tokenizer, eval_problems, 1, judge, args, rank, world)
            fixed = audit([row for row in before if row["number"] % stride == 0])
            state = {"step": 0, "cursor": 0, "before": before, "audits": [(fixed["audit_reward"], fixed["eval"])]}
        run.drop_samples_after(state["step"])
        log(f"before: {audit_line(state['before'])}")

        started, first, stop = time.time(), state["step"], 0 < args.stop_on_gap <= gap(state["audits"])
        interrupt = Interrupt()
        while state["step"] < args.steps and not stop:
            step, tick = state["step"] + 1, time.time()
            lr = args.lr * min(1.0, step / max(1, args.warmup))
            set_learning_rate(optimizer, lr)
            run_tests = (step - 1) % args.audit_every == 0
            with phase("rollout", args.phase_minutes):
                groups, state["cursor"] = sample_groups(
                    gathered(model), tokenizer, problems, state["cursor"], judge, args, run_tests, rank, world
                )
            with phase("update", args.phase_minutes):
                metrics = update(model, reference, optimizer, groups, args, device, world)
            rows = sorted(gather_lists([sample_row(step, r) for g in groups for r in g]), key=lambda row: row["number"])
            metrics |= step_metrics(rows) | {"lr": lr, "rm_cut": judge.cut(), "seconds": time.time() - tick}
            log(step_line(step, args, metrics, (time.time() - started) / (step - first) * (args.steps - step)))
            if step % args.eval_every == 0 and step < args.steps:
                during = evaluate(gathered(model), tokenizer, eval_problems, stride, judge, args, rank, world)
                metrics |= audit(during)
                state["audits"].append((metrics["audit_reward"], metrics["eval"]))
                metrics["gap"] = gap(state["audits"])
                log(f"  held out ({len(during)} problems): {audit_line(during)}")
                stop = 0 < args.stop_on_gap <= metrics["gap"]
            run.append(rows)
            run.log(step=step, **metrics)
            state["step"] = step
            state.pop("after", None)  # of a run that --steps has made longer
            interrupted = agree(interrupt.asked)
            if step % args.save_every == 0 or step == args.steps or stop or interrupted:
                run.save(model, tokenizer, **state | {"optimizer": optimizer.state_dict()})
            if interrupted:
                raise KeyboardInterrupt
        interrupt.end()
        if stop:
            log(f"stopped: {args.stop_on_gap} audits in a row with more reward and no higher pass rate (--stop-on-gap)")
        if "after" not in state:
            state["after"] = evaluate(gathered(model), tokenizer, eval_problems, 1, judge, args, rank, world)
            run.save(model, tokenizer, **state | {"optimizer": optimizer.state_dict()})
    if rank == 0:
        result = {"n": args.eval_group, "before": by_part(state["before"]), "after": by_part(state["after"])}
        write_atomic(run.dir / "result.json", json.dumps(result))
    table = final_table(state["before"], state["after"], args, trained_on)
    log("\n" + "\n".join(table) + f"\n\npolicy: {run.checkpoint}")


if __name__ == "__main__":
    run_cli(main)
