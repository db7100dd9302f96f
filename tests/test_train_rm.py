"""Loss, batches, updates and the table of train_rm.py.    pytest tests/test_train_rm.py"""

import ast
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import CONFIG, same

import codescaler as cs
import common
import metrics
import train_rm
from pairs import MUTANT, Pair, Rollout
from problems import Problem
from tiny import make
from train_rm import EncodedPair, batch_of, pairwise_loss

ROOT = Path(__file__).parents[1]

# --------------------------------------------------------------------------------------------------
# loss


def test_pairwise_loss_equals_trl():
    cases = json.loads((ROOT / "tests" / "golden" / "bradley_terry.json").read_text())
    for case in cases:
        chosen, rejected = (
            torch.tensor(case[k], dtype=torch.float64, requires_grad=True)
            for k in ("chosen", "rejected")
        )
        margin = torch.tensor(case["margin"] or 0.0, dtype=torch.float64)
        center = case["center_rewards_coefficient"] or 0.0
        loss = pairwise_loss(chosen, rejected, margin, center)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
        for found, wanted in ((chosen, "grad_chosen"), (rejected, "grad_rejected")):
            assert found.grad.tolist() == pytest.approx(case[wanted], rel=1e-9, abs=1e-15)
    assert len(cases) >= 6


def test_centring_pulls_the_mean_score_of_a_pair_to_its_target():
    scores = torch.tensor([4.0, 5.0]), torch.tensor([2.0, 3.0])  # means 3 and 4, both 2 apart
    plain, centred = (pairwise_loss(*scores, 0.0, c, center_at=3.0).item() for c in (0.0, 0.5))
    assert centred == pytest.approx(plain + 0.5 * (8 - 6) ** 2 / 2)


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [train_rm.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


# --------------------------------------------------------------------------------------------------
# batches and updates


def test_batches_visit_every_pair_once_an_epoch_and_keep_problems_together():
    problems = [f"p{i // 5}" for i in range(20)]
    epoch = [i for step in range(5) for i in batch_of(step, problems, 4, seed=0)]
    assert sorted(epoch) == list(range(20))
    assert batch_of(5, problems, 4, seed=0) != batch_of(0, problems, 4, seed=0)
    assert sum(problems[a] != problems[b] for a, b in zip(epoch, epoch[1:])) <= 8  # two runs each


def random_pairs(count=12):
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(5, 24), k=rng.randint(3, 9))) for _ in range(4)]
    ids = lambda: tuple(rng.choices(range(5, 24), k=rng.randint(1, 7)))  # noqa: E731
    return [EncodedPair(rng.choice(prompts), ids(), ids(), "p") for _ in range(count)]


def small_model():
    model = cs.init_weights(cs.Qwen3(CONFIG, "score"), seed=0, std=0.2)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


def updated(pairs, **flags):
    """-> (loss, accuracy, margin, norm, skipped), gradients."""
    model, gradients = small_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step = lambda: gradients.extend(p.grad.clone() for p in model.parameters())
    return train_rm.update(model, optimizer, pairs, train_rm.Args(**flags)), gradients


