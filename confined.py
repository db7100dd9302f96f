"""The sandbox's server, a bare interpreter that `sandbox.py` starts once a worker, and the
processes that it forks, one for every request.

The server puts on the layers that hold for all. It reads no code, no input and no output: file
descriptors pass through it. A process puts on its limits and its filter, then runs a program, or
answers calls of the program's functions, or runs test code (`testcode.py`).
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections import Counter

from testcode import FAILURES, NotPlain, decode, encode, read_line, run_tests, write_line

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing here runs there, but importing must not fail
    fcntl = resource = None

__builtins__ = dict(vars(builtins))  # ours, whatever a program puts into the module

# --------------------------------------------------------------------------------------------------
# the server

RUN, CALLS, SESSION, TEST = range(4)  # what a request asks for; a session is CALLS beside TEST
# A process receives descriptors: its job first, then what becomes these numbers. A program reads 0;
# CALLS reads questions from 4 and answers on 3, TEST asks on 4 and reports on 3.
TARGETS = {RUN: (1, 2, 0), CALLS: (1, 2, 4, 3), TEST: (1, 2, 4, 3)}
REQUEST = struct.Struct("<iddddqq")  # mode; CPU, wall; CPU, waiting left; memory, output
REPLY = struct.Struct("<idqiidqid")  # twice status, CPU, memory, why it was killed; wall
TIME, ASKED, THREADS, BROKEN = range(1, 5)  # why it was killed; BROKEN: not confined
EXIT_CODES = {"syntax_error": 97, "memory": 98, "sandbox_violation": 99}
MAX_SOURCE = 1 << 20  # bytes of program text
MAX_THREADS = 256
OWN_STREAMS = 9  # file objects in sys.stdin, stdout and stderr: text, buffer, raw
IDLE = 0.05  # share of a CPU; who uses less is waiting, who uses more may be crowded out by others
# What programs of contests and textbooks import nearly always; half a program's run time would go
# into importing it.
PRELOAD = "collections functools heapq itertools math bisect string typing re random operator copy"


def serve(fd, options):
    """Prepare what all programs share, then fork one for every request, until the caller has ended.
    File descriptors pass through unread."""
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
    control, layers, caller = socket.socket(fileno=fd), put_on_layers(options), options["caller"]
    report = {key: layers[key] for key in ("missing", "landlock")}
    control.sendall(json.dumps(report).encode() + b"\n")
    ended, signals = os.pipe()  # what a signal writes here wakes `watch` when a process ends
    os.set_blocking(signals, False)
    signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()  # or the first collection in each child would copy every page
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
        processes, pair, pids = [(request[0], fds)], [], []
        if request[0] == SESSION:  # program and tester, with a socket between them
            pair = socket.socketpair()
            program, tester = (end.fileno() for end in pair)
            job, out, err, test, said, reports = fds
            processes = [(CALLS, [job, out, err, program, program])]
            processes += [(TEST, [test, said, said, tester, reports])]
        for i, (mode, given) in enumerate(processes):
            pids.append(os.fork())
            if pids[-1] == 0:
                control.detach()  # its number may be the program's by the time it would be closed
                child(mode, i, given, request, layers)
        for end in pair:  # or neither would see the other's end
            end.close()
        rows, wall = watch(pids, control, ended, request, fds[-1], caller)
        for fd in fds:
            os.close(fd)
        begun = layers["started"][: len(pids)]
        rows = [row if mark else (*row[:3], BROKEN) for row, mark in zip(rows, begun)]
        control.sendall(REPLY.pack(*rows[0], *rows[-1], wall))
        rows = begun = None  # the next program, a fork, could read them


def watch(pids, control, ended, request, progress, caller):
    """Wait for the processes; kill them at their limits, when asked to, when the caller is gone.
    Returns ([(status, CPU, memory, why it was killed)] of each, wall seconds).

    The limits of a test count from the last mark: the file `progress` grows with every answer. A
    program that keeps using the CPU gets four times the wall limit, since a loaded machine must not
    decide verdicts. The last process is the one waited for: the first has nothing to do without it.
    """
    mode, cpu_s, wall_s, cpu_left, wait_left, *_ = request
    begin = mark = time.monotonic()
    cpu_mark, size, why, rows = 0.0, 0, 0, {}
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(ended, select.POLLIN)

    def reap(flags):
        """Note how those processes ended that have."""
        for pid in [pid for pid in pids if pid not in rows]:
            found, status, usage = os.wait4(pid, flags)
            if found:
                unit = 1 if sys.platform == "darwin" else 1 << 10
                killed = why if status & 127 == signal.SIGKILL else 0  # 0: it was quicker
                rows[pid] = status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, killed

    while not why:
        ready = [fd for fd, _ in poller.poll(20)]
        if ended in ready:
            os.read(ended, 100)
        reap(os.WNOHANG)
        asked = control.fileno() in ready
        left_alone = (asked and not control.recv(1)) or os.getppid() != caller
        now, cpu = time.monotonic(), sum(rows[p][1] if p in rows else cpu_of(p) for p in pids)
        if mode != RUN and (grown := os.fstat(progress).st_size) != size:
            size, mark, cpu_mark = grown, now, cpu
        idle = cpu - cpu_mark < IDLE * (now - mark)
        waited = now - mark > wall_s * (1 if idle else 4) or now - begin - cpu / IDLE > wait_left
        if asked or left_alone or pids[-1] in rows:
            why = ASKED
        elif waited or cpu - cpu_mark > cpu_s or cpu > cpu_left or now - begin > 4 * wait_left:
            why = TIME
        elif any(crowded(pid) for pid in pids if pid not in rows):
            why = THREADS
    for pid in pids:
        if pid not in rows:
            os.kill(pid, signal.SIGKILL)
    reap(0)
    if left_alone:
        os._exit(0)
    return [rows[pid] for pid in pids], time.monotonic() - begin


def cpu_of(pid):
    """CPU seconds of a process until now; where only Linux could tell, RLIMIT_CPU must do."""
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def crowded(pid):
    """Has the process too many threads? Linux counts them in the links of a folder; Landlock does
    not govern stat."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/task").st_nlink - 2 > MAX_THREADS
    return False


