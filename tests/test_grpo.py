"""Rewards, advantage, loss, update and audit: grpo.py and metrics.py. Log-probabilities, padding
and stop tokens are in test_model.py, ranks in test_ranks.py, going on after a kill in test_runs.py.

pytest tests/test_grpo.py
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import codescaler as cs
import grpo
import metrics
import problems
from common import UserError
from grpo import group_advantages, grpo_loss, token_weights
from hub import Config
from pairs import Rollout
from problems import Problem

ROOT = Path(__file__).parents[1]
GOLDEN, TINY = ROOT / "tests" / "golden", ROOT / "tiny" / "policy"


def args(**changes):
    return dataclasses.replace(grpo.Args(temperature=1.0, kl=0.0), **changes)


PROBLEM = Problem("p", "statement")


# --------------------------------------------------------------------------------------------------
# advantage


@pytest.mark.parametrize(
    "rewards, wanted",
    [([1.0] + [0.0] * 7, [2.4749] + [-0.3536] * 7), ([0.3132] * 8, [0.0] * 8), ([2.0], [0.0]),
     ([], []), ([0.5, 0.50001, 0.5], [0.0] * 3), ([0.0] * 7 + [6e-4], [-0.0015] * 7 + [0.0105])],
)  # fmt: skip
def test_advantages_worked_examples(rewards, wanted):
    """The standard deviation is over N - 1; equal rewards and a single answer have no advantage,
    and one valid program that is hated among invalid ones gets no large one."""
    assert group_advantages(torch.tensor(rewards)).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("std_norm, std", [(True, 0.57735), (False, 1.0)])
def test_unknown_rewards_are_left_out_of_the_mean(std_norm, std):
    group = [Rollout(PROBLEM, reward=reward) for reward in (1.0, None, 0.0, 0.0)]
    grpo.set_advantages([group], args(std_norm=std_norm))
    wanted = [2 / 3 / std, 0, -1 / 3 / std, -1 / 3 / std]
    assert [r.advantage for r in group] == pytest.approx(wanted, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# rewards


CASES = [{"args": [i], "expected": 2} for i in range(6)]
TESTED = Problem("p", "statement", problems.Tests("call", CASES, entry_point="solve"))


@pytest.fixture
def executed(monkeypatch):
    """Instead of a sandbox: a program is its verdict. -> [(tests that were run, stop_early)]."""
    runs = []

    def execute(sandbox, rollouts, stop_early=True):
        runs.extend((r.problem.tests.cases, stop_early) for r in rollouts[:1])
        for r in rollouts:
            r.verdict, r.pass_rate = r.code or "invalid", 0.25 if r.code else 0.0

    monkeypatch.setattr(grpo, "execute", execute)
    return runs


def rewarded(programs, scores=None, **flags):
    """Rollouts of these programs with their rewards; a reward model has a score for each."""
    rollouts = [Rollout(TESTED, code=code) for code in programs]
    score_many = lambda items: [scores[item] for item in items]  # noqa: E731
    judges = grpo.Judges(SimpleNamespace(score_many=score_many), None, args(**flags))
    grpo.REWARDS[judges.args.reward](rollouts, judges)
    return rollouts, [r.reward for r in rollouts]


def test_rewards_of_the_reward_model(executed):
    programs = ["pass", "wrong_answer", None, "timeout"]
    scores = {("statement", code): score for code, score in zip(programs, [3.0, -30.0, 0, 900.0])}
    rollouts, rewards = rewarded(programs, scores)
    softplus = [math.log1p(math.exp(3.0)), math.exp(-30.0), 0.0, 900.0]
    assert rewards == pytest.approx(softplus, rel=1e-5) and rewards[1] > 0
    assert rewarded(programs, scores, shaping="raw")[1] == [3.0, -30.0, 0.0, 900.0]
    assert not executed
    grpo.audit([rollouts], None)
    assert [r.verdict for r in rollouts] == ["pass", "wrong_answer", "invalid", "timeout"]


def test_rewards_of_tests(executed):
    programs = ["pass", "wrong_answer", None, "harness_error", "unsupported"]
    rollouts, rewards = rewarded(programs, reward="exec")
    assert rewards == [1.0, 0.0, 0.0, None, None]
    assert rewarded(programs[1:], reward="partial")[1] == [0.25, 0.0, None, None]
    grpo.audit([rollouts], None)
    assert executed == [(CASES, True), (CASES, False)]  # a share needs all; nothing ran twice


def test_a_reward_that_sees_few_tests_is_audited_with_all(executed):
    for seed in (0, 0, 1):
        rollouts, rewards = rewarded(["pass"], reward="exec", reward_tests=2, seed=seed)
        assert rewards == [1.0] and rollouts[0].verdict is None
    grpo.audit([rollouts], None)
    few, same, other, every = (cases for cases, _ in executed)
    assert few == same != other and len(few) == len(other) == 2 and every == CASES


# --------------------------------------------------------------------------------------------------
# loss


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.3, 5.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_clip(ratio, advantage, dual_clip):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    advantage_B, one = torch.tensor([advantage]), torch.ones(1, 1)
    loss, found = grpo_loss(logp, one * 0, advantage_B, one, dual_clip=dual_clip)
    wanted = -min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage)
    bounded = dual_clip and advantage < 0 and wanted > dual_clip
    assert loss.item() == pytest.approx(dual_clip if bounded else wanted, rel=1e-5)
    loss.backward()
    is_clipped = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (logp.grad.item() == 0.0) == bool(is_clipped or bounded)
    assert found["clip_low"].item() + found["clip_high"].item() == float(is_clipped)


def test_an_exploding_ratio_stays_finite():
    logp = torch.tensor([[0.0, -900.0]], requires_grad=True)
    old, ref = torch.tensor([[-900.0, 0.0]]), torch.tensor([[900.0, -900.0]])
    loss, _ = grpo_loss(logp, old, -torch.ones(1), torch.ones(1, 2), kl=0.1, ref_logp_BT=ref)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()


def test_loss_equals_trl():
    """Losses and gradients of TRL's GRPOTrainer: with and without k3 KL, all three denominators,
    and the bound for bad tokens, which it calls delta."""
    data, norms = load_file(GOLDEN / "grpo.safetensors"), {"grpo": "seq", "dr_grpo": "const"}
    for i, case in enumerate(json.loads((GOLDEN / "grpo.json").read_text())):
        logp, mask = data["logps"].clone().requires_grad_(), data["mask"]
        old = data["old_logps"] if case["use_old_logps"] else logp.detach()
        norm = norms.get(case["loss_type"], "token")
        weight = token_weights(mask, norm, len(mask), int(mask.sum()), 16)
        loss, _ = grpo_loss(
            logp, old, data["advantages"], weight, dual_clip=case["delta"] or 0.0,
            kl=case["beta"], ref_logp_BT=data["ref_logps"],
        )  # fmt: skip
        loss.backward()
        assert torch.allclose(loss, data[f"loss.{i}"], atol=1e-10)
        assert torch.allclose(logp.grad, data[f"grad.{i}"], atol=1e-10)
    assert i == 16


# --------------------------------------------------------------------------------------------------
# the update of a small model


CONFIG = Config(
    vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, intermediate_size=48, tie_word_embeddings=True,
)  # fmt: skip


def small_model(seed=0):
    return cs.init_weights(cs.Qwen3(CONFIG), seed, std=0.2)


def sampled(shift=0.0, **sampling):
    """Four groups of rollouts with random rewards; `shift` is added to their log-probabilities."""
    prompts = [[1 + i, 2, 3 + i] for i in range(4)]
    rewards, groups = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).tolist(), []
    found = cs.generate(small_model(), prompts, 4, 7, stop_ids=[0], seed=3, **sampling)
    for i, answers in enumerate(found):
        groups.append([])
        for answer, reward in zip(answers, rewards[i], strict=True):
            facts = answer.ids, [logp + shift for logp in answer.logps], answer.support
            groups[-1].append(Rollout(PROBLEM, i, prompts[i], *facts, reward=reward))
    grpo.set_advantages(groups, args())
    return groups


def updated(groups, settings, lr=0.0, reference=None):
    """-> (metrics, [gradients of each optimizer step], model after)."""
    model, gradients = small_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    keep = lambda *_: gradients.append([p.grad.clone() for p in model.parameters()])  # noqa: E731
    optimizer.register_step_pre_hook(keep)
    return grpo.update(model, reference, optimizer, groups, settings, "cpu"), gradients, model


def same(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)


SAMPLING = [{}, {"temperature": 0.6}, {"temperature": 0.8, "top_p": 0.7, "top_k": 5}]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_ratio_is_one_before_the_first_update(sampling):
    """What the sampler calls a token's log-probability, the trainer does, too."""
    groups, temperature = sampled(**sampling), sampling.get("temperature", 1.0)
    found, _, _ = updated(groups, args(temperature=temperature))
    assert found["mismatch"] < 1e-5 and found["clip_low"] == found["clip_high"] == 0.0
    assert updated(groups, args(temperature=temperature + 0.4))[0]["mismatch"] > 0.01


