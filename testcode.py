"""Test code beside the program, and plain data as text.

What a test may ask of a program is a call with plain data that returns plain data. A line such as
`assert f(1) == 2` is such a call (`as_call`), compared in the caller. Other test code runs in a
process of its own, the tester, where the program's function is a stand-in (`Program`) that asks the
program's process; what needs more is `unsupported` (`TestCode`). `encode` and `decode` are how
values cross between the processes.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import json
import os
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction

__builtins__ = dict(vars(builtins))  # ours, whatever a program puts into the module

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
# The verdicts that exceptions of a program give; all others are runtime errors.
FAILURES = {"MemoryError": "memory", "PermissionError": "sandbox_violation"}

# --------------------------------------------------------------------------------------------------
# a line of test code that is a call


@functools.lru_cache(maxsize=1 << 16)
def as_call(text, entry):
    """`assert f(1, 2) == 3` -> (name, question, [the right answer, encoded], "==" or "is"); None
    where the line says anything but that a call gives a literal.

    Arguments that are no literals are evaluated in the program's process, as they may hold what
    only exists there. Nothing of the program but the entry point decides them: without an entry
    point no other function is called in them.
    """
    try:
        (node,) = ast.parse(text.strip()).body
        call, (right,), (op,) = node.test.left, node.test.comparators, node.test.ops
        if isinstance(right, ast.Call):
            call, right = right, call
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
        if entry and name != entry:
            return None
        question = encode((name, ast.unparse(call), None))
        return name, question, answers, "is" if is_literal else "=="
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------------
# the tester: trusted test code in its own confined process. No text of an answer is ever executed
# here: `eval` only computes.


class Verdict(BaseException):
    """The case is decided, whatever the test code catches: `last` holds the word and the detail."""

    last = None

    def __init__(self, word, detail=""):
        Verdict.last = Verdict.last or (word, detail)


def unsupported(why):
    return Verdict("unsupported", f"the test {why}")


def run_tests(job, module):
    """Write "ready" and then [word, message] for each case, a line each, until the program is gone
    -> the exit code."""
    program = Program(job["limit"])
    if program.ready:
        write_line(3, "ready")
        for case in job["cases"]:
            word, message = run_case(case, job, program)
            if word == "dead":
                break
            write_line(3, json.dumps([word, message]))
            if word == "output_limit":  # the rest of the answer is in the way
                break
    return 0


def run_case(case, job, program):
    """One case -> (word, message). An AssertionError of the test is a wrong answer; an exception
    that the program raised and the test did not expect is a runtime error."""
    Verdict.last, program.calls = None, 0
    try:
        run_test_code(case, job, program)
        word, message = "pass", ""
    except BaseException as error:
        kind = getattr(error, "from_program", None)
        word = FAILURES.get(kind, "runtime_error") if kind else "wrong_answer"
        message = f"{type(error).__name__}: {error}"
    if not program.calls:  # then it would pass any program
        Verdict.last = Verdict.last or ("unsupported", "the test never called the program")
    word, message = Verdict.last or (word, message)
    return word, message[:500].encode("ascii", "replace").decode()


def run_test_code(case, job, program):
    """The test code sees its own names, its setup's, builtins, and the stand-in."""
    is_check, setup, entry = "check" in case, job["setup"], job["entry"]
    test = TestCode(case["check" if is_check else "assert"], setup, entry)

    def evaluate(text, *spaces):
        return eval(text, *(spaces or (space,))) if text in test.evaluated else compute(text)

    space = {"__name__": "tests", "__builtins__": vars(builtins) | {"eval": evaluate}}
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), space)
    except Exception as error:
        raise unsupported(f"needs more than its setup: {error!r}") from None
    test.check_names(space)
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


def compute(text):
    """`eval` in test code. Its text may come from an answer, so only what names nothing is run."""
    code = compile(text.strip(), "eval", "eval", dont_inherit=True)
    if code.co_names or any(isinstance(part, types.CodeType) for part in code.co_consts):
        raise ValueError("eval() of more than arithmetic")
    return eval(code, {"__builtins__": {}})


class Program:
    """The program, behind descriptor 4."""

    def __init__(self, limit):
        self.left, self.limit, self.calls = bytearray(), limit, 0
        self.ready = read_line(4, self.left, limit) == "ready"

    def call(self, name, args, named):
        """Ask; returns the value, raises what the program raised. Descriptor 3 grows before and
        after, so that the limits count from here."""
        known, self.calls = [], self.calls + 1
        try:
            question = encode((name, args, tuple(named.items())), known, flatten=False)
        except NotPlain as error:  # others come from what an argument, a generator, asks
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


