"""A run's folder of checkpoints: its order, what is kept, and what a full disk does."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otl.callbacks.backups import INDEX, Backups, dump, is_whole, newest
from otl.formats.files import DiskError

STATE = {"state_dict": {"a": torch.arange(1000.0)}, "global_step": 3}


def backups(folder: Path, *, keep: int = 2, wait: float = 0, resumed: Path | None = None) -> Backups:
    made = Backups(folder, keep=keep, wait=wait)
    made.begin(resumed)
    return made


def save(made: Backups, *steps: int, losses: dict[int, float] | None = None, give_up: bool = True) -> None:
    for step in steps:
        made.save(STATE, f"step-{step:08d}.ckpt", val_loss=(losses or {}).get(step), give_up=lambda: give_up)


def there(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.ckpt"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say how many bytes are free, one number for each attempt, which looks twice; the last stays."""

    def set_free(*counts: int) -> None:
        looks: Iterator[int] = iter(count for count in counts[:-1] for _ in range(2))
        answer = lambda path: SimpleNamespace(free=next(looks, counts[-1]))  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", answer)

    monkeypatch.setattr("otl.callbacks.backups.POLL", 0.0)
    return set_free


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    save(backups(tmp_path), 1, 2, 3, 4, 5, 6, losses={2: 0.5, 4: 0.7, 5: float("nan")})
    assert there(tmp_path) == [2, 5, 6]
    assert newest(tmp_path) == tmp_path / "step-00000006.ckpt"


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    save(backups(tmp_path, keep=1), 1, 2, 3, 4, losses={1: 0.5, 3: 0.4})
    assert there(tmp_path) == [3, 4]


def test_the_best_is_still_known_after_a_resume(tmp_path: Path) -> None:
    save(backups(tmp_path, keep=1), 1, 2, losses={1: 0.5})
    again = backups(tmp_path, keep=1, resumed=tmp_path / "step-00000002.ckpt")
    assert again.lowest == 0.5
    save(again, 3, losses={3: 0.6})
    assert there(tmp_path) == [1, 3]


def test_a_best_that_lies_ahead_of_where_the_run_goes_on_is_none(tmp_path: Path) -> None:
    save(backups(tmp_path, keep=9), 1, 2, 3, losses={3: 0.5})
    assert backups(tmp_path, resumed=tmp_path / "step-00000002.ckpt").lowest == float("inf")


@pytest.mark.parametrize("late", [False, True])
def test_a_process_that_is_killed_around_a_checkpoints_renaming_knows_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    replace = os.replace

    def dies(source: Path, target: Path) -> None:
        if late or target.suffix != ".ckpt":
            replace(source, target)
        if target.suffix == ".ckpt":
            raise SystemExit

    losses = {1: 0.5, 2: 0.4}
    for step, before in ((1, []), (2, [1])):
        made = backups(tmp_path / str(step))
        save(made, *before, losses=losses)
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(os, "replace", dies)
            save(made, step, losses=losses)
        last = newest(tmp_path / str(step))
        steps = [*before, step] if late else before
        assert there(tmp_path / str(step)) == steps
        assert last == (tmp_path / str(step) / f"step-{steps[-1]:08d}.ckpt" if steps else None)
        assert backups(tmp_path / str(step), resumed=last).lowest == (losses[steps[-1]] if steps else float("inf"))


def test_without_an_index_steps_say_which_is_the_newest(tmp_path: Path) -> None:
    save(backups(tmp_path, keep=9), 10, 9)
    (tmp_path / INDEX).unlink()
    assert newest(tmp_path) == tmp_path / "step-00000010.ckpt"


