"""Reads published weights into the stacked layout, one leaf at a time."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from models.config import LlamaConfig
from models.hugging_face.files import Tensors
from models.hugging_face.names import EMBEDDING, HEAD, Leaf, leaves_of
from models.hugging_face.read_config import pretrained_config
from models.params import Params, init_params

# Buffers that old versions of transformers stored; they follow from the config.
BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
ROWS = 256  # that are transposed, or compared, at a time

Sharding = jax.sharding.Sharding
Shardings = Sharding | Params | Callable[[str, tuple[int, ...]], Sharding]


def load_pretrained(
    folder: str | Path,
    *,
    dtype: DTypeLike | None = "float32",
    sharding: Shardings | None = None,
    store: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Weights of a published model, in the layout of `init_params`.

    Reads model.safetensors, or the files that model.safetensors.index.json names, in
    float32, bfloat16 or float16. `pretrained_config(folder)` is the config to use them
    with. Kernels are transposed to (in, out), and the layers are stacked.

    The host holds one leaf at a time: of a model of 7 billion weights at most 5.8 GB in
    float32. With `sharding` it holds only this process's part of the leaf, and reads
    only that.

    Args:
      folder: with config.json and the weights.
      dtype: of the result; None for each tensor's own.
      sharding: where the weights go: one sharding for all of them, a tree of shardings
        like the parameters, or a function of a leaf's path, "layers/mlp/up/kernel",
        and its shape. By default they go to JAX's default device.
      store: of a leaf's path and the leaf on its devices, what takes its place before
        the next is read, such as the same in 8 bits.

    Raises:
      FileNotFoundError: the folder or one of its files is not there, or it has only
        PyTorch's own files.
      ImportError: the package safetensors is not installed.
      ValueError: `pretrained_config` refuses the config; a file is damaged; a tensor is
        missing, is not the model's, or has another shape or dtype. The message names
        the file and the tensor.

    Example:
      >>> import tempfile
      >>> from models import LlamaConfig, init_params, save_pretrained
      >>> config = LlamaConfig(64, 16, 24, num_heads=2, num_layers=2, max_positions=32)
      >>> params = init_params(config, jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(folder, config, params)
      ...     loaded = load_pretrained(folder, dtype="bfloat16")
      >>> loaded["layers"]["mlp"]["up"]["kernel"].shape
      (2, 16, 24)
    """
    config = pretrained_config(folder)
    leaves = leaves_of(config)
    like = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    places = _places(sharding, like, leaves)
    with Tensors(folder) as tensors:
        _check(config, tensors, leaves)
        if config.tie_embeddings and HEAD in tensors.names:
            _check_tied(tensors)
        loaded = []
        for leaf, place in zip(leaves, places, strict=True):
            x = _placed(tensors, leaf, _dtype(tensors, leaf, dtype), place)
            loaded.append(x if store is None else store(leaf.path, x))
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def check_pretrained(folder: str | Path) -> None:
    """Checks that `load_pretrained` can read a folder; reads the files' headers alone.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_pretrained`.
    """
    config = pretrained_config(folder)
    with Tensors(folder) as tensors:
        _check(config, tensors, leaves_of(config))


def _places(
    sharding: Shardings | None, like: Params, leaves: list[Leaf]
) -> list[Sharding | None]:
    """Each leaf's sharding."""
    if sharding is None:
        return [None] * len(leaves)
    if callable(sharding):
        return [sharding(leaf.path, leaf.shape) for leaf in leaves]
    return jax.tree.leaves(jax.tree.broadcast(sharding, like))


def _check(config: LlamaConfig, tensors: Tensors, leaves: list[Leaf]) -> None:
    """ValueError unless the tensors are those of the leaves."""
    found = set(tensors.names)
    for leaf in leaves:
        for name in leaf.names:
            if name not in found:
                raise ValueError(
                    f"the weights have no tensor {name} of shape {leaf.tensor_shape}, "
                    f"which config.json asks for; give a folder whose files belong "
                    "together"
                )
            if (shape := tensors.shape(name)) != leaf.tensor_shape:
                raise ValueError(
                    f"{tensors.file(name)}: {name} has shape {shape}, but config.json "
                    f"asks for {leaf.tensor_shape}; give a folder whose files belong "
                    "together"
                )
            tensors.dtype(name)
    known = {name for leaf in leaves for name in leaf.names}
    for name in sorted(found - known):
        tied = config.tie_embeddings and name == HEAD
        if not tied and not BUFFER.fullmatch(name):
            raise ValueError(
                f"{tensors.file(name)}: the tensor {name} of shape "
                f"{tensors.shape(name)} is none of the model of config.json; give a "
                "folder whose files belong together"
            )


def _check_tied(tensors: Tensors) -> None:
    """ValueError unless a head that is stored beside a tied embedding equals it."""
    rows, _ = shape = tensors.shape(EMBEDDING)
    same = tensors.shape(HEAD) == shape
    for start in range(0, rows, ROWS):
        part = (slice(start, min(start + ROWS, rows)), slice(None))
        same = same and (
            tensors.read(HEAD, part).tobytes()
            == tensors.read(EMBEDDING, part).tobytes()
        )
    if not same:
        raise ValueError(
            f"{tensors.file(HEAD)}: {HEAD} differs from {EMBEDDING}, but config.json "
            "says tie_word_embeddings=true; set it to false to use both"
        )


def _dtype(tensors: Tensors, leaf: Leaf, dtype: DTypeLike | None) -> np.dtype:
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    return np.dtype(jnp.result_type(*(tensors.dtype(name) for name in leaf.names)))


def _placed(
    tensors: Tensors, leaf: Leaf, dtype: np.dtype, place: Sharding | None
) -> jax.Array:
    """The leaf on its devices; a part that several of them hold is read once."""
    part = partial(_part, tensors, leaf, dtype)
    if place is None:
        return jax.device_put(part((slice(None),) * len(leaf.shape)))
    parts: dict[str, np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = part(index)
        return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, place, once)


def _part(
    tensors: Tensors, leaf: Leaf, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a leaf, as an array of its own."""
    spans = [slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    part = np.empty([s.stop - s.start for s in spans], dtype)
    layers, inner = (spans[0], spans[1:]) if leaf.stacked else (slice(0, 1), spans)
    rows = tuple(inner[::-1] if leaf.transposed else inner)
    for into, name in zip(
        part if leaf.stacked else part[None], leaf.names[layers], strict=True
    ):
        read = tensors.read(name, rows)
        into = into.T if leaf.transposed else into
        # In strips, which stay in the processor's cache while they are transposed.
        for start in range(0, len(read), ROWS):
            into[start : start + ROWS] = read[start : start + ROWS]
    return part
