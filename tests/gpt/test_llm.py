"""The Python face and the two commands on it: generate and chat, in real processes where that is what matters."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt import LLM
from gpt.chat import clean_response
from gpt.cli import main
from gpt.errors import UserError
from gpt.generate import Sampling, generate
from gpt.tokenizers import ByteTokenizer, SimpleTokenizerV1
from gpt.weights.native import save_model
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[2]
CONFIG = PRESETS["bytes-tiny"]
ENTRY = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, initialize(CONFIG, Generator(1), "gpt2"), CONFIG, ByteTokenizer().spec())
    return str(path)


@pytest.fixture(scope="module", params=["numpy", "torch"])
def llm(request, path):
    if request.param == "torch":
        pytest.importorskip("torch")
    return LLM.load(path, engine=request.param)


class Writes:
    """An engine that goes on with these bytes whatever it is shown, and then ends the text."""

    def __init__(self, answer, vocab_size=257):
        self.config = GPTConfig(vocab_size, 4096, 4, 1, 1)
        self.answer = [*answer, 256]

    def new_cache(self, rows, capacity):
        class Cache:
            lengths = np.zeros(rows, int)

            def select(self, chosen):
                self.lengths = self.lengths[chosen]

        self.at = -1
        return Cache()

    def logits(self, tokens, cache=None, counts=None):
        self.at += 1
        return np.eye(self.config.vocab_size)[[self.answer[self.at]] * len(tokens)]


def test_an_answer_is_the_continuation_without_the_prompt(llm):
    ids = np.array([list(b"def f")])
    whole = generate(llm.engine, ids, Sampling(30, stop_token=256))[0]
    assert llm.generate("def f", max_new_tokens=30) == "".join(llm.generate("def f", 30, stream=True))
    text = whole[5:]
    text = text[text < 256].astype(np.uint8).tobytes().decode(errors="replace")
    assert llm.generate("def f", 30).rstrip("�") == text.rstrip("�")


def test_prompts_of_unequal_length_are_answered_as_each_alone(llm):
    prompts, settings = (
        ["a", "def function(x):", "import numpy as np\n" * 5],
        {"temperature": 1.2, "top_k": 50, "seed": 3},
    )
    together = llm.generate(prompts, 40, **settings)
    assert together == [llm.generate(prompt, 40, **settings) for prompt in prompts]


def test_samples_differ_and_the_i_th_is_that_of_the_seed_plus_i(llm):
    texts = llm.generate("x = ", 20, samples=3, temperature=1.0, seed=5)
    assert texts == [llm.generate("x = ", 20, temperature=1.0, seed=seed) for seed in (5, 6, 7)]
    assert len(set(texts)) == 3
    nested = llm.generate(["x = ", "y"], 20, samples=2, temperature=1.0, seed=5)
    assert nested[0] == texts[:2]
    assert len(nested) == 2


def test_both_engines_write_the_same_text(path):
    pytest.importorskip("torch")
    settings = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 2}
    texts = [LLM.load(path, engine=name).generate(["def", "class A"], 50, **settings) for name in ("numpy", "torch")]
    assert texts[0] == texts[1]


def test_an_entry_is_put_into_the_prompt_style():
    shown = []

    class Engine(Writes):
        def logits(self, tokens, cache=None, counts=None):
            shown.append(bytes(tokens[0].astype(np.uint8)))
            return super().logits(tokens, cache, counts)

    llm = LLM(Engine(b"Red."), ByteTokenizer())
    assert llm.generate(ENTRY) == "Red."
    assert shown[0].startswith(b"Below is an instruction that describes a task.")
    assert shown[0].endswith(b"### Instruction:\nName a colour.\n\n### Response:\n")
    llm.style = "phi3"
    llm.generate({**ENTRY, "input": "It is warm."})
    assert b"<|user|>\nName a colour.\nIt is warm.\n\n<|assistant|>\n" in shown


def test_streams_whole_characters_and_ends_at_a_stop_string():
    llm = LLM(Writes("Ü€🎉 done. STOP here".encode()), ByteTokenizer())
    pieces = list(llm.generate("x", stream=True, stop="STOP"))
    assert pieces == list("Ü€🎉 done. ")
    assert llm.generate("x", stop=["nothing", " here"]) == "Ü€🎉 done. STOP"
    assert llm.generate("x", 3) == "Ü"


def test_a_row_that_reaches_a_stop_string_is_written_no_further():
    class Engine(Writes):
        def logits(self, tokens, cache=None, counts=None):
            sizes.append(len(tokens))
            return super().logits(tokens, cache, counts)

    sizes = []
    assert LLM(Engine(b"abcdefgh"), ByteTokenizer()).generate(["x", "y"], stop="cd") == ["ab", "ab"]
    assert sizes == [2] * 4


def test_a_token_beyond_the_tokenizer_s_vocabulary_is_never_chosen():
    engine = Writes(b"a", vocab_size=300)
    engine.logits = lambda tokens, cache=None, counts=None: np.eye(300)[[299]] + 0.5 * np.eye(300)[[256]]
    assert LLM(engine, ByteTokenizer()).generate("x", 5) == ""


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        (("",), {}, "prompt: expected a text"),
        ((["a", ""],), {}, "prompt: expected a text"),
        (("a", -1), {}, "max_new_tokens: expected at least 0, got -1"),
        (("a",), {"stop": ""}, "stop: expected a text"),
        (("a",), {"samples": 0}, "samples: expected at least 1"),
        (("a",), {"temprature": 1}, "temprature: no such option; did you mean temperature?"),
        (("a",), {"top_k": "many"}, "top_k: expected integer"),
        ((["a", "b"],), {"stream": True}, "stream: expected one prompt"),
        (({"input": "x"},), {}, "instruction"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(llm, arguments, settings, message):
    with pytest.raises(UserError, match=message):
        llm.generate(*arguments, **settings)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    config = CONFIG.replace(vocab_size=200)
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(1)), config, ByteTokenizer().spec())
    with pytest.raises(UserError, match="tokenizer bytes has 257 tokens.*embedding of 200"):
        LLM.load(tmp_path / "m.safetensors", engine="numpy")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    save_model(tmp_path / "m.safetensors", initialize(CONFIG, Generator(1)), CONFIG)
    with pytest.raises(UserError, match="holds no tokenizer"):
        LLM.load(tmp_path / "m.safetensors", engine="numpy")


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_deleting_it_frees_the_memory(tmp_path, engine):
    """120 MB of parameters, in a process of their own: loaded, used, deleted."""
    config = GPTConfig(257, 64, 768, 4, 12, tie_embeddings=True)
    params = {name: np.full(shape, 0.01, np.float32) for name, shape in config.parameter_shapes().items()}
    save_model(tmp_path / "m.safetensors", params, config, ByteTokenizer().spec())
    code = f"""
