"""The two ways in which work can end other than well, and how a missing library is asked for."""


class UserError(Exception):
    """Something the user must change: the message names the file, the value found, the one expected and the next step.

    The command line prints the message without a traceback and exits with 2.
    """


def install_hint(extra: str) -> str:
    """What to type in the project's folder so that the libraries of an extra (pyproject.toml) are there."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


class CheckFailed(Exception):
    """The work ran and its check failed (parity, gate). The command line prints the message and exits with 1."""
