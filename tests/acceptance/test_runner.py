"""Whatever a part's process does, the report has a row for it, and a run goes on where it was interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_nepa.acceptance import runner as runners
from megatron_nepa.acceptance.parts import Part
from megatron_nepa.acceptance.report import Report, Row
from megatron_nepa.acceptance.runner import Runner
from megatron_nepa.benchmarks.machine import Machine
from megatron_nepa.config import ConfigError

HERE = Machine("a device", 1, "2.0", "0.1", "2026-01-01")
# a process that speaks as the real one does, without its imports; each check is a line of Python
CHILD = """
import json, os, signal, sys, time
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
def tell(**event):
    os.write(int(arguments["--events"]), (json.dumps(event) + chr(10)).encode())
checks = json.loads({checks!r})
done, start, seconds = json.loads(arguments["--done"]), time.monotonic(), float(arguments["--seconds"])
{before}
tell(checks=[[name, 1.0] for name in checks])
for name, line in checks.items():
    if name in done or seconds - (time.monotonic() - start) < 1.0:
        continue
    tell(begin=name)
    exec(line)
    row = dict(name=name, status="PASS", figure="fine", meaning="", remedy="", results=dict())
    tell(entry=dict(part=sys.argv[1], check=name, seconds=0.1, final=True, rows=[row]))
    if line == "spoilt = 1":
        sys.exit(75)
"""


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "PARTS", {"1": Part("toy", "none", 30.0)})
    monkeypatch.setattr(runners, "START_SECONDS", 20)


def run(folder: Path, checks: str, before: str = "", patience: float = 1.0) -> tuple[dict[str, Row], Report]:
    """The rows of a part whose checks are these, by name."""
    report = Report(folder, HERE, False, {"1": "toy"})
    child = CHILD.format(checks=checks, before=before)
    Runner(report, folder, patience, lambda text: None, (sys.executable, "-c", child)).run("1")
    rows = [row for entry in report.entries() for row in entry.rows]
    assert len(rows) == len({row.name for row in rows})
    return {row.name: row for row in rows}, report


@pytest.mark.parametrize(
    ("line", "status", "figure"),
    [
        ("pass", "PASS", "fine"),
        ("spoilt = 1", "PASS", "fine"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "FAIL", "SIGSEGV"),
        ("print('no room', file=sys.stderr, flush=True); os._exit(3)", "FAIL", "status 3: no room"),
        ("time.sleep(60)", "FAIL", "not over after"),
        ("os.system('sleep 60')", "FAIL", "not over after"),
    ],
)
def test_a_check_ends_itself_alone(tmp_path: Path, line: str, status: str, figure: str) -> None:
    checks = f'{{"a": "pass", "b": "{line}", "c": "pass"}}'
    rows, report = run(tmp_path, checks)
    assert [row.status for row in rows.values()] == ["PASS", status, "PASS"]
    assert figure in rows["b"].figure
    assert report.done("1") == ["a", "b", "c"]


def test_a_part_that_cannot_start_is_a_row_and_starts_again_next_time(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, '{"a": "pass"}', before="raise SystemExit('libcudart is missing')")
    assert rows["start of the part"].status == "FAIL"
    assert "libcudart is missing" in rows["start of the part"].figure
    rows, _ = run(tmp_path, '{"a": "pass"}')
    assert list(rows) == ["a"]


def test_what_had_no_time_is_said_and_done_next_time(tmp_path: Path) -> None:
    checks = '{"a": "time.sleep(0.3)", "b": "pass"}'
    rows, _ = run(tmp_path, checks, before="seconds = 1.2")
    assert [row.status for row in rows.values()] == ["PASS", "NOT RUN"]
    assert "time was over" in rows["b"].figure
    rows, _ = run(tmp_path, '{"a": "os._exit(1)", "b": "pass"}')  # a does not run again
    assert [row.status for row in rows.values()] == ["PASS", "PASS"]


def test_a_report_of_another_machine_or_of_a_rehearsal_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path, '{"a": "pass"}')
    with pytest.raises(ConfigError, match=r"is the report of a device, 2\.0, 0\.1"):
        Report(tmp_path, Machine("another", 1, "2.0", "0.1", "2026-01-01"), False, {"1": "toy"})
    with pytest.raises(ConfigError, match="and this is a rehearsal on a device"):
        Report(tmp_path, HERE, True, {"1": "toy"})
    (tmp_path / "acceptance.json").write_text("{")
    with pytest.raises(ConfigError, match="is no report"):
        Report(tmp_path, HERE, False, {"1": "toy"})


def test_the_table_survives_what_is_in_a_cell(tmp_path: Path) -> None:
    run(tmp_path, '{"a | b": "pass"}')
    assert "| 1 | a \\| b | **PASS** | fine |  |  |" in (tmp_path / "acceptance.md").read_text()
