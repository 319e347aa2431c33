"""The documents: links lead somewhere, lines are short, code runs, and the page of options is what the code says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import npqwen
from npqwen.chat.chat_options import CHAT_OPTIONS
from npqwen.generation.option import Option
from npqwen.generation.options import OPTIONS
from npqwen.server import monitoring

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "tests").rglob("README.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted((ROOT / "plugins").rglob("README.md")),
    ROOT / "quant" / "FORMAT.md",
]
OPTIONS_PAGE = ROOT / "docs" / "options.md"
SERVER_PAGE = ROOT / "docs" / "server.md"
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(text: str) -> Iterator[str]:
    """Lines outside code blocks and tables."""
    inside = False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside and not line.startswith("|"):
            yield line


def anchors(path: Path) -> set[str]:
    """Names of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            place, _, anchor = target.partition("#")
            found = (path.parent / place).resolve() if place else path
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


@each_document
def test_files_that_are_named_exist(path: Path) -> None:
    names = re.findall(r"`([\w./-]+\.(?:py|md|jinja|npz))[`:]", path.read_text(encoding="utf-8"))
    # os.walk, unlike a pattern, does not mind what other tests remove meanwhile.
    files = [Path(place, name).as_posix() for place, _, found in os.walk(ROOT) for name in found]
    for name in names:
        assert any(file.endswith(f"/{name}") for file in files), name


@each_document
def test_lines_end_by_column_120(path: Path) -> None:
    assert [line for line in prose(path.read_text(encoding="utf-8")) if len(line) > 120] == []


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_python_code_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    embedder: Callable[[int], npqwen.Model],
    reranker: Callable[[int], npqwen.Model],
) -> None:
    """Every block of a page in order, with the small models in place of those on the hub.

    Clients of a server are tested with the server, what needs Ray in `tests/on_ray`.
    """
    monkeypatch.chdir(tmp_path)
    tiny, load = tmp_path / "examples" / "tiny-qwen3", npqwen.load
    shutil.copytree(ROOT / "examples" / "tiny-qwen3", tiny)

    def load_small(
        model: object, bits: int | None = None, adapters: Mapping[str, str] | None = None, **_: object
    ) -> npqwen.Model:
        if "Embedding" in str(model) or "Reranker" in str(model):
            return (embedder if "Embedding" in str(model) else reranker)(bits or 4)
        adapter = ROOT / "tests" / "data" / "adapters" / "linear"
        return load(tiny, bits, threads=1, adapters=dict.fromkeys(adapters or {}, adapter))

    monkeypatch.setattr(npqwen, "load", load_small)
    names: dict[str, object] = {}
    try:
        for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S):
            if not re.search(r"from openai import|import ray|from ray import", block):
                exec(compile(block, name, "exec"), names)
    finally:
        model = names["model"]
        assert isinstance(model, npqwen.Model)
        model.close()
    assert "17 + 25 = " in capsys.readouterr().out


def options_page() -> str:
    """The page of all options of generation and chat."""
    lines = [
        "# Options",
        "",
        "How a text is generated: the same options in `model.stream`, `generate`, `chat` and `conversation`, as flags",
        "of `npqwen generate` and `npqwen chat`, and with `/set` in a conversation in the terminal. An option that is",
        "left out is the checkpoint's own.",
        "",
        "| option | values | |",
        "|---|---|---|",
        *(f"| `{option.name}` | {values(option)} | {option.help}{places(option)} |" for option in OPTIONS.values()),
        "",
        "## In a chat only",
        "",
        "`model.chat`, `stream_chat` and `conversation` have these, too.",
        "",
        "| option | values | |",
        "|---|---|---|",
        *(f"| `{option.name}` | {values(option)} | {option.help} |" for option in CHAT_OPTIONS.values()),
    ]
    return "\n".join(lines) + "\n"


def values(option: Option) -> str:
    """A table cell: what an option accepts."""
    if option.read is not None:
        return f"the {option.name} itself in Python; otherwise, the name of a file"
    return option.expected if option.kind else option.metavar or "a Python object"


def places(option: Option) -> str:
    """What an option's flag accepts, and where there is none."""
    if option.as_flag:
        return f" As a flag: {option.as_flag}." + ("" if option.settable else " Not with `/set`.")
    if not option.flag:
        return " With `/set`, but not as a flag." if option.settable else " Python only."
    return "" if option.settable else " Not with `/set`."


def test_the_page_of_options_is_up_to_date() -> None:
    assert OPTIONS_PAGE.read_text(encoding="utf-8") == options_page(), "run python tests/test_documents.py"


if __name__ == "__main__":
    OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")


def test_the_servers_page_has_all_metrics_and_codes_of_errors() -> None:
    page = SERVER_PAGE.read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "npqwen" / "server").rglob("*.py")]
    failure = re.compile(r'Failure\(\s*\d+,(?:[^\n]|\n {4})*?"([a-z]+_[a-z_]+)"')
    codes = {code for text in sources for code in failure.findall(text)}
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in page} == set()
    metrics = {f"npqwen_{metric.name}" for metric in monitoring._METRICS}
    assert {name for name in metrics if f"`{name}`" not in page} == set()
