"""The one Python program in a model's answer, or the reason why there is none.

    python extract.py answer.txt                   # prints the program; or the reason, and exit 1
    python extract.py --mode recover -             # reads stdin
    python extract.py --entry-point Solution.add answer.txt     # the program must define it

Each takes a tenth of a second. Four modes:

  strict   training: exactly one fenced block is a Python program; thoughts are taken out
  paper    the reward rule of the released CodeScaler: one match of one expression, parsed
  last     its evaluation rule: the last match of the same expression, not parsed
  recover  test time: the best program anywhere in the text, repaired where it is broken

Nothing here runs the program; Python's own compiler decides what a program is. Every string gets an
answer after a bounded amount of work, the same one on a fast and on a slow machine.
"""

import ast
import builtins
import keyword
import re
import sys
import textwrap
import threading
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from common import UserError, check_choice, parse_args, run_cli

MODES = ("paper", "last", "strict", "recover")
REASONS = (
    "ok", "empty", "no_block", "many_blocks", "unclosed", "not_python", "syntax_error", "vacuous",
    "no_entry_point", "too_large",
)  # fmt: skip
MAX_SOURCE = 100_000  # characters of a program: 6 for each token of the longest answers, 16384
MAX_COMPILED = 300_000  # characters compiled in one call; the slowest 100,000 take under 2 s
ATTEMPT = 1000  # characters that a compilation counts for besides its own
MAX_EMITTED = 500_000  # statements that the compiler may emit, see emitted()
MAX_BLOCKS = 1000  # fenced blocks in an answer, and fences in a block, that are looked at
MAX_FENCE_LINE = 1000  # characters; a longer line is no fence
CUT = "\0"  # stands for what no program may hold: a lone surrogate, a thought taken out of a block


@dataclass
class Args:
    file: str = "-"  # a model's answer; - is stdin
    mode: str = "strict"  # paper, last, strict or recover
    entry_point: str = ""  # f or Solution.method that the program must define (strict, recover)


class Extraction(NamedTuple):
    """`code` is None unless `reason` is "ok"."""

    code: str | None
    reason: str


def extract_code(text: str, mode: str = "strict", entry_point: str | None = None) -> Extraction:
    r"""text -> the program in it, or None and why not. Never raises, whatever the text.

    entry_point: `f` or `Solution.method` that the program must define (strict, recover).
    Errors: ValueError for an unknown mode. Reasons:

      ok              there is a program: Unicode text of at most MAX_SOURCE characters
      empty           the answer is blank, or its block
      no_block        nothing is fenced
      many_blocks     more than one block is a program, or an attempt at one
      unclosed        the answer ends inside the block, or inside a thought
      not_python      the blocks are tagged as something else
      syntax_error    the block does not compile
      vacuous         it compiles and does nothing: constants, names, imports, `pass`
      no_entry_point  it does not define `entry_point`
      too_large       longer, or nested deeper, than the compiler is asked to read

    >>> extract_code("It adds:\n```python\nx = 1 + 1\n```")
    Extraction(code='x = 1 + 1', reason='ok')
    >>> extract_code("It adds: x = 1 + 1").reason
    'no_block'
    """
    if mode not in MODES:
        raise ValueError(f"extraction mode {mode!r}: expected one of {', '.join(MODES)}")
    text = re.sub("[\ud800-\udfff]", CUT, text)
    if mode == "strict":
        return extract_strict(text, entry_point, Compiler())
    if mode == "recover":
        return extract_recover(text, entry_point, Compiler())
    return extract_released(text, mode == "last")


