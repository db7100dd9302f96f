"""Candidates, labels, the pair rule, augmentation, pair files.    pytest tests/test_pairs.py"""

import ast
import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest

import pairs
import problems
from common import UserError
from pairs import Pair, PairRules, Sample, load_pairs, make_pairs, normalised, split_pairs
from problems import Problem, load_problems
from sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sb:
        yield sb


def test_normalised_programs():
    assert normalised("def f(a):  # first\n    b = a\n    return b") == normalised(
        'def f(x):\n    "doc"\n    y = x\n    return y'
    )
    assert normalised("def f(a): return a") != normalised("def g(a): return a")
    assert normalised("def f(a): return a > 1") != normalised("def f(a): return a >= 1")
    assert normalised("limit = 1") != normalised("other = 1")  # a test may use what the module defines
    assert normalised("not python (") == "not python ("


def sample(problem, code, verdict, pass_rate=0.0, num_tests=12, parent=None):
    return Sample(
        problem, "statement", "text", code, "ok" if code else "no_block", verdict, pass_rate, num_tests, "toy", parent
    )


def program(i):
    return f"def solve(xs): return {i}"


def last(funnel):
    """{what: how many are left at the end}"""
    return {what: count for what, count, _ in funnel}


def test_pair_rule():
    samples = [sample("p", program(i), "pass" if i < 2 else "wrong_answer", 0.5) for i in range(5)]
    samples += [
        sample("p", program(0) + "  # again", "pass"),
        sample("p", None, None),
        sample("p", program(8), "flaky"),
        sample("p", program(9), "harness_error"),
    ]
    samples += [sample("q", program(i), "pass") for i in range(3)]  # no wrong program: no pair
    found, funnel = make_pairs(samples, PairRules(max_pairs=4))
    assert last(funnel) == {
        "problems": 2, "samples": 12, "valid": 11, "unique": 10, "executed": 8, "passing": 5, "with both": 1,
        "pairs": 4, "mutants": 0, "mutant pairs": 0,
    }  # fmt: skip
    good, bad = {program(0), program(1)}, {program(i) for i in (2, 3, 4)}
    assert all(p.chosen in good and p.rejected in bad and p.margin == 0.5 and p.num_tests == 12 for p in found)
    assert len({(p.chosen, p.rejected) for p in found}) == 4
    assert make_pairs(samples, PairRules(min_tests=13))[0] == []
    every = make_pairs(samples, PairRules(max_pairs=100))[0]
    assert len(every) == 6 and len({(p.chosen, p.rejected) for p in every}) == 6  # every couple, once


def test_caps_near_misses_and_length_balance():
    right = [sample("p", program(i), "pass", 1.0) for i in range(2)]
    near = [sample("p", program(10 + i), "wrong_answer", 0.75) for i in range(6)]
    far = [sample("p", program(100 + i), "wrong_answer", 0.0) for i in range(20)]
    for share in (0.0, 0.5, 1.0):
        found, _ = make_pairs(right + near + far, PairRules(max_pairs=6, near_miss=share))
        assert sum(p.margin == 0.25 for p in found) == 6 * share
    found, funnel = make_pairs(right + near + far, PairRules(max_pairs=100, max_uses=3))
    assert len(found) == 6 and any("--max-uses): 46 removed" in rule for *_, rule in funnel)
    lengths = [sample(f"p{i}", program(i) + " " * 0, "pass") for i in range(9)]
    lengths += [sample(f"p{i}", "def solve(xs): return xs * 12345", "wrong_answer") for i in range(8)]
    lengths += [sample("p8", "def solve(x): 7", "wrong_answer")]
    assert len(make_pairs(lengths, PairRules())[0]) == 9
    found, _ = make_pairs(lengths, PairRules(length_balance=0.5))
    assert sorted(len(p.chosen) > len(p.rejected) for p in found) == [False, True]


def test_mutants_are_small_changes_of_every_kind():
    code = (
        "def solve(xs, n):\n    xs = [x for x in xs if not x > 3]\n    xs = xs[:2]\n"
        "    if n:\n        xs.sort()\n    return max(xs) + n if xs else 0"
    )
    found = pairs.mutants(code, 100)
    for wanted in ("if x > 3", "x >= 3", "x < 3", "x > 4", "xs[2:]", "return max(xs) + n\n", "max(xs) - n", "else 1",
                   "if not n", "min(xs)", "max(n)"):  # fmt: skip
        assert any(wanted in m + "\n" for m in found), wanted
    assert len(set(found)) == len(found) and code not in found
    assert pairs.mutants(code, 3) == pairs.mutants(code, 3) and len(pairs.mutants(code, 3)) == 3
    assert any("xs[:2]" not in m and "[2:]" not in m and "[:" not in m for m in found)  # a dropped statement
    for mutant in found:
        ast.parse(mutant)


