"""Upload an exported folder to the Hugging Face hub: `titan-cpt export --push NAME`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_cpt.errors import CheckpointError, ConfigError, how_to_install

_CLIENTS = ("httpx", "requests", "httpcore", "urllib3")  # of different versions of huggingface_hub
_TOKEN = "HF_TOKEN, or `hf auth login`"


def check_push(name: str) -> None:
    """Check what can be checked before the export: the package, the repository's name, and that there is a token.

    Raises:
        ConfigError: one of them is missing or wrong.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__
    except ImportError:
        raise ConfigError(f"--push needs the package huggingface_hub; {how_to_install('huggingface_hub')}") from None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push {name}: is not the name of a repository, such as me/german-410m: {error}") from None
    if get_token() is None:
        raise ConfigError(
            f"--push {name}: there is no token for the hub. Create one with write permission at "
            f"https://huggingface.co/settings/tokens and set it: {_TOKEN}"
        )


def push(folder: Path, name: str, *, public: bool, log: Callable[[str], None]) -> None:
    """Upload a complete export, with its model card, in one commit.

    Args:
        folder: the exported folder.
        name: the repository, `namespace/name`; it is created if it does not exist.
        public: make a new repository public; otherwise it is private. An existing one stays as it is.
        log: called with each line to print.

    Raises:
        CheckpointError: the hub refuses or does not answer; the export stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(folder, name):
        repository = api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=str(folder), commit_message="Upload by titan-cpt export"
        )
    log(f"pushed to {repository}: {commit.commit_url}")


@contextmanager
def _hub_errors(folder: Path, name: str) -> Iterator[None]:
    """Translate errors of the hub's client into a CheckpointError with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
        return
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE forbids it: unset it"
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            status = getattr(cause.response, "status_code", None)
            reason = _explain(status, name, " ".join(str(cause.server_message or cause).split()))
        elif isinstance(cause, OSError) or type(cause).__module__.startswith(_CLIENTS):
            reason = f"the hub does not answer ({type(cause).__name__}: {cause}): check the network and HF_ENDPOINT"
        else:
            raise
    raise CheckpointError(
        f"--push {name}: {reason}. The export in {folder} is complete; to upload it later: hf upload {name} {folder} ."
    )


def _explain(status: int | None, name: str, message: str) -> str:
    namespace = name.partition("/")[0]
    if status == 401:
        return f"the hub does not know the token (401: {message}). Set a valid one: {_TOKEN}"
    if status == 403:
        return (
            f"the token may not write to {namespace} (403: {message}). Give it write permission, or choose a namespace "
            "of yours"
        )
    if status == 404:
        return f"there is no user or organization {namespace}, or the token does not see it (404: {message})"
    if status == 409:
        return f"the repository is being changed by someone else (409: {message}). Wait for that, then try again"
    return f"the hub refuses ({status}: {message})"
