from pathlib import Path

from otl.datamodules.texts import all_prompts, choose, dropped
from otl.types import Sample, Size


def sample(*captions: str) -> Sample:
    return Sample(Path("a.png"), Size(64, 64), list(captions))


def test_every_caption_is_chosen_about_as_often():
    chosen = [choose(["a", "b", "c"], key) for key in range(3000)]
    assert all(900 < chosen.count(caption) < 1100 for caption in "abc")


def test_the_choice_is_a_function_of_the_key():
    assert [choose(["a", "b"], key) for key in range(50)] == [choose(["a", "b"], key) for key in range(50)]


def test_the_share_of_captions_is_dropped():
    assert 900 < sum(dropped(key, 0.1) for key in range(10000)) < 1100
    assert not any(dropped(key, 0.0) for key in range(1000))
    assert all(dropped(key, 1.0) for key in range(1000))


def test_dropping_does_not_depend_on_the_choice():
    kept = [choose(["a", "b"], key) for key in range(4000) if not dropped(key, 0.5)]
    assert 0.45 < kept.count("a") / len(kept) < 0.55


def test_all_prompts_are_listed_once():
    assert all_prompts([sample("b", "a"), sample("a")], 0.0) == ["a", "b"]


def test_the_empty_prompt_is_listed_where_captions_are_dropped():
    assert all_prompts([sample("a")], 0.1) == ["", "a"]
