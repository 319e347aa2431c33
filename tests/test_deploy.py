"""The files of examples/deploy: their commands are npqwen's, and a wheel can be built of what an image is given."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from npqwen.commands.cli import cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "npqwen.service").read_text(encoding="utf-8")


def accepted(words: list[str]) -> bool:
    """Whether `npqwen WORDS` has a command and flags that there are. Raises click.UsageError otherwise."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words
    with command.make_context(words[0], words[1:]) as ctx:
        return ctx.params != {}


def test_the_container_runs_a_command_that_there_is() -> None:
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[0])
    assert entry == ["npqwen"]
    words = json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.M)[0])
    assert accepted(words)
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    (line,) = re.findall(r"command: \[(.*)\]", compose)
    assert accepted([word.strip(' "') for word in line.split(",")])


def test_the_health_check_knows_a_server_from_none(server: str) -> None:
    (words,) = re.findall(r'^    (\["python", .*\])$', DOCKERFILE, re.M)
    python, dash_c, code = json.loads(words)
    assert (python, dash_c) == ("python", "-c")
    assert "http://127.0.0.1:8000/health" in code
    exec(code.replace("http://127.0.0.1:8000", server))
    with pytest.raises(OSError, match="refused"):
        exec(code.replace("127.0.0.1:8000", "127.0.0.1:9"))


def test_an_image_is_given_what_a_wheel_needs() -> None:
    """.dockerignore leaves out everything but some names; pyproject.toml's files are among them."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    given = [line[1:] for line in lines if line.startswith("!")]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^packages = (\[.*\])$", project, re.M)
    needed = ["pyproject.toml", "README.md", "LICENSE", *json.loads(packages)]
    needed += re.findall(r'^"(.+)" = "npqwen/documents/', project, re.M)
    for name in needed:
        assert any(fnmatch.fnmatch(name, one) or name.startswith(f"{one}/") for one in given), name


def test_the_service_runs_a_command_that_there_is() -> None:
    settings = dict(re.findall(r'^Environment="?(NPQWEN_\w+)=([^"\n]*)"?$', UNIT, re.M))
    (start,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.M)
    for name, value in (settings | {"CREDENTIALS_DIRECTORY": "/run"}).items():
        start = start.replace(f"${{{name}}}", value).replace(f"${name}", value)
    program, *words = shlex.split(start)
    assert program.endswith("/npqwen")
    assert accepted(words)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_no_fault_with_the_service(tmp_path: Path) -> None:
    unit = tmp_path / "npqwen.service"
    unit.write_text(UNIT.replace("/opt/npqwen/bin/npqwen", "/bin/sh"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=300)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "npqwen" in line]) == (0, [])
