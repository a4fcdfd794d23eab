"""The architecture: imports point down, without cycles; files are short; what must start fast imports no torch."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import titan_cpt

ROOT = Path(titan_cpt.__file__).parent

PACKAGES = (  # lowest first: a file imports only from its own package and from those above it in this list
    "errors",
    "common",
    "config",
    "object_storage",
    "models",
    "distributed",
    "data",
    "planning",
    "convert",
    "checkpoint",
    "evaluation",
    "reporting",
    "doctor",
    "tracking",
    "training",
    "train",
    "runs",
    "api",
    "commands",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, name in enumerate(PACKAGES)}
LONGEST = {"train": 300}  # lines; every other file has at most LONGEST_FILE
LONGEST_FILE = 450
MOST_FILES = 20  # in one folder
ONE_FILE_PER_VERB = "commands"  # a command is found by its name in a flat folder, however many there are
FAMILY_FILES = ["huggingface", "model", "parallelize", "spec"]
NO_TORCH = (  # packages and modules that import nothing heavy when they are imported
    "errors",
    "common",
    "config",
    "object_storage",
    "planning",
    "convert",
    "doctor",
    "reporting",
    "tracking",
    "runs",
    "api",
    "commands",
    "cli",
    "checkpoint.manifest",
    "checkpoint.tokenizer_check",
    "data.inventory",
    "data.mixture",
    "distributed.float8_filter",
    "distributed.parallel_dims",
    "models.grouped_query_spec",
    "models.registry",
    "models.release_text",
    "models.releases",
    "models.spec",
)
HEAVY_ON_PURPOSE = (  # wraps torchrun; draw, and are imported when they must
    "commands.launch",
    "reporting.figures",
    "reporting.plots",
    "reporting.stage_strip",
)
TESTED_ELSEWHERE = {  # modules without a test file of their own name, and a test that fails if they are wrong
    "__main__": "unit/commands/test_cli.py",
    "common.plugins": "behavior/test_plugins.py",
    "config.used_plugins": "behavior/test_plugins.py",
    "checkpoint.hf_tokenizer": "unit/checkpoint/test_hf_export.py",
    "distributed.weight_rows": "unit/training/optimization/test_trained_weights.py",
    "checkpoint.other_trainers.trained_checkpoint": "unit/checkpoint/other_trainers/test_import_trained.py",
    "checkpoint.other_trainers.dcp_metadata": "unit/checkpoint/other_trainers/test_dcp_files.py",
    "checkpoint.other_trainers.model_config": "unit/checkpoint/other_trainers/test_torchtitan.py",
    "checkpoint.other_trainers.litgpt.reader": "unit/checkpoint/other_trainers/test_litgpt.py",
    "checkpoint.other_trainers.litgpt.config": "unit/checkpoint/other_trainers/test_litgpt.py",
    "checkpoint.other_trainers.olmo_core.reader": "unit/checkpoint/other_trainers/test_olmo_core.py",
    "checkpoint.other_trainers.olmo_core.config": "unit/checkpoint/other_trainers/test_olmo_core.py",
    "checkpoint.other_trainers.rope_layout": "unit/checkpoint/other_trainers/test_torchtitan.py",
    "checkpoint.other_trainers.torchtitan.reader": "unit/checkpoint/other_trainers/test_torchtitan.py",
    "checkpoint.other_trainers.torchtitan.export": "unit/checkpoint/other_trainers/test_torchtitan_export.py",
    "checkpoint.other_trainers.torchtitan.names": "unit/checkpoint/other_trainers/test_torchtitan.py",
    "checkpoint.other_trainers.torchtitan.config": "unit/checkpoint/other_trainers/test_torchtitan.py",
    "checkpoint.other_trainers.megatron_arguments": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_buffers": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_dist": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_dist_optimizer": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_legacy": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_names": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.megatron_ranks": "unit/checkpoint/other_trainers/test_megatron.py",
    "checkpoint.other_trainers.neox_files": "unit/checkpoint/other_trainers/test_neox.py",
    "checkpoint.other_trainers.neox_names": "unit/checkpoint/other_trainers/test_neox.py",
    "checkpoint.merge.inputs": "unit/checkpoint/merge/test_merge.py",
    "checkpoint.merge.parents": "unit/checkpoint/merge/test_merge.py",
    "checkpoint.merge.progress": "unit/checkpoint/merge/test_merge.py",
    "checkpoint.model_card": "unit/checkpoint/test_hf_export.py",
    "common.weights.reptile": "unit/planning/stages/test_reptile.py",
    "common.weights.new_rows": "unit/planning/stages/test_new_rows.py",
    "training.weights.new_rows": "behavior/test_new_rows.py",
    "training.weights.averager": "behavior/test_averages.py",
    "training.weights.copies": "behavior/test_averages.py",
    "checkpoint.state_dict": "unit/checkpoint/test_manager.py",
    "checkpoint.vocabulary.vocabulary_rows": "unit/checkpoint/vocabulary/test_weak_rows.py",
    "checkpoint.vocabulary.weak_row_report": "unit/checkpoint/vocabulary/test_weak_rows.py",
    "checkpoint.weights_only": "unit/checkpoint/test_hf_import.py",
    "cli": "unit/commands/test_plan.py",
    "commands.anneal": "unit/runs/test_anneal.py",
    "commands.baselines": "unit/runs/test_baselines.py",
    "commands.evaluate": "unit/evaluation/test_evaluate.py",
    "commands.export": "unit/checkpoint/test_hf_export.py",
    "commands.import_model": "unit/checkpoint/test_hf_import.py",
    "commands.merge": "unit/checkpoint/merge/test_settings.py",
    "commands.launch": "distributed/test_launch.py",
    "commands.prepare": "unit/data/prepare/test_outputs.py",
    "commands.report": "unit/reporting/test_html_page.py",
    "commands.sweep": "unit/runs/test_sweep.py",
    "runs.laws.advice": "unit/runs/laws/test_laws.py",
    "runs.laws.measured": "unit/runs/laws/test_laws.py",
    "runs.laws.report": "unit/runs/laws/test_laws.py",
    "commands.upload": "behavior/test_uploads.py",
    "commands.tokenizer": "unit/data/prepare/test_extend_tokenizer.py",
    "commands.track": "behavior/test_trackers.py",
    "commands.verify": "unit/checkpoint/test_manifest.py",
    "convert.convert": "unit/commands/test_convert_config.py",
    "data.formats.array_file": "unit/data/formats/test_token_files.py",
    "data.formats.datatrove": "unit/data/formats/test_token_files.py",
    "data.formats.indexed_layout": "unit/data/formats/test_indexed.py",
    "data.formats.indexed_writer": "unit/data/formats/test_indexed.py",
    "data.formats.presequenced": "unit/data/formats/test_token_files.py",
    "data.formats.raw": "unit/data/formats/test_token_files.py",
    "data.formats.token_source": "unit/data/formats/test_token_files.py",
    "data.formats.registered": "behavior/test_plugins.py",
    "data.prepare.decompress": "unit/data/prepare/test_prepare.py",
    "data.prepare.parallel": "behavior/test_prepare_resume.py",
    "data.prepare.prepare_missing": "unit/data/prepare/test_outputs.py",
    "data.prepare.shards": "unit/data/prepare/test_prepare.py",
    "data.prepare.text_inputs": "unit/data/prepare/test_prepare.py",
    "data.tokenizer.backends": "unit/data/tokenizer/test_tokenizer.py",
    "data.tokenizer.huggingface_backend": "unit/data/tokenizer/test_special_tokens.py",
    "data.tokenizer.ids_fingerprint": "unit/checkpoint/test_tokenizer_check.py",
    "data.tokenizer.bpe_merges": "unit/data/tokenizer/test_train_bpe.py",
    "data.tokenizer.byte_level": "unit/data/tokenizer/test_tokenizer.py",
    "data.tokenizer.check_texts": "unit/data/tokenizer/test_tokenizer.py",
    "data.tokenizer.encoded": "unit/data/tokenizer/test_tokenizer.py",
    "data.tokenizer.gigatoken_spec": "unit/data/tokenizer/test_gigatoken_backend.py",
    "distributed.attention_timing": "unit/distributed/test_attention_backend.py",
    "distributed.activation_checkpoint": "distributed/test_parity.py",
    "distributed.build": "distributed/test_parity.py",
    "distributed.device_mesh": "distributed/test_parity.py",
    "distributed.float8_filter": "unit/distributed/test_float8.py",
    "distributed.fsdp": "distributed/test_parity.py",
    "distributed.options": "distributed/test_parity.py",
    "distributed.pipeline_parallel": "distributed/test_parity.py",
    "distributed.process_group": "distributed/test_two_ranks.py",
    "distributed.tensor_parallel": "distributed/test_parity.py",
    "doctor.finding": "unit/commands/test_doctor.py",
    "doctor.request": "unit/doctor/test_doctor.py",
    "doctor.run_check": "unit/doctor/test_doctor.py",
    "doctor.versions": "unit/commands/test_version.py",
    "evaluation.checkpoint_paths": "unit/evaluation/test_evaluate.py",
    "evaluation.generate": "unit/evaluation/test_inference.py",
    "evaluation.lm_eval_model": "unit/evaluation/test_lm_eval.py",
    "evaluation.lm_eval_tasks": "unit/evaluation/test_lm_eval.py",
    "evaluation.registered_metrics": "behavior/test_plugins.py",
    "evaluation.prompts": "unit/evaluation/test_inference.py",
    "models.huggingface_names": "unit/models/llama/test_model.py",
    "models.grouped_query_spec": "unit/planning/test_memory.py",
    "models.common.blocks": "unit/models/llama/test_model.py",
    "models.common.init": "unit/models/gpt_neox/test_model.py",
    "models.common.kv_cache": "unit/evaluation/test_inference.py",
    "models.common.language_model": "unit/evaluation/test_inference.py",
    "models.common.layers": "unit/models/llama/test_model.py",
    "models.gemma3.huggingface": "unit/models/gemma3/test_model.py",
    "models.gemma3.parallelize": "distributed/test_parity.py",
    "models.gpt_neox.parallelize": "distributed/test_parity.py",
    "models.huggingface_keys": "unit/models/test_huggingface_config.py",
    "models.huggingface_rope": "unit/models/test_huggingface_config.py",
    "models.huggingface_weights": "unit/checkpoint/test_hf_files.py",
    "models.llama.huggingface": "unit/models/test_huggingface_config.py",
    "models.llama.parallelize": "distributed/test_parity.py",
    "models.olmo.huggingface": "unit/models/olmo/test_model.py",
    "models.olmo.parallelize": "distributed/test_parity.py",
    "models.smollm3.huggingface": "unit/models/smollm3/test_model.py",
    "models.smollm3.parallelize": "distributed/test_parity.py",
    "models.smollm3.spec": "unit/models/smollm3/test_model.py",
    "planning.plan_draft": "unit/planning/stages/test_data_budget.py",
    "reporting.benchmark_table": "unit/evaluation/test_scores.py",
    "reporting.curve_sections": "unit/reporting/test_html_page.py",
    "reporting.html_parts": "unit/reporting/test_html_page.py",
    "reporting.loss_sections": "unit/reporting/test_sections.py",
    "reporting.run_sections": "unit/reporting/test_html_page.py",
    "reporting.stage_strip": "unit/reporting/test_plots.py",
    "training.benchmarks": "unit/evaluation/test_evaluate.py",
    "training.changed_validation": "unit/training/test_forgetting.py",
    "training.dry_run": "unit/planning/test_parallel.py",
    "training.forward_backward": "distributed/test_parity.py",
    "training.saving": "behavior/test_disk_faults.py",
    "training.stage_start": "behavior/test_resume.py",
    "training.state": "unit/test_train.py",
    "runs.upload_run": "behavior/test_uploads.py",
    "training.step_log": "unit/test_train.py",
    "training.uploads": "behavior/test_uploads.py",
    "tracking.follower": "behavior/test_trackers.py",
    "tracking.follower_process": "behavior/test_trackers.py",
    "tracking.mlflow_tracker": "behavior/test_trackers.py",
    "tracking.position": "behavior/test_trackers.py",
    "tracking.send_runs": "behavior/test_trackers.py",
    "tracking.sender": "behavior/test_trackers.py",
    "tracking.trackers": "behavior/test_trackers.py",
    "tracking.trackio_tracker": "behavior/test_trackers.py",
    "tracking.wandb_tracker": "behavior/test_trackers.py",
}
SAME_NAME = {"main"}  # of programs: the command line, and the wrapper of torchrun
NAMES_OF_USERS = "api"  # its functions have the names of those that they call, and only users import it
TORCHLESS = (  # what these do needs nothing heavy either, lazy imports included
    "config.load",
    "reporting.summary",
    "reporting.comparison",
    "planning.planner",
    "planning.plan_text",
    "planning.suggest",
    "data.inventory",
    "checkpoint.tokenizer_check",
    "models.registry",
)
OPTIONAL = {
    "torch",
    "tokenizers",
    "datasets",
    "transformers",
    "pyarrow",
    "huggingface_hub",
    "fsspec",
    "zstandard",
    "matplotlib",
    "jinja2",
    "lm_eval",
}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"}
TREES = {name: ast.parse(path.read_text(), feature_version=(3, 10)) for name, path in FILES.items()}


def imported(tree):
    """Every module that a file imports, wherever it does so, by full name; `from a import b` may mean a or a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("titan_cpt.") in FILES else node.module or ""


