"""A checkpoint on disk, Hugging Face's or a GGUF file: its configuration, and its tensors, located and read by rows."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError, ModelNotFoundError
from npqwen.format.bare_names import is_bare, prefixed
from npqwen.format.config import Config, read_json
from npqwen.format.files import read_small
from npqwen.format.quantization import is_converted
from npqwen.format.safetensors import INDEX, read_index
from npqwen.format.small_files import DOCUMENTS, SMALL_FILES
from npqwen.format.text_part import text_name, text_part
from npqwen.wording import shortened, unreadable
from npqwen_quant.adapter import EMBEDDING, OUTPUT, Adapter, AdapterFile
from npqwen_quant.experts import unfused, unstacked
from npqwen_quant.gguf import GgufModel, gguf_files
from npqwen_quant.gguf_hybrid import undone
from npqwen_quant.hybrid import in_layout, is_named_by_mlx, is_of_mlx
from npqwen_quant.mlx import Mlx
from npqwen_quant.quantized import CONFIG_FILES, KEYS, QuantizedFormat, format_of
from npqwen_quant.small_file import SmallFile
from npqwen_quant.tensors import PlainTensor, SourceTensor, read_tensors

_UNREAD = (*DOCUMENTS, "vocab.json", "merges.txt", "added_tokens.json", "chat_template.json")
"""Small files that npqwen copies without reading them."""
_DRAFT = "mtp."
"""The prefix of a hybrid's draft layer's names, also in a base model."""
_PACKED = (".scales", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax", ".SCB")
"""Name suffixes of the parts of quantized weights: of MLX, GPTQ and AWQ, FP8, compressed-tensors, bitsandbytes."""


class Checkpoint:
    """A checkpoint directory with `model.safetensors`, or with shards and an index; or a GGUF file, one of several
    shards of a model, or a directory of these.

    Tensors have the names of Qwen3ForCausalLM, those of hybrids the names of npqwen's layout; files of the bare base
    model, whose names lack the leading `model.`, are read too.
    """

    def __init__(self, directory: Path, *, weights: bool = True, adapters: Sequence[AdapterFile] = ()) -> None:
        """Read the configuration and every file's header. Raises CheckpointError, naming what is wrong.

        weights: False for a directory that holds none; then `tensors` is empty. adapters: LoRA adapters, which are
        merged into the tensors, one after the other.
        """
        self.directory = directory
        self._states: dict[Path, tuple[int, int]] = {}
        self._gguf: GgufModel | None = None
        self._whole = weights
        self.tensors: dict[str, SourceTensor] = {}
        self.has_images = False
        """Whether it is multimodal; then only its text part is read."""
        self.leaves_draft = False
        """Whether it is a GGUF file of a hybrid with draft layers (multi-token prediction, MTP) that are not read."""
        self._named_by_mlx = False
        self.format: QuantizedFormat | None = None
        """How the weights are quantized; None if they are not, or in GGUF's own formats."""
        if weights and (files := gguf_files(directory)):
            self._read_gguf(files)
            of_mlx = False
        else:
            self._read_directory(weights)
            of_mlx = self._is_of_mlx(self.tensors)
        for file in adapters:
            if self.config.recurrence is not None and (of_mlx or self._gguf is not None):
                raise CheckpointError(
                    f"adapters cannot be merged into {directory}, whose tensors are not stored as transformers stores "
                    "them; merge them into the original checkpoint"
                )
            self._adapt(Adapter(file))
        if self._gguf is None:
            self.tensors = in_layout(self.tensors, self.config, zero_centred=not of_mlx)

    def _read_gguf(self, files: Sequence[Path]) -> None:
        self._watch(files)
        self._gguf = GgufModel(files)
        self.leaves_draft = self._gguf.leaves_draft
        self.raw_config = self._gguf.raw_config
        self.config = Config.from_dict(self.raw_config, str(files[0]))
        self.learn_from_names(self._gguf.tensors)
        self.tensors = undone(self._gguf.tensors, self.config, self._gguf.metadata.architecture)

    def _read_directory(self, weights: bool) -> None:
        directory = self.directory
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is not a directory; SOURCE must be a checkpoint directory or GGUF")
        self._watch([directory / "config.json"])
        whole = read_json(directory / "config.json")
        if any(whole.get(key) for key in KEYS) and is_converted(directory):
            raise CheckpointError(f"{directory} is an npqwen model already; convert the checkpoint it came from")
        text = text_part(whole)
        raw = whole if text is None else text
        self.has_images = text is not None
        self.format = format_of(raw, str(directory), self._config_files())
        self.raw_config = {key: value for key, value in raw.items() if key not in KEYS}
        """config.json without its entries on quantization; of a multimodal checkpoint, that of its text part."""
        self.config = Config.from_dict(raw, str(directory / "config.json"))
        if weights:
            stored = self._read_tensors()
            self.learn_from_names(stored)
            self.tensors = self._named(stored)
        refuse_packed(self.tensors, directory)

    def learn_from_names(self, names: Collection[str]) -> None:
        """Set in the configuration whether a hybrid with tensors of these names has a draft layer.

        Qwen3-Next's config.json does not mention it, and those of fine-tuned models mention one that they lost. The
        names also tell whether MLX stored the tensors, until shapes do.
        """
        self._named_by_mlx = is_named_by_mlx(names)
        count = int(self.config.recurrence is not None and any(map(_of_draft, names)))
        if count != self.config.mtp_num_hidden_layers:
            self.config = replace(self.config, mtp_num_hidden_layers=count)
            self.raw_config |= {"mtp_num_hidden_layers": count}

    def _adapt(self, adapter: Adapter) -> None:
        """Merge an adapter into the tensors."""
        self._watch(adapter.paths)
        if adapter.unties and self.config.tie_word_embeddings:
            self.config = replace(self.config, tie_word_embeddings=False)
            self.raw_config |= {"tie_word_embeddings": False}
            if EMBEDDING in self.tensors:
                self.tensors[OUTPUT] = self.tensors[EMBEDDING]
        self.tensors = adapter.apply(self.tensors, self.config)

    def sources(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """Tensors of the checkpoint, as in `tensors`, from all stored tensors that they are made from."""
        named = self._named(stored)
        return in_layout(named, self.config, zero_centred=not self._is_of_mlx(named))

    def _named(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """Stored tensors, dequantized, by the names of Qwen3ForCausalLM or its variants."""
        found = {own: tensor for name, tensor in stored.items() if (own := self.own_name(name)) is not None}
        found = unstacked(found, self.config)
        tensors = self.format.dequantized(found) if self.format else found
        return unfused(with_prefix(tensors), self.config)

    def _is_of_mlx(self, tensors: Mapping[str, SourceTensor]) -> bool:
        """Whether MLX stored a hybrid: by the shapes, or by names and format if the shapes do not tell.

        CheckpointError if the two differ and only some of the checkpoint's tensors are here.
        """
        found, expected = is_of_mlx(tensors), isinstance(self.format, Mlx) or self._named_by_mlx
        if found is None or found == expected:
            return expected
        if not self._whole:
            raise CheckpointError(
                f"{self.directory} stores its tensors as MLX does, and such checkpoints can only be converted whole; "
                "use it without low_disk (--low-disk)"
            )
        return found

    def own_name(self, name: str) -> str | None:
        """The name that a stored tensor would have in a checkpoint of the text model alone; None if it is not part of
        the text model, but of the image model."""
        if self.config.recurrence is not None and (of_draft := _of_draft(name)):
            return of_draft
        # transformers also saves a hybrid's text part alone under the names of the whole.
        own = text_name(name)
        return own if self.has_images else own or name

    def tensor(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """The tensor of this name; CheckpointError if it is missing, of another shape or of another dtype."""
        tensor = self.tensors.get(name)
        if tensor is None:
            if name == "lm_head.weight":
                raise CheckpointError(
                    f"{self.directory} has no lm_head.weight, but its config.json says that the embedding is "
                    "not used for it (tie_word_embeddings is false); is the download complete?"
                )
            raise CheckpointError(f"{self.directory} has no tensor {name}; is the download complete?")
        return checked(name, tensor, shape)

    def small_files(self) -> list[SmallFile]:
        """The tokenizer, chat templates and all other files of a model besides its weights and config.json."""
        if self._gguf is not None:
            return self._gguf.small_files
        found = (sorted(self.directory.glob(pattern)) for pattern in (*SMALL_FILES, *DOCUMENTS))
        paths = (path for paths in found for path in paths if path.is_file())
        return [self._small_file(path) for path in paths if path.name not in _UNREAD or self._is_own(path)]

    def _is_own(self, path: Path) -> bool:
        """Whether a file is the checkpoint's, and not a link to some other file, which a conversion would publish."""
        own = self.directory.resolve(), (self.directory / os.pardir / os.pardir / "blobs").resolve()  # the hub's cache
        return any(path.resolve().is_relative_to(place) for place in own)

    def _small_file(self, path: Path) -> SmallFile:
        name = path.relative_to(self.directory).as_posix()
        return SmallFile(name, path.stat().st_size, lambda: self._read_file(path))

    def _read_file(self, path: Path) -> bytes:
        self._watch([path])
        try:
            return read_small(path)
        except OSError as error:
            raise CheckpointError(unreadable(path, error)) from error

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed, by size or time, since it was first read."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise CheckpointError(f"{path} changed while it was converted; convert the checkpoint again")

    def states(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the last change of all files read so far."""
        return [(str(path), *state) for path, state in self._states.items()]

    def _config_files(self) -> dict[str, dict[str, Any]]:
        """The content of its CONFIG_FILES."""
        paths = [path for name in CONFIG_FILES if (path := self.directory / name).exists()]
        self._watch(paths)
        return {path.name: read_json(path) for path in paths}

    def _watch(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._states.setdefault(path, _state(path))

    def _read_tensors(self) -> dict[str, PlainTensor]:
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if single.exists():
            return self._read_header(single)
        if not index.exists():
            patterns = "*.bin", "*.pth"
            others = sorted(path.name for pattern in patterns for path in self.directory.glob(pattern))
            found = f"; it holds {shortened(others[0])}, which cannot be converted" if others else ""
            raise CheckpointError(f"{self.directory} has neither model.safetensors nor an index of shards{found}")
        weight_map = read_index(index)
        headers = {file: self._read_header(self.directory / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.directory / file} has no tensor {shortened(name)}, though {index.name} says so"
                )
        return {name: headers[file][name] for name, file in weight_map.items()}

    def _read_header(self, path: Path) -> dict[str, PlainTensor]:
        """The tensors of one file."""
        self._watch([path])
        return read_tensors(path)


def _of_draft(name: str) -> str:
    """The name that a tensor of a hybrid's draft layer has in npqwen's layout; "" for other tensors."""
    before, dot, own = name.partition(_DRAFT)
    return dot + own if before in ("", "model.", "language_model.", "model.language_model.") else ""


def checked(name: str, tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    """The tensor; CheckpointError if it has another shape than this, or cannot be converted."""
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json says {list(shape)}"
        )
    tensor.check(name)
    return tensor


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change; (-1, -1) if the file is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def refuse_packed(tensors: Iterable[str], directory: Path) -> None:
    """CheckpointError for weights that are quantized already, though config.json does not say so."""
    for name in tensors:
        if name.endswith(_PACKED):
            raise CheckpointError(
                f"{directory} is quantized already: it has a tensor {shortened(name)}, but its config.json does not "
                "say in which format; convert the unquantized checkpoint, in BF16, F16 or F32"
            )


def with_prefix(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under the names of Qwen3ForCausalLM."""
    bare = is_bare(tensors)
    return {prefixed(name) if bare else name: tensor for name, tensor in tensors.items()}
