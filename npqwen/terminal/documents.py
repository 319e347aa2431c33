"""The documents that come with npqwen, by page and section: what `npqwen help` shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from npqwen.checks import near_names
from npqwen.errors import OptionError
from npqwen.wording import alternatives, quoted, unreadable

PAGES = {
    "readme": "README.md",
    "terminal": "docs/terminal.md",
    "python": "docs/python.md",
    "server": "docs/server.md",
    "agents": "docs/agents.md",
    "integrations": "docs/integrations.md",
    "options": "docs/options.md",
    "models": "docs/models.md",
    "sources": "docs/sources.md",
    "speed": "docs/speed.md",
    "precision": "docs/precision.md",
    "raspberry-pi": "docs/raspberry-pi.md",
    "deploy": "examples/deploy/README.md",
    "format": "quant/FORMAT.md",
}
"""The path of each page in the repository; an installed npqwen has it as `documents/NAME.md`."""
_ELSEWHERE = {
    "memory": "models which one fits",
    "install": "readme",
    "installation": "readme",
    "formats": "sources",
    "quantization": "terminal converting",
    "api": "server",
    "docker": "deploy",
    "systemd": "deploy",
    "pi": "raspberry-pi",
    "environment": "terminal environment variables",
    "lora": "sources lora adapters",
}
"""Words that users may try -> a topic."""
_HEADING = re.compile(r"^(#+) (.+)$")
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^()\s]*)\)")
_ITEM = re.compile(r"\s*([-*]|\d+\.) ")
_BLOCK = re.compile(rf"#|\||>|{_ITEM.pattern}")
"""The beginning of a line that does not continue a paragraph."""
_TABLE = re.compile(r"^(\|.*\n\|[-|]+\n)((?:\|.*\n)+)", re.M)
_NAME = re.compile(r"\| `(\w+)`")
_IMAGE = re.compile(r"^!\[.*$\n?", re.M)


@dataclass(frozen=True)
class Section:
    """A part of a page: from its heading to the next one of the same level, or an option's row of a table."""

    page: str
    heading: str
    """Without Markdown's markers; for a whole page, its title."""
    text: str

    @property
    def topic(self) -> str:
        """The argument of `npqwen help` that shows it."""
        return f"{self.page} {self.heading.lower()}"


