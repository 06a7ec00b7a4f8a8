"""Every file of a run and of its cache, damaged in every way: found and named, or without any effect; never silent."""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import tarfile

import jax
import numpy as np
import pytest
from helpers import ROOT

from lm_jax import checkpoint, compile_cache, evaluate, files, load_model, main, metrics, metrics_file, run_folder
from lm_jax.config import Mesh
from lm_jax.data import best_fit, corpus_verification, shards
from lm_jax.errors import UserError
from lm_jax.generate import command
from lm_jax.mesh import make_mesh

SMALL = dict(
    model__model_dim=16, model__num_layers=1, model__num_heads=2, model__num_kv_heads=2, model__head_dim=8, model__mlp_dim=32,
    data__sequence_length=32, data__global_batch_size=8, data__packing="best_fit", data__tokenizer="sentencepiece:512",
    train__microbatch_rows=8, checkpoint__every=2, checkpoint__keep_last=3, evaluate__every=2, evaluate__prompt="",
    optimizer__decay_over=6, optimizer__name="sgd", model__dropout=0.1, mesh__data=1,
)  # fmt: skip
# What nobody reads again: a picture of the metrics, and words for people.
FOR_PEOPLE = ("tensorboard/", "log.txt", "lock", "results/test.md")


def said_and_code(door, arguments: list[str]) -> tuple[int, str]:
    """A command in this process: its exit code, and all that it said. What is no mistake of a user's goes up."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = door(arguments)
        except UserError as error:
            print(error)
            code = 2
    return code, out.getvalue()


def train(place: pathlib.Path, num_steps: int = 6) -> tuple[int, str]:
    given = dict(SMALL, data__sources=os.readlink(place / "text"), train__num_steps=num_steps)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    line = ["--config", f"{ROOT}/experiments/quickstart.py:smoke", "--workdir", str(place / "run"), *flags]
    return said_and_code(main.main, line)


def write(place: pathlib.Path, prompt: str = "the ") -> tuple[int, str]:
    arguments = ["--model", str(place / "run"), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "8"]
    return said_and_code(command.main, arguments)


def arrays(place: pathlib.Path) -> list[np.ndarray]:
    found = load_model.locate(str(place / "run"))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        return [np.asarray(x) for x in jax.tree.leaves(load_model.load_parameters(found)[1])]


def numbers(place: pathlib.Path) -> list[dict]:
    """The metrics, without what depends on the clock, and without the last evaluation of the first four steps alone."""
    left = lambda line, name: name.startswith("perf/") or (name.startswith("final/") and line["step"] == 4)
    lines = [{name: x for name, x in line.items() if not left(line, name)} for line in metrics_file.read(place / "run")]
    return [line for line in lines if len(line) > 1]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> pathlib.Path:
    """Four steps of a run on text of its own, with a cache of its own: <place>/{text,run,cache}. Never to be changed."""
    place, text = tmp_path_factory.mktemp("begun") / "place", tmp_path_factory.mktemp("text")
    for path in (pathlib.Path(os.__file__).parent / "json").glob("*.py"):
        (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
    for number in range(60):
        (text / f"{number}.txt").write_text(f"{number} is a number, and {number + 1} follows it.\n" * 9)
    place.mkdir()
    (place / "text").symlink_to(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_JAX_CACHE", str(place / "cache"))
        patch.chdir(place)
        code, said = train(place, 4)
        assert code == 0, said
        code, said = said_and_code(evaluate.main, ["--model", str(place / "run"), "--split", "validation"])
        assert code == 0, said
    return place


@contextlib.contextmanager
def copied(begun: pathlib.Path, place: pathlib.Path):
    """A copy of the run and of its cache to go on with; only the text is the same."""
    shutil.copytree(begun, place, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_JAX_CACHE", str(place / "cache"))
        patch.chdir(place)
        yield place
    shutil.rmtree(place)


class Undisturbed:
    """What the run does to which nothing happened: it goes on to its sixth step, and writes a text before that."""

    def __init__(self, begun: pathlib.Path, tmp_path: pathlib.Path):
        with copied(begun, tmp_path / "place") as place:
            self.text = write(place)[1]
            code, self.said = train(place)
            assert code == 0, self.said
            self.arrays, self.numbers = arrays(place), numbers(place)

    def told(self, place: pathlib.Path) -> str:
        """Of a damaged copy: "silent" or a traceback is the fault, all else is well."""
        code, text = write(place)
        if code not in (0, 2) or (code == 0 and text != self.text and "is broken" not in text):
            return f"generate: {code}, {text!r}"
        code, said = train(place)
        if code == 2:
            return ""
        same = code == 0 and all(map(np.array_equal, arrays(place), self.arrays))
        if not same:
            return f"main: {code}, {said}"
        lost = numbers(place) != self.numbers
        return f"metrics altered and nothing said: {said}" if lost and metrics_file.FILE not in said else ""


@pytest.fixture(scope="module")
def undisturbed(begun, tmp_path_factory) -> Undisturbed:
    return Undisturbed(begun, tmp_path_factory.mktemp("undisturbed"))


def damaged(path: pathlib.Path, how: str, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "flipped" and raw:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif how == "cut" and raw:
        raw = raw[: chance.randrange(len(raw))]
    elif how == "zeros" and raw:
        start = chance.randrange(len(raw))
        raw[start : start + 64] = bytes(len(raw[start : start + 64]))
    elif how == "digit":  # what a text says, changed and still a text
        digits = [i for i, byte in enumerate(raw) if 48 <= byte < 57]
        if digits:
            raw[chance.choice(digits)] += 1
    else:
        raw += b"\0"
    stat = path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk changes bits: not the time


HOW = ("flipped", "flipped", "flipped", "digit", "cut", "zeros", "longer", "gone")


def files_in(place: pathlib.Path) -> list[str]:
    """What a run and its cache consist of, but for what is for people alone."""
    names = [
        str(path.relative_to(place))
        for part in ("run", "cache")
        for path in (place / part).rglob("*")
        if path.is_file()
    ]
    return sorted(name for name in names if not name.partition("/")[2].startswith(FOR_PEOPLE))


def campaign(begun, undisturbed, tmp_path, names: list[str], seed: int) -> list[str]:
    """One damage each to the files of these names; what went wrong."""
    chance, wrong = random.Random(seed), []
    for number, name in enumerate(names):
        how = chance.choice(HOW)
        with copied(begun, tmp_path / f"{number}") as place:
            path = place / name
            damaged(path, how, chance)
            if problem := undisturbed.told(place):
                wrong.append(f"{name} {how}: {problem}")
                print(wrong[-1], flush=True)
    return wrong


def test_one_file_of_each_kind_damaged_is_never_silent(begun, undisturbed, tmp_path):
    """The files that no manifest had, and one of those that one has always had."""
    found = files_in(begun)
    kinds = "config.json tokenizer.model metrics.jsonl MANIFEST.json packing/ verified/ tokens.npy _METADATA".split()
    names = [next(name for name in found if kind in name) for kind in kinds]
    assert not (wrong := campaign(begun, undisturbed, tmp_path, names, seed=1)), "\n".join(wrong)


@pytest.mark.proof
@pytest.mark.parametrize("part", range(20))
def test_a_thousand_damages_to_any_file_are_never_silent(part, begun, undisturbed, tmp_path):
    """In parts of fifty. A process that never forgot its programs would run out of mappings before it had made all."""
    jax.clear_caches()
    chance, found = random.Random(part), files_in(begun)
    names = [chance.choice(found) for _ in range(50)]
    assert not (wrong := campaign(begun, undisturbed, tmp_path, names, seed=part)), "\n".join(wrong)


def unsealed_config(raw: bytes) -> bytes:
    return json.dumps({name: value for name, value in json.loads(raw).items() if name != files.SEAL}).encode()


ALTERED = {
    "another norm_epsilon": ("config.json", lambda raw: raw.replace(b'norm_epsilon": 1e-05', b'norm_epsilon": 1e-01')),
    "another rate": ("config.json", lambda raw: raw.replace(b'learning_rate": 0.00', b'learning_rate": 0.01')),
    "another tokenizer": ("tokenizer.model", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
    "no seal": ("config.json", unsealed_config),
    "an older format": ("config.json", lambda raw: raw.replace(b'"format": 2', b'"format": 1')),
}


@pytest.mark.parametrize("case", ALTERED)
def test_no_command_takes_a_run_whose_config_or_tokenizer_is_another(begun, tmp_path, case):
    name, alter = ALTERED[case]
    with copied(begun, tmp_path / "place") as place:
        raw = (place / "run" / name).read_bytes()
        assert alter(raw) != raw
        (place / "run" / name).write_bytes(alter(raw))
        code, said = write(place)
        assert code == 2 and name in said and "put it back" in said, said
        code, said = train(place)
        assert (code, name in said) == (2 if name == "config.json" else 0, True), (
            said
        )  # the corpus still has the tokenizer


def test_a_file_that_a_run_was_written_without_is_no_part_of_it(begun, tmp_path):
    with copied(begun, tmp_path / "place") as place:
        (place / "run" / "tokenizer.json").write_text("{}")
        code, said = write(place)
        assert code == 2 and "tokenizer.json is not of this run" in said


def test_a_step_of_another_run_is_refused(begun, tmp_path):
    with copied(begun, tmp_path / "place") as place:
        path = place / "run" / "checkpoints" / "4" / "MANIFEST.json"
        manifest = json.loads(path.read_bytes())
        del manifest["sha256"]
        path.write_bytes(files.sealed(manifest | {"run": "0" * 16}))
        assert "is of another run" in write(place)[1]
        assert write(place)[0] == 0  # the step before is whole


DAMAGED_LINES = {
    "bytes": b"\xff\xfe\x00 nothing\n",
    "half a line": b'{"step": 3, "train/lo\n',
    "a list": b"[1, 2]\n",
    "no step": b'{"train/loss": 3.0}\n',
    "a word for a number": b'{"step": 3, "train/loss": "low"}\n',
    "nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=name, marks=[] if name in ("bytes", "a word for a number") else pytest.mark.proof)
        for name, line in DAMAGED_LINES.items()
    ],
)
def test_a_damaged_line_of_the_metrics_costs_that_line_alone(begun, tmp_path, line):
    with copied(begun, tmp_path / "place") as place:
        path, said = place / "run" / "metrics.jsonl", []
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
        found = metrics_file.read(checkpoint.epath.Path(place / "run"), said.append)
        assert len(found) == len(lines) - 1 and "line 3 lost" in said[0]
        code, out = train(place)
        assert code == 0 and "line 3 lost" in out and len(numbers(place)) > len(lines)
        assert "lost" not in train(place)[1]


def test_lines_that_are_gone_are_said(begun, tmp_path):
    with copied(begun, tmp_path / "place") as place:
        path, said = place / "run" / "metrics.jsonl", []
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
        metrics_file.read(checkpoint.epath.Path(place / "run"), said.append)
        assert "the last 2 of its lines are lost" in said[0]
        path.unlink()
        metrics.Writer(checkpoint.epath.Path(place / "run"), 4, said.append).close()
        assert "is missing" in said[1]


def test_a_value_that_is_not_finite_is_null_and_an_altered_one_is_said(tmp_path):
    writer, said = metrics.Writer(tmp_path, 0), []
    for step in (1, 2, 3):
        writer.scalars(step, {"a": 0.5 * step, "b": float("nan") if step == 2 else 1.0})
    writer.close()
    raw = (tmp_path / "metrics.jsonl").read_bytes()
    assert b"NaN" not in raw and json.loads(raw.splitlines()[1])["b"] is None
    assert metrics_file.series(metrics_file.read(tmp_path, said.append), "b") == [(1, 1.0), (3, 1.0)] and not said
    (tmp_path / "metrics.jsonl").write_bytes(raw.replace(b"1.5", b"1.6"))
    assert len(metrics_file.read(tmp_path, said.append)) == 3 and "line 3 altered" in said[0]


def test_a_packing_plan_that_is_not_as_written_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    size = np.arange(1, 30)
    rows = best_fit.plan_rows(size, 32, keep=True)
    (path,) = (tmp_path / "packing").iterdir()
    raw = path.read_bytes()
    for broken in (raw[:-8] + bytes(8), raw[:40], b"", b"PK\x03\x04" + raw, raw[:-1] + bytes([raw[-1] ^ 1])):
        path.write_bytes(broken)
        np.testing.assert_array_equal(best_fit.plan_rows(size, 32, keep=True), rows)
        assert path.read_bytes() == raw


@pytest.mark.parametrize("content", [b"5", b"[]", b"{}", b'{"start": 1}', b"\xff", b'{"start": "x", "files": 3}'])
def test_what_is_known_of_a_cache_may_be_lost(begun, tmp_path, content):
    with copied(begun, tmp_path / "place") as place:
        for path in (place / "cache" / "verified").iterdir():
            path.write_bytes(content)
        assert write(place)[0] == 0 and train(place, 4)[0] == 0


def test_large_shards_are_hashed_in_turn(begun, tmp_path, monkeypatch):
    """A bit that turned under an unchanged size and time is found: at once where files are small, else in a few starts."""
    with copied(begun, tmp_path / "place") as place:
        (folder,) = [path for path in (place / "cache" / "corpora").iterdir() if path.is_dir()]
        shards.read(str(folder), "mend")
        path = folder / "train-00000.tokens.npy"
        damaged(path, "flipped", random.Random(0))
        with pytest.raises(UserError, match="is changed since it was built"):
            shards.read(str(folder), "mend")
        monkeypatch.setattr(corpus_verification, "ALWAYS_HASHED", 0)
        monkeypatch.setattr(corpus_verification, "HASHED_IN_TURN", 1)
        with pytest.raises(UserError, match="is changed since it was built"):
            for _ in json.loads((folder / "manifest.json").read_bytes())["files"]:
                shards.read(str(folder), "mend")
        with pytest.raises(UserError, match="is changed since it was built"):
            corpus_verification.verify(str(folder), shards.read_manifest(str(folder), "mend"), "mend", whole=True)


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_default_prng_impl", "jax_default_matmul_precision"])
def test_what_decides_results_from_outside_is_kept(begun, tmp_path, monkeypatch, name):
    now = run_folder.outside()
    with copied(begun, tmp_path / "place") as place:
        monkeypatch.setattr(run_folder, "outside", lambda: now | {name: "another"})
        code, said = train(place)
        assert code == 2 and name in said and "use another --workdir" in said, said


def test_another_version_is_said_on_resume(begun, tmp_path, monkeypatch):
    now = run_folder.outside()
    with copied(begun, tmp_path / "place") as place:
        monkeypatch.setattr(run_folder, "outside", lambda: now | {"jax": "9.9.9"})
        code, said = train(place)
        assert code == 0 and "changed on resume: jax: " in said, said


def test_a_compiled_program_that_is_not_as_written_is_compiled_again(tmp_path, capsys):
    cache = compile_cache.CompileCache(str(tmp_path / "compiled"))
    assert cache.get("a") is None
    cache.put("a", b"a program" * 99)
    assert cache.get("a") == b"a program" * 99
    (path,) = (tmp_path / "compiled").iterdir()
    for how in ("flipped", "cut", "zeros", "longer", "gone"):
        damaged(path, how, random.Random(0))
        assert cache.get("a") is None
        cache.put("a", b"a program" * 99)
    (tmp_path / "file").touch()
    nowhere = compile_cache.CompileCache(str(tmp_path / "file" / "x"))
    nowhere.put("a", b"1")
    nowhere.put("b", b"1")
    assert capsys.readouterr().err.count("programs are not kept for the next run") == 1


def test_a_run_of_the_first_format_is_read_and_goes_on(tmp_path, monkeypatch):
    """What versions before the seal wrote: config.json and manifests without one."""
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    code, said = write(tmp_path, "ab")
    assert code == 0 and said == "abbbbbbbbb\n", said
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    flags = [f"--config.{path}={saved['config'][path]}" for path, value in saved["origins"].items()
             if value["from"] == "command line"]  # fmt: skip
    line = ["--config", f"{ROOT}/experiments/quickstart.py:smoke", "--workdir", str(tmp_path / "run"), *flags]
    code, said = said_and_code(main.main, [*line, "--config.mesh.data=1", "--config.train.num_steps=3"])
    if "holds a run on other data" not in said:  # the interpreter's own text depends on its patch level
        assert code == 0 and "resumed at step 2" in said, said
        assert json.loads((tmp_path / "run" / "config.json").read_text())["format"] == 2
