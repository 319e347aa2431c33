"""Whether npqwen can run a checkpoint, by its config.json, index and list of files, before weights are downloaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from npqwen.errors import CheckpointError, ModelNotFoundError, NpqwenError, OptionError
from npqwen.format.config import FAMILY, MODEL_TYPES, Config, read_json
from npqwen.format.files import is_lfs_pointer
from npqwen.format.safetensors import INDEX, read_index
from npqwen.format.task import check_task
from npqwen.hub.names import advice
from npqwen.hub.repository import HubSource
from npqwen.hub.source import Source
from npqwen.wording import quoted, shortened

if TYPE_CHECKING:
    from npqwen_quant.quantized import QuantizedFormat

Purpose = Literal["arrays", "text", "chat", "embedding", "reranking"]
"""What a model is used for: "arrays" (logits and hidden states), "text" (generating text), "chat" (answering with its
chat template), "embedding" (vectors of texts) or "reranking" (scoring documents)."""

_OTHER_WEIGHTS = {
    ".bin": "PyTorch pickles (.bin)",
    ".pth": "PyTorch pickles (.pth)",
    ".pt": "PyTorch pickles (.pt)",
    ".onnx": "ONNX",
    ".npz": "NumPy archives",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
}


def check(source: Source, purpose: Purpose) -> None:
    """Raise CheckpointError for a checkpoint that npqwen cannot run, OptionError for one that cannot serve the purpose.

    The message names an alternative.
    """
    if isinstance(source, HubSource) and source.gguf:
        _check_architecture(source)
        check_purpose(source, purpose)
        return
    if not source.gguf:
        _refuse_pointers(source)
        _refuse_other_files(source)
    raw = source.raw_config
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{source.label} is of the family {quoted(model_type)}, which is not supported; npqwen runs {FAMILY}, "
            "such as Qwen/Qwen3-0.6B"
        )
    if not source.gguf:
        quantized_format(source)
    Config.from_dict(raw, source.label if source.gguf else f"{source.label}: config.json")
    _refuse_heads(source, raw)
    if not source.gguf and "tokenizer.json" not in source.files:
        raise CheckpointError(
            f"{source.label} has no tokenizer.json, which npqwen needs; add it from the model that this one was made "
            "from, or save it with transformers' fast tokenizer"
        )
    if INDEX in source.files and "model.safetensors" not in source.files:
        _refuse_missing_shards(source)
    check_purpose(source, purpose)


def quantized_format(source: Source) -> QuantizedFormat | None:
    """How a checkpoint's weights are quantized; None if they are not. CheckpointError for a format that is not read."""
    from npqwen_quant.quantized import CONFIG_FILES, format_of

    files = {name: read_json(source.small_file(name)) for name in CONFIG_FILES if name in source.files}
    instead = f"{advice(source.label, source.originals)}, and --bits to quantize it"
    return format_of(source.raw_config, source.label, files, instead)


def check_purpose(source: Source, purpose: Purpose) -> None:
    """Raise OptionError for a model that cannot serve this purpose, although npqwen runs it."""
    _refuse_other_tasks(source, purpose)
    if purpose == "chat" and not source.has_template:
        raise OptionError(
            f"{source.label} has no chat template, like all base models; continue a text with generate instead"
        )


def _check_architecture(source: HubSource) -> None:
    """Raise CheckpointError for a GGUF file that cannot be read, before its download, if the hub tells."""
    from npqwen_quant.gguf_config import refuse_architecture

    if source.architecture is not None:
        refuse_architecture(source.label, source.architecture)


def file_error(path: Path, label: str) -> NpqwenError:
    """The error about a file that was given in place of a directory."""
    kind = _OTHER_WEIGHTS.get(path.suffix.lower())
    if kind is not None:
        return CheckpointError(f"{label} is a file of {kind}, which npqwen does not read; {advice(path.name)}")
    return ModelNotFoundError(f"{label} is a file; give its directory, or a hub id like Qwen/Qwen3-0.6B")


def _refuse_pointers(source: Source) -> None:
    """Refuse Git LFS pointers: three lines in place of a file, in a clone without Git LFS. The hub serves the files."""
    if source.remote:
        return
    for name in source.matching("*.safetensors", "*.json"):
        if is_lfs_pointer(source.small_file(name)):
            raise CheckpointError(
                f"{source.label}/{name} is a Git LFS pointer, not the file itself; run `git lfs pull` there, "
                f"or {advice(source.label, source.originals)}"
            )


def _refuse_other_files(source: Source) -> None:
    """Refuse sources without weights in safetensors: adapters, caches, other frameworks' weights, incomplete ones."""
    label, names = source.label, set(source.files)
    if {"model.safetensors", INDEX} & names:
        return
    if "adapter_config.json" in names:
        base = read_json(source.small_file("adapter_config.json")).get("base_model_name_or_path")
        whose = f" of {shortened(base)}" if isinstance(base, str) and base else ""
        raise CheckpointError(
            f"{label} is a LoRA adapter{whose}; convert its model with it: npqwen convert MODEL OUT --adapter "
            f"{label if not source.remote else 'DIRECTORY'}"
        )
    if _is_download_cache(label):
        repository = "/".join(PurePosixPath(label.replace("\\", "/")).name.split("--")[1:])
        raise CheckpointError(f"{label} is huggingface_hub's cache of a model; give its id, {shortened(repository)}")
    for suffix, kind in _OTHER_WEIGHTS.items():
        found = sorted(name for name in names if name.lower().endswith(suffix))
        if found and "config.json" in names:
            raise CheckpointError(
                f"{label} has only {shortened(found[0])}, and npqwen reads no {kind}; use a repository with "
                "model.safetensors, or save it in transformers (save_pretrained writes safetensors)"
            )
    if "config.json" in names:
        raise CheckpointError(f"{label} has neither model.safetensors nor an index of shards; is it complete?")


def _refuse_missing_shards(source: Source) -> None:
    missing = sorted(set(read_index(source.small_file(INDEX)).values()) - set(source.files))
    if missing:
        raise CheckpointError(
            f"{source.label} has no {shortened(missing[0])}, a shard that its {INDEX} names; is it complete?"
        )


def _is_download_cache(label: str) -> bool:
    path = Path(label)
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def _refuse_heads(source: Source, raw: dict[str, Any]) -> None:
    """Refuse architectures whose output is not a next token's logits."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    supported: tuple[str, ...] = ("ForCausalLM", "Model")
    if isinstance(model_type, str) and model_type.endswith("_text"):  # a text part that was saved alone
        supported += ("ForConditionalGeneration",)
    for name in architectures if isinstance(architectures, list) else []:
        if not isinstance(name, str) or name.endswith(supported):
            continue
        if "SequenceClassification" in name:
            raise CheckpointError(
                f"{source.label} is a classifier or reranker ({shortened(name)}), which does not write text; npqwen "
                "runs language models, such as Qwen/Qwen3-0.6B, and rerankers that answer yes or no, such as "
                "Qwen/Qwen3-Reranker-0.6B"
            )
        raise CheckpointError(
            f"{source.label} is of the architecture {shortened(name)}, which is not supported; npqwen runs "
            "Qwen3ForCausalLM and Qwen3MoeForCausalLM, such as Qwen/Qwen3-0.6B"
        )


def _refuse_other_tasks(source: Source, purpose: Purpose) -> None:
    """Refuse other tasks' models: rerankers and embedding models have a language model's architecture."""
    if purpose != "arrays":
        check_task(source.label, source.task, "text" if purpose == "chat" else purpose)
