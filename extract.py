"""The program in a model's response, decided by Python's own parser, with a reason for every refusal.

    python extract.py response.txt                    # prints the program; or the reason on stderr and exit 1
    python extract.py --mode recover --explain -      # reads stdin; shows every candidate and why it lost
    python extract.py --fuzz 2000                     # hostile and mutated responses through every mode, about 20 s
    python extract.py --measure MBPP.jsonl            # how much of garbled responses with a known program comes back

Modes, from the most literal to the most forgiving:
  paper    the reward rule of the released CodeScaler: exactly one match of one regular expression that `ast.parse`s
  last     its evaluation rule: the last match of the same expression, not parsed
  strict   training: exactly one fenced block that is a Python program; fences as Markdown has them, thoughts removed
  recover  test time: the best program anywhere in the text, repaired where it is broken

Nothing here runs the program. Every function is total: any string, however hostile, gives an answer in bounded time.
Only the standard library is needed.
"""

import argparse
import ast
import builtins
import html
import json
import random
import re
import sys
import textwrap
import threading
import time
import warnings
from typing import NamedTuple

MODES = ("paper", "last", "strict", "recover")
REASONS = ("ok", "empty", "no_block", "many_blocks", "unclosed", "not_python", "syntax_error", "vacuous",
           "no_entry_point", "too_large")  # fmt: skip
MAX_SOURCE = 256 * 1024  # bytes of UTF-8 in one program; a 16k-token response is about 64 KiB
MAX_ATTEMPTS = 64  # compilations in one call
MAX_COMPILED = 4 * 1024 * 1024  # characters compiled in one call
MAX_BLOCKS = 64  # fenced blocks looked at
MAX_FENCE_LINE = 1000  # characters; a longer line is no fence
MAX_SECONDS = 3.0  # `recover` stops looking for candidates then: a net below the other limits
MAX_CODEGEN = 500_000  # statements the compiler may emit, see emitted()


class Extraction(NamedTuple):
    """`code` is None unless `reason` is "ok"; `reason` is one of REASONS."""

    code: str | None
    reason: str


class Verdict(NamedTuple):
    """What the compiler says of one text. `line` (from 1) and `message` describe a syntax error."""

    reason: str
    tree: ast.Module | None = None
    line: int = 0
    message: str = ""


# --------------------------------------------------------------------------------------------------------------------
# is this text a program?

# A tree that holds none of these does nothing: docstrings, constants, names, imports, `pass`.
EFFECTS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Call, ast.Assign, ast.AugAssign, ast.NamedExpr,
           ast.Delete, ast.Raise, ast.Assert, ast.Await, ast.Yield, ast.YieldFrom)  # fmt: skip
_warnings_lock = threading.Lock()  # catch_warnings swaps a global: two threads in it could leave warnings off for good


class Compiler:
    """Compiles texts within the limits of one call; the same text is compiled once."""

    def __init__(self):
        self.attempts, self.chars, self.known = MAX_ATTEMPTS, MAX_COMPILED, {}
        self.deadline = float("inf")

    def exhausted(self) -> bool:
        return self.attempts <= 0 or self.chars <= 0 or time.monotonic() > self.deadline

    def check(self, source: str, parse_only=False) -> Verdict:
        """ok, empty, vacuous, syntax_error or too_large (also when the limits of the call are spent). Never raises.

        parse_only is the released rule: `ast.parse` alone, which accepts `return 1` at the top level and mere prose.
        """
        if source not in self.known:
            self.known[source] = self._check(source, parse_only)
        return self.known[source]

    def _check(self, source: str, parse_only: bool) -> Verdict:
        if not source.strip():
            return Verdict("empty")
        if len(source) > MAX_SOURCE or len(source.encode("utf-8", "surrogatepass")) > MAX_SOURCE:
            return Verdict("too_large")
        if self.exhausted() or self.chars < len(source):
            self.attempts = 0
            return Verdict("too_large", message="compile budget spent")
        self.attempts, self.chars = self.attempts - 1, self.chars - len(source)
        try:
            # An invalid escape in a string only warns, but under `python -W error` it would refuse the program.
            with _warnings_lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
                if not parse_only:
                    if "finally" in source and emitted(tree.body) > MAX_CODEGEN:
                        return Verdict("too_large")
                    # ast.parse alone accepts `return` outside a function, `nonlocal` at the top, duplicate arguments
                    compile(source, "<response>", "exec", dont_inherit=True)
        except SyntaxError as error:
            return Verdict("syntax_error", line=error.lineno or 0, message=error.msg or "")
        except (RecursionError, MemoryError):  # nested too deeply for the parser or the compiler
            return Verdict("too_large")
        except (ValueError, OverflowError) as error:  # NUL characters, lone surrogates
            return Verdict("syntax_error", message=str(error))
        if not parse_only and not any(isinstance(node, EFFECTS) for node in ast.walk(tree)):
            return Verdict("vacuous", tree)
        return Verdict("ok", tree)


