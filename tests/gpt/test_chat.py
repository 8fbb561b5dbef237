"""Chat templates: what each writes, what is refused, and the same text as transformers'."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.chat import ROLES, TEMPLATES, clean_response, render
from gpt.errors import UserError

USER = {"role": "user", "content": " What is 2 + 2?\n"}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "4 <b>&amp;</b>"},
    {"role": "user", "content": "Thanks {{ 7 * 7 }}"},
]
# As Hugging Face's have it: blocks on lines of their own, macros, loops that break, refusals, JSON, generation.
INVOLVED = """{%- macro header(role) %}
[{{ role | upper }}]
{%- endmacro %}
{{ bos_token }}
{% for message in messages %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {% if message.role == 'system' and not loop.first %}
        {{ raise_exception('the system speaks first') }}
    {% endif %}
{{ header(message['role']) }}
    {% generation %}{{ message.content | tojson }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if tools %}{{ tools }}{% endif %}{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text(max_size=8)}), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def theirs():
    """transformers' own rendering."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")

    def apply(messages, template, add_generation_prompt=False):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    return apply


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES, INVOLVED])
def test_transformers_render_the_same(theirs, template, prompt):
    ours = render(MESSAGES, template, "<s>", "</s>", prompt)
    assert ours == theirs(MESSAGES, TEMPLATES.get(template, template), prompt)


@given(messages=conversations, name=st.sampled_from(sorted(TEMPLATES)))
def test_transformers_render_any_conversation_the_same(theirs, messages, name):
    assert render(messages, name, "<s>", "</s>") == theirs(messages, TEMPLATES[name])


def test_what_each_template_writes():
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(two, "llama3", add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert render(two, "chatml", add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(two, "zephyr", eos_token="</s>", add_generation_prompt=True) == (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    )
    answered = [*two, {"role": "assistant", "content": "Hello"}]
    for name in TEMPLATES:
        opened = render(two, name, "<s>", "</s>", add_generation_prompt=True)
        assert render(answered, name, "<s>", "</s>").startswith(opened + "Hello")


def test_the_date_of_today():
    assert render([USER], "{{ strftime_now('%Y') }}") == str(datetime.date.today().year)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages: expected at least one, got none"),
        ([USER, {"role": "usr", "content": "x"}], "message 2 is 'usr', not one of .*; did you mean user"),
        ([{"content": "x"}], "the role of message 1 is None"),
        ([{"role": ["user"], "content": "x"}], "the role of message 1"),
        ([{"role": "user"}], "the content of message 1 is NoneType, not text"),
        (["hello"], "the role of message 1 is None"),
    ],
)
def test_what_is_no_conversation(messages, message):
    with pytest.raises(UserError, match=message) as caught:
        render(messages, "chatml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template, message",
    [
        ("chat-ml", "'chat-ml' is neither one of llama3, chatml, zephyr nor a template; did you mean chatml?"),
        ("{% for %}", "chat template: "),
        ("{{ raise_exception('roles must\nalternate') }}", "chat template: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template: "),
        ("{{ nothing.at.all }}", "chat template: .*undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template: .*unsafe"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe|chat template: .*not safely callable"),
        ("{{ range(10 ** 9) | list }}", "chat template: .*too big"),
    ],
)
def test_a_template_that_is_wrong_refuses_or_reaches_out(template, message):
    with pytest.raises(UserError, match=message) as caught:
        render([USER], template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<|assistant|>\nHello there.</s>", "Hello there."),
        (" [INST] Say it [/INST] I say it.<|eot_id|>", "Say it I say it."),
        ("<s>One <|im_end|> two", "One two"),
        ("a [b] stays, and [1] too: 3 < 4 | 5 > 2", "a [b] stays, and [1] too: 3 < 4 | 5 > 2"),
        ("", ""),
    ],
)
def test_a_response_is_cleaned_of_the_markers_of_templates(text, expected):
    assert clean_response(text) == expected