def write_line(fd, text):
    data = text.encode("ascii", "replace") + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def read_line(fd, left, limit):
    """A line from a file or socket; None at its end, or if it is too long. `left` holds what came
    after."""
    while (end := left.find(b"\n")) < 0:
        part = os.read(fd, 1 << 16)
        if not part or len(left) > limit:
            return None
        left += part
    line = left[:end].decode("ascii", "replace")
    del left[: end + 1]
    return line


# --------------------------------------------------------------------------------------------------
# what test code needs


class TestCode:
    """A test's text, its setup's included: the names it binds and reads, the modules it imports,
    and whether it needs more than plain data; then an unsupported Verdict is raised."""

    def __init__(self, source, setup, entry):
        try:
            trees = [ast.parse(setup), ast.parse(source)]
            self.code = compile(trees[1], "tests.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise unsupported(f"does not compile: {error}") from None
        self.entry = set(entry.split(".")) if entry else set()
        self.nodes = [node for tree in trees for node in ast.walk(tree)]
        self.constants = {node.value for node in self.nodes if isinstance(node, ast.Constant)}
        self.evaluated = set()  # constants that the test evaluates itself
        self.modules = {}  # imported name -> the module that it comes from
        self.bound, self.read, asked = {"__name__"}, set(), set()
        for node in self.nodes:
            match node:
                case ast.Name(id=name, ctx=ast.Load()):
                    self.read.add(name)
                case ast.Attribute(attr=name, ctx=ast.Load()):
                    asked.add(name)
                case ast.Call(func=ast.Name(id="eval"), args=[ast.Constant(value=text), *_]):
                    self.evaluated.add(text)
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    self.bound.add(name)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    self.bound.add(node.name)
                case ast.ExceptHandler(name=name) | ast.MatchAs(name=name):
                    self.bound.add(name)
                case ast.Import(names=names) | ast.ImportFrom(names=names):
                    asked.update(alias.name for alias in names)
                    self.take(node)
        banned = (self.read - self.bound) & BANNED | (asked - self.bound) & BANNED_ATTRIBUTES
        for name in self.read & set(self.modules):
            if self.modules[name].split(".")[0] not in MODULES:
                banned.add(name)
        if banned:
            raise unsupported(f"uses {', '.join(sorted(banned))}: not plain data alone")

    def take(self, node):
        """Try an import of the test, and note the names that it gives."""
        found = {}
        try:
            exec(compile(ast.Module([node], []), "tests.py", "exec"), found)
        except Exception as error:
            raise unsupported(f"cannot {ast.unparse(node)}: {error}") from None
        modules = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        for name in set(found) - {"__builtins__"}:
            self.modules[name] = getattr(node, "module", None) or modules[name]

    def check_names(self, space):
        """Find the entry point, if none is known: the only function that is called and that nothing
        but the program can define. No other such name may be read."""
        missing = self.read - self.bound - set(self.modules) - set(space) - set(dir(builtins))
        for name in missing & sys.stdlib_module_names - self.entry:  # never the program's `math`
            space[name] = importlib.import_module(name)
            self.modules[name] = name
        missing -= set(self.modules) | self.entry
        called = {getattr(node.func, "id", "") for node in self.nodes if isinstance(node, ast.Call)}
        if not self.entry and len(missing) == 1 and missing <= called:
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
        kinds = list(CARRIED)
        for module in set(self.modules.values()):
            if module.split(".")[0] == "numpy":  # arrays cross as such, see opened()
                kinds.append(sys.modules["numpy"].ndarray)
            if module.split(".")[0] in CARRIED_MODULES:
                kinds += [v for v in vars(sys.modules[module]).values() if isinstance(v, type)]
        known = {name for kind in kinds for name in dir(kind) if name[:2] != "__"}
        known |= self.bound - {"__name__"} | self.entry | {"__init__"}
        for text in self.constants:  # the fields of a namedtuple are texts
            known.update(re.findall(r"\w+", text) if isinstance(text, str) else ())
        functions, results = self.entry | {"candidate"}, set()
        for node in self.nodes:
            match node:
                case ast.Attribute(value=value, attr=name) if name not in known:
                    while isinstance(value, ast.Attribute):
                        value = value.value
                    if getattr(value, "id", "") not in self.modules:
                        raise unsupported(f"asks for .{name}, which no plain data has")
                case ast.Assign(
                    targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=function))
                ) if function in functions:
                    results.add(name)
        for node in self.nodes:
            match node:
                case ast.Call(func=ast.Call(func=ast.Name(id=name))) if name in functions:
                    raise unsupported("calls what the program returned")
                case ast.Call(func=ast.Name(id=name)) if name in results:
                    raise unsupported("calls what the program returned")


