"""The commands of LitGPT's workshop: what each of their flags does, what they leave behind, and what they refuse."""

import contextlib
import csv
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import cli, tokenizers, world
from gpt.data.examples import ExampleLoader, JsonEntries
from gpt.engine import trained_names
from gpt.errors import UserError
from gpt.finetune import run, workshop
from gpt.finetune.instructions import InstructionDataset, collate, split, write_splits
from gpt.finetune.workshop_config import DataConfig, FinetuneLoRA
from gpt.llm import LLM
from gpt.options import parse_config, read_yaml, to_dict
from gpt.prompts import format_prompt
from gpt.train import checkpoint
from gpt.train.checkpoint import find_checkpoint
from gpt.train.log import read_log
from gpt.train.trainer import evaluate
from gpt.weights.native import read_model, save_model
from gpt.weights.tensors import read_safetensors
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[3]
CONFIG = PRESETS["bytes-tiny"].replace(emb_dim=12, n_heads=2, n_layers=1, mlp_dim=20, context_length=320)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ENTRIES = [
    {"instruction": f"Count to {word}.", "input": "", "output": " ".join(WORDS[: i + 1])}
    for i, word in enumerate(WORDS)
]
# Quick runs: 8 entries to train on and 2 for validation, 2 steps an epoch.
QUICK = (
    "--engine numpy --data JSON --data.json_path train.json --data.val_split_fraction 0.2 --data.prompt_style plain "
    "--train.global_batch_size 4 --train.micro_batch_size 2 --train.epochs 2 --train.lr_warmup_steps 0 "
    "--eval.interval 0 --eval.final_validation false --out_dir out"
)
OUT, FINAL = Path("out"), Path("out/final")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint whose weights are 0 nowhere, and its entries, in a folder."""
    folder = tmp_path_factory.mktemp("workshop")
    rng = np.random.default_rng(0)
    params = {
        name: value + rng.normal(0, 0.05, value.shape).astype("f")
        for name, value in initialize(CONFIG, Generator(1), "gpt2").items()
    }
    save_model(folder / "base" / "model.safetensors", params, CONFIG, tokenizers.load("bytes").spec())
    (folder / "train.json").write_text(json.dumps(ENTRIES))
    return folder


@pytest.fixture
def folder(base, tmp_path, monkeypatch):
    """A folder of a test's own, with the checkpoint and the entries in it."""
    (tmp_path / "base").symlink_to(base / "base")
    (tmp_path / "train.json").write_bytes((base / "train.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.train.run._plot", lambda *_: None)  # it takes longer than these trainings
    return tmp_path


@pytest.fixture
def tune(folder, capsys):
    """Run a command with QUICK and other flags, which stand over these, and return what it printed."""

    def run(flags="", command="finetune_lora", quick=QUICK, status=0):
        capsys.readouterr()
        found = cli.main([command, "base", *shlex.split(f"{quick} {flags}")])
        shown = capsys.readouterr()
        assert found == status, shown.err
        return shown.err if status == 2 else shown.out

    return run


def weights(out="out"):
    """The finished model's parameters, in one row."""
    params = read_model(Path(out, "final/model.safetensors")).params
    return np.concatenate([np.asarray(value).ravel() for value in params.values()])


def log():
    return read_log(OUT)


def table():
    with open(OUT / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def held_out(fraction=0.2, seed=42):
    return workshop.random_split(ENTRIES, fraction, seed)[1]


def loss_of(source, entries):
    """A model's mean loss on entries, one at a time, in the plain style."""
    llm = LLM.load(source, "numpy")
    loader = ExampleLoader(
        InstructionDataset(entries, llm.tokenizer, "plain"), partial(collate, pad_id=256), 1, False, False
    )
    return evaluate(llm.engine, loader)


def shown_answers(printed):
    return dict(re.findall(r"^(Count to \w+\.) -> (.*)$", printed, re.MULTILINE))


def test_the_workshops_command_makes_a_model_to_talk_to(folder, capsys, monkeypatch):
    command = (
        "finetune_lora base --data JSON --data.json_path train.json --data.val_split_fraction .1 --train.epochs 3 "
        "--train.log_interval 100 --precision 32-true"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gpt", *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out, final = Path("out/finetune/lora"), Path("out/finetune/lora/final")
    assert done.stdout.startswith("checkpoint_dir: base\nout_dir: out/finetune/lora\n")
    asked = (out / "hyperparameters.yaml").read_text()
    assert asked in done.stdout
    assert read_yaml(final / "hyperparameters.yaml") == read_yaml(out / "hyperparameters.yaml")
    assert read_yaml(final / "prompt_style.yaml") == {"style": "alpaca"}
    assert GPTConfig.from_dict(read_yaml(final / "model_config.yaml")) == read_model(final / "model.safetensors").config
    assert tokenizers.load(final / "tokenizer.json").name == "bytes"
    assert find_checkpoint(out, "last").name == "last-00000003"

    llm = LLM.load(final, "numpy")
    assert (llm.style, llm.engine.config) == ("alpaca", CONFIG)
    entry = ENTRIES[0]
    assert llm.generate(entry, 5) == llm.generate(format_prompt(entry), 5)
    assert cli.main(["generate", "--model", str(final), "--prompt", "One", "--engine", "numpy"]) == 0
    monkeypatch.setattr("sys.stdin", StringIO("Count to one.\nq\n"))
    capsys.readouterr()
    talk = re.search(r"twingrad (chat .*)", done.stdout)[1].split()
    assert cli.main([*talk, "--engine", "numpy", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == llm.generate(entry, 5) + "\n"


def test_what_was_asked_for_can_be_asked_for_again(tune):
    tune(
        "--lora_key --train.lr_warmup_fraction 0.5 --optimizer.betas 0.8,0.9",
        quick=QUICK.replace("--train.lr_warmup_steps 0", ""),
    )
    again = parse_config(FinetuneLoRA, ["--config", str(OUT / "hyperparameters.yaml")], "twingrad finetune_lora")
    assert (again.lora_key, again.train.lr_warmup_steps, again.train.lr_warmup_fraction) == (True, None, 0.5)
    assert (again.optimizer.betas, again.data.val_split_fraction, again.train.min_lr) == ((0.8, 0.9), 0.2, 6e-5)
    assert to_dict(again) == read_yaml(OUT / "hyperparameters.yaml")


# Of a layer from I to O, 8 (I + O); 12 wide, with an MLP of 20 and a vocabulary of 257.
@pytest.mark.parametrize(
    "flags, count",
    [
        ("", 2 * 8 * 24),
        ("--lora_r 3", 2 * 3 * 24),
        ("--lora_query false", 8 * 24),
        ("--lora_value false", 8 * 24),
        ("--lora_key true", 3 * 8 * 24),
        ("--lora_projection", 3 * 8 * 24),
        ("--lora_mlp true", 2 * 8 * 24 + 2 * 8 * 32),
        ("--lora_head true", 2 * 8 * 24 + 8 * 269),
    ],
)
def test_adapters_are_where_they_were_asked_for(flags, count, tune):
    printed = tune(f"{flags} --train.max_steps 1")
    assert f" {count:,} of them trained" in printed
    adapters, _ = read_safetensors(OUT / "adapter.safetensors")
    assert sum(math.prod(array.shape) for array in adapters.values()) == count


def test_the_default_adapters_of_a_model_of_phi_2s_size():
    asked = FinetuneLoRA(checkpoint_dir="phi-2", data=DataConfig(json_path="train.json"))
    config = GPTConfig(51200, 2048, 2560, 32, 32, lora=asked.lora())
    shapes = config.parameter_shapes()
    assert sum(math.prod(shapes[name]) for name in trained_names(config)) == 2_621_440


def test_full_finetuning_changes_every_weight(tune):
    printed = tune("--train.max_steps 2", "finetune_full", QUICK.replace("--out_dir out", ""))
    assert "of them trained" not in printed
    out = Path("out/finetune/full")
    assert not (out / "adapter.safetensors").exists()
    before = read_model(Path("base/model.safetensors")).params
    after = read_model(out / "final/model.safetensors").params
    assert all((np.asarray(after[name]) != np.asarray(before[name])).any() for name in before)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_alpha 32",
        "--lora_dropout 0.5",
        "--optimizer.lr 0.01",
        "--optimizer.weight_decay 0.9",
        "--optimizer.betas 0.5,0.5",
        "--train.min_lr 1e-4",
        "--train.max_norm 1e-4",
        "--train.lr_warmup_steps 2",
        "--train.max_seq_length 20",
        "--data.mask_prompt",
        "--data.prompt_style phi-3",
        "--data.seed 7",
        "--seed 7",
    ],
)
def test_a_flag_makes_another_model(flags, tune):
    tune("--out_dir before")
    tune("--out_dir again --optimizer AdamW --data=JSON --data.ignore_index -100 --data.val_split_fraction 0.2")
    tune(f"{flags} --out_dir after")
    assert np.array_equal(weights("again"), weights("before"))
    assert not np.array_equal(weights("after"), weights("before"))


def test_the_defaults_are_litgpts_and_adamws(tune):
    asked = FinetuneLoRA(checkpoint_dir="base", data=DataConfig(json_path="train.json"))
    assert (asked.optimizer.lr, asked.optimizer.weight_decay, asked.optimizer.betas) == (1e-3, 0.01, (0.9, 0.999))
    assert (asked.train.global_batch_size, asked.train.micro_batch_size, asked.train.epochs) == (16, 1, 5)
    assert (asked.train.lr_warmup_steps, asked.train.min_lr, asked.seed, asked.data.seed) == (100, 6e-5, 1337, 42)
    write_splits(".", ENTRIES * 4, [])
    printed = tune("--train.max_steps 1", quick="--engine numpy --data.json_path train.json --out_dir out")
    assert read_yaml(OUT / "hyperparameters.yaml")["data"]["val_split_fraction"] == 0.05
    assert "40 entries, 38 to train on" in printed
    assert log()["examples"].tolist() == [16]


# 8 entries to train on.
@pytest.mark.parametrize(
    "flags, examples",
    [
        ("", [4, 8, 12, 16]),
        ("--train.epochs 1", [4, 8]),
        ("--train.micro_batch_size 1", [4, 8, 12, 16]),
        ("--train.global_batch_size 6", [6, 8, 14, 16]),
        ("--train.global_batch_size 16 --train.epochs 3", [8, 16, 24]),
        ("--train.max_steps 3", [4, 8, 12]),
        ("--train.max_steps 30", [4, 8, 12, 16]),
        ("--data.val_split_fraction 0.5", [4, 5, 9, 10]),
    ],
)
def test_steps_and_their_examples(flags, examples, tune):
    tune(flags)
    assert log()["step"].tolist() == [*range(1, len(examples) + 1)]
    assert log()["examples"].tolist() == examples


@pytest.mark.parametrize("limit, steps", [(244, 1), (487, 1), (488, 2), (10**6, 4)])
def test_no_more_tokens_are_read_than_max_tokens(limit, steps, tune):
    assert "The longest training entry has 61 tokens" in tune(f"--train.max_tokens {limit}")
    assert len(log()["step"]) == steps
    assert log()["tokens"][-1] <= limit


def test_entries_are_cut_at_max_seq_length(tune):
    assert "at most 16 are read of each" in tune("--train.max_seq_length 16")
    assert log()["tokens"].tolist() == [64, 128, 192, 256]  # each entry has as many, and most have more


@pytest.mark.parametrize(
    "flags, warmup",
    [("--train.lr_warmup_steps 3", 3), ("--train.lr_warmup_fraction 0.5", 1), ("--train.lr_warmup_steps 1", 1)],
)
def test_the_learning_rate_is_that_of_pytorchs_schedulers(flags, warmup, tune):
    torch = pytest.importorskip("torch")
    tune(
        f"{flags} --train.epochs 4 --train.min_lr 1e-4 --optimizer.lr 0.002",
        quick=QUICK.replace("--train.lr_warmup_steps 0", ""),
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.002)
    schedulers = torch.optim.lr_scheduler
    parts = [
        schedulers.LambdaLR(optimizer, lambda step: step / warmup),
        schedulers.CosineAnnealingLR(optimizer, 8 - warmup, eta_min=1e-4),
    ]
    together = schedulers.SequentialLR(optimizer, parts, [warmup])
    rates = []
    for _ in range(8):
        rates.append(together.get_last_lr()[0])
        optimizer.step()
        together.step()
    assert log()["lr"].tolist() == pytest.approx(rates, rel=1e-12, abs=1e-15)


def test_a_warmup_that_is_longer_than_the_run_is_warned_of(folder, capsys):
    assert cli.main(["finetune_lora", "base", *QUICK.split(), "--train.lr_warmup_steps", "9"]) == 0
    assert "warning: train: the warmup's 9 steps are not over" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Length of split")
@given(st.integers(2, 400), st.floats(0.001, 0.999), st.integers(0, 2**31))
def test_the_split_is_pytorchs(n, fraction, seed):
    torch = pytest.importorskip("torch")
    entries = [{"number": i} for i in range(n)]
    theirs = torch.utils.data.random_split(entries, [1.0 - fraction, fraction], torch.Generator().manual_seed(seed))
    if not all(map(len, theirs)):
        with pytest.raises(UserError, match=f"of {n} entries makes training and validation sets of"):
            workshop.random_split(entries, fraction, seed)
        return
    ours = workshop.random_split(entries, fraction, seed)
    assert [list(part) for part in ours] == [list(part) for part in theirs]


# 4 batches an epoch; of them 2 a step, or 3 and then the one that is left.
@pytest.mark.parametrize(
    "flags, rows",
    [
        ("", {1: 2, 2: 4, 3: 6, 4: 8}),
        ("--train.log_interval 3", {2: 4, 3: 6}),
        ("--train.log_interval 9", {}),
        ("--train.log_interval 4 --train.global_batch_size 6", {2: 4, 4: 8}),
    ],
)
def test_a_line_and_a_row_for_each_log_interval(flags, rows, tune):
    printed = tune(flags)
    lines = re.findall(r"^Epoch (\d) \| iter (\d+) step (\d+) \| loss train: [\d.]+, val: n/a", printed, re.MULTILINE)
    assert {int(step): int(iteration) for _, iteration, step in lines} == rows
    assert [int(epoch) for epoch, _, _ in lines] == [math.ceil(step / 2) for step in rows]
    assert {int(row["step"]): int(row["iter"]) for row in table()} == rows
    whole = dict(zip(log()["step"].tolist(), log()["loss"].tolist(), strict=True))
    assert [float(row["loss"]) for row in table()] == [whole[step] for step in rows]


def test_validations_fall_on_the_interval(tune):
    printed = tune("--eval.interval 2 --eval.max_new_tokens 3 --train.log_interval 100")
    assert [int(step) for step in re.findall(r"\(Step (\d+)\): Train loss", printed)] == [2, 4]
    assert [row["step"] for row in table()] == ["2", "4"]
    for row in table():
        assert float(row["val_ppl"]) == pytest.approx(math.exp(float(row["val_loss"])))


def test_a_validation_reads_max_iters_batches(tune):
    losses = []
    for batches in (1, 2, 9):
        flags = f"--eval.interval 4 --eval.max_iters {batches} --eval.max_new_tokens 0 --out_dir out{batches}"
        tune(f"{flags} --train.micro_batch_size 1")
        losses.append(read_log(f"out{batches}")["val_loss"][-1])
    assert losses[0] == pytest.approx(loss_of("out1/final", held_out()[:1]), rel=1e-5)
    assert losses[1] == losses[2] == pytest.approx(loss_of("out2/final", held_out()), rel=1e-5)


def test_validations_before_and_after(tune):
    printed = tune("--eval.initial_validation --eval.final_validation true --train.micro_batch_size 1")
    first, perplexity = map(
        float, re.search(r"Initial validation: val loss ([\d.]+), val ppl ([\d.]+)", printed).groups()
    )
    assert first == pytest.approx(loss_of("base", held_out()), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(first), rel=1e-3)
    results = json.loads((OUT / "results.json").read_text())
    assert results["final_val_loss"] == pytest.approx(loss_of(FINAL, held_out()), rel=1e-5)
    assert f"final val loss: {results['final_val_loss']:.4g}" in printed
    plain = tune("--out_dir without --train.micro_batch_size 1")
    assert "Initial validation" not in plain
    assert "final val loss" not in plain
    assert np.array_equal(weights("without"), weights())  # looking changes nothing


def test_the_example_that_is_answered(tune):
    flags = "--eval.interval 1 --eval.max_new_tokens"
    first, second = (entry["instruction"] for entry in held_out())
    assert list(shown_answers(tune(f"{flags} 1 --out_dir a"))) == [first]
    assert list(shown_answers(tune(f"{flags} 1 --eval.evaluate_example 1 --out_dir b"))) == [second]
    drawn = [
        re.findall(
            r"^Count to \w+\.(?= ->)",
            tune(f"{flags} 1 --eval.evaluate_example random --train.epochs 8 {more}"),
            re.MULTILINE,
        )
        for more in ("--out_dir c", "--out_dir d", "--out_dir e --seed 1")
    ]
    assert set(drawn[0]) == {first, second}
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_example_has_max_new_tokens(tune, monkeypatch):
    asked = []
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda llm, prompt, n: asked.append(n) or generate(llm, prompt, n))
    tune("--eval.interval 2 --eval.max_new_tokens 7")
    assert asked == [7, 7]


def test_checkpoints_are_written_at_the_save_interval(tune, monkeypatch):
    saved = []
    save = checkpoint.save_checkpoint
    monkeypatch.setattr(
        checkpoint,
        "save_checkpoint",
        lambda run, kind, state, *a, **k: saved.append((kind, state["step"])) or save(run, kind, state, *a, **k),
    )
    tune("--train.epochs 4 --train.save_interval 3 --eval.interval 2 --eval.max_new_tokens 0 --out_dir a")
    tune("--train.save_interval none --out_dir b")
    assert saved == [("last", 3), ("last", 6), ("last", 8), ("last", 4)]


def test_a_stopped_run_goes_on_to_the_same_model(tune, monkeypatch, capsys):
    flags = "--eval.interval 3 --eval.max_new_tokens 0 --eval.initial_validation --train.epochs 4"
    tune(f"{flags} --out_dir whole")
    step = workshop.Report.step

    def stop(report, row):
        step(report, row)
        if row.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(workshop.Report, "step", stop)
        printed = tune(flags, status=130)
    assert not FINAL.exists()
    command = re.search(r"To go on: twingrad (.*)", printed)[1].split()
    assert command == ["finetune_lora", "--config", "out/hyperparameters.yaml", "--resume"]
    assert cli.main(command) == 0
    assert "Initial validation" not in capsys.readouterr().out
    assert np.array_equal(weights(), weights("whole"))
    assert [row["step"] for row in table()] == [str(step) for step in range(1, 9)]
    assert "resume: split_seed of the run in out is 42, not 3" in tune(f"{flags} --resume --data.seed 3", status=2)
    assert "out already holds a run: go on with it by --resume, or give another by --out_dir" in tune(status=2)
    monkeypatch.setattr(world, "remembered", lambda *_: True)  # torchrun began it, and starts it again
    assert "Goes on after step 8 of 8" in tune(flags)


def test_the_way_on_after_a_lost_process_is_a_command_of_this_one(tune, monkeypatch):
    def lose(config, trainer, data):
        raise RuntimeError("gloo: connection closed by peer")

    monkeypatch.setattr(run, "carry_out", lose)
    commands = []
    monkeypatch.setattr(run, "shared", lambda config, command: commands.append(command) or contextlib.nullcontext())
    tune(status=1)
    assert commands == ["twingrad finetune_lora --config out/hyperparameters.yaml --resume"]


@pytest.mark.parametrize("engine", ["auto", "numpy", "torch"])
def test_engines_learn_the_same(engine, tune):
    if engine == "torch":
        pytest.importorskip("torch")
    printed = tune(f"--engine {engine}")
    used = "numpy" if engine == "numpy" or not importlib.util.find_spec("torch") else "torch"
    assert f"{used} engine, float32" in printed
    tune("--out_dir numpy")
    assert log()["loss"] == pytest.approx(read_log("numpy")["loss"], rel=1e-4)


def test_double_precision_is_kept_in_the_model(tune):
    assert "float64" in tune("--precision 64-true")
    assert {array.dtype.name for array in read_model(FINAL / "model.safetensors").params.values()} == {"float64"}


@pytest.mark.parametrize(
    "precision, computed", [("bf16-true", "bfloat16"), ("bf16-mixed", "bfloat16"), ("16-mixed", "float16")]
)
def test_half_precision_rounds_the_losses(precision, computed, tune):
    pytest.importorskip("torch")
    tune(f"--engine torch --precision {precision} --train.max_steps 1")
    tune("--train.max_steps 1 --out_dir full")
    assert read_yaml(OUT / "config.yaml")["precision"] == computed
    assert log()["loss"][0] != read_log("full")["loss"][0]
    assert log()["loss"][0] == pytest.approx(read_log("full")["loss"][0], rel=0.02)


def test_tensorboards_files_instead_of_a_table(tune):
    pytest.importorskip("tensorboardX")
    tune("--logger_name tensorboard")
    assert list((OUT / "tensorboard").iterdir())
    assert not (OUT / "metrics.csv").exists()


def test_weights_and_biases_has_to_be_installed(tune, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'twingrad[wandb]'" in tune("--logger_name wandb", status=2)


@pytest.mark.parametrize(
    "given, style",
    [("alpaca", "alpaca"), ("phi-3", "phi3"), ("phi3", "phi3"), ("default", "plain"), ("plain", "plain")],
)
def test_the_finished_model_is_asked_in_its_style(given, style, tune):
    tune(f"--data.prompt_style {given} --train.max_steps 1 --train.global_batch_size 2")
    llm = LLM.load(FINAL, "numpy")
    assert llm.style == style
    assert llm.encode(ENTRIES[1]) == llm.encode(format_prompt(ENTRIES[1], style))
    assert read_yaml(FINAL / "prompt_style.yaml") == {"style": style}


@pytest.mark.parametrize("endings", [("json", "json"), ("jsonl", "json")])
def test_a_folder_has_both_parts(endings, tune, folder):
    (folder / "parts").mkdir()
    for name, ending, entries in (("train", endings[0], ENTRIES[:6]), ("val", endings[1], ENTRIES[6:])):
        text = json.dumps(entries) if ending == "json" else "\n".join(map(json.dumps, entries))
        (folder / "parts" / f"{name}.{ending}").write_text(text)
    quick = QUICK.replace("--data.val_split_fraction 0.2", "").replace("train.json", "parts")
    printed = tune("--eval.final_validation --train.micro_batch_size 1", quick=quick)
    assert "10 entries, 6 to train on" in printed
    found = json.loads((OUT / "results.json").read_text())["final_val_loss"]
    assert found == pytest.approx(loss_of(FINAL, ENTRIES[6:]), rel=1e-5)
    refused = tune("--out_dir other --data.json_path parts", status=2)
    assert (
        "data.val_split_fraction: parts is a folder, whose val.json is for validation; expected none, got 0.2"
        in refused
    )
    (folder / "parts" / "val.json").unlink()
    assert "data.json_path: parts holds no val.json" in tune("--out_dir other", quick=quick, status=2)


def test_a_checkpoint_without_a_tokenizer_needs_one(tune, folder):
    (folder / "base").unlink()
    save_model("base/model.safetensors", initialize(CONFIG, Generator(1), "gpt2"), CONFIG)
    assert "base: holds no tokenizer; name it by --tokenizer" in tune(status=2)
    tune("--tokenizer bytes --train.max_steps 1")
    assert LLM.load(FINAL, "numpy").tokenizer.name == "bytes"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data Alpaca", "data: 'Alpaca' is not available, expected JSON and --data.json_path"),
        ("--data.json_path nowhere.json", "data: nowhere.json: no such file"),
        ("--data.json_path ''", "data.json_path: expected a file of entries"),
        ("--data.val_split_fraction 1.5", "data.val_split_fraction: expected between 0 and 1, got 1.5"),
        ("--data.val_split_fraction .01", "0.01 of 10 entries makes training and validation sets of 10 and 0"),
        ("--data.ignore_index -1", "data.ignore_index: expected -100, got -1"),
        ("--data.prompt_style alpac", "data.prompt_style: expected alpaca|phi-3|.*, got 'alpac'; did you mean alpaca?"),
        ("--lora_r 0", "lora rank: 0 is not a whole number of at least 1"),
        ("--lora_query false --lora_value false", "lora: expected a layer with an adapter, such as --lora_query true"),
        (
            "--train.micro_batch_size 3",
            "train.global_batch_size: expected a multiple of train.micro_batch_size 3, got 4",
        ),
        ("--train.lr_warmup_fraction 0.1", "train.lr_warmup_fraction: expected it or train.lr_warmup_steps, got both"),
        ("--train.max_tokens 243", "train.max_tokens: one step may read 244 tokens, expected at least these, got 243"),
        ("--train.min_lr 1", "train.min_lr: expected at most the learning rate 0.001, got 1"),
        ("--train.max_norm 0", "train.max_norm: expected more than 0, got 0"),
        ("--train.epochs 0", "train.epochs: expected at least 1, got 0"),
        ("--train.log_interval 0", "train.log_interval: expected at least 1, got 0"),
        ("--eval.evaluate_example frist", "eval.evaluate_example: .*'frist'; did you mean first?"),
        (
            "--eval.evaluate_example 2",
            "eval.evaluate_example: expected below 2, the number of validation entries, got 2",
        ),
        ("--optimizer SGD", "optimizer: 'SGD' is not available, expected AdamW"),
        ("--optimizer.lr 0", "lr: expected a positive learning rate, got 0"),
        ("--precision 16-true", "precision: expected 32-true|.*, got '16-true'"),
        ("--precision bf16-true", "the numpy engine computes in its dtype"),
        ("--quantize bnb.nf4", "quantize: quantized weights cannot be trained here, expected none, got 'bnb.nf4'"),
        ("--devices 2", "devices: expected 1, got 2"),
        ("--engine jax", "engine: expected auto|numpy|torch|triton, got 'jax'"),
        ("--lora_rank 8", "twingrad finetune_lora has no option --lora_rank"),
        ("--train.epoch 3", "has no option --train.epoch; did you mean --train.epochs?"),
        ("--checkpoint_dir nowhere", "nowhere: no such file or folder"),
    ],
)
def test_what_is_wrong_is_one_line(flags, message, tune):
    shown = tune(flags, status=2)
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert re.search(".*".join(map(re.escape, message.split(".*"))), shown), shown
    assert not OUT.exists()


def test_adapters_are_no_flags_of_full_finetuning(tune):
    assert "twingrad finetune_full has no option --lora_r" in tune("--lora_r 8", "finetune_full", status=2)


def test_a_checkpoint_is_needed(folder, capsys):
    assert cli.main(["finetune_lora", "--data.json_path", "train.json"]) == 2
    assert "checkpoint_dir: expected a folder, a file or a name of weights" in capsys.readouterr().err


def test_the_workshops_exercises(tune, folder):
    write_splits(folder, ENTRIES[:8], ENTRIES[8:])
    tune()

    def respond(*arguments):
        assert cli.main(["respond", "--engine", "numpy", "--max_new_tokens", "4", *map(str, arguments)]) == 0

    respond("--data", "test.json", "--model", "base", "--key", "response", "--out", "test_base_model.json")
    respond("--data", "test_base_model.json", "--model", FINAL, "--key", "finetuned_response", "--out", "both.json")
    base, tuned = LLM.load("base", "numpy"), LLM.load(FINAL, "numpy")
    for entry, written in zip(ENTRIES[8:], json.loads(Path("both.json").read_text()), strict=True):
        assert written == {
            **entry,
            "response": base.generate(entry, 4).strip(),
            "finetuned_response": tuned.generate(entry, 4).strip(),
        }


def test_the_workshops_data(tmp_path, data_folder):
    entries = JsonEntries(data_folder / "instruction-data.json")
    train, _, test = split(entries, test=None)
    paths = write_splits(tmp_path, train, test)
    assert [len(JsonEntries(path)) for path in paths] == [935, 165]
    assert [len(part) for part in workshop.random_split(JsonEntries(paths[0]), 0.1, 42)] == [842, 93]
