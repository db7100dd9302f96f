"""Train the policy with GRPO, rewarded by the reward model or by executing tests.

    torchrun grpo.py --reward rm                                 # the toy run, after `torchrun train_rm.py`
    torchrun grpo.py --reward exec                               # the same with execution as the reward
    torchrun grpo.py --reward rm --problems toy:untested         # problems without tests
    torchrun grpo.py --reward exec --problems mbpp:mbpp.jsonl --eval-problems mbpp:mbpp.jsonl

`python grpo.py` does the same. The toy run takes about 2.7 minutes on 2 CPU cores. It prints a line a step and a table
of held-out results before, during and after. In both arms the pass rate is measured by execution, as an audit: a reward
that rises while the pass rate falls is a reward model being exploited. It leaves a run folder (--out): args.json,
metrics.csv, samples.jsonl and checkpoint/. The same command goes on after a kill.

One step, in the order of main(): prompts -> rollout (N programs a prompt) -> extract -> reward -> advantage -> clipped
policy-gradient update. Where this differs from the paper's released code is said at the function concerned.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from codescaler import (
    RewardModel,
    Run,
    Tokenizer,
    format_eta,
    generate,
    load_model,
    pad_rows,
    setup,
    shape_reward,
    token_logprobs,
)
from extract import extract_code
from pairs import execute, verdict_of
from problems import UserError, load_problems, parse_args, policy_prompt, run_cli
from sandbox import Sandbox
from train_rm import bootstrap

COLUMNS = (
    "step,loss,reward,pass_rate,valid_rate,kl,clip_low,clip_high,entropy,grad_norm,length,truncated,reasons,"
    "no_signal,lr,tokens,seconds,eval"
).split(",")


@dataclass
class Args:
    # models and data
    reward: str = "rm"  # rm: the reward model's score; exec: 1 if all tests pass
    policy: str = "tiny/policy"  # model to train
    rm: str = "out/rm"  # reward model (run folder of train_rm.py, checkpoint folder or hub id)
    out: str | None = None  # run folder; default out/grpo-{reward}
    problems: str = "toy:train"  # problems to train on (SPEC[,SPEC...])
    eval_problems: str = "toy:test"  # problems to evaluate on
    limit: int | None = None  # rows of any data that is loaded
    prompt_style: str = "plain"  # plain or lcb
    extract: str = "strict"  # extraction mode, in training and evaluation
    sandbox: str = "strict"  # isolation level: strict or basic
    # rollout
    prompts: int = 16  # prompts a step
    group: int = 8  # samples a prompt
    temperature: float = 1.0  # of sampling, and of the log-probabilities that are trained
    max_new_tokens: int = 160  # longest answer
    # update
    steps: int = 50  # GRPO steps
    lr: float = 3e-4  # learning rate after the warmup
    warmup: int = 5  # steps of linear warmup; then constant
    weight_decay: float = 0.0  # AdamW
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl: float = 0.2  # weight of the KL divergence to the initial policy; 0 (the paper): no reference model is kept
    std_floor: float = 0.05  # smallest standard deviation a group's advantage is divided by
    updates: int = 1  # optimizer steps a rollout
    token_budget: int = 2048  # tokens of one training forward pass; a GPU wants 16384 or more
    # evaluation
    audit_every: int = 1  # execute the training rollouts every so many steps (reward rm)
    eval_every: int = 10  # steps between evaluations on a part of the problems
    eval_group: int = 8  # samples a problem in evaluation (avg@n)
    eval_limit: int = 48  # problems in evaluations during training; before and after: all
    save_every: int = 1  # steps between checkpoints
    seed: int = 0  # seed of sampling and order
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # continue the run in --out


# ----------------------------------------------------------------------------------------------------------------------
# rollout


@dataclass
class Rollout:
    """One sampled answer and everything that is learned about it."""

    problem: object
    prompt_ids: list
    ids: list  # the answer, with its stop token if it has one
    old_logp: list  # log-probability of each token when it was sampled
    finished: bool  # ended by itself, not by max_new_tokens
    text: str = ""
    code: str | None = None
    reason: str = ""
    score: float | None = None  # the reward model's raw score
    verdict: str | None = None  # by execution; None: not executed
    reward: float = 0.0
    advantage: float = 0.0


def rollout(model, tokenizer, problems, args, group, seed, keys):
    """`group` answers to each problem, extracted. Groups are consecutive in the returned list of Rollout."""
    prompts = []
    for p in problems:
        user = {"role": "user", "content": policy_prompt(p, args.prompt_style)}
        prompts.append(tokenizer.encode(tokenizer.chat([user], add_generation_prompt=True)))
    completions = generate(
        model, prompts, n=group, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        stop_ids=tokenizer.stop_ids, seed=seed, prompt_keys=keys,
    )  # fmt: skip
    rollouts = []
    for problem, prompt_ids, answers in zip(problems, prompts, completions, strict=True):
        for c in answers:
            # The stop token is part of what is trained, not of what is read.
            text = tokenizer.decode(c.ids[:-1] if c.finished else c.ids)
            code, reason = extract_code(text, args.extract)
            rollouts.append(Rollout(problem, prompt_ids, c.ids, c.logps, c.finished, text, code, reason))
    return rollouts


# ----------------------------------------------------------------------------------------------------------------------
# rewards: one function a kind


def reward_rm(rollouts, reward_model):
    """softplus(score) of a valid program, 0 without one: every valid answer beats every invalid one (paper, section on
    the validity-preserving reward). Only valid programs are scored; the released code scores empty text too."""
    valid = [r for r in rollouts if r.code is not None]
    for r, score in zip(valid, reward_model.score_many([(r.problem.prompt, r.code) for r in valid]), strict=True):
        r.score = score
    for r in rollouts:
        r.reward = float(shape_reward(r.score or 0.0, r.code is not None))


def reward_exec(rollouts):
    """1 if all tests pass, else 0. Needs verdicts (`audit`)."""
    for r in rollouts:
        r.reward = float(r.verdict == "pass")


def audit(rollouts, sandbox):
    """Executes the programs of problems that have tests and sets `verdict`; no program is "invalid"."""
    results = execute(sandbox, [(r.problem, r.code) for r in rollouts])
    for r, result in zip(rollouts, results, strict=True):
        r.verdict = verdict_of(result) if result else ("invalid" if r.problem.tests else None)


# ----------------------------------------------------------------------------------------------------------------------
# advantage and loss


def group_advantages(rewards_N, std_floor=0.05, eps=1e-6):
    """Rewards of one group -> (reward - mean) / (std + eps), with the sample standard deviation (N - 1).

    A group whose rewards are all equal gets exactly 0, and so does a group of one. The floor keeps a tiny difference
    from becoming a large advantage: without it, one valid program that the model hates (reward 5e-5) among 15 invalid
    ones has advantage 3.45.

    >>> [round(a, 3) for a in group_advantages(torch.tensor([1.0, 0, 0, 0])).tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    if len(rewards_N) < 2 or bool((rewards_N == rewards_N[0]).all()):
        return torch.zeros_like(rewards_N)
    return (rewards_N - rewards_N.mean()) / (rewards_N.std().clamp(min=std_floor) + eps)


def grpo_loss(
    logp_BT, old_logp_BT, advantage_B, mask_BT, count, clip_low=0.2, clip_high=0.28, kl=0.0, ref_logp_BT=None
):
    """Clipped policy gradient, summed over tokens and divided by `count`, the number of trained tokens of ALL
    micro-batches and ranks: the result does not depend on how the batch is cut (the released code takes means of
    micro-batches, which makes a token of a long answer weigh less).

    In the first update after a rollout the ratio is 1 and the loss is about 0, since advantages sum to 0 in a group;
    its gradient is not. Returns (loss, metrics), metrics being sums over tokens, to be divided by `count`.
    """
    ratio_BT = (logp_BT - old_logp_BT).clamp(-20, 20).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantage_B1 = advantage_B[:, None]
    loss_BT = -torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
    metrics = {
        "clip_low": ((ratio_BT < 1 - clip_low) & (advantage_B1 < 0)) * mask_BT,
        "clip_high": ((ratio_BT > 1 + clip_high) & (advantage_B1 > 0)) * mask_BT,
    }
    if kl:
        gap_BT = (ref_logp_BT - logp_BT).clamp(-20, 20)
        kl_BT = gap_BT.exp() - gap_BT - 1  # k3: never negative, unbiased for the KL to the reference
        loss_BT = loss_BT + kl * kl_BT
        metrics["kl"] = kl_BT.detach() * mask_BT
    return (loss_BT * mask_BT).sum() / count, {name: value.sum().item() for name, value in metrics.items()}


def micro_batches(rollouts, token_budget):
    """Rollouts sorted by length and cut into lists that fit one forward pass."""
    order = sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.ids))
    batch = []
    for r in order:
        width = len(r.prompt_ids) + len(r.ids)
        if batch and width * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(r)
    yield batch


