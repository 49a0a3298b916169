"""Draw the log.csv of one or several runs as one picture of 1800 x 1100 pixels; needs matplotlib.

    python data/plot.py out                                         out/curve.png: training and validation
    python data/plot.py out --data data/tales.txt                   with lines for what simple models reach on this text
    python data/plot.py out out-2 --x seconds --out both.png        the validation of several runs
    python data/plot.py es/0 es/1 grpo/0 --x seconds                numbers are seeds, drawn in the colour of one run
"""

import argparse
import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

XLABEL = {"tokens": "tokens read by the population", "seconds": "seconds", "step": "steps"}
UNIT = {"bits": "bits/byte", "accuracy": "accuracy"}  # of the column val_bits or val_accuracy
TRAINING = {"bits": "bits", "accuracy": "reward"}  # its companion: train_bits or train_reward


def read_log(folder: Path, x: str) -> tuple[str, list[list[float]]]:
    """What a run measured, bits or accuracy, and the columns x, training and validation; raises OSError, ValueError."""
    with open(folder / "log.csv", newline="", encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f, restval=""))
    if not rows:
        raise ValueError("no rows yet")
    kind = "accuracy" if "val_accuracy" in rows[0] else "bits"
    names = [x, f"train_{TRAINING[kind]}", f"val_{kind}"]
    if missing := [name for name in names if name not in rows[0]]:
        raise ValueError(f"no column {missing[0]}")
    return kind, [[float(row[name]) for row in rows] for name in names]


def yardsticks(path: Path, model: Path) -> dict[str, float]:
    """What simple models of a model's tokens reach on the last 10% of a text, bits/byte, and its entropy if known."""
    vocab, texts = E.vocab_of(E.load_model(model)), E.read_text(path)
    found = E.yardsticks(vocab, *texts, *map(vocab.encode, texts))
    entropy = path.with_suffix(".entropy")  # make_tales.py writes it
    return found | ({"true entropy": float(entropy.read_text())} if entropy.exists() else {})


def draw(logs: dict[str, list[list[float]]], kind: str, marks: dict[str, float], x: str, title: str, out: Path) -> None:
    """Draw logs by name, with marks as dotted lines, into the file out; raises ImportError, OSError, ValueError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    alone, colours = len(logs) == 1, {}
    for name, (at, training, validation) in logs.items():
        if alone:
            ax.plot(at, training, label=f"training {TRAINING[kind]}", color="0.75", linewidth=1.5, marker=".")
        name = re.sub(r"[/\\]\d+$", "", name)
        label = f"validation {kind}" if alone else name if name not in colours else None
        [line] = ax.plot(at, validation, label=label, color=colours.get(name), linewidth=3 if alone else 2, marker=".")
        colours[name] = line.get_color()
    names = dict[float, list[str]]()  # of those that are nearly the same, and would hide each other, in one place
    for name, bits in marks.items():
        if name != "uniform":  # far above all else
            ax.axhline(bits, color="0.4", linewidth=1, linestyle=":")
            near = next((other for other in names if abs(other - bits) < 0.03 * bits), bits)
            names.setdefault(near, []).append(f"{name} {bits:.2f}")
    for bits, found in names.items():
        ax.text(1.01, bits, "\n".join(found), va="center", color="0.3", transform=ax.get_yaxis_transform())
    ax.set(xlabel=XLABEL[x], ylabel=UNIT[kind] if alone else f"validation, {UNIT[kind]}", title=title)
    if kind == "bits":  # an accuracy may be 0
        ax.set(xscale="log", yscale="log")
        ax.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter=ticker.EngFormatter(sep=""),
                     minor_formatter="")
        ax.yaxis.set(major_locator=ticker.LogLocator(subs=range(1, 10)), major_formatter="{x:g}", minor_formatter="")
    fig.legend(frameon=False, loc="outside lower center", ncols=2)
    fig.savefig(out, dpi=200)


def main() -> None:
    """Read the logs, draw the picture."""
    parser = argparse.ArgumentParser(description="Draw the log.csv of one or several runs as one picture.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("out")], help="--out folders of runs (out)")
    parser.add_argument("--x", choices=XLABEL, default="tokens", help="what goes to the right (tokens)")
    parser.add_argument("--data", type=Path, help="the text of the runs, for what simple models reach on it")
    parser.add_argument("--title", default="", help="a line above the picture")
    parser.add_argument("--out", type=Path, help="the picture (curve.png in the first folder)")
    args = parser.parse_args()
    out, logs, kinds = args.out or args.folders[0] / "curve.png", {}, set()
    for folder in args.folders:
        try:
            kind, logs[str(folder)] = read_log(folder, args.x)
            kinds.add(kind)
        except (OSError, ValueError, csv.Error) as error:
            parser.error(f"cannot draw {folder / 'log.csv'} ({error}): give the --out folder of a run that has come to "
                         "its first validation")
    if len(kinds) > 1:
        parser.error("some of these runs measure bits, some accuracy: draw them apart")
    if args.data and kinds == {"accuracy"}:
        parser.error("these runs measure accuracy, and simple models have none: leave out --data")
    try:
        marks = yardsticks(args.data, args.folders[0] / "model.npz") if args.data else {}
    except (OSError, ValueError, ZeroDivisionError) as error:  # a UserError is a ValueError
        parser.error(f"cannot measure {args.data} ({error}): give the text of the runs with --data")
    try:
        draw(logs, *kinds, marks, args.x, args.title, out)
    except ImportError:
        parser.error("this needs matplotlib: pip install matplotlib, or open log.csv in a spreadsheet")
    except (OSError, ValueError) as error:
        parser.error(f"cannot write {out} ({error}): give another file with --out, such as curve.png")
    print(f"curve {out}")


if __name__ == "__main__":
    main()
