"""What a problem is, what a policy is asked, and where problems come from.

    python problems.py toy:train --show 3            # statement, reference solution, first tests
    python problems.py mbpp:mbpp.jsonl --verify      # 974 of 974 solutions pass their own tests
    python problems.py mine.jsonl --verify           # your own problems, one JSON object a line:
        {"id": "a1", "prompt": "Write add(a, b), which returns the sum.",
         "tests": {"kind": "call", "entry_point": "add",
                   "cases": [{"args": [1, 2], "expected": 3}]},
         "solution": "def add(a, b):\\n    return a + b"}

The prompt must name the function, or say what is read and printed. Without "tests" only a reward
model can judge. Optional: solution (what --verify runs), starter (code to begin with), source
(results are split by it). Cases by tests.kind; a check may stand among asserts:
    call     {"args": [...], "expected": value}, or "any_of": [value, ...] in place of "expected"
    stdin    {"input": "1 2\\n", "output": "3\\n"}
    assert   {"assert": "assert f(1) == 2"}, or {"check": "def check(candidate): ..."}
tests.entry_point, for calls and checks, is "f" or "Solution.method"; tests.setup is code that runs
before, tests.time_limit CPU seconds a test. Pairs for `train_rm.py --pairs`, a line each (pairs of
a problem share what stands before the last #), and answers for `train_rm.py --candidates`:
    {"id": "a1#0", "prompt": "Write add ...", "chosen": "def add ...", "rejected": "def add ..."}
    {"problem": "a1", "completion": "An answer with a ```python block"}, or "code" in its place
Each command takes seconds; nothing here needs torch.
"""

import ast
import contextlib
import gzip
import itertools
import json
import os
import re
import sys
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
    sandbox: str | None = None  # strict or basic; default: strict on Linux


# --------------------------------------------------------------------------------------------------
# what a problem is, and what a policy is asked


@dataclass(frozen=True)
class Problem:
    """`prompt` is the bare statement, all that a reward model reads."""

    id: str
    prompt: str
    tests: Tests | None = None
    solution: str | None = None
    source: str = ""
    starter: str = ""


# LiveCodeBench's prompt as the paper's recipe joins its parts, all in the user turn.
LCB_PROMPT = """You are an expert Python programmer. You will be given a question (problem \
specification) and will generate a correct Python program that matches the specification and \
passes all tests.

{question}### Format: {how}
```python
{code}
```

### Answer: (use the provided format with backticks)

"""
LCB_STARTER = """You will use the following starter code to write the solution and enclose your \
code within delimiters."""
LCB_STDIN = """Read the inputs from stdin solve the problem and write the answer to stdout (do not \
directly test on the sample inputs). Enclose your code within delimiters as follows."""


def policy_prompt(problem, style="plain"):
    """The user turn that a policy sees: the statement, the answer format, any starter code."""
    prompt, starter = problem.prompt, problem.starter
    if style == "lcb":
        how, code = (LCB_STARTER, starter) if starter else (LCB_STDIN, "# YOUR CODE HERE")
        return LCB_PROMPT.format(question=prompt, how=how, code=code)
    if style != "plain":
        raise UserError(f"--prompt-style {style}: expected plain or lcb")
    if starter not in prompt:
        prompt += f"\n\nStart from this code:\n```python\n{starter}\n```"
    return f"{prompt}\n\nAnswer with one ```python block."


# --------------------------------------------------------------------------------------------------
# rows of files


class RowError(UserError):
    """A row that does not fit. `reason` is the same for all rows with this fault; a row that is
    only `useless` is left out of our own schema too."""

    def __init__(self, where, reason, found, useless=False):
        super().__init__(f"{where}: {reason}, found {found!r:.300}")
        self.reason, self.useless = reason, useless


def local_path(path):
    """A path, or the file that hub:OWNER/NAME[@REVISION]/FILE is downloaded to."""
    if not path.startswith("hub:"):
        return path
    match = re.fullmatch("hub:([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/(.+)", path)
    if not match:
        raise ValueError("expected hub:OWNER/NAME[@REVISION]/FILE")
    repo, revision, file = match.groups()
    return hf_hub_download(repo, file, revision=revision, repo_type="dataset")


def file_items(path):
    """The objects of a .json or .parquet file, or the lines of a .jsonl or .jsonl.gz file."""
    path = local_path(path)
    if path.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    elif path.endswith(".json"):
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        yield from rows if isinstance(rows, list) else [rows]
    else:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            yield from (line for line in file if line.strip())