OURS = {
    name: sorted({one.removeprefix("titan_cpt.") for one in imported(tree) if one.startswith("titan_cpt.")})
    for name, tree in TREES.items()
}


def at_the_top(name):
    """What a file imports as soon as it is imported itself: everywhere except in functions and for type checkers."""
    found, waiting = set(), list(TREES[name].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(imported(node))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def below(name):
    """The file itself and all that it imports at import time or later, however far down."""
    found, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += OURS[one]
    return found


def package(name):
    """The entry of PACKAGES that a module belongs to."""
    return name.partition(".")[0]


def test_every_package_has_its_place():
    """A new package is put into PACKAGES, and one that went away is taken out."""
    assert {package(name) for name in FILES} == set(PACKAGES)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    """To its own package or to one listed before it, not even inside a function to a later one."""
    upward = {(name, other) for other in OURS[name] if RANK[package(other)] > RANK[package(name)]}

    assert upward == set()


def test_one_file_imports_modules_by_a_computed_name():
    """The registry finds the files of a model family; every other import is a statement, which the tests here see."""
    names = ("import_module", "__import__")

    assert [name for name in FILES if any(one in FILES[name].read_text() for one in names)] == ["models.registry"]


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_itself_by_a_detour(name):
    """No circles, whatever the layers say."""
    assert all(name not in below(other) for other in OURS[name])


def test_one_file_locks_files():
    """What the system's answers mean, and who is named as the holder, is decided once."""
    assert [name for name, tree in TREES.items() if "fcntl" in imported(tree)] == ["common.file_lock"]


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_enough_to_read(name):
    """At most 450 lines, and train.py, which is read first, at most 300."""
    lines = len(FILES[name].read_text().splitlines())

    assert lines <= LONGEST.get(name, LONGEST_FILE)


def test_text_files_are_utf_8():
    """Every call that opens text names the encoding: the locale's would make a run folder unreadable elsewhere."""
    found = []
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            what = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            module = getattr(getattr(call.func, "value", None), "id", "")
            ours = what in ("read_text", "write_text") and module != "reading" and isinstance(call.func, ast.Attribute)
            words = [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            binary = any("b" in word for word in words)
            of_a_path = not isinstance(getattr(call.func, "value", None), ast.Call)  # fsspec.open(..., "rb").open()
            opens = what == "open" and module not in ("os", "gzip", "zstandard") and not binary and of_a_path
            if (ours or opens) and "encoding" not in [keyword.arg for keyword in call.keywords]:
                found.append(f"{name}:{call.lineno}")

    assert found == []


def test_the_root_has_the_entry_points_only():
    """A newcomer finds train.py, and packages for everything else."""
    assert sorted(path.stem for path in ROOT.glob("*.py")) == ["__init__", "__main__", "api", "cli", "errors", "train"]


def test_no_folder_has_too_many_files():
    """At most 20: a folder that grows beyond that should become two. commands/ has one file for each verb."""
    files = Counter(str(path.parent) for path in FILES.values() if path.parent != ROOT / ONE_FILE_PER_VERB)

    assert {folder: count for folder, count in files.items() if count > MOST_FILES} == {}


def test_a_model_family_is_one_folder_of_four_files():
    """Their names are the same in every family: adding a family adds a folder, and a line in models/registry.py."""
    folders = [path.parent for path in (ROOT / "models").glob("*/__init__.py")]
    families = {path.name: sorted(file.stem for file in path.glob("*.py")) for path in folders if path.name != "common"}

    assert len(families) >= 2
    assert {name: files for name, files in families.items() if files != ["__init__", *FAMILY_FILES]} == {}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("models.") and name.endswith(".model")])
