"""Uploads of a run, to a folder by file://: complete copies or none; runs continue from them on an empty disk."""

import json
import shutil
from pathlib import Path

import pytest
import training

from titan_cpt.checkpoint.manifest import verify
from titan_cpt.errors import ConfigError
from titan_cpt.runs.upload_run import upload_run

pytestmark = training.THEIR_WARNINGS_IGNORED
COPIES = "titan_cpt.checkpoint.remote.copies"


def uploading(data, out, **upload):
    """A config whose run uploads to out/bucket."""
    raw = training.two_stages(data, out)
    return training.changed(raw, checkpoint={"upload": {"to": f"file://{out}/bucket", **upload}})


def train(raw, name="config", **options):
    return training.train(training.write_config(raw, Path(raw["job"]["output_dir"]) / f"{name}.toml"), **options)


def measured(run):
    """{(kind, stage, step, dataset): (loss, gradient norm, batch)} of the lines that count."""
    found = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] != "event":
            key = tuple(line.get(key) for key in ("kind", "stage", "step", "dataset"))
            found[key] = tuple(line.get(key) for key in ("loss_nats_per_token", "grad_norm", "batch_hash"))
    return found


def digests(folder):
    """{name of a file: content} of a checkpoint, without its manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def copies(bucket):
    """Names of the complete copies in a bucket; each of them is checked."""
    found = sorted(path.parent for path in bucket.glob("run/*/step-*/manifest.json"))
    for folder in found:
        verify(folder)
    return [f"{folder.parent.name}/{folder.name}" for folder in found]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The run without uploads, never interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    assert train(training.two_stages(data, out)).status == 0
    return out / "run"


ALL = ["english/step-00000004", "english/step-00000008", "english/step-00000009", "english/step-00000012"]
GERMAN = ["german/step-00000004", "german/step-00000008", "german/step-00000010"]


def test_a_finished_run_is_uploaded_with_its_metrics_and_changes_no_number(data, unbroken, tmp_path):
    outcome = train(uploading(data, tmp_path))
    run, bucket = tmp_path / "run", tmp_path / "bucket"
    local = {f"{path.parent.name}/{path.name}" for path in run.glob("*/step-*")}

    assert outcome.status == 0, outcome.output
    assert measured(run) == measured(unbroken)
    assert local <= set(copies(bucket)) <= {*ALL, *GERMAN}
    for name in ("config.toml", "plan.json", "summary.json", "metrics.jsonl"):
        assert (bucket / "run" / name).exists(), name
    assert measured(bucket / "run") == measured(unbroken)
    assert digests(bucket / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])
    assert json.loads((bucket / "run" / "owner.json").read_text())["done"] is True


@pytest.mark.parametrize(
    ("place", "call"),
    [
        (f"{COPIES}:upload_file", 1),
        (f"{COPIES}:write_object", 2),
        ("titan_cpt.checkpoint.remote.records:UploadRecords.add", 3),
        ("titan_cpt.checkpoint.remote.uploader:Uploader._upload_run_files", 2),
    ],
)
def test_a_run_that_is_killed_in_an_upload_continues_on_an_empty_disk(data, unbroken, tmp_path, place, call):
    """No half copy is visible at any time, and the last weights and all losses are those of an unbroken run."""
    raw = uploading(data, tmp_path)
    killed = train(raw, fault=training.Fault(place, call))
    assert killed.status == -9, killed.output
    before = copies(tmp_path / "bucket")
    shutil.rmtree(tmp_path / "run")
    outcome = train(raw, "again")

    assert outcome.status == 0, outcome.output
    assert ("restoring" in outcome.output) is bool(before)
    assert set(before) <= set(copies(tmp_path / "bucket"))
    assert digests(tmp_path / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])
    assert measured(tmp_path / "run") == measured(unbroken)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def interrupted(data, out, **upload):
    """A config, after a run that was killed in step 6 of German when its first checkpoint there was uploaded."""
    raw = uploading(data, out, **upload)
    fault = training.Fault("titan_cpt.train:Trainer.train_step", 12 + 7, out / "bucket" / "run" / GERMAN[0])
    # Not asynchronous: a process that waits in a step announces no checkpoint that was saved in the background.
    killed = train(training.changed(raw, checkpoint={"async_mode": "disabled"}), fault=fault)
    assert killed.status == -9, killed.output
    return raw


def test_a_damaged_copy_is_skipped_and_the_one_before_is_used(data, unbroken, tmp_path):
    raw = interrupted(data, tmp_path)
    shutil.rmtree(tmp_path / "run")
    flip_a_byte(next((tmp_path / "bucket" / "run" / GERMAN[0]).glob("*.safetensors")))
    outcome = train(raw, "again")

    assert outcome.status == 0, outcome.output
    assert "skipping damaged upload: file://" in outcome.output
    assert f"restoring {ALL[3]} from" in outcome.output
    assert digests(tmp_path / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])
    assert measured(tmp_path / "run") == measured(unbroken)


def test_a_copy_without_manifest_does_not_exist(data, unbroken, tmp_path):
    raw = interrupted(data, tmp_path)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "bucket" / "run" / GERMAN[0] / "manifest.json").unlink()
    outcome = train(raw, "again")

    assert f"restoring {ALL[3]} from" in outcome.output
    assert digests(tmp_path / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])


def test_only_damaged_copies_are_an_error_and_no_new_run(data, tmp_path):
    raw = interrupted(data, tmp_path)
    shutil.rmtree(tmp_path / "run")
    for path in (tmp_path / "bucket" / "run").glob("*/step-*/*.safetensors"):
        flip_a_byte(path)
    outcome = train(raw, "again")

    assert outcome.status == 2
    assert "all uploaded checkpoints are damaged. The first: file://" in outcome.output
    assert "Traceback" not in outcome.output


def test_keep_local_keeps_the_newest_and_what_a_stage_starts_from(data, unbroken, tmp_path):
    """German starts from English's step 9: it stays until German has ended, and every number is as without uploads."""
    raw = training.changed(
        uploading(data, tmp_path, keep_local=1),
        checkpoint={"interval": 2, "async_mode": "disabled"},
        stages=[*uploading(data, tmp_path)["stages"], training.third_stage()],
    )
    outcome = train(raw)
    left = {
        f"{path.parent.parent.name}/{path.parent.name}" for path in (tmp_path / "run").glob("*/step-*/manifest.json")
    }

    assert outcome.status == 0, outcome.output
    assert "removed here, as it is uploaded" in outcome.output
    assert "again/step-00000005" in left
    removed = set(copies(tmp_path / "bucket")) - left
    assert removed, "some were uploaded and removed"
    assert digests(tmp_path / "bucket" / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])


