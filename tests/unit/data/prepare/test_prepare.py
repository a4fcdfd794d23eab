"""Text to .bin/.idx: every format, errors with file and line, the same bytes from any number of processes."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import documents_of, jsonl, make_inputs, outputs, run, words
from tokenizers import Tokenizer, models, pre_tokenizers

from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.prepare import chunks, json_lines, shards
from titan_cpt.data.prepare.chunks import iterate_texts, read_chunks
from titan_cpt.data.prepare.text_inputs import find_inputs, missing_inputs
from titan_cpt.data.tokenizer import gigatoken_backend
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import ConfigError, DataError

DOCUMENTS = ["first", "zweiter Text: äöü", "third\nwith lines", "4"]


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "id": range(4)}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_text(jsonl(DOCUMENTS))),
        ("bom.jsonl", lambda path: path.write_text("\ufeff" + jsonl(DOCUMENTS))),
        ("crlf.jsonl", lambda path: path.write_bytes(b"\r\n" + jsonl(DOCUMENTS).replace("\n", "\r\n").encode())),
        ("open.jsonl", lambda path: path.write_text(jsonl(DOCUMENTS).rstrip("\n"))),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(jsonl(DOCUMENTS).encode()))),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstandard.compress(jsonl(DOCUMENTS).encode()))),
        ("two_frames.jsonl.zst", lambda path: path.write_bytes(
            zstandard.compress(jsonl(DOCUMENTS[:1]).encode()) + zstandard.compress(jsonl(DOCUMENTS[1:]).encode()))),
        ("lines.json", lambda path: path.write_text("\n\n" + jsonl(DOCUMENTS))),
        ("array.json", lambda path: path.write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))),
        ("array.json.gz", lambda path: path.write_bytes(
            gzip.compress(json.dumps([{"text": text} for text in DOCUMENTS]).encode()))),
        ("a.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(jsonl(DOCUMENTS).encode()))),
        ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(jsonl(DOCUMENTS).encode()))),
        ("bom.json", lambda path: path.write_text("\ufeff" + json.dumps([{"text": text} for text in DOCUMENTS]))),
        ("bom_spaces.json", lambda path: path.write_text("\ufeff\n " + json.dumps([{"text": t} for t in DOCUMENTS]))),
        ("bom_lines.json", lambda path: path.write_text("\ufeff" + jsonl(DOCUMENTS))),
        ("bom.json.gz", lambda path: path.write_bytes(
            gzip.compress(("\ufeff" + json.dumps([{"text": text} for text in DOCUMENTS])).encode()))),
        ("joined.jsonl", lambda path: path.write_text(
            "".join("\ufeff" + jsonl([text]) for text in DOCUMENTS))),
        ("a.parquet", write_parquet),
    ],
)  # fmt: skip
def test_every_format_gives_its_documents_in_order(tmp_path, name, write):
    """Plain and compressed, with and without a last line end, as lines, arrays and columns."""
    write(tmp_path / name)
    result = run([tmp_path / name], tmp_path / "out")

    assert documents_of(tmp_path / "out") == DOCUMENTS
    assert list(iterate_texts([str(tmp_path / name)])) == DOCUMENTS
    assert (result.counts.documents, result.counts.bytes) == (4, sum(len(text.encode()) for text in DOCUMENTS))
    assert result.counts.tokens == result.counts.bytes + 4


def test_text_files_are_one_document_each_and_globs_are_sorted(tmp_path):
    """Among other formats too; a byte order mark is dropped, line ends are kept."""
    for number, text in [(2, "two\r\n"), (1, "\ufeffone"), (3, "three")]:
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "4.txt.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "a.jsonl").write_text(jsonl(["json"]))
    run([tmp_path / "[12].txt", tmp_path / "a.jsonl", tmp_path / "3.txt", tmp_path / "4.*"], tmp_path / "out")

    assert documents_of(tmp_path / "out") == ["one", "two\r\n", "json", "three", "four"]


def test_hub_datasets_are_streamed(tmp_path, monkeypatch):
    """A local folder stands for a name on the hub; another split is another part; changed data is another input."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(jsonl(DOCUMENTS, "body"))
    (tmp_path / "set" / "test.jsonl").write_text(jsonl(["held"], "body"))
    name = f"hub:{tmp_path / 'set'}"
    run([name], tmp_path / "out", text_field="body")
    run([f"{name}::test"], tmp_path / "test", text_field="body")
    assert documents_of(tmp_path / "out") == DOCUMENTS
    assert documents_of(tmp_path / "test") == ["held"]
    assert run([name], tmp_path / "out", text_field="body").already_done

    (tmp_path / "set" / "train.jsonl").write_text(jsonl(["new"], "body"))
    with pytest.raises(DataError, match="made differently: input"):
        run([name], tmp_path / "out", text_field="body")
    with pytest.raises(DataError, match=r"train\.jsonl:1: no field 'text'; its fields are body, id"):
        run([name], tmp_path / "other")
    with pytest.raises(DataError, match=r"hub:/.*/none: there is no folder '/.*/none' on this machine$"):
        run([f"hub:{tmp_path / 'none'}"], tmp_path / "other")
    with pytest.raises(DataError, match=r"there is no folder '/.*/sett' on this machine, but '/.*/set'$"):
        run([f"hub:{tmp_path / 'sett'}"], tmp_path / "other")
    with pytest.raises(DataError, match=r"train\.jsonl: is a file on this machine: name it without 'hub:'"):
        run([f"{name}/train.jsonl"], tmp_path / "other")


