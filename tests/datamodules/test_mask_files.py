"""Which images have a mask, and what is said of those that have none."""

from __future__ import annotations

import pytest
from PIL import Image

from otl.config import Concept, Data, Inpaint, MaskSource
from otl.datamodules.mask_files import MaskFiles, attached, find, fits, lacking, options, unused
from otl.datamodules.scan import scan
from otl.types import Sample, Size
from tests.datamodules.fakes import picture

FILES = Inpaint(masks=MaskSource.files)


def test_masks_are_found_beside_the_images_and_in_a_folder_of_their_own(tmp_path):
    one = picture(tmp_path / "photos" / "sub" / "one.jpg")
    beside = picture(tmp_path / "photos" / "sub" / "one-masklabel.png", caption=None)
    apart = picture(tmp_path / "masks" / "sub" / "one.webp", caption=None)
    root = tmp_path / "photos"
    assert find(one, root, None) == beside
    assert find(one, root, tmp_path / "masks") == apart
    assert find(picture(root / "two.png"), root, None) is None


def test_the_mask_of_an_image_that_lies_elsewhere_is_found_by_its_name_alone(tmp_path):
    one = picture(tmp_path / "elsewhere" / "one.jpg")
    apart = picture(tmp_path / "masks" / "one.png", caption=None)
    assert find(one, tmp_path / "photos", tmp_path / "masks") == find(one, None, tmp_path / "masks") == apart


@pytest.mark.parametrize(
    ("mask", "image", "right"),
    [
        (Size(100, 150), Size(100, 150), True),
        (Size(50, 75), Size(100, 150), True),
        (Size(33, 50), Size(100, 150), True),  # rounded
        (Size(150, 100), Size(100, 150), False),
        (Size(100, 140), Size(100, 150), False),
    ],
)
def test_a_mask_has_its_image_s_aspect_ratio(mask, image, right):
    assert fits(mask, image) == right


@pytest.fixture
def photos(tmp_path):
    """One picture with a mask beside it, one with an alpha channel, one with neither."""
    folder = tmp_path / "photos"
    picture(folder / "a.png")
    picture(folder / "a-masklabel.png", caption=None)
    Image.new("RGBA", (64, 64)).save(folder / "b.png")
    (folder / "b.txt").write_text("x")
    picture(folder / "c.png", shade=9)
    return folder


def found(photos, inpaint=FILES, **settings):
    """Image -> mask by their names, and key -> problem."""
    samples, problems = scan(Data(path=str(photos), cache_dir=str(photos / ".cache"), **settings), inpaint)
    masks = {sample.path.name: sample.mask and sample.mask.name for sample in samples}
    return masks, {problem.key: problem for problem in problems}


def test_an_alpha_channel_is_a_mask_where_it_is_asked_for_and_there_is_no_file(photos):
    assert found(photos)[0] == {"a.png": "a-masklabel.png", "b.png": None, "c.png": None}
    assert found(photos, mask_alpha=True)[0] == {"a.png": "a-masklabel.png", "b.png": "b.png", "c.png": None}
    assert set(found(photos, Inpaint(masks=MaskSource.generated))[0].values()) == {None}


def test_a_concept_has_masks_of_its_own(photos, tmp_path):
    apart = picture(tmp_path / "masks" / "c.png", caption=None)
    concepts = {"x": Concept(path=str(photos), mask_folder=str(apart.parent), mask_alpha=False)}
    data = Data(concepts=concepts, mask_alpha=True)
    assert options(data)["data"] == MaskFiles(alpha=True)
    assert options(data)["x"] == MaskFiles(apart.parent, "data.concepts.x.mask_folder")
    samples, problems = scan(data, Inpaint())
    assert [sample.mask for sample in samples] == [None, None, apart]
    assert not [problem for problem in problems if "mask" in problem.key]


def test_a_mask_of_another_shape_or_that_is_none_is_named(photos):
    picture(photos / "c-masklabel.png", h=32, w=64, caption=None)
    (photos / "b-masklabel.png").write_text("no")
    problem = found(photos)[1]["data.mask_folder"]
    assert problem.fatal and "2 masks cannot be laid over" in problem.message
    assert ["does not have the shape of c.png" in each for each in problem.details] == [False, True]


def test_a_manifest_s_mask_comes_first(photos):
    sample = Sample(photos / "a.png", Size(64, 64), [""], mask=photos / "c.png")
    (kept,), _ = attached([sample], photos, MaskFiles(alpha=True), Inpaint())
    assert kept.mask == photos / "c.png"


def test_masks_by_file_alone_need_one_for_every_image(photos):
    problem = found(photos)[1]["inpaint.masks"]
    assert problem.fatal and problem.details == [str(photos / "b.png"), str(photos / "c.png")]
    assert "2 of 3 images" in problem.message and "inpaint.masks=both" in problem.message
    assert "inpaint.masks" not in found(photos, Inpaint())[1]


def test_a_folder_of_masks_for_other_images_is_refused(photos, tmp_path):
    apart = picture(tmp_path / "masks" / "other.png", caption=None).parent
    problem = found(photos, Inpaint(), mask_folder=str(apart), mask_alpha=True)[1]["data.mask_folder"]
    assert problem.fatal and "no mask for any image" in problem.message


def test_alpha_channels_that_no_image_has_are_said(tmp_path):
    sample = Sample(picture(tmp_path / "a.png"), Size(64, 64), [""])
    (problem,) = lacking([sample], {"data": MaskFiles(alpha=True)}, Inpaint())
    assert (problem.key, problem.fatal) == ("data.mask_alpha", False)


@pytest.mark.parametrize(
    ("inpaint", "why"),
    [(None, "loss.masked=true"), (Inpaint(masks=MaskSource.generated), "inpaint.masks=files or both")],
)
def test_what_is_set_for_masks_that_nothing_looks_at_is_refused(inpaint, why):
    data = Data(mask_folder="masks", concepts={"x": Concept(path="x", mask_alpha=True)})
    problems = list(unused(data, inpaint))
    assert [problem.key for problem in problems] == ["data.mask_folder", "data.concepts.x.mask_alpha"]
    assert all(problem.fatal and why in problem.message for problem in problems)
    assert list(unused(data, Inpaint())) == list(unused(Data(), inpaint)) == []


def test_masks_that_nothing_looks_at_are_said(photos):
    problem = found(photos, None)[1]["data.path"]
    assert not problem.fatal and "1 mask (NAME-masklabel, or of a table)" in problem.message
    (photos / "a-masklabel.png").unlink()
    assert "data.path" not in found(photos, None)[1]
