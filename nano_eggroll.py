"""nano_eggroll: train an int8 RWKV-7 language model with EGGROLL, in one file, without backpropagation.

    python nano_eggroll.py                              train on data/tales.txt (about 3 minutes on 2 cores), then write
    python nano_eggroll.py --data book.txt --out book   train on your own bytes
    python nano_eggroll.py --load out/model.npz --sample "Once upon"
    python nano_eggroll.py --load out/model.npz --eval

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
import codecs
import concurrent.futures
import csv
import ctypes
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import queue
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

F32 = np.float32
LORA = ("w", "a", "v", "g")  # RWKV-7's four low-rank MLPs: decay, in-context learning rate, value residual, gate


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------------------------------------
# The model's shape, and the table of its parameters


@dataclass(frozen=True)
class Config:
    """The shape of an RWKV-7; raises UserError (a ValueError) for shapes that cannot be computed."""

    dim: int = 32  # D, width of the residual stream
    layers: int = 1  # L; in a run of a few minutes one layer gets further than two, since it reads twice the text
    head_size: int = 16  # N, must divide D
    vocab: int = 256  # V, 256 = bytes
    ffn: int = 0  # F, width of the channel mix; 0 means 4 D
    lora: tuple[int, int, int, int] = (16, 16, 16, 16)  # inner widths of the MLPs for w, a, v, g

    def __post_init__(self) -> None:
        object.__setattr__(self, "ffn", self.ffn or 4 * self.dim)
        object.__setattr__(self, "lora", tuple(self.lora))
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
            table[name] = Param(name, out, cols, at, row, word)
            at += -(-out * max(cols, 1) // 16) * 16  # 16-byte aligned, for vector loads
            row += out
            word += words(out) + words(cols)
        return table

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """(bytes of the flat int8 buffer, rows = entries of the scale array, 32-bit noise words of a pair and rank)."""
        last = list(self.params.values())[-1]
        return (last.at + -(-last.size // 16) * 16 + 16, last.row + last.out,  # 16 spare bytes: loads take 4 at a time
                last.word + words(last.out) + words(last.cols))


class Param(NamedTuple):
    """One parameter: a matrix [out, cols], or a vector [out] when cols is 0."""

    name: str
    out: int
    cols: int
    at: int  # offset in the flat int8 buffer
    row: int  # offset in the per-row scales
    word: int  # offset in a pair's stream of noise words

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.out * max(self.cols, 1)


def words(entries: int) -> int:
    """How many 32-bit words hold this many +-1 entries."""
    return -(-entries // 32)


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


@dataclass
class Model:
    """The state of a run: int8 weights, their fixed scales, and the int16 remainders of the updates."""

    cfg: Config
    q: np.ndarray  # int8, flat; padding is 0
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

    def sha256(self) -> str:
        """Hash of the int8 buffer: two runs are equal when this is."""
        return hashlib.sha256(self.q.tobytes()).hexdigest()


def new_model(cfg: Config, seed: int) -> Model:
    """Initial weights: every block is the identity (output, ffn.value, w1, a1, v1 are zero) and the head is zero.

    Matrices are N(0, 16) rounded to int8, of row scale 1/(16 sqrt(cols)), so that W x keeps the size of x. Vectors
    follow the official RWKV-7 formulas. The normal deviate is the sum of four bytes of the noise hash (Irwin-Hall): no
    library's random stream is involved, so the bits are the same everywhere.
    """
    size, rows, _ = cfg.sizes
    m = Model(cfg, np.zeros(size, np.int8), np.zeros(rows, F32), np.zeros(size, np.int16))
    i = np.arange(cfg.dim) / max(cfg.dim - 1, 1)  # position of a channel, 0 to 1
    for n, (name, p) in enumerate(cfg.params.items()):
        part = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if p.cols:
            m.scales(name)[:] = 1 / 16 if part == "emb.weight" else 1 / (16 * math.sqrt(p.cols))
            if part in ("head.weight", "att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1"):
                continue
            h = mix(mix(np.arange(p.size)) + mix(mix(seed) + np.uint32(n)))
            total = h.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.int32) - 510
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
UNIT = 32  # rows of a matrix that the update works on at a time: those of one noise word
BITS = 4096  # a loss is counted in 1/4096 bit; integers add up the same in any order
MAX_BITS = F32(63)  # a token costs at most this much, so int32 holds the loss of 8,191 tokens


def ordered_sum(x: np.ndarray) -> np.ndarray:
    """Sum of the last axis in the one order that all backends share: eight running sums, then folded in halves."""
    s = np.zeros((*x.shape[:-1], 8), F32)
    for i in range(0, x.shape[-1], 8):
        s[..., :x.shape[-1] - i] += x[..., i:i + 8]
    s = s[..., :4] + s[..., 4:]
    s = s[..., :2] + s[..., 2:]
    return s[..., 0] + s[..., 1]


def exp2(y: np.ndarray) -> np.ndarray:
    """2^y, clamped to |y| <= 126."""
    y = np.minimum(np.maximum(y, F32(-126)), F32(126))
    m = y + MAGIC
    f = y - (m - MAGIC)
    p = EXP2[6]
    for c in EXP2[5::-1]:
        p = p * f + c
    return (p.view(np.int32) + (m.view(np.int32) << 23)).view(F32)  # m's low bits are the integer part


def log2(x: np.ndarray) -> np.ndarray:
    """log2 x for normal x > 0."""
    e = (x.view(np.int32) - 0x3F3504F3) >> 23  # 0x3F3504F3 is sqrt(1/2): m falls in [0.707, 1.414)
    m = (x.view(np.int32) - (e << 23)).view(F32)
    s = (m - F32(1)) / (m + F32(1))
    z = s * s
    return e.astype(F32) + s * (((LOG2[3] * z + LOG2[2]) * z + LOG2[1]) * z + LOG2[0])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    return F32(1) / (F32(1) + exp2(-LOG2E * x))


def tanh(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent."""
    return F32(2) * sigmoid(F32(2) * x) - F32(1)


