"""One row a behaviour, then what holds for every string.    pytest tests/test_extract.py"""

import ast
import random
import re
import time
import warnings
from pathlib import Path

import pytest

import extract
from extract import MODES, defines, extract_code, judge

F = "def f(x):\n    return x + 1"
USE = "print(f(2))"


def fence(code, tag="python", mark="```"):
    return f"{mark}{tag}\n{code}\n{mark}"


def fences(*codes):
    return "\n".join(map(fence, codes))


DOC = 'def f(x):\n    """Example:\n\n    ```python\n    f(1)\n    ```\n    """\n    return x + 1'
STUB = 'def f(x):\n    """Adds one."""'
CALLS_G, G = "def f(x):\n    return g(x)", "def g(x):\n    return f(f(x))"
TEST = "class TestF:\n    def test_f(self):\n        assert f(1) == 2"
DOCTEST = 'def f(x):\n    """Adds one.\n\n    >>> f(1)\n    2\n    """\n    return x + 1'
CUT = "def f(x):\n    y = x\n    return y\n\ndef g(x):\n    z = (x +"

# Rows: name, response, expected: the program, or the reason why there is none.
RELEASED = [  # the released rules, to the letter: name, response, mode, expected
    ("paper trailing space after tag", fence(F, "python "), "paper", "no_block"),
    ("paper unclosed", "```python\n" + F, "paper", "unclosed"),
    ("paper two blocks", fences(F, USE), "paper", "many_blocks"),
    ("paper syntax error", fence("print 1"), "paper", "syntax_error"),
    ("paper empty", fence(""), "paper", "empty"),
    ("last takes the last", fences(F, USE), "last", USE),
    ("last does not parse", fence("print 1"), "last", "print 1"),
    ("last nul", fence("x = '\0'"), "last", "syntax_error"),
]  # fmt: skip

STRICT = [
    *[(f"tag {tag!r}", fence(F, tag), F)
     for tag in ("python", "py", "python3", "Python 3.11", "{.python}", "", "PYTHON", " python ",
     "python main.py", "py filename=a.py", 'py title="a"', "python3.11", "language-python",
     "{.python .numberLines}")],
    *[(f"other tag {tag!r}", fence(F, tag), "not_python")
     for tag in ("c++", "java", "bash", "pytb", "pyx", "text", "c++ python")],
    ("tilde", fence(F, mark="~~~"), F),
    ("fence further in than its program",
     "1. so:\n    ```python\ndef f(x):\n    return x + 1\n    ```", F),
    ("text keeps its blanks", '  ```python\nA = """a\n  b"""\n  ```', 'A = """a\n  b"""'),
    ("CRLF", fence(F).replace("\n", "\r\n") + "\r\n", F),
    ("fence behind prose", f"Answer: ```python\n{F}\n```", F),
    ("closing fence on the last line", f"```python\n{F}```\nprose", F),
    ("prose behind the closing fence", f"```python\n{F}\n``` That is all.", F),
    *[(f"whole {code!r}", fence(code) + "\nok", code)
     for code in (DOC, "x = 1\n# ends ```\n" + F, "a = '<think>'\nb = '</think>'\n" + F,
     'P = """\n</think>\n"""\n' + F, "x = 1\n\f\n" + F)],
    ("long fence around a short one", fence(DOC, mark="````"), DOC),
    ("unclosed", "```python\n" + F, "unclosed"),
    ("fence in a list item", "1. ```python\n   def f(x):\n       return x + 1\n   ```", F),
    ("end token behind the fence", f"```python\n{F}\n```<|im_end|>", F),
    ("quoted fence", "> ```python\n> x = 1\n>\n> y = x\n> ```", "x = 1\n\ny = x"),
    ("shorter fence does not close", f"`````python\n{F}\n```", "unclosed"),
    ("block of another language before it", f"```c\nint x;\n```\n{fence(F)}", F),
    ("empty", " \n", "empty"),
    ("no fence", F, "no_block"),
    ("two programs", fence(F) + fence("\n" + USE), "many_blocks"),
    ("two attempts, one broken", fences(F, "def g(:"), "many_blocks"),
    ("output does not count", fence(F) + "\n" + fence("3\n4", ""), F),
    ("thoughts do not count", f"<think>\n{fence(USE)}\n</think>\n{fence(F)}", F),
    ("thoughts opened by the prompt", f"hm\n{fence(USE)}\n</think>\n{fence(F)}", F),
    ("thought never closed", f"<think>\n{fence(F)}", "unclosed"),
    ("unclosed fence in thoughts", f"```python\nx = (\n</think>\n{fence(F)}", F),
    ("a thought that ends in a backtick", f"<think>Use `sorted`</think>\n{fence(F)}", F),
    ("a thought that ends in a quote", f"<think>It's 'a'</think>\n{fence(F)}", F),
    ("a quoted end in a thought", f"<think>No `</think>`:\n{fence(USE)}</think>\n{fence(F)}", F),
    ("an end too many", f"<think>hm</think>\n{fence(F)}\n</think>", F),
    ("a tag in prose", f"Nothing in `<think>`:\n{fence(F)}", F),
    ("a fence right behind the end", f"<think>\nhm\n</think>{fence(F)}", F),
    ("the same, begun in the prompt", f"hm\n{fence(USE)}\n</think>{fence(F)}", F),
    ("a thought behind prose", f"Okay, <think>\n{fence(USE)}\n</think>\n{fence(F)}", F),
    ("two thoughts", f"<think>a</think>So. <think>b\n{fence(USE)}\n</think>\n{fence(F)}", F),
    ("a long fence", f"{'`' * 20}python\n# <think>\n{F}\n{'`' * 20}", f"# <think>\n{F}"),
    ("a thought that ends in a fence", f"<think>\n{fence(USE)}</think>\n{fence(F)}", F),
    ("tags in capitals", f"<THINK>\n{fence(USE)}\n</THINK>\n{fence(F)}", F),
    ("lone return", fence("return 1"), "syntax_error"),
    *[(f"vacuous {code!r}", fence(code), "vacuous")
     for code in ("hello", "# a", '"""doc"""', "import os", "pass", "1 + 2", "x: int", "...",
     "if True:\n    pass")],
    ("blank block", fence("  "), "empty"),
    ("nul", fence("x = 1\0"), "syntax_error"),
    ("surrogate", fence("x = '\ud800'"), "syntax_error"),
    ("code on the fence line", "```python def f(x):\n    return x + 1\n```", F),
    ("import on the fence line", "```python import re\nx = re\n```", "import re\nx = re"),
    ("pass on the fence line", "```python while 1:\n    x = 1\n```", "while 1:\n    x = 1"),
    ("code without a tag on the fence line", "```n = 5\nprint(n)\n```", "not_python"),
    ("code on the fence line, broken", "```python def f(x:\n    return x + 1\n```", "syntax_error"),
    ("code behind the closing fence", "```python\nx = 1\n``` y = 2\n```", "syntax_error"),
    ("a thought in the block", "Ok: ```py\nx = 1\n# <think>\n# </think>\n```", "syntax_error"),
    ("too large", fence("x = 1\n" * 60_000), "too_large"),
]  # fmt: skip

