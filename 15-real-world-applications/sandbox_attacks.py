"""Topic 15 - Sandbox attacks: programs that try to get out, programs that try to look right, and who holds them.

python 15-real-world-applications/real_world_applications.py sandbox --selftest

Every attack prints REACHED if it got what it wanted, or leaves a trace that is looked for afterwards: a file, a packet,
a process. None does harm: they aim at bait that `Bait` lays out. The cheats aim at the verdict instead.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sandbox import (
    Limits,
    Outcome,
    Program,
    Sandbox,
    SetupFailed,
    Submission,
    find_sandbox,
    judge,
    printable,
    probe,
    run_code,
)
from workbench import RunConfig, announce, read_utf8, shown

SHORT = Limits(cpu_seconds=1, wall_seconds=0.3, n_tasks=16)  # for attacks that only an end from outside can stop
LONG = Limits(n_tasks=16)
MIB = 2**20
LIBC = ctypes.CDLL(None, use_errno=True)


class Attack(NamedTuple):
    """A hostile program. kind: what it is after; layer: what holds it; reached: the trace, where it prints nothing."""

    name: str
    kind: str
    layer: str
    source: str
    limits: Limits = LONG
    reached: Callable[["Bait", Outcome], bool] | None = None


class Bait:
    """What attacks aim at: a file, three sockets, a message queue, a process with a secret in its environment."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-bait-"))
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret.txt"
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.unix = socket.socket(socket.AF_UNIX)
        for end in (self.tcp, self.udp):
            end.bind(("127.0.0.1", 0))
        self.unix.bind(f"\0bait-{self.token}")
        for end in (self.tcp, self.unix):
            end.listen(8)
        self.udp.settimeout(0.2)
        self.queue = LIBC.msgget(0, 0o666)
        wait = [probe().python, "-I", "-S", "-c", "import sys; print(1, flush=True); sys.stdin.read()"]
        environment = {"SANDBOX_BAIT": self.token}
        self.victim = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.victim.stdout.readline()  # it runs
        self.lay()

    def lay(self) -> None:
        """Put the file back as it was."""
        for path in self.folder.iterdir():
            path.unlink()
        self.secret.write_text(self.token)
        self.secret.chmod(0o666)

    def aimed(self, source: str) -> str:
        """The source with the places of the bait written in."""
        found = {"FOLDER": repr(str(self.folder)), "SECRET": repr(str(self.secret)), "TOKEN": repr(self.token)}
        found |= {"TCP": str(self.tcp.getsockname()[1]), "UDP": str(self.udp.getsockname()[1])}
        found |= {"PID": str(self.victim.pid), "MIB": str(MIB), "QUEUE": str(self.queue)}
        for name, value in found.items():
            source = source.replace(f"@{name}", value)
        return source

    def changes(self) -> list[str]:
        """What is no longer as `lay` left it."""
        found = [f"{path.name} was written" for path in self.folder.iterdir() if path != self.secret]
        found += ["rights were changed"] if self.secret.stat().st_mode & 0o777 != 0o666 else []
        return found + (["a file was cut"] if self.secret.stat().st_size != len(self.token) else [])

    def packet(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.udp.recv(10))
        return False

    def victim_ended(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(0.2)
            return True
        return False

    def close(self) -> None:
        for end in (self.tcp, self.udp, self.unix):
            end.close()
        LIBC.msgctl(self.queue, 0, None)
        self.victim.kill()
        self.victim.communicate()
        shutil.rmtree(self.folder)


def left_running(mark: str) -> list[int]:
    """The processes whose command line holds this word."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path("/proc", name, "cmdline").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


CTYPES = """
import sys
sys.modules.pop("ctypes", None)
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    return result < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS, errno.EACCES)
"""
WRITE_ALL = """
import os
from posix import unlink
def fill(n_files, each, enough):
    for folder in (".", @FOLDER, "/tmp", "/dev/shm"):
        made, total = [], 0
        try:
            for number in range(n_files):
                name = f"{folder}/bait-{os.getpid()}-{number}"
                with open(name, "wb", buffering=0) as file:
                    made.append(name)
                    left = each
                    while left:
                        left -= file.write(b"x" * min(left, @MIB)) if left else 0
                        total += min(each, @MIB)
        except OSError:
            pass
        for name in made:
            unlink(name)
        if enough(len(made), total):
            print("REACHED", folder, len(made), total)
            return
