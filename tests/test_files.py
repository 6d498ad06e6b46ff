"""Files that somebody else gave are read in bounded time and memory, or refused in one sentence."""

import pytest
from runs import make_strange

from llm.files import read_json, read_regular


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "it is a folder, a pipe, a socket or a device"),
        ("socket", "it is a folder, a pipe, a socket or a device"),
        ("device", "it is a folder, a pipe, a socket or a device"),
        ("folder", "it is a folder, a pipe"),
        ("loop", "symbolic links"),
        ("huge", "larger than 1.0 GiB"),
        ("deep", "nested too deeply"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_without_waiting(tmp_path, kind, words):
    make_strange(kind, tmp_path / "given.json")
    with pytest.raises((OSError, ValueError), match=words):
        read_json(tmp_path / "given.json")


def test_a_regular_file_is_read_whole_and_through_links(tmp_path):
    (tmp_path / "real").write_bytes(b'{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link") == {"a": 1}
    assert read_regular(tmp_path / "link", most_bytes=8) == b'{"a": 1}'
    with pytest.raises(OSError, match="larger than 7 B"):
        read_regular(tmp_path / "link", most_bytes=7)
