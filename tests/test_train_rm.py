"""Pairs and the pairwise loss.    pytest tests/test_train_rm.py"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import pairs
import train_rm
from pairs import Pair, Sample, load_pairs, make_pairs, normalised, split_pairs
from problems import UserError
from train_rm import batch_of, bootstrap, learning_rate, micro_batches, pairwise_loss

GOLDEN = Path(__file__).parent / "golden"


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


def test_batches_visit_every_pair_once_an_epoch():
    epoch = [i for step in range(5) for i in batch_of(step, 20, 4, seed=0)]
    assert sorted(epoch) == list(range(20))
    assert batch_of(5, 20, 4, seed=0) != batch_of(0, 20, 4, seed=0)


def test_micro_batches_fit_the_budget_and_hold_every_pair():
    rows = [([0] * (i % 9 + 1), [0] * (i % 4 + 1)) for i in range(30)]
    batches = list(micro_batches(rows, 40))
    assert sorted(i for b in batches for i in b) == list(range(30))
    assert all(len(b) == 1 or 2 * len(b) * max(len(t) for i in b for t in rows[i]) <= 40 for b in batches)


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


def test_final_table_counts_ties_as_wrong():
    rows = [Pair("s", "long", "b", f"{i}#0", "x") for i in range(4)]
    before, after = [(1.0, 1.0)] * 4, [(1.0, 0.0)] * 3 + [(0.0, 0.0)]
    table = "\n".join(train_rm.final_table(rows, before, after, "start", "problem"))
    assert "ties 4 -> 1" in table and "0.000   [0.000" in table and "0.750" in table and "1.000" in table
