"""The shape of the package: imports point down, in no circle; files are short; what must be quick knows no torch."""

import ast
from pathlib import Path

import pytest

import titan_cpt

ROOT = Path(titan_cpt.__file__).parent

PACKAGES = (  # lowest first: a file imports only from its own package and from those above it in this list
    "errors",
    "common",
    "config",
    "models",
    "distributed",
    "data",
    "planning",
    "checkpoint",
    "evaluation",
    "reporting",
    "training",
    "train",
    "runs",
    "commands",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, name in enumerate(PACKAGES)}
LONGEST = {"train": 360, "planning.planner": 510}  # lines; every other file has fewer than 500
TORCHLESS = (
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
    """What a file imports as soon as it is imported itself."""
    statements = [node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imported(ast.Module(statements, type_ignores=[])))


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


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_itself_by_a_detour(name):
    """No circles, whatever the layers say."""
    assert all(name not in below(other) for other in OURS[name])


def test_one_file_locks_files():
    """What the system's answers mean, and who is named as the holder, is decided once."""
    assert [name for name, tree in TREES.items() if "fcntl" in imported(tree)] == ["common.file_lock"]


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_enough_to_read(name):
    """Under 500 lines, and train.py, which is read first, under 350."""
    lines = len(FILES[name].read_text().splitlines())

    assert lines <= LONGEST.get(name, 499)


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


def test_package_files_are_empty():
    """A name is imported from where it is defined."""
    assert [path for path in ROOT.rglob("__init__.py") if path.read_text().strip()] == []


@pytest.mark.parametrize("name", TORCHLESS)
def test_what_the_plan_needs_imports_no_torch(name):
    """Nor anything else that is heavy or optional, at the top of a file: a plan answers in milliseconds."""
    heavy = {
        f"{one} imports {module}"
        for one in below(name)
        for module in at_the_top(one)
        if module.partition(".")[0] in OPTIONAL
    }

    assert heavy == set()


@pytest.mark.parametrize("name", ["cli", *(name for name in FILES if package(name) == "commands")])
def test_commands_import_heavy_modules_only_when_they_run(name):
    """`titan-cpt --help` and a mistake in the options answer at once: a handler imports what it needs."""
    if name == "commands.launch":
        pytest.skip("a program of its own, which wraps torchrun")
    light = ("titan_cpt.errors", "titan_cpt.common.exit_status", "titan_cpt.commands.")
    ours = {module for module in at_the_top(name) if module.startswith("titan_cpt")}

    assert {module for module in ours if not module.startswith(light)} == set()
    assert at_the_top(name) & OPTIONAL == set()


def test_the_report_meets_a_run_through_its_folder_only():
    """It may read metrics; it knows no config, plan, model or checkpoint."""
    assert {package(name) for name in below("reporting.summary")} == {"reporting", "common", "errors"}
