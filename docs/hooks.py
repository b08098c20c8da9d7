"""Builds one page for each method: its settings, its row of every table, its docstring.

Nothing on these pages is written twice. Settings come from `lro.METHODS`, the parts of
a method from docs/methods/index.md, and what was measured from docs/results.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import lowrank_optax as lro

DOCS = Path(__file__).parent
FIRST_NAME = re.compile(r"^\|\W*`(\w+)")
PAGE = """# {name}

{settings}

{parts}

::: {path}

{measured}
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages to the section of the methods."""
    (section,) = (part["Methods"] for part in config.nav or [] if "Methods" in part)
    section += [{name: f"methods/{name}.md"} for name in lro.METHODS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Writes the pages, into the build alone."""
    for name, method in lro.METHODS.items():
        uri = f"methods/{name}.md"
        if files.get_file_from_path(uri):
            raise PluginError(f"docs/{uri} is made by docs/hooks.py: remove the file")
        files.append(File.generated(config, uri, content=page(name, method)))
    return files


def page(name: str, method: Any) -> str:
    """The Markdown of a method's page."""
    namespace = "" if hasattr(lro, name) else "recipes."
    return PAGE.format(
        name=name,
        settings=settings(method),
        parts="\n\n".join(rows(DOCS / "methods/index.md", name)),
        path=f"lowrank_optax.{namespace}{name}",
        measured=measured(name),
    )


def settings(method: Any) -> str:
    """The recommended settings, in a sentence for each."""
    rate = f"Learning rate: {method.learning_rate:g}"
    rate += (
        ", the best of those tried, or the only one."
        if method.measured
        else ", not tuned on 39 M tokens. It is that of a related method, of the "
        "source, or of [runs on 9.8 M tokens](../results/losses_60m.md"
        "#added-last-on-98-m-tokens)."
    )
    said = [rate]
    if isinstance(method.rank, float):
        said.append(f"Rank: {method.rank:g} of the smaller side.")
    elif method.rank is not None:
        said.append(f"Rank: {method.rank}.")
    if method.refresh_every is not None:
        said.append(f"A new basis every {method.refresh_every} steps.")
    if method.fine_tuning_rate is not None:
        said.append(f"For fine-tuning, a learning rate of {method.fine_tuning_rate:g}.")
    return " ".join(said) + " ([how to choose](../choosing/rates.md))"


def measured(name: str) -> str:
    """The method's rows of the results, by page."""
    found = []
    for path in sorted((DOCS / "results").glob("*.md")):
        if tables := [*rows(path, name)]:
            link = f"[{title(path)}](../results/{path.name})"
            found.append(f"From {link}:\n\n" + "\n\n".join(tables))
    return "\n\n".join(["## Measured", *found]) if found else ""


def title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


def rows(path: Path, name: str) -> Iterator[str]:
    """The tables of a page, with those rows alone whose first name is the method's."""
    for table in re.findall(r"^(?:\|.*\|\n)+", path.read_text() + "\n", re.M):
        head, line, *body = table.splitlines()
        own = [row for row in body if re.findall(FIRST_NAME, row) == [name]]
        if own:
            yield "\n".join([head, line, *own])
