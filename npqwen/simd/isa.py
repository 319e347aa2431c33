"""Which instruction set the kernels are compiled for: the best this processor has, or NPQWEN_ISA's."""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

from npqwen.errors import OptionError
from npqwen.simd.arm import Neon, NeonI8mm
from npqwen.simd.instructions import InstructionSet
from npqwen.simd.x86 import Amx, AmxBf16, Avx2, Avx512, Avx512Vbmi, AvxVnni

BEST_FIRST: tuple[type[InstructionSet], ...] = (
    AmxBf16, Amx, Avx512Vbmi, Avx512, AvxVnni, Avx2, NeonI8mm, Neon, InstructionSet,
)  # fmt: skip


def available() -> list[type[InstructionSet]]:
    """The instruction sets that Numba can compile for here, best first.

    Queries Numba's target, not CPUID: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES can narrow it.
    """
    triple, cpu, listed = cpu_target.target_context.codegen().magic_tuple()
    features = {f[1:] for f in listed.split(",") if f.startswith("+")}
    if has_dot_product(triple, cpu, listed):
        features.add("dotprod")
    if has_matrix_product(triple, cpu, listed):
        features.add("i8mm")
    return [isa for isa in BEST_FIRST if isa.features <= features and isa.allowed()]


def choose(name: str | None) -> InstructionSet:
    """The instruction set of that name, or the best; OptionError if this processor lacks it."""
    names = {isa.name: isa for isa in available()}
    if not name:
        return available()[0]()
    if name not in names:
        raise OptionError(f"NPQWEN_ISA={name} cannot run here; this processor offers {', '.join(names)}")
    return names[name]()


_SUM_OF_BYTES = """
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define i32 @sum(<16 x i8> %bytes) {
  %wide = zext <16 x i8> %bytes to <16 x i32>
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %wide)
  ret i32 %sum
}
define i32 @product(<16 x i8> %bytes, <16 x i8> %signed) {
  %wide = zext <16 x i8> %bytes to <16 x i32>
  %wider = sext <16 x i8> %signed to <16 x i32>
  %products = mul <16 x i32> %wide, %wider
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}
"""


def has_dot_product(triple: str, cpu: str, features: str) -> bool:
    """Whether LLVM may use AArch64's `sdot` and `udot` for this processor.

    LLVM's list of an Arm host's features omits them (on macOS it is empty), as LLVM derives them from the core's name.
    So this compiles a sum of bytes, which becomes `udot` if LLVM may use it.
    """
    return "udot" in _assembly(triple, cpu, features)


def has_matrix_product(triple: str, cpu: str, features: str) -> bool:
    """Whether LLVM may use AArch64's `smmla` for this processor.

    It belongs to the same extension as `usdot`, which LLVM emits for a sum of products of signed and unsigned bytes.
    """
    return "usdot" in _assembly(triple, cpu, features)


def _assembly(triple: str, cpu: str, features: str) -> set[str]:
    """The instructions that LLVM emits for sums of bytes on an AArch64 processor; none for another."""
    if not triple.startswith(("aarch64", "arm64")):
        return set()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    lines = machine.emit_assembly(llvm.parse_assembly(_SUM_OF_BYTES)).splitlines()
    # Apple's assembly syntax has `udot.4s`.
    return {line.split()[0].partition(".")[0] for line in lines if line.strip()}


ISA = choose(os.environ.get("NPQWEN_ISA"))
