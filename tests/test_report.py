"""Runs as one page: all that it shows is inside, and is what the runs' own files say."""

import html
import re
import shutil
from xml.etree import ElementTree

import pytest
from etils import epath

from lm_jax import metrics, metrics_file
from lm_jax.errors import UserError
from lm_jax.files import sealed, unsealed
from lm_jax.trust import report


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """A copy of the run with another rate in its config, another last loss, and a sample that looks like HTML."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    shutil.copytree(finished, folder)
    kept = unsealed((folder / "config.json").read_bytes(), 0)
    assert kept["config"]["optimizer.learning_rate"] == 0.0015
    kept["config"]["optimizer.learning_rate"] = 0.5
    (folder / "config.json").write_bytes(sealed(kept))
    writer = metrics.Writer(epath.Path(folder), 2)
    writer.scalars(2, {"train/loss": 1.25})
    writer.text(2, "sample", "    <script>alert(1)</script>\n    & more")
    writer.close()
    return folder


def test_the_page_of_a_run_shows_what_its_files_say(finished):
    page = report.report(report.read([str(finished)]), price=2.0)
    last = metrics_file.series(metrics_file.read(epath.Path(finished)), "final/bits_per_byte")[-1][1]
    assert f"{last:,.5g}" in page and "device-hours of steps" in page and "<td>cost</td>" in page
    (kept,) = re.findall(r"^.*goodput \d+\.\d%.*$", (finished / "log.txt").read_text(), re.MULTILINE)
    assert html.escape(kept.split(" ", 2)[2]) in page
    steps = [step for step, _ in report.samples(epath.Path(finished))]
    assert len(steps) >= 2 and all(f"<h4>step {step:,}</h4>" in page for step in steps)
    (picture,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(ElementTree.fromstring(picture).findall(".//{http://www.w3.org/2000/svg}path")) > 20
    assert not re.findall(r"""(?:src|href)=["'](?!#)|url\((?!#)|@import|<script""", page), "nothing is fetched or run"


def test_two_runs_stand_side_by_side_and_texts_are_only_text(finished, other):
    page = report.report(report.read([str(finished), str(other)]))
    rows = dict(re.findall(r"<tr><td>(optimizer\.\w+)</td>(.*?)</tr>", page))
    assert rows == {"optimizer.learning_rate": "<td>0.0015</td><td>0.5</td>"}
    assert '<td class="n">1.25</td>' in page
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;\n&amp; more" in page


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"no metrics in {tmp_path}: name the folder that holds metrics.jsonl"):
        report.read([str(tmp_path)])
