import pytest

from otl.config import SettingsError
from otl.datamodules.sources.columns import Chosen, Columns, Kind, chosen

IMAGE, TEXT, OTHER = Kind.image, Kind.text, Kind.other


def found(kinds: dict[str, Kind], **wanted: str) -> Columns:
    return chosen(kinds, Chosen(**wanted), place="t.parquet", setting="data.concepts.cat")


@pytest.mark.parametrize(
    ("kinds", "columns"),
    [
        ({"image": IMAGE, "text": TEXT}, Columns("image", "text", None)),
        ({"id": OTHER, "anything": IMAGE, "label": OTHER}, Columns("anything", None, None)),
        ({"file_name": TEXT, "Caption": TEXT}, Columns("file_name", "Caption", None)),
        ({"URL": TEXT, "prompt": TEXT, "mask": TEXT}, Columns("URL", "prompt", "mask")),
        ({"jpg": IMAGE, "path": TEXT, "text": OTHER}, Columns("jpg", None, None)),
        ({"scan": IMAGE, "Mask": IMAGE}, Columns("scan", None, "Mask")),
        ({"file_name": TEXT, "mask": IMAGE}, Columns("file_name", None, "mask")),
        ({"image": IMAGE, "conditioning": IMAGE, "text": TEXT}, Columns("image", "text", None)),
    ],
)
def test_columns_are_known_by_content_and_name(kinds, columns):
    assert found(kinds) == columns


def test_what_is_set_goes_before_names():
    kinds = {"image": IMAGE, "photo": IMAGE, "text": TEXT, "alt": TEXT, "m": IMAGE}
    assert found(kinds, image="photo", caption="alt", mask="m") == Columns("photo", "alt", "m")
    assert found({"scan": IMAGE, "m": IMAGE}, mask="m") == Columns("scan", None, "m")


@pytest.mark.parametrize("kinds", [{"a": TEXT, "b": OTHER}, {"one": IMAGE, "two": IMAGE}])
def test_what_is_not_clear_is_an_error_with_all_columns(kinds):
    with pytest.raises(
        SettingsError, match=r"t\.parquet: no column .* set data\.concepts\.cat\.image_column"
    ) as caught:
        found(kinds)
    assert all(name in str(caught.value) for name in kinds)


@pytest.mark.parametrize(("name", "words"), [("nothing", "is no column"), ("id", "holds neither text nor images")])
def test_a_column_that_does_not_serve_is_an_error_with_all_columns(name, words):
    with pytest.raises(SettingsError, match=rf"caption_column={name}: {words} .* image \(images\), id"):
        found({"image": IMAGE, "id": OTHER}, caption=name)
