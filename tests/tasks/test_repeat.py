"""A run repeated from its manifest."""

import json
import shutil

import pytest
from PIL import Image

from otl.check import check
from otl.config import SettingsError
from otl.formats.files import read, tensors_hash, write
from otl.tasks import manifest, repeat
from otl.tasks.train import train
from tests.commands import fork_otl


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture
def line(photos, sd15_folder, tmp_path):
    return [
        f"model.checkpoint={sd15_folder}",
        f"data.path={photos}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "data.workers=0",
        "logger=none",
        "trainer.max_steps=3",
        "method.dropout=0.2",
        "callbacks.checkpoint=null",
    ]


@pytest.fixture
def finished(settings, line, tmp_path, monkeypatch):
    """The manifest of a run of three steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    train(settings(*line), tmp_path / "first")
    return tmp_path / "first" / "manifest.json"


@pytest.fixture
def record(finished):
    return json.loads(finished.read_text())


@pytest.mark.slow
def test_the_same_comes_out_bit_for_bit(finished, tmp_path):
    done = fork_otl("task=repeat", f"manifest={finished}", "hydra.run.dir=again", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "bit for bit the same as then" in done.out
    files = [tmp_path / name / "final.safetensors" for name in ("first", "again")]
    assert tensors_hash(files[0]) == tensors_hash(files[1])

    other = fork_otl("task=repeat", f"manifest={finished}", "seed=1", "hydra.run.dir=other", cwd=tmp_path)
    assert other.code == 2
    assert "setting seed is 1, was 0" in other.err
    assert not (tmp_path / "other" / "final.safetensors").exists()
    allowed = ["allow_changes=true", "hydra.run.dir=other"]
    other = fork_otl("task=repeat", f"manifest={finished}", "seed=1", *allowed, cwd=tmp_path)
    assert other.code == 0, other.err
    assert "not the same as then: the tensors of final.safetensors differ" in other.out


def test_nothing_differs_at_first(record):
    assert list(repeat.differences(record, repeat.settings_of(record, {}))) == []


def test_settings_data_and_versions_that_changed_are_named(record, photos, line, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "0.png").unlink()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "1.png")
    moved = {f"{tmp_path / 'photos'}/{name}": record["images"][f"{photos}/{name}"] for name in ("0.png", "1.png")}
    record["images"] = record["images"] | moved
    record["versions"]["torch"] = "1.0"
    record["settings"]["data"]["path"] = str(tmp_path / "photos")
    found = "\n".join(repeat.differences(record, repeat.settings_of(record, {"optimizer.lr": 5e-5})))
    assert "setting optimizer.lr is 5e-05, was 0.0001" in found
    assert "version of torch is" in found
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


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}'])
def test_what_is_no_manifest_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SettingsError, match="manifest"):
        repeat.read(tmp_path / "manifest.json")


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
