import struct
import zlib
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from otl.config import (
    PICTURES,
    Broken,
    CaptionOptions,
    CaptionSource,
    Concept,
    ConceptType,
    Data,
    Inpaint,
    MaskSource,
    OwnCaptionOptions,
)
from otl.datamodules.scan import scan
from otl.datamodules.texts import Texts
from otl.types import Problem, Size
from tests.datamodules.fakes import data, picture


def fatal(problems: list[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.fatal]


def names(path: Path, **settings: object) -> list[str]:
    return [sample.path.relative_to(path).as_posix() for sample in scan(data(path, **settings))[0]]


@pytest.mark.parametrize("extension", PICTURES)
def test_every_extension_is_read(tmp_path, extension):
    for path in (tmp_path / f"a{extension}", tmp_path / f"B{extension.upper()}"):
        if extension == ".psd":  # Pillow reads it alone
            path.with_suffix(".txt").write_text("a picture")
            path.write_bytes(psd(16, 24))
        else:
            picture(path, h=16, w=24)
    samples, problems = scan(data(tmp_path))
    assert len(samples) == 2
    assert {sample.size for sample in samples} == {Size(11, 16) if extension == ".ico" else Size(16, 24)}
    assert not fatal(problems)


def psd(h: int, w: int) -> bytes:
    """Black, three channels of 8 bits, no layers: https://www.adobe.com/devnet-apps/photoshop/fileformatashtml"""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, h, w, 8, 3)
    return header + bytes(3 * 4) + struct.pack(">H", 0) + bytes(3 * h * w)


