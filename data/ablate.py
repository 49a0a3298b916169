"""What each part of the recipe is worth: trains the default model with one thing changed, for three seeds.

    python data/ablate.py                      every change, about half an hour on 2 cores
    python data/ablate.py "sign of d" rank     those whose names contain one of these words
    python data/ablate.py base -- --steps 8000 --data book.txt      with other settings

Prints a row for each: bits/byte of the validation text (median, lowest and highest of the seeds). A change is a name of
the file that becomes something else while a run lasts; of the noise only with `--backend numpy`.
"""

import contextlib
import functools
import io
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

STEPS, SEEDS, rng = 500, range(3), np.random.default_rng(0)
initial, usual_rate, usual_signs, usual_factors = E.new_model, E.ES.rate, E.signs, E.factors
usual_learn, usual_rows = E.learn, E.learn_rows


def bits(levels: int) -> dict[str, Any]:
    """Activations in +-levels instead of +-127, in numpy and in the kernel."""
    def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top = np.maximum(np.abs(x).max(-1, keepdims=True), E.F32(1e-30))
        return np.rint(x * (E.F32(levels) / top)), top * E.F32(1 / levels)

    text = E.KERNEL
    for old in "127.0f / top", "top * (1.0f / 127)":
        assert text.count(old) == 1
        text = text.replace(old, old.replace("127", str(levels)))
    return {"KERNEL": text, "quantise": quantise}


def weights(*parts: str) -> dict[str, Any]:
    """Random initial weights also where they are zero, in parameters whose names have one of these endings."""
    def new_model(cfg: E.Config, seed: int) -> E.Model:
        model = initial(cfg, seed)
        for name, p in cfg.params.items():
            if p.cols and name.endswith(parts) and not model.weight(name).any():
                model.weight(name)[:] = np.rint(rng.normal(0, 16, (p.out, p.cols))).clip(-127, 127)
        return model
    return {"new_model": new_model}


def moved(change: Callable[[E.Model, np.ndarray, float], None]) -> dict[str, Any]:
    """Another update: change(model, Z of unit variance, learning rate)."""
    def learn(model: E.Model, backend: Any, es: E.ES, f: np.ndarray, credit: E.Credit | None) -> None:
        zero = replace(model, q=np.zeros_like(model.q), residual=np.zeros_like(model.residual))
        usual_learn(zero, backend, replace(es, lr=1.0, steps=2**31), f, credit)
        change(model, zero.q + zero.residual / 2**15, es.rate(model.step))
        model.step += 1
    return {"learn": learn}


def one_norm(model: E.Model, rank: int, rate: float, credit: E.Credit) -> None:
    """Divides all rows of a matrix by the same norm."""
    usual_rows(model, rank, rate, credit._replace(square=0 * credit.square + credit.square.mean(1, keepdims=True)))


def add(model: E.Model, change: np.ndarray) -> None:
    """Error feedback, as the file does it, of a change in int8 levels."""
    E.feed_back(model.q, model.residual, change * 2**15)


def threshold(model: E.Model, Z: np.ndarray, lr: float) -> None:
    """+-1 where |Z| is large: as many weights as give the moves the same RMS."""
    large = statistics.NormalDist().inv_cdf(1 - min(1, lr**2) / 2)
    model.q[:] = (model.q + np.sign(Z) * (np.abs(Z) >= large)).clip(-127, 127)


def stochastic(model: E.Model, Z: np.ndarray, lr: float) -> None:
    """Rounds at random, and forgets the rest."""
    model.q[:] = (model.q + np.floor(lr * Z + rng.random(len(Z)))).clip(-127, 127)


def momentum(model: E.Model, Z: np.ndarray, lr: float) -> None:
    """Of 0.9: each Z counts as much as without it, but spread over the steps that follow."""
    v = model.__dict__.setdefault("v", np.zeros(len(Z)))
    v[:] = 0.9 * v + 0.1 * Z
    add(model, lr * v)


def adam(model: E.Model, Z: np.ndarray, lr: float) -> None:
    """Z over the root of its mean square so far."""
    v = model.__dict__.setdefault("v", np.zeros(len(Z)))
    v[:] = 0.99 * v + 0.01 * Z**2
    add(model, lr * Z / np.sqrt(v / (1 - 0.99 ** (model.step + 1)) + 1e-8))


def rate(schedule: Callable[[float], float]) -> dict[str, Any]:
    """Another learning rate, as a factor of where in the run a step is (0 to 1); the same RMS over the whole run."""
    same = math.sqrt(statistics.fmean(schedule(i / 1000) ** 2 for i in range(1000)) * 3)

    def of(es: E.ES, step: int) -> float:
        return usual_rate(es, 0) * schedule(step / es.steps) / same
    return {"ES.rate": of}


