"""The toy world: thousands of made-up problems that a model of 1M parameters can learn.

    python problems.py toy:train --show 3      # statement, reference solution, first tests

A list of integers goes through one to three steps and is then returned or reduced to a number.
`rows(name)` yields them as rows of problems.py's own schema; `stream` is what tiny/make.py
pretrains on. No composition of operations is in two splits. The unseen part of `test` has pairs of
operations and phrasings that occur nowhere else.
"""

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import cache

from common import UserError


@dataclass(frozen=True)
class Op:
    """`code`: a Python expression in xs, or for a reduction its value. `constants`: what {k} is
    drawn from. The last of `phrasings` is held out: only the unseen part of `test` has it."""

    name: str
    code: str
    phrasings: tuple
    constants: tuple = (0,)


STEPS = [
    Op("keep_gt", "[x for x in xs if x > {k}]",
       ("keep the numbers greater than {k}", "keep only what is above {k}",
        "remove the numbers that are not greater than {k}"), range(0, 7)),
    Op("keep_ge", "[x for x in xs if x >= {k}]",
       ("keep the numbers that are at least {k}", "keep only what is {k} or more",
        "remove the numbers that are not at least {k}"), range(0, 7)),
    Op("keep_lt", "[x for x in xs if x < {k}]",
       ("keep the numbers less than {k}", "keep only what is below {k}",
        "remove the numbers that are not less than {k}"), range(0, 7)),
    Op("keep_le", "[x for x in xs if x <= {k}]",
       ("keep the numbers that are at most {k}", "keep only what is {k} or less",
        "remove the numbers that are not at most {k}"), range(0, 7)),
    Op("keep_even", "[x for x in xs if x % 2 == 0]",
       ("keep the even numbers", "drop the odd numbers", "keep only the numbers that are even")),
    Op("keep_odd", "[x for x in xs if x % 2 == 1]",
       ("keep the odd numbers", "drop the even numbers", "keep only the numbers that are odd")),
    Op("keep_multiple", "[x for x in xs if x % {k} == 0]",
       ("keep the multiples of {k}", "keep the numbers divisible by {k}",
        "keep only the numbers that are multiples of {k}"), range(3, 6)),
    Op("drop_multiple", "[x for x in xs if x % {k} != 0]",
       ("drop the multiples of {k}", "drop the numbers divisible by {k}",
        "remove the numbers that are multiples of {k}"), range(3, 6)),
    Op("add", "[x + {k} for x in xs]",
       ("add {k} to each number", "increase each number by {k}",
        "make each number {k} more"), range(1, 8)),
    Op("subtract", "[x - {k} for x in xs]",
       ("subtract {k} from each number", "decrease each number by {k}",
        "make each number {k} less"), range(1, 8)),
    Op("multiply", "[x * {k} for x in xs]",
       ("multiply each number by {k}", "replace each number by {k} times itself",
        "make each number {k} times as large"), range(2, 6)),
    Op("quotient", "[x // {k} for x in xs]",
       ("divide each number by {k}, rounding down", "replace each number by its quotient by {k}",
        "floor divide each number by {k}"), range(2, 6)),
    Op("remainder", "[x % {k} for x in xs]",
       ("take each number modulo {k}", "replace each number by its remainder by {k}",
        "reduce each number modulo {k}"), range(2, 6)),
    Op("square", "[x ** 2 for x in xs]",
       ("square each number", "replace each number by its square",
        "multiply each number by itself")),
    Op("negate", "[-x for x in xs]",
       ("negate each number", "flip the sign of each number",
        "replace each number by its negative")),
    Op("absolute", "[abs(x) for x in xs]",
       ("take the absolute value of each number", "drop the sign of each number",
        "replace each number by its absolute value")),
    Op("cap", "[min(x, {k}) for x in xs]",
       ("cap each number at {k}", "limit each number to at most {k}",
        "lower the numbers above {k} to {k}"), range(0, 7)),
    Op("floor", "[max(x, {k}) for x in xs]",
       ("raise each number to at least {k}", "replace the numbers below {k} by {k}",
        "make each number at least {k}"), range(0, 7)),
    Op("first", "xs[:{k}]",
       ("take the first {k}", "keep the first {k} items", "keep only the first {k}"), range(2, 6)),
    Op("last", "xs[-{k}:]",
       ("take the last {k}", "keep the last {k} items", "keep only the last {k}"), range(2, 6)),
    Op("skip_first", "xs[{k}:]",
       ("skip the first {k}", "drop the first {k} items", "remove the first {k}"), range(1, 4)),
    Op("skip_last", "xs[:-{k}]",
       ("skip the last {k}", "drop the last {k} items", "remove the last {k}"), range(1, 4)),
    Op("every_second", "xs[::2]",
       ("keep every second item, starting with the first", "take the items at even positions",
        "keep the items at positions 0, 2, 4 and so on")),
    Op("ascending", "sorted(xs)",
       ("sort in ascending order", "sort from smallest to largest", "sort in increasing order")),
    Op("descending", "sorted(xs, reverse=True)",
       ("sort in descending order", "sort from largest to smallest", "sort in decreasing order")),
    Op("reverse", "xs[::-1]",
       ("reverse the list", "put the items in reverse order", "turn the list around")),
    Op("dedupe", "list(dict.fromkeys(xs))",
       ("drop repeated numbers, keeping the first of each", "remove duplicates, keeping the order",
        "keep the first of each number")),
    Op("running_sum", "[sum(xs[:i + 1]) for i in range(len(xs))]",
       ("take the running sums", "replace each item by the sum up to it",
        "replace the list by its running totals")),
    Op("running_max", "[max(xs[:i + 1]) for i in range(len(xs))]",
       ("take the running maximum", "replace each item by the maximum up to it",
        "replace the list by its running maxima")),
    Op("differences", "[b - a for a, b in zip(xs, xs[1:])]",
       ("take the differences of neighbours, next minus previous",
        "replace the list by how much each item grows to the next",
        "take the step from each item to the next")),
    Op("pair_sums", "[a + b for a, b in zip(xs, xs[1:])]",
       ("take the sums of neighbours", "add each item to the next",
        "replace the list by the sums of neighbours")),
]  # fmt: skip
REDUCTIONS = [
    Op("list", "xs",
       ("the list", "the resulting list", "what is left")),
    Op("sum", "sum(xs)",
       ("the sum", "the sum of the numbers", "the total of the numbers")),
    Op("count", "len(xs)",
       ("the length", "the number of items", "the count of items")),
    Op("distinct", "len(set(xs))",
       ("the number of distinct items", "how many different numbers there are",
        "the count of distinct numbers")),
    Op("max", "max(xs, default=0)",
       ("the maximum, or 0 if empty", "the largest number, or 0 if there is none",
        "the largest, or 0 if empty")),
    Op("min", "min(xs, default=0)",
       ("the minimum, or 0 if empty", "the smallest number, or 0 if there is none",
        "the smallest, or 0 if empty")),
    Op("first_item", "xs[0] if xs else 0",
       ("the first item, or 0 if empty", "the first number, or 0 if there is none",
        "what comes first, or 0 if empty")),
    Op("last_item", "xs[-1] if xs else 0",
       ("the last item, or 0 if empty", "the last number, or 0 if there is none",
        "what comes last, or 0 if empty")),
    Op("spread", "max(xs) - min(xs) if xs else 0",
       ("the maximum minus the minimum, or 0 if empty",
        "the largest minus the smallest, or 0 if there is none",
        "the spread from smallest to largest, or 0 if empty")),
]  # fmt: skip
FRAMES = [  # how the clauses become a statement
    lambda steps, result: (
        f"Write solve(xs) for a list of integers: {'; '.join(steps)}; return {result}."
    ),
    lambda steps, result: (
        f"Given a list of integers, {', then '.join(steps)}. solve(xs) returns {result}."
    ),
]
# Compositions are dealt to the splits by a hash of their operations' names, modulo 10. "pretrain"
# is what tiny/make.py writes its corpora from; `rows` does not offer it.
SPLITS = {"pretrain": range(0, 4), "train": range(4, 6), "untested": range(6, 9), "test": [9]}
# name -> its parts: (source, split, whether unseen, whether tests are given, problems)
PARTS = {
    "train": [("toy:train", "train", False, True, 1200)],
    "untested": [("toy:untested", "untested", False, False, 4000)],
    "untested+tests": [("toy:untested", "untested", False, True, 4000)],  # for audits of it
    "test": [("toy:test", "test", False, True, 192), ("toy:unseen", "test", True, True, 64)],
}
NUM_TESTS = 12


