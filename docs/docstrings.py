"""Makes of the library's docstrings what the site's parser reads, with links."""

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

import lowrank_optax as lro

DOCS = Path(__file__).parent
GROUP = re.compile(r"^( +)(\*{0,2}\w+(?:, \w+)+): (.*)$", re.M)
NAMESPACES = [lro, *(x for x in vars(lro).values() if inspect.ismodule(x))]
# The places of the public functions and classes, by their names.
PLACES = {
    name: f"{value.__module__}.{name}"
    for module in reversed(NAMESPACES)
    for name, value in vars(module).items()
    if name in getattr(module, "__all__", ()) and hasattr(value, "__qualname__")
}


class Docstrings(griffe.Extension):
    """Names one argument a line, and lets examples be code and names be links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object that griffe has loaded."""
        if obj.docstring is None:
            return
        head, args, tail = _around_args(obj.docstring.value)
        args = GROUP.sub(_one_each, args)
        tail = re.sub(r"^Example:$", "Examples:", tail, flags=re.M)
        obj.docstring.value = _linked(head + args + tail, obj.name)


def _around_args(text: str) -> tuple[str, str, str]:
    """The text before the section of arguments, the section, and what follows it."""
    found = re.search(r"^(Args|Attributes):\n(?: .*\n|\n)*", text + "\n", re.M)
    if found is None:
        return "", "", text
    return text[: found.start()], text[found.start() : found.end()], text[found.end() :]


def _one_each(group: re.Match[str]) -> str:
    indent, names, said = group.groups()
    return "\n".join(f"{indent}{name}: {said}" for name in names.split(", "))


def _linked(text: str, own: str) -> str:
    """Links public names to their entries, and pages of docs/ to these."""

    def name(found: re.Match[str]) -> str:
        place = PLACES.get(found[2]) if found[2] != own else None
        return f"[{found[0]}][{place}]" if place else found[0]

    def page(found: re.Match[str]) -> str:
        path = found[1]
        title = (DOCS / f"{path}.md").read_text().partition("\n")[0]
        return f"[{title.removeprefix('# ')}](../{path}.md)"

    text = re.sub(r"`((?:lro\.)?(\w+))`", name, text)
    return re.sub(r"\bdocs/([\w/]+)\.md", page, text)
