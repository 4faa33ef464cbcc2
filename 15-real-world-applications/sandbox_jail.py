"""Topic 15 - Sandbox, the inner part: the program that shuts itself in and runs what nobody trusts.

    python -I -S -c "import sys; sys.path.insert(0, FOLDER); import sandbox_jail; del sys.path[0]; sandbox_jail.enter()"

sandbox.py starts it in a Python of its own. It reads a request from stdin and writes one line of JSON to stdout for
each job. For each job a supervisor makes a keeper, which reads the program, makes a child, takes the child's rights
away, and keeps its output and its time; the child runs the candidate. None of them knows a right answer: the judge,
outside, compares. Whatever a process has read its children find in their memory; so the supervisor reads no program
and no output, and a candidate finds none but its own.

    supervisor (in mode A process 1 of its own PID namespace)
      keeper 1
        candidate 1: stdin empty, stdout and stderr to the keeper, results as JSON lines on descriptor 3
      keeper 2 ...
"""

import contextlib
import io
import json
import os
import selectors
import signal
import sys
import time
import traceback

import sandbox_kernel as kernel

SCRATCH = "/scratch"  # in mode A the only place where a candidate may write
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
RESULTS = 3  # file descriptor of the results
SHUT = b"\n"  # what a child writes there once it is shut in, before any byte of the candidate's
PARTS = ("stdout", "stderr", "results")


def library_folders() -> list[str]:
    """Where this Python and the libraries that it may load later lie."""
    own = os.path.dirname(os.path.realpath(os.__file__))
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    return [path for path in dict.fromkeys([*system, os.path.dirname(own)]) if os.path.exists(path)]


def enter() -> None:
    """Read the request, shut in, run all jobs. A failure before the first job is reported, and nothing is run."""
    size = b""
    while not size.endswith(b"\n"):
        size += read_exactly(0, 1)
    request = json.loads(read_exactly(0, int(size)))
    programs, report = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        kernel.die_with_parent(request["parent"])
        if request["mode"] == "A":
            as_first_process(request, programs, report)
        else:
            supervise(request, programs, report)
    except BaseException as error:
        say(report, {"setup": f"{type(error).__name__}: {error}"})
    os._exit(0)


def read_exactly(end: int, n_bytes: int) -> bytes:
    """The next bytes and not one more, which would be the next program's."""
    data = b""
    while len(data) < n_bytes:
        part = os.read(end, n_bytes - len(data))
        if not part:
            raise EOFError(f"{n_bytes - len(data)} bytes are missing")
        data += part
    return data


def say(report: int, message: dict) -> None:
    data = (json.dumps(message) + "\n").encode()
    while data:
        data = data[os.write(report, data) :]


def as_first_process(request: dict, programs: int, report: int) -> None:
    """Change user, make namespaces, and supervise as their process 1, whose end is the end of everything in them."""
    if request["user"]:
        kernel.become(request["user"])
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    kernel.new_namespaces()
    here = os.getpid()
    child = os.fork()
    if child:
        os.close(report)
        os.close(programs)
        os.waitpid(child, 0)
        return
    # The parent is outside of the new PID namespace, so here its number reads 0 as long as it lives.
    kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    try:
        if os.getpid() != 1 or here == 1:
            raise OSError("no PID namespace was made")
        kernel.new_root([*library_folders(), *DEVICES], SCRATCH)
        supervise(request, programs, report)
    except BaseException as error:
        say(report, {"setup": f"{type(error).__name__}: {error}"})
    os._exit(0)


def supervise(request: dict, programs: int, report: int) -> None:
    """Run the jobs one after the other, each by a keeper; nothing of one is left when the next begins."""
    own = os.getpid()
    for job in request["jobs"]:
        if request["mode"] == "A":
            kernel.fresh_scratch(SCRATCH, job["disk"])
        keeper = os.fork()
        if keeper == 0:
            try:
                kernel.die_with_parent(own)
                say(report, run_job(job | json.loads(read_exactly(programs, job["n_bytes"])), request))
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(keeper, 0)
        with contextlib.suppress(ChildProcessError):
            while request["mode"] == "A":  # what a candidate has left behind has become ours, and has been killed
                os.waitpid(-1, 0)
        if status:
            return  # its program may be unread, so the next one cannot be found; what has no report is lost


def run_job(job: dict, request: dict) -> dict:
    """Start a candidate, keep what it writes within its limits, end it, and tell how it ended."""
    pipes = [os.pipe() for _ in PARTS]
    most = [*job["most"][:-1], job["most"][-1] + len(SHUT)]
    began, parent = time.monotonic(), os.getpid()
    child = os.fork()
    if child == 0:
        try:
            shut_in(job, request, parent, [end for _, end in pipes])
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os.write(RESULTS, SHUT)
        run_candidate(job)
    for _, end in pipes:
        os.close(end)
    kept, why = collect([end for end, _ in pipes], child, job["wall"], most, began)
    with contextlib.suppress(ProcessLookupError):
        if why:
            os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    sweep(child, request["mode"])
    drain([end for end, _ in pipes], kept, most)
    for end, _ in pipes:
        os.close(end)
    code, shut = os.waitstatus_to_exitcode(status), kept[-1].startswith(SHUT)
    del kept[-1][: len(SHUT)]
    told = {name: data.decode("utf-8", "replace") for name, data in zip(PARTS, kept, strict=True)}
    if not why and any(len(data) > limit for data, limit in zip(kept, job["most"], strict=True)):
        why = "output"
    return told | {
        "code": code,
        "why": why,
        "shut": shut,
        "seconds": time.monotonic() - began,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_kib": used.ru_maxrss,
    }


