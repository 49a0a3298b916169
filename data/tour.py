"""Executes the cells of tour.ipynb, without Jupyter; needs matplotlib.

    python data/tour.py                             all cells, some two minutes; writes what they print and draw into it
    python data/tour.py --check --effort 0.03       with smaller sizes, some seconds; writes nothing

Cells run in one namespace, in the folder of the notebook. Their assertions are the test of what the text says: the
first cell that fails ends it, with one line and exit code 1. The picture of the cell `life` becomes tour.png.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock


def execute(source: str, names: dict[str, Any], where: str) -> list[dict]:
    """Run a code cell; returns what nbformat 4 calls its outputs: what it prints, then its pictures."""
    from matplotlib import pyplot

    outputs, printed = list[dict](), io.StringIO()

    def show() -> None:
        for number in pyplot.get_fignums():
            picture = io.BytesIO()
            pyplot.figure(number).savefig(picture, metadata={"Software": None})  # which would name a version
            data = base64.b64encode(picture.getvalue()).decode()
            outputs.append({"data": {"image/png": data}, "metadata": {}, "output_type": "display_data"})
        pyplot.close("all")

    with contextlib.redirect_stdout(printed), mock.patch.object(pyplot, "show", show):
        exec(compile(source, where, "exec"), names)
        show()
    if text := printed.getvalue().splitlines(keepends=True):
        outputs.insert(0, {"name": "stdout", "output_type": "stream", "text": text})
    return outputs


def sources(cells: list[dict]) -> str:
    """Hash of the cells' sources, by which outputs of other cells are known as such."""
    return hashlib.sha256(json.dumps(["".join(cell["source"]) for cell in cells]).encode()).hexdigest()


def cause(error: Exception, cell: dict) -> str:
    """What went wrong in a cell, and at which of its lines, in one line."""
    numbers = [frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == cell["id"]]
    line = "".join(cell["source"]).splitlines()[numbers[0] - 1].strip() if numbers else ""
    return f"cell {cell['id']} fails at {line!r}: {' '.join(repr(error).split()):.200}"


def main() -> None:
    """Execute the notebook, and write it unless it is only checked."""
    parser = argparse.ArgumentParser(description="Execute the cells of tour.ipynb.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("notebook", nargs="?", type=Path, default=Path(__file__).with_name("tour.ipynb"),
                        help="another notebook (tour.ipynb)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--effort", type=float, default=1.0, help="sizes, above 0, as a share of the usual ones (1)")
    args = parser.parse_args()
    if not 0 < args.effort <= 1 or (args.effort < 1 and not args.check):
        parser.error("--effort is above 0, at most 1, and goes with --check: the notebook keeps outputs of a full run")
    try:
        notebook = json.loads(args.notebook.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.notebook} is not a notebook ({error!r:.100}): give one, or none for that of the tour")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the first cell has it, for which numpy is loaded too early
    try:
        import matplotlib
    except ImportError:
        parser.error("this needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    path, names, began = args.notebook.resolve(), {"__name__": "__main__", "EFFORT": args.effort}, time.monotonic()
    os.chdir(path.parent)  # as Jupyter does
    for number, cell in enumerate(cells, 1):
        start = time.monotonic()
        try:
            cell["outputs"] = execute("".join(cell["source"]), names, cell["id"])
        except Exception as error:  # a cell may raise anything
            parser.exit(1, f"{parser.prog}: {cause(error, cell)}\n")
        cell["execution_count"] = number
        print(f"{number}/{len(cells)}  {cell['id']}  {time.monotonic() - start:.1f} s", flush=True)
    print(f"{len(cells)} cells in {time.monotonic() - began:.0f} s")
    if args.check:
        return
    notebook.setdefault("metadata", {})["sources_sha256"] = sources(cells)
    new, life = path.with_name(f"{path.name}.tmp"), [cell["outputs"][-1] for cell in cells if cell["id"] == "life"]
    try:
        for picture in life:
            path.with_suffix(".png").write_bytes(base64.b64decode(picture["data"]["image/png"]))
        new.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, path)  # whole or not at all
    except OSError as error:
        parser.error(f"cannot write {path} ({error.strerror}): mend that, or use --check")
    print(f"written to {path}, {path.stat().st_size // 1000} KB")


if __name__ == "__main__":
    main()
