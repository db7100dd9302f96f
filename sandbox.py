"""Run untrusted programs against tests and return verdicts that the program cannot forge.

    python sandbox.py --check                              # which layers hold here, tried out one by one
    python sandbox.py PROGRAM.py --tests TESTS.json        # one program; exit 0 if every test passes, 1 if not
    python sandbox.py --battery ATTACKS.jsonl              # programs with the verdict each must get, by category

A few milliseconds a program (`python bench.py sandbox` measures it); start-up is about 0.2 s, once.

    caller   holds tests and expected outputs, compares plain data      (this process: `Sandbox`, `Judge`)
      | one packet: limits + file descriptors                           <- exit status, CPU, peak memory
    server   a bare interpreter, started fresh, once per worker; reads no code, no input, no output; forks
      | fork
    program  limits -> seccomp -> compile and run; whatever it says is only a claimed answer

Promised at level "strict" (Linux 5.13 or newer, x86_64; aarch64 is written but was not run): a program sees neither the
expected outputs nor another program's data, opens no network socket, starts no process, writes no file, reads nothing
but the interpreter's libraries, signals nobody, dies at its limits and with its parent, leaves nothing behind. A layer
that is missing is an error, never a silent fallback. Level "basic" keeps the comparison in the caller and whatever
layers there are, and promises no more than another process with limits.

Not promised: safety from kernel or CPU bugs (use a virtual machine against people), from guessed or hard-coded answers
(weak tests), fair timing on a loaded machine, or that one right answer of many is recognised (no checkers).

Partial credit (`stop_early=False`) runs every test and divides by their true number. The released CodeScaler code stops
at the first failure after j passes and pays j/(j+1) whatever the number of tests (lcb_check_correctness).
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import functools
import gc
import hashlib
import json
import mmap
import os
import platform
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from common import UserError, parse_args, run_cli

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing here runs there, but importing must not fail
    fcntl = resource = None

# The file reads top down: limits and results, `Sandbox`, judging, the worker in the caller, the server, its layers, the
# program's process, the tester's process, values as data, comparison, command line.

# ----------------------------------------------------------------------------------------------------------------------
# limits and results

VERDICTS = (
    "pass", "wrong_answer", "runtime_error", "timeout", "memory", "output_limit", "syntax_error", "sandbox_violation",
    "unsupported", "harness_error",
)  # fmt: skip
MAX_EXTRA = 1 << 16  # bytes an answer may have beyond twenty times the expected one's


class SandboxError(UserError):
    """The sandbox cannot give what was asked for; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Tests:
    """How a program is checked. Cases by kind:
    "stdin":  {"input": str, "output": str}
    "call":   {"args": [...], "expected": value}, calling `entry_point` (`f`, or `Solution.method`)
    "assert": {"assert": "assert f(1) == 2"} or {"check": "def check(candidate): ..."}
    `setup` runs before the program; `time_limit` is CPU seconds a test (None: the sandbox's default)."""

    kind: str
    cases: list
    entry_point: str | None = None
    setup: str = ""
    time_limit: float | None = None


@dataclass(frozen=True)
class Limits:
    """Per test: seconds of wall clock (only stops programs that wait), seconds of CPU (decides timeouts), MiB of
    address space, MiB of output."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mb: int = 1024
    output_mb: int = 16


@dataclass
class Result:
    """`verdicts`: one word a test that was run. `pass_rate`: passes / all tests (a true rate if stop_early=False).
    `trusted`: False when a test could not be judged (unsupported, harness_error): mask such a sample, do not score it.
    `degraded`: the level was basic. `cpu_s`, `wall_s`: seconds over all tests. `detail`: about the first failure.
    `answer`: a short hash of what was printed or returned in the tests that were run, None if that is nothing or if it
    cannot be seen (a `check`): programs with equal ones answer alike."""

    passed: bool
    verdicts: list[str]
    pass_rate: float
    cpu_s: float = 0.0
    wall_s: float = 0.0
    trusted: bool = True
    degraded: bool = False
    detail: str = ""
    answer: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# the sandbox

# Each line tries something forbidden and what succeeds is printed. A name starts with the layer that should stop it.
PROBE = """
import json, os, resource, socket
temporary = input()  # the machine's folder for temporary files
def raise_limit():
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
def fork():
    if os.fork() == 0: os._exit(0)
def signal_parent():
    os.kill(os.getppid(), 0)
tries = {
    "landlock: read /etc/passwd": lambda: open("/etc/passwd"), "landlock: list /": lambda: os.listdir("/"),
    "landlock: write a temporary file": lambda: open(temporary + "/.sandbox_probe", "w"),
    "landlock: write shared memory": lambda: open("/dev/shm/.sandbox_probe", "w"),
    "seccomp: open a socket": socket.socket, "seccomp: fork": fork,
    "seccomp: signal the parent": signal_parent, "rlimits: raise a limit": raise_limit,
    "seccomp: hidden memory": lambda: os.memfd_create("x"), "seccomp: remove a file": lambda: os.unlink("/none"),
}
done = []
for name, attempt in tries.items():
    try: attempt()
    except FileNotFoundError: done.append(name)
    except (OSError, ValueError): pass
    else: done.append(name)