def normalise(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    """Layer norm of the last axis; w and b broadcast against x."""
    inv = F32(1 / x.shape[-1])
    x = x - (ordered_sum(x) * inv)[..., None]
    var = ordered_sum(x * x) * inv
    return x * (F32(1) / np.sqrt(var + F32(eps)))[..., None] * w + b


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absmax quantisation of the last axis: float32 [..., n] -> integers in +-127 as float32 [..., n], scale [...]."""
    top = np.maximum(np.abs(x).max(-1), F32(1e-30))
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


def forward(model: Model, tokens: np.ndarray, state: np.ndarray, noise: Noise | None = None) -> np.ndarray:
    """Next-token logits: tokens [P, T], state [P, L, 2 D + D N] (updated in place) -> float32 [P, T, V]."""
    cfg = model.cfg
    D, H, N = cfg.dim, cfg.dim // cfg.head_size, cfg.head_size
    P, T = tokens.shape

    def low_rank(name: str) -> tuple[np.ndarray, np.ndarray]:
        """C A [P, R, out] and B [P, R, cols] as float32."""
        assert noise
        A, B = factors(cfg, cfg.params[name], noise.keys, noise.rank)
        return noise.c[:, None, None] * A.astype(F32), B.astype(F32)

    def vec(name: str) -> np.ndarray:
        """A vector parameter of each member, float32 [P or 1, 1, D]."""
        q = model.weight(name).astype(F32)[None]
        for cA in low_rank(name)[0].swapaxes(0, 1) if noise else ():
            q = q + cA
        return (q * model.scales(name))[:, None]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        """X (W + c A B^T)^T = x W^T + c (x B) A^T [P, T, out]: one int8 product for all, R dot products for each."""
        q, sx = quantise(x)
        W = model.weight(name)
        # Sums of integers are exact in any order while they fit the mantissa, so a fast float product may do them.
        exact = F32 if W.shape[1] * 127 * 127 < 2**24 else np.float64
        y = (q.astype(exact) @ W.T.astype(exact)).astype(F32)
        if noise:
            cA, B = low_rank(name)
            xB = (q.astype(exact) @ B.transpose(0, 2, 1).astype(exact)).astype(F32)
            for k in range(noise.rank):
                y = y + xB[:, :, k, None] * cA[:, None, k]
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
    if noise:
        cA, B = low_rank("emb.weight")
        for k in range(noise.rank):
            x = x + cA[np.arange(P)[:, None], k, tokens][..., None] * B[:, None, k]
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


# ---------------------------------------------------------------------------------------------------------------------
# The kernel: the same pass for any C compiler and for CUDA, one member per task. A lane is a token: `vf` and `vi` hold
# one number for each of LANES tokens (a SIMD register on a CPU, a register of each thread of a warp on a GPU) and a
# buffer is [channel][LANES], so the code reads like scalar code and nothing but the recurrence looks across lanes.
# There, where tokens must follow each other, a lane is a value channel of a head. First, what differs between machines.

MACHINE = r"""
typedef unsigned u32;
typedef signed char i8;
typedef long long i64;

#ifdef __CUDACC__
  typedef float vf;
  typedef int vi;
  #define restrict __restrict__
  #define LANES 32
  #define ROWS 4                                  // rows of a matrix that share one read of the activations
  #define BIAS 0                                  // what is added to weights to make them unsigned, see unbias
  #define LANE ((int)(threadIdx.x % LANES))
  #define FOR_LANE(l) for (int l = LANE, once_ = 1; once_; once_ = 0)
  #define EACH(i, n) for (int i = threadIdx.x / LANES; i < (n); i += blockDim.x / LANES)  // dealt out to the warps
  #define FLAT(i, n) for (int i = threadIdx.x; i < (n); i += blockDim.x)                  // dealt out to the threads
  #define TASKS(i) for (int i = first + blockIdx.x; i < last; i += gridDim.x)             // dealt out to the blocks
  #define TABLET(t, d, n) EACH(d, n) FOR_LANE(t)
  #define SCRATCH(type) type *s = (type *)scratch + blockIdx.x
  #define SYNC __syncthreads()
  #define V(x, d) ((x)[d][LANE])                  // all lanes of channel d of a float buffer
  #define Q(x, d) ((x)[d][LANE])                  // of an int buffer
  #define INLINE static __device__ __forceinline__
  #define KERNEL extern "C" __global__ void __launch_bounds__(256)
  #define CONSTANT static __device__ const
  #define UNROLL _Pragma("unroll")
  #define I2F(x) ((float)(x))
  #define splat(x) (x)
  #define ZERO 0
  #define AT(v, l) (v)                            // lane l of a register
  #define AS_I(x) __float_as_int(x)
  #define AS_F(x) __int_as_float(x)
  #define ADD(p, x) atomicAdd(p, x)               // of integers, so the order does not matter
  #define RINT(x) rintf(x)
  #define VECTOR(op) f##op##f                     // fmaxf, fminf
  #define fsqrtf sqrtf
  INLINE vf before(const float *x, float carry) { return LANE ? x[LANE - 1] : carry; }  // shifted by one lane
  INLINE vi dot4(vi acc, vi x, int w) {           // acc + the four products of the bytes of x and w
  #if __CUDA_ARCH__ >= 610
    return __dp4a(x, w, acc);
  #else
    for (int b = 0; b < 32; b += 8) acc += (i8)(x >> b) * (i8)(w >> b);
    return acc;
  #endif
  }
#else
  #include <string.h>
  #ifdef __SSE2__
    #include <immintrin.h>
  #elif defined __ARM_NEON
    #include <arm_neon.h>
  #endif
  #ifdef __AVX512VNNI__
    #define LANES 16
    #define ROWS 16
    #define BIAS 128                              // vpdpbusd multiplies unsigned by signed bytes
    #define dot4(acc, x, w) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), _mm512_set1_epi32(w), (__m512i)(x)))
    #define VECTOR(op) _mm512_##op##_ps
  #elif defined __AVX2__
    #define LANES 8
    #define ROWS 8
    #define VECTOR(op) _mm256_##op##_ps
    #ifdef __AVXVNNI__
      #define BIAS 128
      #define dot4(acc, x, w) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(acc), _mm256_set1_epi32(w), (__m256i)(x)))
    #else
      #define BIAS 0
      #define ODD(x) _mm256_srai_epi16(x, 8)      // odd and even bytes as 16-bit integers, for vpmaddwd
      #define EVEN(x) ODD(_mm256_slli_epi16(x, 8))
      #define dot4(acc, x, w) ((acc) + (vi)_mm256_madd_epi16(ODD((__m256i)(x)), ODD(_mm256_set1_epi32(w))) \
                                     + (vi)_mm256_madd_epi16(EVEN((__m256i)(x)), EVEN(_mm256_set1_epi32(w))))
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
      #define dot4(acc, x, w) ((vi)vdotq_s32((int32x4_t)(acc), (int8x16_t)(x), (int8x16_t)vdupq_n_s32(w)))
    #else
      #define dot4(acc, x, w) ((acc) + ((x) << 24 >> 24) * (i8)(w) + ((x) << 16 >> 24) * (i8)((w) >> 8) \
                                     + ((x) << 8 >> 24) * (i8)((w) >> 16) + ((x) >> 24) * ((w) >> 24))
    #endif
  #endif
  typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
  typedef int vi __attribute__((vector_size(4 * LANES), may_alias));
  #define FOR_LANE(l) for (int l = 0; l < LANES; l++)
  #define EACH(i, n) for (int i = 0; i < (n); i++)
  #define FLAT EACH
  #define TASKS(i) for (int i = first; i < last; i++)
  #define TABLET(t, d, n) FOR_LANE(t) EACH(d, n)
  #define SCRATCH(type) type *s = (type *)scratch
  #define SYNC
  #define RINT(x) __builtin_rintf(x)
  #define V(x, d) (*(vf *)(x)[d])
  #define Q(x, d) (*(vi *)(x)[d])
  #define INLINE static inline __attribute__((always_inline))
  #define KERNEL void
  #define CONSTANT static const
  #define UNROLL _Pragma("GCC unroll 16")
  #define I2F(x) __builtin_convertvector(x, vf)
  #define splat(x) ((x) - (vf){0})
  #define ZERO ((vi){0})
  #define AT(v, l) (v)[l]
  #define AS_I(x) ((vi)(x))
  #define AS_F(x) ((vf)(x))
  #define ADD(p, x) (*(p) += (x))
  INLINE vf before(const float *x, float carry) {  // shifted by one lane
    vf y;
    memcpy(&y, x - 1, sizeof y);
    y[0] = carry;
    return y;
  }
#endif
"""

KERNEL = r"""
#define H (D / N)
#define STATE (D * (2 + N))                       // of a layer: two token shifts and S^T of every head
#define TOKENS(buffer) float buffer[LANES]
#define WORDS_OF(n) (((n) + 31) / 32)             // noise words for n entries
#define COLUMN(k, word) (32 * ((k) * WORDS + (word)))  // where column k of a factor starts, given its first word
typedef float (*buf)[LANES];
typedef int (*block)[LANES];

// ---- arithmetic: the functions of the same names in Python, operation by operation

#define MAGIC 12582912.0f                         // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
#define LOG2E 1.4426950408889634f

INLINE vf vadd(vf a, vf b) { return a + b; }
INLINE vf vmax(vf a, vf b) { return VECTOR(max)(a, b); }
INLINE vf vmin(vf a, vf b) { return VECTOR(min)(a, b); }
INLINE vf vabs(vf x) { return AS_F(AS_I(x) & 0x7FFFFFFF); }

// Combines `term` over i < n: eight running results, then folded in halves.
#define REDUCE(op, start, result, i, n, term) vf result; { \
    vf s_[8]; \
    UNROLL for (int l_ = 0; l_ < 8; l_++) s_[l_] = splat(start); \
    for (int i0_ = 0; i0_ < (n); i0_ += 8) UNROLL for (int l_ = 0; l_ < 8; l_++) { \
      int i = i0_ + l_; \
      if (i < (n)) s_[l_] = op(s_[l_], term); \
    } \
    result = op(op(op(s_[0], s_[4]), op(s_[2], s_[6])), op(op(s_[1], s_[5]), op(s_[3], s_[7]))); }
#define SUM(result, i, n, term) REDUCE(vadd, 0.0f, result, i, n, term)

INLINE vf exp2_(vf y) {
  y = vmin(vmax(y, splat(-126.0f)), splat(126.0f));
  vf m = y + MAGIC, f = y - (m - MAGIC), p = splat(EXP2_6);
  p = p * f + EXP2_5; p = p * f + EXP2_4; p = p * f + EXP2_3;
  p = p * f + EXP2_2; p = p * f + EXP2_1; p = p * f + EXP2_0;
  return AS_F(AS_I(p) + (AS_I(m) << 23));
}