def tensors(rollouts, device):
    """Rollouts -> ids_BT, prompt_lengths_B, lengths_B, and old_logp, mask of shape [B, T-1] (entry t: token t+1)."""
    ids_BT, lengths_B = pad_rows([r.prompt_ids + r.ids for r in rollouts], device)
    prompt_lengths_B = torch.tensor([len(r.prompt_ids) for r in rollouts], device=device)
    old_logp_BT = torch.zeros(len(rollouts), ids_BT.shape[1] - 1, device=device)
    for row, r in zip(old_logp_BT, rollouts, strict=True):
        row[len(r.prompt_ids) - 1 : len(r.prompt_ids) + len(r.ids) - 1] = torch.tensor(r.old_logp, device=device)
    position_T = torch.arange(1, ids_BT.shape[1], device=device)
    mask_BT = (position_T >= prompt_lengths_B[:, None]) & (position_T < lengths_B[:, None])
    return ids_BT, prompt_lengths_B, lengths_B, old_logp_BT, mask_BT


def update(model, reference, optimizer, rollouts, args, device):
    """`--updates` optimizer steps on the rollouts that carry a signal -> the step's metrics, per trained token."""
    trained = [r for r in rollouts if r.advantage != 0.0]
    count = sum(len(r.ids) for r in trained)
    sums = Counter()
    if not trained:  # every group had equal rewards: nothing to learn from
        return {"loss": 0.0, "grad_norm": 0.0}
    for _ in range(args.updates):
        for batch in micro_batches(trained, args.token_budget):
            ids_BT, prompt_lengths_B, lengths_B, old_logp_BT, mask_BT = tensors(batch, device)
            advantage_B = torch.tensor([r.advantage for r in batch], device=device)
            where = (ids_BT, prompt_lengths_B, lengths_B, args.temperature)
            logp_BT, entropy_BT = token_logprobs(model, *where)
            with torch.no_grad():
                ref_logp_BT = token_logprobs(reference, *where)[0] if reference else None
            loss, metrics = grpo_loss(
                logp_BT, old_logp_BT, advantage_B, mask_BT, count, args.clip_low, args.clip_high, args.kl, ref_logp_BT
            )
            loss.backward()
            sums.update({**metrics, "entropy": (entropy_BT * mask_BT).sum().item(), "loss": loss.item() * count})
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {**{k: v / count / args.updates for k, v in sums.items()}, "grad_norm": float(grad_norm)}


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(model, tokenizer, problems, sandbox, args, reward_model=None, desc="evaluating"):
    """avg@n, pass@n and valid rate on held-out problems, by part (`problem.source`): {part: {name: [value a problem]}}.

    Samples are drawn from a random stream of their own (the same one at every evaluation), at the training temperature.
    """
    parts = {}
    for at in tqdm(range(0, len(problems), 64), desc=desc, leave=False, disable=None):
        chunk = problems[at : at + 64]
        keys = range(at, at + len(chunk))
        rollouts = rollout(model, tokenizer, chunk, args, args.eval_group, seed=10**9 + args.seed, keys=list(keys))
        audit(rollouts, sandbox)
        if reward_model:
            reward_rm(rollouts, reward_model)
        for i, problem in enumerate(chunk):
            group = rollouts[i * args.eval_group : (i + 1) * args.eval_group]
            passed, valid = [r.verdict == "pass" for r in group], [r.code is not None for r in group]
            part = parts.setdefault(problem.source or "all", {"avg": [], "any": [], "valid": [], "reward": []})
            for name, value in (("avg", mean(passed)), ("any", float(any(passed))), ("valid", mean(valid)),
                                ("reward", mean([r.reward for r in group]))):  # fmt: skip
                part[name].append(value)
    return parts


