"""Numba's compiled code on disk."""

from __future__ import annotations

from typing import Any

from numba.core import caching


class CodeCache(caching.FunctionCache):
    """One function's. A damaged entry, or no place to write, only means compiling anew."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling a damaged file raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()
        except Exception:  # the index is damaged: begin a new one
            try:
                self.flush()
                super().save_overload(sig, data)
            except OSError:
                self.disable()
