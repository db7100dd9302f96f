"""The one Python program in a model's answer, or the reason why there is none. Four modes:

  strict   training: exactly one fenced block is a Python program; thoughts are taken out
  paper    the reward rule of the released CodeScaler: one match of one expression, parsed
  last     its evaluation rule: the last match of the same expression, not parsed
  recover  test time: the best program anywhere in the text, repaired where it is broken

Nothing here runs the program: Python's own compiler decides what one is. Every string gets an
answer after a bounded amount of work, the same one on a fast and on a slow machine.
"""

import ast
import builtins
import keyword
import re
import textwrap
import threading
import warnings
from typing import NamedTuple

MODES = ("paper", "last", "strict", "recover")
REASONS = (  # where no block is a program, the first of their reasons in this order is told
    "ok", "too_large", "syntax_error", "vacuous", "empty", "not_python", "no_entry_point",
    "no_block", "many_blocks", "unclosed",
)  # fmt: skip
MAX_SOURCE = 100_000  # characters of a program: 6 for each token of the longest answers, 16384
MAX_COMPILED = 300_000  # characters compiled in one call; the slowest 100,000 take under 2 s
ATTEMPT = 1000  # characters that a compilation counts for besides its own
MAX_EMITTED = 500_000  # statements that the compiler may emit, see emitted()
MAX_BLOCKS = 1000  # fenced blocks in an answer, and fences in a block, that are looked at
MAX_FENCE_LINE = 1000  # characters; a longer line is no fence
CUT = "\0"  # stands for what no program may hold: a lone surrogate, a thought taken out of a block


class Extraction(NamedTuple):
    code: str | None  # None unless `reason` is "ok"
    reason: str


def extract_code(text: str, mode: str = "strict", entry_point: str | None = None) -> Extraction:
    r"""text -> the program in it, or None and why not. Never raises, whatever the text.

    entry_point: `f` or `Solution.method` that the program must define (strict, recover).
    Errors: ValueError for an unknown mode. Reasons:

      ok              there is a program: Unicode text of at most MAX_SOURCE characters
      too_large       longer, or nested deeper, than the compiler is asked to read
      syntax_error    the block does not compile
      vacuous         it compiles and does nothing: constants, names, imports, `pass`
      empty           the answer is blank, or its block
      not_python      the blocks are tagged as something else
      no_entry_point  it does not define `entry_point`
      no_block        nothing is fenced
      many_blocks     more than one block is a program, or an attempt at one
      unclosed        the answer ends inside the block, or inside a thought

    >>> extract_code("It adds:\n```python\nx = 1 + 1\n```")
    Extraction(code='x = 1 + 1', reason='ok')
    >>> extract_code("It adds: x = 1 + 1").reason
    'no_block'
    """
    if mode not in MODES:
        raise ValueError(f"extraction mode {mode!r}: expected one of {', '.join(MODES)}")
    text = re.sub("[\ud800-\udfff]", CUT, text)
    if mode in ("paper", "last"):
        return extract_released(text, mode == "last")
    extract = extract_strict if mode == "strict" else extract_recover
    return extract(text, entry_point or "", Compiler())


# Verdicts that make a block an attempt at a program. Tagged as Python, it is one even when broken:
# two attempts are not one answer.
ATTEMPTS = {"python": ("ok", "syntax_error", "too_large"), "": ("ok",), "other": ()}