class Documents:
    """All pages. Raises OptionError for unknown topics and missing files."""

    def __init__(self) -> None:
        package = Path(__file__).parents[1]
        installed = package / "documents"
        self._places = {
            name: installed / f"{name}.md" if installed.is_dir() else package.parent / place
            for name, place in PAGES.items()
        }

    def page(self, name: str) -> Section:
        """A whole page."""
        return self.sections[name][0]

    @cached_property
    def sections(self) -> dict[str, list[Section]]:
        """The sections of each page by the pages' names; the first one is the whole page."""
        found = {}
        for name, path in self._places.items():
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                problem = unreadable(f"{path}, a part of npqwen,", error)
                raise OptionError(f"{problem}; install npqwen again") from None
            found[name] = _sections(name, text)
        return found

    @cached_property
    def _below(self) -> list[Section]:
        """The sections of all pages."""
        return [section for sections in self.sections.values() for section in sections[1:]]

    @cached_property
    def _parts(self) -> list[Section]:
        """What is shown by itself, but not listed: options, and sections of the third level."""
        pages = [sections[0] for sections in self.sections.values()]
        subsections = [part for page in pages for part in _sections(page.page, page.text, level=3)[1:]]
        return [*_options(self.page("options")), *subsections]

    def find(self, topic: str) -> list[Section]:
        """The sections that match a topic, such as "server", "sampling", "server speed": one, or all that match.

        In order of priority: what is `headed` so; all words, or their beginnings, anywhere in a section.
        """
        if found := self.headed(topic):
            return found
        wanted = _wanted(topic)
        if found := [one for one in self._below if _contains(one.text, wanted)]:
            return found
        headings = [_words(one.heading) for one in (*self._below, *self._parts)]
        near = near_names(wanted, [*map(_words, self._places), *headings], _ELSEWHERE)
        hint = f"did you mean {alternatives(near)}? " if near else ""
        raise OptionError(f"unknown help topic {quoted(topic)}; {hint}npqwen help lists all topics")

    def headed(self, topic: str) -> list[Section]:
        """In order of priority: what is `named` so; sections whose headings begin so; those that have it in them."""
        wanted = _wanted(topic)
        headings = [(one, _words(one.heading), _words(one.topic)) for one in (*self._below, *self._parts)]
        begun = [one for one, own, full in headings if own.startswith(wanted) or full.startswith(wanted)]
        return self.named(topic) or begun or [one for one, own, _ in headings if wanted in own]

    def named(self, topic: str) -> list[Section]:
        """The page of this name, or the sections with this heading and the option of this name; there may be none."""
        wanted = _wanted(topic)
        pages = [self.page(name) for name in self._places if _words(name) == wanted]
        below = [*self._parts, *self._below]
        return pages or [one for one in below if wanted in (_words(one.heading), _words(one.topic))]

    def for_terminal(self, section: Section) -> str:
        """The Markdown of a section, with commands in place of links to other pages, and without images."""
        names = {Path(place).name: name for name, place in PAGES.items()}

        def link(found: re.Match[str]) -> str:
            text, target = found[1], found[2].partition("#")[0]
            if "://" in target:
                return found[0]
            name = names.get(Path(target).name) if Path(target).name != "README.md" else None
            return text if name is None else f"{text} (`npqwen help {name}`)"

        return _LINK.sub(link, _unwrapped(_IMAGE.sub("", section.text)))

    def listing(self) -> str:
        """Markdown: all pages with their sections."""
        lines = ["`npqwen help TOPIC` shows a page, or a section by its heading or some words of it.", ""]
        for name, (page, *sections) in self.sections.items():
            headings = [one.heading for one in sections]
            lines.append(f"- **{name}**: {page.heading}" + (f" ({'; '.join(headings)})" if headings else ""))
        return "\n".join([*lines, "", "`npqwen help COMMAND` shows a command's options."]) + "\n"


def _sections(page: str, text: str, level: int = 2) -> list[Section]:
    """The page as a whole, and its sections of a level."""
    starts: list[tuple[int, str]] = []
    title, inside, at = page, False, 0
    for line in text.splitlines(keepends=True):
        inside ^= line.startswith("```")
        heading = None if inside else _HEADING.match(line.rstrip("\n"))
        if heading is not None and len(heading[1]) == 1:
            title = heading[2]
        elif heading is not None and len(heading[1]) <= level:
            starts.append((at, heading[2].replace("`", "") if len(heading[1]) == level else ""))
        at += len(line)
    found = [Section(page, title, text)]
    for i, (start, name) in enumerate(starts):
        end = starts[i + 1][0] if i + 1 < len(starts) else len(text)
        if name:
            found.append(Section(page, name, text[start:end]))
    return found


def _options(page: Section) -> list[Section]:
    """The rows of a page's tables of options, each as a table of its own."""
    found = []
    for header, rows in _TABLE.findall(page.text):
        for row in rows.splitlines(keepends=True):
            if name := _NAME.match(row):
                found.append(Section(page.page, name[1], header + row))
    return found


def _contains(text: str, wanted: str) -> bool:
    """Whether each of some words begins one of the text."""
    there = f" {_words(text)}"
    return bool(wanted) and all(f" {word}" in there for word in wanted.split())


def _unwrapped(text: str) -> str:
    """Markdown with one line per paragraph and list item: the terminal's width differs from the source's."""
    lines: list[str] = []
    inside = joins = False
    for line in text.splitlines():
        fence = line.startswith("```")
        plain = not (inside or fence) and line.strip() != "" and not _BLOCK.match(line)
        if plain and joins:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
        inside ^= fence
        joins = plain or (not (inside or fence) and _ITEM.match(line) is not None)
    return "\n".join(lines) + "\n"


def _wanted(topic: str) -> str:
    """The words that a topic is searched by."""
    words = _words(topic)
    return _ELSEWHERE.get(words, words)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
