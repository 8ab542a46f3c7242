"""OTL works from a clone, an editable install, and a wheel in another folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from otl.config import conf_dir
from tests.commands import ROOT, Result, listed, run_process

YAMLS = sorted(path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*.yaml"))
NO_INDEX = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")


def otl(folder: Path, *arguments: str, path: tuple[Path, ...]) -> Result:
    return run_process([sys.executable, "-m", "otl", *arguments], folder, *path)


def works(folder: Path, *path: Path, home: Path) -> None:
    """Settings compose and mistakes are refused in `folder`, with the OTL that lies in `home`."""
    where = run_process([sys.executable, "-c", "import otl; print(otl.__file__)"], folder, *path)
    assert Path(where.out.strip()).is_relative_to(home), "another OTL was imported"
    shown = otl(folder, "--cfg", "job", "model=sdxl", path=path)
    assert shown.code == 0, shown.err
    assert "otl.modules.stable_diffusion_xl.StableDiffusionXL" in shown.out
    helped = otl(folder, "--help", path=path)
    assert listed("model") in helped.out
    refused = otl(folder, "optimizer.lrr=1", path=path)
    assert refused.code == 2
    assert "did you mean optimizer.lr?" in refused.err
    assert "Traceback" not in refused.err


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git has, as they are now, in another folder and without metadata."""
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the clone by the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=clone, check=True, capture_output=True)
    (found,) = folder.glob("otl-*.whl")
    return found


def test_the_clone_works(clone: Path) -> None:
    works(clone, home=clone)


def test_the_clone_works_from_another_folder(clone: Path, tmp_path: Path) -> None:
    works(tmp_path, clone, home=clone)


def test_the_wheel_carries_every_yaml_and_asset(clone: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert len(YAMLS) >= 19
    kept = [name for name in YAMLS if (clone / "conf" / name).is_file()]
    assert {f"otl/conf/{name}" for name in kept} <= names
    assets = [path.relative_to(clone).as_posix() for path in (clone / "otl" / "assets").rglob("*") if path.is_file()]
    assert assets
    assert set(assets) <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]


def test_the_wheel_works_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    folder.mkdir()
    install = [sys.executable, "-m", "pip", "install", *NO_INDEX, "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    works(folder, site, home=site)
    script = run_process([site / "bin" / "otl", "--cfg", "job"], folder, site)
    assert script.code == 0, script.err
    metadata = next(site.glob("otl-*.dist-info"))
    assert "sd15 = otl.modules.stable_diffusion:StableDiffusion" in (metadata / "entry_points.txt").read_text()


def test_the_editable_install_works_in_another_folder(clone: Path, tmp_path: Path) -> None:
    built, site, folder = tmp_path / "built", tmp_path / "site", tmp_path / "elsewhere"
    for made in (built, folder):
        made.mkdir()
    build = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(built)], cwd=clone, check=True, capture_output=True)
    install = [sys.executable, "-m", "pip", "install", *NO_INDEX, "--target", str(site), *map(str, built.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    line = next(site.glob("*.pth")).read_text().strip()  # what Python's start-up does with it
    assert Path(line) == clone
    works(folder, site, clone, home=clone)