def mean(values):
    return sum(values) / len(values) if values else float("nan")


def together(parts, name):
    return [v for part in parts.values() for v in part[name]]


def eval_line(parts):
    names = {"avg@n": "avg", "pass@n": "any", "valid": "valid"}
    return " | ".join(f"{shown} {mean(together(parts, name)):.3f}" for shown, name in names.items())


def final_table(before, after, args):
    """Held-out results as lines of text, one a part of the data."""
    n = args.eval_group
    lines = [
        f"held-out problems ({args.eval_problems}), {n} samples each at temperature {args.temperature}, "
        f"extraction {args.extract}, graded by execution"
    ]
    lines.append(
        f"{'part':<16}{'problems':>9}{f'avg@{n}':>17}{'gain [95% interval]':>28}{f'pass@{n}':>17}{'valid':>17}"
    )
    for part in [*before, None] if len(before) > 1 else [None]:
        get = lambda parts, name: together(parts, name) if part is None else parts[part][name]  # noqa: E731, B023
        gains = [b - a for a, b in zip(get(before, "avg"), get(after, "avg"), strict=True)]
        gain, low, high = bootstrap(gains, range(len(gains)))
        cells = [f"{mean(get(before, m)):.3f} -> {mean(get(after, m)):.3f}" for m in ("avg", "any", "valid")]
        interval = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{part or 'all':<16}{len(gains):>9}{cells[0]:>17}{interval:>28}{cells[1]:>17}{cells[2]:>17}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------


