"""Whether one text's next tokens are drafted, and how many: decided by acceptance rates and the cost of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npqwen.generation.acceptance import Acceptance
from npqwen.generation.layer_drafter import LayerDrafter
from npqwen.generation.model_drafter import ModelDrafter
from npqwen.generation.text_drafter import TextDrafter

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.draft_statistics import DraftStatistics
    from npqwen.generation.drafting import Drafting

PASS = 15
"""The most tokens of a pass with drafts: up to 15 tokens, logits are bitwise equal to those of passes of one token."""
MARGIN = 1.05
"""Drafting must promise more than this many times the tokens per second of passes without drafts."""
_BELIEFS = {2: 0.5, 3: 0.65, 4: 0.8, 5: 0.9, 6: 0.95}
"""The prior acceptance rate of drafts from the text itself, by their certainty."""


class Speculation:
    """Proposes draft tokens for a text's next pass, after those that are certain, and learns which were accepted.

    Drafts from the text itself cost nothing. A draft model, or else the model's own draft layer, drafts where that
    promises more tokens per second, while the text is alone in its pass: drafting takes one step per token, for which
    other texts would wait.

    Drafts do not change the text: a draft token is accepted only if it equals the one that is drawn.
    """

    def __init__(self, drafting: Drafting, prompt: Sequence[int], *, always: bool = False, salt: str = "") -> None:
        """drafting: what all texts of the model share. always: draft wherever possible; otherwise only where the cost
        of passes makes it worthwhile. salt: see the option `cache_salt`."""
        self._drafting = drafting
        self._salt = salt
        self._text = TextDrafter(list(prompt) if salt else drafting.with_answers(prompt))
        self._model: ModelDrafter | LayerDrafter | None = None
        if drafting.model is not None:
            self._model = ModelDrafter(drafting.model, prompt, salt)
        elif drafting.layer is not None:
            self._model = LayerDrafter(drafting.layer, prompt)
        self._always = always
        self._read = 0
        self._of_text: dict[int, Acceptance] = {}
        """Of drafts from the text itself, by their certainty."""
        self._proposed: list[Acceptance] = []
        """For each token of the last proposal, the statistics that its outcome is counted in."""
        self._statistics: DraftStatistics | None = None
        """The statistics of the model or layer that made the last proposal; None if none did."""

    def follow(self, cache: KVCache) -> None:
        """Collect what drafting needs from the text's passes, which use this cache from now on."""
        if isinstance(self._model, LayerDrafter):
            self._model.follow(cache)

    def propose(self, ids: Sequence[int], most: int, certain: int, *, alone: bool = True) -> list[int]:
        """Draft tokens for the next pass, at most `most`, perhaps none.

        ids: the text's. certain: how many tokens the pass runs anyway. alone: whether all of those are this text's.
        """
        self._extend(ids)
        self._proposed, self._statistics = [], None
        most = min(most, PASS - certain)
        if self._model is not None and not alone:
            self._model.close()
        if most < 1:
            return []
        draft = self._text.propose(most)
        length, speed = 0, MARGIN
        if draft is not None:
            acceptance = self._of_text.setdefault(draft.certainty, Acceptance(_BELIEFS[draft.certainty]))
            length, speed = self._best_length(acceptance.rate, len(draft.ids), certain, 0.0)
        if self._model is not None and alone and (drafted := self._draft(self._model, most, certain, speed)):
            return drafted
        if draft is None:
            return []
        if not length:
            acceptance.fade()
        self._proposed = [acceptance] * length
        return draft.ids[:length]

    @property
    def cache(self) -> KVCache | None:
        """The cache of the draft model or layer; None if it has none."""
        return None if self._model is None else self._model.cache

    def stop_model(self) -> None:
        """Stop using the draft model or layer, and free its cache; drafts from the text itself continue."""
        if self._model is not None:
            self._model.close()
        if isinstance(self._model, LayerDrafter):
            self._model.leave()
        self._model = None

    def learn(self, accepted: int, rejected: bool) -> None:
        """Learn the outcome of the last proposal: how many tokens were accepted, and whether the next was rejected."""
        decided = self._proposed[: accepted + rejected]
        for kind in dict.fromkeys(decided):
            kind.add(decided[:accepted].count(kind), decided.count(kind))
        if decided and self._statistics is not None:
            self._statistics.add(accepted, len(decided))

    def close(self, ids: Sequence[int]) -> None:
        """End with the text, whose ids these are; keep its tokens, and a draft model's keys and values, for others."""
        self._extend(ids)
        self.stop_model()
        if not self._salt:
            self._drafting.remember(ids)

    def _extend(self, ids: Sequence[int]) -> None:
        new = ids[self._read :]
        self._read = len(ids)
        self._text.extend(new)
        if self._model is not None:
            self._model.extend(new)

    def _draft(self, model: ModelDrafter | LayerDrafter, most: int, certain: int, speed: float) -> list[int]:
        """The draft of a model or layer; empty if it does not promise more than `speed`, see `_speed`."""
        statistics, cost = model.statistics, model.statistics.cost(self._drafting.passes)
        overall = statistics.overall
        length, promised = self._best_length(overall.rate, most, certain, cost)
        if not length or (promised <= speed and not self._always):
            statistics.pass_over(length > 0)
            return []
        if not model.catch_up():
            return []
        ids: list[int] = []
        kinds: list[Acceptance] = []
        tokens, chance = [1.0], 1.0
        while len(ids) < most and (token := model.next(ids)) is not None:
            ids.append(token.id)
            kinds.append(token.acceptance)
            chance *= token.acceptance.rate
            tokens.append(tokens[-1] + chance)
            count = len(ids)
            another = self._speed(tokens[-1] + chance * overall.rate, certain, count + 1, cost * (count + 1))
            if another <= self._speed(tokens[-1], certain, count, cost * count):
                break
        # The cost of all draft tokens is spent; those that are too uncertain are still not worth running.
        spent = cost * len(ids)
        speeds = [self._speed(tokens[length], certain, length, spent) for length in range(len(tokens))]
        best = max(range(self._always and len(ids) > 0, len(speeds)), key=speeds.__getitem__)
        for kind in set(kinds[best:]):
            kind.fade()
        self._proposed, self._statistics = kinds[:best], statistics
        return ids[:best]

    def _best_length(self, rate: float, most: int, certain: int, cost: float) -> tuple[int, float]:
        """How many draft tokens promise the highest speed if each is accepted at this rate, and that speed; 0: none.

        cost: seconds that each draft token takes.
        """
        best, highest = (1, 0.0) if self._always else (0, MARGIN)
        tokens, chance = 1.0, 1.0
        for length in range(1, most + 1):
            chance *= rate
            tokens += chance
            speed = self._speed(tokens, certain, length, cost * length)
            if speed > highest:
                best, highest = length, speed
        return best, highest

    def _speed(self, tokens: float, certain: int, drafted: int, spent: float) -> float:
        """Tokens per second, relative to passes without drafts.

        tokens: the mean number of tokens from a pass with `drafted` draft tokens. spent: seconds of drafting.
        """
        passes = self._drafting.passes
        if passes is None or certain + drafted > PASS:
            return tokens if passes is None else 0.0
        return tokens * passes.seconds[certain] / (passes.seconds[certain + drafted] + spent)


def speculation_for(wanted: bool | None, drafting: Drafting, prompt: Sequence[int], salt: str) -> Speculation | None:
    """The speculation of a text; None if there is none. wanted, salt: the options `speculation` and `cache_salt`."""
    if wanted is False or (wanted is None and drafting.passes is None):
        return None
    return Speculation(drafting, prompt, always=wanted is True, salt=salt)
