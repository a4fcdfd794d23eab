"""`titan-cpt prepare` interrupted: finished parts are reused, and the output is complete or absent."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepared import documents_of, jsonl, make_inputs, outputs, run, words

from titan_cpt.data.formats.indexed import IndexedTokens
from titan_cpt.data.prepare.chunks import Chunk, read_chunks
from titan_cpt.data.prepare.parallel import encode_all
from titan_cpt.data.prepare.shards import TokenizeJob
from titan_cpt.data.prepare.text_inputs import find_inputs
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError

KILLED = """
import sys
from pathlib import Path
from titan_cpt.data.prepare import chunks
from titan_cpt.data.prepare.prepare import prepare
chunks.SMALLEST_CHUNK_BYTES = chunks.LARGEST_CHUNK_BYTES = 2000
if __name__ == "__main__":
    prepare(inputs=sys.argv[3:], output=Path(sys.argv[1]), tokenizer="bytes", holdout=0.2, workers=int(sys.argv[2]))
"""


def test_a_killed_worker_is_named_also_when_the_next_chunk_is_submitted(tmp_path):
    """As the out-of-memory killer does; `concurrent.futures` then refuses further chunks."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(10)))
    (chunk,) = read_chunks(find_inputs([str(tmp_path / "a.jsonl")]), "text")
    tokenizer = load_tokenizer("bytes")
    job = TokenizeJob("bytes", tokenizer.fingerprint, "text", 0.0, tmp_path)

    def chunks_and_a_kill() -> Iterator[Chunk]:
        yield from (chunk, chunk, chunk)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        time.sleep(0.5)  # the pool notices
        yield from (chunk, chunk)

    with pytest.raises(DataError, match="a worker process was killed, probably for lack of memory"):
        encode_all(chunks_and_a_kill(), job, tokenizer=tokenizer, workers=2, finished=lambda chunk, shard: None)