def test_subfolders_are_searched_in_natural_order(tmp_path):
    for name in ("img10.png", "img2.png", "sub/img1.png", "IMG3.png", "b.png"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["b.png", "img2.png", "IMG3.png", "img10.png", "sub/img1.png"]


def test_hidden_files_labels_and_other_files_are_no_images(tmp_path):
    for name in ("a.png", ".b.png", ".thumbs/c.png", "a-masklabel.png", "a-condlabel.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image")
    assert names(tmp_path) == ["a.png"]


def test_a_link_back_up_is_followed_once(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    assert names(tmp_path / "photos") == ["a.png"]


def test_linked_folders_are_searched(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "photos") == ["link/a.png"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_sizes_are_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / f"a.{suffix}", exif=exif)
    samples, _ = scan(data(tmp_path, prompt="x"))
    assert samples[0].size == Size(64, 32)


def test_pixels_are_not_decoded(tmp_path):
    """A PNG whose pixels are garbage, but whose header and end are whole, passes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5000, 4000, 8, 2, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"garbage") + chunk(b"IEND", b""))
    samples, problems = scan(data(tmp_path, prompt="x"))
    assert samples[0].size == Size(4000, 5000) and not problems


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path: Path) -> None:
    """A header that promises 400 million pixels."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BREAKS = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("no image"),
    "half.jpg": half,
    "half.png": half,
    "half.webp": half,
    "bomb.png": bomb,
}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("name", BREAKS)
def test_files_that_cannot_be_read_are_named_and_left_out(tmp_path, name, skipped):
    picture(tmp_path / "good.png")
    BREAKS[name](picture(tmp_path / name, h=600, w=600, shade=3))
    samples, problems = scan(data(tmp_path, broken_images=Broken.skip if skipped else Broken.error))
    (problem,) = problems
    assert [sample.name for sample in samples] == ["good.png"]
    assert problem.key == "data.broken_images" and problem.fatal is not skipped
    assert str(tmp_path / name) in problem.details[0] and len(problem.details[0]) > len(str(tmp_path / name)) + 5


def test_images_of_more_pixels_than_are_allowed_are_broken(tmp_path):
    picture(tmp_path / "a.png", h=64, w=64)
    picture(tmp_path / "b.png", h=64, w=80)
    samples, (problem,) = scan(data(tmp_path, max_megapixels=0.0041))  # 64 x 64 are 0.004096
    assert [sample.name for sample in samples] == ["a.png"]
    assert "more than data.max_megapixels=0.0041" in problem.details[0]


def test_bytes_after_the_end_of_an_image_do_no_harm(tmp_path):
    for name in ("a.png", "b.jpg"):
        path = picture(tmp_path / name)
        path.write_bytes(path.read_bytes() + bytes(10000))
    assert len(scan(data(tmp_path))[0]) == 2


@pytest.mark.parametrize(
    ("place", "words"),
    [("absent", "does not exist"), ("a.png", "is a file"), ("empty", "holds no images"), ("broken", "can be read")],
)
def test_a_path_without_images_says_why(tmp_path, place, words):
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    problem = fatal(scan(data(tmp_path / place))[1])[0]
    assert problem.key == "data.path" and words in problem.message and str(tmp_path / place) in problem.message


def test_no_path_at_all_says_what_to_set():
    (problem,) = fatal(scan(Data())[1])
    assert problem.key == "data.path" and "data.path=FOLDER" in problem.message


def test_a_concept_without_path_is_named():
    (problem,) = fatal(scan(Data(concepts={"cat": Concept()}))[1])
    assert problem.key == "data.concepts.cat.path" and "data.concepts.cat.path=FOLDER" in problem.message


def test_unreadable_kinds_are_reported(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    (problem,) = scan(data(tmp_path))[1]
    assert not problem.fatal and problem.details == [str(tmp_path / "b.HEIC")]


def test_concepts_carry_their_own_settings(tmp_path):
    picture(tmp_path / "cats" / "a.png", caption=None)
    picture(tmp_path / "dogs" / "b.png", shade=9)
    picture(tmp_path / "c.png", shade=19)
    (tmp_path / "rest").mkdir()
    (tmp_path / "c.png").rename(tmp_path / "rest" / "c.png")
    (tmp_path / "c.txt").rename(tmp_path / "rest" / "c.txt")
    cats = Concept(path=str(tmp_path / "cats"), prompt="a cat", loss_weight=0.5)
    dogs = Concept(path=str(tmp_path / "dogs"), type=ConceptType.validation)
    samples, problems = scan(data(tmp_path / "rest", concepts={"cats": cats, "dogs": dogs}))
    assert not problems
    assert [sample.concept for sample in samples] == ["data", "cats", "dogs"]
    assert [sample.weight for sample in samples] == [1.0, 0.5, 1.0]
    assert [sample.validation for sample in samples] == [False, False, True]
    assert samples[1].captions == ["a cat"]


def class_images(path: Path, **fields) -> Concept:
    return Concept(path=str(path), type=ConceptType.regularisation, prompt="a dog\na hound", **fields)


def test_class_images_are_called_by_their_prompt_alone(tmp_path):
    """Neither by what lies beside them nor with what data.captions puts before the others."""
    picture(tmp_path / "mine" / "a.png")
    picture(tmp_path / "dogs" / "b.png", shade=9, caption="sks, from its file")
    common = CaptionOptions(trigger="sks", prefix="photo,", sources=[CaptionSource.file])
    options = Data(path=str(tmp_path / "mine"), captions=common, concepts={"dogs": class_images(tmp_path / "dogs")})
    samples, problems = scan(options)
    texts = Texts.of_dataset(options, seed=0, training=True, cached=False)
    assert not problems and samples[1].captions == ["a dog", "a hound"]
    assert {texts.of(samples[1], key) for key in range(20)} == {"a dog", "a hound"}
    assert texts.of(samples[0], 0).startswith("photo, sks")


def test_what_class_images_say_of_their_own_captions_counts(tmp_path):
    picture(tmp_path / "mine" / "a.png")
    picture(tmp_path / "dogs" / "b.png", shade=9, caption="a poodle")
    own = OwnCaptionOptions(sources=[CaptionSource.file, CaptionSource.prompt])
    dogs = class_images(tmp_path / "dogs", captions=own)
    assert scan(data(tmp_path / "mine", concepts={"dogs": dogs}))[0][1].captions == ["a poodle"]


def test_class_images_are_never_held_out(tmp_path):
    for number in range(20):
        picture(tmp_path / "mine" / f"{number}.png", shade=number)
        picture(tmp_path / "dogs" / f"{number}.png", shade=number + 100)
    dogs = class_images(tmp_path / "dogs")
    samples, _ = scan(data(tmp_path / "mine", validation_share=0.5, concepts={"dogs": dogs}))
    assert {sample.concept for sample in samples if sample.validation} == {"data"}


def test_class_images_alone_teach_nothing(tmp_path):
    picture(tmp_path / "b.png")
    (problem,) = fatal(scan(Data(concepts={"dogs": class_images(tmp_path)}))[1])
    assert problem.key == "data.concepts" and "learn nothing new" in problem.message


def test_texts_of_the_settings_may_look_like_interpolations(tmp_path, settings):
    picture(tmp_path / "${x}.png")
    escaped = OmegaConf.to_object(settings(f"data.path={tmp_path}", r"data.captions.postfix='\${x}'").data)
    (sample,), _ = scan(escaped)
    assert Texts.of_dataset(escaped, seed=0, training=True, cached=False).of(sample, 1).endswith("${x}")


def test_images_with_the_same_bytes_are_reported(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    picture(tmp_path / "c.png", shade=1)
    (problem,) = scan(data(tmp_path))[1]
    assert not problem.fatal and problem.details == [f"{tmp_path / 'a.png'} = {tmp_path / 'b.png'}"]


def held_out(path: Path, share: float) -> set[str]:
    return {sample.name for sample in scan(data(path, validation_share=share))[0] if sample.validation}


def test_more_images_do_not_move_the_held_out_ones(tmp_path):
    for number in range(60):
        picture(tmp_path / f"{number}.png", shade=number)
    before = held_out(tmp_path, 0.3)
    for number in range(60, 120):
        picture(tmp_path / f"{number - 30}x.png", shade=number)
    assert 8 <= len(before) <= 28
    assert held_out(tmp_path, 0.3) & {f"{number}.png" for number in range(60)} == before


def test_a_share_that_holds_out_nothing_is_reported(tmp_path):
    picture(tmp_path / "a.png")
    (problem,) = scan(data(tmp_path, validation_share=1e-9))[1]
    assert problem.key == "data.validation_share" and not problem.fatal


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    concept = Concept(path=str(tmp_path), type=ConceptType.validation)
    assert "none to train on" in fatal(scan(Data(concepts={"v": concept}))[1])[0].message


def test_masks_lie_beside_their_images_and_are_no_images(tmp_path):
    photos = tmp_path / "photos"
    one, two = picture(photos / "one.png", h=40, w=60), picture(photos / "two.png")
    mask = picture(photos / "one-masklabel.png", h=20, w=30, caption=None)
    samples, problems = scan(Data(path=str(photos)), Inpaint())
    assert [(sample.path, sample.mask) for sample in samples] == [(one, mask), (two, None)]
    assert problems == []
    for without in (scan(Data(path=str(photos))), scan(Data(path=str(photos)), Inpaint(masks=MaskSource.generated))):
        assert [sample.mask for sample in without[0]] == [None, None]


def test_a_folder_of_masks_among_the_images_holds_no_images(tmp_path):
    photos = tmp_path / "photos"
    one = picture(photos / "sub" / "one.jpg")
    mask = picture(photos / "masks" / "sub" / "one.png", caption=None)
    samples, problems = scan(Data(path=str(photos), mask_folder=str(photos / "masks")), Inpaint())
    assert [(sample.path, sample.mask) for sample in samples] == [(one, mask)]
    assert problems == []


def test_a_mask_of_another_shape_is_refused_and_named(tmp_path):
    picture(tmp_path / "one.png", h=40, w=60)
    mask = picture(tmp_path / "one-masklabel.png", h=60, w=40, caption=None)
    _, problems = scan(Data(path=str(tmp_path)), Inpaint())
    assert [problem.key for problem in problems] == ["data.mask_folder"] and problems[0].fatal
    assert problems[0].details == [f"{mask}: 60x40 (height x width) does not have the shape of one.png, 40x60"]


def test_held_out_images_keep_their_masks(tmp_path):
    for number in range(6):
        picture(tmp_path / f"{number}.png", shade=number)
        picture(tmp_path / f"{number}-masklabel.png", caption=None)
    samples, _ = scan(Data(path=str(tmp_path), validation_share=0.5), Inpaint(masks=MaskSource.files))
    assert {sample.validation for sample in samples} == {True, False}
    assert all(sample.mask is not None for sample in samples)
