"""Tokens of a text that a chat template wrote.

What the template writes is encoded with special tokens, what the data says without:
a user who writes "<|im_end|>" must not end a turn. `guarded` marks special tokens in
the data before the template is rendered, so that they can be told apart in its text.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from train.data.answers import Rendered
from train.data.tokenizer import Tokenizer

_MARK = "\ufdd0"
_RESERVED = re.compile("[\ufdd0-\ufdd2]")  # noncharacters, of no meaning in a text


class Encoded(NamedTuple):
    """Tokens, and the characters of the text that each stands for.

    Attributes:
      ids: int32 (n,).
      starts, stops: int32 (n,), the first character, and the one after the last.
    """

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


class _Encoder(Protocol):
    specials: dict[str, int]
    added: set[int]
    begin: str
    end: str

    def has(self, token: str) -> bool: ...

    def encode(self, texts: Sequence[str]) -> list[Encoded]: ...


class ChatEncoder:
    """Encodes what chat templates write.

    Attributes:
      begin: the token that begins a document, "" for none.
      end: the token that ends one.
      added: ids of tokens that were added to those of texts: the special ones, which
        only a template writes, and others.
    """

    def __init__(self, tokenizer: Tokenizer):
        kinds = {".json": _BytePair, ".model": _SentencePiece}
        self._encoder: _Encoder = kinds[tokenizer.suffix](tokenizer)
        self.begin, self.end = self._encoder.begin, self._encoder.end
        self.added = self._encoder.added
        tokens = _longest_of(self._encoder.specials)
        self._token = re.compile(tokens)
        self._maybe_marked = re.compile(f"{_MARK}{tokens}|{tokens}")

    def guarded(self, data: Any) -> Any:
        """Strings, lists and dicts of the data, special tokens in them marked as text.

        Raises:
          ValueError: a string has a noncharacter of U+FDD0 to U+FDD2, or half of a
            surrogate pair.
        """
        if isinstance(data, dict):
            return {self.guarded(x): self.guarded(y) for x, y in data.items()}
        if isinstance(data, list):
            return [self.guarded(value) for value in data]
        if not isinstance(data, str):
            return data
        if found := _RESERVED.search(data):
            raise ValueError(
                f"it has the noncharacter U+{ord(found[0]):04X}, with which the "
                "trainer marks text: take it out"
            )
        try:
            data.encode()
        except UnicodeEncodeError as error:
            raise ValueError("half a surrogate pair: mend the \\u escapes") from error
        return self._token.sub(lambda match: _MARK + match[0], data)

    def encode(
        self, rendered: Iterable[Rendered]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of texts rendered from `guarded` data, and which are of an answer.

        A token is of an answer if any of its characters is. Several texts are encoded
        on all cores.

        Returns:
          Of each text int32 (n,) and bool (n,).
        """
        turned = [self._turned_whole(text) for text in rendered]
        encoded = self._encoder.encode([text for text, _ in turned])
        found = []
        for (_, spans), (ids, starts, stops) in zip(turned, encoded, strict=True):
            answers = np.zeros(len(ids), bool)
            for start, stop in spans:
                answers |= (starts < stop) & (stops > start)
            found.append((ids, answers))
        return found

    def unknown(self, template: str) -> list[str]:
        """Names like <|im_end|> in a template that are no token of the tokenizer."""
        names = dict.fromkeys(re.findall(r"<\|[\w]+\|>", template))
        return [name for name in names if not self._encoder.has(name)]

    def _turned_whole(self, rendered: Rendered) -> Rendered:
        """`_turned`, with where the answers then are."""
        text, spans, at = "", [], 0
        for start, stop in rendered.answers:
            text += self._turned(rendered.text[at:start])
            begin = len(text)
            text += self._turned(rendered.text[start:stop])
            spans.append((begin, len(text)))
            at = stop
        return Rendered(text + self._turned(rendered.text[at:]), spans)

    def _turned(self, text: str) -> str:
        """Marks the template's special tokens instead of the data's."""

        def turn(match: re.Match[str]) -> str:
            token = match[0]
            return token[1:] if token.startswith(_MARK) else _MARK + token

        return self._maybe_marked.sub(turn, text)


