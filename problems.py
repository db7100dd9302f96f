"""What a problem is, what a policy is asked, and where problems come from.

    python problems.py toy:train --show 3            # statement, reference solution, first tests
    python problems.py mbpp:mbpp.jsonl --verify      # 974 of 974 solutions pass their own tests
    python problems.py mine.jsonl --verify           # your own problems, one JSON object a line:
        {"id": "a1", "prompt": "Write add(a, b), which returns the sum.",
         "tests": {"kind": "call", "entry_point": "add",
                   "cases": [{"args": [1, 2], "expected": 3}]},
         "solution": "def add(a, b):\\n    return a + b"}

The prompt must name the function, or say what is read and printed. Without tests ("tests" left out
or null) only a reward model can judge. Optional: solution (what --verify runs), starter (code to
begin with), source (results are split by it). Cases by tests.kind; a check may stand among asserts:
    call     {"args": [...], "expected": value}, or "any_of": [value, ...] in place of "expected"
    stdin    {"input": "1 2\\n", "output": "3\\n"}
    assert   {"assert": "assert f(1) == 2"}, or {"check": "def check(candidate): ..."}
tests.entry_point, for calls and checks, is "f" or "Solution.method"; tests.setup is code that runs
before, tests.time_limit CPU seconds a test. Pairs for `train_rm.py --pairs`, a line each (pairs of
a problem share what stands before the last #), and answers for `train_rm.py --candidates`:
    {"id": "a1#0", "prompt": "Write add ...", "chosen": "def add ...", "rejected": "def add ..."}
    {"problem": "a1", "completion": "An answer with a ```python block"}, or "code" in its place

A few seconds on a CPU; nothing here needs torch.
"""

import ast
import gzip
import itertools
import json
import os
import re
import reprlib
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from huggingface_hub import hf_hub_download

from common import UserError, parse_args, run_cli
from extract import extract_code
from sandbox import Sandbox, Tests, as_tests
from tiny import world

sys.set_int_max_str_digits(0)  # tests hold integers of any length


@dataclass
class Args:
    spec: str = ""  # problems to load: SPEC[,SPEC...]
    show: int = 0  # problems to print in full
    verify: bool = False  # run the data's own solutions through the sandbox
    limit: int | None = None  # rows to read
    min_tests: int = 0  # drop problems with fewer tests (those without any stay)
    sandbox: str | None = None  # strict or basic; default: strict on Linux


# --------------------------------------------------------------------------------------------------
# what a problem is, and what a policy is asked


@dataclass(frozen=True)
class Problem:
    """`prompt` is the bare statement, all that a reward model reads; `source` names the part of a
    data set it belongs to (results are split by it)."""

    id: str
    prompt: str
    tests: Tests | None = None
    solution: str | None = None
    source: str = ""
    starter: str = ""


LCB_SYSTEM = """You are an expert Python programmer. You will be given a question (problem \
specification) and will generate a correct Python program that matches the specification and \
passes all tests."""
LCB_STARTER = """You will use the following starter code to write the solution and enclose your \
code within delimiters."""
LCB_STDIN = """Read the inputs from stdin solve the problem and write the answer to stdout (do not \
directly test on the sample inputs). Enclose your code within delimiters as follows."""


def policy_prompt(problem, style="plain"):
    """The user turn that a policy sees: the statement, the answer format, any starter code.

    "plain" is ours. "lcb" has the parts of LiveCodeBench's prompt where the paper's recipe places
    them: the system sentence in the user turn, the format heading directly behind the question.
    """
    if style == "plain":
        starter = f"\n\nStart from this code:\n```python\n{problem.starter}\n```"
        starter = "" if problem.starter in problem.prompt else starter
        return f"{problem.prompt}{starter}\n\nAnswer with one ```python block."
    if style == "lcb":
        how = LCB_STARTER if problem.starter else LCB_STDIN
        question = f"{LCB_SYSTEM}\n\n{problem.prompt}### Format: {how}"
        block = f"```python\n{problem.starter or '# YOUR CODE HERE'}\n```"
        return f"{question}\n{block}\n\n### Answer: (use the provided format with backticks)\n\n"
    raise UserError(f"--prompt-style {style}: expected plain or lcb")


