"""One run of a comparison, in a process of its own: its configuration comes as a line of JSON on the standard input.

    python -m udsstream.compare.child < config.json

It ends with its parent: when the other end of the standard input is closed before the run is over, nobody waits for it any more, and a
second process might be about to go on with the same run.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, TextIO

from udsstream.errors import UdsstreamError
from udsstream.run_config import RunConfig

__all__: list[str] = []


def _end_with_parent(stdin: TextIO) -> None:
    stdin.read()
    os._exit(3)


def _main() -> int:
    config = RunConfig.model_validate_json(sys.stdin.readline())
    watch: Any = threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True)
    watch.start()
    from udsstream import pipeline

    try:
        pipeline.train(config)
    except UdsstreamError as error:
        print(f"udsstream: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
