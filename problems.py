"""What a problem is, where problems come from, and the toy world that makes the default run possible.

    python problems.py toy:train --show 3                      # statement, reference solution, first tests
    python problems.py mbpp:mbpp.jsonl --min-tests 3           # a public file, and what was dropped
    python problems.py mine.jsonl --show 1                     # your own problems, one JSON object a line:
        {"id": "a1", "prompt": "Write add(a, b), which returns the sum.",
         "tests": {"kind": "call", "entry_point": "add", "cases": [{"args": [1, 2], "expected": 3}]}}

The prompt must name the function, or say what is read and printed. Without tests ("tests" left out or null) only a
reward model can judge. Optional: solution, starter (code to begin with), source (results are split by it). Cases by
tests.kind; a check may stand among asserts:
    call     {"args": [...], "expected": value}       entry_point "f", or "Solution.method"
    stdin    {"input": "1 2\\n", "output": "3\\n"}
    assert   {"assert": "assert f(1) == 2"}
    assert   {"check": "def check(candidate): ..."}   entry_point: the candidate
tests.setup is code that runs before, tests.time_limit CPU seconds a test. Pairs for `train_rm.py --pairs`, a line each
(pairs of a problem share what stands before the last #), and answers for `train_rm.py --candidates`:
    {"id": "a1#0", "prompt": "Write add ...", "chosen": "def add ...", "rejected": "def add ..."}
    {"problem": "a1", "completion": "An answer with a ```python block"}, or "code" in place of "completion"

A few seconds on a CPU. Nothing here needs torch: the sandbox, the extractor and this file can be used alone.
"""

import dataclasses
import gzip
import itertools
import json
import os
import random
import zlib
from dataclasses import dataclass
from functools import cache

from common import UserError, parse_args, run_cli
from sandbox import Tests, as_tests

# ----------------------------------------------------------------------------------------------------------------------
# what a problem is


@dataclass(frozen=True)
class Problem:
    """`prompt` is the bare statement; `source` names the part of a data set it belongs to (results are split by it)."""

    id: str
    prompt: str
    tests: Tests | None = None
    solution: str | None = None
    source: str = ""
    starter: str = ""


LCB_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)


def policy_prompt(problem, style="plain"):
    """The user turn that a policy sees: the statement plus the answer format (and the starter code, if any).

    "plain" is ours. "lcb" has the parts of LiveCodeBench's prompt as the paper's recipe places them (method: the system
    sentence inside the user turn, the format heading directly behind the question).
    """
    if style == "plain":
        starter = f"\n\nStart from this code:\n```python\n{problem.starter}\n```"
        starter = "" if problem.starter in problem.prompt else starter
        return f"{problem.prompt}{starter}\n\nAnswer with one ```python block."
    if style == "lcb":
        if problem.starter:
            how = (
                "You will use the following starter code to write the solution and enclose your code within delimiters."
            )
            block = problem.starter
        else:
            how = (
                "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
                "the sample inputs). Enclose your code within delimiters as follows."
            )
            block = "# YOUR CODE HERE"
        answer = "### Answer: (use the provided format with backticks)\n\n"
        return f"{LCB_SYSTEM}\n\n{problem.prompt}### Format: {how}\n```python\n{block}\n```\n\n{answer}"
    raise UserError(f"prompt style {style!r}: expected plain or lcb (--prompt-style)")


# ----------------------------------------------------------------------------------------------------------------------
# loading


def rm_prompt(problem, kind="bare", style="plain"):
    """What a reward model reads as the user turn: the bare statement, or with kind "full" what the policy was asked."""
    return policy_prompt(problem, style) if kind == "full" else problem.prompt


