"""Rollouts, candidates, labels, the pair rule, pair files.    pytest tests/test_pairs.py"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import pairs
from common import UserError, write_jsonl
from pairs import Pair, Rollout, load_pairs, make_pairs, normalised, problem_of, split_pairs
from problems import Problem
from sandbox import Sandbox
from sandbox import Tests as Suite  # pytest would collect a class named Test...

RULES = {"min_tests": 3, "max_pairs": 8, "mutants": 2}
CASES = [{"args": [i, 2], "expected": i + 2} for i in range(5)]
RIGHT = "def add(a, b):\n    total = a + b\n    return total"
ADD = Problem("add", "Add two numbers.", Suite("call", CASES, "add"), RIGHT, "mine")
ARGS = SimpleNamespace(candidates="mutants", policy=[], mutants=6, seed=0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sb:
        yield sb


def sample(problem, code, verdict, pass_rate=0.0, parent=None):
    problem = Problem(problem, f"statement {problem}", source="toy")
    facts = {"pass_rate": pass_rate, "num_tests": 12, "parent": parent}
    return Rollout(problem, code=code, verdict=verdict, **facts)


def pairs_of(rollouts, **rules):
    return make_pairs(rollouts, SimpleNamespace(**RULES | rules))


P = [f"def solve(xs): return {i}" for i in range(10)]  # programs


def test_a_row_and_back():
    r = Rollout(ADD, 3, [1], [4, 5, 6], [-0.1] * 3, None, False, "text", "code", "ok", "policy")
    row = json.loads(json.dumps(r.row()))
    assert row["problem"] == "add" and row["tokens"] == 3 and row["num_tests"] == 5
    assert Rollout.from_row(row | {"step": 1}).row() == row


def test_rollout_is_extracted_and_does_not_depend_on_the_batch():
    model, tokenizer = pairs.load_model("tiny/policy", "lm"), pairs.Tokenizer("tiny/policy")
    asked = [replace(ADD, id=f"p{i}", prompt="Sort the list" + "." * i) for i in (0, 1)]
    kinds = {"max_new_tokens": 24, "temperature": 1.0, "policy": "tiny/policy"}
    both = pairs.rollout(model, tokenizer, asked, 2, numbers=[5, 9], **kinds)
    (alone,) = pairs.rollout(model, tokenizer, asked[1:], 2, numbers=[9], **kinds)
    assert [r.ids for r in both[1]] == [r.ids for r in alone] and both[0][0].ids != both[1][0].ids
    for r in both[0] + both[1]:
        assert len(r.ids) == len(r.old_logp) == r.tokens and r.policy == "tiny/policy"
        assert r.text == tokenizer.decode(r.ids[:-1] if r.finished else r.ids)
        assert (r.code is None) == (r.reason != "ok") and r.number in (5, 9)


def test_execute_fills_in_verdicts(sandbox):
    untested = replace(ADD, id="untested", tests=None)
    codes = [RIGHT, "def add(a, b): return a + b if a else 0", None, RIGHT]
    rollouts = [Rollout(ADD, code=code) for code in codes] + [Rollout(untested, code="x = 1")]
    results = pairs.execute(sandbox, rollouts, stop_early=False)
    assert [r.verdict for r in rollouts] == ["pass", "wrong_answer", "invalid", "pass", None]
    assert [r.pass_rate for r in rollouts] == [1.0, 0.8, 0.0, 1.0, None]
    assert results[0] is results[3] and results[2] is None and results[4] is None


def test_a_test_that_cannot_be_judged_masks_right_and_wrong_answers(sandbox):
    cases = [{"assert": "assert add(1, 2) == 3"}, {"assert": "assert add(1, 2).dtype == 3"}]
    problem = replace(ADD, tests=replace(ADD.tests, kind="assert", cases=cases))
    rollouts = [Rollout(problem, code=code) for code in (RIGHT, "def add(a, b): return b", None)]
    pairs.execute(sandbox, rollouts)
    assert [r.verdict for r in rollouts] == ["unsupported", "unsupported", "invalid"]


def test_ranks_verify_a_share_each_and_keep_the_same(monkeypatch):
    problems, shares = [replace(ADD, id=f"p{i}") for i in range(5)], []
    monkeypatch.setattr(pairs, "verified", lambda some, *_: [p for p in some if p.id != "p1"])
    monkeypatch.setattr(pairs, "gather_lists", lambda ids: shares.append(ids) or ids)
    for rank in range(2):
        pairs.verify_together(problems, None, rank, 2, print)
    assert shares == [["p0", "p2", "p4"], ["p3"]]
    monkeypatch.setattr(pairs, "gather_lists", lambda ids: shares[0] + shares[1])
    kept = [pairs.verify_together(problems, None, rank, 2, print) for rank in range(2)]
    assert kept[0] == kept[1] == [problems[i] for i in (0, 2, 3, 4)]


def test_a_program_that_passes_only_sometimes_is_flaky():
    good = SimpleNamespace(passed=True, verdicts=["pass"], pass_rate=1.0)
    bad = SimpleNamespace(passed=False, verdicts=["wrong_answer"], pass_rate=0.0)
    for repeat, verdict in ((1, "pass"), (2, "flaky")):
        runs, r = iter([[good], [bad]]), Rollout(ADD, code="coin")
        fake = SimpleNamespace(map=lambda jobs, runs=runs, **options: next(runs))
        pairs.execute(fake, [r], repeat=repeat)
        assert r.verdict == verdict


@pytest.mark.parametrize("one, other, same", [
    ("def f(a):  # 1\n    b = a\n    return b", "def f(x):\n  'doc'\n  y = x\n  return y", True),
    ("def f(a: int) -> int: return a", "def f(a): return a", True),
    ("def f(a): return a", "def g(a): return a", False),
    ("def f(a): return a > 1", "def f(a): return a >= 1", False),
    ("'''text'''\nx = 1\nprint(x)", "y = 1\nprint(y)", True),
    ("def f(a, b): return a\nf(a=1, b=2)", "def f(b, a): return b\nf(a=1, b=2)", False),
    ("class A:\n x = 1\n y = 2\nA.x, A.y", "class A:\n y = 1\n x = 2\nA.x, A.y", False),
])  # fmt: skip
def test_normalised_programs(one, other, same):
    assert (normalised(one) == normalised(other)) == same


@pytest.mark.parametrize("code", ["f" + "(" * 5000, "x = '\ud800", "\0", "", "not python ("])
def test_every_walk_of_a_candidate_is_total(code):
    assert normalised(code) == code and pairs.mutants(code, 3) == []


def test_a_deeply_nested_passing_program_does_not_end_a_collection(sandbox):
    code = RIGHT + "\ny = " + "+".join("1" * 600)  # Python runs it and cannot print its tree
    assert pairs.laid_out(code) is None
    (found,) = pairs.collect([replace(ADD, solution=code), replace(ADD, id="b")], ARGS, sandbox)
    assert found[0].verdict == "pass" and {r.problem.id for r in found if r.parent} == {"b"}


def test_mutants_are_other_tokens():
    code = "def solve(xs, n=4):\n    if not xs:\n        xs.sort()\n    '''+ 1'''\n"
    code += "    return max(xs) + n if xs > 3 else 0"
    found = pairs.mutants(code, 100)
    for wanted in ("if xs:", "xs >= 3", "xs < 3", "xs > 4", "max(xs) - n", "else 1", "min(xs)"):
        assert any(wanted in mutant for mutant in found), wanted
    assert len(set(found)) == len(found) and pairs.laid_out(code) not in found
    assert all("n=4" in m and "'+ 1'" in m for m in found)  # signatures and texts stay
    assert pairs.mutants(code, 3) == pairs.mutants(code, 3) and len(pairs.mutants(code, 3)) == 3


def test_candidates_are_solutions_and_their_mutants(sandbox):
    (found,) = pairs.collect([ADD], ARGS, sandbox)
    assert found[0].code == RIGHT and found[0].verdict == "pass" and not found[0].parent
    assert any("a - b" in r.code and r.verdict == "wrong_answer" for r in found[1:])
    assert all(r.parent == pairs.laid_out(RIGHT) for r in found[1:])
    made, _ = pairs_of(found)
    assert made and all(p.prompt == ADD.prompt and p.num_tests == 5 for p in made)
    with pytest.raises(UserError, match="no program for any of 1 problems"):
        list(pairs.collect([replace(ADD, solution=None)], ARGS, sandbox))


def test_candidates_of_a_file(sandbox, tmp_path, capsys):
    rows = [{"completion": "```python\ndef add(a, b):\n    return b\n```"}, {"code": "def add("}]
    rows += [{"code": RIGHT}, {"completion": "", "code": None}, {"code": "x", "parent": "y"}]
    rows += [{"problem": "other", "code": "x = 1"}]
    write_jsonl(tmp_path / "s.jsonl", [{"problem": "add"} | row for row in rows])
    args = SimpleNamespace(candidates=str(tmp_path / "s.jsonl"), mutants=0, seed=0)
    (found,) = pairs.collect([ADD], args, sandbox)
    assert [r.verdict for r in found] == ["wrong_answer", "invalid", "pass", "invalid"]
    assert found[0].reason == found[2].reason == "ok" and found[3].reason == "empty"
    assert "1 programs of problems that are not there" in capsys.readouterr().out


def test_a_collection_in_chunks_goes_on_and_is_the_same_on_two_ranks(sandbox, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", 2)
    problems, both, done = [replace(ADD, id=f"p{i}") for i in range(5)], [], {("", "p0")}
    whole = [r.row() for chunk in pairs.collect(problems, ARGS, sandbox) for r in chunk]
    monkeypatch.setattr(pairs, "gather_lists", lambda rows: both.extend(rows) or rows)
    for rank in (0, 1):
        list(pairs.collect(problems, ARGS, sandbox, done, "cpu", rank, 2))
    rest = [row for row in whole if row["problem"] != "p0"]
    assert sorted(both, key=lambda row: row["number"]) == rest


def test_pair_rule():
    rollouts = [sample("p", P[i], "pass" if i < 2 else "wrong_answer", 0.5) for i in range(5)]
    rollouts += [sample("p", P[0] + "  # again", "pass"), sample("p", None, "invalid")]
    rollouts += [sample("p", P[8], "flaky"), sample("p", P[9], "harness_error")]
    rollouts += [sample("q", P[i], "pass") for i in range(3)]  # no wrong program: no pair
    found, funnel = pairs_of(rollouts, max_pairs=4)
    assert [count for _, count, _ in funnel] == [2, 12, 11, 10, 10, 8, 8, 1, 4, 0]
    assert all(p.chosen in P[:2] and p.rejected in P[2:5] and p.margin == 0.5 for p in found)
    assert len({(p.chosen, p.rejected) for p in found}) == 4 and found[0].source == "toy"
    assert found == pairs_of(rollouts, max_pairs=4)[0] and pairs_of(rollouts, min_tests=13)[0] == []
    every = pairs_of(rollouts)[0]
    assert len({(p.chosen, p.rejected) for p in every}) == len(every) == 6  # every couple, once


def test_failing_mutants_are_paired_with_their_parent():
    right, sampled = sample("p", P[1], "pass"), sample("p", P[4], "wrong_answer")
    bad = sample("p", P[2], "wrong_answer", 0.25, parent=P[1])
    survivor = sample("p", P[3], "pass", parent=P[1])
    known = sample("p", P[4], "wrong_answer", parent=P[1])
    (couple, mutant), _ = pairs_of([bad, survivor, known, right, sampled])
    assert (couple.chosen, couple.rejected) == (P[1], P[4])  # once, as a candidate
    assert (mutant.chosen, mutant.rejected, mutant.margin) == (P[1], P[2], 0.75)
    assert mutant.source == "toy" + pairs.MUTANT and problem_of(mutant) == "p"


def test_a_cap_keeps_near_misses_and_other_failures_and_every_right_program():
    right = [sample("p", P[i], "pass", 1.0) for i in range(2)]
    wrong = [sample("p", P[i], "wrong_answer", 0.9 if i == 2 else 0.1) for i in range(2, 10)]
    found, _ = pairs_of(right + wrong, max_pairs=2)
    assert {p.chosen for p in found} == set(P[:2])
    assert sorted(p.margin > 0.5 for p in found) == [False, True]


def test_split_is_by_statement():
    rows = [Pair(f"s {i // 3 % 10}", "a", "b", f"{i // 3}#{i % 3}", "x") for i in range(60)]
    train, held_out = split_pairs(rows, 0.25)
    assert len(train) == 48 and len(held_out) == 12  # problems i and i + 10 have one statement
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert split_pairs(rows, 0.0) == (rows, [])


def test_decontamination_by_words():
    statement = " ".join(f"word{i}" for i in range(30))
    evaluation = [Problem("e", statement), Problem("short", "Sort a list.")]
    texts = ["Before. " + statement[7:140].upper(), "sort  a LIST", "word1 word2 and word3"]
    asked = [Problem(str(i), text) for i, text in enumerate(texts)]
    kept, funnel = pairs.decontaminate(asked, evaluation)
    assert [p.id for p in kept] == ["2"] and funnel[0][1] == 1 and "2 removed" in funnel[0][2]


# --------------------------------------------------------------------------------------------------
# pair files

OWN = {"prompt": "p", "chosen": "a = 1", "rejected": "a = 2", "id": "1#0"}
FENCED = "Here it is:\n```python\na = 1\n```\nDone."
USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "Be nice."}
ANSWERS = [{"role": "assistant", "content": text} for text in (FENCED, "```\na = 2\n```")]


def loaded(tmp_path, rows, kind=""):
    """(pairs, what was said about rows left out)"""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    said = []
    return load_pairs(f"{kind}{tmp_path}/rows.jsonl", log=said.append), "\n".join(said)


def test_our_own_rows(tmp_path):
    made = Pair("s", "a", "b", "1#0", "x", 0.5, 12)
    assert loaded(tmp_path, [made]) == ([made], "")
    assert loaded(tmp_path, [OWN | {"source": None, "margin": None}])[0] == [Pair(**OWN, source="")]


@pytest.mark.parametrize("change, found", [
    ({"margin": "x"}, "key 'margin' should be .*float.*'x'"), ({"num_tests": "3"}, "'num_tests'"),
    ({"source": 3}, "key 'source'"), ({"id": 1}, "'id'"), ({"more": 1}, "'more'"),
    ({"chosen": FENCED}, "'chosen' should be a bare program"), ({"rejected": None}, "no key 'rej"),
    ({"rejected": ANSWERS[:1]}, "'rejected' should be str"), ({"chosen": "\ud800"}, "surrogates"),
])  # fmt: skip
def test_what_is_wrong_with_our_own_row_is_named(tmp_path, change, found):
    with pytest.raises(UserError, match=f"row 2: .*{found}"):
        loaded(tmp_path, [OWN, OWN | change])


@pytest.mark.parametrize("chosen, rejected", [("a", "a"), ("\n\na", "a"), ("", "a"), ("a", "\n")])
def test_sides_that_read_alike_are_left_out_and_counted(tmp_path, chosen, rejected):
    found, said = loaded(tmp_path, [OWN] * 5 + [OWN | {"chosen": chosen, "rejected": rejected}])
    assert len(found) == 5 and "left out 1" in said and "row 6" in said and "WARNING" not in said


def test_public_rows_that_do_not_fit_are_counted_by_reason(tmp_path):
    good = {"question": "q  Q.", "code_pos": "a = 1", "code_neg": "a = 2"}
    rows = [good, {"question_content": "Q q", "code_pos": "a = 1", "code_neg": "a = 3"}]
    rows += [good | {"question": None}, good | {"code_neg": 3}, good | {"code_neg": 4}]
    (first, second), said = loaded(tmp_path, rows, "codescalerpair:")
    assert first.id != second.id and problem_of(first) == problem_of(second)  # one statement
    assert "left out 2" in said and "left out 1" in said and "WARNING" in said
    with pytest.raises(UserError, match="no pair left.*row 1"):
        loaded(tmp_path, rows[2:3], "codescalerpair:")


def test_rmbench_pairs_are_of_one_style_and_domain_and_id_name_an_item(tmp_path):
    row = {"id": 7, "prompt": "p", "chosen": ["a", "b", "```c"], "rejected": ["x", "y", "z"]}
    rows = [row | {"domain": domain} for domain in ("code", "safety-refuse", "safety-response")]
    found, said = loaded(tmp_path, [*rows, row | {"domain": "code", "chosen": ["a"]}], "rmbench:")
    sides = [(p.chosen, p.rejected, p.source) for p in found[:3]]
    assert sides == [("a", "x", "code"), ("b", "y", "code"), ("```c", "z", "code")]
    assert len({p.id for p in found}) == 9 and len({problem_of(p) for p in found}) == 3
    assert found[3].source == "safety" and "should be three texts" in said


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": FENCED, "rejected": "a = 2"},  # TRL, texts
    {"prompt": [USER], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},  # TRL, messages
    {"chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]},  # Skywork
    {"prompt": "q", "chosen": [SYSTEM, USER, ANSWERS[0]],
     "rejected": [USER, ANSWERS[1]]},  # UltraFeedback
    {"instruction": "q", "input": "", "chosen": FENCED, "rejected": "a = 2"},  # AceCodePair
])  # fmt: skip
def test_published_preferences(tmp_path, row):
    (pair,), said = loaded(tmp_path, [row], "preference:")
    assert (pair.prompt, pair.chosen, pair.rejected, said) == ("q", "a = 1", "a = 2", "")


@pytest.mark.parametrize("change, reason", [
    ({"rejected": "I cannot do that."}, "no program in 'rejected'"), ({"prompt": 5}, "format"),
    ({"rejected": "Yes"}, "no program"), ({"prompt": None}, "statement or a side is"),
    ({"rejected": [USER, ANSWERS[0], USER, ANSWERS[1]]}, "one question"), ({"chosen": 3}, "str"),
    ({"chosen": [USER | {"content": "other"}, ANSWERS[0]]}, "different questions"),
    ({"chosen": None}, "str"), ({"chosen": [3]}, "format"),
    ({"chosen": [{"role": "assistant"}]}, "no key 'content'"), ({"rejected": FENCED}, "read alike"),
])  # fmt: skip
def test_preferences_without_two_programs_are_left_out(tmp_path, change, reason):
    row = {"prompt": "q", "chosen": FENCED, "rejected": "a = 2"}
    found, said = loaded(tmp_path, [row, row | change], "preference:")
    assert len(found) == 1 and "left out 1" in said and reason in said
