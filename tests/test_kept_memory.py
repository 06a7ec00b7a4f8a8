"""Training starts with a glibc that keeps memory, once, and keeps what it was told."""

import os
import subprocess
import sys

import pytest
from helpers import LIMIT, ROOT

from lm_jax import cli

SCRIPT = """
import os, sys
from lm_jax import cli
cli.with_kept_memory()
print(os.getpid(), os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", cli.KEPT_MEMORY),
        ("glibc.malloc.check=0", f"glibc.malloc.check=0:{cli.KEPT_MEMORY}"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_the_process_starts_once_more_as_itself(before, expected):
    environment = os.environ | {"GLIBC_TUNABLES": before, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", SCRIPT, "--flag", "a b"]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=LIMIT)
    assert out.split() == [str(process.pid), expected, "--flag", "a", "b"]
