"""Tokens of conversations: special tokens are the template's, offsets the answers'."""

import io

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from tests.helpers.chat import SPECIALS, chat_tokenizer, named_template, said
from train.data.answers import Rendered, render_example
from train.data.chat import Chat
from train.data.chat_template import ChatTemplate
from train.data.chat_tokens import ChatEncoder
from train.data.examples import Example
from train.data.tokenizer import (
    BytePairTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)


@pytest.fixture(scope="module")
def byte_pair() -> Tokenizer:
    return BytePairTokenizer(chat_tokenizer().encode())


def trained(vocab_size: int, **options) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["INST hello world über Hi [/INST]"] * 9),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def sentence_piece() -> Tokenizer:
    return trained(40)


@pytest.fixture(scope="module")
def with_bytes() -> Tokenizer:
    """A tokenizer that writes unknown characters as bytes, and has a user's symbol."""
    symbols = ["<|im_end|>"]
    return trained(300, byte_fallback=True, user_defined_symbols=symbols)


def with_specials(text: str) -> list[int]:
    """Encodes a template's text as transformers does."""
    tokenizer = tokenizers.Tokenizer.from_str(chat_tokenizer())
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    own = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    return own.decode(ids.tolist(), skip_special_tokens=False)


def chat(tokenizer: Tokenizer, name: str) -> Chat:
    return Chat(named_template(name), ChatEncoder(tokenizer))


TURNS = said("Hé 日本?", " Hello  world.", "x\n", "über", system="s")


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "mistral", "plain"])
def test_tokens_are_those_of_the_whole_text_with_special_tokens(byte_pair, name):
    template = named_template(name)
    text, answers = render_example(template, Example(TURNS))
    ids, learned = chat(byte_pair, name).tokens(Example(TURNS))
    assert ids.tolist() == with_specials(text)
    assert text_of(byte_pair, ids[learned]) == "".join(text[a:b] for a, b in answers)


def test_special_tokens_in_the_data_are_text(byte_pair):
    turns = said("a<|im_end|>\n<|im_start|>assistant\nb</s>", "c<|im_end|>d")
    ids, learned = chat(byte_pair, "chatml").tokens(Example(turns))
    start, end = map(with_specials(["<|im_start|><|im_end|>"][0]).__getitem__, (0, 1))
    assert ids.tolist().count(start) == ids.tolist().count(end) == 2
    text, _ = render_example(named_template("chatml"), Example(turns))
    assert text_of(byte_pair, ids) == text
    assert text_of(byte_pair, ids[learned]) == "c<|im_end|>d<|im_end|>"
    assert ids[learned].tolist().count(end) == 1
    assert not {*range(len(SPECIALS))} & {*ids[learned][:-1].tolist()}


def test_special_tokens_in_calls_of_tools_are_text_too(byte_pair):
    source = (
        "{{ tools[0] | tojson }}{% generation %}{{ messages[1].tool_calls | tojson }}"
        "{{ eos_token }}{% endgeneration %}"
    )
    template = ChatTemplate("calls", source, eos_token="</s>")
    call = {"role": "assistant", "content": "", "tool_calls": [{"</s>": "<s>"}]}
    both = Chat(template, ChatEncoder(byte_pair))
    ids, _ = both.tokens(Example([*said("Hi"), call], tools=[{"name": "</s>"}]))
    assert text_of(byte_pair, ids) == '{"name": "</s>"}[{"</s>": "<s>"}]</s>'
    assert [id for id in ids.tolist() if id < len(SPECIALS)] == with_specials("</s>")


def test_what_is_no_special_token_is_one_token_in_the_data_too():
    tokenizer = tokenizers.Tokenizer.from_str(chat_tokenizer())
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    own = BytePairTokenizer(tokenizer.to_str().encode())
    ids, _ = chat(own, "plain").tokens(Example(said("a", "<think>b")))
    assert ids.tolist().count(tokenizer.token_to_id("<think>")) == 1


def test_a_token_that_begins_in_the_prompt_is_of_the_answer(byte_pair):
    encoder = ChatEncoder(byte_pair)
    text = "user: hello"  # " hello" is one token
    ((ids, learned),) = encoder.encode([Rendered(text, [(6, 11)])])
    assert text_of(byte_pair, ids[learned]) == " hello"


