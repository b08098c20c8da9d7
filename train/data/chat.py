"""Examples as tokens: a template's text, its tokens, and those that are learned."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from train.data.answers import Rendered, render_example
from train.data.chat_template import ChatTemplate
from train.data.chat_tokens import ChatEncoder
from train.data.example_windows import ExampleTokens
from train.data.examples import Example, TakeExample
from train.data.text_fields import LONGEST, too_long

TrainOn = Literal["answers", "all"]


class Chat:
    """Writes conversations by a template, and encodes what it writes.

    Attributes:
      template: the template.
      encoder: encodes its text.
    """

    def __init__(self, template: ChatTemplate, encoder: ChatEncoder):
        self.template, self.encoder = template, encoder

    def tokens(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 (n,), and bool (n,): which are of an answer.

        Raises:
          ValueError: as `render`.
        """
        return self.encoder.encode([self.render(example)])[0]

    def render(self, example: Example) -> Rendered:
        """The text for `ChatEncoder.encode`.

        Raises:
          ValueError: the template cannot write the example, or its text is too long.
        """
        data = [*example.messages, *(example.tools or ())]
        data = self.encoder.guarded(data)
        count = len(example.messages)
        tools = None if example.tools is None else data[count:]
        guarded = Example(data[:count], example.first, tools)
        rendered = render_example(self.template, guarded)
        if len(rendered.text) > LONGEST:
            raise too_long()
        return rendered

    def prompt(self, text: str) -> np.ndarray:
        """Token ids int32 (n,) of a user's first turn, up to where the answer begins.

        Raises:
          ValueError: the template cannot write it.
        """
        messages = self.encoder.guarded([{"role": "user", "content": text}])
        written = self.template.render(messages, add_generation_prompt=True)
        return self.encoder.encode([Rendered(written, [])])[0][0]

    @property
    def end(self) -> int | None:
        """The special or added token that ends an answer; None if that is no token."""
        turns = [{"role": x, "content": "x"} for x in ("user", "assistant")]
        ids, learned = self.tokens(Example(turns))
        last = int(ids[learned][-1])
        return last if last in self.encoder.added else None


class TakeRendered:
    """Takes a record's example as text, for `WindowTokens`."""

    def __init__(self, example: TakeExample, chat: Chat, train_on: TrainOn):
        self._example, self._chat, self._train_on = example, chat, train_on

    def columns(self, there: Sequence[str]) -> list[str]:
        """The columns to read, as `TakeExample.columns`."""
        return self._example.columns(there)

    def __call__(self, record: Any) -> Rendered:
        """Raises ValueError for a record without an example that can be written."""
        rendered = self._chat.render(self._example(record))
        answered = any(start < stop for start, stop in rendered.answers)
        if self._train_on == "answers" and not answered:
            raise ValueError(
                f"chat template {self._chat.template.name} writes no answer for it: "
                "choose another --chat-template"
            )
        return rendered


class WindowTokens:
    """Encodes examples, as many tokens of each as a window has.

    The first token is no target, as nothing comes before it. What is longer than a
    window loses its end; an example without a target in the window becomes None.

    Attributes:
      truncated: how many examples lost their end.
      left_out: how many became None.
    """

    def __init__(self, encoder: ChatEncoder, train_on: TrainOn, length: int):
        self._encoder, self._train_on, self._length = encoder, train_on, length
        self.truncated = self.left_out = 0

    def __call__(self, rendered: Sequence[Rendered]) -> list[ExampleTokens | None]:
        """The tokens of each example, or None."""
        encoded = self._encoder.encode(rendered)
        return [self._cut(tokens, answers) for tokens, answers in encoded]

    def _cut(self, tokens: np.ndarray, answers: np.ndarray) -> ExampleTokens | None:
        longer = len(tokens) > self._length
        tokens, targets = tokens[: self._length].copy(), answers[: self._length].copy()
        if self._train_on == "all":
            targets[:] = True
        targets[:1] = False
        if not targets.any():
            self.left_out += 1
            return None
        self.truncated += longer
        return ExampleTokens(tokens, targets)
