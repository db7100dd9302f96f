"""Verified problems -> preference pairs: sample programs, run the tests, pair what passes with what
fails. Here is also the one shape of a sampled answer, `Rollout`.

    python train_rm.py --collect-only            # answers of a policy; prints the funnel, 1 minute
    python train_rm.py --collect-only --candidates mutants --problems mbpp:mbpp.jsonl --out out/mbpp
    python train_rm.py --pairs out/mbpp/pairs.jsonl           # trains on pairs that exist
    python train_rm.py --pairs preference:FILE.parquet        # the same on published preferences

The rule (CodeScaler, section "preference data"): a program that passes all tests is preferred to
one that fails any. The rest is ours, and every rule is a line of the funnel.
"""

import ast
import io
import itertools
import math
import os
import random
import re
import tokenize
from collections import defaultdict
from dataclasses import MISSING, dataclass, field, fields
from functools import partial

from codescaler import Tokenizer, generate, load_model, prompt_ids
from common import UserError
from extract import extract_code
from problems import Problem, RowError, load_rows, need, policy_prompt, read_rows, verified
from runs import compute_dtype, gather_lists

NOT_GRADED = (None, "harness_error", "unsupported", "flaky")  # verdicts that say nothing
MUTANT = "/mutant"  # ends the source of a pair whose rejected program is a mutant
CHUNK = 128  # problems that a rank samples and executes before they are written down

FACTS = """number policy parent code reason verdict pass_rate num_tests score reward advantage
tokens finished""".split()  # of a Rollout, in its line of samples.jsonl


@dataclass
class Rollout:
    """One sampled answer and everything that is learned about it. `row()` is its line of
    samples.jsonl; `from_row` has neither token ids nor tests."""

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
    pass_rate: float | None = None  # tests passed / all; those after a stop count as failed
    score: float | None = None  # the reward model's raw score
    reward: float | None = None  # None: nothing is known, the answer is left out
    advantage: float = 0.0
    num_tests: int = 0  # of its problem
    tokens: int = 0  # in `ids`

    def __post_init__(self):
        if self.problem.tests:
            self.num_tests = len(self.problem.tests.cases)
        self.tokens = self.tokens or len(self.ids)

    def row(self):
        row = {"problem": self.problem.id, "prompt": self.problem.prompt}
        row |= {"source": self.problem.source, "completion": self.text}
        return row | {name: getattr(self, name) for name in FACTS}

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
    source: str = ""
    margin: float | int | None = None
    num_tests: int | None = None


# --------------------------------------------------------------------------------------------------
# pair files: a row -> its pairs, or RowError


def own_pair(row, where):
    """Our own schema: the fields of Pair; nulls are their defaults."""
    row = {key: value for key, value in row.items() if value is not None}
    if unknown := row.keys() - {f.name for f in fields(Pair)}:
        raise RowError(where, "unknown keys", sorted(unknown))
    for f in fields(Pair):
        if f.default is MISSING or f.name in row:
            need(row, where, f.name, kind=f.type)
    pair = Pair(**row)
    for key, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if "```" in text and program_in(text).code != text.strip("\n"):
            reason = f"{key!r} should be a bare program (fenced answers: preference:FILE)"
            raise RowError(where, reason, text)
    return [pair]


def public_pair(row, where, source):
    """CodeScalerPair, AceCodePair, and the form of TRL, Skywork and UltraFeedback, by the names of
    their fields. A side is the program in a text, or in the last of messages {role, content} that
    may begin with the question. System turns are not read; the statement names the problem."""
    texts = [row.get(key) for key in ("question_content", "question", "instruction", "input")]
    asked = row.get("prompt") or "\n".join(filter(None, texts))
    sides = []
    for keys in (("chosen", "code_pos"), ("rejected", "code_neg")):
        turns = messages(need(row, where, *keys, kind=str | list), "assistant")
        turns = turns if len(turns) > 1 else messages(asked, "user") + turns
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise RowError(where, f"{keys[0]!r} should be the answer to one question", turns)
        question, answer = [need(turn, where, "content") for turn in turns]
        code = program_in(answer).code
        if code is None:
            raise RowError(where, f"no program in {keys[0]!r}", answer)
        sides.append((question, code))
    (question, chosen), (other, rejected) = sides
    if question != other:
        raise RowError(where, "chosen and rejected answer different questions", sides)
    name = f"{normal_text(question)}#{where.rpartition(' ')[2]}"
    return [Pair(question, chosen, rejected, name, source)]


