"""Pairs and the pairwise loss.    pytest tests/test_train_rm.py"""

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import pairs
import train_rm
from codescaler import Config, Qwen3, init_weights, pad_rows
from common import UserError, bootstrap
from pairs import Pair
from train_rm import Row, batch_of, learning_rate, micro_batches, pairwise_loss

GOLDEN = Path(__file__).parent / "golden"
CONFIG = Config(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6,
)  # fmt: skip


def test_pairwise_loss_equals_trl():
    cases = json.loads((GOLDEN / "bradley_terry.json").read_text())
    for case in cases:
        chosen, rejected = (
            torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ("chosen", "rejected")
        )
        margin = torch.tensor(case["margin"] if case["margin"] is not None else 0.0, dtype=torch.float64)
        loss = pairwise_loss(chosen, rejected, margin, case["center_rewards_coefficient"] or 0.0)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
        assert chosen.grad.tolist() == pytest.approx(case["grad_chosen"], rel=1e-9, abs=1e-15)
        assert rejected.grad.tolist() == pytest.approx(case["grad_rejected"], rel=1e-9, abs=1e-15)
    assert len(cases) >= 6


def test_centring_pulls_the_mean_score_of_a_pair_to_its_target():
    scores = torch.tensor([4.0, 5.0]), torch.tensor([2.0, 3.0])  # means 3 and 4, both 2 apart
    plain = pairwise_loss(*scores)
    assert pairwise_loss(*(s[:1] for s in scores), center=0.5, center_at=3.0).item() == pytest.approx(plain.item())
    centred = pairwise_loss(*scores, center=0.5, center_at=3.0)
    assert centred.item() == pytest.approx(plain.item() + 0.5 * (8 - 6) ** 2 / 2)


def test_pairwise_loss_at_equal_scores_is_ln_2_and_a_margin_raises_it():
    zero = torch.zeros(4)
    assert pairwise_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert pairwise_loss(zero, zero, margin_P=0.5) > pairwise_loss(zero, zero)


def test_pairwise_loss_does_not_depend_on_the_cut():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(7), torch.randn(7)
    parts = sum(pairwise_loss(chosen[i:j], rejected[i:j], count=7) for i, j in ((0, 2), (2, 7)))
    assert torch.allclose(parts, pairwise_loss(chosen, rejected))


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(1.0) and rates[4] == max(rates)
    assert rates[-1] == pytest.approx(0.1)


def test_batches_visit_every_pair_once_an_epoch_and_keep_problems_together():
    problems = [f"p{i // 5}" for i in range(20)]
    epoch = [i for step in range(5) for i in batch_of(step, problems, 4, seed=0)]
    assert sorted(epoch) == list(range(20))
    assert batch_of(5, problems, 4, seed=0) != batch_of(0, problems, 4, seed=0)
    changes = sum(problems[a] != problems[b] for a, b in zip(epoch, epoch[1:]))
    assert changes <= 8  # two runs a problem, not single pairs


def random_rows(count, seed=0):
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(5, 60), k=rng.randint(3, 9))) for _ in range(6)]
    ids = lambda: rng.choices(range(5, 60), k=rng.randint(1, 7))  # noqa: E731
    return [Row(rng.choice(prompts), ids(), ids(), 0.5, "p") for _ in range(count)]


def test_micro_batches_fit_the_budget_and_hold_every_pair():
    rows = random_rows(30)
    batches = list(micro_batches(rows, 60))
    assert sorted(map(id, (r for b in batches for r in b))) == sorted(map(id, rows))
    for batch in batches:
        prompts = {r.prompt for r in batch}
        padded = len(prompts) * max(map(len, prompts)) + 2 * len(batch) * max(len(t) for r in batch for t in r[1:3])
        assert len(batch) == 1 or padded <= 60
    assert len(batches) < 30


def small_reward_model():
    model = Qwen3(CONFIG, head="score")
    init_weights(model, seed=0, std=0.2)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


