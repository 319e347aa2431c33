"""Typical mistakes: what is typed, and the words it gets. Every one is a single line and exit status 2.

For models of the hub, the requests are counted: one that npqwen cannot run costs less than 100 kB.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY, make_config, random_tensors, write_checkpoint, write_safetensors
from fake_hub import Connection, FakeHub
from gguf_files import encode

from npqwen.commands import cli

CHEAP = 100_000
"""Bytes that a model may cost which cannot run."""

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1192135096\n" % (b"0123456789abcdef" * 4)
WEIGHTS = bytes(3 * CHEAP)
TOKENIZER = {name: (TINY / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, empty."""
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process: the one line on stderr without its beginning, after notices."""

    def command(*args: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit:
            cli.main(list(args))
        out, err = capsys.readouterr()
        assert exit.value.code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.endswith("\n")
        lines = err.splitlines()
        assert [line for line in lines if line.startswith("npqwen: error: ")] == lines[-1:]
        return lines[-1].removeprefix("npqwen: error: ")

    return command


def config(**changes: Any) -> bytes:
    return json.dumps(make_config(**changes)).encode()


def small_checkpoint(**changes: Any) -> dict[str, bytes]:
    """The files of a repository whose weights nobody should need."""
    return {"config.json": config(**changes), "model.safetensors": WEIGHTS} | TOKENIZER


SUPPORTED = "npqwen runs Qwen3, Qwen3-Next and Qwen3.5 to 3.8, such as Qwen/Qwen3-0.6B"
QUANTIZED = "which npqwen does not read; use the original, Qwen/Qwen3-8B, and --bits to quantize it"

FOREIGN: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    # what is typed: (files, model card, words)
    "meta-llama/Llama-3.2-1B": (
        small_checkpoint(model_type="llama"),
        {},
        f"meta-llama/Llama-3.2-1B is of the family 'llama', which is not supported; {SUPPORTED}",
    ),
    "google/gemma-3-1b-it": (
        small_checkpoint(model_type="gemma3_text"),
        {},
        f"google/gemma-3-1b-it is of the family 'gemma3_text', which is not supported; {SUPPORTED}",
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        small_checkpoint(model_type="qwen2"),
        {"base_model": "Qwen/Qwen2.5-7B"},
        f"Qwen/Qwen2.5-7B-Instruct is of the family 'qwen2', which is not supported; {SUPPORTED}",
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        small_checkpoint(model_type="qwen3_vl", text_config={"use_sliding_window": True}),
        {},
        "Qwen/Qwen3-VL-8B-Instruct: config.json: use_sliding_window is set, which no Qwen3 model uses",
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        small_checkpoint(model_type="qwen2_5_vl", text_config={"model_type": "qwen2_5_vl_text"}),
        {},
        f"Qwen/Qwen2.5-VL-7B-Instruct is of the family 'qwen2_5_vl', which is not supported; {SUPPORTED}",
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        small_checkpoint(model_type="qwen3_next", num_hidden_layers=4, linear_conv_kernel_dim=5),
        {},
        "Qwen/Qwen3-Next-80B-A3B-Instruct: config.json: linear_conv_kernel_dim 5 is not supported, only 4",
    ),
    "Qwen3.5-4B": (
        small_checkpoint(
            model_type="qwen3_5",
            text_config=make_config(model_type="qwen3_5_text", num_hidden_layers=4, attn_output_gate=False),
        ),
        {},
        "Qwen/Qwen3.5-4B: config.json: attn_output_gate is false, which no Qwen3 hybrid has",
    ),
    "Qwen3.8-Flash-Next": (
        small_checkpoint(model_type="qwen4_exp"),
        {},
        f"Qwen/Qwen3.8-Flash-Next is of the family 'qwen4_exp', which is not supported; {SUPPORTED}",
    ),
    "Qwen/Qwen3-8B-FP8": (
        small_checkpoint(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 0]}),
        {"base_model": ["Qwen/Qwen3-8B"]},
        "Qwen/Qwen3-8B-FP8: weight_block_size is [128, 0], not the rows and columns of a block",
    ),
    "https://huggingface.co/Qwen/Qwen3-8B-AWQ/tree/main": (
        small_checkpoint(quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"}),
        {"base_model": "Qwen/Qwen3-8B"},
        f"Qwen/Qwen3-8B-AWQ is quantized already (AWQ, gemv), {QUANTIZED}",
    ),
    "JunHowie/Qwen3-8B-GPTQ-Int4": (
        small_checkpoint(quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
        {},
        f"JunHowie/Qwen3-8B-GPTQ-Int4 is quantized already (GPTQ, marlin), {QUANTIZED}",
    ),
    "mobiuslabs/Qwen3-8B-hqq": (
        small_checkpoint(quantization_config={"quant_method": "hqq"}),
        {},
        f"mobiuslabs/Qwen3-8B-hqq is quantized already (hqq), {QUANTIZED}",
    ),
    "RedHatAI/Qwen3-8B-MXFP6": (
        small_checkpoint(
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "mxfp6-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 6, "type": "float"}}},
            }
        ),
        {"base_model": "Qwen/Qwen3-8B"},
        f"RedHatAI/Qwen3-8B-MXFP6 is quantized already (compressed-tensors, mxfp6-pack-quantized), {QUANTIZED}",
    ),
    "nvidia/Qwen3-8B-INT4": (
        small_checkpoint(quantization_config={"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}),
        {"base_model": "Qwen/Qwen3-8B"},
        f"nvidia/Qwen3-8B-INT4 is quantized already (ModelOpt, INT4_AWQ), {QUANTIZED}",
    ),
    "unsloth/Qwen3-0.6B-GGUF:Q9": (
        {"Qwen3-0.6B-Q4_K_M.gguf": WEIGHTS, "Qwen3-0.6B-Q8_0.gguf": WEIGHTS, "config.json": config()},
        {"base_model": ["Qwen/Qwen3-0.6B"]},
        "unsloth/Qwen3-0.6B-GGUF:Q9: no GGUF model matches 'Q9'; there are :Q4_K_M, :Q8_0",
    ),
    "somebody/mine-GGUF": (
        {"mine-Q5_K_M.gguf": WEIGHTS, "mine-Q6_K.gguf": WEIGHTS},
        {},
        "somebody/mine-GGUF has several GGUF models; append one of :Q5_K_M, :Q6_K",
    ),
    "somebody/qwen3-lora": (
        {
            "adapter_config.json": b'{"base_model_name_or_path": "Qwen/Qwen3-8B", "peft_type": "LORA"}',
            "adapter_model.safetensors": WEIGHTS,
        },
        {},
        "somebody/qwen3-lora is a LoRA adapter of Qwen/Qwen3-8B; convert its model with it: npqwen convert MODEL OUT "
        "--adapter DIRECTORY",
    ),
    "somebody/qwen3-pickled": (
        {"config.json": config(), "pytorch_model.bin": WEIGHTS} | TOKENIZER,
        {},
        "somebody/qwen3-pickled has only pytorch_model.bin, and npqwen reads no PyTorch pickles (.bin); use a "
        "repository with model.safetensors, or save it in transformers (save_pretrained writes safetensors)",
    ),
    "somebody/qwen3-reranker-seq": (
        small_checkpoint(architectures=["Qwen3ForSequenceClassification"]),
        {},
        "somebody/qwen3-reranker-seq is a classifier or reranker (Qwen3ForSequenceClassification), which does not "
        "write text; npqwen runs language models, such as Qwen/Qwen3-0.6B, and rerankers that answer yes or no, such "
        "as Qwen/Qwen3-Reranker-0.6B",
    ),
    "Qwen/Qwen3-Reranker-0.6B": (
        small_checkpoint(),
        {},
        "Qwen/Qwen3-Reranker-0.6B is a reranker, which judges documents and does not write text; use rerank with it "
        "(/v1/rerank on a server), or a language model, such as Qwen/Qwen3-0.6B",
    ),
    "somebody/judge": (
        small_checkpoint() | {"1_LogitScore/config.json": b"{}"},
        {},
        "somebody/judge is a reranker, which judges documents and does not write text",
    ),
    "somebody/vectors": (
        small_checkpoint() | {"1_Pooling/config.json": b"{}", "modules.json": b"[]"},
        {},
        "somebody/vectors is an embedding model, which does not write text; use embed with it (/v1/embeddings on a "
        "server), or a language model, such as Qwen/Qwen3-0.6B",
    ),
    "somebody/no-tokenizer": (
        {"config.json": config(), "model.safetensors": WEIGHTS},
        {},
        "somebody/no-tokenizer has no tokenizer.json, which npqwen needs; add it from the model that this one was "
        "made from, or save it with transformers' fast tokenizer",
    ),
    "somebody/no-config": (
        {"model.safetensors": WEIGHTS} | TOKENIZER,
        {},
        "somebody/no-config: config.json is missing: this is not a checkpoint, or not a complete one",
    ),
    "somebody/bad-config": (
        small_checkpoint() | {"config.json": b'{"model_type": "qwen3"'},
        {},
        "somebody/bad-config: config.json is not valid JSON: ",
    ),
}


@pytest.mark.parametrize("typed", FOREIGN)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_models_of_the_hub_that_cannot_run(fake_hub: FakeHub, run: Run, typed: str, command: str) -> None:
    files, card, words = FOREIGN[typed]
    repository = typed.removeprefix("https://huggingface.co/").removesuffix("/tree/main")
    repository = (repository if "/" in repository else f"Qwen/{repository}").partition(":")[0]
    fake_hub.publish(repository, extra=files, card=card)
    assert run(command, typed, "Hello").startswith(words)
    assert 0 < fake_hub.bytes_sent < CHEAP, fake_hub.traffic
    assert not {"model.safetensors", "tokenizer.json"} & set(fake_hub.downloads)


@pytest.mark.parametrize("command", ["convert", "info", "bench", "pull"])
@pytest.mark.parametrize("typed", ["Qwen/Qwen3-8B-FP8", "somebody/mine-GGUF", "google/gemma-3-1b-it"])
def test_every_command_that_takes_a_model(fake_hub: FakeHub, run: Run, typed: str, command: str) -> None:
    files, card, words = FOREIGN[typed]
    fake_hub.publish(typed, extra=files, card=card)
    assert run(command, typed) == words
    assert 0 < fake_hub.bytes_sent < CHEAP


@pytest.mark.parametrize(
    "typed",
    [
        ["generate", "Qwen3-0.6B", "x", "--adapter", "a=gone"],
        ["convert", "Qwen3-0.6B", "out", "--adapter", "gone"],
    ],
)
def test_adapters_are_checked_before_a_download(fake_hub: FakeHub, run: Run, typed: list[str]) -> None:
    fake_hub.publish("Qwen/Qwen3-0.6B", extra=small_checkpoint())
    assert run(*typed) == "gone is not a directory; --adapter takes one that PEFT has saved"
    assert fake_hub.bytes_sent == 0


def test_a_base_model_in_a_chat(fake_hub: FakeHub, run: Run, place: Path) -> None:
    """Before the weights; and a checkpoint here, before it is converted."""
    base = small_checkpoint() | {"tokenizer_config.json": b"{}"}
    fake_hub.publish("Qwen/Qwen3-0.6B-Base", extra=base)
    words = "has no chat template, like all base models; continue a text with generate instead"
    assert run("chat", "Qwen3-0.6B-Base", "Hello") == f"Qwen/Qwen3-0.6B-Base {words}"
    assert fake_hub.bytes_sent < CHEAP
    for name, data in base.items():
        (place / name).write_bytes(data)
    assert run("chat", ".", "Hello") == f". {words}"
    assert not (place.parent / "cache").exists()


def test_names_that_the_hub_does_not_have(fake_hub: FakeHub, connection: Connection, run: Run) -> None:
    fake_hub.publish("Qwen/Qwen3-0.6B", extra=small_checkpoint())
    assert run("chat", "Qwen/Qwen3-0.5B", "Hello") == (
        "Qwen/Qwen3-0.5B is neither a directory nor a repository on the hub that can be read; check the name, "
        "or log in with `hf auth login` if it is private or gated"
    )
    assert run("chat", "Qwen3-0.6B@v9", "Hello") == (
        "Qwen/Qwen3-0.6B has no revision v9: no branch, tag or commit of this name"
    )
    connection.error = OSError("no route to host")
    assert run("chat", "Qwen3-0.6B", "Hello") == (
        "Qwen/Qwen3-0.6B is neither a directory nor in the cache of downloads, and the hub cannot be reached "
        "(no route to host)"
    )


def write_gguf(place: Path) -> None:
    (place / "llama-Q4_K_M.gguf").write_bytes(encode({"general.architecture": "llama"}, {}))


def in_directory(name: str, write: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(place: Path) -> None:
        (place / name).mkdir()
        write(place / name)

    return prepare


def write_local(place: Path, files: dict[str, bytes] | None = None, **changes: Any) -> None:
    """A checkpoint, with some files replaced."""
    write_checkpoint(place, make_config(**changes), random_tensors(make_config()), tokenizer=True)
    for name, data in (files or {}).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)


def without(name: str) -> Callable[[Path], None]:
    def prepare(place: Path) -> None:
        write_local(place)
        (place / name).unlink()

    return prepare


def write_pickled(place: Path) -> None:
    write_local(place)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


def write_truncated(place: Path) -> None:
    write_local(place)
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_mlx(place: Path) -> None:
    """As mlx-lm writes it, but for the words in config.json that tell it."""
    tensors = random_tensors(make_config())
    name = "model.layers.0.self_attn.q_proj"
    write_local(place)
    packed = {f"{name}.weight": tensors[f"{name}.weight"][:, :9], f"{name}.scales": tensors[f"{name}.weight"][:, :2]}
    write_safetensors(place / "model.safetensors", tensors | packed)


def write_hub_cache(place: Path) -> None:
    (place / "snapshots" / "0123").mkdir(parents=True)
    (place / "refs").mkdir()


def write_beside_other_files(place: Path) -> None:
    (place / "in").mkdir()
    write_local(place / "in")
    (place / "out").mkdir()
    (place / "out" / "thesis").touch()


LOCAL: list[tuple[Callable[[Path], object], list[str], str]] = [
    # what is there, what is typed, the words
    (lambda place: None, ["generate", "./modle", "x"], "'./modle' is neither a directory nor a hub id like Qwen/"),
    (lambda place: None, ["generate", "qwen3:8b", "x"], "'qwen3:8b' is ollama's name of a model; give its id on the "),
    (lambda place: None, ["generate", "qwen3:8b", "x"], "hub, Qwen/Qwen3-8B"),
    (lambda place: None, ["generate", "model.gguf", "x"], "model.gguf: no such file"),
    (lambda place: None, ["chat", "models/model.gguf", "x"], "models/model.gguf: no such file"),
    (lambda place: None, ["generate", ".", "x"], ".: config.json is missing: this is not a checkpoint, or not a "),
    (
        write_gguf,
        ["generate", "llama-Q4_K_M.gguf", "x"],
        "llama-Q4_K_M.gguf has the architecture 'llama'; npqwen reads qwen3, qwen3moe, qwen3next, qwen35, qwen35moe: "
        "Qwen3, Qwen3-Next and Qwen3.5, and their mixtures",
    ),
    (write_gguf, ["generate", ".", "x"], "llama-Q4_K_M.gguf has the architecture 'llama'; npqwen reads qwen3, "),
    (in_directory("llama", write_gguf), ["convert", "llama"], "llama/llama-Q4_K_M.gguf has the architecture 'llama'"),
    (
        lambda place: (place / "pytorch_model.bin").write_bytes(b"x"),
        ["generate", "pytorch_model.bin", "x"],
        "pytorch_model.bin is a file of PyTorch pickles (.bin), which npqwen does not read; use the original ",
    ),
    (
        write_pickled,
        ["generate", ".", "x"],
        ". has only pytorch_model.bin, and npqwen reads no PyTorch pickles (.bin); use a repository with ",
    ),
    (write_local, ["generate", "model.safetensors", "x"], "model.safetensors is a file; give its directory, or a hub"),
    (
        lambda place: write_local(place, {"model.safetensors": POINTER}),
        ["generate", ".", "x"],
        "./model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull` there, or use the original ",
    ),
    (
        lambda place: write_local(place, {"tokenizer.json": POINTER}),
        ["convert", "."],
        "./tokenizer.json is a Git LFS pointer, not the file itself; run `git lfs pull` there, or use the original ",
    ),
    (
        in_directory("Qwen3-8B", lambda place: write_local(place, {"model.safetensors": POINTER})),
        ["generate", "Qwen3-8B", "x"],
        "run `git lfs pull` there, or use the original, Qwen/Qwen3-8B",
    ),
    (write_mlx, ["generate", ".", "x"], ". is quantized already: it has a tensor model."),
    (
        lambda place: write_local(place, quantization={"group_size": 64, "bits": 7}),
        ["generate", ".", "x"],
        ". is quantized already (MLX, 7 bits), which npqwen does not read; use the original checkpoint in BF16",
    ),
    (
        lambda place: write_local(place, quantization_config={"quant_method": "hqq"}),
        ["generate", ".", "x"],
        ". is quantized already (hqq), which npqwen does not read; use the original checkpoint in BF16, such as ",
    ),
    (
        lambda place: (place / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}'),
        ["chat", ".", "x"],
        ". is a LoRA adapter of Qwen/Qwen3-8B; convert its model with it: npqwen convert MODEL OUT --adapter .",
    ),
    (lambda place: write_local(place, model_type="llama"), ["info", "."], ". is of the family 'llama', which is not"),
    (without("tokenizer.json"), ["convert", "."], ". has no tokenizer.json, which npqwen needs; add it from the "),
    (without("tokenizer.json"), ["generate", ".", "x"], ". has no tokenizer.json, which npqwen needs; add it "),
    (without("config.json"), ["generate", ".", "x"], ".: config.json is missing: this is not a checkpoint, or not a "),
    (without("model.safetensors"), ["convert", "."], ". has neither model.safetensors nor an index of shards; is it "),
    (write_truncated, ["generate", ".", "x"], "model.safetensors is damaged or truncated: tensor "),
    (
        lambda place: write_local(place, {"config.json": b'{"model_type": '}),
        ["generate", ".", "x"],
        ".: config.json is not valid JSON: ",
    ),
    (
        lambda place: write_local(place, architectures=["Qwen3ForSequenceClassification"]),
        ["chat", ".", "x"],
        ". is a classifier or reranker (Qwen3ForSequenceClassification), which does not write text; npqwen runs ",
    ),
    (
        in_directory("Qwen3-Reranker-0.6B", write_local),
        ["generate", "Qwen3-Reranker-0.6B", "x"],
        "Qwen3-Reranker-0.6B is a reranker, which judges documents and does not write text; use rerank with it ",
    ),
    (
        lambda place: write_local(place, {"1_Pooling/config.json": b"{}"}),
        ["generate", ".", "x"],
        ". is an embedding model, which does not write text; use embed with it (/v1/embeddings on a server)",
    ),
    (
        in_directory("models--Qwen--Qwen3-0.6B", write_hub_cache),
        ["generate", "models--Qwen--Qwen3-0.6B", "x"],
        "models--Qwen--Qwen3-0.6B is huggingface_hub's cache of a model; give its id, Qwen/Qwen3-0.6B",
    ),
    (write_local, ["convert", ".", "."], "choose another place"),
    (write_local, ["convert", ".", "./out"], "is inside the checkpoint's own directory"),
    (
        in_directory("in", write_local),
        ["convert", "in", "in/../in"],
        "is inside the checkpoint's own directory",
    ),
    (
        write_beside_other_files,
        ["convert", "in", "out"],
        "exists already and is not a converted model, so it is not replaced; choose another place, or remove it ",
    ),
    (write_local, ["generate", ".", "x", "--bits", "5"], "bits is 5; it can be 3, 4, 8 or 16"),
    (write_local, ["generate", ".", "x", "--temprature", "1"], "No such option '--temprature'"),
    (write_local, ["generate", ".", "x", "--temperature", "hot"], "Invalid value for '--temperature'"),
    (write_local, ["generate", ".", "x", "--temperature", "-1"], "temperature is -1.0; it must be a number from 0"),
    (write_local, ["generate", ".", "x", "--top-p", "2"], "top_p is 2.0; it must be a number from 0 to 1"),
    (write_local, ["generate", ".", "x", "--threads", "-1"], "threads is -1; it must be a whole number"),
    (write_local, ["generate", ".", "x", "--max-tokens", "-1"], "max_tokens is -1; it must be a whole number"),
    (write_local, ["chat", ".", "x", "--think", "--no-think"], "--think and --no-think exclude each other; give one"),
    (
        write_local,
        ["convert", ".", "out", "--calibrate", "self", "--low-disk"],
        "calibration reads all weights several times; use it without low_disk (--low-disk)",
    ),
]


@pytest.mark.parametrize(("prepare", "typed", "words"), LOCAL, ids=[f"{' '.join(t)}-{w[:20]}" for _, t, w in LOCAL])
def test_directories_files_and_options(
    run: Run, place: Path, prepare: Callable[[Path], object], typed: list[str], words: str
) -> None:
    prepare(place)
    before = sorted(path for path in place.rglob("*"))
    assert words in run(*typed)
    assert sorted(path for path in place.rglob("*")) == before
    if "threads" not in words:  # which are checked when a model is loaded
        assert not list((place.parent / "cache").rglob("config.json"))


@pytest.mark.parametrize(
    "typed",
    [
        ["chat", "", "Hello"],
        ["info", ""],
        ["convert", ""],
        ["convert", "", "--dry-run"],
        ["verify", ""],
        ["rm", "", "--yes"],
        ["eval", str(TINY), "file.txt", "--against", ""],
    ],
)
def test_an_empty_model_is_not_the_current_directory(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str]
) -> None:
    monkeypatch.chdir(checkpoint)
    Path("file.txt").write_text("a text", encoding="utf-8")
    assert "the name of the model is empty; give a directory, a GGUF file or a hub id like Qwen/" in run(*typed)


def test_binary_stdin(run: Run) -> None:
    assert run("chat", str(TINY), "-", stdin=b"\x89PNG\xff") == "the text on stdin is not UTF-8 (at byte 0)"
    assert run("generate", str(TINY), "-", stdin=b"ab\xff").startswith("the text on stdin is not UTF-8 (at byte 2)")
    assert run("chat", str(TINY), "", stdin=b" \n") == "there is no question: the argument or stdin is empty"


def test_prompts_and_contexts_that_are_too_large(run: Run) -> None:
    """What is said of each, with the example model, whose context is 2,048 tokens."""
    assert run("generate", str(TINY), "x", "--context", "50000") == (
        "a context of 50,000 tokens is too large: this model supports at most 2,048, and 8,192 with --yarn 4 "
        "(in Python, yarn=4)"
    )
    assert run("generate", str(TINY), "a b " * 4000) == (
        "the prompt is too long: it takes 8,001 tokens, and the context is 2,048; shorten it, or load the model with a "
        "longer context (--context, --yarn)"
    )
    assert run("bench", str(TINY), "--depth", "4096").endswith(
        "4,608 tokens do not fit the model's context of 2,048; reduce depth, prefill or decode "
        "(--depth, --prefill, --decode)"
    )
    assert run("version").startswith("No such command 'version'; did you mean --version?")