@pytest.mark.parametrize("flags", [{"center": 0.0}, {"center": 0.3}, {"token_budget": 20}])
def test_update_is_the_gradient_of_the_loss_over_whole_rows(flags):
    pairs = random_pairs()
    pairs.append(pairs[0]._replace(rejected=pairs[1].rejected))  # a program in two pairs
    model, center = small_model(), flags.get("center", 0.01)
    ids, lengths = cs.pad_rows(
        [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
    )
    chosen, rejected = model.score(model(ids)[0], lengths).chunk(2)
    pairwise_loss(chosen, rejected, 0.0, center, center_at=3.0).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    found, gradients = updated(pairs, **flags)
    gap = (chosen - rejected).detach()
    loss = pairwise_loss(chosen, rejected).item()  # ln 2 at equal scores, whatever --center is
    wanted = [loss, (gap > 0).float().mean().item(), gap.mean().item(), norm]
    assert found[:4] == pytest.approx(wanted, rel=1e-4) and not found[4]
    assert same(gradients, [p.grad for p in model.parameters()])


def test_a_gradient_that_is_not_finite_is_skipped(monkeypatch):
    plain = train_rm.score_pairs
    monkeypatch.setattr(train_rm, "score_pairs", lambda *a: [s * math.inf for s in plain(*a)])
    found, gradients = updated(random_pairs())
    assert found[4] and not gradients


def test_pairs_that_cannot_be_learned_are_left_out_aloud():
    tokenizer, said = cs.Tokenizer(ROOT / "tiny" / "policy"), []
    code, same_start = "x = 1", "y = 2\n" * 99
    pairs = [
        Pair("Return 1.", code, "x = 2", "a#0", "s"),
        Pair("long " * 99, code, "x = 2", "b#0", "s"),
        Pair("Return 2.", same_start + "1", same_start + "2", "c#0", "s"),
        Pair("Return 3.", code, "\n\nx = 1", "d#0", "s"),
        Pair("Return 4.", code, same_start, "e#0", "s"),
    ]
    encoded = train_rm.encode_pairs(tokenizer, pairs, 60, said.append)
    assert {pair.id: row.problem for pair, row in encoded.items()} == {"a#0": "a", "e#0": "e"}
    assert [line.split()[0] for line in said] == ["1", "2", "1"]
    assert "prompt over --max-length 60" in said[0] and "both sides read the same" in said[1]


# --------------------------------------------------------------------------------------------------
# the table


def test_ties_are_no_wins_and_mutants_are_a_row_of_their_own():
    pairs = [Pair("s", "long", "b", f"{i}#0", "x") for i in range(3)]
    pairs += [Pair("s", "a", "long", "3#0", "x"), Pair("s", "m", "n", "4#0", f"x{MUTANT}")]
    before, after = [(1.0, 1.0)] * 5, [(1.0, 0.0)] * 3 + [(0.0, 0.0), (2.0, 1.0)]
    result = metrics.accuracies(pairs, before, after)
    assert {name: row["mean"] for name, row in result.items()} == {
        "initialisation": 0.0, "fine-tuned": 0.75, "longer program wins": 0.75,
        "shorter program wins": 0.25, "gain": 0.75, "fine-tuned, right over mutant": 1.0,
    }  # fmt: skip
    assert result["fine-tuned"]["count"] == 4
    only = metrics.accuracies(pairs[4:], before[4:], after[4:])  # nothing but mutants: the table
    assert only["fine-tuned"]["mean"] == 1.0 and len(only) == 5


def test_auc_worked_example_and_brute_force():
    assert math.isnan(common.auc([1.0, 2.0], [True, True]))
    rng = random.Random(0)
    scores = [rng.randrange(5) for _ in range(60)]
    passed = [rng.random() < 0.4 for _ in range(60)]
    good, bad = ([s for s, p in zip(scores, passed) if p == kind] for kind in (True, False))
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    assert common.auc(scores, passed) == pytest.approx(wins / len(good) / len(bad))
    problems = [([2.0, 1.0], [True, False]), ([0.0], [True]), ([1.0, 1.0], [True, False])]
    assert metrics.known_aucs(problems) == [1.0, 0.5]


def test_bootstrap_resamples_problems_not_pairs():
    assert common.bootstrap([1.0] * 3 + [0.0] * 3, [0, 0, 0, 1, 1, 1]) == (0.5, 0.0, 1.0)
    mean, low, high = common.bootstrap([1.0, 0.0], [0, 0])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


def test_held_out_programs_are_all_that_were_graded_or_those_of_the_pairs():
    pair, problem = Pair("s", "good", "bad", "p#0", "x"), Problem("p", "s")
    run = SimpleNamespace(samples=lambda: [])
    from_pairs = [("p", "s", "good", True), ("p", "s", "bad", False)]
    assert train_rm.held_out_programs(run, [pair]) == from_pairs
    facts = [("a", "pass", None), ("b", "timeout", None), ("c", "flaky", None)]
    facts += [(None, "invalid", None), ("d", "pass", "a")]
    rows = [Rollout(problem, code=c, verdict=v, parent=p).row() for c, v, p in facts]
    run.samples = lambda: [*rows, rows[0] | {"problem": "of training"}]
    found = train_rm.held_out_programs(run, [pair])
    assert found == [("p", "s", "a", True), ("p", "s", "b", False)]


def test_ranks_share_the_scoring_of_texts_cut_as_in_training():
    settings, long = train_rm.Args(max_length=60), "y = 2\n" * 99
    items = [("Add.", "x = 1"), ("Add.", long + "1"), ("Add.", long + "2"), ("Add.", "x = 1")]
    scores = {}
    for rank in range(2):
        path = ROOT / "tiny" / "reward"
        scores |= train_rm.raw_scores(path, items, settings, "cpu", rank, 2)
    (wanted,) = cs.RewardModel(path, "cpu").score(*items[0][:1], ["x = 1"])
    assert list(scores) == items[:3] and scores[items[1]] == pytest.approx(scores[items[2]])
    assert scores[items[0]] == pytest.approx(wanted, abs=1e-5) != scores[items[1]]
    zeros = train_rm.raw_scores(ROOT / "tiny" / "policy", items, settings, "cpu", 0, 1)
    assert set(zeros.values()) == {0.0}


def test_tiny_make_trains_both_toy_models(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "POLICY_BATCH", 4)
    make.make_policy(tmp_path / "policy", steps=2)
    model = cs.load_model(tmp_path / "policy", "lm")
    assert model.num_tokens == cs.Tokenizer(tmp_path / "policy").num_tokens
    for row in make.generic_pairs(5):
        assert row["chosen"] != row["rejected"] and ast.parse(row["chosen"])
