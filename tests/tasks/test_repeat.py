"""A run repeated from its manifest."""

import contextlib
import json
import shutil

import pytest
from PIL import Image

from otl.check import check
from otl.cli import spelled_out
from otl.config import SettingsError
from otl.formats.files import read, tensors_hash, write
from otl.mistakes import compose_settings
from otl.tasks import manifest, repeat
from otl.tasks.train import train
from tests.commands import fork_otl, write_plugin

PREFIX = 'a "猫", {2} = '


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that the run is started in."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def finished(photos, sd15_folder, place):
    """The manifest of a run of three steps."""
    (place / "first").mkdir()
    line = [
        f"model.checkpoint={sd15_folder}",
        f"data.path={photos}",
        f"data.captions.prefix='{PREFIX}'",
        f"data.cache_dir={place / 'cache'}",
        "data.resolution=64",
        "data.workers=0",
        f"logger.save_dir={place / 'first'}",  # as it is from the command line
        "trainer.max_steps=3",
        "method.dropout=0.2",
        "callbacks.checkpoint=null",
    ]
    with contextlib.chdir(place):
        train(compose_settings(spelled_out(line), name="config"), place / "first")
    return place / "first" / "manifest.json"


@pytest.fixture
def record(finished):
    return json.loads(finished.read_text())


