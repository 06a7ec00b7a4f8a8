"""Every executor makes the same shards, from a bucket to a bucket, killed and gone on with."""

import contextlib
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest
from helpers import LIMIT, ROOT, free_port
from raw_text import files_of, needs_datatrove, raw_text, run, settings, story, write

from lm_jax.errors import UserError
from lm_jax.prepare import run as prepare


@pytest.fixture
def raw(tmp_path):
    return raw_text(tmp_path)


EVERYTHING = {"filters": ("gopher", "c4", "fineweb"), "scrub": True, "duplicates": "minhash"}


@needs_datatrove
@pytest.mark.proof
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_every_executor_makes_the_same_shards(raw, monkeypatch, executor):
    """A real Ray on this machine. Its processes import lm_jax anew, so it is the plan that carries the sizes of tasks."""
    if executor == "ray":
        pytest.importorskip("ray")
    place, _ = raw
    monkeypatch.setattr(prepare, "TASK_BYTES", 30_000)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 30_000)
    run(place, "raw", **EVERYTHING)
    other = settings(place, "raw", executor=executor, **EVERYTHING | {"workers": 2})
    told = prepare.run(prepare.dataclasses.replace(other, output=str(place / executor)), lambda line: None)
    assert files_of(place / executor) == files_of(place / "out") and told["out"]["documents"] > 50


@needs_datatrove
@pytest.mark.proof
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_a_mistake_comes_back_from_every_executor(raw, executor):
    place, _ = raw
    (place / "raw" / "one.jsonl").write_text('{"text": "good"}\n{"text": "half')
    with pytest.raises(UserError, match="one.jsonl:2: not JSON"):
        run(place, "raw", executor=executor, workers=2, scrub=True)


@pytest.mark.proof
def test_a_corpus_is_prepared_from_a_bucket_to_a_bucket(raw):
    """An emulator of a bucket on this machine, as in test_places."""
    emulator = os.path.join(os.path.dirname(sys.executable), "gcp-storage-emulator")
    if not os.path.exists(emulator):
        pytest.skip("needs gcp-storage-emulator and gcsfs")
    place, _ = raw
    url = f"http://127.0.0.1:{free_port()}"
    line = [
        emulator,
        "start",
        "--host=127.0.0.1",
        f"--port={url.rpartition(':')[2]}",
        "--in-memory",
        "--default-bucket=b",
    ]
    seen = {
        "STORAGE_EMULATOR_HOST": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "LM_JAX_CACHE": str(place / "cache"),
    }
    script = (
        "import pathlib, sys; from etils import epath; from lm_jax.prepare import run as prepare\n"
        "from_, to = sys.argv[1:]\n"
        "for path in pathlib.Path(from_).glob('**/*.jsonl'):\n"
        "    epath.Path(f'gs://b/raw/{path.name}').write_text(path.read_text())\n"
        "given = dict(sources=('gs://b/raw/*.jsonl',), output='gs://b/out', tokenizer='bytes', workers=1)\n"
        "told = [prepare.run(prepare.Settings(**given), print) for _ in range(2)]\n"
        "for path in epath.Path('gs://b/out').iterdir(): (epath.Path(to) / path.name).write_bytes(path.read_bytes())\n"
    )
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        (place / "copy").mkdir()
        line = [sys.executable, "-c", script, str(place / "raw"), str(place / "copy")]
        result = subprocess.run(line, env=os.environ | seen | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "gs://b/out is prepared already" in result.stdout
    finally:
        process.terminate()
        process.wait()
    (place / "raw" / "three.txt").unlink()
    run(place, "raw", validation_fraction=0.02, test_fraction=0.02)
    found, wanted = files_of(place / "copy"), files_of(place / "out")
    assert {name for name in wanted if found[name] != wanted[name]} == {"manifest.json"}  # which names the source


@needs_datatrove
@pytest.mark.proof
def test_killed_as_a_real_command_it_goes_on_and_leaves_no_orphan(raw):
    place, _ = raw
    write(place / "raw" / "more.jsonl", [story(seed, 30) for seed in range(1000, 3000)])
    run(place, "raw", scrub=True, duplicates="minhash", validation_fraction=0.02, test_fraction=0.02)
    arguments = ["--tokenizer=bytes", "--scrub", "--duplicates=minhash", "--workers=2"]
    line = [sys.executable, "tools/prepare_data.py", "--output", str(place / "b"), str(place / "raw"), *arguments]
    pick = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pick.uniform(3, 12))
        process.kill()
        process.wait()
    subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=LIMIT)
    assert files_of(place / "b") == files_of(place / "out")
    time.sleep(2)
    names = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [name for name in names if str(place / "b").encode() in name]


SBATCH = """#!/bin/sh
# A queue of one machine: runs the tasks of an array one after another, as Slurm would start them.
for last; do :; done
case $(grep -c launch_pickled $last) in 0) echo Submitted batch job 2; exit;; esac
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $last)
export SLURM_NODELIST=here SLURM_JOB_ID=1
for i in $(seq 0 $n); do SLURM_ARRAY_TASK_ID=$i bash $last > $last.log 2>&1 || cp $last.log "$LOGS"; done
echo Submitted batch job 1
"""


@needs_datatrove
@pytest.mark.proof
def test_slurm_jobs_make_the_same_shards(raw, tmp_path, monkeypatch):
    """Slurm itself is not here: `sbatch`, `srun` and `scontrol` are stand-ins, what they run is real."""
    place, _ = raw
    (tmp_path / "bin").mkdir()
    for name, script in (
        ("sbatch", SBATCH),
        ("srun", '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'),
        ("scontrol", "#!/bin/sh\necho here\n"),
    ):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LOGS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent))
    run(place, "raw", scrub=True)
    other = settings(place, "raw", scrub=True, executor="slurm", slurm_partition="any")
    prepare.run(prepare.dataclasses.replace(other, output=str(place / "slurm")), lambda line: None)
    assert files_of(place / "slurm") == files_of(place / "out")
