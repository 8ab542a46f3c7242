import socket
import tempfile

import pytest

from otl.check import check
from otl.places import LONGEST_SOCKET, SOCKET


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
