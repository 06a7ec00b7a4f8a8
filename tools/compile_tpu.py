"""Does a train step fit a TPU that is not here? libtpu compiles it ahead of time on any machine (extra `[tpu]`):

    python tools/compile_tpu.py --config experiments/gpt_125m.py --topology v5e:2x4 --config.mesh.data=1 --config.mesh.fsdp=-1

The whole step (gradients of `train.microbatch_rows`, all rows where that is auto, and the update) as a run would compile it.
Prints one line of JSON: GiB on each device, seconds, how often a Pallas kernel stands in the program, and what kinds of
collectives go between slices (a sum over data is an all-reduce; more than that is a mesh that does not fit them).
"""

import json
import os
import re
import time

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # also while another process has libtpu open
}  # nobody is asked for a TPU

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from lm_jax import cli, experiment  # noqa: E402
from lm_jax.data.tokenizer_files import vocab_size  # noqa: E402
from lm_jax.errors import UserError  # noqa: E402
from lm_jax.model import attention  # noqa: E402
from lm_jax.run_plan import make_plan  # noqa: E402
from lm_jax.train_step import compile_step  # noqa: E402


def main(arguments: list[str]) -> None:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/compile_tpu.py", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:8x8x16; two slices: 2*v5e:2x4")
    flags = parser.parse_args(rest)
    config, _ = experiment.load_config(flags.config, overrides)
    plan = make_plan(config, vocab_size(config.data.tokenizer), chips(flags.topology))
    attention.preflight(config.model, config.data.sequence_length, "tpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it is written for absent devices, but never read
    start = time.monotonic()
    with jax.set_mesh(plan.mesh):
        step = compile_step(plan.program, plan.mesh, one_microbatch=True).whole
    memory = step.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp")}
    sizes["peak"] = memory.peak_memory_in_bytes
    result = {name: round(size / 2**30, 3) for name, size in sizes.items()}
    text = step.as_text()
    result["kernels"] = text.count('custom_call_target="tpu_custom_call"')
    crossing = {found.lower().replace("_", "-") for found in re.findall(r'_xla_megascale_transfer_type="(\w+)"', text)}
    result["between_slices"] = sorted(crossing)
    print(json.dumps(result | {"seconds": round(time.monotonic() - start)}))


def chips(topology: str) -> list[jax.Device]:
    """The devices of a topology that libtpu knows, or of several slices of it (`2*v5e:2x4`). Raises UserError."""
    num, star, one = topology.rpartition("*")
    if star and not re.fullmatch("[1-9][0-9]{0,2}", num):
        raise UserError(f"--topology {topology}: {num!r} is no number of slices; such as 2*v5e:2x4")
    try:
        return topologies.get_topology_desc(one, platform="tpu", num_slices=int(num or 1)).devices
    except Exception as error:  # libtpu's own, of many kinds
        raise UserError(f"--topology {topology}: {str(error).splitlines()[0][:200]}\nsuch as v5e:2x4") from error


if __name__ == "__main__":
    cli.run_command(main)
