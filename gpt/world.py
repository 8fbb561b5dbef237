"""The processes that train a model together, as `torchrun` starts them: how many, which one this is, what all agree on.

    torchrun --nproc_per_node 2 -m gpt train ...        RANK 0 and 1, WORLD_SIZE 2, and where they meet

Without torchrun there is one process, every function here does what one process needs, and PyTorch is not imported.

What is exchanged at every step goes through the process group (gloo on the CPU, NCCL on GPUs), where nobody waits for
longer than its timeout. A process that dies is noticed at once, because its connections close. While the first process
does what takes as long as it takes, such as encoding a corpus or writing a checkpoint, the others wait in a group of
their own, which has no limit while machines answer: that they do, their systems see to by TCP's keep-alive.

The store in which they find each other is torchrun's, and outlives them: processes that it starts anew, after a failure
(--max-restarts), would find there what those before them wrote, addresses that nobody listens to any more. So the keys
of each start begin with a name of its own, which all agree on first:

    rank r > 0    hello/r = a fresh name, its own       waits for welcome/(its name) = g, then sets here/g/r
    rank 0        welcomes whoever said hello, to a fresh g, until here/g/r is there for every r
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from gpt.errors import UserError, require

__all__ = [
    "LostContactError",
    "announce",
    "any_of",
    "contact",
    "device",
    "exchange",
    "first",
    "first_then_all",
    "is_first",
    "last_words",
    "launcher",
    "local_rank",
    "rank",
    "remember",
    "remembered",
    "same_on_all",
    "share",
    "size",
    "start",
    "sum_of",
    "together",
]

T = TypeVar("T")

_SPEAKER = re.compile(r"rank (\d+): ")

TIMEOUT = 600.0  # seconds
_PATIENCE = timedelta(days=7)
_ALONE = uuid.uuid4().hex  # the name of a start of one process, which needs none of the others' to agree
_errors = 0  # that ended what this process did, where a program went on
_HEARD = 3.0  # seconds in which the others say that they live, or what went wrong with them
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How PyTorch's backends say that a connection is gone or that nobody answers.
_LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket")


class LostContactError(UserError):
    """Another process is gone, or does not answer."""


class _Group(NamedTuple):
    """How this process speaks to the others."""

    store: Any  # keys and values that outlive a process, those of this start
    name: str  # of this start
    patient: Any  # a process group without a time limit
    device: Any  # of what is sent
    connections: dict[int, int]  # of the groups, to the other processes: descriptors and inodes


_group: _Group | None = None
_torchrun: Any = None  # the store with the keys of all starts


def size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _NEEDED) else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that logs, prints and writes."""
    return rank() == 0