def messages(value, role):
    """A text of `role`, or a list of messages -> messages without the system's."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    return [turn for turn in turns if turn["role"] != "system"]


def program_in(text):
    """The Extraction of a text that is a program as a whole, or else an answer with one."""
    fence = "`" * 20  # longer than any in the text
    whole = extract_code(f"{fence}python\n{text}\n{fence}")
    return extract_code(text) if whole.code is None else whole


DOMAINS = ("chat", "code", "math", "safety")  # safety-refuse and safety-response are one domain


def rmbench_pairs(row, where):
    """RM-Bench: chosen[3] and rejected[3] are of the styles concise, detailed plain text, detailed
    markdown -> three same-style pairs, which domain and id name: ids repeat. Files of one domain
    carry it in their name."""
    name = str(row.get("domain", os.path.basename(where)))
    domain = next((d for d in DOMAINS if name.startswith(d)), None)
    sides = [need(row, where, key, kind=list) for key in ("chosen", "rejected")]
    if domain is None or [[type(text) for text in side] for side in sides] != [[str] * 3] * 2:
        reason = f"chosen and rejected should be three texts, the domain one of {DOMAINS}"
        raise RowError(where, reason, (name, sides))
    prompt, item = need(row, where, "prompt"), f"{row.get('domain', domain)}/{row.get('id', where)}"
    return [Pair(prompt, *both, f"{item}#{i}", domain) for i, both in enumerate(zip(*sides))]


FORMATS = {
    "own": own_pair,
    "codescalerpair": partial(public_pair, source="codescalerpair"),
    "preference": partial(public_pair, source="preference"),
    "rmbench": rmbench_pairs,
}


def load_pairs(spec, limit=None, log=None):
    """Pairs of a file: our own pairs.jsonl, or FORMAT:FILE with a format of `FORMATS`. A row that
    does not fit is a UserError in our own schema and left out of the others; a row whose sides read
    alike is left out of all. `log` is told how many were, and why."""

    def accept(pairs, where):
        for pair in pairs:
            sides = {pair.chosen.strip("\n"), pair.rejected.strip("\n")}
            if len(sides) < 2 or "" in {pair.prompt.strip(), *sides}:
                reason = "the sides read alike, or the statement or a side is empty"
                raise RowError(where, reason, pair, useless=True)
        return pairs

    return load_rows(spec, FORMATS, accept, "pair", limit, log, "--pairs")


# --------------------------------------------------------------------------------------------------
# problems that are the same


def normal_text(text):
    """The words of a statement in lower case, without punctuation, a space between."""
    return " ".join(re.findall(r"\w+", text.lower()))


def problem_of(pair):
    """The id of a pair's problem: what confidence intervals keep together."""
    return pair.id.rpartition("#")[0] or pair.id


def split_pairs(pairs, held_out, seed=0):
    """(train, held-out); `held_out` is a share of the statements, whose pairs are all held out."""
    statements = sorted({normal_text(p.prompt) for p in pairs})
    random.Random(f"split-{seed}").shuffle(statements)
    test = set(statements[: max(1, round(held_out * len(statements)))] if held_out else [])
    train = [p for p in pairs if normal_text(p.prompt) not in test]
    return train, [p for p in pairs if normal_text(p.prompt) in test]


def decontaminate(problems, evaluation, size=13):
    """Problems -> (those without `size` consecutive words of a statement of `evaluation`, rows of
    the funnel). A shorter statement counts as a whole. 13 is the rule of GPT-3's appendix C."""

    def ngrams(problem):
        words = normal_text(problem.prompt).split()
        return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}

    seen = set().union(*map(ngrams, evaluation))
    kept = [p for p in problems if not ngrams(p) & seen]
    rule = f"no {size} consecutive words of {len(evaluation)} problems of --decontaminate"
    return kept, [("problems", len(kept), f"{rule}: {len(problems) - len(kept)} removed")]


