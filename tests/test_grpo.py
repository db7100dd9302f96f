"""Rewards, advantage, loss, batching and audit of grpo.py.    pytest tests/test_grpo.py

The correctness checklist of GRPO implementations (what other projects got wrong) and the test of each line:

    standard deviation of N - 1, its eps           test_advantage_worked_example, test_advantages_equal_trl
    near-zero spread                               test_equal_rewards_..., test_one_hated_valid_program_...
    groups of one, ragged groups                   test_equal_rewards_..., test_unknown_rewards_are_left_out
    group key                                      test_the_same_prompt_twice_makes_two_groups
    filtering of groups, refill                    test_refill_...
    top-p / top-k and the ratio                    test_ratio_is_one_before_the_first_update
    temperature in log-probabilities               test_ratio_is_one_before_the_first_update
    old log-probabilities over several updates     test_second_update_has_another_ratio
    rollout against training forward               test_ratio_is_one_before_the_first_update
    token mean over micro-batches and ranks        test_loss_does_not_..., test_gradient_..., test_ranks.py
    denominator after masking                      test_masked_samples_do_not_count
    token / sequence / constant mean               test_loss_equals_trl, test_norms_worked_example
    stop token inside the mask, pad equal to stop  test_completion_mask_... (tests/test_model.py)
    truncated answers                              test_masked_samples_do_not_count
    clip, dual clip, their metrics                 test_clip, test_dual_clip
    log-ratio overflow                             test_an_exploding_ratio_stays_finite
    KL                                             test_loss_equals_trl, test_k3_is_the_kl_in_expectation
    entropy, padded vocabulary, fp32 log-softmax   tests/test_model.py
    gradient clipping, non-finite steps            test_a_gradient_that_is_not_finite_is_skipped
    detached advantage                             advantages are floats
    over-optimisation                              test_audit_..., test_gap_...
    resume                                         tests/test_runs.py
    one extractor                                  rollout() serves training and evaluation
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import codescaler
import grpo
import problems
from codescaler import Config, Qwen3, init_weights
from common import UserError
from grpo import Rollout, group_advantages, grpo_loss, token_weights
from problems import Problem

GOLDEN = Path(__file__).parent / "golden"


# ----------------------------------------------------------------------------------------------------------------------
# advantage


def test_advantage_worked_example_and_definition():
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert group_advantages(rewards)[0].item() == pytest.approx(2.4749, abs=1e-4)  # N - 1, not N (2.6457)
    assert group_advantages(torch.tensor([1.0, 0, 0, 0])).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert group_advantages(torch.tensor([1.0, 0, 0, 0]), std_norm=False).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_and_a_single_sample_have_no_advantage():
    assert group_advantages(torch.full((8,), 0.31326166)).tolist() == [0.0] * 8
    assert group_advantages(torch.tensor([2.0])).tolist() == [0.0]
    assert group_advantages(torch.tensor([])).tolist() == []
    assert group_advantages(torch.tensor([0.5, 0.5 + 1e-6, 0.5]), min_spread=1e-4).tolist() == [0.0] * 3


def test_one_hated_valid_program_gets_no_large_advantage():
    rewards = torch.zeros(16)
    rewards[0] = 4.5e-5  # softplus(-10)
    assert group_advantages(rewards, std_floor=0.0)[0].item() > 3  # what happens without the floor
    assert group_advantages(rewards)[0].item() < 0.01


def test_advantages_equal_trl():
    """TRL's cases differ from ours in eps alone (1e-4 outside the root); "none" is Dr. GRPO."""
    checked = set()
    for case in json.loads((GOLDEN / "advantages.json").read_text()):
        if case["scale_rewards"] == "batch":
            continue
        for i in range(0, len(case["rewards"]), 4):
            known = [j for j in range(i, i + 4) if case["rewards"][j] is not None]
            rewards = torch.tensor([case["rewards"][j] for j in known], dtype=torch.float64)
            ours = group_advantages(rewards, case["scale_rewards"] == "group", std_floor=0.0, eps=1e-4)
            wanted = torch.tensor([case["advantages"][j] for j in known], dtype=torch.float64)
            assert torch.allclose(ours, wanted, atol=1e-6)
            checked.add(case["scale_rewards"])
    assert checked == {"group", "none"}


def args(**changes):
    return dataclasses.replace(grpo.Args(temperature=1.0), **changes)