def extract_strict(text: str, entry_point: str, compiler: "Compiler") -> Extraction:
    """Exactly one Python program block. Blocks in other languages don't count, nor do untagged
    blocks that are no program (output, data)."""
    if not text.strip():
        return Extraction(None, "empty")
    answer, thoughts = without_thoughts(text)
    blocks = fenced_blocks(answer, compiler)
    if not blocks:
        only_thoughts = thoughts and not answer.replace(CUT, "").strip()
        return Extraction(None, "unclosed" if only_thoughts else "no_block")
    attempts = [block for block in blocks if block.verdict.reason in ATTEMPTS[block.tag]]
    if len(attempts) > 1:
        return Extraction(None, "many_blocks")
    if compiler.left <= 0 or len(blocks) == MAX_BLOCKS:  # the blocks behind were not looked at
        return Extraction(None, "too_large")
    block = min(attempts or blocks, key=lambda block: REASONS.index(block.verdict.reason))
    reason = block.verdict.reason
    if not block.closed and block.tag != "other" and (attempts or len(blocks) == 1):
        reason = "unclosed"
    elif reason == "ok" and not defines(block.verdict.tree, entry_point):
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
    """What the compiler says of any text. parse_only is the released rule: it accepts `return 1` at
    the top level, and mere prose."""
    if not source.strip():
        return Verdict("empty")
    if len(source) > MAX_SOURCE:
        return Verdict("too_large")
    try:
        # An invalid escape in a string only warns, but under `python -W error` would be an error.
        with warnings_lock, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
            if parse_only:
                return Verdict("ok", tree)
            if re.search("finally|with", source) and emitted(tree) > MAX_EMITTED:
                return Verdict("too_large")
            compile(source, "<answer>", "exec", dont_inherit=True)  # `return` outside a function
    except (RecursionError, MemoryError):  # nested too deeply for the parser or the compiler
        return Verdict("too_large")
    except Exception as error:  # SyntaxError, and what versions of Python raise for a NUL
        return Verdict("syntax_error", line=getattr(error, "lineno", None) or 0)
    effect = any(isinstance(node, EFFECTS) for node in ast.walk(tree))
    return Verdict("ok" if effect else "vacuous", tree)


def emitted(tree: ast.Module) -> int:
    """Upper bound of the statements that the compiler emits. It copies a `finally` suite to every
    way out of its `try`: twenty nested levels are a million copies, a page of source could take all
    memory. `with` adds its exits to each way out."""
    sizes, exits = {}, {}  # of each node so far: statements emitted; return, break and continue
    for node in reversed(list(ast.walk(tree))):  # children before their parents
        inner = list(ast.iter_child_nodes(node))
        exits[node] = isinstance(node, ast.Return | ast.Break | ast.Continue)
        exits[node] += sum(exits[child] for child in inner)
        copied = sum(sizes[child] for child in getattr(node, "finalbody", ()))
        copied = (copied + len(getattr(node, "items", ()))) * (1 + exits[node])
        sizes[node] = isinstance(node, ast.stmt) + sum(sizes[child] for child in inner) + copied
    return sizes[tree]


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
    """Whether `tree` binds `f`, or a class `Solution` with `method`, or with a base class."""
    owner, _, method = entry_point.rpartition(".")
    if not owner:
        return not method or method in bound(tree.body)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    classes = [node for node in classes if node.name == owner and owner in bound(tree.body)]
    return any(node.bases or method in bound(node.body) for node in classes)


# --------------------------------------------------------------------------------------------------
# where are the fenced blocks?


class Block(NamedTuple):
    tag: str  # "python", "" (nothing behind the opening fence) or "other"
    info: str  # what stands behind the opening fence
    body: str
    closed: bool  # its closing fence was found
    after: int  # the line to go on from
    verdict: Verdict


# The expressions are unambiguous: none can try a long line in more ways than it has characters.
BARE = r"[\w+#.{}-]*+"  # what may follow a fence that opens a block behind prose on its line
OPENING = re.compile(  # (prefix, fence) as in Markdown, or a fence behind prose; what follows it
    r"(?:((?:[ \t>]|[-*+] |\d{1,3}[.)] )*)(`{3,}|~{3,}(?!~))|"
    rf"[^`]*(```)(?=\s*+{BARE}\s*$))([^`]*)$"
)
PYTHON = re.compile(r"(?i)\W*(?:lang(?:uage)?-|code[ _-])?(?:i?python|pypy|py)[\d._]*(?![\w+#/-])")
# What Markdown may write behind the language: words, versions, file names, `{.class}`, `title="a"`.
ATTRIBUTES = re.compile(
    rf"(?!\W*(?:{'|'.join(keyword.kwlist)})\b)"
    r"""(?:[\w\s.:/{},-]|(?<=\s)(?:title|file|filename|linenums)=(?:"[^"]*"|[\w./-]+))*$"""
)


def fenced_blocks(text: str, compiler: Compiler) -> list[Block]:
    """The fenced blocks of a text in order. Markdown decides, except where Python knows better."""
    lines = text.split("\n")  # str.splitlines() would also cut at form feeds inside strings
    marks = [i for i, line in enumerate(lines) if "```" in line or "~~~" in line]
    marks = [i for i in marks if len(lines[i]) <= MAX_FENCE_LINE]
    blocks, after = [], 0
    for k, i in enumerate(marks):
        opening = OPENING.match(lines[i]) if i >= after else None
        if opening and compiler.left > 0 and len(blocks) < MAX_BLOCKS:
            blocks.append(read_block(opening, lines, marks[k : k + MAX_BLOCKS], compiler))
            after = blocks[-1].after
    return blocks


