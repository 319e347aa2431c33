"""Descriptions of a function and its parameters from a docstring in Google, NumPy or Sphinx style.

The package docstring_parser drops sections such as "Example:", which Hugging Face transformers leaves in the
description, and misses parameters that the docstring begins with or does not indent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Return|Yields|Raises):\s*$")
_INLINE = re.compile(r"(Returns|Yields|Raises):\s+\S")
_UNDERLINE = re.compile(r"-{3,}\s*$")
_GOOGLE = re.compile(r"(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\)|\[[^]]*\])?\s*:(?:\s+(.*)|$)")
_NUMPY = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?$")
_SPHINX = re.compile(r":(param|parameter|arg|argument|returns?|rtype|type|raises?)\b\s*([^:]*):\s*(.*)$")
_NUMPY_SECTIONS = {"parameters": "numpy", "arguments": "numpy", "other parameters": "numpy", "returns": "returns"}


@dataclass
class Docstring:
    """description: the text before the parameters. parameters: one line each. returns: the result's description."""

    description: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    returns: str = ""


def read_docstring(text: str) -> Docstring:
    """Parse a docstring as `inspect.getdoc` returns it; parts that are missing stay empty."""
    docstring = Docstring()
    sections = _sections(text.strip().splitlines())
    docstring.description = "\n".join(sections.pop("", [])).strip()
    for name, lines in sections.items():
        if name == "returns":
            docstring.returns = "\n".join(lines).strip()
        elif name == "google":
            docstring.parameters |= _google(lines)
        elif name == "numpy":
            docstring.parameters |= _numpy(lines)
        elif name.startswith("param "):
            docstring.parameters[name.removeprefix("param ")] = _joined(lines)
    return docstring


def _sections(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each section: "" (the description), "google", "numpy", "returns", "other" or "param NAME"."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for i, line in enumerate(lines):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        underlined = line.strip() and not line.startswith(" ") and _UNDERLINE.match(after)
        if underlined:
            name = _NUMPY_SECTIONS.get(line.strip().lower(), "other")
        elif _UNDERLINE.match(line) and i and name in ("numpy", "returns", "other"):
            continue
        elif heading := _SECTION.match(line):
            name = {"Args": "google", "Arguments": "google", "Parameters": "google"}.get(heading[1]) or (
                "returns" if heading[1].startswith("Return") else "other"
            )
        elif _INLINE.match(line):
            name = "other"
        elif tag := _SPHINX.match(line):
            kind, words = tag[1], tag[2].split()
            name = "returns" if kind in ("return", "returns") else "other"
            if kind in ("param", "parameter", "arg", "argument") and words:
                name = f"param {words[-1].lstrip('*')}"
            sections.setdefault(name, []).append(tag[3])
            continue
        else:
            sections.setdefault(name, []).append(line)
            continue
        sections.setdefault(name, [])
    return sections


def _google(lines: list[str]) -> dict[str, str]:
    """Entries `name: text` or `name (type): text`; lines with deeper indentation continue an entry."""
    entries: dict[str, list[str]] = {}
    indent, current = None, None
    for line in lines:
        entry = _GOOGLE.match(line)
        if entry is not None and (indent is None or len(entry[1]) <= indent):
            indent = len(entry[1])
            current = entries.setdefault(entry[2], [])
            current.append(entry[3] or "")
        elif current is not None:
            current.append(line)
    return {name: _joined(texts) for name, texts in entries.items()}


def _numpy(lines: list[str]) -> dict[str, str]:
    """Entries `name : type`, or several names separated by commas, with the text indented below."""
    entries: dict[str, str] = {}
    names: list[str] = []
    texts: list[str] = []
    for line in [*lines, "end"]:
        entry = None if line.startswith((" ", "\t")) else _NUMPY.match(line)
        if entry is not None:
            entries |= dict.fromkeys(names, _joined(texts))
            names, texts = re.split(r"\s*,\s*", entry[1]), []
        else:
            texts.append(line)
    return entries


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())
