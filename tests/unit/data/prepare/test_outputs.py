"""Which files `prepare` replaces: only those that it wrote, never an input or another file of the user."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared import documents_of, jsonl, run, words

from titan_cpt.config.load import load_config
from titan_cpt.data.prepare import progress
from titan_cpt.data.prepare.prepare_missing import prepare_missing_data, train_tokenizer
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError

RECORD_OF_987A5CD = """{
  "version": 1,
  "tokenizer": {
    "fingerprint": "c068991073f84b96edec563df77c012355a2adf388b533be96680e19960235ae",
    "vocab_size": 257
  },
  "text_field": "text",
  "holdout": 0.5,
  "inputs": [
    {
      "name": "a.jsonl",
      "bytes": 68,
      "changed_ns": 1577836800000000000
    }
  ],
  "counts": {
    "documents": 1,
    "tokens": 5,
    "bytes": 4,
    "held_out_documents": 3,
    "held_out_tokens": 15,
    "held_out_bytes": 12,
    "empty_documents": 0
  }
}
"""

CONFIG = """
[job]
name = "r"
[model]
family = "gpt_neox"
size = "debug"
[datasets.german]
train = "{train}"
source = {{ text = "{text}", {source} }}
{validation}
[training]
global_batch_size = 2
local_batch_size = 2
seq_len = 16
[[stages]]
name = "a"
dataset = "german"
steps = 1
lr = {{ schedule = "constant", max = 1e-3 }}
"""


@pytest.fixture
def data(tmp_path):
    """A folder with a.jsonl of 60 documents."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(60)))
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def titan(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "titan_cpt", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def config_of(
    folder: Path, train: str, text: str, *, validation: str = "", source: str = 'text_field = "text"'
) -> object:
    line = f'validation = "{validation}"' if validation else ""
    path = folder / "config.toml"
    path.write_text(CONFIG.format(train=train, text=text, source=source, validation=line))
    return load_config(path)


def spelled(folder: Path, how: str) -> str:
    """Another name of german.json, which `prepare --output german` would overwrite."""
    whole = folder / "german.json"
    (folder / "d").mkdir()
    if how == "symbolic link":
        (folder / "text.json").symlink_to(whole)
    elif how == "hard link":
        os.link(whole, folder / "text.json")
    names = {"itself": "german.json", "detour": "d/../german.json", "linked folder": "l/german.json"}
    (folder / "l").symlink_to(folder)
    return str(folder / names.get(how, "text.json"))


@pytest.mark.parametrize("how", ["itself", "detour", "linked folder", "symbolic link", "hard link"])
@pytest.mark.parametrize("force", [False, True])
def test_an_input_that_the_record_would_overwrite_is_refused(tmp_path, how, force):
    """Under every spelling, also with --force, from the command and from a run."""
    (tmp_path / "german.json").write_text(jsonl(words(9)))
    name = spelled(tmp_path, how)
    config = config_of(tmp_path, str(tmp_path / "german"), name)
    before = snapshot(tmp_path)

    with pytest.raises(DataError, match=r"is an input and would be overwritten by the output file .*german\.json"):
        run([name], tmp_path / "german", force=force)
    with pytest.raises(DataError, match="is an input"):
        prepare_missing_data(config, workers=1, force=force, log=lambda line: None)
    assert snapshot(tmp_path) == before


def test_a_tokenizer_or_an_input_in_the_partial_folder_is_refused(data):
    """The tokenizer's file is an input; so is a text in PREFIX.partial with the name of a part."""
    train_bpe(words(500), 300, data / "out.json")
    (data / "other.partial").mkdir()
    text = data / "other.partial" / "0123456789abcdef0123456789abcdef.json"
    text.write_text(jsonl(words(5)))
    before = snapshot(data)

    with pytest.raises(DataError, match=r"out\.json: is an input"):
        run([data / "a.jsonl"], data / "out", tokenizer=str(data / "out.json"), force=True)
    with pytest.raises(DataError, match="is an input"):
        run([text], data / "other", force=True)
    assert snapshot(data) == before


def test_an_independent_validation_pair_is_never_removed(data):
    """A pair with its own record is not removed by a run without a hold-out, which does not need its name, nor by one
    with a hold-out and --force, which is refused. The same if it has no record.
    """
    (data / "v.jsonl").write_text(jsonl(words(7, seed=5)))
    run([data / "v.jsonl"], data / "german-validation")
    own = {name: content for name, content in snapshot(data).items() if "validation" in name}
    assert len(own) == 3
    config = config_of(data, str(data / "german"), str(data / "a.jsonl"), validation=str(data / "german-validation"))
    prepare_missing_data(config, workers=1, log=lambda line: None)
    run([data / "a.jsonl"], data / "german", force=True)
    for force in (False, True):
        with pytest.raises(
            DataError, match=r"german-validation\.idx, .*german-validation\.bin: exist, and were not written by"
        ):
            run([data / "a.jsonl"], data / "german", holdout=0.2, force=force)
    (data / "german-validation.json").unlink()
    del own["german-validation.json"]
    with pytest.raises(DataError, match=r"german-validation\.bin"):
        run([data / "a.jsonl"], data / "german", holdout=0.2, force=True)

    assert {name: content for name, content in snapshot(data).items() if "validation" in name} == own
    assert documents_of(data / "german") == words(60)


@pytest.mark.parametrize("lost", ["out.bin", "out.idx", "out-validation.bin", "out-validation.idx"])
def test_a_missing_file_of_an_output_is_made_again(data, lost):
    """Otherwise the same command would always be refused."""
    run([data / "a.jsonl"], data / "out", holdout=0.3)
    before = {path.name: path.read_bytes() for path in data.glob("out*")}
    (data / lost).unlink()
    run([data / "a.jsonl"], data / "out", holdout=0.3)

    assert {path.name: path.read_bytes() for path in data.glob("out*")} == before


@pytest.mark.parametrize("damaged", ["out.bin", "out.idx", "out-validation.bin", "out-validation.idx"])
def test_a_damaged_output_is_made_again_only_with_force(data, damaged):
    """The user may have changed it on purpose."""
    run([data / "a.jsonl"], data / "out", holdout=0.3)
    before = {path.name: path.read_bytes() for path in data.glob("out*")}
    (data / damaged).write_bytes(before[damaged][:-2])
    with pytest.raises(DataError, match="--force` makes it again"):
        run([data / "a.jsonl"], data / "out", holdout=0.3)
    assert (data / damaged).read_bytes() == before[damaged][:-2]
    run([data / "a.jsonl"], data / "out", holdout=0.3, force=True)

    assert {path.name: path.read_bytes() for path in data.glob("out*")} == before


def test_a_full_disk_error_names_the_path(data):
    """The system's write error has no path; the same for the tokenizer's file."""
    (data / "big.jsonl").write_text(json.dumps({"text": "x" * 20_000}) + "\n")
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); "
    limited += "from titan_cpt.cli import main; main({})"
    for options, named in (
        (["--output", "out", "--tokenizer", "bytes", "--workers", "1"], "out.partial: "),
        (["--output", "tok.json", "--train-tokenizer", "257"], "tok.json: "),
    ):
        command = ["prepare", "--input", "big.jsonl", *options]
        done = subprocess.run(
            [sys.executable, "-c", limited.format(command)], cwd=data, capture_output=True, text=True, check=False
        )
        assert (done.returncode, named in done.stderr) == (2, True), done.stderr


