"""The program in a model's response, decided by Python's own parser, with a reason for every refusal.

    python extract.py response.txt                    # prints the program; or the reason on stderr and exit 1
    python extract.py --mode recover --explain -      # reads stdin; shows every candidate and why it lost
    python extract.py --fuzz 2000                     # hostile and mutated responses through every mode, about 10 s
    python extract.py --measure FILE.jsonl            # share of programs found: rows with `code` (known programs, which
                                                      # are garbled in fifteen ways) or with `response` (real ones)

Modes, from the most literal to the most forgiving:
  paper    the reward rule of the released CodeScaler: exactly one match of one regular expression that `ast.parse`s
  last     its evaluation rule: the last match of the same expression, not parsed
  strict   training: exactly one fenced block that is a Python program; fences as Markdown has them, thoughts removed
  recover  test time: the best program anywhere in the text, repaired where it is broken

Nothing here runs the program. Every function is total: any string, however hostile, gives an answer after a bounded
amount of work, and the same answer on a fast and on a slow machine.
"""

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
from dataclasses import dataclass
from typing import NamedTuple

from common import UserError, parse_args, run_cli

MODES = ("paper", "last", "strict", "recover")
REASONS = ("ok", "empty", "no_block", "many_blocks", "unclosed", "not_python", "syntax_error", "vacuous",
           "no_entry_point", "too_large")  # fmt: skip
MAX_SOURCE = 256 * 1024  # bytes of UTF-8 in one program; a 16k-token response is about 64 KiB
MAX_ATTEMPTS = 64  # compilations in one call
MAX_COMPILED = 768 * 1024  # characters compiled in one call: under 5 s for the slowest text of that size
MAX_SQUARED = 4000  # of what costs the compiler time with the square of its number, see squared()
MAX_EMITTED = 500_000  # statements the compiler may emit, see emitted()
MAX_BLOCKS = 1000  # fenced blocks in a response, and fences in a block, looked at
MAX_TAGS = 64  # `<think>` and its like looked at
MAX_FENCE_LINE = 1000  # characters; a longer line is no fence


@dataclass
class Args:
    file: str = "-"  # a response; - is stdin
    mode: str = "strict"  # paper, last, strict or recover
    entry_point: str = ""  # f or Solution.method that the program must define (strict, recover)
    explain: bool = False  # candidates and why each lost, on stderr
    fuzz: int = 0  # run this many hostile responses through every mode instead
    measure: str = ""  # a JSON Lines file: share of its programs found by each mode, instead


class Extraction(NamedTuple):
    """`code` is None unless `reason` is "ok"; `reason` is one of REASONS."""

    code: str | None
    reason: str


# ----------------------------------------------------------------------------------------------------------------------
# the four modes

RELEASED = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)


def extract_code(text: str, mode: str = "strict", entry_point: str | None = None, log: list | None = None):
    """text -> Extraction: the program in it, or None and why not. Never raises for any string.

    entry_point: `f` or `Solution.method` that the program must define (strict, recover); the other modes ignore it.
    log: a list that receives one line for every candidate considered.
    Errors: ValueError for an unknown mode (a mistake of the caller, not of the text).
    Source of `paper` and `last`: the reward and evaluation code released with CodeScaler (arXiv 2602.17684). The one
    difference is a limit that no response of its 16384 tokens reaches: `paper` refuses more than MAX_SOURCE and more
    than 16,000 fields of f-strings.
    """
    if mode not in MODES:
        raise ValueError(f"extraction mode {mode!r}: expected one of {', '.join(MODES)}")
    log = [] if log is None else log
    if mode == "strict":
        return extract_strict(text, entry_point, Compiler(), log)
    return extract_best(text, entry_point, log) if mode == "recover" else extract_released(text, mode == "last", log)


def extract_released(text: str, last: bool, log: list) -> Extraction:
    found = RELEASED.findall(text)
    log.append(f"{len(found)} matches of {RELEASED.pattern!r}")
    if not found:
        opened = re.search(r"```\w*\n", text)
        return Extraction(None, "empty" if not text.strip() else "unclosed" if opened else "no_block")
    code = found[-1].strip()
    if last:
        return Extraction(code, "ok") if code else Extraction(None, "empty")
    if len(found) > 1:
        return Extraction(None, "many_blocks")
    reason = Compiler().check(code, parse_only=True).reason
    return Extraction(code if reason == "ok" else None, reason)


