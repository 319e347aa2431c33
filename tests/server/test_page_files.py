"""The files of the page as they are served: headers, caching, and what must not be in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from npqwen.server import page

FILES = Path(page.__file__).with_name("page")
SCRIPTS = sorted(FILES.glob("*.js"))
PATHS = [route.path for route in page.routes()]


@pytest.fixture(params=["", "/some/prefix"])
def client(request: pytest.FixtureRequest) -> TestClient:
    app = Starlette(routes=page.routes())
    if request.param:
        app = Starlette(routes=[Mount(request.param, app)])
    return TestClient(app, base_url=f"http://testserver{request.param}/")


def test_every_file_is_served_and_no_other(client: TestClient) -> None:
    assert {path.removeprefix("/page/") for path in PATHS} == {
        "/",
        *(file.name for file in FILES.iterdir() if file.name != "index.html"),
    }
    for path in PATHS:
        answer = client.get(path.lstrip("/"))
        name = path.rpartition("/")[2] or "index.html"
        assert answer.status_code == 200
        assert answer.content == (FILES / name).read_bytes()
    for wrong in ("page/", "page/index.html", "page/../app.py", "page/%2e%2e/app.py", "page/..%2fapp.py", "page/x.js"):
        assert client.get(wrong).status_code == 404, wrong


def test_types_are_right_and_nothing_may_be_guessed(client: TestClient) -> None:
    types = {"": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in PATHS:
        headers = client.get(path.lstrip("/")).headers
        assert headers["content-type"].partition(";")[0] == types[Path(path).suffix]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_the_policy_allows_this_server_only(client: TestClient) -> None:
    policy = client.get("").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_unchanged_files_are_not_sent_again(client: TestClient) -> None:
    first = client.get("page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("page/app.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get("page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("page/style.css").headers["etag"] != tag


def test_head_has_the_headers_alone(client: TestClient) -> None:
    for path in ("", "page/style.css"):
        got, head = client.get(path), client.head(path)
        assert head.content == b""
        assert dict(head.headers) == dict(got.headers)
        assert head.headers["content-length"] == str(len(got.content))


def test_other_methods_are_refused(client: TestClient) -> None:
    assert client.post("").status_code == 405


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_html_of_text(path: Path) -> None:
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|createContextualFragment|" \
        r"\beval\b|new Function|srcdoc|javascript:"  # fmt: skip
    assert re.findall(dangerous, path.read_text(encoding="utf-8")) == []


def test_nothing_refers_to_another_server() -> None:
    for path in FILES.iterdir():
        urls = re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", path.read_text(encoding="utf-8"))
        assert [url for url in urls if url != "http://www.w3.org"] == [], path.name


def test_index_has_nothing_inline_and_no_absolute_paths() -> None:
    index = (FILES / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index) == []
    assert re.findall(r"(?:src|href)=\"(?!page/|#)", index) == []
