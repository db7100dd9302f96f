"""Advantage, loss and batching of grpo.py.    pytest tests/test_grpo.py"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
from grpo import group_advantages, grpo_loss

GOLDEN = Path(__file__).parent / "golden"


def test_advantage_worked_example_and_definition():
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert group_advantages(rewards)[0].item() == pytest.approx(2.4749, abs=1e-4)  # N - 1, not N (2.6457)
    assert group_advantages(torch.tensor([1.0, 0, 0, 0])).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)


def test_equal_rewards_and_a_single_sample_have_no_advantage():
    assert group_advantages(torch.full((8,), 0.31326166)).tolist() == [0.0] * 8
    assert group_advantages(torch.tensor([2.0])).tolist() == [0.0]


def test_one_hated_valid_program_gets_no_large_advantage():
    rewards = torch.zeros(16)
    rewards[0] = 4.5e-5  # softplus(-10)
    assert group_advantages(rewards, std_floor=0.0)[0].item() > 3  # what happens without the floor
    assert group_advantages(rewards)[0].item() < 0.01


def test_advantages_equal_trl():
    """TRL's cases differ from ours in eps alone (1e-4 outside the root), so they are compared before the division."""
    cases = json.loads((GOLDEN / "advantages.json").read_text())
    checked = 0
    for case in cases:
        if case["scale_rewards"] != "group" or None in case["rewards"]:
            continue
        for i in range(0, len(case["rewards"]), 4):
            rewards = torch.tensor(case["rewards"][i : i + 4], dtype=torch.float64)
            ours = group_advantages(rewards, std_floor=0.0, eps=1e-4)
            assert torch.allclose(ours, torch.tensor(case["advantages"][i : i + 4], dtype=torch.float64), atol=1e-6)
            checked += 1
    assert checked


def closed_form(ratio, advantage, low=0.2, high=0.28):
    return -min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.3, 5.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clip(ratio, advantage):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    loss, _ = grpo_loss(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1), 1)
    assert loss.item() == pytest.approx(closed_form(ratio, advantage), rel=1e-5)
    loss.backward()
    is_clipped = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (logp.grad.item() == 0.0) == is_clipped


def test_loss_does_not_depend_on_how_the_batch_is_cut():
    torch.manual_seed(0)
    logp, old = torch.randn(8, 5), torch.randn(8, 5)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (8, 1))
    advantage, count = torch.randn(8), int(mask.sum())
    whole = grpo_loss(logp, old, advantage, mask, count)[0]
    parts = sum(
        grpo_loss(logp[i:j], old[i:j], advantage[i:j], mask[i:j], count)[0] for i, j in ((0, 3), (3, 4), (4, 8))
    )
    assert torch.allclose(whole, parts)
    # One long row of loss 0 and a short one of loss 1: 10 / 1010, not the mean of means.
    ratio = torch.zeros(2, 1000)
    mask = torch.arange(1000)[None] < torch.tensor([[10], [1000]])
    loss, _ = grpo_loss(ratio, ratio, torch.tensor([-1.0, 0.0]), mask, 1010)
    assert loss.item() == pytest.approx(0.0099, abs=1e-4)


def test_on_policy_gradient_is_reinforce():
    logp = torch.randn(2, 3, requires_grad=True)
    loss, _ = grpo_loss(logp, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 3), 6)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert torch.allclose(logp.grad, torch.tensor([[-1.0] * 3, [1.0] * 3]) / 6)


def test_loss_equals_trl():
    """Losses and gradients of TRL's GRPOTrainer for the loss that is built here: token-level clip, global token mean,
    with and without k3 KL."""
    data = load_file(GOLDEN / "grpo.safetensors")
    cases = json.loads((GOLDEN / "grpo.json").read_text())
    checked = 0
    for i, case in enumerate(cases):
        if case["loss_type"] not in ("bnpo", "dapo") or case["importance_sampling_level"] != "token":
            continue
        if case["delta"] is not None or (case["beta"] and case["use_bias_correction_kl"]):
            continue
        logp = data["logps"].clone().requires_grad_()
        old = data["old_logps"] if case["use_old_logps"] else logp.detach()
        loss, _ = grpo_loss(
            logp, old, data["advantages"], data["mask"], data["mask"].sum(), 0.2, 0.28, case["beta"], data["ref_logps"]
        )
        loss.backward()
        assert torch.allclose(loss, data[f"loss.{i}"], atol=1e-10)
        assert torch.allclose(logp.grad, data[f"grad.{i}"], atol=1e-10)
        checked += 1
    assert checked >= 4


def test_micro_batches_keep_every_rollout_within_the_budget():
    rollouts = [grpo.Rollout(None, [0] * (i % 7 + 1), [0] * (i % 5 + 1), [], True) for i in range(40)]
    batches = list(grpo.micro_batches(rollouts, 32))
    assert sorted(id(r) for b in batches for r in b) == sorted(map(id, rollouts))
    assert all(len(b) * max(len(r.prompt_ids) + len(r.ids) for r in b) <= 32 for b in batches)


def test_mask_covers_the_answer_and_its_stop_token_only():
    rows = [
        grpo.Rollout(None, [1, 2, 3], [4, 5], [-1.0, -2.0], True),
        grpo.Rollout(None, [1], [2, 3, 4, 5], [-1.0] * 4, True),
    ]
    ids, prompt_lengths, lengths, old, mask = grpo.tensors(rows, "cpu")
    assert mask.sum(1).tolist() == [2, 4]
    assert old[0].tolist() == [0, 0, -1, -2]
    assert mask[0].tolist() == [False, False, True, True]
