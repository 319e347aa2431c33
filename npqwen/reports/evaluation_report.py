"""The result of an evaluation: numbers, JSON, Markdown, and the record that a converted model keeps of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import OptionError
from npqwen.format.quantization import EvaluationRecord
from npqwen.wording import shortened

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float
    """The standard error, with the values taken as independent; 0 for a single value."""


@dataclass(frozen=True)
class Values:
    """One number for each counted token. The last three are None without a base."""

    nll: Floats
    """-log p of the token, in nats."""
    base_nll: Floats | None = None
    kl: Floats | None = None
    """KL(base || model) of the distributions that predict the token, in nats."""
    same_top: NDArray[np.bool_] | None = None
    """Whether both have the same most likely token."""

    @classmethod
    def concatenate(cls, parts: Sequence[Values]) -> Values:
        """The values of all parts, at least one, in order."""
        columns = zip(*((part.nll, part.base_nll, part.kl, part.same_top) for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Divergence:
    """A model's distributions compared with those of the base."""

    base_nll: Estimate
    nll_increase: Estimate
    """The model's -log p of a token minus the base's."""
    kl: Estimate
    kl_99: float
    """99th percentile."""
    kl_max: float
    top_1: Estimate
    """Share of tokens at which both have the same most likely token."""


@dataclass(frozen=True)
class Score:
    """A model's predictions of one text, or of all."""

    tokens: int
    """Counted tokens."""
    nll: Estimate
    """-log p of a token, in nats."""
    divergence: Divergence | None

    @classmethod
    def of(cls, values: Values) -> Score:
        """The score of some tokens."""
        divergence = None
        if values.base_nll is not None and values.kl is not None and values.same_top is not None:
            divergence = Divergence(
                base_nll=estimate(values.base_nll),
                nll_increase=estimate(values.nll - values.base_nll),
                kl=estimate(values.kl),
                kl_99=float(np.quantile(values.kl, 0.99)),
                kl_max=float(values.kl.max()),
                top_1=estimate(values.same_top.astype(np.float64)),
            )
        return cls(values.nll.size, estimate(values.nll), divergence)

    @property
    def perplexity(self) -> Estimate:
        """exp(nll); the error is propagated to first order."""
        return perplexity(self.nll)

    def as_dict(self) -> dict[str, Any]:
        """All fields, and perplexities, for JSON."""
        found = asdict(self) | {"perplexity": asdict(self.perplexity)}
        if self.divergence is not None:
            found["divergence"]["base_perplexity"] = asdict(perplexity(self.divergence.base_nll))
        return found


@dataclass(frozen=True)
class Greedy:
    """A model's greedy choices after prefixes that the base continued greedily."""

    prompts: int
    tokens: int
    """Tokens of each continuation."""
    agreement: Estimate
    """Share of positions with the same choice; its error is that over prompts."""
    equal: int
    """Continuations that are equal throughout."""


@dataclass(frozen=True)
class PartCost:
    """The cost of a part: the KL divergence from the base of the base with only this part replaced by the model's."""

    part: str
    kl: Estimate


@dataclass(frozen=True)
class LayerCosts:
    """The cost, in KL divergence, of each part of a model."""

    tokens: int
    """Counted tokens."""
    parts: list[PartCost]
    whole: Estimate
    """KL divergence of the whole model on the same tokens."""


