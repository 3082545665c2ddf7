"""The one kind of error that a user can cause and mend."""


class UserError(Exception):
    """Bad input: the message names the file, key or value at fault and says what would be right.

    ``train/run.py`` prints it as one line ``error: ...`` and exits with status 2.
    """


# What train/ imports of the packages of the extra `train` -> what pip calls it. docstring_parser and typeshed_client
# come with jsonargparse[signatures], PIL with torchvision.
EXTRA = {
    "torchvision": "torchvision", "PIL": "Pillow", "torchmetrics": "torchmetrics", "jsonargparse": "jsonargparse",
    "docstring_parser": "docstring-parser", "typeshed_client": "typeshed-client", "yaml": "PyYAML",
    "tensorboard": "tensorboard", "matplotlib": "matplotlib", "rich": "rich",
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install, where ``error`` is the absence of a package of the extra `train`; else None."""
    if error.name not in EXTRA:
        return None
    return f'the package {EXTRA[error.name]} is not installed: train/ needs `pip install -e ".[train]"`'


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for quoting inside a one-line message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