def test_inputs_without_text_are_an_error(data):
    """The message has no private class name."""
    (data / "void.jsonl").write_text("")
    with pytest.raises(DataError, match=r"void\.jsonl: no text: no document\. Give files that") as refused:
        run([data / "void.jsonl"], data / "out")

    assert type(refused.value) is DataError


@pytest.mark.parametrize("force", [False, True])
def test_the_validation_prefix_of_another_output_is_refused(data, force):
    """PREFIX-validation belongs to PREFIX if the record of PREFIX says so."""
    run([data / "a.jsonl"], data / "german", holdout=0.2)
    run([data / "a.jsonl"], data / "pile")
    before = snapshot(data)
    with pytest.raises(DataError, match=r"contains the validation data of .*german"):
        run([data / "a.jsonl"], data / "german-validation", force=force)
    assert snapshot(data) == before
    run([data / "a.jsonl"], data / "pile-validation", force=force)

    assert documents_of(data / "pile-validation") == words(60)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out.json", "out.bin", "out.idx", "out-validation.idx", "out.partial/notes.txt"])
def test_files_that_prepare_did_not_write_are_never_replaced(data, name, force):
    """Under any name of the output, before anything is tokenized, also with --force."""
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_text("mine")
    before = snapshot(data)

    with pytest.raises(DataError, match=Path(name).name.replace(".", r"\.")):
        run([data / "a.jsonl"], data / "out", holdout=0.2, force=force)
    assert snapshot(data) == before


