"""One run of a comparison, in a process of its own: what to do comes as a line of JSON on the standard input.

    echo '{"run": {…}, "answers": {…} or null, "train": true}' | python -m udsstream.compare.child

It ends with its parent: when the other end of the standard input is closed before it is done, nobody waits for it any more, and a
second process might be about to go on with the same run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import TextIO

from udsstream.compare.config import AnswersConfig
from udsstream.errors import UdsstreamError
from udsstream.run_config import RunConfig

__all__: list[str] = []


def _end_with_parent(stdin: TextIO) -> None:
    stdin.read()
    os._exit(3)


def _main() -> int:
    task = json.loads(sys.stdin.readline())
    config = RunConfig.model_validate_json(json.dumps(task["run"]))
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    try:
        if task["train"]:
            from udsstream import pipeline

            pipeline.train(config)
        if task["answers"] is not None:
            from udsstream.compare.answers import answer_run

            answer_run(config, AnswersConfig.model_validate(task["answers"]))
    except UdsstreamError as error:
        print(f"udsstream: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
