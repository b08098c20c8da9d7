"""Where files are: on this machine or, named by a URL, in a bucket or the like."""

import os
from pathlib import Path
from typing import Annotated, Any

import fsspec
import tyro
from etils import epath
from upath import UPath

Place = Path | UPath


def place(name: str | Place) -> Place:
    """A path, or for a URL (gs://, s3:// and what else fsspec knows) what acts as one.

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
    # Others write there too, orbax for one: what was listed once may be old.
    return UPath(name, use_listings_cache=False)


def run_folder(name: str) -> Place:
    """The place of a run; ValueError for one in which there can be no checkpoints."""
    scheme, is_url, _ = name.partition("://")
    if is_url and scheme != "gs":
        raise ValueError(
            f"{name}: orbax saves checkpoints in a folder or in gs://; give one, or "
            "mount the bucket"
        )
    return place(name) if is_url else Path(name)


def for_orbax(folder: Place) -> epath.Path:
    """The absolute path that orbax asks for."""
    return epath.Path(str(folder) if isinstance(folder, UPath) else folder.absolute())


def move_folder(folder: Place, to: Place) -> None:
    """What is at `to` is replaced. In a bucket object by object, first as copies."""
    if isinstance(folder, UPath):
        fs: Any = folder.fs
        target = UPath(to)
        if target.exists():
            fs.rm(target.path, recursive=True)
        fs.copy(folder.path, target.path, recursive=True)
        for_orbax(folder).rmtree()  # by what remembers for orbax what is there
        return
    to.parent.mkdir(exist_ok=True)
    for_orbax(to).rmtree(missing_ok=True)
    os.replace(str(folder), str(to))


RunFolder = Annotated[
    Place,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: run_folder(args[0]),
        is_instance=lambda x: isinstance(x, Path | UPath),
        str_from_instance=lambda x: [str(x)],
    ),
]
"""One that a command line gives."""
