"""How a command can end otherwise than done: one class for each exit code and sentence."""


class TrainingFailed(Exception):
    """Something failed after the input was accepted; `__cause__` is the error."""


class UsageError(ValueError):
    """The command line or the config file is wrong; the message is one sentence for the user."""


class WriteFailed(Exception):
    """The result cannot be written; the message is one sentence."""
