"""A run's weights again, from its scores: an evolution strategy needs no more than a seed and an int8 a pair and step.

    python data/replay.py --out out                   of a run whose model.npz is sound and says its settings
    python data/replay.py [its options] --out out     of one that lost it: with the options that it had

Writes replayed.npz into the folder, the weights after all steps that scores.bin has, and says whether they are those of
model.npz at its step. To go on from there: mv out/replayed.npz out/model.npz, then --resume --out out.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E


def replay(given: dict) -> None:
    """Rebuild the run in given["out"], see `nano_eggroll.parse`; raises UserError and OSError."""
    if "out" not in given:
        raise E.UserError("which run? Add the folder that has its scores.bin: --out out")
    out, saved = Path(given["out"]), None
    try:
        E.load_model(out / "model.npz")
    except (E.UserError, OSError) as e:
        E.note(f"{e}; going by the options")
        if "minutes" in given and "steps" not in given:
            raise E.UserError("give --steps, which the run printed, instead of --minutes") from None
    else:
        s, saved, _ = E.resume({name: value for name, value in given.items() if name != "load"})
        given = asdict(s) | ({"load": given["load"]} if "load" in given else {})
    s, model, vocab = E.begin(given)
    data, size = (out / "scores.bin").read_bytes(), s.population // 2
    scores = np.frombuffer(data[:len(data) // size * size], np.int8).reshape(-1, size)
    if not (saved.step if saved else 1) <= len(scores) <= s.steps:
        raise E.UserError(f"{out / 'scores.bin'} has {len(scores)} steps of population {s.population}, unlike the run: "
                          "give another copy, or the options that the run had")
    backend, same = E.make_backend(s.backend or None, model.cfg, s.rank, s.threads or None), True
    # Options alone may be others than the run had: then its last step would have had other scores
    task = None if saved else (E.AnswerTask if s.task else E.TextTask)(replace(s, eval=True), vocab)
    for f in [*scores, None]:
        if saved and model.step == saved.step:
            same = model.sha256() == saved.sha256()
        if task and model.step == len(scores) - 1:
            same = (E.es_step(model, backend, s, task.fitness)[1] == f).all()  # where it is, the move is that of f, too
        elif f is not None:
            E.move(model, backend, s, f)
    if not same:
        raise E.UserError("these options give other scores in the last step: give those that the run had" if task else
                          f"the weights of step {saved.step} are not those of model.npz: give the files of one run")
    model.extra["files"] = E.hashes(s)
    E.save_model(model, out / "replayed.npz")
    print(f"replayed {model.step} of {s.steps} steps\nmodel {out / 'replayed.npz'}\nweights sha256 {model.sha256()}")
    if saved:
        print(f"the weights of step {saved.step} are those of {out / 'model.npz'}")


if __name__ == "__main__":
    try:
        replay(E.parse(sys.argv[1:]))
    except (E.UserError, OSError) as e:
        print(f"replay: {e}", file=sys.stderr)
        sys.exit(2)