def test_unknown_rewards_are_left_out():
    group = [Rollout(None, 0, [1], [2], [0.0], reward=reward) for reward in (1.0, None, 0.0, 0.0)]
    grpo.set_advantages([group], args(std_floor=0.0))
    assert [r.advantage for r in group] == pytest.approx([1.1547, 0.0, -0.5774, -0.5774], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# rewards


CALL = problems.Tests("call", [{"args": [1], "expected": 2}], entry_point="solve")


def judged(verdicts, reward, tests=CALL, **changes):
    problem = Problem("p", "statement", tests)
    rows = []
    for verdict, score in verdicts:
        r = Rollout(problem, 0, [1], [2], [0.0], code=None if verdict == "invalid" else "x", score=score)
        r.verdict, r.pass_rate = verdict if tests else None, 0.25
        rows.append(r)
    reward(rows, **changes)
    return [r.reward for r in rows]


def test_rewards_of_every_kind():
    rows = [("pass", 3.0), ("wrong_answer", -1.0), ("invalid", None), ("harness_error", 0.0)]
    softplus = [math.log1p(math.exp(s)) for s in (3.0, -1.0, 0.0)]
    assert judged(rows, grpo.reward_rm) == pytest.approx([softplus[0], softplus[1], 0.0, softplus[2]])
    assert judged(rows, grpo.reward_rm, shaping="raw") == [3.0, -1.0, 0.0, 0.0]
    assert judged(rows, grpo.reward_exec) == [1.0, 0.0, 0.0, None]
    assert judged(rows[1:2] + rows[3:], grpo.reward_partial) == [0.25, None]
    calibration = {"slope": 2.0, "intercept": 0.0}
    assert judged(rows, grpo.reward_hybrid, calibration=calibration) == [1.0, 0.0, 0.0, None]
    no_tests = judged(rows[:3], grpo.reward_hybrid, tests=None, calibration=calibration)
    assert no_tests == pytest.approx([1 / (1 + math.exp(-6)), 1 / (1 + math.exp(2)), 0.0])


def test_every_valid_answer_beats_every_invalid_one():
    valid = judged([("wrong_answer", s) for s in (-80.0, -5.0, 0.0, 900.0)], grpo.reward_rm)
    assert all(reward > 0 for reward in valid) and valid == sorted(valid) and math.isfinite(valid[-1])


@pytest.mark.parametrize("kind", ["bare", "full"])
def test_the_reward_model_is_given_what_it_was_trained_to_read(kind):
    asked = []
    judge = grpo.Judge(args(reward="exec"), "cpu", None)
    judge.reward_model = SimpleNamespace(prompt=kind, score_many=lambda items: (asked.extend(items), [1.5])[1])
    problem = Problem("a", "Add.")
    rollout = Rollout(problem, 0, [1], [2], [0.0], code="x = 1")
    judge.score([rollout])
    assert asked == [("Add." if kind == "bare" else problems.policy_prompt(problem), "x = 1")] and rollout.score == 1.5


def test_evaluation_leaves_out_what_could_not_be_graded(monkeypatch):
    verdicts = ["pass", "wrong_answer", "harness_error", "unsupported"]
    group = [Rollout(Problem("a", "p"), 0, [1], [2], [0.0], code="x", verdict=v, reward=1.0) for v in verdicts]
    monkeypatch.setattr(grpo, "rollout", lambda *_: [group])
    (row,) = grpo.evaluate(None, None, [group[0].problem], 1, lambda rollouts: None, args())
    assert row["avg"] == 0.5 and row["any"] == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# loss


def loss_of(logp, old, advantage, mask, norm="token", samples=None, tokens=None, longest=16, **rest):
    samples, tokens = samples or len(mask), tokens or int(mask.sum())
    return grpo_loss(logp, old, advantage, token_weights(mask, norm, samples, tokens, longest), **rest)


def closed_form(ratio, advantage, low=0.2, high=0.28):
    return -min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.3, 5.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clip(ratio, advantage):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    loss, metrics = loss_of(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    assert loss.item() == pytest.approx(closed_form(ratio, advantage), rel=1e-5)
    loss.backward()
    is_clipped = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (logp.grad.item() == 0.0) == is_clipped
    assert metrics["clip_low"].item() + metrics["clip_high"].item() == float(is_clipped)


def test_dual_clip():
    for ratio, advantage, wanted in ((5.0, -1.0, 3.0), (2.0, -1.0, 2.0), (5.0, 1.0, -1.28), (0.1, -2.0, 1.6)):
        logp = torch.tensor([[ratio]]).log().requires_grad_()
        loss, _ = loss_of(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), dual_clip=3.0)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
    clipped, _ = loss_of(logp, torch.zeros(1, 1) - 9, torch.tensor([-1.0]), torch.ones(1, 1), dual_clip=3.0)
    assert torch.autograd.grad(clipped, logp)[0].item() == 0.0


def test_an_exploding_ratio_stays_finite():
    logp = torch.tensor([[0.0, -900.0]], requires_grad=True)
    old, ref = torch.tensor([[-900.0, 0.0]]), torch.tensor([[900.0, -900.0]])
    loss, _ = loss_of(logp, old, torch.tensor([-1.0]), torch.ones(1, 2), kl=0.1, ref_logp_BT=ref)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()


def test_loss_does_not_depend_on_how_the_batch_is_cut():
    torch.manual_seed(0)
    logp, old = torch.randn(8, 5), torch.randn(8, 5)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (8, 1))
    advantage, tokens = torch.randn(8), int(mask.sum())
    for norm in ("token", "seq", "const"):
        whole = loss_of(logp, old, advantage, mask, norm)[0]
        parts = [
            loss_of(logp[i:j], old[i:j], advantage[i:j], mask[i:j], norm, 8, tokens)
            for i, j in ((0, 3), (3, 4), (4, 8))
        ]
        assert torch.allclose(whole, sum(loss for loss, _ in parts))
        cut = torch.cat([metrics["clip_low"] for _, metrics in parts])
        assert loss_of(logp, old, advantage, mask, norm)[1]["clip_low"].equal(cut)