print(json.dumps([list(tries), done]))
"""
LAYERS = ("rlimits", "no_new_privs", "seccomp", "landlock")
_warned = False


class Sandbox:
    """A pool of servers; one worker a CPU by default. Use as `with Sandbox() as sb:`; safe to share between threads.

    Raises SandboxError if level "strict" cannot be had. `without` switches layers off, for tests of that error.
    """

    def __init__(self, workers=None, level="strict", without=(), portable=sys.platform != "linux"):
        global _warned
        level = level or ("strict" if sys.platform == "linux" else "basic")
        if level not in ("strict", "basic"):
            raise SandboxError(f"--sandbox {level}: expected strict or basic")
        if resource is None or (portable and level == "strict"):
            raise SandboxError(f"level strict needs Linux, this is {platform.system()}; choose --sandbox basic")
        self.level, self.closed = level, False
        self.count = workers or (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
        kind = PortableWorker if portable else Worker
        self.all = [(kind(level, without), kind(level, without)) for _ in range(self.count)]  # program's, tester's
        self.free = queue.LifoQueue()  # the last used is the warmest
        for pair in self.all:
            self.free.put(pair)
        try:
            self._report = self._probe()
            missing = self._report["missing"]
            if level == "strict" and missing:
                notes = "; ".join(f"{k}: {v}" for k, v in self._report["notes"].items())
                raise SandboxError(
                    f"level strict is missing {', '.join(missing)} here{f' ({notes})' if notes else ''}; "
                    "choose --sandbox basic to run with less isolation"
                )
        except BaseException:
            self.close()
            raise
        if level == "basic" and not _warned:
            _warned = True
            print(f"warning: sandbox level basic, missing: {', '.join(missing) or 'nothing'}", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.closed = True
        for pair in self.all:
            for worker in pair:
                worker.close()

    def _probe(self):
        """Start one worker and let a program try what must not work."""
        pair = self.all[0]
        worker = pair[0]
        tests = as_tests({"kind": "stdin", "cases": [{"input": "", "output": ""}]})
        try:
            worker.start()
            run = Judge(*pair, PROBE, tests, Limits(), True).run_once(tempfile.gettempdir())
            tried, done = json.loads(run.out)
        except WorkerDied as error:
            raise SandboxError(f"the sandbox server died at its first program: {error}") from None
        except ValueError:
            raise SandboxError(f"the sandbox runs no program here: {run.word} {run.err.strip()[-300:]}") from None
        notes, active = dict(worker.layers["notes"]), list(worker.layers["active"])
        for name in done:
            layer, what = name.split(": ")
            if layer in active:
                active.remove(layer)
                notes[layer] = f"did not stop: {what}"
        return {
            "level": self.level, "degraded": self.level == "basic", "layers": {k: k in active for k in LAYERS},
            "missing": [k for k in LAYERS if k not in active], "landlock_abi": worker.layers.get("landlock_abi"),
            "namespaces": worker.layers.get("namespaces", []), "attempts": {k: k not in done for k in tried},
            "notes": notes, "workers": self.count, "machine": platform.machine(),
        }  # fmt: skip

    def report(self):
        """{level, degraded, layers: {name: bool}, missing, namespaces, landlock_abi, attempts: {what: refused}, notes,
        workers, machine}."""
        return self._report

    def run(self, code, tests, limits=None, stop_early=True, repeat=1):
        """One program's Result. ValueError without tests; a program never raises.

        repeat=2 runs a passing program again: a program that passes only sometimes does not pass (detail "flaky").
        """
        tests = as_tests(tests)
        limits = limits or Limits()
        if tests.time_limit:
            limits = Limits(2 * tests.time_limit, tests.time_limit, limits.memory_mb, limits.output_mb)
        result = self._grade(code, tests, limits, stop_early)
        for _ in range(repeat - 1):
            if not result.passed:
                break
            again = self._grade(code, tests, limits, stop_early)
            again.cpu_s, again.wall_s = again.cpu_s + result.cpu_s, again.wall_s + result.wall_s
            if not again.passed:
                again.detail = f"flaky: passed once, then {again.detail}"
            result = again
        return result

    def _grade(self, code, tests, limits, stop_early):
        pair = self.free.get()
        try:
            for attempt in (1, 2):  # a server that died is replaced, once
                try:
                    result = Judge(*pair, code, tests, limits, stop_early).grade()
                    if "harness_error" not in result.verdicts:
                        break
                except (WorkerDied, SandboxError, OSError) as error:
                    if self.closed:
                        raise SandboxError("the sandbox is closed") from None
                    n = 1 if stop_early else len(tests.cases)
                    result = Result(False, ["harness_error"] * n, 0.0, trusted=False, detail=f"{error} ({attempt}x)")
        finally:
            self.free.put(pair)
        result.degraded = self.level == "basic"
        return result

    def map(self, jobs, limits=None, stop_early=True, progress=False, repeat=1):
        """[(code, tests), ...] -> [Result, ...] in the same order, over all workers."""
        jobs = list(jobs)
        for _, tests in jobs:
            as_tests(tests)
        bar = progress_bar(len(jobs), progress)
        pool = ThreadPoolExecutor(self.count)
        try:
            futures = [pool.submit(self.run, *job, limits, stop_early, repeat) for job in jobs]
            for future in as_completed(futures):
                future.result()
                bar.update()
            return [future.result() for future in futures]
        finally:  # Ctrl-C arrives here; the threads stop after the program they are at
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()


CASES = {  # what a test of a kind holds
    "stdin": {"input": "text", "output": "text"},
    "call": {"args": "list", "expected": "value"},
    "any_of": {"args": "list", "any_of": "list"},
    "assert": {"assert": "text"},
    "check": {"check": "text"},  # may take the place of an assert
}
KINDS = {"text": str, "list": list | tuple, "value": object}


def as_tests(tests):
    """Tests of problems.py, or a dict with its keys; checked, so that a mistake is not scored as a failing program."""
    if isinstance(tests, dict):
        tests = types.SimpleNamespace(**{"kind": None, "entry_point": None, "setup": "", "time_limit": None} | tests)
    cases, limit = getattr(tests, "cases", None), getattr(tests, "time_limit", None)
    if not isinstance(cases, list | tuple) or not cases:
        raise ValueError("no tests: a program without tests cannot be run for a verdict")
    if tests.kind not in ("stdin", "call", "assert"):
        raise ValueError(f"tests.kind is {tests.kind!r}, expected stdin, call or assert")
    for i, case in enumerate(cases):
        is_check = tests.kind == "assert" and isinstance(case, dict) and "check" in case
        is_any = tests.kind == "call" and isinstance(case, dict) and "any_of" in case
        wanted = CASES["check" if is_check else "any_of" if is_any else tests.kind]
        fits = (key in case and isinstance(case[key], KINDS[kind]) for key, kind in wanted.items())
        if not isinstance(case, dict) or not all(fits):
            expected = " and ".join(f"{key!r} ({kind})" for key, kind in wanted.items())
            raise ValueError(f"tests.cases[{i}] is {case!r:.80}, expected {expected}")
    for name in ("entry_point", "setup"):
        if not isinstance(getattr(tests, name), str | None):
            raise ValueError(f"tests.{name} is {getattr(tests, name)!r:.80}, expected a text")
    if limit is not None and not (isinstance(limit, int | float) and 1e-3 <= limit <= 1e5):
        raise ValueError(f"tests.time_limit is {limit!r:.80}, expected seconds")
    if tests.kind == "call" and not tests.entry_point:
        raise ValueError("tests of kind call need an entry_point")
    if not tests.entry_point and any("check" in c for c in tests.cases):
        raise ValueError("a check(candidate) test needs an entry_point")
    return tests


def progress_bar(total, shown):
    from tqdm import tqdm

    return tqdm(total=total, desc="running programs", unit="program", disable=not (shown and sys.stderr.isatty()))


# ----------------------------------------------------------------------------------------------------------------------
# judging: one suite of tests, in the caller


class Gone(Exception):
    """The process answers no more. `flooded`: because it answered too much."""

    def __init__(self, flooded=False):
        self.flooded = flooded


class Judge:
    """One program against one suite. `worker` runs the program, `tester` the code of tests that are not plain calls.
    `words` and `details` hold a verdict and its explanation by case number."""

    def __init__(self, worker, tester, code, tests, limits, stop_early):
        self.worker, self.tester, self.tests, self.stop_early = worker, tester, tests, stop_early
        self.limits = limits
        self.cpu = self.wall = 0.0
        self.words, self.details, self.answers = {}, {}, {}
        job = {"code": code, "setup": tests.setup or "", "lenient": tests.kind == "assert", "entry": tests.entry_point}
        self.job = json.dumps(job).encode()  # all that the program's process is told before it runs

    def grade(self):
        {"stdin": self.stdin, "call": self.call, "assert": self.asserts}[self.tests.kind]()
        n = len(self.tests.cases)
        done = [i for i in range(n) if i in self.words]
        failed = next((i for i in done if self.words[i] != "pass"), None)
        if self.stop_early and failed is not None:
            done = done[: done.index(failed) + 1]
        words = [self.words[i] for i in done]
        passes = words.count("pass")
        detail = "" if failed is None else f"test {failed}: {self.details[failed] or self.words[failed]}"
        detail = detail.encode("utf-8", "replace").decode()  # whoever logs it must not meet a lone surrogate
        trusted = not {"unsupported", "harness_error"} & set(words)
        answer = hashlib.sha256(repr(sorted(self.answers.items())).encode()).hexdigest()[:12] if self.answers else None
        return Result(passes == n, words, passes / n, self.cpu, self.wall, trusted, detail=detail, answer=answer)

    def said(self, i, word, text):
        """Note what the program printed or returned in a test (bytes), if it did."""
        if word in ("pass", "wrong_answer"):
            self.answers[i] = hashlib.sha256(text).hexdigest()

    def set(self, i, word, detail=""):
        """Note a verdict; False if the suite is decided."""
        self.words[i], self.details[i] = word, detail.strip()[-500:]
        return word == "pass" or not self.stop_early

    def account(self, run, out, err, tests=1):
        """Complete what the server said of a process with what it wrote."""
        cap = self.limits.output_mb << 20
        run.out = contents(out, cap)
        run.err = contents(err, 1 << 16, tail=True).decode("utf-8", "replace")
        run.flooded = run.flooded or any(os.fstat(fd).st_size >= cap for fd in (out, err))
        run.word = ending(run, self.limits, tests)
        self.cpu += run.cpu
        self.wall += run.wall
        return run

    # `stdin`: a process a test

    def run_once(self, text):
        """Run the program over one input -> Run."""
        given = text.encode("utf-8", "surrogatepass")
        with memory_files(self.job, b"", b"", given) as (job, out, err, stdin):
            self.worker.begin(RUN, [job, out, err, stdin], self.limits)
            return self.account(self.worker.finish(self.limits), out, err)

    def stdin(self):
        for i, case in enumerate(self.tests.cases):
            run = self.run_once(case["input"])
            word, detail, text = run.word, run.err, run.out.decode("utf-8", "replace")
            if not word and same_output(case["output"], text):
                word = "pass"
            elif not word:
                word, detail = "wrong_answer", f"printed {text[:200]!r}, expected {case['output'][:200]!r}"
            self.said(i, word, run.out.strip())
            if not self.set(i, word, detail):
                return

    # `call`: one process answers call after call; if one kills it, the next gets a new process

    def call(self):
        cases = enumerate(self.tests.cases)
        cases = [(i, self.tests.entry_point, c["args"], c.get("any_of", [c.get("expected")]),
                  lambda values, actual: any(same_value(v, actual) for v in values)) for i, c in cases]
        while cases:
            cases = self.calls(cases)

    def calls(self, cases):
        """cases: (number, entry point, args, expected, comparison). Returns those left when the program died in one."""
        left = list(cases)

        def say(ask):
            calls = [{"on": entry, "op": "call", "args": [encode(a) for a in args]} for _, entry, args, *_ in left]
            question = json.dumps(calls).encode()  # all at once: arguments are no secret, only expected values are
            while left:
                i, *case = left[0]
                line = ask(question)
                word, detail = judge_answer(line, *case)
                self.said(i, word, line)
                question = None
                del left[0]
                if not self.set(i, word, detail):
                    left.clear()

        run = self.talk(cases, say)
        if run and left and not self.set(left.pop(0)[0], run.word or "runtime_error", run.err):
            return []
        return left if run else []

    def talk(self, cases, say):
        """Start the program and let `say(ask)` put questions to it; `ask(line or None) -> line` raises Gone when it is
        dead. Returns its Run, or None if it was never ready for a question, which then is the verdict of all cases.
        """
        n, ready, failed, flooded = len(cases), False, None, False
        limit = self.limits.output_mb << 20
        with (
            memory_files(self.job, b"", b"", b"") as (job, out, err, clock),
            channel(patience(self.limits, n), limit) as (theirs, exchange),
        ):

            def ask(question):
                answer = exchange(question)
                os.write(clock, b".")  # from here the server counts anew: limits are a test's
                return answer

            self.worker.begin(SERVE, [job, out, err, theirs, clock], self.limits, n)
            try:
                line = ask(b"null")
                first = parse_answer(line) if len(line) <= MAX_EXTRA else None
                ready, failed = first == "ready", failure(first)
                if ready:
                    say(ask)
            except Gone as gone:
                flooded = gone.flooded
            self.worker.kill()
            run = self.worker.finish(self.limits, n)
            run.flooded = flooded
            self.account(run, out, err, n)
        if ready:
            return run
        for i, *_ in cases:
            self.set(i, *(failed or (run.word or "runtime_error", run.err)))
        return None

    # `assert`: a test file's own lines

    def asserts(self):
        simple, other = [], []
        for i, case in enumerate(self.tests.cases):
            call = as_call(case["assert"]) if "assert" in case else None
            (simple.append((i, *call)) if call else other.append((i, case)))
        while simple:
            simple = self.calls(simple)
        if self.stop_early and any(w != "pass" for w in self.words.values()):
            return
        while other:
            other = self.session(other)

    def session(self, cases):
        """The test code runs in the tester's process, the program in its own; questions and answers pass through here.
        Returns the cases left when the program died in one."""
        left, ends = list(cases), []
        run = self.talk(cases, lambda ask: ends.append(self.ask_tester(left, ask)))
        if run and left:
            tester, died = ends[0]
            word, detail = run.word or "runtime_error", run.err
            if not died:  # the test code itself did not get through
                word, detail = tester.word or "harness_error", f"the test code did not finish: {tester.err}"
            if not self.set(left.pop(0)[0], word, detail):
                return []
        return left if run else []

    def ask_tester(self, left, ask):
        """Run the test code, carry its questions to the program, take decided cases off `left`.
        Returns the tester's Run and whether the program died."""
        job = {"cases": left, "setup": self.tests.setup or "", "entry": self.tests.entry_point}
        limits, died = Limits(patience(self.limits, len(left)), self.limits.cpu_s * len(left) + 5, 2048, 16), False
        with (
            memory_files(json.dumps(job).encode(), b"", b"") as (job, out, err),
            channel(limits.wall_s + 30, 64 << 20) as (theirs, exchange),
        ):
            self.tester.begin(TEST, [job, out, err, theirs], limits)
            answer = b"null"
            with contextlib.suppress(Gone):
                while left and not died:
                    message = exchange(answer).rstrip()
                    if message.startswith(b'{"report"'):
                        (word, detail), answer = json.loads(message)["report"], b"null"
                        died = word == "dead"
                        if not died and not self.set(left.pop(0)[0], word, detail):
                            left.clear()
                    else:
                        try:
                            answer = ask(message).rstrip()
                        except Gone:
                            answer = b'{"dead": true}'
            self.tester.kill()
            run = self.tester.finish(limits)
            run.err = contents(err, 1 << 16, tail=True).decode("utf-8", "replace")
            run.word = ending(run, limits)
            return run, died


