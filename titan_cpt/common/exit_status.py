"""Exit statuses of the commands, and the functions with which a command prints its last message and exits.

0    done
1    a failure that is not known to be the user's mistake, such as a non-finite loss
2    a mistake in the config, the command line, the data or the environment; the message says what to change
75   stopped early by a signal with everything saved: run the same command again
130  Ctrl-C
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from titan_cpt.errors import NumericsError, TitanError

SUCCESS = 0
FAILURE = NumericsError.exit_status
USER_ERROR = TitanError.exit_status
STOPPED_EARLY = 75  # EX_TEMPFAIL; a queue may start the same command again
INTERRUPTED = 128 + signal.SIGINT

# torchrun exits with 1 whatever its processes exit with. run_train.sh reads the true status from this file.
STATUS_FILE_VARIABLE = "TITAN_CPT_STATUS_FILE"


def print_error(message: str, *, silent: bool = False) -> None:
    """Print a message to stderr; under run_train.sh also write it to a file, which run_train.sh prints.

    run_train.sh shows the output of one process; from the files it prints the messages of the others.

    Args:
        silent: print nothing and write an empty file, because another rank prints the same message.
    """
    if not silent:
        print(message, file=sys.stderr)
    if path := os.environ.get(STATUS_FILE_VARIABLE):
        message_file = Path(f"{path}.process-{os.environ.get('LOCAL_RANK', '0')}")
        with suppress(OSError):
            message_file.write_text("" if silent else f"{message}\n", encoding="utf-8")


def exit_with(status: int) -> NoReturn:
    """Exit with a status; under run_train.sh also write a status other than 0 to its status file."""
    path = os.environ.get(STATUS_FILE_VARIABLE)
    # When a rank fails, torchrun stops the others, and these exit with another status: keep that of a user error.
    if path and status and not _has_user_error(Path(path)):
        Path(path).write_text(str(status), encoding="utf-8")
    sys.exit(status)


def _has_user_error(status_file: Path) -> bool:
    return status_file.exists() and status_file.read_text(encoding="utf-8") == str(USER_ERROR)


def exit_interrupted(message: str) -> NoReturn:
    """Print one line instead of a traceback and die of SIGINT: a shell then has status 130 and ends its loop too."""
    print(f"stopped by Ctrl-C{': ' if message else ''}{message}", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(INTERRUPTED)
