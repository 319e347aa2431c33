#!/usr/bin/env python3
"""Kill conversions with SIGKILL at random moments, resume them, and compare every byte.

    python tests/bench/kill_conversions.py --points 200

Takes turns among kinds of conversions (--kinds): of safetensors in one file and in shards, shard by shard (low-disk),
of FP8, of GGUF, calibrated, and replacing a model (--force). For every point, a process is killed at a random moment of
a conversion and, often, once or twice more on the way; each has another number of threads. Then a conversion runs to
its end, and the directory must be that of an uninterrupted one to the byte, with nothing beside it. Needs fork (Linux,
macOS). Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import npqwen_quant.steps
import npqwen_quant.writer
import numpy as np
from npqwen_quant import Shards, convert, convert_shards
from npqwen_quant.calibration import Calibration

sys.path[:0] = [str(Path(__file__).parents[1])]
from checkpoints import make_config, random_tensors, write_checkpoint  # noqa: E402
from gguf_files import encode, metadata, quantized  # noqa: E402
from quantizers import fp8, write_quantized  # noqa: E402

Conversion = Callable[[Path, int], None]

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 6000,
    "tie_word_embeddings": False,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fetched_from(source: Path) -> Shards:
    """The shards of a directory, which are fetched by copying, in small pieces that a kill may part."""

    def fetch(name: str, place: Path) -> Path:
        if (place / name).exists():
            return place / name
        with open(source / name, "rb") as there, open(place / f"{name}.incomplete", "wb") as here:
            while piece := there.read(1 << 16):
                here.write(piece)
        (place / f"{name}.incomplete").rename(place / name)
        return place / name

    return Shards("1", {path.name: path.stat().st_size for path in source.glob("*.safetensors")}, fetch)


def kinds(place: Path) -> dict[str, Conversion]:
    """Functions (out, threads) that convert, by name; checkpoints are written below `place`."""
    plain, sharded, scaled = place / "plain", place / "sharded", place / "fp8"
    write_checkpoint(plain, make_config(**SIZES))
    write_checkpoint(sharded, make_config(**SIZES), shards=5)
    config = make_config(**SIZES, quantization_config=FP8)
    write_quantized(scaled, config, random_tensors(config), partial(fp8, block=(128, 128)), shards=7)
    file = place / "model.gguf"
    whole = make_config(**SIZES, num_attention_heads=8)
    file.write_bytes(encode(metadata(whole), quantized("Q4_K", whole)[0]))
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (8, 48))

    def calibrated(out: Path, threads: int) -> None:
        convert(plain, out, 4, threads=threads, calibration=Calibration("text", lambda directory: ids))

    return {
        "one file": lambda out, threads: convert(plain, out, 4, threads=threads),
        "shards": lambda out, threads: convert(sharded, out, 3, threads=threads, shard_bytes=1_000_000),
        "low-disk": lambda out, threads: convert_shards(
            sharded, out, fetched_from(sharded), 8, threads=threads, shard_bytes=1_000_000
        ),
        "fp8": lambda out, threads: convert(scaled, out, 4, threads=threads),
        "fp8 low-disk": lambda out, threads: convert_shards(scaled, out, fetched_from(scaled), 16, threads=threads),
        "gguf": lambda out, threads: convert(file, out, 4, threads=threads),
        "calibrated": calibrated,
        "force": lambda out, threads: convert(plain, out, 16, threads=threads, force=True),
    }


def killed(conversion: Conversion, out: Path, threads: int, after: float) -> bool:
    """Run a conversion in a process of its own and kill it after some seconds; whether that was before its end."""
    child = os.fork()
    if not child:
        status = 1
        try:
            conversion(out, threads)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a conversion failed with status {status}")
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="names, separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    arguments = parser.parse_args()
    npqwen_quant.writer.SYNC_BYTES, npqwen_quant.steps.WEIGHTS = 200_000, 1 << 14
    chance = random.Random(arguments.seed)
    wrong = 0
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        place = Path(directory)
        chosen = kinds(place)
        chosen = {name: chosen[name] for name in arguments.kinds or chosen}
        want: dict[str, dict[str, bytes]] = {}
        seconds: dict[str, float] = {}
        tally = {name: [0, 0, 0] for name in chosen}
        for name, conversion in chosen.items():
            conversion(place / "want", 2)  # compiles, too
            want[name] = contents(place / "want")
            shutil.rmtree(place / "want")
            start = time.monotonic()
            conversion(place / "want", 2)
            seconds[name] = time.monotonic() - start
            if contents(place / "want") != want[name]:
                raise SystemExit(f"{name}: two conversions differ")
            shutil.rmtree(place / "want")
        for point in range(arguments.points):
            name = list(chosen)[point % len(chosen)]
            conversion, out = chosen[name], place / "work" / "out"
            out.parent.mkdir()
            if name == "force":
                convert(place / "plain", out, 8)
            for _ in range(chance.choice((1, 1, 2, 3))):
                if killed(conversion, out, chance.randint(1, 4), chance.random() * seconds[name] * 1.1):
                    tally[name][0] += 1
                    tally[name][1] += any(out.parent.glob(".out.partial-*/journal.json"))
                if name != "force" and out.exists():
                    break
            if name == "force" or not out.exists():
                conversion(out, chance.randint(1, 4))
            rest = sorted(path.name for path in out.parent.iterdir())
            if contents(out) != want[name]:
                print(f"point {point}, {name}: differs")
                wrong += 1
            elif rest != ["out"]:
                # A kill after the model had its name: the next conversion to the place tidies up.
                tally[name][2] += 1
                convert(place / "plain", out, 8, force=True)
                if sorted(os.listdir(out.parent)) != ["out"]:
                    print(f"point {point}, {name}: leaves {os.listdir(out.parent)}")
                    wrong += 1
            shutil.rmtree(out.parent)
    print("| conversion | seconds | kills | with a journal | after the name was given |\n|---|---|---|---|---|")
    for name, (kills, journals, late) in tally.items():
        print(f"| {name} | {seconds[name]:.2f} | {kills} | {journals} | {late} |")
    print(f"{arguments.points} points, {sum(kills for kills, _, _ in tally.values())} kills, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