def patience(limits, tests):
    """Seconds after which the server, not the program, must be at fault."""
    return 5 * (limits.wall_s + limits.cpu_s) * tests + 30


@contextlib.contextmanager
def channel(seconds, limit):
    """A socket for a process, and `exchange(question or None) -> answer` with it, a line each way: what a program
    writes there by itself spoils an answer or is one, and nobody waits for more. No answer has over `limit` bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as reader:
        ours.settimeout(seconds)

        def exchange(question):
            theirs.close()  # the process has its copy; with ours open its end would not be seen
            try:
                if question is not None:
                    ours.sendall(question + b"\n")
                line = reader.readline(limit + 1)
            except OSError:
                raise Gone from None
            if not line.endswith(b"\n"):
                raise Gone(flooded=len(line) > limit)
            return line

        yield theirs.fileno(), exchange


def ending(run, limits, tests=1):
    """The verdict word a process's end gives, "" if it ended well. Text on stderr only ever picks among failures."""
    signal_number, code = run.status & 127, run.status >> 8
    last = run.err.strip().rsplit("\n", 1)[-1]
    if run.why == BROKEN:
        return "harness_error"
    if run.flooded or signal_number == getattr(signal, "SIGXFSZ", -1):
        return "output_limit"
    if run.why in (WALL, CPU) or run.cpu > limits.cpu_s * tests or signal_number == getattr(signal, "SIGXCPU", -1):
        return "timeout"
    if run.status == 0:
        return ""
    if last.startswith("MemoryError") or (signal_number and run.rss > 0.9 * (limits.memory_mb << 20)):
        return "memory"
    if code == EXIT_SYNTAX and not signal_number:
        return "syntax_error"
    if signal_number == signal.SIGSYS or last.startswith("PermissionError"):
        return "sandbox_violation"
    return "runtime_error"


def judge_answer(line, entry, args, expected, compare):
    """One answer of the program, which may hold anything, against its case -> (word, detail)."""
    if len(line) > MAX_EXTRA and len(line) > MAX_EXTRA + 20 * len(json.dumps(encode(expected))):
        return "wrong_answer", f"answered {len(line)} bytes"  # not worth the memory of parsing it
    answer = parse_answer(line)
    if type(answer) is not dict or "v" not in answer:
        return failure(answer)
    try:
        value = decode(answer["v"])
        if compare(expected, value):
            return "pass", ""
        return "wrong_answer", f"{entry}({str(args)[1:-1]:.200}) gave {value!r:.200}, expected {expected!r:.200}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError) as error:
        return "wrong_answer", f"not a value: {error}"


def parse_answer(line):
    """What a program claims to have answered -> data, None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def failure(answer):
    """The word for an exception that came back as data. Whatever else came back is no answer: wrong."""
    if type(answer) is not dict or type(answer.get("e")) is not str:
        return "wrong_answer", "no answer"
    word = {"MemoryError": "memory", "PermissionError": "sandbox_violation"}.get(answer["e"], "runtime_error")
    return word, f"{answer['e']}: {answer.get('m')}"


@functools.lru_cache(maxsize=1 << 16)
def as_call(text):
    """`assert f(1, 2) == 3` -> ("f", [1, 2], 3, comparison); None where the line says anything but that about literals.
    The comparison is the one that the test file's Python would make."""
    try:
        (node,) = ast.parse(text.strip()).body
        test = node.test
        if not (isinstance(node, ast.Assert) and isinstance(test, ast.Compare) and len(test.ops) == 1):
            return None
        left, right = test.left, test.comparators[0]
        if isinstance(right, ast.Call):
            left, right = right, left
        if not isinstance(left.func, ast.Name) or left.keywords:
            return None
        expected, args = ast.literal_eval(right), [ast.literal_eval(a) for a in left.args]
        encode([args, expected])
        if isinstance(test.ops[0], ast.Is) and (expected is None or isinstance(expected, bool)):
            return left.func.id, args, expected, lambda a, b: a is b
        return (left.func.id, args, expected, lambda a, b: a == b) if isinstance(test.ops[0], ast.Eq) else None
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# the caller's side of a server

# What programs of contests and textbooks import nearly always; half a program's run time would go into importing it.
PRELOAD = "collections functools heapq itertools math bisect string typing re random operator copy io".split()


class WorkerDied(Exception):
    pass


@contextlib.contextmanager
def memory_files(*contents):
    """Unnamed files in memory. A program's stdin is a regular file, since fast readers ask for its size, and so is its
    stdout: nobody needs to keep a pipe from filling, and RLIMIT_FSIZE caps a flood."""
    fds = []
    try:
        for data in contents:
            if hasattr(os, "memfd_create"):
                fds.append(os.memfd_create("io", os.MFD_CLOEXEC))
            else:
                with tempfile.TemporaryFile() as file:
                    fds.append(os.dup(file.fileno()))
            view = memoryview(data)
            while view:
                view = view[os.write(fds[-1], view) :]
            os.lseek(fds[-1], 0, os.SEEK_SET)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def contents(fd, limit, tail=False):
    size = os.fstat(fd).st_size
    return os.pread(fd, min(size, limit), max(0, size - limit) if tail else 0)