"""


def stopped(status: str) -> Callable[[Bait, Outcome], bool]:
    """The attack got through unless it was ended for this reason."""
    return lambda bait, outcome: outcome.status != status


def ends_badly(bait: Bait, outcome: Outcome) -> bool:
    return outcome.status == "ok"


ATTACKS = (
    Attack("endless loop", "time", "limits", "while True: pass", SHORT, stopped("timeout")),
    Attack("endless sleep", "time", "supervisor", "import time\ntime.sleep(1000)", SHORT, stopped("timeout")),
    Attack(
        "ignore every signal, close every pipe",
        "time",
        "supervisor",
        "import os, signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\nfor n in range(9):\n    try: os.close(n)\n    except OSError: pass\n"
        "while True: time.sleep(1)",
        SHORT,
        stopped("timeout"),
    ),
    Attack("a number of 370 million digits", "time", "limits", "print(len(str(9 ** 9 ** 9)))", SHORT, ends_badly),
    Attack(
        "a pattern that never matches",
        "time",
        "limits",
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
        SHORT,
        stopped("timeout"),
    ),
    Attack(
        "recursion without end",
        "time",
        "limits",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        SHORT,
        ends_badly,
    ),
    Attack("a source that the compiler chokes on", "time", "limits", "eval('-' * 10 ** 6 + '1')", SHORT, ends_badly),
    Attack(
        "1.5 GB of memory",
        "memory",
        "limits",
        "kept = []\nfor _ in range(1500): kept.append(bytearray(@MIB))\nprint('REACHED')",
    ),
    Attack(
        "memory in files that nobody sees (memfd)",
        "memory",
        "seccomp",
        "import os\ntotal = 0\nfor _ in range(50):\n    total += os.write(os.memfd_create('x'), b'x' * 4 * @MIB)\n"
        "if total > 128 * @MIB: print('REACHED')",
    ),
    Attack(
        "300 processes",
        "processes",
        "limits, seccomp",
        "from posix import fork, _exit\nimport time\nn = 0\ntry:\n    for _ in range(300):\n        if fork() == 0:\n"
        "            time.sleep(3); _exit(0)\n        n += 1\nexcept OSError: pass\nif n > 64: print('REACHED', n)",
    ),
    Attack(
        "500 threads",
        "processes",
        "limits",
        "import threading, time\nthreading.stack_size(65536)\nn = 0\ntry:\n    for _ in range(500):\n"
        "        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()\n        n += 1\n"
        "except (RuntimeError, MemoryError): pass\nif n > 64: print('REACHED', n)",
    ),
    Attack(
        "a process that outlives its parent",
        "processes",
        "PID namespace, seccomp",
        "from posix import fork, setsid, _exit\nimport os, time\nif fork() == 0:\n    setsid()\n    if fork() == 0:\n"
        "        os.closerange(0, 64)\n        time.sleep(5)\n    _exit(0)\ntime.sleep(0.2)",
        reached=None,
    ),
    Attack(
        "run another program",
        "processes",
        "seccomp, Landlock",
        "from posix import execv\nexecv('/bin/echo', ['echo', 'REACHED'])",
    ),
    Attack(
        "run another program beside this one",
        "processes",
        "seccomp, Landlock",
        "import sys\nsys.modules.pop('subprocess', None)\nimport subprocess\n"
        "print(subprocess.run(['/bin/echo', 'REACHED'], capture_output=True, text=True).stdout)",
    ),
    Attack(
        "write a file outside", "files", "Landlock, mounts", "open(@FOLDER + '/out', 'w').write('x')\nprint('REACHED')"
    ),
    Attack("read /etc/passwd", "files", "Landlock, mounts", "print('REACHED', open('/etc/passwd').read(10))"),
    Attack("read a file of ours", "files", "Landlock, mounts", "print('REACHED', open(@SECRET).read())"),
    Attack(
        "read through a symbolic link",
        "files",
        "Landlock, mounts",
        "from posix import symlink\nimport os\nfor place in ('link', '/tmp/link-' + @TOKEN):\n    try:\n"
        "        symlink(@SECRET, place)\n        text = open(place).read()\n        print('REACHED', text)\n"
        "    except OSError: pass\n    try: __import__('posix').unlink(place)\n    except OSError: pass",
    ),
    Attack(
        "see names and sizes of files",
        "files",
        "mounts",
        "import os\nprint('REACHED', os.stat(@SECRET).st_size)",
    ),
    Attack(
        "cut a file of ours",
        "files",
        "seccomp, Landlock, mounts",
        "from posix import truncate\ntruncate(@SECRET, 0)\nprint('REACHED')",
    ),
    Attack(
        "change rights of a file of ours",
        "files",
        "seccomp, user",
        "from posix import chmod\nchmod(@SECRET, 0)\nprint('REACHED')",
    ),
    Attack(
        "read other processes' environment",
        "files",
        "Landlock, mounts",
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    try:\n"
        "        if @TOKEN.encode() in open(f'/proc/{pid}/environ', 'rb').read(): print('REACHED')\n"
        "    except OSError: pass",
    ),
    Attack(
        "list processes",
        "files",
        "Landlock, mounts",
        "import os\nif sum(map(str.isdigit, os.listdir('/proc'))) > 3: print('REACHED')",
    ),
    Attack(
        "lock a file that others read",
        "files",
        "seccomp",
        "import fcntl, os\nfile = open(os.__file__)\n"
        "for lock, kind in ((fcntl.flock, fcntl.LOCK_EX), (fcntl.lockf, fcntl.LOCK_SH)):\n"
        "    try:\n        lock(file, kind | fcntl.LOCK_NB)\n        print('REACHED')\n"
        "    except OSError: pass",
    ),
    Attack(
        "read flags of a file, as `chattr` does",
        "files",
        "seccomp",
        "import array, fcntl, os\nfcntl.ioctl(open(os.__file__), 0x80086601, array.array('L', [0]))\nprint('REACHED')",
    ),
    Attack(
        "watch who opens files",
        "files",
        "seccomp",
        CTYPES + "if libc.inotify_add_watch(libc.inotify_init1(0), b'/usr/lib', 0xFFF) >= 0: print('REACHED')",
    ),
    Attack("one file of 64 MB", "disk", "limits", WRITE_ALL + "fill(1, 64 * @MIB, lambda n, total: total > 32 * @MIB)"),
    Attack(
        "160 MB in 40 files",
        "disk",
        "tmpfs, Landlock",
        WRITE_ALL + "fill(40, 4 * @MIB, lambda n, total: total > 64 * @MIB)",
    ),
    Attack("3,000 empty files", "disk", "tmpfs, Landlock", WRITE_ALL + "fill(3000, 0, lambda n, total: n > 2000)"),
    Attack(
        "1,000 open files",
        "disk",
        "limits",
        "import os\nn = 0\ntry:\n    for _ in range(1000):\n        os.open('/dev/null', 0)\n        n += 1\n"
        "except OSError: pass\nif n > 256: print('REACHED', n)",
    ),
    Attack(
        "connect over TCP",
        "network",
        "seccomp, network namespace, Landlock",
        "import socket\nsocket.create_connection(('127.0.0.1', @TCP), 2)\nprint('REACHED')",
    ),
    Attack(
        "send over UDP",
        "network",
        "seccomp, network namespace",
        "import socket\nsocket.socket(2, 2).sendto(b'hi', ('127.0.0.1', @UDP))",
        reached=lambda bait, outcome: bait.packet(),
    ),
    Attack(
        "connect to a socket without a file",
        "network",
        "seccomp, network namespace, Landlock",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0bait-' + @TOKEN)\nprint('REACHED')",
    ),
    Attack(
        "ask about a message queue of ours",
        "network",
        "seccomp, IPC namespace",
        CTYPES + "if libc.msgctl(@QUEUE, 2, ctypes.create_string_buffer(256)) == 0: print('REACHED')",
    ),
    Attack(
        "signal another process",
        "kernel",
        "seccomp, PID namespace, user",
        "from posix import kill\nkill(@PID, 0)\nprint('REACHED')",
    ),
    Attack(
        "signal another process through a pipe",
        "kernel",
        "seccomp, PID namespace, user",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, @PID)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')",
        reached=lambda bait, outcome: bait.victim_ended(),
    ),
    Attack(
        "lower the limits of another process",
        "kernel",
        "seccomp, PID namespace, user",
        "import resource\nresource.prlimit(@PID, resource.RLIMIT_CORE, (0, 0))\nprint('REACHED')",
    ),
    Attack(
        "trace another process",
        "kernel",
        "seccomp, PID namespace, user",
        CTYPES + "if libc.ptrace(0x4206, @PID, 0, 0) == 0: print('REACHED')",
    ),
    Attack("be root", "kernel", "user", "import os\nif os.geteuid() == 0: print('REACHED')"),
    Attack(
        "make a user namespace",
        "kernel",
        "seccomp",
        CTYPES + "if libc.unshare(0x10000000) == 0: print('REACHED')",
    ),
    Attack(
        "mount",
        "kernel",
        "seccomp, user",
        CTYPES + "if not refused(libc.mount(b'x', b'/no-such-place', b'tmpfs', 0, None)): print('REACHED')",
    ),
    Attack(
        "talk to io_uring, keyrings, userfaultfd",
        "kernel",
        "seccomp",
        CTYPES + "open_ones = [n for n in (425, 250, 323) if not refused(libc.syscall(n, -1, 0, 0, 0, 0))]\n"
        "if open_ones: print('REACHED', open_ones)",
    ),
    Attack(
        "the other numbers of system calls (x32)",
        "kernel",
        "seccomp",
        CTYPES + "if libc.syscall(0x40000000 + 39) > 0: print('REACHED')",
    ),
    Attack("output without end", "output", "supervisor", "while True: print('x' * 1000)", SHORT, stopped("output")),
    Attack(
        "results without end",
        "output",
        "supervisor",
        "import os\nwhile True: os.write(3, b'[\"ok\", 1]\\n' * 1000)",
        SHORT,
        stopped("output"),
    ),
    Attack("wait for input", "output", "supervisor", "input()\nprint('REACHED')", SHORT, stopped("error")),
)

BENIGN = {  # name -> (source, what it prints, whether tier B runs it)
    "the standard library": (
        "import collections, decimal, json, math, re, statistics\n"
        "print(json.dumps(collections.Counter(re.findall('[a-z]', 'abab'))), math.comb(5, 2), statistics.mean([1, 3]))",
        '{"a": 2, "b": 2} 10 2\n',
        True,
    ),
    "4 threads": (
        "import threading\nn = []\nts = [threading.Thread(target=n.append, args=(i,)) for i in range(4)]\n"
        "[t.start() for t in ts]\n[t.join() for t in ts]\nprint(sorted(n))",
        "[0, 1, 2, 3]\n",
        True,
    ),
    "a scratch file": ("open('a.txt', 'w').write('hi')\nprint(open('a.txt').read())", "hi\n", False),
    "a second process": (
        "import os, sys\nif os.fork() == 0: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
        "7\n",
        False,
    ),
}


class AttackResult(NamedTuple):
    attack: Attack
    contained: bool
    outcome: Outcome


@contextlib.contextmanager
def baited() -> Iterator[Bait]:
    bait = Bait()
    try:
        yield bait
    finally:
        bait.close()


def try_attack(sandbox: Sandbox, attack: Attack, bait: Bait) -> AttackResult:
    """Run one attack, look for its traces, and remove them."""
    mark = f"attack-{secrets.token_hex(6)}"
    bait.lay()
    outcome = run_code(bait.aimed(attack.source), "", attack.limits, sandbox, mark)
    reached = "REACHED" in outcome.stdout or bool(attack.reached and attack.reached(bait, outcome))
    reached |= bool(bait.changes())
    if left_running(mark):
        time.sleep(0.3)  # who was killed may still be going
    for pid in left_running(mark):
        reached = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return AttackResult(attack, not reached, outcome)


def run_attacks(sandbox: Sandbox, attacks: Sequence[Attack] = ATTACKS) -> list[AttackResult]:
    """Try attacks one after the other, so that each trace has its name; about a tenth of a second each."""
    found = []
    bait = Bait()
    try:
        for attack in attacks:
            if bait.victim.poll() is not None:  # an earlier one ended it
                bait.close()
                bait = Bait()
            found.append(try_attack(sandbox, attack, bait))
            wait_until_gone(sandbox.user)
    finally:
        bait.close()
    return found


def wait_until_gone(user: int, most: float = 5.0) -> None:
    """Let the ended processes of a candidate's user go: as long as nobody has asked for them they count as tasks."""
    end = time.monotonic() + most
    while user and time.monotonic() < end:
        pids = filter(str.isdigit, os.listdir("/proc"))
        if not any(owner_of(pid) == user for pid in pids):
            return
        time.sleep(0.05)