def test_norms_worked_example():
    """One row of 10 tokens and loss 1, one of 1000 tokens and loss 0: the mean over tokens is 10 / 1010."""
    same, advantage = torch.zeros(2, 1000), torch.tensor([-1.0, 0.0])
    mask = torch.arange(1000)[None] < torch.tensor([[10], [1000]])
    for norm, wanted in (("token", 10 / 1010), ("seq", 0.5), ("const", 10 / (2 * 2000))):
        assert loss_of(same, same, advantage, mask, norm, longest=2000)[0].item() == pytest.approx(wanted, rel=1e-5)
        wider = loss_of(*(torch.nn.functional.pad(t, (0, 50)) for t in (same, same)), advantage,
                        torch.nn.functional.pad(mask, (0, 50)), norm, longest=2000)[0]  # fmt: skip
        assert wider.item() == pytest.approx(wanted, rel=1e-5)


def test_on_policy_gradient_is_reinforce():
    logp = torch.randn(2, 3, requires_grad=True)
    loss, _ = loss_of(logp, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert torch.allclose(logp.grad, torch.tensor([[-1.0] * 3, [1.0] * 3]) / 6)


def test_loss_equals_trl():
    """Losses and gradients of TRL's GRPOTrainer for what is built here: token-level ratio, with and without k3 KL, all
    three denominators."""
    data = load_file(GOLDEN / "grpo.safetensors")
    norms, checked = {"bnpo": "token", "dapo": "token", "grpo": "seq", "dr_grpo": "const"}, set()
    for i, case in enumerate(json.loads((GOLDEN / "grpo.json").read_text())):
        if case["loss_type"] not in norms or case["importance_sampling_level"] != "token":
            continue
        if case["delta"] is not None or (case["beta"] and case["use_bias_correction_kl"]):
            continue
        logp = data["logps"].clone().requires_grad_()
        old = data["old_logps"] if case["use_old_logps"] else logp.detach()
        loss, _ = loss_of(
            logp, old, data["advantages"], data["mask"], norms[case["loss_type"]],
            clip_low=0.2, clip_high=0.28, kl=case["beta"], ref_logp_BT=data["ref_logps"],
        )  # fmt: skip
        loss.backward()
        assert torch.allclose(loss, data[f"loss.{i}"], atol=1e-10)
        assert torch.allclose(logp.grad, data[f"grad.{i}"], atol=1e-10)
        checked.add((case["loss_type"], bool(case["beta"])))
    assert checked >= {(name, kl) for name in norms for kl in (False, True)}


def test_k3_is_the_kl_in_expectation():
    torch.manual_seed(0)
    p, q = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    zero = torch.zeros(5, 1)
    _, metrics = grpo_loss(p[:, None], p[:, None], zero[:, 0], zero, kl=1.0, ref_logp_BT=q[:, None])
    assert (metrics["kl"][:, 0] * p.exp()).sum().item() == pytest.approx(exact.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# batches, and the update on a small model


def test_micro_batches_keep_to_the_budget_and_to_what_is_trained():
    group = [Rollout(None, 0, [0] * 5, [0] * (i % 9 + 1), [], advantage=float(i % 4)) for i in range(40)]
    batches = list(grpo.micro_batches(group, 32))
    assert sorted(id(r) for b in batches for r in b) == sorted(id(r) for r in group if r.advantage)
    assert all(5 + len(b) * max(len(r.ids) for r in b) <= 32 for b in batches)


CONFIG = Config(
    vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6,
)  # fmt: skip


def small_model():
    model = Qwen3(CONFIG, head="lm")
    init_weights(model, seed=0, std=0.2)
    return model


def sampled(model, groups=4, group=4, **sampling):
    """Groups of rollouts with random rewards, sampled from the model."""
    prompts = [[1 + i, 2, 3 + i] for i in range(groups)]
    found = codescaler.generate(model, prompts, n=group, max_new_tokens=7, stop_ids=[0], seed=3, **sampling)
    torch.manual_seed(1)
    rows = [
        [Rollout(None, i, prompt, c.ids, c.logps, c.finished, c.support, reward=torch.rand(()).item()) for c in answers]
        for i, (prompt, answers) in enumerate(zip(prompts, found))
    ]
    grpo.set_advantages(rows, args())
    return rows


def updated(rows, settings, lr=0.0, reference=None):
    model = small_model()
    gradients = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = optimizer.step
    optimizer.step = lambda: (gradients.update({n: p.grad.clone() for n, p in model.named_parameters()}), step())
    return grpo.update(model, reference, optimizer, rows, settings, "cpu"), gradients, model


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"temperature": 0.8, "top_p": 0.7, "top_k": 5}])
def test_ratio_is_one_before_the_first_update(sampling):
    """What the sampler calls a token's log-probability, the trainer does too: temperature and truncated support."""
    rows = sampled(small_model(), **sampling)
    settings = args(temperature=sampling.get("temperature", 1.0), kl=0.0)
    metrics, _, _ = updated(rows, settings)
    assert metrics["mismatch"] < 1e-5 and metrics["clip_low"] == metrics["clip_high"] == 0.0
    if sampling:
        wrong, _, _ = updated(rows, args(temperature=1.0, kl=0.0))
        assert wrong["mismatch"] > 0.01


