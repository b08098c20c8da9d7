"""The tensors of a folder with one safetensors file, or several and an index."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def safetensors() -> ModuleType:
    """The package, which this one needs for weights alone."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "published weights need the package safetensors; "
            "run pip install 'lowrank-optax[train]'"
        ) from error
    return safetensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; give the folder of a whole model"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); download or copy it again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download or copy it again")
    return found


def existing_folder(folder: str | Path) -> Path:
    """The folder; FileNotFoundError if there is none."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder; download the model first, for instance by "
            f"hf download NAME --local-dir {path}"
        )
    return path


class Tensors:
    """The tensors of a folder, by name; parts of them are read when they are needed.

    Raises:
      FileNotFoundError: the folder, its weights, or a file that the index names are not
        there.
      ValueError: a file is damaged, or does not hold what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = existing_folder(folder)
        with contextlib.ExitStack() as files:
            self._files = self._opened(files)
            self._close = files.pop_all()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    @property
    def names(self) -> list[str]:
        return [*self._files]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._part(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          ValueError: it is none of float32, bfloat16 and float16.
        """
        stored = self._part(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(
                f"{self.file(name)}: {name} is stored as {stored}; give weights in "
                f"{', '.join(DTYPES)} (quantized ones are not read)"
            )
        return np.dtype(jnp.dtype(DTYPES[stored]))

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, one slice for each axis."""
        return self._part(name)[part]

    def _part(self, name: str) -> Any:
        return self._files[name][1].get_slice(name)

    def _opened(self, files: contextlib.ExitStack) -> dict[str, tuple[Path, Any]]:
        """Each tensor's file, and its reader."""
        paths, listed = self._paths()
        found: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            reader = files.enter_context(_open(path))
            found |= dict.fromkeys(reader.keys(), (path, reader))
        for name in sorted(listed):
            if name not in found or found[name][0].name != listed[name]:
                raise ValueError(
                    f"{self._folder / listed[name]} has no tensor {name}, which "
                    f"{INDEX} says it holds; download or copy it again"
                )
        if listed and (extra := sorted(found.keys() - listed.keys())):
            raise ValueError(
                f"{found[extra[0]][0]} has the tensor {extra[0]}, which {INDEX} does "
                "not list; download or copy both again"
            )
        return found

    def _paths(self) -> tuple[list[Path], Mapping[str, str]]:
        """The files with tensors, and what the index says of them, if there is one."""
        one, index = self._folder / ONE, self._folder / INDEX
        if one.exists():
            return [one], {}
        if not index.exists():
            torch = sorted(self._folder.glob("pytorch_model*.bin*"))
            raise FileNotFoundError(
                f"{self._folder} has {torch[0].name} but no {ONE}; convert it: load "
                "it with transformers, then call save_pretrained"
                if torch
                else f"{self._folder} has neither {ONE} nor {INDEX}; give the folder "
                "of a whole model"
            )
        listed = read_json(index).get("weight_map")
        if not (
            isinstance(listed, dict)
            and listed
            and all(isinstance(x, str) and x == Path(x).name for x in listed.values())
        ):
            raise ValueError(
                f"{index}: weight_map does not give each tensor's file; download or "
                "copy it again"
            )
        paths = [self._folder / name for name in sorted(set(listed.values()))]
        if missing := [path for path in paths if not path.exists()]:
            raise FileNotFoundError(
                f"{missing[0]} is missing, which {INDEX} names; download or copy it"
            )
        return paths, listed


def _open(path: Path) -> Any:
    package = safetensors()
    try:
        return package.safe_open(path, framework="np")
    except package.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); download or copy it "
            "again"
        ) from error