def extract_strict(text: str, entry_point: str | None, compiler: "Compiler", log: list) -> Extraction:
    """Exactly one Python program block. Other languages, and untagged blocks that are no program, don't count."""
    if not text.strip():
        return Extraction(None, "empty")
    answer, thoughts = without_thoughts(text)
    blocks = scan(split_lines(answer), compiler)
    if not blocks:
        return Extraction(None, "unclosed" if thoughts and not answer.strip() else "no_block")
    counted, reasons = [], set()
    for block in blocks:
        verdict = compiler.check(block.body) if block.tag != "other" else Verdict("not_python")
        reason = verdict.reason
        # A block tagged as Python is an attempt even when it is broken: two attempts are not one answer.
        attempt = reason == "ok" or block.tag == "python" and reason in ("syntax_error", "too_large")
        if not block.closed and (attempt or len(blocks) == 1 and block.tag != "other"):
            attempt, reason = True, "unclosed"
        log.append(f"block {len(log) + 1} ({block.tag or 'no tag'}, {len(block.body)} characters): "
                   f"{reason} {verdict.message}")  # fmt: skip
        reasons.add(reason)
        if attempt:
            counted.append((block.body, reason, verdict.tree))
    if len(counted) > 1:
        return Extraction(None, "many_blocks")
    if not counted:
        order = ("too_large", "syntax_error", "vacuous", "empty", "not_python")
        return Extraction(None, next(reason for reason in order if reason in reasons))
    body, reason, tree = counted[0]
    if reason == "ok" and entry_point and not defines(tree, entry_point):
        reason = "no_entry_point"
    return Extraction(body if reason == "ok" else None, reason)


def extract_best(text: str, entry_point: str | None, log: list) -> Extraction:
    """What `strict` finds if that is a whole program; else the candidate with the highest score.

    The thoughts are searched only where the answer has no candidate.
    """
    compiler, reason = Compiler(), ""
    strict = extract_strict(text, entry_point, compiler, [])
    piece = make_piece(strict.code, compiler) if strict.code is not None else None
    if piece and piece.level == 2 and not piece.missing and not piece.cost:
        log.append(f"the one program block won: {strict.code[:60]!r}")
        return strict
    for part in without_thoughts(text):
        pieces = find_pieces(split_lines(part), entry_point, compiler)
        pieces = [piece for piece in pieces + merges(pieces, compiler) if piece.effects]
        ranked = sorted(((score(piece, entry_point), piece) for piece in pieces), key=lambda p: p[0], reverse=True)
        log += [explain(piece, scored, ranked[0][0]) for scored, piece in ranked]
        ranked = [piece for _, piece in ranked]
        if ranked and (not entry_point or defines(ranked[0].tree, entry_point)):
            return Extraction(ranked[0].code, "ok")
        reason = reason or ("no_entry_point" if ranked else "")
    if strict.code is not None:  # the limits of the call were spent before the search came to it
        return strict
    return Extraction(None, reason or ("syntax_error" if strict.reason == "many_blocks" else strict.reason))


# ----------------------------------------------------------------------------------------------------------------------
# is this text a program?


class Verdict(NamedTuple):
    """What the compiler says of one text. `line` (from 1) and `message` describe a syntax error."""

    reason: str
    tree: ast.Module | None = None
    line: int = 0
    message: str = ""


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# A tree that holds none of these does nothing: docstrings, constants, names, imports, `pass`.
EFFECTS = (*DEFINITIONS, ast.Call, ast.Assign, ast.AugAssign, ast.NamedExpr, ast.Delete, ast.Raise, ast.Assert,
           ast.Await, ast.Yield, ast.YieldFrom)  # fmt: skip
_warnings_lock = threading.Lock()  # catch_warnings swaps a global: two threads in it could leave warnings off for good


class Compiler:
    """Compiles texts within the limits of one call; the same text is compiled once."""

    def __init__(self):
        self.attempts, self.chars, self.known = MAX_ATTEMPTS, MAX_COMPILED, {}

    def spent(self) -> bool:
        return self.attempts <= 0 or self.chars <= 0

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
            self.chars -= MAX_SOURCE // 16
            return Verdict("too_large")
        if self.spent() or self.chars < len(source):
            self.attempts = 0
            return Verdict("too_large", message="compile budget spent")
        count = squared(source, parse_only)
        self.attempts -= 1
        self.chars -= len(source) + count**2 // 64  # so MAX_SQUARED costs as much as MAX_SOURCE
        if count > MAX_SQUARED:
            return Verdict("too_large")
        try:
            # An invalid escape in a string only warns, but under `python -W error` it would refuse the program.
            with _warnings_lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
                if not parse_only:
                    if emitted(tree)[0] > MAX_EMITTED:
                        return Verdict("too_large")
                    # ast.parse alone accepts `return` outside a function, `nonlocal` at the top, duplicate arguments
                    compile(source, "<response>", "exec", dont_inherit=True)
        except SyntaxError as error:
            return Verdict("syntax_error", line=error.lineno or 0, message=error.msg or "")
        except (RecursionError, MemoryError):  # nested too deeply for the parser or the compiler
            return Verdict("too_large")
        except Exception as error:  # NUL characters, lone surrogates, and what another version of Python may raise
            return Verdict("syntax_error", message=str(error))
        if not parse_only and not any(isinstance(node, EFFECTS) for node in ast.walk(tree)):
            return Verdict("vacuous", tree)
        return Verdict("ok", tree)