def extract_strict(text: str, entry_point: str | None, compiler: "Compiler") -> Extraction:
    """Exactly one Python program block. Blocks in other languages don't count, nor do untagged
    blocks that are no program (output, data)."""
    if not text.strip():
        return Extraction(None, "empty")
    answer, thoughts = without_thoughts(text)
    blocks = fenced_blocks(answer, compiler)
    if not blocks:
        only_thoughts = thoughts and not answer.replace(CUT, "").strip()
        return Extraction(None, "unclosed" if only_thoughts else "no_block")
    attempts, reasons = [], set()
    for block in blocks:
        reason = block.verdict.reason
        # A block tagged as Python is an attempt even when broken: two attempts are not one answer.
        broken = block.tag == "python" and reason in ("syntax_error", "too_large")
        attempt = reason == "ok" or broken
        if not block.closed and (attempt or len(blocks) == 1 and block.tag != "other"):
            attempt, reason = True, "unclosed"
        reasons.add(reason)
        if attempt:
            attempts.append((block, reason))
    if len(attempts) > 1:
        return Extraction(None, "many_blocks")
    if compiler.left <= 0 or len(blocks) == MAX_BLOCKS:  # the blocks behind were not looked at
        return Extraction(None, "too_large")
    if not attempts:
        order = ("too_large", "syntax_error", "vacuous", "empty", "not_python")
        return Extraction(None, next(reason for reason in order if reason in reasons))
    block, reason = attempts[0]
    if reason == "ok" and entry_point and not defines(block.verdict.tree, entry_point):
        reason = "no_entry_point"
    return Extraction(block.body if reason == "ok" else None, reason)


# The reward rule and the evaluation rule of the released code (arXiv 2602.17684).
RELEASED = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)


def extract_released(text: str, last: bool) -> Extraction:
    """The released rules to the letter, but for texts that no tokenizer or sandbox takes."""
    found = RELEASED.findall(text)
    if not found:
        opened = re.search(r"```\w*\n", text)
        return Extraction(None, "unclosed" if opened else "no_block" if text.strip() else "empty")
    if len(found) > 1 and not last:
        return Extraction(None, "many_blocks")
    code = found[-1].strip()
    if last and code and len(code) <= MAX_SOURCE and CUT not in code:
        return Extraction(code, "ok")
    reason = judge(code, parse_only=True).reason
    return Extraction(code if reason == "ok" else None, reason)


# --------------------------------------------------------------------------------------------------
# is this text a program?


class Verdict(NamedTuple):
    """What the compiler says of a text."""

    reason: str
    tree: ast.Module | None = None
    line: int = 0  # of the syntax error, from 1; 0 where there is none


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# A tree that holds none of these does nothing: docstrings, constants, names, imports, `pass`.
EFFECTS = (
    *DEFINITIONS, ast.Call, ast.Assign, ast.AugAssign, ast.NamedExpr, ast.Delete, ast.Raise,
    ast.Assert, ast.Await, ast.Yield, ast.YieldFrom,
)  # fmt: skip
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
warnings_lock = threading.Lock()  # catch_warnings swaps a global, which two threads would mix up


def judge(source: str, parse_only: bool = False) -> Verdict:
    """ok, empty, vacuous, syntax_error or too_large, for any text.

    parse_only is the released rule: it accepts `return 1` at the top level, and mere prose.
    """
    if not source.strip():
        return Verdict("empty")
    if len(source) > MAX_SOURCE:
        return Verdict("too_large")
    try:
        # An invalid escape in a string only warns, but under `python -W error` would be an error.
        with warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            if parse_only:
                return Verdict("ok", tree)
            if re.search("finally|with", source) and emitted(tree) > MAX_EMITTED:
                return Verdict("too_large")
            compile(source, "<answer>", "exec", dont_inherit=True)  # `return` outside a function
    except SyntaxError as error:
        return Verdict("syntax_error", line=error.lineno or 0)
    except (RecursionError, MemoryError):  # nested too deeply for the parser or the compiler
        return Verdict("too_large")
    except Exception:  # NUL, and what another version of Python may raise
        return Verdict("syntax_error")
    effect = any(isinstance(node, EFFECTS) for node in ast.walk(tree))
    return Verdict("ok" if effect else "vacuous", tree)


def emitted(tree: ast.Module) -> int:
    """Upper bound of the statements that the compiler emits for `tree`.

    A `finally` suite is copied to every way out of its `try`: twenty nested levels are a million
    copies, so a page of source could take all memory. `with` adds its exits to each way out.
    """
    sizes, exits = {}, {}  # of each node so far: statements emitted; return, break and continue
    for node in reversed(list(ast.walk(tree))):  # children before their parents
        inner = [child for child in ast.iter_child_nodes(node) if child in sizes]
        if inner or isinstance(node, ast.stmt):
            exits[node] = sum(exits[child] for child in inner)
            exits[node] += isinstance(node, ast.Return | ast.Break | ast.Continue)
            copied = sum(sizes[child] for child in getattr(node, "finalbody", ()))
            copied += len(getattr(node, "items", ()))
            sizes[node] = 1 + sum(sizes[child] for child in inner) + copied * (1 + exits[node])
    return sizes.get(tree, 0)