# --------------------------------------------------------------------------------------------------
# programs that are the same, and programs with one small slip

# What is not Python, or too deeply nested to be walked, raises one of these.
NOT_PRINTABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


def laid_out(code):
    """The program in the layout of `ast.unparse`, without comments; None where Python cannot."""
    try:
        return ast.unparse(ast.parse(code))
    except NOT_PRINTABLE:
        return None


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def normalised(code):
    """Equal results are one program: docstrings go, and annotations of arguments and results, and
    variables are named in their order.

    >>> normalised("def f(a: int):  # first\\n    return a") == normalised("def f(b): return b")
    True
    """
    try:
        tree = ast.parse(code)
        nodes = list(ast.walk(tree))
        # The name of an attribute or of a named argument says which one is meant: it stays.
        kept = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        kept += [node.arg for node in nodes if isinstance(node, ast.keyword)]
        fresh = {name: name for name in kept}
        for node in nodes:
            if isinstance(node, ast.arg):
                node.annotation = None
                node.arg = fresh.setdefault(node.arg, f"v{len(fresh)}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                fresh.setdefault(node.id, f"v{len(fresh)}")
            elif isinstance(node, DOCUMENTED):
                node.returns = None  # of a function
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
        for node in nodes:
            if isinstance(node, ast.Name):
                node.id = fresh.get(node.id, node.id)
        return ast.unparse(tree)
    except NOT_PRINTABLE:
        return code


# fmt: off
SLIPS = {  # token -> what may stand in its place
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",),
    "!=": ("==",), "+": ("-",), "-": ("+",), "*": ("**",), "**": ("*",), "//": ("%",), "%": ("//",),
    "+=": ("-=",), "-=": ("+=",), "and": ("or",), "or": ("and",), "not": ("",), "in": ("not in",),
    "if": ("if not",), "elif": ("elif not",), "while": ("while not",), "True": ("False",),
    "False": ("True",), "min": ("max",), "max": ("min",), "any": ("all",), "all": ("any",),
    "sum": ("", "len"), "len": ("", "sum"), "abs": ("",), "sorted": ("",),
}
# fmt: on
DEFINITION = re.compile(r"\s*(async |def |class |import |from |@)")  # a line that stays as it is


def mutants(code, count, seed=0):
    """Up to `count` different programs, each with another token in one place of `code`; [] where
    Python cannot parse or print it."""
    sites, found, rng = [], {}, random.Random(f"mutants-{seed}-{code!r}")
    try:
        text = ast.unparse(ast.parse(code))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            others = SLIPS.get(token.string, ())
            if token.type == tokenize.NUMBER and token.string.isdigit() and len(token.string) < 20:
                others = (str(int(token.string) + 1), str(abs(int(token.string) - 1)))
            if not DEFINITION.match(token.line):
                sites += [(*token.start, token.end[1], other) for other in others]
    except NOT_PRINTABLE:
        return []
    rng.shuffle(sites)
    for row, start, end, other in sites:
        if len(found) < count:
            lines = text.split("\n")
            lines[row - 1] = lines[row - 1][:start] + other + lines[row - 1][end:]
            mutant = laid_out("\n".join(lines))
            if mutant not in (None, text):
                found[mutant] = None
    return list(found)


# --------------------------------------------------------------------------------------------------
# candidates: sampled or given, executed


def rollout(
    model, tokenizer, problems, n, numbers, mode="strict", style="plain",
    enable_thinking=None, seed=0, policy="", **sampling,
):  # fmt: skip
    """`n` answers to each problem, with their programs -> list of groups (lists) of Rollout.
    `numbers` are the keys of the prompts' random numbers, `sampling` goes to `generate`:
    max_new_tokens, temperature, top_p, top_k, max_rows, progress."""
    texts = [policy_prompt(problem, style) for problem in problems]
    prompts = [prompt_ids(tokenizer, text, enable_thinking) for text in texts]
    sampling |= {"stop_ids": tokenizer.stop_ids, "seed": seed, "prompt_keys": numbers}
    groups = []
    for i, answers in enumerate(generate(model, prompts, n=n, **sampling)):
        groups.append([])
        for answer in answers:
            # The stop token is part of what is trained, not of what is read.
            text = tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)
            facts = (answer.ids, answer.logps, answer.support, answer.finished, text)
            r = Rollout(problems[i], numbers[i], prompts[i], *facts, policy=policy)
            r.code, r.reason = extract_code(text, mode)
            groups[-1].append(r)
    return groups