def _longest_of(words: Iterable[str]) -> str:
    """A pattern of the longest word that is there; it reads each character once.

    Alternatives would be tried one after the other, and some tokenizers have thousands.
    """
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    may_end = rests.pop("", None) is not None
    branches = [re.escape(x) + _longest_of(own) for x, own in rests.items()]
    if not branches:
        return "" if may_end else "(?!)"
    return f"(?:{'|'.join(branches)})" + ("?" if may_end else "")


class _BytePair:
    """Marked special tokens are further tokens, with the ids of the special ones."""

    def __init__(self, tokenizer: Tokenizer):
        own = tokenizers.Tokenizer.from_buffer(tokenizer.content)
        own.no_truncation()
        own.no_padding()
        begin = own.encode("").ids[:1]
        first = [id for id in begin if id != tokenizer.eos_id]
        self.begin = own.decode(first, skip_special_tokens=False)
        self.end = own.decode([tokenizer.eos_id], skip_special_tokens=False)
        own.encode_special_tokens = True  # special tokens without a mark are text
        own.post_processor = None  # which would trim offsets
        added = own.get_added_tokens_decoder()
        special = {id: token for id, token in added.items() if token.special}
        self.specials = {token.content: id for id, token in special.items()}
        self.added = {*added}
        own.add_tokens([_marked(token) for token in special.values()])
        self._vocabulary = own.get_vocab(with_added_tokens=True)
        self._ids = np.arange(max(self._vocabulary.values()) + 1, dtype=np.int32)
        for id, token in special.items():
            self._ids[self._vocabulary[_MARK + token.content]] = id
        self._tokenizer = own

    def has(self, token: str) -> bool:
        return token in self._vocabulary

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._encoded(encoding) for encoding in encodings]

    def _encoded(self, encoding: tokenizers.Encoding) -> Encoded:
        offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
        ids = self._ids[np.asarray(encoding.ids, np.int32)]
        return Encoded(ids, offsets[:, 0], offsets[:, 1])


def _marked(token: Any) -> tokenizers.AddedToken:
    """A special token's copy, which no text but a marked one has."""
    return tokenizers.AddedToken(
        _MARK + token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=False,
        special=False,
    )


class _SentencePiece:
    """Marked control symbols are put between texts, which are encoded by themselves."""

    def __init__(self, tokenizer: Tokenizer):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        self._model: Any = sentencepiece.SentencePieceProcessor(
            model_proto=tokenizer.content
        )
        count = self._model.vocab_size()
        ids = [id for id in range(count) if self._model.is_control(id)]
        self.specials = {self._model.id_to_piece(id): id for id in ids}
        kind: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
        own = kind.SentencePiece.USER_DEFINED
        pieces = kind.FromString(tokenizer.content).pieces
        defined = (id for id, piece in enumerate(pieces) if piece.type == own)
        self.added = {*ids, *defined}
        begin = self._model.bos_id()
        self.begin = self._model.id_to_piece(begin) if begin >= 0 else ""
        self.end = self._model.id_to_piece(tokenizer.eos_id)
        self._marked = re.compile(f"({_MARK}{_longest_of(self.specials)})")

    def has(self, token: str) -> bool:
        id = self._model.piece_to_id(token)
        return id != self._model.unk_id()

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> Encoded:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for i, part in enumerate(self._marked.split(text)):
            if i % 2:
                ids.append(self.specials[part.removeprefix(_MARK)])
                offsets.append((at, at + len(part)))
            elif part:
                found = self._model.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                offsets += [(at + start, at + stop) for start, stop in found["offsets"]]
            at += len(part)
        spans = np.asarray(offsets, np.int32).reshape(-1, 2)
        starts, stops = spans[:, 0], spans[:, 1]
        # Of the bytes of a character, only the last has its width.
        return Encoded(np.asarray(ids, np.int32), starts, np.maximum(stops, starts + 1))