@dataclass(frozen=True)
class Composition:
    """Steps, their constants, and a reduction. `names` identifies it: another constant makes no
    other composition."""

    steps: tuple
    reduction: Op
    constants: tuple

    @property
    def names(self):
        return ",".join(op.name for op in self.steps) + ">" + self.reduction.name

    def expressions(self):
        """-> (expressions of the steps, expression of the result)."""
        pairs = zip(self.steps, self.constants)
        return [op.code.format(k=k) for op, k in pairs], self.reduction.code

    def program(self):
        """The reference solution."""
        steps, result = self.expressions()
        lines = [f"    xs = {step}\n" for step in steps]
        return "def solve(xs):\n" + "".join(lines) + f"    return {result}\n"


def is_held_out(first, second):
    """Whether `first` directly before `second` occurs in the unseen part only (one pair in 8)."""
    return zlib.crc32(f"{first.name}>{second.name}".encode()) % 8 == 0


@cache
def compiled(expression):
    return eval(f"lambda xs: {expression}")  # from the tables above, never a model's text


def run_steps(steps, result, xs):
    """The value of expression `result` after the expressions `steps`."""
    for expression in steps:
        xs = compiled(expression)(xs)
    return compiled(result)(xs)


def make_inputs(rng):
    """NUM_TESTS lists: empty, one item, duplicates, negatives, a long one, random short ones."""

    def draw(length, low=-9, high=12):
        return [rng.randint(low, high) for _ in range(length)]

    fixed = [[], draw(1), draw(3, 1, 4) * 2, draw(6, -9, -1), draw(30)]
    return fixed + [draw(rng.randint(4, 10)) for _ in range(NUM_TESTS - len(fixed))]


