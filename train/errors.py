"""The one kind of error that a user can cause and mend."""


class UserError(Exception):
    """Bad input: the message names the file, key or value at fault and says what would be right.

    ``train/run.py`` prints it as one line ``error: ...`` and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for quoting inside a one-line message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def user_message(error: UserError) -> str:
    """The message as one line; one that comes out of a loader process is wrapped in that one's traceback."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\n" in text:
        text = text.splitlines()[-1].partition("UserError: ")[2] or text.splitlines()[-1]
    return " ".join(text.split())
