"""The two files of a batch, in OpenAI's format: one request, or one answer, per line."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from npqwen.atomic_file import check_parent, check_regular, new_file, sync_file, writing
from npqwen.errors import OptionError
from npqwen.file_lock import try_lock
from npqwen.server.fields import FieldError, parse_fields
from npqwen.server.json_text import json_text
from npqwen.wording import alternatives, quoted, shortened, unreadable

if TYPE_CHECKING:
    from typing_extensions import Self

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
LINE_LIMIT = 32_000_000
"""Most bytes of a line, unless `BatchOutput` wrote it: a request that fills a context of 262,144 tokens has a few
million."""

_FIRST = b'{"id":"batch_req_'
_BEGINNING = re.compile(_FIRST + rb'[0-9a-f]+","custom_id":("(?:[^"\\]|\\.)*"),')
"""The beginning of an answer as `BatchOutput` writes it; the group is the custom_id, as JSON."""


@dataclass(frozen=True)
class BatchRequest:
    """One request. url: its endpoint. body: what a client would send there."""

    custom_id: str
    url: str
    body: dict[str, Any]


class BatchInput:
    """A file of requests, checked as a whole before the first is answered.

    path: the file. name: of the file in messages. custom_ids: the requests' ids, in order; each is unique. models: the
    names of the models that the requests name, "" for none.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """name: by default, the path. Raises OptionError, with the line's number, for a file that cannot be read or is
        not a batch.
        """
        self.path, self.name = path, name or str(path)
        self._places: dict[str, int] = {}
        self.models: set[str] = set()
        number = 0
        try:
            with open(path, "rb") as file:
                while line := file.readline(LINE_LIMIT + 1):
                    number += 1
                    if line.strip():
                        request = self._parsed(line, number)
                        if request.custom_id in self._places:
                            raise self._error(number, f"repeats the custom_id {quoted(request.custom_id)}")
                        self._places[request.custom_id] = file.tell() - len(line)
                        self.models.add(str(request.body.get("model") or ""))
        except OSError as error:
            raise OptionError(unreadable(self.name, error)) from None
        if not self._places:
            raise OptionError(f"{self.name} has no requests; write one per line, as JSON")
        self.custom_ids = list(self._places)

    def read(self, custom_id: str) -> BatchRequest:
        """The request of this id. Raises OptionError if the file has changed."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._places[custom_id])
                found = self._parsed(file.readline(LINE_LIMIT + 1), 0)
        except (OSError, OptionError):
            found = None
        if found is None or found.custom_id != custom_id:
            raise OptionError(f"{self.name} changed while its requests were answered; do not write to it meanwhile")
        return found

    def _parsed(self, line: bytes, number: int) -> BatchRequest:
        if len(line) > LINE_LIMIT:
            raise self._error(number, f"is longer than {LINE_LIMIT} bytes")
        try:
            found = parse_fields(line.strip()).values
        except FieldError as error:
            raise self._error(number, str(error).removeprefix("the body ")) from None
        custom_id, url, body = found.get("custom_id"), found.get("url"), found.get("body")
        if not isinstance(custom_id, str) or not custom_id:
            raise self._error(number, "has no custom_id, a text that names the request")
        if found.get("method", "POST") != "POST":
            raise self._error(number, f"has the method {quoted(found['method'])}; it must be POST")
        if url not in ENDPOINTS:
            raise self._error(number, f"has the url {quoted(url)}; it must be {alternatives(list(ENDPOINTS))}")
        if not isinstance(body, dict):
            raise self._error(number, "has no body, the object that is sent to the url")
        return BatchRequest(custom_id, url, body)

    def _error(self, number: int, problem: str) -> OptionError:
        return OptionError(f"{self.name}, line {number} {problem}")


class Answers(Protocol):
    """What answers are written to. answered: the custom_ids of requests that need no answer."""

    answered: set[str]

    def write(self, answer: dict[str, Any]) -> None:
        """Append one answer."""


class BatchOutput:
    """A file of answers, to append to. Answers of an earlier run are kept. The file does not change before the first
    answer is written; an incomplete last line is removed then. On exit, an answer takes the place of an earlier one to
    the same request, and a new file without answers is deleted.

    answered: the custom_ids of the requests that need no other answer: theirs is not an error.
    """

    def __init__(self, path: Path, requests: BatchInput) -> None:
        """Raises OptionError for the file of requests itself, and for a file that has anything but answers to these
        requests or that another process is writing; OutputError if it cannot be written or is not a regular file."""
        self._path = path
        self.answered: set[str] = set()
        self._places: dict[str, tuple[int, int]] = {}  # offset and length of each request's last answer
        self._repeats = self._changed = False
        with writing(path):
            self._is_new = not path.exists()
            if not self._is_new and path.samefile(requests.path):
                raise OptionError(f"INPUT and OUTPUT are the same file, {path}; choose another file for the answers")
            check_parent(path)
            check_regular(path)
            self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115
        try:
            with writing(path):
                if not (try_lock(self._file) and os.path.samestat(os.fstat(self._file.fileno()), path.stat())):
                    raise OptionError(f"{path} is being written by another process; wait until it ends")
                self._file.seek(0)
                self._end = self._read(set(requests.custom_ids))
        except BaseException:
            self._file.close()
            raise

    def _read(self, known: set[str]) -> int:
        """Note which requests are answered; returns the offset after the last answer."""
        end = 0
        while line := self._next():
            custom_id, failed = _answered(line)
            if custom_id in known:
                self._note(custom_id, end, len(line))
                (self.answered.discard if failed else self.answered.add)(custom_id)
            elif line.endswith(b"\n") or not _was_cut(line, known, alone=not end):
                raise self._foreign(line)
            else:
                break
            end += len(line)
        return end

    def _next(self) -> bytes:
        """The next line; OptionError for a long one that is not ours, such as the whole of a large file."""
        line = self._file.readline(LINE_LIMIT)
        if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            if not _BEGINNING.match(line):
                raise self._foreign(line)
            line += self._file.readline()
        return line

    def _foreign(self, line: bytes) -> OptionError:
        found = shortened(line[:1000].decode(errors="replace").strip())
        return OptionError(
            f"{self._path} exists, and this line of it answers none of these requests: {found}; choose another file"
        )

    def write(self, answer: dict[str, Any]) -> None:
        """Append one answer; OutputError if it cannot be written, as when the disk is full."""
        with writing(self._path):
            if not self._changed:
                self._changed = True
                self._mend()
            line = json_text(answer).encode() + b"\n"
            self._file.write(line)
            self._file.flush()
            self._note(answer["custom_id"], self._end, len(line))
            self._end += len(line)

    def _note(self, custom_id: str, offset: int, length: int) -> None:
        self._repeats |= custom_id in self._places
        self._places[custom_id] = offset, length

    def _mend(self) -> None:
        """Let the file end after the newline of its last answer."""
        self._file.truncate(self._end)
        self._file.seek(max(0, self._end - 1))
        if self._file.read(1) not in (b"", b"\n"):
            self._file.write(b"\n")
            self._end += 1

    def _drop_replaced(self) -> None:
        """Rewrite the file with the last answer to each request, in the place of its first one."""
        with new_file(self._path) as new, open(self._path, "rb") as old:
            for offset, length in self._places.values():
                old.seek(offset)
                new.write(old.read(length).rstrip(b"\n") + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self._path):
            with self._file:
                self._file.flush()
                sync_file(self._file.fileno())
                empty = not self._file.seek(0, os.SEEK_END)
                if sys.platform == "win32":
                    self._file.close()  # an open file cannot be replaced there
                if self._repeats:
                    self._drop_replaced()
            if empty and self._is_new:  # nothing was answered: an unknown model, say
                self._path.unlink()


def _answered(line: bytes) -> tuple[str | None, bool]:
    """The custom_id of an answer, None if the line is none; and whether the answer is an error."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
        return None, False
    response, error = found.get("response"), found.get("error")
    if error:
        return found["custom_id"], True
    if not isinstance(response, dict):
        return None, False
    return found["custom_id"], response.get("status_code", 200) != 200


def _was_cut(line: bytes, known: set[str], *, alone: bool) -> bool:
    """Whether a last line without a newline is the beginning of an answer that `BatchOutput.write` did not complete.

    known: the custom_ids of the requests. alone: no answers precede it; then the line itself must have one of these.
    """
    found = _BEGINNING.match(line)
    if found is None:
        return not alone and (line.startswith(_FIRST) or _FIRST.startswith(line))
    try:
        return json.loads(found[1]) in known
    except ValueError:
        return False
