"""Progress bars of `npqwen.load`, `npqwen_quant.convert` and the commands; the library prints nothing else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from npqwen.errors import OptionError
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Self

Progress = Callable[[int, int], Any]
"""progress(done, total)"""

_DELAY = 0.3
"""Seconds before a bar appears: shorter tasks need none."""


class Bars:
    """Bars on stderr, one after another, by tqdm; in a Jupyter notebook with ipywidgets, widgets.

    shown: None shows them if stderr is a terminal or a notebook's, True always, False never. tqdm's own environment
    variables apply, too: TQDM_DISABLE=1 switches all bars off. transient: bars appear at once, also for short tasks,
    and disappear at their end. A context manager, which closes an unfinished bar.
    """

    def __init__(self, shown: bool | None = None, *, transient: bool = False) -> None:
        if shown is not None and not isinstance(shown, bool):
            raise OptionError(f"progress is {quoted(shown)}; it must be True, False, None or a function")
        self.shown = _is_interactive() if shown is None else shown
        self._style = {"delay": 0, "leave": False} if transient else {"delay": _DELAY}
        self._bar: Any = None
        self._task = ""
        if self.shown and "ipykernel" in sys.modules:
            _tqdm()  # before huggingface_hub imports it, which would warn of missing ipywidgets

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, task: str, unit: str = "B") -> Progress | None:
        """A function (done, total) that shows the progress of a task; None if bars are not shown."""
        return (lambda done, total: self._show(task, unit, done, total)) if self.shown else None

    def _show(self, task: str, unit: str, done: int, total: int) -> None:
        if self._bar is None or self._task != task:
            self.close()
            self._task = task
            self._bar = _tqdm()(desc=task, total=total, unit=unit, unit_scale=unit == "B", **self._style)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Close the unfinished bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def bars_or(progress: bool | Progress | None) -> tuple[Bars, Progress | None]:
    """What a parameter `progress` means: the bars to show, and the caller's own function, which takes their place."""
    if callable(progress):
        return Bars(False), progress
    return Bars(progress), None


def _is_interactive() -> bool:
    """Whether somebody may be watching stderr: it is a terminal or belongs to a notebook."""
    if sys.stderr is None:
        return False
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


def _tqdm() -> Any:
    """tqdm's class for this environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing ipywidgets: then the bars are text
        from tqdm.auto import tqdm
    return tqdm