def language(info: str) -> tuple[str, str]:
    """Info string -> (tag, code): models also write the first statement on the fence line."""
    if not (mark := PYTHON.match(info)):
        return "other" if info else "", ""
    rest = info[mark.end() :]
    if ATTRIBUTES.match(rest):
        return "python", ""
    return ("python", rest.strip()) if rest[0].isspace() else ("other", "")


def read_block(opening, lines, marks, compiler) -> Block:
    """The block that opens on line `marks[0]`; `marks`: fence lines.

    The first bare fence of the same kind ends it, and so does another opening fence (the block was
    never closed). Where that gives no program, another end counts if it does: the fence may stand
    inside a triple-quoted string, or one before it behind code on its line.
    """
    prefix, fence, info = opening[1] or "", opening[2] or opening[3], opening[4].strip()
    tag, code = language(info)
    ends, behind_code = [], []  # (line behind the body, line to go on from, head, tail)
    for j in (j for j in marks[1:] if fence in lines[j]):
        head, _, tail = lines[j].partition(fence)
        tail = tail.lstrip(fence[0]).strip()
        if not head.strip(" \t>") and re.fullmatch(BARE, tail):
            ends.append((j, j + (not tail), "", ""))
        elif not ends:
            behind_code.append((j, j + 1, head if head.strip(" \t>") else "", tail))
    ends = [*ends[:8], (len(lines), len(lines), "", "")]
    if not re.search("\"{3}|'{3}", "\n".join(lines[marks[0] + 1 : ends[0][0]])):
        ends = ends[:1]
    first = None
    for end, after, head, tail in ends + behind_code[:4]:
        if tail and compiler[tail].reason == "ok":
            continue  # a statement would be lost
        body = dedented("\n".join([*lines[marks[0] + 1 : end], head]), prefix)
        body = f"{code}\n{body}" if code else body
        verdict = compiler[body] if tag != "other" else Verdict("not_python")
        block = Block(tag, info, body, after > end, after, verdict)
        first = first or block
        if verdict.reason != "syntax_error":
            break
    return block if block.verdict.tree else first


def dedented(body: str, prefix: str) -> str:
    """`body` without the indentation or the `>` of its opening fence, as in Markdown; no line loses
    more than the first one has."""
    first = re.search(r"(?m)^([ \t]*+)(?=.*\S)", body)
    width = min(len(prefix), len(first[1])) if first else 0
    margin = r"[ \t]{0,3}> ?" if ">" in prefix else rf"[ \t]{{0,{width}}}"
    return re.sub(f"(?m)^{margin}", "", body).strip("\n")


# A fenced block, in which a tag is text; a thought; or the end of one that began in the prompt. In
# quotes a tag is text, too. (With fences of any length the work would grow with their square.)
NOT_QUOTED = r"""(?:(?<!['"`])|(?<=['"`])(?=</\w+>(?!['"`])))"""
THOUGHT = re.compile(
    r"(?ims)^[ \t>]*(`{3,20}+|~{3,20}+)[^`\n]*$(?:(?!^[ \t>]*\1[^`\s]).)*?^[ \t>]*\1[ \t]*$|"
    rf"(?P<thought>{NOT_QUOTED}<(think|thinking|thought|reasoning)>.*?(?:{NOT_QUOTED}</\3>|\Z))|"
    rf"(?P<end>{NOT_QUOTED}</(?:think|thinking|thought|reasoning)>)"
)


