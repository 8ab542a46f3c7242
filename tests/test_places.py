import socket
import tempfile

import pytest

from otl.check import check
from otl.places import LONGEST_SOCKET, NAMED, SOCKET


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
