"""The log's sealed files, handed to the run's loggers as they come to be: a copy of the record where the checkpoints go.

Which files: each rank's segments and their manifests; from rank 0 also run.json, the checkpoints' heads and memories, and the timings.
Together they are a log that `udsstream audit` reads. What a write-ahead file still holds is not among them, so segments are sealed at every
checkpoint: after a machine was lost with its disk, the copy reaches as far as the last checkpoint does.

Handing over copies a file of a few megabytes at most into a logger's own queue; the upload itself is the logger's
(`RemoteUploaderDownloader`: processes of its own). Sealing runs in the log's thread, and nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from composer.loggers import Logger
from composer.utils import dist

from udsstream.errors import ConfigError
from udsstream.selection_log import layout
from udsstream.selection_log.schema import TABLES
from udsstream.selection_log.writer import SelectionLogWriter

__all__ = ["LogUpload", "uploadable_files"]

REMOTE_FOLDER = "{run_name}/selection_log"
"""Under which the files lie at their destination; Composer fills the run's name in."""


class LogUpload:
    """Remembers what was handed over.

    Args:
        writer: of this rank's log.
        logger: of the run.

    Raises:
        ConfigError: none of the run's loggers takes files.
    """

    def __init__(self, writer: SelectionLogWriter, logger: Logger) -> None:
        if not logger.has_file_upload_destination():
            names = ", ".join(type(destination).__name__ for destination in logger.destinations) or "none"
            raise ConfigError(
                f"upload_log: no logger of this run takes files (its loggers: {names}); give the Trainer a RemoteUploaderDownloader, as "
                "Composer does by itself for a save_folder with a URI, or a WandBLogger(log_artifacts=True), or leave upload_log out"
            )
        self._writer = writer
        self._sent: dict[Path, tuple[int, int]] = {}
        self._due = True  # run.json, and what an earlier attempt sealed

    def seal(self) -> None:
        """Begins to seal what was written so far; it is handed over once that is done."""
        self._writer.seal(wait=False)
        self._due = True

    def send(self, logger: Logger) -> None:
        """Hands over what came to be since the last time, unless it is still being sealed."""
        if not self._due or self._writer.sealing:
            return
        self._due = False
        for path in uploadable_files(self._writer.root, dist.get_global_rank()):
            found = path.stat()
            state = (found.st_size, found.st_mtime_ns)
            if self._sent.get(path) == state:
                continue
            name = path.relative_to(self._writer.root).as_posix()
            # Composer takes both for format strings. A resumed run hands over what it had handed over before: the same bytes.
            logger.upload_file(f"{REMOTE_FOLDER}/{name}", _literally(path), overwrite=True)
            self._sent[path] = state

    def finish(self, logger: Logger) -> None:
        """Hands over what the log's end added, after it was sealed or closed."""
        self._due = True
        self.send(logger)


def uploadable_files(root: Path, rank: int) -> Iterator[Path]:
    """The files of a log that a rank hands over, none of which a writer will cut; segments before the manifests that list them."""
    if rank == 0:
        yield from (path for path in (layout.run_path(root), layout.timings_path(root)) if path.exists())
        for folder in (layout.heads_path(root, 0).parent, layout.buffer_path(root, 0, 0).parent):
            yield from sorted(path for path in folder.glob("ba*") if path.suffix in (".json", ".arrow"))
    for table in TABLES:
        yield from sorted(layout.segment_path(root, table, rank, 0, 0).parent.glob("*.arrow"))
        if (manifest := layout.manifest_path(root, table, rank)).exists():
            yield manifest


def _literally(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")
