"""The places of answers in a conversation that a chat template has written."""

from typing import NamedTuple

from train.data.chat_template import BEGIN, END, ChatTemplate
from train.data.examples import Example, Message
from train.data.text_formats import TakeError


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: all of it.
      answers: where the answers that are learned begin and end in it, in order.
    """

    text: str
    answers: list[tuple[int, int]]


def render_example(template: ChatTemplate, example: Example) -> Rendered:
    """The text of a conversation, and where its answers are.

    An answer is what a `{% generation %}` block writes, if the template has them. Else
    it is what an assistant's turn adds to the text of the turns before it and the
    generation prompt, without white space at its end: the content, and the token that
    ends it.

    Raises:
      ValueError: the template refuses the messages, or fails.
      TakeError: the answers cannot be told from the rest.

    Example:
      >>> from train.data.chat_template import ChatTemplate
      >>> from train.data.examples import TakeExample
      >>> turn = "{{ m.role[0] + ': ' + m.content }} "
      >>> source = "{% for m in messages %}" + turn + "{% endfor %}"
      >>> example = TakeExample()({"prompt": "2 + 2?", "completion": "4"})
      >>> render_example(ChatTemplate("mine", source), example)
      Rendered(text='u: 2 + 2? a: 4 ', answers=[(10, 14)])
    """
    messages, first, tools = example
    turns = [i for i, x in enumerate(messages) if x["role"] == "assistant"]
    marked = template.render_marked(messages, tools)
    if BEGIN not in marked:
        own = [_added(template, marked, example, i) for i in turns if i >= first]
        return Rendered(marked, own)
    rendered = _of_blocks(marked)
    if all(i >= first for i in turns):  # whatever a block has, it is learned
        return rendered
    if len(rendered.answers) != len(turns):
        raise TakeError(
            f"chat template {template.name} has {len(rendered.answers)} generation "
            f"blocks for {len(turns)} turns of the assistant, so it is unknown which "
            "are the completion's: use another --chat-template"
        )
    blocks = zip(turns, rendered.answers, strict=True)
    return Rendered(rendered.text, [span for i, span in blocks if i >= first])


def _added(
    template: ChatTemplate, text: str, example: Example, turn: int
) -> tuple[int, int]:
    """The text that a turn adds to that before it."""
    messages: list[Message] = example.messages
    try:
        before = template.render(messages[:turn], example.tools, True)
    except ValueError as error:
        if turn:
            raise
        raise ValueError(
            f"the assistant begins, and chat template {template.name} writes no prompt "
            "without a turn before: add a turn of the user, or remove the record"
        ) from error
    after = text
    if turn + 1 < len(messages):
        after = template.render(messages[: turn + 1], example.tools)
    if not (after.startswith(before) and text.startswith(after)):
        raise TakeError(
            f"chat template {template.name} writes message {turn}, or what is before "
            "it, otherwise if more follows, so the answer cannot be told from the "
            "rest: put {% generation %} blocks around the answers in the template, or "
            "use another --chat-template"
        )
    return len(before), max(len(before), len(after.rstrip()))


def _of_blocks(text: str) -> Rendered:
    """Takes the marks of generation blocks out of a text."""
    before, *blocks = text.split(BEGIN)
    answers = []
    for block in blocks:
        answer, _, after = block.partition(END)
        answers.append((len(before), len(before) + len(answer)))
        before += answer + after
    return Rendered(before, answers)