def test_failing_mutants_are_paired_with_their_parent_and_survivors_need_tests():
    right = sample("p", program(1), "pass")
    bad = sample("p", program(2), "wrong_answer", 0.25, parent=program(1))
    survivor = sample("p", program(3), "pass", parent=program(1))
    found, _ = make_pairs([right, bad], PairRules())
    assert [(p.chosen, p.rejected, p.margin) for p in found] == [(program(1), program(2), 0.75)]
    assert found[0].source.endswith(pairs.MUTANT) and pairs.problem_of(found[0]) == "p"
    more = [dataclasses.replace(bad, code=program(i)) for i in (4, 5, 6)]
    found, _ = make_pairs([right, bad, survivor, *more], PairRules(mutants=4))
    assert {p.chosen for p in found} == {program(1), program(3)}  # on 12 tests a survivor is another right program
    few = [dataclasses.replace(s, num_tests=9) for s in (right, bad, survivor, *more)]
    found, funnel = make_pairs(few, PairRules(mutants=4))
    assert {p.chosen for p in found} == {program(1)}
    assert any("(--survivor-tests): 1 removed" in rule for *_, rule in funnel)


ADD = Problem(
    "add", "Add two numbers.", problems.Tests("call", [{"args": [i, 2], "expected": i + 2} for i in range(5)], "add"),
    "def add(a, b):\n    total = a + b\n    return total", "mine",
)  # fmt: skip
ARGS = SimpleNamespace(
    candidates="mutants", policy=[], group=1, seed=0, extract="strict", prompt_style="plain", rm_prompt="bare",
    **dataclasses.asdict(PairRules(mutants=6))
)


def test_candidates_without_a_model(sandbox, tmp_path):
    (found,) = pairs.collect_samples([ADD], ARGS, sandbox)
    assert found[0].code == ADD.solution and found[0].verdict == "pass" and not found[0].parent
    assert len(found) > 3 and any("a - b" in s.code and s.verdict == "wrong_answer" for s in found[1:])
    made, _ = make_pairs(found, PairRules(mutants=6))
    assert made and all(p.prompt == ADD.prompt and p.num_tests == 5 for p in made)
    file = tmp_path / "samples.jsonl"
    rows = [{"header": {}}, {"problem": "add", "completion": "```python\ndef add(a, b):\n    return b\n```"}]
    rows += [{"problem": "add", "code": ADD.solution}, {"problem": "add", "code": "def add("}]
    rows += [{"problem": "add", "code": "def add(a, b): return a + b if a else 0"}]  # fails the first test only
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = pairs.collect_samples([ADD], SimpleNamespace(**vars(ARGS) | {"candidates": str(file)}), sandbox)
    assert [s.verdict for s in found if not s.parent] == ["wrong_answer", "pass", None, "wrong_answer"]
    assert [s.pass_rate for s in found if not s.parent] == [0.2, 1.0, None, 0.8]
    with pytest.raises(UserError, match="no program for any of 1 problems"):
        list(pairs.collect_samples([dataclasses.replace(ADD, solution=None)], ARGS, sandbox))


def test_pairs_hold_what_the_reward_model_is_to_read(sandbox):
    rows = [(ADD, "", SimpleNamespace(code=ADD.solution, reason="ok"))]
    found = {kind: pairs.verify(sandbox, rows, "", SimpleNamespace(**vars(ARGS) | {"rm_prompt": kind}))[0].prompt
             for kind in ("bare", "full")}  # fmt: skip
    assert found == {"bare": ADD.prompt, "full": problems.policy_prompt(ADD)}


def test_a_program_that_passes_only_sometimes_is_dropped(sandbox):
    coin = "import random\ndef add(a, b): return a + b if random.random() < 0.8 else 0"
    rows = [(ADD, "", SimpleNamespace(code=coin, reason="ok"))]
    args = SimpleNamespace(**vars(ARGS) | {"repeat": 2, "mutants": 0})
    words = {pairs.verify(sandbox, rows, "", args)[0].verdict for _ in range(40)}
    assert "flaky" in words  # 0.8^5 * (1 - 0.8^5) = 0.22 of the time; never in 40: 5e-5


