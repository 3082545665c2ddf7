"""Getting ADE20K: a download that goes on where it stopped, checks, and an extraction that stays in its folder.

The benchmark's site publishes no checksum for its archive. Without one, what is checked is the length that the
server announces and the checksum that the zip format carries for every file; the SHA-256 that was found is
written beside the archive, to be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rich.filesize import decimal as size_text

from train.errors import UserError

ADE20K_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE20K_FOLDER = "ADEChallengeData2016"
BLOCK = 1 << 20
Advance = Callable[[int, "int | None"], None]  # (bytes so far, bytes in all or None)


def download(
    root: str | Path,
    url: str = ADE20K_URL,
    folder: str = ADE20K_FOLDER,
    progress: bool = True,
) -> Path:
    """Downloads and extracts a data set of ADE20K's layout.

    Args:
        root: where the archive and the data set go.
        url: the zip archive.
        folder: the folder inside the archive that is the data set.
        progress: whether to show a progress bar.

    Returns:
        ``root / folder``. If it is there already nothing is done; ``check-data`` tells whether it is whole.

    Raises:
        UserError: no connection, a damaged or unsafe archive, a full disk.
    """
    root = Path(root)
    if (root / folder).is_dir():
        return root / folder
    archive = root / (url.rsplit("/", 1)[-1] or "archive.zip")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _progress(f"downloading {archive.name}", progress) as advance:
            fetch(url, archive, advance)
        record = archive.with_name(archive.name + ".sha256")
        record.write_text(f"{file_sha256(archive)}  {archive.name}\n")
        with _progress(f"extracting {archive.name}", progress) as advance:
            extract(archive, root, folder, advance)
    except OSError as error:
        raise UserError(
            f"{_short(error.filename or root)}: {(error.strerror or str(error)).lower()}"
        ) from None
    archive.unlink()
    return root / folder


def fetch(url: str, target: Path, advance: Advance | None = None, tries: int = 5, pause: float = 1.0) -> None:
    """Downloads `url` to `target`, going on with an earlier ``<target>.part``.

    A part is continued only while the server says that the file is the same (ETag or date); a connection that
    breaks is taken up again, `tries` times in a row without a byte of progress, with growing pauses (seconds).

    Raises:
        UserError: the server refuses or stays away, or sends another length than it announced.
    """
    if target.is_file():
        return
    part, notes = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            total = _fetch_rest(url, part, notes, advance)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.is_file() else 0
        failures = failures + 1 if after <= before else 1
        if failures >= tries:
            kept = (
                f"{after} bytes are kept in {part}, run it again to go on"
                if after
                else "nothing arrived, run it again"
            )
            raise UserError(f"{url}: {reason}; {kept}")
        time.sleep(pause * 2 ** (failures - 1))
    size = part.stat().st_size
    if total is not None and size != total:
        part.unlink()
        raise UserError(f"{url}: {size} bytes arrived and {total} were announced; run it again")
    os.replace(part, target)
    notes.unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, notes: Path, advance: Advance | None) -> int | None:
    """Appends what is missing to `part`; returns the length of the whole, if the server tells."""
    have = part.stat().st_size if part.is_file() else 0
    known = _read_notes(notes) if have else {}
    if known.get("url") != url or not known.get("validator"):
        have = 0  # nothing says that the server still has the same file
    headers = {"User-Agent": "depict_kernels", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have == known.get("total"):
            return have  # there was nothing left to send
        if error.code == 416:
            part.unlink()
        raise
    with answer:
        resumed = answer.status == 206 and (answer.headers["Content-Range"] or "").startswith(
            f"bytes {have}-"
        )
        length = answer.headers["Content-Length"]
        have = have if resumed else 0
        total = None if length is None else have + int(length)
        if not resumed:
            etag = answer.headers["ETag"] or ""
            # If-Range takes strong validators only.
            validator = etag if etag and not etag.startswith("W/") else answer.headers["Last-Modified"]
            fresh = notes.with_name(notes.name + ".new")
            fresh.write_text(json.dumps({"url": url, "validator": validator, "total": total}))
            os.replace(fresh, notes)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - have > free:
            raise UserError(f"{part.parent}: {size_text(total - have)} to come, {size_text(free)} free")
        with open(part, "ab" if resumed else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                have += len(block)
                if advance is not None:
                    advance(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke after {have} of {total} bytes")
    return total


def _read_notes(notes: Path) -> dict[str, Any]:
    """What was written beside a part; empty where that is missing or damaged."""
    try:
        known = json.loads(notes.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def extract(
    archive: Path,
    root: Path,
    folder: str,
    advance: Advance | None = None,
    max_bytes: int = 64 << 30,
    max_ratio: int = 200,
) -> None:
    """Extracts `folder` of a zip archive to ``root / folder``, all of it or nothing.

    Every name is looked at before anything is written: absolute paths, "..", links, backslashes and encrypted
    files are refused, as is an archive that would unpack to more than `max_bytes` or more than `max_ratio` times
    its own size, or than the disk holds.

    Raises:
        UserError: what is wrong with which entry; nothing is left behind.
    """
    making = root / f"{folder}.extracting"
    shutil.rmtree(making, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [entry for entry in file.infolist() if not entry.is_dir()]
            for entry in entries:
                _check_entry(archive, entry)
            wanted = [entry for entry in entries if PurePosixPath(entry.filename).parts[0] == folder]
            if not wanted or any(len(PurePosixPath(entry.filename).parts) == 1 for entry in wanted):
                raise UserError(f"{archive}: has no folder {folder}/")
            total = sum(entry.file_size for entry in wanted)
            if total > min(max_bytes, max_ratio * archive.stat().st_size):
                raise UserError(
                    f"{archive}: would unpack to {size_text(total)}; it does not look like a data set"
                )
            free = shutil.disk_usage(root).free
            if total > free:
                raise UserError(f"{root}: {size_text(total)} to unpack, {size_text(free)} free")
            done = 0
            for entry in wanted:
                path = making.joinpath(*PurePosixPath(entry.filename).parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                # "x": two entries of one name (or differing in case only, on some systems) are an error.
                # zipfile reads no more than the announced size, and checks the checksum at the end.
                with file.open(entry) as source, open(path, "xb") as sink:
                    shutil.copyfileobj(source, sink, BLOCK)
                done += entry.file_size
                if advance is not None:
                    advance(done, total)
        os.replace(making, root / folder)
    except FileExistsError as error:
        raise UserError(f"{archive}: holds {_short(error.filename)} twice") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{archive}: damaged ({_short(error)}); delete it and download again") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _short(text: object, most: int = 200) -> str:
    """In printable characters, cut: what a damaged archive says of itself may be kilobytes of anything."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if len(text) <= most else f"{text[:most]}..."


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = PurePosixPath(name).parts
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name or "\0" in name:
        raise UserError(
            f"{archive}: entry {_short(repr(name))} points outside of its folder; nothing was extracted"
        )
    if kind not in (0, stat.S_IFREG):
        raise UserError(f"{archive}: entry {_short(repr(name))} is a link or a device; nothing was extracted")
    if entry.flag_bits & 1:
        raise UserError(f"{archive}: entry {_short(repr(name))} is encrypted; nothing was extracted")


@contextlib.contextmanager
def _progress(title: str, shown: bool) -> Iterator[Advance | None]:
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
