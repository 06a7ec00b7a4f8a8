"""A command as on a TPU VM without its chips: the files by which JAX sees them are pretended, and a library for them.

`python on_tpu_vm.py lm_jax.main --config ...`; computing is left to JAX_PLATFORMS.
"""

import glob
import os
import pathlib
import runpy
import sys

found = glob.glob


def with_chips(pattern, *arguments, **keywords):
    """`glob`, that finds the pretended chips where JAX looks for them."""
    if pattern == "/sys/bus/pci/devices/*/vendor":
        return [str(path) for path in pathlib.Path(os.environ["LM_JAX_TEST_CHIPS"]).glob("*/vendor")]
    return found(pattern, *arguments, **keywords)


def pretend(folder: pathlib.Path) -> dict[str, str]:
    """Writes four chips of a v5e into a folder. Returns the environment of a process that has them."""
    for chip in range(4):
        place = folder / f"0000:00:0{chip}.0"  # as a PCI bus names it
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x1ae0\n")
        (place / "device").write_text("0x0063\n")
    (folder / "libtpu.so").write_text("")
    return {"LM_JAX_TEST_CHIPS": str(folder), "TPU_LIBRARY_PATH": str(folder / "libtpu.so")}


if __name__ == "__main__":
    glob.glob = with_chips
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
