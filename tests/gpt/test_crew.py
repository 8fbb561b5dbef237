"""Parts of a batch in processes: the training is that of one process, and none is left behind, whatever happens."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt import crew, parts
from gpt.engine import Batch, NonFiniteError, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.learner import Learner
from gpt.train.checkpoint import load_checkpoint
from reference.config import GPTConfig
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[2]
CONFIG = GPTConfig(301, 32, 64, 2, 2, qkv_bias=True, tie_embeddings=True, shortcut_dropout=0.1)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_APART", 1)
    monkeypatch.setattr(parts, "threads", lambda: 3)


def create(config=CONFIG, dtype="float64", **optimizer):
    return create_engine("numpy", config, initialize(config, Generator(1), "gpt2"), OptimizerConfig(**optimizer), dtype)


def alone(monkeypatch, **settings):
    """The same in this process, in one part."""
    with monkeypatch.context() as patch:
        patch.setattr(parts, "threads", lambda: 1)
        return create(**settings)


def batch(seed: int, rows: int = 5, T: int = 32) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 301, (rows, T + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def train(engine, steps=4):
    """Losses and norms; batches of several sizes, of which not every process has a part."""
    figures = []
    for step in range(steps):
        for micro, rows in enumerate((5, 1, 2)):
            noise = PhiloxNoise(7, step, 5 * micro)
            figures.append(engine.accumulate(batch(10 * step + micro, rows), rows / 8, noise, last=micro == 2))
            if step == 1:
                figures.append(engine.gradient_norm())  # adds up before the rest has come
        figures.append(engine.step(1e-2, max_norm=0.5))
        figures.append(engine.loss(batch(99)))
    return figures


def processes(engine) -> list[int]:
    return [other._process.pid for other in engine._team._others]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end_of(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    "settings",
    [{}, {"decay": "matrices"}, {"trained": ("blocks.1.*", "final_norm.*")}],
    ids=["all", "matrices", "some"],
)
def test_training_is_that_of_one_process(settings, monkeypatch):
    one, together = alone(monkeypatch, **settings), create(**settings)
    np.testing.assert_allclose(train(together), train(one), rtol=1e-11)
    assert len(processes(together)) == 2
    for name, array in one.parameters().items():
        np.testing.assert_allclose(together.parameters()[name], array, rtol=1e-8, atol=1e-12, err_msg=name)
    state = together.optimizer_state()
    for name, array in one.optimizer_state().items():
        np.testing.assert_allclose(state[name], array, rtol=1e-7, atol=1e-14, err_msg=name)


def test_the_same_again_to_the_last_bit():
    assert train(create(dtype="float32")) == train(create(dtype="float32"))


def test_what_is_loaded_reaches_all_processes():
    first = create()
    train(first, 2)
    second = create()
    train(second, 1)  # its processes are there when it gets another's weights and moments
    second.load_parameters(first.parameters())
    second.load_optimizer_state(first.optimizer_state())
    assert train(second) == train(first)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rows", [5, 1])  # of which one text is divided into spans
def test_a_process_that_is_killed_is_named_and_the_next_batch_has_others(which, rows):
    engine, again = create(GPTConfig(301, 32, 64, 2, 2)), create(GPTConfig(301, 32, 64, 2, 2))
    engine.accumulate(batch(1, rows))
    engine.forget_gradients()
    before = processes(engine)
    os.kill(before[which], signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a process that computes a part of the batch was ended by signal 9"):
        engine.accumulate(batch(1, rows))
    wait_for_the_end_of(before)
    assert engine.gradients() == {}
    assert engine.accumulate(batch(1, rows)) == again.accumulate(batch(1, rows))
    assert engine.step(1e-3) == again.step(1e-3)
    assert not set(processes(engine)) & set(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_this_process_part_ends_the_others(error, monkeypatch):
    engine, again = create(), create()
    engine.accumulate(batch(1))
    before = processes(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", lambda *arguments: (_ for _ in ()).throw(error("now")))
        with pytest.raises(error):
            engine.accumulate(batch(2))
    wait_for_the_end_of(before)
    assert engine.gradients() == {}  # not those of some parts
    assert train(engine) == train(again)


def test_a_loss_that_is_not_finite_in_another_process_is_an_error_of_this_one():
    engine = create()
    bad = batch(3)
    engine.parameters()["tok_emb.weight"][300] = np.inf
    bad.inputs[:], bad.targets[:] = bad.inputs % 300, bad.targets % 300
    bad.inputs[-1, 0] = 300  # in the last part
    with pytest.raises(NonFiniteError, match=r"^loss is nan, first in "):
        engine.accumulate(bad)
    assert engine.gradients() == {}


def test_batches_of_one_part_start_no_process_and_learn_the_same_beside_some():
    """To the last bit: a resumed run may not have divided the batch yet for which another has."""
    one, other = create(dtype="float32"), create(dtype="float32")
    other.loss(batch(0))
    for step in range(3):
        losses = [engine.accumulate(batch(step, rows=1), noise=PhiloxNoise(1, step)) for engine in (one, other)]
        assert losses[0] == losses[1]
        assert one.step(1e-2, max_norm=0.5) == other.step(1e-2, max_norm=0.5)
    assert (len(processes(one)), len(processes(other))) == (0, 2)
    for name, array in one.parameters().items():
        np.testing.assert_array_equal(other.parameters()[name], array, err_msg=name)


def test_gradients_of_processes_that_have_ended_are_added_up_all_the_same(monkeypatch):
    engine, again = create(), create()
    for each in (engine, again):
        each.accumulate(batch(1), 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "loss", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.loss(batch(2))
    assert processes(engine) == []
    for each in (engine, again):
        each.accumulate(batch(3), 0.5)
    assert engine.step(1e-3) == again.step(1e-3)


@pytest.mark.parametrize("most", [0, 1 << 26])
def test_a_step_without_gradients_is_refused(most, monkeypatch):
    monkeypatch.setattr(parts, "MOST_APART", most)
    engine = create()
    engine.accumulate(batch(1))
    engine.step(1e-3)
    before = {name: array.copy() for name, array in engine.parameters().items()}
    with pytest.raises(RuntimeError, match="no gradient has been accumulated"):
        engine.step(1e-3)
    for name, array in before.items():
        np.testing.assert_array_equal(engine.parameters()[name], array)


def test_noise_that_nothing_uses_need_not_reach_other_processes():
    engine = create(CONFIG.replace(shortcut_dropout=0.0))
    assert engine.accumulate(batch(1), noise=lambda *site: None) == engine.loss(batch(1))


def test_processes_end_with_their_engine():
    engine = create()
    engine.loss(batch(1))
    pids = processes(engine)
    assert len(pids) == 2
    assert all(map(is_running, pids))
    del engine
    gc.collect()
    wait_for_the_end_of(pids)


SCRIPT = """
import sys
import numpy as np
from gpt import parts
from gpt.engine import Batch, create_engine
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

