"""The six errors that the package raises on purpose.

Each carries one message for its reader: where the fault is, what was found, what is allowed and what to do. The command
line prints that message and no traceback. `exit_status` is what a program that called us may rely on.
"""


class TitanError(Exception):
    """What the six share: a message meant for the user, and the exit status that goes with it."""

    exit_status = 2


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