def prompts_of(step, problems, args):
    """The problems of a step and a key for each prompt's random numbers: a function of step and seed alone."""
    numbers = range(step * args.prompts, (step + 1) * args.prompts)
    chosen = []
    for number in numbers:
        epoch, at = divmod(number, len(problems))
        order = list(range(len(problems)))
        random.Random(f"order-{args.seed}-{epoch}").shuffle(order)
        chosen.append(problems[order[at]])
    return chosen, list(numbers)


def set_advantages(rollouts, args):
    """Group-normalised advantages; a sample without a reward (the sandbox failed, not the program) gets 0 and is left
    out of its group's mean. Returns the share of groups whose rewards were all equal."""
    flat = 0
    for at in range(0, len(rollouts), args.group):
        group = [r for r in rollouts[at : at + args.group] if r.reward is not None]
        advantages_N = group_advantages(torch.tensor([r.reward for r in group]), args.std_floor)
        for r, advantage in zip(group, advantages_N.tolist(), strict=True):
            r.advantage = advantage
        flat += not advantages_N.any()
    return flat * args.group / len(rollouts)


def step_metrics(rollouts, metrics, tick):
    """What the step line and metrics.csv say about a step's rollouts."""
    tested = [r for r in rollouts if r.verdict is not None]
    tokens, seconds = sum(len(r.ids) for r in rollouts), time.time() - tick
    reasons = Counter(r.reason for r in rollouts if r.code is None)
    return {
        **metrics,
        "reward": mean([r.reward for r in rollouts if r.reward is not None]),
        "pass_rate": mean([r.verdict == "pass" for r in tested]) if tested else "",
        "valid_rate": mean([r.code is not None for r in rollouts]),
        "length": tokens / len(rollouts),
        "truncated": mean([not r.finished for r in rollouts]),
        "reasons": " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        "tokens": tokens,
        "seconds": seconds,
    }