def raw_rows(path, limit=None, flag=""):
    """The first `limit` items of a file, local or `hub:`: yields (object or line, "FILE row N").
    Raises UserError for a file that cannot be read, beginning with the `flag` that names it."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected at least 1")
    number = 0
    try:
        for number, item in enumerate(itertools.islice(file_items(path), limit), 1):
            yield item, f"{path} row {number}"
    except Exception as error:  # missing, damaged, not what its ending says; what the hub raises
        hint = " (pip install pyarrow)" if isinstance(error, ImportError) else ""
        mistake = f"{flag} {path}: cannot be read: {error!r:.300}{hint}"
        raise UserError(mistake.strip()) from None
    if not number:
        raise UserError(f"{flag} {path}: no rows".strip())


def as_row(item, where):
    """An object or a line of JSON -> a dict, all of whose text can be encoded. Raises RowError."""
    try:
        row = json.loads(item) if isinstance(item, str) else item
        json.dumps(row, ensure_ascii=False, default=str).encode()  # fails on halves of characters
    except (ValueError, RecursionError) as error:
        raise RowError(where, "not JSON", error) from None
    if not isinstance(row, dict):
        raise RowError(where, "not an object", row)
    return row


def read_rows(path, flag=""):
    """Rows that must all fit: yields (dict, "FILE row N"). Raises UserError."""
    return ((as_row(item, where), where) for item, where in raw_rows(path, None, flag))


def need(row, where, *keys, kind=str):
    """The value of the first of `keys` that the row has, checked to be a `kind`. RowError."""
    for key in keys:
        if key in row:
            if not isinstance(row[key], kind):
                expected = getattr(kind, "__name__", kind)
                raise RowError(where, f"key {key!r} should be {expected}", row[key])
            return row[key]
    raise RowError(where, f"no key {' or '.join(map(repr, keys))}", sorted(row))


def input_files(flag, spec):
    """[(flag, path)] of the files in SPEC[,SPEC...], for a resumed run to compare."""
    paths = []
    for part in spec.split(","):
        path = part if os.path.exists(part) or part.startswith("hub:") else part.partition(":")[2]
        with contextlib.suppress(Exception):  # the loader tells what is wrong with it
            paths.append(local_path(path))
    return [(flag, path) for path in paths if os.path.isfile(path)]


# --------------------------------------------------------------------------------------------------
# formats: a row -> a Problem. Any exception means that the row does not fit


def without_nulls(case):
    """A case without the keys that a table has filled in; only an expected value may be null."""
    if not isinstance(case, dict):
        return case
    return {key: value for key, value in case.items() if value is not None or key == "expected"}


def own_problem(row, where):
    """Our own schema, into which the others are translated. Here all is checked."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("prompt", *row.keys() & {"solution", "source", "starter"}):
        need(row, where, key)
    if "tests" in row:
        tests = need(row, where, "tests", kind=dict)
        if isinstance(tests.get("cases"), list):
            tests = tests | {"cases": list(map(without_nulls, tests["cases"]))}
        row["tests"] = as_tests(Tests(**tests))
    return Problem(**row | {"id": str(row.get("id", where))})


def mbpp_problem(row, where):
    """MBPP, full or sanitized. The first assert goes into the statement, as in the MBPP paper:
    without it nobody can know the function's name."""
    asserts = need(row, where, "test_list", kind=list)
    example = f"\n\nYour code should pass this test:\n{asserts[0]}" if asserts else ""
    ours = {"id": f"mbpp/{row.get('task_id', where)}", "source": "mbpp"}
    ours["prompt"] = need(row, where, "text", "prompt") + example
    ours["solution"] = need(row, where, "code").replace("\r\n", "\n")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = {"kind": "assert", "cases": [{"assert": line} for line in asserts], "setup": setup}
    ours["tests"] = tests if asserts else None
    return own_problem(ours, where)


def humaneval_problem(row, where):
    """HumanEval. The code above the body is also the setup: a check may call its helpers."""
    starter, name = need(row, where, "prompt"), need(row, where, "entry_point")
    ours = {"id": row["task_id"], "source": "humaneval", "starter": starter}
    ours["prompt"] = f"Complete the function `{name}`:\n\n{starter}"  # no starter for reward models
    ours["solution"] = starter + row["canonical_solution"]
    cases = [{"check": row["test"]}]
    ours["tests"] = {"kind": "assert", "cases": cases, "entry_point": name, "setup": starter}
    return own_problem(ours, where)


