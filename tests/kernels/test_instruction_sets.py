"""Kernels for every other instruction set that this processor offers, and logits for the least of them.

The instruction set is chosen when npqwen is imported, so each has a pytest process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from npqwen.errors import OptionError
from npqwen.simd.isa import ISA, available, choose
from npqwen.simd.x86 import AmxBf16

ROOT = Path(__file__).parents[1]
EMULATED = "emulated_amx"
OTHERS = [isa.name for isa in available() if isa.name != ISA.name]
if AmxBf16 not in available():
    OTHERS.append(EMULATED)
KERNELS = ["kernels/test_kernels.py", "kernels/test_attention.py", "kernels/test_gated_delta.py"]
LOGITS = [
    "engine/test_parity.py::test_logits_of_transformers",
    "engine/test_parity.py::test_tokens_of_the_quantized_oracle",
    "engine/test_parity.py::test_prompts_of_the_quantized_oracle",
]
OF_PROMPTS = ["kernels/test_prompt_matmul.py", "engine/test_long_prompts.py"]
OF_AMX = ["kernels/test_amx.py::test_results_are_those_without_amx_to_the_bit"]
TESTS = {
    "avx2": [*KERNELS, *LOGITS],
    AmxBf16.name: [*KERNELS, *LOGITS, *OF_PROMPTS],
    EMULATED: [*OF_PROMPTS, *OF_AMX, "-k", "not int3 and not int4 and not int6"],
}
"""By instruction set; KERNELS for the others, between which only these differ. The emulation runs whole models with the
portable operations."""


Runs = dict[str, tuple["subprocess.Popen[bytes]", Path]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The processes and their log files, by instruction set."""
    kept = request.config.cache
    started: Runs = {}
    for name in OTHERS:
        out = tmp_path_factory.mktemp(name)
        cache = out / "cache" if kept is None else kept.mkdir(f"npqwen-{name}")
        command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *TESTS.get(name, KERNELS)]
        environment = {**os.environ, "NPQWEN_ISA": name}
        if name == EMULATED:
            command += ["-p", name]
            environment["NPQWEN_ISA"] = ISA.name
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(out / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        started[name] = process, out / "log"
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", OTHERS)
def test_instruction_set(runs: Runs, name: str) -> None:
    process, log = runs[name]
    status = process.wait(timeout=900)
    assert status == 0, log.read_text(encoding="utf-8", errors="replace")[-3000:]


def test_the_portable_kernels_run_anywhere() -> None:
    assert available()[-1].name == "portable"
    assert choose("").name == choose(None).name == available()[0].name
    assert choose("portable").name == "portable"


def test_an_instruction_set_that_this_processor_lacks_is_refused() -> None:
    with pytest.raises(OptionError, match=r"NPQWEN_ISA=mmx cannot run here; this processor offers .*portable"):
        choose("mmx")
    code = "import npqwen.simd.isa"
    environment = {**os.environ, "NPQWEN_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NPQWEN_ISA=mmx cannot run here" in done.stderr