class Compiler(dict):
    """source -> Verdict, within the limits of one call; the same text is compiled once."""

    left = MAX_COMPILED

    def __missing__(self, source: str) -> Verdict:
        self.left -= ATTEMPT + (len(source) if len(source) <= MAX_SOURCE else 0)
        self[source] = judge(source) if self.left > 0 else Verdict("too_large")
        return self[source]


def bound(body: list[ast.stmt]) -> set[str]:
    """Names that the statements `body` bind in their own scope, also inside if, for, try, with."""
    names, pending = set(), list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, SCOPES):
            pending += ast.iter_child_nodes(node)
    return names


def defines(tree: ast.Module, entry_point: str) -> bool:
    """Whether `tree` binds `f`, or a class `Solution` with `method`, its own or a base class's."""
    owner, _, method = entry_point.rpartition(".")
    if not owner:
        return method in bound(tree.body)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    pending = [owner] if owner in bound(tree.body) else []
    while pending:
        if found := classes.pop(pending.pop(), None):
            if method in bound(found.body):
                return True
            pending += [base.id for base in found.bases if isinstance(base, ast.Name)]
    return False


# --------------------------------------------------------------------------------------------------
# where are the fenced blocks?


class Block(NamedTuple):
    """A fenced block. `tag`: "python", "" (no info string) or "other"."""

    tag: str
    info: str  # what stands behind the opening fence
    body: str
    closed: bool  # its closing fence was found
    verdict: Verdict


# The expressions are unambiguous: none can try a long line in more ways than it has characters.
FENCE = re.compile(r"((?:[ \t>]|[-*+] |\d{1,3}[.)] )*)(`{3,}|~{3,}(?!~))([^`]*)$")
GLUED = re.compile(r"[\w+#.{}-]*$")  # what may follow a fence that opens behind prose on its line
PYTHON = re.compile(r"(?i)\W*(?:lang(?:uage)?-|code[ _-])?(?:i?python|pypy|py)[\d._]*(?![\w+#/-])")
# What Markdown may write behind the language: words, versions, file names, `{.class}`, `title="a"`.
ATTRIBUTES = re.compile(r"""(?:[\w\s.:/{},-]|(?<=\s)(?:title|file|filename|linenums)="[^"]*")*$""")


def fenced_blocks(text: str, compiler: Compiler) -> list[Block]:
    """The fenced blocks of a text in order. Markdown decides, except where Python knows better."""
    lines = text.split("\n")  # str.splitlines() would also cut at form feeds inside strings
    marks = [i for i, line in enumerate(lines) if "```" in line or "~~~" in line]
    marks = [i for i in marks if len(lines[i]) <= MAX_FENCE_LINE]
    blocks, after = [], 0
    for k, i in enumerate(marks):
        opening = opening_fence(lines[i]) if i >= after else None
        if opening and compiler.left > 0 and len(blocks) < MAX_BLOCKS:
            block, after = read_block(opening, lines, marks[k : k + MAX_BLOCKS], compiler)
            blocks.append(block)
    return blocks


def opening_fence(line: str) -> tuple[str, str, str] | None:
    """(prefix, fence, info) if the line opens a block: a Markdown fence, or one behind prose."""
    if mark := FENCE.match(line):
        return mark[1], mark[2], mark[3].strip()
    before, fence, info = line.rpartition("```")
    glued = fence and "`" not in before and GLUED.match(info.strip())
    return ("", fence, info.strip()) if glued else None


def language(info: str) -> tuple[str, str]:
    """Info string -> (tag, code): models also write the first statement on the fence line."""
    if not (mark := PYTHON.match(info)):
        return "other" if info else "", ""
    rest = info[mark.end() :]
    words = re.findall(r"\w+", rest) or [""]
    if ATTRIBUTES.match(rest) and not keyword.iskeyword(words[0]):
        return "python", ""
    return ("python", rest.strip()) if rest[0].isspace() else ("other", "")