@pytest.mark.slow
def test_the_same_comes_out_bit_for_bit(finished, place):
    """And nothing is written into the folder of the run that is repeated."""
    before = {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")}
    done = fork_otl("task=repeat", f"manifest={finished}", "hydra.run.dir=again", cwd=place)
    assert done.code == 0, done.err
    assert "bit for bit the same as then" in done.out
    files = [place / name / "final.safetensors" for name in ("first", "again")]
    assert tensors_hash(files[0]) == tensors_hash(files[1])
    assert {path: path.stat().st_mtime_ns for path in (place / "first").rglob("*")} == before
    assert len(list((place / "again" / "tensorboard").glob("events*"))) == 1

    other = fork_otl("task=repeat", f"manifest={finished}", "seed=1", "hydra.run.dir=other", cwd=place)
    assert other.code == 2
    assert "setting seed is 1, was 0" in other.err
    assert not (place / "other" / "final.safetensors").exists()
    allowed = ["allow_changes=true", "hydra.run.dir=other"]
    other = fork_otl("task=repeat", f"manifest={finished}", "seed=1", *allowed, cwd=place)
    assert other.code == 0, other.err
    assert "not the same as then: the tensors of final.safetensors differ" in other.out


def test_texts_come_back_as_they_were(record):
    """With quotes, other scripts, what Hydra would take for its own, and what OmegaConf would for an interpolation."""
    assert record["settings"]["data"]["captions"]["prefix"] == PREFIX
    for text in ("it's", "two\nlines", r"back\slash", r"b\\${x} ${y", "null", "1e5", "- a: b"):
        record["settings"]["output"]["title"] = text
        assert repeat.settings_of(record, {}).output.title == text
    line = ['data.prompt="two\nlines, \\"quoted\\""', "output.title='ü: = ,'"]
    assert repeat.changes(line) == {"data.prompt": 'two\nlines, "quoted"', "output.title": "ü: = ,"}


def test_data_that_has_moved_is_told_in_a_line_and_the_rest_is_as_it_was(record, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "elsewhere")
    found = list(repeat.differences(record, repeat.settings_of(record, {"data.path": str(tmp_path / "elsewhere")})))
    assert found == [
        f"setting data.path is {tmp_path / 'elsewhere'}, was {photos}",
        "image: all 3 lie elsewhere than then, with the same names and contents",
        "caption of image: all 3 lie elsewhere than then, with the same names and contents",
    ]


def test_a_manifest_of_another_machine_starts_from_this_folder(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record["folder"] = "/home/somebody/else"
    assert repeat.started_in(record) == tmp_path
    (found,) = repeat.differences(record, repeat.settings_of(record, {}))
    assert found.startswith(f"folder that relative paths start from is {tmp_path}, was /home/somebody/else")


def test_loggers_write_into_the_new_folder(record, place, tmp_path):
    assert record["run"] == str(place / "first")
    logger = repeat.own(record["settings"], record["run"], tmp_path)["logger"]
    assert logger == record["settings"]["logger"] | {"save_dir": str(tmp_path)}


def test_versions_of_plugins_that_the_settings_call_are_compared(record, tmp_path, monkeypatch):
    """And of whatever else they call: an optimizer's package, a logger's."""
    site = write_plugin(tmp_path / "site", "otl_toy", models="toy = otl_toy.m:M", files={"m.py": ""})
    monkeypatch.syspath_prepend(str(site))
    (top,) = site.glob("*.dist-info")
    (top / "top_level.txt").write_text("otl_toy\n")
    settings = record["settings"] | {"model": {"_target_": "otl_toy.m.M"}}
    then = manifest.versions(settings)
    (name,) = then.keys() - record["versions"].keys()
    assert (name, then[name]) == ("otl-toy", "1.0")
    (top / "METADATA").write_text((top / "METADATA").read_text().replace("Version: 1.0", "Version: 99.1"))
    assert list(repeat.compared("version of", then, manifest.versions(settings))) == [
        "version of otl-toy is 99.1, was 1.0"
    ]


def test_nothing_differs_at_first(record):
    assert list(repeat.differences(record, repeat.settings_of(record, {}))) == []


def test_settings_data_and_versions_that_changed_are_named(record, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "0.png").unlink()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "1.png")
    moved = {f"{tmp_path / 'photos'}/{name}": record["images"][f"{photos}/{name}"] for name in ("0.png", "1.png")}
    record["images"] = record["images"] | moved
    record["versions"]["torch"], record["machine"]["threads"] = "1.0", "99"
    record["masks"]["0-masklabel.png"] = "0f"
    record["settings"]["data"]["path"] = str(tmp_path / "photos")
    found = "\n".join(repeat.differences(record, repeat.settings_of(record, {"optimizer.lr": 5e-5})))
    assert "setting optimizer.lr is 5e-05, was 0.0001" in found
    assert "version of torch is" in found
    assert "machine: threads is 1, was 99" in found
    assert "mask 0-masklabel.png is gone" in found
    assert f"image {tmp_path / 'photos' / '0.png'} is gone" in found
    assert f"image {tmp_path / 'photos' / '1.png'} is" in found
    assert f"image {tmp_path / 'photos' / '2.png'} is new" in found


def test_captions_and_base_weights_that_changed_are_named(record, photos, sd15_folder, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(sd15_folder, tmp_path / "model")
    record["settings"]["data"]["path"] = str(tmp_path / "photos")
    record["settings"]["model"]["checkpoint"] = str(tmp_path / "model")
    for kind in ("images", "captions"):
        record[kind] = {
            name.replace(str(photos), str(tmp_path / "photos")): each for name, each in record[kind].items()
        }
    assert list(repeat.differences(record, repeat.settings_of(record, {}))) == []
    (tmp_path / "photos" / "1.txt").write_text("another caption\n")
    part = "unet/diffusion_pytorch_model.safetensors"
    tensors, metadata = read(tmp_path / "model" / part)
    write(tmp_path / "model" / part, {name: tensor + 1 for name, tensor in tensors.items()}, metadata)
    one, two = repeat.differences(record, repeat.settings_of(record, {}))
    assert one.startswith(f"caption of image {tmp_path / 'photos' / '1.png'} is ")
    assert two.startswith(f"weights of the model, {part} is ")


def test_a_manifest_of_before_captions_and_weights_were_kept_is_repeated(record):
    del record["captions"], record["weights"]
    assert list(repeat.differences(record, repeat.settings_of(record, {}))) == []


def test_a_run_that_was_resumed_is_repeated_from_its_start(record):
    record["settings"]["resume"] = "auto"
    settings = repeat.settings_of(record, {})
    assert settings.resume is None
    assert list(repeat.differences(record, settings)) == []


def test_settings_of_another_version_are_refused(record):
    record["settings"]["data"]["no_such"] = 1
    with pytest.raises(SettingsError, match="no_such"):
        repeat.settings_of(record, {})


def test_a_group_cannot_be_chosen_anew():
    assert repeat.changes(["task=repeat", "manifest=x", "++optimizer.lr=1e-3", "seed=4"]) == {
        "optimizer.lr": 1e-3,
        "seed": 4,
    }
    with pytest.raises(SettingsError, match="model=sdxl"):
        repeat.changes(["task=repeat", "model=sdxl"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["task=repeat"], "must be given"),
        (["task=repeat", "manifest=no/such.json"], "does not exist"),
        (["manifest=no/such.json"], "would have no effect"),
    ],
)
def test_a_manifest_and_the_task_need_each_other(line, said, settings, tmp_path):
    (problem,) = check(settings(*line, f"data.path={tmp_path}"))
    assert problem.key == "manifest"
    assert said in problem.message


def test_the_hash_is_of_the_tensors_alone(tmp_path):
    import torch

    write(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {"date": "1"})
    write(tmp_path / "b.safetensors", {"x": torch.ones(3)}, {"date": "2 and more"})
    write(tmp_path / "c.safetensors", {"x": torch.zeros(3)}, {"date": "1"})
    a, b, c = (tensors_hash(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b != c


def test_the_machine_is_part_of_the_record():
    assert manifest.machine()["threads"] == "1"