def emitted(body) -> int:
    """Upper bound of the statements the compiler emits for `body`: it copies a `finally` suite to every way out.

    Two copies for the normal and the exceptional exit and one more for each return, break or continue in the `try`:
    twenty nested levels are a million copies, so a page of source could take all memory before anything runs.
    """
    total, pending = 0, [(statement, 1) for statement in body]
    while pending and total <= MAX_CODEGEN:
        statement, copies = pending.pop()
        total += copies
        finals = getattr(statement, "finalbody", None) or []
        exits = (
            2 + sum(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in ast.walk(statement)) if finals else 0
        )
        for field in ("body", "orelse", "handlers", "cases"):
            inner = getattr(statement, field, None)
            pending += [(child, copies) for child in inner] if isinstance(inner, list) else []
        pending += [(child, copies * exits) for child in finals]
    return total


def bound(body) -> set[str]:
    """Names that running the statements `body` binds in their own scope, looking into if, for, try and with."""
    names, pending = set(), list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name):
            names |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            pending += ast.iter_child_nodes(node)
    return names


def defines(tree: ast.Module, entry_point: str) -> bool:
    """Whether `tree` binds `f`, or a class `Solution` with `method`, its own or from a base class in the text."""
    owner, _, method = entry_point.rpartition(".")
    if not owner:
        return method in bound(tree.body)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    seen, pending = set(), [owner] if owner in bound(tree.body) else []
    while pending:
        name = pending.pop()
        if name in classes and name not in seen:
            seen.add(name)
            if method in bound(classes[name].body):
                return True
            pending += [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    return False


# --------------------------------------------------------------------------------------------------------------------
# where are the fenced blocks?


class Block(NamedTuple):
    """A fenced block. `tag`: "python", "" (no info string) or "other"; `closed`: its closing fence was found."""

    tag: str
    body: str
    closed: bool


FENCE = re.compile(r"([ \t>]*)(`{3,}|~{3,})[ \t]*([^`]*)$")  # Markdown: no backtick in the info string
GLUED = re.compile(r"[ \t]*[\w+#.{}-]*[ \t]*$")  # what may follow a fence that opens behind prose on its line
PYTHON = re.compile(r"\W*(?:lang(?:uage)?-|code[ _-])?(?:python|ipython|py)[\d._]*(?![\w+#/-])", re.IGNORECASE)
THOUGHT = re.compile(r"<(/?)(think|thinking|thought|reasoning)>")


def split_lines(text: str) -> list[str]:
    """Lines as Python's tokenizer sees them; str.splitlines would also cut at form feeds and U+2028 inside strings."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def without_thoughts(lines: list[str]) -> tuple[list[str], list[str]]:
    """(answer, thoughts): `<think>` ... `</think>` taken out. One never closed lasts to the end (a cut response).

    A first tag that closes belongs to a `<think>` in the prompt: everything before it is thought. A tag counts only
    outside quotation marks and backticks and, to open, outside fenced blocks: programs may handle such tags themselves.
    """
    answer, thoughts, inside, fence, first = [], [], "", "", True
    tags = 0
    for line in lines:
        mark = FENCE.match(line) if len(line) < MAX_FENCE_LINE and ("```" in line or "~~~" in line) else None
        if mark and not inside:
            fence = "" if fence and mark[2].startswith(fence) and not mark[3].strip() else fence or mark[2]
        while "<" in line and tags < MAX_BLOCKS and (tag := THOUGHT.search(line)):
            tags += 1
            closing, before = tag[1] == "/", line[: tag.start()]
            if inside:
                if not (closing and tag[2] == inside):
                    thoughts.append(line[: tag.end()])
                    line = line[tag.end() :]
                    continue
                thoughts.append(before)
                line, inside = line[tag.end() :], ""
            elif any(quote in before for quote in "'\"`") or (fence and not (closing and first)):
                break
            elif closing:
                if not first:
                    break
                thoughts, answer, fence, line = answer + [before], [], "", line[tag.end() :]
            else:
                answer.append(before)
                line, inside = line[tag.end() :], tag[2]
            first = False
        (thoughts if inside else answer).append(line)
    return answer, thoughts


def opener(line: str) -> tuple[str, str, str] | None:
    """(prefix, fence, info) if the line opens a block: a Markdown fence, or backticks that end a line of prose."""
    if len(line) > MAX_FENCE_LINE or "```" not in line and "~~~" not in line:
        return None
    if mark := FENCE.match(line):
        return mark[1], mark[2], mark[3].strip()
    before, _, info = line.rpartition("```")
    return ("", "```", info.strip()) if "`" not in before and GLUED.match(info) else None


def scan(lines: list[str], compiler: Compiler) -> list[Block]:
    """The fenced blocks of a text in order. Markdown decides, except where the syntax of the body knows better."""
    blocks, i = [], 0
    while i < len(lines) and len(blocks) < MAX_BLOCKS:
        opening = opener(lines[i])
        i += 1
        if opening is None:
            continue
        prefix, fence, info = opening
        tag = "python" if PYTHON.match(info) else "other" if info else ""
        start, (end, closed, i) = i, find_end(lines, i, fence, prefix, tag, compiler)
        body = dedented(lines[start : int(end)], prefix)
        if isinstance(end, Cut):
            body = body + "\n" + end.tail if body else end.tail
        blocks.append(Block(tag, body, closed))
    return blocks


class Cut(int):
    """The number of a line that ends a block in its middle; `tail` is the part of the line that is still code."""

    tail = ""


def dedented(lines: list[str], prefix: str) -> str:
    """The body of a block without the indentation or the `>` of its opening fence (Markdown's rule)."""
    if ">" in prefix:
        lines = [re.sub(r"^[ \t]{0,3}> ?", "", line) for line in lines]
        prefix = ""
    width = len(prefix)
    lines = [line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines] if width else lines
    return "\n".join(lines).strip("\n")


def find_end(lines, start, fence, prefix, tag, compiler):
    """(line after the body, closed, line to scan on from) of the block whose body starts at `start`.

    The first bare fence of the same kind ends it, and so does another opening fence (the block was never closed). Two
    exceptions, both only when the program they give compiles: a fence inside a triple-quoted string does not end the
    block, and a fence at the end or the start of a line with other text does.
    """
    fences, candidates = re.compile(r"[ \t>]*" + re.escape(fence) + fence[0] + r"*[ \t]*([^`]*)$"), []
    for j in range(start, len(lines)):
        if len(lines[j]) < MAX_FENCE_LINE and fence in lines[j] and (mark := fences.match(lines[j])):
            bare = not mark[1].strip()
            if bare or opener(lines[j]) and GLUED.match(mark[1]):
                candidates.append((j, bare, j + 1 if bare else j))
                if tag == "other" or len(candidates) == 9:
                    break
                verdict = compiler.check(dedented(lines[start:j], prefix)) if not compiler.exhausted() else None
                if verdict and verdict.reason in ("ok", "vacuous"):
                    return candidates[-1]
                if not verdict or "triple-quoted" not in verdict.message:
                    break
    first = candidates[0] if candidates else (len(lines), False, len(lines))
    if tag != "other":
        for j in [j for j in range(start, min(first[0] + 1, len(lines))) if fence in lines[j]][:4]:
            tail = lines[j].partition(fence)[0]
            if not compiler.exhausted():
                body = "\n".join(part for part in (dedented(lines[start:j], prefix), tail.strip() and tail) if part)
                if compiler.check(body).reason == "ok":
                    end = Cut(j)
                    end.tail = tail if tail.strip() else ""
                    return end, True, j + 1
    return first


# --------------------------------------------------------------------------------------------------------------------
# recover: candidates, repairs, and which one is best


class Piece(NamedTuple):
    """A candidate that compiles. `cost`: 0 as written, 1 repaired, 2 cut. `rank`: 2 tagged, 1 untagged, 0 bare."""

    code: str
    tree: ast.Module
    cost: int
    rank: int
    order: int


PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.|In \[\d+\]:|\.\.\.:)(?: |$)")
NUMBER = re.compile(r"[ \t]*(\d+)(?:[ \t]*[:|.)])?(?=[ \t]|$)")
SHELL = re.compile(r"[ \t]*(?:[%!?$]|(?:pip3?|conda) install )")
# What a line of a program may begin with when no fence says where it begins.
START = re.compile(
    r"[ \t]*(?:@\w|[\"']{3}|#|(?:async )?def \w|class \w|import \w|from [\w.]+ import|print\(|[\w.]+\(.*\)|"
    r"(?:if|for|while|with)\b.*:|try:|[\w.\[\], ]+ ?[-+*/%|&]?= ?\S|(?:>>>|In \[\d+\]:) )"
)
TYPOGRAPHY = str.maketrans({
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'",
    "\u00a0": " ", "\u202f": " ", "\u3000": " ",
    "\u2013": "-", "\u2212": "-", "\u200b": None, "\u200c": None, "\u200d": None, "\ufeff": None,
})  # fmt: skip
STRING = re.compile(
    r"\"{3}.*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|#[^\n]*", re.DOTALL
)


def without_prompts(text: str) -> str:
    """A session of the interpreter: its input lines without `>>>` and `...`, its output dropped."""
    lines = text.split("\n")
    if not any(PROMPT.match(line) and line.lstrip()[:3] in (">>>", "In ") for line in lines):
        return text
    return "\n".join(line[m.end() :] for line in lines if (m := PROMPT.match(line)))


def without_numbers(text: str) -> str:
    """Line numbers in front of (nearly) every line removed, when they rise."""
    lines = [line for line in text.split("\n") if line.strip()]
    found = [m for line in lines if (m := NUMBER.match(line))]
    numbers = [int(m[1][:9]) for m in found]
    if len(found) < 2 or len(found) < len(lines) or numbers != sorted(set(numbers)):
        return text
    rest = [line[m.end() :] for line, m in zip(lines, found, strict=True)]
    return textwrap.dedent("\n".join(rest))


def outside_strings(text: str) -> str:
    """Typographic quotes, dashes and spaces made plain, except inside strings and comments that Python would see."""
    out, at = [], 0
    for string in STRING.finditer(text):
        out += [text[at : string.start()].translate(TYPOGRAPHY), string[0]]
        at = string.end()
    return "".join(out) + text[at:].translate(TYPOGRAPHY)


def realigned(text: str) -> str:
    """Uniform indentation removed; also where only the first line has lost it."""
    first, _, rest = text.strip("\n").partition("\n")
    if not first.startswith((" ", "\t")) and rest and not first.rstrip().endswith((":", "(", "[", "{", "\\")):
        return first + "\n" + textwrap.dedent(rest)
    return textwrap.dedent(text)


REPAIRS = (
    realigned,
    without_prompts,
    without_numbers,
    lambda text: "\n".join(line for line in text.split("\n") if not SHELL.match(line)),
    outside_strings,
    html.unescape,
    lambda text: text.translate(TYPOGRAPHY),
)


def repaired(text: str, compiler: Compiler) -> tuple[str, int]:
    """(text, cost) after the first repair that makes it compile; else (text after all but the last repair, 2)."""
    reason = compiler.check(text).reason
    if reason != "syntax_error":
        return text, 0 if reason in ("ok", "vacuous") else 2
    for repair in REPAIRS:
        changed = repair(text)
        if changed != text and compiler.check(changed).reason in ("ok", "vacuous"):
            return changed, 1
        text = changed if repair is not REPAIRS[-1] else text
    return text, 2


def longest_prefix(text: str, compiler: Compiler) -> tuple[str, int]:
    """The longest run of lines from the first one that compiles, and their number; ("", 0) if there is none.

    The compiler names the line it stumbled on and nothing that goes past that line can compile, so each try
    starts there: a text cut in the middle of a statement takes one or two tries, not one a line.
    """
    lines = text.split("\n")
    end = len(lines)
    for _ in range(14):
        if end <= 0 or compiler.exhausted():
            break
        verdict = compiler.check("\n".join(lines[:end]))
        if verdict.tree is not None:
            return "\n".join(lines[:end]), end
        before = end
        end = min(end - 1, verdict.line - 1 if verdict.line else end // 2)
        if header := re.search(r"on line (\d+)$", verdict.message):  # a header whose suite is missing
            end = min(end, int(header[1]) - 1)
        while 0 < end < before and not lines[end - 1].strip():
            end -= 1
        if "'except' or 'finally'" in verdict.message:  # go back to the `try`, not line by line
            tries = [k for k in range(end) if lines[k].strip() == "try:"]
            end = tries[-1] if tries else end
    return "", 0


def without_prose(code: str, compiler: Compiler) -> Verdict | None:
    """Trailing statements without effect (a word, `Note: this`) cut from a run of lines that no fence delimits."""
    tree = compiler.check(code).tree
    while tree and tree.body and not any(isinstance(n, EFFECTS)
                                         or getattr(n, "value", 0) and isinstance(n, ast.AnnAssign)
                                         for n in ast.walk(tree.body[-1])):  # fmt: skip
        if isinstance(tree.body[-1], ast.Import | ast.ImportFrom):
            break
        code = "\n".join(code.split("\n")[: tree.body[-1].lineno - 1])
        tree = compiler.check(code).tree
    return code.strip("\n") if tree and compiler.check(code).reason == "ok" else ""


def runs(lines: list[str], compiler: Compiler, most=12) -> list[str]:
    """Maximal runs of lines that compile, from text where no fence (or a wrong one) marks the program."""
    found, i, starts = [], 0, 0
    while i < len(lines) and len(found) < most and starts < 4 * most and not compiler.exhausted():
        if not START.match(lines[i][:200]):
            i += 1
            continue
        starts += 1
        indent = len(lines[i]) - len(lines[i].lstrip())
        end, size = i, 0
        while end < len(lines) and size < MAX_SOURCE // 4:
            if lines[end].strip() and not lines[end][:indent].isspace() and indent:
                break
            size += len(lines[end]) + 1
            end += 1
        text = "\n".join(line[indent:] for line in lines[i:end])
        code, used = longest_prefix(text if not PROMPT.match(text) else without_prompts(text), compiler)
        if code := without_prose(code, compiler):
            found.append(code)
        i += max(1, used)
    return found


def find_pieces(lines: list[str], compiler: Compiler) -> list[Piece]:
    """Candidates in the order of the text: every block, repaired or cut; without any, runs of the whole text."""
    pieces = []

    def add(code, cost, rank):
        verdict = compiler.check(code)
        if verdict.reason == "ok" or verdict.tree and bound(verdict.tree.body):  # imports alone: only good to merge
            pieces.append(Piece(code, verdict.tree, cost, rank, len(pieces)))
        return verdict.reason == "ok"

    for block in scan(lines, compiler):
        rank = {"python": 2, "": 1, "other": 0}[block.tag]
        code, cost = repaired(block.body, compiler)
        if not add(code, cost if block.closed else max(cost, 1), rank) and cost == 2:
            for run in runs(code.split("\n"), compiler):
                add(without_prose(run, compiler), 2, rank)
    if not any(score(piece, None)[0] for piece in pieces):
        text, cost = repaired("\n".join(lines), compiler)
        if cost < 2:
            add(without_prose(text, compiler), cost, 0)
        else:
            for whole in ("\n".join(lines), text):
                if not any(piece.cost == 2 and score(piece, None)[0] for piece in pieces):
                    for run in runs(whole.split("\n"), compiler):
                        add(run, 2, 0)
    return pieces


def unresolved(tree: ast.Module) -> set[str]:
    """Names that the program reads and neither binds anywhere nor finds among the builtins."""
    loads, stores = set(), set(dir(builtins)) | {"__name__", "__file__", "__class__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loads if isinstance(node.ctx, ast.Load) else stores).add(node.id)
        elif isinstance(node, ast.alias):
            if node.name == "*":
                return set()
            stores.add((node.asname or node.name).split(".")[0])
        else:
            stores |= {value for key in ("name", "arg", "rest") if isinstance(value := getattr(node, key, None), str)}
    return loads - stores


def is_stub(node) -> bool:
    """A function that is only a docstring, `pass`, `...` or `raise NotImplementedError`: the prompt, echoed."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and all(
        isinstance(child, ast.Pass)
        or isinstance(child, ast.Expr)
        and isinstance(child.value, ast.Constant)
        or isinstance(child, ast.Raise)
        and "NotImplemented" in ast.dump(child)
        for child in node.body
    )


def score(piece: Piece, entry_point: str | None) -> tuple:
    """Larger is better: (useful, defines the entry point, resolved, whole, uncut, rank, order)."""
    definitions = [
        n for n in ast.walk(piece.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    reads = any(isinstance(n, ast.Name) and n.id == "input" or isinstance(n, ast.Attribute) and n.attr == "stdin"
                for n in ast.walk(piece.tree))  # fmt: skip
    useful = reads or any(not is_stub(n) and not n.name.lower().startswith("test") for n in definitions)
    methods = any(
        isinstance(n, ast.FunctionDef) and n.args.args and n.args.args[0].arg == "self" for n in piece.tree.body
    )
    return (
        useful,
        bool(entry_point) and defines(piece.tree, entry_point),
        not unresolved(piece.tree),
        not methods and not any(is_stub(n) for n in piece.tree.body),
        -piece.cost,
        piece.rank,
        piece.order,
    )


def merges(pieces: list[Piece], compiler: Compiler) -> list[Piece]:
    """For each candidate that uses names it lacks (and is no mere usage example): it with those that define them."""
    merged = []
    for piece in pieces[-16:]:
        need, chosen = unresolved(piece.tree), [piece]
        if not need or not score(piece, None)[0] or compiler.exhausted():
            continue
        for other in [p for p in reversed(pieces) if p.order < piece.order] + [
            p for p in pieces if p.order > piece.order
        ]:
            given = bound(other.tree.body) & need
            if given:
                chosen.append(other)
                need = need - given | unresolved(other.tree) - set().union(*(bound(p.tree.body) for p in chosen))
        chosen.sort(key=lambda p: p.order)
        code = "\n\n".join(p.code for p in chosen)
        verdict = compiler.check(code)
        if len(chosen) > 1 and verdict.reason == "ok":
            merged.append(
                Piece(code, verdict.tree, max(p.cost for p in chosen), min(p.rank for p in chosen), piece.order)
            )
    return merged


def describe(piece: Piece, entry_point: str | None) -> str:
    useful, entry, resolved, whole, cost, rank, order = score(piece, entry_point)
    faults = [] if useful else ["no program (stub, usage or test)"]
    faults += ["does not define " + entry_point] if entry_point and not entry else []
    faults += [] if resolved else ["lacks " + ", ".join(sorted(unresolved(piece.tree))[:4])]
    faults += [] if whole else ["a method or a stub"]
    faults += [["repaired"], ["cut"]][-cost - 1] if cost else []
    return f"candidate {order + 1} ({['bare', 'no tag', 'python'][rank]}) " + ("; ".join(faults) or "complete")


# --------------------------------------------------------------------------------------------------------------------
# the modes

RELEASED = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)


def extract_code(
    text: str, mode: str = "strict", entry_point: str | None = None, log: list | None = None
) -> Extraction:
    """The program in `text`, or None and why not. Never raises for any string.

    entry_point: `f` or `Solution.method` that the program must define (strict, recover); the other modes ignore it.
    log: a list that receives one line for every candidate considered (strict, recover).
    Errors: ValueError for an unknown mode (a mistake of the caller, not of the text).
    Source of `paper` and `last`: the reward and evaluation code released with CodeScaler (arXiv 2602.17684). The size
    limit is the one difference: above MAX_SOURCE, which no response of its 16384 tokens reaches, `paper` refuses.
    """
    if mode not in MODES:
        raise ValueError(f"extraction mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "paper":
        return extract_paper(text)
    if mode == "last":
        found = RELEASED.findall(text)
        code = found[-1].strip() if found else ""
        return Extraction(code, "ok") if code else Extraction(None, "empty" if found else no_match(text))
    log = [] if log is None else log
    return extract_strict(text, entry_point, log) if mode == "strict" else extract_best(text, entry_point, log)


def no_match(text: str) -> str:
    """Why the released expression found nothing."""
    return "empty" if not text.strip() else "unclosed" if re.search(r"```\w*\n", text) else "no_block"


def extract_paper(text: str) -> Extraction:
    found = RELEASED.findall(text)
    if len(found) != 1:
        return Extraction(None, "many_blocks" if found else no_match(text))
    code = found[0].strip()
    reason = Compiler().check(code, parse_only=True).reason
    return Extraction(code if reason == "ok" else None, reason)


def extract_strict(text: str, entry_point: str | None, log: list, compiler=None) -> Extraction:
    """Exactly one Python program block. Other languages, and untagged blocks that are no program, don't count."""
    if not text.strip():
        return Extraction(None, "empty")
    compiler = compiler or Compiler()
    answer, thoughts = without_thoughts(split_lines(text))
    blocks = scan(answer, compiler)
    if not blocks:
        return Extraction(None, "unclosed" if thoughts and not "".join(answer).strip() else "no_block")
    counted, refused = [], set()
    for block in blocks:
        verdict = compiler.check(block.body) if block.tag != "other" else Verdict("not_python")
        reason = verdict.reason
        # A block tagged as Python is an attempt even when it is broken: two attempts are not one answer.
        attempt = reason == "ok" or block.tag == "python" and reason in ("syntax_error", "too_large")
        if not block.closed and (attempt or len(blocks) == 1 and block.tag != "other"):
            attempt, reason = True, "unclosed"
        log.append(
            f"block {len(log) + 1} ({block.tag or 'no tag'}, {len(block.body)} characters): {reason} {verdict.message}"
        )
        if attempt:
            counted.append((block.body, reason, verdict.tree))
        refused.add(reason)
    if len(counted) > 1:
        return Extraction(None, "many_blocks")
    if not counted:
        return Extraction(
            None, next(r for r in ("too_large", "syntax_error", "vacuous", "empty", "not_python") if r in refused)
        )
    body, reason, tree = counted[0]
    if reason == "ok" and entry_point and not defines(tree, entry_point):
        reason = "no_entry_point"
    return Extraction(body if reason == "ok" else None, reason)


def extract_best(text: str, entry_point: str | None, log: list) -> Extraction:
    """The candidate with the highest score, from the answer; from the thoughts only where the answer has none."""
    compiler = Compiler()
    compiler.deadline = time.monotonic() + MAX_SECONDS
    strict = extract_strict(text, entry_point, [], compiler)
    for lines in without_thoughts(split_lines(text)):
        pieces = find_pieces(lines, compiler)
        pieces += merges(pieces, compiler)
        pieces = [piece for piece in pieces if compiler.check(piece.code).reason == "ok"]
        ranked = sorted(pieces, key=lambda piece: score(piece, entry_point), reverse=True)
        log += [
            f"{'won ' if piece is ranked[0] else 'lost'} {describe(piece, entry_point)}: {piece.code.strip()[:60]!r}"
            for piece in ranked
        ]
        if ranked and (not entry_point or defines(ranked[0].tree, entry_point)):
            return Extraction(ranked[0].code, "ok")
        if ranked:
            strict = Extraction(None, "no_entry_point")
    if strict.code is not None:  # the limits were spent before the scan came to it
        return strict
    return Extraction(None, "syntax_error" if strict.reason == "many_blocks" else strict.reason)


# --------------------------------------------------------------------------------------------------------------------
# command line, fuzzing, measurement


def hostile(rng: random.Random, programs: list[str]) -> str:
    """A response nobody would write: program text and fences, cut, repeated, nested, with odd characters."""
    parts = [
        "```", "```python\n", "\n```\n", "~~~", "<think>", "</think>", "\x00", "\ud800", "\f", "\t", "\r\n", "\u2028",
        '"""', "'", "\\", "(", "[", "{", "finally:", "try:\n", "lambda:", "not ", "- ", "\u201c", ">>> ", "1: ", "%x",
        "if x:", "\n    ", "x = 1\n", "def f():\n", "return", "\\d", "é", "0x", "9" * 50, ":=", "*", "prose ",
    ]  # fmt: skip
    text = ""
    for _ in range(rng.randint(1, 12)):
        part = rng.choice(parts) if rng.random() < 0.7 else rng.choice(programs)
        text += part * (rng.choice((1, 1, 1, 2, 30, 300)) if len(part) < 12 else 1)
    for _ in range(rng.randint(0, 4)):  # delete, duplicate or swap a span
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[b:] + text[:a]))[:20_000]
    return text


def fuzz(count: int, seed: int = 0) -> dict:
    """Runs `count` hostile texts through every mode; raises AssertionError where an answer breaks the contract."""
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    programs = [source[i : i + 700] for i in range(0, len(source) - 700, 700)]
    rng, slowest, tally = random.Random(seed), 0.0, {}
    for _ in range(count):
        text = hostile(rng, programs)
        for mode in MODES:
            start = time.perf_counter()
            code, reason = extract_code(text, mode, rng.choice((None, "f", "Solution.f")))
            slowest = max(slowest, time.perf_counter() - start)
            tally[f"{mode} {reason}"] = tally.get(f"{mode} {reason}", 0) + 1
            assert reason in REASONS and (code is not None) == (reason == "ok"), (text, mode, code, reason)
            if code is not None and mode in ("strict", "recover"):
                assert Compiler().check(code).reason == "ok", (text, mode, code)
    return {"slowest_s": round(slowest, 3), **dict(sorted(tally.items()))}


def garblings(code: str, rng: random.Random) -> dict[str, tuple[str, str]]:
    """{kind: (response, program that must come back)} for a known program; the known truth of --measure."""
    lines = code.split("\n")
    fenced = f"```python\n{code}\n```"
    cut = code[: rng.randint(len(code) // 3, len(code) - 1)]
    kept = cut.split("\n")
    while kept and Compiler().check("\n".join(kept)).tree is None:
        kept.pop()
    indented = textwrap.indent(code, "    ")
    usage = "```python\nprint(solution_result)\n```"
    doctest = "\n".join(("... " if line[:1].isspace() else ">>> ") + line for line in lines)
    return {
        "fenced": (f"Here is the solution:\n\n{fenced}\n\nIt works.", code),
        "fence with odd tag": (f"Here it is:\n\n``` Python 3.11 \n{code}\n```\n", code),
        "CRLF": (f"Sure.\n{fenced}\nDone.".replace("\n", "\r\n"), code),
        "draft in thoughts": (f"<think>\n```python\n{cut}\n```\n</think>\n{fenced}", code),
        "usage block after it": (f"{fenced}\nUse it like this:\n{usage}", code),
        "split in two blocks": (f"```python\n{lines[0]}\n```\nthen\n{fenced}", code),
        "unclosed": (f"Here:\n```python\n{code}", code),
        "no fence": (f"The function below does this.\n\n{code}\n\nIt runs in linear time.", code),
        "indented, no fence": (f"The function:\n\n{indented}\n\nIt runs in linear time.", code),
        "line numbers": ("```\n" + "\n".join(f"{n:3d}  {line}" for n, line in enumerate(lines, 1)) + "\n```", code),
        "doctest": (f"```python\n{doctest}\n```", code),
        "smart quotes": (fenced.replace('"', "\u201d").replace("'", "\u2019"), code),
        "prose in the fence": (f"```python\n{code}\n\nThis function returns the result.\n```", code),
        "magics": (f"```python\n%matplotlib inline\n!pip install numpy\n{code}\n```", code),
        "truncated": (f"Here:\n```python\n{cut}", "\n".join(kept)),
    }  # fmt: skip


def measure(path: str) -> None:
    """For each kind of garbling: share of MBPP programs that come back, compared as syntax trees, per mode."""
    with open(path, encoding="utf-8") as file:
        programs = ["\n".join(split_lines(json.loads(row)["code"])).strip("\n") for row in file]
    hits, wrong, counts, seconds, calls = {}, {}, {}, dict.fromkeys(MODES, 0.0), 0
    for number, code in enumerate(programs):
        for kind, (text, truth) in garblings(code, random.Random(number)).items():
            tree = Compiler().check(truth)
            if tree.reason != "ok":
                continue  # cut so early that nothing is left
            counts[kind] = counts.get(kind, 0) + 1
            calls += 1
            for mode in MODES:
                start = time.perf_counter()
                got = extract_code(text, mode).code
                seconds[mode] += time.perf_counter() - start
                back = got is not None and Compiler().check(got).tree
                same = bool(back) and ast.dump(back) == ast.dump(tree.tree)
                hits[kind, mode] = hits.get((kind, mode), 0) + same
                wrong[mode] = wrong.get(mode, 0) + (got is not None and not same)
    print(f"{'garbling':24}{'n':>6}" + "".join(f"{mode:>10}" for mode in MODES))
    for kind, n in counts.items():
        print(f"{kind:24}{n:6}" + "".join(f"{hits[kind, mode] / n:10.3f}" for mode in MODES))
    print(f"{'another program':30}" + "".join(f"{wrong[mode] / calls:10.3f}" for mode in MODES))
    print(f"{'responses per second':30}" + "".join(f"{calls / seconds[mode]:10.0f}" for mode in MODES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="-", help="a response; - is stdin")
    parser.add_argument("--mode", choices=MODES, default="strict")
    parser.add_argument("--entry-point", help="f or Solution.method that the program must define")
    parser.add_argument("--explain", action="store_true", help="candidates and why each lost, on stderr")
    parser.add_argument("--fuzz", type=int, metavar="N", help="run N hostile responses through every mode")
    parser.add_argument(
        "--measure", metavar="MBPP.jsonl", help="share of garbled programs that come back (rows with `code`)"
    )
    args = parser.parse_args()
    if args.fuzz is not None:
        print(json.dumps(fuzz(args.fuzz), indent=1))
        return
    try:
        if args.measure:
            return measure(args.measure)
        raw = sys.stdin.buffer.read() if args.file == "-" else open(args.file, "rb").read()  # noqa: SIM115
    except (OSError, ValueError, KeyError) as error:
        print(f"extract.py: {args.measure or args.file}: {error}", file=sys.stderr)
        sys.exit(2)
    log: list[str] = []
    code, reason = extract_code(raw.decode("utf-8", "replace"), args.mode, args.entry_point, log)
    if args.explain:
        print("\n".join(log) or "no candidates", file=sys.stderr)
    if code is None:
        print(reason, file=sys.stderr)
        sys.exit(1)
    sys.stdout.buffer.write(code.encode("utf-8", "replace") + b"\n")


if __name__ == "__main__":
    main()