def test_near_duplicates_are_one_problem():
    text = "Return the sum of all even numbers of the list after sorting it in descending order, please"
    statements = {"a": text, "b": text + " now.", "c": "Return the longest word of a text that has no vowels in it"}
    found = pairs.near_duplicates(statements)
    assert found["a"] == found["b"] != found["c"]
    rng, words = random.Random(0), "one two three four five six".split()
    many = {i: " ".join(rng.choices(words, k=12)) for i in range(150)}
    many |= {i + 1000: many[i] + " end" for i in range(50)}
    found = pairs.near_duplicates(many)

    def overlap(a, b):
        a, b = pairs.ngrams(many[a], 3), pairs.ngrams(many[b], 3)
        return len(a & b) / len(a | b)

    links = [(a, b) for a in many for b in many if a < b and overlap(a, b) >= 0.8]
    assert len(links) >= 50 and all(found[a] == found[b] for a, b in links)
    assert len(set(found.values())) >= len(many) - len(links)
    rows = [Pair(statements[k], "x", "y", f"{k}#{i}", "s") for k in statements for i in range(3)]
    for seed in range(4):
        train, held_out = split_pairs(rows, 0.4, seed)
        assert not {found for p in train for found in "ab" if p.id[0] in "ab"} & {p.id[0] for p in held_out}


def test_decontamination_by_words_and_by_tests():
    statement = " ".join(f"word{i}" for i in range(30))
    tests = problems.Tests("stdin", [{"input": "11 12 13 14 15 16 17 18 19 20", "output": "155"}])
    evaluation = [Problem("e", statement, tests, None, "")]
    same_words = Problem("a", "Before. " + statement[7:140].upper(), None, None, "")
    same_case = Problem("b", "another text", tests, None, "")
    other = Problem("c", "word1 word2 and word3", problems.Tests("stdin", [{"input": "1", "output": "66"}]), None, "")
    kept, funnel = pairs.decontaminate([same_words, same_case, other], evaluation)
    assert [p.id for p in kept] == ["c"] and [count for _, count, _ in funnel] == [3, 2, 1]


def test_rewrites_mean_the_same(sandbox):
    problems = load_problems("toy:train", 30)
    jobs = [(p, text) for p in problems for text in pairs.rewrites(p.solution).values()]
    assert len(jobs) >= 60 and all(text != p.solution for p, text in jobs)
    assert all(r.passed for r in sandbox.map([(code, p.tests) for p, code in jobs]))
    code = "def f(xs, key=1):\n    '''doc'''\n    # note\n    total = key\n    for x in xs:\n        total += x\n"
    code += "    return total"
    found = pairs.rewrites(code)
    assert "total" not in found["renamed"] and "key=1" in found["renamed"]
    assert "doc" not in found["stripped"] and "note" not in found["stripped"]
    assert found["commented"].count("#") == 3 and normalised(found["commented"]) == normalised(code)
    assert "total" in pairs.rewrites("def f(x):\n    total = x\n    return eval('total')").get("renamed", "total")
    assert pairs.rewrites("not python (") == {}