def test_empty_documents_are_skipped_and_counted(tmp_path):
    """Also those of only white space."""
    (tmp_path / "a.jsonl").write_text(jsonl(["", "a", " \n\t ", "b"]))
    result = run([tmp_path / "a.jsonl"], tmp_path / "out")

    assert documents_of(tmp_path / "out") == ["a", "b"]
    assert (result.counts.documents, result.counts.empty_documents) == (2, 2)
    assert list(iterate_texts([str(tmp_path / "a.jsonl")])) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3: is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: no field 'text'; its fields are txt: .*--text-f"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"a\.jsonl:2: 'text' is None; allowed is a string"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: is \['a'\]; allowed is an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: the text contains '\\ud800', half of a surrogate pair"),
        ("a.txt", b"one\ntwo \xe4\n", r"a\.txt:2: byte 0xe4 is not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": 5}]', r"a\.json: row 2: 'text' is 5"),
        ("a.json", b'[{"text": "a"}, 7]', r"a\.json: row 2: is 7; allowed is an object"),
        ("a.json", b'[{"text": "a"}', r"a\.json: is not JSON"),
        ("a.jsonl.gz", gzip.compress(jsonl(words(500)).encode())[:-20], r"a\.jsonl\.gz: damaged or incomplete"),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz: damaged or incomplete"),
        ("a.jsonl.zst", zstandard.compress(jsonl(words(500)).encode())[:-20], r"a\.jsonl\.zst: ends within"),
        ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst: damaged"),
        ("a.jsonl.zst", zstandard.compress(b"{}\n") + zstandard.compress(jsonl(words(500)).encode())[:-9],
         r"a\.jsonl\.zst: ends within"),
        ("a.jsonl.bz2", bz2.compress(jsonl(words(500)).encode())[:-20], r"a\.jsonl\.bz2: damaged or incomplete"),
        ("a.jsonl.xz", lzma.compress(jsonl(words(500)).encode())[:-20], r"a\.jsonl\.xz: damaged or incomplete"),
        ("a.jsonl.xz", b"no xz at all", r"a\.jsonl\.xz: damaged or incomplete"),
        *[(f"a.jsonl{suffix}", b"", rf"a\.jsonl\{suffix}: 0 bytes, .*the file is incomplete; copy it again")
          for suffix in (".gz", ".zst")],
        ("a.jsonl.bz2", b"", r"a\.jsonl\.bz2: damaged or incomplete"),
        ("a.jsonl.xz", b"", r"a\.jsonl\.xz: damaged or incomplete"),
        ("a.txt.zst", b"", r"a\.txt\.zst: 0 bytes"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt: looks like UTF-16; convert it to UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt: looks like UTF-16"),
        ("a.jsonl", jsonl(["a"]).encode("utf-16"), r"a\.jsonl: looks like UTF-16"),
        ("a.jsonl", jsonl(["a"]).encode("utf-16-be"), r"a\.jsonl: looks like UTF-16"),
        ("a.json", b"[]".decode().encode("utf-16"), r"a\.json: looks like UTF-16"),
        ("a.parquet", b"no parquet at all", r"a\.parquet: cannot be read as parquet"),
        ("a.csv", b"text\n", r"a\.csv: unsupported file type; allowed are \.txt, \.jsonl"),
        ("a.txt", b" ", r"a\.txt: no text: 1 document, all empty\. Give files that contain text"),
        (None, b"", r"none\.txt: no such file"),
    ],
)  # fmt: skip
def test_invalid_input_is_named_with_file_and_line(tmp_path, name, content, message):
    """A DataError with what was found and what is allowed; no file that looks like an output remains."""
    if name:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message):
        run([tmp_path / (name or "none.txt")], tmp_path / "out")
    assert not list(tmp_path.glob("out.[!p]*"))


