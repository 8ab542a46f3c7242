"""The jobs of a sweep are those that Hydra's sweeper will make."""

from otl.config import conf_dir
from otl.sweeps import groups_in, jobs, parted, unswept


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


def test_of_an_interval_the_ends_are_looked_at():
    assert list(jobs(["a=1,2", "b=interval(0,1)"])) == [[f"a={a}", f"b={b}"] for a in "12" for b in ("0.0", "1.0")]
    assert list(jobs(["b=int(interval(2,8))"])) == [["b=2"], ["b=8"]]


def test_what_is_the_same_in_all_jobs_is_parted_from_the_rest():
    assert parted(["a=1,2", "b=interval(0,1)", "c=x"]) == (["c=x"], {"a": "a=1,2", "b": "b=interval(0,1)"})


def test_the_usual_sweeper_takes_no_intervals_and_others_do():
    line = ["optimizer.lr=interval(1e-5,1e-3)", "seed=1,2"]
    (problem,) = unswept(line, "hydra._internal.core_plugins.basic_sweeper.BasicSweeper")
    assert problem.key == "optimizer.lr" and problem.message.startswith("interval(1e-5,1e-3) needs a sweeper")
    assert list(unswept(line, "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper")) == []
    assert list(unswept(["seed=choice(1,2)", "a=range(1,3)"], "x.BasicSweeper")) == []
