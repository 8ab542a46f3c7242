"""Families and plugins by entry points."""

from pathlib import Path

import pytest

from otl.config import SettingsError
from otl.registry import families, methods, plugin_conf_dirs, plugin_packages
from tests.commands import ROOT, listed, run_otl, write_plugin

FOO = "_target_: otl_foo.family.Foo\ncheckpoint: somewhere\nwidth: 3\n"
FAMILY = "class Foo:\n    def __init__(self, checkpoint: str, *, width: int = 1) -> None: ...\n"
PLUGIN = {"conf/model/foo.yaml": FOO, "family.py": FAMILY}


def test_the_families_in_the_tree_are_declared_like_any_plugin() -> None:
    assert families()["sd15"].value == "otl.modules.stable_diffusion:StableDiffusion"
    assert families()["sdxl"].value == "otl.modules.stable_diffusion_xl:StableDiffusionXL"
    assert {"lora", "finetune"} <= set(methods())


def test_a_plugin_is_found_with_its_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_foo", models="foo = otl_foo.family:Foo", files=PLUGIN))
    assert families()["foo"].value == "otl_foo.family:Foo"
    assert plugin_packages()["otl_foo"] == "otl-foo"
    assert tmp_path / "otl_foo" / "conf" in plugin_conf_dirs()


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("otl_foo", "otl_bar"):
        write_plugin(tmp_path, package, models=f"foo = {package}.family:Foo", files={"family.py": FAMILY})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match=r"declare foo in otl\.models: otl-bar and otl-foo"):
        families()


def test_a_name_of_otl_itself_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_foo", models="sdxl = otl_foo.family:Foo"))
    with pytest.raises(SettingsError, match=r"declare sdxl in otl\.models: otl and otl-foo"):
        families()


def test_a_yaml_of_otl_itself_cannot_be_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"conf/optimizer/adamw.yaml": FOO}
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_foo", models="foo = otl_foo.family:Foo", files=files))
    with pytest.raises(SettingsError, match=r"otl-foo shadows optimizer/adamw\.yaml"):
        plugin_conf_dirs()


def test_a_yaml_of_another_plugin_cannot_be_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("otl_foo", "otl_bar"):
        write_plugin(tmp_path, package, models=f"{package} = {package}.family:Foo", files=PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match=r"otl-foo shadows model/foo\.yaml, which otl-bar has"):
        plugin_conf_dirs()


def test_a_plugin_appears_in_help_and_is_checked(tmp_path: Path) -> None:
    path = (ROOT, write_plugin(tmp_path, "otl_foo", models="foo = otl_foo.family:Foo", files=PLUGIN))
    helped = run_otl("--help", cwd=tmp_path, path=path)
    assert listed("model", "foo") in helped.out
    refused = run_otl("model=foo", "model.wdith=3", f"data.path={tmp_path}", cwd=tmp_path, path=path)
    assert refused.code == 2
    assert "did you mean model.width?" in refused.err


def test_a_plugin_that_raises_breaks_nothing_else(tmp_path: Path) -> None:
    files = PLUGIN | {"__init__.py": "raise RuntimeError('broken on import')"}
    path = (ROOT, write_plugin(tmp_path, "otl_foo", models="foo = otl_foo.family:Foo", files=files))
    assert listed("model", "foo") in run_otl("--help", cwd=tmp_path, path=path).out
    assert run_otl("--cfg", "job", cwd=tmp_path, path=path).code == 0
    refused = run_otl("method.rank=0", f"data.path={tmp_path}", cwd=tmp_path, path=path)
    assert "broken on import" not in refused.err
    assert "method.rank: 0 is not accepted" in refused.err


def test_a_plugin_whose_package_is_gone_breaks_nothing_else(tmp_path: Path) -> None:
    path = (ROOT, write_plugin(tmp_path, "otl_foo", models="foo = otl_gone.family:Foo"))
    helped = run_otl("--help", cwd=tmp_path, path=path)
    assert helped.code == 0
    assert "the plugin otl-foo declares the package 'otl_gone', which is not installed" in helped.err
