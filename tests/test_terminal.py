"""What commands print, on terminals of any kind and on none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINT = """
import sys
from megatron_nepa.terminal import tool
with tool("try"):
    for _ in range(5000):
        print({text})
    print("to the end", file=sys.stderr)
"""


def run(text: str, encoding: str, stdout: int) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""}
    command = [sys.executable, "-c", PRINT.format(text=ascii(text))]
    return subprocess.run(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
@pytest.mark.parametrize("text", ["caf\udce9", "caf\u00e9", "\u732b", "\U0001f408"])
def test_any_name_is_printed_on_any_terminal(encoding: str, text: str) -> None:
    done = run(text, encoding, subprocess.PIPE)
    assert (done.returncode, done.stderr.splitlines()) == (0, ["to the end"])
    assert done.stdout


def test_a_closed_pipe_ends_nothing() -> None:
    code = PRINT.format(text='"a line"')
    line = f"{sys.executable} -c '{code}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line\n", "to the end\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_were_closed_before_the_start_end_nothing(closed: str, tmp_path: Path) -> None:
    """As a daemon's; a file that is opened is not what is printed into."""
    body = f"print(sys.stdout.isatty(), sys.stderr.isatty(), file=open({str(tmp_path / 'out')!r}, 'w'))"
    code = f"import sys\nfrom megatron_nepa.terminal import tool\nwith tool('try'):\n    print('a line')\n    {body}"
    (tmp_path / "code.py").write_text(code)
    line = f"{sys.executable} {tmp_path}/code.py {closed}"
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run(["bash", "-c", line], stderr=subprocess.DEVNULL, env=environment, check=False).returncode == 0
    assert (tmp_path / "out").read_text() == "False False\n"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("from megatron_nepa.config import ConfigError; raise ConfigError('what is wrong.')", 2, "try: what is wrong."),
        ("raise SystemExit('try: what is wrong.')", 2, "try: what is wrong."),
        ("raise SystemExit(1)", 1, ""),
        ("raise KeyboardInterrupt", 130, "try: interrupted."),
        ("open('x' * 300)", 2, f"try: {'x' * 300}: file name too long; give a shorter path."),
        ("import os; os.rename('/dev/null/a', '/b')", 2, "try: /dev/null/a and /b: not a directory; see that it is"),
    ],
)
def test_how_a_tool_ends(body: str, status: int, said: str) -> None:
    code = f"from megatron_nepa.terminal import tool\nwith tool('try'):\n    {body}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.strip().startswith(said) if said else not done.stderr
