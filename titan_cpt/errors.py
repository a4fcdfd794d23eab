"""The seven exceptions that the package raises for its users, and messages for errors of the operating system.

A message says where the problem is, what was found, what is allowed and what to do. The command line prints it without
a traceback and exits with `exit_status`. `os_error_message` formats an OSError in the same way.
"""

import errno
import os
from pathlib import Path


class TitanError(Exception):
    """Base class: an error with a message for the user.

    Attributes:
        exit_status: exit status of the command that raises it.
        on_every_rank: every rank raises it, or another error for the same reason; only rank 0 prints its message.
    """

    exit_status = 2
    on_every_rank = False


class ConfigError(TitanError):
    """The TOML file, an override or another option of the command line is wrong; the message lists every problem."""


class PlanError(TitanError):
    """The config is valid but cannot be trained: too little data for a token budget, impossible parallelism degrees."""


class DataError(TitanError):
    """A text, token or tokenizer file is missing, damaged, or differs from the one that the run was planned with."""


class RemoteError(DataError):
    """Object storage refuses or does not answer, or an object or bucket is missing or was replaced."""


class CheckpointError(TitanError):
    """A checkpoint is missing or damaged, or was trained with other settings than the config has."""


class AccessError(TitanError):
    """The operating system refuses to read, write or lock a file (permission or I/O error); the file may be intact."""


class NumericsError(TitanError):
    """A loss or gradient is not finite. The update was not applied: the weights are those before that step."""

    exit_status = 1
    on_every_rank = True  # losses and gradient norms are reduced over all ranks before they are checked


_EXTRAS = {  # optional dependencies in pyproject.toml, by package; other packages are required ones
    "argcomplete": "completion",
    "huggingface_hub": "hf",
    "lm_eval": "eval",
    "matplotlib": "report",
    "jinja2": "report",
    "scipy": "report",
    "torchao": "float8",
    "transformers": "test",
    "s3fs": "s3",
    "gcsfs": "gs",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


_SETUP_SCRIPT = Path(__file__).parents[1] / "scripts" / "setup.sh"  # only a clone has it


def how_to_install(package: str) -> str:
    """The commands that install a missing package: in a clone of the repository, and with pip.

    pip finds an extra of an installed titan_cpt without an index that has titan_cpt.
    """
    extra = _EXTRAS.get(package)
    requirement = "titan_cpt" if extra is None else f"'titan_cpt[{extra}]'"
    if not _SETUP_SCRIPT.exists():
        return f"install it: `pip install {requirement}`"
    return f"install it: `./scripts/setup.sh{f' {extra}' if extra else ''}` in a clone, or `pip install {requirement}`"


_FREE_SPACE = "Free disk space, then run the same command again"
_REMEDIES = {
    errno.EACCES: "Change its permissions or those of its folder (`ls -ld` shows them), or choose another path",
    errno.EPERM: "Change its permissions or attributes, or choose another path",
    errno.EROFS: "The file system is read-only: choose a path on another one",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "A part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "It is a folder: give the path of a file",
    errno.EEXIST: "Rename or remove it, or choose another path",
    errno.ENOTEMPTY: "Rename or remove it, or choose another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Its symbolic links form a loop: fix them, or choose another path",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "The file system or `ulimit -f` does not allow files of this size: choose another path",
    errno.EMFILE: "Allow more open files (`ulimit -n`)",
    errno.ENFILE: "The machine has too many open files: close some, or wait",
    errno.EIO: "The disk or its connection failed: check it, or choose another path",
    errno.ESTALE: "The network file system was remounted: run the same command again",
    errno.ETXTBSY: "It is a running program: choose another path",
}


def os_error_message(error: OSError) -> str:
    """The path or paths of an OSError, the reason that the operating system gives, and what to do."""
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    where = f"{' -> '.join(paths)}: " if paths else ""
    return f"{where}{reason_and_remedy(error)}"


def reason_and_remedy(error: OSError) -> str:
    """The reason that the operating system gives, and what to do; without the path."""
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{reason}. {remedy}" if remedy else reason