parts.LEAST_APART, parts.threads = 1, lambda: 2
config = GPTConfig(64, 8, 64, 1, 1)
engine = create_engine("numpy", config, initialize(config, Generator(1)))
engine.accumulate(Batch(np.zeros((2, 8), int), np.ones((2, 8), int)))
print(engine._team._others[0]._process.pid, flush=True)
if sys.argv[1:] == ["wait"]:
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_owner_however_it_goes(how):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "wait"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.send_signal(how)
    wait_for_the_end_of([pid])


def test_a_script_needs_no_guard_and_its_folder_may_have_modules_of_any_name(tmp_path):
    """Where multiprocessing would run the script again in each process, and Python look for modules beside it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for name in ("mmap", "numpy", "gpt"):
        (tmp_path / "elsewhere" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / f"{name}.py").write_text("raise ImportError('not this one')")
    done = subprocess.run(
        [sys.executable, "../script.py"], cwd=tmp_path / "elsewhere", env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    wait_for_the_end_of([int(done.stdout)])


@pytest.mark.parametrize("closed", [(0,), (0, 2), (0, 1, 2)])
def test_a_process_may_have_no_standard_streams(closed, tmp_path):
    """A daemon's numbers 0, 1 and 2 are free for whatever it opens next."""
    script = SCRIPT.replace("print(", "print('done', file=open('out', 'w')); print(", 1)
    (tmp_path / "script.py").write_text(script)
    closing = "; ".join(f"os.close({number})" for number in closed)
    run = f"import os, sys; {closing}; os.execv(sys.executable, [sys.executable, 'script.py'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "out").read_text() == "done\n"


