"""Test code beside the program, and plain data as text.

The tester is a process of its own in which trusted test code runs; there the program's function is
a stand-in, which asks the program's process with plain data and gets plain data. What test code
needs more than that for is `unsupported`. `encode` and `decode` are how values cross: `sandbox.py`
compares what `encode` gives, and `confined.py` runs both sides.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque

__builtins__ = dict(vars(builtins))  # ours, whatever a program puts into the module

# --------------------------------------------------------------------------------------------------
# the tester: trusted test code in its own confined process, where the program's function is a
# stand-in. No text of an answer is ever executed here: `eval` only computes.

# Modules that compute with plain data, or whose classes are carried as such.
MODULES = set(
    "__future__ abc asyncio bisect cmath collections copy decimal fractions functools "
    "hashlib heapq itertools json math numbers numpy operator pytest random re statistics string "
    "sys textwrap time typing".split()
)
CARRIED_MODULES = set("collections decimal fractions pytest random".split())
CARRIED = (int, float, complex, str, bytes, bytearray, list, dict, tuple, set, frozenset, range)
CARRIED += (deque, Counter, OrderedDict, defaultdict, Exception, types.GeneratorType)
# What reaches for more than values: streams, files, the interpreter, a state that test and program
# would have to share, exceptions that end a process.
BANNED = set(
    "exec compile open input __import__ globals locals vars breakpoint exit quit id SystemExit "
    "KeyboardInterrupt GeneratorExit StopAsyncIteration".split()
)
BANNED_ATTRIBUTES = set("stdin stdout stderr argv modules seed exit".split())


@functools.lru_cache(maxsize=1 << 16)
def as_call(text, entry):
    """`assert f(1, 2) == 3` -> (question, [the right answer], exact comparison); None where the
    line says anything but that a call gives a literal.

    The call is evaluated in the program's process, so it may hold what only exists there. It must
    be a call of the entry point, of which nothing else of the program decides the arguments:
    without an entry point no other function is called in them.
    """
    try:
        (node,) = ast.parse(text.strip()).body
        (right,), (op,) = node.test.comparators, node.test.ops
        call, right = (
            (right, node.test.left) if isinstance(right, ast.Call) else (node.test.left, right)
        )
        name, expected = call.func.id, ast.literal_eval(right)
        answers = [encode(expected, compare=True).encode()]
        is_literal = isinstance(op, ast.Is) and any(expected is v for v in (None, True, False))
        if not isinstance(node, ast.Assert) or not (is_literal or isinstance(op, ast.Eq)):
            return None
        for part in ast.walk(call):
            if isinstance(part, ast.Name) and part.id in BANNED:
                return None
            if isinstance(part, ast.Call) and part is not call and not entry:
                inner = getattr(part.func, "id", "")
                if hasattr(builtins, name) or not (hasattr(builtins, inner) or inner[:1].isupper()):
                    return None
        question = (name, ast.unparse(call))
        return (
            (question, answers, "is" if is_literal else "==")
            if name in (entry, entry or name)
            else None
        )
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        return None


class Verdict(BaseException):
    """The case is decided, whatever the test code catches: `last` holds the word and the detail."""

    last = None

    def __init__(self, word, detail=""):
        Verdict.last = Verdict.last or (word, detail)


def unsupported(why):
    return Verdict("unsupported", f"the test {why}")


class TestCode:
    """What a test's text, its setup's included, says of itself: the names it binds and uses, and
    whether it needs more than plain data; then it raises an unsupported Verdict."""

    def __init__(self, source, setup, entry):
        try:
            trees = [ast.parse(setup), ast.parse(source)]
            self.code = compile(trees[1], "tests.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise unsupported(f"does not compile: {error}") from None
        self.nodes = [node for tree in trees for node in ast.walk(tree)]
        self.bound, self.used, self.called, self.asked = {"__name__"}, set(), set(), set()
        self.modules, self.results, self.constants, self.attributes = {}, {}, set(), set()
        self.entry = set(entry.split(".")) if entry else set()
        for node in self.nodes:
            self.note(node)
        banned = (self.used - self.bound) & BANNED | (self.asked - self.bound) & BANNED_ATTRIBUTES
        banned |= {name for name in self.used if self.modules.get(name, "re") not in MODULES}
        if banned:
            raise unsupported(f"uses {', '.join(sorted(banned))}: not plain data alone")

    def note(self, node):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                self.used.add(name)
            case ast.Attribute(attr=name, ctx=ast.Load()):
                self.asked.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                self.bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self.bound.add(name)
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=name) | ast.MatchAs(name=name):
                self.bound.add(name)
            case ast.Import(names=names):
                for alias in names:
                    self.take(alias.name, [(alias.asname or alias.name).split(".")[0]])
            case ast.ImportFrom(module=module, names=names):
                self.asked.update(alias.name for alias in names)
                self.take(module or "", [alias.asname or alias.name for alias in names])
            case ast.Constant(value=value):
                self.constants.add(value)
            case ast.Call(func=ast.Name(id=name)):
                self.called.add(name)
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=function))
            ):
                self.results[name] = function

    def take(self, module, names):
        """A module that the test imports, and the names that it gets from it."""
        root = module.split(".")[0]
        try:
            found = importlib.import_module(module)
        except Exception as error:
            raise unsupported(f"imports {module}: {error}") from None
        if "*" in names:
            public = [name for name in vars(found) if name[0] != "_"]
            names = getattr(found, "__all__", public)
        self.modules.update(dict.fromkeys(names, root))
        if root in CARRIED_MODULES:
            for value in list(vars(found).values()):
                self.attributes.update(dir(value) if isinstance(value, type) else ())

    def define(self, space):
        """Find the entry point, if none is known: the only function that is called and that nothing
        but the program can define. No other such name may be used."""
        missing = self.used - self.bound - set(self.modules) - set(space) - set(dir(builtins))
        for name in missing & sys.stdlib_module_names - self.entry:  # never the program's `math`
            self.take(name, [name])
            space[name] = importlib.import_module(name)
        missing -= set(self.modules) | self.entry
        if not self.entry and len(missing) == 1 and missing <= self.called:
            self.entry, missing = missing, set()
        if missing:
            raise unsupported(f"uses {', '.join(sorted(missing))}, which only the program defines")
        if not self.entry:
            raise unsupported("calls no function of the program")
        (name, *more) = self.entry
        if not more and name[0].isupper() and "_" not in name and name not in self.bound:
            raise unsupported(f"needs the program's class {name}")

    def check_values(self):
        """The test may ask of a value only what plain data, or a class of its own, can say."""
        for kind in CARRIED:
            self.attributes.update(dir(kind))
        known = {name for name in self.attributes if name[:2] != "__"}
        known |= self.bound | self.entry | {"__init__"}
        for text in self.constants:  # the fields of a namedtuple are texts
            known.update(re.findall(r"\w+", text) if isinstance(text, str) else ())
        for node in self.nodes:
            match node:
                case ast.Attribute(value=value, attr=name) if name not in known:
                    while isinstance(value, ast.Attribute):
                        value = value.value
                    if getattr(value, "id", "") not in self.modules:
                        raise unsupported(f"asks for .{name}, which no plain data has")
                case ast.Call(func=ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) as func):
                    maker = name if isinstance(func, ast.Call) else self.results.get(name)
                    if maker in self.entry | {"candidate"}:
                        raise unsupported("calls what the program returned")


class Program:
    """The program, behind descriptor 4."""

    def __init__(self, limit):
        self.left, self.limit = bytearray(), limit
        self.ready = read_line(4, self.left, limit) == "ready"

    def call(self, name, args, named):
        """Ask; returns the value, raises what the program raised. Descriptor 3 grows before and
        after, so that the limits count from here."""
        known = []
        try:
            question = (name, args, tuple(named.items()))
            question = encode(question, known, grow=True, flatten=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise unsupported(f"passes what is no plain data: {error}") from None
        answer = None
        os.write(3, b"\n")
        with contextlib.suppress(OSError):
            write_line(4, question)
            answer = read_line(4, self.left, self.limit)
        os.write(3, b"\n")
        if answer is None:
            raise Verdict("output_limit" if len(self.left) > self.limit else "dead")
        if answer.startswith("!"):
            raise error_of(*answer[1:].split("\t", 1))
        if answer.startswith("?"):
            raise Verdict("wrong_answer", f"the program returned no plain data: {answer[1:]}")
        try:
            return decode(answer, known)[0]
        except Exception as error:
            raise Verdict("wrong_answer", f"not a value: {error}") from None


def error_of(kind, args="("):
    """An exception of the program: of a class that a test may expect, never one that a loop or a
    builtin takes as its end."""
    found = getattr(builtins, kind, None)
    fits = isinstance(found, type) and issubclass(found, Exception)
    quiet = fits and issubclass(found, StopIteration | StopAsyncIteration)
    try:
        error = (found if fits and not quiet else RuntimeError)(*decode(args))
    except Exception:  # UnicodeDecodeError and its like want other arguments
        error = RuntimeError(kind)
    error.from_program = kind
    return error


def compute(text):
    """`eval` in test code: its text may come from an answer, so only literals and arithmetic."""
    tree = ast.parse(text.strip(), mode="eval")
    kinds = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp)
    kinds += (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.operator, ast.unaryop, ast.boolop)
    for node in ast.walk(tree):
        if not isinstance(node, (*kinds, ast.cmpop, ast.expr_context)):
            raise ValueError(f"eval() of more than arithmetic: {type(node).__name__}")
    return eval(compile(tree, "eval", "eval"), {"__builtins__": {}})


def run_case(case, job, program):
    """One case -> (word, message). An AssertionError of the test is a wrong answer; an exception
    that the program raised and the test did not expect is a runtime error."""
    Verdict.last = None
    word, message = "pass", ""
    try:
        run_test_code(case, job, program)
    except BaseException as error:
        kind = getattr(error, "from_program", None)
        words = {"MemoryError": "memory", "PermissionError": "sandbox_violation"}
        word = words.get(kind, "runtime_error") if kind else "wrong_answer"
        message = f"{type(error).__name__}: {error}"
    word, message = Verdict.last or (word, message)
    return word, message[:500].encode("ascii", "replace").decode()


def run_test_code(case, job, program):
    """The test code sees its own names, its setup's, builtins, and the stand-in."""
    is_check, setup, entry = "check" in case, job["setup"], job["entry"]
    test = TestCode(case["check" if is_check else "assert"], setup, entry)

    def evaluate(text, *spaces):
        return eval(text, *(spaces or (space,))) if text in test.constants else compute(text)

    space = {"__name__": "tests", "__builtins__": vars(builtins) | {"eval": evaluate}}
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), space)
    except Exception as error:
        raise unsupported(f"needs more than its setup: {error!r}") from None
    test.define(space)
    test.check_values()
    name = entry or min(test.entry)

    def candidate(*args, **named):
        return program.call(name, args, named)

    *classes, last = name.split(".")
    if classes:
        space[classes[0]] = lambda: types.SimpleNamespace(**{last: candidate})
    if not (is_check and hasattr(builtins, last)):  # where `candidate` is given, sorted is sorted
        space[last] = candidate
    exec(test.code, space)
    if is_check and not callable(space.get("check")):
        raise unsupported("defines no check(candidate)")
    if is_check:
        space["check"](candidate)


