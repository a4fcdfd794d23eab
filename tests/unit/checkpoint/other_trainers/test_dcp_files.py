"""Foreign DCP checkpoints: tensors and objects are read, code in them is not executed, damage is named."""

import io
import pickle
import pickletools
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
STATE = {
    "wide": torch.arange(12.0).reshape(4, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7.0),
    "inner": {"lr": 0.25, "betas": (0.9, 0.95), "names": ["a", "b"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DCP checkpoint of `STATE`."""
    folder = tmp_path_factory.mktemp("dcp") / "step-1"
    dcp.save(STATE, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(saved, tmp_path / "step-1")


def test_tensors_and_objects_are_those_that_dcp_saved(saved):
    """Dtypes too; objects by the dotted names that DCP gives them."""
    files = DcpFiles(saved)

    assert {name: files.read(name).tolist() for name in files.tensors} == {
        name: STATE[name].tolist() for name in ("wide", "half", "count")
    }
    assert files.read("half").dtype == torch.bfloat16
    assert {name: files.read_object(name) for name in files.objects} == {
        f"inner.{key}": value for key, value in STATE["inner"].items()
    }


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, getattr, torch.load, __import__, pickle.loads, io.open])
def test_code_in_the_metadata_is_refused_and_not_executed(copy, function, tmp_path):
    """Whatever a pickle names, beyond the classes that DCP writes, is named in the message."""
    (copy / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": _Calls(function, str(tmp_path / "made"))}))
    with pytest.raises(CheckpointError, match=r"which is not part of DCP's metadata. Nothing in it was executed"):
        DcpFiles(copy)

    assert not (tmp_path / "made").exists()


def test_code_in_an_object_is_refused_and_not_executed(copy, tmp_path):
    """Objects are read with weights_only: one that names a function is an error."""
    entry = DcpFiles(copy).objects["inner.names"].shards[0]
    held = io.BytesIO()
    torch.save(_Calls(open, str(tmp_path / "made"), "w"), held)
    content = bytearray((copy / entry.file).read_bytes())
    content[entry.first_byte :] = held.getvalue()
    (copy / entry.file).write_bytes(content)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "inner.names":
            info.length = len(held.getvalue())
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="cannot be read"):
        DcpFiles(copy).read_object("inner.names")

    assert not (tmp_path / "made").exists()


def described(chunks, size, file="__0_0.distcp", size_bytes=200, **more):
    """Metadata of one tensor with these (offset, size) blocks, each with an entry in `file`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    blocks = [ChunkStorageMetadata(torch.Size(at), torch.Size(shape)) for at, shape in chunks]
    stored = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), blocks)
    where = {MetadataIndex("w", torch.Size(at)): _StorageInfo(file, 0, size_bytes, **more) for at, _ in chunks}
    return pickle.dumps(Metadata({"w": stored}, {}, where))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (described([((0, 0), (2, 3))], (4, 3)), "the parts of 'w' do not add up to the tensor"),
        (described([((0, 0), (2, 3)), ((3, 0), (2, 3))], (4, 3)), "a part of 'w' is outside of the tensor"),
        (described([((0, 0), (4, 3))], (4, 3), file="../other"), "names a file outside of its folder: '../other'"),
        (described([((0, 0), (4, 3))], (4, 3), file="/etc/passwd"), "names a file outside of its folder"),
        (described([((0, 0), (4, 3))], (4, 3), file=".."), "names a file outside of its folder: '..'"),
        (described([((0, 0), (2, 3)), ((1, 0), (2, 3))], (4, 3)), "two parts of 'w' overlap"),
        (described([((0, 0), (1 << 40, 3))], (1 << 40, 3)), "3] is in only 200 bytes"),
        (described([((0, 0), (4, 3))], (4, 3), transform_descriptors=["zstd"]), "cannot be read here"),
        (b"not a pickle", "cannot be read"),
        (pickle.dumps([1, 2]), "cannot be read"),
    ],
    ids=["gap", "outside", "parent", "absolute", "dots", "overlap", "huge", "compressed", "text", "list"],
)
def test_damaged_metadata_is_named(copy, content, message):
    """The message names the file; nothing is read from other places."""
    (copy / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        DcpFiles(copy)

    assert message in str(refused.value)
    assert str(copy / ".metadata") in str(refused.value)


def test_a_folder_in_place_of_a_file_and_a_damaged_shard_are_named(copy):
    """Without torch's advice to load the file unsafely."""
    shard = copy / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CheckpointError) as damaged:
        DcpFiles(copy).read("wide")
    (copy / ".metadata").unlink()
    (copy / ".metadata").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory; it must be a file that DCP wrote"):
        DcpFiles(copy)

    assert "weights_only" not in str(damaged.value)
    assert str(damaged.value).endswith("; copy the checkpoint again")


def test_every_cut_of_the_metadata_is_an_error_of_ours(copy):
    """A file that ends at any instruction of the pickle is damaged, and raises nothing else."""
    content = (copy / ".metadata").read_bytes()
    for _, _, position in list(pickletools.genops(content))[::5]:
        (copy / ".metadata").write_bytes(content[:position])
        with pytest.raises(CheckpointError):
            DcpFiles(copy)


def test_a_missing_and_a_short_file_are_named(copy):
    """Both with the file; the metadata itself is intact."""
    (name,) = [path.name for path in copy.glob("*.distcp")]
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:1000])
    files = DcpFiles(copy)
    with pytest.raises(CheckpointError, match=f"{name}: ends too early"):
        [files.read(one) for one in files.tensors]
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        files.read("wide")


def test_a_folder_without_metadata_names_the_checkpoints_in_it(copy, tmp_path):
    """And says what a folder of safetensors is."""
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match=f"give one of the checkpoints in it: {copy}"):
        DcpFiles(tmp_path)
    with pytest.raises(CheckpointError, match="without --from, imports these"):
        DcpFiles(tmp_path / "release")
    with pytest.raises(CheckpointError, match="no such folder"):
        DcpFiles(tmp_path / "none")
