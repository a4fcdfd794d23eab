"""Upload the checkpoints of a run that does not train now, and wait for it: `titan-cpt upload`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from titan_cpt.checkpoint.remote.records import UploadRecords
from titan_cpt.checkpoint.remote.uploader import Uploader, claim_for
from titan_cpt.common.exit_status import FAILURE, SUCCESS
from titan_cpt.common.run_folder import CONFIG_FILE, METRICS_FILE, locked
from titan_cpt.config.load import check_config
from titan_cpt.config.storage import UploadConfig
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.errors import ConfigError
from titan_cpt.reporting.run_log import explain_missing_run

_PATIENCE_SECONDS = 600.0


def upload_run(run: Path, *, to: str | None, say: Callable[[str], None]) -> int:
    """Upload what is missing.

    Args:
        run: the run's folder.
        to: in place of the config's checkpoint.upload.to.
        say: prints a line.

    Returns:
        The exit status.

    Raises:
        ConfigError: the folder is not that of a run, or its config has no checkpoint.upload and `to` is None.
        CheckpointError: a process trains there, or the URL belongs to another run.
        RemoteError: storage refuses or does not answer.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        has_log = (run / METRICS_FILE).is_file()
        raise ConfigError(f"{path}: is missing" if has_log else explain_missing_run(run))
    config = check_config(parse_toml(path.read_text(encoding="utf-8")), path)
    upload = config.checkpoint.upload
    if to is not None:
        upload = UploadConfig(to=to) if upload is None else upload.model_copy(update={"to": to.rstrip("/")})
    if upload is None:
        raise ConfigError(f"{path}: has no checkpoint.upload: give --to URL, such as s3://bucket/runs")
    url = f"{upload.to}/{config.job.name}"
    with locked(run, rank=0):
        owner = claim_for(run, url, UploadRecords.read(run, url), say=say)
        uploader = Uploader(run, url, upload.what, owner)
        missing = len(uploader.pending())
        uploader.start()
        try:
            complete = uploader.wait(patience_s=_PATIENCE_SECONDS, say=say)
        finally:
            uploader.close()
            for message in uploader.messages():
                say(message.text.strip())
    complete = complete and not uploader.damaged
    say(f"{url}: {'complete' if complete else 'NOT complete'}; {missing} checkpoints were missing")
    return SUCCESS if complete else FAILURE
