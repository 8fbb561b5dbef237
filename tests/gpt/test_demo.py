"""The demonstration: what is wrong is said before it begins, and Ctrl-C ends it as it ends what it runs."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from gpt import cli
from gpt.train.checkpoint import find_checkpoint

ROOT = Path(__file__).parents[2]


def started(*command):
    """A Python process and those that it begins, in a group of their own, as a terminal has them."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stopped(process, pattern):
    """What it prints after Ctrl-C at the first line in which the pattern is found."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if re.search(pattern, line):
            break
    os.killpg(process.pid, signal.SIGINT)
    return "".join(printed) + process.communicate(timeout=120)[0]


def test_a_text_that_is_not_there_is_said_before_anything_is_checked(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--data", str(tmp_path / "missing.txt"), "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert "missing.txt' is neither a file nor a data set" in shown.err
    assert not shown.out
    assert not out.exists()


def test_a_prompt_without_a_text_is_refused_before_anything_is_checked(capsys):
    assert cli.main(["demo", "--prompt", ""]) == 2
    assert capsys.readouterr() == ("", "error: prompt: expected a text to begin with, got none\n")


def test_ctrl_c_ends_all_and_is_said_once(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200)
    process = started("-m", "gpt", "demo", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "demo"))
    printed = stopped(process, "layer_norm|1\\. Every layer")
    assert process.returncode == 130, printed
    assert printed.count("interrupted") == 1, printed
    assert "Traceback" not in printed


EARLY = """
import os, signal, subprocess
from gpt.processes import twingrad

class Late(subprocess.Popen):
    def __init__(self, *arguments, **settings):
        os.kill(os.getpid(), signal.SIGINT)
        super().__init__(*arguments, **settings)

subprocess.Popen = Late
raise SystemExit(twingrad("check"))
"""


def test_ctrl_c_before_the_command_is_there_reaches_it():
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_what_ctrl_c_ends_is_left_the_time_to_write_what_it_has(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200)
    words = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--engine", "numpy"]
    words += ["--steps", "100000", "--eval_every", "1", "--model.n_layers", "1", "--max_length", "16"]
    process = started("-c", f"from gpt.processes import twingrad; raise SystemExit(twingrad(*{words}))")
    printed = stopped(process, "Step 00000")
    assert process.returncode == 130, printed
    assert find_checkpoint(tmp_path / "run", "last")
