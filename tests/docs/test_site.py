"""The pages of the site and README.md: what they name exists, and is said one way."""

import inspect
import pathlib
import re
import types

import pytest

import lowrank_optax as lro
from tests.helpers.repository import ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
NAMESPACES = (
    lro,
    lro.bases,
    lro.full_rank,
    lro.measuring,
    lro.recipes,
    lro.recovery,
    lro.stages,
    lro.steps,
    lro.training,
    lro.weights,
)


def public(module: types.ModuleType) -> list[str]:
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
    ]
    return getattr(module, "__all__", own)


def resolve(path: str) -> object:
    """The object that a dotted path names."""
    value: object = lro
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def test_every_public_name_has_a_page() -> None:
    text = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    documented = [resolve(path) for path in re.findall(r"^::: (\S+)$", text, re.M)]
    # docs/hooks.py writes a page for each method.
    documented += [method.make for method in lro.METHODS.values()]
    missing = [
        f"{module.__name__}.{name}"
        for module in NAMESPACES
        for name in public(module)
        if not inspect.ismodule(value := getattr(module, name))
        and not any(value is known for known in documented)
    ]
    assert not missing


def test_the_namespaces_are_all() -> None:
    assert {*NAMESPACES[1:]} == {x for x in vars(lro).values() if is_namespace(x)}


def is_namespace(value: object) -> bool:
    return inspect.ismodule(value) and value.__name__.rpartition(".")[2] in lro.__all__


def test_every_method_has_a_row_in_the_table_of_methods() -> None:
    text = (DOCS / "methods/index.md").read_text()
    assert {*re.findall(r"^\| \[`(\w+)", text, re.M)} == {*lro.METHODS}


RECOMMENDING = [README, DOCS / "index.md", *(DOCS / "choosing").glob("*.md")]


def test_pages_that_recommend_a_rate_name_the_one_of_the_table() -> None:
    calls = [
        ("fine-tun" in line or page.name == "fine_tuning.md", name, float(rate))
        for page in RECOMMENDING
        for line in page.read_text().splitlines()
        for name, rate in re.findall(r"\blro\.(?:recipes\.)?(\w+)\((\d[\d.e-]*)", line)
        if name in lro.METHODS
    ]
    assert len(calls) > 8
    assert len([c for c in calls if c[0]]) > 2
    for fine_tuning, name, rate in calls:
        row = lro.METHODS[name]
        assert rate == (row.fine_tuning_rate if fine_tuning else row.learning_rate)


def test_the_readme_takes_five_minutes() -> None:
    assert README.read_text().count("\n") <= 200


@pages
def test_links_lead_to_files(page: pathlib.Path) -> None:
    made = {DOCS / f"methods/{name}.md" for name in lro.METHODS}
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(page.read_text()))
    found = [page.parent / link for link in links if ":" not in link]
    missing = [p for p in found if not p.exists() and p.resolve() not in made]
    assert not missing


@pages
def test_no_sentence_has_more_than_35_words(page: pathlib.Path) -> None:
    long = [s for s in sentences(page.read_text()) if len(s.split()) > 35]
    assert not long


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def sentences(text: str) -> list[str]:
    """The sentences of a page's paragraphs and lists; no tables, no code."""
    text = re.sub(
        r"<!--.*?-->|^\|.*$|^:::.*$|^#.*$", "", without_code(text), flags=re.M
    )
    text = re.sub(r"\]\([^)]*\)", "]", text)
    blocks = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    words = (" ".join(block.split()) for block in blocks)
    return [s for block in words for s in re.split(r"(?<=[.!?:;])[*\"')]* ", block)]
