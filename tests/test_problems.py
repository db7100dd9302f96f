"""The loaders, --verify and the toy world.    pytest tests/test_problems.py"""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import UserError
from problems import PRELUDE, Problem, load_problems, policy_prompt, verified
from sandbox import Sandbox
from sandbox import Tests as Suite  # pytest would collect a class named Test...
from tiny import world

SCRIPT = Path(__file__).resolve().parent.parent / "problems.py"
CALL = {"kind": "call", "entry_point": "f", "cases": [{"args": [1], "expected": 2}]}
ROW = {"id": "a", "prompt": "p", "tests": CALL}
STDIN = {"type": "stdin_stdout", "input": "3\n", "output": "6\n"}
CURE = {"question": "q", "test_input": ["1"], "test_output": ["1"]}
GOOD = {
    "mbpp": {"text": "t", "code": "c", "test_list": ["assert f()"], "task_id": "good"},
    "humaneval": {"task_id": "g", "prompt": "p", "canonical_solution": "c", "entry_point": "f",
                  "test": "def check(candidate): pass"},
    "cure": CURE | {"task_id": "good"},
    "deepcoder": {"problem": "p", "tests": [STDIN], "id": "good"},
}  # fmt: skip


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
# our own schema, specs and files


def test_own_schema(load):
    tests = CALL | {"cases": [{"args": [5000], "expected": 10**5000}]}  # integers of any length
    (problem,) = load("", ROW | {"solution": None, "starter": "def f(x):", "tests": tests})
    assert problem == Problem("a", "p", Suite(**tests), starter="def f(x):")
    case = {"args": [1], "expected": None}
    (problem,) = load("", ROW | {"tests": CALL | {"cases": [case | {"any_of": None}]}})
    assert problem.tests.cases == [case]  # only an expected value may be null


@pytest.mark.parametrize("row, found", [
    ("not json", "not JSON"), ("[1]", "not an object"), (ROW | {"extra": 1}, "'extra'"),
    ('{"id": "b", "prompt": "\\ud800"}', "not JSON.*surrogates"),
    ({"id": "b", "prompt": None}, "no key 'prompt'"),
    (ROW | {"solution": 1}, "key 'solution' should be str"),
    (ROW | {"tests": []}, "key 'tests' should be dict"),
    (ROW | {"tests": {"kind": "call"}}, "missing .* 'cases'"),
    (ROW | {"tests": CALL | {"kind": "other"}}, "tests.kind is .*other"),
    (ROW | {"tests": CALL | {"cases": [{"args": [1]}]}}, r"tests.cases\[0\]"),
    (ROW, "the id appears twice, found 'a'"),
])  # fmt: skip
def test_a_row_of_our_own_schema_that_does_not_fit_ends_the_load(load, row, found):
    with pytest.raises(UserError, match=f"row 2: .*{found}"):
        load("", ROW, row)


@pytest.mark.parametrize("spec, limit, named", [
    ("nowhere.jsonl", None, "nowhere.jsonl"), ("toy:other", None, "toy:other"),
    ("other:x.jsonl", None, "other:x.jsonl"), ("mbpp:no.jsonl", None, "no.jsonl"),
    ("cure:hub:rows.jsonl", None, "expected hub:OWNER/NAME"),
    ("toy:train", 0, "--limit 0"), ("x.jsonl", -1, "--limit -1"),
])  # fmt: skip
def test_a_spec_or_a_limit_that_cannot_be_is_named(spec, limit, named):
    with pytest.raises(UserError, match=named):
        load_problems(spec, limit)


def test_files_by_their_ending(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    line = json.dumps(CURE) + "\n"
    (tmp_path / "a.json").write_text(f"[{line * 2}]".replace("}\n{", "}, {"))
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n{line}")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(2 * line.encode()))
    parquet.write_table(arrow.Table.from_pylist([CURE] * 100), tmp_path / "a.parquet")
    endings = ("json", "jsonl", "jsonl.gz", "parquet")
    loaded = [load_problems(f"cure:{tmp_path}/a.{end}", limit=70) for end in endings]
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3][:2]
    assert [len(problems) for problems in loaded] == [2, 2, 2, 70]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_problems(f"cure:{tmp_path}/a.parquet")


