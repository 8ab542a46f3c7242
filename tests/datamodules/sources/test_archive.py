import io
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from dataclasses import astuple
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from otl.config import Inpaint
from otl.datamodules import files, images
from otl.datamodules.files import Part, content_hash, hash_of
from otl.datamodules.headers import Limits, examined
from otl.datamodules.sources.archive import gone_through
from tests.datamodules.sources.conftest import NAMES, contents, memory, png, tar


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tarred(form):
    """With what the formats keep in headers of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name in ("a.png", f"{'b' * 120}.png", "ü.txt"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(png(1)), 1.5
            archive.addfile(info, io.BytesIO(png(1)))
    return buffer.getvalue()


def _zipped(compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in ("a.png", "sub/b.png", "ü.txt"):
            archive.writestr(name, png(1))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["tar", "deflated", "stored"])
def test_an_archive_is_as_the_folder_that_was_packed(tmp_path, searched, kind):
    compression = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    path = tar(tmp_path / "a.tar") if kind == "tar" else zipped(tmp_path / "a.zip", contents(), compression)
    for samples, problems in (searched(path), searched(path)):  # gone through, and from the index
        assert [sample.captions for sample in samples] == [[f"caption of {name}"] for name in NAMES]
        assert [images.load(sample.path, "white").getpixel((0, 0)) for sample in samples] == [
            (n, 0, 0) for n in range(3)
        ]
        assert problems == []


def test_an_archive_elsewhere_is_read_by_ranges(tmp_path, searched, monkeypatch):
    url = memory("shards", {"0.tar": tar(tmp_path / "0.tar").read_bytes()})
    samples, _ = searched(url)
    asked = []
    fetched = files.fetched
    monkeypatch.setattr(files, "fetched", lambda url, *range: asked.append(range) or fetched(url, *range))
    assert searched(url)[0] == samples and asked == []
    part = samples[1].path
    assert isinstance(part, Part) and images.load(part, "white").getpixel((0, 0)) == (1, 0, 0)
    assert asked == [(part.start, part.start + part.bytes)]


def test_a_folder_of_shards_is_read_in_their_order(tmp_path, searched):
    for number in (10, 2):
        tar(tmp_path / f"shard-{number}.tar", {f"{number}.png": png(number), f"{number}.txt": b"x"})
    assert [sample.path.name for sample in searched(tmp_path)[0]] == ["2.png", "10.png"]
    assert [sample.path.name for sample in searched(f"{tmp_path}/*-10.tar")[0]] == ["10.png"]


def test_a_changed_archive_is_gone_through_again(tmp_path, searched):
    tar(tmp_path / "a.tar")
    assert len(searched(tmp_path / "a.tar")[0]) == 3
    tar(tmp_path / "a.tar", {"new.png": png(7), "new.txt": b"new"})
    assert [sample.captions for sample in searched(tmp_path / "a.tar")[0]] == [["new"]]


def test_an_image_is_known_by_what_it_holds_wherever_its_archive_lies(tmp_path, searched):
    """So that the cache has it already, and a repeated run finds it the same; of a changed archive the others too."""
    for name, content in contents().items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    packed = tar(tmp_path / "a.tar").read_bytes()
    places = [tmp_path / "folder", tmp_path / "a.tar", zipped(tmp_path / "b.zip", contents())]
    places.append(memory("known", {"0.tar": packed}))
    hashes = [[content_hash(sample.path) for sample in searched(place)[0]] for place in places]
    assert len(set(hashes[0])) == 3 and hashes == [hashes[0]] * 4
    tar(tmp_path / "a.tar", contents() | {"b.png": png(9)})
    changed = [content_hash(sample.path) for sample in searched(tmp_path / "a.tar")[0]]
    assert [one == other for one, other in zip(changed, hashes[0])] == [True, False, True]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_masks_lie_beside_their_images(tmp_path, searched, elsewhere):
    files = contents() | {"sub/c-masklabel.png": png(255), "a-masklabel.webp": png(0, h=64)}
    path = tar(tmp_path / "a.tar", files)
    place = memory("masked", {"a.tar": path.read_bytes()}) if elsewhere else path
    for samples, problems in (searched(place, Inpaint()), searched(place, Inpaint())):
        assert [sample.mask and sample.mask.name for sample in samples] == [
            "a-masklabel.webp",
            None,
            "sub/c-masklabel.png",
        ]
        assert images.grey(samples[2].mask).getpixel((0, 0)) == 76  # of (255, 0, 0)
        assert content_hash(samples[2].mask) == hash_of(png(255))
        (problem,) = problems
        assert "a-masklabel.webp: 64x64 (height x width) does not have the shape of a.png, 48x64" in problem.details[0]
    samples, (problem,) = searched(place)
    assert [sample.mask for sample in samples] == [
        None
    ] * 3 and "2 masks (NAME-masklabel, or of a table)" in problem.message


def test_one_folder_of_an_archive(tmp_path, searched):
    zipped(tmp_path / "a.zip", contents())
    assert [sample.captions for sample in searched(f"zip://sub::{tmp_path}/a.zip")[0]] == [["caption of sub/c.png"]]


def test_an_archive_that_is_cut_off_is_named(tmp_path, searched):
    content = tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1600])  # a.png, and some of b.png
    (tmp_path / "b.zip").write_bytes(zipped(tmp_path / "b.zip", contents()).read_bytes()[:-30])
    for name, count, words in (
        ("a.tar", 1, "after 1 images (b.png is cut off)"),
        ("b.zip", 0, "File is not a zip file"),
    ):
        samples, problems = searched(tmp_path / name)
        (problem,) = [each for each in problems if each.key == "data.broken_images"]
        assert len(samples) == count
        assert "cannot be read to its end" in problem.details[0] and words in problem.details[0]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_inside_of_an_archive_is_named(tmp_path, searched, kind):
    tar(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name in ("d.png", "LICENSE"):  # which nobody asks for
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            archive.addfile(info)
    (problem,) = searched(tmp_path / "a.tar")[1]
    (detail,) = problem.details
    assert "d.png: it is no file but a link or the like" in detail


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out_of_an_archive_or_stand_twice_are_refused(tmp_path, searched, kind):
    """Those that differ in case alone are two: nothing is unpacked onto a disk that may not know the difference."""
    path, names = (
        tmp_path / f"a.{kind}",
        ["/abs.png", "../up.png", "a/../b.png", "A.png", "a.png", "..dots.png", "a.png"],
    )
    with tarfile.open(path, "w") if kind == "tar" else zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            if kind == "zip":
                archive.writestr(name, png(number))
                continue
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            archive.addfile(info, io.BytesIO(png(number)))
    samples, problems = searched(path)
    assert [sample.path.name for sample in samples] == ["A.png", "a.png"]
    (broken,) = [problem for problem in problems if problem.key == "data.broken_images"]
    assert [line.removeprefix(f"{path}/").split(": ")[0] for line in broken.details] == [*names[:3], "a.png"]
    assert sum("leads out of the archive" in line for line in broken.details) == 3


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_header_that_says_terabytes_are_to_come_takes_no_memory(tmp_path, searched, kind):
    info = tarfile.TarInfo("x.png")
    info.type, info.size = kind, 2**42
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    assert "the archive cannot be read to its end" in str(searched(tmp_path / "a.tar")[1])
    assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    tracemalloc.stop()


WHOLE = [
    (".tar", _tarred(tarfile.PAX_FORMAT)),
    (".tar", _tarred(tarfile.GNU_FORMAT)),
    (".zip", _zipped(zipfile.ZIP_STORED)),
    (".zip", _zipped(zipfile.ZIP_DEFLATED)),
]


@settings(max_examples=150)
@given(choice=strategies.sampled_from(WHOLE), draw=strategies.data())
def test_whatever_is_damaged_or_forged_in_an_archive_is_a_flaw_of_it(choice, draw):
    """And what has none is there, and what it was when the archive was gone through."""
    suffix, content = choice
    changed = bytearray(content)
    last = len(content) - 1
    places = strategies.integers(0, last) | strategies.integers(last - 200, last)
    for place in draw.draw(strategies.lists(places, min_size=1, max_size=4)):
        changed[place] = draw.draw(strategies.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(changed[: draw.draw(strategies.none() | strategies.integers(1, last))])
        archive = gone_through(path, partial(examined, limits=Limits()))
        for member, header in archive.images:
            assert header.flaw or hash_of(Part(path, *astuple(member)).read_bytes()) == member.content


def test_a_member_that_is_said_to_reach_beyond_the_archive_is_a_flaw_of_it(tmp_path):
    """What is deflated has its own end, so that it may be whole in spite of that."""
    content = bytearray(_zipped(zipfile.ZIP_DEFLATED))
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 24] = struct.pack("<I", len(content))  # its compressed size
    (tmp_path / "a.zip").write_bytes(content)
    archive = gone_through(tmp_path / "a.zip", partial(examined, limits=Limits()))
    assert archive.images == []
    assert "is said to reach beyond the archive's end" in archive.flaw


def test_hidden_members_and_labels_are_no_images(tmp_path, searched):
    tar(tmp_path / "a.tar", contents() | {"._a.png": b"x", "__MACOSX/.b.png": b"x", "a-condlabel.png": png(0)})
    samples, problems = searched(tmp_path / "a.tar")
    assert len(samples) == 3 and problems == []


def test_a_broken_image_in_an_archive_is_named(tmp_path, searched):
    path = tar(tmp_path / "a.tar", contents() | {"b.png": png(1)[:60], "d.png": b""})
    details = searched(path)[1][0].details
    assert [detail.partition(": ")[0] for detail in details] == [f"{path}/b.png", f"{path}/d.png"]


def test_what_a_small_archive_unpacks_to_is_limited(tmp_path, searched):
    """By what its directory says, before anything is unpacked; and by that again while it is."""
    bomb = zipped(tmp_path / "bomb.zip", {"a.png": bytes(files.LARGEST + 1), "b.png": png(1)})
    liar = zipped(tmp_path / "liar.zip", {"c.png": bytes(100 * 10**6)})
    said, true = (size.to_bytes(4, "little") for size in (1000, 100 * 10**6))
    liar.write_bytes(liar.read_bytes().replace(true, said))
    tracemalloc.start()
    for path, words in ((bomb, "it unpacks to 268 MB, more than"), (liar, "does not unpack to the 1000 bytes")):
        _, problems = searched(path)
        assert words in str(problems)
    assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    tracemalloc.stop()


def test_a_million_members_are_not_kept(tmp_path):
    """tarfile keeps what it has seen, unless told otherwise."""
    from otl.datamodules.sources.archive import _of_tar

    content = tar(tmp_path / "a.tar", {f"{n}.txt": b"" for n in range(50)}).read_bytes()
    opened = []
    original = tarfile.open
    members = _of_tar(io.BytesIO(content), len(content))
    try:
        tarfile.open = lambda **options: opened.append(original(**options)) or opened[0]
        assert max(len(opened[0].members) for _ in members) <= 1
    finally:
        tarfile.open = original
