"""The exceptions that commands turn into one line on stderr."""


class UserError(Exception):
    """Something the user gave is wrong: an argument, a config value, a folder or a file. Exit code 2.

    The message is one line that names the key or the file and what was expected.
    """


class RunError(Exception):
    """A run had to stop: a signal, or a loss that stays non-finite. Exit code 1.

    The message is one line that says what happened and where it is written down.
    """


def first_line(error: Exception) -> str:
    """What an exception says first, in one line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


class PeerError(RunError):
    """Another process of the job failed, so this one stops as well; the reason is in the other's log. Exit code 3."""
