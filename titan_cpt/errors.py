"""The six errors that the package raises on purpose.

Each carries one message for its reader: where the fault is, what was found, what is allowed and what to do. The command
line prints that message and no traceback. `exit_status` is what a program that called us may rely on. An OSError, which
the operating system raises, is put into the same form by `os_error_message`.
"""

import errno
import os


class TitanError(Exception):
    """What the six share: a message meant for the user, and the exit status that goes with it.

    Attributes:
        on_every_rank: every rank raises this error or one for the same reason, so that only rank 0 prints it.
    """

    exit_status = 2
    on_every_rank = False


class ConfigError(TitanError):
    """The TOML or a command-line override is at fault; the message lists every problem found."""


class PlanError(TitanError):
    """The config is well formed, yet cannot be carried out (a budget that no data covers, a layout that cannot be)."""


class DataError(TitanError):
    """A text, token or tokenizer file is missing, damaged, or not what the run was planned on."""


class CheckpointError(TitanError):
    """A checkpoint is missing or damaged, or belongs to another recipe than the config's."""


class AccessError(TitanError):
    """The system does not let a file be read, written or locked: permission or input/output. That is not damage."""


class NumericsError(TitanError):
    """A loss or a gradient is not finite. Not the user's mistake: the weights are as they were before that step."""

    exit_status = 1
    on_every_rank = True  # losses and norms are reduced over all ranks before they are looked at


_EXTRAS = {  # of pyproject.toml; packages that are not here come with titan_cpt itself
    "tokenizers": "hf",
    "huggingface_hub": "hf",
    "lm_eval": "eval",
    "matplotlib": "report",
    "jinja2": "report",
    "torchao": "float8",
    "transformers": "test",
}


def how_to_install(package: str) -> str:
    """The commands that install a package that is missing: from a clone of the repository, and by pip."""
    extra = _EXTRAS.get(package)
    wanted = "titan_cpt" if extra is None else f"'titan_cpt[{extra}]'"
    return f"install it: `./scripts/setup.sh{f' {extra}' if extra else ''}` in a clone, else `pip install {wanted}`"


_ROOM = "Make room, then run the same command again"
_REMEDIES = {
    errno.EACCES: "Change its permissions or those of its folder (`ls -ld` shows them), or choose another path",
    errno.EPERM: "Change its permissions or attributes, or choose another path",
    errno.EROFS: "The file system is read-only: choose a path on another one",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "A part of the path is a file and not a folder: choose another path",
    errno.EISDIR: "It is a folder, and a file is needed: name a file",
    errno.EEXIST: "Rename or remove it, or choose another path",
    errno.ENOTEMPTY: "Rename or remove it, or choose another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Its symbolic links lead in a circle: mend them, or choose another path",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "The file system, or `ulimit -f`, allows no file of that size: " + _ROOM[0].lower() + _ROOM[1:],
    errno.EMFILE: "Allow more open files (`ulimit -n`)",
    errno.ENFILE: "The machine has too many open files: close some, or wait",
    errno.EIO: "The disk or its connection fails: check it, or choose another path",
    errno.ESTALE: "The network file system was mounted anew: run the same command again",
    errno.ETXTBSY: "It is a program that is running now: choose another path",
}


def os_error_message(error: OSError) -> str:
    """What the operating system refused: the path or paths, its reason, and what to do."""
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    where = f"{' -> '.join(paths)}: " if paths else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{reason}" + (f". {remedy}" if remedy else "")