@pytest.mark.parametrize(
    ("workers", "how", "shards_done"),
    [(1, signal.SIGKILL, 1), (2, signal.SIGKILL, 12), (1, signal.SIGINT, 12), (2, signal.SIGINT, 1)],
)
def test_a_killed_run_that_resumes_gives_the_same_bytes(tmp_path, small_chunks, workers, how, shards_done):
    """No incomplete output, no process left; finished chunks are reused."""
    inputs = make_inputs(tmp_path)
    (tmp_path / "script.py").write_text(KILLED)
    (tmp_path / "straight").mkdir()
    straight = run(inputs, tmp_path / "straight" / "out", holdout=0.2)
    (tmp_path / "killed").mkdir()
    output = tmp_path / "killed" / "out"
    command = [sys.executable, str(tmp_path / "script.py"), str(output), str(workers), *map(str, inputs)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while len(list(output.parent.glob("out.partial/*.json"))) < shards_done:
            assert process.poll() is None, "it was to be killed before it was done"
            assert time.monotonic() < deadline, "no shard appeared"
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # as a terminal does on Ctrl-C
    assert process.returncode != 0
    assert not output.with_suffix(".idx").exists()
    with pytest.raises(ProcessLookupError):
        wait_for_group(process.pid)
    result = run(inputs, output, holdout=0.2)

    assert shards_done <= result.reused_chunks < result.chunks == straight.chunks
    assert outputs(output) == outputs(tmp_path / "straight" / "out")


@pytest.mark.parametrize("files_in_place", range(5))
def test_the_next_run_completes_one_that_was_killed_while_renaming(tmp_path, monkeypatch, files_in_place):
    """Between any two renames: an existing .idx means a complete pair, and the next run gives the same bytes."""
    inputs = make_inputs(tmp_path)
    (tmp_path / "straight").mkdir()
    run(inputs, tmp_path / "straight" / "out", holdout=0.2)
    (tmp_path / "killed").mkdir()
    output = tmp_path / "killed" / "out"
    run(inputs[:1], output, holdout=0.1)  # an older output is being replaced
    replace, remaining = os.replace, [files_in_place]

    def replace_some(source: str, target: str) -> None:
        if Path(target).parent == output.parent:
            if not remaining[0]:
                raise KeyboardInterrupt
            remaining[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, output, holdout=0.2, force=True)
    monkeypatch.setattr(os, "replace", replace)
    for prefix in (output, Path(f"{output}-validation")):
        if Path(f"{prefix}.idx").exists():
            IndexedTokens(prefix, vocab_size=257)
    result = run(inputs, output, holdout=0.2)

    assert (result.already_done, result.reused_chunks) == (False, result.chunks)
    assert outputs(output) == outputs(tmp_path / "straight" / "out")


def test_a_damaged_shard_is_made_again(tmp_path, small_chunks):
    """A finished chunk is accepted by its files, not only by its counts."""
    lines = jsonl(words(300)).splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:250], "{", *lines[251:]]) + "\n")
    with pytest.raises(DataError, match="251"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")
    for number, path in enumerate(sorted(tmp_path.glob("out.partial/*.bin"))):
        if number % 4 == 0:
            path.write_bytes(path.read_bytes()[:-2])
        elif number % 4 == 1:
            path.unlink()
        elif number % 4 == 2:
            path.write_bytes(bytes(path.stat().st_size))  # as after a power failure
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    run([tmp_path / "a.jsonl"], tmp_path / "out")

    assert documents_of(tmp_path / "out") == words(300)


def wait_for_group(group: int) -> None:
    """Raise ProcessLookupError as soon as no process of the group is left."""
    for _ in range(100):
        os.killpg(group, 0)
        time.sleep(0.1)


def test_an_error_keeps_the_finished_parts(tmp_path, small_chunks):
    """After the line is corrected, only new chunks are tokenized, and the result is that of an uninterrupted run."""
    documents = words(300)
    lines = jsonl(documents).splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:250], "{", *lines[251:]]) + "\n")
    with pytest.raises(DataError, match="251"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    result = run([tmp_path / "a.jsonl"], tmp_path / "out")

    assert documents_of(tmp_path / "out") == documents
    assert 0 < result.reused_chunks < result.chunks


def test_shards_of_other_options_are_not_reused(tmp_path, small_chunks):
    """Text field, hold-out and tokenizer determine a shard."""
    lines = [json.dumps({"text": f"{n} text", "body": f"{n} body", "id": n}) for n in range(100)]
    train_bpe(words(500), 300, tmp_path / "tokenizer.json")
    recipes = [{}, {"text_field": "body"}, {"holdout": 0.5}, {"tokenizer": str(tmp_path / "tokenizer.json")}]
    for number, options in enumerate(recipes):
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        run([tmp_path / "a.jsonl"], tmp_path / f"straight{number}", **options)
        (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
        with pytest.raises(DataError, match="101"):
            run([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for number, options in enumerate(recipes):
        shutil.copytree(tmp_path / "out.partial", tmp_path / f"copy{number}.partial")
        result = run([tmp_path / "a.jsonl"], tmp_path / f"copy{number}", **options)
        assert 0 < result.reused_chunks < result.chunks
        copied, straight = outputs(tmp_path / f"copy{number}"), outputs(tmp_path / f"straight{number}")

        assert list(copied.values()) == list(straight.values())


def test_the_same_command_again_does_nothing_and_says_so(tmp_path):
    """Also with more workers; a changed input or option is refused with the difference."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(50)))
    (tmp_path / "b.jsonl").write_text(jsonl(words(5)))
    first = run([tmp_path / "a.jsonl"], tmp_path / "out", holdout=0.2)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}
    again = run([tmp_path / "a.jsonl"], tmp_path / "out", holdout=0.2, workers=2)
    assert (again.counts, again.already_done, first.already_done) == (first.counts, True, False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")} == made

    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for inputs, options, message in [
        (both[:1], {"holdout": 0.1}, r"holdout 0.2 -> 0.1\. .*--force"),
        (both[:1], {"holdout": 0.2, "text_field": "id"}, "text_field text -> id"),
        (both, {"holdout": 0.2}, "1 inputs -> 2"),
        (both[1:], {"holdout": 0.2}, r"input .*a\.jsonl.* -> .*b\.jsonl"),
    ]:
        with pytest.raises(DataError, match=message):
            run(inputs, tmp_path / "out", **options)
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    with pytest.raises(DataError, match="changed_ns"):
        run(both[:1], tmp_path / "out", holdout=0.2)


def test_force_replaces_the_output_and_its_validation_data(tmp_path):
    """No validation pair of the old recipe stays beside the new output."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(50)))
    run([tmp_path / "a.jsonl"], tmp_path / "out", holdout=0.2)
    result = run([tmp_path / "a.jsonl"], tmp_path / "out", force=True)

    assert documents_of(tmp_path / "out") == words(50)
    assert (result.already_done, outputs(tmp_path / "out").keys()) == (False, {"out.bin", "out.idx"})


def test_an_output_without_a_record_is_not_replaced(tmp_path):
    """Megatron data from elsewhere has no record; a damaged output is not accepted as finished."""
    (tmp_path / "a.txt").write_text("a")
    run([tmp_path / "a.txt"], tmp_path / "out")
    whole = (tmp_path / "out.bin").read_bytes()
    (tmp_path / "out.bin").write_bytes(whole[:2])
    with pytest.raises(DataError, match="out"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "out.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(DataError, match=r"out\.idx, .*out\.bin, .*out\.json: exist, and were not written by"):
            run([tmp_path / "a.txt"], tmp_path / "out", force=force)
    (tmp_path / "out.json").unlink()

    for force in (False, True):
        with pytest.raises(DataError, match=r"not written by `prepare` \(there is no record .*out\.json\)"):
            run([tmp_path / "a.txt"], tmp_path / "out", force=force)
    assert (tmp_path / "out.bin").read_bytes() == whole[:2]


def test_two_runs_do_not_write_one_output_at_once(tmp_path):
    """The second is refused; the lock ends with its process."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out.partial").mkdir()
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True);"
    command = [sys.executable, "-c", f"{code} time.sleep(60)", str(tmp_path / "out.partial" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="another process is preparing it"):
            run([tmp_path / "a.txt"], tmp_path / "out")
        other.kill()
    run([tmp_path / "a.txt"], tmp_path / "out")

    assert documents_of(tmp_path / "out") == ["a"]


def test_there_is_no_progress_bar_without_a_terminal(tmp_path, capfd):
    """Logs of a batch job stay clean."""
    (tmp_path / "a.txt").write_text("a")
    run([tmp_path / "a.txt"], tmp_path / "out", show_progress=True)

    assert capfd.readouterr() == ("", "")


def test_files_that_a_kill_leaves_in_the_partial_folder_are_removed(tmp_path):
    """Temporary files of shards, pairs and the record, and NFS's names for removed open files."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out.partial").mkdir()
    digest = "0123456789abcdef" * 2
    for name in (
        "lock", "record.json", ".record.json.12-0.tmp", f"{digest}.json", f"{digest}.12.json.tmp", f"{digest}.bin",
        f"{digest}-validation.idx", f".{digest}.12.tmp.bin", f".{digest}-validation.12.tmp.idx", "joined.bin",
        "joined-validation.idx", ".joined.12.tmp.bin", ".joined-validation.12.tmp.idx", ".nfs00000000012a4b2f00000001",
    ):  # fmt: skip
        (tmp_path / "out.partial" / name).touch()
    run([tmp_path / "a.txt"], tmp_path / "out")

    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out.bin", "out.idx", "out.json"}
