"""Which instruction set the kernels are compiled for: the best this processor has, or NPQWEN_ISA's."""

from __future__ import annotations

import os
import platform

from numba.core.registry import cpu_target

from npqwen.errors import OptionError
from npqwen.simd.arm import Neon
from npqwen.simd.instructions import InstructionSet
from npqwen.simd.x86 import Avx2, Avx512, AvxVnni

BEST_FIRST: tuple[type[InstructionSet], ...] = (Avx512, AvxVnni, Avx2, Neon, InstructionSet)


def available() -> list[type[InstructionSet]]:
    """What Numba compiles for here, best first.

    Asks Numba, not the processor: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES can narrow it.
    """
    features = _features()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return [isa for isa in BEST_FIRST if isa.features <= features and (isa is not Neon or arm)]


def choose(name: str | None) -> InstructionSet:
    """The instruction set of that name, or the best; OptionError if this processor lacks it."""
    names = {isa.name: isa for isa in available()}
    if not name:
        return available()[0]()
    if name not in names:
        raise OptionError(f"NPQWEN_ISA={name} cannot run here; this processor offers {', '.join(names)}")
    return names[name]()


def _features() -> frozenset[str]:
    codegen = cpu_target.target_context.codegen()
    listed = codegen.magic_tuple()[-1]
    return frozenset(f[1:] for f in listed.split(",") if f.startswith("+"))


ISA = choose(os.environ.get("NPQWEN_ISA"))