def other_model(by=0.05):
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        dict(kl=0.5),
        dict(kl=0.0, norm="seq"),
        dict(kl=0.0, norm="const", max_new_tokens=40),
        dict(kl=0.0, dual_clip=1.5),
    ],
)
def test_update_is_the_gradient_of_the_loss_that_the_flags_ask_for(changes):
    rows, settings = sampled(small_model()), args(**changes)
    for group in rows:  # as if another policy had sampled: ratios that clip
        for r in group:
            r.old_logp = [logp - 1.0 for logp in r.old_logp]
    metrics, found, _ = updated(rows, settings, reference=other_model() if settings.kl else None)
    model, flat, losses = small_model(), [r for group in rows for r in group], []
    samples, tokens = len(flat), sum(len(r.ids) for r in flat)
    for r in flat:
        logp, ref = (codescaler.group_logprobs(m, r.prompt_ids, [r.ids])[0] for m in (model, other_model()))
        weight = {"token": 1 / tokens, "seq": 1 / len(r.ids) / samples, "const": 1 / samples / settings.max_new_tokens}
        loss, _ = grpo_loss(
            logp, torch.tensor([r.old_logp]), torch.tensor([r.advantage]),
            torch.full_like(logp, weight[settings.norm]), dual_clip=settings.dual_clip, kl=settings.kl,
            ref_logp_BT=ref.detach(),
        )  # fmt: skip
        losses.append(loss)
    sum(losses).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(sum(losses).item(), rel=1e-4, abs=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_flags_of_the_advantage_reach_it():
    group = [Rollout(None, 0, [1], [2], [0.0], reward=reward) for reward in (1.0, 0.0, 0.0, 0.0)]
    grpo.set_advantages([group], args(std_norm=False))
    assert group[0].advantage == 0.75
    group = [Rollout(None, 0, [1], [2], [0.0], reward=reward) for reward in (0.01, 0.0)]
    grpo.set_advantages([group], args(min_spread=0.1))
    assert not grpo.has_signal(group)


def test_metrics_are_means_over_tokens_whatever_the_norm_and_the_number_of_updates():
    rows = sampled(small_model())
    (one, _, _), (const, _, _) = (
        updated(rows, args(kl=0.5, norm=n), reference=other_model()) for n in ("token", "const")
    )
    alone = [updated(rows[:1], args(kl=0.5, updates=n), reference=other_model())[0] for n in (1, 4)]
    for name in ("kl", "entropy", "clip_low", "clip_high"):
        assert one[name] == pytest.approx(const[name]) and alone[0][name] == pytest.approx(alone[1][name])
    assert one["kl"] > 0 and one["entropy"] > 0


def test_gradient_does_not_depend_on_micro_batches_or_order():
    rows = sampled(small_model())
    whole = updated(rows, args(kl=0.0, token_budget=10**6))[1]
    cut = updated([group[::-1] for group in rows[::-1]], args(kl=0.0, token_budget=1))[1]
    for name, gradient in whole.items():
        assert torch.allclose(gradient, cut[name], rtol=1e-4, atol=1e-6), name


def test_second_update_has_another_ratio():
    rows = sampled(small_model())
    one = updated(rows, args(kl=0.0, epochs=2), lr=0.0)[0]
    two = updated(rows, args(kl=0.0, epochs=2, clip_low=1e-4, clip_high=1e-4), lr=0.5)[0]
    assert one["mismatch"] < 1e-5 and two["mismatch"] < 1e-5  # measured in the first pass only
    assert one["clip_low"] + one["clip_high"] < two["clip_low"] + two["clip_high"]


def test_updates_deal_the_groups_to_several_steps():
    rows = sampled(small_model())
    counts = []
    step = torch.optim.SGD.step
    optimizer = torch.optim.SGD((model := small_model()).parameters(), lr=0.0)
    optimizer.step = lambda: (counts.append(1), step(optimizer))
    grpo.update(model, None, optimizer, rows, args(kl=0.0, updates=2, epochs=3), "cpu")
    assert len(counts) == 6


def test_masked_samples_do_not_count():
    """--mask-truncated: the denominator is that of the samples that are left."""
    rows = sampled(small_model())
    for group in rows:
        group[0].finished = False
        for r in group[1:]:
            r.finished = True
    grpo.set_advantages(rows, args(mask_truncated=True))
    assert all(group[0].advantage == 0 and group[1].advantage != 0 for group in rows)
    masked = updated(rows, args(kl=0.0))
    kept = updated([group[1:] for group in rows], args(kl=0.0))
    assert masked[0]["loss"] == pytest.approx(kept[0]["loss"], rel=1e-6)
    assert all(torch.equal(masked[1][name], kept[1][name]) for name in kept[1])


def test_a_gradient_that_is_not_finite_is_skipped():
    rows = sampled(small_model())
    rows[0][0].advantage = math.nan
    metrics, gradients, model = updated(rows, args(kl=0.0), lr=1.0)
    assert metrics["skipped"] == 1 and not gradients
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters()))


