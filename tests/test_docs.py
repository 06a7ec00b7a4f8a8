"""The pages in docs/ name settings that there are, and files that there are."""

import re

import pytest
from helpers import ROOT

from lm_jax.config import SECTIONS, leaves

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_HISTORY = {"notebook.md"}  # what was tried keeps the names that it had


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OF_HISTORY], ids=lambda path: path.name)
def test_every_setting_that_is_named_is_one(page):
    named = {*re.findall(rf"\bconfig\.((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)", page.read_text())}
    assert named <= {*leaves()}


def test_every_setting_of_ours_beside_theirs_is_one():
    table = (ROOT / "docs" / "coming_from.md").read_text().split("## The commands")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+\.\w+)`", row)
    ]
    assert len(named) > 40 and {*named} <= {*leaves()}


def test_what_is_written_by_hand_has_about_as_many_lines_as_its_page_says():
    rows = re.findall(r"^\| (`lm_jax/[^|]*) \| (\d+) \|", (ROOT / "docs" / "by_hand.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for files, told in rows:
        found = sum((ROOT / file).read_text().count("\n") for file in re.findall(r"`([^`]+)`", files))
        assert abs(found - int(told)) <= 0.1 * found, f"{files}: {found} lines"
