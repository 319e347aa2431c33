"""`npqwen help`: pages, sections and commands, in a file and on a terminal; what an installed npqwen has of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from npqwen.chat.chat_options import CHAT_OPTIONS
from npqwen.commands.cli import COMMANDS
from npqwen.errors import OptionError
from npqwen.generation.options import OPTIONS
from npqwen.terminal import documents
from npqwen.terminal.answer_text import rendered
from npqwen.terminal.documents import PAGES, Documents, Section

Run = Callable[..., tuple[str, str]]
ROOT = Path(__file__).parents[2]


def test_without_a_topic_all_are_listed(run: Run) -> None:
    out, err = run("help")
    assert err == ""
    for name in PAGES:
        assert f"- **{name}**: " in out
    assert "Sampling" in out


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_the_document_itself(name: str, run: Run) -> None:
    assert run("help", name)[0] == (ROOT / PAGES[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("topic", "page", "heading"),
    [
        ("sampling", "models", "## Sampling"),
        ("Context and YaRN", "models", "## Context and YaRN"),
        ("environment variables", "terminal", "## Environment variables"),
        ("environment", "terminal", "## Environment variables"),
        ("yarn", "models", "## Context and YaRN"),
        ("memory", "models", "## Which one fits"),
        ("server speed", "server", "## Speed"),
        ("formats", "sources", "# "),
        ("raspberry pi", "raspberry-pi", "# "),
        ("OPENAI'S API", "server", "## OpenAI's API"),
    ],
)
def test_a_topic_is_a_section(topic: str, page: str, heading: str, run: Run) -> None:
    out, _ = run("help", *topic.split())
    assert out.startswith(heading)
    text = (ROOT / PAGES[page]).read_text(encoding="utf-8")
    assert out in text
    assert len(re.findall(r"^## ", out, re.M)) == 1 or out == text


def test_sections_are_whole() -> None:
    """A page is its beginning and its sections; a heading inside a block of code begins none."""
    for page, *sections in Documents().sections.values():
        assert page.text.endswith("".join(section.text for section in sections))
    (page, one) = documents._sections("page", "# Title\n\n```\n## no heading\n```\n\n## One\n\ntext\n")
    assert (page.heading, one.heading, one.text) == ("Title", "One", "## One\n\ntext\n")


def test_every_section_is_found_by_its_topic() -> None:
    pages = Documents()
    for _, *sections in pages.sections.values():
        for section in sections:
            assert pages.find(section.topic) == [section]


def test_other_words_lead_to_topics() -> None:
    pages = Documents()
    for word, topic in documents._ELSEWHERE.items():
        assert len(pages.find(topic)) == 1, word


def test_several_matches_are_listed(run: Run) -> None:
    out, _ = run("help", "conversations")
    assert "2 sections match:\n\nnpqwen help terminal conversations\nnpqwen help python conversations\n" in out


@pytest.mark.parametrize("topic", ["temperature", "--temperature", "options temperature"])
def test_an_option_is_a_topic(topic: str, run: Run) -> None:
    out, _ = run("help", "--", topic)
    header, rule, row = out.splitlines()
    assert (header, rule) == ("| option | values | |", "|---|---|---|")
    assert row.startswith("| `temperature` | a number from 0 to 100 | Divide the logits")
    assert f"\n{row}\n" in (ROOT / PAGES["options"]).read_text(encoding="utf-8")


def test_all_options_are_found() -> None:
    pages = Documents()
    for name in (*OPTIONS, *CHAT_OPTIONS):
        assert pages.find(f"options {name}")[0].text.splitlines()[2].startswith(f"| `{name}` |")
        assert f"options {name}" in [one.topic for one in pages.find(name)]


@pytest.mark.parametrize("topic", ["bits", "--bits"])
def test_a_flag_of_commands_is_a_topic(topic: str, run: Run) -> None:
    out, _ = run("help", topic)
    assert "--bits 3|4|8|16\n  Bits per weight, if not converted yet; default: 4.\n  of " in out
    assert "--bits 3|4|8|16\n  Only conversions to this many bits; default: all.\n  of rm\n" in out


def test_a_heading_comes_before_a_flag_without_hyphens(run: Run) -> None:
    assert run("help", "yarn")[0].startswith("## Context and YaRN")
    assert run("help", "--yarn")[0].startswith("--yarn FACTOR\n")


def test_an_option_comes_before_sections_of_its_name(run: Run) -> None:
    assert run("help", "--adapter")[0].splitlines()[2].startswith("| `adapter` |")
    assert Documents().named("stop")[0].topic == "options stop"


def test_the_readme_tells_how_to_install(run: Run) -> None:
    out, _ = run("help", "install")
    assert out.startswith("# npqwen\n")
    assert "pip install" in out


def test_a_section_of_the_third_level_is_a_topic(run: Run) -> None:
    out, _ = run("help", "continuing the last conversation")
    assert out.startswith("### Continuing the last conversation\n")
    assert out.count("\n#") == 0
    assert out in Documents().page("terminal").text
    (section,) = Documents().find("server errors")
    assert section.text.startswith("### Errors\n")


def test_words_of_the_text_are_found(run: Run) -> None:
    found = Documents().find("npqwen_isa long prom")
    assert "terminal environment variables" in [one.topic for one in found]
    out, _ = run("help", "huge", "pages")
    assert re.match(r"\d+ sections match:\n\n(npqwen help [^\n]+\n)+$", out)


def test_a_command_is_a_topic_too(run: Run) -> None:
    for name in COMMANDS:
        assert run("help", name)[0] == run(name, "--help")[0]


def test_an_unknown_topic_is_refused(run: Run) -> None:
    _, err = run("help", "qwertyuiop", status=2)
    assert err == "npqwen: error: unknown help topic 'qwertyuiop'; npqwen help lists all topics\n"
    _, err = run("help", "sampleing", status=2)
    assert "did you mean sampling?" in err


def test_a_broken_installation_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "__file__", str(tmp_path / "npqwen" / "terminal" / "documents.py"))
    with pytest.raises(OptionError, match=r"cannot be read: .*; install npqwen again"):
        Documents().find("server")
    place = tmp_path / "npqwen" / "documents"  # where a wheel has them
    place.mkdir(parents=True)
    for name in PAGES:
        (place / f"{name}.md").write_text(f"# {name} installed\n")
    assert Documents().page("server").text == "# server installed\n"


def test_a_wheel_has_the_pages() -> None:
    """pyproject.toml puts each where `Documents` looks for it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = dict(re.findall(r'^"(.+?)" = "npqwen/documents/(.+?)\.md"$', text, re.M))
    assert found == {place: name for name, place in PAGES.items()}


def test_on_a_terminal_it_is_readable() -> None:
    section = Section(
        "server",
        "Title",
        "# Title\n\nA long\nparagraph with [a link](speed.md#x), [one](#there) and [another](https://a.b/c).\n"
        "![picture](page.png)\n* item\n  continued\n* item\n\n```\na\nb\n```\n\n| a |\n|---|\n| b |\n",
    )
    text = Documents().for_terminal(section)
    assert text == (
        "# Title\n\nA long paragraph with a link (`npqwen help speed`), one and [another](https://a.b/c).\n"
        "* item continued\n* item\n\n```\na\nb\n```\n\n| a |\n|---|\n| b |\n"
    )
    shown = rendered(text, 40, styles=False)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 40
    assert "\x1b[1" in rendered(text, 40, styles=True)