def run_tests(job, module):
    """Write "ready" and then [word, message] for each case, a line each -> the exit code."""
    program = Program(job["limit"])
    if program.ready:
        write_line(3, json.dumps("ready"))
        for case in job["cases"]:
            word, message = run_case(case, job, program)
            write_line(3, json.dumps([word, message]))
            if word in ("dead", "output_limit") or (word != "pass" and job["stop_early"]):
                break
    return 0


def write_line(fd, text):
    data = text.encode("ascii", "replace") + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def read_line(fd, left, limit):
    """A line from a socket; None at its end, or if it is too long. `left` holds what came after."""
    while (end := left.find(b"\n")) < 0:
        part = os.read(fd, 1 << 16)
        if not part or len(left) > limit:
            return None
        left += part
    line = left[:end].decode("ascii", "replace")
    del left[: end + 1]
    return line


# --------------------------------------------------------------------------------------------------
# values as text: plain data only, by exact type. Tokens are separated by tabs; what holds others
# opens with a token of its own and ends with "]".


class Token(str):
    """Text that stands for itself in what is encoded."""


CLOSE = Token("]")
MUTABLE = {"[": list, "<": set, "{": dict, "{Counter": Counter, "{OrderedDict": OrderedDict}
MUTABLE |= {"[deque": deque, "{defaultdict": defaultdict}
OPENING = {kind: token for token, kind in MUTABLE.items()} | {tuple: "(", frozenset: "<<"}
BASES = {int: int.__int__, float: float.__float__, str: str.__str__, dict: dict.items}
BASES |= {kind: kind.__iter__ for kind in (list, tuple, set, frozenset)}