@pytest.mark.parametrize("name, content, named", [
    ("a.jsonl", b"\n", "no rows"), ("a.jsonl", b"\xff\xfe\n", "cannot be read"),
    ("a.json", b"[1", "cannot be read"), ("a.parquet", b"PAR1", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"{}")[:-9], "cannot be read"),
])  # fmt: skip
def test_damaged_files_are_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {named}"):
        load_problems(f"cure:{tmp_path}/{name}")


def test_files_of_the_hub(tmp_path, monkeypatch):
    def download(repo, file, **options):
        if file == "none.jsonl":
            raise OSError("404\nmore")
        assert (repo, file) == ("owner/name", "test/rows.jsonl")
        assert options == {"repo_type": "dataset", "revision": "main"}
        return str(tmp_path / "rows.jsonl")

    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    monkeypatch.setattr("problems.hf_hub_download", download)
    assert len(load_problems("hub:owner/name@main/test/rows.jsonl")) == 1
    with pytest.raises(UserError, match="none.jsonl: cannot be read: .*404.*more"):
        load_problems("hub:owner/name/none.jsonl")


# --------------------------------------------------------------------------------------------------
# public formats


def test_mbpp(load):
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    row = {"text": "Add.", "code": "def add(a, b):\r\n  return a + b", "test_list": asserts}
    changes = {"test_setup_code": "x = 1"}, {"test_imports": ["import math"]}, {"test_list": []}
    rows = (row | {"task_id": i} | change for i, change in enumerate(changes))
    full, sanitized, untested = load("mbpp", *rows)
    assert full.prompt.endswith(asserts[0]) and asserts[1] not in full.prompt
    assert full.tests.setup == "x = 1" and sanitized.tests.setup == "import math"
    assert "\r" not in full.solution and untested.tests is None


def test_humaneval(load, sandbox):
    prompt = "def poly(x):\n    return x + 1\n\ndef f(x):\n    '''Poly of x.'''\n"
    check = "def check(candidate):\n    assert candidate(1) == poly(1)\n"
    changes = {"prompt": prompt, "test": check, "canonical_solution": "    return poly(x)\n"}
    (problem,) = load("humaneval", GOOD["humaneval"] | changes)
    assert policy_prompt(problem).count("Poly of x.") == problem.prompt.count("Poly of x.") == 1
    assert sandbox.run(problem.solution, problem.tests).passed
    cheat = "def poly(x):\n    return 7\n\ndef f(x):\n    return 7\n"
    assert not sandbox.run(cheat, problem.tests).passed


def test_cure(load, sandbox):
    row = {"question": "Double.", "test_input": ["1\n", ["4"]], "test_output": ["2\n", ["8"]]}
    (problem,) = load("cure", row | {"test_time_limit": 2})
    assert problem.tests.time_limit == 2 and problem.source == "rows"
    assert sandbox.run(DOUBLE, problem.tests).passed
    assert not sandbox.run("print(2)", problem.tests).passed


def lcb(given, wanted):
    functional = {"testtype": "functional", "metadata": {"func_name": "f"}}
    return [{"input": given, "output": wanted} | functional]


def pi(given, wanted, name="f"):
    return [{"type": "function_call", "fn_name": name, "input": given, "output": wanted}]


def taco(given, wanted):
    return {"fn_name": "f", "inputs": [given], "outputs": [wanted]}


DOUBLE, LAST = "print(2 * int(input()))", "input()\nprint(*input().split(), sep='\\n')"
DEEPCODER = [  # tests of a row, programs that pass, others; an expression is what f(x, y=0) returns
    ([STDIN], [DOUBLE], ["print(3)"]),
    (str([STDIN]), [DOUBLE], ["print(3)"]),
    ({"inputs": ["3\n"], "outputs": ["6\n"]}, [DOUBLE], ["print(3)"]),
    ({"inputs": [[3]], "outputs": [6]}, [DOUBLE], ["print(3)"]),
    ({"inputs": [["2", "5 6"]], "outputs": [["5", "6"]]}, [LAST], [LAST.replace("*", "")]),
    (pi([[3, 1]], [[1, 3]]), ["x[::-1]"], ["x[0]"]),
    (pi(["ab"], ["AB"]), ["x.upper()"], []),
    (taco(["ab"], "AB"), ["x.upper()"], []),
    (taco([[]], [None]), ["None"], ["0"]),
    (taco([[]], None), ["None"], ["0"]),
    (taco([[1]], ["[1]"]), ["str(x)"], []),
    (taco([7], ["7"]), ["str(x)"], ["x"]),
    (taco([[4, 9]], [4, 9]), ["x"], ["x[0]"]),
    (taco([[12]], [12]), ["x", "x[0]"], ["[x]", "4"]),
    ([*pi([[1, 2]], [1, 2]), *pi([[3]], [3])], ["x"], ["x[1:] and x or 3"]),
    (taco([{"1": 2, "-3": 4}], [{"5": {"06": 7}}]), ["{5: {'06': sum(x) + 9}}"], []),
    (lcb("[12]", "[12]"), ["x"], ["x[0]"]),
    (lcb('"7"\n1', '"7"'), ["x"], []),
    (lcb("7", "7"), ["x"], ["str(x)"]),
]


