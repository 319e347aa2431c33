"""The cache of compiled kernels with flipped bits, truncated and exchanged files.

The process that runs these cases must not have loaded any kernel. What is damaged is compiled again, which takes
seconds: these cases may take longer than others.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

from hostile.case import Case, Place, damage, write

SECONDS = 120.0


def kernel_caches(random: Random, place: Place) -> Case:
    """One or two files of the cache that a run of a small model reads."""
    from npqwen.kernels.compiled import kernel_directory

    kernel_directory.cache_clear()
    source = kernel_directory()
    directory = place.directory / "cache" / "kernels" / source.name
    shutil.copytree(source, directory)
    directory.parent.chmod(0o700)
    files = sorted(path for path in directory.iterdir() if path.suffix in (".nbi", ".nbc"))
    labels = [_change(random.choice(files), files, random) for _ in range(random.choice([1, 1, 2]))]
    kernel_directory.cache_clear()
    model = place.copy("dense-4")
    args = ["generate", str(model), "once upon a time", "-n", "2", "-t", "1", "--temperature", "0"]
    return Case(", ".join(labels), args, environment=place.cache(), seconds=SECONDS)


def _change(path: Path, files: list[Path], random: Random) -> str:
    how = random.choice(["damage", "damage", "damage", "exchanged", "link", "pipe"])
    if not path.exists():
        return "gone already"
    raw = path.read_bytes()
    if how == "damage":
        kind, content = damage(raw, random)
        write(path, content)
        return f"{path.name}: {kind}"
    if how == "exchanged":
        other = random.choice(files)
        if other.exists():
            write(path, other.read_bytes())
        return f"{path.name}: the content of {other.name}"
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
        return f"{path.name}: a named pipe"
    target = random.choice(["/dev/zero", "missing", "/etc/passwd", "."])
    path.symlink_to(target)
    return f"{path.name}: a link to {target}"
