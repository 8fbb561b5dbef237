"""The adaptor in the real lm-evaluation-harness, on tasks that lie in a folder; nothing is downloaded."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.evaluate import harness
from gpt.evaluate.likelihood import windows
from tests.gpt.evaluate.fakes import thinks

CONTEXT = 24  # of the model in conftest.py
EOT = 256

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'twingrad[harness]'"
)

CHOICE = """
task: twin_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: twin_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """
task: twin_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
ENTRIES = [
    {"question": f"Question {i}, a rather long one{'?' * i}", "choices": ["red", "green", "sky blue"], "answer": i % 3}
    for i in range(5)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three tasks over five questions; and the library's cache in a folder of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    for text in (CHOICE, ROLLING, WRITING):
        name = text.split()[1]
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


@pytest.fixture
def manager(monkeypatch, folder):
    """The harness knows the tasks in the folder only: to list its thousands takes long."""
    from lm_eval import tasks

    own = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path: own(include_path=include_path, include_defaults=False)
    )


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_it_is_the_harnesss_own_kind_of_model(llm):
    assert issubclass(harness.HarnessLM, lm_eval.api.model.LM)
    assert harness.HarnessLM is harness.harness_class()
    info = harness.HarnessLM(llm).get_model_info()
    assert info["tokenizer"] == "bytes"
    assert info["context_length"] == CONTEXT
    assert info["engine"] == llm.engine.name
    with pytest.raises(AttributeError, match="HarnesLM"):
        harness.HarnesLM  # noqa: B018


def test_the_harness_runs_on_it(llm, folder, manager, peer_logps):
    results = harness.evaluate_harness(llm, ["twin_choice", "twin_rolling", "twin_writing"], folder, batch_size=3)
    figures = results["results"]

    def logp(context, text):
        window = [*context, *text.encode()][-(CONTEXT + 1) :]
        table = peer_logps(window[:-1])
        return sum(table[i - 1, window[i]] for i in range(len(window) - len(text.encode()), len(window)))

    right = norm = 0
    for entry in ENTRIES:
        scores = [logp(entry["question"].encode(), f" {choice}") for choice in entry["choices"]]
        right += np.argmax(scores) == entry["answer"]
        norm += np.argmax(np.divide(scores, [len(c) for c in entry["choices"]])) == entry["answer"]
    assert figures["twin_choice"]["acc,none"] == pytest.approx(right / 5)
    assert figures["twin_choice"]["acc_norm,none"] == pytest.approx(norm / 5)
    nats, size = 0.0, 0
    for entry in ENTRIES:
        ids = [EOT, *entry["question"].encode()]
        for begin, predicted, end in windows(len(ids), 1, CONTEXT):
            table = peer_logps(ids[begin : end - 1])
            nats -= sum(table[i - begin - 1, ids[i]] for i in range(predicted, end))
        size += len(ids) - 1
    assert figures["twin_rolling"]["bits_per_byte,none"] == pytest.approx(nats / size / np.log(2))
    assert figures["twin_writing"]["exact_match,none"] == 0


def test_the_harness_measures_a_model_that_knows_the_answers(folder, manager):
    def thought(ids):
        said = bytes(i for i in ids if i < EOT).decode()
        entry = next(e for e in reversed(ENTRIES) if said.startswith(e["question"]))  # the most question marks first
        rest = said.removeprefix(entry["question"])
        answer = f"{entry['choices'][entry['answer']]}\n and more"
        logits = np.zeros(257)
        logits[ord(answer[len(rest)])] = 9.0
        return logits

    llm = thinks(thought)
    found = harness.evaluate_harness(llm, ["twin_writing"], folder)
    assert found["results"]["twin_writing"]["exact_match,none"] == 1.0  # "sky blue" is as long as an answer may be
    found = harness.evaluate_harness(llm, ["twin_writing"], folder, limit=2)
    assert found["n-samples"] == {"twin_writing": {"original": 5, "effective": 2}}


@given(st.integers(0, 200), st.integers(1, 30))
def test_windows_are_those_of_the_harness(length, width):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(length))
    theirs = map(make_disjoint_window, get_rolling_token_windows(ids, -1, max_seq_len=width, context_len=1))
    whole = [-1, *ids]
    ours = ((whole[begin:predicted], whole[predicted:end]) for begin, predicted, end in windows(length + 1, 1, width))
    assert list(ours) == list(theirs)


TEXTS = st.text("ab \n.", max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=4))
def test_likelihoods_are_those_of_the_harnesss_own_rules(llm, peer_logps, pairs):
    """Against its TemplateLM, which splits a text into tokens as its model "hf" does, over transformers."""

    class Peer(lm_eval.api.model.TemplateLM):
        eot_token_id = EOT

        def tok_encode(self, string, add_special_tokens=None, **others):
            return list(string.encode())

        def _loglikelihood_tokens(self, found, **others):
            answers = []
            for _, context, continuation in found:
                window = ([*context, *continuation] if context else [EOT, *continuation])[-(CONTEXT + 1) :]
                table = peer_logps(window[:-1])[-len(continuation) :]
                logp = sum(row[i] for row, i in zip(table, continuation, strict=True))
                answers.append((logp, [int(row.argmax()) for row in table] == continuation))
            return answers

        def loglikelihood_rolling(self, asked, disable_tqdm=False): ...

        def generate_until(self, asked, disable_tqdm=False): ...

    pairs = [(context, text[: CONTEXT - 1 - len(context) + len(context.rstrip())] or "a") for context, text in pairs]
    pairs = [(c, t) for c, t in pairs if len(c) - len(c.rstrip()) + len(t) <= CONTEXT]
    theirs = Peer().loglikelihood(requests(*pairs), disable_tqdm=True)
    ours = harness.HarnessLM(llm, batch_size=2).loglikelihood(requests(*pairs))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_what_is_written_is_what_the_model_writes_alone(llm):
    contexts = ["No one", "could have", "a", "in the last years"]
    greedy = {"until": ["\n", "zz"], "max_gen_toks": 6}
    drawn = {"until": "e", "max_gen_toks": 5, "do_sample": True, "temperature": 1.5, "top_k": 50}
    asked = requests(*((context, given) for context in contexts for given in (greedy, drawn)))
    found = harness.HarnessLM(llm, batch_size=3).generate_until(asked)
    for request, text in zip(asked, found, strict=True):
        context, given = request.args
        if given is greedy:
            assert text == llm.generate(context, 6, stop=["\n", "zz"])
        else:
            assert text == llm.generate(context, 5, stop="e", temperature=1.5, top_k=50, seed=123)


def test_a_sample_that_is_asked_for_again_is_another(llm):
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    found = harness.HarnessLM(llm).generate_until(requests(*[("again", drawn)] * 4, ("again", {"max_gen_toks": 12})))
    assert len(set(found)) == 5


def test_do_sample_decides_over_the_temperature(llm):
    lm, greedy = harness.HarnessLM(llm), llm.generate("a", 9)
    for given_settings in ({"do_sample": False, "temperature": 1.5}, {"temperature": 0.0}, {}):
        assert lm.generate_until(requests(("a", {**given_settings, "max_new_tokens": 9}))) == [greedy]
    drawn = llm.generate("a", 9, temperature=1.0)
    assert lm.generate_until(requests(("a", {"do_sample": True, "max_gen_toks": 9}))) == [drawn]


def test_a_context_that_is_too_long_leaves_room_for_the_answer(llm):
    context = "No one could have believed, in the last years"
    asked = requests((context, {"max_gen_toks": 10}), (context, {"max_gen_toks": 40}), ("", {"max_gen_toks": 5}))
    short, long, begun = harness.HarnessLM(llm).generate_until(asked)
    assert short == llm.generate(context[-(CONTEXT - 10) :], 10)
    assert long == llm.generate(context[-CONTEXT // 2 :], 40)
    assert begun == llm.generate("<|endoftext|>", 5)


def test_settings_that_are_not_known_are_refused(llm):
    with pytest.raises(UserError, match="generation setting num_beams: not known here"):
        harness.HarnessLM(llm).generate_until(requests(("a", {"num_beams": 4})))


def test_an_unknown_task_is_named_with_the_nearest(llm, folder, manager):
    with pytest.raises(UserError, match="lm_eval has no task 'twin_choise'; did you mean twin_choice"):
        harness.evaluate_harness(llm, ["twin_choise"], folder)


def test_data_that_is_not_there_is_one_line(llm, folder, manager):
    (folder / "questions.jsonl").write_text("{")
    with pytest.raises(UserError, match="the data of twin_choice cannot be loaded: ") as caught:
        harness.evaluate_harness(llm, ["twin_choice"], folder)
    assert "\n" not in str(caught.value)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="the data of twin_choice cannot be loaded: .*questions.jsonl"):
        harness.evaluate_harness(llm, ["twin_choice"], folder)


def test_without_the_library_the_extra_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from gpt.evaluate import harness\n"
        "try: harness.HarnessLM\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "this needs lm_eval, which is not installed: pip install 'twingrad[harness]'\n", done.stderr


def test_tensorflow_stays_out():
    code = (
        "import sys\nfrom gpt.evaluate.harness import HarnessLM\nimport lm_eval.evaluator, lm_eval.tasks\n"
        "print('tensorflow' in sys.modules, sys.modules['lm_eval'].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False lm_eval\n", done.stderr