def test_adversarial_programs_are_wrong(sandbox):
    problems = load_problems("toy:train", 20)
    wrong = {p.id: "def solve(xs):\n    return 'never'" for p in problems}
    rows = [Pair(p.prompt, p.solution, wrong[p.id], f"{p.id}#0", "toy") for p in problems]
    others = pairs.other_programs(rows)
    assert all(o != p.chosen for o, p in zip(others, rows))
    jobs = []
    for problem, row, other in zip(problems, rows, others):
        found = pairs.adversarial(row, other)
        assert set(found) >= {"claim", "claim vs remark", "vacuous"}
        assert found["claim"][0] == row.chosen != found["claim vs remark"][0]
        jobs += [(code, problem.tests) for k in ("claim", "claim vs remark", "vacuous") for code in found[k]]
    assert [r.passed for r in sandbox.map(jobs)] == [True, False] * (len(jobs) // 2)


def test_a_claim_is_a_comment_or_a_docstring():
    code = "def f(x):\n    return x"
    assert pairs.headed(code, "all right", False) == "# all right\n" + code
    assert ast.get_docstring(ast.parse(pairs.headed(code, "all right", True)).body[0]) == "all right"
    assert ast.get_docstring(ast.parse(pairs.headed("print(1)", "all right", True))) == "all right"
    rows = [Pair("s", code, "def f(x):\n    return 0", f"p#{i}", "toy") for i in range(40)]
    claims = [pairs.adversarial(row, "print()")["claim"][1] for row in rows]
    assert {claim.startswith("# ") for claim in claims} == {True, False}
    assert all(any(text in claim for text in pairs.CLAIMS) for claim in claims)


def test_augmented_pairs_belong_to_their_problem():
    problems = load_problems("toy:train", 40)
    rows = [
        Pair(p.prompt, p.solution, "def solve(xs):\n    ys = xs\n    return ys", f"{p.id}#0", "toy") for p in problems
    ]
    kinds = {"rewritten", "claim", "claim-vs-remark", "vacuous", "other-problem"}
    added = pairs.augment(rows, seed=1, rewritten=1.0, adversarial_share=1.0)
    assert added == pairs.augment(rows, seed=1, rewritten=1.0, adversarial_share=1.0)
    assert {p.source.partition("/")[2] for p in added} == kinds
    assert {pairs.problem_of(p) for p in added} == {p.id for p in problems}
    assert len({p.id for p in added}) == len(added) == 80
    right, wrong = zip(*((p.chosen, p.rejected) for p in added if "/claim" in p.source))
    claiming = [[any(text in code for text in pairs.CLAIMS) for code in side] for side in (right, wrong)]
    assert all(claiming[1]) and 0 < sum(claiming[0]) < len(right)


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


def test_rmbench_pairs_are_of_one_style(tmp_path):
    row = {"id": "7", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "code"}
    (tmp_path / "rm.json").write_text(json.dumps([row]))
    found = load_pairs(f"rmbench:{tmp_path}/rm.json")
    assert [(p.id, p.chosen, p.rejected, p.source) for p in found] == [
        ("7#0", "a", "x", "code"), ("7#1", "b", "y", "code"), ("7#2", "c", "z", "code"),
    ]  # fmt: skip
    (tmp_path / "rm.json").write_text(json.dumps([row | {"chosen": ["a"]}]))
    with pytest.raises(UserError, match="row 1: chosen and rejected should be lists of three texts"):
        load_pairs(f"rmbench:{tmp_path}/rm.json")


def test_a_null_statement_is_an_error_unless_it_is_allowed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question_content": None, "code_pos": "a", "code_neg": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: key 'question_content' should be str, found None"):
        load_pairs(f"codescalerpair:{path}")
    assert load_pairs(f"codescalerpair:{path}", allow_empty_prompt=True)[0].prompt == ""


OWN = {"prompt": "p", "chosen": "a = 1", "rejected": "a = 2", "id": "1#0"}


@pytest.mark.parametrize("change, found", [
    ({"margin": "x"}, "key 'margin' should be .*float, found 'x'"), ({"margin": math.nan}, "key 'margin' .*found nan"),
    ({"num_tests": "3"}, "key 'num_tests'"), ({"source": 3}, "key 'source'"), ({"prompt": ""}, "statement is empty"),
    ({"chosen": "x = '\ud800'"}, "surrogates not allowed"),
])  # fmt: skip
def test_what_is_wrong_with_a_pair_is_named(tmp_path, change, found):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(OWN | change) + "\n")
    with pytest.raises(UserError, match=f"row 1: .*{found}"):
        load_pairs(str(tmp_path / "pairs.jsonl"))


def test_nulls_of_our_own_rows_are_defaults(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(OWN | {"source": None, "margin": None}) + "\n")
    assert load_pairs(str(tmp_path / "pairs.jsonl")) == [Pair(**OWN, source="")]
    row = {"id": "1", "prompt": "p", "source": None, "starter": None, "solution": None, "tests": None}
    (tmp_path / "problems.jsonl").write_text(json.dumps(row) + "\n")
    assert load_problems(str(tmp_path / "problems.jsonl")) == [Problem("1", "p")]


def test_a_sample_without_a_program_is_a_candidate_too():
    assert pairs.candidate({"completion": "", "code": None}, "row 1", "strict")[1].reason == "empty"


def test_pairs_without_python_are_not_augmented():
    assert pairs.augment([Pair("p", "not python (", "nor this (", "1#0", "s")] * 2) == []