def test_errors_in_workers_have_line_numbers_of_the_whole_file(tmp_path, small_chunks):
    """Line numbers count through the chunks."""
    lines = jsonl(words(300)).splitlines()
    lines[250] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:251: is not JSON"):
            run([tmp_path / "a.jsonl"], tmp_path / "out", workers=workers)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    """`prepare` cannot know which one is meant."""
    table = pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")

    with pytest.raises(DataError, match=r"a\.parquet: has several columns 'text'"):
        run([tmp_path / "a.parquet"], tmp_path / "out")


def test_parquet_columns_and_nulls_are_checked(tmp_path):
    """The message for a missing column lists the columns; a null is named with its row."""
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None], "id": [1, 2]}), tmp_path / "a.parquet")

    with pytest.raises(DataError, match="no column 'text'; its columns are body, id"):
        run([tmp_path / "a.parquet"], tmp_path / "out")
    with pytest.raises(DataError, match="row 2: 'body' is None"):
        run([tmp_path / "a.parquet"], tmp_path / "out", text_field="body")


def test_options_out_of_range_and_inputs_named_twice_are_refused(tmp_path):
    """Before anything is read."""
    (tmp_path / "a.txt").write_text("a")
    for options, message in [
        ({"holdout": 1.0}, r"--holdout: must be in \[0, 1\), got 1.0"),
        ({"holdout": -0.1}, "--holdout"),
        ({"workers": 0}, "--workers: must be 1 or more, got 0"),
        ({"text_field": ""}, "--text-field"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run([tmp_path / "a.txt"], tmp_path / "out", **options)

    with pytest.raises(DataError, match="second time"):
        run([tmp_path / "a.txt", tmp_path / "*.txt"], tmp_path / "out")
    with pytest.raises(DataError, match="no input"):
        run([], tmp_path / "out")
    assert missing_inputs([str(tmp_path / "*.txt"), str(tmp_path / "b.*"), "hub:x"]) == [str(tmp_path / "b.*")]


def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path, small_chunks):
    """One process and two, byte for byte, with a trained tokenizer and a hold-out."""
    inputs = make_inputs(tmp_path)
    train_bpe(words(500), 300, tmp_path / "tokenizer.json")
    results = []
    for workers in (1, 2):
        (tmp_path / f"w{workers}").mkdir()
        output = tmp_path / f"w{workers}" / "out"
        result = run(inputs, output, tokenizer=str(tmp_path / "tokenizer.json"), holdout=0.2, workers=workers)
        results.append((replace(result, output=Path()), outputs(output)))

    assert results[0] == results[1]
    assert results[0][1].keys() == {"out.bin", "out.idx", "out-validation.bin", "out-validation.idx"}
    assert results[0][0].chunks > 20


def test_a_part_stays_whole_while_another_process_writes_it_too(tmp_path):
    """Two chunks of equal content have one part, which two workers may write while a third process reads it."""
    (tmp_path / "a.jsonl").write_text(jsonl(words(300)))
    (chunk,) = read_chunks(find_inputs([str(tmp_path / "a.jsonl")]), "text")
    job = shards.TokenizeJob("bytes", load_tokenizer("bytes").fingerprint, "text", 0.0, tmp_path)
    part = shards.make_shard(chunk, job).prefix
    missing = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if shards.finished_counts(part) is None:
                missing.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100):
        shards.encode_chunk(chunk.loaded(), job)
    stop.set()
    reader.join()

    assert not missing


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_long_documents_are_tokenized_in_pieces_to_the_same_bytes(tmp_path, monkeypatch, tokenizer, holdout):
    """Same tokens, same side of the hold-out, same counts; a long blank document is empty."""
    if tokenizer == "bpe":
        train_bpe(words(500), 300, tmp_path / "bpe")
        tokenizer = str(tmp_path / "bpe")
    documents = [text * 9 for text in words(60)] + [" " * 900] + ['\u2013 \U0001f600 \n"' * 200]
    (tmp_path / "a.jsonl").write_text(jsonl(documents))
    whole = run([tmp_path / "a.jsonl"], tmp_path / "whole" / "out", tokenizer=tokenizer, holdout=holdout)
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 500)
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 100)
    monkeypatch.setattr(gigatoken_backend, "PIECE_CHARACTERS", 70)
    pieces = run([tmp_path / "a.jsonl"], tmp_path / "pieces" / "out", tokenizer=tokenizer, holdout=holdout)

    assert whole.counts == pieces.counts
    assert whole.counts.empty_documents == 1
    assert outputs(tmp_path / "whole" / "out") == outputs(tmp_path / "pieces" / "out")
    assert list(iterate_texts([str(tmp_path / "a.jsonl")])) == [text for text in documents if text.strip()]


