"""The two ways in which work can end other than well."""


class UserError(Exception):
    """Something the user must change: the message names the file, the value found, the one expected and the next step.

    The command line prints the message without a traceback and exits with 2.
    """


class CheckFailed(Exception):
    """The work ran and its check failed (parity, gate). The command line prints the message and exits with 1."""
