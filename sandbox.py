"""Run untrusted programs against tests and return verdicts that the program cannot forge.

    python sandbox.py --check                          # which layers hold here, each tried out
    python sandbox.py PROGRAM.py --tests TESTS.json    # exit 0 if every test passes, 1 if not

A few milliseconds a program (`python tests/sandbox_speed.py`); start-up is about 0.2 s, once.

    caller   holds tests and expected outputs, compares text    (this process: `Sandbox`, `Judge`)
      | one packet: limits + file descriptors                   <- exit status, CPU, peak memory
    server   a bare interpreter, once per worker; reads no code, no input, no output; forks
      | fork
    program  limits -> seccomp -> compile and run; whatever it says is only a claimed answer

A test of kind `stdin` is a process; the calls of kind `call` share one, and the next one begins
at the first answer that is missing. A line `assert f(1) == 2` is such a call. Other test code runs
in a process of its own, the tester, which calls the program's function with plain data and gets
plain data. Nothing that a program wrote is ever rebuilt as an object in the caller.

Promised at level "strict" (Linux 5.13 or newer on x86_64): a program sees neither the expected
outputs nor another program's data, opens no network socket, starts no process, writes no file,
reads nothing but the interpreter's libraries, signals nobody, dies at its limits and with its
parent, leaves nothing behind. A layer that is missing is an error, never a silent fallback. Level
"basic" keeps the comparison in the caller and whatever layers there are, and promises no more than
another process with limits. Whether a test can be judged is decided by the test and the machine,
never by the answer.

Not promised: safety from kernel or CPU bugs (use a virtual machine against people), from guessed
or hard-coded answers (weak tests), fair timing on a loaded machine, or that one right answer of
many is recognised (no checkers). A program may `stat` any path, learn the host's name, and read the
tests' setup. The calls of one process can borrow time from each other, since all arguments are
known at once, and the limit of output is the process's: it begins anew where that is reached.

Partial credit (`stop_early=False`) runs every test and divides by their true number. The released
CodeScaler code stops at the first failure after j passes and pays j/(j+1) whatever the number of
tests (lcb_check_correctness).
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import itertools
import json
import mmap
import os
import platform
import queue
import re
import reprlib
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
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from decimal import Decimal

from tqdm import tqdm

from common import UserError, parse_args, run_cli

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing here runs there, but importing must not fail
    fcntl = resource = None

# The file reads top down: limits and results, `Sandbox`, judging, comparison, the server's side in
# the caller; then the server, its layers, the program's process, the tester's, values as text; and
# the command line.

# --------------------------------------------------------------------------------------------------
# limits and results

VERDICTS = (
    "pass", "wrong_answer", "runtime_error", "timeout", "memory", "output_limit", "syntax_error",
    "sandbox_violation", "unsupported", "harness_error",
)  # fmt: skip
MAX_EXTRA = 1 << 16  # bytes an answer may have beyond twenty times the expected one's
SUITE_WAIT = 3  # times a test's wall limit that all tests together may spend waiting


class SandboxError(UserError):
    """The sandbox cannot give what was asked for; the message says what is missing, what to do."""


@dataclass(frozen=True)
class Tests:
    """How a program is checked. Cases by kind:
    "stdin":  {"input": str, "output": str}
    "call":   {"args": [...], "expected": value}, calling `entry_point` (`f`, or `Solution.method`);
              or {"args": [...], "any_of": [value, ...]} where each of the values is right
    "assert": {"assert": "assert f(1) == 2"} or {"check": "def check(candidate): ..."}
    `setup` runs before the program, and before a test's own code; `time_limit` is CPU seconds a
    test (None: the sandbox's default)."""

    kind: str
    cases: list
    entry_point: str | None = None
    setup: str = ""
    time_limit: float | None = None


@dataclass(frozen=True)
class Limits:
    """Per test: seconds of wall clock (only stops programs that wait), seconds of CPU (decides
    timeouts), MiB of address space, MiB of output. Test code that calls the program has them for
    each call. n tests together may use `5 + n / 5` times the CPU limit and `SUITE_WAIT` times the
    wall limit."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mb: int = 1024
    output_mb: int = 16


@dataclass
class Result:
    """`verdicts`: one word a test that was run. `pass_rate`: passes / all tests (a true rate if
    stop_early=False). `trusted`: False when a test could not be judged (unsupported,
    harness_error): mask such a sample, do not score it. `degraded`: the level was basic. `cpu_s`,
    `wall_s`: seconds over all tests. `detail`: about the first failure. `answer`: a short hash of
    what was printed or returned in the tests that were run, None if that is nothing or if it cannot
    be seen (other test code): programs with equal ones answer alike."""

    passed: bool
    verdicts: list[str]
    pass_rate: float
    cpu_s: float = 0.0
    wall_s: float = 0.0
    trusted: bool = True
    degraded: bool = False
    detail: str = ""
    answer: str | None = None


# --------------------------------------------------------------------------------------------------
# the sandbox

# Each line tries something forbidden, without harm if it succeeds; what succeeds is printed. A name
# starts with the layer that should stop it.
PROBE = """
import ctypes, json, os, resource, signal, socket, threading, time
temporary = input()  # the machine's folder for temporary files
def raise_limit():
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
def fork():
    if os.fork() == 0: os._exit(0)
def queue_signals():  # what is queued counts for the user, whose own timers then fail
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    for _ in range(200): os.kill(os.getpid(), signal.SIGRTMIN)
    for _ in range(100):
        if not signal.sigtimedwait([signal.SIGRTMIN], 0): raise OSError
def timer():
    if ctypes.CDLL(None).timer_create(0, None, ctypes.create_string_buffer(8)): raise OSError
tries = {
    "landlock: read /etc/passwd": lambda: open("/etc/passwd"),
    "landlock: list /": lambda: os.listdir("/"),
    "landlock: write a temporary file": lambda: open(temporary + "/.sandbox_probe", "w"),
    "landlock: write shared memory": lambda: open("/dev/shm/.sandbox_probe", "w"),
    "seccomp: truncate a file": lambda: os.open("/dev/null", os.O_RDONLY | os.O_TRUNC),
    "seccomp: open a socket": socket.socket,
    "seccomp: fork": fork,
    "seccomp: signal the parent": lambda: os.kill(os.getppid(), 0),
    "seccomp: hidden memory": lambda: os.memfd_create("x"),
    "seccomp: remove a file": lambda: os.unlink("/none"),
    "seccomp: create a timer": timer,
    "rlimits: raise a limit": raise_limit,
    "rlimits: queue signals": queue_signals,
}
done = []
for name, attempt in tries.items():
    try: attempt()
    except FileNotFoundError: done.append(name)
    except Exception: pass  # also what this system does not know
    else: done.append(name)
print(json.dumps([list(tries), done]), flush=True)
threading.stack_size(1 << 16)  # then more threads than any pool starts, which the server ends
for _ in range(400): threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
time.sleep(0.2)
"""
LAYERS = ("rlimits", "no_new_privs", "seccomp", "landlock")
PORTABLE = sys.platform != "linux"
_warned = False


class Sandbox:
    """A pool of servers; one worker a CPU by default. Use as `with Sandbox() as sb:`; safe to share
    between threads, not with a forked process. `level` None is strict on Linux, basic elsewhere.

    Raises SandboxError if level "strict" cannot be had. For tests: `without` switches layers off,
    `landlock_abi` is the highest ABI to use, `portable` uses nothing that only Linux has.
    """

    def __init__(self, workers=None, level=None, without=(), landlock_abi=99, portable=PORTABLE):
        level = level or ("basic" if portable else "strict")
        if level not in ("strict", "basic"):
            raise SandboxError(f"--sandbox {level}: expected strict or basic")
        if resource is None or (portable and level == "strict"):
            system = platform.system()
            raise SandboxError(f"level strict needs Linux, this is {system}; use --sandbox basic")
        self.level, self.closed, self.owner = level, False, os.getpid()
        self.count = workers or (os.cpu_count() or 1)
        if not workers and hasattr(os, "sched_getaffinity"):
            self.count = len(os.sched_getaffinity(0))
        options = {"basic": level == "basic", "without": list(without), "portable": portable}
        options["landlock_abi"] = landlock_abi
        self.all = [Worker(options) for _ in range(self.count)]
        self.free = queue.LifoQueue()  # the last used is the warmest
        for worker in self.all:
            self.free.put(worker)
        try:
            self._report = self._probe()
            missing = self._report["missing"]
            if level == "strict" and missing:
                notes = "; ".join(f"{k}: {v}" for k, v in self._report["notes"].items())
                raise SandboxError(
                    f"level strict is missing {', '.join(missing)} here"
                    f"{f' ({notes})' if notes else ''}; choose --sandbox basic to run with less"
                )
        except BaseException:
            self.close()
            raise
        if level == "basic":
            warn_once(f"sandbox level basic, missing: {', '.join(missing) or 'nothing'}")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """End every server. A thread that runs or waits for a program gets a SandboxError."""
        self.closed = True
        if os.getpid() == self.owner:  # a forked caller must not end its parent's servers
            for worker in self.all:
                worker.close(for_good=True)
            self.free.put(None)  # wakes one waiting thread, which wakes the next

    def _probe(self):
        """Start one worker and let a program try what must not work."""
        worker, limits = self.all[0], Limits()
        tests = Tests("stdin", [])
        try:
            judge = Judge(worker, PROBE, tests, limits, True)
            run = judge.run_once(tempfile.gettempdir(), MAX_EXTRA)
            tried, done = json.loads(run.out)
        except WorkerDied as error:
            raise SandboxError(f"the sandbox server died at its first program: {error}") from None
        except json.JSONDecodeError:
            text = run.err.strip()[-300:]
            raise SandboxError(f"the sandbox runs no program here: {run.word} {text}") from None
        tried.append("server: run 400 threads")
        done += tried[-1:] * (run.why != THREADS)
        notes, active = dict(worker.layers["notes"]), list(worker.layers["active"])
        for name in done:
            layer, what = name.split(": ")
            if layer in active:
                active.remove(layer)
                notes[layer] = f"did not stop: {what}"
        abi = worker.layers.get("landlock")
        if abi and abi < 3:
            notes["landlock"] = f"ABI {abi} does not govern truncation; seccomp refuses it"
        return {
            "level": self.level,
            "degraded": self.level == "basic",
            "layers": {k: k in active for k in LAYERS},
            "missing": [k for k in LAYERS if k not in active],
            "landlock_abi": abi,
            "attempts": {k: k not in done for k in tried},
            "notes": notes,
            "workers": self.count,
            "machine": platform.machine(),
        }

    def report(self):
        """{level, degraded, layers: {name: bool}, missing, landlock_abi, attempts: {what: refused},
        notes, workers, machine}."""
        return self._report

    def run(self, code, tests, limits=None, stop_early=True, repeat=1):
        """One program's Result. ValueError without tests; a program never raises.

        repeat=2 runs a passing program again: a program that passes only sometimes does not pass
        (detail "flaky").
        """
        tests = as_tests(tests)
        limits = limits or Limits()
        if seconds := tests.time_limit:
            limits = Limits(2 * seconds, seconds, limits.memory_mb, limits.output_mb)
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

    def _usable(self):
        if os.getpid() != self.owner:
            raise SandboxError("the sandbox belongs to the process that made it, not to its fork")
        if self.closed:
            raise SandboxError("the sandbox is closed")

    def _grade(self, code, tests, limits, stop_early):
        self._usable()
        worker = self.free.get()
        try:
            for attempt in (1, 2):  # a server that died is replaced, once
                self._usable()
                try:
                    result = Judge(worker, code, tests, limits, stop_early).grade()
                    if "harness_error" not in result.verdicts:
                        break
                except (WorkerDied, SandboxError, OSError) as error:
                    self._usable()
                    words = ["harness_error"] * (1 if stop_early else len(tests.cases))
                    result = Result(False, words, 0.0, trusted=False)
                    result.detail = f"{error} ({attempt}x)"
        finally:
            self.free.put(worker)
        result.degraded = self.level == "basic"
        return result

    def map(self, jobs, limits=None, stop_early=True, progress=False, repeat=1):
        """[(code, tests), ...] -> [Result, ...] in the same order, over all workers."""
        jobs = list(jobs)
        for _, tests in jobs:
            as_tests(tests)
        shown = progress and sys.stderr.isatty()
        bar = tqdm(total=len(jobs), desc="running programs", unit="program", disable=not shown)
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


def warn_once(text):
    global _warned
    if not _warned:
        print(f"warning: {text}", file=sys.stderr)
    _warned = True


SHAPES = {  # what a case of a kind holds, one way or the other
    "stdin": [{"input": "text", "output": "text"}],
    "call": [{"args": "list", "expected": "value"}, {"args": "list", "any_of": "list"}],
    "assert": [{"assert": "text"}, {"check": "text"}],
}
WORDS = {"text": str, "list": list | tuple, "value": object}


def as_tests(tests):
    """`Tests`, or a dict with its keys; checked, so that a mistake is not scored as a failing
    program. Raises ValueError."""
    if isinstance(tests, dict):
        empty = {"kind": None, "entry_point": None, "setup": "", "time_limit": None}
        tests = types.SimpleNamespace(**empty | tests)
    cases, limit = getattr(tests, "cases", None), getattr(tests, "time_limit", None)
    if not isinstance(cases, list | tuple) or not cases:
        raise ValueError("no tests: a program without tests cannot be run for a verdict")
    if tests.kind not in SHAPES:
        raise ValueError(f"tests.kind is {tests.kind!r}, expected stdin, call or assert")
    for i, case in enumerate(cases):
        keys = case if isinstance(case, dict) else {}
        shapes = SHAPES[tests.kind]
        if not any(
            all(key in keys and isinstance(keys[key], WORDS[word]) for key, word in shape.items())
            for shape in shapes
        ):
            wanted = [[f"{key!r} ({word})" for key, word in shape.items()] for shape in shapes]
            wanted = " or ".join(map(" and ".join, wanted))
            raise ValueError(f"tests.cases[{i}] is {reprlib.repr(case)}, expected {wanted}")
    for name in ("entry_point", "setup"):
        if not isinstance(value := getattr(tests, name), str | None):
            raise ValueError(f"tests.{name} is a {type(value).__name__}, expected a text")
    if limit is not None and not (isinstance(limit, int | float) and 1e-3 <= limit <= 1e5):
        raise ValueError(f"tests.time_limit is {limit!r:.80}, expected seconds")
    if tests.kind == "call" and not tests.entry_point:
        raise ValueError("tests of kind call need an entry_point")
    if not tests.entry_point and any("check" in c for c in tests.cases):
        raise ValueError("a check(candidate) test needs an entry_point")
    return tests


# --------------------------------------------------------------------------------------------------
# judging: one suite of tests, in the caller


class Judge:
    """One program against one suite, run by `worker`. `words` and `details` hold a verdict and its
    explanation by case number; `decided` says that no more are needed."""

    def __init__(self, worker, code, tests, limits, stop_early):
        self.worker, self.tests, self.limits, self.stop_early = worker, tests, limits, stop_early
        self.cpu = self.wall = 0.0
        self.cpu_left = (5 + len(tests.cases) / 5) * limits.cpu_s
        self.wait_left = SUITE_WAIT * limits.wall_s
        self.words, self.details, self.answers, self.decided = {}, {}, {}, False
        # All that the program's process is told before it runs:
        names = [tests.entry_point] if tests.entry_point else []
        self.job = {"code": code, "setup": tests.setup or "", "names": names}
        self.job["lenient"] = tests.kind == "assert"

    def grade(self):
        cases = {self.stdin: [], self.calls: [], self.session: []}
        for i, case in enumerate(self.tests.cases):
            step, item = self.plan(case)
            cases[step].append((i, item))
        for step, left in cases.items():
            while left and not self.decided:
                if self.cpu_left <= 0 or self.wait_left <= 0:
                    self.set_all(left, "timeout", "the tests before used up the time of all")
                    break
                left = step(left)
        n = len(self.tests.cases)
        done = [i for i in range(n) if i in self.words]
        failed = next((i for i in done if self.words[i] != "pass"), None)
        if self.stop_early and failed is not None:
            done = done[: done.index(failed) + 1]
        words = [self.words[i] for i in done]
        result = Result(
            words.count("pass") == n, words, words.count("pass") / n, self.cpu, self.wall
        )
        result.trusted = not {"unsupported", "harness_error"} & set(words)
        if failed is not None:
            detail = f"test {failed}: {self.details[failed] or self.words[failed]}"
            result.detail = detail.encode("utf-8", "replace").decode()  # no lone surrogates
        if self.answers:
            text = repr(sorted(self.answers.items()))
            result.answer = hashlib.sha256(text.encode()).hexdigest()[:12]
        return result

    def plan(self, case):
        """How a case is run, and what is needed for that."""
        if self.tests.kind == "stdin":
            return self.stdin, case
        if self.tests.kind == "assert":
            entry, setup = self.tests.entry_point, self.tests.setup or ""
            call = as_call(case["assert"], entry) if "assert" in case else None
            if call and (entry or not re.search(rf"\b{call[0][0]}\b", setup)):
                return self.calls, call
            return self.session, case
        values = case["any_of"] if "any_of" in case else [case["expected"]]
        try:
            answers = [encode(value, compare=True).encode() for value in values]
            return self.calls, (("", encode(tuple(case["args"]))), answers, False)
        except (TypeError, ValueError, RecursionError) as error:
            return self.calls, (None, [], f"the test holds no plain data: {error}")

    def set(self, i, word, detail="", said=None):
        """Note a verdict, and `said`: the bytes that were printed or returned."""
        self.words[i], self.details[i] = word, detail.strip()[-500:]
        if said is not None and word in ("pass", "wrong_answer"):
            self.answers[i] = hashlib.sha256(said).hexdigest()
        self.decided = self.decided or (self.stop_early and word != "pass")

    def set_all(self, cases, word, detail):
        for i, _ in cases:
            self.set(i, word, detail)
        return []

    def execute(self, mode, fds, out, err, tick=None):
        """Run processes over these descriptors -> [Run, ...]; `out` and `err` are the program's."""
        runs = self.worker.run(mode, fds, self.limits, (self.cpu_left, self.wait_left), tick)
        run, cpu, cap = runs[0], sum(run.cpu for run in runs), self.limits.output_mb << 20
        self.cpu, self.wall = self.cpu + cpu, self.wall + run.wall
        self.cpu_left -= cpu
        self.wait_left -= max(0.0, run.wall - 10 * cpu)
        size = os.fstat(err).st_size
        run.err = os.pread(err, 1 << 16, max(0, size - (1 << 16))).decode("utf-8", "replace")
        run.flooded = max(size, os.fstat(out).st_size) >= cap
        run.word = ending(run, self.limits)
        return runs

    def run_once(self, text, most):
        """Run the program over one input -> Run, with the first `most` bytes that it printed."""
        job, given = json.dumps(self.job).encode(), text.encode("utf-8", "surrogatepass")
        with memory_files(job, b"", b"", given) as (job, out, err, stdin):
            (run,) = self.execute(RUN, [job, out, err, stdin], out, err)
            if not run.word and run.cpu > self.limits.cpu_s:
                run.word = "timeout"
            run.out = os.pread(out, most, 0)
            return run

    def stdin(self, cases):
        """A process a test: run the first of these, return the others."""
        i, case = cases[0]
        expected = case["output"].encode("utf-8", "surrogatepass")
        run = self.run_once(case["input"], MAX_EXTRA + 20 * len(expected) + 1)
        word, detail = run.word, run.err
        if not word:
            word = "pass" if same_output(expected, run.out) else "wrong_answer"
            got = run.out[:200].decode("utf-8", "replace")
            detail = f"printed {got!r}, expected {case['output'][:200]!r}"
        self.set(i, word, detail, run.out.strip())
        return cases[1:]

    def calls(self, cases):
        """One process answers call after call, as lines of a file that grows. Returns those that it
        left unanswered: the next process begins there."""
        for i, (question, _, why) in cases:
            if question is None:
                self.set(i, "unsupported", why)
        cases = [(i, call) for i, call in cases if call[0] is not None]
        left, ready = deque(cases), False
        job = json.dumps(self.job | {"calls": [call[0] for _, call in cases]}).encode()
        with memory_files(job, b"", b"", b"") as (job, out, err, answers):
            lines = Lines(answers)

            def read():
                """Judge the answers that have come; true if no more are needed."""
                nonlocal ready
                while left and not self.decided:
                    i, (_, expected, exact) = left[0]
                    most = MAX_EXTRA + 20 * max(map(len, expected), default=0)
                    if (line := lines.next(most)) is None:
                        return False
                    if ready:
                        left.popleft()
                        self.set(i, *judge_answer(line, expected, exact), line)
                    ready = True
                return True

            (run,) = self.execute(CALLS, [job, out, err, answers], out, err, read)
            read()
        word, detail = run.word or "runtime_error", run.err or "the program ended early"
        if not ready:  # it never came to the calls: that is the verdict of all
            return self.set_all(left, word, detail)
        if word in ("memory", "output_limit") and len(left) < len(cases):
            return list(left)  # what the calls before used is not this one's
        if left and not self.decided:
            self.set(left.popleft()[0], word, detail)
        return list(left)

    def session(self, cases):
        """Test code in the tester's process, the program in its own, a socket between them. Returns
        the cases left when one of them died."""
        test = {"cases": [case for _, case in cases], "setup": self.job["setup"],
                "entry": self.tests.entry_point, "stop_early": self.stop_early,
                "limit": self.limits.output_mb << 20}  # fmt: skip
        jobs = [json.dumps(job).encode() for job in (self.job, test)]
        with memory_files(jobs[0], b"", b"", jobs[1], b"", b"") as files:
            job, out, err, test, said, reports = files
            fds = [job, out, err, test, said, said, reports]
            run, tester = self.execute(SESSION, fds, out, err)
            text = os.pread(reports, os.fstat(reports).st_size, 0)
            last = os.pread(said, 500, max(0, os.fstat(said).st_size - 500))
        reports = [json.loads(line) for line in text.split(b"\n") if line]
        left = list(cases)
        for word, detail in reports[1:]:
            if word == "dead" or self.decided:
                break
            self.set(left.pop(0)[0], word, detail)
        word, detail = run.word, run.err
        if not word and tester.status:  # the test code died of an answer, or of itself: a failure
            word = ending(tester, self.limits)
            detail = f"the test code did not finish: {last.decode('utf-8', 'replace')}"
        word = word or "runtime_error"
        if not reports:  # the program never came to be called: that is the verdict of all
            return self.set_all(left, word, detail)
        if left and not self.decided:
            self.set(left.pop(0)[0], word, detail)
        return left


def ending(run, limits):
    """The verdict word a process's end gives, "" if it ended well. The exit codes are the program's
    to choose; they only ever pick among failures."""
    signal_number, code = run.status & 127, run.status >> 8
    if run.why in (BROKEN, THREADS):
        return "harness_error" if run.why == BROKEN else "sandbox_violation"
    if run.flooded or signal_number == getattr(signal, "SIGXFSZ", -1):
        return "output_limit"
    if run.why in (WALL, CPU) or signal_number == getattr(signal, "SIGXCPU", -1):
        return "timeout"
    if run.status == 0 or run.why == ASKED:
        return ""
    if code == EXIT_MEMORY or run.rss > 0.9 * (limits.memory_mb << 20):
        return "memory"
    if signal_number == signal.SIGSYS or code == EXIT_REFUSED:
        return "sandbox_violation"
    return "syntax_error" if code == EXIT_SYNTAX else "runtime_error"


def judge_answer(line, expected, exact):
    """One answer, which may hold anything, against the right ones -> (word, detail)."""
    got = line[:300].decode("utf-8", "replace").replace("\t", " ")
    if line.startswith(b"!"):
        words = {"MemoryError": "memory", "PermissionError": "sandbox_violation"}
        return words.get(got[1:].split(" ")[0], "runtime_error"), got[1:]
    if any(same_text(value, line, exact) for value in expected):
        return "pass", ""
    wanted = expected[0][:200].decode().replace("\t", " ")
    return "wrong_answer", f"answered {got[:200]}, expected {wanted}"


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


# --------------------------------------------------------------------------------------------------
# comparison: text against text, linear in both, without making objects of what a program wrote

# Only text that every printer of numbers writes: no "1_0", no full-width digits, no "+7", no "007",
# no exponent that would take Decimal minutes.
NUMBER = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
VALUE = re.compile(r"(-?[0-9]+)|(-?0x[0-9a-f]+)|(-?[0-9.]+(?:e[+-]?[0-9]+)?|-?inf)")


def pairwise(expected, actual, token, same):
    """Are the texts (bytes) equal, token by token, where `same(left, right)` knows what else is?"""
    if expected == actual:
        return True
    pairs = itertools.zip_longest(re.finditer(token, expected), re.finditer(token, actual))
    for found in pairs:
        left, right = (match and match.group() for match in found)
        if left != right and not (
            left and right and len(left) + len(right) < 800 and same(left, right)
        ):
            return False
    return True


def close(expected, actual):
    """testlib's doubleCompare: absolute or relative 1e-6; the 1e-15 lets 0 equal a rounding error.
    NaN and inf fail."""
    kind = type(expected)
    return abs(actual - expected) <= kind("1e-6") * max(1, abs(expected)) + kind("1e-15")


def same_output(expected, actual):
    """Does printed text (str or bytes) meet the expected text? Same lines, same blank-separated
    tokens; numbers by value.

    Trailing blanks, blank lines around the text and CRLF do not count; case and order do.

    >>> same_output("0.333333\\n", "0.33333333")
    True
    """
    expected, actual = (
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        for text in (expected, actual)
    )
    if len(actual) > MAX_EXTRA + 20 * len(expected):
        return False
    return pairwise(plain_lines(expected), plain_lines(actual), rb"[^ \n]+|\n", same_number)


def plain_lines(data):
    """Bytes with one space between the tokens of a line and nothing around the lines: only \\n ends
    a line, after CRLF became that, and only blanks of ASCII separate tokens."""
    data = data.replace(b"\r\n", b"\n").translate(bytes.maketrans(b"\t\v\f", b"   "))
    while b"  " in data:  # each pass halves the longest run
        data = data.replace(b"  ", b" ")
    return data.replace(b" \n", b"\n").replace(b"\n ", b"\n").strip(b" \n")


def same_number(expected, actual):
    """Two printed tokens: is an integer met exactly (6.0 will do, 6.0000001 will not), another
    number nearly?"""
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    left, right = Decimal(expected.decode()), Decimal(actual.decode())
    return left == right if expected.lstrip(b"-").isdigit() else close(left, right)


def same_value(expected, actual):
    """Does a returned value meet the expected one, which may come from JSON?

    Tuples equal lists, dict keys may be the JSON text of an int, floats are met to 1e-6; True is
    not 1, a set is not a list, NaN is only met by NaN.

    >>> same_value([1, 0.3], (1, 0.1 + 0.2))
    True
    """
    return same_text(*(encode(value, compare=True).encode() for value in (expected, actual)))


def same_text(expected, actual, exact=False):
    """The same for what `encode(value, compare=True)` gives (bytes). exact "==" is Python's own
    comparison (1 == 1.0 == True, a tuple is no list), "is" that of None, True and False."""
    if exact == "is":
        return expected == actual

    def same(left, right):
        if not exact and {left, right} == {b"[", b"("}:
            return True
        left, right = left.decode("ascii", "replace"), right.decode("ascii", "replace")
        if left[0] == right[0] == "k":  # the key of a dict
            left, right = left[1:], right[1:]
            if not exact and left == f'"{right}"':
                return VALUE.fullmatch(right) is not None
        left, right = number_of(left, exact), number_of(right, exact)
        if left is None or right is None:
            return False
        if exact or isinstance(left, int) or abs(left) == float("inf"):
            return left == right
        return close(left, right)

    return pairwise(expected, actual, rb"[^\t]+", same)


def number_of(token, exact):
    """The number that a token means, None if it means something else."""
    if exact and token in ("true", "false"):
        return token == "true"
    if not (found := VALUE.fullmatch(token)):
        return None
    whole, hexadecimal, real = found.groups()
    try:
        return int(whole) if whole else float(real) if real else int(hexadecimal, 16)
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------
# the caller's side of a server


class WorkerDied(Exception):
    pass


@contextlib.contextmanager
def memory_files(*contents):
    """Unnamed files in memory. A program's stdin is a regular file, since fast readers ask for its
    size, and so is its stdout: nobody needs to keep a pipe from filling, and RLIMIT_FSIZE caps a
    flood."""
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


class Lines:
    """The lines of a file that another process is writing."""

    def __init__(self, fd):
        self.fd, self.at = fd, 0

    def next(self, most):
        """The next line without its end, at most `most + 1` bytes; None if it has not come."""
        line = os.pread(self.fd, most + 1, self.at)
        if (end := line.find(b"\n")) >= 0:
            self.at += end + 1
            return line[:end]
        at = self.at + len(line)
        while block := os.pread(self.fd, 1 << 16, at):
            if (end := block.find(b"\n")) >= 0:
                self.at = at + end + 1
                return line
            at += len(block)
        return None


@dataclass
class Run:
    """What one process left: how it ended, what it cost (seconds, bytes), what it wrote."""

    status: int
    cpu: float
    rss: int
    wall: float
    why: int
    out: bytes = b""
    err: str = ""
    word: str = ""  # the verdict its end alone gives, "" if it ended well
    flooded: bool = False


class Worker:
    """One server process, started when first needed. A dead server raises WorkerDied and is
    replaced at the next run."""

    def __init__(self, options):
        readable, modules = library_paths()
        self.options = {**options, "readable": readable, "path": modules, "caller": os.getpid()}
        self.process = self.control = None
        self.busy = self.ended = False
        self.lock = threading.Lock()  # of starting and closing, which may come from two threads
        self.layers = {"active": [], "notes": {}}

    def start(self):
        here, there = socket.socketpair()
        # The stack limit must hold before the interpreter starts: the kernel lays memory out then.
        first = (
            "import os,resource as r,sys\nh=r.getrlimit(r.RLIMIT_STACK)[1]\n"
            "r.setrlimit(r.RLIMIT_STACK,(1<<28 if h<0 else min(1<<28,h),h))\n"
            "os.execv(sys.executable,sys.argv[1:])"
        )
        flags = [sys.executable, "-s", "-S", "-P", "-X", "utf8"]
        source = server_source()
        threads = {f"{k}_NUM_THREADS": "1" for k in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        arguments = [str(there.fileno()), json.dumps(self.options)]
        with there:
            self.process = subprocess.Popen(
                [*flags, "-c", first, *flags, "-c", source, *arguments],
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads},
                pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, cwd="/", start_new_session=True,
            )  # fmt: skip
        here.settimeout(60)
        self.control = here
        hello = b""
        with contextlib.suppress(OSError):
            hello = here.makefile("rb").readline()
        if not hello.endswith(b"\n"):
            self.process.kill()
            text = self.process.stderr.read().decode(errors="replace").strip()
            self.end_server()
            raise SandboxError(f"the sandbox server did not start: {text[-300:] or 'no message'}")
        self.process.stderr.close()
        self.layers = json.loads(hello)

    def close(self, for_good=False):
        with self.lock:
            self.ended = self.ended or for_good
            self.end_server()

    def end_server(self):
        """The server leaves at the end of its socket, and its program dies with it; if not, it is
        killed."""
        if self.control:
            with contextlib.suppress(OSError):  # wakes a thread that waits on it, unlike close()
                self.control.shutdown(socket.SHUT_RDWR)
            self.control.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process, self.control, self.busy = None, None, False

    def run(self, mode, fds, limits, budget, tick=None):
        """Run one program, or program and tester, to the end -> [Run, ...]. `budget`: seconds of
        CPU and of waiting that are left. `tick()` is called now and then; true ends the program.
        """
        with self.lock:
            if self.ended:
                raise WorkerDied("closed")
            if self.busy or (self.process and self.process.poll() is not None):
                self.end_server()  # busy: Ctrl-C came since, the next reply would be the old one's
            if self.process is None:
                self.start()
            control, self.busy = self.control, True
        sizes = limits.memory_mb << 20, limits.output_mb << 20
        request = REQUEST.pack(mode, limits.cpu_s, limits.wall_s, *budget, *sizes)
        end = time.monotonic() + 20 * budget[0] + budget[1] + 60  # then the server is at fault
        try:
            socket.send_fds(control, [b"r"], fds)
            control.sendall(request)
            pause = 20 if tick else 1000  # milliseconds
            poller = select.poll()  # select() knows no descriptors above 1023
            poller.register(control, select.POLLIN)
            while not poller.poll(pause):
                if time.monotonic() > end:
                    raise OSError("the sandbox server does not answer")
                if tick and tick():
                    control.sendall(b"k")
                    tick, pause = None, 1000
            control.settimeout(10)
            reply = control.recv(REPLY.size, socket.MSG_WAITALL)
            if len(reply) != REPLY.size:
                raise OSError("the sandbox server died")
        except (OSError, ValueError) as error:  # ValueError: another thread has closed the socket
            self.close()
            raise WorkerDied(str(error)) from None
        self.busy = False
        *rows, wall, why, why_all = REPLY.unpack(reply)
        runs = [Run(*rows[:3], wall, why or why_all), Run(*rows[3:], wall, why_all)]
        return runs[: 1 + (mode == SESSION)]


def library_paths():
    """(what a program may read: the interpreter's libraries, the installed packages, the C
    libraries, time zones; where it finds modules)."""
    paths = sysconfig.get_paths()
    modules = [paths["stdlib"], sysconfig.get_config_var("DESTSHARED")]
    modules += [paths["purelib"], paths["platlib"]]
    keep = [*modules, paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    keep += "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /etc/ld.so.cache".split()
    keep += "/etc/localtime /usr/share/zoneinfo /dev/null /dev/zero /dev/urandom".split()
    readable = [path for path in keep if path and os.path.exists(path)]
    return list(dict.fromkeys(readable)), list(dict.fromkeys(filter(None, modules)))


SERVER_IMPORTS = """
import ast, atexit, builtins, contextlib, ctypes, fcntl, gc, importlib, itertools, json, mmap, os
import re, resource, select, signal, socket, struct, sys, threading, time, types
from collections import Counter, OrderedDict, defaultdict, deque
__builtins__ = dict(vars(builtins))  # ours, whatever a program puts into the module
"""


@functools.cache
def server_source():
    """A program for `python -c`: the part of this file between the two INSIDE lines, so that a
    server is small and never loads the rest."""
    with open(__file__, encoding="utf-8") as file:
        inside = file.read().split("\n# INSIDE")[1].partition("\n")[2]
    return f"{SERVER_IMPORTS}{inside}\nstart_server(int(sys.argv[1]), json.loads(sys.argv[2]))\n"


# INSIDE: from here to the next such line is the text of the server. It uses nothing of this file
# that is outside.
# --------------------------------------------------------------------------------------------------
# the server

RUN, CALLS, SESSION, SERVE, TEST = range(5)  # what a request asks for; what a process is
# The descriptors that a process receives: its job first, then what becomes these numbers.
TARGETS = {RUN: (1, 2, 0), CALLS: (1, 2, 3), SERVE: (1, 2, 4), TEST: (1, 2, 3, 4)}
REQUEST = struct.Struct("<iddddqq")  # mode; CPU, wall; CPU, waiting left; memory, output
REPLY = struct.Struct("<idqidqdii")  # twice status, CPU, memory; wall; why the first, why all
WALL, CPU, ASKED, THREADS, BROKEN = range(1, 6)  # why it was killed; BROKEN: not confined
EXIT_SYNTAX, EXIT_MEMORY, EXIT_REFUSED = 97, 98, 99
MAX_SOURCE = 1 << 20  # bytes of program text
MAX_THREADS = 256
# What programs of contests and textbooks import nearly always; half a program's run time would go
# into importing it.
PRELOAD = "collections functools heapq itertools math bisect string typing re random operator copy"


def start_server(fd, options):
    """Prepare what all programs share, then serve until the caller has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("900")
    threading.stack_size(16 << 20)  # else every thread would take 256 MiB of address space
    sys.set_int_max_str_digits(0)
    sys.path[:], sys.argv[:] = options["path"], ["main.py"]
    for name in ("exit", "quit"):  # what a program expects of `python main.py` and -S leaves out
        setattr(builtins, name, __import__("_sitebuiltins").Quitter(name, "Ctrl-D (i.e. EOF)"))
    for name in PRELOAD.split():  # imported once here, shared by every fork
        with contextlib.suppress(Exception):
            __import__(name)
    serve(socket.socket(fileno=fd), put_on_layers(options), options["caller"])


def serve(control, layers, caller):
    """Fork a program for every request. File descriptors pass through unread."""
    report = {"active": layers["active"], "notes": layers["notes"], "landlock": layers["landlock"]}
    control.sendall(json.dumps(report).encode() + b"\n")
    gc.collect()
    gc.freeze()  # or the first collection in each child would copy every page
    layers["pid"] = os.getpid()
    while True:
        while not select.select([control], [], [], 1.0)[0]:
            if os.getppid() != caller:  # a fork of the caller may still hold the socket
                os._exit(0)
        kind, fds, _, _ = socket.recv_fds(control, 1, 16)
        if kind == b"k":  # the order to end a program that was quicker
            continue
        data = control.recv(REQUEST.size, socket.MSG_WAITALL) if kind else b""
        if len(data) != REQUEST.size:
            os._exit(0)
        request = REQUEST.unpack(data)
        layers["started"][:2] = b"\0\0"
        modes, given, pair = [request[0]], [fds], []
        if request[0] == SESSION:  # program and tester, with a socket between them
            pair = socket.socketpair()
            modes, ends = [SERVE, TEST], [end.fileno() for end in pair]
            given = [[*fds[:3], ends[0]], [*fds[3:], ends[1]]]
        pids = []
        for i, mode in enumerate(modes):
            pids.append(os.fork())
            if pids[-1] == 0:
                control.detach()  # its number may be the program's by the time it would be closed
                child(mode, i, given[i], request, layers)
        for end in pair:  # or neither would see the other's end
            end.close()
        rows, *rest = watch(pids, control, request, fds[-1], layers["portable"], caller)
        for fd in fds:
            os.close(fd)
        if layers["started"][: len(modes)] != b"\1" * len(modes):
            rest[-1] = BROKEN
        control.sendall(REPLY.pack(*rows[0], *rows[-1], *rest))


def watch(pids, control, request, progress, portable, caller):
    """Wait for the processes; kill them at their limits, when asked to, when the caller is gone.
    Returns [(status, CPU, memory)] of each, wall seconds, why the first was killed, why all were.

    The limits of a test count from the last mark: the file `progress` grows with every answer. A
    program that keeps using the CPU gets four times the wall limit, since a loaded machine must not
    decide verdicts. The last process is the one waited for: the first has nothing to do without it.
    """
    mode, cpu_s, wall_s, cpu_left, wait_left, *_ = request
    begin = mark = time.monotonic()
    poller, rows = select.poll(), [None] * len(pids)
    poller.register(control, select.POLLIN)
    pidfds = [] if portable else [os.pidfd_open(pid) for pid in pids]
    for fd in pidfds:
        poller.register(fd, select.POLLIN)
    cpu, cpu_mark, size, why, why_all = 0.0, 0.0, 0, 0, 0

    def end(reason):
        for pid, row in zip(pids, rows):
            if row is None:
                os.kill(pid, signal.SIGKILL)
        return reason

    while rows[-1] is None:
        ready = [fd for fd, _ in poller.poll(3 if portable else 20)]
        for i, pid in enumerate(pids):
            if rows[i] is None and (portable or pidfds[i] in ready):
                rows[i] = reap(pid, os.WNOHANG)
                if not portable:
                    poller.unregister(pidfds[i])  # it would stay ready
        if control.fileno() in ready and not why_all:
            if not control.recv(1):
                end(ASKED)
                os._exit(0)
            why_all = end(ASKED)
        now, cpu = time.monotonic(), sum(map(cpu_of, pids, rows, [portable] * len(pids)))
        if os.getppid() != caller:
            end(ASKED)
            os._exit(0)
        if why_all or rows[-1] is not None:
            continue
        if mode != RUN and (grown := os.fstat(progress).st_size) != size:
            size, mark, cpu_mark = grown, now, cpu
        idle = cpu - cpu_mark < 0.1 * (now - mark)
        waited = now - mark > wall_s * (1 if idle else 4) or now - begin - 10 * cpu > wait_left
        if cpu - cpu_mark > cpu_s or cpu > cpu_left or waited:
            why_all = end(WALL if waited and idle else CPU)
        elif not portable and any(map(crowded, pids, rows)):
            why_all = end(THREADS)
    for i, pid in enumerate(pids):
        if rows[i] is None and (row := reap(pid, os.WNOHANG)):
            rows[i] = row  # it had ended by itself
        elif rows[i] is None:
            os.kill(pid, signal.SIGKILL)
            rows[i] = reap(pid, 0)
            why = ASKED if rows[i][0] & 127 == signal.SIGKILL and not why_all else why
    for fd in pidfds:
        os.close(fd)
    return rows, time.monotonic() - begin, why, why_all


def reap(pid, flags):
    """(status, CPU seconds, bytes of memory) of an ended process, None if it has not ended."""
    ended, status, usage = os.wait4(pid, flags)
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return (status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit) if ended else None


def cpu_of(pid, row, portable):
    """CPU seconds of a process until now."""
    if row or portable:  # without Linux, RLIMIT_CPU must do
        return row[1] if row else 0.0
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def crowded(pid, row):
    """Has the process too many threads? The kernel counts them in the links of a folder; Landlock
    does not govern stat."""
    with contextlib.suppress(OSError):
        return row is None and os.stat(f"/proc/{pid}/task").st_nlink - 2 > MAX_THREADS
    return False


# --------------------------------------------------------------------------------------------------
# the layers: a function each, which says what it forbids


def put_on_layers(options):
    """Everything that holds for all programs of this server, once. Returns what each program still
    needs."""
    active, notes = ["rlimits"], {name: "switched off" for name in options["without"]}
    layers = {"active": active, "notes": notes, "basic": options["basic"], "landlock": None}
    layers["null"], layers["started"] = os.open(os.devnull, os.O_RDONLY), mmap.mmap(-1, 2)
    layers["portable"], layers["libc"] = options["portable"], None
    if "rlimits" in notes:
        active.remove("rlimits")
    if options["portable"]:
        return layers
    layers["libc"] = libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.syscall.restype = ctypes.c_long

    def put_on(name, layer, *args):
        try:
            if name not in notes:
                layers[name] = layer(libc, *args)
                active.append(name)
        except OSError as error:
            notes[name] = str(error)

    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc would open the server's descriptors to all
    drop_capabilities(libc)
    put_on("no_new_privs", no_new_privileges)
    put_on("landlock", landlock, options["readable"], options["landlock_abi"])
    put_on("seccomp", prepare_seccomp)
    return layers


def drop_capabilities(libc):
    """Forbids what root may: to raise limits, to step over file permissions."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24))


def no_new_privileges(libc):
    """Forbids to gain rights by executing something; the next two layers need it."""
    if libc.prctl(38, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")


def landlock(libc, readable, most):
    """Forbids every file but those below `readable`, and those for reading only. Returns the ABI,
    the kernel's or `most`. Below 3 it does not govern truncation."""
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # LANDLOCK_CREATE_RULESET_VERSION
    if abi < 1:
        raise OSError(ctypes.get_errno(), "no Landlock in this kernel")
    abi = min(abi, most)
    rights = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1 | ((1 << 15) if abi >= 5 else 0)
    # It grew with the ABI, and an older kernel refuses unknown bits: files, then TCP, then abstract
    # sockets and signals.
    attr = struct.pack("<QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, attr, ctypes.c_size_t(len(attr)), 0)  # landlock_create_ruleset
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in readable:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        right = 4 | 8 if os.path.isdir(path) else 4 | 2 * (path == os.devnull)
        # READ_FILE 4, READ_DIR 8, WRITE_FILE 2
        if libc.syscall(445, ruleset, 1, struct.pack("<Qi", right, fd), 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
        os.close(fd)
    if libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
    return abi


def limit_resources(memory, cpu_s, output, layers):
    """Forbids more address space, CPU seconds, bytes a file, open files and queued signals than
    these, and core dumps. One that cannot be set is an error, at level basic it is left out."""
    limits = {"AS": memory, "CPU": int(cpu_s) + 2, "FSIZE": output, "NOFILE": 64, "CORE": 0}
    for what, most in (limits | {"SIGPENDING": 64}).items():
        try:
            limit = getattr(resource, "RLIMIT_" + what)
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (most, most))
        except (OSError, ValueError, AttributeError) as error:
            if not layers["basic"]:
                raise OSError(f"RLIMIT_{what} {most}: {error}") from None


def prepare_seccomp(libc):
    """Forbids every system call but those below. The filter is made here and put on by each
    program's process, whose number it then holds. Returns (filter, where the number goes, what
    prctl takes)."""
    if os.uname().machine != "x86_64":
        raise OSError(0, f"no system call table for {os.uname().machine}")
    if libc.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        raise OSError(0, "needs no_new_privs")
    code, spots = seccomp_filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    program = ctypes.create_string_buffer(program)
    if libc.prctl(22, 2, 0, 0, 0) == 0 or ctypes.get_errno() != 14:  # EFAULT: it knows filters
        raise OSError(ctypes.get_errno(), "no seccomp filters in this kernel")
    return buffer, spots, program


def put_on_seccomp(libc, prepared):
    buffer, spots, program = prepared
    for at in spots:  # "kill" and its kin only with the program's own number
        struct.pack_into("<I", buffer, at, os.getpid())
    if libc.prctl(22, 2, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


# name:number, from the kernel's asm/unistd_64.h of x86_64. Everything else, fork, execve, socket,
# ptrace, unlink, memfd_create, timers, io_uring and bpf among it, fails with EPERM.
SYSCALLS = """
read:0 write:1 close:3 stat:4 fstat:5 lstat:6 poll:7 lseek:8 mmap:9 mprotect:10 munmap:11 brk:12
rt_sigaction:13 rt_sigprocmask:14 rt_sigreturn:15 pread64:17 pwrite64:18 readv:19 writev:20
preadv:295 pwritev:296 access:21 pipe:22 select:23 sched_yield:24 mremap:25 msync:26 mincore:27
madvise:28 dup:32 dup2:33 pause:34 nanosleep:35 getitimer:36 alarm:37 setitimer:38 getpid:39
sendfile:40 sendto:44 recvfrom:45 sendmsg:46 recvmsg:47 shutdown:48 getsockname:51 getpeername:52
setsockopt:54 getsockopt:55 exit:60 wait4:61 uname:63 fsync:74 fdatasync:75 ftruncate:77 getdents:78
getcwd:79 readlink:89 umask:95 gettimeofday:96 getrlimit:97 setrlimit:160 getrusage:98 sysinfo:99
times:100 getuid:102 getgid:104 geteuid:107 getegid:108 getppid:110 getpgrp:111 getpgid:121
getsid:124 getgroups:115 getresuid:118 getresgid:120 rt_sigpending:127 rt_sigtimedwait:128
rt_sigsuspend:130 sigaltstack:131 statfs:137 fstatfs:138 sched_getparam:143 sched_getscheduler:145
sched_get_priority_max:146 sched_get_priority_min:147 gettid:186 time:201 futex:202
sched_getaffinity:204 epoll_create:213 getdents64:217 set_tid_address:218 restart_syscall:219
fadvise64:221 clock_gettime:228 clock_getres:229 clock_nanosleep:230 exit_group:231 epoll_wait:232
epoll_ctl:233 waitid:247 newfstatat:262 readlinkat:267 faccessat:269 pselect6:270 ppoll:271
set_robust_list:273 epoll_pwait:281 signalfd4:289 timerfd_create:283 timerfd_settime:286
timerfd_gettime:287 eventfd2:290 epoll_create1:291 dup3:292 pipe2:293 getcpu:309 getrandom:318
membarrier:324 copy_file_range:326 statx:332 rseq:334 close_range:436 faccessat2:439 arch_prctl:158
"""
ALL = 0xFFFFFFFF
PID = None  # stands for the program's own process number
READING = [0, 1, 2, 0x201, 0x202]  # O_TRUNC 0x200 only where Landlock sees a writer: 1 or 2
# name:number -> (argument, mask, values): what is left of the argument must be among them
CHECKED = {
    "open:2": [(1, 0x203, READING)],
    "openat:257": [(2, 0x203, READING)],
    "clone:56": [(0, 0x10000, [0x10000])],  # CLONE_THREAD: threads, never processes
    "kill:62": [(0, ALL, [PID])],
    "tgkill:234": [(0, ALL, [PID])],
    "prctl:157": [(0, ALL, [15, 16])],  # the thread's name
    "prlimit64:302": [(0, ALL, [0])],  # of itself
    # isatty, size, FIONREAD, asyncio's
    "ioctl:16": [(1, ALL, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])],
    # no F_SETOWN: the kernel would send signals in the program's name
    "fcntl:72": [(1, ALL, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1034])],
    # asyncio wakes itself through one; SOCK_STREAM, since a DGRAM pair could reach any address
    "socketpair:53": [(0, ALL, [1]), (1, 0xF, [1])],
}
CLONE3 = "clone3:435"  # ENOSYS, and glibc falls back to clone, whose flags a filter can read


def syscall_number(entry):
    return int(entry.split(":")[1])


def seccomp_filter():
    """The filter as bytes, and the byte offsets where the program's own process number goes after
    the fork."""
    code, spots = [], []
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def ins(op, value, yes=0, no=0):
        code.append(struct.pack("<HBBI", op, yes, no, value))

    load, eq, ge, gt, bit_and, ret = 0x20, 0x15, 0x35, 0x25, 0x54, 0x06
    ins(load, 4)  # the architecture first: numbers mean nothing without it
    ins(eq, 0xC000003E, 1, 0)
    ins(ret, kill)
    ins(load, 0)
    ins(ge, 0x40000000, 0, 1)  # the x32 numbers
    ins(ret, kill)
    ranges = []
    for n in sorted(map(syscall_number, SYSCALLS.split())):
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    for low, high in ranges:  # forward jumps are one byte long, so each range has its own return
        ins(ge, low, 0, 2)
        ins(gt, high, 1, 0)
        ins(ret, allow)
    ins(eq, syscall_number(CLONE3), 0, 1)
    ins(ret, enosys)
    for entry, checks in CHECKED.items():
        ins(eq, syscall_number(entry), 0, 1 + sum(len(values) + 3 for *_, values in checks))
        for argument, mask, values in checks:
            ins(load, 16 + 8 * argument)
            ins(bit_and, mask)
            for i, value in enumerate(values):
                spots += [8 * len(code) + 4] * (value is PID)
                ins(eq, value or 0, len(values) - i, 0)
            ins(ret, eperm)
        ins(ret, allow)
    ins(ret, eperm)
    return b"".join(code), spots


# --------------------------------------------------------------------------------------------------
# a process of the server: confined, then a program or a tester


def child(mode, index, fds, request, layers):
    """In the forked process, never returns. fds: the job, then those of TARGETS."""
    try:
        _, cpu_s, _, cpu_left, _, memory, output = request
        # Out of the way first: a received number may be one that the next dup2 overwrites.
        job_fd, *fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        job = json.loads(os.pread(job_fd, os.fstat(job_fd).st_size, 0))
        for fd, target in zip([layers["null"], *fds], (0, *TARGETS[mode])):
            os.dup2(fd, target)
        os.closerange(max(TARGETS[mode]) + 1, 1 << 16)
        if "rlimits" in layers["active"]:
            memory = max(memory, 2 << 30) if mode == TEST else memory
            limit_resources(
                memory, min(cpu_s, cpu_left) if mode == RUN else cpu_left, output, layers
            )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a flood ends here, no exception to swallow
        if layers["libc"]:
            layers["libc"].prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
            if os.getppid() != layers["pid"]:
                os._exit(1)
        if "seccomp" in layers["active"]:
            put_on_seccomp(layers["libc"], layers["seccomp"])
        layers["started"][index] = 1  # only now: else the server says BROKEN, which must not be
        layers["started"].close()  # the program's to say
    except BaseException as error:
        os.write(2, f"cannot confine the program: {error!r}".encode())
        os._exit(1)
    code = 1
    try:
        streams = open_streams()
        # Whose functions are called is imported, as a test file would do it: its code below
        # `if __name__ == "__main__":` must not run there. dataclasses, typing and pickle look the
        # program up under its name.
        module = types.ModuleType("__main__" if mode == RUN else "main")
        module.__dict__.update(__file__="main.py", __builtins__=builtins)
        sys.modules["__main__"] = sys.modules[module.__name__] = module
        run = {RUN: run_program, CALLS: answer_calls, SERVE: answer_tester, TEST: run_tests}[mode]
        code = run(job, module)
    except BaseException as error:  # it broke what answers for it, or left it no memory
        os.write(2, type(error).__name__.encode())
    finally:
        if code or mode != RUN or not writes_at_exit(streams):
            os._exit(code)
    sys.exit(0)


def open_streams():
    """sys.stdin, stdout and stderr as of a script. Returns the file objects made."""
    text = {"encoding": "utf-8", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", **text)
    sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", **text)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", **text)
    return [
        part
        for stream in (sys.stdin, sys.stdout, sys.stderr)
        for part in (stream, stream.buffer, stream.buffer.raw)
    ]


# --------------------------------------------------------------------------------------------------
# the program's process: everything from here to the tester shares it with untrusted code


def load(job, module):
    """Compile and run setup and program in `module`. Returns None, or the exit code after an error,
    whose traceback is printed. A function that the tests call must be the program's own: one of
    that name in the setup is taken away in between."""
    try:
        if len(job["code"].encode("utf-8", "replace")) > MAX_SOURCE:
            raise SyntaxError("program too large")
        text = job["code"].removeprefix("\ufeff")
        code = compile(text, "main.py", "exec", dont_inherit=True)
    except MemoryError:
        return EXIT_MEMORY
    except Exception as error:  # also null bytes, lone surrogates, nesting
        text = f"{type(error).__name__}: {error}"
        os.write(2, text.encode("utf-8", "replace")[:2000])
        return EXIT_SYNTAX
    try:
        try:
            exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), module.__dict__)
        except Exception:
            if not job[
                "lenient"
            ]:  # MBPP: a setup that uses the solution's classes, run again later
                raise
        for name in job["names"]:
            module.__dict__.pop(name.split(".")[0], None)
        exec(code, module.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__.tb_next  # without this file's own frame
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error.with_traceback(trace), trace)
        memory, refused = isinstance(error, MemoryError), isinstance(error, PermissionError)
        return EXIT_MEMORY if memory else EXIT_REFUSED if refused else 1
    return None


def run_program(job, module):
    """Run it as the interpreter would: traceback, threads, atexit, flush -> the exit code."""
    code = load(job, module) or 0
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
    for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            if stream is sys.stdout:  # what CPython exits with; `sys.__stdout__` may be detached
                code = code or 120
    return code


def writes_at_exit(streams):
    """May something that is left write when it is destroyed: another open file, a generator, an
    object with __del__? Only then the interpreter must take everything apart, which costs more than
    most programs."""
    try:
        ours = list(map(type, streams))
        left = list(map(type, gc.get_objects()))  # but for what was there before the fork
        kinds = (kind for kind in set(left) if left.count(kind) > ours.count(kind))
        return any(hasattr(kind, "__del__") for kind in kinds)
    except BaseException:
        return True


def answer_calls(job, module):
    """Answer each call by a line on descriptor 3, after a first one that says that the program is
    ready -> the exit code. A call is [name, expression] or ["", encoded arguments]."""
    job["names"] = [*job["names"], *(name for name, _ in job["calls"] if name)]
    if (code := load(job, module)) is not None:
        return code
    # Names in an expression: builtins, the setup's, and only then the program's.
    space = dict(item for item in vars(module).items() if not hasattr(builtins, item[0]))
    if job["lenient"]:
        with contextlib.suppress(Exception):
            exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), space)
    write_line(3, "ready")
    for name, text in job["calls"]:
        try:
            if name:
                expression = compile(text, "tests.py", "eval", dont_inherit=True)
                for used in set(expression.co_names) & sys.stdlib_module_names - {name}:
                    space[used] = importlib.import_module(used)  # not the program's `math`
                space[name] = resolve(module, name)
                value = eval(expression, space)
            else:
                value = resolve(module, job["names"][0])(*decode(text))
            line = encode(value, compare=True)
        except BaseException as error:
            line = "!{}\t{}".format(*described(error))
        write_line(3, line)
    return 0