RECOVER = [
    ("code on a bare fence line", "```n = input()\nprint(n)\n```", "n = input()\nprint(n)"),
    ("skips the usage block", fences(F, USE), F),
    ("the last of two programs", fences(F, F.replace("1", "2")), F.replace("1", "2")),
    ("merges what is used", fences("import re", "x = re.A"), "import re\n\nx = re.A"),
    ("merges a helper", fences(F, G), f"{F}\n\n{G}"),
    ("ignores tests", fences(F, "def test_f():\n    assert f(1) == 2"), F),
    ("cut", "```python\n" + CUT, "def f(x):\n    y = x\n    return y"),
    ("doctest", fence(">>> def f(x):\n...     return x + 1\n>>> f(1)\n2"), F + "\nf(1)"),
    ("no fence", f"This does it.\n\n{F}\n\nIt runs in linear time.", F),
    ("indented, no fence", "So:\n\n    def f(x):\n        return x + 1\n\nIt runs.", F),
    ("smart quotes", fence("x = f(\u201cy\u201d, \u2018z\u2019)"), "x = f(\"y\", 'z')"),
    ("prose behind the code in the fence", fence(F + "\n\nIt adds one."), F),
    ("magics", fence("%matplotlib inline\n!pip install numpy\n" + F), F),
    ("line numbers", fence("  1  def f(x):\n  2      return x + 1", ""), F),
    ("line numbers with colons", fence(" 9: def f(x):\n10:     return x + 1"), F),
    ("non-breaking spaces", fence("def f(x):\n\u00a0\u00a0\u00a0 return x + 1"), F),
    ("prose before the code in the fence", fence("Here is the code:\n" + F), F),
    ("the echoed stub", fences(STUB, STUB + "\n    return x"), STUB + "\n    return x"),
    ("wrong tag", fence(F, "text"), F),
    ("from thoughts only", f"<think>\n{fence(F)}", F),
    ("a second version is no helper", fences(CALLS_G, G + "\n" + CALLS_G), G + "\n" + CALLS_G),
    ("examples stay in a bare docstring", "Ok:\n" + DOCTEST + "\nThis is it.", DOCTEST),
    ("tests in a class", fences(F, TEST), F),
    ("no test", "So:\n\ndef test_prime(n):\n    pass\n\nDone.", "def test_prime(n):\n    pass"),
    ("tabs and spaces", fence("if x:\n\ty = f(x)\n    z = y"), "if x:\n    y = f(x)\n    z = y"),
    ("tabs in a string stay", fence('x = f("""\n\ty""")\n\nThat is it.'), 'x = f("""\n\ty""")'),
    ("statements without a fence", "n = input()\nprint(n)\nThis echoes.", "n = input()\nprint(n)"),
    ("one line of Java is no program", fence("int x;\nlist.add(x);", "java"), "not_python"),
    ("a setting in prose is no program", "Set\nspark.fraction=0.75\nto mend it.", "no_block"),
]  # fmt: skip

