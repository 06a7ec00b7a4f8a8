"""Counts beside the compiler near the limit of a device's memory: configs on devices that are not here.

    python tools/benchmark fits [--file tests/fixtures/fits.jsonl] [--only v5e]

Each line of PAIRS is planned by `python -m lm_jax.plan`; of what does not fit, the first change that it proposes is compiled too.
A pair is a line of the file once it is done, and is not done again while its line stands there. What the compilers at hand
(extras `[tpu]`, `[cuda12]`) cannot make is left for another environment.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.experiment import load_config
from lm_jax.plan import compile as compiler
from lm_jax.plan import devices
from lm_jax.plan.estimate import estimate

# An experiment, a topology, settings. Few rows less or more than fit; layers are scanned where nothing else is said.
PAIRS = """
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.remat=dots batch=48 rows=48
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.remat=dots batch=64 rows=64
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.remat=full batch=256 rows=256
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.remat=names batch=160 rows=80
llama_1b v5e:1x1 model.num_layers=8 model.remat=none batch=3 rows=3
llama_1b v5e:2x2 mesh.data=4 model.num_layers=6 model.remat=full optimizer.name=adafactor batch=320 rows=160
decoders:llama_7b v5e:4x4 mesh.data=1 mesh.fsdp=16 model.remat=full batch=128 rows=128
decoders:llama_7b v5p:2x2x1 mesh.data=1 mesh.fsdp=4 model.remat=dots batch=40 rows=40
decoders:llama_7b v6e:2x4 mesh.data=1 mesh.fsdp=4 mesh.tensor=2 model.remat=dots batch=20 rows=20
decoders:qwen3_0_6b v6e:2x2 mesh.data=4 model.remat=names batch=40 rows=40
gpt3:1.3b v6e:2x2 mesh.data=4 model.window=(0,) model.remat=dots batch=32 rows=32
gpt_125m gpu:1xH100 model.window=(0,) model.remat=none batch=32 rows=32
gpt_125m gpu:1xH100 model.window=(0,) model.remat=none batch=40 rows=40
gpt_125m gpu:1xL4 model.window=(0,) model.remat=dots batch=32 rows=32
gpt_125m gpu:1xL4 model.window=(0,) model.remat=dots batch=40 rows=40
gpt_125m gpu:1xT4 model.window=(0,) model.remat=none batch=4 rows=4
gpt_125m gpu:1xT4 model.window=(0,) model.remat=none batch=6 rows=6
gpt_125m gpu:8xT4 mesh.data=8 model.window=(0,) model.remat=full batch=800 rows=400
llama_1b gpu:8xA100 mesh.data=1 mesh.fsdp=8 model.remat=dots batch=224 rows=224
llama_1b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.remat=full batch=1152 rows=1152
llama_1b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.remat=none batch=64 rows=64
llama_1b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.remat=none batch=80 rows=80
decoders:llama_7b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.remat=names batch=88 rows=88
gpt_125m v5e:2x4 mesh.data=8 model.window=(0,) model.remat=none batch=64 rows=64
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.remat=names batch=96 rows=96
llama_1b v5e:2x4 mesh.data=1 mesh.fsdp=8 model.num_layers=18 model.remat=none batch=16 rows=16
gpt3:6.7b v5e:4x8 mesh.data=1 mesh.fsdp=16 mesh.tensor=2 model.window=(0,) model.remat=full batch=320 rows=320
decoders:llama_7b gpu:8xA100 mesh.data=1 mesh.fsdp=4 mesh.tensor=2 model.remat=dots batch=48 rows=48
decoders:qwen3_0_6b gpu:4xL4 mesh.data=1 mesh.fsdp=4 model.remat=names batch=24 rows=24
decoders:mixtral_8x7b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.num_layers=4 model.remat=full batch=32 rows=32
gpt_125m gpu:1xA100 model.window=(0,) model.compute_dtype=float32 model.remat=dots batch=48 rows=48
decoders:gemma3_270m gpu:1xL4 model.remat=dots batch=8 rows=8
gpt3:350m gpu:1xL4 model.window=(0,) model.remat=full optimizer.name=adafactor batch=80 rows=40
gpt_125m gpu:1xH100 model.window=(0,) model.unroll=True model.remat=none batch=64 rows=64
llama_1b gpu:8xA100 mesh.data=1 mesh.fsdp=8 model.num_layers=10 model.unroll=True model.remat=names batch=800 rows=800
gpt3:1.3b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.window=(0,) model.remat=none batch=48 rows=48
decoders:mistral_7b gpu:8xH100 mesh.data=1 mesh.fsdp=8 model.remat=dots batch=16 rows=16
llama_1b gpu:4xL4 mesh.data=1 mesh.fsdp=4 model.remat=full batch=224 rows=112
llama_1b gpu:8xT4 mesh.data=1 mesh.fsdp=8 model.remat=full batch=128 rows=128
gpt3:2.7b gpu:8xA100 mesh.data=2 mesh.fsdp=4 model.window=(0,) model.remat=names batch=120 rows=120
llama_1b gpu:1xA100 model.remat=names optimizer.name=muon batch=64 rows=32
llama_1b gpu:8xA100 mesh.data=4 mesh.fsdp=2 model.remat=dots optimizer.moment_dtype=bfloat16 batch=352 rows=176
decoders:mixtral_8x7b v5p:2x4x4 mesh.data=1 mesh.fsdp=4 mesh.expert=8 model.remat=full batch=256 rows=256
gpt_125m v5e:2x2 mesh.data=4 model.window=(0,) model.compute_dtype=float32 model.remat=dots batch=56 rows=56
"""
ALWAYS = {"data.batch_ramp": "(0,0)", "model.unroll": "False"}


def given(pair: str) -> tuple[str, str, dict[str, str]]:
    """(experiment file, topology, {setting: value}) of a line of PAIRS; `batch` and `rows` are its short words."""
    name, topology, *words = pair.split()
    experiment, _, variant = name.partition(":")
    short = {"batch": "data.global_batch_size", "rows": "train.microbatch_rows"}
    settings = dict(word.split("=", 1) for word in words)
    settings = ALWAYS | {short.get(name, name): value for name, value in settings.items()}
    return f"experiments/{experiment}.py" + (f":{variant}" if variant else ""), topology, settings


def plan(experiment: str, topology: str, flags: list[str]) -> dict:
    """What the command says, as JSON. Raises UserError with its words where it fails."""
    line = [sys.executable, "-m", "lm_jax.plan", "--config", experiment, "--topology", topology, "--json", *flags]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(line)}\n{done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def tried(pair: str) -> dict:
    """A line of the file: counted and compiled bytes of a device, whether they fit, and the first change where they do not."""
    experiment, topology, settings = given(pair)
    flags = {f"--config.{name}": value for name, value in settings.items()}
    found = plan(experiment, topology, [f"{name}={value}" for name, value in flags.items()])
    record = {"pair": pair, "experiment": experiment, "topology": topology, "settings": settings} | facts(found)
    if changes := found.get("changes"):
        changed = flags | dict(word.split("=", 1) for word in changes[0]["flags"].split())
        mended = plan(experiment, topology, [f"{name}={value}" for name, value in changed.items()])
        record["change"] = {"flags": changes[0]["flags"]} | facts(mended)
    return record


def facts(found: dict) -> dict:
    compiled = found["compiled"]
    return {
        "memory": found["memory"], "counted": found["needed"], "peak": compiled["peak"],
        "counted_fits": found["fits"], "fits": compiled["fits"], "seconds": round(compiled["seconds"], 1),
    }  # fmt: skip


def told(record: dict) -> str:
    gib = lambda size: f"{size / 2**30:.2f}"
    change = record.get("change")
    mended = f"; {change['flags']}: {gib(change['peak'])}, {'fits' if change['fits'] else 'NO'}" if change else ""
    verdict = lambda fits: "fits" if fits else "misfit"
    return (
        f"{gib(record['counted'])} counted ({verdict(record['counted_fits'])}), {gib(record['peak'])} compiled "
        f"({verdict(record['fits'])}) of {gib(record['memory'])} GiB, {record['counted'] / record['peak'] - 1:+.1%}, "
        f"{record['seconds']:.0f} s{mended}    {record['pair']}"
    )


def counted_anew(record: dict) -> dict:
    """A record with what is counted now."""

    def again(said: dict, more: dict[str, str]) -> dict:
        config, _ = load_config(record["experiment"], record["settings"] | more)
        found = estimate(config, devices.parse(record["topology"]))
        return said | {"counted": found.needed, "counted_fits": found.fits}

    record = again(record, {})
    if change := record.get("change"):
        flags = change["flags"].replace("--config.", "").split()
        record["change"] = again(change, dict(word.split("=", 1) for word in flags))
    return record


def table(records: list[dict]) -> str:
    """The records for docs/benchmarks.md, in the order of the file."""
    gib = lambda size: f"{size / 2**30:.2f}"
    rows = ["| pair | counted | compiled | of | | fits | first change |", "|---|---|---|---|---|---|---|"]
    for one in records:
        change = one.get("change")
        mended = (
            f"`{change['flags'].replace('--config.', '')}`: {gib(change['counted'])}, {gib(change['peak'])}"
            if change
            else ""
        )
        fits = "yes" if one["fits"] else "no"
        rows.append(
            f"| `{one['pair']}` | {gib(one['counted'])} | {gib(one['peak'])} | {gib(one['memory'])} "
            f"| {one['counted'] / one['peak'] - 1:+.1%} | {fits} | {mended} |"
        )
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=pathlib.Path, default=pathlib.Path("tests/fixtures/fits.jsonl"))
    parser.add_argument("--only", default="", help="pairs with this in their line")
    parser.add_argument("--most", type=int, default=1000, help="pairs to do now")
    parser.add_argument("--table", action="store_true", help="the file counted anew, and as a table")
    flags = parser.parse_args(arguments)
    lines = flags.file.read_text().splitlines() if flags.file.exists() else []
    records = [json.loads(line) for line in lines]
    if flags.table:
        records = [counted_anew(record) for record in records if record["pair"] in PAIRS]
        flags.file.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(table(records))
        return 0
    done = {record["pair"] for record in records}
    able = {"tpu": compiler.installed("libtpu"), "gpu": compiler.installed("jax_plugins", "jax_plugins.xla_cuda12")}
    pairs = [pair for line in PAIRS.splitlines() if (pair := line.strip()) not in done and flags.only in pair]
    pairs = [pair for pair in pairs if pair and able[devices.parse(given(pair)[1]).platform]]
    for pair in pairs[: flags.most]:
        try:
            record = tried(pair)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        with flags.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(told(record), flush=True)
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
