"""The loaders, --verify and the toy world.    pytest tests/test_problems.py"""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import UserError
from problems import PRELUDE, Problem, load_problems, policy_prompt, verified, verify_solutions
from sandbox import Sandbox
from sandbox import Tests as Suite  # pytest would collect a class named Test...
from tiny import world

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, level="basic") as sandbox:
        yield sandbox


@pytest.fixture
def load(tmp_path):
    """load(format, *rows, **options) -> the problems of a file with these rows; "" is our own."""

    def load(kind, *rows, **options):
        path = tmp_path / "rows.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines))
        return load_problems(f"{kind}:{path}" if kind else str(path), **options)

    return load


# --------------------------------------------------------------------------------------------------
# our own schema, and specs

CALL = {"kind": "call", "entry_point": "f", "cases": [{"args": [1], "expected": 2}]}
ROW = {"id": "a", "prompt": "p", "tests": CALL}


def test_own_schema(load):
    (problem,) = load("", ROW | {"solution": None, "starter": "def f(x):"})
    assert problem == Problem("a", "p", Suite(**CALL), starter="def f(x):")


@pytest.mark.parametrize(
    "row, found",
    [
        ("not json", "row 2: not JSON"),
        ('{"id": "b", "prompt": "\\ud800"}', "row 2: not JSON.*surrogates"),
        ("[1]", "row 2: not an object"),
        ({"id": "b"}, "row 2: no key 'prompt'"),
        ({"id": "b", "prompt": None}, "row 2: no key 'prompt'|'prompt' should be str"),
        (ROW | {"extra": 1}, "row 2: .*'extra'"),
        (ROW | {"solution": 1}, "row 2: key 'solution' should be str"),
        (ROW | {"tests": []}, "row 2: key 'tests' should be dict"),
        (ROW | {"tests": CALL | {"kind": "other"}}, "row 2: .*tests.kind is .*other"),
        (ROW | {"tests": {"kind": "call"}}, "row 2: .*missing .* 'cases'"),
        (ROW | {"tests": CALL | {"entry_point": None}}, "row 2: .*entry_point"),
        (ROW | {"tests": CALL | {"cases": [{"args": [1]}]}}, r"row 2: .*tests.cases\[0\] is"),
        (ROW | {"tests": CALL | {"cases": []}}, "row 2: .*no tests"),
        (ROW | {"tests": CALL | {"time_limit": -1}}, "row 2: .*time_limit is -1"),
        (ROW, "row 2: the id appears twice, found 'a'"),
    ],
)
def test_a_row_of_our_own_schema_that_does_not_fit_ends_the_load(load, row, found):
    with pytest.raises(UserError, match=found):
        load("", ROW, row)


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "toy:other", "other:x.jsonl", "mbpp:no.jsonl"])
def test_a_spec_that_does_not_exist_is_named(spec):
    with pytest.raises(UserError, match=spec.partition(":")[2] or spec):
        load_problems(spec)


def test_min_tests_limit_and_empty_files(load):
    assert len(load("", ROW, {"id": "b", "prompt": "no tests"}, min_tests=2)) == 1
    for limit in (0, -1):
        with pytest.raises(UserError, match=f"--limit {limit}"):
            load("", ROW, limit=limit)
        with pytest.raises(UserError, match=f"--limit {limit}"):
            load_problems("toy:train", limit=limit)
    with pytest.raises(UserError, match="no problem left of 1 .--min-tests 3"):
        load("", ROW, min_tests=3)
    with pytest.raises(UserError, match="no rows"):
        load("")


def test_integers_of_any_length(load, sandbox):
    tests = CALL | {"cases": [{"args": [5000], "expected": 10**5000}]}
    text = json.dumps(ROW | {"tests": tests})
    (problem,) = load("", text)
    assert problem.tests.cases[0]["expected"] == 10**5000


# --------------------------------------------------------------------------------------------------
# files


