"""What was consumed is counted once, from the data state, whatever batches a run took before: rows, tokens, lengths, schedule."""

import os
import pathlib
import random
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, tiny

from lm_jax import checkpoint, main, metrics_file, step_folders
from lm_jax.batch_ramp import DataState, Ramp, clocks, every, make_ramp, with_steps
from lm_jax.data import loader
from lm_jax.schedule import schedule

LENGTH, ROWS_PER_EPOCH = 64, 1000.0


def random_ramp(chance: random.Random) -> Ramp:
    size, stages, step, row = chance.choice([2, 4, 8]), [], 0, 0
    for k in range(1, chance.randint(2, 6)):
        stages.append((step, row, k * size))
        num = chance.randint(1, 6)
        step, row = step + num, row + num * k * size
    return Ramp(tuple(stages))


def test_a_ramp_goes_through_where_a_run_stands_and_is_the_same_from_every_later_step():
    chance = random.Random(0)
    for _ in range(500):
        step = row = 0
        for _ in range(4):
            own = random_ramp(chance)
            here = own.through(step, row)
            for _ in range(chance.randint(0, 20)):
                row, step = row + here.rows(step), step + 1
                assert here.cursor(step) == row and own.through(step, row) == here
                wanted = chance.randint(row, row + 50)
                after = here.step_at(wanted)
                assert here.cursor(after) >= wanted and (after == step or here.cursor(after - 1) < wanted)
        assert own.through(0, 0) == own


# What a run took before (steps, batch, ramp), session by session, and what it takes now.
RAMP = (4, "8k tokens")
BEFORE = {
    "from the start": [],
    "unchanged": [(30, 16, (0, 0))],
    "at twice the batch": [(30, 8, (0, 0))],
    "at half the batch": [(30, 32, (0, 0))],
    "at another batch, no multiple": [(30, 24, (0, 0))],
    "twice": [(13, 8, (0, 0)), (9, 32, (0, 0))],
    "in the ramp": [(7, 16, RAMP)],
    "from a ramp that is over": [(60, 32, RAMP)],
    "in the warm-up": [(3, 32, (0, 0))],
}
NOW = {"no ramp": (0, 0), "a ramp": RAMP, "a ramp of steps": (4, 20)}


def settings(batch: int, ramp, **more):
    return tiny(data__global_batch_size=batch, data__batch_ramp=ramp, train__microbatch_rows=4, **more)


def stand(before) -> DataState:
    """Where the sessions leave a run."""
    data = DataState(0, 0)
    for num_steps, batch, given in before:
        ramp = make_ramp(settings(batch, given)).through(data.step, data.cursor)
        data = DataState(data.step + num_steps, ramp.cursor(data.step + num_steps))
    return data


def consumed(data: DataState, ramp: Ramp, num_steps: int) -> dict[int, int]:
    """{step: rows consumed after it}, added up one by one from where the data stand."""
    found, row = {data.step: data.cursor}, data.cursor
    for step in range(data.step, num_steps):
        row += ramp.rows(step)
        found[step + 1] = row
    return found