@pytest.mark.parametrize(
    "changes",
    [{"kl": 0.5}, {"norm": "seq"}, {"norm": "const", "max_new_tokens": 40}, {"dual_clip": 1.5},
     {"clip_low": 0.7, "clip_high": 2.0}, {"checkpointing": True}, {"token_budget": 1},
     {"token_budget": 20}],
)  # fmt: skip
def test_update_is_the_gradient_of_the_loss_that_the_flags_ask_for(changes):
    """However the answers are cut into micro-batches, in any order."""
    groups, settings = sampled(shift=-1.0), args(**changes)  # ratios that clip
    groups[0][0].advantage = 0.0  # such an answer does not count
    backwards = [group[::-1] for group in groups[::-1]]
    found, (gradients,), _ = updated(backwards, settings, reference=small_model(1))
    model, total = small_model(), 0.0
    rows = [r for group in groups for r in group if r.advantage]
    samples, tokens = len(rows), sum(len(r.ids) for r in rows)
    for r in rows:
        ids, mask = torch.tensor([r.prompt_ids + r.ids]), torch.ones(1, len(r.ids)).bool()
        logp, ref = (
            cs.token_logprobs(m, m(ids)[0][:, 2:-1], ids[:, 3:], mask)[0]
            for m in (model, small_model(1))
        )
        weight = {"seq": 1 / len(r.ids) / samples, "const": 1 / samples / settings.max_new_tokens}
        weight_BT = torch.full_like(logp, weight.get(settings.norm, 1 / tokens))
        total += grpo_loss(
            logp, torch.tensor([r.old_logp]), torch.tensor([r.advantage]), weight_BT,
            settings.clip_low, settings.clip_high, settings.dual_clip, settings.kl, ref.detach(),
        )[0]  # fmt: skip
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert found["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
    assert same(gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("count, flags", [(4, {"norm": "const"}), (1, {"updates": 4})])
def test_metrics_are_means_over_tokens_whatever_the_norm_and_the_updates(count, flags):
    groups, a, b = sampled(shift=0.3)[:count], args(kl=0.5), args(kl=0.5, **flags)
    a, b = (updated(groups, some, reference=small_model(1))[0] for some in (a, b))
    for name in ("kl", "entropy", "clip_low", "clip_high"):
        assert a[name] == pytest.approx(b[name])
    assert a["kl"] > 0 and a["entropy"] > 0


def test_later_updates_have_another_ratio():
    narrow, groups = args(updates=2, clip_low=1e-4, clip_high=1e-4), sampled()
    still, moved = updated(groups, narrow, lr=0.0), updated(groups, narrow, lr=0.5)
    assert len(still[1]) == len(moved[1]) == 2  # each on its part of the groups
    assert still[0]["mismatch"] < 1e-5 and moved[0]["mismatch"] < 1e-5  # of the first update only
    clipped = [found["clip_low"] + found["clip_high"] for found, *_ in (still, moved)]
    assert clipped[0] < clipped[1]


def test_a_gradient_that_is_not_finite_is_skipped():
    groups = sampled()
    groups[0][0].advantage = math.nan
    found, gradients, model = updated(groups, args(), lr=1.0)
    assert found["skipped"] == 1 and not gradients
    assert all(map(torch.equal, model.parameters(), small_model().parameters()))


def test_no_signal_is_no_update():
    found, gradients, _ = updated([[Rollout(PROBLEM, ids=[1])] * 2], args())
    assert found == {"loss": 0.0, "grad_norm": 0.0} and not gradients


# --------------------------------------------------------------------------------------------------
# the step: prompts, refill, data, what is printed


@pytest.fixture(scope="module")
def tiny():
    return cs.load_model(TINY, device="cpu"), cs.Tokenizer(TINY)


def test_prompts_are_a_function_of_the_number_alone():
    some = [Problem(f"p{i}", "s") for i in range(7)]
    epochs = [[grpo.problem_at(n, some, 0).id for n in range(7 * e, 7 * e + 7)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [p.id for p in some] and epochs[0] != epochs[1]


@pytest.mark.parametrize("refill, drawn", [(1, 4 + 2), (9, 4 + 2 + 1 + 1)])
def test_refill_draws_prompts_until_enough_groups_carry_a_signal(
    refill, drawn, tmp_path, monkeypatch
):
    def reward(rollouts, judges):  # every second prompt is hopeless
        for i, r in enumerate(rollouts):
            r.reward = float(i % 2) * (r.number % 2)

    command = f"grpo.py --reward mine --prompts 4 --group 2 --steps 1 --refill {refill} --limit 20"
    command += f" --max-new-tokens 2 --eval-group 1 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setitem(grpo.REWARDS, "mine", reward)
    grpo.main()
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert state["cursor"] == drawn and [r["number"] for r in samples[::2]] == list(range(drawn))


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_enable_thinking_reaches_the_prompt(tiny, enable_thinking):
    settings = args(group=2, max_new_tokens=2, enable_thinking=enable_thinking)
    ((r, other),) = grpo.sample(*tiny, [PROBLEM], [5], settings)
    text = tiny[1].fast.decode(r.prompt_ids, skip_special_tokens=False)
    assert text.endswith("<think>\n\n</think>\n\n") != enable_thinking and r.number == 5


def test_data_that_cannot_be_used_is_left_out_aloud(tiny, monkeypatch):
    said = []
    judges = grpo.Judges(SimpleNamespace(fits=lambda text: len(text) % 2), None, None)

    def load(**flags):
        said.clear()
        settings = args(limit=40, **flags)
        asked = judges._replace(args=settings)
        return grpo.load_data(settings, tiny[1], asked, 0, 1, said.append)

    found, evaluated = load(eval_problems="toy:train")
    left_out = [line for line in said if "left out 0 without tests" in line]
    assert len(left_out) == 2 and 0 < len(found) < 40 and len(evaluated) == len(found)
    assert f"{len(found)} of {len(found)} evaluation problems are trained on" in said[-1]
    monkeypatch.setattr(grpo, "MAX_PROMPT", 3)
    with pytest.raises(UserError, match="--problems toy:train: no problem can be used"):
        load()


def row(**facts):
    return {"number": 1, "tokens": 4, "finished": True, "reward": 1.0, "advantage": 1.0,
            "reason": "ok", "code": "a = 1", "verdict": "pass"} | facts  # fmt: skip


def test_step_metrics_count_what_happened():
    found = metrics.step_metrics([
        row(),
        row(verdict="wrong_answer", finished=False),
        row(code=None, verdict="invalid", reason="no_block", reward=0.0, advantage=0.0, number=2),
        row(verdict="harness_error", reward=None, advantage=0.0, number=2),
    ])  # fmt: skip
    assert found == {
        "reward": pytest.approx(2 / 3), "pass_rate": pytest.approx(1 / 3), "valid_rate": 0.75,
        "length": 4, "truncated": 0.25, "reasons": "no_block:1", "groups": 2, "no_signal": 0.5,
        "code_length": 5, "tokens": 16,
    }  # fmt: skip


@pytest.mark.parametrize("cut, said", [(1, False), (2, True)])
def test_more_than_half_cut_is_said(cut, said):
    found = metrics.step_metrics([row(finished=i >= cut) for i in range(3)])
    line = metrics.step_line(1, 1, found | {"grad_norm": 1.0, "seconds": 1.0})
    assert ("raise --max-new-tokens" in line) == said


# --------------------------------------------------------------------------------------------------
# evaluation and audit


def judged(problem, number, verdicts):
    return [
        Rollout(problem, number, code=None if v == "invalid" else "x", verdict=v, reward=1.0)
        for v in verdicts
    ]


VERDICTS = [["pass", "wrong_answer", "harness_error"], ["unsupported", None], ["pass", "pass"]]


def test_problems_that_could_not_be_graded_leave_evaluations():
    some = [Problem(f"p{i}", "s", source="toy") for i in range(3)]
    answer = lambda asked, numbers: [judged(some[i], i, VERDICTS[i]) for i in numbers]  # noqa: E731
    rows = metrics.evaluate(answer, some, 1)
    assert [r["avg"] for r in rows] == [0.5, None, 1.0] and metrics.summary(rows)["eval"] == 0.75
    assert [r["passed"] for r in rows] == [[True, False], [], [True, True]]
    line = metrics.summary_line(rows)
    assert "avg@n 0.750" in line and "1 problems could not be graded" in line
    assert metrics.by_part(rows)["toy"]["avg"] == [0.5, 1.0]
    better = [r | {"avg": 1.0} for r in rows]  # graded after, not before: no comparison
    (found,) = metrics.final_rows(rows, better, 8)
    assert found["problems"] == 2 and found["avg@8"] == "0.750 -> 1.000"
    assert found["gain [95% interval]"].startswith("+0.250")


@pytest.mark.parametrize("count, calls", [(129, 2), (128, 1), (1, 1)])
def test_ranks_share_an_evaluation_and_judge_as_often(count, calls):
    """A sharded reward model is gathered in each call: a call less would hang the others."""

    def answer(few, numbers):
        asked.append(rank)
        return [judged(p, n, ["pass"]) for p, n in zip(few, numbers, strict=True)]

    some, rows, asked = [Problem(f"p{i}", "s") for i in range(count)], [], []
    for rank in range(2):
        rows += metrics.evaluate(answer, some, 1, rank, 2)
    assert asked == [0] * calls + [1] * calls
    assert sorted(r["number"] for r in rows) == list(range(count))


def evaluated(rewards, passed):
    avg = sum(passed) / len(passed)
    return {"rewards": rewards, "passed": passed, "reward": sum(rewards) / len(rewards), "avg": avg}


@pytest.mark.parametrize(
    "rewards, passed, auc, fail_top",
    [([2.0, 1.0], [True, False], 1.0, 0.0), ([2.0, 1.0], [False, True], 0.0, 1.0),
     ([1.0], [True], "", 0.0)],  # one kind: nothing is said
)  # fmt: skip
def test_audit_sees_a_reward_that_does_not_follow_execution(rewards, passed, auc, fail_top):
    row = evaluated(rewards, passed)
    wanted = {"audit_reward": row["reward"], "eval": row["avg"]}
    assert metrics.summary([row] * 5) == wanted | {"audit_auc": auc, "fail_top": fail_top}


@pytest.mark.parametrize("order", [1, -1])
def test_equal_rewards_do_not_bias_fail_top(order):
    found = metrics.summary([evaluated([1.0] * 400, ([True] * 200 + [False] * 200)[::order])])
    assert 0.3 < found["fail_top"] < 0.7 and found["audit_auc"] == 0.5


# --------------------------------------------------------------------------------------------------
# flags


def test_preset_and_wrong_choices(monkeypatch):
    def parsed(*argv):
        monkeypatch.setattr("sys.argv", ["grpo.py", *argv])
        return grpo.arguments()

    paper = parsed("--preset", "paper-8b", "--group", "4")
    assert (paper.group, paper.prompts, paper.lr, paper.top_k, paper.kl) == (4, 128, 1e-6, 20, 0)
    assert parsed("--reward", "exec").out == "out/grpo-exec"
    with pytest.raises(UserError, match="--reward-tests 2: --reward rm runs no tests"):
        parsed("--reward-tests", "2")
    wrong = "reward x,shaping x,norm x,preset x,group 1,extract x,seed -1"
    for argv in (f"--{flag}" for flag in wrong.split(",")):
        with pytest.raises(UserError, match=f"{argv}: expected"):
            parsed(*argv.split())