TABLE = RELEASED + [
    (f"{mode} {name}", response, mode, expected)
    for mode, rows in (("strict", STRICT), ("recover", RECOVER))
    for name, response, expected in rows
]


@pytest.mark.parametrize("name, response, mode, expected", TABLE, ids=[row[0] for row in TABLE])
def test_table(name, response, mode, expected):
    code, reason = extract_code(response, mode)
    if expected in extract.REASONS:
        assert (code, reason) == (None, expected)
    else:
        assert reason == "ok" and code.strip() == expected.strip()


SOLUTION = "class Solution:\n    def add(self, x):\n        return x + 1"
INHERITED = SOLUTION.replace("Solution", "A") + "\nclass Solution(A):\n    x = 1"
NESTED = "def g():\n    def f(): return 1\n    return f"


@pytest.mark.parametrize("entry_point, found, missed", [
    ("f", [F, "f = lambda x: x", "from re import A as f\nx = 1", "if x:\n    f = 1"],
     [NESTED, "x = [f for f in y]"]),
    ("Solution.add", [SOLUTION, INHERITED], [F, SOLUTION.replace("add", "sub")]),
    ("add", [], [SOLUTION]),
])  # fmt: skip
def test_entry_point(entry_point, found, missed):
    for mode in ("strict", "recover"):
        for code in found + missed:
            wanted = "ok" if code in found else "no_entry_point"
            assert extract_code(fence(code), mode, entry_point).reason == wanted, code


def test_entry_point_chooses_the_block():
    for name, code in (("f", F), ("g", F.replace("f(", "g("))):
        assert extract_code(fences(F, F.replace("f(", "g(")), "recover", name).code == code


def hostile(rng, programs):
    """A response nobody would write: program text and fences, cut, repeated, nested."""
    parts = [
        "```", "```python\n", "\n```\n", "~~~", "<think>", "</think>", "\x00", "\ud800", "\f", "\t",
        "\r\n", "\u2028", '"""', "'", "\\", "(", "[", "{", "finally:", "try:\n", "lambda:", "not ",
        "- ", "\u201c", ">>> ", "1: ", "%x", "if x:", "\n    ", "x = 1\n", "def f():\n", "return",
        "\\d", "é", "0x", "9" * 50, ":=", "*", "prose ", "&lt;", "\ufeff", "> ", "class A:0\n",
        "with a: ", "match x:\n", "async ", "f'{", "@a\n", ";", "main()\n", "Done\n",
    ]  # fmt: skip
    text = ""
    for _ in range(rng.randint(1, 12)):
        part = rng.choice(parts) if rng.random() < 0.7 else rng.choice(programs)
        text += part * (rng.choice((1, 1, 1, 2, 30, 300)) if len(part) < 12 else 1)
    for _ in range(rng.randint(0, 4)):  # delete, duplicate or swap a span
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[b:] + text[:a]))[:20_000]
    return text


def released_rule(text):
    """The reward rule of the released code, written out again from its description."""
    found = re.findall("`{3}(?:\\w+)?\n([\\s\\S]*?)`{3}", text)
    try:
        ast.parse(found[0].strip())
    except Exception:
        return ""
    return found[0].strip() if len(found) == 1 else ""


