"""`npqwen embed` and `npqwen rerank`: lines and JSON lines in, JSON lines or an array out."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from fake_hub import FakeHub
from retrieval_checkpoints import CONTEXT, DEFINITIONS, INSTRUCTION, embedding_checkpoint

import npqwen
from npqwen.commands import cli
from npqwen.hub import convert

Loaded = Callable[[int], npqwen.Model]
Run = Callable[..., SimpleNamespace]
TEXTS = ["ten years", "a stream of water", "tool to cut bread"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process: status, out, err."""

    def command(*args: Any, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape"))))
        given = [*map(str, args), "--threads", "2"]
        with pytest.raises(SystemExit) as exit:
            cli.main(given if "--context" in given else [*given, "--context", str(CONTEXT)])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=exit.value.code, out=out, err=err)

    return command


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def vectors(done: SimpleNamespace) -> np.ndarray:
    assert done.status == 0, done.err
    return np.array([row["embedding"] for row in rows(done.out)], np.float32)


def error(done: SimpleNamespace) -> str:
    lines = str(done.err).splitlines()
    assert (done.status, done.out) == (2, "")
    assert lines[-1].startswith("npqwen: error: ")
    return lines[-1].removeprefix("npqwen: error: ")


def test_lines_become_vectors(run: Run, embedder: Loaded) -> None:
    model = embedder(4)
    done = run("embed", model.path, stdin="\n".join(["ten years", "", *TEXTS[1:], "  "]))
    np.testing.assert_array_equal(vectors(done), model.embed(TEXTS))
    assert [row["text"] for row in rows(done.out)] == TEXTS
    assert done.err.splitlines()[-1].startswith("3 texts in ")
    quiet = run("embed", model.path, "-q", stdin=TEXTS[0])
    assert quiet.err == ""
    np.testing.assert_array_equal(vectors(quiet), model.embed(TEXTS[:1]))
    assert run("embed", model.path, "-q", stdin="\n").out == ""


def test_queries_and_dimensions(run: Run, embedder: Loaded) -> None:
    model = embedder(4)
    expected = model.embed(TEXTS, INSTRUCTION, 40)
    for flags in (["--query"], ["--instruction", INSTRUCTION]):
        done = run("embed", model.path, *flags, "--dimensions", "40", stdin="\n".join(TEXTS))
        np.testing.assert_array_equal(vectors(done), expected)
    both = run("embed", model.path, "--query", "--instruction", "x", stdin="a")
    assert error(both) == "--query and --instruction exclude each other; give one of them"


def test_json_lines_keep_their_fields(run: Run, embedder: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"id": 7, "text": "ten years"}\n"a stream of water"\r\n\n', encoding="utf-8")
    done = run("embed", embedder(4).path, file)
    np.testing.assert_array_equal(vectors(done), embedder(4).embed(TEXTS[:2]))
    first, second = rows(done.out)
    assert (first["id"], first["text"], second["text"]) == (7, *TEXTS[:2])
    assert run("embed", embedder(4).path, "--jsonl", stdin=file.read_text()).out == done.out


def test_an_array_in_a_file_of_its_own(run: Run, embedder: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    texts = TEXTS * 120  # more than one block
    done = run("embed", embedder(4).path, "-o", out, stdin="\n".join(texts))
    assert (done.status, done.out) == (0, "")
    found = np.load(out)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embedder(4).embed(texts))
    assert run("embed", embedder(4).path, "-o", out, stdin="").status == 0
    assert np.load(out).shape == (0, 256)
    lines = tmp_path / "vectors.jsonl"
    assert run("embed", embedder(4).path, "-o", lines, stdin="\n".join(TEXTS)).out == ""
    assert [row["text"] for row in rows(lines.read_text(encoding="utf-8"))] == TEXTS


def test_documents_come_sorted(run: Run, reranker: Loaded, tmp_path: Path) -> None:
    model = reranker(4)
    documents = [text for text in DEFINITIONS if text]
    ranking = model.rerank("ten years", documents)
    done = run("rerank", model.path, "ten years", stdin="\n".join(documents))
    assert done.status == 0, done.err
    assert [row["index"] for row in rows(done.out)] == list(ranking.order)
    assert [row["text"] for row in rows(done.out)] == [documents[index] for index in ranking.order]
    np.testing.assert_array_equal(
        np.array([row["score"] for row in rows(done.out)], np.float32), ranking.scores[list(ranking.order)]
    )
    assert done.err.splitlines()[-1].startswith(f"{len(documents)} documents in ")
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"id": at, "text": text}) + "\n" for at, text in enumerate(documents)))
    best = run("rerank", model.path, "ten years", file, "--top", "2", "--instruction", INSTRUCTION)
    expected = model.rerank("ten years", documents, INSTRUCTION).order[:2]
    assert [row["id"] for row in rows(best.out)] == list(expected)


