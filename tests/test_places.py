import json
import os
import socket
import tempfile

import pytest
from PIL import Image

from otl.check import check
from otl.config import SettingsError
from otl.places import LONGEST_SOCKET, NAMED, NEEDED, SOCKET, recorded


def told(cfg):
    return {each.key: each.message for each in check(cfg)}


@pytest.mark.parametrize(("spare", "workers", "told"), [(0, 2, False), (-1, 2, True), (-1, 0, False)])
def test_a_folder_for_temporary_files_with_too_long_a_path_is_refused(settings, monkeypatch, spare, workers, told):
    folder = "/".ljust(LONGEST_SOCKET - SOCKET - spare, "x")
    monkeypatch.setattr(tempfile, "tempdir", folder)
    found = [each.message for each in check(settings(f"data.workers={workers}")) if each.key == "data.workers"]
    assert [folder in message and "is 1 byte too long" in message for message in found] == [True] * told


def test_a_socket_can_have_a_path_of_that_length_and_no_longer_one():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as made:
        with pytest.raises(OSError, match="too long"):
            made.bind(f"{folder}/".ljust(LONGEST_SOCKET + 1, "x"))
        made.bind(f"{folder}/".ljust(LONGEST_SOCKET, "x"))


@pytest.mark.parametrize(("letter", "count", "fits"), [("x", 200, True), ("x", 201, False), ("ü", 101, False)])
def test_a_name_is_no_longer_than_that_of_a_file_with_a_step_and_a_suffix_can_be(settings, letter, count, fits):
    found = told(settings("data.path=.", f"output.name='{letter * count}'"))
    assert found.keys() == (set() if fits else {"output.name"})


@pytest.mark.parametrize("key", sorted(NAMED))
def test_an_empty_name_is_no_folder_and_not_everything(settings, key):
    task = {"captioner": ["task=caption"], "masker": ["task=mask", "masker.prompts=[a]"]}.get(key.partition(".")[0], [])
    cascade = ["model=stable_cascade"] if key in {"model.effnet", "model.decoder", "model.text_encoder"} else []
    found = {each.key: each.message for each in check(settings("data.path=.", *task, *cascade, f"{key}=''"))}
    assert found == {key: f"nothing is given: give {NAMED[key]}"}


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        (["model.checkpoint=no/such/folder"], "model.checkpoint"),
        (["model.checkpoint=none.safetensors"], "model.checkpoint"),
        (["model=stable_cascade", "model.decoder=./none"], "model.decoder"),
        (["model=wuerstchen", "model.effnet=./none"], "model.effnet"),
        (["task=caption", "captioner.checkpoint=./none"], "captioner.checkpoint"),
        (["task=mask", "masker=subject", "masker.checkpoint=none.onnx"], "masker.checkpoint"),
    ],
)
def test_weights_that_are_to_lie_on_a_disk_lie_there(settings, lines, key):
    found = {each.key: each.message for each in check(settings("data.path=.", *lines))}
    assert list(found) == [key] and "does not exist (looked for /" in found[key]


@pytest.mark.parametrize(
    "lines",
    [
        ["task=plan", "model.checkpoint=none.safetensors"],
        ["model=stable_cascade"],
        ["model.checkpoint=a/b"],
        ["task=cache", "task.action=show", "model.checkpoint=none"],
    ],
)
def test_a_plan_needs_no_weights_and_the_hub_has_others(settings, lines):
    assert check(settings("data.path=.", *lines)) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "cannot be read"), ("[]", "holds no settings by name"), ('{"settings": {}}', "versions, machine, images")],
)
def test_what_is_no_manifest_is_not_repeated(settings, tmp_path, content, said):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(content)
    assert said in told(settings("task=repeat", f"manifest={manifest}"))["manifest"]


def test_a_cache_is_not_made_where_there_is_a_file(settings, tmp_path):
    (tmp_path / "file").write_text("")
    below = f"data.cache_dir={tmp_path / 'file' / 'cache'}"
    message = told(settings("data.path=.", below))["data.cache_dir"]
    assert f"{tmp_path / 'file'} is a file" in message and "data.cache=false" in message
    assert told(settings("data.path=.", below, "data.cache=false")) == {}
    assert told(settings("data.path=.", f"data.cache_dir={tmp_path / 'new' / 'cache'}")) == {}


def test_a_cache_is_not_made_where_this_user_may_not_write(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may, whatever the mode says
    message = told(settings("data.path=.", f"data.cache_dir={tmp_path / 'cache'}"))["data.cache_dir"]
    assert f"{tmp_path} cannot be written" in message


def test_a_run_goes_on_from_a_folder_with_checkpoints_alone(settings, tmp_path):
    resume = f"resume={tmp_path}"
    assert "no checkpoint in it: give" in told(settings("data.path=.", resume))["resume"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.ckpt").write_text("")
    assert f"did you mean {tmp_path / 'checkpoints'}?" in told(settings("data.path=.", resume))["resume"]
    assert told(settings("data.path=.", f"{resume}/checkpoints")) == {}


def test_a_picture_to_paint_in_can_be_read(settings, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    line = ["data.path=.", "model=sd15_inpaint", "sample.prompts=[a]", f"sample.mask={tmp_path / 'good.png'}"]
    assert told(settings(*line, f"sample.image={tmp_path / 'good.png'}")) == {}
    assert (
        "no picture that can be read" in told(settings(*line, f"sample.image={tmp_path / 'bad.png'}"))["sample.image"]
    )


@pytest.mark.parametrize("name", NEEDED)
def test_a_manifest_with_something_else_in_the_place_of_what_a_run_says_is_refused(tmp_path, name):
    file, whole = tmp_path / "manifest.json", {each: kind() for each, kind in NEEDED.items()}
    file.write_text(json.dumps(whole))
    assert recorded(file) == whole
    file.write_text(json.dumps(whole | {name: 3}))
    with pytest.raises(SettingsError, match=rf"manifest=.*: no manifest of a run: {name} "):
        recorded(file)
