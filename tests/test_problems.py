"""The toy world and the loaders.    pytest tests/test_problems.py"""

import gzip
import json
import sys

import pytest

import problems
from common import UserError
from problems import Problem, load_problems, policy_prompt, rm_prompt
from sandbox import Sandbox


@pytest.fixture(scope="module")
def splits():
    return {name: problems.toy_problems(name) for name in ("train", "untested", "test")}


def compositions(split, unseen=False, count=500):
    stream = problems.toy_stream(split, unseen=unseen)
    return [next(stream)[0] for _ in range(count)]


def test_toy_sizes(splits):
    assert {name: len(ps) for name, ps in splits.items()} == {"train": 1200, "untested": 4000, "test": 256}
    assert sum(p.source == "toy:unseen" for p in splits["test"]) == 64
    statements = [p.prompt for ps in splits.values() for p in ps]
    assert len(set(statements)) == len(statements) >= 5000


def test_no_composition_in_two_splits():
    seen = {}
    for split, unseen in (("pretrain", False), ("train", False), ("untested", False), ("test", False), ("test", True)):
        for composition in compositions(split, unseen):
            assert seen.setdefault(composition.names, (split, unseen)) == (split, unseen)


def test_unseen_part_has_combinations_and_phrasings_never_trained_on(splits):
    def pairs_of(composition):
        return {(a.name, b.name) for a, b in zip(composition.steps, composition.steps[1:], strict=False)}

    trained = set().union(
        *(pairs_of(c) for s in ("pretrain", "train", "untested") for c in compositions(s, count=3000))
    )
    assert all(pairs_of(c) - trained for c in compositions("test", unseen=True, count=100))
    seen = {p.format(k=k) for op in problems.STEPS + problems.REDUCTIONS for p in op.phrasings[:-1] for k in op.ks}
    held_out = {op.phrasings[-1].format(k=k) for op in problems.STEPS + problems.REDUCTIONS for k in op.ks}
    assert not seen & held_out
    trained = [p.prompt for name in ("train", "untested") for p in splits[name]]
    assert not [p for p in trained if any(f"{h}{end}" in p for h in held_out for end in (";", ".", ", then"))]
    assert all(any(h in p.prompt for h in held_out) for p in splits["test"] if p.source == "toy:unseen")


def test_toy_tests_include_the_edges(splits):
    for problem in splits["train"][:200]:
        inputs = [case["args"][0] for case in problem.tests.cases]
        assert len(inputs) >= 10 and [] in inputs and max(map(len, inputs)) >= 30
        assert any(x < 0 for xs in inputs for x in xs)
        assert any(len(set(xs)) < len(xs) for xs in inputs)
    assert all(p.tests is None and p.solution is None for p in splits["untested"])


def test_every_operation_has_two_seen_phrasings():
    assert all(len(set(op.phrasings)) >= 3 for op in problems.STEPS + problems.REDUCTIONS)


def test_reference_solutions_pass_in_the_sandbox(splits):
    chosen = splits["train"][:150] + splits["test"][::4]
    with Sandbox(workers=2) as sandbox:
        results = sandbox.map([(p.solution, p.tests) for p in chosen])
        without_return = "def solve(xs):\n    pass\n"
        wrong = sandbox.run(without_return, chosen[0].tests)
    assert [p.id for p, r in zip(chosen, results, strict=True) if not r.passed] == []
    assert not wrong.passed


def test_toy_problems_are_deterministic(splits):
    assert problems.toy_problems("test") == splits["test"]
    audited = problems.load_problems("toy:untested+tests", limit=20)
    assert [p.prompt for p in audited] == [p.prompt for p in problems.load_problems("toy:untested", limit=20)]
    assert all(p.tests and p.solution for p in audited) and not any(p.tests for p in splits["untested"])


def test_limit_keeps_both_parts_of_the_test_split():
    assert {p.source for p in load_problems("toy:test", limit=8)} == {"toy:test", "toy:unseen"}


ROW = {"id": "a", "prompt": "p", "tests": {"kind": "call", "entry_point": "f", "cases": [{"args": [1], "expected": 2}]}}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_own_schema(tmp_path):
    (problem,) = load_problems(write(tmp_path, ROW))
    assert problem.tests.cases == [{"args": [1], "expected": 2}] and problem.tests.entry_point == "f"


