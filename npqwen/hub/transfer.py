"""From a checkpoint, wherever it is, to a converted directory: checks, notices, download and conversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npqwen.errors import OptionError
from npqwen.format.config import Config
from npqwen.format.quantization import is_converted
from npqwen.format.recipe import Recipe
from npqwen.hub.disk_space import check_disk_space, converted_bytes, free_bytes
from npqwen.hub.names import original
from npqwen.hub.repository import HubSource, download_directory
from npqwen.hub.source import GgufSource, LocalSource, Source
from npqwen.hub.support import quantized_format
from npqwen.wording import size

if TYPE_CHECKING:
    from npqwen_quant.adapter import AdapterFile
    from npqwen_quant.calibration import Calibration

Progress = Callable[[int, int], None]


class Transfer:
    """Downloads and converts one source.

    notice(line): receives notices. bars: let huggingface_hub draw its progress bars on stderr. progress(done, total):
    receives bytes converted so far.
    """

    def __init__(self, source: Source, notice: Callable[[str], None], bars: bool, progress: Progress | None) -> None:
        self.source = source
        self._notice = notice
        self._bars = bars
        self._progress = progress

    def converted_already(self, *, download: bool = True) -> Path | None:
        """The directory of a source that is a converted model itself, downloaded if it is on the hub; else None."""
        source = self.source
        if "config.json" not in source.files or not is_converted(source.small_file("config.json").parent):
            return None
        if isinstance(source, HubSource):
            if download:
                self._announce_download(source, None, None)
                return source.download(weights=True, bars=self._bars)
            return source.small_file("config.json").parent
        assert isinstance(source, LocalSource)
        return source.directory

    def directory(self) -> Path:
        """The checkpoint's directory or GGUF file, which is downloaded if it is on the hub."""
        if isinstance(self.source, HubSource):
            return self.source.download(weights=True, bars=self._bars)
        assert isinstance(self.source, LocalSource | GgufSource)
        return self.source.directory

    def update(self, other: Path, target: Path) -> None:
        """Convert to `target` with the weights of `other`, a conversion: only small files of the source are needed."""
        from npqwen_quant import update

        source = self.source
        if isinstance(source, HubSource):
            directory = source.download(weights=False, bars=False)
        else:
            assert isinstance(source, LocalSource)
            directory = source.directory
        update(other, directory, target)
        self._notice(
            f"the weights of {source.label} were converted before: only small files are new, in {target}"
        )

    def convert(
        self,
        target: Path,
        recipe: Recipe,
        *,
        low_disk: bool = False,
        force: bool = False,
        once: bool = False,
        calibration: Callable[[Path], Calibration] | None = None,
        calibration_progress: Progress | None = None,
        adapters: Sequence[AdapterFile] = (),
    ) -> None:
        """Convert to `target`, after a download if the source is on the hub. See `npqwen.hub.convert`.

        once: whether the notice says that the conversion is done only once.
        """
        from npqwen_quant import convert

        source = self.source
        if isinstance(source, HubSource):
            if low_disk and source.gguf:
                raise OptionError(
                    f"low_disk (--low-disk) does not work with GGUF files; without it, {source.label} is downloaded as "
                    f"a whole, and npqwen rm --download {source.repository} removes it afterwards"
                )
            if low_disk:
                self._convert_shards(source, target, recipe, force)
                return
            self._announce_download(source, target, recipe)
        directory = self.directory()
        self._tell_of_source(recipe, directory)
        times = "once, " if once else ""
        convert(
            directory,
            target,
            recipe.bits,
            force=force,
            progress=self._announced(f"converting {source.label} to {recipe.name}, {times}into {target}"),
            calibration=None if calibration is None else calibration(directory),
            calibration_progress=calibration_progress,
            adapters=adapters,
            notice=self._notice,
        )

    def _tell_of_source(self, recipe: Recipe, path: Path) -> None:
        """Send notices if parts of the source are left out, or if it is quantized already. path: where it is."""
        source = self.source
        if source.has_images:
            self._notice(f"{source.label} is multimodal; npqwen runs its text part, without images")
        found = self._quantization(path)
        if found and recipe.matrices.is_integer:
            known = original(source.model, source.originals)
            better = "" if known is None else f"; the original, {known}, loses less"
            self._notice(
                f"{source.label} is quantized already ({found}); quantizing it again adds error, which npqwen convert "
                f"--evaluate measures{better}"
            )

    def _quantization(self, path: Path) -> str:
        """How the source's weights are quantized, for messages; "" if they are not."""
        if self.source.gguf:
            file = self.source if isinstance(self.source, GgufSource) else GgufSource(path)
            return ", ".join(file.quantized[:3])
        found = quantized_format(self.source)
        return "" if found is None else found.description

    def _convert_shards(self, source: HubSource, target: Path, recipe: Recipe, force: bool) -> None:
        from npqwen_quant import Shards, convert_shards

        shards = {name: source.files[name].nbytes for name in source.shards}
        largest = max(shards.values())
        converted = self._converted_bytes(recipe, sum(shards.values()))
        self._notice(
            f"downloading {source.label} file by file, {size(sum(shards.values()))} in all and {size(largest)} at a "
            f"time, and converting it to {recipe.name}, about {size(converted)}, into {target} "
            f"({size(free_bytes(target))} free)"
        )
        directory = source.download(weights=False, bars=False)
        self._tell_of_source(recipe, directory)

        def fetch(name: str, place: Path) -> Path:
            return source.shard(name, place, self._bars)

        convert_shards(
            directory,
            target,
            Shards(source.weights_digest, shards, fetch),
            recipe.bits,
            force=force,
            progress=self._progress,
            notice=self._notice,
        )

    def _announce_download(self, source: HubSource, target: Path | None, recipe: Recipe | None) -> None:
        """Send a notice of what is downloaded and converted, and where; OutputError if it does not fit on the disks."""
        from npqwen_quant.working import held_bytes

        place = download_directory()
        rest = source.missing(source.wanted)
        needs = {place: ("to download", rest)}
        line = f"downloading {source.label}: {size(rest)} into {place} ({size(free_bytes(place))} free)"
        advice = "free some, or name other places in HF_HOME and NPQWEN_CACHE"
        if target is not None and recipe is not None:
            weights = sum(source.files[name].nbytes for name in source.shards)
            converted = self._converted_bytes(recipe, weights)
            needs[target.parent] = ("for the conversion", max(0, converted - held_bytes(target)))
            line += f", then converting it to {recipe.name}, about {size(converted)}"
            largest = max((source.files[name].nbytes for name in source.shards), default=0)
            if largest < rest:
                advice += f", or use low_disk (--low-disk), which needs {size(largest + converted)} at a time"
        check_disk_space(source.label, needs, advice)
        if rest:
            self._notice(line)

    def _converted_bytes(self, recipe: Recipe, weights: int) -> int:
        source = self.source
        if isinstance(source, HubSource) and source.gguf:  # its config is in the file, so this is an estimate
            return weights if source.parameters is None else int(source.parameters * (recipe.bits + 0.6) / 8)
        config = Config.from_dict(self.source.raw_config, f"{self.source.label}: config.json")
        return converted_bytes(config, recipe, weights) or weights

    def _announced(self, line: str) -> Progress:
        """The progress function, with a notice on its first call: by then the converter has checked the source."""

        def announced(done: int, total: int) -> None:
            nonlocal line
            if line:
                self._notice(line)
                line = ""
            if self._progress is not None:
                self._progress(done, total)

        return announced