def test_models_know_nothing_of_parallelism(name):
    """parallelize.py of the family applies it from outside."""
    ours = {package(one) for one in OURS[name]}
    theirs = {module for module in imported(TREES[name]) if module.startswith("torch.distributed")}

    assert (ours <= {"errors", "common", "config", "models"}, theirs) == (True, set())


def test_no_public_name_is_defined_twice():
    """One word, one thing. Files of the same name in the families of models have the same names on purpose."""
    places: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        *_, file = name.split(".")
        family = name.startswith("models.") and file in FAMILY_FILES
        for node in tree.body if name != NAMES_OF_USERS else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(f"models.*.{file}" if family else name)

    assert {name: sorted(found) for name, found in places.items() if len(found) > 1 and name not in SAME_NAME} == {}


@pytest.mark.parametrize("name", FILES)
def test_no_private_name_of_another_package_is_imported(name):
    """What another package may use has a public name."""
    found = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("titan_cpt.")
        for alias in node.names
        if alias.name.startswith("_") and package((node.module or "").removeprefix("titan_cpt.")) != package(name)
    }

    modules = {  # the names under which modules of other packages are used here
        alias.asname or alias.name
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (other := f"{node.module}.{alias.name}".removeprefix("titan_cpt.")) in FILES
        and package(other) != package(name)
    }
    found |= {
        ast.unparse(node)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) in modules
    }

    assert found == set()