def execute(sandbox, rollouts, stop_early=True, repeat=1):
    """Runs the programs of problems that have tests and fills in `verdict` and `pass_rate`; equal
    programs of a problem run once. With repeat=2 a passing program runs again, and one that then
    fails is "flaky". Returns the Result of each rollout, None where nothing ran."""
    tested = [r for r in rollouts if r.problem.tests]
    jobs = {(r.problem.id, r.code): (r.code, r.problem.tests) for r in tested if r.code is not None}
    results = dict(zip(jobs, sandbox.map(jobs.values(), stop_early=stop_early)))
    verdicts = {
        key: next((verdict for verdict in result.verdicts if verdict != "pass"), "pass")
        for key, result in results.items()
    }
    # A test that cannot be judged masks every answer to its problem: or only wrong ones, which end
    # before it, would count.
    masked = {key[0] for key, result in results.items() if "unsupported" in result.verdicts}
    verdicts |= {key: "unsupported" for key in verdicts if key[0] in masked}
    for _ in range(repeat - 1):
        passed = [key for key, verdict in verdicts.items() if verdict == "pass"]
        again = sandbox.map([jobs[key] for key in passed])
        verdicts |= {key: "flaky" for key, result in zip(passed, again) if not result.passed}
    for r in tested:
        key = (r.problem.id, r.code)
        r.verdict = verdicts.get(key, "invalid")
        r.pass_rate = results[key].pass_rate if key in results else 0.0
    return [results.get((r.problem.id, r.code)) for r in rollouts]


def verify_together(problems, sandbox, rank, world, log):
    """problems.verified, of which every rank does a share: the same list on all, whatever the
    clocks of their sandboxes say."""
    kept = verified(problems[rank::world], sandbox, log)
    ids = set(gather_lists([problem.id for problem in kept]))
    return [problem for problem in problems if problem.id in ids]


def given_programs(problems, args, rank):
    """{problem id: [Rollout]} without a model: the problems' own solutions (--candidates mutants),
    or a file whose rows have `problem` and `completion` or `code`, such as any samples.jsonl."""
    if args.candidates == "mutants":
        rows = (({"problem": p.id, "code": p.solution}, "") for p in problems if p.solution)
    else:
        rows = read_rows(args.candidates, "--candidates")
    numbered, found = {p.id: (p, number) for number, p in enumerate(problems)}, defaultdict(list)
    others = 0  # programs of problems that are not there
    for row, where in rows:
        problem = need(row, where, "problem")
        others += problem not in numbered
        if problem in numbered and not row.get("parent"):  # mutants are made again
            text = need(row, where, "completion" if row.get("code") is None else "code")
            code, reason = program_in(text)
            found[problem].append(Rollout(*numbered[problem], text=text, code=code, reason=reason))
    if not found:
        raise UserError(
            f"--candidates {args.candidates}: no program for any of {len(problems)} problems; "
            "expected mutants (the problems need solutions) or a file with the ids of --problems"
        )
    if others and rank == 0:
        print(f"--candidates {args.candidates}: {others} programs of problems that are not there")
    return found