@pytest.mark.parametrize("tests, right, wrong", DEEPCODER, ids=lambda value: str(value)[:60])
def test_deepcoder(load, sandbox, tests, right, wrong):
    texts = {tests if isinstance(tests, str) else json.dumps(tests)}
    fenced = {"problem": "p", "solutions": [f"```python\n{DOUBLE}\n```"]}
    for problem in load("deepcoder", *(fenced | {"tests": form} for form in (tests, *texts))):
        assert problem.solution == DOUBLE
        for code in right + wrong:
            program = code if "print" in code else f"def f(x, y=0):\n    return {code}"
            assert sandbox.run(program, problem.tests).passed == (code in right)


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
    row = {"starter_code": "class Solution:\n    def f(self, nums: List[int]) -> int:"}
    (problem,) = load("deepcoder", row | {"question": "p", "tests": lcb("[4, 9, 4]", "5")})
    assert sandbox.run(code, problem.tests).passed
    assert problem.tests.setup == PRELUDE and "import" not in policy_prompt(problem)


@pytest.mark.parametrize("kind, row", [
    ("mbpp", GOOD["mbpp"] | {"test_list": "assert"}), ("mbpp", GOOD["mbpp"] | {"code": None}),
    ("humaneval", {"prompt": "p"}), ("cure", CURE | {"test_output": []}),
    ("cure", CURE | {"test_output": [{}]}), ("cure", CURE | {"test_time_limit": "x"}),
    ("deepcoder", "no JSON"), ("deepcoder", '{"problem": "\\udc00", "tests": []}'),
    ("deepcoder", {"problem": None, "tests": [STDIN]}),
    ("deepcoder", {"problem": "p", "tests": [STDIN], "starter_code": 1}),
    *[("deepcoder", {"problem": "p", "tests": tests}) for tests in (
        "{", "[" * 100_000, 1, [1], [{"input": "1"}], pi("x y", "1"), pi(1, "1"),
        pi([1], "1", ["f"]), pi([1], "1", None), lcb("1", "x y"), [STDIN | {"type": 1}],
        [*pi([1], [2]), STDIN], [*pi([1], [2]), *pi([1], [2], "g")],
        [*pi([1], [2]), {"input": [1], "output": [2]}])],
])  # fmt: skip
def test_a_row_of_a_public_format_that_does_not_fit_is_left_out_and_named(load, kind, row):
    said = []
    rows = [GOOD[kind], row, row, GOOD[kind] | {"id": 1, "task_id": "1"}]
    assert len(load(kind, *rows, log=said.append)) == 2
    for words in ("2 problems", "left out 2 of 4: ", "row 2: ", "WARNING: 2 of 4 rows do not fit"):
        assert words in said[0]
    with pytest.raises(UserError, match="no problem left [^\n]*rows.jsonl row 1: [^\n]*$"):
        load(kind, row)


@pytest.mark.parametrize("bad, is_loud", [([{}], False), ([{}, {}], True)])
def test_each_reason_is_said_once_and_many_rows_loudly(load, capsys, bad, is_loud):
    load("mbpp", *[GOOD["mbpp"] | {"task_id": i} for i in (*range(8), 0)], *bad)
    said = capsys.readouterr().err
    assert said.count("left out") == 2 + is_loud == 2 + said.count("WARNING: 3 of 11")