def test_forked_workers_write_the_bytes_of_spawned_ones(tmp_path):
    """The command forks its workers; in this process, which has loaded pyarrow, they are spawned."""
    train_bpe(words(500), 300, tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text * 300}) for text in words(500)))
    for name in ("forked", "spawned"):
        (tmp_path / name).mkdir()
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "holdout": 0.2, "workers": 2}
    assert "pyarrow" in sys.modules
    assert run([tmp_path / "a.jsonl"], tmp_path / "spawned" / "out", **options).chunks > 2
    code = """
import concurrent.futures, multiprocessing, sys
used = []
class Pool(concurrent.futures.ProcessPoolExecutor):
    def __init__(self, *arguments, **options):
        used.append(options["mp_context"].get_start_method())
        super().__init__(*arguments, **options)
concurrent.futures.ProcessPoolExecutor = Pool
from titan_cpt.cli import main
try:
    main()
finally:
    print(used)
"""
    command = ["prepare", "--input", "a.jsonl", "--output", "forked/out", "--tokenizer", "tokenizer.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--holdout", "0.2", "--workers", "2"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == ("['fork']" if sys.platform == "linux" else "['spawn']")
    assert outputs(tmp_path / "forked" / "out") == outputs(tmp_path / "spawned" / "out")


def test_the_output_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
    """One chunk per file and many: the same bytes, in the order of the inputs."""
    inputs = make_inputs(tmp_path)
    whole = run(inputs, tmp_path / "whole")
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK_BYTES", 1500)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK_BYTES", 1500)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 50)
    cut = run(inputs, tmp_path / "cut")

    assert whole.chunks < cut.chunks
    assert documents_of(tmp_path / "whole") == [text for n, seed in ((400, 1), (300, 2), (30, 3), (300, 4))
                                                for text in words(n, seed)]  # fmt: skip
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"cut{suffix}").read_bytes()


def test_the_validation_share_is_as_requested_and_depends_only_on_the_text(tmp_path):
    """Within five standard deviations; the same documents in any order; duplicates on one side; larger shares contain
    smaller ones; together both sides are everything.
    """
    documents = words(4000)
    (tmp_path / "a.jsonl").write_text(jsonl(documents + documents[:500]))
    (tmp_path / "b.jsonl").write_text(jsonl(documents[::-1]))
    first = run([tmp_path / "a.jsonl"], tmp_path / "a", holdout=0.05)
    run([tmp_path / "b.jsonl"], tmp_path / "b", holdout=0.05)
    run([tmp_path / "b.jsonl"], tmp_path / "c", holdout=0.2)
    held = {name: documents_of(tmp_path / f"{name}-validation") for name in "abc"}
    kept = documents_of(tmp_path / "a")

    assert abs(len(set(held["a"])) - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5
    assert set(held["a"]) == set(held["b"]) < set(held["c"])
    assert not set(held["a"]) & set(kept)
    assert sorted(kept + held["a"]) == sorted(documents + documents[:500])
    assert (first.counts.documents, first.counts.held_out_documents) == (len(kept), len(held["a"]))
    assert first.counts.held_out_tokens == TokenStream([tmp_path / "a-validation"]).tokens
    assert first.counts.held_out_bytes == sum(map(len, held["a"]))


def test_a_hold_out_that_would_be_empty_is_refused(tmp_path):
    """Before training would find no validation data."""
    (tmp_path / "a.txt").write_text("a")

    with pytest.raises(DataError, match=r"--holdout 1e-09 makes 0 of 1 documents validation data"):
        run([tmp_path / "a.txt"], tmp_path / "out", holdout=1e-9)


def test_a_tokenizer_file_that_changed_is_read_again(tmp_path):
    """Two runs in one process, with another file at the same path in between."""
    (tmp_path / "a.txt").write_text("one zwei drei four")
    for name, training in (("first", words(300)), ("second", ["eins zwo dreizehn vierzig"] * 20)):
        train_bpe(training, 262, tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").replace(tmp_path / "tokenizer.json")
        result = run([tmp_path / "a.txt"], tmp_path / name, tokenizer=str(tmp_path / "tokenizer.json"))
        expected = load_tokenizer(str(tmp_path / "tokenizer.json")).encode("one zwei drei four")

        assert TokenStream([tmp_path / name]).read(0, result.counts.tokens).tolist()[:-1] == expected


def test_a_tokenizer_file_that_changes_during_a_run_is_refused(tmp_path):
    """A shard is never made with another tokenizer than that in the record."""
    train_bpe(words(300), 262, tmp_path / "tokenizer.json")
    job = shards.TokenizeJob(str(tmp_path / "tokenizer.json"), "0" * 64, "text", 0.0, tmp_path)

    with pytest.raises(DataError, match="changed since this run began"):
        shards.encode_chunk(chunks.Chunk("x", "row", 1, ("a",)), job)


def word_level(folder: Path) -> str:
    """A tokenizer that knows two words."""
    library = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "words.json"))
    return str(folder / "words.json")