@pytest.mark.parametrize("unit", ["tokens", "epochs"])
@pytest.mark.parametrize("now", NOW)
@pytest.mark.parametrize("before", BEFORE)
def test_lengths_are_what_is_left_of_them(before, now, unit):
    data = stand(BEFORE[before])
    text = lambda rows: f"{rows * LENGTH} tokens" if unit == "tokens" else f"{rows / ROWS_PER_EPOCH} epochs"
    whole, warmup, decayed, often = 3000.0, 300.0, 2800.0, 110.0
    config = settings(
        16, NOW[now], train__num_steps=text(3000), optimizer__warmup=text(300), optimizer__decay_over=text(2800),
        optimizer__schedule="linear", optimizer__decay_to=0.0, optimizer__learning_rate=1.0,
    )  # fmt: skip
    ramp = make_ramp(config).through(data.step, data.cursor)
    resolved, largest = with_steps(config, ramp, ROWS_PER_EPOCH), 16
    rows = consumed(data, ramp, resolved.train.num_steps)
    assert rows[resolved.train.num_steps] >= whole > rows[resolved.train.num_steps - 1]
    rate = np.asarray(schedule(resolved.optimizer, clocks(config, ramp))(jnp.arange(data.step, max(rows))))
    for step, found in zip(range(data.step, max(rows)), rate, strict=True):
        at = rows[step]
        rising, falling = at / warmup, (decayed - at) / (decayed - warmup)
        expected, slack = max(0.0, min(rising, falling)), 2 * largest / warmup
        if NOW[now] == (0, 0):  # else a step is not a fixed number of tokens: the shape between the ends is in steps
            assert abs(found - expected) <= slack, (step, at, found, expected)
        assert found == 0 or at < decayed
        assert (found < 1 - 1e-6) or at + largest >= warmup > 0
    due = every(text(110), config, ROWS_PER_EPOCH)
    steps = [step for step in rows if step > data.step and due.due(ramp, step)]
    crossings = [step for step in rows if step > data.step and rows[step] // often > rows[step - 1] // often]
    assert steps == crossings and len(steps) >= 12


@pytest.mark.parametrize("name", ["cosine", "constant", "linear", "inverse_square_root", "warmup_stable_decay"])
def test_the_rate_goes_on_where_it_was_when_the_batch_is_another(name):
    """A rate is that of what was consumed where lengths are in tokens, and that of the step where they are in steps."""
    given = dict(optimizer__schedule=name, optimizer__learning_rate=1.0)
    rows = dict(train__num_steps="4000 tokens", optimizer__warmup="800 tokens")
    data = DataState(20, 20 * 2)  # of 62.5 rows, at 2 a step
    for batch in (1, 2, 4, 8):
        config = tiny(data__global_batch_size=batch, train__microbatch_rows=1, **given, **rows)
        ramp = make_ramp(config).through(*data[:2])
        resolved = with_steps(config, ramp, 1.0)
        found = float(schedule(resolved.optimizer, clocks(config, ramp))(data.step))
        same = tiny(data__global_batch_size=2, train__microbatch_rows=1, **given, **rows)
        expected = float(schedule(with_steps(same, make_ramp(same), 1.0).optimizer)(data.step))
        assert abs(found - expected) < 0.15, (batch, found, expected)
        in_steps = tiny(data__global_batch_size=batch, train__microbatch_rows=1, train__num_steps=60, **given)
        moved = make_ramp(in_steps).through(*data[:2])
        of_steps = with_steps(in_steps, moved, 1.0)
        assert clocks(in_steps, moved)[:2] == (0, 0) and of_steps.train.num_steps == of_steps.optimizer.decay_over == 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder of text: 100.5 rows of 64 bytes to train on."""
    place = tmp_path_factory.mktemp("text")
    text = pathlib.Path(os.__file__).read_text()
    for k in range(3):
        (place / f"{k}.txt").write_text(text[k * 2143 : (k + 1) * 2143])  # and a document's border each
    return place


@pytest.fixture
def fed(monkeypatch) -> list[int]:
    """The rows that went into a step, as they went."""
    rows, plain = [], loader.batches

    def listed(*given):
        for batch in plain(*given):
            rows.extend(np.asarray(batch["row"]).tolist())
            yield batch

    monkeypatch.setattr(loader, "batches", listed)
    return rows


def flags(folder, workdir, **changes) -> list[str]:
    given = dict(
        data__sources=folder, data__tokenizer="bytes", data__validation_fraction=0.0, data__test_fraction=0.0,
        train__microbatch_rows=2, evaluate__prompt="", log__every=1, mesh__data=1, model__num_layers=1,
        data__global_batch_size=8, checkpoint__keep_last=50, optimizer__schedule="linear", optimizer__decay_to=0.0,
        optimizer__learning_rate=1e-3,
    ) | changes  # fmt: skip
    line = ["--config", "experiments/quickstart.py:smoke", "--workdir", str(workdir)]
    return line + [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]


@pytest.fixture
def not_finite(monkeypatch):
    """Rows 72 to 87 have no loss that is finite."""
    block = loader.Stream.block

    def poisoned(stream, first, num):
        found = block(stream, first, num)
        bad = (found["row"] >= 72) & (found["row"] < 88)
        return found | {"loss_mask": np.where(bad[:, None], np.float32(np.nan), found["loss_mask"])}

    monkeypatch.setattr(loader.Stream, "block", poisoned)


def test_a_run_that_is_resumed_with_other_batches_counts_what_it_read(folder, tmp_path, fed, not_finite, capsys):
    """8 rows a step, then 16, then 4, over two epochs: every row once, and every number from the rows that went in."""
    lengths = dict(train__num_steps="2 epochs", optimizer__warmup="0.3 epochs", checkpoint__every="0.5 epochs")
    workdir, card = tmp_path / "run", runpy.run_path(str(ROOT / "tools" / "model_card.py"))["main"]
    for session, (batch, stop) in enumerate([(8, 5), (16, 8), (4, "2 epochs")]):
        given = lengths | dict(data__global_batch_size=batch, train__num_steps=stop)
        given |= dict(optimizer__decay_over="2 epochs")
        assert main.main(flags(folder, workdir, **given)) == 0
        said = capsys.readouterr().out
        assert f"row {[0, 40, 88][session]}" in said or not session
        assert ("step 8 skipped: the gradient of rows 72 to 87 is not finite" in said) == (session == 1)
    per_epoch = (3 * (2143 + 1)) / LENGTH
    lines = [line for line in metrics_file.read(workdir) if "train/loss" in line]
    after = np.cumsum([8] * 5 + [16] * 3 + [4] * 100)[: len(lines)]
    assert fed == list(range(after[-1])), "every row once, in order"
    assert [line["train/tokens"] for line in lines] == (after * LENGTH).tolist()
    assert after[-1] >= 2 * per_epoch > after[-2], "two epochs, not 1.5 or 2.5"
    rates, before = [line["train/learning_rate"] * 1e3 for line in lines], after - np.diff(after, prepend=0)
    warmup, whole = 0.3 * per_epoch, 2 * per_epoch
    for rate, at in zip(rates, before, strict=True):
        expected = min(at / warmup, (whole - at) / (whole - warmup))
        assert abs(rate - expected) < 2 * 16 / warmup, (rate, at)
    assert rates[-1] < 0.05
    saved = [step for step in step_folders.complete_steps(workdir / "checkpoints") if step not in (5, 8, len(lines))]
    half = per_epoch / 2
    crossed = [k + 1 for k in range(len(lines)) if after[k] // half > before[k] // half]
    assert saved == [step for step in crossed if step not in (5, 8, len(lines))] and saved
    data = step_folders.read_data_state(checkpoint.epath.Path(workdir), len(lines))
    assert data == DataState(len(lines), after[-1])
    assert card(["--model", str(workdir)]) == 0
    assert f"| tokens seen | {after[-1] * LENGTH:,} |" in capsys.readouterr().out
