"""Text as data sets publish it, in every format."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


import io
import sys
from collections.abc import Sequence
from typing import ClassVar

import sentencepiece
import tensorflow_datasets as tfds

from train.prepare import PrepareConfig, prepare

TEXTS = [f"document {i}: über naïve words\nand lines " * (i % 5 + 1) for i in range(60)]
FIELDS = ("text", "url", "content-type", "content-length", "timestamp")
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def lines_of(texts: list[str], field: str = "text") -> bytes:
    """As C4's: the text, and other fields."""
    records = [
        {field: x, "timestamp": "2019-04-25T12:57:54Z", "url": "-"} for x in texts
    ]
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def parquet_of(values: list, field: str = "text") -> bytes:
    table = pyarrow.table({"url": ["-"] * len(values), field: values})
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, out, row_group_size=7, compression="none")
    return out.getvalue().to_pybytes()


def write_tfds(
    folder: Path, texts: Sequence[str] = TEXTS, fields: Sequence[str] = FIELDS
) -> str:
    """Store a tiny data set in the place and form of the real c4/en."""

    class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "c4"  # In a package, TFDS would look for the source by TensorFlow.
        name = "c4"
        VERSION = tfds.core.Version("3.1.0")
        BUILDER_CONFIGS: ClassVar = [
            tfds.core.BuilderConfig(name="en", version="3.1.0")
        ]

        def _info(self):
            features = {field: tfds.features.Text() for field in fields}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(texts):
                yield i, dict.fromkeys(fields, "-") | {"text": text}

    C4(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return "tfds:c4/en"


def t5_like(folder: Path) -> Path:
    """SentencePiece with t5's special ids: pad 0, end 1, unknown 2, no begin."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder / "spiece.model"


def sources_of(folder: Path) -> list[str]:
    names = ("c4-train.*.json.gz", "chunk*/*.zst", "*.txt", "*.parquet")
    return [f"{folder}/{name}" for name in names]


def prepared(folder: Path, out: Path, sources: Sequence[str] = (), **options) -> dict:
    options = {"tokenizer": str(folder / "spiece.model"), "workers": 1} | options
    sources = tuple(sources or sources_of(folder))
    return prepare(PrepareConfig(sources, out=str(out), **options))