def builder(module, name):
    """A function of a module that is imported when it is first needed."""
    return lambda *parts: getattr(importlib.import_module(module), name)(*parts)


def plain_type(name):
    kind = type(None) if name == "NoneType" else vars(builtins)[name]
    if not isinstance(kind, type):
        raise ValueError(f"{name} is no type")
    return kind


def type_parts(kind):
    return [kind.__name__] if plain_type(kind.__name__) is kind else []


async def awaited(value):
    return value


run_coroutine = builder("asyncio", "run")
# class -> (value -> parts, parts -> value); of an iterator all is taken at once
RICH = {
    "builtins.bytes": (lambda value: [value.hex()], bytes.fromhex),
    "builtins.bytearray": (lambda value: [value.hex()], bytearray.fromhex),
    "builtins.complex": (lambda value: [value.real, value.imag], complex),
    "builtins.type": (type_parts, plain_type),
    "builtins.range": (lambda value: [value.start, value.stop, value.step], range),
    "builtins.dict_keys": (list, lambda *parts: dict.fromkeys(parts).keys()),
    "builtins.dict_values": (list, lambda *parts: dict(enumerate(parts)).values()),
    "builtins.dict_items": (list, lambda *parts: dict(parts).items()),
    "builtins.coroutine": (lambda value: [run_coroutine(value)], awaited),
    "iterator": (lambda value: list(itertools.islice(value, 1 << 20)), lambda *parts: iter(parts)),
    "fractions.Fraction": (lambda value: [str(value)], builder("fractions", "Fraction")),
    "decimal.Decimal": (lambda value: [str(value)], builder("decimal", "Decimal")),
}


