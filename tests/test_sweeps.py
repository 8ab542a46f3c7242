"""The jobs of a sweep are those that Hydra's sweeper will make."""

from otl.config import conf_dir
from otl.sweeps import groups_in, jobs, parted


def test_options_that_a_glob_means_are_looked_up():
    found = [job[0] for job in jobs(["model=glob(sd*, exclude=sdxl*)", "seed=1"], groups_in())]
    names = {path.stem for path in (conf_dir() / "model").glob("sd*.yaml")}
    assert len(found) > 5 and found == sorted(f"model={name}" for name in names if not name.startswith("sdxl"))


def test_options_of_a_folder_of_ones_own_are_among_them(tmp_path):
    (tmp_path / "experiment" / "night").mkdir(parents=True)
    for name in ("experiment/mine", "experiment/night/other"):
        (tmp_path / f"{name}.yaml").write_text("")
    assert list(jobs(["experiment=glob(mi*)"], groups_in(str(tmp_path)))) == [["experiment=mine"]]
    assert list(jobs(["experiment/night=glob(*)"], groups_in(str(tmp_path)))) == [["experiment/night=other"]]


def test_jobs_are_every_combination():
    assert list(jobs(["a=1,2", "b=range(0,2)", "c=x"])) == [[f"a={a}", f"b={b}", "c=x"] for a in "12" for b in "01"]


def test_what_only_the_sweeper_knows_has_no_jobs_here():
    assert list(jobs(["a=1,2", "b=interval(0,1)"])) == []
    assert parted(["a=1,2", "b=interval(0,1)", "c=x"]) == (["c=x"], {"a": "a=1,2", "b": "b=interval(0,1)"})