@pytest.mark.parametrize(
    ("command", "stdin", "message"),
    [
        (["embed", "E", "missing.txt"], "", "missing.txt cannot be read: No such file or directory"),
        (["embed", "E", "."], "", ". cannot be read: Is a directory"),
        (["embed", "E", "--jsonl"], '"a"\n{"a": 1}', "line 2 of stdin is"),
        (["embed", "E", "--jsonl"], '"a"\n\n{', "line 3 of stdin is not JSON: '{'"),
        (["embed", "E", "--jsonl"], "3", "line 1 of stdin is '3'; it must be a JSON string, or an object with a text"),
        (["embed", "E"], "\udcff", "the text on stdin is not UTF-8 (at byte 0)"),
        (["embed", "E", "--dimensions", "5"], "a", "dimensions is 5; it must be a whole number from 32 to 256"),
        (["embed", "E", "--no-truncate", "--context", "20"], "a\n\n" + "word " * 50, "line 3 of stdin has "),
        (["embed", "R"], "a", "is a reranker, which judges documents; use rerank with it"),
        (["rerank", "E", "q"], "a", "is an embedding model, which does not judge documents; use embed with it"),
        (["rerank", "R", "word " * 600], "a", "query and instruction take "),
        (["generate", "E", "q"], "", "is an embedding model, which does not write text; use embed with it"),
        (["chat", "R", "q"], "", "is a reranker, which judges documents and does not write text; use rerank with it"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="words of errors are the system's")
def test_what_cannot_be_done_is_one_line(
    run: Run, embedder: Loaded, reranker: Loaded, command: list[str], stdin: str, message: str
) -> None:
    places = {"E": str(embedder(4).path), "R": str(reranker(4).path)}
    assert message in error(run(*[places.get(word, word) for word in command], stdin=stdin))


def test_a_failure_leaves_no_file(run: Run, embedder: Loaded, tmp_path: Path) -> None:
    for name in ("out.npy", "out.jsonl"):
        done = run("embed", embedder(4).path, "--no-truncate", "-o", tmp_path / name, stdin="a\n" + "word " * 600)
        assert "line 2 of stdin has 601 tokens" in error(done)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_has_vectors_too(run: Run, embedder: Loaded, tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    one = {"method": "POST", "url": "/v1/embeddings"}
    requests = [{**one, "custom_id": text, "body": {"model": "any", "input": [text]}} for text in TEXTS]
    given.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    assert run("batch", given, out, "--model", embedder(4).path).status == 0
    found = [row["response"]["body"]["data"][0]["embedding"] for row in rows(out.read_text(encoding="utf-8"))]
    np.testing.assert_array_equal(np.array(found, np.float32), embedder(4).embed(TEXTS))


def test_a_language_model_does_not_embed(run: Run, tiny: Callable[[int], Path]) -> None:
    assert "is not an embedding model" in error(run("embed", tiny(4), stdin="a"))


def test_the_files_of_its_task_come_from_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = embedding_checkpoint(tmp_path / "source")
    card = b"---\npipeline_tag: feature-extraction\n---\n"
    fake_hub.publish("org/vectors", source, {"README.md": card, "2_Normalize/config.json": b"{}"})
    out = convert("org/vectors", tmp_path / "out", 4)
    for name in ("1_Pooling/config.json", "modules.json", "config_sentence_transformers.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert "2_Normalize/config.json" not in fake_hub.downloads
    with npqwen.load(out, threads=1) as model:
        assert model.task == "embedding"


def test_a_reranker_is_known_by_its_card_after_a_conversion_under_another_name(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.publish("Qwen/Qwen3-Reranker-0.6B", TINY, {"README.md": b"---\npipeline_tag: text-ranking\n---\n"})
    out = convert("Qwen/Qwen3-Reranker-0.6B", tmp_path / "mine", 4)
    with npqwen.load(out, threads=1) as model:
        assert model.task == "reranking"
