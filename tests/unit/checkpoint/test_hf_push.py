"""`titan-cpt export --push` against a server that speaks the hub's API; the real hub was not used."""

import pytest
import small_checkpoints
from hub_server import HubServer

from titan_cpt.checkpoint import hf_push
from titan_cpt.checkpoint.hf_push import check_push, push
from titan_cpt.cli import main
from titan_cpt.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes")  # huggingface_hub's upload


@pytest.fixture
def hub(monkeypatch):
    """The server, and huggingface_hub pointed at it: it reads the environment when it is imported."""
    server = HubServer()
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.close()


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).write_bytes(f"content of {name}".encode() * 100)
    return folder


def pushed(exported, name="me/model", **options):
    lines = []
    push(exported, name, log=lines.append, **{"public": False, **options})
    return lines


@pytest.mark.parametrize("public", [False, True])
def test_all_files_of_the_export_arrive_in_a_new_repository_private_by_default(hub, exported, public):
    lines = pushed(exported, **({"public": True} if public else {}))

    assert hub.repositories == {
        "me/model": {"private": not public, "files": {path.name: path.read_bytes() for path in exported.iterdir()}}
    }
    assert lines[0].startswith(f"pushed to {hub.url}/me/model: {hub.url}/me/model/commit/")


def test_a_second_push_goes_to_the_same_repository_and_leaves_its_visibility(hub, exported):
    pushed(exported, public=True)
    (exported / "config.json").write_bytes(b"new")
    pushed(exported)

    assert hub.repositories["me/model"]["private"] is False
    assert hub.repositories["me/model"]["files"]["config.json"] == b"new"


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("create", 403, r"the token may not write to me \(403"),
        ("create", 404, "there is no user or organization me"),
        ("commit", 409, "the repository is being changed by someone else"),
        ("commit", 413, r"the hub refuses \(413"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message_and_the_export_stays(hub, exported, place, status, message):
    hub.fault = (place, status)
    with pytest.raises(CheckpointError, match=message) as raised:
        pushed(exported)

    assert f"The export in {exported} is complete; to upload it later: hf upload me/model" in str(raised.value)
    assert len(list(exported.iterdir())) == 3


def test_a_token_that_the_hub_does_not_know_is_named(hub, exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"the hub does not know the token \(401: .*HF_TOKEN, or `hf auth login`"):
        pushed(exported)


def test_a_hub_that_cannot_be_reached_is_named(hub, exported):
    hub.close()
    with pytest.raises(CheckpointError, match=r"the hub does not answer .* check the network and HF_ENDPOINT"):
        pushed(exported)


def test_offline_mode_is_named(hub, exported, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids it: unset it"):
        pushed(exported)


@pytest.mark.parametrize("name", ["a/b/c", "me/.model", "me/mo del", "--", ""])
def test_an_impossible_name_is_refused_before_the_export(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(ConfigError, match="is not the name of a repository, such as me/german-410m"):
        check_push(name)


def test_a_missing_token_is_found_before_the_export(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"there is no token for the hub\. Create one with write permission"):
        check_push("me/model")


def test_the_command_exports_and_pushes_the_model_card_too(hub, tmp_path, monkeypatch, capsys):
    checkpoint = small_checkpoints.imported(tmp_path / "m", "llama")
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(checkpoint), str(tmp_path / "out"), "--push", "me/german"])

    assert leaving.value.code == 0, capsys.readouterr()
    files = hub.repositories["me/german"]["files"]
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hf_push.push is push


def test_public_without_push_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["export", str(tmp_path), str(tmp_path / "out"), "--public"])

    assert leaving.value.code == 2
    assert "--public goes with --push NAME" in capsys.readouterr().err
