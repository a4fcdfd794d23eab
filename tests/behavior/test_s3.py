"""Training from and to a real S3 server on this machine (moto's): the same losses, and no data lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
import training
from s3_server import S3Server

from titan_cpt.checkpoint.manifest import content_checksum
from titan_cpt.checkpoint.remote import copies
from titan_cpt.checkpoint.remote.copies import list_copies, verify_copy
from titan_cpt.object_storage import filesystem
from titan_cpt.object_storage.filesystem import upload_file, write_object

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def server(shared_server, monkeypatch):
    for name, value in shared_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", json.loads(shared_server.environment["FSSPEC_S3"]))
    shared_server.set_fault("")
    yield shared_server
    shared_server.set_fault("")


def put_all(folder: Path, url: str) -> str:
    """Copy the files of a folder into a bucket, which is made if needed."""
    system = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = url.removeprefix("s3://").partition("/")[0]
    if not system.exists(bucket):
        system.mkdir(bucket)
    for path in folder.iterdir():
        system.put_file(str(path), f"{url.removeprefix('s3://')}/{path.name}")
    return url


def remote_config(data, out, url, **tables):
    raw = training.two_stages(data, out)
    raw["datasets"] = {
        name: {"train": f"{url}/{name}", "validation": f"{url}/{name}-validation"} for name in training.LANGUAGES
    }
    raw["storage"] = {"cache_dir": str(out / "cache"), "block_size": 4096, "cache_size": 10**6}
    return training.changed(raw, **tables)


def measured(run: Path) -> list[tuple]:
    """Losses, gradient norms and batches of all steps and validations."""
    keys = ("kind", "stage", "step", "dataset", "loss_nats_per_token", "grad_norm", "batch_hash")
    return [tuple(line.get(key) for key in keys) for line in training.lines_of(run) if line["kind"] != "event"]


def run_of(raw, **options):
    """Train a config of one dictionary to its end; returns the run's folder."""
    folder = Path(raw["job"]["output_dir"])
    outcome = training.train(training.write_config(raw, folder / "config.toml"), **options)
    assert outcome.status == 0, outcome.output
    return folder / raw["job"]["name"]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The run on local data, never interrupted."""
    return run_of(training.two_stages(data, tmp_path_factory.mktemp("unbroken")))


@pytest.mark.parametrize(("workers", "start_method"), [(2, "fork"), (1, "spawn")])
def test_losses_on_remote_data_are_those_on_local_data(server, data, unbroken, tmp_path, workers, start_method):
    """To the last digit, read by forked or spawned workers; the tests below read in this process, with a thread."""
    url = put_all(data, "s3://bucket/data")
    raw = remote_config(data, tmp_path, url, training={"num_workers": workers})
    run = run_of(raw, environment=server.environment, start_method=start_method)

    assert measured(run) == measured(unbroken)


def test_a_run_moves_from_local_to_remote_data_and_resumes(server, data, unbroken, tmp_path):
    """The fingerprint of the data is that of its content, wherever it is."""
    url = put_all(data, "s3://bucket/data")
    local = training.two_stages(data, tmp_path)
    fault = training.Fault("titan_cpt.train:Trainer.train_step", 8)
    training.train(training.write_config(local, tmp_path / "local.toml"), fault=fault)
    run = run_of(remote_config(data, tmp_path, url), environment=server.environment)

    assert measured(run)[-20:] == measured(unbroken)[-20:]


@pytest.mark.parametrize("fault", ["503", "stall"])
def test_an_outage_of_the_server_delays_training_and_changes_nothing(server, data, unbroken, tmp_path, fault):
    url = put_all(data, "s3://bucket/data")
    config = training.write_config(remote_config(data, tmp_path, url), tmp_path / "config.toml")
    patient = {"config_kwargs": {"read_timeout": 1, "retries": {"mode": "standard", "max_attempts": 8}}}
    before = len(server.requests())
    server.set_fault(fault)
    process = training.Process(config, environment={**server.environment, "FSSPEC_S3": json.dumps(patient)})
    process.wait_for(lambda: len(server.requests()) >= before + 2)
    server.set_fault("")
    outcome = process.end()

    assert outcome.status == 0, outcome.output
    assert measured(tmp_path / "run") == measured(unbroken)


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("s3://nobucket/data", {}, "datasets.en.train: s3://nobucket/data/en.idx: there is no bucket 'nobucket'"),
        ("s3://bucket/none", {}, "datasets.en.train: s3://bucket/none/en: has no .bin and .idx in object storage"),
        ("s3://bucket/data", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the server does not answer"),
        ("s3://bucket/data", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials are missing or wr"),
        ("gs://bucket/data", {}, "gs:// needs the package gcsfs; install it"),
    ],
)
def test_a_mistake_is_one_message_with_what_to_do(server, data, tmp_path, url, environment, message):
    put_all(data, "s3://bucket/data")
    config = training.write_config(remote_config(data, tmp_path, url), tmp_path / "config.toml")
    outcome = training.train(config, environment={**server.environment, **environment})

    assert outcome.status == 2
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_wrong_credentials_are_named_as_such(tmp_path, data):
    """A server of its own, which checks them."""
    server = S3Server(tmp_path / "server", checks_credentials=True)
    try:
        environment = {**server.environment, "AWS_ACCESS_KEY_ID": "AKIAWRONG"}
        config = training.write_config(remote_config(data, tmp_path, "s3://bucket/data"), tmp_path / "config.toml")
        outcome = training.train(config, environment=environment)
    finally:
        server.close()

    assert outcome.status == 2
    assert "access is refused" in outcome.output
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE" in outcome.output


# Uploads


def uploading(data, out, bucket, **tables):
    """A run on local data that uploads to a bucket of its own."""
    fsspec.filesystem("s3").mkdir(bucket)
    raw = training.two_stages(data, out)
    return training.changed(raw, checkpoint={"upload": {"to": f"s3://{bucket}/runs"}}, **tables)


def final_weights(run: Path) -> dict[str, bytes]:
    """The files of the last checkpoint, without its manifest."""
    folder = run / "german" / "step-00000010"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize(
    ("place", "call"),
    [("titan_cpt.checkpoint.remote.copies:upload_file", 3)],  # test_uploads.py has more, with file://
)
def test_a_run_that_is_killed_in_an_upload_continues_on_an_empty_disk(server, data, unbroken, tmp_path, place, call):
    bucket = f"killed-{place.rpartition(':')[2].replace('_', '-')}-{call}"
    raw = uploading(data, tmp_path, bucket)
    config = training.write_config(raw, tmp_path / "config.toml")
    killed = training.train(config, fault=training.Fault(place, call), environment=server.environment)
    assert killed.status == -9, killed.output
    for copy in list_copies(f"s3://{bucket}/runs/run", pytest.fail):
        verify_copy(copy)
    shutil.rmtree(tmp_path / "run")
    run = run_of(raw, environment=server.environment)

    assert final_weights(run) == final_weights(unbroken)
    assert counting(run) == counting(unbroken)
    assert list_copies(f"s3://{bucket}/runs/run", pytest.fail)[0].name == "german/step-00000010"
    verify_copy(list_copies(f"s3://{bucket}/runs/run", pytest.fail)[0])


def counting(run: Path) -> dict[tuple, tuple]:
    """The measurements that count: the last ones of each step."""
    return {line[:4]: line[4:] for line in measured(run)}


@pytest.mark.parametrize("fault", ["stall PUT"])
def test_a_server_that_fails_stops_no_step_and_loses_nothing(server, data, unbroken, tmp_path, fault):
    """Training ends as without uploads; a second start, with the server back, uploads what is missing."""
    bucket = f"outage-{fault.lower().replace(' ', '-')}"
    raw = uploading(data, tmp_path, bucket)
    config = training.write_config(raw, tmp_path / "config.toml")
    process = training.Process(config, environment=server.environment)
    process.wait_for(lambda: process.output.exists() and "english" in process.output.read_text())
    server.set_fault(fault)
    process.wait_for(lambda: measured_steps(tmp_path / "run") == 22, ended_will_do=True)
    process.wait_for(lambda: "newest checkpoint" in process.output.read_text(), ended_will_do=True)
    process.send(signal.SIGINT)
    outcome = process.end()
    server.set_fault("")

    assert outcome.status == 75, outcome.output
    assert f"To finish the uploads: titan-cpt upload {tmp_path}/run" in outcome.output
    assert final_weights(tmp_path / "run") == final_weights(unbroken)
    assert measured(tmp_path / "run") == measured(unbroken)
    again = training.train(config, environment=server.environment)
    assert again.status == 0, again.output
    assert list_copies(f"s3://{bucket}/runs/run", pytest.fail)[0].name == "german/step-00000010"


def measured_steps(run: Path) -> int:
    return sum(line[0] == "train" for line in measured(run)) if (run / "metrics.jsonl").exists() else 0


def test_a_missing_bucket_for_uploads_is_one_message(server, data, tmp_path):
    raw = training.changed(training.two_stages(data, tmp_path), checkpoint={"upload": {"to": "s3://nobucket2/runs"}})
    outcome = training.train(training.write_config(raw, tmp_path / "config.toml"), environment=server.environment)

    assert outcome.status == 2
    assert "there is no bucket 'nobucket2'" in outcome.output
    assert "Traceback" not in outcome.output


def test_an_upload_in_parts_is_verified_without_reading_it_back(server, tmp_path, monkeypatch):
    """S3's digest of three parts is the one that is computed here; a wrong object is found."""
    part_bytes = 5 << 20  # the least that S3 accepts
    monkeypatch.setattr(filesystem, "PART_BYTES", part_bytes)
    monkeypatch.setattr(copies, "PART_BYTES", part_bytes)
    fsspec.filesystem("s3").mkdir("parts")
    content = os.urandom(2 * part_bytes + 12345)
    (tmp_path / "large").write_bytes(content)
    upload_file(tmp_path / "large", "s3://parts/large")
    before = len(server.requests("GET"))
    file = {"bytes": len(content), "xxh3_128": content_checksum(tmp_path / "large")}

    assert copies._is_uploaded(tmp_path / "large", "s3://parts/large", file)
    assert len(server.requests("GET")) == before
    write_object("s3://parts/large", content[:-1] + b"x")
    assert not copies._is_uploaded(tmp_path / "large", "s3://parts/large", file)
