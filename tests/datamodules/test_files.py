import io
import os
import pickle
import zlib
from pathlib import Path

import fsspec
import pytest

from otl.config import SettingsError
from otl.datamodules import files
from otl.datamodules.files import Part, Remote, content_hash, named, stamp

CONTENT = bytes(range(256)) * 10


@pytest.fixture
def remote():
    fsspec.filesystem("memory").pipe("/files/a.b.jpg", CONTENT)
    return Remote("memory://files/a.b.jpg", len(CONTENT), "v1")


def test_the_content_decides_the_hash_and_not_the_name(tmp_path):
    for name, content in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b") != content_hash(tmp_path / "c")


def test_elsewhere_the_place_and_the_stamp_decide_the_hash_and_nothing_is_read():
    hashes = {
        content_hash(Remote(url, size, stamp))
        for url, size, stamp in [("none://a", 1, "x"), ("none://a", 1, "y"), ("none://b", 1, "x"), ("none://a", 1, "")]
    }
    assert len(hashes) == 4
    assert content_hash(Remote("none://a", 1)) != content_hash(Remote("none://a", 2))


def test_a_file_elsewhere_has_the_parts_of_a_name(remote):
    assert (remote.name, remote.stem, remote.suffix, str(remote)) == (
        "a.b.jpg",
        "a.b",
        ".jpg",
        "memory://files/a.b.jpg",
    )


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/b%20c.jpg?width=3", "b c.jpg"),
        ("s3://bucket/a?b.jpg", "a?b.jpg"),
        ("https://host/shards/", "shards"),
    ],
)
def test_a_name_is_the_last_part_of_the_path(url, name):
    assert Remote(url).name == name


def test_it_is_read_whole_or_by_ranges(remote):
    assert remote.read_bytes() == CONTENT
    with remote.open("rb") as file:
        assert file.seek(-4, io.SEEK_END) == len(CONTENT) - 4
        assert file.read() == CONTENT[-4:] and file.read() == b""
        file.seek(5)
        assert file.read(3) == CONTENT[5:8] and file.tell() == 8


def test_a_range_alone_is_asked_for(remote, monkeypatch):
    asked = []
    monkeypatch.setattr(
        files, "fetched", lambda url, start=None, end=None: asked.append((start, end)) or bytes(end - start)
    )
    files.read_range(remote, 100, 50)
    with Remote(remote.url, 10**6).open("rb", buffering=1000) as file:
        file.seek(5000)
        file.read(10), file.read(10)
    assert asked == [(100, 150), (5000, 6000)]


def test_a_file_that_has_changed_since_is_not_taken_for_the_same(remote):
    with pytest.raises(SettingsError, match="has 2560 bytes, and had 7 when"):
        Remote(remote.url, 7).read_bytes()


def test_what_goes_to_workers_is_small_and_equal(remote):
    assert pickle.loads(pickle.dumps(remote)) == remote and len(pickle.dumps(remote)) < 200


@pytest.mark.parametrize("packed", [False, True])
def test_a_part_of_an_archive_is_a_range_of_its_bytes(tmp_path, packed):
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    content = compressor.compress(CONTENT) + compressor.flush() if packed else CONTENT
    (tmp_path / "a.tar").write_bytes(b"before" + content + b"after")
    part = Part(tmp_path / "a.tar", "sub/b.jpg", 6, len(content), len(CONTENT) if packed else None)
    assert part.read_bytes() == part.open("rb").read() == CONTENT
    assert (part.stem, part.suffix, str(part)) == ("b", ".jpg", f"{tmp_path}/a.tar/sub/b.jpg")


def test_a_file_whose_time_was_put_back_has_another_stamp(tmp_path, monkeypatch):
    """The time of its last change of any kind cannot be."""
    monkeypatch.setattr(files, "tick", lambda _: -1)
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before, about = stamp(path), path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_mtime_ns == about.st_mtime_ns and stamp(path) != before


def test_a_file_that_may_change_again_at_the_same_time_has_no_stamp(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    changed = path.stat().st_ctime_ns
    tick = files.tick(changed)
    assert (files.tick(7 * 10**9 + 1), files.tick(7 * 10**9)) == (2e7, 2e9)  # a disk that counts whole seconds
    for passed, known in ((0, False), (tick, False), (tick + 1, True), (-1, False)):
        monkeypatch.setattr(files.time, "time_ns", lambda now=changed + passed: now)
        assert bool(stamp(path)) == known


def test_another_file_in_its_place_has_another_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "tick", lambda _: -1)
    (tmp_path / "a").write_bytes(b"1")
    assert stamp(tmp_path / "a").endswith(f" {(tmp_path / 'a').stat().st_ino}")


@pytest.mark.parametrize(
    ("text", "by", "found"),
    [
        ("a/b.png", Path("lists/m.csv"), Path("lists/a/b.png")),
        ("/a.png", Path("lists/m.csv"), Path("/a.png")),
        ("s3://x/a.png", Path("lists/m.csv"), Remote("s3://x/a.png")),
        ("a/b.png", Remote("s3://x/lists/m.csv"), Remote("s3://x/lists/a/b.png")),
    ],
)
def test_what_a_table_lists_is_relative_to_its_folder(text, by, found):
    assert named(text, by) == found


def test_a_request_is_repeated_before_it_ends_a_run(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    tries = []

    def request():
        tries.append(1)
        if len(tries) < files.ATTEMPTS:
            raise ConnectionResetError("gone")
        return b"x"

    assert files.patiently("u", request) == b"x" and len(tries) == files.ATTEMPTS
    with pytest.raises(SettingsError, match=r"u: cannot be read \(ConnectionResetError: gone\); look at the address"):
        files.patiently("u", lambda: tries.clear() or request())


def test_what_is_not_there_or_not_allowed_is_asked_for_once():
    tries = []

    def request(error):
        tries.append(error)
        raise error

    with pytest.raises(FileNotFoundError):
        files.patiently("u", lambda: request(FileNotFoundError("u")))
    with pytest.raises(SettingsError, match="PermissionError"):
        files.patiently("u", lambda: request(PermissionError("u")))
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("url", "words"), [("gs://a/b", "gs:// needs gcsfs, which is not installed; pip"), ("nonsense://a", "no protocol")]
)
def test_what_a_protocol_needs_is_said(url, words):
    with pytest.raises(SettingsError, match=words):
        files.file_system(url)