def share(n: int) -> slice:
    """Which of n things in a row are this process's: shares differ by one at most, and may be empty."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def remember(what: str) -> None:
    """Leave word for processes that the same torchrun starts after these. Raises LostContactError."""
    if _begun_by_torchrun() and is_first():
        _kept_store().set(f"twingrad/remembered/{what}", _ALONE if size() == 1 else _started().name)


def remembered(what: str, timeout: float = TIMEOUT) -> bool:
    """Whether processes that the same torchrun started before these left this word. Raises LostContactError."""
    if not _begun_by_torchrun():
        return False
    store, key = _kept_store(timeout), f"twingrad/remembered/{what}"
    name = _ALONE if size() == 1 else _group.name if _group else ""
    return store.check([key]) and store.get(key).decode() != name


def _begun_by_torchrun() -> bool:
    """Whether there is a torchrun, which may start processes anew: of one process too."""
    return size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def launcher() -> str:
    """What the user runs in the place of `twingrad`, on each machine."""
    if size() == 1:
        return "twingrad"
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    where = f"--nnodes {machines} " if machines > 1 else ""
    return f"torchrun {where}--nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', size())} -m gpt"


def start(timeout: float = TIMEOUT) -> None:
    """Meet the other processes, none of which is waited for longer than `timeout` seconds, in later steps too.

    Raises UserError where there are more processes on this machine than GPUs, and LostContactError.
    """
    global _group
    if size() == 1 or _group:
        return
    require("torch", extra="torch")
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    limit = timedelta(seconds=timeout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"nproc_per_node: {os.environ.get('LOCAL_WORLD_SIZE', size())} processes, but this machine has "
                f"{torch.cuda.device_count()} GPUs; with CUDA_VISIBLE_DEVICES= in the environment they use the CPU"
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    try:
        store = _kept_store(timeout)
        name = _name_this_start(store, timeout)
        met = PrefixStore(f"twingrad/{name}/group", _meet(timeout))
        before = _connections()
        dist.init_process_group(backend, store=met, rank=rank(), world_size=size(), timeout=limit)
        with _answered(timeout):
            patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise LostContactError(f"{size()} processes did not meet within {timeout:g} seconds: {error}") from error
    connections = {number: inode for number, inode in _connections().items() if before.get(number) != inode}
    _group = _Group(PrefixStore(f"twingrad/{name}", store), name, patient, device, connections)
    atexit.register(_leave)


def device() -> Any:
    """What this process computes on, a torch.device."""
    return _started().device


def any_of(flag: int) -> int:
    """The largest of the processes' numbers: of truth values, whether any is true."""
    if size() == 1:
        return flag
    import torch
    import torch.distributed as dist

    largest = torch.tensor(flag, dtype=torch.int64, device=device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_of(value: float) -> float:
    """The sum of the processes' numbers, the same in each."""
    if size() == 1:
        return value
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return float(total)


def exchange(value: T) -> list[T]:
    """Every process's value, by rank. It waits without a limit for those that still live."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value, group=_started().patient)
    return found


def together(action: Callable[[], T]) -> T:
    """Do in every process what may fail in some: then all raise the error of the first that failed, a UserError.

    What is done must not itself wait for other processes.
    """
    if size() == 1:
        return action()
    result: list[T] = []
    failed: Exception | None = None
    try:
        result.append(action())
    except Exception as error:
        failed = error
    _raise_first(exchange(None if failed is None else _text(failed)), failed)
    return result[0]


def first(action: Callable[[], T]) -> T | None:
    """Have the first process do something while the others wait; if it fails there, all raise its error."""
    return together(action if is_first() else lambda: None)


def first_then_all(action: Callable[[], T]) -> T:
    """Have the first process do what leaves a file behind, then every other, which will find it."""
    done = first(lambda: (action(),))
    return together(lambda: done[0] if done else action())


def same_on_all(value: Mapping[str, Any], what: str) -> None:
    """Raise UserError in every process unless all have the same settings, nested mappings of plain values."""
    everyones = exchange(_flat(value))
    for other, theirs in enumerate(everyones):
        for name in {**everyones[0], **theirs}:
            ours, there = everyones[0].get(name), theirs.get(name)
            if ours != there:
                raise UserError(f"{what}: {name} is {there} on rank {other}, {ours} on rank 0; all ranks need the same")


@contextlib.contextmanager
def contact(how_to_go_on: Callable[[], str] = str) -> Iterator[None]:
    """Within it, an error that comes from a process that is gone is LostContactError, the same in all that are left."""
    try:
        yield
    except RuntimeError as error:
        if not (_group and any(word in f"{type(error).__name__} {error}".lower() for word in _LOST)):
            raise
        raise LostContactError(f"{_who_is_gone()}{how_to_go_on()}") from error


def _who_is_gone() -> str:
    assert _group is not None
    _ignore_sigterm()  # torchrun ends those that are left
    _hang_up()
    living = {rank()}
    said: dict[int, str] = {}
    with contextlib.suppress(RuntimeError):  # the store may have been in the process that is gone
        _group.store.set(f"living/{rank()}", "yes")
        living, said = _others(_HEARD)
    if said:  # what went wrong was said there, and is not to be said again
        return f"rank {min(said)}: {said[min(said)]}"
    gone = [other for other in range(size()) if other not in living]
    named = " and ".join(f"rank {other}" for other in gone) or "the others"
    return f"rank {min(living)}: lost contact with {named}"


def announce(text: str) -> None:
    """Say to the others what `last_words` is going to say, before what takes longer than they wait for that."""
    if size() > 1 and _group:
        with contextlib.suppress(RuntimeError):
            _group.store.set(f"error/{rank()}/{_errors}", text)


def last_words(text: str) -> str | None:
    """What this process is to print of the error that ends it, None if one before it says the same."""
    global _errors
    if size() == 1:
        return text
    _ignore_sigterm()
    speaker = _SPEAKER.match(text)
    if speaker:  # all know who is to say it
        return text if int(speaker[1]) == rank() else None
    try:
        store = _group.store if _group else _before_the_start(_HEARD)
        number, _errors = _errors, _errors + 1  # what was said of an earlier one is not of this
        store.set(f"error/{rank()}", text)
        store.set(f"error/{rank()}/{number}", text)
        deadline = time.monotonic() + _HEARD
        before: list[int] = []
        while len(before) < rank() and time.monotonic() < deadline:
            before = [other for other in range(rank()) if store.check([f"error/{other}/{number}"])]
            said = (store.get(f"error/{other}/{number}").decode() for other in before)
            if any(words.startswith(text) for words in said):  # or with a word more
                return None
            time.sleep(0.02)
    except (RuntimeError, UserError):  # the store is gone too
        pass
    return text if is_first() else f"rank {rank()}: {text}"


def _started() -> _Group:
    start()
    assert _group is not None
    return _group


def _meet(timeout: float) -> Any:
    """A connection to the store that torchrun, or the first process, keeps."""
    require("torch", extra="torch")
    from torch.distributed.rendezvous import rendezvous

    try:
        with _answered(timeout):
            store, _, _ = next(rendezvous("env://", rank(), size(), timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        raise LostContactError(f"{size()} processes did not meet within {timeout:g} seconds: {error}") from error
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _kept_store(timeout: float = TIMEOUT) -> Any:
    """This process's own connection, for as long as it lives: the store may be in this very process."""
    global _torchrun
    if _torchrun is None:
        _torchrun = _meet(timeout)
    return _torchrun


def _before_the_start(timeout: float) -> Any:
    """The store's keys of processes that have not agreed on a name, and will not."""
    store = _kept_store(timeout)
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(f"twingrad/before/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _connections() -> dict[int, int]:
    """The descriptors of this process's sockets and their inodes; none where the system does not tell."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):  # that of the list itself is closed by now
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found[int(name)] = status.st_ino
    return found


def _hang_up() -> None:
    """Close what connects this process with the others: those that wait for it, not for the one that is gone, notice
    too that the work has ended, and say that they live."""
    assert _group is not None
    for descriptor in _connections().items() & _group.connections.items():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor[0])) as connection:
            connection.getpeername()  # not what listens, which gloo wants until the end
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _answered(timeout: float) -> Iterator[None]:
    """Have the system close connections that begin within it, once no machine has answered at the other end so long."""
    before = _connections()
    yield
    seconds = min(round(timeout), 32_767)  # the most that systems take
    options = {"TCP_KEEPIDLE": seconds // 2, "TCP_KEEPINTVL": seconds // 10, "TCP_KEEPCNT": 5}
    options |= {"TCP_USER_TIMEOUT": 1000 * seconds}  # of what was sent; in milliseconds
    options = {name: max(1, value) for name, value in options.items() if hasattr(socket, name)}
    for descriptor in _connections().keys() - before:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in options.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _name_this_start(store: Any, timeout: float) -> str:
    """What the keys of this start begin with, the same in all of its processes; see the module's docstring.

    torchrun's count of restarts would not do: where there are several machines, each has another.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    missing = set(range(1, size())) if is_first() else {0}
    if not is_first():
        store.set(f"twingrad/hello/{rank()}", own)
    while time.monotonic() < deadline:
        if is_first():
            for other in missing:
                if store.check([f"twingrad/hello/{other}"]):  # whoever said it, now or at an earlier start
                    store.set(f"twingrad/welcome/{store.get(f'twingrad/hello/{other}').decode()}", own)
            missing = {other for other in missing if not store.check([f"twingrad/here/{own}/{other}"])}
            if not missing:
                return own
        elif store.check([f"twingrad/welcome/{own}"]):
            name = store.get(f"twingrad/welcome/{own}").decode()
            store.set(f"twingrad/here/{name}/{rank()}", "yes")
            return name
        time.sleep(0.01)  # rather than wait in the store, where no Ctrl-C is heard
    raise RuntimeError(f"nothing was heard of {' and '.join(f'rank {other}' for other in sorted(missing))}")


def _others(seconds: float) -> tuple[set[int], dict[int, str]]:
    """Which processes say within some seconds that they live, and what others said of their end."""
    assert _group is not None
    store, deadline = _group.store, time.monotonic() + seconds
    while True:
        living = {other for other in range(size()) if store.check([f"living/{other}"])}
        said = {
            other: store.get(f"error/{other}").decode() for other in range(size()) if store.check([f"error/{other}"])
        }
        if len(living | said.keys()) == size() or time.monotonic() > deadline:
            return living, said
        time.sleep(0.02)


def _raise_first(texts: list[str | None], own: Exception | None) -> None:
    for other, text in enumerate(texts):
        if text is not None:
            if own is not None and not isinstance(own, UserError | OSError) and other == rank():
                raise own  # with its traceback, for whoever asked for it
            raise UserError(text if other == 0 else f"rank {other}: {text}") from own


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of names, "optimizer.lr"."""
    found: dict[str, str] = {}
    for name, item in value.items():
        found |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": repr(item)}
    return found


def _ignore_sigterm() -> None:
    """Be left the few seconds that it takes to say what happened."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