def resolve(module, path):
    """`f` or `Solution.f`: a function of the program, or a method of a new Solution; where there is
    none, the other of the two."""
    *classes, name = path.split(".")
    names, solution = module.__dict__, module.__dict__.get(classes[0] if classes else "Solution")
    if hasattr(solution, name) and (classes or name not in names):
        return getattr(solution() if isinstance(solution, type) else solution, name)
    if name not in names:
        raise NameError(f"name {path!r} is not defined")
    return names[name]


def described(error):
    """An exception as the name of its nearest built-in class, and its message."""
    mro = type(error).__mro__
    kind = next((base.__name__ for base in mro if base.__module__ == "builtins"), "")
    try:
        return kind, ascii(str(error))[:2000]
    except BaseException:
        return kind, ""


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


def answer_tester(job, module):
    """Answer the tester's questions on descriptor 4 until it closes -> the exit code.

    A question is (name, arguments, named arguments). The answer is a tuple of the value, and of the
    arguments if the call changed them; or "!" and an exception, or "?" and why the value is no
    plain data.
    """
    if (code := load(job, module)) is not None:
        return code
    left = bytearray()

    def answer(question):
        known = []
        target, args, named = decode(question, known)
        try:
            value = resolve(module, target)(*args, **dict(named))
        except BaseException as error:
            kind, message = described(error)
            with contextlib.suppress(BaseException):
                return f"!{kind}\t{encode(tuple(error.args))}"
            return f"!{kind}\t{encode((message,))}"
        try:
            changed = known and encode((target, args, named), known) != question
            values = (value, args, named) if changed else (value,)
            return encode(values, known, seen=() if changed else range(len(known)))
        except BaseException as error:
            return f"?{described(error)[1]}"

    write_line(4, "ready")
    while (question := read_line(4, left, 1 << 30)) is not None:
        write_line(4, answer(question))
    return 0


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


