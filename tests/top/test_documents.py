"""The documents hold together: no link leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for folder in (".", "docs", "docs/*", "benchmarks/results", "patches", "zero_configs")
               for p in ROOT.glob(f"{folder}/*.md"))  # fmt: skip


def anchors(text):
    """Those that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = (
        re.sub(r"[`*]|\]\(.*?\)|\[", "", h.strip().lower()) for h in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    )
    return {re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in headings}


def broken_links(page):
    """Relative links of a page whose file, or whose anchor in it, is not there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and (not target.exists() or anchor and anchor not in anchors(target.read_text())):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    assert not list(broken_links(page))


def test_control_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `b` [c](d)\n```\n# No\n```\n")
    (tmp_path / "page.md").write_text(
        "[1](other.md#a-b-c) [2](https://x.y/z#q) [3](other.md#no) [4](none.md) [5](#x)\n"
    )
    assert list(broken_links(tmp_path / "page.md")) == ["other.md#no", "none.md", "#x"]


def test_the_readme_begins_with_what_has_not_run():
    """What `make gpu` would have measured is said to be open for as long as it is."""
    first = " ".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:10])
    measured = list((ROOT / "benchmarks/results/gpu").glob("*.json"))
    assert ("a GPU" in first.partition("**Not run yet**:")[2].partition(".")[0]) == (not measured)


def test_tables_of_the_readme_have_no_gap():
    """A line that is empty, or no row, ends a table on GitHub."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for head in re.finditer(r"^\|[-| ]+\|$", text, re.MULTILINE):
        before, after = text[: head.start()].splitlines()[-1], text[head.end() + 1 :].split("\n\n")[0].splitlines()
        columns = head[0].count("|")
        assert before.count("|") == columns and all(row.count("|") == columns for row in after if row), before
    flags = set(re.findall(r"`--(hacl_\w+)`", text))
    from hacl_llava.config import hacl_argument_fields

    assert {name for name, *_ in hacl_argument_fields(True)} - {"use_hacl"} <= flags