def test_a_second_run_with_the_same_name_elsewhere_is_refused(data, tmp_path):
    raw = interrupted(data, tmp_path)
    other = training.changed(raw, job={"output_dir": str(tmp_path / "other")})
    plain = json.loads(json.dumps(other))
    del plain["checkpoint"]["upload"]
    killed = train(plain, fault=training.Fault("titan_cpt.train:Trainer.train_step", 8))
    assert killed.status == -9, killed.output
    outcome = train(other, "again")

    assert outcome.status == 2
    assert "holds the uploads of another run folder" in outcome.output
    assert "move this folder away; to keep both, choose another job.name" in outcome.output.replace("\n", " ")


def test_an_older_local_folder_is_refused_after_another_machine_has_continued(data, tmp_path):
    raw = interrupted(data, tmp_path)
    other = training.changed(raw, job={"output_dir": str(tmp_path / "other")})
    assert train(other).status == 0
    outcome = train(raw, "again")

    assert outcome.status == 2
    assert "holds the uploads of another run folder" in outcome.output


def test_a_disk_that_is_full_during_a_restore_is_one_message_and_the_next_start_restores(data, unbroken, tmp_path):
    raw = interrupted(data, tmp_path)
    shutil.rmtree(tmp_path / "run")
    full = train(raw, "full", largest_file_bytes=20_000)
    assert full.status == 2
    assert "File too large" in full.output
    assert "Traceback" not in full.output
    assert not list((tmp_path / "run").glob("*/step-*/manifest.json"))
    outcome = train(raw, "again")

    assert outcome.status == 0, outcome.output
    assert digests(tmp_path / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])