# --------------------------------------------------------------------------------------------------
# values as text: plain data only, by exact type. Tokens are separated by tabs; what holds others
# opens with a token of its own and ends with "]".


class NotPlain(TypeError):
    """A value that is no plain data."""


class Token(str):
    """Text that stands for itself in what is encoded."""


MAX_DEPTH = 10_000  # of containers in containers; one that holds itself is deeper
CLOSE = Token("]")
MUTABLE = {"[": list, "<": set, "{": dict, "{Counter": Counter, "{OrderedDict": OrderedDict}
MUTABLE |= {"[deque": deque, "{defaultdict": defaultdict}
OPENING = {kind: token for token, kind in MUTABLE.items()} | {tuple: "(", frozenset: "<<"}
BASES = {int: int.__int__, float: float.__float__, str: str.__str__, dict: dict.items}
BASES |= {kind: kind.__iter__ for kind in (list, tuple, set, frozenset)}
BUILTIN_CLASSES = [kind for kind in vars(builtins).values() if isinstance(kind, type)]
BUILTIN_CLASSES = {kind.__name__: kind for kind in [*BUILTIN_CLASSES, type(None)]}
# Of a defaultdict: what they make is plain data, or an answer could make a test unsupported.
FACTORIES = {k.__name__: k for k in (int, float, bool, str, list, dict, tuple, set, frozenset)}


def builtin_name(kind):
    """The name of a built-in class, "" for anything else."""
    name = getattr(kind, "__name__", "")
    return name if BUILTIN_CLASSES.get(name) is kind else ""


def run_coroutine(value):
    return importlib.import_module("asyncio").run(value)  # costs more than most programs


async def awaited(value):
    return value


def taken(iterator):
    """(token, items): all of an iterator's items, or the first two million bytes of them."""
    items, room = [], 1 << 21
    for item in iterator:
        if room < 0:
            return "@endless", items
        items.append(item)
        room -= sys.getsizeof(item)
    return "@iterator", items


def endless(*parts):
    """The first items of an iterator; who asks for more would have waited too long."""
    yield from parts
    raise Verdict("timeout", "more items were asked for than are taken of an endless iterator")


def array(dtype, items):
    """A numpy array of numbers; ValueError for another dtype, which an answer may claim."""
    if not re.fullmatch("(bool|u?int|float|complex)[0-9]*", dtype):
        raise ValueError(f"an array of {dtype}")
    return importlib.import_module("numpy").array(items, dtype)


# class -> (value -> parts, parts -> value)
RICH = {
    bytes: (lambda value: [value.hex()], bytes.fromhex),
    bytearray: (lambda value: [value.hex()], bytearray.fromhex),
    complex: (lambda value: [value.real, value.imag], complex),
    range: (lambda value: [value.start, value.stop, value.step], range),
    Fraction: (lambda value: [str(value)], Fraction),
    Decimal: (lambda value: [str(value)], Decimal),
    type({}.keys()): (list, lambda *parts: dict.fromkeys(parts).keys()),
    type({}.values()): (list, lambda *parts: dict(enumerate(parts)).values()),
    type({}.items()): (list, lambda *parts: dict(parts).items()),
    type: (lambda value: [builtin_name(value)], BUILTIN_CLASSES.__getitem__),
    types.CoroutineType: (lambda value: [run_coroutine(value)], awaited),
}
BUILD = {f"@{kind.__name__}": build for kind, (_, build) in RICH.items()}
BUILD |= {"@iterator": lambda *parts: iter(parts), "@endless": endless, "@ndarray": array}
BUILD |= {"(": lambda *items: items, "<<": lambda *items: frozenset(items)}


