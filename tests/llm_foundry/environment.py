"""A virtual environment with llm-foundry 0.22 and this tree, for `pytest tests/llm_foundry --llm-foundry DIR`.

    python tests/llm_foundry/environment.py DIR

Made if absent; this tree is installed anew each time. pip resolves both together, so that it fails here if our version ranges do not
admit llm-foundry's pins. Takes some gigabytes (its torch).
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

LLM_FOUNDRY = "llm-foundry==0.22.0"
TREE = Path(__file__).parents[2]


def main(folder: Path) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, LLM_FOUNDRY, str(TREE)], check=True)
    # The same version number does not mean the same tree.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(TREE)], check=True)
    subprocess.run([str(python), "-m", "pip", "check"], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
