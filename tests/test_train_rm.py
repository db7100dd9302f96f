"""Pairs and the pairwise loss.    pytest tests/test_train_rm.py"""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

import pairs
import train_rm
from codescaler import Config, Qwen3, init_weights, pad_rows
from pairs import Pair, Sample, load_pairs, make_pairs, normalised, split_pairs
from problems import UserError
from train_rm import Row, batch_of, bootstrap, learning_rate, micro_batches, pairwise_loss

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


def test_normalised_programs():
    assert normalised("def f(a):  # first\n    b = a\n    return b") == normalised(
        'def f(x):\n    "doc"\n    y = x\n    return y'
    ).replace("    pass\n", "")
    assert normalised("def f(a): return a") != normalised("def g(a): return a")
    assert normalised("def f(a): return a > 1") != normalised("def f(a): return a >= 1")
    assert normalised("not python (") == "not python ("


def sample(problem, code, verdict, pass_rate=0.0, num_tests=12):
    return Sample(
        problem, "statement", "text", code, "ok" if code else "no_block", verdict, pass_rate, num_tests, "toy"
    )


def program(i):
    return f"def solve(xs): return {i}"


def test_pair_rule():
    samples = [sample("p", program(i), "pass" if i < 2 else "wrong_answer", 0.5) for i in range(5)]
    samples += [
        sample("p", program(0) + "  # again", "pass"),
        sample("p", None, None),
        sample("p", program(9), "harness_error"),
    ]
    samples += [sample("q", program(i), "pass") for i in range(3)]  # no wrong program: no pair
    found, funnel = make_pairs(samples, max_pairs=4)
    assert dict((what, n) for what, n, _ in funnel) == {
        "problems": 2, "samples": 11, "valid": 10, "unique": 9, "executed": 8, "passing": 5, "with both": 1, "pairs": 4,
        "mutants": 0, "mutant pairs": 0,
    }  # fmt: skip
    good, bad = {program(0), program(1)}, {program(i) for i in (2, 3, 4)}
    assert all(p.chosen in good and p.rejected in bad and p.margin == 0.5 for p in found)
    assert len({(p.chosen, p.rejected) for p in found}) == 4
    assert make_pairs(samples, min_tests=13)[0] == []
    assert len(make_pairs(samples, max_pairs=100)[0]) == 6  # every couple, once
    assert len({(p.chosen, p.rejected) for p in make_pairs(samples, max_pairs=100)[0]}) == 6


def test_mutants_are_small_changes():
    code = "def solve(xs):\n    xs = [x for x in xs if not x > 3]\n    xs = xs[:2]\n    return max(xs) if xs else 0"
    found = pairs.mutants(code, 100)
    for wanted in ("if x > 3", "if not not x > 3", "x >= 3", "x > 4", "xs[2:]", "return max(xs)\n", "else 1"):
        assert any(wanted in m + "\n" for m in found), wanted
    assert len(set(found)) == len(found) and code not in found
    assert pairs.mutants(code, 3) == pairs.mutants(code, 3) and len(pairs.mutants(code, 3)) == 3
    assert any("xs[:2]" not in m and "xs[2:]" not in m and "[:" not in m for m in found)  # a dropped statement


def test_failing_mutants_are_paired_with_their_parent():
    right = sample("p", program(1), "pass")
    bad = dataclasses.replace(sample("p", program(2), "wrong_answer", 0.25), parent=program(1), completion="")
    survivor = dataclasses.replace(bad, code=program(3), verdict="pass")
    found, funnel = make_pairs([right, bad, survivor])
    assert [(p.chosen, p.rejected, p.margin) for p in found] == [(program(1), program(2), 0.75)]
    assert found[0].source.endswith(pairs.MUTANT) and pairs.problem_of(found[0]) == "p"


def test_split_is_by_problem():
    rows = [Pair("s", "a", "b", f"{i // 3}#{i % 3}", "x") for i in range(60)]
    train, held_out = split_pairs(rows, 0.25)
    assert len(train) + len(held_out) == 60 and len(held_out) == 15
    assert not {pairs.problem_of(p) for p in train} & {pairs.problem_of(p) for p in held_out}


def test_split_by_pair_is_asked_for_by_name():
    rows = [Pair("s", "a", "b", f"p#{i}", "x") for i in range(20)]
    train, held_out = split_pairs(rows, 0.25, by="pair")
    assert len(held_out) == 5 and not {p.id for p in train} & {p.id for p in held_out}
    with pytest.raises(UserError, match="--split other"):
        split_pairs(rows, 0.25, by="other")


def test_pair_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs.write_jsonl(path, [Pair("s", "a", "b", "1#0", "x", 0.5)])
    assert load_pairs(str(path)) == [Pair("s", "a", "b", "1#0", "x", 0.5)]
    rows = [
        {"question": "q", "code_pos": "a", "code_neg": "b"},
        {"question_content": "q", "code_pos": "a", "code_neg": "c"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = load_pairs(f"codescalerpair:{path}")
    assert first.prompt == "q" and first.id != second.id and pairs.problem_of(first) == pairs.problem_of(second)
    path.write_text(json.dumps({"question": None, "code_pos": "a", "code_neg": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: key 'question' should be str"):
        load_pairs(f"codescalerpair:{path}")


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


def test_auc_worked_example_and_brute_force():
    assert train_rm.auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]) == 0.875
    assert math.isnan(train_rm.auc([1.0, 2.0], [True, True]))
    rng = random.Random(0)
    scores, passed = [rng.randrange(5) for _ in range(60)], [rng.random() < 0.4 for _ in range(60)]
    ranks = {s: sum(t < s for t in scores) + (sum(t == s for t in scores) + 1) / 2 for s in scores}  # Mann-Whitney
    n, m = sum(passed), 60 - sum(passed)
    u = sum(ranks[s] for s, p in zip(scores, passed) if p) - n * (n + 1) / 2
    assert train_rm.auc(scores, passed) == pytest.approx(u / (n * m))


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


def test_rmbench_pairs_are_of_one_style(tmp_path):
    row = {"id": "7", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "code"}
    (tmp_path / "rm.json").write_text(json.dumps([row]))
    found = load_pairs(f"rmbench:{tmp_path}/rm.json")
    assert [(p.id, p.chosen, p.rejected, p.source) for p in found] == [
        ("7/0", "a", "x", "code"), ("7/1", "b", "y", "code"), ("7/2", "c", "z", "code"),
    ]  # fmt: skip
    (tmp_path / "rm.json").write_text(json.dumps([row | {"chosen": ["a"]}]))
    with pytest.raises(UserError, match="row 1: 1 chosen and 3 rejected"):
        load_pairs(f"rmbench:{tmp_path}/rm.json")


def test_a_null_statement_is_an_error_unless_it_is_allowed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question_content": None, "code_pos": "a", "code_neg": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: key 'question_content' should be str, found None"):
        load_pairs(f"codescalerpair:{path}")
    assert load_pairs(f"codescalerpair:{path}", allow_empty_prompt=True)[0].prompt == ""
