"""The optional dependencies: which are installed, and which of those cannot be used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EXTRAS = {
    "server": (("starlette", "uvicorn"), "npqwen serve and batch"),
    "grammar": (("llguidance",), "--schema, response_format and similar options"),
    "ray": (("ray",), "clusters (npqwen.ray)"),
}
"""Those of pyproject.toml's extras that are for running models: their packages, and what needs them."""
_SLOW = ("ray",)
"""Packages that take seconds to import: they are not imported to see whether they work."""


@dataclass(frozen=True)
class Extra:
    """One of npqwen's extras."""

    name: str
    purpose: str
    packages: dict[str, str | None]
    """Its packages, with their versions; None: not installed."""
    broken: dict[str, str]
    """Those that cannot be imported, with the reason."""

    @property
    def is_installed(self) -> bool:
        """Whether all of its packages are there and can be imported."""
        return not self.broken and None not in self.packages.values()

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self) | {"installed": self.is_installed}

    def describe(self) -> str:
        """The extra and its versions, as text."""
        if self.is_installed:
            return f"{self.name} ({', '.join(f'{name} {number}' for name, number in self.packages.items())})"
        if self.broken:
            return f"{self.name} does not work: see below"
        return f'{self.name} not installed, which {self.purpose} need: pip install "npqwen[{self.name}]"'


def extras() -> list[Extra]:
    """All of `EXTRAS`, with the state of their installation."""
    found = []
    for name, (packages, purpose) in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        found.append(Extra(name, purpose, versions, _broken(versions)))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _broken(packages: dict[str, str | None]) -> dict[str, str]:
    found = {}
    for name, number in packages.items():
        if number is not None and name not in _SLOW:
            try:
                import_module(name)
            except Exception as error:  # whatever a package raises that does not fit this Python or processor
                found[name] = f"{type(error).__name__}: {error}"
    return found