@pytest.mark.parametrize(
    "index",
    [
        "[" * 10**5,
        "[1]",
        "{}",
        '{"written": [1], "best": null}',
        '{"written": null, "best": null}',
        '{"written": ["step-00000010.ckpt"], "best": {"name": "step-00000010.ckpt", "val_loss": "x"}}',
    ],
)
def test_nor_with_one_that_makes_no_sense(tmp_path: Path, index: str) -> None:
    save(backups(tmp_path, keep=9), 10, 9)
    (tmp_path / INDEX).write_text(index)
    assert newest(tmp_path) == tmp_path / "step-00000010.ckpt"


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.ckpt.99.writing").write_bytes(b"half")
    (tmp_path / "mine").write_bytes(b"")
    backups(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "mine"]


def test_where_room_is_short_older_ones_go_first(tmp_path: Path, disk: Callable[..., None]) -> None:
    made = backups(tmp_path, keep=3)
    save(made, 1, 2, 3)
    disk(0, 0, 10**9)
    save(made, 4)
    assert there(tmp_path) == [3, 4]


def test_the_only_one_and_the_best_are_never_given_up_for_room(tmp_path: Path, disk: Callable[..., None]) -> None:
    made = backups(tmp_path, keep=3)
    save(made, 1, 2, 3, losses={1: 0.5})
    disk(0)
    with pytest.raises(DiskError, match=r"step-00000004\.ckpt cannot be written: No space left on device, it needs 4"):
        save(made, 4)
    assert there(tmp_path) == [1, 3]


def test_a_full_disk_is_waited_for(tmp_path: Path, disk: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    made = backups(tmp_path, wait=60)
    disk(0, 0, 0, 10**9)
    save(made, 1, give_up=False)
    assert there(tmp_path) == [1]
    assert caplog.text.count("room is waited for, 60 minutes at most") == 1


def test_it_is_not_waited_for_longer_than_that(tmp_path: Path, disk: Callable[..., None]) -> None:
    disk(0)
    with pytest.raises(DiskError, match="No space left"):
        save(backups(tmp_path, wait=0), 1, give_up=False)


def test_a_run_that_is_asked_to_stop_does_not_wait(
    tmp_path: Path, disk: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    made = backups(tmp_path, wait=1e9)
    save(made, 1)
    disk(0)
    with pytest.raises(DiskError, match="No space left"):
        save(made, 2)
    assert "step-00000002.ckpt is not saved; newest checkpoint: step-00000001.ckpt" in caplog.text


def test_room_that_is_lost_while_it_is_written_is_waited_for_too(
    tmp_path: Path, disk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, torch_save = [], torch.save

    def once(checkpoint: Any, file: Any) -> None:
        written.append(1)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        torch_save(checkpoint, file)

    made = backups(tmp_path, wait=60)
    monkeypatch.setattr(torch, "save", once)
    save(made, 1, give_up=False)
    assert is_whole(tmp_path / "step-00000001.ckpt")


def test_a_failing_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(checkpoint: Any, file: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(DiskError, match="Input/output error"):
        save(backups(tmp_path, wait=1e9), 1, give_up=False)


def test_torch_tells_what_the_system_said() -> None:
    """/dev/full is a disk without room."""
    with pytest.raises(OSError, match="No space left"):
        dump({"a": torch.zeros(10**6)}, Path("/dev/full"))


def test_an_index_from_elsewhere_deletes_nothing_outside_of_the_folder(tmp_path: Path) -> None:
    """Nor anything in it that is no checkpoint."""
    folder = tmp_path / "run" / "checkpoints"
    save(backups(folder), 1)
    strange = ["../../mine.ckpt", "notes.txt", str(tmp_path / "mine.ckpt"), "../checkpoints/step-00000007.ckpt"]
    for name in strange:
        (folder / name).write_text("mine")
    (folder / INDEX).write_text(json.dumps({"written": [*strange, "step-00000001.ckpt"], "best": None}))
    save(backups(folder, keep=1, resumed=folder / "step-00000001.ckpt"), 2, 3)
    assert all((folder / name).is_file() for name in strange)
    assert there(folder) == [3, 7]