def test_no_signal_is_no_update():
    rows = sampled(small_model())
    for r in (r for group in rows for r in group):
        r.advantage = 0.0
    metrics, gradients, _ = updated(rows, args())
    assert metrics == {"loss": 0.0, "grad_norm": 0.0} and not gradients


# ----------------------------------------------------------------------------------------------------------------------
# the step: prompts, refill, audit


class Letters:
    """A tokenizer of single characters, as far as a rollout needs one."""

    stop_ids = [0]

    def encode(self, text):
        return [1 + ord(c) % 20 for c in text[-6:]]

    def decode(self, ids):
        return "```python\nx = " + str(sum(ids)) + "\nprint(x)\n```"

    def chat(self, messages, add_generation_prompt=False):
        return messages[0]["content"]


def problem(i):
    return Problem(f"p{i}", f"statement {i}", CALL)


def test_prompts_are_a_function_of_the_number_alone():
    problems = [problem(i) for i in range(7)]
    epoch = [grpo.problem_of(n, problems, seed=0).id for n in range(7)]
    assert sorted(epoch) == sorted(p.id for p in problems)
    assert epoch != [grpo.problem_of(n, problems, seed=0).id for n in range(7, 14)]


def test_the_same_prompt_twice_makes_two_groups():
    settings = args(group=3, max_new_tokens=5)
    groups = grpo.rollout(small_model(), Letters(), [problem(0)] * 2, [4, 9], settings, 3, 0, 1.0, 1.0)
    assert [len(group) for group in groups] == [3, 3] and [group[0].number for group in groups] == [4, 9]
    assert [r.ids for r in groups[0]] != [r.ids for r in groups[1]]  # other random numbers