def read_block(opening, lines, marks, compiler) -> tuple[Block, int]:
    """(the block that opens on line `marks[0]`, the line to go on from); `marks`: fence lines.

    The first bare fence of the same kind ends it, and so does another opening fence (the block was
    never closed). Two exceptions, both only where the program they give compiles: a fence inside a
    triple-quoted string does not end the block, and a fence behind code on its line does.
    """
    prefix, fence, info = opening
    tag, code = language(info)
    closing = re.compile(rf"[ \t>]*{fence}{fence[0]}*(?!{fence[0]})([^`]*)$")
    tails = [(j, mark[1].strip()) for j in marks[1:] if (mark := closing.match(lines[j]))]
    # (line behind the body, line to go on from, whether it is closed, code before the fence)
    ends = [(j, j + (not tail), not tail, "") for j, tail in tails if GLUED.match(tail)][:8]
    ends.append((len(lines), len(lines), False, ""))
    inside = lines[marks[0] + 1 : ends[0][0]]
    if not any('"""' in line or "'''" in line for line in inside):
        ends = ends[:1]
    inner = [j for j in marks[1:] if fence in lines[j] and j <= ends[0][1]]
    for j in inner[:4] if tag != "other" else []:
        head, _, tail = lines[j].partition(fence)
        if compiler[tail.strip()].reason != "ok":  # else a statement would be lost
            ends.append((j, j + 1, True, head.strip(" \t>") and head))
    first = None
    for end, after, closed, head in ends:
        body = dedented(lines[marks[0] + 1 : end] + [head] * bool(head), prefix)
        body = f"{code}\n{body}" if code else body
        verdict = compiler[body] if tag != "other" else Verdict("not_python")
        block = Block(tag, info, body, closed, verdict), after
        first = first or block
        if verdict.reason != "syntax_error":
            return block if verdict.tree else first
    return first


def dedented(lines: list[str], prefix: str) -> str:
    """A block's body without the indentation or the `>` of its opening fence, as in Markdown; no
    line loses more than the first one has."""
    if ">" in prefix:
        return "\n".join(re.sub(r"^[ \t]{0,3}> ?", "", line) for line in lines).strip("\n")
    first = next((line for line in lines if line.strip()), "")
    width = min(len(prefix), indentation(first))
    return "\n".join(line[min(width, indentation(line)) :] for line in lines).strip("\n")


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


# A whole fenced block, a thought, or the end of a thought that began in the prompt. In a block, or
# in quotes, a tag is text.
NOT_QUOTED = r"""(?:(?<!['"`])|(?<=`)(?=</\w+>(?!`)))"""
THOUGHT = re.compile(
    r"(?ims)(?P<block>^[ \t>]*(`{3,9}(?!`)|~{3,9}(?!~))[^`\n]*$"
    r"(?:(?!^[ \t>]*\2[^`\s]).)*?^[ \t>]*\2[ \t]*$)|"
    rf"{NOT_QUOTED}<(think|thinking|thought|reasoning)>.*?(?:{NOT_QUOTED}</\3>|\Z)|"
    rf"(?P<end>{NOT_QUOTED}</(?:think|thinking|thought|reasoning)>)"
)


