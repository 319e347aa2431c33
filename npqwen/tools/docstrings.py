"""What a docstring says of a function and its parameters, in Google's, NumPy's or Sphinx's style."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Return|Yields|Raises):\s*$")
_INLINE = re.compile(r"(Returns|Yields|Raises):\s+\S")
_UNDERLINE = re.compile(r"-{3,}\s*$")
_GOOGLE = re.compile(r"(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\)|\[[^]]*\])?\s*:(?:\s+(.*)|$)")
_NUMPY = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?$")
_SPHINX = re.compile(r":(param|parameter|arg|argument|returns?|rtype|type|raises?)\b\s*([^:]*):\s*(.*)$")


@dataclass
class Docstring:
    """description: the text before the parameters. parameters: a line each. "" and {} if nothing is said."""

    description: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    returns: str = ""


def read_docstring(text: str) -> Docstring:
    """What a docstring says, as `inspect.getdoc` gives it; what is not said is empty."""
    found = Docstring()
    sections = _sections(text.strip().splitlines())
    found.description = "\n".join(sections.pop("", [])).strip()
    for name, lines in sections.items():
        if name == "returns":
            found.returns = "\n".join(lines).strip()
        elif name == "google":
            found.parameters |= _google(lines)
        elif name == "numpy":
            found.parameters |= _numpy(lines)
        elif name.startswith("param "):
            found.parameters[name.removeprefix("param ")] = _joined(lines)
    return found


def _sections(lines: list[str]) -> dict[str, list[str]]:
    """The lines under "", "google", "numpy", "returns", "other" or "param NAME"."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for i, line in enumerate(lines):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        underlined = line.strip() and not line.startswith(" ") and _UNDERLINE.match(after)
        if underlined:
            title = line.strip().lower()
            name = {"parameters": "numpy", "other parameters": "numpy", "returns": "returns"}.get(title, "other")
        elif _UNDERLINE.match(line) and i and name in ("numpy", "returns", "other"):
            continue
        elif heading := _SECTION.match(line):
            title = heading[1].lower()
            name = (
                "google"
                if title in ("args", "arguments", "parameters")
                else "returns"
                if "return" in title
                else "other"
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
    """Entries `name: text` or `name (type): text`; what is indented more belongs to the one before."""
    entries: dict[str, list[str]] = {}
    indent, current = None, None
    for line in lines:
        found = _GOOGLE.match(line)
        if found is not None and (indent is None or len(found[1]) <= indent):
            indent = len(found[1])
            current = entries.setdefault(found[2], [])
            current.append(found[3] or "")
        elif current is not None:
            current.append(line)
    return {name: _joined(texts) for name, texts in entries.items()}


def _numpy(lines: list[str]) -> dict[str, str]:
    """Entries `name : type`, or several names, with the text indented below."""
    entries: dict[str, str] = {}
    names: list[str] = []
    texts: list[str] = []
    for line in [*lines, "end"]:
        found = None if line.startswith((" ", "\t")) else _NUMPY.match(line)
        if found is not None:
            entries |= dict.fromkeys(names, _joined(texts))
            names, texts = re.split(r"\s*,\s*", found[1]), []
        else:
            texts.append(line)
    return entries


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())