@dataclass
class Run:
    """What one process left: how it ended, what it cost (seconds, bytes), what it wrote."""

    status: int
    cpu: float
    wall: float
    rss: int
    why: int
    out: bytes = b""
    err: str = ""
    word: str = ""  # the verdict its end alone gives, "" if it ended well
    flooded: bool = False


class Worker:
    """One server process, started when first needed; `begin` a program, then `finish` it. A dead server raises
    WorkerDied and is replaced at the next `begin`."""

    def __init__(self, level, without=()):
        self.options = {
            "basic": level == "basic", "without": list(without), "readable": readable_paths(), "path": import_paths(),
            "preload": PRELOAD, "caller": os.getpid(),
        }  # fmt: skip
        self.process = self.control = None
        self.busy = False
        self.layers = {"active": ["rlimits"], "notes": {}}

    def start(self):
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The stack limit must hold before the interpreter starts: the kernel lays out memory at exec.
        first = (
            "import os,resource as r,sys\nh=r.getrlimit(r.RLIMIT_STACK)[1]\n"
            "r.setrlimit(r.RLIMIT_STACK,(1<<28 if h<0 else min(1<<28,h),h))\nos.execv(sys.executable,sys.argv[1:])"
        )
        flags = [sys.executable, "-s", "-S", "-P", "-X", "utf8"]
        source = server_source("start_server(int(sys.argv[1]), json.loads(sys.argv[2]))")
        threads = {f"{k}_NUM_THREADS": "1" for k in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        with there:
            self.process = subprocess.Popen(
                [*flags, "-c", first, *flags, "-c", source, str(there.fileno()), json.dumps(self.options)],
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads},
                pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, cwd="/", start_new_session=True,
            )  # fmt: skip
        here.settimeout(60)
        self.control = here
        hello = b""
        with contextlib.suppress(OSError):
            hello = here.recv(1 << 16)
        if not hello:
            self.process.kill()
            text = self.process.stderr.read().decode(errors="replace").strip()
            self.close()
            raise SandboxError(f"the sandbox server did not start: {text[-300:] or 'no message'}")
        self.process.stderr.close()
        self.layers = json.loads(hello)

    def close(self):
        """The server leaves at the end of its socket, and takes a running program with it; if not, it is killed."""
        if self.control:
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits on it, which close() does not
            self.control.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process, self.control, self.busy = None, None, False

    def begin(self, mode, fds, limits, tests=1):
        """Fork one program over the descriptors: job, stdout, stderr, then stdin (RUN), or socket and maybe clock."""
        if self.busy or (self.process and self.process.poll() is not None):
            self.close()  # busy: Ctrl-C came since, and the next reply would be the old program's
        if self.process is None:
            self.start()
        self.busy = True
        sizes = limits.memory_mb << 20, limits.output_mb << 20
        request = REQUEST.pack(mode, limits.cpu_s, limits.wall_s, *sizes, tests)
        try:
            socket.send_fds(self.control, [request], fds)
        except OSError as error:
            self.close()
            raise WorkerDied(str(error)) from None

    def finish(self, limits, tests=1):
        """Wait for its end -> Run."""
        try:
            self.control.settimeout(patience(limits, tests))
            reply = self.control.recv(REPLY.size)
            if len(reply) != REPLY.size:
                raise ConnectionError("the sandbox server died")
        except (OSError, AttributeError) as error:  # AttributeError: closed by another thread
            self.close()
            raise WorkerDied(str(error)) from None
        self.busy = False
        return Run(*REPLY.unpack(reply))

    def kill(self):
        """End the running program, if it has not ended."""
        with contextlib.suppress(OSError, AttributeError):  # `finish` finds out
            self.control.send(b"k")


class PortableWorker(Worker):
    """Where there is no Linux: a fresh interpreter for every program, limits, and nothing else. Slow, level basic."""

    def start(self):
        pass

    def begin(self, mode, fds, limits, tests=1):
        numbers = [mode, list(fds), limits.cpu_s * tests, limits.memory_mb << 20, limits.output_mb << 20]
        source = server_source("portable_program(*json.loads(sys.argv[1]))")
        self.close()  # what an interrupted run left
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", source, json.dumps([numbers, import_paths()])],
            env={"PATH": os.defpath}, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        )  # fmt: skip

    def finish(self, limits, tests=1):
        why = 0
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self.began > limits.wall_s * tests + 1:
                why = WALL
                self.kill()
            time.sleep(0.003)
        self.process.returncode = status
        self.process = None
        unit = 1 if sys.platform == "darwin" else 1 << 10
        wall = time.monotonic() - self.began
        return Run(status, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * unit, why)

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)  # Popen.kill() would reap it first, and with it what it cost


