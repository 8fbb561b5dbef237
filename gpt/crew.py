"""A batch in parts, each in a process of its own, and all of them share the model's memory.

Threads of one interpreter (gpt/parts.py) hand its lock to each other at every operation. Where operations are short,
as a small model's are, that takes as long as they do; processes have a lock each. They meet twice in a step:

    gradients    process p: its part's, added up in arrays of its own, g_p
    sum          process p: its stretch of all numbers, of g = sum_q g_q and of |g|^2
    update       process p: its rows of each parameter, by AdamW

That takes the memory of all gradients once more for each process, which is why the model must be small
(parts.MOST_APART). Between spans of a text keys, values and their gradients go from one process to the next.

What this process asks of the others are calls of a Member's methods. They are started when a batch is first divided,
and end with the engine, with this process however it goes, or when a part fails; then the next batch starts others,
which find all that they need in the shared memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from gpt import memory, parts, processes
from gpt.engine import Arrays
from gpt.errors import UserError
from gpt.learner import Job, Learner, Setup
from reference import optim

__all__ = ["Crew"]

ALIGNED = 64  # bytes, a line of a processor's cache
GONE = (EOFError, ConnectionError)  # what one meets where another process has ended

Links = tuple[Connection | None, Connection | None]  # to the processes of the earlier and of the later span


class Crew:
    """The processes that train one model, of which this is the first. The same methods as numpy_engine.Threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._size = setup, parts.threads()
        self._shared = Shared(setup, self._size)
        self._first = Member(setup, self._shared, 0)
        self.params, self.optimizer = self._shared.params, self._first.optimizer
        self._others: list[_Other] = []
        self._end: Callable[[], Any] = lambda: None
        self._learnt: set[int] = set()  # the processes whose gradients are to be added up
        self._owner = os.getpid()

    def loss(self, jobs: Sequence[Job]) -> float:
        """The batch's mean loss."""
        return sum(self._all("loss", [(job,) for job in jobs]))

    def learn(self, jobs: Sequence[Job]) -> float:
        """The same, and its gradient is added up."""
        losses = self._all("learn", [(job, number not in self._learnt) for number, job in enumerate(jobs)])
        self._learnt |= set(range(len(jobs)))
        return sum(losses)

    def gradients(self) -> Arrays:
        """What has been added up since the last step."""
        self.norm()
        return dict(self._shared.grads[0]) if self._learnt else {}

    def norm(self) -> float:
        """Of the gradients, global L2: the same to the last bit whether there are other processes."""
        if not self._learnt:
            return 0.0
        stretches = [(sorted(self._learnt), number) for number in range(self._size)]
        add_up = self._first.add_up
        norms = self._all("add_up", stretches) if self._others else [add_up(*stretch) for stretch in stretches]
        self._learnt = {0}
        return math.hypot(*norms)

    def step(self, lr: float, scale: float) -> None:
        """AdamW's, along the gradients times `scale`, which are forgotten."""
        self._check_owner()
        if self._others:
            self._all("update", [(self.optimizer.steps, lr, scale)] * self._size)
            self.optimizer.steps += 1
        else:
            self.optimizer.step(self._shared.grads[0], lr, scale)
        self.forget()

    def forget(self) -> None:
        """The gradients."""
        self._learnt = set()

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a method of the first members answers, of as many as there are tuples of arguments."""
        self._check_owner()
        with parts.one_batch():
            try:
                if len(arguments) > 1 and not self._others:
                    self._start()
                others = self._others[: len(arguments) - 1]
                for other, given in zip(others, arguments[1:], strict=True):
                    other.tell(method, given)
                own = _result(getattr(self._first, method), arguments[0])
                # Where this one has failed, they may wait for it; where its neighbour is gone, one of them says why.
                heard = isinstance(own, GONE) or not isinstance(own, Exception)
                answers = [own, *(other.hear() for other in others if heard)]
                if errors := [answer for answer in answers if isinstance(answer, Exception)]:
                    raise min(errors, key=lambda error: isinstance(error, GONE))
                return answers
            except BaseException:
                self._end()
                raise

    def _check_owner(self) -> None:
        """Steps in a forked process would change the model in the one that it was forked from, too."""
        if os.getpid() != self._owner:
            raise UserError("engine: it belongs to the process that this one was forked from; create one here")

    def _start(self) -> None:
        memory.return_freed()  # the parameters' memory before they came here: activations of a part do not fill it
        links = [Pipe() for _ in range(1, self._size)]  # from each process to the next
        self._first.later = links[0][0]
        self._end = weakref.finalize(self, _end, self._others, links[0][0])
        for number, (_, earlier) in enumerate(links, 1):
            later = links[number][0] if number < len(links) else None
            self._others.append(_Other(self._setup, self._shared.file, number, self._size, earlier, later))


def _end(others: list[_Other], link: Connection) -> None:
    link.close()
    while others:
        others.pop().end()


def _result(method: Any, arguments: tuple[Any, ...]) -> Any:
    """What it returns, or the error that it raises."""
    try:
        return method(*arguments)
    except Exception as error:
        return error


class Member:
    """What each process does."""

    def __init__(self, setup: Setup, shared: Shared, number: int, links: Links = (None, None)) -> None:
        self._number, self._size, self._shared = number, len(shared.grads), shared
        self.earlier, self.later = links
        self._learner = Learner(setup, shared.params)
        self.optimizer = setup.new_optimizer(shared.params)
        self.optimizer.m, self.optimizer.v = shared.m, shared.v
        self._own_rows = self.optimizer.rows(number, self._size)

    def loss(self, job: Job) -> float:
        """What this part adds to the batch's mean loss."""
        return self._learner.loss(self._part(job), job)

    def learn(self, job: Job, begin: bool) -> float:
        """The same, and its gradient is added to this process's; `begin`: it is the first."""
        own = self._shared.grads[self._number]
        grads, spare = ({}, dict(own)) if begin else (dict(own), {})
        loss = self._learner.learn(self._part(job), job, grads, spare)
        for name, gradient in grads.items():
            if gradient is not own[name]:  # the model had no use for the memory
                own[name][...] = gradient
        return loss

    def _part(self, job: Job) -> Part:
        return Part(job.share, self.earlier, self.later)

    def add_up(self, learnt: Sequence[int], number: int) -> float:
        """Add the gradients of these processes up in those of the first, a stretch of them; its norm."""
        first, last = (self._shared.flat_grads[0].size * n // self._size for n in (number, number + 1))
        total, *others = (self._shared.flat_grads[process][first:last] for process in learnt)
        for gradients in others:
            total += gradients
        return optim.global_norm({"": total})

    def update(self, steps: int, lr: float, scale: float) -> None:
        """AdamW's step after so many, along the first process's gradients times `scale`, of this one's rows."""
        grads = optim.rows(self._shared.grads[0], self._number, self._size)
        self._own_rows.steps = steps
        self._own_rows.step(grads, lr, scale)


class Part(parts.Part):
    """A part that adds up its gradients alone, and whose text's other spans are in the processes before and after."""

    def __init__(self, share: parts.Share, earlier: Any, later: Any) -> None:
        super().__init__(share)
        self._earlier, self._later = earlier, later

    def _to_later(self, layer: int, kv: parts.Pair) -> None:
        self._later.send(kv)

    def _from_earlier(self, layer: int) -> parts.Pair:
        return self._earlier.recv()

    def _to_earlier(self, layer: int, gradients: parts.Pair) -> None:
        self._earlier.send(gradients)

    def _from_later(self, layer: int) -> parts.Pair:
        return self._later.recv()


class Shared:
    """Parameters, AdamW's moments, and a set of gradients for each process, in memory that all of them map."""

    def __init__(self, setup: Setup, size: int, file: int | None = None) -> None:
        """`file`: the number of the open file that it is; of a new one, which has no name, if None."""
        shapes, item = setup.config.parameter_shapes(), np.dtype(setup.dtype).itemsize
        learning = {name: shapes[name] for name in setup.trained}
        sets = [shapes, learning, learning, *[learning] * size]
        ends = np.cumsum([sum(_room(shape, item) for shape in each.values()) for each in sets])
        self.file = _new_file(int(ends[-1]) * item) if file is None else file
        whole = np.frombuffer(mmap.mmap(self.file, int(ends[-1]) * item), setup.dtype)
        flat = np.split(whole, ends[:-1])
        self.params, self.m, self.v, *self.grads = (
            _arrays(part, each, item) for part, each in zip(flat, sets, strict=True)
        )
        self.flat_grads = flat[3:]
        if file is None:
            weakref.finalize(self, os.close, self.file)


def _room(shape: tuple[int, ...], item: int) -> int:
    """Numbers from the beginning of an array of this shape to that of the next."""
    return -(-math.prod(shape) * item // ALIGNED) * ALIGNED // item


def _arrays(flat: np.ndarray, shapes: Mapping[str, tuple[int, ...]], item: int) -> Arrays:
    """These one after another."""
    arrays, start = {}, 0
    for name, shape in shapes.items():
        arrays[name] = flat[start : start + math.prod(shape)].reshape(shape)
        start += _room(shape, item)
    return arrays


def _new_file(size: int) -> int:
    """A descriptor of a file of so many zero bytes, which take no memory until they are written to."""
    # Neither this nor a pipe after it shall be 0, 1 or 2, which may be free where a daemon runs: another process would
    # have its standard input there.
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(unused)
    try:
        file = os.memfd_create("twingrad")
    except (AttributeError, OSError):  # not Linux, or an old one
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


class _Other:
    """Another process, as seen from the first."""

    def __init__(
        self, setup: Setup, file: int, number: int, size: int, earlier: Connection, later: Connection | None
    ) -> None:
        self._connection, theirs = Pipe()
        passed = [theirs, earlier, *([later] if later else [])]
        numbers = [connection.fileno() for connection in passed]
        self._process = processes.start(
            work, file, *numbers, stdin=subprocess.DEVNULL, pass_fds=(file, *numbers), env=ONE_THREAD
        )
        for connection in passed:
            connection.close()
        self.tell("", (setup, number, size))

    def tell(self, method: str, arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(ConnectionError):  # the answer that does not come says it
            self._connection.send((method, arguments))

    def hear(self) -> Any:
        """What it answers, which is an error if it had one."""
        try:
            return self._connection.recv()
        except GONE:
            status = self._process.wait()
            if status < 0:
                how = f"was ended by signal {-status}; is there memory for it?"
            else:
                how = f"ended with status {status}, and what it wrote says why"
            return UserError(f"a process that computes a part of the batch {how}")

    def end(self) -> None:
        """Whatever it is doing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


# Matrix libraries read them when they are loaded.
ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")}


def work(file: int, owner: int, earlier: int, later: int | None = None) -> None:
    """A process's life: it answers until nobody asks any more, or until something went wrong."""
    memory.keep_freed()
    connection = Connection(owner)
    _, (setup, number, size) = connection.recv()
    links = Connection(earlier), None if later is None else Connection(later)
    member = Member(setup, Shared(setup, size, file), number, links)
    with contextlib.suppress(*GONE):
        while True:
            method, arguments = connection.recv()
            answer = _result(getattr(member, method), arguments)
            connection.send(answer)
            if isinstance(answer, Exception):
                return
