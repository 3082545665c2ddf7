"""A run's folder: whether it can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from train.errors import UserError


def check_writable(folder: Path, key: str) -> None:
    """Raises ``UserError`` where nothing can be written into ``folder`` or, as long as it is missing, above it.

    Writes and removes a nameless file, since permission bits do not tell (root, read-only and full disks). ``key``
    is what to change.
    """
    existing = next(path for path in (folder, *folder.parents, Path()) if os.path.lexists(path))
    failed = f"{folder}: cannot be {'written' if existing == folder else 'made'}"
    if not existing.is_dir():
        raise UserError(f"{failed}: {existing} is no folder; change {key}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise UserError(f"{failed}: {existing}: {error.strerror}; change {key}") from None