def cure_problem(row, where):
    """CURE's files (LiveBench, LiveCodeBench, CodeContests, CodeForces, MBPP), all stdin tests."""
    file, _, number = where.rpartition(" row ")
    source = os.path.basename(file).partition(".")[0]  # LiveBench, ...
    ours = {"id": f"{source}/{row.get('task_id', number)}", "source": source}
    pairs = zip(row["test_input"], row["test_output"], strict=True)
    ours["tests"] = stdin_tests(pairs, row.get("test_time_limit"))
    return own_problem(ours | {"prompt": row["question"]}, where)


def stdin_tests(pairs, time_limit=None):
    """[(input, output)] -> tests, None without any. Both are texts, lists of lines or numbers."""

    def text(value):
        lines = value if isinstance(value, list) else [value]
        if isinstance(value, str) or not all(isinstance(line, str | int | float) for line in lines):
            return value  # what is no text is refused later
        return "".join(f"{line}".removesuffix("\n") + "\n" for line in lines)

    cases = [{"input": text(given), "output": text(wanted)} for given, wanted in pairs]
    return {"kind": "stdin", "cases": cases, "time_limit": time_limit} if cases else None


# What LiveCodeBench and LeetCode import before a solution. Later names win: `Counter` is that of
# collections, `pow` the builtin, `bisect` the module.
MODULES = """typing collections heapq bisect math itertools functools string re operator copy random
    datetime json statistics""".split()
PRELUDE = "".join(f"from {name} import *\n" for name in [*MODULES, "builtins"])
PRELUDE += f"import {', '.join(MODULES)}, sys\n"


def deepcoder_problem(row, where):
    """DeepCoder-Preview. `tests` is a list of {input, output, type or testtype} (LiveCodeBench,
    PrimeIntellect, Codeforces) or {inputs, outputs, fn_name} (TACO), or the text of one."""
    ours = {"id": row.get("id"), "source": "deepcoder", "starter": row.get("starter_code")}
    ours["prompt"] = row.get("problem") or row.get("question")
    if isinstance(ours["prompt"], dict):  # a chat turn
        ours["prompt"] = ours["prompt"].get("content", ours["prompt"].get("problem"))
    tests = plain_data(row["tests"])
    if isinstance(tests, dict):  # an input without an output is no test
        pairs = zip(*(need(tests, where, key, kind=list) for key in ("inputs", "outputs")))
        tests = [tests | {"input": given, "output": wanted} for given, wanted in pairs]
    pairs = [(test["input"], test["output"]) for test in tests]
    # (word for the kind, function of the test or else of the row): the same for all tests
    forms = set()
    for test in tests:
        metadata = test.get("metadata") or row.get("metadata") or ""
        named = plain_data(metadata) if "func_name" in metadata else {}
        name = test.get("fn_name") or row.get("fn_name") or named.get("func_name")
        forms.add((test.get("testtype") or test.get("type"), name))
    if len(forms) > 1:
        raise RowError(where, "tests of several kinds or functions", forms)
    word, name = forms.pop() if forms else (None, None)
    if "stdin" in word if word else not name:
        ours["tests"] = stdin_tests(pairs)
    else:
        name = f"Solution.{name}" if "class Solution" in (ours["starter"] or "") else name
        cases = call_cases(pairs, word == "functional")
        ours["tests"] = {"kind": "call", "cases": cases, "entry_point": name, "setup": PRELUDE}
    if isinstance(solutions := row.get("solutions"), list) and solutions:
        is_fenced = "```" in (solutions[0] or "")
        ours["solution"] = extract_code(solutions[0]).code if is_fenced else solutions[0]
    return own_problem(ours, where)


def call_cases(pairs, is_lcb):
    """[(input, output)] -> cases. The input is a list of arguments, or a text with one a line. The
    output is a text of JSON in LiveCodeBench and a value elsewhere, sometimes wrapped in a list."""
    # A list of one in every test: either these are the results, or what is in them.
    is_list_of_one = all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs)
    cases = []
    for given, wanted in pairs:
        if isinstance(given, str):
            given = [plain_data(line) for line in given.split("\n") if line.strip()]
        right = {"any_of": [wanted, *wanted]} if is_list_of_one else {"expected": wanted}
        cases.append({"args": given} | ({"expected": plain_data(wanted)} if is_lcb else right))
    return cases


def plain_data(value):
    """Data, or a text of JSON or of a Python literal -> data. Keys of digits were integers."""

    def restore(item):
        is_int = all(re.fullmatch("-?(0|[1-9][0-9]*)", key) for key in item)
        return {int(key): value for key, value in item.items()} if is_int else item

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = ast.literal_eval(value)
    return json.loads(json.dumps(value), object_hook=restore)