def without_thoughts(text: str) -> tuple[str, str]:
    """(answer, thoughts): `<think>` ... `</think>` taken out. One never closed lasts to the end.
    The ends of lines are those of Unix."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    answer, thoughts, after = [], [], 0
    for part in THOUGHT.finditer(text):
        if part["thought"]:
            answer += [text[after : part.start()], f"\n{CUT}\n"]  # no program goes on behind it
            thoughts.append(part[0])
        elif part["end"] and not thoughts:
            answer, thoughts = [], [text[: part.end()]]
        else:
            continue  # text
        after = part.end()
    return "".join(answer) + text[after:], "\n".join(thoughts)


# --------------------------------------------------------------------------------------------------
# recover: the best program anywhere


def extract_recover(text: str, entry_point: str, compiler: Compiler) -> Extraction:
    """What `strict` finds if that lacks no name; else the last program of the answer (or of the
    thoughts) that does something, behind those that bind what it lacks."""
    code, reason = extract_strict(text, entry_point, compiler)
    if code is not None and not unbound(compiler[code].tree):
        return Extraction(code, "ok")
    for part in without_thoughts(text):
        found = list(dict.fromkeys(candidates(part, compiler)[::-1]))  # each once, last one first
        fitting = [one for one in found if compiler[one].reason == "ok"]
        fitting = [one for one in fitting if defines(compiler[one].tree, entry_point)]
        if fitting:
            best = max(fitting, key=lambda one: bool(SOLVES.search(one)))
            missing = unbound(compiler[best].tree)
            for one in found:
                merged = f"{one}\n\n{best}"
                if missing & bound(compiler[one].tree.body) and compiler[merged].reason == "ok":
                    best, missing = merged, unbound(compiler[merged].tree)
            return Extraction(best, "ok")
    if reason == "many_blocks":
        reason = "no_entry_point" if entry_point else "syntax_error"
    return Extraction(code, reason)


# A function or class that is no test, or a script that reads input.
SOLVES = re.compile(r"(?im)^(?:async )?def (?!test\w*\(\))|^class (?!test)|\binput\(|\bstdin\b")


def candidates(text: str, compiler: Compiler) -> list[str]:
    """The programs in every block; where none of them solves anything, those in the whole text."""
    found = []
    for block in fenced_blocks(text, compiler):
        if block.tag == "python" or block.verdict.tree:
            found += programs(block.body, compiler)
        else:  # code on the fence line, or a wrong tag
            for body in (f"{block.info}\n{block.body}", block.body):
                found += filter(SOLVES.search, programs(body, compiler))
    if not any(map(SOLVES.search, found)):
        found += filter(SOLVES.search, programs(text, compiler))
    return found


# What a line of a program may begin with where no fence says where it begins.
START = re.compile(
    r"[ \t]*(?:[@#]|[\"']{3}|(?:async |def |class |import |from \S+ import\b)|try:|"
    r"(?:if|for|while|with)\b.*:|[\w.]+\(.*\)|[\w.\[\], ]+ ?[-+*/%|&]?= ?\S)"
)


def programs(text: str, compiler: Compiler) -> list[str]:
    """`text`, repaired until it compiles; else runs of its lines: from each line that may begin a
    program, the longest that compiles."""
    for repaired in repairs(text):
        verdict = compiler[repaired]
        if verdict.reason != "syntax_error":
            return [repaired] if verdict.tree else []
    lines, found, i = text[-MAX_SOURCE:].split("\n"), [], 0
    while i < len(lines) and compiler.left > 0:
        run, depth = [], len(lines[i]) - len(lines[i].lstrip(" \t"))
        for line in lines[i:] if START.match(lines[i][:200]) else ():
            if CUT in line or line[:depth].strip():
                break
            run.append(line[depth:])
        while run and compiler.left > 0:
            verdict = compiler["\n".join(run)]
            if verdict.tree:
                found.append("\n".join(run))
                break
            del run[min(len(run), verdict.line or len(run)) - 1 :]  # the error is not behind this
        i += len(run) or 1
    return found


TYPOGRAPHY = str.maketrans("“”„‘’\u00a0\u202f\u3000–−", '"""\'\'   --', "\u200b\u200c\u200d\ufeff")


def repairs(text: str):
    """`text`, then with plain quotes, spaces and tabs, without the prompts of a session, without
    numbers before every line."""
    yield text
    yield (text := textwrap.dedent(text.translate(TYPOGRAPHY).expandtabs(4)))
    if text.lstrip().startswith(">>>"):
        yield "\n".join(re.findall(r"(?m)^[ \t]*(?:>>>|\.\.\.) ?(.*)", text))
    changed, count = re.subn(r"(?m)^[ \t]*\d+[:|.)]?(?=[ \t]|$)", "", text)
    if count == sum(bool(line.strip()) for line in text.split("\n")):
        yield textwrap.dedent(changed)


def unbound(tree: ast.Module) -> set[str]:
    """Names that a program reads and binds nowhere."""
    reads, binds = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            reads.add(node.id)
        else:
            names = [getattr(node, key, None) for key in ("id", "name", "asname", "arg", "rest")]
            binds |= {str(name).partition(".")[0] for name in names}  # `import os.path` binds os
    return reads - binds
