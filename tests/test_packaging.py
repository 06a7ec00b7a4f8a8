"""What the README, the docs and our messages tell people to install is there, and comes from the clone."""

import importlib.metadata
import re

from helpers import ROOT

NAMED = re.compile(r"pip install [^\n`]*?\.\[([\w,-]+)\]|extras? `?\[([\w,-]+)\]|needs\([^()]*, \"([\w-]+)\"\)")
FOREIGN = re.compile(r"pip install (-\S+ )*['\"]?lm[_-]jax")  # whoever takes the name on an index would be installed
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "constraints.txt", ROOT / ".ci" / "run"] + [
    path
    for folder in ("docs", "lm_jax", "experiments", "tests", "tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".md", ".py", ".yaml") and path.name != "test_packaging.py"
]


def named_extras(text: str) -> set[str]:
    return {extra for found in NAMED.findall(text) for group in found for extra in group.split(",") if extra}


def test_every_extra_that_is_named_is_in_the_built_metadata():
    provided = set(importlib.metadata.metadata("lm_jax").get_all("Provides-Extra"))
    named = {extra: path for path in TEXTS for extra in named_extras(path.read_text())}
    assert {"test", "hf", "prep", "eval", "lm-eval", "s3"} <= named.keys()
    assert not {extra: str(path) for extra, path in named.items() if extra not in provided}
    assert not [extra for extra in provided if extra != extra.lower().replace("_", "-")]  # what pip 23 finds, too


def test_an_extra_that_is_not_there_would_be_seen():
    assert named_extras('`pip install -q -e \'.[hf,lm_eval]\'` or extra `[x]`; needs(what, "ray", "y")') == {
        "hf",
        "lm_eval",
        "x",
        "y",
    }


def test_nothing_says_to_install_this_project_from_an_index():
    assert not {str(path): found[0] for path in TEXTS if (found := FOREIGN.search(path.read_text()))}
    assert all(FOREIGN.search(f"pip install {name}") for name in ("'lm" + "_jax[hf]'", "-q lm" + "-jax"))


def test_what_ci_installs_is_what_the_readme_says():
    """One description of what the tests need: the extra `test`."""
    installed = [
        line for path in (ROOT / ".ci" / "run", ROOT / "README.md") for line in path.read_text().splitlines()
        if "pytest" in line or ("pip" in line and ".[" in line)
    ]  # fmt: skip
    assert {extra for line in installed for extra in re.findall(r"'\.\[([\w,-]+)\]'", line) if "test" in extra} == {
        "test"
    }
    assert not [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if ".[" in line and "'.[test]'" not in line
    ]
