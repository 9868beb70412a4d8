"""The one exception that commands turn into a line on stderr and exit code 2."""


class UserError(Exception):
    """Something the user gave is wrong: an argument, a config value, a folder or a file.

    The message is one line that names the key or the file and what was expected.
    """
