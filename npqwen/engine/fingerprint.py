"""Identifies a model by its config and samples of its weights, at a cost that does not depend on its size."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from npqwen.engine.weights import Weights
from npqwen.errors import ClosedError
from npqwen.format.config import Config

_SAMPLE_BYTES = 4096
_SAMPLES = 8


def fingerprint(config: Config, weights: Weights) -> str:
    """SHA-256, in hexadecimal, of the config and of each tensor's name, dtype, shape and 8 samples of 4 KiB.

    Models that were trained further or converted differently have different fingerprints, so keys and values of one are
    not used with the other; copies of the files have the same. Raises ClosedError after the weights were closed.
    """
    if not weights.tensors:
        raise ClosedError("the model is closed; load it again")
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        last = max(0, tensor.data.size - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            start = last * i // (_SAMPLES - 1)
            digest.update(tensor.data[start : start + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()