def test_every_module_has_its_test():
    """tests/unit/<package>/test_<module>.py, or a line in TESTED_ELSEWHERE that names the test."""
    tests = Path(__file__).parents[1]
    files = {name: "unit/" + "/".join([*name.split(".")[:-1], f"test_{name.split('.')[-1]}.py"]) for name in FILES}
    own = {name for name, file in files.items() if (tests / file).exists()}
    missing = sorted(set(FILES) - own - set(TESTED_ELSEWHERE))
    superfluous = sorted(own & set(TESTED_ELSEWHERE)) + sorted(set(TESTED_ELSEWHERE) - set(FILES))
    gone = sorted(test for test in TESTED_ELSEWHERE.values() if not (tests / test).exists())

    assert (missing, superfluous, gone) == ([], [], [])


def test_package_files_are_empty():
    """A name is imported from where it is defined; the root's names are for users, who import them from titan_cpt."""
    assert [path for path in ROOT.rglob("__init__.py") if path.read_text().strip() and path.parent != ROOT] == []


def at_import(name):
    """The file itself and all of ours that is imported as soon as it is imported."""
    found, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [module for other in at_the_top(one) if (module := other.removeprefix("titan_cpt.")) in FILES]
    return found


def heavy_imports(names):
    """Imports of heavy or optional packages at the top of these files."""
    return {
        f"{name} imports {module}"
        for name in names
        for module in at_the_top(name)
        if module.partition(".")[0] in OPTIONAL
    }