def scalar(value, kind):
    """The token of a value that holds no others, None if it does."""
    if kind is str:
        return json.encoder.encode_basestring_ascii(value)
    if kind is int:
        return int.__repr__(value) if -(1 << 63) <= value < 1 << 63 else hex(value)
    if kind is float:
        return float.__repr__(value)
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    return None


def opened(value, kind, compare, flatten):
    """(opening token, items) of a value that holds others; (None, [other]) if it stands for another
    value; None if it is no plain data."""
    if kind is list or kind is tuple or kind is deque:
        return OPENING[kind], list(value)
    if kind is set or kind is frozenset:
        return ("<", in_order(value)) if compare else (OPENING[kind], list(value))
    if kind in OPENING:
        if compare:
            return "{", keyed(value)
        token = OPENING[kind]
        if kind is defaultdict:
            factory = value.default_factory
            name = getattr(factory, "__name__", "")
            is_plain = isinstance(factory, type) and vars(builtins).get(name) is factory
            token = f"{token} {name}" if is_plain else "{"
        return token, [item for pair in dict.items(value) for item in pair]
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return None, [value.tolist()]
    name = f"{kind.__module__}.{kind.__name__}"
    if compare and name in ("fractions.Fraction", "decimal.Decimal"):
        return None, [int(value) if value == value // 1 else float(value)]
    if compare and name in ("builtins.dict_keys", "builtins.dict_items"):
        return None, [set(value)]
    if hasattr(kind, "__next__") and not compare:
        name = "iterator"
    if name in RICH:
        return "@" + name, RICH[name][0](value)
    for base, read in BASES.items():  # the base's methods: a subclass runs none of its own
        if flatten and base in kind.__mro__:
            return None, [base(read(value))]
    return None


def in_order(items):
    """Elements of a set, encoded, in an order that depends on nothing but their values."""
    return [Token(text) for _, text in sorted(map(sortable, items))]


def keyed(mapping):
    """Keys, encoded and marked, and values of a dict, in such an order."""
    pairs = [(*sortable(key), value) for key, value in dict.items(mapping)]
    pairs.sort(key=lambda pair: pair[:2])
    return [part for _, text, value in pairs for part in (Token("k" + text), value)]


def sortable(value):
    """(what to sort by, encoded) of an element or a key: numbers that are equal sort alike, and a
    key of JSON as the number that it may stand for."""
    if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
        value = int(value)
    text = encode(value, compare=True)
    return {"true": "1", "false": "0"}.get(text, text).strip('"'), text


def encode(value, known=None, grow=False, compare=False, flatten=True, seen=()):
    """A value -> tokens, separated by tabs. TypeError if it is no plain data.

    compare=True gives equal text for values that are equal in Python or in JSON, as far as order
    and class go (see `same_text`); without it `decode` gives the value back.
    `known` numbers lists, sets and dicts that both sides have: "=3" before one of them, "#3" for
    one that was before, or that is `seen`. grow=True numbers those that are met. flatten=False
    refuses instances of the test's own classes.

    >>> encode((1, {2: "x"})).split("\\t")
    ['(', '1', '{', '2', '"x"', ']', ']']
    """
    out, path, inside, pending = [], [], set(), [value]
    numbers, seen = {id(item): i for i, item in enumerate(known or ())}, set(seen)
    while pending:
        item = pending.pop()
        kind = type(item)
        if kind is Token:
            out.append(item)
            if item is CLOSE:
                inside.discard(id(path.pop()))
            continue
        if (text := scalar(item, kind)) is not None:
            out.append(text)
            continue
        if grow and OPENING.get(kind) in MUTABLE and id(item) not in numbers:
            numbers[id(item)] = len(known)
            known.append(item)
        if (number := numbers.get(id(item))) is not None:
            out.append(f"#{number}" if number in seen else f"={number}")
            if number in seen:
                continue
            seen.add(number)
        if id(item) in inside:
            raise TypeError("a value that holds itself")
        if not (found := opened(item, kind, compare, flatten)):
            raise TypeError(f"{kind.__name__} is not plain data")
        head, items = found
        if head is not None:
            out.append(head)
            path.append(item)  # kept alive: another object must not get its id
            inside.add(id(item))
            pending.append(CLOSE)
        pending.extend(reversed(items))
    return "\t".join(out)


def decode(text, known=None):
    """What `encode` made -> the value; an exception if it made no such text. A numbered container
    that `known` holds is filled anew, another joins it."""
    stack, number = [("", [], None)], None
    for token in text.split("\t"):
        head = token[:1]
        if token == CLOSE:
            value = built(*stack.pop())
        elif head == "=":
            number = int(token[1:])
            continue
        elif head and head in "[({<@":
            kind, _, option = token.partition(" ")
            container = MUTABLE[kind]() if kind in MUTABLE else None
            if option:
                container.default_factory = plain_type(option)
            if number is not None and number == len(known):
                known.append(container)
            elif number is not None:
                if type(known[number]) is not type(container):
                    raise ValueError("a container became another")
                container = known[number]
            stack.append((token, [], container))
            number = None
            continue
        elif head == "#":
            value = known[int(token[1:])]
        elif head == '"':
            value = json.loads(token)
        elif head in "ntf" and token != "nan":
            value = {"null": None, "true": True, "false": False}[token]
        elif "x" in token:
            value = int(token, 16)
        else:
            value = float(token) if set(token) & set(".einfa") else int(token)
        stack[-1][1].append(value)
    ((_, (value,), _),) = stack
    return value


def built(token, items, container):
    """The value of an opening token and its items; a container is filled with them."""
    if container is not None:
        container.clear()
        if token[0] == "{":
            dict.update(container, zip(items[::2], items[1::2], strict=True))
        else:
            (container.update if token == "<" else container.extend)(items)
        return container
    if token[0] == "@":
        return RICH[token[1:]][1](*items)
    return {"(": tuple, "<<": frozenset}[token](items)
