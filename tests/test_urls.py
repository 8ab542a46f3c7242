import pytest

from otl import urls
from otl.urls import is_url, unreadable


@pytest.mark.parametrize(
    ("path", "url"), [("s3://a/b", True), ("zip://a::b.zip", True), ("photos/", False), (r"C:\photos", False)]
)
def test_a_url_has_a_protocol(path, url):
    assert is_url(path) is url


@pytest.mark.parametrize("url", ["s3://a", "https://a", "hf://datasets/a/b", "memory://a", "zip://::a.zip"])
def test_what_can_be_read(url):
    assert unreadable(url) is None


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("s3://", "s3://BUCKET/FOLDER"),
        ("gs:///photos", "gs://BUCKET/FOLDER"),
        ("https://", "https://HOST/FILE"),
        ("hf:///a/b", "hf://datasets/OWNER/NAME"),
    ],
)
def test_a_url_without_a_bucket_or_a_host_is_told_with_its_form(url, form):
    assert unreadable(url) == f"it names nothing: give {form}"


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    assert unreadable("s3://a") == "s3:// needs s3fs, which is not installed; pip install 'otl[data]'"


def test_a_mistyped_protocol_is_recognised():
    assert unreadable("htps://a") == "htps:// is no protocol that fsspec knows; did you mean https?"