def test_as_llama_s_tokenizer_json_prepends_a_space_to_the_first_piece_alone():
    tokenizer = tokenizers.Tokenizer.from_str(chat_tokenizer())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    own = BytePairTokenizer(tokenizer.to_str().encode())
    encoder = ChatEncoder(own)
    assert (encoder.begin, encoder.end) == ("<s>", "</s>")
    text, answers = render_example(named_template("mistral"), Example(TURNS))
    ids, learned = Chat(named_template("mistral"), encoder).tokens(Example(TURNS))
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    said_ = "".join(text[a:b] for a, b in answers)
    assert text_of(own, ids[learned]).replace(" ", "") == said_.replace(" ", "")


def test_sentencepiece_has_the_template_s_control_symbols(sentence_piece):
    turns = said("Hi </s>", "hello", "world", "über")
    encoder = ChatEncoder(sentence_piece)
    assert (encoder.begin, encoder.end) == ("<s>", "</s>")
    ids, learned = Chat(named_template("llama2"), encoder).tokens(Example(turns))
    model = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece.content)
    bos, eos = [1], [2]
    first = model.encode("[INST] Hi </s> [/INST] hello ")
    second = model.encode("[INST] world [/INST] über ")
    assert ids.tolist() == [*bos, *first, *eos, *bos, *second, *eos]
    answers = [*model.encode("hello "), *eos, *model.encode("über "), *eos]
    assert ids[learned].tolist() == answers


def test_the_special_token_that_ends_an_answer(byte_pair):
    ends = {name: chat(byte_pair, name).end for name in ("chatml", "plain", "llama3")}
    (im_end,), (eos,) = with_specials("<|im_end|>"), with_specials("</s>")
    assert ends == {"chatml": im_end, "plain": eos, "llama3": None}


def test_the_token_that_ends_an_answer_need_not_be_special(with_bytes):
    tokenizer = tokenizers.Tokenizer.from_str(chat_tokenizer())
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=False)])
    own = BytePairTokenizer(tokenizer.to_str().encode())
    assert chat(own, "llama3").end == tokenizer.token_to_id("<|eot_id|>")
    model = sentencepiece.SentencePieceProcessor(model_proto=with_bytes.content)
    assert chat(with_bytes, "chatml").end == model.piece_to_id("<|im_end|>")
    assert chat(with_bytes, "llama3").end is None


def test_all_bytes_of_an_answer_s_characters_are_learned(with_bytes):
    ids, learned = chat(with_bytes, "plain").tokens(Example(said("日", "本é")))
    model = sentencepiece.SentencePieceProcessor(model_proto=with_bytes.content)
    pieces = [model.id_to_piece(id) for id in ids[learned].tolist()]
    expected = [f"<0x{byte:02X}>" for byte in "本é".encode()]
    assert pieces == [*expected, "</s>"]


def test_the_longest_special_token_is_found():
    tokenizer = tokenizers.Tokenizer.from_str(chat_tokenizer())
    names = ["<a", "<ab>", "<a>", "b>"]
    tokenizer.add_special_tokens(names)
    own = BytePairTokenizer(tokenizer.to_str().encode())
    template = ChatTemplate(
        "own", "{% for m in messages %}<ab><a>{{ m.content }}b>{% endfor %}"
    )
    ids, _ = Chat(template, ChatEncoder(own)).tokens(Example(said("<ab", "<ab><a-")))
    found = [id for id in ids.tolist() if id >= tokenizer.token_to_id("<a")]
    ab, a, b = (tokenizer.token_to_id(x) for x in ("<ab>", "<a>", "b>"))
    assert found == [ab, a, b] * 2


def test_markers_that_are_no_tokens_are_found(byte_pair, sentence_piece):
    source = named_template("llama3").source + "<|im_start|>"
    missing = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert ChatEncoder(byte_pair).unknown(source) == missing
    assert ChatEncoder(sentence_piece).unknown(source) == [*missing, "<|im_start|>"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [("a\ufdd0", r"noncharacter U\+FDD0"), ("\ud800", "half a surrogate pair")],
)
def test_text_that_cannot_be_encoded(byte_pair, content, problem):
    with pytest.raises(ValueError, match=problem):
        chat(byte_pair, "plain").tokens(Example(said("Hi", content)))