@pytest.mark.parametrize(
    "row, found",
    [
        ("not json", "row 2: not JSON"),
        ({"id": "b"}, "row 2: no key 'prompt'"),
        ({"id": "b", "prompt": None}, "row 2: key 'prompt' should be str"),
        ({**ROW, "extra": 1}, "row 2: unknown key ['extra']"),
        ({**ROW, "tests": {"kind": "other", "cases": [{}]}}, "tests.kind is 'other'"),
        ({**ROW, "tests": {"kind": "call", "cases": [{"args": [1]}]}}, "tests.cases[0] is"),
        ({**ROW, "tests": {"kind": "call", "cases": [{"args": [1], "expected": 2}]}}, "need an entry_point"),
        ({**ROW, "tests": {"kind": "call"}}, "missing 1 required positional argument: 'cases'"),
        ({**ROW, "solution": 1}, "key 'solution' should be str"),
        (ROW, "id 'a' appears twice"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, found):
    with pytest.raises(UserError, match=found.replace("[", r"\[").replace("]", r"\]")):
        load_problems(write(tmp_path, ROW, row))


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "toy:other", "other:x.jsonl", "mbpp:nowhere.jsonl"])
def test_a_spec_that_does_not_exist_is_named(spec):
    with pytest.raises(UserError, match="nowhere.jsonl|toy:|other"):
        load_problems(spec)


