"""The names by which clients find a model: its own, shorter ones, ollama's, and aliases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from npqwen.errors import ModelNotFoundError, OptionError
from npqwen.wording import quoted

_OLLAMA = re.compile(
    r"qwen3(?P<branch>-coder|-embedding|-reranker)?:(?P<size>[\d.]+b)(?:-a[\d.]+b)?"
    r"(?:-(?P<kind>thinking|instruct))?.*",
    re.ASCII,
)


class ModelNames:
    """Finds models by the names that clients use. Case and the tag ":latest" are ignored.

    "Qwen3-0.6B" and ollama's "qwen3:0.6b" are Qwen/Qwen3-0.6B unless another model has that name, too. An alias may
    contain "*", which matches any characters; such aliases are tried last. A model with an adapter is also found by the
    adapter's own name, unless another model has an adapter of that name.
    """

    def __init__(
        self, names: Sequence[str], aliases: Mapping[str, str], adapters: Mapping[str, str] | None = None
    ) -> None:
        """names: of the models, the first is the default. adapters: names of models with an adapter -> the adapter's
        own name. Raises OptionError for an alias of an unknown model.
        """
        self._adapters = dict(adapters or {})
        self._names = [*names, *self._adapters]
        self._aliases: dict[str, str] = {}
        own = {_plain(name) for name in self._names}
        exact = {_plain(alias): alias for alias in aliases if "*" not in alias and _plain(alias) not in own}
        self.aliases: list[str] = []
        """The aliases that are names, not patterns, as they were given. Case alone makes no further name."""
        for alias, model in aliases.items():
            found = self._among_names(model)
            if found is None:
                raise OptionError(
                    f"alias {quoted(alias)} stands for {quoted(model)}, which is not served; {self._listed()}"
                )
            self._aliases[_plain(alias)] = found
        self.aliases = list(exact.values())

    def find(self, name: str | None) -> str:
        """The model's own name; for None or "", the first model's. Raises ModelNotFoundError."""
        if not name:
            return self._names[0]
        plain = _plain(name)
        found = self._aliases.get(plain) or self._among_names(name) or self._by_pattern(plain)
        if found is None:
            raise ModelNotFoundError(f"model {quoted(name)} is not served; {self._listed()}")
        return found

    def _among_names(self, name: str) -> str | None:
        plain = _plain(name)
        spellings = (
            lambda own: own == name,
            lambda own: _plain(own) == plain,
            lambda own: _plain(own).rpartition("/")[2] == plain,
            lambda own: own not in self._adapters and _ollama_matches(plain, _plain(own)),
            lambda own: _plain(self._adapters.get(own, "")) == plain,
        )
        for matches in spellings:
            found = [own for own in self._names if matches(own)]
            if found:
                return found[0] if len(found) == 1 else None
        return None

    def _by_pattern(self, plain: str) -> str | None:
        patterns = {alias: model for alias, model in self._aliases.items() if "*" in alias}
        return next((model for alias, model in patterns.items() if fnmatchcase(plain, alias)), None)

    def _listed(self) -> str:
        listed = [*self._names, *self.aliases]
        return f"there is only {listed[0]}" if len(listed) == 1 else f"there are {', '.join(listed)}"


def _plain(name: str) -> str:
    return name.strip().lower().removesuffix(":latest")


def _ollama_matches(name: str, own: str) -> bool:
    """Whether ollama's name of a Qwen3 ("qwen3:0.6b") means the model `own` ("qwen/qwen3-0.6b")."""
    found = _OLLAMA.fullmatch(name)
    if found is None:
        return False
    branch, size, kind = found["branch"] or "", found["size"], found["kind"] or ""
    model = own.rpartition("/")[2]
    mode = f"-{kind}" if kind else r"(-[a-z]+)?"
    return re.fullmatch(rf"qwen3{branch}-{re.escape(size)}(-a[\d.]+b)?{mode}(-\d+)?", model) is not None