@dataclass(frozen=True)
class Evaluation:
    """A model's predictions of texts. Logarithms are natural."""

    model: str
    encoding: str
    """The model's recipe, such as "int4"."""
    against: str | None
    """The base."""
    against_encoding: str | None
    window: int
    stride: int
    total: Score
    texts: dict[str, Score]
    greedy: Greedy | None
    layers: LayerCosts | None
    values: Values = field(repr=False)
    """Of all texts' counted tokens, in order."""

    def as_dict(self) -> dict[str, Any]:
        """All fields but `values`, for JSON."""
        names = ("model", "encoding", "against", "against_encoding", "window", "stride")
        return {name: getattr(self, name) for name in names} | {
            "total": self.total.as_dict(),
            "texts": {name: score.as_dict() for name, score in self.texts.items()},
            "greedy": None if self.greedy is None else asdict(self.greedy),
            "layers": None if self.layers is None else asdict(self.layers),
        }

    def as_markdown(self) -> str:
        """Tables in Markdown."""
        lines = [
            f"{self.model}{_in_brackets(self.encoding)}: windows of {self.window} tokens, stride {self.stride}",
            "",
            *_texts(self.texts, self.total),
        ]
        if self.total.divergence is not None:
            lines += ["", f"against {self.against}{_in_brackets(self.against_encoding)}:", ""]
            lines += _divergence(self.total.divergence, self.greedy)
        if self.layers is not None:
            lines += ["", *_layers(self.layers)]
        return "\n".join(lines)

    def as_record(self) -> EvaluationRecord:
        """The record for the converted model's config.json. Raises OptionError without a base."""
        divergence = self.total.divergence
        if divergence is None:
            raise OptionError("only a comparison with another model can be stored; give that with --against")
        return EvaluationRecord(
            text=shortened(", ".join(os.path.basename(name) for name in self.texts)),
            tokens=self.total.tokens,
            window=self.window,
            stride=self.stride,
            against=self.against_encoding or "",
            perplexity=self.total.perplexity.mean,
            kl_divergence=divergence.kl.mean,
            kl_error=divergence.kl.error,
            top_1=divergence.top_1.mean,
        )


def estimate(values: Floats) -> Estimate:
    """The mean and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return Estimate(float(values.mean()), error)


def perplexity(nll: Estimate) -> Estimate:
    """exp(nll) with its error, to first order."""
    mean = math.exp(min(nll.mean, 700.0))
    return Estimate(mean, mean * nll.error)


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""


def _texts(texts: dict[str, Score], total: Score) -> list[str]:
    """Lines of a table of the texts' scores, with a last line for all of them if there are several."""
    compared = total.divergence is not None
    lines = [
        "| text | tokens | nats per token | perplexity |" + (" KL divergence | same top-1 |" if compared else ""),
        "|---|---:|---:|---:|" + ("---:|---:|" if compared else ""),
    ]
    rows = [(name.replace("|", "/"), score) for name, score in texts.items()]
    if len(rows) > 1:
        rows.append(("all", total))
    for name, score in rows:
        row = f"| {name} | {score.tokens} | {_number(score.nll, 4)} | {_number(score.perplexity, 3)} |"
        if score.divergence is not None:
            row += f" {_number(score.divergence.kl, 7)} | {score.divergence.top_1.mean:.2%} |"
        lines.append(row)
    return lines


def _divergence(d: Divergence, greedy: Greedy | None) -> list[str]:
    rows = [
        ("perplexity of the base", _number(perplexity(d.base_nll), 3)),
        ("nats per token more than the base", _number(d.nll_increase, 5)),
        ("KL divergence, mean", _number(d.kl, 7)),
        ("99th percentile", f"{d.kl_99:.4f}"),
        ("maximum", f"{d.kl_max:.4f}"),
        ("same most likely token (top-1)", _share(d.top_1)),
    ]
    if greedy is not None:
        rows += [
            (f"same choice in the next {greedy.tokens} greedy tokens", _share(greedy.agreement)),
            ("continuations equal throughout", f"{greedy.equal} of {greedy.prompts}"),
        ]
    return ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]


def _layers(costs: LayerCosts) -> list[str]:
    rows = [*costs.parts, PartCost("the whole model", costs.whole)]
    whole = costs.whole.mean or 1.0
    return [
        f"Only this part of the base replaced by the model's, on {costs.tokens} tokens:",
        "",
        "| part | KL divergence | of the whole model's |",
        "|---|---:|---:|",
        *(f"| {row.part} | {_number(row.kl, 7)} | {row.kl.mean / whole:.1%} |" for row in rows),
    ]


def _number(value: Estimate, digits: int) -> str:
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"


def _share(value: Estimate) -> str:
    return f"{value.mean:.2%} ± {value.error:.2%}"