def encode(value, known=None, compare=False, flatten=True):
    """A value -> tokens, separated by tabs. NotPlain if it is no plain data.

    compare=True gives equal text for values that are equal in Python or in JSON, as far as order
    and class go (see `same_text`); without it `decode` gives the value back.
    `known` are the lists, sets and dicts that both sides have, in the order in which they were
    first sent; those met here join it. "=3" stands before one that was sent in another text, "#3"
    for one that is in this text already. flatten=False refuses instances of classes of the test's
    own.

    >>> encode((1, {2: "x"})).split("\\t")
    ['(', '1', '{', '2', '"x"', ']', ']']
    """
    known = [] if known is None else known
    numbers, sent = {id(item): number for number, item in enumerate(known)}, set()
    out, pending, depth = [], [value], 0
    while pending:
        item = pending.pop()
        kind = type(item)
        if kind is Token:
            out.append(item)
            depth -= item is CLOSE
            continue
        if (text := scalar(item, kind)) is not None:
            out.append(text)
            continue
        if OPENING.get(kind) in MUTABLE and not compare:
            number = numbers.setdefault(id(item), len(known))
            if number in sent:
                out.append(f"#{number}")
                continue
            sent.add(number)
            if number < len(known):
                out.append(f"={number}")
            else:
                known.append(item)
        head, items = opened(item, kind, compare, flatten)
        if head is not None:
            out.append(head)
            pending.append(CLOSE)
            depth += 1
        if compare and depth > MAX_DEPTH:  # without it, one that holds itself is sent once
            raise NotPlain("a value that holds itself, or is nested too deeply")
        pending.extend(reversed(items))
    return "\t".join(out)


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
    value; NotPlain if it is no plain data."""
    if kind is deque and value.maxlen is not None and not flatten:
        raise NotPlain("a deque with maxlen")
    if kind in (list, tuple, deque):
        return OPENING[kind], list(value)
    if kind in (set, frozenset):
        return ("<", in_order(value)) if compare else (OPENING[kind], list(value))
    if kind in OPENING and compare:
        return "{", keyed(value)
    if kind in OPENING:
        token = OPENING[kind]
        if kind is defaultdict:
            name = builtin_name(value.default_factory)
            if name not in FACTORIES and not flatten:
                raise NotPlain("a defaultdict with a factory of its own")
            token = f"{token} {name}" if name in FACTORIES else "{"
        return token, [item for pair in dict.items(value) for item in pair]
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        if kind.__name__ == "ndarray" and value.dtype.kind in "biufc" and not compare:
            return "@ndarray", [str(value.dtype), value.tolist()]
        return None, [value.tolist()]
    if compare and kind in (Fraction, Decimal):
        if kind is Decimal:  # `%` refuses more digits than the context has
            whole = value.is_finite() and value == value.to_integral_value()
        else:
            whole = value.denominator == 1
        return None, [int(value) if whole else float(value)]
    if compare and kind in (type({}.keys()), type({}.items())):
        return None, [set(value)]
    if hasattr(kind, "__next__") and not compare:
        return taken(value)
    if kind in RICH and not (kind is type and not builtin_name(value)):
        return f"@{kind.__name__}", RICH[kind][0](value)
    for base, read in BASES.items():  # the base's methods: a subclass runs none of its own
        if flatten and base in kind.__mro__:
            return None, [base(read(value))]
    raise NotPlain(f"{kind.__name__} is not plain data")


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


def decode(text, known=None):
    """What `encode` made -> the value; an exception if it made no such text. A container that
    `known` holds is filled anew, a new one joins it."""
    stack, number, known = [("", [], None)], None, [] if known is None else known
    for token in text.split("\t"):
        head = token[:1]
        if token == CLOSE:
            value = built(*stack.pop())
        elif head == "=":
            number = int(token[1:])
            continue
        elif head and head in "[({<@":
            kind, _, option = token.partition(" ")
            container = None
            if kind in MUTABLE and number is not None:
                container, number = known[number], None
            elif kind in MUTABLE:
                container = MUTABLE[kind](*map(FACTORIES.__getitem__, option.split()))
                known.append(container)
            stack.append((kind, [], container))
            continue
        elif head == "#":
            value = known[int(token[1:])]
        elif head == '"':
            value, end = json.decoder.scanstring(token, 1)  # without a builtin of the program's
            if end != len(token):
                raise ValueError(f"{token} is no text")
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
    if container is None:
        return BUILD[token](*items)
    container.clear()
    if token[0] == "{":
        dict.update(container, zip(items[::2], items[1::2], strict=True))
    else:
        (container.update if token == "<" else container.extend)(items)
    return container