def collect(ends: list[int], child: int, wall: float, most: list[int], began: float) -> tuple[list[bytearray], str]:
    """Read the pipes until the child ends, and say why it has to be ended: "wall", "output", or "" if it did itself.

    The child is asked, not its pipes: what it left behind may hold them open, and it may close them and go on.
    """
    kept: list[bytearray] = [bytearray() for _ in ends]
    handle = os.pidfd_open(child)
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ, None)
        for place, end in enumerate(ends):
            os.set_blocking(end, False)
            selector.register(end, selectors.EVENT_READ, place)
        why, ended = "", False
        while not why and not ended:
            left = wall - (time.monotonic() - began)
            ready = selector.select(max(0.0, left))
            for key, _ in ready:
                if key.data is None:
                    ended = True
                elif not read_some(key.fd, kept[key.data]):
                    selector.unregister(key.fd)
                elif len(kept[key.data]) > most[key.data]:
                    why = "output"
            if not ready and left <= 0:
                why = "wall"
    os.close(handle)
    return kept, why


def read_some(end: int, kept: bytearray) -> bool:
    """Take what a pipe holds now; False at its end."""
    try:
        data = os.read(end, 65536)
    except BlockingIOError:
        return True
    kept += data
    return bool(data)


def drain(ends: list[int], kept: list[bytearray], most: list[int]) -> None:
    """What the child wrote last and nobody has read yet; whoever else holds the pipe is not waited for."""
    for end, data, limit in zip(ends, kept, most, strict=True):
        before = -1
        while len(data) <= limit and before != len(data):
            before = len(data)
            read_some(end, data)
        del data[limit + 1 :]


def sweep(child: int, mode: str) -> None:
    """End whatever a candidate has left running.

    In a PID namespace a keeper reaches every process but process 1 and itself. Without one only the group can be asked,
    which a process leaves at will; there the filter allows no process beside the candidate.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if mode == "A" and os.getppid() == 1:
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)


# The child


def shut_in(job: dict, request: dict, parent: int, ends: list[int]) -> None:
    """Give up, in this order, everything that a pure function does not need; then prove that it is gone."""
    mode = request["mode"]
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    high = [os.dup(end) for end in ends]
    for place, end in zip((1, 2, RESULTS), high, strict=True):
        os.dup2(end, place)
    os.closerange(RESULTS + 1, 4096)
    if mode != "A" and request["user"] and mode != "guard":
        kernel.become(request["user"])
    kernel.die_with_parent(parent)
    # in a namespace of its own there are three: who made it, the supervisor, the keeper
    elsewhere = 3 if mode == "A" else 0 if request["user"] else tasks_elsewhere()
    kernel.limit(job["memory"], job["cpu"], job["disk"], job["tasks"] + elsewhere)
    if mode in ("A", "B"):
        os.chdir(SCRATCH if mode == "A" else "/")
        kernel.forget_capabilities()
        kernel.no_new_rights()
        kernel.restrict_files(library_folders(), [SCRATCH] if mode == "A" else [], DEVICES)
        kernel.filter_calls(job["tasks"], alone=mode == "A")
        prove_shut()
    elif mode == "guard":
        disarm()


def tasks_elsewhere() -> int:
    """How many tasks this user runs already, in all programs: the kernel's limit of tasks counts them too."""
    found, user = 0, os.getuid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
    return found - 1  # this one is among the candidate's


def prove_shut() -> None:
    """Raise OSError if a folder that was not granted can be read, or a socket be made: rules are cheap to mistype."""
    try:
        os.listdir("/")
    except PermissionError:
        pass
    else:
        raise OSError("the sandbox is open: / can be listed")
    if kernel.LIBC.syscall(kernel.CALLS["socket"], 1, 1, 0) >= 0:
        raise OSError("the sandbox is open: a socket can be made")


DISARMED = (
    "kill",
    "killpg",
    "system",
    "fork",
    "forkpty",
    "setuid",
    "remove",
    "unlink",
    "rmdir",
    "removedirs",
    "rename",
)
DISARMED += ("renames", "truncate", "replace", "fchmod", "chmod", "chown", "chroot", "link", "putenv", "walk", "chdir")


def disarm() -> None:
    """Set names to None, as the guard of HumanEval's harness does: what is reached by another name stays in reach."""
    for name in DISARMED:
        setattr(os, name, None)
    sys.modules["subprocess"] = None
    sys.modules["ctypes"] = None


def run_candidate(job: dict) -> None:
    """Run the source; if a function is asked for, call it with each list of arguments and write what it returns.

    A line is ["ok", value] or ["error", what]. The candidate could write the lines itself: they carry answers, not
    verdicts, so that writing the right ones is as hard as the task.
    """
    code = 0
    try:
        sys.stdin = io.StringIO(job["stdin"])
        sys.argv = ["candidate.py"]
        space = {"__name__": "candidate" if job["function"] else "__main__", "__builtins__": __builtins__}
        exec(compile(job["source"], "candidate.py", "exec"), space)
        for arguments in job["calls"]:
            try:
                line = json.dumps(["ok", space[job["function"]](*arguments)])
            except Exception as error:
                line = json.dumps(["error", f"{type(error).__name__}: {error}"[:300]])
            data = line.encode() + b"\n"
            while data:
                data = data[os.write(RESULTS, data) :]
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        code = 1
        with contextlib.suppress(BaseException):
            inner = error.__traceback__.tb_next  # without the line above
            traceback.print_exception(type(error), error, inner, limit=-3)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)