def owner_of(pid: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return -1


def run_together(sandbox: Sandbox, attacks: Sequence[Attack] = ATTACKS) -> tuple[list[AttackResult], list[str]]:
    """Try attacks in a few batches, a fifth of the time; and the traces that all of them together have left."""
    mark, found, traces = f"attacks-{secrets.token_hex(6)}", {}, []
    with baited() as bait:
        for limits in dict.fromkeys(attack.limits for attack in attacks):
            group = [attack for attack in attacks if attack.limits == limits]
            outcomes = sandbox.run([Program(bait.aimed(attack.source)) for attack in group], limits, mark)
            for attack, outcome in zip(group, outcomes, strict=True):
                held = not (attack.reached and attack.reached(bait, outcome)) and "REACHED" not in outcome.stdout
                found[attack.name] = AttackResult(attack, held, outcome)
        traces += [f"process {pid} is left" for pid in left_running(mark)]
        traces += ["a process of ours was ended"] if bait.victim.poll() is not None else []
        traces += bait.changes()
    return [found[attack.name] for attack in attacks], traces


def run_benign(sandbox: Sandbox) -> dict[str, bool]:
    """Whether honest programs run; those that this tier does not offer are left out."""
    asked = {name: item for name, item in BENIGN.items() if item[2] or sandbox.mode != "B"}
    outcomes = sandbox.run([Program(source) for source, _, _ in asked.values()], LONG)
    return {
        name: outcome.stdout == printed
        for (name, (_, printed, _)), outcome in zip(asked.items(), outcomes, strict=True)
    }


# Cheats: programs that want to be called right

RIGHT = "def f(n):\n    return n * n + 1\n"
CASES = [([n], n * n + 1) for n in (0, 1, 2, 5, 9)]
CHEATS = {
    "print the verdict and leave": "import os\nprint('PASSED', flush=True)\nos._exit(0)",
    "leave with code 0": "import sys\nsys.exit(0)",
    "leave with code 0 when called": "import os\ndef f(n):\n    print('PASSED', flush=True)\n    os._exit(0)",
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef f(n): return Any()",
    "a number that equals everything": "class Any(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef f(n): return Any(0)",
    "an exit hook": "import atexit, os\nprint('PASSED', flush=True)\natexit.register(os._exit, 0)\ndef f(n): return 0",
    "an exception hook": "import os, sys\ndef hook(*_):\n    print('PASSED', flush=True)\n    os._exit(0)\n"
    "sys.excepthook = hook\ndef f(n): return 0",
    "patch unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\ndef f(n): return 0",
    "take the answers from the caller's frame": "import sys\ndef f(n):\n    frame = sys._getframe()\n    while frame:\n"
    "        for space in (frame.f_locals, frame.f_globals):\n"
    "            for arguments, right in space.get('CASES', []):\n"
    "                if arguments == [n]: return right\n        frame = frame.f_back\n    return 0",
    "take the answers from memory": "import gc\ndef f(n):\n    for item in gc.get_objects():\n"
    "        if type(item) is tuple and len(item) == 2 and item[0] == [n]: return item[1]\n    return 0",
    "read the tests": "import os\ndef f(n):\n    for folder in ('.', '/tmp', os.path.dirname(os.getcwd())):\n"
    "        try: names = os.listdir(folder)\n        except OSError: continue\n        for name in names:\n"
    "            if 'test' in name: return eval(open(folder + '/' + name).read())[n]\n    return 0",
    "take another candidate's program from memory": "import gc, sys\n"
    "found, frame = gc.get_objects(), sys._getframe()\nwhile frame:\n    found += frame.f_locals.values()\n"
    "    frame = frame.f_back\nfor item in [one for one in found if type(one) is dict]:\n"
    "    for job in item.get('jobs', [item]):\n        source = job.get('source', '')\n"
    "        if 'def f(' in source and 'gc' not in source and 'f' not in globals(): exec(source)",
    "write results oneself": "import os\nfor _ in range(5): os.write(3, b'[\"ok\", true]\\n')\nos._exit(0)",
    "more results than cases": "import os\nfor n in range(99): os.write(3, b'[\"ok\", %d]\\n' % n)\ndef f(n): return 0",
    "close the pipe": "import os\nos.close(3)\nprint('PASSED', flush=True)\ndef f(n): return n * n + 1",
    "patch the packing": "import json\njson.dumps = lambda value, **_: '[\"ok\", true]'\ndef f(n): return 0",
    "not a number": "def f(n): return float('nan')",
    "true is one": "def f(n): return True if n == 0 else n * n + 1",
    "right once, then silent": "import os\ndef f(n):\n    if n: os._exit(0)\n    return 1",
    "results without end": "import os\nwhile True: os.write(3, b'[\"ok\", 1]\\n')",
}


def judge_outside(sources: Sequence[str], sandbox: Sandbox) -> list[bool]:
    """The verdicts of this course's judge: answers come out, and are compared outside."""
    return [verdict.passed for verdict in judge([Submission(source, "f", CASES) for source in sources], LONG, sandbox)]


def judge_by_exit(sources: Sequence[str], sandbox: Sandbox) -> list[bool]:
    """The usual shortcut: tests as asserts behind the candidate, in its process; exit code 0 means passed."""
    tests = f"\nCASES = {CASES!r}\nfor arguments, right in CASES:\n    assert f(*arguments) == right\n"
    return [outcome.status == "ok" for outcome in sandbox.run([Program(source + tests) for source in sources], LONG)]


UNITTEST = f"""
import unittest
CASES = {CASES!r}
class Tests(unittest.TestCase):
    def test_all(self):
        for arguments, right in CASES:
            self.assertEqual(f(*arguments), right)
if unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Tests)).wasSuccessful():
    print("PASSED")
"""


def judge_by_print(sources: Sequence[str], sandbox: Sandbox) -> list[bool]:
    """The other shortcut: unittest in the candidate's process; the word PASSED in its output means passed."""
    outcomes = sandbox.run([Program(source + UNITTEST) for source in sources], LONG)
    return ["PASSED" in outcome.stdout for outcome in outcomes]


JUDGES: dict[str, Callable[[Sequence[str], Sandbox], list[bool]]] = {
    "asserts inside, by exit code": judge_by_exit,
    "unittest inside, by its print": judge_by_print,
    "answers out, compared outside": judge_outside,
}


# The verb


@dataclass(frozen=True)
class SandboxConfig(Limits):
    """What to run, and within which limits."""

    program: Path | None = None  # a Python file to run
    selftest: bool = False  # run the attacks and cheats on this machine
    i_accept_unsafe: bool = False  # run it even where no sandbox can be built


def sandbox(config: SandboxConfig, run: RunConfig) -> None:
    """Say which tier of sandbox this machine reaches; run a program in it, or attack it (--selftest)."""
    report = probe()
    print("\n".join(report.lines()))
    if config.selftest:
        selftest(find_sandbox(config.i_accept_unsafe))
    elif config.program:
        if not config.program.is_file():
            raise ValueError(f"program={config.program} is no file; give a Python file")
        chosen = find_sandbox(config.i_accept_unsafe)
        try:
            outcome = run_code(read_utf8(config.program), "", config, chosen)
        except SetupFailed as error:
            raise ValueError(f"the sandbox could not be built, nothing was run: {error}") from None
        print(printable(outcome.stdout, "\n\t"), end="")
        print(printable(outcome.stderr, "\n\t"), end="", file=sys.stderr)
        print(f"{shown(config.program)}: {outcome.status}, {outcome.seconds:.2f} s, {outcome.peak_mib:.0f} MiB")


def selftest(chosen: Sandbox) -> None:
    """Print what every attack and cheat came to. Raises ValueError if one of them got through."""
    announce(f"{len(ATTACKS)} attacks, {len(BENIGN)} honest programs, {len(CHEATS)} cheats", 15)
    (results, traces), honest = run_together(chosen), run_benign(chosen)
    for result in results:
        said = "held" if result.contained else "GOT THROUGH"
        print(f"  {result.attack.kind:10}{result.attack.name:45}{said:12}{result.outcome.status}")
    [right, *passed] = judge_outside([RIGHT, *CHEATS.values()], chosen)
    print(f"attacks held: {sum(result.contained for result in results)} of {len(results)}")
    print(f"honest programs that ran: {sum(honest.values())} of {len(honest)}")
    print(f"cheats that passed: {sum(passed)} of {len(CHEATS)}; the right program {'passes' if right else 'FAILS'}")
    through = traces + [result.attack.name for result in results if not result.contained]
    through += [name for name, ok in zip(CHEATS, passed, strict=True) if ok] + ([] if right else ["the right program"])
    through += [name for name, ran in honest.items() if not ran]
    expected = ["see names and sizes of files"] if chosen.mode == "B" else []
    bad = [name for name in through if name not in expected]
    if bad:
        raise ValueError(f"this sandbox fails its test: {', '.join(bad)}; do not run untrusted code with it")


def attack_table(modes: Sequence[str], python: str) -> dict[str, list[Any]]:
    """Which attack each mode holds: attack -> a mark for each mode."""
    columns = [run_attacks(Sandbox(mode, python)) for mode in modes]
    return {results[0].attack.name: [result.contained for result in results] for results in zip(*columns, strict=True)}
