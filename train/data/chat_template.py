"""Chat templates: Jinja programs that write a conversation as one text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from train.data.examples import Message
from train.data.fingerprint import Fingerprint

BEGIN, END = "\ufdd1", "\ufdd2"
"""Marks around what `{% generation %}` blocks write: noncharacters, as no text has."""

_DAY = datetime(2024, 7, 26)
"""The date that templates read: the one that LLaMA 3.1's has where there is no clock.

Of the real one, a run that is resumed on another day would read other tokens.
"""


class ChatTemplate:
    """A Jinja template, rendered as transformers' `apply_chat_template` does.

    It is rendered in jinja2's sandbox, with `trim_blocks`, `lstrip_blocks`, loop
    controls, `raise_exception`, a `tojson` that escapes nothing, `{% generation %}`
    blocks, the special tokens by name, and `documents`, always None. Deviation:
    `strftime_now` has a fixed date.

    Attributes:
      name: what error messages call it.
      source: the Jinja text.
      bos_token, eos_token: the tokens that begin and end a text, "" for none.
      further_tokens: other special tokens by name, such as {"pad_token": "<pad>"}.

    Raises:
      ValueError: it is not valid Jinja.

    Example:
      >>> template = ChatTemplate("mine", "{{ messages[0].content + eos_token }}")
      >>> template.render([{"role": "user", "content": "Hello"}])
      'Hello'
    """

    def __init__(
        self,
        name: str,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        further_tokens: Mapping[str, str | list[str]] | None = None,
    ):
        self.name = name
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.further_tokens = further_tokens or {}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template {name}, line {error.lineno}: {error.message}; mend it"
            ) from error

    @property
    def tokens(self) -> dict[str, str | list[str]]:
        """All special tokens by name, as tokenizer_config.json has them."""
        own = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {**self.further_tokens, **own}

    @property
    def fingerprint(self) -> Fingerprint:
        """The digest of all that the text depends on besides the conversation."""
        parts = json.dumps([self.source, self.tokens], sort_keys=True)
        return {"sha256": hashlib.sha256(parts.encode()).hexdigest()}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, or of its beginning.

        Args:
          messages: the turns, each with "role" and "content".
          tools: descriptions of tools, as the template expects them.
          add_generation_prompt: append what comes before an answer.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        text = self.render_marked(messages, tools, add_generation_prompt)
        return text.replace(BEGIN, "").replace(END, "")

    def render_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Renders with BEGIN and END around the text of generation blocks."""
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except Exception as error:  # of any class: a template is a program
            raise ValueError(
                f"chat template {self.name} cannot write the conversation: {error}; "
                "change the record, or choose another --chat-template"
            ) from error


class _Generation(Extension):
    """The tag `{% generation %}`, which marks what it encloses."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 annotates it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclosed")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return BEGIN + caller() + END


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _DAY.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own escapes what HTML would read."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
