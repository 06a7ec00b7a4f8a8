"""The house: imports run one way, the wings can go, nothing outgrows its file, and the map knows every module."""

import ast
import os
import re
import shutil
import subprocess
import sys

from helpers import ROOT

# Each may import itself, those before it, and nothing after it.
ORDER = """
stop errors meanwhile knob model_config config reach other_words config_check fault_points regular_files files
batch_ramp spikes sharding mesh data.lines data.source_kinds data.sources data.tokenizer data.hugging_face_tokenizer
data.tokenizer_files data.special_ids convert.word_vectors data.corpus_verification data.shards data.shard_writer
data.packing data.best_fit data.mixed_rows data.objectives data.tokenizer_training data.stretches data.corpus
data.mixture generate.jinja_process generate.chat_template model.task_heads tasks.scores tasks.tables tasks.results
tasks.segments tasks.task tasks.words tasks.classification tasks.regression tasks.tags tasks.questions tasks.texts
generate.render_template generate.chat_words generate.chat_tokens tasks.conversations tasks.instruction
tasks.preference tasks.records
data.worker data.loader prepare.readers prepare.report prepare.clean prepare.overlap prepare.steps prepare.executors
prepare.run prepare.debian_records prepare.package_records prepare.python_records tasks.baselines
tasks.text_baselines remote faults compile_cache multihost.cluster multihost.roll_call multihost.connection
multihost.watchdog multihost.peers job distributed manifest model.unstacked model.layers
model.for_generation trainable model.lora collectives
model.row_order model.context_attention model.splash plan.devices model.flash_attention model.attention model.dropout
model.embedding model.language_model model.expert_parallel model.moe model.stack model.positions
model.kv_cache model.attention_layer model.transformer model.encoder model.encoder_decoder model.recurrent
model.build convert.safetensors convert.config_reader convert.rotary convert.config_fields convert.families
convert.encoders convert.heads convert.description convert.tensor_map convert.hugging_face convert.tokenizer_json
convert.text_files convert.gguf chunked_cross_entropy loss update_rules plan.layer_memory plan.counts loss_scale
parameter_average schedule optimizer cli step_folders run_folder experiment_file parts train_state checkpoint
metrics_file best load_model inherited experiment train_step trackers metrics goodput decide run_plan terminal
convert.run generate.sampling generate.decoding convert.proof convert.export convert.transformers_peer convert.of_run
generate.beam_search generate.request_batches tasks.generate_answers tasks.dpo_reference generate.likelihood
generate.slots generate.continuous_batching generate.growing_text generate.spelling generate.grammar generate.lm_eval
generate.benchmarks generate.command evaluator open_data time_budget open_run update_histograms step_checks step_log
samples closing rewind initial_state workdir_lock start summary evaluate between_steps train main verify
generate.__main__ serve.protocol serve.log_probabilities serve.metrics serve.answers serve.app serve.command
serve.__main__ trust.card plan.inspection plan.estimate plan.program_text plan.compile plan.budget plan.compare
plan.page plan.search plan.command plan.__main__ trust.comparison trust.introspection trust.killed_runs trust.report
trust.sweep from_python trust.byte_page
""".split()
WINGS = ("convert.", "generate.", "prepare.", "serve.", "tasks.", "trust.")
PERIPHERY = {"verify", *(name for name in ORDER if name.startswith(WINGS))}


def imports(path) -> set[str]:
    """Modules of ours that a file imports anywhere, as in ORDER."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lm_jax":
            inside = (node.module or "").removeprefix("lm_jax").removeprefix(".")
            found |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names} | {inside}
    return found & set(ORDER)


def test_every_module_has_a_place_and_the_arrows_hold():
    modules = {}
    for path in sorted((ROOT / "lm_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "lm_jax").with_suffix("").parts)
        if not name.endswith("__init__"):
            modules[name] = imports(path)
    assert sorted(modules) == sorted(ORDER)
    # `cli.run_command` sets JAX up for the command that it runs, and `main` wakes it up after the flags: both import late.
    backwards = {(a, b) for a, found in modules.items() for b in found if ORDER.index(b) > ORDER.index(a)}
    assert backwards == set()


def test_the_core_imports_a_wing_where_it_is_used():
    """Inside a function: what does not use it runs without it."""
    for path in sorted((ROOT / "lm_jax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "lm_jax").with_suffix("").parts)
        tops = [node.module or "" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        early = [module for module in tops if f"{module}.".removeprefix("lm_jax.").startswith(WINGS)]
        assert not early or name.startswith(WINGS), f"{path}: {early}"


def test_nothing_heavy_or_forbidden_is_imported():
    """What proves an export asks `transformers`, where it is installed, inside the functions that do."""
    for path in (ROOT / "lm_jax").rglob("*.py"):
        whole = ast.parse(path.read_text())
        tree = whole.body if path.name == "transformers_peer.py" else list(ast.walk(whole))
        roots = {(node.module or "").split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name.split(".")[0] for n in tree if isinstance(n, ast.Import) for alias in n.names}
        assert not roots & {"torch", "tensorflow", "transformers", "pickle"}, path


def test_no_test_imports_a_test():
    """What two of them need is in a module that is none: helpers.py, chat_templates.py, task_runs.py ..."""
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (?:test_|conftest)\w*", path.read_text(), re.MULTILINE)
        assert not found, f"{path.name}: {found}"


def test_main_runs_without_the_periphery(tmp_path):
    for folder in ("lm_jax", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module in PERIPHERY:
        (tmp_path / "lm_jax" / f"{module.replace('.', '/')}.py").unlink()
    script = "import lm_jax, sys; assert lm_jax.__file__.startswith(sys.argv[1]), lm_jax.__file__"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, cwd=tmp_path, check=True)
    line = [sys.executable, "-m", "lm_jax.main", "--config", "experiments/quickstart.py:smoke", "--dry_run"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout


def test_no_file_and_no_function_outgrows_what_one_reads_at_once():
    for path in sorted((ROOT / "lm_jax").rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= (250 if path.name == "train.py" else 350), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_a_tool_is_a_door():
    """What a test needs of it is in a wing."""
    assert not [path.name for path in (ROOT / "tools").glob("*.py") if path.read_text().count("\n") > 80]


def test_the_map_has_every_module_once_and_every_module_that_it_has():
    """docs/architecture.md, and the docstring of a wing its own."""
    modules = {f"lm_jax/{name.replace('.', '/')}.py" for name in ORDER}
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert sorted(re.findall(r"^\| `(lm_jax/[^`]+\.py)` \|", text, re.MULTILINE)) == sorted(modules)
    for wing in (ROOT / "lm_jax").glob("*/__init__.py"):
        told = ast.get_docstring(ast.parse(wing.read_text())) or ""
        if wing.parent.name not in ("data", "model"):  # of the core
            names = {path.name for path in wing.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
            assert {name for name in names if name not in told} == set(), wing


def test_the_reading_list_is_short_and_its_types_are_strict():
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Beside the core")[0]
    files = re.findall(r"^\| `(lm_jax/[\w/]+)\.py`", text, re.MULTILINE)
    assert len(files) <= 28 and sum(len((ROOT / f"{file}.py").read_text().splitlines()) for file in files) <= 4000
    strict = re.search(r"^\[mypy-(lm_jax\.main.*)\]$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert strict and strict[1].split(",") == [file.replace("/", ".") for file in files]