def test_paper_agrees_with_the_released_rule():
    rng = random.Random(1)
    responses = [row[1] for row in TABLE if "large" not in row[0]]
    responses += [fence(code, tag) for tag in ("java", "", "python \n") for code in (F, "return 1")]
    responses += [hostile(rng, responses) for _ in range(1500)]
    assert sum(bool(released_rule(text)) for text in responses) > 30
    for text in responses:
        assert (extract_code(text, "paper").code or "") == released_rule(text), text


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_hostile_texts_keep_the_contract(count):
    source = Path(extract.__file__).read_text(encoding="utf-8")
    programs = [source[i : i + 700] for i in range(0, len(source) - 700, 700)]
    rng = random.Random(0)
    for text in (hostile(rng, programs) for _ in range(count)):
        for mode in MODES:
            entry_point = rng.choice((None, "f", "Solution.f"))
            start = time.process_time()
            code, reason = extract_code(text, mode, entry_point)
            assert time.process_time() - start < 5, (text, mode)
            assert reason in extract.REASONS and (code is not None) == (reason == "ok"), text
            if code is not None and mode in ("strict", "recover"):
                verdict = judge(code)
                assert verdict.reason == "ok" and defines(verdict.tree, entry_point or ""), text


def nested_finally(depth):
    lines = [line for i in range(depth) for line in (" " * i + "try: pass", " " * i + "finally:")]
    return "\n".join([*lines, " " * depth + "x = 1"])


HUGE = {
    "backticks": "`" * 10_000_000, "nul": "\0" * 3_000_000, "brackets": fence("(" * 100_000),
    "sum": fence("x = " + "+".join("1" * 60_000)), "attributes": fence("x = a" + ".b" * 60_000),
    "finally": fence(nested_finally(19)), "opening fences": "```python\n" * 300_000,
    "code": (F + "\n") * 120_000, "prose": "if you see this: well, no.\n" * 100_000,
    # the slowest to compile of MAX_SOURCE characters; the next two need emitted()
    "classes": fence("class A:0\n" * 9_900), "fields": fence("x = f'" + "{x}" * 33_000 + "'"),
    "keywords": fence("f(" + ", ".join(f"a{i}=1" for i in range(11_000)) + ")"),
    "nested": fence(nested_finally(90)), "arguments": fence("f(" * 3000 + ")" * 3000),
    "returns": fence("def f():\n try:\n  " + "return;" * 9_000 + "\n finally:\n  " + "x;" * 18_000),
    # lines that an ambiguous expression would try in exponentially or quadratically many ways
    "bullets": ("-  " * 320 + "x```\n") * 3000, "tildes": "~" * 3_000_000 + "`\n<think>",
    "tildes2": ("~" * 990 + "`\n") * 3000,
    "open strings": fence("x = (\n" + '\\"\\\n' * 60_000), "glued fences": "x = 1 ```\n" * 300_000,
    "tags": "<think>\n</think>\n```python\n" * 110_000, "quotes": '"' * 3_000_000,
    "lines": "\n" * 3_000_000 + "x</think>" * 64, "thoughts": "<think>" * 400_000,
    "statements": (fence("x\n" * 49_000) + "\n") * 10, "comparisons": "a<b<c<d;x=1;" * 240_000,
    "lengths": "\n".join("`" * i for i in range(3, 1200)),
    "blocks": (fence(F) + "\n") * 80_000, "triple quotes": fence('"""\n') * 100_000,
    # nested deeper than the parser or the compiler takes
    "signs": fence("x = " + "-" * 90_000 + "1"), "lists": fence("x = " + "[" * 900 + "]" * 900),
    "calls": fence("x" + "()" * 40_000), "elif": fence("if a:\n x\n" + "elif a:\n x\n" * 8000),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_huge_texts_end_soon(name):
    for mode in MODES:
        start = time.process_time()  # CPU time: it does not depend on what else the machine does
        assert extract_code(HUGE[name], mode, "f").reason in extract.REASONS
        assert time.process_time() - start < 8  # 5 s is the aim; the margin is for slow processors


def test_warnings_do_not_refuse_a_program():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_code(fence("x = '\\d'"), "strict").reason == "ok"


@pytest.mark.parametrize("message", ["raise AssertionError", "unterminated string on line 3"])
def test_messages_of_the_compiler_decide_nothing(message, monkeypatch):
    """The text of an error is for people: the answers are the same whatever it says."""
    responses = [row[1:3] for row in TABLE if "large" not in row[0]]
    before = [extract_code(*row) for row in responses]

    def parse(source, parse=ast.parse):
        try:
            return parse(source)
        except SyntaxError as error:
            raise SyntaxError(message, (None, error.lineno, 0, "")) from None

    monkeypatch.setattr(ast, "parse", parse)
    assert [extract_code(*row) for row in responses] == before


def test_reasons_and_modes():
    assert not {"time", "datetime"} & vars(extract).keys()  # the same on a slow machine
    assert all(f"      {reason} " in extract_code.__doc__ for reason in extract.REASONS)
    with pytest.raises(ValueError, match="expected one of paper, last, strict, recover"):
        extract_code("", "lenient")