def without_thoughts(text: str) -> tuple[str, str]:
    """(answer, thoughts): `<think>` ... `</think>` taken out. One never closed lasts to the end.
    The ends of lines are those of Unix."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    answer, thoughts, after = [], [], 0
    tags = re.search("(?i)</?(?:think|thought|reasoning)", text)
    for part in THOUGHT.finditer(text) if tags else ():
        answer.append(text[after : part.start()])
        after = part.end()
        if part["block"] or part["end"] and thoughts:
            answer.append(part[0])
        elif part["end"]:
            answer, thoughts = [], [text[:after]]
        else:
            answer.append(f"\n{CUT}\n")  # no program goes on behind a thought
            thoughts.append(part[0])
    return "".join(answer) + text[after:], "\n".join(thoughts)


# --------------------------------------------------------------------------------------------------
# recover: the best program anywhere


class Candidate(NamedTuple):
    """A text that compiles."""

    code: str
    tree: ast.Module
    level: int  # 2 a program, 1 a script that prints, 0 a stub, test or usage example, -1 imports
    missing: set[str]  # names that it reads and nobody binds
    binds: set[str]  # names that its top level binds
    whole: bool  # not cut
    order: float  # place in the text


def extract_recover(text: str, entry_point: str | None, compiler: Compiler) -> Extraction:
    """What `strict` finds if that is a program; else the best candidate of the answer, of the
    thoughts."""
    code, reason = extract_strict(text, entry_point, compiler)
    strict = read_candidate(code, compiler, True, 0) if code is not None else None
    if strict and strict.code == code and strict.level == 2 and not strict.missing:
        return Extraction(code, "ok")

    def score(one):
        entry = bool(entry_point) and defines(one.tree, entry_point)
        return entry, one.level, not one.missing, one.whole, one.order

    for part in without_thoughts(text):
        found = candidates(part, compiler)
        found += [both for one in found[-16:] if (both := merged(one, found, compiler))]
        best = max((one for one in found if one.level >= 0), key=score, default=None)
        if best and (not entry_point or defines(best.tree, entry_point)):
            return Extraction(best.code, "ok")
        reason = "no_entry_point" if best else reason
    return Extraction(code, "syntax_error" if reason == "many_blocks" else reason)


def candidates(text: str, compiler: Compiler) -> list[Candidate]:
    """Every block, repaired or cut; where none of them is a program, the whole text."""
    found = []

    def add(segment, may_cut, least):
        for code, whole in programs(segment, compiler, may_cut):
            one = read_candidate(code, compiler, whole, len(found))
            found.extend([one] if one and one.level >= least else [])

    for block in fenced_blocks(text, compiler):
        if block.tag == "other":  # code on the fence line, or a wrong tag
            add(f"{block.info}\n{block.body}", False, 1)
            add(block.body, False, 1)
        else:
            broken = block.verdict.reason == "syntax_error"
            add(block.body, broken, 1 if broken and not block.tag else -1)
    if not any(one.level == 2 for one in found):
        for span in re.findall(r"```(?:python|py)?([^`\n]+)```", text)[:8]:
            add(span.strip(), False, 0)
        add(text, True, 1)
    return found


# What a line of a program may begin with where no fence says where it begins.
START = re.compile(
    r"[ \t]*(?:@\w|[\"']{3}|#|(?:async )?def \w|class \w|import \w|from [\w.]+ import|try:|"
    r"(?:if|for|while|with)\b.*:|[\w.]+\(.*\)|print\(|[\w.\[\], ]+ ?[-+*/%|&]?= ?\S)"
)


def programs(text: str, compiler: Compiler, may_cut: bool) -> list[tuple[str, bool]]:
    """[(code, whether it is whole)]: `text`, repaired until it compiles; else runs of its lines:
    from each line that may begin a program, the longest that compiles."""
    for repaired in repairs(text):
        if compiler[repaired].reason != "syntax_error":
            return [(repaired, True)]
    lines, found, i = repaired[-MAX_SOURCE:].split("\n") if may_cut else [], [], 0
    while i < len(lines) and compiler.left > 0:
        end, depth = i, indentation(lines[i])
        if START.match(lines[i][:200]):
            while end < len(lines) and CUT not in lines[end] and not lines[end][:depth].strip():
                end += 1
        while end > i:
            code = "\n".join(line[depth:] for line in lines[i:end])
            verdict = compiler[code]
            if verdict.tree:
                found.append((code, False))
                break
            end = min(end, i + (verdict.line or end)) - 1  # what goes past the error can't compile
        i = max(i + 1, end)
    return found


TYPOGRAPHY = str.maketrans("“”„‘’\u00a0\u202f\u3000–−", '"""\'\'   --', "\u200b\u200c\u200d\ufeff")
# A string or comment that ends (kept), one that does not, or text without quotes: linear.
TOKENS = re.compile(
    r"""(?s)(?P<kept>"{3}.*?(?:"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:\\[^\n]|[^"\\\n])*"|"""
    r"""'(?:\\[^\n]|[^'\\\n])*'|#[^\n]*)|"[^\n]*|'[^\n]*|[^"'#]+"""
)


def repairs(text: str):
    """`text`, then with quotes, spaces and tabs made plain outside strings, without common
    indentation, prompts of a session, numbers before every line."""
    yield text

    def plain(token):
        return token[0] if token["kept"] else token[0].translate(TYPOGRAPHY).expandtabs(4)

    yield (text := textwrap.dedent(TOKENS.sub(plain, text)))
    if text.lstrip().startswith(">>>"):
        yield (text := "\n".join(re.findall(r"(?m)^[ \t]*(?:>>>|\.\.\.) ?(.*)", text)))
    changed, count = re.subn(r"(?m)^[ \t]*\d+(?:[ \t]*[:|.)])?(?=[ \t]|$)", "", text)
    if count == sum(bool(line.strip()) for line in text.split("\n")):
        yield textwrap.dedent(changed)