def collect(problems, args, sandbox, done=(), device="cpu", rank=0, world=1):
    """Yields lists of executed Rollouts (those of Rollout.from_row), with mutants of the passing
    ones, a chunk of problems at a time; the same on all ranks, each of which does its share. What
    is in `done`, a set of (policy, problem id), is skipped. All `problems` have tests."""
    for policy in args.policy if args.candidates == "policy" else [""]:
        if policy:
            model = load_model(policy, "lm", compute_dtype(device), device)
            tokenizer = Tokenizer(policy)
        else:
            given = given_programs(problems, args, rank)
        todo = [number for number, p in enumerate(problems) if (policy, p.id) not in done]
        for at in range(0, len(todo), CHUNK * world):
            numbers = todo[at : at + CHUNK * world][rank::world]
            asked = [problems[number] for number in numbers]
            if policy:
                groups = rollout(
                    model, tokenizer, asked, args.group, numbers, style=args.prompt_style,
                    enable_thinking=args.enable_thinking, seed=args.seed, policy=policy,
                    temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                )  # fmt: skip
            else:
                groups = [given[p.id] for p in asked]
            found = list(itertools.chain(*groups))
            execute(sandbox, found, stop_early=False, repeat=2)
            right = {(r.number, normalised(r.code)): r for r in found if r.verdict == "pass"}
            changed = []
            for r in right.values():  # parent and mutants in one layout, or it would tell
                facts = {"reason": "ok", "policy": policy, "parent": laid_out(r.code)}
                for code in mutants(r.code, args.mutants, args.seed):
                    changed.append(Rollout(r.problem, r.number, code=code, **facts))
            execute(sandbox, changed, stop_early=False)
            # In the order of the problems on any number of ranks: it decides which pairs are drawn.
            rows = gather_lists([r.row() for r in found + changed])
            yield [Rollout.from_row(row) for row in sorted(rows, key=lambda row: row["number"])]


# --------------------------------------------------------------------------------------------------
# the pair rule


def in_turn(failing, rng):
    """Failing programs in random order, near misses (half of the tests pass or more) and others in
    turn, so that a cap takes as many of both."""
    rng.shuffle(failing)
    near, far = ([r for r in failing if (r.pass_rate >= 0.5) == side] for side in (True, False))
    return [r for both in itertools.zip_longest(near, far) for r in both if r]


def make_pairs(rollouts, rules, seed=0):
    """Rollouts -> (pairs, funnel): all-pass over any-fail within a problem, and passing programs
    over their mutants. `rules` has min_tests, max_pairs and mutants. `funnel` is a list of (what,
    how many are left, the rule with its value and how many it removed)."""
    # Mutants last: of a mutant and an equal sampled program the mutant is the duplicate that goes.
    programs = sorted(rollouts, key=lambda r: r.parent is not None)
    funnel = [
        ("problems", len({r.problem.id for r in programs}), "with tests"),
        ("programs", len(programs), "sampled or given, and mutants of those that pass"),
    ]
    first, least = {}, rules.min_tests

    def is_new(r):
        return first.setdefault((r.problem.id, normalised(r.code)), r) is r

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
    groups, counts, rng = defaultdict(list), [], random.Random(f"pairs-{seed}")
    for r in programs:
        groups[r.problem.id].append(r)
    couples, slips = [], []  # (chosen code, rejected Rollout), which is a mutant in slips
    for group in groups.values():
        good = [r.code for r in group if r.verdict == "pass"]
        bad = in_turn([r for r in group if r.verdict != "pass" and not r.parent], rng)
        changed = in_turn([r for r in group if r.parent], rng)
        rng.shuffle(good)
        # Every couple once, each program as often as the others: (0, 0), (1, 1), ...; after a round
        # of all of them shifted by one: (0, 1), (1, 2), ...
        counts.append(len(good) * len(bad))
        for i in range(min(counts[-1], rules.max_pairs)):
            shift = i // math.lcm(len(good), len(bad))
            couples.append((good[i % len(good)], bad[(i + shift) % len(bad)]))
        slips += [(r.parent, r) for r in changed[: rules.mutants]]
    both, limit = len(counts) - counts.count(0), f"at most {rules.max_pairs} a problem"
    funnel += [
        ("with both", both, "problems with a passing and a failing program"),
        ("pairs", len(couples), f"{limit} (--max-pairs) of {sum(counts)} couples"),
        ("mutant pairs", len(slips), f"at most {rules.mutants} a problem (--mutants)"),
    ]
    pairs = []
    for chosen, r in couples + slips:
        source = r.problem.source + (MUTANT if r.parent else "")
        facts = (f"{r.problem.id}#{len(pairs)}", source, 1.0 - r.pass_rate, r.num_tests)
        pairs.append(Pair(r.problem.prompt, chosen, r.code, *facts))
    return pairs, funnel


def print_funnel(funnel):
    """(what, count, rule) rows as a table."""
    for what, count, rule in funnel:
        print(f"  {what:<14}{count:>8}   {rule}")