def load_problems(spec, limit=None, min_tests=0, seed=0, log=None, flag="--problems"):
    """`SPEC[,SPEC...]` -> list of Problem.

    A spec is `toy:train`, `toy:untested`, `toy:test`, a `.jsonl` file in our own schema, or `FORMAT:PATH` with a format
    of `LOADERS`. `toy:untested+tests` has the tests that `toy:untested` lacks, for audits of what was trained on it.
    `limit` keeps the first rows of each spec; `min_tests` drops problems that have tests, but fewer. `log` (a function
    of one string, e.g. print) is told what was loaded and dropped. Raises UserError naming `flag`.
    """
    check_limit(limit)
    problems = []
    for part in spec.split(","):
        kind, _, path = part.partition(":")
        if part in ("toy:train", "toy:untested", "toy:untested+tests", "toy:test"):
            found = toy_problems(path.removesuffix("+tests"), seed, limit, with_tests=path.endswith("+tests"))
        elif part.endswith((".jsonl", ".jsonl.gz")) and (not path or kind == "hub"):
            found = [checked(own_problem(row, where), where) for row, where in read_rows(part, limit)]
        elif kind in LOADERS:
            found = [checked(LOADERS[kind](row, where), where) for row, where in read_rows(path, limit)]
        else:
            raise UserError(
                f"{flag} {part!r}: expected toy:train, toy:untested, toy:test, a .jsonl file or FORMAT:PATH; formats: "
                + ", ".join(sorted(LOADERS))
            )
        kept = [p for p in found if p.tests is None or len(p.tests.cases) >= min_tests]
        if not kept:
            raise UserError(
                f"{flag} {part!r}: no problem left of {len(found)} (--min-tests {min_tests}, --limit {limit})"
            )
        if log:
            tested = sum(p.tests is not None for p in kept)
            log(
                f"{part}: {len(found)} problems, {tested} with tests, "
                f"{len(found) - len(kept)} dropped by --min-tests {min_tests}"
            )
        problems += kept
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        raise UserError(f"{flag} {spec!r}: id {next(i for i in ids if ids.count(i) > 1)!r} appears twice")
    return problems


def check_limit(limit):
    """Raises UserError where --limit is no number of rows."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: expected at least 1")


def local_file(path):
    """A path, or `hub:OWNER/NAME[@REVISION]/FILE` of a Hugging Face data set, downloaded -> path of the local file."""
    if path.startswith("hub:"):
        owner, _, rest = path[4:].partition("/")
        name, _, file = rest.partition("/")
        name, _, revision = name.partition("@")
        if not (owner and name and file):
            raise UserError(f"{path!r}: expected hub:OWNER/NAME[@REVISION]/FILE")
        from huggingface_hub import hf_hub_download

        try:
            return hf_hub_download(f"{owner}/{name}", file, revision=revision or None, repo_type="dataset")
        except Exception as error:  # the hub's client raises many kinds: no network, no such file, gated
            raise UserError(f"{path}: cannot be fetched: {str(error).splitlines()[0]:.200}") from None
    if not os.path.isfile(path):
        raise UserError(f"no file at {path!r}: give the path of a .jsonl, .jsonl.gz, .json or .parquet file")
    return path


def raw_rows(path):
    """Rows of a file by its ending: dicts, or the lines of JSON lines."""
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.lib.ArrowException as error:
            raise UserError(f"{path}: not parquet: {error}") from None
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as file:
            try:
                rows = json.load(file)
            except ValueError as error:
                raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}")
        return rows
    return json_lines(path)


def json_lines(path):
    """The lines of a text file, zipped or not, that are not blank. Raises UserError where it is damaged."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            yield from (line for line in file if line.strip())
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not JSON lines in UTF-8: {error}") from None


def read_rows(path, limit=None):
    """Rows of a .jsonl, .jsonl.gz, .json (a list) or .parquet file, local or `hub:`, with the place each came from:
    yields (dict, "FILE row N"). Raises UserError."""
    check_limit(limit)
    path, count = local_file(path), 0
    for count, row in enumerate(itertools.islice(raw_rows(path), limit), 1):
        if isinstance(row, str):
            try:
                halves = "\\ud" in row.lower()  # half a character, which no tokenizer takes
                row = json.loads(row)
                if halves:
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {count}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} row {count}: expected an object, found {type(row).__name__}")
        yield row, f"{path} row {count}"
    if not count:
        raise UserError(f"{path}: no rows")


