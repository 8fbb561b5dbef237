"""Chat templates: a conversation as the one text that a chat model was finetuned with, ready to be encoded.

    render([{"role": "user", "content": "Hello"}], "chatml", add_generation_prompt=True)

A template is a Jinja text, as Hugging Face keeps it in tokenizer_config.json, and is rendered in the environment that
transformers gives it (utils/chat_template_utils.py): sandboxed, because it comes with a model from anywhere, without
the line end after a block, with `raise_exception`, `strftime_now`, `tojson`, and loops that may break. Jinja is small
and every chat needs it, so it is no extra.

Special tokens are plain text in what `render` gives: to encode them as tokens, allow them (`allowed_special`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from gpt.errors import UserError
from gpt.options import did_you_mean

__all__ = ["ROLES", "TEMPLATES", "clean_response", "render"]

ROLES = ("system", "user", "assistant")

TEMPLATES = {
    # Meta's model card of Llama 3, "Prompt format"; its code strips each content too.
    "llama3": (
        "{{ '<|begin_of_text|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # OpenAI's ChatML.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Zephyr's (Tunstall et al. 2023), and TinyLlama's after it.
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation: messages of a "role" (system, user, assistant) and a "content", in their order.

    `template`: a name of TEMPLATES, or the text of a template. `add_generation_prompt` opens the assistant's answer.
    UserError for what is no conversation, and for a template that is wrong or refuses this one.
    """
    if template not in TEMPLATES and "{" not in template:
        names = ", ".join(TEMPLATES)
        raise UserError(
            f"template: {template!r} is neither one of {names} nor a template{did_you_mean(template, TEMPLATES)}"
        )
    given = [_checked(number, message) for number, message in enumerate(messages, 1)]
    if not given:
        raise UserError("messages: expected at least one, got none")
    try:
        return _compiled(TEMPLATES.get(template, template)).render(
            messages=given,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
    except Exception as error:  # a template is a program of somebody's, and may fail in any way
        raise UserError(f"chat template: {' '.join(str(error).split()) or type(error).__name__}") from error


# What models write of templates: <|markers|>, sentence ends, [INST] and its kin, and the role that a marker leaves.
_MARKERS = re.compile(r"<\|[^|<>]*\|>|</?s>|\[/?[A-Z_]+\]")


def clean_response(text: str) -> str:
    """An answer without the markers of templates that a model wrote into it, and without white space around it."""
    return re.sub(r" {2,}", " ", _MARKERS.sub(" ", text)).strip()


def _checked(number: int, message: Mapping[str, Any]) -> dict[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if role not in ROLES:
        close = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"messages: the role of message {number} is {role!r}, not one of {', '.join(ROLES)}{close}")
    if not isinstance(content, str):
        raise UserError(f"messages: the content of message {number} is {type(content).__name__}, not text")
    return {"role": role, "content": content}


@lru_cache
def _compiled(template: str) -> Any:
    import jinja2  # 0.1 s, so only when it is asked for
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; here they are text like any other."""

        tags = {"generation"}  # noqa: RUF012 - as the class it is derived from has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        # Jinja's own would write < and > as HTML needs them.
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