def test_processes_find_packages_where_their_owner_does(tmp_path):
    """Whatever was appended to its sys.path, as notebooks do."""
    script = f"import sys; sys.path += {[str(ROOT), *sys.path[1:]]!r}\n{SCRIPT}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    done = subprocess.run([python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_forked_process_cannot_change_the_model(monkeypatch):
    for most in (0, parts.MOST_APART):  # in threads, and in processes
        monkeypatch.setattr(parts, "MOST_APART", most)
        monkeypatch.setattr(parts, "LEAST", 1)
        engine = create()
        engine.accumulate(batch(1))
        before = {name: array.copy() for name, array in engine.parameters().items()}
        forked = os.fork()
        if not forked:
            status = 1
            try:
                if most:
                    with pytest.raises(UserError, match="belongs to the process that this one was forked from"):
                        engine.step(1.0)
                else:  # a copy, which goes on
                    engine.accumulate(batch(2))
                    engine.step(1.0)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(forked, 0)[1] == 0
        for name, array in before.items():
            np.testing.assert_array_equal(engine.parameters()[name], array)


TRAIN = [
    sys.executable, "-m", "gpt", "train", "--data", "text.txt", "--engine", "numpy", "--preset", "bytes-tiny",
    "--model.emb_dim", "96", "--max_length", "64", "--batch_size", "4", "--schedule", "constant", "--eval_every", "0",
    "--sample_every", "0",
]  # fmt: skip


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core needs no other process")
def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_weights(tmp_path):
    """From the command line: a terminal's Ctrl-C reaches the whole group of processes."""
    (tmp_path / "text.txt").write_text("a short text that is read again and again. " * 100)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "2"}
    settings = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    log = tmp_path / "parts" / "log.csv"
    with subprocess.Popen([*TRAIN, "--out", "parts", "--steps", "100000"], start_new_session=True, **settings) as owner:
        while owner.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 5):
            time.sleep(0.01)
        helpers = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        os.killpg(owner.pid, signal.SIGINT)
        said = owner.stdout.read()
    assert len(helpers) == 1
    assert "Ctrl-C" in said
    wait_for_the_end_of([int(pid) for pid in helpers])
    steps = ["--steps", str(load_checkpoint(tmp_path / "parts").state["step"] + 10)]
    subprocess.run([*TRAIN, "--out", "parts", *steps, "--resume"], check=True, **settings)
    subprocess.run([*TRAIN, "--out", "whole", *steps], check=True, **settings)
    whole, stopped = (load_checkpoint(tmp_path / run) for run in ("whole", "parts"))
    for name, array in {**whole.model.params, **whole.optimizer}.items():
        np.testing.assert_array_equal({**stopped.model.params, **stopped.optimizer}[name], array, err_msg=name)


def test_memory_that_is_shared_has_no_name_and_is_free_with_the_engine():
    def maps() -> int:
        return sum("twingrad" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = maps()
    engine = create()
    assert maps() == before + 1
    assert isinstance(engine._team, crew.Crew)
    del engine
    gc.collect()
    assert maps() == before
