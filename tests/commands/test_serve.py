"""`npqwen serve`: what it says, serves and refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import wait_until

Run = Callable[..., tuple[str, str]]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
ENDLESS = {
    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
    "logit_bias": {"4098": -100, "4096": -100},  # no end of the text,
    "temperature": 5,  # and no repetition that would be one
    "stream": True,
}


class Server:
    """A server in a process of its own. said: the lines of its stderr so far."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "npqwen", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        self.said: list[str] = []

    def line(self, pattern: str) -> re.Match[str]:
        """The next line of stderr in which a pattern is found."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern} is not in {self.said}")

    def url(self) -> str:
        """Its address, as soon as it listens."""
        return self.line(r"on (https?://\S+)")[1]

    def end(self, number: int) -> int:
        """The exit status after a signal; the rest of stderr is in `said`."""
        self.process.send_signal(number)
        return self.status()

    def status(self) -> int:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.said += self.process.stderr.read().splitlines()
        assert self.process.stdout.read() == ""
        return self.process.wait(60)


@contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        with server.process:
            pass


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Path:
    return tiny(4)


def answer(url: str, **more: Any) -> str:
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    body = {"messages": messages, "temperature": 0, "reasoning_effort": "none", **more}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    return str(reply.json()["choices"][0]["message"]["content"])


# --- serving ---


@POSIX
def test_it_says_where_it_listens_answers_and_ends_at_sigterm(model: Path) -> None:
    with serving(model, "--port", 0, "--threads", 1) as server:
        url = server.url()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert server.said[-1].startswith(f"npqwen serves {model.name} on http")
        assert answer(url) == "17 + 25 = 42"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert server.end(signal.SIGTERM) == 0
    assert f"  OpenAI    {url}/v1" in server.said
    assert "warning" not in " ".join(server.said)


@POSIX
def test_quiet_says_only_where_it_listens_and_ctrl_c_is_status_130(model: Path) -> None:
    with serving(model, "--port", 0, "--quiet", "--threads", 1) as server:
        server.url()
        assert server.end(signal.SIGINT) == 130
    assert len(server.said) == 1


@POSIX
def test_killed_and_started_again_on_the_same_port(model: Path) -> None:
    with serving(model, "--port", 0, "--threads", 1) as server:
        url = server.url()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                list(lines)
    with serving(model, "--port", url.rpartition(":")[2], "--threads", 1) as again:
        assert again.url() == url
        assert answer(url) == "17 + 25 = 42"


@POSIX
def test_an_answer_that_is_running_is_finished_after_ctrl_c(model: Path) -> None:
    with serving(model, "--port", 0, "--threads", 1) as server:
        body = ENDLESS | {"max_tokens": 200}
        with httpx.stream("POST", f"{server.url()}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            server.line("stopping: 1 answer is running")
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.status() == 130


@POSIX
def test_a_second_ctrl_c_does_not_wait(model: Path) -> None:
    with serving(model, "--port", 0, "--threads", 1) as server:
        body = ENDLESS | {"n": 16}
        with httpx.stream("POST", f"{server.url()}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # kept: its end would close the connection
            next(lines)
            server.process.send_signal(signal.SIGINT)
            server.line("stopping")
            assert server.end(signal.SIGINT) == 130
    assert len(server.said) == 6, server.said


@POSIX
def test_several_models_by_name_with_keys_aliases_and_a_log(
    model: Path, tiny: Callable[[int], Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-file\n\n")
    arguments = ["--api-key", "sk-flag", "--api-key-file", keys, "--alias", f"gpt-*={tiny(8).name}", "--log"]
    with serving(model, tiny(8), "--port", 0, "--threads", 1, *arguments) as server:
        url = server.url()
        server.line(f"loaded {model.name}")
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer sk-file"
            names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
            assert names == [model.name, tiny(8).name]
            assert [one["name"] for one in client.get("/api/ps").json()["models"]] == [model.name]
            client.headers["Authorization"] = "Bearer sk-flag"
            body = {"model": "gpt-4o", "prompt": "Once", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
            loaded = [one["name"] for one in client.get("/api/ps").json()["models"]]
            assert loaded == names
            assert client.post("/v1/completions", json={**body, "model": "gemma"}).status_code == 404
        work = r"\d+ prompt tokens, 0 cached; 3 generated, \d+\.\d\d s, req_\w+$"
        server.line(rf"POST /v1/completions 200 {tiny(8).name}: {work}")
        assert server.end(signal.SIGTERM) == 0
    assert not any("sk-" in line for line in server.said)


@POSIX
def test_other_machines_are_let_in_with_a_warning(model: Path) -> None:
    with serving(model, "--host", "0.0.0.0", "--port", 0, "--threads", 1) as server:
        url = server.url()
        assert url.startswith("http://127.0.0.1:")  # an address that works here
        server.line("warning: everybody who can reach this machine may use the model; --api-key")
        port = url.rpartition(":")[2]
        (other,) = (line for line in server.said if line.startswith("for other machines: http://"))
        assert other.endswith(f":{port}")
        assert "127.0.0.1" not in other
        assert httpx.get(f"{url}/health", headers={"Host": f"{socket.gethostname()}:{port}"}).status_code != 403
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 403


@POSIX
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs UNIX sockets")
def test_a_unix_socket_is_this_users_alone_and_removed_at_the_end(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(place))  # left by a server that was killed
    with serving(model, "--uds", place, "--threads", 1) as server:
        server.line(f"on unix:{place}")
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(place)), base_url="http://localhost") as client:
            wait_until(lambda: client.get("/health").status_code == 200)
        with serving(model, "--uds", place) as second:
            assert second.status() == 2
        assert "is taken by another program" in second.said[0]
        assert place.exists()
        assert server.end(signal.SIGTERM) == 0
    assert not place.exists()


@POSIX
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_https(model: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(model, "--port", 0, "--tls-cert", certificate, "--tls-key", key, "--threads", 1) as server:
        url = server.url()
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/v1/models", verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http"))


# --- refusing ---


def problem(run: Run, *arguments: object) -> str:
    """The one line of an error."""
    out, err = run("serve", *arguments, status=2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("npqwen: error: ")
    return err


def test_a_port_that_is_taken_is_one_line(run: Run, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken by another program; choose another --port" in problem(
            run, model, "--port", port
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "no.such.host.invalid"], "--host 'no.such.host.invalid' is not an address or a name"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is not an address of this machine"),
        (["--api-key-file", "missing"], "--api-key-file 'missing' cannot be read"),
        (["--api-key-file", "empty"], "--api-key-file 'empty' has no key"),
        (["--api-key", "a b"], "an API key must be"),
        (["--cors", "example.com"], "'example.com' is not an origin"),
        (["--allow-host", "http://x"], "'http://x' is not a host name"),
        (["--alias", "gpt"], "'gpt' is not a name and a model"),
        (["--alias", "gpt=other"], "alias 'gpt' stands for 'other', which is not served; there is only "),
        (["--keep-alive", "soon"], "'soon' is not a time"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "0.4B"], "'0.4B' is not a size"),
        (["--memory", "8"], "8 is bytes without a unit; is 8GB meant?"),
        (["--memory", "9" * 310], "9...' is not a size"),
        (["--queue", "0"], "queue is 0; it must be a whole number, 1 or more"),
        (["--parallel", "0"], "parallel is 0"),
        (["--context", "1000000"], "at most 2,048"),
        (["--kv", "int7"], "kv is 'int7'; it can be int8, f16 or f32"),
        (["--prefix-cache", "pc", "--prefix-cache-size", "1k"], "a prefix cache of 1 kB is too small"),
        (["--prefix-cache", "empty"], "empty is a file; a prefix cache is a directory"),
        (["--tls-key", "empty"], "--tls-key needs --tls-cert"),
        (["--tls-cert", "missing"], "--tls-cert: the file 'missing' does not exist"),
        (["--tls-cert", "empty"], "'empty' cannot be used as certificate and private key"),
        (["--uds", "no/such/directory/s"], "cannot listen there"),
        (["--port", "99999"], "port is 99999; it must be a whole number from 0 to 65535"),
        (["--ctx-size", "100"], "did you mean --context?"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    port = [] if "--port" in arguments else ["--port", "0"]
    assert message in problem(run, model, *port, *arguments)


def test_models_that_cannot_be_served(run: Run, model: Path, tmp_path: Path) -> None:
    assert f"two models are named {model.name}" in problem(run, model, model, "--port", 0)
    assert "neither a directory nor a hub id" in problem(run, tmp_path / "nothing", "--port", 0)
    assert "Missing argument" in problem(run)


def test_a_first_model_that_cannot_be_loaded_is_one_line(run: Run, model: Path) -> None:
    out, err = run("serve", model, "--port", 0, "--memory", "1MB", "--quiet", status=2)
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith(f"npqwen: error: {model.name} needs ")
    assert len(lines) <= 2  # the other one tells the address


def test_without_its_extra_it_says_what_to_install(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert problem(run, model) == 'npqwen: error: starlette is not installed; pip install "npqwen[server]"\n'


def test_the_port_is_free_again_after_an_error(run: Run, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    problem(run, model, "--port", port, "--alias", "a=b")
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", port))


def test_help_names_the_defaults(run: Run) -> None:
    out, _ = run("serve", "--help")
    for text in ("default: 8000", "default: 64", "default: 16", "this machine only", "5m"):
        assert text in " ".join(out.split())
    assert os.linesep not in out.rstrip().splitlines()[0]