def test_files_by_their_ending(tmp_path):
    row = {"question": "Q", "test_input": ["1"], "test_output": ["1"]}
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row) + "\n\n" + json.dumps(row))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(2 * (json.dumps(row) + "\n"))
    loaded = [load_problems(f"cure:{tmp_path}/a{e}") for e in (".json", ".jsonl", ".jsonl.gz")]
    assert loaded[0] == loaded[1] == loaded[2] and len(loaded[0]) == 2


def test_parquet(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"question": "Q", "test_input": ["1"], "test_output": ["1"]}
    parquet.write_table(arrow.Table.from_pylist([row] * 100), tmp_path / "a.parquet")
    assert len(load_problems(f"cure:{tmp_path}/a.parquet", limit=70)) == 70
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_problems(f"cure:{tmp_path}/a.parquet")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", b"\xff\xfe\n"),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", gzip.compress(b"{}")[:-9]),
        ("a.json", b"[1"),
        ("a.parquet", b"PAR1"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*(damaged|pyarrow)"):
        load_problems(f"cure:{tmp_path}/{name}")


def test_files_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    asked = []

    def download(repo, file, **options):
        asked.append((repo, file, options))
        if file == "none.jsonl":
            raise OSError("404\nmore")
        return str(tmp_path / "rows.jsonl")

    monkeypatch.setattr("problems.hf_hub_download", download)
    assert len(load_problems("hub:owner/name@main/test/rows.jsonl")) == 1
    assert asked == [
        ("owner/name", "test/rows.jsonl", {"repo_type": "dataset", "revision": "main"})
    ]
    with pytest.raises(UserError, match="none.jsonl: cannot be fetched: 404$"):
        load_problems("hub:owner/name/none.jsonl")
    with pytest.raises(UserError, match="expected hub:OWNER/NAME"):
        load_problems("cure:hub:rows.jsonl")


# --------------------------------------------------------------------------------------------------
# public formats


def test_mbpp(load):
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    row = {"text": "Add.", "code": "def add(a, b):\r\n  return a + b", "test_list": asserts}
    full, sanitized, untested = load(
        "mbpp",
        row | {"task_id": 1, "test_setup_code": "x = 1"},
        row | {"task_id": 2, "test_imports": ["import math", "import re"]},
        row | {"task_id": 3, "test_list": []},
    )
    assert full.prompt.endswith(asserts[0]) and asserts[1] not in full.prompt
    assert full.tests.setup == "x = 1" and sanitized.tests.setup == "import math\nimport re"
    assert "\r" not in full.solution and untested.tests is None


def test_humaneval(load, sandbox):
    prompt = "def poly(x):\n    return x + 1\n\ndef f(x):\n    '''Poly of x.'''\n"
    check = "def check(candidate):\n    assert candidate(1) == poly(1)\n"
    row = {"task_id": "HumanEval/x", "prompt": prompt, "entry_point": "f", "test": check}
    (problem,) = load("humaneval", row | {"canonical_solution": "    return poly(x)\n"})
    assert policy_prompt(problem).count("Poly of x.") == problem.prompt.count("Poly of x.") == 1
    assert sandbox.run(problem.solution, problem.tests).passed
    cheat = "def poly(x):\n    return 7\n\ndef f(x):\n    return 7\n"
    assert not sandbox.run(cheat, problem.tests).passed


@pytest.mark.parametrize("published", [False, True])
def test_leetcode_rows_are_read_by_the_format_of_checks(load, sandbox, published):
    check = "def check(candidate):\n    assert candidate(nums = [3, 1]) == 1\n"
    code = (
        "class Solution:\n    def least(self, nums: List[int]) -> int:\n        return {}(nums)\n"
    )
    row = {"id": "1", "question": "Least.", "code_pos": code.format("min")}
    row["tests_functional"] = f"{check}\n\ncheck(Solution().least)"
    if published:
        row = {"task_id": "least", "problem_description": "Least.", "starter_code": code[:30]}
        row |= {"prompt": "from typing import List\n", "completion": code.format("min")}
        row |= {"entry_point": "Solution().least", "test": check}
    (problem,) = load("humaneval", row)
    assert problem.prompt == "Least." and problem.source == "leetcode"
    assert sandbox.run(problem.solution, problem.tests).passed
    assert not sandbox.run(code.format("max"), problem.tests).passed


def test_cure(load, sandbox):
    row = {"question": "Double.", "test_input": ["1\n", ["4"]], "test_output": ["2\n", ["8"]]}
    (problem,) = load("cure", row | {"test_time_limit": 2})
    assert problem.tests.time_limit == 2 and problem.source == "rows"
    assert sandbox.run("print(2 * int(input()))", problem.tests).passed
    assert not sandbox.run("print(2)", problem.tests).passed


def lcb(given, wanted, name="f", **more):
    metadata = {"func_name": name}
    return {"input": given, "output": wanted, "testtype": "functional", "metadata": metadata} | more


def pi(given, wanted, name="f"):
    return {"type": "function_call", "fn_name": name, "input": given, "output": wanted}


def taco(given, wanted, name="f"):
    return {"inputs": [given], "outputs": [wanted]} | ({"fn_name": name} if name else {})


STDIN = {"type": "stdin_stdout", "input": "3\n", "output": "6\n"}
DOUBLE = "print(2 * int(input()))"
FIRST = "def f(x):\n    return x[0] if x else None"
# tests of a row, a program that passes, programs that do not
DEEPCODER = {
    "codeforces": ([STDIN], [DOUBLE], ["print(3)"]),
    "taco stdin": (taco("3\n", "6\n", None), [DOUBLE], ["print(3)"]),
    "lists of lines": (
        taco(["2", "5 6"], ["5", "6"], None),
        ["input()\nprint(*input().split(), sep='\\n')"],
        ["input()\nprint(input().split()[0])"],
    ),
    "wrapped list": ([pi([[3, 1]], [[1, 3]])], ["def f(x):\n    return x[::-1]"], [FIRST]),
    "wrapped text": ([pi(["ab"], ["AB"])], ["def f(x):\n    return x.upper()"], []),
    "plain text": (taco(["ab"], "AB"), ["def f(x):\n    return x.upper()"], []),
    "wrapped null": (taco([[]], [None]), [FIRST], ["def f(x):\n    return 0"]),
    "null": (taco([[]], None), [FIRST], ["def f(x):\n    return 0"]),
    "text like JSON": (taco([[1]], ["[1]"]), ["def f(x):\n    return str(x)"], []),
    "digits": (taco([7], ["7"]), ["def f(x):\n    return str(x)"], ["def f(x):\n    return x"]),
    "list of two": (taco([[4, 9]], [4, 9]), ["def f(x):\n    return x"], [FIRST]),
    "list of one": (
        taco([[12]], [12]),
        ["def f(x):\n    return x", FIRST],
        ["def f(x):\n    return [x]", "def f(x):\n    return 4"],
    ),
    "lists of one and more": (
        {"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [[1, 2], [3]]},
        ["def f(x):\n    return x"],
        ["def f(x):\n    return x if len(x) > 1 else x[0]"],
    ),
    "lcb list of one": ([lcb("[12]", "[12]")], ["def f(x):\n    return x"], [FIRST]),
    "lcb text": ([lcb('"7"\n1', '"7"')], ["def f(x, y):\n    return x"], []),
    "lcb digits": ([lcb("7", "7")], ["def f(x):\n    return x"], ["def f(x):\n    return str(x)"]),
    "keys": (
        taco([{"1": 2, "-3": 4}], [{"5": {"06": 7}}]),
        ["def f(d):\n    return {5: {'06': sum(d) + 9}}"],
        [],
    ),
    "python literal": (str([STDIN]), [DOUBLE], ["print(3)"]),
}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("name", DEEPCODER)
def test_deepcoder(load, sandbox, name, as_text):
    tests, right, wrong = DEEPCODER[name]
    row = {"problem": "p", "tests": json.dumps(tests) if as_text else tests}
    row["tests"] = tests if isinstance(tests, str) else row["tests"]
    (problem,) = load("deepcoder", row)
    assert [sandbox.run(code, problem.tests).passed for code in right] == [True] * len(right)
    assert [sandbox.run(code, problem.tests).passed for code in wrong] == [False] * len(wrong)


def test_the_function_of_a_row_comes_from_its_test_its_object_or_its_metadata(load):
    test = {key: value for key, value in lcb("1", "2").items() if key != "metadata"}
    starter = {"starter_code": "class Solution:\n    def f(self, x):"}
    found = load(
        "deepcoder",
        {"problem": "p", "tests": [lcb("1", "2")], "metadata": {"func_name": "other"}},
        {"problem": "p", "tests": [test], "metadata": '{"func_name": "f"}'} | starter,
        {"question": "p", "tests": taco([1], [2]), "metadata": "a text"},
    )
    assert [p.tests.entry_point for p in found] == ["f", "Solution.f", "f"]


def test_name_and_kind_do_not_leak_from_one_test_to_the_next(load):
    named, unnamed = pi([1], [2]), {"input": [1], "output": [2]}
    rows = [[named, unnamed], [unnamed, named], [named, STDIN], [named, pi([1], [2], "g")]]
    said = []
    good = {"problem": "p", "tests": [named] * 2}
    rows = [{"problem": "p", "tests": tests} for tests in rows]
    assert len(load("deepcoder", good, *rows, log=said.append)) == 1
    assert "left out 4 of 5: " in said[0] and "row 2: tests of several kinds" in said[0]


def test_functional_rows_have_the_names_that_harnesses_preload(load, sandbox):
    code = """class Solution:
    def f(self, nums: List[int]) -> Optional[int]:
        heapq.heapify(nums)
        counts, least = Counter(nums), min(inf, nums[0], math.inf)
        assert pow(3, 2, 5) == 4 and isinstance(counts, collections.Counter)
        @cache
        def count(n): return counts[n]
        return reduce(max, accumulate(map(count, deque(nums)))) + bisect_left(nums, least)
"""
    test = [lcb("[4, 9, 4]", "5")]
    starter = "class Solution:\n    def f(self, nums: List[int]) -> int:"
    (problem,) = load("deepcoder", {"problem": "p", "tests": test, "starter_code": starter})
    result = sandbox.run(code, problem.tests)
    assert result.passed, result.detail
    assert problem.tests.setup == PRELUDE and "import" not in policy_prompt(problem)


def test_fenced_solutions_are_taken_out(load):
    row = {"problem": "p", "tests": [STDIN], "solutions": [f"```python\n{DOUBLE}\n```"]}
    assert load("deepcoder", row)[0].solution.strip() == DOUBLE


MISFITS = [
    ("mbpp", {"text": "t", "code": "c", "test_list": "assert"}),
    ("mbpp", {"text": "t", "code": "c", "test_list": [1]}),
    ("mbpp", {"text": "t", "code": None, "test_list": []}),
    ("humaneval", {"prompt": "p"}),
    ("cure", {"question": "q", "test_input": ["1"], "test_output": []}),
    ("cure", {"question": "q", "test_input": ["1"], "test_output": [{}]}),
    ("cure", {"question": "q", "test_input": 1, "test_output": [{}]}),
    ("cure", {"question": "q", "test_input": ["1"], "test_output": ["1"], "test_time_limit": "x"}),
    ("deepcoder", {"problem": None, "tests": [STDIN]}),
    ("deepcoder", {"problem": "p", "tests": "{"}),
    ("deepcoder", {"problem": "p", "tests": "[" * 100_000}),
    ("deepcoder", {"problem": "p", "tests": 1}),
    ("deepcoder", {"problem": "p", "tests": [1]}),
    ("deepcoder", {"problem": "p", "tests": [{"input": "1"}]}),
    ("deepcoder", {"problem": "p", "tests": [pi("x y", "1")]}),
    ("deepcoder", {"problem": "p", "tests": [pi(1, "1")]}),
    ("deepcoder", {"problem": "p", "tests": [pi([1], "1", ["f"])]}),
    ("deepcoder", {"problem": "p", "tests": [pi([1], "1", None)]}),
    ("deepcoder", {"problem": "p", "tests": [lcb("1", "x y")]}),
    ("deepcoder", {"problem": "p", "tests": [STDIN | {"type": 1}]}),
    ("deepcoder", {"problem": "p", "tests": [STDIN], "starter_code": 1}),
    ("deepcoder", '{"problem": "\\udc00", "tests": []}'),
    ("deepcoder", "no JSON"),
    ("deepcoder", "[]"),
]
GOOD = {
    "mbpp": {"text": "t", "code": "c", "test_list": ["assert f()"], "task_id": "good"},
    "humaneval": {"task_id": "g", "prompt": "p", "canonical_solution": "c", "entry_point": "f"}
    | {"test": "def check(candidate): pass"},
    "cure": {"question": "q", "test_input": ["1"], "test_output": ["1"], "task_id": "good"},
    "deepcoder": {"problem": "p", "tests": [STDIN], "id": "good"},
}


@pytest.mark.parametrize("kind, row", MISFITS)
def test_a_row_of_a_public_format_that_does_not_fit_is_left_out_and_named(load, kind, row):
    said = []
    rows = [GOOD[kind], row, row, GOOD[kind] | {"id": 1, "task_id": "1"}]
    assert len(load(kind, *rows, log=said.append)) == 2
    (text,) = said
    assert "2 problems" in text and "left out 2 of 4: " in text and "row 2: " in text
    with pytest.raises(UserError, match="no problem left of 1 .*rows.jsonl row 1: ") as error:
        load(kind, row)
    assert "\n" not in str(error.value)


def test_more_than_a_fifth_left_out_is_said_loudly_and_even_without_a_log(load, capsys):
    good = [GOOD["mbpp"] | {"task_id": i} for i in range(8)]
    said = []
    load("mbpp", *good, {}, good[0], log=said.append)
    assert said[0].count("left out 1 of 10") == 2 and "WARNING" not in said[0]
    load("mbpp", *good, {}, {}, {})
    assert "3 of 11 rows do not fit" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# the data's own solutions, and prompts


def test_verified_keeps_what_passes_and_what_cannot_be_told(sandbox):
    tests = Suite(**CALL)
    right = Problem("right", "p", tests, "def f(x): return x + 1")
    wrong = Problem("wrong", "p", tests, "def f(x): return x")
    problems = [wrong, Problem("untested", "p", None, "x"), right, Problem("unsolved", "p", tests)]
    results = verify_solutions(problems, sandbox)
    assert [result and result.passed for result in results] == [False, None, True, None]
    said = []
    assert verified(problems, sandbox, said.append) == problems[1:]
    text = "\n".join(said)
    for part in ("1 of 2 solutions pass", "2 have none", "1 wrong_answer, the first: wrong: "):
        assert part in text


def test_the_command_runs_from_any_folder(tmp_path):
    row = ROW | {"solution": "def f(x): return x + 1"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    command = [sys.executable, str(ROOT / "problems.py"), "--sandbox", "basic", "--verify"]
    for spec, wanted in (("mine.jsonl", "1 of 1"), ("toy:train", "5 of 5")):
        done = subprocess.run(
            [*command, spec, "--limit", "5"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and f"{wanted} solutions pass" in done.stdout, done.stderr


def test_lcb_prompt_places_the_format_behind_the_question():
    prompt = policy_prompt(Problem("a", "Question?"), "lcb")
    assert "tests.\n\nQuestion?### Format: Read the inputs" in prompt
    assert prompt.endswith("backticks)\n\n") and "# YOUR CODE HERE" in prompt
    prompt = policy_prompt(Problem("a", "Question?", starter="def f():"), "lcb")
    assert "Question?### Format: You will use" in prompt and "```python\ndef f():\n```" in prompt


# --------------------------------------------------------------------------------------------------
# the toy world


@pytest.fixture(scope="module")
def splits():
    return {name: load_problems("toy:" + name) for name in ("train", "untested", "test")}


def compositions(split, unseen=False, count=500):
    return [c for c, *_ in itertools.islice(world.stream(split, unseen=unseen), count)]


def test_toy_sizes(splits):
    sizes = {name: len(problems) for name, problems in splits.items()}
    assert sizes == {"train": 1200, "untested": 4000, "test": 256}
    assert sum(p.source == "toy:unseen" for p in splits["test"]) == 64
    statements = [p.prompt for problems in splits.values() for p in problems]
    assert len(set(statements)) == len(statements)


def test_no_composition_in_two_splits():
    seen = {}
    for part in [(split, False) for split in world.SPLITS] + [("test", True)]:
        for composition in compositions(*part):
            assert seen.setdefault(composition.names, part) == part


def test_unseen_part_has_pairs_of_operations_never_trained_on():
    def pairs_of(composition):
        return {(a.name, b.name) for a, b in itertools.pairwise(composition.steps)}

    seen = (c for s in ("pretrain", "train", "untested") for c in compositions(s, count=3000))
    trained = set().union(*map(pairs_of, seen))
    assert all(pairs_of(c) - trained for c in compositions("test", unseen=True, count=100))


def test_unseen_part_has_phrasings_never_trained_on(splits):
    ops = world.STEPS + world.REDUCTIONS
    assert all(len(set(op.phrasings)) >= 3 for op in ops)
    seen = {p.format(k=k) for op in ops for p in op.phrasings[:-1] for k in op.constants}
    held_out = {op.phrasings[-1].format(k=k) for op in ops for k in op.constants}
    assert not seen & held_out
    trained = [p.prompt for name in ("train", "untested") for p in splits[name]]
    clauses = [text + end for text in held_out for end in (";", ".", ", then")]
    assert not [prompt for prompt in trained if any(clause in prompt for clause in clauses)]
    unseen = [p.prompt for p in splits["test"] if p.source == "toy:unseen"]
    assert all(any(text in prompt for text in held_out) for prompt in unseen)


def test_toy_tests_include_the_edges(splits):
    for problem in splits["train"][:200]:
        inputs = [case["args"][0] for case in problem.tests.cases]
        assert len(inputs) >= 10 and [] in inputs and max(map(len, inputs)) >= 30
        assert any(x < 0 for xs in inputs for x in xs)
        assert any(len(set(xs)) < len(xs) for xs in inputs)


def test_toy_solutions_pass_and_a_wrong_one_does_not(splits, sandbox):
    chosen = splits["train"][:60] + splits["test"][::8]
    assert verified(chosen, sandbox, lambda text: None) == chosen
    assert not sandbox.run("def solve(xs):\n    pass\n", chosen[0].tests).passed


def test_toy_problems_are_the_same_each_time_and_untested_ones_can_be_audited(splits):
    assert load_problems("toy:test") == splits["test"]
    audited = load_problems("toy:untested+tests", limit=20)
    assert [p.prompt for p in audited] == [p.prompt for p in load_problems("toy:untested", 20)]
    assert all(p.tests and p.solution for p in audited)
    assert not any(p.tests or p.solution for p in splits["untested"])


def test_limit_keeps_both_parts_of_the_test_split():
    sources = {p.source for p in load_problems("toy:test", limit=8)}
    assert sources == {"toy:test", "toy:unseen"}