def test_empty_file_and_min_tests(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        load_problems(write(tmp_path))
    with pytest.raises(UserError, match="min-tests 3"):
        load_problems(write(tmp_path, ROW), min_tests=3)


def test_mbpp_row(tmp_path):
    row = {"text": "Add.", "code": "def add(a, b):\r\n  return a + b", "task_id": 7, "test_setup_code": "",
           "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "challenge_test_list": []}  # fmt: skip
    (problem,) = load_problems("mbpp:" + write(tmp_path, row))
    assert "assert add(1, 2) == 3" in problem.prompt and "assert add(0, 0)" not in problem.prompt
    assert problem.tests.kind == "assert" and "\r" not in problem.solution


def test_humaneval_row_runs(tmp_path):
    row = {"task_id": "HumanEval/x", "prompt": "def inc(x):\n    '''Adds one.'''\n",
           "canonical_solution": "    return x + 1\n",
           "entry_point": "inc", "test": "def check(candidate):\n    assert candidate(1) == 2\n"}  # fmt: skip
    (problem,) = load_problems("humaneval:" + write(tmp_path, row))
    assert policy_prompt(problem).count("Adds one.") == 1
    assert "Adds one." in rm_prompt(problem) and rm_prompt(problem, "full") == policy_prompt(problem)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run(problem.solution, problem.tests).passed
        assert not sandbox.run("def inc(x):\n    return x\n", problem.tests).passed


def test_lcb_prompt_places_the_format_behind_the_question():
    prompt = policy_prompt(Problem("a", "Question?"), "lcb")
    assert "Question?### Format: " in prompt and prompt.endswith(
        "### Answer: (use the provided format with backticks)\n\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# loaders of public formats


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solved(problem, code):
    with Sandbox(level="basic") as sandbox:
        return sandbox.run(code, problem.tests).passed


def test_cure_rows_are_stdin_problems(tmp_path):
    row = {"question": "Double it.", "test_input": ["1\n", "4\n"], "test_output": ["2\n", "8\n"], "test_time_limit": 2}
    (tmp_path / "LiveBench.json").write_text(json.dumps([row]))
    (problem,) = load_problems(f"cure:{tmp_path}/LiveBench.json")
    assert problem.tests.kind == "stdin" and problem.tests.time_limit == 2 and len(problem.tests.cases) == 2
    assert solved(problem, "print(2 * int(input()))") and not solved(problem, "print(2)")
    path = write_rows(tmp_path / "bad.jsonl", [row | {"test_output": ["2\n"]}])
    with pytest.raises(UserError, match="row 1: 2 in 'test_input', 1 in 'test_output'"):
        load_problems(f"cure:{path}")


def test_deepcoder_rows_of_all_four_sources(tmp_path):
    lcb = {"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}
    rows = [
        {"problem": "lcbv5", "tests": json.dumps([lcb]), "metadata": {"func_name": "add"},
         "starter_code": "class Solution:\n    def add(self, a, b):"},
        {"problem": "primeintellect", "tests": json.dumps([{"type": "stdin_stdout", "input": "3\n", "output": "6\n"}])},
        {"problem": "taco", "tests": json.dumps({"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"})},
        {"problem": "taco stdin", "tests": json.dumps({"inputs": ["3\n"], "outputs": ["6\n"]})},
        {"problem": "codeforces", "tests": json.dumps([{"testtype": "stdin_stdout", "input": "3\n", "output": "6\n"}])},
    ]  # fmt: skip
    rows.append({key: value for key, value in rows[0].items() if key != "metadata"})  # the name only in the test
    found = load_problems(f"deepcoder:{write_rows(tmp_path / 'rows.jsonl', rows)}")
    assert [p.tests.kind for p in found] == ["call", "stdin", "call", "stdin", "stdin", "call"]
    assert solved(found[2], "def add(a, b):\n    return a + b")  # no starter code: a function or a method
    add = "class Solution:\n    def add(self, a, b):\n        return a + b"
    for problem in found:
        right, wrong = (
            (add, add.replace("+", "-")) if problem.tests.kind == "call" else ("print(2 * int(input()))", "x")
        )
        assert solved(problem, right) and not solved(problem, wrong), problem.prompt
    for bad, message in (
        ({"tests": "{"}, "'tests' is not JSON"),
        ({"tests": [{"input": 1}]}, "keys 'input' and 'output'"),
        ({"tests": "[]", "problem": None}, "'problem' should be str"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", [rows[1] | bad])
        with pytest.raises(UserError, match=f"row 1: .*{message}"):
            load_problems(f"deepcoder:{path}")


@pytest.mark.parametrize(
    "tests, message",
    [
        (
            {"kind": "stdin", "cases": [{"input": 3, "output": "3"}]},
            r"cases\[0\] is .*, expected 'input' \(text\) and 'output' \(text\)",
        ),
        ({"kind": "stdin", "cases": [{"input": "3", "output": 3}]}, r"cases\[0\] is .*, expected 'input' \(text\)"),
        (
            {"kind": "call", "entry_point": "f", "cases": [{"args": 3, "expected": 3}]},
            r"expected 'args' \(list\) and 'expected'",
        ),
        ({"kind": "stdin", "cases": []}, "no tests"),
        ({"kind": "assert", "cases": [{"check": "def check(candidate): pass"}]}, "an entry_point"),
        (
            {"kind": "stdin", "cases": [{"input": "", "output": ""}], "time_limit": -1},
            "time_limit is -1, expected seconds",
        ),
    ],
)
def test_tests_that_cannot_run_are_refused_when_loaded(tests, message, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "p", "tests": tests}])
    with pytest.raises(UserError, match=f"rows.jsonl row 1: .*{message}"):
        load_problems(str(path))


def test_damaged_files_are_named(tmp_path):
    for name, content in (
        ("a.jsonl", b"\xff\xfe\n"),
        ("b.jsonl.gz", b"no gzip"),
        ("c.jsonl.gz", gzip.compress(b"{}")[:-9]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not JSON lines in UTF-8"):
            load_problems(str(tmp_path / name))
    with pytest.raises(UserError, match="--limit -1: expected at least 1"):
        load_problems("toy:train", limit=-1)


def test_rows_of_compressed_files_and_of_the_hub(tmp_path, monkeypatch):
    row = {"question": "Q", "test_input": ["1"], "test_output": ["1"]}
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert len(load_problems(f"cure:{tmp_path}/rows.jsonl.gz")) == 1
    asked = []

    def download(repo, file, revision, repo_type):
        asked.append((repo, file, revision, repo_type))
        return str(tmp_path / "rows.jsonl.gz")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(load_problems("cure:hub:Gen-Verse/LiveBench@main/test/rows.jsonl.gz")) == 1
    assert asked == [("Gen-Verse/LiveBench", "test/rows.jsonl.gz", "main", "dataset")]
    with pytest.raises(UserError, match="expected hub:OWNER/NAME"):
        load_problems("cure:hub:rows.jsonl")
    with pytest.raises(UserError, match="no file at"):
        load_problems("cure:nowhere.jsonl")


def test_parquet_needs_pyarrow_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_problems(f"deepcoder:{tmp_path}/rows.parquet")


def test_humaneval_helpers_are_those_of_the_prompt(tmp_path):
    prompt = "def poly(x):\n    return x + 1\n\ndef f(x):\n    '''poly of x'''\n"
    row = {"task_id": "HumanEval/1", "prompt": prompt, "entry_point": "f", "canonical_solution": "    return poly(x)\n",
           "test": "def check(candidate):\n    assert candidate(1) == poly(1)\n"}  # fmt: skip
    (problem,) = load_problems(f"humaneval:{write_rows(tmp_path / 'h.jsonl', [row])}")
    assert solved(problem, problem.solution)
    assert not solved(problem, "def poly(x):\n    return 7\n\ndef f(x):\n    return 7\n")
