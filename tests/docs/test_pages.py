"""The Python examples of the pages under docs/ run, each page from top to bottom."""

import pathlib
import re

import pytest

from tests.helpers.repository import ROOT

DOCS = ROOT / "docs"
EXAMPLES = {
    page.relative_to(DOCS): "\n".join(blocks)
    for page in sorted(DOCS.rglob("*.md"))
    if (blocks := re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
}


@pytest.mark.parametrize("page", EXAMPLES, ids=str)
def test_a_page_runs(page: pathlib.Path) -> None:
    exec(compile(EXAMPLES[page], str(page), "exec"), {})
