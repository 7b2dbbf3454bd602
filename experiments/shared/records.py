"""The finished pieces of a study, kept as lines of JSON from which an interrupted run goes on."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

Key = tuple[Any, ...]
"""What a record is of: its kind, then what tells it from others of its kind."""

Record = dict[str, Any]
RecordsByKey = dict[Key, Record]


class Records(NamedTuple):
    """The finished pieces of a study by their keys, and the file that they are in."""

    by_key: RecordsByKey
    file: BinaryIO

    def get(self, key: Key, make: Callable[[], Record]) -> Record:
        """The record of that key, made and written now if there is none yet."""
        if key not in self.by_key:
            record = {"key": key} | make()
            self.file.write(f"{json.dumps(record)}\n".encode())
            self.file.flush()
            self.by_key[key] = record
        return self.by_key[key]


@contextlib.contextmanager
def open_records(path: pathlib.Path) -> Iterator[Records]:
    """The records, for this process alone to add to; ValueError if another one does."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {path}: wait for it, or stop it") from error
        file.seek(0)
        # A run that was killed may have left half a line.
        file.truncate(file.read().rfind(b"\n") + 1)
        yield Records(read_records(path), file)


def read_records(path: pathlib.Path) -> RecordsByKey:
    """Finished records by key, in the order they were made; ValueError if the file is damaged."""
    records = {}
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                records[tuple(record["key"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number} is damaged; delete it to do that piece again"
                ) from error
    return records


def of_kind(records: RecordsByKey, kind: str) -> list[Record]:
    return [record for key, record in records.items() if key[0] == kind]