# --------------------------------------------------------------------------------------------------
# the layers: a function each, which says what it forbids


def put_on_layers(options):
    """Everything that holds for all programs of this server, once. Returns what each program still
    needs, and why a layer is missing."""
    missing = dict.fromkeys(options["without"], "switched off")
    layers = {"missing": missing, "landlock": None, "seccomp": None, "libc": None}
    layers |= {"basic": options["basic"], "pid": os.getpid(), "started": mmap.mmap(-1, 2)}
    if sys.platform != "linux":
        missing |= dict.fromkeys(("no_new_privs", "landlock", "seccomp"), "needs Linux")
        return layers
    layers["libc"] = libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.syscall.restype = ctypes.c_long

    def put_on(name, layer, *args):
        try:
            if name not in missing:
                layers[name] = layer(libc, *args)
        except OSError as error:
            missing[name] = str(error)

    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc would open the server's descriptors to all
    drop_capabilities(libc)
    put_on("no_new_privs", no_new_privileges)
    put_on("landlock", landlock, options["readable"], options["landlock_abi"])
    put_on("seccomp", prepare_seccomp)
    return layers


def done(result, what):
    """What a system call returned; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def drop_capabilities(libc):
    """Forbids what root may: to raise limits, to step over file permissions."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24))


def no_new_privileges(libc):
    """Forbids to gain rights by executing something; the next two layers need it."""
    done(libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def landlock(libc, readable, most):
    """Forbids every file but those below `readable`, and those for reading only. Returns the ABI,
    the kernel's or `most`. Below 3 it does not govern truncation."""
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)  # LANDLOCK_CREATE_RULESET_VERSION
    abi = min(done(abi, "no Landlock in this kernel"), most)
    rights = (1 << (13 + (abi >= 2) + (abi >= 3))) - 1 | ((1 << 15) if abi >= 5 else 0)
    # It grew with the ABI, and an older kernel refuses unknown bits: files, then TCP, then abstract
    # sockets and signals.
    attr = struct.pack("<QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(444, attr, ctypes.c_size_t(len(attr)), 0)
    done(ruleset, "landlock_create_ruleset")
    for path in filter(os.path.exists, readable):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        # READ_FILE 4, READ_DIR 8, WRITE_FILE 2
        right = 4 | 8 if os.path.isdir(path) else 4 | 2 * (path == os.devnull)
        rule = libc.syscall(445, ruleset, 1, struct.pack("<Qi", right, fd), 0)
        done(rule, f"landlock_add_rule {path}")
        os.close(fd)
    done(libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return abi


def limit_resources(memory, cpu_s, output, basic):
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
            if not basic:
                raise OSError(f"RLIMIT_{what} {most}: {error}") from None


def prepare_seccomp(libc):
    """Forbids every system call but those below. Returns the filter, which each program's process
    puts on."""
    if os.uname().machine != "x86_64":
        raise OSError(0, f"no system call table for {os.uname().machine}")
    if libc.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        raise OSError(0, "needs no_new_privs")
    if libc.prctl(22, 2, 0, 0, 0) == 0 or ctypes.get_errno() != 14:  # EFAULT: it knows filters
        raise OSError(ctypes.get_errno(), "no seccomp filters in this kernel")
    return seccomp_filter()


def put_on_seccomp(libc, code):
    code = code.replace(struct.pack("<I", PID), struct.pack("<I", os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    program = ctypes.create_string_buffer(program)
    done(libc.prctl(22, 2, ctypes.addressof(program), 0, 0), "seccomp")


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
PID = 0xBBCCDDEE  # stands for the program's own process number
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
    """The filter as bytes, with PID in it."""
    code = []
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def ins(op, value, yes=0, no=0):
        code.append(struct.pack("<HBBI", op, yes, no, value))

    load, eq, ge, bit_and, ret = 0x20, 0x15, 0x35, 0x54, 0x06
    ins(load, 4)  # the architecture first: numbers mean nothing without it
    ins(eq, 0xC000003E, 1, 0)
    ins(ret, kill)
    ins(load, 0)
    ins(ge, 0x40000000, 0, 1)  # the x32 numbers
    ins(ret, kill)
    for entry in SYSCALLS.split():
        ins(eq, syscall_number(entry), 0, 1)
        ins(ret, allow)  # one for all of them would be too far: a jump is one byte long
    ins(eq, syscall_number(CLONE3), 0, 1)
    ins(ret, enosys)
    for entry, checks in CHECKED.items():
        ins(eq, syscall_number(entry), 0, 1 + sum(len(values) + 3 for *_, values in checks))
        for argument, mask, values in checks:
            ins(load, 16 + 8 * argument)
            ins(bit_and, mask)
            for i, value in enumerate(values):
                ins(eq, value, len(values) - i, 0)
            ins(ret, eperm)
        ins(ret, allow)
    ins(ret, eperm)
    return b"".join(code)


# --------------------------------------------------------------------------------------------------
# a process of the server: confined, then a program or a tester


def child(mode, index, fds, request, layers):
    """In the forked process, never returns. fds: the job, then those of TARGETS."""
    try:
        _, cpu_s, _, cpu_left, _, memory, output = request
        signal.set_wakeup_fd(-1)
        # Out of the way first: a received number may be one that the next dup2 overwrites.
        job_fd, *fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        job = json.loads(os.pread(job_fd, os.fstat(job_fd).st_size, 0))
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in zip([null, *fds], (0, *TARGETS[mode])):
            os.dup2(fd, target)
        os.closerange(max(TARGETS[mode]) + 1, 1 << 16)
        if "rlimits" not in layers["missing"]:
            memory = max(memory, 2 << 30) if mode == TEST else memory
            cpu = min(cpu_s, cpu_left) if mode == RUN else cpu_left
            limit_resources(memory, cpu, output, layers["basic"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a flood ends here, no exception to swallow
        if layers["libc"]:
            layers["libc"].prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
            if os.getppid() != layers["pid"]:
                os._exit(1)
        if layers["seccomp"]:
            put_on_seccomp(layers["libc"], layers["seccomp"])
        layers["started"][index] = 1  # only now: else the server says BROKEN, which must not be
        layers["started"].close()  # the program's to say
    except BaseException as error:
        os.write(2, f"cannot confine the program: {error!r}".encode())
        os._exit(1)
    code = 1
    try:
        open_streams()
        # Whose functions are called is imported, as a test file would do it: its code below
        # `if __name__ == "__main__":` must not run there. dataclasses, typing and pickle look the
        # program up under its name.
        module = types.ModuleType("__main__" if mode == RUN else "main")
        module.__dict__.update(__file__="main.py", __builtins__=builtins)
        sys.modules["__main__"] = sys.modules[module.__name__] = module
        code = {RUN: run_program, CALLS: answer_questions, TEST: run_tests}[mode](job, module)
    except BaseException as error:  # it broke what answers for it, or left it no memory
        os.write(2, type(error).__name__.encode())
    finally:
        if code is not None:
            os._exit(code)
    sys.exit(0)  # the interpreter takes everything apart, which costs more than most programs


def open_streams():
    """sys.stdin, stdout and stderr as of a script."""
    text = {"encoding": "utf-8", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", **text)
    sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", **text)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", **text)


# --------------------------------------------------------------------------------------------------
# the program's process: what is below shares it with untrusted code


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
        return EXIT_CODES["memory"]
    except Exception as error:  # also null bytes, lone surrogates, nesting
        text = f"{type(error).__name__}: {error}"
        os.write(2, text.encode("utf-8", "replace")[:2000])
        return EXIT_CODES["syntax_error"]
    try:
        ran = run_setup(job, module.__dict__)
        job["given"] = {k: v for k, v in vars(module).items() if ran and k[:2] != "__"}
        for name in job["names"]:
            for part in (*name.split("."), "Solution"):  # see resolve()
                module.__dict__.pop(part, None)
        exec(code, module.__dict__)
    except SystemExit as error:
        if isinstance(error.code, int | None):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__.tb_next  # without this file's own frame
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error.with_traceback(trace), trace)
        return EXIT_CODES.get(FAILURES.get(described(error)[0]), 1)
    return None


def run_setup(job, space):
    """-> whether it ran to its end. One that fails, as it needs the program's classes (MBPP), runs
    again for the lines."""
    with contextlib.suppress(Exception):
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), space)
        return True
    return False


def run_program(job, module):
    """Run it as the interpreter would -> the exit code. What may still write when a program has
    ended, threads, functions of atexit, generators, `__del__` and open files, is ended in order; to
    take the whole interpreter apart would cost more than most programs."""
    code = load(job, module) or 0
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        if sys.stdout and not getattr(sys.stdout, "closed", False):
            sys.stdout.flush()
    except BaseException:
        code = code or 1
    with contextlib.suppress(BaseException):  # `sys.__stdout__` may be closed or detached
        sys.__stdout__.flush()
    try:
        kinds = Counter(map(type, gc.get_objects()))  # but for what was there before the fork
        left = sum(kinds[kind] for kind in kinds if hasattr(kind, "__del__"))
    except BaseException:
        left = OWN_STREAMS + 1
    return code if code or left <= OWN_STREAMS else None


def answer_questions(job, module):
    """Answer every line on descriptor 4 by one on descriptor 3, after a first that says that the
    program is ready -> the exit code."""
    if (code := load(job, module)) is not None:
        return code
    space = {}
    if job["lines"]:  # names in a line of test code: builtins, the setup's, then the program's
        space = {k: value for k, value in vars(module).items() if not hasattr(builtins, k)}
        # The objects that the program has, too: a class that is made again is another class.
        space |= job["given"]
        if not job["given"]:
            run_setup(job, space)
    left = bytearray()
    write_line(3, "ready")
    while (question := read_line(4, left, 1 << 30)) is not None:
        write_line(3, answer(question, module, space, job))
    return 0


def answer(question, module, space, job):
    """A question is (name, arguments, named arguments), or (name, expression, None) for a line of
    test code. The answer is the value, encoded for comparison; or, for the tester, a tuple of the
    value and, if the call changed any, of the containers that it was given. "!" and an exception if
    it failed, "?" and why if the value is no plain data."""
    known = []
    try:
        name, args, named = decode(question, known)
        function = resolve(module, name)
        if named is None:
            expression = compile(args, "tests.py", "eval", dont_inherit=True)
            for used in set(expression.co_names) & sys.stdlib_module_names - {name, *job["given"]}:
                found = importlib.import_module(used)
                # Not the program's `math`; but `datetime` may be the class of that module.
                if space.get(used, found) is not getattr(found, used, None):
                    space[used] = found
            space[name] = function
            value = eval(expression, space)
        else:
            value = function(*args, **dict(named))
        if job["compare"]:
            return encode(value, compare=True)
        try:
            changed = encode((name, args, named)) != question
        except NotPlain:  # it put objects of its own into what it was given
            changed = False
        return encode((value, *known) if changed else (value,), known)
    except NotPlain as error:
        return f"?{described(error)[1]}"
    except BaseException as error:
        kind, message = described(error)
        with contextlib.suppress(BaseException):
            return f"!{kind}\t{encode(tuple(error.args))}"
        return f"!{kind}\t{encode((message,))}"


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


if __name__ == "__main__":
    serve(int(sys.argv[1]), json.loads(sys.argv[2]))
