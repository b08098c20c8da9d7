"""Paths on this machine, and URLs of buckets that act as paths."""

import os
from pathlib import Path
from typing import Annotated, Any

import fsspec
import tyro
from etils import epath
from upath import UPath

AnyPath = Path | UPath
"""A path on this machine, or the path of a URL in a store."""


def to_path(name: str | AnyPath) -> AnyPath:
    """The path that a string names: a URL is gs://, s3:// or what else fsspec knows.

    Raises:
      ValueError: there is no such kind of URL, or a package that it needs is missing.
    """
    if not isinstance(name, str):
        return name
    scheme, is_url, _ = name.partition("://")
    if not is_url:
        return Path(name).expanduser()
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(
            f"{name}: {error}; pip install 'lowrank-optax[cloud]' for gs:// and s3://"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name}: no store is named {scheme}://; give a path, gs:// or s3://"
        ) from error
    # Others, such as orbax, write there too: a cached listing may be old.
    return UPath(name, use_listings_cache=False)


def run_folder(name: str) -> AnyPath:
    """The folder of a run; ValueError if it cannot hold checkpoints, or is none."""
    if not name.strip():
        raise ValueError("an empty name is no folder; '.' is the one that you are in")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name!a} is not in the encoding that the environment names; set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from error
    scheme, is_url, _ = name.partition("://")
    if is_url and scheme != "gs":
        raise ValueError(
            f"{name}: orbax saves checkpoints in a folder or in gs://; give one, or "
            "mount the bucket"
        )
    return to_path(name) if is_url else Path(name)


def for_orbax(folder: AnyPath) -> epath.Path:
    """The absolute path that orbax asks for."""
    return epath.Path(str(folder) if isinstance(folder, UPath) else folder.absolute())


def move_folder(folder: AnyPath, to: AnyPath) -> None:
    """Replaces what is at `to`. A bucket's objects are copied one by one first."""
    if isinstance(folder, UPath):
        fs: Any = folder.fs
        target = UPath(to)
        if target.exists():
            fs.rm(target.path, recursive=True)
        fs.copy(folder.path, target.path, recursive=True)
        for_orbax(folder).rmtree()  # through orbax's own listing of what is there
        return
    to.parent.mkdir(exist_ok=True)
    for_orbax(to).rmtree(missing_ok=True)
    os.replace(str(folder), str(to))


RunFolder = Annotated[
    AnyPath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: run_folder(args[0]),
        is_instance=lambda x: isinstance(x, Path | UPath),
        str_from_instance=lambda x: [str(x)],
    ),
]
"""The folder of a run, as a command line names it."""
