"""Compiled kernels on disk: stored, found again, distinguished, and compiled each time where they cannot be stored."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from numba import njit
from numba.core import event
from numba.core.registry import CPUDispatcher

import npqwen
from npqwen.kernels.compile_events import FUNCTIONS, raising_interrupts
from npqwen.kernels.compiled import _SOURCES, address_of, kernel_directory
from npqwen.kernels.entry import entry
from npqwen.model import load
from npqwen.simd.amx import release

# A small kernel that shares the package's helpers, compiled as models' are.
SMALL = """
import sys
import numpy as np
from npqwen.reports.bandwidth import read
from npqwen.kernels.compile_events import reporting
from npqwen.kernels.compiled import compile_kernel, kernel_directory
from npqwen.engine.team import Team
calls = []
team = Team(1)
data, sums = np.ones(100_096, np.float32), np.zeros(64, np.float32)
with reporting(lambda done, total: calls.append((done, total))):
    compile_kernel(read, (team.row(0), 0, data, sums))
team.run(read, data, sums)
assert sums.sum() == 100_096, sums
print(kernel_directory())
print(*calls)
"""
LOAD = """
import sys
from pathlib import Path
from npqwen.model import load
calls, adapters = [], {name: f"{path}/{name}" for path, name in zip(sys.argv[2::2], sys.argv[3::2])}
report = lambda *state: calls.append(state)
with load(Path(sys.argv[1]), threads=1, adapters=adapters, on_compile=report) as model:
    model.logits([1, 2, 3])
print(calls)
"""
# A pass over two pages of the KV cache, and what it left there.
PASS = """
import hashlib
import sys
from pathlib import Path
from npqwen.model import load
compiled = []
with load(Path(sys.argv[1]), threads=1, on_compile=lambda *state: compiled.append(state)) as model:
    cache = model.new_cache()
    found = hashlib.sha256(model.prefill(range(5, 300), cache))
    for page in cache.pages(295):
        found.update(page.tobytes())
