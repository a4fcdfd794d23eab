"""Messages for errors of the operating system and for missing packages."""

import errno

import pytest

from titan_cpt.errors import how_to_install, os_error_message


def test_how_to_install_names_the_extra_of_a_package():
    """In a clone and with pip; a required package has no extra."""
    assert how_to_install("lm_eval").endswith(
        "`./scripts/setup.sh eval` in a clone, or `pip install 'titan_cpt[eval]'`"
    )
    assert how_to_install("zstandard").endswith("`./scripts/setup.sh` in a clone, or `pip install titan_cpt`")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied. Change its permissions or"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free disk space, then run"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link"),
        (
            OSError(errno.EISDIR, "Is a directory", b"\xff"),
            "\udcff: Is a directory. It is a folder: give the path of a file",
        ),
        (OSError("no number"), "no number"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_the_message_for_an_os_error_has_paths_reason_and_remedy(error, message):
    """Both paths of a rename, and a remedy if there is one."""
    assert os_error_message(error).startswith(message)