def readable_paths():
    """What a program may read: the interpreter's libraries, the installed packages, the C libraries, time zones."""
    paths = sysconfig.get_paths()
    keep = [paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    keep += [os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    keep += ["/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"]
    return list(dict.fromkeys(p for p in keep if os.path.exists(p)))


def import_paths():
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED")]
    return list(dict.fromkeys(p for p in [*paths, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")] if p))


SERVER_IMPORTS = (
    "import ast, atexit, builtins, contextlib, ctypes, fcntl, gc, json, mmap, os, resource, select, signal, socket, "
    "struct, sys, threading, time, types\nfrom collections import Counter\n"
    "__builtins__ = dict(vars(builtins))\n"  # ours, whatever a program puts into the module
)


@functools.cache
def server_source(last_line):
    """A program for `python -c`: the part of this file between the two INSIDE lines, so that a server is small and
    never loads the rest."""
    with open(__file__, encoding="utf-8") as file:
        inside = file.read().split("\n# INSIDE")[1].partition("\n")[2]
    return f"{SERVER_IMPORTS}{inside}\n{last_line}\n"


# INSIDE: from here to the next such line is the text of the server. It uses nothing of this file that is outside.
# ----------------------------------------------------------------------------------------------------------------------
# the server

RUN, SERVE, TEST = range(3)  # a program over one input; a program that answers calls; trusted test code
REQUEST, REPLY = struct.Struct("<iddqqi"), struct.Struct("<iddqi")
WALL, CPU, ASKED, BROKEN = 1, 2, 3, 4  # why the server killed it; BROKEN: it could not be confined
EXIT_SYNTAX = 97  # a program that exits so by itself only picks its own failure's word
MAX_SOURCE = 1 << 20  # bytes of program text
MAX_DEPTH = 100  # nesting of a value that crosses the boundary


def start_server(fd, options):
    """The outer process keeps the namespace's first process, the server, and ends when the caller has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("900")
    threading.stack_size(16 << 20)  # else every thread would take the main thread's 256 MiB of address space
    look_like_a_script(options["path"])
    for name in options["preload"]:  # imported once here, shared by every fork
        with contextlib.suppress(Exception):
            __import__(name)
    if os.getppid() != options["caller"]:
        os._exit(1)
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = namespaces(libc) if "namespaces" not in options["without"] else []
    outer = os.getpid()
    pid = os.fork()
    if pid == 0:
        libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
        if "pid" not in spaces and os.getppid() != outer:
            os._exit(1)
        serve(socket.socket(fileno=fd), {**put_on_layers(libc, options), "namespaces": spaces})
    os.close(fd)
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    while not poller.poll(1000):  # not PDEATHSIG: that fires when the caller's *thread* ends
        if os.getppid() != options["caller"]:
            os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os._exit(0)


def look_like_a_script(path):
    """What a program expects of `python main.py` and -S or -c leave out."""
    sys.path[:], sys.argv[:] = path, ["main.py"]
    for name in ("exit", "quit"):
        setattr(builtins, name, __import__("_sitebuiltins").Quitter(name, "Ctrl-D (i.e. EOF)"))


def serve(control, layers):
    """Fork a program for every packet. File descriptors pass through unread."""
    layers["pid"] = os.getpid()
    report = {k: layers[k] for k in ("active", "notes", "namespaces", "landlock_abi") if k in layers}
    control.send(json.dumps(report).encode())
    gc.collect()
    gc.freeze()  # or the first collection in each child would copy every page
    started = layers["started"]
    while True:
        packet, fds, _, _ = socket.recv_fds(control, REQUEST.size, 8)
        if not packet:
            os._exit(0)
        if len(packet) != REQUEST.size:  # the order to kill a program that was quicker
            continue
        mode, cpu_s, wall_s, memory, output, tests = REQUEST.unpack(packet)
        started[0] = 0
        pid = os.fork()
        if pid == 0:
            child(mode, fds, cpu_s * tests, memory, output, layers)
        pidfd = os.pidfd_open(pid)
        *done, why = watch(pid, pidfd, control, cpu_s, wall_s, tests, fds[4] if len(fds) > 4 else -1)
        for fd in (*fds, pidfd):
            os.close(fd)
        control.send(REPLY.pack(*done, why if started[0] else BROKEN))


def watch(pid, pidfd, control, cpu_s, wall_s, tests, progress):
    """Wait for the program; kill it at its limits, when asked to, or when the caller is gone.

    Limits count from the last question, which the caller marks by letting the file `progress` grow. A program that
    keeps using the CPU gets four times the wall limit, since a loaded machine must not decide verdicts.
    """
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(control, select.POLLIN)
    begin = mark = time.monotonic()
    clock, cpu_mark, size, why = (~pid << 3) | 2, 0.0, 0, 0
    while True:
        ready = [fd for fd, _ in poller.poll(100)]
        if pidfd in ready:
            break
        if control.fileno() in ready:
            why = ASKED
            os.kill(pid, signal.SIGKILL)
            if not control.recv(1):
                os.waitpid(pid, 0)
                os._exit(0)
            break
        try:
            cpu, now = time.clock_gettime(clock), time.monotonic()
        except OSError:  # it has just ended
            continue
        if progress >= 0 and (grown := os.fstat(progress).st_size) != size:
            size, mark, cpu_mark = grown, now, cpu
        idle = cpu - cpu_mark < 0.1 * (now - mark)
        late = now - mark > wall_s * (1 if idle else 4) or now - begin > tests * wall_s * (1 if idle else 4)
        if cpu - cpu_mark > cpu_s or cpu > tests * cpu_s or late:
            why = WALL if late and idle else CPU
            os.kill(pid, signal.SIGKILL)
            break
    _, status, usage = os.wait4(pid, 0)
    return status, usage.ru_utime + usage.ru_stime, time.monotonic() - begin, usage.ru_maxrss << 10, why


# ----------------------------------------------------------------------------------------------------------------------
# the layers: a function each, which says what it forbids


def put_on_layers(libc, options):
    """Everything that holds for all programs of this server, once. Returns what each program still needs."""
    active, notes = ["rlimits"], {name: "switched off" for name in options["without"]}
    layers = {"active": active, "notes": notes, "libc": libc, "basic": options["basic"]}
    layers["null"], layers["started"] = os.open(os.devnull, os.O_RDONLY), mmap.mmap(-1, 1)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.syscall.restype = ctypes.c_long

    def put_on(name, layer, *args):
        try:
            if name not in notes:
                layers[name] = layer(libc, *args)
                active.append(name)
        except OSError as error:
            notes[name] = str(error)

    if "rlimits" in notes:
        active.remove("rlimits")
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: or a program could open the server's descriptors through /proc
    drop_capabilities(libc)
    put_on("no_new_privs", no_new_privileges)
    put_on("landlock", landlock, options["readable"])
    put_on("seccomp", prepare_seccomp)
    layers["landlock_abi"] = layers.get("landlock")
    return layers


def namespaces(libc):
    """Forbids nothing by itself: own users, network, System V objects and process numbers, as far as the kernel lets
    us, so that there is nothing to reach. Extra, never required. Returns the names of those had."""
    user, pid, net, ipc = 0x10000000, 0x20000000, 0x40000000, 0x08000000
    uid, gid = os.getuid(), os.getgid()
    for flags, names in (
        (user | pid | net | ipc, "user pid net ipc"), (pid | net | ipc, "pid net ipc"), (user | net, "user net")
    ):  # fmt: skip
        if libc.unshare(flags) == 0:
            if flags & user:
                for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                    with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as f:
                        f.write(text)
            return names.split()
    return []


def drop_capabilities(libc):
    """Forbids what root may, in our namespace or outside: to raise limits, to step over file permissions."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24))


def no_new_privileges(libc):
    """Forbids to gain rights by executing something; the kernel asks for it before the next two layers."""
    if libc.prctl(38, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")


def landlock(libc, readable):
    """Forbids every file but those below `readable`, and those for reading only. Returns the kernel's ABI."""
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # landlock_create_ruleset, LANDLOCK_CREATE_RULESET_VERSION
    if abi < 1:
        raise OSError(ctypes.get_errno(), "no Landlock in this kernel")
    rights = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1 | ((1 << 15) if abi >= 5 else 0)
    # grown with the ABI, and an older kernel refuses unknown bits: files, then TCP, then abstract sockets and signals
    attr = struct.pack("<QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, attr, ctypes.c_size_t(len(attr)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in readable:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        right = 4 | 8 if os.path.isdir(path) else 4 | 2 if path == os.devnull else 4  # READ_FILE 4, READ_DIR 8, WRITE 2
        if libc.syscall(445, ruleset, 1, struct.pack("<Qi", right, fd), 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
        os.close(fd)
    if libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
    return abi


def limit_resources(memory, cpu_s, output, basic):
    """Forbids more address space, CPU seconds, bytes a file and open files than these, and core dumps."""
    cpu_limit = int(cpu_s) + 2  # a backstop: the server watches the CPU clock
    for what, soft in (("AS", memory), ("CPU", cpu_limit), ("FSIZE", output), ("NOFILE", 64), ("CORE", 0)):
        with contextlib.suppress(ValueError, OSError if basic else ValueError):
            limit = getattr(resource, "RLIMIT_" + what)
            hard = resource.getrlimit(limit)[1]
            soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
            resource.setrlimit(limit, (soft, soft))


def prepare_seccomp(libc):
    """Forbids every system call but those below. The filter is made here and put on by each program's process, whose
    number it then holds. Returns (filter, where the number goes, what prctl takes)."""
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64"):
        raise OSError(0, f"no system call table for {machine}")
    if libc.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        raise OSError(0, "needs no_new_privs")
    code, spots = seccomp_filter(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
    if libc.prctl(22, 2, 0, 0, 0) == 0 or ctypes.get_errno() != 14:  # EFAULT: the kernel knows filters
        raise OSError(ctypes.get_errno(), "no seccomp filters in this kernel")
    return buffer, spots, program


def put_on_seccomp(libc, prepared):
    buffer, spots, program = prepared
    for at in spots:  # "kill" and its kin only with the program's own number
        struct.pack_into("<I", buffer, at, os.getpid())
    if libc.prctl(22, 2, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


# name:x86_64[:aarch64], from the kernel's asm/unistd_64.h and asm-generic/unistd.h (the aarch64 column was not run).
# Everything else, fork, execve, socket, ptrace, unlink, memfd_create, io_uring and bpf among it, fails with EPERM.
SYSCALLS = """
read:0:63 write:1:64 open:2 close:3:57 stat:4 fstat:5:80 lstat:6 poll:7 lseek:8:62 mmap:9:222 mprotect:10:226
munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pread64:17:67 pwrite64:18:68
readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 access:21 pipe:22 select:23 sched_yield:24:124 mremap:25:216
msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33 pause:34 nanosleep:35:101 getitimer:36:102 alarm:37
setitimer:38:103 getpid:39:172 sendfile:40:71 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
shutdown:48:210 getsockname:51:204 getpeername:52:205 setsockopt:54:208 getsockopt:55:209 exit:60:93 wait4:61:260
uname:63:160 fsync:74:82 fdatasync:75:83 ftruncate:77:46 getdents:78 getcwd:79:17 readlink:89 umask:95:166
gettimeofday:96:169 getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174
getgid:104:176 geteuid:107:175 getegid:108:177 getppid:110:173 getpgrp:111 getpgid:121:155 getsid:124:156
getgroups:115:158 getresuid:118:148 getresgid:120:150 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 statfs:137:43 fstatfs:138:44 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126 gettid:186:178 time:201
futex:202:98 sched_getaffinity:204:123 epoll_create:213 getdents64:217:61
set_tid_address:218:96 restart_syscall:219:128 fadvise64:221:223 timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 exit_group:231:94 epoll_wait:232 epoll_ctl:233:21 waitid:247:95 openat:257:56
newfstatat:262:79 readlinkat:267:78 faccessat:269:48 pselect6:270:72 ppoll:271:73 set_robust_list:273:99
epoll_pwait:281:22 signalfd4:289:74 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
eventfd2:290:19 epoll_create1:291:20 dup3:292:24 pipe2:293:59 getcpu:309:168 getrandom:318:278 membarrier:324:283
copy_file_range:326:285 statx:332:291 rseq:334:293 close_range:436:436 faccessat2:439:439 arch_prctl:158
"""
# name:x86_64:aarch64 -> (argument, rule, values)
CHECKED = {
    "clone:56:220": (0, "bits", [0x10000]),  # CLONE_THREAD: threads, never processes
    "kill:62:129": (0, "self", None),
    "tgkill:234:131": (0, "self", None),
    "prctl:157:167": (0, "in", [15, 16]),  # the thread's name
    "prlimit64:302:261": (0, "in", [0]),  # of itself
    "ioctl:16:29": (1, "in", [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),  # isatty, size, FIONREAD, asyncio's
    # no F_SETOWN: the kernel would send signals in the program's name
    "fcntl:72:25": (1, "in", [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1034]),
    "socketpair:53:199": (0, "in", [1]),  # asyncio wakes itself through one; a DGRAM pair could reach any address
}
CLONE3 = "clone3:435:435"  # ENOSYS, and glibc falls back to clone, whose flags a filter can read


def syscall_number(entry, machine):
    numbers = entry.split(":")[1:]
    column = {"x86_64": 0, "aarch64": 1}[machine]
    return int(numbers[column]) if column < len(numbers) else None


def seccomp_filter(machine):
    """The filter as bytes, and the byte offsets where the program's own process number goes after the fork."""
    code, spots = [], []
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def ins(op, value, yes=0, no=0):
        code.append(struct.pack("<HBBI", op, yes, no, value))

    load, eq, ge, gt, bits, ret = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
    ins(load, 4)  # the architecture first: numbers mean nothing without it
    ins(eq, {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine], 1, 0)
    ins(ret, kill)
    ins(load, 0)
    if machine == "x86_64":  # the x32 numbers
        ins(ge, 0x40000000, 0, 1)
        ins(ret, kill)
    numbers = sorted(n for n in (syscall_number(e, machine) for e in SYSCALLS.split()) if n is not None)
    ranges = []
    for n in numbers:
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    for low, high in ranges:  # forward jumps are one byte long, so each range carries its own return
        if low == high:
            ins(eq, low, 0, 1)
        else:
            ins(ge, low, 0, 2)
            ins(gt, high, 1, 0)
        ins(ret, allow)
    ins(eq, syscall_number(CLONE3, machine), 0, 1)
    ins(ret, enosys)
    for entry, (argument, rule, values) in CHECKED.items():
        values = [0] if rule == "self" else values
        tail = 4 if entry.startswith("socketpair") else 0
        ins(eq, syscall_number(entry, machine), 0, len(values) + 3 + tail)
        ins(load, 16 + 8 * argument)
        for i, value in enumerate(values):
            if rule == "self":
                spots.append(8 * len(code) + 4)
            ins(bits if rule == "bits" else eq, value, len(values) - i, 0)
        ins(ret, eperm)
        if tail:  # the second argument too: SOCK_STREAM, whatever its flags
            ins(load, 24)
            ins(0x54, 0xF)
            ins(eq, 1, 1, 0)
            ins(ret, eperm)
        ins(ret, allow)
    ins(ret, eperm)
    return b"".join(code), spots


def child(mode, fds, cpu_s, memory, output, layers):
    """In the forked process, never returns. fds: job, stdout, stderr, then stdin (RUN), or socket and maybe clock."""
    try:
        # Out of the way first: a received number may be one that the next dup2 overwrites.
        job_fd, out, err, last = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds[:4]]
        job = json.loads(os.pread(job_fd, os.fstat(job_fd).st_size, 0))
        for source, target in ((layers["null"], 0), (out, 1), (err, 2), (last, 0 if mode == RUN else 3)):
            os.dup2(source, target)
        os.closerange(3 if mode == RUN else 4, 1 << 16)
        if "rlimits" in layers["active"]:
            limit_resources(memory, cpu_s, output, layers["basic"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a flood ends here, not in an exception it may swallow
        if layers["libc"]:
            layers["libc"].prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
            if os.getppid() != layers["pid"]:
                os._exit(1)
        if "seccomp" in layers["active"]:
            put_on_seccomp(layers["libc"], layers["seccomp"])
        layers["started"][0] = 1  # only now: else the server reports BROKEN, which a program must not be able to fake
        layers["started"].close()
    except BaseException as error:
        os.write(2, f"cannot confine the program: {error!r}".encode())
        os._exit(1)
    try:
        text = {"encoding": "utf-8", "closefd": False}
        sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", **text)
        sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", **text)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", **text)
        # Whose functions are called is imported, as a test file would: `if __name__ == "__main__":` must not run there.
        # dataclasses, typing and pickle look the program up under its name.
        module = types.ModuleType("__main__" if mode == RUN else "main")
        module.__dict__.update(__file__="main.py", __builtins__=builtins)
        sys.modules["__main__"] = sys.modules[module.__name__] = module
        (run_program, serve_calls, run_tests)[mode](job, module)
    except BaseException as error:  # the program broke what answers for it, or left it no memory
        os.write(2, type(error).__name__.encode())
    finally:
        os._exit(1)


def portable_program(numbers, path):
    """`child` where no server forked it: one program, limits and nothing else."""
    look_like_a_script(path)
    layers = {"active": ["rlimits"], "libc": None, "basic": True}
    child(*numbers, {**layers, "null": os.open(os.devnull, os.O_RDONLY), "started": mmap.mmap(-1, 1)})


# ----------------------------------------------------------------------------------------------------------------------
# the program's process: everything from here to the tester shares it with untrusted code


def load(job, module):
    """Compile and run setup and program in `module`; a program that does not compile ends the process."""
    try:
        if len(job["code"].encode("utf-8", "replace")) > MAX_SOURCE:
            raise SyntaxError("program too large")
        code = compile(job["code"].removeprefix("\ufeff"), "main.py", "exec", dont_inherit=True)
    except MemoryError:
        raise
    except Exception as error:  # ValueError: null bytes; UnicodeEncodeError: lone surrogates; RecursionError: nesting
        os.write(2, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:2000])
        os._exit(EXIT_SYNTAX)
    if job["setup"]:
        try:
            exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), module.__dict__)
        except Exception:
            if not job["lenient"]:  # MBPP: setup that uses the solution's classes; the tester runs it again
                raise
    exec(code, module.__dict__)


def run_program(job, module):
    """Run it as the interpreter would to the end: traceback, threads, atexit, flush; then the exit code."""
    code, error = 0, None
    try:
        load(job, module)
    except BaseException as e:
        frame = e.__traceback__.tb_next  # without this file's own two frames
        error = e.with_traceback(frame and frame.tb_next)
    try:
        if isinstance(error, SystemExit):
            code = error.code
            if code is not None and not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        elif error is not None:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
    for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            if stream is sys.stdout:  # what CPython exits with; it asks neither `sys.__stdout__`, which may be detached
                code = code or 120
    os._exit((code or 0) & 255)


def serve_calls(job, module):
    """Answer questions on descriptor 3 until it closes. What is not plain data stays here and goes out as a number."""
    kept, numbers = [], {}

    def keep(v):
        number = numbers.setdefault(id(v), len(kept))
        if number == len(kept):
            kept.append(v)
        return {"o": number}

    def find(on):
        return resolve(module, on, job["entry"]) if isinstance(on, str) else kept[on]

    def answer(question):
        try:
            op, name, target = question["op"], question.get("name"), find(question["on"])
            args = [decode(a, find) for a in question["args"]]
            named = {k: decode(a, find) for k, a in question.get("named", {}).items()}
            if op == "call":
                value = (getattr(target, name) if name else target)(*args, **named)
            else:
                value = getattr(target, name) if op == "get" else setattr(target, name, args[0])
            result = {"v": encode(value, keep)}
            if question.get("back"):  # what the call changed in place
                result["a"] = [encode(a, keep) for a in (*args, *named.values())]
            return result
        except BaseException as error:
            return error_answer(error)

    failed = None
    try:
        load(job, module)
    except BaseException as error:
        failed = error_answer(error)
    receive()
    send(failed or "ready")
    while not failed:
        questions = receive()
        for question in questions if isinstance(questions, list) else [questions]:
            send(answer(question))


def resolve(module, path, entry=None):
    """`f`, `Solution.method` (a new Solution each time), or a bare method name of a class Solution."""
    first, *rest = path.split(".")
    names = module.__dict__
    if first not in names and not rest and hasattr(names.get("Solution"), first):
        first, rest = "Solution", [first]
    if first not in names and first != entry and hasattr(builtins, first):
        return getattr(builtins, first)
    if first not in names:
        raise NameError(f"name {first!r} is not defined")
    target = names[first]
    for name in rest:
        target = getattr(target() if isinstance(target, type) and first == "Solution" else target, name)
    return target


def error_answer(error):
    """An exception as data: the nearest built-in class and the message."""
    kind = next((t.__name__ for t in type(error).__mro__ if t.__module__ == "builtins"), "Exception")
    try:
        message = str(error)[:2000]
    except BaseException:
        message = ""
    return {"e": kind, "m": message if type(message) is str else ""}


def send(value):
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(3, data) :]


def receive():
    data = bytearray()
    while not data.endswith(b"\n"):
        part = os.read(3, 1 << 20)
        if not part:
            os._exit(0)
        data += part
    return json.loads(data)


# ----------------------------------------------------------------------------------------------------------------------
# the tester: trusted test code in its own confined process, where the solution's names are stand-ins


class Unsupported(BaseException):
    """The test does what cannot be done with data alone."""


class Dead(BaseException):
    """The program is gone. `seen` remembers it where the test catches everything."""

    seen = False


class Remote:
    """Stands for a name of the program, or an object it kept. It yields data, and the test judges that: never is it
    itself equal to anything, true or false, since then the program would be deciding."""

    def __init__(self, on):
        object.__setattr__(self, "_on", on)

    def __call__(self, *args, **named):
        return ask(self, "call", None, args, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(f"{self._on}.{name}") if isinstance(self._on, str) else ask(self, "get", name)

    def __setattr__(self, name, value):
        ask(self, "set", name, (value,))

    def __len__(self):
        try:
            return ask(self, "call", "__len__")
        except AttributeError as error:  # what list() expects of an object without a length
            raise TypeError(str(error)) from None

    def __iter__(self):
        return ask(self, "call", "__iter__")

    def __next__(self):
        return ask(self, "call", "__next__")

    def __getitem__(self, key):
        return ask(self, "call", "__getitem__", (key,))

    def __contains__(self, value):  # by the items, not by what the object says of itself
        return any(item == value for item in self)

    def __eq__(self, other):
        if isinstance(other, Remote) and other._on != self._on:
            raise Unsupported("two of the program's own objects are compared")
        return isinstance(other, Remote)

    __hash__ = object.__hash__

    def __bool__(self):  # one bit, with which the program could as well have answered
        for name in ("__bool__", "__len__"):
            with contextlib.suppress(AttributeError):
                if type(value := ask(self, "call", name)) in (bool, int):
                    return bool(value)
                raise TypeError(f"{name} of the program's own object gave no number")
        return True

    def __str__(self):  # text, which the test compares
        return ask(self, "call", "__str__")

    def __repr__(self):
        return ask(self, "call", "__repr__")

    def __instancecheck__(self, other):
        raise Unsupported("isinstance() with a class of the program")


def ask(remote, op, name, args=(), named=None):
    def refer(v):
        if isinstance(v, Remote):
            return {"o": v._on}
        raise Unsupported(f"{type(v).__name__} is not plain data")

    given = [*args, *(named or {}).values()]
    sent = [encode(v, refer) for v in given]
    back = any(isinstance(v, list | dict | set) for v in given)
    named = dict(zip(named or (), sent[len(args) :]))
    send({"on": remote._on, "op": op, "name": name, "args": sent[: len(args)], "named": named, "back": back})
    answer = receive()
    if "dead" in answer:
        Dead.seen = True
        raise Dead
    if "e" in answer:
        kind = getattr(builtins, answer["e"], None)
        fits = isinstance(kind, type) and issubclass(kind, Exception)
        try:
            error = (kind if fits else RuntimeError)(answer["m"])
        except Exception:  # UnicodeDecodeError and its like want more than a message
            error = RuntimeError(answer["m"])
        error.from_program = answer["e"]
        raise error
    for mine, before, now in zip(given, sent, answer.get("a", ())):
        if now != before and isinstance(mine, list | dict | set):
            now = decode(now, Remote)
            if type(now) is type(mine):
                mine.clear()
                (mine.extend if isinstance(mine, list) else mine.update)(now)
    return decode(answer["v"], Remote)


def free_names(source):
    """Names that the test code uses and does not itself bind."""
    bound, used = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (used.setdefault(node.id) if isinstance(node.ctx, ast.Load) else bound.add(node.id))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return [name for name in used if name not in bound]


def test_names(source, case, entry):
    """What the test code's free names stand for. A `check` gets the program's entry point and nothing else of it: a
    helper that the program could redefine must not take part in judging it (HumanEval/32 calls `poly`)."""
    names = {"__name__": "tests", "__builtins__": builtins}
    for name in free_names(source):
        if name in sys.stdlib_module_names and name != entry:  # never the program's `math`: it could have patched that
            names[name] = __import__(name)
        elif not hasattr(builtins, name) or name == entry:
            if "check" in case and name != entry:
                raise Unsupported(f"the check uses {name}, which only the program defines; put it into the setup")
            names[name] = Remote(name)
    return names


def run_tests(job, module):
    """Send {"report": [word, message]} for each case. AssertionError of the test itself is a wrong answer; an
    exception that the program raised and the test did not expect is a runtime error."""
    receive()
    for _, case in job["cases"]:
        word, message = "pass", ""
        try:
            source = job["setup"] + "\n" + (case.get("assert") or case["check"])
            try:
                space = test_names(source, case, job["entry"])
                code = compile(source, "tests.py", "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                raise Unsupported(f"the test does not compile: {error}") from None
            exec(code, space)
            if "check" in case and "check" not in space:
                raise Unsupported("the test defines no check(candidate)")
            if "check" in case:
                space["check"](Remote(job["entry"]))
        except Unsupported as error:
            word, message = "unsupported", str(error)
        except Dead:
            pass
        except BaseException as error:
            kind = getattr(error, "from_program", None)
            word = "memory" if kind == "MemoryError" else "runtime_error" if kind else "wrong_answer"
            word = "sandbox_violation" if kind == "PermissionError" else word
            message = f"{type(error).__name__}: {error}"
        send({"report": ["dead" if Dead.seen else word, message[:500]]})
        receive()


# ----------------------------------------------------------------------------------------------------------------------
# values as JSON: plain data only, by exact type; a subclass is sent as its plain base, whatever its methods claim

PLAIN = {t.__name__: t for t in (int, float, str, bool, list, dict, tuple, set, frozenset, bytes, complex)}
# class name -> (module, type of its parts, value -> parts, of which the class makes it again)
RICH = {
    "range": ("builtins", int, lambda v: (v.start, v.stop, v.step)), "deque": ("collections", list, lambda v: ([*v],)),
    "Fraction": ("fractions", int, lambda v: (v.numerator, v.denominator)),
    "Decimal": ("decimal", str, lambda v: (str(v),)),
    "date": ("datetime", int, lambda v: (v.year, v.month, v.day)),
    "timedelta": ("datetime", int, lambda v: (v.days, v.seconds, v.microseconds)),
}  # fmt: skip


def encode(v, other=None, depth=MAX_DEPTH):
    """A value -> what json.dumps takes. `other(v)` encodes what is not plain data; without it that is a TypeError.

    encode((1, {2: "x"})) == {"t": [1, {"d": [[2, "x"]]}]}.
    """
    t = type(v)
    if v is None or t is bool or t is str:
        return v
    if t is int:
        return v if -(1 << 63) <= v < 1 << 63 else {"i": hex(v)}
    if t is float:
        return v if v - v == 0 else {"f": repr(v)}
    if depth == 0:
        raise TypeError("value nested too deeply")
    depth -= 1
    if t is list:
        return [encode(x, other, depth) for x in v]
    if t is tuple:
        return {"t": [encode(x, other, depth) for x in v]}
    if t is dict:
        return {"d": [[encode(k, other, depth), encode(x, other, depth)] for k, x in v.items()]}
    if t is set or t is frozenset:
        return {"s": [encode(x, other, depth) for x in v]}
    if t is bytes or t is bytearray:
        return {"b": bytes(v).hex()}
    if t is complex:
        return {"c": [encode(v.real), encode(v.imag)]}
    if t is type and PLAIN.get(v.__name__) is v:
        return {"T": v.__name__}
    if t.__name__ in RICH and t.__module__ == RICH[t.__name__][0]:
        return {"R": [t.__name__, encode(RICH[t.__name__][2](v), other, depth)]}
    if t.__module__ == "numpy":
        return encode(v.tolist(), other, depth)
    for base, plain in (  # the base's own methods: int.__int__ of an int subclass does not run the subclass's code
        (int, int.__int__), (float, float.__float__), (str, str.__str__),
        (list, lambda x: list(list.__iter__(x))), (tuple, lambda x: tuple(tuple.__iter__(x))),
        (dict, lambda x: dict(dict.items(x))), (set, lambda x: set(set.__iter__(x))),
        (frozenset, lambda x: set(frozenset.__iter__(x))),
    ):  # fmt: skip
        if base in t.__mro__:
            return encode(plain(v), other, depth)
    if other:
        return other(v)
    raise TypeError(f"{t.__name__} is not plain data")


def decode(v, other=None):
    """What `encode` made -> plain data. A shape that encode never makes is a ValueError (or KeyError, TypeError)."""
    if type(v) is list:
        return [decode(x, other) for x in v]
    if type(v) is not dict:
        return v
    ((tag, x),) = v.items()
    if tag == "t":
        return tuple([decode(y, other) for y in x])
    if tag == "d":
        return dict(zip(hashable([decode(k, other) for k, _ in x]), [decode(y, other) for _, y in x]))
    if tag == "s":
        return set(hashable([decode(y, other) for y in x]))
    if tag == "R":
        (module, part, _), parts = RICH[x[0]], decode(x[1], other)
        if any(type(p) is not part for p in parts):  # Fraction("1e999999999") would take for ever
            raise ValueError(f"not the parts of a {x[0]}")
        return getattr(__import__(module), x[0])(*parts)
    if tag == "o" and other:
        return other(x)
    return {"i": lambda: int(x, 16), "f": lambda: float(x), "b": lambda: bytes.fromhex(x), "T": lambda: PLAIN[x],
            "c": lambda: complex(decode(x[0]), decode(x[1]))}[tag]()  # fmt: skip


def hashable(items):
    """Elements of a set or keys of a dict. Many of one hash are refused: they would keep the caller busy for hours."""
    items = [frozenset(x) if type(x) is set else x for x in items]
    if len(items) > 1000 and max(Counter(map(hash, items)).values()) > 100:
        raise ValueError("too many elements of the same hash")
    return items


# INSIDE ends here.


# ----------------------------------------------------------------------------------------------------------------------
# comparison: plain data against plain data, in the caller

# Only text that every printer of numbers writes: no "1_0", no full-width digits, no "+7", no "007", no exponent that
# would take Decimal minutes.
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
BLANKS = re.compile(r"[ \t\v\f]+")


def close(expected, actual):
    """testlib's doubleCompare: absolute or relative 1e-6; the 1e-15 lets 0 equal a rounding error. NaN and inf fail."""
    scale = max(1, abs(expected))
    if isinstance(expected, Decimal):
        return abs(actual - expected) <= Decimal("1e-6") * scale + Decimal("1e-15")
    return abs(actual - expected) <= 1e-6 * scale + 1e-15


def same_token(expected, actual, tolerate=True):
    if expected == actual:
        return True
    if len(expected) > 400 or len(actual) > 400 or not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    if expected.lstrip("-").isdigit() or not tolerate:  # an integer is met exactly: 6.0 will do, 6.0000001 will not
        return Decimal(expected) == Decimal(actual)
    return close(Decimal(expected), Decimal(actual))


def same_output(expected, actual, tokens=False, tol=True):
    """Does printed text meet the expected text? Same lines, same blank-separated tokens; numbers by value.

    Trailing blanks, blank lines around the text and CRLF do not count; case and order do. tokens=True ignores line
    ends too; tol=False compares decimals exactly. same_output("0.333333\\n", "0.33333333") is True.
    """

    if len(actual) > MAX_EXTRA + 20 * len(expected):  # not worth the memory of cutting it into tokens
        return False

    def lines(text):
        rows = text.replace("\r\n", "\n").split("\n")  # not splitlines(): \v, \x85 and a lone \r end no line
        rows = [[t for t in BLANKS.split(row) if t] for row in rows]
        while rows and not rows[-1]:
            rows.pop()
        while rows and not rows[0]:
            rows.pop(0)
        return [[t for row in rows for t in row]] if tokens else rows

    left, right = lines(expected), lines(actual)
    return len(left) == len(right) and all(
        len(a) == len(b) and all(same_token(x, y, tol) for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def same_value(expected, actual):
    """Does a returned value (plain data, see `decode`) meet the expected one, which may come from JSON?

    Tuples equal lists, dict keys may be the JSON text of an int, floats are met to 1e-6; True is not 1, a set is not a
    list, NaN is only met by NaN. same_value([1, 0.3], (1, 0.1 + 0.2)) is True.
    """
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    if isinstance(expected, float) and isinstance(actual, float):
        both_nan = expected != expected and actual != actual
        return both_nan or expected == actual or (abs(expected) < float("inf") and close(expected, actual))
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return len(expected) == len(actual) and all(map(same_value, expected, actual))
    if isinstance(expected, dict) and isinstance(actual, dict):
        if len(expected) != len(actual):
            return False
        texts = {str(k): k for k in actual if type(k) is int and str(k) not in actual}
        keys = [k if k in actual else texts.get(k, k) if isinstance(k, str) else k for k in expected]
        return all(k in actual and same_value(e, actual[k]) for k, e in zip(keys, expected.values(), strict=True))
    if isinstance(expected, set | frozenset) and isinstance(actual, set | frozenset):
        return expected == actual
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        return expected == actual
    if isinstance(expected, int | float) and isinstance(actual, Fraction | Decimal):
        return same_value(float(expected), float(actual)) if isinstance(expected, float) else expected == actual
    return type(expected) is type(actual) and expected == actual


# ----------------------------------------------------------------------------------------------------------------------
# command line


@dataclass
class Args:
    program: str = ""  # a Python file
    tests: str = ""  # JSON file: {"kind", "cases", "entry_point"?, "setup"?, "time_limit"?}
    check: bool = False  # show which layers of isolation hold here
    battery: str = ""  # JSON lines of programs with the verdict each must get
    all: bool = False  # run every test, also after a failure
    sandbox: str = "strict"  # isolation level: strict or basic


def check():
    """Print the probe's findings. Exit code 0 if level strict holds, 1 if not."""
    global _warned
    _warned = True  # what is missing is what this prints
    with Sandbox(1, "basic") as sb:
        report = sb.report()
    holds = "does not hold" if report["missing"] else "holds"
    print(f"level strict {holds} on {platform.system()} {platform.release()} {report['machine']}")
    for name, holds in report["layers"].items():
        extra = f" (ABI {report['landlock_abi']})" if name == "landlock" and holds else ""
        note = report["notes"].get(name, "")
        print(f"  {'holds  ' if holds else 'MISSING'}  {name}{extra}{f': {note}' if note else ''}")
    print(f"  extra    namespaces: {', '.join(report['namespaces']) or 'none'}")
    for name, refused in report["attempts"].items():
        print(f"  {'refused' if refused else 'WORKED '}  {name}")
    if report["missing"]:
        print("  --sandbox basic runs with what there is")
    return 1 if report["missing"] else 0


def battery(path, level):
    """Run rows {id, category, kind, code, tests, entry_point?, expect, expect_verdicts?}; a table by category."""
    from problems import need, read_rows

    rows = []
    for row, where in read_rows(path):
        need(row, where, "tests", kind=list)
        rows.append({key: need(row, where, key) for key in ("id", "category", "kind", "code", "expect")} | row)
    jobs = [
        (r["code"], {"kind": r["kind"], "cases": r["tests"], "entry_point": r.get("entry_point"),
                     "setup": r.get("setup", "")}) for r in rows
    ]  # fmt: skip
    with Sandbox(level=level) as sb:
        begin = time.monotonic()
        results = sb.map(jobs, Limits(wall_s=3, cpu_s=3), progress=True)
        seconds = time.monotonic() - begin
    right, total, misses = Counter(), Counter(), []
    for row, result in zip(rows, results, strict=True):
        word = next((v for v in result.verdicts if v != "pass"), "pass")
        good = result.passed == (row["expect"] == "pass") and word in row.get("expect_verdicts", [word])
        total[row["category"]] += 1
        right[row["category"]] += good
        if not good:
            misses.append(f"  {row['category']}/{row['id']}: {word}, expected {row['expect']}; {result.detail[:200]}")
    for category in sorted(total):
        print(f"{category:24s} {right[category]:4d}/{total[category]}")
    print(f"{'all':24s} {sum(right.values()):4d}/{sum(total.values())}   level {level}, {seconds:.1f} s")
    print("\n".join(["misses:", *misses]) if misses else "no misses")
    return 1 if misses else 0


def run_file(program, tests, level, every):
    with open(program, encoding="utf-8", errors="surrogateescape") as file:
        code = file.read()
    try:
        with open(tests, encoding="utf-8") as file:
            loaded = json.load(file)
        as_tests(loaded)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--tests {tests}: {error}") from None
    tests = loaded
    with Sandbox(1, level) as sb:
        result = sb.run(code, tests, stop_early=not every)
    print(json.dumps(vars(result)))
    return 0 if result.passed else 1


def main():
    args = parse_args(Args, positional="program")
    try:
        if args.check:
            sys.exit(check())
        if args.battery:
            sys.exit(battery(args.battery, args.sandbox))
        if not (args.program and args.tests):
            raise ValueError("give PROGRAM.py and --tests TESTS.json, or --check, or --battery FILE.jsonl")
        sys.exit(run_file(args.program, args.tests, args.sandbox, args.all))
    except (SandboxError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "" if isinstance(error, SandboxError | OSError | ValueError) else f"{type(error).__name__} "
        raise UserError(f"{kind}{error}".replace("\n", " ")) from None


if __name__ == "__main__":
    run_cli(main)
