"""Hugging Face datasets: every text as stored, or an error with its position. Local folders stand in."""

import bz2
import gzip
import io
import json
import lzma

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared import jsonl

from titan_cpt.data.prepare import hub
from titan_cpt.data.prepare.chunks import iterate_texts
from titan_cpt.errors import DataError

TEXTS = ["2024-01-01", "2024-01-02", "007", "1.50", "null", '"quoted"']
PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Write the files of a dataset and read its texts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def read(split="", **files):
        folder = tmp_path / "set"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return list(iterate_texts([f"hub:{folder}{split}"]))

    return read


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), file)
    return file.getvalue()


def test_strings_that_look_like_dates_or_numbers_stay_strings(data_set):
    """`datasets` would turn the first file's texts into timestamps."""
    dates = jsonl(TEXTS[:2]).encode()
    rest = jsonl(TEXTS[2:]).encode()

    assert data_set(**{"train-0.jsonl": dates, "train-1.jsonl": rest}) == TEXTS


def test_a_number_among_texts_is_refused_with_its_line(data_set):
    """`datasets` would put quotation marks around "a" and "b"."""
    with pytest.raises(DataError, match=r"train\.jsonl:3: 'text' is 5; allowed is a string"):
        data_set(**{"train.jsonl": jsonl(["a", "b", 5]).encode()})


def test_a_csv_keeps_its_texts(data_set):
    """pandas would turn 007 into 7.0, and NA and null into missing values."""
    content = "text,id\n" + "".join(f"{text},1\n" for text in ["007", "1.50", "NA", "null", "2024-01-01"])

    assert data_set(**{"train.csv": content.encode()}) == ["007", "1.50", "NA", "null", "2024-01-01"]


def test_a_parquet_shard_without_rows_and_one_with_more_columns_are_read(data_set):
    """`datasets` ends with an error at the first, and would at the second."""
    more = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b"], "more": [1]}), more)
    files = {"train-0.parquet": parquet(["a"]), "train-1.parquet": parquet([]), "train-2.parquet": more.getvalue()}

    assert data_set(**files) == ["a", "b"]


def test_json_arrays_and_files_with_a_byte_order_mark_are_read(data_set):
    """Whatever their order."""
    array = "\ufeff" + json.dumps([{"text": "a"}, {"text": "b"}])

    assert data_set(**{"train-0.json": array.encode(), "train-1.json": jsonl(["c"]).encode()}) == ["a", "b", "c"]


def test_a_list_in_a_field_of_one_object_is_read(data_set):
    """The dataset card calls the key `field`."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.json\n  field: rows\n---\n"
    files = {"README.md": card.encode(), "train.json": json.dumps({"rows": [{"text": "a"}, {"text": "b"}]}).encode()}

    assert data_set(**files) == ["a", "b"]


def test_json_of_another_encoding_or_in_an_archive_is_refused(data_set, tmp_path):
    """The message says what to do."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.json\n  encoding: latin-1\n---\n"
    with pytest.raises(DataError, match="is in latin-1; download it and convert it to UTF-8"):
        data_set(**{"README.md": card.encode(), "train.json": jsonl(["\u00e4"]).encode()})


def test_a_missing_split_is_refused_with_the_names_of_the_others(data_set):
    """Before anything is read."""
    with pytest.raises(DataError, match="has no split 'dev'; its splits are train"):
        data_set("::dev", **{"train.jsonl": jsonl(["a"]).encode()})


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kept", ["half", "all but one byte", "nothing"])
def test_an_incomplete_compressed_file_is_refused(data_set, suffix, kept):
    """`datasets` accepts a truncated .zst."""
    whole = PACKERS[suffix](jsonl([f"{number * 7919 % 1000:05}" for number in range(500)]).encode())
    length = {"half": len(whole) // 2, "all but one byte": len(whole) - 1, "nothing": 0}[kept]

    files = {"train-0.jsonl": jsonl(["first"]).encode(), f"train-1.jsonl{suffix}": whole[:length]}
    with pytest.raises(DataError, match=r"incomplete|ends within|damaged"):
        data_set(**files)


def test_an_incomplete_compressed_file_of_another_format_is_refused(data_set):
    """The second of two frames of a .txt.zst, which `datasets` reads itself."""
    frames = zstandard.compress(b"one\n") + zstandard.compress(b"two\n" * 1000)
    with pytest.raises(DataError, match=r"train\.txt\.zst: ends within a zstd frame"):
        data_set(**{"train.txt.zst": frames[:-4]})


def test_all_zstd_frames_of_a_file_are_read(data_set):
    """pzstd and cat write several."""
    frames = b"".join(zstandard.compress(jsonl([text]).encode()) for text in TEXTS)

    assert data_set(**{"train.jsonl.zst": frames}) == TEXTS


def test_files_with_a_url_are_streamed():
    """As hf:// and https://, through fsspec."""
    with fsspec.open("memory://folder/a.jsonl", "wb") as file:
        file.write(b"content")

    with hub.open_file("memory://folder/a.jsonl") as file:
        assert file.read() == b"content"


def test_a_name_without_a_local_folder_is_reported_before_the_hub_is_contacted(tmp_path, monkeypatch, capsys):
    """With similar names of local folders; the error repeats it. The hub is offline here."""
    import datasets

    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot open it: .*no folder 'corpsu' on this machine, but 'corpus'$"):
        hub.version_of("hub:corpsu")
    hint = "There is no folder 'corpsu' on this machine, but 'corpus'"

    assert capsys.readouterr().err.startswith(f"note: hub:corpsu: looking it up on the Hugging Face hub. {hint}")