def need(row, where, *keys, kind=str):
    """The value of the first of `keys` that the row has, checked to be a `kind`; UserError with file, row and key."""
    for key in keys:
        if key in row:
            if not isinstance(row[key], kind):
                expected = getattr(kind, "__name__", kind)
                raise UserError(f"{where}: key {key!r} should be {expected}, found {row[key]!r:.80}")
            return row[key]
    raise UserError(f"{where}: no key {' or '.join(map(repr, keys))}; found {sorted(row)}")


def checked(problem, where):
    """The problem, if its tests are what the sandbox runs; UserError with file, row and what was found."""
    try:
        if problem.tests:
            as_tests(problem.tests)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return problem


def own_problem(row, where):
    """A row of our own schema: the fields of Problem, `tests` an object with the fields of Tests, or null."""
    unknown = set(row) - {f.name for f in dataclasses.fields(Problem)}
    if unknown:
        raise UserError(f"{where}: unknown key {sorted(unknown)}")
    optional = ("solution", "source", "starter")
    row = {key: value for key, value in row.items() if value is not None or key not in optional}
    tests = row.get("tests")
    if tests is not None:
        try:
            tests = Tests(**need(row, where, "tests", kind=dict))
        except TypeError as error:
            raise UserError(f"{where}: tests: {str(error).removeprefix('Tests.__init__() ')}") from None
    for key in set(optional) & set(row):
        need(row, where, key)
    return Problem(**{**row, "id": str(row.get("id", where)), "prompt": need(row, where, "prompt"), "tests": tests})


def mbpp_problem(row, where):
    """google-research MBPP: text, code, test_list, test_setup_code. The first assert goes into the statement, as in the
    MBPP paper's prompt: without it nobody can know the function's name."""
    asserts = need(row, where, "test_list", kind=list)
    if not all(isinstance(text, str) for text in asserts):
        raise UserError(f"{where}: test_list should be a list of asserts, found {asserts!r:.80}")
    prompt = f"{need(row, where, 'text', 'prompt')}\n\nYour code should pass this test:\n{''.join(asserts[:1])}"
    tests = Tests("assert", [{"assert": a} for a in asserts], setup=row.get("test_setup_code") or "")
    solution = need(row, where, "code").replace("\r\n", "\n")
    return Problem(f"mbpp/{row.get('task_id', where)}", prompt, tests, solution, "mbpp")


def humaneval_problem(row, where):
    """openai/human-eval: prompt (signature, docstring), canonical_solution, test (`check(candidate)`), entry_point."""
    prompt, entry_point = need(row, where, "prompt"), need(row, where, "entry_point")
    # A check may call helpers that the prompt defines: it gets the prompt's own, not the program's.
    tests = Tests("assert", [{"check": need(row, where, "test")}], entry_point=entry_point, setup=prompt)
    solution = prompt + need(row, where, "canonical_solution")
    statement = f"Complete the function `{entry_point}`:\n\n{prompt}"  # a reward model sees no starter code
    return Problem(need(row, where, "task_id"), statement, tests, solution, "humaneval", starter=prompt)


def cure_problem(row, where):
    """CURE's evaluation files (LiveBench, LiveCodeBench, CodeContests, CodeForces, MBPP), all turned into stdin tests:
    question, test_input[], test_output[], test_time_limit (seconds)."""
    inputs, outputs = (need(row, where, key, kind=list) for key in ("test_input", "test_output"))
    if len(inputs) != len(outputs):
        raise UserError(f"{where}: {len(inputs)} in 'test_input', {len(outputs)} in 'test_output'")
    cases = [{"input": i, "output": o} for i, o in zip(inputs, outputs)]
    tests = Tests("stdin", cases, time_limit=row.get("test_time_limit")) if cases else None
    file, _, number = where.rpartition(" row ")
    name = os.path.basename(file).partition(".")[0]  # LiveBench, CodeForces, ...: each is a part of the results
    return Problem(f"{name}/{row.get('task_id', number)}", need(row, where, "question"), tests, None, name)