# --------------------------------------------------------------------------------------------------
# rows of files


brief = reprlib.Repr()
brief.maxstring, brief.maxother = 80, 300


class RowError(UserError):
    """A row that does not fit. `reason` is the same for all rows with this fault; the message also
    has the row's place and what was found there, a value or an exception."""

    def __init__(self, where, reason, found):
        super().__init__(f"{where}: {reason}, found {brief.repr(found)}")
        self.reason = reason


def local_file(path):
    """A path, or `hub:OWNER/NAME[@REVISION]/FILE` of a Hugging Face data set -> a local path."""
    if path.startswith("hub:"):
        match = re.fullmatch("hub:([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
        if not match:
            raise UserError(f"{path!r}: expected hub:OWNER/NAME[@REVISION]/FILE")
        repo, revision, file = match.groups()
        try:
            return hf_hub_download(repo, file, revision=revision, repo_type="dataset")
        except Exception as error:  # the client has many: no network, no such file, gated
            raise UserError(
                f"{path}: cannot be fetched: {str(error).splitlines()[0]:.200}"
            ) from None
    if not os.path.isfile(path):
        raise UserError(f"no file at {path!r}: give a .jsonl, .jsonl.gz, .json or .parquet file")
    return path


def file_items(path):
    """What a file holds, by its ending: dicts, or lines of JSON that are not blank."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
                yield from batch.to_pylist()
            return
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            if path.endswith(".json"):
                rows = json.load(file)
                yield from rows if isinstance(rows, list) else [rows]
            else:
                yield from (line for line in file if line.strip())
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path}: damaged, or not what its ending says: {error}") from None


def raw_rows(path, limit=None):
    """The first `limit` items of a local or `hub:` file: yields (item, "FILE row N")."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected at least 1")
    path, number = local_file(path), 0
    for number, item in enumerate(itertools.islice(file_items(path), limit), 1):
        yield item, f"{path} row {number}"
    if not number:
        raise UserError(f"{path}: no rows")