def test_a_stage_starts_from_a_checkpoint_in_object_storage(data, tmp_path):
    """As from the same checkpoint on the disk; the copy is downloaded once, and checked."""
    assert train(uploading(data, tmp_path)).status == 0
    losses = []
    for name, where in (("local", f"{tmp_path}/run"), ("remote", f"file://{tmp_path}/bucket/run")):
        stage = {**training.third_stage(), "init": f"checkpoint:{where}/{GERMAN[-1]}"}
        raw = training.changed(training.two_stages(data, tmp_path), job={"name": name}, stages=[stage])
        outcome = train(raw, name)
        assert outcome.status == 0, outcome.output
        losses.append(measured(tmp_path / name))

    assert losses[0] == losses[1]
    assert "downloading the initial weights file://" in outcome.output


def test_the_upload_command_completes_a_run_and_says_what_was_missing(data, tmp_path, capsys):
    plain = training.two_stages(data, tmp_path)
    assert train(plain).status == 0
    status = upload_run(tmp_path / "run", to=f"file://{tmp_path}/bucket", say=print)
    printed = capsys.readouterr().out

    assert status == 0
    assert set(copies(tmp_path / "bucket")) >= {ALL[2], ALL[3], GERMAN[-1]}
    assert "/bucket/run: complete; " in printed
    assert upload_run(tmp_path / "run", to=f"file://{tmp_path}/bucket", say=print) == 0
    assert "complete; 0 checkpoints were missing" in capsys.readouterr().out


def test_the_upload_command_refuses_what_is_not_a_run_and_a_run_without_a_destination(data, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run folder"):
        upload_run(tmp_path, to=None, say=print)
    run = tmp_path / "run"
    run.mkdir()
    training.write_config(training.two_stages(data, tmp_path), run / "config.toml")
    with pytest.raises(ConfigError, match=r"has no checkpoint.upload: give --to URL"):
        upload_run(run, to=None, say=print)


def test_a_stage_whose_config_changed_is_not_restored_over_and_the_message_says_how_to_train_it_again(data, tmp_path):
    """Its copies would come back from storage; the owner of the uploads stays who it was."""
    raw = interrupted(data, tmp_path)
    edited = json.loads(json.dumps(raw))
    edited["stages"][1]["lr"]["max"] = 1e-3
    shutil.rmtree(tmp_path / "run" / "german")
    owner = (tmp_path / "bucket" / "run" / "owner.json").read_text()
    refused = train(edited, "refused")

    assert refused.status == 2, refused.output
    assert "stages.german.lr" in refused.output
    assert (
        f"move its checkpoints away here and there: {tmp_path}/run/german and file://{tmp_path}/bucket/run/german"
        in (" ".join(refused.output.split()))
    )
    assert (tmp_path / "bucket" / "run" / "owner.json").read_text() == owner
    shutil.rmtree(tmp_path / "bucket" / "run" / "german")
    assert train(edited, "again").status == 0


def test_what_a_later_stage_starts_from_is_uploaded_whatever_is_chosen(data, unbroken, tmp_path):
    """Only stage ends are chosen; German starts from English's step 9, before the annealing."""
    raw = uploading(data, tmp_path, what=["stage_end"])
    fault = training.Fault("titan_cpt.train:Trainer.train_step", 12 + 3, tmp_path / "bucket" / "run" / ALL[3])
    killed = train(raw, fault=fault)
    assert killed.status == -9, killed.output
    assert copies(tmp_path / "bucket") == [ALL[2], ALL[3]]
    shutil.rmtree(tmp_path / "run")
    outcome = train(raw, "again")

    assert outcome.status == 0, outcome.output
    assert digests(tmp_path / "run" / GERMAN[-1]) == digests(unbroken / GERMAN[-1])
