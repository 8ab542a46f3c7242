import pytest

from otl.config import SettingsError
from otl.datamodules.index import Index


def test_what_was_found_is_there_at_the_next_start(tmp_path):
    index = Index(tmp_path, "s3://photos")
    index.put("a.jpg", "v1", [1, "x"])
    index.flush()
    again = Index(tmp_path, "s3://photos")
    assert again.get("a.jpg", "v1") == [1, "x"]
    assert again.get("a.jpg", "v2") is None and again.get("b.jpg", "v1") is None


def test_what_has_no_stamp_is_not_kept(tmp_path):
    index = Index(tmp_path, "p")
    index.put("a", "", 1)
    index.flush()
    assert index.get("a", "") is None and not index.path.exists()


@pytest.mark.parametrize("other", [("s3://others",), ("s3://photos", 200.0)])
def test_another_place_or_option_has_an_index_of_its_own(tmp_path, other):
    index = Index(tmp_path, "s3://photos")
    index.put("a.jpg", "v1", 1)
    index.flush()
    assert Index(tmp_path, *other).get("a.jpg", "v1") is None


def test_the_last_line_of_a_name_counts(tmp_path):
    index = Index(tmp_path, "p")
    for stamp in ("v1", "v2"):
        index.put("a.jpg", stamp, stamp)
    index.flush()
    assert Index(tmp_path, "p").get("a.jpg", "v2") == "v2"


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    index = Index(tmp_path, "p")
    for name in ("a", "b"):
        index.put(name, "v", name)
    index.flush()
    index.path.write_bytes(index.path.read_bytes()[:-3])
    index.put("c", "v", "c")
    index.flush()
    again = Index(tmp_path, "p")
    assert [again.get(name, "v") for name in "abc"] == ["a", None, "c"]


def test_two_processes_add_to_one_index(tmp_path):
    one, two = Index(tmp_path, "p"), Index(tmp_path, "p")
    one.put("a", "v", 1)
    two.put("b", "v", 2)
    one.flush(), two.flush()
    again = Index(tmp_path, "p")
    assert (again.get("a", "v"), again.get("b", "v")) == (1, 2)


def test_what_cannot_be_written_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    index = Index(tmp_path / "file", "p")
    index.put("a", "v", 1)
    with pytest.raises(SettingsError, match=r"data\.cache_dir=.*file: cannot be written"):
        index.flush()
