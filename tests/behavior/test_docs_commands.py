"""Every command of the documentation runs, on small inputs and with small numbers, or its page says why it cannot.

docs_pages.py reads the pages; CONTRIBUTING.md, "Commands in the docs", says how a page declares what its commands need.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from docs_pages import COMMANDS, OTHERS, ROOT, Sandbox, blocks, files_of, pages_before, small_arguments, tomllib
from forked_commands import Shell

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.planning.planner import make_plan

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(
        path
        for path in sorted((ROOT / "docs").rglob("*.md"))
        if path.name not in ("cli.md", "config.md", "mistakes.md")
    ),
]


CONTINUED = {earlier for page in PAGES for earlier in pages_before(page)}  # run as a part of a page that continues them
RUN = [page for page in PAGES if page not in CONTINUED and any(block.runs for block in blocks(page))]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_every_command_of_a_page_that_can_run_here_does(page, tmp_path):
    """In the order of the page, with exit status 0, in a folder with what the page says exists."""
    shell = Shell(tmp_path / "repository", rewrite=small_arguments)
    try:
        (shell.folder / "scripts").symlink_to(ROOT / "scripts")
        Sandbox(shell).run_blocks(page)
    finally:
        shell.close()


def test_a_command_that_fails_ends_a_block_with_its_status_and_its_name(tmp_path):
    """Otherwise the test above would pass whatever a page says. Variables live on, as in a reader's shell."""
    shell = Shell(tmp_path / "repository", rewrite=small_arguments)
    try:
        failed = shell.run("folder=nowhere\ntitan-cpt verify $folder && true\ntitan-cpt verify $folder\necho after")
        passed = shell.run('test "$PWD" = ' + f'"{shell.folder}"\ntitan-cpt plan --help | grep --quiet config')
    finally:
        shell.close()

    assert failed[0] == 2
    assert "status 2: titan-cpt verify" in failed[1]
    assert "after" not in failed[1]
    assert passed == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_code_block_of_a_page_has_a_language_and_its_syntax(page):
    """Indented blocks would hide commands from the test above. What is not run is at least parsed, and says why."""
    for part in blocks(page):
        where = f"{name_of(page)}:{part.line}"
        assert part.language in (*COMMANDS, *OTHERS), f"{where}: fence this block, with one of {COMMANDS + OTHERS}"
        assert part.said("not run") != "", f"{where}: give the reason"
        if part.language == "bash":
            parsed = subprocess.run(["bash", "-n"], input=part.text, capture_output=True, text=True)
            assert parsed.returncode == 0, f"{where}: {parsed.stderr}"
        elif part.language == "python":
            compile(part.text, where, "exec")
        elif part.language == "toml":
            tomllib.loads(part.text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_complete_config_of_a_page_is_planned_with_the_numbers_of_the_page(page, tmp_path, monkeypatch):
    """A block that has stages and a model says which file it is; with what is appended to it, it makes a plan."""
    for part in blocks(page):
        raw = tomllib.loads(part.text) if part.language == "toml" else {}
        complete = {"model", "stages", "training"} <= raw.keys() or {"extends", "job"} <= raw.keys()
        assert [*part.files] or not complete, f"{name_of(page)}:{part.line}: this config needs `<!-- file: NAME -->`"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "train_configs", tmp_path / "train_configs")
    for name, text in files_of(page).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    for name, text in files_of(page).items():
        if name.endswith(".toml") and {"stages", "extends"} & tomllib.loads(text).keys():
            config = load_config(Path(name))
            sources = {
                source: None
                for dataset, table in config.datasets.items()
                for source in ([f"{dataset}.{domain}" for domain in table.domains] or [dataset])
            }
            base = None if config.tokenizer.extend is None else 4096
            inventory = DataInventory(sources, 8192, base_vocab_size=base)

            assert make_plan(config, inventory).stages