# INSIDE ends here.


# --------------------------------------------------------------------------------------------------
# command line


@dataclass
class Args:
    program: str = ""  # a Python file
    tests: str = ""  # JSON file: {"kind", "cases", "entry_point"?, "setup"?, "time_limit"?}
    check: bool = False  # show which layers of isolation hold here
    all: bool = False  # run every test, also after a failure
    sandbox: str = ""  # isolation level: strict or basic (default: strict on Linux, else basic)


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
    for name, refused in report["attempts"].items():
        print(f"  {'refused' if refused else 'WORKED '}  {name}")
    print("  visible  stat of any path, the host's name")
    if report["missing"]:
        print("  --sandbox basic runs with what there is")
    return 1 if report["missing"] else 0


def run_file(program, tests, level, every):
    """Run one program against the tests of a file, print the Result as JSON."""
    with open(program, encoding="utf-8", errors="surrogateescape") as file:
        code = file.read()
    try:
        with open(tests, encoding="utf-8") as file:
            loaded = json.load(file)
        as_tests(loaded)
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"--tests {tests}: {error}") from None
    with Sandbox(1, level) as sb:
        result = sb.run(code, loaded, stop_early=not every)
    print(json.dumps(vars(result)))
    return 0 if result.passed else 1


def main():
    args = parse_args(Args, positional="program")
    sys.set_int_max_str_digits(0)
    try:
        if args.check:
            sys.exit(check())
        if not (args.program and args.tests):
            raise UserError("give PROGRAM.py and --tests TESTS.json, or --check")
        sys.exit(run_file(args.program, args.tests, args.sandbox, args.all))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    run_cli(main)
