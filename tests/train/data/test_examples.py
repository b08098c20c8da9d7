"""The forms of examples, in every kind of file, and what is wrong with a record."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.chat import said, write_lines
from train.data.examples import Example, TakeExample
from train.data.text_formats import BadLines, read_records
from train.host.paths import to_path

HI = said("Hi", "Hello")
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
FORMS = {
    "messages": ({"id": 7, "messages": HI}, HI),
    "ShareGPT": ({"conversations": SHAREGPT}, HI),
    "ShareGPT's field, usual spelling": ({"conversations": HI}, HI),
    "prompt": ({"prompt": "Hi", "completion": "Hello"}, HI),
    "prompt of messages": ({"prompt": HI[:1], "completion": HI[1:]}, HI),
    "instruction": ({"instruction": "Hi", "input": "", "output": "Hello"}, HI),
    "instruction without input": ({"instruction": "Hi", "output": "Hello"}, HI),
    "instruction, input null": (
        {"instruction": "Hi", "input": None, "output": "Hello"},
        HI,
    ),
    "system": (
        {"system": "Be brief.", "conversations": SHAREGPT},
        said("Hi", "Hello", system="Be brief."),
    ),
    "an empty system": ({"system": "", "messages": HI}, HI),
    "other names of roles": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Hi"},
                {"from": "chatgpt", "value": "Hello"},
                {"from": "observation", "value": "4"},
                {"from": "model", "value": "4"},
            ]
        },
        [
            *said("Hi", "Hello", system="Be brief."),
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
    ),
    "a prompt beside messages": ({"prompt": "Hi", "messages": HI}, HI),
    "parts of text": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "H"},
                        {"type": "text", "text": "i"},
                    ],
                },
                HI[1],
            ]
        },
        HI,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_messages(form):
    record, messages = FORMS[form]
    assert TakeExample()(record).messages == messages


def test_a_completion_alone_is_learned():
    record = {"prompt": said("a", "b", "c"), "completion": said("", "d")[1:]}
    assert TakeExample()(record) == Example(said("a", "b", "c", "d"), first=3)
    record |= {"system": "s"}
    assert TakeExample()(record).first == 4


def test_input_stays_apart_for_templates_that_ask_for_it():
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    first = TakeExample()(record).messages[0]
    assert first["content"] == "Add.\n\n2 and 2"
    assert (first["instruction"], first["input"]) == ("Add.", "2 and 2")


def test_calls_of_tools_reach_the_template_and_nulls_do_not():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    record = {
        "messages": [said("Hi")[0] | {"tool_calls": None}, call],
        "tools": [{"name": "add"}],
    }
    example = TakeExample()(record)
    assert example.messages == [said("Hi")[0], call | {"content": ""}]
    assert example.tools == record["tools"]


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("data.messages", {"data": {"messages": HI}}),
        ("data", {"data": {"instruction": "Hi", "output": "Hello"}}),
        ("chat", {"chat": SHAREGPT}),
        ("a.b", {"a.b": HI}),
    ],
)
def test_a_field_may_hold_the_example(field, record):
    assert TakeExample(field)(record).messages == HI


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("messages", {"messages": HI, "system": "s", "tools": [1]}),
        ("a.b", {"a": {"b": HI, "system": "s"}, "system": "other", "tools": [1]}),
        ("a", {"a": {"messages": HI, "tools": [1]}, "system": "s", "tools": [2]}),
        ("a", {"a": {"messages": HI, "system": None}, "system": "s", "tools": [1]}),
    ],
)
def test_system_and_tools_may_stand_around_the_field(field, record):
    example = TakeExample(field)(record)
    assert example == Example(said("Hi", "Hello", system="s"), first=1, tools=[1])


def test_a_form_may_be_named():
    record = {"messages": said("a", "b"), "instruction": "Hi", "output": "Hello"}
    assert TakeExample(form="instruction")(record).messages == HI
    with pytest.raises(ValueError, match=r"'prompt', which has prompt and completion"):
        TakeExample(form="prompt")(record)


WRONG = {
    "no form": (
        {"question": "Hi", "answer": "Hello"},
        "it has the fields ['answer', 'question']; an example has messages; "
        "conversations; prompt and completion; instruction and output",
    ),
    "half a form": ({"prompt": "Hi"}, "it has the fields ['prompt']"),
    "no record": (["Hi"], "message 0 of the record is a string"),
    "a string": ("Hi", "no example: a string is there"),
    "no messages": ({"messages": []}, "messages is an empty list"),
    "messages of strings": ({"messages": ["Hi"]}, "message 0 of messages is a string"),
    "no role": ({"messages": [{"content": "Hi"}]}, "message 0 of messages has no role"),
    "a role that is a list": (
        {"conversations": [{"from": ["x"], "value": "Hi"}]},
        "message 0 of conversations has the role ['x']: name who speaks",
    ),
    "a role that nobody knows": (
        {"conversations": [*SHAREGPT, {"from": "critic", "value": "No."}]},
        "message 2 of conversations has the role 'critic', which is unknown: write one",
    ),
    "content null": (
        {"messages": [{"role": "user", "content": None}]},
        "the content of message 0 of messages is null",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "the content of message 0 of messages is a list",
    ),
    "no answer": ({"messages": HI[:1]}, "none of the assistant"),
    "no answer in the completion": (
        {"prompt": HI, "completion": said("Bye")},
        "no answer to learn: the turns are of user",
    ),
    "output of numbers": ({"instruction": "2 + 2", "output": 4}, "output is int"),
    "tools as a string": ({"messages": HI, "tools": "add"}, "tools is a string"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_record_is_said(what):
    record, problem = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(problem)):
        TakeExample()(record)


def test_a_field_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"no field 'data\.chat'.* \['messages'\]: set"
    ):
        TakeExample("data.chat")({"messages": HI})


def read(path, bad=None, take=None) -> list[Example]:
    bad = bad or BadLines()
    return list(read_records(to_path(str(path)), take or TakeExample(), bad, print))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.jsonl.gz"])
def test_examples_in_json(tmp_path, name):
    records = [record for record, _ in FORMS.values()]
    path = write_lines(tmp_path / name, records)
    if name == "array.json":
        path.write_text(json.dumps(records))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert [x.messages for x in read(path)] == [x for _, x in FORMS.values()]


def test_examples_in_parquet(tmp_path):
    """Rows have all columns and all fields of messages, where null is not there."""
    messages = [[{**turn, "name": None} for turn in HI], None]
    table = pyarrow.table(
        {
            "id": [1, 2],
            "messages": messages,
            "prompt": [None, "Hi"],
            "completion": [None, "Hello"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [x.messages for x in read(tmp_path / "a.parquet")] == [HI, HI]
    nested = pyarrow.table({"id": [1], "data": [{"messages": HI}]})
    pyarrow.parquet.write_table(nested, tmp_path / "b.parquet")
    (example,) = read(tmp_path / "b.parquet", take=TakeExample("data.messages"))
    assert example.messages == HI
    with pytest.raises(ValueError, match=r"b\.parquet: no example .*\['id', 'data'\]"):
        read(tmp_path / "b.parquet")


def test_parquet_pads_objects_with_nulls_which_are_taken_out(tmp_path):
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "zone": "UTC"}]
    turns = [
        [said("Hi")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        for call in calls
    ]
    tools = [[{"name": "add", "a": {"type": "int"}}], [{"name": "now", "b": 2}]]
    table = pyarrow.table({"turns": turns, "tools": tools, "system": ["s", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", take=TakeExample("turns"))
    assert [x.messages for x in found] == [[*said(system="s"), *turns[0]], turns[1]]
    assert [x.tools for x in found] == tools


def test_a_bad_record_is_named_or_skipped_and_counted(tmp_path):
    records = [{"messages": HI}, {"text": "Hi"}, {"messages": HI}]
    path = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no example.*\['text'\]"):
        read(path)
    bad = BadLines("skip")
    assert len(read(path, bad)) == 2
    assert bad.count == 1
    assert "line 2" in bad.first[0]