def test_margin_and_centring_reach_the_update():
    rows, norms = random_rows(12), set()
    for changes in (dict(), dict(margin=2.0), dict(center=0.3)):
        model, args = small_reward_model(), train_rm.Args(**{"margin": 0.0, "center": 0.0, **changes})
        chosen, rejected = train_rm.score_pairs(model, rows)
        pairwise_loss(chosen, rejected, 0.5 * args.margin, args.center, center_at=args.center_at).backward()
        wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        model.zero_grad()
        norm = train_rm.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rows, args, 1, 0)[3]
        assert norm == pytest.approx(wanted, rel=1e-4)
        norms.add(round(norm, 3))
    assert len(norms) == 3


def test_a_prompt_computed_once_gives_the_scores_and_gradients_of_whole_rows():
    model, rows = small_reward_model(), random_rows(10)
    chosen, rejected = train_rm.score_pairs(model, rows)
    shared = torch.autograd.grad(pairwise_loss(chosen, rejected), list(model.parameters()))
    ids, lengths = pad_rows([[*r.prompt, *r.chosen] for r in rows] + [[*r.prompt, *r.rejected] for r in rows])
    whole = model.score(model(ids, lengths), lengths)
    assert torch.allclose(torch.cat([chosen, rejected]), whole, atol=1e-5)
    plain = torch.autograd.grad(pairwise_loss(whole[:10], whole[10:]), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(shared, plain))


def test_update_does_not_depend_on_the_cut_and_skips_what_is_not_finite():
    rows, gradients = random_rows(12), []
    for budget in (20, 10**6):
        model = small_reward_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.step = lambda model=model: gradients.append([p.grad.clone() for p in model.parameters()])
        args = train_rm.Args(token_budget=budget, margin=0.5)
        loss, accuracy, margin, norm, skipped = train_rm.update(model, optimizer, rows, args, 1, 0)
        assert 0 <= accuracy <= 1 and norm > 0 and not skipped
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients))
    model.score.weight.data.fill_(torch.inf)
    assert train_rm.update(model, optimizer, rows, args, 1, 0)[4] == 1 and len(gradients) == 2


def test_bootstrap_resamples_problems_not_pairs():
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    mean, low, high = bootstrap(values, [0, 0, 0, 1, 1, 1])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_report_counts_ties_as_wrong_and_knows_where_length_misleads():
    rows = [Pair("s", "long", "b", f"{i}#0", "x") for i in range(3)] + [Pair("s", "a", "long", "3#0", "x")]
    rows.append(Pair("s", "m", "n", "4#0", f"x{pairs.MUTANT}"))
    before, after = [(1.0, 1.0)] * 5, [(1.0, 0.0)] * 3 + [(0.0, 0.0), (2.0, 1.0)]
    lines, result = train_rm.pair_report(rows, before, after, "start", "problem")
    found = {name: row["mean"] for name, row in result["rows"].items()}
    assert found == {
        "initialisation": 0.0, "fine-tuned": 0.75, "longer program wins": 0.75, "shorter program wins": 0.25,
        "gain of fine-tuning": 0.75, "fine-tuned, length misleads": 0.0, "fine-tuned, right over mutant": 1.0,
    }  # fmt: skip
    assert result["ties"] == [5, 1] and result["pairs"] == 4 and "ties 5 -> 1" in lines[0]


def test_report_on_mutants_alone():
    rows = [Pair("s", "a", "b", f"{i}#mutant0", f"x{pairs.MUTANT}") for i in range(4)]
    _, result = train_rm.pair_report(rows, [(0.0, 1.0)] * 4, [(1.0, 0.0)] * 3 + [(0.0, 1.0)], "start", "problem")
    assert result["rows"]["fine-tuned"]["mean"] == 0.75 and result["rows"]["initialisation"]["mean"] == 0.0


