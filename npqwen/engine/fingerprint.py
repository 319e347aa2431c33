"""Which model this is, told by its config and some of its weights: cheap, whatever its size."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from npqwen.engine.weights import Weights
from npqwen.errors import ClosedError
from npqwen.format.config import Config

_STRETCH = 4096
_STRETCHES = 8


def fingerprint(config: Config, weights: Weights) -> str:
    """A hash, in hexadecimal, of all that the keys and values of a text depend on.

    Of every tensor the name, type, shape and 8 stretches of 4 KiB count, so a model that was trained further or
    converted otherwise has another one. It is the same wherever the files are copied.
    """
    if not weights.tensors:
        raise ClosedError("the model is closed; load it again")
    found = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(weights.tensors.items()):
        found.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        last = max(0, tensor.data.size - _STRETCH)
        for i in range(_STRETCHES):
            start = last * i // (_STRETCHES - 1)
            found.update(tensor.data[start : start + _STRETCH].tobytes())
    return found.hexdigest()
