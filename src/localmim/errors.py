"""The exceptions that commands turn into one line on stderr."""


class UserError(Exception):
    """Something the user gave is wrong: an argument, a config value, a folder or a file. Exit code 2.

    The message is one line that names the key or the file and what was expected.
    """


class RunError(Exception):
    """A run had to stop: a signal, or a loss that stays non-finite. Exit code 1.

    The message is one line that says what happened and where it is written down.
    """
