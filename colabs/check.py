"""Checks that each notebook holds the cells of the script beside it, and runs it from top to bottom."""

import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient


def main() -> int:
    """Returns the number of notebooks that are out of date; a cell that fails raises."""
    stale = 0
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.name == Path(__file__).name:
            continue
        notebook = jupytext.read(script)
        paired = jupytext.read(script.with_suffix(".ipynb"))
        if [cell.source for cell in notebook.cells] != [cell.source for cell in paired.cells]:
            print(f"{script.with_suffix('.ipynb')} differs from {script}: run `jupytext --sync {script}`.")
            stale += 1
        NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
        print(f"{script.stem}: {len(notebook.cells)} cells ran")
    return stale


if __name__ == "__main__":
    sys.exit(main())
