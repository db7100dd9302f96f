"""Verified problems -> preference pairs: sample programs, run the tests, pair what passes with what
fails. Here is also the one shape of a sampled answer, `Rollout`.

    python train_rm.py --collect-only            # answers of a policy; prints the funnel, 1 minute
    python train_rm.py --collect-only --candidates mutants --problems mbpp:mbpp.jsonl --out out/mbpp
    python train_rm.py --pairs out/mbpp/pairs.jsonl           # trains on pairs that exist
    python train_rm.py --pairs preference:FILE.parquet        # the same on published preferences

The rule (CodeScaler, section "preference data"): a program that passes all tests is preferred to
one that fails any. The rest is ours: one program of each syntax tree, a least number of tests,
near misses, mutants, caps. Every rule is a line of the funnel, with how many programs it removed.
"""

import ast
import dataclasses
import hashlib
import io
import itertools
import math
import os
import random
import re
import tokenize
from dataclasses import dataclass, field

from codescaler import Tokenizer, generate, load_model, prompt_ids
from common import UserError
from extract import extract_code
from problems import Problem, RowError, as_row, need, policy_prompt, raw_rows, read_rows
from runs import compute_dtype, gather_lists

NOT_GRADED = (None, "harness_error", "unsupported", "flaky")  # verdicts that say nothing
# What is not Python, or too deeply nested for ast.parse or ast.unparse, raises one of these.
NOT_PRINTABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
MUTANT = "/mutant"  # ends the source of a pair whose rejected program is a mutant
CHUNK = 128  # problems that a rank samples and executes before they are written down

FACTS = "number policy parent code reason verdict pass_rate num_tests score reward advantage"
FACTS = (*FACTS.split(), "tokens", "finished")  # of a Rollout, in its line of samples.jsonl


@dataclass
class Rollout:
    """One sampled answer and everything that is learned about it. `row()` is its line of
    samples.jsonl; `from_row` has all that the line has, so neither token ids nor tests."""

    problem: Problem
    number: int = 0  # of the prompt in the run: key of its group and of its random numbers
    prompt_ids: list = field(default_factory=list)
    ids: list = field(default_factory=list)  # the answer, with its stop token if it has one
    old_logp: list = field(default_factory=list)  # log-probability of each id when it was sampled
    support: list | None = None  # ids that could be sampled, where top-p or top-k left some out
    finished: bool = True  # ended by itself, not by max_new_tokens
    text: str = ""
    code: str | None = None  # the program in it
    reason: str = ""  # of extract.py: why there is a program, or none
    policy: str = ""  # the model that it was sampled from
    parent: str | None = None  # of a mutant: the passing program that it was made from
    verdict: str | None = None  # of the tests; "invalid": no program; None: not executed
    pass_rate: float | None = None  # share of the tests passed
    score: float | None = None  # the reward model's raw score
    reward: float | None = None  # None: nothing is known, the answer is left out
    advantage: float = 0.0
    num_tests: int = 0  # of its problem
    tokens: int = 0  # in `ids`

    def __post_init__(self):
        tests = self.problem.tests
        self.num_tests = self.num_tests or (len(tests.cases) if tests else 0)
        self.tokens = self.tokens or len(self.ids)

    def row(self):
        problem, facts = self.problem, {name: getattr(self, name) for name in FACTS}
        texts = {"problem": problem.id, "prompt": problem.prompt, "source": problem.source}
        return texts | {"completion": self.text} | facts

    @classmethod
    def from_row(cls, row):
        problem = Problem(row["problem"], row["prompt"], source=row["source"])
        return cls(problem, text=row["completion"], **{name: row[name] for name in FACTS})


@dataclass(frozen=True)
class Pair:
    """`chosen` and `rejected` are bare programs. Pairs of a problem share their id up to the last
    "#"; `margin` is the share of tests that the rejected one fails, `num_tests` their number."""

    prompt: str
    chosen: str
    rejected: str
    id: str
    source: str
    margin: float | None = None
    num_tests: int | None = None


# --------------------------------------------------------------------------------------------------
# pair files


