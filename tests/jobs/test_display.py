"""The progress bar on a terminal, and the summary at the end of a run."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from dove_fast.jobs.display import (
    TokenizeSummary,
    describe_shares,
    progress_bar,
    show_tokenize_summary,
)
from dove_fast.jobs.progress import Progress
from dove_fast.store.layout import flat_settings

SHARES = {"decode": 0.352, "wait": 0.031, "encode": 0.5, "generate": 0.119, "write": 0.009}


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Returns a function that shows states, each at its second, and gives what the terminal shows at the end."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    # What is left of a bar is blank then.
    monkeypatch.setenv("NO_COLOR", "1")

    def show(*states: tuple[float, Progress], columns: int = 120) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        now = [100.0]
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: now[0])
            with progress_bar("tokenize") as on_progress:
                assert on_progress is not None
                for seconds, state in states:
                    now[0] = 100.0 + seconds
                    on_progress(state)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
        lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
        last = max(index for index, line in enumerate(lines) if line.startswith("tokenize"))
        return lines[last:]

    return show


def figures(line: str) -> str:
    return re.sub("^tokenize [━╸╺ ]+", "", line)


def test_the_bar_tells_speed_length_and_what_is_left(terminal):
    # 20 inputs were done before, so that 40 took 10 seconds and 140 are left.
    (line,) = terminal((0.0, Progress(20, 200, 0, 0)), (10.0, Progress(60, 200, 38, 475)))
    assert figures(line) == "60/200 3.8 images/s 12.5 tokens 0:00:35"


@pytest.mark.parametrize(("done", "bars"), [(0, 0), (25, 5), (50, 10), (100, 20)])
def test_the_bar_is_as_long_as_what_is_done(terminal, done, bars):
    (line,) = terminal((0.0, Progress(done, 100, done, done)))
    assert line.count("━") == bars


def test_the_bar_goes_by_shards_where_inputs_are_not_counted(terminal):
    (line,) = terminal((0.0, Progress(77, None, 77, 77, units_done=5, units=20)))
    assert line.count("━") == 5


def test_the_first_state_has_no_speed(terminal):
    (line,) = terminal((5.0, Progress(20, 200, 10, 35)))
    assert figures(line) == "20/200 2.0 images/s 3.5 tokens -:--:--"


def test_a_long_job(terminal):
    (line,) = terminal((0.0, Progress(0, 10**6, 0, 0)), (10.0, Progress(100, 10**6, 100, 100)))
    assert figures(line) == "100/1000000 10.0 images/s 1.0 tokens 1 day, 3:46:30"


def test_shards_and_stages_are_told_where_there_are_some(terminal):
    state = Progress(60, 200, 60, 750, stage_seconds=SHARES, elapsed=1.0, units_done=3, units=10)
    line, stages = terminal((0.0, Progress(0, 200, 0, 0)), (10.0, state))
    assert figures(line) == "60/200 6.0 images/s 12.5 tokens 0:00:23 shard 3/10"
    assert stages == "decode 35% wait 3% encode 50% generate 12% write 1%"
    (line,) = terminal((0.0, Progress(60, 200, 60, 750, units_done=0, units=1)))
    assert "shard" not in line


def test_without_a_total_the_shards_tell_what_is_left(terminal):
    begin = Progress(40, None, 0, 0, units_done=2, units=10)
    (line,) = terminal((0.0, begin), (10.0, Progress(65, None, 25, 50, units_done=4, units=10)))
    assert figures(line) == "65 2.5 images/s 2.0 tokens 0:00:30 shard 4/10"


def test_without_a_total_and_with_one_shard_there_is_a_count(terminal):
    (line,) = terminal((0.0, Progress(0, None, 0, 0, units=1)), (10.0, Progress(65, None, 25, 50, units=1)))
    assert figures(line) == "65 2.5 images/s 2.0 tokens"


def test_everything_fits_80_columns(terminal):
    state = Progress(123456, 1000000, 123456, 1234560, stage_seconds=SHARES, elapsed=1.0, units_done=120, units=977)
    line, stages = terminal((0.0, Progress(0, 1000000, 0, 0)), (100.0, state), columns=80)
    assert line.endswith("123456/1000000 1234.6 images/s 10.0 tokens 0:11:50 shard 120/977")
    assert len(line) <= 80 and len(stages) <= 80


def test_no_terminal_no_bar(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bar("tokenize") as on_progress:
        assert on_progress is None
    assert capsys.readouterr() == ("", "")


def test_shares_in_words():
    assert describe_shares({"decode": 0.354, "write": 0.006}) == "decode 35% write 1%"
    assert describe_shares({}) == ""


def test_settings_are_flattened():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "f": None}
    assert list(flat_settings(nested)) == [("a", 1), ("b.c", 2), ("b.d.e", [3]), ("f", None)]


def summary_rows(summary: TokenizeSummary) -> dict[str, str]:
    buffer = io.StringIO()
    show_tokenize_summary(summary, "some/[bold]name", Console(file=buffer, width=100))
    title, *lines = buffer.getvalue().splitlines()
    assert title.strip() == "Tokenized"
    rows = dict([cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│"))
    assert rows.pop("store") == "some/[bold]name"
    return rows


def test_the_summary_of_a_run():
    summary = TokenizeSummary(
        images=1200, set_aside=3, tokens=15000, computed=1200, seconds=48.0, stages=SHARES, quantization_error=0.00456
    )
    assert summary_rows(summary) == {
        "images": "1,200",
        "set aside": "3",
        "tokens": "15,000",
        "mean length": "12.50",
        "seconds": "48.0",
        "images/s": "25.0",
        "decode": "35.2%",
        "wait": "3.1%",
        "encode": "50.0%",
        "generate": "11.9%",
        "write": "0.9%",
        "int8 error": "4.56e-03",
    }


def test_the_summary_of_a_run_that_went_on():
    rows = summary_rows(TokenizeSummary(1200, 0, 15000, computed=600, seconds=48.0))
    assert (rows["images"], rows["of this run"], rows["images/s"]) == ("1,200", "600", "12.5")
    assert "int8 error" not in rows and "decode" not in rows


def test_the_summary_without_images():
    rows = summary_rows(TokenizeSummary(0, 2, 0, computed=0, seconds=0.0))
    assert rows == {"images": "0", "set aside": "2", "tokens": "0", "seconds": "0.0"}