def read_candidate(code: str, compiler: Compiler, whole: bool, order: float) -> Candidate | None:
    """`code` without the prose at its ends, if anything is left."""
    verdict = compiler[code]
    compiler.left -= len(code)  # the walks below take as long as compiling
    if not verdict.tree or compiler.left <= 0:
        return None
    body, reads, stores = verdict.tree.body, set(), {*dir(builtins), "__name__", "__file__"}
    for node in ast.walk(verdict.tree):
        if isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else stores).add(node.id)
        elif isinstance(node, ast.alias):
            stores.add((node.asname or node.name).split(".")[0])
        else:
            stores |= {getattr(node, key, None) for key in ("name", "arg", "rest")}
    missing = set() if "*" in stores else reads - stores
    kept = [i for i, node in enumerate(body) if not is_prose(node, missing)]
    if not kept:
        return None
    if kept[0] > 0 or kept[-1] < len(body) - 1:
        start = body[kept[0] - 1].end_lineno if kept[0] else 0
        trimmed = "\n".join(code.split("\n")[start : body[kept[-1]].end_lineno])
        if trimmed != code:  # `x = 1; Done` is one line
            return read_candidate(trimmed, compiler, whole, order)
    if "input" in reads or "stdin" in code or any(map(is_solution, body)):
        level = 2
    else:
        level = 1 if "print" in reads and not missing else -(verdict.reason == "vacuous")
    return Candidate(code, verdict.tree, level, missing, bound(body), whole, order)


def is_prose(node: ast.stmt, missing: set[str]) -> bool:
    """`Done` and `Note: this` parse, and only name what nothing defines."""
    idle = isinstance(node, ast.Expr) or isinstance(node, ast.AnnAssign) and not node.value
    inner = list(ast.walk(node)) if idle else []
    names = {one.id for one in inner if isinstance(one, ast.Name)}
    return bool(names & missing) and not any(isinstance(one, EFFECTS) for one in inner)


def is_solution(node: ast.stmt) -> bool:
    """A function or class that is no test, and no stub (the prompt, echoed)."""
    if not isinstance(node, DEFINITIONS):
        return False
    arguments = isinstance(node, ast.FunctionDef) and (node.args.args or node.args.vararg)
    test = node.name.lower().startswith("test") and not arguments  # `test_prime(n)` is none
    idle = (*DEFINITIONS, ast.Pass, ast.Raise)
    work = [
        one for one in ast.walk(node) if isinstance(one, ast.stmt) and not isinstance(one, idle)
    ]
    texts = [
        one for one in work if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
    ]
    return not test and len(work) > len(texts)


def merged(one: Candidate, found: list[Candidate], compiler: Compiler) -> Candidate | None:
    """A program that lacks names, or a bare `main()`, behind the candidates that define them."""
    calls = [node for node in ast.walk(one.tree) if isinstance(node, ast.Call)]
    start = calls and not any(call.args or call.keywords for call in calls)
    if not one.missing or one.level < 2 and not start:
        return None
    need = set().union(*(other.missing for other in found))
    own = {node.name for node in one.tree.body if isinstance(node, DEFINITIONS)}
    # one that defines the same functions is another version of this one, not its complement
    parts = [o for o in found if o.binds & need and not o.binds & own and o is not one]
    order = max(part.order for part in [*parts, one]) + 0.5
    code = "\n\n".join(part.code for part in [*parts, one])
    return read_candidate(code, compiler, one.whole, order) if parts else None


# --------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args(Args, positional="file")
    check_choice(args, mode=MODES)
    try:
        if args.file == "-":
            raw = sys.stdin.buffer.read()
        else:
            with open(args.file, "rb") as file:
                raw = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{args.file}: {error}; expected a text file, or - for stdin") from error
    code, reason = extract_code(raw.decode("utf-8", "replace"), args.mode, args.entry_point)
    if code is None:
        print(reason, file=sys.stderr)
        sys.exit(1)
    sys.stdout.buffer.write(code.encode() + b"\n")


if __name__ == "__main__":
    run_cli(main)
