"""Compiling the kernels that a model's forward pass calls by address, in a process of their own.

The command line starts it on a machine's first run (npqwen/commands/compile_helper.py), which compiles the forward pass
meanwhile. Both store what they compile in the kernel directory, and wait for a function that the other compiles.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from npqwen.engine.cache_type import PAGE_DTYPES, check_cache_type
from npqwen.format.config import Config
from npqwen.format.quantization import Quantization
from npqwen.kernels.append import append_kernels
from npqwen.kernels.attention import attention_kernels
from npqwen.kernels.gated_delta import gated_delta_kernel
from npqwen.kernels.matmul import matmul_kernels


def compile_entries(path: Path, kv: str | None) -> None:
    """Compile the kernels that the model in the converted directory `path` calls by address.

    kv: the KV cache's type; None: the default.
    """
    quantization = Quantization.from_directory(path)
    page_dtype = PAGE_DTYPES[quantization.recipe.cache_type if kv is None else check_cache_type(kv)]
    matmul_kernels({encoding.code for encoding in quantization.encodings.values()})
    attention_kernels(page_dtype)
    append_kernels(page_dtype)
    if Config.from_directory(path).recurrence is not None:
        gated_delta_kernel()


def _exit_with_parent() -> None:
    """End this process when its parent has ended, or closed the pipe to its stdin."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Compile for the arguments of the command line: the converted directory, then the type of the cache or nothing."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    compile_entries(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
