"""Removes directories of the cache so that a killed process leaves nothing that could be mistaken for a whole model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from npqwen.atomic_file import REMOVED, hidden_sibling, sync_directory
from npqwen.errors import OutputError


def remove(directory: Path) -> None:
    """Remove a directory: rename it to a hidden sibling, then delete that.

    Processes that have mapped its files keep them until they end; Windows refuses the renaming then. Raises OutputError
    if the directory cannot be removed; one that is gone already is no error.
    """
    aside = hidden_sibling(directory, REMOVED)
    try:
        directory.rename(aside)
        sync_directory(directory.parent)
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise OutputError(
            f"{directory} cannot be removed ({error.strerror}); end the programs that run this model, and check who "
            "owns it"
        ) from None
    except OSError as error:
        raise OutputError(f"{directory} cannot be removed: {error.strerror or error}") from None
    remove_tree(aside)


def remove_tree(path: Path) -> None:
    """Delete a directory that nothing loads, or a file, and its parent folder if that is then empty.

    Raises OutputError.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # another process removes it, too
        pass
    except OSError as error:
        raise OutputError(f"{path} cannot be removed: {error.strerror or error}") from None
    with contextlib.suppress(OSError):  # not empty
        path.parent.rmdir()
