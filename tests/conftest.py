"""What tests share: compiled kernels, the example model in every encoding, and a Hugging Face hub on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads of OpenBLAS that wait for others spin, and take the time of tests in other processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import llvmlite.binding as llvm
import pytest
from checkpoints import TINY, write_checkpoint
from converted import large_model
from fake_hub import Connection, FakeHub

from npqwen.simd.x86 import AmxBf16

if not os.environ.keys() & {"NPQWEN_ISA", "NUMBA_CPU_NAME"} and AmxBf16.features <= {
    name for name, here in llvm.get_host_cpu_features().items() if here
}:
    # Most tests compare to the bit, which kernels in bf16 do not promise; they have tests of their own.
    os.environ["NPQWEN_ISA"] = "amx"

if TYPE_CHECKING:
    from browser import Browser, Page
    from chromium import ChromiumPage
    from fake_api import FakeApi
    from serving import Runs

    from npqwen.model import Model

TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """--browser: in which engine to run the tests of the page."""
    parser.addoption("--browser", choices=["Chromium", "Firefox", "WebKit"], default="Chromium")


FIRST = ("kernels/test_instruction_sets.py", "hostile/test_hostile.py", "kernels/test_compiled.py")
"""The files that take longest: at the end, only one of several workers would be busy with them."""


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist keep the order of files; it would begin with those of many tests, which are short ones."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with `FIRST`."""
    order = {str(TESTS / name): place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(str(item.path), len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Have programs that tests start hear SIGINT, SIGQUIT and SIGHUP, which background jobs and `nohup` ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGQUIT") and signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # A handler becomes the default in other programs, and this one still outlives a hangup.
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep compiled kernels in pytest's own cache: each is compiled once for this checkout, not for each run.

    Child processes find them by NPQWEN_CACHE.
    """
    kept = getattr(request.config, "cache", None)  # -p no:cacheprovider
    place = tmp_path_factory.mktemp("cache") if kept is None else kept.mkdir("npqwen")
    from npqwen.kernels.compiled import kernel_directory

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPQWEN_CACHE", str(place))
        yield kernel_directory()  # It stays there for this process, whatever a test makes of NPQWEN_CACHE.


@pytest.fixture(scope="session", autouse=True)
def idle_machine() -> Iterator[None]:
    """Have no command remark that this machine is busy, or has few CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npqwen.hardware.contention.usable_cpus", lambda: 1024)
        if hasattr(os, "getloadavg"):
            patch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """tiny(bits): the example model, converted once."""
    from npqwen_quant import convert

    place = tmp_path_factory.mktemp("tiny")

    def converted(bits: int) -> Path:
        out = place / f"tiny-qwen3-{bits}"
        if not out.exists():
            convert(TINY, out, bits=bits)
        return out

    return converted


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained mixture of experts in int4."""
    from npqwen_quant import convert

    out = tmp_path_factory.mktemp("tiny-moe") / "tiny-qwen3-moe"
    convert(TESTS / "data" / "tiny-qwen3-moe", out, bits=4)
    return out


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """hybrid(name, bits): one of the small hybrids, converted once."""
    from hybrids import hybrid_checkpoint
    from npqwen_quant import convert

    place = tmp_path_factory.mktemp("hybrid")

    def converted(name: str, bits: int) -> Path:
        out = place / f"{name}-{bits}"
        if not out.exists():
            source = place / name
            convert(source if source.exists() else hybrid_checkpoint(name, source), out, bits=bits)
        return out

    return converted


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Model]]:
    """embedder(bits): a small embedding model, loaded once."""
    from retrieval_checkpoints import Shelf, embedding_checkpoint

    with Shelf(embedding_checkpoint(tmp_path_factory.mktemp("embedding") / "checkpoint")) as shelf:
        yield shelf.model


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Model]]:
    """reranker(bits): a small reranker, loaded once."""
    from retrieval_checkpoints import Shelf, reranker_checkpoint

    with Shelf(reranker_checkpoint(tmp_path_factory.mktemp("reranker") / "checkpoint")) as shelf:
        yield shelf.model


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 140 MB in int4, whose passes take a while."""
    return large_model(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="session")
def tiny_model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    """The example model with 16 bits, the one that `server` has: what it computes by itself is the oracle."""
    import npqwen

    with npqwen.load(tiny(16), threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def server(tiny_model: Model) -> Iterator[str]:
    """The address of a server with the example model."""
    from serving import served

    from npqwen.server import app

    with served(app(tiny_model)) as url:
        yield url


@pytest.fixture
def runs() -> Iterator[Runs]:
    """The runs that the test's requests start."""
    from serving import watched_runs

    with watched_runs() as seen:
        yield seen


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """say(chat, line...): what typing these lines in a conversation in the terminal shows, stdout and stderr."""
    from npqwen.terminal.repl import handle

    def say(chat: Any, *lines: str) -> str:
        for line in lines:
            handle(chat, line)
        done = capsys.readouterr()
        return done.out + done.err

    return say


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """run(argument..., status=0): what the command writes to stdout and stderr."""
    from npqwen.commands import cli

    def command(*args: object, status: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert exit.value.code == status, err
        return out, err

    return command


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty: a directory of the test's own, which does not exist yet."""
    place = tmp_path / "cache"
    monkeypatch.setenv("NPQWEN_CACHE", str(place))
    return place


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint directory with a tokenizer."""
    directory = tmp_path / "my model"
    write_checkpoint(directory, tokenizer=True)
    return directory


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The output directories of all conversions."""
    import npqwen_quant

    places: list[Path] = []

    def count(name: str) -> None:
        convert = getattr(npqwen_quant, name)

        def counted(source: Path, out: Path, *args: Any, **options: Any) -> None:
            places.append(out)
            convert(source, out, *args, **options)

        monkeypatch.setattr(npqwen_quant, name, counted)

    count("convert")
    count("convert_shards")
    return places


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that huggingface_hub uses in this process, with a cache of the test's own."""
    from huggingface_hub import constants

    server = FakeHub()
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def connection(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Connection:
    """What stands between huggingface_hub in this process and the fake hub."""
    import huggingface_hub

    state = Connection()
    model_info = huggingface_hub.HfApi.model_info

    def query(*args: Any, **options: Any) -> Any:
        if state.error is not None:
            raise state.error
        return model_info(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", query)
    return state


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Browser]]:
    """browsers(engine): a headless browser with that engine; where there is none, the test is skipped."""
    from chromium import Chromium
    from firefox import Firefox
    from webkit import WebKit

    kinds: dict[str, type[Chromium | Firefox | WebKit]] = {"Chromium": Chromium, "Firefox": Firefox, "WebKit": WebKit}
    running: dict[str, Browser] = {}

    def browser(engine: str) -> Browser:
        if engine not in running:
            path = kinds[engine].find()
            if path is None:
                pytest.skip(f"there is no {engine} here that can be driven")
            running[engine] = kinds[engine](path, tmp_path_factory.mktemp("browser") / "profile")
        return running[engine]

    yield browser
    for one in running.values():
        one.close()


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest, browsers: Callable[[str], Browser]) -> Browser:
    """The browser of the option --browser, Chromium by default; where there is none, the test is skipped."""
    return browsers(request.config.getoption("--browser"))


@pytest.fixture(scope="session")
def api_server() -> Iterator[FakeApi]:
    """Server of the page and of answers that tests write."""
    from fake_api import FakeApi

    with FakeApi().serve() as server:
        yield server


@pytest.fixture
def api(api_server: FakeApi) -> FakeApi:
    """Like api_server, with nothing left of other tests."""
    api_server.reset()
    return api_server


@pytest.fixture
def page(api: FakeApi, browser: Browser) -> Iterator[Page]:
    """The page, just opened. Fails in the end if a script failed, the policy was violated or it left the server."""
    page = browser.open(api.url)
    page.until("document.getElementById('model').value")
    yield page
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith((api.url, f"blob:{api.url}"))] == []
    page.close()


@pytest.fixture
def chromium(page: Page) -> ChromiumPage:
    """The page in Chromium, which emulates preferences of people and states of the network."""
    from chromium import ChromiumPage

    if not isinstance(page, ChromiumPage):
        pytest.skip("only Chromium emulates that")
    return page
