"""Nothing is fetched and nothing leaves: no verb opens an internet socket or starts another program."""

import subprocess
import sys

import pytest


@pytest.mark.needs("strace")
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "explain", "report", "list"])
def test_no_verb_reaches_out(verb, tmp_path):
    train = ["train", "spirals", "--epochs", "1", "--set", "data.rows=100", "--out", "run"]
    given = {"train": train, "predict": ["predict", "run", "0.5 0.5"], "list": ["list"]}.get(verb, [verb, "run"])
    command = [sys.executable, "-m", "cloche"]
    if verb not in ("train", "list"):
        subprocess.run(command + train, cwd=tmp_path, check=True, capture_output=True)
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "-qq", "-e", "trace=connect,execve", "-o", str(trace), *command, *given]
    done = subprocess.run(traced, cwd=tmp_path, capture_output=True, text=True)
    calls = trace.read_text().splitlines()
    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if "AF_INET" in call]
    assert len([call for call in calls if "execve(" in call]) == 1  # its own


@pytest.mark.needs("strace")
def test_the_trace_sees_a_connection(tmp_path):
    """What the test above looks for is there when a program does reach out."""
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace), sys.executable, "-c", code], check=True)
    assert "AF_INET" in trace.read_text()