# --------------------------------------------------------------------------------------------------
# the data's own solutions, and prompts


def test_verified_keeps_what_passes_and_what_cannot_be_told(sandbox):
    tests, said = Suite(**CALL), []
    solutions = {"wrong": "def f(x): return x", "right": "def f(x): return x + 1", "none": None}
    problems = [Problem(name, "p", tests, code) for name, code in solutions.items()]
    problems.append(Problem("untested", "p", None, "x"))
    assert verified(problems, sandbox, said.append) == problems[1:]
    assert said[0] == "1 of 2 solutions pass their own tests, 2 have none"
    assert "1 wrong_answer, the first: wrong: " in said[1]


@pytest.mark.parametrize("spec, wanted", [("mine.jsonl", "1 of 1"), ("toy:train", "5 of 5")])
def test_the_command_runs_from_any_folder(tmp_path, spec, wanted):
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW | {"solution": "def f(x): return x + 1"}))
    command = [sys.executable, SCRIPT, spec, "--limit", "5", "--sandbox", "basic", "--verify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"{wanted} solutions pass" in done.stdout, done.stderr


def test_lcb_prompt_places_the_format_behind_the_question():
    for starter, how in (("", "Read the inputs"), ("def f():", "You will use")):
        prompt = policy_prompt(Problem("a", "Question {x}?", starter=starter), "lcb")
        assert f"tests.\n\nQuestion {{x}}?### Format: {how}" in prompt
        code, answer = starter or "# YOUR CODE HERE", "### Answer: (use the provided format with"
        assert prompt.endswith(f"```python\n{code}\n```\n\n{answer} backticks)\n\n")


# --------------------------------------------------------------------------------------------------
# the toy world


@pytest.fixture(scope="module")
def splits():
    return {name: load_problems("toy:" + name) for name in ("train", "untested", "test")}


def test_toy_splits_have_their_sizes_and_no_statement_twice(splits):
    assert [len(problems) for problems in splits.values()] == [1200, 4000, 256]
    assert sum(p.source == "toy:unseen" for p in splits["test"]) == 64
    assert {p.source for p in load_problems("toy:test", limit=8)} == {"toy:test", "toy:unseen"}
    statements = [p.prompt for problems in splits.values() for p in problems]
    assert len(set(statements)) == len(statements)


def test_untested_toy_problems_can_be_audited(splits):
    audited = load_problems("toy:untested+tests", limit=20)
    assert [p.prompt for p in audited] == [p.prompt for p in splits["untested"][::200]]
    assert all(p.tests and p.solution for p in audited)
    assert not any(p.tests or p.solution for p in splits["untested"])


def test_toy_solutions_pass_and_a_wrong_one_does_not(splits, sandbox):
    chosen = splits["train"][:60] + splits["test"][::8]
    assert verified(chosen, sandbox, lambda text: None) == chosen
    assert not sandbox.run("def solve(xs):\n    pass\n", chosen[0].tests).passed


def compositions(split, unseen=False, count=500):
    return [c for c, *_ in itertools.islice(world.stream(split, unseen=unseen), count)]


def test_no_composition_in_two_splits_and_unseen_ones_have_new_pairs_of_operations():
    seen, trained = {}, set()
    for part in [(split, False) for split in world.SPLITS] + [("test", True)]:
        for composition in compositions(*part):
            assert seen.setdefault(composition.names, part) == part

    def pairs_of(composition):
        return set(itertools.pairwise(step.name for step in composition.steps))

    for split in ("pretrain", "train", "untested"):
        trained.update(*map(pairs_of, compositions(split, count=3000)))
    assert all(pairs_of(c) - trained for c in compositions("test", unseen=True, count=100))


def test_unseen_part_has_phrasings_never_trained_on(splits):
    ops = world.STEPS + world.REDUCTIONS
    held_out = {op.phrasings[-1].format(k=k) for op in ops for k in op.constants}
    clauses = [text + end for text in held_out for end in (";", ".", ", then")]
    trained = [p.prompt for name in ("train", "untested") for p in splits[name]]
    assert not [prompt for prompt in trained if any(clause in prompt for clause in clauses)]
    unseen = [p.prompt for p in splits["test"] if p.source == "toy:unseen"]
    assert all(any(text in prompt for text in held_out) for prompt in unseen)
