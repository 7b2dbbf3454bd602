"""Files that a reader, or a run that was killed, sees whole or not at all."""

import os
import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces the file at once, by one beside it that is on disk before it takes the name.

    A link is replaced, never followed: neither at the name nor beside it does anything outside the
    folder change.

    Args:
      path: the file.
      content: all of it.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    # "x" makes a new file or fails, so that a link put there in the meantime is not followed either.
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
