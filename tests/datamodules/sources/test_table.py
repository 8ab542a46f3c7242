import multiprocessing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from otl.config import Inpaint, SettingsError
from otl.datamodules import images
from otl.datamodules.files import content_hash, hash_of
from otl.datamodules.scan import scan
from otl.datamodules.sources import table
from tests.datamodules.fakes import CountingEncoder, data, module
from tests.datamodules.sources.conftest import folder, memory, png

ROWS = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"row {n}", "id": n} for n in range(5)]


def parquet(path, rows=ROWS, row_group_size=2):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def arrow(path, *, stream):
    rows = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file:
        kind = pa.ipc.new_stream if stream else pa.ipc.new_file
        with kind(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    return path


@pytest.fixture(params=["parquet", "arrow stream", "arrow file", "memory"])
def place(request, tmp_path):
    if request.param == "memory":
        return memory("tables", {"t.parquet": parquet(tmp_path / "t.parquet").read_bytes()})
    if request.param == "parquet":
        return parquet(tmp_path / "t.parquet")
    return arrow(tmp_path / "t.arrow", stream=request.param == "arrow stream")


def test_images_and_captions_are_in_the_rows(place, searched):
    for samples, problems in (searched(place), searched(place)):  # gone through, and from the index
        assert [sample.captions for sample in samples] == [[f"row {n}"] for n in range(5)]
        assert [images.load(sample.path, "white").getpixel((0, 0)) for sample in samples] == [
            (n, 0, 0) for n in range(5)
        ]
        assert [content_hash(sample.path) for sample in samples] == [hash_of(png(n)) for n in range(5)]
        assert {sample.size for sample in samples} == {(48, 64)} and problems == []


@pytest.mark.parametrize("column", ["mask", "other"])
def test_masks_are_in_a_column_too(tmp_path, searched, column):
    """As images or as paths, and not every row has one."""
    folder(tmp_path / "photos")
    whole, paths = {"bytes": png(255), "path": None}, ["photos/a.png", None, "photos/b.png"]
    rows = [row | {"mask": mask} for row, mask in zip(ROWS, [None, whole, whole])]
    rows = [row | {"other": path} for row, path in zip(rows, paths)]
    place = parquet(tmp_path / "t.parquet", rows)
    for _ in range(2):  # gone through, and from the index
        samples, problems = searched(place, Inpaint(), mask_column=None if column == "mask" else column)
        masks = [sample.mask for sample in samples]
        if column == "other":
            assert masks == [path and tmp_path / path for path in paths] and problems == []
            continue
        assert masks[0] is None and str(masks[2]) == f"{place}, row 2 (mask)" and problems == []
        assert [images.grey(mask).getpixel((0, 0)) for mask in masks[1:]] == [76, 76]  # of (255, 0, 0)
        assert {content_hash(mask) for mask in masks[1:]} == {hash_of(png(255))}


def test_a_row_is_named_with_its_number_and_path(tmp_path, searched):
    samples, _ = searched(parquet(tmp_path / "t.parquet"))
    assert str(samples[3].path) == f"{tmp_path}/t.parquet, row 3 (3.png)" and samples[3].path.suffix == ".png"


def test_an_image_may_be_bytes_alone_and_a_caption_a_list(tmp_path, searched):
    rows = [{"jpg": png(n), "captions": [f"one {n}", f"two {n}"]} for n in range(2)]
    samples, _ = searched(parquet(tmp_path / "t.parquet", rows))
    assert [sample.captions for sample in samples] == [["one 0", "two 0"], ["one 1", "two 1"]]


def test_rows_with_paths_alone_are_held_to_the_rules_of_lists(tmp_path, searched):
    """Which files and addresses a table may name, though other rows have their images; and no secret is kept."""
    (tmp_path / "set").mkdir()
    folder(tmp_path / "photos")
    secret = "memory://me:secret@host/a.png?sig=secret"
    paths = ["../photos/a.png", "file:///etc/hostname", secret]
    rows = [ROWS[0], *({"image": {"bytes": None, "path": path}, "text": "x", "id": 9} for path in paths)]
    samples, problems = searched(parquet(tmp_path / "set" / "t.parquet", rows))
    assert len(samples) == 2 and "names 1 file outside of its folder" in str(problems)
    assert "it names file:///etc/hostname" in str(problems) and "secret" not in str(problems)
    assert all("secret" not in path.read_text() for path in (tmp_path / "cache").rglob("*.jsonl"))


def test_a_row_may_have_the_path_of_its_image_alone(tmp_path, searched):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(3))
    rows = [{"image": {"bytes": None, "path": "sub/a.png"}, "text": "x"}, ROWS[0]]
    for samples, problems in (searched(parquet(tmp_path / "t.parquet", rows)), searched(tmp_path / "t.parquet")):
        assert samples[0].path == tmp_path / "sub" / "a.png" and samples[0].captions == ["x"]
        assert len(samples) == 2 and problems == []


def test_other_columns_are_taken_where_they_are_set(tmp_path, searched):
    rows = [{"image": png(0), "other": png(9), "text": "a", "alt": "b"}]
    samples, _ = searched(parquet(tmp_path / "t.parquet", rows), image_column="other", caption_column="alt")
    assert samples[0].captions == ["b"] and images.load(samples[0].path, "white").getpixel((0, 0)) == (9, 0, 0)