def gauss(cfg: E.Config, p: E.Param, keys: tuple, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal factors, in steps of 1/8: sums of the signs of 64 entries, see `signs`."""
    def normal(keys: tuple, word: int, n: int) -> np.ndarray:
        return usual_signs(keys, word * 64, 64 * n).reshape(len(keys[0]), n, 64).sum(2, dtype=np.int8)

    with mock.patch.object(E, "signs", normal):
        A, B = usual_factors(cfg, p, keys, rank)
    return A, B if p.cols else 8 * B


def times(steps: float) -> list[str]:
    """More or fewer steps."""
    return ["--steps", str(round(STEPS * steps))]


SHORT = ["--population", "512", "--tokens", "32", "--steps", "370"]

# name: arguments of the command line, and names of the file with what they become
CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "base": ([], {}),
    "credit: text, all weights answer for all tokens, as in the paper": (["--credit", "text"], {}),
    "credit: of the embedding only": ([], {"ROWS": ("emb.weight", "")}),
    "credit: of the head only": ([], {"ROWS": ("", "head.weight")}),
    "credit: embedding, for the next token only": ([], {"AHEAD": 1}),
    "credit: embedding, for the next two tokens": ([], {"AHEAD": 2}),
    "credit: head, probability of 1/128": ([], {"LIKELY": 7}),
    "credit: head, probability of 1/8": ([], {"LIKELY": 3}),
    "credit: head, only where its token came": ([], {"LIKELY": -64}),
    "credit: one norm for all rows of a matrix": ([], {"learn_rows": one_norm}),
    "fitness: sign of d": ([], {"shape_fitness": lambda d: (42 * np.sign(d)).astype(np.int8)}),
    "fitness: not clipped": ([], {
        "shape_fitness": lambda d: np.rint(d * (127 / max(abs(d).max(), 1))).astype(np.int8)}),
    "update: +-1 where |Z| passes a threshold": ([], moved(threshold)),
    "update: stochastic rounding, no residual": ([], moved(stochastic)),
    "update: momentum 0.9": ([], moved(momentum)),
    "update: Adam-like scaling of Z": ([], moved(adam)),
    "initial weights: head not zero": ([], weights("head.weight")),
    "initial weights: nothing zero": ([], weights("")),
    "sigma 0.5": (["--sigma", "0.5"], {}),
    "sigma 2": (["--sigma", "2"], {}),
    "sigma 4": (["--sigma", "4"], {}),
    "rank 2": (["--rank", "2"], {}),
    "rank 4": (["--rank", "4"], {}),
    "schedule: constant": ([], rate(lambda u: 1)),
    "schedule: cosine": ([], rate(lambda u: 1 + math.cos(math.pi * u))),
    "schedule: constant, from the middle on linear": ([], rate(lambda u: min(1, 2 - 2 * u))),
    "schedule: half the learning rate": ([], {"ES.rate": lambda es, step: usual_rate(es, step) / 2}),
    "schedule: twice the learning rate": ([], {"ES.rate": lambda es, step: usual_rate(es, step) * 2}),
    "activations of 6 bits": ([], bits(31)),
    "activations of 4 bits": ([], bits(7)),
    "tokens: bytes": (["--vocab", "bytes"], {}),
    "tokens: 128": (["--vocab", "128"], {}),
    "tokens: 512": (["--vocab", "512"], {}),
    "segments of 32 tokens, population 4096": (["--tokens", "32", "--population", "4096"], {}),
    "segments of 512 tokens, population 256": (["--tokens", "512", "--population", "256"], {}),
    "population 256, four times the steps": (["--population", "256", *times(4)], {}),
    "population 4096, a quarter of the steps": (["--population", "4096", *times(1 / 4)], {}),
    "time mix frozen": (["--freeze", "att"], {}),
    "small MLPs frozen": (["--freeze", "att.w?,att.a?,att.g?"], {}),
    "vectors frozen": (["--freeze", "ln*,att.x_*,ffn.x_*,att.k_*,att.r_k,att.w0,att.a0"], {}),
    "two layers": (["--layers", "2"], {}),
    "6 M tokens": (SHORT, {}),
    "6 M tokens: normal noise, in numpy": ([*SHORT, "--sigma", str(1 / 64), "--backend", "numpy"], {
        "factors": gauss, "ES.rate": lambda es, step: usual_rate(es, step) / 64}),
}


def run(args: list[str], parts: dict[str, Any], seed: int) -> float:
    """Bits/byte of a run."""
    shown = io.StringIO()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        for name, part in parts.items():
            owner, _, name = f"E.{name}".rpartition(".")
            stack.enter_context(mock.patch.object(functools.reduce(getattr, owner.split(".")[1:], E), name, part))
        stack.enter_context(contextlib.redirect_stdout(shown))
        if E.main(["--seed", str(seed), "--steps", str(STEPS), "--vocab", "256", *args, "--out", out]):
            raise SystemExit(2)
    return float(shown.getvalue().split("\nbits/byte ")[1].split()[0])


def main(argv: list[str]) -> None:
    """Run the changes that are asked for."""
    words, more = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    chosen = [name for name in CHANGES if not words or any(word in name for word in words)]
    if not chosen:
        print(f"ablate.py: no change has such a word in its name: {'; '.join(CHANGES)}", file=sys.stderr)
        sys.exit(2)
    for name in chosen:
        args, parts = CHANGES[name]
        found = [run(args + more, parts, seed) for seed in SEEDS]
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} to {max(found):.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