def load_pairs(spec, limit=None, log=None):
    """Pairs of a file: our own pairs.jsonl, codescalerpair:FILE, rmbench:FILE or preference:FILE
    (TRL, Skywork, UltraFeedback, AceCodePair).

    A row that does not fit is a UserError in our own schema and left out of the public ones. Pairs
    whose sides read alike are left out of all. `log` is told how many were, and why.
    """
    kind, _, path = spec.partition(":")
    if not path or kind == "hub":
        kind, path = "own", spec
    if kind not in FORMATS:
        raise UserError(f"--pairs {spec!r}: expected a file or FORMAT:FILE of {', '.join(FORMATS)}")
    pairs, left_out = [], {}  # left_out: reason -> errors
    for item, where in raw_rows(path, limit):
        try:
            found = FORMATS[kind](as_row(item, where), where)
            if not found[0].prompt.strip():
                raise RowError(where, "the statement is empty", found[0].prompt)
        except RowError as error:
            if kind == "own":
                raise
            left_out.setdefault(error.reason, []).append(error)
            continue
        for pair in found:
            sides = {side.strip("\n") for side in (pair.chosen, pair.rejected)}
            if len(sides) == 2 and "" not in sides:
                pairs.append(pair)
            else:
                error = RowError(where, "the sides read alike, or one is empty", pair.chosen)
                left_out.setdefault(error.reason, []).append(error)
    lines = [f"  left out {len(errors)}: {errors[0]}" for errors in left_out.values()]
    count = sum(map(len, left_out.values()))
    if not pairs:
        raise UserError("\n".join([f"--pairs {spec!r}: no pair left of {count}", *lines]))
    if 5 * count > count + len(pairs):
        lines.append(f"WARNING: {spec}: {count} of {count + len(pairs)} pairs are left out")
    if log and lines:
        log("\n".join([f"{spec}: {len(pairs)} pairs", *lines]))
    return pairs


def whole_program(text):
    """The Extraction of a text that is a program without a fence around it."""
    fence = "`" * 20  # longer than any in the text
    return extract_code(f"{fence}python\n{text}\n{fence}")


def bare_program(row, where, key):
    """A side of a pair that the model reads as it is."""
    code = need(row, where, key, kind=str | list)
    if isinstance(code, list) or "```" in code and whole_program(code).code is None:
        reason = f"{key!r} should be a bare program (for fenced answers and chats: preference:FILE)"
        raise RowError(where, reason, code)
    return code


def own_pair(row, where):
    """A row of our own schema: the fields of Pair; nulls are their defaults."""
    if unknown := set(row) - {f.name for f in dataclasses.fields(Pair)}:
        raise RowError(where, "unknown keys", sorted(unknown))
    row = {"source": ""} | {key: value for key, value in row.items() if value is not None}
    number = int | float
    kinds = {"prompt": str, "id": str, "source": str, "margin": number, "num_tests": number}
    for key in sorted({"prompt", "id"} | set(row) - {"chosen", "rejected"}):
        need(row, where, key, kind=kinds[key])
    return [Pair(**row | {key: bare_program(row, where, key) for key in ("chosen", "rejected")})]


def codescaler_pair(row, where):
    """A row of CodeScalerPair: question_content (or question), code_pos, code_neg."""
    sides = [bare_program(row, where, key) for key in ("code_pos", "code_neg")]
    statement = need(row, where, "question_content", "question")
    return [Pair(statement, *sides, pair_id(statement, where), "codescalerpair")]


def pair_id(statement, where):
    """The id of a row that names no problem: the statement is the problem."""
    problem = hashlib.sha256(" ".join(words(statement)).encode()).hexdigest()[:16]
    return f"{problem}#{where.rpartition(' ')[2]}"


DOMAINS = ("chat", "code", "math", "safety")  # safety-refuse and safety-response are one domain


def rmbench_item(row, where):
    """An RM-Bench row -> (domain, prompt, chosen[3], rejected[3]) of the styles concise, detailed
    plain text and detailed markdown. Files of one domain carry it in their name."""
    name = need(row, where, "domain") if "domain" in row else os.path.basename(where)
    domain = next((d for d in DOMAINS if name.startswith(d)), None)
    if domain is None:
        raise RowError(where, f"the domain is none of {', '.join(DOMAINS)}", name)
    sides = [need(row, where, key, kind=list) for key in ("chosen", "rejected")]
    if any(len(side) != 3 or not all(isinstance(text, str) for text in side) for side in sides):
        raise RowError(where, "chosen and rejected should be lists of three texts", sides)
    return domain, need(row, where, "prompt"), *sides