def test_a_column_that_is_not_there_lists_those_that_are(tmp_path, searched):
    (problem,) = searched(parquet(tmp_path / "t.parquet"), caption_column="texts")[1]
    assert problem.fatal
    assert "data.concepts.c.caption_column=texts: is no column" in problem.message
    assert "image (images), text (text), id (neither text nor images)" in problem.message


def test_rows_without_an_image_are_named(tmp_path, searched):
    rows = [*ROWS[:2], {"image": None, "text": "x"}, {"image": {"bytes": b"no image", "path": "x.png"}, "text": "y"}]
    samples, problems = searched(parquet(tmp_path / "t.parquet", rows))
    assert len(samples) == 2
    assert [detail.partition("t.parquet, ")[2].partition(":")[0] for detail in problems[0].details] == [
        "row 2",
        "row 3 (x.png)",
    ]


@pytest.fixture
def opened(monkeypatch):
    """Tables that were opened, one for each row group that was read."""
    opened = []
    monkeypatch.setattr(table, "_parquet", lambda file, original=table._parquet: opened.append(file) or original(file))
    return opened


@pytest.mark.parametrize(("room", "reads"), [(10**6, 3), (1, 6)])
def test_row_groups_are_kept_as_long_as_there_is_room(tmp_path, searched, opened, monkeypatch, room, reads):
    """Groups of 2, 2 and 1 rows, gone through twice."""
    samples, _ = searched(parquet(tmp_path / "t.parquet"))
    monkeypatch.setattr(table, "ROW_GROUPS", table.RowGroups(room))
    opened.clear()
    for sample in [*samples, *samples]:
        sample.path.read_bytes()
    assert len(opened) == reads


def test_the_cache_is_filled_row_group_by_row_group(tmp_path, opened, monkeypatch):
    """Rows of two buckets by turns; gone through bucket by bucket, every group would be read twice."""
    rows = [{"image": png(n, h=64 if n % 2 else 128), "text": "x"} for n in range(40)]
    path = parquet(tmp_path / "t.parquet", rows, row_group_size=4)
    made = module(data(path, encode_batch_size=2))
    three = 3 * pq.ParquetFile(path).read_row_group(0, columns=["image"]).nbytes
    monkeypatch.setattr(table, "ROW_GROUPS", table.RowGroups(three + 100))  # of ten
    opened.clear()
    encoder = CountingEncoder()
    made.fill_cache(encoder, images=True, prompts=False)
    assert encoder.images == 40 and len(opened) == 10


def test_workers_that_were_forked_read_rows_too(tmp_path, searched):
    samples, _ = searched(parquet(tmp_path / "t.parquet"))
    samples[0].path.read_bytes()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read, samples) == [row["image"]["bytes"] for row in ROWS]


def read(sample):
    return sample.path.read_bytes()


def test_large_row_groups_are_reported(tmp_path, searched, monkeypatch):
    monkeypatch.setattr("otl.datamodules.sources.find.LARGE_GROUP", 2 * len(png(0)) - 1)
    samples, problems = searched(parquet(tmp_path / "t.parquet"))
    assert len(samples) == 5
    assert not problems[0].fatal and "row_group_size=100" in problems[0].message


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"], "data/train*.parquet"),
        (["train/0.arrow", "validation/0.arrow"], "train"),
    ],
)
def test_splits_are_never_mixed(tmp_path, searched, names, example):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet(tmp_path / name) if name.endswith("parquet") else arrow(tmp_path / name, stream=True)
    (problem,) = searched(tmp_path)[1]
    assert problem.fatal and "several splits (" in problem.message
    assert problem.message.endswith(f"give one, such as {tmp_path}/{example}")
    assert len(searched(f"{tmp_path}/{example}")[0]) == 5


def test_a_saved_dataset_is_read_without_its_cache_files(tmp_path, searched):
    arrow(tmp_path / "data-00000-of-00001.arrow", stream=True)
    arrow(tmp_path / "cache-0123.arrow", stream=True)
    (tmp_path / "state.json").write_text("{}")
    samples, problems = searched(tmp_path)
    assert len(samples) == 5 and problems == []


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_a_file_that_is_no_table_says_so(tmp_path, searched, name):
    (tmp_path / name).write_bytes(b"nonsense" * 10)
    (problem,) = searched(tmp_path / name)[1]
    assert problem.fatal and f"{tmp_path / name}: is no " in problem.message


def test_arrow_files_elsewhere_are_refused(searched, tmp_path):
    url = memory("arrows", {"t.arrow": arrow(tmp_path / "t.arrow", stream=True).read_bytes()})
    assert "arrow files are read on a disk only" in searched(url)[1][0].message


def test_a_missing_package_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs pyarrow; pip install 'otl\[data\]'"):
        table.kinds(parquet(tmp_path / "t.parquet"))


def test_rows_before_them_do_not_move_those_that_are_held_out(tmp_path):
    def held_out(numbers):
        rows = [{"image": {"bytes": png(0, w=64 + number), "path": None}, "text": "a"} for number in numbers]
        path = parquet(tmp_path / "t.parquet", rows)
        samples, _ = scan(data(path, validation_share=0.3))
        return {sample.size.w - 64 for sample in samples if sample.validation}

    before = held_out(range(40))
    assert 3 <= len(before) <= 25
    assert held_out([*range(40, 60), *range(40)]) & set(range(40)) == before