INLINE vf log2_(vf x) {
  vi e = (AS_I(x) - 0x3F3504F3) >> 23;
  vf m = AS_F(AS_I(x) - (e << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  return I2F(e) + s * (((LOG2_3 * z + LOG2_2) * z + LOG2_1) * z + LOG2_0);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp2_(-LOG2E * x)); }
INLINE vf tanh_(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// ---- noise

INLINE u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
INLINE u32 key0(u32 seed, u32 step, u32 pair) { return mix(mix(mix(seed) + step) + pair); }
INLINE u32 key1(u32 seed, u32 step, u32 pair) { return mix(mix(mix(~seed) + pair) + step); }
INLINE u32 noise_word(u32 k0, u32 k1, u32 word) { return mix(mix(word + k0) ^ k1); }

// ---- the forward pass

#define WIDEST (F > D ? F : D)
typedef struct {                                  // what one task needs; reused from member to member
  TOKENS(x[D]); TOKENS(h[D]); TOKENS(dx[D]); TOKENS(xm[D]); TOKENS(r[D]); TOKENS(w[D]); TOKENS(k[D]); TOKENS(v[D]);
  TOKENS(a[D]); TOKENS(g[D]); TOKENS(kk[D]); TOKENS(y[D]); TOKENS(v_first[D]); TOKENS(wide[WIDEST]);
  TOKENS(lora[LORA]); TOKENS(logits[VOCAB]);
  int q[(WIDEST > LORA ? WIDEST : LORA) / 4 + 1][LANES];  // quantised inputs of a product, four channels to a word,
  int start[1][LANES];                            // and what its sums start from
  float state[L * STATE];
  float vec[VECTORS];                             // the member's own vector parameters
  i8 noise[COLUMN(R, 0)];                         // +-1 + BIAS: A of tensor t at its t.word, then B
  int minus[COLUMN(R, 0)];                        // its sign bits: x ^ minus is x times the noise
  int pair;                                       // whose noise this is
} Member;

typedef struct { const i8 *w; const float *scale; Member *s; float c; int rank; } Model;

#define BLOCK(kind) (GLOBALS + l * KINDS + kind)  // a parameter of layer l
#define VEC(kind) (vec + TABLE[BLOCK(kind)].vec)
#define MATMUL(y, kind, out, cols) matmul(y, m, sx, TABLE[BLOCK(kind)], out, cols)
#define SIGNED(biased) ((i8)((biased) - BIAS))

INLINE int load4(const i8 *w, int cols) {         // four neighbours in a row of `cols`, which may start anywhere
#ifdef __CUDACC__
  return cols % 4 ? (w[0] & 255) | (w[1] & 255) << 8 | (w[2] & 255) << 16 | w[3] << 24 : *(const int *)w;
#else
  int x;
  memcpy(&x, w, 4);
  return x;
#endif
}

// What the sums of products with biased weights start from, so that the bias drops out: -BIAS times the sum of x.
INLINE vi unbias(block x, int words) {
  vi sum = ZERO;
  if (BIAS) for (int k = 0; k < words; k++) sum = dot4(sum, Q(x, k), 0x01010101);
  return sum * -BIAS;
}

// s->q = x of n channels in int8, absmax 127; returns the scale. Padding is 0, so what it meets does not matter.
INLINE vf quantise(Member *s, buf x, int n) {
  SYNC;
  REDUCE(vmax, 1e-30f, top, d, n, vabs(V(x, d)))
  vf inv = 127.0f / top;
  EACH(k, (n + 3) / 4) {
    vi word = ZERO;
    UNROLL for (int b = 0; b < 4; b++)
      if (4 * k + b < n) word |= (AS_I(V(x, 4 * k + b) * inv + MAGIC) & 255) << 8 * b;
    Q(s->q, k) = word;
  }
  Q(s->start, 0) = unbias(s->q, (n + 3) / 4);
  SYNC;
  return top * (1.0f / 127);
}

// acc[j] += the products of `words` words of q with row j of w, j < n
INLINE void dot_rows(vi *acc, int n, block q, int words, const i8 *w, int cols) {
  for (int k = 0; k < words; k++) {
    vi x = Q(q, k);
    UNROLL for (int j = 0; j < n; j++) acc[j] = dot4(acc[j], x, load4(w + j * cols + 4 * k, cols));
  }
}

// y = x (W + c A B^T)^T of rows o to o+n, for x = q sx
INLINE void matmul_rows(buf y, const Model *m, vf sx, const vf *xb, Tensor t, int o, int n, int cols) {
  vi acc[ROWS];
  UNROLL for (int j = 0; j < n; j++) acc[j] = Q(m->s->start, 0);
  dot_rows(acc, n, m->s->q, (cols + 3) / 4, m->w + t.at + o * cols, cols);
  const float *scale = m->scale + t.row + o;
  const int *minus = m->s->minus + COLUMN(0, t.word) + o;
  vf z[ROWS];
  UNROLL for (int j = 0; j < n; j++) z[j] = I2F(acc[j]);
  if (m->rank) UNROLL for (int k = 0; k < R; k++)
    UNROLL for (int j = 0; j < n; j++) z[j] = z[j] + AS_F(AS_I(xb[k]) ^ minus[COLUMN(k, 0) + j]);
  UNROLL for (int j = 0; j < n; j++) V(y, o + j) = z[j] * scale[j] * sx;
}

INLINE void matmul(buf y, const Model *m, vf sx, Tensor t, int out, int cols) {
  vf xb[R];
  if (m->rank) UNROLL for (int k = 0; k < R; k++) {  // x B: four sums, so that products need not wait for each other
    const i8 *b = m->s->noise + COLUMN(k, t.word + WORDS_OF(out));
    vi p[4] = {Q(m->s->start, 0), ZERO, ZERO, ZERO};
    for (int w0 = 0; w0 < (cols + 3) / 4; w0 += 4) UNROLL for (int w = w0; w < w0 + 4; w++)
      if (w < (cols + 3) / 4) p[w - w0] = dot4(p[w - w0], Q(m->s->q, w), load4(b + 4 * w, 4));
    xb[k] = m->c * I2F(p[0] + p[1] + p[2] + p[3]);
  }
  EACH(o, out / ROWS) matmul_rows(y, m, sx, xb, t, o * ROWS, ROWS, cols);
  EACH(o, out % ROWS) matmul_rows(y, m, sx, xb, t, out - out % ROWS + o, 1, cols);
  SYNC;
}

INLINE void normalise(buf y, buf x, int n, const float *w, const float *b, float eps) {
  SUM(sum, i, n, V(x, i))
  vf mean = sum * (1.0f / n);
  SUM(squares, i, n, (V(x, i) - mean) * (V(x, i) - mean))
  vf inv = 1.0f / VECTOR(sqrt)(squares * (1.0f / n) + eps);
  SYNC;
  EACH(i, n) V(y, i) = (V(x, i) - mean) * inv * w[i] + b[i];
  SYNC;
}

// dx = the input of the token before, minus h; `carry` keeps the last of n tokens for the next call
INLINE void token_shift(buf dx, buf h, float *carry, int n) {
  EACH(d, D) V(dx, d) = before(h[d], carry[d]) - V(h, d);
  SYNC;
  FLAT(d, D) carry[d] = h[d][n - 1];
}

// quantised input of a product: h + (h of the token before - h) mu
INLINE vf mixed(const Model *m, const float *mu) {
  Member *s = m->s;
  EACH(d, D) V(s->xm, d) = V(s->h, d) + V(s->dx, d) * mu[d];
  return quantise(s, s->xm, D);
}

// S <- S diag(w) - (S kk) b^T + v k^T, y = S r, token by token; lanes are N value channels of a head
INLINE void recurrence(Member *s, float *S, int tokens) {
  EACH(u, H * ((N + LANES - 1) / LANES)) {
    int c = u / ((N + LANES - 1) / LANES) * N, i0 = u % ((N + LANES - 1) / LANES) * LANES;
    vf z[N];
    for (int j = 0; j < N; j++) FOR_LANE(i) AT(z[j], i) = i0 + i < N ? S[(c + j) * N + i0 + i] : 0;
    for (int t = 0; t < tokens; t++) {
      vf v;
      FOR_LANE(i) AT(v, i) = i0 + i < N ? s->v[c + i0 + i][t] : 0;
      SUM(minus_sa, j, N, z[j] * s->kk[c + j][t])
      vf sa = -minus_sa;
      SUM(y, j, N, (z[j] = z[j] * s->w[c + j][t] + sa * s->a[c + j][t] + v * s->k[c + j][t]) * s->r[c + j][t])
      FOR_LANE(i) if (i0 + i < N) s->y[c + i0 + i][t] = AT(y, i);
    }
    for (int j = 0; j < N; j++) FOR_LANE(i) if (i0 + i < N) S[(c + j) * N + i0 + i] = AT(z[j], i);
  }
  SYNC;
}

INLINE void time_mix(const Model *m, int l, int tokens) {
  Member *s = m->s;
  const float *vec = s->vec;
  float *state = s->state + l * STATE;
  normalise(s->h, s->x, D, VEC(LN1_WEIGHT), VEC(LN1_BIAS), 1e-5f);
  token_shift(s->dx, s->h, state, tokens);
  vf sx = mixed(m, VEC(ATT_X_R));
  MATMUL(s->r, ATT_RECEPTANCE_WEIGHT, D, D);
  sx = mixed(m, VEC(ATT_X_W));
  MATMUL(s->lora, ATT_W1, LORA_W, D);
  EACH(d, LORA_W) V(s->lora, d) = tanh_(V(s->lora, d));
  sx = quantise(s, s->lora, LORA_W);
  MATMUL(s->w, ATT_W2, D, LORA_W);
  EACH(d, D) V(s->w, d) = exp2_((float)(-0.606531 * 1.4426950408889634) * sigmoid(VEC(ATT_W0)[d] + V(s->w, d)));
  sx = mixed(m, VEC(ATT_X_K));
  MATMUL(s->k, ATT_KEY_WEIGHT, D, D);
  sx = mixed(m, VEC(ATT_X_V));
  MATMUL(s->v, ATT_VALUE_WEIGHT, D, D);
  if (l == 0) {
    EACH(d, D) V(s->v_first, d) = V(s->v, d);
  } else {
    MATMUL(s->lora, ATT_V1, LORA_V, D);
    sx = quantise(s, s->lora, LORA_V);
    MATMUL(s->y, ATT_V2, D, LORA_V);
    EACH(d, D)
      V(s->v, d) = V(s->v, d) + (V(s->v_first, d) - V(s->v, d)) * sigmoid(VEC(ATT_V0)[d] + V(s->y, d));
  }
  sx = mixed(m, VEC(ATT_X_A));
  MATMUL(s->lora, ATT_A1, LORA_A, D);
  sx = quantise(s, s->lora, LORA_A);
  MATMUL(s->a, ATT_A2, D, LORA_A);
  EACH(d, D) V(s->a, d) = sigmoid(VEC(ATT_A0)[d] + V(s->a, d));
  sx = mixed(m, VEC(ATT_X_G));
  MATMUL(s->lora, ATT_G1, LORA_G, D);
  EACH(d, LORA_G) V(s->lora, d) = sigmoid(V(s->lora, d));
  sx = quantise(s, s->lora, LORA_G);
  MATMUL(s->g, ATT_G2, D, LORA_G);

  EACH(h, H) {
    buf kk = s->kk + h * N, k = s->k + h * N, a = s->a + h * N;
    for (int i = 0; i < N; i++) V(kk, i) = V(k, i) * VEC(ATT_K_K)[h * N + i];
    SUM(squares, i, N, V(kk, i) * V(kk, i))
    vf inv = 1.0f / vmax(VECTOR(sqrt)(squares), splat(1e-12f));
    for (int i = 0; i < N; i++) {
      V(kk, i) = V(kk, i) * inv;
      V(k, i) = V(k, i) * (1.0f + (V(a, i) - 1.0f) * VEC(ATT_K_A)[h * N + i]);
      V(a, i) = V(kk, i) * V(a, i);               // from here on a is b
    }
  }
  SYNC;
  recurrence(s, state + 2 * D, tokens);
  for (int c = 0; c < D; c += N)
    normalise(s->y + c, s->y + c, N, VEC(ATT_LN_X_WEIGHT) + c, VEC(ATT_LN_X_BIAS) + c, 64e-5f);
  EACH(h, H) {
    int c = h * N;
    SUM(bonus, i, N, V(s->r, c + i) * V(s->k, c + i) * VEC(ATT_R_K)[c + i])
    for (int i = c; i < c + N; i++) V(s->y, i) = (V(s->y, i) + bonus * V(s->v, i)) * V(s->g, i);
  }
  sx = quantise(s, s->y, D);
  MATMUL(s->dx, ATT_OUTPUT_WEIGHT, D, D);
  EACH(d, D) V(s->x, d) = V(s->x, d) + V(s->dx, d);
  SYNC;
}

INLINE void channel_mix(const Model *m, int l, int tokens) {
  Member *s = m->s;
  const float *vec = s->vec;
  normalise(s->h, s->x, D, VEC(LN2_WEIGHT), VEC(LN2_BIAS), 1e-5f);
  token_shift(s->dx, s->h, s->state + l * STATE + D, tokens);
  vf sx = mixed(m, VEC(FFN_X_K));
  MATMUL(s->wide, FFN_KEY_WEIGHT, F, D);
  EACH(d, F) {
    vf k = vmax(V(s->wide, d), splat(0.0f));
    V(s->wide, d) = k * k;
  }
  sx = quantise(s, s->wide, F);
  MATMUL(s->dx, FFN_VALUE_WEIGHT, D, F);
  EACH(d, D) V(s->x, d) = V(s->x, d) + V(s->dx, d);
  SYNC;
}

// Draws a member's noise and works out its vector parameters.
INLINE void perturb(const Model *m, u32 seed, u32 step, int pair) {
  Member *s = m->s;
  u32 k0 = key0(seed, step, pair), k1 = key1(seed, step, pair);
  if (m->rank && s->pair != pair) FLAT(w, R * WORDS) {
    u32 h = noise_word(k0, k1, w);
    for (int b = 0; b < 32; b++) s->noise[32 * w + b] = (int)(h >> b & 1) * 2 - 1 + BIAS;
    for (int b = 0; b < 32; b++) s->minus[32 * w + b] = ~(h >> b) << 31;
  }
  SYNC;
  s->pair = pair;
  for (int i = 0; i < TENSORS; i++) {
    Tensor t = TABLE[i];
    if (!t.cols) FLAT(o, t.out) {
      float q = SIGNED(m->w[t.at + o]);
      if (m->rank) for (int k = 0; k < R; k++) q = q + SIGNED(s->noise[COLUMN(k, t.word) + o]) * m->c;
      s->vec[t.vec + o] = q * m->scale[t.row + o];
    }
  }
  SYNC;
}

// Runs members first to last over T tokens: member m reads text[start[m]...], and adds what it costs to predict each
// next token to score[m], in 1/4096 bit. w: weights + BIAS. state (float [P][L * STATE], carried on) and logits (float
// [P][T][VOCAB]) may be null.
KERNEL score(const i8 *w, const float *scale, const unsigned short *text, const i64 *start, int T, u32 seed, u32 step,
             float c, int *score, float *state, float *logits, int first, int last, void *scratch) {
  SCRATCH(Member);
  s->pair = -1;
  TASKS(member) {
    Model model = {w, scale, s, member % 2 ? -c : c, c != 0 ? R : 0}, *m = &model;
    SYNC;
    perturb(m, seed, step, member / 2);
    float *carried = state ? state + (i64)member * (L * STATE) : 0;
    FLAT(i, L * STATE) s->state[i] = carried ? carried[i] : 0;
    SYNC;
    for (int t0 = 0; t0 < T; t0 += LANES) {
      int tokens = T - t0 < LANES ? T - t0 : LANES;
      const unsigned short *in = text + start[member] + t0;
      Tensor e = TABLE[EMB_WEIGHT];
      TABLET(t, d, D) {
        int token = in[t < tokens ? t : 0];
        float z = SIGNED(w[e.at + token * D + d]);
        if (m->rank) for (int k = 0; k < R; k++)
          z = z + SIGNED(s->noise[COLUMN(k, e.word) + token]) * m->c
                  * SIGNED(s->noise[COLUMN(k, e.word + WORDS_OF(VOCAB)) + d]);
        s->x[d][t] = z * scale[e.row + token];
      }
      SYNC;
      normalise(s->x, s->x, D, s->vec + TABLE[BLOCKS_0_LN0_WEIGHT].vec, s->vec + TABLE[BLOCKS_0_LN0_BIAS].vec, 1e-5f);
      for (int l = 0; l < L; l++) {
        time_mix(m, l, tokens);
        channel_mix(m, l, tokens);
      }
      normalise(s->x, s->x, D, s->vec + TABLE[LN_OUT_WEIGHT].vec, s->vec + TABLE[LN_OUT_BIAS].vec, 1e-5f);
      vf sx = quantise(s, s->x, D);
      matmul(s->logits, m, sx, TABLE[HEAD_WEIGHT], VOCAB, D);
      if (logits) EACH(v, VOCAB) FOR_LANE(t) if (t < tokens)
        logits[((i64)member * T + t0 + t) * VOCAB + v] = s->logits[v][t];
      vf target;
      REDUCE(vmax, -3e38f, top, v, VOCAB, V(s->logits, v))
      FOR_LANE(t) AT(target, t) = s->logits[t < tokens ? in[t + 1] : 0][t];
      SUM(total, v, VOCAB, exp2_((V(s->logits, v) - top) * LOG2E))
      vf bits = log2_(total) - (target - top) * LOG2E;
      vi cost = AS_I(vmin(bits, splat(63.0f)) * 4096.0f + MAGIC) - 0x4B400000;
      EACH(warp, 1) FOR_LANE(t) if (t < tokens) ADD(&score[member], AT(cost, t));
      SYNC;
    }
    if (carried) FLAT(i, L * STATE) carried[i] = s->state[i];
  }
}

// ---- the update: Z = sum_i f_i A_i B_i^T, UNIT rows of a tensor at a time; here a lane is a column of Z

#define PAIRS 256                                 // pairs whose noise is held at once
#define K (R * PAIRS)                             // inner dimension of a product: column k of pair p is k PAIRS + p

typedef struct {
  i8 fa[UNIT][K];                                 // f A^T + BIAS
  int b[K / 4][LANES];                            // B of LANES columns, four pairs to a word
  u32 k0[PAIRS], k1[PAIRS], h[PAIRS];
  int z[UNIT][COLUMNS];
} Update;

// z += fa B of rows j to j+n, LANES columns from c
INLINE void update_rows(Update *s, vi start, int c, int j, int n, int words) {
  vi acc[ROWS];
  UNROLL for (int i = 0; i < n; i++) acc[i] = Q((block)s->z[j + i], c / LANES) + start;
  for (int k = 0; k < R; k++) dot_rows(acc, n, s->b + k * (PAIRS / 4), words, s->fa[j] + k * PAIRS, K);
  UNROLL for (int i = 0; i < n; i++) Q((block)s->z[j + i], c / LANES) = acc[i];
}

// Moves n weights by round(gain z) / 2^15 int8 steps, whole steps only; the rest stays in the residuals.
INLINE void move(i8 *restrict weights, short *restrict residuals, const int *restrict z, float gain, int n) {
  FLAT(i, n) {
    float x = z[i] * gain;
    x = x > 2097152.0f ? 2097152.0f : x < -2097152.0f ? -2097152.0f : x;  // at most 64 steps
    int total = residuals[i] + (int)RINT(x), whole = (total + 16384) >> 15, q = weights[i] + whole;
    residuals[i] = total - whole * 32768;
    weights[i] = q > 127 ? 127 : q < -127 ? -127 : q;
  }
}

// Moves all weights along Z. f: int8 fitness of each pair, padded with zeros to a multiple of 4.
KERNEL update(i8 *weights, short *residuals, const i8 *f, int pairs, u32 seed, u32 step, float gain,
              int first, int last, void *scratch) {
  SCRATCH(Update);
  TASKS(u) {
    Tensor t = TABLE[UNITS[u].tensor];
    // A vector is taken as one row whose columns are its entries: B of [D, 1] is 1, and A plays the part of B.
    int o0 = UNITS[u].row, rows = !t.cols ? 1 : t.out - o0 < UNIT ? t.out - o0 : UNIT, cols = t.cols ? t.cols : t.out;
    int bword = t.cols ? t.word + WORDS_OF(t.out) : t.word;
    for (int j = 0; j < rows; j++) FLAT(i, (cols + 31) / 32 * 32) s->z[j][i] = 0;
    for (int p0 = 0; p0 < pairs; p0 += PAIRS) {
      int count = pairs - p0 < PAIRS ? pairs - p0 : PAIRS, words = (count + 3) / 4;
      SYNC;
      FLAT(p, 4 * words) s->k0[p] = key0(seed, step, p0 + p);
      FLAT(p, 4 * words) s->k1[p] = key1(seed, step, p0 + p);
      for (int k = 0; k < R; k++) {
        SYNC;
        FLAT(p, 4 * words) s->h[p] = t.cols ? noise_word(s->k0[p], s->k1[p], k * WORDS + t.word + o0 / UNIT) : ~0u;
        SYNC;
        for (int j = 0; j < rows; j++)
          FLAT(p, 4 * words) s->fa[j][k * PAIRS + p] = (s->h[p] >> j & 1 ? f[p0 + p] : -f[p0 + p]) + BIAS;
      }
      for (int i0 = 0; i0 < cols; i0 += LANES) {
        for (int k = 0; k < R; k++) {
          SYNC;
          FLAT(p, 4 * words) s->h[p] = noise_word(s->k0[p], s->k1[p], k * WORDS + bword + i0 / 32) >> i0 % 32;
          SYNC;
          EACH(q, words) FOR_LANE(l) {
            const u32 *h = s->h + 4 * q;
            u32 bits = (h[0] >> l & 1) | (h[1] >> l & 1) << 8 | (h[2] >> l & 1) << 16 | (h[3] >> l & 1) << 24;
            s->b[k * (PAIRS / 4) + q][l] = ~(bits * 0xFE);  // bytes 0 and 1 become -1 and 1
          }
        }
        SYNC;
        vi start = ZERO;
        for (int k = 0; k < R; k++) start += unbias(s->b + k * (PAIRS / 4), words);
        EACH(j, rows / ROWS) update_rows(s, start, i0, j * ROWS, ROWS, words);
        EACH(j, rows % ROWS) update_rows(s, start, i0, rows - rows % ROWS + j, 1, words);
      }
    }
    SYNC;
    for (int j = 0; j < rows; j++) {
      int at = t.at + (o0 + j) * cols;
      move(weights + at, residuals + at, s->z[j], gain, cols);
    }
    SYNC;
  }
}

// biased = w + BIAS; a task is 4096 of n weights
KERNEL bias(const i8 *w, i8 *biased, int n, int first, int last, void *scratch) {
  TASKS(i) FLAT(j, 4096) if (4096 * i + j < n) biased[4096 * i + j] = w[4096 * i + j] + BIAS;
}

KERNEL scratch_bytes(int *bytes) { bytes[0] = sizeof(Member); bytes[1] = sizeof(Update); }
"""


def update_units(cfg: Config) -> list[tuple[str, int]]:
    """The tasks of an update: parameter name and first row; a vector is one row."""
    return [(name, row) for name, p in cfg.params.items() for row in range(0, p.out if p.cols else 1, UNIT)]


def kernel_source(cfg: Config, rank: int) -> str:
    """The kernel with a model's shape as compile-time constants, and its parameter table."""
    kinds = [n[9:] for n in replace(cfg, layers=2).params if n.startswith("blocks.1.")]
    globals_ = [n for n in cfg.params if not n.startswith("blocks.") or ".ln0." in n]
    names = globals_ + [f"blocks.{layer}.{kind}" for layer in range(cfg.layers) for kind in kinds]
    rows, vec = [], 0
    for name in names:
        p = cfg.params.get(name)  # layer 0 has no value residual
        rows.append((p.out, p.cols, p.at, p.row, p.word, vec) if p else (0,) * 6)
        vec += p.out if p and not p.cols else 0
    units = [(names.index(name), row) for name, row in update_units(cfg)]
    constants: dict[str, object] = {
        "D": cfg.dim, "L": cfg.layers, "N": cfg.head_size, "F": cfg.ffn, "VOCAB": cfg.vocab, "R": rank, "UNIT": UNIT,
        "LORA": max(cfg.lora), "WORDS": cfg.sizes[2], "TENSORS": len(names), "VECTORS": vec, "KINDS": len(kinds),
        "COLUMNS": -(-max(cfg.ffn, cfg.dim, *cfg.lora) // 32) * 32,
    }
    constants |= {f"LORA_{n.upper()}": size for n, size in zip(LORA, cfg.lora, strict=True)}
    constants |= {f"EXP2_{i}": f"{float(c)!r}f" for i, c in enumerate(EXP2)}
    constants |= {f"LOG2_{i}": f"{float(c)!r}f" for i, c in enumerate(LOG2)}

    def enum(items: list[str]) -> str:
        return "enum { " + ", ".join(n.upper().replace(".", "_") for n in items) + " };\n"

    def array(kind: str, items: Sequence[tuple[int, ...]]) -> str:
        return f"CONSTANT {kind}[] = {{ {', '.join('{' + ', '.join(map(str, i)) + '}' for i in items)} }};\n"

    shape = "".join(f"#define {k} {v}\n" for k, v in constants.items()) + enum([*globals_, "globals"]) + enum(kinds)
    shape += array("struct Tensor { int out, cols, at, row, word, vec; } TABLE", rows)
    shape += "typedef struct Tensor Tensor;\n" + array("struct { int tensor, row; } UNITS", units)
    return MACHINE + shape + KERNEL


# ---------------------------------------------------------------------------------------------------------------------
# Backends: `score` runs the population, `update` moves the weights; numpy, c and cuda give the same bits


class NumpyBackend:
    """The reference. Works through the population in chunks, so memory is bounded."""

    name = "numpy"
    memory = 2**28  # bytes, roughly: bounds how many members are run at once

    def __init__(self, cfg: Config, rank: int) -> None:
        self.cfg, self.rank = cfg, rank

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, tokens: int, noise: tuple[int, int, float],
              state: np.ndarray | None = None, logits: np.ndarray | None = None) -> np.ndarray:
        """Cost of T tokens for each of P members, in 1/4096 bit: int32 [P]; the fitness is its negative.

        text: uint16 tokens; start: int64 [P], member m reads text[start[m]:] and must predict what follows each of its
        T tokens; noise: (seed, step, sigma), sigma 0 for the model itself. state (see `zero_state`) is carried on when
        given, logits (float32 [P, T, V]) filled.
        """
        seed, step, sigma = noise
        cost = np.empty(len(start), np.int32)
        # A generous count of the float32 alive at once: activations of every token, and the noise of every member.
        each = 4 * (40 * tokens * max(self.cfg.ffn, self.cfg.vocab) + 64 * self.cfg.sizes[1] + self.cfg.dim**2)
        chunk = max(1, self.memory // each)
        for i in range(0, len(start), chunk):
            part = slice(i, min(i + chunk, len(start)))
            member = np.arange(part.start, part.stop)
            read = text[start[part, None] + np.arange(tokens + 1)]
            carried = zero_state(self.cfg, len(member)) if state is None else state[part]
            out = forward(model, read[:, :-1], carried, member_noise(member, seed, step, sigma, self.rank))
            cost[part] = loss(out, read[:, 1:]).sum(1)
            if logits is not None:
                logits[part] = out
        return cost

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float) -> None:
        """Z = sum_i f_i A_i B_i^T for f int8 [P/2], then weights and residuals move by gain Z (in 2^-15 int8 steps)."""
        for p in self.cfg.params.values():
            Z = np.zeros((p.out, max(p.cols, 1)), np.int32)
            for i in range(0, len(f), 256):  # a block's sums stay below 2^24, so the float32 product is exact
                part = f[i:i + 256]
                A, B = factors(self.cfg, p, pair_keys(seed, step, np.arange(i, i + len(part))), self.rank)
                fA = (part[:, None, None] * A.astype(F32)).reshape(-1, p.out)
                Z += (fA.T @ B.astype(F32).reshape(len(fA), -1)).astype(np.int32)
            at = slice(p.at, p.at + p.size)
            move = np.clip(Z.astype(F32) * F32(gain), F32(-(2**21)), F32(2**21))
            total = model.residual[at] + np.rint(move).astype(np.int32).ravel()
            whole = (total + 2**14) >> 15
            model.residual[at] = total - (whole << 15)
            model.q[at] = np.clip(model.q[at] + whole, -127, 127)


class KernelBackend:
    """The kernel, on this CPU or on a GPU; methods as in NumpyBackend. `launch(name, tasks, args, out)` runs it."""

    def __init__(self, cfg: Config, rank: int, name: str, launch: Callable[..., None]) -> None:
        self.cfg, self.rank, self.name, self.launch = cfg, rank, name, launch
        self.units = len(update_units(cfg))
        self.biased = np.zeros(cfg.sizes[0], np.int8)

    def score(self, model: Model, text: np.ndarray, start: np.ndarray, tokens: int, noise: tuple[int, int, float],
              state: np.ndarray | None = None, logits: np.ndarray | None = None) -> np.ndarray:
        """See NumpyBackend."""
        seed, step, sigma = noise
        cost = np.zeros(len(start), np.int32)
        self.launch("bias", -(-len(model.q) // 4096), (model.q, self.biased, np.int32(len(model.q))), [self.biased])
        self.launch("score", len(start), (
            self.biased, model.scale, text, start, np.int32(tokens), np.uint32(seed), np.uint32(step),
            F32(sigma / math.sqrt(self.rank)), cost, state, logits), [cost, state, logits])
        return cost

    def update(self, model: Model, f: np.ndarray, seed: int, step: int, gain: float) -> None:
        """See NumpyBackend."""
        padded = np.pad(f, (0, -len(f) % 4))
        self.launch("update", self.units, (
            model.q, model.residual, padded, np.int32(len(f)), np.uint32(seed), np.uint32(step), F32(gain)),
            [model.q, model.residual])


Backend = NumpyBackend | KernelBackend


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """A directory for compiled code that nobody but its owner can write; a fresh one where that cannot be had."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "nano_eggroll"
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


def c_launcher(source: str, threads: int, flags: str = NATIVE) -> Callable[..., None]:
    """launch(kernel, tasks, args, out) on the CPU's cores; ctypes lets go of the GIL, so Python threads are enough."""
    lib = ctypes.CDLL(str(compile_c(source, flags)))
    size = np.zeros(2, np.int32)
    lib.scratch_bytes(*c_arguments((size,)))
    free: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(threads):
        free.put(np.empty(int(size.max()) + 64, np.uint8))
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def launch(name: str, tasks: int, args: tuple, out: list[np.ndarray]) -> None:
        kernel, argv = getattr(lib, name), c_arguments(args)
        pieces = min(tasks, 4 * threads) if threads > 1 else 1  # several for each thread, in case one is held up

        def run(i: int) -> None:
            scratch = free.get()
            kernel(*argv, i * tasks // pieces, (i + 1) * tasks // pieces,
                   ctypes.c_void_p(-(-scratch.ctypes.data // 64) * 64))
            free.put(scratch)

        list(pool.map(run, range(pieces)) if threads > 1 else map(run, range(pieces)))

    return launch


def cuda_launcher(source: str) -> Callable[..., None]:
    """launch(kernel, tasks, args, out) on the GPU; read-only arrays stay there, those in `out` are copied back."""
    import cupy

    module = cupy.RawModule(code=source, options=CUDA_OPTIONS)
    size = cupy.empty(2, np.int32)
    module.get_function("scratch_bytes")((1,), (1,), (size,))
    grid = 4 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    scratch = cupy.empty(grid * int(size.get().max()), np.uint8)
    kept: dict[int, tuple[np.ndarray, Any]] = {}

    def put(a: object) -> Any:
        if not isinstance(a, np.ndarray):
            return np.uintp(0) if a is None else a
        if a.flags.writeable:
            return cupy.asarray(a)
        if id(a) not in kept:
            kept[id(a)] = (a, cupy.asarray(a))
        return kept[id(a)][1]

    def launch(name: str, tasks: int, args: tuple, out: list[np.ndarray]) -> None:
        device = [put(a) for a in args]
        module.get_function(name)((min(grid, tasks),), (256,), (*device, np.int32(0), np.int32(tasks), scratch))
        for host, there in zip(args, device, strict=True):
            if host is not None and any(host is o for o in out):
                host[...] = there.get()

    return launch


# Every operation rounds once, as in numpy and C: no fused multiply-add, denormals kept, exact division and root.
CUDA_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


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


def segments(text: np.ndarray, tokens: int, seed: int, step: int, pairs: np.ndarray) -> np.ndarray:
    """Where each pair's text starts, int64 [P/2]: uniform over the text, from the hash, like the noise."""
    h = mix(pair_keys(seed, step, pairs)[0] ^ np.uint32(0x5EED)).astype(np.uint64)
    return (h * np.uint64(len(text) - tokens) >> np.uint64(32)).astype(np.int64)


def shape_fitness(d: np.ndarray) -> np.ndarray:
    """Differences within pairs, int [n] -> fitness, int8 [n]: d / RMS(d), clipped to +-3, in steps of 3/127."""
    rms = math.sqrt(math.fsum((d.astype(float) ** 2).tolist()) / len(d))  # fsum: exact, so the same everywhere
    return np.clip(np.rint(d * (127 / 3 / rms)), -127, 127).astype(np.int8) if rms else np.zeros(len(d), np.int8)


def es_step(model: Model, backend: Backend, text: np.ndarray, es: ES) -> float:
    """One step of EGGROLL (algorithm 1 of the paper): changes the model, returns the population's mean bits per token.

    text: uint16 [n], n > T. The update is Z = sum_i f_i A_i B_i^T over the pairs; Z / (|f| sqrt(R)) has unit variance
    where there is no signal, so the learning rate is the size of a move in int8 steps.
    """
    pairs = np.arange(es.population // 2)
    start = np.repeat(segments(text, es.tokens, es.seed, model.step, pairs), 2)
    cost = backend.score(model, text, start, es.tokens, (es.seed, model.step, es.sigma))
    f = shape_fitness(cost[1::2] - cost[::2])
    norm = math.sqrt(es.rank * int((f.astype(np.int64) ** 2).sum()))
    if norm:
        backend.update(model, f, es.seed, model.step, es.rate(model.step) * 2**15 / norm)
    model.step += 1
    return float(cost.mean(dtype=np.float64)) / (BITS * es.tokens)


# =====================================================================================================================
# The method ends here. What follows loads text, trains, saves, samples and reads the command line.


def load_text(path: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Training text and validation text (the last 10%) of a file, uint16 bytes, read-only; raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a file, for example one made by: cat {path}/*.txt > all.txt")
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16)
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): give the path of a text file with --data") from None
    cut = len(data) * 9 // 10
    if len(data) - cut <= tokens:
        raise UserError(f"{path} has {len(data)} bytes, too short for --tokens {tokens}, which its last 10% must hold: "
                        f"use at least {10 * tokens + 10} bytes or fewer tokens")
    data.setflags(write=False)
    return data[:cut], data[cut:]


def yardsticks(path: Path, train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    """What simple models reach on this text, bits/byte of the validation part (counts are from the training part)."""
    counts = np.zeros((256, 256))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    seen = max(1, (counts.sum(0) > 0).sum())

    def bits(table: np.ndarray, at: tuple) -> float:
        table = (table + 0.5) / (table.sum(-1, keepdims=True) + 0.5 * seen)  # add half, over the bytes that occur
        return float(-np.log2(table[at]).mean())

    text = np.concatenate([train, val]).astype(np.uint8).tobytes()
    found = {"uniform": 8.0, "unigram": bits(counts.sum(0), (val[1:],)), "bigram": bits(counts, (val[:-1], val[1:])),
             "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text)}
    entropy = path.with_suffix(".entropy")  # written by the generator of the built-in text
    if path == DATA and entropy.exists():
        found["true entropy"] = float(entropy.read_text())
    return found


ARRAYS = ("q", "scale", "residual")  # a model's arrays


def save_model(model: Model, path: Path) -> None:
    """Write model.npz (plain numpy arrays) whole or not at all."""
    meta = json.dumps({"config": asdict(model.cfg), "step": model.step, "extra": model.extra}).encode()
    arrays = {k: getattr(model, k) for k in ARRAYS} | {"meta": np.frombuffer(meta, np.uint8)}
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        np.savez(f, **arrays, check=np.frombuffer(digest(arrays), np.uint8))  # type: ignore[arg-type]
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def digest(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 of a saved model's arrays."""
    return hashlib.sha256(b"".join(arrays[k].tobytes() for k in (*ARRAYS, "meta"))).digest()


def load_model(path: Path) -> Model:
    """Read model.npz; raises UserError unless every byte is as it was written."""
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in (*ARRAYS, "meta", "check")}
        if digest(arrays) != arrays["check"].tobytes():
            raise ValueError("its checksum is wrong")
        meta = json.loads(arrays["meta"].tobytes())
        q, scale, residual = (arrays[k] for k in ARRAYS)
        m = Model(Config(**meta["config"]), q, scale, residual, meta["step"], meta["extra"])
        size, rows, _ = m.cfg.sizes
        if [(a.dtype, a.shape) for a in (m.q, m.scale, m.residual)] != [
                (np.int8, (size,)), (np.float32, (rows,)), (np.int16, (size,))]:
            raise ValueError("its arrays do not fit its configuration")
        return m
    except FileNotFoundError:
        raise UserError(f"no file {path}: give a model.npz that a training run wrote") from None
    except Exception as e:  # noqa: BLE001 (a damaged zip file can raise almost anything)
        raise UserError(f"{path} is not a whole model.npz ({e}): use another copy or train again") from None


def evaluate(model: Model, backend: Backend, text: np.ndarray, tokens: int) -> float:
    """Bits per token of a text, in segments of T tokens, each from state zero."""
    whole = np.arange(0, len(text) - tokens, tokens)
    rest = (len(text) - 1) % tokens
    total = int(backend.score(model, text, whole, tokens, (0, 0, 0.0)).sum(dtype=np.int64))
    if rest:
        total += int(backend.score(model, text, np.array([len(text) - 1 - rest]), rest, (0, 0, 0.0))[0])
    return total / (BITS * (len(text) - 1))


def generate(model: Model, backend: Backend, prompt: bytes, length: int, seed: int,
             temperature: float = 0.7) -> Iterator[bytes]:
    """The model's continuation of a prompt, byte by byte."""
    state, read = zero_state(model.cfg, 1), np.frombuffer(prompt or b"\n", np.uint8).astype(np.uint16)
    for i in range(length):
        logits = np.zeros((1, len(read), model.cfg.vocab), F32)
        text = np.append(read, np.uint16(0))  # what comes next is not known, and its cost not asked for
        backend.score(model, text, np.zeros(1, np.int64), len(read), (0, 0, 0.0), state, logits)
        last = logits[0, -1] - logits[0, -1].max()
        p = np.cumsum(exp2(last * (LOG2E / F32(temperature))).astype(float))
        uniform = int(mix(mix(seed) + np.uint32(i))) / 2**32
        token = int((p <= p[-1] * uniform).sum())
        yield bytes([token])
        read = np.array([token], np.uint16)


def cuda_device() -> str:
    """Name of the GPU; raises UserError where there is none, saying why."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except ImportError:
        raise UserError("--backend cuda needs CuPy: pip install cupy-cuda12x, or use --backend c") from None
    except Exception as e:  # noqa: BLE001 (CuPy's errors have no base class without CuPy)
        raise UserError(f"--backend cuda found no working GPU ({str(e).splitlines()[0]}): use --backend c") from None


def make_backend(name: str | None, cfg: Config, rank: int, threads: int | None = None) -> Backend:
    """The named backend, or the fastest that works here: cuda, c, numpy."""
    for choice in [name] if name else ["cuda", "c", "numpy"]:
        try:
            if choice == "cuda":
                cuda_device()
                return KernelBackend(cfg, rank, choice, cuda_launcher(kernel_source(cfg, rank)))
            if choice == "c":
                return KernelBackend(cfg, rank, choice, c_launcher(kernel_source(cfg, rank), threads or cores()))
        except UserError as e:
            if name:
                raise
            if choice == "c":
                print(f"note: {e}; going on with numpy, which is much slower", file=sys.stderr)
    return NumpyBackend(cfg, rank)


def plot(out: Path, marks: dict[str, float]) -> None:
    """Draw out/log.csv as out/curve.png, with the yardsticks as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    fig, ax = plt.subplots(figsize=(8, 5))
    tokens = [int(r["tokens"]) for r in rows]
    ax.plot(tokens, [float(r["train_bits"]) for r in rows], color="0.7", label="training (with noise)")
    ax.plot(tokens, [float(r["val_bits"]) for r in rows], color="C0", label="validation")
    for name, bits in marks.items():
        ax.axhline(bits, color="0.5", linewidth=0.8, linestyle=":")
        ax.text(1.01, bits, f"{name} {bits:.2f}", va="center", fontsize=8, transform=ax.get_yaxis_transform())
    ax.set(xlabel="tokens read by the population", ylabel="bits per byte", xscale="log", title="nano_eggroll")
    ax.legend()
    fig.savefig(out / "curve.png", dpi=150, bbox_inches="tight")
    print(f"curve {out / 'curve.png'}")


def train(model: Model, backend: Backend, es: ES, text: np.ndarray, val: np.ndarray, out: Path) -> float:
    """Train from model.step to es.steps, return the validation bits/byte.

    log.csv and model.npz go to `out` at every validation, the last step's among them; model.npz also after Ctrl-C.
    """
    every = max(1, es.steps // 20)  # steps between validations
    stop: list[int] = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    live = sys.stdout.isatty()
    began, first, costs, shown = time.perf_counter(), model.step, [], 0.0
    per_step = es.population * es.tokens
    val_bits = evaluate(model, backend, val, es.tokens)
    with open(out / "log.csv", "a", buffering=1) as log:
        if not log.tell():
            log.write("step,seconds,tokens,train_bits,val_bits,tokens_per_s\n")
        while model.step < es.steps and not stop:
            costs.append(es_step(model, backend, text, es))
            now = time.perf_counter()
            speed = (model.step - first) * per_step / (now - began)
            validate = model.step % every == 0 or model.step == es.steps
            if validate or (live and now - shown > 0.2):
                shown, mean = now, sum(costs) / len(costs)
                if validate:
                    val_bits, costs = evaluate(model, backend, val, es.tokens), []
                    log.write(f"{model.step},{now - began:.2f},{model.step * per_step},"
                              f"{mean:.4f},{val_bits:.4f},{speed:.0f}\n")
                    save_model(model, out / "model.npz")
                left = (es.steps - model.step) * per_step / speed
                line = (f"step {model.step}/{es.steps}  train {mean:.3f}  validation {val_bits:.3f} "
                        f"bits/byte  {speed / 1e3:,.0f}k tokens/s  {int(left) // 60}:{int(left) % 60:02d} left")
                print("\r" + line if live else line, end="\033[K" if live else "\n", flush=True)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if live:
        print()
    if stop:
        save_model(model, out / "model.npz")
        raise UserError(f"stopped at step {model.step} of {es.steps} and saved: to go on, use --resume --out {out}")
    return val_bits


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def bench(cfg: Config, es: ES, backend: Backend) -> None:
    """Print tokens/s of inference, of the perturbed pass and of the whole step, side by side: medians and quartiles."""
    model, text = new_model(cfg, 0), mix(np.arange(2**20)).astype(np.uint16) % np.uint16(cfg.vocab)
    text.setflags(write=False)
    start = np.repeat(segments(text, es.tokens, es.seed, 0, np.arange(es.population // 2)), 2)
    runs: dict[str, tuple[Callable[[], object], list[float]]] = {
        "inference (no perturbation)": (lambda: backend.score(model, text, start, es.tokens, (0, 0, 0.0)), []),
        "EGGROLL forward": (lambda: backend.score(model, text, start, es.tokens, (0, 0, es.sigma)), []),
        "EGGROLL whole step": (lambda: es_step(model, backend, text, replace(es, steps=2**31)), []),
    }
    print(f"{backend.name}: D={cfg.dim} L={cfg.layers} N={cfg.head_size} T={es.tokens} "
          f"population {es.population} rank {es.rank}")
    for run, _ in runs.values():
        run()
    began = time.perf_counter()
    while time.perf_counter() - began < 10 or len(runs["EGGROLL whole step"][1]) < 3:
        for run, seconds in runs.values():  # one after the other, so that a noisy moment hits all
            t = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - t)
    base = np.median(runs["inference (no perturbation)"][1])
    for label, (_, seconds) in runs.items():
        low, mid, high = (es.population * es.tokens / q for q in np.percentile(seconds, [75, 50, 25]))
        ratio = base / np.median(seconds)
        print(f"{label:28} {mid:12,.0f} tokens/s  [{low:,.0f} to {high:,.0f}]  {ratio:.3f} of inference")
    try:
        import resource
    except ImportError:  # Windows
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"peak memory {peak:,.0f} MB")


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Instead of the usage text."""
        raise UserError(f"{message}; --help lists the options")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; options that were not given are None."""
    p = Parser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", type=Path, help="text, as bytes; the last 10%% is for validation (data/tales.txt)")
    p.add_argument("--out", type=Path, help="folder for model.npz and log.csv (out, or out-2, ... where that is taken)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    p.add_argument("--load", type=Path, metavar="FILE", help="start from this model.npz")
    p.add_argument("--backend", choices=["numpy", "c", "cuda"], help="default: the fastest that works here")
    p.add_argument("--threads", type=int, metavar="N", help="of the c backend (all cores this process may use)")
    for settings, names in (Config(), SHAPE), (ES(), [f.name for f in fields(ES)]):
        for name in names:
            value = getattr(settings, name)
            p.add_argument("--" + name.replace("_", "-"), type=type(value), metavar="N", help=f"{HELP[name]} ({value})")
    p.add_argument("--minutes", type=float, metavar="N", help="choose --steps so that training takes about this long")
    p.add_argument("--sample", metavar="PROMPT", help="continue this text with the model of --load")
    p.add_argument("--eval", action="store_true", help="bits/byte of the model of --load on the last 10%% of --data")
    p.add_argument("--bench", action="store_true", help="measure this machine")
    p.add_argument("--plot", action="store_true", help="draw the curve as curve.png in --out (needs matplotlib)")
    return p.parse_args(argv)


DATA = Path(__file__).parent / "data" / "tales.txt"
SHAPE = ("dim", "layers", "head_size")
HELP = {
    "dim": "width D", "layers": "number of layers", "head_size": "width of a head, a divisor of --dim",
    "population": "members, an even number", "rank": "rank of the perturbations, 1 to 8",
    "tokens": "length of a segment", "steps": "updates", "sigma": "size of the perturbations, in int8 steps",
    "lr": "learning rate, in int8 steps; 0: from --steps",
    "seed": "of weights, noise and order of the text",
}


def prepare_out(out: Path | None) -> Path:
    """A writable folder with no run in it."""
    for path in [out] if out else [Path("out"), *(Path(f"out-{i}") for i in range(2, 1000))]:
        if not any((path / name).exists() for name in ("model.npz", "log.csv")):
            break
    else:
        raise UserError(f"{path} already holds a run, which would be lost: give another --out, or --resume to go on")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "log.csv").touch()
    except OSError as e:
        raise UserError(f"cannot write to {path} ({e.strerror}): give a folder of your own with --out") from None
    return path


def steps_for(minutes: float, model: Model, backend: Backend, es: ES, text: np.ndarray) -> int:
    """How many steps take this long here, from a few steps of a copy."""
    trial, es = replace(model, q=model.q.copy(), residual=model.residual.copy(), step=0), replace(es, steps=2**31)
    es_step(trial, backend, text, es)  # warms up
    began = time.perf_counter()
    while trial.step < 3 or time.perf_counter() - began < 0.6 * minutes:
        es_step(trial, backend, text, es)
    return max(1, round((trial.step - 1) * 60 * minutes / (time.perf_counter() - began)))


def run(a: argparse.Namespace) -> None:
    """Do what the command line says; raises UserError."""
    given = {f.name: getattr(a, f.name) for f in fields(ES) if getattr(a, f.name) is not None}
    shape = {name: getattr(a, name) for name in SHAPE if getattr(a, name) is not None}
    es, out, data = ES(**given), a.out, a.data or DATA
    if a.threads is not None and a.threads < 1:
        raise UserError(f"--threads {a.threads} is out of range: give 1 or more")
    if a.minutes is not None and not 0 < a.minutes < 1e6:
        raise UserError(f"--minutes {a.minutes:g} is out of range: give a positive number of minutes")
    if a.resume:
        if not out or given or shape or a.load or a.data:
            raise UserError("--resume goes with --out, and the settings are the run's own: leave the others out")
        model = load_model(out / "model.npz")
        if "es" not in model.extra:
            raise UserError(f"{out}/model.npz is not from a training run: use --load to start one from it")
        es, data = ES(**model.extra["es"]), Path(model.extra["data"])
    elif a.load:
        model = load_model(a.load)
        if any(getattr(model.cfg, name) != value for name, value in shape.items()):
            raise UserError(f"{shape} is not the shape of {a.load}: leave it out, the file says it")
        if a.tokens is None and "es" in model.extra:
            es = replace(es, tokens=model.extra["es"]["tokens"])  # as it was validated
    else:
        cfg = Config(**shape)
        if a.bench:
            return bench(cfg, es, make_backend(a.backend, cfg, es.rank, a.threads))
        if a.eval or a.sample is not None:
            raise UserError("--eval and --sample need a model: add --load model.npz")
        model = new_model(cfg, es.seed)
    if model.cfg.vocab != 256:
        raise UserError(f"the model's vocabulary of {model.cfg.vocab} is not bytes: load one of 256 tokens")
    if a.eval or a.sample is not None:
        backend = make_backend(a.backend, model.cfg, es.rank, a.threads)
        if a.sample is not None:
            write_sample(model, backend, a.sample, es.seed)
        if a.eval:
            print(f"bits/byte {evaluate(model, backend, load_text(data, es.tokens)[1], es.tokens):.4f}")
        return None

    if a.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or open log.csv in a spreadsheet")
    text, val = load_text(data, es.tokens)
    backend = make_backend(a.backend, model.cfg, es.rank, a.threads)
    out = out if a.resume else prepare_out(out)
    marks = yardsticks(data, text, val)
    print("bits/byte of " + data.name + ": " + "  ".join(f"{k} {v:.2f}" for k, v in marks.items()))
    if a.minutes is not None and not a.resume:
        es = replace(es, steps=steps_for(a.minutes, model, backend, es, text))
        print(f"--minutes {a.minutes:g} is --steps {es.steps} at this speed")
    if not a.resume:
        model.step, model.extra = 0, {"es": asdict(es), "data": str(data)}
    print(f"RWKV-7 of {sum(p.size for p in model.cfg.params.values()):,} int8 weights, population {es.population}, "
          f"backend {backend.name}, {a.threads or cores()} threads")
    bits = train(model, backend, es, text, val, out)
    if a.plot:
        plot(out, marks)
    write_sample(model, backend, "", es.seed)
    print(f"model {out / 'model.npz'}")
    print(f"bits/byte {bits:.4f}")
    print(f"weights sha256 {model.sha256()}")
    return None


def write_sample(model: Model, backend: Backend, prompt: str, seed: int) -> None:
    """Print a prompt and its continuation, as it comes."""
    print("--- sample\n" + prompt, end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in generate(model, backend, prompt.encode(errors="surrogateescape"), 400, seed):
        text = decoder.decode(byte)  # empty in the middle of a character; control characters are not for the terminal
        print("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text), end="", flush=True)
    print("\n---")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what this terminal cannot show
    try:
        run(parse(argv))
    except UserError as e:
        print(f"nano_eggroll: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
