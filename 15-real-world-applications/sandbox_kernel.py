"""Topic 15 - Sandbox, the kernel's part: what Linux offers to take rights away from a process, by ctypes alone.

    limit(memory=2**28, cpu=2, file_size=2**23, n_tasks=1)   # rlimits
    forget_capabilities(); no_new_rights()
    restrict_files(readable=["/usr/lib"], writable=["/tmp"]) # Landlock: everything else cannot be opened
    filter_calls(n_tasks=1, alone=True)                      # seccomp: calls that no pure function needs

Each of these holds for the calling process and for all that come from it, and none can be undone. Nothing but the
standard library is imported: this file also runs inside of the sandbox, in a Python without packages. Landlock:
kernel documentation, userspace-api/landlock; seccomp: userspace-api/seccomp_filter; both need no rights of root.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
MACHINES = ("x86_64", "aarch64")  # whose numbers of system calls are known here

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEW = 0x7E020080  # every kind of namespace, the cgroup and time ones included
CLONE_THREAD = 0x00010000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2


def check(result: int, what: str) -> int:
    """The result of a call of libc, or OSError with its name."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def kernel(what: str, number: int, *arguments: object) -> int:
    """A system call by number."""
    return check(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def prctl(option: int, value: int) -> None:
    number = ctypes.c_ulong
    check(LIBC.prctl(option, number(value), number(0), number(0), number(0)), f"prctl({option})")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent dies, even if that has happened already. A change of uid undoes it."""
    prctl(PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)


def no_new_rights() -> None:
    """No program that this process starts gets more rights than it has: setuid bits mean nothing."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def forget_capabilities() -> None:
    """Give up what makes a process root inside of its own user namespace."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def become(user: int) -> None:
    """Change from root to a user that owns nothing, with all three ids, and without groups."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    prctl(PR_SET_DUMPABLE, 1)  # a change of user clears it; without it the map of a user namespace cannot be written


def limit(memory: int, cpu: int, file_size: int, n_tasks: int) -> None:
    """rlimits, soft and hard alike: bytes of address space, seconds of CPU, bytes of one file, tasks.

    The memory is that of one process: n_tasks of them may have n_tasks times as much. The kernel ignores the number of
    tasks for root, which is one of the reasons why nothing here runs as root.
    """
    limits = {"AS": memory, "CPU": cpu, "FSIZE": file_size, "NPROC": n_tasks, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


# Namespaces: what this process sees


def new_namespaces() -> None:
    """Own user ids, network (none), IPC, host name, mounts; and process ids for the children made from now on."""
    user, group = os.geteuid(), os.getegid()
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID
    check(LIBC.unshare(kinds), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(result, f"mount on {target}")


def new_root(needed: Iterable[str], scratch: str) -> None:
    """A file system that holds nothing but the needed folders and an empty scratch folder; the old one is let go.

    needed: absolute paths of folders and devices that are shown at the same place. It is built in memory, so nothing
    has to be removed afterwards.
    """
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    root = "/tmp"
    mount("jail", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path in needed:
        place = root + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):  # /lib is usr/lib in most distributions
            if not os.path.lexists(place):
                os.symlink(os.readlink(path), place)
        elif not os.path.lexists(place):
            os.mkdir(place) if os.path.isdir(path) else os.close(os.open(place, os.O_CREAT))
            mount(path, place, "", MS_BIND | MS_REC)
    os.makedirs(root + scratch, exist_ok=True)
    os.chdir(root)
    check(LIBC.syscall(ctypes.c_long(CALLS["pivot_root"]), b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def fresh_scratch(path: str, n_bytes: int) -> None:
    """An empty folder in memory with a limit of bytes and of files, in place of what was there."""
    with contextlib.suppress(OSError):
        check(LIBC.umount2(path.encode(), MNT_DETACH), "umount2")
    mount("scratch", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={n_bytes},nr_inodes=1024,mode=0700")


# Landlock: which files can be opened

READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE = (1 << 1) | (0b11 << 4) | (1 << 7) | (1 << 8)  # write; remove folder, file; make folder, file
TRUNCATE = 1 << 14  # since the third version
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # bits of rights on files by version


def landlock_version() -> int:
    """0: this kernel has none."""
    with contextlib.suppress(OSError, KeyError):
        return kernel("landlock", CALLS["landlock_create_ruleset"], None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return 0


def restrict_files(readable: Iterable[str], writable: Sequence[str] = (), devices: Sequence[str] = ()) -> None:
    """From now on only what lies in these folders can be opened, and nothing can be run. Raises OSError without it.

    Newer versions also forbid TCP (4), and signals and sockets to processes outside (6); they are used where present.
    """
    version = landlock_version()
    if not version:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    handled = (1 << FILE_RIGHTS.get(version, 16)) - 1
    network, scoped = (0b11 if version >= 4 else 0), (0b11 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", handled, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = kernel("landlock", CALLS["landlock_create_ruleset"], attributes, ctypes.c_size_t(len(attributes)), 0)
    grants = [(path, READ_FILE | READ_DIR) for path in readable]
    grants += [(path, READ_FILE | READ_DIR | WRITE | (TRUNCATE if version >= 3 else 0)) for path in writable]
    grants += [(path, READ_FILE | 0b10) for path in devices]
    for path, rights in grants:
        with contextlib.suppress(FileNotFoundError):
            grant(rules, path, rights)
    kernel("landlock", CALLS["landlock_restrict_self"], ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def grant(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= READ_FILE | 0b10 | TRUNCATE
    one = struct.pack("=Qi", rights, place)
    kernel("landlock", CALLS["landlock_add_rule"], ctypes.c_int(rules), 1, one, ctypes.c_uint32(0))
    os.close(place)


# seccomp: which calls the kernel answers

# name: (number on x86_64, number on aarch64); None where there is no such call
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # the network, also between processes of one machine
    **{"socket": (41, 198), "socketpair": (53, 199), "bind": (49, 200), "listen": (50, 201), "connect": (42, 203)},
    # other processes: their memory, signals, handles, limits, priorities
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424)},
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448)},
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122)},
    **{"sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    # other programs, and more rights
    **{"execve": (59, 221), "execveat": (322, 281), "prctl": (157, 167), "personality": (135, 92)},
    **{"setuid": (105, 146), "setgid": (106, 144), "setresuid": (117, 147), "setresgid": (119, 149)},
    **{"setreuid": (113, 145), "setregid": (114, 143), "setgroups": (116, 159), "capset": (126, 91)},
    # namespaces and mounts
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41)},
    **{"chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    # memory that no limit of a process counts
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196)},
    **{"semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},
    # queues, semaphores and memory that others have made, which only a namespace keeps away otherwise
    **{"semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "shmctl": (31, 195), "mq_unlink": (241, 181)},
    **{"msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187)},
    # files that may be read: their locks, which others wait for, and who else opens them; the disks of this machine
    **{"flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27)},
    **{"sync": (162, 81), "syncfs": (306, 267)},
    # what Landlock does not cover: rights, owners, times and attributes of files; lengths before its third version
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55)},
    **{"lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None)},
    **{"futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6)},
    **{"fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"truncate": (76, 45), "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264)},
    **{"open_by_handle_at": (304, 265)},
    # the kernel's large and rarely used faces, where its own mistakes are found
    **{"bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "userfaultfd": (323, 282)},
    **{"io_uring_register": (427, 427), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217)},
    **{"request_key": (249, 218), "fanotify_init": (300, 262), "quotactl": (179, 60), "acct": (163, 89)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171)},
    **{"iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None)},
    **{"lookup_dcookie": (212, 18), "sysfs": (139, None), "_sysctl": (156, None), "ustat": (136, None)},
    **{"create_module": (174, None), "query_module": (178, None), "get_kernel_syms": (177, None)},
    **{"nfsservctl": (180, 42), "mbind": (237, 235), "get_mempolicy": (239, 236), "set_mempolicy": (238, 237)},
    **{"vhangup": (153, 58), "remap_file_pages": (216, 234)},
}
ASKED = {  # needed by this file, or decided by their arguments
    **{"clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "prlimit64": (302, 261)},
    **{"fcntl": (72, 25), "ioctl": (16, 29), "seccomp": (317, 277), "landlock_create_ruleset": (444, 444)},
    **{"landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446)},
}
NEWEST = 449  # calls with larger numbers are younger than this list: they do not exist for the sandbox
PLACE = MACHINES.index(platform.machine()) if platform.machine() in MACHINES else -1
CALLS = {name: both[PLACE] for name, both in {**NUMBERS, **ASKED}.items() if PLACE >= 0 and both[PLACE] is not None}

ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # REFUSE | errno
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of classic BPF
NUMBER_AT, MACHINE_AT = 0, 4  # in struct seccomp_data
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; flags of a file (`chattr`) are among the others
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_GETLK, F_SETLK, F_SETLKW, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_OFD_GETLK and its two kin, F_SETLEASE, F_NOTIFY: locks
# for which others wait, and signals to whom one likes
FCNTLS = (5, 6, 7, 8, 10, 15, 36, 37, 38, 1024, 1026)
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def argument_at(index: int) -> int:
    """Where the low half of an argument is; both machines are little-endian."""
    return 16 + 8 * index


def when(name: str, *inner: Instruction) -> list[Instruction]:
    """Instructions for one call, by which every path must return."""
    return [(EQUAL, 0, len(inner), CALLS[name]), *inner]


def among(values: Sequence[int], inner: Instruction) -> list[Instruction]:
    """Instructions that do `inner` if what was loaded is one of these."""
    return [line for value in values for line in ((EQUAL, 0, 1, value), inner)]


def answer(error: int) -> Instruction:
    return (RETURN, 0, 0, REFUSE | error)


def call_filter(n_tasks: int, alone: bool) -> list[Instruction]:
    """The program that the kernel asks before every call.

    n_tasks: 1 means no thread and no process beside this one. alone: a PID namespace ends what outlives the candidate,
    so that forks may be allowed; without one only threads are, which die with their process.
    """
    permit, refuse = (RETURN, 0, 0, ALLOW), answer(errno.EPERM)
    program = [(LOAD, 0, 0, MACHINE_AT), (EQUAL, 1, 0, AUDIT_ARCH[MACHINES[PLACE]]), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, NUMBER_AT))
    if MACHINES[PLACE] == "x86_64":
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]  # the second table of numbers, x32
    program += [(AT_LEAST, 0, 1, NEWEST + 1), answer(errno.ENOSYS)]
    for name in NUMBERS:
        if name in CALLS:
            program += when(name, refuse)
    program += when("clone3", answer(errno.ENOSYS))  # its flags lie in memory, where no filter looks; clone's do not
    for name in ("fork", "vfork"):
        if name in CALLS:
            program += when(name, permit if n_tasks > 1 and alone else refuse)
    flags = [(LOAD, 0, 0, argument_at(0)), (ANY_BIT, 0, 1, CLONE_NEW), refuse]
    if n_tasks == 1:
        program += when("clone", refuse)
    elif alone:
        program += when("clone", *flags, permit)
    else:
        program += when("clone", *flags, (ANY_BIT, 0, 1, CLONE_THREAD), permit, refuse)
    own = [(LOAD, 0, 0, argument_at(0)), (EQUAL, 0, 1, 0), permit, refuse]  # limits of this process, not of another
    program += when("prlimit64", *own)
    command = (LOAD, 0, 0, argument_at(1))
    program += when("fcntl", command, *among(FCNTLS, refuse), permit)
    return [*program, *when("ioctl", command, *among(IOCTLS, permit), refuse), permit]


def filter_calls(n_tasks: int, alone: bool) -> None:
    """From now on the kernel refuses what `call_filter` says. Raises OSError on other machines or without seccomp."""
    if PLACE < 0:
        raise OSError(errno.ENOSYS, f"no numbers of system calls for {platform.machine()}; known: {MACHINES}")
    install(call_filter(n_tasks, alone))


def install(program: Sequence[Instruction]) -> None:
    """Hand a BPF program to the kernel for this process and its children."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    no_new_rights()
    made = Program(len(program), ctypes.addressof(code))
    check(
        LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(made), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        "seccomp",
    )


def refusing(*names: str, error: int = errno.EPERM) -> list[Instruction]:
    """A program that refuses these calls alone: how a container without a feature looks from inside, for tests."""
    program: list[Instruction] = [(LOAD, 0, 0, NUMBER_AT)]
    for name in names:
        program += when(name, answer(error))
    return [*program, (RETURN, 0, 0, ALLOW)]