def test_a_pair_that_the_record_does_not_describe_is_not_replaced(data):
    """The number of tokens differs from the record."""
    run([data / "a.jsonl"], data / "out", holdout=0.2)
    (data / "v.jsonl").write_text(jsonl(words(7, seed=5)))
    run([data / "v.jsonl"], data / "mine")
    for suffix in ("bin", "idx"):
        os.replace(data / f"mine.{suffix}", data / f"out-validation.{suffix}")
    before = snapshot(data)

    for force in (False, True):
        with pytest.raises(DataError, match=r"out-validation\.(bin|idx)"):
            run([data / "a.jsonl"], data / "out", holdout=0.2, force=force)
    assert snapshot(data) == before
    run([data / "a.jsonl"], data / "out", force=True)
    assert snapshot(data)["out-validation.bin"] == before["out-validation.bin"]


def test_an_output_of_commit_987a5cd_is_recognized(tmp_path):
    """Its record, byte for byte, beside its pairs: nothing is done again, and --force replaces all five files."""
    texts = ["eins", "zwei", "drei", "vier"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(tmp_path / "a.jsonl", ns=(1577836800000000000,) * 2)
    result = run([tmp_path / "a.jsonl"], tmp_path / "out", holdout=0.5)
    (tmp_path / "out.json").write_text(RECORD_OF_987A5CD)
    again = run([tmp_path / "a.jsonl"], tmp_path / "out", holdout=0.5)

    assert (result.counts.tokens, result.counts.held_out_tokens) == (5, 15)
    assert (again.already_done, again.counts) == (True, result.counts)
    assert (tmp_path / "out.json").read_text() == RECORD_OF_987A5CD
    run([tmp_path / "a.jsonl"], tmp_path / "out", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out.bin", "out.idx", "out.json"}


def test_the_record_of_the_output_is_not_an_input(tmp_path):
    """The same command with data/*.json does nothing the second time, although PREFIX.json matches."""
    (tmp_path / "a.json").write_text(jsonl(words(9)))
    assert not run([tmp_path / "*.json"], tmp_path / "out").already_done

    assert run([tmp_path / "*.json"], tmp_path / "out").already_done


def test_a_tokenizer_is_replaced_only_with_force(data):
    """The same training again changes nothing; another tokenizer, or another file, is refused."""
    other = data / "b.jsonl"
    other.write_text(jsonl([text.upper() for text in words(60)]))
    path = data / "tokenizer.json"
    assert train_tokenizer([str(data / "a.jsonl")], "text", 300, path, force=False)
    first = path.read_bytes()
    assert not train_tokenizer([str(data / "a.jsonl")], "text", 300, path, force=False)
    for text, entries, message in [
        (data / "a.jsonl", 301, "it has 300 entries, not 301"),
        (other, 300, "is another tokenizer, fingerprint [0-9a-f]{12}: the one trained now is [0-9a-f]{12}.*--force"),
    ]:
        with pytest.raises(DataError, match=message):
            train_tokenizer([str(text)], "text", entries, path, force=False)
    assert path.read_bytes() == first
    assert train_tokenizer([str(other)], "text", 300, path, force=True)
    assert path.read_bytes() != first

    before = snapshot(data)
    (data / "link.json").symlink_to(other)
    for output, message in [(other, "is an input"), (data / "link.json", "is an input"), (data, "is a folder")]:
        with pytest.raises(DataError, match=message):
            train_tokenizer([str(other)], "text", 300, output, force=True)
    with pytest.raises(DataError, match="is not a tokenizer, so it is not replaced"):
        train_tokenizer([str(other)], "text", 300, data / "a.jsonl", force=True)
    (data / "link.json").unlink()
    assert snapshot(data) == before


@pytest.mark.parametrize("train", ["x.bin", "x.idx", "x"])
def test_a_source_prepares_the_pair_that_training_reads(data, train):
    """data/x.bin means the pair data/x for reading and for writing; also with a hold-out."""
    lines: list[str] = []
    for is_first in (True, False):
        config = config_of(
            data,
            str(data / train),
            str(data / "a.jsonl"),
            validation=str(data / "x-validation.bin"),
            source="holdout = 0.2",
        )
        assert prepare_missing_data(config, workers=1, log=lines.append) == is_first

    assert len(lines) == 2, "the second time there was nothing to prepare"
    assert {path.name for path in data.iterdir()} - {"a.jsonl", "config.toml"} == {
        "x.bin", "x.idx", "x.json", "x-validation.bin", "x-validation.idx",
    }  # fmt: skip


def test_finished_parts_stay_and_useless_ones_are_removed(data, small_chunks):
    """An error late in the text keeps PREFIX.partial and names it; one in the first part, or no documents, does not."""
    lines = (data / "a.jsonl").read_text().splitlines()
    (data / "late.jsonl").write_text("\n".join([*lines, "{"]))
    (data / "early.jsonl").write_text("{\n")
    (data / "empty.jsonl").write_text(jsonl([" "]))
    with pytest.raises(
        DataError, match=r"late\.jsonl:61: is not JSON.*kept in .*late\.partial: the same command resumes"
    ):
        run([data / "late.jsonl"], data / "late")
    for name, options in [("early", {}), ("empty", {}), ("a", {"holdout": 1e-9})]:
        with pytest.raises(DataError) as caught:
            run([data / f"{name}.jsonl"], data / name, **options)
        assert "kept" not in str(caught.value)

    assert [path.name for path in data.glob("*.partial")] == ["late.partial"]


def test_without_a_terminal_progress_is_a_line_now_and_then(data, small_chunks, monkeypatch, capsys):
    """On stderr, with the fraction of the input; the last line names both outputs and the tokenizer."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = run([data / "a.jsonl"], data / "out", holdout=0.2, show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    counts = result.counts

    assert len(lines) == result.chunks > 1
    assert lines[-1].startswith(f"{data / 'out'}: 100% of the input, 60 documents, ")
    assert result.summary == (
        f"{data / 'out'}: {counts.documents} documents, {counts.tokens:,} tokens; {data / 'out-validation'}: "
        f"{counts.held_out_documents} documents, {counts.held_out_tokens:,} tokens; tokenizer: bytes (257 ids)"
    )


@pytest.mark.parametrize("show", [True, False])
def test_progress_of_a_run_s_data_can_be_hidden(data, small_chunks, monkeypatch, capsys, show):
    """As --quiet does; the lines of the result stay."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    config = config_of(data, str(data / "x"), str(data / "a.jsonl"))
    prepare_missing_data(config, workers=1, log=lines.append, show_progress=show)

    assert (capsys.readouterr().err != "") == show
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "data/"], "data/: is a folder"),
        (["--output", "."], ".: is a folder"),
        (["--output", "data/", "--train-tokenizer", "300"], "data/ is a folder: name the file"),
        (["--output", "data", "--train-tokenizer", "300"], "data: is a folder; name the file to write"),
    ],
)
def test_a_folder_as_output_is_refused(data, arguments, message):
    """`--output data/` wrote data.bin beside the folder."""
    (data / "data").mkdir()
    before = snapshot(data)
    ended = titan("prepare", "--input", "a.jsonl", *arguments, cwd=data)

    assert (ended.returncode, message in ended.stderr, "Traceback" in ended.stderr) == (2, True, False)
    assert snapshot(data) == before


