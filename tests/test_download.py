"""The download against a local server that breaks off, changes its mind and lies; archives that want out."""

import errno
import hashlib
import http.server
import os
import stat
import threading
import zipfile

import pytest

import train.download
from train.download import download, extract, fetch
from train.errors import UserError

BODY = bytes(range(256)) * 1200  # 300 kB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body with ranges; server.plan says what goes wrong with the next requests."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        plan = server.plan.pop(0) if server.plan else {}
        if "status" in plan:
            self.send_error(plan["status"])
            return
        body, start = server.body, 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + plan.get("send", len(body))])


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.plan, server.requests = BODY, [], []
    server.etag, server.ranges, server.length = '"one"', True, True
    server.url = f"http://127.0.0.1:{server.server_port}/set.zip"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ranges(server) -> list[str | None]:
    return [headers.get("Range") for headers in server.requests]


def test_fetch_whole(server, tmp_path):
    seen = []
    fetch(server.url, tmp_path / "a", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "a").read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    fetch(server.url, tmp_path / "a")
    assert len(server.requests) == 1  # it is there


def test_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.plan = [{"send": 100_000}, {"send": 70_000}]
    fetch(server.url, tmp_path / "a", pause=0)
    assert (tmp_path / "a").read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", "bytes=170000-"]


def test_later_run_goes_on_where_the_first_stopped(server, tmp_path):
    server.plan = [{"send": 100_000}]
    with pytest.raises(UserError, match=r"100000 bytes are kept in .*a\.part, run it again to go on"):
        fetch(server.url, tmp_path / "a", tries=1)
    assert not (tmp_path / "a").exists()
    fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and ranges(server)[-1] == "bytes=100000-"


def test_changed_file_starts_again(server, tmp_path):
    server.plan = [{"send": 100_000}]
    with pytest.raises(UserError):
        fetch(server.url, tmp_path / "a", tries=1)
    server.body, server.etag = BODY[::-1], '"two"'
    fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY[::-1]