@pytest.mark.parametrize(
    "name",
    [name for name in FILES if (package(name) in NO_TORCH or name in NO_TORCH) and name not in HEAVY_ON_PURPOSE],
)
def test_what_starts_fast_imports_no_torch(name):
    """Nor anything else that is heavy or optional, at import time, directly or through other files."""
    assert heavy_imports(at_import(name)) == set()


@pytest.mark.parametrize("name", TORCHLESS)
def test_what_the_plan_needs_imports_no_torch(name):
    """Nor anything else that is heavy or optional, at the top of a file: a plan answers in milliseconds."""
    assert heavy_imports(below(name)) == set()


@pytest.mark.parametrize(
    "name", [name for name in FILES if package(name) in ("cli", "commands") and name not in HEAVY_ON_PURPOSE]
)
def test_commands_import_heavy_modules_only_when_they_run(name):
    """`titan-cpt --help` and a mistake in the options answer at once: a handler imports what it needs."""
    light = ("titan_cpt.errors", "titan_cpt.common.exit_status", "titan_cpt.commands.")
    ours = {module for module in at_the_top(name) if module.startswith("titan_cpt")}

    assert {module for module in ours if not module.startswith(light)} == set()
    assert at_the_top(name) & OPTIONAL == set()


def test_the_report_meets_a_run_through_its_folder_only():
    """It may read metrics; it knows no config, plan, model or checkpoint."""
    assert {package(name) for name in below("reporting.summary")} == {"reporting", "common", "errors"}