def deepcoder_problem(row, where):
    """DeepCoder-Preview rows of all four sources. `tests` is JSON: a list of {input, output, testtype or type}
    (lcbv5, primeintellect, codeforces) or {inputs, outputs, fn_name} (taco). Functional tests call fn_name or
    metadata.func_name; LiveCodeBench writes their arguments as JSON, one a line."""
    statement = row.get("problem", row.get("question"))
    if isinstance(statement, dict):  # some rows carry a chat turn
        statement = statement.get("content", statement.get("problem"))
    if not isinstance(statement, str):
        raise UserError(f"{where}: key 'problem' should be str, found {row.get('problem')!r:.80}")
    tests, metadata = as_json(row.get("tests"), where, "tests"), as_json(row.get("metadata") or {}, where, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if isinstance(tests, dict):
        name = tests.get("fn_name") or name
        inputs, outputs = (need(tests, where, key, kind=list) for key in ("inputs", "outputs"))
        # taco wraps an expected value in a list of one; where an input has no output, there is no test
        tests = [{"input": i, "output": o[0] if isinstance(o, list) and o else o} for i, o in zip(inputs, outputs)]
    if not isinstance(tests, list):
        raise UserError(f"{where}: key 'tests' should be a list or an object, found {tests!r:.80}")
    cases, is_call = [], False
    for test in tests:
        given, wanted = (test.get(key) if isinstance(test, dict) else None for key in ("input", "output"))
        if given is None or wanted is None:
            raise UserError(f"{where}: a test has keys 'input' and 'output', found {test!r:.80}")
        own = test.get("metadata")  # lcbv5 names the function in each test, the others in the row
        name = test.get("fn_name") or (own.get("func_name") if isinstance(own, dict) else None) or name
        is_call = bool(name) and test.get("testtype", test.get("type")) not in ("stdin", "stdin_stdout")
        cases.append(call_case(given, wanted, where) if is_call else {"input": given, "output": wanted})
    starter = row.get("starter_code") or ""
    entry_point = (f"Solution.{name}" if "class Solution" in starter else name) if is_call else None
    found = Tests("call" if is_call else "stdin", cases, entry_point=entry_point) if cases else None
    solutions = row.get("solutions")
    solution = solutions[0] if isinstance(solutions, list) and solutions else None
    return Problem(str(row.get("id", where)), statement, found, solution, "deepcoder", starter=starter)


def as_json(value, where, key):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: key {key!r} is not JSON: {error}") from None


def call_case(given, wanted, where):
    """Arguments as a list, or as JSON with one argument a line; an expected value as JSON or as it is."""
    if isinstance(given, str):
        given = [as_json(line, where, "input") for line in given.splitlines() if line.strip()]
    return {"args": given, "expected": as_json(wanted, where, "output") if isinstance(wanted, str) else wanted}


LOADERS = {"mbpp": mbpp_problem, "humaneval": humaneval_problem, "cure": cure_problem, "deepcoder": deepcoder_problem}

# ----------------------------------------------------------------------------------------------------------------------
# the toy world: a list of integers goes through one to three steps and is then returned or reduced to a number
#
# Each operation: Python expression, values its {k} is drawn from, and phrasings. The LAST phrasing of each is held out:
# it occurs only in the "unseen" part of toy:test.


@dataclass(frozen=True)
class Op:
    name: str
    code: str
    phrasings: tuple
    ks: tuple = (0,)


# fmt: off
STEPS = [
    Op("keep_gt", "[x for x in xs if x > {k}]",
       ("keep the numbers greater than {k}",
        "keep only what is above {k}", "remove the numbers that are not greater than {k}"), range(0, 7)),
    Op("keep_ge", "[x for x in xs if x >= {k}]",
       ("keep the numbers that are at least {k}",
        "keep only what is {k} or more", "remove the numbers that are not at least {k}"), range(0, 7)),
    Op("keep_lt", "[x for x in xs if x < {k}]",
       ("keep the numbers less than {k}",
        "keep only what is below {k}", "remove the numbers that are not less than {k}"), range(0, 7)),
    Op("keep_le", "[x for x in xs if x <= {k}]",
       ("keep the numbers that are at most {k}",
        "keep only what is {k} or less", "remove the numbers that are not at most {k}"), range(0, 7)),
    Op("keep_even", "[x for x in xs if x % 2 == 0]",
       ("keep the even numbers", "drop the odd numbers", "keep only the numbers that are even")),
    Op("keep_odd", "[x for x in xs if x % 2 == 1]",
       ("keep the odd numbers", "drop the even numbers", "keep only the numbers that are odd")),
    Op("keep_multiple", "[x for x in xs if x % {k} == 0]",
       ("keep the multiples of {k}",
        "keep the numbers divisible by {k}", "keep only the numbers that are multiples of {k}"), range(3, 6)),
    Op("drop_multiple", "[x for x in xs if x % {k} != 0]",
       ("drop the multiples of {k}",
        "drop the numbers divisible by {k}", "remove the numbers that are multiples of {k}"), range(3, 6)),
    Op("add", "[x + {k} for x in xs]",
       ("add {k} to each number", "increase each number by {k}", "make each number {k} more"), range(1, 8)),
    Op("subtract", "[x - {k} for x in xs]",
       ("subtract {k} from each number", "decrease each number by {k}", "make each number {k} less"), range(1, 8)),
    Op("multiply", "[x * {k} for x in xs]",
       ("multiply each number by {k}",
        "replace each number by {k} times itself", "make each number {k} times as large"), range(2, 6)),
    Op("quotient", "[x // {k} for x in xs]",
       ("divide each number by {k}, rounding down",
        "replace each number by its quotient by {k}", "floor divide each number by {k}"), range(2, 6)),
    Op("remainder", "[x % {k} for x in xs]",
       ("take each number modulo {k}",
        "replace each number by its remainder by {k}", "reduce each number modulo {k}"), range(2, 6)),
    Op("square", "[x ** 2 for x in xs]",
       ("square each number", "replace each number by its square", "multiply each number by itself")),
    Op("negate", "[-x for x in xs]",
       ("negate each number", "flip the sign of each number", "replace each number by its negative")),
    Op("absolute", "[abs(x) for x in xs]",
       ("take the absolute value of each number",
        "drop the sign of each number", "replace each number by its absolute value")),
    Op("cap", "[min(x, {k}) for x in xs]",
       ("cap each number at {k}",
        "limit each number to at most {k}", "lower the numbers above {k} to {k}"), range(0, 7)),
    Op("floor", "[max(x, {k}) for x in xs]",
       ("raise each number to at least {k}",
        "replace the numbers below {k} by {k}", "make each number at least {k}"), range(0, 7)),
    Op("first", "xs[:{k}]",
       ("take the first {k}", "keep the first {k} items", "keep only the first {k}"), range(2, 6)),
    Op("last", "xs[-{k}:]",
       ("take the last {k}", "keep the last {k} items", "keep only the last {k}"), range(2, 6)),
    Op("skip_first", "xs[{k}:]",
       ("skip the first {k}", "drop the first {k} items", "remove the first {k}"), range(1, 4)),
    Op("skip_last", "xs[:-{k}]",
       ("skip the last {k}", "drop the last {k} items", "remove the last {k}"), range(1, 4)),
    Op("every_second", "xs[::2]",
       ("keep every second item, starting with the first",
        "take the items at even positions", "keep the items at positions 0, 2, 4 and so on")),
    Op("ascending", "sorted(xs)",
       ("sort in ascending order", "sort from smallest to largest", "sort in increasing order")),
    Op("descending", "sorted(xs, reverse=True)",
       ("sort in descending order", "sort from largest to smallest", "sort in decreasing order")),
    Op("reverse", "xs[::-1]",
       ("reverse the list", "put the items in reverse order", "turn the list around")),
    Op("dedupe", "list(dict.fromkeys(xs))",
       ("drop repeated numbers, keeping the first of each",
        "remove duplicates, keeping the order", "keep the first of each number")),
    Op("running_sum", "[sum(xs[:i + 1]) for i in range(len(xs))]",
       ("take the running sums", "replace each item by the sum up to it", "replace the list by its running totals")),
    Op("running_max", "[max(xs[:i + 1]) for i in range(len(xs))]",
       ("take the running maximum",
        "replace each item by the maximum up to it", "replace the list by its running maxima")),
    Op("differences", "[b - a for a, b in zip(xs, xs[1:])]",
       ("take the differences of neighbours, next minus previous",
        "replace the list by how much each item grows to the next", "take the step from each item to the next")),
    Op("pair_sums", "[a + b for a, b in zip(xs, xs[1:])]",
       ("take the sums of neighbours", "add each item to the next", "replace the list by the sums of neighbours")),
]
REDUCTIONS = [
    Op("list", "xs",
       ("the list", "the resulting list", "what is left")),
    Op("sum", "sum(xs)",
       ("the sum", "the sum of the numbers", "the total of the numbers")),
    Op("count", "len(xs)",
       ("the length", "the number of items", "the count of items")),
    Op("distinct", "len(set(xs))",
       ("the number of distinct items", "how many different numbers there are", "the count of distinct numbers")),
    Op("max", "max(xs, default=0)",
       ("the maximum, or 0 if empty", "the largest number, or 0 if there is none", "the largest, or 0 if empty")),
    Op("min", "min(xs, default=0)",
       ("the minimum, or 0 if empty", "the smallest number, or 0 if there is none", "the smallest, or 0 if empty")),
    Op("first_item", "xs[0] if xs else 0",
       ("the first item, or 0 if empty",
        "the first number, or 0 if there is none", "what comes first, or 0 if empty")),
    Op("last_item", "xs[-1] if xs else 0",
       ("the last item, or 0 if empty", "the last number, or 0 if there is none", "what comes last, or 0 if empty")),
    Op("spread", "max(xs) - min(xs) if xs else 0",
       ("the maximum minus the minimum, or 0 if empty",
        "the largest minus the smallest, or 0 if there is none", "the spread from smallest to largest, or 0 if empty")),
]
# fmt: on
FRAMES = [  # how the clauses become a statement
    lambda steps, result: f"Write solve(xs) for a list of integers: {'; '.join(steps)}; return {result}.",
    lambda steps, result: f"Given a list of integers, {', then '.join(steps)}. solve(xs) returns {result}.",
]
# Compositions are dealt to the splits by a hash of their operations' names, so no composition is in two splits.
# "pretrain" is what tiny/make.py writes its corpora from; it is no evaluation split and is not loaded by any script.
SPLITS = {"pretrain": range(0, 4), "train": range(4, 6), "untested": range(6, 9), "test": range(9, 10)}
SIZES = {"train": 1200, "untested": 4000, "test": 192, "unseen": 64}
NUM_TESTS = 12


@dataclass(frozen=True)
class Composition:
    """Steps, reduction and their constants. `names` identifies it; the constants do not count as a difference."""

    steps: tuple
    reduction: Op
    ks: tuple

    @property
    def names(self):
        return ",".join(op.name for op in self.steps) + ">" + self.reduction.name

    def expressions(self):
        return [op.code.format(k=k) for op, k in zip(self.steps, self.ks)], self.reduction.code

    def program(self):
        """The reference solution."""
        steps, result = self.expressions()
        return "def solve(xs):\n" + "".join(f"    xs = {e}\n" for e in steps) + f"    return {result}\n"


def is_held_out(first, second):
    """Whether `first` directly before `second` occurs in the "unseen" part of toy:test only (one pair in 8)."""
    return zlib.crc32(f"{first.name}>{second.name}".encode()) % 8 == 0


@cache
def compiled(expression):
    return eval(f"lambda xs: {expression}")  # our own expressions from the tables above, never a model's text


def run_steps(expressions, result, xs):
    for expression in expressions:
        xs = compiled(expression)(xs)
    return compiled(result)(xs)


def toy_inputs(rng):
    """NUM_TESTS argument lists: empty, one item, duplicates, negatives, a long one, and random short ones."""

    def draw(n, low=-9, high=12):
        return [rng.randint(low, high) for _ in range(n)]

    fixed = [[], draw(1), draw(3, 1, 4) * 2, draw(6, -9, -1), draw(30)]
    return fixed + [draw(rng.randint(4, 10)) for _ in range(NUM_TESTS - len(fixed))]


def draw_composition(rng, bucket, unseen=False):
    """A random composition of the wanted buckets and kind of combination."""
    while True:
        steps = tuple(rng.choices(STEPS, k=rng.choices((1, 2, 3), (2, 4, 4))[0]))
        reduction = rng.choice(REDUCTIONS[:1] * 3 + REDUCTIONS[1:])
        composition = Composition(steps, reduction, tuple(rng.choice(op.ks) for op in steps))
        held_out = any(is_held_out(a, b) for a, b in itertools.pairwise(steps))
        if (
            held_out == unseen
            and len(set(steps)) == len(steps)
            and zlib.crc32(composition.names.encode()) % 10 in bucket
        ):
            return composition


def make_tests(composition, rng):
    """Tests on which every step counts: without any one of them two answers or more change. None if that fails."""
    steps, result = composition.expressions()
    inputs = toy_inputs(rng)
    expected = [run_steps(steps, result, xs) for xs in inputs]
    for i in range(len(steps)):
        without = steps[:i] + steps[i + 1 :]
        if sum(run_steps(without, result, xs) != y for xs, y in zip(inputs, expected)) < 2:
            return None
    if len({repr(y) for y in expected}) < 4:  # a constant would pass too often
        return None
    return Tests("call", [{"args": [xs], "expected": y} for xs, y in zip(inputs, expected)], entry_point="solve")


def describe(composition, rng, unseen=False):
    """The statement, in seen phrasings; for the unseen part one clause is in its held-out phrasing."""
    ops = [*composition.steps, composition.reduction]
    new = rng.randrange(len(ops)) if unseen else None
    clauses = []
    for i, (op, k) in enumerate(zip(ops, [*composition.ks, 0])):
        phrasing = op.phrasings[-1] if i == new else rng.choice(op.phrasings[:-1])
        clauses.append(phrasing.format(k=k))
    return rng.choice(FRAMES)(clauses[:-1], clauses[-1])


def toy_stream(split, seed=0, unseen=False):
    """Endless (Composition, statement, Tests) of one split, deterministic in the seed."""
    rng = random.Random(f"{split}{'-unseen' if unseen else ''}-{seed}")
    while True:
        composition = draw_composition(rng, SPLITS[split], unseen)
        tests = make_tests(composition, rng)
        if tests is not None:
            yield composition, describe(composition, rng, unseen), tests


def toy_problems(split, seed=0, count=None, with_tests=False):
    """The problems of `train` (with tests), `untested` (without, unless `with_tests`) or `test` (192 in distribution,
    then 64 unseen)."""
    parts = [("toy:" + split, False, SIZES[split])] + (
        [("toy:unseen", True, SIZES["unseen"])] if split == "test" else []
    )
    problems = []
    for source, unseen, size in parts:
        seen, before = set(), len(problems)
        for composition, statement, tests in toy_stream(split, seed, unseen):
            if statement not in seen:
                seen.add(statement)
                hidden = split == "untested" and not with_tests
                solved = {} if hidden else {"tests": tests, "solution": composition.program()}
                problems.append(Problem(f"{source}/{len(problems) - before}", statement, source=source, **solved))
            if len(problems) - before == size:
                break
    # A limit on toy:test keeps both parts in proportion: every stride-th problem instead of the first ones.
    return (
        problems
        if not count or count >= len(problems)
        else [problems[i * len(problems) // count] for i in range(count)]
    )


# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    spec: str = ""  # problems to load: SPEC[,SPEC...]
    show: int = 0  # problems to print in full
    limit: int | None = None  # rows to read
    min_tests: int = 0  # drop problems with fewer tests (those without any stay)
    seed: int = 0  # seed of the toy world


def main():
    args = parse_args(Args, positional="spec")
    if not args.spec:
        raise UserError("no problems named: python problems.py toy:train --show 3")
    problems = load_problems(args.spec, args.limit, args.min_tests, args.seed, log=print)
    for problem in problems[: args.show]:
        print(f"\n=== {problem.id} ({problem.source})\n{problem.prompt}\n")
        print(problem.solution or "(no reference solution)")
        if problem.tests is None:
            print("(no tests)")
            continue
        for case in problem.tests.cases[:4]:
            print(f"  {problem.tests.kind}: {json.dumps(case)[:150]}")
        print(f"  ({len(problem.tests.cases)} tests)")


if __name__ == "__main__":
    run_cli(main)
