"""Writes weights as Hugging Face transformers reads them, one layer at a time."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from models.config import LlamaConfig
from models.hugging_face.files import DTYPES, INDEX, ONE, safetensors
from models.hugging_face.names import EMBEDDING, HEAD, Leaf, leaves_of
from models.hugging_face.special_tokens import GENERATION, SpecialTokens
from models.hugging_face.write_config import config_fields
from models.params import Params, check_params


def save_pretrained(
    folder: str | Path,
    config: LlamaConfig,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    max_shard_size: int = 5_000_000_000,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model as a folder that Hugging Face transformers loads.

    The folder has config.json, generation_config.json and model.safetensors, or several
    files and model.safetensors.index.json. Its model type is llama, mistral (sliding
    window) or qwen2 (biases of queries, keys and values). A tied embedding is stored
    once. The folder appears when it is complete: until then it has another name beside
    its place, ending in `.tmp`.

    The host holds the tensors of one file at a time. Where several processes share the
    weights, all of them call this, and process 0 writes.

    Args:
      folder: a new one, or an empty one.
      config: the model's; `max_positions` must be set.
      params: as from `init_params`, float32, bfloat16 or float16.
      dtype: to store as; None for each weight's own.
      bos_token_id: the id that begins a text; None for none.
      eos_token_id: the id that ends it, or several.
      pad_token_id: the id that fills up a batch.
      max_shard_size: the most bytes of tensors in a file. A larger tensor has a file of
        its own.
      files: further files by name, a tokenizer.json for instance.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ImportError: the package safetensors is not installed.
      ValueError: `params` do not fit the config or have another dtype, no published
        model type computes what the config says, or `max_positions` is None.

    Example:
      >>> import tempfile
      >>> from models import init_params, pretrained_config
      >>> config = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, max_positions=32)
      >>> params = init_params(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(folder, config, params, dtype="bfloat16")
      ...     pretrained_config(folder) == config
      True
    """
    folder, package = Path(folder), safetensors()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give a new folder")
    check_params(config, params)
    pieces = _pieces(config, params, dtype)
    tokens = SpecialTokens(bos_token_id, eos_token_id, pad_token_id)
    fields = config_fields(config, _main_dtype(pieces), tokens)
    contents = {
        "config.json": _json(fields),
        GENERATION: _json({"_from_model_config": True, **tokens.fields()}),
    }
    shards = _shards(pieces, max_shard_size)
    if len(shards) > 1:
        contents[INDEX] = _json(_index(shards))
    for name in files or {}:
        if name in contents or name in shards or name != Path(name).name:
            raise ValueError(
                f"files: {name!r} is written here or is no file's name; leave it out"
            )
    with _appearing(folder) as part:
        for name, own in shards.items():
            held = {piece.name: piece.gathered(params) for piece in own}
            if part:
                package.numpy.save_file(held, part / name, {"format": "pt"})
                # Others may read it, as any other file; safetensors lets nobody.
                (part / name).chmod(0o666 & ~_umask())
            del held
        for name, content in {**contents, **(files or {})}.items():
            if part:
                (part / name).write_bytes(content)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


class _Piece(NamedTuple):
    """A tensor of the files: a leaf, or a layer of one."""

    name: str
    leaf: Leaf
    layer: int
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.leaf.tensor_shape)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def gathered(self, params: Params) -> np.ndarray:
        """The whole tensor on the host; all processes call it."""
        x = params
        for key in self.leaf.path.split("/"):
            x = x[key]
        _, leaf, layer, dtype = self
        x = _tensor(x, layer, dtype, leaf.stacked, leaf.transposed)
        if x.is_fully_addressable:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _tensor(
    x: jax.Array, layer: int, dtype: np.dtype, stacked: bool, transposed: bool
) -> jax.Array:
    x = x[layer] if stacked else x
    return (x.T if transposed else x).astype(dtype)


def _pieces(
    config: LlamaConfig, params: Params, dtype: DTypeLike | None
) -> list[_Piece]:
    """All tensors in the order of the model."""
    pieces = []
    leaves = leaves_of(config)
    for leaf, x in zip(leaves, jax.tree.leaves(params), strict=True):
        own = np.dtype(jnp.dtype(dtype or x.dtype))
        if own.name not in DTYPES.values():
            raise ValueError(
                f"{leaf.path} would be stored as {own.name}; give dtype= one of "
                f"{', '.join(DTYPES.values())}"
            )
        pieces += [_Piece(n, leaf, i, own) for i, n in enumerate(leaf.names)]
    order = {EMBEDDING: -1, "model.norm.weight": config.num_layers, HEAD: math.inf}
    return sorted(pieces, key=lambda p: order.get(p.name, p.layer))


def _main_dtype(pieces: list[_Piece]) -> str:
    """The dtype of most weights."""
    sizes: Counter[str] = Counter()
    for piece in pieces:
        sizes[piece.dtype.name] += piece.size
    return sizes.most_common(1)[0][0]


def _shards(pieces: list[_Piece], most: int) -> dict[str, list[_Piece]]:
    """The tensors of each file."""
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(p.bytes for p in shards[-1]) + piece.bytes > most:
            shards.append([])
        shards[-1].append(piece)
    if len(shards) == 1:
        return {ONE: pieces}
    count = len(shards)
    return {
        f"model-{i:05}-of-{count:05}.safetensors": own
        for i, own in enumerate(shards, start=1)
    }


def _index(shards: dict[str, list[_Piece]]) -> dict[str, Any]:
    pieces = [piece for own in shards.values() for piece in own]
    return {
        "metadata": {
            "total_parameters": sum(piece.size for piece in pieces),
            "total_size": sum(piece.bytes for piece in pieces),
        },
        "weight_map": {p.name: name for name, own in shards.items() for p in own},
    }


def _umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _appearing(folder: Path) -> Iterator[Path | None]:
    """A folder to write into, which takes its name if the block ends well.

    Its files are on the disk by then. None in all processes but one.
    """
    if jax.process_index():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        part.mkdir()
        yield part
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