print(bool(compiled))
print(found.hexdigest())
"""


def start(code: str, *args: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe, env = subprocess.PIPE, {**os.environ, **environment}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The output lines of a process that succeeds and writes nothing to stderr."""
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def small(cache: Path) -> tuple[Path, list[tuple[int, int]]]:
    """The small kernel's directory, and the reported progress of its compilation."""
    directory, calls = finish(start(SMALL, NPQWEN_CACHE=str(cache)))
    return Path(directory), [(int(done), int(of)) for done, of in re.findall(r"\((\d+), (\d+)\)", calls)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the small kernel."""
    cache = tmp_path_factory.mktemp("filled") / "not" / "there" / "yet"
    directory, calls = small(cache)
    assert directory.parent == cache / "kernels"
    assert len(list(directory.iterdir())) == 2  # numba's index and code
    assert calls[0] == (0, FUNCTIONS)
    assert calls[-1] == (FUNCTIONS, FUNCTIONS)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    return cache


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy of `filled`, to be damaged."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def test_a_second_process_compiles_nothing(cache: Path) -> None:
    assert small(cache)[1] == []


def test_a_second_process_loads_a_model_without_compiling(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1):
        pass
    assert finish(start(LOAD, tiny(4))) == ["[]"]


def test_adapters_kernels_are_loaded_too(tiny: Callable[[int], Path], kernels: Path) -> None:
    adapter, stored = Path(__file__).parents[1] / "data" / "adapters", []
    for _ in range(2):
        finish(start(LOAD, tiny(4), adapter, "linear"))
        stored.append(sorted(path.name for path in kernels.glob("low_rank.*")))
    assert stored[0]
    assert stored[1] == stored[0]


@pytest.mark.parametrize("helper", [njit(lambda: None), release], ids=["function", "operation"])
def test_a_kernel_that_could_not_be_found_again_is_refused(helper: Any) -> None:
    """Numba looks a kernel up by a pickle of its closure, and a function's pickle differs in every process."""
    with pytest.raises(TypeError, match=r"chooses holds .*; choose it inside, by a constant"):

        @entry()
        def chooses() -> None:
            helper()


def test_compiled_code_computes_the_same_when_it_is_loaded_again(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    """A process that compiles links other copies of small functions than one that loads: they may differ in no bit."""
    (compiled, first), (loaded, second) = (finish(start(PASS, tiny(8), NPQWEN_CACHE=str(tmp_path))) for _ in range(2))
    assert (compiled, loaded) == ("True", "False")
    assert first == second


def test_the_directory_depends_on_sources_versions_and_processor(tmp_path: Path) -> None:
    """So machine code of other sources or for another processor is never loaded."""
    copy = Path(shutil.copytree(Path(npqwen.__file__).parent, tmp_path / "npqwen"))
    code = "from npqwen.kernels.compiled import kernel_directory as d; import npqwen; print(npqwen.__file__, d().name)"

    def name(**environment: str) -> str:
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        (line,) = finish(start(code, cwd=tmp_path, PYTHONPATH=path, **environment))
        file, name = line.split()
        assert Path(file).is_relative_to(tmp_path)
        return name

    assert name() == kernel_directory().name
    names = {name()}
    changed = ["engine/forward.py", "kernels/pieces.py", "kernels/norm.py", "simd/scalar.py"]
    for source in changed:
        with open(copy / source, "a", encoding="utf-8") as file:
            file.write("\n# changed\n")
        names.add(name())
    assert len(names) == len(changed) + 1
    (copy / "kernels" / "new.py").write_text("")
    names.add(name())
    names.add(name(NPQWEN_ISA="portable"))
    names.add(name(NPQWEN_ISA="portable", NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert len(names) >= len(changed) + 3  # a machine may have no other instruction set than the portable one
    with open(copy / "cli.py", "a", encoding="utf-8") as file:
        file.write("\n# no kernel\n")
    assert name() in names


def unwritable(tmp_path: Path) -> Path:
    """A cache directory that not even root can create: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def test_without_a_writable_cache_kernels_are_compiled_in_each_process(tmp_path: Path) -> None:
    cache = unwritable(tmp_path)
    for _ in range(2):
        out, err = start(SMALL, NPQWEN_CACHE=str(cache)).communicate(timeout=300)
        assert out.endswith(f"({FUNCTIONS}, {FUNCTIONS})\n")
        assert err.count("KernelCacheWarning") == 1
        assert f"{cache / 'kernels'}" in err
        assert "cannot be written: kernels are compiled at every start" in err


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_read(cache: Path, tmp_path: Path) -> None:
    directory = next((cache / "kernels").iterdir())
    try:
        directory.chmod(0o555)
        assert small(cache)[1] == []
        for file in list(directory.iterdir()):
            directory.chmod(0o755)
            file.unlink()
            directory.chmod(0o555)
        assert small(cache)[1] != []
    finally:
        directory.chmod(0o755)


@pytest.mark.parametrize("locator", ["InTreeCacheLocator", "UserWideCacheLocator", "NoSuchLocator"])
def test_numbas_setting_of_cache_locators_does_not_apply(cache: Path, locator: str) -> None:
    directory, calls = finish(start(SMALL, NPQWEN_CACHE=str(cache), NUMBA_CACHE_LOCATOR_CLASSES=locator))
    assert (Path(directory).parent, calls) == (cache / "kernels", "")


def test_importing_the_cache_chooses_no_instruction_set() -> None:
    code = "import sys, npqwen_quant.blocks; print('npqwen.simd.isa' in sys.modules)"
    assert finish(start(code)) == ["False"]


def test_of_two_processes_at_once_one_compiles(tmp_path: Path) -> None:
    both = [start(SMALL, NPQWEN_CACHE=str(tmp_path)) for _ in range(2)]
    waited, compiled = sorted((finish(process)[1] for process in both), key=len)
    assert waited in ("", f"(0, {FUNCTIONS}) ({FUNCTIONS}, {FUNCTIONS})")
    assert len(compiled) > len(waited)
    assert small(tmp_path)[1] == []
    assert not [*tmp_path.rglob("*.tmp*"), *tmp_path.rglob("*.lock")]


def test_no_two_functions_of_the_kernels_share_a_name(tiny: Callable[[int], Path], tiny_moe: Path) -> None:
    """The linker identifies functions by name, types and a number that starts again in every process.

    Two functions that differ by the number alone could be mistaken for each other if different processes compiled them.
    """
    for path in (tiny(4), tiny(16), tiny_moe):
        with load(path, threads=1):
            pass
    functions = defaultdict(set)
    for one in gc.get_objects():
        if CPUDispatcher in type(one).__mro__ and one.py_func.__module__.startswith("npqwen."):
            values = [repr(cell.cell_contents) for cell in one.py_func.__closure__ or ()]
            functions[one.py_func.__module__, one.py_func.__qualname__].add((one.py_func.__code__, *values))
    assert len(functions) > 50
    # Lambdas are of overloads, which differ by types.
    assert [name for name, found in functions.items() if len(found) > 1 and not name[1].endswith("<lambda>")] == []



@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_ctrl_c_in_a_callback_is_heard(error: type[BaseException]) -> None:
    """Numba compiles with functions that LLVM calls back; exceptions do not leave them."""
    ignored: list[Any] = []

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        raise error

    kernel = SimpleNamespace(address=None, compile=callback, __wrapped__=None)
    hook = ignored.append
    with mock.patch("npqwen.kernels.compiled.KernelCache"), mock.patch.object(sys, "unraisablehook", hook):
        # This kernel has no address.
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else TypeError):
            address_of(kernel)
        assert sys.unraisablehook is hook
    assert [found.exc_type for found in ignored] == ([] if error is KeyboardInterrupt else [error])


def test_threads_that_compile_leave_the_hook_of_ctrl_c_as_it_was() -> None:
    hook, compiling, done = sys.unraisablehook, threading.Event(), threading.Event()

    def compile_elsewhere() -> None:
        with raising_interrupts():
            compiling.set()
            done.wait(60)

    thread = threading.Thread(target=compile_elsewhere)
    thread.start()
    compiling.wait(60)
    with raising_interrupts():
        done.set()
        thread.join()
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("broken", [False, True])
def test_ctrl_c_in_a_callback_ends_the_compilation_soon(broken: bool) -> None:
    """Before the next pass of the compiler, or as the callback's victim fails."""
    passes: list[int] = []

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        raise KeyboardInterrupt

    def compile() -> None:
        for number in range(3):
            with event.trigger_event("numba:run_pass"):
                passes.append(number)
                if number == 1:
                    callback()
                    if broken:
                        raise RuntimeError("the library is not finalized")

    kernel = SimpleNamespace(address=None, compile=compile, __wrapped__=None)
    with mock.patch("npqwen.kernels.compiled.KernelCache"), pytest.raises(KeyboardInterrupt):
        address_of(kernel)
    assert passes == [0, 1]


def test_all_compiled_sources_tell_one_cache_from_another() -> None:
    """Otherwise an upgrade that changes one of them would run the machine code of the version before."""
    package = Path(npqwen.__file__).parent
    is_compiled = re.compile(r"^\s*@njit|= njit\(|^@step$", re.M)
    compiled = {path for path in package.rglob("*.py") if is_compiled.search(path.read_text(encoding="utf-8"))}
    known = {path for source in _SOURCES for path in [package / source, *(package / source).glob("*.py")]}
    assert {package / "engine" / "draft_input.py", package / "engine" / "steps.py"} <= compiled
    assert compiled <= known