FORMATS = {
    "own": own_problem,
    "toy": own_problem,
    "mbpp": mbpp_problem,
    "humaneval": humaneval_problem,
    "cure": cure_problem,
    "deepcoder": deepcoder_problem,
}
READERS = {"toy": world.rows}  # of formats whose rows are in no file


# --------------------------------------------------------------------------------------------------
# loading, and the data's own solutions


def load_rows(spec, formats, accept, what, limit, log, flag):
    """`FILE` (our own schema) or `FORMAT:PATH` -> list of `what`, problems or pairs: those that
    `accept` keeps of what a format makes of a row. A row that does not fit is a UserError in our
    own schema; elsewhere it is left out and counted by reason, and `log`, or else stderr, is told.
    """
    kind, _, path = spec.partition(":")
    if not path or kind == "hub":
        kind, path = "own", spec
    if kind not in formats:
        raise UserError(f"{flag} {spec!r}: expected FILE or FORMAT:PATH of {', '.join(formats)}")
    found, left_out, count = [], defaultdict(list), 0  # left_out: reason -> errors
    for item, where in READERS.get(kind, raw_rows)(path, limit, flag):
        count += 1
        try:
            found += accept(formats[kind](as_row(item, where), where), where)
        except Exception as error:  # nothing but the row is looked at: it is at fault
            if not isinstance(error, RowError):
                error = RowError(where, f"not of this format ({type(error).__name__})", error)
            if kind == "own" and not error.useless:
                raise error from None
            left_out[error.reason].append(error)
    lines = [f"left out {len(rows)} of {count}: {rows[0]}" for rows in left_out.values()]
    if not found:
        raise UserError(f"{flag} {spec}: no {what} left (--limit {limit}): {'; '.join(lines[:1])}")
    if 5 * (number := sum(map(len, left_out.values()))) > count:
        lines.append(f"WARNING: {number} of {count} rows do not fit and are left out")
    if lines:
        log = log or partial(print, file=sys.stderr)
        log("\n  ".join([f"{spec}: {len(found)} {what}s", *lines]))
    return found


def load_problems(spec, limit=None, log=None, flag="--problems"):
    """`SPEC[,SPEC...]` -> list of Problem. A spec is a file in our own schema or `FORMAT:PATH` with
    a format of `FORMATS`, e.g. `mbpp:mbpp.jsonl`, `toy:train`, `toy:untested`, `toy:test`. `limit`
    keeps the first rows of each. `log` is told what was loaded and left out. Raises UserError."""
    ids, found = set(), []

    def accept(problem, where):
        if problem.id in ids:
            raise RowError(where, "the id appears twice", problem.id)
        ids.add(problem.id)
        return [problem]

    for part in spec.split(","):
        found += load_rows(part, FORMATS, accept, "problem", limit, log, flag)
    if log:
        log(f"{spec}: {len(found)} problems, {sum(p.tests is not None for p in found)} with tests")
    return found


def verified(problems, sandbox, log):
    """The problems whose own solution passes, and those without a solution or tests. `log` is told
    how many pass and, a line a verdict, the first of those that do not."""
    tried = [problem for problem in problems if problem.solution and problem.tests]
    results = sandbox.map([(problem.solution, problem.tests) for problem in tried])
    failed, details = set(), defaultdict(list)  # ids; verdict -> what is said of them
    for problem, result in zip(tried, results):
        if not result.passed:
            failed.add(problem.id)
            last_line = result.detail.strip().rpartition("\n")[2]
            details[result.verdicts[-1]].append(f"{problem.id}: {last_line:.200}")
    passed, untried = len(tried) - len(failed), len(problems) - len(tried)
    log(f"{passed} of {len(tried)} solutions pass their own tests, {untried} have none")
    for verdict, texts in details.items():
        log(f"  {len(texts)} {verdict}, the first: {'; '.join(texts[:3])}")
    return [problem for problem in problems if problem.id not in failed]


def main():
    args = parse_args(Args, positional="spec")
    if not args.spec:
        raise UserError("no problems named: python problems.py toy:train --show 3")
    problems = load_problems(args.spec, args.limit, log=print)
    for problem in problems[: args.show]:
        cases = problem.tests.cases if problem.tests else []
        print(f"\n=== {problem.id} ({problem.source}), {len(cases)} tests\n{problem.prompt}\n")
        print(problem.solution or "(no reference solution)", *map(json.dumps, cases[:4]), sep="\n")
    if args.verify:
        with Sandbox(level=args.sandbox) as sandbox:
            verified(problems, sandbox, print)


if __name__ == "__main__":
    run_cli(main)