def step_line(step, args, m, eta):
    clipped = m.get("clip_low", 0.0) + m.get("clip_high", 0.0)
    parts = [
        f"step {step}/{args.steps}",
        f"reward {m['reward']:.3f}",
        f"pass {m['pass_rate']:.2f}" if m["pass_rate"] != "" else "pass -",
        f"valid {m['valid_rate']:.2f}",
        f"kl {m.get('kl', 0.0):.4f}",
        f"clip {clipped:.3f}",
        f"ent {m.get('entropy', 0.0):.2f}",
        f"gnorm {m['grad_norm']:.2f}",
        f"len {m['length']:.0f}",
        f"{m['tokens'] / m['seconds'] / 1000:.1f}k tok/s",
        f"eta {format_eta(eta)}",
        m["reasons"],
    ]
    return " | ".join(part for part in parts if part)


def sample_row(step, r):
    return {
        "step": step, "problem": r.problem.id, "prompt": r.problem.prompt, "completion": r.text, "code": r.code,
        "reason": r.reason, "score": r.score, "reward": r.reward, "advantage": r.advantage, "verdict": r.verdict,
    }  # fmt: skip


def main():
    args = parse_args(Args)
    if args.reward not in ("rm", "exec"):
        raise UserError(f"--reward {args.reward}: expected rm or exec")
    args.out = args.out or f"out/grpo-{args.reward}"
    rank, world, device = setup(args.device)
    log = print if rank == 0 else lambda *_: None
    reward_model = RewardModel(args.rm, device=device) if args.reward == "rm" else None
    problems = load_problems(args.problems, args.limit, log=log)
    eval_problems = load_problems(args.eval_problems, args.limit, log=log)
    if args.reward == "exec":
        problems = [p for p in problems if p.tests]
        if not problems:
            raise UserError(f"--problems {args.problems}: none has tests, which --reward exec needs")
    run = Run(args, COLUMNS, rank)
    state = run.load()
    run.drop_samples_after(state["step"] if state else 0)
    tokenizer = Tokenizer(args.policy)
    model = load_model(run.checkpoint if state else args.policy, head="lm", device=device)
    reference = load_model(args.policy, head="lm", device=device).requires_grad_(False) if args.kl else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        log(f"continuing {run.dir} at step {state['step']}")

    with Sandbox(level=args.sandbox) as sandbox:
        step = state["step"] if state else 0
        before = state["before"] if state else evaluate(model, tokenizer, eval_problems, sandbox, args, reward_model)
        log(f"before: {eval_line(before)}")
        started, first = time.time(), step
        while step < args.steps:
            tick = time.time()
            for group in optimizer.param_groups:
                group["lr"] = lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
            chosen, keys = prompts_of(step, problems, args)
            rollouts = rollout(model, tokenizer, chosen, args, args.group, args.seed, keys)
            if args.reward == "exec" or step % args.audit_every == 0:
                audit(rollouts, sandbox)
            reward_exec(rollouts) if args.reward == "exec" else reward_rm(rollouts, reward_model)
            no_signal = set_advantages(rollouts, args)
            metrics = step_metrics(rollouts, update(model, reference, optimizer, rollouts, args, device), tick)
            step += 1
            log(step_line(step, args, metrics, (time.time() - started) / (step - first) * (args.steps - step)))
            if step % args.eval_every == 0 and step < args.steps:
                stride = max(1, len(eval_problems) // args.eval_limit)
                during = evaluate(model, tokenizer, eval_problems[::stride], sandbox, args, reward_model)
                metrics["eval"] = mean(together(during, "avg"))
                log(f"  held out ({len(together(during, 'avg'))} problems): {eval_line(during)}")
            run.append(sample_row(step, r) for r in rollouts)
            run.log(step=step, no_signal=no_signal, lr=lr, **metrics)
            if step % args.save_every == 0 or step == args.steps:
                run.save(model, tokenizer, optimizer=optimizer.state_dict(), step=step, before=before)
        after = state.get("after") if state and first == args.steps else None
        after = after or evaluate(model, tokenizer, eval_problems, sandbox, args, reward_model)
    run.save(model, tokenizer, optimizer=optimizer.state_dict(), step=step, before=before, after=after)
    log("\n" + "\n".join(final_table(before, after, args)) + f"\n\npolicy: {run.checkpoint}")


if __name__ == "__main__":
    run_cli(main)
