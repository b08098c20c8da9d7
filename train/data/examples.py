"""Examples to fine-tune on, as data sets have them: conversations, tasks and answers.

Every form becomes a list of messages, which a chat template then writes as text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
"""A turn: "role", "content", and further keys that a template may read."""

ExampleForm = Literal["auto", "messages", "conversations", "prompt", "instruction"]

_ROLES = {
    name: role
    for role, names in {
        "system": ("system",),
        "developer": ("developer",),
        "user": ("user", "human"),
        "assistant": ("assistant", "gpt", "chatgpt", "bot", "model"),
        "tool": ("tool", "function", "observation"),
    }.items()
    for name in names
}


class Example(NamedTuple):
    """A conversation in which an assistant answers.

    Attributes:
      messages: the turns in order, each with "role" and "content".
      first: number of the first message whose answer is learned; those before it are
        part of the prompt.
      tools: descriptions of the tools that the assistant may call, for the template.
    """

    messages: list[Message]
    first: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TakeExample:
    """Takes the example of a record.

    | form | fields of the record |
    |---|---|
    | messages | messages: a list of {role, content} |
    | conversations | conversations: a list of {from, value} (ShareGPT) |
    | prompt | prompt and completion: strings, or lists of messages |
    | instruction | instruction, output, and any input: strings (Alpaca) |

    `system`, a string that becomes the first message, and `tools`, a list for the
    template, may stand beside any form, or in an object around it. An empty `system` is
    none. A message may be spelled {role, content} or {from, value} in every form, and
    its role as ShareGPT and others have it: human, gpt, observation.

    Attributes:
      field: where in the record the example is: a field with the list of messages, or
        one with the fields above; "data.messages" is `messages` within `data`. None:
        the record is the example.
      form: auto: the first form in the table whose fields the record has.

    Example:
      >>> take = TakeExample()
      >>> take({"prompt": "2 + 2?", "completion": "4"}).messages
      [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """

    field: str | None = None
    form: ExampleForm = "auto"

    def columns(self, there: Sequence[str]) -> list[str]:
        """The columns of the field, or of any form; ValueError if there are none."""
        if self.field is None:
            wanted = {name for form in _FORMS.values() for name in form.fields}
        else:
            wanted = {self.field, self.field.partition(".")[0]}
        if wanted.isdisjoint(there):
            raise ValueError(f"no example in the columns {[*there]}: {_REMEDY}")
        return [name for name in there if name in {*wanted, *_OPTIONAL}]

    def __call__(self, record: Any) -> Example:
        """The example of a record.

        Raises:
          ValueError: the record has no example of the form, or a message is none.
        """
        *around, value = _path(record, self.field)
        if isinstance(value, list):
            example = Example(_messages(value, self.field or "the record"))
        elif isinstance(value, dict):
            example = _FORMS[_form_of(value, self.form)].read(value)
        else:
            raise ValueError(f"no example: {_kind(value)} is there, {_REMEDY}")
        objects = [x for x in (value, *reversed(around)) if isinstance(x, dict)]
        if (tools := _nearest(objects, "tools")) is not None:
            if not isinstance(tools, list):
                raise ValueError(f"tools is {_kind(tools)}: give a list")
            example = example._replace(tools=tools)
        if system := _nearest(objects, "system"):
            first = {"role": "system", "content": _text(system, "system")}
            messages = [first, *example.messages]
            example = example._replace(messages=messages, first=example.first + 1)
        return _checked(example)


def fits_a_form(fields: Iterable[str]) -> bool:
    """Whether records with these fields have all of a form."""
    return any({*form.fields} <= {*fields} for form in _FORMS.values())


def _of_messages(record: dict[str, Any]) -> Example:
    return Example(_messages(record["messages"], "messages"))


def _of_conversations(record: dict[str, Any]) -> Example:
    return Example(_messages(record["conversations"], "conversations"))


def _of_prompt(record: dict[str, Any]) -> Example:
    prompt = _turns(record["prompt"], "prompt", "user")
    completion = _turns(record["completion"], "completion", "assistant")
    return Example([*prompt, *completion], len(prompt))


def _turns(value: Any, field: str, role: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, field)
    return [{"role": role, "content": _text(value, field)}]


def _of_instruction(record: dict[str, Any]) -> Example:
    """The template of Alpaca reads instruction and input apart, others the content."""
    instruction = _text(record["instruction"], "instruction")
    given = _text(record.get("input") or "", "input")
    task: Message = {"role": "user", "content": instruction}
    if given:
        content = f"{instruction}\n\n{given}"
        task |= {"content": content, "instruction": instruction, "input": given}
    answer = {"role": "assistant", "content": _text(record["output"], "output")}
    return Example([task, answer], 1)


class _Form(NamedTuple):
    fields: tuple[str, ...]
    read: Callable[[dict[str, Any]], Example]


_FORMS = {
    "messages": _Form(("messages",), _of_messages),
    "conversations": _Form(("conversations",), _of_conversations),
    "prompt": _Form(("prompt", "completion"), _of_prompt),
    "instruction": _Form(("instruction", "output"), _of_instruction),
}
_OPTIONAL = ("input", "system", "tools")
_REMEDY = (
    "an example has "
    + "; ".join(" and ".join(form.fields) for form in _FORMS.values())
    + ": rename its fields, or name the field that holds it by --example-field"
)


def _path(record: Any, field: str | None) -> list[Any]:
    """The record, the objects within it that hold the field, and the field's value.

    A field is of that name, or, with dots, within others.
    """
    if field is None:
        return [record]
    if isinstance(record, dict):
        if field in record:
            return [record, record[field]]
        head, dot, rest = field.partition(".")
        if dot and head in record:
            return [record, *_path(record[head], rest)]
    raise ValueError(
        f"no field {field!r}; there is {_kind(record)}: set --example-field"
    )


def _nearest(objects: Sequence[dict[str, Any]], field: str) -> Any:
    """The field in the first object that has it; None if none has."""
    return next((x[field] for x in objects if x.get(field) is not None), None)


def _form_of(record: dict[str, Any], form: ExampleForm) -> str:
    names = [*_FORMS] if form == "auto" else [form]
    for name in names:
        if all(record.get(field) is not None for field in _FORMS[name].fields):
            return name
    if form == "auto":
        raise ValueError(f"no example: it has the fields {sorted(record)}; {_REMEDY}")
    raise ValueError(
        f"no example of the form {form!r}, which has "
        f"{' and '.join(_FORMS[form].fields)}: it has the fields "
        f"{sorted(record)}; set "
        "--example-form"
    )


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} is {_kind(value)}: give a list of messages")
    return [_message(item, f"message {i} of {field}") for i, item in enumerate(value)]


def _message(value: Any, what: str) -> Message:
    """A message in the spelling of templates; what is null is not there."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_kind(value)}: write {{role, content}}")
    message = {name: x for name, x in value.items() if x is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value", None)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        has = f"the role {role!r}" if role else f"no role, only {sorted(value)}"
        raise ValueError(f"{what} has {has}: name who speaks")
    if role not in _ROLES:
        raise ValueError(
            f"{what} has the role {role!r}, which is unknown: write one of "
            f"{', '.join(_ROLES)}"
        )
    message["role"] = _ROLES[role]
    if content is None and "tool_calls" in message:
        content = ""
    return message | {"content": _text(content, f"the content of {what}")}


def _text(value: Any, what: str) -> str:
    """A string; or the joined texts of a list of {"type": "text", "text": ...}."""
    if isinstance(value, list) and value:
        parts = [x.get("text") for x in value if isinstance(x, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(value):
            return "".join(texts)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}: give a string")
    return value


def _checked(example: Example) -> Example:
    """ValueError for an example without an answer."""
    roles = [message["role"] for message in example.messages[example.first :]]
    if "assistant" not in roles:
        raise ValueError(
            f"no answer to learn: the turns are of {', '.join(roles) or 'nobody'}, and "
            "none of the assistant: add one, or remove the record"
        )
    return example


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the fields {sorted(value)}"
    names = {list: "a list", str: "a string", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), type(value).__name__)
