"""Processes that torchrun starts take the steps of one process; what ends one of them ends all, and is said once."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gpt import world
from gpt.cli import main
from gpt.errors import UserError
from gpt.tokenizers import ByteTokenizer
from gpt.train import run
from gpt.train.checkpoint import load_checkpoint
from gpt.train.config import RunConfig
from gpt.train.log import read_log
from gpt.train.run import again, shared
from gpt.weights.native import save_model
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

pytest.importorskip("torch", reason="PyTorch is not installed")
if not __import__("torch").distributed.is_available():
    pytest.skip("this PyTorch was built without torch.distributed", allow_module_level=True)

from tests.gpt.train import distributed_worker
from tests.gpt.train.distributed_worker import FEW

ROOT = Path(__file__).parents[3]
WORKER = str(Path(distributed_worker.__file__).relative_to(ROOT))
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 30
TINY = PRESETS["bytes-tiny"]
ADDRESSES = ["10.9.7.1", "10.9.7.2"]
SETTINGS = [
    "--preset", "bytes-tiny", "--model.attn_dropout", "0.1", "--model.emb_dropout", "0.1", "--max_length", "16",
    "--batch_size", "5", "--drop_last", "false", "--accumulation", "2", "--dtype", "float64", "--schedule", "constant",
    "--lr", "1e-3", "--eval_every", "4", "--save_every", "3", "--sample_every", "0",
]  # fmt: skip


class Machine(NamedTuple):
    """One of two that are joined by a cable: a network of its own on this one."""

    namespace: str
    address: str
    interface: str


def torchrun(processes: int, *words: str, restarts: int = 0, on: Machine | None = None) -> subprocess.Popen:
    """torchrun, each process with one thread; its standard output and error in one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--max-restarts", str(restarts)]
    port = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # any that is free
    if on:
        environment["GLOO_SOCKET_IFNAME"] = on.interface
        host = ["--rdzv_conf", f"is_host={int(on.address == ADDRESSES[0])}", "--local_addr", on.address]
        port = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", *host]
        command = ["ip", "netns", "exec", on.namespace, *command]
    return subprocess.Popen(
        [*command, *port, *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(process: subprocess.Popen, pattern: str) -> str:
    """What a process prints up to a line in which a pattern is found."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"ended without {pattern}: {''.join(lines)}")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """What one process finds."""
    torch = __import__("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = distributed_worker.results(None)
    torch.set_num_threads(threads)
    return found


def assert_same_results(found: dict[str, np.ndarray], alone: dict[str, np.ndarray], way: str) -> None:
    mine = {name.removeprefix(f"{way} "): value for name, value in found.items() if name.startswith(f"{way} ")}
    assert {name for name in mine if not name.startswith("refused")} == set(alone)
    assert len(alone) > 100
    for name, expected in alone.items():
        got = mine[name]
        assert got.shape == expected.shape, name
        wide = "float64" in name or name.startswith(("pairs", "compiled"))
        # Of a norm or a loss the relative error, of an array that of its largest entry; AdamW's first steps divide a
        # gradient by its own size, so parameters are further apart, by their learning rate at most.
        bound = 1e-12 if wide else 1e-6
        if not wide and ("parameter" in name or "logits" in name or "logps" in name or "evaluated" in name):
            bound = 2e-5
        error = np.abs(got.astype(float) - expected).max() / max(np.abs(expected.astype(float)).max(), 1e-30)
        assert error <= bound or np.array_equal(got, expected), f"{way} {name}: {error:.1e}"


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_of_several_processes_is_that_of_one(processes, alone, tmp_path, text):
    """DDP and FSDP2, accumulation, batches of 5, 3 and 1, dropout on, PyTorch's operators, compiled too, and kernels.

    Then the same processes are given what is not the same, options, texts and weights; a checkpoint of another model;
    and a finetuning.
    """
    out = tmp_path / "found.npz"
    spam = tmp_path / "spam.tsv"
    rows = (f"{label}\t{words} {i % 7}" for i in range(20) for label, words in (("ham", "see you"), ("spam", "WIN")))
    spam.write_text("\n".join(rows) + "\n")
    shape = ["--preset", "bytes-tiny", "--model.context_length", "16", "--max_length", "16"]
    finetune = ["finetune", "classify", "--data", str(spam), *shape, "--epochs", "1", "--dtype", "float64"]
    differ = ["train", "--data", text, *SETTINGS, "--steps", "2", "--seed", "RANK", "--out", str(tmp_path / "differ")]
    kept = ["train", "--data", text, *SETTINGS, "--steps", "2", "--out", str(tmp_path / "kept")]
    again = [*kept, "--engine", "torch", "--resume", "--parallel", "fsdp"]
    for other in range(4):
        (tmp_path / str(other)).mkdir()
        (tmp_path / str(other) / "fox.txt").write_text(TEXT.replace("lazy", "busy") if other == 2 else TEXT)
        params = initialize(TINY, Generator(other == 3), "book")
        save_model(tmp_path / str(other) / "model.safetensors", params, TINY, ByteTokenizer().spec())
    texts = ["train", "--data", "fox.txt", *SETTINGS, "--steps", "2", "--out", "run"]
    weights = ["train", "--data", text, "--weights", "model.safetensors", *SETTINGS[6:], "--steps", "2", "--out", "run"]
    here = str(tmp_path)
    commands = [[here, *finetune, "--out", str(tmp_path / "tuned")], [here, *again]]
    if processes == 4:
        commands = [[here, *differ], [f"{here}/RANK", *texts], [f"{here}/RANK", *weights]]
    if processes == 2:
        assert main([*kept, "--engine", "numpy"]) == 0
        swap_model(tmp_path / "kept")
    process = torchrun(processes, WORKER, "results", str(out), *(",".join(words) for words in commands))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    with np.load(out) as file:
        found = dict(file)
    assert found["same"], "the processes do not agree on what they found"
    expected = {name: value for name, value in alone.items() if processes == 2 or not name.startswith(FEW)}
    for way in ("ddp", "fsdp"):
        assert_same_results(found, expected, way)
        refused = {name: str(found[f"{way} refused {name}"]) for name in ("stream", "numpy", "parameter", "row")}
        assert refused["stream"].endswith("dropout_source: torch is one stream for one process; choose philox")
        assert refused["numpy"].startswith("UserError: engine: numpy trains in one process; choose --engine torch")
        assert refused["parameter"] == "NonFiniteError: loss is nan, first in tok_emb.weight"
        assert refused["row"] == "NonFiniteError: loss is nan, first in emb"
    assert "choose bfloat16, or ddp" in str(found["fsdp refused float16"])
    expected = ["no such file", *(f"rank {other}: no such file" for other in range(1, processes))]
    assert found["together"].tolist() == expected
    if processes == 4:
        assert printed.count("error: ") == 3, printed
        assert "error: weights: those of rank 3 are other weights than rank 0's; all ranks need the same\n" in printed
        assert "error: options: train.seed is 1 on rank 1, 0 on rank 0; all ranks need the same\n" in printed
        assert not (tmp_path / "differ").exists()
        contents = r"'1,950 tokens with checksum (\w+)'"
        told = rf"error: run: content is {contents} on rank 2, {contents} on"
        found = re.search(told, printed)
        assert found, printed
        assert found[1] != found[2]
        assert not list(tmp_path.glob("*/run"))
        assert all(printed.count(f"rank {other} ended with 2\n") == 3 for other in range(4)), printed
        return
    assert printed.count("error: ") == 1, printed
    assert re.search(r"error: .*last-00000002: its model differs: n_layers 1, not 2\n", printed), printed
    assert all(f"rank {other} ended with 2\n" in printed for other in range(2))
    assert main([*finetune, "--engine", "torch", "--out", str(tmp_path / "tuned alone")]) == 0
    logs = [read_log(tmp_path / name) for name in ("tuned", "tuned alone")]
    for column in ("loss", "norm", "train_loss", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(logs[0][column], logs[1][column], rtol=1e-9, err_msg=column)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("tuned", "tuned alone")]
    assert files[0] == files[1]


def swap_model(run_dir: Path) -> None:
    """Put another model's parameters into a run's last checkpoint."""
    from gpt.weights.native import save_model
    from reference.init import initialize
    from reference.torch_rng import Generator

    found = load_checkpoint(run_dir)
    other: GPTConfig = found.model.config.replace(n_layers=1)
    params = initialize(other, Generator(1), "gpt2")
    save_model(found.path / "model.safetensors", params, other, found.model.tokenizer)
    from gpt.weights.tensors import write_safetensors

    moments = {f"{moment}.{name}": array for moment in "mv" for name, array in params.items()}
    write_safetensors(found.path / "optimizer.safetensors", {"step": np.array(2), **moments}, {"twingrad": "1"})


def test_one_process_that_was_killed_goes_on_where_torchrun_starts_it_anew(tmp_path, text):
    words = ["--data", text, *SETTINGS, "--out", str(tmp_path / "run"), "--engine", "numpy", "--steps", "100000"]
    process = torchrun(1, WORKER, "train", str(tmp_path), *words, restarts=1)
    until(process, r"Step 000004\)")
    os.kill(int((tmp_path / "0.pid").read_text()), signal.SIGKILL)
    until(process, r"Goes on after step [1-9]\d* of 100000")
    until(process, r"Train loss")
    process.send_signal(signal.SIGINT)
    assert "Stopped by Ctrl-C after" in process.communicate()[0]


def test_a_killed_rank_ends_the_run_which_goes_on_with_any_number_of_ranks(tmp_path, text):
    """Two ranks share the model in parts; one is killed, torchrun starts them anew, and again one is killed.

    Four go on with the whole of it, until Ctrl-C; then NumPy; and the run is the one that nothing happened to.
    """
    out = tmp_path / "run"
    words = ["--data", text, *SETTINGS, "--out", str(out)]
    endless = [*words, "--engine", "torch", "--steps", "100000"]
    process = torchrun(2, WORKER, "train", str(tmp_path), *endless, "--parallel", "fsdp", restarts=1)
    printed = until(process, r"Step 000004\)")
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    printed += until(process, r"Goes on after step [1-9]\d* of 100000") + until(process, r"Train loss")
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    printed += process.communicate()[0]
    assert process.returncode != 0
    told = [line for line in printed.splitlines() if line.startswith("error:")]
    go_on = f"torchrun --nproc_per_node 2 -m gpt train --config {out / 'config.yaml'} --resume"
    assert told == 2 * [f"error: rank 0: lost contact with rank 1; go on with: {go_on}"], printed
    killed_at = load_checkpoint(out).state["step"]
    assert killed_at >= 3
    process = torchrun(4, "-m", "gpt", "train", *endless, "--resume")
    assert f"Goes on after step {killed_at} of 100000\n" in until(process, r"Train loss")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert "Stopped by Ctrl-C after" in printed, printed
    assert "To go on: torchrun --nproc_per_node 4 -m gpt train" in printed
    assert "error: " not in printed
    stopped_at = load_checkpoint(out).state["step"]
    assert stopped_at > killed_at
    steps = ["--steps", str(stopped_at + 2), "--engine", "numpy"]
    assert main(["train", *words, *steps, "--resume"]) == 0
    assert main(["train", *words, *steps, "--out", str(tmp_path / "whole")]) == 0
    parts, whole = load_checkpoint(out), load_checkpoint(tmp_path / "whole")
    assert parts.state["step"] == stopped_at + 2
    for name in whole.model.params:
        np.testing.assert_allclose(
            np.asarray(parts.model.params[name]),
            np.asarray(whole.model.params[name]),
            rtol=1e-5,
            atol=1e-7,
            err_msg=name,
        )
    logs = [read_log(folder) for folder in (out, tmp_path / "whole")]
    for column in ("step", "tokens", "lr", "loss", "train_loss", "val_loss"):
        np.testing.assert_allclose(logs[0][column], logs[1][column], rtol=1e-6, err_msg=column)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two machines, as far as the network goes."""
    names = [f"twingrad{os.getpid()}{end}" for end in "ab"]
    both = [Machine(name, address, f"end{i}") for i, (name, address) in enumerate(zip(names, ADDRESSES, strict=True))]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"networks of its own need iproute2 and root ({error})")
    try:
        ip("link", "add", "end0", "netns", names[0], "type", "veth", "peer", "name", "end1", "netns", names[1])
        for machine in both:
            ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", machine.interface)
            for interface in ("lo", machine.interface):
                ip("-n", machine.namespace, "link", "set", interface, "up")
        yield both
    finally:
        for name in names:
            ip("netns", "delete", name)


def end(both: list[subprocess.Popen]) -> None:
    """torchrun itself may wait for the other machine's, which does not answer, and hears no signal meanwhile."""
    for process in both:
        process.terminate()
    for process in both:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_machines_go_on_by_themselves(machines, tmp_path, text):
    """A process is killed on one machine, then on the other, then nothing comes through the cable for a while."""
    words = ["--data", text, *SETTINGS, "--engine", "torch", "--steps", "100000", "--timeout", "10"]
    words += ["--out", str(tmp_path / "run")]

    def goes_on(process: subprocess.Popen) -> str:  # until after the next checkpoint
        return "".join(until(process, pattern) for pattern in (r"Goes on after step \d+ of", *3 * [r"Train loss"]))

    both = [torchrun(1, WORKER, "train", str(tmp_path), *words, restarts=5, on=machine) for machine in machines]
    try:
        printed = until(both[0], r"Step 000004\)")
        for rank in (1, 0):
            os.kill(int((tmp_path / f"{rank}.pid").read_text()), signal.SIGKILL)
            printed += goes_on(both[0])
        cable = ["ip", "-n", machines[0].namespace, "link", "set", machines[0].interface]
        subprocess.run([*cable, "down"], check=True)
        printed += until(both[0], r"error: rank 0: lost contact with rank 1")
        subprocess.run([*cable, "up"], check=True)
        printed += goes_on(both[0])
        steps = [int(step) for step in re.findall(r"Goes on after step (\d+) of", printed)]
        assert len(steps) == 3, printed
        assert 0 < steps[0] < steps[1] < steps[2], printed
        assert "go on with: torchrun --nnodes 2 --nproc_per_node 1 -m gpt train" in printed
        for process in both:
            process.send_signal(signal.SIGINT)
        printed = both[0].communicate(timeout=60)[0]
        assert "Stopped by Ctrl-C after" in printed, printed
        assert load_checkpoint(tmp_path / "run").state["step"] > steps[-1]
    finally:
        end(both)


@pytest.mark.slow
def test_a_machine_that_falls_silent_is_not_waited_for(machines):
    """The first process computes something, for which there is no limit; the other one's machine loses contact."""
    both = [torchrun(1, WORKER, "wait", "10", on=machine) for machine in machines]
    try:
        until(both[0], r"computes")
        cable = ["ip", "-n", machines[0].namespace, "link", "set", machines[0].interface, "down"]
        subprocess.run(cable, check=True)
        until(both[1], r"rank 1: lost contact with rank 0")
    finally:
        end(both)


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as rank 1 of 2 that have met, with a store of its own."""
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    torch = pytest.importorskip("torch")
    store = torch.distributed.HashStore()
    monkeypatch.setattr(world, "_torchrun", store)
    monkeypatch.setattr(world, "_group", world._Group(store, "this start", None, torch.device("cpu"), {}))
    monkeypatch.setattr(world, "_ignore_sigterm", lambda: None)
    return store


def test_what_ended_one_process_is_said_there_alone(second_of_two, monkeypatch):
    monkeypatch.setattr(world, "_errors", 0)
    bug = "KeyError: 'a bug' (unexpected; TWINGRAD_TRACEBACK=1 in the environment shows where)"
    for key in ("error/0", "error/0/0"):  # its latest, which is its first
        second_of_two.set(key, bug)
    with pytest.raises(world.LostContactError) as lost, world.contact(lambda: "; go on"):
        raise RuntimeError("gloo: connection closed by peer")
    assert str(lost.value) == f"rank 0: {bug}; go on"
    assert world.last_words(str(lost.value)) is None
    assert world.last_words("KeyError: 'a bug'") is None  # as it is told by world.together
    assert world.last_words("something else") == "rank 1: something else"


def test_what_was_announced_is_not_said_again_by_others(second_of_two, monkeypatch):
    """The first process draws plots before its last words; the others do not wait for so long."""
    monkeypatch.setattr(world, "_errors", 0)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        world.announce("step 1: loss is nan")
    assert world.last_words("step 1: loss is nan") is None
    assert world.last_words("something else") == "rank 1: something else"


def test_only_a_run_that_torchrun_began_itself_is_resumed_by_itself(second_of_two, tmp_path, monkeypatch):
    """With --max-restarts, a folder that was refused because it holds somebody's run is refused again."""
    config = RunConfig(out=str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(world, "exchange", lambda value: [value, value])
    with pytest.raises(UserError, match="already holds a run"), shared(config, ""):
        pass
    monkeypatch.setattr(world, "_group", None)  # another start
    assert not again(config).resume
    monkeypatch.setattr(world, "_group", world._Group(second_of_two, "other start", None, None, {}))
    monkeypatch.setattr(run, "check_folder", lambda config: None)
    with shared(config, ""):
        assert not again(config).resume  # it has just begun
    monkeypatch.setattr(world, "_group", None)
    assert again(config).resume
    (tmp_path / "config.yaml").unlink()
    assert not again(config).resume


NEIGHBOURS = """
import os, signal
import torch
import torch.distributed
from gpt import world

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may notice before they do
world.start()
try:
    with world.contact():
        for step in range(100):
            if step == 10 and world.rank() == 1:
                os.kill(os.getpid(), 9)
            torch.distributed.all_reduce(torch.ones(1000))
except world.LostContactError as error:
    os.write(1, f"{world.rank()}: {error}\\n".encode())  # a whole line at once
os._exit(1)  # at once, so that torchrun does not end those that wait for this one's connection to close
"""


def test_of_several_that_are_left_none_is_named_as_gone(tmp_path):
    """A process that waits for a living one does not see that another is gone until that one tells."""
    (tmp_path / "neighbours.py").write_text(NEIGHBOURS)
    printed, _ = torchrun(4, str(tmp_path / "neighbours.py")).communicate()
    told = sorted(re.findall(r"^\d: rank .*", printed, re.MULTILINE))
    assert told == [f"{rank}: rank 0: lost contact with rank 1" for rank in (0, 2, 3)], printed
