"""Verifying a converted model: every byte of its weights against the digests that its conversion stored."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from npqwen.engine.weights import Weights, weight_files
from npqwen.errors import CheckpointError, FormatError
from npqwen.format.checksums import NAME as CHECKSUMS
from npqwen.format.checksums import Checksums, Digest, bytes_digest, config_digest, pieces
from npqwen.format.config import Config, read_json
from npqwen.format.files import open_regular, read_small
from npqwen.format.quantization import Quantization
from npqwen.format.safetensors import HeaderError, StoredTensor, read_header
from npqwen.hub.names import check_given
from npqwen.wording import counted, shortened, size

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Damage:
    """Something in a model's directory that differs from what the conversion wrote."""

    file: str
    """Its name in the directory."""
    tensor: str | None
    """The damaged tensor; None if it is the file as a whole."""
    problem: str
    """A clause."""

    def __str__(self) -> str:
        file = shortened(self.file)
        name = f"{file}: {shortened(self.tensor)}" if self.tensor else file
        return f"{name} {self.problem}"


@dataclass(frozen=True)
class Verification:
    """What was found in a converted model."""

    path: Path
    tensors: int
    """The number of tensors in the files."""
    bytes: int
    """Of all tensors."""
    has_checksums: bool
    """False for a model that was converted without them: then its bytes are compared with nothing."""
    damage: tuple[Damage, ...]
    """In the order of files and tensors; empty if all is right."""

    @property
    def is_right(self) -> bool:
        """Whether no damage was found."""
        return not self.damage

    def describe(self) -> str:
        """A line about the model, and one for each damage."""
        amount = f"{self.tensors} tensors, {size(self.bytes)}"
        if self.damage:
            lines = [f"{self.path}: damaged in {counted(len(self.damage), 'place')}"]
            return "\n".join([*lines, *(f"  {damage}" for damage in self.damage)])
        if not self.has_checksums:
            return f"{self.path}: readable and complete, {amount}; it has no checksums, as it was converted without"
        return f"{self.path}: all right, {amount}"


def verify(model: str | os.PathLike[str], progress: Progress | None = None) -> Verification:
    """Read all of a converted model, and compare it with the digests that its conversion stored.

    model: the directory. Loading a model does not do this, as it would read all of the weights. progress(done, total):
    called with bytes. Every tensor is checked, and config.json (except for a stored evaluation), the tokenizer, chat
    templates and other small files that programs read; an edited file counts as damaged, too. Raises FormatError for a
    directory that is not a converted model of this format version, ModelNotFoundError for an empty path.
    """
    check_given(model)
    return _verify(Path(os.path.expanduser(model)), progress, read_weights=True)


def verify_structure(directory: Path) -> Verification:
    """`verify` without reading the weights: it finds missing, truncated and edited files, and parts that do not fit
    together. Raises FormatError, as `verify` does."""
    return _verify(directory, None, read_weights=False)


def _verify(directory: Path, progress: Progress | None, *, read_weights: bool) -> Verification:
    Quantization.from_directory(directory)
    damage: list[Damage] = []
    try:
        checksums = Checksums.of(directory)
    except CheckpointError:
        checksums = None
        damage.append(Damage(CHECKSUMS, None, "is damaged"))
    stored = _stored(directory, damage)
    total, done = sum(tensor.nbytes for _, tensor in stored.values()), 0
    if progress:
        progress(0, total)
    for name, (path, tensor) in stored.items() if read_weights else ():
        digest = Digest()
        try:
            for piece in pieces(path, tensor.offset, tensor.nbytes):
                digest.update(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
        except EOFError:
            damage.append(Damage(path.name, name, "is cut off"))
        except OSError as error:
            damage.append(Damage(path.name, name, f"cannot be read: {error.strerror or error}"))
        else:
            if checksums is not None and checksums.tensors.get(name, "") != digest.text():
                problem = "is damaged" if name in checksums.tensors else "does not belong to the model"
                damage.append(Damage(path.name, name, problem))
    if checksums is not None:
        if not any(one.tensor is None for one in damage):  # whose tensors would be missing, too
            damage += [Damage("weights", name, "is missing") for name in checksums.tensors if name not in stored]
        damage += _small_files(directory, checksums)
    if not damage:
        try:
            weights = Weights(directory, Config.from_directory(directory))
            weights.check_values()
            weights.close()
        except (FormatError, CheckpointError) as error:
            damage.append(Damage("config.json", None, f"and the weights do not fit together: {error}"))
    return Verification(directory, len(stored), total, checksums is not None, tuple(damage))


def _stored(directory: Path, damage: list[Damage]) -> dict[str, tuple[Path, StoredTensor]]:
    """The locations of all tensors, by name. Files that cannot be read are added to `damage`."""
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for path in weight_files(directory):
        try:
            with open_regular(path) as file:
                tensors = read_header(file).tensors
        except FileNotFoundError:
            damage.append(Damage(path.name, None, "is missing"))
        except OSError as error:
            damage.append(Damage(path.name, None, f"cannot be read: {error.strerror or error}"))
        except HeaderError as error:
            damage.append(Damage(path.name, None, f"is damaged: {error}"))
        else:
            found |= {name: (path, tensor) for name, tensor in tensors.items()}
    return found


def _small_files(directory: Path, checksums: Checksums) -> list[Damage]:
    found = []
    for name, digest in checksums.files.items():
        try:
            if name == "config.json":
                actual = config_digest(read_json(directory / name))
            else:
                actual = bytes_digest(read_small(directory / name))
        except FileNotFoundError:
            found.append(Damage(name, None, "is missing"))
        except OSError as error:
            found.append(Damage(name, None, f"cannot be read: {error.strerror or error}"))
        else:
            if actual != digest:
                found.append(Damage(name, None, "is damaged, or was edited"))
    return found