def rmbench_pairs(row, where):
    """The three same-style pairs of an item. Ids repeat: domain (of the row, else of the file) and
    id name it."""
    domain, prompt, *sides = rmbench_item(row, where)
    name = row.get("domain") or os.path.basename(where).partition("_")[0]
    name = f"{name}/{row.get('id', where)}"
    return [Pair(prompt, *both, f"{name}#{i}", domain) for i, both in enumerate(zip(*sides))]


def preference_pair(row, where):
    """A row of published preferences: `chosen` and `rejected`, texts or lists of {role, content}
    that may begin with the prompt; else it is in `prompt` (AceCodePair: instruction and input). A
    side is the program in its answer. System turns are not read; the question is one turn."""
    parts = [row.get(key) for key in ("instruction", "input")]
    asked = row.get("prompt") or "\n".join(part for part in parts if part and isinstance(part, str))
    statements, sides = set(), []
    for key in ("chosen", "rejected"):
        turns = []
        for value, role in ((asked, "user"), (row.get(key), "assistant")):
            value = [{"role": role, "content": value}] if isinstance(value, str) else value or []
            if not (isinstance(value, list) and all(isinstance(turn, dict) for turn in value)):
                raise RowError(where, f"{key!r} and its prompt should be texts or messages", value)
            spoken = [(need(t, where, "role"), need(t, where, "content")) for t in value]
            # A side with a question of its own has the prompt inside.
            turns = spoken if any(role == "user" for role, _ in spoken) else turns + spoken
        turns = [turn for turn in turns if turn[0] != "system"]
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise RowError(where, f"{key!r} should be the answer to one question", turns)
        (_, statement), (_, answer) = turns
        statements.add(statement)
        # The whole answer may be a program, with fences in its texts, or it has one in a fence.
        code = whole_program(answer).code or extract_code(answer).code
        if code is None:
            raise RowError(where, f"no program in {key!r}", answer)
        sides.append(code)
    if len(statements) > 1:
        raise RowError(where, "chosen and rejected answer different questions", statements)
    source = row["source"] if isinstance(row.get("source"), str) else "preference"
    return [Pair(statement, *sides, pair_id(statement, where), source)]


FORMATS = {
    "own": own_pair,
    "codescalerpair": codescaler_pair,
    "rmbench": rmbench_pairs,
    "preference": preference_pair,
}


# --------------------------------------------------------------------------------------------------
# problems that are the same


def words(text):
    """The words of a statement in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def problem_of(pair):
    """The id of a pair's problem: what confidence intervals keep together."""
    return pair.id.rpartition("#")[0] or pair.id


def split_pairs(pairs, held_out, seed=0):
    """(train, held-out); `held_out` is a share of the problems, whose pairs are all held out.
    Problems with the same statement are one."""
    statement = {problem_of(p): " ".join(words(p.prompt)) for p in pairs}
    statements = sorted(set(statement.values()))
    random.Random(f"split-{seed}").shuffle(statements)
    test = set(statements[: max(1, round(held_out * len(statements)))] if held_out else [])
    train = [p for p in pairs if statement[problem_of(p)] not in test]
    return train, [p for p in pairs if statement[problem_of(p)] in test]


def decontaminate(problems, evaluation, size=13):
    """Problems -> (those without `size` neighbouring words of a statement of `evaluation`, rows of
    the funnel). A shorter statement counts as a whole. 13 is the rule of GPT-3's appendix C."""

    def ngrams(problem):
        found = words(problem.prompt)
        return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))}

    seen = set().union(*map(ngrams, evaluation))
    kept = [p for p in problems if not ngrams(p) & seen]
    rule = f"no {size} words in common with {len(evaluation)} problems of --decontaminate"
    return kept, [("problems", len(kept), f"{rule}: {len(problems) - len(kept)} removed")]


# --------------------------------------------------------------------------------------------------
# programs that are the same