def squared(source: str, parse_only: bool) -> int:
    """How many things `source` holds for which Python's time grows with the square of their number, never too few.

    Fields of f-strings for the parser (before Python 3.12; a quarter each, they are cheaper), definitions and keyword
    arguments for the compiler: 26,000 times `class A:0` compile in 20 s.
    """
    fields = source.count("{") // 4 if re.search(r"[fF][rR]?['\"]", source) else 0
    return fields if parse_only else fields + len(re.findall(r"\b(?:def|class)\b|[(,]\s*\w+\s*=", source))


def emitted(node) -> tuple[int, int]:
    """(upper bound of the statements the compiler emits for `node`, ways out of it: return, break, continue).

    A `finally` suite is copied to every way out of its `try`: twenty nested levels are a million copies, so a page of
    source could take all memory before anything runs. Each `with` likewise adds its exit to every way out.
    """
    total, exits, copied = 1, int(isinstance(node, ast.Return | ast.Break | ast.Continue)), 0
    for field, children in ast.iter_fields(node):
        for child in children if isinstance(children, list) else ():
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                inner = emitted(child)
                total, exits = total + inner[0], exits + inner[1]
                copied += inner[0] if field == "finalbody" else 0
    copied += len(node.items) if isinstance(node, ast.With | ast.AsyncWith) else 0
    return total + copied * (1 + exits), exits


def bound(body) -> set[str]:
    """Names that running the statements `body` binds in their own scope, looking into if, for, try and with."""
    names, pending = set(), list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, DEFINITIONS):
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


# ----------------------------------------------------------------------------------------------------------------------
# where are the fenced blocks?


class Block(NamedTuple):
    """A fenced block. `tag`: "python", "" (no info string) or "other"; `closed`: its closing fence was found."""

    tag: str
    body: str
    closed: bool


# The expressions are unambiguous: none can try a long line in more ways than it has characters.
FENCE = re.compile(r"((?:[ \t>]|[-*+] |\d{1,3}[.)] )*)(`{3,}|~{3,}(?!~))([^`]*)$")  # no backtick in the info string
GLUED = re.compile(r"[\w+#.{}-]*$")  # what may follow a fence that opens behind prose on its line
PYTHON = re.compile(r"\W*(?:lang(?:uage)?-|code[ _-])?(?:i?python|pypy|py)[\d._]*(?![\w+#/-])", re.IGNORECASE)
FENCE_LINE = re.compile(r"^[ \t>]*(?:`{3,}|~{3,}(?!~))[^`\n]*$", re.MULTILINE)
TAG = re.compile(r"(?:(?<!['\"`])|(?<=`)(?=</\w+>(?!`)))(</?(?:think|thinking|thought|reasoning)>)", re.IGNORECASE)


