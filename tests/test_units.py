import pytest

from quantkit.errors import UsageError
from quantkit.units import human_size, human_time, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8g", 8 * 10**9),
        ("8Gi", 8 * 2**30),
        ("500MB", 500 * 10**6),
        (" 1.5 TiB ", 3 * 2**39),
        (".5k", 500),
        ("4000000000", 4 * 10**9),
        (2**31, 2**31),
        (None, None),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-1GB", "0", "0.1", "1e9", "8 G B", "8XB", "∞", "١GB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"^--memory must be a size such as 8GiB, .*, not "):
        parse_size(text)


@pytest.mark.parametrize(("size", "text"), [(1, "1 B"), (999, "999 B"), (1e3, "1 kB"), (1.5e13, "15 TB")])
def test_sizes_are_written_with_three_digits(size, text):
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59, "59 s"), (600, "10 min"), (3 * 3600, "3 h 00 min"), (90 * 3600, "4 days")],
)
def test_durations(seconds, text):
    assert human_time(seconds) == text