def test_auc_worked_example_and_brute_force():
    assert common.auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]) == 0.875
    assert math.isnan(common.auc([1.0, 2.0], [True, True]))
    rng = random.Random(0)
    scores, passed = [rng.randrange(5) for _ in range(60)], [rng.random() < 0.4 for _ in range(60)]
    ranks = {s: sum(t < s for t in scores) + (sum(t == s for t in scores) + 1) / 2 for s in scores}  # Mann-Whitney
    n, m = sum(passed), 60 - sum(passed)
    u = sum(ranks[s] for s, p in zip(scores, passed) if p) - n * (n + 1) / 2
    assert common.auc(scores, passed) == pytest.approx(u / (n * m))


def test_calibration_finds_the_curve_that_made_the_data(tmp_path):
    rng = random.Random(0)
    scores = [rng.gauss(0, 2) for _ in range(4000)]
    passed = [rng.random() < 1 / (1 + math.exp(0.7 - 1.5 * s)) for s in scores]
    fit = train_rm.fit_calibration(scores, passed)
    assert fit["slope"] == pytest.approx(1.5, abs=0.1) and fit["intercept"] == pytest.approx(-0.7, abs=0.1)
    assert fit["ece"] < 0.03 and fit["n"] == 4000
    assert train_rm.probability(0.7 / 1.5, {"slope": 1.5, "intercept": -0.7}) == pytest.approx(0.5)
    assert train_rm.ece([0.9] * 10, [True] * 4 + [False] * 6) == pytest.approx(0.5)
    with pytest.raises(UserError, match="passing and failing"):
        train_rm.fit_calibration([1.0, 2.0, 3.0, 4.0], [True] * 4)
    with pytest.raises(UserError, match="--calibrate"):
        train_rm.load_calibration(tmp_path)


def test_calibration_of_scores_far_from_0():
    rng = random.Random(0)
    scores = [rng.gauss(15, 2) for _ in range(2000)]
    passed = [rng.random() < 1 / (1 + math.exp(-(s - 15))) for s in scores]
    fit = train_rm.fit_calibration(scores, passed)
    assert fit["slope"] == pytest.approx(1, abs=0.15) and fit["intercept"] == pytest.approx(-15, abs=2)
    assert fit["ece"] < 0.05


def given(tmp_path, rows, **flags):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    said = []
    return train_rm.given_pairs(train_rm.Args(pairs=str(tmp_path / "pairs.jsonl"), **flags), said.append), said


def test_pairs_of_a_file(tmp_path):
    rows = [Pair(f"Statement number {i}", f"a = {i}", "a = 9", f"{i}#0", "s") for i in range(10)]
    kept, said = given(tmp_path, rows)
    assert [pair.id for pair in kept] == [f"{i}#0" for i in range(9)]
    assert said == ["1 of 10 pairs left out: chosen and rejected are the same"]
    assert given(tmp_path, rows, min_tests=9)[1][0].startswith("--min-tests: for collecting pairs, without effect")
    with pytest.raises(UserError, match="--margin 1.0: no pair"):
        given(tmp_path, rows, margin=1.0)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": "e", "prompt": "statement number 3"}) + "\n")
    kept, said = given(tmp_path, rows, decontaminate=[str(tmp_path / "eval.jsonl")])
    assert "3#0" not in [pair.id for pair in kept] and len(kept) == 8 and any("1 removed" in line for line in said)
    (tmp_path / "args.json").write_text(json.dumps({"args": {"rm_prompt": "full"}}))
    with pytest.raises(UserError, match="was collected with --rm-prompt full, now it is bare"):
        given(tmp_path, rows)
    assert len(given(tmp_path, rows, rm_prompt="full")[0]) == 9


def test_programs_that_were_trained_on_are_not_held_out():
    pair, other = Pair("p", "a = 1", "a = 2", "1#0", "s"), Pair("p", "a = 1", "a = 3", "1#1", "s")
    run = SimpleNamespace(samples=lambda: [])
    assert train_rm.held_out_programs(run, [pair], [other]) == [("1", "p", "a = 3", False)]
    assert len(train_rm.held_out_programs(run, [], [other])) == 2
