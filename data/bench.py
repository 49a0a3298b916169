"""Measure this machine: tokens/s of plain inference, of EGGROLL and of naive ES, in scoring and in writing.

    python data/bench.py                                     the default model, all cores
    python data/bench.py --dim 256 --layers 6 --tokens 100 --population 256 --seconds 120
    taskset -c 0 python data/bench.py --threads 1            one core

Scoring is what training on a text does: each member reads T given tokens. In writing each has one, and writes T more.
All ways take turns until the time is up, so that what else the machine does hits all of them alike.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

OPTIONS = "dim", "layers", "head_size", "population", "rank", "tokens", "backend", "threads"  # of nano_eggroll.py

# int8 operations of a multiprocessor in a clock, by compute capability (NVIDIA's data sheets, without sparsity)
PEAK = {"75": 2048, "80": 4096, "86": 2048, "89": 2048, "90": 8192, "100": 16384}


def begin(s: E.Settings) -> tuple[E.Model, Any, np.ndarray]:
    """A new model, its backend, a random text of its tokens; raises UserError."""
    cfg = E.Config(s.dim, s.layers, s.head_size)
    text = (E.mix(np.arange(2**20)) % cfg.vocab).astype(np.uint16)
    text.setflags(write=False)
    return E.new_model(cfg, s.seed), E.make_backend(s.backend or None, cfg, s.rank, s.threads or None), text


def first_step(s: E.Settings) -> None:
    """What a fresh process does up to the end of its first step; prints its peak memory."""
    model, backend, text = begin(s)
    E.es_step(model, backend, s, E.predict(text, s.tokens))
    status = Path("/proc/self/status")  # of Linux
    used = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    print(f"{int(used[1]) / 1024:,.0f} MB" if used else "unknown", end="")
    if backend.name == "cuda":
        print(f", {backend.launch.cupy.get_default_memory_pool().total_bytes() / 2**20:,.0f} MB of the GPU", end="")


def measure_first_step(given: dict) -> None:
    """Print how long it takes to compile and do it, and the memory of that; raises UserError."""
    command = [sys.executable, "-c", f"import bench as b; b.first_step(b.E.Settings(**{given!r}))"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise E.UserError(f"the first step failed: {(done.stderr.splitlines() or ['killed'])[-1]}")
    print(f"start to the end of the first step: {time.perf_counter() - began:.2f} s")
    print(f"peak memory of that process: {done.stdout}")


def ways(s: E.Settings, model: E.Model, backend: Any, text: np.ndarray, full: int,
         writing: bool) -> dict[str, tuple[int, Callable]]:
    """What is measured: name -> how many runs of T tokens it has, and a function that does them."""
    P, T, most, pairs = s.population, s.tokens, max(s.population, full), max(1, s.population // (2 * full))
    start = np.arange(most) * (T + 1) if writing else E.segments(text, T, s.seed, 0, np.arange(most) // 2)
    text = np.zeros(most * (T + 1), np.uint16) if writing else text
    trained, still = replace(model, q=model.q.copy(), residual=model.residual.copy()), (0, 0, 0.0)

    def play(model: E.Model, runs: int, noise: tuple[int, int, float]) -> np.ndarray:
        if not writing:
            return backend.score(model, text, start[:runs], T, np.arange(runs), noise)
        backend.write(model, text, start[:runs], np.ones(runs, np.int32), T, np.arange(runs), noise)
        return text.reshape(most, T + 1)[:runs].sum(1)  # a fitness as good as any

    def fitness(members: E.Members) -> np.ndarray | E.Credit:
        return play(trained, P, members.noise) if writing else E.credit_of(members, text, start[:P], T)

    def naive(runs: int) -> None:
        for pair in range(pairs):
            noise = E.signs(E.pair_keys(s.seed, 0, np.array([pair])), 0, len(model.q))[0]
            for q in model.q + noise, model.q - noise:
                play(replace(model, q=q), runs, still)

    return {
        "inference": (P, lambda: play(model, P, still)),
        "EGGROLL forward": (P, lambda: play(model, P, (s.seed, 0, s.sigma))),
        "EGGROLL whole step": (P, lambda: E.es_step(trained, backend, s, fitness)),
        f"naive ES, {full} texts a member": (2 * pairs * full, lambda: naive(full)),
        "naive ES, 1 text a member": (2 * pairs, lambda: naive(1)),
    }


def measure(s: E.Settings, model: E.Model, backend: Any, text: np.ndarray, seconds: float) -> None:
    """Print the table and what follows from it."""
    cfg, launch, threads = model.cfg, getattr(backend, "launch", None), s.threads or E.cores()
    gpu = launch.cupy.cuda.Device() if backend.name == "cuda" else None
    workers = gpu.attributes["MultiProcessorCount"] if gpu else threads if launch else 1
    full = (launch.needs.lanes if launch else 16) * workers  # runs that leave no lane and no core idle
    both = [ways(s, model, backend, text, full, writing) for writing in (False, True)]
    speeds = {name: ([], []) for name in both[0]}  # of scoring, of writing
    rounds, began = -1, time.perf_counter()  # the first round warms up
    while rounds < 3 or (time.perf_counter() - began < seconds and rounds < 50):
        for name, pair in speeds.items():
            for way, speed in zip(both, pair):
                (runs, do), t = way[name], time.perf_counter()
                do()
                speed += [runs * s.tokens / (time.perf_counter() - t)] * (rounds >= 0)
        rounds += 1

    products = sum(p.size for name, p in cfg.params.items() if p.cols and name != "emb.weight")
    print(f"{backend.name}, {threads} threads: D={cfg.dim} L={cfg.layers} N={cfg.head_size} V={cfg.vocab} T={s.tokens} "
          f"rank {s.rank} population {s.population}, {products:,} int8 products a token\n"
          f"{f'tokens/s, median of {rounds} [quartiles]':40}{'scoring':>26}  ratio{'writing':>37}  ratio")
    middle = {name: np.median(pair, axis=1) for name, pair in speeds.items()}
    for name, pair in speeds.items():
        ratios, quartiles = middle[name] / middle["inference"], np.percentile(pair, (25, 75), axis=1).T
        print(f"{name:31}" + "".join(f"{speed:13,.0f} {f'[{low:,.0f}, {high:,.0f}]':>22} {ratio:7.4f}"
                                     for speed, (low, high), ratio in zip(middle[name], quartiles, ratios)))
    for name in list(middle)[-2:]:
        ratios = middle["EGGROLL forward"] / middle[name]
        print(f"EGGROLL forward / {name}: {ratios[0]:.1f} in scoring, {ratios[1]:.1f} in writing")
    print("naive ES: each member's int8 weights written out with +-1 for every entry, and run alone. A text\n"
          f"is a lane: {full} fill all, but with equal tokens try {full} times fewer members than EGGROLL; 1 fills one")
    rate = 2 * products * middle["EGGROLL forward"][0]
    peak = PEAK.get(gpu.compute_capability, 0) * workers * gpu.attributes["ClockRate"] * 1e3 if gpu else 0
    print(f"EGGROLL forward, scoring: {rate / 1e9:,.1f} int8 Giga-operations/s"
          + f", {rate / (peak or 1):.1%} of this GPU's peak" * (peak > 0))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for, but all ways 3 times (20)")
    for name in OPTIONS:
        default = getattr(E.Settings, name) or "what is best here"
        parser.add_argument(E.option(name), default=argparse.SUPPRESS, help=f"as of nano_eggroll.py ({default})")
    args = vars(parser.parse_args())
    seconds = args.pop("seconds")
    try:
        given = E.parse([word for name, value in args.items() for word in (E.option(name), value)])
        prepared = begin(E.Settings(**given))
        measure_first_step(given)
        measure(E.Settings(**given), *prepared, seconds)
    except E.UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