def split_lines(text: str) -> list[str]:
    """Lines as Python's tokenizer sees them; str.splitlines would also cut at form feeds and U+2028 inside strings."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def fence_lines(lines: list[str]) -> list[int]:
    return [i for i, line in enumerate(lines) if ("```" in line or "~~~" in line) and len(line) <= MAX_FENCE_LINE]


def opener(line: str) -> tuple[str, str, str] | None:
    """(prefix, fence, info) if the line opens a block: a Markdown fence, or backticks that end a line of prose."""
    if mark := FENCE.match(line):
        return mark[1], mark[2], mark[3].strip()
    before, fence, info = line.rpartition("```")
    return ("", fence, info.strip()) if fence and "`" not in before and GLUED.match(info.strip()) else None


def scan(lines: list[str], compiler: Compiler) -> list[Block]:
    """The fenced blocks of a text in order. Markdown decides, except where the syntax of the body knows better."""
    marks, blocks, after = fence_lines(lines), [], 0
    for k, i in enumerate(marks):
        if i >= after and opener(lines[i]) and not compiler.spent() and len(blocks) < MAX_BLOCKS:
            block, after = read_block(lines, marks, k, compiler)
            blocks.append(block)
    return blocks


def read_block(lines: list[str], marks: list[int], k: int, compiler: Compiler) -> tuple[Block, int]:
    """(the block that opens on line `marks[k]`, the line to scan on from); `marks` as of fence_lines().

    The first bare fence of the same kind ends it, and so does another opening fence (the block was never closed). Two
    exceptions, both only when the program they give compiles: a fence inside a triple-quoted string does not end the
    block, and a fence at the end or the start of a line with other text does.
    """
    prefix, fence, info = opener(lines[marks[k]])
    tag, start = "python" if PYTHON.match(info) else "other" if info else "", marks[k] + 1
    closing = re.compile(r"[ \t>]*" + re.escape(fence) + fence[0] + rf"*(?!{fence[0]})([^`]*)$")
    inner = [j for j in marks[k + 1 : k + MAX_BLOCKS] if fence in lines[j]]
    first, tries = None, 0
    for j in [*inner, len(lines)]:
        mark = closing.match(lines[j]) if j < len(lines) else None
        if j == len(lines) or mark and GLUED.match(mark[1].strip()):
            closed = bool(mark) and not mark[1].strip()
            block, tries = Block(tag, dedented(lines[start:j], prefix), closed), tries + 1
            first = first or (block, j + closed)
            verdict = compiler.check(block.body) if tag != "other" else Verdict("not_python")
            if verdict.tree:
                return block, j + closed
            if "triple-quoted" not in verdict.message or tries == 9:
                break
    for j in [j for j in inner if j <= first[1]][:4] if tag != "other" else []:
        head = lines[j].partition(fence)[0]
        body = dedented([*lines[start:j], *([head] if head.strip(" \t>") else [])], prefix)
        if compiler.check(body).reason == "ok":
            return Block(tag, body, True), j + 1
    return first


def dedented(lines: list[str], prefix: str) -> str:
    """The body of a block without the indentation or the `>` of its opening fence (Markdown's rule). A body whose first
    line is less indented than the fence was not written by that rule: no line loses more than the first one has."""
    if ">" in prefix:
        return "\n".join(re.sub(r"^[ \t]{0,3}> ?", "", line) for line in lines).strip("\n")
    first = next((line for line in lines if line.strip()), "")
    width = min(len(prefix), len(first) - len(first.lstrip(" \t")))
    lines = [line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines] if width else lines
    return "\n".join(lines).strip("\n")


def without_thoughts(text: str) -> tuple[str, str]:
    """(answer, thoughts): `<think>` ... `</think>` taken out. One never closed lasts to the end (a cut response).

    A first tag that closes belongs to a `<think>` in the prompt: everything before it is thought. Programs may handle
    such tags themselves: behind a quotation mark, or in a fenced block, a tag is text.
    """
    parts = TAG.split(text, maxsplit=MAX_TAGS)  # text, tag, text, tag, ..., text
    answer, thoughts, inside, first = parts[0], "", "", True
    fences = FENCE_LINE.findall(answer)
    for tag, part in zip(parts[1::2], parts[2::2], strict=True):
        name, closing, after = tag.strip("</>").lower(), tag.startswith("</"), FENCE_LINE.findall(part)
        fenced = len(fences) % 2
        goes_on = fenced and after and not after[0].strip(" \t>`~")  # the next fence ends the block that the tag is in
        if inside:
            inside = "" if closing and name == inside else inside
        elif closing and first and not goes_on:
            answer, thoughts, fences = "", answer, []
        elif not closing and not fenced:
            inside = name
        else:
            part = tag + part
        if inside:
            thoughts += part
        else:
            answer, fences = answer + part, fences + after
        first = False
    return answer, thoughts


# ----------------------------------------------------------------------------------------------------------------------
# recover: repairs


PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.|In \[\d+\]:|\.\.\.:)(?: |$)")
NUMBER = re.compile(r"[ \t]*(\d+)(?:[ \t]*[:|.)])?(?=[ \t]|$)")
SHELL = re.compile(r"[ \t]*(?:%{1,2}[a-zA-Z]|[!$] ?[\w.]|\?\w|(?:pip3?|conda) install )")
ENTITY = re.compile("&(lt|gt|amp|quot|#39);")
TYPOGRAPHY = str.maketrans({
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'",
    "\u00a0": " ", "\u202f": " ", "\u3000": " ", "\u2013": "-", "\u2212": "-",
    "\u200b": None, "\u200c": None, "\u200d": None, "\ufeff": None, "\0": None,
})  # fmt: skip
# A string or comment that ends (kept), one that does not end on its line, or text without quotes: linear on any text.
TOKENS = re.compile(r'''(?P<kept>"{3}.*?(?:"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:\\[^\n]|[^"\\\n])*"|'''
                    r'''\'(?:\\[^\n]|[^'\\\n])*'|#[^\n]*)|"[^\n]*|'[^\n]*|[^"'#]+''', re.DOTALL)  # fmt: skip


def plain(text: str) -> str:
    """Typographic quotes and spaces and HTML entities made plain, outside what Python sees as a string or a comment."""

    def change(token):
        part = ENTITY.sub(lambda entity: html.unescape(entity[0]), token[0])
        return token[0] if token["kept"] else part.translate(TYPOGRAPHY)

    return TOKENS.sub(change, text)


def realigned(text: str) -> str:
    """Uniform indentation removed; also where only the first line has lost it."""
    first, _, rest = text.strip("\n").partition("\n")
    if not first.startswith((" ", "\t")) and rest and not first.rstrip().endswith((":", "(", "[", "{", "\\")):
        return first + "\n" + textwrap.dedent(rest)
    return textwrap.dedent(text)


def without_prompts(text: str) -> str:
    """A text that begins as a session of the interpreter: its input without `>>>` and `...`, its output dropped."""
    if not PROMPT.match(text.lstrip("\n")):
        return text
    return "\n".join(line[m.end() :] for line in text.split("\n") if (m := PROMPT.match(line)))


def without_numbers(text: str) -> str:
    """Line numbers in front of every line removed, when they rise."""
    lines = [line for line in text.split("\n") if line.strip()]
    found = [m for line in lines if (m := NUMBER.match(line))]
    numbers = [int(m[1][:9]) for m in found]
    if len(found) < 2 or len(found) < len(lines) or numbers != sorted(set(numbers)):
        return text
    return textwrap.dedent("\n".join(line[m.end() :] for line, m in zip(lines, found, strict=True)))


REPAIRS = (  # each is applied to what the ones before it made, but the last two only where they make it compile
    realigned,
    without_prompts,
    without_numbers,
    lambda text: "\n".join(line for line in text.split("\n") if not SHELL.match(line)),
    plain,
    lambda text: re.sub(r"^[ \t]+", lambda indent: indent[0].expandtabs(4), text, flags=re.MULTILINE),
    lambda text: text.translate(TYPOGRAPHY),
)


def repaired(text: str, compiler: Compiler) -> tuple[str, int]:
    """(text, cost): cost 0 if it compiles as it is, 1 after repairs, 2 if it never does."""
    original, text = text, plain(text) if ENTITY.search(text) else text  # `x &lt; 1` compiles, but is not meant
    for repair in (str, *REPAIRS):
        changed = repair(text)
        verdict = compiler.check(changed)
        if verdict.tree:
            return changed, int(changed != original)
        if verdict.reason != "syntax_error":
            break
        text = changed if repair not in REPAIRS[-2:] else text
    return text, 2


def longest_prefix(text: str, compiler: Compiler) -> tuple[str, int]:
    """The longest run of lines from the first one that compiles, and their number; ("", 0) if there is none.

    The compiler names the line it stumbled on and nothing that goes past that line can compile, so each try
    starts there: a text cut in the middle of a statement takes one or two tries, not one a line.
    """
    lines = text.split("\n")
    end = len(lines)
    for _ in range(14):
        verdict = compiler.check("\n".join(lines[:end]))
        if verdict.tree:
            return "\n".join(lines[:end]), end
        before = end
        end = min(end - 1, verdict.line - 1 if verdict.line else end // 2)
        if header := re.search(r"on line (\d+)$", verdict.message):  # a header whose suite is missing
            end = min(end, int(header[1]) - 1)
        if "'except' or 'finally'" in verdict.message:  # go back to the `try`, not line by line
            end = max((k for k in range(end) if lines[k].strip() == "try:"), default=end)
        while 0 < end < before and not lines[end - 1].strip():
            end -= 1
        if end <= 0:
            break
    return "", 0


# What a line of a program may begin with when no fence says where it begins.
START = re.compile(
    r"[ \t]*(?:@\w|[\"']{3}|#|(?:async )?def \w|class \w|import \w|from [\w.]+ import|print\(|[\w.]+\(.*\)|"
    r"(?:if|for|while|with)\b.*:|try:|[\w.\[\], ]+ ?[-+*/%|&]?= ?\S|(?:>>>|In \[\d+\]:) )"
)


def runs(text: str, compiler: Compiler, most=12) -> list[str]:
    """Maximal runs of lines that compile, from text where no fence (or a wrong one) marks the program."""
    lines, found, i, starts = text[-MAX_SOURCE:].split("\n"), [], 0, 0
    while i < len(lines) and len(found) < most and starts < 4 * most and not compiler.spent():
        if not START.match(lines[i][:200]):
            i += 1
            continue
        starts += 1
        indent, end, size = len(lines[i]) - len(lines[i].lstrip()), i, 0
        while end < len(lines) and size < MAX_SOURCE // 8 and not (lines[end].strip() and lines[end][:indent].strip()):
            size, end = size + len(lines[end]) + 1, end + 1
        code, used = longest_prefix(without_prompts("\n".join(line[indent:] for line in lines[i:end])), compiler)
        found += [code] if code else []
        i += max(1, used)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# recover: candidates, and which one is best


class Piece(NamedTuple):
    """A candidate that compiles. `level`: 2 a program, 1 a script that prints, 0 a stub, a test or a usage example.

    `missing`: names that it reads and neither binds anywhere nor finds among the builtins. `cost`: 0 as written,
    1 repaired, 2 cut. `rank`: 2 tagged as Python, 1 no tag, 0 bare or another tag. `order`: place in the text.
    `effects`: false for imports alone, which are kept because other candidates may need them.
    """

    code: str
    tree: ast.Module
    effects: bool
    level: int
    missing: set[str]
    cost: int
    rank: int
    order: float


def make_piece(code: str, compiler: Compiler, cost=0, rank=2, order=0.0) -> Piece | None:
    """`code` as a candidate, without the prose at its ends; None if it is none."""
    verdict = compiler.check(code)
    compiler.chars -= len(code)  # the walk below takes as long as compiling
    if not verdict.tree or compiler.spent() or verdict.reason == "vacuous" and not bound(verdict.tree.body):
        return None
    loads, stores, star = set(), {*dir(builtins), "__name__", "__file__", "__class__", "stdin", "stdout"}, False
    for node in ast.walk(verdict.tree):
        if isinstance(node, ast.Name):
            (loads if isinstance(node.ctx, ast.Load) else stores).add(node.id)
        elif isinstance(node, ast.alias):
            stores.add((node.asname or node.name).split(".")[0])
            star = star or node.name == "*"
        else:
            stores |= {name for key in ("name", "arg", "rest") if isinstance(name := getattr(node, key, None), str)}
            loads |= {node.attr} & {"stdin", "stdout"} if isinstance(node, ast.Attribute) else set()
    missing = set() if star else loads - stores
    if (trimmed := without_prose(code, verdict.tree, missing)) != code:
        return make_piece(trimmed, compiler, max(cost, 1), rank, order)
    whole = any(isinstance(n, DEFINITIONS) and not is_stub(n) and not is_test(n) for n in verdict.tree.body)
    level = 2 if whole or loads & {"input", "stdin"} else int(bool(loads & {"print", "stdout"}) and not missing)
    if not level and (rank == 0 or rank == 1 and cost == 2):
        return None
    return Piece(code, verdict.tree, verdict.reason == "ok", level, missing, cost, rank, order)


def is_stub(node) -> bool:
    """Only docstrings, `pass`, `...`, `raise NotImplementedError` and definitions of that: the prompt, echoed."""
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    if isinstance(node, DEFINITIONS):
        return all(is_stub(child) for child in node.body)
    return isinstance(node, ast.Pass) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_test(node) -> bool:
    """`class TestX` or `def test_x()`; with arguments it may well be what was asked for, `def test_prime(n)`."""
    arguments = isinstance(node, ast.FunctionDef) and (node.args.args or node.args.vararg)
    return node.name.lower().startswith("test") and not arguments


def without_prose(code: str, tree: ast.Module, missing: set[str]) -> str:
    """First and last statements that only name what nothing defines (`Done`, `Note: this`) are prose that parses."""

    def prose(statement):
        idle = isinstance(statement, ast.Expr) and not any(isinstance(n, EFFECTS) for n in ast.walk(statement))
        idle = idle or isinstance(statement, ast.AnnAssign) and not statement.value
        return idle and any(isinstance(n, ast.Name) and n.id in missing for n in ast.walk(statement))

    first, last = 0, len(tree.body)
    while first < last and prose(tree.body[first]):
        first += 1
    while first < last and prose(tree.body[last - 1]):
        last -= 1
    lines = code.split("\n")
    start = tree.body[first - 1].end_lineno if first else 0
    return "\n".join(lines[start : tree.body[last - 1].end_lineno if last < len(tree.body) else len(lines)])


def find_pieces(lines: list[str], entry_point: str | None, compiler: Compiler) -> list[Piece]:
    """Candidates in the order of the text: every block, repaired or cut; without a program in any, the whole text."""
    pieces = []

    def add(code, cost, rank):
        piece = make_piece(code, compiler, cost, rank, len(pieces))
        pieces.extend([piece] if piece else [])
        return piece

    def enough():
        return any(piece.level == 2 and (not entry_point or defines(piece.tree, entry_point)) for piece in pieces)

    for block in scan(lines, compiler):
        rank = {"python": 2, "": 1, "other": 0}[block.tag]
        code, cost = repaired(block.body, compiler)
        if cost < 2:
            add(code, max(cost, int(not block.closed)), rank)
        elif block.tag != "other" and compiler.check(block.body).reason == "syntax_error":
            for run in runs(code, compiler):
                add(run, 2, rank)
    text = "\n".join(lines)
    for span in re.findall(r"```(?:python|py)?([^`\n]+)```", text)[:8] if not enough() else []:
        add(span.strip(), 1, 1)
    if not enough():
        code, cost = repaired(text, compiler)
        for run in [code] if cost < 2 else runs(text, compiler):
            add(run, cost, 0)
        if not enough() and cost == 2 and code != text:
            for run in runs(code, compiler):
                add(run, 2, 0)
    return pieces


def merges(pieces: list[Piece], compiler: Compiler) -> list[Piece]:
    """For each program that lacks names, and each bare `main()`: it behind the candidates that define the names."""
    merged, binds = [], {id(piece): bound(piece.tree.body) for piece in pieces}  # once: each is a walk over the tree
    for piece in pieces[-16:]:
        need, chosen, own = piece.missing, [], {n.name for n in piece.tree.body if isinstance(n, DEFINITIONS)}
        if not need or piece.level < 2 and not all(map(is_start, piece.tree.body)):
            continue
        for other in sorted(pieces, key=lambda p: (p.order > piece.order, abs(p.order - piece.order))):
            names = binds[id(other)]
            # one that defines the same functions is another version of this piece, not its complement
            if names & need and not own & {n.name for n in other.tree.body if isinstance(n, DEFINITIONS)}:
                chosen.append(other)
                need = (need | other.missing) - set().union(*(binds[id(p)] for p in [*chosen, piece]))
        chosen = [*sorted(chosen, key=lambda p: p.order), piece]
        if len(chosen) > 1:
            cost, rank = max(p.cost for p in chosen), min(p.rank for p in chosen)
            order = max(p.order for p in chosen) + 0.5
            merged.append(make_piece("\n\n".join(p.code for p in chosen), compiler, cost, rank, order))
    return [piece for piece in merged if piece]


def is_start(node) -> bool:
    """`main()`, also under `if __name__ == "__main__":`."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.left, ast.Name):
        return node.test.left.id == "__name__" and all(map(is_start, node.body))
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args and not call.keywords


WHY = (
    "does not define the entry point",
    "is less of a program (a usage example, a test, a stub)",
    "lacks names that it uses",
    "is a stub or a method without its class",
    "is repaired or cut",
    "is in no Python fence",
    "comes earlier",
)


def score(piece: Piece, entry_point: str | None) -> tuple:
    """Larger is better; what a smaller value means is in WHY."""
    odd = any(isinstance(node, DEFINITIONS) and is_stub(node) or isinstance(node, ast.FunctionDef)
              and node.args.args and node.args.args[0].arg == "self" for node in piece.tree.body)  # fmt: skip
    entry = bool(entry_point) and defines(piece.tree, entry_point)
    return entry, piece.level, not piece.missing, not odd, -piece.cost, piece.rank > 0, piece.order


def explain(piece: Piece, scored: tuple, best: tuple) -> str:
    """One line for a candidate: that it won, or the first respect in which its score is worse than the best."""
    pairs = zip(WHY, scored, best, strict=True)
    why = next(("lost: it " + why for why, one, other in pairs if one != other), "won")
    return f"candidate {piece.order + 1:g} {why}: {piece.code.strip()[:60]!r}"


# ----------------------------------------------------------------------------------------------------------------------
# fuzzing, measurement, command line


def hostile(rng: random.Random, programs: list[str]) -> str:
    """A response nobody would write: program text and fences, cut, repeated, nested, with odd characters."""
    parts = [
        "```", "```python\n", "\n```\n", "~~~", "<think>", "</think>", "\x00", "\ud800", "\f", "\t", "\r\n", "\u2028",
        '"""', "'", "\\", "(", "[", "{", "finally:", "try:\n", "lambda:", "not ", "- ", "\u201c", ">>> ", "1: ", "%x",
        "if x:", "\n    ", "x = 1\n", "def f():\n", "return", "\\d", "é", "0x", "9" * 50, ":=", "*", "prose ", "&lt;",
        "\ufeff", "> ", "class A:0\n", "with a: ", "match x:\n", "async ", "f'{", "@a\n", ";", "main()\n", "Done\n",
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
            start, entry_point = time.process_time(), rng.choice((None, "f", "Solution.f"))
            code, reason = extract_code(text, mode, entry_point)
            slowest = max(slowest, time.process_time() - start)
            tally[f"{mode} {reason}"] = tally.get(f"{mode} {reason}", 0) + 1
            assert reason in REASONS and (code is not None) == (reason == "ok"), (text, mode, code, reason)
            if code is not None and mode in ("strict", "recover"):
                verdict = Compiler().check(code)
                assert verdict.reason == "ok", (text, mode, code)
                assert not entry_point or defines(verdict.tree, entry_point), (text, mode, code)
    return {"slowest_s": round(slowest, 3), **dict(sorted(tally.items()))}


def garblings(code: str, rng: random.Random) -> dict[str, tuple[str, str]]:
    """{kind: (response, program that must come back)} for a known program; the known truth of --measure."""
    lines = code.split("\n")
    fenced = f"```python\n{code}\n```"
    cut = code[: rng.randint(len(code) // 3, len(code) - 1)]
    kept = cut.split("\n")
    while kept and Compiler().check("\n".join(kept)).tree is None:
        kept.pop()
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
        "indented, no fence": (f"The function:\n\n{textwrap.indent(code, '    ')}\n\nIt runs in linear time.", code),
        "line numbers": ("```\n" + "\n".join(f"{n:3d}  {line}" for n, line in enumerate(lines, 1)) + "\n```", code),
        "doctest": (f"```python\n{doctest}\n```", code),
        "smart quotes": (fenced.replace('"', "\u201d").replace("'", "\u2019"), code),
        "prose in the fence": (f"```python\n{code}\n\nThis function returns the result.\n```", code),
        "magics": (f"```python\n%matplotlib inline\n!pip install numpy\n{code}\n```", code),
        "truncated": (f"Here:\n```python\n{cut}", "\n".join(kept)),
    }


def measure(path: str) -> None:
    """Prints the share of programs found, per mode: known ones garbled, compared as syntax trees, or real responses."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for number, row in enumerate(rows, 1):
        value = row.get("code", row.get("response")) if isinstance(row, dict) else None
        if not isinstance(value, str) or "code" in row and len(value) < 2:
            raise ValueError(f"row {number} is {row!r:.80}")
    hits, wrong, counts, seconds = {}, dict.fromkeys(MODES, 0), {}, dict.fromkeys(MODES, 0.0)
    for number, row in enumerate(rows):
        if "code" in row:
            cases = garblings("\n".join(split_lines(row["code"])).strip("\n"), random.Random(number))
        else:
            cases = {row.get("shape", "response"): (row["response"], None)}
        for kind, (text, truth) in cases.items():
            known = Compiler().check(truth) if truth is not None else None
            if known and known.reason != "ok":
                continue  # cut so early that no program is left
            counts[kind] = counts.get(kind, 0) + 1
            for mode in MODES:
                start = time.perf_counter()
                code = extract_code(text, mode).code
                seconds[mode] += time.perf_counter() - start
                back = Compiler().check(code).tree if code is not None else None
                same = back is not None and (known is None or ast.dump(back) == ast.dump(known.tree))
                hits[kind, mode] = hits.get((kind, mode), 0) + same
                wrong[mode] += code is not None and not same
    calls = sum(counts.values())
    if not calls:
        raise ValueError("no row holds a program")
    print(f"{'response':28}{'n':>6}" + "".join(f"{mode:>10}" for mode in MODES))
    for kind, n in counts.items():
        print(f"{kind:28}{n:6}" + "".join(f"{hits[kind, mode] / n:10.3f}" for mode in MODES))
    print(f"{'another text or no program':34}" + "".join(f"{wrong[mode] / calls:10.3f}" for mode in MODES))
    print(f"{'responses per second':34}" + "".join(f"{calls / seconds[mode]:10.0f}" for mode in MODES))


def main() -> None:
    args = parse_args(Args, positional="file")
    if args.mode not in MODES:
        raise UserError(f"mode {args.mode!r}: expected one of {', '.join(MODES)}; change --mode")
    if args.fuzz:
        return print(json.dumps(fuzz(args.fuzz), indent=1))
    try:
        if args.measure:
            return measure(args.measure)
        if args.file == "-":
            raw = sys.stdin.buffer.read()
        else:
            with open(args.file, "rb") as file:
                raw = file.read()
    except (OSError, ValueError, KeyError, RecursionError) as error:
        wanted = "rows with `code` or `response`" if args.measure else "a text file"
        raise UserError(f"{args.measure or args.file}: {error!r}; expected {wanted}") from error
    log: list[str] = []
    code, reason = extract_code(raw.decode("utf-8", "replace"), args.mode, args.entry_point, log)
    if args.explain:
        print("\n".join(log) or "no candidates", file=sys.stderr)
    if code is None:
        print(reason, file=sys.stderr)
        sys.exit(1)
    sys.stdout.buffer.write(code.encode("utf-8", "replace") + b"\n")


if __name__ == "__main__":
    run_cli(main)
