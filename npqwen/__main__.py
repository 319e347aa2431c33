"""The command `npqwen`, and `python -m npqwen`."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing `typing` here could be interrupted with a traceback
if TYPE_CHECKING:
    from typing import TextIO


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, even while Python is still importing modules."""
    try:
        import warnings

        from npqwen.commands.cli import main as run

        default = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            """Print the library's own warnings like notices: one line, without a place in the code."""
            if category.__module__ == "npqwen.errors":
                print(message, file=sys.stderr)
            else:
                default(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