def test_characters_that_become_the_unknown_token_are_counted(tmp_path, small_chunks):
    """Characters, documents and the most frequent characters, over all chunks and workers, with validation data."""
    documents = ["one two", "one xx", "xy two x\u00e9", *["one"] * 60]
    (tmp_path / "a.jsonl").write_text(jsonl(documents))
    results = [
        run([tmp_path / "a.jsonl"], tmp_path / str(workers), tokenizer=word_level(tmp_path), workers=workers)
        for workers in (1, 2)
    ]
    counts = results[0].counts

    assert results[0].counts == results[1].counts
    assert (counts.lost_documents, counts.lost_characters) == (2, 6)
    assert counts.lost == {"x": 4, "y": 1, "\u00e9": 1}
    assert "6 characters in 2 documents have no token" in results[0].summary
    assert "'x' 4, 'y' 1, '\u00e9' 1 times" in results[0].summary
    again = run([tmp_path / "a.jsonl"], tmp_path / "1", tokenizer=word_level(tmp_path))
    assert again.already_done
    assert again.counts == counts


def test_characters_that_a_bpe_without_an_unknown_token_drops_are_counted_too(tmp_path):
    """It drops characters without a trace."""
    library = Tokenizer(
        models.BPE({token: number for number, token in enumerate(["</s>", "a", "b", "ab"])}, [("a", "b")])
    )
    library.save(str(tmp_path / "bpe.json"))
    (tmp_path / "a.jsonl").write_text(jsonl(["ab\u00e9", "\u4e2d b \u4e2d", "ab"]))
    counts = run([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "bpe.json")).counts

    assert (counts.lost_documents, counts.lost_characters) == (2, 3)
    assert counts.lost == {"\u4e2d": 2, "\u00e9": 1}


def test_nothing_is_lost_with_bytes_and_byte_level_tokenizers(tmp_path):
    """And there is no note."""
    train_bpe(words(300), 262, tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text(jsonl(["\u00e9\u4e2d \x00"]))
    for tokenizer in ("bytes", str(tmp_path / "tokenizer.json")):
        result = run([tmp_path / "a.jsonl"], tmp_path / tokenizer[-5:], tokenizer=tokenizer)

        assert (result.counts.lost_documents, result.counts.lost_characters, result.counts.lost) == (0, 0, {})
        assert "no token" not in result.summary


def test_a_record_without_counts_of_losses_stays_valid(tmp_path):
    """Earlier versions did not write them."""
    (tmp_path / "a.txt").write_text("a")
    run([tmp_path / "a.txt"], tmp_path / "out")
    record = json.loads((tmp_path / "out.json").read_text())
    for key in ("lost_documents", "lost_characters", "lost"):
        del record["counts"][key]
    (tmp_path / "out.json").write_text(json.dumps(record))

    assert run([tmp_path / "a.txt"], tmp_path / "out").already_done