def draw_composition(rng, split, unseen=False):
    """A random composition of the split, with a held-out pair of steps or without."""
    while True:
        steps = tuple(rng.choices(STEPS, k=rng.choices((1, 2, 3), (2, 4, 4))[0]))
        reduction = rng.choice(REDUCTIONS[:1] * 3 + REDUCTIONS[1:])
        constants = tuple(rng.choice(op.constants) for op in steps)
        composition = Composition(steps, reduction, constants)
        has_held_out = any(is_held_out(*pair) for pair in itertools.pairwise(steps))
        in_split = zlib.crc32(composition.names.encode()) % 10 in SPLITS[split]
        if in_split and has_held_out == unseen and len(set(steps)) == len(steps):
            return composition


def make_cases(composition, rng):
    """Tests on which every step counts: without it two answers or more change. None if that or a
    variety of answers cannot be had with the inputs drawn."""
    steps, result = composition.expressions()
    inputs = make_inputs(rng)
    expected = [run_steps(steps, result, xs) for xs in inputs]
    for i in range(len(steps)):
        without = steps[:i] + steps[i + 1 :]
        if sum(run_steps(without, result, xs) != y for xs, y in zip(inputs, expected)) < 2:
            return None
    if len(set(map(repr, expected))) < 4:  # a constant would pass too often
        return None
    return [{"args": [xs], "expected": y} for xs, y in zip(inputs, expected)]


def describe(composition, rng, unseen=False):
    """The statement in seen phrasings; in the unseen part one clause has its held-out phrasing."""
    ops, constants = [*composition.steps, composition.reduction], [*composition.constants, 0]
    new = rng.randrange(len(ops)) if unseen else None
    clauses = []
    for i, (op, k) in enumerate(zip(ops, constants)):
        phrasing = op.phrasings[-1] if i == new else rng.choice(op.phrasings[:-1])
        clauses.append(phrasing.format(k=k))
    return rng.choice(FRAMES)(clauses[:-1], clauses[-1])


def stream(split, seed=0, unseen=False):
    """Endless (Composition, statement, cases) of a split, the same for the same seed."""
    rng = random.Random(f"{split}{'-unseen' if unseen else ''}-{seed}")
    while True:
        composition = draw_composition(rng, split, unseen)
        if cases := make_cases(composition, rng):
            yield composition, describe(composition, rng, unseen), cases


def rows(name, limit=None, flag=""):
    """Rows of problems.py's own schema, with their places: [(dict, "toy:NAME row N")]. Names:
    train, untested (without tests and solutions), untested+tests, test. A limit keeps the parts of
    `test` in proportion. Raises UserError for another name."""
    if name not in PARTS:
        raise UserError(f"{flag} toy:{name}: expected toy:{', toy:'.join(PARTS)}".strip())
    found = []
    for source, split, unseen, tested, size in PARTS[name]:
        part = {}  # statement -> row: no statement twice
        for composition, statement, cases in stream(split, unseen=unseen):
            row = {"id": f"{source}/{len(part)}", "prompt": statement, "source": source}
            if tested:
                row["tests"] = {"kind": "call", "cases": cases, "entry_point": "solve"}
                row["solution"] = composition.program()
            part.setdefault(statement, row)
            if len(part) == size:
                break
        found += part.values()
    count = len(found) if limit is None else min(limit, len(found))
    chosen = [i * len(found) // count for i in range(count)]
    return [(found[i], f"toy:{name} row {i + 1}") for i in chosen]