def test_part_of_another_address_is_not_continued(server, tmp_path):
    server.plan = [{"send": 100_000}]
    with pytest.raises(UserError):
        fetch(server.url + "?other", tmp_path / "a", tries=1)
    fetch(server.url, tmp_path / "a")
    assert ranges(server)[-1] is None and (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("lack", ["ranges", "etag"])
def test_server_that_cannot_resume(server, tmp_path, lack):
    if lack == "ranges":
        server.ranges = False
    else:
        server.etag = ""
    server.plan = [{"send": 100_000}]
    fetch(server.url, tmp_path / "a", pause=0)
    assert (tmp_path / "a").read_bytes() == BODY


def test_finished_part_is_taken(server, tmp_path):
    server.plan = [{"send": 100_000}]
    with pytest.raises(UserError):
        fetch(server.url, tmp_path / "a", tries=1)
    (tmp_path / "a.part").write_bytes(
        BODY
    )  # the rest arrived, and the process was killed before the renaming
    fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("notes", ["", '{"url": "htt', "[1]", "\udcff"])
def test_damaged_notes_are_none(server, tmp_path, notes):
    (tmp_path / "a.part").write_bytes(BODY[:1000])
    (tmp_path / "a.part.json").write_text(notes, errors="surrogateescape")
    fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and ranges(server) == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_errors_of_the_server(server, tmp_path):
    server.plan = [{"status": 404}]
    with pytest.raises(UserError, match="the server answers 404"):
        fetch(server.url, tmp_path / "a")
    server.plan = [{"status": 503}]
    fetch(server.url, tmp_path / "a", pause=0)
    assert (tmp_path / "a").read_bytes() == BODY
    server.plan = [{"status": 503}] * 3
    with pytest.raises(UserError, match="503"):
        fetch(server.url, tmp_path / "b", tries=3, pause=0)
    assert not server.plan


def test_nobody_answers(tmp_path):
    with pytest.raises(UserError, match="refused.*run it again"):
        fetch("http://127.0.0.1:9/a.zip", tmp_path / "a", tries=2, pause=0)


# ---------------------------------------------------------------------------------------------- extract


def archive(path, entries: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


GOOD = {"Set/images/a.jpg": b"jpeg", "Set/annotations/a.png": b"png", "readme.txt": b"outside of the folder"}


def test_extracts_the_folder(tmp_path):
    extract(archive(tmp_path / "a.zip", GOOD), tmp_path, "Set")
    assert (tmp_path / "Set/images/a.jpg").read_bytes() == b"jpeg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Set", "a.zip"]


@pytest.mark.parametrize(
    "name",
    ["../evil", "Set/../../evil", "/tmp/evil", "Set/..\\..\\evil", "C:/evil", "Set/images/../../../evil"],
)
def test_names_that_lead_outside(tmp_path, name):
    box = tmp_path / "box"
    box.mkdir()
    path = box / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("Set/a", b"good")
        entry = zipfile.ZipInfo("x")
        entry.filename = name  # past the cleaning that ZipInfo does
        file.writestr(entry, b"evil")
    with pytest.raises(UserError, match="points outside of its folder; nothing was extracted"):
        extract(path, box, "Set")
    assert [p.name for p in tmp_path.rglob("*")] == ["box", "a.zip"]


def test_links_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        link = zipfile.ZipInfo("Set/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc")
        file.writestr("Set/link/passwd", b"evil")
    with pytest.raises(UserError, match=r"entry 'Set/link' is a link"):
        extract(tmp_path / "a.zip", tmp_path, "Set")
    assert not (tmp_path / "Set").exists()


def test_bomb_is_refused(tmp_path):
    path = archive(tmp_path / "a.zip", {"Set/zeros": bytes(8 << 20)})
    with pytest.raises(UserError, match=r"would unpack to 8\.4 MB"):
        extract(path, tmp_path, "Set")
    with pytest.raises(UserError, match="would unpack to"):
        extract(path, tmp_path, "Set", max_bytes=1000, max_ratio=10**9)
    extract(path, tmp_path, "Set", max_ratio=10**9)
    assert (tmp_path / "Set/zeros").stat().st_size == 8 << 20


def test_bomb_that_lies_about_its_size(tmp_path):
    """Announced as 10 bytes in the directory: no more are written, and the checksum fails."""
    path = archive(tmp_path / "a.zip", {"Set/zeros": bytes(1 << 20)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        extract(path, tmp_path, "Set")
    assert not (tmp_path / "Set").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "not a zip"])
def test_damaged_archive(tmp_path, damage):
    path = archive(tmp_path / "a.zip", {**GOOD, "Set/long": os.urandom(5000)})
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:3000]
    elif damage == "flipped":
        data[2000] ^= 1
    else:
        data = b"<html>404</html>"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip: damaged"):
        extract(path, tmp_path, "Set")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_damage_is_told_in_few_words(tmp_path):
    """A stream that does not inflate, and names in heading and directory that differ in thousands of bytes."""
    name = "Set/" + "x" * 40_000
    for entry, at, wrong in (("Set/a", 30 + len("Set/a"), b"\xff" * 8), (name, 2000, bytes(8))):
        path = archive(tmp_path / "a.zip", {entry: bytes(range(256)) * 90})
        data = bytearray(path.read_bytes())
        data[at : at + 8] = wrong
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.zip: damaged") as error:
            extract(path, tmp_path, "Set")
        assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_the_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="has no folder Set/"):
        extract(archive(tmp_path / "a.zip", {"Set": b"file"}), tmp_path, "Set")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_entries_twice_and_folder_missing(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("Set/a", b"1")
        file.writestr("Set/a", b"2")
    with pytest.raises(UserError, match="twice"):
        extract(tmp_path / "a.zip", tmp_path, "Set")
    with pytest.raises(UserError, match="has no folder Other/"):
        extract(tmp_path / "a.zip", tmp_path, "Other")


# --------------------------------------------------------------------------------------------- together


def test_download_extracts_and_records_the_checksum(server, tmp_path):
    server.body = archive(tmp_path / "made.zip", GOOD).read_bytes()
    digest = hashlib.sha256(server.body).hexdigest()
    server.plan = [{"send": 50}]
    root = download(tmp_path / "data", server.url, "Set", progress=True)
    assert (root / "images/a.jpg").read_bytes() == b"jpeg"
    assert (tmp_path / "data" / "set.zip.sha256").read_text() == f"{digest}  set.zip\n"
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["Set", "set.zip.sha256"]
    count = len(server.requests)
    assert download(tmp_path / "data", server.url, "Set") == root and len(server.requests) == count


def test_full_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train.download.shutil, "disk_usage", lambda path: train.download.shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(UserError, match=r"to come, 0 bytes free"):
        download(tmp_path / "data", server.url, "Set", progress=False)
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train.download, "fetch", full)
    with pytest.raises(UserError, match="no space left on device"):
        download(tmp_path / "data", server.url, "Set", progress=False)


def test_download_asks_for_a_folder(monkeypatch):
    from train.command_data import download_data

    with pytest.raises(UserError, match="data.root: names the folder"):
        download_data(["--data.root", "null"])