def test_refill_draws_prompts_until_enough_groups_carry_a_signal():
    problems, asked = [problem(i) for i in range(50)], []

    def judge(rollouts, run_tests):
        for i, r in enumerate(rollouts):  # every second prompt is hopeless
            r.reward = float(i % 2) if r.number % 2 else 0.0
        asked.append(sorted({r.number for r in rollouts}))

    def sample(refill, rank=0, world=1):
        asked.clear()
        settings = args(prompts=8, group=2, max_new_tokens=5, refill=refill)
        return grpo.sample_groups(small_model(), Letters(), problems, 100, judge, settings, True, rank, world)

    groups, cursor = sample(0)
    assert cursor == 108 and len(groups) == 8 and sum(map(grpo.has_signal, groups)) == 4
    groups, cursor = sample(1)
    assert asked == [list(range(100, 108)), list(range(108, 112))] and cursor == 112
    groups, cursor = sample(9)
    assert sum(map(grpo.has_signal, groups)) == 8 and cursor == len(groups) + 100
    assert [r.ids for r in groups[0]] == [r.ids for r in sample(0)[0][0]]  # deterministic


def row(rewards, passed):
    return {"rewards": rewards, "passed": passed, "reward": grpo.mean(rewards), "avg": grpo.mean(passed)}


def test_audit_sees_a_reward_that_does_not_follow_execution():
    good = grpo.audit([row([2.0, 1.0], [True, False])] * 5)
    bad = grpo.audit([row([2.0, 1.0], [False, True])] * 5)
    assert (good["audit_auc"], good["fail_top"]) == (1.0, 0.0)
    assert (bad["audit_auc"], bad["fail_top"]) == (0.0, 1.0)
    assert bad["eval"] == 0.5 and bad["audit_reward"] == 1.5
    assert grpo.audit([row([1.0], [True])])["audit_auc"] == ""  # one kind only: nothing can be said


def test_gap_counts_audits_in_which_only_the_reward_rises():
    assert grpo.gap([(1.0, 0.3)]) == 0
    assert grpo.gap([(1.0, 0.3), (1.5, 0.4), (1.8, 0.4), (2.0, 0.3)]) == 2
    assert grpo.gap([(1.0, 0.3), (2.0, 0.2), (1.9, 0.1)]) == 0


def test_step_metrics_count_what_happened():
    base = {"tokens": 4, "finished": True, "reward": 1.0, "advantage": 1.0, "reason": "ok", "number": 1}
    rows = [
        base | {"code": "def f(a): return a  # one", "verdict": "pass"},
        base | {"code": "def f(b): return b", "verdict": "wrong_answer", "finished": False},
        base | {"code": None, "verdict": "invalid", "reason": "no_block", "advantage": 0.0, "number": 2},
        base | {"code": "c = 2", "verdict": "harness_error", "reward": None, "advantage": 0.0, "number": 2},
    ]
    m = grpo.step_metrics(rows)
    assert m["pass_rate"] == pytest.approx(1 / 3) and m["valid_rate"] == 0.75 and m["truncated"] == 0.25
    assert m["reasons"] == "no_block:1" and m["no_signal"] == 0.5 and m["groups"] == 2 and m["tokens"] == 16
    assert m["comment_share"] == pytest.approx(1 / 3) and m["duplicate_share"] == pytest.approx(1 / 3)


def test_preset_and_wrong_choices(monkeypatch):
    def parsed(*argv):
        monkeypatch.setattr("sys.argv", ["grpo.py", *argv])
        return grpo.arguments()

    paper = parsed("--preset", "paper-8b", "--group", "4")
    assert (paper.group, paper.prompts, paper.lr, paper.top_k, paper.kl, paper.dual_clip) == (4, 128, 1e-6, 20, 0, 3.0)
    assert parsed("--reward", "exec").out == "out/grpo-exec"
    for argv in (["--reward", "x"], ["--shaping", "x"], ["--norm", "x"], ["--preset", "x"], ["--group", "0"]):
        with pytest.raises(UserError, match=argv[0]):
            parsed(*argv)


def test_the_table_says_what_is_not_held_out():
    row = {"part": "toy", "avg": 0.5, "any": 1.0, "valid": 1.0, "reward": 0.5}
    for trained_on, wanted in ((0, "held-out problems (toy:test)"), (3, "problems, 3 of them trained on (toy:test)")):
        assert grpo.final_table([row], [row], grpo.Args(), trained_on)[0].startswith(wanted)