def as_row(item, where):
    """An item of a file -> a dict, all of whose text can be encoded. Raises RowError."""
    try:
        row = json.loads(item) if isinstance(item, str) else item
        if row is item or "\\ud" in item or "\\uD" in item:  # halves of characters are refused
            json.dumps(row, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(where, "not JSON", error) from None
    if not isinstance(row, dict):
        raise RowError(where, "not an object", row)
    return row


def input_files(flag, spec):
    """[(flag, path)] of the local files that a SPEC[,SPEC...] names: what a resumed run must find
    unchanged."""
    paths = [part if os.path.exists(part) else part.partition(":")[2] for part in spec.split(",")]
    return [(flag, path) for path in paths if os.path.isfile(path)]


def read_rows(path, limit=None):
    """Rows of a .jsonl, .jsonl.gz, .json or .parquet file, local or `hub:`, with the place each
    came from: yields (dict, "FILE row N"). Raises UserError."""
    return ((as_row(item, where), where) for item, where in raw_rows(path, limit))


def need(row, where, *keys, kind=str):
    """The value of the first of `keys` that the row has, checked to be a `kind`. RowError."""
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise RowError(where, f"no key {' or '.join(map(repr, keys))}", sorted(row))
    if not isinstance(row[key], kind):
        expected = getattr(kind, "__name__", kind)
        raise RowError(where, f"key {key!r} should be {expected}", row[key])
    return row[key]


# --------------------------------------------------------------------------------------------------
# formats: a row -> a Problem, or RowError

# What LiveCodeBench and LeetCode import before a solution. Later names win: `Counter` is that of
# collections, `pow` the builtin, `bisect` the module.
MODULES = """typing collections heapq bisect math itertools functools string re operator copy random
    datetime json statistics""".split()
PRELUDE = "".join(f"from {name} import *\n" for name in [*MODULES, "builtins"])
PRELUDE += f"import {', '.join(MODULES)}, sys\n"


def own_problem(row, where):
    """Our own schema: the fields of Problem, `tests` null or an object with the fields of Tests."""
    row = {"id": where} | {key: value for key, value in row.items() if value is not None}
    tests = Tests(**need(row, where, "tests", kind=dict)) if "tests" in row else None
    prompt = need(row, where, "prompt")
    return Problem(**row | {"id": str(row["id"]), "prompt": prompt, "tests": tests})


def mbpp_problem(row, where):
    """MBPP, full or sanitized. The first assert goes into the statement, as in the MBPP paper:
    without it nobody can know the function's name."""
    cases = [{"assert": text} for text in need(row, where, "test_list", kind=list)]
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    example = f"\n\nYour code should pass this test:\n{cases[0]['assert']}" if cases else ""
    prompt = need(row, where, "text", "prompt") + example
    tests = Tests("assert", cases, setup=setup) if cases else None
    solution = need(row, where, "code").replace("\r\n", "\n")
    return Problem(f"mbpp/{row.get('task_id', where)}", prompt, tests, solution, "mbpp")


def humaneval_problem(row, where):
    """HumanEval, LeetCodeDataset and rllm's LeetCode rows: a check(candidate). The setup is
    `prompt`: the signature and helpers that a check may call, or the imports of LeetCode."""
    check, _, call = need(row, where, "test", "tests_functional").partition("\ncheck(")
    if call:
        row = {"prompt": PRELUDE, "entry_point": call.strip().removesuffix(")")} | row
    entry_point = need(row, where, "entry_point").replace("Solution().", "Solution.")
    source, setup, starter = "humaneval", need(row, where, "prompt"), row["prompt"]
    statement = f"Complete the function `{entry_point}`:\n\n{setup}"  # no starter for reward models
    if "." in entry_point:
        source, starter = "leetcode", row.get("starter_code") or ""
        statement = need(row, where, "problem_description", "question")
    tests = Tests("assert", [{"check": check}], entry_point, setup)
    solution = setup + need(row, where, "canonical_solution", "completion", "code_pos")
    return Problem(need(row, where, "task_id", "id"), statement, tests, solution, source, starter)


def cure_problem(row, where):
    """CURE's files (LiveBench, LiveCodeBench, CodeContests, CodeForces, MBPP), all stdin tests."""
    pairs = zip(row["test_input"], row["test_output"], strict=True)
    cases = [{"input": text_of(i, where), "output": text_of(o, where)} for i, o in pairs]
    tests = Tests("stdin", cases, time_limit=row.get("test_time_limit")) if cases else None
    file, _, number = where.rpartition(" row ")
    name = os.path.basename(file).partition(".")[0]  # LiveBench, ...: each is a part of the results
    id = f"{name}/{row.get('task_id', number)}"
    return Problem(id, need(row, where, "question"), tests, source=name)


def deepcoder_problem(row, where):
    """DeepCoder-Preview. `tests` is a list of {input, output, type or testtype} (LiveCodeBench,
    PrimeIntellect, Codeforces) or {inputs, outputs, fn_name} (TACO), or the text of one."""
    statement = row.get("problem") or row.get("question")
    if isinstance(statement, dict):  # a chat turn
        statement = statement.get("content", statement.get("problem"))
    tests = plain_data(row.get("tests"), where)
    if isinstance(tests, dict):  # an input without an output is no test
        pairs = zip(*(need(tests, where, key, kind=list) for key in ("inputs", "outputs")))
        tests = [{"fn_name": tests.get("fn_name"), "input": i, "output": o} for i, o in pairs]
    found = [deepcoder_case(test, row, where) for test in tests]
    forms = {form for form, _ in found} or {("stdin", None, False)}
    if len(forms) > 1:
        raise RowError(where, "tests of several kinds or functions", forms)
    (kind, name, is_json), cases = forms.pop(), [case for _, case in found]
    starter, solutions = row.get("starter_code") or "", row.get("solutions")
    is_method = name and "class Solution" in starter
    setup = PRELUDE if is_json or is_method else ""
    results = [case.get("expected") for case in cases]
    # A list of one in every test: results in a wrapping, or lists. Either is right.
    if not is_json and all(isinstance(result, list) and len(result) == 1 for result in results):
        cases = [{"args": c["args"], "any_of": [c["expected"], *c["expected"]]} for c in cases]
    tests = Tests(kind, cases, f"Solution.{name}" if is_method else name, setup) if cases else None
    solution = solutions[0] if isinstance(solutions, list) and solutions else None
    if isinstance(solution, str) and "```" in solution:
        solution = extract_code(solution).code
    return Problem(str(row.get("id", where)), statement, tests, solution, "deepcoder", starter)


def deepcoder_case(test, row, where):
    """-> ((kind, function, whether results are JSON), case) of a test. Its type is its own; its
    function's name is its own or the row's. Only LiveCodeBench's results are JSON."""
    given, wanted = test["input"], test["output"]
    word = test.get("testtype") or test.get("type")
    name = function_name(test, where) or function_name(row, where)
    if "stdin" in word if word else not name:
        case = {"input": text_of(given, where), "output": text_of(wanted, where)}
        return ("stdin", None, False), case
    if not name:
        raise RowError(where, "a test calls a function and does not name it", test)
    is_json = word == "functional"
    if isinstance(given, str):  # one argument a line
        given = [plain_data(line, where) for line in given.split("\n") if line.strip()]
    if is_json and isinstance(wanted, str):
        wanted = plain_data(wanted, where)
    return ("call", name, is_json), {"args": given, "expected": wanted}


def function_name(item, where):
    """The function that a test or a row of DeepCoder names, or None."""
    metadata = item.get("metadata")
    if isinstance(metadata, str) and "func_name" in metadata:
        metadata = plain_data(metadata, where)
    return item.get("fn_name") or (isinstance(metadata, dict) and metadata.get("func_name")) or None


def plain_data(value, where):
    """Data, or a text of JSON or of a Python literal -> data. Keys of digits were integers."""

    def restore(item):
        is_int = all(re.fullmatch("-?(0|[1-9][0-9]*)", key) for key in item)
        return {int(key): value for key, value in item.items()} if is_int else item

    try:
        if isinstance(value, str):
            try:
                return json.loads(value, object_hook=restore)
            except ValueError:
                value = ast.literal_eval(value)
        return json.loads(json.dumps(value), object_hook=restore)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise RowError(where, "tests are no JSON", error) from None


def text_of(value, where):
    """Input or output of a stdin test; a list is one of lines."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str | int | float) for line in lines):
        raise RowError(where, "input or output of a test is no text", value)
    if isinstance(value, str):
        return value
    return "".join(str(line).removesuffix("\n") + "\n" for line in lines)


# format -> (what reads the rows of a path, what makes a problem of a row)
LOADERS = {
    "own": (raw_rows, own_problem),
    "mbpp": (raw_rows, mbpp_problem),
    "humaneval": (raw_rows, humaneval_problem),
    "cure": (raw_rows, cure_problem),
    "deepcoder": (raw_rows, deepcoder_problem),
    "toy": (world.rows, own_problem),
}


def make_problem(make, item, where):
    """A Problem whose fields are texts and whose tests the sandbox can run, or RowError."""
    try:
        problem = make(as_row(item, where), where)
        for key in ("prompt", "source", "starter"):
            need(vars(problem), where, key)
        need(vars(problem), where, "solution", kind=str | None)
        if problem.tests is not None:
            as_tests(problem.tests)
    except RowError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise RowError(where, "not of this format", error) from None
    return problem


def load_problems(spec, limit=None, min_tests=0, log=None, flag="--problems"):
    """`SPEC[,SPEC...]` -> list of Problem. A spec is a file in our own schema or `FORMAT:PATH` with
    a format of `LOADERS`, e.g. `mbpp:mbpp.jsonl`, `toy:train`, `toy:untested`, `toy:test`.

    `limit` keeps the first rows of each spec; `min_tests` drops problems that have tests, but
    fewer. A row that does not fit ends the load in our own schema; elsewhere it is left out. `log`
    (a function of one string, e.g. print) is told what was loaded, dropped and left out. Raises
    UserError naming `flag`.
    """
    problems, ids = [], set()
    for part in spec.split(","):
        kind, _, path = part.partition(":")
        if not path or kind == "hub":
            kind, path = "own", part
        if kind not in LOADERS:
            formats = ", ".join(LOADERS)
            raise UserError(f"{flag} {part!r}: expected a file or FORMAT:PATH; formats: {formats}")
        rows, make = LOADERS[kind]
        found, misfits = [], defaultdict(list)  # reason -> errors
        for item, where in rows(path, limit):
            try:
                problem = make_problem(make, item, where)
                if problem.id in ids:
                    raise RowError(where, "the id appears twice", problem.id)
            except RowError as error:
                if make is own_problem:
                    raise
                misfits[error.reason].append(error)
            else:
                ids.add(problem.id)
                found.append(problem)
        kept = [p for p in found if p.tests is None or len(p.tests.cases) >= min_tests]
        left_out = sum(map(len, misfits.values()))
        count, tested = len(found) + left_out, sum(p.tests is not None for p in kept)
        lines = [f"  left out {len(errors)} of {count}: {errors[0]}" for errors in misfits.values()]
        if not kept:
            options = f"--min-tests {min_tests}, --limit {limit}"
            first = "".join(lines[:1])
            raise UserError(f"{flag} {part!r}: no problem left of {count} ({options}){first}")
        summary = f"{part}: {len(kept)} problems, {tested} with tests, "
        lines.insert(0, f"{summary}{len(found) - len(kept)} dropped by --min-tests {min_tests}")
        is_loud = 5 * left_out > count
        if is_loud:
            lines.append(f"WARNING: {part}: {left_out} of {count} rows do not fit and are left out")
        if log or is_loud:
            (log or partial(print, file=sys.stderr))("\n".join(lines))
        problems += kept
    return problems


# --------------------------------------------------------------------------------------------------
# the data's own solutions


def verify_solutions(problems, sandbox):
    """Each problem's own solution through its own tests -> [Result, or None if one is missing]."""
    has_both = [bool(p.solution and p.tests) for p in problems]
    jobs = [(p.solution, p.tests) for p, both in zip(problems, has_both) if both]
    results = iter(sandbox.map(jobs))
    return [next(results) if both else None for both in has_both]


def verified(problems, sandbox, log):
    """The problems whose own solution passes, and those without a solution or tests. `log` is told
    how many pass and, a line a verdict, the first of those that do not."""
    results, failed = verify_solutions(problems, sandbox), defaultdict(list)
    for problem, result in zip(problems, results):
        if result and not result.passed:
            last_line = "".join(result.detail.splitlines()[-1:])
            failed[result.verdicts[-1]].append(f"{problem.id}: {last_line:.200}")
    tried, passed = len(problems) - results.count(None), sum(bool(r and r.passed) for r in results)
    log(f"{passed} of {tried} solutions pass their own tests, {results.count(None)} have none")
    for verdict, details in failed.items():
        log(f"  {len(details)} {verdict}, the first: {'; '.join(details[:3])}")
    return [p for p, result in zip(problems, results) if result is None or result.passed]


def main():
    args = parse_args(Args, positional="spec")
    if not args.spec:
        raise UserError("no problems named: python problems.py toy:train --show 3")
    problems = load_problems(args.spec, args.limit, args.min_tests, log=print)
    for problem in problems[: args.show]:
        print(f"\n=== {problem.id} ({problem.source})\n{problem.prompt}\n")
        print(problem.solution or "(no reference solution)")
        cases = problem.tests.cases if problem.tests else []
        for case in cases[:4]:
            print(f"  {problem.tests.kind}: {json.dumps(case):.150}")
        print(f"  ({len(cases)} tests)")
    if args.verify:
        with Sandbox(level=args.sandbox) as sandbox:
            verified(problems, sandbox, print)


if __name__ == "__main__":
    run_cli(main)