import gc, weakref
from gpt import LLM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
LLM.load({str(tmp_path / "m.safetensors")!r}, engine={engine!r}).generate("a", 2)
gc.collect()
before = resident()
llm = LLM.load({str(tmp_path / "m.safetensors")!r}, engine={engine!r})
llm.generate("a", 2)
held, gone = resident() - before, weakref.ref(llm.engine)
del llm
gc.collect()
assert gone() is None
print(held, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    held, left = map(int, done.stdout.split()) if done.stdout else pytest.fail(done.stderr)
    size = config.n_parameters * 4
    assert held > 0.9 * size
    assert left < 0.1 * size


def test_the_class_is_found_where_people_look_for_it():
    code = "import sys, gpt; assert 'gpt.llm' not in sys.modules; from gpt import LLM; print(LLM.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["LLM"], done.stderr


# The commands.


def command(name, *options, stdin=None):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "gpt", name, *options],
        cwd=ROOT, capture_output=True, env=environment, input=stdin, encoding="utf-8",
    )  # fmt: skip


def test_generate_prints_the_same_text_on_both_engines(path, capsys):
    pytest.importorskip("torch")
    printed = []
    for engine in ("numpy", "torch"):
        options = ["--prompt", "def f", "--max_new_tokens", "30", "--temperature", "1", "--seed", "4"]
        assert main(["generate", "--model", path, "--engine", engine, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("def f")
    assert len(printed[0]) > 20


def test_generate_in_a_new_process_prints_what_the_library_gives(path):
    options = ["--model", path, "--prompt", "x = ", "--max_new_tokens", "20", "--engine", "numpy"]
    done = command("generate", *options)
    assert done.stdout == "x = " + LLM.load(path, engine="numpy").generate("x = ", 20) + "\n", done.stderr


def test_generate_prints_several_samples(path, capsys):
    options = ["--prompt", "a", "--engine", "numpy", "--temperature", "2", "--samples", "3", "--max_new_tokens", "40"]
    assert main(["generate", "--model", path, *options]) == 0
    texts = LLM.load(path, engine="numpy").generate("a", 40, temperature=2.0, samples=3)
    assert capsys.readouterr().out == "\n\n".join("a" + text for text in texts) + "\n"
    assert len(set(texts)) == 3


def test_generate_stops_where_the_model_ends_the_text_or_at_a_stop_string(path, capsys):
    llm = LLM.load(path, engine="numpy")
    texts = llm.generate("a", 300, temperature=5.0, samples=8)
    assert not any("<|endoftext|>" in text for text in texts)
    assert len({len(text) for text in texts}) > 1
    whole = llm.generate("a", 40)
    options = [
        "--prompt",
        "a",
        "--engine",
        "numpy",
        "--max_new_tokens",
        "40",
        "--stop",
        "no such",
        "--stop",
        whole[9:12],
    ]
    assert main(["generate", "--model", path, *options]) == 0
    assert capsys.readouterr().out == "a" + whole[: whole.index(whole[9:12])] + "\n"


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "prompt: "),
        (["--prompt", ""], "prompt: "),
        (["--prompt", "a", "--temperature", "-1"], "temperature: "),
        (["--prompt", "a", "--max_new_tokens", "-1"], "max_new_tokens: "),
        (["--prompt", "a", "--top_k", "0"], "top_k: "),
        (["--prompt", "a", "--top_p", "2"], "top_p: "),
        (["--prompt", "a", "--stop", ""], "stop: "),
        (["--prompt", "a", "--samples", "0"], "samples: "),
        (["--prompt", "a", "--model", "no/such/run"], "no/such/run"),
        (["--prompt", "a", "--temprature", "1"], "did you mean --temperature"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(options, message, path, capsys):
    assert main(["generate", "--model", path, *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_chat_answers_skips_blank_lines_and_leaves_at_q(path):
    options = ["--model", path, "--engine", "numpy", "--max_new_tokens", "10"]
    done = command("chat", *options, stdin="x = 1\n\n   \ndef f\nq\nnever read\n")
    llm = LLM.load(path, engine="numpy")
    assert done.returncode == 0, done.stderr
    assert done.stdout == llm.generate("x = 1", 10) + "\n" + llm.generate("def f", 10) + "\n"
    assert not done.stderr


def test_chat_leaves_at_the_end_of_its_input(path):
    done = command("chat", "--model", path, "--engine", "numpy", "--max_new_tokens", "3", stdin="a\n")
    assert done.returncode == 0
    assert not done.stderr
    assert command("chat", "--model", path, "--engine", "numpy", stdin="").returncode == 0


def test_chat_refuses_wrong_settings_before_the_first_prompt(path):
    done = command("chat", "--model", path, "--engine", "numpy", "--stop", "", stdin="a\n")
    assert done.returncode == 2
    assert done.stderr.startswith("error: stop: ")


@pytest.mark.parametrize("style", ["plain", "zephyr"])
def test_chat_goes_on_after_a_prompt_that_it_cannot_take(style, monkeypatch, capsys):
    class Unknown(ByteTokenizer):
        def encode(self, text, **others):
            if "?" in text:
                raise UserError("no token for '?'")
            return super().encode(text, **others)

    monkeypatch.setattr(LLM, "load", lambda *_, **__: LLM(Writes(b"Yes"), Unknown()))
    lines = iter(["a?", "b", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["chat", "--style", style]) == 0
    shown = capsys.readouterr()
    assert shown.err == "error: no token for '?'\n"
    assert shown.out == "Yes\n"


def test_chat_starts_with_a_tokenizer_that_knows_few_words(tmp_path):
    tokenizer = SimpleTokenizerV1({"the": 0, "end": 1})
    config = CONFIG.replace(vocab_size=2)
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(1), "gpt2"), config, tokenizer.spec())
    options = ["--model", str(tmp_path / "m.safetensors"), "--engine", "numpy", "--max_new_tokens", "2"]
    done = command("chat", *options, stdin="the\n")
    assert (done.returncode, done.stderr) == (0, "")
    done = command("chat", *options, stdin="the\nbeginning\nend\n")
    assert done.returncode == 2
    assert "beginning" in done.stderr


def test_numbers_may_be_numpys(llm):
    expected = llm.generate("def f", 5, temperature=0.5, top_k=3, seed=1)
    settings = {"temperature": np.float32(0.5), "top_k": np.int32(3), "seed": np.int64(1)}
    assert llm.generate("def f", np.int64(5), **settings) == expected
    for wrong in ({"top_k": np.float64(3)}, {"top_k": True}, {"temperature": np.bool_(True)}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            llm.generate("def f", 5, **wrong)


def test_an_entry_may_have_no_input_in_either_way(llm):
    assert llm.encode({"instruction": "Say it.", "input": None}) == llm.encode({"instruction": "Say it."})


def test_a_conversation_is_rendered_and_answered():
    shown = []

    class Engine(Writes):
        def logits(self, tokens, cache=None, counts=None):
            shown.append(
                bytes(tokens[0].astype(np.uint16).tolist()[i] for i in range(tokens.shape[1]) if tokens[0, i] < 256)
            )
            return super().logits(tokens, cache, counts)

    llm = LLM(Engine(b"Hi."), ByteTokenizer())
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert llm.chat(messages, template="chatml") == "Hi."
    assert shown[0].endswith(b"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert "".join(llm.chat(messages, template="zephyr", stream=True)) == "Hi."
    with pytest.raises(UserError, match="role of message 1 is 'robot'"):
        llm.chat([{"role": "robot", "content": ""}], template="chatml")


def test_chat_with_a_template_keeps_the_conversation(path):
    options = ["--model", path, "--engine", "numpy", "--max_new_tokens", "5", "--style", "chatml"]
    done = command("chat", *options, stdin="a\nb\nq\n")
    llm, said, expected = LLM.load(path, engine="numpy"), [], ""
    for line in ("a", "b"):
        said.append({"role": "user", "content": line})
        answer = llm.chat(said, 5, template="chatml")
        said.append({"role": "assistant", "content": clean_response(answer)})
        expected += answer + "\n"
    assert done.stdout == expected, done.stderr


def test_chat_keeps_an_answer_without_the_markers_that_the_model_wrote(monkeypatch, capsys):
    shown = []

    class Engine(Writes):
        def new_cache(self, rows, capacity):
            shown.append(b"")
            return super().new_cache(rows, capacity)

        def logits(self, tokens, cache=None, counts=None):
            shown[-1] += bytes(id for id in tokens[0].tolist() if id < 256)
            return super().logits(tokens, cache, counts)

    answer = " Hi.<|im_start|>user\n[/INST] "
    monkeypatch.setattr(LLM, "load", lambda *_, **__: LLM(Engine(answer.encode()), ByteTokenizer()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert main(["chat", "--style", "chatml"]) == 0
    assert capsys.readouterr().out == f"{answer}\n{answer}\n\n"  # shown as it came
    kept = clean_response(answer)
    said = f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{kept}<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    assert shown[-1].startswith(f"{said}<|im_start|>assistant\n".encode())
    assert "<" not in kept
    assert "Hi." in kept


def test_ctrl_c_stops_the_answer_and_then_at_the_prompt_the_program(path):
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt", "chat", "--model", path, "--engine", "numpy", "--max_new_tokens", "1000000"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write("a\n")
    process.stdin.flush()
    assert process.stdout.read(5)  # it is answering
    process.send_signal(signal.SIGINT)
    process.stdin.write("q\n")
    process.stdin.flush()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not errors

    process = subprocess.Popen(
        [sys.executable, "-m", "gpt", "chat", "--model", path, "--engine", "numpy", "--max_new_tokens", "2"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdin.write("a\n")
    process.stdin.flush()
    assert process.stdout.readline()
    time.sleep(0.5)  # it waits for the next prompt
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