def is_text(statement):
    """A statement that is only a constant: a docstring, or a comment of another kind."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def bound_name(node):
    """The name that an argument or an assignment binds, else None."""
    is_bound = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    return node.arg if isinstance(node, ast.arg) else node.id if is_bound else None


def bare(tree):
    """The syntax tree without docstrings and annotations, its local names replaced in their order.
    Names that a test may use stay: those bound outside functions, and of keyword arguments."""
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    fixed = {bound_name(n) for n in nodes if id(n) not in inside} | {None}
    fixed |= {n.arg for n in nodes if isinstance(n, ast.keyword)}
    fixed |= {name for n in nodes if isinstance(n, ast.Global | ast.Nonlocal) for name in n.names}
    local = dict.fromkeys(name for n in nodes if (name := bound_name(n)) not in fixed)
    fresh = {name: f"v{i}" for i, name in enumerate(local)}
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = fresh.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = fresh.get(node.arg, node.arg), None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
    return tree


def laid_out(code, change=lambda tree: tree):
    """The program in the layout of `ast.unparse`, without comments, after `change` of its tree.
    None where Python cannot parse or print it."""
    try:
        return ast.unparse(change(ast.parse(code)))
    except NOT_PRINTABLE:
        return None


def normalised(code):
    """Equal texts are one program.

    >>> normalised("def f(a: int):  # first\\n    return a") == normalised("def f(b): return b")
    True
    """
    return laid_out(code, bare) or code


# --------------------------------------------------------------------------------------------------
# mutants: a right program with one small slip

# fmt: off
SLIPS = {  # token -> what may stand in its place
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",),
    "!=": ("==",), "+": ("-",), "-": ("+",), "*": ("**",), "**": ("*",), "//": ("%",), "%": ("//",),
    "+=": ("-=",), "-=": ("+=",), "and": ("or",), "or": ("and",), "is": ("is not",), "not": ("",),
    "in": ("not in",), "if": ("if not",), "elif": ("elif not",), "while": ("while not",),
    "True": ("False",), "False": ("True",), "min": ("max",), "max": ("min",), "any": ("all",),
    "all": ("any",), "sum": ("", "len"), "len": ("", "sum"), "abs": ("",), "sorted": ("",),
}
# fmt: on
DEFINITION = re.compile(r"\s*(async |def |class |import |from |@)")


def slips(text):
    """{kind: [(line, first column, last column, what may stand there)]} of a laid-out program."""
    sites, nodes = {}, list(ast.walk(ast.parse(text)))
    variables = {bound_name(node) for node in nodes} - {None}
    variables -= {getattr(n.target, "id", "") for n in nodes if isinstance(n, ast.comprehension)}
    for row, line in enumerate(text.split("\n")):
        if not DEFINITION.match(line) and not line.lstrip().startswith("return"):
            sites.setdefault("line", []).append((row, 0, len(line), ""))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, others = token.string, SLIPS.get(token.string, ())
        if token.type == tokenize.NUMBER and kind.isdigit() and len(kind) < 20:
            kind, others = "number", (str(int(kind) + 1), str(abs(int(kind) - 1)))
        elif token.type == tokenize.NAME and kind in variables:
            kind, others = "variable", sorted(variables - {kind})
        for other in () if DEFINITION.match(token.line) else others:
            place = (token.start[0] - 1, token.start[1], token.end[1], other)
            sites.setdefault(kind, []).append(place)
    return sites


def mutants(code, count, seed=0):
    """Up to `count` different programs, each with one slip in the text of `code`: another operator,
    number or variable, or a line less. None where Python cannot parse or print the program."""
    text, found = laid_out(code), {}
    try:
        kinds = list(slips(text).values()) if text else []
    except (*NOT_PRINTABLE, tokenize.TokenError):
        kinds = []
    if not kinds:
        return []
    lines, rng = text.split("\n"), random.Random(f"mutants-{seed}-{code}")
    for places in (kinds, *kinds):
        rng.shuffle(places)
    # One slip of each kind, then a second of each, ...
    for place in filter(None, itertools.chain(*itertools.zip_longest(*kinds))):
        if len(found) >= count:
            break
        row, start, end, slip = place
        line = lines[row][:start] + slip + lines[row][end:]
        mutant = laid_out("\n".join([*lines[:row], line, *lines[row + 1 :]]))
        if mutant not in (None, "", text):
            found[mutant] = None
    return list(found)


# --------------------------------------------------------------------------------------------------
# candidates: sampled or given, executed


def rollout(
    model, tokenizer, problems, n, numbers=None, mode="strict", style="plain",
    enable_thinking=None, seed=0, policy="", **sampling,
):  # fmt: skip
    """`n` answers to each problem, with their programs -> list of groups (lists) of Rollout.

    `numbers` are the keys of the prompts' random numbers (default: their places in the list);
    `sampling` goes to `generate`: max_new_tokens, temperature, top_p, top_k, max_rows, progress.
    """
    numbers = list(range(len(problems)) if numbers is None else numbers)
    texts = [policy_prompt(problem, style) for problem in problems]
    prompts = [prompt_ids(tokenizer, text, enable_thinking) for text in texts]
    completions = generate(
        model, prompts, n=n, stop_ids=tokenizer.stop_ids, seed=seed, prompt_keys=numbers, **sampling
    )
    groups = []
    for problem, number, prompt, answers in zip(problems, numbers, prompts, completions):
        groups.append([])
        for answer in answers:
            # The stop token is part of what is trained, not of what is read.
            text = tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)
            code, reason = extract_code(text, mode)
            facts = (answer.ids, answer.logps, answer.support, answer.finished, text, code, reason)
            groups[-1].append(Rollout(problem, number, prompt, *facts, policy))
    return groups


def execute(sandbox, rollouts, stop_early=True, repeat=1):
    """Runs the programs of problems that have tests and fills in `verdict` and `pass_rate`; equal
    programs of a problem run once. With repeat=2 a passing program runs again, and one that then
    fails is "flaky". Returns the Result of each rollout, None where nothing ran."""
    jobs = {
        (r.problem.id, r.code): (r.code, r.problem.tests)
        for r in rollouts
        if r.code is not None and r.problem.tests
    }
    results, flaky = dict(zip(jobs, sandbox.map(jobs.values(), stop_early=stop_early))), set()
    for _ in range(repeat - 1):
        passed = [key for key, result in results.items() if result.passed and key not in flaky]
        again = sandbox.map([jobs[key] for key in passed])
        flaky |= {key for key, result in zip(passed, again) if not result.passed}
    found = [results.get((r.problem.id, r.code)) for r in rollouts]
    for r, result in zip(rollouts, found):
        if result:
            failed = (verdict for verdict in result.verdicts if verdict != "pass")
            passed = "flaky" if (r.problem.id, r.code) in flaky else "pass"
            r.verdict = passed if result.passed else next(failed, "harness_error")
            r.pass_rate = result.pass_rate
        elif r.problem.tests:
            r.verdict, r.pass_rate = "invalid", 0.0
    return found


def given_programs(problems, args):
    """{problem id: [Rollout]} without a model: the problems' own solutions (--candidates mutants),
    or a file whose rows have `problem` and `completion` or `code`, such as any samples.jsonl."""
    by_id, found = {p.id: (number, p) for number, p in enumerate(problems)}, {}
    rows = (({"problem": p.id, "code": p.solution}, "") for p in problems if p.solution)
    for row, where in rows if args.candidates == "mutants" else read_rows(args.candidates):
        # Left out: the first row of a store, mutants (they are made again), other problems.
        if "header" in row or row.get("parent") or need(row, where, "problem") not in by_id:
            continue
        number, problem = by_id[row["problem"]]
        has_code = row.get("code") is not None
        text = "" if has_code else need(row, where, "completion")
        code, reason = whole_program(need(row, where, "code")) if has_code else extract_code(text)
        r = Rollout(problem, number, text=text, code=code, reason=reason)
        found.setdefault(problem.id, []).append(r)
    if not found:
        raise UserError(
            f"--candidates {args.candidates}: no program for any of {len(problems)} problems; "
            "expected mutants (the problems need solutions) or a file with the ids of --problems"
        )
    return found


def collect(problems, args, sandbox, done=(), device="cpu", rank=0, world=1):
    """Yields lists of executed Rollouts (those of Rollout.from_row), with mutants of the passing
    ones, a chunk of problems at a time; the same on all ranks, each of which does its share. What
    is in `done`, a set of (policy, problem id), is skipped. All `problems` have tests.

    args: candidates policy group temperature max_new_tokens prompt_style enable_thinking mutants
    seed.
    """
    for policy in args.policy if args.candidates == "policy" else [""]:
        if policy:
            model = load_model(policy, "lm", compute_dtype(device), device)
            tokenizer = Tokenizer(policy)
        else:
            given = given_programs(problems, args)
        todo = [(number, p) for number, p in enumerate(problems) if (policy, p.id) not in done]
        for at in range(0, len(todo), CHUNK * world):
            mine = todo[at : at + CHUNK * world][rank::world]
            numbers, asked = [number for number, _ in mine], [p for _, p in mine]
            if policy:
                groups = rollout(
                    model, tokenizer, asked, args.group, numbers, style=args.prompt_style,
                    enable_thinking=args.enable_thinking, seed=args.seed, policy=policy,
                    temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                )  # fmt: skip
            else:
                groups = [given.get(p.id, []) for p in asked]
            found, right = [r for group in groups for r in group], {}
            execute(sandbox, found, stop_early=False, repeat=2)
            for r in found:
                if r.verdict == "pass":
                    right.setdefault((r.number, normalised(r.code)), r)
            changed = []
            for r in right.values():  # the parent in the layout of its mutants: it must not tell
                facts = {"reason": "ok", "policy": policy, "parent": laid_out(r.code)}
                for code in mutants(r.code, args.mutants, args.seed):
                    changed.append(Rollout(r.problem, r.number, code=code, **facts))
            execute(sandbox, changed, stop_early=False)
            # In the order of the problems on any number of ranks: it decides which pairs are drawn.
            rows = gather_lists([r.row() for r in found + changed])
            yield [Rollout.from_row(row) for row in sorted(rows, key=lambda row: row["number"])]


# --------------------------------------------------------------------------------------------------
# the pair rule


def make_pairs(rollouts, rules, seed=0):
    """Rollouts -> (pairs, funnel): all-pass over any-fail within a problem, and passing programs
    over their mutants. `rules` has min_tests, max_pairs and mutants. `funnel` is a list of (what,
    how many are left, the rule with its value and how many it removed)."""
    rng, seen, least = random.Random(f"pairs-{seed}"), set(), rules.min_tests
    programs = sorted(rollouts, key=lambda r: r.parent is not None)  # mutants of candidates go
    funnel = [("problems", len({r.problem.id for r in rollouts}), "with tests")]
    funnel.append(("programs", len(rollouts), "sampled or given, and mutants of those that pass"))

    def is_new(r):
        before = len(seen)
        seen.add((r.problem.id, normalised(r.code)))
        return len(seen) > before

    for rule, test in (
        ("a valid program, by extract.py", lambda r: r.code is not None),
        ("one of each normalised syntax tree a problem", is_new),
        (f"at least {least} tests (--min-tests)", lambda r: r.num_tests >= least),
        ("a verdict: no harness error, passes again", lambda r: r.verdict not in NOT_GRADED),
        ("no passing mutants", lambda r: not r.parent or r.verdict != "pass"),
    ):
        kept = [r for r in programs if test(r)]
        funnel.append(("programs", len(kept), f"{rule}: {len(programs) - len(kept)} removed"))
        programs = kept

    def failing(group):  # near misses and others in turn: a cap takes as many of both
        rng.shuffle(group)
        near, far = ([r for r in group if (r.pass_rate >= 0.5) == side] for side in (True, False))
        return [r for both in itertools.zip_longest(near, far) for r in both if r]

    groups, drawn = {}, {"pairs": [], "mutant pairs": []}
    for r in programs:
        groups.setdefault(r.problem.id, []).append(r)
    mixed = both = 0
    for group in groups.values():
        good = [r for r in group if r.verdict == "pass"]
        bad = failing([r for r in group if r.verdict != "pass" and not r.parent])
        rng.shuffle(good)
        # Every couple once, and no program twice before each other one was used once: (0,0) (1,1)
        # .., and after a whole round shifted by one: (0,1) (1,2) ..
        turn, couples = math.lcm(len(good), len(bad)), len(good) * len(bad)
        for i in range(min(couples, rules.max_pairs)):
            drawn["pairs"].append((i, good[i % len(good)].code, bad[(i + i // turn) % len(bad)]))
        changed = failing([r for r in group if r.parent])[: rules.mutants]
        drawn["mutant pairs"] += [(f"mutant{i}", r.parent, r) for i, r in enumerate(changed)]
        both, mixed = both + (couples > 0), mixed + couples
    text = f"at most {rules.max_pairs} a problem (--max-pairs) of {mixed} couples"
    funnel.append(("with both", both, "problems with a passing and a failing program"))
    funnel.append(("pairs", len(drawn["pairs"]), text))
    text = f"at most {rules.mutants} a problem (--mutants)"
    funnel.append(("mutant pairs", len(drawn["mutant pairs"]), text))
    pairs = []
    for kind, found in drawn.items():
        for number, chosen, r in found:
            source = r.problem.source + (MUTANT if kind == "mutant pairs" else "")
            facts = (f"{r.problem.id}#{number}", source, 1.0 - r.pass_rate, r.num_tests)
            pairs.append(Pair(r.problem.prompt, chosen, r.code, *facts))
    return pairs, funnel


def print_funnel(funnel, log=print):
    """(what, count, rule) rows as a table."""
    for what, count, rule in funnel:
        log(f"  {what:<14}{count:>8}   {rule}")
