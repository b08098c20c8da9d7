"""Makes of the library's docstrings what the site's parser reads."""

import re
from typing import Any

import griffe

GROUP = re.compile(r"^( +)(\*{0,2}\w+(?:, \w+)+): (.*)$", re.M)


class Docstrings(griffe.Extension):
    """Names one argument a line, and lets examples be code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object that griffe has loaded."""
        if obj.docstring is None:
            return
        head, args, tail = _around_args(obj.docstring.value)
        args = GROUP.sub(_one_each, args)
        tail = re.sub(r"^Example:$", "Examples:", tail, flags=re.M)
        obj.docstring.value = head + args + tail


def _around_args(text: str) -> tuple[str, str, str]:
    """The text before the section of arguments, the section, and what follows it."""
    found = re.search(r"^(Args|Attributes):\n(?: .*\n|\n)*", text + "\n", re.M)
    if found is None:
        return "", "", text
    return text[: found.start()], text[found.start() : found.end()], text[found.end() :]


def _one_each(group: re.Match[str]) -> str:
    indent, names, said = group.groups()
    return "\n".join(f"{indent}{name}: {said}" for name in names.split(", "))