def test_a_folder_as_input_is_refused_with_globs_for_its_files(data):
    """At its top or one level down."""
    (data / "raw" / "txt").mkdir(parents=True)
    (data / "raw" / "txt" / "1.txt").write_text("a")
    (data / "raw" / "txt" / "1.jsonl.gz").write_text("a")
    (data / "none").mkdir()
    for name, message in [
        ("raw/txt", r"is a folder: name its files, such as '.*raw/txt/\*\.txt' '.*raw/txt/\*\.jsonl\.gz'"),
        ("raw/", r"is a folder: name its files, such as '.*raw/\*/\*\.txt'"),
        ("none", "is a folder: name files, not folders; it contains no supported file"),
    ]:
        with pytest.raises(DataError, match=message):
            run([f"{data}/{name}"], data / "out")


def test_the_byte_tokenizer_is_announced_if_it_is_the_default(data):
    """Before the work, and always in the last line."""
    by_default = titan("prepare", "--input", "a.jsonl", "--output", "x", cwd=data)
    on_purpose = titan("prepare", "--input", "a.jsonl", "--output", "y", "--tokenizer", "bytes", cwd=data)

    assert "note: no --tokenizer was given: every byte becomes a token" in by_default.stderr
    assert by_default.stdout.endswith("tokenizer: bytes (257 ids)\n")
    assert (on_purpose.stderr, on_purpose.stdout.endswith("tokenizer: bytes (257 ids)\n")) == ("", True)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_prints_one_line_and_the_same_command_resumes(tmp_path, workers):
    """Status 130 in a shell, no traceback from any process; finished parts are used."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(1500)))
    script = tmp_path / "titan.py"
    script.write_text(
        "import sys\nfrom titan_cpt import cli\nfrom titan_cpt.data.prepare import chunks\n"
        "chunks.SMALLEST_CHUNK_BYTES = chunks.LARGEST_CHUNK_BYTES = 2000\n"
        'if __name__ == "__main__":\n    cli.main(sys.argv[1:])\n'
    )
    command = [
        sys.executable,
        str(script),
        "prepare",
        "--input",
        "a.jsonl",
        "--output",
        "out",
        "--workers",
        str(workers),
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.partial/*.json")):
            assert process.poll() is None, "it was to be interrupted before it was done"
            assert time.monotonic() < deadline, "no part appeared"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if not line.startswith("note: ")]

    assert process.returncode == -signal.SIGINT, "which a shell reports as 130"
    kept = "finished parts are kept in out.partial: the same command resumes from them"
    assert lines == [f"stopped by Ctrl-C: out: not prepared; {kept}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, "parts were finished by an earlier run" in ended.stdout) == (0, True)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("file/out", errno.ENOTDIR),
        ("loop/out", errno.ELOOP),
        ("n" * 300, errno.ENAMETOOLONG),
        ("n" * 245, errno.ENAMETOOLONG),
    ],
)
def test_an_output_that_cannot_be_written_is_an_error(data, path, number):
    """Before anything is tokenized, also if only the name of the validation pair is too long."""
    (data / "file").write_text("mine")
    (data / "loop").symlink_to(data / "loop")
    before = snapshot(data)
    for more in (["--holdout", "0.2"], ["--train-tokenizer", "300"] if len(path) != 245 else ["--holdout", "0.1"]):
        tokenizer = [] if "--train-tokenizer" in more else ["--tokenizer", "bytes"]
        ended = titan("prepare", "--input", "a.jsonl", "--output", path, *tokenizer, *more, cwd=data)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
        assert os.strerror(number) in ended.stderr
        assert len(ended.stderr.splitlines()) == 1

    assert snapshot(data) == before
